//! The datagrams between a worker and the keeper: small JSON objects, with descriptors beside
//! them. Neither side trusts the other to keep to this; everything is bounded before it is looked at.

use serde::{Deserialize, Serialize};

/// The version of what is said here. A worker of another one is refused: the daemon then starts
/// one of its own version.
pub const VERSION: u32 = 1;
/// Longest datagram, in bytes.
pub const MAX_DATAGRAM: usize = 8 << 10;
/// Most descriptors with one datagram.
pub const MAX_FDS: usize = 32;
/// Longest key, in bytes.
pub const MAX_KEY: usize = 48;
/// Longest id of an attachment, in bytes.
pub const MAX_ID: usize = 63;
/// Longest reason, in bytes; what is longer is cut.
pub const MAX_REASON: usize = 512;

/// A datagram that is none of ours.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// It is longer than any may be.
    #[error("a datagram of custody has more than {MAX_DATAGRAM} bytes")]
    TooLong,
    /// It does not mean anything.
    #[error("a datagram of custody cannot be understood")]
    Malformed(#[from] serde_json::Error),
    /// Its descriptors do not fit what it says.
    #[error(
        "a datagram of custody names {keys} descriptors and has {fds}; at most {MAX_FDS} can be"
    )]
    Descriptors {
        /// Those that it names.
        keys: usize,
        /// Those that came with it.
        fds: usize,
    },
    /// A name or a reason that cannot be.
    #[error("{0:?} is no name for an attachment or a descriptor")]
    Name(String),
}

/// Names a descriptor among those of one attachment: 1 to 48 of `a-z`, `0-9` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key(String);

impl Key {
    /// The name, if it can be one.
    pub fn new(name: &str) -> Result<Self, MessageError> {
        let possible = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        if (1..=MAX_KEY).contains(&name.len()) && name.bytes().all(possible) {
            return Ok(Self(name.to_owned()));
        }
        Err(MessageError::Name(cut(name)))
    }

    /// A name that the program has chosen; that it can be one is for tests to see to.
    pub(super) fn fixed(name: &'static str) -> Self {
        debug_assert!(Self::new(name).is_ok());
        Self(name.to_owned())
    }

    /// A name and a number.
    pub fn numbered(name: &'static str, number: u64) -> Self {
        Self(format!("{name}-{number}"))
    }

