//! What becomes of a stored order. Every transition is an `UPDATE … WHERE status = …` that says whether it
//! happened; what belongs to it (release, coupon, payment, refund) is written in the same transaction.

use seckill_domain::{CouponState, Millis, OrderId, OrderStatus, SaleKind, Uid};

use super::super::error::Error;
use super::super::model::{
    CancelOutcome, Coupon, ExpireOutcome, Order, PayOutcome, Payment, Refund, ReleaseReason,
};
use super::read::{self, ORDER, order_from, parse_order_id};
use super::session::{Session, values};
use super::writer::{Hub, Lane, Tx, Write};

/// Books a payment.
pub(super) struct Pay(pub(super) Payment);

impl Write for Pay {
    type Output = PayOutcome;

    fn lane(&self) -> Lane {
        Lane::Orders(self.0.order_id.table().number())
    }

    async fn run(&self, tx: &mut Tx<'_>) -> Result<PayOutcome, Error> {
        let payment = &self.0;
        tx.owned.check(payment.order_id.table().shard())?;
        // The order first: whoever pays or closes it at the same time waits for its row.
        let order = find(tx.conn, payment.order_id).await?;
        let before = earlier_payment(tx.conn, payment).await?;
        if matches!(before, Some(Earlier::Other)) {
            return Ok(PayOutcome::PaymentIdReused);
        }
        let Some(order) = order else { return Ok(PayOutcome::NotFound) };
        match before {
            Some(Earlier::Paid) => return Ok(PayOutcome::Replay(order)),
            Some(Earlier::Refunded(refund)) => return Ok(PayOutcome::Closed { order, refund }),
            Some(Earlier::Other) | None => {}
        }
        if order.status != OrderStatus::Created {
            let refund = record_refund(tx, payment, &order).await?;
            return Ok(PayOutcome::Closed { order, refund });
        }
        let discount = match payment.coupon_id {
            None => seckill_domain::Money::ZERO,
            Some(coupon_id) => match usable_coupon(tx, coupon_id, &order).await? {
                Ok(coupon) => coupon.discount,
                Err(reason) => return Ok(PayOutcome::CouponUnusable { reason }),
            },
        };
        let due = order.amount.less(discount);
        if payment.amount != due {
            return Ok(PayOutcome::AmountMismatch { due });
        }
        self.book(tx, &order).await?;
        find(tx.conn, payment.order_id)
            .await?
            .map(PayOutcome::Paid)
            .ok_or_else(|| Error::Row(format!("order {} is gone", payment.order_id)))
    }

    fn committed(&self, outcome: &PayOutcome, hub: &Hub) {
        match outcome {
            PayOutcome::Paid(order) => {
                hub.metrics.paid.inc();
                hub.updates.notify([order.order_id]);
            }
            PayOutcome::Closed { .. } => {
                hub.metrics.refunds.inc();
            }
            PayOutcome::Replay(_)
            | PayOutcome::AmountMismatch { .. }
            | PayOutcome::CouponUnusable { .. }
            | PayOutcome::PaymentIdReused
            | PayOutcome::NotFound => {}
        }
    }
}

impl Pay {
    /// Everything was checked in this transaction, so each statement changes exactly one row; if not, nothing of
    /// it counts.
    async fn book(&self, tx: &mut Tx<'_>, order: &Order) -> Result<(), Error> {
        let payment = &self.0;
        let table = order.order_id.table();
        let order_id = order.order_id.to_string();
        let coupon_id = payment.coupon_id.map(|id| id.to_string());
        if let Some(coupon_id) = &coupon_id {
            let used = tx
                .conn
                .execute(
                    format!(
                        "UPDATE coupons_{table} SET state = 'redeemed', redeemed_by = ?
                 WHERE coupon_id = ? AND state = 'granted'"
                    ),
                    values![order_id.as_str(), coupon_id.as_str()],
                )
                .await?;
            exactly_one(used, "coupon")?;
        }
        let paid = tx
            .conn
            .execute(
                format!(
                    "UPDATE orders_{table} SET status = 'paid', paid_at = ?, paid_amount = ?, coupon_id = ?
             WHERE order_id = ? AND status = 'created'"
                ),
                values![tx.now.0, payment.amount.minor_units(), coupon_id.as_deref(), order_id.as_str()],
            )
            .await?;
        exactly_one(paid, "order")?;
        if order.kind == SaleKind::Coupon {
            change_coupon(tx.conn, order.order_id, CouponState::Pending, CouponState::Granted).await?;
        }
        record_payment(tx, payment, "paid").await
    }
}

