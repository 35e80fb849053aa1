//! The Kafka queue: the relay of the master center and the consumer of each home center.
//!
//! [`Relay`](relay::Relay) publishes the outbox to every center's brokers, [`Consumer`](consumer::Consumer) stores what
//! stands in this center's partitions. `docs/orders.md` has the formats.

mod client;
mod consumer;
mod dead_letter;
mod metrics;
mod progress;
mod pump;
mod record;
mod relay;
mod topics;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use seckill_domain::{CenterId, OrderRecord, Shard};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use consumer::ConsumerStatus;
pub use metrics::{CenterLabel, KafkaMetrics};
pub use relay::RelayStatus;

use super::store::OrderStore;
use super::workers::{Link, supervise};
use crate::cross_center::calls::AuditQueueAnswer;
use crate::topology::Topology;
use client::Connection;
use topics::Topics;

/// What the Kafka queue needs to know.
#[derive(Clone)]
pub struct KafkaOptions {
    /// This center.
    pub center: CenterId,
    /// The ways to every center's brokers, this one's among them, as properties of librdkafka.
    pub centers: BTreeMap<CenterId, Vec<(String, String)>>,
    /// Put in front of the topics' names.
    pub topic_prefix: String,
    /// Copies of each partition of a topic that is created.
    pub replication_factor: u16,
    /// The topology, followed.
    pub topology: watch::Receiver<Arc<Topology>>,
    /// What the queue counts.
    pub metrics: KafkaMetrics,
}

/// How the queue stands: [`KafkaQueue::consumer`] and each relay.
#[derive(Debug, Clone)]
pub struct KafkaQueue {
    /// The consumer of this center.
    pub consumer: watch::Receiver<ConsumerStatus>,
    /// By inventory partition and center.
    pub relays: BTreeMap<(u8, CenterId), watch::Receiver<RelayStatus>>,
    center: CenterId,
    topology: watch::Receiver<Arc<Topology>>,
}

impl KafkaQueue {
    pub(super) fn spawn(
        store: &OrderStore,
        links: &[Link],
        options: &KafkaOptions,
        store_batch: usize,
        tracker: &TaskTracker,
        token: &CancellationToken,
    ) -> KafkaQueue {
        let topics = Topics::new(&options.topic_prefix, options.replication_factor);
        let (status, consumer) = watch::channel(ConsumerStatus::Starting);
        let own = options.centers.get(&options.center).cloned().unwrap_or_default();
        let worker = Arc::new(consumer::Consumer {
            store: store.clone(),
            center: options.center.clone(),
            connection: Connection::new(own),
            topics: topics.clone(),
            topology: options.topology.clone(),
            store_batch,
            metrics: options.metrics.clone(),
            status,
            tracker: tracker.clone(),
        });
        supervise("kafka consumer", tracker, token, move |token| {
            let worker = Arc::clone(&worker);
            async move { worker.run(token).await }
        });
        let mut relays = BTreeMap::new();
        for link in links {
            for (destination, properties) in &options.centers {
                let (status, receiver) = watch::channel(RelayStatus::Starting);
                relays.insert((link.partition, destination.clone()), receiver);
                let relay = Arc::new(relay::Relay {
                    link: link.clone(),
                    destination: destination.clone(),
                    connection: Connection::new(properties.clone()),
                    topics: topics.clone(),
                    center: options.center.clone(),
                    topology: options.topology.clone(),
                    metrics: options.metrics.clone(),
                    status,
                    tracker: tracker.clone(),
                });
                supervise("kafka relay", tracker, token, move |token| {
                    let relay = Arc::clone(&relay);
                    async move { relay.run(token).await }
                });
            }
        }
        let (center, topology) = (options.center.clone(), options.topology.clone());
        KafkaQueue { consumer, relays, center, topology }
    }

    /// This center.
    pub fn center(&self) -> &CenterId {
        &self.center
    }

    /// The centers that somebody is at home in.
    pub fn centers(&self) -> BTreeSet<CenterId> {
        self.topology.borrow().shard_owners.iter().cloned().collect()
    }

    /// How this center's consumer stands, and what the queue here waits for.
    pub fn standing(&self) -> AuditQueueAnswer {
        let (lag, lost) = match &*self.consumer.borrow() {
            ConsumerStatus::Starting | ConsumerStatus::Waiting { .. } => (None, Vec::new()),
            ConsumerStatus::Following { lag, lost } => {
                (Some(*lag), lost.iter().map(|shard| shard.number()).collect())
            }
        };
        AuditQueueAnswer { lag, lost, waiting: self.waiting() }
    }

    /// What the queue waits for, if for anything.
    pub fn waiting(&self) -> Vec<String> {
        let mut waiting = Vec::new();
        match &*self.consumer.borrow() {
            ConsumerStatus::Starting => {}
            ConsumerStatus::Following { lost, .. } if lost.is_empty() => {}
            ConsumerStatus::Following { lost, .. } => {
                let lost: Vec<String> = lost.iter().map(Shard::to_string).collect();
                waiting.push(format!(
                    "records are gone from the Kafka partitions {}: they stand still",
                    lost.join(", ")
                ));
            }
            ConsumerStatus::Waiting { reason } => waiting.push(reason.clone()),
        }
        // Those to both centers may wait for the same, and that is said once; what the consumer waits for is said beside.
        let mut relays: Vec<String> = Vec::new();
        for relay in self.relays.values() {
            match &*relay.borrow() {
                RelayStatus::Starting | RelayStatus::Elsewhere | RelayStatus::Publishing { .. } => {}
                RelayStatus::Waiting { reason } if relays.contains(reason) => {}
                RelayStatus::Waiting { reason } => relays.push(reason.clone()),
            }
        }
        waiting.extend(relays);
        waiting.extend(self.without_brokers().into_iter().map(|center| {
            format!("orders of center {center} stay in the outbox: kafka.centers.{center} is not configured")
        }));
        waiting
    }

    /// Centers that this one has to publish to and knows no brokers of.
    fn without_brokers(&self) -> BTreeSet<CenterId> {
        let topology = self.topology.borrow();
        let known = |center: &CenterId| self.relays.keys().any(|(_, known)| known == center);
        let owners = topology.shard_owners.iter().filter(|_| topology.master == self.center);
        owners.filter(|owner| !known(owner)).cloned().collect()
    }
}

/// Reads a record that was set aside again: the orders it holds, or why it still cannot be read.
pub(super) fn read_again(shard: Shard, raw: &str) -> Result<Vec<OrderRecord>, String> {
    record::read_raw(shard, raw)
}
