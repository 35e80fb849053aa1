//! Units of cancelled and expired orders, on their way back to the ledger.
//!
//! The record is written with the order's change and forgotten only behind the barrier (K4). While the other center
//! is given up, records are kept and sent again in the next epoch, to a ledger that may have lost them. The ledger
//! gives an order's units back once, whatever is sent how often; so a worker that dies between any two of these
//! steps loses nothing and doubles nothing.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use seckill_domain::{CenterId, Epoch, OrderId, SaleId};
use seckill_ledger::{ReleaseEntry, ReleaseOutcome, release, roles};
use tokio_util::sync::CancellationToken;

use super::error::Error;
use super::model::Release;
use super::store::OrderStore;
use super::workers::{Link, Streak, WorkerOptions, pause, sleep};
use crate::cross_center::{CrossCenter, calls};

/// Records looked at in one round.
const ROUND: u32 = 2048;
/// Orders in one call: purchases wait for the ledger meanwhile, some 0.3 ms.
const CALL: usize = 256;
/// How long the master center may take for one call.
const REMOTE_TIMEOUT: Duration = Duration::from_secs(5);
/// Sales that may fail in one round before the others are given up too.
const MAX_TROUBLED: usize = 16;

/// Releases that were sent while degraded and are kept. What comes on top waits for the next epoch unsent.
const MAX_KEPT: usize = 16_384;

/// What was sent in a degraded epoch.
#[derive(Debug, Default)]
pub(super) struct Kept {
    epoch: Option<Epoch>,
    orders: HashSet<OrderId>,
}

/// What a worker carries from round to round.
#[derive(Default)]
pub(super) struct Lines {
    conns: Vec<Option<Connection>>,
    kept: Kept,
}

/// A connection, and the run of the server that it leads to.
type Connection = (MultiplexedConnection, Arc<str>);

/// Delivers releases.
pub(super) struct Releases {
    store: OrderStore,
    links: Vec<Link>,
    interval: Duration,
}

/// Why a round ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Store(#[from] Error),
    #[error("releases of {sales} sales failed, the first: {error}")]
    Ledger { sales: usize, error: seckill_ledger::Error },
}

impl Releases {
    pub(super) fn new(store: OrderStore, links: Vec<Link>, options: &WorkerOptions) -> Releases {
        Releases { store, links, interval: Duration::from_millis(options.release_interval_ms.max(10)) }
    }

    pub(super) async fn run(&self, token: CancellationToken) {
        let mut streak = Streak::default();
        let mut lines = Lines::default();
        while sleep(self.interval, &token).await {
            match self.round(&mut lines, &token).await {
                Ok(()) => streak.succeeded("releases"),
                Err(Failure::Store(Error::Closed)) => return,
                Err(failure) => {
                    self.store.metrics().retries.inc();
                    streak.failed("releases", &failure);
                    if !pause(&token).await {
                        return;
                    }
                }
            }
        }
    }

    /// Delivers everything that waits now, oldest first.
    pub(super) async fn round(&self, lines: &mut Lines, token: &CancellationToken) -> Result<(), Failure> {
        lines.conns.resize_with(self.links.len(), || None);
        let kept = self.kept(&mut lines.kept);
        if kept >= MAX_KEPT || (kept > 0 && self.store.pending_release_count().await? <= kept as i64) {
            return Ok(());
        }
        let mut troubled: Vec<SaleId> = Vec::new();
        let mut first_error = None;
        while !token.is_cancelled() && troubled.len() < MAX_TROUBLED {
            let kept = u32::try_from(lines.kept.orders.len()).unwrap_or(u32::MAX);
            let mut waiting = self.store.pending_releases(ROUND + kept, &troubled).await?;
            let up_to = waiting.iter().map(|release| release.place).max().unwrap_or(0);
            waiting.retain(|release| !lines.kept.orders.contains(&release.order_id));
            if waiting.is_empty() {
                break;
            }
            for ((partition, sale_id), orders) in by_sale(waiting) {
                for call in orders.chunks(CALL) {
                    if let Err(failure) = self.deliver(lines, up_to, (partition, &sale_id), call).await? {
                        first_error.get_or_insert(failure);
                        troubled.push(sale_id.clone());
                        break;
                    }
                }
            }
        }
        self.store.metrics().releases_pending.set(self.store.pending_release_count().await?);
        match first_error {
            None => Ok(()),
            Some(error) => Err(Failure::Ledger { sales: troubled.len(), error }),
        }
    }

    /// How many records are kept because they were sent in this, degraded, epoch. Those of an earlier one are sent
    /// again.
    fn kept(&self, kept: &mut Kept) -> usize {
        let now = self.links.first().and_then(Link::epoch);
        if now.is_some_and(|epoch| Some(epoch) != kept.epoch) {
            kept.orders.clear();
        }
        kept.orders.len()
    }

