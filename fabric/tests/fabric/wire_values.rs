//! Arbitrary messages, commands and completions that are valid.

use farbus_fabric::RemoteSpan;
use farbus_fabric::wire::*;
use proptest::collection::vec;
use proptest::prelude::*;

pub(crate) fn any_message() -> impl Strategy<Value = Message> {
    let label = || "[ -~é]{0,32}".prop_map(|text| Label::new(&text).unwrap());
    let text = || "\\PC{0,100}".prop_map(|text| Text::truncated(&text));
    let data = |min| vec(any::<u8>(), min..=64).prop_map(|bytes| Data::new(&bytes).unwrap());
    let request = || any::<u32>().prop_map(RequestId);
    let config_offset = || 0_u16..4096 - 64;
    let offset = || 0..u64::MAX - 64;
    prop_oneof![
        (any::<u16>(), any::<u16>(), label()).prop_map(|(oldest, newest, label)| {
            Message::Hello {
                oldest,
                newest,
                label,
            }
        }),
        label().prop_map(|label| Message::Welcome {
            version: ProtocolVersion::V1,
            label
        }),
        (any_refusal(), text()).prop_map(|(code, text)| Message::Refused { code, text }),
        "[A-Za-z0-9._-]{1,64}".prop_map(|name| Message::Claim {
            export: ExportName::new(&name).unwrap()
        }),
        (any_slice_name(), any_limits())
            .prop_map(|(export, limits)| Message::ClaimWith { export, limits }),
        (1..=u64::MAX, any::<u32>(), 1..=u16::MAX).prop_map(|(epoch, shadow_len, tags)| {
            Message::Claimed {
                epoch: Epoch(epoch),
                shadow_len,
                tags,
            }
        }),
        Just(Message::Describe),
        any_description().prop_map(|description| Message::Description(Box::new(description))),
        vec(any::<u8>(), 0..500).prop_map(|blob| Message::EngineNotice { blob }),
        proptest::option::of(any_export_name()).prop_map(|after| Message::List { after }),
        any_listing().prop_map(Message::Listing),
        (request(), config_offset(), 1..=64_u16).prop_map(|(request, offset, len)| {
            Message::ConfigRead {
                request,
                offset,
                len,
            }
        }),
        (config_offset(), data(1)).prop_map(|(offset, data)| Message::ConfigWrite { offset, data }),
        (request(), 0..=6_u8, offset(), 1..=8_u8).prop_map(|(request, region, offset, len)| {
            Message::RegisterRead {
                request,
                region,
                offset,
                len,
            }
        }),
        (0..=6_u8, offset(), data(1)).prop_map(|(region, offset, data)| Message::RegisterWrite {
            region,
            offset,
            data
        }),
        (request(), any::<u16>(), data(0)).prop_map(|(request, status, data)| Message::Value {
            request,
            status,
            data
        }),
        (0..=6_u8, offset(), data(1)).prop_map(|(region, offset, data)| Message::RegisterUpdate {
            region,
            offset,
            data
        }),
        (any_interrupt(), any::<u16>())
            .prop_map(|(kind, vector)| Message::Interrupt { kind, vector }),
        request().prop_map(|request| Message::Reset { request }),
        (request(), proptest::option::of(text())).prop_map(|(request, text)| {
            Message::ResetDone {
                request,
                outcome: text.map_or(Ok(()), Err),
            }
        }),
        any::<u64>().prop_map(|nonce| Message::Ping { nonce }),
        any::<u64>().prop_map(|nonce| Message::Pong { nonce }),
        Just(Message::Release),
        Just(Message::Released),
        (any_fault(), text()).prop_map(|(code, text)| Message::Fault { code, text }),
        any_endpoint().prop_map(Message::RdmaOffer),
        any_endpoint().prop_map(|endpoint| Message::RdmaAnswer(Ok(endpoint))),
        text().prop_map(|text| Message::RdmaAnswer(Err(text))),
        proptest::option::of(text()).prop_map(|text| Message::RdmaChoice(text.map_or(Ok(()), Err))),
        vec(any_key(), 1..=64).prop_map(Message::RdmaKeys),
    ]
}

