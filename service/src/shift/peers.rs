//! What the servers of the other centers show. They are looked at, never changed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, IntoConnectionInfo};
use seckill_domain::{CenterId, OutboxId};
use seckill_ledger::roles::{self, Replication, Role};
use seckill_ledger::{Fence, LedgerId};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::ledger::LedgerError;
use crate::topology::Topology;

/// How often each of them is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// What was seen longer ago says nothing about now: a few looks, and a round trip between centers.
const FRESH: Duration = Duration::from_millis(1500);
/// A connection to another center takes two round trips.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// An answer that takes longer counts as none.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a server of another center showed.
#[derive(Debug, Clone)]
pub(crate) struct PeerSeen {
    /// Its run.
    pub(crate) run_id: String,
    /// Its role.
    pub(crate) role: Role,
    /// Its fence as text.
    pub(crate) fence: Option<String>,
    /// Sequence of its last outbox entry.
    pub(crate) seq: u64,
    /// Who copies from whom.
    pub(crate) replication: Replication,
    /// Its append-only file has everything that it holds.
    pub(crate) log_ready: bool,
    /// When it was seen.
    pub(crate) at: Instant,
}

impl PeerSeen {
    /// Its last outbox entry, if it holds this ledger: every epoch begins with an entry.
    pub(crate) fn last(&self, ledger_id: &LedgerId) -> Option<OutboxId> {
        let fence = self.fence.as_deref()?.parse::<Fence>().ok()?;
        (fence.ledger_id == *ledger_id).then_some(OutboxId { epoch: fence.epoch.0, seq: self.seq })
    }

    /// Whether it is attached to the server whose stream of changes this is, and receives them.
    pub(crate) fn follows(&self, stream: &str) -> bool {
        matches!(self.role, Role::Replica { .. })
            && self.replication.linked
            && self.replication.stream == stream
    }
}

/// How servers of the same partition are reached: with the account and the kind of connection of this center's
/// own server.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    own: ConnectionInfo,
}

impl Access {
    pub(crate) fn like(redis_url: &str) -> Result<Access, LedgerError> {
        Ok(Access { own: redis_url.into_connection_info().map_err(LedgerError::Address)? })
    }

    /// Account that a replica signs in with at its master.
    pub(crate) fn account(&self) -> (Option<&str>, Option<&str>) {
        let settings = self.own.redis_settings();
        (settings.username(), settings.password())
    }

    /// A new connection to this center's own server.
    pub(crate) async fn connect_own(&self) -> Result<MultiplexedConnection, LedgerError> {
        open(self.own.clone()).await
    }

    /// A new connection to `HOST:PORT`.
    pub(crate) async fn connect(&self, address: &str) -> Result<MultiplexedConnection, LedgerError> {
        let (host, port) = split(address)?;
        let addr = match self.own.addr().clone() {
            ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
                ConnectionAddr::TcpTls { host: host.to_owned(), port, insecure, tls_params }
            }
            _ => ConnectionAddr::Tcp(host.to_owned(), port),
        };
        open(self.own.clone().set_addr(addr)).await
    }
}

async fn open(info: ConnectionInfo) -> Result<MultiplexedConnection, LedgerError> {
    let client = Client::open(info).map_err(LedgerError::Address)?;
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(CONNECT_TIMEOUT))
        .set_response_timeout(Some(RESPONSE_TIMEOUT));
    Ok(client
        .get_multiplexed_async_connection_with_config(&config)
        .await
        .map_err(seckill_ledger::Error::from)?)
}

/// `HOST:PORT` in its parts.
pub(crate) fn split(address: &str) -> Result<(&str, u16), LedgerError> {
    let bad = || LedgerError::Peer(format!("{address:?} in the topology is not HOST:PORT"));
    let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host, port.parse().map_err(|_| bad())?))
}

/// Looks at a server once.
pub(crate) async fn look(conn: &mut MultiplexedConnection) -> Result<PeerSeen, seckill_ledger::Error> {
    let at = Instant::now();
    let standing = roles::standing(conn).await?;
    Ok(PeerSeen {
        run_id: standing.run_id,
        role: standing.role,
        fence: standing.fence,
        seq: standing.seq,
        replication: standing.replication,
        log_ready: standing.log_ready,
        at,
    })
}

