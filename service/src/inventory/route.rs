//! The inventory route: who decides a batch of purchases.
//!
//! Where this center is the master, that is its own Redis ([`Local`]). The lanes know batches and deadlines; a
//! decider knows how to get one batch decided, once, and what its failure means for each purchase. The route is
//! chosen anew for every attempt, so purchases that are held while the master changes go to the new one. While the
//! topology records a shift of the master, nobody in any center decides anything.

use std::time::Duration;

use futures_util::future::BoxFuture;
use seckill_domain::{Epoch, OrderId, SaleId};
use seckill_ledger::ReserveEntry;
use tokio::sync::watch;
use tokio::time::Instant;

use super::error::PurchaseError;
use super::local::Local;
use super::remote::Remote;
use crate::topology::{
    Acknowledge, Authority, AuthorityStatus, Cause, NoAuthority, Topology, TopologyHandle,
};

/// What one attempt came to for one purchase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Accepted, durably so and under an authority that still holds: it may be acknowledged.
    Accepted(OrderId),
    /// As `Accepted`, by an earlier call under the same key.
    Replay(OrderId),
    /// The ledger has turned it away. That is its last word also on attempts before this one.
    Refused(PurchaseError),
    /// Nothing happened, and another attempt would come to the same until somebody does something.
    GivenUp(PurchaseError),
    /// Nothing happened. It may be sent again, and past its deadline is answered with this.
    NotExecuted(PurchaseError),
    /// Nobody knows whether it was accepted. It may be sent again under the same key only, and past its deadline
    /// is answered with this.
    Unknown(PurchaseError),
}

/// An attempt at one batch. Each verdict stands for the entry at its place.
pub(super) enum Attempt {
    /// It is over.
    Done(Vec<Verdict>),
    /// It needs nothing more of the lane, which goes on with its next batch.
    Pending {
        /// The rest of it. It ends in bounded time by itself, with [`Verdict::Unknown`] where it has to.
        rest: BoxFuture<'static, Vec<Verdict>>,
        /// What a purchase is answered with whose deadline passes first.
        late: PurchaseError,
    },
}

impl Attempt {
    /// The same verdict for a whole batch.
    pub(super) fn all(verdict: Verdict, entries: usize) -> Attempt {
        Attempt::Done(vec![verdict; entries])
    }
}

/// Whether an attempt makes sense now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    /// It does; or somebody has to do something first, and an attempt says what.
    Open,
    /// As many calls are on their way to the master center as may be.
    Full,
    /// The master moves.
    Shifting,
    /// This center's server is being given its role.
    Coming,
    /// There is no authority for another reason, which passes by itself.
    Closed,
}

/// Tells that a gate may have opened or closed.
#[derive(Clone)]
pub(super) struct Changes {
    topology: watch::Receiver<std::sync::Arc<Topology>>,
    authority: watch::Receiver<AuthorityStatus>,
}

impl Changes {
    /// Waits for the next change of the topology or of this center's authority.
    pub(super) async fn next(&mut self) {
        // The route keeps both senders alive.
        tokio::select! {
            _ = self.topology.changed() => {}
            _ = self.authority.changed() => {}
        }
    }
}

/// The deciders of one lane. Each owns its connections.
pub(super) struct Route {
    topology: TopologyHandle,
    authority: Authority,
    local: Local,
    /// None where there is one center.
    remote: Option<Remote>,
    changes: Changes,
}

impl Route {
    pub(super) fn new(
        topology: TopologyHandle,
        authority: Authority,
        local: Local,
        remote: Option<Remote>,
    ) -> Route {
        let changes = Changes { topology: topology.subscribe(), authority: authority.subscribe() };
        Route { topology, authority, local, remote, changes }
    }

