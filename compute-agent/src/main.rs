//! `farbus-compute-agent`: parses the command line and starts.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use farbus_compute_agent::cli::Cli;

fn main() -> ExitCode {
    let cli = match Cli::from_arguments() {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    farbus_rest::logging::init_for(cli.log_level, cli.log_format, cli.attachment());
    cli.run()
}
