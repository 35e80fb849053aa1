//! Who is in charge: the topology document, its store, and the authority that a service has from it.
//!
//! The topology is one small document. A [`TopologyStore`] keeps it, [`TopologyHandle`] shows it to the rest of the
//! service and changes it by compare-and-set, and [`Authority`] answers the one question of the purchase path:
//! may this service write to the ledger right now, and under which fence? [`Instances`] lists the services that
//! are alive.

mod authority;
mod centers;
mod document;
mod etcd_instances;
mod etcd_store;
mod file_instances;
mod file_store;
mod folder_watch;
mod handle;
#[cfg(test)]
pub(crate) mod held_store;
mod instances;
mod metrics;
mod shift;
mod store;
#[cfg(test)]
mod tests;

pub(crate) use authority::boottime_ns;
pub use authority::{Acknowledge, Authority, AuthorityStatus, Cause, Grant, NoAuthority};
pub use centers::split_shards;
pub use document::{
    Center, Durability, Extra, InSync, LedgerRun, Limits, Position, Rate, Restore, SCHEMA, Topology,
    TopologyState, new_ledger_id,
};
pub use etcd_store::{EtcdOptions, EtcdStore};
pub use file_store::FileStore;
pub use handle::{TopologyHandle, UpdateError};
pub use instances::{Instance, InstanceId, InstanceStore, Instances};
pub use shift::{
    Check, CheckVerdict, Coordinator, Exposure, HISTORY, Settled, Shift, ShiftKind, ShiftMode, ShiftPhase,
    ShiftState, Step, StepState, Tail, Unclaimed, UnclaimedCause,
};
pub use store::{Changes, Revision, StoreError, TopologyStore, Versioned};
