//! Checks of a disk as its guest sees it.
//!
//! Each takes a guest and a block device and knows nothing of what is behind the device, so the
//! same checks judge QEMU's own NVMe drive (which proves the test bed) and a remote one.
//! They overwrite the device's content.

use serde_json::Value;

use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::report;

/// The heaviest checks take a few seconds on an idle host.
const LONG_SECS: u64 = 240;

/// Files that a check has left on a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Checksums, as `sha256sum` writes them.
    pub manifest: String,
}

/// Makes an ext4 file system, fills it, and finds the same bytes after a remount.
///
/// # Errors
/// When anything about it fails.
pub fn filesystem(guest: &Guest, device: &str) -> Result<Files> {
    guest.check(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt && mount {device} /mnt"
    ))?;
    // One large file, one that ends within a block, and many small ones.
    let manifest = guest.check_within(
        "cd /mnt && mkdir small && \
         dd if=/dev/urandom of=large bs=1M count=16 status=none && \
         dd if=/dev/urandom of=odd bs=1 count=12345 status=none && \
         for i in $(seq 40); do dd if=/dev/urandom of=small/$i bs=$((i * 97)) count=1 status=none; done && \
         find . -type f | sort | xargs sha256sum",
        Deadline::secs(LONG_SECS),
    )?;
    guest.check("umount /mnt")?;
    let files = Files { manifest };
    files_intact(guest, device, &files)?;
    Ok(files)
}

/// Finds the files of [`filesystem`] unchanged, and the file system consistent; for a later look, such as
/// after a reboot or in another guest.
///
/// # Errors
/// When a file differs or the file system has a fault.
pub fn files_intact(guest: &Guest, device: &str, files: &Files) -> Result<()> {
    guest.check("echo 3 >/proc/sys/vm/drop_caches")?;
    guest.check(&format!("mkdir -p /mnt && mount -o ro {device} /mnt"))?;
    let found = guest.check_within(
        "cd /mnt && find . -type f | sort | xargs sha256sum",
        Deadline::secs(LONG_SECS),
    )?;
    guest.check(&format!("umount /mnt && e2fsck -f -n {device}"))?;
    expect("the files' checksums", &found, &files.manifest)
}

/// Random writes from at least two virtual CPUs, each read back and checked by checksum.
///
/// Block sizes run from one logical block to 1 MiB, offsets are multiples of the logical block only,
/// and buffers begin 512 bytes into a page. Needs the large userland, and 64 MiB of disk.
///
/// # Errors
/// When a block differs, or when fewer than two of the drive's queues were used.
pub fn random_io(guest: &Guest, device: &str) -> Result<()> {
    let cpus = guest.check("nproc")?;
    if cpus.parse::<u32>().unwrap_or(0) < 2 {
        return Err(finding(
            "random I/O",
            format!("the guest has {cpus} CPU, not two"),
        ));
    }
    let before = interrupts_per_queue(guest, device)?;
    let block = guest.check(&format!("blockdev --getss {device}"))?;
    let job = |name: &str, cpu: u32, offset: u32, sizes: &str, depth: u32| {
        format!(
            "--name={name} --cpus_allowed={cpu} --offset={offset}M --size=16M \
             --bsrange={sizes} --blockalign={block} --iodepth={depth}"
        )
    };
    let small = format!("{block}-32k");
    let jobs = [
        job("small0", 0, 0, &small, 16),
        job("small1", 1, 16, &small, 16),
        job("large0", 0, 32, "64k-1M", 4),
        job("large1", 1, 48, "64k-1M", 4),
    ];
    guest.check_within(
        &format!(
            "fio --filename={device} --direct=1 --ioengine=libaio --rw=randwrite \
             --iomem_align=512 --verify=crc32c --verify_fatal=1 --verify_backlog=128 --group_reporting \
             --output-format=terse {}",
            jobs.join(" ")
        ),
        Deadline::secs(LONG_SECS),
    )?;
    let after = interrupts_per_queue(guest, device)?;
    let used = after
        .iter()
        .enumerate()
        .filter(|(queue, count)| **count > before.get(*queue).copied().unwrap_or(0))
        .count();
    if used < 2 {
        return Err(finding(
            "random I/O",
            format!(
                "interrupts per queue went from {before:?} to {after:?}, not two queues' worth"
            ),
        ));
    }
    Ok(())
}

