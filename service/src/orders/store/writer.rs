//! The tasks that write: one with SQLite, which has one writer; some with MySQL, whose locks are on rows.
//!
//! Writes that wait are put into one transaction, so that many payments share one sync of the log. When one of
//! them fails, nothing of the transaction counts and each is tried again in a transaction of its own: a write
//! hurts nobody but its caller.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use seckill_domain::{CenterId, Clock, Millis, Shard};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::super::error::Error;
use super::super::metrics::OrderMetrics;
use super::super::updates::Updates;
use super::database::Database;
use super::session::Session;
use super::transaction::Transactions;

/// Writes that may wait; past it callers are refused and workers wait.
const QUEUE: usize = 4096;
/// Writes in one transaction at most: readers and the next writes wait no longer than these take.
const GROUP: usize = 256;

type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One write. It may run more than once, but only one run counts.
pub(super) trait Write: Send + Sync + 'static {
    /// What the caller is told.
    type Output: Send + 'static;

    /// Which writes it has to come behind.
    fn lane(&self) -> Lane;

    /// Does it. An error undoes the whole transaction.
    fn run(&self, tx: &mut Tx<'_>) -> impl Future<Output = Result<Self::Output, Error>> + Send;

    /// Called once, after the transaction is safe.
    fn committed(&self, output: &Self::Output, hub: &Hub);
}

/// Writes of one lane happen in the order in which they were handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// Batches of a queue's partition.
    Batch(u16),
    /// What changes single orders, by table; the rest is 0.
    Orders(u16),
}

/// A transaction under way.
pub(super) struct Tx<'c> {
    /// The connection it runs on.
    pub(super) conn: &'c mut Session,
    /// The time of all its rows.
    pub(super) now: Millis,
    /// The shards that this center owns, as read in this transaction (O1).
    pub(super) owned: OwnedShards,
    /// This center.
    pub(super) center: &'c CenterId,
}

/// A set of shards.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnedShards(u64);

impl OwnedShards {
    pub(super) fn of(shards: impl IntoIterator<Item = Shard>) -> OwnedShards {
        OwnedShards(shards.into_iter().fold(0, |set, shard| set | 1 << shard.number()))
    }

    /// As a set of bits.
    pub(super) fn bits(self) -> u64 {
        self.0
    }

    /// Those that are in a set of bits, too.
    pub(super) fn within(self, bits: u64) -> OwnedShards {
        OwnedShards(self.0 & bits)
    }

    pub(super) fn contains(self, shard: Shard) -> bool {
        self.0 & (1 << shard.number()) != 0
    }

    pub(super) fn iter(self) -> impl Iterator<Item = Shard> {
        Shard::all().filter(move |shard| self.contains(*shard))
    }

    /// More of a condition: only rows whose order, named by this column, belongs to one of these shards. An order id
    /// names its table in its second to fourth digit. Databases that replicate each other hold each other's rows.
    pub(super) fn condition(self, column: &str) -> String {
        if self.0 == u64::MAX {
            return String::new();
        }
        let shards: Vec<String> = self.iter().map(|shard| shard.number().to_string()).collect();
        if shards.is_empty() {
            return " AND 1 = 0".to_owned();
        }
        format!(" AND (SUBSTR({column}, 2, 3) + 0) % 64 IN ({})", shards.join(", "))
    }

    pub(super) fn check(self, shard: Shard) -> Result<(), Error> {
        if self.contains(shard) { Ok(()) } else { Err(Error::NotOwner(shard)) }
    }
}

/// Whom a finished write tells.
pub(super) struct Hub {
    pub(super) updates: Updates,
    pub(super) metrics: OrderMetrics,
}

/// The way to the writing tasks.
#[derive(Clone)]
pub(super) struct Writer {
    /// Those for batches, and those for single orders; the same one where there is only one.
    batches: Arc<[mpsc::Sender<Box<dyn Job>>]>,
    orders: Arc<[mpsc::Sender<Box<dyn Job>>]>,
}

