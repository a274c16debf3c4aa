//! What a worker can no longer do. Each test gives everything up in a thread of its own; limits
//! are of the whole process, and as harmless to the other tests as to a worker.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::process::Command;

use farbus_compute_agent::sandbox::{Needs, User, enter};
use farbus_integration::report::note_skip;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::thread::{CapabilitySet, capabilities};

fn needs(address: &str) -> Needs {
    Needs {
        address: address.to_owned(),
        verbs: false,
        user: None,
    }
}

/// What a worker of the device server at `address` gets.
fn sandboxed<T: Send>(needs: &Needs, act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter(needs).unwrap();
            act()
        });
        thread.join().unwrap()
    })
}

fn kind<T>(result: io::Result<T>) -> Option<io::ErrorKind> {
    result.err().map(|error| error.kind())
}

/// Whether this kernel can restrict files at all; the worker says so if it cannot.
fn has_landlock() -> bool {
    let refused = sandboxed(&needs("127.0.0.1:1"), || File::open("/proc/self/status"));
    refused.is_err()
}

#[test]
fn files_cannot_be_opened_or_removed() {
    if !has_landlock() {
        note_skip("this kernel has no Landlock");
        return;
    }
    let path = std::env::temp_dir().join(format!("farbus-sandbox-{}", std::process::id()));
    File::create(&path).unwrap();
    let (opened, removed, made) = sandboxed(&needs("127.0.0.1:1"), || {
        let opened = kind(File::open("/etc/passwd"));
        let removed = kind(std::fs::remove_file(&path));
        (
            opened,
            removed,
            kind(File::create(path.with_extension("new"))),
        )
    });
    let denied = Some(io::ErrorKind::PermissionDenied);
    assert_eq!((opened, removed, made), (denied, denied, denied));
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn only_the_device_server_can_be_connected_to() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap().to_string();
    let (to_server, to_other, listens) = sandboxed(&needs(&address), || {
        let to_server = kind(TcpStream::connect(server.local_addr().unwrap()));
        let to_other = kind(TcpStream::connect(other.local_addr().unwrap()));
        (to_server, to_other, kind(TcpListener::bind("127.0.0.1:0")))
    });
    assert_eq!(to_server, None);
    assert!(listens.is_some(), "listen(2) is not among the calls");
    if !has_landlock() {
        note_skip("this kernel has no Landlock");
    } else {
        assert_eq!(to_other, Some(io::ErrorKind::PermissionDenied));
    }
}

#[test]
fn no_process_can_be_started_and_threads_can() {
    let (process, thread) = sandboxed(&needs("127.0.0.1:1"), || {
        let process = kind(Command::new("/bin/true").status());
        (process, std::thread::spawn(|| 7).join().unwrap())
    });
    assert_eq!(process, Some(io::ErrorKind::PermissionDenied));
    assert_eq!(thread, 7);
}

#[test]
fn other_system_calls_and_sockets_are_refused() {
    let (packets, moved, mounts) = sandboxed(&needs("127.0.0.1:1"), || {
        let packets = socket(AddressFamily::PACKET, SocketType::RAW, None).err();
        let moved = rustix::process::chdir("/").err();
        let mounts = rustix::process::chroot("/").err();
        (packets, moved, mounts)
    });
    let refused = Some(Errno::PERM);
    assert_eq!((packets, moved, mounts), (refused, refused, refused));
}

#[test]
fn capabilities_are_gone_and_do_not_come_back() {
    let (before, after) = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let before = capabilities(None).unwrap();
            enter(&needs("127.0.0.1:1")).unwrap();
            (before, rustix::thread::set_capabilities(None, before))
        });
        thread.join().unwrap()
    });
    if before.permitted != CapabilitySet::empty() {
        assert_eq!(after, Err(Errno::PERM));
    }
}

#[test]
fn a_user_is_two_numbers() {
    assert_eq!("12:34".parse(), Ok(User { uid: 12, gid: 34 }));
    assert!("farbus".parse::<User>().is_err());
}
