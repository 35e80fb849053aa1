//! Lanes: each takes whatever is waiting, has it decided in one call for each sale, and answers all.
//!
//! There is no timer: at low load a batch is one purchase and waits for nothing; under load the purchases that
//! arrive during a call, or are about to, share the next one. Who decides is the [`super::route`]'s business. An
//! attempt that needs nothing more of the lane (it waits for another center) goes on beside the next batches.
//!
//! | verdict of an attempt | what the lane does |
//! | --- | --- |
//! | accepted, refused | answers |
//! | not executed | has the purchase attempted again until its deadline passes, then says why |
//! | unknown | the same, under the same key; past the deadline answers "unknown" |
//!
//! While nothing may be attempted, because the master moves or the authority is on its way, purchases are kept
//! ([`super::held`]) and go out the moment that this changes: first in, first out, in full batches, to whoever is
//! the master then. What another center sent on is not held during a shift but goes back there.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use seckill_domain::Epoch;
use seckill_ledger::{Executed, MAX_BATCH};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::error::PurchaseError;
use super::held::{Bound, Held, Keeper};
use super::metrics::InventoryMetrics;
use super::route::{Attempt, Gate, Route, Verdict};
use super::waiting::{Batch, Home, Waiting};
use super::{Accepted, Purchase};
use crate::config::InventoryConfig;
use crate::tasks::essential;
use crate::topology::TopologyHandle;

/// Pause before purchases are attempted again whose attempt came to nothing though nothing is known to be in its
/// way: the server cannot be reached, or the other center has not heard of what this one knows.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// How often a lane that waits for a change looks by itself. A lease that ran out and was renewed before anybody
/// noticed is no change that is told.
const RECHECK: Duration = Duration::from_millis(100);

/// A call of this center's Redis that takes longer is no longer waited for blindly: purchases in the queue are taken
/// out meanwhile, so that each is answered by its deadline.
const SLOW: Duration = Duration::from_millis(250);

/// Passes of the scheduler that a batch may wait for more purchases at most; one takes some 10 µs under load.
const GATHER_PASSES: usize = 32;

/// How long a batch waits for more purchases where the acknowledgement takes a round trip between centers in any
/// case, and how many are enough: at 20,000/s it halves what a purchase costs Redis.
const SHORT_WAIT: Duration = Duration::from_millis(2);
const FULL_ENOUGH: usize = 128;

/// Attempts of one lane that may go on beside it. Full batches every millisecond over 100 ms between centers are
/// a hundred; smaller batches than that grow while they wait for a place.
const MAX_PENDING: usize = 128;

/// All lanes of this service.
pub(super) struct Lanes {
    queues: Box<[mpsc::Sender<Waiting>]>,
    topology: TopologyHandle,
    deadline: Duration,
    metrics: Arc<InventoryMetrics>,
}

impl Lanes {
    /// Starts the lanes, each with a route of its own.
    pub(super) fn start(
        config: &InventoryConfig,
        topology: &TopologyHandle,
        metrics: &Arc<InventoryMetrics>,
        mut route: impl FnMut() -> Route,
        tracker: &TaskTracker,
        (stop, fatal): (&CancellationToken, &CancellationToken),
    ) -> Lanes {
        let bound = Bound::new(Duration::from_millis(config.hold_ms), config.hold_max, metrics);
        let queues = (0..config.lanes.max(1))
            .map(|_| {
                let (sender, queue) = mpsc::channel(config.queue_len);
                let lane = Lane {
                    route: route(),
                    metrics: Arc::clone(metrics),
                    max_batch: config.max_batch.clamp(1, MAX_BATCH),
                    queue_len: config.queue_len,
                    held: Held::new(bound.clone()),
                    shifting: false,
                    next_turn: 0,
                    pending: JoinSet::new(),
                };
                essential("lane", tracker, fatal, lane.run(queue, stop.clone()));
                sender
            })
            .collect();
        Lanes {
            queues,
            topology: topology.clone(),
            deadline: Duration::from_millis(config.deadline_ms),
            metrics: Arc::clone(metrics),
        }
    }

    /// Puts a purchase into its user's lane and waits for the answer.
    pub(super) async fn purchase(&self, purchase: Purchase) -> Result<Accepted, PurchaseError> {
        let home = self.home_of(&purchase)?;
        let outcome = self.put(purchase, home, Instant::now() + self.deadline, None)?;
        // A lane answers everything that it took. If it dies all the same, nobody knows what it had sent.
        outcome.await.unwrap_or(Err(PurchaseError::MasterUnreachable { executed: Executed::Unknown }))
    }

