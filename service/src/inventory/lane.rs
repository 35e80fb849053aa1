//! Lanes: each takes whatever is waiting, has it decided in one call for each sale, and answers all.
//!
//! There is no timer: at low load a batch is one purchase and waits for nothing; under load the purchases that
//! arrive during a call, or are about to, share the next one. Who decides is the [`super::route`]'s business. An
//! attempt that needs nothing more of the lane (it waits for another center) goes on beside the next batches.
//!
//! | verdict of an attempt | what the lane does |
//! | --- | --- |
//! | accepted, refused | answers |
//! | not executed | holds the purchase and has it attempted again until its deadline passes, then says why |
//! | unknown | the same, under the same key; past the deadline answers "unknown" |

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use seckill_domain::{CenterId, CenterNumber, OrderId};
use seckill_ledger::{Executed, MAX_BATCH, ReserveEntry};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::error::PurchaseError;
use super::metrics::InventoryMetrics;
use super::route::{Attempt, Route, Verdict};
use super::{Accepted, Purchase};
use crate::config::InventoryConfig;
use crate::tasks::essential;
use crate::topology::TopologyHandle;

/// Pause before purchases that could not be decided are attempted again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Passes of the scheduler that a batch may wait for more purchases at most; one takes some 10 µs under load.
const GATHER_PASSES: usize = 32;

/// How long a batch waits for more purchases where the acknowledgement takes a round trip between centers in any
/// case, and how many are enough: at 20,000/s it halves what a purchase costs Redis.
const SHORT_WAIT: Duration = Duration::from_millis(2);
const FULL_ENOUGH: usize = 128;

/// Attempts of one lane that may go on beside it. Full batches every millisecond over 100 ms between centers are
/// a hundred; smaller batches than that grow while they wait for a place.
const MAX_PENDING: usize = 128;

/// A purchase in a lane.
struct Waiting {
    purchase: Purchase,
    home: Home,
    deadline: Instant,
    /// Why it is held.
    held: Option<PurchaseError>,
    /// Set once an attempt may have been accepted without our hearing of it.
    doubt: Option<PurchaseError>,
    answer: oneshot::Sender<Result<Accepted, PurchaseError>>,
}

impl Waiting {
    /// What a decider needs of it.
    fn entry(&self) -> ReserveEntry {
        ReserveEntry {
            uid: self.purchase.uid.clone(),
            key: self.purchase.key,
            quantity: self.purchase.quantity,
            center: self.home.number,
            traceparent: self.purchase.traceparent.clone(),
        }
    }

    fn accept(self, order_id: OrderId, replayed: bool) {
        let home_center = self.home.center.clone();
        self.settle(Ok(Accepted { order_id, replayed, home_center }));
    }

    /// Answers that it was not accepted, or, where an attempt may have been, that nobody knows.
    fn refuse(mut self, error: PurchaseError) {
        let error = self.doubt.take().unwrap_or(error);
        self.settle(Err(error));
    }

    /// The client may be gone; then the ledger is what remembers.
    fn settle(self, answer: Result<Accepted, PurchaseError>) {
        let _ = self.answer.send(answer);
    }
}

