//! The options of `run`: over the scenario's file, which is over the defaults.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use seckill_domain::SaleId;

use super::output::OutputArgs;
use crate::scenario::{Admin, Bundled, Scenario, ScenarioFile, parse_duration, random_seed};
use crate::threshold::Threshold;

const PUBLIC_DEFAULT: &str = "http://127.0.0.1:8080";
const ADMIN_DEFAULT: &str = "http://127.0.0.1:8081";

#[derive(Args)]
pub(super) struct RunArgs {
    /// One of the bundled scenarios (see `scenarios`), or a file; without one: --sale, --rate and --duration
    #[arg(value_name = "SCENARIO")]
    scenario: Option<String>,
    /// Public listener of the service; repeat for several [default with --data-dir: http://127.0.0.1:8080]
    #[arg(long, value_name = "URL")]
    target: Vec<String>,
    /// Admin listener, for the books [default with --data-dir: http://127.0.0.1:8081]
    #[arg(long, value_name = "URL", env = "SECKILL_ADMIN_URL")]
    admin: Option<String>,
    /// Data folder of `seckill up`: the secrets and tokens are in it, and the processes that faults are about
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// HS256 key of the user tokens: the file's bytes, one newline at the end aside
    #[arg(long, value_name = "FILE", required_unless_present = "data_dir")]
    token_secret_file: Option<PathBuf>,
    /// Admin token, for the books
    #[arg(long, value_name = "FILE", env = "SECKILL_ADMIN_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Payments token, for scenarios in which somebody pays
    #[arg(long, value_name = "FILE")]
    payments_token_file: Option<PathBuf>,
    /// The sale
    #[arg(long, value_name = "ID")]
    sale: Option<String>,
    /// Buyers arriving per second; duplicates, second purchases and retries come on top
    #[arg(long, value_name = "N")]
    rate: Option<f64>,
    /// For how long they arrive: 10s, 1500ms, 2m, or seconds
    #[arg(long, value_name = "S", value_parser = parse_duration)]
    duration: Option<Duration>,
    /// Keep the first arrivals, for this long, out of the figures (not of the books)
    #[arg(long, value_name = "S", value_parser = parse_duration)]
    warmup: Option<Duration>,
    /// Everybody at the same instant: this many buyers at t = 0, over connections that are already open
    #[arg(long, value_name = "N", conflicts_with = "rate")]
    herd: Option<u64>,
    /// Different buyers; if more arrive, they come round again with new keys [default: one per arrival, at most 1,000,000]
    #[arg(long, value_name = "N")]
    buyers: Option<u32>,
    /// Units of each purchase
    #[arg(long, value_name = "N")]
    quantity: Option<u32>,
    /// Share of arrivals that click twice: same user, same key, at once or up to 100 ms later
    #[arg(long, value_name = "SHARE")]
    duplicates: Option<f64>,
    /// Share of arrivals that buy again within 500 ms: same user, new key
    #[arg(long, value_name = "SHARE")]
    second_purchases: Option<f64>,
    /// Requests per purchase while the load runs, retries of retryable and unknown answers included
    #[arg(long, value_name = "N")]
    max_attempts: Option<u16>,
    /// Retry after a short backoff, whatever Retry-After asks for
    #[arg(long)]
    ignore_retry_after: bool,
    /// Connections, one request in flight on each; a request that finds all busy waits, and its latency grows
    #[arg(long, value_name = "N")]
    connections: Option<u32>,
    /// Open all connections before the first arrival
    #[arg(long)]
    warm_connections: bool,
    /// Threads of each process that send [default: half of the cores]
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// Processes that send
    #[arg(long, value_name = "N")]
    processes: Option<u32>,
    /// How long an answer may take before its outcome counts as unknown
    #[arg(long, value_name = "MS")]
    timeout_ms: Option<u64>,
    /// How long resolving unknowns, waiting for stored orders and the final audit may take together
    #[arg(long, value_name = "S", value_parser = parse_duration)]
    drain_timeout: Option<Duration>,
    /// Send an X-Forwarded-For of each buyer's own; bots share one. The target has to trust this machine as a proxy
    #[arg(long)]
    forwarded_for: bool,
    /// Seed of buyers, keys and choices, to repeat a run [default: random, printed]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// What the uids begin with [default: four characters from the seed]
    #[arg(long, value_name = "TEXT")]
    uid_prefix: Option<String>,
    /// kid in the header of the user tokens [default: none]
    #[arg(long, value_name = "ID")]
    kid: Option<String>,
    /// The run is invalid if the generator notices arrivals later than this (p99)
    #[arg(long, value_name = "MS")]
    max_lag_ms: Option<u64>,
    /// What has to hold, for example 'p99 < 50ms' or 'failed == 0'; repeat for several; on top of the scenario's
    #[arg(long, value_name = "THRESHOLD")]
    threshold: Vec<Threshold>,
    /// Others buy from the sale too: the ledger may hold more than this run accepted
    #[arg(long)]
    shared_sale: bool,
    /// Load only: needs no admin listener, checks nothing afterwards
    #[arg(long)]
    no_books: bool,
    /// Keep the record of every purchase in this folder [default: a temporary one, deleted at the end]
    #[arg(long, value_name = "DIR")]
    ledger: Option<PathBuf>,
    /// No progress on stderr
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Plain lines on stderr, on a terminal too
    #[arg(long)]
    pub(super) plain: bool,
    #[command(flatten)]
    pub(super) output: OutputArgs,
}

