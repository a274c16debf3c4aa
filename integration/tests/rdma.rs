//! RDMA over soft RoCE, in machines.


use farbus_integration::deadline::Deadline;
use farbus_integration::guest::Guest;
use farbus_integration::machine::Machine;
use farbus_integration::rdma;
use farbus_integration::report::{Failure, TestResult};
use farbus_integration::tools::Tools;
use farbus_integration::tools::kernel::Kernel;

/// Programs that lend and use a drive.
const PROGRAMS: [&str; 3] = [
    "farbus-device-server",
    "farbus-compute-agent",
    "farbus-vfu-nvme",
];

fn one_machine(kernel: Kernel) -> Result<(Machine, Guest), Failure> {
    let builder = rdma::machine(&format!("rdma-{}", kernel.name()), kernel);
    let builder = PROGRAMS.iter().fold(builder, |b, name| b.program(name));
    let machine = builder.start(&Tools::open()?)?;
    let guest = machine.wait_guest(Deadline::secs(90))?;
    rdma::on_loopback(&guest)?;
    Ok((machine, guest))
}

#[test]
fn first_light() -> TestResult {
    let (machine, guest) = one_machine(Kernel::Rdma6_12)?;
    let _job = guest.spawn("farbus-device-server export --soft-nvme backing=memory,size=64MiB --name disk0 --listen 127.0.0.1:7420 >/tmp/server.log 2>&1")?;
    guest.check("until grep -q ready /tmp/server.log; do sleep 0.05; done")?;
    let said = guest.run("farbus-vfu-nvme --log-level debug identify --from 127.0.0.1:7420 --export disk0 --provider verbs; cat /tmp/server.log; dmesg | tail -5")?;
    println!("{}", said.text());
    let said = guest.run("farbus-vfu-nvme --log-level debug verify --from 127.0.0.1:7420 --export disk0 --provider verbs; tail -5 /tmp/server.log")?;
    println!("{}", said.text());
    for provider in ["verbs", "tcp"] {
        let said = guest.run(&format!("farbus-vfu-nvme bench --from 127.0.0.1:7420 --export disk0 --provider {provider} --poll --seconds 2; farbus-vfu-nvme bench --from 127.0.0.1:7420 --export disk0 --provider {provider} --rw randwrite --iodepth 16 --seconds 2"))?;
        println!("{}", said.text());
    }
    machine.quit()?;
    Ok(())
}
