//! How far the relay has come with each of its destinations.

use redis::aio::ConnectionLike;
use seckill_domain::{CenterId, OutboxId, Shard};

use crate::error::Error;
use crate::fence::Fence;
use crate::keys;
use crate::reply::Reply;
use crate::scripts::CURSOR;

/// A set of shards, a bit for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShardSet(u64);

impl ShardSet {
    /// Whether a shard is in it.
    pub fn contains(self, shard: Shard) -> bool {
        self.0 & (1 << shard.number()) != 0
    }

    /// Those that are in this set and not in the other.
    pub fn without(self, other: ShardSet) -> ShardSet {
        ShardSet(self.0 & !other.0)
    }

    /// Whether there is none in it.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The shards in order.
    pub fn iter(self) -> impl Iterator<Item = Shard> {
        Shard::all().filter(move |shard| self.contains(*shard))
    }
}

impl FromIterator<Shard> for ShardSet {
    fn from_iter<I: IntoIterator<Item = Shard>>(shards: I) -> ShardSet {
        ShardSet(shards.into_iter().fold(0, |set, shard| set | 1 << shard.number()))
    }
}

/// Up to where a destination has acknowledged everything that is for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// The last such entry of the outbox.
    pub id: OutboxId,
    /// The shards that were at home there then: what others have in the outbox was never sent there.
    pub shards: ShardSet,
}

/// What became of a cursor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CursorOutcome {
    /// It is noted.
    Noted,
    /// Somebody noted a later one: read it again.
    Behind,
    /// The ledger has no such entry: it is not the one that was read.
    Ahead,
}

/// The cursor of a destination, if one was ever noted.
pub async fn cursor(conn: &mut impl ConnectionLike, destination: &CenterId) -> Result<Option<Cursor>, Error> {
    let noted: Option<String> =
        redis::cmd("HGET").arg(keys::CURSORS).arg(destination.as_str()).query_async(conn).await?;
    let Some(noted) = noted else { return Ok(None) };
    let parsed = noted.split_once(' ').and_then(|(id, shards)| {
        Some(Cursor { id: id.parse().ok()?, shards: ShardSet(u64::from_str_radix(shards, 16).ok()?) })
    });
    match parsed {
        Some(cursor) => Ok(Some(cursor)),
        None => Err(Error::Damaged(format!("the cursor of {destination} is {noted:?}"))),
    }
}

/// Notes a cursor. It never goes back.
pub async fn set_cursor(
    conn: &mut impl ConnectionLike,
    fence: &Fence,
    destination: &CenterId,
    cursor: Cursor,
) -> Result<CursorOutcome, Error> {
    let call = CURSOR
        .call(3)
        .arg(keys::FENCE)
        .arg(keys::SEQ)
        .arg(keys::CURSORS)
        .arg(fence.to_string())
        .arg(fence.epoch.0)
        .arg(destination.as_str())
        .arg(cursor.id.epoch)
        .arg(cursor.id.seq)
        .arg(format!("{:016x}", cursor.shards.0));
    let reply = Reply::parse(call.run(conn).await?)?;
    match reply.code.as_str() {
        "OK" => Ok(CursorOutcome::Noted),
        "BEHIND" => Ok(CursorOutcome::Behind),
        "AHEAD" => Ok(CursorOutcome::Ahead),
        _ => Err(reply.unknown()),
    }
}
