//! Clients that behave, as the VMMs do.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use common::*;
use farbus_vfio::user::body::{
    DEVICE_PCI, DEVICE_RESET, IrqAction, IrqData, MultiWrite, REGION_READ, REGION_WRITE, SetIrqs,
};
use farbus_vfio::user::event::borrow;
use farbus_vfio::user::{Client, ClientError, Command, UserFunction};
use farbus_vfio::{DmaAccess, DmaWindow, Function, InterruptKind, Iova, RegionIndex};
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

const CONFIG: u32 = 7;

fn irqs(client: &mut Client, action: IrqAction, data: IrqData<'_>, start: u32, count: u32) {
    client
        .set_irqs(
            &SetIrqs {
                index: 2,
                start,
                count,
                action,
                data,
            },
            &[],
        )
        .unwrap();
}

#[test]
fn a_session_in_qemus_order_works() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.server_capabilities().max_msg_fds, Some(16));
    assert_eq!(client.server_capabilities().write_multiple, Some(true));
    let memory = memfd(0x10000);
    client
        .dma_map(Iova(0), 0xa000, 3, Some((memory.as_fd(), 0)))
        .unwrap();
    client.dma_map(Iova(0xc0000), 0x1000, 1, None).unwrap();

    let device = client.device_info().unwrap();
    assert_eq!(
        (device.argsz, device.flags),
        (16, DEVICE_PCI | DEVICE_RESET)
    );
    assert_eq!((device.num_regions, device.num_irqs), (9, 5));
    let regions: Vec<_> = (0..9)
        .map(|index| client.region_info(index).unwrap())
        .collect();
    let sizes: Vec<u64> = regions.iter().map(|region| region.size).collect();
    assert_eq!(sizes, [BAR0_SIZE, 0, 0, 0, 0, 0, ROM_SIZE, 4096, 0]);
    let flags: Vec<u32> = regions.iter().map(|region| region.flags).collect();
    let rw = REGION_READ | REGION_WRITE;
    assert_eq!(
        flags,
        [rw, 0, 0, 0, 0, 0, REGION_READ, rw, 0],
        "nothing can be mapped"
    );
    let counts: Vec<u32> = (0..5)
        .map(|index| client.irq_info(index).unwrap().count)
        .collect();
    assert_eq!(counts, [0, 4, MSIX, 0, 0]);
    assert!(matches!(
        client.region_info(9),
        Err(ClientError::Refused { errno: 22, .. })
    ));
    assert!(matches!(
        client.irq_info(5),
        Err(ClientError::Refused { errno: 22, .. })
    ));

    let mut config = vec![0; 4096];
    client.region_read(CONFIG, 0, &mut config).unwrap();
    assert!(
        config
            .iter()
            .enumerate()
            .all(|(at, byte)| *byte == (at % 251) as u8)
    );
    client.region_write(CONFIG, 4, &[6, 1]).unwrap();
    client.reset().unwrap();
    client
        .region_write_posted(0, 0x1000, &[1, 0, 0, 0])
        .unwrap();
    let mut register = [0; 4];
    client.region_read(0, 0x1000, &mut register).unwrap();
    assert_eq!(
        register,
        [1, 0, 0, 0],
        "a read sees the posted writes before it"
    );
    client.dma_unmap(Iova(0), 0xa000).unwrap();
    assert_eq!(
        server.function.take_calls(),
        [
            Call::Map(0, 0xa000, DmaAccess::ReadWrite),
            Call::ConfigWrite(4, vec![6, 1]),
            Call::Reset,
            Call::RegionWrite(0, 0x1000, vec![1, 0, 0, 0]),
            Call::Unmap(0, 0xa000),
        ]
    );
}

#[test]
fn a_client_without_version_data_is_served() {
    let server = Server::start();
    let mut raw = server.raw();
    let (header, body) = raw.ask(&command(Command::Version, &[0, 0, 9, 0]));
    assert!(!header.is_error());
    assert_eq!(
        body, b"\0\0\x01\0{\"capabilities\":{}}\0",
        "minor 1, and nothing not proposed"
    );
    raw.assert_in_step();
}

#[test]
fn the_longest_transfers_work() {
    let server = Server::start();
    let mut client = server.client();
    let data: Vec<u8> = (0..BAR0_SIZE - 8).map(|at| at as u8).collect();
    client.region_write(0, 0, &data).unwrap();
    let mut back = vec![0; data.len()];
    client.region_read(0, 0, &mut back).unwrap();
    assert_eq!(back, data);
}

