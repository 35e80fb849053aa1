//! Whoever runs a shift: its record, its steps, and what becomes of it when something fails.
//!
//! Until `decided` every failure aborts, after it there is only forward (H3). What the topology says decides, never
//! what a step of this process seems to have done: each change of the record is a compare-and-set that finds the
//! coordinator's name and term there, and one that was not answered is asked again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use seckill_ledger::{Fence, handover};

use super::operation::{Refusal, Shared, ShiftError};
use super::precheck::{Survey, connect};
use super::record::{self, Aborted, Replaced};
use crate::fail_point::fail_point;
use crate::topology::{
    Check, CheckVerdict, Shift, ShiftKind, ShiftMode, ShiftPhase, ShiftState, Step, StepState, StoreError,
    Topology, UpdateError,
};

/// A change of the record that was not answered is asked again after this long.
pub(super) const STORE_RETRY: Duration = Duration::from_millis(50);
/// How long a phase of a planned shift may take by the coordinator's own clock. Below the freeze's deadline, after
/// which somebody else takes the shift over.
pub(super) const PHASE_MAX: Duration = Duration::from_millis(1500);
/// How long the old master's writes are held up at most, if nobody lets them go on: longer than the freeze, so that
/// whoever takes the shift over finds its stream of changes as it was. The fence refuses them all the while.
pub(super) const PAUSE_MS: u64 = 3000;
/// How long a server may take to let its writes go on when a shift is given up. The pause ends by itself, too.
const RESUME_WITHIN: Duration = Duration::from_secs(1);

/// Why the coordinator stops before the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stop {
    /// It cannot go on, and nothing is decided: the shift is given up for this reason.
    Abort(String),
    /// Somebody else took the shift over, or aborted it.
    Replaced,
    /// The service ends: another one takes the shift over.
    Ending,
    /// A test let the coordinator die here.
    #[cfg(test)]
    Died,
}

/// Runs one shift.
pub(super) struct Coordinator {
    pub(super) shared: Arc<Shared>,
    /// The record, with the steps of this moment.
    pub(super) shift: Shift,
    /// Since when purchases are held.
    pub(super) since: Instant,
    /// Since when the phase is what it is.
    pub(super) phase_since: Instant,
    /// When each step that runs was begun.
    begun: BTreeMap<usize, Instant>,
    /// The server that takes.
    pub(super) target: Option<MultiplexedConnection>,
    /// The old master's server. From the fence on it is watched on this connection, which nobody else may use.
    pub(super) source: Option<MultiplexedConnection>,
    /// How often the old master pings its replicas, seconds.
    pub(super) source_ping_s: Option<u64>,
}

impl Coordinator {
    pub(super) fn new(shared: Arc<Shared>, shift: Shift) -> Coordinator {
        let now = Instant::now();
        Coordinator {
            shared,
            shift,
            since: now,
            phase_since: now,
            begun: BTreeMap::new(),
            target: None,
            source: None,
            source_ping_s: None,
        }
    }

    /// Runs a shift whose record was just written, with the connections of its checks. `asked`: when the record was
    /// sent.
    pub(super) async fn run(mut self, survey: Survey, asked: Instant) {
        (self.target, self.source) = (survey.target_conn, survey.source_conn);
        self.source_ping_s = survey.source_ping_s;
        // Purchases are held from some moment after this one on.
        self.since = asked;
        let step = self.begin_step(match self.shift.mode {
            ShiftMode::Planned => "freeze",
            ShiftMode::Forced => "record",
        });
        self.begun.insert(step, asked);
        let exposure = self.shift.exposure.as_ref().map(|exposure| exposure.reason.clone());
        self.end_step(step, exposure);
        tracing::warn!(
            id = self.shift.id, from = %self.shift.from, to = %self.shift.to, mode = ?self.shift.mode,
            actor = self.shift.actor, reason = self.shift.reason, "a shift of the master center begins"
        );
        let outcome = match self.shift.mode {
            ShiftMode::Planned => self.planned().await,
            ShiftMode::Forced => self.forced().await,
        };
        self.end(outcome).await;
    }

