//! The two daemons as an operator runs them: what they say, how they end, what they refuse, and
//! what happens to the VMM when one of them goes. The VMM here is a vfio-user client.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use farbus_fabric::FabricError;
use farbus_fabric::session::client;
use farbus_fabric::wire::ExportName;
use farbus_integration::attached::{self, AttachedDrive};
use farbus_integration::daemon::{self, Daemon, Ended};
use farbus_integration::deadline::Deadline;
use farbus_integration::process::Kill;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::skip;
use farbus_vfio::Function;
use farbus_vfio::driver::{DriverConfig, NvmeDriver, block_command};
use farbus_vfio::nvme::{csts, nvm, reg};
use farbus_vfio::user::{Client, UserFunction};

const BLOCK: u32 = 512;
const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// A driver behind the agent's socket, with pairs of I/O queues of 128 entries.
fn drive(socket: &Path, queues: u16) -> NvmeDriver<UserFunction> {
    let client = Client::connect(socket, PATIENCE).unwrap();
    let function = UserFunction::new(client, "test".into()).unwrap();
    let config = DriverConfig {
        memory: 64 << 20,
        timeout: PATIENCE,
        ..DriverConfig::default()
    };
    let mut driver = NvmeDriver::new(Arc::new(function), config).unwrap();
    driver.enable().unwrap();
    driver.request_queues(queues).unwrap();
    for queue in 1..=queues {
        driver.create_queue_pair(queue, 128, Some(queue)).unwrap();
    }
    driver
}

fn refused(name: &str, arguments: &[&str]) -> Ended {
    Daemon::run(name, arguments, Deadline::secs(30)).unwrap()
}

fn export(arguments: &[&str]) -> Ended {
    refused("farbus-device-server", &[&["export"], arguments].concat())
}

fn attach(arguments: &[&str]) -> Ended {
    refused("farbus-compute-agent", &[&["attach"], arguments].concat())
}

#[track_caller]
fn assert_refused(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!(ended.status.code(), Some(code), "{ended:?}");
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "{word:?} is not in: {}",
            ended.stderr
        );
    }
    assert_eq!(ended.stdout, "", "a daemon that is refused is not ready");
}

#[test]
fn daemons_say_ready_once_and_end_with_0_on_sigterm() -> TestResult {
    let scratch = Scratch::new("ready")?;
    let drive = AttachedDrive::start(&scratch, "size=1MiB")?;
    assert!(
        drive
            .server
            .ready()
            .starts_with("ready export=disk0 listen=127.0.0.1:")
    );
    assert!(
        drive
            .agent
            .ready()
            .starts_with("ready export=disk0 vfio-user=")
    );
    let mode = std::fs::metadata(&drive.socket)?.permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let socket = drive.socket.clone();
    drive.end()?;
    assert!(!socket.exists());
    Ok(())
}

#[test]
fn ready_lines_are_json_on_request() -> TestResult {
    let scratch = Scratch::new("json")?;
    let spec = format!("path={},size=1MiB", scratch.join("disk.img").display());
    let mut server = Command::new(daemon::program("farbus-device-server")?)
        .args(["export", "--soft-nvme", &spec, "--name", "disk0"])
        .args(["--listen", "127.0.0.1:0", "--json"])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line)?;
    server.kill()?;
    server.wait()?;
    let ready: serde_json::Value = serde_json::from_str(&line)?;
    assert_eq!(ready["ready"], true);
    assert_eq!(ready["export"], "disk0");
    assert!(ready["listen"].as_str().unwrap().starts_with("127.0.0.1:"));
    Ok(())
}

