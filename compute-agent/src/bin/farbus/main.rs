//! `farbus`: what a person types to give remote devices to virtual machines. It asks the compute
//! agent of this host, or of another, by the REST interface; it holds no state of its own.

#![forbid(unsafe_code)]

mod agent;
mod attach;
mod cli;
mod detach;
mod devices;
mod doctor;
mod events;
mod failure;
mod generate;
mod list;
mod progress;
mod show;
mod top;
mod units;

use std::process::ExitCode;

use clap::Parser;

use cli::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(cli.json),
    }
}
