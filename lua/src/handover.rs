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

/// Lifts a master's fence to that of the next master and holds up its writes for `pause_ms`, all in one round trip:
/// whatever arrives later is refused by the fence or waits. The connection watches the fence from then on, for
/// [`follow`], so nobody else may use it.
///
/// After an error nobody knows how far it came: [`resume`] ends the pause, and the fence is that of an epoch that is
/// recorded and never used again (H1).
pub async fn fence_and_pause(
    conn: &mut impl ConnectionLike,
    from: &Fence,
    to: &Fence,
    pause_ms: u64,
) -> Result<Fenced, Error> {
    let mut pipe = redis::pipe();
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

/// Makes the server that [`fence_and_pause`] fenced on this connection the replica of the new master, if the fence is
/// still the same (S2), and lets its writes go on, which are refused there. Returns whether it happened.
pub async fn follow(
    conn: &mut impl ConnectionLike,
    host: &str,
    port: u16,
    account: (Option<&str>, Option<&str>),
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
    let (done,): (Value,) = pipe.query_async(conn).await?;
    Ok(done != Value::Nil)
}

/// Lets a server's writes go on.
pub async fn resume(conn: &mut impl ConnectionLike) -> Result<(), Error> {
    Ok(redis::cmd("CLIENT").arg("UNPAUSE").query_async(conn).await?)
}
