//! Shifts of shards between two real databases that replicate each other.

use std::sync::Arc;
use std::time::Duration;

use seckill_domain::{
    CenterId, CenterNumber, Epoch, Millis, OrderId, OrderRecord, OutboxId, Quantity, SaleId, Shard, Uid,
};
use seckill_parts::{Mariadb, MariadbPair};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::super::{Refusal, ShiftError, ShiftOptions, ShiftRequest, Shifts};
use super::{ShardParts, Way};
use crate::orders::{OrderStore, ShardRow, StoreBatch, StoreOptions, follow_owners, spawn_keeper};
use crate::patience::{PATIENCE, eventually};
use crate::topology::{
    Authority, Center, Extra, FileStore, Instances, Limits, Shift, ShiftKind, ShiftMode, ShiftPhase,
    ShiftState, StepState, Topology, TopologyHandle, new_ledger_id,
};

/// How long a shift may take, on a busy machine.
const DECIDED_WITHIN: Duration = Duration::from_secs(4);
const LEASE: Duration = Duration::from_secs(5);

fn id(name: &str) -> CenterId {
    CenterId::new(name).unwrap()
}

fn shard(number: u8) -> Shard {
    Shard::new(number).unwrap()
}

fn topology() -> Topology {
    let place = |number| Center {
        number: CenterNumber::new(number).unwrap(),
        public_url: String::new(),
        admin_url: String::new(),
        internal_url: String::new(),
        ledger: Vec::new(),
        extra: Extra::new(),
    };
    let mut topology = Topology::single(new_ledger_id(), id("a"), place(1), Limits::default());
    topology.centers.insert(id("b"), place(2));
    topology.shard_owners[32..].fill(id("b"));
    topology
}

fn to_b(shards: &[u8]) -> ShiftRequest {
    ShiftRequest {
        kind: ShiftKind::Shards,
        to: id("b"),
        mode: ShiftMode::Planned,
        shards: shards.iter().map(|number| shard(*number)).collect(),
        expect_epoch: None,
        accept_loss: false,
        dry_run: false,
        reason: "service".to_owned(),
        key: None,
    }
}

/// A purchase of somebody who is at home in a shard.
fn order(shard: u8, name: &str, seq: u64) -> OrderRecord {
    let uid = (0..).map(|n| Uid::new(&format!("{name}{n}")).unwrap());
    let uid = uid.into_iter().find(|uid| uid.table().shard().number() == shard).unwrap();
    let head = OrderId::head_of(CenterNumber::new(1).unwrap(), uid.table(), 0, Epoch(1));
    let terms = r#"{"kind":"product","unit_price":100,"currency":"CNY","payment_ttl_s":900}"#;
    OrderRecord {
        order_id: OrderId::from_parts(head, seq).unwrap(),
        uid,
        sale_id: SaleId::new("s").unwrap(),
        quantity: Quantity::ONE,
        terms: Arc::new(serde_json::from_str(terms).unwrap()),
        accepted_at: Millis(1_750_000_000_000),
        traceparent: None,
    }
}

/// The outbox entry with it.
fn entry(seq: u64, order: &OrderRecord) -> StoreBatch {
    let at = |seq: u64| if seq == 0 { OutboxId::ZERO } else { OutboxId { epoch: 1, seq } };
    StoreBatch::outbox(0, at(seq - 1), at(seq), vec![order.clone()])
}

/// Two centers: a topology, a database each, and in b two instances that can run shifts.
struct Place {
    servers: Vec<Mariadb>,
    /// As a's and as b's services see it.
    topologies: [TopologyHandle; 2],
    stores: [OrderStore; 2],
    shifts: [Shifts; 2],
    tracker: TaskTracker,
    token: CancellationToken,
    _dir: tempfile::TempDir,
}

impl Place {
    async fn on_mariadb() -> Place {
        let MariadbPair { servers, urls, dir } = MariadbPair::start("seckill").await.unwrap();
        Place::on(dir, servers.into(), urls).await
    }

