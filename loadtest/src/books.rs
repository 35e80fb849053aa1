//! The books: after the load, what the target says it did is compared with what it told the buyers.

use std::time::{Duration, Instant};

use seckill_domain::{OrderId, SaleId, Uid};
use serde::{Deserialize, Serialize};

use crate::client::{self, Client, Target};
use crate::outcome::Codes;
use crate::record::{Purchase, Violation, Violations};
use crate::settle::{self, OrderToFind, Replays};
use crate::worker::Plan;

/// Accepted purchases that are asked for once more, to see that replays still give the same order.
const REPLAY_SAMPLE: usize = 200;
/// Orders that are named when more was sold than there is.
const OVERSOLD_NAMED: usize = 20;
/// Between two looks at the audit.
const AUDIT_PAUSE: Duration = Duration::from_millis(100);
/// How long one call of the books may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The audit of one sale: `GET /admin/v1/sales/{id}/audit`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaleAudit {
    /// Units on offer.
    pub total: i64,
    /// Units left.
    pub remaining: i64,
    /// Units held.
    pub claimed: i64,
    /// Units given back so far.
    #[serde(default)]
    pub released: i64,
    /// Stored orders.
    #[serde(default)]
    pub orders: OrdersByState,
    /// Accepted, not stored yet.
    #[serde(default)]
    pub in_flight: i64,
    /// What the service itself found.
    #[serde(default)]
    pub violations: Vec<AuditViolation>,
}

/// Stored orders by state. A state this version does not know counts too.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OrdersByState(std::collections::BTreeMap<String, i64>);

impl OrdersByState {
    fn sum(&self) -> i64 {
        self.0.values().sum()
    }
}

/// A violation in the service's audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditViolation {
    /// What kind.
    #[serde(default)]
    pub code: String,
    /// In words.
    #[serde(default)]
    pub detail: String,
}

/// Why the books cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer.
    #[error("{0}: {1}")]
    Unreachable(String, client::Error),
    /// An answer that does not help.
    #[error("GET {path} answered {status}: {detail}")]
    Refused {
        /// What was asked.
        path: String,
        /// The status.
        status: u16,
        /// The beginning of the body.
        detail: String,
    },
    /// A body that is not what it should be.
    #[error("GET {0} answered something else than its contract says: {1}")]
    Unreadable(String, serde_json::Error),
}

/// The admin listener and the public one, as far as the books need them.
pub struct Access {
    admin: Client,
    token: String,
    sale: SaleId,
}

impl Access {
    /// Access through the admin listener.
    pub fn new(admin: Target, token: &str, sale: SaleId) -> Access {
        Access { admin: Client::new(admin, CALL_TIMEOUT), token: token.to_owned(), sale }
    }

    /// The audit as it stands.
    pub async fn audit(&mut self) -> Result<SaleAudit, Error> {
        let path = format!("/admin/v1/sales/{}/audit", self.sale);
        get_json(&mut self.admin, &path, Some(&self.token)).await
    }
}

/// A GET whose body is JSON.
pub async fn get_json<T: serde::de::DeserializeOwned>(
    client: &mut Client,
    path: &str,
    bearer: Option<&str>,
) -> Result<T, Error> {
    let url = format!("http://{}{path}", client.target().authority());
    let answer = client.get(path, bearer).await.map_err(|err| Error::Unreachable(url, err))?;
    if answer.status != 200 {
        let detail = String::from_utf8_lossy(&answer.body).chars().take(300).collect();
        return Err(Error::Refused { path: path.to_owned(), status: answer.status, detail });
    }
    serde_json::from_slice(&answer.body).map_err(|err| Error::Unreadable(path.to_owned(), err))
}

/// One question to the books.
#[derive(Debug, Serialize)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// It holds.
    pub ok: bool,
    /// The figures.
    pub detail: String,
}

