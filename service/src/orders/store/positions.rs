//! How far each queue is stored. Positions move in the transaction that stores the orders, from the place that
//! the caller read (R2).

use std::collections::BTreeMap;

use seckill_domain::{CenterId, OutboxId, Shard};

use super::super::batch::{Advance, Place};
use super::super::error::Error;
use super::session::{Session, Value, values};
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
    pub(super) async fn read(conn: &mut Session, center: &CenterId) -> Result<Positions, Error> {
        let mut positions = Positions::default();
        for row in conn.rows("SELECT `partition`, position FROM outbox_position", values![]).await? {
            positions.outbox.insert(row.small(0)?, row.text(1)?.parse()?);
        }
        for row in conn.rows("SELECT `partition`, shard, position FROM kafka_marks", values![]).await? {
            let marks = positions.marks.entry(row.small(0)?).or_default();
            marks.insert(shard_of(row.small(1)?)?, row.text(2)?.parse()?);
        }
        let owned =
            conn.rows("SELECT shard FROM shard_owner WHERE owner = ?", values![center.as_str()]).await?;
        for row in owned {
            positions.owned.push(shard_of(row.small(0)?)?);
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
pub(super) async fn kafka_offsets(conn: &mut Session) -> Result<Vec<(Shard, i64)>, Error> {
    let rows = conn.rows("SELECT shard, next_offset FROM kafka_offsets ORDER BY shard", values![]).await?;
    rows.iter().map(|row| Ok((shard_of(row.small(0)?)?, row.int(1)?))).collect()
}

/// Moves the positions. One that is not where the caller took it to be undoes the whole transaction.
pub(super) async fn advance(tx: &mut Tx<'_>, steps: &[Advance]) -> Result<(), Error> {
    let mut kafka = Vec::with_capacity(steps.len());
    for step in steps {
        match step {
            Advance::Outbox { partition, from, to } => move_outbox(tx.conn, *partition, *from, *to).await?,
            Advance::Kafka { shard, from, to, outbox } => {
                tx.owned.check(*shard)?;
                kafka.push(Step { shard: *shard, from: *from, to: *to, marks: outbox });
            }
        }
    }
    if kafka.is_empty() {
        return Ok(());
    }
    // In the order of shards, two batches that meet wait for each other in the same order.
    kafka.sort_unstable_by_key(|step| step.shard);
    move_kafka(tx.conn, &kafka).await?;
    raise_marks(tx.conn, &kafka).await
}

/// One step of a shard's Kafka partition.
struct Step<'a> {
    shard: Shard,
    from: i64,
    to: i64,
    marks: &'a [(u8, OutboxId)],
}

async fn move_outbox(conn: &mut Session, partition: u8, from: OutboxId, to: OutboxId) -> Result<(), Error> {
    let moved = conn
        .execute(
            "UPDATE outbox_position SET position = ? WHERE `partition` = ? AND position = ?",
            values![to.to_string(), partition, from.to_string()],
        )
        .await?;
    if moved == 1 {
        return Ok(());
    }
    if from == OutboxId::ZERO {
        // Only now: an insert that finds the row shares its lock, and two that both want to move it afterwards would
        // wait for each other.
        let insert = conn.dialect().insert_new();
        let sql = format!("{insert} outbox_position (`partition`, position) VALUES (?, ?)");
        if conn.execute(sql, values![partition, to.to_string()]).await? == 1 {
            return Ok(());
        }
    }
    let row =
        conn.row("SELECT position FROM outbox_position WHERE `partition` = ?", values![partition]).await?;
    let found = row.map(|row| row.text(0).map(str::to_owned)).transpose()?;
    Err(Error::PositionMoved {
        place: Place::Outbox(partition),
        expected: from.to_string(),
        found: found.unwrap_or_else(|| OutboxId::ZERO.to_string()),
    })
}

/// Two statements, however many shards: a batch of a large drain has a step of every one.
async fn move_kafka(conn: &mut Session, steps: &[Step<'_>]) -> Result<(), Error> {
    let shards: Vec<Value<'_>> = steps.iter().map(|step| step.shard.number().into()).collect();
    let (marks, lock) = (vec!["?"; steps.len()].join(", "), conn.dialect().for_update());
    let sql =
        format!("SELECT shard, next_offset FROM kafka_offsets WHERE shard IN ({marks}) ORDER BY shard{lock}");
    let mut found = BTreeMap::new();
    for row in conn.rows(sql, &shards).await? {
        found.insert(shard_of(row.small(0)?)?, row.int(1)?);
    }
    let mut moved = Vec::with_capacity(steps.len() * 2);
    for step in steps {
        match found.get(&step.shard) {
            Some(next) if *next == step.from => {
                moved.extend_from_slice(values![step.shard.number(), step.to]);
            }
            other => {
                return Err(Error::PositionMoved {
                    place: Place::Kafka(step.shard),
                    expected: step.from.to_string(),
                    found: other.map_or_else(|| "none".to_owned(), i64::to_string),
                });
            }
        }
    }
    let or_set = conn.dialect().or_set("shard", "next_offset");
    let rows = vec!["(?, ?)"; steps.len()].join(", ");
    conn.execute(format!("INSERT INTO kafka_offsets (shard, next_offset) VALUES {rows} {or_set}"), &moved)
        .await?;
    Ok(())
}

/// Marks never go back: a relay that was not told of an acknowledgement publishes the same records again, behind
/// later ones. Whoever moved the offsets of these shards has their marks to itself.
async fn raise_marks(conn: &mut Session, steps: &[Step<'_>]) -> Result<(), Error> {
    let shards: Vec<Value<'_>> = steps.iter().map(|step| step.shard.number().into()).collect();
    let marks = vec!["?"; steps.len()].join(", ");
    let sql = format!("SELECT shard, `partition`, position FROM kafka_marks WHERE shard IN ({marks})");
    let mut stored: BTreeMap<(Shard, u8), OutboxId> = BTreeMap::new();
    for row in conn.rows(sql, &shards).await? {
        stored.insert((shard_of(row.small(0)?)?, row.small(1)?), row.text(2)?.parse()?);
    }
    let mut raised = Vec::with_capacity(steps.len() * 3);
    for step in steps {
        for (partition, mark) in step.marks {
            if stored.get(&(step.shard, *partition)).is_none_or(|stored| stored < mark) {
                raised.extend_from_slice(values![step.shard.number(), *partition, mark.to_string()]);
            }
        }
    }
    if raised.is_empty() {
        return Ok(());
    }
    let or_set = conn.dialect().or_set("shard, `partition`", "position");
    let rows = vec!["(?, ?, ?)"; raised.len() / 3].join(", ");
    conn.execute(
        format!("INSERT INTO kafka_marks (shard, `partition`, position) VALUES {rows} {or_set}"),
        &raised,
    )
    .await?;
    Ok(())
}
