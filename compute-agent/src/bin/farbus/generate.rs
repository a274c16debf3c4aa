//! What a package brings along besides the programs: completions and manual pages, made from the
//! command lines themselves.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::failure::Failure;

#[derive(Args)]
pub(crate) struct CompletionsArgs {
    /// For this shell.
    shell: Shell,
}

#[derive(Args)]
pub(crate) struct ManArgs {
    /// Where to; the directory exists.
    directory: PathBuf,
}

pub(crate) fn completions(args: &CompletionsArgs) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "farbus", &mut script);
    Ok(io::stdout().lock().write_all(&script)?)
}

pub(crate) fn man(args: &ManArgs) -> Result<(), Failure> {
    clap_mangen::generate_to(Cli::command(), &args.directory)?;
    let agent = farbus_compute_agent::cli::Cli::command();
    Ok(clap_mangen::generate_to(agent, &args.directory)?)
}
