//! Asks a daemon's REST interface on its UNIX socket, or over TCP with [`tls`].
//!
//! One connection for each request: these are few, and a daemon that has been restarted between two
//! is no case of its own.

pub mod tls;

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;

use self::tls::Tls;
use crate::problem::Problem;

/// More than any answer of a daemon has.
const ANSWER_LIMIT: usize = 64 << 20;

/// Why there is no answer, or not the wanted one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There is nobody at the socket.
    #[error("no daemon answers at {path}; is it running, and may this user open the socket?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The daemon has refused.
    #[error("{0}")]
    Problem(Box<Problem>),
    /// The connection broke.
    #[error("the daemon at {path} has gone before it had answered {request}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Method and path.
        request: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The answer took too long.
    #[error("the daemon at {path} has not answered {request} within {after:?}")]
    Late {
        /// The socket.
        path: PathBuf,
        /// Method and path.
        request: String,
        /// How long was waited.
        after: Duration,
    },
    /// The answer is not what the interface promises.
    #[error(
        "the daemon at {path} has answered {request} with {status}, and not as expected: {why}"
    )]
    Unexpected {
        /// The socket.
        path: PathBuf,
        /// Method and path.
        request: String,
        /// The status.
        status: StatusCode,
        /// What is wrong.
        why: String,
    },
}

impl ClientError {
    /// The problem, if the daemon has refused.
    #[must_use]
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Self::Problem(problem) => Some(problem),
            _ => None,
        }
    }
}

/// An answer as it came.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: hyper::HeaderMap,
    /// Its body.
    pub body: Bytes,
}

/// A daemon's interface.
#[derive(Clone, Debug)]
pub struct Client {
    /// The socket, or the address.
    path: PathBuf,
    tls: Option<Tls>,
    timeout: Duration,
}

impl Client {
    /// The interface at a UNIX socket. An answer takes `timeout` at most; one that is asked to wait
    /// takes as long as it was asked to.
    #[must_use]
    pub fn new(path: &Path, timeout: Duration) -> Self {
        Self {
            path: path.to_owned(),
            tls: None,
            timeout,
        }
    }

    /// The same over TCP.
    #[must_use]
    pub fn over_tls(tls: Tls, timeout: Duration) -> Self {
        Self {
            path: tls.url().into(),
            tls: Some(tls),
            timeout,
        }
    }

    /// Asks for something.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let answer = self.raw(Method::GET, path, &[], Bytes::new()).await?;
        self.read("GET", path, &answer)
    }

    /// Puts something, and tells with which status it was taken.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<(StatusCode, T), ClientError> {
        self.send(Method::PUT, path, body).await
    }

    /// Posts something, and tells with which status it was taken.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<(StatusCode, T), ClientError> {
        self.send(Method::POST, path, body).await
    }

    /// Deletes something, and tells with which status.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete<T: DeserializeOwned>(
        &self,
        path: &str,
    ) -> Result<(StatusCode, T), ClientError> {
        let answer = self.raw(Method::DELETE, path, &[], Bytes::new()).await?;
        Ok((answer.status, self.read("DELETE", path, &answer)?))
    }

    async fn send<B: Serialize + Sync, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<(StatusCode, T), ClientError> {
        let json = serde_json::to_vec(body).map_err(|error| ClientError::Broken {
            path: self.path.clone(),
            request: format!("{method} {path}"),
            source: error.into(),
        })?;
        let shown = method.to_string();
        let headers = [(header::CONTENT_TYPE, "application/json")];
        let answer = self.raw(method, path, &headers, json.into()).await?;
        Ok((answer.status, self.read(&shown, path, &answer)?))
    }

    fn read<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        answer: &Answer,
    ) -> Result<T, ClientError> {
        let unexpected = |why| ClientError::Unexpected {
            path: self.path.clone(),
            request: format!("{method} {path}"),
            status: answer.status,
            why,
        };
        if !answer.status.is_success() {
            return match serde_json::from_slice(&answer.body) {
                Ok(problem) => Err(ClientError::Problem(problem)),
                Err(error) => Err(unexpected(error.to_string())),
            };
        }
        serde_json::from_slice(&answer.body).map_err(|error| unexpected(error.to_string()))
    }

    /// Sends a request as it is and takes the whole answer, whatever it is.
    ///
    /// # Errors
    /// When there is none.
    pub async fn raw(
        &self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, &str)],
        body: Bytes,
    ) -> Result<Answer, ClientError> {
        let request = format!("{method} {path}");
        let asked = async {
            let response = self.start(method, path, headers, body).await?;
            let (head, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_LIMIT).collect().await;
            Ok(Answer {
                status: head.status,
                headers: head.headers,
                body: body
                    .map_err(|error| self.broken(&request, error))?
                    .to_bytes(),
            })
        };
        let after = self.timeout + asked_to_wait(path);
        match tokio::time::timeout(after, asked).await {
            Ok(done) => done,
            Err(_elapsed) => Err(ClientError::Late {
                path: self.path.clone(),
                request: request.clone(),
                after,
            }),
        }
    }

    async fn start(
        &self,
        method: Method,
        path: &str,
        headers: &[(header::HeaderName, &str)],
        body: Bytes,
    ) -> Result<Response<Incoming>, ClientError> {
        let shown = format!("{method} {path}");
        let stream = self
            .connect()
            .await
            .map_err(|source| ClientError::Connect {
                path: self.path.clone(),
                source,
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(&shown, error))?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "localhost");
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let request = request
            .body(Full::new(body))
            .map_err(|error| self.broken(&shown, error))?;
        sender
            .send_request(request)
            .await
            .map_err(|error| self.broken(&shown, error))
    }

    async fn connect(&self) -> std::io::Result<Box<dyn Stream>> {
        Ok(match &self.tls {
            None => Box::new(UnixStream::connect(&self.path).await?),
            Some(tls) => Box::new(tls.connect().await?),
        })
    }

    fn broken(
        &self,
        request: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> ClientError {
        ClientError::Broken {
            path: self.path.clone(),
            request: request.to_owned(),
            source: source.into(),
        }
    }

    /// The events at `path`, from after the one with the sequence `last`, if given.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn events(&self, path: &str, last: Option<u64>) -> Result<Events, ClientError> {
        let last = last.map(|sequence| sequence.to_string());
        let mut headers = vec![(header::ACCEPT, "text/event-stream")];
        if let Some(last) = &last {
            headers.push((header::HeaderName::from_static("last-event-id"), last));
        }
        let response = self
            .start(Method::GET, path, &headers, Bytes::new())
            .await?;
        let status = response.status();
        if !status.is_success() {
            let request = format!("GET {path}");
            let body = Limited::new(response.into_body(), ANSWER_LIMIT)
                .collect()
                .await;
            let body = body
                .map_err(|error| self.broken(&request, error))?
                .to_bytes();
            let headers = hyper::HeaderMap::new();
            let answer = Answer {
                status,
                headers,
                body,
            };
            return Err(match self.read::<serde_json::Value>("GET", path, &answer) {
                Err(error) => error,
                Ok(_) => self.broken(&request, "no events"),
            });
        }
        Ok(Events {
            body: response.into_body(),
            text: Vec::new(),
        })
    }
}

