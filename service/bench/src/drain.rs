//! A process that takes the orders of an outbox over Kafka into a database and reports what it does and needs.
//!
//! First it publishes everything while it stores nothing, as during an outage of the order database; then it stores
//! everything, from the largest backlog on.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seckill::orders::{
    KafkaMetrics, KafkaOptions, OrderStore, Owners, Queue, StoreOptions, WorkerOptions, Workers,
};
use seckill::topology::{Authority, Center, Limits, Topology};
use seckill_domain::{CenterId, CenterNumber, Shard};
use seckill_ledger::Fence;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How often memory is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Without progress for this long something is wrong.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the process works on.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// URL of the redis-server with the outbox.
    #[arg(long)]
    redis: String,
    /// The ledger's fence.
    #[arg(long)]
    fence: String,
    /// The brokers.
    #[arg(long)]
    bootstrap: String,
    /// The order database, without tables.
    #[arg(long)]
    database: String,
    /// Orders in the outbox.
    #[arg(long)]
    orders: u64,
    /// A report after each so many orders.
    #[arg(long, default_value_t = 50_000)]
    every: u64,
    /// Orders are stored for so long at most, seconds.
    #[arg(long, default_value_t = 100)]
    seconds: u64,
}

/// What is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// From the outbox into Kafka.
    Published,
    /// From Kafka into the database.
    Stored,
}

impl Phase {
    /// The phase in one word.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Phase::Published => "published",
            Phase::Stored => "stored",
        }
    }
}

/// One line of the process' output.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Report {
    /// What is under way.
    pub(crate) phase: Phase,
    /// Orders so far.
    pub(crate) orders: u64,
    /// Since the phase began, seconds.
    pub(crate) seconds: f64,
    /// The most that was resident since the last report, MiB.
    pub(crate) resident_mib: f64,
}

/// Runs until every order is stored, or the time is over.
pub(crate) async fn run(args: &Args) -> anyhow::Result<()> {
    let fence: Fence = args.fence.parse()?;
    let center = fence.master.clone();
    let store = OrderStore::open(&args.database, StoreOptions::new(center.clone())).await?;
    // As if its shards were on the way to another center, and its database had let go of them.
    let mut elsewhere = topology(&fence)?;
    elsewhere.blocked_shards = Shard::all().collect();
    let (topology, receiver) = watch::channel(Arc::new(elsewhere.clone()));
    elsewhere.shard_owners.fill(CenterId::new("elsewhere")?);
    store.limit_to(&Owners::of(&elsewhere));
    let metrics = KafkaMetrics::default();
    let queue = Queue::Kafka(KafkaOptions {
        center: center.clone(),
        centers: BTreeMap::from([(
            center.clone(),
            vec![("bootstrap.servers".to_owned(), args.bootstrap.clone())],
        )]),
        topic_prefix: "bench.".to_owned(),
        replication_factor: 1,
        topology: receiver,
        metrics: metrics.clone(),
    });
    let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
    let client = redis::Client::open(args.redis.as_str())?;
    let authority = Authority::fixed(fence.clone());
    let options = WorkerOptions::default();
    let workers = Workers::spawn(&store, &[client], &authority, &queue, &options, &tracker, (&stop, &stop));

    let label = seckill::orders::CenterLabel { center: center.to_string() };
    let relayed = metrics.published.get_or_create_owned(&label);
    let mut watcher = Watcher { every: args.every, orders: args.orders };
    watcher.follow(Phase::Published, None, || relayed.get(), &workers).await?;
    ensure!(store.metrics().stored.get() == 0, "orders were stored while they were published");
    let home = self::topology(&fence)?;
    store.limit_to(&Owners::of(&home));
    topology.send_replace(Arc::new(home));
    let limit = Some(Duration::from_secs(args.seconds));
    watcher.follow(Phase::Stored, limit, || store.metrics().stored.get(), &workers).await?;
    stop.cancel();
    tracker.close();
    tracker.wait().await;
    store.close().await;
    Ok(())
}

fn topology(fence: &Fence) -> anyhow::Result<Topology> {
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
    Ok(topology)
}

struct Watcher {
    every: u64,
    orders: u64,
}

impl Watcher {
    /// Reports until `count` has come to the end, or the time is over. The clock starts with the first order:
    /// what is done once, before it, is not the rate.
    async fn follow(
        &mut self,
        phase: Phase,
        limit: Option<Duration>,
        count: impl Fn() -> u64,
        workers: &Workers,
    ) -> anyhow::Result<()> {
        let (mut begin, mut moved) = (None, (0, Instant::now()));
        let (mut reported, mut most) = (0, 0.0f64);
        loop {
            tokio::time::sleep(LOOK).await;
            most = most.max(resident_mib()?);
            let orders = count();
            if orders == 0 {
                ensure!(moved.1.elapsed() < PATIENCE, "nothing is {phase:?}: {:?}", workers.waiting());
                continue;
            }
            let since = *begin.get_or_insert_with(Instant::now);
            if orders > moved.0 {
                moved = (orders, Instant::now());
            }
            ensure!(moved.1.elapsed() < PATIENCE, "{orders} {phase:?}: {:?}", workers.waiting());
            let over = orders >= self.orders || limit.is_some_and(|limit| since.elapsed() >= limit);
            if reported == 0 || orders >= reported + self.every || over {
                let seconds = since.elapsed().as_secs_f64();
                let report = Report { phase, orders, seconds, resident_mib: most };
                println!("{}", serde_json::to_string(&report)?);
                (reported, most) = (orders, 0.0);
            }
            if over {
                return Ok(());
            }
        }
    }
}

/// What of this process is in memory.
fn resident_mib() -> anyhow::Result<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm")?;
    let pages: u64 = statm.split(' ').nth(1).context("the form of /proc/self/statm")?.parse()?;
    Ok((pages * rustix::param::page_size() as u64) as f64 / f64::from(1 << 20))
}
