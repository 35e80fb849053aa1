//! MySQL and MariaDB: connections, and the tables.

use std::time::{Duration, Instant};

use seckill_domain::{CenterId, Shard, Table};
use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlPool, MySqlPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor as _};

use super::super::error::{Error, mysql_number};
use super::replication;
use super::schema::check_owner;
use super::session::{Session, values};

/// Version of the tables that this release writes.
const SCHEMA: i64 = 2;
/// The oldest version whose releases can work with these tables.
const OLDEST: i64 = 1;
/// How long a connection may take to come about.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a reader waits for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection is replaced after this time, so that a name that points elsewhere now is noticed.
const MAX_LIFETIME: Duration = Duration::from_secs(30 * 60);
/// Statements that a connection keeps prepared: those that belong to no table, and there are fewer.
const PREPARED: usize = 64;
/// How long another instance may take to make the tables: on a slow disk each of them waits for several syncs.
const MIGRATION_WAIT: Duration = Duration::from_secs(600);
/// One question for the migration lock. Shorter than the server's limit for a statement, which would end it.
const LOCK_WAIT_S: u32 = 10;
/// Between two looks whether another center has made the tables.
const TABLES_AGAIN: Duration = Duration::from_millis(250);
/// How long a statement may run.
const STATEMENT_LIMIT_S: u32 = 30;
/// Tables made by one call.
const TABLES_A_CALL: usize = 32;
/// What every connection is set to. Without backslashes and with strict values a text is what it says; the lock wait
/// is shorter than a caller's patience; the server ends a statement that runs away.
const SETTINGS: &str =
    "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,NO_BACKSLASH_ESCAPES',
    time_zone = '+00:00', innodb_lock_wait_timeout = 5, autocommit = 1;
    SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED";

/// Reads `mysql://USER:PASSWORD@HOST:PORT/DATABASE`, with `?ssl-mode=VERIFY_IDENTITY&ssl-ca=FILE` for TLS. The error
/// does not repeat it, because it holds a password.
pub(super) fn options_of(database_url: &str) -> Result<MySqlConnectOptions, Error> {
    let options: MySqlConnectOptions = database_url.parse().map_err(|_| Error::Url)?;
    if options.get_database().is_none_or(str::is_empty) {
        return Err(Error::Url);
    }
    Ok(options
        .charset("utf8mb4")
        .pipes_as_concat(false)
        .no_engine_substitution(false)
        .timezone(None)
        .statement_cache_capacity(PREPARED)
        .disable_statement_logging())
}

/// A connection's settings.
async fn set_up(conn: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    conn.execute(SETTINGS).await?;
    let version: String = sqlx::query_scalar("SELECT VERSION()").fetch_one(&mut *conn).await?;
    conn.execute(limit_of(&version, STATEMENT_LIMIT_S)).await?;
    Ok(())
}

/// Limits statements: in seconds with MariaDB, every one; in milliseconds with MySQL, queries. 0 means no limit.
fn limit_of(version: &str, seconds: u32) -> AssertSqlSafe<String> {
    AssertSqlSafe(if version.contains("MariaDB") {
        format!("SET SESSION max_statement_time = {seconds}")
    } else {
        format!("SET SESSION max_execution_time = {seconds}000")
    })
}

/// Opens a connection that writes.
pub(super) async fn connect_writer(options: &MySqlConnectOptions) -> Result<Session, Error> {
    let connect = async {
        let mut conn = options.connect().await?;
        set_up(&mut conn).await?;
        Ok::<_, sqlx::Error>(conn)
    };
    match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
        Ok(conn) => Ok(Session::MySql(Box::new(conn?))),
        Err(_) => Err(Error::Unavailable(sqlx::Error::PoolTimedOut)),
    }
}

/// The connections that read; they come about when they are needed.
pub(super) fn readers(options: MySqlConnectOptions, connections: u32) -> MySqlPool {
    MySqlPoolOptions::new()
        .max_connections(connections.max(1))
        .acquire_timeout(ACQUIRE_TIMEOUT)
        .max_lifetime(MAX_LIFETIME)
        .test_before_acquire(true)
        .after_connect(|conn, _| Box::pin(set_up(conn)))
        .connect_lazy_with(options)
}

