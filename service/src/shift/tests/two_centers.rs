//! Two guardians, each with a redis-server and a service of its own, and one topology.

mod boot;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use rustix::process::{Pid, Signal, kill_process};
use seckill_ledger::outbox;
use seckill_ledger::roles::Standing;
use seckill_parts::{Link, LinkState};

use super::*;
use crate::config::{CenterSpec, ClusterConfig};
use crate::topology::{
    Acknowledge, Changes, Durability, Instance, Instances, Revision, StoreError, TopologyState,
    TopologyStore, Versioned,
};

mod failures;
mod forced;
mod planned;
mod shifts;

/// Short, so that a test does not wait long, and far above what a busy machine needs for an answer.
const DEGRADE_AFTER: Duration = Duration::from_secs(3);

/// Above what any of these tests waits for.
const LEASE: Duration = Duration::from_secs(20);

struct Center {
    server: RedisServer,
    service: Option<Service>,
    shifts: Option<Shifts>,
    /// Whether its service reaches the topology.
    cut_off: Arc<AtomicBool>,
}

struct Pair {
    dir: TempDir,
    cluster: ClusterConfig,
    centers: BTreeMap<&'static str, Center>,
    lease: Duration,
    /// The way to each center's Redis from the other one, if there is any between them.
    links: BTreeMap<&'static str, Link>,
}

/// One center's way to the topology, which can be cut.
#[derive(Debug)]
struct Reached {
    store: FileStore,
    cut_off: Arc<AtomicBool>,
}

impl Reached {
    fn ask<T: Send + 'static>(
        &self,
        what: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, StoreError>> {
        Box::pin(async move {
            if self.cut_off.load(Ordering::SeqCst) {
                let place = self.store.path().display().to_string();
                return Err(StoreError::Unavailable {
                    action: "reached",
                    place,
                    reason: "cut off".to_owned(),
                });
            }
            what.await
        })
    }
}

impl TopologyStore for Reached {
    fn load(&self) -> BoxFuture<'_, Result<Versioned, StoreError>> {
        let store = self.store.clone();
        self.ask(async move { TopologyStore::load(&store).await })
    }

    fn compare_and_set<'a>(
        &'a self,
        expected: Option<Revision>,
        topology: &'a Topology,
    ) -> BoxFuture<'a, Result<Revision, StoreError>> {
        let (store, topology) = (self.store.clone(), topology.clone());
        self.ask(async move { TopologyStore::compare_and_set(&store, expected, &topology).await })
    }

    fn watch(&self, after: Revision) -> Changes {
        let cut_off = Arc::clone(&self.cut_off);
        let there = move |_: &Result<Versioned, StoreError>| {
            let there = !cut_off.load(Ordering::SeqCst);
            async move { there }
        };
        TopologyStore::watch(&self.store, after).filter(there).boxed()
    }

    fn confirm_interval(&self) -> Duration {
        TopologyStore::confirm_interval(&self.store)
    }

    fn place(&self) -> String {
        TopologyStore::place(&self.store)
    }
}

