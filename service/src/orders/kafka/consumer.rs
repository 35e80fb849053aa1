//! From this center's Kafka into the order tables.
//!
//! The partitions of this center's shards are assigned by hand, from the offsets that the database has; offsets move in
//! the transaction that stores the orders (R2). So a consumer may die anywhere, and two of them do no harm: whoever
//! comes second finds the offset moved and reads it again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::Offset;
use seckill_domain::{CenterId, Shard};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::{Connection, Looker};
use super::dead_letter::DeadLetters;
use super::metrics::KafkaMetrics;
use super::pump::{Batch, News, Poison, Pump};
use super::topics::{TopicError, Topics};
use crate::fail_point::fail_point;
use crate::orders::batch::{Advance, Origin, StoreBatch, Unreadable};
use crate::orders::error::Error;
use crate::orders::store::OrderStore;
use crate::orders::workers::{Streak, pause};
use crate::topology::Topology;

/// Batches that are read ahead of the database.
const READ_AHEAD: usize = 1;
/// How often the ends of the partitions are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// The same while they could not be looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// A consumer that brings nothing for this long although there is something is replaced.
const STALL: Duration = Duration::from_secs(30);

/// How the consumer of this center stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsumerStatus {
    /// It has not read anything yet.
    Starting,
    /// It follows the partitions of this center's shards.
    Following {
        /// Records that were not stored at the last look.
        lag: u64,
        /// Partitions whose next record is gone from the brokers. They stand still until somebody has looked.
        lost: Vec<Shard>,
    },
    /// It does not go on until this is over; it tries again by itself.
    Waiting {
        /// What it waits for.
        reason: String,
    },
}

/// Stores what stands in this center's partitions.
pub(super) struct Consumer {
    pub(super) store: OrderStore,
    pub(super) center: CenterId,
    pub(super) connection: Connection,
    pub(super) topics: Topics,
    pub(super) topology: watch::Receiver<Arc<Topology>>,
    pub(super) store_batch: usize,
    pub(super) metrics: KafkaMetrics,
    pub(super) status: watch::Sender<ConsumerStatus>,
    pub(super) tracker: TaskTracker,
}

