//! The keeper and its workers, well-behaved and other.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use farbus_compute_agent::custody::messages::{
    FromKeeper, FromWorker, Key, Link, MAX_DATAGRAM, VERSION,
};
use farbus_compute_agent::custody::socket::Socket;
use farbus_compute_agent::custody::worker::Asked;
use farbus_compute_agent::custody::{Client, CustodyError, Event, Keeper, KeeperError};
use rustix::fs::{MemfdFlags, memfd_create};

const PATIENCE: Duration = Duration::from_secs(20);

struct Bed {
    keeper: Option<Keeper>,
    events: Receiver<Event>,
    directory: PathBuf,
}

impl Bed {
    fn new(name: &str) -> Self {
        let directory =
            std::env::temp_dir().join(format!("farbus-custody-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let mut bed = Self {
            keeper: None,
            events: channel().1,
            directory,
        };
        bed.restart();
        bed
    }

    fn restart(&mut self) {
        self.keeper = None;
        let (send, events) = channel();
        let keeper = Keeper::bind(&self.path(), move |event| send.send(event).unwrap_or(()));
        let keeper = keeper.unwrap();
        keeper.appoint("a", std::process::id());
        self.keeper = Some(keeper);
        self.events = events;
    }

    fn path(&self) -> PathBuf {
        self.directory.join("custody.sock")
    }

    fn keeper(&self) -> &Keeper {
        self.keeper.as_ref().unwrap()
    }

    fn event(&self) -> Event {
        self.events.recv_timeout(PATIENCE).unwrap()
    }

    fn worker(&self) -> Client {
        eventually(|| Client::connect(&self.path(), "a").ok())
    }

    fn hello(&self, id: &str, version: u32) -> Socket {
        let socket = Socket::connect(&self.path()).unwrap();
        let hello = FromWorker::Hello {
            version,
            id: id.into(),
            pid: 1,
            live: false,
        };
        assert!(socket.send(&hello, &[]).unwrap());
        socket
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.keeper = None;
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

fn memory(text: &str) -> OwnedFd {
    let mut file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(text.as_bytes()).unwrap();
    file.into()
}

fn text(fd: OwnedFd) -> String {
    let mut file = File::from(fd);
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

fn key(number: u64) -> Key {
    Key::numbered("memory", number)
}

fn answer(socket: &Socket) -> FromKeeper {
    eventually(|| socket.receive().unwrap()).0
}

/// Reads to the end; the last words before it.
fn last_words(socket: &Socket) -> Option<String> {
    let mut last = None;
    eventually(|| match socket.receive::<FromKeeper>() {
        Ok(Some((FromKeeper::Refused { reason }, _))) => {
            last = Some(reason);
            None
        }
        Ok(_) => None,
        Err(_) => Some(()),
    });
    last
}

#[test]
fn a_successor_gets_what_the_killed_worker_had() {
    let bed = Bed::new("successor");
    let mut first = bed.worker();
    // More than one datagram takes.
    let fds: Vec<_> = (0..100).map(|n| memory(&n.to_string())).collect();
    let kept = (0..).map(key).zip(fds.iter().map(AsFd::as_fd)).collect();
    first.keep(kept).unwrap();
    first.forget(&[key(7)]);
    drop(first);

    let second = bed.worker();

    assert_eq!(second.keys().count(), 99);
    assert!(second.held(&key(7)).is_none());
    assert_eq!(text(second.held(&key(93)).unwrap()), "93");
    let pid = std::process::id();
    let id = || "a".to_owned();
    let (connected, resumed) = (bed.event(), |resumed| Event::Connected {
        id: id(),
        pid,
        resumed,
    });
    assert_eq!(connected, resumed(false));
    assert_eq!(bed.event(), Event::Lost { id: id(), pid });
    assert_eq!(bed.event(), resumed(true));
}

#[test]
fn a_worker_that_says_good_bye_leaves_nothing() {
    let bed = Bed::new("bye");
    let mut worker = bed.worker();
    worker.keep(vec![(key(1), memory("x").as_fd())]).unwrap();
    worker.ready();
    worker.link(Link::Down, Some("cut".into()));
    worker.bye();
    drop(worker);
    let id = || "a".to_owned();
    bed.event();
    assert_eq!(bed.event(), Event::Ready { id: id() });
    let (link, reason) = (Link::Down, Some("cut".into()));
    assert_eq!(
        bed.event(),
        Event::State {
            id: id(),
            link,
            reason
        }
    );
    assert_eq!(bed.event(), Event::Bye { id: id() });
    assert_eq!(bed.keeper().held("a"), 0);
    assert_eq!(bed.worker().keys().count(), 0);
}

#[test]
fn a_living_worker_hands_everything_to_a_new_daemon() {
    let mut bed = Bed::new("restart");
    let mut worker = bed.worker();
    worker.keep(vec![(key(1), memory("x").as_fd())]).unwrap();
    worker.ready();
    bed.restart();
    // It notices, or has noticed when it looks.
    eventually(|| {
        (worker.listen() == Asked::Nothing && worker.descriptor().is_none()).then_some(())
    });
    worker.keep(vec![(key(2), memory("y").as_fd())]).unwrap();

    assert!(worker.look_for_keeper());

    eventually(|| (bed.keeper().held("a") == 2).then_some(()));
    let resumed = bed.event();
    assert!(
        matches!(resumed, Event::Connected { resumed: true, .. }),
        "{resumed:?}"
    );
    assert_eq!(bed.event(), Event::Ready { id: "a".into() });
}

#[test]
fn a_worker_is_told_to_stop() {
    let bed = Bed::new("stop");
    assert!(!bed.keeper().stop("a"));
    let mut worker = bed.worker();
    assert!(bed.keeper().stop("a"));
    eventually(|| (worker.listen() == Asked::Stop).then_some(()));
}

#[test]
fn a_second_worker_of_an_attachment_is_refused() {
    let bed = Bed::new("second");
    let _first = bed.worker();
    let refused = Client::connect(&bed.path(), "a");
    assert!(matches!(&refused, Err(CustodyError::Refused(why)) if why.contains("worker already")));
}

#[test]
fn another_process_is_refused_whether_the_worker_lives_or_not() {
    let bed = Bed::new("impostor");
    let own = std::process::id();
    let other = own + 1;
    let mut worker = bed.worker();
    worker.keep(vec![(key(1), memory("x").as_fd())]).unwrap();
    eventually(|| (bed.keeper().held("a") == 1).then_some(()));
    let refused = |why: &str| {
        let reason = last_words(&bed.hello("a", VERSION)).unwrap();
        assert!(
            reason.contains(&format!("process {own} of user")),
            "{reason}"
        );
        assert!(reason.contains(why), "{reason}");
    };

    bed.keeper().appoint("a", other);
    refused(&format!("is process {other}"));
    assert_eq!(bed.keeper().worker("a"), Some(own));
    drop(worker);
    eventually(|| bed.keeper().worker("a").is_none().then_some(()));
    refused(&format!("is process {other}"));
    bed.keeper().dismiss("a");
    refused("has started no worker");

    bed.keeper().appoint("a", own);
    assert_eq!(text(bed.worker().held(&key(1)).unwrap()), "x");
}

#[test]
fn process_that_connects_before_it_is_known_is_heard_when_it_is() {
    let bed = Bed::new("early");
    bed.keeper().dismiss("a");

    let connecting = bed.keeper().appoint_started("a", || {
        let path = bed.path();
        let connecting = std::thread::spawn(move || Client::connect(&path, "a"));
        Ok::<_, ()>((std::process::id(), connecting))
    });

    connecting.unwrap().join().unwrap().unwrap();
}

#[test]
fn unknown_attachments_and_versions_are_refused() {
    let bed = Bed::new("unknown");
    let refused = Client::connect(&bed.path(), "b");
    assert!(matches!(&refused, Err(CustodyError::Refused(why)) if why.contains("no attachment b")));
    let reason = last_words(&bed.hello("a", VERSION + 1)).unwrap();
    assert!(reason.contains("version"), "{reason}");
}

#[test]
fn a_released_attachment_closes_everything_and_cuts_its_worker_off() {
    let bed = Bed::new("release");
    let mut worker = bed.worker();
    worker.keep(vec![(key(1), memory("x").as_fd())]).unwrap();
    bed.keeper().release("a");
    eventually(|| {
        (worker.listen() == Asked::Nothing && worker.descriptor().is_none()).then_some(())
    });
    assert_eq!(bed.keeper().held("a"), 0);
    let again = Client::connect(&bed.path(), "a");
    assert!(matches!(again, Err(CustodyError::Refused(_))));
}

#[test]
fn more_descriptors_than_an_attachment_can_need_are_refused() {
    let bed = Bed::new("hoard");
    let socket = bed.hello("a", VERSION);
    assert_eq!(answer(&socket), FromKeeper::Welcome { held: 0 });
    let fd = memory("x");
    let fds = vec![fd.as_fd(); 32];
    let mut sent = 0..;
    let end = eventually(|| {
        let keys = sent.by_ref().take(32).map(key).collect();
        socket.send(&FromWorker::Keep { keys }, &fds).err()
    });
    assert!(bed.keeper().held("a") <= 2592, "{end}");
    assert_eq!(bed.keeper().worker("a"), None);
}

#[test]
fn nonsense_ends_a_connection_and_nothing_else() {
    let bed = Bed::new("nonsense");
    let mut good = bed.worker();
    for nonsense in [
        &b"{"[..],
        b"\"ready\"",
        b"{\"say\":\"ready\"}",
        &[b' '; MAX_DATAGRAM + 1],
    ] {
        let socket = Socket::connect(&bed.path()).unwrap();
        rustix::net::send(&socket, nonsense, rustix::net::SendFlags::empty()).unwrap();
        assert!(last_words(&socket).is_some());
    }
    good.keep(vec![(key(1), memory("x").as_fd())]).unwrap();
    eventually(|| (bed.keeper().held("a") == 1).then_some(()));
}

#[test]
fn strangers_that_say_nothing_do_not_pile_up() {
    let bed = Bed::new("strangers");
    let strangers: Vec<_> = (0..40)
        .map(|_| Socket::connect(&bed.path()).unwrap())
        .collect();
    let closed = || {
        strangers
            .iter()
            .filter(|s| s.receive::<FromKeeper>().is_err())
            .count()
    };
    eventually(|| (closed() == 24).then_some(()));
    let mut worker = bed.worker();
    worker.ready();
}

#[test]
fn two_daemons_do_not_share_a_socket() {
    let bed = Bed::new("two");
    let second = Keeper::bind(&bed.path(), |_| {});
    assert!(matches!(second, Err(KeeperError::InUse { .. })));
}
