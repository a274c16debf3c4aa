//! The part of the command line that is about vhost-user, after the conventions for backend programs
//! (QEMU's docs/interop/vhost-user.rst, "Backend program conventions").

#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Args;

use super::config::Options;

/// The option that makes a backend say what it can do, and nothing else.
pub const PRINT_CAPABILITIES: &str = "--print-capabilities";

/// Options of a vhost-user endpoint.
#[derive(Args, Debug)]
pub struct VhostUserArgs {
    /// The UNIX socket to offer the drive on as a virtio block device, for VMMs that speak
    /// vhost-user. Its directory is made if it does not exist.
    #[arg(
        long,
        visible_alias = "socket-path",
        value_name = "PATH",
        group = "endpoint"
    )]
    pub vhost_user_blk: Option<PathBuf>,
    /// A socket that this program is started with, in place of --vhost-user-blk: one that listens,
    /// or one that a VMM is connected to.
    #[arg(long, value_name = "NUMBER", group = "endpoint", value_parser = clap::value_parser!(i32).range(3..))]
    pub fd: Option<i32>,
    /// Queues that the VMM may use (vhost-user).
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: u16,
    /// Most entries of a queue, a power of two (vhost-user).
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = parse_queue_size)]
    queue_size: u16,
    /// Refuse writes (vhost-user).
    #[arg(long = "readonly", visible_alias = "read-only")]
    read_only: bool,
    /// What the guest reads as the drive's serial number, up to 20 characters of ASCII; the
    /// drive's own if not given (vhost-user).
    #[arg(long, value_name = "TEXT", value_parser = parse_serial)]
    serial: Option<String>,
}

impl VhostUserArgs {
    /// What was chosen.
    pub fn options(&self) -> Options {
        Options {
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            read_only: self.read_only,
            serial: self.serial.clone(),
        }
    }
}

fn parse_queue_size(text: &str) -> Result<u16, String> {
    let size = text.parse::<u16>().map_err(|error| error.to_string())?;
    if size.is_power_of_two() && (4..=1024).contains(&size) {
        return Ok(size);
    }
    Err("it must be a power of two from 4 to 1024".into())
}

fn parse_serial(text: &str) -> Result<String, String> {
    if text.len() <= 20 && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(text.to_owned());
    }
    Err("it must be up to 20 characters of ASCII, without spaces".into())
}

/// What this backend can do, for programs that manage VMs.
pub fn capabilities() -> serde_json::Value {
    serde_json::json!({"type": "block", "features": ["read-only"]})
}
