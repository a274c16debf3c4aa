//! A stand-in for cloud-hypervisor's REST interface.
//!
//! It takes the calls that plug and unplug devices, holds each to what cloud-hypervisor's published
//! OpenAPI document (`vmm/src/api/openapi`, API 0.3.0) says of its body, and keeps the book that
//! `vm.info` shows. Our own transcription of that is `CALLS`: fields and their types, no more. What
//! the document does not say, and the VMM does (version 53): a device that is removed leaves the
//! configuration at once, and the device tree only when the guest lets go.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value, json};

use crate::error::{IoContext, Result};
use crate::scratch::Scratch;

/// The longest body that a client may send, in bytes.
const MAX_BODY: usize = 50 << 10;

/// What a field holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Integer,
    Bool,
    Object,
    List,
}

impl Kind {
    fn fits(self, value: &Value) -> bool {
        match self {
            Self::Text => value.is_string(),
            Self::Integer => value.is_u64(),
            Self::Bool => value.is_boolean(),
            Self::Object => value.is_object(),
            Self::List => value.is_array(),
        }
    }
}

/// What a call takes.
struct Call {
    path: &'static str,
    /// The list of the configuration that it adds to, if it adds.
    list: Option<&'static str>,
    required: &'static [&'static str],
    fields: &'static [(&'static str, Kind)],
}

/// The calls that are known here.
const CALLS: [Call; 3] = [
    Call {
        path: "/api/v1/vm.add-user-device",
        list: Some("user_devices"),
        required: &["socket"],
        fields: &[
            ("socket", Kind::Text),
            ("id", Kind::Text),
            ("pci_segment", Kind::Integer),
            ("pci_device_id", Kind::Integer),
        ],
    },
    Call {
        path: "/api/v1/vm.add-disk",
        list: Some("disks"),
        required: &[],
        fields: &[
            ("path", Kind::Text),
            ("readonly", Kind::Bool),
            ("direct", Kind::Bool),
            ("iommu", Kind::Bool),
            ("num_queues", Kind::Integer),
            ("queue_size", Kind::Integer),
            ("vhost_user", Kind::Bool),
            ("vhost_socket", Kind::Text),
            ("rate_limiter_config", Kind::Object),
            ("pci_segment", Kind::Integer),
            ("pci_device_id", Kind::Integer),
            ("id", Kind::Text),
            ("serial", Kind::Text),
            ("rate_limit_group", Kind::Text),
            ("queue_affinity", Kind::List),
            ("backing_files", Kind::Bool),
            ("sparse", Kind::Bool),
            ("image_type", Kind::Text),
            ("lock_granularity", Kind::Text),
        ],
    },
    Call {
        path: "/api/v1/vm.remove-device",
        list: None,
        required: &[],
        fields: &[("id", Kind::Text)],
    },
];

const INFO: &str = "/api/v1/vm.info";

/// When the guest lets go of a device that is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// When `vm.info` has been asked so often since.
    LetsGoAfter(u32),
    /// Never.
    Keeps,
}

/// What the VMM knows.
#[derive(Debug)]
struct Vm {
    exists: bool,
    shared_memory: bool,
    guest: Guest,
    user_devices: Vec<Value>,
    disks: Vec<Value>,
    tree: Map<String, Value>,
    /// What was removed, and how often `vm.info` has been asked since.
    leaving: Vec<(String, u32)>,
    /// What a client has done that the document forbids.
    complaints: Vec<String>,
    /// The calls that were answered.
    calls: Vec<String>,
}

/// The stand-in, at a socket.
#[derive(Debug)]
pub struct StandIn {
    path: PathBuf,
    vm: Arc<Mutex<Vm>>,
    _scratch: Scratch,
}

impl StandIn {
    /// Starts one with a running VM that has shared memory, and a guest that lets go of devices.
    ///
    /// # Errors
    /// When its socket cannot be made.
    pub fn start() -> Result<Self> {
        let scratch = Scratch::new("chv")?;
        let path = scratch.join("api.sock");
        let listener = UnixListener::bind(&path).context(|| "listening as a VMM".into())?;
        let vm = Arc::new(Mutex::new(Vm {
            exists: true,
            shared_memory: true,
            guest: Guest::LetsGoAfter(2),
            user_devices: Vec::new(),
            disks: Vec::new(),
            tree: Map::new(),
            leaving: Vec::new(),
            complaints: Vec::new(),
            calls: Vec::new(),
        }));
        // One request at a time, as the VMM does. It ends with the process.
        std::thread::spawn({
            let vm = Arc::clone(&vm);
            move || {
                for stream in listener.incoming().map_while(std::io::Result::ok) {
                    // A client that goes in the middle is none of our worry.
                    let _ = serve(stream, &vm);
                }
            }
        });
        Ok(Self {
            path,
            vm,
            _scratch: scratch,
        })
    }

    /// Its API socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn vm(&self) -> MutexGuard<'_, Vm> {
        lock(&self.vm)
    }

    /// Changes the guest's mind.
    pub fn set_guest(&self, guest: Guest) {
        self.vm().guest = guest;
    }

    /// Gives the guest memory that nobody shares.
    pub fn make_memory_private(&self) {
        self.vm().shared_memory = false;
    }

    /// There is a VMM and no VM.
    pub fn delete_vm(&self) {
        self.vm().exists = false;
    }

    /// The devices that the VM has, by id.
    #[must_use]
    pub fn devices(&self) -> Vec<String> {
        self.vm().tree.keys().cloned().collect()
    }

    /// What was done that the document forbids.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        self.vm().complaints.clone()
    }

    /// The calls other than `vm.info` that were made, without what is before their name.
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        self.vm().calls.clone()
    }
}

