//! The parts of production, started, killed, paused and started again.

#![allow(clippy::unwrap_used, reason = "a test that cannot prepare itself has nothing to say")]

mod link;
mod parts;
mod services;
