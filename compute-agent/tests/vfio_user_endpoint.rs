//! The endpoint's own life: its socket file, its clients one after the other, its place in an
//! event loop.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use farbus_compute_agent::vfio_user::{Endpoint, EndpointError};
use farbus_vfio::user::body::MultiWrite;
use farbus_vfio::user::{Client, ClientError};
use farbus_vfio::{InterruptKind, Iova};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;

#[test]
fn the_function_is_put_back_when_the_client_has_gone_and_the_next_one_is_served() {
    let server = Server::start();
    let mut client = server.client();
    let memory = memfd(0x2000);
    for page in 0..2 {
        let file = Some((memory.as_fd(), page * 0x1000));
        client
            .dma_map(Iova(0x10_0000 * page), 0x1000, 3, file)
            .unwrap();
    }
    set_vectors(&mut client, 3, &[eventfd()]);
    client.region_write(0, 0x1000, &[9; 4]).unwrap();
    server.function.take_calls();
    drop(client);
    server.wait_for(|calls| calls.contains(&Call::Reset));
    assert_eq!(
        server.function.take_calls(),
        [
            Call::Interrupts(InterruptKind::Msi, 0, vec![false; 4]),
            Call::Interrupts(InterruptKind::Msix, 0, vec![false; MSIX as usize]),
            Call::Unmap(0, 0x10_1000),
            Call::Reset,
        ]
    );
    let mut next = server.client();
    let file = Some((memory.as_fd(), 0));
    next.dma_map(Iova(0), 0x1000, 3, file).unwrap();
    let mut register = [1; 4];
    next.region_read(0, 0x1000, &mut register).unwrap();
    assert_eq!(register, [0; 4]);
}

#[test]
fn a_vmm_may_reconnect_as_fast_as_it_can() {
    let server = Server::start();
    for _ in 0..100 {
        let mut client = Client::connect(&server.path, PATIENCE).expect("turned away");
        client.region_write_posted(0, 0x1000, &[1; 4]).unwrap();
    }
    server.wait_for(|calls| calls.iter().filter(|call| **call == Call::Reset).count() == 100);
    let writes = |call: &&Call| matches!(call, Call::RegionWrite(..));
    assert_eq!(
        server.function.take_calls().iter().filter(writes).count(),
        100
    );
}

#[test]
fn a_second_client_is_told_that_the_first_one_is_served() {
    let server = Server::start();
    let mut first = server.client();
    for _ in 0..10 {
        let second = Client::connect(&server.path, PATIENCE).map(|_| "served");
        assert!(
            matches!(second, Err(ClientError::Refused { errno, .. }) if errno == libc::EBUSY as u32),
            "{second:?}"
        );
    }
    first.device_info().unwrap();
    drop(first);
    Client::connect(&server.path, PATIENCE).expect("there is room again");
}

#[test]
fn connections_that_say_nothing_do_not_pile_up() {
    let server = Server::start();
    let mut first = server.client();
    let silent: Vec<Raw> = (0..20).map(|_| server.raw()).collect();
    first.device_info().unwrap();
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let before = count("/proc/self/fd");
    drop(silent);
    first.device_info().unwrap();
    assert!(count("/proc/self/fd") < before);
    let mut refused = server.raw();
    refused.send(&hello()[..10]);
    refused.send(&hello()[10..]);
    assert_eq!(refused.errno(), libc::EBUSY);
}

#[test]
fn who_only_looks_does_not_reset_the_function() {
    let server = Server::start();
    drop(UnixStream::connect(&server.path).unwrap());
    let in_use = Endpoint::bind(&server.path, server.function.clone());
    assert!(matches!(in_use, Err(EndpointError::InUse { .. })));
    server.client().device_info().unwrap();
    server.wait_for(|calls| calls.contains(&Call::Reset));
    assert_eq!(
        server
            .function
            .calls()
            .iter()
            .filter(|call| **call == Call::Reset)
            .count(),
        1
    );
}

#[test]
fn a_shutdown_ends_the_session_in_order() {
    let mut server = Server::start();
    let mut raw = server.greeted();
    let memory = memfd(0x1000);
    raw.send_fds(&dma_map(0, 0x1000, 0, 3), &[memory.as_fd()]);
    assert!(!raw.reply().0.is_error());
    server.function.take_calls();
    server.stop();
    raw.assert_closed();
    assert!(!server.path.exists());
    let calls = server.function.take_calls();
    assert_eq!(
        calls[calls.len() - 2..],
        [Call::Unmap(0, 0x1000), Call::Reset]
    );
    let gone = Client::connect(&server.path, PATIENCE).map(drop);
    assert!(matches!(gone, Err(ClientError::Connect { .. })));
}

fn bind(path: &Path) -> Result<Endpoint, EndpointError> {
    Endpoint::bind(path, Arc::new(TestFunction::new()))
}

