//! The description of a software controller, as people write it:
//! `path=disk.img,size=1GiB,block-size=4096,serial=X,queues=16`, or `backing=memory,size=1GiB`.

#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// I/O queue pairs that a controller can have at most: an id fits the workers' 64-bit set.
pub const MAX_QUEUE_PAIRS: u16 = 63;
/// I/O queue pairs that a controller has unless told otherwise.
pub const DEFAULT_QUEUE_PAIRS: u16 = 16;
/// Longest serial number in bytes (NVMe 1.4 §5.15.2.2).
const MAX_SERIAL: usize = 20;

/// What holds a software controller's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A file or block device.
    File(PathBuf),
    /// Memory of this process: what is in it is lost when the controller is closed.
    Memory,
    /// Nothing: writes vanish, and reads leave memory as it is. It does all that a drive does
    /// but move data, so that everything around a drive can be measured.
    Null,
}

impl fmt::Display for Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Memory => f.write_str("memory"),
            Self::Null => f.write_str("null"),
        }
    }
}

/// What a software controller is to be made of. Parsed from text by [`FromStr`].
///
/// ```
/// use farbus_vfio::soft_nvme::SoftNvmeConfig;
///
/// let config: SoftNvmeConfig = "path=disk.img,size=1GiB,block-size=4096".parse()?;
/// assert_eq!(config.size, Some(1 << 30));
/// # Ok::<(), farbus_vfio::soft_nvme::OptionError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SoftNvmeConfig {
    /// What holds the data.
    pub medium: Medium,
    /// Its size in bytes. A missing file is created with it; an existing one must have it.
    /// What is no file needs one.
    pub size: Option<u64>,
    /// Size of a logical block in bytes: 512 or 4096.
    pub block_size: u32,
    /// The serial number, 1 to 20 printable ASCII characters, which then also gives the
    /// namespace its identifiers. Without one, both follow from which file it is; what is no
    /// file gets new ones each time.
    pub serial: Option<String>,
    /// Number of I/O queue pairs, 1 to 63.
    pub queues: u16,
}

impl SoftNvmeConfig {
    /// A controller on this file, with blocks of 512 bytes and 16 queue pairs.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::on(Medium::File(path.into()), None)
    }

    /// A controller on `size` bytes of memory.
    pub fn memory(size: u64) -> Self {
        Self::on(Medium::Memory, Some(size))
    }

    /// A controller with a namespace of `size` bytes that holds nothing.
    pub fn null(size: u64) -> Self {
        Self::on(Medium::Null, Some(size))
    }

    fn on(medium: Medium, size: Option<u64>) -> Self {
        Self {
            medium,
            size,
            block_size: 512,
            serial: None,
            queues: DEFAULT_QUEUE_PAIRS,
        }
    }
}

/// Why a description was not understood. Each says what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// A part without `=`.
    #[error("`{0}` is not of the form key=value; separate options with commas")]
    NotAPair(String),
    /// A key that does not exist.
    #[error("unknown option `{0}`; there are path, backing, size, block-size, serial and queues")]
    UnknownKey(String),
    /// A key that came before.
    #[error("option `{0}` is given twice; give it once")]
    Duplicate(String),
    /// Nothing says what holds the data.
    #[error("there is no path; add path=FILE, or backing=memory or backing=null")]
    NoPath,
    /// Something other than a file was given a path.
    #[error("backing={0} has no path; leave path= out")]
    PathOf(Medium),
    /// Something other than a file has no size of its own.
    #[error("backing={0} needs a size; add size=, such as size=1GiB")]
    NoSize(Medium),
    /// A kind of backing that does not exist.
    #[error("backing=`{0}` is not known; use file, memory or null")]
    Backing(String),
    /// A size that is not one.
    #[error("size=`{0}` is not a size; write bytes, or a number with KiB, MiB, GiB or TiB")]
    Size(String),
    /// A block size other than the two.
    #[error("block-size=`{0}` is not supported; use 512 or 4096")]
    BlockSize(String),
    /// A serial number that an Identify structure cannot hold.
    #[error("serial=`{0}` does not fit; use 1 to 20 printable ASCII characters")]
    Serial(String),
    /// A number of queues out of range.
    #[error("queues=`{0}` is out of range; use 1 to {MAX_QUEUE_PAIRS}")]
    Queues(String),
}

impl FromStr for SoftNvmeConfig {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let mut config = Self::new("");
        let mut path = PathBuf::new();
        let mut seen: Vec<&str> = Vec::new();
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| OptionError::NotAPair(part.to_owned()))?;
            if seen.contains(&key) {
                return Err(OptionError::Duplicate(key.to_owned()));
            }
            seen.push(key);
            let owned = || value.to_owned();
            match key {
                "path" => path = value.into(),
                "backing" => {
                    config.medium = match value {
                        "file" => Medium::File(PathBuf::new()),
                        "memory" => Medium::Memory,
                        "null" => Medium::Null,
                        _ => return Err(OptionError::Backing(owned())),
                    };
                }
                "size" => {
                    config.size =
                        Some(parse_size(value).ok_or_else(|| OptionError::Size(owned()))?);
                }
                "block-size" => {
                    config.block_size = match value {
                        "512" => 512,
                        "4096" | "4KiB" => 4096,
                        _ => return Err(OptionError::BlockSize(owned())),
                    };
                }
                "serial" if is_serial(value) => config.serial = Some(owned()),
                "serial" => return Err(OptionError::Serial(owned())),
                "queues" => {
                    config.queues = value
                        .parse()
                        .ok()
                        .filter(|queues| (1..=MAX_QUEUE_PAIRS).contains(queues))
                        .ok_or_else(|| OptionError::Queues(owned()))?;
                }
                _ => return Err(OptionError::UnknownKey(key.to_owned())),
            }
        }
        match &mut config.medium {
            Medium::File(file) => *file = path,
            medium if seen.contains(&"path") => return Err(OptionError::PathOf(medium.clone())),
            _ => {}
        }
        config.check()?;
        Ok(config)
    }
}

