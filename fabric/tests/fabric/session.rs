//! Set-up: what it agrees on, whom it turns away, and that nobody can make it wait.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use farbus_fabric::session::client::{ClaimedLink, claim, claim_over};
use farbus_fabric::session::server::{ClaimRequest, Incoming};
use farbus_fabric::wire::*;
use farbus_fabric::{FabricError, Link, TcpLink};

use super::support::*;

/// Long enough for any exchange that goes on.
const LONG: Duration = Duration::from_secs(20);
/// Long enough to show that time is what ends the wait.
const SHORT: Duration = Duration::from_millis(60);

fn description() -> Description {
    Description {
        config: pattern(5, 256),
        regions: vec![
            Region {
                index: 0,
                size: 0x4000,
            },
            Region {
                index: 4,
                size: 0x1000,
            },
        ],
        interrupts: InterruptCounts {
            intx: 1,
            msi: 0,
            msix: 17,
        },
        engine: EngineKind::Nvme,
        blob: pattern(6, 4096),
    }
}

fn export() -> ExportName {
    ExportName::new("disk0").unwrap()
}

fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

fn next_claim(stream: TcpStream, deadline: Duration) -> Result<ClaimRequest, FabricError> {
    Incoming::handshake(stream, "server", deadline)?.next_claim()
}

fn serve(stream: TcpStream, deadline: Duration) -> Result<Box<dyn Link>, FabricError> {
    next_claim(stream, deadline)?
        .grant(EPOCH, 1 << 20, 64)?
        .describe(description())
}

fn claim_from(address: &str, deadline: Duration) -> Result<ClaimedLink, FabricError> {
    claim(address, &export(), "agent", deadline)
}

fn client_over(stream: TcpStream, deadline: Duration) -> Result<ClaimedLink, FabricError> {
    let link = TcpLink::new(stream, Side::Compute).unwrap();
    claim_over(Box::new(link), &export(), "agent", deadline)
}

#[test]
fn a_claim_yields_what_the_server_grants_and_a_link_of_that_epoch() {
    let (listener, address) = listener();
    let server = thread::spawn(move || {
        let incoming = Incoming::handshake(listener.accept().unwrap().0, "server", LONG).unwrap();
        assert_eq!(incoming.peer().as_str(), "agent");
        assert_eq!(incoming.version(), ProtocolVersion::V3);
        let request = incoming.next_claim().unwrap();
        assert_eq!(request.export(), &export());
        let granted = request.grant(EPOCH, 1 << 20, 64).unwrap();
        granted.describe(description()).unwrap()
    });

    let mut claimed = claim_from(&address, LONG).unwrap();
    let mut server = server.join().unwrap();

    assert_eq!(claimed.epoch, EPOCH);
    assert_eq!((claimed.shadow_len, claimed.tags), (1 << 20, 64));
    assert_eq!(claimed.description, description());
    assert_eq!(claimed.peer.as_str(), "server");
    assert_eq!(claimed.version, ProtocolVersion::V3);

    let mut sink = Recorder::new(0x1000, 0x1000);
    send_message(&mut *claimed.link, &Message::Ping { nonce: 1 }).unwrap();
    receive(&mut *server, &mut sink).unwrap();
    send_message(&mut *server, &Message::Pong { nonce: 1 }).unwrap();
    receive(&mut *claimed.link, &mut sink).unwrap();
    assert!(sink.frames.iter().all(|(header, _)| header.epoch == EPOCH));
}

#[test]
fn a_server_may_be_given_by_name() {
    let (listener, address) = listener();
    let port = address.rsplit(':').next().unwrap().to_owned();
    let server = thread::spawn(move || serve(listener.accept().unwrap().0, LONG).map(drop));
    let claimed = claim_from(&format!("localhost:{port}"), LONG);
    assert!(claimed.is_ok(), "{:?}", claimed.err());
    server.join().unwrap().unwrap();
}

