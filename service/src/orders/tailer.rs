//! From the local outbox into the order tables.
//!
//! Which pages count is in [`super::reading`]: on the master and on a replica alike only what every acknowledgement
//! rests on, so a center that is not the master follows its own replica. What does not count stays in the outbox.
//!
//! Positions move in the transaction that stores the orders (R2). Losing the connection, the process or a race
//! against another tailer at any point means reading the same entries again.

use std::time::{Duration, Instant};

use seckill_domain::{OrderRecord, OutboxId};
use seckill_ledger::outbox::{self, Entry, Event, Page};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::batch::{Origin, StoreBatch, Unreadable};
use super::error::Error;
use super::reading::{NoPage, Source};
use super::store::OrderStore;
use super::workers::{Link, Streak, TailerStatus, WorkerOptions, pause, sleep};

/// How long a read waits for the next entry. A tailer that was told to stop waits no longer.
const BLOCK_MS: u64 = 1000;
/// Pages of at least this many orders are followed by a short wait for more, because a transaction writes whole
/// pages of some hundred tables: at 512 orders one costs 20 µs of CPU, at 4096 half of that. A buyer who polls
/// does not notice.
const LINGERS: [(usize, Duration); 2] = [(512, Duration::from_millis(150)), (64, Duration::from_millis(50))];
/// How often a tailer without work looks where the database says it is.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// Entries in one page.
const MIN_ENTRIES: usize = 8;
const MAX_ENTRIES: usize = 1024;

/// Follows one partition's outbox.
pub(super) struct Tailer {
    store: OrderStore,
    link: Link,
    store_batch: usize,
    status: watch::Sender<TailerStatus>,
}

