//! `make bench`: the budgets, every row against its baseline in the same run on the same machine.
//!
//! Ratios and CPU time per request, not absolute times: machines differ and are noisy. Servers run in processes
//! of their own, so that their CPU time is theirs alone; baselines and ours take turns, and the median of the
//! rounds counts.

mod centers_rows;
mod drain;
mod drain_rows;
mod herd;
mod http_rows;
mod lanes;
mod ledger_rows;
mod load;
mod orders_rows;
mod pair;
mod process;
mod purchases;
mod serve;
mod service;
mod shift_rows;
mod table;
mod two_services;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(about = "Checks the performance budgets. Exit code 1: a bar was not kept.")]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Only rows whose name contains this; `lanes` compares lanes without HTTP, against no bar.
    #[arg(long, default_value = "")]
    only: String,
    /// Requests of one round over HTTP.
    #[arg(long, default_value_t = 60_000)]
    requests: u32,
    /// Rounds of each row.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Orders that drain through Kafka.
    #[arg(long, default_value_t = 1_000_000)]
    orders: u64,
    /// Where the result is written for programs.
    #[arg(long, default_value = "target/bench.json")]
    output: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Be one of the servers that are compared (started by the bench itself).
    #[command(hide = true)]
    Serve {
        #[command(subcommand)]
        kind: serve::Kind,
    },
    /// Be the `seckill` binary (started by the bench itself).
    #[command(hide = true)]
    Seckill {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

/// How much is measured.
#[derive(Debug, Clone)]
pub(crate) struct Scope {
    /// Only rows whose name contains this.
    pub(crate) only: String,
    /// Requests of one round.
    pub(crate) requests: u32,
    /// Rounds of each row.
    pub(crate) rounds: u32,
    /// Orders that drain through Kafka.
    pub(crate) orders: u64,
}

impl Scope {
    /// Whether a row is asked for.
    pub(crate) fn wants(&self, row: &str) -> bool {
        row.contains(&self.only)
    }
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    if let Some(Command::Seckill { args }) = cli.command {
        return Ok(seckill::cli::main(std::iter::once("seckill".into()).chain(args)));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match cli.command {
        Some(Command::Serve { kind }) => {
            runtime.block_on(async {
                match kind {
                    serve::Kind::Bare { answer } => serve::bare(&answer).await,
                    serve::Kind::Service(args) => service::run(&args).await,
                    serve::Kind::Drain(args) => drain::run(&args).await,
                    serve::Kind::PerRequest { redis, fence, secret } => {
                        serve::per_request(&redis, &fence, &secret).await
                    }
                }
            })?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Command::Seckill { .. }) => unreachable!("it has a runtime of its own"),
        None => {
            let scope = Scope {
                only: cli.only,
                requests: cli.requests,
                rounds: cli.rounds.max(1),
                orders: cli.orders,
            };
            runtime.block_on(measure(&scope, &cli.output))
        }
    }
}

async fn measure(scope: &Scope, output: &std::path::Path) -> anyhow::Result<ExitCode> {
    if scope.only == lanes::LANES {
        lanes::measure(scope).await?;
        return Ok(ExitCode::SUCCESS);
    }
    table::print_head();
    let mut rows = http_rows::measure(scope).await?;
    rows.extend(ledger_rows::measure(scope).await?);
    rows.extend(centers_rows::measure(scope).await?);
    rows.extend(shift_rows::measure(scope).await?);
    rows.extend(orders_rows::measure(scope).await?);
    rows.extend(drain_rows::measure(scope).await?);
    table::write(output, &ledger_rows::redis_version().await, &rows)?;
    let failed = rows.iter().filter(|row| !row.passes()).count();
    println!("\n{} rows, {failed} below their bar; written to {}", rows.len(), output.display());
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
