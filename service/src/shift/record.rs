//! What becomes of the topology in a shift of the master: each change as a function of the document, so that one
//! that was not answered can be asked again (H3). Whoever coordinates is named in the record with a term; a
//! coordinator that was replaced finds another one there and stops.

use seckill_domain::{CenterId, Clock, Epoch, SystemClock};
use seckill_ledger::Fence;
use seckill_ledger::roles::Standing;
use serde_json::Map;

use super::operation::{Refusal, Shared, ShiftError, ShiftRequest};
use super::precheck::Survey;
use crate::topology::{
    Check, Coordinator, Durability, Exposure, Extra, InSync, LedgerRun, Shift, ShiftKind, ShiftMode,
    ShiftPhase, ShiftState, Step, StepState, Topology, TopologyState,
};

mod tails;

pub(super) use tails::{add_tail, last_loss, left_behind, tell_tail};

/// How long a planned shift may stay in one phase before somebody else takes it over. Its own coordinator gives up
/// long before (see `coordinator.rs`), and purchases are held for longer.
const PLANNED_FREEZE_MS: u64 = 2000;
/// A forced shift waits out the lease in its first phase; this much more before somebody else takes it over.
const FORCED_FREEZE_MS: u64 = 3000;

/// This moment, as records have it.
pub(super) fn now() -> String {
    SystemClock.now().to_string()
}

/// A shift that is to be recorded.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) request: ShiftRequest,
    pub(super) key: String,
    actor: String,
    coordinator: Coordinator,
    partition: u8,
    freeze_ms: u64,
    started_at: String,
    /// The epoch at which the checks were made.
    epoch: Epoch,
    /// What the target's server was then.
    target: Option<Standing>,
    source_run: Option<String>,
    step: Step,
}

/// What became of the record.
#[derive(Debug, Clone)]
pub(super) enum Begun {
    /// It is written, and this service's to run.
    Ours(Shift),
    /// The same request was recorded before.
    Replay(Shift),
}

/// The record is not this coordinator's any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Replaced;

/// What became of an abort.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Aborted {
    /// Everything is as before, at a new epoch.
    Yes(Shift),
    /// It is decided: there is only forward.
    Decided(Shift),
}

impl Plan {
    pub(super) fn new(
        shared: &Shared,
        topology: &Topology,
        request: ShiftRequest,
        key: String,
        actor: String,
        survey: &Survey,
    ) -> Plan {
        let lease_ms = u64::try_from(shared.options.lease_ttl.as_millis()).unwrap_or(u64::MAX);
        Plan {
            freeze_ms: match request.mode {
                ShiftMode::Planned => PLANNED_FREEZE_MS,
                ShiftMode::Forced => lease_ms.saturating_add(FORCED_FREEZE_MS),
            },
            request,
            key,
            actor,
            coordinator: Coordinator {
                center: shared.options.center.clone(),
                instance: shared.options.instance.clone(),
                term: 0,
            },
            partition: shared.options.partition,
            started_at: survey.started_at.clone(),
            epoch: topology.epoch,
            target: survey.target.clone(),
            source_run: survey.source.as_ref().map(|source| source.run_id.clone()),
            step: Step {
                name: "precheck".to_owned(),
                state: StepState::Done,
                started_at: survey.started_at.clone(),
                took_ms: Some(u64::try_from(survey.took.as_millis()).unwrap_or(u64::MAX)),
                detail: None,
                checks: survey.checks.clone(),
            },
        }
    }

    /// What an operator does about a check that failed.
    pub(super) fn what_to_do(&self, check: &Check) -> String {
        let to = &self.request.to;
        match (check.name.as_str(), self.request.mode) {
            ("exposure", _) => {
                "add --accept-loss to go on without what may be missing, or bring the master's \
                                Redis back"
                    .to_owned()
            }
            ("source_answers", ShiftMode::Planned) => format!(
                "bring the master's Redis back; if it is gone for good, `seckill master shift --to {to} --mode \
                 forced`"
            ),
            ("target_answers" | "target_ledger" | "target_settled", _) => {
                format!("bring the Redis of center {to} back (`seckill master show` says what it lacks)")
            }
            ("target_linked" | "target_in_sync" | "fence" | "lag_bytes" | "lag_time", _) => format!(
                "wait until the replica of center {to} is in sync (`seckill topology show`), then ask again"
            ),
            ("clock_skew", _) => "put the clocks of both Redis hosts right".to_owned(),
            _ => "put that right, then ask again".to_owned(),
        }
    }

