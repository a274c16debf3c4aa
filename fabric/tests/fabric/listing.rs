//! Asking what there is: pages, their order, and peers that break the rules of it.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use farbus_fabric::session::client::list_over;
use farbus_fabric::session::server::{Incoming, Request};
use farbus_fabric::wire::*;
use farbus_fabric::{FabricError, TcpLink};

use super::support::*;

const LONG: Duration = Duration::from_secs(20);

fn name(number: usize) -> ExportName {
    ExportName::new(&format!("disk{number:04}")).unwrap()
}

fn listed(number: usize) -> Listed {
    Listed {
        name: name(number),
        class: 0x01_0802,
        vendor: 0x1b36,
        device: 0x0010,
        model: Label::new("model").unwrap(),
        serial: Label::new("serial").unwrap(),
        capacity: Some(1 << 30),
        block_size: Some(512),
        numa_node: Some(1),
        state: ListedState::Claimed,
        holder: Text::new(&"h".repeat(Text::MAX)).unwrap(),
        why: Text::default(),
    }
}

fn ask(stream: TcpStream) -> Result<Vec<Listed>, FabricError> {
    let link = TcpLink::new(stream, Side::Compute).unwrap();
    list_over(Box::new(link), "agent", LONG)
}

/// Answers questions out of `exports` until the peer has gone, and counts them.
fn answer_all(stream: TcpStream, exports: &[Listed]) -> usize {
    let mut incoming = Incoming::handshake(stream, "server", LONG).unwrap();
    let mut answers = 0;
    while let Ok(Request::List(request)) = incoming.next_request() {
        let after = request.after().cloned();
        let rest = exports
            .iter()
            .filter(|export| after.as_ref().is_none_or(|after| export.name > *after));
        incoming = request.answer(rest.cloned()).unwrap();
        answers += 1;
    }
    answers
}

#[test]
fn what_does_not_fit_one_answer_is_asked_for_again() {
    for count in [0, 1, 500] {
        let exports: Vec<Listed> = (0..count).map(listed).collect();
        let (one, other) = sockets();
        let held = exports.clone();
        let server = thread::spawn(move || answer_all(other, &held));

        let got = ask(one).unwrap();

        assert_eq!(got, exports);
        let len = 24 + 5 * 2 + 8 + 5 + 6 + Text::MAX;
        let per_page = (MAX_CONTROL - 4) / len;
        assert_eq!(server.join().unwrap(), count.div_ceil(per_page).max(1));
    }
}

#[test]
fn a_peer_that_asks_may_claim_afterwards() {
    let (one, mut other) = sockets();
    let hello = Message::Hello {
        oldest: 1,
        newest: 3,
        label: Label::default(),
    };
    let claim = Message::Claim { export: name(0) };
    for message in [hello, Message::List { after: None }, claim] {
        let bytes = message_bytes_of(&message, Epoch::NONE);
        other.write_all(&bytes).unwrap();
    }
    let incoming = Incoming::handshake(one, "server", LONG).unwrap();
    let Request::List(request) = incoming.next_request().unwrap() else {
        panic!("no question");
    };
    let incoming = request.answer([listed(0)]).unwrap();
    assert!(matches!(
        incoming.next_request().unwrap(),
        Request::Claim(request) if *request.export() == name(0)
    ));
}

/// A device server that says what it was told to, whatever it is asked.
fn ask_one_that_says(version: ProtocolVersion, pages: &[Listing]) -> FabricError {
    let (one, mut other) = sockets();
    let welcome = Message::Welcome {
        version,
        label: Label::new("old server").unwrap(),
    };
    let mut bytes = message_bytes_of(&welcome, Epoch::NONE);
    for page in pages {
        let page = Message::Listing(page.clone());
        bytes.extend(message_bytes_of(&page, Epoch::NONE));
    }
    other.write_all(&bytes).unwrap();
    ask(one).unwrap_err()
}

#[test]
fn an_older_device_server_is_named_and_not_asked_again() {
    let error = ask_one_that_says(ProtocolVersion::V2, &[]);
    assert_eq!(
        error.to_string(),
        "old server speaks version 2 of the protocol and a listing of its exports needs 3; update it"
    );
    assert!(!error.should_reconnect());
}

#[test]
fn an_older_peer_that_asks_is_sent_away() {
    let (one, mut other) = sockets();
    let hello = Message::Hello {
        oldest: 1,
        newest: 2,
        label: Label::default(),
    };
    for message in [hello, Message::List { after: None }] {
        let bytes = message_bytes_of(&message, Epoch::NONE);
        other.write_all(&bytes).unwrap();
    }
    let incoming = Incoming::handshake(one, "server", LONG).unwrap();
    let error = incoming.next_request().err().unwrap();
    assert!(matches!(error, FabricError::Violation { .. }), "{error}");
}

#[test]
fn pages_that_go_back_are_a_violation_and_not_a_loop() {
    let page = Listing {
        entries: vec![listed(3)],
        more: true,
    };
    let error = ask_one_that_says(ProtocolVersion::V3, &[page.clone(), page]);
    assert!(matches!(error, FabricError::Violation { .. }), "{error}");
}

#[test]
fn values_that_a_decoder_would_refuse_are_not_encoded() {
    let entry = || listed(1);
    for (entries, more) in [
        (vec![], true),
        (vec![listed(2), listed(1)], false),
        (vec![listed(1), listed(1)], false),
        (
            vec![Listed {
                class: 1 << 24,
                ..entry()
            }],
            false,
        ),
        (
            vec![Listed {
                capacity: Some(0),
                ..entry()
            }],
            false,
        ),
        (
            vec![Listed {
                block_size: Some(0),
                ..entry()
            }],
            false,
        ),
        (
            vec![Listed {
                numa_node: Some(u16::MAX),
                ..entry()
            }],
            false,
        ),
        ((0..200).map(listed).collect(), false),
    ] {
        let mut out = Vec::new();
        let message = Message::Listing(Listing { entries, more });
        assert!(message.encode(&mut out).is_err(), "{message:?}");
        assert!(out.is_empty());
    }
}

/// `docs/protocol.md`, Listing.
#[test]
fn a_listing_has_the_bytes_of_the_table() {
    let entry = Listed {
        holder: Text::new("h").unwrap(),
        ..listed(7)
    };
    let mut control = Vec::new();
    let listing = Listing {
        entries: vec![entry],
        more: true,
    };
    Message::Listing(listing).encode(&mut control).unwrap();
    assert_eq!(
        control,
        [
            &[1, 0, 1, 0][..],
            &[0, 0, 0, 0x40, 0, 0, 0, 0, 0, 2, 0, 0, 2, 8, 1, 0],
            &[0x36, 0x1b, 0x10, 0, 1, 0, 1, 0],
            b"\x08\0disk0007\x05\0model\x06\0serial\x01\0h\0\0",
        ]
        .concat()
    );
}

#[test]
fn absurd_counts_and_codes_are_refused() {
    let mut control = Vec::new();
    let listing = Listing {
        entries: vec![listed(1)],
        more: false,
    };
    let header = Message::Listing(listing).encode(&mut control).unwrap();
    for (at, value) in [(0, 2), (1, 0xff), (2, 2), (26, 4), (27, 1)] {
        let mut changed = control.clone();
        changed[at] = value;
        assert!(Message::decode(&header, &changed).is_err(), "{at}");
    }
}
