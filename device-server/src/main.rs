//! `farbus-device-server`: parses the command line and starts.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use farbus_device_server::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    env_logger::Builder::new()
        .filter_level(cli.log_level)
        .format_target(false)
        .init();
    cli.run()
}
