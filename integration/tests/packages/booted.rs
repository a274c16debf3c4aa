//! The packages on a machine whose first process is systemd: what the units promise, seen on the real ones.
//! Both run on one host here, with the examples of their own configuration files.

use farbus_compute_agent::api::{Attachment, AttachmentState};
use farbus_integration::builder::MachineBuilder;
use farbus_integration::deadline::Deadline;
use farbus_integration::error::Result;
use farbus_integration::guest::Guest;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::skip;
use farbus_integration::tools::debian::{DebianTree, FILES};
use farbus_integration::tools::{Tools, system};

use crate::{AGENT, SERVER, obstacle, packages};

const ID: &str = "vm7-data";

/// What the kernel and the daemons say when a unit keeps them from something.
const REFUSALS: &str = "type=1326|denied|not permitted|read-only file|os error (1|13|30)\\)";

/// The system call whose arguments no filter can see. Where namespaces are restricted, systemd has it answered with ENOSYS,
/// and clone(2) is used.
const CLONE3: u32 = 435;

/// Verified I/O through the attachment's socket, until the file that it looks for is there.
const LOAD: &str = "n=0; until [ -e /run/enough ]; do n=$((n + 1)); \
    farbus-vfu-nvme verify --vfio-user /run/farbus/attachments/vm7-data.sock --size 1MiB --seed $n || exit; done";

#[test]
fn units_keep_their_promises_under_systemd() -> TestResult {
    if let Some(obstacle) = obstacle() {
        skip!("{obstacle}");
    }
    let tools = Tools::open()?;
    let scratch = Scratch::new("systemd")?;
    let disk = scratch.join("system.img");
    let tree = DebianTree::make_for(&packages()?)?;
    system::disk(&tools, &tree, &["farbus-vfu-nvme"], &disk)?;
    drop(tree);
    let machine = MachineBuilder::new("systemd")
        .system(&disk)
        .memory_mib(768)
        // The kernel tells of system calls that a filter of systemd's refuses, whether or not anybody minds.
        .parameter("SYSTEMD_LOG_SECCOMP=1")
        .parameter("sysctl.kernel.printk_ratelimit=0")
        .start(&tools)?;
    let guest = machine.wait_guest(Deadline::secs(60))?;
    let host = Host { guest };

    host.check(&format!("{FILES} >/root/before"))?;
    installation_starts_both(&host)?;
    reload_takes_what_is_in_the_file(&host)?;
    attachment_carries_data_by_a_worker_of_its_own_user(&host)?;
    attachment_outlives_the_daemons(&host)?;
    agent_that_hangs_is_replaced(&host)?;
    reboot_brings_everything_back(&host)?;
    daemons_end_in_order(&host)?;
    hardening_refuses_nothing_that_is_asked_for(&host)?;
    purge_leaves_nothing(&host)?;
    machine.quit()?;
    Ok(())
}

/// The machine that runs systemd.
struct Host {
    guest: Guest,
}

impl Host {
    fn check(&self, command: &str) -> Result<String> {
        self.guest.check(command)
    }

    /// A property of a service, as `systemctl show` has it.
    fn property(&self, unit: &str, name: &str) -> Result<String> {
        self.check(&format!("systemctl show --value -p {name} {unit}"))
    }

    fn assert_properties(&self, unit: &str, expected: &[(&str, &str)]) -> TestResult {
        for (name, value) in expected {
            assert_eq!(self.property(unit, name)?, *value, "{name} of {unit}");
        }
        Ok(())
    }

    /// The process of a service.
    fn daemon(&self, unit: &str) -> Result<String> {
        self.property(unit, "MainPID")
    }

    fn attachment(&self) -> std::result::Result<Attachment, Failure> {
        let listed = self.check("farbus list --json")?;
        let listed: serde_json::Value = serde_json::from_str(&listed)?;
        Ok(serde_json::from_value(listed["attachments"][0].clone())?)
    }

    /// Waits until the attachment works, with a worker that is not this one.
    fn await_ready(&self, other_than: u32) -> std::result::Result<u32, Failure> {
        let deadline = Deadline::secs(60);
        loop {
            let now = self.attachment()?;
            let worker = now.worker.map(|worker| worker.pid);
            match (now.state, worker) {
                (AttachmentState::Ready, Some(pid)) if pid != other_than => return Ok(pid),
                _ if deadline.has_passed() => {
                    return Err(deadline
                        .missed_with("another worker", &format!("{now:?}"))
                        .into());
                }
                _ => {}
            }
        }
    }

    /// What the kernel and the daemons say of being kept from something.
    fn refusals(&self) -> Result<String> {
        self.check(&format!(
            "{{ dmesg; journalctl --no-pager -q -o short; }} | grep -Ei '{REFUSALS}' | \
             grep -v 'syscall={CLONE3} ' | sort -u || true"
        ))
    }

    /// Commands that the attachment has done.
    fn done(&self) -> std::result::Result<u64, Failure> {
        let counted = self.attachment()?.statistics;
        Ok(counted.map_or(0, |counted| counted.reads + counted.writes))
    }

