//! How fast orders are stored: `cargo run --release --example store_rate [mysql://…] [ORDERS [BATCH ...]]`. Without a
//! server's URL it is a SQLite file. A database on a server is used as it is: begin with an empty one, and one batch size.
//!
//! Every order has a buyer of its own, as after a flash sale; every batch is a transaction that is synced. CPU is
//! this process' user and system time, so it includes SQLite's thread.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use seckill::orders::{OrderStore, StoreBatch, StoreOptions};
use seckill_domain::{
    CenterId, CenterNumber, Clock, Epoch, OrderId, OrderRecord, OutboxId, Quantity, SaleId, SaleTerms,
    SystemClock, Uid,
};

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).peekable();
    let server = args.next_if(|arg| arg.starts_with("mysql://"));
    let mut args = args.map(|arg| arg.parse::<usize>());
    let orders = args.next().transpose()?.unwrap_or(400_000);
    let mut batches = args.collect::<Result<Vec<_>, _>>()?;
    if batches.is_empty() {
        batches = vec![1, 64, 512, 2048, 4096, 8192];
    }
    println!("| orders a transaction | stored/s | CPU µs/order | of it system | database bytes/order |");
    println!("| --- | --- | --- | --- | --- |");
    for batch in batches {
        // One order a transaction measures the disk's sync, so a few will do.
        measure(server.as_deref(), orders.min(batch * 2000), batch).await?;
    }
    Ok(())
}

async fn measure(server: Option<&str>, orders: usize, batch: usize) -> Result<()> {
    let folder = tempfile::tempdir_in(".")?;
    let path = folder.path().join("orders.db");
    let url = server.map_or_else(|| format!("sqlite:{}", path.display()), str::to_owned);
    let store = OrderStore::open(&url, StoreOptions::new(CenterId::new("a")?)).await?;
    let sale_id = SaleId::new("bench")?;
    let terms: Arc<SaleTerms> = Arc::new(serde_json::from_str(
        r#"{"kind":"product","unit_price":1999,"currency":"CNY","payment_ttl_s":900}"#,
    )?);
    let center = CenterNumber::new(1)?;
    let mut made = 0u64;
    let mut pages = Vec::new();
    while (made as usize) < orders {
        let mut page = Vec::with_capacity(batch);
        for _ in 0..batch {
            made += 1;
            // Spreads the users over the tables and over each index.
            let uid = Uid::new(&format!("u{:09}", made.wrapping_mul(2_654_435_761) % 1_000_000_000))?;
            let head = OrderId::head_of(center, uid.table(), 0, Epoch(1));
            page.push(OrderRecord {
                order_id: OrderId::from_parts(head, made).context("an order id")?,
                uid,
                sale_id: sale_id.clone(),
                quantity: Quantity::ONE,
                terms: Arc::clone(&terms),
                accepted_at: SystemClock.now(),
                traceparent: None,
            });
        }
        pages.push(page);
    }
    // The first transaction prepares the statements.
    let mut pages = pages.into_iter();
    let mut from = OutboxId::ZERO;
    let mut to = OutboxId { epoch: 1, seq: 1 };
    store.store(StoreBatch::outbox(0, from, to, pages.next().context("a page")?)).await?;
    let (begin, user, system) = (Instant::now(), cpu_us(13)?, cpu_us(14)?);
    let mut stored = 0;
    for page in pages {
        from = to;
        to.seq += 1;
        stored += store.store(StoreBatch::outbox(0, from, to, page)).await?.stored;
    }
    let seconds = begin.elapsed().as_secs_f64();
    let (user, system) = (cpu_us(13)? - user, cpu_us(14)? - system);
    store.close().await;
    let each = |us: f64| us / stored as f64;
    println!(
        "| {batch} | {:.0} | {:.1} | {:.1} | {} |",
        stored as f64 / seconds,
        each(user + system),
        each(system),
        std::fs::metadata(&path).map_or(0, |file| file.len()) / stored.max(1),
    );
    Ok(())
}

/// User or system time of this process, from `/proc/self/stat` (field 14 or 15), in steps of 10 ms.
fn cpu_us(index: usize) -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit(')').next().context("a process state")?;
    let ticks: f64 = fields.split_whitespace().nth(index - 2).context("a field")?.parse()?;
    Ok(ticks * 10_000.0)
}
