//! The command line: what it accepts, what it starts, and the exit codes.

mod doctor;
mod export;
mod list;
mod reload;
mod serve;
mod specs;
mod table;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use farbus_rest::logging::LogFormat;
use farbus_vfio::sysfs::Host;
use log::{LevelFilter, error};

use doctor::DoctorArgs;
use export::ExportArgs;
use list::ListArgs;
use reload::ReloadArgs;
use serve::ServeArgs;

const EXIT_CODES: &str = "\
Exit codes:
  0  ended in order: after SIGTERM or SIGINT, or with nothing left to do
  1  failed while running
  2  the command line or the configuration is wrong
  3  a device cannot be opened
  4  the address cannot be listened on
  5  doctor found what keeps a function from being exported";

/// Lends the PCIe functions of this host to virtual machines on other hosts.
#[derive(Parser)]
#[command(name = "farbus-device-server", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to log to standard error: off, error, warn, info, debug or trace.
    #[arg(long, global = true, default_value = "info", value_name = "LEVEL")]
    pub log_level: LevelFilter,
    /// How log lines look: text, or json for an object a line.
    #[arg(long, global = true, default_value_t, value_name = "FORMAT")]
    pub log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Exports functions, in the foreground, until SIGTERM.
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", export::EXAMPLES))]
    Export(Box<ExportArgs>),
    /// Exports what a configuration file says, in the foreground, until SIGTERM.
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", serve::EXAMPLES))]
    Serve(Box<ServeArgs>),
    /// Has the running service read its configuration again, and waits until that is done.
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", reload::NOTES))]
    Reload(ReloadArgs),
    /// Lists the PCI functions of this host, and what keeps them from being exported.
    #[command(after_help = list::NOTES)]
    List(ListArgs),
    /// Looks for what keeps this host from exporting PCI functions, and says what helps.
    #[command(after_help = format!("{}\n\n{EXIT_CODES}", doctor::NOTES))]
    Doctor(DoctorArgs),
    /// Writes the manual pages of its package.
    #[command(hide = true)]
    Man {
        /// Where to; the directory exists.
        directory: PathBuf,
    },
}

/// A failure with the exit code that tells of it.
#[derive(Debug)]
pub struct Failure(u8, anyhow::Error);

impl Failure {
    /// One of the exit codes that the help lists.
    pub fn exit_code(&self) -> u8 {
        self.0
    }

    /// What to tell people.
    pub fn message(&self) -> String {
        format!("{:#}", self.1)
    }
}

/// For `map_err`: the failure with this exit code.
fn failure<E: Into<anyhow::Error>>(code: u8) -> impl FnOnce(E) -> Failure {
    move |error| Failure(code, error.into())
}

impl Cli {
    /// Runs the command to its end.
    pub fn run(&self) -> ExitCode {
        match self.run_on(&Host::new(), &mut io::stdout().lock()) {
            Ok(code) => ExitCode::from(code),
            Err(failure) => {
                error!("{}", failure.message());
                ExitCode::from(failure.exit_code())
            }
        }
    }

    /// Runs the command to its end on a host, with `out` for its results, and returns the exit
    /// code.
    pub fn run_on(&self, host: &Host, out: &mut dyn Write) -> Result<u8, Failure> {
        match &self.command {
            Command::Export(args) => export::run(args, host, out),
            Command::Serve(args) => serve::run(args, host, out),
            Command::Reload(args) => reload::run(args, out),
            Command::List(args) => list::run(args, host, out),
            Command::Doctor(args) => doctor::run(args, host, out),
            Command::Man { directory } => {
                clap_mangen::generate_to(Self::command(), directory).map_err(failure(1))?;
                Ok(0)
            }
        }
    }
}
