//! What becomes of the orders that only a lost master had (H6).
//!
//! A forced shift whose loss was accepted leaves orders behind that are stored, or sold, and that the new master's ledger
//! does not know. When the old master is back, they stand in its saved tail ([`super::tail`]). Here each of them is
//! claimed again where stock and limit allow; else it is cancelled, or, if it is paid, told until there is room for it.
//!
//! A tail is settled when `FILE.settled` stands beside it. Until then it is gone through again and again: at once when
//! an epoch begins, and every [`RETRY`]. A later shift whose loss was accepted may have lost what was claimed again, and
//! what that ledger's own tail says of it is only how many these were: so every tail that was settled before is open again.

mod round;
mod saved;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use seckill_domain::{CenterId, Clock, Epoch, KeyDigest, OrderId, OutboxId, SystemClock};
use serde::{Deserialize, Serialize};
use tokio::fs::{self, File};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::round::{Failure, Fate, Progress};
use self::saved::SavedLines;
use super::record;
use crate::cross_center::CrossCenter;
#[cfg(not(test))]
use crate::fail_point::fail_point;
use crate::inventory::Inventory;
use crate::orders::{OrderCenters, supervise};
use crate::topology::{Settled, Topology, TopologyHandle, UpdateError};

/// How often the folder is looked at for tails.
const LOOK: Duration = Duration::from_secs(1);
/// How long a tail that is not settled waits for the next round: for stock that the shop adds, or a center that comes
/// back. One that failed waits for [`LOOK`], so that what passes by itself costs no time.
pub const RETRY: Duration = Duration::from_secs(30);
/// Failures after which it waits for [`RETRY`], too.
const SOON: u32 = 10;

/// What the orders of saved tails are settled with.
pub struct SettleParts {
    /// This center.
    pub center: CenterId,
    /// Where its tails are saved.
    pub diverged_dir: Arc<Path>,
    /// How long a tail that stays open waits for the next round: [`RETRY`].
    pub retry: Duration,
    /// Who the master is.
    pub topology: TopologyHandle,
    /// This center's inventory, for when it is the master.
    pub inventory: Inventory,
    /// The way to other centers, where there are any.
    pub cross: Option<CrossCenter>,
    /// The order databases of all centers.
    pub centers: OrderCenters,
    /// Where rounds die, one after the other.
    #[cfg(test)]
    pub(crate) dies_at: Arc<std::sync::Mutex<Vec<&'static str>>>,
}

/// What is counted of saved tails. Cheap to clone; all clones count together.
#[derive(Debug, Clone, Default)]
pub struct SettleMetrics {
    /// Tails in this service's folder that are not settled.
    pub open: Gauge,
    /// Paid orders in them without room for their claim.
    pub paid_without_claim: Gauge,
    /// Tails that were settled.
    pub settled: Counter,
}

impl SettleMetrics {
    /// Registers all of them; the registry's owner sets the prefix.
    pub fn register(&self, registry: &mut Registry) {
        let tails = registry.sub_registry_with_prefix("tail");
        tails.register("open", "Saved tails whose orders are not settled", self.open.clone());
        tails.register(
            "paid_without_claim",
            "Paid orders of saved tails without room for their claim",
            self.paid_without_claim.clone(),
        );
        tails.register("settled", "Saved tails whose orders were settled", self.settled.clone());
    }
}

/// Settles the tails in one folder, again and again.
pub struct Settler {
    parts: SettleParts,
    metrics: SettleMetrics,
}

/// A tail on its way.
struct Open {
    progress: Progress,
    /// The epoch in which that was found out.
    epoch: Epoch,
    /// When the next round is due.
    next: Instant,
    /// How many rounds failed in a row.
    failures: u32,
    /// How many paid orders without a claim were told of last, so that it is told once.
    told: u64,
    /// How many entries could not be read when that was told last.
    unreadable: u64,
}