    /// Puts a purchase into its user's lane; the answer comes by itself, at the latest when the deadline has
    /// passed. `sent_on` is the epoch of the center that it came to first, where that is another one.
    pub(super) fn put(
        &self,
        purchase: Purchase,
        home: Home,
        deadline: Instant,
        sent_on: Option<Epoch>,
    ) -> Result<oneshot::Receiver<Result<Accepted, PurchaseError>>, PurchaseError> {
        let lane = self.lane_of(&purchase);
        let (waiting, outcome) = Waiting::new(purchase, home, deadline, sent_on);
        match lane.try_send(waiting) {
            Ok(()) => Ok(outcome),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.metrics.overloaded.inc();
                Err(PurchaseError::Overloaded)
            }
            // The lane has ended: the service is shutting down and nothing was sent.
            Err(mpsc::error::TrySendError::Closed(_)) => Err(PurchaseError::Overloaded),
        }
    }

    /// How long a purchase may take.
    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// The purchases of one user share a lane, so that a double click meets itself in one batch.
    fn lane_of(&self, purchase: &Purchase) -> &mpsc::Sender<Waiting> {
        if self.queues.len() == 1 {
            return &self.queues[0];
        }
        let mut hasher = DefaultHasher::new();
        purchase.uid.hash(&mut hasher);
        &self.queues[(hasher.finish() % self.queues.len() as u64) as usize]
    }

    fn home_of(&self, purchase: &Purchase) -> Result<Home, PurchaseError> {
        let topology = self.topology.current();
        let id = topology.home_center(purchase.uid.table().shard());
        match topology.center(id) {
            Some(center) => Ok(Home { center: id.clone(), number: center.number }),
            None => Err(PurchaseError::NoAuthority(format!("the topology does not know center {id}").into())),
        }
    }
}

struct Lane {
    route: Route,
    metrics: Arc<InventoryMetrics>,
    max_batch: usize,
    queue_len: usize,
    held: Held,
    /// A shift was recorded, and nothing could be attempted since.
    shifting: bool,
    next_turn: u64,
    /// What goes on beside the lane.
    pending: JoinSet<Beside>,
}

/// What ended beside the lane.
enum Beside {
    /// An attempt; these are not decided.
    Attempt(Vec<Waiting>),
    /// The pause before these are attempted again.
    Pause(Vec<Waiting>),
}

/// What the lane may do now.
enum Now {
    Attempt,
    /// As many attempts are under way as may be.
    Full,
    Keep(Keeper),
}

impl Lane {
    /// Serves the queue until every sender is gone, or `stop` was called and what waits has been answered.
    async fn run(mut self, mut queue: mpsc::Receiver<Waiting>, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(self.max_batch);
        let (mut stopping, mut drained) = (false, false);
        loop {
            if drained && self.pending.is_empty() && self.held.is_empty() {
                return;
            }
            let now = self.look();
            let (may_attempt, takes_in) = match now {
                Now::Attempt => (true, true),
                Now::Full => (false, false),
                // A shift has a bound of its own; otherwise the lane holds no more than its queue does.
                Now::Keep(Keeper::Shift) => (false, true),
                Now::Keep(Keeper::Authority) => (false, self.held.len() < self.queue_len),
            };
            let keeps = matches!(now, Now::Keep(_));
            tokio::select! {
                biased;
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    queue.close();
                }
                Some(ended) = self.pending.join_next() => match ended {
                    Ok(Beside::Attempt(undecided)) => self.attempt_later(undecided),
                    Ok(Beside::Pause(waiting)) => self.keep(waiting),
                    // Nobody aborts them: it is a panic, and a lane does not outlive those of its parts.
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                at = until(self.held.next_expiry()), if !self.held.is_empty() => self.held.answer_late(at),
                () = std::future::ready(()), if may_attempt && !self.held.is_empty() => {
                    batch = self.held.take(self.max_batch);
                }
                taken = queue.recv_many(&mut batch, self.max_batch), if takes_in && !drained => {
                    drained = taken == 0;
                    number(&mut self.next_turn, &mut batch);
                }
                () = self.route.changed(), if keeps => {}
                () = tokio::time::sleep(RECHECK), if keeps => {}
            }
            if batch.is_empty() {
                continue;
            }
            if let Now::Keep(keeper) = now {
                self.take_in(batch.drain(..), keeper);
                continue;
            }
            self.gather(&mut queue, &mut batch).await;
            self.metrics.waiting.set(i64::try_from(queue.len()).unwrap_or(i64::MAX));
            if is_one_sale(&batch) {
                let sale = std::mem::replace(&mut batch, Vec::with_capacity(self.max_batch));
                self.decide(sale, &mut queue).await;
            } else {
                for sale in by_sale(batch.drain(..)) {
                    self.decide(sale, &mut queue).await;
                }
            }
        }
    }

