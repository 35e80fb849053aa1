//! Orders that were not paid in time.

use std::time::Duration;

use seckill_domain::Millis;
use tokio_util::sync::CancellationToken;

use super::error::Error;
use super::store::OrderStore;
use super::workers::{Streak, WorkerOptions, pause, sleep};

/// Orders that expire in one transaction: other writes wait meanwhile, some 20 ms.
const BATCH: u32 = 500;
/// Transactions of one round at most, two seconds' worth: a round goes by the clock and the grace of its beginning, and
/// while it lasts nobody hears that the worker is well. What is due beyond that is the next round's.
const BATCHES: u32 = 100;

/// Lets due orders expire.
pub(super) struct Expiry {
    store: OrderStore,
    interval: Duration,
    grace: Grace,
    batch: u32,
    batches: u32,
}

/// What came due while the service was away gets some time from its start on: its buyers could not see it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grace {
    started_at: Millis,
    ends_at: Millis,
}

impl Grace {
    pub(super) fn new(started_at: Millis, grace_s: u32) -> Grace {
        Grace { started_at, ends_at: started_at.plus_s(grace_s) }
    }

    /// Orders that came due at or before this moment are left alone now.
    fn spared(self, now: Millis) -> Option<Millis> {
        (now < self.ends_at).then_some(self.started_at)
    }
}

impl Expiry {
    pub(super) fn new(store: OrderStore, options: &WorkerOptions) -> Expiry {
        let grace = Grace::new(store.clock().now(), options.expiry_grace_s);
        let interval = Duration::from_millis(options.expiry_interval_ms.max(10));
        Expiry { store, interval, grace, batch: BATCH, batches: BATCHES }
    }

    /// With other bounds of a round than the service's.
    #[cfg(test)]
    pub(super) fn bounded(self, batch: u32, batches: u32) -> Expiry {
        Expiry { batch, batches, ..self }
    }

    pub(super) async fn run(&self, token: CancellationToken) {
        let mut streak = Streak::default();
        while sleep(self.interval, &token).await {
            match self.round(&token).await {
                Ok(()) => streak.succeeded("expiry"),
                Err(Error::Closed) => return,
                Err(error) => {
                    self.store.metrics().retries.inc();
                    streak.failed("expiry", &error);
                    if !pause(&token).await {
                        return;
                    }
                }
            }
        }
    }

    /// Lets expire what is due now, as much as fits into a round.
    pub(super) async fn round(&self, token: &CancellationToken) -> Result<(), Error> {
        let now = self.store.clock().now();
        for _ in 0..self.batches {
            if token.is_cancelled()
                || !self.store.expire_due(self.grace.spared(now), now, self.batch).await?.more
            {
                break;
            }
        }
        Ok(())
    }
}
