//! Whoever listens at a VMM's socket.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use farbus_compute_agent::api::Vm;
use farbus_compute_agent::hotplug::{DeviceKind, PlugDevice};
use serde_json::{Value, json};
use vmm_sys_util::tempdir::TempDir;

/// As QEMU greets.
pub(crate) const GREETING: &str =
    "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 11}}, \"capabilities\": []}}\n";

/// A listening socket, and a thread that does something with each connection.
pub(crate) struct Peer {
    pub(crate) path: PathBuf,
    _directory: TempDir,
}

impl Peer {
    pub(crate) fn start(mut serve: impl FnMut(UnixStream) + Send + 'static) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.as_path().join("vmm.sock");
        let listener = UnixListener::bind(&path).unwrap();
        // It ends with the process: a connection that never comes cannot be waited for.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                serve(stream.unwrap());
            }
        });
        Self {
            path,
            _directory: directory,
        }
    }

    /// One that greets as QEMU does, and answers each command with the lines that `answer` gives:
    /// events, and what goes beside the command's id, `return` or `error`.
    pub(crate) fn qemu(
        mut answer: impl FnMut(&str, &Value) -> Vec<Value> + Send + 'static,
    ) -> Self {
        Self::start(move |stream| {
            let mut writer = stream.try_clone().unwrap();
            if writer.write_all(GREETING.as_bytes()).is_err() {
                return;
            }
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                let request: Value = serde_json::from_str(&line).unwrap();
                let command = request["execute"].as_str().unwrap();
                let said = match command {
                    "qmp_capabilities" => vec![done()],
                    _ => answer(command, &request["arguments"]),
                };
                for mut line in said {
                    if line.get("event").is_none() {
                        line["id"] = request["id"].clone();
                    }
                    if writer.write_all(format!("{line}\n").as_bytes()).is_err() {
                        return;
                    }
                }
            }
        })
    }

    pub(crate) fn as_qemu(&self) -> Vm {
        Vm::Qemu {
            qmp: self.path.clone(),
            bus: Some("rp1".into()),
        }
    }

    pub(crate) fn as_cloud_hypervisor(&self) -> Vm {
        Vm::CloudHypervisor {
            api: self.path.clone(),
        }
    }
}

pub(crate) fn done() -> Value {
    json!({"return": {}})
}

pub(crate) fn returns(value: &Value) -> Value {
    json!({ "return": value })
}

pub(crate) fn error(class: &str, reason: &str) -> Value {
    json!({"error": {"class": class, "desc": reason}})
}

pub(crate) fn event(name: &str, device: &str) -> Value {
    json!({"event": name, "data": {"device": device, "path": format!("/machine/peripheral/{device}")}})
}

pub(crate) fn nvme(deadline: Duration) -> PlugDevice {
    PlugDevice {
        id: "d0".into(),
        socket: "/run/d0.sock".into(),
        kind: DeviceKind::VfioUser,
        deadline,
    }
}