/// The books after the run.
#[derive(Serialize)]
pub struct Books {
    /// Every check holds and there is no violation.
    pub balanced: bool,
    /// The checks.
    pub checks: Vec<Check>,
    /// How many violations there are.
    pub violation_count: u64,
    /// The first hundred.
    pub violations: Vec<Violation>,
    /// Different orders the buyers were told of, and how many of them were new in this run.
    pub orders: u64,
    /// Of those, accepted in an earlier run with the same seed.
    pub orders_from_before: u64,
    /// Purchases whose fate was unknown after the load.
    pub unknown: u64,
    /// Of those, with an order after asking again.
    pub unknown_accepted: u64,
    /// Of those, refused after asking again.
    pub unknown_refused: u64,
    /// Of those, still unknown.
    pub unknown_unresolved: u64,
    /// Requests for purchases that the books sent themselves.
    pub purchase_requests: u64,
    /// From the end of the load until every order was stored.
    pub drain_ms: u64,
    /// The audit before the load.
    pub before: SaleAudit,
    /// The audit at the end; `null` if it could not be had.
    pub after: Option<SaleAudit>,
    /// The limit per user, where the sale told it.
    pub per_user_limit: Option<u64>,
    /// Why the books could not be finished: the target or its admin listener is gone.
    pub unreachable: Option<String>,
}

impl Books {
    /// A violation was found that does not come from the target being gone.
    pub fn contradicted(&self) -> bool {
        self.violations.iter().any(|violation| violation.code != "order_unverified")
    }
}

/// What the books start from.
pub struct Opening {
    /// The admin listener.
    pub access: Access,
    /// The audit before the load.
    pub before: SaleAudit,
    /// The limit per user.
    pub per_user_limit: Option<u64>,
    /// Others buy too.
    pub shared_sale: bool,
    /// How long everything here may take.
    pub drain_timeout: Duration,
}

/// Asks for every unknown again, waits until every order is stored, and compares.
pub async fn close(
    mut opening: Opening,
    plan: &std::sync::Arc<Plan>,
    targets: &[Target],
    codes: &Codes,
    purchases: &mut [Purchase],
    mut violations: Violations,
    progress: &mut dyn FnMut(&str),
) -> Books {
    let began = Instant::now();
    let deadline = began + opening.drain_timeout;
    let unknown: Vec<usize> = (0..purchases.len()).filter(|at| purchases[*at].is_unknown()).collect();
    let replays = Replays { plan, targets, codes, deadline };
    if !unknown.is_empty() {
        progress(&format!("resolving {} unknown purchases", unknown.len()));
    }
    let mut purchase_requests = replays.ask_again(purchases, &unknown, &mut violations).await;

    let sample: Vec<usize> = sample(purchases, plan.seed);
    purchase_requests += replays.ask_again(purchases, &sample, &mut violations).await;

    let mut orders = orders_of(purchases);
    progress(&format!("waiting until {} orders are stored", orders.len()));
    let mut unreachable = settle::find_orders(plan, targets, &orders, deadline, &mut violations).await;
    let drain_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);

    let mut after = final_audit(&mut opening.access, deadline).await;
    // A request given up on may have run after the one that asked again was refused. Before the ledger is
    // called wrong for holding more than it told, those buyers ask once more.
    let held =
        |after: &SaleAudit| after.claimed + after.released - opening.before.claimed - opening.before.released;
    if let Ok(audit) = &after
        && held(audit) > units(&orders, plan)
    {
        let doubtful: Vec<usize> = (0..purchases.len())
            .filter(|at| purchases[*at].was_unknown() && purchases[*at].order().is_none())
            .collect();
        if !doubtful.is_empty() {
            purchase_requests += replays.ask_again(purchases, &doubtful, &mut violations).await;
            orders = orders_of(purchases);
            after = final_audit(&mut opening.access, deadline).await;
        }
    }

    let mut checks = client_checks(plan, &orders, opening.per_user_limit, &mut violations);
    let unresolved = unknown.iter().filter(|at| purchases[**at].is_unknown()).count() as u64;
    let resolved_accepted = unknown.iter().filter(|at| purchases[**at].order().is_some()).count() as u64;
    checks.push(Check {
        name: "every_unknown_resolved",
        ok: unresolved == 0,
        detail: format!("{} unknown after the load, {unresolved} still are", unknown.len()),
    });
    match &after {
        Ok(audit) => {
            checks.extend(ledger_checks(&opening, audit, &orders, plan, unresolved, &mut violations));
        }
        Err(err) => {
            checks.push(Check { name: "final_audit", ok: false, detail: err.to_string() });
            unreachable.get_or_insert_with(|| err.to_string());
        }
    }
    for (name, codes) in [
        ("one_order_per_key", &["replay_with_another_order"][..]),
        ("replays_are_marked", &["replay_not_marked"]),
        ("winners_stay_winners", &["winner_refused"]),
        ("acceptances_are_as_asked", &["wrong_acceptance"]),
        ("every_order_is_stored", &["order_lost", "order_not_stored", "order_unverified", "order_differs"]),
    ] {
        let found: u64 = codes.iter().map(|code| violations.count_of(code)).sum();
        checks.push(Check { name, ok: found == 0, detail: format!("{found} violations") });
    }
    Books {
        balanced: violations.count() == 0 && checks.iter().all(|check| check.ok),
        checks,
        violation_count: violations.count(),
        violations: violations.kept,
        orders: orders.len() as u64,
        orders_from_before: orders.iter().filter(|order| order.from_before).count() as u64,
        unknown: unknown.len() as u64,
        unknown_accepted: resolved_accepted,
        unknown_refused: unknown.len() as u64 - resolved_accepted - unresolved,
        unknown_unresolved: unresolved,
        purchase_requests,
        drain_ms,
        before: opening.before,
        after: after.ok(),
        per_user_limit: opening.per_user_limit,
        unreachable,
    }
}

