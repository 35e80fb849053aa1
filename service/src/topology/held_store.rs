//! A store of tests, whose requests can be held up on their way: what lies between two of them then lasts for as long as
//! a test needs.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::document::Topology;
use super::file_store::FileStore;
use super::store::{Changes, Revision, StoreError, TopologyStore, Versioned};

/// How long a test waits for a request.
const PATIENCE: Duration = Duration::from_secs(60);

/// A file store whose reads and changes pass a gate each. What it watches passes none.
#[derive(Debug, Clone)]
pub(crate) struct HeldStore {
    pub(crate) store: FileStore,
    pub(crate) reads: Arc<Gate>,
    pub(crate) changes: Arc<Gate>,
}

/// Lets requests through while it is open.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    shut: watch::Sender<bool>,
    /// How many requests were ever held up here.
    held: watch::Sender<u64>,
}

impl Gate {
    pub(crate) fn shut(&self) {
        self.shut.send_replace(true);
    }

    pub(crate) fn open(&self) {
        self.shut.send_replace(false);
    }

    /// Waits until a request has come here and was held up.
    pub(crate) async fn until_held(&self) {
        let mut held = self.held.subscribe();
        let held = tokio::time::timeout(PATIENCE, held.wait_for(|held| *held > 0)).await;
        held.expect("a request comes").expect("the sender is here");
    }

    async fn pass(&self) {
        let mut shut = self.shut.subscribe();
        if *shut.borrow() {
            self.held.send_modify(|held| *held += 1);
        }
        shut.wait_for(|shut| !*shut).await.expect("the sender is here");
    }
}

impl HeldStore {
    pub(crate) fn new(store: FileStore) -> HeldStore {
        HeldStore { store, reads: Arc::default(), changes: Arc::default() }
    }
}

impl TopologyStore for HeldStore {
    fn load(&self) -> BoxFuture<'_, Result<Versioned, StoreError>> {
        Box::pin(async move {
            self.reads.pass().await;
            TopologyStore::load(&self.store).await
        })
    }

    fn compare_and_set<'a>(
        &'a self,
        expected: Option<Revision>,
        topology: &'a Topology,
    ) -> BoxFuture<'a, Result<Revision, StoreError>> {
        Box::pin(async move {
            self.changes.pass().await;
            TopologyStore::compare_and_set(&self.store, expected, topology).await
        })
    }

    fn watch(&self, after: Revision) -> Changes {
        TopologyStore::watch(&self.store, after)
    }

    fn confirm_interval(&self) -> Duration {
        TopologyStore::confirm_interval(&self.store)
    }

    fn place(&self) -> String {
        TopologyStore::place(&self.store)
    }
}
