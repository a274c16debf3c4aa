//! What survives the daemon: a file for each attachment, with what was asked for and how far it is. A
//! file is replaced as a whole, so that a crash leaves the old one or the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use log::warn;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::id::AttachmentId;
use super::identity::Identity;
use crate::api::AttachmentSpec;

/// The device that an attachment has got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// The device server's name.
    pub device_server: String,
    /// Where it listens, `HOST:PORT`.
    pub address: String,
    /// The export's name there.
    pub export: String,
}

impl Chosen {
    /// The device's id, `DEVICE-SERVER/EXPORT`.
    #[must_use]
    pub fn id(&self) -> String {
        format!("{}/{}", self.device_server, self.export)
    }
}

/// How far an attachment is: what a daemon that finds it has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "kebab-case")]
pub enum Phase {
    /// A worker is to be started; the VM has nothing yet.
    Starting,
    /// The worker is ready; the VM may have the device already.
    Plugging,
    /// The VM has it.
    Attached,
    /// It is to be taken away.
    Detaching {
        /// Also without the guest's consent.
        force: bool,
    },
    /// It could not be made, or is lost.
    Failed,
}

/// What is remembered of an attachment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub id: AttachmentId,
    /// What tells its socket from those of attachments of the same name before it.
    #[serde(default)]
    pub life: String,
    /// What was asked for.
    pub spec: AttachmentSpec,
    /// The device that it has got.
    pub device: Option<Chosen>,
    /// How far it is.
    pub phase: Phase,
    /// Whether the VM may have the device.
    pub plugged: bool,
    /// Why it has failed, or was not taken away.
    pub reason: Option<String>,
    /// Since when it is as it is, RFC 3339.
    pub since: String,
    /// How often its worker was replaced.
    pub restarts: u32,
    /// The process that carries it, dead perhaps. None before one is started, and until that is written
    /// down; then the next daemon has nothing but the command lines of all processes to find it by.
    #[serde(default)]
    pub worker: Option<Identity>,
}

/// Why nothing can be remembered.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("cannot {what} {path}; the state directory must be writable and have space")]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Another daemon uses the directory.
    #[error(
        "the state directory {path} is in use by another agent; stop that, or choose another directory"
    )]
    InUse {
        /// The directory.
        path: PathBuf,
    },
}

/// The directory of the files.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    /// Locked while this daemon lives.
    _lock: File,
}

