//! What buyers do one after the other: look, think, click, click again, follow the order, pay or cancel. A
//! purchase is live while anything of it is under way or scheduled; then it goes to the ledger file.

use crate::buyers::{chance, mix};
use crate::connections::Flight;
use crate::outcome::{Effect, Op, Seen, Stage, Verdict};
use crate::record::{Contradiction, Purchase, Violation};
use crate::schedule::{Due, LiveIndex, Reason};
use crate::worker::{SECOND_NS, Worker};

/// Half of the duplicates are sent at once, the others within this time.
const DUPLICATE_DELAY_NS: f64 = 100e6;
/// Second purchases follow within this time.
const SECOND_PURCHASE_DELAY_NS: f64 = 500e6;
/// Between two looks at an order that is not stored, doubled up to the longest.
const POLL_MIN_NS: u64 = 100_000_000;
const POLL_MAX_NS: u64 = SECOND_NS;
/// Looks at an order before its buyer gives up.
const POLLS_MAX: u16 = 100;
/// Keys of one arrival of a buyer.
const KEYS: u32 = 4;
const SECOND_KEY: u32 = 1;
const COUPON_KEY: u32 = 2;

/// A purchase under way.
pub(crate) struct Live {
    pub(crate) purchase: Purchase,
    /// A purchase was sent: it belongs into the ledger.
    pub(crate) asked: bool,
    /// What is to be paid, minor units.
    pub(crate) amount: u64,
    /// Requests in flight, and follow-ups.
    pending: u16,
    /// Looks at the sale still to come.
    looks: u16,
    /// Looks at the order so far.
    polls: u16,
    /// Final answers not taken for an answer.
    stubborn: u16,
    /// A claim of a coupon, with the purchase still to come.
    claim: bool,
}

/// The live purchases of a worker.
#[derive(Default)]
pub(crate) struct Lives {
    slots: Vec<Option<Live>>,
    free: Vec<u32>,
}

impl Lives {
    fn add(&mut self, purchase: Purchase) -> LiveIndex {
        let live = Live {
            purchase,
            asked: false,
            amount: 0,
            pending: 1,
            looks: 0,
            polls: 0,
            stubborn: 0,
            claim: false,
        };
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        });
        self.slots[at as usize] = Some(live);
        LiveIndex(at)
    }

    pub(crate) fn get_mut(&mut self, at: LiveIndex) -> Option<&mut Live> {
        self.slots.get_mut(at.0 as usize)?.as_mut()
    }

    /// One thing less is under way; with the last one the purchase is returned, if there was one.
    pub(crate) fn let_go(&mut self, at: LiveIndex) -> Option<Purchase> {
        let live = self.get_mut(at)?;
        live.pending -= 1;
        if live.pending > 0 {
            return None;
        }
        let live = self.slots[at.0 as usize].take()?;
        self.free.push(at.0);
        live.asked.then_some(live.purchase)
    }

    /// What is left when the run ends.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = Purchase> + '_ {
        self.slots.drain(..).flatten().filter(|live| live.asked).map(|live| live.purchase)
    }
}

impl Worker {
    /// A buyer arrives: their purchase, and what will follow from it, is entered. `None`: they think first.
    pub(crate) fn arrive(&mut self, n: u64, at_ns: u64) -> Option<Due> {
        let at = self.plan.persona_of(n);
        let cast = &self.plan.cast[usize::from(at)];
        let (persona, item, coupon_item) = (&cast.persona, cast.item, cast.coupon_item);
        let (looks, forged, buys) = (persona.looks, persona.forged, persona.quantity > 0);
        let think = persona.think.ns(chance(self.plan.seed, n, 5));
        let count = u64::from(self.plan.buyers.count());
        let (user, key) = ((n % count) as u32, (n / count) as u32 * KEYS);
        let (key, item) = match coupon_item {
            Some(coupon) => (key + COUPON_KEY, coupon),
            None => (key, item),
        };
        let mut purchase = Purchase::new(user, key, item, at);
        if forged {
            purchase = purchase.forged();
        }
        let live = self.lives.add(purchase);
        if let Some(live) = self.lives.get_mut(live) {
            live.claim = coupon_item.is_some();
            live.looks = looks;
        }
        let op = match (looks, forged) {
            (1.., _) => Op::ReadSale,
            (0, true) => Op::ForgedPurchase,
            (0, false) => Op::Purchase,
        };
        let due = Due { at_ns, first_ns: at_ns, live, attempt: 1, op, reason: Reason::Arrival };
        if op == Op::ReadSale {
            return Some(due);
        }
        debug_assert!(buys, "a persona looks or buys");
        if think > 0 {
            let click_ns = at_ns + think;
            // The arrival's own claim on the purchase passes on to the click.
            let due = Due { at_ns: click_ns, first_ns: click_ns, reason: Reason::Journey, ..due };
            self.replace(due);
            return None;
        }
        self.click(due, n);
        Some(due)
    }

