//! A device server with a configuration file, and its admin interface.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use farbus_fabric::session::client;
use farbus_fabric::wire::{ExportName, Listed};
use farbus_integration::attached;
use farbus_integration::daemon::Daemon;
use farbus_integration::deadline::Deadline;
use farbus_integration::scratch::Scratch;
use farbus_vfio::driver::{DriverConfig, NvmeDriver};
use farbus_vfio::user::{Client, UserFunction};
use serde_json::Value;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
const BLOCK: u32 = 512;

/// A software drive of 8 MiB on memory, as an export.
pub(crate) fn memory(name: &str) -> String {
    format!(
        "[[export]]\nname = \"{name}\"\n\
         soft-nvme = {{ backing = \"memory\", size = \"8MiB\", serial = \"S-{name}\" }}\n"
    )
}

pub(crate) struct Service {
    pub(crate) scratch: Scratch,
    pub(crate) server: Daemon,
}

impl Service {
    /// Starts `serve` with these exports, and more lines of `[server]`.
    pub(crate) fn start(name: &str, server: &str, exports: &str) -> Self {
        let scratch = Scratch::new(name).unwrap();
        write_config(&scratch, server, exports);
        let config = scratch.join("config.toml").display().to_string();
        let arguments = ["serve", "--config", &config, "--listen", "127.0.0.1:0"];
        let server = Daemon::start("farbus-device-server", &arguments).unwrap();
        Self { scratch, server }
    }

    pub(crate) fn configure(&self, exports: &str) {
        write_config(&self.scratch, "", exports);
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.scratch.join("admin.sock")
    }

    pub(crate) fn address(&self) -> String {
        attached::address(&self.server)
    }

    /// What peers are told.
    pub(crate) fn list(&self) -> Vec<Listed> {
        client::list(&self.address(), "test", PATIENCE).unwrap()
    }

    pub(crate) fn claim(&self, export: &str, label: &str) -> ClaimOutcome {
        let export = ExportName::new(export).unwrap();
        client::claim(&self.address(), &export, label, PATIENCE)
    }

    /// Asks the admin interface; the status and the JSON of the answer.
    pub(crate) fn ask(&self, method: &str, path: &str) -> (u16, Value) {
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let (status, _, body) = self.raw(request.as_bytes());
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    /// Sends bytes to the admin interface; the status, head and body of the answer.
    pub(crate) fn raw(&self, request: &[u8]) -> (u16, String, String) {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // A server that has seen enough closes before all was sent.
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8(answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_owned(), body.to_owned())
    }

    pub(crate) fn export(&self, name: &str) -> Value {
        self.ask("GET", &format!("/v1/exports/{name}")).1
    }

    /// Waits until the export is as it should be.
    pub(crate) fn await_export(&self, name: &str, reached: impl Fn(&Value) -> bool) -> Value {
        let deadline = Deadline::secs(30);
        loop {
            let now = self.export(name);
            if reached(&now) {
                return now;
            }
            assert!(!deadline.has_passed(), "{name} stays {now}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn write_config(scratch: &Scratch, server: &str, exports: &str) {
    let text = format!(
        "[server]\nadmin-socket = \"{}\"\nstate-dir = \"{}\"\n{server}\n{exports}",
        scratch.join("admin.sock").display(),
        scratch.join("state").display()
    );
    std::fs::write(scratch.join("config.toml"), text).unwrap();
}

pub(crate) type ClaimOutcome = Result<client::ClaimedLink, farbus_fabric::FabricError>;

/// An agent that has claimed an export, and a driver behind it that writes and reads back without
/// pause.
pub(crate) struct Tenant {
    agent: Daemon,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    work: JoinHandle<()>,
}

impl Tenant {
    pub(crate) fn start(service: &Service, export: &str) -> Self {
        let socket = service.scratch.join(format!("{export}.sock"));
        let agent = attached::attach_export(&service.address(), export, &socket).unwrap();
        let (stop, rounds) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, counted) = (stop.clone(), rounds.clone());
        let work = std::thread::spawn(move || {
            let client = Client::connect(&socket, PATIENCE).unwrap();
            let function = UserFunction::new(client, "test".into()).unwrap();
            let config = DriverConfig {
                memory: 8 << 20,
                timeout: PATIENCE,
                ..DriverConfig::default()
            };
            let mut driver = NvmeDriver::new(Arc::new(function), config).unwrap();
            driver.enable().unwrap();
            driver.request_queues(1).unwrap();
            driver.create_queue_pair(1, 64, Some(1)).unwrap();
            let mut round = 0;
            while !stopped.load(Ordering::Relaxed) {
                round += 1;
                let wrote = [round as u8; 4096];
                let mut read = [0; 4096];
                let lba = round % 1024 * 8;
                driver.write(1, lba, BLOCK, &wrote).unwrap();
                driver.read(1, lba, BLOCK, &mut read).unwrap();
                assert!(read == wrote, "round {round} read something else");
                counted.store(round, Ordering::Relaxed);
            }
        });
        let tenant = Self {
            agent,
            stop,
            rounds,
            work,
        };
        tenant.go_on();
        tenant
    }

    /// Waits until more I/O has been done.
    pub(crate) fn go_on(&self) {
        let deadline = Deadline::secs(30);
        let wanted = self.rounds.load(Ordering::Relaxed) + 20;
        while self.rounds.load(Ordering::Relaxed) < wanted {
            assert!(!self.work.is_finished(), "the I/O has failed");
            assert!(!deadline.has_passed(), "there is no I/O any more");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Ends the I/O, which must have been right, and gives the export back.
    pub(crate) fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.work.join().unwrap();
        self.agent.terminate().unwrap();
    }
}
