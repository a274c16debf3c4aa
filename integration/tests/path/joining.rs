//! Who may join a claim: only whoever was told its token, into a place that is free, while there
//! is the claim.

use std::net::TcpStream;
use std::time::Duration;

use farbus_fabric::wire::{
    Epoch, Header, Join, JoinToken, Joined, Label, LanePlace, Message, NEWEST, OLDEST, RefusalCode,
    Side, Text,
};
use farbus_fabric::{FabricError, Frame, Link, Received, Sink, Span, TcpLink};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::bed::{Bed, eventually, export_name};

/// A connection whose messages are made by hand.
struct ByHand(TcpLink);

/// The last message.
struct Last(Option<Message>);

impl Sink for Last {
    fn land(&mut self, _: &Header, _: &[u8], _: &mut Vec<Span>) -> Result<(), FabricError> {
        panic!("no payload is expected");
    }

    fn deliver(&mut self, header: &Header, control: &[u8]) -> Result<(), FabricError> {
        self.0 = Some(Message::decode(header, control)?);
        Ok(())
    }
}

impl ByHand {
    /// Greets the device server.
    fn connect(bed: &Bed) -> Self {
        let stream = TcpStream::connect(&bed.address).unwrap();
        let mut this = Self(TcpLink::new(stream, Side::Compute).unwrap());
        let hello = Message::Hello {
            oldest: OLDEST.number(),
            newest: NEWEST.number(),
            label: Label::new("by hand").unwrap(),
        };
        assert!(matches!(this.ask(&hello), Ok(Message::Welcome { .. })));
        this
    }

    fn send(&mut self, message: &Message) {
        let mut control = Vec::new();
        let header = message.encode(&mut control).unwrap();
        self.0.send(&Frame::plain(header, &control)).unwrap();
    }

    /// The answer, or the end of the connection.
    fn ask(&mut self, message: &Message) -> Result<Message, FabricError> {
        self.send(message);
        self.receive()
    }

    fn receive(&mut self) -> Result<Message, FabricError> {
        let mut last = Last(None);
        loop {
            match self.0.receive(&mut last)? {
                Received::Message => return Ok(last.0.unwrap()),
                Received::Idle => {
                    let limit = Timespec::try_from(Duration::from_secs(20)).unwrap();
                    let fd = PollFd::from_borrowed_fd(self.0.descriptor(), PollFlags::IN);
                    assert_eq!(poll(&mut [fd], Some(&limit)).unwrap(), 1, "no answer");
                }
            }
        }
    }

    /// Claims the export with so many lanes; its epoch and token.
    fn claim(&mut self, lanes: u16) -> (Epoch, JoinToken) {
        let export = export_name();
        let Ok(Message::Claimed { epoch, .. }) = self.ask(&Message::Claim { export }) else {
            panic!("not claimed");
        };
        self.0.set_epoch(epoch);
        let wanted = Message::Join(Join {
            epoch,
            place: LanePlace { lane: 0, lanes },
            token: JoinToken::NONE,
        });
        let Ok(Message::Joined(Joined { place, token })) = self.ask(&wanted) else {
            panic!("no lanes");
        };
        assert_eq!(place, LanePlace { lane: 0, lanes });
        (epoch, token)
    }

    /// Asks to be a lane.
    fn join(bed: &Bed, epoch: Epoch, lane: u16, lanes: u16, token: JoinToken) -> Outcome {
        let mut this = Self::connect(bed);
        let join = Join {
            epoch,
            place: LanePlace { lane, lanes },
            token,
        };
        match this.ask(&Message::Join(join)).unwrap() {
            Message::Joined(joined) => {
                assert_eq!(joined.place, join.place);
                this.0.set_epoch(epoch);
                Ok(this)
            }
            Message::Refused { code, text } => Err((code, text)),
            other => panic!("{other:?}"),
        }
    }
}

type Outcome = Result<ByHand, (RefusalCode, Text)>;

/// Why it was refused, in the server's words.
fn refusal(outcome: Outcome) -> (RefusalCode, String) {
    match outcome {
        Err((code, text)) => (code, text.as_str().to_owned()),
        Ok(_) => panic!("it has joined"),
    }
}

