//! Storing orders in SQLite: the fast path of that database.
//!
//! A batch goes into a scratch table in memory, some hundred values a statement, and is copied from there by
//! statements that never change, eight tables a call. So the number of calls depends on neither the batch's size
//! nor on how its users spread over the tables. `docs/orders.md` has the figures.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use seckill_domain::{Millis, OrderId, OrderRecord, OrderStatus, SHARDS, SaleKind, Shard, TABLES};
use sqlx::AssertSqlSafe;
use sqlx::sqlite::SqliteConnection;

use super::super::error::Error;
use super::session::Connection;
use super::writer::Tx;

/// Rows of one insert into the scratch table: as many as fit, then the rest by smaller ones.
const ROWS: [usize; 3] = [64, 8, 1];
/// Places that a table has in the scratch table: more than a batch can have.
const PLACES: i64 = 1 << 32;
/// What the orders of one outbox entry have in common.
struct Common<'a> {
    order: &'a OrderRecord,
    free: bool,
}

/// Where each order of a batch goes.
struct Plan<'a> {
    commons: Vec<Common<'a>>,
    /// Place in the scratch table, order, number of what it has in common with others.
    rows: Vec<(i64, &'a OrderRecord, i64)>,
    /// The shards that get orders, a bit for each.
    shards: u64,
    /// The shards that get coupons.
    coupon_shards: u64,
}

