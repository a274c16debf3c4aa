//! RDMA over soft RoCE, in machines: the provider by itself, then drives that are used over it.

use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::rdma::{
    self, DRIVE, LOOPBACK, PROGRAMS, SOCKET, attach, check, one_machine, serve, two_machines,
};
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::scratch::Scratch;
use farbus_integration::tools::Tools;
use farbus_integration::tools::kernel::Kernel;
use farbus_integration::vfio;
use serde_json::Value;

fn assert_has(text: &str, what: &str) {
    assert!(text.contains(what), "{what:?} is not in:\n{text}");
}

fn provider_by_itself(kernel: Kernel) -> TestResult {
    let (machine, guest) = one_machine(kernel)?;
    for what in ["frames", "keys", "killed"] {
        check(&guest, &format!("farbus-verbs-check {what} {LOOPBACK}"))?;
    }
    // Soft RoCE cannot be removed while somebody uses it: `rdma link del` waits.
    let cut = "ip link set lo down";
    check(
        &guest,
        &format!("farbus-verbs-check cut {LOOPBACK} '{cut}'"),
    )?;
    machine.quit()?;
    Ok(())
}

#[test]
fn payloads_land_dead_keys_are_refused_and_dead_peers_noticed_on_6_1() -> TestResult {
    provider_by_itself(Kernel::Rdma6_1)
}

#[test]
fn payloads_land_dead_keys_are_refused_and_dead_peers_noticed_on_6_12() -> TestResult {
    provider_by_itself(Kernel::Rdma6_12)
}

/// What one I/O of a kind takes, by the provider's own counters.
fn bench(guest: &Guest, options: &str) -> Result<Value, Failure> {
    let said = check(
        guest,
        &format!(
            "farbus-vfu-nvme bench --from {LOOPBACK}:7420 --export disk0 --provider verbs --json {options}"
        ),
    )?;
    let report: Value = serde_json::from_str(&said)?;
    Ok(report["total"].clone())
}

/// A number, but for the few messages that go with time and not with I/O, and for the commands
/// that were under way when counting began and ended.
fn assert_about(report: &Value, field: &str, expected: f64) {
    let found = report[field].as_f64().unwrap_or(f64::NAN);
    let slack = expected * 0.05 + 0.05;
    assert!(
        (expected - slack..=expected + slack).contains(&found),
        "{field} is {found}, not {expected}: {report}"
    );
}

#[test]
fn each_io_takes_one_message_each_way_and_one_doorbell() -> TestResult {
    let (machine, guest) = one_machine(Kernel::Rdma6_12)?;
    let _server = serve(&guest, LOOPBACK, DRIVE)?;
    // Memory's first use registers it and tells the key: the first commands are not counted.
    let read = bench(&guest, "--rw read --bs 4k --seconds 1 --warmup 1")?;
    for (field, expected) in [
        ("messages_sent_per_io", 1.0),
        ("messages_received_per_io", 1.0),
        ("payload_bytes_received_per_io", 4096.0),
        ("payload_bytes_sent_per_io", 0.0),
        ("send_calls_per_io", 1.0),
        ("rdma_doorbells_per_io", 1.0),
    ] {
        assert_about(&read, field, expected);
    }
    let write = bench(&guest, "--rw write --bs 128k --seconds 1 --warmup 1")?;
    for (field, expected) in [
        ("messages_sent_per_io", 1.0),
        ("messages_received_per_io", 1.0),
        ("payload_bytes_sent_per_io", 131_072.0),
        ("payload_bytes_received_per_io", 0.0),
        // The data, as it lies in one piece in memory, and the message.
        ("send_calls_per_io", 2.0),
        ("rdma_doorbells_per_io", 1.0),
    ] {
        assert_about(&write, field, expected);
    }
    machine.quit()?;
    Ok(())
}

#[test]
fn drive_of_the_same_machine_is_verified_over_rdma() -> TestResult {
    let (machine, guest) = one_machine(Kernel::Rdma6_12)?;
    let server = serve(&guest, LOOPBACK, DRIVE)?;
    let agent = attach(&guest, LOOPBACK, "--provider auto")?;
    let verify = format!("farbus-vfu-nvme verify --vfio-user {SOCKET}");
    for shape in [
        "--size 4MiB --bs 4k --iodepth 16",
        "--size 16MiB --bs 1m --iodepth 32",
        "--size 1MiB --bs 512 --iodepth 64",
    ] {
        check(&guest, &format!("{verify} {shape}"))?;
    }
    guest.check("killall -TERM farbus-compute-agent")?;
    agent.check(Deadline::secs(30))?;
    let said = guest.check("cat /tmp/agent.log /tmp/server.log")?;
    assert_eq!(
        said.matches("over RDMA (rxe0 port 1, address 127.0.0.1)")
            .count(),
        2,
        "{said}"
    );
    assert_has(&said, "disk0: released by");
    assert!(!said.contains("WARN"), "{said}");
    guest.check("killall -TERM farbus-device-server")?;
    server.check(Deadline::secs(30))?;
    machine.quit()?;
    Ok(())
}

