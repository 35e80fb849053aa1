//! The product as its users meet it: the binary, its ports, its files. Real Redis, real SQLite.

mod audit;
mod client;
mod crash;
mod inventory;
mod ledger_lost;
mod lifecycle;
mod race;
mod support;
mod up;