#[test]
fn strangers_and_mistakes_are_refused_and_the_claim_does_not_notice() {
    let bed = Bed::start("size=1MiB");
    let mut claim = ByHand::connect(&bed);
    let (epoch, token) = claim.claim(3);
    let guess = JoinToken([7; 16]);

    let (code, text) = refusal(ByHand::join(&bed, epoch, 1, 3, guess));
    assert_eq!(code, RefusalCode::NotReady, "{text}");
    let (code, text) = refusal(ByHand::join(&bed, Epoch(epoch.0 - 1), 1, 3, token));
    assert_eq!(code, RefusalCode::Malformed, "{text}");
    assert!(text.contains(&epoch.to_string()), "{text}");
    for (lane, lanes) in [(3, 4), (1, 2), (7, 8)] {
        let (code, text) = refusal(ByHand::join(&bed, epoch, lane, lanes, token));
        assert_eq!(code, RefusalCode::Malformed, "{text}");
        assert!(text.contains("3 lanes"), "{text}");
    }
    let first = ByHand::join(&bed, epoch, 1, 3, token).ok().unwrap();
    let (_, text) = refusal(ByHand::join(&bed, epoch, 1, 3, token));
    assert!(text.contains("lane 1 is taken"), "{text}");

    // The claim goes on, and the place that is left can still be had.
    assert!(matches!(
        claim.ask(&Message::Describe),
        Ok(Message::Description(_))
    ));
    let second = ByHand::join(&bed, epoch, 2, 3, token).ok().unwrap();
    drop((first, second));
}

#[test]
fn a_claim_that_was_given_back_cannot_be_joined() {
    let bed = Bed::start("size=1MiB");
    let mut claim = ByHand::connect(&bed);
    let (epoch, token) = claim.claim(2);
    assert!(matches!(
        claim.ask(&Message::Describe),
        Ok(Message::Description(_))
    ));
    claim.send(&Message::Release);
    let refused = eventually("the claim has ended", || {
        match ByHand::join(&bed, epoch, 1, 2, token) {
            Ok(_) => None,
            Err((code, _)) => (code == RefusalCode::NotReady).then_some(code),
        }
    });
    assert_eq!(refused, RefusalCode::NotReady);
}

#[test]
fn the_end_of_one_lane_is_the_end_of_the_claim() {
    let bed = Bed::start("size=1MiB");
    let mut claim = ByHand::connect(&bed);
    let (epoch, token) = claim.claim(3);
    assert!(matches!(
        claim.ask(&Message::Describe),
        Ok(Message::Description(_))
    ));
    let mut lanes: Vec<_> = (1..3)
        .map(|lane| ByHand::join(&bed, epoch, lane, 3, token).ok().unwrap())
        .collect();
    for lane in &mut lanes {
        assert!(matches!(
            lane.ask(&Message::Describe),
            Ok(Message::Description(_))
        ));
    }

    drop(lanes.pop());

    for survivor in [&mut claim, &mut lanes[0]] {
        // A sign of life may come before the end.
        while survivor.receive().is_ok() {}
    }
    drop(bed.claim_when_free());
}

#[test]
fn a_lane_that_breaks_the_protocol_ends_the_claim() {
    let bed = Bed::start("size=1MiB");
    let mut claim = ByHand::connect(&bed);
    let (epoch, token) = claim.claim(2);
    assert!(matches!(
        claim.ask(&Message::Describe),
        Ok(Message::Description(_))
    ));
    let mut lane = ByHand::join(&bed, epoch, 1, 2, token).ok().unwrap();
    assert!(matches!(
        lane.ask(&Message::Describe),
        Ok(Message::Description(_))
    ));

    // Registers are lane 0's.
    lane.send(&Message::RegisterRead {
        request: farbus_fabric::wire::RequestId(1),
        region: 0,
        offset: 0,
        len: 4,
    });

    while lane.receive().is_ok() {}
    while claim.receive().is_ok() {}
    drop(bed.claim_when_free());
}
