//! A function against a server that plays along, misbehaves, or goes away.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::tempdir::TempDir;
use vmm_sys_util::tempfile::TempFile;

use super::body::{DeviceInfo, IrqInfo, RegionInfo, Version};
use super::wire::{HEADER_LEN, WireError};
use super::*;
use crate::{
    DmaAccess, DmaWindow, Function, FunctionError, InterruptCounts, InterruptKind, Iova,
    RegionIndex,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// What a made-up server says that it is.
#[derive(Clone, Copy)]
struct Device {
    flags: u32,
    bar0: u64,
    config: u64,
    msix: u32,
}

const NVME: Device = Device {
    flags: 3,
    bar0: 0x4000,
    config: 4096,
    msix: 4,
};

/// A server at a path. It serves one connection after the other, until it has answered as
/// many commands as it is to.
struct Server {
    path: PathBuf,
    heard: Arc<Mutex<Vec<Command>>>,
    _directory: TempDir,
}

impl Server {
    fn start(device: Device, mut answers: usize) -> Self {
        let directory = TempDir::new_with_prefix(std::env::temp_dir().join("vfio-user-")).unwrap();
        let path = directory.as_path().join("socket");
        let server = Self {
            path: path.clone(),
            heard: Arc::default(),
            _directory: directory,
        };
        let listener = UnixListener::bind(&path).unwrap();
        let heard = server.heard.clone();
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                serve(stream, device, &mut answers, &heard);
                answers = usize::MAX;
            }
        });
        server
    }

    fn connect(&self, timeout: Duration) -> Result<UserFunction, ClientError> {
        UserFunction::connect(&self.path, timeout)
    }

    fn heard(&self, command: Command) -> usize {
        let heard = self.heard.lock().unwrap();
        heard.iter().filter(|other| **other == command).count()
    }
}

fn serve(mut stream: UnixStream, device: Device, answers: &mut usize, heard: &Mutex<Vec<Command>>) {
    while *answers > 0 {
        let mut head = [0; HEADER_LEN];
        if stream.read_exact(&mut head).is_err() {
            return;
        }
        let header = Header::decode(&head);
        let mut body = vec![0; header.body_len().unwrap()];
        stream.read_exact(&mut body).unwrap();
        let command = Command::from_number(header.command).unwrap();
        heard.lock().unwrap().push(command);
        let reply = reply(device, command, &body).unwrap();
        let message = [&header.reply(reply.len()).encode()[..], &reply].concat();
        if !header.no_reply() {
            stream.write_all(&message).unwrap();
        }
        *answers -= 1;
    }
}

fn reply(device: Device, command: Command, body: &[u8]) -> Result<Vec<u8>, WireError> {
    Ok(match command {
        Command::Version => Version { major: 0, minor: 1 }.encode().to_vec(),
        Command::DeviceGetInfo => DeviceInfo {
            flags: device.flags,
            num_regions: 9,
            num_irqs: 5,
            ..DeviceInfo::decode(body)?
        }
        .encode()
        .to_vec(),
        Command::DeviceGetRegionInfo => {
            let ask = RegionInfo::decode(body)?;
            let size = match ask.index {
                0 => device.bar0,
                7 => device.config,
                _ => 0,
            };
            RegionInfo { size, ..ask }.encode().to_vec()
        }
        Command::DeviceGetIrqInfo => {
            let ask = IrqInfo::decode(body)?;
            let count = if ask.index == 2 { device.msix } else { 0 };
            IrqInfo { count, ..ask }.encode().to_vec()
        }
        Command::RegionRead => {
            let mut answer = body.to_vec();
            let count = u32::from_ne_bytes([body[12], body[13], body[14], body[15]]);
            answer.resize(body.len() + count as usize, 0xa5);
            answer
        }
        _ => Vec::new(),
    })
}

fn window(iova: u64) -> DmaWindow {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(0x1000).unwrap();
    let memory = MmapRegion::from_file(FileOffset::new(file, 0), 0x1000).unwrap();
    DmaWindow {
        iova: Iova(iova),
        memory: Arc::new(memory),
        offset: 0,
        len: 0x1000,
        access: DmaAccess::ReadWrite,
    }
}

fn read(function: &UserFunction) -> Result<(), FunctionError> {
    function.region_read(RegionIndex::BAR0, 0, &mut [0; 4])
}

#[test]
fn a_function_is_what_its_server_says() {
    let server = Server::start(NVME, usize::MAX);
    let function = server.connect(PATIENCE).unwrap();
    let info = function.info();
    assert_eq!(info.label, format!("vfio-user {}", server.path.display()));
    assert_eq!(info.config_size, 4096);
    assert_eq!(info.regions.len(), 1);
    assert_eq!(
        info.interrupts,
        InterruptCounts {
            msix: 4,
            ..InterruptCounts::default()
        }
    );
    assert!(info.resettable);
    read(&function).unwrap();
}

