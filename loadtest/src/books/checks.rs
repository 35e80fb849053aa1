//! The comparisons.

use std::io;

use seckill_domain::{OrderId, Uid};

use super::{Check, Error, Opening, SaleAudit, violation};
use crate::ledger_file::Ledger;
use crate::plan::Plan;
use crate::record::{Violation, Violations};

/// Orders that are named when more was sold than there is.
const OVERSOLD_NAMED: usize = 20;
/// Orders that are compared with each other at once (24 bytes each).
const COMPARED_AT_ONCE: u64 = 2_000_000;

/// What the record comes to, for one sale.
#[derive(Default)]
pub(super) struct SaleSums {
    pub(super) orders: u64,
    fresh_orders: i64,
    units: i64,
    pub(super) fresh_units: i64,
    largest: i64,
    /// The latest orders, newest first: those that were too many, if any were.
    latest: Vec<(OrderId, u32)>,
}

/// What the record comes to.
pub(super) struct Sums {
    pub(super) sales: Vec<SaleSums>,
    /// By item: which of `sales`.
    sale_of: Vec<usize>,
    pub(super) from_before: u64,
    pub(super) payments: u64,
    pub(super) cancellations: u64,
    coupons_spent: u64,
    orders: u64,
    forged: u64,
}

impl Sums {
    pub(super) fn of(ledger: &Ledger, plan: &Plan, opening: &Opening) -> io::Result<Sums> {
        let sale_of = plan
            .items
            .iter()
            .map(|item| opening.sales.iter().position(|sale| sale.sale_id == item.sale).unwrap_or_default());
        let mut sums = Sums {
            sales: opening.sales.iter().map(|_| SaleSums::default()).collect(),
            sale_of: sale_of.collect(),
            from_before: 0,
            payments: 0,
            cancellations: 0,
            coupons_spent: 0,
            orders: 0,
            forged: 0,
        };
        ledger.for_each(|_, purchase| {
            sums.forged += u64::from(purchase.is_forged());
            let Some(order) = purchase.order() else { return };
            let sale = &mut sums.sales[sums.sale_of[usize::from(purchase.item)]];
            let units = i64::from(plan.asked(purchase.item).quantity);
            sums.orders += 1;
            sale.orders += 1;
            sale.units += units;
            sale.largest = sale.largest.max(units);
            if purchase.is_from_before() {
                sums.from_before += 1;
            } else {
                sale.fresh_orders += 1;
                sale.fresh_units += units;
            }
            sums.payments += u64::from(purchase.paid().1);
            sums.coupons_spent += u64::from(purchase.paid().1 && purchase.coupon != 0);
            sums.cancellations += u64::from(purchase.cancelled().1);
            let at = sale.latest.partition_point(|(later, _)| later.seq() > order.seq());
            if at < OVERSOLD_NAMED {
                sale.latest.insert(at, (order, purchase.user));
                sale.latest.truncate(OVERSOLD_NAMED);
            }
        })?;
        Ok(sums)
    }

    fn pairs<'a>(
        &'a self,
        opening: &'a Opening,
        audits: &'a [Result<SaleAudit, Error>],
    ) -> impl Iterator<Item = (&'a SaleSums, &'a SaleAudit, &'a SaleAudit)> {
        self.sales
            .iter()
            .zip(&opening.sales)
            .zip(audits)
            .filter_map(|((sums, sale), audit)| Some((sums, &sale.before, audit.as_ref().ok()?)))
    }

    /// A ledger holds more than the buyers were told of.
    pub(super) fn ledger_holds_more(&self, opening: &Opening, audits: &[Result<SaleAudit, Error>]) -> bool {
        self.pairs(opening, audits).any(|(sums, before, after)| held(before, after) > sums.fresh_units)
    }

    /// More orders are stored than the buyers were told of.
    pub(super) fn more_stored(&self, opening: &Opening, audits: &[Result<SaleAudit, Error>]) -> bool {
        self.pairs(opening, audits)
            .any(|(sums, before, after)| after.orders.sum() - before.orders.sum() > sums.fresh_orders)
    }
}

fn held(before: &SaleAudit, after: &SaleAudit) -> i64 {
    after.claimed + after.released - before.claimed - before.released
}

