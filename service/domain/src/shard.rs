//! Where a user's orders live: one of 512 tables, grouped into 64 shards.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Number of order tables (`orders_000` … `orders_511`).
pub const TABLES: u16 = 512;
/// Number of shards: units of user data that move between centers whole.
pub const SHARDS: u8 = 64;

/// One of the 512 order tables: `crc32(uid) % 512`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Table(u16);

impl Table {
    /// The table of a user id (CRC-32/ISO-HDLC, as in zlib, over the id's bytes).
    pub fn of_uid(uid: &str) -> Table {
        // The remainder of 512 is below 512.
        Table((crc32fast::hash(uid.as_bytes()) % u32::from(TABLES)) as u16)
    }

    /// A table by number, if there is one.
    pub fn new(number: u16) -> Option<Table> {
        (number < TABLES).then_some(Table(number))
    }

    /// The table's number, 0–511.
    pub fn number(self) -> u16 {
        self.0
    }

    /// The shard that this table belongs to: `table % 64`, so that moving a shard never splits a table.
    pub fn shard(self) -> Shard {
        Shard((self.0 % u16::from(SHARDS)) as u8)
    }

    /// All tables in order.
    pub fn all() -> impl Iterator<Item = Table> {
        (0..TABLES).map(Table)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:03}", self.0)
    }
}

/// One of the 64 shards of user data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Shard(u8);

impl Shard {
    /// A shard by number, if there is one.
    pub fn new(number: u8) -> Option<Shard> {
        (number < SHARDS).then_some(Shard(number))
    }

    /// The shard's number, 0–63.
    pub fn number(self) -> u8 {
        self.0
    }

    /// All shards in order.
    pub fn all() -> impl Iterator<Item = Shard> {
        (0..SHARDS).map(Shard)
    }

    /// The eight tables of this shard.
    pub fn tables(self) -> impl Iterator<Item = Table> {
        (0..TABLES / u16::from(SHARDS)).map(move |n| Table(n * u16::from(SHARDS) + u16::from(self.0)))
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_follow_the_published_crc32() {
        // zlib.crc32(b"123456789") == 0xCBF43926, the check value of CRC-32/ISO-HDLC.
        assert_eq!(Table::of_uid("123456789").number(), (0xCBF4_3926_u32 % 512) as u16);
    }

    #[test]
    fn every_table_is_in_exactly_one_shard() {
        let mut seen = [0u8; TABLES as usize];
        for shard in Shard::all() {
            for table in shard.tables() {
                assert_eq!(table.shard(), shard);
                seen[usize::from(table.number())] += 1;
            }
        }
        assert!(seen.iter().all(|n| *n == 1));
    }
}