    /// What comes with a click: perhaps the same once more, perhaps another purchase.
    fn click(&mut self, due: Due, n: u64) {
        let Some(live) = self.lives.get_mut(due.live) else { return };
        let (purchase, claim) = (live.purchase, live.claim);
        let persona = self.plan.persona(purchase.persona);
        let (duplicates, seconds) = (persona.duplicates, persona.second_purchases);
        let (seed, op) = (self.plan.seed, due.op);
        if duplicates > 0.0 && chance(seed, n, 1) < duplicates {
            let delay = (chance(seed, n, 2) * 2.0 - 1.0).max(0.0) * DUPLICATE_DELAY_NS;
            let at_ns = due.at_ns + delay as u64;
            self.follow(Due { at_ns, first_ns: at_ns, reason: Reason::Duplicate, ..due });
        }
        if !claim && seconds > 0.0 && chance(seed, n, 3) < seconds {
            let at_ns = due.at_ns + (chance(seed, n, 4) * SECOND_PURCHASE_DELAY_NS) as u64;
            let mut second = purchase;
            second.key += SECOND_KEY;
            let live = self.lives.add(second);
            self.replace(Due { at_ns, first_ns: at_ns, live, attempt: 1, op, reason: Reason::Second });
        }
    }

    /// Schedules something more for a purchase.
    fn follow(&mut self, due: Due) {
        if due.at_ns > self.stop_ns {
            self.retries_skipped += 1;
            return;
        }
        if let Some(live) = self.lives.get_mut(due.live) {
            live.pending += 1;
            self.replace(due);
        }
    }

    /// Schedules something that is counted as pending already.
    fn replace(&mut self, due: Due) {
        if due.at_ns > self.stop_ns || !self.schedule.follow_up(due) {
            self.retries_skipped += 1;
            self.let_go(due.live);
        }
    }

    /// Goes on after an answer.
    pub(crate) fn proceed(&mut self, flight: &Flight, verdict: &Verdict) {
        match flight.due.op {
            Op::Purchase | Op::ForgedPurchase => self.purchase_answered(flight, verdict),
            Op::ReadSale => self.sale_seen(flight.due, verdict),
            Op::ReadOrder => self.order_seen(flight.due, verdict),
            Op::Pay | Op::Cancel => self.order_changed(flight.due, verdict),
        }
    }

    fn purchase_answered(&mut self, flight: &Flight, verdict: &Verdict) {
        let due = flight.due;
        let Some(live) = self.lives.get_mut(due.live) else { return };
        let knew_before = live.purchase.order().is_some();
        let contradiction = live.purchase.enter(verdict, flight.knew_order);
        let purchase = live.purchase;
        if let Some(contradiction) = contradiction {
            self.violations.add(contradiction.describe(&purchase, &self.plan.buyers, &self.codes));
        }
        match verdict.effect {
            Effect::Accepted { order, .. } => {
                if due.op == Op::ForgedPurchase {
                    let uid = self.plan.buyers.uid(purchase.user);
                    self.violations.add(Violation {
                        code: "forged_token_accepted".to_owned(),
                        detail: format!(
                            "order {order} was given to user {uid} for a token that nobody signed"
                        ),
                        order_id: Some(order.to_string()),
                        uid: Some(uid),
                    });
                } else if !knew_before {
                    let after_us = self.now_ns.saturating_sub(due.first_ns) / 1000;
                    let stats =
                        if due.first_ns < self.plan.warmup_ns { &mut self.warmup } else { &mut self.stats };
                    stats.accepted_after_us.saturating_record(after_us.max(1));
                    self.won(due, &purchase);
                }
            }
            Effect::Refused | Effect::Unknown | Effect::Done(_) => {
                if knew_before || due.reason == Reason::Duplicate {
                    return;
                }
                if verdict.retryable {
                    self.retry(due, verdict);
                } else if !self.insist(due) {
                    self.claim_failed(due);
                }
            }
        }
    }

