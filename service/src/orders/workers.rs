//! The tasks around the store.

use seckill_domain::OutboxId;

/// How the workers pace themselves.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Orders in one transaction at most, roughly: whole outbox entries are stored together.
    pub store_batch: usize,
    /// How often due orders are looked for.
    pub expiry_interval_ms: u64,
    /// What an order gets that came due while the service was away.
    pub expiry_grace_s: u32,
    /// How often waiting releases are delivered.
    pub release_interval_ms: u64,
    /// Outbox entries younger than this stay.
    pub outbox_retention_s: u32,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        WorkerOptions {
            store_batch: 4096,
            expiry_interval_ms: 1000,
            expiry_grace_s: 120,
            release_interval_ms: 100,
            outbox_retention_s: 3600,
        }
    }
}

/// How the tailer of one partition stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TailerStatus {
    /// It has not read anything yet.
    Starting,
    /// It follows the outbox.
    Following {
        /// Up to where entries are stored.
        position: OutboxId,
    },
    /// It does not read on until this is over; it tries again by itself.
    Waiting {
        /// What it waits for.
        reason: String,
    },
    /// The database has stored entries that the ledger does not have: the ledger was rolled back (F2). Sales have
    /// to stop until `seckill ledger adopt`.
    RolledBack {
        /// Up to where entries are stored.
        position: OutboxId,
        /// The ledger's last entry.
        ledger: OutboxId,
    },
}
