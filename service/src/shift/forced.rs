//! The forced shift: the old master is gone, or cut off.
//!
//! Its services stop by themselves when the lease runs out, and a read that shows the recorded shift confirms nothing
//! to them (A3); so the shift is recorded first and the lease waited out after that. What may be lost is decided in
//! the compare-and-set of the record (D1).

use std::time::Duration;

use seckill_ledger::{Fence, roles};

use super::coordinator::{Coordinator, Stop};
use super::precheck::connect;
use super::record;
use crate::topology::{ShiftPhase, boottime_ns};

/// The lease is waited out for this share longer: two clocks do not run at exactly the same rate (A1).
const CLOCK_RATE_MARGIN: u32 = 100;
/// How often the clock is looked at: sleeping alone would not count the time for which the machine is suspended.
const WAIT_STEP: Duration = Duration::from_millis(100);

impl Coordinator {
    pub(super) async fn forced(&mut self) -> Result<(), Stop> {
        // After the record was answered, and so after every read that did not show it was sent.
        let recorded_ns = boottime_ns();
        self.passes("recorded")?;
        let step = self.begin_step("wait_lease");
        let lease = self.shared.options.lease_ttl;
        let wait = lease + lease / CLOCK_RATE_MARGIN;
        let until = recorded_ns.saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX));
        loop {
            let left = Duration::from_nanos(until.saturating_sub(boottime_ns()));
            if left.is_zero() {
                break;
            }
            let slept = self.shared.token.run_until_cancelled(tokio::time::sleep(left.min(WAIT_STEP))).await;
            if slept.is_none() {
                return Err(Stop::Abort("the service that ran it was shut down".to_owned()));
            }
        }
        self.end_step(step, format!("{} ms", wait.as_millis()));
        self.passes("lease_waited")?;
        self.look_again().await?;
        self.passes("looked")?;
        // S4: the run was compared on this connection, which does not outlive it. Once the new fence is in the log
        // everything before it is, too, so a restart loses nothing any more; a restart before it fails here, where
        // the shift can still be given up. A server that lacks something becomes a master only when that is decided:
        // with the later fence, the old master would copy from it otherwise.
        let promoted = match self.is_lossless() {
            false => None,
            true => {
                let step = self.begin_step("promote");
                let run = self.promote().await.map_err(|reason| gone(&reason))?;
                self.end_step(step, None);
                Some(run)
            }
        };
        self.passes("promoted_early")?;
        let step = self.begin_step("decided");
        self.change(None, record::decide).await?;
        self.shift.phase = ShiftPhase::Decided;
        self.end_step(step, None);
        self.passes("decided")?;
        self.forward(promoted).await
    }

    /// The promise that nothing is lost was made for a run of the target's server and what it held (S4).
    async fn look_again(&mut self) -> Result<(), Stop> {
        let topology = self.shared.topology.current();
        let mut target = match self.target.take() {
            Some(target) => target,
            None => connect(&self.shared, &topology, &self.shift.to)
                .await
                .map_err(|error| gone(&error.to_string()))?,
        };
        // The connection may be as old as the lease.
        let standing = match roles::standing(&mut target).await {
            Ok(standing) => standing,
            Err(_) => {
                target = connect(&self.shared, &topology, &self.shift.to)
                    .await
                    .map_err(|error| gone(&error.to_string()))?;
                roles::standing(&mut target).await.map_err(|error| gone(&error.to_string()))?
            }
        };
        if !standing.settled {
            return Err(gone("it is loading, or copying everything"));
        }
        // The master's guardian may have begun an epoch in the moment in which the shift was recorded.
        let reached = standing.fence.as_deref().and_then(|text| text.parse::<Fence>().ok());
        if let Some(reached) = reached.filter(|reached| *reached != self.fence())
            && reached.epoch >= self.shift.epoch
        {
            return Err(gone(&format!("its fence is at {reached} by now; ask again")));
        }
        let promised = self.is_lossless();
        let now = record::exposure(&topology, &self.shift.to, self.shared.options.partition, &standing);
        if promised && !now.lossless && !self.shift.accept_loss {
            return Err(gone(&format!("{}, while the lease was waited out; ask again", now.reason)));
        }
        if promised && !now.lossless {
            self.shift.exposure = Some(now);
        }
        self.target = Some(target);
        Ok(())
    }

    fn is_lossless(&self) -> bool {
        self.shift.exposure.as_ref().is_some_and(|exposure| exposure.lossless)
    }
}

/// The server that takes cannot, and nothing is decided.
fn gone(reason: &str) -> Stop {
    Stop::Abort(format!("the target's Redis: {reason}"))
}
