//! What is looked at before a shift of shards is recorded.

use std::sync::Arc;
use std::time::{Duration, Instant};

use seckill_domain::{CenterId, Shard};
use seckill_ledger::outbox;

use super::super::operation::{Refusal, Shared, ShiftError, ShiftRequest};
use super::super::precheck::{Checks, verdict};
use super::super::record::{by_key, now};
use super::record::{ShardPlan, refuse_wrong_use};
use super::{Ask, ShardParts};
use crate::cross_center::calls::ShardsStanding;
use crate::orders::{ReplicaStatus, ServerStanding};
use crate::topology::{
    Check, CheckVerdict, Coordinator, Exposure, Shift, ShiftMode, ShiftState, Step, StepState,
};

/// A database farther behind than this would hold up payments for as long.
const BEHIND_MAX_S: u64 = 5;
/// How long the databases may take to have what the other one has written by now.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(5);

pub(super) enum Prepared {
    /// To be recorded.
    Plan(Box<ShardPlan>),
    /// Answered already: a replay, or a dry run.
    Answer(Box<Shift>),
}

pub(super) async fn prepare(
    shared: &Arc<Shared>,
    request: ShiftRequest,
    key: String,
    actor: String,
) -> Result<Prepared, ShiftError> {
    if let Err(error) = shared.topology.confirm().await {
        return Err(ShiftError::refused(
            format!("the topology cannot be read, so nothing may be decided on it: {error}"),
            "bring the topology's store back, then ask again",
        ));
    }
    let topology = shared.topology.current();
    if let Some(same) = by_key(&topology, &key) {
        return Ok(Prepared::Answer(Box::new(shared.merged(same))));
    }
    let (from, shards) = refuse_wrong_use(&topology, &request)?;
    if request.to != shared.options.center {
        return Err(ShiftError::Elsewhere { center: request.to });
    }
    let Some(parts) = shared.shards.get() else {
        return Err(ShiftError::refused("this service moves no shards", "ask another instance"));
    };
    let (started_at, begun) = (now(), Instant::now());
    let server = parts.orders.server().await.map_err(|error| {
        ShiftError::refused(
            format!("this center's order database does not answer: {error}"),
            "bring it back, then ask again",
        )
    })?;
    let Some(server) = server else { return Err(sqlite(&request.to)) };
    let survey = Survey { shared, parts, from: &from, request: &request, shards: &shards };
    let (checks, exposure) = match request.mode {
        ShiftMode::Planned => (survey.planned(&server).await?, None),
        ShiftMode::Forced => survey.forced(&server).await,
    };
    let failed: Vec<&Check> = checks.iter().filter(|check| check.verdict == CheckVerdict::Failed).collect();
    if let Some(first) = failed.first() {
        let names: Vec<&str> = failed.iter().map(|check| check.name.as_str()).collect();
        let Check { name, value, limit, .. } = first;
        // What only the loss stands against is asked for by name.
        let loss = names.iter().all(|name| ["exposure", "outbox_covers"].contains(name));
        return Err(ShiftError::Refused {
            cause: if loss { Refusal::Loss } else { Refusal::Unfit },
            reason: format!(
                "{} of {} checks failed: {} ({name}: {value}, allowed {limit})",
                failed.len(),
                checks.len(),
                names.join(", "),
            ),
            next: what_to_do(name, &from, &request.to),
            checks,
        });
    }
    let plan = ShardPlan {
        key,
        actor,
        coordinator: Coordinator {
            center: shared.options.center.clone(),
            instance: shared.options.instance.clone(),
            term: 0,
        },
        from: from.clone(),
        shards: shards.clone(),
        started_at: started_at.clone(),
        freeze_ms: parts.freeze_ms(),
        exposure,
        step: Step {
            name: "precheck".to_owned(),
            state: StepState::Done,
            started_at,
            took_ms: Some(u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX)),
            detail: None,
            checks,
        },
        request,
    };
    if !plan.request.dry_run {
        return Ok(Prepared::Plan(Box::new(plan)));
    }
    let mut shift = plan.shift(&topology);
    shift.state = ShiftState::Done;
    shift.dry_run = true;
    shift.ended_at = Some(now());
    shift.message = Some(format!("all {} checks passed; nothing was changed", plan.checks().len()));
    Ok(Prepared::Answer(Box::new(shift)))
}

fn sqlite(center: &CenterId) -> ShiftError {
    ShiftError::refused(
        format!(
            "center {center} keeps its orders in SQLite, a file of its own: nobody copies the orders of other centers \
             into it, so shards cannot move"
        ),
        "give both centers a MySQL or MariaDB and let the two replicate each other (docs/orders.md, \"Two databases \
         that are one\"); the master can be shifted all the same: `seckill master shift`",
    )
}

