//! How long an audit takes: `cargo run --release --example audit_rate [ORDERS [DATABASE_URL]]`.
//!
//! A redis-server of its own holds the claims, an order database (a temporary SQLite file, or the one named) the
//! orders: every order has a buyer of its own, one in a thousand is cancelled and given back. Everything is stored, so the
//! audit compares all of it.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use seckill::audit::{self, Verdict};
use seckill::orders::{OrderCenters, OrderStore, StoreBatch, StoreOptions};
use seckill_domain::{CenterId, CenterNumber, IdempotencyKey, OrderId, Quantity, SaleId, SaleSpec, Uid};
use seckill_ledger::outbox::{self, Event};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{ReleaseEntry, ReserveEntry, ReserveOutcome};

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let orders: u64 = args.next().map(|arg| arg.parse()).transpose()?.unwrap_or(1_000_000);
    let folder = tempfile::tempdir_in(".")?;
    let sqlite = format!("sqlite:{}", folder.path().join("orders.db").display());
    let url = args.next().unwrap_or(sqlite);
    let store = OrderStore::open(&url, StoreOptions::new(CenterId::new("a")?)).await?;
    let redis = RedisServer::start().await;
    let fence = redis.init_ledger().await;
    let mut conn = redis.connect().await;

    let spec: SaleSpec = serde_json::from_value(serde_json::json!({
        "sale_id": "bench", "kind": "product", "quantity": orders, "price": 100, "currency": "CNY",
        "per_user_limit": 1,
    }))?;
    let spec = spec.validate(None)?;
    let sale: SaleId = spec.sale_id.clone();
    seckill_ledger::create_sale(&mut conn, &fence, &spec, &[7; 16]).await?;
    let begin = Instant::now();
    let mut given_back = Vec::new();
    let mut made = 0;
    while made < orders {
        let size = (orders - made).min(500);
        let entries = (made..made + size).map(entry).collect::<Result<Vec<_>>>()?;
        let reply = seckill_ledger::reserve(&mut conn, &fence, 0, &sale, &entries).await?;
        for (entry, outcome) in entries.into_iter().zip(reply.outcomes) {
            let ReserveOutcome::Accepted(order_id) = outcome else { anyhow::bail!("{outcome:?}") };
            if made.is_multiple_of(1000) {
                given_back.push((entry.uid, order_id));
            }
            made += 1;
        }
    }
    fill(&store, &mut conn).await?;
    for (uid, order_id) in &given_back {
        store.cancel(uid, *order_id).await?;
    }
    for chunk in given_back.chunks(500) {
        let entries: Vec<ReleaseEntry> = chunk
            .iter()
            .map(|(uid, order_id)| ReleaseEntry { order_id: *order_id, uid: uid.clone() })
            .collect();
        seckill_ledger::release(&mut conn, &fence, &sale, &entries).await?;
        let done: Vec<OrderId> = chunk.iter().map(|(_, order_id)| *order_id).collect();
        store.releases_done(done, Vec::new()).await?;
    }
    fill(&store, &mut conn).await?;
    println!("{orders} orders made and stored in {:.1} s", begin.elapsed().as_secs_f64());

    for _ in 0..3 {
        let begin = Instant::now();
        let report = audit::run(&OrderCenters::alone(store.clone()), &mut conn, None).await;
        ensure!(report.verdict == Verdict::Clean, "{report:?}");
        println!("audited in {:.2} s, resident {} MiB", begin.elapsed().as_secs_f64(), resident_mib()?);
    }
    store.close().await;
    Ok(())
}

fn entry(number: u64) -> Result<ReserveEntry> {
    Ok(ReserveEntry {
        uid: Uid::new(&format!("u{:09}", number.wrapping_mul(2_654_435_761) % 1_000_000_000))?,
        key: *IdempotencyKey::new(&format!("key-{number:032}"))?.digest(),
        quantity: Quantity::ONE,
        center: CenterNumber::new(1)?,
        traceparent: None,
    })
}

async fn fill(store: &OrderStore, conn: &mut redis::aio::MultiplexedConnection) -> Result<()> {
    loop {
        let from = store.position(0).await?;
        let page = outbox::read(conn, from, 16).await?;
        let Some(to) = page.entries.last().map(|entry| entry.id) else { return Ok(()) };
        let mut orders = Vec::new();
        for entry in page.entries {
            if let Event::Orders(more) = entry.event.map_err(|bad| anyhow::anyhow!(bad.reason))? {
                orders.extend(more);
            }
        }
        store.store(StoreBatch::outbox(0, from, to, orders)).await?;
    }
}

fn resident_mib() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse()?;
    Ok(kib / 1024)
}
