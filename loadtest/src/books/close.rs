//! Closing the books: everything unknown is asked for again, every order looked up, everything compared. The
//! record is read from disk in pieces: the memory it takes does not depend on how long the run was.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::checks::{self, Sums};
use super::{Access, Books, Check, Error, Opening, SaleAudit, SaleBooks, phantoms};
use crate::client::{Client, Target};
use crate::ledger_file::{At, Cursor, Ledger};
use crate::outcome::Codes;
use crate::plan::Plan;
use crate::record::{Purchase, Violations};
use crate::settle::{Homes, Replays, find_orders};

/// Accepted purchases that are asked for once more, to see that replays still give the same order.
const REPLAY_SAMPLE: u64 = 200;
/// Purchases that are in memory at once while they are asked for or looked up.
const CHUNK: usize = 50_000;
/// Between two looks at the audit.
const AUDIT_PAUSE: Duration = Duration::from_millis(100);

/// Asks for every unknown again, waits until every order is stored, and compares.
pub async fn close(
    mut opening: Opening,
    plan: &Arc<Plan>,
    targets: &[Target],
    codes: &Codes,
    ledger: &Ledger,
    mut violations: Violations,
    progress: &mut dyn FnMut(&str),
) -> io::Result<Books> {
    let began = Instant::now();
    let deadline = began + opening.drain_timeout;
    let replays = Replays { plan, targets, codes, deadline };
    let mut asking = Asking { ledger, replays: &replays, requests: 0 };

    let unknown = asking.count(unresolved)?;
    if unknown > 0 {
        progress(&format!("resolving {unknown} unknown purchases"));
    }
    let (unknown_accepted, unknown_unresolved) = asking.ask(unresolved, &mut violations).await?;
    asking.sample(&mut violations).await?;

    let homes = if opening.shards_move { Homes::default() } else { homes(plan, targets, ledger).await? };
    let orders = asking.count(|purchase| purchase.order().is_some())?;
    progress(&format!("waiting until {orders} orders are stored"));
    let mut unreachable = None;
    let mut cursor = Cursor::default();
    loop {
        let chunk = ledger.chunks(CHUNK, |purchase| purchase.order().is_some(), &mut cursor)?;
        if chunk.is_empty() {
            break;
        }
        let found: Vec<Purchase> = chunk.into_iter().map(|(_, purchase)| purchase).collect();
        let failed = find_orders(plan, targets, &found, &homes, deadline, &mut violations).await;
        unreachable = unreachable.or(failed);
    }
    let drain_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);

    let mut sums = Sums::of(ledger, plan, &opening)?;
    let mut audits = final_audits(&mut opening, deadline).await;
    // A request given up on may have run after the one that asked again was refused. Before the ledger is
    // called wrong for holding more than it told, those buyers ask once more.
    if sums.ledger_holds_more(&opening, &audits)
        && asking.count(|purchase| purchase.was_unknown() && purchase.order().is_none())? > 0
    {
        let doubtful = |purchase: &Purchase| {
            purchase.was_unknown() && purchase.order().is_none() && !purchase.is_forged()
        };
        asking.ask(doubtful, &mut violations).await?;
        sums = Sums::of(ledger, plan, &opening)?;
        audits = final_audits(&mut opening, deadline).await;
    }
    if !opening.shared_sale && sums.more_stored(&opening, &audits) {
        phantoms::name(&mut opening.access, ledger, &opening.sales, opening.started_ms, &mut violations)
            .await?;
    }

    let mut all = checks::of_the_record(ledger, plan, &opening, &sums, &mut violations)?;
    all.push(Check::new(
        "every_unknown_resolved",
        unknown_unresolved == 0,
        format!("{unknown} unknown after the load, {unknown_unresolved} still are"),
    ));
    for (at, audit) in audits.iter().enumerate() {
        match audit {
            Ok(audit) => {
                all.extend(checks::of_the_ledger(
                    &opening,
                    at,
                    audit,
                    &sums,
                    unknown_unresolved,
                    plan,
                    &mut violations,
                ));
            }
            Err(err) => {
                all.push(Check::new("final_audit", false, err.to_string()));
                unreachable.get_or_insert_with(|| err.to_string());
            }
        }
    }
    all.extend(checks::of_violations(&violations, &sums));
    let sales = opening.sales.iter().zip(audits).zip(&sums.sales).map(|((sale, audit), sums)| SaleBooks {
        sale_id: sale.sale_id.clone(),
        per_user_limit: sale.per_user_limit,
        orders: sums.orders,
        units_accepted: sums.fresh_units,
        before: sale.before.clone(),
        after: audit.ok(),
    });
    let sales = sales.collect();
    Ok(Books {
        balanced: violations.count() == 0 && all.iter().all(|check| check.ok),
        checks: all,
        violation_count: violations.count(),
        violations: violations.kept,
        sales,
        orders,
        orders_from_before: sums.from_before,
        payments: sums.payments,
        cancellations: sums.cancellations,
        unknown,
        unknown_accepted,
        unknown_refused: unknown - unknown_accepted - unknown_unresolved,
        unknown_unresolved,
        purchase_requests: asking.requests,
        drain_ms,
        unreachable,
    })
}

