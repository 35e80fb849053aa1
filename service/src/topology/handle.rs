//! The service's view of the topology: always the latest document, changed by compare-and-set.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::authority::{Authority, boottime_ns};
use super::document::Topology;
use super::store::{Revision, StoreError, TopologyStore, Versioned};

/// How often a change is tried when others change the document at the same moment.
const UPDATE_ATTEMPTS: u32 = 16;
/// Two writers that met wait for a random time up to this, so that they do not meet again.
const UPDATE_JITTER_MS: u64 = 10;
/// A watch that broke off is begun again after this long; the reads go on meanwhile.
const WATCH_RETRY: Duration = Duration::from_millis(200);

/// Why a change did not happen.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError<E> {
    /// The change itself refused.
    #[error("{0}")]
    Refused(E),
    /// The store failed. After [`StoreError::Unknown`] the change may have happened all the same.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The topology as this service sees it. Cheap to clone and to read.
#[derive(Debug, Clone)]
pub struct TopologyHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Arc<dyn TopologyStore>,
    authority: Authority,
    current: watch::Sender<Arc<Topology>>,
    /// What `current` shows. Never held across an await.
    latest: Mutex<Latest>,
    /// Changes of this service are made one after the other, so that it does not compete with itself.
    changing: Semaphore,
    /// The watch told of a change: it is confirmed by a read at once.
    told: Notify,
}

#[derive(Debug)]
struct Latest {
    revision: Revision,
    /// When this revision was first seen.
    seen_ns: u64,
    /// The last revision that the authority was confirmed by: older than `revision` while only a watch told it.
    confirmed: Revision,
    /// Before the last confirming read was sent.
    since_ns: u64,
}

impl TopologyHandle {
    /// Reads the document; every later read confirms the authority.
    pub async fn open(
        store: impl TopologyStore + 'static,
        authority: Authority,
    ) -> Result<TopologyHandle, StoreError> {
        TopologyHandle::start(Arc::new(store), authority, None).await
    }

    /// Reads the document, or creates it if there is none.
    pub async fn open_or_create(
        store: impl TopologyStore + 'static,
        authority: Authority,
        initial: Topology,
    ) -> Result<TopologyHandle, StoreError> {
        TopologyHandle::start(Arc::new(store), authority, Some(initial)).await
    }

    async fn start(
        store: Arc<dyn TopologyStore>,
        authority: Authority,
        initial: Option<Topology>,
    ) -> Result<TopologyHandle, StoreError> {
        let mut since_ns = boottime_ns();
        let found = match (store.load().await, initial) {
            (Err(StoreError::Missing { .. }), Some(initial)) => {
                match store.compare_and_set(None, &initial).await {
                    // After an unknown outcome the read decides.
                    Ok(_) | Err(StoreError::Conflict { .. } | StoreError::Unknown { .. }) => {
                        since_ns = boottime_ns();
                        store.load().await?
                    }
                    Err(error) => return Err(error),
                }
            }
            (found, _) => found?,
        };
        authority.confirm(&found.topology, since_ns);
        let latest =
            Latest { revision: found.revision, seen_ns: boottime_ns(), confirmed: found.revision, since_ns };
        Ok(TopologyHandle {
            shared: Arc::new(Shared {
                store,
                authority,
                current: watch::Sender::new(found.topology),
                latest: Mutex::new(latest),
                changing: Semaphore::new(1),
                told: Notify::new(),
            }),
        })
    }

    /// Keeps following the document until the token is cancelled. Without this the authority lapses.
    pub fn spawn(&self, tracker: &TaskTracker, token: CancellationToken) {
        tracker.spawn(self.clone().keep_confirming(token.clone()));
        tracker.spawn(self.clone().keep_watching(token));
    }