/// What the client's own record shows. The record is gone through in parts that fit into memory.
pub(super) fn of_the_record(
    ledger: &Ledger,
    plan: &Plan,
    opening: &Opening,
    sums: &Sums,
    violations: &mut Violations,
) -> io::Result<Vec<Check>> {
    let (mut twice, mut misplaced, mut above, mut spent_twice) = (0u64, 0u64, 0u64, 0u64);
    let parts = sums.orders.div_ceil(COMPARED_AT_ONCE).max(1);
    for part in 0..parts {
        let mut orders: Vec<(OrderId, u32, u32)> = Vec::new();
        let mut held: Vec<(u32, usize, OrderId, u32)> = Vec::new();
        let mut spent: Vec<(u64, OrderId, u32)> = Vec::new();
        ledger.for_each(|_, purchase| {
            let Some(order) = purchase.order() else { return };
            if order.seq() % parts == part {
                orders.push((order, purchase.user, purchase.key));
            }
            if u64::from(purchase.user) % parts == part && !purchase.cancelled().0 {
                let sale = sums.sale_of[usize::from(purchase.item)];
                held.push((purchase.user, sale, order, plan.asked(purchase.item).quantity));
            }
            if purchase.coupon != 0 && purchase.paid().1 && purchase.coupon % parts == part {
                spent.push((purchase.coupon, order, purchase.user));
            }
        })?;
        orders.sort_unstable();
        for pair in orders.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            twice += 1;
            let (one, two) = (plan.buyers.uid(pair[0].1), plan.buyers.uid(pair[1].1));
            let detail =
                format!("order {} was given to user {one} and to user {two} under another key", pair[0].0);
            violations.add(violation("order_id_given_twice", pair[0].0, &two, detail));
        }
        for (order, user, _) in &orders {
            let uid = plan.buyers.uid(*user);
            if Uid::new(&uid).is_ok_and(|uid| uid.table() != order.table()) {
                misplaced += 1;
                let detail = format!("order {order} of user {uid} does not name the user's table");
                violations.add(violation("order_id_of_another_table", *order, &uid, detail));
            }
        }
        // An order that was cancelled or expired gave its buyer's limit back: the record does not know of
        // expiries, so a sale whose orders may expire during the run is left to the service's own audit.
        held.sort_unstable();
        held.dedup();
        for of_one in held.chunk_by(|one, two| (one.0, one.1) == (two.0, two.1)) {
            let (user, sale, last, _) = of_one[of_one.len() - 1];
            let units: u64 = of_one.iter().map(|(.., units)| u64::from(*units)).sum();
            let Some(limit) = opening.sales[sale].per_user_limit else { continue };
            if units > limit && !opening.sales[sale].may_expire {
                above += 1;
                let uid = plan.buyers.uid(user);
                let detail = format!("user {uid} holds {units} units, the limit is {limit}");
                violations.add(violation("user_above_limit", last, &uid, detail));
            }
        }
        spent.sort_unstable();
        for pair in spent.windows(2).filter(|pair| pair[0].0 == pair[1].0 && pair[0].1 != pair[1].1) {
            spent_twice += 1;
            let uid = plan.buyers.uid(pair[1].2);
            let detail =
                format!("coupon {} paid for order {} and for order {}", pair[0].0, pair[0].1, pair[1].1);
            violations.add(violation("coupon_spent_twice", pair[1].1, &uid, detail));
        }
    }
    let mut checks = vec![
        Check::new(
            "no_order_id_twice",
            twice == 0,
            format!("{} orders, {twice} ids given twice", sums.orders),
        ),
        Check::new("order_ids_name_the_users_table", misplaced == 0, format!("{misplaced} do not")),
    ];
    if opening.sales.iter().any(|sale| sale.per_user_limit.is_some()) {
        let limits: Vec<String> = opening
            .sales
            .iter()
            .filter_map(|sale| sale.per_user_limit)
            .map(|limit| limit.to_string())
            .collect();
        let detail = format!("limit {}, {above} users above it", limits.join(" and "));
        checks.push(Check::new("no_user_above_the_limit", above == 0, detail));
    }
    if sums.coupons_spent > 0 {
        let detail = format!("{} spent, {spent_twice} of them twice", sums.coupons_spent);
        checks.push(Check::new("no_coupon_spent_twice", spent_twice == 0, detail));
    }
    Ok(checks)
}

