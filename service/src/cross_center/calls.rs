//! The calls between centers: paths, bodies, answers. All are `POST` with JSON, signed with a session's key.
//!
//! A release understands the answers of the next one as far as it has words for them: what it cannot read, it
//! takes for an unknown outcome.

use seckill_domain::{
    CenterId, CenterNumber, KeyDigest, Millis, OrderId, OutboxId, Quantity, SaleId, Shard, Uid,
};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::orders::{AuditOrder, Fenced, ServerStanding, ShardRow};

/// Opens a session; signed with a long-term key.
pub const SESSIONS: &str = "/internal/v1/sessions";
/// Decides a batch of purchases: [`ReserveCall`], [`ReserveAnswer`].
pub const RESERVE: &str = "/internal/v1/reserve";
/// Gives units back: [`ReleaseCall`], [`ReleaseAnswer`].
pub const RELEASE: &str = "/internal/v1/release";
/// Claims orders again that a shift lost: [`ReclaimCall`], [`ReclaimAnswer`].
pub const RECLAIM: &str = "/internal/v1/reclaim";
/// How far the center has stored the outbox: no body, [`OutboxAnswer`].
pub const OUTBOX: &str = "/internal/v1/outbox";

/// What the center's order database holds of a sale: [`SaleCall`], [`SaleAnswer`].
pub const SALE: &str = "/internal/v1/orders/sale";
/// A page of the order tables, for the audit: [`AuditRowsCall`], [`AuditRowsAnswer`].
pub const AUDIT_ROWS: &str = "/internal/v1/audit/rows";
/// Some orders, for the audit: [`AuditOrdersCall`], [`AuditOrdersAnswer`].
pub const AUDIT_ORDERS: &str = "/internal/v1/audit/orders";
/// What was set aside because it cannot be read: no body, [`AuditUnreadableAnswer`].
pub const AUDIT_UNREADABLE: &str = "/internal/v1/audit/unreadable";

/// What became of orders of a saved tail, to be written down where they are at home: [`PutBack`](crate::orders::PutBack),
/// [`PutBackDone`](crate::orders::PutBackDone).
pub const RESTORE: &str = "/internal/v1/orders/restore";

/// How the center's Kafka queue stands, for the audit: no body, [`AuditQueueAnswer`].
pub const AUDIT_QUEUE: &str = "/internal/v1/audit/queue";
/// What the center's order database says of shards, or that it lets go of them: [`ShardsCall`], [`ShardsAnswer`].
pub const SHARDS: &str = "/internal/v1/shards";

/// Rows in a page of order tables at most: some 700 KB with the longest ids.
pub const MAX_AUDIT_ROWS: u32 = 4096;
/// Orders asked for at once at most.
pub const MAX_AUDIT_ORDERS: usize = 500;

/// Purchases, releases or claims in one call at most: what the ledger takes.
pub const MAX_ENTRIES: usize = seckill_ledger::MAX_BATCH;
/// The largest body of a call: [`MAX_ENTRIES`] entries of the longest user ids and trace contexts, and room.
pub const MAX_BODY_BYTES: usize = 512 * 1024;

/// A question about shards that are to move away from the center that is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardsCall {
    /// The shards.
    pub shards: Vec<Shard>,
    /// The center that takes them.
    pub to: CenterId,
    /// Whether to let go of them; otherwise nothing changes.
    #[serde(default)]
    pub fence: Option<FenceCall>,
}

/// To let go of shards (O1).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceCall {
    /// The number of the attempt, which the topology shows as running.
    pub attempt: i64,
    /// What the other center's database had written, which is to be waited for first.
    pub after: String,
}

/// The answer to a [`ShardsCall`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardsAnswer {
    /// Nothing was changed.
    Standing(Box<ShardsStanding>),
    /// Nobody writes their orders in this database any more.
    Fenced(Fenced),
    /// Nothing was changed, for this reason.
    Refused(String),
}

/// How a center's order database stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardsStanding {
    /// Its server; nothing for SQLite.
    pub server: Option<ServerStanding>,
    /// Who owns what.
    pub rows: Vec<ShardRow>,
    /// Up to where it has stored each partition's outbox.
    pub stored: Vec<(u8, OutboxId)>,
    /// What it has written by now, to be waited for.
    pub written: String,
}

/// Purchases of one sale, decided as if the callers stood in front of the master's own listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReserveCall {
    /// The sale.
    pub sale_id: SaleId,
    /// How long the callers still wait, ms, counted from the moment when the call was sent.
    pub deadline_ms: u64,
    /// The purchases.
    pub entries: Vec<ReserveLine>,
}