/// Changes the topology, whatever others do to it.
fn change(store: &FileStore, change: impl Fn(&mut Topology)) {
    loop {
        let found = store.load().unwrap();
        let mut next = Topology::clone(&found.topology);
        change(&mut next);
        match store.compare_and_set(Some(found.revision), &next) {
            Ok(_) => return,
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

impl Pair {
    /// Two centers, a the master, with this durability; nothing runs but the servers.
    async fn stopped(durability: Durability) -> Pair {
        Pair::stopped_with(durability, LEASE, Duration::ZERO).await
    }

    /// The same with this lease, and with this round trip between the two Redis servers.
    async fn stopped_with(durability: Durability, lease: Duration, round_trip: Duration) -> Pair {
        let mut links = BTreeMap::new();
        let mut centers = BTreeMap::new();
        let mut specs = Vec::new();
        for (number, id) in [(1, "a"), (2, "b")] {
            let server = RedisServer::start_with(&[("replicaof", "127.0.0.1 1")]).await;
            let mut port = server.port();
            if !round_trip.is_zero() {
                let link = Link::start((Ipv4Addr::LOCALHOST, port).into()).unwrap();
                link.set_delay(round_trip / 2, Duration::ZERO);
                port = link.port();
                links.insert(id, link);
            }
            specs.push(CenterSpec {
                id: CenterId::new(id).unwrap(),
                number: CenterNumber::new(number).unwrap(),
                public_url: String::new(),
                admin_url: String::new(),
                internal_url: String::new(),
                ledger: vec![format!("127.0.0.1:{port}")],
            });
            let cut_off = Arc::new(AtomicBool::new(false));
            centers.insert(id, Center { server, service: None, shifts: None, cut_off });
        }
        let cluster = ClusterConfig { durability, centers: specs };
        Pair { dir: tempfile::tempdir().unwrap(), cluster, centers, lease, links }
    }

    /// Two centers that sell, b's server in sync.
    async fn in_sync() -> Pair {
        let mut pair = Pair::stopped(Durability::Replicated).await;
        pair.start("a").await;
        pair.start("b").await;
        pair.until_in_sync(Epoch(0)).await;
        pair
    }

    fn store(&self) -> FileStore {
        FileStore::new(self.dir.path().join("topology.json"))
    }

    fn reached(&self, id: &str) -> Reached {
        Reached { store: self.store(), cut_off: Arc::clone(&self.centers[id].cut_off) }
    }

    fn shift_options(&self, id: &str) -> ShiftOptions {
        ShiftOptions {
            center: CenterId::new(id).unwrap(),
            instance: format!("instance-{id}-{}", rand::random::<u32>()),
            partition: 0,
            redis_url: self.centers[id].server.url(),
            lease_ttl: self.lease,
        }
    }

    fn topology(&self) -> Topology {
        Topology::clone(&self.store().load().unwrap().topology)
    }

    fn change(&self, change_it: impl Fn(&mut Topology)) {
        change(&self.store(), change_it);
    }

    async fn start(&mut self, id: &'static str) {
        let center = CenterId::new(id).unwrap();
        let authority = Authority::new(center.clone(), self.lease, 1);
        let first = Topology::of_centers(new_ledger_id(), &self.cluster, Limits::default()).unwrap();
        let topology =
            TopologyHandle::open_or_create(self.reached(id), authority.clone(), first).await.unwrap();
        let folder = self.dir.path().join(id);
        std::fs::create_dir_all(&folder).unwrap();
        let url = format!("sqlite:{}", folder.join("orders.db").display());
        let orders = OrderStore::open(&url, StoreOptions::new(center.clone())).await.unwrap();
        let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
        topology.spawn(&tracker, token.clone());
        let options = GuardianOptions {
            center,
            partition: 0,
            redis_url: self.centers[id].server.url(),
            init: InitPolicy::Automatic,
            diverged_dir: folder.as_path().into(),
            degrade_after: DEGRADE_AFTER,
            process: None,
        };
        let guardian = Guardian::spawn(
            options,
            topology.clone(),
            authority.clone(),
            orders.clone(),
            &tracker,
            token.clone(),
        )
        .unwrap();
        let shifts = Shifts::spawn(
            self.shift_options(id),
            topology.clone(),
            authority.clone(),
            Instances::fixed(vec![Instance::new(
                CenterId::new(id).unwrap(),
                String::new(),
                String::new(),
                String::new(),
            )]),
            &tracker,
            token.clone(),
        )
        .unwrap();
        let service = Service { topology, authority, orders, guardian, tracker, token };
        let center = self.centers.get_mut(id).unwrap();
        (center.service, center.shifts) = (Some(service), Some(shifts));
    }

    async fn stop(&mut self, id: &str) {
        let service = self.centers.get_mut(id).unwrap().service.take().expect("it runs");
        service.token.cancel();
        service.tracker.close();
        service.tracker.wait().await;
        service.orders.close().await;
    }

    fn service(&self, id: &str) -> &Service {
        self.centers[id].service.as_ref().expect("it runs")
    }

    fn server(&mut self, id: &str) -> &mut RedisServer {
        &mut self.centers.get_mut(id).unwrap().server
    }

    async fn standing(&self, id: &str) -> Standing {
        roles::standing(&mut self.centers[id].server.connect().await).await.unwrap()
    }

    async fn last(&self, id: &str) -> Option<seckill_domain::OutboxId> {
        outbox::last_id(&mut self.centers[id].server.connect().await).await.unwrap()
    }

    /// Waits until b is in sync in an epoch after this one and purchases wait for it.
    async fn until_in_sync(&self, after: Epoch) -> Fence {
        let authority = &self.service("a").authority;
        // After a restart of the master b stays in sync: purchases wait for it until it is attached again.
        let granted = eventually("b is in sync", async || {
            let grant = authority.grant().ok()?;
            let waits = matches!(grant.acknowledge, Acknowledge::Replicated { replicas: 1 });
            let b = self.standing("b").await;
            // S4: the entry names the run. D2: it has shown the fence of the epoch from which on it counts.
            let shown = b.fence == Some(grant.fence.to_string());
            let listed = self.topology().in_sync.iter().any(|entry| entry.run_id == b.run_id);
            (waits && shown && listed && grant.fence.epoch > after).then(|| grant.fence.clone())
        })
        .await;
        let topology = self.topology();
        assert_eq!((topology.state, topology.in_sync.len()), (TopologyState::Steady, 1));
        granted
    }

    async fn until_sells(&self, what: &str, wanted: impl Fn(&crate::topology::Grant) -> bool) -> Fence {
        let authority = &self.service("a").authority;
        eventually(what, async || {
            authority.grant().ok().filter(|grant| wanted(grant)).map(|grant| grant.fence.clone())
        })
        .await
    }

    async fn create_sale(&self, quantity: u64) -> SaleId {
        let fence = self.until_sells("a sells", |_| true).await;
        let spec: SaleSpec = serde_json::from_value(serde_json::json!({
            "sale_id": "s", "kind": "product", "quantity": quantity, "price": 100, "currency": "EUR",
        }))
        .unwrap();
        let mut conn = self.centers["a"].server.connect().await;
        let outcome = create_sale(&mut conn, &fence, &spec, &KeyDigest::default()).await;
        assert!(matches!(outcome, Ok(CreateOutcome::Created { .. })), "{outcome:?}");
        spec.sale_id
    }

    /// Buys one unit at this server, whatever the topology says of it.
    async fn buy_at(&self, id: &str, fence: &Fence, sale: &SaleId, uid: &str) -> OrderId {
        let entry = ReserveEntry {
            uid: Uid::new(uid).unwrap(),
            key: KeyDigest::default(),
            quantity: Quantity::new(1).unwrap(),
            center: CenterNumber::new(1).unwrap(),
            traceparent: None,
        };
        let mut conn = self.centers[id].server.connect().await;
        let reply = reserve(&mut conn, fence, 0, sale, &[entry]).await.unwrap();
        match reply.outcomes.into_iter().next() {
            Some(ReserveOutcome::Accepted(order_id) | ReserveOutcome::Replay(order_id)) => order_id,
            other => panic!("{uid}: {other:?}"),
        }
    }

    async fn holds(&self, id: &str, order_id: OrderId) -> bool {
        let epoch = self.topology().epoch.0;
        let mut conn = self.centers[id].server.connect().await;
        outbox::find_order(&mut conn, epoch, order_id).await.unwrap().is_some()
    }

    async fn until_replicated(&self) {
        eventually("b has what a has", async || (self.last("a").await == self.last("b").await).then_some(()))
            .await;
    }

    async fn until_attached(&self) {
        let mut state = self.service("b").guardian.server();
        let attached = state.wait_for(|state| *state == ServerState::Attached);
        tokio::time::timeout(PATIENCE, attached).await.expect("b is attached").unwrap();
    }

    fn tails(&self, id: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.dir.path().join(id)) else { return Vec::new() };
        entries
            .filter_map(|entry| {
                let path = entry.unwrap().path();
                let name = path.file_name()?.to_str()?;
                (name.starts_with("diverged-") && name.ends_with(".ndjson"))
                    .then(|| std::fs::read_to_string(&path).unwrap())
            })
            .collect()
    }

    fn signal(&mut self, id: &str, signal: Signal) {
        let pid = i32::try_from(self.server(id).pid()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    /// Makes the files of a stopped server's ledger empty.
    fn empty(&mut self, id: &str) {
        std::fs::remove_dir_all(self.server(id).folder().join("appendonlydir")).unwrap();
    }
}

// D2: without the replica having shown the new fence it does not count; S4, K1.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_pair_sells_at_once_and_is_in_sync_from_a_later_epoch_on() {
    let mut pair = Pair::stopped(Durability::Replicated).await;
    pair.start("a").await;
    let alone = pair.until_sells("a sells alone", |grant| grant.acknowledge == Acknowledge::Local).await;
    assert_eq!(pair.topology().state, TopologyState::Degraded);
    // S1: b's server stays out of harm's way until its own guardian gives it its role.
    assert!(pair.standing("b").await.role.is_isolated());
    pair.start("b").await;
    let both = pair.until_in_sync(alone.epoch).await;
    assert!(both.epoch > alone.epoch);
    pair.until_attached().await;
    let refusal = pair.service("b").authority.grant().unwrap_err();
    assert_eq!(refusal.cause, Cause::NotMaster);
}

// S4: `in_sync` is empty with durability `local`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_durability_local_the_replica_is_attached_and_never_waited_for() {
    let mut pair = Pair::stopped(Durability::Local).await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_attached().await;
    pair.create_sale(5).await;
    pair.until_replicated().await;
    let topology = pair.topology();
    assert_eq!((topology.in_sync.len(), topology.state), (0, TopologyState::Steady));
    assert_eq!(pair.service("a").authority.grant().unwrap().acknowledge, Acknowledge::Local);
}

// D1, D2: off after `degrade_after`, back at a later epoch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_stands_still_is_taken_off_and_comes_back_at_a_later_epoch() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let before = pair.topology().epoch;
    pair.signal("b", Signal::STOP);
    let stopped = Instant::now();
    let alone = pair.until_sells("degraded", |grant| grant.acknowledge == Acknowledge::Local).await;
    assert!(stopped.elapsed() >= DEGRADE_AFTER, "taken off after {:?}", stopped.elapsed());
    let topology = pair.topology();
    assert_eq!((topology.state, topology.in_sync.len()), (TopologyState::Degraded, 0));
    // Taking it off needs no epoch: what was in flight goes on.
    assert_eq!(alone.epoch, before);
    let order_id = pair.buy_at("a", &alone, &sale, "u1").await;
    pair.signal("b", Signal::CONT);
    let back = pair.until_in_sync(before).await;
    assert!(back.epoch > before);
    assert!(pair.holds("b", order_id).await);
    assert_eq!(pair.service("a").guardian.metrics().degradations.get(), 1);
}

// D2: attached, online and well is not enough: what counts is the fence that the replica shows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_in_sync_only_once_it_shows_the_fence_of_its_epoch() {
    let mut pair = Pair::stopped_with(Durability::Replicated, LEASE, Duration::from_millis(2)).await;
    pair.start("a").await;
    pair.start("b").await;
    let before = pair.until_in_sync(Epoch(0)).await;
    // No change arrives there any more; that it is there does.
    pair.links["a"].set(LinkState::StalledToClient);
    pair.change(|topology| {
        topology.in_sync.clear();
        topology.state = TopologyState::Degraded;
    });
    let next = eventually("the next epoch", async || {
        Some(pair.topology()).filter(|topology| topology.epoch > before.epoch)
    })
    .await;
    assert_eq!(pair.standing("b").await.fence, Some(before.to_string()));
    assert!(next.in_sync.is_empty(), "in sync without having shown its epoch");
    pair.links["a"].heal();
    pair.until_in_sync(next.epoch).await;
}