pub(super) fn exactly_one(rows: u64, what: &str) -> Result<(), Error> {
    if rows == 1 { Ok(()) } else { Err(Error::Row(format!("{rows} rows of one {what} changed"))) }
}

/// What a payment id stands for already.
enum Earlier {
    Paid,
    Refunded(Refund),
    Other,
}

async fn earlier_payment(conn: &mut Session, payment: &Payment) -> Result<Option<Earlier>, Error> {
    // Two centers whose databases replicate each other may each have booked the same id before they heard of it.
    let rows = conn
        .rows(
            "SELECT order_id, amount, coupon_id, outcome FROM payments WHERE payment_id = ?",
            values![payment.payment_id.as_str()],
        )
        .await?;
    let Some(mut row) = rows.first() else { return Ok(None) };
    for other in &rows {
        if parse_order_id(other.text(0)?)? == payment.order_id {
            row = other;
        }
    }
    let order_id = parse_order_id(row.text(0)?)?;
    let amount = row.int(1)?;
    let coupon_id = row.opt_text(2)?.map(parse_order_id).transpose()?;
    if order_id != payment.order_id
        || amount != payment.amount.minor_units()
        || coupon_id != payment.coupon_id
    {
        return Ok(Some(Earlier::Other));
    }
    if row.text(3)? == "paid" {
        return Ok(Some(Earlier::Paid));
    }
    let refund = conn
        .one(
            format!("SELECT {} FROM refunds WHERE payment_id = ? AND order_id = ?", read::refund_columns()),
            values![payment.payment_id.as_str(), order_id.to_string()],
        )
        .await?;
    Ok(Some(Earlier::Refunded(read::refund_from(&refund)?)))
}

async fn record_payment(tx: &mut Tx<'_>, payment: &Payment, outcome: &str) -> Result<(), Error> {
    tx.conn
        .execute(
            "INSERT INTO payments (payment_id, order_id, amount, coupon_id, outcome, created_at, center)
         VALUES (?, ?, ?, ?, ?, ?, ?)",
            values![
                payment.payment_id.as_str(),
                payment.order_id.to_string(),
                payment.amount.minor_units(),
                payment.coupon_id.map(|id| id.to_string()),
                outcome,
                tx.now.0,
                tx.center.as_str()
            ],
        )
        .await?;
    Ok(())
}

async fn record_refund(tx: &mut Tx<'_>, payment: &Payment, order: &Order) -> Result<Refund, Error> {
    record_payment(tx, payment, "refund").await?;
    tx.conn.execute("INSERT INTO refunds (payment_id, order_id, uid, sale_id, amount, currency, order_status, created_at, center)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values![payment.payment_id.as_str(), order.order_id.to_string(), order.uid.as_str(), order.sale_id.as_str(), payment.amount.minor_units(), order.currency.as_str(), order.status.as_str(), tx.now.0, tx.center.as_str()])
    .await?;
    Ok(Refund {
        payment_id: payment.payment_id.clone(),
        order_id: order.order_id,
        uid: order.uid.clone(),
        sale_id: order.sale_id.clone(),
        amount: payment.amount,
        currency: order.currency,
        order_status: order.status,
        created_at: tx.now,
    })
}

async fn usable_coupon(
    tx: &mut Tx<'_>,
    coupon_id: OrderId,
    order: &Order,
) -> Result<Result<Coupon, &'static str>, Error> {
    const NONE: &str = "the buyer has no such coupon";
    let table = coupon_id.table();
    if table != order.order_id.table() {
        // Another user's for certain, and perhaps in a shard that is not ours.
        return Ok(Err(NONE));
    }
    let columns = read::coupon_columns();
    let lock = tx.conn.dialect().for_update();
    let row = tx
        .conn
        .row(
            format!("SELECT {columns} FROM coupons_{table} WHERE coupon_id = ?{lock}"),
            values![coupon_id.to_string()],
        )
        .await?;
    let Some(coupon) = row.map(|row| read::coupon_from(&row)).transpose()? else { return Ok(Err(NONE)) };
    Ok(if coupon.uid != order.uid {
        Err(NONE)
    } else if coupon.state != CouponState::Granted {
        Err(match coupon.state {
            CouponState::Redeemed => "the coupon is used",
            CouponState::Pending => "the coupon is not paid",
            CouponState::Void | CouponState::Granted => "the coupon is void",
        })
    } else if tx.now > coupon.valid_until {
        Err("the coupon is no longer valid")
    } else if coupon.currency != order.currency {
        Err("the coupon is of another currency")
    } else if order.amount < coupon.min_amount {
        Err("the order costs too little for the coupon")
    } else {
        Ok(coupon)
    })
}

