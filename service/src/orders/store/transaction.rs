//! One writing task's transactions: begun, tried again where that is safe, and looked after where the answer to a
//! commit was lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::RngExt as _;
use seckill_domain::{CenterId, Clock, Shard};
use sqlx::Connection as _;
use tokio::time::Instant;

use super::super::error::Error;
use super::database::Database;
use super::mysql;
use super::session::{Dialect, Session, values};
use super::writer::{Job, OwnedShards, Tx};

/// Attempts at a transaction that others were in the way of.
const CONTENDED_ATTEMPTS: u32 = 8;
/// Attempts at a transaction whose connection was lost before its commit was sent: the server may have closed it
/// while nobody used it, or be restarting.
const LOST_ATTEMPTS: u32 = 2;
/// How long the server may take for a transaction up to its commit, and for the commit. Statements end sooner by
/// themselves; this is for a server that does not answer at all.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);
const COMMIT_TIMEOUT: Duration = Duration::from_secs(20);
/// For how long a lost commit is asked after, before its callers are told that its outcome is unknown.
const ASK_FOR: Duration = Duration::from_secs(30);
/// Between two questions.
const ASK_AGAIN: Duration = Duration::from_millis(250);

/// The transactions of one task.
pub(super) struct Transactions {
    database: Arc<Database>,
    // `None` after the connection broke, until the next transaction opens another.
    session: Option<Session>,
    center: CenterId,
    clock: Arc<dyn Clock>,
    /// This task's row in `writers`.
    writer: String,
    /// The number of the last transaction that was begun.
    seq: i64,
    /// The shards that the topology gives to this center, as far as this instance has heard: a database that was away
    /// while they were taken may still say something else.
    given: Arc<AtomicU64>,
}

/// How a transaction failed.
enum Failure {
    /// Nothing of it happened.
    Undone(Error),
    /// Its commit was sent, and no answer came.
    Lost { error: Error, connection: i64 },
}

impl Transactions {
    pub(super) fn new(
        database: Arc<Database>,
        session: Option<Session>,
        center: CenterId,
        clock: Arc<dyn Clock>,
    ) -> Transactions {
        // Databases that replicate each other hold each other's rows: each center removes its own.
        let writer = format!("{center}.{:015x}", rand::rng().random::<u64>() >> 4);
        let given = Arc::new(AtomicU64::new(u64::MAX));
        Transactions { database, session, center, clock, writer, seq: 0, given }
    }

    pub(super) fn within(self, given: Arc<AtomicU64>) -> Transactions {
        Transactions { given, ..self }
    }

    pub(super) async fn close(&mut self) {
        let closed = match self.session.take() {
            Some(Session::Sqlite(conn)) => conn.close().await,
            Some(Session::MySql(conn)) => conn.close().await,
            Some(Session::SqliteReader(_) | Session::MySqlReader(_)) | None => Ok(()),
        };
        if let Err(error) = closed {
            tracing::warn!(%error, "the order database did not close cleanly");
        }
    }

    /// Runs all of them in one transaction: all of them happened, or, with an error other than
    /// [`Error::Unknown`], none.
    pub(super) async fn run(&mut self, jobs: &mut [Box<dyn Job>]) -> Result<(), Error> {
        let (mut contended, mut lost) = (1, 1);
        loop {
            match self.attempt(jobs).await {
                Ok(()) => return Ok(()),
                Err(Failure::Lost { error, connection }) => {
                    if self.ask(connection, error).await? {
                        return Ok(());
                    }
                    lost += 1;
                    if lost > LOST_ATTEMPTS {
                        return Err(Error::Unavailable(sqlx::Error::Protocol(
                            "a commit was lost".to_owned(),
                        )));
                    }
                }
                Err(Failure::Undone(error)) if error.is_contended() && contended < CONTENDED_ATTEMPTS => {
                    let pause_ms = rand::rng().random_range(1..=10 * u64::from(contended));
                    contended += 1;
                    tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                }
                Err(Failure::Undone(error))
                    if !error.is_answer() && lost < LOST_ATTEMPTS && self.is_server() =>
                {
                    lost += 1;
                }
                Err(Failure::Undone(error)) => return Err(error),
            }
        }
    }

    fn is_server(&self) -> bool {
        matches!(*self.database, Database::MySql(_))
    }

    async fn attempt(&mut self, jobs: &mut [Box<dyn Job>]) -> Result<(), Failure> {
        let mut session = match self.session.take() {
            Some(session) => session,
            None => self.database.connect().await.map_err(Failure::Undone)?,
        };
        match session.dialect() {
            Dialect::Sqlite => self.on_sqlite(session, jobs).await.map_err(Failure::Undone),
            Dialect::MySql => {
                self.seq += 1;
                let run = self.before_commit(&mut session, jobs);
                let connection = match tokio::time::timeout(RUN_TIMEOUT, run).await {
                    Ok(Ok(connection)) => connection,
                    Ok(Err(error)) => {
                        // What the server answered leaves a connection that can be used; after anything else its
                        // state is not known, and it is dropped.
                        if error.is_answer() && session.roll_back().await.is_ok() {
                            self.session = Some(session);
                        }
                        return Err(Failure::Undone(error));
                    }
                    Err(_) => return Err(Failure::Undone(Error::Unavailable(sqlx::Error::PoolTimedOut))),
                };
                let error = match tokio::time::timeout(COMMIT_TIMEOUT, session.run("COMMIT")).await {
                    Ok(Ok(_)) => {
                        self.session = Some(session);
                        return Ok(());
                    }
                    Ok(Err(error)) => error,
                    Err(_) => Error::Unavailable(sqlx::Error::PoolTimedOut),
                };
                // Also an error that the server answered may have come after the log was written (a commit that
                // waited for a replica, a shutdown), so it is asked.
                Err(Failure::Lost { error, connection })
            }
        }
    }

