//! The command line.

use std::ffi::OsString;
use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use seckill_domain::SaleId;

use crate::report::Report;
use crate::run::{self, run};
use crate::scenario::{self, Admin, Scenario, parse_duration};

/// Wrong arguments (EX_USAGE): 2 already means that the books do not balance.
const USAGE: u8 = 64;

/// Ended by a second Ctrl-C, as shells report SIGINT.
const INTERRUPTED: i32 = 130;

/// Open-loop load for a seckill sale. Checks the books when the load is over.
#[derive(Parser)]
#[command(name = "seckill-loadtest", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0   pass: the books balance and the generator kept up
  2   the books do not balance; the report names orders and users
  3   invalid: the generator itself could not keep the rate
  4   the target could not be reached, before or after the load
  64  wrong arguments, or a sale, secret or token the target does not know
  70  the generator failed
(1 is kept for thresholds.)";

#[derive(Subcommand)]
enum Command {
    /// Sends buyers at a sale at a constant rate, then checks that every promise was kept
    #[command(after_help = EXIT_CODES)]
    Run(Box<RunArgs>),
}

#[derive(Args)]
struct RunArgs {
    /// Public listener of the service; repeat for several
    #[arg(long, value_name = "URL", required = true)]
    target: Vec<String>,
    /// Admin listener, for the books
    #[arg(long, value_name = "URL", env = "SECKILL_ADMIN_URL", required_unless_present = "no_books")]
    admin: Option<String>,
    /// HS256 key of the user tokens: the file's bytes, one newline at the end aside
    #[arg(long, value_name = "FILE")]
    token_secret_file: PathBuf,
    /// Admin token, for the books
    #[arg(long, value_name = "FILE", env = "SECKILL_ADMIN_TOKEN_FILE", required_unless_present = "no_books")]
    token_file: Option<PathBuf>,
    /// The sale
    #[arg(long, value_name = "ID")]
    sale: String,
    /// Buyers arriving per second; duplicates, second purchases and retries come on top
    #[arg(long, value_name = "N")]
    rate: f64,
    /// For how long they arrive: 10s, 1500ms, 2m, or seconds
    #[arg(long, value_name = "S", value_parser = parse_duration)]
    duration: Duration,
    /// Different buyers; if more arrive, they come round again with new keys [default: one per arrival]
    #[arg(long, value_name = "N")]
    buyers: Option<u32>,
    /// Form of the result on stdout
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Units of each purchase
    #[arg(long, value_name = "N", default_value_t = 1)]
    quantity: u32,
    /// Share of arrivals that click twice: same user, same key, at once or up to 100 ms later
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    duplicates: f64,
    /// Share of arrivals that buy again within 500 ms: same user, new key
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    second_purchases: f64,
    /// Requests per purchase while the load runs, retries of retryable and unknown answers included
    #[arg(long, value_name = "N", default_value_t = 5)]
    max_attempts: u16,
    /// Retry after a short backoff, whatever Retry-After asks for
    #[arg(long)]
    ignore_retry_after: bool,
    /// Connections, one request in flight on each; a request that finds all busy waits, and its latency grows
    #[arg(long, value_name = "N", default_value_t = 256)]
    connections: u32,
    /// Threads that send [default: half of the cores]
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
    /// How long an answer may take before its outcome counts as unknown
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    timeout_ms: u64,
    /// How long resolving unknowns, waiting for stored orders and the final audit may take together
    #[arg(long, value_name = "S", default_value = "30s", value_parser = parse_duration)]
    drain_timeout: Duration,
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
    #[arg(long, value_name = "MS", default_value_t = 50)]
    max_lag_ms: u64,
    /// Others buy from the sale too: the ledger may hold more than this run accepted
    #[arg(long)]
    shared_sale: bool,
    /// Load only: needs no admin listener, checks nothing afterwards
    #[arg(long)]
    no_books: bool,
    /// No progress on stderr
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// An aligned table
    Text,
    /// One JSON object (loadtest/README.md)
    Json,
}

/// Runs the command line and returns the exit code.
pub async fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let Cli { command: Command::Run(args) } = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(err) => {
            // Nothing is left to do if even the message cannot be printed.
            let _ = err.print();
            return match err.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => 0,
                _ => USAGE,
            };
        }
    };
    let scenario = match args.scenario() {
        Ok(scenario) => scenario,
        Err(message) => {
            eprintln!("error: {message}");
            return USAGE;
        }
    };
    if !args.quiet {
        eprintln!("seed {}", scenario.seed);
    }
    let progress = |line: &str| {
        if !args.quiet {
            eprintln!("{line}");
        }
    };
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        // The first Ctrl-C still checks the books, which takes its time; the second does not wait for them.
        tokio::spawn(async {
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(INTERRUPTED);
            }
        });
    };
    match run(&scenario, progress, interrupt).await {
        Ok(report) => match args.print(&report) {
            Ok(()) => report.exit_code,
            Err(err) => {
                eprintln!("error: cannot write the result: {err}");
                run::Error::Generator(err).exit_code()
            }
        },
        Err(err) => {
            eprintln!("error: {err}");
            err.exit_code()
        }
    }
}

impl RunArgs {
    fn scenario(&self) -> Result<Scenario, String> {
        let sale = SaleId::new(&self.sale).map_err(|err| format!("--sale: {err}"))?;
        let mut scenario = Scenario::new("", &read(&self.token_secret_file)?, sale);
        scenario.targets.clone_from(&self.target);
        if let (false, Some(url), Some(file)) = (self.no_books, &self.admin, &self.token_file) {
            let token = String::from_utf8(read(file)?)
                .map_err(|_| format!("{}: not a token", file.display()))?
                .trim()
                .to_owned();
            scenario.admin = Some(Admin { url: url.clone(), token });
        }
        scenario.kid.clone_from(&self.kid);
        scenario.rate = self.rate;
        scenario.duration = self.duration;
        let one_each = u32::try_from(scenario.arrivals()).unwrap_or(u32::MAX).max(1);
        scenario.buyers = self.buyers.unwrap_or(one_each);
        scenario.quantity = self.quantity;
        scenario.connections = self.connections;
        scenario.workers = self.workers.unwrap_or_else(scenario::default_workers);
        scenario.timeout = Duration::from_millis(self.timeout_ms);
        scenario.duplicates = self.duplicates;
        scenario.second_purchases = self.second_purchases;
        scenario.max_attempts = self.max_attempts;
        scenario.honour_retry_after = !self.ignore_retry_after;
        scenario.seed = self.seed.unwrap_or(scenario.seed);
        scenario.uid_prefix.clone_from(&self.uid_prefix);
        scenario.drain_timeout = self.drain_timeout;
        scenario.max_lag_ms = self.max_lag_ms;
        scenario.shared_sale = self.shared_sale;
        scenario.validate().map_err(|err| err.to_string())?;
        Ok(scenario)
    }

    fn print(&self, report: &Report) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        match self.output {
            Output::Text => write!(out, "{report}"),
            Output::Json if out.is_terminal() => writeln!(out, "{}", serde_json::to_string_pretty(report)?),
            Output::Json => writeln!(out, "{}", serde_json::to_string(report)?),
        }
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
