//! What the tests of the service share: an agent, a device server, and a driver that uses what it got.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use farbus_compute_agent::api::Attachment;
use farbus_integration::attached;
use farbus_integration::daemon::Daemon;
use farbus_integration::error::Result;
use farbus_integration::scratch::Scratch;
use farbus_integration::service::Service;
use farbus_vfio::driver::{DriverConfig, NvmeDriver};
use farbus_vfio::user::{Client, UserFunction};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const BLOCK: u32 = 512;

/// An agent, and a device server named `rack1` with drives `d0`, `d1` and so on.
pub(crate) struct Bed {
    pub(crate) service: Service,
    pub(crate) server: Option<Daemon>,
    pub(crate) address: String,
    /// How many the next device server has.
    pub(crate) drives: usize,
    pub(crate) scratch: Scratch,
}

impl Bed {
    pub(crate) fn new(name: &str, drives: usize) -> Result<Self> {
        let scratch = Scratch::new(name)?;
        let server = device_server("127.0.0.1:0", drives)?;
        let address = attached::address(&server);
        let service = Service::start(&scratch, &[format!("rack1={address}")], &[])?;
        Ok(Self {
            service,
            server: Some(server),
            address,
            drives,
            scratch,
        })
    }

    pub(crate) fn kill_server(&mut self) -> Result<()> {
        self.server.take().map_or(Ok(()), Daemon::kill)
    }

    pub(crate) fn restart_server(&mut self) -> Result<()> {
        self.server = Some(device_server(&self.address, self.drives)?);
        Ok(())
    }
}

/// A device server with so many small drives in memory.
fn device_server(listen: &str, drives: usize) -> Result<Daemon> {
    let specs: Vec<String> = (0..drives)
        .map(|drive| format!("backing=memory,size=1MiB,name=d{drive}"))
        .collect();
    let mut arguments = vec!["export", "--listen", listen];
    for spec in &specs {
        arguments.extend(["--soft-nvme", spec]);
    }
    Daemon::start("farbus-device-server", &arguments)
}

/// Asks for a device on a vfio-user socket, without a VM.
pub(crate) fn vfio_user(device: &str) -> Value {
    json!({"device": device, "endpoint": {"kind": "vfio-user"}})
}

/// A driver behind an attachment's socket, with a pair of I/O queues.
pub(crate) fn drive(attachment: &Attachment) -> NvmeDriver<UserFunction> {
    let socket = attachment.socket.as_ref().unwrap();
    let client = Client::connect(Path::new(socket), PATIENCE).unwrap();
    let function = UserFunction::new(client, "test".into()).unwrap();
    let config = DriverConfig {
        memory: 4 << 20,
        timeout: PATIENCE,
        ..DriverConfig::default()
    };
    let mut driver = NvmeDriver::new(Arc::new(function), config).unwrap();
    driver.enable().unwrap();
    driver.request_queues(1).unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    driver
}

/// Writes and reads back through an attachment.
pub(crate) fn prove(attachment: &Attachment, pattern: u8) {
    let mut driver = drive(attachment);
    driver.write(1, 0, BLOCK, &[pattern; 4096]).unwrap();
    let mut back = [0; 4096];
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    assert_eq!(back, [pattern; 4096]);
}
