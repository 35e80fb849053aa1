//! The store's behaviour (every store has to pass this), and the lease.

use std::time::{Duration, Instant};

use seckill_domain::{CenterId, CenterNumber, Epoch};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;

fn document() -> Topology {
    let center = Center {
        number: CenterNumber::new(1).unwrap(),
        public_url: "http://127.0.0.1:8080".to_owned(),
        admin_url: "http://127.0.0.1:8081".to_owned(),
        internal_url: "http://127.0.0.1:8082".to_owned(),
        ledger: Vec::new(),
        extra: Extra::new(),
    };
    Topology::single(new_ledger_id(), CenterId::new("a").unwrap(), center, Limits::default())
}

fn store() -> (TempDir, FileStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = FileStore::new(dir.path().join("topology.json"));
    (dir, store)
}

async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_document_is_created_once_and_changed_only_by_who_saw_the_latest() {
    let (_dir, store) = store();
    assert!(matches!(store.load(), Err(StoreError::Missing { .. })));
    let mut topology = document();
    let first = store.compare_and_set(None, &topology).unwrap();
    assert!(
        matches!(store.compare_and_set(None, &topology), Err(StoreError::Conflict { found: Some(found) }) if found == first)
    );
    topology.epoch = Epoch(1);
    let second = store.compare_and_set(Some(first), &topology).unwrap();
    assert!(second > first);
    topology.epoch = Epoch(2);
    assert!(matches!(store.compare_and_set(Some(first), &topology), Err(StoreError::Conflict { .. })));
    let found = store.load().unwrap();
    assert_eq!((found.revision, found.topology.epoch), (second, Epoch(1)));
}

#[test]
fn every_field_is_read_back_as_it_was_written() {
    let (_dir, store) = store();
    let mut topology = document();
    let run = LedgerRun { run_id: "r".to_owned(), epoch: Epoch(3), extra: Extra::new() };
    topology.ledger_runs.insert(0, run);
    topology.adopting.insert(0);
    topology.in_sync.push(InSync {
        center: topology.master.clone(),
        run_id: "r".to_owned(),
        extra: Extra::new(),
    });
    topology.blocked_shards.push(seckill_domain::Shard::new(63).unwrap());
    topology.limits.per_sale = Rate::new(7, 8);
    store.compare_and_set(None, &topology).unwrap();
    assert_eq!(*store.load().unwrap().topology, topology);
}