fn lock(vm: &Mutex<Vm>) -> MutexGuard<'_, Vm> {
    vm.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A request's method, path and body.
struct Request {
    method: String,
    path: String,
    body: Vec<u8>,
}

/// Serves the requests of one connection.
fn serve(stream: UnixStream, vm: &Mutex<Vm>) -> std::io::Result<()> {
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_request(&mut reader)? {
        let (status, body) = lock(vm).answer(&request);
        let body = body.map_or(String::new(), |body| body.to_string());
        let length = match status {
            204 => String::new(),
            _ => format!("Content-Length: {}\r\n", body.len()),
        };
        write!(
            writer,
            "HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\n{length}\r\n{body}"
        )?;
    }
    Ok(())
}

fn read_request(reader: &mut impl BufRead) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, path) = (words.next(), words.next());
    let mut length = 0;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or(0);
        }
    }
    let mut body = vec![0; usize::min(length, MAX_BODY)];
    reader.read_exact(&mut body)?;
    Ok(Some(Request {
        method: method.unwrap_or_default(),
        path: path.unwrap_or_default(),
        body,
    }))
}

type Answer = (u16, Option<Value>);

impl Vm {
    fn answer(&mut self, request: &Request) -> Answer {
        if !self.exists {
            return (404, Some(json!(["VM is not created"])));
        }
        if request.path == INFO {
            return match request.method.as_str() {
                "GET" => (200, Some(self.info())),
                _ => self.complain(400, "vm.info is a GET"),
            };
        }
        let Some(call) = CALLS.iter().find(|call| call.path == request.path) else {
            let complaint = format!("there is no {} {}", request.method, request.path);
            return self.complain(404, &complaint);
        };
        let name = call.path.rsplit('/').next().unwrap_or_default();
        self.calls.push(name.to_owned());
        match check(call, request) {
            Ok(body) => match call.list {
                Some(list) => self.add(list, body),
                None => self.remove(&body),
            },
            Err(complaint) => self.complain(400, &complaint),
        }
    }

    fn complain(&mut self, status: u16, complaint: &str) -> Answer {
        self.complaints.push(complaint.to_owned());
        (status, Some(json!([complaint])))
    }

    fn add(&mut self, list: &str, body: Map<String, Value>) -> Answer {
        let count = self.tree.len();
        let id = match body.get("id").and_then(Value::as_str) {
            Some(id) => id.to_owned(),
            None => format!("_{list}{count}"),
        };
        if self.tree.contains_key(&id) {
            return (409, Some(json!([format!("Identifier {id} is not unique")])));
        }
        if !self.shared_memory {
            return (500, Some(json!(["shared memory is required"])));
        }
        let bdf = format!("0000:00:{:02x}.0", count + 4);
        self.tree.insert(
            id.clone(),
            json!({"id": id, "resources": [], "children": [], "pci_bdf": bdf}),
        );
        match list {
            "disks" => self.disks.push(Value::Object(body)),
            _ => self.user_devices.push(Value::Object(body)),
        }
        (200, Some(json!({"id": id, "bdf": bdf})))
    }

    fn remove(&mut self, body: &Map<String, Value>) -> Answer {
        let id = body.get("id").and_then(Value::as_str).unwrap_or_default();
        let is_other = |device: &Value| device.get("id").and_then(Value::as_str) != Some(id);
        let before = self.disks.len() + self.user_devices.len();
        self.disks.retain(is_other);
        self.user_devices.retain(is_other);
        if self.disks.len() + self.user_devices.len() == before {
            return (404, Some(json!([format!("no device {id}")])));
        }
        self.leaving.push((id.to_owned(), 0));
        (204, None)
    }

    fn info(&mut self) -> Value {
        if let Guest::LetsGoAfter(patience) = self.guest {
            let tree = &mut self.tree;
            self.leaving.retain_mut(|(id, asked)| {
                *asked += 1;
                if *asked > patience {
                    tree.remove(id);
                }
                *asked <= patience
            });
        }
        json!({
            "config": {
                "payload": {"kernel": "/vmlinux"},
                "memory": {"size": 1 << 30, "shared": self.shared_memory, "hugepages": false, "zones": null},
                "disks": self.disks,
                "user_devices": self.user_devices,
                "net": null,
            },
            "state": "Running",
            "memory_actual_size": 1 << 30,
            "device_tree": self.tree,
        })
    }
}

/// Holds a request to what the document says of it; its body.
fn check(call: &Call, request: &Request) -> std::result::Result<Map<String, Value>, String> {
    let path = call.path;
    if request.method != "PUT" {
        return Err(format!("{path} is a PUT, not a {}", request.method));
    }
    let body = match serde_json::from_slice(&request.body) {
        Ok(Value::Object(body)) => body,
        Ok(other) => return Err(format!("the body of {path} is {other}, not an object")),
        Err(error) => return Err(format!("the body of {path} is not JSON: {error}")),
    };
    for field in call.required {
        if !body.contains_key(*field) {
            return Err(format!("{path} needs {field}"));
        }
    }
    for (field, value) in &body {
        match call.fields.iter().find(|(name, _)| name == field) {
            None => return Err(format!("{path} knows no {field}")),
            Some((_, kind)) if !kind.fits(value) => {
                return Err(format!(
                    "{field} of {path} is {value}, not of kind {kind:?}"
                ));
            }
            Some(_) => {}
        }
    }
    Ok(body)
}
