//! What the order workers count.

use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

/// Counters and gauges of the order store and its workers. Cheap to clone; all clones count together.
#[derive(Debug, Clone, Default)]
pub struct OrderMetrics {
    /// Orders stored.
    pub stored: Counter,
    /// Orders that were stored before.
    pub duplicates: Counter,
    /// Outbox entries that could not be read and were set aside.
    pub unreadable: Counter,
    /// Orders that expired.
    pub expired: Counter,
    /// Orders cancelled by their buyers.
    pub cancelled: Counter,
    /// Orders of a saved tail that were missing and were stored (H6).
    pub put_back: Counter,
    /// Orders that were cancelled because their claim is lost: by a replayed tail or an adoption.
    pub accepted_loss: Counter,
    /// Orders paid.
    pub paid: Counter,
    /// Payments that came too late.
    pub refunds: Counter,
    /// Releases that the ledger answered.
    pub released: Counter,
    /// Releases of claims that the ledger does not hold.
    pub release_unknown: Counter,
    /// Releases that wait, as of the last look.
    pub releases_pending: Gauge,
    /// Age of the oldest outbox entry that is not stored, as of the last page.
    pub lag_seconds: Gauge<f64, AtomicU64>,
    /// Entries between the stored position and the end of the outbox, as of the last page.
    pub lag_entries: Gauge<i64, AtomicI64>,
    /// Outbox entries dropped.
    pub trimmed: Counter,
    /// Errors of the workers that were followed by another attempt.
    pub retries: Counter,
}

impl OrderMetrics {
    /// Registers all of them; the registry's owner sets the prefix.
    pub fn register(&self, registry: &mut Registry) {
        let orders = registry.sub_registry_with_prefix("orders");
        orders.register("stored", "Orders stored", self.stored.clone());
        orders.register("duplicates", "Orders that were stored before", self.duplicates.clone());
        orders.register("unreadable", "Outbox entries set aside as unreadable", self.unreadable.clone());
        orders.register("expired", "Orders that expired unpaid", self.expired.clone());
        orders.register("cancelled", "Orders cancelled by their buyers", self.cancelled.clone());
        orders.register("put_back", "Missing orders stored from a saved tail", self.put_back.clone());
        orders.register(
            "accepted_loss",
            "Orders cancelled because their claim is lost",
            self.accepted_loss.clone(),
        );
        orders.register("paid", "Orders paid", self.paid.clone());
        orders.register("refunds", "Payments that came too late", self.refunds.clone());
        orders.register("released", "Releases that the ledger answered", self.released.clone());
        orders.register("release_unknown", "Releases of unknown claims", self.release_unknown.clone());
        orders.register(
            "releases_pending",
            "Releases that wait for the ledger",
            self.releases_pending.clone(),
        );
        orders.register_with_unit(
            "outbox_lag",
            "Age of the oldest outbox entry that is not stored",
            Unit::Seconds,
            self.lag_seconds.clone(),
        );
        orders.register("outbox_lag_entries", "Outbox entries that are not stored", self.lag_entries.clone());
        orders.register("outbox_trimmed", "Outbox entries dropped", self.trimmed.clone());
        orders.register("worker_retries", "Failed attempts of the order workers", self.retries.clone());
    }
}