    /// The number behind a name, if this is of that name.
    pub fn number_of(&self, name: &str) -> Option<u64> {
        self.0.strip_prefix(name)?.strip_prefix('-')?.parse().ok()
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Key {
    type Error = MessageError;

    fn try_from(name: String) -> Result<Self, MessageError> {
        Self::new(&name)
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        key.0
    }
}

/// Whether an attachment can have this id: `[a-z0-9][a-z0-9._-]{0,62}`.
pub fn is_id(id: &str) -> bool {
    let letter = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let rest = |c: u8| letter(c) || matches!(c, b'.' | b'_' | b'-');
    id.len() <= MAX_ID && id.bytes().next().is_some_and(letter) && id.bytes().all(rest)
}

fn cut(text: &str) -> String {
    text.chars().take(MAX_ID).collect()
}

/// The link to the device server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// It carries I/O.
    Up,
    /// It is being replaced; I/O waits.
    Down,
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case", deny_unknown_fields)]
pub enum FromWorker {
    /// Its first words.
    Hello {
        /// The version that it speaks.
        version: u32,
        /// The attachment that it carries.
        id: String,
        /// Its process id.
        pid: u32,
        /// It has everything and the keeper has changed: what is held is replaced by what
        /// it hands over now. Otherwise it wants what is held.
        live: bool,
    },
    /// Hold these; the descriptors are beside it. One of the same key is replaced.
    Keep {
        /// Their names, in the order of the descriptors.
        keys: Vec<Key>,
    },
    /// These are no longer needed.
    Forget {
        /// Their names.
        keys: Vec<Key>,
    },
    /// A VMM can connect, or is served again.
    Ready,
    /// How the link is.
    State {
        /// Up or down.
        link: Link,
        /// Why it is down.
        reason: Option<String>,
    },
    /// It ends in order: nothing is to be held any more.
    Bye,
}

/// What the keeper says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case", deny_unknown_fields)]
pub enum FromKeeper {
    /// The answer to [`FromWorker::Hello`]: so many descriptors are held and follow.
    Welcome {
        /// How many.
        held: usize,
    },
    /// Some of them, beside it.
    Held {
        /// Their names, in the order of the descriptors.
        keys: Vec<Key>,
    },
    /// The worker is not to go on.
    Refused {
        /// Why.
        reason: String,
    },
    /// End in order.
    Stop,
}

/// A datagram that says how many descriptors come with it.
pub trait Datagram: Sized {
    /// Its bytes.
    fn encode(&self) -> Vec<u8>;
    /// From its bytes, and the number of descriptors that came with them.
    fn decode(bytes: &[u8], fds: usize) -> Result<Self, MessageError>;
}

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Text and numbers only, in types without maps: there is nothing that cannot be written.
    serde_json::to_vec(message).unwrap_or_default()
}

fn parse<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, MessageError> {
    if bytes.len() > MAX_DATAGRAM {
        return Err(MessageError::TooLong);
    }
    Ok(serde_json::from_slice(bytes)?)
}

fn matching(keys: usize, fds: usize) -> Result<(), MessageError> {
    if keys != fds || fds > MAX_FDS {
        return Err(MessageError::Descriptors { keys, fds });
    }
    Ok(())
}

impl Datagram for FromWorker {
    fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    fn decode(bytes: &[u8], fds: usize) -> Result<Self, MessageError> {
        let mut message = parse(bytes)?;
        match &mut message {
            Self::Keep { keys } => matching(keys.len(), fds)?,
            _ => matching(0, fds)?,
        }
        match &mut message {
            Self::Hello { id, .. } if !is_id(id) => return Err(MessageError::Name(cut(id))),
            Self::State {
                reason: Some(reason),
                ..
            } => shorten(reason),
            _ => {}
        }
        Ok(message)
    }
}

impl Datagram for FromKeeper {
    fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    fn decode(bytes: &[u8], fds: usize) -> Result<Self, MessageError> {
        let message = parse(bytes)?;
        match &message {
            Self::Held { keys } => matching(keys.len(), fds)?,
            _ => matching(0, fds)?,
        }
        Ok(message)
    }
}

/// Decodes `bytes` as both sides would, the first byte being the number of descriptors; what is
/// understood must be understood again. It must come to its end whatever the bytes are.
pub fn fuzz(bytes: &[u8]) {
    let Some((fds, bytes)) = bytes.split_first() else {
        return;
    };
    if let Ok(message) = FromWorker::decode(bytes, (*fds).into()) {
        let again = FromWorker::decode(&message.encode(), (*fds).into());
        assert!(again.is_ok_and(|again| again == message));
    }
    if let Ok(message) = FromKeeper::decode(bytes, (*fds).into()) {
        assert!(message.encode().len() > 2);
    }
}

/// Cuts a reason to what a datagram has room for.
pub fn shorten(reason: &mut String) {
    let mut len = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(len) {
        len -= 1;
    }
    reason.truncate(len);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> impl Strategy<Value = Key> {
        "[a-z0-9-]{1,48}".prop_map(|name| Key::new(&name).unwrap())
    }

    fn said() -> impl Strategy<Value = FromWorker> {
        let keys = || proptest::collection::vec(key(), 0..=MAX_FDS);
        prop_oneof![
            ("[a-z0-9][a-z0-9._-]{0,62}", any::<u32>(), any::<bool>()).prop_map(
                |(id, pid, live)| FromWorker::Hello {
                    version: VERSION,
                    id,
                    pid,
                    live
                }
            ),
            keys().prop_map(|keys| FromWorker::Keep { keys }),
            keys().prop_map(|keys| FromWorker::Forget { keys }),
            Just(FromWorker::Ready),
            proptest::option::of(".{0,100}").prop_map(|reason| FromWorker::State {
                link: Link::Down,
                reason
            }),
            Just(FromWorker::Bye),
        ]
    }

    fn fds_of(message: &FromWorker) -> usize {
        match message {
            FromWorker::Keep { keys } => keys.len(),
            _ => 0,
        }
    }

    proptest! {
        #[test]
        fn what_a_worker_says_is_what_is_heard(message in said()) {
            let bytes = message.encode();
            prop_assert!(bytes.len() <= MAX_DATAGRAM);
            prop_assert_eq!(FromWorker::decode(&bytes, fds_of(&message)).unwrap(), message);
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), fds in 0usize..100,
        ) {
            let _ = FromWorker::decode(&bytes, fds);
            let _ = FromKeeper::decode(&bytes, fds);
        }

        #[test]
        fn descriptors_that_nobody_named_are_an_error(message in said(), fds in 0usize..100) {
            prop_assume!(fds != fds_of(&message));
            prop_assert!(FromWorker::decode(&message.encode(), fds).is_err());
        }
    }

    #[test]
    fn a_long_datagram_is_refused_before_it_is_parsed() {
        let bytes = vec![b' '; MAX_DATAGRAM + 1];
        let refused = FromWorker::decode(&bytes, 0);
        assert!(matches!(refused, Err(MessageError::TooLong)));
    }

    #[test]
    fn names_that_could_be_paths_are_refused() {
        for id in ["", "../x", "a/b", "A", ".a", &"a".repeat(64)] {
            assert!(!is_id(id), "{id:?}");
        }
        assert!(Key::new("a/b").is_err());
        assert!(is_id("disk0.a_b-c"));
    }

    #[test]
    fn a_key_knows_its_number() {
        let key = Key::numbered("memory", 7);
        assert_eq!(key.number_of("memory"), Some(7));
        assert_eq!(key.number_of("mem"), None);
        assert_eq!(Key::new("memory-").unwrap().number_of("memory"), None);
    }

    #[test]
    fn a_long_reason_is_cut_between_characters() {
        let reason = Some("ä".repeat(MAX_REASON));
        let link = Link::Down;
        let bytes = FromWorker::State { link, reason }.encode();
        let heard = FromWorker::decode(&bytes, 0).unwrap();
        assert!(
            matches!(heard, FromWorker::State { reason: Some(r), .. } if r.len() == MAX_REASON)
        );
    }
}