impl Settler {
    /// Starts the worker. It ends with the token, wherever it is: the next start goes on.
    pub fn spawn(parts: SettleParts, tracker: &TaskTracker, token: &CancellationToken) -> SettleMetrics {
        let metrics = SettleMetrics::default();
        let settler = Arc::new(Settler { parts, metrics: metrics.clone() });
        supervise("saved tails", tracker, token, move |token| {
            let settler = Arc::clone(&settler);
            async move { settler.run(token).await }
        });
        metrics
    }

    async fn run(&self, token: CancellationToken) {
        let mut open: BTreeMap<PathBuf, Open> = BTreeMap::new();
        let mut blind = false;
        let mut changes = self.parts.topology.subscribe();
        let mut epoch = changes.borrow_and_update().epoch;
        loop {
            let lost = record::last_loss(&self.parts.topology.current());
            match unsettled(&self.parts.diverged_dir, lost).await {
                Ok(files) => {
                    blind = false;
                    self.look(files, &mut open, &token).await;
                }
                // Once: what lies there may be orders that somebody paid for.
                Err(error) if !std::mem::replace(&mut blind, true) => tracing::error!(
                    folder = %self.parts.diverged_dir.display(), %error,
                    "saved tails cannot be seen; their orders are settled when they can"
                ),
                Err(_) => {}
            }
            // Whatever changes the topology's epoch may have made a claim count, or lost it.
            let begins = changes.wait_for(|topology| topology.epoch != epoch);
            tokio::select! {
                () = token.cancelled() => return,
                () = tokio::time::sleep(LOOK.min(self.parts.retry)) => {}
                begun = begins => match begun {
                    Ok(topology) => epoch = topology.epoch,
                    Err(_) => return,
                },
            }
        }
    }

    /// Goes through every one of these tails whose turn it is.
    async fn look(&self, files: Vec<PathBuf>, open: &mut BTreeMap<PathBuf, Open>, token: &CancellationToken) {
        open.retain(|file, _| files.contains(file));
        for file in files {
            let topology = self.parts.topology.current();
            let (epoch, now) = (topology.epoch, Instant::now());
            let tail = open.entry(file.clone()).or_insert_with(|| Open {
                progress: Progress::default(),
                epoch,
                next: now,
                failures: 0,
                told: 0,
                unreadable: 0,
            });
            if tail.epoch != epoch {
                // Another ledger may be the truth.
                (tail.progress, tail.epoch, tail.next) = (Progress::default(), epoch, now);
            }
            if now < tail.next || topology.master_shift().is_some() {
                continue;
            }
            // Large, and rarely run.
            let round = token.run_until_cancelled(Box::pin(self.settle(&file, &topology, tail))).await;
            match round {
                None => return,
                Some(Ok(true)) => drop(open.remove(&file)),
                Some(Ok(false)) => (tail.failures, tail.next) = (0, Instant::now() + self.parts.retry),
                Some(Err(failure)) => {
                    // Nobody knows how far it came.
                    tail.progress = Progress::default();
                    tail.failures = tail.failures.saturating_add(1);
                    let pause =
                        if tail.failures < SOON { LOOK.min(self.parts.retry) } else { self.parts.retry };
                    tail.next = Instant::now() + pause;
                    if tail.failures == SOON {
                        tracing::warn!(
                            file = %file.display(), %failure,
                            "the orders of a saved tail cannot be settled; it is tried again"
                        );
                    } else {
                        tracing::debug!(file = %file.display(), %failure, "a saved tail is tried again");
                    }
                }
            }
        }
        let paid = open.values().map(|tail| count(&tail.progress, Fate::Paid)).sum::<u64>();
        self.metrics.paid_without_claim.set(i64::try_from(paid).unwrap_or(i64::MAX));
        self.metrics.open.set(i64::try_from(open.len()).unwrap_or(i64::MAX));
    }

