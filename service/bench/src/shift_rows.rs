//! What a shift of the master costs those who buy meanwhile, in both centers, 30 ms apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use seckill_loadtest::buyers::{Buyers, TokenTerms};
use seckill_loadtest::client::{Client, Target};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::Scope;
use crate::table::{Better, Row, print, row};
use crate::two_services::{SECRET, TwoServices};

const HELD: &str = "planned shift, 30 ms between centers: writes held";
const FAILED: &str = "planned shift, 30 ms between centers: requests failed";
const FORCED: &str = "forced shift: command to first purchase, beyond the lease";

const SALE: &str = "shift";
/// Shoppers at a time in each center.
const WIDTH: u32 = 32;
/// Shoppers in all; a shift takes less than a second, and each shopper some 70 ms.
const BUYERS: u32 = 400_000;
/// Shifts there and back in a run, besides the first pair, which warms up.
const PAIRS: u32 = 5;
/// Purchases between two shifts.
const BETWEEN: Duration = Duration::from_millis(1000);
/// How long a purchase may take before it has failed: longer than it is held.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How long a service may write without confirming the topology (`topology.lease_ttl_ms`, its default).
const LEASE: Duration = Duration::from_secs(5);

pub(crate) async fn measure(scope: &Scope) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    if scope.wants(HELD) || scope.wants(FAILED) {
        rows.extend(planned().await?);
    }
    if scope.wants(FORCED) {
        rows.push(forced(scope).await?);
    }
    Ok(rows)
}

/// Back and forth under load.
async fn planned() -> anyhow::Result<Vec<Row>> {
    let both = TwoServices::open(SALE, "replicated").await?;
    let crowd = Crowd::start(&both, 1).await?;
    crowd.until_more(500).await?;
    let (mut held, mut gaps, mut steps) = (Vec::new(), Vec::new(), String::new());
    for n in 0..(PAIRS + 1) * 2 {
        let to = [1, 0][n as usize % 2];
        tokio::time::sleep(BETWEEN).await;
        let asked = Instant::now();
        let done = crowd.shift(&both, to, &[])?;
        both.until_master(to).await?;
        let shift = &done["shift"];
        ensure!(done["outcome"] == "done", "{done:#}\n{}", both.logs());
        crowd.until_more(100).await?;
        if n >= 2 {
            held.push(shift["held_ms"].as_f64().context("held_ms")?);
            gaps.push(crowd.longest_gap_ms(asked));
            steps = described(shift);
        }
    }
    let heard = crowd.stop().await?;
    let detail = format!(
        "longest time without a purchase {:.0} to {:.0} ms; {:.0} purchases/s; last: {steps}",
        gaps.iter().copied().fold(f64::INFINITY, f64::min),
        gaps.iter().copied().fold(0.0, f64::max),
        heard.per_second,
    );
    let failed = heard.failed.len() as f64;
    let why = heard.failed.first().cloned().unwrap_or_default();
    let rows = vec![
        row(HELD, "ms", &held, (Better::Lower, 500.0, 150.0), detail),
        row(
            FAILED,
            "",
            &[failed],
            (Better::Lower, 0.0, 0.0),
            format!("of {} in {} shifts {why}", heard.accepted, (PAIRS + 1) * 2),
        ),
    ];
    rows.iter().for_each(print);
    Ok(rows)
}

/// The master center is gone; from the command to the first purchase in the other one.
async fn forced(scope: &Scope) -> anyhow::Result<Row> {
    let (mut beyond, mut detail) = (Vec::new(), String::new());
    for round in 0..scope.rounds.min(3) {
        let mut both = TwoServices::open(SALE, "replicated").await?;
        let crowd = Crowd::start(&both, 100 + u64::from(round)).await?;
        crowd.until_more(500).await?;
        both.kill(0)?;
        let asked = Instant::now();
        let done = crowd.shift(&both, 1, &["--mode", "forced"])?;
        ensure!(done["outcome"] == "done", "{done:#}\n{}", both.logs());
        let first = crowd.first_since(asked).await?;
        beyond.push(first.as_secs_f64() - LEASE.as_secs_f64());
        detail = format!("lease {} s; last: {}", LEASE.as_secs(), described(&done["shift"]));
        crowd.stop().await?;
    }
    let row = row(FORCED, "s", &beyond, (Better::Lower, 2.0, 0.3), detail);
    print(&row);
    Ok(row)
}

/// Each step and how long it took.
fn described(shift: &Value) -> String {
    let steps = shift["steps"].as_array().into_iter().flatten();
    let steps: Vec<String> =
        steps.map(|step| format!("{} {}", step["name"].as_str().unwrap_or("?"), step["took_ms"])).collect();
    format!("{} ms", steps.join(", "))
}