/// Interrupts so far of each I/O queue of the drive.
fn interrupts_per_queue(guest: &Guest, device: &str) -> Result<Vec<u64>> {
    let controller = controller_of(device);
    let name = controller.rsplit('/').next().unwrap_or_default();
    let table = guest.check("cat /proc/interrupts")?;
    Ok(table
        .lines()
        .filter(|line| {
            let queue = line.rsplit(' ').next().unwrap_or_default();
            if !is_nvme(device) {
                // The guest's only virtio device, or the first one, is the drive.
                return queue.starts_with("virtio0-req.");
            }
            queue
                .strip_prefix(name)
                .and_then(|q| q.strip_prefix('q'))
                .is_some_and(|number| number != "0")
        })
        .map(|line| {
            line.split_whitespace()
                .filter_map(|w| w.parse::<u64>().ok())
                .sum()
        })
        .collect())
}

/// Flush, trim and write-zeroes: each does its work and nothing beside it.
///
/// Uses the first 8 MiB of the device, then a file system.
///
/// # Errors
/// When data outside the range changes, zeroes are not zero, or a command fails.
pub fn flush_trim_zeroes(guest: &Guest, device: &str) -> Result<()> {
    let flush = if is_nvme(device) {
        format!("nvme flush {device} &&")
    } else {
        String::new()
    };
    guest.check(&format!(
        "dd if=/dev/urandom of=/tmp/before bs=1M count=8 status=none && \
         dd if=/tmp/before of={device} bs=1M oflag=direct conv=fsync status=none && \
         {flush} cmp -n 8388608 /tmp/before {device}"
    ))?;

    // 1 MiB at 2 MiB is zeroed, 1 MiB at 5 MiB is trimmed; everything around them stays.
    guest.check(&format!("blkdiscard -f -z -o 2M -l 1M {device}"))?;
    guest.check(&format!("blkdiscard -f -o 5M -l 1M {device}"))?;
    guest.check("echo 3 >/proc/sys/vm/drop_caches")?;
    let part = |from: u32, count: u32| {
        format!("dd bs=1M status=none iflag=fullblock skip={from} count={count}")
    };
    for (from, count) in [(0, 2), (3, 2), (6, 2)] {
        let part = part(from, count);
        guest.check(&format!(
            "{part} if=/tmp/before >/tmp/a && {part} if={device} >/tmp/b && cmp /tmp/a /tmp/b"
        ))?;
    }
    guest.check(&format!(
        "{} if={device} >/tmp/b && cmp -n 1048576 /tmp/b /dev/zero",
        part(2, 1)
    ))?;

    if is_nvme(device) {
        raw_trims(guest, device)?;
    }

    guest.check(&format!(
        "mkfs.ext4 -q -F -E nodiscard {device} && mount {device} /mnt && \
         dd if=/dev/urandom of=/mnt/f bs=1M count=4 conv=fsync status=none && \
         sha256sum /mnt/f >/tmp/sum && dd if=/dev/zero of=/mnt/g bs=1M count=8 conv=fsync status=none && \
         rm /mnt/g && sync && fstrim -v /mnt && echo 3 >/proc/sys/vm/drop_caches && \
         sha256sum -c /tmp/sum && umount /mnt && e2fsck -f -n {device}"
    ))?;
    Ok(())
}

/// What the kernel's block layer does not show of a trim.
fn raw_trims(guest: &Guest, device: &str) -> Result<()> {
    // A trimmed block reads as zeroes or as before (NVMe base, Dataset Management): with "zeroes"
    // promised in DLFEAT, as zeroes.
    let namespace = json_of(guest, &format!("nvme id-ns {device} -o json"))?;
    if namespace["dlfeat"].as_u64().unwrap_or(0) & 7 == 1 {
        guest.check(&format!(
            "dd bs=1M status=none iflag=fullblock skip=5 count=1 if={device} >/tmp/b && \
             cmp -n 1048576 /tmp/b /dev/zero"
        ))?;
    }

    // The same commands, sent as they are, for a single block and at the device's end.
    guest.check(&format!(
        "nvme write-zeroes {device} --start-block=7 --block-count=0 && \
         nvme dsm {device} --ad --slbs=64,128 --blocks=8,8"
    ))?;
    Ok(())
}

/// What a drive says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Identity {
    /// Identify Controller, as nvme-cli shows it.
    pub controller: Value,
    /// Identify Namespace.
    pub namespace: Value,
    /// Size of a logical block in bytes.
    pub block_size: u64,
    /// Size of the namespace in bytes.
    pub size: u64,
}

