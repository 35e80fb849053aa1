//! Whether this service may write to the ledger, and under which fence.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustix::time::{ClockId, clock_gettime};
use seckill_domain::{CenterId, Epoch};
use seckill_ledger::Fence;
use tokio::sync::{Notify, watch};

use super::document::{Durability, Topology};
use super::shift::ShiftMode;

/// The lease ends this much earlier than it was granted for (a share of it), because the clocks of two machines
/// do not run at exactly the same rate (A1). NTP slews by at most 0.05 %.
const CLOCK_RATE_MARGIN: u32 = 100;

/// Nanoseconds on a clock that also runs while the machine is suspended (A1).
pub(crate) fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    // A machine that is up for 584 years would overflow this.
    (now.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec as u64)
}

/// Why there is no authority, in one word, for metrics and programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The topology has not been read, or the ledger not been looked at, since the start.
    Starting,
    /// The topology could not be confirmed within the lease.
    LeaseExpired,
    /// Another center is the master.
    NotMaster,
    /// A shift is recorded in the topology.
    Shifting,
    /// The ledger's server does not answer.
    Unreachable,
    /// The server is being given its role.
    Promoting,
    /// There is no ledger yet: `ledger init` creates it.
    NotInitialised,
    /// The ledger is empty though it was not before.
    Empty,
    /// The ledger is behind what was seen of it.
    RolledBack,
    /// It is the ledger of somebody else.
    Foreign,
    /// The ledger has formats of another release.
    Schema,
    /// The ledger is being adopted.
    Adopting,
    /// The ledger lost data that a replica has; they are copied from there.
    Restoring,
    /// The topology cannot be changed.
    TopologyUnwritable,
    /// The order database cannot be asked how far it has stored.
    OrdersUnreadable,
}

impl Cause {
    /// All causes.
    pub const ALL: [Cause; 15] = [
        Cause::Starting,
        Cause::LeaseExpired,
        Cause::NotMaster,
        Cause::Shifting,
        Cause::Unreachable,
        Cause::Promoting,
        Cause::NotInitialised,
        Cause::Empty,
        Cause::RolledBack,
        Cause::Foreign,
        Cause::Schema,
        Cause::Adopting,
        Cause::Restoring,
        Cause::TopologyUnwritable,
        Cause::OrdersUnreadable,
    ];

    /// The cause's name in metrics and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Starting => "starting",
            Cause::LeaseExpired => "lease_expired",
            Cause::NotMaster => "not_master",
            Cause::Shifting => "shifting",
            Cause::Unreachable => "unreachable",
            Cause::Promoting => "promoting",
            Cause::NotInitialised => "not_initialised",
            Cause::Empty => "empty",
            Cause::RolledBack => "rolled_back",
            Cause::Foreign => "foreign",
            Cause::Schema => "schema",
            Cause::Adopting => "adopting",
            Cause::Restoring => "restoring",
            Cause::TopologyUnwritable => "topology_unwritable",
            Cause::OrdersUnreadable => "orders_unreadable",
        }
    }

    /// Whether it stays like this until somebody does what the reason says.
    pub fn needs_somebody(self) -> bool {
        match self {
            Cause::NotInitialised
            | Cause::Empty
            | Cause::RolledBack
            | Cause::Foreign
            | Cause::Schema
            | Cause::TopologyUnwritable
            | Cause::OrdersUnreadable => true,
            Cause::Starting
            | Cause::LeaseExpired
            | Cause::NotMaster
            | Cause::Shifting
            | Cause::Unreachable
            | Cause::Promoting
            | Cause::Restoring
            | Cause::Adopting => false,
        }
    }
}

/// Why nothing may be written to the ledger now, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct NoAuthority {
    /// The cause in one word.
    pub cause: Cause,
    /// For whoever runs the service.
    pub reason: Arc<str>,
}

impl NoAuthority {
    /// A refusal.
    pub fn new(cause: Cause, reason: impl Into<Arc<str>>) -> NoAuthority {
        NoAuthority { cause, reason: reason.into() }
    }
}

