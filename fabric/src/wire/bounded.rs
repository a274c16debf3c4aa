//! Values of bounded length: names, labels, texts and the data of a register access.
//!
//! Their constructors check, so that a message made of them can always be encoded.

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use super::WireError;
use super::codec::in_range;

/// The name of an export: 1 to 64 characters out of `A-Z a-z 0-9 . _ -`. That of a slice of a
/// shared export is the export's, a slash, and the slice's own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExportName(String);

impl ExportName {
    /// Longest name in bytes.
    pub const MAX: usize = 64;

    /// Checks a name.
    pub fn new(name: &str) -> Result<Self, WireError> {
        in_range(
            "the length of an export name",
            name.len(),
            1,
            Self::MAX as u64,
        )?;
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let own = match name.split_once('/') {
            Some((export, slice)) if !export.is_empty() && !slice.is_empty() => export.len(),
            _ => name.len(),
        };
        let mut bytes = name.bytes().enumerate().filter(|(at, _)| *at != own);
        match bytes.find(|(_, byte)| !allowed(*byte)) {
            Some((at, byte)) => Err(WireError::ExportNameByte { byte, at }),
            None => Ok(ExportName(name.to_owned())),
        }
    }

    /// The name of one of its slices.
    pub fn slice(&self, slice: &str) -> Result<Self, WireError> {
        Self::new(&format!("{}/{slice}", self.0))
    }

    /// Whether it is the name of a slice.
    pub fn is_slice(&self) -> bool {
        self.0.contains('/')
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ExportName {
    type Err = WireError;

    fn from_str(name: &str) -> Result<Self, WireError> {
        ExportName::new(name)
    }
}

impl fmt::Display for ExportName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! bounded_string {
    ($(#[$doc:meta])* $name:ident, $max:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
        pub struct $name(String);

        impl $name {
            /// Greatest length in bytes.
            pub const MAX: usize = $max;

            /// Takes a string as long as it fits whole.
            pub fn new(text: &str) -> Result<Self, WireError> {
                in_range(concat!("the length of ", $what), text.len(), 0, $max)?;
                Ok($name(text.to_owned()))
            }

            /// Takes as much of a string as fits, whole characters only.
            pub fn truncated(text: &str) -> Self {
                let mut end = text.len().min($max);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                $name(text[..end].to_owned())
            }

            pub(super) fn from_wire(bytes: &[u8]) -> Result<Self, WireError> {
                Self::new(utf8($what, bytes)?)
            }

            /// The string.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // The peer chose these characters; none of them may steer a terminal or
                // begin a new line in a log.
                for c in self.0.chars() {
                    if c.is_control() {
                        write!(f, "{}", c.escape_default())?;
                    } else {
                        fmt::Write::write_char(f, c)?;
                    }
                }
                Ok(())
            }
        }
    };
}

bounded_string!(
    /// How one side names itself to the other, for logs: at most 64 bytes of UTF-8.
    Label,
    64,
    "a label"
);
bounded_string!(
    /// A sentence for people: at most 512 bytes of UTF-8.
    Text,
    512,
    "a text"
);

pub(super) fn utf8<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, WireError> {
    std::str::from_utf8(bytes).map_err(|error| WireError::NotUtf8 {
        what,
        valid_up_to: error.valid_up_to(),
    })
}

/// The bytes of a register or config-space access: at most 64, held in place.
#[derive(Clone, Copy)]
pub struct Data {
    len: u8,
    bytes: [u8; Data::MAX],
}

impl Data {
    /// Greatest length in bytes.
    pub const MAX: usize = 64;

    /// No bytes.
    pub const EMPTY: Data = Data {
        len: 0,
        bytes: [0; Data::MAX],
    };

    /// Copies bytes, if they are few enough.
    pub fn new(bytes: &[u8]) -> Result<Self, WireError> {
        in_range("the length of data", bytes.len(), 0, Self::MAX as u64)?;
        let mut data = Data::EMPTY;
        data.len = bytes.len() as u8;
        data.bytes[..bytes.len()].copy_from_slice(bytes);
        Ok(data)
    }
}

impl Deref for Data {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl PartialEq for Data {
    fn eq(&self, other: &Data) -> bool {
        **self == **other
    }
}

impl Eq for Data {}

impl fmt::Debug for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x?}", &**self)
    }
}

impl From<u32> for Data {
    fn from(value: u32) -> Self {
        let mut data = Data::EMPTY;
        data.len = 4;
        data.bytes[..4].copy_from_slice(&value.to_le_bytes());
        data
    }
}

impl From<u64> for Data {
    fn from(value: u64) -> Self {
        let mut data = Data::EMPTY;
        data.len = 8;
        data.bytes[..8].copy_from_slice(&value.to_le_bytes());
        data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn export_names_are_checked() {
        assert_eq!(ExportName::new("disk-0._A").unwrap().as_str(), "disk-0._A");
        assert!(ExportName::new(&"x".repeat(64)).is_ok());
        assert!(ExportName::new("").is_err());
        assert!(ExportName::new(&"x".repeat(65)).is_err());
        assert_eq!(
            ExportName::new("a/b"),
            Err(WireError::ExportNameByte { byte: b'/', at: 1 })
        );
        assert!(ExportName::new("naïve").is_err());
    }

    #[test]
    fn truncation_keeps_characters_whole() {
        let text = Text::truncated(&"é".repeat(300));
        assert_eq!(text.as_str(), "é".repeat(256));
        assert_eq!(
            Label::truncated(&format!("x{}", "é".repeat(40)))
                .as_str()
                .len(),
            63
        );
    }

    #[test]
    fn control_characters_of_a_peer_are_escaped_for_display() {
        let text = Text::new("a\x1b[2Jb\nc").unwrap();
        assert_eq!(text.to_string(), "a\\u{1b}[2Jb\\nc");
    }

    #[test]
    fn data_holds_what_was_given() {
        assert_eq!(&*Data::new(&[1, 2, 3]).unwrap(), &[1, 2, 3]);
        assert_eq!(&*Data::from(0x0403_0201_u32), &[1, 2, 3, 4]);
        assert_eq!(&*Data::from(1_u64), &[1, 0, 0, 0, 0, 0, 0, 0]);
        assert!(Data::new(&[0; 65]).is_err());
        assert_ne!(Data::new(&[0; 2]).unwrap(), Data::new(&[0; 3]).unwrap());
    }
}
