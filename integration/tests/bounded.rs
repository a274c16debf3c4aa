//! Peers and networks that take less than they are given: what waits for them is bounded, and
//! they hold up nobody else. A test binary of its own, one test at a time, since it looks at
//! this process's memory.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]
#![allow(
    dead_code,
    reason = "the bed and the network are those of another test binary"
)]

#[path = "path/bed.rs"]
mod bed;
#[path = "path/proxy.rs"]
mod proxy;

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farbus_fabric::session::{ClaimedLink, client};
use farbus_fabric::wire::{Data, Epoch, Header, Message, RequestId, Side};
use farbus_fabric::{FabricError, Received, Sink, Span, TcpLink};
use farbus_integration::procfs::Proc;
use farbus_vfio::driver::block_command;
use farbus_vfio::nvme::{nvm, reg};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use bed::{Attached, BLOCK, Bed, eventually, export_name};
use proxy::{Pace, Proxy};

const PATIENCE: Duration = Duration::from_secs(20);
/// What one claim may add to this process's private memory, with both ends in it: far less than
/// what crosses meanwhile.
const MEMORY_LIMIT: u64 = 16 << 20;

/// Keeps tests from running at the same time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn private_memory() -> u64 {
    Proc::of(std::process::id()).anonymous_bytes().unwrap()
}

/// Whether the network takes nothing of the compute side's now.
fn is_congested(attached: &Attached) -> bool {
    attached
        .remote
        .link_interest()
        .is_some_and(|link| link.writable)
}

/// The compute side of a claim, written by hand.
struct Peer {
    claimed: ClaimedLink,
    raw: TcpStream,
}

impl Peer {
    fn claim(bed: &Bed) -> Self {
        let raw = TcpStream::connect(&bed.address).unwrap();
        let link = TcpLink::new(raw.try_clone().unwrap(), Side::Compute).unwrap();
        let claimed =
            client::claim_over(Box::new(link), &export_name(), "a test", PATIENCE).unwrap();
        Self { claimed, raw }
    }

    fn wait_for(&self, ready: PollFlags, limit: Duration) -> bool {
        let limit = Timespec::try_from(limit).unwrap();
        let mut fds = [PollFd::from_borrowed_fd(self.raw.as_fd(), ready)];
        poll(&mut fds, Some(&limit)).unwrap() > 0
    }

    /// Sends these bytes over and over, and reads nothing, until the device server ends the
    /// connection. Returns how many bytes it took.
    fn flood(&mut self, bytes: &[u8], mut each: impl FnMut()) -> u64 {
        let start = Instant::now();
        let (mut taken, mut at) = (0, 0);
        loop {
            assert!(
                start.elapsed() < PATIENCE,
                "{taken} bytes were taken, and the connection lives on"
            );
            match self.raw.write(&bytes[at..]) {
                Ok(len) => {
                    taken += len as u64;
                    at = (at + len) % bytes.len();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    each();
                    self.wait_for(PollFlags::OUT, Duration::from_millis(100));
                }
                Err(_) => return taken,
            }
        }
    }
}

/// The bytes of messages, one after the other.
fn encoded(messages: &[Message], epoch: Epoch) -> Vec<u8> {
    let mut bytes = Vec::new();
    for message in messages {
        let mut control = Vec::new();
        let header = Header {
            epoch,
            ..message.encode(&mut control).unwrap()
        };
        bytes.extend(header.encode());
        bytes.extend(control);
    }
    bytes
}

/// Counts messages.
struct Count(usize);

impl Sink for Count {
    fn land(&mut self, _: &Header, _: &[u8], _: &mut Vec<Span>) -> Result<(), FabricError> {
        Err(FabricError::violation("no message here has data"))
    }

    fn deliver(&mut self, _: &Header, _: &[u8]) -> Result<(), FabricError> {
        self.0 += 1;
        Ok(())
    }
}

/// A peer asks this for ever and reads no answer: it is held, and then let go of.
fn asks_and_never_reads(question: &Message) {
    let _alone = alone();
    let bed = Bed::start("size=1MiB");
    let mut peer = Peer::claim(&bed);
    let questions = encoded(&vec![question.clone(); 1000], peer.claimed.epoch);
    let before = private_memory();
    let mut most = before;

    let taken = peer.flood(&questions, || most = most.max(private_memory()));

    // At the least, more was asked than the answers that wait in the device server can be.
    assert!(taken > 1 << 20, "only {taken} bytes were taken");
    let grown = most - before;
    assert!(
        grown < MEMORY_LIMIT,
        "{taken} bytes of questions took {grown} bytes of memory"
    );
    let attached = bed.attach();
    let mut driver = attached.driver(1);
    driver.write(1, 0, BLOCK, &[1; 512]).unwrap();
}

#[test]
fn peer_that_pings_and_never_reads_is_held_and_dropped() {
    asks_and_never_reads(&Message::Ping { nonce: 7 });
}

#[test]
fn peer_that_reads_registers_and_never_the_answers_is_held_and_dropped() {
    asks_and_never_reads(&Message::RegisterRead {
        request: RequestId(7),
        region: 0,
        offset: reg::CAP,
        len: 8,
    });
}

