//! The one task that writes.
//!
//! Writes that wait are put into one transaction, so that many payments share one sync of the log. When one of
//! them fails, nothing of the transaction counts and each is tried again in a transaction of its own: a write
//! hurts nobody but its caller.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use seckill_domain::{CenterId, Clock, Millis, Shard};
use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection, Row};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::super::error::Error;
use super::super::metrics::OrderMetrics;
use super::super::updates::Updates;
use super::schema;

/// Writes that may wait; past it callers are refused and workers wait.
const QUEUE: usize = 4096;
/// Writes in one transaction at most: readers and the next writes wait no longer than these take.
const GROUP: usize = 256;

type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One write. It may run more than once, but only one run counts.
pub(super) trait Write: Send + Sync + 'static {
    /// What the caller is told.
    type Output: Send + 'static;

    /// Does it. An error undoes the whole transaction.
    fn run(&self, tx: &mut Tx<'_>) -> impl Future<Output = Result<Self::Output, Error>> + Send;

    /// Called once, after the transaction is safe.
    fn committed(&self, output: &Self::Output, hub: &Hub);
}

/// A transaction under way.
pub(super) struct Tx<'c> {
    /// The connection it runs on.
    pub(super) conn: &'c mut SqliteConnection,
    /// The time of all its rows.
    pub(super) now: Millis,
    /// The shards that this center owns, as read in this transaction (O1).
    pub(super) owned: OwnedShards,
}

/// A set of shards.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnedShards(u64);

impl OwnedShards {
    pub(super) fn contains(self, shard: Shard) -> bool {
        self.0 & (1 << shard.number()) != 0
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

/// The way to the writing task.
#[derive(Clone)]
pub(super) struct Writer(mpsc::Sender<Box<dyn Job>>);

impl Writer {
    /// Starts the task. It ends when every `Writer` is gone and the queue is empty.
    pub(super) fn start(
        conn: SqliteConnection,
        path: PathBuf,
        center: CenterId,
        clock: Arc<dyn Clock>,
        hub: Hub,
    ) -> (Writer, JoinHandle<()>) {
        let (sender, jobs) = mpsc::channel(QUEUE);
        let task = Task { conn: Some(conn), path, center, clock, hub, jobs };
        (Writer(sender), tokio::spawn(task.run()))
    }

    /// Hands a write over and waits for its outcome; refused when too many wait.
    pub(super) async fn run<W: Write>(&self, write: W) -> Result<W::Output, Error> {
        let (job, outcome) = Pending::job(write);
        self.0.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Error::Overloaded,
            mpsc::error::TrySendError::Closed(_) => Error::Closed,
        })?;
        outcome.await.unwrap_or(Err(Error::Closed))
    }

    /// Hands a write over, waiting for a place in the queue first: for workers, which have nobody to refuse.
    pub(super) async fn run_patiently<W: Write>(&self, write: W) -> Result<W::Output, Error> {
        let (job, outcome) = Pending::job(write);
        self.0.send(job).await.map_err(|_| Error::Closed)?;
        outcome.await.unwrap_or(Err(Error::Closed))
    }
}

trait Job: Send {
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
    // `None` after the connection broke, until the next write opens another.
    conn: Option<SqliteConnection>,
    path: PathBuf,
    center: CenterId,
    clock: Arc<dyn Clock>,
    hub: Hub,
    jobs: mpsc::Receiver<Box<dyn Job>>,
}

impl Task {
    async fn run(mut self) {
        let mut group = Vec::with_capacity(GROUP);
        while self.jobs.recv_many(&mut group, GROUP).await > 0 {
            match self.attempt(&mut group).await {
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
                Err(_) => self.one_by_one(&mut group).await,
            }
        }
        if let Some(conn) = self.conn.take()
            && let Err(error) = conn.close().await
        {
            tracing::warn!(%error, "the order database did not close cleanly");
        }
    }

    async fn one_by_one(&mut self, group: &mut Vec<Box<dyn Job>>) {
        for job in group.drain(..) {
            let mut alone = [job];
            let outcome = self.attempt(&mut alone).await;
            let [job] = alone;
            match outcome {
                Ok(()) => job.committed(&self.hub),
                Err(error) => job.failed(error),
            }
        }
    }

    /// Runs all of them in one transaction.
    async fn attempt(&mut self, jobs: &mut [Box<dyn Job>]) -> Result<(), Error> {
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => {
                let mut conn = schema::connect_writer(&self.path).await?;
                schema::create_staging(&mut conn).await?;
                conn
            }
        };
        let outcome = transaction(&mut conn, &self.center, self.clock.now(), jobs).await;
        // After an error of the database (a full disk makes SQLite roll back by itself) nobody knows in which
        // state the connection is, so it is not used again.
        let usable = match &outcome {
            Ok(()) => true,
            Err(Error::Unavailable(_) | Error::Database(_)) => false,
            // Dropping the transaction queued its rollback; the ping runs behind it.
            Err(_) => conn.ping().await.is_ok() && !conn.is_in_transaction(),
        };
        if usable {
            self.conn = Some(conn);
        }
        outcome
    }
}

async fn transaction(
    conn: &mut SqliteConnection,
    center: &CenterId,
    now: Millis,
    jobs: &mut [Box<dyn Job>],
) -> Result<(), Error> {
    let mut transaction = conn.begin_with("BEGIN IMMEDIATE").await?;
    let owned = owned_shards(&mut transaction, center).await?;
    for job in jobs {
        job.run(&mut Tx { conn: &mut transaction, now, owned }).await?;
    }
    transaction.commit().await?;
    Ok(())
}

async fn owned_shards(conn: &mut SqliteConnection, center: &CenterId) -> Result<OwnedShards, Error> {
    // Two halves, because 64 bits do not fit SQLite's signed sum.
    let row = sqlx::query(
        "SELECT COALESCE(SUM(1 << shard) FILTER (WHERE shard < 32), 0),
                COALESCE(SUM(1 << (shard - 32)) FILTER (WHERE shard >= 32), 0)
         FROM shard_owner WHERE owner = ?",
    )
    .bind(center.as_str())
    .fetch_one(conn)
    .await?;
    let (low, high): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    Ok(OwnedShards(low.cast_unsigned() | high.cast_unsigned() << 32))
}
