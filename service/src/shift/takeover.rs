//! Taking over a shift whose coordinator died (H4). Every service of every center does: a freeze never outlives its
//! deadline by more than a little, whoever is left.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;

use super::coordinator::{Coordinator, decided};
use super::operation::{Shared, ShiftError};
use super::record::{Replaced, take_over};
use crate::topology::{Coordinator as Name, Shift, ShiftKind, ShiftPhase, Topology, UpdateError};

/// Several services wait for the same deadline; each waits up to this much longer, so that the first is done before
/// the second tries.
const JITTER_MS: u64 = 100;
/// A takeover that failed, because the topology's store did not answer, is tried again after this long.
const RETRY: Duration = Duration::from_millis(200);
/// How long a coordinator may take to verify a shift that happened. Nobody waits for that.
const VERIFY_WITHIN: Duration = Duration::from_secs(20);

/// Watches the recorded shift until the service ends.
pub(super) async fn watch(shared: Arc<Shared>) {
    while !shared.token.is_cancelled() {
        if AssertUnwindSafe(watch_once(&shared)).catch_unwind().await.is_err() {
            tracing::error!("the watch on shifts panicked; it starts anew");
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// A shift as it stands, and since when this service has seen it like that, on its own clock.
struct Watched {
    shift: Shift,
    since: Instant,
    /// How long its coordinator has for this part of it.
    within: Duration,
    deadline: Instant,
}

async fn watch_once(shared: &Arc<Shared>) {
    let mut changes = shared.topology.subscribe();
    let mut watched: Option<Watched> = None;
    loop {
        let topology = changes.borrow_and_update().clone();
        watched = match (unfinished(&topology), watched) {
            (None, _) => None,
            (Some((shift, within)), Some(before))
                if same(shift, &before.shift) && within == before.within =>
            {
                Some(before)
            }
            (Some((shift, within)), _) => {
                let since = Instant::now();
                let jitter = Duration::from_millis(rand::random_range(0..=JITTER_MS));
                Some(Watched { shift: shift.clone(), since, within, deadline: since + within + jitter })
            }
        };
        let due = async {
            match &watched {
                Some(watched) => tokio::time::sleep_until(watched.deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shared.token.cancelled() => return,
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
                continue;
            }
            () = due => {}
        }
        let Some(late) = &mut watched else { continue };
        match take(shared, &late.shift).await {
            Ok(coordinator) => {
                let since = late.since;
                shared.tracker.spawn(coordinator.recover(since));
                watched = None;
            }
            // Somebody was faster, or the coordinator lives; the next change shows it.
            Err(_) => late.deadline = Instant::now() + RETRY,
        }
    }
}

/// The shift that somebody has to bring to its end, and how long its coordinator has for it.
fn unfinished(topology: &Topology) -> Option<(&Shift, Duration)> {
    if let Some(running) = topology.shift.as_deref() {
        return Some((running, Duration::from_millis(running.freeze_ms)));
    }
    let last = topology.history.iter().rev().find(|shift| shift.kind == ShiftKind::Master)?;
    (!last.state.is_over()).then_some((last, VERIFY_WITHIN))
}

fn same(shift: &Shift, before: &Shift) -> bool {
    shift.id == before.id && shift.coordinator == before.coordinator && shift.phase == before.phase
}

/// Makes this service the coordinator of a shift, unless it changed since it was seen. From here on its coordinator
/// before is refused by the record.
pub(super) async fn take(shared: &Arc<Shared>, seen: &Shift) -> Result<Coordinator, ShiftError> {
    let by = Name {
        center: shared.options.center.clone(),
        instance: shared.options.instance.clone(),
        term: seen.coordinator.term + 1,
    };
    let before = seen.clone();
    let taken = shared.topology.update(move |topology| take_over(topology, &before, &by)).await;
    match taken {
        Ok(shift) => Ok(Coordinator::new(Arc::clone(shared), shift)),
        Err(UpdateError::Refused(Replaced)) if seen.phase == ShiftPhase::Decided => Err(decided(seen)),
        Err(UpdateError::Refused(Replaced)) => {
            Err(ShiftError::refused("the shift went on meanwhile", "look at its status and ask again"))
        }
        Err(UpdateError::Store(error)) => Err(error.into()),
    }
}
