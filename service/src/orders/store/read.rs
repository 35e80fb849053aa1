//! Reading the tables. Every list has an end, and a query of its own for each table at most.

use std::collections::BTreeMap;

use seckill_domain::{
    CenterId, CouponState, Currency, Millis, Money, OrderId, OrderStatus, Quantity, SHARDS, SaleId, SaleKind,
    Shard, TABLES, Table, Uid,
};
use sqlx::sqlite::{SqliteConnection, SqlitePool, SqliteRow};
use sqlx::{AssertSqlSafe, Connection, Row};

use super::super::batch::{Origin, Unreadable};
use super::super::error::Error;
use super::super::model::{
    AdminOrder, Coupon, Cursor, Order, OrderFilter, Page, PaymentId, Refund, Release, StatusCounts,
};
use super::Counts;
use super::positions::Positions;

/// Rows of one page at most, whatever was asked for.
const MAX_PAGE: u32 = 1000;

/// The columns that [`order_from`] reads.
pub(super) const ORDER: &str = "order_id, uid, sale_id, kind, quantity, unit_price, currency, amount, status, \
    created_at, expires_at, paid_at, closed_at, paid_amount, coupon_id";
const ADMIN_ORDER: &str = "order_id, uid, sale_id, kind, quantity, unit_price, currency, amount, status, \
    created_at, expires_at, paid_at, closed_at, paid_amount, coupon_id, accepted_at, reason";
const COUPON: &str =
    "coupon_id, uid, sale_id, discount, min_amount, currency, valid_until, state, created_at, redeemed_by";
const REFUND: &str = "id, payment_id, order_id, uid, sale_id, amount, currency, order_status, created_at";

pub(super) async fn order(pool: &SqlitePool, order_id: OrderId) -> Result<Option<Order>, Error> {
    let table = order_id.table();
    sqlx::query(AssertSqlSafe(format!("SELECT {ORDER} FROM orders_{table} WHERE order_id = ?")))
        .bind(order_id.to_string())
        .fetch_optional(pool)
        .await?
        .map(|row| order_from(&row))
        .transpose()
}

pub(super) async fn admin_order(pool: &SqlitePool, order_id: OrderId) -> Result<Option<AdminOrder>, Error> {
    let table = order_id.table();
    sqlx::query(AssertSqlSafe(format!("SELECT {ADMIN_ORDER} FROM orders_{table} WHERE order_id = ?")))
        .bind(order_id.to_string())
        .fetch_optional(pool)
        .await?
        .map(|row| admin_order_from(&row))
        .transpose()
}

