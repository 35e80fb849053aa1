//! Init, adopt, the fence, the barrier, trimming, and claiming again what an adopted ledger does not know.

use redis::aio::ConnectionLike;
use seckill_domain::{KeyDigest, Millis, OrderId, OutboxId, Quantity, SaleId, Uid};

use crate::error::Error;
use crate::fence::Fence;
use crate::keys;
use crate::reply::Reply;
use crate::reserve::{MAX_BATCH, claim_head};
use crate::scripts::{BARRIER, FENCE, RECLAIM, TRIM};

/// How a fence is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FenceChange {
    /// An empty Redis becomes a ledger.
    Init,
    /// Whatever this ledger's past is, it is the truth from here on. The new epoch must be later than any epoch
    /// of the topology and of every stored outbox position, too: an older ledger does not know those.
    Adopt,
    /// The next epoch begins; this fence must be there.
    Lift {
        /// The fence that is expected.
        from: Fence,
    },
}

/// What became of a fence change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FenceOutcome {
    /// The fence is set.
    Set,
    /// It was set already.
    Same,
    /// Init: this is a ledger already.
    Exists {
        /// Its fence.
        fence: String,
    },
    /// Init: keys of a ledger are there, but no fence.
    NotEmpty,
    /// Lift: another fence, or none, was found.
    Mismatch {
        /// What was found.
        found: Option<String>,
    },
    /// The fence or the outbox has reached that epoch or a later one: ids could repeat. Take a later one.
    EpochTooLow {
        /// The epoch that was reached.
        last: u64,
    },
}

impl FenceOutcome {
    pub(crate) fn parse(mut reply: Reply) -> Result<FenceOutcome, Error> {
        Ok(match reply.code.as_str() {
            "OK" => FenceOutcome::Set,
            "SAME" => FenceOutcome::Same,
            "EXISTS" => FenceOutcome::Exists { fence: reply.text()? },
            "NOT_EMPTY" => FenceOutcome::NotEmpty,
            "MISMATCH" => {
                let found = reply.text()?;
                FenceOutcome::Mismatch { found: (!found.is_empty()).then_some(found) }
            }
            "EPOCH_TOO_LOW" => FenceOutcome::EpochTooLow { last: reply.number()? },
            _ => return Err(reply.unknown()),
        })
    }
}

/// The arguments of the fence script behind its number of keys.
pub(crate) fn fence_args(change: &FenceChange, to: &Fence, check_only: bool) -> [String; 10] {
    let (how, from) = match change {
        FenceChange::Init => ("init", String::new()),
        FenceChange::Adopt => ("adopt", String::new()),
        FenceChange::Lift { from } => ("lift", from.to_string()),
    };
    [
        keys::FENCE.to_owned(),
        keys::CLOCK.to_owned(),
        keys::SEQ.to_owned(),
        keys::OUTBOX.to_owned(),
        how.to_owned(),
        to.to_string(),
        to.epoch.to_string(),
        keys::NEWS.to_owned(),
        from,
        if check_only { "check".to_owned() } else { String::new() },
    ]
}

/// Sets the fence on a master.
pub async fn set_fence(
    conn: &mut impl ConnectionLike,
    change: &FenceChange,
    to: &Fence,
) -> Result<FenceOutcome, Error> {
    let mut call = FENCE.call(4);
    for arg in fence_args(change, to, false) {
        call.push(arg);
    }
    FenceOutcome::parse(Reply::parse(call.run(conn).await?)?)
}

/// A small fenced write: the heartbeat, and what a `WAIT` stands behind. Returns the ledger's time.
pub async fn barrier(conn: &mut impl ConnectionLike, fence: &Fence) -> Result<Millis, Error> {
    let call = BARRIER.call(2).arg(keys::FENCE).arg(keys::CLOCK).arg(fence.to_string());
    let mut reply = Reply::parse(call.run(conn).await?)?;
    match reply.code.as_str() {
        "OK" => Ok(Millis(i64::try_from(reply.number()?).unwrap_or(i64::MAX))),
        _ => Err(reply.unknown()),
    }
}

