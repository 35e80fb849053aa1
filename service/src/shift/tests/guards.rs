//! What one guard alone keeps: nothing else runs that would notice too, and the moment that counts lasts for as long as
//! the test wants.

use seckill_domain::OutboxId;
use seckill_ledger::roles::{Attached, Replication, Standing};

use super::super::guardian::Guardian;
use super::super::precheck::Survey;
use super::super::record::{Begun, Plan, begin};
use super::*;
use crate::config::{CenterSpec, ClusterConfig};
use crate::topology::held_store::HeldStore;
use crate::topology::{
    Durability, InSync, Instances, LedgerRun, Restore, Shift, ShiftKind, ShiftMode, TopologyState,
};

/// Longer than a busy machine holds a task up between two lines.
const DEGRADE_AFTER: Duration = Duration::from_secs(2);

/// Two centers, b's server in sync with a's, which took writes at epoch 3 last. No server runs.
fn two_centers() -> Topology {
    let spec = |number, id| CenterSpec {
        id: CenterId::new(id).unwrap(),
        number: CenterNumber::new(number).unwrap(),
        public_url: String::new(),
        admin_url: String::new(),
        internal_url: String::new(),
        ledger: vec!["127.0.0.1:1".to_owned()],
    };
    let cluster =
        ClusterConfig { durability: Durability::Replicated, centers: vec![spec(1, "a"), spec(2, "b")] };
    let mut topology = Topology::of_centers(new_ledger_id(), &cluster, Limits::default()).unwrap();
    topology.epoch = Epoch(3);
    topology.state = TopologyState::Steady;
    topology.degraded_since = None;
    topology.ledger_runs.insert(0, run("run-a", topology.epoch));
    topology.in_sync =
        vec![InSync { center: CenterId::new("b").unwrap(), run_id: "run-b".to_owned(), extra: Extra::new() }];
    topology
}

fn run(run_id: &str, epoch: Epoch) -> LedgerRun {
    LedgerRun { run_id: run_id.to_owned(), epoch, extra: Extra::new() }
}

/// A master with this many replicas that confirm what they get.
fn master(topology: &Topology, replicas: usize) -> Standing {
    let attached = Attached { address: "127.0.0.1:1".to_owned(), online: true, silent_s: 0 };
    Standing {
        role: Role::Master { offset: 0, replicas },
        fence: Some(topology.fence().to_string()),
        seq: 1,
        run_id: "run-a".to_owned(),
        replication: Replication {
            stream: "stream".to_owned(),
            linked: false,
            replicas: vec![attached; replicas],
        },
        log_ready: true,
        settled: true,
    }
}

/// b's server, when a is gone.
fn replica(fence: &Fence) -> Standing {
    Standing {
        role: Role::Replica { of: "127.0.0.1:1".to_owned(), link: "connect".to_owned(), offset: 0 },
        fence: Some(fence.to_string()),
        seq: 1,
        run_id: "run-b".to_owned(),
        replication: Replication::default(),
        log_ready: true,
        settled: true,
    }
}

/// The guardian of a, which looks when the test says so; nobody tells it what others write into the topology.
struct Asleep {
    _dir: TempDir,
    store: FileStore,
    guardian: Guardian,
}

impl Asleep {
    async fn open() -> Asleep {
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::new(dir.path().join("topology.json"));
        let authority = Authority::new(center(), Duration::from_secs(60), 1);
        let topology =
            TopologyHandle::open_or_create(store.clone(), authority.clone(), two_centers()).await.unwrap();
        let url = format!("sqlite:{}", dir.path().join("orders.db").display());
        let orders = OrderStore::open(&url, StoreOptions::new(center())).await.unwrap();
        let options = GuardianOptions {
            center: center(),
            partition: 0,
            redis_url: "redis://127.0.0.1:1".to_owned(),
            init: InitPolicy::Explicit,
            diverged_dir: dir.path().into(),
            degrade_after: DEGRADE_AFTER,
            process: None,
        };
        let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
        let guardian = Guardian::new(options, topology, authority, orders, &tracker, &token).unwrap();
        let mut asleep = Asleep { _dir: dir, store, guardian };
        asleep.is_master_at(Epoch(3));
        asleep
    }

