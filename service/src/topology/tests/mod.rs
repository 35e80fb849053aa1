//! What is the file store's alone, and the lease.

mod confirming;
mod etcd;
mod stores;

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
async fn a_shift_of_shards_leaves_authority_alone() {
    let service = Service::start(Duration::from_secs(5)).await;
    service.admit();
    service
        .handle
        .update(|topology| {
            topology.shift = Some(Box::new(Shift { kind: ShiftKind::Shards, ..Shift::of_a_test() }));
            Ok::<_, ()>(())
        })
        .await
        .unwrap();
    service.authority.grant().unwrap();
}

#[tokio::test]
async fn another_master_or_a_recorded_shift_ends_authority() {
    let service = Service::start(Duration::from_secs(5)).await;
    service.admit();
    service
        .handle
        .update(|topology| {
            topology.shift = Some(Box::new(Shift::of_a_test()));
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

// A3: whoever runs it waits out the lease from the record on, so a later read must not begin another.
#[tokio::test]
async fn a_read_that_shows_a_forced_shift_away_confirms_nothing() {
    let service = Service::start(Duration::from_secs(5)).await;
    service.admit();
    let record = |mode| {
        move |topology: &mut Topology| {
            topology.shift = Some(Box::new(Shift { mode, ..Shift::of_a_test() }));
            Ok::<_, ()>(())
        }
    };
    service.handle.update(record(ShiftMode::Planned)).await.unwrap();
    service.authority.confirmed().unwrap();
    service.handle.update(record(ShiftMode::Forced)).await.unwrap();
    assert_eq!(service.authority.grant().unwrap_err().cause, Cause::Shifting);
    assert_eq!(service.authority.confirmed().unwrap_err().cause, Cause::Shifting);
    service
        .handle
        .update(|topology| {
            topology.shift = None;
            Ok::<_, ()>(())
        })
        .await
        .unwrap();
    service.authority.confirmed().unwrap();
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