    /// Whether an attempt makes sense now.
    pub(super) fn gate(&self) -> Gate {
        if self.is_recorded() {
            return Gate::Shifting;
        }
        match self.authority.grant() {
            Ok(_) => Gate::Open,
            Err(refusal) => match (refusal.cause, &self.remote) {
                (Cause::NotMaster, Some(remote)) if remote.has_place() => Gate::Open,
                (Cause::NotMaster, Some(_)) => Gate::Full,
                // The topology shows no shift any more, and the read that confirms it is under way.
                (Cause::Shifting, _) => Gate::Shifting,
                (Cause::Promoting | Cause::Starting, _) => Gate::Coming,
                (cause, _) if cause.needs_somebody() => Gate::Open,
                _ => Gate::Closed,
            },
        }
    }

    /// Whether the topology records a shift of the master.
    fn is_recorded(&self) -> bool {
        self.changes.topology.borrow().master_shift().is_some()
    }

    /// Whether the master moves.
    pub(super) fn is_shifting(&self) -> bool {
        self.gate() == Gate::Shifting
    }

    /// Why this center's Redis takes no purchases, where it is the one to take them: what those are told whose time is
    /// over before that has changed.
    pub(super) fn refusal(&self) -> Option<PurchaseError> {
        match self.authority.grant() {
            Ok(_) => None,
            Err(refusal) if refusal.cause == Cause::NotMaster => None,
            Err(refusal) => Some(PurchaseError::NoAuthority(refusal.reason)),
        }
    }

    /// The topology's epoch.
    pub(super) fn epoch(&self) -> Epoch {
        self.topology.current().epoch
    }

    /// Waits until a gate that was closed may have opened. A change that came before is told once.
    pub(super) async fn changed(&mut self) {
        self.changes.next().await;
    }

    /// The changes from now on.
    pub(super) fn changes(&self) -> Changes {
        let mut changes = self.changes.clone();
        changes.topology.mark_unchanged();
        changes.authority.mark_unchanged();
        changes
    }

    /// Ends when another center becomes the master than the one that is it now.
    pub(super) fn moved(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut topology = self.changes.topology.clone();
        let master = topology.borrow().master.clone();
        async move {
            if topology.wait_for(|now| now.master != master).await.is_err() {
                // The service is ending, and with it whatever this is waited for beside.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Whether an acknowledgement waits for another center in any case, so that a short wait for more purchases
    /// is hardly felt.
    pub(super) fn pays_round_trip(&self) -> bool {
        match self.authority.grant() {
            Ok(grant) => matches!(grant.acknowledge, Acknowledge::Replicated { .. }),
            Err(refusal) => refusal.cause == Cause::NotMaster,
        }
    }

    /// The least time that an attempt needs to come to an answer.
    pub(super) fn least(&self) -> Duration {
        match (&self.remote, self.authority.grant()) {
            (Some(remote), Err(refusal)) if refusal.cause == Cause::NotMaster => remote.least(),
            (Some(_) | None, _) => Duration::ZERO,
        }
    }

    /// Attempts a batch of one sale with the decider that the topology names now: this center's Redis while the
    /// authority grants writes to it, an instance of the master center while that is another one. Nobody waits
    /// for the verdicts beyond `deadline`.
    pub(super) async fn attempt(
        &mut self,
        sale: &SaleId,
        entries: Vec<ReserveEntry>,
        deadline: Instant,
    ) -> Attempt {
        let refusal = match (self.is_recorded(), self.authority.grant()) {
            (false, Ok(grant)) => return self.local.attempt(&grant, sale, &entries).await,
            (true, _) => NoAuthority::new(Cause::Shifting, "a shift is recorded in the topology"),
            (false, Err(refusal)) => refusal,
        };
        if refusal.cause == Cause::NotMaster
            && let Some(remote) = &self.remote
        {
            return remote.attempt(sale, entries, deadline).await;
        }
        let needs_somebody = refusal.cause.needs_somebody();
        let error = match refusal.cause {
            Cause::Shifting => PurchaseError::Shifting,
            _ => PurchaseError::NoAuthority(refusal.reason),
        };
        let verdict = if needs_somebody { Verdict::GivenUp(error) } else { Verdict::NotExecuted(error) };
        Attempt::all(verdict, entries.len())
    }
}
