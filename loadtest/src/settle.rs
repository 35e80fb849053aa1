//! After the load: asking again for what is unknown, and looking every order up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use seckill_domain::OrderId;
use serde::Deserialize;
use tokio::task::JoinSet;

use crate::books::violation;
use crate::client::{self, Client, Target};
use crate::outcome::{Code, Codes, Verdict, judge};
use crate::record::{Purchase, Violation, Violations};
use crate::request::PurchaseRequest;
use crate::wire;
use crate::worker::{Plan, describe};

/// Connections the books use at once.
const CONNECTIONS: usize = 32;
/// Between two attempts at one purchase, doubled up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// One look-up may take this long.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// Sends purchases again under their keys, until the answer is final.
pub struct Replays<'a> {
    /// The run.
    pub plan: &'a Arc<Plan>,
    /// Its targets.
    pub targets: &'a [Target],
    /// Its codes.
    pub codes: &'a Codes,
    /// When to give up.
    pub deadline: Instant,
}

impl Replays<'_> {
    /// Asks again for the purchases at `which`, enters the answers, and returns how many requests it took.
    pub async fn ask_again(
        &self,
        purchases: &mut [Purchase],
        which: &[usize],
        violations: &mut Violations,
    ) -> u64 {
        let work: Arc<Vec<(usize, Purchase)>> =
            Arc::new(which.iter().map(|at| (*at, purchases[*at])).collect());
        let next = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for task in 0..CONNECTIONS.min(work.len()) {
            let target = self.targets[task % self.targets.len()].clone();
            let asker = Asker {
                request: PurchaseRequest::new(&target, &self.plan.asked),
                client: Client::new(target, self.plan.timeout),
                plan: Arc::clone(self.plan),
                codes: self.codes.clone(),
                deadline: self.deadline,
                requests: 0,
                violations: Violations::default(),
            };
            tasks.spawn(asker.work_through(Arc::clone(&work), Arc::clone(&next)));
        }
        let mut requests = 0;
        while let Some(done) = tasks.join_next().await {
            let (answered, asked, found) = match done {
                Ok(done) => done,
                Err(err) => std::panic::resume_unwind(err.into_panic()),
            };
            for (at, purchase) in answered {
                purchases[at] = purchase;
            }
            requests += asked;
            violations.merge(found);
        }
        requests
    }
}

struct Asker {
    request: PurchaseRequest,
    client: Client,
    plan: Arc<Plan>,
    codes: Codes,
    deadline: Instant,
    requests: u64,
    violations: Violations,
}

impl Asker {
    async fn work_through(
        mut self,
        work: Arc<Vec<(usize, Purchase)>>,
        next: Arc<AtomicUsize>,
    ) -> (Vec<(usize, Purchase)>, u64, Violations) {
        let mut done = Vec::new();
        while let Some((at, purchase)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut purchase = *purchase;
            self.ask(&mut purchase).await;
            done.push((*at, purchase));
        }
        (done, self.requests, self.violations)
    }

