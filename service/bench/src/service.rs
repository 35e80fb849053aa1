//! The service's own public router in a process of its own, with or without the order workers.
//!
//! In a center the order workers run in one instance only; the others are what `--workers` is absent for.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::routing::get;
use seckill::admission::{ClientAddress, Key, Limiter, Ring, Tickets, Tokens};
use seckill::config::{InventoryConfig, LedgerConfig, SecretUrl};
use seckill::http::{PublicState, Relay, ServeOptions, public_router, serve};
use seckill::inventory::{Inventory, Parts};
use seckill::orders::{OrderStore, Queue, StoreOptions, WorkerOptions, Workers};
use seckill::telemetry::Metrics;
use seckill::topology::{Authority, Center, FileStore, Limits, Topology, TopologyHandle};
use seckill_domain::CenterNumber;
use seckill_ledger::Fence;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What the service runs on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// URL of the redis-server.
    #[arg(long)]
    redis: String,
    /// The ledger's fence.
    #[arg(long)]
    fence: String,
    /// File with the users' HS256 key.
    #[arg(long)]
    secret: PathBuf,
    /// An empty folder for the topology and the order database.
    #[arg(long)]
    dir: PathBuf,
    /// Store the orders too.
    #[arg(long)]
    workers: bool,
}

/// A user ring with this key alone.
pub(crate) fn tokens(secret: &Path) -> anyhow::Result<Tokens> {
    let secret = std::fs::read(secret)?;
    let ring = |secret: &[u8]| anyhow::Ok(Ring::new(vec![Key::hs256(None, secret)?], None, "sub"));
    Ok(Tokens::new(
        ring(&secret)?,
        ring(b"payments-payments-payments-paymen")?,
        ring(b"admin-admin-admin-admin-admin-ad")?,
    ))
}

/// Runs until the process is killed.
pub(crate) async fn run(args: &Args) -> anyhow::Result<()> {
    let fence: Fence = args.fence.parse()?;
    let authority = Authority::fixed(fence.clone());
    let url = "http://127.0.0.1:1".to_owned();
    let center = Center {
        number: CenterNumber::new(1)?,
        public_url: url.clone(),
        admin_url: url.clone(),
        internal_url: url,
        ledger: Vec::new(),
        extra: serde_json::Map::new(),
    };
    let mut topology =
        Topology::single(fence.ledger_id.clone(), fence.master.clone(), center, Limits::default());
    topology.epoch = fence.epoch;
    let store = FileStore::new(args.dir.join("topology.json"));
    let topology = TopologyHandle::open_or_create(store, authority.clone(), topology).await?;
    let database = format!("sqlite:{}", args.dir.join("orders.db").display());
    let orders = OrderStore::open(&database, StoreOptions::new(fence.master.clone())).await?;

    let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
    let ledger = LedgerConfig { partitions: vec![SecretUrl::new(&args.redis)], ..LedgerConfig::default() };
    let parts = Parts {
        ledger: &ledger,
        inventory: &InventoryConfig::default(),
        retry_window_ms: 0,
        topology: topology.clone(),
        authority: authority.clone(),
        cross: None,
    };
    let inventory = Inventory::start(&parts, &tracker, &stop, &stop)?;
    if args.workers {
        let client = redis::Client::open(args.redis.as_str())?;
        Workers::spawn(
            &orders,
            &[client],
            &authority,
            &Queue::Outbox,
            &WorkerOptions::default(),
            &tracker,
            (&stop, &stop),
        );
    }
    while !inventory.sales().is_loaded() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let stored = orders.metrics().stored.clone();
    let secret = std::fs::read(&args.secret)?;
    let router = public_router(PublicState {
        inventory,
        updates: orders.updates().clone(),
        orders,
        tokens: Arc::new(tokens(&args.secret)?),
        tickets: Tickets::new([&secret[..]]),
        limiter: Limiter::new(&Limits::default()),
        addresses: ClientAddress::new(Vec::new()),
        topology,
        metrics: Arc::new(Metrics::new()),
        relay: Relay::default(),
        shutdown: stop.clone(),
    })
    .route("/bench/stored", get(async move || stored.get().to_string()));
    serve(crate::serve::listen().await?, router, ServeOptions::default(), stop).await;
    Ok(())
}
