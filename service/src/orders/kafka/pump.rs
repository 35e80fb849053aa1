//! The thread that takes records from the client library and reads them.

use std::time::{Duration, Instant};

use rdkafka::TopicPartitionList;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult, RDKafkaErrorCode};
use rdkafka::message::{BorrowedMessage, Message as _, OwnedHeaders};
use rdkafka::topic_partition_list::Offset;
use seckill_domain::{OrderRecord, OutboxId, SHARDS, Shard};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::client::{Connection, Quiet};
use super::record::{Incoming, Parts, Reader};

/// How long a poll waits when there is nothing: how late the thread hears that it should end.
const POLL: Duration = Duration::from_millis(50);
/// A batch of at least so many records waits a little for more, because a transaction writes whole pages of some
/// hundred tables. A buyer who polls does not notice.
const LINGERS: [(usize, Duration); 3] =
    [(512, Duration::from_millis(150)), (64, Duration::from_millis(50)), (1, Duration::from_millis(2))];

/// Records of several partitions, read.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) steps: Vec<Step>,
    pub(super) orders: Vec<OrderRecord>,
    pub(super) poison: Vec<Poison>,
    records: usize,
    /// By shard, its place in `steps` plus one.
    places: Vec<usize>,
}

/// What a batch holds of one partition.
pub(super) struct Step {
    pub(super) shard: Shard,
    pub(super) from: i64,
    pub(super) to: i64,
    /// By inventory partition, the last outbox id.
    pub(super) marks: Vec<(u8, OutboxId)>,
}

/// A record that cannot be read, whole.
pub(super) struct Poison {
    pub(super) shard: Shard,
    pub(super) offset: i64,
    pub(super) reason: String,
    pub(super) raw: String,
    pub(super) key: Option<Vec<u8>>,
    pub(super) content: Option<Vec<u8>>,
    pub(super) headers: OwnedHeaders,
}

/// What the thread tells.
pub(super) enum News {
    Batch(Batch),
    /// A partition's next record is not there (any more); which partition, the ends show.
    Lost(String),
    /// A partition goes on behind its next record. It is not read any more.
    Gap {
        shard: Shard,
        expected: i64,
        found: i64,
    },
    /// The library gave up on this client.
    Broken(String),
}

/// The client with its partitions, before its thread runs.
pub(super) struct Pump {
    consumer: BaseConsumer<Quiet>,
    /// By shard the next offset, where the partition is ours.
    next: [Option<i64>; SHARDS as usize],
    max_records: usize,
}

impl Pump {
    pub(super) fn new(
        connection: &Connection,
        topic: &str,
        offsets: &[(Shard, i64)],
        max_records: usize,
    ) -> KafkaResult<Pump> {
        let consumer = connection.consumer()?;
        let mut list = TopicPartitionList::with_capacity(offsets.len());
        let mut next = [None; SHARDS as usize];
        for (shard, offset) in offsets {
            list.add_partition_offset(topic, i32::from(shard.number()), Offset::Offset(*offset))?;
            next[usize::from(shard.number())] = Some(*offset);
        }
        consumer.assign(&list)?;
        Ok(Pump { consumer, next, max_records })
    }

