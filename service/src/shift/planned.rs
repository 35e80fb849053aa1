//! The planned shift, and the way forward that every shift takes once it is decided (H2, H3).
//!
//! The old master is fenced at the attempt's epoch and its writes are held up in one round trip, in which it also says
//! where its stream of changes ends. When the target shows that end and the fence, it has everything; that is decided
//! in the topology, the target becomes a master, and the topology is redirected to it while the old master already
//! attaches itself: after `decided` nobody can write to it, and it has nothing that the target lacks.
//!
//! "Write the configuration" (H2, S3) means nothing to be done here: which role a server has is written in the
//! topology, and each server starts isolated, whatever it was (S1). `CONFIG REWRITE` would undo that: a server that
//! restarts would be a master, or follow one, before anybody has compared it with the topology.

use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use seckill_ledger::admin::{FenceChange, FenceOutcome};
use seckill_ledger::roles::{self, Role};
use seckill_ledger::{Fence, handover};
use tokio::task::JoinHandle;

use super::coordinator::{Coordinator, PAUSE_MS, PHASE_MAX, Stop};
use super::peers::split;
use super::precheck::connect;
use super::record;
use crate::fail_point::fail_point;
use crate::topology::{ShiftMode, ShiftPhase, StepState};

/// How often the target is asked whether it has everything. It usually has, when the old master's answer arrives.
const CATCH_UP_POLL: Duration = Duration::from_millis(1);
/// How often a target that could not be promoted is tried again.
const PROMOTE_POLL: Duration = Duration::from_millis(50);
/// How long the old master may take to be held up again.
const HOLD_MAX: Duration = Duration::from_millis(300);
/// How long the new master's guardian may take to take its server into use.
const THAW_MAX: Duration = Duration::from_secs(3);
/// How long the old master may take to answer that it follows the new one. Its guardian attaches it otherwise.
const ATTACH_MAX: Duration = Duration::from_secs(2);

impl Coordinator {
    pub(super) async fn planned(&mut self) -> Result<(), Stop> {
        let until = self.phase_since + PHASE_MAX;
        self.passes("recorded")?;
        let step = self.begin_step("fence");
        let offset = self.fence_source(until).await?;
        self.end_step(step, format!("{} ends at {offset} bytes", self.shift.from));
        self.passes("fenced")?;
        let step = self.begin_step("catch_up");
        self.catch_up(offset, until).await?;
        self.end_step(step, None);
        self.passes("caught_up")?;
        let step = self.begin_step("decided");
        self.change(Some(until), record::decide).await?;
        self.shift.phase = ShiftPhase::Decided;
        self.phase_since = Instant::now();
        self.end_step(step, None);
        self.passes("decided")?;
        self.forward(None).await
    }

    /// Fences the old master and holds up its writes. Returns where its stream of changes ends.
    async fn fence_source(&mut self, until: Instant) -> Result<u64, Stop> {
        let (from, to) = (self.fence_before(), self.fence());
        let Some(mut source) = self.source.take() else {
            return Err(Stop::Abort("there is no connection to the old master's Redis".to_owned()));
        };
        // A coordinator that slept here must not hold up a master that is none of its business any more.
        if Instant::now() >= until {
            return Err(Stop::Abort("the coordinator itself was too slow".to_owned()));
        }
        let fenced = handover::fence_and_pause(&mut source, &from, &to, PAUSE_MS, self.source_ping_s);
        let fenced = match tokio::time::timeout_at(until.into(), fenced).await {
            Ok(Ok(fenced)) => fenced,
            Ok(Err(error)) => {
                return Err(Stop::Abort(format!("the old master could not be fenced: {error}")));
            }
            Err(_) => return Err(Stop::Abort("the old master did not answer in time".to_owned())),
        };
        match fenced.outcome {
            FenceOutcome::Set | FenceOutcome::Same => {}
            outcome @ (FenceOutcome::Exists { .. }
            | FenceOutcome::NotEmpty
            | FenceOutcome::Mismatch { .. }
            | FenceOutcome::EpochTooLow { .. }) => {
                return Err(Stop::Abort(format!("the old master could not be fenced at {to}: {outcome:?}")));
            }
        }
        self.source = Some(source);
        Ok(fenced.offset)
    }

