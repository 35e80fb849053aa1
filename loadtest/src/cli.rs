//! The command line.

mod output;
mod run_args;

use std::ffi::OsString;
use std::io::Write as _;
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};

use crate::compare::compare;
use crate::live::Watch;
use crate::merge::merge;
use crate::report::Report;
use crate::run::{self, run};
use crate::scenario::{BUNDLED, Bundled};
use output::OutputArgs;
use run_args::RunArgs;

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
  0   pass: the books balance, the generator kept up, every threshold holds
  1   a threshold does not hold
  2   the books do not balance; the report names orders and users
  3   invalid: the generator itself could not keep the rate
  4   the target could not be reached, before or after the load
  64  wrong arguments, or a sale, secret or token the target does not know
  70  the generator failed";

#[derive(Subcommand)]
enum Command {
    /// Sends buyers at a sale, then checks that every promise was kept
    #[command(after_help = EXIT_CODES)]
    Run(Box<RunArgs>),
    /// List the scenarios that come with the program, or show one
    Scenarios {
        /// The scenario whose file is shown
        name: Option<String>,
    },
    /// Add up the results (JSON) of runs that went on at the same time
    Merge(MergeArgs),
    /// Compare two results (JSON)
    Compare {
        /// The earlier one
        before: PathBuf,
        /// The later one
        after: PathBuf,
    },
    /// Show a result (JSON) again, as text, HTML or JUnit
    Show {
        /// The result
        result: PathBuf,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Send for another process of this program
    #[command(hide = true)]
    Generate,
}

#[derive(Args)]
struct MergeArgs {
    /// The results
    #[arg(required = true, num_args = 2..)]
    results: Vec<PathBuf>,
    /// What has to hold for all of it, for example 'p99 < 50ms'; repeat for several [default: the first result's]
    #[arg(long, value_name = "THRESHOLD")]
    threshold: Vec<crate::threshold::Threshold>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the command line and returns the exit code.
pub async fn main(args: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(args) {
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
    match cli.command {
        Command::Run(args) => run_scenario(&args).await,
        Command::Scenarios { name } => scenarios(name.as_deref()),
        Command::Merge(args) => {
            let reports = args.results.iter().map(output::read_report).collect::<Result<Vec<_>, _>>();
            finish(reports.and_then(|reports| merge(reports, args.threshold)), &args.output)
        }
        Command::Compare { before, after } => {
            let both = output::read_report(&before).and_then(|a| Ok((a, output::read_report(&after)?)));
            match both {
                Ok((before, after)) => print(&compare(&before, &after)),
                Err(message) => usage(&message),
            }
        }
        Command::Show { result, output } => finish(output::read_report(&result), &output),
        Command::Generate => match crate::generators::serve_parent().await {
            Ok(()) => 0,
            Err(err) => run::Error::Generator(err).exit_code(),
        },
    }
}

async fn run_scenario(args: &RunArgs) -> u8 {
    let scenario = match args.scenario() {
        Ok(scenario) => scenario,
        Err(message) => return usage(&message),
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
    let watch = Watch::new(&scenario, args.quiet, args.plain);
    match run(&scenario, watch, interrupt).await {
        Ok(report) => finish(Ok(report), &args.output),
        Err(err) => {
            eprintln!("error: {err}");
            err.exit_code()
        }
    }
}

fn finish(report: Result<Report, String>, output: &OutputArgs) -> u8 {
    let report = match report {
        Ok(report) => report,
        Err(message) => return usage(&message),
    };
    match output.write(&report) {
        Ok(()) => report.exit_code,
        Err(err) => {
            eprintln!("error: cannot write the result: {err}");
            run::Error::Generator(err).exit_code()
        }
    }
}

fn scenarios(name: Option<&str>) -> u8 {
    let text = match name {
        Some(name) => match Bundled::named(name) {
            Some(bundled) => bundled.text.to_owned(),
            None => return usage(&format!("there is no scenario {name}; see: seckill-loadtest scenarios")),
        },
        None => BUNDLED
            .iter()
            .map(|bundled| {
                let about = bundled.parse().map_or_else(|err| err.to_string(), |file| file.about);
                format!("{:<10} {about}\n", bundled.name)
            })
            .collect(),
    };
    print(&text)
}

fn print(text: &str) -> u8 {
    // A reader that went away, as `head` does, is no failure.
    let _ = write!(std::io::stdout().lock(), "{text}");
    0
}

fn usage(message: &str) -> u8 {
    eprintln!("error: {message}");
    USAGE
}
