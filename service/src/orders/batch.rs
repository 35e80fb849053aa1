//! What a queue hands to the store in one transaction.

use std::fmt;

use seckill_domain::{OrderRecord, OutboxId, Shard};
use serde::{Serialize, Serializer};

/// Orders, and how far they take the queues they came from: one transaction (R2).
#[derive(Debug, Clone, Default)]
pub struct StoreBatch {
    /// The steps of every queue that was read. Each must begin where the database stands, or nothing is stored. At
    /// most one step for a place.
    pub advance: Vec<Advance>,
    /// The orders.
    pub orders: Vec<OrderRecord>,
    /// What could not be read.
    pub unreadable: Vec<Unreadable>,
    /// What was set aside earlier and is settled with this batch, because it was read after all.
    pub settled: Vec<Origin>,
}

impl StoreBatch {
    /// The entries of one partition's outbox after `from` up to `to`.
    pub fn outbox(partition: u8, from: OutboxId, to: OutboxId, orders: Vec<OrderRecord>) -> StoreBatch {
        let advance = vec![Advance::Outbox { partition, from, to }];
        StoreBatch { advance, orders, ..StoreBatch::default() }
    }
}

/// A step of one queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Advance {
    /// The outbox of an inventory partition. It carries every shard's orders: those of shards that another center
    /// owns are counted and left out.
    Outbox {
        /// The partition.
        partition: u8,
        /// Where the database stands.
        from: OutboxId,
        /// The last entry of the batch.
        to: OutboxId,
    },
    /// The Kafka partition of a shard. It carries nothing but that shard's orders: a batch with a step of a shard,
    /// or with an order, that this center does not own is refused with [`NotOwner`](super::Error::NotOwner), so
    /// that nothing is skipped.
    Kafka {
        /// The shard, which is the topic's partition.
        shard: Shard,
        /// Where the database stands: the offset of the first record of the batch, or before it.
        from: i64,
        /// The offset after the last record of the batch.
        to: i64,
        /// Inventory partition and outbox id: with this batch everything of this shard up to there is stored. What
        /// is behind the stored mark changes nothing, because a relay may publish records again.
        outbox: Vec<(u8, OutboxId)>,
    },
}

/// Whose position it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// An inventory partition's outbox.
    Outbox(u8),
    /// A shard's Kafka partition.
    Kafka(Shard),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Outbox(partition) => write!(f, "the outbox of partition {partition}"),
            Place::Kafka(shard) => write!(f, "the Kafka partition of shard {shard}"),
        }
    }
}

/// Where something came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// An entry of an outbox.
    Outbox {
        /// The inventory partition.
        partition: u8,
        /// The entry.
        id: OutboxId,
    },
    /// A record of Kafka.
    Kafka {
        /// The topic's partition.
        shard: Shard,
        /// Its offset.
        offset: i64,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Outbox { partition, id } => write!(f, "outbox entry {id} of partition {partition}"),
            Origin::Kafka { shard, offset } => write!(f, "Kafka record {offset} of partition {shard}"),
        }
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An entry that could not be stored, kept aside with the reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// Where it came from.
    pub origin: Origin,
    /// What is wrong with it.
    pub reason: String,
    /// Its raw content.
    pub raw: String,
}

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreOutcome {
    /// Orders that are new.
    pub stored: u64,
    /// Orders that were stored before.
    pub duplicates: u64,
    /// Orders of shards that another center owns.
    pub foreign: u64,
}
