//! Devices, their ports and addresses, and what happens to them.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use ibverbs_sys as sys;

use super::{check, set_nonblocking};

/// A list of devices as libibverbs gives it out.
struct List {
    devices: NonNull<*mut sys::ibv_device>,
    len: usize,
}

impl List {
    fn get() -> io::Result<Self> {
        let mut len = 0;
        // SAFETY: the call writes the length to a live integer and returns a list, or null.
        let devices = unsafe { sys::ibv_get_device_list(&raw mut len) };
        let devices = NonNull::new(devices).ok_or_else(io::Error::last_os_error)?;
        Ok(List {
            devices,
            len: usize::try_from(len).unwrap_or(0),
        })
    }

    fn iter(&self) -> impl Iterator<Item = (String, *mut sys::ibv_device)> + '_ {
        (0..self.len).map(|index| {
            // SAFETY: the list has `len` entries and lives as long as `self`.
            let device = unsafe { *self.devices.as_ptr().add(index) };
            // SAFETY: the name is a C string inside the device, which the list keeps alive.
            let name = unsafe { CStr::from_ptr(sys::ibv_get_device_name(device)) };
            (name.to_string_lossy().into_owned(), device)
        })
    }
}

impl Drop for List {
    fn drop(&mut self) {
        // SAFETY: got from ibv_get_device_list and freed once; opened devices stay valid.
        unsafe { sys::ibv_free_device_list(self.devices.as_ptr()) };
    }
}

/// The RDMA devices of this host. A kernel without RDMA has none.
pub fn device_names() -> io::Result<Vec<String>> {
    match List::get() {
        Ok(list) => Ok(list.iter().map(|(name, _)| name).collect()),
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A port's address: IP, as RoCE has it, or an InfiniBand subnet's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gid(pub [u8; 16]);

impl Gid {
    /// Whether it stands for an IP address. IPv4 addresses are mapped into IPv6's.
    pub fn is_of(self, address: IpAddr) -> bool {
        let mapped = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        Ipv6Addr::from(self.0) == mapped
    }

    /// The IP address that it stands for.
    pub fn address(self) -> IpAddr {
        let v6 = Ipv6Addr::from(self.0);
        v6.to_ipv4_mapped()
            .map_or(IpAddr::V6(v6), |v4: Ipv4Addr| IpAddr::V4(v4))
    }
}

/// What a port's address is used with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand.
    InfiniBand,
    /// RoCE over Ethernet frames.
    RoceV1,
    /// RoCE over UDP.
    RoceV2,
}

/// What a port is plugged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// Ethernet: RoCE.
    Ethernet,
    /// InfiniBand, or something that is neither.
    InfiniBand,
}

/// What a port is at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Whether it can carry data.
    pub active: bool,
    /// The largest packet, in bytes.
    pub mtu: u16,
    /// Its local identifier in an InfiniBand subnet.
    pub lid: u16,
    /// How many addresses its table has room for.
    pub gids: u32,
    /// What it is plugged into.
    pub link_layer: LinkLayer,
}

/// Something that happened to a device, without having been asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AsyncEvent {
    /// In libibverbs' words.
    pub what: String,
    /// The port concerned, if it is one that is concerned.
    pub port: Option<u8>,
    /// Whether a connection of that port, or of the device, cannot go on.
    pub fatal: bool,
}

/// An open device.
#[derive(Debug)]
pub struct Context {
    context: NonNull<sys::ibv_context>,
    name: String,
}

// SAFETY: rule 4; the pointer is owned.
unsafe impl Send for Context {}
// SAFETY: rule 4.
unsafe impl Sync for Context {}

impl Context {
    /// Opens a device by its name.
    pub fn open(name: &str) -> io::Result<Self> {
        let list = List::get()?;
        let wanted = CString::new(name)?;
        let found = list
            .iter()
            .find(|(have, _)| have.as_bytes() == wanted.as_bytes());
        let (name, device) = found.ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: the device is of a list that is alive.
        let context = unsafe { sys::ibv_open_device(device) };
        let context = NonNull::new(context).ok_or_else(io::Error::last_os_error)?;
        let opened = Context { context, name };
        set_nonblocking(opened.async_fd())?;
        Ok(opened)
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn as_ptr(&self) -> *mut sys::ibv_context {
        self.context.as_ptr()
    }

    pub(super) fn ops(&self) -> &sys::ibv_context_ops {
        // SAFETY: the context is alive, and its table does not change after opening.
        unsafe { &(*self.context.as_ptr()).ops }
    }

    fn async_fd(&self) -> libc::c_int {
        // SAFETY: the context is alive; the field does not change.
        unsafe { (*self.context.as_ptr()).async_fd }
    }

    /// Readable when [`Self::next_event`] has something.
    pub fn event_descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is the context's, and open for as long as it is.
        unsafe { BorrowedFd::borrow_raw(self.async_fd()) }
    }