    async fn keep_confirming(self, token: CancellationToken) {
        let mut ticks = tokio::time::interval(self.shared.store.confirm_interval());
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            tokio::select! {
                () = token.cancelled() => return,
                _ = ticks.tick() => {}
                () = self.shared.told.notified() => {}
            }
            // A panic in here shows like a read that failed: the lease runs out, and the next read is tried.
            let confirmed = AssertUnwindSafe(self.confirm()).catch_unwind();
            let Some(confirmed) = token.run_until_cancelled(confirmed).await else { return };
            match confirmed.unwrap_or_else(|_| Err(self.shared.panicked())) {
                Ok(()) => {
                    if std::mem::take(&mut failing) {
                        tracing::info!("the topology can be read again");
                    }
                }
                Err(error) => {
                    self.shared.authority.unconfirmed(&error.to_string());
                    if !std::mem::replace(&mut failing, true) {
                        tracing::error!(%error, "the topology cannot be confirmed");
                    }
                }
            }
        }
    }

    async fn keep_watching(self, token: CancellationToken) {
        while !token.is_cancelled() {
            let watched = AssertUnwindSafe(self.watch()).catch_unwind();
            match token.run_until_cancelled(watched).await {
                Some(Ok(error)) => {
                    tracing::debug!(
                        error = error.map(tracing::field::display),
                        "the watch on the topology broke off"
                    );
                }
                Some(Err(_panic)) => tracing::error!("the watch on the topology panicked; it starts anew"),
                None => return,
            }
            token.run_until_cancelled(tokio::time::sleep(WATCH_RETRY)).await;
        }
    }

    /// Follows the store until it breaks off.
    async fn watch(&self) -> Option<StoreError> {
        let after = self.shared.latest().revision;
        let mut changes = self.shared.store.watch(after);
        while let Some(change) = changes.next().await {
            match change {
                Ok(found) => {
                    self.shared.show(&found);
                    self.shared.told.notify_one();
                }
                Err(error) => return Some(error),
            }
        }
        None
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
        let since_ns = boottime_ns();
        let found = self.shared.store.load().await?;
        self.shared.confirm(&found, since_ns)
    }

    /// Changes the document. `change` sees the latest one and may be called again when somebody else was
    /// faster; what it returns at last is returned.
    pub async fn update<T, E, F>(&self, change: F) -> Result<T, UpdateError<E>>
    where
        T: Send + 'static,
        E: Send + 'static,
        F: FnMut(&mut Topology) -> Result<T, E> + Send + 'static,
    {
        self.update_from(None, change).await
    }

    /// As [`TopologyHandle::update`], but the first attempt changes the document as it is known here, without
    /// reading it before: one round trip to the store instead of two while nobody else changes it. What the first
    /// attempt would refuse, or leave as it is, is decided on a read.
    pub async fn update_known<T, E, F>(&self, change: F) -> Result<T, UpdateError<E>>
    where
        T: Send + 'static,
        E: Send + 'static,
        F: FnMut(&mut Topology) -> Result<T, E> + Send + 'static,
    {
        let known = self.shared.known();
        self.update_from(Some(known), change).await
    }

    async fn update_from<T, E, F>(
        &self,
        mut known: Option<Versioned>,
        mut change: F,
    ) -> Result<T, UpdateError<E>>
    where
        T: Send + 'static,
        E: Send + 'static,
        F: FnMut(&mut Topology) -> Result<T, E> + Send + 'static,
    {
        let shared = &self.shared;
        let _turn = shared.changing.acquire().await;
        let mut attempt = 1;
        loop {
            let since_ns = boottime_ns();
            let (found, read) = match known.take() {
                Some(known) => (known, false),
                None => (shared.store.load().await?, true),
            };
            let mut next = Topology::clone(&found.topology);
            let answer = match change(&mut next) {
                Err(_) if !read => continue,
                answer => answer.map_err(UpdateError::Refused)?,
            };
            if next == *found.topology {
                if !read {
                    continue;
                }
                return Ok(answer);
            }
            match shared.store.compare_and_set(Some(found.revision), &next).await {
                Ok(revision) => {
                    let written = Versioned { revision, topology: Arc::new(next) };
                    if let Err(error) = shared.confirm(&written, since_ns) {
                        tracing::error!(%error, "the topology changed in a strange way");
                    }
                    return Ok(answer);
                }
                Err(StoreError::Conflict { .. }) if attempt < UPDATE_ATTEMPTS => {
                    attempt += 1;
                    let pause = rand::random_range(0..=UPDATE_JITTER_MS);
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Shared {
    /// A read or change that was sent after `since_ns` showed this.
    fn confirm(&self, found: &Versioned, since_ns: u64) -> Result<(), StoreError> {
        let mut latest = self.latest();
        if found.revision < latest.revision {
            // A read that was overtaken is nothing special. One that began after the later revision was there is.
            if since_ns > latest.seen_ns {
                return Err(StoreError::WentBack {
                    place: self.store.place(),
                    known: latest.revision,
                    found: found.revision,
                });
            }
            return Ok(());
        }
        if found.revision > latest.confirmed || since_ns > latest.since_ns {
            latest.confirmed = found.revision;
            latest.since_ns = since_ns;
            self.authority.confirm(&found.topology, since_ns);
        }
        self.publish(&mut latest, found);
        Ok(())
    }

    /// A watch showed this: subscribers see it at once, but it confirms nothing (A1).
    fn show(&self, found: &Versioned) {
        let mut latest = self.latest();
        if found.revision > latest.revision {
            self.publish(&mut latest, found);
        }
    }

    /// The document and its revision as they are known here.
    fn known(&self) -> Versioned {
        let latest = self.latest();
        Versioned { revision: latest.revision, topology: self.current.borrow().clone() }
    }

    fn publish(&self, latest: &mut Latest, found: &Versioned) {
        if found.revision > latest.revision {
            latest.revision = found.revision;
            latest.seen_ns = boottime_ns();
        }
        self.current.send_if_modified(|current| {
            let changed = **current != *found.topology;
            if (current.epoch, &current.master) != (found.topology.epoch, &found.topology.master) {
                let Topology { epoch, master, state, .. } = &*found.topology;
                tracing::info!(%epoch, %master, state = state.as_str(), "an epoch began");
            }
            if changed {
                *current = Arc::clone(&found.topology);
            }
            changed
        });
    }

    fn latest(&self) -> std::sync::MutexGuard<'_, Latest> {
        // Each field is whole even after a panic, and a read corrects what does not fit.
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn panicked(&self) -> StoreError {
        StoreError::Unavailable {
            action: "read",
            place: self.store.place(),
            reason: "reading it panicked".to_owned(),
        }
    }
}
