//! Identifiers, each with the one place that parses it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::shard::Table;

/// Why an identifier was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// Not a user id.
    #[error("a user id is 1 to 128 visible ASCII characters")]
    Uid,
    /// Not a sale id.
    #[error("a sale id is 1 to 48 characters out of a-z, 0-9 and '-'")]
    SaleId,
    /// Not an order id.
    #[error("an order id is 19 decimal digits")]
    OrderId,
    /// Not an idempotency key.
    #[error("an idempotency key is 1 to 64 visible ASCII characters")]
    IdempotencyKey,
    /// Not a center id.
    #[error("a center id is 1 to 16 characters out of a-z, 0-9 and '-'")]
    CenterId,
    /// Not a center number.
    #[error("a center number is 1 to 8")]
    CenterNumber,
    /// Not an outbox id.
    #[error("an outbox id is EPOCH-SEQUENCE")]
    OutboxId,
}

fn visible_ascii(text: &str, max: usize) -> bool {
    (1..=max).contains(&text.len()) && text.bytes().all(|byte| (0x21..=0x7e).contains(&byte))
}

fn slug(text: &str, max: usize) -> bool {
    (1..=max).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $error:ident, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Parses the text.
            pub fn new(text: &str) -> Result<$name, InvalidId> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) { Ok($name(Arc::from(text))) } else { Err(InvalidId::$error) }
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                $name::new(text)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&*self.0, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

text_id!(
    /// A user: 1–128 visible ASCII characters, compared byte for byte (`Bob` is not `bob`).
    Uid, Uid, |text| visible_ascii(text, 128)
);
text_id!(
    /// A sale: `[a-z0-9-]{1,48}`.
    SaleId, SaleId, |text| slug(text, 48)
);
text_id!(
    /// A data center: `[a-z0-9-]{1,16}`, such as `a`.
    CenterId, CenterId, |text| slug(text, 16)
);

impl Uid {
    /// The order table of this user.
    pub fn table(&self) -> Table {
        Table::of_uid(&self.0)
    }
}

/// The number of a center, 1–8; the first digit of the order ids of the users at home there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct CenterNumber(u8);

impl CenterNumber {
    /// A center number from 1 to 8.
    pub fn new(number: u8) -> Result<CenterNumber, InvalidId> {
        if (1..=8).contains(&number) { Ok(CenterNumber(number)) } else { Err(InvalidId::CenterNumber) }
    }

    /// The number.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl<'de> Deserialize<'de> for CenterNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        CenterNumber::new(u8::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// The number of the topology's authority; grows with every shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    pub fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }

    /// What an order id shows of it.
    pub fn mod_10000(self) -> u16 {
        (self.0 % 10_000) as u16
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The id of an outbox entry: `epoch-sequence`, ordered by epoch first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct OutboxId {
    /// Epoch of the write.
    pub epoch: u64,
    /// The ledger's sequence after the write.
    pub seq: u64,
}

impl OutboxId {
    /// Before the first entry.
    pub const ZERO: OutboxId = OutboxId { epoch: 0, seq: 0 };
}

impl fmt::Display for OutboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.seq)
    }
}

impl FromStr for OutboxId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (epoch, seq) = text.split_once('-').ok_or(InvalidId::OutboxId)?;
        Ok(OutboxId {
            epoch: epoch.parse().map_err(|_| InvalidId::OutboxId)?,
            seq: seq.parse().map_err(|_| InvalidId::OutboxId)?,
        })
    }
}

impl Serialize for OutboxId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for OutboxId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// An order: 19 decimal digits `C TTT P EEEE SSSSSSSSSS` — home center number at creation (a record of the
/// past, never used for routing), table, inventory partition, epoch mod 10000, sequence. JSON shows a string.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OrderId(u64);

impl OrderId {
    const SEQ_SPAN: u64 = 10_000_000_000;

    /// Puts an order id together. `head` is what [`OrderId::head`] gives, `seq` below 10^10.
    pub fn from_parts(head: u32, seq: u64) -> Option<OrderId> {
        if seq >= OrderId::SEQ_SPAN {
            return None;
        }
        OrderId::from_number(u64::from(head) * OrderId::SEQ_SPAN + seq)
    }

    /// The nine digits before the sequence: center, table, partition, epoch mod 10000.
    pub fn head_of(center: CenterNumber, table: Table, partition: u8, epoch: Epoch) -> u32 {
        debug_assert!(partition <= 9, "a partition is one digit");
        u32::from(center.get()) * 100_000_000
            + u32::from(table.number()) * 100_000
            + u32::from(partition % 10) * 10_000
            + u32::from(epoch.mod_10000())
    }

    /// An order id from its number, if it is one.
    pub fn from_number(number: u64) -> Option<OrderId> {
        let id = OrderId(number);
        (CenterNumber::new(u8::try_from(number / 1_000_000_000_000_000_000).ok()?).is_ok()
            && id.table_number() < crate::shard::TABLES)
            .then_some(id)
    }

    /// The id as a number.
    pub fn number(self) -> u64 {
        self.0
    }

