//! Reading the tables. Every list has an end, and a query of its own for each table at most.

use std::collections::BTreeMap;

use seckill_domain::{
    CenterId, CouponState, Currency, Millis, Money, OrderId, OrderStatus, Quantity, SHARDS, SaleId, SaleKind,
    Shard, TABLES, Table, Uid,
};

use super::super::batch::{Origin, Unreadable};
use super::super::error::Error;
use super::super::model::{
    AdminOrder, Coupon, Cursor, Order, OrderFilter, Page, PaymentId, Refund, Release, StatusCounts,
};
use super::Counts;
use super::positions::{Positions, shards_of};
use super::session::{Row, Session, Value, values};
use super::writer::OwnedShards;

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

pub(super) async fn order(conn: &mut Session, order_id: OrderId) -> Result<Option<Order>, Error> {
    let table = order_id.table();
    conn.row(format!("SELECT {ORDER} FROM orders_{table} WHERE order_id = ?"), values![order_id.to_string()])
        .await?
        .map(|row| order_from(&row))
        .transpose()
}

pub(super) async fn admin_order(conn: &mut Session, order_id: OrderId) -> Result<Option<AdminOrder>, Error> {
    admin_order_with(conn, order_id, "").await
}

/// The same with a lock on the row, or none.
pub(super) async fn admin_order_with(
    conn: &mut Session,
    order_id: OrderId,
    lock: &str,
) -> Result<Option<AdminOrder>, Error> {
    let table = order_id.table();
    conn.row(
        format!("SELECT {ADMIN_ORDER} FROM orders_{table} WHERE order_id = ?{lock}"),
        values![order_id.to_string()],
    )
    .await?
    .map(|row| admin_order_from(&row))
    .transpose()
}

pub(super) async fn orders_of(
    conn: &mut Session,
    uid: &Uid,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Page<Order>, Error> {
    let table = uid.table();
    let sql = format!(
        "SELECT {ORDER} FROM orders_{table} WHERE uid = ? AND created_at <= ? AND (created_at, order_id) < (?, ?)
         ORDER BY created_at DESC, order_id DESC LIMIT ?"
    );
    let rows = of_user(conn, sql, uid, limit, cursor).await?;
    page(&rows, limit, order_from, |order| Cursor { at: order.created_at.0, id: order.order_id.number() })
}

pub(super) async fn coupons_of(
    conn: &mut Session,
    uid: &Uid,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Page<Coupon>, Error> {
    let table = uid.table();
    let sql = format!(
        "SELECT {COUPON} FROM coupons_{table} WHERE uid = ? AND created_at <= ? AND (created_at, coupon_id) < (?, ?)
         ORDER BY created_at DESC, coupon_id DESC LIMIT ?"
    );
    let rows = of_user(conn, sql, uid, limit, cursor).await?;
    page(&rows, limit, coupon_from, |coupon| Cursor {
        at: coupon.created_at.0,
        id: coupon.coupon_id.number(),
    })
}

async fn of_user(
    conn: &mut Session,
    sql: String,
    uid: &Uid,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Vec<Row>, Error> {
    let before = cursor.unwrap_or(Cursor { at: i64::MAX, id: u64::MAX });
    conn.rows(sql, values![uid.as_str(), before.at, before.at, format!("{:019}", before.id), one_more(limit)])
        .await
}

fn bounded(limit: u32) -> u32 {
    limit.clamp(1, MAX_PAGE)
}

/// One row more than the page has tells whether there is another page.
fn one_more(limit: u32) -> i64 {
    i64::from(bounded(limit)) + 1
}

fn page<T>(
    rows: &[Row],
    limit: u32,
    read: impl Fn(&Row) -> Result<T, Error>,
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
    conn: &mut Session,
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
            "SELECT {ADMIN_ORDER} FROM orders_{table} WHERE uid = ? AND created_at <= ? AND (created_at, order_id) < (?, ?){conditions}
             ORDER BY created_at DESC, order_id DESC LIMIT ?"
        );
        let mut values = values![uid.as_str(), before.at, before.at, format!("{:019}", before.id)].to_vec();
        values.extend(filter_values(filter));
        values.push(one_more(limit).into());
        let rows = conn.rows(sql, &values).await?;
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
        let mut values = vec![Value::from(format!("{after:019}"))];
        values.extend(filter_values(filter));
        values.push((wanted - rows.len() as i64).into());
        rows.extend(conn.rows(sql, &values).await?);
        if rows.len() as i64 == wanted {
            break;
        }
    }
    page(&rows, limit, admin_order_from, |found| {
        let order_id = found.order.order_id;
        Cursor { at: order_id.table().number().into(), id: order_id.number() }
    })
}

fn filter_values(filter: &OrderFilter) -> impl Iterator<Item = Value<'_>> {
    let sale = filter.sale_id.as_ref().map(|sale_id| Value::from(sale_id.as_str()));
    let status = filter.status.map(|status| Value::from(status.as_str()));
    sale.into_iter().chain(status)
}

