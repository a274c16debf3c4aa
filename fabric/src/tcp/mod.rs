//! The provider for an ordinary network: one TCP connection carries one session.
//!
//! Neither direction copies payloads in this process, waits, or allocates per message:
//! * sending hands header, control part and payload spans to the kernel in one call, and
//!   queues in bounded storage what the kernel does not take (`backlog`);
//! * receiving lands payloads in the memory that the sink names (`receiver`, `landing`).
//!
//! Wait for the descriptor with level-triggered readiness: [`Link::receive`] reports
//! [`Received::Idle`] as soon as a call came back short, without asking once more.

mod backlog;
mod landing;
mod raw;
mod receiver;

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt;
use vm_memory::MmapRegion;

use self::backlog::{Backlog, Parts};
use self::raw::Gather;
use self::receiver::Receiver;
use crate::link::check_frame;
use crate::wire::{Admission, Epoch, Header, Side};
use crate::{Counters, FabricError, Frame, Link, Received, Sink, Span};

/// How long sent bytes may stay unacknowledged before the kernel gives the connection up. A
/// network that is away for longer is for the layer above to bridge, by reconnecting. It also
/// bounds how long a peer may take nothing of what is queued for it.
const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(5);
/// How long a connection may be silent before the kernel probes whether the peer's host is
/// there, and how often it then asks. A silent loss is noticed within
/// [`UNACKNOWLEDGED_LIMIT`], which ends probing too.
const PROBE_AFTER: Duration = Duration::from_secs(2);
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// A [`Link`] over TCP.
pub struct TcpLink {
    stream: TcpStream,
    admission: Admission,
    backlog: Backlog,
    receiver: Receiver,
    counters: Counters,
    /// No more can be sent: part of a frame may be lost.
    send_failed: bool,
    /// No more can be received: the stream is over, or no longer understood.
    receive_failed: bool,
}

impl TcpLink {
    /// Takes over a connection, of which `side` is this end.
    pub fn new(stream: TcpStream, side: Side) -> Result<Self, FabricError> {
        configure(&stream).map_err(|source| FabricError::Io {
            what: "setting up the TCP connection",
            source,
        })?;
        Ok(TcpLink {
            stream,
            admission: Admission::new(side),
            backlog: Backlog::new(),
            receiver: Receiver::new()?,
            counters: Counters::default(),
            send_failed: false,
            receive_failed: false,
        })
    }

    /// Sends from `gather` and says how many bytes went, and whether all did.
    fn transmit(
        stream: &TcpStream,
        counters: &mut Counters,
        gather: &mut Gather<'_>,
    ) -> Result<(usize, bool), FabricError> {
        counters.send_calls += 1;
        match gather.send(stream.as_fd()) {
            Ok(sent) => {
                let sent = sent.unwrap_or(0);
                counters.bytes_sent += sent as u64;
                Ok((sent, sent == gather.bytes()))
            }
            Err(source) => Err(FabricError::Io {
                what: "sending to the peer",
                source,
            }),
        }
    }

    /// Sends a frame from where it is, and returns how many bytes the network took.
    fn send_direct(&mut self, parts: &Parts<'_>) -> Result<usize, FabricError> {
        let mut sent = 0;
        while sent < parts.len() {
            let mut gather = Gather::new();
            parts.gather(sent, &mut gather)?;
            let (bytes, all) = Self::transmit(&self.stream, &mut self.counters, &mut gather)?;
            sent += bytes;
            if !all {
                break;
            }
        }
        Ok(sent)
    }

    fn send_backlog(&mut self) -> Result<(), FabricError> {
        while !self.backlog.is_empty() {
            let mut gather = Gather::new();
            self.backlog.gather(&mut gather)?;
            let (bytes, all) = Self::transmit(&self.stream, &mut self.counters, &mut gather)?;
            let counters = &mut self.counters;
            self.backlog
                .consume(bytes, |payload| count_sent(counters, payload));
            if !all {
                break;
            }
        }
        Ok(())
    }
}

fn count_sent(counters: &mut Counters, payload: u32) {
    counters.messages_sent += 1;
    counters.payload_sent += u64::from(payload);
}

fn configure(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    // A command must not wait for the next one to fill a segment.
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_LIMIT.as_millis() as u32)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, PROBE_AFTER)?;
    sockopt::set_tcp_keepintvl(stream, PROBE_EVERY)?;
    Ok(())
}

impl Link for TcpLink {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    fn is_one_sided(&self) -> bool {
        false
    }

    fn set_epoch(&mut self, epoch: Epoch) {
        self.admission.set_epoch(epoch);
    }

    fn register(&mut self, _span: &Span, _address: u64) -> Result<(), FabricError> {
        Ok(())
    }

    fn unregister(&mut self, _span: &Span, _address: u64) {}

    fn revoke(&mut self, memory: &Arc<MmapRegion>, offset: usize, len: usize) {
        self.receiver.revoke(memory, offset, len);
    }

    fn is_sending(&self, memory: &Arc<MmapRegion>, offset: usize, len: usize) -> bool {
        self.backlog.has_payload_in(memory, offset, len)
    }

    fn send(&mut self, frame: &Frame<'_>) -> Result<(), FabricError> {
        if self.send_failed {
            return Err(FabricError::Closed);
        }
        check_frame(frame)?;
        let header = Header {
            epoch: self.admission.epoch(),
            ..frame.header
        };
        let parts = Parts {
            header: &header.encode(),
            control: frame.control,
            payload: frame.payload,
            payload_len: header.payload_len,
        };
        self.backlog.check_room(&parts)?;
        let sent = if self.backlog.is_empty() {
            self.send_direct(&parts)
                .inspect_err(|_| self.send_failed = true)?
        } else {
            0
        };
        if sent == parts.len() {
            count_sent(&mut self.counters, parts.payload_len);
        } else {
            self.backlog.push(&parts, sent);
        }
        Ok(())
    }

    fn is_congested(&self) -> bool {
        !self.backlog.is_empty()
    }

    fn flush(&mut self) -> Result<(), FabricError> {
        if self.send_failed {
            return Err(FabricError::Closed);
        }
        self.send_backlog().inspect_err(|_| self.send_failed = true)
    }

    fn receive(&mut self, sink: &mut dyn Sink) -> Result<Received, FabricError> {
        if self.receive_failed {
            return Err(FabricError::Closed);
        }
        self.receiver
            .receive(
                self.stream.as_fd(),
                &self.admission,
                sink,
                &mut self.counters,
            )
            .inspect_err(|_| self.receive_failed = true)
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}