    /// Goes on with a shift whose coordinator died. `since`: when it was first seen.
    pub(super) async fn recover(mut self, since: Instant) {
        self.since = since;
        self.shared.show(&self.shift);
        tracing::warn!(id = self.shift.id, phase = ?self.shift.phase, "a shift whose coordinator died is taken over");
        fail_point("taken_over");
        let recorded = self.shared.topology.current();
        let running = recorded.shift.as_ref().is_some_and(|shift| shift.id == self.shift.id);
        if self.shift.phase == ShiftPhase::Decided {
            // The change of the record that was the end of such a step is what shows this one here.
            for step in self.shift.steps.iter_mut().filter(|step| step.state == StepState::Running) {
                step.state = StepState::Done;
            }
        }
        if self.shift.kind == ShiftKind::Shards {
            let outcome = self.recover_shards().await;
            return self.end(outcome).await;
        }
        let outcome = match (running, self.shift.phase) {
            (false, _) => self.verify(None).await,
            (true, ShiftPhase::Begun) => Err(Stop::Abort("its coordinator died".to_owned())),
            (true, ShiftPhase::Decided) => {
                self.hold_source().await;
                self.forward(None).await
            }
        };
        self.end(outcome).await;
    }

    pub(super) async fn end(mut self, outcome: Result<(), Stop>) {
        let mut outcome = outcome;
        loop {
            match outcome {
                Ok(()) => return,
                Err(Stop::Abort(reason)) => match self.abort(&reason).await {
                    Ok(Aborted::Yes(_)) => return,
                    // The answer to `decided` was lost, and it was decided.
                    Ok(Aborted::Decided(_)) => {
                        self.shift.phase = ShiftPhase::Decided;
                        outcome = match self.shift.kind {
                            ShiftKind::Master => {
                                self.hold_source().await;
                                self.forward(None).await
                            }
                            ShiftKind::Shards => self.move_on().await,
                        };
                    }
                    Err(stop) => outcome = Err(stop),
                },
                Err(Stop::Replaced) => {
                    tracing::warn!(id = self.shift.id, "somebody else has this shift now");
                    return;
                }
                Err(Stop::Ending) => {
                    tracing::warn!(id = self.shift.id, "the service ends; another one takes the shift over");
                    return;
                }
                #[cfg(test)]
                Err(Stop::Died) => return,
            }
        }
    }

    /// Gives the shift up for somebody who waits for the outcome.
    pub(super) async fn give_up(mut self, reason: String) -> Result<Shift, ShiftError> {
        match self.abort(&reason).await {
            Ok(Aborted::Yes(shift)) => Ok(shift),
            Ok(Aborted::Decided(shift)) => Err(decided(&shift)),
            Err(Stop::Abort(_) | Stop::Replaced) => {
                Err(ShiftError::refused("somebody else is working on this shift", "look at its status"))
            }
            Err(Stop::Ending) => Err(ShiftError::Unknown {
                key: self.shift.key.clone().unwrap_or_default(),
                reason: "the service is shutting down".to_owned(),
            }),
            #[cfg(test)]
            Err(Stop::Died) => unreachable!("nothing dies in an abort"),
        }
    }

    /// Everything as before, at a new epoch (H1). Asked until it is known what became of it.
    async fn abort(&mut self, reason: &str) -> Result<Aborted, Stop> {
        fail_point("giving_up");
        if let Some(step) = self.shift.steps.iter().rposition(|step| step.state == StepState::Running) {
            self.finish_step(step, StepState::Failed, Some(reason.to_owned()), Vec::new());
        }
        self.shift.held_ms = Some(self.held_ms());
        let pausing = self.shift.kind == ShiftKind::Master && self.shift.mode == ShiftMode::Planned;
        // Nothing that is still on its way on the other connection may hold this up.
        self.source = None;
        let (shared, from) = (Arc::clone(&self.shared), self.shift.from.clone());
        let resumed = async {
            if !pausing {
                return;
            }
            let topology = shared.topology.current();
            let resume = async {
                let mut conn = connect(&shared, &topology, &from).await.ok()?;
                handover::resume(&mut conn).await.ok()
            };
            if !matches!(tokio::time::timeout(RESUME_WITHIN, resume).await, Ok(Some(()))) {
                tracing::warn!(center = %from, "the old master's writes go on by themselves within {PAUSE_MS} ms");
            }
        };
        let why = reason.to_owned();
        let change = self.change(None, move |topology, held| record::abort(topology, held, &why));
        let (aborted, ()) = tokio::join!(change, resumed);
        let aborted = aborted?;
        fail_point("given_up");
        if let Aborted::Yes(shift) = &aborted {
            self.shared.show(shift);
            tracing::warn!(id = shift.id, reason, "the shift was given up; everything stays where it was");
        }
        Ok(aborted)
    }

