//! `make services`: starts, shows and ends the servers that seckill stands on.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use seckill_parts::services::{self, Services, Up};
use tokio::signal::unix::{SignalKind, signal};

/// Starts, shows and ends the servers that seckill stands on: Kafka, MariaDB and Redis for two centers, etcd.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where they live. Default: target/services of the workspace
    #[arg(long, global = true, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start what does not run, wait until everything answers, print the addresses
    Up,
    /// End exactly these servers
    Down {
        /// Remove their data too
        #[arg(long)]
        purge: bool,
    },
    /// Print the addresses; ends with 0 if everything runs, with 1 otherwise
    Status,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let dir = arguments.dir.unwrap_or_else(services::default_folder);
    match arguments.command {
        Command::Up => {
            let (mut interrupt, mut terminate) =
                (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
            let up = tokio::select! {
                up = services::up(&dir) => up?,
                _ = interrupt.recv() => return abandon(&dir).await,
                _ = terminate.recv() => return abandon(&dir).await,
            };
            match up {
                Up::Started(services) => print(&services, &dir),
                Up::Running(services) => {
                    say("the services run already");
                    print(&services, &dir);
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Down { purge } => {
            let ended = services::down(&dir, purge).await?;
            say(&format!("ended {ended} processes"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Status => {
            for (name, process, alive) in services::processes(&dir)? {
                let is = if alive { "runs" } else { "is gone" };
                say(&format!("{name}: process {} {is}", process.pid));
            }
            match services::running(&dir) {
                Some(services) => {
                    print(&services, &dir);
                    Ok(ExitCode::SUCCESS)
                }
                None => {
                    say("the services do not run");
                    Ok(ExitCode::FAILURE)
                }
            }
        }
    }
}

/// Interrupted while they start: nothing stays.
async fn abandon(dir: &std::path::Path) -> anyhow::Result<ExitCode> {
    services::down(dir, false).await?;
    Ok(ExitCode::from(130))
}

fn print(services: &Services, dir: &std::path::Path) {
    for (name, value) in services.variables() {
        say(&format!("{name}={value}"));
    }
    say(&format!("for a shell: . {}", dir.join("env").display()));
}

/// Prints a line. A reader who went away (`| head`) does not matter: the exit code says what happened.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