    /// What may be done now. A shift that has begun holds what is kept already, too.
    fn look(&mut self) -> Now {
        let keeper = match self.route.gate() {
            Gate::Open => {
                self.shifting = false;
                return if self.pending.len() < MAX_PENDING { Now::Attempt } else { Now::Full };
            }
            Gate::Full => {
                self.shifting = false;
                return Now::Full;
            }
            Gate::Shifting => Keeper::Shift,
            // The new master is being admitted: for the buyers that is the same wait.
            Gate::Coming if self.shifting => Keeper::Shift,
            Gate::Coming | Gate::Closed => Keeper::Authority,
        };
        if keeper == Keeper::Shift && !std::mem::replace(&mut self.shifting, true) {
            self.held.shift_begins();
        }
        Now::Keep(keeper)
    }

    /// Keeps purchases that have just come.
    fn take_in(&mut self, waiting: impl Iterator<Item = Waiting>, keeper: Keeper) {
        let moving = self.route.is_shifting();
        let refusal = self.route.refusal();
        for mut waiting in waiting {
            waiting.why = waiting.why.or_else(|| refusal.clone());
            match waiting.sent_on {
                Some(_) if moving => waiting.refuse(PurchaseError::Shifting),
                Some(_) => self.held.take_in(waiting, Keeper::Authority),
                None => self.held.take_in(waiting, keeper),
            }
        }
    }

    /// Keeps purchases that were attempted before: they are next, in their turn.
    fn keep(&mut self, waiting: Vec<Waiting>) {
        let moving = self.route.is_shifting();
        let keeper = match self.look() {
            Now::Keep(keeper) => keeper,
            Now::Attempt | Now::Full => Keeper::Authority,
        };
        for waiting in waiting {
            match waiting.sent_on {
                Some(_) if moving => waiting.refuse(PurchaseError::Shifting),
                Some(_) => self.held.keep(waiting, Keeper::Authority),
                None => self.held.keep(waiting, keeper),
            }
        }
    }

    /// An attempt came to nothing. What is in its way will be told, or is waited for a little.
    fn attempt_later(&mut self, undecided: Vec<Waiting>) {
        if undecided.is_empty() {
            return;
        }
        match self.look() {
            Now::Keep(_) => self.keep(undecided),
            Now::Attempt | Now::Full => {
                let mut changes = self.route.changes();
                self.pending.spawn(async move {
                    let _ = tokio::time::timeout(RETRY_PAUSE, changes.next()).await;
                    Beside::Pause(undecided)
                });
            }
        }
    }

    /// Lets every other task that could run go first, and takes the purchases that they bring, until a pass
    /// brings none. There is nothing to wait for on an idle service, and on a busy one the call that is shared
    /// by more costs each of them less.
    async fn gather(&mut self, queue: &mut mpsc::Receiver<Waiting>, batch: &mut Vec<Waiting>) {
        let before = batch.len();
        for _ in 0..GATHER_PASSES {
            if batch.len() >= self.max_batch {
                break;
            }
            tokio::task::yield_now().await;
            if queue.is_empty() {
                break;
            }
            queue.recv_many(batch, self.max_batch - batch.len()).await;
        }
        if batch.len() < FULL_ENOUGH.min(self.max_batch) && self.route.pays_round_trip() {
            let until = Instant::now() + SHORT_WAIT;
            let more = async {
                // A closed queue brings no more.
                while batch.len() < FULL_ENOUGH.min(self.max_batch)
                    && queue.recv_many(batch, self.max_batch - batch.len()).await > 0
                {}
            };
            // What `recv_many` took is in the batch, whenever it is dropped.
            let _ = tokio::time::timeout_at(until, more).await;
        }
        number(&mut self.next_turn, &mut batch[before..]);
    }

