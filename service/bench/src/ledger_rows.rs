//! The rows that are measured on the ledger itself.

use redis::aio::MultiplexedConnection;
use seckill_domain::SaleId;
use seckill_ledger::Fence;
use seckill_ledger::testkit::RedisServer;

use crate::table::{Better, Row, median, print, row};
use crate::{Scope, purchases};

const CLAIM: &str = "Redis memory per claim";
const OUTBOX: &str = "Redis memory per order in the outbox";
const GROWTH: &str = "Redis CPU per purchase: 10^6 claims / 10^3";

/// Claims of the large sale.
const MANY: u64 = 1_000_000;
/// Claims of the small one: just above 2^10, as the large one stays below 2^20. At a power of two Redis doubles
/// the hash's table, and purchases cost more until all entries have moved, at both sizes.
const FEW: u64 = 1_100;
/// Purchases in a batch when the memory is filled, and when CPU is measured: what lanes make of 64 in flight.
const FILL_BATCH: u64 = 1024;
const BATCH: u64 = 32;

struct Ledger {
    redis: RedisServer,
    conn: MultiplexedConnection,
    fence: Fence,
}

/// The version that the rows were measured with.
pub(crate) async fn redis_version() -> String {
    let redis = RedisServer::start().await;
    let mut conn = redis.connect().await;
    let info: String = redis::cmd("INFO").arg("server").query_async(&mut conn).await.unwrap_or_default();
    info.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap_or("?").trim().to_owned()
}

pub(crate) async fn measure(scope: &Scope) -> anyhow::Result<Vec<Row>> {
    if ![CLAIM, OUTBOX, GROWTH].iter().any(|name| scope.wants(name)) {
        return Ok(Vec::new());
    }
    // What is measured is the memory and CPU of the data, not of the disk.
    let redis = RedisServer::start().await;
    redis.config_set("appendfsync", "no").await;
    // A rewrite of the log forks, and then every first write to a page copies it.
    redis.config_set("auto-aof-rewrite-percentage", "0").await;
    let fence = redis.init_ledger().await;
    let conn = redis.connect().await;
    let mut ledger = Ledger { redis, conn, fence };
    let mut rows = Vec::new();

    let large = ledger.sale("large").await?;
    let before = ledger.redis.info("used_memory").await;
    ledger.fill(&large, 0, MANY, FILL_BATCH).await?;
    let with_outbox = ledger.redis.info("used_memory").await;
    redis::cmd("XTRIM").arg("sk:outbox").arg("MAXLEN").arg(0).query_async::<()>(&mut ledger.conn).await?;
    let without = ledger.redis.info("used_memory").await;
    rows.push(row(
        CLAIM,
        "B",
        &[(without - before) / MANY as f64],
        (Better::Lower, 200.0, 110.0),
        format!("{MANY} claims, 10-byte uids, 36-byte keys"),
    ));
    let medium = ledger.sale("medium").await?;
    let before = ledger.outbox_bytes().await?;
    ledger.fill(&medium, 0, 100_000, BATCH).await?;
    let per_order = (ledger.outbox_bytes().await? - before) / 100_000.0;
    rows.push(row(
        OUTBOX,
        "B",
        &[per_order],
        (Better::Lower, 120.0, 80.0),
        format!("batches of {}; of {FILL_BATCH}: {:.0} B", BATCH, (with_outbox - without) / MANY as f64),
    ));
    if scope.wants(GROWTH) {
        rows.push(ledger.growth(scope, &large).await?);
    }
    rows.retain(|row| scope.wants(row.what));
    rows.iter().for_each(print);
    Ok(rows)
}

impl Ledger {
    async fn sale(&mut self, id: &str) -> anyhow::Result<SaleId> {
        purchases::sale(&mut self.conn, &self.fence, id).await
    }

    /// Purchases by the users from `first` on.
    async fn fill(&mut self, sale: &SaleId, first: u64, count: u64, batch: u64) -> anyhow::Result<()> {
        purchases::accept(&mut self.conn, &self.fence, sale, first..first + count, batch).await
    }

    async fn outbox_bytes(&mut self) -> anyhow::Result<f64> {
        let bytes: Option<u64> = redis::cmd("MEMORY")
            .arg("USAGE")
            .arg("sk:outbox")
            .arg("SAMPLES")
            .arg(0)
            .query_async(&mut self.conn)
            .await?;
        Ok(bytes.unwrap_or(0) as f64)
    }

    /// The same purchases in a sale with a million claims and in sales with a thousand, in turns. A turn takes
    /// some milliseconds, so what else the machine does meets both; the median of all turns counts.
    async fn growth(&mut self, scope: &Scope, large: &SaleId) -> anyhow::Result<Row> {
        const PURCHASES: u64 = 16 * BATCH;
        const TURNS: u32 = 16;
        // As in production: every batch is on the disk before it is answered.
        self.redis.config_set("appendfsync", "always").await;
        let (mut ratios, mut at_many, mut at_few) = (Vec::new(), Vec::new(), Vec::new());
        let mut next = MANY;
        for turn in 0..scope.rounds.min(5) * TURNS {
            let small = self.sale(&format!("small-{turn}")).await?;
            self.fill(&small, 0, FEW, FILL_BATCH).await?;
            let start = self.redis.cpu_us().await;
            self.fill(&small, FEW, PURCHASES, BATCH).await?;
            let middle = self.redis.cpu_us().await;
            self.fill(large, next, PURCHASES, BATCH).await?;
            let end = self.redis.cpu_us().await;
            next += PURCHASES;
            ratios.push((end - middle) / (middle - start));
            at_many.push((end - middle) / PURCHASES as f64);
            at_few.push((middle - start) / PURCHASES as f64);
        }
        let detail = format!(
            "{:.2} / {:.2} us, batches of {BATCH}, {} turns",
            median(&at_many),
            median(&at_few),
            ratios.len()
        );
        Ok(row(GROWTH, "x", &ratios, (Better::Lower, 1.15, 1.05), detail))
    }
}
