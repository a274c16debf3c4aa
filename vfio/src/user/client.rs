//! The client's end of a vfio-user socket: what a VMM does, as blocking calls with a
//! deadline.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::body::{
    DeviceInfo, DmaMap, DmaUnmap, IrqInfo, MultiWrite, RegionAccess, RegionInfo, SetIrqs, Version,
    WriteMulti, reply_flag,
};
use super::caps::Capabilities;
use super::error::{ClientError, nonsense};
use super::memory::{DmaMemory, serve_memory};
use super::socket::{connect, receive_exact, send_all};
use super::wire::{
    Command, DMA_PAGE, HEADER_LEN, Header, MAX_DATA_XFER, MAX_DMA_MAPS, MAX_MESSAGE, MAX_MSG_FDS,
    MessageType, VERSION_MAJOR, VERSION_MINOR,
};
use crate::Iova;

/// A reply as it came.
#[derive(Debug)]
pub struct Reply {
    /// Its header.
    pub header: Header,
    /// What followed the header.
    pub body: Vec<u8>,
    /// The descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// A connection to a vfio-user server, past its handshake.
pub struct Client {
    stream: UnixStream,
    timeout: Duration,
    next_id: u16,
    server: Capabilities,
    memory: Option<Box<dyn DmaMemory>>,
    outgoing: Vec<u8>,
    /// As long as any message may be, so that no size from the server allocates.
    incoming: Vec<u8>,
}

impl Client {
    /// Connects and shakes hands. Every call waits at most `timeout` for its answer.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Self, ClientError> {
        let stream =
            connect(path, Instant::now() + timeout).map_err(|source| ClientError::Connect {
                path: path.display().to_string(),
                source,
            })?;
        Self::from_stream(stream, timeout)
    }

    /// Shakes hands on a connected socket.
    pub fn from_stream(stream: UnixStream, timeout: Duration) -> Result<Self, ClientError> {
        let mut client = Self {
            stream,
            timeout,
            next_id: 0,
            server: Capabilities::default(),
            memory: None,
            outgoing: Vec::new(),
            incoming: vec![0; MAX_MESSAGE],
        };
        client.negotiate()?;
        Ok(client)
    }

    fn negotiate(&mut self) -> Result<(), ClientError> {
        let proposed = Capabilities {
            max_msg_fds: Some(MAX_MSG_FDS as u64),
            max_data_xfer_size: Some(MAX_DATA_XFER as u64),
            max_dma_maps: Some(MAX_DMA_MAPS as u64),
            pgsizes: Some(DMA_PAGE),
            write_multiple: Some(true),
            migration: false,
        };
        let version = Version {
            major: VERSION_MAJOR,
            minor: VERSION_MINOR,
        };
        let body = [&version.encode()[..], &proposed.encode()].concat();
        let reply = self.call(Command::Version, &body, &[])?;
        let malformed = |source| ClientError::Malformed {
            command: Command::Version,
            source,
        };
        let answered = Version::decode(&reply.body).map_err(malformed)?;
        if answered.major != VERSION_MAJOR || answered.minor > VERSION_MINOR {
            return Err(nonsense(
                Command::Version,
                format!(
                    "version {}.{} was proposed, and {}.{} came back",
                    VERSION_MAJOR, VERSION_MINOR, answered.major, answered.minor
                ),
            ));
        }
        let data = reply.body.get(Version::LEN..).unwrap_or_default();
        self.server = Capabilities::decode(data).map_err(malformed)?;
        Ok(())
    }

    /// What the server said that it can do.
    pub fn server_capabilities(&self) -> Capabilities {
        self.server
    }

    /// How many descriptors the server takes in one message.
    pub fn max_msg_fds(&self) -> usize {
        self.server
            .max_msg_fds
            .map_or(1, |n| n.clamp(1, MAX_MSG_FDS as u64) as usize)
    }

    /// Lets the server reach `memory` by messages. They are served while a call waits.
    pub fn serve_memory(&mut self, memory: Box<dyn DmaMemory>) {
        self.memory = Some(memory);
    }

    /// What kind of device it is.
    pub fn device_info(&mut self) -> Result<DeviceInfo, ClientError> {
        let ask = DeviceInfo {
            argsz: DeviceInfo::LEN as u32,
            ..DeviceInfo::default()
        };
        let reply = self.call(Command::DeviceGetInfo, &ask.encode(), &[])?;
        DeviceInfo::decode(&reply.body).map_err(|source| ClientError::Malformed {
            command: Command::DeviceGetInfo,
            source,
        })
    }