pub(super) async fn refunds(
    conn: &mut Session,
    center: &CenterId,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Page<Refund>, Error> {
    let before = cursor.map_or(i64::MAX, |cursor| cursor.at);
    let own = own_orders(conn, center).await?;
    let rows = conn
        .rows(
            format!("SELECT {REFUND} FROM refunds WHERE id < ?{own} ORDER BY id DESC LIMIT ?"),
            values![before, one_more(limit)],
        )
        .await?;
    let limit = bounded(limit) as usize;
    let items = rows.iter().take(limit).map(refund_from).collect::<Result<_, _>>()?;
    Ok(Page { items, next: next_by_id(&rows, limit)? })
}

/// The condition for rows of orders that are at home here.
async fn own_orders(conn: &mut Session, center: &CenterId) -> Result<String, Error> {
    Ok(OwnedShards::of(shards_of(conn, center).await?).condition("order_id"))
}

pub(super) async fn unreadable(
    conn: &mut Session,
    center: &CenterId,
    limit: u32,
    cursor: Option<Cursor>,
) -> Result<Page<Unreadable>, Error> {
    let before = cursor.map_or(i64::MAX, |cursor| cursor.at);
    let rows = conn.rows("SELECT id, queue, `partition`, outbox_id, reason, raw FROM unreadable WHERE center = ? AND id < ? ORDER BY id DESC LIMIT ?", values![center.as_str(), before, one_more(limit)])
    .await?;
    let limit = bounded(limit) as usize;
    let read = |row: &Row| -> Result<Unreadable, Error> {
        let partition: u8 = row.small(2)?;
        let place = row.text(3)?;
        let origin = match row.text(1)? {
            "outbox" => Origin::Outbox { partition, id: place.parse()? },
            "kafka" => Origin::Kafka {
                shard: Shard::new(partition).ok_or_else(|| Error::Row(format!("shard {partition}")))?,
                offset: place.parse().map_err(|_| Error::Row(format!("offset {place:?}")))?,
            },
            other => return Err(Error::Row(format!("queue {other:?}"))),
        };
        Ok(Unreadable { origin, reason: row.text(4)?.to_owned(), raw: row.text(5)?.to_owned() })
    };
    let items = rows.iter().take(limit).map(read).collect::<Result<_, _>>()?;
    Ok(Page { items, next: next_by_id(&rows, limit)? })
}

/// The cursor of a list that is ordered by the first column alone.
fn next_by_id(rows: &[Row], limit: usize) -> Result<Option<Cursor>, Error> {
    match rows.get(limit.saturating_sub(1)) {
        Some(last) if rows.len() > limit => Ok(Some(Cursor { at: last.int(0)?, id: 0 })),
        _ => Ok(None),
    }
}

pub(super) async fn pending_releases(
    conn: &mut Session,
    center: &CenterId,
    limit: u32,
    except: &[SaleId],
) -> Result<Vec<Release>, Error> {
    let others = match except {
        [] => String::new(),
        _ => format!(" AND sale_id NOT IN ({})", vec!["?"; except.len()].join(", ")),
    };
    let own = own_orders(conn, center).await?;
    let sql = format!(
        "SELECT order_id, uid, sale_id, id FROM releases WHERE state = 'pending'{others}{own} ORDER BY id LIMIT ?"
    );
    let mut values: Vec<Value<'_>> = except.iter().map(|sale_id| Value::from(sale_id.as_str())).collect();
    values.push(limit.into());
    let rows = conn.rows(sql, &values).await?;
    rows.iter()
        .map(|row| {
            Ok(Release {
                order_id: parse_order_id(row.text(0)?)?,
                uid: Uid::new(row.text(1)?)?,
                sale_id: SaleId::new(row.text(2)?)?,
                place: row.int(3)?,
            })
        })
        .collect()
}

pub(super) async fn pending_release_count(conn: &mut Session, center: &CenterId) -> Result<i64, Error> {
    let own = own_orders(conn, center).await?;
    conn.number(format!("SELECT COUNT(*) FROM releases WHERE state = 'pending'{own}"), values![]).await
}

/// The earliest moment, after `after`, at which an order comes due.
pub(super) async fn next_due(
    conn: &mut Session,
    center: &CenterId,
    after: Option<Millis>,
) -> Result<Option<Millis>, Error> {
    let own = own_orders(conn, center).await?;
    let row = conn
        .row(
            format!("SELECT expires_at FROM expiries WHERE expires_at > ?{own} ORDER BY expires_at LIMIT 1"),
            values![after.map_or(i64::MIN, |after| after.0)],
        )
        .await?;
    Ok(row.map(|row| row.int(0)).transpose()?.map(Millis))
}

/// Everything from one moment: one read transaction.
pub(super) async fn counts(
    conn: &mut Session,
    center: &CenterId,
    sale_id: Option<&SaleId>,
) -> Result<Counts, Error> {
    conn.begin_snapshot().await?;
    let counts = counts_now(conn, center, sale_id).await;
    conn.roll_back().await?;
    counts
}

async fn counts_now(
    conn: &mut Session,
    center: &CenterId,
    sale_id: Option<&SaleId>,
) -> Result<Counts, Error> {
    let mut counts = Counts { positions: Positions::read(conn, center).await?.all(), ..Counts::default() };
    counts.unreadable = count(
        conn.number("SELECT COUNT(*) FROM unreadable WHERE center = ?", values![center.as_str()]).await?,
    );
    let filter = if sale_id.is_some() { "WHERE sale_id = ?" } else { "" };
    // Copies of other centers' orders are theirs to count.
    let owned = OwnedShards::of(shards_of(conn, center).await?);
    for shard in owned.iter() {
        let sql: Vec<String> = shard
            .tables()
            .map(|table| {
                format!(
                    "SELECT sale_id, status, COUNT(*), CAST(SUM(quantity) AS SIGNED) FROM orders_{table} {filter}
                     GROUP BY sale_id, status"
                )
            })
            .collect();
        for row in counted(conn, &sql, sale_id).await? {
            let (sale, state, found) = row?;
            let status: OrderStatus = state.parse()?;
            let total = counts.sales.entry(sale).or_default().by_status.entry(status.as_str()).or_default();
            total.orders += found.orders;
            total.units += found.units;
        }
    }
    let (filter, own) =
        (if sale_id.is_some() { "sale_id = ?" } else { "1 = 1" }, owned.condition("order_id"));
    let sql = format!(
        "SELECT sale_id, state, COUNT(*), CAST(SUM(quantity) AS SIGNED) FROM releases WHERE {filter}{own}
         GROUP BY sale_id, state"
    );
    for row in counted(conn, &[sql], sale_id).await? {
        let (sale, state, found) = row?;
        let sale = counts.sales.entry(sale).or_default();
        match state.as_str() {
            "pending" => sale.releasing = found,
            _ => sale.release_unknown = found,
        }
    }
    Ok(counts)
}

type Counted = Result<(SaleId, String, StatusCounts), Error>;

/// The sums of some queries, in one.
async fn counted(
    conn: &mut Session,
    queries: &[String],
    sale_id: Option<&SaleId>,
) -> Result<Vec<Counted>, Error> {
    let values: Vec<Value<'_>> =
        sale_id.into_iter().flat_map(|sale_id| queries.iter().map(|_| sale_id.as_str().into())).collect();
    let rows = conn.rows(queries.join(" UNION ALL "), &values).await?;
    let read = |row: &Row| -> Counted {
        let found = StatusCounts { orders: count(row.int(2)?), units: count(row.int(3)?) };
        Ok((SaleId::new(row.text(0)?)?, row.text(1)?.to_owned(), found))
    };
    Ok(rows.iter().map(read).collect())
}

fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

pub(super) async fn sales(conn: &mut Session) -> Result<Vec<SaleId>, Error> {
    let mut found = BTreeMap::new();
    for number in 0..SHARDS {
        let Some(shard) = Shard::new(number) else { continue };
        let sql: Vec<String> =
            shard.tables().map(|table| format!("SELECT DISTINCT sale_id FROM orders_{table}")).collect();
        let rows = conn.rows(sql.join(" UNION "), values![]).await?;
        for row in rows {
            found.insert(SaleId::new(row.text(0)?)?, ());
        }
    }
    Ok(found.into_keys().collect())
}

// Rows as what they are. A row that does not parse was not written by us.

pub(super) fn order_from(row: &Row) -> Result<Order, Error> {
    Ok(Order {
        order_id: parse_order_id(row.text(0)?)?,
        uid: Uid::new(row.text(1)?)?,
        sale_id: SaleId::new(row.text(2)?)?,
        kind: match row.text(3)? {
            "product" => SaleKind::Product,
            "coupon" => SaleKind::Coupon,
            other => return Err(Error::Row(format!("kind {other:?}"))),
        },
        quantity: Quantity::new(row.small(4)?)?,
        unit_price: Money::stored(row.int(5)?),
        currency: row.text(6)?.parse::<Currency>()?,
        amount: Money::stored(row.int(7)?),
        status: row.text(8)?.parse::<OrderStatus>()?,
        created_at: Millis(row.int(9)?),
        expires_at: Millis(row.int(10)?),
        paid_at: row.opt_int(11)?.map(Millis),
        closed_at: row.opt_int(12)?.map(Millis),
        paid_amount: row.opt_int(13)?.map(Money::stored),
        coupon_id: row.opt_text(14)?.map(parse_order_id).transpose()?,
    })
}

fn admin_order_from(row: &Row) -> Result<AdminOrder, Error> {
    let order = order_from(row)?;
    Ok(AdminOrder {
        uid: order.uid.clone(),
        accepted_at: Millis(row.int(15)?),
        reason: row.opt_text(16)?.map(str::to_owned),
        order,
    })
}

pub(super) fn coupon_columns() -> &'static str {
    COUPON
}

