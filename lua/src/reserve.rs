//! `reserve`: a batch of purchases of one sale, decided in one call.

use std::collections::HashSet;

use redis::aio::ConnectionLike;
use seckill_domain::{CenterNumber, KeyDigest, Millis, OrderId, OutboxId, Quantity, SaleId, Uid};

use crate::error::Error;
use crate::fence::Fence;
use crate::keys;
use crate::reply::Reply;
use crate::scripts::RESERVE;

/// Entries in one call at most. Lua's `unpack` bears 8,000 values; a call of this size takes Redis about 1 ms.
pub const MAX_BATCH: usize = 1024;

/// The fixed part of a claim: everything but the sequence.
const HEAD_BYTES: usize = 24;
/// Room for a line of the outbox record with a short user id and no trace context.
const USUAL_LINE_BYTES: usize = 32;
/// The longest trace context that goes into a record: version 00 of `traceparent`.
const MAX_TRACEPARENT: usize = 55;

/// One purchase.
#[derive(Debug, Clone)]
pub struct ReserveEntry {
    /// Who buys.
    pub uid: Uid,
    /// Digest of the idempotency key; its scope is (user, sale).
    pub key: KeyDigest,
    /// How many units.
    pub quantity: Quantity,
    /// The buyer's home center, for the order id.
    pub center: CenterNumber,
    /// W3C trace context, copied into the outbox record if it is at most 55 visible ASCII characters, else left
    /// out.
    pub traceparent: Option<Box<str>>,
}

/// What became of one purchase, in the order in which the ledger checks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReserveOutcome {
    /// It was accepted before under this key, whatever became of the order since.
    Replay(OrderId),
    /// The key was used before with another quantity.
    KeyReused,
    /// There is no such sale, or it is archived.
    NotFound,
    /// The sale is halted.
    Paused,
    /// The sale has not begun.
    NotStarted {
        /// When it does.
        starts_at: Millis,
    },
    /// The sale is over.
    Ended,
    /// The user would hold more than the sale allows.
    Limit,
    /// Nothing is left.
    SoldOut,
    /// Less is left than asked.
    Insufficient {
        /// What is left.
        remaining: u64,
    },
    /// Accepted and in the outbox.
    Accepted(OrderId),
}

/// Where a sale's stock stood when a reply was given: what a sold-out marker is worth (M3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StockMark {
    /// Epoch and sequence of the last entry in the outbox at that moment.
    pub outbox: OutboxId,
    /// How often stock had come back.
    pub revision: u64,
}

/// The answer to a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReserveReply {
    /// One outcome for each entry, in order.
    pub outcomes: Vec<ReserveOutcome>,
    /// The ledger's time.
    pub now: Millis,
    /// Where the stock stood behind this batch.
    pub mark: StockMark,
}

/// Decides a batch of at most [`MAX_BATCH`] purchases of one sale. Entries that repeat each other behave as if
/// they came one after the other.
pub async fn reserve(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    partition: u8,
    sale: &SaleId,
    entries: &[ReserveEntry],
) -> Result<ReserveReply, Error> {
    assert!((1..=MAX_BATCH).contains(&entries.len()), "a batch has 1 to {MAX_BATCH} entries");
    let first = entries[0].quantity;
    let uniform = entries.iter().all(|entry| entry.quantity == first);
    let mut call = RESERVE
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
        .arg(if uniform { first.get() } else { 0 });
    let mut heads = Vec::with_capacity(entries.len());
    let mut claim_heads = Vec::with_capacity(entries.len() * HEAD_BYTES);
    let mut lines = Vec::with_capacity(entries.len() * USUAL_LINE_BYTES);
    for entry in entries {
        let id_head = OrderId::head_of(entry.center, entry.uid.table(), partition, fence.epoch);
        heads.push(id_head);
        claim_heads.extend_from_slice(&claim_head(&entry.key, id_head, entry.quantity));
        write_line(&mut lines, id_head, entry);
    }
    call.push(&claim_heads[..]);
    call.push(&lines[..]);
    call.push(u8::from(several_of_a_user(entries)));
    for entry in entries {
        call.push(entry.uid.as_str());
    }
    let mut reply = Reply::parse(call.run(conn).await?)?;
    match reply.code.as_str() {
        "OK" => {}
        "SEQUENCE_EXHAUSTED" => {
            return Err(Error::Rejected("the ledger has handed out its last order id".to_owned()));
        }
        _ => return Err(reply.unknown()),
    }
    let seq = reply.number()?;
    let now = Millis(i64::try_from(reply.number()?).unwrap_or(i64::MAX));
    let revision = reply.number()?;
    let codes = reply.bytes()?;
    let extras = reply.bytes()?;
    Ok(ReserveReply {
        outcomes: outcomes(&codes, &extras, &heads, seq)?,
        now,
        mark: StockMark { outbox: OutboxId { epoch: fence.epoch.0, seq }, revision },
    })
}

