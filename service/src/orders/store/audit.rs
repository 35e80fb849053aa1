//! What the audit reads: every row as it stands, also what no release of ours would have written.

use std::collections::{BTreeMap, HashSet};

use seckill_domain::{OrderId, OrderStatus, SaleId, Table, Uid};
use serde::{Deserialize, Serialize};

use super::super::error::Error;
use super::read::parse_order_id;
use super::session::{Row, Session, Value};

/// Orders looked up in one query; SQLite takes at least 999 parameters.
const LOOKUP: usize = 500;

/// A stored order, as far as the audit compares it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditOrder {
    /// The order.
    pub order_id: OrderId,
    /// Whose it is.
    pub uid: Uid,
    /// Of which sale.
    pub sale_id: SaleId,
    /// How many units.
    pub quantity: u32,
    /// Where it stands.
    pub status: OrderStatus,
    /// Whether it was closed because an adopted ledger could not claim it again.
    pub lost: bool,
}

/// A row that is no order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadableOrder {
    /// What its `order_id` says.
    pub order_id: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Some rows of one table.
#[derive(Debug, Clone, Default)]
pub struct AuditRows {
    /// The orders.
    pub orders: Vec<AuditOrder>,
    /// Rows that are none.
    pub unreadable: Vec<UnreadableOrder>,
    /// Where to go on; absent at the end of the table.
    pub next: Option<String>,
}

const COLUMNS: &str = "order_id, uid, sale_id, quantity, status, reason IS NOT NULL";

pub(super) async fn rows(
    conn: &mut Session,
    table: Table,
    after: &str,
    sale_id: Option<&SaleId>,
    limit: u32,
) -> Result<AuditRows, Error> {
    let filter = if sale_id.is_some() { "AND sale_id = ?" } else { "" };
    let sql =
        format!("SELECT {COLUMNS} FROM orders_{table} WHERE order_id > ? {filter} ORDER BY order_id LIMIT ?");
    let mut values = vec![Value::from(after)];
    values.extend(sale_id.map(|sale_id| Value::from(sale_id.as_str())));
    values.push(limit.into());
    let found = conn.rows(sql, &values).await?;
    let mut rows = AuditRows::default();
    if found.len() as u64 == u64::from(limit) {
        rows.next = found.last().map(|row| row.text(0).map(str::to_owned)).transpose()?;
    }
    for row in &found {
        match order_from(row) {
            Ok(order) => rows.orders.push(order),
            Err(reason) => rows
                .unreadable
                .push(UnreadableOrder { order_id: row.text(0).unwrap_or("?").to_owned(), reason }),
        }
    }
    Ok(rows)
}

pub(super) async fn orders(conn: &mut Session, orders: &[OrderId]) -> Result<Vec<AuditOrder>, Error> {
    let mut by_table: BTreeMap<Table, Vec<OrderId>> = BTreeMap::new();
    for order_id in orders {
        by_table.entry(order_id.table()).or_default().push(*order_id);
    }
    let mut found = Vec::with_capacity(orders.len());
    for (table, orders) in by_table {
        for chunk in orders.chunks(LOOKUP) {
            let sql =
                format!("SELECT {COLUMNS} FROM orders_{table} WHERE order_id IN ({})", marks(chunk.len()));
            for row in conn.rows(sql, &ids(chunk)).await? {
                // A row that cannot be read was reported by the walk through its table.
                found.extend(order_from(&row));
            }
        }
    }
    Ok(found)
}

pub(super) async fn awaiting_release(
    conn: &mut Session,
    orders: &[OrderId],
) -> Result<HashSet<OrderId>, Error> {
    let mut found = HashSet::new();
    for chunk in orders.chunks(LOOKUP) {
        let sql = format!(
            "SELECT order_id FROM releases WHERE state = 'pending' AND order_id IN ({})",
            marks(chunk.len())
        );
        for row in conn.rows(sql, &ids(chunk)).await? {
            found.insert(parse_order_id(row.text(0)?)?);
        }
    }
    Ok(found)
}

fn ids(orders: &[OrderId]) -> Vec<Value<'static>> {
    orders.iter().map(|order_id| Value::from(order_id.to_string())).collect()
}

fn marks(count: usize) -> String {
    vec!["?"; count].join(", ")
}

fn order_from(row: &Row) -> Result<AuditOrder, String> {
    let text = |column: usize| row.text(column).map_err(|error| error.to_string());
    Ok(AuditOrder {
        order_id: text(0)?.parse().map_err(|error: seckill_domain::InvalidId| error.to_string())?,
        uid: Uid::new(text(1)?).map_err(|error| error.to_string())?,
        sale_id: SaleId::new(text(2)?).map_err(|error| error.to_string())?,
        quantity: row.small(3).map_err(|error| error.to_string())?,
        status: text(4)?.parse().map_err(|error: seckill_domain::UnknownState| error.to_string())?,
        lost: row.int(5).map_err(|error| error.to_string())? != 0,
    })
}
