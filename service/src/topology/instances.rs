//! The service instances that are alive, each under its center.
//!
//! Each instance registers itself with a lease: in etcd the key goes when the lease is not kept alive, beside the
//! topology's file a lock goes with the process. Other centers dial the instances that they find here.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use seckill_domain::{CenterId, Clock, Millis, SystemClock};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::document::Extra;
use super::store::StoreError;

/// A registration that was lost or refused is tried again after this long.
const REGISTER_RETRY: Duration = Duration::from_millis(500);
/// The list is read again this often, whatever the watch says.
const LIST_INTERVAL: Duration = Duration::from_secs(2);
/// A watch or list that failed is tried again after this long.
const LIST_RETRY: Duration = Duration::from_millis(500);

/// Name of one run of one instance: 128 random bits, in hexadecimal digits. A restarted instance has another one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InstanceId(String);

impl InstanceId {
    /// A new name.
    pub fn random() -> InstanceId {
        let random: u128 = rand::random();
        InstanceId(format!("{random:032x}"))
    }

    /// Its digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One running service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Name of this run.
    pub id: InstanceId,
    /// Its center.
    pub center: CenterId,
    /// Base URL of its public listener.
    pub public_url: String,
    /// Base URL of its admin listener.
    pub admin_url: String,
    /// Base URL of its internal listener: where other centers dial it.
    pub internal_url: String,
    /// When it started.
    pub started_at: Millis,
    /// Its release.
    pub version: String,
    /// Fields of later releases.
    #[serde(flatten)]
    pub extra: Extra,
}

impl Instance {
    /// This process' instance of a center, started now.
    pub fn new(center: CenterId, public_url: String, admin_url: String, internal_url: String) -> Instance {
        Instance {
            id: InstanceId::random(),
            center,
            public_url,
            admin_url,
            internal_url,
            started_at: SystemClock.now(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extra: Extra::new(),
        }
    }
}

/// Where instances register.
pub trait InstanceStore: fmt::Debug + Send + Sync {
    /// Registers an instance and keeps it registered until the token is cancelled; then takes it off. An error
    /// says that it is not, or not for sure, registered any more: call again.
    fn keep<'a>(
        &'a self,
        instance: &'a Instance,
        until: CancellationToken,
    ) -> BoxFuture<'a, Result<(), StoreError>>;

    /// The instances that are registered now, in no particular order.
    fn list(&self) -> BoxFuture<'_, Result<Vec<Instance>, StoreError>>;

    /// Says each time that the list may have changed. Ends, or has an error, when it cannot be followed: then it
    /// is asked for again.
    fn changes(&self) -> BoxStream<'static, Result<(), StoreError>>;
}

/// The live instances, as this service sees them. Cheap to clone and to read.
///
/// While the store does not answer, the list stays as it was: an instance that has gone is noticed by whoever
/// dials it.
#[derive(Debug, Clone)]
pub struct Instances {
    list: watch::Receiver<Arc<[Instance]>>,
    leaving: CancellationToken,
}

impl Instances {
    /// Registers `me`, if given, and follows the list, until the token is cancelled.
    pub fn start(
        store: Arc<dyn InstanceStore>,
        me: Option<Instance>,
        tracker: &TaskTracker,
        token: CancellationToken,
    ) -> Instances {
        let leaving = token.child_token();
        if let Some(me) = me {
            tracker.spawn(keep(Arc::clone(&store), me, leaving.clone()));
        }
        let (sender, list) = watch::channel(Arc::from([]));
        tracker.spawn(follow(store, sender, token));
        Instances { list, leaving }
    }

    /// A list that stays as it is, for tests and for a service that has no store.
    pub fn fixed(instances: Vec<Instance>) -> Instances {
        // The sender may go: the receiver keeps its value.
        let (_, list) = watch::channel(Arc::from(sorted(instances)));
        Instances { list, leaving: CancellationToken::new() }
    }

    /// All live instances, by center, then by start.
    pub fn list(&self) -> Arc<[Instance]> {
        Arc::clone(&self.list.borrow())
    }

    /// The live instances of one center.
    pub fn of(&self, center: &CenterId) -> Vec<Instance> {
        self.list.borrow().iter().filter(|instance| instance.center == *center).cloned().collect()
    }

    /// Follows the list: woken at each change of it.
    pub fn subscribe(&self) -> watch::Receiver<Arc<[Instance]>> {
        self.list.clone()
    }

    /// Takes this service's own instance off the list: it drains.
    pub fn leave(&self) {
        self.leaving.cancel();
    }
}

async fn keep(store: Arc<dyn InstanceStore>, me: Instance, until: CancellationToken) {
    let mut failing = false;
    loop {
        let kept = AssertUnwindSafe(store.keep(&me, until.clone())).catch_unwind().await;
        match kept {
            Ok(Ok(())) => return,
            Ok(Err(error)) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "this instance is not registered; it tries again");
                }
            }
            Err(_panic) => tracing::error!("the registration of this instance panicked; it starts anew"),
        }
        if until.run_until_cancelled(tokio::time::sleep(REGISTER_RETRY)).await.is_none() {
            return;
        }
    }
}

async fn follow(
    store: Arc<dyn InstanceStore>,
    list: watch::Sender<Arc<[Instance]>>,
    token: CancellationToken,
) {
    while !token.is_cancelled() {
        let followed = AssertUnwindSafe(follow_once(&*store, &list)).catch_unwind();
        match token.run_until_cancelled(followed).await {
            Some(Ok(error)) => {
                tracing::debug!(
                    error = error.map(tracing::field::display),
                    "the watch on the instances broke off"
                );
            }
            Some(Err(_panic)) => tracing::error!("the list of instances panicked; it starts anew"),
            None => return,
        }
        token.run_until_cancelled(tokio::time::sleep(LIST_RETRY)).await;
    }
}

/// Lists whenever something changed, and every now and then, until the store cannot be followed.
async fn follow_once(store: &dyn InstanceStore, list: &watch::Sender<Arc<[Instance]>>) -> Option<StoreError> {
    let mut changes = store.changes();
    let mut ticks = tokio::time::interval(LIST_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            change = changes.next() => match change {
                Some(Ok(())) => {}
                Some(Err(error)) => return Some(error),
                None => return None,
            }
        }
        match store.list().await {
            Ok(found) => {
                let found = sorted(found);
                list.send_if_modified(|known| {
                    let changed = **known != *found;
                    if changed {
                        *known = Arc::from(found);
                    }
                    changed
                });
            }
            Err(error) => return Some(error),
        }
    }
}

fn sorted(mut instances: Vec<Instance>) -> Vec<Instance> {
    instances.sort_by(|a, b| (&a.center, a.started_at, &a.id).cmp(&(&b.center, b.started_at, &b.id)));
    instances
}
