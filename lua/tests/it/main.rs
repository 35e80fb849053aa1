//! The ledger against a real redis-server.

mod failures;
mod fences;
mod model;
mod outbox;
mod purchases;
mod sales;
mod support;
