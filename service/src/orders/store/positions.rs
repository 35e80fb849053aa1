//! How far each queue is stored. Positions move in the transaction that stores the orders, from the place that
//! the caller read (R2).

use std::collections::BTreeMap;

use seckill_domain::{CenterId, OutboxId, Shard};

use super::super::batch::{Advance, Place};
use super::super::error::Error;
use super::session::{Session, Value, values};
use super::writer::Tx;

/// What the tables say about every partition's outbox. Where databases replicate each other they hold the positions of
/// several centers; this center's count.
#[derive(Debug, Default)]
pub(super) struct Positions {
    /// By inventory partition, as this center's tailer left it.
    outbox: BTreeMap<u8, OutboxId>,
    /// By inventory partition and shard, as the records in Kafka say, or whoever handed the shard over.
    marks: BTreeMap<u8, BTreeMap<Shard, OutboxId>>,
    owned: Vec<Shard>,
}

impl Positions {
    pub(super) async fn read(conn: &mut Session, center: &CenterId) -> Result<Positions, Error> {
        let mut positions = Positions::default();
        let own = conn
            .rows(
                "SELECT `partition`, position FROM outbox_positions WHERE center = ?",
                values![center.as_str()],
            )
            .await?;
        for row in own {
            positions.outbox.insert(row.small(0)?, row.text(1)?.parse()?);
        }
        positions.owned = shards_of(conn, center).await?;
        for row in conn.rows("SELECT `partition`, shard, position FROM kafka_marks", values![]).await? {
            let shard = shard_of(row.small(1)?)?;
            if positions.owned.contains(&shard) {
                positions.marks.entry(row.small(0)?).or_default().insert(shard, row.text(2)?.parse()?);
            }
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

pub(super) fn shard_of(number: u8) -> Result<Shard, Error> {
    Shard::new(number).ok_or_else(|| Error::Row(format!("shard {number}")))
}

/// The shards that the database gives to a center, read without a lock.
pub(super) async fn shards_of(conn: &mut Session, center: &CenterId) -> Result<Vec<Shard>, Error> {
    let rows = conn.rows("SELECT shard FROM shard_owner WHERE owner = ?", values![center.as_str()]).await?;
    rows.iter().map(|row| shard_of(row.small(0)?)).collect()
}

/// For each shard the next offset in this center's Kafka; 0 before the first.
pub(super) async fn kafka_offsets(conn: &mut Session, center: &CenterId) -> Result<Vec<(Shard, i64)>, Error> {
    let sql = "SELECT shard, next_offset FROM kafka_next WHERE center = ?";
    let mut next: BTreeMap<Shard, i64> = Shard::all().map(|shard| (shard, 0)).collect();
    for row in conn.rows(sql, values![center.as_str()]).await? {
        next.insert(shard_of(row.small(0)?)?, row.int(1)?);
    }
    Ok(next.into_iter().collect())
}

/// Moves the positions. One that is not where the caller took it to be undoes the whole transaction.
pub(super) async fn advance(tx: &mut Tx<'_>, steps: &[Advance]) -> Result<(), Error> {
    let mut kafka = Vec::with_capacity(steps.len());
    for step in steps {
        match step {
            Advance::Outbox { partition, from, to } => move_outbox(tx, *partition, *from, *to).await?,
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
    move_kafka(tx.conn, tx.center, &kafka).await?;
    raise_marks(tx.conn, &kafka).await
}

/// One step of a shard's Kafka partition.
struct Step<'a> {
    shard: Shard,
    from: i64,
    to: i64,
    marks: &'a [(u8, OutboxId)],
}

async fn move_outbox(tx: &mut Tx<'_>, partition: u8, from: OutboxId, to: OutboxId) -> Result<(), Error> {
    let (conn, center) = (&mut *tx.conn, tx.center);
    let moved = conn
        .execute(
            "UPDATE outbox_positions SET position = ? WHERE center = ? AND `partition` = ? AND position = ?",
            values![to.to_string(), center.as_str(), partition, from.to_string()],
        )
        .await?;
    if moved == 1 {
        return Ok(());
    }
    if from == OutboxId::ZERO {
        // Only now: an insert that finds the row shares its lock, and two that both want to move it afterwards would
        // wait for each other.
        let insert = conn.dialect().insert_new();
        let sql = format!("{insert} outbox_positions (center, `partition`, position) VALUES (?, ?, ?)");
        if conn.execute(sql, values![center.as_str(), partition, to.to_string()]).await? == 1 {
            return Ok(());
        }
    }
    let found = Positions::read(conn, center).await?.stored(partition);
    if found == from {
        // The row is behind what the marks of this center's shards say, which is as true.
        set_outbox(conn, center, partition, to).await?;
        return Ok(());
    }
    Err(Error::PositionMoved {
        place: Place::Outbox(partition),
        expected: from.to_string(),
        found: found.to_string(),
    })
}

/// Sets a center's position, whatever it was.
pub(super) async fn set_outbox(
    conn: &mut Session,
    center: &CenterId,
    partition: u8,
    to: OutboxId,
) -> Result<(), Error> {
    let or_set = conn.dialect().or_set("center, `partition`", "position");
    let sql =
        format!("INSERT INTO outbox_positions (center, `partition`, position) VALUES (?, ?, ?) {or_set}");
    conn.execute(sql, values![center.as_str(), partition, to.to_string()]).await?;
    Ok(())
}

/// Two statements, however many shards: a batch of a large drain has a step of every one.
async fn move_kafka(conn: &mut Session, center: &CenterId, steps: &[Step<'_>]) -> Result<(), Error> {
    let mut shards = values![center.as_str()].to_vec();
    shards.extend(steps.iter().map(|step| Value::from(step.shard.number())));
    let (marks, lock) = (vec!["?"; steps.len()].join(", "), conn.dialect().for_update());
    let sql = format!(
        "SELECT shard, next_offset FROM kafka_next WHERE center = ? AND shard IN ({marks}) ORDER BY shard{lock}"
    );
    let mut found = BTreeMap::new();
    for row in conn.rows(sql, &shards).await? {
        found.insert(shard_of(row.small(0)?)?, row.int(1)?);
    }
    let mut moved = Vec::with_capacity(steps.len() * 3);
    for step in steps {
        let next = found.get(&step.shard).copied().unwrap_or(0);
        if next != step.from {
            return Err(Error::PositionMoved {
                place: Place::Kafka(step.shard),
                expected: step.from.to_string(),
                found: next.to_string(),
            });
        }
        moved.extend_from_slice(values![center.as_str(), step.shard.number(), step.to]);
    }
    let or_set = conn.dialect().or_set("center, shard", "next_offset");
    let rows = vec!["(?, ?, ?)"; steps.len()].join(", ");
    conn.execute(
        format!("INSERT INTO kafka_next (center, shard, next_offset) VALUES {rows} {or_set}"),
        &moved,
    )
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
            if stored.get(&(step.shard, *partition)).unwrap_or(&OutboxId::ZERO) < mark {
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
