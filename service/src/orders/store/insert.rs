//! Storing what the outbox holds: the fast path of the database.
//!
//! A batch goes into a scratch table in memory, some hundred values a statement, and is copied from there by
//! statements that never change, eight tables a call. So the number of calls depends on neither the batch's size
//! nor on how its users spread over the tables. `docs/orders.md` has the figures.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use seckill_domain::{OrderId, OrderRecord, OrderStatus, OutboxId, SHARDS, SaleKind, Shard, TABLES};
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Row};

use super::super::batch::{Advance, Origin, StoreBatch, StoreOutcome, Unreadable};
use super::super::error::Error;
use super::positions;
use super::writer::{Hub, Tx, Write};

/// Rows of one insert into the scratch table: as many as fit, then the rest by smaller ones.
const ROWS: [usize; 3] = [64, 8, 1];
/// Places that a table has in the scratch table: more than a batch can have.
const PLACES: i64 = 1 << 32;
/// What is kept of the raw content of an entry that cannot be stored, bytes.
const RAW_BYTES: usize = 256 * 1024;

/// A batch of the queues.
pub(super) struct Store(pub(super) StoreBatch);

/// What was stored, and how many entries had to be set aside.
pub(super) struct Stored {
    pub(super) outcome: StoreOutcome,
    pub(super) set_aside: u64,
}

impl Write for Store {
    type Output = Stored;

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
            for order in &orders {
                if let Some(reason) = collision(tx.conn, order).await? {
                    let raw = format!("{} {} {}", order.order_id, order.sale_id, order.uid);
                    let entry = Unreadable { origin: batch.origin_of(order), reason, raw };
                    set_aside += set_aside_entry(tx, &entry).await?;
                }
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
    let raw: String = entry.raw.chars().take(RAW_BYTES).collect();
    let (queue, partition, place) = origin_columns(entry.origin);
    let done = sqlx::query(
        "INSERT INTO unreadable (queue, partition, outbox_id, reason, raw, created_at) VALUES (?, ?, ?, ?, ?, ?)
         ON CONFLICT DO NOTHING",
    )
    .bind(queue)
    .bind(partition)
    .bind(place)
    .bind(&entry.reason)
    .bind(raw)
    .bind(tx.now.0)
    .execute(&mut *tx.conn)
    .await?;
    Ok(done.rows_affected())
}

async fn settle(tx: &mut Tx<'_>, origin: Origin) -> Result<(), Error> {
    let (queue, partition, place) = origin_columns(origin);
    sqlx::query("DELETE FROM unreadable WHERE queue = ? AND partition = ? AND outbox_id = ?")
        .bind(queue)
        .bind(partition)
        .bind(place)
        .execute(&mut *tx.conn)
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

/// Whether an order's id belongs to something else already.
async fn collision(conn: &mut SqliteConnection, order: &OrderRecord) -> Result<Option<String>, Error> {
    let table = order.order_id.table();
    let row = sqlx::query(AssertSqlSafe(format!(
        "SELECT uid, sale_id, quantity FROM orders_{table} WHERE order_id = ?"
    )))
    .bind(order.order_id.to_string())
    .fetch_one(conn)
    .await?;
    let (uid, sale, quantity): (String, String, i64) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let same = uid == order.uid.as_str()
        && sale == order.sale_id.as_str()
        && quantity == i64::from(order.quantity.get());
    Ok((!same).then(|| format!("order id {} belongs to an order of sale {sale} already", order.order_id)))
}

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

async fn insert(tx: &mut Tx<'_>, orders: &[&OrderRecord]) -> Result<u64, Error> {
    if orders.is_empty() {
        return Ok(0);
    }
    let plan = Plan::of(orders);
    for (number, common) in plan.commons.iter().enumerate() {
        stage_entry(tx, number as i64, common).await?;
    }
    stage_rows(tx.conn, &plan.rows).await?;
    let stored = run_for(tx.conn, &COPY_ORDERS, plan.shards).await?;
    if plan.coupon_shards != 0 {
        run_for(tx.conn, &COPY_COUPONS, plan.coupon_shards).await?;
    }
    if plan.commons.iter().any(|common| !common.free) {
        sqlx::query(
            "INSERT INTO expiries (expires_at, order_id)
             SELECT e.expires_at, CAST(s.order_id AS TEXT) FROM temp.staged s CROSS JOIN temp.entries e
             WHERE e.entry = s.entry AND e.status = 'created' ON CONFLICT DO NOTHING",
        )
        .execute(&mut *tx.conn)
        .await?;
    }
    sqlx::query("DELETE FROM temp.staged").execute(&mut *tx.conn).await?;
    sqlx::query("DELETE FROM temp.entries").execute(&mut *tx.conn).await?;
    Ok(stored)
}

fn same_entry(one: &OrderRecord, other: &OrderRecord) -> bool {
    Arc::ptr_eq(&one.terms, &other.terms)
        && one.accepted_at == other.accepted_at
        && one.sale_id == other.sale_id
}

async fn stage_entry(tx: &mut Tx<'_>, number: i64, common: &Common<'_>) -> Result<(), Error> {
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
        .bind(tx.now.0)
        .bind(tx.now.plus_s(terms.payment_ttl_s).0)
        .bind(coupon.map(|coupon| coupon.discount.minor_units()))
        .bind(coupon.map(|coupon| coupon.min_amount.minor_units()))
        .bind(coupon.map(|coupon| coupon.valid_until.0))
        .execute(&mut *tx.conn)
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
