//! Writes initramfs archives ("newc" cpio, the kernel's
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Written here because device nodes and root ownership then need neither root rights nor a staging
//! directory, and the host needs no cpio program.

use std::collections::BTreeSet;
use std::path::Path;

/// `S_IFDIR` with mode 755.
const DIR: u32 = 0o040_755;
/// `S_IFREG`; the permission bits are added.
const FILE: u32 = 0o100_000;
/// `S_IFLNK` with mode 777.
const LINK: u32 = 0o120_777;
/// `S_IFCHR` with mode 600.
const CHAR: u32 = 0o020_600;

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    dirs: BTreeSet<String>,
    next_inode: u32,
}

impl Cpio {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory and those above it, unless they are there already.
    pub fn dir(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || self.dirs.contains(path) {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
        self.dirs.insert(path.to_owned());
        self.entry(path, DIR, (0, 0), &[]);
    }

    /// Adds a regular file with these permission bits, and its directories.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) {
        self.parent_of(path);
        self.entry(path, FILE | permissions, (0, 0), content);
    }

    /// Adds a symbolic link, and its directories.
    pub fn link(&mut self, path: &str, target: &str) {
        self.parent_of(path);
        self.entry(path, LINK, (0, 0), target.as_bytes());
    }

    /// Adds a character device node, and its directories.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) {
        self.parent_of(path);
        self.entry(path, CHAR, (major, minor), &[]);
    }

    /// The finished archive. Archives can be joined end to end.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        // The kernel skips zeros between joined archives; QEMU loads whole pages anyway.
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn parent_of(&mut self, path: &str) {
        if let Some(parent) = Path::new(path.trim_matches('/')).parent() {
            let parent = parent.to_string_lossy().into_owned();
            self.dir(&parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let name = path.trim_matches('/');
        self.next_inode += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        // inode, mode, uid, gid, links, mtime, size, dev, rdev, name size, checksum.
        let fields = [
            self.next_inode,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_end_with_the_trailer() {
        let mut cpio = Cpio::new();
        cpio.file("/a/b/c", 0o755, b"hello");
        cpio.link("/a/l", "b/c");
        let bytes = cpio.finish();
        let magics: Vec<usize> = bytes
            .windows(6)
            .enumerate()
            .filter_map(|(at, w)| (w == b"070701").then_some(at))
            .collect();
        // a, a/b, a/b/c, a/l, trailer
        assert_eq!(magics.len(), 5);
        assert!(magics.iter().all(|at| at % 4 == 0));
        assert_eq!(bytes.len() % 512, 0);
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn directories_are_written_once() {
        let mut cpio = Cpio::new();
        cpio.dir("/x/y");
        cpio.dir("x/y/");
        cpio.file("x/y/z", 0o644, b"");
        let bytes = cpio.finish();
        let dirs = bytes.windows(8).filter(|w| *w == b"000041ed").count();
        assert_eq!(dirs, 2);
    }
}