impl Writer {
    /// Starts the tasks. They end when every `Writer` is gone and the queues are empty.
    pub(super) fn start(
        database: &Arc<Database>,
        first: Session,
        center: &CenterId,
        clock: &Arc<dyn Clock>,
        hub: &Arc<Hub>,
        given: &Arc<AtomicU64>,
    ) -> (Writer, Vec<JoinHandle<()>>) {
        let mut first = Some(first);
        let mut tasks = Vec::new();
        let mut start = || {
            let (sender, jobs) = mpsc::channel(QUEUE);
            let transactions =
                Transactions::new(Arc::clone(database), first.take(), center.clone(), Arc::clone(clock))
                    .within(Arc::clone(given));
            let task = Task { transactions, hub: Arc::clone(hub), jobs };
            tasks.push(tokio::spawn(task.run()));
            sender
        };
        let writer = match database.writers() {
            1 => {
                let one: Arc<[_]> = Arc::new([start()]);
                Writer { batches: Arc::clone(&one), orders: one }
            }
            some => Writer {
                batches: (0..some).map(|_| start()).collect(),
                orders: (0..some).map(|_| start()).collect(),
            },
        };
        (writer, tasks)
    }

    fn lane(&self, lane: Lane) -> Result<&mpsc::Sender<Box<dyn Job>>, Error> {
        let (tasks, number) = match lane {
            Lane::Batch(number) => (&self.batches, number),
            Lane::Orders(number) => (&self.orders, number),
        };
        tasks.get(usize::from(number) % tasks.len().max(1)).ok_or(Error::Closed)
    }

    /// Hands a write over and waits for its outcome; refused when too many wait.
    pub(super) async fn run<W: Write>(&self, write: W) -> Result<W::Output, Error> {
        let task = self.lane(write.lane())?;
        let (job, outcome) = Pending::job(write);
        task.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::Overloaded,
            mpsc::error::TrySendError::Closed(_) => Error::Closed,
        })?;
        outcome.await.unwrap_or(Err(Error::Closed))
    }

    /// Hands a write over, waiting for a place in the queue first: for workers, which have nobody to refuse.
    pub(super) async fn run_patiently<W: Write>(&self, write: W) -> Result<W::Output, Error> {
        let task = self.lane(write.lane())?;
        let (job, outcome) = Pending::job(write);
        task.send(job).await.map_err(|_| Error::Closed)?;
        outcome.await.unwrap_or(Err(Error::Closed))
    }
}

/// A write and whoever waits for it.
pub(super) trait Job: Send {
    fn run<'a>(&'a mut self, tx: &'a mut Tx<'_>) -> BoxFuture<'a, Result<(), Error>>;
    fn committed(self: Box<Self>, hub: &Hub);
    fn failed(self: Box<Self>, error: Error);
}

/// Where the caller waits.
type Outcome<W> = oneshot::Receiver<Result<<W as Write>::Output, Error>>;

struct Pending<W: Write> {
    write: W,
    output: Option<W::Output>,
    reply: oneshot::Sender<Result<W::Output, Error>>,
}

impl<W: Write> Pending<W> {
    fn job(write: W) -> (Box<dyn Job>, Outcome<W>) {
        let (reply, outcome) = oneshot::channel();
        (Box::new(Pending { write, output: None, reply }), outcome)
    }
}

impl<W: Write> Job for Pending<W> {
    fn run<'a>(&'a mut self, tx: &'a mut Tx<'_>) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            self.output = Some(self.write.run(tx).await?);
            Ok(())
        })
    }

    fn committed(self: Box<Self>, hub: &Hub) {
        let Some(output) = self.output else { return };
        self.write.committed(&output, hub);
        // A caller that went away does not need the answer.
        let _ = self.reply.send(Ok(output));
    }

    fn failed(self: Box<Self>, error: Error) {
        let _ = self.reply.send(Err(error));
    }
}

struct Task {
    transactions: Transactions,
    hub: Arc<Hub>,
    jobs: mpsc::Receiver<Box<dyn Job>>,
}

impl Task {
    async fn run(mut self) {
        let mut group = Vec::with_capacity(GROUP);
        while self.jobs.recv_many(&mut group, GROUP).await > 0 {
            match self.transactions.run(&mut group).await {
                Ok(()) => {
                    for job in group.drain(..) {
                        job.committed(&self.hub);
                    }
                }
                Err(error) if group.len() == 1 => {
                    if let Some(job) = group.pop() {
                        job.failed(error);
                    }
                }
                // Nobody can say which of them hurt the others, or there is nobody to ask.
                Err(error) if error.is_answer() => self.one_by_one(&mut group).await,
                Err(error) => {
                    for job in group.drain(..) {
                        job.failed(error.for_another());
                    }
                }
            }
        }
        self.transactions.close().await;
    }

    async fn one_by_one(&mut self, group: &mut Vec<Box<dyn Job>>) {
        for job in group.drain(..) {
            let mut alone = [job];
            let outcome = self.transactions.run(&mut alone).await;
            let [job] = alone;
            match outcome {
                Ok(()) => job.committed(&self.hub),
                Err(error) => job.failed(error),
            }
        }
    }
}