    fn topology(&self) -> Topology {
        Topology::clone(&self.store.load().unwrap().topology)
    }

    fn change(&self, change: impl FnOnce(&mut Topology)) {
        let found = self.store.load().unwrap();
        let mut next = Topology::clone(&found.topology);
        change(&mut next);
        self.store.compare_and_set(Some(found.revision), &next).unwrap();
    }

    fn is_master_at(&mut self, epoch: Epoch) {
        let fence = self.topology().fence().at(epoch);
        self.guardian.readmit(fence, "run-a".to_owned(), 1);
    }

    /// One look, at which no replica confirms anything.
    async fn looks(&mut self) {
        let topology = self.guardian.topology.current();
        self.guardian.care_for_replicas(&topology, &master(&topology, 0)).await;
    }

    fn in_sync(&self) -> usize {
        self.topology().in_sync.len()
    }
}

async fn degrade_after() {
    let since = Instant::now();
    eventually("some time", async || (since.elapsed() >= DEGRADE_AFTER).then_some(())).await;
}

// D1: the compare-and-set itself looks for a shift, because whoever makes it may have slept.
#[tokio::test]
async fn a_guardian_that_has_not_heard_of_a_shift_takes_nobody_off() {
    let mut a = Asleep::open().await;
    a.looks().await;
    a.change(|topology| topology.shift = Some(Box::new(Shift::of_a_test())));
    degrade_after().await;
    assert!(a.guardian.topology.current().shift.is_none());
    a.looks().await;
    assert_eq!(a.in_sync(), 1, "taken off while a shift is recorded");
    a.change(|topology| topology.shift = None);
    a.looks().await;
    assert_eq!(a.in_sync(), 0);
}

// D1: how long a replica has been lost counts from the beginning of the epoch. a was the master, met b half attached, and
// was not the master for a while.
#[tokio::test]
async fn the_time_for_which_a_replica_was_lost_begins_with_the_epoch() {
    let mut a = Asleep::open().await;
    a.looks().await;
    degrade_after().await;
    a.is_master_at(Epoch(5));
    a.looks().await;
    assert_eq!(a.in_sync(), 1, "taken off at the first look of the epoch");
    degrade_after().await;
    a.looks().await;
    assert_eq!(a.in_sync(), 0);
}

/// A forced shift to b, whose checks saw this topology and this server.
async fn forced_to_b(seen: &Topology, target: Standing) -> Plan {
    let dir = tempfile::tempdir().unwrap();
    let store = FileStore::new(dir.path().join("topology.json"));
    let b = CenterId::new("b").unwrap();
    let authority = Authority::new(b.clone(), Duration::from_secs(60), 1);
    let topology = TopologyHandle::open_or_create(store, authority.clone(), seen.clone()).await.unwrap();
    let options = ShiftOptions {
        center: b.clone(),
        instance: "i".to_owned(),
        partition: 0,
        redis_url: "redis://127.0.0.1:1".to_owned(),
        lease_ttl: Duration::from_secs(60),
    };
    let token = CancellationToken::new();
    token.cancel();
    let instances = Instances::fixed(Vec::new());
    let shifts = Shifts::spawn(options, topology, authority, instances, &TaskTracker::new(), token).unwrap();
    let request = ShiftRequest {
        kind: ShiftKind::Master,
        to: b,
        mode: ShiftMode::Forced,
        shards: Vec::new(),
        expect_epoch: None,
        accept_loss: false,
        dry_run: false,
        reason: String::new(),
        key: None,
    };
    let survey = Survey {
        checks: Vec::new(),
        started_at: "2026-01-01T00:00:00Z".to_owned(),
        took: Duration::ZERO,
        target: Some(target),
        source: None,
        target_conn: None,
        source_conn: None,
        source_ping_s: None,
    };
    Plan::new(&shifts.shared, seen, request, "key".to_owned(), "ops".to_owned(), &survey)
}

fn is_refused_for_loss(begun: &Result<Begun, ShiftError>) -> bool {
    matches!(begun, Err(ShiftError::Refused { cause: Refusal::Loss, .. }))
}

