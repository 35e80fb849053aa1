//! What a MySQL or MariaDB server says of its replication: from whom it copies, how far it is, and waiting for it.
//!
//! MariaDB's positions name a domain, a server and a number (`1-1-42`); MySQL's are sets of numbers by server. Both are
//! handed on as text, from the server that wrote to the one that waits.

use std::time::Duration;

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;
use tokio::time::Instant;

use super::super::error::{Error, mysql_number};
use super::session::{Connection, Session, values};

/// One question whether a position was reached; a connection is held no longer than that.
const WAIT_STEP: Duration = Duration::from_secs(1);
/// `ER_SPECIFIC_ACCESS_DENIED_ERROR`: the account may not look at the server's replication.
const DENIED: u16 = 1227;

/// From whom a server copies, and how that goes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ReplicaStatus {
    /// Whether it receives changes and applies them.
    pub running: bool,
    /// Whether it applies what it has received, though it may not receive any more.
    pub applies: bool,
    /// Up to where it has received changes, in the words of the server.
    pub received: String,
    /// How far it is behind, seconds, if it knows.
    pub behind_s: Option<u64>,
    /// What stopped it.
    pub error: Option<String>,
}

/// What kind of server it is, and how it numbers what it writes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ServerStanding {
    /// As the server names itself.
    pub version: String,
    /// A number or text that no other server has.
    pub server: String,
    /// Whether what it writes is numbered, so that another server can be waited for.
    pub numbered: bool,
    /// `auto_increment_increment` and `auto_increment_offset`: servers that replicate each other must not give out
    /// the same numbers.
    pub increments: (u64, u64),
    /// From whom it copies; empty if from nobody, or if the account may not see it.
    pub copies: Vec<ReplicaStatus>,
    /// Whether the account may see from whom it copies.
    pub may_see: bool,
}

/// The server's version.
pub(super) async fn version(session: &mut Session) -> Result<String, Error> {
    Ok(session.one("SELECT VERSION()", values![]).await?.text(0)?.to_owned())
}

fn is_mariadb(version: &str) -> bool {
    version.contains("MariaDB")
}

/// Whether the server copies from another one. An account that may not look takes it for one that does not.
pub(super) async fn is_replicated(session: &mut Session) -> Result<bool, Error> {
    let version = version(session).await?;
    Ok(copies(session, &version).await?.is_some_and(|copies| !copies.is_empty()))
}

/// From whom the server copies; `None` if the account may not see it.
async fn copies(session: &mut Session, version: &str) -> Result<Option<Vec<ReplicaStatus>>, Error> {
    let Connection::MySql(conn) = session.connection() else { return Ok(None) };
    let (sql, words) = if is_mariadb(version) {
        (
            "SHOW ALL SLAVES STATUS",
            ["Slave_IO_Running", "Slave_SQL_Running", "Seconds_Behind_Master", "Gtid_IO_Pos"],
        )
    } else {
        (
            "SHOW REPLICA STATUS",
            ["Replica_IO_Running", "Replica_SQL_Running", "Seconds_Behind_Source", "Retrieved_Gtid_Set"],
        )
    };
    let rows = match sqlx::raw_sql(sql).fetch_all(conn).await {
        Ok(rows) => rows,
        Err(error) if mysql_number(&error) == Some(DENIED) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let status = |row: &MySqlRow| -> Result<ReplicaStatus, sqlx::Error> {
        let text = |name: &str| row.try_get_unchecked::<Option<String>, _>(name);
        let yes = |name: &str| text(name).map(|text| text.as_deref() == Some("Yes"));
        let mut errors = Vec::new();
        for name in ["Last_IO_Error", "Last_SQL_Error"] {
            errors.extend(text(name)?.filter(|error| !error.is_empty()));
        }
        Ok(ReplicaStatus {
            running: yes(words[0])? && yes(words[1])?,
            applies: yes(words[1])?,
            received: text(words[3])?.unwrap_or_default().replace('\n', ""),
            behind_s: text(words[2])?.and_then(|seconds| seconds.parse().ok()),
            error: (!errors.is_empty()).then(|| errors.join("; ")),
        })
    };
    Ok(Some(rows.iter().map(status).collect::<Result<_, _>>()?))
}

/// What the server is.
pub(super) async fn standing(session: &mut Session) -> Result<ServerStanding, Error> {
    let version = version(session).await?;
    let (server, numbered) = if is_mariadb(&version) {
        // A server without a binary log writes nothing that another could copy.
        (
            "SELECT CONCAT(@@global.gtid_domain_id, '-', @@global.server_id)",
            "SELECT CAST(@@global.log_bin AND @@global.gtid_strict_mode AS SIGNED)",
        )
    } else {
        (
            "SELECT @@global.server_uuid",
            "SELECT CAST(@@global.log_bin AND @@global.gtid_mode = 'ON' AS SIGNED)",
        )
    };
    let server = session.one(server, values![]).await?.text(0)?.to_owned();
    let numbered = session.number(numbered, values![]).await? == 1;
    let increment =
        session.number("SELECT CAST(@@global.auto_increment_increment AS SIGNED)", values![]).await?;
    let offset = session.number("SELECT CAST(@@global.auto_increment_offset AS SIGNED)", values![]).await?;
    let copies = copies(session, &version).await?;
    Ok(ServerStanding {
        version,
        server,
        numbered,
        increments: (increment.unsigned_abs(), offset.unsigned_abs()),
        may_see: copies.is_some(),
        copies: copies.unwrap_or_default(),
    })
}

/// Everything that was committed on this server by now. What it copied from others is no part of it with MariaDB:
/// they have that themselves.
pub(super) async fn written(session: &mut Session) -> Result<String, Error> {
    if !is_mariadb(&version(session).await?) {
        return Ok(session.one("SELECT @@global.gtid_executed", values![]).await?.text(0)?.replace('\n', ""));
    }
    let domain = session.number("SELECT CAST(@@global.gtid_domain_id AS SIGNED)", values![]).await?;
    let row = session.one("SELECT @@global.gtid_binlog_pos", values![]).await?;
    let own = format!("{domain}-");
    Ok(row.text(0)?.split(',').filter(|part| part.trim().starts_with(&own)).collect::<Vec<_>>().join(","))
}

/// Waits until this server has applied what another one had written; whether that happened in time.
pub(super) async fn reaches(session: &mut Session, position: &str, deadline: Instant) -> Result<bool, Error> {
    if position.is_empty() {
        return Ok(true);
    }
    // Both answer 0 when it is reached. What is no position never gets into the statement.
    let known = |c: char| c.is_ascii_hexdigit() || matches!(c, '-' | ',' | ':' | ' ');
    if !position.chars().all(known) {
        return Err(Error::Row(format!("position {position:?}")));
    }
    let wait =
        if is_mariadb(&version(session).await?) { "MASTER_GTID_WAIT" } else { "WAIT_FOR_EXECUTED_GTID_SET" };
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let step = left.min(WAIT_STEP).as_secs_f64();
        let sql = format!("SELECT CAST({wait}('{position}', {step:.3}) AS SIGNED)");
        if session.row(sql, values![]).await?.and_then(|row| row.opt_int(0).ok().flatten()) == Some(0) {
            return Ok(true);
        }
        if left.is_zero() {
            return Ok(false);
        }
    }
}