// D1: only while no shift is recorded. S3: the guardian does nothing meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_shift_is_recorded_nobody_is_taken_off_and_no_role_changes() {
    let mut pair = Pair::in_sync().await;
    // Its coordinator lives, as far as anybody can tell.
    pair.change(|topology| {
        let shift = crate::topology::Shift::of_a_test();
        topology.shift = Some(Box::new(crate::topology::Shift { freeze_ms: 60_000, ..shift }));
    });
    eventually("a sees the shift", async || pair.service("a").authority.grant().is_err().then_some(())).await;
    let topology = pair.topology();
    pair.server("b").restart().await;
    tokio::time::sleep(DEGRADE_AFTER + Duration::from_secs(1)).await;
    assert_eq!(pair.topology(), topology);
    assert!(pair.standing("b").await.role.is_isolated());
    assert!(matches!(pair.standing("a").await.role, Role::Master { .. }));
    pair.change(|topology| topology.shift = None);
    pair.until_in_sync(topology.epoch).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_comes_back_empty_is_filled_again() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let order_id = pair.buy_at("a", &fence, &sale, "u1").await;
    pair.until_replicated().await;
    let before = pair.topology();
    pair.server("b").kill();
    pair.empty("b");
    pair.server("b").restart().await;
    pair.until_in_sync(before.epoch).await;
    assert_ne!(pair.topology().in_sync[0].run_id, before.in_sync[0].run_id);
    assert!(pair.holds("b", order_id).await && pair.holds("a", order_id).await);
    assert!(pair.tails("b").is_empty());
}