    /// One region. Capabilities beyond the structure are not asked for.
    pub fn region_info(&mut self, index: u32) -> Result<RegionInfo, ClientError> {
        let ask = RegionInfo {
            argsz: RegionInfo::LEN as u32,
            index,
            ..RegionInfo::default()
        };
        let reply = self.call(Command::DeviceGetRegionInfo, &ask.encode(), &[])?;
        RegionInfo::decode(&reply.body).map_err(|source| ClientError::Malformed {
            command: Command::DeviceGetRegionInfo,
            source,
        })
    }

    /// One kind of interrupts.
    pub fn irq_info(&mut self, index: u32) -> Result<IrqInfo, ClientError> {
        let ask = IrqInfo {
            argsz: IrqInfo::LEN as u32,
            index,
            ..IrqInfo::default()
        };
        let reply = self.call(Command::DeviceGetIrqInfo, &ask.encode(), &[])?;
        IrqInfo::decode(&reply.body).map_err(|source| ClientError::Malformed {
            command: Command::DeviceGetIrqInfo,
            source,
        })
    }

    /// Reads a region from `offset` on into all of `data`.
    pub fn region_read(
        &mut self,
        region: u32,
        offset: u64,
        data: &mut [u8],
    ) -> Result<(), ClientError> {
        let ask = RegionAccess {
            offset,
            region,
            count: data.len() as u32,
        };
        let reply = self.call(Command::RegionRead, &ask.encode(), &[])?;
        let answered = reply.body.get(RegionAccess::LEN..).unwrap_or_default();
        if answered.len() != data.len() {
            return Err(nonsense(
                Command::RegionRead,
                format!(
                    "{} bytes were asked for, and {} came",
                    data.len(),
                    answered.len()
                ),
            ));
        }
        data.copy_from_slice(answered);
        Ok(())
    }

