//! Storing a batch of the queues: orders, positions and what could not be read, together.

use std::collections::{BTreeMap, HashMap};

use seckill_domain::{OrderRecord, OutboxId, Table};

use super::super::batch::{Advance, Origin, StoreBatch, StoreOutcome, Unreadable};
use super::super::error::Error;
use super::session::{Dialect, Session, Value, values};
use super::writer::{Hub, Lane, Tx, Write};
use super::{insert_mysql, insert_sqlite, positions};

/// What is kept of the raw content of an entry that cannot be stored, characters.
const RAW_CHARS: usize = 256 * 1024;
/// Orders looked up in one query; SQLite takes at least 999 parameters.
const LOOKUP: usize = 500;
/// What is kept of the reason.
const REASON_CHARS: usize = 500;

/// A batch of the queues.
pub(super) struct Store(pub(super) StoreBatch);

/// What was stored, and how many entries had to be set aside.
pub(super) struct Stored {
    pub(super) outcome: StoreOutcome,
    pub(super) set_aside: u64,
}

impl Write for Store {
    type Output = Stored;

    fn lane(&self) -> Lane {
        // Batches of one queue come one after the other; those of others need not wait for them.
        let place = self.0.advance.first().map_or(0, |advance| match advance {
            Advance::Outbox { partition, .. } => *partition,
            Advance::Kafka { shard, .. } => shard.number(),
        });
        Lane::Batch(place.into())
    }

    async fn run(&self, tx: &mut Tx<'_>) -> Result<Stored, Error> {
        let batch = &self.0;
        // First of all: whoever lost the race stores nothing (R2).
        positions::advance(tx, &batch.advance).await?;
        let mut set_aside = 0;
        for entry in &batch.unreadable {
            set_aside += set_aside_entry(tx, entry).await?;
        }
        for origin in &batch.settled {
            settle(tx, *origin).await?;
        }
        let orders: Vec<&OrderRecord> =
            batch.orders.iter().filter(|order| tx.owned.contains(order.order_id.table().shard())).collect();
        let foreign = (batch.orders.len() - orders.len()) as u64;
        if foreign > 0 && !batch.passes_foreign() {
            for order in &batch.orders {
                tx.owned.check(order.order_id.table().shard())?;
            }
        }
        let stored = insert(tx, &orders).await?;
        let duplicates = orders.len() as u64 - stored;
        if duplicates > 0 {
            // Rare: somebody else's batch overlapped, or an id was given out twice.
            for (order, reason) in collisions(tx.conn, &orders).await? {
                let raw = format!("{} {} {}", order.order_id, order.sale_id, order.uid);
                let entry = Unreadable { origin: batch.origin_of(order), reason, raw };
                set_aside += set_aside_entry(tx, &entry).await?;
            }
        }
        Ok(Stored { outcome: StoreOutcome { stored, duplicates, foreign }, set_aside })
    }

    fn committed(&self, stored: &Stored, hub: &Hub) {
        hub.metrics.stored.inc_by(stored.outcome.stored);
        hub.metrics.duplicates.inc_by(stored.outcome.duplicates);
        hub.metrics.unreadable.inc_by(stored.set_aside);
        hub.updates.notify(self.0.orders.iter().map(|order| order.order_id));
    }
}

/// Stores those orders whose id is not there; returns how many these are.
pub(super) async fn insert(tx: &mut Tx<'_>, orders: &[&OrderRecord]) -> Result<u64, Error> {
    match tx.conn.dialect() {
        Dialect::Sqlite => insert_sqlite::insert(tx, orders).await,
        Dialect::MySql => insert_mysql::insert(tx, orders).await,
    }
}

impl StoreBatch {
    /// Whether every order came from a queue that carries other centers' orders too.
    fn passes_foreign(&self) -> bool {
        !self.advance.is_empty()
            && self.advance.iter().all(|advance| match advance {
                Advance::Outbox { .. } => true,
                Advance::Kafka { .. } => false,
            })
    }

