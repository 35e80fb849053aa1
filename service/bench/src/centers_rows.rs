//! What 30 ms between centers cost those who buy: when the other center has to confirm, and when they are there.

use std::sync::Arc;

use anyhow::Context;

use crate::Scope;
use crate::load;
use crate::table::{Better, Row, print, row};
use crate::two_services::{SECRET, TwoServices};

const REPLICATED: &str = "accepted/s, replicated at 30 ms / local, 4096 in flight";
const THROUGH: &str = "accepted/s through the other center / the master's own";

/// Connections, each with one purchase under way.
const IN_FLIGHT: usize = 4096;
/// Purchases in a turn, in requests of a round: long enough that its first and last 60 ms do not count.
const ROUND: u32 = 2;
/// Rounds at most: each stores its orders, too.
const ROUNDS: u32 = 4;
const SALE: &str = "bench";

pub(crate) async fn measure(scope: &Scope) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    if scope.wants(REPLICATED) {
        let local = Side::of(TwoServices::open(SALE, "local").await?, 0);
        let replicated = Side::of(TwoServices::open(SALE, "replicated").await?, 0);
        rows.push(compare(REPLICATED, scope, (&replicated, &local), (Better::Higher, 0.7, 0.9)).await?);
    }
    if scope.wants(THROUGH) {
        let both = Arc::new(TwoServices::open(SALE, "replicated").await?);
        let master = Side { both: Arc::clone(&both), place: 0 };
        let other = Side { both, place: 1 };
        rows.push(compare(THROUGH, scope, (&other, &master), (Better::Higher, 0.8, 0.9)).await?);
    }
    Ok(rows)
}

/// Where purchases are made.
struct Side {
    both: Arc<TwoServices>,
    place: usize,
}

/// What a turn gave.
struct Turn {
    /// Purchases accepted per second.
    per_second: f64,
    /// CPU time of both services for each, until its order is stored at home.
    services_us: f64,
}

impl Side {
    fn of(both: TwoServices, place: usize) -> Side {
        Side { both: Arc::new(both), place }
    }

    /// Buys over HTTP, each purchase by another buyer, and waits until all orders are stored.
    async fn turn(&self, seed: u64, count: u32) -> anyhow::Result<Turn> {
        let target = self.both.target(self.place).await?;
        let requests = load::purchases(target.authority(), SALE, (seed, count), SECRET.as_bytes());
        let stored = self.both.stored().await?;
        let cpu = self.both.cpu_time()?;
        let round = load::run(&target, requests, IN_FLIGHT, 202).await.with_context(|| self.both.logs())?;
        self.both.until_stored(stored + u64::from(count)).await?;
        let services_us = (self.both.cpu_time()? - cpu).as_secs_f64() * 1e6 / f64::from(count);
        Ok(Turn { per_second: round.rate(), services_us })
    }
}

/// Both in turns. The first round warms up.
async fn compare(
    what: &'static str,
    scope: &Scope,
    (ours, baseline): (&Side, &Side),
    bar: (Better, f64, f64),
) -> anyhow::Result<Row> {
    let (mut ratios, mut detail) = (Vec::new(), String::new());
    for round in 0..=scope.rounds.min(ROUNDS) {
        let seed = u64::from(round) * 2;
        let base = baseline.turn(seed, scope.requests * ROUND).await?;
        let ours = ours.turn(seed + 1, scope.requests * ROUND).await?;
        detail = format!(
            "{:.0} / {:.0} per s; both services' CPU to the stored order {:.1} / {:.1} us",
            ours.per_second, base.per_second, ours.services_us, base.services_us
        );
        if round > 0 {
            let ratio = ours.per_second / base.per_second;
            eprintln!("  round {round}: {ratio:.2}, {detail}");
            ratios.push(ratio);
        }
    }
    let row = row(what, "x", &ratios, bar, detail);
    print(&row);
    Ok(row)
}
