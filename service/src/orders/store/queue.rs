//! The queue of releases (units of closed orders on their way back to the ledger) and the marks by which the
//! outbox is trimmed.

use seckill_domain::{CenterId, Millis, OrderId, OutboxId, SaleId, Table};

use super::super::error::Error;
use super::positions::Positions;
use super::session::{Row, Value, values};
use super::writer::{Hub, Lane, Tx, Write};

/// Rows of one statement: six values each, and SQLite takes 32,766.
const CHUNK: usize = 500;

/// Forgets releases that the ledger answered.
pub(super) struct ReleasesDone {
    /// The last place of the queue that was read.
    pub(super) up_to: i64,
    pub(super) done: Vec<OrderId>,
    pub(super) unknown: Vec<OrderId>,
}

impl Write for ReleasesDone {
    type Output = ();

    fn lane(&self) -> Lane {
        Lane::Orders(1)
    }

    async fn run(&self, tx: &mut Tx<'_>) -> Result<(), Error> {
        for (orders, change) in
            [(&self.done, "DELETE FROM releases"), (&self.unknown, "UPDATE releases SET state = 'unknown'")]
        {
            // What was handed over meanwhile is its new owner's, who asks the ledger again.
            let own: Vec<OrderId> =
                orders.iter().copied().filter(|id| tx.owned.contains(id.table().shard())).collect();
            for chunk in own.chunks(CHUNK) {
                let mut values: Vec<Value<'_>> = vec![self.up_to.into()];
                values.extend(chunk.iter().map(|id| Value::from(id.to_string())));
                let marks = vec!["?"; chunk.len()].join(", ");
                tx.conn.execute(format!("{change} WHERE id <= ? AND order_id IN ({marks})"), &values).await?;
            }
        }
        Ok(())
    }

    fn committed(&self, (): &(), hub: &Hub) {
        hub.metrics.released.inc_by(self.done.len() as u64);
        hub.metrics.release_unknown.inc_by(self.unknown.len() as u64);
    }
}

/// Queues the releases of every closed order of a sale in one table again.
pub(super) struct Requeue {
    pub(super) sale_id: SaleId,
    pub(super) table: Table,
}

impl Write for Requeue {
    type Output = u64;

    fn lane(&self) -> Lane {
        Lane::Orders(1)
    }

    async fn run(&self, tx: &mut Tx<'_>) -> Result<u64, Error> {
        if !tx.owned.contains(self.table.shard()) {
            return Ok(0);
        }
        let table = self.table;
        // An order with a reason of its own was never known to the ledger: nothing to give back.
        let closed = tx
            .conn
            .rows(
                format!(
                    "SELECT order_id, uid, quantity, status FROM orders_{table}
                     WHERE sale_id = ? AND status IN ('cancelled', 'expired') AND reason IS NULL"
                ),
                values![self.sale_id.as_str()],
            )
            .await?;
        let read = |row: &Row| -> Result<Closed, Error> {
            Ok(Closed {
                order_id: row.text(0)?.to_owned(),
                uid: row.text(1)?.to_owned(),
                sale_id: self.sale_id.to_string(),
                quantity: row.int(2)?,
                reason: row.text(3)?.to_owned(),
            })
        };
        let closed: Vec<Closed> = closed.iter().map(read).collect::<Result<_, _>>()?;
        queue_again(tx, &closed).await?;
        Ok(closed.len() as u64)
    }

    fn committed(&self, _queued: &u64, _hub: &Hub) {}
}

/// A closed order whose release is to be queued.
pub(super) struct Closed {
    pub(super) order_id: String,
    pub(super) uid: String,
    pub(super) sale_id: String,
    pub(super) quantity: i64,
    /// `cancelled` or `expired`.
    pub(super) reason: String,
}

/// Puts releases at the end of the queue, wherever they were before: what the ledger answered to an earlier one, and is
/// on its way here, is not the answer to this one.
pub(super) async fn queue_again(tx: &mut Tx<'_>, closed: &[Closed]) -> Result<(), Error> {
    for chunk in closed.chunks(CHUNK) {
        let mut rows = Vec::with_capacity(chunk.len() * 6);
        let mut ids = Vec::with_capacity(chunk.len());
        for Closed { order_id, uid, sale_id, quantity, reason } in chunk {
            rows.extend_from_slice(values![order_id, uid, sale_id, *quantity, reason, tx.now.0]);
            ids.push(Value::from(order_id));
        }
        let marks = vec!["?"; chunk.len()].join(", ");
        tx.conn.execute(format!("DELETE FROM releases WHERE order_id IN ({marks})"), &ids).await?;
        let marks = vec!["(?, ?, ?, ?, ?, ?)"; chunk.len()].join(", ");
        let sql = format!(
            "INSERT INTO releases (order_id, uid, sale_id, quantity, reason, created_at) VALUES {marks}"
        );
        tx.conn.execute(sql, &rows).await?;
    }
    Ok(())
}

/// Notes the position of this moment; drops older marks, but keeps the newest of those before `before`.
pub(super) struct Mark {
    pub(super) partition: u8,
    pub(super) before: Millis,
    /// Where the other centers are, if there are any.
    pub(super) others: Option<OutboxId>,
    /// Whether this center has anything to store.
    pub(super) own_counts: bool,
    pub(super) center: CenterId,
}

impl Write for Mark {
    /// The newest mark at or before `before`.
    type Output = Option<OutboxId>;

    fn lane(&self) -> Lane {
        Lane::Orders(1)
    }

    async fn run(&self, tx: &mut Tx<'_>) -> Result<Option<OutboxId>, Error> {
        let position = match self.others {
            Some(others) if !self.own_counts => others,
            others => {
                let own = Positions::read(tx.conn, &self.center).await?.stored(self.partition);
                others.map_or(own, |others| own.min(others))
            }
        };
        if position > OutboxId::ZERO {
            let or_set = tx.conn.dialect().or_set("center, `partition`, at", "position");
            tx.conn
                .execute(
                    format!(
                        "INSERT INTO outbox_trim (center, `partition`, at, position) VALUES (?, ?, ?, ?) {or_set}"
                    ),
                    values![self.center.as_str(), self.partition, tx.now.0, position.to_string()],
                )
                .await?;
        }
        let newest = tx.conn.row("SELECT at, position FROM outbox_trim WHERE center = ? AND `partition` = ? AND at <= ? ORDER BY at DESC LIMIT 1", values![self.center.as_str(), self.partition, self.before.0])
        .await?;
        let Some(newest) = newest else { return Ok(None) };
        let (at, position) = (newest.int(0)?, newest.text(1)?.parse()?);
        tx.conn
            .execute(
                "DELETE FROM outbox_trim WHERE center = ? AND `partition` = ? AND at < ?",
                values![self.center.as_str(), self.partition, at],
            )
            .await?;
        Ok(Some(position))
    }

    fn committed(&self, _newest: &Option<OutboxId>, _hub: &Hub) {}
}