    /// The record, as it is written into this topology.
    pub(super) fn shift(&self, topology: &Topology) -> Result<Shift, ShiftError> {
        let request = &self.request;
        let reached = self.target.as_ref().and_then(|target| target.fence.as_deref());
        let reached =
            reached.and_then(|text| text.parse::<Fence>().ok()).map_or(Epoch(0), |fence| fence.epoch);
        let epoch = topology.epoch.max(reached).next();
        let exposure = match (request.mode, &self.target) {
            (ShiftMode::Planned, _) => None,
            (ShiftMode::Forced, None) => {
                return Err(ShiftError::refused(
                    "the target's Redis was not seen",
                    "bring it back, then ask again",
                ));
            }
            (ShiftMode::Forced, Some(target)) => {
                Some(exposure(topology, &request.to, self.partition, target))
            }
        };
        if let Some(exposure) = &exposure
            && !exposure.lossless
            && !request.accept_loss
        {
            return Err(ShiftError::Refused {
                cause: Refusal::Loss,
                reason: format!("purchases that were acknowledged may be missing: {}", exposure.reason),
                next: "add --accept-loss to go on without them, or bring the master's Redis back".to_owned(),
                checks: self.step.checks.clone(),
            });
        }
        Ok(Shift {
            id: format!("shift-{epoch}"),
            key: Some(self.key.clone()),
            kind: request.kind,
            mode: request.mode,
            from: topology.master.clone(),
            to: request.to.clone(),
            shards: Vec::new(),
            state: ShiftState::Running,
            phase: ShiftPhase::Begun,
            from_epoch: topology.epoch,
            epoch,
            freeze_ms: self.freeze_ms,
            coordinator: self.coordinator.clone(),
            actor: self.actor.clone(),
            reason: request.reason.clone(),
            started_at: self.started_at.clone(),
            ended_at: None,
            accept_loss: request.accept_loss,
            exposure,
            target_run: self.target.as_ref().map(|target| target.run_id.clone()),
            source_run: self.source_run.clone(),
            tails: Vec::new(),
            dry_run: false,
            held_ms: None,
            steps: vec![self.step.clone()],
            message: None,
            extra: Extra::new(),
        })
    }
}

/// The shift that was recorded under this key, if there is one.
pub(super) fn by_key<'a>(topology: &'a Topology, key: &str) -> Option<&'a Shift> {
    let recorded = topology.shift.as_deref().into_iter().chain(&topology.history);
    recorded.into_iter().find(|shift| shift.key.as_deref() == Some(key))
}

/// What makes no sense, whatever is to move.
pub(super) fn refuse_any_shift(topology: &Topology, request: &ShiftRequest) -> Result<(), ShiftError> {
    let to = &request.to;
    if let Some(running) = &topology.shift {
        return Err(ShiftError::refused(
            format!(
                "the shift {} to center {} is running, asked for by {}",
                running.id, running.to, running.actor
            ),
            format!("follow it with `seckill shift status {}`, or abort it", running.id),
        )
        .of(Refusal::Running));
    }
    if !topology.centers.contains_key(to) {
        let known: Vec<&str> = topology.centers.keys().map(|center| center.as_str()).collect();
        return Err(ShiftError::refused(
            format!("there is no center {to}"),
            format!("the centers are {}", known.join(", ")),
        ));
    }
    if let Some(expected) = request.expect_epoch
        && expected != topology.epoch
    {
        return Err(ShiftError::refused(
            format!("the topology is at epoch {}, not at {expected}", topology.epoch),
            "look at `seckill topology show` and ask again with that epoch, if it still makes sense",
        )
        .of(Refusal::Epoch));
    }
    Ok(())
}

/// Refuses what makes no sense, before anything is looked at, and again when the record is written.
pub(super) fn refuse_wrong_use(topology: &Topology, request: &ShiftRequest) -> Result<(), ShiftError> {
    refuse_any_shift(topology, request)?;
    let to = &request.to;
    if topology.master == *to {
        return Err(ShiftError::refused(
            format!("center {to} is the master already"),
            "nothing has to be done",
        ));
    }
    let working = match (request.mode, topology.adopting.is_empty(), topology.restoring.is_empty()) {
        (_, false, _) => "is being adopted",
        (ShiftMode::Planned, true, false) => "lost data and copies them from its replica",
        (ShiftMode::Planned | ShiftMode::Forced, true, _) => return Ok(()),
    };
    Err(ShiftError::refused(
        format!("the ledger of center {} {working}", topology.master),
        "wait until that is done (see /readyz), then ask again",
    ))
}

