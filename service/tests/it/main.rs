//! The product as its users meet it: the binary, its ports, its files. Real Redis, real SQLite.

mod audit;
mod inventory;
mod support;
