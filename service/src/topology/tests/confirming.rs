//! What confirms the authority, and from which moment on (A1).

use std::sync::Arc;

use futures_util::future::join_all;

use super::super::held_store::HeldStore;
use super::*;

/// Short, so that a test does not wait long for its end; long enough that what was granted is seen.
const LEASE: Duration = Duration::from_secs(1);

/// A service that is admitted, over a store whose reads are held up when the test wants it. Nothing follows the store
/// yet.
struct Held {
    _dir: TempDir,
    store: HeldStore,
    authority: Authority,
}

impl Held {
    fn new() -> Held {
        let (dir, store) = store();
        store.compare_and_set(None, &document()).unwrap();
        let authority = Authority::new(CenterId::new("a").unwrap(), LEASE, 1);
        authority.admit(0, store.load().unwrap().topology.fence(), "run", 0);
        Held { _dir: dir, store: HeldStore::new(store), authority }
    }

    async fn handle(&self) -> TopologyHandle {
        TopologyHandle::open(self.store.clone(), self.authority.clone()).await.unwrap()
    }

    async fn until_lapsed(&self) {
        eventually("the lease is over", || {
            self.authority.grant().is_err_and(|refusal| refusal.cause == Cause::LeaseExpired)
        })
        .await;
    }
}

/// A change that leaves the fence as it is.
fn another(topology: &mut Topology) {
    topology.degraded_since = Some("2026-01-01T00:00:00Z".to_owned());
}

#[derive(Debug, Clone, Copy)]
enum Ask {
    Open,
    Read,
    Change,
}

impl Ask {
    async fn make(self, store: HeldStore, authority: Authority, handle: Option<TopologyHandle>) {
        match (self, handle) {
            (Ask::Open, _) | (_, None) => drop(TopologyHandle::open(store, authority).await.unwrap()),
            (Ask::Read, Some(handle)) => handle.confirm().await.unwrap(),
            (Ask::Change, Some(handle)) => {
                let change = |topology: &mut Topology| {
                    another(topology);
                    Ok::<_, std::convert::Infallible>(())
                };
                handle.update(change).await.unwrap();
            }
        }
    }

    /// Holds the answer up for longer than the lease; whether anything is granted when it is here.
    async fn is_granted_late(self) -> bool {
        let held = Held::new();
        let handle = match self {
            Ask::Open => None,
            Ask::Read | Ask::Change => Some(held.handle().await),
        };
        held.store.reads.shut();
        let asked = tokio::spawn(self.make(held.store.clone(), held.authority.clone(), handle));
        held.store.reads.until_held().await;
        let sent = Instant::now();
        eventually("a lease has passed", || sent.elapsed() >= LEASE).await;
        held.store.reads.open();
        asked.await.unwrap();
        let granted = held.authority.grant().is_ok();
        // Nothing else was missing.
        held.handle().await;
        eventually("a read that is answered at once confirms", || held.authority.status().is_ok()).await;
        granted
    }
}

// While a store thinks about its answer, another center may have waited the lease out.
#[tokio::test]
async fn a_read_confirms_from_before_it_was_sent() {
    let ways = [Ask::Open, Ask::Read, Ask::Change];
    let granted = join_all(ways.map(Ask::is_granted_late)).await;
    let late: Vec<Ask> =
        ways.into_iter().zip(granted).filter_map(|(way, granted)| granted.then_some(way)).collect();
    assert!(late.is_empty(), "it counted from its answer on: {late:?}");
}

// A watch may tell of a change long after it happened.
#[tokio::test]
async fn what_a_watch_shows_confirms_nothing() {
    let held = Held::new();
    let handle = held.handle().await;
    held.store.reads.shut();
    let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
    handle.spawn(&tracker, token.clone());
    held.until_lapsed().await;
    let found = held.store.store.load().unwrap();
    let mut next = Topology::clone(&found.topology);
    another(&mut next);
    held.store.store.compare_and_set(Some(found.revision), &next).unwrap();
    eventually("the watch shows the change", || *handle.current() == next).await;
    assert!(held.authority.grant().is_err(), "it was confirmed by what a watch showed");
    held.store.reads.open();
    eventually("a read confirms", || held.authority.grant().is_ok()).await;
    token.cancel();
}

// The clock of whoever waits a lease out may run a little faster than the one of whoever has it.
#[test]
fn a_lease_ends_a_little_earlier_than_it_was_granted_for() {
    let authority = Authority::new(CenterId::new("a").unwrap(), Duration::from_secs(20), 1);
    let topology = Arc::new(document());
    authority.admit(0, topology.fence(), "run", 0);
    let ago = |time: Duration| boottime_ns().saturating_sub(u64::try_from(time.as_nanos()).unwrap());
    authority.confirm(&topology, ago(Duration::from_secs(10)));
    authority.grant().unwrap();
    authority.confirm(&topology, ago(Duration::from_millis(19_850)));
    assert!(authority.grant().is_err(), "it lasts to its very end");
}