/// Brings the tables to this release's form. Several instances may do so at once: a lock of the server's lets one
/// through, the others find the work done. A statement that makes a table cannot be undone, so every step may be
/// run again after it was interrupted, and the version is written behind it. Steps only add: releases before this
/// one go on working beside it, as far back as `oldest` says.
///
/// Where servers replicate each other one center makes the tables, and the others get them with everything else.
pub(super) async fn migrate(session: &mut Session, tables: &Tables<'_>) -> Result<(), Error> {
    let replicated = replication::is_replicated(session).await?;
    if replicated && !tables.makes {
        wait_for_tables(session).await?;
    }
    session
        .run(
            "CREATE TABLE IF NOT EXISTS schema_version (
               id BIGINT NOT NULL PRIMARY KEY, version BIGINT NOT NULL, oldest BIGINT NOT NULL) ENGINE=InnoDB",
        )
        .await?;
    let (found, oldest) = version(session).await?;
    if found > SCHEMA && oldest > SCHEMA {
        return Err(Error::Migrate(format!(
            "its tables have version {found}, which needs a release that knows version {oldest}; this one \
             knows versions up to {SCHEMA}"
        )));
    }
    if found < SCHEMA {
        // The server lets go of the lock when this connection ends, however it ends.
        const LOCK: &str = "CONCAT('seckill.', MD5(DATABASE()))";
        let until = Instant::now() + MIGRATION_WAIT;
        loop {
            let locked = session
                .row(format!("SELECT GET_LOCK({LOCK}, {LOCK_WAIT_S})"), values![])
                .await?
                .and_then(|row| row.opt_int(0).ok().flatten());
            if locked == Some(1) {
                break;
            }
            if Instant::now() >= until {
                return Err(Error::Migrate("another instance has been at it for too long".to_owned()));
            }
            tracing::info!("another instance makes the tables of the order database; waiting for it");
        }
        let (found, _) = version(session).await?;
        if found < 1 {
            tracing::info!(
                "making the tables of the order database; on a slow disk it takes a minute or two"
            );
            version_1(session).await?;
            own_shards(session, tables, replicated).await?;
        }
        if found < 2 {
            version_2(session, tables.center).await?;
        }
        session
            .run(format!(
                "INSERT INTO schema_version (id, version, oldest) VALUES (1, {SCHEMA}, {OLDEST})
                 ON DUPLICATE KEY UPDATE version = {SCHEMA}, oldest = {OLDEST}"
            ))
            .await?;
        session.rows(format!("SELECT RELEASE_LOCK({LOCK})"), values![]).await?;
    }
    let own = tables.center;
    session
        .run(format!(
            "DELETE FROM writers WHERE writer LIKE '{own}.%' AND at < UNIX_TIMESTAMP() - {FORGET_WRITERS_S}"
        ))
        .await?;
    if replicated { Ok(()) } else { check_owner(session, tables.center).await }
}

/// Whose tables they are to be.
pub(super) struct Tables<'a> {
    pub(super) center: &'a CenterId,
    /// This center's shards, and those of the others.
    pub(super) shards: &'a [Shard],
    pub(super) others: &'a [(Shard, CenterId)],
    /// Whether this center makes them where servers replicate each other.
    pub(super) makes: bool,
}

/// Waits for the tables that another center makes.
async fn wait_for_tables(session: &mut Session) -> Result<(), Error> {
    let until = Instant::now() + MIGRATION_WAIT;
    let mut told = false;
    loop {
        // Before the first of them there is no table to ask for its version.
        let made = session
            .number(
                "SELECT COUNT(*) FROM information_schema.tables
                 WHERE table_schema = DATABASE() AND table_name = 'schema_version'",
                values![],
            )
            .await?;
        if made > 0 && version(session).await?.0 >= SCHEMA {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(Error::Migrate(
                "its server replicates from another one, but the tables that the master center makes do not \
                 arrive; look at SHOW REPLICA STATUS"
                    .to_owned(),
            ));
        }
        if !std::mem::replace(&mut told, true) {
            tracing::info!("waiting for the tables of the order database, which the master center makes");
        }
        tokio::time::sleep(TABLES_AGAIN).await;
    }
}

/// Who owns what in a new database: this center's shards, and, where it is one of several that are one, everybody's.
async fn own_shards(session: &mut Session, tables: &Tables<'_>, replicated: bool) -> Result<(), Error> {
    let own = tables.shards.iter().map(|shard| (shard, tables.center));
    let others = tables.others.iter().filter(|_| replicated).map(|(shard, owner)| (shard, owner));
    for (shard, owner) in own.chain(others) {
        session
            .execute(
                "INSERT IGNORE INTO shard_owner (shard, owner, epoch) VALUES (?, ?, 0)",
                values![shard.number(), owner.as_str()],
            )
            .await?;
    }
    Ok(())
}