impl SoftNvmeConfig {
    /// What the types leave open, for those that were not parsed too.
    pub fn check(&self) -> Result<(), OptionError> {
        match &self.medium {
            Medium::File(path) if path.as_os_str().is_empty() => return Err(OptionError::NoPath),
            Medium::Memory | Medium::Null if self.size.is_none() => {
                return Err(OptionError::NoSize(self.medium.clone()));
            }
            _ => {}
        }
        if !matches!(self.block_size, 512 | 4096) {
            return Err(OptionError::BlockSize(self.block_size.to_string()));
        }
        if !(1..=MAX_QUEUE_PAIRS).contains(&self.queues) {
            return Err(OptionError::Queues(self.queues.to_string()));
        }
        match &self.serial {
            Some(serial) if !is_serial(serial) => Err(OptionError::Serial(serial.clone())),
            _ => Ok(()),
        }
    }
}

/// Whether a controller can have this serial number. It is padded with spaces (NVMe 1.4
/// §1.5), so it must not begin or end with one.
fn is_serial(text: &str) -> bool {
    (1..=MAX_SERIAL).contains(&text.len())
        && text.bytes().all(|byte| (b' '..=b'~').contains(&byte))
        && text.trim() == text
}

/// A number of bytes, more than none, from text such as `1GiB`.
pub fn parse_size(text: &str) -> Option<u64> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)];
    let (digits, shift) = units
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))
        .unwrap_or((text, 0));
    // `u64::from_str` would take a sign, which no size has.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits
        .parse::<u64>()
        .ok()?
        .checked_mul(1 << shift)
        .filter(|size| *size > 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<SoftNvmeConfig, OptionError> {
        text.parse()
    }

    #[test]
    fn all_options_are_understood() {
        let config = parse("path=a/disk.img,size=3MiB,block-size=4096,serial=X 1,queues=63");
        assert_eq!(
            config,
            Ok(SoftNvmeConfig {
                medium: Medium::File("a/disk.img".into()),
                size: Some(3 << 20),
                block_size: 4096,
                serial: Some("X 1".to_owned()),
                queues: 63,
            })
        );
        assert_eq!(parse("path=x"), Ok(SoftNvmeConfig::new("x")));
        assert_eq!(parse("backing=file,path=x"), parse("path=x"));
        assert_eq!(
            parse("size=1GiB,backing=memory"),
            Ok(SoftNvmeConfig::memory(1 << 30))
        );
        assert_eq!(
            parse("backing=null,size=1GiB"),
            Ok(SoftNvmeConfig::null(1 << 30))
        );
    }

    #[test]
    fn sizes_have_binary_units_or_none() {
        let sizes = [
            ("512", Some(512)),
            ("4KiB", Some(4096)),
            ("1TiB", Some(1 << 40)),
            ("", None),
            ("0", None),
            ("0GiB", None),
            ("-1", None),
            ("+1", None),
            ("1.5GiB", None),
            ("1GB", None),
            ("GiB", None),
            ("16777216TiB", None),
            ("99999999999999999999", None),
        ];
        for (text, size) in sizes {
            assert_eq!(parse_size(text), size, "{text}");
        }
    }

    #[test]
    fn mistakes_are_named_with_their_remedy() {
        let mistakes = [
            ("", "`` is not of the form key=value"),
            ("disk.img", "`disk.img` is not of the form key=value"),
            ("size=1GiB", "add path=FILE"),
            ("path=", "add path=FILE"),
            ("path=a,path=b", "`path` is given twice"),
            (
                "path=a,colour=red",
                "unknown option `colour`; there are path, backing",
            ),
            ("backing=memory", "add size=, such as"),
            ("backing=null", "add size=, such as"),
            ("backing=null,size=1MiB,path=a", "leave path= out"),
            ("backing=tape,path=a", "use file, memory or null"),
            ("path=a,size=1GB", "size=`1GB` is not a size"),
            ("path=a,block-size=1024", "use 512 or 4096"),
            ("path=a,serial=", "use 1 to 20 printable"),
            (
                "path=a,serial=123456789012345678901",
                "use 1 to 20 printable",
            ),
            ("path=a,serial=\u{e4}", "use 1 to 20 printable"),
            ("path=a,serial= x", "use 1 to 20 printable"),
            ("path=a,queues=0", "use 1 to 63"),
            ("path=a,queues=64", "use 1 to 63"),
        ];
        for (text, remedy) in mistakes {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(remedy), "{text:?} gave {message:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,60}") {
            let _ = parse(&text);
        }
    }
}
