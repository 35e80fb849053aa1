//! The master's replicas: who has everything, who is lost (D1), who is back (D2), and who is unknown (K1).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use seckill_domain::{CenterId, Epoch};
use seckill_ledger::Fence;
use seckill_ledger::admin::{FenceChange, FenceOutcome};
use seckill_ledger::roles::{self, Standing};

use super::guardian::{Guardian, State};
use super::ledger::LedgerError;
use super::peers::{self, PeerSeen};
use super::record::now;
use super::status::ServerState;
use crate::topology::{Cause, Durability, Extra, InSync, NoAuthority, Position, Topology, TopologyState};

/// A replica confirms what it has every second, whatever happens: one that was silent for longer than this is not
/// waited for, because it may be a connection that broke without a word and was replaced by another.
const ACK_SILENCE_S: u64 = 2;
/// How long sales are held for a replica to show the fence of the epoch in which it is in sync again. It was
/// online a moment ago, so this takes a round trip.
const RETURN_WAIT: Duration = Duration::from_secs(1);
/// How often it is looked at meanwhile.
const RETURN_POLL: Duration = Duration::from_millis(3);
/// After a return that came to nothing the next waits this long, then twice as long, up to the second: each uses
/// up an epoch.
const RETRY_MIN: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// How often the outbox's position is published, while purchases are acknowledged without the other center and it
/// moves: a change of the topology each time.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(5);
/// An attached replica that no center knows is an alarm after this long; one that reconnects may be counted twice
/// for a moment.
const UNKNOWN_AFTER: Duration = Duration::from_secs(3);

/// What the guardian of a master remembers of its replicas.
#[derive(Debug, Default)]
pub(super) struct Replicas {
    /// How many the authority was told of.
    told: Option<usize>,
    /// The fence at which the server was put into use last.
    fence: Option<Fence>,
    /// Since when, at that fence, a replica that is in sync is not well.
    lost: BTreeMap<CenterId, Instant>,
    /// Since when one is attached that no center knows, and whether that was said.
    unknown: Option<(Instant, bool)>,
    /// The last attempt to put them in order failed, and that was said.
    troubled: bool,
    /// When the next return may be tried, and how many came to nothing.
    retry: Option<(Instant, u32)>,
    /// When the outbox's position was published last, and how far it was.
    published: Option<(Instant, u64)>,
}

impl Replicas {
    /// The authority has to be told anew.
    pub(super) fn forget_told(&mut self) {
        self.told = None;
    }

    /// The server is in use at this fence. What was wrong with a replica in another epoch, perhaps when this center was
    /// the master the last time, says nothing of how long it has been lost now.
    pub(super) fn begin(&mut self, fence: &Fence) {
        if self.fence.as_ref() != Some(fence) {
            self.lost.clear();
            self.fence = Some(fence.clone());
        }
    }
}

impl Guardian {
    /// Looks after the replicas of the admitted master. What cannot be written to the topology now is tried again.
    pub(super) async fn care_for_replicas(&mut self, topology: &Topology, standing: &Standing) {
        let replication = &standing.replication;
        let online =
            replication.replicas.iter().filter(|one| one.online && one.silent_s <= ACK_SILENCE_S).count();
        let views = self.peers.views();
        let known: Vec<(CenterId, Arc<PeerSeen>)> = views
            .iter()
            .filter_map(|(center, view)| {
                let seen = view.as_ref().ok()?;
                seen.follows(&replication.stream).then(|| (center.clone(), Arc::clone(seen)))
            })
            .collect();
        let unseen = views.iter().filter(|(_, view)| view.is_err()).count();
        let unknown = self.unknown_replicas(standing, online.saturating_sub(known.len() + unseen));
        self.report(&ServerState::Master { replicas: online, unknown });
        if self.replicas.told != Some(online)
            && let State::Admitted { fence, run_id, .. } = &self.state
        {
            self.authority.admit(self.options.partition, fence.clone(), run_id, online);
            self.replicas.told = Some(online);
        }
        if topology.centers.len() < 2 {
            return;
        }
        if topology.effective_durability() == Durability::Local {
            self.publish_position(standing).await;
        }
        if topology.durability == Durability::Local {
            return;
        }
        if let Err(error) = self.keep_in_sync(topology, standing, online, &known).await {
            // What is still on its way on this connection is anybody's guess.
            self.ledger.disconnect();
            if !std::mem::replace(&mut self.replicas.troubled, true) {
                let partition = self.options.partition;
                tracing::warn!(partition, %error, "the replicas cannot be put in order; it is tried again");
            }
        } else if std::mem::take(&mut self.replicas.troubled) {
            tracing::info!(partition = self.options.partition, "the replicas can be put in order again");
        }
    }

