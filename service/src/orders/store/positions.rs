//! How far each queue is stored. Positions move in the transaction that stores the orders, from the place that
//! the caller read (R2).

use std::collections::BTreeMap;

use seckill_domain::{CenterId, OutboxId, Shard};
use sqlx::Row;
use sqlx::sqlite::SqliteConnection;

use super::super::batch::{Advance, Place};
use super::super::error::Error;
use super::writer::Tx;

/// What the tables say about every partition's outbox.
#[derive(Debug, Default)]
pub(super) struct Positions {
    /// By inventory partition, as its tailer left it.
    outbox: BTreeMap<u8, OutboxId>,
    /// By inventory partition and shard, as the records in Kafka say.
    marks: BTreeMap<u8, BTreeMap<Shard, OutboxId>>,
    owned: Vec<Shard>,
}

impl Positions {
    pub(super) async fn read(conn: &mut SqliteConnection, center: &CenterId) -> Result<Positions, Error> {
        let mut positions = Positions::default();
        for row in
            sqlx::query("SELECT partition, position FROM outbox_position").fetch_all(&mut *conn).await?
        {
            positions.outbox.insert(row.try_get(0)?, row.try_get::<&str, _>(1)?.parse()?);
        }
        for row in
            sqlx::query("SELECT partition, shard, position FROM kafka_marks").fetch_all(&mut *conn).await?
        {
            let marks = positions.marks.entry(row.try_get(0)?).or_default();
            marks.insert(shard_of(row.try_get(1)?)?, row.try_get::<&str, _>(2)?.parse()?);
        }
        let owned = sqlx::query("SELECT shard FROM shard_owner WHERE owner = ?")
            .bind(center.as_str())
            .fetch_all(conn)
            .await?;
        for row in owned {
            positions.owned.push(shard_of(row.try_get(0)?)?);
        }
        Ok(positions)
    }

    /// Up to where everything of this center's shards is stored. Both queues say nothing but the truth, so the
    /// later of the two counts.
    pub(super) fn stored(&self, partition: u8) -> OutboxId {
        let outbox = self.outbox.get(&partition).copied().unwrap_or(OutboxId::ZERO);
        let marks = self.marks.get(&partition).map_or(OutboxId::ZERO, |marks| {
            let mark = |shard| marks.get(shard).copied().unwrap_or(OutboxId::ZERO);
            self.owned.iter().map(mark).min().unwrap_or(OutboxId::ZERO)
        });
        outbox.max(marks)
    }

    /// The last entry that anything stored came with.
    pub(super) fn highest(&self, partition: u8) -> OutboxId {
        let marks = self.marks.get(&partition).into_iter().flat_map(BTreeMap::values);
        marks.chain(self.outbox.get(&partition)).copied().max().unwrap_or(OutboxId::ZERO)
    }

    /// Every partition of which anything is known, and up to where it is stored.
    pub(super) fn all(&self) -> Vec<(u8, OutboxId)> {
        let mut partitions: Vec<u8> = self.outbox.keys().chain(self.marks.keys()).copied().collect();
        partitions.sort_unstable();
        partitions.dedup();
        partitions.into_iter().map(|partition| (partition, self.stored(partition))).collect()
    }
}

fn shard_of(number: u8) -> Result<Shard, Error> {
    Shard::new(number).ok_or_else(|| Error::Row(format!("shard {number}")))
}

/// For each shard the next offset.
pub(super) async fn kafka_offsets(conn: &mut SqliteConnection) -> Result<Vec<(Shard, i64)>, Error> {
    let rows =
        sqlx::query("SELECT shard, next_offset FROM kafka_offsets ORDER BY shard").fetch_all(conn).await?;
    rows.iter().map(|row| Ok((shard_of(row.try_get(0)?)?, row.try_get(1)?))).collect()
}

/// Moves the positions. One that is not where the caller took it to be undoes the whole transaction.
pub(super) async fn advance(tx: &mut Tx<'_>, steps: &[Advance]) -> Result<(), Error> {
    for step in steps {
        match step {
            Advance::Outbox { partition, from, to } => move_outbox(tx.conn, *partition, *from, *to).await?,
            Advance::Kafka { shard, from, to, outbox } => {
                tx.owned.check(*shard)?;
                move_kafka(tx.conn, *shard, *from, *to).await?;
                for (partition, mark) in outbox {
                    raise_mark(tx.conn, *shard, *partition, *mark).await?;
                }
            }
        }
    }
    Ok(())
}

async fn move_outbox(
    conn: &mut SqliteConnection,
    partition: u8,
    from: OutboxId,
    to: OutboxId,
) -> Result<(), Error> {
    if from == OutboxId::ZERO {
        sqlx::query("INSERT INTO outbox_position (partition, position) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(partition)
            .bind(OutboxId::ZERO.to_string())
            .execute(&mut *conn)
            .await?;
    }
    let moved = sqlx::query("UPDATE outbox_position SET position = ? WHERE partition = ? AND position = ?")
        .bind(to.to_string())
        .bind(partition)
        .bind(from.to_string())
        .execute(&mut *conn)
        .await?;
    if moved.rows_affected() == 1 {
        return Ok(());
    }
    let found: Option<String> =
        sqlx::query_scalar("SELECT position FROM outbox_position WHERE partition = ?")
            .bind(partition)
            .fetch_optional(conn)
            .await?;
    Err(Error::PositionMoved {
        place: Place::Outbox(partition),
        expected: from.to_string(),
        found: found.unwrap_or_else(|| OutboxId::ZERO.to_string()),
    })
}

async fn move_kafka(conn: &mut SqliteConnection, shard: Shard, from: i64, to: i64) -> Result<(), Error> {
    let moved = sqlx::query("UPDATE kafka_offsets SET next_offset = ? WHERE shard = ? AND next_offset = ?")
        .bind(to)
        .bind(shard.number())
        .bind(from)
        .execute(&mut *conn)
        .await?;
    if moved.rows_affected() == 1 {
        return Ok(());
    }
    let found: i64 = sqlx::query_scalar("SELECT next_offset FROM kafka_offsets WHERE shard = ?")
        .bind(shard.number())
        .fetch_one(conn)
        .await?;
    Err(Error::PositionMoved {
        place: Place::Kafka(shard),
        expected: from.to_string(),
        found: found.to_string(),
    })
}

/// Marks never go back: a relay that was not told of an acknowledgement publishes the same records again, behind
/// later ones.
async fn raise_mark(
    conn: &mut SqliteConnection,
    shard: Shard,
    partition: u8,
    mark: OutboxId,
) -> Result<(), Error> {
    let stored: Option<String> =
        sqlx::query_scalar("SELECT position FROM kafka_marks WHERE shard = ? AND partition = ?")
            .bind(shard.number())
            .bind(partition)
            .fetch_optional(&mut *conn)
            .await?;
    if stored.map(|text| text.parse::<OutboxId>()).transpose()?.is_some_and(|stored| stored >= mark) {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO kafka_marks (shard, partition, position) VALUES (?, ?, ?)
         ON CONFLICT (shard, partition) DO UPDATE SET position = excluded.position",
    )
    .bind(shard.number())
    .bind(partition)
    .bind(mark.to_string())
    .execute(conn)
    .await?;
    Ok(())
}
