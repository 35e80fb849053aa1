//! One run from beginning to end.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::books;
use crate::client::{self, Client, Target};
use crate::environment::{Environment, peak_rss_bytes};
use crate::generators::{Generators, LedgerFolder, resolve};
use crate::impact::impact;
use crate::ledger_file::Ledger;
use crate::observe::{Moment, Observer};
use crate::outcome::Codes;
use crate::part::Part;
use crate::plan::Plan;
use crate::preflight::{self, PREFLIGHT_TIMEOUT};
use crate::report::{
    CodeReport, Generator, Latency, Offered, Report, Result as Ending, SCHEMA, SCHEMA_VERSION, WorkerReport,
};
use crate::scenario::{Invalid, Scenario};
use crate::schedule::Reason;
use crate::selfcheck::{self, Usage};
use crate::series::Series;
use crate::stats::{Interval, Stats, add, histogram};
use crate::timeline::{Event, Timeline};

/// Between two looks at what is left of the sale.
const STOCK_PAUSE: Duration = Duration::from_millis(500);
/// Descriptors beside the connections.
const DESCRIPTORS_SPARE: u64 = 256;

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
    /// The generator's own trouble: no threads, no epoll, no room for the record.
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

/// Runs a scenario. `observer` is told about every second; when `interrupt` is done the arrivals end, and the
/// books are checked for what was sent until then.
pub async fn run(
    scenario: &Scenario,
    mut observer: impl Observer,
    interrupt: impl Future<Output = ()>,
) -> Result<Report, Error> {
    scenario.validate()?;
    raise_descriptor_limit(scenario)?;
    let environment = Environment::here();
    // The targets may lie behind the scenario's links, for the books too.
    let timeline = Timeline::new(scenario).await?;
    let _links = timeline.links();
    let targets = resolve(scenario).await?;
    let found = preflight::look(scenario, &targets).await?;
    let plan = Arc::new(plan(scenario, &targets, &found.coupons, &mut observer).await?);
    if found.opening.is_some() {
        preflight::check_token(&plan, &targets).await?;
    }
    let folder = LedgerFolder::create(scenario.ledger_dir.as_deref())?;
    let mut codes = Codes::default();
    let mut generators = Generators::start(scenario, &plan, &found.coupons, &codes, folder.path()).await?;
    let start = generators.open().await?;
    let started_at = jiff::Timestamp::now();
    let stock = found.opening.as_ref().map(|_| Stock::watch(&targets[0], scenario));
    let mut course = Course::new(&plan, stock, timeline.is_empty());
    course.follow(timeline, start, &mut generators, &mut observer, interrupt).await;

    let mut all = generators.finish(&mut codes).await?;
    let violations = std::mem::take(&mut all.violations);
    let mut report = assemble(scenario, &plan, &codes, &all, environment);
    report.started_at = started_at.to_string();
    report.interrupted = course.interrupted;
    report.generator.stock_reads = course.stock_reads();
    (report.events, report.intervals) = course.finish(all.finished_ns / 1_000_000);
    if let Some(opening) = found.opening {
        let ledger = Ledger::open(&all.ledgers)?;
        let mut progress = |text: &str| observer.line(text);
        let books =
            books::close(opening, &plan, &targets, &codes, &ledger, violations, &mut progress).await?;
        report.books = Some(books);
    } else if violations.count() > 0 {
        report.notes.push(format!("{} contradictions between answers", violations.count()));
    }
    report.generator.peak_rss_bytes = peak_rss_bytes();
    report.conclude();
    Ok(report)
}

/// Connections are descriptors: as many as the scenario wants, if the hard limit allows.
fn raise_descriptor_limit(scenario: &Scenario) -> Result<(), Error> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let wanted = u64::from(scenario.connections) + DESCRIPTORS_SPARE;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    if limit.maximum.is_some_and(|maximum| maximum < wanted) {
        return Err(Error::Mismatch(format!(
            "{} connections need more descriptors than the limit (ulimit -Hn): {}",
            scenario.connections,
            limit.maximum.unwrap_or_default()
        )));
    }
    let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).map_err(|err| Error::Generator(err.into()))
}

async fn plan(
    scenario: &Scenario,
    targets: &[Target],
    coupons: &[(String, crate::plan::CouponTerms)],
    observer: &mut impl Observer,
) -> Result<Plan, Error> {
    let count = u64::from(scenario.buyers).min(scenario.arrivals().total());
    let (sender, mut signed) = mpsc::channel(16);
    let (scenario, targets, coupons) = (scenario.clone(), targets.to_owned(), coupons.to_owned());
    let signing = tokio::task::spawn_blocking(move || {
        Plan::new(&scenario, &targets, &coupons, |done| {
            // A line that nobody reads in time is left out.
            let _ = sender.try_send(done);
        })
    });
    while let Some(done) = signed.recv().await {
        observer.line(&format!("signed {done} of {count} tokens"));
    }
    Ok(signing.await.map_err(io::Error::other)?)
}

