//! A backend that is killed and started again: nothing is lost, nothing is answered twice.

use vhost::vhost_user::VhostUserBackendReqHandlerMut;

use super::harness::{DATA, Guest, SIZE, TABLE, options};

const IN: u32 = 0;
const OUT: u32 = 1;

#[test]
fn requests_that_a_killed_backend_had_taken_are_answered_once() {
    let mut guest = Guest::with("", options(), true);
    for round in 0..50u64 {
        let mut answered = [0; 4];
        for n in 0..4u64 {
            let header = guest.header(n, OUT, round * 4 + n);
            let data = DATA + n * 512;
            guest.put(data, &[(round * 4 + n) as u8; 512]);
            let head = (n * 3) as u16;
            guest.chain(
                TABLE,
                head,
                &[
                    (header, 16, false),
                    (data, 512, false),
                    (header + 32, 1, true),
                ],
            );
            guest.offer(head);
        }
        // Killed after more or less of it was done.
        for _ in 0..round % 7 {
            guest.work();
        }
        while let Some((head, _)) = guest.used() {
            answered[head as usize / 3] += 1;
        }
        guest.restart_backend();
        while answered.iter().sum::<i32>() < 4 {
            let (head, _) = guest.answer();
            answered[head as usize / 3] += 1;
        }
        guest.work();
        assert!(guest.used().is_none(), "an answer too many");
        assert_eq!(answered, [1; 4]);
    }
    for sector in 0..200u64 {
        assert_eq!(guest.request(IN, sector, &[(DATA, 512, true)]).0, 0);
        assert_eq!(guest.get(DATA, 512), [sector as u8; 512]);
    }
}

/// The backend was killed after it had answered and before it told the guest, which waits for that
/// and asks for nothing else.
#[test]
fn guest_that_was_not_told_of_an_answer_is_told_after_a_restart() {
    let mut guest = Guest::with("", options(), true);
    guest.request(4, 0, &[]);
    while guest.is_called() {}
    guest.restart_backend();
    assert!(guest.work_until(|guest| guest.is_called()));
}

#[test]
fn stopped_queue_goes_on_where_it_was() {
    let mut guest = Guest::with("", options(), true);
    for round in 0..u64::from(SIZE) * 3 {
        guest.put(DATA, &[round as u8; 512]);
        assert_eq!(guest.request(OUT, round, &[(DATA, 512, false)]).0, 0);
        assert!(guest.device.quiesce(0));
        let state = guest.device.get_vring_base(0).unwrap();
        assert_eq!(u64::from(state.num), round + 1);
        guest.device.set_vring_base(0, state.num).unwrap();
        guest.device.set_vring_kick(0, None).unwrap();
    }
}

#[test]
fn next_client_does_not_see_what_the_last_one_left_under_way() {
    let mut guest = Guest::new("");
    let header = guest.header(0, IN, 0);
    guest.chain(
        TABLE,
        0,
        &[
            (header, 16, false),
            (DATA, 4096, true),
            (header + 32, 1, true),
        ],
    );
    guest.offer(0);
    guest.work();
    guest.device.close();
    // The same memory, for another client.
    guest.put(DATA, &[0x77; 4096]);
    while guest.used().is_some() {}
    guest.set_up();
    assert_eq!(guest.request(4, 0, &[]).0, 0);
}

#[test]
fn requests_under_way_at_a_drive_that_fails_are_answered_once() {
    let mut guest = Guest::new("");
    assert!(guest.device.failed_drive().is_none());
    for round in 0..20u64 {
        for n in 0..4u64 {
            let header = guest.header(n, OUT, round * 4 + n);
            let data = DATA + n * 0x1000;
            guest.put(data, &[(round * 4 + n) as u8; 512]);
            let head = (n * 4) as u16;
            // Half of them need a bounce buffer.
            let odd = [
                (header, 16, false),
                (data + n % 2, 511, false),
                (data, 1, false),
            ];
            guest.chain(TABLE, head, &[&odd[..], &[(header + 32, 1, true)]].concat());
            guest.offer(head);
        }
        guest.work();
        guest.fail_drive();
        let mut heads: Vec<_> = (0..4).map(|_| guest.answer().0).collect();
        heads.sort_unstable();
        assert_eq!(heads, [0, 4, 8, 12]);
        for n in 0..4 {
            assert_eq!(guest.get(super::harness::HEADERS + n * 64 + 32, 1), [0]);
        }
        guest.work();
        assert!(guest.used().is_none(), "an answer too many");
    }
    for sector in 0..80u64 {
        assert_eq!(guest.request(IN, sector, &[(DATA, 512, true)]).0, 0);
        assert_eq!(guest.get(DATA, 512), [sector as u8; 512]);
    }
}
