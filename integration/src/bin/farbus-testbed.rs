//! Prepares the test bed, and shows what Farbus does with it.

use std::process::ExitCode;
use std::time::Instant;

use farbus_integration::demo;
use farbus_integration::error::Result;
use farbus_integration::report::Failure;
use farbus_integration::tools::Tools;
use farbus_integration::tools::initramfs::Userland;
use farbus_integration::tools::kernel::Kernel;

const USAGE: &str = "\
usage: farbus-testbed prepare           fetch and build what virtual machines need, into the cache
       farbus-testbed demo              show a guest that uses a remote drive
       farbus-testbed demo --emulated   show the same with a drive that QEMU emulates

exit status: 0 done, 1 failed, 2 usage";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["prepare"] => prepare(),
        ["demo"] => demo::run(false),
        ["demo", "--emulated"] => demo::run(true),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("farbus-testbed: {:?}", Failure::from(error));
            ExitCode::FAILURE
        }
    }
}

/// Fills the cache; silent when there is nothing to do.
fn prepare() -> Result<()> {
    let begun = Instant::now();
    let tools = Tools::open()?;
    let mut fetched = tools.prepare(&Kernel::TESTED, &[Userland::Small, Userland::Large])?;
    fetched |= tools.prepare(&Kernel::RDMA, &[Userland::Rdma])?;
    if fetched {
        println!(
            "test bed ready after {:.0} s: {}",
            begun.elapsed().as_secs_f32(),
            tools.qemu()?.version()
        );
    }
    Ok(())
}
