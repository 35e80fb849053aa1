//! SQLite: the tables, and the connections that reach them.
//!
//! Table names come from a [`Table`]'s number, never from text. The id columns compare byte for byte: that is
//! SQLite's default collation.

use std::path::{Path, PathBuf};
use std::time::Duration;

use seckill_domain::{CenterId, Shard, Table};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection};

use super::super::error::Error;
use super::session::{Session, values};

/// Version of the tables that this release reads and writes.
const SCHEMA: i64 = 3;
/// Half of SQLite's default: a batch touches a page in each of some hundred tables, and writes whole pages.
const PAGE_BYTES: u32 = 2048;
/// How long a connection waits for another one's lock: somebody may have the file open in a shell.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// Statements kept prepared by a connection: some for each of the 512 tables.
const PREPARED: usize = 2048;
/// The writer's page cache, KiB.
const WRITER_CACHE_KIB: u32 = 128 * 1024;
/// Pages in the log before they are moved into the database file: 64 MiB. Fewer moves write a page fewer times.
const CHECKPOINT_PAGES: u32 = 32 * 1024;
/// What the log shrinks to after it was larger.
const LOG_BYTES: u32 = 128 * 1024 * 1024;
/// Attempts to open a database that another process is just creating.
const OPEN_ATTEMPTS: u32 = 20;

/// Where the database lies.
pub(super) fn path_of(database_url: &str) -> Result<PathBuf, Error> {
    let path = database_url.strip_prefix("sqlite:").map(|path| path.strip_prefix("//").unwrap_or(path));
    match path {
        Some(path) if !path.is_empty() && !path.contains(['?', ':']) => Ok(PathBuf::from(path)),
        _ => Err(Error::Url),
    }
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .busy_timeout(BUSY_TIMEOUT)
        .statement_cache_capacity(PREPARED)
        // No table refers to another.
        .foreign_keys(false)
        .disable_statement_logging()
}

/// Opens the one connection that writes; creates the file if there is none.
pub(super) async fn connect_writer(path: &Path) -> Result<SqliteConnection, Error> {
    let options = options(path)
        .create_if_missing(true)
        .page_size(PAGE_BYTES)
        .journal_mode(SqliteJournalMode::Wal)
        // A stored order must survive power loss: the log is synced with every transaction.
        .synchronous(SqliteSynchronous::Full)
        .pragma("temp_store", "MEMORY")
        .pragma("cache_size", format!("-{WRITER_CACHE_KIB}"))
        .pragma("wal_autocheckpoint", CHECKPOINT_PAGES.to_string())
        .pragma("journal_size_limit", LOG_BYTES.to_string())
        // The copy of a large batch answers once for each table.
        .row_buffer_size(256);
    let mut attempt = 1;
    loop {
        match options.connect().await {
            Ok(conn) => return Ok(conn),
            // Changing to WAL does not wait for another process that does the same.
            Err(error) if attempt < OPEN_ATTEMPTS && is_busy(&error) => {
                attempt += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(source) => {
                return Err(Error::Open { path: path.display().to_string(), source, passing: false });
            }
        }
    }
}

fn is_busy(error: &sqlx::Error) -> bool {
    error.as_database_error().and_then(|error| error.code()).is_some_and(|code| code == "5" || code == "261")
}

/// Opens the connections that read.
pub(super) async fn connect_readers(path: &Path, connections: u32) -> Result<SqlitePool, Error> {
    SqlitePoolOptions::new()
        .max_connections(connections.max(1))
        .acquire_timeout(BUSY_TIMEOUT)
        .test_before_acquire(false)
        .connect_with(options(path).read_only(true))
        .await
        .map_err(|source| Error::Open { path: path.display().to_string(), source, passing: false })
}

/// Brings the tables to this release's form, in one transaction. Whoever comes second finds the work done.
pub(super) async fn migrate(
    conn: &mut SqliteConnection,
    center: &CenterId,
    shards: &[Shard],
) -> Result<(), Error> {
    let mut tx = conn.begin_with("BEGIN IMMEDIATE").await?;
    let found: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut *tx).await?;
    if found > SCHEMA {
        return Err(Error::Migrate(format!(
            "its tables have version {found}, this release knows versions up to {SCHEMA}"
        )));
    }
    if found < 1 {
        sqlx::raw_sql(AssertSqlSafe(version_1())).execute(&mut *tx).await?;
        for shard in shards {
            sqlx::query("INSERT INTO shard_owner (shard, owner, epoch) VALUES (?, ?, 0)")
                .bind(shard.number())
                .bind(center.as_str())
                .execute(&mut *tx)
                .await?;
        }
    }
    if found < 2 {
        sqlx::raw_sql(AssertSqlSafe(version_2())).execute(&mut *tx).await?;
    }
    if found < 3 {
        sqlx::raw_sql(AssertSqlSafe(version_3(center))).execute(&mut *tx).await?;
    }
    sqlx::raw_sql(AssertSqlSafe(format!("PRAGMA user_version = {SCHEMA}"))).execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(())
}