#[test]
fn help_has_examples_and_exit_codes() -> TestResult {
    let scratch = Scratch::new("help")?;
    let spec = format!("path={},size=1MiB", scratch.join("disk.img").display());
    let ended = export(&["--soft-nvme", &spec, "--name", "a/b"]);
    assert_refused(&ended, 2, &["a/b"]);
    for daemon in ["farbus-device-server", "farbus-compute-agent"] {
        let help = refused(daemon, &["--help"]);
        assert_eq!(help.status.code(), Some(0));
        assert!(help.stdout.contains("Exit codes"), "{}", help.stdout);
    }
    assert!(
        refused("farbus-device-server", &["export", "--help"])
            .stdout
            .contains("Example")
    );
    assert!(
        refused("farbus-compute-agent", &["attach", "--help"])
            .stdout
            .contains("Example")
    );
    Ok(())
}

#[test]
fn addresses_that_others_can_reach_need_a_word() -> TestResult {
    let scratch = Scratch::new("open")?;
    let spec = format!("path={},size=1MiB", scratch.join("disk.img").display());
    for address in ["0.0.0.0:0", "[::]:0"] {
        let ended = export(&["--soft-nvme", &spec, "--name", "d", "--listen", address]);
        assert_refused(&ended, 4, &[address, "--insecure"]);
    }
    assert!(
        !scratch.join("disk.img").exists(),
        "nothing is made before it is wanted"
    );
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let ended = export(&["--soft-nvme", &spec, "--name", "d", "--listen", &address]);
    assert_refused(&ended, 4, &[&address, "in use"]);
    let ended = export(&["--soft-nvme", &spec, "--name", "d", "--listen", "nowhere"]);
    assert_refused(&ended, 4, &["nowhere"]);
    Ok(())
}

#[test]
fn drives_that_cannot_be_are_refused_and_left_as_they_are() -> TestResult {
    let scratch = Scratch::new("spec")?;
    let path = scratch.join("disk.img");
    let disk = path.display().to_string();
    let with = |options: &str| {
        let spec = format!("path={disk}{options}");
        export(&[
            "--soft-nvme",
            &spec,
            "--name",
            "d",
            "--listen",
            "127.0.0.1:0",
        ])
    };
    assert_refused(&with(""), 3, &[&disk, "size="]);
    assert_refused(&with(",size=banana"), 2, &["banana"]);
    assert_refused(&with(",size=1MiB,block-size=1000"), 2, &["1000"]);
    assert_refused(&with(",colour=red"), 2, &["colour"]);
    assert_refused(&with(",size=1MiB,size=2MiB"), 2, &["size"]);
    std::fs::write(&path, vec![7; 1 << 20])?;
    for size in ["512KiB", "2MiB"] {
        assert_refused(&with(&format!(",size={size}")), 3, &[&disk]);
    }
    assert_eq!(std::fs::read(&path)?, vec![7; 1 << 20]);
    std::fs::write(&path, vec![7; 1000])?;
    assert_refused(&with(""), 3, &[&disk, "1000"]);

    std::fs::write(&path, vec![7; 1 << 20])?;
    let server = attached::serve(&format!("path={disk}"))?;
    assert_refused(&with(""), 3, &[&disk]);
    server.terminate()?;
    Ok(())
}

#[test]
fn attachments_that_cannot_be_are_refused_with_the_remedy() -> TestResult {
    let scratch = Scratch::new("attach")?;
    let path = |name: &str| scratch.join(name).display().to_string();
    let nobody = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let socket = path("disk0.sock");
    let ended = attach(&[
        "--from",
        &nobody,
        "--export",
        "disk0",
        "--vfio-user",
        &socket,
    ]);
    assert_refused(&ended, 3, &[&nobody, "disk0"]);

    let drive = AttachedDrive::start(&scratch, "size=1MiB")?;
    let address = attached::address(&drive.server);
    let from = |export: &str, socket: &str| {
        attach(&[
            "--from",
            &address,
            "--export",
            export,
            "--vfio-user",
            socket,
        ])
    };
    assert_refused(&from("disk1", &path("other.sock")), 3, &["disk1", "disk0"]);
    assert_refused(
        &from("disk0", &path("other.sock")),
        3,
        &["claimed by", "busy"],
    );

    let second = attached::serve(&format!("path={},size=1MiB", path("second.img")))?;
    let address = attached::address(&second);
    let from = |socket: &str| {
        attach(&[
            "--from",
            &address,
            "--export",
            "disk0",
            "--vfio-user",
            socket,
        ])
    };
    assert_refused(&from(&socket), 4, &[&socket]);
    std::fs::write(path("file"), "precious")?;
    assert_refused(&from(&path("file")), 4, &[&path("file")]);
    assert_eq!(std::fs::read(path("file"))?, b"precious");
    let long = path(&"x".repeat(120));
    assert_refused(&from(&long), 4, &["107"]);
    second.terminate()?;
    drive.end()?;
    Ok(())
}

