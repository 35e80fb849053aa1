//! Whether the replicas have what was written: the barrier and its `WAIT` (rules K1 and K2).
//!
//! `WAIT` speaks only for the writes of its own connection. A small fenced write that is sent after the replies
//! of other connections' writes stands behind all of them in the replication stream, so a `WAIT` for it covers
//! them, too. `WAIT` holds its connection up until it ends: nothing else may share it.

use redis::Value;
use redis::aio::ConnectionLike;

use crate::error::Error;
use crate::fence::Fence;
use crate::keys;
use crate::reply::{Reply, malformed, number};
use crate::roles::Role;
use crate::scripts::BARRIER;

/// How a server is asked to wait for its replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitCommand {
    /// `WAIT`: they have it in memory.
    Wait,
    /// `WAITAOF` (Redis 7.2 and later, Valkey): they have it in their append-only files.
    WaitAof,
}

/// What became of a barrier that was let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replication {
    /// As many replicas as were asked for have it, and no others are attached.
    Confirmed,
    /// Time passed before enough of them had it.
    TooFew {
        /// How many had it.
        confirmed: usize,
    },
    /// More replicas are attached than are known: those that confirmed may be the wrong ones (K1).
    Stranger {
        /// How many are attached.
        attached: usize,
    },
}

/// The stronger of the commands that the server knows.
pub async fn wait_command(conn: &mut impl ConnectionLike) -> Result<WaitCommand, Error> {
    let known: Vec<Value> = redis::cmd("COMMAND").arg("INFO").arg("WAITAOF").query_async(conn).await?;
    Ok(match known.first() {
        None | Some(Value::Nil) => WaitCommand::Wait,
        Some(Value::Array(about)) if about.is_empty() => WaitCommand::Wait,
        Some(_) => WaitCommand::WaitAof,
    })
}

/// Sends a barrier under a fence and waits until `replicas` replicas have it, at most `timeout_ms`. The
/// connection's response timeout must be longer, and the connection nobody else's. An error means that nobody
/// knows, and that the connection is of no more use.
pub async fn barrier(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    replicas: usize,
    timeout_ms: u64,
    command: WaitCommand,
) -> Result<Replication, Error> {
    let call = BARRIER.call(2).arg(keys::FENCE).arg(keys::CLOCK).arg(fence.to_string());
    let mut pipe = redis::pipe();
    pipe.add_command(call.into_cmd());
    match command {
        WaitCommand::Wait => pipe.cmd("WAIT"),
        // The master's own file is written before it answers at all.
        WaitCommand::WaitAof => pipe.cmd("WAITAOF").arg(0),
    };
    pipe.arg(replicas).arg(timeout_ms.max(1)).cmd("ROLE");
    let (script, waited, role): (Value, Value, Value) = pipe.query_async(conn).await?;
    let reply = Reply::parse(script)?;
    if reply.code != "OK" {
        return Err(reply.unknown());
    }
    let confirmed = match waited {
        Value::Array(mut both) if both.len() == 2 => number(both.pop())?,
        single => number(Some(single))?,
    };
    let confirmed = usize::try_from(confirmed).unwrap_or(usize::MAX);
    match Role::parse(role)? {
        Role::Master { replicas: attached, .. } if attached > replicas => {
            Ok(Replication::Stranger { attached })
        }
        Role::Master { .. } if confirmed >= replicas => Ok(Replication::Confirmed),
        Role::Master { .. } => Ok(Replication::TooFew { confirmed }),
        role @ Role::Replica { .. } => Err(malformed(&Value::SimpleString(format!("{role:?}")))),
    }
}
