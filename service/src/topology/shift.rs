//! The record of a shift. While one runs it stands in the topology, so that any service can finish or abort it when
//! its coordinator dies (H4); when it is over it moves to the history.

use seckill_domain::{CenterId, Epoch, OrderId, Quantity, SaleId, Shard};
use serde::{Deserialize, Serialize};

use super::document::{Extra, Topology};

/// How many shifts that are over the topology keeps: enough for a day of service work, some 2 KB each.
pub const HISTORY: usize = 16;

/// One shift, running or over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shift {
    /// `shift-EPOCH`, with the attempt's epoch.
    pub id: String,
    /// What the caller named the request by, so that a request without an answer can be sent again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// What moves.
    pub kind: ShiftKind,
    /// Whether the center that gives takes part.
    pub mode: ShiftMode,
    /// The center that gives.
    pub from: CenterId,
    /// The center that takes.
    pub to: CenterId,
    /// The shards that move, for [`ShiftKind::Shards`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<Shard>,
    /// How it stands.
    pub state: ShiftState,
    /// Whether it may still be given up (H3).
    pub phase: ShiftPhase,
    /// The epoch before it.
    pub from_epoch: Epoch,
    /// The attempt's epoch: recorded before any server hears of it, and never used again (H1).
    pub epoch: Epoch,
    /// After this long without a change of phase or coordinator, counted by each service on its own clock from when it
    /// first saw the record, any service takes it over (H4). Milliseconds.
    pub freeze_ms: u64,
    /// Who runs it.
    pub coordinator: Coordinator,
    /// Who asked for it: the subject of the admin token.
    pub actor: String,
    /// Why, in the words of whoever asked.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// RFC 3339.
    pub started_at: String,
    /// RFC 3339, once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
    /// Whether loss was accepted by whoever asked.
    #[serde(default)]
    pub accept_loss: bool,
    /// What a forced shift may lose, decided in the compare-and-set that recorded it (D1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exposure: Option<Exposure>,
    /// The run of the target's server that was looked at when the shift was recorded, and that is promoted (S4).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_run: Option<String>,
    /// The run of the old master's server, if it was there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_run: Option<String>,
    /// What only the old master had when it came back, after a forced shift.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tails: Vec<Tail>,
    /// Whether only the checks were made: such a shift is recorded nowhere.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// How long purchases were held, milliseconds: from the freeze to the end of the redirect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_ms: Option<u64>,
    /// What was done, in order.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// How it ended, and what to do next, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Fields of later releases.
    #[serde(flatten)]
    pub extra: Extra,
}

/// What a shift moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShiftKind {
    /// The master center: competitive writes.
    Master,
    /// The home of shards: orders and coupons of their users.
    Shards,
}

/// Whether the center that gives takes part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShiftMode {
    /// Both centers are there: nothing fails and nothing is lost.
    #[default]
    Planned,
    /// The center that gives is gone.
    Forced,
}

/// How a shift stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShiftState {
    /// It is under way.
    Running,
    /// It happened.
    Done,
    /// It was given up and everything is as before, at a new epoch.
    Aborted,
    /// It happened, and what was verified afterwards is not as it should be; or it cannot be finished without help.
    Failed,
    /// Nobody knows yet: an answer of the topology's store is missing.
    Unknown,
}

/// How far a running shift is, as far as that decides what may become of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShiftPhase {
    /// Every failure aborts it. A forced shift waits out the lease.
    Begun,
    /// There is only forward (H3).
    Decided,
}

/// Who runs a shift.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coordinator {
    /// Its center.
    pub center: CenterId,
    /// Its instance.
    pub instance: String,
    /// How many had it before: a coordinator that was replaced sees another number in the record and stops.
    pub term: u32,
}

/// Outbox entries that only a server had when it came back: saved before it became a replica (S3).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tail {
    /// The file, on the host of that center's service.
    pub file: String,
    /// How many entries it holds.
    pub entries: u64,
    /// How many orders these hold.
    pub orders: u64,
    /// How many of them are paid and have no room for their claim: until there is, the tail is not settled.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub paid_without_claim: u64,
    /// The first of the paid orders without a claim, and why they have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paid_orders: Vec<Unclaimed>,
    /// What became of them (H6), once that is final.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled: Option<Settled>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What became of the orders of a saved tail.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// All orders of the tail.
    pub orders: u64,
    /// Those that hold a claim in the new master's ledger.
    pub claimed_again: u64,
    /// Unpaid ones without room for their claim: cancelled.
    pub cancelled: u64,
    /// Paid ones of sales that are archived: they stay paid, and nothing is left to claim.
    pub paid_without_claim: u64,
    /// RFC 3339.
    pub settled_at: String,
}

