//! Two centers 30 ms apart: a, the master, and b. Their redis-servers are processes, the rest of them is in this one.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::ensure;
use axum::Router;
use seckill::config::{InventoryConfig, LedgerConfig, SecretUrl};
use seckill::cross_center::session::Sessions;
use seckill::cross_center::{CrossCenter, CrossKey, Keyring};
use seckill::http::{InternalState, ServeOptions, internal_router, serve};
use seckill::inventory::{Inventory, Parts};
use seckill::orders::{OrderStore, StoreOptions};
use seckill::telemetry::Metrics;
use seckill::topology::{
    Acknowledge, Authority, Center, FileStore, Grant, Instances, Limits, Topology, TopologyHandle,
};
use seckill_domain::{CenterId, CenterNumber, SaleId};
use seckill_ledger::Fence;
use seckill_ledger::testkit::RedisServer;
use seckill_parts::Link;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::purchases;

/// Each way: 15 ms, because a timer of whole milliseconds is late by half of one.
const DELAY: Duration = Duration::from_micros(14_500);
/// How long the replica may take to be linked.
const LINK_WAIT: Duration = Duration::from_secs(20);

/// Both centers.
pub(crate) struct Pair {
    /// The ledger of a.
    pub(crate) master: RedisServer,
    /// A sale that never sells out.
    pub(crate) sale: SaleId,
    replica: RedisServer,
    fence: Fence,
    /// From b's Redis to a's, and from b's service to a's.
    links: [Link; 2],
    listener: Option<TcpListener>,
    dir: tempfile::TempDir,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Pair {
    pub(crate) async fn open() -> anyhow::Result<Pair> {
        // A rewrite of the log would fall into one turn or the other.
        let options = [("auto-aof-rewrite-percentage", "0")];
        let master = RedisServer::start_with(&options).await;
        let replica = RedisServer::start_with(&options).await;
        let fence = master.init_ledger().await;
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
        let links =
            [Link::start(([127, 0, 0, 1], master.port()).into())?, Link::start(listener.local_addr()?)?];
        for link in &links {
            link.set_delay(DELAY, Duration::ZERO);
        }
        // A replica announces itself to its master: the line lies between them, and it dials the line.
        follow(&replica, links[0].port()).await?;
        let sale = purchases::sale(&mut master.connect().await, &fence, "bench").await?;
        Ok(Pair {
            master,
            sale,
            replica,
            fence,
            links,
            listener: Some(listener),
            dir: tempfile::tempdir()?,
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    /// An inventory of a with this durability.
    pub(crate) async fn of_master(&self, acknowledge: Acknowledge) -> anyhow::Result<Inventory> {
        let grant =
            Grant { fence: self.fence.clone(), acknowledge, run_ids: Box::default(), degraded: false };
        let file = self.dir.path().join(acknowledge.durability().as_str());
        let (inventory, _) = self.start(&self.master, Authority::fixed_grant(grant), file, None).await?;
        Ok(inventory)
    }

    /// The inventory of b. It has its purchases decided by `master`, over signed calls.
    pub(crate) async fn of_other(&mut self, master: &Inventory) -> anyhow::Result<Inventory> {
        let Some(listener) = self.listener.take() else { anyhow::bail!("there is one other center") };
        let (a, b) = (CenterId::new("a")?, CenterId::new("b")?);
        // Never confirmed again: the lease lasts for the run.
        let authority = Authority::new(b.clone(), Duration::from_secs(3600), 1);
        let file = self.dir.path().join("other");
        let (inventory, topology) = self.start(&self.replica, authority, file, Some(ring(&b)?)).await?;
        let database = format!("sqlite:{}", self.dir.path().join("orders.db").display());
        let router = internal_router(InternalState {
            sessions: Sessions::new(ring(&a)?, "bench".to_owned()),
            inventory: master.clone(),
            orders: OrderStore::open(&database, StoreOptions::new(a)).await?,
            queue: None,
            topology,
            public: Router::new(),
            admin: Router::new(),
            tasks: self.tasks.clone(),
            metrics: std::sync::Arc::new(Metrics::new()),
        });
        self.tasks.spawn(serve(listener, router, ServeOptions::default(), self.stop.clone()));
        Ok(inventory)
    }

    /// Ends everything.
    pub(crate) async fn close(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn start(
        &self,
        redis: &RedisServer,
        authority: Authority,
        file: PathBuf,
        keys: Option<Keyring>,
    ) -> anyhow::Result<(Inventory, TopologyHandle)> {
        let topology =
            TopologyHandle::open_or_create(FileStore::new(file), authority.clone(), self.topology()?).await?;
        let cross = keys.map(|keys| CrossCenter::new(keys, topology.clone(), Instances::fixed(Vec::new())));
        let ledger =
            LedgerConfig { partitions: vec![SecretUrl::new(redis.url())], ..LedgerConfig::default() };
        let parts = Parts {
            ledger: &ledger,
            inventory: &InventoryConfig::default(),
            retry_window_ms: 0,
            topology: topology.clone(),
            authority,
            cross,
        };
        let inventory = Inventory::start(&parts, &self.tasks, &self.stop, &self.stop)?;
        while inventory.sales().get(&self.sale).is_none() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok((inventory, topology))
    }

    fn topology(&self) -> anyhow::Result<Topology> {
        let center = |number, internal: String| {
            anyhow::Ok(Center {
                number: CenterNumber::new(number)?,
                public_url: "http://127.0.0.1:1".to_owned(),
                admin_url: "http://127.0.0.1:1".to_owned(),
                internal_url: internal,
                ledger: Vec::new(),
                extra: serde_json::Map::new(),
            })
        };
        let a = center(1, format!("http://127.0.0.1:{}", self.links[1].port()))?;
        let mut topology =
            Topology::single(self.fence.ledger_id.clone(), self.fence.master.clone(), a, Limits::default());
        topology.epoch = self.fence.epoch;
        topology.centers.insert(CenterId::new("b")?, center(2, "http://127.0.0.1:1".to_owned())?);
        Ok(topology)
    }
}

fn ring(of: &CenterId) -> anyhow::Result<Keyring> {
    let key = |id: &str| {
        anyhow::Ok(CrossKey {
            id: format!("{id}-1"),
            center: CenterId::new(id)?,
            secret: [id.as_bytes()[0]; 32].to_vec(),
        })
    };
    Ok(Keyring::new(of.clone(), [key("a")?, key("b")?])?)
}

/// Makes a server the replica of what answers at a port, and waits until it is linked.
async fn follow(replica: &RedisServer, port: u16) -> anyhow::Result<()> {
    let mut conn = replica.connect().await;
    redis::cmd("REPLICAOF").arg("127.0.0.1").arg(port).query_async::<()>(&mut conn).await?;
    let deadline = Instant::now() + LINK_WAIT;
    loop {
        let info: String = redis::cmd("INFO").arg("replication").query_async(&mut conn).await?;
        if info.contains("master_link_status:up") {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the replica does not link: {info}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
