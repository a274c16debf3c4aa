//! The link is cut in the middle of I/O: on a new claim the guest's controller goes on, and
//! every command completes once with the right data.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use farbus_fabric::session::client;
use farbus_vfio::driver::block_command;
use farbus_vfio::nvme::nvm;

use super::bed::{Attached, BLOCK, Bed, eventually, export_name};

/// Forwards connections to a device server, and cuts them.
struct Wire {
    address: String,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Wire {
    fn to(address: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap().to_string();
        let open = Arc::new(Mutex::new(Vec::new()));
        let (to, list) = (address.to_owned(), open.clone());
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(&to) else {
                    continue;
                };
                list.lock().unwrap().push(near.try_clone().unwrap());
                list.lock().unwrap().push(far.try_clone().unwrap());
                forward(near.try_clone().unwrap(), far.try_clone().unwrap());
                forward(far, near);
            }
        });
        Self { address: own, open }
    }

    fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream) {
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
}

#[test]
fn cut_links_lose_nothing_and_complete_nothing_twice() {
    let bed = Bed::start("size=64MiB");
    let wire = Wire::to(&bed.address);
    let claim = || {
        client::claim(
            &wire.address,
            &export_name(),
            "test",
            Duration::from_secs(5),
        )
    };
    let attached = Attached::new(claim().unwrap());
    let mut driver = attached.driver(2);
    let len = 64 << 10;
    let buffers: Vec<_> = (0..40)
        .map(|_| driver.memory().allocate(len).unwrap())
        .collect();
    for round in 0..25u8 {
        let mut outstanding = HashMap::new();
        for (slot, buffer) in buffers.iter().enumerate() {
            let queue = 1 + (slot % 2) as u16;
            let write = slot < 20;
            let lba = (slot % 20) as u64 * 128 + if write { 0 } else { 1 << 14 };
            let fill = if write { round ^ slot as u8 } else { 0 };
            driver.memory().write(*buffer, 0, &vec![fill; len]).unwrap();
            let prps = driver.prps(*buffer, 0, len).unwrap();
            let opcode = if write { nvm::WRITE } else { nvm::READ };
            let mut command = block_command(opcode, lba, len, BLOCK);
            command.set_prps(prps.prp1, prps.prp2);
            let cid = driver.submit(queue, command).unwrap();
            assert!(outstanding.insert((queue, cid), prps).is_none());
        }
        wire.cut();
        let lost = eventually("the cut is noticed", || {
            attached.remote.service();
            attached.remote.take_lost()
        });
        assert!(lost.error.should_reconnect(), "{}", lost.error);
        drop(lost);
        let claimed = eventually("the export is free again", || claim().ok());
        attached.remote.reconnect(claimed).unwrap();
        while !outstanding.is_empty() {
            for queue in [1, 2] {
                // The driver itself refuses a completion that it does not wait for.
                let done = eventually("a completion", || {
                    driver.poll(queue).unwrap().map_or_else(
                        || (!outstanding.keys().any(|(q, _)| *q == queue)).then_some(None),
                        |entry| Some(Some(entry)),
                    )
                });
                if let Some(entry) = done {
                    assert!(entry.status.is_success(), "{entry:?}");
                    let prps = outstanding.remove(&(queue, entry.cid)).unwrap();
                    driver.free_prps(prps);
                }
            }
        }
        for slot in 0..20u8 {
            let mut back = vec![0; len];
            driver
                .read(1, u64::from(slot) * 128, BLOCK, &mut back)
                .unwrap();
            assert!(
                back.iter().all(|byte| *byte == round ^ slot),
                "round {round}, slot {slot}"
            );
        }
    }
}

#[test]
fn registers_answer_and_resets_work_while_there_is_no_link() {
    let bed = Bed::start("size=1MiB");
    let wire = Wire::to(&bed.address);
    let claim = || {
        client::claim(
            &wire.address,
            &export_name(),
            "test",
            Duration::from_secs(5),
        )
    };
    let attached = Attached::new(claim().unwrap());
    let mut driver = attached.driver(1);
    driver.write(1, 0, BLOCK, &[9; 512]).unwrap();
    wire.cut();
    drop(eventually("the cut is noticed", || {
        attached.remote.service();
        attached.remote.take_lost()
    }));
    assert!(driver.read32(farbus_vfio::nvme::reg::CSTS).unwrap() & 1 == 1);
    // A guest that gives up on the drive and starts over, while nobody is there.
    driver.disable().unwrap();
    let claimed = eventually("the export is free again", || claim().ok());
    attached.remote.reconnect(claimed).unwrap();
    driver.enable().unwrap();
    driver.create_queue_pair(1, 64, Some(1)).unwrap();
    let mut back = [0; 512];
    driver.read(1, 0, BLOCK, &mut back).unwrap();
    assert_eq!(back, [9; 512]);
}
