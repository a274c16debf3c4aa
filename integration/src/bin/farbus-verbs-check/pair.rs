//! Both sides of a claim over RDMA, with memory that each has registered.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use farbus_fabric::provider::{Options, Provider, Wanted};
use farbus_fabric::session::client;
use farbus_fabric::session::server::Incoming;
use farbus_fabric::wire::{
    Description, EngineKind, Epoch, ExportName, Header, InterruptCounts, Message,
};
use farbus_fabric::{FabricError, Frame, Link, Received, Sink, Span};
use farbus_shadow_mem::shadow::shared_memory;
use vm_memory::volatile_memory::VolatileMemory;
use vm_memory::{Bytes, MmapRegion};

use crate::Outcome;

/// Where guest memory begins for the peer.
pub(crate) const IOVA: u64 = 1 << 32;
/// More than is registered at a time.
pub(crate) const GUEST: usize = 64 << 20;
pub(crate) const SHADOW: usize = 16 << 20;
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// One side.
pub(crate) struct End {
    pub(crate) link: Box<dyn Link>,
    pub(crate) memory: Arc<MmapRegion>,
}

/// Headers and control parts, as they were delivered.
#[derive(Default)]
pub(crate) struct Heard(pub(crate) Vec<(Header, Vec<u8>)>);

impl Sink for Heard {
    fn land(&mut self, _: &Header, _: &[u8], _: &mut Vec<Span>) -> Result<(), FabricError> {
        Err(FabricError::violation("a payload came in the stream"))
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        self.0.push((*header, control.to_vec()));
        Ok(())
    }
}

pub(crate) fn options() -> Options {
    Options {
        wanted: Wanted::Verbs,
        ..Options::default()
    }
}

/// The device side of a connection that has come in.
pub(crate) fn accept(stream: TcpStream, epoch: u64) -> Result<End, FabricError> {
    let claim = Incoming::handshake(stream, "check", PATIENCE)?.next_claim()?;
    let description = Description {
        config: vec![0; Description::MIN_CONFIG],
        regions: Vec::new(),
        interrupts: InterruptCounts::default(),
        engine: EngineKind::None,
        blob: Vec::new(),
    };
    let granted = claim.grant(Epoch(epoch), SHADOW as u32, 64)?;
    let (mut link, _) = granted.describe_by(description, &options())?;
    let memory = memory("check-shadow", SHADOW)?;
    link.register(&span(&memory, 0, SHADOW), 0)?;
    Ok(End { link, memory })
}

/// The compute side, over the given memory.
pub(crate) fn claim(address: &str, memory: &Arc<MmapRegion>) -> Outcome<End> {
    let export = ExportName::new("check")?;
    let claimed = client::claim_by(address, &export, "check", PATIENCE, &options())?;
    if claimed.provider.provider != Provider::Verbs {
        return Err(format!("claimed over {}", claimed.provider).into());
    }
    let mut link = claimed.link;
    link.register(&span(memory, 0, GUEST), IOVA)?;
    Ok(End {
        link,
        memory: Arc::clone(memory),
    })
}

/// Both sides, in this process: compute, device.
pub(crate) fn both(address: &str, guest: &Arc<MmapRegion>, epoch: u64) -> Outcome<(End, End)> {
    let listener = TcpListener::bind((address, 0))?;
    let place = listener.local_addr()?.to_string();
    let device = thread::spawn(move || {
        let (stream, _) = listener.accept().map_err(|source| FabricError::Io {
            what: "accepting",
            source,
        })?;
        accept(stream, epoch)
    });
    let compute = claim(&place, guest)?;
    let device = device.join().map_err(|_| "the device side panicked")??;
    Ok((compute, device))
}

pub(crate) fn memory(name: &str, len: usize) -> Result<Arc<MmapRegion>, FabricError> {
    shared_memory(name, len).map_err(|source| FabricError::Io {
        what: "making memory",
        source,
    })
}

pub(crate) fn span(memory: &Arc<MmapRegion>, offset: usize, len: usize) -> Span {
    Span {
        memory: Arc::clone(memory),
        offset,
        len,
    }
}

impl End {
    pub(crate) fn send(&mut self, message: &Message) -> Result<(), FabricError> {
        let mut control = Vec::new();
        let header = message.encode(&mut control)?;
        self.link.send(&Frame::plain(header, &control))
    }

    /// Receives until there are so many messages.
    pub(crate) fn hear(&mut self, count: usize) -> Result<Vec<(Header, Vec<u8>)>, FabricError> {
        let mut heard = Heard::default();
        let until = Instant::now() + PATIENCE;
        while heard.0.len() < count {
            if self.link.receive(&mut heard)? == Received::Idle {
                if Instant::now() > until {
                    return Err(FabricError::Timeout {
                        what: "a message",
                        after: PATIENCE,
                    });
                }
                thread::yield_now();
            }
        }
        Ok(heard.0)
    }

    /// Receives until the link fails.
    pub(crate) fn hear_the_end(&mut self) -> Outcome<FabricError> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Err(error) = self.link.receive(&mut Heard::default()) {
                return Ok(error);
            }
            thread::yield_now();
        }
        Err("the link does not end".into())
    }

    pub(crate) fn fill(&self, offset: usize, len: usize, seed: u8) -> Outcome {
        let slice = self.memory.get_slice(offset, len)?;
        slice.write_slice(&pattern(len, seed), 0)?;
        Ok(())
    }

    pub(crate) fn bytes(&self, offset: usize, len: usize) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.memory
            .get_slice(offset, len)?
            .read_slice(&mut bytes, 0)?;
        Ok(bytes)
    }
}

pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|at| (at as u8).wrapping_mul(31) ^ (at >> 8) as u8 ^ seed)
        .collect()
}