#[test]
fn who_asks_in_vain_again_and_again_is_one_line_of_the_log() -> TestResult {
    let scratch = Scratch::new("noise")?;
    let drive = AttachedDrive::start(&scratch, "size=1MiB")?;
    let address = attached::address(&drive.server);
    for _ in 0..20 {
        for export in ["disk0", "disk1"] {
            let export = ExportName::new(export)?;
            let refused = client::claim(&address, &export, "impatient", PATIENCE);
            assert!(matches!(refused, Err(FabricError::Refused { .. })));
        }
    }
    let log = drive.server.stderr();
    println!("{log}");
    let refusals = log
        .lines()
        .filter(|line| line.contains("refused impatient"));
    assert_eq!(refusals.count(), 2, "{log}");
    drive.end()?;
    Ok(())
}

#[test]
fn memory_stays_small_at_depth() -> TestResult {
    let scratch = Scratch::new("memory")?;
    let attached = AttachedDrive::start(&scratch, "size=256MiB")?;
    let mut driver = drive(&attached.socket, 1);
    let len = 128 << 10;
    let buffers: Vec<_> = (0..64)
        .map(|_| driver.memory().allocate(len).unwrap())
        .collect();
    for round in 0..20 {
        let opcode = if round % 2 == 0 {
            nvm::WRITE
        } else {
            nvm::READ
        };
        let mut cids = Vec::new();
        for (slot, buffer) in buffers.iter().enumerate() {
            let prps = driver.prps(*buffer, 0, len).unwrap();
            let mut command = block_command(opcode, slot as u64 * 256, len, BLOCK);
            command.set_prps(prps.prp1, prps.prp2);
            cids.push((driver.enqueue(1, command).unwrap(), prps));
        }
        driver.ring_sq(1, driver.tail(1).unwrap().into()).unwrap();
        for (cid, prps) in cids {
            assert!(driver.wait(1, cid).unwrap().status.is_success());
            driver.free_prps(prps);
        }
    }
    for daemon in [&attached.agent, &attached.server] {
        let anonymous = daemon.proc().anonymous_bytes()?;
        println!("private (anonymous) memory: {} KiB", anonymous >> 10);
        assert!(anonymous < 64 * MIB, "{anonymous} bytes");
    }
    drop(driver);
    attached.end()?;
    Ok(())
}

/// Both daemons say something to each other once a second, and the controller is looked at.
#[test]
fn idle_daemons_cost_less_than_a_thousandth_of_a_core() -> TestResult {
    const WHILE: Duration = Duration::from_secs(5);
    let scratch = Scratch::new("idle")?;
    let mut attached = AttachedDrive::start(&scratch, "size=1MiB")?;
    let mut driver = drive(&attached.socket, 2);
    let mut back = [0; 4096];
    for _ in 0..100 {
        driver.read(1, 0, BLOCK, &mut back).unwrap();
    }
    let used = |attached: &AttachedDrive| -> Result<[u64; 2], Failure> {
        Ok([
            attached.agent.proc().cpu_ns()?,
            attached.server.proc().cpu_ns()?,
        ])
    };
    // What looking for more has cost after the last command is over by then.
    attached.agent.wait_end(Deadline::secs(1)).unwrap_err();
    let before = used(&attached)?;
    let start = Instant::now();
    attached.agent.wait_end(Deadline::secs(5)).unwrap_err();
    let after = used(&attached)?;
    let elapsed = start.elapsed().max(WHILE).as_nanos() as u64;
    for (name, before, after) in [
        ("agent", before[0], after[0]),
        ("device server", before[1], after[1]),
    ] {
        let ppm = (after - before) * 1_000_000 / elapsed;
        println!("idle {name}: {ppm} millionths of a core");
        assert!(ppm < 1000, "{name}: {ppm} millionths of a core");
    }
    drop(driver);
    attached.end()?;
    Ok(())
}