/// Looks at the audit until nothing is in flight, or time is up.
async fn final_audit(access: &mut Access, deadline: Instant) -> Result<SaleAudit, Error> {
    loop {
        let result = access.audit().await;
        let settled = matches!(&result, Ok(audit) if audit.in_flight == 0);
        if settled || Instant::now() >= deadline {
            return result;
        }
        tokio::time::sleep(AUDIT_PAUSE).await;
    }
}

fn sample(purchases: &[Purchase], seed: u64) -> Vec<usize> {
    let winners: Vec<usize> = (0..purchases.len()).filter(|at| purchases[*at].order().is_some()).collect();
    let step = winners.len().div_ceil(REPLAY_SAMPLE).max(1);
    winners.into_iter().skip((seed % step as u64) as usize).step_by(step).collect()
}

fn orders_of(purchases: &[Purchase]) -> Vec<OrderToFind> {
    let mut orders: Vec<_> = purchases
        .iter()
        .filter_map(|purchase| {
            let from_before = purchase.is_from_before();
            Some(OrderToFind {
                order: purchase.order()?,
                user: purchase.user,
                key: purchase.key,
                from_before,
            })
        })
        .collect();
    orders.sort_unstable_by_key(|order| (order.order, order.user, order.key));
    orders
}

fn units(orders: &[OrderToFind], plan: &Plan) -> i64 {
    fresh(orders) * i64::from(plan.asked.quantity)
}

fn fresh(orders: &[OrderToFind]) -> i64 {
    orders.iter().filter(|order| !order.from_before).count() as i64
}

/// What the client's own record shows.
fn client_checks(
    plan: &Plan,
    orders: &[OrderToFind],
    limit: Option<u64>,
    violations: &mut Violations,
) -> Vec<Check> {
    let mut twice = 0u64;
    for pair in orders.windows(2).filter(|pair| pair[0].order == pair[1].order) {
        twice += 1;
        let (one, two) = (plan.buyers.uid(pair[0].user), plan.buyers.uid(pair[1].user));
        let detail =
            format!("order {} was given to user {one} and to user {two} under another key", pair[0].order);
        violations.add(violation("order_id_given_twice", pair[0].order, &two, detail));
    }
    let mut misplaced = 0u64;
    for order in orders {
        let uid = plan.buyers.uid(order.user);
        if Uid::new(&uid).is_ok_and(|uid| uid.table() != order.order.table()) {
            misplaced += 1;
            let detail = format!("order {} of user {uid} does not name the user's table", order.order);
            violations.add(violation("order_id_of_another_table", order.order, &uid, detail));
        }
    }
    let mut checks = vec![
        Check {
            name: "no_order_id_twice",
            ok: twice == 0,
            detail: format!("{} orders, {twice} ids given twice", orders.len()),
        },
        Check {
            name: "order_ids_name_the_users_table",
            ok: misplaced == 0,
            detail: format!("{misplaced} do not"),
        },
    ];
    if let Some(limit) = limit {
        let mut by_user: Vec<_> = orders.iter().map(|order| (order.user, order.order)).collect();
        by_user.sort_unstable();
        by_user.dedup();
        let mut above = 0u64;
        for of_one in by_user.chunk_by(|one, two| one.0 == two.0) {
            let held = of_one.len() as u64 * u64::from(plan.asked.quantity);
            if held > limit {
                above += 1;
                let (user, last) = of_one[of_one.len() - 1];
                let uid = plan.buyers.uid(user);
                let detail = format!("user {uid} holds {held} units, the limit is {limit}");
                violations.add(violation("user_above_limit", last, &uid, detail));
            }
        }
        checks.push(Check {
            name: "no_user_above_the_limit",
            ok: above == 0,
            detail: format!("limit {limit}, {above} users above it"),
        });
    }
    checks
}

