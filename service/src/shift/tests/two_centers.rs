//! Two guardians, each with a redis-server and a service of its own, and one topology.

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

mod boot;
mod failures;
mod forced;
mod planned;
mod replica;
mod restart;
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
        match self.centers[id].server.buy(fence, sale, uid, KeyDigest::default()).await {
            ReserveOutcome::Accepted(order_id) | ReserveOutcome::Replay(order_id) => order_id,
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
