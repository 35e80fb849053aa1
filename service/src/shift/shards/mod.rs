//! Shards on their way to another center: the orders of their users are written there from then on.
//!
//! | step | what is true when it is done |
//! | --- | --- |
//! | `precheck` | both databases copy each other and are close behind |
//! | `block` | the record is in the topology: payments and cancellations of these shards are refused as `shifting` |
//! | `drain` | what was accepted before is stored in the center that gives, or reading it again is left to the one that takes |
//! | `fence` | the database of the center that gives has let go of them (O1): nobody writes their orders |
//! | `replicate` | the database of the center that takes has everything that was written there |
//! | `hand_over` | the topology gives them to the other center (from here on there is only forward), and its database has taken them |
//! | `unblock` | payments and cancellations go on |
//! | `verify` | both databases say whose they are |
//!
//! Purchases go on all the time: their orders wait in the queue. With `--mode forced` the center that gives takes no
//! part; `apply` stands in the place of `drain`, `fence` and `replicate`: what its database had sent is applied.
//!
//! The number of an attempt is the topology's `shard_epoch`, not the ledger's epoch: the ledger does not know who is at
//! home where, and a new epoch of it would hold up every purchase.

mod answer;
mod precheck;
mod record;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use seckill_domain::OutboxId;
use seckill_ledger::Fence;
use seckill_ledger::roles;
use tokio::sync::oneshot;

use super::coordinator::{Coordinator, STORE_RETRY, Stop, passed};
use super::operation::{Shared, ShiftError, ShiftRequest};
use super::precheck::Checks;
use super::record::Begun;
use crate::cross_center::CrossCenter;
use crate::cross_center::calls::{FenceCall, SHARDS, ShardsAnswer, ShardsCall, ShardsStanding};
use crate::orders::{Fenced, OrderStore, Owners, follow_owners};
use crate::topology::{CheckVerdict, ShiftMode, ShiftPhase, ShiftState, StepState, StoreError, UpdateError};

pub use answer::answer_for_shards;
pub(super) use record::abort;

/// How long it is waited at most for what was accepted before. What is not stored by then is read by the next owner.
const DRAINED_WITHIN: Duration = Duration::from_secs(5);
/// Between two looks at how far the other center has stored.
const DRAIN_POLL: Duration = Duration::from_millis(50);
/// How long the other center may take at most for one call; letting go waits for the writers that are under way.
const CALL_WITHIN: Duration = Duration::from_secs(10);
/// How long it is waited at most until the other center's database says whose the shards are now.
const KNOWN_WITHIN: Duration = Duration::from_secs(5);
/// Between two looks at it.
const KNOWN_POLL: Duration = Duration::from_millis(100);
/// The checks of `verify`: what the database of the center that takes says, and of the one that gave.
const TARGET_OWNER: &str = "target_owner";
const SOURCE_OWNER: &str = "source_owner";

/// What a shift of shards works with.
#[derive(Debug, Clone)]
pub struct ShardParts {
    orders: OrderStore,
    way: Way,
    /// How long a shift may take until it is decided, by its coordinator's own clock: as long, payments of its shards
    /// wait.
    decided_within: Duration,
}

/// The way to the center that gives.
#[derive(Debug, Clone)]
enum Way {
    /// Over the cross-center API, if this center has a key for it.
    Cross(Option<CrossCenter>),
    /// Straight to its database and its topology, in tests.
    #[cfg(test)]
    Direct(OrderStore, crate::topology::TopologyHandle),
}

impl ShardParts {
    /// With this center's order database, the way to the other centers, and how long a shift may take until it is
    /// decided (`orders.shard_shift_ms`).
    pub fn new(orders: OrderStore, cross: Option<CrossCenter>, decided_within: Duration) -> ShardParts {
        ShardParts { orders, way: Way::Cross(cross), decided_within }
    }

    /// How long a shift may stay in one phase before somebody else takes it over. Its own coordinator gives up before,
    /// even if it has begun a call of [`ShardParts::call_within`] at the last moment.
    fn freeze_ms(&self) -> u64 {
        u64::try_from((self.decided_within * 3 / 2).as_millis()).unwrap_or(u64::MAX)
    }