    /// Waits until the attachment has done so many more commands.
    fn await_progress(&self) -> TestResult {
        let before = self.done()?;
        let deadline = Deadline::secs(60);
        while self.done()? < before + 100 {
            if deadline.has_passed() {
                return Err(deadline.missed("I/O that goes on").into());
            }
        }
        Ok(())
    }
}

fn installation_starts_both(host: &Host) -> TestResult {
    host.check(&format!("dpkg -i {}/*.deb 2>&1", system::PACKAGES))?;
    for unit in [AGENT, SERVER] {
        host.assert_properties(
            unit,
            &[
                ("ActiveState", "active"),
                ("SubState", "running"),
                ("Type", "notify"),
                ("WatchdogUSec", "30s"),
                ("NRestarts", "0"),
                ("UnitFileState", "enabled"),
            ],
        )?;
    }
    host.assert_properties(SERVER, &[("StatusText", "0 exports, 0 claimed")])
}

/// The examples that the packages bring, as an operator takes them into use.
fn reload_takes_what_is_in_the_file(host: &Host) -> TestResult {
    let file = "/etc/farbus/device-server.toml";
    let before = host.daemon(SERVER)?;
    host.check(&format!(
        "sed -i '/^#name = \"disk1\"/,$ s/^#//; /^name = \"disk1\"/ i [[export]]' {file}"
    ))?;
    host.check(&format!("systemctl reload {SERVER}"))?;
    host.guest.wait_until(
        &format!("systemctl show -p StatusText {SERVER} | grep -q '=1 exports, 0 claimed'"),
        Deadline::secs(20),
    )?;
    host.check(&format!("cp {file} /root/good; echo 'size = 1' >>{file}"))?;

    let refused = host.guest.run(&format!("systemctl reload {SERVER}"))?;
    assert!(!refused.success(), "a wrong file is not told of");
    host.assert_properties(SERVER, &[("ActiveState", "active"), ("MainPID", &before)])?;
    let said = host.check(&format!("systemctl status --no-pager -l {SERVER} || true"))?;
    assert!(said.contains("device-server.toml:"), "{said}");

    host.check(&format!("cp /root/good {file}; systemctl reload {SERVER}"))?;
    host.check(
        "sed -i '/^#\\[\\[device-server/,$ s/^#//; s/192.0.2.10/127.0.0.1/' /etc/farbus/agent.toml",
    )?;
    host.check(&format!("systemctl restart {AGENT}"))?;
    let devices = host.check("farbus devices")?;
    assert!(devices.contains("rack1/disk1"), "{devices}");
    Ok(())
}

fn attachment_carries_data_by_a_worker_of_its_own_user(host: &Host) -> TestResult {
    host.check(&format!("farbus attach {ID} --device rack1/disk1"))?;

    let worker = host.await_ready(0)?;
    let owner = host.check(&format!(
        "stat -c %U:%G /proc/{worker}/task/*; cat /proc/{worker}/status"
    ))?;
    for line in [
        "farbus-worker:farbus-worker",
        "CapEff:\t0000000000000000",
        "Seccomp:\t2",
        "NoNewPrivs:\t1",
    ] {
        assert!(owner.contains(line), "{line:?} is not in {owner}");
    }
    assert!(!owner.contains("root"), "{owner}");
    let socket = format!("/run/farbus/attachments/{ID}.sock");
    let said = host.check(&format!(
        "farbus-vfu-nvme verify --vfio-user {socket} --size 1MiB"
    ))?;
    assert!(said.contains("as they were written"), "{said}");
    Ok(())
}

fn attachment_outlives_the_daemons(host: &Host) -> TestResult {
    let load = host.guest.spawn(LOAD)?;
    host.await_progress()?;
    let worker = host.await_ready(0)?;
    let stored = |host: &Host| -> std::result::Result<u32, Failure> {
        Ok(host.property(AGENT, "NFileDescriptorStore")?.parse()?)
    };
    assert!(stored(host)? > 3, "systemd keeps {}", stored(host)?);

    // A restart, and an end without one: systemd starts the next daemon.
    host.check(&format!("systemctl restart {AGENT}"))?;
    assert_eq!(host.await_ready(0)?, worker);
    host.await_progress()?;
    let first = host.daemon(AGENT)?;
    host.check(&format!("systemctl kill --kill-who=main -s KILL {AGENT}"))?;
    await_another(host, AGENT, &first)?;
    assert_eq!(host.await_ready(0)?, worker);
    host.await_progress()?;

    // Both at once: what the next worker goes on with was in systemd's store alone.
    let second = host.daemon(AGENT)?;
    host.check(&format!("kill -KILL {second} {worker}"))?;
    await_another(host, AGENT, &second)?;
    host.await_ready(worker)?;
    host.await_progress()?;
    assert!(stored(host)? > 3, "systemd keeps {}", stored(host)?);

    // A device server that is restarted, and one that is killed, are pauses.
    host.check(&format!("systemctl restart {SERVER}"))?;
    host.await_progress()?;
    let third = host.daemon(SERVER)?;
    host.check(&format!("systemctl kill --kill-who=main -s KILL {SERVER}"))?;
    await_another(host, SERVER, &third)?;
    host.await_progress()?;

    host.check(": >/run/enough")?;
    load.check(Deadline::secs(60))?;
    assert_eq!(host.attachment()?.statistics.unwrap().errors, 0);
    Ok(())
}

