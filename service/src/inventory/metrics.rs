//! What the lanes and snapshots count.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// A histogram from 0.5 ms to 2 s: between one rack and the bound of a wait.
#[derive(Debug)]
pub struct BarrierSeconds(Histogram);

impl BarrierSeconds {
    pub(super) fn observe(&self, seconds: f64) {
        self.0.observe(seconds);
    }
}

impl Default for BarrierSeconds {
    fn default() -> Self {
        BarrierSeconds(Histogram::new(exponential_buckets(0.0005, 2.0, 13)))
    }
}

/// What a barrier counts.
#[derive(Debug, Default)]
pub struct BarrierMetrics {
    /// How long barriers took whose replicas confirmed, seconds.
    pub seconds: BarrierSeconds,
    /// Writes that wait for the next barrier.
    pub waiting: Gauge,
    /// Barriers after which nobody knew whether the replicas have what was written.
    pub unknown: Counter,
}

/// A histogram from 5 ms to 10 s: a shift holds purchases for some round trips, or until it may no longer.
#[derive(Debug)]
pub struct HeldSeconds(Histogram);

impl HeldSeconds {
    pub(super) fn observe(&self, seconds: f64) {
        self.0.observe(seconds);
    }
}

impl Default for HeldSeconds {
    fn default() -> Self {
        HeldSeconds(Histogram::new(exponential_buckets(0.005, 2.0, 12)))
    }
}

/// Counters, gauges and histograms of the inventory.
#[derive(Debug, Default)]
pub struct InventoryMetrics {
    /// Calls of `reserve`.
    pub batches: Counter,
    /// Purchases in those calls.
    pub batched: Counter,
    /// Calls whose outcome was unknown and that were sent again under the same keys.
    pub unknown: Counter,
    /// Purchases turned away because a lane was full or their deadline had passed.
    pub overloaded: Counter,
    /// Purchases answered by a sold-out marker.
    pub marker_hits: Counter,
    /// Purchases that wait in a lane.
    pub waiting: Gauge,
    /// Purchases that are held because the master moves.
    pub held: Gauge,
    /// How often a purchase was held.
    pub held_total: Counter,
    /// For how long, until it was attempted again or turned away, seconds.
    pub held_seconds: HeldSeconds,
    /// Purchases turned away because they were held for too long, or too many were.
    pub shifting: Counter,
    /// The barrier that the lanes share.
    pub barrier: Arc<BarrierMetrics>,
    /// Snapshots that failed.
    pub snapshot_failures: Counter,
    /// Age of the master's last heartbeat at the last snapshot, seconds.
    pub snapshot_age: Gauge<f64, AtomicU64>,
}

impl InventoryMetrics {
    /// Adds everything to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("ledger_batches", "Calls of reserve", self.batches.clone());
        registry.register("ledger_batched_purchases", "Purchases in calls of reserve", self.batched.clone());
        registry.register(
            "ledger_unknown",
            "Calls sent again because their outcome was unknown",
            self.unknown.clone(),
        );
        registry.register(
            "lane_overloaded",
            "Purchases that a full or late lane turned away",
            self.overloaded.clone(),
        );
        registry.register(
            "sold_out_marker_hits",
            "Purchases answered by a sold-out marker",
            self.marker_hits.clone(),
        );
        registry.register(
            "lane_held_purchases",
            "Purchases held because the master moves",
            self.held.clone(),
        );
        registry.register(
            "purchases_held",
            "Purchases held because the master moved",
            self.held_total.clone(),
        );
        registry.register(
            "purchase_held_seconds",
            "How long a shift held purchases",
            self.held_seconds.0.clone(),
        );
        registry.register(
            "purchases_shifting",
            "Purchases that a shift would have held for too long, or beside too many others",
            self.shifting.clone(),
        );
        registry.register("lane_waiting_purchases", "Purchases waiting in lanes", self.waiting.clone());
        registry.register(
            "ledger_barrier_seconds",
            "How long the replicas took to confirm",
            self.barrier.seconds.0.clone(),
        );
        registry.register(
            "ledger_barrier_waiting",
            "Writes that wait for the next barrier",
            self.barrier.waiting.clone(),
        );
        registry.register(
            "ledger_barrier_unknown",
            "Barriers that the replicas did not confirm",
            self.barrier.unknown.clone(),
        );
        registry.register(
            "snapshot_failures",
            "Snapshots of the sales that failed",
            self.snapshot_failures.clone(),
        );
        registry.register(
            "snapshot_age_seconds",
            "Age of the master's last heartbeat at the last snapshot",
            self.snapshot_age.clone(),
        );
    }
}