    async fn ask(&mut self, purchase: &mut Purchase) {
        let mut request = Vec::with_capacity(512);
        self.request.write(&self.plan.buyers, purchase.user, purchase.key, &mut request);
        let mut pause = PAUSE_MIN;
        loop {
            let knew_order = purchase.order().is_some();
            let answer = self.client.call(&request).await;
            // A connection that could not be made carried no request.
            if !matches!(answer, Err(client::Error::Connect(..))) {
                self.requests += 1;
                let verdict = self.understand(answer);
                if let Some(contradiction) = purchase.enter(&verdict, knew_order) {
                    self.violations.add(describe(contradiction, purchase, &self.plan.buyers, &self.codes));
                }
                if !verdict.retryable {
                    return purchase.resolve();
                }
                if let Some(seconds) = verdict.retry_after_s {
                    pause = pause.max(Duration::from_secs(seconds.into()));
                }
            }
            if Instant::now() + pause >= self.deadline {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn understand(&mut self, answer: Result<client::Answer, client::Error>) -> Verdict {
        match answer {
            Ok(answer) => {
                let answer = wire::Answer {
                    status: answer.status,
                    close: false,
                    replayed: answer.replayed,
                    retry_after_s: answer.retry_after_s,
                    body: answer.body.into(),
                    consumed: 0,
                };
                judge(&answer, &self.plan.asked, &mut self.codes)
            }
            Err(client::Error::Timeout(_)) => Verdict::unknown(Code::TIMEOUT),
            Err(client::Error::Malformed(_) | client::Error::TooLarge) => {
                Verdict::unknown(Code::INVALID_ANSWER)
            }
            Err(
                client::Error::Lost(_)
                | client::Error::Connect(..)
                | client::Error::Url(_)
                | client::Error::Resolve(..),
            ) => Verdict::unknown(Code::CONNECTION_LOST),
        }
    }
}

/// An order the buyers were told of.
#[derive(Debug, Clone, Copy)]
pub struct OrderToFind {
    /// Its id.
    pub order: OrderId,
    /// Whose it is.
    pub user: u32,
    /// Under which key.
    pub key: u16,
    /// Accepted in an earlier run with the same seed.
    pub from_before: bool,
}

#[derive(Deserialize)]
struct Order {
    order_id: Option<String>,
    sale_id: Option<String>,
    quantity: Option<u64>,
    status: String,
}

/// What a look-up shows.
enum Found {
    Stored,
    Differs(String),
    Queued,
    Missing,
    NoAnswer(String),
}

/// Looks every order up until it is stored. What is not by the deadline is a violation; if nothing at all
/// answered, the last error is returned.
pub async fn find_orders(
    plan: &Arc<Plan>,
    targets: &[Target],
    orders: &[OrderToFind],
    deadline: Instant,
    violations: &mut Violations,
) -> Option<String> {
    let mut pending = orders.to_vec();
    let mut pause = PAUSE_MIN;
    let mut answered = false;
    loop {
        let mut left = Vec::new();
        let mut last_error = None;
        for (order, found) in look_up_all(plan, targets, pending).await {
            answered |= !matches!(found, Found::NoAnswer(_));
            match found {
                Found::Stored => {}
                Found::Differs(how) => violations.add(describe_order(plan, &order, "order_differs", &how)),
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
            for (order, code, how) in &left {
                violations.add(describe_order(plan, order, code, how));
            }
            return if answered { None } else { last_error };
        }
        pending = left.into_iter().map(|(order, ..)| order).collect();
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn describe_order(plan: &Plan, order: &OrderToFind, code: &str, how: &str) -> Violation {
    let uid = plan.buyers.uid(order.user);
    let detail = format!("order {} of user {uid} {how}", order.order);
    violation(code, order.order, &uid, detail)
}

async fn look_up_all(
    plan: &Arc<Plan>,
    targets: &[Target],
    orders: Vec<OrderToFind>,
) -> Vec<(OrderToFind, Found)> {
    let orders = Arc::new(orders);
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    for task in 0..CONNECTIONS.min(orders.len()) {
        let (plan, orders, next) = (Arc::clone(plan), Arc::clone(&orders), Arc::clone(&next));
        let mut client = Client::new(targets[task % targets.len()].clone(), LOOKUP_TIMEOUT);
        tasks.spawn(async move {
            let mut found = Vec::new();
            while let Some(order) = orders.get(next.fetch_add(1, Ordering::Relaxed)) {
                found.push((*order, look_up(&mut client, &plan, order).await));
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

async fn look_up(client: &mut Client, plan: &Plan, order: &OrderToFind) -> Found {
    let path = format!("/v1/orders/{}", order.order);
    let answer = match client.get(&path, Some(&plan.buyers.token(order.user))).await {
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
        Err(err) => return Found::Differs(format!("is not what the contract says: {err}")),
    };
    if stored.status == "queued" {
        return Found::Queued;
    }
    let same = stored.order_id == Some(order.order.to_string())
        && stored.sale_id.as_deref() == Some(plan.asked.sale.as_str())
        && stored.quantity == Some(plan.asked.quantity.into());
    if same {
        Found::Stored
    } else {
        Found::Differs(format!(
            "is stored as order {} of sale {} with quantity {}",
            stored.order_id.unwrap_or_default(),
            stored.sale_id.unwrap_or_default(),
            stored.quantity.unwrap_or_default()
        ))
    }
}
