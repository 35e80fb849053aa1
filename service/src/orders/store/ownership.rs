//! Whose a shard is, in this database (O1), and how that changes.
//!
//! Every transaction that writes an order reads the rows of `shard_owner` with a shared lock. A change of them therefore
//! waits until those that rely on them have ended, and whoever comes later sees it: an instance that slept through a
//! hand-over writes nothing.
//!
//! | `owner` | `epoch` | means |
//! | --- | --- | --- |
//! | `a` | the last attempt that a's rows have heard of | a writes the shard's orders |
//! | `a>b` | the attempt that moves it | nobody does: a has let go of it, and b has not taken it |
//!
//! Where servers replicate each other the rows are replicated, too. So that no two centers write one at the same time, a
//! row is changed by its owner, or by the center that the topology gives it to; and an attempt that a row has heard of is
//! never followed by an earlier one.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::RngExt as _;
use seckill_domain::{CenterId, Millis, OutboxId, Shard};
use tokio::time::Instant;

use super::super::error::Error;
use super::OrderStore;
use super::positions::{self, shard_of};
use super::replication::{self, ServerStanding};
use super::session::{Session, Value, values};
use super::writer::OwnedShards;
use crate::topology::{ShiftKind, Topology};

/// Attempts at a change that others were in the way of: writers hold their locks for the length of a batch.
const ATTEMPTS: u32 = 8;

/// Who owns what, as the topology says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owners {
    /// By shard number.
    homes: Vec<CenterId>,
    /// Those that are being moved: their rows belong to whoever moves them.
    moving: Vec<Shard>,
    /// The latest attempt to move any.
    epoch: i64,
}

impl Owners {
    /// As a topology has it.
    pub fn of(topology: &Topology) -> Owners {
        let moving = topology.shift.as_deref().filter(|shift| shift.kind == ShiftKind::Shards);
        Owners {
            homes: topology.shard_owners.clone(),
            moving: moving.map(|shift| shift.shards.clone()).unwrap_or_default(),
            epoch: topology.shard_epoch,
        }
    }

    /// As if nothing were being moved: for whoever carries out a move that is decided.
    #[must_use]
    pub fn decided(self) -> Owners {
        Owners { moving: Vec::new(), ..self }
    }
}

/// A row of `shard_owner`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ShardRow {
    /// The shard.
    pub shard: Shard,
    /// A center, or `FROM>TO`.
    pub owner: String,
    /// The attempt that it has heard of.
    pub epoch: i64,
}

/// What a center let go of.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Fenced {
    /// What the center that takes has to have applied before it takes them, in the words of its server.
    pub written: String,
    /// Up to where each partition's outbox is stored for these shards: where the next owner goes on.
    pub stored: Vec<(u8, OutboxId)>,
}

/// Shards that changed hands in this database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Turned {
    /// Ours now.
    pub gained: Vec<Shard>,
    /// Not ours any more.
    pub lost: Vec<Shard>,
}

/// Why shards were not let go of.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// The database cannot do it at all.
    #[error("{0}")]
    Unable(String),
    /// Somebody else moved them, or a later attempt has begun.
    #[error("shard {shard} is {owner}'s since attempt {epoch}")]
    Overtaken {
        /// Which.
        shard: Shard,
        /// Whose it is.
        owner: String,
        /// Since when.
        epoch: i64,
    },
    /// The database did not answer, or did not catch up in time.
    #[error(transparent)]
    Store(#[from] Error),
    /// This database has not applied what the other one had written.
    #[error("this database has not applied what the other center's has written")]
    Behind,
}

impl OrderStore {
    /// What the server of the database is; nothing for SQLite.
    pub async fn server(&self) -> Result<Option<ServerStanding>, Error> {
        if !self.may_hold_copies() {
            return Ok(None);
        }
        self.read(|conn| Box::pin(async move { replication::standing(conn).await.map(Some) })).await
    }

    /// Everything that this database's server has written by now, to be waited for by another one.
    pub async fn written(&self) -> Result<String, Error> {
        self.read(|conn| Box::pin(replication::written(conn))).await
    }

    /// Waits until this database has applied what another one had written; whether that happened in time.
    pub async fn reaches(&self, position: &str, within: Duration) -> Result<bool, Error> {
        let (position, deadline) = (position.to_owned(), Instant::now() + within);
        self.read(move |conn| Box::pin(async move { replication::reaches(conn, &position, deadline).await }))
            .await
    }