#[test]
fn drive_behind_vfio_is_verified_over_rdma() -> TestResult {
    let scratch = Scratch::new("disk")?;
    let disk = scratch.disk("disk.img", 64 << 20)?;
    let builder = rdma::machine("rdma-vfio", Kernel::Rdma6_12)
        .modules("vfio-pci,vfio_iommu_type1,rdma_rxe,crc32_generic")
        .iommu();
    let builder = PROGRAMS.iter().fold(builder, |b, name| b.program(name));
    let machine = builder.emulated_nvme("nv0", &disk).start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    rdma::on_loopback(&guest)?;
    let address = vfio::find(&guest, "::0108")?;
    let options = format!("--bind --pci {address},name=disk0");
    let _server = serve(&guest, LOOPBACK, &options)?;
    let _agent = attach(&guest, LOOPBACK, "--provider verbs")?;
    check(
        &guest,
        &format!("farbus-vfu-nvme verify --vfio-user {SOCKET} --size 4MiB --bs 16k"),
    )?;
    assert_has(&guest.check("cat /tmp/server.log")?, "over RDMA");
    machine.quit()?;
    Ok(())
}

#[test]
fn provider_is_chosen_with_a_reason_or_refused_with_one() -> TestResult {
    let (machine, guest) = one_machine(Kernel::Rdma6_1)?;
    let attach_and_end = |options: &str| -> Result<String, Failure> {
        let agent = attach(&guest, LOOPBACK, options)?;
        guest.check("killall -TERM farbus-compute-agent")?;
        agent.check(Deadline::secs(30))?;
        Ok(guest.check("cat /tmp/agent.log")?)
    };
    let server = serve(&guest, LOOPBACK, &format!("{DRIVE} --provider tcp"))?;
    let said = attach_and_end("")?;
    assert_has(&said, "over TCP (the device server: it is told to use TCP)");
    let refused = guest.run(&format!(
        "farbus-compute-agent attach --from {LOOPBACK}:7420 --export disk0 --vfio-user {SOCKET} --provider verbs"
    ))?;
    assert_eq!(refused.status, 3, "{}", refused.text());
    assert_has(
        &refused.text(),
        "RDMA cannot be used: the device server: it is told to use TCP",
    );
    guest.check("killall -TERM farbus-device-server")?;
    server.check(Deadline::secs(30))?;

    let server = serve(&guest, LOOPBACK, &format!("{DRIVE} --provider verbs"))?;
    let refused = guest.run(&format!(
        "farbus-compute-agent attach --from {LOOPBACK}:7420 --export disk0 --vfio-user {SOCKET} --provider tcp"
    ))?;
    assert_eq!(refused.status, 3, "{}", refused.text());
    assert_has(&refused.text(), "told to use RDMA only");
    let said = attach_and_end("--rdma-device rxe0 --gid-index 1")?;
    assert_has(&said, "over RDMA (rxe0 port 1");
    let said = attach_and_end("--rdma-device rxe0 --gid-index 1 --provider verbs")?;
    assert_has(&said, "over RDMA");
    let refused = guest.run(&format!(
        "farbus-compute-agent attach --from {LOOPBACK}:7420 --export disk0 --vfio-user {SOCKET} --provider verbs --rdma-device mlx5_0"
    ))?;
    assert_has(
        &refused.text(),
        "there is no RDMA device mlx5_0; there is rxe0",
    );
    guest.check("killall -TERM farbus-device-server")?;
    server.check(Deadline::secs(30))?;

    let said = check(&guest, "farbus-compute-agent doctor")?;
    assert_has(&said, "rxe0 port 1 (Ethernet) is up, and is reached by ");
    let said = guest.run("farbus-device-server doctor")?.text();
    assert_has(&said, "rxe0 port 1 (Ethernet) is ACTIVE");
    // Root may lock what it likes, others what they are given.
    let unprivileged = "ulimit -l 64; setpriv --reuid 1000 --regid 1000 --clear-groups";
    let said = check(
        &guest,
        &format!("{unprivileged} farbus-compute-agent doctor"),
    )?;
    assert_has(&said, "only 64 KiB of memory may be locked");
    assert_has(&said, "LimitMEMLOCK");
    guest.check("rdma link del rxe0")?;
    let said = check(&guest, "farbus-compute-agent doctor")?;
    assert_has(&said, "there is no RDMA device");
    let said = guest.run("farbus-device-server doctor")?.text();
    assert_has(&said, "there is no RDMA device; TCP is used");
    let _server = serve(&guest, LOOPBACK, DRIVE)?;
    let said = attach_and_end("")?;
    assert_has(&said, "over TCP (this host has no RDMA device)");
    machine.quit()?;
    Ok(())
}