/// What an acknowledgement waits for, beside the master's append-only file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Acknowledge {
    /// Nothing.
    Local,
    /// This many replicas have to confirm it (`WAIT`).
    Replicated {
        /// All replicas that are attached and online, so that the ones in sync are among those that confirm
        /// (K1); never less than the number of those in sync.
        replicas: usize,
    },
}

impl Acknowledge {
    /// The durability that an acknowledgement has.
    pub fn durability(self) -> Durability {
        match self {
            Acknowledge::Local => Durability::Local,
            Acknowledge::Replicated { .. } => Durability::Replicated,
        }
    }
}

/// The permission to write to the ledger, as it is at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// What every write carries.
    pub fence: Fence,
    /// What has to be waited for before a write made under this fence counts.
    pub acknowledge: Acknowledge,
    /// The run of each partition's server that the guardian admitted.
    pub run_ids: Box<[Arc<str>]>,
    /// Whether the other center is given up for now: what is written under this grant survives less than the
    /// topology wants, until the next epoch brings the replicas back.
    pub degraded: bool,
}

impl Grant {
    /// The run of a partition's server. A connection made later may lead to a restarted server: compare before
    /// the first write on it. `None` for the grants of tests and benches.
    pub fn run_id(&self, partition: u8) -> Option<&str> {
        self.run_ids.get(usize::from(partition)).map(|run_id| &**run_id)
    }
}

/// What `/readyz`, metrics and the CLI show.
pub type AuthorityStatus = Result<Arc<Grant>, NoAuthority>;

/// Answers whether this service may write to the ledger right now. Cheap to ask and to clone.
///
/// It may while three things hold: the topology was confirmed within the lease (A1), it names this center as
/// the master, and the guardian of every partition has admitted its server at exactly the topology's fence.
#[derive(Debug, Clone)]
pub struct Authority {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// `None`: fixed, for tests and benches.
    center: Option<CenterId>,
    lease_ns: u64,
    verdict: ArcSwap<Verdict>,
    /// What a lease that ran out is answered with; says why when that is known.
    lapsed: ArcSwap<NoAuthority>,
    inputs: Mutex<Inputs>,
    status: watch::Sender<AuthorityStatus>,
    suspicion: Notify,
}

/// What the purchase path reads: one consistent picture, replaced as a whole.
#[derive(Debug)]
enum Verdict {
    Granted { grant: Arc<Grant>, deadline_ns: u64 },
    Refused(NoAuthority),
}

#[derive(Debug)]
struct Inputs {
    confirmed: Option<Confirmation>,
    partitions: Vec<Admission>,
}

#[derive(Debug)]
struct Confirmation {
    topology: Arc<Topology>,
    /// Before the confirming read was sent.
    since_ns: u64,
}

type Admission = Result<Admitted, NoAuthority>;

#[derive(Debug)]
struct Admitted {
    fence: Fence,
    run_id: Arc<str>,
    /// Replicas that are attached to it and online.
    replicas: usize,
}

impl Authority {
    /// The authority of a center whose ledger has this many partitions. It grants nothing yet.
    pub fn new(center: CenterId, lease_ttl: Duration, partitions: u8) -> Authority {
        let starting = NoAuthority::new(Cause::Starting, "the service is starting");
        let lease = lease_ttl - lease_ttl / CLOCK_RATE_MARGIN;
        Authority::build(
            Some(center),
            u64::try_from(lease.as_nanos()).unwrap_or(u64::MAX),
            Verdict::Refused(starting.clone()),
            (0..partitions).map(|_| Err(starting.clone())).collect(),
        )
    }

    /// An authority that grants this fence for ever, for tests and benches without a topology.
    pub fn fixed(fence: Fence) -> Authority {
        Authority::fixed_grant(Grant {
            fence,
            acknowledge: Acknowledge::Local,
            run_ids: Box::default(),
            degraded: false,
        })
    }

    /// An authority that gives this grant for ever, for tests and benches without a topology.
    pub fn fixed_grant(grant: Grant) -> Authority {
        let verdict = Verdict::Granted { grant: Arc::new(grant), deadline_ns: u64::MAX };
        Authority::build(None, u64::MAX, verdict, Vec::new())
    }

