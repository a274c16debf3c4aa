//! One drive for several claimants, as operators set it up: slices that are claimed by themselves,
//! limits, and what claimants notice of each other. Claimants are `farbus-vfu-nvme` processes.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test stops where it cannot go on")]

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::Duration;

use farbus_integration::attached;
use farbus_integration::claimant::{self, iops};
use farbus_integration::daemon::{Daemon, Ended};
use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use farbus_integration::scratch::Scratch;
use farbus_vfio::driver::{DriverConfig, NvmeDriver, block_command};
use farbus_vfio::nvme::nvm;
use farbus_vfio::user::{Client, UserFunction};

const BLOCK: u32 = 512;
const PATIENCE: Duration = Duration::from_secs(20);
/// Any command here is done well within this, also on a busy machine.
const LIMIT_SECS: u64 = 200;
const IN_MEMORY: &str = "backing=memory,size=64MiB,queues=8";
const HALVES: [&str; 4] = [
    "--slice",
    "name=a,offset=0,size=32MiB",
    "--slice",
    "name=b,offset=32MiB,size=32MiB",
];

/// What is measured is measured alone: the other tests of this file wait meanwhile.
static QUIET: RwLock<()> = RwLock::new(());

fn measuring() -> RwLockWriteGuard<'static, ()> {
    QUIET.write().unwrap_or_else(PoisonError::into_inner)
}

fn beside_others() -> RwLockReadGuard<'static, ()> {
    QUIET.read().unwrap_or_else(PoisonError::into_inner)
}

/// A drive on a file that is there for as long as `scratch`.
fn on_file(scratch: &Scratch) -> String {
    let disk = scratch.join("disk.img");
    format!("path={},size=64MiB,queues=8", disk.display())
}

