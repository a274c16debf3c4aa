//! Writes the committed seeds: for each target a few short stories that a fuzzer would take
//! long to come upon. `cargo run --example seeds`, in this directory; the same bytes each time.

use std::fs;
use std::path::Path;

use farbus_fabric::ring::{Consumed, Prefix};
use farbus_fabric::wire::{
    CompleteBatch, CompleteEntry, Data, Direction, Epoch, ExportName, Header, Kind, Label, Listed,
    ListedState, Listing, Message, Placement, QueueId, RdmaEndpoint, RdmaKey, RequestId,
    SubmitBatch, Tag, Text,
};
use farbus_fuzz::{device, guest};
use farbus_vfio::config::{BarKind, ConfigImage, MsixLayout};
use farbus_vfio::{RegionIndex, nvme};

type Seed = (&'static str, Vec<u8>);

fn main() -> std::io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds");
    for (target, seeds) in [
        ("vfio_user_session", vfio_user()),
        ("fabric_frame", fabric()),
        ("nvme_guest", guest_scripts()),
        ("nvme_device", device_scripts()),
        ("shared_portion", portion_scripts()),
        ("config_space", config()),
        ("vhost_user_request", chains()),
        ("vhost_user_iotlb", translations()),
        ("cloud_hypervisor_answer", answers()),
        ("rdma_ring", ring()),
        ("custody_message", custody()),
    ] {
        let folder = root.join(target);
        fs::create_dir_all(&folder)?;
        for (name, bytes) in seeds {
            fs::write(folder.join(name), bytes)?;
        }
    }
    Ok(())
}