fn any_export_name() -> impl Strategy<Value = ExportName> {
    "[A-Za-z0-9._-]{1,64}".prop_map(|name| ExportName::new(&name).unwrap())
}

fn any_listed() -> impl Strategy<Value = Listed> {
    let label = || "[ -~é]{0,32}".prop_map(|text| Label::new(&text).unwrap());
    let text = || "\\PC{0,60}".prop_map(|text| Text::truncated(&text));
    let state = proptest::sample::select(vec![
        ListedState::Free,
        ListedState::Claimed,
        ListedState::Failed,
        ListedState::Draining,
    ]);
    let ids = (0..1_u32 << 24, any::<u16>(), any::<u16>());
    let strings = (any_export_name(), label(), label(), text(), text());
    let capacity = proptest::option::of(1..=u64::MAX);
    let block_size = proptest::option::of(1..=u32::MAX);
    let numa_node = proptest::option::of(0..u16::MAX);
    (ids, strings, capacity, block_size, numa_node, state).prop_map(
        |(ids, strings, capacity, block_size, numa_node, state)| {
            let (class, vendor, device) = ids;
            let (name, model, serial, holder, why) = strings;
            Listed {
                name,
                class,
                vendor,
                device,
                model,
                serial,
                capacity,
                block_size,
                numa_node,
                state,
                holder,
                why,
            }
        },
    )
}

fn any_listing() -> impl Strategy<Value = Listing> {
    (vec(any_listed(), 0..6), any::<bool>()).prop_map(|(mut entries, more)| {
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries.dedup_by(|a, b| a.name == b.name);
        Listing {
            more: more && !entries.is_empty(),
            entries,
        }
    })
}

fn any_slice_name() -> impl Strategy<Value = ExportName> {
    "[A-Za-z0-9._-]{1,31}/[A-Za-z0-9._-]{1,32}".prop_map(|name| ExportName::new(&name).unwrap())
}

fn any_limits() -> impl Strategy<Value = RateLimits> {
    any::<[u64; 4]>().prop_map(
        |[iops, iops_burst, bytes_per_second, bytes_burst]| RateLimits {
            iops,
            iops_burst,
            bytes_per_second,
            bytes_burst,
        },
    )
}

pub(crate) fn any_endpoint() -> impl Strategy<Value = RdmaEndpoint> {
    let ring = (0..u64::MAX / 2, 18..=24_u32, any::<u32>());
    let pair = (0..1_u32 << 24, 0..1_u32 << 24, 256..=u16::MAX);
    let port = (any::<[u8; 16]>(), any::<u16>(), 8..=12_u32);
    (port, pair, ring).prop_map(
        |((gid, lid, mtu), (queue_pair, first_packet, slots), (ring_address, len, ring_key))| {
            RdmaEndpoint {
                gid,
                lid,
                mtu: 1 << mtu,
                queue_pair,
                first_packet,
                ring_address,
                ring_len: 1 << len,
                ring_key,
                slots,
            }
        },
    )
}

fn any_key() -> impl Strategy<Value = RdmaKey> {
    let range = (0..u64::MAX / 2, 1..u64::MAX / 2);
    (range, any::<u32>(), any::<bool>()).prop_map(|((address, len), key, alive)| RdmaKey {
        address,
        len,
        key,
        alive,
    })
}

fn any_refusal() -> impl Strategy<Value = RefusalCode> {
    prop_oneof![
        Just(RefusalCode::Version),
        Just(RefusalCode::UnknownExport),
        Just(RefusalCode::Busy),
        Just(RefusalCode::NotReady),
        Just(RefusalCode::Malformed),
        Just(RefusalCode::Internal),
        Just(RefusalCode::Provider),
        (8..=u16::MAX).prop_map(RefusalCode::Other),
    ]
}

