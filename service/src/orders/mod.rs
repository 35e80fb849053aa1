//! Orders: from the outbox to the order tables, and what becomes of an order there.
//!
//! [`OrderStore`] owns the database: one task writes, a few connections read. [`Workers`] feed it from the local
//! outbox , let unpaid orders expire, give units back to the ledger and
//! drop outbox entries that are stored . [`Updates`] tells whoever waits for an order that it moved.
//!
//! Everything that matters is decided by rows and in one transaction each, so every worker may die between any
//! two lines, and may run twice at the same time.

mod batch;
pub(crate) mod centers;
mod dead_letters;
mod error;
mod expiry;
mod kafka;
mod keeper;
mod metrics;
mod model;
mod put_back;
mod reading;
mod releases;
mod store;
mod tailer;
mod trim;
mod updates;
mod workers;

#[cfg(test)]
mod tests;

pub use batch::{Advance, Origin, Place, StoreBatch, StoreOutcome, Unreadable};
pub use centers::{Homes, OrderCenters, Untold};
pub use dead_letters::{Replay, StillUnreadable, replay};
pub use error::Error;
pub use kafka::{CenterLabel, ConsumerStatus, KafkaMetrics, KafkaOptions, KafkaQueue, RelayStatus};
pub use keeper::{follow_owners, spawn_keeper};
pub use metrics::OrderMetrics;
pub use model::{
    AdminOrder, CancelOutcome, Coupon, Cursor, ExpireOutcome, InvalidCursor, Order, OrderFilter, Page,
    PayOutcome, Payment, PaymentId, Refund, Release, ReleaseReason, SaleCounts, StatusCounts,
};
pub use put_back::{ACCEPTED_LOSS, MAX_PUT_BACK, PutBack, PutBackDone};
pub use store::{
    AuditOrder, AuditRows, Counts, FenceError, Fenced, OrderStore, Owners, ReplicaStatus, ServerStanding,
    ShardRow, StoreOptions, Turned, UnreadableOrder,
};
pub use updates::{Subscription, TooManySubscribers, Updates};
pub(crate) use workers::supervise;
pub use workers::{Queue, TailerStatus, WorkerOptions, Workers};
