//! The record of lent functions: a file, so that what a process which died had lent can be
//! given back by the next one.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::SysfsError;
use super::process::Process;
use crate::PciAddress;

const VERSION: u32 = 1;
/// The longest record that is read, in bytes: several thousand functions.
const MAX_LEN: u64 = 1 << 20;
/// A change of the record takes microseconds; whoever has it for longer than this hangs.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often the lock is asked for meanwhile: flock(2) has no time limit.
const RETRY: Duration = Duration::from_millis(10);

/// What has been lent, and by whom.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    version: u32,
    #[serde(default)]
    pub(super) functions: Vec<Loan>,
    #[serde(default)]
    pub(super) sriov: Vec<Created>,
}

/// A function that was bound to VFIO, and what it was before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Loan {
    pub(super) address: PciAddress,
    pub(super) former_driver: Option<String>,
    pub(super) former_override: Option<String>,
    pub(super) owner: Process,
}

/// Virtual functions that were made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Created {
    pub(super) physical: PciAddress,
    pub(super) count: u16,
    pub(super) owner: Process,
    /// Secondary NVMe controllers that were given queues and interrupts for it.
    #[serde(default)]
    pub(super) secondaries: Vec<u16>,
}

/// The file that holds the record, changed under a lock and replaced as a whole.
pub(super) struct RecordFile {
    path: PathBuf,
    lock: PathBuf,
}

const FILE: &str = "bindings.json";

impl RecordFile {
    /// Whether there is a record in a directory.
    pub(super) fn exists(directory: &Path) -> bool {
        directory.join(FILE).exists()
    }

    /// The record in a directory, which is made if there is none.
    pub(super) fn open(directory: &Path) -> Result<Self, SysfsError> {
        let record = Self {
            path: directory.join(FILE),
            lock: directory.join("bindings.lock"),
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|source| record.error("has no directory that can be made", Some(source)))?;
        Ok(record)
    }

    fn error(&self, what: impl Into<String>, source: Option<io::Error>) -> SysfsError {
        SysfsError::Record {
            path: self.path.clone(),
            what: what.into(),
            source,
        }
    }

    /// What is on record now.
    pub(super) fn read(&self) -> Result<Record, SysfsError> {
        let _lock = self.locked()?;
        self.load()
    }

    /// Changes the record. When this returns, the change will survive this process.
    pub(super) fn change<T>(
        &self,
        change: impl FnOnce(&mut Record) -> Result<T, SysfsError>,
    ) -> Result<T, SysfsError> {
        let _lock = self.locked()?;
        let mut record = self.load()?;
        let result = change(&mut record)?;
        self.save(&record)
            .map_err(|source| self.error("cannot be written", Some(source)))?;
        Ok(result)
    }

    /// The lock, which goes with the file that is returned, also when the process dies.
    fn locked(&self) -> Result<File, SysfsError> {
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&self.lock)
            .map_err(|source| self.error("cannot be locked", Some(source)))?;
        let begin = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if begin.elapsed() < PATIENCE => {
                    thread::sleep(RETRY);
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(SysfsError::Locked {
                        path: self.lock.clone(),
                        waited: PATIENCE,
                    });
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(self.error("cannot be locked", Some(error.into()))),
            }
        }
    }

    fn load(&self) -> Result<Record, SysfsError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Record {
                    version: VERSION,
                    ..Record::default()
                });
            }
            Err(error) => return Err(self.error("cannot be read", Some(error))),
        };
        let mut bytes = Vec::new();
        file.take(MAX_LEN)
            .read_to_end(&mut bytes)
            .map_err(|source| self.error("cannot be read", Some(source)))?;
        let damaged = |why: String| {
            let what = format!(
                "is damaged ({why}); give the functions that `farbus-device-server list` shows on \
                 vfio-pci back by hand where needed, and delete the file"
            );
            self.error(what, None)
        };
        let record: Record =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!(
                "version {} where {VERSION} is known",
                record.version
            )));
        }
        Ok(record)
    }

    fn save(&self, record: &Record) -> io::Result<()> {
        let next = self.path.with_extension("json.next");
        let mut file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&next)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.sync_all()?;
        fs::rename(&next, &self.path)
    }
}