    /// One call, and what it means for its records. The inner error is the ledger's: the records stay.
    async fn deliver(
        &self,
        lines: &mut Lines,
        up_to: i64,
        (partition, sale_id): (u8, &SaleId),
        orders: &[ReleaseEntry],
    ) -> Result<Result<(), seckill_ledger::Error>, Failure> {
        let place = usize::from(partition);
        let outcomes = match (self.links.get(place), lines.conns.get_mut(place)) {
            (Some(link), Some(conn)) => send(link, conn, sale_id, orders).await,
            _ => Err(seckill_ledger::Error::Rejected(format!("partition {partition} is not configured"))),
        };
        let (outcomes, kept_at) = match outcomes {
            Ok(answered) => answered,
            Err(error) => return Ok(Err(error)),
        };
        let (mut done, mut unknown) = (Vec::new(), Vec::new());
        for (entry, outcome) in orders.iter().zip(outcomes) {
            match outcome {
                ReleaseOutcome::Released | ReleaseOutcome::AlreadyReleased => done.push(entry.order_id),
                ReleaseOutcome::Unknown => {
                    tracing::error!(order_id = %entry.order_id, %sale_id,
                        "the ledger holds no claim of a closed order; kept aside for the audit");
                    unknown.push(entry.order_id);
                }
            }
        }
        if kept_at.is_some() {
            lines.kept.epoch = kept_at;
            lines.kept.orders.extend(done.drain(..));
        }
        self.store.releases_answered(up_to, done, unknown).await?;
        Ok(Ok(()))
    }
}

/// Sends one call on the partition's connection, which is made when it is missing and dropped when it failed; or to
/// the master center, where that is another one. Says at which epoch, if the master was degraded.
async fn send(
    link: &Link,
    slot: &mut Option<Connection>,
    sale_id: &SaleId,
    orders: &[ReleaseEntry],
) -> Result<(Vec<ReleaseOutcome>, Option<Epoch>), seckill_ledger::Error> {
    if let Some(cross) = &link.cross
        && let Some(master) = cross.other_master()
    {
        return send_on(cross, &master, sale_id, orders).await;
    }
    let grant =
        link.authority.grant().map_err(|refusal| seckill_ledger::Error::Rejected(refusal.to_string()))?;
    let admitted = grant.run_id(link.partition);
    let (mut conn, run_id) = match slot.take() {
        Some(conn) if admitted.is_none_or(|admitted| *admitted == *conn.1) => conn,
        Some(_) | None => {
            let mut conn = link.connect().await?;
            let run_id = Arc::from(roles::standing(&mut conn).await?.run_id);
            (conn, run_id)
        }
    };
    if admitted.is_some_and(|admitted| *admitted != *run_id) {
        return Err(seckill_ledger::Error::Rejected("this run of the server was not admitted".to_owned()));
    }
    let outcomes = release(&mut conn, &grant.fence, sale_id, orders).await?;
    // Not confirmed means kept: the ledger gives the units back once, however often it is asked.
    link.barrier
        .confirm(&grant, &run_id)
        .await
        .map_err(|unconfirmed| seckill_ledger::Error::Rejected(unconfirmed.to_string()))?;
    *slot = Some((conn, run_id));
    let kept_at = grant.degraded.then_some(grant.fence.epoch);
    Ok((outcomes, kept_at))
}

/// Has the master center release the orders.
async fn send_on(
    cross: &CrossCenter,
    master: &CenterId,
    sale_id: &SaleId,
    orders: &[ReleaseEntry],
) -> Result<(Vec<ReleaseOutcome>, Option<Epoch>), seckill_ledger::Error> {
    let pairs = orders.iter().map(|entry| (entry.order_id, entry.uid.clone())).collect();
    let call = calls::ReleaseCall { sale_id: sale_id.clone(), orders: pairs };
    // Whether it happened or not: the records stay, and are sent again under the same order ids.
    let answer: calls::ReleaseAnswer = cross
        .call(master, calls::RELEASE, &call, REMOTE_TIMEOUT)
        .await
        .map_err(|error| seckill_ledger::Error::Rejected(error.to_string()))?;
    if answer.outcomes.len() != orders.len() {
        let text = "the master center answered for another number of orders";
        return Err(seckill_ledger::Error::Malformed(text.to_owned()));
    }
    let kept_at = answer.kept_at.map(Epoch);
    let outcomes = answer
        .outcomes
        .into_iter()
        .map(|outcome| match outcome {
            calls::ReleaseOutcome::Released => ReleaseOutcome::Released,
            calls::ReleaseOutcome::AlreadyReleased => ReleaseOutcome::AlreadyReleased,
            calls::ReleaseOutcome::Unknown => ReleaseOutcome::Unknown,
        })
        .collect();
    Ok((outcomes, kept_at))
}

/// Orders by partition and sale: one call each, or a few.
fn by_sale(waiting: Vec<Release>) -> BTreeMap<(u8, SaleId), Vec<ReleaseEntry>> {
    let mut sales: BTreeMap<(u8, SaleId), Vec<ReleaseEntry>> = BTreeMap::new();
    for release in waiting {
        sales
            .entry((release.order_id.partition(), release.sale_id))
            .or_default()
            .push(ReleaseEntry { order_id: release.order_id, uid: release.uid });
    }
    sales
}
