//! The role of a Redis server: isolated, master or replica (S1, S2).

use redis::aio::ConnectionLike;
use redis::{Cmd, RedisError, Value};

use crate::admin::{FenceChange, FenceOutcome, fence_args, set_fence};
use crate::error::Error;
use crate::fence::Fence;
use crate::keys;
use crate::reply::{Reply, malformed, number, text};
use crate::scripts::FENCE;

/// What a server says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It takes writes.
    Master {
        /// Its replication offset, bytes.
        offset: u64,
        /// How many replicas are attached.
        replicas: usize,
    },
    /// It follows another server, or (isolated) one that does not exist.
    Replica {
        /// `HOST:PORT` of its master.
        of: String,
        /// `connect`, `connecting`, `sync` or `connected`.
        link: String,
        /// Its replication offset, bytes.
        offset: u64,
    },
}

/// The master that an isolated server is told to follow: nothing listens there (S1).
pub const NOWHERE: (&str, u16) = ("127.0.0.1", 1);

impl Role {
    /// Whether the server was started, or put, out of harm's way: it takes no writes and syncs nobody.
    pub fn is_isolated(&self) -> bool {
        matches!(self, Role::Replica { of, .. } if *of == format!("{}:{}", NOWHERE.0, NOWHERE.1))
    }

    pub(crate) fn parse(value: Value) -> Result<Role, Error> {
        let Value::Array(values) = value else { return Err(malformed(&value)) };
        let mut values = values.into_iter();
        match text(values.next())?.as_str() {
            "master" => {
                let offset = number(values.next())?;
                let replicas = match values.next() {
                    Some(Value::Array(replicas)) => replicas.len(),
                    _ => 0,
                };
                Ok(Role::Master { offset, replicas })
            }
            "slave" => {
                let of = format!("{}:{}", text(values.next())?, number(values.next())?);
                let link = text(values.next())?;
                // -1 until the first sync.
                let offset = number(values.next()).unwrap_or(0);
                Ok(Role::Replica { of, link, offset })
            }
            other => Err(Error::Malformed(format!("role {other:?}"))),
        }
    }
}

/// Who copies from whom, as a server sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Replication {
    /// Names the stream of changes that the server's data is a state of: a replica that is attached shows its
    /// master's.
    pub stream: String,
    /// On a replica: the link to its master is up and no copying of everything is under way.
    pub linked: bool,
    /// The replicas that are attached.
    pub replicas: Vec<Attached>,
}

/// A replica, as its master sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Where it connects from, and the port that it says it listens on.
    pub address: String,
    /// Whether it receives changes; one that is still being copied to does not.
    pub online: bool,
    /// Seconds since it last confirmed what it has.
    pub silent_s: u64,
}

impl Replication {
    /// Reads the section `replication` of `INFO`.
    fn parse(info: &str) -> Replication {
        let field = |name: &str| {
            info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
        };
        let linked =
            field("master_link_status") == Some("up") && field("master_sync_in_progress") == Some("0");
        let replicas = info
            .lines()
            .filter_map(|line| {
                let (name, value) = line.trim().split_once(':')?;
                let is_replica = name.strip_prefix("slave").is_some_and(|n| n.parse::<u32>().is_ok());
                is_replica.then(|| Attached::parse(value))
            })
            .collect();
        Replication { stream: field("master_replid").unwrap_or_default().to_owned(), linked, replicas }
    }
}

impl Attached {
    /// Reads `ip=…,port=…,state=…,offset=…,lag=…`.
    fn parse(text: &str) -> Attached {
        let field = |name: &str| {
            text.split(',').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
        };
        Attached {
            address: format!("{}:{}", field("ip"), field("port")),
            online: field("state") == "online",
            silent_s: field("lag").parse().unwrap_or(u64::MAX),
        }
    }
}

/// What a server is, and the fence that its data carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Its role.
    pub role: Role,
    /// The text of its fence, if it has one; parse it with [`Fence`]'s `FromStr`.
    pub fence: Option<String>,
    /// The sequence of its last outbox entry.
    pub seq: u64,
    /// Names this run of the server process; another after each restart.
    pub run_id: String,
    /// Who copies from whom.
    pub replication: Replication,
    /// Its append-only file has everything that it holds: it is on, and not being written anew, as it is after
    /// everything was copied from another server.
    pub log_ready: bool,
    /// It holds one whole state of the ledger: it is neither loading its data nor copying all of another server's.
    pub settled: bool,
}

