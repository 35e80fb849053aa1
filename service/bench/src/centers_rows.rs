//! What 30 ms between centers cost: when the other one has to confirm, and when the buyers are there.
//!
//! Lanes, barrier and the calls between centers run in this process, without HTTP for buyers in front of them.

use seckill::inventory::Inventory;
use seckill::topology::Acknowledge;

use crate::Scope;
use crate::herd::{Turn, turn};
use crate::pair::Pair;
use crate::table::{Better, Row, print, row};

const REPLICATED: &str = "accepted/s, replicated at 30 ms / local, 4096 in flight";
const THROUGH: &str = "accepted/s through the other center / the master's own";

/// Purchases under way where the row's name says so.
const IN_FLIGHT: usize = 4096;
/// Purchases under way when the other center buys: both sides have as many. A purchase there takes two round trips, so
/// the 4096 would measure the way (58,000 a second at most) and not what the two centers can do.
const IN_FLIGHT_THROUGH: usize = 8192;

/// Rounds at most: each adds a million claims.
const ROUNDS: u32 = 4;

pub(crate) async fn measure(scope: &Scope) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    if scope.wants(REPLICATED) {
        let pair = Pair::open().await?;
        let local = pair.of_master(Acknowledge::Local).await?;
        let replicated = pair.of_master(Acknowledge::Replicated { replicas: 1 }).await?;
        let bar = (Better::Higher, 0.7, 0.9);
        rows.push(compare(REPLICATED, scope, &pair, IN_FLIGHT, (&replicated, &local), bar).await?);
        drop((local, replicated));
        pair.close().await;
    }
    if scope.wants(THROUGH) {
        let mut pair = Pair::open().await?;
        let master = pair.of_master(Acknowledge::Replicated { replicas: 1 }).await?;
        let other = pair.of_other(&master).await?;
        let bar = (Better::Higher, 0.8, 0.9);
        rows.push(compare(THROUGH, scope, &pair, IN_FLIGHT_THROUGH, (&other, &master), bar).await?);
        drop((master, other));
        pair.close().await;
    }
    Ok(rows)
}

/// Both in turns.
async fn compare(
    what: &'static str,
    scope: &Scope,
    pair: &Pair,
    in_flight: usize,
    (ours, baseline): (&Inventory, &Inventory),
    bar: (Better, f64, f64),
) -> anyhow::Result<Row> {
    let mut next = 0;
    let (mut ratios, mut detail) = (Vec::new(), String::new());
    for round in 0..=scope.rounds.min(ROUNDS) {
        let base = turn(in_flight, baseline, &pair.master, &pair.sale, &mut next).await?;
        let ours = turn(in_flight, ours, &pair.master, &pair.sale, &mut next).await?;
        if round > 0 {
            ratios.push(ours.per_second / base.per_second);
        }
        detail = describe(&ours, &base);
        if round > 0 {
            eprintln!("  round {round}: {:.2}, {detail}", ours.per_second / base.per_second);
        }
    }
    let row = row(what, "x", &ratios, bar, detail);
    print(&row);
    Ok(row)
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