/// Whether a user has more than one entry.
fn several_of_a_user(entries: &[ReserveEntry]) -> bool {
    let mut users = HashSet::with_capacity(entries.len());
    !entries.iter().all(|entry| users.insert(entry.uid.as_str()))
}

/// The fixed part of a claim (see [`keys`]): everything but the sequence.
pub(crate) fn claim_head(key: &KeyDigest, id_head: u32, quantity: Quantity) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..16].copy_from_slice(key);
    head[16..20].copy_from_slice(&id_head.to_be_bytes());
    head[20..23].copy_from_slice(&quantity.get().to_be_bytes()[1..]);
    head
}

fn write_line(line: &mut Vec<u8>, id_head: u32, entry: &ReserveEntry) {
    let mut digits = [b'0'; 9];
    let mut rest = id_head;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    line.extend_from_slice(&digits);
    line.push(b' ');
    if entry.quantity == Quantity::ONE {
        line.push(b'1');
    } else {
        line.extend_from_slice(entry.quantity.get().to_string().as_bytes());
    }
    line.push(b' ');
    line.extend_from_slice(entry.uid.as_str().as_bytes());
    // What would tear the record apart is not worth keeping.
    if let Some(traceparent) = &entry.traceparent
        && (1..=MAX_TRACEPARENT).contains(&traceparent.len())
        && traceparent.bytes().all(|byte| (0x21..=0x7e).contains(&byte))
    {
        line.push(b' ');
        line.extend_from_slice(traceparent.as_bytes());
    }
    line.push(b'\n');
}

fn outcomes(
    codes: &[u8],
    mut extras: &[u8],
    heads: &[u32],
    last_seq: u64,
) -> Result<Vec<ReserveOutcome>, Error> {
    if codes.len() != heads.len() {
        return Err(Error::Malformed(format!("{} outcomes for {} entries", codes.len(), heads.len())));
    }
    let accepted = codes.iter().filter(|code| **code == b'A').count() as u64;
    let mut seq = last_seq
        .checked_sub(accepted)
        .ok_or_else(|| Error::Malformed("more orders than the sequence has numbers".to_owned()))?;
    let order = |head, seq| {
        OrderId::from_parts(head, seq).ok_or_else(|| Error::Malformed(format!("order id {head} {seq}")))
    };
    codes
        .iter()
        .zip(heads)
        .map(|(code, head)| {
            Ok(match code {
                b'A' => {
                    seq += 1;
                    ReserveOutcome::Accepted(order(*head, seq)?)
                }
                b'R' => {
                    let head = be(take(&mut extras, 4)?);
                    let seq = be(take(&mut extras, 5)?);
                    ReserveOutcome::Replay(order(head as u32, seq)?)
                }
                b'K' => ReserveOutcome::KeyReused,
                b'N' => ReserveOutcome::NotFound,
                b'P' => ReserveOutcome::Paused,
                b'T' => ReserveOutcome::NotStarted { starts_at: Millis(be(take(&mut extras, 6)?) as i64) },
                b'E' => ReserveOutcome::Ended,
                b'L' => ReserveOutcome::Limit,
                b'S' => ReserveOutcome::SoldOut,
                b'I' => ReserveOutcome::Insufficient { remaining: be(take(&mut extras, 5)?) },
                other => return Err(Error::Malformed(format!("outcome {other:?} of an entry"))),
            })
        })
        .collect()
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Result<&'a [u8], Error> {
    let (head, rest) =
        bytes.split_at_checked(n).ok_or_else(|| Error::Malformed("the reply ends too early".to_owned()))?;
    *bytes = rest;
    Ok(head)
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
