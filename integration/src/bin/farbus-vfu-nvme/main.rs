//! `farbus-vfu-nvme`: an NVMe driver and load generator in one process, for any controller that
//! can be had as a [`farbus_vfio::Function`].
//!
//! - `cli`: the command line. `target`: what is driven. `lane`: one queue pair with its buffers.
//! - `identify`, `verify`, `bench` (with `workload`, `waiting` and `figures`), `serve`:
//!   the commands.

#![forbid(unsafe_code)]

mod bench;
mod cli;
mod figures;
mod identify;
mod lane;
mod pattern;
mod serve;
mod target;
mod verify;
mod waiting;
mod workload;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    env_logger::Builder::new()
        .filter_level(cli.log_level)
        .format_target(false)
        .init();
    cli.run()
}
