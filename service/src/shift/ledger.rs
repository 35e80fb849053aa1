//! One partition's server: its connection, its role, and its epoch in the topology.

use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, IntoConnectionInfo};
use seckill_domain::{Epoch, OutboxId};
use seckill_ledger::admin::{FenceChange, FenceOutcome};
use seckill_ledger::roles::{self, Role, Standing};
use seckill_ledger::{Fence, InvalidFence, handover, outbox};

use super::verdict::{InitPolicy, Place, Seen, Verdict, judge};
use crate::topology::{
    LedgerRun, NoAuthority, StoreError, Topology, TopologyHandle, TopologyState, UpdateError,
};
use seckill_domain::CenterId;

/// A server on the same machine or network answers within milliseconds; one that loads its data says so at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Longer than a slow fsync of the append-only file.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How often an epoch is raised because the outbox has entries of a later one.
const EPOCH_ATTEMPTS: u32 = 3;

/// What can go wrong while a server is looked at or given its role.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The address makes no sense.
    #[error("the ledger's address cannot be used: {0}")]
    Address(#[source] redis::RedisError),
    /// The server did not answer, or not in a way that is understood.
    #[error("{0}")]
    Server(#[from] seckill_ledger::Error),
    /// The topology could not be changed.
    #[error(transparent)]
    Topology(#[from] StoreError),
    /// The fence changed while the server was being given its role, or the script found something else than the
    /// check before it.
    #[error("the ledger changed while it was being looked at")]
    Changed,
    /// A shift is recorded, or another center is the master: not this center's business.
    #[error("{0}")]
    NotOurs(&'static str),
    /// Another center's server cannot be used as the topology names it.
    #[error("{0}")]
    Peer(String),
    /// What only this server has could not be saved, so it does not become a replica.
    #[error("what only this Redis has cannot be saved in {}: {source}", folder.display())]
    Tail {
        /// The folder.
        folder: std::path::PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The formats of this ledger are another release's; adopting would not convert them.
    #[error("{0}; run the release that wrote it")]
    Schema(InvalidFence),
}

/// Why `ledger init` did not create a ledger.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is something already. Nothing was changed.
    #[error("{0}")]
    Refused(NoAuthority),
    /// There is this ledger already. Nothing was changed.
    #[error("the ledger exists already (fence {fence})")]
    Exists {
        /// Its fence.
        fence: String,
    },
    /// It could not be done.
    #[error(transparent)]
    Failed(#[from] LedgerError),
}

/// One partition's server and what may be done to it.
#[derive(Debug)]
pub struct Ledger {
    place: Place,
    client: Client,
    topology: TopologyHandle,
    conn: Option<MultiplexedConnection>,
}

impl Ledger {
    /// The server of a partition, not connected yet.
    pub fn new(
        center: CenterId,
        partition: u8,
        redis_url: &str,
        topology: TopologyHandle,
    ) -> Result<Ledger, LedgerError> {
        let info = redis_url.into_connection_info().map_err(LedgerError::Address)?;
        // Only the address: the rest of the URL may hold a password.
        let address = info.addr().to_string();
        let client = Client::open(info).map_err(LedgerError::Address)?;
        Ok(Ledger { place: Place { center, partition, address }, client, topology, conn: None })
    }

    /// `HOST:PORT` of the server.
    pub fn address(&self) -> &str {
        &self.place.address
    }

    pub(crate) fn topology(&self) -> std::sync::Arc<Topology> {
        self.topology.current()
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Forgets the connection: after a failed call nobody knows what is still on its way on it.
    pub(crate) fn disconnect(&mut self) {
        self.conn = None;
    }

    /// A connection that nobody else uses: `WATCH` belongs to it.
    pub(crate) async fn conn(&mut self) -> Result<&mut MultiplexedConnection, LedgerError> {
        let conn = match self.conn.take() {
            Some(conn) => conn,
            None => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(Some(CONNECT_TIMEOUT))
                    .set_response_timeout(Some(RESPONSE_TIMEOUT));
                self.client
                    .get_multiplexed_async_connection_with_config(&config)
                    .await
                    .map_err(seckill_ledger::Error::from)?
            }
        };
        Ok(self.conn.insert(conn))
    }

    pub(crate) async fn standing(&mut self) -> Result<Standing, LedgerError> {
        Ok(roles::standing(self.conn().await?).await?)
    }

    /// Looks at everything that decides about the server's role.
    pub(crate) async fn look(&mut self, stored: OutboxId) -> Result<Seen, LedgerError> {
        let conn = self.conn().await?;
        let standing = roles::standing(conn).await?;
        let last = outbox::last_id(conn).await?;
        let keys = self.keys().await?;
        // Every write of the ledger is an entry of its fence's epoch; a trimmed outbox may have none left.
        let epoch = standing.fence.as_deref().and_then(epoch_of).unwrap_or(0);
        let last = last.unwrap_or(OutboxId { epoch, seq: standing.seq });
        Ok(Seen { standing, last, keys, stored })
    }

    /// Creates the ledger on an empty server. `stored` is how far the order database of this center has stored.
    pub async fn init(&mut self, stored: OutboxId) -> Result<Fence, InitError> {
        let seen = self.look(stored).await?;
        let topology = self.topology.current();
        match judge(&self.place, &topology, &seen, InitPolicy::Automatic) {
            Verdict::Init => {
                let (fence, _) = self.promote(&seen, FenceChange::Init).await?;
                Ok(fence)
            }
            Verdict::Refuse(refusal) => Err(InitError::Refused(refusal)),
            Verdict::Admit | Verdict::Lift { .. } | Verdict::Adopt => {
                Err(InitError::Exists { fence: seen.standing.fence.unwrap_or_default() })
            }
        }
    }

    /// Makes the server the master at an epoch above everything that is known, and records its run. Returns the
    /// new fence and the run.
    pub(crate) async fn promote(
        &mut self,
        seen: &Seen,
        change: FenceChange,
    ) -> Result<(Fence, String), LedgerError> {
        let fence = self.promote_unrecorded(seen, &change).await?;
        let run_id = seen.standing.run_id.clone();
        self.record(fence.epoch, &run_id).await?;
        Ok((fence, run_id))
    }

    /// As [`Ledger::promote`], but the topology does not say yet that the server may be used.
    pub(crate) async fn promote_unrecorded(
        &mut self,
        seen: &Seen,
        change: &FenceChange,
    ) -> Result<Fence, LedgerError> {
        if self.is_recorded_master(&seen.standing) {
            // A shift that was given up may have left its writes held up.
            handover::resume(self.conn().await?).await?;
        } else if matches!(seen.standing.role, Role::Master { .. }) {
            // A server that came up as a master is put aside first: nobody writes between the check and the new
            // epoch (S1).
            self.isolate().await?;
        }
        let expected = seen.standing.fence.clone();
        let adopting = *change == FenceChange::Adopt;
        let mut floor = [
            expected.as_deref().and_then(epoch_of).unwrap_or(0),
            seen.last.epoch,
            // An adopted ledger has to start behind what is stored, or readers would skip its entries.
            if adopting { seen.stored.epoch } else { 0 },
        ]
        .into_iter()
        .max()
        .unwrap_or(0);
        for _ in 0..EPOCH_ATTEMPTS {
            // The epoch is in the topology before the fence is sent, and is never used again (H1).
            let to = self.next_epoch(floor, adopting).await?;
            let outcome = roles::promote(self.conn().await?, expected.as_deref(), change, &to).await;
            match outcome {
                Ok(Some(FenceOutcome::Set | FenceOutcome::Same)) => return Ok(to),
                Ok(Some(FenceOutcome::EpochTooLow { last })) => {
                    self.isolate().await?;
                    floor = last;
                }
                Ok(Some(
                    FenceOutcome::Exists { .. } | FenceOutcome::NotEmpty | FenceOutcome::Mismatch { .. },
                ))
                | Ok(None) => {
                    self.isolate().await?;
                    return Err(LedgerError::Changed);
                }
                Err(error) => {
                    // It may be the master without a fence that fits: put it back, if it answers.
                    self.disconnect();
                    let _ = self.isolate().await;
                    return Err(error.into());
                }
            }
        }
        Err(LedgerError::Changed)
    }

    /// Whether this run of the server was made the master before and has been it ever since: it has lost nothing, and
    /// the fence kept everybody out who had no authority.
    pub(crate) fn is_recorded_master(&self, standing: &Standing) -> bool {
        let topology = self.topology.current();
        let run = topology.ledger_runs.get(&self.place.partition);
        matches!(standing.role, Role::Master { .. })
            && topology.master == self.place.center
            && run.is_some_and(|run| run.run_id == standing.run_id)
    }

    /// Lifts a topology that a fence is ahead of to the epoch after that fence's, whosever it is: the number of an
    /// epoch is used once (H1).
    pub(crate) async fn lift_topology(&self, ahead: Epoch) -> Result<(), LedgerError> {
        self.change_topology(move |topology| {
            if topology.master_shift().is_some() {
                return Err("a shift is recorded in the topology");
            }
            topology.epoch = topology.epoch.max(ahead.next());
            Ok(())
        })
        .await
    }

    /// Changes the topology as the guardian of the master, and only while no shift is recorded (D1).
    pub(crate) async fn change_as_master<T: Send + 'static>(
        &self,
        mut change: impl FnMut(&mut Topology) -> Result<T, &'static str> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let center = self.place.center.clone();
        self.change_topology(move |topology| {
            if topology.master != center {
                return Err("another center is the master");
            }
            if topology.master_shift().is_some() {
                return Err("a shift is recorded in the topology");
            }
            change(topology)
        })
        .await
    }

    /// How many keys the server holds.
    pub(crate) async fn keys(&mut self) -> Result<u64, LedgerError> {
        let conn = self.conn().await?;
        Ok(redis::cmd("DBSIZE").query_async(conn).await.map_err(seckill_ledger::Error::from)?)
    }

    async fn next_epoch(&self, floor: u64, adopting: bool) -> Result<Fence, LedgerError> {
        let Place { center, partition, .. } = self.place.clone();
        self.change_topology(move |topology| {
            if topology.master != center {
                return Err("another center is the master");
            }
            if topology.master_shift().is_some() {
                return Err("a shift is recorded in the topology");
            }
            topology.epoch = topology.epoch.max(Epoch(floor)).next();
            if adopting {
                topology.adopting.insert(partition);
                // What the adopted ledger holds, and what is put back into it, is what no replica has. Each counts
                // again from the epoch that it has shown (D2, K4).
                if !topology.in_sync.is_empty() {
                    topology.in_sync.clear();
                    topology.state = TopologyState::Degraded;
                }
            }
            Ok(topology.fence())
        })
        .await
    }

    /// Writes down that this run of the server had this epoch's fence, and that no adoption is under way.
    pub(crate) async fn record(&self, epoch: Epoch, run_id: &str) -> Result<(), LedgerError> {
        let partition = self.place.partition;
        let run_id = run_id.to_owned();
        self.change_topology(move |topology| {
            if topology.epoch != epoch {
                return Err("another epoch began meanwhile");
            }
            let run = topology.ledger_runs.entry(partition).or_insert_with(|| LedgerRun {
                run_id: String::new(),
                epoch,
                extra: serde_json::Map::new(),
            });
            run.run_id.clone_from(&run_id);
            run.epoch = epoch;
            topology.adopting.remove(&partition);
            topology.restoring.remove(&partition);
            Ok(())
        })
        .await
    }

    async fn change_topology<T: Send + 'static>(
        &self,
        change: impl FnMut(&mut Topology) -> Result<T, &'static str> + Send + 'static,
    ) -> Result<T, LedgerError> {
        self.topology.update(change).await.map_err(|error| match error {
            UpdateError::Refused(reason) => LedgerError::NotOurs(reason),
            UpdateError::Store(error) => LedgerError::Topology(error),
        })
    }

    /// Puts the server out of harm's way.
    pub(crate) async fn isolate(&mut self) -> Result<(), LedgerError> {
        Ok(roles::isolate(self.conn().await?).await?)
    }
}

/// The epoch in a fence's text, also if the rest of it is not ours.
fn epoch_of(fence: &str) -> Option<u64> {
    fence.split(':').nth(2)?.parse().ok()
}