async fn version(session: &mut Session) -> Result<(i64, i64), Error> {
    let row = session.row("SELECT version, oldest FROM schema_version WHERE id = 1", values![]).await?;
    row.map_or(Ok((0, 0)), |row| Ok((row.int(0)?, row.int(1)?)))
}

async fn version_1(session: &mut Session) -> Result<(), Error> {
    let mut sql = String::new();
    for (number, table) in Table::all().enumerate() {
        sql.push_str(&order_tables(table));
        if number % TABLES_A_CALL == TABLES_A_CALL - 1 {
            session.run(std::mem::take(&mut sql)).await?;
        }
    }
    session.run(sql + OTHER_TABLES).await?;
    Ok(())
}

/// What several centers write side by side names its center: where servers replicate each other, two rows with one
/// key would be a conflict. Positions get tables of their own, so that an earlier release beside this one goes on
/// with its own positions; what both store is stored once.
async fn version_2(session: &mut Session, center: &CenterId) -> Result<(), Error> {
    // A table of payments may be long.
    let version = replication::version(session).await?;
    session.run(limit_of(&version, 0).0).await?;
    session.run(POSITION_TABLES).await?;
    session
        .run(format!(
            "INSERT IGNORE INTO outbox_positions SELECT '{center}', `partition`, position FROM outbox_position;
             INSERT IGNORE INTO outbox_trim SELECT '{center}', `partition`, at, position FROM outbox_marks;
             INSERT IGNORE INTO kafka_next SELECT '{center}', shard, next_offset FROM kafka_offsets
               WHERE next_offset > 0"
        ))
        .await?;
    for (table, keys) in [
        ("payments", "DROP PRIMARY KEY, ADD PRIMARY KEY (payment_id, center)"),
        ("refunds", "DROP INDEX payment_id, ADD UNIQUE KEY refunds_once (payment_id, center)"),
        (
            "unreadable",
            "DROP INDEX unreadable_once,
             ADD UNIQUE KEY unreadable_by_center (center, queue, `partition`, outbox_id, reason)",
        ),
    ] {
        let has = session
            .number(
                "SELECT COUNT(*) FROM information_schema.columns
                 WHERE table_schema = DATABASE() AND table_name = ? AND column_name = 'center'",
                values![table],
            )
            .await?;
        if has == 0 {
            session
                .run(format!(
                    "ALTER TABLE {table} ADD COLUMN center VARCHAR(16) NOT NULL DEFAULT '{center}', {keys}"
                ))
                .await?;
        }
    }
    session.run(limit_of(&version, STATEMENT_LIMIT_S).0).await?;
    Ok(())
}

