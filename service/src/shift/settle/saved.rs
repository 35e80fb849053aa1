//! A saved tail, read again: see `docs/two-centers.md`, "The saved tail".

use std::collections::HashMap;
use std::io;
use std::path::Path;

use seckill_domain::{KeyDigest, OrderId, OrderRecord, OutboxId};
use seckill_ledger::outbox::{self, Event};
use serde::Deserialize;
use tokio::fs::File;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};

use crate::cross_center::calls::WireKey;

/// Hexadecimal digits of a claim, and where its key, its order id's head and its sequence are: see `lua/src/keys.rs`.
const CLAIM: usize = 58;
const KEY: std::ops::Range<usize> = 0..32;
const HEAD: std::ops::Range<usize> = 32..40;
const SEQUENCE: std::ops::Range<usize> = 48..58;

/// Why a tail cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    #[error(transparent)]
    File(#[from] io::Error),
    #[error("line {line}: {reason}")]
    Content { line: u64, reason: String },
}

/// An order that only the lost master had.
#[derive(Debug, Clone)]
pub(super) struct LostOrder {
    pub(super) record: OrderRecord,
    /// Digest of the key that it was bought under; zeros if the tail does not say.
    pub(super) key: KeyDigest,
}

/// What an entry of the tail says of orders.
#[derive(Debug)]
pub(super) enum Lost {
    /// They were accepted.
    Orders(Vec<LostOrder>),
    /// Their units were given back.
    Released(Vec<OrderId>),
    /// Nobody knows: this release cannot read it.
    Unreadable(Unreadable),
}

/// A tail, line by line.
pub(super) struct SavedLines {
    lines: Lines<BufReader<File>>,
    line: u64,
    /// The last entry that the master has, too.
    pub(super) common: OutboxId,
    /// The last entry.
    pub(super) last: OutboxId,
}

#[derive(Deserialize)]
struct First {
    kind: String,
    v: u32,
    common: Option<String>,
    last: String,
}

#[derive(Deserialize)]
struct Entry {
    id: String,
    fields: Box<serde_json::value::RawValue>,
    #[serde(default)]
    orders: Vec<Claims>,
}

#[derive(Deserialize)]
struct Claims {
    order_id: OrderId,
    claims: Option<String>,
}

impl SavedLines {
    pub(super) async fn open(path: &Path) -> Result<SavedLines, Unreadable> {
        let lines = BufReader::new(File::open(path).await?).lines();
        let mut saved = SavedLines { lines, line: 0, common: OutboxId::ZERO, last: OutboxId::ZERO };
        let text = saved.line().await?.unwrap_or_default();
        let first: First = saved.parse(&text)?;
        if (first.kind.as_str(), first.v) != ("diverged", 1) {
            return Err(saved.bad(format!("a tail of kind {:?}, version {}", first.kind, first.v)));
        }
        if let Some(common) = &first.common {
            saved.common = saved.id(common)?;
        }
        saved.last = saved.id(&first.last)?;
        Ok(saved)
    }

    /// What the next entry says of orders; none at the end. An entry that cannot be read keeps nobody from the others.
    pub(super) async fn next(&mut self) -> io::Result<Option<Lost>> {
        while let Some(text) = self.line().await? {
            match self.read(&text) {
                Ok(None) => {}
                Ok(Some(lost)) => return Ok(Some(lost)),
                Err(unreadable) => return Ok(Some(Lost::Unreadable(unreadable))),
            }
        }
        Ok(None)
    }

    fn read(&self, text: &str) -> Result<Option<Lost>, Unreadable> {
        let Entry { id, fields, orders } = self.parse(text)?;
        let id = self.id(&id)?;
        match outbox::parse_raw(id, fields.get()).map_err(|reason| self.bad(reason))? {
            Event::Orders(records) => {
                let lost = |record: OrderRecord| {
                    let said = orders.iter().find(|said| said.order_id == record.order_id);
                    let claims = said.and_then(|said| said.claims.as_deref());
                    let key = claims.and_then(|claims| key_of(record.order_id, claims));
                    LostOrder { record, key: key.unwrap_or_default() }
                };
                Ok(Some(Lost::Orders(records.into_iter().map(lost).collect())))
            }
            Event::Released { orders, .. } => Ok(Some(Lost::Released(orders))),
            // What else happened to sales there is the shop's to do again.
            Event::Sale(_) | Event::SaleChanged(_) | Event::Epoch(_) => Ok(None),
        }
    }

    async fn line(&mut self) -> io::Result<Option<String>> {
        self.line += 1;
        self.lines.next_line().await
    }

    fn parse<'t, T: Deserialize<'t>>(&self, text: &'t str) -> Result<T, Unreadable> {
        serde_json::from_str(text).map_err(|error| self.bad(error.to_string()))
    }

    fn id(&self, text: &str) -> Result<OutboxId, Unreadable> {
        text.parse().map_err(|_| self.bad(format!("{text:?} names no entry")))
    }

    fn bad(&self, reason: String) -> Unreadable {
        Unreadable::Content { line: self.line, reason }
    }
}

/// The keys under which the orders of all saved tails in a folder were bought, settled or not. What cannot be read is told
/// and left out: an order is claimed without its key then.
pub(super) async fn keys(folder: &Path) -> HashMap<OrderId, KeyDigest> {
    let mut keys = HashMap::new();
    let files = super::tails(folder).await.map(|(tails, _)| tails).unwrap_or_default();
    for file in files {
        if let Err(error) = add_keys(&file, &mut keys).await {
            tracing::warn!(file = %file.display(), %error, "a saved tail does not tell the keys of its orders");
        }
    }
    keys
}

async fn add_keys(file: &Path, keys: &mut HashMap<OrderId, KeyDigest>) -> Result<(), Unreadable> {
    let mut saved = SavedLines::open(file).await?;
    while let Some(lost) = saved.next().await? {
        let Lost::Orders(orders) = lost else { continue };
        let known = orders.into_iter().filter(|order| order.key != KeyDigest::default());
        keys.extend(known.map(|order| (order.record.order_id, order.key)));
    }
    Ok(())
}

/// The key of an order among the claims that the ledger held of its user, in hexadecimal.
fn key_of(order_id: OrderId, claims: &str) -> Option<KeyDigest> {
    let (head, sequence) = (format!("{:08x}", order_id.head()), format!("{:010x}", order_id.seq()));
    let mut at = 0;
    while let Some(claim) = claims.get(at..at + CLAIM) {
        if claim.get(HEAD) == Some(&head) && claim.get(SEQUENCE) == Some(&sequence) {
            let WireKey(key) = serde_json::from_value(claim.get(KEY)?.into()).ok()?;
            return Some(key);
        }
        at += CLAIM;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_finds_its_key_among_the_claims_of_its_user() {
        let order_id: OrderId = "1007000030000000258".parse().unwrap();
        let claim = |key: u8, head: u32, seq: u64| {
            let key = format!("{key:02x}").repeat(16);
            format!("{key}{head:08x}00000100{seq:010x}")
        };
        let claims = claim(1, order_id.head(), 257) + &claim(2, order_id.head(), 258) + &claim(3, 1, 258);
        assert_eq!(key_of(order_id, &claims), Some([2; 16]));
        assert_eq!(key_of(order_id, &claims[..CLAIM]), None);
        assert_eq!(key_of(order_id, "é"), None);
    }
}
