//! The product as its users meet it: the binary, its ports, its files. Real Redis, SQLite, Kafka, MariaDB.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod audit;
mod boot;
mod centers;
mod certificates;
mod client;
mod crash;
mod cross_center;
mod crowd;
mod every_center;
mod inventory;
mod ledger_lost;
mod lifecycle;
mod pair;
mod poison;
mod production;
mod proxy;
mod race;
mod serve;
mod support;
mod two_centers;
mod up;
