//! What can happen next in a state. Each actor has a file; each step is as large as what its actor does without
//! looking again: pauses, crashes and the other actors come between any two of them.

mod coordinators;
mod guardians;
mod requests;
mod servers;
mod services;

use crate::actions::Action;
use crate::ledger::{Center, Fence, Role};
use crate::rules::Rule;
use crate::setup::{EPOCHS, Setup};
use crate::state::{Lease, Request, State, Topology};

/// Collects everything that can happen next.
pub(crate) struct Steps<'a> {
    setup: &'a Setup,
    from: &'a State,
    found: &'a mut Vec<(Action, State)>,
}

/// Everything that can happen next.
pub(crate) fn successors(setup: &Setup, from: &State, found: &mut Vec<(Action, State)>) {
    let mut steps = Steps { setup, from, found };
    for center in Center::BOTH {
        steps.requests(center);
        steps.servers(center);
        steps.services(center);
        steps.guardian(center);
        steps.coordinator(center);
    }
}

impl Steps<'_> {
    fn then(&mut self, action: Action, change: impl FnOnce(&mut State)) {
        let mut next = *self.from;
        change(&mut next);
        if next != *self.from {
            self.found.push((action, next));
        }
    }

    fn keep(&self, rule: Rule) -> bool {
        self.setup.rules.keep(rule)
    }

    /// Whether the bounds have room for an epoch.
    fn fits(epoch: u8) -> bool {
        usize::from(epoch) < EPOCHS
    }

    /// Whether the service may write to its ledger, for all it knows.
    fn has_authority(&self, center: Center) -> bool {
        let service = self.from.service(center);
        let held_up = match service.view.shift {
            None => false,
            Some(shift) => self.keep(Rule::A3) || !shift.forced,
        };
        service.lease != Lease::Over && service.view.master == center && !held_up
    }
}

impl State {
    /// Gives a server a role, with what follows for whoever is connected to it.
    fn set_role(&mut self, center: Center, role: Role) {
        let before = std::mem::replace(&mut self.server_mut(center).role, role);
        if before == Role::Master && role != Role::Master {
            let other = self.server_mut(center.other());
            if other.role == (Role::Replica { linked: true }) {
                other.role = Role::Replica { linked: false };
            }
            // `WAIT` ends with an error when its server turns replica.
            for requests in &mut self.requests {
                if matches!(requests[center as usize], Request::Waiting { .. }) {
                    requests[center as usize] = Request::None;
                }
            }
        }
    }

    /// Makes a server the replica of the other. What only it has is saved before (S3).
    fn attach(&mut self, center: Center, save: bool) {
        if matches!(self.server(center).role, Role::Replica { .. }) {
            return;
        }
        if save {
            let (own, source) = (self.server(center).log, self.server(center.other()).log);
            for (purchase, promise) in (0..).zip(&mut self.promises) {
                match own.accepted(purchase) {
                    Some(order) if source.accepted(purchase) != Some(order) => promise.saved = order,
                    Some(_) | None => {}
                }
            }
        }
        self.set_role(center, Role::Replica { linked: false });
    }

    /// Sets the fence if that is a later epoch, as the script does.
    fn set_fence(&mut self, center: Center, fence: Fence) -> bool {
        let log = &mut self.server_mut(center).log;
        let later = log.fence().epoch < fence.epoch;
        if later {
            log.push(crate::ledger::Entry::Fence(fence));
        }
        later
    }

    /// A service has read the topology; the lease counts from when it was asked (A1).
    fn confirm(&mut self, setup: &Setup, center: Center, topology: Topology, lease: Lease) {
        let service = self.service_mut(center);
        service.view = topology;
        if !(setup.rules.keep(Rule::A3) && topology.is_forced_away(center)) {
            service.lease = lease;
        }
    }
}
