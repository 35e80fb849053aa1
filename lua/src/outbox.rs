//! The outbox: a stream in which every change of the ledger is an entry.
//!
//! Fields of an entry: `v` format version, `k` kind, `s` sale id, `a` the ledger's time in ms, `o` the content:
//!
//! | kind | content |
//! | --- | --- |
//! | `orders` | a line `HEAD QUANTITY UID[ TRACEPARENT]` for each order; `t` holds the sale's terms as JSON. The last order's sequence is the entry's, the ones before count back from it |
//! | `released` | the order ids that were given back, one a line |
//! | `sale` | the sale's description as JSON |
//! | `state` | `active`, `paused`, `ended` or `archived` |
//! | `stock` | the change in units |
//! | `reclaimed` | how many orders were claimed again |
//! | `epoch` | the fence of the epoch that begins |

use std::collections::BTreeMap;
use std::sync::Arc;

use redis::aio::ConnectionLike;
use redis::{FromRedisValue, Value};
use seckill_domain::{
    CenterNumber, LedgerState, Millis, OrderId, OrderRecord, OutboxId, Quantity, SaleId, SaleSpec, SaleTerms,
    Uid,
};

use crate::error::Error;
use crate::fence::Fence;
use crate::keys;
use crate::reply::{malformed, text};
use crate::roles::{self, Role};

/// The format version that this release writes and reads.
pub const RECORD_VERSION: &str = "1";

/// One entry.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Its id.
    pub id: OutboxId,
    /// The ledger's time at the change, if the entry says it.
    pub at: Option<Millis>,
    /// What happened, or why this release cannot read it.
    pub event: Result<Event, Unreadable>,
}

/// What an entry says.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Purchases were accepted.
    Orders(Vec<OrderRecord>),
    /// Units were given back.
    Released {
        /// Of this sale.
        sale_id: SaleId,
        /// By these orders.
        orders: Vec<OrderId>,
    },
    /// A sale was created or its description changed.
    Sale(Box<SaleSpec>),
    /// Something else of a sale changed: its state, its stock, claims of an adopted ledger.
    SaleChanged(SaleChange),
    /// An epoch began.
    Epoch(Fence),
}

/// A change of a sale that is not one of its description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaleChange {
    /// The sale.
    pub sale_id: SaleId,
    /// What changed.
    pub what: Changed,
}

/// What changed of a sale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// It is in this state now.
    State(LedgerState),
    /// Units were added, or taken away.
    Stock(i64),
    /// So many stored orders were claimed again.
    Reclaimed(u64),
}

/// Why an entry could not be read. Its raw content goes to whoever keeps such entries.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {raw}")]
pub struct Unreadable {
    /// What is wrong with it.
    pub reason: String,
    /// Its fields, as a JSON object of texts; [`parse_raw`] reads it.
    pub raw: String,
}

/// A stretch of the outbox, read together with what the server was at that moment (R1).
#[derive(Debug, Clone, PartialEq)]
pub struct Page {
    /// What the server was.
    pub role: Role,
    /// Its fence.
    pub fence: Option<String>,
    /// The sequence of its last entry.
    pub last_seq: u64,
    /// The entries, oldest first.
    pub entries: Vec<Entry>,
}

/// Reads at most `count` entries after an id, together with the server's role and fence at that moment.
pub async fn read(conn: &mut impl ConnectionLike, after: OutboxId, count: usize) -> Result<Page, Error> {
    let mut range = redis::cmd("XRANGE");
    range.arg(keys::OUTBOX).arg(format!("({after}")).arg("+").arg("COUNT").arg(count);
    let (moment, entries) = roles::at_once(conn, range).await?;
    Ok(Page {
        role: moment.role,
        fence: moment.fence,
        last_seq: moment.seq,
        entries: parse_entries(entries)?,
    })
}

/// Waits until there is an entry after an id, at most `block_ms`. The connection must not be shared: it is held
/// up meanwhile, and its response timeout must be longer (the `redis` crate's default is 500 ms). Returns whether
/// there is one.
pub async fn wait_for_entry(
    conn: &mut impl ConnectionLike,
    after: OutboxId,
    block_ms: u64,
) -> Result<bool, Error> {
    let answer: Value = redis::cmd("XREAD")
        .arg("COUNT")
        .arg(1)
        .arg("BLOCK")
        .arg(block_ms.max(1))
        .arg("STREAMS")
        .arg(keys::OUTBOX)
        .arg(after.to_string())
        .query_async(conn)
        .await?;
    Ok(answer != Value::Nil)
}

