//! The ledger: what is left of each sale and who holds what.
//!
//! The truth lives in the Redis of the master center and changes only through the scripts in `scripts/`.
//! Every script that writes checks the [`Fence`] first and does nothing when it does not match exactly;
//! everything is validated before the first write, because a script cannot roll back. This crate owns the
//! scripts, is the only place where Redis keys are built, and turns every reply into an enum.
//!
//! The formats are described in [`keys`].

pub mod admin;
mod cursor;
mod error;
mod fence;
pub mod handover;
pub mod keys;
pub mod outbox;
pub mod read;
mod release;
pub mod replication;
mod reply;
mod reserve;
pub mod roles;
mod sales;
mod scripts;
#[cfg(feature = "testkit")]
pub mod testkit;

pub use cursor::{Cursor, CursorOutcome, ShardSet, cursor, set_cursor};
pub use error::{Error, Executed, Refusal};
pub use fence::{Fence, InvalidFence, LedgerId, SCHEMA};
pub use release::{ReleaseEntry, ReleaseOutcome, release};
pub use reserve::{MAX_BATCH, ReserveEntry, ReserveOutcome, ReserveReply, StockMark, reserve};
pub use sales::{
    ArchiveOutcome, CreateOutcome, MAX_TOTAL, StateChange, StateOutcome, StockOutcome, UpdateOutcome,
    add_stock, archive, create_sale, set_state, update_sale,
};
pub use scripts::{load_all, missing};

/// Environment that makes redis-server's allocator (jemalloc, of the system or its own) ask for huge pages; the
/// server's setting `disable-thp no` goes with it. A purchase in a sale with a million claims then costs 13 %
/// more than in one with a thousand instead of 20 %, because most of the difference are misses of the TLB.
pub const HUGE_PAGES: [(&str, &str); 2] = [("MALLOC_CONF", "thp:always"), ("JE_MALLOC_CONF", "thp:always")];
