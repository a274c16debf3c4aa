//! The same by calls to the agent as a service: one call, and a running guest has a drive. Daemon, worker
//! and device server die on the way.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use farbus_compute_agent::api::{Attachment, AttachmentState, Statistics};
use farbus_integration::attached;
use farbus_integration::builder::MachineBuilder;
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::service::Service;
use farbus_integration::tools::Tools;
use hyper::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::bed::{ID, NVME, VIRTIO, limit, objects};

/// A running guest, an agent, and a device server with one drive.
struct Cloud {
    service: Service,
    server: Option<Daemon>,
    machine: Machine,
    guest: Guest,
    node: &'static str,
    spec: Value,
    _scratch: Scratch,
}

impl Cloud {
    fn start(name: &str, endpoint: &Value, node: &'static str) -> Result<Self, Failure> {
        let scratch = Scratch::new(name)?;
        let disk = scratch.join("disk.img");
        let server = attached::serve(&format!("path={},size=64MiB", disk.display()))?;
        let rack = format!("rack1={}", attached::address(&server));
        let service = Service::start(&scratch, &[rack], &[])?;
        let qmp: PathBuf = scratch.join("agent.qmp");
        let machine = MachineBuilder::new(name)
            .monitor(&qmp)
            .root_port("rp1", &Value::Null)
            .modules("virtio_blk")
            .start(&Tools::open()?)?;
        let guest = machine.wait_guest(Deadline::secs(90))?;
        let spec = json!({
            "device": "rack1/disk0",
            "endpoint": endpoint,
            "vm": {"kind": "qemu", "qmp": qmp},
        });
        Ok(Self {
            service,
            server: Some(server),
            machine,
            guest,
            node,
            spec,
            _scratch: scratch,
        })
    }

    fn nvme(name: &str) -> Result<Self, Failure> {
        Self::start(name, &json!({"kind": "vfio-user"}), NVME)
    }

    /// Attaches, and waits for the block device; how long that took.
    fn attach(&self) -> Result<Duration, Failure> {
        let begun = Instant::now();
        self.service.attach(ID, &self.spec)?;
        self.guest.wait_file(self.node, Deadline::secs(30))?;
        Ok(begun.elapsed())
    }

    /// What the attachment has done; nothing if the agent does not know.
    fn statistics(&self) -> Result<Statistics, Failure> {
        let now = self.service.attachment(ID)?;
        Ok(now.and_then(|now| now.statistics).unwrap_or_default())
    }

    fn detach(&self, force: bool) -> Result<Attachment, Failure> {
        Ok(self.service.detach(ID, force)?)
    }

    fn is_gone(&self) -> TestResult {
        let gone = format!("[ ! -e {} ]", self.node);
        self.guest.wait_until(&gone, Deadline::secs(30))?;
        self.machine.check_running()?;
        assert!(self.service.workers().is_empty());
        assert_eq!(self.service.remains(), Vec::<PathBuf>::new());
        Ok(())
    }

    fn io(&self, seed: u32) -> TestResult {
        let drive = self.node;
        self.guest.check(&format!(
            "yes pattern-{seed} | head -c 1048576 >/tmp/p && \
             dd bs=64k if=/tmp/p of={drive} oflag=direct 2>/dev/null && \
             dd bs=64k if={drive} count=16 iflag=direct 2>/dev/null | cmp - /tmp/p"
        ))?;
        Ok(())
    }

    /// Reads from the guest without end, until the drive is gone.
    fn load(&self) -> Result<farbus_integration::guest::Job, Failure> {
        let drive = self.node;
        let name = drive.trim_start_matches("/dev/");
        let job = self.guest.spawn(&format!(
            "while dd if={drive} of=/dev/null bs=64k iflag=direct 2>/dev/null; do :; done"
        ))?;
        self.guest.wait_until(
            &format!("[ $(awk '{{print $1}}' /sys/block/{name}/stat) -gt 100 ]"),
            Deadline::secs(30),
        )?;
        Ok(job)
    }

    fn end(mut self) -> TestResult {
        self.service.terminate()?;
        self.machine.quit()?;
        if let Some(server) = self.server.take() {
            server.terminate()?;
        }
        Ok(())
    }
}