#[test]
fn endpoint_outlives_its_client_and_the_next_one_finds_a_reset_controller() -> TestResult {
    let scratch = Scratch::new("next")?;
    let attached = AttachedDrive::start(&scratch, "size=1MiB")?;
    for round in 0..5u8 {
        let mut driver = drive(&attached.socket, 2);
        driver.write(1, 0, BLOCK, &[round; 4096]).unwrap();
        let mut back = [0; 4096];
        driver.read(2, 0, BLOCK, &mut back).unwrap();
        assert_eq!(back, [round; 4096]);
        drop(driver);
        let client = Client::connect(&attached.socket, PATIENCE).unwrap();
        let function = UserFunction::new(client, "test".into()).unwrap();
        let mut status = [1; 4];
        function
            .region_read(farbus_vfio::RegionIndex::BAR0, reg::CSTS, &mut status)
            .unwrap();
        assert_eq!(u32::from_le_bytes(status) & csts::RDY, 0);
    }
    attached.end()?;
    Ok(())
}

#[test]
fn killed_agent_frees_the_export() -> TestResult {
    let scratch = Scratch::new("agent")?;
    let attached = AttachedDrive::start(&scratch, "size=1MiB")?;
    let mut driver = drive(&attached.socket, 1);
    driver.write(1, 0, BLOCK, &[3; 512]).unwrap();
    attached.agent.kill()?;
    // Its socket is left behind; the next agent takes its place, as soon as the drive is reset.
    let address = attached::address(&attached.server);
    let start = Instant::now();
    let agent = loop {
        match attached::attach(&address, &attached.socket) {
            Ok(agent) => break agent,
            Err(error) if start.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => {}
        }
    };
    let mut driver = drive(&attached.socket, 1);
    let mut back = [0; 512];
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    assert_eq!(back, [3; 512]);
    agent.terminate()?;
    attached.server.terminate()?;
    Ok(())
}

#[test]
fn killed_device_server_is_a_pause() -> TestResult {
    let scratch = Scratch::new("server")?;
    let attached = AttachedDrive::start(&scratch, "size=64MiB")?;
    let address = attached::address(&attached.server);
    let spec = format!("path={}", attached.disk.display());
    let mut server = Some(attached.server);
    let mut driver = drive(&attached.socket, 1);
    let len = 64 << 10;
    for round in 0..5u8 {
        let mut cids = Vec::new();
        for slot in 0..100u64 {
            let buffer = driver.memory().allocate(len).unwrap();
            driver.memory().write(buffer, 0, &vec![round; len]).unwrap();
            let prps = driver.prps(buffer, 0, len).unwrap();
            let mut command = block_command(nvm::WRITE, slot * 128, len, BLOCK);
            command.set_prps(prps.prp1, prps.prp2);
            cids.push((driver.submit(1, command).unwrap(), prps, buffer));
        }
        if let Some(server) = server.take() {
            server.kill()?;
        }
        // Answers while nobody is there.
        let asked = Instant::now();
        assert!(driver.read32(reg::CSTS).unwrap() & csts::RDY != 0);
        assert!(asked.elapsed() < Duration::from_secs(1));
        server = Some(attached::serve_at(&address, &spec)?);
        for (cid, prps, buffer) in cids {
            assert!(driver.wait(1, cid).unwrap().status.is_success());
            driver.free_prps(prps);
            driver.memory().free(buffer);
        }
        let mut back = vec![0; len];
        for slot in 0..100 {
            driver.read(1, slot * 128, BLOCK, &mut back).unwrap();
            assert!(
                back.iter().all(|byte| *byte == round),
                "round {round}, slot {slot}"
            );
        }
    }
    drop(driver);
    attached.agent.terminate()?;
    if let Some(server) = server {
        server.terminate()?;
    }
    Ok(())
}