#[test]
fn a_burst_of_posted_writes_arrives_in_order() {
    let server = Server::start();
    let mut client = server.client();
    for at in 0..3000u32 {
        client
            .region_write_posted(0, 0x1000, &at.to_ne_bytes())
            .unwrap();
    }
    client.device_info().unwrap();
    let written: Vec<Call> = (0..3000u32)
        .map(|at| Call::RegionWrite(0, 0x1000, at.to_ne_bytes().to_vec()))
        .collect();
    assert_eq!(server.function.take_calls(), written);
}

#[test]
fn many_coalesced_writes_are_all_done_in_order() {
    let server = Server::start();
    let mut client = server.client();
    let write = |at: u64| MultiWrite {
        offset: 8 * (at % 256),
        region: 0,
        count: 8,
        data: at.to_ne_bytes(),
    };
    let writes: Vec<MultiWrite> = (0..1000).map(write).collect();
    assert_eq!(client.region_write_multi(&writes, false).unwrap(), 1000);
    client.region_write_multi(&writes[..200], true).unwrap();
    client.device_info().unwrap();
    let expected: Vec<Call> = (0..1000)
        .chain(0..200)
        .map(|at| Call::RegionWrite(0, 8 * (at % 256), at.to_ne_bytes().to_vec()))
        .collect();
    assert_eq!(server.function.take_calls(), expected);
}

#[test]
fn vectors_are_set_up_one_by_one_and_in_batches() {
    let server = Server::start();
    let mut client = server.client();
    let events: Vec<EventFd> = (0..MSIX).map(|_| eventfd()).collect();
    set_vectors(&mut client, 0, &events[..1]);
    set_vectors(&mut client, 1, &events[1..2]);
    for start in [0, 16, 32] {
        set_vectors(
            &mut client,
            start,
            &events[start as usize..MSIX.min(start + 16) as usize],
        );
    }
    for vector in [0, 17, 39] {
        server.function.fire(InterruptKind::Msix, vector);
        assert_eq!(events[vector as usize].read().unwrap(), 1);
    }
    irqs(&mut client, IrqAction::Trigger, IrqData::EventFd, 17, 1);
    assert!(
        !server
            .function
            .events
            .lock()
            .unwrap()
            .contains_key(&(InterruptKind::Msix, 17))
    );
    irqs(&mut client, IrqAction::Trigger, IrqData::None, 0, 0);
    assert!(
        server.function.events.lock().unwrap().is_empty(),
        "all of them at once"
    );
    let last = server.function.take_calls().pop();
    assert_eq!(
        last,
        Some(Call::Interrupts(
            InterruptKind::Msix,
            0,
            vec![false; MSIX as usize]
        ))
    );
}

#[test]
fn interrupts_can_be_triggered_masked_and_unmasked_by_the_client() {
    let server = Server::start();
    let mut client = server.client();
    let events: Vec<EventFd> = (0..3).map(|_| eventfd()).collect();
    set_vectors(&mut client, 4, &events);
    irqs(&mut client, IrqAction::Trigger, IrqData::None, 4, 2);
    irqs(
        &mut client,
        IrqAction::Trigger,
        IrqData::Bool(&[0, 1, 1]),
        4,
        3,
    );
    // A vector without an eventfd is triggered to no effect.
    irqs(&mut client, IrqAction::Trigger, IrqData::None, 30, 1);
    let counts: Vec<u64> = events.iter().map(|event| event.read().unwrap()).collect();
    assert_eq!(counts, [1, 2, 1]);

    server.function.take_calls();
    let masked = eventfd();
    let request = SetIrqs {
        index: 2,
        start: 4,
        count: 1,
        action: IrqAction::Mask,
        data: IrqData::EventFd,
    };
    client.set_irqs(&request, &[borrow(&masked)]).unwrap();
    irqs(&mut client, IrqAction::Mask, IrqData::None, 4, 2);
    irqs(&mut client, IrqAction::Unmask, IrqData::Bool(&[1, 0]), 4, 2);
    assert_eq!(
        masked.read().unwrap(),
        1,
        "told of the mask, not of the unmask"
    );
    client.set_irqs(&request, &[]).unwrap();
    irqs(&mut client, IrqAction::Mask, IrqData::None, 4, 1);
    assert!(masked.read().is_err(), "taken back");
    let mask = |vector, to| Call::Mask(InterruptKind::Msix, vector, to);
    assert_eq!(
        server.function.take_calls(),
        [mask(4, true), mask(5, true), mask(4, false), mask(4, true)]
    );
}

#[test]
fn writing_to_an_eventfd_of_a_client_never_blocks() {
    let server = Server::start();
    let mut client = server.client();
    let blocking = EventFd::new(0).unwrap();
    blocking.write(u64::MAX - 1).unwrap();
    set_vectors(&mut client, 0, &[blocking]);
    irqs(&mut client, IrqAction::Trigger, IrqData::None, 0, 1);
    client.device_info().unwrap();
}