// F3: its log may be behind what a replica saw.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_was_killed_and_comes_back_gets_a_new_epoch_and_its_replica() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let order_id = pair.buy_at("a", &fence, &sale, "u1").await;
    let before = pair.topology();
    pair.server("a").kill();
    pair.server("a").restart().await;
    let after = pair.until_in_sync(before.epoch).await;
    assert!(after.epoch > fence.epoch);
    assert!(pair.holds("a", order_id).await && pair.holds("b", order_id).await);
    assert_eq!(pair.service("a").guardian.metrics().restores.get(), 0);
}

// S1 and S5: a master that lost its disk does not make its replica empty, but gets everything back from it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_lost_its_disk_gets_everything_back_from_the_replica() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let mut orders = Vec::new();
    for n in 0..5 {
        orders.push(pair.buy_at("a", &fence, &sale, &format!("u{n}")).await);
    }
    pair.until_replicated().await;
    pair.server("a").kill();
    pair.empty("a");
    pair.server("a").restart().await;
    let after = pair.until_in_sync(fence.epoch).await;
    for order_id in &orders {
        assert!(pair.holds("a", *order_id).await && pair.holds("b", *order_id).await);
    }
    assert!(pair.topology().restoring.is_empty());
    assert_eq!(pair.service("a").guardian.metrics().restores.get(), 1);
    // F3: ids do not repeat.
    let next = pair.buy_at("a", &after, &sale, "later").await;
    assert!(!orders.contains(&next));
}

