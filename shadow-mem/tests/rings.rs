//! Ring arithmetic against a model that counts.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use farbus_shadow_mem::nvme::ring::{CompletionCursor, CompletionRing, SubmissionRing};
use proptest::prelude::*;

proptest! {
    #[test]
    fn submission_ring_yields_every_entry_once_in_order(
        size in 2u32..300,
        steps in prop::collection::vec((0u32..300, 0usize..300), 1..60),
    ) {
        let mut ring = SubmissionRing::new(size);
        let (mut produced, mut consumed) = (0u64, 0u64);
        for (produce, consume) in steps {
            let room = u64::from(size) - 1 - (produced - consumed);
            produced += u64::from(produce).min(room);
            prop_assert!(ring.set_tail((produced % u64::from(size)) as u32));
            for _ in 0..consume {
                match ring.peek() {
                    Some(index) => {
                        prop_assert_eq!(u64::from(index), consumed % u64::from(size));
                        ring.advance();
                        consumed += 1;
                    }
                    None => prop_assert_eq!(consumed, produced),
                }
            }
            prop_assert_eq!(u64::from(ring.head()), consumed % u64::from(size));
        }
    }

    #[test]
    fn tail_beyond_the_ring_is_refused_and_changes_nothing(size in 2u32..1000, tail in any::<u32>()) {
        let mut ring = SubmissionRing::new(size);
        let valid = ring.set_tail(tail);
        prop_assert_eq!(valid, tail < size);
        prop_assert_eq!(ring.peek().is_some(), valid && tail != 0);
    }

    #[test]
    fn consumer_sees_what_the_producer_posted_by_phase_alone(
        size in 2u32..200,
        steps in prop::collection::vec((0u32..200, 0u32..200), 1..60),
    ) {
        let mut ring = CompletionRing::new(size);
        let mut cursor = CompletionCursor::new(size);
        let mut phases = vec![false; size as usize];
        let mut outstanding = 0;
        for (post, take) in steps {
            for _ in 0..post {
                prop_assert_eq!(ring.is_full(), outstanding == size - 1);
                if ring.is_full() {
                    break;
                }
                let (index, phase) = ring.next();
                ring.advance();
                phases[index as usize] = phase;
                outstanding += 1;
            }
            for _ in 0..take {
                let (index, phase) = cursor.at();
                let is_new = phases[index as usize] == phase;
                prop_assert_eq!(is_new, outstanding > 0);
                if !is_new {
                    break;
                }
                cursor.advance();
                outstanding -= 1;
            }
            prop_assert!(ring.set_head(cursor.head()));
        }
    }

    #[test]
    fn head_that_passes_the_tail_is_refused(size in 3u32..200, posted in 0u32..200, head in any::<u32>()) {
        let mut ring = CompletionRing::new(size);
        let posted = posted.min(size - 1);
        for _ in 0..posted {
            ring.advance();
        }
        prop_assert_eq!(ring.set_head(head), head <= posted);
    }
}
