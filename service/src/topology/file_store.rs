//! The topology in a file: for centers that share one machine.
//!
//! A change writes a new file beside the old one, makes it durable and renames it over: a reader sees the old
//! or the new document, whole. Writers exclude each other by a lock on a file of its own, because the
//! document's own file is another one after each change.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use serde::Serialize;

use super::document::Topology;
use super::folder_watch::FolderWatch;
use super::store::{Changes, MAX_BYTES, Revision, StoreError, TopologyStore, Versioned, parse};

/// How long a writer waits for another writer. Each holds the lock for a few file operations.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// How often it looks.
const LOCK_INTERVAL: Duration = Duration::from_millis(5);
/// How often the file is read again. Reading it costs some tens of microseconds, and every read is also a
/// confirming one.
const CONFIRM_INTERVAL: Duration = Duration::from_millis(100);

/// The file's form: the document with its revision in front.
#[derive(Serialize)]
struct Stored<'a> {
    revision: Revision,
    #[serde(flatten)]
    topology: &'a Topology,
}

/// The store. Its own calls block: run them where that does no harm. Those of [`TopologyStore`] do not.
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
        let file = File::open(&self.path).map_err(|source| self.read_error(&source))?;
        let mut text = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, MAX_BYTES as u64), &mut text)
            .map_err(|source| self.read_error(&source))?;
        let (revision, topology) = parse(&text, "revision").map_err(|reason| self.malformed(reason))?;
        let revision = serde_json::from_value(revision).map_err(|error| self.malformed(error.to_string()))?;
        Ok(Versioned { revision, topology: Arc::new(topology) })
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
        self.replace(&text)?;
        Ok(revision)
    }

    fn replace(&self, text: &[u8]) -> Result<(), StoreError> {
        let next = self.beside(".new");
        let written = File::create(&next).and_then(|mut file| {
            file.write_all(text)?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&next, &self.path)).map_err(|source| self.write_error(&source))?;
        // The rename is durable once the folder is. Readers see it already.
        File::open(self.folder())
            .and_then(|folder| folder.sync_all())
            .map_err(|source| StoreError::Unknown { place: self.place(), reason: source.to_string() })
    }

    fn lock(&self) -> Result<File, StoreError> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.beside(".lock"))
            .map_err(|source| self.write_error(&source))?;
        let deadline = Instant::now() + LOCK_WAIT;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_INTERVAL);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(self.unavailable("changed", "it stays locked by another process".to_owned()));
                }
                Err(TryLockError::Error(source)) => return Err(self.write_error(&source)),
            }
        }
    }

    pub(super) fn beside(&self, suffix: &str) -> PathBuf {
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

    pub(super) fn unavailable(&self, action: &'static str, reason: String) -> StoreError {
        StoreError::Unavailable { action, place: self.place(), reason }
    }

    fn read_error(&self, source: &io::Error) -> StoreError {
        if source.kind() == io::ErrorKind::NotFound {
            return StoreError::Missing { place: self.place() };
        }
        self.unavailable("read", source.to_string())
    }

    fn write_error(&self, source: &io::Error) -> StoreError {
        self.unavailable("written", source.to_string())
    }

    fn malformed(&self, reason: String) -> StoreError {
        StoreError::Malformed { place: self.place(), reason }
    }
}

impl TopologyStore for FileStore {
    fn load(&self) -> BoxFuture<'_, Result<Versioned, StoreError>> {
        let store = self.clone();
        blocking(move || store.load()).boxed()
    }

    fn compare_and_set<'a>(
        &'a self,
        expected: Option<Revision>,
        topology: &'a Topology,
    ) -> BoxFuture<'a, Result<Revision, StoreError>> {
        let (store, topology) = (self.clone(), topology.clone());
        blocking(move || store.compare_and_set(expected, &topology)).boxed()
    }

    fn watch(&self, after: Revision) -> Changes {
        let store = self.clone();
        let watch = FolderWatch::new(self.folder());
        let start = async move {
            match watch {
                Ok(watch) => changes(store, watch, after),
                Err(error) => {
                    let error = store.unavailable("watched", error.to_string());
                    futures_util::stream::once(async move { Err(error) }).boxed()
                }
            }
        };
        start.flatten_stream().boxed()
    }

    fn confirm_interval(&self) -> Duration {
        CONFIRM_INTERVAL
    }

    fn place(&self) -> String {
        self.path.display().to_string()
    }
}

/// What the file shows, first now (it may have changed before the folder was watched), then after each change.
fn changes(store: FileStore, watch: FolderWatch, after: Revision) -> Changes {
    let name: OsString = store.path.file_name().unwrap_or_default().to_owned();
    let state = (store, watch, after, false, name);
    futures_util::stream::try_unfold(state, async |(store, watch, mut after, mut wait, name)| {
        loop {
            if wait {
                watch
                    .changed(|changed| changed == name)
                    .await
                    .map_err(|error| store.unavailable("watched", error.to_string()))?;
            }
            wait = true;
            let reader = store.clone();
            let found = blocking(move || reader.load()).await?;
            if found.revision > after {
                after = found.revision;
                return Ok(Some((found, (store, watch, after, wait, name))));
            }
        }
    })
    .boxed()
}

/// Runs file operations where they hold nobody up.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that is shutting down drops work; nobody polls this any more then.
            Err(_) => std::future::pending().await,
        },
    }
}
