//! Which agent is asked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use farbus_rest::client::Client;
use farbus_rest::client::tls::Tls;

use crate::failure::{Failure, with_causes};

/// How long an answer may take that nobody asked to wait for. The agent asks its device servers
/// meanwhile, each for a few seconds at most.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Args)]
pub(crate) struct AgentArgs {
    /// The agent to ask: its socket, or https://HOST:PORT with --cert, --key and --ca.
    #[arg(
        long,
        global = true,
        env = "FARBUS_AGENT",
        default_value = "/run/farbus/agent.sock",
        value_name = "PATH|URL"
    )]
    agent: String,
    /// The certificate to show to an agent by https, in PEM.
    #[arg(long, global = true, env = "FARBUS_CERT", value_name = "FILE")]
    cert: Option<PathBuf>,
    /// Its private key, in PEM.
    #[arg(long, global = true, env = "FARBUS_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
    /// The certificates of those who sign agents' certificates, in PEM.
    #[arg(long, global = true, env = "FARBUS_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
}

impl AgentArgs {
    /// Its interface.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        if let Some(socket) = self.socket() {
            return Ok(Client::new(socket, PATIENCE));
        }
        let (Some(cert), Some(key), Some(ca)) = (&self.cert, &self.key, &self.ca) else {
            return Err(Failure::usage(format!(
                "the agent at {} wants to know who asks; add --cert, --key and --ca",
                self.agent
            )));
        };
        let tls = Tls::new(&self.agent, cert, key, ca)
            .map_err(|error| Failure::usage(with_causes(&error)))?;
        Ok(Client::over_tls(tls, PATIENCE))
    }

    /// Its socket, if it is asked by one: then it is on this host.
    pub(crate) fn socket(&self) -> Option<&Path> {
        (!self.agent.contains("://")).then(|| Path::new(&self.agent))
    }

    /// As it was named.
    pub(crate) fn name(&self) -> &str {
        &self.agent
    }
}