    /// There is an order: the journey goes on.
    fn won(&mut self, due: Due, purchase: &Purchase) {
        let Some(live) = self.lives.get_mut(due.live) else { return };
        let claim = std::mem::take(&mut live.claim);
        if claim {
            let coupon = purchase.order().map_or(0, seckill_domain::OrderId::number);
            return self.buy_after_claim(due, coupon);
        }
        let persona = self.plan.persona(purchase.persona);
        if persona.follows || persona.pays > 0.0 || persona.cancels > 0.0 {
            let at_ns = self.now_ns + POLL_MIN_NS;
            self.follow(Due { at_ns, op: Op::ReadOrder, attempt: 1, reason: Reason::Journey, ..due });
        }
    }

    /// A coupon could not be had: the buyer buys without.
    fn claim_failed(&mut self, due: Due) {
        let Some(live) = self.lives.get_mut(due.live) else { return };
        if std::mem::take(&mut live.claim) {
            self.buy_after_claim(due, 0);
        }
    }

    fn buy_after_claim(&mut self, due: Due, coupon: u64) {
        let Some(live) = self.lives.get_mut(due.live) else { return };
        let claimed = live.purchase;
        let cast = &self.plan.cast[usize::from(claimed.persona)];
        let mut purchase = Purchase::new(claimed.user, claimed.key - COUPON_KEY, cast.item, claimed.persona);
        purchase.coupon = coupon;
        let pause = cast.persona.think.ns(chance(self.plan.seed, u64::from(claimed.user), 8));
        let at_ns = self.now_ns + pause;
        let live = self.lives.add(purchase);
        let reason = Reason::Journey;
        self.replace(Due { at_ns, first_ns: at_ns, live, attempt: 1, op: Op::Purchase, reason });
    }

    /// Asks again though the answer was final; `false` if this buyer is not (or no longer) so stubborn.
    fn insist(&mut self, due: Due) -> bool {
        let Some(live) = self.lives.get_mut(due.live) else { return false };
        let persona = self.plan.persona(live.purchase.persona);
        if live.stubborn >= persona.stubborn {
            return false;
        }
        live.stubborn += 1;
        let backoff_ns = u64::from(persona.backoff_ms) * 1_000_000;
        let again = u64::from(live.stubborn) << 48;
        let spread = mix(self.plan.seed ^ u64::from(due.live.0) ^ again) % backoff_ns;
        self.follow(Due { at_ns: self.now_ns + backoff_ns + spread, reason: Reason::Retry, ..due });
        true
    }

    fn retry(&mut self, due: Due, verdict: &Verdict) {
        let Some(live) = self.lives.get_mut(due.live) else { return };
        let persona = self.plan.persona(live.purchase.persona);
        if due.attempt >= persona.max_attempts {
            return;
        }
        let backoff = (u64::from(persona.backoff_ms) * 1_000_000) << (due.attempt - 1).min(10);
        let spread =
            mix(self.plan.seed ^ (u64::from(due.live.0) << 16) ^ u64::from(due.attempt)) % (backoff / 2);
        let wait = match verdict.retry_after_s.filter(|_| persona.honour_retry_after) {
            Some(seconds) => (u64::from(seconds) * SECOND_NS).max(1) + spread,
            None => backoff / 2 + spread,
        };
        self.follow(Due {
            at_ns: self.now_ns + wait,
            attempt: due.attempt + 1,
            reason: Reason::Retry,
            ..due
        });
    }

    fn sale_seen(&mut self, due: Due, verdict: &Verdict) {
        let Some(live) = self.lives.get_mut(due.live) else { return };
        if verdict.retryable {
            return self.retry(due, verdict);
        }
        live.looks = live.looks.saturating_sub(1);
        let (looks, purchase) = (live.looks, live.purchase);
        let persona = self.plan.persona(purchase.persona);
        let number = mix(u64::from(purchase.user) << 32 | u64::from(purchase.key)) ^ u64::from(looks);
        let at_ns = self.now_ns + persona.think.ns(chance(self.plan.seed, number, 5));
        let next = Due { at_ns, first_ns: at_ns, attempt: 1, reason: Reason::Journey, ..due };
        if looks > 0 {
            self.follow(next);
        } else if persona.quantity > 0 {
            let op = if persona.forged { Op::ForgedPurchase } else { Op::Purchase };
            let click = Due { op, ..next };
            self.click(click, number);
            self.follow(click);
        }
    }

