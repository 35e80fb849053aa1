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

/// A shift as it stands.
struct Watched {
    shift: Shift,
    /// Since when this service has seen it, on its own clock.
    since: Instant,
    /// How long its coordinator has for this part of it.
    within: Duration,
    deadline: Instant,
}

async fn watch_once(shared: &Arc<Shared>) {
    let mut changes = shared.topology.subscribe();
    let mut watched: Vec<Watched> = Vec::new();
    loop {
        let topology = changes.borrow_and_update().clone();
        watched = look(&topology, &watched);
        let next = watched.iter().map(|one| one.deadline).min();
        let due = async {
            match next {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
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
        let mut left = Vec::with_capacity(watched.len());
        for mut late in watched {
            if late.deadline > Instant::now() {
                left.push(late);
                continue;
            }
            match take(shared, &late.shift).await {
                Ok(coordinator) => drop(shared.tracker.spawn(coordinator.recover(late.since))),
                // Somebody was faster, or the coordinator lives; the next change shows it.
                Err(_) => {
                    late.deadline = Instant::now() + RETRY;
                    left.push(late);
                }
            }
        }
        watched = left;
    }
}

/// The shifts that have to be watched from now on. One that has not changed keeps its deadline, whatever else happens.
fn look(topology: &Topology, before: &[Watched]) -> Vec<Watched> {
    let watch = |(shift, within): (&Shift, Duration)| {
        let known = before.iter().find(|known| known.shift.id == shift.id);
        let since = known.map_or_else(Instant::now, |known| known.since);
        let deadline = match known {
            Some(known) if same(shift, &known.shift) && within == known.within => known.deadline,
            Some(_) | None => {
                Instant::now() + within + Duration::from_millis(rand::random_range(0..=JITTER_MS))
            }
        };
        Watched { shift: shift.clone(), since, within, deadline }
    };
    unfinished(topology).map(watch).collect()
}

/// The shifts that somebody has to bring to their end, and how long their coordinators have for that: the one that runs,
/// first, and those that happened and were not verified. The history bounds them.
fn unfinished(topology: &Topology) -> impl Iterator<Item = (&Shift, Duration)> {
    let running = topology.shift.as_deref();
    let running = running.map(|shift| (shift, Duration::from_millis(shift.freeze_ms)));
    let unverified = topology.history.iter().rev();
    let unverified = unverified.filter(|shift| shift.kind == ShiftKind::Master && !shift.state.is_over());
    running.into_iter().chain(unverified.map(|shift| (shift, VERIFY_WITHIN)))
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
