//! Workers that are killed in the middle of verified I/O, and replaced. The VMM here is a vfio-user
//! client; a real one is in `custody_guest`.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::{Duration, Instant};

use farbus_integration::attached;
use farbus_integration::custody::{ID, KeptWorker};
use farbus_integration::daemon::{self, Daemon};
use farbus_integration::deadline::Deadline;
use farbus_integration::process::{Process, mortal_command};
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;

/// How often a worker is killed.
const KILLS: u64 = 50;
const DRIVE: &str = "backing=memory,size=64MiB";

struct Bed {
    server: Daemon,
    kept: KeptWorker,
    socket: String,
    _scratch: Scratch,
}

impl Bed {
    fn start(name: &str) -> Self {
        let scratch = Scratch::new(name).unwrap();
        let socket = scratch.join("disk0.sock");
        let server = attached::serve(DRIVE).unwrap();
        let address = attached::address(&server);
        let kept = KeptWorker::start(scratch.path(), &address, &socket, &[]).unwrap();
        Self {
            server,
            kept,
            socket: socket.display().to_string(),
            _scratch: scratch,
        }
    }

    /// A client that writes a pattern, rewrites it and reads it back, all over the drive.
    fn verify(&self, seed: u64) -> Process {
        let mut command = mortal_command(&daemon::program("farbus-vfu-nvme").unwrap());
        let seed = seed.to_string();
        let what = [
            "verify",
            "--vfio-user",
            &self.socket,
            "--bs",
            "4k",
            "--iodepth",
            "16",
        ];
        // Every other one without doorbells in memory.
        let doorbells: &[&str] = if seed.ends_with(['1', '3', '5', '7', '9']) {
            &["--no-dbbuf"]
        } else {
            &[]
        };
        command.args(what).args(["--seed", &seed]).args(doorbells);
        Process::start("verify", command).unwrap()
    }

    /// Waits until that many more I/Os are done, or the client is; whether it goes on.
    fn progresses(&self, client: &mut Process, ios: u64) -> bool {
        let start = self.kept.completed().unwrap();
        let begun = Instant::now();
        while self.kept.completed().unwrap() < start + ios {
            if client.try_status().unwrap().is_some() {
                return false;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "no I/O completes"
            );
            std::thread::yield_now();
        }
        true
    }
}

/// Different numbers, the same in each run.
fn numbers() -> impl FnMut() -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

#[test]
fn fifty_killed_workers_lose_nothing_and_do_nothing_twice() -> TestResult {
    let mut bed = Bed::start("kills");
    let mut number = numbers();
    let (mut kills, mut longest) = (0, Duration::ZERO);
    for seed in 0.. {
        let mut client = bed.verify(seed);
        while bed.progresses(&mut client, 50 + number() % 2000) {
            bed.kept.kill_worker()?;
            let dead = Instant::now();
            bed.kept.start_worker()?;
            kills += 1;
            if bed.progresses(&mut client, 1) {
                longest = longest.max(dead.elapsed());
            }
        }
        let status = client.wait(Deadline::secs(60))?;
        assert!(
            status.success(),
            "verify {seed} after {kills} kills: {status}"
        );
        if kills >= KILLS {
            break;
        }
    }
    println!("{kills} workers killed; the longest pause was {longest:?}");
    let statistics = bed.kept.keeper()?.statistics(ID).unwrap().to_api(None);
    assert_eq!(statistics.errors, 0);
    bed.kept.end()?;
    bed.server.terminate().map_err(Into::into)
}

#[test]
fn a_daemon_that_comes_and_goes_is_not_noticed() -> TestResult {
    let mut bed = Bed::start("daemon");
    let mut client = bed.verify(0);
    for round in 0..5 {
        bed.kept.restart_keeper()?;
        bed.kept.event("the worker's return", |event| {
            matches!(event, farbus_compute_agent::custody::Event::Ready { .. })
        })?;
        // What a new daemon was given is good for a successor, too.
        if round % 2 == 1 {
            bed.kept.kill_worker()?;
            bed.kept.start_worker()?;
        }
        if !bed.progresses(&mut client, 100) {
            assert!(client.wait(Deadline::secs(60))?.success());
            client = bed.verify(round + 1);
        }
    }
    assert!(client.wait(Deadline::secs(60))?.success());
    bed.kept.end()?;
    bed.server.terminate().map_err(Into::into)
}