    /// Has purchases of one sale decided. What goes on by itself, or has to be attempted again, comes back from
    /// beside the lane, which goes on meanwhile, because others need not wait for the same reason.
    async fn decide(&mut self, mut waiting: Vec<Waiting>, queue: &mut mpsc::Receiver<Waiting>) {
        self.send_back(&mut waiting);
        self.drop_late(&mut waiting);
        let Some(sale) = waiting.first().map(|first| first.purchase.sale_id.clone()) else { return };
        let Some(mut batch) = Batch::new(waiting) else { return };
        // Whoever was the master when this began decides nothing any more once another one is.
        let mut moved = Box::pin(self.route.moved());
        let attempt = {
            let Lane { route, held, next_turn, queue_len, max_batch, .. } = self;
            let mut attempt = pin!(route.attempt(&sale, batch.entries(), batch.latest()));
            let slow_at = Instant::now() + SLOW;
            let (mut slow, mut ended, mut newcomers) = (false, false, Vec::new());
            loop {
                let look_at = if slow { None } else { Some(slow_at) };
                let next = held.next_expiry().into_iter().chain(batch.earliest()).chain(look_at).min();
                tokio::select! {
                    biased;
                    attempt = &mut attempt => break attempt,
                    () = &mut moved => break Attempt::all(Verdict::Unknown(unknown()), batch.len()),
                    at = until(next) => {
                        slow = slow || at >= slow_at;
                        batch.answer_late(at, &unknown());
                        held.answer_late(at);
                    }
                    taken = queue.recv_many(&mut newcomers, *max_batch),
                        if slow && !ended && held.len() < *queue_len =>
                    {
                        ended = taken == 0;
                        number(next_turn, &mut newcomers);
                        newcomers.drain(..).for_each(|waiting| held.take_in(waiting, Keeper::Authority));
                    }
                }
            }
        };
        match attempt {
            Attempt::Done(verdicts) => {
                let undecided = batch.answer(verdicts);
                self.attempt_later(undecided);
            }
            Attempt::Pending { rest, late } => {
                self.pending.spawn(see_through(batch, rest, late, moved));
            }
        }
    }

    /// What another center sent on for an epoch that has passed is its own to send to the master of this one.
    fn send_back(&self, batch: &mut Vec<Waiting>) {
        if batch.iter().all(|waiting| waiting.sent_on.is_none()) {
            return;
        }
        let epoch = self.route.epoch();
        for waiting in batch.extract_if(.., |waiting| waiting.sent_on.is_some_and(|at| at != epoch)) {
            waiting.refuse(PurchaseError::Shifting);
        }
    }

    /// Turns away what waited past its deadline before it was sent, or so near to it that an answer would come too
    /// late: that would only make an outcome unknown that is known. What may have been sent is unknown instead.
    fn drop_late(&self, batch: &mut Vec<Waiting>) {
        let until = Instant::now() + self.route.least();
        for waiting in batch.extract_if(.., |waiting| waiting.deadline <= until) {
            if waiting.why.is_none() {
                self.metrics.overloaded.inc();
            }
            waiting.give_up();
        }
    }
}

/// Gives each its turn.
fn number(next_turn: &mut u64, batch: &mut [Waiting]) {
    for waiting in batch {
        waiting.turn = *next_turn;
        *next_turn += 1;
    }
}

/// Sleeps until then and says when that was; for ever if there is no such time.
async fn until(at: Option<Instant>) -> Instant {
    match at {
        Some(at) => {
            tokio::time::sleep_until(at).await;
            Instant::now()
        }
        None => std::future::pending().await,
    }
}

/// Waits for the end of an attempt, or for another master, and answers those whose deadline comes before.
async fn see_through(
    mut batch: Batch,
    mut rest: BoxFuture<'static, Vec<Verdict>>,
    late: PurchaseError,
    mut moved: impl Future<Output = ()> + Unpin,
) -> Beside {
    while let Some(earliest) = batch.earliest() {
        tokio::select! {
            biased;
            verdicts = &mut rest => return Beside::Attempt(batch.answer(verdicts)),
            () = &mut moved => {
                let verdicts = vec![Verdict::Unknown(late); batch.len()];
                return Beside::Attempt(batch.answer(verdicts));
            }
            at = until(Some(earliest)) => batch.answer_late(at, &late),
        }
    }
    Beside::Attempt(Vec::new())
}

/// What became of an attempt whose end nobody saw.
fn unknown() -> PurchaseError {
    PurchaseError::MasterUnreachable { executed: Executed::Unknown }
}

fn is_one_sale(batch: &[Waiting]) -> bool {
    batch.windows(2).all(|pair| pair[0].purchase.sale_id == pair[1].purchase.sale_id)
}

fn by_sale(batch: impl Iterator<Item = Waiting>) -> Vec<Vec<Waiting>> {
    let mut index = HashMap::new();
    let mut sales: Vec<Vec<Waiting>> = Vec::new();
    for waiting in batch {
        let at = *index.entry(waiting.purchase.sale_id.clone()).or_insert(sales.len());
        if at == sales.len() {
            sales.push(Vec::new());
        }
        sales[at].push(waiting);
    }
    sales
}