/// The arguments that export a drive.
fn export<'a>(drive: &'a str, options: &[&'a str]) -> Vec<&'a str> {
    let first = ["export", "--soft-nvme", drive, "--name", "disk0"];
    [&first[..], &["--listen", "127.0.0.1:0"], options].concat()
}

fn serve(drive: &str, options: &[&str]) -> Daemon {
    Daemon::start("farbus-device-server", &export(drive, options)).unwrap()
}

fn refused(drive: &str, options: &[&str]) -> Ended {
    let deadline = Deadline::secs(LIMIT_SECS);
    Daemon::run("farbus-device-server", &export(drive, options), deadline).unwrap()
}

/// A driver behind an agent's socket, with one pair of I/O queues of 128 entries.
fn drive_at(socket: &Path) -> NvmeDriver<UserFunction> {
    let client = Client::connect(socket, PATIENCE).unwrap();
    let function = UserFunction::new(client, "test".into()).unwrap();
    let config = DriverConfig {
        timeout: PATIENCE,
        ..DriverConfig::default()
    };
    let mut driver = NvmeDriver::new(Arc::new(function), config).unwrap();
    driver.enable().unwrap();
    driver.create_queue_pair(1, 128, Some(1)).unwrap();
    driver
}

#[test]
fn slices_are_exports_of_their_own_and_verified_at_once() -> TestResult {
    let _quiet = beside_others();
    let scratch = Scratch::new("slices")?;
    for drive in [IN_MEMORY, &on_file(&scratch)] {
        let server = serve(drive, &HALVES);
        assert!(
            server
                .ready()
                .starts_with("ready export=disk0/a export=disk0/b listen="),
            "{}",
            server.ready()
        );
        let address = attached::address(&server);
        let size = |export| {
            claimant::run("identify", &address, export, &[]).unwrap()[0]["size_bytes"].clone()
        };
        assert_eq!(
            (size("disk0/a"), size("disk0/b")),
            ((32 << 20).into(), (32 << 20).into())
        );
        // Every block of both, with patterns of their own, twice over each other's time.
        thread::scope(|scope| {
            for (export, seed) in [("disk0/a", "1"), ("disk0/b", "2")] {
                let address = &address;
                scope.spawn(move || {
                    for bs in ["4k", "64k"] {
                        let options = ["--bs", bs, "--seed", seed, "--iodepth", "32"];
                        let verified = claimant::run("verify", address, export, &options).unwrap();
                        assert_eq!(verified[0]["ok"], true);
                        assert_eq!(verified[0]["bytes"], 32 << 20);
                    }
                });
            }
        });
        server.terminate()?;
    }
    Ok(())
}

#[test]
fn killed_claimant_does_not_disturb_another() -> TestResult {
    let _quiet = measuring();
    let scratch = Scratch::new("crash")?;
    let drive = on_file(&scratch);
    let server = serve(&drive, &HALVES);
    let address = attached::address(&server);
    thread::scope(|scope| -> TestResult {
        let steady = scope.spawn(|| {
            let size = ["--bs", "16k", "--iodepth", "16", "--size", "8MiB"];
            let verified = claimant::run("verify", &address, "disk0/b", &size).unwrap();
            assert_eq!(verified[0]["ok"], true);
            claimant::bench(&address, "disk0/b", &["--iodepth", "1"]).unwrap()
        });
        let mut crashes = 0;
        while crashes < 3 || (crashes < 20 && !steady.is_finished()) {
            // An agent in the middle of its guest's I/O.
            let socket = scratch.join(format!("{crashes}.sock"));
            let agent = attached::attach_export(&address, "disk0/a", &socket)?;
            let mut driver = drive_at(&socket);
            let buffer = driver.memory().allocate(64 << 10).unwrap();
            for n in 0..100 {
                let mut command = block_command(nvm::WRITE, n * 128, 4096, BLOCK);
                command.set_prps(buffer.iova().0, 0);
                driver.enqueue(1, command).unwrap();
            }
            driver.ring(1).unwrap();
            driver.wait(1, 0).unwrap();
            agent.kill()?;
            crashes += 1;
        }
        let measured = steady.join().unwrap();
        let longest = measured["latency_us"]["max"].as_f64().unwrap() / 1000.0;
        println!("{crashes} claimants were killed; another's longest wait was {longest:.1} ms");
        assert!(longest < 2000.0, "{longest:.1} ms");
        Ok(())
    })?;
    let verified = claimant::run("verify", &address, "disk0/a", &["--size", "4MiB"])?;
    assert_eq!(verified[0]["ok"], true, "the slice is free again");
    server.terminate()?;
    Ok(())
}

#[test]
fn equal_claimants_get_within_20_percent_of_each_other() -> TestResult {
    let _quiet = measuring();
    let scratch = Scratch::new("fair")?;
    let on_file = on_file(&scratch);
    for (drive, load) in [
        (IN_MEMORY, ["--iodepth", "32", "--bs", "4k"]),
        (&on_file, ["--iodepth", "32", "--bs", "4k"]),
        (&on_file, ["--iodepth", "16", "--bs", "128k"]),
    ] {
        let server = serve(drive, &HALVES);
        let address = attached::address(&server);
        claimant::share_evenly(&address, ["disk0/a", "disk0/b"], &load)?;
        server.terminate()?;
    }
    Ok(())
}

#[test]
fn greedy_claimant_does_not_starve_a_modest_one() -> TestResult {
    let _quiet = measuring();
    let scratch = Scratch::new("greedy")?;
    let drive = on_file(&scratch);
    let server = serve(&drive, &HALVES);
    let address = attached::address(&server);
    let modest = ["--iodepth", "1", "--bs", "4k"];
    let alone = claimant::bench(&address, "disk0/b", &modest)?;
    let greedy = [
        "--iodepth",
        "255",
        "--queues",
        "3",
        "--bs",
        "16k",
        "--rw",
        "randwrite",
    ];
    let loads = [("disk0/a", &greedy[..]), ("disk0/b", &modest[..])];
    let [taken, left] = claimant::bench_both(&address, loads)?;
    let (alone, left) = (iops(&alone), iops(&left));
    println!(
        "alone {alone:.0} IOPS; beside {:.0} IOPS at depth 765: {left:.0} IOPS",
        iops(&taken)
    );
    // Two cores carry all of it: both claimants, both data threads and the drive's own.
    assert!(left >= 0.1 * alone, "{left:.0} of {alone:.0} IOPS");
    server.terminate()?;
    Ok(())
}

#[test]
fn limits_hold_within_10_percent() -> TestResult {
    let _quiet = measuring();
    let slices = [
        "--slice",
        "name=a,size=32MiB,iops=2000",
        "--slice",
        "name=b,offset=32MiB,bytes-per-second=20MiB,bytes-burst=1MiB",
    ];
    let server = serve(IN_MEMORY, &slices);
    let address = attached::address(&server);
    let small = ["--iodepth", "16", "--bs", "4k"];
    let large = ["--iodepth", "8", "--bs", "128k", "--rw", "randwrite"];
    let loads = [("disk0/a", &small[..]), ("disk0/b", &large[..])];
    let [a, b] = claimant::bench_both(&address, loads)?;
    claimant::keeps_to(2000.0, iops(&a))?;
    claimant::keeps_to(f64::from(20 << 20), iops(&b) * 131_072.0)?;
    server.terminate()?;

    // One that is claimed as a whole has them too.
    let server = serve(IN_MEMORY, &["--limit", "iops=500"]);
    let address = attached::address(&server);
    let load = ["--iodepth", "8", "--queues", "2", "--rw", "randrw"];
    let whole = claimant::bench(&address, "disk0", &load)?;
    claimant::keeps_to(500.0, iops(&whole))?;

    // A claimant may want less for itself, and gets no more than the device server gives.
    let scratch = Scratch::new("limits")?;
    for (asked, wanted) in [
        ("iops=200", 200.0),
        ("iops=5000,bytes-per-second=1GiB", 500.0),
    ] {
        let socket = scratch.join("disk0.sock");
        let path = socket.display().to_string();
        let agent = Daemon::start(
            "farbus-compute-agent",
            &[
                "attach",
                "--from",
                &address,
                "--export",
                "disk0",
                "--vfio-user",
                &path,
                "--limit",
                asked,
            ],
        )?;
        let options = ["--vfio-user", &path, "--seconds", "4", "--iodepth", "4"];
        let measured = claimant::run_with("bench", &options)?;
        claimant::keeps_to(wanted, iops(&measured["total"]))?;
        agent.terminate()?;
    }
    server.terminate()?;
    Ok(())
}

#[test]
fn slices_that_cannot_be_are_refused_with_what_helps() {
    for (options, code, words) in [
        (&["--slice", "offset=x"][..], 2, &["offset=`x`"][..]),
        (&["--slice", "name=a,size=32MB"], 2, &["size=`32MB`", "MiB"]),
        (
            &["--slice", "name=a", "--slice", "name=a"],
            2,
            &["two exports are named a"],
        ),
        (
            &["--slice", "name=a,size=1000"],
            3,
            &["slice a", "1000", "512 bytes"],
        ),
        (
            &["--slice", "name=a,size=1GiB"],
            3,
            &["slice a", "has 67108864"],
        ),
        (
            &[
                "--slice",
                "name=a,size=33MiB",
                "--slice",
                "name=b,offset=32MiB",
            ],
            3,
            &["a and b", "overlap=yes"],
        ),
        (
            &["--slice", "name=a,namespace=2"],
            3,
            &["namespace 2", "it has 1"],
        ),
        (&["--limit", "iops=0"], 2, &["iops=`0`"]),
    ] {
        let ended = refused(IN_MEMORY, options);
        assert_eq!(ended.status.code(), Some(code), "{options:?}: {ended:?}");
        for word in words {
            assert!(
                ended.stderr.contains(word),
                "{word:?} is not in: {}",
                ended.stderr
            );
        }
    }
}