/// Cancels an order for its buyer.
pub(super) struct Cancel {
    pub(super) uid: Uid,
    pub(super) order_id: OrderId,
}

impl Write for Cancel {
    type Output = CancelOutcome;

    fn lane(&self) -> Lane {
        Lane::Orders(self.order_id.table().number())
    }

    async fn run(&self, tx: &mut Tx<'_>) -> Result<CancelOutcome, Error> {
        tx.owned.check(self.order_id.table().shard())?;
        let order = find(tx.conn, self.order_id).await?.filter(|order| order.uid == self.uid);
        let Some(order) = order else { return Ok(CancelOutcome::NotFound) };
        match order.status {
            OrderStatus::Created => {}
            OrderStatus::Cancelled => return Ok(CancelOutcome::Already(order)),
            OrderStatus::Paid | OrderStatus::Expired => return Ok(CancelOutcome::Closed(order)),
        }
        close(tx, &order, ReleaseReason::Cancelled).await?;
        let order = Order { status: OrderStatus::Cancelled, closed_at: Some(tx.now), ..order };
        Ok(CancelOutcome::Cancelled(order))
    }

    fn committed(&self, outcome: &CancelOutcome, hub: &Hub) {
        if let CancelOutcome::Cancelled(order) = outcome {
            hub.metrics.cancelled.inc();
            hub.updates.notify([order.order_id]);
        }
    }
}

/// Lets orders expire that came due in `(after, until]`.
pub(super) struct Expire {
    pub(super) after: Option<Millis>,
    pub(super) until: Millis,
    pub(super) limit: u32,
}

/// Orders that a round of expiry changed.
pub(super) struct Expired {
    pub(super) outcome: ExpireOutcome,
    orders: Vec<OrderId>,
}

impl Write for Expire {
    type Output = Expired;

    fn lane(&self) -> Lane {
        Lane::Orders(0)
    }

    async fn run(&self, tx: &mut Tx<'_>) -> Result<Expired, Error> {
        let after = self.after.map_or(i64::MIN, |after| after.0);
        // A shard that was handed over is its new owner's to expire.
        let own = tx.owned.condition("order_id");
        let due = tx
            .conn
            .rows(
                format!(
                    "SELECT order_id, expires_at FROM expiries WHERE expires_at > ? AND expires_at <= ?{own}
             ORDER BY expires_at, order_id LIMIT ?"
                ),
                values![after, self.until.0, self.limit],
            )
            .await?;
        let mut orders = Vec::new();
        for row in &due {
            let order_id = parse_order_id(row.text(0)?)?;
            let order = match find(tx.conn, order_id).await {
                Ok(Some(order)) => order,
                Ok(None) => continue,
                // One bad row must not keep the others from expiring.
                Err(Error::Row(error)) => {
                    tracing::error!(%order_id, error, "an order that cannot be read does not expire");
                    continue;
                }
                Err(error) => return Err(error),
            };
            if order.status == OrderStatus::Created && order.expires_at <= self.until {
                close(tx, &order, ReleaseReason::Expired).await?;
                orders.push(order_id);
            }
        }
        if let Some(last) = due.last() {
            let (id, at) = (last.text(0)?, last.int(1)?);
            tx.conn.execute(format!("DELETE FROM expiries WHERE expires_at > ? AND expires_at <= ? AND (expires_at, order_id) <= (?, ?){own}"), values![after, at, at, id])
                .await?;
        }
        let outcome = ExpireOutcome { expired: orders.len() as u64, more: due.len() == self.limit as usize };
        Ok(Expired { outcome, orders })
    }

