//! Purchases and readers of the outbox (A2, F1, K2, K3, R1).

use super::Steps;
use crate::actions::Action;
use crate::ledger::{Center, Entry, Fence, Role};
use crate::rules::Rule;
use crate::setup::Durability;
use crate::state::{Grant, Lease, Promise, Request, State};

impl Steps<'_> {
    pub(super) fn requests(&mut self, center: Center) {
        for purchase in 0..self.setup.purchases as u8 {
            match self.from.requests[usize::from(purchase)][center as usize] {
                Request::None => self.send(purchase, center),
                Request::Sent { grant } => self.execute(purchase, center, grant),
                Request::Replied { grant, order } if grant.replicated => {
                    self.write_barrier(purchase, center, grant, order);
                }
                Request::Waiting { grant, order, until } => {
                    if self.from.is_followed(center) && self.from.server(center.other()).log.end() >= until {
                        self.goes_on(
                            Action::Confirm { purchase, center },
                            purchase,
                            center,
                            Request::Confirmed { grant, order },
                        );
                    }
                }
                Request::Replied { grant, order } | Request::Confirmed { grant, order } => {
                    self.acknowledge(purchase, center, grant, order);
                }
            }
            if self.from.faults.lost_requests > 0
                && self.from.requests[usize::from(purchase)][center as usize] != Request::None
            {
                self.then(Action::LoseRequest { purchase, center }, |state| {
                    state.faults.lost_requests -= 1;
                    state.requests[usize::from(purchase)][center as usize] = Request::None;
                });
            }
            if self.setup.readers {
                self.read_outbox(purchase, center);
            }
        }
    }

    fn goes_on(&mut self, action: Action, purchase: u8, center: Center, request: Request) {
        self.then(action, |state| state.requests[usize::from(purchase)][center as usize] = request);
    }

    /// A2, first half: nobody sends without authority. The shopper asks until there is an answer.
    fn send(&mut self, purchase: u8, center: Center) {
        let view = self.from.service(center).view;
        if self.from.promises[usize::from(purchase)].acknowledged != 0 || !self.has_authority(center) {
            return;
        }
        let replicated = self.setup.durability == Durability::Replicated && view.in_sync;
        let grant = Grant { epoch: view.epoch, replicated };
        self.goes_on(Action::Send { purchase, center }, purchase, center, Request::Sent { grant });
    }

    /// The script: the fence (F1), then the key, then the stock.
    fn execute(&mut self, purchase: u8, center: Center, grant: Grant) {
        let action = Action::Execute { purchase, center };
        let server = self.from.server(center);
        let fence = Fence { epoch: grant.epoch, master: center };
        if server.role != Role::Master || (self.keep(Rule::F1) && server.log.fence() != fence) {
            self.goes_on(action, purchase, center, Request::None);
            return;
        }
        let before = server.log.end();
        // K2: without it a barrier counts that was written before the reply came.
        let replied = |order| match self.keep(Rule::K2After) || !grant.replicated {
            true => Request::Replied { grant, order },
            false => Request::Waiting { grant, order, until: before },
        };
        if let Some(order) = server.log.accepted(purchase) {
            // K3: without it a replay needs no barrier.
            let request =
                if self.keep(Rule::K3) { replied(order) } else { Request::Confirmed { grant, order } };
            self.goes_on(action, purchase, center, request);
        } else if server.log.sold() < self.setup.stock {
            let request = replied(server.log.fence().epoch);
            self.then(action, |state| {
                state.server_mut(center).log.push(Entry::Accepted(purchase));
                state.accepted_in[usize::from(grant.epoch)] |= 1 << center as u8;
                state.requests[usize::from(purchase)][center as usize] = request;
            });
        } else {
            self.goes_on(action, purchase, center, Request::None);
        }
    }

    /// K2: a fenced write after the reply, under the epoch of the batch.
    fn write_barrier(&mut self, purchase: u8, center: Center, grant: Grant, order: u8) {
        let server = self.from.server(center);
        let fence = Fence { epoch: grant.epoch, master: center };
        let unfenced = !self.keep(Rule::K2Fence) && server.role == Role::Master;
        let request = match unfenced || server.is_open_at(fence) {
            true => Request::Waiting { grant, order, until: server.log.end() },
            false => Request::None,
        };
        self.goes_on(Action::Barrier { purchase, center }, purchase, center, request);
    }

    /// A2, second half: authority and epoch are as they were, or nobody knows.
    fn acknowledge(&mut self, purchase: u8, center: Center, grant: Grant, order: u8) {
        let epoch = self.from.service(center).view.epoch;
        let may = !self.keep(Rule::A2) || (self.has_authority(center) && epoch == grant.epoch);
        self.then(Action::Acknowledge { purchase, center }, |state| {
            state.requests[usize::from(purchase)][center as usize] = Request::None;
            if may {
                state.promises[usize::from(purchase)].acknowledge(order);
            }
        });
    }

    /// R1. The barrier of a reader is the barrier of a purchase, so here it is one step: everything that was read
    /// has arrived.
    fn read_outbox(&mut self, purchase: u8, center: Center) {
        let (server, service) = (self.from.server(center), self.from.service(center));
        let Some(order) = server.log.accepted(purchase) else { return };
        let may = match server.role {
            Role::Master => {
                let replicated = self.setup.durability == Durability::Replicated && service.view.in_sync;
                let arrived = self.from.is_followed(center)
                    && self.from.server(center.other()).log.end() == server.log.end();
                self.has_authority(center)
                    && server.log.fence() == service.view.fence()
                    && (!replicated || arrived || !self.keep(Rule::R1Master))
            }
            Role::Replica { linked } => {
                !self.keep(Rule::R1Replica)
                    || (linked && service.lease != Lease::Over && server.log.fence() == service.view.fence())
            }
            Role::Isolated => false,
        };
        if may {
            self.then(Action::ReadOutbox { purchase, center }, |state| {
                state.promises[usize::from(purchase)].pass_on(order);
            });
        }
    }
}

impl Promise {
    fn acknowledge(&mut self, order: u8) {
        self.renew(order);
        self.acknowledged = order;
    }

    fn pass_on(&mut self, order: u8) {
        self.renew(order);
        self.read = order;
    }

    /// A promise that is made now is not among those whose loss was accepted before.
    fn renew(&mut self, order: u8) {
        let other = [self.acknowledged, self.read].iter().any(|known| *known != 0 && *known != order);
        if self.given_up {
            self.given_up = false;
            if other {
                (self.acknowledged, self.read) = (0, 0);
            }
        } else if other {
            self.twice = true;
        }
    }

    /// The orders that were promised.
    pub(crate) fn orders(&self) -> impl Iterator<Item = u8> {
        [self.acknowledged, self.read].into_iter().filter(|order| *order != 0)
    }
}

impl State {
    /// A forced shift that may lose something takes effect: what was promised up to now and is not there is lost
    /// with the consent that is in its record.
    pub(super) fn give_up_what_lacks(&mut self, center: Center) {
        let log = self.server(center).log;
        for (purchase, promise) in (0..).zip(&mut self.promises) {
            if promise.orders().any(|order| log.accepted(purchase) != Some(order)) {
                promise.given_up = true;
            }
        }
    }
}