    async fn on_sqlite(&mut self, mut session: Session, jobs: &mut [Box<dyn Job>]) -> Result<(), Error> {
        let outcome = async {
            session.run("BEGIN IMMEDIATE").await?;
            self.run_jobs(&mut session, jobs).await?;
            session.run("COMMIT").await?;
            Ok(())
        }
        .await;
        // After an error of the database (a full disk makes SQLite roll back by itself) nobody knows in which
        // state the connection is, so it is not used again.
        let usable = match &outcome {
            Ok(()) => true,
            Err(Error::Unavailable(_) | Error::Database(_)) => false,
            Err(_) => session.roll_back().await.is_ok(),
        };
        if usable {
            self.session = Some(session);
        }
        outcome
    }

    /// Everything but the commit; returns the connection's number on the server.
    async fn before_commit(&self, session: &mut Session, jobs: &mut [Box<dyn Job>]) -> Result<i64, Error> {
        let (writer, seq) = (&self.writer, self.seq);
        session
            .run(format!(
                "START TRANSACTION;
                 INSERT INTO writers (writer, seq, at) VALUES ('{writer}', {seq}, UNIX_TIMESTAMP())
                 ON DUPLICATE KEY UPDATE seq = {seq}, at = VALUES(at)"
            ))
            .await?;
        self.run_jobs(session, jobs).await?;
        session.number("SELECT CAST(CONNECTION_ID() AS SIGNED)", values![]).await
    }

    async fn run_jobs(&self, session: &mut Session, jobs: &mut [Box<dyn Job>]) -> Result<(), Error> {
        let owned = owned_shards(session, &self.center).await?.within(self.given.load(Ordering::Acquire));
        for job in jobs {
            let now = self.clock.now();
            job.run(&mut Tx { conn: &mut *session, now, owned, center: &self.center }).await?;
        }
        Ok(())
    }

    /// Whether the last transaction happened although the answer to its commit was lost. The row of this task says
    /// so; who reads it with a lock waits until the server is done with that transaction. If the server does not
    /// notice that nobody is behind the old connection, that connection is ended first.
    async fn ask(&mut self, connection: i64, lost: Error) -> Result<bool, Error> {
        tracing::warn!(error = %lost, "the answer to a commit of the order database was lost; asking for its outcome");
        let until = Instant::now() + ASK_FOR;
        loop {
            match tokio::time::timeout(COMMIT_TIMEOUT, self.ask_once(connection)).await {
                Ok(Ok(seq)) => return Ok(seq == self.seq),
                Ok(Err(_)) | Err(_) if Instant::now() < until => tokio::time::sleep(ASK_AGAIN).await,
                Ok(Err(error)) => {
                    tracing::error!(%error, "the outcome of a commit of the order database is unknown");
                    return Err(unknown(lost));
                }
                Err(_) => return Err(unknown(lost)),
            }
        }
    }

    async fn ask_once(&mut self, connection: i64) -> Result<i64, Error> {
        let mut session = self.database.connect().await?;
        mysql::kill(&mut session, connection).await?;
        session.run("START TRANSACTION").await?;
        let row = session
            .row("SELECT seq FROM writers WHERE writer = ? FOR UPDATE", values![self.writer.as_str()])
            .await?;
        let seq = row.map_or(Ok(0), |row| row.int(0))?;
        session.roll_back().await?;
        self.session = Some(session);
        Ok(seq)
    }
}

fn unknown(error: Error) -> Error {
    match error {
        Error::Unavailable(source) | Error::Database(source) => Error::Unknown(source),
        error => error,
    }
}

/// The shards that are ours until the end of the transaction (O1).
async fn owned_shards(session: &mut Session, center: &CenterId) -> Result<OwnedShards, Error> {
    let sql = match session.dialect() {
        Dialect::Sqlite => "SELECT shard FROM shard_owner WHERE owner = ?",
        // MariaDB has no `FOR SHARE`, and both know this.
        Dialect::MySql => "SELECT shard FROM shard_owner WHERE owner = ? LOCK IN SHARE MODE",
    };
    let mut owned = Vec::with_capacity(64);
    for row in session.rows(sql, values![center.as_str()]).await? {
        let number: u8 = row.small(0)?;
        owned.push(Shard::new(number).ok_or_else(|| Error::Row(format!("shard {number}")))?);
    }
    Ok(OwnedShards::of(owned))
}