/// The oldest entry's id, if there is any.
pub async fn first_id(conn: &mut impl ConnectionLike) -> Result<Option<OutboxId>, Error> {
    edge(conn, "XRANGE", "-", "+").await
}

/// The newest entry's id, if there is any.
pub async fn last_id(conn: &mut impl ConnectionLike) -> Result<Option<OutboxId>, Error> {
    edge(conn, "XREVRANGE", "+", "-").await
}

/// An entry as it lies in the stream, with all its fields as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawEntry {
    /// Its id.
    pub id: OutboxId,
    /// Its fields, in their order.
    pub fields: Vec<(String, String)>,
}

/// At most `count` entries after an id as they are, oldest first, with what this release reads in them.
pub async fn read_raw(
    conn: &mut impl ConnectionLike,
    after: OutboxId,
    count: usize,
) -> Result<Vec<(RawEntry, Entry)>, Error> {
    let mut range = redis::cmd("XRANGE");
    range.arg(keys::OUTBOX).arg(format!("({after}")).arg("+").arg("COUNT").arg(count);
    let entries: Value = range.query_async(conn).await?;
    let parsed = parse_entries(entries.clone())?;
    let raw = Vec::<(String, Vec<(Vec<u8>, Vec<u8>)>)>::from_redis_value(entries)
        .map_err(|_| Error::Malformed("an outbox entry without fields".to_owned()))?;
    let lossy = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(raw
        .into_iter()
        .zip(parsed)
        .map(|((_, fields), entry)| {
            let fields = fields.into_iter().map(|(name, value)| (lossy(name), lossy(value))).collect();
            (RawEntry { id: entry.id, fields }, entry)
        })
        .collect())
}

/// The ids of at most `count` entries up to and including an id, newest first.
pub async fn ids_before(
    conn: &mut impl ConnectionLike,
    up_to: OutboxId,
    count: usize,
) -> Result<Vec<OutboxId>, Error> {
    let mut range = redis::cmd("XREVRANGE");
    range.arg(keys::OUTBOX).arg(up_to.to_string()).arg("-").arg("COUNT").arg(count);
    let entries: Value = range.query_async(conn).await?;
    Ok(parse_entries(entries)?.into_iter().map(|entry| entry.id).collect())
}

/// Which of these ids the outbox has entries for.
pub async fn has(conn: &mut impl ConnectionLike, ids: &[OutboxId]) -> Result<Vec<OutboxId>, Error> {
    let mut pipe = redis::pipe();
    for id in ids {
        pipe.cmd("XRANGE").arg(keys::OUTBOX).arg(id.to_string()).arg(id.to_string());
    }
    let found: Vec<Value> = if ids.is_empty() { Vec::new() } else { pipe.query_async(conn).await? };
    Ok(ids
        .iter()
        .zip(found)
        .filter(|(_, entries)| matches!(entries, Value::Array(entries) if !entries.is_empty()))
        .map(|(id, _)| *id)
        .collect())
}

async fn edge(
    conn: &mut impl ConnectionLike,
    command: &str,
    from: &str,
    to: &str,
) -> Result<Option<OutboxId>, Error> {
    let entries: Value =
        redis::cmd(command).arg(keys::OUTBOX).arg(from).arg(to).arg("COUNT").arg(1).query_async(conn).await?;
    Ok(parse_entries(entries)?.first().map(|entry| entry.id))
}

/// Looks for an accepted order that may not be stored yet: its id names its entry, so no index is needed. The
/// id shows the epoch mod 10000; the newest epoch not after `epoch` that fits is meant.
pub async fn find_order(
    conn: &mut impl ConnectionLike,
    epoch: u64,
    order_id: OrderId,
) -> Result<Option<OrderRecord>, Error> {
    Ok(find_order_there(conn, epoch, order_id).await?.map(|found| found.order))
}