    fn committed(&self, expired: &Expired, hub: &Hub) {
        hub.metrics.expired.inc_by(expired.outcome.expired);
        hub.updates.notify(expired.orders.iter().copied());
    }
}

/// Closes an order that is `created`: its state, the release of its units and its coupon together.
async fn close(tx: &mut Tx<'_>, order: &Order, reason: ReleaseReason) -> Result<(), Error> {
    set_closed(tx, order.order_id, reason.as_str(), None).await?;
    let insert = tx.conn.dialect().insert_new();
    tx.conn.execute(format!("{insert} releases (order_id, uid, sale_id, quantity, reason, created_at) VALUES (?, ?, ?, ?, ?, ?)"), values![order.order_id.to_string(), order.uid.as_str(), order.sale_id.as_str(), i64::from(order.quantity.get()), reason.as_str(), tx.now.0])
    .await?;
    if order.kind == SaleKind::Coupon {
        change_coupon(tx.conn, order.order_id, CouponState::Pending, CouponState::Void).await?;
    }
    Ok(())
}

pub(super) async fn set_closed(
    tx: &mut Tx<'_>,
    order_id: OrderId,
    status: &str,
    reason: Option<&str>,
) -> Result<(), Error> {
    let table = order_id.table();
    let closed = tx
        .conn
        .execute(
            format!(
                "UPDATE orders_{table} SET status = ?, closed_at = ?, reason = ?
         WHERE order_id = ? AND status = 'created'"
            ),
            values![status, tx.now.0, reason, order_id.to_string()],
        )
        .await?;
    exactly_one(closed, "order")
}

/// Moves the coupon of an order from one state to another, if that is the one it is in.
pub(super) async fn change_coupon(
    conn: &mut Session,
    order_id: OrderId,
    from: CouponState,
    to: CouponState,
) -> Result<(), Error> {
    let table = order_id.table();
    conn.execute(
        format!("UPDATE coupons_{table} SET state = ? WHERE coupon_id = ? AND state = ?"),
        values![to.as_str(), order_id.to_string(), from.as_str()],
    )
    .await?;
    Ok(())
}

async fn find(conn: &mut Session, order_id: OrderId) -> Result<Option<Order>, Error> {
    let table = order_id.table();
    let lock = conn.dialect().for_update();
    conn.row(
        format!("SELECT {ORDER} FROM orders_{table} WHERE order_id = ?{lock}"),
        values![order_id.to_string()],
    )
    .await?
    .map(|row| order_from(&row))
    .transpose()
}

/// Cancels orders that the ledger does not know and could not claim again. There is nothing to release.
pub(super) struct CancelLost {
    pub(super) orders: Vec<OrderId>,
    pub(super) reason: String,
}

impl Write for CancelLost {
    type Output = Vec<OrderId>;

    fn lane(&self) -> Lane {
        Lane::Orders(0)
    }

    async fn run(&self, tx: &mut Tx<'_>) -> Result<Vec<OrderId>, Error> {
        let mut cancelled = Vec::new();
        for order_id in &self.orders {
            // A copy of another center's order is that center's to cancel.
            if !tx.owned.contains(order_id.table().shard()) {
                continue;
            }
            let Some(order) = find(tx.conn, *order_id).await? else { continue };
            if order.status != OrderStatus::Created {
                continue;
            }
            set_closed(tx, order.order_id, "cancelled", Some(&self.reason)).await?;
            if order.kind == SaleKind::Coupon {
                change_coupon(tx.conn, order.order_id, CouponState::Pending, CouponState::Void).await?;
            }
            cancelled.push(*order_id);
        }
        Ok(cancelled)
    }

    fn committed(&self, cancelled: &Vec<OrderId>, hub: &Hub) {
        hub.metrics.accepted_loss.inc_by(cancelled.len() as u64);
        hub.updates.notify(cancelled.iter().copied());
    }
}
