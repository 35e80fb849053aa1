//! One state of the whole: the topology, two servers, two services with their guardians and coordinators, the
//! requests under way, and what has been promised.

use crate::ledger::{Center, Fence, Log, Role, Server};
use crate::setup::{Durability, Setup};

/// How many purchases there are at most, one unit each.
pub const PURCHASES: usize = 2;

/// The document in the config center, as far as the protocol looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topology {
    /// The epoch.
    pub epoch: u8,
    /// The master center.
    pub master: Center,
    /// Whether `in_sync` names the other center's replica. Empty means `degraded`, or durability `local`.
    pub in_sync: bool,
    /// The running shift of the master.
    pub shift: Option<Record>,
}

impl Topology {
    /// The fence that writes carry under it.
    pub fn fence(&self) -> Fence {
        Fence { epoch: self.epoch, master: self.master }
    }

    /// Whether a forced shift away from this center is recorded.
    pub fn is_forced_away(&self, center: Center) -> bool {
        self.shift.is_some_and(|shift| shift.forced && shift.to != center)
    }
}

/// The record of a running shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Record {
    /// Forced, or planned.
    pub forced: bool,
    /// The center that takes.
    pub to: Center,
    /// The epoch of the attempt (H1).
    pub epoch: u8,
    /// There is only forward (H3).
    pub decided: bool,
    /// A forced shift that loses nothing that was acknowledged (D1).
    pub lossless: bool,
}

/// How far the confirmation of a lease reaches (A1): clocks are abstracted to what matters to a forced shift.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lease {
    /// It ran out.
    Over,
    /// Confirmed before the last forced shift was recorded: it ends while that one waits.
    Before,
    /// Confirmed since, or there was no forced shift.
    Since,
}

/// One purchase on its way through the service of one center.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Request {
    /// There is none.
    None,
    /// The batch is on the way to the ledger.
    Sent {
        /// What it was granted (A2).
        grant: Grant,
    },
    /// The ledger's reply is here: accepted, now or before.
    Replied {
        /// What it was granted.
        grant: Grant,
        /// The epoch of the order's id.
        order: u8,
    },
    /// The barrier is written, the `WAIT` is under way (K2).
    Waiting {
        /// What it was granted.
        grant: Grant,
        /// The epoch of the order's id.
        order: u8,
        /// How much of the log the replica has to have.
        until: u8,
    },
    /// It may be acknowledged if authority is as it was (A2).
    Confirmed {
        /// What it was granted.
        grant: Grant,
        /// The epoch of the order's id.
        order: u8,
    },
}

/// What a batch was sent under.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Grant {
    /// The epoch that it carries.
    pub epoch: u8,
    /// Whether its acknowledgement waits for the replica.
    pub replicated: bool,
}

/// What a guardian is about to do with its server: it was decided, but a pause may come before it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Order {
    /// Make it the master at the epoch that was taken for it.
    Promote {
        /// The fence that was seen (S2).
        expected: Fence,
        /// The epoch.
        epoch: u8,
    },
    /// Make it the other server's replica.
    Attach {
        /// The fence that was seen (S2).
        expected: Fence,
    },
}

/// A replica's way back into `in_sync` (D2), as the master's guardian knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Return {
    /// The fence of the next epoch is written; the replica is waited for.
    Waiting,
    /// The replica showed the fence.
    Shown,
    /// It showed the fence and was restarted since, unseen.
    ShownBeforeRestart,
    /// It was restarted before it showed the fence.
    Failed,
}

/// A step of a shift, named after the last thing that was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    /// The shift is recorded.
    Recorded,
    /// Planned: the old master is fenced.
    Fenced,
    /// Planned: the target has shown that fence.
    CaughtUp,
    /// Planned: `decided` is written.
    Decided,
    /// Forced: the lease of the old master is waited out.
    Waited,
    /// The target is promoted.
    Promoted,
    /// The topology names the new master.
    Redirected,
    /// The answer to the compare-and-set after this step is missing (H3).
    NoAnswerToDecide,
    /// The same, for the redirect.
    NoAnswerToRedirect,
}

/// Whoever runs a shift, as it sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Coordinator {
    /// The record when it was taken.
    pub record: Record,
    /// What was done last.
    pub step: Step,
    /// Another one took the record over: the term in it is another (H4).
    pub replaced: bool,
    /// Forced: the fence of the target as it was last seen (S2).
    pub expected: Fence,
}