fn any_interrupt() -> impl Strategy<Value = InterruptKind> {
    prop_oneof![
        Just(InterruptKind::Intx),
        Just(InterruptKind::Msi),
        Just(InterruptKind::Msix)
    ]
}

fn any_fault() -> impl Strategy<Value = FaultCode> {
    prop_oneof![
        Just(FaultCode::Gone),
        Just(FaultCode::Fatal),
        Just(FaultCode::Unresponsive),
        Just(FaultCode::Internal)
    ]
}

fn any_description() -> impl Strategy<Value = Description> {
    let sizes = proptest::array::uniform7(proptest::option::of(1..=u64::MAX));
    let interrupts = (0..=1_u32, 0..=32_u32, 0..=2048_u32);
    let engine = prop_oneof![Just(EngineKind::None), Just(EngineKind::Nvme)];
    let config = vec(any::<u8>(), 256..=4096);
    let blob = vec(any::<u8>(), 0..=2048);
    (config, sizes, interrupts, engine, blob).prop_map(
        |(config, sizes, (intx, msi, msix), engine, blob)| Description {
            config,
            regions: (0..)
                .zip(sizes)
                .filter_map(|(index, size)| size.map(|size| Region { index, size }))
                .collect(),
            interrupts: InterruptCounts { intx, msi, msix },
            engine,
            blob,
        },
    )
}

/// A command with its segments.
#[derive(Clone, Debug)]
pub(crate) struct Command {
    pub(crate) placement: Placement,
    pub(crate) bytes: [u8; 64],
    pub(crate) segments: Vec<RemoteSpan>,
}

pub(crate) fn any_commands() -> impl Strategy<Value = Vec<Command>> {
    let direction = prop_oneof![
        Just(Direction::None),
        Just(Direction::ToDevice),
        Just(Direction::FromDevice)
    ];
    let lens = vec(1..5000_u32, 0..5);
    let command = (
        any::<u16>(),
        any::<u16>(),
        0..0x8000_0000_u32,
        direction,
        lens,
        any::<[u8; 32]>(),
    );
    vec(
        command.prop_map(|(tag, queue, shadow_offset, direction, lens, half)| {
            let mut bytes = [0; 64];
            bytes[16..48].copy_from_slice(&half);
            let segments: Vec<_> = lens
                .iter()
                .filter(|_| direction == Direction::FromDevice)
                .map(|len| RemoteSpan {
                    address: u64::from(*len) << 20,
                    len: *len,
                })
                .collect();
            let data_len = match direction {
                Direction::None => 0,
                Direction::ToDevice => lens.iter().sum::<u32>() + 1,
                Direction::FromDevice if segments.is_empty() => 512,
                Direction::FromDevice => lens.iter().sum(),
            };
            Command {
                placement: Placement {
                    tag: Tag(tag),
                    queue: QueueId(queue),
                    shadow_offset,
                    data_len,
                    direction,
                },
                bytes,
                segments,
            }
        }),
        1..20,
    )
}

pub(crate) fn submit_of(commands: &[Command]) -> SubmitBatch {
    let mut batch = SubmitBatch::new();
    for command in commands {
        batch
            .push(&command.placement, &command.bytes, &command.segments)
            .unwrap();
    }
    batch
}

pub(crate) fn any_completions() -> impl Strategy<Value = Vec<CompleteEntry>> {
    let entry = (
        any::<u16>(),
        any::<u16>(),
        any::<u16>(),
        0..60_000_u32,
        any::<u64>(),
    );
    vec(
        entry.prop_map(|(tag, queue, status, data_len, result)| CompleteEntry {
            tag: Tag(tag),
            queue: QueueId(queue),
            status,
            data_len,
            result,
        }),
        1..=256,
    )
}

pub(crate) fn complete_of(entries: &[CompleteEntry]) -> CompleteBatch {
    let mut batch = CompleteBatch::new();
    entries.iter().for_each(|entry| batch.push(entry).unwrap());
    batch
}