    /// Says how far the outbox is, so that the other center can say what is exposed when this one is gone (H6).
    async fn publish_position(&mut self, standing: &Standing) {
        let State::Admitted { fence, .. } = &self.state else { return };
        let due = self
            .replicas
            .published
            .is_none_or(|(at, seq)| at.elapsed() >= PUBLISH_INTERVAL && seq != standing.seq);
        if !due {
            return;
        }
        // What cannot be written now is written at the next turn.
        self.replicas.published = Some((Instant::now(), standing.seq));
        let partition = self.options.partition;
        let position = Position { epoch: fence.epoch, seq: standing.seq, at: now(), extra: Extra::new() };
        let published = self.ledger.change_as_master(move |topology| {
            topology.positions.insert(partition, position.clone());
            Ok(())
        });
        if let Err(error) = published.await {
            tracing::debug!(partition, %error, "the outbox's position is not published");
        }
    }

    fn unknown_replicas(&mut self, standing: &Standing, unknown: usize) -> usize {
        if unknown == 0 {
            self.replicas.unknown = None;
            return 0;
        }
        let (since, said) = self.replicas.unknown.get_or_insert_with(|| (Instant::now(), false));
        if since.elapsed() < UNKNOWN_AFTER {
            return 0;
        }
        if !std::mem::replace(said, true) {
            let addresses: Vec<&str> =
                standing.replication.replicas.iter().map(|one| one.address.as_str()).collect();
            tracing::error!(
                partition = self.options.partition,
                ?addresses,
                "a replica that belongs to no center is attached to the ledger's Redis: it may confirm purchases \
                 and will not be promoted. Detach it"
            );
        }
        unknown
    }

    async fn keep_in_sync(
        &mut self,
        topology: &Topology,
        standing: &Standing,
        online: usize,
        known: &[(CenterId, Arc<PeerSeen>)],
    ) -> Result<(), LedgerError> {
        let well = |entry: &InSync, view: Result<Arc<PeerSeen>, Arc<str>>| match view {
            Ok(seen) => {
                seen.run_id == entry.run_id && seen.follows(&standing.replication.stream) && online > 0
            }
            // It cannot be looked at, but it confirms what it gets.
            Err(_) => online >= topology.in_sync.len(),
        };
        let (mut lost, now) = (Vec::new(), Instant::now());
        for entry in &topology.in_sync {
            if well(entry, self.peers.view(&entry.center)) {
                self.replicas.lost.remove(&entry.center);
                continue;
            }
            let since = *self.replicas.lost.entry(entry.center.clone()).or_insert(now);
            if since.elapsed() >= self.options.degrade_after {
                lost.push(entry.center.clone());
            }
        }
        for center in lost {
            self.degrade(&center).await?;
        }
        if self.replicas.retry.is_some_and(|(at, _)| now < at) || online == 0 {
            return Ok(());
        }
        let back = known.iter().find(|(center, seen)| {
            let listed =
                topology.in_sync.iter().any(|entry| entry.center == *center && entry.run_id == seen.run_id);
            !listed && seen.log_ready
        });
        match back {
            Some((center, seen)) => self.bring_back(center, seen).await,
            None => Ok(()),
        }
    }

