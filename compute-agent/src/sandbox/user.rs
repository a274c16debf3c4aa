//! Whom workers become: an account of the configuration, looked up, and held against the directories on
//! the way to the custody socket, which a worker must find again when the daemon is replaced.
#![allow(unsafe_code, reason = "accounts are looked up by the C library")]

use std::ffi::CString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::{fmt, ptr};

/// Room for the strings of an account's record, in bytes.
const RECORD: usize = 16 << 10;

/// A user and a group by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user.
    pub uid: u32,
    /// The only group.
    pub gid: u32,
}

impl FromStr for User {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once(':').and_then(|(uid, gid)| {
            Some(Self {
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
            })
        });
        parsed.ok_or_else(|| format!("{text:?} is not UID:GID, two numbers"))
    }
}

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.uid, self.gid)
    }
}

/// Why workers cannot be this user.
#[derive(Debug, thiserror::Error)]
pub enum WorkerUserError {
    /// There is no such account.
    #[error(
        "worker-user {name:?} is not an account of this host; create it (useradd --system {name}), or \
         give UID:GID, two numbers"
    )]
    Unknown {
        /// What the configuration says.
        name: String,
    },
    /// The accounts cannot be read.
    #[error("worker-user {name:?} cannot be looked up; give UID:GID, two numbers")]
    LookUp {
        /// What the configuration says.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A worker would not find a new daemon.
    #[error(
        "worker-user {user} cannot pass {path}, where workers find the daemon again; chmod o+x {path}, \
         or choose another runtime-dir"
    )]
    Shut {
        /// The user.
        user: User,
        /// The directory.
        path: PathBuf,
    },
}

/// The account of this name, or `UID:GID`.
///
/// # Errors
/// When there is none.
pub fn resolve(name: &str) -> Result<User, WorkerUserError> {
    if let Ok(user) = name.parse() {
        return Ok(user);
    }
    let unknown = || WorkerUserError::Unknown {
        name: name.to_owned(),
    };
    let c_name = CString::new(name).map_err(|_| unknown())?;
    let mut strings = vec![0; RECORD];
    // SAFETY: all of its fields are numbers or pointers, for which zeros are valid.
    let mut record: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = ptr::null_mut();
    // SAFETY: the name ends with NUL, the others are valid for writes of their sizes, and what the record
    // points to then, `strings`, is not used.
    let error = unsafe {
        libc::getpwnam_r(
            c_name.as_ptr(),
            &raw mut record,
            strings.as_mut_ptr(),
            strings.len(),
            &raw mut found,
        )
    };
    match (error, found.is_null()) {
        (0, false) => Ok(User {
            uid: record.pw_uid,
            gid: record.pw_gid,
        }),
        (0 | libc::ENOENT | libc::ESRCH, true) => Err(unknown()),
        (error, _) => Err(WorkerUserError::LookUp {
            name: name.to_owned(),
            source: io::Error::from_raw_os_error(error),
        }),
    }
}

/// Whether the user can get into the directory, by the modes of it and of those above.
///
/// # Errors
/// With the one that it cannot pass.
pub fn check_way(user: User, directory: &Path) -> Result<(), WorkerUserError> {
    let shut = directory.ancestors().find(|path| {
        // What cannot be looked at may do all the same.
        path.metadata().is_ok_and(|found| {
            let bit = if found.uid() == user.uid {
                0o100
            } else if found.gid() == user.gid {
                0o010
            } else {
                0o001
            };
            user.uid != 0 && found.mode() & bit == 0
        })
    });
    shut.map_or(Ok(()), |path| {
        let path = path.to_owned();
        Err(WorkerUserError::Shut { user, path })
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn accounts_are_found_by_name_and_numbers_need_none() {
        assert_eq!(resolve("root").unwrap(), User { uid: 0, gid: 0 });
        assert_eq!(resolve("12:34").unwrap(), User { uid: 12, gid: 34 });
        for name in ["no-such-account", "12", "a\0b", ""] {
            let error = resolve(name).unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")), "{error}");
        }
    }

    #[test]
    fn directory_that_the_user_cannot_pass_is_named() {
        let outer = std::env::temp_dir().join(format!("farbus-way-{}", std::process::id()));
        let inner = outer.join("inner");
        std::fs::create_dir_all(&inner).unwrap();
        let set = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&outer, mode).unwrap();
        };
        let user = User {
            uid: 4_000_000,
            gid: 4_000_000,
        };

        set(0o755);
        let open = check_way(user, &inner);
        set(0o700);
        let shut = check_way(user, &inner);

        std::fs::remove_dir_all(&outer).unwrap();
        open.unwrap();
        let error = shut.unwrap_err().to_string();
        assert!(error.contains(&outer.display().to_string()), "{error}");
        assert!(error.contains("4000000:4000000"), "{error}");
    }
}
