//! The behaviour that every store has to show: the same tests over a file and over a real etcd.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use seckill_domain::{CenterId, Epoch, Shard};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::super::*;
use super::{document, eventually};
use crate::admission::Limiter;

/// Nothing here takes longer, even on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// A place for a topology, with as many separate stores on it as a test wants: each stands for a process.
enum Place {
    File(TempDir),
    Etcd { endpoint: String, prefix: String },
}

/// Both sides of one store.
struct Opened {
    topology: Arc<dyn TopologyStore>,
    instances: Arc<dyn InstanceStore>,
}

impl Place {
    fn file() -> Place {
        Place::File(tempfile::tempdir().unwrap())
    }

    async fn etcd() -> Place {
        let endpoint = seckill_parts::shared::etcd().await.unwrap();
        Place::Etcd { endpoint, prefix: format!("/test-{:032x}", rand::random::<u128>()) }
    }

    fn open(&self) -> Opened {
        fn both<S: TopologyStore + InstanceStore + 'static>(store: S) -> Opened {
            let store = Arc::new(store);
            Opened { topology: Arc::<S>::clone(&store), instances: store }
        }
        match self {
            Place::File(dir) => both(FileStore::new(dir.path().join("topology.json"))),
            Place::Etcd { endpoint, prefix } => {
                both(EtcdStore::new(super::etcd::options(endpoint.clone(), prefix)))
            }
        }
    }

    fn store(&self) -> Arc<dyn TopologyStore> {
        self.open().topology
    }

    async fn handle(&self) -> (TopologyHandle, Running) {
        let authority = Authority::new(CenterId::new("a").unwrap(), Duration::from_secs(5), 1);
        let handle = TopologyHandle::open_or_create(self.store(), authority, document()).await.unwrap();
        let running = Running::default();
        handle.spawn(&running.tracker, running.token.clone());
        (handle, running)
    }
}

/// Tasks that end with the test.
#[derive(Default)]
pub(super) struct Running {
    pub(super) tracker: TaskTracker,
    pub(super) token: CancellationToken,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.token.cancel();
    }
}

macro_rules! every_store {
    ($($name:ident)*) => {
        mod file {
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Place::file()).await; })*
        }
        mod etcd {
            $(#[tokio::test(flavor = "multi_thread")] async fn $name() { super::$name(super::Place::etcd().await).await; })*
        }
    };
}

every_store! {
    a_document_is_created_once_and_changed_only_by_who_saw_the_latest
    every_field_is_read_back_as_it_was_written
    an_impossible_document_is_not_written
    of_many_writers_none_loses_a_change_and_no_reader_goes_back
    a_watch_tells_a_change_at_once_and_what_happened_before_it_began
    subscribers_see_a_change_that_another_process_made
    changes_made_at_once_all_happen
    limits_reach_every_instance_at_run_time
    an_instance_is_listed_under_its_center_until_it_leaves
}

async fn a_document_is_created_once_and_changed_only_by_who_saw_the_latest(place: Place) {
    let (store, other) = (place.store(), place.store());
    assert!(matches!(store.load().await, Err(StoreError::Missing { .. })));
    let mut topology = document();
    let first = store.compare_and_set(None, &topology).await.unwrap();
    assert_eq!(
        other.compare_and_set(None, &topology).await,
        Err(StoreError::Conflict { found: Some(first) })
    );
    topology.epoch = Epoch(1);
    let second = other.compare_and_set(Some(first), &topology).await.unwrap();
    assert!(second > first);
    topology.epoch = Epoch(2);
    assert_eq!(
        store.compare_and_set(Some(first), &topology).await,
        Err(StoreError::Conflict { found: Some(second) })
    );
    let found = store.load().await.unwrap();
    assert_eq!((found.revision, found.topology.epoch), (second, Epoch(1)));
}

async fn every_field_is_read_back_as_it_was_written(place: Place) {
    let store = place.store();
    let mut topology = document();
    let run = LedgerRun { run_id: "r".to_owned(), epoch: Epoch(3), extra: Extra::new() };
    topology.ledger_runs.insert(0, run);
    topology.adopting.insert(0);
    topology.in_sync.push(InSync {
        center: topology.master.clone(),
        run_id: "r".to_owned(),
        extra: Extra::new(),
    });
    topology.blocked_shards.push(Shard::new(63).unwrap());
    topology.limits.per_sale = Rate::new(7, 8);
    topology.extra.insert("witness".to_owned(), serde_json::json!({ "at": "c" }));
    store.compare_and_set(None, &topology).await.unwrap();
    assert_eq!(*store.load().await.unwrap().topology, topology);
}

async fn an_impossible_document_is_not_written(place: Place) {
    let store = place.store();
    let mut topology = document();
    topology.shard_owners.pop();
    assert!(matches!(store.compare_and_set(None, &topology).await, Err(StoreError::Malformed { .. })));
    assert!(matches!(store.load().await, Err(StoreError::Missing { .. })));
}

