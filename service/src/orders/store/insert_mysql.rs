//! Storing orders in MySQL or MariaDB: the fast path of that database.
//!
//! A batch of some thousand orders touches most of the 512 tables, so it is some hundred inserts of a few rows each.
//! They are sent as text, many statements in one packet: prepared, each would be a round trip of its own, and a
//! prepared statement for each table would use up what the server allows of them. `docs/orders.md` has the figures.
//!
//! Values written into the text are numbers, words of our own, ids of digits, and the rest as hexadecimal digits, so
//! nothing in it can end a literal.

use std::fmt::Write as _;

use seckill_domain::{OrderRecord, OrderStatus};

use super::super::error::Error;
use super::writer::Tx;

/// Statements are sent when they are this long together: well below `max_allowed_packet`, whose default is 16 MiB
/// with MariaDB and 64 MiB with MySQL.
const PACKET_BYTES: usize = 1 << 20;

const ORDERS: &str = "order_id, uid, sale_id, kind, quantity, unit_price, currency, amount, status, \
    accepted_at, created_at, expires_at, paid_at, paid_amount";
const COUPONS: &str =
    "coupon_id, uid, sale_id, discount, min_amount, currency, valid_until, state, created_at";

/// Stores orders; returns how many are new. `IGNORE` passes over those whose id is there already; every value was
/// checked when it was parsed, so there is nothing else that it could pass over.
pub(super) async fn insert(tx: &mut Tx<'_>, orders: &[&OrderRecord]) -> Result<u64, Error> {
    let mut sorted = orders.to_vec();
    // In the order of tables and ids, two batches that meet wait for each other in the same order.
    sorted.sort_unstable_by_key(|order| (order.order_id.table(), order.order_id));
    let mut packet = Packet::default();
    for rows in sorted.chunk_by(|one, other| one.order_id.table() == other.order_id.table()) {
        let Some(first) = rows.first() else { continue };
        let table = first.order_id.table();
        packet.begin(format_args!("orders_{table} ({ORDERS})"));
        for order in rows {
            packet.row(|sql| order_row(sql, order, tx));
        }
        packet.send_if_long(tx).await?;
    }
    let stored = packet.send(tx).await?;

    let mut packet = Packet::default();
    for rows in sorted.chunk_by(|one, other| one.order_id.table() == other.order_id.table()) {
        let mut begun = false;
        for order in rows {
            if order.terms.coupon.is_none() {
                continue;
            }
            if !begun {
                packet.begin(format_args!("coupons_{} ({COUPONS})", order.order_id.table()));
                begun = true;
            }
            packet.row(|sql| coupon_row(sql, order, tx));
        }
        packet.send_if_long(tx).await?;
    }
    let mut open: Vec<(i64, &OrderRecord)> = Vec::with_capacity(sorted.len());
    for &order in &sorted {
        if order.initial_status() == OrderStatus::Created {
            open.push((tx.now.plus_s(order.terms.payment_ttl_s).0, order));
        }
    }
    open.sort_unstable_by_key(|(at, order)| (*at, order.order_id));
    for rows in open.chunks(4096) {
        packet.begin(format_args!("expiries (expires_at, order_id)"));
        for (at, order) in rows {
            packet.row(|sql| write!(sql, "{at},'{}'", order.order_id));
        }
        packet.send_if_long(tx).await?;
    }
    packet.send(tx).await?;
    Ok(stored)
}

fn order_row(sql: &mut String, order: &OrderRecord, tx: &Tx<'_>) -> std::fmt::Result {
    let terms = &order.terms;
    let free = order.initial_status() == OrderStatus::Paid;
    write!(sql, "'{}',", order.order_id)?;
    text(sql, order.uid.as_str())?;
    sql.push(',');
    text(sql, order.sale_id.as_str())?;
    write!(
        sql,
        ",'{}',{quantity},{price},'{}',{},'{}',{},{now},{},",
        terms.kind.as_str(),
        terms.currency.as_str(),
        order.amount().minor_units(),
        order.initial_status().as_str(),
        order.accepted_at.0,
        tx.now.plus_s(terms.payment_ttl_s).0,
        quantity = order.quantity.get(),
        price = terms.unit_price.minor_units(),
        now = tx.now.0,
    )?;
    if free { write!(sql, "{},0", tx.now.0) } else { write!(sql, "NULL,NULL") }
}

fn coupon_row(sql: &mut String, order: &OrderRecord, tx: &Tx<'_>) -> std::fmt::Result {
    let Some(coupon) = &order.terms.coupon else { return Err(std::fmt::Error) };
    let state = if order.initial_status() == OrderStatus::Paid { "granted" } else { "pending" };
    write!(sql, "'{}',", order.order_id)?;
    text(sql, order.uid.as_str())?;
    sql.push(',');
    text(sql, order.sale_id.as_str())?;
    write!(
        sql,
        ",{},{},'{}',{},'{state}',{}",
        coupon.discount.minor_units(),
        coupon.min_amount.minor_units(),
        order.terms.currency.as_str(),
        coupon.valid_until.0,
        tx.now.0,
    )
}

/// A text as hexadecimal digits.
fn text(sql: &mut String, text: &str) -> std::fmt::Result {
    sql.push_str("x'");
    for byte in text.bytes() {
        write!(sql, "{byte:02x}")?;
    }
    sql.push('\'');
    Ok(())
}

/// Inserts on their way.
#[derive(Default)]
struct Packet {
    sql: String,
    first_row: bool,
    written: u64,
}

impl Packet {
    fn begin(&mut self, into: std::fmt::Arguments<'_>) {
        if !self.sql.is_empty() {
            self.sql.push(';');
        }
        self.first_row = true;
        // Writing to a text does not fail.
        let _ = write!(self.sql, "INSERT IGNORE INTO {into} VALUES ");
    }

    fn row(&mut self, values: impl FnOnce(&mut String) -> std::fmt::Result) {
        self.sql.push_str(if self.first_row { "(" } else { ",(" });
        self.first_row = false;
        let _ = values(&mut self.sql);
        self.sql.push(')');
    }

    async fn send_if_long(&mut self, tx: &mut Tx<'_>) -> Result<(), Error> {
        if self.sql.len() >= PACKET_BYTES {
            self.flush(tx).await?;
        }
        Ok(())
    }

    async fn flush(&mut self, tx: &mut Tx<'_>) -> Result<(), Error> {
        if !self.sql.is_empty() {
            self.written += tx.conn.run(std::mem::take(&mut self.sql)).await?;
        }
        Ok(())
    }

    /// Sends what is left; returns how many rows were written since the beginning.
    async fn send(mut self, tx: &mut Tx<'_>) -> Result<u64, Error> {
        self.flush(tx).await?;
        Ok(self.written)
    }
}
