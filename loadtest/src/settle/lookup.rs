//! Looking orders up: every order that was acknowledged is stored, as it was asked for and acknowledged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use seckill_domain::OrderId;
use serde::Deserialize;
use tokio::task::JoinSet;

use super::{CONNECTIONS, PAUSE_MAX, PAUSE_MIN};
use crate::books::violation;
use crate::client::{Client, Target};
use crate::outcome::center_mark;
use crate::plan::Plan;
use crate::record::{Purchase, Violation, Violations};

/// One look-up may take this long.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// With several targets, this many orders of each chunk are looked up at every one of them.
const EVERYWHERE: usize = 200;

/// The home centers of the shards, as the topology tells them.
#[derive(Debug, Clone, Default)]
pub struct Homes(BTreeMap<u16, u8>);

impl Homes {
    /// The shard of an order.
    pub fn shard(order: OrderId) -> u16 {
        order.table().number() % 64
    }

    /// A shard's home.
    pub fn learn(&mut self, shard: u16, center: &str) {
        self.0.insert(shard, center_mark(center));
    }

    fn of(&self, order: OrderId) -> Option<u8> {
        self.0.get(&Homes::shard(order)).copied()
    }
}

#[derive(Deserialize)]
struct Order {
    order_id: Option<String>,
    sale_id: Option<String>,
    quantity: Option<u64>,
    #[serde(default)]
    amount: u64,
    coupon_id: Option<String>,
    status: String,
}

