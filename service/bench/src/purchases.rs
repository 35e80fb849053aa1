//! Sales and purchases put straight into a ledger.

use std::ops::Range;

use redis::aio::MultiplexedConnection;
use seckill_domain::{CenterNumber, IdempotencyKey, KeyDigest, Quantity, SaleId, SaleSpec, Uid};
use seckill_ledger::{Fence, ReserveEntry, ReserveOutcome, reserve};
use serde_json::json;

/// Creates a sale that never sells out.
pub(crate) async fn sale(
    conn: &mut MultiplexedConnection,
    fence: &Fence,
    id: &str,
) -> anyhow::Result<SaleId> {
    let spec: SaleSpec = serde_json::from_value(json!({
        "sale_id": id, "kind": "product", "quantity": 1_000_000_000, "price": 1999, "currency": "CNY",
    }))?;
    seckill_ledger::create_sale(conn, fence, &spec, &[0; 16]).await?;
    Ok(spec.sale_id)
}

/// The name of a user, ten characters.
pub(crate) fn uid(user: u64) -> anyhow::Result<Uid> {
    Ok(Uid::new(&format!("u{user:09}"))?)
}

/// The digest of a user's key, which has 36 characters.
pub(crate) fn key(user: u64) -> anyhow::Result<KeyDigest> {
    let key = IdempotencyKey::new(&format!("{user:08x}-0000-4000-8000-{:012x}", user * 7919))?;
    Ok(*key.digest())
}

/// One accepted purchase by each of these users, in calls of `batch`.
pub(crate) async fn accept(
    conn: &mut MultiplexedConnection,
    fence: &Fence,
    sale: &SaleId,
    users: Range<u64>,
    batch: u64,
) -> anyhow::Result<()> {
    let center = CenterNumber::new(1)?;
    let mut next = users.start;
    while next < users.end {
        let end = (next + batch).min(users.end);
        let entries: Vec<ReserveEntry> = (next..end)
            .map(|user| {
                let (uid, key) = (uid(user)?, key(user)?);
                anyhow::Ok(ReserveEntry { uid, key, quantity: Quantity::ONE, center, traceparent: None })
            })
            .collect::<anyhow::Result<_>>()?;
        let reply = reserve(conn, fence, 0, sale, &entries).await?;
        anyhow::ensure!(reply.outcomes.iter().all(|outcome| matches!(outcome, ReserveOutcome::Accepted(_))));
        next = end;
    }
    Ok(())
}