/// What the ledger and the order tables show beside the record, for one sale.
pub(super) fn of_the_ledger(
    opening: &Opening,
    at: usize,
    after: &SaleAudit,
    all: &Sums,
    unresolved: u64,
    plan: &Plan,
    violations: &mut Violations,
) -> Vec<Check> {
    let (sale, sums) = (&opening.sales[at], &all.sales[at]);
    let before = &sale.before;
    let slack = unresolved as i64;
    let held = held(before, after);
    let stored = after.orders.sum() - before.orders.sum();
    let beyond = (sums.units - after.released - after.total).max(0);
    let named = beyond.div_euclid(sums.largest.max(1)) + i64::from(beyond % sums.largest.max(1) > 0);
    for (order, user) in sums.latest.iter().take(usize::try_from(named).unwrap_or(0)) {
        let uid = plan.buyers.uid(*user);
        let detail = format!("order {order} of user {uid} is beyond the {} units on offer", after.total);
        violations.add(violation("oversold", *order, &uid, detail));
    }
    // An unknown that stayed one may be in the ledger or not; with other buyers there is no upper bound.
    let fits =
        |found: i64, told: i64, unsure: i64| found >= told && (opening.shared_sale || found <= told + unsure);
    let name =
        |text: String| if opening.sales.len() > 1 { format!("{}: {text}", sale.sale_id) } else { text };
    let given_back = after.orders.of("cancelled") + after.orders.of("expired")
        - before.orders.of("cancelled")
        - before.orders.of("expired");
    let released = after.released - before.released;
    let mut checks = vec![
        Check::new(
            "total_is_remaining_plus_claimed",
            after.total == after.remaining + after.claimed,
            name(format!("{} = {} + {}", after.total, after.remaining, after.claimed)),
        ),
        Check::new(
            "nothing_oversold",
            after.remaining >= 0
                && after.claimed <= after.total
                && sums.units - after.released <= after.total,
            name(format!(
                "{} units promised to these buyers, {} released, {} on offer, {} remaining",
                sums.units, after.released, after.total, after.remaining
            )),
        ),
        Check::new(
            "accepted_equals_claimed",
            fits(held, sums.fresh_units, slack * sums.largest),
            name(format!(
                "{} units accepted in this run, {held} more claimed or released than before",
                sums.fresh_units
            )),
        ),
        Check::new(
            "accepted_equals_orders",
            fits(stored, sums.fresh_orders, slack),
            name(format!(
                "{} orders accepted in this run, {stored} more stored than before",
                sums.fresh_orders
            )),
        ),
        Check::new(
            "nothing_in_flight",
            after.in_flight == 0,
            name(format!("{} accepted and not stored", after.in_flight)),
        ),
    ];
    if given_back > 0 || released > 0 {
        // Units are whole orders: with several units each, the orders are only a lower bound.
        let ok = if sums.largest == 1 { released == given_back } else { released >= given_back };
        let detail = format!("{given_back} orders cancelled or expired, {released} units given back");
        checks.push(Check::new("given_back_once", ok || opening.shared_sale, name(detail)));
    }
    for found in &after.violations {
        let code = format!("audit:{}", found.code);
        violations.add(Violation { code, detail: found.detail.clone(), order_id: None, uid: None });
    }
    checks.push(Check::new(
        "the_services_own_audit_is_clean",
        after.violations.is_empty(),
        name(format!("{} violations", after.violations.len())),
    ));
    checks
}

/// The violations that were found on the way, as checks.
pub(super) fn of_violations(violations: &Violations, sums: &Sums) -> Vec<Check> {
    let mut checks = Vec::new();
    for (name, codes, asked) in [
        ("one_order_per_key", &["replay_with_another_order"][..], true),
        ("replays_are_marked", &["replay_not_marked"], true),
        ("winners_stay_winners", &["winner_refused"], true),
        ("acceptances_are_as_asked", &["wrong_acceptance"], true),
        (
            "every_order_is_stored",
            &["order_lost", "order_not_stored", "order_unverified", "order_differs"],
            true,
        ),
        ("orders_in_their_home_center", &["order_in_another_center"], true),
        ("no_order_without_a_purchase", &["order_without_purchase"], true),
        (
            "payments_stand",
            &["payment_lost", "paid_without_payment", "coupon_not_redeemed"],
            sums.payments > 0,
        ),
        ("cancellations_stand", &["cancellation_lost", "cancelled_unasked"], sums.cancellations > 0),
        ("forged_tokens_buy_nothing", &["forged_token_accepted"], sums.forged > 0),
    ] {
        let found: u64 = codes.iter().map(|code| violations.count_of(code)).sum();
        if asked || found > 0 {
            checks.push(Check::new(name, found == 0, format!("{found} violations")));
        }
    }
    checks
}
