//! What is looked at before a shift is recorded: every comparison has a name, a value, a limit and a verdict. A dry
//! run makes the same comparisons and stops.

use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use seckill_domain::CenterId;
use seckill_ledger::roles::{self, Role, Standing};
use seckill_ledger::{Fence, handover, load_all, missing, read};

use super::ledger::LedgerError;
use super::operation::{Shared, ShiftRequest};
use super::record::{exposure, now};
use crate::topology::{Check, CheckVerdict, Durability, ShiftMode, Topology};

/// A store that takes longer than this to answer makes each change of the freeze as long.
const STORE_ANSWER_MAX: Duration = Duration::from_millis(500);
/// A farther master makes the freeze longer than purchases are held.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(400);
/// What a replica may lack to have it within the time that a catch-up may take, at 100 Mbit/s.
const LAG_BYTES_MAX: u64 = 8 << 20;
/// How old the replica's picture may be; the master's heartbeat is more frequent.
const LAG_TIME_MAX_MS: i64 = 2000;
/// The windows of sales begin and end by the master's clock.
const SKEW_WARN_MS: i64 = 1000;
const SKEW_MAX_MS: i64 = 30_000;
/// How long a server may take to answer all questions.
const SERVER_ANSWERS: Duration = Duration::from_secs(3);
/// How long the master is asked in a forced shift.
const GONE_ANSWERS: Duration = Duration::from_millis(300);

/// What was seen.
pub(super) struct Survey {
    pub(super) checks: Vec<Check>,
    pub(super) started_at: String,
    pub(super) took: Duration,
    /// The server of the center that takes.
    pub(super) target: Option<Standing>,
    /// The master's.
    pub(super) source: Option<Standing>,
    /// Connections that were opened for it and are nobody else's.
    pub(super) target_conn: Option<MultiplexedConnection>,
    pub(super) source_conn: Option<MultiplexedConnection>,
    /// How often the master pings its replicas, seconds.
    pub(super) source_ping_s: Option<u64>,
}

/// One server and the moment at which it was asked.
struct Looked {
    conn: MultiplexedConnection,
    standing: Standing,
    /// Its ledger's time: of the last write or heartbeat that it has.
    ledger_ms: i64,
    /// Its clock.
    clock_ms: i64,
    /// When the clock was asked, half a round trip before the answer.
    at: Instant,
    round_trip: Duration,
}

/// Looks at everything that a shift needs. Changes nothing, except that the target is given the scripts.
pub(super) async fn survey(
    shared: &Shared,
    topology: &Topology,
    request: &ShiftRequest,
    store_answer: Duration,
) -> Survey {
    let (started_at, begun) = (now(), Instant::now());
    let mut checks = Checks(Vec::new());
    let store_verdict = verdict(store_answer <= STORE_ANSWER_MAX);
    checks.add("topology_store", ms(store_answer), format!("<= {}", ms(STORE_ANSWER_MAX)), store_verdict);
    match shared.authority.confirmed() {
        Ok(fence) => checks.add("authority", format!("confirmed at {fence}"), "confirmed", CheckVerdict::Ok),
        Err(refusal) => {
            checks.add("authority", refusal.to_string(), "confirmed", CheckVerdict::Failed);
        }
    }
    let alive = shared.instances.of(&request.to).len();
    checks.add("target_instances", alive.to_string(), ">= 1", verdict(alive > 0));

    let forced = request.mode == ShiftMode::Forced;
    let (mut source, mut target) = if forced {
        // Nobody waits long for a master that is gone.
        tokio::join!(
            look_at_center(shared, topology, &topology.master, GONE_ANSWERS),
            look_at_center(shared, topology, &request.to, SERVER_ANSWERS),
        )
    } else {
        // The master first: what the target has then is at least what the master had.
        let source = look_at_center(shared, topology, &topology.master, SERVER_ANSWERS).await;
        (source, look_at_center(shared, topology, &request.to, SERVER_ANSWERS).await)
    };
    checks.server("target_answers", &target);
    let source_ping_s = match &mut source {
        Ok(source) if !forced => handover::ping_period(&mut source.conn).await,
        Ok(_) | Err(_) => None,
    };
    match (&source, forced) {
        (Ok(_), true) => checks.add(
            "source_answers",
            "it answers: a planned shift would hold purchases for a shorter time and lose nothing",
            "no answer",
            CheckVerdict::Warning,
        ),
        (Err(reason), true) => {
            checks.add("source_answers", format!("no answer: {reason}"), "no answer", CheckVerdict::Ok);
        }
        (source, false) => checks.server("source_answers", source),
    }
    if let Ok(target) = &mut target {
        ledger(&mut checks, topology, &target.standing);
        scripts(&mut checks, &mut target.conn).await;
    }
    match (&source, &target) {
        (Ok(source), Ok(target)) if !forced => {
            between(&mut checks, topology, request, shared.options.partition, source, target);
        }
        (_, Ok(target)) if forced => {
            let found = exposure(topology, &request.to, shared.options.partition, &target.standing);
            let verdict = match (found.lossless, request.accept_loss) {
                (true, _) => CheckVerdict::Ok,
                (false, true) => CheckVerdict::Warning,
                (false, false) => CheckVerdict::Failed,
            };
            let limit = if request.accept_loss { "accepted by --accept-loss" } else { "nothing" };
            checks.add("exposure", found.reason, limit, verdict);
        }
        _ => {}
    }
    let (target, target_conn) = target.ok().map(|seen| (seen.standing, seen.conn)).unzip();
    let (source, source_conn) = source.ok().map(|seen| (seen.standing, seen.conn)).unzip();
    Survey {
        checks: checks.0,
        started_at,
        took: begun.elapsed(),
        target,
        source,
        target_conn,
        source_conn,
        source_ping_s,
    }
}

