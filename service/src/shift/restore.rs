//! A master whose server is behind a replica: it lost data, and they come from there (S5).
//!
//! Nothing that was acknowledged may be lost, and no id may be given out twice, so such a master is not opened.
//! A replica whose link is down serves nobody who wants to copy from it, so it has to become a master for that.
//! What happens:
//!
//! 1. the master's guardian records in the topology from whom it copies;
//! 2. the guardian of that center opens its server, at its old fence: nobody writes to it, because authority to
//!    write lies with the services of the center that the fence names, and those write to their own server;
//! 3. the master's guardian attaches its server there, and waits until everything is there and in its own log;
//! 4. it takes its server out again and deletes the record. From there on all is as after any restart: the server
//!    is behind nobody, and is opened at the next epoch; the other one is attached to it.
//!
//! Whoever dies in between finds the record and goes on.

use std::time::Instant;

use seckill_domain::OutboxId;
use seckill_ledger::Fence;
use seckill_ledger::roles::{self, NOWHERE, Role};

use super::guardian::Guardian;
use super::ledger::LedgerError;
use super::replica::has_all;
use super::verdict::{Seen, Verdict};
use crate::topology::{Cause, NoAuthority, Restore, Topology};

impl Guardian {
    /// Whether the master's server may be opened as far as the other centers' servers are concerned (S5). If not,
    /// what has to be done before is begun or continued, and the next look asks again.
    pub(super) async fn is_behind_nobody(
        &mut self,
        topology: &Topology,
        seen: &Seen,
        verdict: &Verdict,
    ) -> Result<bool, LedgerError> {
        let partition = self.options.partition;
        if let Some(restore) = topology.restoring.get(&partition) {
            self.restore(topology, restore, seen).await?;
            return Ok(false);
        }
        let from_scratch = match verdict {
            // After a shift that was given up, for instance.
            Verdict::Lift { .. } if self.ledger.is_recorded_master(&seen.standing) => return Ok(true),
            Verdict::Lift { .. } => false,
            Verdict::Refuse(refusal) => match refusal.cause {
                Cause::RolledBack => false,
                Cause::Empty if seen.keys == 0 => true,
                _ => return Ok(true),
            },
            Verdict::Admit | Verdict::Init | Verdict::Adopt => return Ok(true),
        };
        let Some(run) = topology.ledger_runs.get(&partition) else { return Ok(true) };
        if topology.centers.len() < 2 {
            return Ok(true);
        }
        let wait = |reason: String| NoAuthority::new(Cause::Promoting, reason);
        if !self.peers.looked() {
            self.withdraw(wait("the other centers' servers are being looked at".to_owned()));
            return Ok(false);
        }
        let own = (!from_scratch).then_some(seen.last);
        let views = self.peers.views();
        let ahead = views
            .iter()
            .filter_map(|(center, view)| {
                let peer = view.as_ref().ok()?;
                let last = peer.last(&topology.ledger_id)?;
                // What ends in an epoch before the last promotion is an old copy, or went another way.
                (last.epoch >= run.epoch.0 && Some(last) > own).then_some((last, center, peer))
            })
            .max_by_key(|(last, ..)| *last);
        if let Some((last, center, peer)) = ahead {
            // It may have been seen after this server was, with entries that this one got in between.
            let again = self.ledger.standing().await?;
            if !from_scratch
                && again.fence == seen.standing.fence
                && again.seq >= last.seq
                && again.seq > seen.standing.seq
            {
                return Err(LedgerError::Changed);
            }
            let fence = peer.fence.clone().unwrap_or_default();
            tracing::error!(
                partition, %center, there = %last, here = own.map(|id| id.to_string()),
                "the master's Redis lost data that a replica has; they are copied from there before it is opened"
            );
            self.metrics.restores.inc();
            let restore = Restore { from: center.clone(), fence, extra: serde_json::Map::new() };
            self.ledger
                .change_as_master(move |topology| {
                    topology.restoring.insert(partition, restore.clone());
                    Ok(())
                })
                .await?;
            self.withdraw(NoAuthority::new(Cause::Restoring, "lost data are copied from a replica"));
            return Ok(false);
        }
        // One that is in sync may be ahead; without a look at it nobody knows. After that time it counts as lost
        // in any case.
        let silent = topology.in_sync.iter().find_map(|entry| {
            let reason = self.peers.view(&entry.center).err()?;
            Some((entry.center.clone(), reason))
        });
        let Some((center, reason)) = silent else {
            self.waiting_since = None;
            return Ok(true);
        };
        let since = *self.waiting_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= self.options.degrade_after {
            self.degrade(&center).await?;
        } else {
            self.withdraw(wait(format!(
                "this Redis restarted; the one of center {center} is in sync and does not answer ({reason}). It \
                 is waited for up to {} ms",
                self.options.degrade_after.as_millis()
            )));
        }
        Ok(false)
    }

    async fn restore(
        &mut self,
        topology: &Topology,
        restore: &Restore,
        seen: &Seen,
    ) -> Result<(), LedgerError> {
        let Restore { from, fence, .. } = restore;
        let held = match fence.parse::<Fence>() {
            Ok(held) => held,
            Err(error) => {
                self.refuse(NoAuthority::new(Cause::Foreign, format!("the recorded source: {error}")));
                return Ok(());
            }
        };
        let source = match self.peers.view(from) {
            Ok(source) => source,
            Err(reason) => {
                self.refuse(NoAuthority::new(
                    Cause::Restoring,
                    format!(
                        "this Redis lost data that the one of center {from} has, and that one does not answer: \
                         {reason}. Sales have stopped until it is back; to go on without these data, run `seckill \
                         ledger adopt`"
                    ),
                ));
                return Ok(());
            }
        };
        self.withdraw(NoAuthority::new(
            Cause::Restoring,
            format!("lost data are copied from the Redis of center {from}; sales go on when they are here"),
        ));
        let open = matches!(source.role, Role::Master { .. }) && source.fence.as_ref() == Some(fence);
        let address =
            topology.center(from).and_then(|center| center.ledger.get(self.options.partition as usize));
        let (true, Some(address)) = (open, address) else { return Ok(()) };
        let last = OutboxId { epoch: held.epoch.0, seq: source.seq };
        let attached = matches!(&seen.standing.role, Role::Replica { of, .. } if of == address);
        if !attached {
            let address = address.clone();
            let mut conn = self.peers.access().connect(&address).await?;
            self.attach(&address, &seen.standing, &mut conn).await?;
            return Ok(());
        }
        let arrived = has_all(&seen.standing, &last, fence)
            && seen.standing.replication.stream == source.replication.stream
            && seen.standing.log_ready;
        if !arrived {
            return Ok(());
        }
        if !roles::follow(self.ledger.conn().await?, Some(fence), NOWHERE.0, NOWHERE.1).await? {
            return Err(LedgerError::Changed);
        }
        let (partition, done) = (self.options.partition, restore.clone());
        self.ledger
            .change_as_master(move |topology| {
                if topology.restoring.get(&partition) == Some(&done) {
                    topology.restoring.remove(&partition);
                }
                Ok(())
            })
            .await?;
        tracing::warn!(partition, %from, last = %last, "what was lost is here again");
        Ok(())
    }
}
