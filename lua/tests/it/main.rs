//! The ledger against a real redis-server.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail as the test may")]

mod failures;
mod fences;
mod handover;
mod histories;
mod model;
mod outbox;
mod purchases;
mod roles;
mod sales;
mod support;