    /// Where an order came from, as far as the batch says: a place near it.
    fn origin_of(&self, order: &OrderRecord) -> Origin {
        let from = |advance: &Advance| match advance {
            Advance::Outbox { partition, to, .. } if *partition == order.order_id.partition() => {
                Some(Origin::Outbox { partition: *partition, id: *to })
            }
            Advance::Kafka { shard, to, .. } if *shard == order.order_id.table().shard() => {
                Some(Origin::Kafka { shard: *shard, offset: to - 1 })
            }
            Advance::Outbox { .. } | Advance::Kafka { .. } => None,
        };
        self.advance
            .iter()
            .find_map(from)
            .unwrap_or(Origin::Outbox { partition: order.order_id.partition(), id: OutboxId::ZERO })
    }
}

async fn set_aside_entry(tx: &mut Tx<'_>, entry: &Unreadable) -> Result<u64, Error> {
    let insert = tx.conn.dialect().insert_new();
    let reason: String = entry.reason.chars().take(REASON_CHARS).collect();
    let raw: String = entry.raw.chars().take(RAW_CHARS).collect();
    let (queue, partition, place) = origin_columns(entry.origin);
    let done = tx.conn.execute(format!("{insert} unreadable (queue, `partition`, outbox_id, reason, raw, created_at, center) VALUES (?, ?, ?, ?, ?, ?, ?)"), values![queue, partition, place, reason, raw, tx.now.0, tx.center.as_str()])
    .await?;
    Ok(done)
}

async fn settle(tx: &mut Tx<'_>, origin: Origin) -> Result<(), Error> {
    let (queue, partition, place) = origin_columns(origin);
    tx.conn
        .execute(
            "DELETE FROM unreadable WHERE queue = ? AND `partition` = ? AND outbox_id = ? AND center = ?",
            values![queue, partition, place, tx.center.as_str()],
        )
        .await?;
    Ok(())
}

/// The columns `queue`, `partition` and `outbox_id`.
fn origin_columns(origin: Origin) -> (&'static str, u8, String) {
    match origin {
        Origin::Outbox { partition, id } => ("outbox", partition, id.to_string()),
        Origin::Kafka { shard, offset } => ("kafka", shard.number(), offset.to_string()),
    }
}

/// The orders whose ids belong to something else already, and what that is. A relay that was not told of
/// acknowledgements publishes whole batches again, so it is asked table by table, not order by order.
async fn collisions<'o>(
    conn: &mut Session,
    orders: &[&'o OrderRecord],
) -> Result<Vec<(&'o OrderRecord, String)>, Error> {
    let mut by_table: BTreeMap<Table, Vec<&OrderRecord>> = BTreeMap::new();
    for order in orders {
        by_table.entry(order.order_id.table()).or_default().push(*order);
    }
    let mut found = Vec::new();
    for (table, orders) in by_table {
        for chunk in orders.chunks(LOOKUP) {
            let ids: Vec<Value<'_>> =
                chunk.iter().map(|order| Value::from(order.order_id.to_string())).collect();
            let marks = vec!["?"; ids.len()].join(", ");
            let sql = format!(
                "SELECT order_id, uid, sale_id, quantity FROM orders_{table} WHERE order_id IN ({marks})"
            );
            let rows = conn.rows(sql, &ids).await?;
            let mut stored = HashMap::with_capacity(rows.len());
            for row in &rows {
                stored.insert(row.text(0)?, (row.text(1)?, row.text(2)?, row.int(3)?));
            }
            for order in chunk {
                let Some((uid, sale, quantity)) = stored.get(&*order.order_id.to_string()) else {
                    return Err(Error::Row(format!("order {} is missing", order.order_id)));
                };
                let same = *uid == order.uid.as_str()
                    && *sale == order.sale_id.as_str()
                    && *quantity == i64::from(order.quantity.get());
                if !same {
                    let id = order.order_id;
                    found.push((*order, format!("order id {id} belongs to an order of sale {sale} already")));
                }
            }
        }
    }
    Ok(found)
}
