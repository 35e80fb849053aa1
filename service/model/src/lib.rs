//! A model of the protocol that keeps one truth in two centers, searched exhaustively within small bounds.
//!
//! See `docs/protocol-model.md`: what the model has and what it leaves out, its bounds, and what breaks without each
//! rule.

mod actions;
mod explore;
mod ledger;
mod mutants;
mod properties;
mod rules;
mod setup;
mod state;
mod steps;

pub use actions::Action;
pub use explore::{Counterexample, Report, explore};
pub use ledger::{Center, Entry, Fence, Log, Role, Server};
pub use mutants::{MUTANTS, Mutant, SOUND, Sound};
pub use properties::Property;
pub use rules::{Rule, Rules};
pub use setup::{Durability, EPOCHS, Setup};
pub use state::{
    Coordinator, Faults, Grant, Lease, Order, PURCHASES, Promise, Record, Request, Return, Service, State,
    Step, Topology,
};
