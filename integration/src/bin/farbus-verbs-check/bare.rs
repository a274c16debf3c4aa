//! Queue pairs without our protocol: what the device alone can do and refuses to do, and how long a
//! round trip takes at least.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use farbus_fabric::verbs::raw::{
    Access, Address, Chain, Channel, CompletionQueue, Connection, Context, Domain, GidKind,
    QueuePair, QueueSizes, Region, Status, Write, device_names,
};
use vm_memory::MmapRegion;

use crate::Outcome;
use crate::pair::PATIENCE;

/// One queue pair with memory of its own.
pub(crate) struct Bare {
    pair: QueuePair,
    sent: Arc<CompletionQueue>,
    received: Arc<CompletionQueue>,
    domain: Arc<Domain>,
    page: Region,
    port: u8,
    gid_index: u8,
    address: Address,
}

/// Memory for small messages, and behind them for 4 KiB of data.
const PAGE: usize = 8192;
/// Work requests that may be under way.
const SENDS: u32 = 32;

impl Bare {
    /// On the device that has an IP address, in a domain of its own.
    pub(crate) fn new(address: &str) -> Outcome<Self> {
        Self::with_memory(address, PAGE)
    }

    fn with_memory(address: &str, len: usize) -> Outcome<Self> {
        let wanted = address.parse()?;
        for name in device_names()? {
            let context = Arc::new(Context::open(&name)?);
            let port = 1;
            let found = (0..context.port(port)?.gids).find_map(|index| {
                let (gid, kind) = context.gid(port, index)?;
                (kind == GidKind::RoceV2 && gid.is_of(wanted)).then_some((index as u8, gid))
            });
            let Some((gid_index, gid)) = found else {
                continue;
            };
            let domain = Domain::new(&context)?;
            let channel = Channel::new(&context)?;
            let sent = CompletionQueue::new(&channel, &context, 64)?;
            let received = CompletionQueue::new(&channel, &context, 64)?;
            let sizes = QueueSizes {
                sends: SENDS,
                receives: 32,
                pieces: 1,
                inline: 64,
            };
            let pair = QueuePair::new(&domain, &sent, &received, sizes)?;
            pair.initialise(port)?;
            let memory = Arc::new(MmapRegion::new(len)?);
            let place = memory.as_ptr() as u64;
            let page = Region::new(&domain, &memory, 0, len, place, Access::RemoteWrite)?;
            let address = Address {
                gid,
                lid: 0,
                queue_pair: pair.number(),
                first_packet: 7,
            };
            return Ok(Bare {
                pair,
                sent,
                received,
                domain,
                page,
                port,
                gid_index,
                address,
            });
        }
        Err(format!("no RDMA device has the address {address}").into())
    }

    /// Two that are joined.
    pub(crate) fn pair(address: &str) -> Outcome<(Self, Self)> {
        Self::pair_with_memory(address, PAGE)
    }

    fn pair_with_memory(address: &str, len: usize) -> Outcome<(Self, Self)> {
        let one = Bare::with_memory(address, len)?;
        let other = Bare::with_memory(address, len)?;
        one.join(&other.address)?;
        other.join(&one.address)?;
        Ok((one, other))
    }

    fn join(&self, peer: &Address) -> Outcome {
        let connection = Connection {
            port: self.port,
            gid_index: self.gid_index,
            mtu: 4096,
            timeout: 13,
            retries: 6,
        };
        Ok(self
            .pair
            .connect(&connection, self.address.first_packet, peer)?)
    }

    pub(crate) fn region(
        &self,
        memory: &Arc<MmapRegion>,
        address: u64,
        access: Access,
    ) -> Outcome<Region> {
        let len = memory.size();
        Ok(Region::new(&self.domain, memory, 0, len, address, access)?)
    }

