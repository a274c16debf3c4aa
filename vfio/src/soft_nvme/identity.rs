//! Who the controller says it is: names that stay the same for the same file.

#![forbid(unsafe_code)]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use super::backing::{Backing, FileBacking};
use super::options::{Medium, SoftNvmeConfig};

/// PCI vendor id. It is not assigned to anyone; the letters are `FB`.
pub const VENDOR: u16 = 0x4642;
/// PCI device id.
pub const DEVICE: u16 = 0x0001;

/// The names of one controller and its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// 1 to 20 ASCII characters.
    pub(crate) serial: String,
    /// The namespace's UUID, version 8 (RFC 9562 §5.8), also its NGUID.
    pub(crate) uuid: [u8; 16],
    /// The namespace's EUI-64, in the locally administered space.
    pub(crate) eui64: [u8; 8],
}

impl Identity {
    /// The names follow from the serial number, if there is one: it survives copying the file.
    /// Else they follow from the inode and its time of birth, which survive renaming it, or,
    /// for a block device, from its path. What is no file is another drive each time, for what
    /// was on the last one is lost.
    pub(super) fn of(config: &SoftNvmeConfig, backing: &Backing) -> Self {
        let source = match (&config.serial, &config.medium, backing) {
            (Some(serial), ..) => format!("serial {serial}"),
            (None, Medium::File(path), Backing::File(file)) => file_source(path, file),
            _ => new_source(),
        };
        let named = Self::named(&source);
        Self {
            serial: config.serial.clone().unwrap_or(named.serial),
            ..named
        }
    }

    /// Names that follow from a text, the same ones each time.
    pub(crate) fn named(source: &str) -> Self {
        let hash = fnv1a(source.as_bytes()).to_be_bytes();
        let mut uuid = hash;
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        let [a, b, c, d, e, f, g, h, ..] = hash;
        let eui64 = [a & 0xfc | 0x02, b, c, d, e, f, g, h];
        let digits = hash.iter().take(8).map(|byte| format!("{byte:02X}"));
        Self {
            serial: format!("FB{}", digits.collect::<String>()),
            uuid,
            eui64,
        }
    }

    /// The UUID as text.
    pub(crate) fn uuid_text(&self) -> String {
        let hex: String = self.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let parts = [0..8, 8..12, 12..16, 16..20, 20..32];
        parts
            .map(|range| hex.get(range).unwrap_or_default().to_owned())
            .join("-")
    }
}

fn file_source(path: &Path, file: &FileBacking) -> String {
    let inode = if file.is_block_device() {
        None
    } else {
        inode_source(file)
    };
    inode.unwrap_or_else(|| {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        format!("path {}", path.display())
    })
}

/// Unlike any other: no two are made at once by one process, and no two processes have one id.
fn new_source() -> String {
    static MADE: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_nanos();
    let n = MADE.fetch_add(1, Ordering::Relaxed);
    format!("made at {now} by {} as {n}", std::process::id())
}

fn inode_source(backing: &FileBacking) -> Option<String> {
    let metadata = backing.file().metadata().ok()?;
    let born = metadata.created().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!("inode {} born {}", metadata.ino(), born.as_nanos()))
}

/// FNV-1a with 128 bits: no secret is in it, it only must be the same everywhere, for ever.
fn fnv1a(bytes: &[u8]) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.iter().fold(OFFSET, |hash, &byte| {
        (hash ^ u128::from(byte)).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_that_of_the_published_test_vectors() {
        assert_eq!(fnv1a(b""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(fnv1a(b"a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964);
    }
}