/// Fifty times: no descriptor, object of QEMU's, socket, record or claim is left.
#[test]
fn one_call_gives_a_running_guest_its_drive_and_one_takes_it_away() -> TestResult {
    let cloud = Cloud::nvme("call")?;
    let before = objects(&cloud.machine)?;
    let mut times = Vec::new();
    let mut files = None;
    for cycle in 0..50 {
        times.push(cloud.attach()?);
        if cycle % 10 == 0 {
            cloud.io(cycle)?;
        }
        assert_eq!(cloud.detach(false)?.state, AttachmentState::Detached);
        cloud.is_gone()?;
        assert_eq!(objects(&cloud.machine)?, before);
        let now = cloud.service.daemon()?.proc().open_files()?.len();
        // The first cycles open what is kept.
        let first = *files.get_or_insert(now);
        assert!(now <= first + 3, "{first} descriptors became {now}");
    }
    times.sort_unstable();
    let (median, slowest) = (times[times.len() / 2], times[times.len() - 1]);
    println!("from the call to the block device: median {median:?}, slowest {slowest:?}");
    let second = limit(1);
    assert!(
        median < second,
        "median {median:?}, {second:?} is the limit"
    );
    cloud.end()
}

#[test]
fn virtio_drive_comes_and_goes_by_calls() -> TestResult {
    let endpoint = json!({"kind": "vhost-user-blk", "num_queues": 2});
    let cloud = Cloud::start("callblk", &endpoint, VIRTIO)?;
    let before = objects(&cloud.machine)?;
    for cycle in 0..3 {
        cloud.attach()?;
        cloud.io(cycle)?;
        let done = cloud.statistics()?;
        assert!(done.reads > 0 && done.written_bytes > 0, "{done:?}");
        assert_eq!(cloud.detach(false)?.state, AttachmentState::Detached);
        cloud.is_gone()?;
        assert_eq!(objects(&cloud.machine)?, before);
    }
    cloud.end()
}

#[test]
fn busy_drive_is_taken_away_and_so_is_one_whose_device_server_is_dead() -> TestResult {
    let mut cloud = Cloud::nvme("busycall")?;
    cloud.attach()?;
    let job = cloud.load()?;
    assert_eq!(cloud.detach(false)?.state, AttachmentState::Detached);
    cloud.is_gone()?;
    job.wait(Deadline::secs(30))?;
    cloud.attach()?;
    cloud.io(1)?;
    if let Some(server) = cloud.server.take() {
        server.kill()?;
    }

    let gone = cloud.detach(false)?;

    assert_eq!(gone.state, AttachmentState::Detached);
    cloud.is_gone()?;
    cloud.end()
}

#[test]
fn guest_that_ignores_the_call_keeps_its_drive_until_it_is_taken_by_force() -> TestResult {
    let cloud = Cloud::nvme("deaf")?;
    cloud.attach()?;
    cloud.machine.qmp().execute("stop", &json!({}))?;

    let kept = cloud.detach(false)?;
    let path = format!("/v1/attachments/{ID}?force=true&wait=60");
    let forced = cloud.service.ask(Method::DELETE, &path, None)?;

    assert_eq!(kept.state, AttachmentState::Ready);
    assert!(
        kept.reason.as_ref().unwrap().contains("has not let go"),
        "{kept:?}"
    );
    assert_eq!(forced.status, 200, "{:?}", forced.body);
    assert!(cloud.service.workers().is_empty());
    // When the guest listens again it lets go, and can have the drive again.
    cloud.machine.qmp().execute("cont", &json!({}))?;
    cloud.is_gone()?;
    cloud.attach()?;
    cloud.io(2)?;
    cloud.detach(false)?;
    cloud.end()
}

#[test]
fn worker_that_dies_while_its_guest_is_asked_to_let_go_is_replaced() -> TestResult {
    let cloud = Cloud::nvme("letting")?;
    cloud.attach()?;
    cloud.io(1)?;
    // It will not let go before it is told to go on.
    cloud.machine.qmp().execute("stop", &json!({}))?;
    let path = format!("/v1/attachments/{ID}");
    let asked = cloud.service.ask(Method::DELETE, &path, None)?;
    assert_eq!(asked.status, 202, "{:?}", asked.body);
    let worker = cloud.service.workers()[0];

    kill_process(Pid::from_raw(worker.try_into()?).unwrap(), Signal::KILL)?;

    let deadline = Deadline::secs(20);
    while !cloud.service.workers().iter().any(|now| *now != worker) {
        assert!(!deadline.has_passed(), "there is no other worker");
        std::thread::yield_now();
    }
    cloud.machine.qmp().execute("cont", &json!({}))?;
    assert_eq!(cloud.detach(false)?.state, AttachmentState::Detached);
    cloud.is_gone()?;
    assert!(cloud.service.workers().is_empty());
    cloud.attach()?;
    cloud.io(2)?;
    cloud.detach(false)?;
    cloud.end()
}

