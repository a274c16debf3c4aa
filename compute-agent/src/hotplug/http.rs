//! One HTTP/1.1 request over a UNIX socket (RFC 9112), for servers that answer with a length.

use std::path::Path;

use super::HotplugError;
use super::wait::{Connection, Until, excerpt};

/// The longest head of an answer, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// The longest body of an answer, in bytes. cloud-hypervisor describes a VM in some ten kilobytes.
const MAX_BODY: usize = 4 << 20;

/// An answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

impl Answer {
    pub(super) fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }
}

/// Sends a request, with JSON as its body if there is one, and takes the answer.
pub(super) fn request(
    what: &'static str,
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&str>,
    until: Until,
) -> Result<Answer, HotplugError> {
    let doing = format!("answering {method} {path}");
    let mut connection = Connection::open(what, socket, until)?;
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
    if let Some(body) = body {
        head += &format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        );
    }
    let request = format!("{head}\r\n{}", body.unwrap_or_default());
    connection.send(request.as_bytes(), &doing, until)?;

    let mut received = Vec::new();
    loop {
        match parse(&received) {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => {}
            Err(BadAnswer) => return Err(wrong(what, &connection, &received)),
        }
        let mut buffer = [0; 4096];
        match connection.receive(&mut buffer, &doing, until)? {
            0 if received.is_empty() => return Err(connection.closed(&doing)),
            0 => return Err(wrong(what, &connection, &received)),
            len => received.extend_from_slice(buffer.get(..len).unwrap_or_default()),
        }
    }
}

fn wrong(what: &'static str, connection: &Connection, said: &[u8]) -> HotplugError {
    HotplugError::WrongProtocol {
        socket: connection.socket().to_owned(),
        protocol: what,
        said: excerpt(said),
    }
}

/// What no server says that we speak with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BadAnswer;

/// The answer, if all of it is there.
pub(super) fn parse(received: &[u8]) -> Result<Option<Answer>, BadAnswer> {
    // Whatever else listens there is known by its first words.
    let begin = b"HTTP/1.";
    let compared = received.len().min(begin.len());
    if received.get(..compared) != begin.get(..compared) {
        return Err(BadAnswer);
    }
    let Some(head_end) = received.windows(4).position(|end| end == b"\r\n\r\n") else {
        let is_too_long = received.len() > MAX_HEAD;
        return if is_too_long {
            Err(BadAnswer)
        } else {
            Ok(None)
        };
    };
    let (head, rest) = received.split_at_checked(head_end).ok_or(BadAnswer)?;
    let head = std::str::from_utf8(head).map_err(|_| BadAnswer)?;
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .and_then(|line| line.split(' ').nth(1)?.parse().ok())
        .filter(|status| (100..600).contains(status))
        .ok_or(BadAnswer)?;
    let mut length = 0;
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().map_err(|_| BadAnswer)?;
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(BadAnswer);
        }
    }
    if length > MAX_BODY {
        return Err(BadAnswer);
    }
    let body = rest.get(4..).unwrap_or_default().get(..length);
    Ok(body.map(|body| Answer {
        status,
        body: body.to_vec(),
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn answer_is_taken_when_all_of_it_has_come() {
        let said = b"HTTP/1.1 200 \r\nServer: x\r\ncontent-length: 3\r\n\r\n{}\n";
        for cut in 0..said.len() {
            assert_eq!(parse(&said[..cut]), Ok(None), "{cut}");
        }
        let answer = parse(said).unwrap().unwrap();
        assert_eq!((answer.status, &answer.body[..]), (200, &b"{}\n"[..]));
    }

    #[test]
    fn answer_without_a_length_has_no_body() {
        let answer = parse(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap().unwrap();
        assert!(answer.is_success() && answer.body.is_empty());
    }

    #[test]
    fn what_is_not_http_is_refused_at_once() {
        for said in [
            &b"{\"QMP\": {}}"[..],
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n",
            b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n",
        ] {
            assert_eq!(parse(said), Err(BadAnswer));
        }
        assert_eq!(
            parse(&[&b"HTTP/1.1 "[..], &[b'a'; MAX_HEAD]].concat()),
            Err(BadAnswer)
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(
            begins in prop_oneof![Just(&b""[..]), Just(&b"HTTP/1.1 200 \r\nContent-Length: "[..])],
            rest in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let _ = parse(&[begins, &rest].concat());
        }
    }
}
