//! `seckill dead-letter …`: what could not be read and was set aside.

use clap::Subcommand;
use serde_json::Value;

use super::client::{AdminClient, Call, Effect, ServiceArgs};
use super::exit::{Exit, Outcome};
use super::output::{Format, aligned, cell, print, print_json, print_object};

/// `seckill dead-letter …`
#[derive(Debug, Subcommand)]
pub(super) enum DeadLetterCommand {
    /// List what was set aside in this center, newest first
    List {
        #[command(flatten)]
        service: ServiceArgs,
        /// Rows at most
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// Read everything that was set aside again with the running release, and store the orders
    ///
    /// May be repeated: an order that is stored stays as it is. Exits with 1 if something still cannot be read.
    Replay {
        #[command(flatten)]
        service: ServiceArgs,
    },
}

/// Runs `seckill dead-letter …`.
pub(super) async fn run(command: DeadLetterCommand, format: Format) -> Outcome {
    match command {
        DeadLetterCommand::List { service, limit } => {
            let call = Call::get(format!("/admin/v1/dead-letters?limit={limit}"));
            let found = AdminClient::new(&service)?.call(&call).await?.json()?;
            match format {
                Format::Json => print_json(&found),
                Format::Text => print(&table(&found, "dead_letters", &["origin", "reason", "raw"])),
            }
            Ok(Exit::Done)
        }
        DeadLetterCommand::Replay { service } => {
            let call = Call::post("/admin/v1/dead-letters/replay", Effect::Idempotent);
            let replay = AdminClient::new(&service)?.call(&call).await?.json()?;
            match format {
                Format::Json => print_json(&replay),
                Format::Text => {
                    let mut counts = replay.clone();
                    if let Some(counts) = counts.as_object_mut() {
                        counts.remove("unreadable");
                    }
                    print_object(format, &counts);
                    print(&table(&replay, "unreadable", &["origin", "reason"]));
                }
            }
            let left =
                replay.get("unreadable").and_then(Value::as_array).is_some_and(|left| !left.is_empty());
            Ok(if left { Exit::Error } else { Exit::Done })
        }
    }
}

fn table(found: &Value, name: &str, columns: &[&str]) -> String {
    let rows = found.get(name).and_then(Value::as_array).into_iter().flatten();
    let rows: Vec<Vec<String>> = rows
        .map(|row| columns.iter().map(|column| row.get(column).map(cell).unwrap_or_default()).collect())
        .collect();
    if rows.is_empty() { String::new() } else { aligned(columns, rows) }
}