impl<'a> Plan<'a> {
    fn of(orders: &[&'a OrderRecord]) -> Plan<'a> {
        let rows = Vec::with_capacity(orders.len());
        let mut plan = Plan { commons: Vec::new(), rows, shards: 0, coupon_shards: 0 };
        // Terms are told apart by address, because the orders of an entry share them.
        let mut known: HashMap<(usize, i64, &str), usize> = HashMap::new();
        let mut last: Option<(&OrderRecord, usize)> = None;
        let mut in_table = [0i64; TABLES as usize];
        for &order in orders {
            let common = match last {
                Some((other, common)) if same_entry(other, order) => common,
                _ => *known
                    .entry((Arc::as_ptr(&order.terms).addr(), order.accepted_at.0, order.sale_id.as_str()))
                    .or_insert_with(|| {
                        let free = order.initial_status() == OrderStatus::Paid;
                        plan.commons.push(Common { order, free });
                        plan.commons.len() - 1
                    }),
            };
            last = Some((order, common));
            let table = order.order_id.table();
            plan.shards |= 1 << table.shard().number();
            if order.terms.kind == SaleKind::Coupon {
                plan.coupon_shards |= 1 << table.shard().number();
            }
            let count = &mut in_table[usize::from(table.number())];
            plan.rows.push((i64::from(table.number()) * PLACES + *count, order, common as i64));
            *count += 1;
        }
        // In order of their places, the scratch table grows at its end.
        plan.rows.sort_unstable_by_key(|(place, _, _)| *place);
        plan
    }
}

pub(super) async fn insert(tx: &mut Tx<'_>, orders: &[&OrderRecord]) -> Result<u64, Error> {
    let (Connection::Sqlite(conn), false) = (tx.conn.connection(), orders.is_empty()) else {
        return Ok(0);
    };
    let plan = Plan::of(orders);
    for (number, common) in plan.commons.iter().enumerate() {
        stage_entry(conn, tx.now, number as i64, common).await?;
    }
    stage_rows(conn, &plan.rows).await?;
    let stored = run_for(conn, &COPY_ORDERS, plan.shards).await?;
    if plan.coupon_shards != 0 {
        run_for(conn, &COPY_COUPONS, plan.coupon_shards).await?;
    }
    if plan.commons.iter().any(|common| !common.free) {
        sqlx::query(
            "INSERT INTO expiries (expires_at, order_id)
             SELECT e.expires_at, CAST(s.order_id AS TEXT) FROM temp.staged s CROSS JOIN temp.entries e
             WHERE e.entry = s.entry AND e.status = 'created' ON CONFLICT DO NOTHING",
        )
        .execute(&mut *conn)
        .await?;
    }
    sqlx::query("DELETE FROM temp.staged").execute(&mut *conn).await?;
    sqlx::query("DELETE FROM temp.entries").execute(&mut *conn).await?;
    Ok(stored)
}

fn same_entry(one: &OrderRecord, other: &OrderRecord) -> bool {
    Arc::ptr_eq(&one.terms, &other.terms)
        && one.accepted_at == other.accepted_at
        && one.sale_id == other.sale_id
}

async fn stage_entry(
    conn: &mut SqliteConnection,
    now: Millis,
    number: i64,
    common: &Common<'_>,
) -> Result<(), Error> {
    let Common { order, free } = common;
    let terms = &order.terms;
    let coupon = terms.coupon.as_ref();
    let status = if *free { OrderStatus::Paid } else { OrderStatus::Created };
    sqlx::query("INSERT INTO temp.entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)")
        .bind(number)
        .bind(order.sale_id.as_str())
        .bind(terms.kind.as_str())
        .bind(terms.unit_price.minor_units())
        .bind(terms.currency.as_str())
        .bind(status.as_str())
        .bind(order.accepted_at.0)
        .bind(now.0)
        .bind(now.plus_s(terms.payment_ttl_s).0)
        .bind(coupon.map(|coupon| coupon.discount.minor_units()))
        .bind(coupon.map(|coupon| coupon.min_amount.minor_units()))
        .bind(coupon.map(|coupon| coupon.valid_until.0))
        .execute(&mut *conn)
        .await?;
    Ok(())
}

static STAGE: LazyLock<[Arc<str>; 3]> = LazyLock::new(|| {
    ROWS.map(|rows| {
        let values = vec!["(?, ?, ?, ?, ?)"; rows].join(", ");
        Arc::from(format!("INSERT INTO temp.staged (place, order_id, uid, quantity, entry) VALUES {values}"))
    })
});

async fn stage_rows(conn: &mut SqliteConnection, mut rows: &[(i64, &OrderRecord, i64)]) -> Result<(), Error> {
    for (size, sql) in ROWS.iter().zip(STAGE.iter()) {
        while rows.len() >= *size {
            let (now, later) = rows.split_at(*size);
            let mut query = sqlx::query(AssertSqlSafe(Arc::clone(sql)));
            for (place, order, common) in now {
                query = query
                    .bind(place)
                    .bind(signed(order.order_id))
                    .bind(order.uid.as_str())
                    .bind(i64::from(order.quantity.get()))
                    .bind(common);
            }
            query.execute(&mut *conn).await?;
            rows = later;
        }
    }
    Ok(())
}

/// An order id begins with a digit from 1 to 8, so it fits.
fn signed(order_id: OrderId) -> i64 {
    order_id.number().cast_signed()
}

/// For each shard the statements that copy its eight tables.
type PerShard = [Arc<str>; SHARDS as usize];

static COPY_ORDERS: LazyLock<PerShard> = LazyLock::new(|| {
    per_shard(
        "INSERT INTO orders_TABLE (order_id, uid, sale_id, kind, quantity, unit_price, currency, amount, status,
           accepted_at, created_at, expires_at, paid_at, paid_amount)
         SELECT CAST(s.order_id AS TEXT), s.uid, e.sale_id, e.kind, s.quantity, e.unit_price, e.currency,
           e.unit_price * s.quantity, e.status, e.accepted_at, e.created_at, e.expires_at,
           iif(e.status = 'paid', e.created_at, NULL), iif(e.status = 'paid', 0, NULL)
         FROM temp.staged s CROSS JOIN temp.entries e
         WHERE s.place BETWEEN FIRST AND LAST AND e.entry = s.entry
         ON CONFLICT (order_id) DO NOTHING;",
    )
});

static COPY_COUPONS: LazyLock<PerShard> = LazyLock::new(|| {
    per_shard(
        "INSERT INTO coupons_TABLE (coupon_id, uid, sale_id, discount, min_amount, currency, valid_until, state,
           created_at)
         SELECT CAST(s.order_id AS TEXT), s.uid, e.sale_id, e.discount, e.min_amount, e.currency, e.valid_until,
           iif(e.status = 'paid', 'granted', 'pending'), e.created_at
         FROM temp.staged s CROSS JOIN temp.entries e
         WHERE s.place BETWEEN FIRST AND LAST AND e.entry = s.entry AND e.discount IS NOT NULL
         ON CONFLICT (coupon_id) DO NOTHING;",
    )
});

fn per_shard(template: &str) -> PerShard {
    std::array::from_fn(|number| {
        let shard = Shard::new(number as u8).unwrap_or_else(|| unreachable!("one of the shards"));
        let text: String = shard
            .tables()
            .map(|table| {
                let first = i64::from(table.number()) * PLACES;
                template
                    .replace("TABLE", &table.to_string())
                    .replace("FIRST", &first.to_string())
                    .replace("LAST", &(first + PLACES - 1).to_string())
            })
            .collect();
        Arc::from(text)
    })
}

/// Runs the statements of some shards; returns how many rows they wrote.
async fn run_for(conn: &mut SqliteConnection, statements: &PerShard, shards: u64) -> Result<u64, Error> {
    let mut written = 0;
    for (number, sql) in statements.iter().enumerate() {
        if shards & (1 << number) != 0 {
            let done = sqlx::query(AssertSqlSafe(Arc::clone(sql))).execute(&mut *conn).await?;
            written += done.rows_affected();
        }
    }
    Ok(written)
}