/// Asks a server for its role, fence and run in one step.
pub async fn standing(conn: &mut impl ConnectionLike) -> Result<Standing, Error> {
    let mut info = redis::cmd("INFO");
    info.arg("server").arg("replication").arg("persistence");
    let (moment, info) = at_once(conn, info).await?;
    let info = text(Some(match info {
        Value::VerbatimString { text, .. } => Value::SimpleString(text),
        other => other,
    }))?;
    let run_id = info
        .lines()
        .find_map(|line| line.strip_prefix("run_id:"))
        .ok_or_else(|| Error::Malformed("INFO without run_id".to_owned()))?;
    let Moment { role, fence, seq } = moment;
    Ok(Standing {
        role,
        fence,
        seq,
        run_id: run_id.trim().to_owned(),
        replication: Replication::parse(&info),
        log_ready: ["aof_enabled:1", "aof_rewrite_in_progress:0", "aof_rewrite_scheduled:0"]
            .iter()
            .all(|wanted| info.lines().any(|line| line.trim() == *wanted)),
        settled: ["loading:1", "async_loading:1", "master_sync_in_progress:1"]
            .iter()
            .all(|unwanted| info.lines().all(|line| line.trim() != *unwanted)),
    })
}

/// What a server was when it answered.
pub(crate) struct Moment {
    pub(crate) role: Role,
    pub(crate) fence: Option<String>,
    pub(crate) seq: u64,
}

/// Runs a read together with the server's role and fence (R1): in one `MULTI` of `ROLE`, the fence and the read.
///
/// A master at its memory bound queues nothing in `MULTI` (a replica does), and must still be read, or the outbox
/// would never be trimmed. There the role and the fence are asked before and after instead: with the same fence
/// and the master's role on both sides, what was read in between was read from that master.
pub(crate) async fn at_once(conn: &mut impl ConnectionLike, read: Cmd) -> Result<(Moment, Value), Error> {
    let mut pipe = redis::pipe();
    pipe.atomic().cmd("ROLE").cmd("GET").arg(keys::FENCE).add_command(read.clone()).cmd("GET").arg(keys::SEQ);
    let answer: Result<(Value, Option<String>, Value, Option<u64>), RedisError> =
        pipe.query_async(conn).await;
    match answer {
        Ok((role, fence, value, seq)) => {
            Ok((Moment { role: Role::parse(role)?, fence, seq: seq.unwrap_or(0) }, value))
        }
        Err(error) if refused_for_memory(&error) => between_two_looks(conn, read).await,
        Err(error) => Err(error.into()),
    }
}

async fn between_two_looks(conn: &mut impl ConnectionLike, read: Cmd) -> Result<(Moment, Value), Error> {
    let mut pipe = redis::pipe();
    pipe.cmd("ROLE").cmd("GET").arg(keys::FENCE).add_command(read).cmd("GET").arg(keys::SEQ);
    pipe.cmd("GET").arg(keys::FENCE).cmd("ROLE");
    type Looks = (Value, Option<String>, Value, Option<u64>, Option<String>, Value);
    let (role, fence, value, seq, fence_after, role_after): Looks = pipe.query_async(conn).await?;
    let role = Role::parse(role)?;
    match (&role, Role::parse(role_after)?) {
        (Role::Master { .. }, Role::Master { .. }) if fence == fence_after => {
            Ok((Moment { role, fence, seq: seq.unwrap_or(0) }, value))
        }
        _ => Err(Error::Rejected("the server's role or fence changed during a read".to_owned())),
    }
}

fn refused_for_memory(error: &RedisError) -> bool {
    error.code() == Some("OOM")
        || error
            .clone()
            .into_server_errors()
            .is_some_and(|errors| errors.iter().any(|(_, e)| e.code() == "OOM"))
}

/// Makes a server the master and sets its fence in the same `MULTI`, if its fence is still `expected` (S2). No
/// write can come between the two. The connection must not be shared: `WATCH` belongs to it.
///
/// `None` means that the fence is not, or no longer, the expected one. Then, and with every outcome but
/// [`FenceOutcome::Set`] and [`FenceOutcome::Same`], nothing happened: the server keeps its role.
pub async fn promote(
    conn: &mut impl ConnectionLike,
    expected: Option<&str>,
    change: &FenceChange,
    to: &Fence,
) -> Result<Option<FenceOutcome>, Error> {
    redis::cmd("WATCH").arg(keys::FENCE).query_async::<()>(conn).await?;
    let role = Role::parse(redis::cmd("ROLE").query_async(conn).await?)?;
    // Decided before the role changes: a script that refuses inside MULTI would leave a master behind that
    // still carries the old fence.
    match foresee(conn, expected, change, to).await {
        // A master at its memory bound queues nothing in MULTI (a replica does), and needs none of it here: the
        // script itself checks that the fence is the expected one.
        Ok(Some(_)) if matches!((&role, change), (Role::Master { .. }, FenceChange::Lift { .. })) => {
            redis::cmd("UNWATCH").query_async::<()>(conn).await?;
            return match set_fence(conn, change, to).await? {
                FenceOutcome::Mismatch { .. } => Ok(None),
                outcome => Ok(Some(outcome)),
            };
        }
        Ok(Some(FenceOutcome::Set | FenceOutcome::Same)) => {}
        answer => {
            redis::cmd("UNWATCH").query_async::<()>(conn).await?;
            return answer;
        }
    }
    let mut pipe = redis::pipe();
    pipe.atomic().cmd("REPLICAOF").arg("NO").arg("ONE").ignore();
    let eval = pipe.cmd("EVAL").arg(FENCE.text_without_shebang()).arg(4);
    for arg in fence_args(change, to, false) {
        eval.arg(arg);
    }
    let answer: Option<Vec<Value>> = pipe.query_async(conn).await?;
    match answer {
        None => Ok(None),
        Some(values) => {
            let value = values.into_iter().next_back().unwrap_or(Value::Nil);
            FenceOutcome::parse(Reply::parse(value)?).map(Some)
        }
    }
}

