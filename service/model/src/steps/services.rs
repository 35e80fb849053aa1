//! Services: what they know of the topology, and for how long (A1, A3).

use super::Steps;
use crate::actions::Action;
use crate::ledger::Center;
use crate::rules::Rule;
use crate::state::{Lease, Request};

impl Steps<'_> {
    pub(super) fn services(&mut self, center: Center) {
        let (setup, topology) = (self.setup, self.from.topology);
        match self.from.service(center).reading {
            // One read follows the other.
            Some((answer, sent)) => self.then(Action::HearTopology { center }, |state| {
                state.service_mut(center).reading = None;
                let lease = if setup.rules.keep(Rule::A1) { sent } else { Lease::Since };
                state.confirm(setup, center, answer, lease);
            }),
            None => {
                self.then(Action::ReadTopology { center }, |state| {
                    state.confirm(setup, center, topology, Lease::Since);
                });
                if self.from.faults.late_reads > 0 {
                    self.then(Action::AskTopology { center }, |state| {
                        state.faults.late_reads -= 1;
                        state.service_mut(center).reading = Some((topology, Lease::Since));
                    });
                }
            }
        }
        if self.from.faults.services > 0 {
            self.then(Action::RestartService { center }, |state| {
                state.faults.services -= 1;
                let service = state.service_mut(center);
                service.reading = None;
                service.order = None;
                service.returning = None;
                service.coordinator = None;
                service.lease = Lease::Over;
                state.confirm(setup, center, topology, Lease::Since);
                for requests in &mut state.requests {
                    requests[center as usize] = Request::None;
                }
            });
        }
    }
}
