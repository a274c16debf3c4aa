//! PRP entries and lists (NVMe 1.4 §4.3): walking the guest's, writing the device's.

use farbus_vfio::Iova;
use farbus_vfio::nvme::{PAGE_SIZE, Status};

use crate::guest::{GuestMemory, Segment};

const PAGE: u64 = PAGE_SIZE as u64;
/// Entries in a whole list page.
const LIST_ENTRIES: usize = PAGE_SIZE / 8;
/// How many list pages one command may chain. The largest transfer needs three; a guest that
/// chains lists in a circle runs into this.
const MAX_LISTS: usize = 8;

/// Collects into `segments` the guest memory that a command's PRPs name for `len` bytes,
/// neighbouring pages joined. Each entry is read from guest memory once. Whether the memory
/// is mapped is not checked here: that matters when it is used.
pub fn walk(
    memory: &GuestMemory,
    prp1: u64,
    prp2: u64,
    len: u32,
    segments: &mut Vec<Segment>,
) -> Result<(), Status> {
    segments.clear();
    if len == 0 {
        return Ok(());
    }
    if prp1 % 4 != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    let first = (PAGE - prp1 % PAGE).min(u64::from(len)) as u32;
    push(segments, prp1, first)?;
    let mut left = len - first;
    if left == 0 {
        return Ok(());
    }
    if left <= PAGE_SIZE as u32 {
        return push_page(segments, prp2, left);
    }
    let mut list = prp2;
    let mut page = [0u8; PAGE_SIZE];
    for _ in 0..MAX_LISTS {
        if list % 8 != 0 {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        let room = (PAGE - list % PAGE) as usize / 8;
        let needed = left.div_ceil(PAGE_SIZE as u32) as usize;
        let chained = needed > room;
        let entries = &mut page[..needed.min(room).min(LIST_ENTRIES) * 8];
        memory
            .read(Iova(list), entries)
            .map_err(|_| Status::DATA_TRANSFER_ERROR)?;
        let mut entries = entries.chunks_exact(8).map(entry);
        if chained {
            list = entries.next_back().unwrap_or(0);
        }
        for address in entries {
            let len = left.min(PAGE_SIZE as u32);
            push_page(segments, address, len)?;
            left -= len;
        }
        if !chained {
            return Ok(());
        }
    }
    Err(Status::DATA_TRANSFER_ERROR)
}

fn entry(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// A page other than the first must start at offset 0 (NVMe 1.4 §4.3).
fn push_page(segments: &mut Vec<Segment>, address: u64, len: u32) -> Result<(), Status> {
    if address % PAGE != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    push(segments, address, len)
}

fn push(segments: &mut Vec<Segment>, address: u64, len: u32) -> Result<(), Status> {
    if address.checked_add(u64::from(len)).is_none() {
        return Err(Status::DATA_TRANSFER_ERROR);
    }
    match segments.last_mut() {
        Some(last) if last.iova.0 + u64::from(last.len) == address => last.len += len,
        _ => segments.push(Segment {
            iova: Iova(address),
            len,
        }),
    }
    Ok(())
}

/// The PRP entries for `len` contiguous bytes at the page-aligned `data`: PRP1 and PRP2. More
/// than two pages need `list`, a page of their own (at most 513 pages, one list page), whose
/// entries are given to `store` as (index, address).
pub fn build(data: Iova, len: u32, list: Iova, mut store: impl FnMut(usize, u64)) -> (u64, u64) {
    match u64::from(len).div_ceil(PAGE) {
        0 => (0, 0),
        1 => (data.0, 0),
        2 => (data.0, data.0 + PAGE),
        pages => {
            for page in 1..pages {
                store(page as usize - 1, data.0 + page * PAGE);
            }
            (data.0, list.0)
        }
    }
}
