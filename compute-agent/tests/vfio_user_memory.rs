//! Guest memory through the endpoint: what may be mapped, and what a client can do to memory
//! that we have mapped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;

use common::*;
use farbus_vfio::user::body::{DMA_READ, DMA_WRITE, DmaUnmap, UNMAP_ALL};
use farbus_vfio::user::{Client, ClientError, Command};
use farbus_vfio::{DmaAccess, Iova};
use libc::{EACCES, EEXIST, EINVAL, ENOSPC, ENOTSUP};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

const RW: u32 = DMA_READ | DMA_WRITE;

fn unmap(address: u64, size: u64, flags: u32) -> Vec<u8> {
    command(
        Command::DmaUnmap,
        &DmaUnmap {
            argsz: 24,
            flags,
            address,
            size,
        }
        .encode(),
    )
}

/// Has the device write its mark to an address.
fn ring(client: &mut Client, iova: u64) -> Result<(), ClientError> {
    client.region_write(0, DMA_DOORBELL, &iova.to_ne_bytes())
}

#[test]
fn what_the_device_writes_is_in_the_guests_memory() {
    let server = Server::start();
    let mut client = server.client();
    let memory = memfd(0x10000);
    client
        .dma_map(Iova(0x10_0000), 0x4000, RW, Some((memory.as_fd(), 0x8000)))
        .unwrap();
    ring(&mut client, 0x10_2008).unwrap();
    assert_eq!(peek(&memory, 0xa008), DMA_MARK);
}

#[test]
fn windows_into_one_file_share_one_mapping() {
    let server = Server::start();
    let mut client = server.client();
    let memory = memfd(0x10000);
    for page in 0..16 {
        let again = memory.try_clone().unwrap();
        let iova = Iova(0x1000_0000 * page);
        client
            .dma_map(iova, 0x1000, RW, Some((again.as_fd(), page * 0x1000)))
            .unwrap();
    }
    let windows = server.function.windows.lock().unwrap();
    let first = windows[&0].memory.as_ptr();
    assert_eq!(windows.len(), 16);
    assert!(
        windows
            .values()
            .all(|window| window.memory.as_ptr() == first)
    );
}

#[test]
fn a_file_that_grows_can_be_mapped_further() {
    let server = Server::start();
    let mut client = server.client();
    let memory = memfd(0x1000);
    client
        .dma_map(Iova(0), 0x1000, RW, Some((memory.as_fd(), 0)))
        .unwrap();
    rustix::fs::ftruncate(&memory, 0x3000).unwrap();
    client
        .dma_map(Iova(0x1000), 0x2000, RW, Some((memory.as_fd(), 0x1000)))
        .unwrap();
    ring(&mut client, 0x0).unwrap();
    ring(&mut client, 0x2000).unwrap();
    assert_eq!(
        (peek(&memory, 0), peek(&memory, 0x2000)),
        (DMA_MARK, DMA_MARK)
    );
}

#[test]
fn read_only_memory_is_mapped_for_reading() {
    let server = Server::start();
    let mut raw = server.greeted();
    let memory = memfd(0x1000);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&memory));
    let read_only: OwnedFd = File::open(path).unwrap().into();
    raw.send_fds(&dma_map(0, 0x1000, 0, RW), &[read_only.as_fd()]);
    assert_eq!(raw.errno(), EACCES);
    raw.send_fds(&dma_map(0, 0x1000, 0, DMA_READ), &[read_only.as_fd()]);
    assert!(!raw.reply().0.is_error());
    assert_eq!(
        server.function.take_calls(),
        [Call::Map(0, 0x1000, DmaAccess::Read)]
    );
}

#[test]
fn a_window_without_a_file_is_remembered_and_given_to_nobody() {
    let server = Server::start();
    let mut raw = server.greeted();
    assert!(!raw.ask(&dma_map(0x1000, 0x1000, 0, RW)).0.is_error());
    let memory = memfd(0x4000);
    raw.send_fds(&dma_map(0, 0x4000, 0, RW), &[memory.as_fd()]);
    assert_eq!(raw.errno(), EEXIST);
    assert!(!raw.ask(&unmap(0x1000, 0x1000, 0)).0.is_error());
    assert_eq!(server.function.calls(), []);
}

