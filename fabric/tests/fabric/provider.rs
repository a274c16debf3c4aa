//! The choice between RDMA and TCP, as far as it can be shown without an RDMA device: who falls back
//! to TCP, who does not, and that a peer of the first version is served as before. With devices:
//! `integration/tests/rdma.rs`.

use std::net::{TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use farbus_fabric::provider::{Choice, Options, Provider, Wanted};
use farbus_fabric::session::client::{ClaimedLink, claim_by};
use farbus_fabric::session::server::Incoming;
use farbus_fabric::wire::*;
use farbus_fabric::{FabricError, Link, TcpLink};

use super::support::*;

const LONG: Duration = Duration::from_secs(20);

/// A device that no host has, so that the outcome is the same on all.
fn no_device(wanted: Wanted) -> Options {
    Options {
        wanted,
        device: Some("no-such-device".to_owned()),
        gid_index: None,
    }
}

fn description() -> Description {
    Description {
        config: vec![0; 256],
        regions: Vec::new(),
        interrupts: InterruptCounts::default(),
        engine: EngineKind::None,
        blob: Vec::new(),
    }
}

type Served = Result<(Box<dyn Link>, Choice), FabricError>;

fn server(options: Options) -> (String, JoinHandle<Served>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serve = move || {
        let stream = listener.accept().unwrap().0;
        Incoming::handshake(stream, "server", LONG)?
            .next_claim()?
            .grant(EPOCH, 1 << 20, 64)?
            .describe_by(description(), &options)
    };
    (address, thread::spawn(serve))
}

fn claim(address: &str, options: &Options) -> Result<ClaimedLink, FabricError> {
    let export = ExportName::new("disk0").unwrap();
    claim_by(address, &export, "agent", LONG, options)
}

fn endpoint() -> RdmaEndpoint {
    RdmaEndpoint {
        gid: [0; 16],
        lid: 0,
        mtu: 1024,
        queue_pair: 17,
        first_packet: 7,
        ring_address: 0x1000,
        ring_len: RdmaEndpoint::MIN_RING,
        ring_key: 5,
        slots: RdmaEndpoint::MIN_SLOTS,
    }
}

/// A compute side that speaks versions up to `newest` and has its claim; what comes next is said
/// by hand.
fn claimed_by_hand(address: &str, newest: u16) -> TcpLink {
    let stream = TcpStream::connect(address).unwrap();
    let mut link = TcpLink::new(stream, Side::Compute).unwrap();
    let hello = Message::Hello {
        oldest: 1,
        newest,
        label: Label::default(),
    };
    let export = ExportName::new("disk0").unwrap();
    for message in [hello, Message::Claim { export }] {
        send_message(&mut link, &message).unwrap();
        hear(&mut link);
    }
    link.set_epoch(EPOCH);
    link
}

fn hear(link: &mut TcpLink) -> Message {
    let mut sink = Recorder::new(0x1000, 0x1000);
    receive(link, &mut sink).unwrap();
    let (header, control) = sink.frames.remove(0);
    Message::decode(&header, &control).unwrap()
}

#[test]
fn without_a_device_tcp_is_used_and_the_reason_known() {
    for theirs in [Wanted::Auto, Wanted::Tcp] {
        let (address, server) = server(no_device(theirs));
        let claimed = claim(&address, &no_device(Wanted::Auto)).unwrap();
        let (link, choice) = server.join().unwrap().unwrap();
        assert_eq!(claimed.provider.provider, Provider::Tcp);
        assert!(
            claimed.provider.to_string().contains("RDMA"),
            "{}",
            claimed.provider
        );
        assert_eq!(choice.provider, Provider::Tcp);
        assert!(!link.is_one_sided() && !claimed.link.is_one_sided());
    }
}

#[test]
fn who_insists_on_rdma_gets_no_tcp() {
    let (address, server) = server(no_device(Wanted::Auto));
    let error = claim(&address, &no_device(Wanted::Verbs)).err().unwrap();
    assert!(
        error.to_string().starts_with("RDMA cannot be used: "),
        "{error}"
    );
    assert!(error.should_reconnect(), "a device may come back");
    assert!(server.join().unwrap().is_err());
}

#[test]
fn a_device_side_that_insists_refuses_and_says_so() {
    let (address, server) = server(no_device(Wanted::Verbs));
    let error = claim(&address, &Options::tcp()).err().unwrap();
    assert!(
        matches!(
            error,
            FabricError::Refused {
                code: RefusalCode::Provider,
                ..
            }
        ),
        "{error}"
    );
    assert!(!error.should_reconnect());
    assert!(server.join().unwrap().is_err());
}

#[test]
fn a_compute_side_of_the_first_version_is_served_over_tcp() {
    let (address, server) = server(no_device(Wanted::Auto));
    let mut link = claimed_by_hand(&address, 1);
    send_message(&mut link, &Message::Describe).unwrap();
    assert!(matches!(hear(&mut link), Message::Description(_)));
    assert_eq!(server.join().unwrap().unwrap().1.provider, Provider::Tcp);
}

#[test]
fn offers_are_no_part_of_the_first_version() {
    let (address, server) = server(no_device(Wanted::Auto));
    let mut link = claimed_by_hand(&address, 1);
    send_message(&mut link, &Message::RdmaOffer(endpoint())).unwrap();
    assert!(matches!(hear(&mut link), Message::Refused { .. }));
    assert!(server.join().unwrap().is_err());
}

#[test]
fn an_offer_that_cannot_be_taken_is_answered_with_the_reason() {
    for (options, why) in [
        (no_device(Wanted::Auto), "RDMA"),
        (Options::tcp(), "it is told to use TCP"),
    ] {
        let (address, server) = server(options);
        let mut link = claimed_by_hand(&address, 2);
        send_message(&mut link, &Message::RdmaOffer(endpoint())).unwrap();
        let Message::RdmaAnswer(Err(text)) = hear(&mut link) else {
            panic!("no refusal");
        };
        assert!(text.as_str().contains(why), "{text}");
        send_message(&mut link, &Message::Describe).unwrap();
        assert!(matches!(hear(&mut link), Message::Description(_)));
        assert_eq!(server.join().unwrap().unwrap().1.provider, Provider::Tcp);
    }
}

#[test]
fn a_second_offer_is_refused() {
    let (address, server) = server(no_device(Wanted::Auto));
    let mut link = claimed_by_hand(&address, 2);
    for _ in 0..2 {
        send_message(&mut link, &Message::RdmaOffer(endpoint())).unwrap();
    }
    assert!(matches!(hear(&mut link), Message::RdmaAnswer(Err(_))));
    assert!(matches!(hear(&mut link), Message::Refused { .. }));
    assert!(server.join().unwrap().is_err());
}

#[test]
fn providers_are_named_by_words() {
    for wanted in [Wanted::Auto, Wanted::Verbs, Wanted::Tcp] {
        assert_eq!(wanted.to_string().parse(), Ok(wanted));
    }
    assert!("rdma".parse::<Wanted>().is_err());
}
