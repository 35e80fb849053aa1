//! From the ledger's outbox to the home centers' Kafka.
//!
//! Each destination has a relay of its own, with its own producer, place in the outbox and cursor: one that is down
//! holds back its own orders and nobody else's. Records are sent without waiting for each other; the cursor moves over
//! what is acknowledged without a gap. Whatever dies at any point, or runs twice, publishes records again from a
//! cursor, in their order; the order tables keep one row for each order id.
//!
//! A cursor says for which shards it is true. Shards that came to this destination since are read from the beginning of
//! the outbox, which holds everything that is not stored in some center (M2).

use std::sync::Arc;
use std::time::{Duration, Instant};

use seckill_domain::{CenterId, Millis, OutboxId, SHARDS, Shard};
use seckill_ledger::outbox::{self, Entry, Event};
use seckill_ledger::{Cursor, CursorOutcome, ShardSet, cursor};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::client::{Connection, Sender};
use super::metrics::{CenterLabel, KafkaMetrics};
use super::progress::Progress;
use super::record::{Outgoing, Writer};
use super::topics::{TopicError, Topics};
use crate::fail_point::fail_point;
use crate::orders::reading::{NoPage, Source};
use crate::orders::workers::{Link, Streak, pause};
use crate::topology::Topology;

/// Records on their way to one destination: what a broker that hangs costs in memory (some 20 MB), and what is
/// published again after a crash at most.
const IN_FLIGHT: usize = 32_768;
/// How often the cursor is written while it moves: each costs the ledger a sync of its log.
const CURSOR_INTERVAL: Duration = Duration::from_millis(250);
/// How often partitions without orders are told how far the others are.
const MARK_INTERVAL: Duration = Duration::from_millis(1000);
/// How long a read waits for the next entry while something is under way, and otherwise.
const BUSY_BLOCK_MS: u64 = 50;
const IDLE_BLOCK_MS: u64 = 1000;
/// Entries and orders in one page, roughly.
const MIN_ENTRIES: usize = 8;
const MAX_ENTRIES: usize = 1024;
const PAGE_ORDERS: usize = 4096;
/// A destination that acknowledges nothing for this long is said to be down.
const SILENCE: Duration = Duration::from_secs(5);
/// What the first records of all partitions are waited for: one that has no leader must not hold back the others.
const OPENING: Duration = Duration::from_secs(5);
/// What a stop waits for acknowledgements.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// How the relay to one center stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayStatus {
    /// It has not read anything yet.
    Starting,
    /// Another center is the master: its relay does the work.
    Elsewhere,
    /// It follows the outbox.
    Publishing {
        /// Up to where the destination has acknowledged everything.
        acknowledged: OutboxId,
    },
    /// It does not go on until this is over; it tries again by itself.
    Waiting {
        /// What it waits for.
        reason: String,
    },
}

/// Publishes one partition's outbox to one center.
pub(super) struct Relay {
    pub(super) link: Link,
    pub(super) destination: CenterId,
    pub(super) connection: Connection,
    pub(super) topics: Topics,
    pub(super) center: CenterId,
    pub(super) topology: watch::Receiver<Arc<Topology>>,
    pub(super) metrics: KafkaMetrics,
    pub(super) status: watch::Sender<RelayStatus>,
    pub(super) tracker: TaskTracker,
}