/// What a forced shift may lose, from the document that it is recorded in (D1).
pub(super) fn exposure(topology: &Topology, to: &CenterId, partition: u8, target: &Standing) -> Exposure {
    let Some(reason) = why_exposed(topology, to, partition, target) else {
        return Exposure {
            lossless: true,
            reason: format!("the Redis of center {to} has everything that was acknowledged"),
            entries: Some(0),
            since: None,
        };
    };
    // H6: what the master said of itself last.
    let entries = topology.positions.get(&partition).map(|position| position.seq.saturating_sub(target.seq));
    let told = match (entries, topology.positions.get(&partition)) {
        (Some(entries), Some(position)) => {
            format!("; at {} the master was {entries} outbox entries ahead", position.at)
        }
        _ => String::new(),
    };
    Exposure {
        lossless: false,
        reason: format!("{reason}{told}"),
        entries,
        since: topology.degraded_since.clone(),
    }
}

fn why_exposed(topology: &Topology, to: &CenterId, partition: u8, target: &Standing) -> Option<String> {
    if topology.durability == Durability::Local {
        // D3: a late write of a paused service cannot be helped.
        return Some(
            "with durability `local` a purchase is acknowledged before the other center has it".to_owned(),
        );
    }
    let Some(entry) = topology.in_sync.iter().find(|entry| entry.center == *to) else {
        return Some(format!(
            "the replica of center {to} was taken off: since then purchases were acknowledged without it"
        ));
    };
    if entry.run_id != target.run_id {
        return Some(format!(
            "the Redis of center {to} was restarted since it was in sync (run {}, in sync was {})",
            target.run_id, entry.run_id
        ));
    }
    // The epoch at which the master took writes last. The topology's own may be later, by shifts that were given up
    // while the master was gone: nobody was acknowledged anything in those.
    let admitted = topology.ledger_runs.get(&partition).map_or(topology.epoch, |run| run.epoch);
    let held = target.fence.as_deref().and_then(|text| text.parse::<Fence>().ok());
    if held.is_none_or(|held| held.ledger_id != topology.ledger_id || held.epoch < admitted) {
        return Some(format!(
            "the Redis of center {to} is at the fence {}, the master took writes at epoch {admitted}",
            target.fence.as_deref().unwrap_or("of nobody"),
        ));
    }
    if !target.settled {
        return Some(format!("the Redis of center {to} is loading, or copying everything"));
    }
    if topology.restoring.contains_key(&partition) {
        return Some("the master lost data and was copying them from a replica".to_owned());
    }
    None
}

/// Records a shift: from here on purchases are held, guardians keep out, and nobody is taken off (D1).
pub(super) fn begin(topology: &mut Topology, plan: &Plan) -> Result<Begun, ShiftError> {
    if let Some(same) = by_key(topology, &plan.key) {
        let ours = same.started_at == plan.started_at
            && same.coordinator == plan.coordinator
            && topology.shift.as_ref().is_some_and(|shift| shift.id == same.id);
        return Ok(if ours { Begun::Ours(same.clone()) } else { Begun::Replay(same.clone()) });
    }
    refuse_wrong_use(topology, &plan.request)?;
    let checked = topology.epoch == plan.epoch;
    let listed = plan.target.as_ref().is_some_and(|target| {
        topology.in_sync.iter().any(|one| one.center == plan.request.to && one.run_id == target.run_id)
    });
    let planned = plan.request.mode == ShiftMode::Planned;
    if planned && (!checked || (topology.durability == Durability::Replicated && !listed)) {
        return Err(ShiftError::refused(
            format!(
                "the topology changed while the checks were made (epoch {}, now {})",
                plan.epoch, topology.epoch
            ),
            "ask again",
        ));
    }
    let shift = plan.shift(topology)?;
    topology.state = TopologyState::Shifting;
    topology.shift = Some(Box::new(shift.clone()));
    Ok(Begun::Ours(shift))
}

/// The running shift, if this coordinator still has it.
pub(super) fn ours<'a>(topology: &'a mut Topology, held: &Shift) -> Result<&'a mut Shift, Replaced> {
    match topology.shift.as_deref_mut() {
        Some(shift) if shift.id == held.id && shift.coordinator == held.coordinator => Ok(shift),
        Some(_) | None => Err(Replaced),
    }
}

/// The record of this coordinator's shift after it is over.
pub(super) fn over<'a>(topology: &'a mut Topology, held: &Shift) -> Option<&'a mut Shift> {
    topology.history.iter_mut().find(|shift| shift.id == held.id && shift.coordinator == held.coordinator)
}

/// From here on there is only forward (H3).
pub(super) fn decide(topology: &mut Topology, held: &Shift) -> Result<(), Replaced> {
    let shift = ours(topology, held)?;
    shift.phase = ShiftPhase::Decided;
    shift.exposure.clone_from(&held.exposure);
    shift.steps.clone_from(&held.steps);
    Ok(())
}

