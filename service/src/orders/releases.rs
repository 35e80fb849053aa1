//! Units of cancelled and expired orders, on their way back to the ledger.
//!
//! The record is written with the order's change and forgotten only after the ledger answered (K4). The ledger
//! gives an order's units back once, whatever is sent how often; so a worker that dies between any two of these
//! steps loses nothing and doubles nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use seckill_domain::SaleId;
use seckill_ledger::{ReleaseEntry, ReleaseOutcome, release};
use tokio_util::sync::CancellationToken;

use super::error::Error;
use super::model::Release;
use super::store::OrderStore;
use super::workers::{Link, Streak, WorkerOptions, pause, sleep};

/// Records looked at in one round.
const ROUND: u32 = 2048;
/// Orders in one call: purchases wait for the ledger meanwhile, some 0.3 ms.
const CALL: usize = 256;
/// Sales that may fail in one round before the others are given up too.
const MAX_TROUBLED: usize = 16;

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
        let mut conns: Vec<Option<MultiplexedConnection>> = self.links.iter().map(|_| None).collect();
        while sleep(self.interval, &token).await {
            match self.round(&mut conns, &token).await {
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
    pub(super) async fn round(
        &self,
        conns: &mut [Option<MultiplexedConnection>],
        token: &CancellationToken,
    ) -> Result<(), Failure> {
        let mut troubled: Vec<SaleId> = Vec::new();
        let mut first_error = None;
        while !token.is_cancelled() && troubled.len() < MAX_TROUBLED {
            let waiting = self.store.pending_releases(ROUND, &troubled).await?;
            if waiting.is_empty() {
                break;
            }
            for ((partition, sale_id), orders) in by_sale(waiting) {
                for call in orders.chunks(CALL) {
                    if let Err(failure) = self.deliver(conns, partition, &sale_id, call).await? {
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

    /// One call, and what it means for its records. The inner error is the ledger's: the records stay.
    async fn deliver(
        &self,
        conns: &mut [Option<MultiplexedConnection>],
        partition: u8,
        sale_id: &SaleId,
        orders: &[ReleaseEntry],
    ) -> Result<Result<(), seckill_ledger::Error>, Failure> {
        let place = usize::from(partition);
        let outcomes = match (self.links.get(place), conns.get_mut(place)) {
            (Some(link), Some(conn)) => send(link, conn, sale_id, orders).await,
            _ => Err(seckill_ledger::Error::Rejected(format!("partition {partition} is not configured"))),
        };
        let outcomes = match outcomes {
            Ok(outcomes) => outcomes,
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
        self.store.releases_done(done, unknown).await?;
        Ok(Ok(()))
    }
}

/// Sends one call on the partition's connection, which is made when it is missing and dropped when it failed.
async fn send(
    link: &Link,
    slot: &mut Option<MultiplexedConnection>,
    sale_id: &SaleId,
    orders: &[ReleaseEntry],
) -> Result<Vec<ReleaseOutcome>, seckill_ledger::Error> {
    let grant =
        link.authority.grant().map_err(|refusal| seckill_ledger::Error::Rejected(refusal.to_string()))?;
    let mut conn = match slot.take() {
        Some(conn) => conn,
        None => link.connect().await?,
    };
    let outcomes = release(&mut conn, &grant.fence, sale_id, orders).await?;
    *slot = Some(conn);
    Ok(outcomes)
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