#[derive(Debug, thiserror::Error)]
enum Halt {
    #[error(transparent)]
    NoPage(#[from] NoPage),
    #[error(transparent)]
    Ledger(#[from] seckill_ledger::Error),
    #[error(transparent)]
    Topics(#[from] TopicError),
    #[error("Kafka of center {0} refused records: {1}")]
    Kafka(CenterId, String),
    #[error("a record cannot be written: {0}")]
    Content(#[from] serde_json::Error),
}

impl Relay {
    pub(super) async fn run(&self, token: CancellationToken) {
        let mut streak = Streak::default();
        while !token.is_cancelled() {
            if let Err(refusal) = self.link.authority.grant() {
                let elsewhere = self.topology.borrow().master != self.center;
                self.report(match elsewhere {
                    true => RelayStatus::Elsewhere,
                    false => RelayStatus::Waiting { reason: refusal.to_string() },
                });
                if !pause(&token).await {
                    return;
                }
                continue;
            }
            match self.follow(&token, &mut streak).await {
                // The shards have moved, or the end.
                Ok(()) => {}
                Err(halt) => {
                    self.metrics.retries.inc();
                    streak.failed("relay", &halt);
                    if matches!(halt, Halt::NoPage(NoPage::RolledBack { .. })) {
                        self.link.authority.suspect();
                    }
                    self.report(RelayStatus::Waiting { reason: halt.to_string() });
                    if !pause(&token).await {
                        return;
                    }
                }
            }
        }
    }

    fn report(&self, status: RelayStatus) {
        self.status.send_if_modified(|current| {
            let changed = *current != status;
            *current = status;
            changed
        });
    }

    /// The shards that are at home in the destination.
    fn shards(&self) -> ShardSet {
        let topology = self.topology.borrow();
        Shard::all().filter(|shard| *topology.home_center(*shard) == self.destination).collect()
    }

    /// Publishes until something fails, the shards move or the token is cancelled.
    async fn follow(&self, token: &CancellationToken, streak: &mut Streak) -> Result<(), Halt> {
        // Without an answer of the brokers there is nothing to do; the ledger is not asked for anything.
        match token.run_until_cancelled(self.topics.ensure(&self.connection)).await {
            None => return Ok(()),
            Some(ensured) => ensured?,
        }
        let mut source = Source::open(&self.link).await?;
        let shards = self.shards();
        let noted = cursor(&mut source.conn, &self.destination).await?;
        let mut run = Run::new(self, shards, noted)?;
        if !run.open(&mut source, token).await? {
            return Ok(());
        }
        let mut entries = MIN_ENTRIES;
        loop {
            let page = source.read_master(&self.link, run.read_up_to, entries).await?;
            streak.succeeded("relay");
            if token.is_cancelled() {
                return run.finish(&mut source).await;
            }
            if self.shards() != shards {
                return Ok(());
            }
            run.last_seq = page.last_seq;
            let orders: usize = page.entries.iter().map(order_count).sum();
            for entry in page.entries.iter() {
                if !run.room(&mut source, token).await? {
                    return run.finish(&mut source).await;
                }
                run.publish(entry).await?;
            }
            if page.entries.is_empty() {
                run.mark().await?;
                let block = if run.is_busy() { BUSY_BLOCK_MS } else { IDLE_BLOCK_MS };
                outbox::wait_for_entry(&mut source.conn, run.read_up_to, block).await?;
            } else {
                entries = (PAGE_ORDERS * page.entries.len() / orders.max(1)).clamp(MIN_ENTRIES, MAX_ENTRIES);
                run.mark().await?;
            }
            run.check(&mut source).await?;
        }
    }
}

fn order_count(entry: &Entry) -> usize {
    match &entry.event {
        Ok(Event::Orders(orders)) => orders.len(),
        Ok(Event::Released { .. } | Event::Sale(_) | Event::SaleChanged(_) | Event::Epoch(_)) | Err(_) => 0,
    }
}

/// One stretch of publishing, from a cursor on, with one producer.
struct Run<'a> {
    relay: &'a Relay,
    shards: ShardSet,
    /// Entries up to here are published for the shards that were at home there then.
    resume: OutboxId,
    /// The shards that were not: theirs are published from the beginning.
    moved_in: ShardSet,
    read_up_to: OutboxId,
    /// The end of the outbox, as of the last page.
    last_seq: u64,
    noted: Option<Cursor>,
    noted_at: Instant,
    progress: Arc<Progress>,
    sender: Sender,
    writer: Writer,
    /// By shard, up to where its partition was told.
    told: [OutboxId; SHARDS as usize],
    marked_at: Instant,
    moved: (Option<OutboxId>, Instant),
}

impl<'a> Run<'a> {
    fn new(relay: &'a Relay, shards: ShardSet, noted: Option<Cursor>) -> Result<Run<'a>, Halt> {
        let resume = noted.map_or(OutboxId::ZERO, |noted| noted.id);
        let moved_in = shards.without(noted.map_or(shards, |noted| noted.shards));
        let read_up_to = if moved_in.is_empty() { resume } else { OutboxId::ZERO };
        let progress = Arc::new(Progress::default());
        let sender = relay
            .connection
            .sender(&progress, &relay.tracker)
            .map_err(|error| Halt::Kafka(relay.destination.clone(), error.to_string()))?;
        let source = format!("/seckill/{}/{}", relay.topology.borrow().ledger_id, relay.link.partition);
        let now = Instant::now();
        Ok(Run {
            relay,
            shards,
            resume,
            moved_in,
            read_up_to,
            last_seq: resume.seq,
            noted,
            noted_at: now,
            progress,
            sender,
            writer: Writer::new(source),
            told: [OutboxId::ZERO; SHARDS as usize],
            marked_at: now,
            moved: (None, now),
        })
    }

    fn is_busy(&self) -> bool {
        self.progress.in_flight() > 0 || self.progress.reached().is_some_and(|reached| self.is_news(reached))
    }

    /// Sends each partition a first record and waits until it is acknowledged; `false` if it was told to stop. Brokers
    /// take any record of a producer that they have not heard of for its first. Were the first one refused while its
    /// partition has no leader yet, and the second taken, what the second says of everything before it would be wrong.
    async fn open(&mut self, source: &mut Source, token: &CancellationToken) -> Result<bool, Halt> {
        let shards: Vec<Shard> = self.shards.iter().collect();
        let number = self.progress.begin(OutboxId::ZERO, shards.len());
        for shard in shards {
            let reached = if self.moved_in.contains(shard) { OutboxId::ZERO } else { self.resume };
            self.send_mark(shard, reached, number).await?;
        }
        let begun = Instant::now();
        while self.progress.in_flight() > 0 && begun.elapsed() < OPENING {
            if !self.wait(source, token).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits until few enough records are under way; `false` if it was told to stop.
    async fn room(&mut self, source: &mut Source, token: &CancellationToken) -> Result<bool, Halt> {
        while self.progress.in_flight() >= IN_FLIGHT {
            if !self.wait(source, token).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits a little for acknowledgements; `false` if it was told to stop.
    async fn wait(&mut self, source: &mut Source, token: &CancellationToken) -> Result<bool, Halt> {
        let wait = tokio::time::timeout(CURSOR_INTERVAL, self.progress.changed());
        if token.run_until_cancelled(wait).await.is_none() {
            return Ok(false);
        }
        self.check(source).await?;
        Ok(true)
    }

    /// Sends what an entry means to the destination.
    async fn publish(&mut self, entry: &Entry) -> Result<(), Halt> {
        let (topics, partition) = (&self.relay.topics, self.relay.link.partition);
        let again = entry.id <= self.resume;
        let mine = if again { self.moved_in } else { self.shards };
        match &entry.event {
            Ok(Event::Orders(orders)) => {
                let concerned = |shard: Shard| mine.contains(shard);
                let count = orders.iter().filter(|order| concerned(order.order_id.table().shard())).count();
                let number = self.progress.begin(entry.id, count);
                for order in orders {
                    let shard = order.order_id.table().shard();
                    if !concerned(shard) {
                        continue;
                    }
                    let record = self.writer.order(partition, entry.id.epoch, order)?;
                    self.send(&topics.orders, i32::from(shard.number()), &record, number).await?;
                    self.told[usize::from(shard.number())] =
                        OutboxId { epoch: entry.id.epoch, seq: order.order_id.seq() };
                }
                self.relay.metrics.published.get_or_create(&self.relay.label()).inc_by(count as u64);
            }
            Ok(Event::Sale(spec)) if !again => {
                let number = self.progress.begin(entry.id, 1);
                let record = self.writer.described(partition, entry.id, entry.at, spec)?;
                self.send(&topics.sales, 0, &record, number).await?;
            }
            Ok(Event::SaleChanged(change)) if !again => {
                let number = self.progress.begin(entry.id, 1);
                let record = self.writer.changed(partition, entry.id, entry.at, change)?;
                self.send(&topics.sales, 0, &record, number).await?;
            }
            Ok(Event::Sale(_) | Event::SaleChanged(_) | Event::Released { .. } | Event::Epoch(_)) => {
                self.progress.begin(entry.id, 0);
            }
            // Every center keeps it aside, as with the outbox for a queue.
            Err(unreadable) => {
                let place = if again { None } else { self.shards.iter().next() };
                let number = self.progress.begin(entry.id, usize::from(place.is_some()));
                if let Some(shard) = place {
                    let record = self.writer.unreadable(partition, entry.id, entry.at, unreadable)?;
                    self.send(&topics.orders, i32::from(shard.number()), &record, number).await?;
                }
            }
        }
        self.read_up_to = entry.id;
        Ok(())
    }

    async fn send(&self, topic: &str, partition: i32, record: &Outgoing, number: usize) -> Result<(), Halt> {
        let refused = |reason: String| Halt::Kafka(self.relay.destination.clone(), reason);
        loop {
            match self.sender.send(topic, partition, record, number) {
                Ok(true) => return Ok(()),
                // The library's own queue is full of bytes: what it acknowledges makes room.
                Ok(false) => {
                    if let Some(reason) = self.progress.failure() {
                        return Err(refused(reason));
                    }
                    let _ = tokio::time::timeout(CURSOR_INTERVAL, self.progress.changed()).await;
                }
                Err(error) => return Err(refused(error.to_string())),
            }
        }
    }

    /// Tells partitions that had no order lately that everything up to here stands before: their consumer's
    /// position moves too, which the trim of the outbox waits for.
    async fn mark(&mut self) -> Result<(), Halt> {
        let here = self.read_up_to;
        if self.marked_at.elapsed() < MARK_INTERVAL || here < self.resume {
            return Ok(());
        }
        self.marked_at = Instant::now();
        let silent: Vec<Shard> =
            self.shards.iter().filter(|shard| self.told[usize::from(shard.number())] < here).collect();
        let number = self.progress.begin(here, silent.len());
        for shard in silent {
            self.send_mark(shard, here, number).await?;
        }
        Ok(())
    }

    /// Tells a partition that everything up to here stands before.
    async fn send_mark(&mut self, shard: Shard, here: OutboxId, number: usize) -> Result<(), Halt> {
        let record = self.writer.mark(self.relay.link.partition, shard, here, now());
        self.send(&self.relay.topics.orders, i32::from(shard.number()), &record, number).await?;
        self.told[usize::from(shard.number())] = here;
        Ok(())
    }

    /// Whether the cursor is not written there yet.
    fn is_news(&self, reached: OutboxId) -> bool {
        let published = reached > OutboxId::ZERO && reached >= self.resume;
        published && self.noted != Some(Cursor { id: reached, shards: self.shards })
    }

    /// Looks at what was acknowledged: writes the cursor, tells how it stands.
    async fn check(&mut self, source: &mut Source) -> Result<(), Halt> {
        let relay = self.relay;
        if let Some(reason) = self.progress.failure() {
            return Err(Halt::Kafka(relay.destination.clone(), reason));
        }
        let reached = self.progress.reached();
        if self.moved.0 != reached || self.progress.in_flight() == 0 {
            self.moved = (reached, Instant::now());
        }
        if self.noted_at.elapsed() >= CURSOR_INTERVAL {
            self.note(source).await?;
        }
        let acknowledged = reached.unwrap_or(self.resume).max(self.resume);
        let behind = self.last_seq.saturating_sub(acknowledged.seq);
        relay.metrics.lag.get_or_create(&relay.label()).set(i64::try_from(behind).unwrap_or(i64::MAX));
        relay.report(if self.moved.1.elapsed() >= SILENCE {
            RelayStatus::Waiting {
                reason: format!(
                    "Kafka of center {} acknowledges nothing; {} records are under way",
                    relay.destination,
                    self.progress.in_flight()
                ),
            }
        } else {
            RelayStatus::Publishing { acknowledged }
        });
        Ok(())
    }

    async fn note(&mut self, source: &mut Source) -> Result<(), Halt> {
        let Some(reached) = self.progress.reached().filter(|reached| self.is_news(*reached)) else {
            return Ok(());
        };
        let cursor = Cursor { id: reached, shards: self.shards };
        fail_point("acknowledged");
        match source.note_cursor(&self.relay.link, &self.relay.destination, cursor).await? {
            CursorOutcome::Noted => self.noted = Some(cursor),
            // Another relay is ahead: ours goes on all the same, and is the one that counts if that one dies.
            CursorOutcome::Behind => {}
            CursorOutcome::Ahead => {
                return Err(NoPage::Wait(format!("the ledger does not know the entry {reached}")).into());
            }
        }
        self.noted_at = Instant::now();
        Ok(())
    }

    /// Waits a little for what is under way, and notes it: less is published again after the next start.
    async fn finish(&mut self, source: &mut Source) -> Result<(), Halt> {
        let all = async {
            while self.progress.in_flight() > 0 && self.progress.failure().is_none() {
                self.progress.changed().await;
            }
        };
        let _ = tokio::time::timeout(LAST_WAIT, all).await;
        self.note(source).await
    }
}

impl Relay {
    fn label(&self) -> CenterLabel {
        CenterLabel { center: self.destination.to_string() }
    }
}

fn now() -> Millis {
    use seckill_domain::Clock as _;
    seckill_domain::SystemClock.now()
}