/// The new master takes writes at the attempt's epoch. `promoted`: the run of its server, if it was given its role;
/// otherwise its guardian does that, at an epoch of its own.
pub(super) fn redirect(
    topology: &mut Topology,
    held: &Shift,
    partition: u8,
    promoted: Option<&str>,
) -> Result<(), Replaced> {
    if topology.shift.is_none() && over(topology, held).is_some() {
        return Ok(()); // an earlier attempt, whose answer was lost
    }
    let mut shift = ours(topology, held)?.clone();
    topology.shift = None;
    topology.master = shift.to.clone();
    topology.epoch = topology.epoch.max(shift.epoch);
    topology.in_sync = match (shift.mode, topology.durability, &shift.source_run) {
        // H5: the old master has everything and is attached at once, so held purchases wait for it and flow.
        (ShiftMode::Planned, Durability::Replicated, Some(run_id)) => {
            vec![InSync { center: shift.from.clone(), run_id: run_id.clone(), extra: Extra::new() }]
        }
        (ShiftMode::Planned | ShiftMode::Forced, _, _) => Vec::new(),
    };
    topology.state = resting(topology);
    topology.degraded_since = (topology.state == TopologyState::Degraded).then(now);
    topology.restoring.remove(&partition);
    topology.positions.remove(&partition);
    if let Some(run_id) = promoted {
        let run = topology.ledger_runs.entry(partition).or_insert_with(|| LedgerRun {
            run_id: String::new(),
            epoch: shift.epoch,
            extra: Map::new(),
        });
        run_id.clone_into(&mut run.run_id);
        run.epoch = shift.epoch;
    }
    shift.phase = ShiftPhase::Decided;
    shift.steps.clone_from(&held.steps);
    shift.held_ms = held.held_ms;
    topology.remember_shift(shift);
    Ok(())
}

/// Everything is as before, at a new epoch (H1).
pub(super) fn abort(topology: &mut Topology, held: &Shift, reason: &str) -> Result<Aborted, Replaced> {
    if held.kind == ShiftKind::Shards {
        return super::shards::abort(topology, held, reason);
    }
    if topology.shift.is_none()
        && let Some(before) = over(topology, held)
    {
        return Ok(Aborted::Yes(before.clone())); // an earlier attempt, whose answer was lost
    }
    let shift = ours(topology, held)?;
    match shift.phase {
        ShiftPhase::Begun => {}
        ShiftPhase::Decided => return Ok(Aborted::Decided(shift.clone())),
    }
    let mut shift = shift.clone();
    topology.shift = None;
    topology.epoch = topology.epoch.max(shift.epoch).next();
    topology.state = resting(topology);
    shift.state = ShiftState::Aborted;
    shift.steps.clone_from(&held.steps);
    shift.held_ms = held.held_ms;
    shift.ended_at = Some(now());
    shift.message = Some(format!("{reason}; center {} stays the master, at a new epoch", shift.from));
    topology.remember_shift(shift.clone());
    Ok(Aborted::Yes(shift))
}

/// Writes down how a shift that happened looks afterwards.
pub(super) fn conclude(topology: &mut Topology, held: &Shift) -> Result<(), Replaced> {
    let shift = over(topology, held).ok_or(Replaced)?;
    // A tail may have been saved, and settled, since the shift was verified.
    let tails = std::mem::take(&mut shift.tails);
    *shift = Shift { tails, ..held.clone() };
    Ok(())
}

/// Puts another coordinator in charge of a shift, unless it changed since it was seen. One that is verified is in the
/// history already.
pub(super) fn take_over(topology: &mut Topology, seen: &Shift, by: &Coordinator) -> Result<Shift, Replaced> {
    let shift = match topology.shift.as_deref_mut() {
        Some(shift) if shift.id == seen.id => shift,
        Some(_) | None => topology
            .history
            .iter_mut()
            .find(|shift| shift.id == seen.id && !shift.state.is_over())
            .ok_or(Replaced)?,
    };
    if shift.coordinator == *by {
        return Ok(shift.clone()); // an earlier attempt, whose answer was lost
    }
    if shift.coordinator != seen.coordinator || shift.phase != seen.phase {
        return Err(Replaced);
    }
    shift.coordinator = by.clone();
    Ok(shift.clone())
}

/// The state of a topology without a shift.
fn resting(topology: &Topology) -> TopologyState {
    match topology.durability {
        Durability::Replicated if topology.in_sync.is_empty() => TopologyState::Degraded,
        Durability::Replicated | Durability::Local => TopologyState::Steady,
    }
}