/// Waits until systemd has started another process of the service, and that is ready.
fn await_another(host: &Host, unit: &str, before: &str) -> TestResult {
    host.guest.wait_until(
        &format!("[ $(systemctl show --value -p MainPID {unit}) != {before} ] && systemctl -q is-active {unit}"),
        Deadline::secs(60),
    )?;
    Ok(())
}

fn agent_that_hangs_is_replaced(host: &Host) -> TestResult {
    // Gone with the next boot.
    let dropin = format!("/run/systemd/system/{AGENT}.service.d");
    host.check(&format!(
        "mkdir {dropin}; printf '[Service]\\nWatchdogSec=2\\n' >{dropin}/quick.conf; \
         systemctl daemon-reload; systemctl restart {AGENT}"
    ))?;
    let (worker, hung) = (host.await_ready(0)?, host.daemon(AGENT)?);

    host.check(&format!("kill -STOP {hung}"))?;

    await_another(host, AGENT, &hung)?;
    assert_eq!(host.await_ready(0)?, worker);
    let why = host.check(&format!(
        "journalctl -q --no-pager -u {AGENT} | grep -c 'result .watchdog'"
    ))?;
    assert_eq!(why, "1");
    Ok(())
}

fn reboot_brings_everything_back(host: &Host) -> TestResult {
    host.guest
        .reboot_by("systemctl reboot", Deadline::secs(120))?;

    host.await_ready(0)?;
    for unit in [AGENT, SERVER] {
        host.assert_properties(unit, &[("ActiveState", "active"), ("NRestarts", "0")])?;
    }
    let socket = format!("/run/farbus/attachments/{ID}.sock");
    host.check(&format!(
        "farbus-vfu-nvme verify --vfio-user {socket} --size 1MiB"
    ))?;
    Ok(())
}

fn daemons_end_in_order(host: &Host) -> TestResult {
    let worker = host.await_ready(0)?;
    host.check(&format!("systemctl stop {AGENT}"))?;
    host.check(&format!("test -d /proc/{worker}; systemctl start {AGENT}"))?;
    assert_eq!(host.await_ready(0)?, worker);

    host.check(&format!("farbus detach {ID}; ! test -d /proc/{worker}"))?;
    host.assert_properties(AGENT, &[("NFileDescriptorStore", "0")])?;
    host.check(&format!("systemctl stop {AGENT} {SERVER}"))?;
    for unit in [AGENT, SERVER] {
        host.assert_properties(
            unit,
            &[
                ("ActiveState", "inactive"),
                ("Result", "success"),
                ("ExecMainStatus", "0"),
            ],
        )?;
        let said = host.check(&format!("journalctl -q --no-pager -o cat -n 4 -u {unit}"))?;
        assert!(said.contains("ended in order"), "{said}");
    }
    let left = host
        .check("find /run/farbus ! -type d; grep -ls '^farbus-[cd]' /proc/[0-9]*/comm || true")?;
    assert_eq!(left, "");
    Ok(())
}

fn hardening_refuses_nothing_that_is_asked_for(host: &Host) -> TestResult {
    assert_eq!(host.refusals()?, "");
    // They would be seen.
    let refused = host.guest.run(
        "printf '[Service]\\nType=oneshot\\nExecStart=/bin/umount /proc\\n\
         SystemCallFilter=~@mount\\nSystemCallErrorNumber=EPERM\\n' >/run/systemd/system/refused.service; \
         systemctl start refused",
    )?;
    assert!(!refused.success());
    assert!(
        host.refusals()?.contains("type=1326"),
        "refusals are not seen"
    );
    Ok(())
}

fn purge_leaves_nothing(host: &Host) -> TestResult {
    host.check(&format!(
        "systemctl start {SERVER} {AGENT}; farbus attach {ID} --device rack1/disk1"
    ))?;
    let worker = host.await_ready(0)?;
    host.check(&format!("dpkg -r {AGENT} {SERVER} 2>&1"))?;
    for unit in [AGENT, SERVER] {
        host.assert_properties(unit, &[("ActiveState", "inactive")])?;
    }
    // What is attached stays so until its virtual machine ends.
    host.check(&format!(
        "test -d /proc/{worker} && test -e /etc/farbus/agent.toml && kill {worker}"
    ))?;

    host.check(&format!("dpkg -P {AGENT} {SERVER} 2>&1; rm /srv/disk1.img"))?;

    host.guest
        .wait_until(&format!("! test -d /proc/{worker}"), Deadline::secs(20))?;
    let changed = host.check(&format!(
        "{FILES} >/root/after; diff /root/before /root/after || true"
    ))?;
    assert_eq!(changed, "");
    let known = host.check("systemctl list-units --all --no-pager --no-legend 'farbus-[cd]*'")?;
    assert_eq!(known, "");
    Ok(())
}