/// A paid order of a saved tail that holds no claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unclaimed {
    /// The order.
    pub order_id: OrderId,
    /// Of which sale.
    pub sale_id: SaleId,
    /// How many units.
    pub quantity: Quantity,
    /// What is in its way.
    pub cause: UnclaimedCause,
}

/// Why an order of a saved tail cannot be claimed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnclaimedCause {
    /// Not enough is left.
    NotEnough,
    /// Its buyer holds other orders up to the limit.
    Limit,
    /// Its buyer holds another order that was bought under the same key.
    OtherOrder,
    /// The ledger has no such sale.
    NoSale,
    /// The sale is archived, and its claims are gone: that does not change any more.
    Archived,
}

/// What a forced shift may lose.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exposure {
    /// Whether anything acknowledged may be missing.
    pub lossless: bool,
    /// Why, in a sentence.
    pub reason: String,
    /// Outbox entries that the lost center may have acknowledged and this one does not have, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entries: Option<u64>,
    /// Since when, RFC 3339, if that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
}

/// One step of a shift.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// `precheck`, `freeze`, `fence`, `catch_up`, `decided`, `promote`, `redirect`, `attach`, `thaw`, `verify`; forced:
    /// `precheck`, `record`, `wait_lease`, `promote` (after `decided` where loss was accepted), `redirect`, `thaw`, `verify`;
    /// shards: see the operations manual.
    pub name: String,
    /// How it stands.
    pub state: StepState,
    /// RFC 3339.
    pub started_at: String,
    /// Milliseconds, once it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took_ms: Option<u64>,
    /// What was seen, or what went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What was compared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
}

/// How a step stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// It is under way.
    Running,
    /// It is done.
    Done,
    /// It could not be done.
    Failed,
}

/// One comparison of a precheck or a verification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What is compared, in words with underscores: `replica_lag`.
    pub name: String,
    /// What was found, with its unit.
    pub value: String,
    /// What it may be.
    pub limit: String,
    /// What follows.
    pub verdict: CheckVerdict,
}

/// What follows from a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckVerdict {
    /// As it should be.
    Ok,
    /// It goes on, but somebody should look at it.
    Warning,
    /// It does not go on.
    Failed,
}

impl ShiftState {
    /// Whether it is over, whatever came of it.
    pub fn is_over(self) -> bool {
        match self {
            ShiftState::Running | ShiftState::Unknown => false,
            ShiftState::Done | ShiftState::Aborted | ShiftState::Failed => true,
        }
    }
}

#[cfg(test)]
impl Shift {
    /// A planned shift from a to b that has just begun.
    pub(crate) fn of_a_test() -> Shift {
        serde_json::from_value(serde_json::json!({
            "id": "shift-2", "kind": "master", "mode": "planned", "from": "a", "to": "b", "state": "running",
            "phase": "begun", "from_epoch": 1, "epoch": 2, "freeze_ms": 2000,
            "coordinator": { "center": "b", "instance": "i", "term": 0 },
            "actor": "ops", "started_at": "2026-01-01T00:00:00Z",
        }))
        .unwrap()
    }
}

impl Topology {
    /// The running shift of the master, if there is one: nobody writes to the ledger, guardians leave the servers'
    /// roles to it, and purchases are held. A shift of shards holds up no purchase.
    pub fn master_shift(&self) -> Option<&Shift> {
        self.shift.as_deref().filter(|shift| shift.kind == ShiftKind::Master)
    }

    /// Puts a shift that is over into the history, without the oldest beyond [`HISTORY`].
    pub fn remember_shift(&mut self, shift: Shift) {
        self.history.retain(|before| before.id != shift.id);
        self.history.push(shift);
        let surplus = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..surplus);
    }

    /// A shift by its id, running or over.
    pub fn find_shift(&self, id: &str) -> Option<&Shift> {
        self.shift.as_deref().into_iter().chain(&self.history).find(|shift| shift.id == id)
    }
}
