//! MSI-X that the server keeps itself, as a client sees it on the wire.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::time::{Duration, Instant};

use common::{
    BAR0_SIZE, Call, PATIENCE, Raw, Server, TestFunction, command, message, region_access,
};
use farbus_compute_agent::api::Msix;
use farbus_vfio::config::{CapabilityId, MsixLayout, find_capability, find_msix};
use farbus_vfio::user::Command;
use farbus_vfio::user::body::{
    DmaTransfer, IRQ_INDEX_MSIX, IrqAction, IrqData, MultiWrite, SetIrqs, Version, WriteMulti,
};
use farbus_vfio::{Function, InterruptKind, RegionIndex};

const TABLE: u64 = 0x2000;
const PBA: u64 = 0x3000;
const VECTORS: u16 = 40;
const CONFIG: u32 = 7;
const BAR0: u32 = 0;
const NO_REPLY: u32 = 1 << 4;
const MSIX_ID: u8 = 0x11;
const VENDOR_ID: u8 = 0x09;
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;

const LAYOUT: MsixLayout = MsixLayout {
    vectors: VECTORS,
    table: (RegionIndex::BAR0, TABLE),
    pba: (RegionIndex::BAR0, PBA),
};

/// Version data as QEMU, cloud-hypervisor and this workspace's own client propose it.
const QEMU: &str = r#"{"capabilities": {"migration": {"pgsize": 4096, "max_bitmap_size": 268435456},
    "max_msg_fds": 8, "write_multiple": true, "max_dma_maps": 65535, "pgsizes": 4096}}"#;
const CLOUD_HYPERVISOR: &str =
    r#"{"capabilities": {"max_msg_fds": 1, "migration": {"pgsize": 4096}}}"#;
const OURS: &str = r#"{"capabilities": {"max_msg_fds": 16, "write_multiple": true}}"#;

fn server(msix: Msix) -> Server {
    Server::offer(TestFunction::with_msix(LAYOUT), msix)
}

fn greet(server: &Server, proposed: &str) -> Guest {
    let version = Version { major: 0, minor: 1 }.encode();
    let end = Instant::now() + PATIENCE;
    loop {
        let mut raw = server.raw();
        let (header, _) = raw.ask(&command(
            Command::Version,
            &[&version[..], proposed.as_bytes(), b"\0"].concat(),
        ));
        // The end of the client before may still be under way.
        if !header.is_error() {
            return Guest { raw };
        }
        assert!(Instant::now() < end);
    }
}

fn start() -> (Server, Guest) {
    let server = server(Msix::Auto);
    let guest = greet(&server, QEMU);
    (server, guest)
}

/// A guest's accesses, as a VMM passes them on.
struct Guest {
    raw: Raw,
}

impl Guest {
    fn read(&mut self, region: u32, offset: u64, len: u32) -> Vec<u8> {
        let (header, body) = self.raw.ask(&command(
            Command::RegionRead,
            &region_access(region, offset, len),
        ));
        assert_eq!((header.command, header.is_error()), (9, false));
        body[16..].to_vec()
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) {
        let head = region_access(region, offset, data.len() as u32);
        let body = [&head[..], data].concat();
        let (header, _) = self.raw.ask(&command(Command::RegionWrite, &body));
        assert!(!header.is_error());
    }

    /// A write that waits for nothing, after which interrupts may be read.
    fn post(&mut self, region: u32, offset: u64, data: &[u8]) {
        let head = region_access(region, offset, data.len() as u32);
        let body = [&head[..], data].concat();
        let number = Command::RegionWrite as u16;
        self.raw.send(&message(1, number, NO_REPLY, &body));
    }

