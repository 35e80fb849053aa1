//! The tail of a ledger that went another way than the master's: saved before the server becomes a replica (S3).
//!
//! Within an epoch only one master writes, so an entry that two outboxes have under the same id is the same entry,
//! and everything before it is the same, too. What this server has behind the last such entry exists nowhere else.

use std::io;
use std::path::{Path, PathBuf};

use redis::aio::MultiplexedConnection;
use seckill_domain::{CenterId, Clock, OrderRecord, OutboxId, SystemClock};
use seckill_ledger::outbox::{self, Event};
use seckill_ledger::read;
use seckill_ledger::roles::Standing;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::fs::{self, File};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::ledger::LedgerError;
use crate::topology::Tail;

/// Entries that are compared or written at once.
const PAGE: usize = 256;

/// A tail that was saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SavedTail {
    /// The file.
    pub(crate) file: PathBuf,
    /// The last entry that both have, if any.
    pub(crate) common: Option<OutboxId>,
    /// Its last entry.
    pub(crate) last: OutboxId,
    /// How many entries were saved.
    pub(crate) entries: u64,
    /// How many orders these hold.
    pub(crate) orders: u64,
    /// An attempt before this one saved it, and came no further.
    pub(crate) again: bool,
}

impl From<&SavedTail> for Tail {
    fn from(saved: &SavedTail) -> Tail {
        Tail {
            file: saved.file.display().to_string(),
            entries: saved.entries,
            orders: saved.orders,
            paid_without_claim: 0,
            paid_orders: Vec::new(),
            settled: None,
        }
    }
}

/// Whose tail it is.
#[derive(Debug)]
pub(crate) struct Owner<'a> {
    pub(crate) center: &'a CenterId,
    pub(crate) partition: u8,
    /// The folder for the file.
    pub(crate) folder: &'a Path,
}

/// Saves what `own` has in its outbox and the master has not; `None` if there is nothing. When this returns the
/// file is on the disk. What was saved before is not saved again: whatever keeps the server from becoming a replica,
/// each attempt would leave a file behind.
pub(crate) async fn save(
    owner: &Owner<'_>,
    standing: &Standing,
    own: &mut MultiplexedConnection,
    master: &mut MultiplexedConnection,
) -> Result<Option<SavedTail>, LedgerError> {
    let Some(last) = outbox::last_id(own).await? else { return Ok(None) };
    let common = common(own, master, last).await?;
    if common == Some(last) {
        return Ok(None);
    }
    let io = |source| LedgerError::Tail { folder: owner.folder.to_owned(), source };
    fs::create_dir_all(owner.folder).await.map_err(io)?;
    let mut head = json!({
        "kind": "diverged", "v": 1, "center": owner.center, "partition": owner.partition,
        "fence": standing.fence, "common": common.map(|id| id.to_string()), "last": last.to_string(),
    });
    if let Some(tail) = saved_before(owner.folder, &head, (common, last)).await.map_err(io)? {
        return Ok(Some(tail));
    }
    let saved_at = SystemClock.now();
    let name = format!("diverged-{}-{}.ndjson", last.epoch, saved_at.0);
    let (file, unfinished) = (owner.folder.join(&name), owner.folder.join(format!("{name}.new")));
    let mut out = File::create(&unfinished).await.map_err(io)?;
    (head["run_id"], head["saved_at"]) = (json!(standing.run_id), json!(saved_at));
    let mut tail = SavedTail { file, common, last, entries: 0, orders: 0, again: false };
    let mut text = format!("{head}\n");
    let mut after = common.unwrap_or(OutboxId::ZERO);
    loop {
        let page = outbox::read_raw(own, after, PAGE).await?;
        let full = page.len() == PAGE;
        for (raw, entry) in page {
            after = entry.id;
            tail.entries += 1;
            let fields: serde_json::Map<String, Value> =
                raw.fields.into_iter().map(|(name, value)| (name, value.into())).collect();
            let mut line = json!({ "id": entry.id.to_string(), "fields": fields });
            if let Ok(Event::Orders(orders)) = &entry.event {
                tail.orders += orders.len() as u64;
                line["orders"] = claims(own, orders).await?;
            }
            text.push_str(&line.to_string());
            text.push('\n');
        }
        out.write_all(text.as_bytes()).await.map_err(io)?;
        text.clear();
        if !full {
            break;
        }
    }
    out.sync_all().await.map_err(io)?;
    fs::rename(&unfinished, &tail.file).await.map_err(io)?;
    let folder = File::open(owner.folder).await.map_err(io)?;
    folder.sync_all().await.map_err(io)?;
    Ok(Some(tail))
}

