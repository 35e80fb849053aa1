//! Coordinators: planned and forced shifts, aborts and takeovers (H1, H3, H4, S2, S4, D1, D3).

use super::Steps;
use crate::actions::Action;
use crate::ledger::{Center, Fence, Role};
use crate::rules::Rule;
use crate::setup::Durability;
use crate::state::{Coordinator, Lease, Record, State, Step, Topology};

impl Steps<'_> {
    pub(super) fn coordinator(&mut self, center: Center) {
        match self.from.service(center).coordinator {
            None => self.without_coordinator(center),
            Some(coordinator) => {
                self.step(center, coordinator);
                let is_gone = match coordinator.step {
                    Step::NoAnswerToDecide | Step::NoAnswerToRedirect => false,
                    _ => {
                        self.from.topology.shift.map(|record| record.epoch) != Some(coordinator.record.epoch)
                    }
                };
                if coordinator.replaced || is_gone {
                    self.then(Action::Stop { center }, |state| state.service_mut(center).coordinator = None);
                }
                self.abort(center, coordinator);
            }
        }
    }

    fn without_coordinator(&mut self, center: Center) {
        let topology = self.from.topology;
        if let Some(record) = topology.shift {
            if self.keep(Rule::H4) && (self.keep(Rule::H4Any) || record.to == center) {
                self.take_over(center, record);
            }
            return;
        }
        let epoch = topology.epoch + 1;
        if topology.master == center || !Self::fits(epoch + 1) {
            return;
        }
        if self.from.faults.planned > 0 {
            let record = Record { forced: false, to: center, epoch, decided: false, lossless: true };
            self.then(Action::StartPlanned { to: center }, |state| {
                state.faults.planned -= 1;
                state.record(record);
            });
        }
        if self.from.faults.forced > 0 {
            let record = Record {
                forced: true,
                to: center,
                epoch,
                decided: false,
                lossless: self.is_lossless(center),
            };
            self.then(Action::StartForced { to: center }, |state| {
                state.faults.forced -= 1;
                state.record(record);
                // Every lease that is held now was confirmed before this.
                for service in &mut state.services {
                    service.lease = service.lease.min(Lease::Before);
                    if let Some((_, lease)) = &mut service.reading {
                        *lease = (*lease).min(Lease::Before);
                    }
                }
            });
        }
    }

    /// What a forced shift to this center loses: nothing, if its replica is in sync, in the same run and at the
    /// topology's fence (S4). Otherwise the record says that loss is accepted.
    fn is_lossless(&self, to: Center) -> bool {
        let (server, topology) = (self.from.server(to), self.from.topology);
        if self.setup.durability == Durability::Local {
            // D3: without it, a replica without a lag is taken for one that has everything.
            let level = self.from.is_followed(to.other())
                && server.log.end() == self.from.server(to.other()).log.end();
            return !self.keep(Rule::D3) && level;
        }
        // D1: decided in the same compare-and-set, not by what was read before.
        let in_sync =
            if self.keep(Rule::D1Decide) { topology.in_sync } else { self.from.service(to).view.in_sync };
        in_sync && self.is_that_run(to, topology.fence())
    }

    /// S4
    fn is_that_run(&self, to: Center, fence: Fence) -> bool {
        let server = self.from.server(to);
        !self.keep(Rule::S4) || (server.noted_run && server.log.fence() == fence)
    }

    /// H4: when a record has not changed for its time, any service goes on with it. Its coordinator may only be
    /// paused.
    fn take_over(&mut self, center: Center, record: Record) {
        self.then(Action::TakeOver { center }, |state| {
            if let Some(other) = &mut state.service_mut(center.other()).coordinator {
                other.replaced = true;
            }
            let step = if record.decided { Step::Decided } else { Step::Recorded };
            let expected = state.server(record.to).log.fence();
            state.service_mut(center).coordinator =
                Some(Coordinator { record, step, replaced: false, expected });
        });
    }

    fn step(&mut self, center: Center, coordinator: Coordinator) {
        let Coordinator { record, step, .. } = coordinator;
        let fence = Fence { epoch: record.epoch, master: record.to };
        match step {
            Step::Recorded if record.forced => self.wait_lease(center, coordinator),
            Step::Recorded => self.fence_old(center, record, fence),
            Step::Fenced => {
                if self.from.server(record.to).log.fence() == fence {
                    self.reaches(Action::SeeCaughtUp { center }, center, Step::CaughtUp);
                }
            }
            Step::CaughtUp => {
                if self.keep(Rule::H3Decide) || record.forced {
                    self.decide(center, coordinator);
                } else {
                    self.promote_planned(center, record, fence);
                }
            }
            Step::Decided if record.forced => self.promote_forced(center, coordinator, fence),
            Step::Decided => {
                self.promote_planned(center, record, fence);
                if !coordinator.replaced {
                    self.catch_up_again(center, record, fence);
                }
            }
            Step::Waited if self.keep(Rule::S4Promote) => self.promote_forced(center, coordinator, fence),
            Step::Waited => {
                if self.is_as_recorded(record, self.from.server(record.to).log.fence()) {
                    self.reaches(Action::LookAgain { center }, center, Step::CaughtUp);
                }
            }
            Step::Promoted => {
                if !record.forced {
                    self.attach_early(center, record, fence);
                }
                self.redirect(center, coordinator, fence);
            }
            Step::Redirected => self.attach_old(center, record, fence),
            Step::NoAnswerToDecide | Step::NoAnswerToRedirect => self.find_out(center, coordinator),
        }
    }

    fn reaches(&mut self, action: Action, center: Center, step: Step) {
        self.then(action, |state| state.at_step(center, step));
    }

    /// The record in the topology is this coordinator's to change.
    fn owns_record(&self, coordinator: &Coordinator) -> bool {
        (!coordinator.replaced || !self.keep(Rule::H4Term))
            && self.from.topology.shift.is_some_and(|record| record.epoch == coordinator.record.epoch)
    }

    fn fence_old(&mut self, center: Center, record: Record, fence: Fence) {
        let old = self.from.server(record.to.other());
        let before = Fence { epoch: record.epoch - 1, master: record.to.other() };
        let expected = !self.keep(Rule::S2) || [before, fence].contains(&old.log.fence());
        if old.role != Role::Master || !expected {
            return;
        }
        self.then(Action::FenceOld { center }, |state| {
            state.set_fence(record.to.other(), fence);
            if state.server(record.to.other()).log.fence() == fence {
                state.server_mut(record.to.other()).noted_run = true;
                state.at_step(center, Step::Fenced);
            }
        });
    }

    fn decide(&mut self, center: Center, coordinator: Coordinator) {
        if !self.owns_record(&coordinator) {
            return;
        }
        for answered in [true, false] {
            if !answered && self.from.faults.lost_answers == 0 {
                continue;
            }
            self.then(Action::Decide { center, answered }, |state| {
                if let Some(record) = &mut state.topology.shift {
                    record.decided = true;
                }
                if let Some(coordinator) = &mut state.service_mut(center).coordinator {
                    coordinator.record.decided = true;
                }
                state.at_step(center, if answered { Step::Decided } else { Step::NoAnswerToDecide });
                state.faults.lost_answers -= u8::from(!answered);
            });
        }
    }

    /// S2: expects the attempt's fence, so a target that restarted without it is not promoted.
    fn promote_planned(&mut self, center: Center, record: Record, fence: Fence) {
        if self.keep(Rule::S2) && self.from.server(record.to).log.fence() != fence {
            return;
        }
        let (decides, in_sync) = (!self.keep(Rule::H3Decide), self.from.topology.in_sync);
        self.then(Action::Promote { center }, |state| {
            state.set_fence(record.to, fence);
            state.set_role(record.to, Role::Master);
            state.at_step(center, Step::Promoted);
            if decides && center == record.to {
                // H3: without it the promotion decides, and the center that takes sells from here on.
                let service = state.service_mut(center);
                service.view = Topology { epoch: record.epoch, master: center, in_sync, shift: None };
                service.lease = Lease::Since;
            }
        });
    }

    /// After `decided` there is only forward, also if the target restarted without the fence that it had shown.
    fn catch_up_again(&mut self, center: Center, record: Record, fence: Fence) {
        let (old, target) = (self.from.server(record.to.other()), self.from.server(record.to));
        if target.log.fence() == fence || old.log.fence() != fence {
            return;
        }
        if target.role == Role::Isolated {
            self.then(Action::CatchUpAgain { center }, |state| state.attach(record.to, true));
        }
        if old.role == Role::Isolated {
            self.then(Action::OpenSource { center }, |state| state.set_role(record.to.other(), Role::Master));
        }
    }

    fn wait_lease(&mut self, center: Center, coordinator: Coordinator) {
        let expected = self.from.server(coordinator.record.to).log.fence();
        let recorded = self.from.topology.shift.map(|record| record.epoch);
        self.then(Action::WaitLease { center }, |state| {
            // A wait that began with an earlier record says nothing about this one.
            if recorded == Some(coordinator.record.epoch) {
                for service in &mut state.services {
                    let ended = |lease| if lease == Lease::Before { Lease::Over } else { lease };
                    service.lease = ended(service.lease);
                    if let Some((_, lease)) = &mut service.reading {
                        *lease = ended(*lease);
                    }
                }
            }
            state.at_step(center, Step::Waited);
            if let Some(coordinator) = &mut state.service_mut(center).coordinator {
                coordinator.expected = expected;
            }
        });
    }

    fn promote_forced(&mut self, center: Center, coordinator: Coordinator, fence: Fence) {
        let Coordinator { record, expected, .. } = coordinator;
        let found = self.from.server(record.to).log.fence();
        let as_expected = !self.keep(Rule::S2) || found == expected || found == fence || record.decided;
        let as_recorded = !self.keep(Rule::S4Promote) || found == fence || self.is_as_recorded(record, found);
        if !as_expected || !as_recorded || (found.epoch >= fence.epoch && found != fence) {
            return;
        }
        self.then(Action::Promote { center }, |state| {
            state.set_fence(record.to, fence);
            state.set_role(record.to, Role::Master);
            state.at_step(center, Step::Promoted);
        });
    }

    /// S4: the target is what the record says it is.
    fn is_as_recorded(&self, record: Record, found: Fence) -> bool {
        let before = Fence { epoch: record.epoch - 1, master: record.to.other() };
        let promised = record.lossless && self.setup.durability == Durability::Replicated;
        !promised || !self.keep(Rule::S4) || (found == before && self.is_that_run(record.to, before))
    }

    fn redirect(&mut self, center: Center, coordinator: Coordinator, fence: Fence) {
        if !self.owns_record(&coordinator) {
            return;
        }
        let record = coordinator.record;
        for answered in [true, false] {
            if !answered && self.from.faults.lost_answers == 0 {
                continue;
            }
            self.then(Action::Redirect { center, answered }, |state| {
                // H5: a planned shift keeps the replica in sync, a forced one has none.
                let in_sync = state.topology.in_sync && !record.forced;
                state.topology = Topology { epoch: fence.epoch, master: fence.master, in_sync, shift: None };
                if record.forced && !record.lossless {
                    state.give_up_what_lacks(record.to);
                }
                state.at_step(center, if answered { Step::Redirected } else { Step::NoAnswerToRedirect });
                state.faults.lost_answers -= u8::from(!answered);
            });
        }
    }

    /// After `decided` nobody writes to the old master, and it has nothing that the target lacks: it may be attached
    /// while the redirect is still under way.
    fn attach_early(&mut self, center: Center, record: Record, fence: Fence) {
        let old = record.to.other();
        if self.keep(Rule::S2) && self.from.server(old).log.fence() != fence {
            return;
        }
        self.then(Action::AttachOld { center }, |state| state.attach(old, false));
    }

    fn attach_old(&mut self, center: Center, record: Record, fence: Fence) {
        let old = record.to.other();
        let expected = !self.keep(Rule::S2) || self.from.server(old).log.fence() == fence;
        let saves = self.keep(Rule::S3Tail);
        self.then(Action::AttachOld { center }, |state| {
            // After a forced shift the guardian of the old master does it, when that one is back.
            if expected && !record.forced {
                state.attach(old, saves);
            }
            state.service_mut(center).coordinator = None;
        });
    }

    /// Until `decided` every failure aborts, and whatever can fail may do so at any time.
    fn abort(&mut self, center: Center, coordinator: Coordinator) {
        let undecided = self.from.topology.shift.is_some_and(|record| !record.decided);
        let epoch = coordinator.record.epoch + 1;
        if !self.owns_record(&coordinator) || !undecided || !Self::fits(epoch) {
            return;
        }
        // H1: without it the topology is as before, and the next attempt has this one's epoch.
        let epoch = if self.keep(Rule::H1Abort) { epoch } else { self.from.topology.epoch };
        self.then(Action::Abort { center }, |state| {
            state.topology.epoch = epoch;
            state.topology.shift = None;
            state.service_mut(center).coordinator = None;
        });
    }

    /// H3: the topology is read again; without the rule the change counts as failed and everything is put back.
    fn find_out(&mut self, center: Center, coordinator: Coordinator) {
        let Coordinator { record, step, .. } = coordinator;
        if !self.keep(Rule::H3Unknown) {
            let epoch = record.epoch + 1;
            if Self::fits(epoch) {
                self.then(Action::TakeForFailed { center }, |state| {
                    state.topology.epoch = epoch;
                    state.topology.master = record.to.other();
                    state.topology.shift = None;
                    state.service_mut(center).coordinator = None;
                });
            }
            return;
        }
        let next = match (step, self.from.topology.shift) {
            (Step::NoAnswerToDecide, Some(found)) if found.epoch == record.epoch => {
                Some(if found.decided { Step::Decided } else { Step::CaughtUp })
            }
            (_, Some(found)) if found.epoch == record.epoch => Some(Step::Promoted),
            (Step::NoAnswerToRedirect, _) => Some(Step::Redirected),
            _ => None,
        };
        self.then(Action::ReadAgain { center }, |state| match next {
            Some(step) => state.at_step(center, step),
            None => state.service_mut(center).coordinator = None,
        });
    }
}

impl State {
    fn record(&mut self, record: Record) {
        self.topology.shift = Some(record);
        let expected = self.server(record.to).log.fence();
        self.service_mut(record.to).coordinator =
            Some(Coordinator { record, step: Step::Recorded, replaced: false, expected });
    }

    fn at_step(&mut self, center: Center, step: Step) {
        if let Some(coordinator) = &mut self.service_mut(center).coordinator {
            coordinator.step = step;
        }
    }
}
