//! The inventory route: who decides a batch of purchases.
//!
//! Where this center is the master, that is its own Redis ([`Local`]). The lanes know batches and deadlines; a
//! decider knows how to get one batch decided, once, and what its failure means for each purchase. The route is
//! chosen anew for every attempt, so purchases that are held while the master changes go to the new one.

use std::time::Duration;

use futures_util::future::BoxFuture;
use seckill_domain::{OrderId, SaleId};
use seckill_ledger::ReserveEntry;
use tokio::time::Instant;

use super::error::PurchaseError;
use super::local::Local;
use super::remote::Remote;
use crate::topology::{Acknowledge, Authority, Cause};

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

/// The deciders of one lane. Each owns its connections.
pub(super) struct Route {
    pub(super) authority: Authority,
    pub(super) local: Local,
    /// None where there is one center.
    pub(super) remote: Option<Remote>,
}

impl Route {
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
        let refusal = match self.authority.grant() {
            Ok(grant) => return self.local.attempt(&grant, sale, &entries).await,
            Err(refusal) => refusal,
        };
        if refusal.cause == Cause::NotMaster
            && let Some(remote) = &self.remote
        {
            return remote.attempt(sale, entries, deadline).await;
        }
        let needs_somebody = refusal.cause.needs_somebody();
        let error = PurchaseError::NoAuthority(refusal.reason);
        let verdict = if needs_somebody { Verdict::GivenUp(error) } else { Verdict::NotExecuted(error) };
        Attempt::all(verdict, entries.len())
    }
}