// S5: opened only when its fence and last outbox id are at least theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_whose_log_lost_its_end_gets_it_back_from_the_replica() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let kept = pair.buy_at("a", &fence, &sale, "u0").await;
    let earlier = pair.dir.path().join("earlier");
    copy(&pair.server("a").folder().join("appendonlydir"), &earlier);
    let cut = pair.buy_at("a", &fence, &sale, "u1").await;
    pair.until_replicated().await;
    pair.server("a").kill();
    let data = pair.server("a").folder().join("appendonlydir");
    std::fs::remove_dir_all(&data).unwrap();
    copy(&earlier, &data);
    pair.server("a").restart().await;
    pair.until_in_sync(fence.epoch).await;
    assert!(pair.holds("a", kept).await && pair.holds("a", cut).await);
    assert_eq!(pair.service("a").guardian.metrics().restores.get(), 1);
}

// Without an answer of the replica that is in sync nobody knows whether something is missing: it is waited for, but
// not for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_restarts_waits_for_the_replica_in_sync_before_it_goes_on_without() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(9).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let kept = pair.buy_at("a", &fence, &sale, "u0").await;
    pair.until_replicated().await;
    let earlier = pair.dir.path().join("earlier");
    copy(&pair.server("a").folder().join("appendonlydir"), &earlier);
    let cut = pair.buy_at("a", &fence, &sale, "u1").await;
    pair.until_replicated().await;
    pair.stop("b").await;
    pair.server("b").kill();
    pair.server("a").kill();
    let data = pair.server("a").folder().join("appendonlydir");
    std::fs::remove_dir_all(&data).unwrap();
    copy(&earlier, &data);
    pair.server("a").restart().await;
    let since = Instant::now();
    let alone = pair.until_sells("a goes on", |grant| grant.fence.epoch > fence.epoch).await;
    let waited = since.elapsed();
    assert!(waited >= DEGRADE_AFTER - Duration::from_secs(1), "it waited for {waited:?}");
    assert_eq!(pair.topology().state, TopologyState::Degraded);
    let later = pair.buy_at("a", &alone, &sale, "u2").await;
    assert_ne!(later, cut);

    // S3: b comes back with an order that a never had again: saved before it becomes a replica.
    pair.server("b").restart().await;
    pair.start("b").await;
    pair.until_in_sync(alone.epoch).await;
    let tails = pair.tails("b");
    assert_eq!(tails.len(), 1, "{tails:?}");
    let lines: Vec<serde_json::Value> =
        tails[0].lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["kind"], "diverged");
    assert_eq!(lines.len(), 2, "{tails:?}");
    assert_eq!(lines[1]["orders"][0]["order_id"], serde_json::json!(cut));
    assert_eq!(lines[1]["orders"][0]["uid"], "u1");
    assert_eq!(lines[1]["orders"][0]["claims"].as_str().unwrap().len(), 2 * 29);
    assert!(!pair.holds("b", cut).await && pair.holds("b", later).await && pair.holds("b", kept).await);
}

