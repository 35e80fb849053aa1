//! What operators see of the guardian: in `/readyz`, in metrics, and in the log.

use std::sync::Arc;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::Serialize;

/// What this center's server is at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerState {
    /// It has not been looked at.
    Unknown,
    /// It is the master, with this many replicas attached and online, `unknown` of them none of the topology's.
    Master {
        /// All that are attached and online.
        replicas: usize,
        /// Those that are no other center's.
        unknown: usize,
    },
    /// It has every change that the master sends.
    Attached,
    /// It is open for the master's server, which lost data and copies them from here.
    Source,
    /// It is on its way to one of these; why it is not there yet.
    Waiting(Arc<str>),
    /// It is left alone until somebody does what the reason says.
    Refused(Arc<str>),
}

/// The same for JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Replication {
    /// `unknown`, `master`, `attached`, `source`, `waiting`, `refused`.
    pub role: &'static str,
    /// Why it is waiting or refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<Arc<str>>,
    /// Of the master: replicas that are attached and online.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<usize>,
    /// Of the master: replicas that are no other center's. Anything but 0 is an alarm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unknown_replicas: Option<usize>,
}

impl From<&ServerState> for Replication {
    fn from(place: &ServerState) -> Replication {
        let bare = |role| Replication { role, reason: None, replicas: None, unknown_replicas: None };
        match place {
            ServerState::Unknown => bare("unknown"),
            ServerState::Master { replicas, unknown } => {
                Replication { replicas: Some(*replicas), unknown_replicas: Some(*unknown), ..bare("master") }
            }
            ServerState::Attached => bare("attached"),
            ServerState::Source => bare("source"),
            ServerState::Waiting(reason) => {
                Replication { reason: Some(Arc::clone(reason)), ..bare("waiting") }
            }
            ServerState::Refused(reason) => {
                Replication { reason: Some(Arc::clone(reason)), ..bare("refused") }
            }
        }
    }
}

/// What the guardian counts. Cheap to clone; all clones count together.
#[derive(Debug, Clone, Default)]
pub struct GuardianMetrics {
    /// The topology's epoch.
    pub epoch: Gauge,
    /// 1 while the topology's state is `degraded`.
    pub degraded: Gauge,
    /// Replicas that may be promoted without loss.
    pub in_sync: Gauge,
    /// 1 while this center's server is the master.
    pub master: Gauge,
    /// 1 while this center's server has every change that the master sends.
    pub attached: Gauge,
    /// Replicas of this center's server that are attached and online.
    pub replicas: Gauge,
    /// Those of them that are no other center's.
    pub unknown_replicas: Gauge,
    /// Replicas that were taken off because they were lost.
    pub degradations: Counter,
    /// Replicas that came back.
    pub returns: Counter,
    /// Tails that were saved before a server became a replica.
    pub tails_saved: Counter,
    /// Times that a master that had lost data copied them from a replica.
    pub restores: Counter,
}

impl GuardianMetrics {
    /// Registers all of them; the registry's owner sets the prefix.
    pub fn register(&self, registry: &mut Registry) {
        let topology = registry.sub_registry_with_prefix("topology");
        topology.register("epoch", "Epoch of the topology", self.epoch.clone());
        topology.register("degraded", "1 while a replica is missing", self.degraded.clone());
        topology.register("in_sync", "Replicas that may be promoted without loss", self.in_sync.clone());
        let server = registry.sub_registry_with_prefix("ledger_server");
        server.register("master", "1 while this center's Redis is the master", self.master.clone());
        server.register("attached", "1 while this center's Redis follows the master", self.attached.clone());
        server.register("replicas", "Replicas attached to this center's Redis", self.replicas.clone());
        server.register(
            "unknown_replicas",
            "Replicas attached to this center's Redis that no center knows",
            self.unknown_replicas.clone(),
        );
        server.register("degradations", "Replicas taken off as lost", self.degradations.clone());
        server.register("returns", "Replicas that came back in sync", self.returns.clone());
        server.register("tails_saved", "Diverged outbox tails saved to files", self.tails_saved.clone());
        server.register("restores", "Copies of lost data from a replica", self.restores.clone());
    }

    pub(super) fn show(&self, place: &ServerState) {
        let (master, attached, replicas, unknown) = match place {
            ServerState::Master { replicas, unknown } => (1, 0, *replicas, *unknown),
            ServerState::Attached => (0, 1, 0, 0),
            ServerState::Unknown
            | ServerState::Source
            | ServerState::Waiting(_)
            | ServerState::Refused(_) => (0, 0, 0, 0),
        };
        self.master.set(master);
        self.attached.set(attached);
        self.replicas.set(i64::try_from(replicas).unwrap_or(i64::MAX));
        self.unknown_replicas.set(i64::try_from(unknown).unwrap_or(i64::MAX));
    }
}
