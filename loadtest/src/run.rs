//! One run from beginning to end.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::books::{self, Access, Opening};
use crate::buyers::{Buyers, TokenTerms};
use crate::client::{self, Client, Target};
use crate::outcome::{Asked, Code, Codes};
use crate::record::{Purchase, Violations};
use crate::report::{
    CodeReport, Environment, Generator, INTERVALS_KEPT, IntervalReport, Latency, Offered, Purchases, Report,
    Result as Ending, SCHEMA, SCHEMA_VERSION, WorkerReport,
};
use crate::request::PurchaseRequest;
use crate::scenario::{Invalid, Scenario};
use crate::schedule::Reason;
use crate::selfcheck::{self, Usage};
use crate::stats::{Interval, Stats, add, histogram};
use crate::worker::{Outcome, Plan, Worker};

/// Between the start of the workers' threads and the first arrival.
const LEAD: Duration = Duration::from_millis(50);
/// The first calls at target and admin listener.
const PREFLIGHT_TIMEOUT: Duration = Duration::from_secs(5);
/// A sale that was just created reaches the public listener with its next snapshot.
const SALE_SHOWS_WITHIN: Duration = Duration::from_secs(2);
/// Tokens outlive the run by this much.
const TOKEN_SPARE_S: i64 = 3600;
/// Seconds of all workers that may wait to be shown.
const INTERVALS_WAITING: usize = 4096;

/// Why a run did not begin.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The scenario cannot be run.
    #[error(transparent)]
    Scenario(#[from] Invalid),
    /// The target or its admin listener answers, but not to this sale or token.
    #[error("{0}")]
    Mismatch(String),
    /// Nothing answers.
    #[error("{0}")]
    Unreachable(String),
    /// The generator's own trouble: no threads, no epoll.
    #[error("the generator failed: {0}")]
    Generator(#[from] io::Error),
}

impl Error {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Unreachable(_) => 4,
            Error::Scenario(_) | Error::Mismatch(_) => 64, // EX_USAGE
            Error::Generator(_) => 70,                     // EX_SOFTWARE
        }
    }
}

impl From<client::Error> for Error {
    fn from(err: client::Error) -> Error {
        match err {
            client::Error::Url(_) => Error::Mismatch(err.to_string()),
            client::Error::Resolve(..)
            | client::Error::Connect(..)
            | client::Error::Lost(_)
            | client::Error::Timeout(_)
            | client::Error::Malformed(_)
            | client::Error::TooLarge => Error::Unreachable(err.to_string()),
        }
    }
}

impl From<books::Error> for Error {
    fn from(err: books::Error) -> Error {
        match err {
            books::Error::Unreachable(..) => Error::Unreachable(err.to_string()),
            books::Error::Refused { .. } | books::Error::Unreadable(..) => Error::Mismatch(err.to_string()),
        }
    }
}