    fn read_u32(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(BAR0, offset, 4).try_into().unwrap())
    }

    fn set_control(&mut self, server: &Server, control: u16) {
        let at = capability(server, CapabilityId::Msix) + 2;
        self.post(CONFIG, at, &(control | (VECTORS - 1)).to_le_bytes());
    }

    /// MSI-X on, the function a bus master, and each vector with an address and data of its own.
    fn set_up(&mut self, server: &Server) {
        self.write(CONFIG, 4, &6u16.to_le_bytes());
        for vector in 0..VECTORS.into() {
            let entry = TABLE + 16 * vector;
            self.write(BAR0, entry, &address_of(vector as u32).to_le_bytes());
            self.write(
                BAR0,
                entry + 8,
                &u64::from(data_of(vector as u32)).to_le_bytes(),
            );
        }
        self.set_control(server, ENABLE);
        self.raw.assert_in_step();
        server.wait_for(|_| server.function.events.lock().unwrap().len() == usize::from(VECTORS));
    }

    fn mask(&mut self, vector: u32, masked: bool) {
        let at = TABLE + 16 * u64::from(vector) + 12;
        self.post(BAR0, at, &u32::from(masked).to_le_bytes());
    }

    /// The next message, which must be an interrupt; which vector's.
    fn interrupt(&mut self) -> u32 {
        let (header, body) = self.raw.reply();
        assert_eq!(header.command, Command::DmaWrite as u16);
        assert_eq!(header.flags, NO_REPLY);
        let transfer = DmaTransfer::decode(&body).unwrap();
        assert_eq!((transfer.count, body.len()), (4, DmaTransfer::LEN + 4));
        let data = u32::from_le_bytes(body[16..].try_into().unwrap());
        let vector = data - data_of(0);
        assert_eq!(transfer.address, address_of(vector));
        vector
    }
}

fn address_of(vector: u32) -> u64 {
    0x1_fee0_0000 + 0x1000 * u64::from(vector)
}

fn data_of(vector: u32) -> u32 {
    0x4021 + vector
}

fn capability(server: &Server, id: CapabilityId) -> u64 {
    let read = |at: u16, data: &mut [u8]| server.function.config_read(at, data);
    find_capability(id, read).unwrap().into()
}

fn fire(server: &Server, vector: u32) {
    server.function.fire(InterruptKind::Msix, vector);
}

#[test]
fn qemu_sees_no_msix_and_its_guest_does() {
    let (server, mut guest) = start();
    let at = capability(&server, CapabilityId::Msix) as usize;

    let snapshot = guest.read(CONFIG, 0, 256);
    let whole = guest.read(CONFIG, 0, 4096);
    let part = guest.read(CONFIG, at as u64, 9);

    for seen in [&snapshot[at..], &whole[at..], &part[..]] {
        assert_eq!(seen[0], VENDOR_ID);
    }
    for len in [1, 2, 4, 8] {
        assert_eq!(guest.read(CONFIG, at as u64, len)[0], MSIX_ID);
    }
    assert_eq!(&snapshot[..at], &guest.read(CONFIG, 0, at as u32)[..]);
}

#[test]
fn other_clients_have_msix_to_themselves() {
    for proposed in [CLOUD_HYPERVISOR, OURS, "{}"] {
        let server = server(Msix::Auto);
        let mut guest = greet(&server, proposed);
        let snapshot = guest.read(CONFIG, 0, 256);
        let found = find_msix(|at, data: &mut [u8]| -> Result<(), ()> {
            data.copy_from_slice(&snapshot[at.into()..][..data.len()]);
            Ok(())
        });
        assert_eq!(found.unwrap().1, LAYOUT);
        guest.write(BAR0, TABLE, &[1; 4]);
        server.wait_for(|calls| calls.contains(&Call::RegionWrite(0, TABLE, vec![1; 4])));
    }
}

#[test]
fn choice_of_the_operator_counts_more_than_the_client() {
    for (msix, proposed, id) in [
        (Msix::Irqfd, QEMU, MSIX_ID),
        (Msix::Mediated, CLOUD_HYPERVISOR, VENDOR_ID),
    ] {
        let server = server(msix);
        let mut guest = greet(&server, proposed);
        let at = capability(&server, CapabilityId::Msix);
        assert_eq!(guest.read(CONFIG, at, 16)[0], id);
    }
}

