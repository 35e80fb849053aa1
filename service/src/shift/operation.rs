//! Shifts as a resource: started, listed, looked at and aborted by operators.
//!
//! A shift of the master runs in a service of the center that takes, never in the command that asked for it. Its
//! record is in the topology ([`crate::topology::Shift`]), so it survives the service that runs it.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use seckill_domain::{CenterId, Epoch, Shard};
use serde::Deserialize;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::coordinator::{Coordinator, decided};
use super::ledger::LedgerError;
use super::peers::Access;
use super::precheck::{Survey, survey};
use super::record::{Begun, Plan, begin, by_key, refuse_wrong_use};
use super::shards::{self, ShardParts};
use super::takeover;
use crate::topology::{
    Authority, Check, CheckVerdict, Instances, Shift, ShiftKind, ShiftMode, ShiftPhase, ShiftState,
    StoreError, TopologyHandle, UpdateError,
};

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShiftRequest {
    /// What moves.
    pub kind: ShiftKind,
    /// The center that takes.
    pub to: CenterId,
    /// Whether the center that gives takes part.
    #[serde(default)]
    pub mode: ShiftMode,
    /// The shards that move, for [`ShiftKind::Shards`].
    #[serde(default)]
    pub shards: Vec<Shard>,
    /// Refused if the topology is at another epoch by now.
    #[serde(default)]
    pub expect_epoch: Option<Epoch>,
    /// Whether a forced shift may lose what the checks say.
    #[serde(default)]
    pub accept_loss: bool,
    /// Only the checks; nothing is changed or recorded.
    #[serde(default)]
    pub dry_run: bool,
    /// Why, for the history.
    #[serde(default)]
    pub reason: String,
    /// Names the request: sent again under the same name it is the same shift. 1–64 characters.
    #[serde(default)]
    pub key: Option<String>,
}

/// Why a shift was not started, or not aborted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShiftError {
    /// Nothing was changed.
    #[error("{reason}")]
    Refused {
        /// What kind of refusal it is.
        cause: Refusal,
        /// Why.
        reason: String,
        /// What to do about it.
        next: String,
        /// What was compared, if it came that far.
        checks: Vec<Check>,
    },
    /// It runs in another center's service: ask there. Nothing was changed.
    #[error("a shift to center {center} is started in that center's service")]
    Elsewhere {
        /// The center.
        center: CenterId,
    },
    /// There is no such shift.
    #[error("there is no shift {id}; the topology keeps the latest 16")]
    NotFound {
        /// What was asked for.
        id: String,
    },
    /// The topology's store has not answered: it may be recorded or not. Ask again under the same key.
    #[error("whether the shift is recorded is not known yet: {reason}")]
    Unknown {
        /// The key of the request, made up if it had none.
        key: String,
        /// Why it is not known.
        reason: String,
    },
    /// The topology's store failed. Nothing was changed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ShiftError {
    pub(super) fn refused(reason: impl Into<String>, next: impl Into<String>) -> ShiftError {
        ShiftError::Refused {
            cause: Refusal::Unfit,
            reason: reason.into(),
            next: next.into(),
            checks: Vec::new(),
        }
    }

    /// The same refusal, of another kind.
    pub(super) fn of(self, cause: Refusal) -> ShiftError {
        match self {
            ShiftError::Refused { cause: _, reason, next, checks } => {
                ShiftError::Refused { cause, reason, next, checks }
            }
            other => other,
        }
    }
}

/// What kind of refusal it is: callers tell them apart by this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Something is not as a shift needs it, or the request makes no sense.
    Unfit,
    /// Another shift is under way.
    Running,
    /// The topology is at another epoch than was expected.
    Epoch,
    /// A forced shift may lose what was acknowledged, and that was not accepted.
    Loss,
    /// It is decided or over: it cannot be given up any more.
    Decided,
}

/// Where shifts run.
#[derive(Debug, Clone)]
pub struct ShiftOptions {
    /// The center of this service.
    pub center: CenterId,
    /// Name of this run of this instance.
    pub instance: String,
    /// The inventory partition.
    pub partition: u8,
    /// URL of this center's Redis; the others' come from the topology, with the same account.
    pub redis_url: String,
    /// How long a service may write without confirming the topology: what a forced shift waits out. The same in
    /// every center.
    pub lease_ttl: Duration,
}

/// Starts, shows and aborts shifts. Cheap to clone.
#[derive(Clone)]
pub struct Shifts {
    pub(super) shared: Arc<Shared>,
}

impl fmt::Debug for Shifts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shifts").field("options", &self.shared.options).finish_non_exhaustive()
    }
}