/// The tail in the folder whose first line says at least this: whatever run of the server it was, the same entries
/// follow. One that cannot be read to its end any more counts as none.
async fn saved_before(
    folder: &Path,
    head: &Value,
    (common, last): (Option<OutboxId>, OutboxId),
) -> io::Result<Option<SavedTail>> {
    let name = format!("diverged-{}-", last.epoch);
    let mut entries = fs::read_dir(folder).await?;
    'files: while let Some(entry) = entries.next_entry().await? {
        let found = entry.file_name();
        let Some(found) = found.to_str().filter(|found| found.starts_with(&name)) else { continue };
        if !found.ends_with(".ndjson") {
            continue;
        }
        let file = folder.join(found);
        let mut lines = BufReader::new(File::open(&file).await?).lines();
        let Ok(Some(first)) = lines.next_line().await else { continue };
        let says = |(name, wanted): (&String, &Value), first: &Value| first.get(name) == Some(wanted);
        let same = serde_json::from_str::<Value>(&first).is_ok_and(|first| {
            head.as_object().is_some_and(|head| head.iter().all(|field| says(field, &first)))
        });
        if !same {
            continue;
        }
        let mut tail = SavedTail { file, common, last, entries: 0, orders: 0, again: true };
        let mut reached = None;
        loop {
            let Ok(line) = lines.next_line().await else { continue 'files };
            let Some(line) = line else { break };
            let Ok(Entry { id, orders }) = serde_json::from_str(&line) else { continue 'files };
            tail.entries += 1;
            tail.orders += orders.len() as u64;
            reached = Some(id);
        }
        if reached == Some(last.to_string()) {
            return Ok(Some(tail));
        }
    }
    Ok(None)
}

/// A line of a tail, as far as it is counted.
#[derive(Deserialize)]
struct Entry {
    id: String,
    #[serde(default)]
    orders: Vec<IgnoredAny>,
}

/// The last entry that both have.
async fn common(
    own: &mut MultiplexedConnection,
    master: &mut MultiplexedConnection,
    last: OutboxId,
) -> Result<Option<OutboxId>, LedgerError> {
    let mut ids = vec![last];
    loop {
        if let Some(newest) = outbox::has(master, &ids).await?.into_iter().max() {
            return Ok(Some(newest));
        }
        let Some(oldest) = ids.last() else { return Ok(None) };
        // Sequences begin at 1, so there is an id before each.
        let before = OutboxId { epoch: oldest.epoch, seq: oldest.seq.saturating_sub(1) };
        ids = outbox::ids_before(own, before, PAGE).await?;
    }
}

/// The orders of an entry, each with what the ledger holds of its user in that sale: under which key it was bought.
async fn claims(own: &mut MultiplexedConnection, orders: &[OrderRecord]) -> Result<Value, LedgerError> {
    let Some(first) = orders.first() else { return Ok(json!([])) };
    let users: Vec<_> = orders.iter().map(|order| order.uid.clone()).collect();
    let claims = read::raw_claims(own, &first.sale_id, &users).await?;
    let lines = orders.iter().zip(claims).map(|(order, claims)| {
        json!({
            "order_id": order.order_id, "uid": order.uid, "quantity": order.quantity,
            "claims": claims.map(|bytes| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()),
        })
    });
    Ok(lines.collect())
}
