//! Guardians: the role of each center's server, who is in sync (D1, D2), and epochs that drifted apart (H1). With a
//! shift recorded they do nothing (S3).

use super::Steps;
use crate::actions::Action;
use crate::ledger::{Center, Fence, Role};
use crate::rules::Rule;
use crate::setup::Durability;
use crate::state::{Order, Return};

impl Steps<'_> {
    pub(super) fn guardian(&mut self, center: Center) {
        let service = self.from.service(center);
        if let Some(order) = service.order {
            self.act(center, order);
        } else if let Some((epoch, seen)) = service.returning {
            self.go_on_with_return(center, epoch, seen);
        } else if service.view.shift.is_some() && self.keep(Rule::S3Idle) {
        } else if service.view.master == center {
            self.look_after_master(center);
        } else {
            self.look_after_replica(center);
        }
    }

    /// Whether a change of the topology that only the master's guardian may make, and only while no shift is
    /// recorded, happens.
    fn changes_as_master(&self, center: Center) -> bool {
        self.from.topology.master == center && self.is_left_to_guardians()
    }

    /// S3: with a shift recorded, servers, epochs and the list of replicas are its coordinator's.
    fn is_left_to_guardians(&self) -> bool {
        self.from.topology.shift.is_none() || !self.keep(Rule::S3Idle)
    }

    fn look_after_master(&mut self, center: Center) {
        let (own, view, topology) =
            (self.from.server(center), self.from.service(center).view, self.from.topology);
        let fence = own.log.fence();
        let drifted = self.keep(Rule::H1Lift) && fence != topology.fence();
        if self.changes_as_master(center)
            && view.epoch == topology.epoch
            && (own.role != Role::Master || drifted)
        {
            // F3, H1: a server that restarted, or whose fence is another than the topology's, gets an epoch of its own.
            let epoch = topology.epoch.max(fence.epoch) + 1;
            if Self::fits(epoch) {
                self.then(Action::BeginEpoch { center }, |state| {
                    state.topology.epoch = epoch;
                    state.set_role(center, Role::Isolated);
                    state.service_mut(center).order = Some(Order::Promote { expected: fence, epoch });
                });
            }
        }
        if view.in_sync && self.from.faults.degrades > 0 {
            // D1
            let may = topology.master == center && (topology.shift.is_none() || !self.keep(Rule::D1Guard));
            if may && topology.in_sync {
                self.then(Action::Degrade { center }, |state| {
                    state.faults.degrades -= 1;
                    state.topology.in_sync = false;
                });
            }
        }
        if self.setup.durability == Durability::Replicated
            && !view.in_sync
            && own.is_open_at(view.fence())
            && self.from.is_followed(center)
        {
            self.begin_return(center, view.epoch);
        }
    }

    /// D2: the fence of the next epoch goes into the ledger.
    fn begin_return(&mut self, center: Center, epoch: u8) {
        if self.keep(Rule::D2) {
            let fence = Fence { epoch: epoch + 1, master: center };
            if Self::fits(fence.epoch) {
                self.then(Action::BeginReturn { center }, |state| {
                    state.set_fence(center, fence);
                    state.service_mut(center).returning = Some((epoch, Return::Waiting));
                });
            }
        } else if self.changes_as_master(center) {
            self.then(Action::EndReturn { center }, |state| {
                state.topology.in_sync = true;
                state.server_mut(center.other()).noted_run = true;
            });
        }
    }

    /// D2: when the replica itself has shown that fence, one change of the topology says both.
    fn go_on_with_return(&mut self, center: Center, epoch: u8, seen: Return) {
        let fence = Fence { epoch: epoch + 1, master: center };
        let in_sync = match seen {
            Return::Waiting => {
                let other = self.from.server(center.other());
                if matches!(other.role, Role::Replica { .. }) && other.log.fence() == fence {
                    self.then(Action::SeeReturn { center }, |state| {
                        state.service_mut(center).returning = Some((epoch, Return::Shown));
                    });
                } else if !self.from.is_followed(center) || !self.from.server(center).is_open_at(fence) {
                    self.then(Action::GiveUpReturn { center }, |state| {
                        state.service_mut(center).returning = Some((epoch, Return::Failed));
                    });
                }
                if self.from.faults.degrades > 0 {
                    self.then(Action::TimeOutReturn { center }, |state| {
                        state.faults.degrades -= 1;
                        state.service_mut(center).returning = Some((epoch, Return::Failed));
                    });
                }
                return;
            }
            Return::Shown | Return::ShownBeforeRestart => true,
            Return::Failed => false,
        };
        let happens = self.changes_as_master(center) && self.from.topology.epoch == epoch;
        self.then(Action::EndReturn { center }, |state| {
            state.service_mut(center).returning = None;
            if happens {
                state.topology.epoch = fence.epoch;
                if in_sync {
                    state.topology.in_sync = true;
                    state.server_mut(center.other()).noted_run = seen == Return::Shown;
                }
            }
        });
    }

    fn look_after_replica(&mut self, center: Center) {
        let (own, view, topology) =
            (self.from.server(center), self.from.service(center).view, self.from.topology);
        if matches!(own.role, Role::Replica { .. })
            || !self.from.server(center.other()).is_open_at(view.fence())
        {
            return;
        }
        let fence = own.log.fence();
        if fence.epoch <= view.epoch {
            self.then(Action::BeginAttach { center }, |state| {
                state.service_mut(center).order = Some(Order::Attach { expected: fence });
            });
        } else if self.keep(Rule::H1Lift) && self.is_left_to_guardians() && topology.epoch < fence.epoch {
            let epoch = fence.epoch + u8::from(self.keep(Rule::H1Once));
            if Self::fits(epoch) {
                self.then(Action::LiftTopology { center }, |state| state.topology.epoch = epoch);
            }
        }
    }

    /// What was decided a moment ago, or before a long pause.
    fn act(&mut self, center: Center, order: Order) {
        let fence = self.from.server(center).log.fence();
        let (keeps, saves) = (self.keep(Rule::S2), self.keep(Rule::S3Tail));
        let held_up = self.from.service(center).view.shift.is_some() && self.keep(Rule::S3Idle);
        self.then(Action::Act { center }, |state| {
            state.service_mut(center).order = None;
            match order {
                Order::Promote { expected, epoch } => {
                    if (!keeps || fence == expected)
                        && state.set_fence(center, Fence { epoch, master: center })
                    {
                        state.set_role(center, Role::Master);
                    }
                }
                Order::Attach { expected } => {
                    if (!keeps || fence == expected) && !held_up {
                        state.attach(center, saves);
                    }
                }
            }
        });
    }
}
