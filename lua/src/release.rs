//! `release`: gives the quantity of cancelled and expired orders back, each once.

use redis::aio::ConnectionLike;
use seckill_domain::{OrderId, SaleId, Uid};

use crate::error::Error;
use crate::fence::Fence;
use crate::keys;
use crate::reply::Reply;
use crate::reserve::MAX_BATCH;
use crate::scripts::RELEASE;

/// One order to give back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReleaseEntry {
    /// The order.
    pub order_id: OrderId,
    /// Whose it is.
    pub uid: Uid,
}

/// What became of one release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReleaseOutcome {
    /// The units are on sale again.
    Released,
    /// They were given back before.
    AlreadyReleased,
    /// The ledger holds no such claim; nothing changed.
    Unknown,
}

/// Releases at most [`MAX_BATCH`] orders of one sale. Idempotent by order id.
pub async fn release(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    sale: &SaleId,
    entries: &[ReleaseEntry],
) -> Result<Vec<ReleaseOutcome>, Error> {
    assert!((1..=MAX_BATCH).contains(&entries.len()), "a batch has 1 to {MAX_BATCH} entries");
    let mut call = RELEASE
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
        .arg(fence.epoch.0)
        .arg(keys::NEWS);
    let mut orders = Vec::with_capacity(entries.len() * 9);
    let mut lines = String::with_capacity(entries.len() * 20);
    for entry in entries {
        orders.extend_from_slice(&order_bytes(entry.order_id));
        lines.push_str(&entry.order_id.to_string());
        lines.push('\n');
    }
    call.push(&orders[..]);
    call.push(lines);
    for entry in entries {
        call.push(entry.uid.as_str());
    }
    let mut reply = Reply::parse(call.run(conn).await?)?;
    if reply.code != "OK" {
        return Err(reply.unknown());
    }
    let codes = reply.bytes()?;
    if codes.len() != entries.len() {
        return Err(Error::Malformed(format!("{} outcomes for {} releases", codes.len(), entries.len())));
    }
    codes
        .into_iter()
        .map(|code| match code {
            b'R' => Ok(ReleaseOutcome::Released),
            b'A' => Ok(ReleaseOutcome::AlreadyReleased),
            b'U' => Ok(ReleaseOutcome::Unknown),
            other => Err(Error::Malformed(format!("outcome {other:?} of a release"))),
        })
        .collect()
}

/// How a claim names its order: head in 4 bytes, sequence in 5, big endian.
fn order_bytes(order_id: OrderId) -> [u8; 9] {
    let mut bytes = [0; 9];
    bytes[..4].copy_from_slice(&order_id.head().to_be_bytes());
    bytes[4..].copy_from_slice(&order_id.seq().to_be_bytes()[3..]);
    bytes
}
