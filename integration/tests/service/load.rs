//! Verified I/O on an attachment, as long as a test wants it: clients that write a pattern all over the
//! drive, rewrite it and read it back, one after the other.

use farbus_compute_agent::api::Attachment;
use farbus_integration::daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::error::Result;
use farbus_integration::process::{Process, mortal_command};
use farbus_integration::service::Service;

/// See the module's own description.
pub(crate) struct Load {
    socket: String,
    client: Process,
    runs: u64,
}

impl Load {
    pub(crate) fn start(attachment: &Attachment) -> Result<Self> {
        let socket = attachment.socket.clone().unwrap();
        let client = verify(&socket, 0)?;
        Ok(Self {
            socket,
            client,
            runs: 1,
        })
    }

    /// Waits until that many more I/Os are done. A client that is through must have found all as it wrote
    /// it; then there is another.
    pub(crate) fn goes_on(&mut self, service: &Service, id: &str, ios: u64) -> Result<()> {
        let start = completed(service, id)?;
        let deadline = Deadline::secs(60);
        while completed(service, id)? < start + ios {
            if let Some(status) = self.client.try_status()? {
                assert!(status.success(), "run {} of verify: {status}", self.runs);
                self.client = verify(&self.socket, self.runs)?;
                self.runs += 1;
            }
            if deadline.has_passed() {
                return Err(deadline.missed_with("I/O", &format!("{:?}", service.attachment(id)?)));
            }
        }
        Ok(())
    }

    /// Lets the last client come to its end.
    pub(crate) fn end(mut self) -> Result<()> {
        let status = self.client.wait(Deadline::secs(60))?;
        assert!(status.success(), "run {} of verify: {status}", self.runs);
        Ok(())
    }
}

fn verify(socket: &str, seed: u64) -> Result<Process> {
    let mut command = mortal_command(&daemon::program("farbus-vfu-nvme")?);
    command.args(["verify", "--vfio-user", socket, "--bs", "4k"]);
    command.args(["--iodepth", "16", "--seed", &seed.to_string()]);
    Process::start("verify", command)
}

/// I/Os so far, whoever was the worker.
fn completed(service: &Service, id: &str) -> Result<u64> {
    let statistics = service.attachment(id)?.and_then(|it| it.statistics);
    Ok(statistics.map_or(0, |it| it.reads + it.writes))
}