#[test]
fn of_two_writers_none_loses_a_change_and_no_reader_sees_half_of_one() {
    let (_dir, store) = store();
    store.compare_and_set(None, &document()).unwrap();
    const CHANGES: u64 = 50;
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut done = 0;
                while done < CHANGES {
                    let found = store.load().unwrap();
                    let mut next = Topology::clone(&found.topology);
                    next.epoch = next.epoch.next();
                    match store.compare_and_set(Some(found.revision), &next) {
                        Ok(_) => done += 1,
                        Err(StoreError::Conflict { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        scope.spawn(|| {
            let mut last = Epoch(0);
            while last < Epoch(2 * CHANGES) {
                let epoch = store.load().unwrap().topology.epoch;
                assert!(epoch >= last, "an older document came back");
                last = epoch;
            }
        });
    });
    assert_eq!(store.load().unwrap().topology.epoch, Epoch(2 * CHANGES));
}

#[test]
fn a_writer_that_died_half_way_leaves_the_old_document() {
    let (dir, store) = store();
    let revision = store.compare_and_set(None, &document()).unwrap();
    std::fs::write(dir.path().join("topology.json.new"), "{\"revision\": 9, \"sch").unwrap();
    assert_eq!(store.load().unwrap().revision, revision);
    store.compare_and_set(Some(revision), &document()).unwrap();
}

#[test]
fn fields_of_a_later_release_survive_a_change() {
    let (dir, store) = store();
    let path = dir.path().join("topology.json");
    store.compare_and_set(None, &document()).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["witness"] = serde_json::json!({"at": "c"});
    json["centers"]["a"]["instances"] = 3.into();
    std::fs::write(&path, json.to_string()).unwrap();
    let found = store.load().unwrap();
    let mut next = Topology::clone(&found.topology);
    next.epoch = next.epoch.next();
    store.compare_and_set(Some(found.revision), &next).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!((&json["witness"]["at"], &json["centers"]["a"]["instances"]), (&"c".into(), &3.into()));
    assert_eq!(json["epoch"], 1);
}

#[test]
fn what_is_no_topology_is_refused_and_left_alone() {
    let (dir, store) = store();
    let path = dir.path().join("topology.json");
    for text in ["", "{}", "{\"revision\":1}", "null"] {
        std::fs::write(&path, text).unwrap();
        assert!(matches!(store.load(), Err(StoreError::Malformed { .. })), "{text:?}");
        assert!(store.compare_and_set(None, &document()).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }
}

struct Service {
    _dir: TempDir,
    store: FileStore,
    authority: Authority,
    handle: TopologyHandle,
    tracker: TaskTracker,
    token: CancellationToken,
}

impl Service {
    async fn start(lease: Duration) -> Service {
        let (dir, store) = store();
        let authority = Authority::new(CenterId::new("a").unwrap(), lease, 1);
        let handle =
            TopologyHandle::open_or_create(store.clone(), authority.clone(), document()).await.unwrap();
        let token = CancellationToken::new();
        let tracker = TaskTracker::new();
        handle.spawn(&tracker, token.clone());
        Service { _dir: dir, store, authority, handle, tracker, token }
    }

    fn admit(&self) {
        self.authority.admit(0, self.handle.current().fence(), "run", 0);
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.token.cancel();
    }
}

#[tokio::test]
async fn subscribers_see_a_change_that_another_process_made() {
    let service = Service::start(Duration::from_secs(5)).await;
    let mut changes = service.handle.subscribe();
    let found = service.store.load().unwrap();
    let mut next = Topology::clone(&found.topology);
    next.limits.per_user = None;
    service.store.compare_and_set(Some(found.revision), &next).unwrap();
    tokio::time::timeout(Duration::from_secs(20), changes.changed()).await.unwrap().unwrap();
    assert_eq!(changes.borrow().limits.per_user, None);
    assert_eq!(service.handle.current().limits.per_user, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_made_at_once_all_happen() {
    let service = Service::start(Duration::from_secs(5)).await;
    let other = TopologyHandle::open(service.store.clone(), service.authority.clone()).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..20 {
        let handle = if n % 2 == 0 { service.handle.clone() } else { other.clone() };
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

#[tokio::test]
async fn a_refused_change_changes_nothing() {
    let service = Service::start(Duration::from_secs(5)).await;
    let before = service.store.load().unwrap();
    let refused = service
        .handle
        .update(|topology| {
            topology.epoch = Epoch(99);
            Err::<(), _>("no")
        })
        .await;
    assert!(matches!(refused, Err(UpdateError::Refused("no"))));
    assert_eq!(service.store.load().unwrap(), before);
}

#[tokio::test]
async fn authority_is_granted_at_the_topologys_fence_only() {
    let service = Service::start(Duration::from_secs(5)).await;
    assert_eq!(service.authority.grant().unwrap_err().cause, Cause::Starting);
    service.admit();
    assert_eq!(service.authority.grant().unwrap().fence, service.handle.current().fence());
    assert_eq!(service.authority.grant().unwrap().run_id(0), Some("run"));
    // A new epoch begins: nothing is granted until the ledger has its fence.
    service
        .handle
        .update(|topology| {
            topology.epoch = topology.epoch.next();
            Ok::<_, ()>(())
        })
        .await
        .unwrap();
    assert_eq!(service.authority.grant().unwrap_err().cause, Cause::Promoting);
    service.admit();
    assert_eq!(service.authority.grant().unwrap().fence.epoch, Epoch(1));
    service.authority.refuse(0, NoAuthority::new(Cause::Empty, "gone"));
    assert_eq!(&*service.authority.grant().unwrap_err().reason, "gone");
}

#[tokio::test]
async fn another_master_or_a_recorded_shift_ends_authority() {
    let service = Service::start(Duration::from_secs(5)).await;
    service.admit();
    service
        .handle
        .update(|topology| {
            topology.shift = Some(serde_json::json!({"to": "b"}));
            Ok::<_, ()>(())
        })
        .await
        .unwrap();
    assert_eq!(service.authority.grant().unwrap_err().cause, Cause::Shifting);
    let b = CenterId::new("b").unwrap();
    service
        .handle
        .update(move |topology| {
            let center = Center {
                number: CenterNumber::new(2).unwrap(),
                ..topology.centers[&topology.master].clone()
            };
            topology.centers.insert(b.clone(), center);
            topology.master = b.clone();
            topology.shift = None;
            Ok::<_, ()>(())
        })
        .await
        .unwrap();
    assert_eq!(service.authority.grant().unwrap_err().cause, Cause::NotMaster);
}

#[tokio::test]
async fn authority_lapses_while_the_topology_cannot_be_read_and_comes_back() {
    let service = Service::start(Duration::from_millis(1000)).await;
    service.admit();
    let text = std::fs::read(service.store.path()).unwrap();
    std::fs::write(service.store.path(), "out of order").unwrap();
    let mut status = service.authority.subscribe();
    let lapsed = tokio::time::timeout(
        Duration::from_secs(20),
        status.wait_for(|status| matches!(status, Err(refusal) if refusal.cause == Cause::LeaseExpired)),
    )
    .await
    .unwrap()
    .unwrap()
    .clone();
    let reason = lapsed.unwrap_err().reason;
    assert!(reason.contains("topology.json"), "{reason}");
    assert_eq!(service.authority.grant().unwrap_err().cause, Cause::LeaseExpired);
    std::fs::write(service.store.path(), text).unwrap();
    eventually("authority comes back", || service.authority.grant().is_ok()).await;
}

#[tokio::test]
async fn authority_lapses_by_itself_when_nobody_confirms_it() {
    let lease = Duration::from_millis(300);
    let service = Service::start(lease).await;
    service.admit();
    service.token.cancel();
    service.tracker.close();
    service.tracker.wait().await;
    let last_confirmed_before = Instant::now();
    loop {
        let asked = last_confirmed_before.elapsed();
        if service.authority.grant().is_err() {
            break;
        }
        assert!(asked < lease, "it outlived its lease");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(service.authority.grant().unwrap_err().cause, Cause::LeaseExpired);
}

#[test]
fn a_fixed_authority_grants_for_ever() {
    let fence = document().fence();
    let authority = Authority::fixed(fence.clone());
    assert_eq!(authority.grant().unwrap().fence, fence);
    assert!(authority.status().is_ok());
}