/// Why the tailer has to pause.
#[derive(Debug, thiserror::Error)]
enum Halt {
    #[error(transparent)]
    NoPage(#[from] NoPage),
    #[error(transparent)]
    Ledger(#[from] seckill_ledger::Error),
    #[error(transparent)]
    Store(#[from] Error),
}

impl Tailer {
    pub(super) fn new(
        store: OrderStore,
        link: Link,
        options: &WorkerOptions,
    ) -> (Tailer, watch::Receiver<TailerStatus>) {
        let (status, receiver) = watch::channel(TailerStatus::Starting);
        (Tailer { store, link, store_batch: options.store_batch.max(1), status }, receiver)
    }

    pub(super) async fn run(&self, token: CancellationToken) {
        let mut streak = Streak::default();
        while !token.is_cancelled() {
            match self.follow(&token, &mut streak).await {
                Err(Halt::Store(Error::Closed)) => return,
                // It was told to stop, or the position may be another one: shards have come to this center, or
                // somebody else stored these entries. Then it is read again.
                Ok(()) | Err(Halt::Store(Error::PositionMoved { .. })) => {}
                Err(halt) => {
                    self.store.metrics().retries.inc();
                    streak.failed("tailer", &halt);
                    self.report(match halt {
                        Halt::NoPage(NoPage::RolledBack { position, ledger }) => {
                            // The guardian looks at once, and refuses what the message explains.
                            self.link.authority.suspect();
                            TailerStatus::RolledBack { position, ledger }
                        }
                        halt => TailerStatus::Waiting { reason: halt.to_string() },
                    });
                    if !pause(&token).await {
                        return;
                    }
                }
            }
        }
    }

    fn report(&self, status: TailerStatus) {
        self.status.send_if_modified(|current| {
            let changed = *current != status;
            *current = status;
            changed
        });
    }

    async fn follow(&self, token: &CancellationToken, streak: &mut Streak) -> Result<(), Halt> {
        // Before the position is read: a turn that comes later is seen.
        let mut turns = self.store.turns();
        turns.mark_unchanged();
        let mut position = self.store.position(self.link.partition).await?;
        let mut looked = Instant::now();
        let mut source = Source::open(&self.link).await?;
        let mut entries = MIN_ENTRIES;
        let mut page = source.read(&self.link, position, entries).await?;
        loop {
            streak.succeeded("tailer");
            self.report(TailerStatus::Following { position });
            if token.is_cancelled() {
                return Ok(());
            }
            let Some(last) = page.entries.last().map(|entry| entry.id) else {
                self.store.metrics().lag_seconds.set(0.0);
                self.store.metrics().lag_entries.set(0);
                let wait = outbox::wait_for_entry(&mut source.conn, position, BLOCK_MS);
                match token.run_until_cancelled(wait).await {
                    None => return Ok(()),
                    Some(found) => found?,
                };
                // Shards have come to this center, and the position may have gone back: read it again. Another
                // instance may have been the one that took them.
                if turns.has_changed().unwrap_or(false) {
                    return Ok(());
                }
                if looked.elapsed() >= LOOK_INTERVAL {
                    looked = Instant::now();
                    if self.store.position(self.link.partition).await? != position {
                        return Ok(());
                    }
                }
                page = source.read(&self.link, position, entries).await?;
                continue;
            };
            let full = page.entries.len() >= entries;
            let orders = self.observe(&page);
            entries = (self.store_batch * page.entries.len() / orders.max(1)).clamp(MIN_ENTRIES, MAX_ENTRIES);
            let save = self.save(position, page.entries);
            if full {
                // More is waiting: read on while the database works. What fails is read again.
                let (saved, next) = tokio::join!(save, source.read(&self.link, last, entries));
                saved?;
                position = last;
                page = next?;
            } else {
                save.await?;
                position = last;
                let linger = LINGERS.iter().find(|(busy, _)| orders >= *busy);
                if let Some((_, wait)) = linger
                    && !sleep(*wait, token).await
                {
                    return Ok(());
                }
                page = source.read(&self.link, position, entries).await?;
            }
        }
    }

    /// Counts a page's orders and publishes how far behind it shows us.
    fn observe(&self, page: &Page) -> usize {
        let metrics = self.store.metrics();
        let orders = || {
            page.entries.iter().filter_map(|entry| match &entry.event {
                Ok(Event::Orders(orders)) => Some(orders),
                Ok(Event::Released { .. } | Event::Sale(_) | Event::SaleChanged(_) | Event::Epoch(_))
                | Err(_) => None,
            })
        };
        if let Some(oldest) = orders().flatten().next() {
            let age_ms = self.store.clock().now().since_ms(oldest.accepted_at);
            metrics.lag_seconds.set(age_ms as f64 / 1000.0);
        }
        let first = page.entries.first().map_or(page.last_seq, |entry| entry.id.seq);
        metrics.lag_entries.set(i64::try_from(page.last_seq.saturating_sub(first)).unwrap_or(i64::MAX));
        orders().map(Vec::len).sum()
    }

    /// Stores a page, in as many transactions as its size asks for. Every entry moves the position, also those
    /// that are none of ours.
    async fn save(&self, mut from: OutboxId, entries: Vec<Entry>) -> Result<(), Halt> {
        let mut orders: Vec<OrderRecord> = Vec::new();
        let mut unreadable = Vec::new();
        let mut to = from;
        for entry in entries {
            to = entry.id;
            match entry.event {
                Ok(Event::Orders(more)) => orders.extend(more),
                Ok(Event::Released { .. } | Event::Sale(_) | Event::SaleChanged(_) | Event::Epoch(_)) => {}
                Err(bad) => {
                    tracing::error!(
                        partition = self.link.partition, outbox_id = %to, reason = bad.reason,
                        "an outbox entry cannot be read and is set aside"
                    );
                    unreadable.push(Unreadable {
                        origin: Origin::Outbox { partition: self.link.partition, id: to },
                        reason: bad.reason,
                        raw: bad.raw,
                    });
                }
            }
            if orders.len() >= self.store_batch {
                self.commit(&mut from, to, &mut orders, &mut unreadable).await?;
            }
        }
        if from != to {
            self.commit(&mut from, to, &mut orders, &mut unreadable).await?;
        }
        Ok(())
    }

    async fn commit(
        &self,
        from: &mut OutboxId,
        to: OutboxId,
        orders: &mut Vec<OrderRecord>,
        unreadable: &mut Vec<Unreadable>,
    ) -> Result<(), Halt> {
        let batch = StoreBatch {
            unreadable: std::mem::take(unreadable),
            ..StoreBatch::outbox(self.link.partition, *from, to, std::mem::take(orders))
        };
        self.store.store(batch).await?;
        *from = to;
        Ok(())
    }
}
