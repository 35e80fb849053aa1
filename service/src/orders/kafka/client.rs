//! Clients of Kafka, set up for what this service promises.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::admin::AdminClient;
use rdkafka::topic_partition_list::Offset;
use rdkafka::{ClientContext, TopicPartitionList};

use rdkafka::config::{ClientConfig, FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, Consumer as _, ConsumerContext};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{DeliveryResult, Message as _};
use rdkafka::producer::{BaseRecord, ProducerContext, ThreadedProducer};
use seckill_domain::Shard;
use tokio_util::task::TaskTracker;

use super::progress::Progress;
use super::record::Outgoing;

/// How long an administrative call, or a look at offsets, may take.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A consumer fetches no more while so many records wait to be taken: two transactions' worth. The library's own
/// bound, 100,000, is more than 100 MB, because each costs some 400 bytes beside its own 700.
const PREFETCH: &str = "8192";
/// The same in KiB of keys and contents, for large records; headers and bookkeeping come on top.
const PREFETCH_KIB: &str = "8192";
/// Bytes in one answer to a fetch, over all partitions, and of one of them. They count as the brokers have them,
/// compressed to an eighth and less, so this is what bounds the memory of a consumer with a long way to go: some
/// 20,000 orders. A larger batch is fetched alone.
const FETCH_BYTES: &str = "1048576";
const PARTITION_FETCH_BYTES: &str = "65536";
/// Bytes of records that wait in a producer.
const BUFFER_KIB: &str = "131072";

/// Reports what the client library says, quietly: what matters to somebody is told by the worker that uses it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        tracing::debug!(?level, facility, message, "librdkafka");
    }

    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "librdkafka");
    }
}

impl ConsumerContext for Quiet {}

/// The way to a center's brokers, as properties of the client library.
#[derive(Clone)]
pub(crate) struct Connection(Arc<[(String, String)]>);

impl Connection {
    pub(crate) fn new(properties: Vec<(String, String)>) -> Connection {
        Connection(properties.into())
    }

    /// What every client has in common.
    pub(super) fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        for (name, value) in &*self.0 {
            config.set(name, value);
        }
        config
            .set("client.id", "seckill")
            .set("socket.keepalive.enable", "true")
            // A broker that comes back is found within two seconds.
            .set("reconnect.backoff.ms", "100")
            .set("reconnect.backoff.max.ms", "2000")
            .set_log_level(RDKafkaLogLevel::Warning);
        config
    }

    /// A consumer of partitions that are assigned to it by hand, from offsets that the caller keeps.
    pub(super) fn consumer(&self) -> KafkaResult<BaseConsumer<Quiet>> {
        let mut config = self.client();
        config
            // The library wants one for assignments; nothing is committed there and nobody joins it.
            .set("group.id", "seckill")
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            // Records that are gone are an error, never a reason to begin somewhere else.
            .set("auto.offset.reset", "error")
            .set("allow.auto.create.topics", "false")
            .set("isolation.level", "read_committed")
            // Whoever reads may wait for the order database for long.
            .set("max.poll.interval.ms", "86400000")
            .set("queued.min.messages", PREFETCH)
            .set("queued.max.messages.kbytes", PREFETCH_KIB)
            .set("fetch.max.bytes", FETCH_BYTES)
            .set("max.partition.fetch.bytes", PARTITION_FETCH_BYTES)
            .set("fetch.queue.backoff.ms", "20")
            .set("fetch.error.backoff.ms", "100");
        BaseConsumer::from_config_and_context(&config, Quiet)
    }

    /// A client that looks at offsets and reads nothing.
    pub(super) fn looker(&self, tracker: &TaskTracker) -> KafkaResult<Looker> {
        let consumer = BaseConsumer::from_config_and_context(&self.client(), Quiet)?;
        Ok(Looker { consumer: Some(Arc::new(consumer)), tracker: tracker.clone() })
    }

    /// A producer whose records arrive once, in order and on every replica in sync, however long it takes.
    pub(super) fn sender(&self, progress: &Arc<Progress>, tracker: &TaskTracker) -> KafkaResult<Sender> {
        let mut config = self.client();
        config
            .set("enable.idempotence", "true")
            .set("enable.gapless.guarantee", "true")
            .set("acks", "all")
            // Giving up on a record would leave a gap that later ones pass.
            .set("message.timeout.ms", "0")
            .set("linger.ms", "5")
            .set("compression.type", "lz4")
            .set("queue.buffering.max.messages", "1000000")
            .set("queue.buffering.max.kbytes", BUFFER_KIB);
        let acknowledgements = Acknowledgements(Arc::clone(progress));
        let producer = ThreadedProducer::from_config_and_context(&config, acknowledgements)?;
        Ok(Sender { producer: Some(producer), tracker: tracker.clone() })
    }

    pub(super) fn admin(&self) -> KafkaResult<AdminClient<Quiet>> {
        AdminClient::from_config_and_context(&self.client(), Quiet)
    }
}

