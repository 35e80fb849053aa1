//! Orders of a saved tail: stored if they are missing, cancelled if their claim is lost, released if it is not wanted.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use seckill_domain::{CouponState, OrderId, OrderRecord, OrderStatus, SaleKind, Table};

use super::super::error::Error;
use super::super::model::AdminOrder;
use super::super::put_back::{ACCEPTED_LOSS, PutBack, PutBackDone};
use super::insert;
use super::lifecycle::{change_coupon, exactly_one, set_closed};
use super::queue::{Closed, queue_again};
use super::read::{self, parse_order_id};
use super::session::{Session, Value, values};
use super::writer::{Hub, Lane, Tx, Write};

/// Orders looked up in one query; SQLite takes at least 999 parameters.
const LOOKUP: usize = 500;

/// Puts orders of a tail right.
pub(super) struct Restore(pub(super) PutBack);

/// How they stand, and which of them were changed.
pub(super) struct Restored {
    pub(super) done: PutBackDone,
    cancelled: u64,
}

impl Write for Restore {
    type Output = Restored;

    fn lane(&self) -> Lane {
        Lane::Orders(0)
    }

    async fn run(&self, tx: &mut Tx<'_>) -> Result<Restored, Error> {
        let call = &self.0;
        // A shard that is not this center's any more has a home elsewhere: whoever asks looks again where.
        for order_id in call.orders() {
            tx.owned.check(order_id.table().shard())?;
        }
        let missing = missing(tx.conn, &call.records).await?;
        let inserted = insert::insert(tx, &missing).await?;
        let missing: HashSet<OrderId> = missing.iter().map(|record| record.order_id).collect();
        let mut done = PutBackDone { inserted, ..PutBackDone::default() };
        let mut cancelled = 0;
        for order_id in in_order(&call.lost) {
            let Some(found) = find(tx.conn, order_id).await? else { continue };
            match found.order.status {
                OrderStatus::Created => {
                    set_closed(tx, order_id, "cancelled", Some(ACCEPTED_LOSS)).await?;
                    void(tx, &found, CouponState::Pending).await?;
                }
                // It costs nothing and was stored in this very transaction: nobody has it, and nobody paid for it.
                OrderStatus::Paid if missing.contains(&order_id) && found.order.paid_at == Some(tx.now) => {
                    withdraw(tx, &found).await?;
                }
                OrderStatus::Paid => {
                    done.paid_without_claim.push(order_id);
                    continue;
                }
                OrderStatus::Cancelled | OrderStatus::Expired => {
                    done.cancelled += u64::from(found.reason.as_deref() == Some(ACCEPTED_LOSS));
                    continue;
                }
            }
            done.cancelled += 1;
            cancelled += 1;
        }
        // A claim that came after the order was closed is nobody's.
        let mut closed = Vec::new();
        for order_id in in_order(call.held.iter().chain(&call.released)) {
            let Some(found) = find(tx.conn, order_id).await? else { continue };
            match found.order.status {
                OrderStatus::Created | OrderStatus::Paid => {}
                OrderStatus::Cancelled | OrderStatus::Expired => closed.push(Closed {
                    order_id: order_id.to_string(),
                    uid: found.uid.to_string(),
                    sale_id: found.order.sale_id.to_string(),
                    quantity: i64::from(found.order.quantity.get()),
                    reason: found.order.status.as_str().to_owned(),
                }),
            }
        }
        queue_again(tx, &closed).await?;
        done.released_again = closed.len() as u64;
        Ok(Restored { done, cancelled })
    }

    fn committed(&self, restored: &Restored, hub: &Hub) {
        hub.metrics.stored.inc_by(restored.done.inserted);
        hub.metrics.put_back.inc_by(restored.done.inserted);
        hub.metrics.accepted_loss.inc_by(restored.cancelled);
        hub.updates.notify(self.0.orders());
    }
}

/// Two calls that meet wait for each other in the same order.
fn in_order<'a>(orders: impl IntoIterator<Item = &'a OrderId>) -> BTreeSet<OrderId> {
    orders.into_iter().copied().collect()
}

/// Those records whose order is not stored.
async fn missing<'r>(conn: &mut Session, records: &'r [OrderRecord]) -> Result<Vec<&'r OrderRecord>, Error> {
    let mut by_table: BTreeMap<Table, Vec<&OrderRecord>> = BTreeMap::new();
    for record in records {
        by_table.entry(record.order_id.table()).or_default().push(record);
    }
    let mut missing = Vec::new();
    for (table, records) in by_table {
        for chunk in records.chunks(LOOKUP) {
            let ids: Vec<Value<'_>> =
                chunk.iter().map(|record| Value::from(record.order_id.to_string())).collect();
            let marks = vec!["?"; ids.len()].join(", ");
            let sql =
                format!("SELECT order_id, uid, sale_id FROM orders_{table} WHERE order_id IN ({marks})");
            let rows = conn.rows(sql, &ids).await?;
            let mut stored = HashMap::with_capacity(rows.len());
            for row in &rows {
                stored.insert(parse_order_id(row.text(0)?)?, (row.text(1)?, row.text(2)?));
            }
            for record in chunk {
                match stored.get(&record.order_id) {
                    None => missing.push(*record),
                    Some((uid, sale)) if *uid == record.uid.as_str() && *sale == record.sale_id.as_str() => {}
                    // What happened to the one would be done to the other.
                    Some((_, sale)) => {
                        let id = record.order_id;
                        return Err(Error::Row(format!("{id} is an order of sale {sale} already")));
                    }
                }
            }
        }
    }
    Ok(missing)
}

async fn find(conn: &mut Session, order_id: OrderId) -> Result<Option<AdminOrder>, Error> {
    let lock = conn.dialect().for_update();
    read::admin_order_with(conn, order_id, lock).await
}

/// Cancels an order that costs nothing, and so was stored as paid.
async fn withdraw(tx: &mut Tx<'_>, found: &AdminOrder) -> Result<(), Error> {
    let order_id = found.order.order_id;
    let table = order_id.table();
    let closed = tx
        .conn
        .execute(
            format!(
                "UPDATE orders_{table} SET status = 'cancelled', closed_at = ?, reason = ?, paid_at = NULL,
                 paid_amount = NULL WHERE order_id = ? AND status = 'paid'"
            ),
            values![tx.now.0, ACCEPTED_LOSS, order_id.to_string()],
        )
        .await?;
    exactly_one(closed, "order")?;
    void(tx, found, CouponState::Granted).await
}

/// The coupon of a purchase that is no more.
async fn void(tx: &mut Tx<'_>, found: &AdminOrder, from: CouponState) -> Result<(), Error> {
    match found.order.kind {
        SaleKind::Coupon => change_coupon(tx.conn, found.order.order_id, from, CouponState::Void).await,
        SaleKind::Product => Ok(()),
    }
}