    /// Hands batches over until it is told to stop, nobody takes them or the client breaks. The full channel is the
    /// back-pressure: the library then fetches up to its own bound.
    pub(super) fn run(mut self, news: &mpsc::Sender<News>, stop: &CancellationToken) {
        let mut reader = Reader::default();
        let mut batch = Batch::default();
        let mut since = Instant::now();
        while !stop.is_cancelled() {
            let linger = LINGERS.iter().find(|(records, _)| batch.records >= *records);
            let wait = linger.map_or(POLL, |(_, linger)| linger.saturating_sub(since.elapsed()));
            let polled = self.consumer.poll(wait);
            let quiet = polled.is_none();
            match polled {
                Some(Ok(message)) => {
                    if batch.records == 0 {
                        since = Instant::now();
                    }
                    if let Some(gap) = take(&mut self.next, &mut reader, &mut batch, &message) {
                        // Fetched in vain until the partitions are assigned anew; that is all it costs.
                        if news.blocking_send(gap).is_err() {
                            return;
                        }
                    }
                }
                Some(Err(error)) => match trouble(&error) {
                    Trouble::Passing => {}
                    Trouble::Lost => {
                        let _ = news.blocking_send(News::Lost(error.to_string()));
                        return;
                    }
                    Trouble::Broken => {
                        let _ = news.blocking_send(News::Broken(error.to_string()));
                        return;
                    }
                },
                None => {}
            }
            let due =
                quiet && batch.records > 0 && linger.is_none_or(|(_, linger)| since.elapsed() >= *linger);
            if batch.records >= self.max_records || due {
                let full = std::mem::take(&mut batch);
                if news.blocking_send(News::Batch(full)).is_err() {
                    return;
                }
            }
        }
    }
}

enum Trouble {
    /// The library goes on by itself.
    Passing,
    Lost,
    Broken,
}

fn trouble(error: &KafkaError) -> Trouble {
    if matches!(error, KafkaError::MessageConsumptionFatal(_)) {
        return Trouble::Broken;
    }
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange) => Trouble::Lost,
        Some(
            RDKafkaErrorCode::Fatal
            | RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownPartition
            | RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::BadMessage,
        ) => Trouble::Broken,
        // Brokers that are away, elections, timeouts.
        _ => Trouble::Passing,
    }
}

/// Puts a record into the batch, unless records before it are missing.
fn take(
    next: &mut [Option<i64>; SHARDS as usize],
    reader: &mut Reader,
    batch: &mut Batch,
    message: &BorrowedMessage<'_>,
) -> Option<News> {
    let (number, offset) = (message.partition(), message.offset());
    let shard = u8::try_from(number).ok().and_then(Shard::new)?;
    let place = &mut next[usize::from(shard.number())];
    let expected = (*place)?;
    if offset < expected {
        return None;
    }
    if offset > expected {
        *place = None;
        return Some(News::Gap { shard, expected, found: offset });
    }
    *place = Some(offset + 1);
    let step = batch.step(shard, offset);
    step.to = offset + 1;
    let parts = Parts::of(shard, message.key(), message.payload(), message.headers());
    match reader.read(&parts) {
        Ok(Incoming::Order { order, partition, mark }) => {
            step.mark(partition, mark);
            batch.orders.push(order);
        }
        Ok(Incoming::Mark { partition, mark }) => step.mark(partition, mark),
        Err(reason) => batch.poison.push(Poison {
            shard,
            offset,
            reason,
            raw: parts.raw(),
            key: message.key().map(<[u8]>::to_vec),
            content: message.payload().map(<[u8]>::to_vec),
            headers: message.headers().map_or_else(OwnedHeaders::new, |headers| headers.detach()),
        }),
    }
    batch.records += 1;
    None
}

impl Batch {
    fn step(&mut self, shard: Shard, offset: i64) -> &mut Step {
        if self.places.is_empty() {
            self.places = vec![0; usize::from(SHARDS)];
        }
        let place = &mut self.places[usize::from(shard.number())];
        if *place == 0 {
            self.steps.push(Step { shard, from: offset, to: offset, marks: Vec::new() });
            *place = self.steps.len();
        }
        &mut self.steps[*place - 1]
    }

    /// Orders of one outbox entry next to each other: they are stored as one.
    pub(super) fn sort(&mut self) {
        self.orders.sort_unstable_by_key(|order| order.order_id.seq());
    }
}

impl Step {
    fn mark(&mut self, partition: u8, id: OutboxId) {
        match self.marks.iter_mut().find(|(known, _)| *known == partition) {
            // A relay that was not told of an acknowledgement publishes again, behind later records.
            Some((_, mark)) => *mark = (*mark).max(id),
            None => self.marks.push((partition, id)),
        }
    }
}