async fn of_many_writers_none_loses_a_change_and_no_reader_goes_back(place: Place) {
    const WRITERS: u64 = 3;
    const CHANGES: u64 = 20;
    place.store().compare_and_set(None, &document()).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..WRITERS {
        let store = place.store();
        tasks.spawn(async move {
            let mut done = 0;
            while done < CHANGES {
                let found = store.load().await.unwrap();
                let mut next = Topology::clone(&found.topology);
                next.epoch = next.epoch.next();
                match store.compare_and_set(Some(found.revision), &next).await {
                    Ok(_) => done += 1,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
    }
    let reader = place.store();
    tasks.spawn(async move {
        let mut last = (Revision(0), Epoch(0));
        while last.1 < Epoch(WRITERS * CHANGES) {
            let found = reader.load().await.unwrap();
            let seen = (found.revision, found.topology.epoch);
            assert!(seen >= last, "an older document came back: {seen:?} after {last:?}");
            last = seen;
        }
    });
    tokio::time::timeout(3 * PATIENCE, tasks.join_all()).await.unwrap();
    assert_eq!(place.store().load().await.unwrap().topology.epoch, Epoch(WRITERS * CHANGES));
}

async fn a_watch_tells_a_change_at_once_and_what_happened_before_it_began(place: Place) {
    let (store, other) = (place.store(), place.store());
    let mut topology = document();
    let first = store.compare_and_set(None, &topology).await.unwrap();
    topology.epoch = Epoch(1);
    let second = store.compare_and_set(Some(first), &topology).await.unwrap();
    let mut changes = other.watch(first);
    let told = tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((told.revision, told.topology.epoch), (second, Epoch(1)));
    topology.epoch = Epoch(2);
    let third = store.compare_and_set(Some(second), &topology).await.unwrap();
    let told = tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap().unwrap();
    assert_eq!((told.revision, told.topology.epoch), (third, Epoch(2)));
}

async fn subscribers_see_a_change_that_another_process_made(place: Place) {
    let (handle, _running) = place.handle().await;
    let mut changes = handle.subscribe();
    let store = place.store();
    let found = store.load().await.unwrap();
    let mut next = Topology::clone(&found.topology);
    next.limits.per_user = None;
    store.compare_and_set(Some(found.revision), &next).await.unwrap();
    tokio::time::timeout(PATIENCE, changes.changed()).await.unwrap().unwrap();
    assert_eq!(changes.borrow().limits.per_user, None);
    assert_eq!(handle.current().limits.per_user, None);
}

async fn changes_made_at_once_all_happen(place: Place) {
    let (handle, _running) = place.handle().await;
    let (other, _other_running) = place.handle().await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..20 {
        let handle = if n % 2 == 0 { handle.clone() } else { other.clone() };
        tasks.spawn(async move {
            handle
                .update(|topology| {
                    topology.epoch = topology.epoch.next();
                    Ok::<_, ()>(topology.epoch)
                })
                .await
                .unwrap()
        });
    }
    let mut epochs: Vec<Epoch> = tasks.join_all().await;
    epochs.sort();
    assert_eq!(epochs, (1..=20).map(Epoch).collect::<Vec<_>>());
}

async fn limits_reach_every_instance_at_run_time(place: Place) {
    let (one, _running) = place.handle().await;
    let (other, running) = place.handle().await;
    let limiter = Limiter::new(&other.current().limits);
    running.tracker.spawn(limiter.clone().run(other.subscribe(), running.token.clone()));
    let uid = seckill_domain::Uid::new("alice").unwrap();
    for _ in 0..5 {
        limiter.write(&uid, None).unwrap();
    }
    let tight = Rate::new(1, 1);
    one.update(move |topology| {
        topology.limits.per_user = tight;
        Ok::<_, ()>(())
    })
    .await
    .unwrap();
    eventually("the other instance limits by the new rate", || {
        let bob = seckill_domain::Uid::new(&format!("bob-{}", rand::random::<u64>())).unwrap();
        limiter.write(&bob, None).is_ok() && limiter.write(&bob, None).is_err()
    })
    .await;
}

async fn an_instance_is_listed_under_its_center_until_it_leaves(place: Place) {
    let running = Running::default();
    let start = |me: Option<Instance>| {
        Instances::start(place.open().instances, me, &running.tracker, running.token.clone())
    };
    let (a, b) = (CenterId::new("a").unwrap(), CenterId::new("b").unwrap());
    let instance = |center: &CenterId, port: u16| {
        let url = |n: u16| format!("http://127.0.0.1:{}", port + n);
        Instance::new(center.clone(), url(0), url(1), url(2))
    };
    let (first, second, far) = (instance(&a, 1000), instance(&a, 2000), instance(&b, 3000));
    let watcher = start(None);
    let mut changes = watcher.subscribe();
    let leaver = start(Some(first.clone()));
    let _second = start(Some(second.clone()));
    let _far = start(Some(far.clone()));
    let seen = tokio::time::timeout(PATIENCE, changes.wait_for(|list| list.len() == 3)).await;
    assert_eq!(seen.unwrap().unwrap().len(), 3);
    let mut of_a = watcher.of(&a);
    of_a.sort_by(|one, other| one.internal_url.cmp(&other.internal_url));
    assert_eq!(of_a, [first, second.clone()]);
    assert_eq!(watcher.of(&b), std::slice::from_ref(&far));
    leaver.leave();
    tokio::time::timeout(PATIENCE, changes.wait_for(|list| list.len() == 2)).await.unwrap().unwrap();
    assert_eq!(watcher.of(&a), [second]);
}