    /// Takes a lost replica off, unless a shift is recorded (D1). From then on purchases are acknowledged without
    /// it, and a forced shift to it says what may be missing.
    pub(super) async fn degrade(&mut self, center: &CenterId) -> Result<(), LedgerError> {
        let lost = center.clone();
        let taken_off = self
            .ledger
            .change_as_master(move |topology| {
                let before = topology.in_sync.len();
                topology.in_sync.retain(|entry| entry.center != lost);
                if topology.in_sync.is_empty() && topology.state != TopologyState::Degraded {
                    topology.state = TopologyState::Degraded;
                    topology.degraded_since = Some(now());
                }
                Ok(topology.in_sync.len() < before)
            })
            .await?;
        self.replicas.lost.remove(center);
        if taken_off {
            self.metrics.degradations.inc();
            tracing::error!(
                partition = self.options.partition,
                %center,
                degrade_after_ms = self.options.degrade_after.as_millis(),
                "the replica is lost and taken off: sales go on, and what is sold now does not survive the loss \
                 of this center until it is back"
            );
        }
        Ok(())
    }

    /// Makes an attached replica one that is in sync: the fence of the next epoch goes into the ledger; when the
    /// replica shows it, it has everything before it, and one change of the topology says both (D2). Sales are
    /// held meanwhile.
    async fn bring_back(&mut self, center: &CenterId, seen: &PeerSeen) -> Result<(), LedgerError> {
        let State::Admitted { fence: from, run_id, .. } = &self.state else { return Ok(()) };
        let (from, run_id) = (from.clone(), run_id.clone());
        let Some(address) = self.peers.address(center).map(str::to_owned) else { return Ok(()) };
        // Everything that can fail for long is done before the fence is touched.
        let mut replica = self.peers.access().connect(&address).await?;
        let to = from.at(from.epoch.next());
        self.withdraw(NoAuthority::new(
            Cause::Promoting,
            format!("an epoch begins, in which the replica of center {center} is in sync"),
        ));
        let change = FenceChange::Lift { from: from.clone() };
        let outcome =
            roles::promote(self.ledger.conn().await?, Some(&from.to_string()), &change, &to).await?;
        if !matches!(outcome, Some(FenceOutcome::Set | FenceOutcome::Same)) {
            return Err(LedgerError::Changed);
        }
        let shown = shows(&mut replica, &seen.run_id, &to).await;
        let (partition, epoch) = (self.options.partition, to.epoch);
        let entry = shown.then(|| InSync {
            center: center.clone(),
            run_id: seen.run_id.clone(),
            extra: Extra::new(),
        });
        let (before, master_run) = (from.epoch, run_id.clone());
        self.ledger
            .change_as_master(move |topology| {
                if topology.epoch != before {
                    return Err("another epoch began meanwhile");
                }
                topology.epoch = epoch;
                if let Some(run) = topology.ledger_runs.get_mut(&partition) {
                    run.epoch = epoch;
                    run.run_id.clone_from(&master_run);
                }
                if let Some(entry) = &entry {
                    topology.in_sync.retain(|other| other.center != entry.center);
                    topology.in_sync.push(entry.clone());
                    topology.state = TopologyState::Steady;
                    topology.degraded_since = None;
                    topology.positions.remove(&partition);
                }
                Ok(())
            })
            .await?;
        let seen = self.ledger.standing().await?;
        self.readmit(to, run_id, seen.seq);
        if shown {
            self.replicas.retry = None;
            self.replicas.lost.remove(center);
            self.metrics.returns.inc();
            let Epoch(epoch) = epoch;
            tracing::info!(partition, %center, epoch, "the replica is in sync");
        } else {
            let failures = self.replicas.retry.map_or(0, |(_, failures)| failures);
            let wait = RETRY_MIN.saturating_mul(1 << failures.min(16)).min(RETRY_MAX);
            self.replicas.retry = Some((Instant::now() + wait, failures + 1));
            tracing::warn!(partition, %center, "the replica did not show the new epoch in time; it is tried again");
        }
        Ok(())
    }
}

/// Waits until this run of the replica shows the fence.
async fn shows(conn: &mut redis::aio::MultiplexedConnection, run_id: &str, fence: &Fence) -> bool {
    let (deadline, fence) = (Instant::now() + RETURN_WAIT, fence.to_string());
    while Instant::now() < deadline {
        match peers::look(conn).await {
            Ok(seen) if seen.run_id != run_id => return false,
            Ok(seen) if seen.fence.as_deref() == Some(&fence) => return true,
            Ok(_) => tokio::time::sleep(RETURN_POLL).await,
            Err(_) => return false,
        }
    }
    false
}