/// What is left of the scenario's sale, asked beside the load: two reads a second.
struct Stock {
    left: Arc<AtomicI64>,
    reads: Arc<AtomicU64>,
    watching: tokio::task::AbortHandle,
}

const STOCK_UNKNOWN: i64 = i64::MIN;

impl Stock {
    fn watch(target: &Target, scenario: &Scenario) -> Stock {
        let (left, reads) = (Arc::new(AtomicI64::new(STOCK_UNKNOWN)), Arc::new(AtomicU64::new(0)));
        let (seen, counted) = (Arc::clone(&left), Arc::clone(&reads));
        let mut client = Client::new(target.clone(), PREFLIGHT_TIMEOUT);
        let path = format!("/v1/sales/{}", scenario.sale);
        let watching = tokio::spawn(async move {
            loop {
                counted.fetch_add(1, Ordering::Relaxed);
                let sale = books::get_json::<serde_json::Value>(&mut client, &path, None).await;
                let remaining = sale.ok().and_then(|sale| sale["remaining"].as_i64());
                seen.store(remaining.unwrap_or(STOCK_UNKNOWN), Ordering::Relaxed);
                tokio::time::sleep(STOCK_PAUSE).await;
            }
        });
        Stock { left, reads, watching: watching.abort_handle() }
    }