/// What takes the network away without either side's device knowing: packets go to nobody.
const LOSE: &str = "ip neigh replace 10.7.0.1 lladdr 02:00:00:00:00:99 dev eth0 nud permanent";
const FIND: &str = "ip neigh del 10.7.0.1 dev eth0";
const DOWN: &str = "ip link set eth0 down";
const UP: &str = "ip link set eth0 up";

#[test]
fn cut_networks_are_a_pause_between_two_machines() -> TestResult {
    let scratch = Scratch::new("net")?;
    let [(lends, lender), (uses, user)] = two_machines(scratch.path(), Kernel::Rdma6_12)?;
    let address = rdma::address(0);
    let _server = serve(&lender, &address, DRIVE)?;
    let _agent = attach(&user, &address, "--provider verbs")?;
    let verify = format!("farbus-vfu-nvme verify --vfio-user {SOCKET} --size 8MiB --bs 8k");
    let job = user.spawn(&verify)?;
    for (cut, mend) in [(LOSE, FIND), (DOWN, UP)] {
        // In the middle of it: the agent has moved some data since.
        user.check("sleep 1")?;
        user.check(cut)?;
        wait_for_more(&user, "is lost", "/tmp/agent.log")?;
        user.check("sleep 1")?;
        let begun = std::time::Instant::now();
        user.check(mend)?;
        wait_for_more(&user, "is rebuilt", "/tmp/agent.log")?;
        println!(
            "after '{cut}' and '{mend}': rebuilt {:?} later",
            begun.elapsed()
        );
    }
    let said = job.check(Deadline::secs(240))?;
    println!("{said}");
    let log = user.check("cat /tmp/agent.log")?;
    println!("{log}");
    assert!(!log.contains("over TCP"), "{log}");
    uses.quit()?;
    lends.quit()?;
    Ok(())
}

/// Waits until a log has one more line of a kind than when this was last asked.
fn wait_for_more(guest: &Guest, what: &str, log: &str) -> TestResult {
    let seen = format!("/tmp/seen-{}", what.replace(' ', "-"));
    guest.check(&format!(
        "touch {seen}; until [ $(grep -c '{what}' {log}) -gt $(wc -l <{seen}) ]; do sleep 0.05; done; echo >>{seen}"
    ))?;
    Ok(())
}

/// The network card under the RDMA device is unplugged, and plugged in again; then the RDMA device alone is
/// taken away, while the network stays.
#[test]
fn removed_devices_are_a_pause_until_they_are_back() -> TestResult {
    let scratch = Scratch::new("net")?;
    let [(lends, lender), (uses, user)] = two_machines(scratch.path(), Kernel::Rdma6_12)?;
    let address = rdma::address(0);
    let _server = serve(&lender, &address, DRIVE)?;
    let _agent = attach(&user, &address, "--provider auto")?;
    let verify = format!("farbus-vfu-nvme verify --vfio-user {SOCKET} --size 4MiB --bs 8k");
    let job = user.spawn(&verify)?;
    let gone = "until ! [ -e /sys/class/infiniband/rxe0 ]; do sleep 0.05; done";

    user.check("sleep 1; echo 1 >/sys/class/net/eth0/device/../remove")?;
    wait_for_more(&user, "is lost", "/tmp/agent.log")?;
    user.check(gone)?;
    user.check(
        "echo 1 >/sys/bus/pci/rescan; until [ -e /sys/class/net/eth0 ]; do sleep 0.05; done",
    )?;
    rdma::on_network(&user, 1)?;
    wait_for_more(&user, "is rebuilt", "/tmp/agent.log")?;

    // Soft RoCE is removed when nobody uses it: its users let go of it as their port goes down.
    user.check(&format!("sleep 1; {DOWN}"))?;
    wait_for_more(&user, "is lost", "/tmp/agent.log")?;
    user.check(&format!("rdma link del rxe0; {gone}; {UP}"))?;
    wait_for_more(&user, "this host has no RDMA device", "/tmp/agent.log")?;
    user.check("rdma link add rxe0 type rxe netdev eth0")?;
    wait_for_more(&user, "is rebuilt", "/tmp/agent.log")?;

    println!("{}", job.check(Deadline::secs(240))?);
    let log = check(&user, "cat /tmp/agent.log")?;
    assert!(!log.contains("over TCP"), "{log}");
    uses.quit()?;
    lends.quit()?;
    Ok(())
}

