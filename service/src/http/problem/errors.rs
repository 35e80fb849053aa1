//! What each module's errors are to clients.

use seckill_ledger::Executed;

use super::{Code, Problem};
use crate::admission::{Limited, Unauthenticated};
use crate::archive;
use crate::inventory::{PurchaseError, SaleError, Unavailable};
use crate::orders;
use crate::shift::{Refusal, ShiftError};
use crate::topology::StoreError;

impl From<Unauthenticated> for Problem {
    fn from(_: Unauthenticated) -> Self {
        Problem::new(Code::Unauthenticated)
    }
}

impl From<Limited> for Problem {
    fn from(limited: Limited) -> Self {
        let mut problem = Problem::new(Code::RateLimited).retry_after(limited.retry_after_s.into());
        problem.more().limited = Some(limited);
        problem
    }
}

impl From<PurchaseError> for Problem {
    fn from(error: PurchaseError) -> Self {
        match error {
            PurchaseError::SaleNotFound => Problem::new(Code::SaleNotFound),
            PurchaseError::Paused => Problem::new(Code::Paused),
            PurchaseError::NotStarted { starts_at, retry_after_s } => {
                Problem::with_detail(Code::NotStarted, format!("The sale starts at {starts_at}"))
                    .member("starts_at", starts_at)
                    .retry_after(retry_after_s)
            }
            PurchaseError::Ended => Problem::new(Code::Ended),
            PurchaseError::LimitExceeded => Problem::new(Code::LimitExceeded),
            PurchaseError::SoldOut => Problem::new(Code::SoldOut),
            PurchaseError::InsufficientStock { remaining } => {
                Problem::with_detail(Code::InsufficientStock, format!("Only {remaining} left"))
                    .member("remaining", remaining)
            }
            PurchaseError::KeyReused => Problem::new(Code::IdempotencyKeyReused),
            PurchaseError::Overloaded => Problem::new(Code::Overloaded).executed(Executed::No),
            // The reason is for operators: it is in the log, in the metrics and in /readyz.
            PurchaseError::NoAuthority(_) => Problem::new(Code::NoAuthority).executed(Executed::No),
            PurchaseError::Shifting => Problem::new(Code::Shifting).executed(Executed::No),
            PurchaseError::LedgerFull => Problem::new(Code::LedgerFull).executed(Executed::No),
            PurchaseError::NotReplicated => Problem::new(Code::NotReplicated).executed(Executed::Unknown),
            PurchaseError::MasterUnreachable { executed } => {
                Problem::new(Code::MasterUnreachable).executed(executed)
            }
        }
    }
}

impl From<Unavailable> for Problem {
    fn from(error: Unavailable) -> Self {
        let executed = error.executed();
        match error {
            Unavailable::NoAuthority(reason) => {
                Problem::with_detail(Code::NoAuthority, reason.to_string()).executed(executed)
            }
            Unavailable::Shifting => Problem::new(Code::Shifting).executed(executed),
            Unavailable::NotReplicated => Problem::new(Code::NotReplicated).executed(executed),
            // The epoch ended between the permission and the write.
            Unavailable::Ledger(seckill_ledger::Error::Refused(
                seckill_ledger::Refusal::StaleEpoch { .. } | seckill_ledger::Refusal::FutureEpoch { .. },
            )) => Problem::new(Code::Shifting).executed(executed),
            Unavailable::Ledger(seckill_ledger::Error::Full) => {
                Problem::new(Code::LedgerFull).executed(executed)
            }
            Unavailable::Ledger(error) => {
                Problem::new(Code::MasterUnreachable).executed(executed).caused_by(error)
            }
            Unavailable::Pool(error) => {
                Problem::new(Code::MasterUnreachable).executed(executed).caused_by(error)
            }
        }
    }
}