    /// Writes there, and says how that failed, if it did.
    pub(crate) fn write_to(&self, address: u64, key: u32, len: usize) -> Outcome<Option<Status>> {
        let mut chain = Chain::default();
        self.push(&mut chain, (address, key), len, None, true)?;
        self.pair.post(&mut chain, &self.page)?;
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let mut outcome = None;
            self.sent
                .poll(|completion| outcome = Some(completion.failure))?;
            if let Some(failure) = outcome {
                return Ok(failure);
            }
        }
        Err("no completion".into())
    }

    fn push(
        &self,
        chain: &mut Chain,
        (address, key): (u64, u32),
        len: usize,
        immediate: Option<u32>,
        signalled: bool,
    ) -> Outcome {
        chain.push(&Write {
            id: 1,
            pieces: &[self.page.piece(0, len).ok_or("too long")?],
            address,
            key,
            immediate,
            signalled,
            inline: len <= self.pair.max_inline() as usize,
        });
        Ok(())
    }

    fn target(&self) -> (u64, u32) {
        (self.page.address(), self.page.remote_key())
    }

    /// Writes data of a length, if it has one, then 64 bytes that the peer hears of.
    fn say(&self, chain: &mut Chain, peer: (u64, u32), data: usize) -> Outcome {
        if data > 0 {
            self.push(chain, (peer.0 + 4096, peer.1), data, None, false)?;
        }
        self.push(chain, peer, 64, Some(1), true)?;
        Ok(self.pair.post(chain, &self.page)?)
    }

    fn wait(&self) -> Outcome {
        let until = Instant::now() + PATIENCE;
        loop {
            let mut failure = None;
            let heard = self.received.poll(|c| failure = failure.or(c.failure))?;
            self.sent.poll(|c| failure = failure.or(c.failure))?;
            if let Some(status) = failure {
                return Err(status.to_string().into());
            }
            if heard > 0 {
                self.pair.post_receive()?;
                return Ok(());
            }
            if Instant::now() > until {
                return Err("no answer".into());
            }
            std::hint::spin_loop();
        }
    }
}

/// Round trips: 64 bytes there, as many and perhaps 4 KiB of data back. Both sides look all the time.
pub(crate) fn measure(address: &str, count: &str) -> Outcome {
    let count: usize = count.parse()?;
    for data in [0, 4096] {
        let (one, other) = Bare::pair(address)?;
        for end in [&one, &other] {
            for _ in 0..16 {
                end.pair.post_receive()?;
            }
        }
        let (to_one, to_other) = (one.target(), other.target());
        let answering = thread::spawn(move || {
            let mut chain = Chain::with_capacity(2, 2);
            for _ in 0..count {
                let answered = other
                    .wait()
                    .and_then(|()| other.say(&mut chain, to_one, data));
                if let Err(error) = answered {
                    return Err(error.to_string());
                }
            }
            // The last answer must arrive before the queue pair goes.
            thread::sleep(Duration::from_millis(100));
            Ok(())
        });
        let mut chain = Chain::with_capacity(2, 2);
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let begun = Instant::now();
            one.say(&mut chain, to_other, 0)?;
            one.wait()?;
            times.push(begun.elapsed());
        }
        answering.join().map_err(|_| "the other side panicked")??;
        times.sort();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_nanos() as f64 / 1e3;
        println!(
            "bare round trip with {data} bytes of data: \
             min_us={:.1} p10_us={:.1} p50_us={:.1} p99_us={:.1}",
            at(0),
            at(10),
            at(50),
            at(99)
        );
    }
    Ok(())
}

/// Writes that are kept under way for [`stream`].
const DEPTH: usize = 16;

/// Throughput of writes of several sizes, of which the other side hears nothing.
pub(crate) fn stream(address: &str, milliseconds: &str) -> Outcome {
    let time = Duration::from_millis(milliseconds.parse()?);
    for size in [4096, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20] {
        let (one, other) = Bare::pair_with_memory(address, size)?;
        let target = other.target();
        let mut chain = Chain::with_capacity(1, 1);
        let (mut under_way, mut done) = (0_usize, 0_usize);
        let begun = Instant::now();
        while under_way > 0 || begun.elapsed() < time {
            while under_way < DEPTH && begun.elapsed() < time {
                one.push(&mut chain, target, size, None, true)?;
                one.pair.post(&mut chain, &one.page)?;
                under_way += 1;
            }
            let mut failure = None;
            let count = one.sent.poll(|c| failure = failure.or(c.failure))?;
            if let Some(status) = failure {
                return Err(status.to_string().into());
            }
            under_way -= count;
            done += count;
            if begun.elapsed() > time + PATIENCE {
                return Err("writes do not complete".into());
            }
        }
        let rate = (done * size) as f64 / f64::from(1 << 20) / begun.elapsed().as_secs_f64();
        println!("bare writes of {size} bytes: mib_per_s={rate:.1}");
    }
    Ok(())
}