/// One center's service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Service {
    /// The topology as it last read it.
    pub view: Topology,
    /// Whether that read still confirms the authority to write.
    pub lease: Lease,
    /// A read that the config center has answered and whose answer is not here yet, with the lease that it gives if it
    /// counts from when it was sent.
    pub reading: Option<(Topology, Lease)>,
    /// What the guardian is about to do.
    pub order: Option<Order>,
    /// The replica's way back, from this epoch to the next.
    pub returning: Option<(u8, Return)>,
    /// The shift that it runs.
    pub coordinator: Option<Coordinator>,
}

/// What the world was told about one purchase. This is nobody's memory but the model's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Promise {
    /// The epoch of the order that the shopper was told of; 0: nothing yet.
    pub acknowledged: u8,
    /// The epoch of the order that a reader of the outbox has passed on; 0: none.
    pub read: u8,
    /// Its loss was accepted when a forced shift was recorded.
    pub given_up: bool,
    /// The epoch of the order in a tail that was saved (S3).
    pub saved: u8,
    /// Two orders were promised for it.
    pub twice: bool,
}

/// How many of each fault may still happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Faults {
    /// Planned shifts that are asked for.
    pub planned: u8,
    /// Forced shifts that are asked for.
    pub forced: u8,
    /// Restarts of a server.
    pub servers: u8,
    /// Restarts of a service.
    pub services: u8,
    /// Replicas given up after `degrade_after`.
    pub degrades: u8,
    /// Requests that nobody waits for any more, so that the shopper tries again.
    pub lost_requests: u8,
    /// Answers of the config center that arrive late.
    pub late_reads: u8,
    /// Answers to a coordinator's compare-and-set that never arrive.
    pub lost_answers: u8,
}

/// The whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State {
    /// The document.
    pub topology: Topology,
    /// The servers, by center.
    pub servers: [Server; 2],
    /// The services, by center.
    pub services: [Service; 2],
    /// The requests, by purchase and center.
    pub requests: [[Request; 2]; PURCHASES],
    /// The promises, by purchase.
    pub promises: [Promise; PURCHASES],
    /// For each epoch the centers that accepted something in it, one bit each.
    pub accepted_in: [u8; crate::setup::EPOCHS],
    /// What may still go wrong.
    pub faults: Faults,
}

impl State {
    /// How it begins: `a` is the master, `b` its replica.
    pub fn initial(setup: &Setup) -> State {
        let fence = Fence { epoch: 1, master: Center::A };
        let in_sync = setup.durability == Durability::Replicated && !setup.degraded;
        let topology = Topology { epoch: 1, master: Center::A, in_sync, shift: None };
        let server = |role| Server { role, log: Log::new(fence), noted_run: true };
        let service = Service {
            view: topology,
            lease: Lease::Since,
            reading: None,
            order: None,
            returning: None,
            coordinator: None,
        };
        let promise = Promise { acknowledged: 0, read: 0, given_up: false, saved: 0, twice: false };
        State {
            topology,
            servers: [server(Role::Master), server(Role::Replica { linked: true })],
            services: [service; 2],
            requests: [[Request::None; 2]; PURCHASES],
            promises: [promise; PURCHASES],
            accepted_in: [0; crate::setup::EPOCHS],
            faults: setup.faults,
        }
    }

    /// A center's server.
    pub fn server(&self, center: Center) -> &Server {
        &self.servers[center as usize]
    }

    /// A center's service.
    pub fn service(&self, center: Center) -> &Service {
        &self.services[center as usize]
    }

    pub(crate) fn server_mut(&mut self, center: Center) -> &mut Server {
        &mut self.servers[center as usize]
    }

    pub(crate) fn service_mut(&mut self, center: Center) -> &mut Service {
        &mut self.services[center as usize]
    }

    /// Whether the other center's server gets every write of this one.
    pub fn is_followed(&self, center: Center) -> bool {
        self.server(center).role == Role::Master
            && self.server(center.other()).role == Role::Replica { linked: true }
    }

    /// Purchases are alike, so of two states that differ in their names only one is looked at.
    #[must_use]
    pub(crate) fn canonical(self, purchases: usize) -> State {
        if purchases < PURCHASES {
            return self;
        }
        let mut swapped = self;
        for server in &mut swapped.servers {
            server.log = server.log.swapped();
        }
        swapped.requests.swap(0, 1);
        swapped.promises.swap(0, 1);
        self.min(swapped)
    }
}
