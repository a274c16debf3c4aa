//! What of a claim belongs to which lane: queues, tags and buffer shadow. Both sides reckon it
//! from the lane's place alone (`docs/protocol.md`, Lanes), so it never has to be told.

use std::ops::Range;

use farbus_fabric::wire::LanePlace;
use farbus_vfio::nvme::PAGE_SIZE;

/// Fewest tags of a lane.
const MIN_TAGS: u16 = 64;
/// Least buffer shadow of a lane, beside that of its largest command, in bytes.
const MIN_SPARE: u32 = 64 << 10;

/// Tags of each of so many lanes.
fn tags_each(tags: u16, lanes: u16) -> u16 {
    tags / lanes.max(1)
}

/// Buffer shadow of each of so many lanes: whole pages.
fn shadow_each(shadow_len: u32, lanes: u16) -> u32 {
    let each = shadow_len / u32::from(lanes.max(1));
    each - each % PAGE_SIZE as u32
}

/// Whether each of so many lanes can carry the largest command.
pub fn suffices(lanes: u16, tags: u16, shadow_len: u32, max_transfer: u32) -> bool {
    (1..=LanePlace::MAX).contains(&lanes)
        && tags_each(tags, lanes) >= MIN_TAGS
        && shadow_each(shadow_len, lanes) >= max_transfer.saturating_add(MIN_SPARE)
}

/// The lane that completion queue `queue` belongs to, and with it all submission queues that
/// complete there. Lane 0 has the admin queues.
pub(crate) fn lane_of(queue: u16, lanes: u16) -> u16 {
    queue.checked_sub(1).map_or(0, |index| index % lanes.max(1))
}

/// The tags of a lane.
pub(crate) fn tags(place: LanePlace, tags: u16) -> Range<u16> {
    if place == LanePlace::ONLY {
        return 0..tags;
    }
    let each = tags_each(tags, place.lanes);
    place.lane * each..(place.lane + 1) * each
}

/// The part of the buffer shadow that a lane's commands use, in bytes.
pub(crate) fn shadow(place: LanePlace, shadow_len: u32) -> Range<u32> {
    if place == LanePlace::ONLY {
        return 0..shadow_len;
    }
    let each = shadow_each(shadow_len, place.lanes);
    u32::from(place.lane) * each..u32::from(place.lane + 1) * each
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_disjoint_and_within_the_claim() {
        for lanes in 1..=LanePlace::MAX {
            let (mut tag, mut byte) = (0, 0);
            for lane in 0..lanes {
                let place = LanePlace { lane, lanes };
                let (tags, shadow) = (tags(place, 1000), shadow(place, 16 << 20));
                assert_eq!((tags.start, shadow.start), (tag, byte));
                assert_eq!(shadow.end % PAGE_SIZE as u32, 0);
                (tag, byte) = (tags.end, shadow.end);
            }
            assert!(tag <= 1000 && byte <= 16 << 20);
        }
    }

    #[test]
    fn queues_take_turns_among_the_lanes() {
        let lanes: Vec<_> = (0..=5).map(|queue| lane_of(queue, 2)).collect();
        assert_eq!(lanes, [0, 0, 1, 0, 1, 0]);
    }

    #[test]
    fn a_lane_that_could_not_carry_the_largest_command_does_not_suffice() {
        assert!(suffices(8, 1024, 16 << 20, 1 << 20));
        assert!(!suffices(8, 256, 16 << 20, 1 << 20));
        assert!(!suffices(8, 1024, 8 << 20, 1 << 20));
        assert!(!suffices(9, 1024, 64 << 20, 1 << 20));
    }
}