    /// Who owns which shard, as this database says.
    pub async fn shard_rows(&self) -> Result<Vec<ShardRow>, Error> {
        self.read(|conn| Box::pin(shard_rows(conn, ""))).await
    }

    /// Up to where a center has stored each partition's outbox, as far as this database knows: another center's rows
    /// are copies.
    pub async fn positions_of(&self, center: &CenterId) -> Result<Vec<(u8, OutboxId)>, Error> {
        let center = center.clone();
        self.read(move |conn| {
            Box::pin(async move { Ok(outbox_of(conn, center.as_str()).await?.into_iter().collect()) })
        })
        .await
    }

    /// When a center wrote last, as far as this database knows.
    pub async fn last_heard_of(&self, center: &CenterId) -> Result<Option<Millis>, Error> {
        let own = format!("{center}.%");
        self.read(move |conn| {
            Box::pin(async move {
                let row = conn
                    .row("SELECT MAX(at) FROM writers WHERE writer LIKE ?", values![own.as_str()])
                    .await?;
                let at = row.map(|row| row.opt_int(0)).transpose()?.flatten();
                Ok(at.map(|seconds| Millis(seconds.saturating_mul(1000))))
            })
        })
        .await
    }

    /// Lets go of shards (O1): when this returns, no transaction of any instance writes their orders any more, those
    /// that did have ended, and it is noted up to where they are stored. Again under the same attempt is harmless; a
    /// late one is refused. `after` is what the other center's server had written: it is waited for first, so that no
    /// old change of these rows comes behind this one.
    pub async fn fence_shards(
        &self,
        shards: &[Shard],
        to: &CenterId,
        epoch: i64,
        after: &str,
        within: Duration,
    ) -> Result<Fenced, FenceError> {
        if !self.may_hold_copies() {
            return Err(FenceError::Unable(
                "its orders lie in SQLite, which no other center copies".to_owned(),
            ));
        }
        if !self.reaches(after, within).await? {
            return Err(FenceError::Behind);
        }
        let center = self.shared.center.clone();
        let let_go = format!("{center}>{to}");
        let shards = shards.to_vec();
        let mut attempt = 1;
        loop {
            let mut session = self.shared.database.connect().await?;
            let outcome = fence(&mut session, &center, &let_go, &shards, epoch).await;
            let _ = session.roll_back().await;
            session.discard().await;
            match outcome {
                Err(FenceError::Store(error)) if error.is_contended() && attempt < ATTEMPTS => {
                    attempt += 1;
                    tokio::time::sleep(pause(attempt)).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// From here on no transaction of this instance writes orders of shards that the topology gives to others, whatever
    /// its database says: that may have been away while they were taken. Does nothing on SQLite.
    pub fn limit_to(&self, owners: &Owners) {
        if self.may_hold_copies() {
            let homes = Shard::all().zip(&owners.homes).filter(|(_, home)| **home == self.shared.center);
            let given = OwnedShards::of(homes.map(|(shard, _)| shard));
            self.shared.given.store(given.bits(), Ordering::Release);
        }
    }

    /// Brings this center's part of `shard_owner` to what the topology says: takes what was given to it, gives up what
    /// was given to others. A topology that is older than what a row has heard of changes nothing. Does nothing on
    /// SQLite, whose shards never move.
    pub async fn follow_owners(&self, owners: &Owners) -> Result<Turned, Error> {
        if !self.may_hold_copies() {
            return Ok(Turned::default());
        }
        self.limit_to(owners);
        let found = self.shard_rows().await?;
        if Changes::due(&self.shared.center, owners, &found).is_empty() {
            return Ok(Turned::default());
        }
        let mut attempt = 1;
        let turned = loop {
            let mut session = self.shared.database.connect().await?;
            let outcome = follow(&mut session, &self.shared.center, owners).await;
            let _ = session.roll_back().await;
            session.discard().await;
            match outcome {
                Err(error) if error.is_contended() && attempt < ATTEMPTS => {
                    attempt += 1;
                    tokio::time::sleep(pause(attempt)).await;
                }
                outcome => break outcome?,
            }
        };
        if !turned.gained.is_empty() {
            // The position may have gone back, for what the last owner did not store.
            self.shared.turns.send_modify(|turns| *turns += 1);
        }
        Ok(turned)
    }

    /// Changes whenever shards have come to this center: positions may have gone back.
    pub(in super::super) fn turns(&self) -> tokio::sync::watch::Receiver<u64> {
        self.shared.turns.subscribe()
    }
}

fn pause(attempt: u32) -> Duration {
    Duration::from_millis(rand::rng().random_range(1..=20 * u64::from(attempt)))
}

async fn shard_rows(conn: &mut Session, lock: &'static str) -> Result<Vec<ShardRow>, Error> {
    let sql = format!("SELECT shard, owner, epoch FROM shard_owner ORDER BY shard{lock}");
    let read = |row: &super::session::Row| {
        Ok(ShardRow { shard: shard_of(row.small(0)?)?, owner: row.text(1)?.to_owned(), epoch: row.int(2)? })
    };
    conn.rows(sql, values![]).await?.iter().map(read).collect()
}

/// By partition, as a center's tailer left it.
async fn outbox_of(conn: &mut Session, center: &str) -> Result<BTreeMap<u8, OutboxId>, Error> {
    let sql = "SELECT `partition`, position FROM outbox_positions WHERE center = ?";
    let mut positions = BTreeMap::new();
    for row in conn.rows(sql, values![center]).await? {
        positions.insert(row.small(0)?, row.text(1)?.parse()?);
    }
    Ok(positions)
}

/// By partition and shard.
async fn marks_of(conn: &mut Session) -> Result<BTreeMap<(u8, Shard), OutboxId>, Error> {
    let mut marks = BTreeMap::new();
    for row in conn.rows("SELECT `partition`, shard, position FROM kafka_marks", values![]).await? {
        marks.insert((row.small(0)?, shard_of(row.small(1)?)?), row.text(2)?.parse()?);
    }
    Ok(marks)
}

async fn fence(
    session: &mut Session,
    center: &CenterId,
    let_go: &str,
    shards: &[Shard],
    epoch: i64,
) -> Result<Fenced, FenceError> {
    session.run("START TRANSACTION").await?;
    let rows = shard_rows(session, " FOR UPDATE").await?;
    for shard in shards {
        let row = rows.iter().find(|row| row.shard == *shard);
        let (owner, since) = row.map_or(("nobody", 0), |row| (row.owner.as_str(), row.epoch));
        let begins = owner == center.as_str() && since < epoch;
        let again = owner == let_go && since == epoch;
        if !begins && !again {
            return Err(FenceError::Overtaken { shard: *shard, owner: owner.to_owned(), epoch: since });
        }
    }
    let (own, marks) = (outbox_of(session, center.as_str()).await?, marks_of(session).await?);
    let mut partitions: Vec<u8> = own.keys().copied().chain(marks.keys().map(|(of, _)| *of)).collect();
    partitions.sort_unstable();
    partitions.dedup();
    let mut raised = Vec::new();
    let mut stored = Vec::new();
    for partition in partitions {
        let tailed = own.get(&partition).copied().unwrap_or(OutboxId::ZERO);
        let mut lowest = None;
        for shard in shards {
            let fenced_before = rows.iter().any(|row| row.shard == *shard && row.owner == let_go);
            let marked = marks.get(&(partition, *shard)).copied().unwrap_or(OutboxId::ZERO);
            // What the tailer passed since it was let go of was not stored.
            let reached = if fenced_before { marked } else { marked.max(tailed) };
            lowest = Some(lowest.map_or(reached, |lowest: OutboxId| lowest.min(reached)));
            if reached > marked {
                raised.extend_from_slice(values![shard.number(), partition, reached.to_string()]);
            }
        }
        stored.extend(lowest.map(|lowest| (partition, lowest)));
    }
    if !raised.is_empty() {
        let or_set = session.dialect().or_set("shard, `partition`", "position");
        let marks = vec!["(?, ?, ?)"; raised.len() / 3].join(", ");
        let sql = format!("INSERT INTO kafka_marks (shard, `partition`, position) VALUES {marks} {or_set}");
        session.execute(sql, &raised).await?;
    }
    let marks = vec!["?"; shards.len()].join(", ");
    let mut changed = values![let_go, epoch].to_vec();
    changed.extend(shards.iter().map(|shard| Value::from(shard.number())));
    let sql = format!("UPDATE shard_owner SET owner = ?, epoch = ? WHERE shard IN ({marks})");
    session.execute(sql, &changed).await?;
    session.run("COMMIT").await?;
    Ok(Fenced { written: replication::written(session).await?, stored })
}

/// What has to be changed, and why.
#[derive(Debug, Default)]
struct Changes {
    /// With the owner before.
    gained: Vec<(Shard, String)>,
    lost: Vec<Shard>,
    /// Ours as before, but they have not heard of the latest attempt.
    lifted: Vec<Shard>,
}

impl Changes {
    fn due(center: &CenterId, owners: &Owners, rows: &[ShardRow]) -> Changes {
        let mut changes = Changes::default();
        for (shard, home) in Shard::all().zip(&owners.homes) {
            if owners.moving.contains(&shard) {
                continue;
            }
            let row = rows.iter().find(|row| row.shard == shard);
            let (owner, epoch) = row.map_or(("", i64::MIN), |row| (row.owner.as_str(), row.epoch));
            let (mine, was_mine) = (home == center, owner == center.as_str());
            match (mine, was_mine) {
                // A later attempt than this topology knows of has the say.
                _ if epoch > owners.epoch => {}
                (true, false) => changes.gained.push((shard, owner.to_owned())),
                (false, true) => changes.lost.push(shard),
                (true, true) if epoch < owners.epoch => changes.lifted.push(shard),
                (true, true) | (false, false) => {}
            }
        }
        changes
    }

    fn is_empty(&self) -> bool {
        self.gained.is_empty() && self.lost.is_empty() && self.lifted.is_empty()
    }
}

async fn follow(session: &mut Session, center: &CenterId, owners: &Owners) -> Result<Turned, Error> {
    session.run("START TRANSACTION").await?;
    let rows = shard_rows(session, " FOR UPDATE").await?;
    let changes = Changes::due(center, owners, &rows);
    if !changes.gained.is_empty() {
        go_back(session, center, &changes.gained).await?;
    }
    let gained: Vec<Shard> = changes.gained.iter().map(|(shard, _)| *shard).collect();
    let taken = gained.iter().chain(&changes.lifted).map(|shard| (*shard, center));
    let homes = changes
        .lost
        .iter()
        .filter_map(|shard| Some((*shard, owners.homes.get(usize::from(shard.number()))?)));
    for (shard, owner) in taken.chain(homes) {
        session
            .execute(
                "INSERT INTO shard_owner (shard, owner, epoch) VALUES (?, ?, ?)
                 ON DUPLICATE KEY UPDATE owner = VALUES(owner), epoch = VALUES(epoch)",
                values![shard.number(), owner.as_str(), owners.epoch],
            )
            .await?;
    }
    session.run("COMMIT").await?;
    Ok(Turned { gained, lost: changes.lost })
}

/// This center reads the outbox again from where the last owners really were (R2): what was accepted during a
/// hand-over, or was stored over there and never arrived here, is stored now. What is stored stays as it is.
async fn go_back(session: &mut Session, center: &CenterId, gained: &[(Shard, String)]) -> Result<(), Error> {
    let (own, marks) = (outbox_of(session, center.as_str()).await?, marks_of(session).await?);
    let mut others: BTreeMap<&str, BTreeMap<u8, OutboxId>> = BTreeMap::new();
    for (_, owner) in gained {
        if !others.contains_key(owner.as_str()) {
            // A shard that was let go of has its mark; that of a center that never did is where its tailer was.
            others.insert(owner, outbox_of(session, owner).await?);
        }
    }
    for (partition, here) in own {
        let reached = gained.iter().map(|(shard, owner)| {
            let marked = marks.get(&(partition, *shard)).copied().unwrap_or(OutboxId::ZERO);
            let tailed = others.get(owner.as_str()).and_then(|of| of.get(&partition)).copied();
            marked.max(tailed.unwrap_or(OutboxId::ZERO))
        });
        if let Some(reached) = reached.min().filter(|reached| *reached < here) {
            positions::set_outbox(session, center, partition, reached).await?;
        }
    }
    Ok(())
}