#[test]
fn refusals_reach_the_client_with_their_reason() {
    for (code, retry) in [
        (RefusalCode::UnknownExport, false),
        (RefusalCode::Busy, true),
        (RefusalCode::NotReady, true),
        (RefusalCode::Internal, true),
    ] {
        let (one, other) = sockets();
        let server = thread::spawn(move || next_claim(other, LONG)?.refuse(code, "no, sorry"));
        let error = client_over(one, LONG).err().unwrap();
        server.join().unwrap().unwrap();
        assert_eq!(error.should_reconnect(), retry);
        match error {
            FabricError::Refused { code: got, text } => {
                assert_eq!((got, text.as_str()), (code, "no, sorry"));
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_claim_can_be_refused_before_it_is_asked_for_and_after_it_is_granted() {
    let (one, other) = sockets();
    let server = thread::spawn(move || {
        Incoming::handshake(other, "server", LONG)?.refuse(RefusalCode::NotReady, "starting")
    });
    let early = client_over(one, LONG).err().unwrap();
    server.join().unwrap().unwrap();
    assert!(matches!(early, FabricError::Refused { .. }), "{early}");

    let (one, other) = sockets();
    let server = thread::spawn(move || {
        next_claim(other, LONG)?
            .grant(EPOCH, 4096, 1)?
            .refuse(RefusalCode::Internal, "the function does not answer")
    });
    let late = client_over(one, LONG).err().unwrap();
    server.join().unwrap().unwrap();
    assert!(matches!(late, FabricError::Refused { .. }), "{late}");
}

/// Sends bytes to a server and returns its error and what it answered.
fn answer_to(bytes: &[u8]) -> (FabricError, Vec<u8>) {
    let (mut one, other) = sockets();
    one.write_all(bytes).unwrap();
    let error = serve(other, LONG).err().unwrap();
    let mut answer = Vec::new();
    one.read_to_end(&mut answer).unwrap_or_default();
    (error, answer)
}

fn refusal_in(answer: &[u8]) -> RefusalCode {
    match decode_frame(answer).unwrap().1 {
        Body::Message(Message::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

fn hello(oldest: u16, newest: u16) -> Vec<u8> {
    let message = Message::Hello {
        oldest,
        newest,
        label: Label::new("raw").unwrap(),
    };
    message_bytes_of(&message, Epoch::NONE)
}

#[test]
fn a_peer_of_another_version_is_told_so() {
    let (error, answer) = answer_to(&hello(4, 9));
    assert_eq!(refusal_in(&answer), RefusalCode::Version);
    assert_eq!(
        error.to_string(),
        "the peer broke the protocol: the compute side speaks versions 4 to 9, \
         the device side 1 to 3"
    );
}

#[test]
fn a_peer_of_another_magic_is_told_so() {
    let mut bytes = hello(1, 1);
    bytes[24..32].copy_from_slice(b"notfabus");
    let (error, answer) = answer_to(&bytes);
    assert_eq!(refusal_in(&answer), RefusalCode::Malformed);
    assert!(matches!(
        error,
        FabricError::Malformed(WireError::Magic(magic)) if &magic == b"notfabus"
    ));
}

#[test]
fn commands_before_the_claim_are_refused() {
    let mut batch = SubmitBatch::new();
    let placement = Placement {
        tag: Tag(0),
        queue: QueueId(0),
        shadow_offset: 0,
        data_len: 0,
        direction: Direction::None,
    };
    batch.push(&placement, &[0; 64], &[]).unwrap();
    let submit = [&header_bytes(batch.header(), Epoch::NONE), batch.control()].concat();

    let (error, answer) = answer_to(&submit);

    assert_eq!(refusal_in(&answer), RefusalCode::Malformed);
    assert!(matches!(
        error,
        FabricError::Malformed(WireError::WrongPhase { .. })
    ));
}

#[test]
fn messages_out_of_turn_are_refused() {
    let claim = message_bytes_of(&Message::Claim { export: export() }, Epoch::NONE);
    let (error, answer) = answer_to(&claim);
    assert_eq!(refusal_in(&answer), RefusalCode::Malformed);
    assert!(matches!(error, FabricError::Violation { .. }), "{error}");

    let (error, _) = answer_to(&[hello(1, 1), hello(1, 1)].concat());
    assert!(matches!(error, FabricError::Violation { .. }), "{error}");
}

/// Everything that a client sends during set-up.
fn client_stream() -> Vec<u8> {
    [
        hello(1, 1),
        message_bytes_of(&Message::Claim { export: export() }, Epoch::NONE),
        message_bytes(&Message::Describe),
    ]
    .concat()
}

/// Everything that a server sends during set-up.
fn server_stream() -> Vec<u8> {
    let welcome = Message::Welcome {
        version: ProtocolVersion::V1,
        label: Label::new("raw").unwrap(),
    };
    let claimed = Message::Claimed {
        epoch: EPOCH,
        shadow_len: 4096,
        tags: 8,
    };
    let small = Description {
        blob: Vec::new(),
        ..description()
    };
    [
        message_bytes_of(&welcome, Epoch::NONE),
        message_bytes_of(&claimed, Epoch::NONE),
        message_bytes(&Message::Description(Box::new(small))),
    ]
    .concat()
}

#[test]
fn a_client_that_leaves_at_any_byte_is_noticed() {
    let stream = client_stream();
    for cut in 0..stream.len() {
        let (one, other) = sockets();
        write_and_close(one, stream[..cut].to_vec());
        let error = serve(other, LONG).err().unwrap();
        assert!(error.should_reconnect(), "cut at {cut}: {error}");
    }
}

#[test]
fn a_server_that_leaves_at_any_byte_is_noticed() {
    let stream = server_stream();
    for cut in 0..stream.len() {
        let (one, mut other) = sockets();
        other.write_all(&stream[..cut]).unwrap();
        other.shutdown(std::net::Shutdown::Write).unwrap();
        let error = client_over(one, LONG).err().unwrap();
        assert!(error.should_reconnect(), "cut at {cut}: {error}");
    }
}

#[test]
fn a_server_that_talks_nonsense_is_not_asked_again() {
    let good = server_stream();
    let mut magic = good.clone();
    magic[24] ^= 1;
    let mut version = good.clone();
    version[32] = 9;
    let mut epoch = good;
    let description = epoch.len() - 24 - (24 + 256 + 32);
    epoch[description + 16] ^= 1;
    let early = message_bytes_of(
        &Message::Claimed {
            epoch: EPOCH,
            shadow_len: 1,
            tags: 1,
        },
        Epoch::NONE,
    );
    for stream in [magic, version, epoch, early] {
        let (one, mut other) = sockets();
        other.write_all(&stream).unwrap();
        let error = client_over(one, LONG).err().unwrap();
        assert!(!error.should_reconnect(), "{error}");
    }
}

fn assert_timeout<T>(started: Instant, result: Result<T, FabricError>) {
    let error = result.err().unwrap();
    assert!(
        matches!(error, FabricError::Timeout { after, .. } if after == SHORT),
        "{error}"
    );
    assert!(error.should_reconnect());
    let took = started.elapsed();
    assert!(took >= SHORT && took < LONG, "{took:?}");
}

#[test]
fn a_silent_client_is_dropped_at_the_deadline_wherever_it_falls_silent() {
    let stream = client_stream();
    for sent in [0, 1, 24, hello(1, 1).len(), stream.len() - 1] {
        let (mut one, other) = sockets();
        one.write_all(&stream[..sent]).unwrap();
        let started = Instant::now();
        assert_timeout(started, serve(other, SHORT));
    }
}

#[test]
fn a_silent_server_is_given_up_at_the_deadline() {
    // Never accepted: the kernel completes the connection by itself.
    let (_listener, address) = listener();
    let started = Instant::now();
    assert_timeout(started, claim_from(&address, SHORT));

    let stream = server_stream();
    for sent in [1, stream.len() - 1] {
        let (one, mut other) = sockets();
        other.write_all(&stream[..sent]).unwrap();
        let started = Instant::now();
        assert_timeout(started, client_over(one, SHORT));
    }
}

/// Sends a byte every now and then until told to stop.
fn dribble(mut socket: TcpStream, stream: Vec<u8>) -> (mpsc::Sender<()>, thread::JoinHandle<()>) {
    let (stop, stopped) = mpsc::channel();
    let writer = thread::spawn(move || {
        for byte in stream {
            let go_on = stopped.recv_timeout(SHORT / 20).is_err();
            if !go_on || socket.write_all(&[byte]).is_err() {
                break;
            }
        }
    });
    (stop, writer)
}

#[test]
fn a_peer_that_sends_a_byte_now_and_then_gains_no_time() {
    let (one, other) = sockets();
    let (stop, writer) = dribble(one, client_stream());
    let started = Instant::now();
    assert_timeout(started, serve(other, SHORT));
    stop.send(()).unwrap_or_default();
    writer.join().unwrap();

    let (one, other) = sockets();
    let (stop, writer) = dribble(other, server_stream());
    let started = Instant::now();
    assert_timeout(started, client_over(one, SHORT));
    stop.send(()).unwrap_or_default();
    writer.join().unwrap();
}

#[test]
fn time_that_the_server_itself_needs_is_not_the_clients_fault() {
    let (one, other) = sockets();
    let client = thread::spawn(move || client_over(one, LONG).map(drop));
    let deadline = Duration::from_millis(500);
    let request = next_claim(other, deadline).unwrap();
    // A reset that takes longer than the peer was given for its part.
    let (_sender, never) = mpsc::channel::<()>();
    never.recv_timeout(deadline + SHORT).unwrap_err();
    let link = request.grant(EPOCH, 4096, 1).unwrap();
    assert!(link.describe(description()).is_ok());
    client.join().unwrap().unwrap();
}

#[test]
fn a_server_that_is_not_there_is_worth_another_attempt() {
    let (listener, address) = listener();
    drop(listener);
    let error = claim_from(&address, LONG).err().unwrap();
    assert!(matches!(error, FabricError::Io { .. }), "{error}");
    assert!(error.should_reconnect());
}

#[test]
fn an_address_that_is_none_is_not() {
    for address in ["", "127.0.0.1", "host:port", "127.0.0.1:99999"] {
        let error = claim_from(address, LONG).err().unwrap();
        assert!(matches!(error, FabricError::Resolve { .. }), "{error}");
        assert!(!error.should_reconnect());
    }
}

#[test]
fn a_label_that_is_too_long_is_refused_before_anything_is_sent() {
    let error = claim("127.0.0.1:1", &export(), &"x".repeat(65), LONG)
        .err()
        .unwrap();
    assert!(matches!(error, FabricError::Malformed(_)), "{error}");
}
