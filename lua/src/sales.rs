//! Creating, changing and ending sales, and their stock.

use redis::aio::ConnectionLike;
use seckill_domain::{KeyDigest, LedgerState, SaleId, SaleSpec};

use crate::error::Error;
use crate::fence::Fence;
use crate::keys;
use crate::reply::Reply;
use crate::scripts::{ARCHIVE, CREATE, Call, STATE, STOCK, Script, UPDATE};

/// The largest number of units that one sale may have; exact in Lua's numbers.
pub const MAX_TOTAL: u64 = 1_000_000_000_000;

/// What became of a creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CreateOutcome {
    /// It is on offer.
    Created {
        /// The sale's version.
        version: u64,
    },
    /// The same body was created before.
    Same {
        /// The version it has now.
        version: u64,
    },
    /// Another sale has this id.
    Exists,
}

/// What became of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpdateOutcome {
    /// Changed.
    Updated {
        /// The new version.
        version: u64,
    },
    /// The sale has moved on since the version that the change was based on.
    OtherVersion {
        /// The version it has now.
        version: u64,
    },
    /// There is no such sale.
    NotFound,
    /// The sale is over.
    Ended,
    /// The sale has started meanwhile, and the change is allowed before the start only.
    Started,
}

/// A state that an operator can bring a sale into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateChange {
    /// Halt it.
    Pause,
    /// Go on.
    Resume,
    /// End it for good.
    End,
}

/// What became of a state change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateOutcome {
    /// Changed.
    Changed {
        /// The new version.
        version: u64,
    },
    /// It was in that state already.
    Same {
        /// Its version.
        version: u64,
    },
    /// There is no such sale.
    NotFound,
    /// The sale is over for good.
    Ended,
}

/// What became of a stock change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StockOutcome {
    /// Done, now or before under the same key.
    Changed {
        /// Units on offer in all.
        total: u64,
        /// Units left right after the change.
        remaining: u64,
        /// The sale's version after the change.
        version: u64,
        /// Whether this answers an earlier call again.
        replayed: bool,
    },
    /// The key was used before with another change.
    KeyReused,
    /// More would be taken away than is left.
    BelowClaimed {
        /// What is left.
        remaining: u64,
    },
    /// The sale would have more than [`MAX_TOTAL`] units.
    TooLarge,
    /// The sale's stock has been changed too often (100,000 times).
    TooMany,
    /// There is no such sale.
    NotFound,
    /// The sale is over.
    Ended,
}

/// What became of an archive call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArchiveOutcome {
    /// The claims and tombstones are gone.
    Archived {
        /// The new version.
        version: u64,
    },
    /// It was archived before.
    Same {
        /// Its version.
        version: u64,
    },
    /// There is no such sale.
    NotFound,
    /// The sale is still on.
    NotEnded,
    /// Buyers may still retry.
    RetryWindow {
        /// For how long, in ms.
        left_ms: u64,
    },
    /// Something happened in the sale since the caller looked.
    Changed {
        /// The sequence of the last change.
        touched: u64,
    },
}

fn call(script: &'static Script, more_keys: usize, fence: &Fence, sale: &SaleId) -> Call {
    let mut call = script
        .call(6 + more_keys)
        .arg(keys::FENCE)
        .arg(keys::CLOCK)
        .arg(keys::SEQ)
        .arg(keys::OUTBOX)
        .arg(keys::TOUCHED)
        .arg(keys::sale(sale));
    if more_keys == 0 {
        push_call(&mut call, fence, sale);
    }
    call
}

fn push_call(call: &mut Call, fence: &Fence, sale: &SaleId) {
    call.push(fence.to_string());
    call.push(sale.as_str());
    call.push(fence.epoch.0);
}

fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Rejected(error.to_string()))
}

fn terms(spec: &SaleSpec) -> Result<String, Error> {
    json(&spec.terms().map_err(|error| Error::Rejected(error.to_string()))?)
}

fn ms(at: Option<seckill_domain::Millis>) -> String {
    at.map_or_else(String::new, |at| at.0.to_string())
}

/// Puts a validated sale on offer. `digest` names the body as the shop sent it.
pub async fn create_sale(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    spec: &SaleSpec,
    digest: &KeyDigest,
) -> Result<CreateOutcome, Error> {
    let call = call(&CREATE, 0, fence, &spec.sale_id)
        .arg(&digest[..])
        .arg(json(spec)?)
        .arg(terms(spec)?)
        .arg(spec.quantity)
        .arg(ms(spec.starts_at))
        .arg(ms(spec.ends_at))
        .arg(spec.per_user_limit);
    let mut reply = Reply::parse(call.run(conn).await?)?;
    match reply.code.as_str() {
        "OK" => Ok(CreateOutcome::Created { version: reply.number()? }),
        "SAME" => Ok(CreateOutcome::Same { version: reply.number()? }),
        "EXISTS" => Ok(CreateOutcome::Exists),
        _ => Err(reply.unknown()),
    }
}