/// Debian's nvme-cli gets its answers, and the drive works as before after a controller reset.
///
/// # Errors
/// When a command fails, or what it tells is not plausible.
pub fn nvme_cli(guest: &Guest, device: &str) -> Result<Identity> {
    let controller = controller_of(device);
    let identity = identity(guest, device)?;
    for log in ["smart-log", "error-log", "fw-log"] {
        guest.check(&format!("nvme {log} {controller}"))?;
    }
    let namespaces = guest.check(&format!("nvme list-ns {controller}"))?;
    if !namespaces.contains("0x1") {
        return Err(finding("nvme list-ns", namespaces));
    }
    // Arbitration, power management, temperature, number of queues, interrupt coalescing, write
    // atomicity, asynchronous events; then error recovery, which is a namespace's.
    for feature in [1, 2, 4, 7, 8, 0xa, 0xb] {
        guest.check(&format!("nvme get-feature {controller} -f {feature} -H"))?;
    }
    guest.check(&format!("nvme get-feature {controller} -n 1 -f 5 -H"))?;
    let caches = identity.controller["vwc"].as_u64().unwrap_or(0) & 1 == 1;
    if caches {
        guest.check(&format!("nvme get-feature {controller} -f 6 -H"))?;
    }
    guest.check(&format!(
        "dd if=/dev/urandom of=/tmp/r bs=64k count=1 status=none && \
         dd if=/tmp/r of={device} oflag=direct bs=64k status=none && \
         nvme reset {controller} && \
         dd if={device} iflag=direct bs=64k count=1 status=none | cmp - /tmp/r"
    ))?;
    Ok(identity)
}

/// Reads what a drive says of itself, and that its size agrees with the block layer's.
///
/// # Errors
/// When the guest cannot tell.
pub fn identity(guest: &Guest, device: &str) -> Result<Identity> {
    let controller = json_of(
        guest,
        &format!("nvme id-ctrl {} -o json", controller_of(device)),
    )?;
    let namespace = json_of(guest, &format!("nvme id-ns {device} -o json"))?;
    let format = namespace["flbas"].as_u64().unwrap_or(0) & 0xf;
    let shift = usize::try_from(format)
        .ok()
        .and_then(|f| namespace["lbafs"][f]["ds"].as_u64())
        .filter(|s| (9..=16).contains(s))
        .ok_or_else(|| finding("nvme id-ns", format!("no block size in {namespace}")))?;
    let block_size = 1 << shift;
    let size = namespace["nsze"].as_u64().unwrap_or(0) * block_size;
    let seen = guest.check(&format!("blockdev --getsize64 {device}"))?;
    expect("the namespace's size", &seen, &size.to_string())?;
    Ok(Identity {
        controller,
        namespace,
        block_size,
        size,
    })
}

/// Whether a block device is a namespace of an NVMe controller.
fn is_nvme(device: &str) -> bool {
    device.starts_with("/dev/nvme")
}

/// The controller's character device of a namespace: `/dev/nvme0` of `/dev/nvme0n1`.
#[must_use]
pub fn controller_of(device: &str) -> &str {
    device.rsplit_once('n').map_or(device, |(before, _)| before)
}

fn json_of(guest: &Guest, command: &str) -> Result<Value> {
    let text = guest.check(command)?;
    // nvme-cli may print warnings before the document.
    let document = text.find('{').map_or("", |at| &text[at..]);
    serde_json::from_str(document).map_err(|e| finding(command, format!("{e} in: {text}")))
}

fn expect(what: &str, found: &str, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(finding(
        what,
        format!("found:\n{found}\nexpected:\n{expected}"),
    ))
}

fn finding(what: &str, finding: String) -> Error {
    report::note_failure();
    Error::Verification {
        what: what.to_owned(),
        finding,
    }
}

/// Waits until the guest's drive has this many bytes, without being attached anew, and uses its last ones.
///
/// # Errors
/// When it does not grow, or does not hold there what is written.
pub fn has_grown(guest: &Guest, drive: &str, size: u64) -> Result<()> {
    guest.wait_until(
        &format!("test $(blockdev --getsize64 {drive}) = {size}"),
        Deadline::secs(60),
    )?;
    let last = size / 65_536 - 1;
    guest
        .check(&format!(
            "dd if=/dev/urandom of=/tmp/last bs=64k count=1 status=none && \
             dd if=/tmp/last of={drive} bs=64k seek={last} oflag=direct status=none && \
             dd if={drive} bs=64k skip={last} count=1 iflag=direct status=none | cmp - /tmp/last"
        ))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controller_is_found_from_its_namespace() {
        assert_eq!(controller_of("/dev/nvme0n1"), "/dev/nvme0");
        assert_eq!(controller_of("/dev/nvme12n3"), "/dev/nvme12");
    }
}