/// Drops outbox entries before `keep_from`, in whole stream nodes, some thousand a call; the newest entry always
/// stays. Returns how many were dropped: call again until that is 0.
pub async fn trim(conn: &mut impl ConnectionLike, fence: &Fence, keep_from: OutboxId) -> Result<u64, Error> {
    let call = TRIM
        .call(3)
        .arg(keys::FENCE)
        .arg(keys::SEQ)
        .arg(keys::OUTBOX)
        .arg(fence.to_string())
        .arg(fence.epoch.0)
        .arg(keep_from.epoch)
        .arg(keep_from.seq);
    let mut reply = Reply::parse(call.run(conn).await?)?;
    match reply.code.as_str() {
        "OK" => reply.number(),
        _ => Err(reply.unknown()),
    }
}

/// A stored order whose units are to be claimed again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReclaimEntry {
    /// The order, as stored.
    pub order_id: OrderId,
    /// Whose it is.
    pub uid: Uid,
    /// How many units.
    pub quantity: Quantity,
    /// Digest of the key that it was bought under; zeros if that is not known.
    pub key: KeyDigest,
}

/// What became of one order that was to be claimed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReclaimOutcome {
    /// Its units are claimed again.
    Claimed,
    /// The ledger knows the order.
    Held,
    /// The user holds another order that was bought under the same key.
    OtherOrder,
    /// The user would be above the limit.
    Limit,
    /// Not enough is left.
    NotEnough,
    /// The ledger has no such sale.
    NoSale,
    /// The sale is archived: its claims are gone.
    Archived,
}

/// Claims units of stored orders again (at most [`MAX_BATCH`], all of one sale), under the orders' own ids. Where the
/// key that one was bought under is not known any more, a client that still retries may buy again if the limit allows.
pub async fn reclaim(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    sale: &SaleId,
    entries: &[ReclaimEntry],
) -> Result<Vec<ReclaimOutcome>, Error> {
    assert!((1..=MAX_BATCH).contains(&entries.len()), "a batch has 1 to {MAX_BATCH} entries");
    let mut call = RECLAIM
        .call(7)
        .arg(keys::FENCE)
        .arg(keys::CLOCK)
        .arg(keys::SEQ)
        .arg(keys::OUTBOX)
        .arg(keys::TOUCHED)
        .arg(keys::sale(sale))
        .arg(keys::claims(sale))
        .arg(fence.to_string())
        .arg(sale.as_str())
        .arg(fence.epoch.0);
    let mut claims = Vec::with_capacity(entries.len() * 29);
    for entry in entries {
        let head = claim_head(&entry.key, entry.order_id.head(), entry.quantity);
        claims.extend_from_slice(&head);
        claims.extend_from_slice(&entry.order_id.seq().to_be_bytes()[3..]);
    }
    call.push(&claims[..]);
    for entry in entries {
        call.push(entry.uid.as_str());
    }
    let mut reply = Reply::parse(call.run(conn).await?)?;
    if reply.code != "OK" {
        return Err(reply.unknown());
    }
    let codes = reply.bytes()?;
    if codes.len() != entries.len() {
        return Err(Error::Malformed(format!("{} outcomes for {} claims", codes.len(), entries.len())));
    }
    codes
        .into_iter()
        .map(|code| match code {
            b'C' => Ok(ReclaimOutcome::Claimed),
            b'H' => Ok(ReclaimOutcome::Held),
            b'K' => Ok(ReclaimOutcome::OtherOrder),
            b'L' => Ok(ReclaimOutcome::Limit),
            b'S' => Ok(ReclaimOutcome::NotEnough),
            b'N' => Ok(ReclaimOutcome::NoSale),
            b'A' => Ok(ReclaimOutcome::Archived),
            other => Err(Error::Malformed(format!("outcome {other:?} of a claim"))),
        })
        .collect()
}
