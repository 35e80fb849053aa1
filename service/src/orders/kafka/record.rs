//! What stands in the topics: CloudEvents in binary mode, content in JSON.
//!
//! | `ce_type` | key | content |
//! | --- | --- | --- |
//! | `seckill.order.accepted` | the user | the order, complete |
//! | `seckill.mark` | none | none: everything of this partition up to the outbox id in the headers stands before it |
//! | `seckill.unreadable` | none | an entry of the outbox that the relay could not read, and the reason |
//! | `seckill.sale.described`, `seckill.sale.changed` | the sale | the description, or what changed |
//!
//! Every record carries the header `seckill_outbox`, `PARTITION/EPOCH-SEQUENCE`: the inventory partition and the
//! place in its outbox. For an order the sequence is the order's own, not that of its entry, so that it says the truth
//! wherever a batch is cut: up to here everything of this shard stands in the topic.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use rdkafka::message::{BorrowedHeaders, Header, Headers, OwnedHeaders};
use seckill_domain::{Millis, OrderId, OrderRecord, OutboxId, Quantity, SaleId, SaleTerms, Shard, Uid};
use seckill_ledger::outbox::{self, Changed, Event, SaleChange};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The format version that this release writes and reads.
const VERSION: u32 = 1;

pub(super) const ORDER: &str = "seckill.order.accepted";
pub(super) const MARK: &str = "seckill.mark";
const UNREADABLE: &str = "seckill.unreadable";
const DESCRIBED: &str = "seckill.sale.described";
const CHANGED: &str = "seckill.sale.changed";

const TYPE_HEADER: &str = "ce_type";
const OUTBOX_HEADER: &str = "seckill_outbox";
const TRACE_HEADER: &str = "traceparent";

/// Different terms that are kept parsed: those of the sales that sell at the same time. 300 bytes each.
const MAX_TERMS: usize = 1024;

#[derive(Serialize, Deserialize)]
struct OrderContent<'a> {
    v: u32,
    order_id: OrderId,
    #[serde(borrow)]
    uid: Cow<'a, str>,
    #[serde(borrow)]
    sale_id: Cow<'a, str>,
    quantity: u32,
    accepted_at: Millis,
    #[serde(borrow)]
    terms: &'a RawValue,
}

#[derive(Serialize, Deserialize)]
struct UnreadableContent<'a> {
    v: u32,
    reason: Cow<'a, str>,
    raw: Cow<'a, str>,
}

/// Writes records; neighbouring orders mostly have the same terms, which are then written once.
pub(super) struct Writer {
    source: String,
    terms: Option<(Arc<SaleTerms>, Box<RawValue>)>,
}

/// One record, to be sent.
pub(super) struct Outgoing {
    pub(super) key: Option<Vec<u8>>,
    pub(super) content: Option<Vec<u8>>,
    pub(super) headers: OwnedHeaders,
}

impl Writer {
    /// `source` names the ledger the records come from.
    pub(super) fn new(source: String) -> Writer {
        Writer { source, terms: None }
    }

    pub(super) fn order(
        &mut self,
        partition: u8,
        epoch: u64,
        order: &OrderRecord,
    ) -> Result<Outgoing, serde_json::Error> {
        let terms = match &self.terms {
            Some((known, raw)) if Arc::ptr_eq(known, &order.terms) => raw,
            _ => {
                let raw = serde_json::value::to_raw_value(&*order.terms)?;
                &self.terms.insert((Arc::clone(&order.terms), raw)).1
            }
        };
        let content = OrderContent {
            v: VERSION,
            order_id: order.order_id,
            uid: order.uid.as_str().into(),
            sale_id: order.sale_id.as_str().into(),
            quantity: order.quantity.get(),
            accepted_at: order.accepted_at,
            terms,
        };
        let content = serde_json::to_vec(&content)?;
        let id = OutboxId { epoch, seq: order.order_id.seq() };
        let order_id = order.order_id.to_string();
        let mut headers = self.headers(ORDER, &order_id, Some(order.accepted_at), partition, id);
        if let Some(trace) = &order.traceparent {
            headers = headers.insert(Header { key: TRACE_HEADER, value: Some(&**trace) });
        }
        Ok(Outgoing { key: Some(order.uid.as_str().into()), content: Some(content), headers })
    }

