//! The protocol's numbers, each a type of its own so that no two can be swapped.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $word:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($word, " {}"), self.0)
            }
        }
    };
}

id!(
    /// Numbers the claims of an export; rises at every claim. 0 before there is a claim.
    Epoch(u64),
    "epoch"
);
id!(
    /// Names an outstanding command; below the number granted at claim.
    Tag(u16),
    "tag"
);
id!(
    /// A queue of the device, as its engine numbers them.
    QueueId(u16),
    "queue"
);
id!(
    /// Pairs an answer with its request; the requester chooses it.
    RequestId(u32),
    "request"
);

impl Epoch {
    /// The epoch of a connection that is not claimed.
    pub const NONE: Epoch = Epoch(0);
}