    fn order_seen(&mut self, due: Due, verdict: &Verdict) {
        let Some(live) = self.lives.get_mut(due.live) else { return };
        live.polls += 1;
        let (polls, purchase) = (live.polls, live.purchase);
        let persona = self.plan.persona(purchase.persona);
        match verdict.effect {
            Effect::Done(Seen::Order { stage: Stage::Created, amount }) => {
                let number = mix(u64::from(purchase.user) << 32 | u64::from(purchase.key));
                let wish = chance(self.plan.seed, number, 6);
                let op = if wish < persona.pays {
                    Op::Pay
                } else if wish < persona.pays + persona.cancels {
                    Op::Cancel
                } else {
                    return;
                };
                let at_ns = self.now_ns + persona.decides.ns(chance(self.plan.seed, number, 7));
                let terms = coupon_terms(&self.plan, &purchase);
                let usable = purchase.coupon != 0 && amount >= terms.min_amount;
                if let Some(live) = self.lives.get_mut(due.live) {
                    live.amount = amount - if usable { terms.discount.min(amount) } else { 0 };
                    if !usable || op == Op::Cancel {
                        live.purchase.coupon = 0;
                    }
                }
                self.follow(Due { at_ns, op, attempt: 1, reason: Reason::Journey, ..due });
            }
            Effect::Done(Seen::Order { stage: Stage::Settled, .. }) => {}
            // Not stored yet, not found yet, or no answer: the buyer looks again.
            Effect::Done(_) | Effect::Refused | Effect::Unknown | Effect::Accepted { .. } => {
                if polls < POLLS_MAX {
                    let pause = (POLL_MIN_NS << polls.min(10)).min(POLL_MAX_NS);
                    let at_ns = self.now_ns + pause;
                    self.follow(Due { at_ns, attempt: 1, reason: Reason::Journey, ..due });
                }
            }
        }
    }

    fn order_changed(&mut self, due: Due, verdict: &Verdict) {
        let Some(live) = self.lives.get_mut(due.live) else { return };
        match verdict.effect {
            Effect::Done(_) => {
                live.purchase.enter(verdict, true);
            }
            Effect::Refused | Effect::Unknown | Effect::Accepted { .. } => {
                if verdict.retryable {
                    self.retry(due, verdict);
                }
            }
        }
    }
}

fn coupon_terms(plan: &crate::plan::Plan, purchase: &Purchase) -> crate::plan::CouponTerms {
    let coupon = plan.cast[usize::from(purchase.persona)].coupon_item;
    coupon.map(|item| plan.coupons[usize::from(item)]).unwrap_or_default()
}

impl Contradiction {
    /// A contradiction in words.
    pub fn describe(
        self,
        purchase: &Purchase,
        buyers: &crate::buyers::Buyers,
        codes: &crate::outcome::Codes,
    ) -> Violation {
        let uid = buyers.uid(purchase.user);
        let key = buyers.key(purchase.user, purchase.key);
        let (code, order, detail) = match self {
            Contradiction::AnotherOrder { first, second } => (
                "replay_with_another_order",
                second,
                format!("user {uid} got order {first} and then order {second} under the same key {key}"),
            ),
            Contradiction::ReplayNotMarked(order) => (
                "replay_not_marked",
                order,
                format!(
                    "order {order} was given to user {uid} twice under key {key} without Idempotent-Replayed"
                ),
            ),
            Contradiction::NotAsAsked(order) => (
                "wrong_acceptance",
                order,
                format!(
                    "order {order} of user {uid} (key {key}) names another sale or quantity than was asked for"
                ),
            ),
            Contradiction::WinnerRefused(order, code) => (
                "winner_refused",
                order,
                format!(
                    "user {uid} has order {order} and heard {} when asking again under key {key}",
                    codes.name(code)
                ),
            ),
        };
        Violation { code: code.to_owned(), detail, order_id: Some(order.to_string()), uid: Some(uid) }
    }
}