    pub(super) fn mark(&self, partition: u8, shard: Shard, id: OutboxId, at: Millis) -> Outgoing {
        let name = format!("mark-{partition}-{shard}-{id}");
        Outgoing { key: None, content: None, headers: self.headers(MARK, &name, Some(at), partition, id) }
    }

    pub(super) fn unreadable(
        &self,
        partition: u8,
        id: OutboxId,
        at: Option<Millis>,
        entry: &outbox::Unreadable,
    ) -> Result<Outgoing, serde_json::Error> {
        let content =
            UnreadableContent { v: VERSION, reason: (&*entry.reason).into(), raw: (&*entry.raw).into() };
        let headers = self.headers(UNREADABLE, &format!("unreadable-{partition}-{id}"), at, partition, id);
        Ok(Outgoing { key: None, content: Some(serde_json::to_vec(&content)?), headers })
    }

    pub(super) fn described(
        &self,
        partition: u8,
        id: OutboxId,
        at: Option<Millis>,
        spec: &seckill_domain::SaleSpec,
    ) -> Result<Outgoing, serde_json::Error> {
        #[derive(Serialize)]
        struct Content<'a> {
            v: u32,
            sale: &'a seckill_domain::SaleSpec,
        }
        let content = serde_json::to_vec(&Content { v: VERSION, sale: spec })?;
        Ok(self.about_sale(DESCRIBED, partition, id, at, &spec.sale_id, content))
    }

    pub(super) fn changed(
        &self,
        partition: u8,
        id: OutboxId,
        at: Option<Millis>,
        change: &SaleChange,
    ) -> Result<Outgoing, serde_json::Error> {
        let mut content = serde_json::json!({ "v": VERSION, "sale_id": change.sale_id });
        match change.what {
            Changed::State(state) => content["state"] = serde_json::to_value(state)?,
            Changed::Stock(delta) => content["stock_delta"] = delta.into(),
            Changed::Reclaimed(orders) => content["reclaimed_orders"] = orders.into(),
        }
        let content = serde_json::to_vec(&content)?;
        Ok(self.about_sale(CHANGED, partition, id, at, &change.sale_id, content))
    }

    fn about_sale(
        &self,
        kind: &str,
        partition: u8,
        id: OutboxId,
        at: Option<Millis>,
        sale_id: &SaleId,
        content: Vec<u8>,
    ) -> Outgoing {
        let headers = self.headers(kind, &format!("sale-{partition}-{id}"), at, partition, id);
        Outgoing { key: Some(sale_id.as_str().into()), content: Some(content), headers }
    }

    /// CloudEvents 1.0, Kafka protocol binding, binary content mode.
    fn headers(
        &self,
        kind: &str,
        id: &str,
        at: Option<Millis>,
        partition: u8,
        outbox: OutboxId,
    ) -> OwnedHeaders {
        let outbox = format!("{partition}/{outbox}");
        let mut headers = OwnedHeaders::new_with_capacity(8)
            .insert(Header { key: "ce_specversion", value: Some("1.0") })
            .insert(Header { key: TYPE_HEADER, value: Some(kind) })
            .insert(Header { key: "ce_source", value: Some(&self.source) })
            .insert(Header { key: "ce_id", value: Some(id) })
            .insert(Header { key: OUTBOX_HEADER, value: Some(&outbox) });
        if let Some(at) = at {
            headers = headers.insert(Header { key: "ce_time", value: Some(&at.to_string()) });
        }
        if kind != MARK {
            headers = headers.insert(Header { key: "content-type", value: Some("application/json") });
        }
        headers
    }
}