/// Shoppers in both centers, each buying once, one after another.
struct Crowd {
    shoppers: JoinSet<Shopped>,
    stop: Arc<AtomicBool>,
    accepted: Arc<std::sync::Mutex<Vec<Instant>>>,
    started: Instant,
}

/// What one of them heard: failures in words.
type Shopped = Vec<String>;

/// What all of them heard.
struct Heard {
    accepted: usize,
    per_second: f64,
    failed: Vec<String>,
}

impl Crowd {
    async fn start(both: &TwoServices, seed: u64) -> anyhow::Result<Crowd> {
        let expires_at_s = jiff::Timestamp::now().as_second() + 3600;
        let terms = TokenTerms { secret: SECRET.as_bytes(), kid: None, expires_at_s };
        let buyers = Arc::new(Buyers::sign(seed, None, BUYERS, &terms, |_| {}));
        let (next, stop) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let accepted: Arc<std::sync::Mutex<Vec<Instant>>> = Arc::default();
        let mut shoppers = JoinSet::new();
        for place in 0..2 {
            let target = both.target(place).await?;
            for _ in 0..WIDTH {
                let shop = Shop {
                    target: target.clone(),
                    buyers: Arc::clone(&buyers),
                    next: Arc::clone(&next),
                    stop: Arc::clone(&stop),
                    accepted: Arc::clone(&accepted),
                };
                shoppers.spawn(shop.run());
            }
        }
        Ok(Crowd { shoppers, stop, accepted, started: Instant::now() })
    }

    fn shift(&self, both: &TwoServices, to: usize, more: &[&str]) -> anyhow::Result<Value> {
        let args = [&["master", "shift", "--to", crate::two_services::IDS[to], "--yes"], more].concat();
        tokio::task::block_in_place(|| both.command(to, &args))
    }

    fn times(&self) -> std::sync::MutexGuard<'_, Vec<Instant>> {
        self.accepted.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn until_more(&self, more: usize) -> anyhow::Result<()> {
        let goal = self.times().len() + more;
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.times().len() < goal {
            ensure!(Instant::now() < deadline, "nobody buys");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// The longest time between two purchases since then.
    fn longest_gap_ms(&self, since: Instant) -> f64 {
        let mut times: Vec<Instant> = self.times().iter().copied().filter(|time| *time >= since).collect();
        times.sort_unstable();
        let gaps = std::iter::once(since).chain(times.iter().copied()).zip(times.iter().copied());
        gaps.map(|(from, to)| (to - from).as_secs_f64() * 1000.0).fold(0.0, f64::max)
    }

    /// When the first purchase since then was accepted.
    async fn first_since(&self, since: Instant) -> anyhow::Result<Duration> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(first) = self.times().iter().copied().filter(|time| *time >= since).min() {
                return Ok(first - since);
            }
            ensure!(Instant::now() < deadline, "nobody buys after the shift");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stop(mut self) -> anyhow::Result<Heard> {
        let took = self.started.elapsed();
        self.stop.store(true, Ordering::Relaxed);
        let mut failed = Vec::new();
        while let Some(shopped) = self.shoppers.join_next().await {
            failed.extend(shopped.context("a shopper died")?);
        }
        let accepted = self.times().len();
        Ok(Heard { accepted, per_second: accepted as f64 / took.as_secs_f64(), failed })
    }
}

struct Shop {
    target: Target,
    buyers: Arc<Buyers>,
    next: Arc<AtomicU32>,
    stop: Arc<AtomicBool>,
    accepted: Arc<std::sync::Mutex<Vec<Instant>>>,
}

impl Shop {
    async fn run(self) -> Shopped {
        let mut client = Client::new(self.target.clone(), TIMEOUT);
        let mut failed = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let user = self.next.fetch_add(1, Ordering::Relaxed);
            if user >= self.buyers.count() {
                break;
            }
            let (bearer, key) = (format!("Bearer {}", self.buyers.token(user)), self.buyers.key(user, 0));
            let headers = [
                ("authorization", bearer.as_str()),
                ("idempotency-key", key.as_str()),
                ("content-type", "application/json"),
            ];
            let path = format!("/v1/sales/{SALE}/purchases");
            let request = self.target.request("POST", &path, &headers, Some(br#"{"quantity":1}"#));
            match client.call(&request).await {
                Ok(answer) if answer.status == 202 => {
                    self.accepted
                        .lock()
                        .unwrap_or_else(std::sync::PoisonError::into_inner)
                        .push(Instant::now());
                }
                Ok(answer) => {
                    failed.push(format!("{} {}", answer.status, String::from_utf8_lossy(&answer.body)));
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => {
                    failed.push(error.to_string());
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
        failed
    }
}
