//! After the load: asking again for what is unknown, and looking every order up.

mod lookup;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::client::{self, Client, Target};
use crate::ledger_file::At;
use crate::outcome::{Asked, Code, Codes, Op, Verdict, judge};
use crate::plan::Plan;
use crate::record::{Purchase, Violations};
use crate::request::Requests;
use crate::wire;

pub use lookup::{Homes, find_orders};

/// Connections the books use at once.
const CONNECTIONS: usize = 32;
/// Between two attempts at one purchase, doubled up to the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

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
    /// Asks again for these purchases, enters the answers, and returns how many requests it took.
    pub async fn ask_again(&self, purchases: &mut [(At, Purchase)], violations: &mut Violations) -> u64 {
        let work: Arc<Vec<Purchase>> = Arc::new(purchases.iter().map(|(_, purchase)| *purchase).collect());
        let next = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for task in 0..CONNECTIONS.min(work.len()) {
            let target = self.targets[task % self.targets.len()].clone();
            let asker = Asker {
                requests: Requests::new(&target, &self.plan.items, None),
                client: Client::new(target, self.plan.timeout),
                plan: Arc::clone(self.plan),
                codes: self.codes.clone(),
                deadline: self.deadline,
                sent: 0,
                violations: Violations::default(),
            };
            tasks.spawn(asker.work_through(Arc::clone(&work), Arc::clone(&next)));
        }
        let mut sent = 0;
        while let Some(done) = tasks.join_next().await {
            let (answered, asked, found) = match done {
                Ok(done) => done,
                Err(err) => std::panic::resume_unwind(err.into_panic()),
            };
            for (at, purchase) in answered {
                purchases[at].1 = purchase;
            }
            sent += asked;
            violations.merge(found);
        }
        sent
    }
}

struct Asker {
    requests: Requests,
    client: Client,
    plan: Arc<Plan>,
    codes: Codes,
    deadline: Instant,
    sent: u64,
    violations: Violations,
}

impl Asker {
    async fn work_through(
        mut self,
        work: Arc<Vec<Purchase>>,
        next: Arc<AtomicUsize>,
    ) -> (Vec<(usize, Purchase)>, u64, Violations) {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(mut purchase) = work.get(at).copied() else { break };
            self.ask(&mut purchase).await;
            done.push((at, purchase));
        }
        (done, self.sent, self.violations)
    }

    async fn ask(&mut self, purchase: &mut Purchase) {
        let mut request = Vec::with_capacity(512);
        let sender = self.plan.sender(purchase.user, purchase.persona);
        let asked = self.plan.asked(purchase.item).clone();
        let buyers = &self.plan.buyers;
        self.requests.purchase(purchase.item, buyers, sender, purchase.key, None, &mut request);
        let mut pause = PAUSE_MIN;
        loop {
            let knew_order = purchase.order().is_some();
            let answer = self.client.call(&request).await;
            // A connection that could not be made carried no request.
            if !matches!(answer, Err(client::Error::Connect(..))) {
                self.sent += 1;
                let verdict = self.understand(answer, &asked);
                if let Some(contradiction) = purchase.enter(&verdict, knew_order) {
                    self.violations.add(contradiction.describe(purchase, &self.plan.buyers, &self.codes));
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

    fn understand(&mut self, answer: Result<client::Answer, client::Error>, asked: &Asked) -> Verdict {
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
                judge(Op::Purchase, &answer, asked, &mut self.codes)
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