/// Replaces a sale's description by `spec` (validated, see [`SaleSpec::patched`]) if it still has the version
/// `based_on`. With `before_start` the change happens only before the sale's start.
pub async fn update_sale(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    spec: &SaleSpec,
    based_on: u64,
    before_start: bool,
) -> Result<UpdateOutcome, Error> {
    let call = call(&UPDATE, 0, fence, &spec.sale_id)
        .arg(based_on)
        .arg(json(spec)?)
        .arg(terms(spec)?)
        .arg(ms(spec.starts_at))
        .arg(ms(spec.ends_at))
        .arg(spec.per_user_limit)
        .arg(u8::from(before_start));
    let mut reply = Reply::parse(call.run(conn).await?)?;
    match reply.code.as_str() {
        "OK" => Ok(UpdateOutcome::Updated { version: reply.number()? }),
        "VERSION" => Ok(UpdateOutcome::OtherVersion { version: reply.number()? }),
        "NOT_FOUND" => Ok(UpdateOutcome::NotFound),
        "ENDED" => Ok(UpdateOutcome::Ended),
        "STARTED" => Ok(UpdateOutcome::Started),
        _ => Err(reply.unknown()),
    }
}

/// Pauses, resumes or ends a sale.
pub async fn set_state(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    sale: &SaleId,
    change: StateChange,
) -> Result<StateOutcome, Error> {
    let state = match change {
        StateChange::Pause => LedgerState::Paused,
        StateChange::Resume => LedgerState::Active,
        StateChange::End => LedgerState::Ended,
    };
    let mut reply = Reply::parse(call(&STATE, 0, fence, sale).arg(state.as_str()).run(conn).await?)?;
    match reply.code.as_str() {
        "OK" => Ok(StateOutcome::Changed { version: reply.number()? }),
        "SAME" => Ok(StateOutcome::Same { version: reply.number()? }),
        "NOT_FOUND" => Ok(StateOutcome::NotFound),
        "ENDED" => Ok(StateOutcome::Ended),
        _ => Err(reply.unknown()),
    }
}

/// Adds (`delta > 0`) or takes away units, once for each key.
pub async fn add_stock(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    sale: &SaleId,
    delta: i64,
    key: &KeyDigest,
) -> Result<StockOutcome, Error> {
    let mut call = call(&STOCK, 1, fence, sale).arg(keys::stock_changes(sale));
    push_call(&mut call, fence, sale);
    let call = call.arg(keys::NEWS).arg(&key[..]).arg(delta).arg(MAX_TOTAL);
    let mut reply = Reply::parse(call.run(conn).await?)?;
    match reply.code.as_str() {
        "OK" | "REPLAY" => Ok(StockOutcome::Changed {
            replayed: reply.code == "REPLAY",
            total: reply.number()?,
            remaining: reply.number()?,
            version: reply.number()?,
        }),
        "KEY_REUSED" => Ok(StockOutcome::KeyReused),
        "BELOW_CLAIMED" => Ok(StockOutcome::BelowClaimed { remaining: reply.number()? }),
        "TOO_LARGE" => Ok(StockOutcome::TooLarge),
        "TOO_MANY" => Ok(StockOutcome::TooMany),
        "NOT_FOUND" => Ok(StockOutcome::NotFound),
        "ENDED" => Ok(StockOutcome::Ended),
        _ => Err(reply.unknown()),
    }
}

/// Drops the claims of a sale that is over. The caller has seen, at the sale's change number `touched`, that
/// every entry is stored, every order final and every release done (M1).
pub async fn archive(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    sale: &SaleId,
    retry_window_ms: u64,
    touched: u64,
) -> Result<ArchiveOutcome, Error> {
    let mut call = call(&ARCHIVE, 2, fence, sale).arg(keys::claims(sale)).arg(keys::stock_changes(sale));
    push_call(&mut call, fence, sale);
    let mut reply = Reply::parse(call.arg(retry_window_ms).arg(touched).run(conn).await?)?;
    match reply.code.as_str() {
        "OK" => Ok(ArchiveOutcome::Archived { version: reply.number()? }),
        "SAME" => Ok(ArchiveOutcome::Same { version: reply.number()? }),
        "NOT_FOUND" => Ok(ArchiveOutcome::NotFound),
        "NOT_ENDED" => Ok(ArchiveOutcome::NotEnded),
        "RETRY_WINDOW" => Ok(ArchiveOutcome::RetryWindow { left_ms: reply.number()? }),
        "CHANGED" => Ok(ArchiveOutcome::Changed { touched: reply.number()? }),
        _ => Err(reply.unknown()),
    }
}
