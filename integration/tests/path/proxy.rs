//! A network between compute side and device server that is as bad as a test wants it: it
//! ends in the middle of a byte stream, is slow, or takes everything and delivers nothing.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// How fast each direction is.
#[derive(Clone, Copy)]
pub(crate) struct Pace {
    /// Bytes delivered at a time.
    pub(crate) chunk: usize,
    /// Time from one delivery to the next.
    pub(crate) every: Duration,
}

impl Pace {
    const FULL: Self = Self {
        chunk: 64 << 10,
        every: Duration::ZERO,
    };
}

#[derive(Default)]
struct State {
    open: Vec<TcpStream>,
    /// Bytes towards the device server after which everything is cut.
    fuse: Option<usize>,
    is_stalled: bool,
}

/// See the module's own description.
pub(crate) struct Proxy {
    pub(crate) address: String,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    resumed: Condvar,
    pace: Pace,
}

impl Proxy {
    /// Forwards connections to a device server, as fast as this machine can.
    pub(crate) fn to(address: &str) -> Self {
        Self::paced(address, Pace::FULL)
    }

    /// Forwards no faster than this.
    pub(crate) fn paced(address: &str, pace: Pace) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            resumed: Condvar::new(),
            pace,
        });
        let (to, proxy) = (address.to_owned(), shared.clone());
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(&to) else {
                    continue;
                };
                let copies = [&near, &far].map(|stream| stream.try_clone().unwrap());
                proxy.state().open.extend(copies);
                let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
                proxy.clone().forward(near, far, true);
                proxy.clone().forward(back.0, back.1, false);
            }
        });
        Self {
            address: own,
            shared,
        }
    }

    /// Ends all connections now.
    pub(crate) fn cut(&self) {
        self.shared.state().cut();
    }

    /// Ends one connection now: the last that was made, or one before it.
    pub(crate) fn cut_one(&self, before_last: usize) {
        for stream in self
            .shared
            .state()
            .open
            .iter()
            .rev()
            .skip(2 * before_last)
            .take(2)
        {
            // Its other end may have gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Ends all connections once exactly this many more bytes have gone to the device server.
    pub(crate) fn cut_after(&self, bytes: usize) {
        self.shared.state().fuse = Some(bytes);
    }

    /// Delivers nothing any more, until told otherwise.
    pub(crate) fn stall(&self, is_stalled: bool) {
        self.shared.state().is_stalled = is_stalled;
        self.shared.resumed.notify_all();
    }
}

impl State {
    fn cut(&mut self) {
        self.fuse = None;
        for stream in self.open.drain(..) {
            // Its other end may have gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// How many of `len` bytes may still go to the device server.
    fn burn(&mut self, len: usize) -> usize {
        let Some(left) = &mut self.fuse else {
            return len;
        };
        let allowed = len.min(*left);
        *left -= allowed;
        allowed
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The state, once anything may be delivered.
    fn state_to_deliver(&self) -> MutexGuard<'_, State> {
        self.resumed
            .wait_while(self.state(), |state| state.is_stalled)
            .unwrap()
    }

    fn forward(self: Arc<Self>, mut from: TcpStream, mut to: TcpStream, to_device: bool) {
        to.set_nodelay(true).unwrap();
        std::thread::spawn(move || {
            let mut buffer = vec![0; self.pace.chunk];
            while let Ok(len @ 1..) = from.read(&mut buffer) {
                let mut state = self.state_to_deliver();
                let allowed = if to_device { state.burn(len) } else { len };
                drop(state);
                let sent = to.write_all(&buffer[..allowed]);
                if allowed < len {
                    self.state().cut();
                }
                if sent.is_err() || allowed < len {
                    break;
                }
                // What makes a network slow is time that passes.
                std::thread::sleep(self.pace.every);
            }
            // The end of a stream is delivered like its bytes.
            drop(self.state_to_deliver());
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}
