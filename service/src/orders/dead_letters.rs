//! What was set aside because it could not be read, read again: a later release may understand it.

use seckill_domain::{OrderRecord, Shard};
use seckill_ledger::outbox::{self, Event};
use serde::Serialize;

use super::batch::{Origin, StoreBatch, Unreadable};
use super::error::Error;
use super::kafka;
use super::store::OrderStore;

/// Rows in one look, and in one replay: a call of an operator ends in some seconds.
const PAGE: u32 = 500;
const MOST: usize = 20_000;

/// What became of everything that was set aside.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Replay {
    /// Entries and records that were read, and are set aside no more.
    pub read: u64,
    /// Orders they held that are new.
    pub stored: u64,
    /// Orders they held that were stored before.
    pub duplicates: u64,
    /// Those that this release cannot read either.
    pub unreadable: Vec<StillUnreadable>,
    /// Whether there are more than one call reads.
    pub more: bool,
}

/// An entry or record that stays set aside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StillUnreadable {
    /// Where it came from.
    pub origin: Origin,
    /// Why it cannot be read.
    pub reason: String,
}

/// Reads everything that was set aside again, and stores the orders of the shards that `mine` answers for. Each is
/// stored and forgotten in one transaction; an order that is there already stays as it is. So it may be repeated.
pub async fn replay(store: &OrderStore, mine: impl Fn(Shard) -> bool) -> Result<Replay, Error> {
    let mut replay = Replay::default();
    let mut cursor = None;
    loop {
        let page = store.unreadable(PAGE, cursor).await?;
        for entry in page.items {
            match read_again(&entry) {
                Ok(mut orders) => {
                    orders.retain(|order| mine(order.order_id.table().shard()));
                    let batch = StoreBatch { orders, settled: vec![entry.origin], ..StoreBatch::default() };
                    let outcome = store.store(batch).await?;
                    replay.read += 1;
                    replay.stored += outcome.stored;
                    replay.duplicates += outcome.duplicates;
                }
                Err(reason) => {
                    replay.unreadable.push(StillUnreadable { origin: entry.origin, reason });
                }
            }
        }
        cursor = page.next;
        if cursor.is_none() {
            return Ok(replay);
        }
        if replay.unreadable.len() + usize::try_from(replay.read).unwrap_or(MOST) >= MOST {
            replay.more = true;
            return Ok(replay);
        }
    }
}

fn read_again(entry: &Unreadable) -> Result<Vec<OrderRecord>, String> {
    match entry.origin {
        Origin::Outbox { id, .. } => match outbox::parse_raw(id, &entry.raw)? {
            Event::Orders(orders) => Ok(orders),
            Event::Released { .. } | Event::Sale(_) | Event::SaleChanged(_) | Event::Epoch(_) => {
                Ok(Vec::new())
            }
        },
        Origin::Kafka { shard, .. } => kafka::read_again(shard, &entry.raw),
    }
}
