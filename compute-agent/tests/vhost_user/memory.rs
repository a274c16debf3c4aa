//! Memory as a VMM hands it over: what cannot be is refused, and what it takes back, or truncates,
//! hurts nobody but itself.

use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};

use super::harness::{DATA, Guest, MEMORY, USER};

const READ: u32 = 0;
const WRITE: u32 = 1;

fn region(address: u64, size: u64, user: u64, offset: u64) -> VhostUserMemoryRegion {
    VhostUserMemoryRegion::new(address, size, user, offset)
}

#[test]
fn regions_that_cannot_be_are_refused() {
    for regions in [
        // Beyond the end of the file.
        vec![region(0, MEMORY * 2, USER, 0)],
        vec![region(0, MEMORY, USER, 4096)],
        vec![region(0, u64::MAX, USER, 0)],
        // Where the drive has this process's own memory, and above.
        vec![region(1 << 51, MEMORY, USER, 0)],
        vec![region((1 << 51) - 4096, MEMORY, USER, 0)],
        vec![region(u64::MAX - 4096, 4096, USER, 0)],
        // Twice the same place.
        vec![region(0, MEMORY, USER, 0), region(4096, 4096, USER, 0)],
    ] {
        let mut guest = Guest::new("");
        let files = regions.iter().map(|_| guest.file()).collect();
        assert!(guest.device.set_mem_table(&regions, files, None).is_err());
    }
}

#[test]
fn regions_come_and_go_while_requests_go_on_in_the_others() {
    let mut guest = Guest::new("");
    let far = 1 << 40;
    let more = VhostUserSingleMemoryRegion::new(far, 1 << 20, USER * 2, 1 << 20);
    for round in 0..20 {
        guest
            .device
            .add_mem_region(&more, guest.file(), None)
            .unwrap();
        let again = guest.file();
        assert!(guest.device.add_mem_region(&more, again, None).is_err());
        guest.put(DATA, &[round; 512]);
        assert_eq!(guest.request(WRITE, 5, &[(DATA, 512, false)]).0, 0);
        // The other window into the same file.
        assert_eq!(guest.request(READ, 5, &[(far + 0x8000, 512, true)]).0, 0);
        assert_eq!(guest.get((1 << 20) + 0x8000, 512), [round; 512]);
        guest.device.remove_mem_region(&more).unwrap();
        assert!(guest.device.remove_mem_region(&more).is_err());
        assert_eq!(guest.request(READ, 5, &[(far, 512, true)]).0, 1);
    }
    // The same table again leaves everything as it is.
    let table = [region(0, MEMORY, USER, 0)];
    let files = vec![guest.file()];
    guest.device.set_mem_table(&table, files, None).unwrap();
    assert_eq!(guest.request(READ, 5, &[(DATA, 512, true)]).0, 0);
}

#[test]
fn memory_that_the_vmm_truncates_is_noticed_and_does_not_take_the_agent_down() {
    let mut guest = Guest::new("");
    assert_eq!(guest.request(READ, 0, &[(DATA, 512, true)]).0, 0);
    guest.file().set_len(0).unwrap();
    assert!(guest.work_until(|guest| guest.device.memory_lost()));
    guest.device.close();
    assert!(!guest.device.memory_lost());
}
