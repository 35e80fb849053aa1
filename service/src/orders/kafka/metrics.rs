//! What the workers of the Kafka queue count.

use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// A destination of the relay.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CenterLabel {
    /// The center.
    pub center: String,
}

/// Counters and gauges of the Kafka queue. Cheap to clone; all clones count together.
#[derive(Debug, Clone, Default)]
pub struct KafkaMetrics {
    /// Orders handed to a destination's brokers.
    pub published: Family<CenterLabel, Counter>,
    /// Sequences of the outbox between what a destination has acknowledged and the end.
    pub lag: Family<CenterLabel, Gauge<i64, AtomicI64>>,
    /// Records of this center's partitions that are not stored, as of the last look.
    pub consumer_lag: Gauge<i64, AtomicI64>,
    /// Records that went to the dead letters.
    pub dead_letters: Counter,
    /// Partitions whose next record is gone from the brokers: somebody has to look.
    pub offsets_lost: Gauge<i64, AtomicI64>,
    /// Consumers that were replaced because they came to a halt.
    pub stalled: Counter<u64, AtomicU64>,
    /// Batches that another consumer had stored already.
    pub overtaken: Counter,
    /// Failed attempts of the workers.
    pub retries: Counter,
}

impl KafkaMetrics {
    /// Registers all of them; the registry's owner sets the prefix.
    pub fn register(&self, registry: &mut Registry) {
        let kafka = registry.sub_registry_with_prefix("kafka");
        kafka.register("published", "Orders handed to a center's brokers", self.published.clone());
        kafka.register("relay_lag", "Outbox sequences that a center has not acknowledged", self.lag.clone());
        kafka.register("consumer_lag", "Records that are not stored", self.consumer_lag.clone());
        kafka.register("dead_letters", "Records that went to the dead letters", self.dead_letters.clone());
        kafka.register("offsets_lost", "Partitions whose next record is gone", self.offsets_lost.clone());
        kafka.register("consumer_stalled", "Consumers replaced because they stalled", self.stalled.clone());
        kafka.register("consumer_overtaken", "Batches that another consumer stored", self.overtaken.clone());
        kafka.register("worker_retries", "Failed attempts of the Kafka workers", self.retries.clone());
    }
}
