//! What to do with a server, from what it shows, the topology, and what the order database has stored.

use seckill_domain::{CenterId, OutboxId};
use seckill_ledger::Fence;
use seckill_ledger::roles::{Role, Standing};

use crate::topology::{Cause, NoAuthority, Topology};

/// Who creates the ledger on an empty server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitPolicy {
    /// The guardian does, if there never was one: `seckill up`.
    Automatic,
    /// Only `seckill ledger init` does: an empty server in production is more often a mistake than a beginning.
    Explicit,
}

/// What a server shows, and what is known about its ledger elsewhere.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) standing: Standing,
    /// Id of the ledger's last outbox entry.
    pub(crate) last: OutboxId,
    /// How many keys the server has, the ledger's and others.
    pub(crate) keys: u64,
    /// Up to where the order database of this center has stored the outbox.
    pub(crate) stored: OutboxId,
}

/// What to do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Verdict {
    /// It is the master already, at the right fence, in a run that was promoted before.
    Admit,
    /// It is the ledger; its next epoch begins.
    Lift { from: Fence },
    /// It is empty and may become the ledger.
    Init,
    /// An adoption was begun and has to be finished.
    Adopt,
    /// Keep away.
    Refuse(NoAuthority),
}

/// The server's address, the partition and the center, for messages.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) center: CenterId,
    pub(crate) partition: u8,
    pub(crate) address: String,
}

pub(crate) fn judge(place: &Place, topology: &Topology, seen: &Seen, init: InitPolicy) -> Verdict {
    let Place { partition, address, .. } = place;
    if topology.adopting.contains(partition) {
        return Verdict::Adopt;
    }
    let run = topology.ledger_runs.get(partition);
    let Some(text) = &seen.standing.fence else {
        if run.is_some() || seen.stored != OutboxId::ZERO {
            let before = run.map_or_else(
                || format!("orders up to {} are stored", seen.stored),
                |run| format!("it was at epoch {}", run.epoch),
            );
            let state = if seen.keys == 0 { "is empty" } else { "has no fence any more" };
            return refuse(
                Cause::Empty,
                format!(
                    "the ledger at {address} {state}, but {before}. Sales have stopped. Bring its data \
                     folder back and restart that Redis; or, to go on without, run `seckill ledger adopt`: \
                     a new epoch begins, no order id repeats, and stored orders are claimed again where \
                     stock allows"
                ),
            );
        }
        if seen.keys > 0 {
            return refuse(
                Cause::Foreign,
                format!(
                    "the Redis at {address} holds {} keys that are not a ledger's. Give the ledger a Redis of \
                     its own, then run `seckill ledger init`",
                    seen.keys
                ),
            );
        }
        return match init {
            InitPolicy::Automatic => Verdict::Init,
            InitPolicy::Explicit => refuse(
                Cause::NotInitialised,
                format!("there is no ledger at {address} yet: run `seckill ledger init`"),
            ),
        };
    };
    let fence = match text.parse::<Fence>() {
        Ok(fence) => fence,
        Err(error @ seckill_ledger::InvalidFence::Schema { .. }) => {
            return refuse(
                Cause::Schema,
                format!("the ledger at {address} cannot be used: {error}. Run the release that wrote it"),
            );
        }
        Err(error) => {
            return refuse(
                Cause::Foreign,
                format!(
                    "the ledger at {address} cannot be used: {error}. To take it over, run `seckill ledger adopt`"
                ),
            );
        }
    };
    if fence.ledger_id != topology.ledger_id {
        return refuse(
            Cause::Foreign,
            format!(
                "the Redis at {address} holds another ledger ({}, this topology's is {}). Sales have stopped. \
                 Correct the address, or bring the right data folder back and restart that Redis; to take this \
                 ledger over as it is, run `seckill ledger adopt`",
                fence.ledger_id, topology.ledger_id
            ),
        );
    }
    let rolled_back = |what: String| {
        refuse(
            Cause::RolledBack,
            format!(
                "the ledger at {address} is older than it was: {what}. Sales have stopped. Bring its latest \
                 data folder back and restart that Redis; or, to go on with the old one, run `seckill ledger \
                 adopt`: a new epoch begins, no order id repeats, and stored orders are claimed again where \
                 stock allows"
            ),
        )
    };
    if let Some(run) = run
        && fence.epoch < run.epoch
    {
        return rolled_back(format!("it shows epoch {}, it was at {}", fence.epoch, run.epoch));
    }
    if seen.stored > seen.last {
        return rolled_back(format!("it ends at {}, orders up to {} are stored", seen.last, seen.stored));
    }
    // An epoch in which writes are taken is written down before: a forced shift relies on it.
    let promoted_before =
        run.is_some_and(|run| run.run_id == seen.standing.run_id && run.epoch == fence.epoch);
    if promoted_before && fence == topology.fence() && matches!(seen.standing.role, Role::Master { .. }) {
        return Verdict::Admit;
    }
    Verdict::Lift { from: fence }
}

fn refuse(cause: Cause, reason: String) -> Verdict {
    Verdict::Refuse(NoAuthority::new(cause, reason))
}

/// Whether a server that is refused for this cause is put out of harm's way. One that may be somebody else's is
/// left alone: its fence, or the lack of one, keeps our writes out.
pub(crate) fn isolates(cause: Cause, seen: &Seen) -> bool {
    match cause {
        Cause::RolledBack => true,
        Cause::Empty => seen.keys == 0,
        _ => false,
    }
}
