//! What becomes of the topology in a shift of shards. See [`super::super::record`].

use seckill_domain::{CenterId, Epoch, Shard};

use super::super::operation::{ShiftError, ShiftRequest};
use super::super::record::{Aborted, Begun, Replaced, by_key, now, ours, over, refuse_any_shift};
use crate::topology::{Check, Coordinator, Exposure, Extra, Shift, ShiftPhase, ShiftState, Step, Topology};

/// A shift of shards that is to be recorded.
#[derive(Debug, Clone)]
pub(super) struct ShardPlan {
    pub(super) request: ShiftRequest,
    pub(super) key: String,
    pub(super) actor: String,
    pub(super) coordinator: Coordinator,
    pub(super) from: CenterId,
    pub(super) shards: Vec<Shard>,
    pub(super) started_at: String,
    pub(super) freeze_ms: u64,
    pub(super) exposure: Option<Exposure>,
    pub(super) step: Step,
}

impl ShardPlan {
    /// The record, as it is written into this topology.
    pub(super) fn shift(&self, topology: &Topology) -> Shift {
        let attempt = next_attempt(topology);
        Shift {
            id: format!("shards-{attempt}"),
            key: Some(self.key.clone()),
            kind: self.request.kind,
            mode: self.request.mode,
            from: self.from.clone(),
            to: self.request.to.clone(),
            shards: self.shards.clone(),
            state: ShiftState::Running,
            phase: ShiftPhase::Begun,
            from_epoch: topology.epoch,
            epoch: Epoch(u64::try_from(attempt).unwrap_or(0)),
            freeze_ms: self.freeze_ms,
            coordinator: self.coordinator.clone(),
            actor: self.actor.clone(),
            reason: self.request.reason.clone(),
            started_at: self.started_at.clone(),
            ended_at: None,
            accept_loss: self.request.accept_loss,
            exposure: self.exposure.clone(),
            target_run: None,
            source_run: None,
            tails: Vec::new(),
            dry_run: false,
            held_ms: None,
            steps: vec![self.step.clone()],
            message: None,
            extra: Extra::new(),
        }
    }

    pub(super) fn checks(&self) -> &[Check] {
        &self.step.checks
    }
}

/// The number of the next attempt: above every other one, and above the epochs, so that nobody mixes them up.
fn next_attempt(topology: &Topology) -> i64 {
    let epoch = i64::try_from(topology.epoch.0).unwrap_or(i64::MAX);
    topology.shard_epoch.max(epoch).saturating_add(1)
}

/// Refuses what makes no sense, before anything is looked at, and again when the record is written. Returns the center
/// that gives and the shards that move.
pub(super) fn refuse_wrong_use(
    topology: &Topology,
    request: &ShiftRequest,
) -> Result<(CenterId, Vec<Shard>), ShiftError> {
    let to = &request.to;
    refuse_any_shift(topology, request)?;
    let mut shards = request.shards.clone();
    shards.sort_unstable();
    shards.dedup();
    let Some(first) = shards.first() else {
        return Err(ShiftError::refused("no shards are named", "name them: `--shards 0-31`"));
    };
    let from = topology.home_center(*first).clone();
    for shard in &shards {
        let home = topology.home_center(*shard);
        if home == to {
            return Err(ShiftError::refused(
                format!("shard {shard} is at home in center {to} already"),
                "name only shards of the center that gives (`seckill topology show` lists them)",
            ));
        }
        if *home != from {
            return Err(ShiftError::refused(
                format!("shard {first} is at home in center {from}, shard {shard} in center {home}"),
                "shift the shards of one center after those of the other",
            ));
        }
    }
    Ok((from, shards))
}

/// Records a shift: from here on payments and cancellations of its shards are refused.
pub(super) fn begin(topology: &mut Topology, plan: &ShardPlan) -> Result<Begun, ShiftError> {
    if let Some(same) = by_key(topology, &plan.key) {
        let ours = same.started_at == plan.started_at
            && same.coordinator == plan.coordinator
            && topology.shift.as_ref().is_some_and(|shift| shift.id == same.id);
        return Ok(if ours { Begun::Ours(same.clone()) } else { Begun::Replay(same.clone()) });
    }
    let (from, shards) = refuse_wrong_use(topology, &plan.request)?;
    if (&from, &shards) != (&plan.from, &plan.shards) {
        return Err(ShiftError::refused("the shards moved while the checks were made", "ask again"));
    }
    let shift = plan.shift(topology);
    topology.shard_epoch = next_attempt(topology);
    topology.blocked_shards.extend(&shards);
    topology.blocked_shards.sort_unstable();
    topology.blocked_shards.dedup();
    topology.shift = Some(Box::new(shift.clone()));
    Ok(Begun::Ours(shift))
}

fn lift(topology: &mut Topology, held: &Shift) {
    topology.blocked_shards.retain(|shard| !held.shards.contains(shard));
}

/// From here on there is only forward (H3): the topology gives the shards to the other center.
pub(super) fn decide(topology: &mut Topology, held: &Shift) -> Result<(), Replaced> {
    let shift = ours(topology, held)?;
    shift.phase = ShiftPhase::Decided;
    shift.steps.clone_from(&held.steps);
    for shard in &held.shards {
        if let Some(owner) = topology.shard_owners.get_mut(usize::from(shard.number())) {
            owner.clone_from(&held.to);
        }
    }
    Ok(())
}

/// Payments and cancellations go on.
pub(super) fn unblock(topology: &mut Topology, held: &Shift) -> Result<(), Replaced> {
    let shift = ours(topology, held)?;
    shift.steps.clone_from(&held.steps);
    lift(topology, held);
    Ok(())
}

/// Puts a shift that happened into the history.
pub(super) fn conclude(topology: &mut Topology, held: &Shift) -> Result<(), Replaced> {
    if topology.shift.is_none() && over(topology, held).is_some() {
        return Ok(()); // an earlier attempt, whose answer was lost
    }
    ours(topology, held)?;
    topology.shift = None;
    lift(topology, held);
    topology.remember_shift(held.clone());
    Ok(())
}

/// Everything is as before, at a new attempt: whatever the database hears of this one comes too late (H1).
pub(in super::super) fn abort(
    topology: &mut Topology,
    held: &Shift,
    reason: &str,
) -> Result<Aborted, Replaced> {
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
    topology.shard_epoch = next_attempt(topology);
    lift(topology, &shift);
    shift.state = ShiftState::Aborted;
    shift.steps.clone_from(&held.steps);
    shift.ended_at = Some(now());
    shift.message = Some(format!("{reason}; the shards stay at home in center {}", shift.from));
    topology.remember_shift(shift.clone());
    Ok(Aborted::Yes(shift))
}
