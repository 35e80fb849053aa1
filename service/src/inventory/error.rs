//! Why a purchase or a change of a sale did not happen, or may have happened.

use std::sync::Arc;

use seckill_domain::{InvalidSale, Millis};
use seckill_ledger::Executed;

use crate::topology::{Cause, NoAuthority};

/// Why a purchase was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PurchaseError {
    /// There is no such sale.
    #[error("there is no such sale")]
    SaleNotFound,
    /// The sale is halted.
    #[error("the sale is paused")]
    Paused,
    /// The sale has not begun.
    #[error("the sale starts at {starts_at}")]
    NotStarted {
        /// When it does.
        starts_at: Millis,
        /// Seconds until then, at least 1.
        retry_after_s: u64,
    },
    /// The sale is over.
    #[error("the sale has ended")]
    Ended,
    /// The buyer would hold more than the sale allows.
    #[error("the purchase would exceed the limit per user")]
    LimitExceeded,
    /// Nothing is left.
    #[error("the sale is sold out")]
    SoldOut,
    /// Less is left than asked.
    #[error("only {remaining} left")]
    InsufficientStock {
        /// What is left.
        remaining: u64,
    },
    /// The key was used before with another quantity.
    #[error("the idempotency key was used for another purchase")]
    KeyReused,
    /// The lane is full, or the purchase waited past its deadline before it was sent. Nothing happened.
    #[error("too many purchases are waiting")]
    Overloaded,
    /// This service may not write to the ledger now. Nothing happened.
    #[error("no authority over the ledger: {0}")]
    NoAuthority(Arc<str>),
    /// The master center is moving, for longer than a purchase is held or with more of them than are held. Nothing
    /// happened.
    #[error("the master center is moving")]
    Shifting,
    /// The ledger's memory bound is reached. Nothing happened.
    #[error("the ledger is full")]
    LedgerFull,
    /// The ledger has it, but the other center did not confirm it in time: it may or may not survive.
    #[error("the other center did not confirm it in time")]
    NotReplicated,
    /// The ledger did not answer in time.
    #[error("the ledger cannot be reached")]
    MasterUnreachable {
        /// Whether it may have happened all the same.
        executed: Executed,
    },
}

/// The ledger could not be asked or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// The ledger refused or did not answer.
    #[error(transparent)]
    Ledger(#[from] seckill_ledger::Error),
    /// No connection could be had from the pool.
    #[error("no connection to the ledger: {0}")]
    Pool(String),
    /// This service may not write to the ledger now.
    #[error("no authority over the ledger: {0}")]
    NoAuthority(Arc<str>),
    /// The master center is moving. Nothing happened.
    #[error("the master center is moving")]
    Shifting,
    /// The ledger has the change, but the other center did not confirm it in time: it may or may not survive (K4).
    #[error("the other center did not confirm the change in time")]
    NotReplicated,
}

impl Unavailable {
    /// Whether the call may have changed the ledger.
    pub fn executed(&self) -> Executed {
        match self {
            Unavailable::Ledger(error) => error.executed(),
            Unavailable::NotReplicated => Executed::Unknown,
            Unavailable::Pool(_) | Unavailable::NoAuthority(_) | Unavailable::Shifting => Executed::No,
        }
    }
}

impl From<NoAuthority> for Unavailable {
    fn from(refusal: NoAuthority) -> Self {
        match refusal.cause {
            Cause::Shifting => Unavailable::Shifting,
            _ => Unavailable::NoAuthority(refusal.reason),
        }
    }
}

impl From<deadpool_redis::PoolError> for Unavailable {
    fn from(error: deadpool_redis::PoolError) -> Self {
        Unavailable::Pool(error.to_string())
    }
}

/// Why a sale was not created or changed.
#[derive(Debug, thiserror::Error)]
pub enum SaleError {
    /// There is no such sale.
    #[error("there is no such sale")]
    NotFound,
    /// Another sale has this id.
    #[error("another sale has this id")]
    Exists,
    /// The description or the change was refused.
    #[error(transparent)]
    Invalid(#[from] InvalidSale),
    /// The sale has another version than the change is based on.
    #[error("the sale has version {version}")]
    VersionMismatch {
        /// The version that it has.
        version: u64,
    },
    /// The sale is over.
    #[error("the sale has ended")]
    Ended,
    /// The sale is not over yet.
    #[error("the sale has not ended")]
    NotEnded,
    /// Buyers may still retry.
    #[error("buyers may retry for another {left_s} s")]
    RetryWindow {
        /// For how long, seconds.
        left_s: u64,
    },
    /// Something of the sale is still under way.
    #[error("not final yet: {0}")]
    NotFinal(String),
    /// The key was used before with another change.
    #[error("the idempotency key was used for another change")]
    KeyReused,
    /// More units would be taken away than are left.
    #[error("only {remaining} units are left to take away")]
    BelowClaimed {
        /// What is left.
        remaining: u64,
    },
    /// A bound of the ledger.
    #[error("{0}")]
    Bound(&'static str),
    /// The ledger could not be asked or did not answer.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

impl From<seckill_ledger::Error> for SaleError {
    fn from(error: seckill_ledger::Error) -> Self {
        SaleError::Unavailable(Unavailable::Ledger(error))
    }
}
