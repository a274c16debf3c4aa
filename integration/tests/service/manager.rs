//! What of systemd the daemon needs to outlive, together with a worker: a store of descriptors, which it
//! fills at its notification socket, and which the next one gets.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use farbus_integration::error::Result;
use farbus_integration::service::Service;
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// Descriptors that are passed on have numbers from here on, so that the low ones are free to be theirs.
const HIGH: i32 = 300;
/// Ends the thread.
const ENOUGH: &[u8] = b"ENOUGH";

type Stored = Vec<(String, OwnedFd)>;

/// See the module's own description.
pub(crate) struct Manager {
    path: PathBuf,
    thread: Option<JoinHandle<Stored>>,
}

impl Manager {
    pub(crate) fn start(path: PathBuf) -> Self {
        let mut this = Self { path, thread: None };
        this.listen(Vec::new());
        this
    }

    fn listen(&mut self, mut stored: Stored) {
        let _ = std::fs::remove_file(&self.path);
        let socket = UnixDatagram::bind(&self.path).unwrap();
        let thread = std::thread::spawn(move || {
            while let Some((state, fds)) = receive(&socket) {
                hear(&mut stored, &state, fds);
            }
            stored
        });
        self.thread = Some(thread);
    }

    /// The names of what is stored. For when no daemon is there.
    pub(crate) fn names(&mut self) -> Vec<String> {
        let stored = self.stored();
        let names = stored.iter().map(|(name, _fd)| name.clone()).collect();
        self.listen(stored);
        names
    }

    /// Starts the next daemon, with what the last one has stored.
    pub(crate) fn restart(&mut self, service: &mut Service) -> Result<()> {
        let stored = self.stored();
        let passed: Vec<OwnedFd> = stored
            .iter()
            .map(|(_name, fd)| {
                let passed = fcntl_dupfd_cloexec(fd, HIGH).unwrap();
                fcntl_setfd(&passed, FdFlags::empty()).unwrap();
                passed
            })
            .collect();
        let names: Vec<&str> = stored.iter().map(|(name, _fd)| name.as_str()).collect();
        // First all of them moved, then all of the others closed: bash uses free numbers meanwhile.
        let highs = passed.iter().map(AsRawFd::as_raw_fd);
        let moved = highs.clone().zip(3..);
        let moved: Vec<String> = moved.map(|(high, low)| format!("{low}<&{high}")).collect();
        let closed: Vec<String> = highs.map(|high| format!("{high}<&-")).collect();
        let script = format!(
            "exec {}; exec {}; export NOTIFY_SOCKET={} LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={}; \
             exec \"$@\"",
            moved.join(" "),
            closed.join(" "),
            self.path.display(),
            names.len(),
            names.join(":")
        );
        self.listen(stored);
        service.restart_under(&["bash", "-c", &script, "bash"])
    }

    fn stored(&mut self) -> Stored {
        let end = UnixDatagram::unbound().unwrap();
        end.send_to(ENOUGH, &self.path).unwrap();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stored();
        }
    }
}

/// The next message; `None` if there is to be no other.
fn receive(socket: &UnixDatagram) -> Option<(String, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; 4096];
    let mut buffers = [IoSliceMut::new(&mut bytes)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket.as_fd(), &mut buffers, &mut ancillary, flags).unwrap();
    let fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let said = &bytes[..received.bytes];
    (said != ENOUGH).then(|| (String::from_utf8(said.to_vec()).unwrap(), fds))
}

fn hear(stored: &mut Stored, state: &str, fds: Vec<OwnedFd>) {
    let name = state.lines().find_map(|line| line.strip_prefix("FDNAME="));
    let name = name.unwrap_or_default();
    let says = |what: &str| state.lines().any(|line| line == what);
    if says("FDSTOREREMOVE=1") {
        stored.retain(|(kept, _fd)| kept != name);
    } else if says("FDSTORE=1") {
        assert!(says("FDPOLL=0") && !name.contains(':'), "{state}");
        stored.extend(fds.into_iter().map(|fd| (name.to_owned(), fd)));
    }
}

/// Where the manager listens in a directory.
pub(crate) fn socket(directory: &Path) -> PathBuf {
    directory.join("notify.sock")
}
