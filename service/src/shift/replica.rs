//! A server whose center is not the master: attached to the master's, once it is certain that nothing is lost by
//! that.

use std::sync::Arc;

use redis::aio::MultiplexedConnection;
use seckill_domain::OutboxId;
use seckill_ledger::roles::{self, NOWHERE, Role, Standing};
use seckill_ledger::{Fence, InvalidFence, handover};

use super::guardian::Guardian;
use super::ledger::LedgerError;
use super::peers::{Access, split};
use super::record::add_tail;
use super::status::ServerState;
use super::tail::{self, Owner};
use crate::topology::{Restore, Tail, Topology};

impl Guardian {
    /// One look at a server that is to be a replica. What goes wrong is told and tried again.
    pub(super) async fn look_after_replica(&mut self, topology: &Topology) {
        match self.as_replica(topology).await {
            Ok(place) => self.report(&place),
            Err(error) => {
                self.ledger.disconnect();
                self.report(&ServerState::Waiting(format!("{error}").into()));
            }
        }
    }

    async fn as_replica(&mut self, topology: &Topology) -> Result<ServerState, LedgerError> {
        let partition = self.options.partition;
        let standing = self.ledger.standing().await?;
        if let Some(restore) = topology.restoring.get(&partition)
            && restore.from == self.options.center
        {
            return self.be_source(restore, &standing).await;
        }
        let master = &topology.master;
        let address = topology.center(master).and_then(|center| center.ledger.get(usize::from(partition)));
        let Some(address) = address else {
            return Ok(ServerState::Waiting(
                format!(
                    "the topology does not say where the Redis of the master center {master} is: name it \
                     under cluster.centers of the configuration"
                )
                .into(),
            ));
        };
        if let Role::Replica { of, link, .. } = &standing.role
            && of == address
        {
            return Ok(match standing.replication.linked {
                true => ServerState::Attached,
                false => ServerState::Waiting(format!("copying from {address}: {link}").into()),
            });
        }
        match self.peers.view(master) {
            // S5: it is opened by its own guardian, when nobody has more than it.
            Ok(seen)
                if matches!(seen.role, Role::Master { .. })
                    && seen.fence.as_deref() == Some(topology.fence().to_string().as_str()) => {}
            Ok(_) => {
                return Ok(ServerState::Waiting(
                    format!("the Redis of the master center {master} is not open yet").into(),
                ));
            }
            Err(reason) => {
                return Ok(ServerState::Waiting(
                    format!("the Redis of the master center {master} at {address} cannot be seen: {reason}")
                        .into(),
                ));
            }
        }
        match self.kinship(topology, &standing).await? {
            Kinship::Empty | Kinship::Same => {}
            Kinship::Later(found) => {
                // H1: a fence that arrived late must not keep the two apart for ever.
                self.ledger.lift_topology(found.epoch).await?;
                return Ok(ServerState::Waiting(format!("the fence is at epoch {}", found.epoch).into()));
            }
            Kinship::Refused(reason) => return Ok(ServerState::Refused(reason)),
        }
        let address = address.clone();
        let mut source = self.peers.access().connect(&address).await?;
        self.attach(&address, &standing, &mut source).await
    }

    /// Opens this server for the master's, which copies what it lost. The fence stays that of an epoch in which
    /// this center was not the master, so nobody writes to it.
    async fn be_source(
        &mut self,
        restore: &Restore,
        standing: &Standing,
    ) -> Result<ServerState, LedgerError> {
        if matches!(standing.role, Role::Master { .. }) {
            return Ok(ServerState::Source);
        }
        if standing.fence.as_deref() != Some(restore.fence.as_str()) {
            return Ok(ServerState::Waiting(
                format!(
                    "the master is to copy the ledger of fence {} from here, but the fence is {}",
                    restore.fence,
                    standing.fence.as_deref().unwrap_or("missing")
                )
                .into(),
            ));
        }
        match roles::open_as_source(self.ledger.conn().await?, &restore.fence).await? {
            true => {
                tracing::warn!(
                    partition = self.options.partition,
                    fence = restore.fence,
                    "the master's Redis lost data; it copies them from here"
                );
                Ok(ServerState::Source)
            }
            false => Err(LedgerError::Changed),
        }
    }