/// What a record of the orders topic says.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Incoming {
    Order { order: OrderRecord, partition: u8, mark: OutboxId },
    Mark { partition: u8, mark: OutboxId },
}

/// The parts of a record that count.
pub(super) struct Parts<'a> {
    pub(super) shard: Shard,
    pub(super) kind: Option<&'a [u8]>,
    pub(super) outbox: Option<&'a [u8]>,
    pub(super) traceparent: Option<&'a [u8]>,
    pub(super) key: Option<&'a [u8]>,
    pub(super) content: Option<&'a [u8]>,
}

impl<'a> Parts<'a> {
    pub(super) fn of(
        shard: Shard,
        key: Option<&'a [u8]>,
        content: Option<&'a [u8]>,
        headers: Option<&'a BorrowedHeaders>,
    ) -> Parts<'a> {
        let mut parts = Parts { shard, kind: None, outbox: None, traceparent: None, key, content };
        for header in headers.iter().flat_map(|headers| headers.iter()) {
            match header.key {
                TYPE_HEADER => parts.kind = header.value,
                OUTBOX_HEADER => parts.outbox = header.value,
                TRACE_HEADER => parts.traceparent = header.value,
                _ => {}
            }
        }
        parts
    }

    /// What is kept of a record that cannot be read, so that a later release can read it again.
    pub(super) fn raw(&self) -> String {
        let text = |bytes: Option<&[u8]>| bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let raw = Raw {
            kind: text(self.kind),
            outbox: text(self.outbox),
            traceparent: text(self.traceparent),
            key: text(self.key),
            content: text(self.content),
        };
        serde_json::to_string(&raw).unwrap_or_default()
    }
}

#[derive(Serialize, Deserialize)]
struct Raw {
    kind: Option<String>,
    outbox: Option<String>,
    traceparent: Option<String>,
    key: Option<String>,
    content: Option<String>,
}

/// Reads a record that was set aside again: the orders it holds.
pub(super) fn read_raw(shard: Shard, raw: &str) -> Result<Vec<OrderRecord>, String> {
    let raw: Raw =
        serde_json::from_str(raw).map_err(|error| format!("not the parts of a record: {error}"))?;
    let content = raw.content.as_deref().map(str::as_bytes);
    if raw.kind.as_deref() == Some(UNREADABLE) {
        let entry: UnreadableContent<'_> =
            serde_json::from_slice(content.unwrap_or_default()).map_err(|error| error.to_string())?;
        let outbox = raw.outbox.as_deref().map(str::as_bytes);
        let (_, id) = outbox.and_then(parse_outbox).ok_or("no outbox id, or an impossible one")?;
        return match outbox::parse_raw(id, &entry.raw)? {
            Event::Orders(orders) => Ok(orders),
            Event::Released { .. } | Event::Sale(_) | Event::SaleChanged(_) | Event::Epoch(_) => {
                Ok(Vec::new())
            }
        };
    }
    let parts = Parts {
        shard,
        kind: raw.kind.as_deref().map(str::as_bytes),
        outbox: raw.outbox.as_deref().map(str::as_bytes),
        traceparent: raw.traceparent.as_deref().map(str::as_bytes),
        key: raw.key.as_deref().map(str::as_bytes),
        content,
    };
    match Reader::default().read(&parts)? {
        Incoming::Order { order, .. } => Ok(vec![order]),
        Incoming::Mark { .. } => Ok(Vec::new()),
    }
}

/// Reads records. Orders of one sale share their terms, so that a batch of them is stored as one.
#[derive(Default)]
pub(super) struct Reader {
    terms: HashMap<Box<str>, Arc<SaleTerms>>,
    sales: HashMap<Box<str>, SaleId>,
}

