//! Dropping outbox entries that every center has stored, and had for a while (M2).
//!
//! The outbox does not say when an entry was stored, so the database keeps a mark now and then: at this time,
//! everything up to there was, in every center. An entry goes once a mark behind it is older than the retention and
//! every center confirms again that it has it. While one does not answer, nothing goes.

use std::time::Duration;

use seckill_domain::{Millis, OutboxId};
use seckill_ledger::admin;
use tokio_util::sync::CancellationToken;

use super::centers::{OrderCenters, Untold};
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
    centers: OrderCenters,
    /// Whether centers count where nobody is at home.
    everywhere: bool,
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
    #[error("the outbox is kept: {0}")]
    Untold(#[from] Untold),
}

impl Trim {
    pub(super) fn new(store: OrderStore, link: Link, options: &WorkerOptions, everywhere: bool) -> Trim {
        let centers = options.centers.clone().unwrap_or_else(|| OrderCenters::alone(store.clone()));
        let retention = Duration::from_secs(options.outbox_retention_s.into());
        Trim {
            store,
            centers,
            everywhere,
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
        // Without authority nothing is written to the ledger; the entries can wait.
        let Ok(grant) = self.link.authority.grant() else { return Ok(()) };
        let partition = self.link.partition;
        let others = self.centers.others_position(partition, self.everywhere).await?;
        let own_counts = self.centers.own_counts(self.everywhere);
        let before = Millis(self.store.clock().now().0 - self.retention_ms);
        let Some(mark) = self.store.mark_position(partition, before, others, own_counts).await? else {
            return Ok(());
        };
        // A mark may be older than a center, or than its database.
        let keep_from = others.map_or(mark, |others| mark.min(others));
        if keep_from == OutboxId::ZERO {
            return Ok(());
        }
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