#[test]
fn vector_is_a_write_of_its_data_to_its_address() {
    let (server, mut guest) = start();
    guest.set_up(&server);
    for vector in [0, 3, 39, 3] {
        fire(&server, vector);
        assert_eq!(guest.interrupt(), vector);
    }
    guest.raw.assert_in_step();
}

#[test]
fn table_is_the_servers_and_the_function_sees_nothing_of_it() {
    let (server, mut guest) = start();
    guest.set_up(&server);
    server.function.take_calls();
    guest.write(BAR0, TABLE, &[7; 4]);
    guest.write(BAR0, PBA, &[0xff; 8]);
    let multi: Vec<_> = (0..4u32)
        .map(|dword| MultiWrite {
            offset: TABLE + 16 + 4 * u64::from(dword),
            region: BAR0,
            count: 4,
            data: [0x10 * dword as u8, 0, 0, 0, 0, 0, 0, 0],
        })
        .collect();
    let (header, _) = guest.raw.ask(&command(
        Command::RegionWriteMulti,
        &WriteMulti::encode(&multi),
    ));
    assert!(!header.is_error());
    assert_eq!(guest.read_u32(TABLE), 0x0707_0704);
    assert_eq!(guest.read_u32(TABLE + 16 + 8), 0x20);
    assert_eq!(guest.read(BAR0, PBA, 8), [0; 8]);
    assert!(server.function.take_calls().is_empty());
}

#[test]
fn reads_across_the_tables_edges_show_both_sides() {
    let (server, mut guest) = start();
    guest.write(BAR0, TABLE - 8, &[0xaa; 8]);
    let end = TABLE + 16 * u64::from(VECTORS);
    guest.write(BAR0, end, &[0xbb; 8]);
    guest.set_up(&server);
    let all = guest.read(BAR0, TABLE - 8, 16 * u32::from(VECTORS) + 16);
    assert_eq!(all[..8], [0xaa; 8]);
    assert_eq!(all[8..16], address_of(0).to_le_bytes());
    assert_eq!(all[all.len() - 8..], [0xbb; 8]);
}

#[test]
fn odd_writes_to_the_table_change_nothing() {
    let (server, mut guest) = start();
    guest.set_up(&server);
    for (at, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (0, 16), (0, 3)] {
        guest.write(BAR0, TABLE + at, &vec![0xff; len]);
    }
    fire(&server, 0);
    assert_eq!(guest.interrupt(), 0);
}

#[test]
fn masked_vector_waits_as_a_pending_bit() {
    let (server, mut guest) = start();
    guest.set_up(&server);
    guest.mask(5, true);
    guest.raw.assert_in_step();
    fire(&server, 5);
    fire(&server, 5);
    // The signal goes its own way, beside the socket.
    let end = Instant::now() + PATIENCE;
    while guest.read_u32(PBA) != 1 << 5 {
        assert!(Instant::now() < end);
    }
    guest.mask(5, false);
    assert_eq!(guest.interrupt(), 5);
    assert_eq!(guest.read_u32(PBA), 0);
}

#[test]
fn function_mask_holds_all_vectors_back() {
    let (server, mut guest) = start();
    guest.set_up(&server);
    guest.set_control(&server, ENABLE | FUNCTION_MASK);
    guest.raw.assert_in_step();
    fire(&server, 1);
    fire(&server, 2);
    let end = Instant::now() + PATIENCE;
    while guest.read_u32(PBA) != 0b110 {
        assert!(Instant::now() < end);
    }
    guest.set_control(&server, ENABLE);
    assert_eq!((guest.interrupt(), guest.interrupt()), (1, 2));
}

#[test]
fn reset_and_flr_clear_the_table() {
    let resets: [fn(&Server, &mut Guest); 2] = [
        |_, guest| {
            let (header, _) = guest.raw.ask(&command(Command::DeviceReset, &[]));
            assert!(!header.is_error());
        },
        |server, guest| {
            let control = capability(server, CapabilityId::Express) + 8;
            guest.write(CONFIG, control, &0x8000u16.to_le_bytes());
        },
    ];
    for reset in resets {
        let (server, mut guest) = start();
        guest.set_up(&server);
        reset(&server, &mut guest);
        let entry = guest.read(BAR0, TABLE, 16);
        assert_eq!(entry[..12], [0; 12]);
        assert_eq!(entry[12], 1, "masked");
        guest.set_up(&server);
        fire(&server, 2);
        assert_eq!(guest.interrupt(), 2);
    }
}