impl Store {
    /// Takes the state directory, and makes it if there is none.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let directory = state_dir.join("attachments");
        let mut builder = fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(failed("make the directory", &directory))?;
        let path = state_dir.join("agent.lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed("open", &path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            if error == rustix::io::Errno::WOULDBLOCK {
                let path = state_dir.to_owned();
                StoreError::InUse { path }
            } else {
                failed("lock", &path)(error.into())
            }
        })?;
        Ok(Self {
            directory,
            _lock: lock,
        })
    }

    /// What an earlier daemon has left, and the ids of records that are not understood. A file that is
    /// none of ours is left alone, with a warning.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn load(&self) -> Result<(Vec<Record>, Vec<AttachmentId>), StoreError> {
        let entries = fs::read_dir(&self.directory).map_err(failed("read", &self.directory))?;
        let (mut records, mut strange) = (Vec::new(), Vec::new());
        for path in entries.flatten().map(|entry| entry.path()) {
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => {}
                // Of a daemon that died while it wrote.
                Some("new") => {
                    let _ = fs::remove_file(&path);
                    continue;
                }
                _ => continue,
            }
            let read = fs::read(&path).map_err(|error| error.to_string());
            let record = read.and_then(|bytes| {
                serde_json::from_slice::<Record>(&bytes).map_err(|error| error.to_string())
            });
            match record {
                Ok(record) if path == self.path(&record.id) => records.push(record),
                Ok(record) => warn!("{} is of another attachment: {}", path.display(), record.id),
                Err(error) => {
                    warn!("{} is not understood and ignored: {error}", path.display());
                    let stem = path.file_stem().and_then(|stem| stem.to_str());
                    strange.extend(stem.and_then(|id| AttachmentId::try_from(id.to_owned()).ok()));
                }
            }
        }
        records.sort_by(|a, b| a.id.cmp(&b.id));
        Ok((records, strange))
    }

    /// Remembers an attachment as it is now. It is on the disk when this returns.
    ///
    /// # Errors
    /// When it cannot be written; then the old state is still there.
    pub fn save(&self, record: &Record) -> Result<(), StoreError> {
        let path = self.path(&record.id);
        let new = path.with_extension("new");
        let bytes = serde_json::to_vec_pretty(record)
            .map_err(|error| failed("encode", &path)(error.into()))?;
        let written = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| {
                file.write_all(&bytes)?;
                file.sync_all()
            });
        written.map_err(failed("write", &new))?;
        fs::rename(&new, &path).map_err(failed("replace", &path))?;
        self.sync()
    }

    /// Forgets an attachment.
    ///
    /// # Errors
    /// When its file cannot be removed.
    pub fn forget(&self, id: &AttachmentId) -> Result<(), StoreError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Ok(()) => self.sync(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("remove", &path)(error)),
        }
    }

    /// Whether there is room for more.
    ///
    /// # Errors
    /// When there is not.
    pub fn check(&self) -> Result<(), StoreError> {
        let path = self.directory.join("check");
        let written = fs::write(&path, [0; 4096]).and_then(|()| fs::remove_file(&path));
        written.map_err(failed("write", &path))
    }

    fn path(&self, id: &AttachmentId) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    fn sync(&self) -> Result<(), StoreError> {
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("sync", &self.directory))
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

    use super::*;
    use crate::api::{EndpointSpec, Msix};

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("farbus-store-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        path
    }

    fn record(id: &str, phase: Phase) -> Record {
        Record {
            id: id.to_owned().try_into().unwrap(),
            spec: AttachmentSpec {
                device: Some("rack1/disk0".into()),
                selector: None,
                endpoint: EndpointSpec::VfioUser { msix: Msix::Auto },
                vm: crate::api::Vm::None,
                limits: crate::api::Limits::default(),
                fabric: crate::api::Fabric::Auto,
            },
            device: None,
            phase,
            plugged: false,
            reason: None,
            since: String::new(),
            life: String::new(),
            restarts: 0,
            worker: None,
        }
    }

    #[test]
    fn what_was_saved_last_is_loaded() {
        let path = directory("last");
        let store = Store::open(&path).unwrap();
        store.save(&record("a", Phase::Starting)).unwrap();
        store.save(&record("b", Phase::Attached)).unwrap();
        store
            .save(&record("a", Phase::Detaching { force: true }))
            .unwrap();
        store.forget(&record("b", Phase::Failed).id).unwrap();
        drop(store);

        let loaded = Store::open(&path).unwrap().load().unwrap().0;

        assert_eq!(loaded, [record("a", Phase::Detaching { force: true })]);
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn file_that_is_no_record_is_left_alone_and_a_half_written_one_goes() {
        let path = directory("bad");
        let store = Store::open(&path).unwrap();
        store.save(&record("a", Phase::Attached)).unwrap();
        let within = |name: &str| path.join("attachments").join(name);
        fs::write(within("b.json"), "{").unwrap();
        fs::copy(within("a.json"), within("c.json")).unwrap();
        fs::write(within("a.new"), "{").unwrap();

        let (loaded, _) = store.load().unwrap();

        assert_eq!(loaded.len(), 1);
        assert!(within("b.json").exists() && within("c.json").exists());
        assert!(!within("a.new").exists());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn second_daemon_is_refused() {
        let path = directory("second");
        let _first = Store::open(&path).unwrap();

        let second = Store::open(&path);

        assert!(matches!(second, Err(StoreError::InUse { .. })));
        fs::remove_dir_all(path).unwrap();
    }
}
