//! An open-loop load harness for seckill that checks the books after the run.
//!
//! [`run`] sends a [`Scenario`] at a target and returns a [`Report`]; [`client`] is a small HTTP client for
//! tests and benches; [`buyers::Buyers`] signs tokens.
//!
//! How a run goes: [`scenario`] → [`buyers`] sign their tokens → each [`worker`] follows its [`schedule`],
//! judges answers ([`outcome`]) and keeps a [`record`] of every purchase → [`settle`] asks again for what is
//! unknown and finds every order → [`books`] compare → [`report`].
//!
//! Latency counts from the intended send time, never from the actual one: what a slow target does to buyers
//! who wait for a connection shows in the percentiles.

pub mod books;
pub mod buyers;
pub mod cli;
pub mod client;
pub mod connections;
pub mod outcome;
pub mod record;
pub mod report;
pub mod request;
mod run;
pub mod scenario;
pub mod schedule;
pub mod selfcheck;
pub mod settle;
pub mod stats;
mod text;
pub mod wire;
pub mod worker;

pub use report::Report;
pub use run::{Error, run};
pub use scenario::{Admin, Scenario};