impl From<SaleError> for Problem {
    fn from(error: SaleError) -> Self {
        match error {
            SaleError::NotFound => Problem::new(Code::SaleNotFound),
            SaleError::Exists => Problem::new(Code::SaleExists),
            SaleError::Invalid(invalid @ seckill_domain::InvalidSale::Started(_)) => {
                Problem::with_detail(Code::SaleStarted, invalid.to_string())
            }
            SaleError::Invalid(invalid) => Problem::bad_request(invalid.to_string()),
            SaleError::VersionMismatch { version } => {
                Problem::with_detail(Code::VersionMismatch, format!("The sale has version {version}"))
                    .member("version", version)
            }
            SaleError::Ended => Problem::new(Code::Ended),
            SaleError::NotEnded => Problem::new(Code::NotEnded),
            SaleError::RetryWindow { left_s } => {
                Problem::with_detail(Code::NotFinal, format!("Buyers may retry for another {left_s} s"))
                    .retry_after(left_s)
            }
            SaleError::NotFinal(what) => Problem::with_detail(Code::NotFinal, what),
            SaleError::KeyReused => Problem::new(Code::IdempotencyKeyReused),
            SaleError::BelowClaimed { remaining } => {
                let detail = format!("Only {remaining} units are left to take away");
                Problem::with_detail(Code::BelowClaimed, detail).member("remaining", remaining)
            }
            SaleError::Bound(what) => Problem::with_detail(Code::BoundReached, what),
            SaleError::Unavailable(unavailable) => unavailable.into(),
        }
    }
}

impl Problem {
    /// The shard of the buyer is on its way to another center.
    pub(in crate::http) fn home_is_moving() -> Problem {
        Problem::with_detail(Code::Shifting, "The buyer's orders are moving to another center")
            .executed(Executed::No)
    }
}

impl From<orders::Error> for Problem {
    fn from(error: orders::Error) -> Self {
        match error {
            orders::Error::Overloaded => Problem::new(Code::Overloaded).executed(Executed::No),
            orders::Error::Closed => Problem::new(Code::OrdersUnavailable).executed(Executed::No),
            orders::Error::NotOwner(_) => Problem::home_is_moving(),
            error @ orders::Error::Unknown(_) => {
                Problem::new(Code::OrdersUnavailable).executed(Executed::Unknown).caused_by(error)
            }
            error if error.is_transient() => {
                Problem::new(Code::OrdersUnavailable).executed(Executed::No).caused_by(error)
            }
            error => Problem::internal(error),
        }
    }
}

impl From<archive::Error> for Problem {
    fn from(error: archive::Error) -> Self {
        match error {
            archive::Error::Sale(error) => error.into(),
            archive::Error::Orders(orders::Untold::Own(error)) => error.into(),
            archive::Error::Orders(error @ orders::Untold::Other { .. }) => {
                Problem::with_detail(Code::OrdersUnavailable, error.to_string()).executed(Executed::No)
            }
        }
    }
}

impl From<ShiftError> for Problem {
    fn from(error: ShiftError) -> Self {
        match error {
            ShiftError::Refused { cause, reason, next, checks } => {
                let code = match cause {
                    Refusal::Unfit => Code::ShiftRefused,
                    Refusal::Running => Code::ShiftRunning,
                    Refusal::Epoch => Code::EpochMismatch,
                    Refusal::Loss => Code::LossNotAccepted,
                    Refusal::Decided => Code::ShiftDecided,
                };
                let problem =
                    Problem::with_detail(code, format!("{reason}. Next: {next}")).member("next", next);
                if checks.is_empty() { problem } else { problem.member("checks", checks) }
            }
            error @ ShiftError::Elsewhere { .. } => {
                Problem::with_detail(Code::CenterUnreachable, error.to_string()).executed(Executed::No)
            }
            error @ ShiftError::NotFound { .. } => {
                Problem::with_detail(Code::ShiftNotFound, error.to_string())
            }
            ShiftError::Unknown { key: _, reason } => {
                let detail = format!("Whether the shift is recorded is not known yet: {reason}");
                Problem::with_detail(Code::NoAuthority, detail).executed(Executed::Unknown)
            }
            ShiftError::Store(error) => error.into(),
        }
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        let executed = match &error {
            StoreError::Unknown { .. } => Executed::Unknown,
            StoreError::Missing { .. }
            | StoreError::Conflict { .. }
            | StoreError::Malformed { .. }
            | StoreError::Unavailable { .. }
            | StoreError::Refused { .. }
            | StoreError::WentBack { .. } => Executed::No,
        };
        Problem::with_detail(Code::NoAuthority, "The topology cannot be changed")
            .executed(executed)
            .caused_by(error)
    }
}
