//! Whether another process shares a file's memory or keeps a private copy of it.
//!
//! QEMU sends the file of its guest's memory also when it maps that file privately
//! (`share=off`). Every write of the guest then goes to a copy that nobody else sees, and a
//! device would work on stale memory. `/proc/PID/maps` tells (proc_pid_maps(5)).

use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use rustix::fs::{Stat, major, minor};

/// How much of the list of mappings is read, in bytes; a VMM's has some hundred KiB.
const MAX_LIST: u64 = 16 << 20;

/// How a process maps a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    /// Writes of either side reach the other.
    Shared,
    /// Its writes stay its own.
    Private,
    /// It cannot be seen, or does not map the file, or maps it read-only.
    Unknown,
}

/// How the process `pid` maps the file that `stat` describes.
pub(super) fn sharing_of(pid: u32, stat: &Stat) -> Sharing {
    let Ok(list) = File::open(format!("/proc/{pid}/maps")) else {
        return Sharing::Unknown;
    };
    let device = format!("{:02x}:{:02x}", major(stat.st_dev), minor(stat.st_dev));
    scan(BufReader::new(list.take(MAX_LIST)), &device, stat.st_ino)
}

fn scan(mut list: impl BufRead, device: &str, inode: u64) -> Sharing {
    let inode = inode.to_string();
    let mut found = Sharing::Unknown;
    let mut line = Vec::new();
    // One line is `start-end perms offset major:minor inode path`.
    while matches!(list.read_until(b'\n', &mut line), Ok(1..)) {
        let mut fields = line
            .split(u8::is_ascii_whitespace)
            .filter(|f| !f.is_empty());
        let permissions = fields.nth(1).unwrap_or_default();
        let same_file =
            fields.nth(1) == Some(device.as_bytes()) && fields.next() == Some(inode.as_bytes());
        match permissions {
            [_, _, _, b's'] if same_file => return Sharing::Shared,
            // A private mapping that is never written shows what the file has.
            [_, b'w', _, b'p'] if same_file => found = Sharing::Private,
            _ => {}
        }
        line.clear();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
55d0c0a00000-55d0c0a02000 r--p 00000000 08:01 1234 /usr/bin/qemu
7f0000000000-7f0040000000 rw-p 00000000 00:01 77                 /memfd:mem (deleted)
7f0040000000-7f0080000000 rw-s 00000000 00:01 78                 /memfd:mem (deleted)
7f0080000000-7f0080001000 r--p 00000000 00:01 79                 /memfd:rom (deleted)
7f0080001000-7f0080002000 rw-p 00000000 00:01 80                 /memfd:odd (deleted)
7f0080002000-7f0080003000 rw-s 00000000 00:01 80                 /memfd:odd (deleted)
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                  [stack]
";

    fn of(inode: u64) -> Sharing {
        scan(LIST.as_bytes(), "00:01", inode)
    }

    #[test]
    fn private_memory_is_recognised() {
        assert_eq!(of(77), Sharing::Private);
    }

    #[test]
    fn shared_memory_is_recognised() {
        assert_eq!(of(78), Sharing::Shared);
    }

    #[test]
    fn one_shared_mapping_among_private_ones_suffices() {
        assert_eq!(of(80), Sharing::Shared);
    }

    #[test]
    fn a_private_mapping_that_is_never_written_does_no_harm() {
        assert_eq!(of(79), Sharing::Unknown);
    }

    #[test]
    fn files_that_are_not_mapped_are_unknown() {
        assert_eq!(of(1), Sharing::Unknown);
        assert_eq!(of(1234), Sharing::Unknown);
        assert_eq!(scan(&b"\n \nrubbish"[..], "00:01", 0), Sharing::Unknown);
    }
}