/// What an operator does about a check that failed.
fn what_to_do(check: &str, from: &CenterId, to: &CenterId) -> String {
    let setup = "docs/orders.md, \"Two databases that are one\", says how both servers are set up";
    match check {
        "source_answers" => format!(
            "bring a service of center {from} back; if the center is gone for good: `seckill shards shift --to {to} \
             --mode forced`, which says what may be missing"
        ),
        "exposure" => format!(
            "add --accept-loss to go on without what may be missing, or bring the database of center {from} back"
        ),
        "target_copies" | "source_copies" | "target_behind" | "source_behind" | "target_caught_up" => {
            format!("look at SHOW REPLICA STATUS on both databases; {setup}")
        }
        "outbox_covers" => {
            "orders that were stored over there and never arrived here are gone from the outbox, too: add \
             --accept-loss, or bring that database back"
                .to_owned()
        }
        _ => setup.to_owned(),
    }
}

struct Survey<'a> {
    shared: &'a Shared,
    parts: &'a ShardParts,
    from: &'a CenterId,
    request: &'a ShiftRequest,
    shards: &'a [Shard],
}

impl Survey<'_> {
    fn ask(&self) -> Ask<'_> {
        Ask { from: self.from, to: &self.request.to, shards: self.shards }
    }

    /// Both centers are there. Their databases have to copy each other.
    async fn planned(&self, own: &ServerStanding) -> Result<Vec<Check>, ShiftError> {
        let mut checks = Checks(Vec::new());
        let asked = Instant::now();
        let standing = match self.parts.standing(&self.ask()).await {
            Ok(standing) => standing,
            Err(reason) => {
                checks.add("source_answers", format!("no: {reason}"), "yes", CheckVerdict::Failed);
                return Ok(checks.0);
            }
        };
        let took = asked.elapsed().as_millis();
        checks.add("source_answers", format!("yes, in {took} ms"), "yes", CheckVerdict::Ok);
        let Some(theirs) = &standing.server else { return Err(sqlite(self.from)) };
        let differ = own.server != theirs.server;
        let servers = format!("{} ({}) and {} ({})", own.server, own.version, theirs.server, theirs.version);
        checks.add("servers", servers, "two", verdict(differ));
        let numbered = own.numbered && theirs.numbered;
        let value = if numbered { "GTID" } else { "no GTID" };
        checks.add("numbering", value, "GTID, strict, on both", verdict(numbered));
        self.increments(&mut checks, own, theirs);
        copies(&mut checks, ["target_copies", "target_behind"], own, true);
        copies(&mut checks, ["source_copies", "source_behind"], theirs, true);
        self.caught_up(&mut checks, &standing).await;
        self.owners(&mut checks, &standing);
        Ok(checks.0)
    }

    #[expect(clippy::unused_self, reason = "one of the comparisons")]
    fn increments(&self, checks: &mut Checks, own: &ServerStanding, theirs: &ServerStanding) {
        let ((step, here), (their_step, there)) = (own.increments, theirs.increments);
        let value = format!("{here} of {step} here, {there} of {their_step} there");
        let apart = step == their_step && step > 1 && here != there;
        checks.add("row_numbers", value, "one auto_increment_increment > 1, two offsets", verdict(apart));
    }

    /// What the other one had written when it was asked is here: they do copy each other, and are quick about it.
    async fn caught_up(&self, checks: &mut Checks, standing: &ShardsStanding) {
        let asked = Instant::now();
        let (value, reached) = match self.parts.orders.reaches(&standing.written, CAUGHT_UP_WITHIN).await {
            Ok(true) => (format!("in {} ms", asked.elapsed().as_millis()), true),
            Ok(false) => (format!("not within {} s", CAUGHT_UP_WITHIN.as_secs()), false),
            Err(error) => (error.to_string(), false),
        };
        let limit = format!("within {} s", CAUGHT_UP_WITHIN.as_secs());
        checks.add("target_caught_up", value, limit, verdict(reached));
    }

    fn owners(&self, checks: &mut Checks, standing: &ShardsStanding) {
        let wanted = self.from.as_str();
        let owned = self
            .shards
            .iter()
            .filter(|shard| standing.rows.iter().any(|row| row.shard == **shard && row.owner == wanted))
            .count();
        let all = self.shards.len();
        checks.add("source_owner", format!("{owned} of {all}"), format!("{all}"), verdict(owned == all));
    }

    /// The center that gives is gone: what is here of it is all there is.
    async fn forced(&self, own: &ServerStanding) -> (Vec<Check>, Option<Exposure>) {
        let mut checks = Checks(Vec::new());
        match self.parts.standing(&self.ask()).await {
            Ok(_) => checks.add(
                "source_answers",
                "it answers: a planned shift would lose nothing, and while it runs it goes on writing",
                "no answer",
                CheckVerdict::Failed,
            ),
            Err(reason) => {
                checks.add("source_answers", format!("no answer: {reason}"), "no answer", CheckVerdict::Ok);
            }
        }
        copies(&mut checks, ["target_copies", "target_behind"], own, false);
        let missing = self.covers(&mut checks).await;
        let since = self.parts.orders.last_heard_of(self.from).await.ok().flatten();
        let heard = since.map_or_else(|| "is not known".to_owned(), |at| format!("is of {at}"));
        let mut reason = format!(
            "payments, cancellations and refunds that center {} booked and that did not arrive here; its last write \
             that did {heard}. Its orders come again from the outbox",
            self.from
        );
        if let Some(missing) = missing {
            reason = format!("{reason}, but not those up to {missing}");
        }
        let accepted = if self.request.accept_loss { CheckVerdict::Warning } else { CheckVerdict::Failed };
        let limit = if self.request.accept_loss { "accepted by --accept-loss" } else { "nothing" };
        checks.add("exposure", reason.clone(), limit, accepted);
        let since = since.map(|at| at.to_string());
        (checks.0, Some(Exposure { lossless: false, reason, entries: None, since }))
    }

    /// Whether the outbox still has what the other center stored after what arrived here. If not: from which entry on.
    async fn covers(&self, checks: &mut Checks) -> Option<String> {
        let stored = self.parts.orders.positions_of(self.from).await.unwrap_or_default();
        let first = async {
            let mut conn = self.shared.access.connect_own().await.map_err(|error| error.to_string())?;
            outbox::first_id(&mut conn).await.map_err(|error| error.to_string())
        };
        let (value, fits, missing) = match first.await {
            Ok(Some(first)) => {
                let partition = self.shared.options.partition;
                let reached = stored.iter().find(|(of, _)| *of == partition).map(|(_, at)| *at);
                match reached {
                    // The entry behind the last that is known to be stored, or an earlier one, is there.
                    Some(reached) if first.seq <= reached.seq + 1 || first <= reached => {
                        (format!("from {first} on; stored up to {reached}"), true, None)
                    }
                    reached => {
                        let reached = reached.map_or_else(|| "nothing".to_owned(), |at| at.to_string());
                        // A ledger that never was trimmed begins with its first entry.
                        let whole = first.seq <= 1;
                        let missing = (!whole).then(|| first.to_string());
                        (format!("from {first} on; known to be stored: {reached}"), whole, missing)
                    }
                }
            }
            Ok(None) => ("it is empty".to_owned(), true, None),
            Err(error) => (error, false, Some("where is not known".to_owned())),
        };
        let verdict = match (fits, self.request.accept_loss) {
            (true, _) => CheckVerdict::Ok,
            (false, true) => CheckVerdict::Warning,
            (false, false) => CheckVerdict::Failed,
        };
        checks.add("outbox_covers", value, "everything that did not arrive here", verdict);
        missing
    }
}