/// Runs a scenario. `progress` gets lines for a person to read, about one a second; when `interrupt` is done
/// the arrivals end, and the books are checked for what was sent until then.
pub async fn run(
    scenario: &Scenario,
    mut progress: impl FnMut(&str),
    interrupt: impl Future<Output = ()>,
) -> Result<Report, Error> {
    scenario.validate()?;
    let mut targets = Vec::new();
    for url in &scenario.targets {
        targets.push(Target::resolve(url).await?);
    }
    let opening = preflight(scenario, &targets).await?;
    let plan = Arc::new(plan(scenario, &targets, &mut progress).await?);
    if opening.is_some() {
        check_token(&plan, &targets).await?;
    }

    let codes = Codes::default();
    let started_at = jiff::Timestamp::now();
    let start = Instant::now() + LEAD;
    let (sender, receiver) = mpsc::channel(INTERVALS_WAITING);
    let mut workers: Vec<JoinHandle<io::Result<Outcome>>> = Vec::new();
    for number in 0..scenario.workers {
        let worker = Worker::new(Arc::clone(&plan), number, codes.clone(), start, sender.clone())?;
        let thread = std::thread::Builder::new().name(format!("worker-{number}"));
        workers.push(thread.spawn(move || worker.run())?);
    }
    drop(sender);
    let (intervals, interrupted) = watch(scenario, &plan, receiver, &mut progress, interrupt).await;

    let mut all = Merged::new();
    for worker in workers {
        match worker.join() {
            Ok(outcome) => all.add(outcome?),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
    let mut report = all.report(scenario, &plan, &codes, started_at, interrupted, intervals);
    if let Some(opening) = opening {
        let books =
            books::close(opening, &plan, &targets, &codes, &mut all.purchases, all.violations, &mut progress)
                .await;
        report.books = Some(books);
    } else if all.violations.count() > 0 {
        report.notes.push(format!("{} contradictions between answers", all.violations.count()));
    }
    report.conclude();
    Ok(report)
}

/// Is there a target, does it have the sale, and does the admin token open its books?
async fn preflight(scenario: &Scenario, targets: &[Target]) -> Result<Option<Opening>, Error> {
    let Some(admin) = &scenario.admin else {
        for target in targets {
            let connect = client::Connection::connect(target);
            tokio::time::timeout(PREFLIGHT_TIMEOUT, connect)
                .await
                .map_err(|_| Error::Unreachable(format!("cannot connect to {}", target.authority())))??;
        }
        return Ok(None);
    };
    let path = format!("/v1/sales/{}", scenario.sale);
    let mut per_user_limit = None;
    for target in targets {
        let mut client = Client::new(target.clone(), PREFLIGHT_TIMEOUT);
        let patience = Instant::now() + SALE_SHOWS_WITHIN;
        let sale: serde_json::Value = loop {
            match books::get_json(&mut client, &path, None).await {
                Err(books::Error::Refused { status: 404, .. }) if Instant::now() < patience => {
                    tokio::time::sleep(SALE_SHOWS_WITHIN / 20).await;
                }
                result => break result?,
            }
        };
        per_user_limit = sale["per_user_limit"].as_u64().or(per_user_limit);
    }
    let mut access = Access::new(Target::resolve(&admin.url).await?, &admin.token, scenario.sale.clone());
    let before = access.audit().await?;
    Ok(Some(Opening {
        access,
        before,
        per_user_limit,
        shared_sale: scenario.shared_sale,
        drain_timeout: scenario.drain_timeout,
    }))
}

/// A secret that is not the target's would make a run of nothing but 401s, with books that balance.
async fn check_token(plan: &Plan, targets: &[Target]) -> Result<(), Error> {
    for target in targets {
        let mut client = Client::new(target.clone(), PREFLIGHT_TIMEOUT);
        let answer = client.get("/v1/route", Some(&plan.buyers.token(0))).await?;
        if matches!(answer.status, 401 | 403) {
            let text =
                "does not take the buyers' tokens: --token-secret-file or --kid is not what it expects";
            return Err(Error::Mismatch(format!("{} {text} ({})", target.authority(), answer.status)));
        }
    }
    Ok(())
}

async fn plan(
    scenario: &Scenario,
    targets: &[Target],
    progress: &mut impl FnMut(&str),
) -> Result<Plan, Error> {
    let arrivals = u32::try_from(scenario.arrivals()).unwrap_or(u32::MAX);
    let count = scenario.buyers.min(arrivals);
    let lifetime = scenario.duration + 2 * scenario.timeout + scenario.drain_timeout;
    let expires_at_s = jiff::Timestamp::now().as_second() + lifetime.as_secs() as i64 + TOKEN_SPARE_S;
    let (sender, mut signed) = mpsc::channel(16);
    let (seed, prefix, kid) = (scenario.seed, scenario.uid_prefix.clone(), scenario.kid.clone());
    let secret = scenario.secret.clone();
    let signing = tokio::task::spawn_blocking(move || {
        let terms = TokenTerms { secret: &secret, kid: kid.as_deref(), expires_at_s };
        Buyers::sign(seed, prefix.as_deref(), count, &terms, |done| {
            // A line that nobody reads in time is left out.
            let _ = sender.try_send(done);
        })
    });
    while let Some(done) = signed.recv().await {
        progress(&format!("signed {done} of {count} tokens"));
    }
    let buyers = signing.await.map_err(io::Error::other)?;
    let asked = Asked { sale: scenario.sale.to_string(), quantity: scenario.quantity };
    Ok(Plan {
        targets: targets.iter().map(|target| (target.addr(), PurchaseRequest::new(target, &asked))).collect(),
        buyers,
        asked,
        rate: scenario.rate,
        arrivals,
        duration: scenario.duration,
        workers: scenario.workers,
        connections: (scenario.connections / scenario.workers) as usize,
        timeout: scenario.timeout,
        duplicates: scenario.duplicates,
        second_purchases: scenario.second_purchases,
        max_attempts: scenario.max_attempts,
        honour_retry_after: scenario.honour_retry_after,
        seed: scenario.seed,
        interrupted: AtomicBool::new(false),
    })
}

/// Shows each second when all workers have told of it, until the last worker has ended.
async fn watch(
    scenario: &Scenario,
    plan: &Plan,
    mut receiver: mpsc::Receiver<Interval>,
    progress: &mut impl FnMut(&str),
    interrupt: impl Future<Output = ()>,
) -> (Vec<IntervalReport>, bool) {
    let mut interrupt = pin!(interrupt);
    let mut interrupted = false;
    let mut kept: Vec<IntervalReport> = Vec::new();
    let mut open: Option<Interval> = None;
    let mut close = |interval: Interval, progress: &mut dyn FnMut(&str)| {
        progress(&line(scenario, &interval));
        if kept.len() < INTERVALS_KEPT {
            kept.push(IntervalReport::of(&interval));
        }
    };
    loop {
        tokio::select! {
            next = receiver.recv() => match (next, open.take()) {
                (None, last) => {
                    if let Some(last) = last {
                        close(last, progress);
                    }
                    return (kept, interrupted);
                }
                (Some(next), None) => open = Some(next),
                (Some(next), Some(mut interval)) if next.second <= interval.second => {
                    interval.merge(&next);
                    open = Some(interval);
                }
                (Some(next), Some(interval)) => {
                    close(interval, progress);
                    open = Some(next);
                }
            },
            () = &mut interrupt, if !interrupted => {
                interrupted = true;
                plan.interrupted.store(true, Ordering::Relaxed);
                progress("interrupted: no more arrivals, checking the books for what was sent");
            }
        }
    }
}

fn line(scenario: &Scenario, interval: &Interval) -> String {
    format!(
        "{:>4}s  rate {}/{:.0}  requests {}  accepted {}  replayed {}  refused {}  unknown {}  p99 {:.1} ms{}",
        interval.second + 1,
        interval.arrivals,
        scenario.rate,
        interval.requests,
        interval.accepted,
        interval.replayed,
        interval.refused,
        interval.unknown,
        interval.latency_us.value_at_quantile(0.99) as f64 / 1000.0,
        if interval.backlog > 0 { format!("  waiting {}", interval.backlog) } else { String::new() },
    )
}

struct Merged {
    purchases: Vec<Purchase>,
    stats: Stats,
    violations: Violations,
    lag_us: hdrhistogram::Histogram<u64>,
    usage: Vec<Usage>,
    arrivals: u64,
    sent: u64,
    sent_in_time: u64,
    last_sent_ns: u64,
    retries_skipped: u64,
    connected: u64,
    connect_errors: u64,
    connections_peak: u64,
}

impl Merged {
    fn new() -> Merged {
        Merged {
            purchases: Vec::new(),
            stats: Stats::new(),
            violations: Violations::default(),
            lag_us: histogram(3),
            usage: Vec::new(),
            arrivals: 0,
            sent: 0,
            sent_in_time: 0,
            last_sent_ns: 0,
            retries_skipped: 0,
            connected: 0,
            connect_errors: 0,
            connections_peak: 0,
        }
    }

    fn add(&mut self, mut outcome: Outcome) {
        if self.purchases.is_empty() {
            self.purchases = outcome.purchases;
        } else {
            self.purchases.append(&mut outcome.purchases);
        }
        self.stats.merge(&outcome.stats);
        self.violations.merge(outcome.violations);
        add(&mut self.lag_us, &outcome.lag_us);
        self.usage.push(outcome.usage);
        self.arrivals += outcome.arrivals;
        self.sent += outcome.sent;
        self.sent_in_time += outcome.sent_in_time;
        self.last_sent_ns = self.last_sent_ns.max(outcome.last_sent_ns);
        self.retries_skipped += outcome.retries_skipped;
        self.connected += outcome.connections.opened;
        self.connect_errors += outcome.connections.errors;
        self.connections_peak += outcome.connections.peak as u64;
    }

    fn report(
        &self,
        scenario: &Scenario,
        plan: &Plan,
        codes: &Codes,
        started_at: jiff::Timestamp,
        interrupted: bool,
        intervals: Vec<IntervalReport>,
    ) -> Report {
        let mut scenario = scenario.clone();
        scenario.uid_prefix = Some(plan.buyers.prefix().to_owned());
        let mut total = histogram(3);
        let mut outcomes: Vec<_> = self
            .stats
            .codes()
            .map(|(code, stats)| {
                if stats.effect != "unsent" {
                    add(&mut total, &stats.latency_us);
                }
                CodeReport {
                    code: codes.name(code),
                    effect: stats.effect,
                    requests: stats.latency_us.len(),
                    latency_us: Latency::of(&stats.latency_us),
                }
            })
            .collect();
        outcomes.sort_by_key(|outcome| std::cmp::Reverse(outcome.requests));
        let by_reason = |reason: Reason| self.stats.by_reason[reason as usize];
        let requests: u64 = self.stats.by_reason.iter().sum();
        let count =
            |holds: &dyn Fn(&Purchase) -> bool| self.purchases.iter().filter(|p| holds(p)).count() as u64;
        let accepted = count(&|purchase| purchase.order().is_some());
        let unknown = count(&|purchase| purchase.is_unknown());
        let unsent = count(&|purchase| purchase.code() == Code::UNSENT);
        let sent_in_time = share(self.sent_in_time, self.arrivals);
        let reasons = selfcheck::verdict(&self.usage, sent_in_time, &self.lag_us, scenario.max_lag_ms);
        // n arrivals span n - 1 intervals; the last one's own interval belongs to it.
        let span_s = (self.last_sent_ns as f64 / 1e9 + 1.0 / scenario.rate).max(1e-9);
        let cpu_s: f64 = self.usage.iter().map(|usage| usage.cpu_s).sum();
        Report {
            schema: SCHEMA,
            schema_version: SCHEMA_VERSION,
            result: Ending::Pass,
            exit_code: 0,
            notes: Vec::new(),
            started_at: started_at.to_string(),
            interrupted,
            environment: Environment::here(),
            offered: Offered {
                rate_asked: scenario.rate,
                rate_achieved: self.sent as f64 / span_s,
                arrivals: self.arrivals,
                arrivals_sent: self.sent,
                unsent: self.arrivals - self.sent,
                requests,
                duplicates: by_reason(Reason::Duplicate),
                second_purchases: by_reason(Reason::Second),
                retries: by_reason(Reason::Retry),
                retries_skipped: self.retries_skipped,
            },
            outcomes,
            latency_us: Latency::of(&total),
            accepted_after_us: Latency::of(&self.stats.accepted_after_us),
            purchases: Purchases {
                total: self.purchases.len() as u64,
                accepted,
                refused: self.purchases.len() as u64 - accepted - unknown - unsent,
                unknown,
            },
            generator: Generator {
                valid: reasons.is_empty(),
                reasons,
                lag_us: Latency::of(&self.lag_us),
                sent_in_time,
                cpu_us_per_request: if requests == 0 { 0.0 } else { cpu_s * 1e6 / requests as f64 },
                workers: self
                    .usage
                    .iter()
                    .map(|usage| WorkerReport { usage: *usage, busy: usage.busy() })
                    .collect(),
                connections_opened: self.connected,
                connections_peak: self.connections_peak,
                connect_errors: self.connect_errors,
            },
            books: None,
            intervals,
            scenario,
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 1.0 } else { part as f64 / whole as f64 }
}
