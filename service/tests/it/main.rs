//! The product as its users meet it: the binary, its ports, its files. Real Redis, real SQLite.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod audit;
mod client;
mod crash;
mod cross_center;
mod inventory;
mod ledger_lost;
mod lifecycle;
mod proxy;
mod race;
mod support;
mod two_centers;
mod up;