    async fn on_sqlite() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let urls = ["a", "b"].map(|name| format!("sqlite:{}/{name}.db", dir.path().display()));
        Place::on(dir, Vec::new(), urls).await
    }

    async fn on(dir: tempfile::TempDir, servers: Vec<Mariadb>, urls: [String; 2]) -> Place {
        let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
        let mut topologies = Vec::new();
        for name in ["a", "b"] {
            let store = FileStore::new(dir.path().join("topology.json"));
            let authority = Authority::new(id(name), LEASE, 1);
            let handle = TopologyHandle::open_or_create(store, authority, topology()).await.unwrap();
            handle.spawn(&tracker, token.clone());
            topologies.push(handle);
        }
        let [a, b] = <[TopologyHandle; 2]>::try_from(topologies).unwrap();
        let open = async |name: &str, url: &String| {
            let topology = a.current();
            let own = id(name);
            let others = Shard::all().map(|shard| (shard, topology.home_center(shard).clone()));
            let options = StoreOptions {
                shards: topology.shards_of(&own).collect(),
                others: others.filter(|(_, owner)| *owner != own).collect(),
                makes_tables: topology.master == own,
                ..StoreOptions::new(own)
            };
            OrderStore::open(url, options).await.unwrap()
        };
        let (store_a, store_b) = tokio::join!(open("a", &urls[0]), open("b", &urls[1]));
        spawn_keeper(&store_a, &a.subscribe(), &tracker, &token);
        spawn_keeper(&store_b, &b.subscribe(), &tracker, &token);
        let shifts = ["b-1", "b-2"].map(|instance| {
            let options = ShiftOptions {
                center: id("b"),
                instance: instance.to_owned(),
                partition: 0,
                // The end of the outbox is not known here, and so not waited for.
                redis_url: "redis://127.0.0.1:1".to_owned(),
                lease_ttl: LEASE,
            };
            let authority = Authority::new(id("b"), LEASE, 1);
            let instances = Instances::fixed(Vec::new());
            let shifts =
                Shifts::spawn(options, b.clone(), authority, instances, &tracker, token.clone()).unwrap();
            let way = Way::Direct(store_a.clone(), a.clone());
            shifts.with_shards(ShardParts { orders: store_b.clone(), way, decided_within: DECIDED_WITHIN })
        });
        Place { servers, topologies: [a, b], stores: [store_a, store_b], shifts, tracker, token, _dir: dir }
    }

    /// Waits until a shift is over, and until everybody has seen it.
    async fn until_over(&self, id: &str) -> Shift {
        eventually("the shift is over", async || {
            let topology = self.topologies[0].current();
            let over = topology.shift.is_none() && topology.blocked_shards.is_empty();
            topology.find_shift(id).filter(|shift| over && shift.state.is_over()).cloned()
        })
        .await
    }

    /// Waits until both databases say that a shard is a center's.
    async fn until_owned(&self, number: u8, owner: &str) {
        for store in &self.stores {
            eventually("the shard has its owner", async || {
                let rows: Vec<ShardRow> = store.shard_rows().await.ok()?;
                rows.iter().any(|row| row.shard == shard(number) && row.owner == owner).then_some(())
            })
            .await;
        }
    }

    async fn end(self) {
        self.token.cancel();
        self.tracker.close();
        self.tracker.wait().await;
        for store in &self.stores {
            store.close().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_given_up_is_done_as_soon_as_the_database_that_takes_has_everything() {
    let place = Place::on_mariadb().await;
    // The coordinator dies when a's database has let go, and another instance gives the shift up. How a service dies at
    // every other step is tried where it is a process (`tests/it/two_centers/shard_deaths.rs`).
    *place.shifts[0].shared.at.lock().unwrap() = Some(("fenced", Box::new(|| true)));
    let begun = place.shifts[0].start(to_b(&[0]), "ops").await.unwrap();
    let over = place.until_over(&begun.id).await;
    assert_eq!((over.state, over.coordinator.term), (ShiftState::Aborted, 1), "{over:#?}");
    assert_eq!(place.topologies[0].current().home_center(shard(0)), &id("a"));
    place.until_owned(0, "a").await;
    let attempt = u64::try_from(place.topologies[0].current().shard_epoch).unwrap();
    // It can be done: as soon as b's database has what a's had written when it let go, and not before.
    let mut admin = place.servers[1].admin().connect().await.unwrap();
    let runtime = tokio::runtime::Handle::current();
    let stop = move || {
        let stopped = async { sqlx::raw_sql("STOP SLAVE SQL_THREAD").execute(&mut admin).await };
        tokio::task::block_in_place(|| runtime.block_on(stopped)).unwrap();
        false
    };
    *place.shifts[1].shared.at.lock().unwrap() = Some(("blocked", Box::new(stop)));
    let again = place.shifts[1].start(to_b(&[0, 1, 2]), "ops").await.unwrap();
    assert!(again.epoch.0 > attempt, "an attempt's number is used once: {again:?}");
    let waits = eventually("it waits, or goes on", async || {
        let shift = place.shifts[1].find(&again.id).unwrap();
        let step = shift.steps.last().unwrap();
        let waits = step.name == "replicate" && step.state == StepState::Running;
        (waits || shift.phase == ShiftPhase::Decided || shift.state.is_over()).then_some(waits)
    })
    .await;
    assert!(waits, "the shards were taken before b's database had everything of them");
    let mut admin = place.servers[1].admin().connect().await.unwrap();
    sqlx::raw_sql("START SLAVE SQL_THREAD").execute(&mut admin).await.unwrap();
    let over = place.until_over(&again.id).await;
    assert_eq!(over.state, ShiftState::Done, "{over:#?}");
    let names: Vec<&str> = over.steps.iter().map(|step| step.name.as_str()).collect();
    let expected = ["precheck", "block", "drain", "fence", "replicate", "hand_over", "unblock", "verify"];
    assert_eq!(names, expected);
    place.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let place = Place::on_mariadb().await;
    let [first, second] = &place.shifts;
    let before = place.topologies[1].current();
    let refused = async |request: ShiftRequest| match first.start(request, "ops").await {
        Err(ShiftError::Refused { cause, reason, next, .. }) => {
            assert!(!reason.is_empty() && !next.is_empty());
            (cause, reason)
        }
        other => panic!("{other:?}"),
    };
    for (request, word) in [
        (to_b(&[]), "no shards"),
        (to_b(&[0, 40]), "at home in center b already"),
        (ShiftRequest { to: id("c"), ..to_b(&[0]) }, "no center c"),
        (ShiftRequest { mode: ShiftMode::Forced, accept_loss: true, ..to_b(&[0]) }, "source_answers"),
    ] {
        let (cause, reason) = refused(request).await;
        assert!(cause == Refusal::Unfit && reason.contains(word), "{reason}");
    }
    let stale = ShiftRequest { expect_epoch: Some(Epoch(77)), ..to_b(&[0]) };
    assert_eq!(refused(stale).await.0, Refusal::Epoch);
    let elsewhere = first.start(ShiftRequest { to: id("a"), ..to_b(&[40]) }, "ops").await;
    assert!(matches!(elsewhere, Err(ShiftError::Elsewhere { .. })), "{elsewhere:?}");
    let dry = first.start(ShiftRequest { dry_run: true, ..to_b(&[0]) }, "ops").await.unwrap();
    assert!(dry.dry_run && dry.state == ShiftState::Done, "{dry:?}");
    assert_eq!(place.topologies[1].current(), before);

    // Two at once: one wins, the other is told. The one that runs can be given up.
    *first.shared.at.lock().unwrap() = Some(("fenced", Box::new(|| true)));
    let running = first.start(to_b(&[0]), "ops").await.unwrap();
    let (cause, reason) = match second.start(to_b(&[1]), "ops").await {
        Err(ShiftError::Refused { cause, reason, .. }) => (cause, reason),
        other => panic!("{other:?}"),
    };
    assert!(cause == Refusal::Running && reason.contains(&running.id), "{reason}");
    eventually("its coordinator died", async || first.shared.at.lock().unwrap().is_none().then_some(()))
        .await;
    let given_up = second.abort(&running.id, "ops").await.unwrap();
    assert_eq!(given_up.state, ShiftState::Aborted);
    place.until_owned(0, "a").await;
    assert!(place.topologies[1].current().blocked_shards.is_empty());

    // Replication that stands still stops it before anything is blocked.
    let mut admin = place.servers[1].admin().connect().await.unwrap();
    sqlx::raw_sql("STOP SLAVE").execute(&mut admin).await.unwrap();
    let (cause, reason) = refused(to_b(&[0])).await;
    assert!(cause == Refusal::Unfit && reason.contains("target_copies"), "{reason}");
    place.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shards_of_a_center_that_is_gone_are_taken_when_the_loss_is_accepted() {
    let place = Place::on_mariadb().await;
    let arrived = order(0, "arrived", 1);
    place.stores[0].store(entry(1, &arrived)).await.unwrap();
    let written = place.stores[0].written().await.unwrap();
    assert!(place.stores[1].reaches(&written, PATIENCE).await.unwrap());
    // The last order that a stored, and a payment, never left it.
    let mut admin = place.servers[1].admin().connect().await.unwrap();
    sqlx::raw_sql("STOP SLAVE IO_THREAD").execute(&mut admin).await.unwrap();
    let missing = order(0, "missing", 2);
    place.stores[0].store(entry(2, &missing)).await.unwrap();
    // b is farther in the outbox than a was when it was last heard of.
    place.stores[1].store(entry(1, &arrived)).await.unwrap();
    place.stores[1].store(entry(2, &missing)).await.unwrap();
    place.servers[0].kill();
    let forced = |accept_loss| ShiftRequest { mode: ShiftMode::Forced, accept_loss, ..to_b(&[0, 1]) };
    match place.shifts[0].start(forced(false), "ops").await {
        Err(ShiftError::Refused { cause, checks, .. }) => {
            assert_eq!(cause, Refusal::Loss);
            assert!(checks.iter().any(|check| check.name == "exposure" && check.value.contains("payments")));
        }
        other => panic!("{other:?}"),
    }
    let begun = place.shifts[0].start(forced(true), "ops").await.unwrap();
    let over = place.until_over(&begun.id).await;
    assert_eq!(over.state, ShiftState::Done, "{over:#?}");
    assert!(over.exposure.is_some_and(|exposure| !exposure.lossless));
    let rows = place.stores[1].shard_rows().await.unwrap();
    assert!(rows[..2].iter().all(|row| row.owner == "b"), "{rows:?}");
    // It reads on from where a was known to be, and has every order.
    let store = &place.stores[1];
    assert_eq!(store.position(0).await.unwrap(), OutboxId { epoch: 1, seq: 1 });
    assert_eq!(store.store(entry(2, &missing)).await.unwrap().stored, 1);
    // Nobody of a writes them when its database is back, whatever that says at first.
    place.servers[0].restart().await.unwrap();
    let late = place.stores[0].cancel(&arrived.uid, arrived.order_id).await;
    assert!(matches!(&late, Err(crate::orders::Error::NotOwner(_))), "{late:?}");
    eventually("a's database knows whose they are", async || {
        let rows = place.stores[0].shard_rows().await.ok()?;
        rows[..2].iter().all(|row| row.owner == "b").then_some(())
    })
    .await;
    // What a had stored and b has stored again stops replication, with its name.
    sqlx::raw_sql("START SLAVE IO_THREAD").execute(&mut admin).await.unwrap();
    let stopped = eventually("the conflict is named", async || {
        store.server().await.ok()??.copies.into_iter().find_map(|copy| copy.error)
    })
    .await;
    assert!(stopped.contains(&missing.order_id.to_string()), "{stopped}");
    place.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite_shards_stay_where_they_are_and_the_reason_is_told() {
    let place = Place::on_sqlite().await;
    for mode in [ShiftMode::Planned, ShiftMode::Forced] {
        let request = ShiftRequest { mode, accept_loss: true, ..to_b(&[0]) };
        match place.shifts[0].start(request, "ops").await {
            Err(ShiftError::Refused { cause: Refusal::Unfit, reason, next, .. }) => {
                assert!(reason.contains("SQLite") && next.contains("MariaDB"), "{reason} {next}");
            }
            other => panic!("{other:?}"),
        }
    }
    let owners = crate::orders::Owners::of(&place.topologies[1].current());
    assert_eq!(follow_owners(&place.stores[1], &owners).await.unwrap(), crate::orders::Turned::default());
    assert!(place.topologies[1].current().shift.is_none());
    place.end().await;
}
