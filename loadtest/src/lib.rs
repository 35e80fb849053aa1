//! An open-loop load harness for seckill that checks the books after the run.
//!
//! [`run`] sends a [`Scenario`] at a target and returns a [`Report`]; [`client`] is a small HTTP client for
//! tests and benches; [`buyers::Buyers`] signs tokens.
//!
//! How a run goes: [`scenario`] → `preflight` (sales, first audit) → [`plan`] ([`buyers`] sign their tokens) →
//! [`generators`] start [`worker`]s, as threads or processes: each follows its [`schedule`] and its buyers'
//! [`journey`](worker), judges answers ([`outcome`]) and writes every purchase into a [`ledger_file`] →
//! [`settle`] asks again for what is unknown and finds every order → [`books`] compare → [`report`].
//!
//! Latency counts from the intended send time, never from the actual one: what a slow target does to buyers
//! who wait for a connection shows in the percentiles.

pub mod arrivals;
pub mod books;
pub mod buyers;
pub mod cli;
pub mod client;
pub mod compare;
pub mod connections;
mod duration_ms;
pub mod environment;
pub mod fault;
pub mod generators;
pub mod hdr;
pub mod html;
pub mod impact;
mod journey;
pub mod junit;
pub mod ledger_file;
pub mod link;
pub mod live;
pub mod merge;
pub mod observe;
pub mod outcome;
pub mod part;
pub mod persona;
pub mod plan;
mod preflight;
pub mod record;
pub mod report;
pub mod request;
mod run;
pub mod scenario;
pub mod schedule;
pub mod selfcheck;
pub mod series;
pub mod settle;
pub mod stats;
mod text;
pub mod threshold;
pub mod timeline;
pub mod wire;
pub mod worker;

pub use report::Report;
pub use run::{Error, run};
pub use scenario::{Admin, Scenario};
