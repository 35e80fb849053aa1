//! Handing the ledger over from the server that has it to the one that follows it, while both are there (H2).

use redis::Value;
use redis::aio::ConnectionLike;

use crate::admin::{FenceChange, FenceOutcome, fence_args};
use crate::error::Error;
use crate::fence::Fence;
use crate::keys;
use crate::reply::{Reply, malformed};
use crate::roles::Role;
use crate::scripts::FENCE;

/// A server after it was fenced and its writes were held up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fenced {
    /// What became of the fence. With anything but [`FenceOutcome::Set`] and [`FenceOutcome::Same`] nothing happened,
    /// and its writes are not held up.
    pub outcome: FenceOutcome,
    /// Where its stream of changes ends, bytes: the fence is the last of them.
    pub offset: u64,
}

/// What a master's `repl-ping-replica-period` is set to while it is handed over: its pings are part of its stream of
/// changes, and one that the next master does not have would cost a full copy. A day, so that it is nobody's setting.
const PING_HELD_S: u64 = 86_400;
/// Redis' own default, for a server whose setting was not restored by whoever held it.
const PING_DEFAULT_S: u64 = 10;
const PING_PERIOD: &str = "repl-ping-replica-period";

/// How often a server pings its replicas, seconds, if it tells.
pub async fn ping_period(conn: &mut impl ConnectionLike) -> Option<u64> {
    let get = redis::cmd("CONFIG").arg("GET").arg(PING_PERIOD).query_async::<Vec<String>>(conn).await;
    get.ok()?.into_iter().nth(1)?.parse().ok()
}

/// Lifts a master's fence to that of the next master and holds up its writes for `pause_ms`, all in one round trip:
/// whatever arrives later is refused by the fence or waits. The connection watches the fence from then on, for
/// [`follow`], so nobody else may use it. `ping_s`: what [`ping_period`] answered.
///
/// After an error nobody knows how far it came: [`resume`] ends the pause, and the fence is that of an epoch that is
/// recorded and never used again (H1).
pub async fn fence_and_pause(
    conn: &mut impl ConnectionLike,
    from: &Fence,
    to: &Fence,
    pause_ms: u64,
    ping_s: Option<u64>,
) -> Result<Fenced, Error> {
    let mut pipe = redis::pipe();
    if ping_s.is_some() {
        pipe.cmd("CONFIG").arg("SET").arg(PING_PERIOD).arg(PING_HELD_S).ignore();
    }
    let eval = pipe.cmd("EVAL").arg(FENCE.text()).arg(4);
    for arg in fence_args(&FenceChange::Lift { from: from.clone() }, to, false) {
        eval.arg(arg);
    }
    pipe.cmd("CLIENT").arg("PAUSE").arg(pause_ms).arg("WRITE").ignore();
    pipe.cmd("ROLE").cmd("WATCH").arg(keys::FENCE).ignore().cmd("GET").arg(keys::FENCE);
    let (reply, role, watched): (Value, Value, Option<String>) = pipe.query_async(conn).await?;
    let outcome = FenceOutcome::parse(Reply::parse(reply)?)?;
    let set = matches!(outcome, FenceOutcome::Set | FenceOutcome::Same);
    if !set || watched.as_deref() != Some(to.to_string().as_str()) {
        resume(conn).await?;
        redis::cmd("UNWATCH").query_async::<()>(conn).await?;
        let outcome = if set { FenceOutcome::Mismatch { found: watched } } else { outcome };
        return Ok(Fenced { outcome, offset: 0 });
    }
    match Role::parse(role)? {
        Role::Master { offset, .. } => Ok(Fenced { outcome, offset }),
        role @ Role::Replica { .. } => Err(malformed(&Value::SimpleString(format!("{role:?}")))),
    }
}

/// A server that is held up again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Where its stream of changes ends, bytes.
    pub offset: u64,
    /// What [`follow`] restores.
    pub ping_s: Option<u64>,
}

/// Holds up the writes of a master that has this fence already, and watches the fence, as [`fence_and_pause`] does, for
/// whoever goes on in the place of the one that fenced it. `None`: it has another fence or follows somebody, and
/// nothing happened; a replica that is held up would not apply what its master sends.
///
/// Nothing in this is a write, which would wait until a pause ends that the one before left behind.
pub async fn hold(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    pause_ms: u64,
) -> Result<Option<Held>, Error> {
    let mut look = redis::pipe();
    look.cmd("WATCH").arg(keys::FENCE).ignore().cmd("GET").arg(keys::FENCE).cmd("ROLE");
    let (watched, role): (Option<String>, Value) = look.query_async(conn).await?;
    let same = watched.as_deref() == Some(fence.to_string().as_str());
    if !same || !matches!(Role::parse(role)?, Role::Master { .. }) {
        redis::cmd("UNWATCH").query_async::<()>(conn).await?;
        return Ok(None);
    }
    let ping_s = ping_period(conn).await;
    let mut hold = redis::pipe();
    if ping_s.is_some() {
        hold.cmd("CONFIG").arg("SET").arg(PING_PERIOD).arg(PING_HELD_S).ignore();
    }
    hold.cmd("CLIENT").arg("PAUSE").arg(pause_ms).arg("WRITE").ignore().cmd("ROLE");
    let (role,): (Value,) = hold.query_async(conn).await?;
    match Role::parse(role)? {
        Role::Master { offset, .. } => Ok(Some(Held { offset, ping_s })),
        // Somebody was faster.
        Role::Replica { .. } => {
            resume(conn).await?;
            redis::cmd("UNWATCH").query_async::<()>(conn).await?;
            Ok(None)
        }
    }
}

/// Makes the server that [`fence_and_pause`] fenced on this connection, or [`hold`] held up, the replica of the new
/// master, if the fence is still the same (S2), and lets its writes go on, which are refused there. Returns whether it
/// happened.
pub async fn follow(
    conn: &mut impl ConnectionLike,
    host: &str,
    port: u16,
    account: (Option<&str>, Option<&str>),
    ping_s: Option<u64>,
) -> Result<bool, Error> {
    let mut pipe = redis::pipe();
    if let (user, Some(password)) = account {
        let set = pipe.cmd("CONFIG").arg("SET").arg("masterauth").arg(password);
        if let Some(user) = user {
            set.arg("masteruser").arg(user);
        }
        pipe.ignore();
    }
    pipe.cmd("MULTI").ignore().cmd("REPLICAOF").arg(host).arg(port).ignore().cmd("EXEC");
    // A replica whose writes are held up does not apply those of its master either.
    pipe.cmd("CLIENT").arg("UNPAUSE").ignore();
    if let Some(ping_s) = ping_s {
        pipe.cmd("CONFIG").arg("SET").arg(PING_PERIOD).arg(restored(ping_s)).ignore();
    }
    let (done,): (Value,) = pipe.query_async(conn).await?;
    Ok(done != Value::Nil)
}

/// Lets a server's writes go on, and its pings.
pub async fn resume(conn: &mut impl ConnectionLike) -> Result<(), Error> {
    redis::cmd("CLIENT").arg("UNPAUSE").query_async::<()>(conn).await?;
    if ping_period(conn).await == Some(PING_HELD_S) {
        let mut set = redis::cmd("CONFIG");
        set.arg("SET").arg(PING_PERIOD).arg(PING_DEFAULT_S).query_async::<()>(conn).await?;
    }
    Ok(())
}

fn restored(ping_s: u64) -> u64 {
    if ping_s == PING_HELD_S { PING_DEFAULT_S } else { ping_s }
}