#[test]
fn eventfds_for_mediated_vectors_are_refused() {
    let (_server, mut guest) = start();
    let fd = common::eventfd();
    let (action, data) = (IrqAction::Trigger, IrqData::EventFd);
    let ask = SetIrqs {
        index: IRQ_INDEX_MSIX,
        start: 0,
        count: 1,
        action,
        data,
    };
    let ask = command(Command::DeviceSetIrqs, &ask.encode());
    guest.raw.send_fds(&ask, &[common::borrow(&fd)]);
    assert_eq!(guest.raw.errno(), libc::ENOTSUP);
    guest.raw.assert_in_step();
}

#[test]
fn disabling_msix_by_message_changes_nothing() {
    let (server, mut guest) = start();
    guest.set_up(&server);
    let ask = SetIrqs {
        index: IRQ_INDEX_MSIX,
        start: 0,
        count: 0,
        action: IrqAction::Trigger,
        data: IrqData::None,
    };
    let (header, _) = guest
        .raw
        .ask(&command(Command::DeviceSetIrqs, &ask.encode()));
    assert!(!header.is_error());
    fire(&server, 4);
    assert_eq!(guest.interrupt(), 4);
}

/// What a client does not read waits: each vector once, however often it fires.
#[test]
fn client_that_reads_nothing_is_not_flooded() {
    let (server, mut guest) = start();
    guest.set_up(&server);
    let sendable = 200_000;
    for round in 0..sendable {
        fire(&server, round % u32::from(VECTORS));
    }
    // The server has not been held up by it.
    let mut got = 0;
    guest
        .raw
        .send(&command(Command::RegionRead, &region_access(CONFIG, 0, 4)));
    let mut is_answered = false;
    let mut last = std::collections::BTreeSet::new();
    guest
        .raw
        .stream
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut head = [0; 16];
    while std::io::Read::read_exact(&mut guest.raw.stream, &mut head).is_ok() {
        let header = farbus_vfio::user::Header::decode(&head);
        let mut body = vec![0; header.size as usize - 16];
        std::io::Read::read_exact(&mut guest.raw.stream, &mut body).unwrap();
        if header.command == Command::DmaWrite as u16 {
            got += 1;
            last.insert(body[16]);
        } else {
            is_answered = true;
        }
    }
    assert!(is_answered);
    assert!(got < sendable / 10, "{got} messages");
    assert_eq!(last.len(), usize::from(VECTORS), "none is lost");
    guest.raw.assert_in_step();
}

#[test]
fn next_client_begins_with_a_table_of_its_own() {
    let (server, mut guest) = start();
    guest.set_up(&server);
    fire(&server, 1);
    drop(guest);
    server.wait_for(|calls| calls.contains(&Call::Reset));
    assert!(server.function.events.lock().unwrap().is_empty());

    let mut guest = greet(&server, QEMU);
    assert_eq!(guest.read(BAR0, TABLE, 8), [0; 8]);
    guest.set_up(&server);
    fire(&server, 1);
    assert_eq!(guest.interrupt(), 1);
}

#[test]
fn table_beyond_its_bar_is_not_mediated() {
    for (table, pba) in [(BAR0_SIZE - 16, PBA), (TABLE, BAR0_SIZE)] {
        let layout = MsixLayout {
            table: (RegionIndex::BAR0, table),
            pba: (RegionIndex::BAR0, pba),
            ..LAYOUT
        };
        let server = Server::offer(TestFunction::with_msix(layout), Msix::Mediated);
        let mut guest = greet(&server, QEMU);
        let at = capability(&server, CapabilityId::Msix);
        assert_eq!(guest.read(CONFIG, at, 16)[0], MSIX_ID);
    }
}
