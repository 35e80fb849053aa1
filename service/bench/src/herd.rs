//! Many purchases under way at the same time, without HTTP in front of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use seckill::inventory::{Inventory, Purchase};
use seckill_domain::{Quantity, SaleId};
use seckill_ledger::testkit::RedisServer;

use crate::process::cpu_time;
use crate::purchases;

/// Until the pipeline is full, and what is counted then.
const WARM_UP: Duration = Duration::from_millis(500);
const COUNTED: Duration = Duration::from_millis(2000);

/// What a turn gave.
pub(crate) struct Turn {
    /// Purchases accepted per second.
    pub(crate) per_second: f64,
    /// How long half of them took, and 99 of 100.
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// CPU time of the master's Redis for each.
    pub(crate) redis_us: f64,
    /// CPU time of this process for each.
    pub(crate) own_us: f64,
}

/// Buys with `in_flight` purchases under way, each by another user.
pub(crate) async fn turn(
    in_flight: usize,
    inventory: &Inventory,
    master: &RedisServer,
    sale: &SaleId,
    next: &mut u64,
) -> anyhow::Result<Turn> {
    let user = Arc::new(AtomicU64::new(*next));
    let (done, counting, over) =
        (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let mut buyers = tokio::task::JoinSet::new();
    for _ in 0..in_flight {
        let (inventory, sale) = (inventory.clone(), sale.clone());
        let (user, done) = (Arc::clone(&user), Arc::clone(&done));
        let (counting, over) = (Arc::clone(&counting), Arc::clone(&over));
        buyers.spawn(async move {
            let mut latencies = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let number = user.fetch_add(1, Ordering::Relaxed);
                let purchase = Purchase {
                    uid: purchases::uid(number)?,
                    sale_id: sale.clone(),
                    key: purchases::key(number)?,
                    quantity: Quantity::ONE,
                    traceparent: None,
                };
                let started = Instant::now();
                inventory.purchase(purchase).await?;
                if counting.load(Ordering::Relaxed) {
                    done.fetch_add(1, Ordering::Relaxed);
                    latencies.push(started.elapsed());
                }
            }
            anyhow::Ok(latencies)
        });
    }
    tokio::time::sleep(WARM_UP).await;
    let redis_before = master.cpu_us().await;
    let own_before = cpu_time(std::process::id())?;
    let started = Instant::now();
    counting.store(true, Ordering::Relaxed);
    tokio::time::sleep(COUNTED).await;
    counting.store(false, Ordering::Relaxed);
    let (wall, count) = (started.elapsed(), done.load(Ordering::Relaxed));
    let redis_us = (master.cpu_us().await - redis_before) / count.max(1) as f64;
    let own_us = (cpu_time(std::process::id())? - own_before).as_secs_f64() * 1e6 / count.max(1) as f64;
    over.store(true, Ordering::Relaxed);
    let mut latencies = Vec::new();
    while let Some(buyer) = buyers.join_next().await {
        latencies.extend(buyer??);
    }
    *next = user.load(Ordering::Relaxed);
    latencies.sort_unstable();
    let at = |share: f64| {
        let place = (latencies.len() as f64 * share) as usize;
        latencies.get(place).map_or(0.0, |latency| latency.as_secs_f64() * 1000.0)
    };
    Ok(Turn {
        per_second: count as f64 / wall.as_secs_f64(),
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        redis_us,
        own_us,
    })
}