pub(super) fn coupon_from(row: &Row) -> Result<Coupon, Error> {
    Ok(Coupon {
        coupon_id: parse_order_id(row.text(0)?)?,
        uid: Uid::new(row.text(1)?)?,
        sale_id: SaleId::new(row.text(2)?)?,
        discount: Money::stored(row.int(3)?),
        min_amount: Money::stored(row.int(4)?),
        currency: row.text(5)?.parse::<Currency>()?,
        valid_until: Millis(row.int(6)?),
        state: row.text(7)?.parse::<CouponState>()?,
        created_at: Millis(row.int(8)?),
        redeemed_by: row.opt_text(9)?.map(parse_order_id).transpose()?,
    })
}

pub(super) fn refund_columns() -> &'static str {
    REFUND
}

pub(super) fn refund_from(row: &Row) -> Result<Refund, Error> {
    Ok(Refund {
        payment_id: PaymentId::new(row.text(1)?).map_err(|error| Error::Row(error.to_string()))?,
        order_id: parse_order_id(row.text(2)?)?,
        uid: Uid::new(row.text(3)?)?,
        sale_id: SaleId::new(row.text(4)?)?,
        amount: Money::stored(row.int(5)?),
        currency: row.text(6)?.parse::<Currency>()?,
        order_status: row.text(7)?.parse::<OrderStatus>()?,
        created_at: Millis(row.int(8)?),
    })
}

pub(super) fn parse_order_id(text: &str) -> Result<OrderId, Error> {
    Ok(text.parse()?)
}