/// Whether a server copies from another one, and how far it is behind. The center that is gone sends nothing: then only
/// that its changes were copied at all is looked at, and that none of them failed.
fn copies(checks: &mut Checks, [name, behind]: [&str; 2], server: &ServerStanding, running: bool) {
    let status = |copy: &ReplicaStatus| match (&copy.error, copy.running) {
        (Some(error), _) => format!("stopped: {error}"),
        (None, true) => "running".to_owned(),
        (None, false) => "stopped".to_owned(),
    };
    let value = match (server.copies.as_slice(), server.may_see) {
        (_, false) => "the account may not see it (GRANT REPLICA MONITOR, or REPLICATION CLIENT)".to_owned(),
        ([], true) => "from nobody".to_owned(),
        (copies, true) => copies.iter().map(status).collect::<Vec<_>>().join("; "),
    };
    let applies = |copy: &ReplicaStatus| if running { copy.running } else { copy.applies };
    let fits = !server.copies.is_empty() && server.copies.iter().all(applies);
    checks.add(name, value, if running { "running" } else { "applied as far as received" }, verdict(fits));
    if running && fits {
        let slowest = server.copies.iter().map(|copy| copy.behind_s.unwrap_or(u64::MAX)).max().unwrap_or(0);
        let value = if slowest == u64::MAX { "not known".to_owned() } else { format!("{slowest} s") };
        checks.add(behind, value, format!("<= {BEHIND_MAX_S} s"), verdict(slowest <= BEHIND_MAX_S));
    }
}