    /// One round over a tail, and what is to be told of it. Returns whether it is settled.
    async fn settle(&self, file: &Path, topology: &Topology, tail: &mut Open) -> Result<bool, Failure> {
        // Instances that share a folder must not contradict each other about an order.
        let lock = File::open(file).await.map_err(saved::Unreadable::File)?.into_std().await;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(Failure::Busy),
            Err(error) => return Err(saved::Unreadable::File(error.into()).into()),
        }
        if is_settled(file, record::last_loss(topology)).await {
            // By the one that had the lock before.
            return Ok(true);
        }
        let last = SavedLines::open(file).await?.last;
        let unseen = may_be_acknowledged(topology, &self.parts.center, last);
        self.round(file, unseen, &mut tail.progress).await?;
        let progress = &tail.progress;
        let of = |fate| count(progress, fate);
        let (orders, paid) = (progress.fates.len() as u64, of(Fate::Paid));
        let unreadable = progress.unreadable;
        let is_settled = unreadable == 0 && progress.fates.iter().all(|fate| fate.is_final());
        let settled = Settled {
            orders,
            claimed_again: of(Fate::Claimed),
            cancelled: of(Fate::Cancelled),
            paid_without_claim: of(Fate::Archived),
            settled_at: SystemClock.now().to_string(),
        };
        // The history first: without its mark the tail is gone through again, and told again.
        self.tell(file, paid, progress, is_settled.then(|| settled.clone())).await?;
        self.passes("settle_told")?;
        if is_settled {
            let Epoch(epoch) = topology.epoch;
            mark(file, &Mark { settled: settled.clone(), epoch }).await.map_err(saved::Unreadable::File)?;
            self.metrics.settled.inc();
            if settled.paid_without_claim > 0 {
                tracing::error!(
                    file = %file.display(), paid_without_claim = settled.paid_without_claim, orders = names(progress),
                    "paid orders of a saved tail hold no claim, because their sale is archived: deliver them, or pay the \
                     money back"
                );
            }
            tracing::warn!(
                file = %file.display(), orders, claimed_again = settled.claimed_again,
                cancelled = settled.cancelled, "the orders of a saved tail are settled"
            );
        } else if std::mem::replace(&mut tail.told, paid) != paid && paid > 0 {
            tracing::error!(
                file = %file.display(), paid_without_claim = paid, orders = names(progress),
                "paid orders of a saved tail have no claim; seckill shift status says why, and what is to be done"
            );
        }
        if std::mem::replace(&mut tail.unreadable, unreadable) != unreadable && unreadable > 0 {
            tracing::error!(
                file = %file.display(), entries = unreadable,
                "entries of a saved tail cannot be read; the orders of all others are looked after. Let the release \
                 that wrote it go through it"
            );
        }
        Ok(is_settled)
    }

    /// Writes into the history of shifts how a tail stands, if a shift there names it.
    async fn tell(
        &self,
        file: &Path,
        paid: u64,
        progress: &Progress,
        settled: Option<Settled>,
    ) -> Result<(), Failure> {
        let (center, name) = (self.parts.center.clone(), file.display().to_string());
        let unclaimed = progress.unclaimed.clone();
        let told = self.parts.topology.update(move |topology| {
            record::tell_tail(topology, &center, &name, (paid, &unclaimed), settled.as_ref());
            Ok::<_, Infallible>(())
        });
        told.await.map_err(|error| match error {
            UpdateError::Store(error) => Failure::Topology(error),
            UpdateError::Refused(never) => match never {},
        })
    }

    /// A place where a test lets the round die: nothing that would follow happens then.
    #[cfg(test)]
    fn passes(&self, at: &'static str) -> Result<(), Failure> {
        let mut places = self.parts.dies_at.lock().unwrap();
        if places.first() == Some(&at) {
            places.remove(0);
            return Err(Failure::Died);
        }
        Ok(())
    }

    /// A place where a test of the whole service lets it die.
    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "as in tests")]
    fn passes(&self, at: &'static str) -> Result<(), Failure> {
        fail_point(at);
        Ok(())
    }
}