    /// Saves what only this server has (S3), then attaches it (S2). It holds no authority, and is out of harm's
    /// way from before the comparison on.
    pub(super) async fn attach(
        &mut self,
        address: &str,
        standing: &Standing,
        source: &mut MultiplexedConnection,
    ) -> Result<ServerState, LedgerError> {
        let (host, port) = split(address)?;
        let folder = Arc::clone(&self.options.diverged_dir);
        let owner =
            Owner { center: &self.options.center, partition: self.options.partition, folder: &folder };
        let conn = self.ledger.conn().await?;
        let expected = standing.fence.as_deref();
        let out = matches!(standing.role, Role::Master { .. });
        if out && !roles::follow(conn, expected, NOWHERE.0, NOWHERE.1).await? {
            return Err(LedgerError::Changed);
        }
        if let Some(saved) = tail::save(&owner, standing, conn, source).await? {
            if !saved.again {
                self.metrics.tails_saved.inc();
                tracing::error!(
                    partition = self.options.partition,
                    file = %saved.file.display(),
                    entries = saved.entries,
                    orders = saved.orders,
                    common = saved.common.map(|id| id.to_string()),
                    "this Redis held what the master does not have; it is saved before it becomes a replica"
                );
            }
            let (center, tail) = (self.options.center.clone(), Tail::from(&saved));
            let named = self.topology.update(move |topology| {
                add_tail(topology, &center, saved.last, &tail);
                Ok::<_, std::convert::Infallible>(())
            });
            if let Err(error) = named.await {
                tracing::warn!(%error, "the saved tail could not be named in the history of shifts");
            }
        }
        // A shift that was recorded meanwhile decides by itself what becomes of this server (S3).
        if self.topology.current().master_shift().is_some() {
            return Err(LedgerError::NotOurs("a shift is recorded in the topology"));
        }
        let conn = self.ledger.conn().await?;
        // A shift whose coordinator died may have left its writes held up; those of its master are held up with them.
        handover::resume(conn).await?;
        sign_in_as(self.peers.access(), conn).await?;
        if !roles::follow(conn, expected, host, port).await? {
            return Err(LedgerError::Changed);
        }
        tracing::info!(partition = self.options.partition, address, "this Redis follows that one");
        Ok(ServerState::Waiting(format!("copying from {address}").into()))
    }

    /// What this server holds, beside what the topology says.
    async fn kinship(&mut self, topology: &Topology, standing: &Standing) -> Result<Kinship, LedgerError> {
        let address = self.ledger.address().to_owned();
        let Some(text) = &standing.fence else {
            let keys = self.ledger.keys().await?;
            return Ok(match keys {
                0 => Kinship::Empty,
                _ => Kinship::Refused(
                    format!(
                        "the Redis at {address} holds {keys} keys that are not a ledger's. Give the ledger a \
                         Redis of its own, with an empty data folder"
                    )
                    .into(),
                ),
            });
        };
        let fence = match text.parse::<Fence>() {
            Ok(fence) => fence,
            Err(error @ InvalidFence::Schema { .. }) => {
                return Ok(Kinship::Refused(
                    format!("the ledger at {address} cannot be used: {error}. Run the release that wrote it")
                        .into(),
                ));
            }
            Err(error) => {
                return Ok(Kinship::Refused(
                    format!(
                        "the ledger at {address} cannot be used: {error}. To make this Redis a replica, stop \
                         it, move its data folder away and start it again"
                    )
                    .into(),
                ));
            }
        };
        if fence.ledger_id != topology.ledger_id {
            return Ok(Kinship::Refused(
                format!(
                    "the Redis at {address} holds another ledger ({}, this topology's is {}) and is left alone. \
                     Correct the address; or, to make it a replica, stop it, move its data folder away and \
                     start it again",
                    fence.ledger_id, topology.ledger_id
                )
                .into(),
            ));
        }
        Ok(if fence.epoch > topology.epoch { Kinship::Later(fence) } else { Kinship::Same })
    }
}

enum Kinship {
    /// Nothing.
    Empty,
    /// This ledger, of this epoch or an earlier one.
    Same,
    /// This ledger at an epoch that the topology has not reached.
    Later(Fence),
    /// Something that must not be overwritten.
    Refused(Arc<str>),
}

/// Tells a server as whom it signs in at its master: with the account that this service uses.
async fn sign_in_as(access: &Access, conn: &mut MultiplexedConnection) -> Result<(), LedgerError> {
    let (user, password) = access.account();
    let Some(password) = password else { return Ok(()) };
    let mut set = redis::cmd("CONFIG");
    set.arg("SET").arg("masterauth").arg(password);
    if let Some(user) = user {
        set.arg("masteruser").arg(user);
    }
    Ok(set.query_async::<()>(conn).await.map_err(seckill_ledger::Error::from)?)
}

/// Whether everything that `source` had arrived.
pub(super) fn has_all(own: &Standing, source: &OutboxId, fence: &str) -> bool {
    own.replication.linked && own.fence.as_deref() == Some(fence) && own.seq >= source.seq
}
