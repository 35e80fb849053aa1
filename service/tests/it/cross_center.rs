//! Two centers on one ledger: what reaches the center that is not the master, and what is refused between them.

mod forger;
mod purchases;
mod refusals;
mod sessions;
mod tls;
