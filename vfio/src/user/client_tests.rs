//! The client against servers that misbehave, played by hand.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::body::{DmaTransfer, RegionAccess, Version};
use super::wire::{FLAG_NO_REPLY, HEADER_LEN};
use super::*;
use crate::Iova;

const PATIENCE: Duration = Duration::from_secs(10);

/// The server's end, as bytes.
struct Fake(UnixStream);

impl Fake {
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut head = [0; HEADER_LEN];
        self.0.read_exact(&mut head).unwrap();
        let header = Header::decode(&head);
        let mut body = vec![0; header.body_len().unwrap()];
        self.0.read_exact(&mut body).unwrap();
        (header, body)
    }

    fn send(&mut self, header: &Header, body: &[u8]) {
        self.0
            .write_all(&[&header.encode()[..], body].concat())
            .unwrap();
    }

    fn shake_hands(&mut self) {
        let (header, _) = self.receive();
        let body = Version { major: 0, minor: 1 }.encode();
        self.send(&header.reply(body.len()), &body);
    }
}

/// A client whose server shakes hands and then does as `script` says.
fn against(
    timeout: Duration,
    script: impl FnOnce(&mut Fake) + Send + 'static,
) -> (Client, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut fake = Fake(theirs);
        fake.shake_hands();
        script(&mut fake);
    });
    (Client::from_stream(ours, timeout).unwrap(), server)
}

#[test]
fn a_server_that_does_not_answer_is_waited_for_until_the_deadline_only() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let begin = Instant::now();
    let result = Client::from_stream(ours, Duration::from_millis(30)).map(drop);
    assert!(matches!(
        result,
        Err(ClientError::TimedOut {
            command: Command::Version,
            ..
        })
    ));
    assert!(begin.elapsed() < PATIENCE);
}

#[test]
fn a_server_that_goes_away_is_noticed() {
    let (mut client, server) = against(PATIENCE, |fake| {
        fake.receive();
    });
    let result = client.device_info();
    assert!(matches!(
        result,
        Err(ClientError::Closed {
            command: Command::DeviceGetInfo
        })
    ));
    server.join().unwrap();
}

#[test]
fn a_version_that_was_not_proposed_is_refused() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut fake = Fake(theirs);
        let (header, _) = fake.receive();
        let body = Version { major: 1, minor: 0 }.encode();
        fake.send(&header.reply(body.len()), &body);
    });
    let result = Client::from_stream(ours, PATIENCE).map(drop);
    assert!(matches!(result, Err(ClientError::Nonsense { .. })));
    server.join().unwrap();
}

#[test]
fn an_error_reply_is_told_and_the_connection_goes_on() {
    let (mut client, server) = against(PATIENCE, |fake| {
        let (header, _) = fake.receive();
        fake.send(&header.error_reply(libc::EIO), &[]);
        let (header, _) = fake.receive();
        fake.send(&header.reply(0), &[]);
    });
    let refused = client.reset().unwrap_err();
    assert!(matches!(refused, ClientError::Refused { errno, .. } if errno == libc::EIO as u32));
    assert!(!refused.is_fatal());
    client.reset().unwrap();
    server.join().unwrap();
}

#[test]
fn a_reply_to_something_else_makes_no_sense() {
    let (mut client, server) = against(PATIENCE, |fake| {
        let (header, _) = fake.receive();
        fake.send(
            &Header {
                id: header.id.wrapping_add(1),
                ..header.reply(0)
            },
            &[],
        );
    });
    assert!(matches!(client.reset(), Err(ClientError::Nonsense { .. })));
    server.join().unwrap();
}

#[test]
fn a_reply_of_absurd_size_is_refused() {
    for size in [0, 15, u32::MAX] {
        let (mut client, server) = against(PATIENCE, move |fake| {
            let (header, _) = fake.receive();
            fake.send(
                &Header {
                    size,
                    ..header.reply(0)
                },
                &[],
            );
        });
        assert!(matches!(client.reset(), Err(ClientError::Malformed { .. })));
        server.join().unwrap();
    }
}

#[test]
fn a_read_that_returns_another_length_makes_no_sense() {
    let (mut client, server) = against(PATIENCE, |fake| {
        let (header, _) = fake.receive();
        let body = [
            &RegionAccess {
                offset: 0,
                region: 0,
                count: 4,
            }
            .encode()[..],
            &[1; 4],
        ];
        fake.send(&header.reply(20), &body.concat());
    });
    assert!(matches!(
        client.region_read(0, 0, &mut [0; 8]),
        Err(ClientError::Nonsense { .. })
    ));
    server.join().unwrap();
}

/// One page of memory at 0x1000.
struct Page(Arc<Mutex<Vec<u8>>>);

impl Page {
    fn range(iova: Iova, len: usize) -> Result<std::ops::Range<usize>, i32> {
        let start = iova.0.checked_sub(0x1000).ok_or(libc::EFAULT)? as usize;
        let end = start
            .checked_add(len)
            .filter(|end| *end <= 4096)
            .ok_or(libc::EFAULT)?;
        Ok(start..end)
    }
}

impl DmaMemory for Page {
    fn read(&mut self, iova: Iova, data: &mut [u8]) -> Result<(), i32> {
        data.copy_from_slice(&self.0.lock().unwrap()[Self::range(iova, data.len())?]);
        Ok(())
    }

    fn write(&mut self, iova: Iova, data: &[u8]) -> Result<(), i32> {
        self.0.lock().unwrap()[Self::range(iova, data.len())?].copy_from_slice(data);
        Ok(())
    }
}

#[test]
fn a_servers_requests_for_memory_are_served_while_a_call_waits() {
    let page = Arc::new(Mutex::new(vec![0; 4096]));
    let (mut client, server) = against(PATIENCE, |fake| {
        let (asked, _) = fake.receive();
        let transfer = DmaTransfer {
            address: 0x1008,
            count: 4,
        }
        .encode();
        let write = [&transfer[..], &[1, 2, 3, 4]].concat();
        fake.send(
            &Header::command(70, Command::DmaWrite, FLAG_NO_REPLY, 20),
            &write,
        );
        fake.send(&Header::command(71, Command::DmaWrite, 0, 20), &write);
        let (reply, body) = fake.receive();
        assert_eq!(
            (reply.id, reply.is_error(), &body[..]),
            (71, false, &transfer[..])
        );
        fake.send(&Header::command(72, Command::DmaRead, 0, 16), &transfer);
        let (reply, body) = fake.receive();
        assert_eq!((reply.id, &body[16..]), (72, &[1, 2, 3, 4][..]));
        for (address, count) in [(0, 4), (0x1ffd, 4), (0x1000, u64::MAX), (u64::MAX, 8)] {
            let transfer = DmaTransfer { address, count }.encode();
            fake.send(&Header::command(73, Command::DmaRead, 0, 16), &transfer);
            assert!(fake.receive().0.is_error());
        }
        fake.send(&Header::command(74, Command::DeviceReset, 0, 0), &[]);
        assert_eq!(fake.receive().0.error, libc::ENOTSUP as u32);
        fake.send(&asked.reply(0), &[]);
    });
    client.serve_memory(Box::new(Page(page.clone())));
    client.reset().unwrap();
    assert_eq!(page.lock().unwrap()[8..12], [1, 2, 3, 4]);
    server.join().unwrap();
}