/// A database whose shards are another center's is not for us. One without any is a center's that joined later.
pub(super) async fn check_owner(session: &mut Session, center: &CenterId) -> Result<(), Error> {
    let owner = session
        .row(
            "SELECT owner, COUNT(*) FROM shard_owner GROUP BY owner ORDER BY owner = ? DESC LIMIT 1",
            values![center.as_str()],
        )
        .await?;
    match owner.as_ref().map(|row| row.text(0)).transpose()? {
        Some(owner) if owner != center.as_str() => {
            Err(Error::ForeignCenter { owner: owner.to_owned(), center: center.to_string() })
        }
        Some(_) | None => Ok(()),
    }
}

fn version_1() -> String {
    let mut sql = String::with_capacity(512 * 1200);
    for table in Table::all() {
        // The clustered key grows at its end, because ids of one table grow; what a user owns is found by the
        // index.
        sql.push_str(&format!(
            "CREATE TABLE orders_{table} (
               order_id TEXT NOT NULL PRIMARY KEY,
               uid TEXT NOT NULL,
               sale_id TEXT NOT NULL,
               kind TEXT NOT NULL,
               quantity INTEGER NOT NULL,
               unit_price INTEGER NOT NULL,
               currency TEXT NOT NULL,
               amount INTEGER NOT NULL,
               status TEXT NOT NULL,
               accepted_at INTEGER NOT NULL,
               created_at INTEGER NOT NULL,
               expires_at INTEGER NOT NULL,
               paid_at INTEGER,
               closed_at INTEGER,
               paid_amount INTEGER,
               coupon_id TEXT,
               reason TEXT
             ) WITHOUT ROWID;
             CREATE INDEX orders_{table}_uid ON orders_{table} (uid, created_at, order_id);
             CREATE TABLE coupons_{table} (
               coupon_id TEXT NOT NULL PRIMARY KEY,
               uid TEXT NOT NULL,
               sale_id TEXT NOT NULL,
               discount INTEGER NOT NULL,
               min_amount INTEGER NOT NULL,
               currency TEXT NOT NULL,
               valid_until INTEGER NOT NULL,
               state TEXT NOT NULL,
               created_at INTEGER NOT NULL,
               redeemed_by TEXT
             ) WITHOUT ROWID;
             CREATE INDEX coupons_{table}_uid ON coupons_{table} (uid, created_at, coupon_id);\n"
        ));
    }
    sql.push_str(
        "CREATE TABLE outbox_position (partition INTEGER NOT NULL PRIMARY KEY, position TEXT NOT NULL);
         CREATE TABLE outbox_marks (
           partition INTEGER NOT NULL, at INTEGER NOT NULL, position TEXT NOT NULL, PRIMARY KEY (partition, at)
         ) WITHOUT ROWID;
         CREATE TABLE shard_owner (
           shard INTEGER NOT NULL PRIMARY KEY, owner TEXT NOT NULL, epoch INTEGER NOT NULL);
         -- What is due when, in one place for all tables: new rows come at the end, a look at the front is
         -- enough. A row says where to look; the order itself says whether it expires.
         CREATE TABLE expiries (
           expires_at INTEGER NOT NULL, order_id TEXT NOT NULL, PRIMARY KEY (expires_at, order_id)) WITHOUT ROWID;
         CREATE TABLE releases (
           id INTEGER PRIMARY KEY AUTOINCREMENT,
           order_id TEXT NOT NULL UNIQUE,
           uid TEXT NOT NULL,
           sale_id TEXT NOT NULL,
           quantity INTEGER NOT NULL,
           reason TEXT NOT NULL,
           state TEXT NOT NULL DEFAULT 'pending',
           created_at INTEGER NOT NULL);
         CREATE INDEX releases_pending ON releases (id) WHERE state = 'pending';
         CREATE TABLE payments (
           payment_id TEXT NOT NULL PRIMARY KEY,
           order_id TEXT NOT NULL,
           amount INTEGER NOT NULL,
           coupon_id TEXT,
           outcome TEXT NOT NULL,
           created_at INTEGER NOT NULL) WITHOUT ROWID;
         CREATE TABLE refunds (
           id INTEGER PRIMARY KEY AUTOINCREMENT,
           payment_id TEXT NOT NULL UNIQUE,
           order_id TEXT NOT NULL,
           uid TEXT NOT NULL,
           sale_id TEXT NOT NULL,
           amount INTEGER NOT NULL,
           currency TEXT NOT NULL,
           order_status TEXT NOT NULL,
           created_at INTEGER NOT NULL);
         CREATE TABLE unreadable (
           id INTEGER PRIMARY KEY AUTOINCREMENT,
           partition INTEGER NOT NULL,
           outbox_id TEXT NOT NULL,
           reason TEXT NOT NULL,
           raw TEXT NOT NULL,
           created_at INTEGER NOT NULL,
           UNIQUE (partition, outbox_id, reason));\n",
    );
    sql
}