    /// Writes `data` to a region from `offset` on, and waits until the server has done so.
    pub fn region_write(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ClientError> {
        self.call(
            Command::RegionWrite,
            &region_write_body(region, offset, data),
            &[],
        )
        .map(drop)
    }

    /// Writes `data` to a region from `offset` on, and does not wait.
    pub fn region_write_posted(
        &mut self,
        region: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<(), ClientError> {
        let body = region_write_body(region, offset, data);
        self.send(Command::RegionWrite, false, &body, &[]).map(drop)
    }

    /// Does several writes with one message. Waits for the answer, and returns how many
    /// were done, unless the writes are `posted`.
    pub fn region_write_multi(
        &mut self,
        writes: &[MultiWrite],
        posted: bool,
    ) -> Result<u64, ClientError> {
        let body = WriteMulti::encode(writes);
        if posted {
            self.send(Command::RegionWriteMulti, false, &body, &[])?;
            return Ok(writes.len() as u64);
        }
        let reply = self.call(Command::RegionWriteMulti, &body, &[])?;
        let done = reply.body.first_chunk::<8>().ok_or_else(|| {
            nonsense(
                Command::RegionWriteMulti,
                format!("a body of {} bytes", reply.body.len()),
            )
        })?;
        Ok(u64::from_ne_bytes(*done))
    }

    /// Lets the server reach `size` bytes of the file `fd` from `offset` on, at `iova`. With
    /// no file, the server has to ask by messages. `flags` are
    /// [`DMA_READ`](super::body::DMA_READ) and [`DMA_WRITE`](super::body::DMA_WRITE).
    pub fn dma_map(
        &mut self,
        iova: Iova,
        size: u64,
        flags: u32,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), ClientError> {
        let ask = DmaMap {
            argsz: DmaMap::LEN as u32,
            flags,
            offset: file.map_or(0, |(_, offset)| offset),
            address: iova.0,
            size,
        };
        let fd = file.map(|(fd, _)| fd);
        self.call(Command::DmaMap, &ask.encode(), fd.as_slice())
            .map(drop)
    }

    /// Takes a window back; the server no longer touches it when this returns.
    pub fn dma_unmap(&mut self, iova: Iova, size: u64) -> Result<(), ClientError> {
        let ask = DmaUnmap {
            argsz: DmaUnmap::LEN as u32,
            flags: 0,
            address: iova.0,
            size,
        };
        self.call(Command::DmaUnmap, &ask.encode(), &[]).map(drop)
    }

    /// Sets up, masks or triggers interrupts. With [`IrqData::EventFd`](super::body::IrqData),
    /// `fds` has one descriptor per interrupt, or none at all.
    pub fn set_irqs(
        &mut self,
        request: &SetIrqs<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        self.call(Command::DeviceSetIrqs, &request.encode(), fds)
            .map(drop)
    }

    /// Resets the device.
    pub fn reset(&mut self) -> Result<(), ClientError> {
        self.call(Command::DeviceReset, &[], &[]).map(drop)
    }

    /// Sends any command and waits for its reply; an error reply is an `Err`.
    pub fn call(
        &mut self,
        command: Command,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, ClientError> {
        let deadline = Instant::now() + self.timeout;
        let id = self.send(command, true, body, fds)?;
        loop {
            let (header, body_len, fds) = self.receive(command, deadline)?;
            let malformed = |source| ClientError::Malformed { command, source };
            match header.message_type().map_err(malformed)? {
                MessageType::Command => self.serve(command, &header, body_len)?,
                MessageType::Reply if header.id != id => {
                    return Err(nonsense(
                        command,
                        format!("message {id} was sent, and a reply to {} came", header.id),
                    ));
                }
                MessageType::Reply if header.is_error() => {
                    return Err(ClientError::Refused {
                        command,
                        errno: header.error,
                    });
                }
                MessageType::Reply => {
                    let body = self.incoming.get(..body_len).unwrap_or_default().to_vec();
                    return Ok(Reply { header, body, fds });
                }
            }
        }
    }

    /// Sends a command and returns its id.
    fn send(
        &mut self,
        command: Command,
        want_reply: bool,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<u16, ClientError> {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        let header = Header::command(id, command, reply_flag(want_reply), body.len());
        self.send_message(command, &header, body, fds)?;
        Ok(id)
    }

    fn send_message(
        &mut self,
        command: Command,
        header: &Header,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        self.outgoing.clear();
        self.outgoing.extend_from_slice(&header.encode());
        self.outgoing.extend_from_slice(body);
        send_all(
            &self.stream,
            &self.outgoing,
            fds,
            Instant::now() + self.timeout,
        )
        .map_err(|source| self.socket_error(command, source))
    }

    /// Receives one message; its body is then at the beginning of `self.incoming`.
    fn receive(
        &mut self,
        command: Command,
        deadline: Instant,
    ) -> Result<(Header, usize, Vec<OwnedFd>), ClientError> {
        let mut fds = Vec::new();
        let mut bytes = [0; HEADER_LEN];
        let got = receive_exact(&self.stream, &mut bytes, &mut fds, deadline)
            .map_err(|source| self.socket_error(command, source))?;
        if got < bytes.len() {
            return Err(ClientError::Closed { command });
        }
        let header = Header::decode(&bytes);
        let body_len = header
            .body_len()
            .map_err(|source| ClientError::Malformed { command, source })?;
        let body = self.incoming.get_mut(..body_len).unwrap_or_default();
        match receive_exact(&self.stream, body, &mut fds, deadline) {
            Ok(got) if got == body_len => Ok((header, body_len, fds)),
            Ok(_) => Err(ClientError::Closed { command }),
            Err(source) => Err(self.socket_error(command, source)),
        }
    }

    /// Answers a command of the server, which came while `waiting` was under way.
    fn serve(
        &mut self,
        waiting: Command,
        header: &Header,
        body_len: usize,
    ) -> Result<(), ClientError> {
        let body = self.incoming.get(..body_len).unwrap_or_default();
        let answer = serve_memory(self.memory.as_deref_mut(), header.command, body);
        if header.no_reply() {
            return Ok(());
        }
        match answer {
            Ok(body) => self.send_message(waiting, &header.reply(body.len()), &body, &[]),
            Err(errno) => self.send_message(waiting, &header.error_reply(errno), &[], &[]),
        }
    }

    fn socket_error(&self, command: Command, source: io::Error) -> ClientError {
        match source.kind() {
            io::ErrorKind::TimedOut => ClientError::TimedOut {
                command,
                after: self.timeout,
            },
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                ClientError::Closed { command }
            }
            _ => ClientError::Socket { command, source },
        }
    }
}

fn region_write_body(region: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let head = RegionAccess {
        offset,
        region,
        count: data.len() as u32,
    };
    [&head.encode()[..], data].concat()
}