pub(super) struct Shared {
    pub(super) options: ShiftOptions,
    pub(super) topology: TopologyHandle,
    pub(super) authority: Authority,
    pub(super) instances: Instances,
    pub(super) access: Access,
    pub(super) tracker: TaskTracker,
    pub(super) token: CancellationToken,
    /// The last shift that this service ran or runs, with the steps as they are now.
    live: Mutex<Option<Shift>>,
    /// What shards are moved with.
    pub(super) shards: OnceLock<ShardParts>,
    /// What a test does when the coordinator comes to a place; whether the coordinator dies there.
    #[cfg(test)]
    pub(super) at: Mutex<Option<(&'static str, Hook)>>,
}

/// See [`Shared::at`].
#[cfg(test)]
pub(super) type Hook = Box<dyn FnOnce() -> bool + Send>;

impl Shared {
    fn live(&self) -> std::sync::MutexGuard<'_, Option<Shift>> {
        // It is replaced as a whole.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows how the shift that runs here stands.
    pub(super) fn show(&self, shift: &Shift) {
        *self.live() = Some(shift.clone());
    }

    /// The record, with the steps of this moment if it runs here.
    pub(super) fn merged(&self, recorded: &Shift) -> Shift {
        match &*self.live() {
            Some(live)
                if live.id == recorded.id
                    && live.coordinator == recorded.coordinator
                    && !recorded.state.is_over() =>
            {
                live.clone()
            }
            _ => recorded.clone(),
        }
    }
}

impl Shifts {
    /// Makes shifts possible, and takes over those whose coordinator died (H4), until the token is cancelled.
    pub fn spawn(
        options: ShiftOptions,
        topology: TopologyHandle,
        authority: Authority,
        instances: Instances,
        tracker: &TaskTracker,
        token: CancellationToken,
    ) -> Result<Shifts, LedgerError> {
        let access = Access::like(&options.redis_url)?;
        let shared = Arc::new(Shared {
            options,
            topology,
            authority,
            instances,
            access,
            tracker: tracker.clone(),
            token,
            live: Mutex::new(None),
            shards: OnceLock::new(),
            #[cfg(test)]
            at: Mutex::new(None),
        });
        tracker.spawn(takeover::watch(Arc::clone(&shared)));
        Ok(Shifts { shared })
    }

    /// Makes shifts of shards possible, too.
    #[must_use]
    pub fn with_shards(self, parts: ShardParts) -> Shifts {
        // A second time changes nothing.
        let _ = self.shared.shards.set(parts);
        self
    }

    /// Starts a shift and returns as soon as it is recorded; it goes on whatever becomes of the caller. A dry run
    /// returns when the checks are done: its shift is recorded nowhere.
    pub async fn start(&self, request: ShiftRequest, actor: &str) -> Result<Shift, ShiftError> {
        let (answer, answered) = oneshot::channel();
        let key = request.key.clone().unwrap_or_else(|| format!("{:032x}", rand::random::<u128>()));
        let run = run(Arc::clone(&self.shared), request, key.clone(), actor.to_owned(), answer);
        self.shared.tracker.spawn(async move {
            if AssertUnwindSafe(run).catch_unwind().await.is_err() {
                tracing::error!("the coordinator of a shift panicked; another one takes it over");
            }
        });
        let ended = || ShiftError::Unknown { key, reason: "the service is shutting down".to_owned() };
        answered.await.unwrap_or_else(|_| Err(ended()))
    }

    /// The running shift, then those that are over, the newest first.
    pub fn list(&self) -> Vec<Shift> {
        let topology = self.shared.topology.current();
        let recorded = topology.shift.as_deref().into_iter().chain(topology.history.iter().rev());
        recorded.map(|shift| self.shared.merged(shift)).collect()
    }

    /// A shift by its id. While it runs in this service its steps are those of this moment, otherwise those of its
    /// last entry in the topology.
    pub fn find(&self, id: &str) -> Option<Shift> {
        let recorded = self.shared.topology.current().find_shift(id).map(|shift| self.shared.merged(shift));
        // Not recorded, or not known to be: its coordinator knows why.
        recorded.or_else(|| self.shared.live().clone().filter(|live| live.id == id))
    }

    /// The shift that was recorded under the key of a request.
    pub fn find_by_key(&self, key: &str) -> Option<Shift> {
        by_key(&self.shared.topology.current(), key).map(|shift| self.shared.merged(shift))
    }

