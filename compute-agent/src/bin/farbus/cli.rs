//! The command line: what it accepts, and the exit codes.

use clap::{Parser, Subcommand};

use crate::agent::AgentArgs;
use crate::attach::AttachArgs;
use crate::detach::DetachArgs;
use crate::devices::DevicesArgs;
use crate::events::EventsArgs;
use crate::failure::Failure;
use crate::generate::{CompletionsArgs, ManArgs};
use crate::list::ListArgs;
use crate::top::TopArgs;
use crate::{attach, detach, devices, doctor, events, generate, list, top};

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed while running
  2  the command line is wrong
  3  the agent cannot be reached
  4  the agent has refused, and nothing has changed
  5  it did not come about: the attachment has failed, or the time is up and it goes on
  6  doctor found a problem

With --json, a refusal is a JSON object on standard output, too (problem details, RFC 9457).";

/// Gives PCIe devices of other hosts to virtual machines of this one.
#[derive(Parser)]
#[command(name = "farbus", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(flatten)]
    agent: AgentArgs,
    /// Print JSON, for programs.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Shows the devices that can be had, of all device servers that the agent knows.
    #[command(after_help = "\
Example:
  farbus devices --state free --class nvme")]
    Devices(DevicesArgs),
    /// Gives a device to a virtual machine, and waits until it can be used.
    ///
    /// Doing it again with the same name and wishes changes nothing and succeeds.
    #[command(after_help = attach::EXAMPLES)]
    Attach(Box<AttachArgs>),
    /// Takes a device away from its virtual machine, and waits until it is free.
    #[command(after_help = "\
Example:
  farbus detach vm7-data")]
    Detach(DetachArgs),
    /// Shows the attachments, or all about one.
    #[command(after_help = "\
Example:
  farbus list
  farbus list vm7-data --json")]
    List(ListArgs),
    /// Shows what the attachments do, again and again: I/Os, bandwidth, latencies, round trips.
    #[command(after_help = "\
Example:
  farbus top
  farbus top --once --json")]
    Top(TopArgs),
    /// Prints what happens to attachments, as it happens, until it is interrupted.
    #[command(after_help = "\
Example:
  farbus events
  farbus events --after 0 --json")]
    Events(EventsArgs),
    /// Looks for what keeps attachments from working, and says what helps.
    #[command(after_help = doctor::NOTES)]
    Doctor,
    /// Prints what makes a shell complete the commands of farbus.
    #[command(after_help = "\
Example:
  farbus completions bash >~/.local/share/bash-completion/completions/farbus")]
    Completions(CompletionsArgs),
    /// Writes the manual pages of the package that farbus is in.
    #[command(hide = true)]
    Man(ManArgs),
}

impl Cli {
    /// Runs the command to its end.
    pub(crate) fn run(&self) -> Result<(), Failure> {
        match &self.command {
            Command::Completions(args) => return generate::completions(args),
            Command::Man(args) => return generate::man(args),
            _ => {}
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(self.ask())
    }

    async fn ask(&self) -> Result<(), Failure> {
        let client = self.agent.client()?;
        match &self.command {
            Command::Devices(args) => devices::run(args, &client, self.json).await,
            Command::Attach(args) => attach::run(args, &client, self.json).await,
            Command::Detach(args) => detach::run(args, &client, self.json).await,
            Command::List(args) => list::run(args, &client, self.json).await,
            Command::Top(args) => top::run(args, &client, self.json).await,
            Command::Events(args) => events::run(args, &client, self.json).await,
            Command::Doctor => doctor::run(&self.agent, &client, self.json).await,
            Command::Completions(_) | Command::Man(_) => Ok(()),
        }
    }
}