#[test]
fn agent_answers_within_a_second_while_the_device_server_is_frozen() -> TestResult {
    let scratch = Scratch::new("frozen")?;
    let attached = AttachedDrive::start(&scratch, "size=16MiB")?;
    let mut driver = drive(&attached.socket, 1);
    attached.server.signal(Kill::Stop)?;
    let mut slowest = Duration::ZERO;
    let buffer = driver.memory().allocate(128 << 10).unwrap();
    let mut cids = Vec::new();
    let start = Instant::now();
    // Longer than the agent waits for a sign of life.
    while start.elapsed() < Duration::from_secs(7) {
        let asked = Instant::now();
        driver.read32(reg::CSTS).unwrap();
        let mut id = [0; 4];
        driver.function().config_read(0, &mut id).unwrap();
        driver.function().config_write(4, &[6, 0]).unwrap();
        if cids.len() < 100 {
            let prps = driver.prps(buffer, 0, 128 << 10).unwrap();
            let mut command = block_command(nvm::WRITE, 0, 128 << 10, BLOCK);
            command.set_prps(prps.prp1, prps.prp2);
            cids.push((driver.submit(1, command).unwrap(), prps));
        }
        slowest = slowest.max(asked.elapsed());
    }
    println!("slowest answer: {slowest:?}");
    assert!(slowest < Duration::from_secs(1));
    attached.server.signal(Kill::Continue)?;
    for (cid, prps) in cids {
        assert!(driver.wait(1, cid).unwrap().status.is_success());
        driver.free_prps(prps);
    }
    drop(driver);
    attached.end()?;
    Ok(())
}

#[test]
fn full_disk_fails_the_write_and_nothing_else() -> TestResult {
    let scratch = Scratch::new("full")?;
    let dir = scratch.join("small");
    std::fs::create_dir(&dir)?;
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
        .arg(&dir)
        .status()?;
    if !mounted.success() {
        skip!("a small file system cannot be mounted here");
    }
    let outcome = fill(&scratch, &dir);
    Command::new("umount").arg("-l").arg(&dir).status()?;
    outcome
}

fn fill(scratch: &Scratch, dir: &Path) -> TestResult {
    let spec = format!("path={},size=16MiB", dir.join("disk.img").display());
    let server = attached::serve(&spec)?;
    let socket = scratch.join("disk0.sock");
    let agent = attached::attach(&attached::address(&server), &socket)?;
    let mut driver = drive(&socket, 1);
    let mut outcomes = (0..16u64).map(|mib| driver.write(1, mib * 2048, BLOCK, &[1; 1 << 20]));
    let error = outcomes.find_map(Result::err).unwrap();
    println!("the guest saw: {error}");
    assert!(error.status().is_some());
    let mut back = vec![0; 4096];
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    assert_eq!(back, vec![1; 4096]);
    drop(driver);
    agent.terminate()?;
    server.terminate()?;
    Ok(())
}

#[test]
fn backing_file_that_shrinks_fails_reads_beyond_its_end_and_nothing_else() -> TestResult {
    let scratch = Scratch::new("short")?;
    let attached = AttachedDrive::start(&scratch, "size=16MiB")?;
    let mut driver = drive(&attached.socket, 1);
    driver.write(1, 0, BLOCK, &[5; 4096]).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&attached.disk)?
        .set_len(MIB)?;
    let mut back = vec![0; 4096];
    let error = driver.read(1, 8192, BLOCK, &mut back).unwrap_err();
    assert!(error.status().is_some(), "{error}");
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    assert_eq!(back, vec![5; 4096]);
    drop(driver);
    attached.end()?;
    Ok(())
}