impl RunArgs {
    pub(super) fn scenario(&self) -> Result<Scenario, String> {
        let mut scenario = Scenario { seed: self.seed.unwrap_or_else(random_seed), ..Scenario::default() };
        self.place(&mut scenario)?;
        let has_buyers = match &self.scenario {
            Some(name) => {
                self.file(name)?.apply(&mut scenario).map_err(|err| format!("{name}: {err}"))?;
                true
            }
            None => {
                let missing = [
                    ("--sale", self.sale.is_none()),
                    ("--rate", self.rate.is_none() && self.herd.is_none()),
                    ("--duration", self.duration.is_none() && self.herd.is_none()),
                ];
                if let Some((name, _)) = missing.iter().find(|(_, missing)| *missing) {
                    return Err(format!("{name} is needed, or the name of a scenario"));
                }
                false
            }
        };
        self.shape(&mut scenario)?;
        let load_given = self.rate.is_some() || self.duration.is_some() || self.herd.is_some();
        if let Some(buyers) = self.buyers {
            scenario.buyers = buyers;
        } else if load_given || !has_buyers {
            scenario.buyers = scenario.buyers_by_default();
        }
        scenario.validate().map_err(|err| err.to_string())?;
        Ok(scenario)
    }

    fn file(&self, name: &str) -> Result<ScenarioFile, String> {
        let parsed = match Bundled::named(name) {
            Some(bundled) if !Path::new(name).is_file() => bundled.parse(),
            _ => {
                let text = std::fs::read_to_string(name).map_err(|err| {
                    format!("{name} is neither a bundled scenario (see: seckill-loadtest scenarios) nor a file: {err}")
                })?;
                ScenarioFile::parse(&text)
            }
        };
        parsed.map_err(|err| format!("{name}: {err}"))
    }

