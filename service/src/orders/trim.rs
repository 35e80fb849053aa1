//! Dropping outbox entries that are stored, and were for a while (M2).
//!
//! The outbox does not say when an entry was stored, so the database keeps a mark now and then: at this time,
//! everything up to there was. An entry goes once a mark behind it is older than the retention.

use std::time::Duration;

use seckill_domain::Millis;
use seckill_ledger::admin;
use tokio_util::sync::CancellationToken;

use super::error::Error;
use super::store::OrderStore;
use super::workers::{Link, Streak, WorkerOptions, pause, sleep};

/// Marks within one retention: entries stay that much of it longer at most.
const MARKS: u32 = 60;
/// Bounds of the time between two marks.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
const MAX_INTERVAL: Duration = Duration::from_secs(60);

/// Trims one partition's outbox.
pub(super) struct Trim {
    store: OrderStore,
    link: Link,
    retention_ms: i64,
    interval: Duration,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Store(#[from] Error),
    #[error(transparent)]
    Ledger(#[from] seckill_ledger::Error),
}

impl Trim {
    pub(super) fn new(store: OrderStore, link: Link, options: &WorkerOptions) -> Trim {
        let retention = Duration::from_secs(options.outbox_retention_s.into());
        Trim {
            store,
            link,
            retention_ms: i64::from(options.outbox_retention_s) * 1000,
            interval: (retention / MARKS).clamp(MIN_INTERVAL, MAX_INTERVAL),
        }
    }

    pub(super) async fn run(&self, token: CancellationToken) {
        let mut streak = Streak::default();
        while sleep(self.interval, &token).await {
            match self.round().await {
                Ok(()) => streak.succeeded("trim"),
                Err(Failure::Store(Error::Closed)) => return,
                Err(failure) => {
                    self.store.metrics().retries.inc();
                    streak.failed("trim", &failure);
                    if !pause(&token).await {
                        return;
                    }
                }
            }
        }
    }

    /// Sets a mark and drops what an old enough mark covers. The last entry of those stays: it shows where the
    /// outbox was.
    pub(super) async fn round(&self) -> Result<(), Failure> {
        let before = Millis(self.store.clock().now().0 - self.retention_ms);
        let Some(keep_from) = self.store.mark_position(self.link.partition, before).await? else {
            return Ok(());
        };
        // Without authority nothing is written to the ledger; the entries can wait.
        let Ok(grant) = self.link.authority.grant() else { return Ok(()) };
        let mut conn = self.link.connect().await?;
        // A call drops some thousand entries at most.
        loop {
            let dropped = admin::trim(&mut conn, &grant.fence, keep_from).await?;
            self.store.metrics().trimmed.inc_by(dropped);
            if dropped == 0 {
                return Ok(());
            }
        }
    }
}