/// What requests go over.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// The `wait=SECONDS` of a request.
fn asked_to_wait(path: &str) -> Duration {
    let query = path.split_once('?').map_or("", |(_, query)| query);
    let seconds = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("wait="))
        .and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(0))
}

/// One server-sent event.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerEvent {
    /// Its id.
    pub id: Option<String>,
    /// Its name.
    pub name: String,
    /// Its data.
    pub data: String,
}

/// A stream of server-sent events.
#[derive(Debug)]
pub struct Events {
    body: Incoming,
    text: Vec<u8>,
}

impl Events {
    /// The next event; `None` when the daemon has ended the stream, or the connection is lost. May be
    /// given up at any time and called again.
    pub async fn next(&mut self) -> Option<ServerEvent> {
        loop {
            while let Some(end) = self.text.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = self.text.drain(..end + 2).collect();
                if let Some(event) = parse(&String::from_utf8_lossy(&block)) {
                    return Some(event);
                }
            }
            if self.text.len() > ANSWER_LIMIT {
                return None;
            }
            let frame = self.body.frame().await?.ok()?;
            if let Some(data) = frame.data_ref() {
                self.text.extend_from_slice(data);
            }
        }
    }
}

/// One event of the stream, without those that are comments only.
fn parse(block: &str) -> Option<ServerEvent> {
    let mut event = ServerEvent::default();
    let mut any = false;
    for line in block.lines() {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => event.id = Some(value.to_owned()),
            "event" => value.clone_into(&mut event.name),
            "data" => {
                if any {
                    event.data.push('\n');
                }
                event.data.push_str(value);
                any = true;
            }
            _ => {}
        }
    }
    any.then_some(event)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_is_read_field_by_field() {
        let event = parse("event: attachment\nid: 7\ndata: {\"a\":\ndata: 1}\n\n");

        let wanted = ServerEvent {
            id: Some("7".into()),
            name: "attachment".into(),
            data: "{\"a\":\n1}".into(),
        };
        assert_eq!(event, Some(wanted));
    }

    #[test]
    fn comment_is_no_event() {
        assert_eq!(parse(": still there\n\n"), None);
    }

    #[test]
    fn wait_of_a_request_lengthens_the_patience() {
        assert_eq!(
            asked_to_wait("/v1/attachments/a?force=true&wait=7"),
            Duration::from_secs(7)
        );
        assert_eq!(asked_to_wait("/v1/attachments/a"), Duration::ZERO);
    }
}