#[test]
fn a_function_behind_the_socket_works_like_the_function() {
    let server = Server::start();
    let remote = UserFunction::new(server.client(), "remote".into()).unwrap();
    let (there, here) = (server.function.info(), remote.info());
    assert_eq!(
        (here.config_size, &here.regions),
        (there.config_size, &there.regions)
    );
    assert_eq!(
        (here.interrupts, here.resettable),
        (there.interrupts, there.resettable)
    );

    let file = FileOffset::new(memfd(0x4000).into(), 0);
    let memory = Arc::new(MmapRegion::from_file(file, 0x4000).unwrap());
    let window = DmaWindow {
        iova: Iova(0x8000),
        memory: memory.clone(),
        offset: 0x1000,
        len: 0x2000,
        access: DmaAccess::ReadWrite,
    };
    remote.map_dma(&window).unwrap();
    remote
        .region_write(RegionIndex::BAR0, DMA_DOORBELL, &0x8010u64.to_ne_bytes())
        .unwrap();
    let mut config = [0; 4];
    remote.config_read(8, &mut config).unwrap();
    assert_eq!(config, [8, 9, 10, 11]);
    let file = memory.file_offset().unwrap().file();
    assert_eq!(peek(&file.try_clone().unwrap().into(), 0x1010), DMA_MARK);

    let events: Vec<Option<Arc<EventFd>>> = (0..MSIX)
        .map(|vector| (vector % 20 != 3).then(|| Arc::new(eventfd())))
        .collect();
    remote
        .set_interrupts(InterruptKind::Msix, 0, &events)
        .unwrap();
    server.function.fire(InterruptKind::Msix, 39);
    assert_eq!(events[39].as_ref().unwrap().read().unwrap(), 1);
    assert!(
        !server
            .function
            .events
            .lock()
            .unwrap()
            .contains_key(&(InterruptKind::Msix, 23))
    );

    remote.mask_interrupt(InterruptKind::Msix, 2, true).unwrap();
    remote.config_write(4, &[7]).unwrap();
    remote.unmap_dma(Iova(0x8000), 0x2000).unwrap();
    remote.reset().unwrap();
    let mut register = [1; 8];
    remote
        .region_read(RegionIndex::BAR0, DMA_DOORBELL, &mut register)
        .unwrap();
    assert_eq!(register, [0; 8]);
    assert!(
        remote
            .region_read(RegionIndex::BAR0, BAR0_SIZE, &mut register)
            .is_err()
    );
}

/// rust-vmm's client, which is what cloud-hypervisor uses.
#[test]
fn an_independent_client_is_served() {
    const EVENTFD_TRIGGER: u32 = 4 | 1 << 5;
    const NONE_TRIGGER: u32 = 1 | 1 << 5;
    let server = Server::start();
    let mut client = vfio_user::Client::new(&server.path).unwrap();
    assert_eq!(client.region(0).unwrap().size, BAR0_SIZE);
    assert_eq!(client.region(CONFIG).unwrap().size, 4096);
    assert_eq!(client.region(8).unwrap().size, 0);
    assert!(client.region(0).unwrap().file_offset.is_none());
    assert_eq!(client.get_irq_info(0).unwrap().count, 0);
    assert_eq!(client.get_irq_info(2).unwrap().count, MSIX);

    let memory = memfd(0x4000);
    client
        .dma_map(0x1000, 0x10_0000, 0x2000, memory.as_raw_fd())
        .unwrap();
    client
        .region_write(0, DMA_DOORBELL, &0x10_0008u64.to_ne_bytes())
        .unwrap();
    assert_eq!(peek(&memory, 0x1008), DMA_MARK);
    let mut config = [0; 4];
    client.region_read(CONFIG, 16, &mut config).unwrap();
    assert_eq!(config, [16, 17, 18, 19]);

    let events: Vec<EventFd> = (0..MSIX).map(|_| eventfd()).collect();
    let fds: Vec<i32> = events.iter().map(AsRawFd::as_raw_fd).collect();
    for (start, batch) in (0..).step_by(16).zip(fds.chunks(16)) {
        client
            .set_irqs(2, EVENTFD_TRIGGER, start, batch.len() as u32, batch)
            .unwrap();
    }
    server.function.fire(InterruptKind::Msix, 33);
    assert_eq!(events[33].read().unwrap(), 1);
    client.set_irqs(2, NONE_TRIGGER, 0, 0, &[]).unwrap();
    client.dma_unmap(0x10_0000, 0x2000).unwrap();
    client.reset().unwrap();
    client.shutdown().unwrap();
    server.wait_for(|calls| calls.iter().filter(|call| **call == Call::Reset).count() == 2);
    assert!(server.function.windows.lock().unwrap().is_empty());
    assert!(server.function.events.lock().unwrap().is_empty());
}
