//! Lanes: each takes whatever is waiting, makes one call of the ledger for it, and answers all.
//!
//! There is no timer: at low load a batch is one purchase and waits for nothing; under load the purchases that
//! arrive during a call, or are about to, share the next one. A lane has one call at a time under way and owns its connection.
//!
//! What a call's failure means decides what happens next:
//!
//! | failure | what happened | what the lane does |
//! | --- | --- | --- |
//! | refused by the fence, replica, loading, connection refused | nothing | holds the purchases and tries again until their deadlines pass |
//! | no authority until somebody does something | nothing | answers at once |
//! | timeout, connection lost | unknown | sends the same entries again under the same keys on a new connection; past the deadline answers "unknown" |
//! | memory bound | nothing | answers `ledger_full` |

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use seckill_domain::{CenterId, CenterNumber, SaleId};
use seckill_ledger::{
    Error, Executed, Fence, MAX_BATCH, ReserveEntry, ReserveOutcome, ReserveReply, reserve,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::Target;
use super::error::PurchaseError;
use super::metrics::InventoryMetrics;
use super::sold_out::SoldOut;
use super::{Accepted, PARTITION, Purchase};
use crate::config::InventoryConfig;
use crate::tasks::essential;
use crate::topology::{Authority, TopologyHandle};

/// Pause before a lane that could not reach the ledger, or may not write, tries again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Passes of the scheduler that a batch may wait for more purchases at most; one takes some 10 µs under load.
const GATHER_PASSES: usize = 32;

/// A purchase in a lane.
struct Waiting {
    purchase: Purchase,
    home: Home,
    deadline: Instant,
    /// Whether an attempt may have been accepted without our hearing of it.
    in_doubt: bool,
    answer: oneshot::Sender<Result<Accepted, PurchaseError>>,
}

impl Waiting {
    /// Answers that it was not accepted, or, where an attempt may have been, that nobody knows. The client may
    /// be gone; then the ledger is what remembers.
    fn refuse(self, error: &PurchaseError) {
        let error = match self.in_doubt {
            true => PurchaseError::MasterUnreachable { executed: Executed::Unknown },
            false => error.clone(),
        };
        let _ = self.answer.send(Err(error));
    }
}

/// Where the buyer is at home.
#[derive(Clone)]
struct Home {
    center: CenterId,
    number: CenterNumber,
}

/// All lanes of this service.
pub(super) struct Lanes {
    queues: Box<[mpsc::Sender<Waiting>]>,
    topology: TopologyHandle,
    deadline: Duration,
    metrics: Arc<InventoryMetrics>,
}

impl Lanes {
    #[expect(clippy::too_many_arguments, reason = "the parts of the inventory, put together in one place")]
    pub(super) fn start(
        target: &Target,
        config: &InventoryConfig,
        authority: &Authority,
        topology: &TopologyHandle,
        sold_out: &Arc<SoldOut>,
        metrics: &Arc<InventoryMetrics>,
        tracker: &TaskTracker,
        (stop, fatal): (&CancellationToken, &CancellationToken),
    ) -> Lanes {
        let queues = (0..config.lanes.max(1))
            .map(|_| {
                let (sender, queue) = mpsc::channel(config.queue_len);
                let lane = Lane {
                    target: target.clone(),
                    conn: None,
                    authority: authority.clone(),
                    sold_out: Arc::clone(sold_out),
                    metrics: Arc::clone(metrics),
                    max_batch: config.max_batch.clamp(1, MAX_BATCH),
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
        let (answer, outcome) = oneshot::channel();
        let lane = self.lane_of(&purchase);
        let waiting =
            Waiting { purchase, home, deadline: Instant::now() + self.deadline, in_doubt: false, answer };
        match lane.try_send(waiting) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.metrics.overloaded.inc();
                return Err(PurchaseError::Overloaded);
            }
            // The lane has ended: the service is shutting down and nothing was sent.
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(PurchaseError::Overloaded),
        }
        // A lane answers everything that it took. If it dies all the same, nobody knows what it had sent.
        outcome.await.unwrap_or(Err(PurchaseError::MasterUnreachable { executed: Executed::Unknown }))
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
    target: Target,
    conn: Option<MultiplexedConnection>,
    authority: Authority,
    sold_out: Arc<SoldOut>,
    metrics: Arc<InventoryMetrics>,
    max_batch: usize,
}

impl Lane {
    /// Serves the queue until every sender is gone, or `stop` was called and what waits has been answered.
    async fn run(mut self, mut queue: mpsc::Receiver<Waiting>, stop: CancellationToken) {
        let mut batch = Vec::with_capacity(self.max_batch);
        loop {
            let taken = tokio::select! {
                biased;
                taken = queue.recv_many(&mut batch, self.max_batch) => taken,
                () = stop.cancelled() => {
                    queue.close();
                    queue.recv_many(&mut batch, self.max_batch).await
                }
            };
            if taken == 0 {
                return;
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
                return;
            }
            queue.recv_many(batch, self.max_batch - batch.len()).await;
        }
    }

    /// Decides purchases of one sale, all of them: at the latest when their deadlines have passed.
    async fn decide(&mut self, batch: &mut Vec<Waiting>) {
        loop {
            self.drop_late(batch);
            let Some(first) = batch.first() else { return };
            let sale = first.purchase.sale_id.clone();
            let fence = match self.authority.grant() {
                Ok(grant) => grant.fence.clone(),
                Err(refusal) if refusal.cause.needs_somebody() => {
                    answer_all(batch, &PurchaseError::NoAuthority(refusal.reason));
                    return;
                }
                Err(refusal) => {
                    self.hold(batch, &PurchaseError::NoAuthority(refusal.reason)).await;
                    continue;
                }
            };
            match self.call(&fence, &sale, batch).await {
                Ok(reply) => return self.answer(&fence, &sale, batch, reply),
                Err(Error::Full) => {
                    answer_all(batch, &PurchaseError::LedgerFull);
                    return;
                }
                Err(error) => {
                    self.conn = None;
                    self.authority.suspect();
                    if error.executed() == Executed::Unknown {
                        self.metrics.unknown.inc();
                        batch.iter_mut().for_each(|waiting| waiting.in_doubt = true);
                    }
                    tracing::debug!(%error, %sale, entries = batch.len(), "a batch was not decided and is sent again");
                    let late = PurchaseError::MasterUnreachable { executed: error.executed() };
                    self.hold(batch, &late).await;
                }
            }
        }
    }

    async fn call(&mut self, fence: &Fence, sale: &SaleId, batch: &[Waiting]) -> Result<ReserveReply, Error> {
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => self.target.connect().await.map_err(not_sent)?,
        };
        let entries: Vec<ReserveEntry> = batch
            .iter()
            .map(|waiting| ReserveEntry {
                uid: waiting.purchase.uid.clone(),
                key: waiting.purchase.key,
                quantity: waiting.purchase.quantity,
                center: waiting.home.number,
                traceparent: waiting.purchase.traceparent.clone(),
            })
            .collect();
        self.metrics.batches.inc();
        self.metrics.batched.inc_by(entries.len() as u64);
        let reply = reserve(&mut conn, fence, PARTITION, sale, &entries).await?;
        self.conn = Some(conn);
        Ok(reply)
    }

    /// Answers a decided batch. The authority is asked again (A2): an acceptance under an authority that has
    /// ended meanwhile may not be the truth any more.
    fn answer(&self, fence: &Fence, sale: &SaleId, batch: &mut Vec<Waiting>, reply: ReserveReply) {
        let still = self.authority.grant().is_ok_and(|now| now.fence.epoch == fence.epoch);
        let mut sold_out = false;
        for (waiting, outcome) in batch.drain(..).zip(reply.outcomes) {
            sold_out |= outcome == ReserveOutcome::SoldOut;
            let answer = match outcome {
                ReserveOutcome::Accepted(_) | ReserveOutcome::Replay(_) if !still => {
                    Err(PurchaseError::MasterUnreachable { executed: Executed::Unknown })
                }
                ReserveOutcome::Accepted(order_id) => {
                    Ok(Accepted { order_id, replayed: false, home_center: waiting.home.center })
                }
                ReserveOutcome::Replay(order_id) => Ok(Accepted {
                    order_id,
                    // An attempt of ours whose reply was lost is no replay to the client.
                    replayed: !waiting.in_doubt,
                    home_center: waiting.home.center,
                }),
                ReserveOutcome::KeyReused => Err(PurchaseError::KeyReused),
                ReserveOutcome::NotFound => Err(PurchaseError::SaleNotFound),
                ReserveOutcome::Paused => Err(PurchaseError::Paused),
                ReserveOutcome::NotStarted { starts_at } => Err(PurchaseError::NotStarted {
                    starts_at,
                    retry_after_s: starts_at.since_ms(reply.now).div_ceil(1000).max(1),
                }),
                ReserveOutcome::Ended => Err(PurchaseError::Ended),
                ReserveOutcome::Limit => Err(PurchaseError::LimitExceeded),
                ReserveOutcome::SoldOut => Err(PurchaseError::SoldOut),
                ReserveOutcome::Insufficient { remaining } => {
                    Err(PurchaseError::InsufficientStock { remaining })
                }
            };
            // The client may be gone; the ledger knows.
            let _ = waiting.answer.send(answer);
        }
        if sold_out {
            self.sold_out.observe(sale, reply.mark);
        }
    }

    /// Turns away what waited past its deadline before it was sent. What may have been sent is unknown instead.
    fn drop_late(&self, batch: &mut Vec<Waiting>) {
        let now = Instant::now();
        if batch.iter().all(|waiting| waiting.deadline > now) {
            return;
        }
        let (late, on_time) = batch.drain(..).partition(|waiting| waiting.deadline <= now);
        *batch = on_time;
        let late: Vec<Waiting> = late;
        self.metrics.overloaded.inc_by(late.len() as u64);
        late.into_iter().for_each(|waiting| waiting.refuse(&PurchaseError::Overloaded));
    }

    /// Keeps purchases that cannot be decided now until something may have changed. Those whose deadline passes
    /// meanwhile hear why.
    async fn hold(&self, batch: &mut Vec<Waiting>, why: &PurchaseError) {
        tokio::time::sleep(RETRY_PAUSE).await;
        let now = Instant::now();
        let (late, on_time): (Vec<Waiting>, Vec<Waiting>) =
            batch.drain(..).partition(|waiting| waiting.deadline <= now);
        *batch = on_time;
        late.into_iter().for_each(|waiting| waiting.refuse(why));
    }
}

/// A connection that could not be opened carried nothing, whatever went wrong.
fn not_sent(error: Error) -> Error {
    match error.executed() {
        Executed::No => error,
        Executed::Unknown => Error::Rejected(error.to_string()),
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

fn answer_all(batch: &mut Vec<Waiting>, error: &PurchaseError) {
    batch.drain(..).for_each(|waiting| waiting.refuse(error));
}