#[test]
fn the_socket_is_for_owner_and_group_and_goes_with_the_endpoint() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let endpoint = bind(&path).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o660);
    assert_eq!(endpoint.path(), path);
    drop(endpoint);
    assert!(!path.exists());
}

#[test]
fn the_socket_of_a_dead_server_is_replaced() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let endpoint = bind(&path).unwrap();
    UnixStream::connect(&path).unwrap();
    drop(endpoint);
}

#[test]
fn the_socket_of_a_live_server_is_not_touched() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let live = UnixListener::bind(&path).unwrap();
    let error = bind(&path).map(drop).unwrap_err();
    assert!(matches!(error, EndpointError::InUse { .. }));
    assert!(error.to_string().contains(path.to_str().unwrap()));
    // Not even while it is too busy to accept anyone.
    let waiting: Vec<_> = (0..)
        .map_while(|_| connect_now(&path))
        .take(10_000)
        .collect();
    assert!(matches!(
        bind(&path).map(drop),
        Err(EndpointError::InUse { .. })
    ));
    drop((live, waiting));
}

/// Connects, unless the backlog is full.
fn connect_now(path: &Path) -> Option<std::os::fd::OwnedFd> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let flags = SocketFlags::NONBLOCK;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap())
        .ok()
        .map(|()| socket)
}

#[test]
fn a_file_that_is_no_socket_is_not_touched() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    std::fs::write(&path, "precious").unwrap();
    let error = bind(&path).map(drop).unwrap_err();
    assert!(matches!(error, EndpointError::NotASocket { .. }));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_successors_socket_is_not_removed() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let endpoint = bind(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let successor = bind(&path).unwrap();
    drop(endpoint);
    assert!(path.exists());
    drop(successor);
}

#[test]
fn paths_that_cannot_be_are_refused_with_a_sentence() {
    let long = Path::new("/tmp").join("x".repeat(103));
    let error = bind(&long).map(drop).unwrap_err().to_string();
    assert!(
        error.contains("108 bytes") && error.contains("107"),
        "{error}"
    );
    assert!(matches!(
        bind(Path::new("")).map(drop),
        Err(EndpointError::PathLength { .. })
    ));
    let nowhere = bind(Path::new("/nonexistent/s"))
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(
        nowhere.contains("/nonexistent/s") && nowhere.contains("directory"),
        "{nowhere}"
    );
    let fits = Path::new("/tmp").join("x".repeat(102));
    drop(bind(&fits).unwrap());
}

/// A subscriber that is always ready.
struct Neighbour {
    event: EventFd,
    turns: u32,
}

impl MutEventSubscriber for Neighbour {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.turns += 1;
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
    }
}

enum Either {
    Endpoint(Box<Endpoint>),
    Neighbour(Neighbour),
}

impl MutEventSubscriber for Either {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match self {
            Self::Endpoint(endpoint) => endpoint.process(events, ops),
            Self::Neighbour(neighbour) => neighbour.process(events, ops),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        match self {
            Self::Endpoint(endpoint) => endpoint.init(ops),
            Self::Neighbour(neighbour) => neighbour.init(ops),
        }
    }
}

#[test]
fn a_client_that_floods_does_not_keep_others_in_the_event_loop_from_their_turn() {
    let directory = TempDir::new().unwrap();
    let path = directory.as_path().join("s");
    let function = Arc::new(TestFunction::new());
    *function.write_takes.lock().unwrap() = Duration::from_micros(10);
    let endpoint = Endpoint::bind(&path, function.clone()).unwrap();
    let event = eventfd();
    event.write(1).unwrap();
    let mut events = EventManager::new().unwrap();
    let neighbour = events.add_subscriber(Either::Neighbour(Neighbour { event, turns: 0 }));
    events.add_subscriber(Either::Endpoint(Box::new(endpoint)));

    let (messages, multis, each) = (1000, 4, 1000);
    let flood = std::thread::spawn(move || {
        let mut client = Client::connect(&path, PATIENCE).unwrap();
        for _ in 0..messages {
            client.region_write_posted(0, 0, &[1; 4]).unwrap();
        }
        let write = MultiWrite {
            offset: 0,
            region: 0,
            count: 4,
            data: [0; 8],
        };
        for _ in 0..multis {
            client.region_write_multi(&vec![write; each], true).unwrap();
        }
        client.device_info().unwrap();
    });
    while !flood.is_finished() {
        events.run_with_timeout(5).unwrap();
    }
    flood.join().unwrap();
    let Either::Neighbour(neighbour) = events.remove_subscriber(neighbour).unwrap() else {
        panic!("not the neighbour");
    };
    let most_per_turn = 65;
    let writes = (messages + multis * each) as u32;
    assert!(
        neighbour.turns >= writes / most_per_turn,
        "{} turns",
        neighbour.turns
    );
}
