//! Who is in charge: the topology document, its store, and the authority that a service has from it.
//!
//! The topology is one small document. [`FileStore`] keeps it, [`TopologyHandle`] shows it to the rest of the
//! service and changes it by compare-and-set, and [`Authority`] answers the one question of the purchase path:
//! may this service write to the ledger right now, and under which fence?

mod authority;
mod document;
mod file_store;
mod handle;
#[cfg(test)]
mod tests;

pub use authority::{Acknowledge, Authority, AuthorityStatus, Cause, Grant, NoAuthority};
pub use document::{
    Center, Durability, Extra, InSync, LedgerRun, Limits, Rate, SCHEMA, Topology, TopologyState,
    new_ledger_id,
};
pub use file_store::{FileStore, Revision, StoreError, Versioned};
pub use handle::{TopologyHandle, UpdateError};