// S3 and F2: somebody else's data are left alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_with_another_ledger_is_left_alone_and_the_message_says_what_to_do() {
    let mut pair = Pair::stopped(Durability::Replicated).await;
    let mut conn = pair.centers["b"].server.connect().await;
    redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async::<()>(&mut conn).await.unwrap();
    let other = pair.centers["b"].server.init_ledger().await;
    pair.start("a").await;
    pair.start("b").await;
    pair.until_sells("a sells alone", |grant| grant.acknowledge == Acknowledge::Local).await;
    let mut state = pair.service("b").guardian.server();
    let refused = state.wait_for(|state| matches!(state, ServerState::Refused(_)));
    let refused = tokio::time::timeout(PATIENCE, refused).await.unwrap().unwrap().clone();
    let ServerState::Refused(reason) = refused else { unreachable!() };
    assert!(reason.contains("another ledger") && reason.contains("data folder"), "{reason}");
    assert_eq!(pair.standing("b").await.fence, Some(other.to_string()));
    assert!(matches!(pair.standing("b").await.role, Role::Master { .. }));
}

// H1: a delayed fence must not keep a replica away for ever, and its number is never an epoch of the topology's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_whose_fence_is_ahead_lifts_the_topology() {
    let mut pair = Pair::in_sync().await;
    let before = pair.until_sells("a sells", |_| true).await;
    pair.stop("b").await;
    // Nobody but b changes the topology.
    pair.stop("a").await;
    let ahead = before.at(Epoch(before.epoch.0 + 5));
    let mut conn = pair.centers["b"].server.connect().await;
    let lift = FenceChange::Lift { from: before.clone() };
    let outcome = roles::promote(&mut conn, Some(&before.to_string()), &lift, &ahead).await.unwrap();
    assert_eq!(outcome, Some(FenceOutcome::Set));
    pair.start("b").await;
    let lifted = eventually("the topology is lifted", async || {
        let epoch = pair.topology().epoch;
        (epoch != before.epoch).then_some(epoch)
    })
    .await;
    assert_eq!(lifted, ahead.epoch.next(), "the fence at epoch {} was somebody's", ahead.epoch);
    pair.start("a").await;
    let after = pair.until_in_sync(ahead.epoch).await;
    assert!(after.epoch > lifted);
}