/// One purchase: user, digest of the key, quantity, number of the buyer's home center, trace context.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReserveLine(pub Uid, pub WireKey, pub Quantity, pub CenterNumber, pub Option<Box<str>>);

/// The digest of an idempotency key as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WireKey(pub KeyDigest);

impl Serialize for WireKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 32];
        for (pair, byte) in text.chunks_exact_mut(2).zip(self.0) {
            pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
        serializer.serialize_str(std::str::from_utf8(&text).map_err(serde::ser::Error::custom)?)
    }
}

impl<'de> Deserialize<'de> for WireKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(KeyText)
    }
}

/// Reads a [`WireKey`] where it stands: a batch has hundreds of them.
struct KeyText;

impl serde::de::Visitor<'_> for KeyText {
    type Value = WireKey;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key's digest, 32 hexadecimal digits")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<WireKey, E> {
        let invalid = || E::invalid_value(serde::de::Unexpected::Str(text), &self);
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let mut digest = KeyDigest::default();
        if text.len() != 2 * digest.len() {
            return Err(invalid());
        }
        for (byte, pair) in digest.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let (high, low) = digit(pair[0]).zip(digit(pair[1])).ok_or_else(invalid)?;
            *byte = high << 4 | low;
        }
        Ok(WireKey(digest))
    }
}

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReserveAnswer {
    /// For each entry, in order.
    pub outcomes: Vec<ReserveOutcome>,
    /// Where the stock stood when the sale was seen sold out: the caller's marker is worth this much (M3).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sold_out: Option<SoldOutMark>,
}

/// Where a sale's stock stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoldOutMark {
    /// The last entry in the outbox at that moment.
    pub outbox: OutboxId,
    /// How often stock had come back.
    pub revision: u64,
}

/// What became of one purchase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReserveOutcome {
    /// Accepted, and as durable as the master's own acknowledgements.
    Accepted(OrderId),
    /// As `Accepted`, by an earlier call under the same key.
    Replayed(OrderId),
    /// The key was used with another quantity.
    KeyReused,
    /// There is no such sale.
    SaleNotFound,
    /// The sale is halted.
    Paused,
    /// The sale has not begun.
    NotStarted {
        /// When it does.
        starts_at: Millis,
        /// Seconds until then.
        retry_after_s: u64,
    },
    /// The sale is over.
    Ended,
    /// The user would hold too much.
    LimitExceeded,
    /// Nothing is left.
    SoldOut,
    /// Less is left than asked.
    InsufficientStock {
        /// What is left.
        remaining: u64,
    },
    /// The master's lanes are full. Nothing happened.
    Overloaded,
    /// The master may not write now. Nothing happened.
    NoAuthority(String),
    /// The master moves, or has moved. Nothing happened; whoever asks holds it and asks the next master.
    Shifting,
    /// The ledger has no room. Nothing happened.
    LedgerFull,
    /// Nothing happened, for another reason.
    NotExecuted,
    /// The ledger has it, but it is not confirmed to survive. Nobody knows whether it will turn out accepted.
    NotReplicated,
    /// Nobody knows whether it was accepted.
    Unknown,
}

/// Orders of one sale whose units are given back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseCall {
    /// The sale.
    pub sale_id: SaleId,
    /// The orders and their users.
    pub orders: Vec<(OrderId, Uid)>,
}

/// What became of each release, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseAnswer {
    /// For each order.
    pub outcomes: Vec<ReleaseOutcome>,
    /// The epoch, while the master is degraded: the caller keeps its records and sends them again at the next (K4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_at: Option<u64>,
}

/// What became of one release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseOutcome {
    /// The units are on sale again.
    Released,
    /// They were given back before.
    AlreadyReleased,
    /// The ledger holds no such claim.
    Unknown,
}

/// Orders of one sale that a shift lost and whose units are to be claimed again (H6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimCall {
    /// The sale.
    pub sale_id: SaleId,
    /// The orders.
    pub orders: Vec<ReclaimLine>,
}

/// One of them: order, user, quantity, digest of the key (zeros if it is not known).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimLine(pub OrderId, pub Uid, pub Quantity, pub WireKey);

/// What became of each claim, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimAnswer {
    /// For each order.
    pub outcomes: Vec<ReclaimOutcome>,
    /// The epoch, while the master is degraded: the caller asks again at the next (K4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_at: Option<u64>,
}

/// What became of one claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReclaimOutcome {
    /// Its units are claimed again.
    Claimed,
    /// The ledger knows the order.
    Held,
    /// The user holds another order that was bought under the same key.
    OtherOrder,
    /// The user would hold too much.
    Limit,
    /// Not enough is left.
    NotEnough,
    /// The ledger has no such sale.
    NoSale,
    /// The sale is archived: its claims are gone.
    Archived,
}