    /// Changes the record. What was not answered is asked again, until it is known or, before anything is decided,
    /// until this moment.
    pub(super) async fn change<T: Send + 'static>(
        &mut self,
        until: Option<Instant>,
        change: impl Fn(&mut Topology, &Shift) -> Result<T, Replaced> + Send + Sync + 'static,
    ) -> Result<T, Stop> {
        let change = Arc::new(change);
        loop {
            let (held, change) = (self.shift.clone(), Arc::clone(&change));
            match self.shared.topology.update_known(move |topology| change(topology, &held)).await {
                Ok(done) => {
                    self.known();
                    return Ok(done);
                }
                Err(UpdateError::Refused(Replaced)) => return Err(Stop::Replaced),
                Err(UpdateError::Store(error)) => {
                    if matches!(error, StoreError::Unknown { .. }) && self.shift.state == ShiftState::Running
                    {
                        self.shift.state = ShiftState::Unknown;
                        self.shared.show(&self.shift);
                    }
                    if until.is_some_and(|until| Instant::now() >= until) {
                        return Err(Stop::Abort(format!("the topology could not be changed: {error}")));
                    }
                    if self.shared.token.is_cancelled() {
                        return Err(Stop::Ending);
                    }
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
        }
    }

    fn known(&mut self) {
        if self.shift.state == ShiftState::Unknown {
            self.shift.state = ShiftState::Running;
            self.shared.show(&self.shift);
        }
    }

    /// The fence that the old master had.
    pub(super) fn fence_before(&self) -> Fence {
        Fence {
            ledger_id: self.shared.topology.current().ledger_id.clone(),
            epoch: self.shift.from_epoch,
            master: self.shift.from.clone(),
        }
    }

    /// The fence of the attempt.
    pub(super) fn fence(&self) -> Fence {
        Fence {
            ledger_id: self.shared.topology.current().ledger_id.clone(),
            epoch: self.shift.epoch,
            master: self.shift.to.clone(),
        }
    }

    /// Begins a step. Returns its place.
    pub(super) fn begin_step(&mut self, name: &str) -> usize {
        self.shift.steps.push(Step {
            name: name.to_owned(),
            state: StepState::Running,
            started_at: record::now(),
            took_ms: None,
            detail: None,
            checks: Vec::new(),
        });
        let step = self.shift.steps.len() - 1;
        self.begun.insert(step, Instant::now());
        self.shared.show(&self.shift);
        step
    }

    /// Ends a step.
    pub(super) fn end_step(&mut self, step: usize, detail: impl Into<Option<String>>) {
        self.finish_step(step, StepState::Done, detail.into(), Vec::new());
    }

    pub(super) fn finish_step(
        &mut self,
        step: usize,
        state: StepState,
        detail: Option<String>,
        checks: Vec<Check>,
    ) {
        // Not known of a step that somebody else began.
        let took = self.begun.remove(&step).map(|begun| begun.elapsed());
        if let Some(step) = self.shift.steps.get_mut(step) {
            step.state = state;
            step.took_ms = took.map(|took| u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
            step.detail = detail;
            step.checks = checks;
            tracing::info!(
                id = self.shift.id, step = step.name, took_us = took.map(|took| took.as_micros()), state = ?step.state,
                detail = step.detail, "a step of the shift"
            );
        }
        self.shared.show(&self.shift);
    }

    /// A place where a test lets something happen, or the coordinator die: nothing that would follow happens then.
    #[cfg(test)]
    pub(super) fn passes(&self, at: &'static str) -> Result<(), Stop> {
        let armed = self.shared.at.lock().unwrap().take_if(|(place, _)| *place == at);
        let dies = armed.is_some_and(|(_, hook)| hook());
        if dies { Err(Stop::Died) } else { Ok(()) }
    }

    /// A place where a test of the whole service lets it die.
    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "as in tests")]
    pub(super) fn passes(&self, at: &'static str) -> Result<(), Stop> {
        fail_point(at);
        Ok(())
    }
}

/// Why a shift cannot be given up any more.
pub(super) fn decided(shift: &Shift) -> ShiftError {
    ShiftError::refused(
        format!("the shift {} is decided: from here there is only forward", shift.id),
        format!("wait until it is over, then shift back to center {}", shift.from),
    )
    .of(Refusal::Decided)
}

/// Whether a step's checks let it pass.
pub(super) fn passed(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.verdict != CheckVerdict::Failed)
}
