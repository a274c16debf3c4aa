//! `events`: what happens to attachments, as it happens.

use std::time::Duration;

use clap::Args;
use farbus_compute_agent::api::Event;
use farbus_rest::client::{Client, ClientError};

use crate::failure::{Failure, remark};
use crate::show::{json_line, name, printable, text};

/// Between two attempts to reach an agent that has gone, perhaps on another host: nothing tells that it
/// listens again.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Args)]
pub(crate) struct EventsArgs {
    /// Begin with what came after this event's number, as far as the agent still knows it.
    #[arg(long, value_name = "NUMBER")]
    after: Option<u64>,
}

pub(crate) async fn run(args: &EventsArgs, client: &Client, as_json: bool) -> Result<(), Failure> {
    let mut last = args.after;
    let mut reached = false;
    loop {
        match client.events("/v1/events", last).await {
            Ok(mut events) => {
                if reached {
                    remark("the agent is back");
                }
                reached = true;
                while let Some(event) = events.next().await {
                    let event: Event = serde_json::from_str(&event.data)?;
                    last = Some(event.sequence);
                    print(&event, as_json)?;
                }
                remark("the agent has gone; waiting for it to come back");
            }
            // A restart of the agent is no end; that there is none to begin with, is.
            Err(ClientError::Connect { .. } | ClientError::Broken { .. }) if reached => {}
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn print(event: &Event, as_json: bool) -> Result<(), Failure> {
    if as_json {
        return json_line(event);
    }
    let reason = event.reason.as_deref().map(printable);
    let reason = reason.map_or_else(String::new, |reason| format!("  {reason}"));
    let (time, id, state) = (&event.time, &event.attachment, name(&event.state));
    text(&format!("{time}  {id}  {state}{reason}\n"))
}
