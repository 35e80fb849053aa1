//! Who gives the Redis servers their roles, and when.
//!
//! Every server starts isolated: it refuses writes and syncs nobody. The [`Guardian`] of its partition compares
//! it with the topology and with what the order database has stored, and only then makes it the master, at an
//! epoch of its own. A server whose past is in doubt stays out until somebody decides with `seckill ledger
//! adopt`: see [`Recovery`].

mod coordinator;
mod counts;
mod forced;
mod guardian;
mod ledger;
mod operation;
mod peers;
mod planned;
mod precheck;
mod reclaim;
mod record;
mod replica;
mod restore;
mod settle;
mod shards;
mod status;
mod sync;
mod tail;
mod takeover;
#[cfg(test)]
mod tests;
mod verdict;
mod verify;

pub use counts::ShiftCounts;
pub use guardian::{Guardian, GuardianHandle, GuardianOptions, RequestError, ServerProcess};
pub use ledger::{InitError, Ledger, LedgerError};
pub use operation::{Refusal, ShiftError, ShiftOptions, ShiftRequest, Shifts};
pub use reclaim::{AdoptReport, PaidWithoutClaim, Recovery};
pub use settle::{RETRY as SETTLE_RETRY, SettleMetrics, SettleParts, Settler};
pub use shards::{ShardParts, answer_for_shards};
pub use status::{GuardianMetrics, Replication, ServerState};
pub use verdict::InitPolicy;
