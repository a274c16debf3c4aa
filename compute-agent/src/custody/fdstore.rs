//! Descriptors that outlive the daemon and a worker at once: systemd has duplicates of what the keeper
//! holds (`FileDescriptorStoreMax=` of the unit), and gives them to the next daemon. Without systemd
//! nothing of this does anything.
//!
//! Each is stored under `ID/KEY`. systemd takes one open file only once, whatever its names, and the regions of a
//! guest's memory often are one file: such files are opened again for it.
#![allow(
    unsafe_code,
    reason = "what systemd has passed is known by its number only"
)]

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{info, warn};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat, open};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, sendmsg, socket_with,
};

use super::messages::{Key, is_id};

/// How long systemd may take for one of them. It is local and quick; were it not, attachments come first.
const PATIENCE: Duration = Duration::from_secs(1);

/// What is held for one attachment.
pub(super) type Held = BTreeMap<Key, OwnedFd>;

/// See the module's own description.
#[derive(Debug, Default)]
pub struct FdStore {
    socket: Option<OwnedFd>,
    inherited: BTreeMap<String, Held>,
}

impl FdStore {
    /// The store of the service that this process is, with what it has from the daemon before. The second
    /// one in a process has nothing from there.
    #[must_use]
    pub fn of_service() -> Self {
        let socket = std::env::var_os("NOTIFY_SOCKET").and_then(|path| {
            to_systemd(path.as_bytes())
                .inspect_err(|error| warn!("systemd keeps nothing: {error}"))
                .ok()
        });
        let inherited = inherited();
        if !inherited.is_empty() {
            let count: usize = inherited.values().map(BTreeMap::len).sum();
            let ids = inherited.len();
            info!("systemd has kept {count} descriptors of {ids} attachments");
        }
        Self { socket, inherited }
    }

    /// What there is for an attachment from the daemon before, once.
    pub(super) fn take(&mut self, id: &str) -> Held {
        self.inherited.remove(id).unwrap_or_default()
    }

    /// What nobody has taken is not wanted any more.
    pub(super) fn forget_rest(&mut self) {
        for (id, held) in std::mem::take(&mut self.inherited) {
            info!("what systemd has kept for {id} is nobody's");
            held.keys().for_each(|key| self.forget(&id, key));
        }
    }

    /// Stores a duplicate.
    pub(super) fn keep(&mut self, id: &str, key: &Key, fd: &OwnedFd) {
        let apart = apart(fd.as_fd());
        let fd = apart.as_ref().unwrap_or(fd);
        // Without FDPOLL=0 systemd drops a connection whose other end has gone, which may be before the
        // next worker has read what came last.
        let name = key.as_str();
        let state = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={id}/{name}\n");
        self.tell(&state, &[fd.as_fd()]);
    }

    /// Has it closed there.
    pub(super) fn forget(&mut self, id: &str, key: &Key) {
        let name = key.as_str();
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={id}/{name}\n"), &[]);
    }

    fn tell(&mut self, state: &str, fds: &[BorrowedFd<'_>]) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = send(socket, state, fds) {
            warn!(
                "systemd takes no descriptors any more ({error}): a worker that dies together with this \
                 daemon is lost"
            );
            self.socket = None;
        }
    }
}

fn to_systemd(path: &[u8]) -> Result<OwnedFd, Errno> {
    let address = match path.strip_prefix(b"@") {
        Some(name) => SocketAddrUnix::new_abstract_name(name)?,
        None => SocketAddrUnix::new(path)?,
    };
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    connect(&socket, &address)?;
    Ok(socket)
}

fn send(socket: &OwnedFd, state: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    loop {
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::TOOBIG);
        }
        let text = [IoSlice::new(state.as_bytes())];
        match sendmsg(socket, &text, &mut ancillary, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return sent.map(|_| ()),
        }
    }
}

/// A file that can be opened again, opened again.
fn apart(fd: BorrowedFd<'_>) -> Option<OwnedFd> {
    let kind = FileType::from_raw_mode(fstat(fd).ok()?.st_mode);
    if kind != FileType::RegularFile {
        return None;
    }
    let access = fcntl_getfl(fd).ok()? & OFlags::ACCMODE;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    open(path, access | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// What systemd has passed to this process, by attachment; what is none of ours is closed.
fn inherited() -> BTreeMap<String, Held> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let mut inherited: BTreeMap<String, Held> = BTreeMap::new();
    if TAKEN.swap(true, Ordering::Relaxed) {
        return inherited;
    }
    for (fd, name) in farbus_rest::notify::passed() {
        // SAFETY: systemd has opened it for this process, and nobody has taken it before (`TAKEN`).
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let named = name.split_once('/');
        match named.map(|(id, key)| (id, Key::new(key))) {
            Some((id, Ok(key))) if is_id(id) => {
                inherited.entry(id.to_owned()).or_default().insert(key, fd);
            }
            _ => warn!("systemd has passed a descriptor named {name:?}, which is none of ours"),
        }
    }
    inherited
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};

    use super::*;

    #[test]
    fn memory_is_stored_as_a_file_of_its_own_and_what_cannot_be_as_it_is() {
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();

        let again = apart(memory.as_fd()).unwrap();
        seek(&memory, SeekFrom::Start(7)).unwrap();

        assert_eq!(
            fstat(&again).unwrap().st_ino,
            fstat(&memory).unwrap().st_ino
        );
        // One open file would have one position.
        assert_eq!(seek(&again, SeekFrom::Current(0)).unwrap(), 0);
        assert!(apart(reader.as_fd()).is_none());
    }
}