/// Looks at offsets.
pub(super) struct Looker {
    // `None` only while it is being dropped.
    consumer: Option<Arc<BaseConsumer<Quiet>>>,
    tracker: TaskTracker,
}

impl Looker {
    /// Asks for one edge of each of these partitions, with one call: its negative "timestamps" name the edges.
    pub(super) async fn edges(
        &self,
        topic: &str,
        shards: Vec<Shard>,
        edge: Offset,
    ) -> KafkaResult<BTreeMap<Shard, i64>> {
        let Some(consumer) = self.consumer.clone() else { return Err(KafkaError::Canceled) };
        let topic = topic.to_owned();
        // The library blocks, and whoever drops its client last waits for its threads.
        let work = move || {
            let mut list = TopicPartitionList::with_capacity(shards.len());
            for shard in shards {
                list.add_partition_offset(&topic, i32::from(shard.number()), edge)?;
            }
            let found = consumer.offsets_for_times(list, CALL_TIMEOUT)?;
            let mut edges = BTreeMap::new();
            for element in found.elements() {
                element.error()?;
                let shard = u8::try_from(element.partition()).ok().and_then(Shard::new);
                if let (Some(shard), Offset::Offset(offset)) = (shard, element.offset()) {
                    edges.insert(shard, offset);
                }
            }
            Ok(edges)
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(edges) => edges,
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        }
    }
}

impl Drop for Looker {
    fn drop(&mut self) {
        if let Some(consumer) = self.consumer.take() {
            self.tracker.spawn_blocking(move || drop(consumer));
        }
    }
}

/// Hands the library's delivery reports over.
pub(super) struct Acknowledgements(Arc<Progress>);

impl ClientContext for Acknowledgements {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        Quiet.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        Quiet.error(error, reason);
    }
}

impl ProducerContext for Acknowledgements {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        match result {
            Ok(record) if record.offset() >= 0 => self.0.acknowledged(number),
            // The library takes a batch that was refused for written when the next one is: a broker that knows the
            // producer would refuse that one, too. But one that has not heard of it yet takes any record for its
            // first, as when a partition has just been given a leader, and the batch before is nowhere. Such a record
            // has no offset; it may be there or not.
            Ok(_) => self.0.fail("a record was passed over by the next one".to_owned()),
            Err((error, _)) => self.0.fail(error.to_string()),
        }
    }
}

/// Sends records without waiting for their acknowledgements.
pub(super) struct Sender {
    // `None` only while it is being dropped.
    producer: Option<ThreadedProducer<Acknowledgements>>,
    tracker: TaskTracker,
}

impl Sender {
    /// Puts a record into the library's queue. `false` if that is full: it has to be given again.
    pub(super) fn send(
        &self,
        topic: &str,
        partition: i32,
        record: &Outgoing,
        number: usize,
    ) -> KafkaResult<bool> {
        let Some(producer) = &self.producer else { return Err(KafkaError::Canceled) };
        let mut to =
            BaseRecord::with_opaque_to(topic, number).partition(partition).headers(record.headers.clone());
        if let Some(key) = &record.key {
            to = to.key(&key[..]);
        }
        if let Some(content) = &record.content {
            to = to.payload(&content[..]);
        }
        match producer.send(to) {
            Ok(()) => Ok(true),
            Err((error, _))
                if error.rdkafka_error_code() == Some(rdkafka::error::RDKafkaErrorCode::QueueFull) =>
            {
                Ok(false)
            }
            Err((error, _)) => Err(error),
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        if let Some(producer) = self.producer.take() {
            // Its threads are joined, which takes a moment.
            self.tracker.spawn_blocking(move || drop(producer));
        }
    }
}

#[cfg(test)]
mod tests;