/// As [`find_order`], together with what the server was at that moment (R1).
pub async fn find_order_there(
    conn: &mut impl ConnectionLike,
    epoch: u64,
    order_id: OrderId,
) -> Result<Option<FoundOrder>, Error> {
    let shown = u64::from(order_id.head() % 10_000);
    let Some(epoch) =
        (epoch + 10_000 - shown).checked_rem(10_000).and_then(|behind| epoch.checked_sub(behind))
    else {
        return Ok(None);
    };
    let mut range = redis::cmd("XRANGE");
    range.arg(keys::OUTBOX).arg(format!("{epoch}-{}", order_id.seq())).arg("+").arg("COUNT").arg(1);
    let (moment, entries) = roles::at_once(conn, range).await?;
    let found = parse_entries(entries)?.into_iter().find_map(|entry| match entry.event {
        Ok(Event::Orders(orders)) => {
            let order = orders.into_iter().find(|order| order.order_id == order_id)?;
            Some((entry.id, order))
        }
        Ok(Event::Released { .. } | Event::Sale(_) | Event::SaleChanged(_) | Event::Epoch(_)) | Err(_) => {
            None
        }
    });
    Ok(found.map(|(id, order)| FoundOrder { role: moment.role, fence: moment.fence, id, order }))
}

/// An accepted order as the outbox has it.
#[derive(Debug, Clone, PartialEq)]
pub struct FoundOrder {
    /// What the server was.
    pub role: Role,
    /// Its fence.
    pub fence: Option<String>,
    /// The entry's id.
    pub id: OutboxId,
    /// The order.
    pub order: OrderRecord,
}

fn parse_entries(value: Value) -> Result<Vec<Entry>, Error> {
    let Value::Array(entries) = value else { return Err(malformed(&value)) };
    let mut terms = TermsCache::default();
    entries
        .into_iter()
        .map(|entry| {
            let Value::Array(parts) = entry else { return Err(malformed(&entry)) };
            let mut parts = parts.into_iter();
            let id: OutboxId = text(parts.next())?
                .parse()
                .map_err(|_| Error::Malformed("an outbox id that is not EPOCH-SEQUENCE".to_owned()))?;
            let fields = Fields::from_value(parts.next().unwrap_or(Value::Nil))?;
            Ok(Entry { id, at: fields.at(), event: fields.event(id, &mut terms) })
        })
        .collect()
}

/// Reads an entry that was set aside again, from its raw content: a later release may understand it.
pub fn parse_raw(id: OutboxId, raw: &str) -> Result<Event, String> {
    let raw: BTreeMap<String, String> =
        serde_json::from_str(raw).map_err(|error| format!("not the fields of an entry: {error}"))?;
    let mut fields = Fields::default();
    for (name, value) in raw {
        fields.set(name.as_bytes(), value.into_bytes());
    }
    fields.parse(id, &mut TermsCache::default())
}

/// Neighbouring entries mostly have the same terms: parse them once.
#[derive(Default)]
struct TermsCache(Option<(Vec<u8>, Arc<SaleTerms>)>);

impl TermsCache {
    fn parse(&mut self, json: &[u8]) -> Result<Arc<SaleTerms>, String> {
        if let Some((known, terms)) = &self.0
            && known == json
        {
            return Ok(Arc::clone(terms));
        }
        let terms: Arc<SaleTerms> =
            Arc::new(serde_json::from_slice(json).map_err(|error| format!("terms: {error}"))?);
        self.0 = Some((json.to_vec(), Arc::clone(&terms)));
        Ok(terms)
    }
}

#[derive(Default)]
struct Fields {
    version: Vec<u8>,
    kind: Vec<u8>,
    sale: Vec<u8>,
    at: Vec<u8>,
    terms: Vec<u8>,
    content: Vec<u8>,
}

impl Fields {
    fn from_value(value: Value) -> Result<Fields, Error> {
        let pairs = Vec::<(Vec<u8>, Vec<u8>)>::from_redis_value(value)
            .map_err(|_| Error::Malformed("an outbox entry without fields".to_owned()))?;
        let mut fields = Fields::default();
        for (name, value) in pairs {
            fields.set(&name, value);
        }
        Ok(fields)
    }

    fn set(&mut self, name: &[u8], value: Vec<u8>) {
        match name {
            b"v" => self.version = value,
            b"k" => self.kind = value,
            b"s" => self.sale = value,
            b"a" => self.at = value,
            b"t" => self.terms = value,
            b"o" => self.content = value,
            // A later release may add fields that this one has no use for.
            _ => {}
        }
    }

    fn at(&self) -> Option<Millis> {
        std::str::from_utf8(&self.at).ok()?.parse().ok().map(Millis)
    }

