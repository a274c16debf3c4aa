//! The codes by which messages name reasons and types.

use std::fmt;

use super::WireError;

/// Why the device side declines to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCode {
    /// No common protocol version.
    Version,
    /// No export of that name.
    UnknownExport,
    /// Another claimant has the export.
    Busy,
    /// The export exists but cannot be claimed yet (it starts, or is being reset).
    NotReady,
    /// The compute side broke the protocol.
    Malformed,
    /// The device side failed.
    Internal,
    /// The two sides have no provider in common that both may use.
    Provider,
    /// A reason that a newer device side knows. Refusals come before a version is agreed,
    /// so an unknown one has to be readable.
    Other(u16),
}

impl RefusalCode {
    pub(super) fn from_number(number: u16) -> Self {
        match number {
            1 => RefusalCode::Version,
            2 => RefusalCode::UnknownExport,
            3 => RefusalCode::Busy,
            4 => RefusalCode::NotReady,
            5 => RefusalCode::Malformed,
            6 => RefusalCode::Internal,
            7 => RefusalCode::Provider,
            other => RefusalCode::Other(other),
        }
    }

    pub(super) fn number(self) -> u16 {
        match self {
            RefusalCode::Version => 1,
            RefusalCode::UnknownExport => 2,
            RefusalCode::Busy => 3,
            RefusalCode::NotReady => 4,
            RefusalCode::Malformed => 5,
            RefusalCode::Internal => 6,
            RefusalCode::Provider => 7,
            RefusalCode::Other(number) => number,
        }
    }
}

impl fmt::Display for RefusalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RefusalCode::Version => f.write_str("no common version"),
            RefusalCode::UnknownExport => f.write_str("unknown export"),
            RefusalCode::Busy => f.write_str("busy"),
            RefusalCode::NotReady => f.write_str("not ready"),
            RefusalCode::Malformed => f.write_str("malformed"),
            RefusalCode::Internal => f.write_str("internal"),
            RefusalCode::Provider => f.write_str("no common provider"),
            RefusalCode::Other(number) => write!(f, "code {number}"),
        }
    }
}

macro_rules! codes {
    ($(#[$doc:meta])* $name:ident($repr:ty), $what:literal; $($(#[$vdoc:meta])* $variant:ident = $number:literal,)*) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name {
            $($(#[$vdoc])* $variant = $number,)*
        }

        impl $name {
            pub(super) fn from_number(number: $repr) -> Result<Self, WireError> {
                match number {
                    $($number => Ok($name::$variant),)*
                    _ => Err(WireError::UnknownCode { what: $what, value: number.into() }),
                }
            }
        }
    };
}

codes! {
    /// How a function failed.
    FaultCode(u16), "fault code";
    /// It is no longer there: unplugged, or taken away by its owner.
    Gone = 1,
    /// It reports a state that only a reset, or nothing, ends.
    Fatal = 2,
    /// It does not answer.
    Unresponsive = 3,
    /// The device server itself failed.
    Internal = 4,
}

codes! {
    /// A type of interrupt.
    InterruptKind(u8), "interrupt kind";
    /// The pin.
    Intx = 0,
    /// Message signalled.
    Msi = 1,
    /// Message signalled, extended.
    Msix = 2,
}