    /// Gives a shift up that is not decided yet: its coordinator, wherever it is, has lost it when this returns, and
    /// everything is as before at a new epoch.
    pub async fn abort(&self, id: &str, actor: &str) -> Result<Shift, ShiftError> {
        self.shared.topology.confirm().await?;
        let topology = self.shared.topology.current();
        let recorded = topology.find_shift(id).ok_or_else(|| ShiftError::NotFound { id: id.to_owned() })?;
        if !matches!(&topology.shift, Some(running) if running.id == id) {
            return Err(ShiftError::refused(
                format!("the shift {id} is over"),
                format!("look at `seckill shift status {id}`; to move back, shift again"),
            )
            .of(Refusal::Decided));
        }
        if recorded.phase == ShiftPhase::Decided {
            return Err(decided(recorded));
        }
        let coordinator = takeover::take(&self.shared, recorded).await?;
        coordinator.give_up(format!("aborted by {actor}")).await
    }
}

/// One request from its arrival to the end of its shift. The answer goes out as soon as the record is written.
async fn run(
    shared: Arc<Shared>,
    request: ShiftRequest,
    key: String,
    actor: String,
    answer: oneshot::Sender<Result<Shift, ShiftError>>,
) {
    if key.is_empty() || key.len() > 64 {
        let refused = ShiftError::refused("the key has to have 1 to 64 characters", "choose another key");
        return drop(answer.send(Err(refused)));
    }
    if request.kind == ShiftKind::Shards {
        return shards::run(shared, request, key, actor, answer).await;
    }
    let (plan, survey) = match prepare(&shared, request, key, actor).await {
        Ok(Prepared::Plan(prepared)) => *prepared,
        Ok(Prepared::Answer(shift)) => return drop(answer.send(Ok(*shift))),
        Err(error) => return drop(answer.send(Err(error))),
    };
    // Nobody may be there any more to hear it.
    let mut answer = Some(answer);
    let mut tell = move |outcome| {
        if let Some(answer) = answer.take() {
            drop(answer.send(outcome));
        }
    };
    let asked = Instant::now();
    let begun = loop {
        let attempt = plan.clone();
        match shared.topology.update_known(move |topology| begin(topology, &attempt)).await {
            Ok(begun) => break begun,
            Err(UpdateError::Refused(refusal)) => return tell(Err(refusal)),
            Err(UpdateError::Store(error @ StoreError::Unknown { .. })) => {
                // The next attempt finds the record, or takes the place that it would have had.
                tell(Err(ShiftError::Unknown { key: plan.key.clone(), reason: error.to_string() }));
                if shared.token.is_cancelled() {
                    return;
                }
                tokio::time::sleep(super::coordinator::STORE_RETRY).await;
            }
            Err(UpdateError::Store(error)) => return tell(Err(error.into())),
        }
    };
    match begun {
        Begun::Replay(shift) => tell(Ok(shift)),
        Begun::Ours(shift) => {
            shared.show(&shift);
            tell(Ok(shift.clone()));
            Coordinator::new(shared, shift).run(survey, asked).await;
        }
    }
}

enum Prepared {
    /// To be recorded.
    Plan(Box<(Plan, Survey)>),
    /// Answered already: a replay, or a dry run.
    Answer(Box<Shift>),
}

async fn prepare(
    shared: &Arc<Shared>,
    request: ShiftRequest,
    key: String,
    actor: String,
) -> Result<Prepared, ShiftError> {
    let asked = Instant::now();
    if let Err(error) = shared.topology.confirm().await {
        return Err(ShiftError::refused(
            format!("the topology cannot be read, so nothing may be decided on it: {error}"),
            "bring the topology's store back, then ask again",
        ));
    }
    let store_answer = asked.elapsed();
    let topology = shared.topology.current();
    if let Some(same) = by_key(&topology, &key) {
        return Ok(Prepared::Answer(Box::new(shared.merged(same))));
    }
    refuse_wrong_use(&topology, &request)?;
    if request.to != shared.options.center {
        return Err(ShiftError::Elsewhere { center: request.to });
    }
    let survey = survey(shared, &topology, &request, store_answer).await;
    let plan = Plan::new(shared, &topology, request, key, actor, &survey);
    let failed: Vec<&Check> =
        survey.checks.iter().filter(|check| check.verdict == CheckVerdict::Failed).collect();
    if let Some(first) = failed.first() {
        let names: Vec<&str> = failed.iter().map(|check| check.name.as_str()).collect();
        return Err(ShiftError::Refused {
            cause: if names == ["exposure"] { Refusal::Loss } else { Refusal::Unfit },
            reason: format!(
                "{} of {} checks failed: {} ({}: {}, allowed {})",
                failed.len(),
                survey.checks.len(),
                names.join(", "),
                first.name,
                first.value,
                first.limit,
            ),
            next: plan.what_to_do(first),
            checks: survey.checks,
        });
    }
    if plan.request.dry_run {
        let mut shift = plan.shift(&topology)?;
        shift.state = ShiftState::Done;
        shift.dry_run = true;
        shift.ended_at = Some(super::record::now());
        shift.message = Some("all checks passed; nothing was changed".to_owned());
        return Ok(Prepared::Answer(Box::new(shift)));
    }
    debug_assert!(matches!(plan.request.mode, ShiftMode::Planned | ShiftMode::Forced));
    Ok(Prepared::Plan(Box::new((plan, survey))))
}