/// Where the buyer is at home.
#[derive(Clone)]
pub(super) struct Home {
    pub(super) center: CenterId,
    pub(super) number: CenterNumber,
}

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
        let queues = (0..config.lanes.max(1))
            .map(|_| {
                let (sender, queue) = mpsc::channel(config.queue_len);
                let lane = Lane {
                    route: route(),
                    metrics: Arc::clone(metrics),
                    max_batch: config.max_batch.clamp(1, MAX_BATCH),
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
        let outcome = self.put(purchase, home, Instant::now() + self.deadline)?;
        // A lane answers everything that it took. If it dies all the same, nobody knows what it had sent.
        outcome.await.unwrap_or(Err(PurchaseError::MasterUnreachable { executed: Executed::Unknown }))
    }

    /// Puts a purchase into its user's lane; the answer comes by itself, at the latest when the deadline has
    /// passed.
    pub(super) fn put(
        &self,
        purchase: Purchase,
        home: Home,
        deadline: Instant,
    ) -> Result<oneshot::Receiver<Result<Accepted, PurchaseError>>, PurchaseError> {
        let (answer, outcome) = oneshot::channel();
        let lane = self.lane_of(&purchase);
        let waiting = Waiting { purchase, home, deadline, held: None, doubt: None, answer };
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
    /// Attempts that go on beside the lane. Each gives back what has to be attempted again.
    pending: JoinSet<Vec<Waiting>>,
}

impl Lane {
    /// Serves the queue until every sender is gone, or `stop` was called and what waits has been answered.
    async fn run(mut self, mut queue: mpsc::Receiver<Waiting>, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(self.max_batch);
        let (mut stopping, mut drained) = (false, false);
        loop {
            if drained && self.pending.is_empty() {
                return;
            }
            tokio::select! {
                biased;
                Some(ended) = self.pending.join_next() => match ended {
                    Ok(undecided) => batch = undecided,
                    // Nobody aborts attempts: it is a panic, and a lane does not outlive those of its parts.
                    Err(error) => std::panic::resume_unwind(error.into_panic()),
                },
                taken = queue.recv_many(&mut batch, self.max_batch),
                    if !drained && self.pending.len() < MAX_PENDING => drained = taken == 0,
                () = stop.cancelled(), if !stopping => {
                    stopping = true;
                    queue.close();
                }
            }
            if batch.is_empty() {
                continue;
            }
            self.gather(&mut queue, &mut batch).await;
            self.metrics.waiting.set(i64::try_from(queue.len()).unwrap_or(i64::MAX));
            if is_one_sale(&batch) {
                self.decide(&mut batch).await;
            } else {
                for mut sale in by_sale(batch.drain(..)) {
                    self.decide(&mut sale).await;
                }
            }
        }
    }

    /// Lets every other task that could run go first, and takes the purchases that they bring, until a pass
    /// brings none. There is nothing to wait for on an idle service, and on a busy one the call that is shared
    /// by more costs each of them less.
    async fn gather(&self, queue: &mut mpsc::Receiver<Waiting>, batch: &mut Vec<Waiting>) {
        for _ in 0..GATHER_PASSES {
            if batch.len() >= self.max_batch {
                return;
            }
            tokio::task::yield_now().await;
            if queue.is_empty() {
                break;
            }
            queue.recv_many(batch, self.max_batch - batch.len()).await;
        }
        if batch.len() < FULL_ENOUGH && self.route.pays_round_trip() {
            let until = Instant::now() + SHORT_WAIT;
            let more = async {
                // A closed queue brings no more.
                while batch.len() < FULL_ENOUGH
                    && queue.recv_many(batch, self.max_batch - batch.len()).await > 0
                {}
            };
            // What `recv_many` took is in the batch, whenever it is dropped.
            let _ = tokio::time::timeout_at(until, more).await;
        }
    }

    /// Has purchases of one sale decided. What goes on by itself, or has to be attempted again, comes back as a
    /// batch that was pending: the lane goes on meanwhile, because others need not wait for the same reason.
    async fn decide(&mut self, batch: &mut Vec<Waiting>) {
        self.drop_late(batch);
        let Some(first) = batch.first() else { return };
        let sale = first.purchase.sale_id.clone();
        let deadline = batch.iter().map(|waiting| waiting.deadline).max().unwrap_or(first.deadline);
        let entries = batch.iter().map(Waiting::entry).collect();
        match self.route.attempt(&sale, entries, deadline).await {
            Attempt::Done(verdicts) => {
                answer(batch, verdicts);
                if !batch.is_empty() {
                    let mut held = std::mem::take(batch);
                    self.pending.spawn(async move {
                        hold(&mut held).await;
                        held
                    });
                }
            }
            Attempt::Pending { rest, late } => {
                self.pending.spawn(see_through(std::mem::take(batch), rest, late));
            }
        }
    }

    /// Turns away what waited past its deadline before it was sent, or so near to it that an answer would come too
    /// late: that would only make an outcome unknown that is known. What may have been sent is unknown instead.
    fn drop_late(&self, batch: &mut Vec<Waiting>) {
        let until = Instant::now() + self.route.least();
        if batch.iter().all(|waiting| waiting.deadline > until) {
            return;
        }
        let (late, on_time): (Vec<Waiting>, _) =
            batch.drain(..).partition(|waiting| waiting.deadline <= until);
        *batch = on_time;
        for waiting in late {
            let why = waiting.held.clone().unwrap_or_else(|| {
                self.metrics.overloaded.inc();
                PurchaseError::Overloaded
            });
            waiting.refuse(why);
        }
    }
}

/// Waits for the end of an attempt. Whatever reaches its deadline before is answered then: it was sent, so
/// nobody knows. Gives back what has to be attempted again.
async fn see_through(
    mut batch: Vec<Waiting>,
    mut rest: BoxFuture<'static, Vec<Verdict>>,
    late: PurchaseError,
) -> Vec<Waiting> {
    let deadline = batch.iter().map(|waiting| waiting.deadline).max().unwrap_or_else(Instant::now);
    match tokio::time::timeout_at(deadline, &mut rest).await {
        Ok(verdicts) => {
            answer(&mut batch, verdicts);
            if !batch.is_empty() {
                hold(&mut batch).await;
            }
            batch
        }
        Err(_) => {
            batch.into_iter().for_each(|waiting| waiting.refuse(late.clone()));
            Vec::new()
        }
    }
}

/// Answers what was decided; the others stay, with what they are answered should their deadline pass.
fn answer(batch: &mut Vec<Waiting>, verdicts: Vec<Verdict>) {
    debug_assert_eq!(batch.len(), verdicts.len(), "a verdict for each purchase");
    let mut undecided = Vec::new();
    for (mut waiting, verdict) in batch.drain(..).zip(verdicts) {
        match verdict {
            Verdict::Accepted(order_id) => waiting.accept(order_id, false),
            // An attempt of ours whose reply was lost is no replay to the client.
            Verdict::Replay(order_id) => {
                let replayed = waiting.doubt.is_none();
                waiting.accept(order_id, replayed);
            }
            Verdict::Refused(error) => waiting.settle(Err(error)),
            Verdict::GivenUp(error) => waiting.refuse(error),
            Verdict::NotExecuted(error) => {
                waiting.held = Some(error);
                undecided.push(waiting);
            }
            Verdict::Unknown(error) => {
                waiting.doubt = Some(error);
                undecided.push(waiting);
            }
        }
    }
    *batch = undecided;
}

/// Keeps purchases that cannot be decided now until something may have changed. Those whose deadline passes
/// meanwhile hear why.
async fn hold(batch: &mut Vec<Waiting>) {
    tokio::time::sleep(RETRY_PAUSE).await;
    let now = Instant::now();
    for waiting in batch.extract_if(.., |waiting| waiting.deadline <= now) {
        let why = waiting.held.clone().unwrap_or(PurchaseError::Overloaded);
        waiting.refuse(why);
    }
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