// K1: `WAIT 1` is satisfied by any replica, also by one that nobody would promote.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_no_center_knows_is_an_alarm_and_counts_among_those_waited_for() {
    let pair = Pair::in_sync().await;
    let stranger = RedisServer::start().await;
    let mut conn = stranger.connect().await;
    let port = pair.centers["a"].server.port();
    redis::cmd("REPLICAOF").arg("127.0.0.1").arg(port).query_async::<()>(&mut conn).await.unwrap();
    pair.until_sells("two confirm", |grant| grant.acknowledge == Acknowledge::Replicated { replicas: 2 })
        .await;
    let metrics = pair.service("a").guardian.metrics();
    eventually("the alarm", async || (metrics.unknown_replicas.get() == 1).then_some(())).await;
}

// K4: what an adoption puts right counts once the replica has it. Until then no replica may be promoted without loss,
// and the record of a release stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_adoption_takes_the_replica_off_and_keeps_the_records_of_its_releases() {
    let mut pair = Pair::in_sync().await;
    let sale = pair.create_sale(5).await;
    let fence = pair.until_sells("a sells", |_| true).await;
    let order_id = pair.buy_at("a", &fence, &sale, "u1").await;
    let (client, authority) = (pair.centers["a"].server.client(), pair.service("a").authority.clone());
    let orders = pair.service("a").orders.clone();
    let work = || {
        let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
        Workers::spawn(
            &orders,
            std::slice::from_ref(&client),
            &authority,
            &crate::orders::Queue::Outbox,
            &WorkerOptions::default(),
            &tracker,
            (&token, &token),
        );
        (tracker, token)
    };
    let (tracker, token) = work();
    eventually("the order is stored", async || orders.order(order_id).await.unwrap()).await;
    token.cancel();
    tracker.close();
    tracker.wait().await;
    orders.cancel(&Uid::new("u1").unwrap(), order_id).await.unwrap();
    assert_eq!(orders.pending_release_count().await.unwrap(), 1);

    pair.signal("b", Signal::STOP);
    let report = pair.service("a").guardian.adopt().await.unwrap();
    assert_eq!(report.released, 1);
    let topology = pair.topology();
    assert_eq!((topology.in_sync.len(), topology.state), (0, TopologyState::Degraded));
    assert_eq!(orders.pending_release_count().await.unwrap(), 1, "the replica does not have it");

    pair.signal("b", Signal::CONT);
    pair.until_in_sync(Epoch(report.epoch)).await;
    let (_tracker, token) = work();
    eventually("the record is done", async || {
        (orders.pending_release_count().await.unwrap() == 0).then_some(())
    })
    .await;
    token.cancel();
    let mut conn = pair.centers["b"].server.connect().await;
    assert_eq!(read::sale(&mut conn, &sale).await.unwrap().unwrap().remaining, 5);
}