/// What a worker says to the daemon, behind the number of its descriptors.
fn custody() -> Vec<Seed> {
    let said = |fds: u8, text: &str| [&[fds][..], text.as_bytes()].concat();
    vec![
        (
            "hello",
            said(
                0,
                r#"{"say":"hello","version":1,"id":"disk0","pid":7,"live":true}"#,
            ),
        ),
        (
            "keep",
            said(2, r#"{"say":"keep","keys":["memory-0","msix-3"]}"#),
        ),
        (
            "state",
            said(0, r#"{"say":"state","link":"down","reason":"cut"}"#),
        ),
        ("held", said(1, r#"{"say":"held","keys":["controller"]}"#)),
    ]
}

/// What a VMM says of its IOMMU: first address, size, user address, access, kind.
fn translations() -> Vec<Seed> {
    let said = |all: &[(u64, u64, u64, u8, u8)]| {
        let one = |&(first, size, user, access, kind): &(u64, u64, u64, u8, u8)| {
            let words = [first, size, user].map(u64::to_ne_bytes).concat();
            [words, vec![access, kind], vec![0; 6]].concat()
        };
        all.iter().flat_map(one).collect()
    };
    vec![
        (
            "cut_in_the_middle",
            said(&[(0, 200, 0x7000, 3, 2), (50, 20, 0, 0, 3), (60, 4, 9, 1, 2)]),
        ),
        (
            "over_two_ends",
            said(&[(10, 20, 100, 1, 2), (40, 20, 200, 2, 2), (20, 30, 0, 0, 3)]),
        ),
        (
            "all_at_once",
            said(&[
                (3, 0xffff_ffff_ffff_fffd, 0, 3, 2),
                (7, u64::MAX, 0, 0, 3),
                (1, 9, 4, 3, 2),
                (0, 0, 0, 0, 3),
            ]),
        ),
    ]
}

/// What cloud-hypervisor says of a VM, and of a request that it has done.
fn answers() -> Vec<Seed> {
    let info = r#"{"config": {"memory": {"size": 1073741824, "shared": true, "zones": [{"id": "z", "shared": false}]},
        "disks": [{"id": "farbus-d0", "vhost_user": true}], "user_devices": [{"id": "farbus-d0"}]},
        "state": "Running", "device_tree": {"farbus-d0": {"id": "farbus-d0", "pci_bdf": "0000:00:05.0"}}}"#;
    let described = format!(
        "HTTP/1.1 200 \r\nServer: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{info}",
        info.len()
    );
    vec![
        ("info", described.into_bytes()),
        ("done", b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()),
    ]
}

/// A vfio-user message: header and body as little-endian dwords.
fn message(command: u16, no_reply: bool, dwords: &[u32]) -> Vec<u8> {
    let body: Vec<u8> = dwords.iter().flat_map(|d| d.to_le_bytes()).collect();
    vfio_user_message(command, no_reply, &body)
}

fn vfio_user_message(command: u16, no_reply: bool, body: &[u8]) -> Vec<u8> {
    const NO_REPLY: u32 = 1 << 4;
    let mut bytes = [1u16.to_le_bytes(), command.to_le_bytes()].concat();
    bytes.extend((16 + body.len() as u32).to_le_bytes());
    bytes.extend((if no_reply { NO_REPLY } else { 0 }).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(body);
    bytes
}

fn vfio_user() -> Vec<Seed> {
    let capabilities = b"\0\0\x01\0{\"capabilities\":{\"max_msg_fds\":8,\"write_multiple\":true,\
        \"max_data_xfer_size\":1048576,\"pgsizes\":4096}}\0";
    let hello = vfio_user_message(1, false, capabilities);
    let conversation = |messages: &[Vec<u8>]| {
        let whole = [vec![255], hello.clone(), messages.concat()];
        whole.concat()
    };
    let ask = [
        message(4, false, &[16, 0, 0, 0]),
        message(5, false, &[32, 0, 0, 0, 0, 0, 0, 0]),
        message(5, false, &[32, 0, 7, 0, 0, 0, 0, 0]),
        message(7, false, &[16, 0, 2, 0]),
    ];
    let access = [
        message(9, false, &[0, 0, 7, 4]),
        message(10, false, &[4, 0, 7, 4, 6]),
        message(10, true, &[0x14, 0, 0, 4, 0x46_0001]),
        message(9, false, &[0x1c, 0, 0, 4]),
        message(
            15,
            true,
            &[2, 0, 0x1000, 0, 0, 4, 1, 0, 0x1004, 0, 0, 4, 1, 0],
        ),
    ];
    let memory = [
        message(2, false, &[32, 3, 0, 0, 0x10_0000, 0, 0x1000, 0]),
        message(3, false, &[24, 0, 0x10_0000, 0, 0x1000, 0]),
        message(3, false, &[24, 2, 0, 0, 0, 0]),
    ];
    let interrupts = [
        message(8, false, &[20, 0x24, 2, 0, 0]),
        message(8, false, &[20, 0x09, 2, 0, 1]),
        message(8, false, &[24, 0x12, 2, 0, 4, 0x0101_0101]),
        message(8, false, &[20, 0x21, 2, 0, 1]),
        message(13, false, &[]),
    ];
    // The guest sets vector 1 up, masks it, looks at its pending bit, and resets the function.
    let mediated = [
        message(9, false, &[0, 0, 7, 256]),
        message(9, false, &[0x40, 0, 7, 4]),
        message(10, false, &[4, 0, 7, 4, 6]),
        message(10, true, &[0x2010, 0, 0, 4, 0xfee0_1000]),
        message(10, true, &[0x2018, 0, 0, 8, 0x4021, 0]),
        message(10, false, &[0x40, 0, 7, 4, 0x8000_0000]),
        message(10, true, &[0x201c, 0, 0, 4, 1]),
        message(9, false, &[0x3000, 0, 0, 8]),
        message(10, true, &[0x201c, 0, 0, 4, 0]),
        message(10, false, &[0x40, 0, 7, 4, 0xc000_0000]),
        message(10, false, &[0x54, 0, 7, 4, 0x8000]),
        message(9, false, &[0x1ff8, 0, 0, 32]),
    ];
    vec![
        ("mediated", conversation(&mediated)),
        ("ask", conversation(&ask)),
        ("access", conversation(&access)),
        ("memory", conversation(&memory)),
        ("interrupts", conversation(&interrupts)),
    ]
}

fn plain(message: &Message, epoch: u64) -> Vec<u8> {
    let mut control = Vec::new();
    let header = message.encode(&mut control).expect("a message");
    frame(header, epoch, &control, &[])
}

fn frame(header: Header, epoch: u64, control: &[u8], payload: &[u8]) -> Vec<u8> {
    let epoch = Epoch(epoch);
    [&Header { epoch, ..header }.encode()[..], control, payload].concat()
}

fn fabric() -> Vec<Seed> {
    const EPOCH: u64 = 7;
    // Bit 0: the device side. Bit 1: not claimed. From bit 4 on, the length of pieces.
    let (to_compute, to_device, set_up) = (0x80, 0x81, 0x83);
    let hello = Message::Hello {
        oldest: 1,
        newest: 1,
        label: Label::truncated("seed"),
    };
    let mut submit = SubmitBatch::new();
    let placement = Placement {
        tag: Tag(1),
        queue: QueueId(1),
        shadow_offset: 0,
        data_len: 100,
        direction: Direction::ToDevice,
    };
    submit.push(&placement, &[1; 64], &[]).expect("room");
    let mut complete = CompleteBatch::new();
    let entry = CompleteEntry {
        tag: Tag(1),
        queue: QueueId(1),
        status: 0,
        data_len: 64,
        result: 5,
    };
    complete.push(&entry).expect("room");
    let write = Message::RegisterWrite {
        region: 0,
        offset: 0x14,
        data: Data::new(&[1, 0, 0x46, 0]).expect("short"),
    };
    let endpoint = RdmaEndpoint {
        gid: [1; 16],
        lid: 0,
        mtu: 1024,
        queue_pair: 17,
        first_packet: 7,
        ring_address: 0x1000,
        ring_len: RdmaEndpoint::MIN_RING,
        ring_key: 5,
        slots: RdmaEndpoint::MIN_SLOTS,
    };
    let key = RdmaKey {
        address: 0x1000,
        len: 0x1000,
        key: 3,
        alive: true,
    };
    let name = ExportName::new("disk0").expect("a name");
    let listing = Message::Listing(Listing {
        entries: vec![Listed {
            name: name.clone(),
            class: 0x01_0802,
            vendor: 0x1b36,
            device: 0x0010,
            model: Label::truncated("model"),
            serial: Label::truncated("serial"),
            capacity: Some(1 << 30),
            block_size: Some(512),
            numa_node: None,
            state: ListedState::Claimed,
            holder: Text::truncated("somebody"),
            why: Text::default(),
        }],
        more: true,
    });
    let list = Message::List { after: Some(name) };
    let ping = Message::Ping { nonce: 9 };
    let reset = Message::Reset {
        request: RequestId(1),
    };
    let done = Message::ResetDone {
        request: RequestId(1),
        outcome: Ok(()),
    };
    vec![
        ("hello", [vec![set_up], plain(&hello, 0)].concat()),
        (
            "list",
            [vec![set_up], plain(&list, 0), plain(&list, 0)].concat(),
        ),
        ("listing", [vec![0x82], plain(&listing, 0)].concat()),
        (
            "rdma",
            [
                vec![to_device],
                plain(&Message::RdmaOffer(endpoint), EPOCH),
                plain(&Message::RdmaChoice(Ok(())), EPOCH),
                plain(&Message::RdmaKeys(vec![key; 2]), EPOCH),
            ]
            .concat(),
        ),
        (
            "submit",
            [
                vec![to_device],
                plain(&write, EPOCH),
                frame(submit.header(), EPOCH, submit.control(), &[0xaa; 100]),
                plain(&reset, EPOCH),
            ]
            .concat(),
        ),
        (
            "complete",
            [
                vec![to_compute],
                frame(complete.header(), EPOCH, complete.control(), &[0x55; 64]),
                plain(&ping, EPOCH),
                plain(&done, EPOCH),
            ]
            .concat(),
        ),
    ]
}

fn config() -> Vec<Seed> {
    let layout = MsixLayout {
        vectors: 8,
        table: (RegionIndex::BAR0, 0x2000),
        pba: (RegionIndex::BAR0, 0x3000),
    };
    let image = ConfigImage::new(0x4642, 1, nvme::PCI_CLASS)
        .bar(0, BarKind::Memory64)
        .power_management()
        .msix(layout)
        .express()
        .build();
    // One region, index 0, of 2^14 bytes; an image of 256 bytes.
    let mut script = vec![1, 0, 14, 0];
    let dwords = image[..256].chunks_exact(4).enumerate();
    let set: Vec<_> = dwords.filter(|(_, dword)| *dword != [0; 4]).collect();
    script.push(set.len() as u8);
    for (index, dword) in set {
        script.push(index as u8 * 4);
        script.extend(dword);
    }
    // Command register, then the first BAR: offset, length, write, value.
    script.extend([4, 0, 2, 0, 6, 0]);
    script.extend([0x10, 0, 4, 0, 0xff, 0xff, 0xff, 0xff]);
    vec![("nvme", script)]
}

fn guest_scripts() -> Vec<Seed> {
    use guest::step::*;
    // Found by fuzzing: the device stops being ready while the guest disables it.
    let left_ready = vec![
        0x00, 0x00, 0x33, 0x33, 0x3d, 0x32, 0x9e, 0x9e, 0x33, 0x60, 0x33, 0x33, 0x33, 0x8c, 0x8c,
        0x8c, 0x8c, 0x8c, 0x00, 0x25, 0x9e, 0x01, 0x00, 0x00, 0x01, 0x32, 0x32, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    ];
    // Sizes of 64 entries at the usual place; queue 1 of 16 entries.
    let ready = vec![BRING_UP, 0, 0, 0, CREATE_QUEUES, 1, 0, 0, 0];
    let with = |steps: &[&[u8]]| [ready.clone(), steps.concat()].concat();
    // Queue 1: three times 8 blocks of namespace 1, by two pages.
    let read: &[u8] = &[COMMANDS, 1, 2, 0, 0, 0, 0, 1, 7];
    let write: &[u8] = &[COMMANDS, 1, 2, 1, 0, 0, 2, 3, 7];
    // 24 pages of namespace 2 by a list in page 32.
    let list: &[u8] = &[PRP_LIST, 32, 30, 0, 0, 4];
    let long: &[u8] = &[COMMANDS, 1, 0, 0, 0, 1, 0, 32, 11];
    let complete: &[u8] = &[COMPLETE, 0, 31, 0, 0];
    let serve: &[u8] = &[SERVE, 7];
    let consume: &[u8] = &[CONSUME, 1, 3];
    let cut: &[u8] = &[CUT, SERVE, 1];
    let reconnect: &[u8] = &[RECONNECT, 0];
    let delete: &[u8] = &[COMMANDS, 0, 0, 6, 0, 0, 0, 0, 1];
    let shutdown: &[u8] = &[WRITE_REGISTER, 0, 0, 1, 0x40, 0x46, 0];
    let disable: &[u8] = &[WRITE_REGISTER, 0, 0, 0, 0, 0x46, 0];
    let events: &[u8] = &[INTERRUPTS, 0, 0, 1, 8, 0, INTERRUPTS, 1, 1, 1];
    let split: &[u8] = &[NETWORK, 0, 2];
    let unmap: &[u8] = &[UNMAP, 192, 0, 255];
    // Two completions by tag, and a fatal status of CSTS.
    let forged: &[u8] = &[
        INJECT, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0,
    ];
    let fatal: &[u8] = &[DEVICE_STATUS, 1, SERVE, 4];
    // The admin ring full of what no controller has.
    let nonsense: &[u8] = &[COMMANDS, 0, 255, 0, 1, 255, 0xff, 0, 0, 0, 0];
    vec![
        (
            "read_and_write",
            with(&[events, read, write, serve, complete, serve, consume]),
        ),
        ("lists", with(&[list, long, serve, complete, serve])),
        (
            "link_lost",
            with(&[
                read, write, serve, cut, reconnect, serve, serve, complete, serve,
            ]),
        ),
        (
            "reset_under_load",
            with(&[read, serve, &[RESET], serve, complete, serve]),
        ),
        (
            "shutdown",
            with(&[delete, serve, shutdown, serve, disable, serve]),
        ),
        (
            "taken_back",
            with(&[split, read, serve, complete, serve, unmap, serve]),
        ),
        ("forged", with(&[read, serve, forged, serve, fatal])),
        ("nonsense", with(&[nonsense, serve])),
        ("left_ready", left_ready),
    ]
}

fn device_scripts() -> Vec<Seed> {
    use device::step::*;
    let plain: &[u8] = &[1, CONFIGURE, 0, SERVE];
    // Identify data of its own, with a namespace of 4096 bytes and host memory wanted.
    let strange: &[u8] = &[
        0, 1, 2, 77, 0, 4, 0x12, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 7, 0,
        7, 0, CONFIGURE, 0, SERVE,
    ];
    let queues: &[u8] = &[CREATE_QUEUES, 1, 16, 15, 0, 0, 0, 0, 1, SERVE];
    // Two reads of 8 blocks: queue, opcode, flags, namespace, mptr, blocks, kind, page, tag.
    let reads: &[u8] = &[
        SUBMIT, 1, 1, 0, 0, 1, 0, 7, 0, 0, 2, 1, 0, 0, 1, 0, 15, 0, 4, 3, SERVE,
    ];
    let write: &[u8] = &[SUBMIT, 0, 1, 1, 0, 1, 0, 63, 0, 8, 4, SERVE];
    let identify: &[u8] = &[SUBMIT, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 40, 9, SERVE];
    let complete: &[u8] = &[COMPLETE, 0, 31, 0, 0, SERVE];
    let forge: &[u8] = &[FORGE, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, SERVE];
    let reset: &[u8] = &[RESET, 1, SERVE, CONFIGURE, 0, SERVE];
    let gone: &[u8] = &[DEVICE, 5, TICK, SERVE, CONFIGURE, 170, SERVE];
    let ask: &[u8] = &[ACCESS, 1, 0, 0, 0, 0, 4, ACCESS, 2, 0, 0, 1, 4, SERVE];
    let ping = Kind::ALL.iter().position(|kind| *kind == Kind::Ping);
    let ping = ping.expect("a kind") as u8;
    let any: &[u8] = &[FRAME, ping, 8, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, SERVE];
    vec![
        (
            "read_and_write",
            [plain, queues, reads, write, complete].concat(),
        ),
        (
            "strange",
            [strange, identify, queues, reads, complete].concat(),
        ),
        ("forged", [plain, queues, reads, forge, forge].concat()),
        (
            "reset",
            [plain, queues, reads, reset, queues, reads, complete].concat(),
        ),
        ("gone", [plain, queues, reads, gone].concat()),
        ("ask", [plain, ask, identify, any].concat()),
    ]
}

fn portion_scripts() -> Vec<Seed> {
    use farbus_fuzz::shared::step::*;
    // Queue, opcode, flags, id, namespace, two addresses, distance from the end, kind of address, dword 12.
    let io = |opcode: u8, page: u8, near: i8, lba: u8, blocks: u8| {
        let start = [COMMAND, 0, opcode, 0, 1, 0, page, 0, 0, page + 1, 0, 0];
        [&start[..], &[near as u8, lba, blocks, 0, 0, 0]].concat()
    };
    let go: &[u8] = &[RING, 1, SERVICE];
    let (read, write, zeroes, ranges) = (2, 1, 8, 9);
    let delete: &[u8] = &[
        COMMAND, 1, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, RING, 0,
    ];
    let range: &[u8] = &[SCRIBBLE, 0, 10, 0, 0, 0, 0, 0, 2, 0, 0, 0, 63, 0, 0, 0];
    vec![
        (
            "ends",
            [
                io(write, 8, -1, 1, 0),
                io(read, 8, 0, 1, 0),
                io(zeroes, 8, -1, 1, 1),
                go.to_vec(),
            ]
            .concat(),
        ),
        (
            "foreign",
            [io(write, 16, 0, 0, 0), io(read, 15, 0, 0, 15), go.to_vec()].concat(),
        ),
        (
            "ranges",
            [range.to_vec(), io(ranges, 10, 0, 0, 0), go.to_vec()].concat(),
        ),
        (
            "restarted",
            [
                io(write, 8, -8, 1, 7),
                vec![RING, 1, RESET, ENABLE],
                io(read, 8, -8, 1, 7),
                go.to_vec(),
            ]
            .concat(),
        ),
        (
            "deleted",
            [
                io(read, 9, 0, 0, 3),
                delete.to_vec(),
                go.to_vec(),
                vec![7, SERVICE],
            ]
            .concat(),
        ),
    ]
}

/// Chains of a virtio block device: the head, then memory with the descriptor table at its
/// beginning and headers at 0x100.
fn chains() -> Vec<Seed> {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
        let ends = [flags.to_le_bytes(), next.to_le_bytes()].concat();
        [&address.to_le_bytes()[..], &len.to_le_bytes(), &ends].concat()
    };
    let header =
        |kind: u32, sector: u64| [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let image = |table: &[Vec<u8>], header: &[u8]| {
        let mut bytes = vec![0];
        bytes.extend(table.concat());
        bytes.resize(1 + 0x100, 0);
        bytes.extend(header);
        bytes
    };
    let plain = [
        descriptor(0x100, 16, NEXT, 1),
        descriptor(0x1000, 4096, NEXT | WRITE, 2),
        descriptor(0x1_0000, 0x2000, NEXT | WRITE, 3),
        descriptor(0x120, 1, WRITE, 0),
    ];
    let odd = [
        descriptor(0x100, 5, NEXT, 1),
        descriptor(0x105, 11 + 300, NEXT, 2),
        descriptor(0x1001, 724, NEXT, 3),
        descriptor(0x120, 1, WRITE, 0),
    ];
    let mut indirect = vec![descriptor(0x80, 48, INDIRECT, 0)];
    indirect.extend((1..8).map(|_| vec![0; 16]));
    indirect.extend([
        descriptor(0x100, 16, NEXT, 1),
        descriptor(0x2200, 1024, NEXT | WRITE, 2),
        descriptor(0x120, 1, WRITE, 0),
    ]);
    let ranges = [
        descriptor(0x100, 16, NEXT, 1),
        descriptor(0x200, 32, NEXT, 2),
        descriptor(0x120, 1, WRITE, 0),
    ];
    vec![
        ("read", image(&plain, &header(0, 3))),
        ("write_in_odd_pieces", image(&odd, &header(1, 3))),
        ("indirect", image(&indirect, &header(0, 0))),
        ("discard", image(&ranges, &header(11, 0))),
        (
            "loop",
            image(&[descriptor(0x100, 16, NEXT, 0)], &header(0, 0)),
        ),
    ]
}

/// Messages both ways, each in its place, heard, consumed and acknowledged; until both rings have
/// wrapped around.
fn ring() -> Vec<Seed> {
    let hear = |len: u32| {
        let prefix = Prefix {
            consumed: Consumed::default(),
            len,
        };
        [&[0, 1][..], &prefix.encode()].concat()
    };
    let send = |len: u16| [&[3][..], &len.to_le_bytes()].concat();
    let (acknowledge, consume) = (vec![1, 1], vec![2]);
    let round = [hear(9000), send(9000), consume, acknowledge].concat();
    vec![("rounds", round.repeat(9)), ("full", send(9000).repeat(9))]
}