/// What a look-up shows.
enum Found {
    Stored,
    Wrong(&'static str, String),
    Queued,
    Missing,
    NoAnswer(String),
}

/// Looks orders up until they are stored. What is not by the deadline is a violation; if nothing at all
/// answered, the last error is returned.
pub async fn find_orders(
    plan: &Arc<Plan>,
    targets: &[Target],
    orders: &[Purchase],
    homes: &Homes,
    deadline: Instant,
    violations: &mut Violations,
) -> Option<String> {
    for purchase in orders {
        if let Some(order) = purchase.order()
            && purchase.home != 0
            && homes.of(order).is_some_and(|home| home != purchase.home)
        {
            let how = "was acknowledged with a home center that is not its user's";
            violations.add(describe(plan, purchase, "order_in_another_center", how));
        }
    }
    let mut pending: Vec<(usize, Purchase)> = orders.iter().map(|order| (0, *order)).collect();
    if targets.len() > 1 {
        for target in 1..targets.len() {
            pending.extend(orders.iter().take(EVERYWHERE).map(|order| (target, *order)));
        }
    }
    let mut pause = PAUSE_MIN;
    let mut answered = false;
    loop {
        let mut left = Vec::new();
        let mut last_error = None;
        for (order, found) in look_up_all(plan, targets, pending).await {
            answered |= !matches!(found, Found::NoAnswer(_));
            match found {
                Found::Stored => {}
                Found::Wrong(code, how) => violations.add(describe(plan, &order.1, code, &how)),
                Found::Queued => left.push((order, "order_not_stored", "is still queued".to_owned())),
                Found::Missing => {
                    left.push((order, "order_lost", "was acknowledged and cannot be found".to_owned()));
                }
                Found::NoAnswer(error) => {
                    left.push((order, "order_unverified", format!("could not be looked up: {error}")));
                    last_error = Some(error);
                }
            }
        }
        if left.is_empty() {
            return None;
        }
        if Instant::now() + pause >= deadline {
            for ((_, order), code, how) in &left {
                violations.add(describe(plan, order, code, how));
            }
            return if answered { None } else { last_error };
        }
        pending = left.into_iter().map(|(order, ..)| order).collect();
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn describe(plan: &Plan, purchase: &Purchase, code: &str, how: &str) -> Violation {
    let uid = plan.buyers.uid(purchase.user);
    match purchase.order() {
        Some(order) => violation(code, order, &uid, format!("order {order} of user {uid} {how}")),
        None => Violation { code: code.to_owned(), detail: how.to_owned(), order_id: None, uid: Some(uid) },
    }
}

type Wanted = (usize, Purchase);

async fn look_up_all(plan: &Arc<Plan>, targets: &[Target], orders: Vec<Wanted>) -> Vec<(Wanted, Found)> {
    let orders = Arc::new(orders);
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for task in 0..CONNECTIONS.min(orders.len()) {
        let (plan, orders, next) = (Arc::clone(plan), Arc::clone(&orders), Arc::clone(&next));
        // A target of its own for each task, and the others in turn behind it.
        let mut clients: Vec<Client> = (0..targets.len())
            .map(|at| Client::new(targets[(task + at) % targets.len()].clone(), LOOKUP_TIMEOUT))
            .collect();
        tasks.spawn(async move {
            let mut found = Vec::new();
            while let Some(wanted) = orders.get(next.fetch_add(1, Ordering::Relaxed)) {
                let at = wanted.0 % clients.len();
                found.push((*wanted, look_up(&mut clients[at], &plan, &wanted.1).await));
            }
            found
        });
    }
    let mut all = Vec::with_capacity(orders.len());
    while let Some(found) = tasks.join_next().await {
        match found {
            Ok(found) => all.extend(found),
            Err(err) => std::panic::resume_unwind(err.into_panic()),
        }
    }
    all
}

async fn look_up(client: &mut Client, plan: &Plan, purchase: &Purchase) -> Found {
    let Some(id) = purchase.order() else { return Found::Missing };
    let path = format!("/v1/orders/{id}");
    let answer = match client.get(&path, Some(&plan.buyers.token(purchase.user))).await {
        Ok(answer) => answer,
        Err(err) => return Found::NoAnswer(err.to_string()),
    };
    match answer.status {
        200 => {}
        404 => return Found::Missing,
        status => return Found::NoAnswer(format!("status {status}")),
    }
    let stored: Order = match serde_json::from_slice(&answer.body) {
        Ok(stored) => stored,
        Err(err) => return Found::Wrong("order_differs", format!("is not what the contract says: {err}")),
    };
    if stored.status == "queued" {
        return Found::Queued;
    }
    let asked = plan.asked(purchase.item);
    let same = stored.order_id == Some(id.to_string())
        && stored.sale_id.as_deref() == Some(asked.sale.as_str())
        && stored.quantity == Some(asked.quantity.into());
    if !same {
        let how = format!(
            "is stored as order {} of sale {} with quantity {}",
            stored.order_id.unwrap_or_default(),
            stored.sale_id.unwrap_or_default(),
            stored.quantity.unwrap_or_default()
        );
        return Found::Wrong("order_differs", how);
    }
    compare_state(purchase, &stored)
}

/// The state is one that the buyer's own requests explain.
fn compare_state(purchase: &Purchase, stored: &Order) -> Found {
    let (pay_sent, paid) = purchase.paid();
    let (cancel_sent, cancelled) = purchase.cancelled();
    let status = stored.status.as_str();
    let wrong = |code, how: &str| Found::Wrong(code, format!("{how} (it is {status})"));
    if paid && status != "paid" {
        return wrong("payment_lost", "was paid, and its payment is gone");
    }
    if cancelled && status != "cancelled" {
        return wrong("cancellation_lost", "was cancelled, and is not");
    }
    // A sale at no price is paid as it is accepted; an earlier run may have paid its own orders.
    if status == "paid" && !pay_sent && stored.amount > 0 && !purchase.is_from_before() {
        return wrong("paid_without_payment", "is paid, and nobody paid");
    }
    if status == "cancelled" && !cancel_sent && !purchase.is_from_before() {
        return wrong("cancelled_unasked", "is cancelled, and nobody asked for it");
    }
    if paid
        && purchase.coupon != 0
        && stored.coupon_id != OrderId::from_number(purchase.coupon).map(|id| id.to_string())
    {
        return wrong("coupon_not_redeemed", "was paid with a coupon that it does not name");
    }
    Found::Stored
}
