//! `seckill topology show` and `seckill master …`.

use clap::Subcommand;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::client::{AdminClient, Call, ServiceArgs};
use super::exit::{Exit, Failure, Outcome};
use super::output::{Format, aligned, cell, print, print_json, print_object};
use super::shift::MasterShiftArgs;
use super::shift_text;
use crate::topology::Shift;

/// `seckill topology …`
#[derive(Debug, Subcommand)]
pub(super) enum TopologyCommand {
    /// Show the topology: master, epoch, centers, shards, limits, and the instances that are alive
    Show {
        #[command(flatten)]
        service: ServiceArgs,
    },
}

/// `seckill master …`
#[derive(Debug, Subcommand)]
pub(super) enum MasterCommand {
    /// Show which center is the master, at which epoch, and in which state
    Show {
        #[command(flatten)]
        service: ServiceArgs,
    },
    /// Move the master to another center while the sale runs
    ///
    /// Planned: purchases are held for a moment and none fails; any trouble before the decision leaves everything as
    /// it was. Forced: for when the master center is gone. The shift runs in the service of the center that takes; a
    /// terminal that is closed changes nothing.
    #[command(after_help = "\
Examples:
  seckill master shift --to b --dry-run                check everything, change nothing
  seckill master shift --to b --reason 'new racks'     shows the checks, then asks
  seckill master shift --to b --mode forced --yes      a is gone; no question asked

Exit codes: 0 done, 1 error, 2 refused and nothing changed, 3 aborted and everything as before, \
4 unknown or still running, 5 done but the verification failed. docs/operations.md says what to do \
on each.")]
    Shift(Box<MasterShiftArgs>),
}

/// Runs `seckill topology …`.
pub(super) async fn topology(command: TopologyCommand, format: Format) -> Outcome {
    let TopologyCommand::Show { service } = command;
    let topology = fetch(&service).await?;
    match format {
        Format::Json => print_json(&topology),
        Format::Text => print(&describe(&topology)),
    }
    Ok(Exit::Done)
}

/// Runs `seckill master …`.
pub(super) async fn master(command: MasterCommand, format: Format) -> Outcome {
    let service = match command {
        MasterCommand::Show { service } => service,
        MasterCommand::Shift(args) => return super::shift::master(*args, format).await,
    };
    let topology = fetch(&service).await?;
    let fields = ["master", "epoch", "state", "durability", "in_sync", "restoring", "shift", "ledger_id"];
    let mut picked: Map<String, Value> = fields
        .iter()
        .map(|name| ((*name).to_owned(), topology.get(*name).cloned().unwrap_or(Value::Null)))
        .collect();
    picked.insert("last_shift".to_owned(), last_shift(&topology).cloned().unwrap_or(Value::Null));
    if format == Format::Text {
        for name in ["shift", "last_shift"] {
            picked[name] = in_a_line(&picked[name]);
        }
    }
    print_object(format, &Value::Object(picked));
    Ok(Exit::Done)
}

/// The latest shift that is over.
fn last_shift(topology: &Value) -> Option<&Value> {
    topology.get("history")?.as_array()?.last()
}

/// A shift as one line of text; what is none stays as it is.
fn in_a_line(shift: &Value) -> Value {
    match Shift::deserialize(shift) {
        Ok(shift) => shift_text::line(&shift).into(),
        Err(_) => shift.clone(),
    }
}

async fn fetch(service: &ServiceArgs) -> Result<Value, Failure> {
    AdminClient::new(service)?.call(&Call::get("/admin/v1/topology")).await?.json()
}

fn describe(topology: &Value) -> String {
    let Value::Object(fields) = topology else { return topology.to_string() };
    let mut rows = Vec::new();
    for (name, value) in fields {
        match name.as_str() {
            "centers" | "shard_owners" | "limits" | "instances" | "history" => {}
            "shift" => rows.push(vec![name.clone(), cell(&in_a_line(value))]),
            _ => rows.push(vec![name.clone(), cell(value)]),
        }
    }
    if let Some(last) = last_shift(topology) {
        rows.push(vec!["last_shift".to_owned(), cell(&in_a_line(last))]);
    }
    rows.push(vec!["shards".to_owned(), shards(topology)]);
    for (name, rate) in topology.get("limits").and_then(Value::as_object).into_iter().flatten() {
        let rate = match (rate.get("per_second"), rate.get("burst")) {
            (Some(per_second), Some(burst)) => format!("{per_second}/s, burst {burst}"),
            _ => "off".to_owned(),
        };
        rows.push(vec![format!("limit {name}"), rate]);
    }
    for (id, center) in topology.get("centers").and_then(Value::as_object).into_iter().flatten() {
        for (name, value) in center.as_object().into_iter().flatten() {
            rows.push(vec![format!("center {id} {name}"), cell(value)]);
        }
    }
    for instance in topology.get("instances").and_then(Value::as_array).into_iter().flatten() {
        let field = |name: &str| instance.get(name).map(cell).unwrap_or_default();
        rows.push(vec![
            format!("instance of {}", field("center")),
            format!(
                "{} public {} admin {} internal {} since {}, version {}",
                field("id"),
                field("public_url"),
                field("admin_url"),
                field("internal_url"),
                field("started_at"),
                field("version"),
            ),
        ]);
    }
    aligned(&[], rows)
}

/// Who owns which shards, as ranges: `a: 0-63`.
fn shards(topology: &Value) -> String {
    let owners: Vec<&str> = topology
        .get("shard_owners")
        .and_then(Value::as_array)
        .map(|owners| owners.iter().map(|owner| owner.as_str().unwrap_or("?")).collect())
        .unwrap_or_default();
    let mut ranges: Vec<(&str, usize, usize)> = Vec::new();
    for (shard, owner) in owners.into_iter().enumerate() {
        match ranges.last_mut() {
            Some((last, _, end)) if *last == owner => *end = shard,
            _ => ranges.push((owner, shard, shard)),
        }
    }
    let ranges: Vec<String> =
        ranges.into_iter().map(|(owner, start, end)| format!("{owner}: {start}-{end}")).collect();
    ranges.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_shown_as_ranges() {
        let topology = serde_json::json!({ "shard_owners": ["a", "a", "b", "a"] });
        assert_eq!(shards(&topology), "a: 0-1, b: 2-2, a: 3-3");
    }
}
