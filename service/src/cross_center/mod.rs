//! What centers say to each other, over the internal listener: purchases for the master's ledger, releases,
//! changes of sales, questions about orders.
//!
//! Every request is signed (RFC 9421, HMAC-SHA256, over the body's RFC 9530 digest too). A center's long-term key
//! ([`Keyring`]) signs nothing but the request for a session; the session's key, which both sides derive from two
//! nonces ([`session`]), signs everything else. A session lives in one server process and is known to no other, so
//! a recorded request is worth nothing anywhere else, after a restart, or a second time ([`ReplayWindow`]).
//!
//! Over `https://` URLs it all goes through TLS ([`tls`]).
//!
//! What a request must look like, to the letter, stands in [`signature`]. A request that does not is refused with
//! a [`Refusal`] before anything of it is read but its digest.

pub mod calls;
mod client;
mod keyring;
mod refusal;
pub mod session;
pub mod signature;
pub mod tls;
mod window;

pub use client::{CallError, CrossCenter};
pub use keyring::{CrossKey, Keyring, KeyringError, MacKey};
pub use refusal::Refusal;
pub use window::{ReplayWindow, WINDOW};

/// The oldest protocol version that this release speaks.
pub const LOWEST_VERSION: u16 = 1;
/// The newest protocol version that this release speaks.
pub const HIGHEST_VERSION: u16 = 1;