    fn drained_within(&self) -> Duration {
        DRAINED_WITHIN.min(self.decided_within / 4)
    }

    fn known_within(&self) -> Duration {
        KNOWN_WITHIN.min(self.decided_within / 4)
    }

    fn call_within(&self) -> Duration {
        CALL_WITHIN.min(self.decided_within / 2)
    }

    /// Asks another center, or has it let go of shards.
    async fn ask(&self, shift: &Ask<'_>, fence: Option<FenceCall>) -> Result<ShardsAnswer, String> {
        let call = ShardsCall { shards: shift.shards.to_vec(), to: shift.to.clone(), fence };
        match &self.way {
            Way::Cross(Some(cross)) => {
                let answer = cross.call(shift.from, SHARDS, &call, self.call_within()).await;
                answer.map_err(|error| error.to_string())
            }
            Way::Cross(None) => Err("cross_center.keys has no key of this center to sign with".to_owned()),
            #[cfg(test)]
            Way::Direct(orders, topology) => {
                answer_for_shards(orders, topology, call).await.map_err(|error| error.to_string())
            }
        }
    }

    /// What another center's database says.
    async fn standing(&self, ask: &Ask<'_>) -> Result<ShardsStanding, String> {
        match self.ask(ask, None).await? {
            ShardsAnswer::Standing(standing) => Ok(*standing),
            ShardsAnswer::Refused(reason) => Err(reason),
            ShardsAnswer::Fenced(_) => Err("an answer to another question".to_owned()),
        }
    }
}

/// Whom it is about.
struct Ask<'a> {
    from: &'a seckill_domain::CenterId,
    to: &'a seckill_domain::CenterId,
    shards: &'a [seckill_domain::Shard],
}

/// One request from its arrival to the end of its shift. The answer goes out as soon as the record is written.
pub(super) async fn run(
    shared: Arc<Shared>,
    request: ShiftRequest,
    key: String,
    actor: String,
    answer: oneshot::Sender<Result<crate::topology::Shift, ShiftError>>,
) {
    // Nobody may be there any more to hear it.
    let mut answer = Some(answer);
    let mut tell = move |outcome| {
        if let Some(answer) = answer.take() {
            let _ = answer.send(outcome);
        }
    };
    let plan = match precheck::prepare(&shared, request, key, actor).await {
        Ok(precheck::Prepared::Plan(plan)) => *plan,
        Ok(precheck::Prepared::Answer(shift)) => return tell(Ok(*shift)),
        Err(error) => return tell(Err(error)),
    };
    let begun = loop {
        let attempt = plan.clone();
        match shared.topology.update(move |topology| record::begin(topology, &attempt)).await {
            Ok(begun) => break begun,
            Err(UpdateError::Refused(refusal)) => return tell(Err(refusal)),
            Err(UpdateError::Store(error @ StoreError::Unknown { .. })) => {
                // The next attempt finds the record, or takes the place that it would have had.
                tell(Err(ShiftError::Unknown { key: plan.key.clone(), reason: error.to_string() }));
                if shared.token.is_cancelled() {
                    return;
                }
                tokio::time::sleep(STORE_RETRY).await;
            }
            Err(UpdateError::Store(error)) => return tell(Err(error.into())),
        }
    };
    match begun {
        Begun::Replay(shift) => tell(Ok(shift)),
        Begun::Ours(shift) => {
            shared.show(&shift);
            tell(Ok(shift.clone()));
            Coordinator::new(shared, shift).run_shards().await;
        }
    }
}

impl Coordinator {
    async fn run_shards(mut self) {
        tracing::warn!(
            id = self.shift.id, from = %self.shift.from, to = %self.shift.to, mode = ?self.shift.mode,
            shards = self.shift.shards.len(), actor = self.shift.actor, reason = self.shift.reason,
            "a shift of shards begins"
        );
        let outcome = match self.shift.mode {
            ShiftMode::Planned => self.planned_shards().await,
            ShiftMode::Forced => self.forced_shards().await,
        };
        self.end(outcome).await;
    }