fn unresolved(purchase: &Purchase) -> bool {
    // Asking again for a forged purchase would need a token that is not forged.
    purchase.is_unknown() && !purchase.is_forged()
}

struct Asking<'a> {
    ledger: &'a Ledger,
    replays: &'a Replays<'a>,
    requests: u64,
}

impl Asking<'_> {
    fn count(&self, wanted: impl Fn(&Purchase) -> bool) -> io::Result<u64> {
        let mut count = 0;
        self.ledger.for_each(|_, purchase| count += u64::from(wanted(&purchase)))?;
        Ok(count)
    }

    /// Asks again for some purchases; how many turned out accepted, and how many are still unknown.
    async fn ask(
        &mut self,
        wanted: impl Fn(&Purchase) -> bool,
        violations: &mut Violations,
    ) -> io::Result<(u64, u64)> {
        let (mut accepted, mut still) = (0, 0);
        let mut cursor = Cursor::default();
        loop {
            let mut chunk = self.ledger.chunks(CHUNK, &wanted, &mut cursor)?;
            if chunk.is_empty() {
                return Ok((accepted, still));
            }
            self.requests += self.replays.ask_again(&mut chunk, violations).await;
            for (at, purchase) in &chunk {
                accepted += u64::from(purchase.order().is_some());
                still += u64::from(purchase.is_unknown());
                self.ledger.correct(*at, purchase)?;
            }
        }
    }

    /// Asks again for some winners, evenly spread.
    async fn sample(&mut self, violations: &mut Violations) -> io::Result<()> {
        let won = |purchase: &Purchase| purchase.order().is_some() && !purchase.is_forged();
        let step = self.count(won)?.div_ceil(REPLAY_SAMPLE).max(1);
        let mut number = self.replays.plan.seed % step;
        let mut chosen: Vec<(At, Purchase)> = Vec::new();
        self.ledger.for_each(|at, purchase| {
            if won(&purchase) {
                number += 1;
                if number.is_multiple_of(step) {
                    chosen.push((at, purchase));
                }
            }
        })?;
        self.requests += self.replays.ask_again(&mut chosen, violations).await;
        for (at, purchase) in &chosen {
            self.ledger.correct(*at, purchase)?;
        }
        Ok(())
    }
}

/// The home center of every shard that has an order of which the answer named one.
async fn homes(plan: &Plan, targets: &[Target], ledger: &Ledger) -> io::Result<Homes> {
    let mut homes = Homes::default();
    let mut users = std::collections::BTreeMap::new();
    ledger.for_each(|_, purchase| {
        if let (Some(order), 1..) = (purchase.order(), purchase.home) {
            users.entry(Homes::shard(order)).or_insert(purchase.user);
        }
    })?;
    let mut client = Client::new(targets[0].clone(), super::CALL_TIMEOUT);
    for (shard, user) in users {
        let route = super::get_json(&mut client, "/v1/route", Some(&plan.buyers.token(user))).await;
        // Without a route the answers cannot be compared with one; everything else still is.
        if let Ok(serde_json::Value::Object(route)) = route
            && let Some(home) = route.get("home_center").and_then(|home| home.as_str())
        {
            homes.learn(shard, home);
        }
    }
    Ok(homes)
}

async fn final_audits(opening: &mut Opening, deadline: Instant) -> Vec<Result<SaleAudit, Error>> {
    let mut audits = Vec::new();
    for sale in &opening.sales {
        audits.push(final_audit(&mut opening.access, &sale.sale_id, deadline).await);
    }
    audits
}

/// Looks at the audit until nothing is in flight and what was cancelled is given back, or time is up.
async fn final_audit(access: &mut Access, sale: &str, deadline: Instant) -> Result<SaleAudit, Error> {
    loop {
        let result = access.audit(sale).await;
        let settled = matches!(&result, Ok(audit) if audit.in_flight == 0 && audit.violations.is_empty()
            && audit.orders.of("cancelled") + audit.orders.of("expired") <= audit.released);
        if settled || Instant::now() >= deadline {
            return result;
        }
        tokio::time::sleep(AUDIT_PAUSE).await;
    }
}