    fn build(
        center: Option<CenterId>,
        lease_ns: u64,
        verdict: Verdict,
        partitions: Vec<Admission>,
    ) -> Authority {
        let status = match &verdict {
            Verdict::Granted { grant, .. } => Ok(Arc::clone(grant)),
            Verdict::Refused(refusal) => Err(refusal.clone()),
        };
        let lapsed = NoAuthority::new(
            Cause::LeaseExpired,
            "the topology could not be confirmed in time; sales go on when its store answers again",
        );
        Authority {
            shared: Arc::new(Shared {
                center,
                lease_ns,
                verdict: ArcSwap::from_pointee(verdict),
                lapsed: ArcSwap::from_pointee(lapsed),
                inputs: Mutex::new(Inputs { confirmed: None, partitions }),
                status: watch::Sender::new(status),
                suspicion: Notify::new(),
            }),
        }
    }

    /// The fence that writes to the ledger carry now, and what their acknowledgement waits for. Ask before a
    /// batch is sent and again before it is acknowledged (A2): it counts only if the epoch is still the same.
    /// Takes no lock.
    pub fn grant(&self) -> Result<Arc<Grant>, NoAuthority> {
        match &**self.shared.verdict.load() {
            Verdict::Granted { grant, deadline_ns } => {
                if boottime_ns() < *deadline_ns {
                    Ok(Arc::clone(grant))
                } else {
                    Err(NoAuthority::clone(&self.shared.lapsed.load()))
                }
            }
            Verdict::Refused(refusal) => Err(refusal.clone()),
        }
    }

    /// The fence of the topology as it was confirmed within the lease, whoever is the master: what the data of a
    /// server has to carry before readers may use it (R1). It permits no write.
    pub fn confirmed(&self) -> Result<Fence, NoAuthority> {
        if self.shared.center.is_none() {
            return self.grant().map(|grant| grant.fence.clone());
        }
        match &self.inputs().confirmed {
            Some(Confirmation { topology, .. }) if self.is_left(topology) => {
                Err(NoAuthority::new(Cause::Shifting, "a forced shift away from this center is recorded"))
            }
            Some(Confirmation { topology, since_ns })
                if boottime_ns() < since_ns.saturating_add(self.shared.lease_ns) =>
            {
                Ok(topology.fence())
            }
            Some(_) => Err(NoAuthority::clone(&self.shared.lapsed.load())),
            None => Err(NoAuthority::new(Cause::Starting, "the topology has not been read yet")),
        }
    }

    /// Follows the answer. A lease that ran out shows up here within one confirmation interval.
    pub fn subscribe(&self) -> watch::Receiver<AuthorityStatus> {
        self.shared.status.subscribe()
    }

    /// The answer as it was last published.
    pub fn status(&self) -> AuthorityStatus {
        self.shared.status.borrow().clone()
    }

    /// Somebody saw something that does not fit (a refused write, a cursor ahead of the ledger, a lost
    /// connection): the guardians look at their servers now instead of a little later.
    pub fn suspect(&self) {
        self.shared.suspicion.notify_one();
    }

    pub(crate) async fn suspected(&self) {
        self.shared.suspicion.notified().await;
    }

    /// A read of the topology, sent after `since_ns`, showed this.
    pub(crate) fn confirm(&self, topology: &Arc<Topology>, since_ns: u64) {
        let mut inputs = self.inputs();
        let since_ns = match &inputs.confirmed {
            // A3: it is shown, and confirms nothing.
            _ if !self.is_left(topology) => since_ns,
            Some(before) => before.since_ns,
            None => 0,
        };
        inputs.confirmed = Some(Confirmation { topology: Arc::clone(topology), since_ns });
        self.publish(&inputs);
    }

    /// Whether a forced shift away from this center is recorded: whoever runs it takes this center for lost.
    fn is_left(&self, topology: &Topology) -> bool {
        topology.master_shift().is_some_and(|shift| {
            shift.mode == ShiftMode::Forced && self.shared.center.as_ref() == Some(&shift.from)
        })
    }