    /// Where the target is, and what opens it.
    fn place(&self, scenario: &mut Scenario) -> Result<(), String> {
        let in_data_dir = |name: &str| self.data_dir.as_ref().map(|dir| dir.join(name));
        scenario.targets.clone_from(&self.target);
        if scenario.targets.is_empty() {
            if self.data_dir.is_none() {
                return Err("at least one --target is needed".to_owned());
            }
            scenario.targets = vec![PUBLIC_DEFAULT.to_owned()];
        }
        let secret = self.token_secret_file.clone().or_else(|| in_data_dir("dev-token-secret"));
        scenario.secret = read(&secret.ok_or("--token-secret-file is needed")?)?;
        if !self.no_books {
            let default = self.data_dir.as_ref().map(|_| ADMIN_DEFAULT.to_owned());
            let url =
                self.admin.clone().or(default).ok_or("--admin is needed for the books (or --no-books)")?;
            let file = self.token_file.clone().or_else(|| in_data_dir("admin-token"));
            let token = read_token(&file.ok_or("--token-file is needed for the books (or --no-books)")?)?;
            scenario.admin = Some(Admin { url, token });
        }
        let payments = in_data_dir("payments-token").filter(|file| file.exists());
        if let Some(file) = self.payments_token_file.clone().or(payments) {
            scenario.payments = Some(read_token(&file)?);
        }
        scenario.data_dir.clone_from(&self.data_dir);
        scenario.ledger_dir.clone_from(&self.ledger);
        scenario.kid.clone_from(&self.kid);
        scenario.uid_prefix.clone_from(&self.uid_prefix);
        Ok(())
    }

    /// What is sent.
    fn shape(&self, scenario: &mut Scenario) -> Result<(), String> {
        fn set<T: Clone>(into: &mut T, from: Option<&T>) {
            if let Some(from) = from {
                into.clone_from(from);
            }
        }
        if let Some(sale) = &self.sale {
            let before = scenario.sale.to_string();
            scenario.sale = SaleId::new(sale).map_err(|err| format!("--sale: {err}"))?;
            for persona in scenario.personas.iter_mut().filter(|persona| persona.sale == before) {
                persona.sale.clone_from(sale);
            }
            for offer in scenario.offers.iter_mut().filter(|offer| offer.sale_id == before) {
                offer.sale_id.clone_from(sale);
            }
        }
        if self.rate.is_some() || self.duration.is_some() || self.herd.is_some() {
            // A rate of one's own, for the time that the scenario's stages take unless another is given.
            let stages: Duration = scenario.stages.iter().map(|stage| stage.duration).sum();
            if !scenario.stages.is_empty() {
                scenario.rate = scenario.arrivals().mean_rate().max(1.0);
                scenario.duration = stages;
            }
            scenario.stages.clear();
        }
        set(&mut scenario.rate, self.rate.as_ref());
        set(&mut scenario.duration, self.duration.as_ref());
        if let Some(herd) = self.herd {
            scenario.stages = vec![crate::arrivals::Stage {
                burst: herd,
                from: 0.0,
                to: 0.0,
                duration: self.duration.unwrap_or(Duration::from_secs(5)),
            }];
            scenario.warm_connections = true;
        }
        set(&mut scenario.warmup, self.warmup.as_ref());
        set(&mut scenario.quantity, self.quantity.as_ref());
        set(&mut scenario.duplicates, self.duplicates.as_ref());
        set(&mut scenario.second_purchases, self.second_purchases.as_ref());
        set(&mut scenario.max_attempts, self.max_attempts.as_ref());
        set(&mut scenario.connections, self.connections.as_ref());
        set(&mut scenario.workers, self.workers.as_ref());
        set(&mut scenario.processes, self.processes.as_ref());
        set(&mut scenario.drain_timeout, self.drain_timeout.as_ref());
        set(&mut scenario.max_lag_ms, self.max_lag_ms.as_ref());
        set(&mut scenario.timeout, self.timeout_ms.map(Duration::from_millis).as_ref());
        if self.ignore_retry_after {
            scenario.honour_retry_after = false;
            for persona in &mut scenario.personas {
                persona.honour_retry_after = false;
            }
        }
        scenario.warm_connections |= self.warm_connections;
        scenario.forwarded_for |= self.forwarded_for;
        scenario.shared_sale |= self.shared_sale;
        scenario.thresholds.extend(self.threshold.iter().cloned());
        Ok(())
    }
}

/// A file's bytes without one newline at the end.
fn read(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = std::fs::read(path).map_err(|err| format!("cannot read {}: {err}", path.display()))?;
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    Ok(bytes)
}

fn read_token(path: &Path) -> Result<String, String> {
    let text = String::from_utf8(read(path)?).map_err(|_| format!("{}: not a token", path.display()))?;
    Ok(text.trim().to_owned())
}
