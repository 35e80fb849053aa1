//! Every key of the ledger, and what it holds.
//!
//! | key | type | holds |
//! | --- | --- | --- |
//! | `sk:fence` | string | `schema:ledger_id:epoch:master`; a key of its own, so that roles change under `WATCH` of it (S2) |
//! | `sk:clock` | string | last time of a write or heartbeat, ms (F5) |
//! | `sk:seq` | string | sequence of the last outbox entry; order ids and outbox ids take their numbers from it |
//! | `sk:outbox` | stream | ids `epoch-sequence` (F4); every change of the ledger is an entry, see [`crate::outbox`] |
//! | `sk:touched` | sorted set | sale id by the sequence of its last change, for incremental snapshots |
//! | `sk:s:SALE` | hash | `state digest def terms total remaining claimed released accepted starts ends limit version revision created`, and `reclaimed` once there is any |
//! | `sk:c:SALE` | hash | user → claims, 29 bytes each: key digest 16, order id head 4, quantity 3, state 1 (0 held, 1 released), sequence 5 |
//! | `sk:cursors` | hash | destination → `epoch-sequence shards`: how far the relay has come, see [`crate::Cursor`] |
//! | `sk:k:SALE` | hash | digest of a stock change's key → `delta total remaining version` as answered |
//!
//! `version` grows with every change that the shop makes to a sale, `revision` with every return of stock
//! (a release, a stock change). The channel [`NEWS`] announces returns as `epoch:sale:revision` and a new
//! epoch as `epoch::`.

use seckill_domain::SaleId;

pub(crate) const FENCE: &str = "sk:fence";
pub(crate) const CLOCK: &str = "sk:clock";
pub(crate) const SEQ: &str = "sk:seq";
pub(crate) const OUTBOX: &str = "sk:outbox";
pub(crate) const CURSORS: &str = "sk:cursors";
pub(crate) const TOUCHED: &str = "sk:touched";
pub(crate) const SALE_PREFIX: &str = "sk:s:";

/// The channel on which the ledger announces that stock came back or an epoch began. Parse a message with
/// [`crate::read::News::parse`].
pub const NEWS: &str = "sk:news";

pub(crate) fn sale(id: &SaleId) -> String {
    format!("{SALE_PREFIX}{id}")
}

pub(crate) fn claims(id: &SaleId) -> String {
    format!("sk:c:{id}")
}

pub(crate) fn stock_changes(id: &SaleId) -> String {
    format!("sk:k:{id}")
}
