//! The topology in a file: for centers that share one machine.
//!
//! A change writes a new file beside the old one, makes it durable and renames it over: a reader sees the old
//! or the new document, whole. Writers exclude each other by a lock on a file of its own, because the
//! document's own file is another one after each change.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::document::{Extra, Topology};

/// How long a writer waits for another writer. Each holds the lock for a few file operations.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// How often it looks.
const LOCK_INTERVAL: Duration = Duration::from_millis(5);
/// More than any topology, so that a wrong file does not fill the memory.
const MAX_BYTES: u64 = 1 << 20;

/// Which version of the document: grows by one with each change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Revision(pub u64);

/// The document and its revision.
#[derive(Debug, Clone, PartialEq)]
pub struct Versioned {
    /// Its revision.
    pub revision: Revision,
    /// The document.
    pub topology: Arc<Topology>,
}

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no document yet.
    #[error("there is no topology at {}", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// Somebody changed it meanwhile. Nothing happened.
    #[error("the topology has changed meanwhile (it is at revision {})", found.map_or(0, |found| found.0))]
    Conflict {
        /// The revision that was found, none if there is no document.
        found: Option<Revision>,
    },
    /// Somebody else holds the lock and does not let go. Nothing happened.
    #[error("the topology at {} stays locked by another process", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
    },
    /// The document cannot be understood.
    #[error("the topology at {} cannot be used: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file system refused. A change may have happened all the same: read it again.
    #[error("the topology at {} cannot be {action}: {source}", path.display())]
    Io {
        /// `read` or `written`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// The file's form: the document with its revision in front.
#[derive(Serialize)]
struct Stored<'a> {
    revision: Revision,
    #[serde(flatten)]
    topology: &'a Topology,
}

/// Reading it takes the revision out first: serde's `flatten` would lose the numeric keys of nested maps.
fn parse(text: &str) -> Result<Versioned, serde_json::Error> {
    let mut fields: Extra = serde_json::from_str(text)?;
    let revision = fields.remove("revision").unwrap_or_default();
    Ok(Versioned {
        revision: serde_json::from_value(revision)?,
        topology: Arc::new(serde_json::from_value(serde_json::Value::Object(fields))?),
    })
}

/// The store. All calls block: run them where that does no harm.
#[derive(Debug, Clone)]
pub struct FileStore {
    path: Arc<Path>,
}

impl FileStore {
    /// A store in this file; its folder has to exist.
    pub fn new(path: impl Into<PathBuf>) -> FileStore {
        FileStore { path: path.into().into() }
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the document.
    pub fn load(&self) -> Result<Versioned, StoreError> {
        let file = File::open(&self.path).map_err(|source| self.read_error(source))?;
        let mut text = String::new();
        io::Read::read_to_string(&mut io::Read::take(file, MAX_BYTES), &mut text)
            .map_err(|source| self.read_error(source))?;
        let found = parse(&text).map_err(|error| self.malformed(error.to_string()))?;
        found.topology.check().map_err(|reason| self.malformed(reason))?;
        Ok(found)
    }

    /// Replaces the document if it is at revision `expected`; `None` creates it if there is none.
    pub fn compare_and_set(
        &self,
        expected: Option<Revision>,
        topology: &Topology,
    ) -> Result<Revision, StoreError> {
        topology.check().map_err(|reason| self.malformed(reason))?;
        let _lock = self.lock()?;
        let found = match self.load() {
            Ok(found) => Some(found.revision),
            Err(StoreError::Missing { .. }) => None,
            Err(error) => return Err(error),
        };
        if found != expected {
            return Err(StoreError::Conflict { found });
        }
        let revision = Revision(found.map_or(0, |found| found.0) + 1);
        let mut text = serde_json::to_vec_pretty(&Stored { revision, topology })
            .map_err(|error| self.malformed(error.to_string()))?;
        text.push(b'\n');
        self.replace(&text).map_err(|source| self.write_error(source))?;
        Ok(revision)
    }

    fn replace(&self, text: &[u8]) -> io::Result<()> {
        let next = self.beside(".new");
        let mut file = File::create(&next)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(&next, &self.path)?;
        // The rename is durable once the folder is.
        File::open(self.folder())?.sync_all()
    }

    fn lock(&self) -> Result<File, StoreError> {
        let path = self.beside(".lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|source| self.write_error(source))?;
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_INTERVAL);
                }
                Err(TryLockError::WouldBlock) => return Err(StoreError::Locked { path }),
                Err(TryLockError::Error(source)) => return Err(self.write_error(source)),
            }
        }
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    }

    fn folder(&self) -> &Path {
        match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    }

    pub(super) fn panicked(&self) -> StoreError {
        self.malformed("reading it panicked".to_owned())
    }

    fn read_error(&self, source: io::Error) -> StoreError {
        if source.kind() == io::ErrorKind::NotFound {
            return StoreError::Missing { path: self.path.to_path_buf() };
        }
        StoreError::Io { action: "read", path: self.path.to_path_buf(), source }
    }

    fn write_error(&self, source: io::Error) -> StoreError {
        StoreError::Io { action: "written", path: self.path.to_path_buf(), source }
    }

    fn malformed(&self, reason: String) -> StoreError {
        StoreError::Malformed { path: self.path.to_path_buf(), reason }
    }
}