    /// The topology could not be read: publishes a lease that ran out meanwhile.
    pub(crate) fn unconfirmed(&self, why: &str) {
        self.shared.lapsed.store(Arc::new(NoAuthority::new(
            Cause::LeaseExpired,
            format!(
                "the topology could not be confirmed in time: {why}. Sales go on when it can be read again"
            ),
        )));
        self.publish(&self.inputs());
    }

    /// A partition's server is the master at this fence, with this many replicas attached and online.
    pub(crate) fn admit(&self, partition: u8, fence: Fence, run_id: &str, replicas: usize) {
        self.set(partition, Ok(Admitted { fence, run_id: Arc::from(run_id), replicas }));
    }

    /// A partition's server is not to be written to.
    pub(crate) fn refuse(&self, partition: u8, refusal: NoAuthority) {
        self.set(partition, Err(refusal));
    }

    fn set(&self, partition: u8, admission: Admission) {
        let mut inputs = self.inputs();
        if let Some(place) = inputs.partitions.get_mut(usize::from(partition)) {
            *place = admission;
        }
        self.publish(&inputs);
    }

    fn inputs(&self) -> std::sync::MutexGuard<'_, Inputs> {
        // Every change of the inputs is one assignment: they are whole even after a panic.
        self.shared.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, inputs: &Inputs) {
        if self.shared.center.is_none() {
            return; // fixed, whatever a topology says
        }
        let verdict = self.judge(inputs);
        let status = match &verdict {
            Verdict::Granted { deadline_ns, .. } if boottime_ns() >= *deadline_ns => {
                Err(NoAuthority::clone(&self.shared.lapsed.load()))
            }
            Verdict::Granted { grant, .. } => Ok(Arc::clone(grant)),
            Verdict::Refused(refusal) => Err(refusal.clone()),
        };
        self.shared.verdict.store(Arc::new(verdict));
        self.shared.status.send_if_modified(|current| {
            let changed = *current != status;
            *current = status;
            changed
        });
    }

    fn judge(&self, inputs: &Inputs) -> Verdict {
        let refused = |cause, reason: String| Verdict::Refused(NoAuthority::new(cause, reason));
        let Some(Confirmation { topology, since_ns }) = &inputs.confirmed else {
            return refused(Cause::Starting, "the topology has not been read yet".to_owned());
        };
        if self.shared.center.as_ref() != Some(&topology.master) {
            return refused(Cause::NotMaster, format!("center {} is the master", topology.master));
        }
        if topology.master_shift().is_some() {
            return refused(Cause::Shifting, "a shift is recorded in the topology".to_owned());
        }
        let fence = topology.fence();
        let mut run_ids = Vec::with_capacity(inputs.partitions.len());
        let mut attached = 0;
        for admission in &inputs.partitions {
            match admission {
                Err(refusal) => return Verdict::Refused(refusal.clone()),
                Ok(admitted) if admitted.fence == fence => {
                    run_ids.push(Arc::clone(&admitted.run_id));
                    attached = attached.max(admitted.replicas);
                }
                Ok(admitted) => {
                    let Epoch(epoch) = admitted.fence.epoch;
                    return refused(
                        Cause::Promoting,
                        format!("the ledger is at epoch {epoch}, the topology at {}", fence.epoch),
                    );
                }
            }
        }
        if run_ids.is_empty() {
            return refused(Cause::Starting, "no ledger is configured".to_owned());
        }
        let acknowledge = match topology.effective_durability() {
            Durability::Local => Acknowledge::Local,
            Durability::Replicated => {
                Acknowledge::Replicated { replicas: attached.max(topology.in_sync.len()) }
            }
        };
        let degraded = acknowledge.durability() != topology.durability;
        Verdict::Granted {
            grant: Arc::new(Grant { fence, acknowledge, run_ids: run_ids.into(), degraded }),
            deadline_ns: since_ns.saturating_add(self.shared.lease_ns),
        }
    }
}