    fn raw(&self) -> String {
        let fields = [
            ("v", &self.version),
            ("k", &self.kind),
            ("s", &self.sale),
            ("a", &self.at),
            ("t", &self.terms),
            ("o", &self.content),
        ];
        let texts: BTreeMap<_, _> = fields
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| (name, String::from_utf8_lossy(value)))
            .collect();
        serde_json::to_string(&texts).unwrap_or_default()
    }

    fn event(&self, id: OutboxId, terms: &mut TermsCache) -> Result<Event, Unreadable> {
        self.parse(id, terms).map_err(|reason| Unreadable { reason, raw: self.raw() })
    }

    fn parse(&self, id: OutboxId, terms: &mut TermsCache) -> Result<Event, String> {
        if self.version != RECORD_VERSION.as_bytes() {
            return Err(format!("format version {:?}", String::from_utf8_lossy(&self.version)));
        }
        let content = std::str::from_utf8(&self.content).map_err(|_| "content is not UTF-8".to_owned())?;
        let sale = || {
            std::str::from_utf8(&self.sale)
                .ok()
                .and_then(|text| SaleId::new(text).ok())
                .ok_or_else(|| "impossible sale id".to_owned())
        };
        match &self.kind[..] {
            b"orders" => {
                let at = self.at().ok_or_else(|| "impossible time".to_owned())?;
                parse_orders(content, id, &sale()?, &terms.parse(&self.terms)?, at).map(Event::Orders)
            }
            b"released" => {
                let orders: Result<Vec<OrderId>, _> = content.lines().map(str::parse).collect();
                Ok(Event::Released { sale_id: sale()?, orders: orders.map_err(|error| error.to_string())? })
            }
            b"sale" => serde_json::from_str(content)
                .map(|spec| Event::Sale(Box::new(spec)))
                .map_err(|error| error.to_string()),
            b"state" => {
                let state = LedgerState::from_name(content).ok_or_else(|| "impossible state".to_owned())?;
                Ok(Event::SaleChanged(SaleChange { sale_id: sale()?, what: Changed::State(state) }))
            }
            b"stock" => {
                let delta = content.parse().map_err(|_| "impossible change of stock".to_owned())?;
                Ok(Event::SaleChanged(SaleChange { sale_id: sale()?, what: Changed::Stock(delta) }))
            }
            b"reclaimed" => {
                let orders = content.parse().map_err(|_| "impossible number of orders".to_owned())?;
                Ok(Event::SaleChanged(SaleChange { sale_id: sale()?, what: Changed::Reclaimed(orders) }))
            }
            b"epoch" => content.parse().map(Event::Epoch).map_err(|error| format!("fence: {error}")),
            other => Err(format!("kind {:?}", String::from_utf8_lossy(other))),
        }
    }
}

fn parse_orders(
    content: &str,
    id: OutboxId,
    sale_id: &SaleId,
    terms: &Arc<SaleTerms>,
    accepted_at: Millis,
) -> Result<Vec<OrderRecord>, String> {
    if !content.ends_with('\n') {
        return Err("order lines that end too early".to_owned());
    }
    let count = content.bytes().filter(|byte| *byte == b'\n').count() as u64;
    let mut seq = id.seq.checked_sub(count).ok_or_else(|| "more orders than its sequence".to_owned())?;
    let mut orders = Vec::with_capacity(usize::try_from(count).unwrap_or(0));
    for line in content.lines() {
        seq += 1;
        let mut parts = line.splitn(4, ' ');
        let mut part = |what: &str| parts.next().ok_or_else(|| format!("order line without {what}"));
        let head: u32 = part("head")?.parse().map_err(|_| "impossible order id".to_owned())?;
        let quantity = part("quantity")?.parse().ok().and_then(|units| Quantity::new(units).ok());
        let uid = Uid::new(part("user")?).map_err(|error| error.to_string())?;
        let order_id = OrderId::from_parts(head, seq).ok_or_else(|| "impossible order id".to_owned())?;
        if order_id.table() != uid.table() {
            return Err(format!("order {order_id} is not in its user's table"));
        }
        orders.push(OrderRecord {
            order_id,
            uid,
            sale_id: sale_id.clone(),
            quantity: quantity.ok_or_else(|| "impossible quantity".to_owned())?,
            terms: Arc::clone(terms),
            accepted_at,
            traceparent: parts.next().map(Box::from),
        });
    }
    Ok(orders)
}

/// The home center that an order id shows: where its user was at home when it was accepted.
pub fn center_of(order_id: OrderId) -> Option<CenterNumber> {
    CenterNumber::new(u8::try_from(order_id.head() / 100_000_000).ok()?).ok()
}