    fn left(&self) -> Option<i64> {
        Some(self.left.load(Ordering::Relaxed)).filter(|left| *left != STOCK_UNKNOWN)
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

/// The run's course: seconds put together from all generators, events, the stock.
struct Course<'a> {
    plan: &'a Plan,
    stock: Option<Stock>,
    series: Series,
    open: BTreeMap<u64, (Interval, u32)>,
    events: Vec<Event>,
    interrupted: bool,
}

impl<'a> Course<'a> {
    fn new(plan: &'a Plan, stock: Option<Stock>, quiet: bool) -> Course<'a> {
        Course {
            plan,
            stock,
            series: Series::new(!quiet),
            open: BTreeMap::new(),
            events: Vec::new(),
            interrupted: false,
        }
    }

    /// Until the last generator has ended.
    async fn follow(
        &mut self,
        timeline: Timeline,
        start: Instant,
        generators: &mut Generators,
        observer: &mut impl Observer,
        interrupt: impl Future<Output = ()>,
    ) {
        let mut interrupt = pin!(interrupt);
        let (told, mut happened) = mpsc::unbounded_channel();
        let mut timeline = pin!(timeline.follow(start, told));
        loop {
            tokio::select! {
                next = generators.next() => match next {
                    Some(interval) => self.enter(interval, observer),
                    None => break,
                },
                Some(event) = happened.recv() => self.note(event, observer),
                () = &mut timeline => {}
                () = &mut interrupt, if !self.interrupted => {
                    self.interrupted = true;
                    generators.interrupt();
                    observer.line("interrupted: no more arrivals, checking the books for what was sent");
                }
            }
        }
        while let Ok(event) = happened.try_recv() {
            self.note(event, observer);
        }
        while let Some((_, (interval, _))) = self.open.pop_first() {
            self.close(&interval, observer);
        }
    }

    fn note(&mut self, event: Event, observer: &mut impl Observer) {
        let how = if event.ok { "done" } else { "FAILED" };
        observer.line(&format!(
            "at {:.1} s: {} {how} in {} ms",
            event.at_ms as f64 / 1000.0,
            event.name,
            event.took_ms
        ));
        self.events.push(event);
    }

    /// A second is closed when everybody has told of it, or somebody of the second after the next.
    fn enter(&mut self, interval: Interval, observer: &mut impl Observer) {
        let second = interval.second;
        match self.open.get_mut(&second) {
            Some((sum, count)) => {
                sum.merge(&interval);
                *count += 1;
            }
            None => {
                self.open.insert(second, (interval, 1));
            }
        }
        while let Some(first) = self.open.first_entry() {
            let whole = first.get().1 >= self.plan.workers;
            if !whole && *first.key() + 2 > second {
                break;
            }
            let interval = first.remove().0;
            self.close(&interval, observer);
        }
    }

    fn close(&mut self, interval: &Interval, observer: &mut impl Observer) {
        let stock = self.stock.as_ref().and_then(Stock::left);
        observer.second(&Moment {
            interval,
            rate_asked: self.plan.arrivals.rate_at(interval.second * 1_000_000_000 + 500_000_000),
            stock,
            seconds: self.plan.arrivals.end_ns() as f64 / 1e9,
        });
        self.series.add(interval, stock);
    }

    fn stock_reads(&self) -> u64 {
        self.stock.as_ref().map_or(0, |stock| stock.reads.load(Ordering::Relaxed))
    }

    /// Events with what they did, and the stretches of time.
    fn finish(self, finished_ms: u64) -> (Vec<Event>, Vec<crate::report::IntervalReport>) {
        let mut events = self.events;
        let end_ms = (self.plan.arrivals.end_ns() / 1_000_000).min(finished_ms);
        let pulses = self.series.pulses();
        let times: Vec<u64> = events.iter().map(|event| event.at_ms).collect();
        for (at, event) in events.iter_mut().enumerate() {
            let until = times.get(at + 1).copied().unwrap_or(end_ms).max(event.at_ms);
            event.impact = (!pulses.is_empty()).then(|| impact(pulses, event.at_ms, until, end_ms));
        }
        (events, self.series.into_reports())
    }
}

fn outcomes(stats: &Stats, codes: &Codes) -> Vec<CodeReport> {
    let mut outcomes: Vec<_> = stats
        .codes()
        .map(|(op, code, stats)| {
            let report = CodeReport {
                operation: op.name().to_owned(),
                code: codes.name(code),
                effect: stats.effect.to_owned(),
                failed: stats.failed,
                requests: stats.latency_us.len(),
                latency_us: Latency::of(&stats.latency_us),
            };
            (op, report)
        })
        .collect();
    outcomes.sort_by_key(|(op, outcome)| (*op, std::cmp::Reverse(outcome.requests)));
    outcomes.into_iter().map(|(_, outcome)| outcome).collect()
}

fn assemble(scenario: &Scenario, plan: &Plan, codes: &Codes, all: &Part, environment: Environment) -> Report {
    let mut scenario = scenario.clone();
    scenario.uid_prefix = Some(plan.buyers.prefix().to_owned());
    let mut total = histogram(3);
    for (_, _, stats) in all.stats.codes().filter(|(.., stats)| stats.effect != "unsent") {
        add(&mut total, &stats.latency_us);
    }
    let by_reason = |reason: Reason| all.stats.by_reason[reason as usize];
    let requests = all.stats.requests();
    let sent_in_time = share(all.sent_in_time, all.arrivals);
    let reasons = selfcheck::verdict(&all.usage, sent_in_time, &all.lag_us, scenario.max_lag_ms);
    let rate_asked = plan.arrivals.mean_rate();
    // n arrivals span n - 1 intervals; the last one's own interval belongs to it.
    let span_s = (all.last_sent_ns as f64 / 1e9 + 1.0 / rate_asked.max(1e-9)).max(1e-9);
    let span_s = if all.arrivals == plan.arrivals.total() {
        span_s.max((plan.arrivals.end_ns() as f64 / 1e9).min(all.arrivals as f64 / rate_asked.max(1e-9)))
    } else {
        span_s
    };
    let cpu_s: f64 = all.usage.iter().map(|usage| usage.cpu_s).sum();
    let all_requests = requests + all.warmup.requests();
    Report {
        schema: SCHEMA.into(),
        schema_version: SCHEMA_VERSION,
        result: Ending::Pass,
        exit_code: 0,
        notes: Vec::new(),
        started_at: String::new(),
        interrupted: false,
        environment,
        offered: Offered {
            rate_asked,
            rate_achieved: all.sent as f64 / span_s,
            arrivals: all.arrivals,
            arrivals_sent: all.sent,
            unsent: all.arrivals - all.sent,
            requests,
            duplicates: by_reason(Reason::Duplicate),
            second_purchases: by_reason(Reason::Second),
            retries: by_reason(Reason::Retry),
            journey: by_reason(Reason::Journey),
            retries_skipped: all.retries_skipped,
            skew_us: Latency::of(&all.skew_us),
        },
        outcomes: outcomes(&all.stats, codes),
        warmup: outcomes(&all.warmup, codes),
        latency_us: Latency::of(&total),
        accepted_after_us: Latency::of(&all.stats.accepted_after_us),
        purchases: all.purchases,
        generator: Generator {
            valid: reasons.is_empty(),
            reasons,
            lag_us: Latency::of(&all.lag_us),
            sent_in_time,
            cpu_us_per_request: if all_requests == 0 { 0.0 } else { cpu_s * 1e6 / all_requests as f64 },
            workers: all
                .usage
                .iter()
                .map(|usage: &Usage| WorkerReport { usage: *usage, busy: usage.busy() })
                .collect(),
            processes: scenario.processes,
            connections_opened: all.connections.opened,
            connections_peak: all.connections.peak as u64,
            connect_errors: all.connections.errors,
            peak_rss_bytes: 0,
            stock_reads: 0,
        },
        books: None,
        events: Vec::new(),
        thresholds: Vec::new(),
        intervals: Vec::new(),
        scenario,
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 1.0 } else { part as f64 / whole as f64 }
}
