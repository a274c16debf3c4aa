//! Names of attachments. They become names of files, of QEMU's objects and of metrics' labels, so
//! they are of few kinds of characters.

use std::fmt;
use std::path::{Path, PathBuf};

use axum::http::StatusCode;
use farbus_rest::listen::MAX_PATH;
use farbus_rest::problem::Problem;
use serde::{Deserialize, Serialize};

/// What an id looks like, as a regular expression.
pub const PATTERN: &str = "^[a-z0-9][a-z0-9._-]{0,62}$";

/// An attachment's name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AttachmentId(String);

impl AttachmentId {
    /// The name as it was given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where its VM connects to. `life`, which may be empty, tells attachments of one name from each
    /// other.
    ///
    /// # Errors
    /// When that does not fit in a socket's address.
    pub fn socket(&self, sockets: &Path, life: &str) -> Result<PathBuf, Problem> {
        let path = match life {
            "" => sockets.join(format!("{self}.sock")),
            life => sockets.join(format!("{self}.{life}.sock")),
        };
        let len = path.as_os_str().len();
        if len > MAX_PATH {
            let shown = path.display();
            return Err(wrong(format!(
                "its socket would be {shown}, which has {len} bytes where {MAX_PATH} fit"
            ))
            .with_remedy("choose a shorter id"));
        }
        Ok(path)
    }

    /// Whether a socket is one of this attachment's.
    #[must_use]
    pub fn owns(&self, socket: &Path) -> bool {
        let name = socket.file_name().and_then(|name| name.to_str());
        name.and_then(|name| name.strip_prefix(&self.0))
            .is_some_and(|rest| rest.starts_with('.'))
    }
}

fn wrong(detail: String) -> Problem {
    Problem::new(
        StatusCode::BAD_REQUEST,
        "invalid-id",
        "The id cannot be an attachment's",
        detail,
    )
}

impl TryFrom<String> for AttachmentId {
    type Error = Problem;

    fn try_from(text: String) -> Result<Self, Problem> {
        let first = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let bytes = text.as_bytes();
        let good = (1..=63).contains(&bytes.len())
            && first(bytes[0])
            && bytes.iter().all(|c| first(*c) || b"._-".contains(c));
        if good {
            Ok(Self(text))
        } else {
            // What is shown of it is bounded; it may be anything.
            let shown: String = text.chars().take(80).collect();
            Err(wrong(format!("{shown:?} is no id"))
                .with_remedy(format!("an id matches {PATTERN}")))
        }
    }
}

impl From<AttachmentId> for String {
    fn from(id: AttachmentId) -> Self {
        id.0
    }
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_id(text: &str) -> bool {
        AttachmentId::try_from(text.to_owned()).is_ok()
    }

    #[test]
    fn ids_are_short_and_safe_in_paths() {
        assert!(is_id("a") && is_id("vm1-disk0.b_2") && is_id(&"x".repeat(63)));
        for wrong in ["", ".", "..", "-a", "A", "a/b", "a\0", "ä", &"x".repeat(64)] {
            assert!(!is_id(wrong), "{wrong:?}");
        }
    }

    #[test]
    fn socket_that_does_not_fit_is_refused() {
        let id = AttachmentId("x".repeat(63));
        assert!(id.socket(Path::new("/run/farbus/attachments"), "").is_ok());
        assert!(
            id.socket(Path::new("/run/farbus/attachments/of/this/machine"), "")
                .is_err()
        );
    }
}
