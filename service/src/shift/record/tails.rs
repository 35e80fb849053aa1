//! What the history of shifts says of the tails that they left behind (H6).

use seckill_domain::{CenterId, Epoch, OutboxId};

use crate::topology::{Settled, Shift, ShiftKind, ShiftMode, ShiftState, Tail, Topology, Unclaimed};

/// Names a saved tail in the forced shift that left it behind, if there was one.
pub(in crate::shift) fn add_tail(topology: &mut Topology, from: &CenterId, last: OutboxId, tail: &Tail) {
    let lost = topology.history.iter_mut().find(|shift| left_behind(shift, from, last));
    if let Some(shift) = lost
        && shift.tails.iter().all(|known| known.file != tail.file)
    {
        shift.tails.push(tail.clone());
    }
}

/// Whether a shift, the first of the history, left this center's ledger behind with a tail that ends here: it was forced
/// away from there after the tail's last entry. A tail that is later than every such shift is what the master itself
/// lost, and no shift promised anything of it.
pub(in crate::shift) fn left_behind(shift: &Shift, from: &CenterId, last: OutboxId) -> bool {
    shift.kind == ShiftKind::Master
        && shift.mode == ShiftMode::Forced
        && shift.from == *from
        && shift.state != ShiftState::Aborted
        && shift.epoch.0 > last.epoch
}

/// The epoch of the last shift that may have lost what was claimed again before it.
pub(in crate::shift) fn last_loss(topology: &Topology) -> Option<Epoch> {
    let lost = topology.history.iter().filter(|shift| {
        shift.kind == ShiftKind::Master
            && shift.mode == ShiftMode::Forced
            && shift.state != ShiftState::Aborted
            && !shift.exposure.as_ref().is_some_and(|exposure| exposure.lossless)
    });
    lost.map(|shift| shift.epoch).max()
}

/// Says how a saved tail stands: how many of its paid orders have no claim, the first of these, and what became of all of
/// its orders once that is final.
pub(in crate::shift) fn tell_tail(
    topology: &mut Topology,
    from: &CenterId,
    file: &str,
    (paid_without_claim, paid_orders): (u64, &[Unclaimed]),
    settled: Option<&Settled>,
) {
    let shifts = topology.history.iter_mut().filter(|shift| shift.from == *from);
    for tail in shifts.flat_map(|shift| &mut shift.tails).filter(|tail| tail.file == file) {
        tail.paid_without_claim = paid_without_claim;
        tail.paid_orders = paid_orders.to_vec();
        // One that was settled is open again if what was claimed for it may have been lost, too.
        tail.settled = settled.cloned();
    }
}
