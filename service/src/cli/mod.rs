//! The command line.
//!
//! Exit codes: 0 done · 1 error, wrong usage included · 2 refused, nothing changed · 3 aborted and rolled back ·
//! 4 unknown, may still happen · 5 done, verification failed. `audit` has its own: 0 clean · 2 violation ·
//! 3 incomplete.

mod audit;
mod check;
mod client;
mod dead_letter;
mod exit;
mod follow;
mod ledger;
mod output;
mod sale;
mod server;
mod shift;
mod shift_text;
mod show;
mod token;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use exit::{Exit, Failure};
use output::Format;

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 error (wrong usage included), 2 refused and nothing changed, 3 aborted and \
rolled back, 4 unknown (it may have happened), 5 done but verification failed. audit: 0 clean, \
2 violation, 3 incomplete.

Start here:
  seckill up                                     everything on this machine; wait for `ready`
  seckill sale create phone-1 --quantity 100 --price 199900 --currency CNY
  seckill token issue --uid alice
  seckill audit";

/// A flash-sale service: decides once, without overselling, who gets the units.
#[derive(Debug, Parser)]
#[command(name = "seckill", version, after_help = EXIT_CODES)]
struct Cli {
    /// Form of what is printed
    #[arg(short, long, value_enum, global = true, default_value_t = Format::Text)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run everything on this machine: Redis, the service, its database
    ///
    /// Prints its addresses, where the tokens for this machine lie, and the line `ready`. SIGTERM ends it and what
    /// it started. Whatever is killed comes back at the next start, with nothing lost that was acknowledged.
    Up(server::UpArgs),
    /// Run the service of one center from a configuration
    Serve(server::ServeArgs),
    /// Check a configuration, or print the default one
    #[command(subcommand)]
    Config(check::ConfigCommand),
    /// Issue tokens
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Begin a ledger, or adopt one
    #[command(subcommand)]
    Ledger(ledger::LedgerCommand),
    /// Create, list and change sales
    #[command(subcommand)]
    Sale(sale::SaleCommand),
    /// Show the topology
    #[command(subcommand)]
    Topology(show::TopologyCommand),
    /// Show the master center, or move it to another one
    #[command(subcommand)]
    Master(show::MasterCommand),
    /// Look at shifts, or give the running one up
    #[command(subcommand)]
    Shift(shift::ShiftCommand),
    /// Move the home of shards to another center
    #[command(subcommand)]
    Shards(shift::ShardsCommand),
    /// Look at what could not be read and was set aside, and read it again
    #[command(subcommand)]
    DeadLetter(dead_letter::DeadLetterCommand),
    /// Compare ledger, outbox and order tables: 0 clean, 2 violation, 3 incomplete
    Audit(audit::AuditArgs),
}

/// Runs the command that the arguments name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; wrong usage must not look like `refused`, clap's own code is 2.
            let exit = if error.use_stderr() { Exit::Error } else { Exit::Done };
            let _ = error.print();
            return ExitCode::from(exit.code());
        }
    };
    let format = cli.output;
    let outcome = match cli.command {
        Command::Up(args) => server::up(args),
        Command::Serve(args) => server::serve(&args),
        Command::Config(command) => check::run(command, format),
        Command::Token(command) => token::run(command, format),
        command => client_runtime().and_then(|runtime| runtime.block_on(ask(command, format))),
    };
    match outcome {
        Ok(exit) => ExitCode::from(exit.code()),
        Err(failure) => {
            eprintln!("seckill: {}", failure.message);
            if format == Format::Json {
                output::print_json(&failure.json());
            }
            ExitCode::from(failure.exit.code())
        }
    }
}

/// The commands that talk to a running service.
async fn ask(command: Command, format: Format) -> exit::Outcome {
    match command {
        Command::Ledger(command) => ledger::run(command, format).await,
        Command::Sale(command) => sale::run(command, format).await,
        Command::Topology(command) => show::topology(command, format).await,
        Command::Master(command) => show::master(command, format).await,
        Command::Shift(command) => shift::run(command, format).await,
        Command::Shards(command) => shift::shards(command, format).await,
        Command::DeadLetter(command) => dead_letter::run(command, format).await,
        Command::Audit(args) => audit::run(args, format).await,
        Command::Up(_) | Command::Serve(_) | Command::Config(_) | Command::Token(_) => {
            unreachable!("these need no service")
        }
    }
}

fn client_runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::error(format!("cannot start: {error}")))
}
