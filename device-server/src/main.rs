//! `farbus-device-server`: parses the command line and starts.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use farbus_device_server::cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    farbus_rest::logging::init(cli.log_level, cli.log_format);
    cli.run()
}
