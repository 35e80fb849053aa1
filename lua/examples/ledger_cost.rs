//! What the ledger costs: CPU and memory of a real redis-server, as a table.
//!
//! `cargo run --release -p seckill-ledger --features testkit --example ledger_cost [claims]`
//!
//! One connection, one call after the other: a batch of n is n purchases in flight. CPU is the server's own
//! (`used_cpu_user` + `used_cpu_sys`), with `appendfsync always`. `claims` is the larger of the two sizes that are
//! compared, 1,000,000 if absent.

use redis::aio::MultiplexedConnection;
use seckill_domain::{CenterNumber, Epoch, IdempotencyKey, Quantity, SaleId, SaleSpec, Uid};
use seckill_ledger::admin::trim;
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{
    Fence, MAX_BATCH, ReleaseEntry, ReserveEntry, ReserveOutcome, create_sale, outbox, release, reserve,
};

/// Turns in which few and many claims are compared.
const ROUNDS: u64 = 16;
/// Purchases that are measured around the larger number of claims.
const MEASURED: u64 = 65_536;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

struct Bench {
    server: RedisServer,
    conn: MultiplexedConnection,
    fence: Fence,
    buyers: u64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome<()> {
    let many = std::env::args().nth(1).map_or(Ok(1_000_000), |text| text.parse())?;
    let server = RedisServer::start().await;
    let fence = server.init_ledger().await;
    let conn = server.connect().await;
    let mut bench = Bench { server, conn, fence, buyers: 0 };

    println!("{:<52}{:>10}{:>10}", "redis CPU per accepted purchase, µs", "all", "in user");
    for (batch, purchases) in [(1, 4_000), (16, 32_000), (64, 64_000), (256, 128_000), (1024, 256_000)] {
        let sale = bench.sale(&format!("batch-{batch}")).await?;
        bench.buy(&sale, 1000, batch).await?;
        let user = bench.server.info("used_cpu_user").await;
        let us = bench.buy(&sale, purchases, batch).await?;
        let user = (bench.server.info("used_cpu_user").await - user) * 1e6 / purchases as f64;
        println!("{:<52}{us:>10.2}{user:>10.2}", format!("  batch {batch}"));
        bench.trim().await?;
    }

    let sale = bench.sale("many").await?;
    let (before, outbox_before) = bench.memory().await?;
    // Half of what is measured lies on either side of the number.
    let many = many - MEASURED / 2;
    bench.buy(&sale, many, MAX_BATCH as u64).await?;
    let (after, outbox_after) = bench.memory().await?;
    let per = |bytes: f64| bytes / many as f64;
    // In turns, so that whatever else the machine does weighs on both.
    let (mut few_us, mut many_us) = (0.0, 0.0);
    for round in 0..ROUNDS {
        bench.trim().await?;
        let few = bench.sale(&format!("few-{round}")).await?;
        bench.buy(&few, 1000, 64).await?;
        few_us += bench.buy(&few, MEASURED / ROUNDS, 64).await? / ROUNDS as f64;
        many_us += bench.buy(&sale, MEASURED / ROUNDS, 64).await? / ROUNDS as f64;
    }
    println!("{:<52}{few_us:>10.2}", "  batch 64, from 1,000 claims on");
    println!("{:<52}{many_us:>10.2}", format!("  batch 64, around {} claims", many + MEASURED / 2));
    println!("{:<52}{:>10.2}", "  ratio", many_us / few_us);
    println!("{:<52}{:>10}", "redis memory", "bytes");
    println!("{:<52}{:>10.1}", "  per claim", per(after - before - (outbox_after - outbox_before)));
    for batch in [1, 16, 64, 1024] {
        bench.trim().await?;
        let sale = bench.sale(&format!("outbox-{batch}")).await?;
        let (_, before) = bench.memory().await?;
        let orders = if batch == 1 { 4_000 } else { 32_768 };
        bench.buy(&sale, orders, batch).await?;
        let (_, after) = bench.memory().await?;
        println!(
            "{:<52}{:>10.1}",
            format!("  per order in the outbox, batch {batch}"),
            (after - before) / orders as f64
        );
    }
    let us = bench.give_back().await?;
    println!("{:<52}{us:>10.2}", "redis CPU per release, batch 64 (µs)");
    Ok(())
}

impl Bench {
    async fn sale(&mut self, id: &str) -> Outcome<SaleId> {
        let json = format!(
            r#"{{"sale_id":"{id}","kind":"product","title":"a thing","quantity":1000000000,"price":1999,"currency":"CNY"}}"#
        );
        let spec = serde_json::from_str::<SaleSpec>(&json)?.validate(None)?;
        create_sale(&mut self.conn, &self.fence, &spec, &[0; 16]).await?;
        Ok(spec.sale_id)
    }