#[derive(Debug, thiserror::Error)]
enum Halt {
    #[error(transparent)]
    Store(#[from] Error),
    #[error(transparent)]
    Topics(#[from] TopicError),
    #[error("Kafka: {0}")]
    Kafka(#[from] KafkaError),
    #[error("Kafka: {0}")]
    Broken(String),
    #[error("records are gone from Kafka: {0}")]
    Lost(String),
    #[error("the consumer brings nothing although {0} records wait; it is replaced")]
    Stalled(u64),
    #[error("the dead letters cannot be written: {0}")]
    DeadLetters(String),
}

/// The next offset of each of our partitions, as the database has it.
type Offsets = BTreeMap<Shard, i64>;
/// First and next offset of each partition, as the brokers have them.
type Ends = BTreeMap<Shard, (i64, i64)>;

impl Consumer {
    pub(super) async fn run(&self, token: CancellationToken) {
        let mut streak = Streak::default();
        let mut aside = Aside::default();
        while !token.is_cancelled() {
            match self.follow(&token, &mut streak, &mut aside).await {
                // The end, or the shards have moved.
                Ok(()) => {}
                Err(Halt::Store(Error::Closed)) => return,
                // It is let go of: the others go on, and its next owner is told of what is left by the relay.
                Err(Halt::Store(Error::NotOwner(shard))) if self.is_moving(shard) => {
                    aside.foreign.extend(&self.topology.borrow().blocked_shards);
                }
                // Another consumer stored these: read the offsets again.
                Err(Halt::Store(Error::PositionMoved { .. })) => {
                    self.metrics.overtaken.inc();
                }
                Err(halt) => {
                    self.metrics.retries.inc();
                    match &halt {
                        Halt::Stalled(_) => _ = self.metrics.stalled.inc(),
                        // The topology is ahead of the database, or behind: the others go on meanwhile.
                        Halt::Store(Error::NotOwner(shard)) => aside.foreign.push(*shard),
                        Halt::Store(_)
                        | Halt::Topics(_)
                        | Halt::Kafka(_)
                        | Halt::Broken(_)
                        | Halt::Lost(_)
                        | Halt::DeadLetters(_) => {}
                    }
                    streak.failed("kafka consumer", &halt);
                    self.report(ConsumerStatus::Waiting { reason: halt.to_string() });
                    if !pause(&token).await {
                        return;
                    }
                }
            }
        }
    }

    fn report(&self, status: ConsumerStatus) {
        self.status.send_if_modified(|current| {
            let changed = *current != status;
            *current = status;
            changed
        });
    }

    /// The shards whose orders this center stores now. While some are moved, what is in their partitions is stored
    /// until the database lets go of them.
    fn shards(&self) -> Vec<Shard> {
        self.topology.borrow().shards_of(&self.center).collect()
    }

    fn is_moving(&self, shard: Shard) -> bool {
        self.topology.borrow().blocked_shards.contains(&shard)
    }

    /// Stores what comes until something fails, the shards move or the token is cancelled.
    async fn follow(
        &self,
        token: &CancellationToken,
        streak: &mut Streak,
        aside: &mut Aside,
    ) -> Result<(), Halt> {
        let mut topology = self.topology.clone();
        topology.mark_unchanged();
        let shards = self.shards();
        let mut stored: Offsets = self.store.kafka_offsets().await?.into_iter().collect();
        stored.retain(|shard, _| shards.contains(shard) && !aside.foreign.contains(shard));
        if stored.is_empty() {
            // Nobody is at home here, or everybody is on the way to another center.
            aside.foreign.clear();
            self.metrics.offsets_lost.set(0);
            self.lag(&stored, &Ends::new());
            self.report(ConsumerStatus::Following { lag: 0, lost: Vec::new() });
            tokio::select! {
                () = token.cancelled() => {}
                Ok(()) = topology.changed() => {}
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
            return Ok(());
        }
        if !aside.checked {
            match token.run_until_cancelled(self.topics.ensure(&self.connection)).await {
                None => return Ok(()),
                Some(ensured) => ensured?,
            }
            aside.checked = true;
        }
        // Until it went well once, the topics are looked at again.
        let topics_are_there = std::mem::take(&mut aside.checked);
        let mut looker = self.connection.looker(&self.tracker)?;
        let ends = self.look(&looker, &stored).await?;
        aside.checked = topics_are_there;
        let mut lost = self.lost(&stored, &ends);
        let offsets: Vec<(Shard, i64)> = stored
            .iter()
            .filter(|(shard, _)| !lost.contains(shard))
            .map(|(shard, next)| (*shard, *next))
            .collect();
        let (sender, mut news) = mpsc::channel(READ_AHEAD);
        let pump = Pump::new(&self.connection, &self.topics.orders, &offsets, self.store_batch)?;
        // The thread ends with this call, whatever ends it.
        let stop = token.child_token();
        let _stop = stop.clone().drop_guard();
        self.tracker.spawn_blocking(move || pump.run(&sender, &stop));
        let mut letters =
            DeadLetters::new(self.connection.clone(), self.topics.clone(), self.tracker.clone());
        let mut lag = self.lag(&stored, &ends);
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK_INTERVAL, LOOK_INTERVAL);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        // Why the brokers could not be looked at last time: what is known of the lag is from before.
        let mut away: Option<String> = None;
        loop {
            self.report(match &away {
                Some(reason) => ConsumerStatus::Waiting { reason: reason.clone() },
                None => ConsumerStatus::Following { lag, lost: lost.clone() },
            });
            tokio::select! {
                () = token.cancelled() => return Ok(()),
                told = news.recv() => match told {
                    Some(News::Batch(batch)) => {
                        let records: i64 = batch.steps.iter().map(|step| step.to - step.from).sum();
                        self.save(batch, &mut stored, &mut letters).await?;
                        streak.succeeded("kafka consumer");
                        lag = lag.saturating_sub(records.unsigned_abs());
                        heard = Instant::now();
                    }
                    Some(News::Gap { shard, expected, found }) => {
                        tracing::error!(%shard, expected, found,
                            "records are missing in Kafka; the partition stands still until somebody has looked");
                        lost.push(shard);
                        self.metrics.offsets_lost.set(lost.len() as i64);
                    }
                    Some(News::Lost(what)) => return Err(Halt::Lost(what)),
                    Some(News::Broken(why)) => {
                        aside.checked = false;
                        return Err(Halt::Broken(why));
                    }
                    None => return Err(Halt::Broken("the reading thread ended".to_owned())),
                },
                changed = topology.changed() => {
                    // Its sender lives as long as the service.
                    let moved = self.shards() != shards || !aside.foreign.is_empty();
                    if changed.is_err() || moved {
                        aside.foreign.clear();
                        return Ok(());
                    }
                }
                _ = look.tick() => {
                    if self.shards() != shards || !std::mem::take(&mut aside.foreign).is_empty() {
                        return Ok(());
                    }
                    // Brokers that are away are no reason to replace a consumer.
                    let ends = match self.look(&looker, &stored).await {
                        Ok(ends) => ends,
                        Err(halt) => {
                            heard = Instant::now();
                            away = Some(format!("the consumer's brokers do not answer: {halt}"));
                            // It would keep asking under the leader epochs that it knows, and a broker that
                            // restarted refuses those: the library asks for later ones only where it reads.
                            looker = self.connection.looker(&self.tracker)?;
                            look.reset_after(LOOK_AGAIN);
                            continue;
                        }
                    };
                    away = None;
                    streak.succeeded("kafka consumer");
                    let found = self.lost(&stored, &ends);
                    if found.iter().any(|shard| !lost.contains(shard)) {
                        return Err(Halt::Lost("their partitions end before what is stored, or begin after it".to_owned()));
                    }
                    lag = self.lag(&stored, &ends);
                    let readable: u64 = stored
                        .iter()
                        .filter(|(shard, _)| !lost.contains(shard))
                        .map(|(shard, next)| behind(&ends, *shard, *next))
                        .sum();
                    if readable > 0 && heard.elapsed() >= STALL {
                        return Err(Halt::Stalled(readable));
                    }
                }
            }
        }
    }

    /// Stores a batch. Dead letters first: an offset moves over a record only when that is safe elsewhere.
    async fn save(
        &self,
        mut batch: Batch,
        stored: &mut Offsets,
        letters: &mut DeadLetters,
    ) -> Result<(), Halt> {
        if !batch.poison.is_empty() {
            letters.write(&batch.poison).await.map_err(Halt::DeadLetters)?;
        }
        batch.sort();
        let reached: Vec<(Shard, i64)> = batch.steps.iter().map(|step| (step.shard, step.to)).collect();
        let dead = batch.poison.len() as u64;
        let brings_orders = !batch.orders.is_empty();
        let oldest = batch.orders.first().map(|order| order.accepted_at);
        let advance = batch.steps.into_iter().map(|step| Advance::Kafka {
            shard: step.shard,
            from: step.from,
            to: step.to,
            outbox: step.marks,
        });
        self.store
            .store(StoreBatch {
                advance: advance.collect(),
                orders: batch.orders,
                unreadable: batch.poison.into_iter().map(set_aside).collect(),
                settled: Vec::new(),
            })
            .await?;
        if brings_orders {
            fail_point("stored");
        }
        for (shard, next) in reached {
            stored.insert(shard, next);
        }
        self.metrics.dead_letters.inc_by(dead);
        if let Some(accepted_at) = oldest {
            let age_ms = self.store.clock().now().since_ms(accepted_at);
            self.store.metrics().lag_seconds.set(age_ms as f64 / 1000.0);
        }
        Ok(())
    }

    /// Asks the brokers where the partitions begin and end.
    async fn look(&self, looker: &Looker, stored: &Offsets) -> Result<Ends, Halt> {
        let (topic, shards) = (&self.topics.orders, stored.keys().copied().collect::<Vec<_>>());
        let first = looker.edges(topic, shards.clone(), Offset::Beginning).await?;
        let last = looker.edges(topic, shards, Offset::End).await?;
        let ends = first.into_iter().filter_map(|(shard, first)| Some((shard, (first, *last.get(&shard)?))));
        Ok(ends.collect())
    }

    /// The partitions whose next record the brokers do not have and will never have.
    fn lost(&self, stored: &Offsets, ends: &Ends) -> Vec<Shard> {
        let mut lost = Vec::new();
        for (shard, next) in stored {
            let Some((first, last)) = ends.get(shard) else { continue };
            if next < first || next > last {
                tracing::error!(%shard, next, first, last,
                    "the next record of this partition is gone from Kafka; the partition stands still until somebody \
                     has looked (docs/orders.md says what to do)");
                lost.push(*shard);
            }
        }
        self.metrics.offsets_lost.set(lost.len() as i64);
        lost
    }

    fn lag(&self, stored: &Offsets, ends: &Ends) -> u64 {
        let lag = stored.iter().map(|(shard, next)| behind(ends, *shard, *next)).sum();
        self.metrics.consumer_lag.set(i64::try_from(lag).unwrap_or(i64::MAX));
        if lag == 0 {
            self.store.metrics().lag_seconds.set(0.0);
        }
        lag
    }
}

/// What the consumer remembers from one attempt to the next.
#[derive(Default)]
struct Aside {
    /// Shards that the database does not own although the topology says so.
    foreign: Vec<Shard>,
    /// Whether the topics were found in order.
    checked: bool,
}

fn behind(ends: &Ends, shard: Shard, next: i64) -> u64 {
    ends.get(&shard).map_or(0, |(_, last)| u64::try_from(last - next).unwrap_or(0))
}

fn set_aside(poison: Poison) -> Unreadable {
    let Poison { shard, offset, reason, raw, .. } = poison;
    tracing::error!(%shard, offset, reason, "a record cannot be read and goes to the dead letters");
    Unreadable { origin: Origin::Kafka { shard, offset }, reason, raw }
}