fn count(progress: &Progress, fate: Fate) -> u64 {
    progress.fates.iter().filter(|found| **found == fate).count() as u64
}

/// Whether the orders of a tail may have been acknowledged: not if the shift that left it behind lost nothing (R1).
fn may_be_acknowledged(topology: &Topology, center: &CenterId, last: OutboxId) -> bool {
    let shift = topology.history.iter().find(|shift| record::left_behind(shift, center, last));
    !shift.and_then(|shift| shift.exposure.as_ref()).is_some_and(|exposure| exposure.lossless)
}

/// The keys of the orders in saved tails, for whoever claims such orders again without one.
pub(super) async fn keys(folder: &Path) -> HashMap<OrderId, KeyDigest> {
    saved::keys(folder).await
}

/// The saved tails in a folder that are not settled, or were before the last loss; the oldest first.
async fn unsettled(folder: &Path, lost: Option<Epoch>) -> io::Result<Vec<PathBuf>> {
    let (mut tails, marks) = tails(folder).await?;
    // EPOCH and TIME are numbers without leading zeros: what has fewer digits is smaller.
    tails.sort_by_cached_key(|file| (file.as_os_str().len(), file.clone()));
    let mut open = Vec::with_capacity(tails.len());
    for file in tails {
        if !marks.contains(&beside(&file, ".settled")) || !is_settled(&file, lost).await {
            open.push(file);
        }
    }
    Ok(open)
}

/// Whether a tail was settled, and nothing was lost since. A mark that cannot be read does not say when that was.
async fn is_settled(file: &Path, lost: Option<Epoch>) -> bool {
    let Ok(text) = fs::read_to_string(beside(file, ".settled")).await else { return false };
    let Some(Epoch(lost)) = lost else { return true };
    serde_json::from_str::<Mark>(&text).is_ok_and(|mark| mark.epoch >= lost)
}

/// The paid orders without a claim, as a log names them.
fn names(progress: &Progress) -> String {
    let names: Vec<String> = progress.unclaimed.iter().map(|order| order.order_id.to_string()).collect();
    names.join(" ")
}

/// The saved tails in a folder, and the marks of those that are settled.
async fn tails(folder: &Path) -> io::Result<(Vec<PathBuf>, HashSet<PathBuf>)> {
    let (mut tails, mut marks) = (Vec::new(), HashSet::new());
    let mut entries = match fs::read_dir(folder).await {
        Ok(entries) => entries,
        // It is made when the first tail is saved.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((tails, marks)),
        Err(error) => return Err(error),
    };
    while let Some(entry) = entries.next_entry().await? {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with("diverged-")) else { continue };
        let file = folder.join(name);
        match file.extension().and_then(OsStr::to_str) {
            Some("ndjson") => tails.push(file),
            Some("settled") => drop(marks.insert(file)),
            // One that is being written.
            Some(_) | None => {}
        }
    }
    Ok((tails, marks))
}

/// The path with this at its end.
fn beside(file: &Path, end: &str) -> PathBuf {
    PathBuf::from(format!("{}{end}", file.display()))
}

/// What `FILE.settled` says.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    #[serde(flatten)]
    settled: Settled,
    /// The epoch in which that was so.
    epoch: u64,
}

/// Puts `FILE.settled` beside a tail. When this returns it is on the disk.
async fn mark(file: &Path, mark: &Mark) -> io::Result<()> {
    let (unfinished, finished) = (beside(file, ".settled.new"), beside(file, ".settled"));
    let mut out = File::create(&unfinished).await?;
    let text = serde_json::to_string(mark).map_err(io::Error::other)?;
    out.write_all(format!("{text}\n").as_bytes()).await?;
    out.sync_all().await?;
    fs::rename(&unfinished, &finished).await?;
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new("."))).await?.sync_all().await
}