#[test]
fn a_server_that_claims_what_cannot_be_is_refused() {
    for device in [
        Device { flags: 1, ..NVME },
        Device { bar0: 24, ..NVME },
        Device { bar0: 8, ..NVME },
        Device {
            bar0: u64::MAX,
            ..NVME
        },
        Device { config: 0, ..NVME },
        Device {
            config: 1 << 40,
            ..NVME
        },
        Device { msix: 2049, ..NVME },
        Device {
            msix: u32::MAX,
            ..NVME
        },
    ] {
        let server = Server::start(device, usize::MAX);
        let result = server.connect(PATIENCE).map(|_| ());
        assert!(
            matches!(result, Err(ClientError::Nonsense { .. })),
            "{result:?}"
        );
    }
}

#[test]
fn a_server_that_accepts_nobody_is_waited_for_until_the_deadline_only() {
    let directory = TempDir::new_with_prefix(std::env::temp_dir().join("vfio-user-")).unwrap();
    let path = directory.as_path().join("socket");
    let listener = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::STREAM,
        None,
    )
    .unwrap();
    let address = rustix::net::SocketAddrUnix::new(&path).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let mut waiting = Vec::new();
    let begin = Instant::now();
    // Connections are taken until the queue of the listener is full.
    let full = loop {
        let stream = socket::connect(&path, Instant::now() + Duration::from_millis(30));
        match stream {
            Ok(stream) => waiting.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), std::io::ErrorKind::TimedOut);
    assert!(begin.elapsed() < PATIENCE);
}

#[test]
fn after_the_first_call_in_vain_the_next_ones_fail_at_once() {
    // The handshake and the description take 13 answers.
    let server = Server::start(NVME, 13);
    let function = server.connect(Duration::from_millis(200)).unwrap();
    assert!(matches!(read(&function), Err(FunctionError::Gone(_))));
    let begin = Instant::now();
    for _ in 0..100 {
        assert!(matches!(read(&function), Err(FunctionError::Gone(_))));
        assert!(matches!(
            function.region_write(RegionIndex::BAR0, 0, &[0; 4]),
            Err(FunctionError::Gone(_))
        ));
    }
    assert!(begin.elapsed() < Duration::from_millis(200));
}

#[test]
fn a_reset_finds_a_server_that_is_there_again_and_tells_it_everything() {
    // Beyond those 13: a window, an interrupt, and another window.
    let server = Server::start(NVME, 16);
    let function = server.connect(PATIENCE).unwrap();
    let event = Arc::new(EventFd::new(0).unwrap());
    function.map_dma(&window(0)).unwrap();
    function
        .set_interrupts(InterruptKind::Msix, 0, &[Some(event)])
        .unwrap();
    function.map_dma(&window(0x1000)).unwrap();
    assert!(matches!(read(&function), Err(FunctionError::Gone(_))));
    let _ = function.unmap_dma(Iova(0x1000), 0x1000);

    function.reset().unwrap();

    read(&function).unwrap();
    assert_eq!(server.heard(Command::Version), 2);
    assert_eq!(
        server.heard(Command::DmaMap),
        3,
        "one window was taken back"
    );
    assert_eq!(server.heard(Command::DeviceSetIrqs), 2);
    assert_eq!(server.heard(Command::DeviceReset), 1);
}

#[test]
fn a_reset_does_not_take_another_device_for_the_one_that_was_lost() {
    let server = Server::start(NVME, 13);
    let function = server.connect(PATIENCE).unwrap();
    assert!(matches!(read(&function), Err(FunctionError::Gone(_))));
    std::fs::remove_file(&server.path).unwrap();
    let other = Server::start(Device { msix: 5, ..NVME }, usize::MAX);
    std::fs::rename(&other.path, &server.path).unwrap();
    let error = function.reset().unwrap_err();
    assert!(
        error.to_string().contains("another kind of device"),
        "{error}"
    );
    assert!(matches!(read(&function), Err(FunctionError::Gone(_))));
}

#[test]
fn while_the_server_is_away_a_reset_fails_and_says_so() {
    let server = Server::start(NVME, 13);
    let function = server.connect(PATIENCE).unwrap();
    assert!(matches!(read(&function), Err(FunctionError::Gone(_))));
    std::fs::remove_file(&server.path).unwrap();
    let error = function.reset().unwrap_err();
    assert!(
        error.to_string().contains("connecting anew failed"),
        "{error}"
    );
}