#[test]
fn windows_that_cannot_be_are_refused() {
    let server = Server::start();
    let mut raw = server.greeted();
    let memory = memfd(0x4000);
    raw.send_fds(&dma_map(0x10000, 0x2000, 0, RW), &[memory.as_fd()]);
    assert!(!raw.reply().0.is_error());
    server.function.take_calls();
    let cases = [
        (0x123, 0x1000, 0, RW, EINVAL),
        (0, 0x123, 0, RW, EINVAL),
        (0, 0x1000, 0x123, RW, EINVAL),
        (0, 0, 0, RW, EINVAL),
        (!0xfff, 0x1000, 0, RW, EINVAL),
        (!0xfff, 0x2000, 0, RW, EINVAL),
        (0, !0xfff, 0, RW, EEXIST),
        (0x20000, !0xfffff, 0, RW, EINVAL),
        (0, 0x5000, 0, RW, EINVAL),
        (0, 0x1000, 0x4000, RW, EINVAL),
        (0, 0x1000, !0xfff, RW, EINVAL),
        (0x10000, 0x1000, 0, RW, EEXIST),
        (0x11000, 0x2000, 0, RW, EEXIST),
        (0xf000, 0x4000, 0, RW, EEXIST),
        (0, 0x1000, 0, 0, EINVAL),
        (0, 0x1000, 0, 4, EINVAL),
        (0, 0x1000, 0, RW | 8, EINVAL),
        (0, 0x1000, 0, u32::MAX, EINVAL),
    ];
    for (address, size, offset, flags, errno) in cases {
        raw.send_fds(&dma_map(address, size, offset, flags), &[memory.as_fd()]);
        assert_eq!(
            raw.errno(),
            errno,
            "{address:#x} {size:#x} {offset:#x} {flags:#x}"
        );
    }
    raw.assert_in_step();
    assert_eq!(server.function.calls(), []);
}

#[test]
fn descriptors_that_are_no_memory_files_are_refused() {
    let server = Server::start();
    let mut raw = server.greeted();
    let map = dma_map(0, 0x1000, 0, RW);
    let (pipe, _other_end) = std::io::pipe().unwrap();
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    let directory = File::open("/tmp").unwrap();
    let files: [OwnedFd; 3] = [pipe.into(), null.into(), directory.into()];
    for file in &files {
        raw.send_fds(&map, &[file.as_fd()]);
        assert_eq!(raw.errno(), EINVAL);
    }
    let memory = memfd(0x1000);
    raw.send_fds(&map, &[memory.as_fd(), memory.as_fd()]);
    assert_eq!(raw.errno(), EINVAL, "one window, two files");
    raw.assert_in_step();
}

#[test]
fn unmapping_takes_whole_windows_only() {
    let server = Server::start();
    let mut raw = server.greeted();
    let memory = memfd(0x4000);
    for (address, offset) in [(0x1000, 0), (0x2000, 0x1000), (0x8000, 0x2000)] {
        raw.send_fds(&dma_map(address, 0x1000, offset, RW), &[memory.as_fd()]);
        assert!(!raw.reply().0.is_error());
    }
    raw.send_fds(&dma_map(0x10000, 0x4000, 0, RW), &[memory.as_fd()]);
    assert!(!raw.reply().0.is_error());
    server.function.take_calls();
    for (address, size) in [
        (0x10000, 0x1000),
        (0x11000, 0x1000),
        (0x13000, 0x1000),
        (0x9000, 0x8000),
        (0, 0),
        (2, u64::MAX),
    ] {
        assert_eq!(
            raw.ask_errno(&unmap(address, size, 0)),
            EINVAL,
            "{address:#x} {size:#x}"
        );
    }
    assert_eq!(server.function.calls(), []);
    let request = unmap(0, 0x9000, 0);
    assert_eq!(
        raw.ask(&request).1,
        request[16..],
        "the reply is the request's body"
    );
    assert_eq!(server.function.take_calls(), [Call::Unmap(0x1000, 0x8000)]);
    assert!(
        !raw.ask(&unmap(0, 0x9000, 0)).0.is_error(),
        "nothing there is no error"
    );
    assert_eq!(server.function.calls(), []);
}

#[test]
fn everything_can_be_unmapped_at_once() {
    let server = Server::start();
    let mut raw = server.greeted();
    let memory = memfd(0x4000);
    for address in [0, 0x10_0000, u64::MAX - 0x1fff] {
        raw.send_fds(&dma_map(address, 0x1000, 0, RW), &[memory.as_fd()]);
        assert!(!raw.reply().0.is_error());
    }
    assert_eq!(raw.ask_errno(&unmap(0, 0x1000, UNMAP_ALL)), EINVAL);
    assert_eq!(
        raw.ask_errno(&unmap(0, 0x1000, 1)),
        ENOTSUP,
        "a dirty bitmap"
    );
    assert_eq!(raw.ask_errno(&unmap(0, 0x1000, 8)), EINVAL);
    assert!(!raw.ask(&unmap(0, 0, UNMAP_ALL)).0.is_error());
    assert!(server.function.windows.lock().unwrap().is_empty());
    raw.send_fds(&dma_map(0, 0x4000, 0, RW), &[memory.as_fd()]);
    assert!(!raw.reply().0.is_error(), "there is room again");
}