/// What the fence script would answer, without a write; `None` if the fence is not the expected one.
async fn foresee(
    conn: &mut impl ConnectionLike,
    expected: Option<&str>,
    change: &FenceChange,
    to: &Fence,
) -> Result<Option<FenceOutcome>, Error> {
    let found: Option<String> = redis::cmd("GET").arg(keys::FENCE).query_async(conn).await?;
    if found.as_deref() != expected {
        return Ok(None);
    }
    let mut eval = redis::cmd("EVAL");
    eval.arg(FENCE.text_without_writes()).arg(4);
    for arg in fence_args(change, to, true) {
        eval.arg(arg);
    }
    FenceOutcome::parse(Reply::parse(eval.query_async(conn).await?)?).map(Some)
}

/// Makes a server the replica of another, if its fence is still `expected` (S2). Whatever it holds is replaced by
/// the other's data once that has arrived whole. The connection must not be shared: `WATCH` belongs to it.
///
/// Returns whether it happened: `false` means that the fence is not, or no longer, the expected one.
pub async fn follow(
    conn: &mut impl ConnectionLike,
    expected: Option<&str>,
    host: &str,
    port: u16,
) -> Result<bool, Error> {
    change_role(conn, expected, host, &port.to_string()).await
}

/// Makes a server a master *without* a new fence, if its fence is still `expected` (S2): a source that the server
/// of the master center copies from after it lost data. Nobody writes to it: whoever has authority writes to the
/// server of the center that the fence names, and this one is another center's.
///
/// Returns whether it happened, as [`follow`].
pub async fn open_as_source(conn: &mut impl ConnectionLike, expected: &str) -> Result<bool, Error> {
    change_role(conn, Some(expected), "NO", "ONE").await
}

async fn change_role(
    conn: &mut impl ConnectionLike,
    expected: Option<&str>,
    host: &str,
    port: &str,
) -> Result<bool, Error> {
    if !watch(conn, expected).await? {
        return Ok(false);
    }
    match replica_of(conn, host, port).await {
        // A master at its memory bound queues nothing in MULTI, a replica does. Out of harm's way it loses
        // nothing, and the fence is looked at again.
        Err(error) if refused_for_memory(&error) => {
            isolate(conn).await?;
            if !watch(conn, expected).await? {
                return Ok(false);
            }
            Ok(replica_of(conn, host, port).await?)
        }
        outcome => Ok(outcome?),
    }
}

/// Watches the fence; whether it is the expected one.
async fn watch(conn: &mut impl ConnectionLike, expected: Option<&str>) -> Result<bool, Error> {
    redis::cmd("WATCH").arg(keys::FENCE).query_async::<()>(conn).await?;
    let found: Option<String> = redis::cmd("GET").arg(keys::FENCE).query_async(conn).await?;
    if found.as_deref() != expected {
        redis::cmd("UNWATCH").query_async::<()>(conn).await?;
        return Ok(false);
    }
    Ok(true)
}

async fn replica_of(conn: &mut impl ConnectionLike, host: &str, port: &str) -> Result<bool, RedisError> {
    let mut pipe = redis::pipe();
    pipe.atomic().cmd("REPLICAOF").arg(host).arg(port);
    let answer: Option<Vec<Value>> = pipe.query_async(conn).await?;
    Ok(answer.is_some())
}

/// Puts a server out of harm's way: it takes no writes and gives nobody its data, whatever it held.
pub async fn isolate(conn: &mut impl ConnectionLike) -> Result<(), Error> {
    redis::cmd("REPLICAOF").arg(NOWHERE.0).arg(NOWHERE.1).query_async::<()>(conn).await?;
    Ok(())
}