pub(super) async fn orders_of(
    pool: &SqlitePool,
    uid: &Uid,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Page<Order>, Error> {
    let table = uid.table();
    let sql = format!(
        "SELECT {ORDER} FROM orders_{table} WHERE uid = ? AND (created_at, order_id) < (?, ?)
         ORDER BY created_at DESC, order_id DESC LIMIT ?"
    );
    let rows = of_user(pool, sql, uid, limit, cursor).await?;
    page(&rows, limit, order_from, |order| Cursor { at: order.created_at.0, id: order.order_id.number() })
}

pub(super) async fn coupons_of(
    pool: &SqlitePool,
    uid: &Uid,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Page<Coupon>, Error> {
    let table = uid.table();
    let sql = format!(
        "SELECT {COUPON} FROM coupons_{table} WHERE uid = ? AND (created_at, coupon_id) < (?, ?)
         ORDER BY created_at DESC, coupon_id DESC LIMIT ?"
    );
    let rows = of_user(pool, sql, uid, limit, cursor).await?;
    page(&rows, limit, coupon_from, |coupon| Cursor {
        at: coupon.created_at.0,
        id: coupon.coupon_id.number(),
    })
}

async fn of_user(
    pool: &SqlitePool,
    sql: String,
    uid: &Uid,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Vec<SqliteRow>, Error> {
    let before = cursor.unwrap_or(Cursor { at: i64::MAX, id: u64::MAX });
    Ok(sqlx::query(AssertSqlSafe(sql))
        .bind(uid.as_str())
        .bind(before.at)
        .bind(format!("{:019}", before.id))
        .bind(one_more(limit))
        .fetch_all(pool)
        .await?)
}

fn bounded(limit: u32) -> u32 {
    limit.clamp(1, MAX_PAGE)
}

/// One row more than the page has tells whether there is another page.
fn one_more(limit: u32) -> i64 {
    i64::from(bounded(limit)) + 1
}

fn page<T>(
    rows: &[SqliteRow],
    limit: u32,
    read: impl Fn(&SqliteRow) -> Result<T, Error>,
    place: impl Fn(&T) -> Cursor,
) -> Result<Page<T>, Error> {
    let limit = bounded(limit) as usize;
    let items: Vec<T> = rows.iter().take(limit).map(read).collect::<Result<_, _>>()?;
    let next = if rows.len() > limit { items.last().map(place) } else { None };
    Ok(Page { items, next })
}

/// A user's orders newest first; everybody's table by table in the order of their ids, because a common order of
/// 512 tables would have to be sorted for each page.
pub(super) async fn admin_orders(
    pool: &SqlitePool,
    filter: &OrderFilter,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Page<AdminOrder>, Error> {
    let mut conditions = String::new();
    if filter.sale_id.is_some() {
        conditions.push_str(" AND sale_id = ?");
    }
    if filter.status.is_some() {
        conditions.push_str(" AND status = ?");
    }
    if let Some(uid) = &filter.uid {
        let table = uid.table();
        let before = cursor.unwrap_or(Cursor { at: i64::MAX, id: u64::MAX });
        let sql = format!(
            "SELECT {ADMIN_ORDER} FROM orders_{table} WHERE uid = ? AND (created_at, order_id) < (?, ?){conditions}
             ORDER BY created_at DESC, order_id DESC LIMIT ?"
        );
        let query = sqlx::query(AssertSqlSafe(sql))
            .bind(uid.as_str())
            .bind(before.at)
            .bind(format!("{:019}", before.id));
        let rows = bind_filter(query, filter).bind(one_more(limit)).fetch_all(pool).await?;
        return page(&rows, limit, admin_order_from, |found| Cursor {
            at: found.order.created_at.0,
            id: found.order.order_id.number(),
        });
    }
    let start = cursor.unwrap_or(Cursor { at: 0, id: 0 });
    let first = u16::try_from(start.at).unwrap_or(TABLES);
    let mut rows = Vec::new();
    let wanted = one_more(limit);
    for table in (first..TABLES).filter_map(Table::new) {
        let after = if i64::from(table.number()) == start.at { start.id } else { 0 };
        let sql = format!(
            "SELECT {ADMIN_ORDER} FROM orders_{table} WHERE order_id > ?{conditions} ORDER BY order_id LIMIT ?"
        );
        let query = sqlx::query(AssertSqlSafe(sql)).bind(format!("{after:019}"));
        rows.extend(bind_filter(query, filter).bind(wanted - rows.len() as i64).fetch_all(pool).await?);
        if rows.len() as i64 == wanted {
            break;
        }
    }
    page(&rows, limit, admin_order_from, |found| {
        let order_id = found.order.order_id;
        Cursor { at: order_id.table().number().into(), id: order_id.number() }
    })
}

type Query<'q> = sqlx::query::Query<'q, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>;

fn bind_filter<'q>(mut query: Query<'q>, filter: &'q OrderFilter) -> Query<'q> {
    if let Some(sale_id) = &filter.sale_id {
        query = query.bind(sale_id.as_str());
    }
    if let Some(status) = filter.status {
        query = query.bind(status.as_str());
    }
    query
}

pub(super) async fn refunds(
    pool: &SqlitePool,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Page<Refund>, Error> {
    let before = cursor.map_or(i64::MAX, |cursor| cursor.at);
    let rows = sqlx::query(AssertSqlSafe(format!(
        "SELECT {REFUND} FROM refunds WHERE id < ? ORDER BY id DESC LIMIT ?"
    )))
    .bind(before)
    .bind(one_more(limit))
    .fetch_all(pool)
    .await?;
    let limit = bounded(limit) as usize;
    let items = rows.iter().take(limit).map(refund_from).collect::<Result<_, _>>()?;
    Ok(Page { items, next: next_by_id(&rows, limit)? })
}

pub(super) async fn unreadable(
    pool: &SqlitePool,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Page<Unreadable>, Error> {
    let before = cursor.map_or(i64::MAX, |cursor| cursor.at);
    let rows = sqlx::query(
        "SELECT id, queue, partition, outbox_id, reason, raw FROM unreadable WHERE id < ? ORDER BY id DESC LIMIT ?",
    )
    .bind(before)
    .bind(one_more(limit))
    .fetch_all(pool)
    .await?;
    let limit = bounded(limit) as usize;
    let read = |row: &SqliteRow| -> Result<Unreadable, Error> {
        let partition: u8 = row.try_get(2)?;
        let place: &str = row.try_get(3)?;
        let origin = match row.try_get(1)? {
            "outbox" => Origin::Outbox { partition, id: place.parse()? },
            "kafka" => Origin::Kafka {
                shard: Shard::new(partition).ok_or_else(|| Error::Row(format!("shard {partition}")))?,
                offset: place.parse().map_err(|_| Error::Row(format!("offset {place:?}")))?,
            },
            other => return Err(Error::Row(format!("queue {other:?}"))),
        };
        Ok(Unreadable { origin, reason: row.try_get(4)?, raw: row.try_get(5)? })
    };
    let items = rows.iter().take(limit).map(read).collect::<Result<_, _>>()?;
    Ok(Page { items, next: next_by_id(&rows, limit)? })
}

/// The cursor of a list that is ordered by the first column alone.
fn next_by_id(rows: &[SqliteRow], limit: usize) -> Result<Option<Cursor>, Error> {
    match rows.get(limit.saturating_sub(1)) {
        Some(last) if rows.len() > limit => Ok(Some(Cursor { at: last.try_get(0)?, id: 0 })),
        _ => Ok(None),
    }
}

pub(super) async fn pending_releases(
    pool: &SqlitePool,
    limit: u32,
    except: &[SaleId],
) -> Result<Vec<Release>, Error> {
    let others = match except {
        [] => String::new(),
        _ => format!(" AND sale_id NOT IN ({})", vec!["?"; except.len()].join(", ")),
    };
    let mut query = sqlx::query(AssertSqlSafe(format!(
        "SELECT order_id, uid, sale_id FROM releases WHERE state = 'pending'{others} ORDER BY id LIMIT ?"
    )));
    for sale_id in except {
        query = query.bind(sale_id.as_str());
    }
    let rows = query.bind(limit).fetch_all(pool).await?;
    rows.iter()
        .map(|row| {
            Ok(Release {
                order_id: parse_order_id(row.try_get(0)?)?,
                uid: Uid::new(row.try_get(1)?)?,
                sale_id: SaleId::new(row.try_get(2)?)?,
            })
        })
        .collect()
}

pub(super) async fn pending_release_count(pool: &SqlitePool) -> Result<i64, Error> {
    Ok(sqlx::query_scalar("SELECT COUNT(*) FROM releases WHERE state = 'pending'").fetch_one(pool).await?)
}

/// The earliest moment, after `after`, at which an order comes due.
pub(super) async fn next_due(pool: &SqlitePool, after: Option<Millis>) -> Result<Option<Millis>, Error> {
    let due: Option<i64> = sqlx::query_scalar("SELECT MIN(expires_at) FROM expiries WHERE expires_at > ?")
        .bind(after.map_or(i64::MIN, |after| after.0))
        .fetch_one(pool)
        .await?;
    Ok(due.map(Millis))
}

/// Everything from one moment: one read transaction.
pub(super) async fn counts(
    pool: &SqlitePool,
    center: &CenterId,
    sale_id: Option<&SaleId>,
) -> Result<Counts, Error> {
    let mut conn = pool.acquire().await?;
    let mut tx = conn.begin().await?;
    let mut counts = Counts::default();
    counts.positions = Positions::read(&mut tx, center).await?.all();
    counts.unreadable =
        count(sqlx::query_scalar("SELECT COUNT(*) FROM unreadable").fetch_one(&mut *tx).await?);
    let filter = if sale_id.is_some() { "WHERE sale_id = ?1" } else { "" };
    for shard in Shard::all() {
        let sql: Vec<String> = shard
            .tables()
            .map(|table| {
                format!(
                    "SELECT sale_id, status, COUNT(*), SUM(quantity) FROM orders_{table} {filter} GROUP BY 1, 2"
                )
            })
            .collect();
        for row in counted(&mut tx, sql.join(" UNION ALL "), sale_id).await? {
            let (sale, state, found) = row?;
            let status: OrderStatus = state.parse()?;
            let total = counts.sales.entry(sale).or_default().by_status.entry(status.as_str()).or_default();
            total.orders += found.orders;
            total.units += found.units;
        }
    }
    let sql = format!("SELECT sale_id, state, COUNT(*), SUM(quantity) FROM releases {filter} GROUP BY 1, 2");
    for row in counted(&mut tx, sql, sale_id).await? {
        let (sale, state, found) = row?;
        let sale = counts.sales.entry(sale).or_default();
        match state.as_str() {
            "pending" => sale.releasing = found,
            _ => sale.release_unknown = found,
        }
    }
    tx.rollback().await?;
    Ok(counts)
}

type Counted = Result<(SaleId, String, StatusCounts), Error>;

async fn counted(
    conn: &mut SqliteConnection,
    sql: String,
    sale_id: Option<&SaleId>,
) -> Result<Vec<Counted>, Error> {
    let mut query = sqlx::query(AssertSqlSafe(sql));
    if let Some(sale_id) = sale_id {
        query = query.bind(sale_id.as_str());
    }
    let rows = query.fetch_all(conn).await?;
    let read = |row: &SqliteRow| -> Counted {
        let found = StatusCounts { orders: count(row.try_get(2)?), units: count(row.try_get(3)?) };
        Ok((SaleId::new(row.try_get(0)?)?, row.try_get(1)?, found))
    };
    Ok(rows.iter().map(read).collect())
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(super) async fn sales(pool: &SqlitePool) -> Result<Vec<SaleId>, Error> {
    let mut found = BTreeMap::new();
    for number in 0..SHARDS {
        let Some(shard) = Shard::new(number) else { continue };
        let sql: Vec<String> =
            shard.tables().map(|table| format!("SELECT DISTINCT sale_id FROM orders_{table}")).collect();
        let rows = sqlx::query(AssertSqlSafe(sql.join(" UNION "))).fetch_all(pool).await?;
        for row in rows {
            found.insert(SaleId::new(row.try_get(0)?)?, ());
        }
    }
    Ok(found.into_keys().collect())
}

// Rows as what they are. A row that does not parse was not written by us.

pub(super) fn order_from(row: &SqliteRow) -> Result<Order, Error> {
    Ok(Order {
        order_id: parse_order_id(row.try_get(0)?)?,
        uid: Uid::new(row.try_get(1)?)?,
        sale_id: SaleId::new(row.try_get(2)?)?,
        kind: match row.try_get(3)? {
            "product" => SaleKind::Product,
            "coupon" => SaleKind::Coupon,
            other => return Err(Error::Row(format!("kind {other:?}"))),
        },
        quantity: Quantity::new(row.try_get(4)?)?,
        unit_price: Money::stored(row.try_get(5)?),
        currency: row.try_get::<&str, _>(6)?.parse::<Currency>()?,
        amount: Money::stored(row.try_get(7)?),
        status: row.try_get::<&str, _>(8)?.parse::<OrderStatus>()?,
        created_at: Millis(row.try_get(9)?),
        expires_at: Millis(row.try_get(10)?),
        paid_at: row.try_get::<Option<i64>, _>(11)?.map(Millis),
        closed_at: row.try_get::<Option<i64>, _>(12)?.map(Millis),
        paid_amount: row.try_get::<Option<i64>, _>(13)?.map(Money::stored),
        coupon_id: row.try_get::<Option<&str>, _>(14)?.map(parse_order_id).transpose()?,
    })
}

fn admin_order_from(row: &SqliteRow) -> Result<AdminOrder, Error> {
    let order = order_from(row)?;
    Ok(AdminOrder {
        uid: order.uid.clone(),
        accepted_at: Millis(row.try_get(15)?),
        reason: row.try_get(16)?,
        order,
    })
}

pub(super) fn coupon_columns() -> &'static str {
    COUPON
}

pub(super) fn coupon_from(row: &SqliteRow) -> Result<Coupon, Error> {
    Ok(Coupon {
        coupon_id: parse_order_id(row.try_get(0)?)?,
        uid: Uid::new(row.try_get(1)?)?,
        sale_id: SaleId::new(row.try_get(2)?)?,
        discount: Money::stored(row.try_get(3)?),
        min_amount: Money::stored(row.try_get(4)?),
        currency: row.try_get::<&str, _>(5)?.parse::<Currency>()?,
        valid_until: Millis(row.try_get(6)?),
        state: row.try_get::<&str, _>(7)?.parse::<CouponState>()?,
        created_at: Millis(row.try_get(8)?),
        redeemed_by: row.try_get::<Option<&str>, _>(9)?.map(parse_order_id).transpose()?,
    })
}

pub(super) fn refund_columns() -> &'static str {
    REFUND
}

pub(super) fn refund_from(row: &SqliteRow) -> Result<Refund, Error> {
    Ok(Refund {
        payment_id: PaymentId::new(row.try_get(1)?).map_err(|error| Error::Row(error.to_string()))?,
        order_id: parse_order_id(row.try_get(2)?)?,
        uid: Uid::new(row.try_get(3)?)?,
        sale_id: SaleId::new(row.try_get(4)?)?,
        amount: Money::stored(row.try_get(5)?),
        currency: row.try_get::<&str, _>(6)?.parse::<Currency>()?,
        order_status: row.try_get::<&str, _>(7)?.parse::<OrderStatus>()?,
        created_at: Millis(row.try_get(8)?),
    })
}

pub(super) fn parse_order_id(text: &str) -> Result<OrderId, Error> {
    Ok(text.parse()?)
}
