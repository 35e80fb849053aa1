//! The words of a flash sale: ids, shards, sales, orders.
//!
//! This crate does no I/O and imports nothing else of ours. Everything that comes from outside is parsed
//! into one of these types once, at the edge, and trusted from there on.

mod ids;
mod money;
mod order;
mod sale;
mod shard;
mod time;

pub use ids::{
    CenterId, CenterNumber, Epoch, IdempotencyKey, InvalidId, KeyDigest, OrderId, OutboxId, SaleId, Uid,
};
pub use money::{Currency, InvalidMoney, Money, Quantity};
pub use order::{CouponState, OrderRecord, OrderStatus, UnknownState};
pub use sale::{
    CouponTerms, DEFAULT_PAYMENT_TTL_S, InvalidSale, LedgerState, SaleKind, SalePatch, SalePhase, SaleSpec,
    SaleTerms,
};
pub use shard::{SHARDS, Shard, TABLES, Table};
pub use time::{Clock, ManualClock, Millis, SystemClock};