#[test]
fn attachment_whose_device_is_gone_goes_on_over_tcp_where_that_is_allowed() -> TestResult {
    let (machine, guest) = one_machine(Kernel::Rdma6_12)?;
    let _server = serve(&guest, LOOPBACK, DRIVE)?;
    let _agent = attach(&guest, LOOPBACK, "--allow-tcp-fallback")?;
    let verify = format!("farbus-vfu-nvme verify --vfio-user {SOCKET} --size 1MiB --bs 8k");
    let job = guest.spawn(&verify)?;
    guest.check("sleep 0.5; ip link set lo down")?;
    wait_for_more(&guest, "is lost", "/tmp/agent.log")?;
    guest.check("rdma link del rxe0; ip link set lo up")?;
    wait_for_more(&guest, "is rebuilt", "/tmp/agent.log")?;
    job.check(Deadline::secs(120))?;
    let log = check(&guest, "cat /tmp/agent.log")?;
    assert_has(&log, "over TCP (this host has no RDMA device)");
    machine.quit()?;
    Ok(())
}

/// A device server that is frozen, replaced under its name, and wakes up with commands in its ring.
#[test]
fn device_server_that_was_fenced_off_cannot_write_guest_memory() -> TestResult {
    let (machine, guest) = one_machine(Kernel::Rdma6_12)?;
    let [old, new] = ["10.9.0.1", "10.9.0.2"];
    // A new RDMA device has all addresses that the loopback has by then.
    guest.check(&format!(
        "ip addr add {old}/32 dev lo && ip addr add {new}/32 dev lo && rdma link del rxe0 && \
         echo 'hosts: files' >/etc/nsswitch.conf && echo {old} lender >/etc/hosts"
    ))?;
    rdma::on_loopback(&guest)?;
    let _old = serve(&guest, old, DRIVE)?;
    let pid = guest.check("pidof farbus-device-server")?;
    guest.check("mv /tmp/server.log /tmp/old-server.log")?;
    let _new = serve(&guest, new, DRIVE)?;
    let _agent = attach(&guest, "lender", "--provider verbs")?;
    let replace = format!("echo {new} lender >/etc/hosts");
    check(
        &guest,
        &format!(
            "farbus-verbs-check stale-reads {SOCKET} {} '{replace}'",
            pid.trim()
        ),
    )?;
    let log = check(&guest, "cat /tmp/agent.log")?;
    assert_has(&log, "is rebuilt");
    assert!(!log.contains("over TCP"), "{log}");
    // It has found out by itself, and is ready for a next claim.
    check(
        &guest,
        "until grep -q -e 'released by' -e 'is lost' /tmp/old-server.log; do sleep 0.1; done; cat /tmp/old-server.log",
    )?;
    machine.quit()?;
    Ok(())
}

/// An agent that is frozen until its claim is another's, and wakes up with writes to do.
#[test]
fn agent_that_was_fenced_off_cannot_write_the_next_claims_shadow() -> TestResult {
    let (machine, guest) = one_machine(Kernel::Rdma6_12)?;
    let _server = serve(&guest, LOOPBACK, DRIVE)?;
    let _agent = attach(&guest, LOOPBACK, "--provider verbs")?;
    let pid = guest.check("pidof farbus-compute-agent")?;
    // The export is busy until the device server misses the frozen one.
    let other = "/run/other.sock";
    let replace = format!(
        "(until farbus-compute-agent attach --from {LOOPBACK}:7420 --export disk0 --vfio-user {other} \
         --provider verbs >/tmp/other.log 2>&1; do sleep 0.5; done) & \
         until grep -q ^ready /tmp/other.log; do sleep 0.1; done"
    );
    check(
        &guest,
        &format!(
            "farbus-verbs-check stale-writes {SOCKET} {} '{replace}' {other}",
            pid.trim()
        ),
    )?;
    check(&guest, "cat /tmp/agent.log /tmp/server.log")?;
    machine.quit()?;
    Ok(())
}