const POSITION_TABLES: &str = "
    CREATE TABLE IF NOT EXISTS outbox_positions (
      center VARCHAR(16) NOT NULL, `partition` BIGINT NOT NULL, position VARCHAR(48) NOT NULL,
      PRIMARY KEY (center, `partition`)
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS outbox_trim (
      center VARCHAR(16) NOT NULL, `partition` BIGINT NOT NULL, at BIGINT NOT NULL, position VARCHAR(48) NOT NULL,
      PRIMARY KEY (center, `partition`, at)
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS kafka_next (
      center VARCHAR(16) NOT NULL, shard BIGINT NOT NULL, next_offset BIGINT NOT NULL, PRIMARY KEY (center, shard)
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;";

/// Ids compare byte for byte: `Bob` is not `bob`. The clustered key grows at its end, because ids of one table grow.
fn order_tables(table: Table) -> String {
    format!(
        "CREATE TABLE IF NOT EXISTS orders_{table} (
           order_id CHAR(19) NOT NULL PRIMARY KEY,
           uid VARCHAR(128) NOT NULL,
           sale_id VARCHAR(48) NOT NULL,
           kind VARCHAR(16) NOT NULL,
           quantity BIGINT NOT NULL,
           unit_price BIGINT NOT NULL,
           currency CHAR(3) NOT NULL,
           amount BIGINT NOT NULL,
           status VARCHAR(16) NOT NULL,
           accepted_at BIGINT NOT NULL,
           created_at BIGINT NOT NULL,
           expires_at BIGINT NOT NULL,
           paid_at BIGINT,
           closed_at BIGINT,
           paid_amount BIGINT,
           coupon_id CHAR(19),
           reason VARCHAR(500) CHARACTER SET utf8mb4,
           KEY orders_{table}_uid (uid, created_at, order_id)
         ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
         CREATE TABLE IF NOT EXISTS coupons_{table} (
           coupon_id CHAR(19) NOT NULL PRIMARY KEY,
           uid VARCHAR(128) NOT NULL,
           sale_id VARCHAR(48) NOT NULL,
           discount BIGINT NOT NULL,
           min_amount BIGINT NOT NULL,
           currency CHAR(3) NOT NULL,
           valid_until BIGINT NOT NULL,
           state VARCHAR(16) NOT NULL,
           created_at BIGINT NOT NULL,
           redeemed_by CHAR(19),
           KEY coupons_{table}_uid (uid, created_at, coupon_id)
         ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;"
    )
}

/// `writers` holds the number of each writing task's last transaction: after a commit whose answer was lost, it
/// says whether it happened.
const OTHER_TABLES: &str = "
    CREATE TABLE IF NOT EXISTS outbox_position (
      `partition` BIGINT NOT NULL PRIMARY KEY, position VARCHAR(48) NOT NULL
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS outbox_marks (
      `partition` BIGINT NOT NULL, at BIGINT NOT NULL, position VARCHAR(48) NOT NULL, PRIMARY KEY (`partition`, at)
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS kafka_offsets (
      shard BIGINT NOT NULL PRIMARY KEY, next_offset BIGINT NOT NULL
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS kafka_marks (
      shard BIGINT NOT NULL, `partition` BIGINT NOT NULL, position VARCHAR(48) NOT NULL,
      PRIMARY KEY (shard, `partition`)
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS shard_owner (
      shard BIGINT NOT NULL PRIMARY KEY, owner VARCHAR(64) NOT NULL, epoch BIGINT NOT NULL
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS writers (
      writer CHAR(32) NOT NULL PRIMARY KEY, seq BIGINT NOT NULL, at BIGINT NOT NULL
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS expiries (
      expires_at BIGINT NOT NULL, order_id CHAR(19) NOT NULL, PRIMARY KEY (expires_at, order_id)
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS releases (
      id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
      order_id CHAR(19) NOT NULL UNIQUE,
      uid VARCHAR(128) NOT NULL,
      sale_id VARCHAR(48) NOT NULL,
      quantity BIGINT NOT NULL,
      reason VARCHAR(16) NOT NULL,
      state VARCHAR(16) NOT NULL DEFAULT 'pending',
      created_at BIGINT NOT NULL,
      KEY releases_state (state, id)
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS payments (
      payment_id VARCHAR(64) NOT NULL PRIMARY KEY,
      order_id CHAR(19) NOT NULL,
      amount BIGINT NOT NULL,
      coupon_id CHAR(19),
      outcome VARCHAR(16) NOT NULL,
      created_at BIGINT NOT NULL
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS refunds (
      id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
      payment_id VARCHAR(64) NOT NULL UNIQUE,
      order_id CHAR(19) NOT NULL,
      uid VARCHAR(128) NOT NULL,
      sale_id VARCHAR(48) NOT NULL,
      amount BIGINT NOT NULL,
      currency CHAR(3) NOT NULL,
      order_status VARCHAR(16) NOT NULL,
      created_at BIGINT NOT NULL
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;
    CREATE TABLE IF NOT EXISTS unreadable (
      id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
      queue VARCHAR(16) NOT NULL,
      `partition` BIGINT NOT NULL,
      outbox_id VARCHAR(48) NOT NULL,
      reason VARCHAR(500) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
      raw MEDIUMTEXT CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
      created_at BIGINT NOT NULL,
      UNIQUE KEY unreadable_once (queue, `partition`, outbox_id, reason)
    ) ENGINE=InnoDB DEFAULT CHARSET=ascii COLLATE=ascii_bin;";

/// Rows of writers that wrote nothing for this long belong to processes that are gone: a lost commit is asked after
/// for less than a minute.
const FORGET_WRITERS_S: i64 = 7 * 24 * 3600;

/// Ends a connection of the server, with whatever it was doing.
pub(super) async fn kill(session: &mut Session, connection: i64) -> Result<(), Error> {
    let Session::MySql(conn) = session else { return Ok(()) };
    match conn.execute(AssertSqlSafe(format!("KILL CONNECTION {connection}"))).await {
        Ok(_) => Ok(()),
        // It is gone already.
        Err(error) if mysql_number(&error) == Some(1094) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
