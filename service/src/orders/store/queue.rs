//! The queue of releases (units of closed orders on their way back to the ledger) and the marks by which the
//! outbox is trimmed.

use seckill_domain::{CenterId, Millis, OrderId, OutboxId, SaleId, Table};
use sqlx::AssertSqlSafe;

use super::super::error::Error;
use super::positions::Positions;
use super::writer::{Hub, Tx, Write};

/// Forgets releases that the ledger answered.
pub(super) struct ReleasesDone {
    pub(super) done: Vec<OrderId>,
    pub(super) unknown: Vec<OrderId>,
}

impl Write for ReleasesDone {
    type Output = ();

    async fn run(&self, tx: &mut Tx<'_>) -> Result<(), Error> {
        for order_id in &self.done {
            sqlx::query("DELETE FROM releases WHERE order_id = ?")
                .bind(order_id.to_string())
                .execute(&mut *tx.conn)
                .await?;
        }
        for order_id in &self.unknown {
            sqlx::query("UPDATE releases SET state = 'unknown' WHERE order_id = ?")
                .bind(order_id.to_string())
                .execute(&mut *tx.conn)
                .await?;
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

    async fn run(&self, tx: &mut Tx<'_>) -> Result<u64, Error> {
        if !tx.owned.contains(self.table.shard()) {
            return Ok(0);
        }
        let table = self.table;
        // An order with a reason of its own was never known to the ledger: nothing to give back.
        let queued = sqlx::query(AssertSqlSafe(format!(
            "INSERT INTO releases (order_id, uid, sale_id, quantity, reason, created_at)
             SELECT order_id, uid, sale_id, quantity, status, ? FROM orders_{table}
             WHERE sale_id = ? AND status IN ('cancelled', 'expired') AND reason IS NULL
             ON CONFLICT (order_id) DO UPDATE SET state = 'pending'"
        )))
        .bind(tx.now.0)
        .bind(self.sale_id.as_str())
        .execute(&mut *tx.conn)
        .await?;
        Ok(queued.rows_affected())
    }

    fn committed(&self, _queued: &u64, _hub: &Hub) {}
}

/// Notes the position of this moment; drops older marks, but keeps the newest of those before `before`.
pub(super) struct Mark {
    pub(super) partition: u8,
    pub(super) before: Millis,
    pub(super) center: CenterId,
}

impl Write for Mark {
    /// The newest mark at or before `before`.
    type Output = Option<OutboxId>;

    async fn run(&self, tx: &mut Tx<'_>) -> Result<Option<OutboxId>, Error> {
        let position = Positions::read(tx.conn, &self.center).await?.stored(self.partition);
        if position > OutboxId::ZERO {
            sqlx::query(
                "INSERT INTO outbox_marks (partition, at, position) VALUES (?, ?, ?)
                 ON CONFLICT (partition, at) DO UPDATE SET position = excluded.position",
            )
            .bind(self.partition)
            .bind(tx.now.0)
            .bind(position.to_string())
            .execute(&mut *tx.conn)
            .await?;
        }
        let newest: Option<(i64, String)> = sqlx::query_as(
            "SELECT at, position FROM outbox_marks WHERE partition = ? AND at <= ? ORDER BY at DESC LIMIT 1",
        )
        .bind(self.partition)
        .bind(self.before.0)
        .fetch_optional(&mut *tx.conn)
        .await?;
        let Some((at, position)) = newest else { return Ok(None) };
        sqlx::query("DELETE FROM outbox_marks WHERE partition = ? AND at < ?")
            .bind(self.partition)
            .bind(at)
            .execute(&mut *tx.conn)
            .await?;
        Ok(Some(position.parse()?))
    }

    fn committed(&self, _newest: &Option<OutboxId>, _hub: &Hub) {}
}