#[test]
fn peer_that_resets_and_never_reads_is_held_and_dropped() {
    asks_and_never_reads(&Message::Reset {
        request: RequestId(7),
    });
}

#[test]
fn question_that_came_with_a_whole_burst_is_answered_at_once() {
    let _alone = alone();
    let bed = Bed::start("size=1MiB");
    let mut peer = Peer::claim(&bed);
    let ping = Message::Ping { nonce: 7 };
    let mut messages = vec![ping.clone(); 63];
    // After a long message, the next one is received together with it.
    messages.push(Message::RegisterWrite {
        region: 0,
        offset: reg::CAP,
        data: Data::new(&[0; Data::MAX]).unwrap(),
    });
    messages.push(ping);
    let bytes = encoded(&messages, peer.claimed.epoch);

    peer.raw.write_all(&bytes).unwrap();

    let mut answers = Count(0);
    while answers.0 < 64 {
        let came = peer.wait_for(PollFlags::IN, Duration::from_secs(2));
        assert!(came, "{} of 64 questions were answered", answers.0);
        while peer.claimed.link.receive(&mut answers).unwrap() == Received::Message {}
    }
}

#[test]
fn slow_network_slows_io_and_costs_no_memory() {
    const LEN: usize = 128 << 10;
    const SLOTS: u8 = 60;
    let _alone = alone();
    let bed = Bed::start("size=64MiB");
    let pace = Pace {
        chunk: 4 << 10,
        every: Duration::from_micros(100),
    };
    let wire = Proxy::paced(&bed.address, pace);
    let claimed = client::claim(&wire.address, &export_name(), "test", PATIENCE).unwrap();
    let attached = Attached::new(claimed);
    let mut driver = attached.driver(2);
    let buffers: Vec<_> = (0..SLOTS)
        .map(|_| driver.memory().allocate(LEN).unwrap())
        .collect();
    for (slot, buffer) in buffers.iter().enumerate() {
        let data = vec![slot as u8 + 1; LEN];
        driver.memory().write(*buffer, 0, &data).unwrap();
    }
    let before = private_memory();
    let mut most = before;
    let mut was_congested = false;

    for opcode in [nvm::WRITE, nvm::READ] {
        let mut outstanding = Vec::new();
        for (slot, buffer) in buffers.iter().enumerate() {
            let queue = 1 + slot as u16 % 2;
            if opcode == nvm::READ {
                driver.memory().write(*buffer, 0, &[0; LEN]).unwrap();
            }
            let prps = driver.prps(*buffer, 0, LEN).unwrap();
            let lba = (slot * LEN) as u64 / u64::from(BLOCK);
            let mut command = block_command(opcode, lba, LEN, BLOCK);
            command.set_prps(prps.prp1, prps.prp2);
            outstanding.push((queue, driver.submit(queue, command).unwrap()));
            was_congested |= is_congested(&attached);
        }
        for (queue, cid) in outstanding {
            let done = driver.wait(queue, cid).unwrap();
            assert!(done.status.is_success(), "{done:?}");
            most = most.max(private_memory());
        }
    }

    assert!(was_congested);
    assert!(attached.remote.take_lost().is_none());
    let mut back = vec![0; LEN];
    for (slot, buffer) in buffers.iter().enumerate() {
        driver.memory().read(*buffer, 0, &mut back).unwrap();
        assert!(back.iter().all(|byte| *byte == slot as u8 + 1), "{slot}");
    }
    let grown = most - before;
    assert!(grown < MEMORY_LIMIT, "{grown} bytes more");
}

#[test]
fn guest_that_goes_on_while_nothing_is_delivered_costs_no_memory() {
    let _alone = alone();
    let bed = Bed::start("size=64MiB");
    let wire = Proxy::to(&bed.address);
    let claimed = client::claim(&wire.address, &export_name(), "test", PATIENCE).unwrap();
    let attached = Attached::new(claimed);
    let mut driver = attached.driver(2);
    let buffer = driver.memory().allocate(1 << 20).unwrap();
    let prps = driver.prps(buffer, 0, 1 << 20).unwrap();
    let mut command = block_command(nvm::WRITE, 0, 1 << 20, BLOCK);
    command.set_prps(prps.prp1, prps.prp2);
    let before = private_memory();
    wire.stall(true);

    let sent: Vec<_> = (0..60u16)
        .map(|n| (1 + n % 2, driver.submit(1 + n % 2, command).unwrap()))
        .collect();
    assert!(is_congested(&attached));
    let lost = eventually("the silence is noticed", || {
        // Nothing comes, so this only lets time pass.
        driver.wait_interrupt(1, Duration::from_millis(50)).unwrap();
        attached.remote.take_lost()
    });

    let grown = private_memory().saturating_sub(before);
    assert!(grown < MEMORY_LIMIT, "{grown} bytes more");
    drop(lost);
    wire.cut();
    wire.stall(false);
    let claimed = bed.claim_when_free();
    attached.remote.reconnect(claimed).unwrap();
    for (queue, cid) in sent {
        assert!(driver.wait(queue, cid).unwrap().status.is_success());
    }
}