impl Reader {
    /// Reads a record, or says why it cannot be.
    pub(super) fn read(&mut self, parts: &Parts<'_>) -> Result<Incoming, String> {
        let (partition, mark) =
            parts.outbox.and_then(parse_outbox).ok_or("no outbox id, or an impossible one")?;
        match parts.kind {
            Some(kind) if kind == ORDER.as_bytes() => {
                let order = self.order(parts)?;
                if order.order_id.seq() != mark.seq {
                    return Err(format!("order {} with the outbox id {mark}", order.order_id));
                }
                Ok(Incoming::Order { order, partition, mark })
            }
            Some(kind) if kind == MARK.as_bytes() => Ok(Incoming::Mark { partition, mark }),
            Some(kind) if kind == UNREADABLE.as_bytes() => {
                let content =
                    serde_json::from_slice::<UnreadableContent<'_>>(parts.content.unwrap_or_default());
                Err(content.map_or_else(|error| error.to_string(), |entry| entry.reason.into_owned()))
            }
            Some(kind) => Err(format!("type {:?}", String::from_utf8_lossy(kind))),
            None => Err("no type".to_owned()),
        }
    }

    fn order(&mut self, parts: &Parts<'_>) -> Result<OrderRecord, String> {
        #[derive(Deserialize)]
        struct Version {
            v: u32,
        }
        let content = parts.content.ok_or("no content")?;
        let order: OrderContent<'_> = match serde_json::from_slice(content) {
            Ok(order) => order,
            // A later version may lack what this one needs: say that, not which field is missing.
            Err(error) => {
                return Err(match serde_json::from_slice::<Version>(content) {
                    Ok(version) if version.v != VERSION => format!("format version {}", version.v),
                    _ => format!("not an order: {error}"),
                });
            }
        };
        if order.v != VERSION {
            return Err(format!("format version {}", order.v));
        }
        let uid = Uid::new(&order.uid).map_err(|error| error.to_string())?;
        if parts.key != Some(uid.as_str().as_bytes()) {
            return Err("the key is not the order's user".to_owned());
        }
        let table = order.order_id.table();
        if table != uid.table() {
            return Err(format!("order {} is not in its user's table", order.order_id));
        }
        if table.shard() != parts.shard {
            return Err(format!("order {} belongs to shard {}", order.order_id, table.shard()));
        }
        let traceparent = parts.traceparent.and_then(|trace| std::str::from_utf8(trace).ok()).map(Box::from);
        Ok(OrderRecord {
            order_id: order.order_id,
            sale_id: self.sale(&order.sale_id)?,
            quantity: Quantity::new(order.quantity).map_err(|error| error.to_string())?,
            terms: self.terms(order.terms.get())?,
            accepted_at: order.accepted_at,
            uid,
            traceparent,
        })
    }

    fn terms(&mut self, text: &str) -> Result<Arc<SaleTerms>, String> {
        if let Some(terms) = self.terms.get(text) {
            return Ok(Arc::clone(terms));
        }
        let terms: Arc<SaleTerms> =
            Arc::new(serde_json::from_str(text).map_err(|error| format!("terms: {error}"))?);
        if self.terms.len() >= MAX_TERMS {
            self.terms.clear();
        }
        self.terms.insert(Box::from(text), Arc::clone(&terms));
        Ok(terms)
    }

    fn sale(&mut self, text: &str) -> Result<SaleId, String> {
        if let Some(sale) = self.sales.get(text) {
            return Ok(sale.clone());
        }
        let sale = SaleId::new(text).map_err(|error| error.to_string())?;
        if self.sales.len() >= MAX_TERMS {
            self.sales.clear();
        }
        self.sales.insert(Box::from(text), sale.clone());
        Ok(sale)
    }
}

fn parse_outbox(bytes: &[u8]) -> Option<(u8, OutboxId)> {
    let (partition, id) = std::str::from_utf8(bytes).ok()?.split_once('/')?;
    // A partition is one digit of an order id.
    let partition = partition.parse().ok().filter(|partition| *partition <= 9)?;
    Some((partition, id.parse().ok()?))
}