    /// Waits until the target itself shows the fence, and everything before it.
    async fn catch_up(&mut self, offset: u64, until: Instant) -> Result<(), Stop> {
        let wanted = self.fence().to_string();
        let Some(target) = self.target.as_mut() else {
            return Err(Stop::Abort("there is no connection to the target's Redis".to_owned()));
        };
        let mut seen = "nothing".to_owned();
        let caught_up = async {
            loop {
                let standing = roles::standing(target)
                    .await
                    .map_err(|error| Stop::Abort(format!("the target's Redis: {error}")))?;
                let Role::Replica { offset: received, .. } = standing.role else {
                    return Err(Stop::Abort("the target's Redis is no replica any more".to_owned()));
                };
                if Some(&standing.run_id) != self.shift.target_run.as_ref() {
                    return Err(Stop::Abort("the target's Redis was restarted".to_owned()));
                }
                if received >= offset && standing.settled && standing.fence.as_ref() == Some(&wanted) {
                    return Ok(());
                }
                seen = format!("{received} of {offset} bytes");
                tokio::time::sleep(CATCH_UP_POLL).await;
            }
        };
        match tokio::time::timeout_at(until.into(), caught_up).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Stop::Abort(format!("the target did not catch up in time: it has {seen}"))),
        }
    }

    /// Holds up the old master's writes again, if it answers, when another coordinator decided: what it writes for
    /// itself (an answer to `WAIT`) after the target left it would cost a full copy.
    pub(super) async fn hold_source(&mut self) {
        if self.shift.mode == ShiftMode::Forced {
            return;
        }
        let (shared, to) = (Arc::clone(&self.shared), self.fence());
        let topology = shared.topology.current();
        let held = async {
            let mut source = connect(&shared, &topology, &self.shift.from).await.ok()?;
            let held = handover::hold(&mut source, &to, PAUSE_MS).await.ok()??;
            Some((source, held))
        };
        let Ok(Some((source, held))) = tokio::time::timeout(HOLD_MAX, held).await else { return };
        (self.source, self.source_ping_s) = (Some(source), held.ping_s);
        self.target = connect(&shared, &topology, &self.shift.to).await.ok();
        // It has what counts; the rest only saves the copy.
        let _ = self.catch_up(held.offset, Instant::now() + HOLD_MAX).await;
        fail_point("held_again");
    }

    /// What follows once a shift is decided, whoever decided it: the target becomes the master, the topology says so,
    /// the old master follows it.
    /// `promoted`: the run of its server, where this coordinator made it the master already.
    pub(super) async fn forward(&mut self, promoted: Option<String>) -> Result<(), Stop> {
        let promoted = match promoted {
            Some(run_id) => Ok(run_id),
            None => self.promote_in_time().await,
        };
        self.passes("promoted")?;
        let attach = self.redirect(promoted.as_deref().ok()).await?;
        self.passes("redirected")?;
        let attaching = matches!(self.shift.mode, ShiftMode::Planned).then(|| self.begin_step("attach"));
        if promoted.is_ok() {
            self.thaw().await;
        }
        if let Some(step) = attaching {
            match attach.await.unwrap_or_else(|failed| Err(failed.to_string())) {
                Ok(()) => self.end_step(step, None),
                Err(reason) => {
                    self.end_step(
                        step,
                        format!("left to the guardian of center {}: {reason}", self.shift.from),
                    );
                }
            }
        }
        self.passes("thawed")?;
        self.verify(promoted.err()).await
    }

    /// Makes the target's server the master, within the time that the freeze leaves for it.
    async fn promote_in_time(&mut self) -> Result<String, String> {
        let step = self.begin_step("promote");
        let until = Instant::now() + PHASE_MAX;
        loop {
            match self.promote().await {
                Ok(run_id) => {
                    self.end_step(step, None);
                    return Ok(run_id);
                }
                Err(reason) if Instant::now() >= until => {
                    // The freeze ends all the same: the center's own guardian promotes its server when it is back.
                    self.finish_step(step, StepState::Failed, Some(reason.clone()), Vec::new());
                    return Err(reason);
                }
                Err(_) => {
                    self.target = None;
                    tokio::time::sleep(PROMOTE_POLL).await;
                }
            }
        }
    }

    /// Makes the target's server the master, at the attempt's fence. Returns its run.
    pub(super) async fn promote(&mut self) -> Result<String, String> {
        let to = self.fence();
        let mut target = match self.target.take() {
            Some(target) => target,
            None => {
                let topology = self.shared.topology.current();
                connect(&self.shared, &topology, &self.shift.to).await.map_err(|error| error.to_string())?
            }
        };
        let standing = roles::standing(&mut target).await.map_err(|error| error.to_string())?;
        let text = standing.fence.as_deref().unwrap_or_default();
        let found = text.parse::<Fence>().map_err(|error| error.to_string())?;
        if found.ledger_id != to.ledger_id {
            return Err(format!("it holds another ledger ({})", found.ledger_id));
        }
        if self.shift.mode == ShiftMode::Planned && found != to {
            return Err(format!("it shows the fence {found}, not {to}: it lost the end of its data"));
        }
        let change = FenceChange::Lift { from: found.clone() };
        match roles::promote(&mut target, Some(text), &change, &to).await {
            Ok(Some(FenceOutcome::Set | FenceOutcome::Same)) => {}
            Ok(None) => return Err("its fence changed meanwhile".to_owned()),
            Ok(Some(
                outcome @ (FenceOutcome::Exists { .. }
                | FenceOutcome::NotEmpty
                | FenceOutcome::Mismatch { .. }
                | FenceOutcome::EpochTooLow { .. }),
            )) => return Err(format!("its fence could not be set: {outcome:?}")),
            Err(error) => return Err(error.to_string()),
        }
        self.target = Some(target);
        Ok(standing.run_id)
    }

    /// The topology says who the master is from here on (H3). The old master attaches itself meanwhile, so that
    /// purchases do not wait for that, too.
    async fn redirect(&mut self, promoted: Option<&str>) -> Result<JoinHandle<Result<(), String>>, Stop> {
        let step = self.begin_step("redirect");
        let source = self.source.take().filter(|_| promoted.is_some());
        let attach = self.shared.tracker.spawn(self.attach(source));
        self.passes("redirecting")?;
        self.shift.held_ms = Some(self.held_ms());
        let (partition, run_id) = (self.shared.options.partition, promoted.map(str::to_owned));
        self.change(None, move |topology, held| {
            record::redirect(topology, held, partition, run_id.as_deref())
        })
        .await?;
        self.end_step(step, None);
        tracing::warn!(
            id = self.shift.id, master = %self.shift.to, epoch = self.shift.epoch.0, held_ms = self.shift.held_ms,
            "the master center has shifted"
        );
        Ok(attach)
    }

    /// Makes the old master follow the new one, on the connection that has watched its fence since it was fenced.
    fn attach(
        &self,
        source: Option<MultiplexedConnection>,
    ) -> impl Future<Output = Result<(), String>> + Send + use<> {
        let topology = self.shared.topology.current();
        let address = topology
            .center(&self.shift.to)
            .and_then(|center| center.ledger.get(usize::from(self.shared.options.partition)).cloned());
        let (access, ping_s) = (self.shared.access.clone(), self.source_ping_s);
        async move {
            let mut source = source.ok_or("this coordinator did not fence it")?;
            let address = address.ok_or("the topology does not say where the new master's Redis is")?;
            let (host, port) = split(&address).map_err(|error| error.to_string())?;
            let follow = handover::follow(&mut source, host, port, access.account(), ping_s);
            match tokio::time::timeout(ATTACH_MAX, follow).await {
                Ok(Ok(true)) => {
                    fail_point("attached");
                    Ok(())
                }
                Ok(Ok(false)) => Err("its fence changed meanwhile".to_owned()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("it did not answer in time".to_owned()),
            }
        }
    }

    /// Waits until this center's services take purchases.
    async fn thaw(&mut self) {
        let step = self.begin_step("thaw");
        if self.shared.options.center != self.shift.to {
            self.end_step(step, format!("by the services of center {}", self.shift.to));
            return;
        }
        let epoch = self.shift.epoch;
        let mut status = self.shared.authority.subscribe();
        let granted = status.wait_for(|status| status.as_ref().is_ok_and(|grant| grant.fence.epoch >= epoch));
        let outcome = tokio::time::timeout(THAW_MAX, granted).await.map(|granted| granted.map(drop));
        match outcome {
            Ok(Ok(())) => {
                self.shift.held_ms = Some(self.held_ms());
                self.end_step(step, None);
            }
            Ok(Err(_)) | Err(_) => {
                let reason = match self.shared.authority.status() {
                    Ok(_) => "it took long".to_owned(),
                    Err(refusal) => refusal.to_string(),
                };
                self.finish_step(step, StepState::Failed, Some(reason), Vec::new());
            }
        }
    }

    pub(super) fn held_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
