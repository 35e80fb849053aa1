//! The service's view of the topology: always the latest confirmed document, changed by compare-and-set.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::authority::{Authority, boottime_ns};
use super::document::Topology;
use super::file_store::{FileStore, Revision, StoreError};

/// How often the file is read again. Reading it costs some tens of microseconds, and every read is also a
/// confirming one.
const CONFIRM_INTERVAL: Duration = Duration::from_millis(100);
/// How often a change is tried when others change the document at the same moment.
const UPDATE_ATTEMPTS: u32 = 16;

/// Why a change did not happen.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError<E> {
    /// The change itself refused.
    #[error("{0}")]
    Refused(E),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The topology as this service sees it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TopologyHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: FileStore,
    authority: Authority,
    current: watch::Sender<Arc<Topology>>,
    /// Held during each read or change of the file and the publication of what it showed, so that an older
    /// read is never published after a newer one. Only ever taken on blocking threads.
    io: Mutex<Option<Revision>>,
}

impl TopologyHandle {
    /// Reads the document; every later read confirms the authority.
    pub async fn open(store: FileStore, authority: Authority) -> Result<TopologyHandle, StoreError> {
        TopologyHandle::start(store, authority, None).await
    }

    /// Reads the document, or creates it if there is none.
    pub async fn open_or_create(
        store: FileStore,
        authority: Authority,
        initial: Topology,
    ) -> Result<TopologyHandle, StoreError> {
        TopologyHandle::start(store, authority, Some(initial)).await
    }

    async fn start(
        store: FileStore,
        authority: Authority,
        initial: Option<Topology>,
    ) -> Result<TopologyHandle, StoreError> {
        blocking(move || {
            let since_ns = boottime_ns();
            let found = match (store.load(), initial) {
                (Err(StoreError::Missing { .. }), Some(initial)) => {
                    match store.compare_and_set(None, &initial) {
                        Ok(_) | Err(StoreError::Conflict { .. }) => store.load()?,
                        Err(error) => return Err(error),
                    }
                }
                (found, _) => found?,
            };
            authority.confirm(&found.topology, since_ns);
            Ok(TopologyHandle {
                shared: Arc::new(Shared {
                    store,
                    authority,
                    current: watch::Sender::new(found.topology),
                    io: Mutex::new(Some(found.revision)),
                }),
            })
        })
        .await
    }

    /// Keeps reading the document until the token is cancelled. Without this the authority lapses.
    pub fn spawn(&self, tracker: &TaskTracker, token: CancellationToken) {
        let handle = self.clone();
        tracker.spawn(async move {
            let mut ticks = tokio::time::interval(CONFIRM_INTERVAL);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut failing = false;
            while token.run_until_cancelled(ticks.tick()).await.is_some() {
                // A panic in here shows like a read that failed: the lease runs out, and the next read is tried.
                let confirmed = AssertUnwindSafe(handle.confirm())
                    .catch_unwind()
                    .await
                    .unwrap_or_else(|_| Err(handle.shared.store.panicked()));
                match confirmed {
                    Ok(()) => {
                        if std::mem::take(&mut failing) {
                            tracing::info!("the topology can be read again");
                        }
                    }
                    Err(error) => {
                        handle.shared.authority.unconfirmed(&error.to_string());
                        if !std::mem::replace(&mut failing, true) {
                            tracing::error!(%error, "the topology cannot be confirmed");
                        }
                    }
                }
            }
        });
    }

    /// The latest document.
    pub fn current(&self) -> Arc<Topology> {
        self.shared.current.borrow().clone()
    }

    /// Follows the document.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Topology>> {
        self.shared.current.subscribe()
    }

    /// Reads the document again and confirms the authority by it.
    pub async fn confirm(&self) -> Result<(), StoreError> {
        let shared = Arc::clone(&self.shared);
        blocking(move || shared.confirm_blocking()).await
    }

    /// Changes the document. `change` sees the latest one and may be called again when somebody else was
    /// faster; what it returns at last is returned.
    pub async fn update<T, E, F>(&self, change: F) -> Result<T, UpdateError<E>>
    where
        T: Send + 'static,
        E: Send + 'static,
        F: FnMut(&mut Topology) -> Result<T, E> + Send + 'static,
    {
        let shared = Arc::clone(&self.shared);
        blocking(move || shared.update_blocking(change)).await
    }
}

impl Shared {
    fn confirm_blocking(&self) -> Result<(), StoreError> {
        let mut revision = self.io.lock().unwrap_or_else(PoisonError::into_inner);
        let since_ns = boottime_ns();
        let found = self.store.load()?;
        let changed = revision.replace(found.revision) != Some(found.revision);
        self.publish(&found.topology, since_ns, changed);
        Ok(())
    }

    fn update_blocking<T, E>(
        &self,
        mut change: impl FnMut(&mut Topology) -> Result<T, E>,
    ) -> Result<T, UpdateError<E>> {
        let mut revision = self.io.lock().unwrap_or_else(PoisonError::into_inner);
        let mut attempt = 1;
        loop {
            let since_ns = boottime_ns();
            let found = self.store.load()?;
            let mut next = Topology::clone(&found.topology);
            let answer = change(&mut next).map_err(UpdateError::Refused)?;
            if next == *found.topology {
                return Ok(answer);
            }
            match self.store.compare_and_set(Some(found.revision), &next) {
                Ok(written) => {
                    *revision = Some(written);
                    self.publish(&Arc::new(next), since_ns, true);
                    return Ok(answer);
                }
                Err(StoreError::Conflict { .. }) if attempt < UPDATE_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn publish(&self, topology: &Arc<Topology>, since_ns: u64, changed: bool) {
        self.authority.confirm(topology, since_ns);
        self.current.send_if_modified(|current| {
            let changed = changed || **current != **topology;
            if changed {
                *current = Arc::clone(topology);
            }
            changed
        });
    }
}

/// Runs file operations where they hold nobody up.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(failed) => match failed.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only a runtime that is shutting down drops work; nobody polls this any more then.
            Err(_) => std::future::pending().await,
        },
    }
}