// D1: between the checks and the record the master may have taken b off and sold on without it.
#[tokio::test]
async fn what_a_forced_shift_may_lose_is_decided_where_it_is_recorded() {
    let seen = two_centers();
    let plan = forced_to_b(&seen, replica(&seen.fence())).await;
    let begun = begin(&mut seen.clone(), &plan);
    assert!(matches!(&begun, Ok(Begun::Ours(shift)) if shift.exposure.as_ref().unwrap().lossless));
    let mut meanwhile = seen.clone();
    meanwhile.in_sync.clear();
    meanwhile.state = TopologyState::Degraded;
    let begun = begin(&mut meanwhile, &plan);
    assert!(is_refused_for_loss(&begun), "recorded by what was seen before: {begun:?}");
    assert_eq!(meanwhile.shift, None);
}

// S4: that a replica is listed as in sync is not enough.
#[tokio::test]
async fn a_replica_that_is_not_as_the_master_left_it_is_not_promoted_unasked() {
    let topology = two_centers();
    let fence = topology.fence();
    let well = replica(&fence);
    // Shifts that were given up while the master was gone: nobody was acknowledged anything in those epochs.
    let later = Topology { epoch: Epoch(9), ..topology.clone() };
    // It copied from b when it went away.
    let mut restoring = topology.clone();
    let restore =
        Restore { from: CenterId::new("b").unwrap(), fence: fence.to_string(), extra: Extra::new() };
    restoring.restoring.insert(0, restore);
    let other = Fence { ledger_id: LedgerId::new("other").unwrap(), ..fence.clone() };
    let cases = [
        ("as it was", &topology, well.clone()),
        ("as it was, after other attempts", &later, well.clone()),
        ("another run", &topology, Standing { run_id: "run-c".to_owned(), ..well.clone() }),
        ("an earlier epoch", &topology, replica(&fence.at(Epoch(2)))),
        ("another ledger", &topology, replica(&other)),
        ("no fence", &topology, Standing { fence: None, ..well.clone() }),
        ("copying everything", &topology, Standing { settled: false, ..well.clone() }),
        ("the source of a copy", &restoring, well),
    ];
    let mut unasked = Vec::new();
    for (what, topology, target) in cases {
        let plan = forced_to_b(topology, target).await;
        let begun = begin(&mut topology.clone(), &plan);
        assert!(begun.is_ok() || is_refused_for_loss(&begun), "{what}: {begun:?}");
        unasked.extend(begun.is_ok().then_some(what));
    }
    assert_eq!(unasked, ["as it was", "as it was, after other attempts"], "promoted unasked");
}

// S1: a server that came up as a master may be written to by a service that has slept since before the restart.
#[tokio::test]
async fn a_server_that_came_up_as_a_master_is_put_aside_before_its_epoch_is_recorded() {
    let server = RedisServer::start().await;
    let fence = server.init_ledger().await;
    let dir = tempfile::tempdir().unwrap();
    let store = HeldStore::new(FileStore::new(dir.path().join("topology.json")));
    let mut topology = first_topology();
    (topology.ledger_id, topology.epoch) = (fence.ledger_id.clone(), fence.epoch);
    topology.ledger_runs.insert(0, run("an earlier run", fence.epoch));
    let authority = Authority::new(center(), Duration::from_secs(60), 1);
    let handle = TopologyHandle::open_or_create(store.clone(), authority, topology).await.unwrap();
    let mut ledger = Ledger::new(center(), 0, &server.url(), handle).unwrap();
    let seen = ledger.look(OutboxId::ZERO).await.unwrap();
    store.changes.shut();
    let change = FenceChange::Lift { from: fence.clone() };
    let promoting = tokio::spawn(async move { ledger.promote(&seen, change).await });
    store.changes.until_held().await;
    let spec: SaleSpec = serde_json::from_value(serde_json::json!({
        "sale_id": "s", "kind": "product", "quantity": 1, "price": 100, "currency": "EUR",
    }))
    .unwrap();
    let late = create_sale(&mut server.connect().await, &fence, &spec, &KeyDigest::default()).await;
    assert!(late.is_err(), "it took a write after it was looked at: {late:?}");
    store.changes.open();
    let (promoted, _) = promoting.await.unwrap().unwrap();
    assert_eq!(promoted.epoch, fence.epoch.next());
}