    fn parts(&self) -> Result<ShardParts, Stop> {
        self.shared
            .shards
            .get()
            .cloned()
            .ok_or_else(|| Stop::Abort("this service has no order database".to_owned()))
    }

    fn asked(&self) -> Ask<'_> {
        Ask { from: &self.shift.from, to: &self.shift.to, shards: &self.shift.shards }
    }

    async fn planned_shards(&mut self) -> Result<(), Stop> {
        let parts = self.parts()?;
        let deadline = self.phase_since + parts.decided_within;
        self.block();
        self.passes("blocked")?;
        self.drain(&parts).await?;
        let fenced = self.fence_shards(&parts, deadline).await?;
        self.passes("fenced")?;
        let step = self.begin_step("replicate");
        let left = deadline.saturating_duration_since(Instant::now());
        match parts.orders.reaches(&fenced.written, left).await {
            Ok(true) => self.end_step(step, format!("applied {}", fenced.written)),
            Ok(false) => {
                return Err(Stop::Abort(format!(
                    "the database of center {} has not applied {} in time",
                    self.shift.to, fenced.written
                )));
            }
            Err(error) => return Err(Stop::Abort(error.to_string())),
        }
        self.passes("replicated")?;
        self.decide_shards(Some(deadline)).await?;
        self.move_on().await
    }

    async fn forced_shards(&mut self) -> Result<(), Stop> {
        let parts = self.parts()?;
        let deadline = self.phase_since + parts.decided_within;
        self.block();
        self.passes("blocked")?;
        let step = self.begin_step("apply");
        let left = deadline.saturating_duration_since(Instant::now());
        let server = parts.orders.server().await.map_err(|error| Stop::Abort(error.to_string()))?;
        let received: Vec<String> = server
            .into_iter()
            .flat_map(|server| server.copies)
            .filter_map(|copy| Some(copy.received).filter(|received| !received.is_empty()))
            .collect();
        for position in &received {
            match parts.orders.reaches(position, left).await {
                Ok(true) => {}
                Ok(false) => {
                    return Err(Stop::Abort(format!(
                        "this center's database has received {position} and has not applied it in time; \
                         SHOW REPLICA STATUS says what is in its way"
                    )));
                }
                Err(error) => return Err(Stop::Abort(error.to_string())),
            }
        }
        self.end_step(step, format!("applied {}", received.join(", ")));
        self.passes("replicated")?;
        self.decide_shards(Some(deadline)).await?;
        self.move_on().await
    }

    fn block(&mut self) {
        let step = self.begin_step("block");
        let shards = self.shift.shards.len();
        self.end_step(step, format!("payments and cancellations of {shards} shards are refused as shifting"));
    }

    /// Waits until the center that gives has stored what was accepted by now. What it does not get to is not lost:
    /// the next owner reads on from where it was.
    async fn drain(&mut self, parts: &ShardParts) -> Result<(), Stop> {
        let step = self.begin_step("drain");
        let until = Instant::now() + parts.drained_within();
        let partition = self.shared.options.partition;
        let wanted = self.end_of_outbox().await;
        let mut found = OutboxId::ZERO;
        let silence = loop {
            let silence = match (&wanted, parts.standing(&self.asked()).await) {
                (Ok(wanted), Ok(standing)) => {
                    let stored = standing.stored.iter().find(|(of, _)| *of == partition);
                    found = stored.map_or(OutboxId::ZERO, |(_, at)| *at);
                    if found >= *wanted {
                        self.end_step(step, format!("stored up to {found}"));
                        return Ok(());
                    }
                    None
                }
                (Err(reason), Ok(_)) => {
                    self.end_step(step, format!("not waited for: {reason}"));
                    return Ok(());
                }
                (_, Err(reason)) => Some(reason),
            };
            if Instant::now() >= until || self.shared.token.is_cancelled() {
                break silence;
            }
            tokio::time::sleep(DRAIN_POLL).await;
        };
        match silence {
            Some(reason) => Err(Stop::Abort(format!("center {} does not answer: {reason}", self.shift.from))),
            None => {
                let left = format!("stored up to {found}; the next owner reads on from there");
                self.end_step(step, left);
                Ok(())
            }
        }
    }

    /// The last entry of the outbox, as this center's copy of it has it.
    async fn end_of_outbox(&self) -> Result<OutboxId, String> {
        let mut conn = self.shared.access.connect_own().await.map_err(|error| error.to_string())?;
        let standing = roles::standing(&mut conn).await.map_err(|error| error.to_string())?;
        let fence = standing.fence.as_deref().and_then(|fence| fence.parse::<Fence>().ok());
        let epoch = fence.ok_or("this center's Redis holds no ledger")?.epoch.0;
        Ok(OutboxId { epoch, seq: standing.seq })
    }

    async fn fence_shards(&mut self, parts: &ShardParts, deadline: Instant) -> Result<Fenced, Stop> {
        let step = self.begin_step("fence");
        // What this center's database wrote about these shards has to be there before they are let go of, or it would
        // come late and undo it.
        let after = parts.orders.written().await.map_err(|error| Stop::Abort(error.to_string()))?;
        loop {
            let fence = FenceCall { attempt: self.attempt(), after: after.clone() };
            let reason = match parts.ask(&self.asked(), Some(fence)).await {
                Ok(ShardsAnswer::Fenced(fenced)) => {
                    let stored: Vec<String> = fenced.stored.iter().map(|(_, at)| at.to_string()).collect();
                    self.end_step(
                        step,
                        format!("stored up to {}, written {}", stored.join(", "), fenced.written),
                    );
                    return Ok(fenced);
                }
                Ok(ShardsAnswer::Refused(reason)) => return Err(Stop::Abort(reason)),
                Ok(ShardsAnswer::Standing(_)) => "an answer to another question".to_owned(),
                // The same again is the same, whether this one happened or not.
                Err(reason) => reason,
            };
            if Instant::now() >= deadline {
                return Err(Stop::Abort(format!("center {} did not let go: {reason}", self.shift.from)));
            }
            if self.shared.token.is_cancelled() {
                return Err(Stop::Ending);
            }
            tokio::time::sleep(DRAIN_POLL).await;
        }
    }

    fn attempt(&self) -> i64 {
        i64::try_from(self.shift.epoch.0).unwrap_or(i64::MAX)
    }

    async fn decide_shards(&mut self, until: Option<Instant>) -> Result<(), Stop> {
        self.begin_step("hand_over");
        self.change(until, record::decide).await?;
        self.shift.phase = ShiftPhase::Decided;
        self.passes("decided")
    }

    /// Goes on with a shift of shards whose coordinator died.
    pub(super) async fn recover_shards(&mut self) -> Result<(), Stop> {
        match self.shift.phase {
            ShiftPhase::Begun => Err(Stop::Abort("its coordinator died".to_owned())),
            ShiftPhase::Decided => self.move_on().await,
        }
    }

    /// From the decision to the end: only forward.
    pub(super) async fn move_on(&mut self) -> Result<(), Stop> {
        let name = "hand_over";
        let begun = self.shift.steps.iter().rposition(|step| step.name == name);
        let step = begun.unwrap_or_else(|| self.begin_step(name));
        let here = self.shift.to == self.shared.options.center;
        if here {
            self.take_shards().await?;
        }
        let who = &self.shift.to;
        let said = if here { "took them" } else { "takes them by itself" };
        let detail = format!("the topology gives them to center {who}, whose database {said}");
        self.end_step(step, detail);
        self.passes("handed_over")?;
        // A coordinator before has done it if the record shows it.
        if self.shift.steps.iter().all(|step| step.name != "unblock") {
            let step = self.begin_step("unblock");
            self.change(None, record::unblock).await?;
            let blocked = self.since.elapsed().as_millis();
            self.end_step(step, format!("orders of these shards stood still for {blocked} ms"));
        }
        self.passes("unblocked")?;
        let step = self.begin_step("verify");
        let checks = self.compare_shards().await;
        let fits = passed(&checks);
        let seen_there =
            checks.iter().any(|check| check.name == TARGET_OWNER && check.verdict == CheckVerdict::Ok);
        self.finish_step(step, if fits { StepState::Done } else { StepState::Failed }, None, checks);
        let (count, to) = (self.shift.shards.len(), &self.shift.to);
        let lossy = self.shift.exposure.as_ref().filter(|exposure| !exposure.lossless);
        self.shift.message = Some(match (fits, lossy) {
            (false, _) => format!(
                "center {to} has {count} shards; something is not as it should be, see the failed checks of `verify`"
            ),
            (true, Some(exposure)) => format!(
                "center {to} has {count} shards; accepted loss: {}. Before center {}'s database comes back, read \
                 docs/two-centers.md, \"When the center comes back\"",
                exposure.reason, self.shift.from
            ),
            (true, None) if seen_there => format!("center {to} has {count} shards"),
            (true, None) => format!(
                "center {to} has {count} shards; its database takes them as soon as a service of center {to} runs"
            ),
        });
        self.shift.state = if fits { ShiftState::Done } else { ShiftState::Failed };
        self.shift.ended_at = Some(super::record::now());
        self.change(None, record::conclude).await?;
        self.passes("concluded")?;
        self.shared.show(&self.shift);
        Ok(())
    }

    /// This center's database takes them. Asked until it has.
    async fn take_shards(&mut self) -> Result<(), Stop> {
        let parts = self.parts()?;
        loop {
            let owners = Owners::of(&self.shared.topology.current()).decided();
            let error = match follow_owners(&parts.orders, &owners).await {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            tracing::warn!(id = self.shift.id, %error, "the database has not taken the shards yet");
            if self.shared.token.run_until_cancelled(tokio::time::sleep(STORE_RETRY)).await.is_none() {
                return Err(Stop::Ending);
            }
        }
    }

    /// Both databases say whose they are. Whoever took the shift over may be in the center that gave.
    async fn compare_shards(&mut self) -> Vec<crate::topology::Check> {
        let mut checks = Checks(Vec::new());
        let Ok(parts) = self.parts() else { return checks.0 };
        let crate::topology::Shift { from, to, shards, mode, .. } = &self.shift;
        let own = &self.shared.options.center;
        let ((own_name, other_name), other) = match own {
            own if own == to => ((TARGET_OWNER, SOURCE_OWNER), from),
            own if own == from => ((SOURCE_OWNER, TARGET_OWNER), to),
            _ => return checks.0,
        };
        let here = own == to;
        let count = |rows: &[crate::orders::ShardRow]| {
            let theirs = |shard| rows.iter().any(|row| row.shard == shard && row.owner == to.as_str());
            shards.iter().filter(|shard| theirs(**shard)).count()
        };
        let all = shards.len();
        // This center's database has taken them by now. One that did not yet hear who has them hurts nobody: it has let
        // go of them, or takes them before anybody writes there.
        let otherwise = if here { CheckVerdict::Failed } else { CheckVerdict::Warning };
        let (value, fits) = match parts.orders.shard_rows().await {
            Ok(rows) => (format!("{} of {all}", count(&rows)), count(&rows) == all),
            Err(error) => (error.to_string(), false),
        };
        checks.add(own_name, value, format!("{all}"), if fits { CheckVerdict::Ok } else { otherwise });
        if here && *mode == ShiftMode::Forced {
            return checks.0;
        }
        let until = Instant::now() + parts.known_within();
        let (value, known) = loop {
            let (value, known) = match parts.standing(&Ask { from: other, to, shards }).await {
                Ok(standing) => {
                    let known = count(&standing.rows);
                    (format!("{known} of {all}"), known == all)
                }
                Err(reason) => (format!("no answer: {reason}"), false),
            };
            if known || Instant::now() >= until || self.shared.token.is_cancelled() {
                break (value, known);
            }
            tokio::time::sleep(KNOWN_POLL).await;
        };
        let known = if known { CheckVerdict::Ok } else { CheckVerdict::Warning };
        checks.add(other_name, value, format!("{all}"), known);
        checks.0
    }
}