    /// How many ports the device has, numbered from 1, and how many pieces of memory one
    /// work request may name.
    pub fn limits(&self) -> io::Result<(u8, usize)> {
        let mut attributes = sys::ibv_device_attr::default();
        // SAFETY: the context is alive and the call fills a live struct.
        check(unsafe { sys::ibv_query_device(self.as_ptr(), &raw mut attributes) })?;
        Ok((
            attributes.phys_port_cnt,
            usize::try_from(attributes.max_sge).unwrap_or(1),
        ))
    }

    /// What a port is at present.
    pub fn port(&self, port: u8) -> io::Result<Port> {
        let mut attributes = sys::ibv_port_attr::default();
        // SAFETY: the context is alive. The exported symbol writes the older, shorter form of the
        // struct, which the newer one begins with.
        check(unsafe { sys::ibv_query_port(self.as_ptr(), port, (&raw mut attributes).cast()) })?;
        let ethernet = u32::from(attributes.link_layer) == sys::IBV_LINK_LAYER_ETHERNET;
        Ok(Port {
            active: attributes.state == sys::ibv_port_state::IBV_PORT_ACTIVE,
            mtu: mtu_bytes(attributes.active_mtu),
            lid: attributes.lid,
            gids: u32::try_from(attributes.gid_tbl_len).unwrap_or(0),
            link_layer: if ethernet {
                LinkLayer::Ethernet
            } else {
                LinkLayer::InfiniBand
            },
        })
    }

    /// An entry of a port's table of addresses; none if the place is empty.
    pub fn gid(&self, port: u8, index: u32) -> Option<(Gid, GidKind)> {
        let mut entry = sys::ibv_gid_entry {
            gid: sys::ibv_gid { raw: [0; 16] },
            gid_index: 0,
            port_num: 0,
            gid_type: 0,
            ndev_ifindex: 0,
        };
        // SAFETY: the context is alive, and the call fills a live struct whose size it is told.
        let result = unsafe {
            sys::_ibv_query_gid_ex(
                self.as_ptr(),
                port.into(),
                index,
                &raw mut entry,
                0,
                size_of::<sys::ibv_gid_entry>(),
            )
        };
        check(result).ok()?;
        // SAFETY: every pattern of bits is a valid array of bytes.
        let gid = Gid(unsafe { entry.gid.raw });
        let kind = match entry.gid_type {
            sys::IBV_GID_TYPE_ROCE_V2 => GidKind::RoceV2,
            sys::IBV_GID_TYPE_ROCE_V1 => GidKind::RoceV1,
            _ => GidKind::InfiniBand,
        };
        (gid.0 != [0; 16]).then_some((gid, kind))
    }

    /// The next thing that happened, without waiting.
    pub fn next_event(&self) -> Option<AsyncEvent> {
        let mut event = sys::ibv_async_event {
            element: sys::ibv_async_event__bindgen_ty_1 { port_num: 0 },
            event_type: 0,
        };
        // SAFETY: the context is alive, its descriptor does not block, and the event is live.
        if unsafe { sys::ibv_get_async_event(self.as_ptr(), &raw mut event) } != 0 {
            return None;
        }
        let of_port = matches!(
            event.event_type,
            sys::IBV_EVENT_PORT_ACTIVE | sys::IBV_EVENT_PORT_ERR
        );
        // SAFETY: the union began as a number, and the device's events have numbers or pointers in
        // it: these bytes are initialised whichever it is. It means a port for events of ports only.
        let number = unsafe { event.element.port_num };
        let port = of_port.then_some(number as u8);
        let fatal = matches!(
            event.event_type,
            sys::IBV_EVENT_CQ_ERR
                | sys::IBV_EVENT_QP_FATAL
                | sys::IBV_EVENT_QP_REQ_ERR
                | sys::IBV_EVENT_QP_ACCESS_ERR
                | sys::IBV_EVENT_DEVICE_FATAL
                | sys::IBV_EVENT_PORT_ERR
        );
        // SAFETY: the function returns a static C string for any value.
        let what = unsafe { CStr::from_ptr(sys::ibv_event_type_str(event.event_type)) };
        let what = what.to_string_lossy().into_owned();
        // SAFETY: the event came from ibv_get_async_event and is acknowledged once.
        unsafe { sys::ibv_ack_async_event(&raw mut event) };
        Some(AsyncEvent { what, port, fatal })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once; whatever was made of it is gone (rule 1).
        unsafe { sys::ibv_close_device(self.context.as_ptr()) };
    }
}

fn mtu_bytes(mtu: sys::ibv_mtu) -> u16 {
    match mtu {
        sys::IBV_MTU_256 => 256,
        sys::IBV_MTU_512 => 512,
        sys::IBV_MTU_1024 => 1024,
        sys::IBV_MTU_2048 => 2048,
        _ => 4096,
    }
}
