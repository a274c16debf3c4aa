//! Many clients at once: those that listen leave room for those that ask.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use farbus_integration::deadline::Deadline;
use farbus_integration::report::TestResult;
use hyper::Method;

use crate::bed::Bed;

/// As `docs/operations.md` has it.
const STREAMS: usize = 64;

/// Asks for the events; the stream, and the first line of the answer.
fn listen(bed: &Bed) -> std::io::Result<(UnixStream, String)> {
    let mut stream = UnixStream::connect(bed.scratch.join("agent.sock"))?;
    stream.set_read_timeout(Some(std::time::Duration::from_secs(60)))?;
    stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    Ok((stream, String::from_utf8_lossy(&head).into_owned()))
}

#[test]
fn event_streams_leave_room_for_requests() -> TestResult {
    let bed = Bed::new("streams", 1)?;
    let mut streams = Vec::new();
    for number in 0..STREAMS {
        let (stream, status) = listen(&bed)?;
        assert_eq!(status, "HTTP/1.1 200", "stream {number}");
        streams.push(stream);
    }

    let refused = bed.service.ask(Method::GET, "/v1/events", None)?;

    assert_eq!(refused.status, 503);
    let problem = farbus_integration::service::problem(&refused)?;
    assert_eq!(problem.kind, "/problems/too-many-event-streams");
    assert!(problem.remedy.is_some());
    assert_eq!(bed.service.ask(Method::GET, "/healthz", None)?.status, 200);
    // One that goes makes room.
    streams.pop();
    let deadline = Deadline::secs(30);
    while listen(&bed)?.1 != "HTTP/1.1 200" {
        assert!(!deadline.has_passed(), "no stream although one has ended");
    }
    Ok(())
}
