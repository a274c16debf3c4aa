//! Nothing allocates per message: neither a batch of commands with data, nor completions with
//! data, nor an interrupt, and not when the network is congested either.

#![allow(clippy::unwrap_used, reason = "helpers of tests may fail a test")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use farbus_fabric::wire::*;
use farbus_fabric::{FabricError, Frame, Link, Received, Sink, Span, TcpLink};
use vm_memory::MmapRegion;

/// The system's allocator, counting.
struct Counting;

thread_local! {
    /// Per thread, since the test harness has threads of its own.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

fn count() {
    ALLOCATIONS.with(|count| count.set(count.get() + 1));
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, size) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DATA_LEN: u32 = 128 * 1024;
const PAGE: usize = 4096;

/// Lands payloads in pages of its memory, and looks at every entry.
struct Pages {
    memory: Arc<MmapRegion>,
    entries: usize,
}

impl Sink for Pages {
    fn land(
        &mut self,
        header: &Header,
        control: &[u8],
        spans: &mut Vec<Span>,
    ) -> Result<(), FabricError> {
        decode_body(header, control)?;
        for page in 0..header.payload_len as usize / PAGE {
            spans.push(Span {
                memory: Arc::clone(&self.memory),
                offset: page * PAGE,
                len: PAGE,
            });
        }
        Ok(())
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        self.entries += match decode_body(header, control)? {
            Body::Submit(submit) => submit.entries().count(),
            Body::Complete(complete) => complete.entries().count(),
            Body::Message(_) => 1,
        };
        Ok(())
    }
}

struct Bench {
    compute: TcpLink,
    device: TcpLink,
    memory: Arc<MmapRegion>,
    payload: Vec<Span>,
    submit: SubmitBatch,
    complete: CompleteBatch,
    control: Vec<u8>,
    sink: Pages,
}

impl Bench {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut compute = TcpLink::new(stream, Side::Compute).unwrap();
        let mut device = TcpLink::new(listener.accept().unwrap().0, Side::Device).unwrap();
        compute.set_epoch(Epoch(1));
        device.set_epoch(Epoch(1));
        let memory = Arc::new(MmapRegion::new(DATA_LEN as usize * 2).unwrap());
        Bench {
            compute,
            device,
            sink: Pages {
                memory: Arc::clone(&memory),
                entries: 0,
            },
            memory,
            payload: Vec::with_capacity(64),
            submit: SubmitBatch::new(),
            complete: CompleteBatch::new(),
            control: Vec::with_capacity(64),
        }
    }

    fn gather(&mut self, spans: usize) {
        self.payload.clear();
        for page in 0..spans {
            self.payload.push(Span {
                memory: Arc::clone(&self.memory),
                offset: page * PAGE,
                len: PAGE,
            });
        }
    }

    fn submit(&mut self) {
        self.gather(DATA_LEN as usize / PAGE);
        self.submit.clear();
        for (tag, direction) in [(1, Direction::ToDevice), (2, Direction::FromDevice)] {
            let placement = Placement {
                tag: Tag(tag),
                queue: QueueId(1),
                shadow_offset: 0,
                data_len: DATA_LEN,
                direction,
            };
            self.submit.push(&placement, &[0; 64], &[]).unwrap();
        }
        self.compute
            .send(&Frame {
                header: self.submit.header(),
                control: self.submit.control(),
                payload: &self.payload,
                remote: &[],
            })
            .unwrap();
    }

    fn complete(&mut self) {
        self.gather(DATA_LEN as usize / PAGE);
        self.complete.clear();
        for (tag, data_len) in [(1, 0), (2, DATA_LEN)] {
            let entry = CompleteEntry {
                tag: Tag(tag),
                queue: QueueId(1),
                status: 0,
                data_len,
                result: 0,
            };
            self.complete.push(&entry).unwrap();
        }
        self.device
            .send(&Frame {
                header: self.complete.header(),
                control: self.complete.control(),
                payload: &self.payload,
                remote: &[],
            })
            .unwrap();
    }

    fn interrupt(&mut self) {
        self.control.clear();
        let message = Message::Interrupt {
            kind: InterruptKind::Msix,
            vector: 1,
        };
        let header = message.encode(&mut self.control).unwrap();
        self.device
            .send(&Frame::plain(header, &self.control))
            .unwrap();
    }

    /// Moves everything that was sent.
    fn settle(&mut self) {
        let Bench {
            compute,
            device,
            sink,
            ..
        } = self;
        loop {
            compute.flush().unwrap();
            device.flush().unwrap();
            let idle = compute.receive(sink).unwrap() == Received::Idle
                && device.receive(sink).unwrap() == Received::Idle;
            let arrived = |to: &TcpLink, from: &TcpLink| {
                to.counters().messages_received == from.counters().messages_sent
            };
            let quiet = !compute.is_congested() && !device.is_congested();
            if idle && quiet && arrived(compute, device) && arrived(device, compute) {
                return;
            }
        }
    }

    /// As many messages at once as make both directions congested, or just one each.
    fn round(&mut self, messages: usize) {
        for _ in 0..messages {
            self.submit();
            self.complete();
            self.interrupt();
        }
        let congested = self.compute.is_congested() && self.device.is_congested();
        assert_eq!(congested, messages > 1);
        self.settle();
    }
}

#[test]
fn messages_are_sent_and_received_without_an_allocation() {
    let mut bench = Bench::new();
    // Socket buffers of a fixed size: one message fits, a hundred do not.
    for link in [&bench.compute, &bench.device] {
        rustix::net::sockopt::set_socket_send_buffer_size(link.descriptor(), 1 << 20).unwrap();
    }
    bench.round(1);
    bench.round(100);
    let (before, entries) = (ALLOCATIONS.get(), bench.sink.entries);

    for _ in 0..200 {
        bench.round(1);
    }
    for _ in 0..3 {
        bench.round(100);
    }

    assert_eq!(ALLOCATIONS.get() - before, 0);
    assert_eq!(bench.sink.entries - entries, 5 * (200 + 3 * 100));
}
