//! What 30 ms between centers cost without HTTP in front: lanes, barrier and the calls between centers, all in this
//! process. No budgets: on two cores these rates are beyond what a service accepts over HTTP, and beyond what 4096 in
//! flight over 30 ms can come to. They show what a change of the lanes is worth.

use seckill::inventory::Inventory;
use seckill::topology::Acknowledge;

use crate::Scope;
use crate::herd::{Turn, turn};
use crate::pair::Pair;

/// What `--only` has to say for these.
pub(crate) const LANES: &str = "lanes";

/// Purchases under way in the master's own center.
const IN_FLIGHT: usize = 4096;
/// Purchases under way when the other center buys: both sides have as many. A purchase there takes two round trips, so
/// the 4096 would measure the way (58,000 a second at most) and not what the lanes can do.
const IN_FLIGHT_THROUGH: usize = 8192;

/// Rounds at most: each adds a million claims.
const ROUNDS: u32 = 4;

/// Prints each round of both comparisons.
pub(crate) async fn measure(scope: &Scope) -> anyhow::Result<()> {
    println!("replicated at 30 ms / local, {IN_FLIGHT} in flight");
    let pair = Pair::open().await?;
    let local = pair.of_master(Acknowledge::Local).await?;
    let replicated = pair.of_master(Acknowledge::Replicated { replicas: 1 }).await?;
    compare(scope, &pair, IN_FLIGHT, (&replicated, &local)).await?;
    drop((local, replicated));
    pair.close().await;

    println!("through the other center / the master's own, {IN_FLIGHT_THROUGH} in flight");
    let mut pair = Pair::open().await?;
    let master = pair.of_master(Acknowledge::Replicated { replicas: 1 }).await?;
    let other = pair.of_other(&master).await?;
    compare(scope, &pair, IN_FLIGHT_THROUGH, (&other, &master)).await?;
    drop((master, other));
    pair.close().await;
    Ok(())
}

/// Both in turns. The first round warms up.
async fn compare(
    scope: &Scope,
    pair: &Pair,
    in_flight: usize,
    (ours, baseline): (&Inventory, &Inventory),
) -> anyhow::Result<()> {
    let mut next = 0;
    for round in 0..=scope.rounds.min(ROUNDS) {
        let base = turn(in_flight, baseline, &pair.master, &pair.sale, &mut next).await?;
        let ours = turn(in_flight, ours, &pair.master, &pair.sale, &mut next).await?;
        if round > 0 {
            println!("  {:.2}: {}", ours.per_second / base.per_second, describe(&ours, &base));
        }
    }
    Ok(())
}

fn describe(ours: &Turn, base: &Turn) -> String {
    format!(
        "{:.0} / {:.0} per s; p50 {:.0} / {:.0}, p99 {:.0} / {:.0} ms; CPU Redis {:.1} / {:.1}, this process {:.1} / {:.1} us",
        ours.per_second,
        base.per_second,
        ours.p50_ms,
        base.p50_ms,
        ours.p99_ms,
        base.p99_ms,
        ours.redis_us,
        base.redis_us,
        ours.own_us,
        base.own_us
    )
}