/// The ledger that the target's server holds.
fn ledger(checks: &mut Checks, topology: &Topology, target: &Standing) {
    let held = target.fence.as_deref().map(str::parse::<Fence>);
    let (value, fits) = match &held {
        Some(Ok(fence)) => (fence.ledger_id.to_string(), fence.ledger_id == topology.ledger_id),
        Some(Err(error)) => (error.to_string(), false),
        None => ("it is empty".to_owned(), false),
    };
    checks.add("target_ledger", value, format!("ledger {}", topology.ledger_id), verdict(fits));
    let settled = if target.settled { "a whole state" } else { "loading, or copying everything" };
    checks.add("target_settled", settled, "a whole state", verdict(target.settled));
    let log = if target.log_ready { "complete" } else { "off, or being written anew" };
    let log_verdict = if target.log_ready { CheckVerdict::Ok } else { CheckVerdict::Warning };
    checks.add("target_log", log, "complete", log_verdict);
}

async fn scripts(checks: &mut Checks, target: &mut MultiplexedConnection) {
    let missing = match load_all(target).await {
        Ok(()) => missing(target).await,
        Err(error) => Err(error),
    };
    match missing {
        Ok(missing) => {
            checks.add("target_scripts", format!("{missing} missing"), "0 missing", verdict(missing == 0));
        }
        Err(error) => checks.add("target_scripts", error.to_string(), "0 missing", CheckVerdict::Failed),
    }
}

