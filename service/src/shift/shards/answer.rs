//! What a center answers whose shards are to move away.

use std::time::Duration;

use crate::cross_center::calls::{FenceCall, ShardsAnswer, ShardsCall, ShardsStanding};
use crate::orders::{Error, FenceError, OrderStore};
use crate::topology::{ShiftKind, ShiftPhase, TopologyHandle};

/// How long this database may take to apply what the other one had written. Below the caller's patience.
const APPLIED_WITHIN: Duration = Duration::from_secs(5);

/// Answers a question about shards; lets go of them if that is asked.
pub async fn answer_for_shards(
    orders: &OrderStore,
    topology: &TopologyHandle,
    call: ShardsCall,
) -> Result<ShardsAnswer, Error> {
    match &call.fence {
        Some(fence) => let_go(orders, topology, &call, fence).await,
        None => {
            let server = orders.server().await?;
            let written = if server.is_some() { orders.written().await? } else { String::new() };
            let stored = vec![(0, orders.position(0).await?)];
            let rows = orders.shard_rows().await?;
            Ok(ShardsAnswer::Standing(Box::new(ShardsStanding { server, rows, stored, written })))
        }
    }
}

async fn let_go(
    orders: &OrderStore,
    topology: &TopologyHandle,
    call: &ShardsCall,
    fence: &FenceCall,
) -> Result<ShardsAnswer, Error> {
    // A call that comes late belongs to a shift that is over. What slips through between this look and the change is
    // refused by the rows, or lifted when the topology's next attempt is seen.
    if let Err(error) = topology.confirm().await {
        return Ok(ShardsAnswer::Refused(format!("the topology cannot be confirmed: {error}")));
    }
    let current = topology.current();
    let running = current.shift.as_deref().is_some_and(|shift| {
        shift.kind == ShiftKind::Shards
            && shift.phase == ShiftPhase::Begun
            && i64::try_from(shift.epoch.0) == Ok(fence.attempt)
            && shift.to == call.to
            && call.shards.iter().all(|shard| shift.shards.contains(shard))
    });
    if !running {
        return Ok(ShardsAnswer::Refused(format!(
            "the topology shows no attempt {} that runs",
            fence.attempt
        )));
    }
    match orders.fence_shards(&call.shards, &call.to, fence.attempt, &fence.after, APPLIED_WITHIN).await {
        Ok(fenced) => Ok(ShardsAnswer::Fenced(fenced)),
        Err(FenceError::Store(error)) => Err(error),
        Err(refused @ (FenceError::Unable(_) | FenceError::Overtaken { .. } | FenceError::Behind)) => {
            Ok(ShardsAnswer::Refused(refused.to_string()))
        }
    }
}
