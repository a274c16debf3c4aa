//! `detach`: a device is taken away from its VM.

use std::time::{Duration, Instant};

use clap::Args;
use farbus_compute_agent::api::{Attachment, AttachmentState};
use farbus_rest::client::{Client, ClientError};

use crate::attach::{longest_wait, parse_id};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::show::{json, text};

#[derive(Args)]
pub(crate) struct DetachArgs {
    /// The attachment's name.
    #[arg(value_parser = parse_id)]
    id: String,
    /// Do not wait for the guest's consent: its driver finds the device gone.
    #[arg(long)]
    force: bool,
    /// Do not wait until it is gone.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

pub(crate) async fn run(args: &DetachArgs, client: &Client, as_json: bool) -> Result<(), Failure> {
    let DetachArgs { id, force, .. } = args;
    let begun = Instant::now();
    let deadline = begun + Duration::from_secs(if args.no_wait { 0 } else { args.timeout });
    let progress = Progress::new(format!("detaching {id}"));
    let mut last: Option<Attachment> = None;
    let state = loop {
        let wait = longest_wait(deadline);
        let path = format!("/v1/attachments/{id}?wait={wait}&force={force}");
        match client.delete::<Attachment>(&path).await {
            Ok((_, attachment)) => {
                let state = attachment.state;
                last = Some(attachment);
                if state != AttachmentState::Detaching || Instant::now() >= deadline {
                    break state;
                }
            }
            // It went between two questions.
            Err(ClientError::Problem(problem)) if problem.status == 404 && last.is_some() => {
                break AttachmentState::Detached;
            }
            Err(error) => return Err(error.into()),
        }
        // The agent has waited for as long as one request may.
    };
    drop(progress);
    if as_json {
        json(&last)?;
    }
    let reason = last.and_then(|attachment| attachment.reason);
    let why = reason.map_or_else(String::new, |reason| format!(": {reason}"));
    match state {
        AttachmentState::Detached if as_json => Ok(()),
        AttachmentState::Detached => text(&format!("{id} is detached\n")),
        AttachmentState::Detaching if args.no_wait && as_json => Ok(()),
        AttachmentState::Detaching if args.no_wait => text(&format!("{id} is being detached\n")),
        AttachmentState::Detaching => Err(Failure::not_come_about(format!(
            "{id} is still being detached after {} s{why}; it goes on; --force does not wait for the guest",
            begun.elapsed().as_secs()
        ))),
        _ => Err(Failure::not_come_about(format!(
            "{id} could not be detached{why}"
        ))),
    }
}