/// The other centers' servers of one partition, each looked at by a task of its own, because one that does not
/// answer must not hold up the look at this center's.
#[derive(Debug)]
pub(crate) struct Peers {
    access: Access,
    watched: BTreeMap<CenterId, Watched>,
    tracker: TaskTracker,
    token: CancellationToken,
}

#[derive(Debug)]
struct Watched {
    address: String,
    view: watch::Receiver<View>,
    _end: DropGuard,
}

/// What a server showed, or why that is not known.
pub(crate) type View = Result<Arc<PeerSeen>, Arc<str>>;

impl Peers {
    pub(crate) fn new(access: Access, tracker: &TaskTracker, token: &CancellationToken) -> Peers {
        Peers { access, watched: BTreeMap::new(), tracker: tracker.clone(), token: token.clone() }
    }

    pub(crate) fn access(&self) -> &Access {
        &self.access
    }

    /// Watches the servers that the topology names, and no others.
    pub(crate) fn keep(&mut self, topology: &Topology, own: &CenterId, partition: u8) {
        let named: BTreeMap<&CenterId, &String> = topology
            .centers
            .iter()
            .filter(|(id, _)| *id != own)
            .filter_map(|(id, center)| Some((id, center.ledger.get(usize::from(partition))?)))
            .collect();
        self.watched.retain(|id, watched| named.get(id).is_some_and(|address| **address == watched.address));
        for (id, address) in named {
            if !self.watched.contains_key(id) {
                self.watched.insert(id.clone(), self.watch(address.clone()));
            }
        }
    }

    fn watch(&self, address: String) -> Watched {
        let end = self.token.child_token();
        let (publish, view) = watch::channel(Err(Arc::from("it has not been looked at yet")));
        let (access, target, token) = (self.access.clone(), address.clone(), end.clone());
        self.tracker.spawn(async move {
            let mut ticks = tokio::time::interval(LOOK_INTERVAL);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut conn = None;
            while token.run_until_cancelled(ticks.tick()).await.is_some() {
                let seen = look_at(&access, &target, &mut conn).await;
                let _ =
                    publish.send_replace(seen.map(Arc::new).map_err(|error| Arc::from(error.to_string())));
            }
        });
        Watched { address, view, _end: end.drop_guard() }
    }

    /// Where a center's server is.
    pub(crate) fn address(&self, center: &CenterId) -> Option<&str> {
        self.watched.get(center).map(|watched| watched.address.as_str())
    }

    /// What a center's server showed just now; the error says why that is not known.
    pub(crate) fn view(&self, center: &CenterId) -> View {
        match self.watched.get(center) {
            None => Err(Arc::from("the topology names no ledger address for it")),
            Some(watched) => match &*watched.view.borrow() {
                Ok(seen) if seen.at.elapsed() < FRESH => Ok(Arc::clone(seen)),
                Ok(_) => Err(Arc::from("it has not answered for a while")),
                Err(reason) => Err(Arc::clone(reason)),
            },
        }
    }

    /// Every watched center with what its server showed just now.
    pub(crate) fn views(&self) -> Vec<(CenterId, View)> {
        self.watched.keys().map(|center| (center.clone(), self.view(center))).collect()
    }

    /// Whether every server has been looked at at least once, with whatever outcome.
    pub(crate) fn looked(&self) -> bool {
        self.watched.values().all(|watched| watched.view.has_changed().unwrap_or(true))
    }
}

async fn look_at(
    access: &Access,
    address: &str,
    slot: &mut Option<MultiplexedConnection>,
) -> Result<PeerSeen, LedgerError> {
    let mut conn = match slot.take() {
        Some(conn) => conn,
        None => access.connect(address).await?,
    };
    let seen = look(&mut conn).await?;
    *slot = Some(conn);
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        assert_eq!(split("10.0.0.5:6379").unwrap(), ("10.0.0.5", 6379));
        assert_eq!(split("[::1]:6379").unwrap(), ("::1", 6379));
        for bad in ["", "host", "host:", "host:70000", "host:x"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }
}