/// How far the target is behind the master.
fn between(
    checks: &mut Checks,
    topology: &Topology,
    request: &ShiftRequest,
    partition: u8,
    source: &Looked,
    target: &Looked,
) {
    let Role::Master { offset: written, .. } = source.standing.role else {
        checks.add("source_role", "replica", "master", CheckVerdict::Failed);
        return;
    };
    checks.add("source_role", "master", "master", CheckVerdict::Ok);
    let run = topology.ledger_runs.get(&partition).map(|run| run.run_id.as_str());
    let same = run == Some(source.standing.run_id.as_str());
    checks.add("source_run", if same { "as admitted" } else { "restarted" }, "as admitted", verdict(same));
    let (linked, received) = match &target.standing.role {
        Role::Replica { offset, link, of } => {
            let follows = target.standing.replication.linked
                && target.standing.replication.stream == source.standing.replication.stream;
            (if follows { "yes".to_owned() } else { format!("no: {link} to {of}") }, *offset)
        }
        Role::Master { offset, .. } => ("no: it is a master itself".to_owned(), *offset),
    };
    checks.add("target_linked", linked.clone(), "yes", verdict(linked == "yes"));
    if topology.durability == Durability::Replicated {
        let to = &request.to;
        let entry = topology.in_sync.iter().find(|entry| entry.center == *to);
        let value = match entry {
            Some(entry) if entry.run_id == target.standing.run_id => "in sync",
            Some(_) => "restarted since it was in sync",
            None => "not in sync",
        };
        checks.add("target_in_sync", value, "in sync", verdict(value == "in sync"));
    }
    let wanted = topology.fence().to_string();
    let found = |standing: &Standing| standing.fence.clone().unwrap_or_else(|| "none".to_owned());
    let (here, there) = (found(&target.standing), found(&source.standing));
    let value = if here == there { here.clone() } else { format!("{here} here, {there} there") };
    checks.add("fence", value, wanted.clone(), verdict(here == wanted && there == wanted));
    let lag_bytes = written.saturating_sub(received);
    checks.add(
        "lag_bytes",
        format!("{lag_bytes} bytes"),
        format!("<= {LAG_BYTES_MAX} bytes"),
        verdict(lag_bytes <= LAG_BYTES_MAX),
    );
    let lag_ms = (source.ledger_ms - target.ledger_ms).max(0);
    checks.add(
        "lag_time",
        seconds(lag_ms),
        format!("<= {}", seconds(LAG_TIME_MAX_MS)),
        verdict(lag_ms <= LAG_TIME_MAX_MS),
    );
    checks.add(
        "round_trip",
        ms(source.round_trip),
        format!("<= {}", ms(ROUND_TRIP_MAX)),
        verdict(source.round_trip <= ROUND_TRIP_MAX),
    );
    let between = target.at.saturating_duration_since(source.at);
    let between = i64::try_from(between.as_millis()).unwrap_or(i64::MAX);
    let skew = (target.clock_ms - source.clock_ms - between).abs();
    let skew_verdict = if skew <= SKEW_WARN_MS {
        CheckVerdict::Ok
    } else if skew <= SKEW_MAX_MS {
        CheckVerdict::Warning
    } else {
        CheckVerdict::Failed
    };
    checks.add("clock_skew", seconds(skew), format!("<= {}", seconds(SKEW_WARN_MS)), skew_verdict);
}

async fn look_at_center(
    shared: &Shared,
    topology: &Topology,
    center: &CenterId,
    within: Duration,
) -> Result<Looked, String> {
    let looked = async {
        let mut conn = connect(shared, topology, center).await?;
        let standing = roles::standing(&mut conn).await?;
        let asked = Instant::now();
        let snapshot = read::snapshot(&mut conn, u64::MAX >> 12, 1).await?;
        let round_trip = asked.elapsed();
        Ok::<_, LedgerError>(Looked {
            conn,
            standing,
            ledger_ms: snapshot.clock.0,
            clock_ms: snapshot.taken_at.0,
            at: asked + round_trip / 2,
            round_trip,
        })
    };
    match tokio::time::timeout(within, looked).await {
        Ok(Ok(looked)) => Ok(looked),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {}", ms(within))),
    }
}

/// A connection of its own to a center's server.
pub(super) async fn connect(
    shared: &Shared,
    topology: &Topology,
    center: &CenterId,
) -> Result<MultiplexedConnection, LedgerError> {
    if *center == shared.options.center {
        return shared.access.connect_own().await;
    }
    let address =
        topology.center(center).and_then(|one| one.ledger.get(usize::from(shared.options.partition)));
    match address {
        Some(address) => shared.access.connect(address).await,
        None => Err(LedgerError::Peer(format!(
            "the topology does not say where the Redis of center {center} is: name it under cluster.centers of \
             the configuration"
        ))),
    }
}

/// Comparisons, in the order in which they were made.
pub(super) struct Checks(pub(super) Vec<Check>);

impl Checks {
    pub(super) fn add(
        &mut self,
        name: &str,
        value: impl Into<String>,
        limit: impl Into<String>,
        verdict: CheckVerdict,
    ) {
        self.0.push(Check { name: name.to_owned(), value: value.into(), limit: limit.into(), verdict });
    }

    fn server(&mut self, name: &str, looked: &Result<Looked, String>) {
        match looked {
            Ok(looked) => {
                self.add(name, format!("yes, in {}", ms(looked.round_trip)), "yes", CheckVerdict::Ok);
            }
            Err(reason) => self.add(name, format!("no: {reason}"), "yes", CheckVerdict::Failed),
        }
    }
}

pub(super) fn verdict(fits: bool) -> CheckVerdict {
    if fits { CheckVerdict::Ok } else { CheckVerdict::Failed }
}

fn ms(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1000.0)
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn seconds(ms: i64) -> String {
    format!("{:.1} s", ms as f64 / 1000.0)
}
