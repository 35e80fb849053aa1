//! How fast orders are stored.

use std::sync::Arc;
use std::time::Instant;

use seckill::orders::{OrderStore, StoreBatch, StoreOptions};
use seckill_domain::{
    CenterId, CenterNumber, Clock, Epoch, OrderId, OrderRecord, OutboxId, Quantity, SaleId, SaleTerms,
    SystemClock, Uid,
};

use serde_json::json;

use crate::Scope;
use crate::table::{Better, Row, print, row};

const SQLITE: &str = "orders stored per second, SQLite";
/// Orders of one round, and of one transaction.
const ORDERS: u64 = 100_000;
const BATCH: u64 = 4096;

pub(crate) async fn measure(scope: &Scope) -> anyhow::Result<Vec<Row>> {
    if !scope.wants(SQLITE) {
        return Ok(Vec::new());
    }
    let dir = tempfile::tempdir()?;
    let database = format!("sqlite:{}", dir.path().join("orders.db").display());
    let store = OrderStore::open(&database, StoreOptions::new(CenterId::new("a")?)).await?;
    let (mut rates, mut seq) = (Vec::new(), 0);
    let mut position = OutboxId::ZERO;
    let (terms, sale_id) = (terms()?, SaleId::new("bench")?);
    for round in 0..=scope.rounds {
        let batches = (0..ORDERS.div_ceil(BATCH))
            .map(|_| {
                let orders = (0..BATCH)
                    .map(|_| {
                        seq += 1;
                        record(seq, &terms, &sale_id)
                    })
                    .collect::<anyhow::Result<Vec<_>>>()?;
                anyhow::Ok((OutboxId { epoch: 1, seq }, orders))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let count: usize = batches.iter().map(|(_, orders)| orders.len()).sum();
        let start = Instant::now();
        for (to, orders) in batches {
            let outcome = store.store(StoreBatch::outbox(0, position, to, orders)).await?;
            anyhow::ensure!(outcome.stored == BATCH, "{outcome:?}");
            position = to;
        }
        if round > 0 {
            rates.push(count as f64 / start.elapsed().as_secs_f64());
        }
    }
    let size = std::fs::metadata(dir.path().join("orders.db"))?.len();
    let row = row(
        SQLITE,
        "/s",
        &rates,
        (Better::Higher, 20_000.0, 60_000.0),
        format!("transactions of {BATCH}; {} B on disk each", size / seq),
    );
    print(&row);
    store.close().await;
    Ok(vec![row])
}

fn record(seq: u64, terms: &Arc<SaleTerms>, sale_id: &SaleId) -> anyhow::Result<OrderRecord> {
    let uid = Uid::new(&format!("u{:09}", seq * 2_654_435_761 % 1_000_000_000))?;
    let head = OrderId::head_of(CenterNumber::new(1)?, uid.table(), 0, Epoch(1));
    Ok(OrderRecord {
        order_id: OrderId::from_parts(head, seq).ok_or_else(|| anyhow::anyhow!("sequence {seq}"))?,
        uid,
        sale_id: sale_id.clone(),
        quantity: Quantity::ONE,
        terms: Arc::clone(terms),
        accepted_at: SystemClock.now(),
        traceparent: None,
    })
}

/// Terms that neighbouring records share, as they do when they come out of the outbox.
fn terms() -> anyhow::Result<Arc<SaleTerms>> {
    Ok(Arc::new(serde_json::from_value(
        json!({"kind": "product", "unit_price": 1999, "currency": "CNY", "payment_ttl_s": 900}),
    )?))
}