#[test]
fn daemon_killed_while_it_plugs_or_unplugs_leaves_nothing_half_plugged() -> TestResult {
    let mut cloud = Cloud::nvme("halfway")?;
    let before = objects(&cloud.machine)?;
    for round in 0..12u64 {
        let path = format!("/v1/attachments/{ID}");
        let body = cloud.spec.to_string();
        cloud.service.ask(Method::PUT, &path, Some(&body))?;
        wait(Duration::from_millis(round * 12));
        cloud.service.kill()?;
        cloud.service.restart()?;
        // Who repeats the call gets the same attachment, whole.
        cloud.attach()?;
        assert_eq!(cloud.service.workers().len(), 1);
        cloud.service.ask(Method::DELETE, &path, None)?;
        wait(Duration::from_millis(round * 12));
        cloud.service.kill()?;
        cloud.service.restart()?;
        let again = format!("{path}?wait=60");
        cloud.service.ask(Method::DELETE, &again, None)?;
        cloud.is_gone()?;
        assert_eq!(objects(&cloud.machine)?, before, "round {round}");
    }
    cloud.end()
}

/// How often worker or daemon is killed.
const KILLS: u32 = 50;

/// At random moments, a random one of the two; never both at once. What is random follows from a seed that
/// is printed, and taken from the environment variable `FARBUS_SEED` if that is set.
#[test]
fn killed_workers_and_daemons_are_a_pause_to_a_guest_that_writes_and_verifies() -> TestResult {
    kill_under_verified_io(Cloud::nvme("chaos")?)
}

#[test]
fn killed_workers_and_daemons_are_a_pause_to_a_virtio_drive_too() -> TestResult {
    let endpoint = json!({"kind": "vhost-user-blk", "num_queues": 2});
    kill_under_verified_io(Cloud::start("chaosblk", &endpoint, VIRTIO)?)
}

fn kill_under_verified_io(mut cloud: Cloud) -> TestResult {
    let mut random = Random::new()?;
    let drive = cloud.node;
    cloud.attach()?;
    let job = cloud.guest.spawn(&format!(
        "n=0; while n=$((n + 1)); do \
             yes chaos-$n | head -c 262144 >/tmp/c && \
             dd bs=16k if=/tmp/c of={drive} oflag=direct 2>/dev/null && \
             dd bs=16k count=16 if={drive} iflag=direct 2>/dev/null | cmp - /tmp/c || exit 1; \
             echo $n >/tmp/done; [ ! -e /tmp/stop ] || exit 0; \
         done"
    ))?;
    let begun = Instant::now();
    let mut killed = [0; 2];
    for _ in 0..KILLS {
        let done = cloud.guest.check("cat /tmp/done 2>/dev/null || echo 0")?;
        let done: u32 = done.trim().parse().unwrap_or(0);
        // In the middle of I/O, after some of it was right since the last time.
        let more = format!("[ $(cat /tmp/done 2>/dev/null || echo 0) -gt {done} ]");
        cloud.guest.wait_until(&more, Deadline::secs(60))?;
        wait(Duration::from_micros(random.below(100_000)));
        let which = random.below(2) as usize;
        killed[which] += 1;
        if which == 0 {
            let [worker] = cloud.service.workers()[..] else {
                return Err("there is not one worker".into());
            };
            kill_process(Pid::from_raw(worker.try_into()?).unwrap(), Signal::KILL)?;
        } else {
            cloud.service.kill()?;
            cloud.service.restart()?;
        }
        cloud.machine.check_running()?;
        cloud
            .service
            .wait_state(ID, AttachmentState::Ready, Deadline::secs(60))?;
    }
    let took = begun.elapsed();
    cloud.guest.check("touch /tmp/stop")?;
    let verified = job.wait(Deadline::secs(60))?;
    assert_eq!(verified.status, 0, "{}", verified.text());
    let passes = cloud.guest.check("cat /tmp/done")?;
    let [workers, daemons] = killed;
    println!(
        "{workers} workers and {daemons} daemons killed in {took:.1?}; {} passes of 256 KiB verified",
        passes.trim()
    );
    assert!(workers > 0 && daemons > 0, "only one of the two was killed");
    assert_eq!(cloud.detach(false)?.state, AttachmentState::Detached);
    cloud.is_gone()?;
    cloud.end()
}

/// Numbers that follow from a seed (SplitMix64).
struct Random(u64);

impl Random {
    fn new() -> Result<Self, Failure> {
        let seed = match std::env::var("FARBUS_SEED") {
            Ok(seed) => seed.parse()?,
            Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        };
        println!("FARBUS_SEED={seed}");
        Ok(Self(seed))
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// Lets a moment pass, to be at another point of what happens meanwhile.
fn wait(moment: Duration) {
    let moment = Deadline::after(moment);
    while !moment.has_passed() {
        std::thread::yield_now();
    }
}
