//! What has to hold.

use std::fmt;

use crate::ledger::Center;
use crate::setup::{Durability, EPOCHS, Setup};
use crate::state::{Lease, Promise, State};

/// One property.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Property {
    /// No two centers accept in one epoch.
    OneMasterPerEpoch,
    /// What was acknowledged is in the ledger of whoever is the master, unless its loss was accepted.
    NothingAcknowledgedIsLost,
    /// What a reader of the outbox has passed on is in the ledger of whoever is the master, unless its loss was
    /// accepted.
    NothingReadComesToNothing,
    /// No more is promised than there is, and no purchase is promised twice.
    NothingIsOversold,
    /// What was lost with consent is in a saved tail, or still on a server.
    AcceptedLossIsKept,
    /// From every state, without a further fault and without anybody's help, sales go on: every freeze ends.
    SalesGoOn,
    /// From every state the master center gets on alone, if the other one never comes back and nothing is decided in
    /// its favour.
    SalesGoOnAlone,
}

impl Property {
    /// All of them.
    pub const ALL: [Property; 7] = [
        Property::OneMasterPerEpoch,
        Property::NothingAcknowledgedIsLost,
        Property::NothingReadComesToNothing,
        Property::NothingIsOversold,
        Property::AcceptedLossIsKept,
        Property::SalesGoOn,
        Property::SalesGoOnAlone,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Property::OneMasterPerEpoch => "one-master",
            Property::NothingAcknowledgedIsLost => "acknowledged",
            Property::NothingReadComesToNothing => "read",
            Property::NothingIsOversold => "oversold",
            Property::AcceptedLossIsKept => "kept",
            Property::SalesGoOn => "sales",
            Property::SalesGoOnAlone => "alone",
        }
    }
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Property::OneMasterPerEpoch => "two centers accepted in one epoch",
            Property::NothingAcknowledgedIsLost => "an acknowledged purchase is lost",
            Property::NothingReadComesToNothing => "what was read from the outbox came to nothing",
            Property::NothingIsOversold => "more was promised than there is, or one purchase twice",
            Property::AcceptedLossIsKept => "what was lost with consent is nowhere to be found",
            Property::SalesGoOn => "sales never go on",
            Property::SalesGoOnAlone => "sales never go on if the other center stays away",
        })
    }
}

/// The first property of one state that does not hold in it.
pub(crate) fn broken(setup: &Setup, state: &State) -> Option<Property> {
    let found = [
        (Property::OneMasterPerEpoch, two_accepted(state)),
        (Property::NothingAcknowledgedIsLost, is_lost(state, |promise| promise.acknowledged)),
        (Property::NothingReadComesToNothing, is_lost(state, |promise| promise.read)),
        (Property::NothingIsOversold, is_oversold(setup, state)),
        (Property::AcceptedLossIsKept, has_vanished(state)),
    ];
    found.into_iter().find_map(|(property, broken)| (broken && setup.looks_at(property)).then_some(property))
}

fn two_accepted(state: &State) -> bool {
    state.accepted_in.contains(&0b11)
}

fn is_lost(state: &State, promised: impl Fn(&Promise) -> u8) -> bool {
    let log = &state.server(state.topology.master).log;
    is_open(state)
        && (0..).zip(&state.promises).any(|(purchase, promise)| {
            let order = promised(promise);
            order != 0 && !promise.given_up && log.accepted(purchase) != Some(order)
        })
}

fn is_oversold(setup: &Setup, state: &State) -> bool {
    let kept = || state.promises.iter().filter(|promise| !promise.given_up);
    let promised = kept().filter(|promise| promise.orders().next().is_some()).count();
    promised > setup.stock || kept().any(|promise| promise.twice)
}

fn has_vanished(state: &State) -> bool {
    (0..).zip(&state.promises).any(|(purchase, promise)| {
        let is_somewhere = |order: u8| {
            promise.saved == order
                || state.servers.iter().any(|server| server.log.accepted(purchase) == Some(order))
        };
        promise.given_up && !promise.orders().all(is_somewhere)
    })
}

/// The topology and the master's server agree: purchases are accepted there.
fn is_open(state: &State) -> bool {
    state.topology.shift.is_none() && state.server(state.topology.master).is_open_at(state.topology.fence())
}

/// Sales go on: the master's service has authority, and what it sells can be acknowledged.
pub(crate) fn sells(setup: &Setup, state: &State) -> bool {
    let master: Center = state.topology.master;
    let service = state.service(master);
    let replicated = setup.durability == Durability::Replicated && state.topology.in_sync;
    is_open(state)
        && service.view == state.topology
        && service.lease != Lease::Over
        && (!replicated || state.is_followed(master))
}

/// Sales go on without the other center: as [`sells`], and nobody waits for its replica.
pub(crate) fn sells_alone(setup: &Setup, state: &State) -> bool {
    sells(setup, state) && (setup.durability == Durability::Local || !state.topology.in_sync)
}

/// Whether the master center has to get on alone from here: nothing is decided in favour of the other, and its
/// replica may still be given up.
pub(crate) fn is_to_go_on_alone(setup: &Setup, state: &State) -> bool {
    state.topology.shift.is_none_or(|record| !record.decided)
        && (setup.durability == Durability::Local || state.faults.degrades > 0)
}

/// The bounds leave no room for another epoch: whether sales would go on is not asked.
pub(crate) fn is_at_bound(state: &State) -> bool {
    let highest = state
        .servers
        .iter()
        .map(|server| server.log.fence().epoch)
        .chain([state.topology.epoch])
        .chain(state.topology.shift.map(|record| record.epoch + 1))
        .max();
    highest.is_some_and(|epoch| usize::from(epoch) + 1 >= EPOCHS)
}
