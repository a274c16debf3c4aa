//! `attach`: a device is given to a VM.

mod wishes;

use std::time::{Duration, Instant};

use clap::Args;
use farbus_compute_agent::api::{Attachment, AttachmentSpec, AttachmentState};
use farbus_rest::client::Client;

use crate::failure::Failure;
use crate::progress::Progress;
use crate::show::{json, name, or_dash, text};
use wishes::Wishes;

pub(crate) const EXAMPLES: &str = "\
Examples:
  farbus attach vm7-data --device rack1/disk0 --qmp /run/vm7/qmp.sock
  farbus attach vm7-data --class nvme --min-capacity 1TiB --endpoint vhost-user-blk \\
      --cloud-hypervisor /run/vm7/api.sock --limit iops=50k,bytes-per-second=1GiB
  farbus attach vm7-data --device rack1/disk0      # just the socket; `farbus list vm7-data` has its path";

/// What the interface waits for in one request, in seconds.
const LONGEST_WAIT: u64 = 60;

#[derive(Args)]
pub(crate) struct AttachArgs {
    /// A name for the attachment: up to 63 of a-z, 0-9, `.`, `_` and `-`.
    #[arg(value_parser = parse_id)]
    id: String,
    #[command(flatten)]
    wishes: Wishes,
    /// Do not wait until it can be used.
    #[arg(long)]
    no_wait: bool,
    /// How long to wait, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

/// A name of an attachment, as the interface takes it; so it needs no escapes in a path.
pub(crate) fn parse_id(text: &str) -> Result<String, String> {
    let (first, rest) = text.split_at(text.chars().next().map_or(0, char::len_utf8));
    let begins = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let goes_on = |c: char| begins(c) || "._-".contains(c);
    if first.chars().any(begins) && rest.chars().all(goes_on) && text.len() <= 63 {
        return Ok(text.to_owned());
    }
    Err("a name begins with a-z or 0-9, goes on with these, `.`, `_` or `-`, and has at most 63 characters".into())
}

/// What is left until then, in whole seconds, as far as one request may wait.
pub(crate) fn longest_wait(deadline: Instant) -> u64 {
    let left = deadline.saturating_duration_since(Instant::now());
    (left.as_millis().div_ceil(1000) as u64).min(LONGEST_WAIT)
}

pub(crate) async fn run(args: &AttachArgs, client: &Client, as_json: bool) -> Result<(), Failure> {
    let id = &args.id;
    let spec = args.wishes.spec()?;
    let begun = Instant::now();
    let deadline = begun + Duration::from_secs(if args.no_wait { 0 } else { args.timeout });
    let progress = Progress::new(format!("attaching {id}"));
    let attachment = loop {
        let now = put(client, id, &spec, longest_wait(deadline)).await?;
        if now.state != AttachmentState::Attaching || Instant::now() >= deadline {
            break now;
        }
        // The agent has waited for as long as one request may.
    };
    drop(progress);
    let judged = judge(args, &attachment, begun.elapsed());
    if as_json {
        json(&attachment)?;
        return judged;
    }
    judged?;
    text(&in_short(&attachment))
}

fn in_short(attachment: &Attachment) -> String {
    let Attachment { id, state, .. } = attachment;
    let device = or_dash(attachment.device.as_ref());
    let socket = or_dash(attachment.socket.as_ref());
    format!("{id} is {}: {device} at {socket}\n", name(state))
}

/// The same wish again is no new one, so this may be repeated.
async fn put(
    client: &Client,
    id: &str,
    spec: &AttachmentSpec,
    wait: u64,
) -> Result<Attachment, Failure> {
    let path = format!("/v1/attachments/{id}?wait={wait}");
    let (_, attachment) = client.put(&path, spec).await?;
    Ok(attachment)
}

fn judge(args: &AttachArgs, attachment: &Attachment, took: Duration) -> Result<(), Failure> {
    let id = &args.id;
    let reason = attachment.reason.as_ref();
    let why = reason.map_or_else(String::new, |reason| format!(": {reason}"));
    match attachment.state {
        AttachmentState::Ready | AttachmentState::Degraded => Ok(()),
        AttachmentState::Attaching if args.no_wait => Ok(()),
        AttachmentState::Attaching => Err(Failure::not_come_about(format!(
            "{id} is still being attached after {} s{why}; it goes on, and `farbus detach {id}` ends it",
            took.as_secs()
        ))),
        AttachmentState::Failed => Err(Failure::not_come_about(format!(
            "{id} has failed{why}; `farbus detach {id}` makes way for another attempt"
        ))),
        AttachmentState::Detaching | AttachmentState::Detached => Err(Failure::not_come_about(
            format!("{id} is being detached{why}; attach it again when it is gone"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_need_escapes_are_refused() {
        for name in [
            "",
            "-a",
            ".a",
            "A",
            "a/b",
            "a?b",
            "a b",
            "ä",
            &"a".repeat(64),
        ] {
            assert!(parse_id(name).is_err(), "{name}");
        }
    }

    #[test]
    fn names_of_the_interface_are_taken() {
        for name in ["a", "7", "vm7-data.0_x", &"a".repeat(63)] {
            assert_eq!(parse_id(name).as_deref(), Ok(name));
        }
    }
}