/// Positions of the other queue.
fn version_2() -> String {
    let mut sql = "CREATE TABLE kafka_offsets (shard INTEGER NOT NULL PRIMARY KEY, next_offset INTEGER NOT NULL);
         -- Up to which outbox entry each shard is stored, as the records and marks in its Kafka partition say.
         CREATE TABLE kafka_marks (
           shard INTEGER NOT NULL, partition INTEGER NOT NULL, position TEXT NOT NULL,
           PRIMARY KEY (shard, partition)) WITHOUT ROWID;
         ALTER TABLE unreadable ADD COLUMN queue TEXT NOT NULL DEFAULT 'outbox';\n"
        .to_owned();
    for shard in Shard::all() {
        sql.push_str(&format!("INSERT INTO kafka_offsets VALUES ({}, 0);\n", shard.number()));
    }
    sql
}

/// What several centers write side by side names its center, as on servers that replicate each other, where two rows
/// with one key would be a conflict. A center's id is letters, digits and hyphens.
fn version_3(center: &CenterId) -> String {
    format!(
        "CREATE TABLE outbox_positions (
           center TEXT NOT NULL, partition INTEGER NOT NULL, position TEXT NOT NULL,
           PRIMARY KEY (center, partition)) WITHOUT ROWID;
         CREATE TABLE outbox_trim (
           center TEXT NOT NULL, partition INTEGER NOT NULL, at INTEGER NOT NULL, position TEXT NOT NULL,
           PRIMARY KEY (center, partition, at)) WITHOUT ROWID;
         CREATE TABLE kafka_next (
           center TEXT NOT NULL, shard INTEGER NOT NULL, next_offset INTEGER NOT NULL,
           PRIMARY KEY (center, shard)) WITHOUT ROWID;
         INSERT INTO outbox_positions SELECT '{center}', partition, position FROM outbox_position;
         INSERT INTO outbox_trim SELECT '{center}', partition, at, position FROM outbox_marks;
         INSERT INTO kafka_next SELECT '{center}', shard, next_offset FROM kafka_offsets;
         DROP TABLE outbox_position;
         DROP TABLE outbox_marks;
         DROP TABLE kafka_offsets;
         ALTER TABLE payments ADD COLUMN center TEXT NOT NULL DEFAULT '{center}';
         ALTER TABLE refunds ADD COLUMN center TEXT NOT NULL DEFAULT '{center}';
         ALTER TABLE unreadable ADD COLUMN center TEXT NOT NULL DEFAULT '{center}';\n"
    )
}

/// The writer's scratch tables, in memory: a batch is put there first and copied from there, table by table.
pub(super) async fn create_staging(conn: &mut SqliteConnection) -> Result<(), Error> {
    sqlx::raw_sql(
        "CREATE TEMP TABLE IF NOT EXISTS staged (
           place INTEGER PRIMARY KEY, order_id INTEGER NOT NULL, uid TEXT NOT NULL, quantity INTEGER NOT NULL,
           entry INTEGER NOT NULL);
         CREATE TEMP TABLE IF NOT EXISTS entries (
           entry INTEGER PRIMARY KEY, sale_id TEXT NOT NULL, kind TEXT NOT NULL, unit_price INTEGER NOT NULL,
           currency TEXT NOT NULL, status TEXT NOT NULL, accepted_at INTEGER NOT NULL, created_at INTEGER NOT NULL,
           expires_at INTEGER NOT NULL, discount INTEGER, min_amount INTEGER, valid_until INTEGER);",
    )
    .execute(conn)
    .await?;
    Ok(())
}