/// Up to where a center has stored each partition's outbox in its order database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutboxAnswer {
    /// By partition.
    pub stored: Vec<(u8, OutboxId)>,
}

/// Asks what a center's order database holds of a sale.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaleCall {
    /// The sale.
    pub sale_id: SaleId,
}

/// What keeps a sale from being archived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaleAnswer {
    /// Up to where each partition's outbox is stored, in the same picture as the counts.
    pub stored: Vec<(u8, OutboxId)>,
    /// Orders that are neither paid nor closed.
    pub open: u64,
    /// Orders whose units are on their way back to the ledger.
    pub releasing: u64,
}

/// Asks for the rows behind a place in the order tables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRowsCall {
    /// The table to begin in.
    pub from: u16,
    /// The table before which to end.
    pub until: u16,
    /// The order id in the first table behind which to begin; empty: at its beginning.
    pub after: String,
    /// Only orders of this sale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sale_id: Option<SaleId>,
}

/// At most [`MAX_AUDIT_ROWS`] rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditRowsAnswer {
    /// Orders, by the number of the table that they are in.
    pub tables: Vec<(u16, Vec<AuditOrder>)>,
    /// Rows that are no orders.
    pub unreadable: Vec<UnreadableRow>,
    /// Table and order id to go on with; absent at the end.
    pub next: Option<(u16, String)>,
    /// Whether the database may replicate those of other centers, and hold copies of their orders.
    pub copies: bool,
}

/// A row that is no order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnreadableRow {
    /// The table.
    pub table: u16,
    /// What its `order_id` says.
    pub order_id: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Asks for orders, at most [`MAX_AUDIT_ORDERS`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditOrdersCall {
    /// The orders.
    pub orders: Vec<OrderId>,
}

/// What became of some orders; read in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditOrdersAnswer {
    /// Those that are stored.
    pub orders: Vec<AuditOrder>,
    /// Those whose units the ledger has not taken back yet.
    pub releasing: Vec<OrderId>,
}

/// What was set aside because it cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditUnreadableAnswer {
    /// How much.
    pub count: u64,
    /// The newest of it: where it came from, and what is wrong with it.
    pub entries: Vec<(String, String)>,
}

/// How a center's consumer stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditQueueAnswer {
    /// Records in the center's partitions that are not stored, as its consumer last saw them; absent before it has
    /// looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag: Option<u64>,
    /// Partitions that stand still because the brokers do not have their next record any more.
    pub lost: Vec<u8>,
    /// What it waits for.
    pub waiting: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_survives_the_wire() {
        let line = |traceparent: Option<&str>| {
            ReserveLine(
                Uid::new("a\"b\\c").unwrap(),
                WireKey([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]),
                Quantity::ONE,
                CenterNumber::new(2).unwrap(),
                traceparent.map(Box::from),
            )
        };
        let call = ReserveCall {
            sale_id: SaleId::new("s").unwrap(),
            deadline_ms: 1500,
            entries: vec![line(None), line(Some("00-x"))],
        };
        let text = serde_json::to_string(&call).unwrap();
        assert!(text.contains(r#"["a\"b\\c","000102030405060708090a0b0c0d0eff",1,2,null]"#), "{text}");
        assert_eq!(serde_json::from_str::<ReserveCall>(&text).unwrap(), call);
        for bad in ["", "00", "+0102030405060708090a0b0c0d0eff0", "zz0102030405060708090a0b0c0d0eff"] {
            assert!(serde_json::from_value::<WireKey>(bad.into()).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_largest_batch_fits_into_a_body() {
        let line = ReserveLine(
            Uid::new(&"\\".repeat(128)).unwrap(),
            WireKey([255; 16]),
            Quantity::ONE,
            CenterNumber::new(8).unwrap(),
            Some("0".repeat(55).into()),
        );
        let sale_id = SaleId::new(&"s".repeat(48)).unwrap();
        let call = ReserveCall { sale_id, deadline_ms: u64::MAX, entries: vec![line; MAX_ENTRIES] };
        assert!(serde_json::to_vec(&call).unwrap().len() < MAX_BODY_BYTES);
        let order_id = "8511999999999999999".parse().unwrap();
        let orders = call
            .entries
            .into_iter()
            .map(|ReserveLine(uid, key, quantity, ..)| ReclaimLine(order_id, uid, quantity, key));
        let call = ReclaimCall { sale_id: call.sale_id, orders: orders.collect() };
        assert!(serde_json::to_vec(&call).unwrap().len() < MAX_BODY_BYTES);
    }
}