    /// The nine digits before the sequence.
    pub fn head(self) -> u32 {
        (self.0 / OrderId::SEQ_SPAN) as u32
    }

    /// The ten digits of the sequence.
    pub fn seq(self) -> u64 {
        self.0 % OrderId::SEQ_SPAN
    }

    fn table_number(self) -> u16 {
        (self.head() / 100_000 % 1000) as u16
    }

    /// The table that holds the order.
    pub fn table(self) -> Table {
        // Checked by every constructor.
        Table::new(self.table_number()).unwrap_or_else(|| unreachable!("an order id names one of the tables"))
    }

    /// The inventory partition that accepted it.
    pub fn partition(self) -> u8 {
        (self.head() / 10_000 % 10) as u8
    }
}

impl fmt::Display for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:019}", self.0)
    }
}

impl fmt::Debug for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for OrderId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 19 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(InvalidId::OrderId);
        }
        text.parse().ok().and_then(OrderId::from_number).ok_or(InvalidId::OrderId)
    }
}

impl Serialize for OrderId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for OrderId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The first 16 bytes of SHA-256 of an idempotency key: what the ledger remembers of it. Two keys of one user
/// that meet by accident would need about 2^64 purchases by that user.
pub type KeyDigest = [u8; 16];

/// The value of an `Idempotency-Key` header: 1–64 visible ASCII characters. A surrounding pair of quotes is
/// removed, so that the structured-field form of the header works too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey(KeyDigest);

impl IdempotencyKey {
    /// Parses the header's value.
    pub fn new(text: &str) -> Result<IdempotencyKey, InvalidId> {
        let inner = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
        if !visible_ascii(inner, 64) {
            return Err(InvalidId::IdempotencyKey);
        }
        let hash = Sha256::digest(inner.as_bytes());
        let mut digest = [0; 16];
        digest.copy_from_slice(&hash[..16]);
        Ok(IdempotencyKey(digest))
    }

    /// What the ledger remembers of the key.
    pub fn digest(&self) -> &KeyDigest {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_order_id_shows_its_parts() {
        let table = Uid::new("bob").unwrap().table();
        let head = OrderId::head_of(CenterNumber::new(2).unwrap(), table, 3, Epoch(70_004));
        let id = OrderId::from_parts(head, 42).unwrap();
        assert_eq!(id.to_string(), format!("2{table}300040000000042"));
        assert_eq!((id.table(), id.partition(), id.seq(), id.head()), (table, 3, 42, head));
    }

    #[test]
    fn what_is_no_order_id_is_refused() {
        for text in [
            "",
            "1",
            "0000000000000000000",
            "9000000000000000000",
            "1512000000000000000",
            "-100000000000000000",
            "１",
        ] {
            assert_eq!(text.parse::<OrderId>(), Err(InvalidId::OrderId), "{text}");
        }
        assert!(OrderId::from_parts(100_000_000, 10_000_000_000).is_none());
    }

    #[test]
    fn ids_keep_to_their_alphabet() {
        for bad in ["", "../x", "a{b}", "UPPER", "a\0", &"x".repeat(49)] {
            assert!(SaleId::new(bad).is_err(), "{bad:?}");
        }
        for bad in ["", "a b", "a\n", "é", "\u{7f}", &"x".repeat(129)] {
            assert!(Uid::new(bad).is_err(), "{bad:?}");
        }
        assert_ne!(Uid::new("Bob").unwrap(), Uid::new("bob").unwrap());
    }

    #[test]
    fn quotes_around_a_key_are_removed_once() {
        let plain = IdempotencyKey::new("k1").unwrap();
        assert_eq!(IdempotencyKey::new("\"k1\"").unwrap(), plain);
        assert_ne!(IdempotencyKey::new("\"\"k1\"\"").unwrap(), plain);
        assert!(IdempotencyKey::new("\"\"").is_err());
        assert!(IdempotencyKey::new(&"x".repeat(65)).is_err());
        assert!(IdempotencyKey::new(&format!("\"{}\"", "x".repeat(64))).is_ok());
    }

    proptest! {
        #[test]
        fn order_ids_survive_text(center in 1u8..=8, uid in "[!-~]{1,128}", partition in 0u8..=9, epoch: u32, seq in 0u64..10_000_000_000) {
            let head = OrderId::head_of(CenterNumber::new(center).unwrap(), Table::of_uid(&uid), partition, Epoch(epoch.into()));
            let id = OrderId::from_parts(head, seq).unwrap();
            prop_assert_eq!(id.to_string().parse::<OrderId>().unwrap(), id);
            prop_assert_eq!(id.to_string().len(), 19);
        }

        #[test]
        fn outbox_ids_sort_by_epoch_first(a: (u64, u64), b: (u64, u64)) {
            let (x, y) = (OutboxId { epoch: a.0, seq: a.1 }, OutboxId { epoch: b.0, seq: b.1 });
            prop_assert_eq!(x.cmp(&y), a.cmp(&b));
            prop_assert_eq!(x.to_string().parse::<OutboxId>().unwrap(), x);
        }
    }
}
