//! How fast orders come through Kafka, and in how much memory:
//! `cargo run --release --example kafka_drain [ORDERS [DATABASE_URL]]`.
//!
//! Fills a ledger's outbox first, then starts relay and consumer as the service does, and waits until every order is
//! stored. Redis, and Kafka where `KAFKA_BOOTSTRAP` names none, are its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use seckill::orders::{KafkaMetrics, KafkaOptions, OrderStore, Queue, StoreOptions, WorkerOptions, Workers};
use seckill::topology::{Authority, Center, Limits, Topology};
use seckill_domain::{CenterId, CenterNumber, IdempotencyKey, Quantity, SaleId, SaleSpec, Uid};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{ReserveEntry, create_sale, reserve};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const BATCH: usize = 512;

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let orders: usize = args.next().map_or(Ok(200_000), |text| text.parse())?;
    let folder = tempfile::tempdir_in(".")?;
    let database =
        args.next().unwrap_or_else(|| format!("sqlite:{}", folder.path().join("orders.db").display()));
    let redis = RedisServer::start().await;
    let fence = redis.init_ledger().await;
    let bootstrap = seckill_parts::shared::kafka().await?;
    fill(&redis, &fence, orders).await?;

    let a = CenterId::new("a")?;
    let url = "http://127.0.0.1:1".to_owned();
    let center = Center {
        number: CenterNumber::new(1)?,
        public_url: url.clone(),
        admin_url: url.clone(),
        internal_url: url,
        ledger: Vec::new(),
        extra: serde_json::Map::new(),
    };
    let topology = Topology::single(fence.ledger_id.clone(), a.clone(), center, Limits::default());
    let (_keep, topology) = watch::channel(Arc::new(topology));
    let store = OrderStore::open(&database, StoreOptions::new(a.clone())).await?;
    let queue = Queue::Kafka(KafkaOptions {
        center: a.clone(),
        centers: BTreeMap::from([(a, vec![("bootstrap.servers".to_owned(), bootstrap)])]),
        topic_prefix: format!("drain{:08x}.", rand::random::<u32>()),
        replication_factor: 1,
        topology,
        metrics: KafkaMetrics::default(),
    });
    let (tracker, token) = (TaskTracker::new(), CancellationToken::new());
    let before = memory("VmRSS")?;
    let authority = Authority::fixed(fence);
    let workers = Workers::spawn(
        &store,
        &[redis.client()],
        &authority,
        &queue,
        &WorkerOptions::default(),
        &tracker,
        &token,
    );
    let stored = || store.metrics().stored.get();
    // The topics and the statements are prepared first.
    while stored() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (begin, first) = (Instant::now(), stored());
    let mut said = first;
    while stored() < orders as u64 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if stored() - said >= orders as u64 / 10 {
            said = stored();
            println!("{said} stored, {} MiB resident", memory("VmRSS")? >> 10);
        }
        anyhow::ensure!(begin.elapsed() < Duration::from_secs(600), "{:?}", workers.waiting());
    }
    let rate = (orders as u64 - first) as f64 / begin.elapsed().as_secs_f64();
    println!(
        "{rate:.0} orders/s; {} MiB resident before, {} MiB at most",
        before >> 10,
        memory("VmHWM")? >> 10
    );
    token.cancel();
    tracker.close();
    tracker.wait().await;
    store.close().await;
    Ok(())
}

async fn fill(redis: &RedisServer, fence: &seckill_ledger::Fence, orders: usize) -> Result<()> {
    let mut conn = redis.connect().await;
    let spec: SaleSpec = serde_json::from_value(serde_json::json!({
        "sale_id": "s", "kind": "product", "quantity": orders, "price": 100, "currency": "CNY",
        "per_user_limit": 1, "payment_ttl_s": 900,
    }))?;
    create_sale(&mut conn, fence, &spec, &[0; 16]).await?;
    let key = *IdempotencyKey::new("k")?.digest();
    let mut made = 0;
    while made < orders {
        let batch = (made..orders.min(made + BATCH)).map(|n| {
            Ok(ReserveEntry {
                uid: Uid::new(&format!("u{:09}", (n as u64).wrapping_mul(2_654_435_761) % 1_000_000_000))?,
                key,
                quantity: Quantity::ONE,
                center: CenterNumber::new(1)?,
                traceparent: None,
            })
        });
        let batch = batch.collect::<Result<Vec<_>>>()?;
        made += batch.len();
        reserve(&mut conn, fence, 0, &SaleId::new("s")?, &batch).await?;
    }
    Ok(())
}

/// A line of `/proc/self/status`, KiB.
fn memory(name: &str) -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(line.and_then(|line| line.split_whitespace().next()).context("a line of the status")?.parse()?)
}