/// What the ledger and the order tables show beside it.
fn ledger_checks(
    opening: &Opening,
    after: &SaleAudit,
    orders: &[OrderToFind],
    plan: &Plan,
    unresolved: u64,
    violations: &mut Violations,
) -> Vec<Check> {
    let before = &opening.before;
    let accepted = units(orders, plan);
    let slack = unresolved as i64;
    let held = after.claimed + after.released - before.claimed - before.released;
    let stored = after.orders.sum() - before.orders.sum();
    let all_units = orders.len() as i64 * i64::from(plan.asked.quantity);
    let beyond = (all_units - after.released - after.total).max(0) as usize;
    let mut latest: Vec<_> = if beyond == 0 { Vec::new() } else { orders.iter().collect() };
    latest.sort_unstable_by_key(|order| std::cmp::Reverse(order.order.seq()));
    for order in latest.into_iter().take(beyond.div_ceil(plan.asked.quantity as usize).min(OVERSOLD_NAMED)) {
        let uid = plan.buyers.uid(order.user);
        let detail =
            format!("order {} of user {uid} is beyond the {} units on offer", order.order, after.total);
        violations.add(violation("oversold", order.order, &uid, detail));
    }
    // An unknown that stayed one may be in the ledger or not; with other buyers there is no upper bound.
    let fits =
        |found: i64, told: i64, unsure: i64| found >= told && (opening.shared_sale || found <= told + unsure);
    let mut checks = vec![
        Check {
            name: "total_is_remaining_plus_claimed",
            ok: after.total == after.remaining + after.claimed,
            detail: format!("{} = {} + {}", after.total, after.remaining, after.claimed),
        },
        Check {
            name: "nothing_oversold",
            ok: after.remaining >= 0
                && after.claimed <= after.total
                && all_units - after.released <= after.total,
            detail: format!(
                "{all_units} units promised to these buyers, {} released, {} on offer, {} remaining",
                after.released, after.total, after.remaining
            ),
        },
        Check {
            name: "accepted_equals_claimed",
            ok: fits(held, accepted, slack * i64::from(plan.asked.quantity)),
            detail: format!(
                "{accepted} units accepted in this run, {held} more claimed or released than before"
            ),
        },
        Check {
            name: "accepted_equals_orders",
            ok: fits(stored, fresh(orders), slack),
            detail: format!(
                "{} orders accepted in this run, {stored} more stored than before",
                fresh(orders)
            ),
        },
        Check {
            name: "nothing_in_flight",
            ok: after.in_flight == 0,
            detail: format!("{} accepted and not stored", after.in_flight),
        },
    ];
    for found in &after.violations {
        let code = format!("audit:{}", found.code);
        violations.add(Violation { code, detail: found.detail.clone(), order_id: None, uid: None });
    }
    checks.push(Check {
        name: "the_services_own_audit_is_clean",
        ok: after.violations.is_empty(),
        detail: format!("{} violations", after.violations.len()),
    });
    checks
}

/// A violation about an order and its buyer.
pub fn violation(code: &str, order: OrderId, uid: &str, detail: String) -> Violation {
    Violation { code: code.to_owned(), detail, order_id: Some(order.to_string()), uid: Some(uid.to_owned()) }
}