#[test]
fn the_number_of_windows_is_bounded() {
    let server = Server::start();
    let mut raw = server.greeted();
    let last = 65535;
    for group in (0..last).collect::<Vec<u64>>().chunks(1000) {
        let maps: Vec<u8> = group
            .iter()
            .flat_map(|page| dma_map(page * 0x1000, 0x1000, 0, RW))
            .collect();
        raw.send(&maps);
        assert!(group.iter().all(|_| !raw.reply().0.is_error()));
    }
    assert_eq!(
        raw.ask_errno(&dma_map(last * 0x1000, 0x1000, 0, RW)),
        ENOSPC
    );
    raw.assert_in_step();
}

#[test]
fn memory_that_the_vmm_maps_privately_is_refused() {
    let server = Server::start();
    let mut raw = server.greeted();
    let memory = memfd(0x4000);
    // What QEMU does with share=off.
    let file = FileOffset::new(memory.try_clone().unwrap().into(), 0);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let private: MmapRegion =
        MmapRegion::build(Some(file), 0x4000, protection, libc::MAP_PRIVATE).unwrap();
    raw.send_fds(&dma_map(0, 0x4000, 0, RW), &[memory.as_fd()]);
    assert_eq!(raw.errno(), EINVAL);
    raw.assert_closed();
    drop(private);
    server.assert_serves();
}

#[test]
fn memory_that_the_vmm_shares_is_accepted() {
    let server = Server::start();
    let mut raw = server.greeted();
    let memory = memfd(0x4000);
    let file = FileOffset::new(memory.try_clone().unwrap().into(), 0);
    let _shared: MmapRegion = MmapRegion::from_file(file, 0x4000).unwrap();
    raw.send_fds(&dma_map(0, 0x4000, 0, RW), &[memory.as_fd()]);
    assert!(!raw.reply().0.is_error());
}

#[test]
fn memory_that_is_truncated_under_us_costs_the_client_its_connection_and_nobody_else_anything() {
    let server = Server::start();
    let mut client = server.client();
    let memory = memfd(0x8000);
    client
        .dma_map(Iova(0), 0x8000, RW, Some((memory.as_fd(), 0)))
        .unwrap();
    ring(&mut client, 0x7000).unwrap();
    rustix::fs::ftruncate(&memory, 0x1000).unwrap();
    // The access itself goes on, to memory that nobody sees any more.
    let _ = ring(&mut client, 0x7000);
    assert!(ring(&mut client, 0x0).is_err(), "still served");
    server.wait_for(|calls| calls.contains(&Call::Reset));
    server.assert_serves();
}

#[test]
fn truncation_is_noticed_without_a_request() {
    let server = Server::start();
    let mut raw = server.greeted();
    let memory = memfd(0x2000);
    raw.send_fds(&dma_map(0, 0x2000, 0, RW), &[memory.as_fd()]);
    assert!(!raw.reply().0.is_error());
    rustix::fs::ftruncate(&memory, 0).unwrap();
    // The device works on, as one does behind a fabric.
    server.function.dma_write(0x1000, 1);
    raw.assert_closed();
    server.assert_serves();
}

/// Not a test: what the next one runs in a process of its own.
#[test]
fn sigbus_elsewhere() {
    if std::env::var_os("RAISE_SIGBUS_ELSEWHERE").is_none() {
        return;
    }
    let server = Server::start();
    let mut raw = server.greeted();
    let guarded = memfd(0x1000);
    raw.send_fds(&dma_map(0, 0x1000, 0, RW), &[guarded.as_fd()]);
    assert!(!raw.reply().0.is_error());
    let memory = memfd(0x1000);
    let file = FileOffset::new(memory.try_clone().unwrap().into(), 0);
    let mapped: MmapRegion = MmapRegion::from_file(file, 0x1000).unwrap();
    rustix::fs::ftruncate(&memory, 0).unwrap();
    mapped.as_volatile_slice().write_obj(1u8, 0).unwrap();
}

#[test]
fn a_sigbus_that_has_nothing_to_do_with_guest_memory_ends_the_process_as_ever() {
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sigbus_elsewhere"])
        .env("RAISE_SIGBUS_ELSEWHERE", "1")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}