    fn entries(&mut self, count: u64) -> Outcome<Vec<ReserveEntry>> {
        let mut entries = Vec::new();
        for _ in 0..count {
            self.buyers += 1;
            // Spread over the alphabet, as real ids are: neighbours do not lie side by side in the hash.
            let uid = Uid::new(&format!("u{:09}", self.buyers * 7_919 % 1_000_000_000))?;
            let key = *IdempotencyKey::new(&format!("{:036}", self.buyers))?.digest();
            let (quantity, center) = (Quantity::ONE, CenterNumber::new(1)?);
            entries.push(ReserveEntry { uid, key, quantity, center, traceparent: None });
        }
        Ok(entries)
    }

    /// Buys one unit for each of `purchases` new users; returns the server's CPU for one, in µs.
    async fn buy(&mut self, sale: &SaleId, purchases: u64, batch: u64) -> Outcome<f64> {
        let before = self.server.cpu_us().await;
        let mut left = purchases;
        while left > 0 {
            let entries = self.entries(left.min(batch))?;
            left -= entries.len() as u64;
            let reply = reserve(&mut self.conn, &self.fence, 0, sale, &entries).await?;
            let all = reply.outcomes.iter().all(|outcome| matches!(outcome, ReserveOutcome::Accepted(_)));
            assert!(all, "a purchase was not accepted");
        }
        Ok((self.server.cpu_us().await - before) / purchases as f64)
    }

    async fn give_back(&mut self) -> Outcome<f64> {
        let sale = self.sale("returns").await?;
        let mut batches = Vec::new();
        for _ in 0..200 {
            let entries = self.entries(64)?;
            let reply = reserve(&mut self.conn, &self.fence, 0, &sale, &entries).await?;
            let orders =
                entries.into_iter().zip(reply.outcomes).filter_map(|(entry, outcome)| match outcome {
                    ReserveOutcome::Accepted(order_id) => Some(ReleaseEntry { order_id, uid: entry.uid }),
                    _ => None,
                });
            batches.push(orders.collect::<Vec<_>>());
        }
        let before = self.server.cpu_us().await;
        for batch in &batches {
            release(&mut self.conn, &self.fence, &sale, batch).await?;
        }
        Ok((self.server.cpu_us().await - before) / (200.0 * 64.0))
    }

    /// Memory in use, and the outbox's share of it.
    async fn memory(&mut self) -> Outcome<(f64, f64)> {
        let outbox: f64 = redis::cmd("MEMORY")
            .arg(&["USAGE", "sk:outbox", "SAMPLES", "0"])
            .query_async(&mut self.conn)
            .await?;
        Ok((self.server.info("used_memory").await, outbox))
    }

    async fn trim(&mut self) -> Outcome<()> {
        let last = outbox::last_id(&mut self.conn).await?.ok_or("an outbox without entries")?;
        assert_eq!(Epoch(last.epoch), self.fence.epoch);
        while trim(&mut self.conn, &self.fence, last).await? > 0 {}
        Ok(())
    }
}
