//! The ledger against a real redis-server.

mod purchases;
mod support;
