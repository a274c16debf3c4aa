//! Bytes that follow from where they are, a seed, and how often that place was written.

/// Spreads a number over all 64 bits (the finalizer of SplitMix64).
pub(crate) fn mix(mut value: u64) -> u64 {
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// What a block holds that was written for the `generation`th time.
pub(crate) fn fill(block: &mut [u8], seed: u64, lba: u64, generation: u32) {
    let start = mix(seed ^ mix(lba) ^ mix(u64::from(generation) << 32 | 1));
    for (n, bytes) in (0u64..).zip(block.chunks_mut(8)) {
        let word = mix(start.wrapping_add(n)).to_le_bytes();
        for (to, from) in bytes.iter_mut().zip(word) {
            *to = from;
        }
    }
}

/// Where a block first differs from what it should hold, if it does; `expected` is space for a
/// block.
pub(crate) fn difference(
    block: &[u8],
    expected: &mut [u8],
    seed: u64,
    lba: u64,
    generation: u32,
) -> Option<usize> {
    fill(expected, seed, lba, generation);
    block
        .iter()
        .zip(&*expected)
        .position(|(found, wanted)| found != wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_differ_by_place_generation_and_seed() {
        let block = |seed, lba, generation| {
            let mut block = [0; 512];
            fill(&mut block, seed, lba, generation);
            block
        };
        let one = block(1, 2, 3);
        assert_eq!(one, block(1, 2, 3));
        for other in [block(2, 2, 3), block(1, 3, 3), block(1, 2, 4)] {
            assert_ne!(one, other);
        }
        let mut bad = one;
        bad[77] ^= 1;
        let mut space = [0; 512];
        assert_eq!(difference(&one, &mut space, 1, 2, 3), None);
        assert_eq!(difference(&bad, &mut space, 1, 2, 3), Some(77));
    }
}
