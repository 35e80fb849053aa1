//! `seckill master shift`, `seckill shards shift` and `seckill shift …`: moving the master or the home of shards from
//! one center to another, and looking at it.
//!
//! A shift runs in the service of the center that takes. The command starts it and shows its course; when the command
//! is gone, the shift goes on.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use seckill_domain::{CenterId, Shard};
use serde_json::{Value, json};

use super::client::{AdminClient, Call, Effect, ServiceArgs};
use super::exit::{Exit, Failure, Outcome};
use super::follow::{Follower, Lost};
use super::output::{Format, print, print_json};
use super::shift_text::{self, Progress};
use crate::topology::{Check, Exposure, Shift, ShiftKind, ShiftMode, ShiftState, StepState, Topology};

/// How long a command follows a shift by default. A shift of the master is over in seconds; one of shards may have
/// to wait for a database that is behind.
const DEFAULT_TIMEOUT_S: u64 = 600;
/// How long the service may take for the checks before a shift.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// `seckill master shift`
#[derive(Debug, Args)]
pub(super) struct MasterShiftArgs {
    /// The center that becomes the master
    #[arg(long, value_name = "CENTER")]
    to: CenterId,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    service: ServiceArgs,
}

/// `seckill shards …`
#[derive(Debug, Subcommand)]
pub(super) enum ShardsCommand {
    /// Move the home of shards to another center: their users' orders and coupons
    ///
    /// Purchases go on meanwhile. Needs MySQL or MariaDB that replicate both ways; with SQLite it is refused.
    #[command(after_help = "\
Examples:
  seckill shards shift --from a --to b               all that are at home in a, before a is serviced
  seckill shards shift --shards 0-31 --to a          and back
  seckill shards shift --from a --to b --mode forced a is gone

Exit codes: as those of `seckill master shift`.")]
    Shift(ShardsShiftArgs),
}

/// `seckill shards shift`
#[derive(Debug, Args)]
pub(super) struct ShardsShiftArgs {
    /// The shards: 0-15, or 3,7,20-31
    #[arg(long, value_name = "LIST", value_parser = parse_shards, required_unless_present = "from")]
    shards: Option<ShardList>,
    /// All shards that are at home in this center
    #[arg(long, value_name = "CENTER", conflicts_with = "shards")]
    from: Option<CenterId>,
    /// Their new home
    #[arg(long, value_name = "CENTER")]
    to: CenterId,
    #[command(flatten)]
    how: How,
    #[command(flatten)]
    service: ServiceArgs,
}

/// Shards in ascending order, each once.
#[derive(Debug, Clone)]
struct ShardList(Vec<Shard>);

/// How a shift is made.
#[derive(Debug, Args)]
struct How {
    /// planned: both centers take part. forced: the center that gives is gone
    #[arg(long, value_enum, default_value_t = Mode::Planned)]
    mode: Mode,
    /// Check everything, print it, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Refuse if the topology is at another epoch by now
    #[arg(long, value_name = "EPOCH")]
    expect_epoch: Option<u64>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Go on although a forced shift may lose what was acknowledged
    #[arg(long)]
    accept_loss: bool,
    /// Why, for the history
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// Seconds to follow it; it goes on after that
    #[arg(long, value_name = "N", default_value_t = DEFAULT_TIMEOUT_S)]
    timeout: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Planned,
    Forced,
}

impl From<Mode> for ShiftMode {
    fn from(mode: Mode) -> ShiftMode {
        match mode {
            Mode::Planned => ShiftMode::Planned,
            Mode::Forced => ShiftMode::Forced,
        }
    }
}

/// `seckill shift …`
#[derive(Debug, Subcommand)]
pub(super) enum ShiftCommand {
    /// List the running shift and the latest that are over
    List {
        #[command(flatten)]
        service: ServiceArgs,
    },
    /// Show one shift with its steps [default: the running or the latest one]
    Status {
        /// The shift
        id: Option<String>,
        /// Follow it until it is over, and end with its exit code
        #[arg(long)]
        follow: bool,
        /// Seconds to follow it
        #[arg(long, value_name = "N", default_value_t = DEFAULT_TIMEOUT_S)]
        timeout: u64,
        #[command(flatten)]
        service: ServiceArgs,
    },
    /// Give a running shift up; refused (exit 2) once it is decided
    Abort {
        /// The shift
        id: String,
        /// Seconds to wait until everything is as before
        #[arg(long, value_name = "N", default_value_t = DEFAULT_TIMEOUT_S)]
        timeout: u64,
        #[command(flatten)]
        service: ServiceArgs,
    },
}

/// What is asked of the service.
struct Request {
    kind: ShiftKind,
    shards: Vec<Shard>,
    to: CenterId,
    how: How,
}

/// Runs `seckill master shift`.
pub(super) async fn master(args: MasterShiftArgs, format: Format) -> Outcome {
    let MasterShiftArgs { to, how, service } = args;
    let topology = topology(&service).await?;
    shift(Request { kind: ShiftKind::Master, shards: Vec::new(), to, how }, &topology, &service, format).await
}

/// Runs `seckill shards …`.
pub(super) async fn shards(command: ShardsCommand, format: Format) -> Outcome {
    let ShardsCommand::Shift(ShardsShiftArgs { shards, from, to, how, service }) = command;
    let topology = topology(&service).await?;
    let shards = match (shards, from) {
        (Some(ShardList(shards)), _) => shards,
        (None, Some(from)) => topology.shards_of(&from).collect(),
        (None, None) => Vec::new(),
    };
    if shards.is_empty() {
        return Err(Failure::refused("no shard is at home there: there is nothing to move"));
    }
    shift(Request { kind: ShiftKind::Shards, shards, to, how }, &topology, &service, format).await
}

/// Runs `seckill shift …`.
pub(super) async fn run(command: ShiftCommand, format: Format) -> Outcome {
    match command {
        ShiftCommand::List { service } => {
            let found = AdminClient::new(&service)?.call(&Call::get("/admin/v1/shifts")).await?.json()?;
            match format {
                Format::Json => print_json(&found),
                Format::Text => print(&shift_text::table(listed(&found)?.iter())),
            }
            Ok(Exit::Done)
        }
        ShiftCommand::Status { id, follow, timeout, service } => {
            let client = AdminClient::new(&service)?;
            let shift = match id {
                Some(id) => read(&client.call(&Call::get(format!("/admin/v1/shifts/{id}"))).await?.json()?)?,
                None => {
                    let found = client.call(&Call::get("/admin/v1/shifts")).await?.json()?;
                    let newest = listed(&found)?.into_iter().next();
                    newest.ok_or_else(|| Failure::error("there was no shift yet"))?
                }
            };
            if follow {
                return follow_to_the_end(shift, topology(&service).await.ok(), &service, timeout, format)
                    .await;
            }
            match format {
                Format::Json => print_json(&json!(shift)),
                Format::Text => print(&shift_text::whole(&shift)),
            }
            Ok(Exit::Done)
        }
        ShiftCommand::Abort { id, timeout, service } => abort(&id, timeout, &service, format).await,
    }
}

/// The running shift and those that are over, the newest first.
fn listed(found: &Value) -> Result<Vec<Shift>, Failure> {
    let running = found.get("running").filter(|running| !running.is_null());
    let history = found.get("history").and_then(Value::as_array).into_iter().flatten();
    running.into_iter().chain(history).map(read).collect()
}

fn read(shift: &Value) -> Result<Shift, Failure> {
    serde_json::from_value(shift.clone())
        .map_err(|error| Failure::error(format!("the service's answer is no shift: {error}")))
}

async fn topology(service: &ServiceArgs) -> Result<Topology, Failure> {
    let answer = AdminClient::new(service)?.call(&Call::get("/admin/v1/topology")).await?.json()?;
    serde_json::from_value(answer)
        .map_err(|error| Failure::error(format!("the service's topology cannot be read: {error}")))
}

/// Asks, starts, follows.
async fn shift(request: Request, topology: &Topology, service: &ServiceArgs, format: Format) -> Outcome {
    let mut follower = Follower::new(service, Some(topology), None)?;
    let mut expected = request.how.expect_epoch;
    if request.how.dry_run || !request.how.yes {
        if !request.how.dry_run && !std::io::stdin().is_terminal() {
            return Err(Failure::refused(
                "nothing was changed: there is no terminal to ask for confirmation; --yes confirms, --dry-run \
                 only checks",
            ));
        }
        let planned = start(&mut follower, &request, expected, true, format).await?;
        if request.how.dry_run {
            match format {
                Format::Json => print_json(&json!({ "outcome": "dry_run", "shift": planned })),
                Format::Text => {
                    print(&shift_text::intention(&planned, topology));
                    print(&checks_of(&planned));
                    print("dry run: it would begin; nothing was changed");
                }
            }
            return Ok(Exit::Done);
        }
        eprint!("{}{}", shift_text::intention(&planned, topology), checks_of(&planned));
        if !confirmed()? {
            return Err(Failure::refused("nothing was changed: not confirmed"));
        }
        // What was confirmed is what was shown.
        expected = expected.or(Some(planned.from_epoch.0));
    }
    // From here on Ctrl-C cannot say that nothing happened.
    let started = tokio::select! {
        started = start(&mut follower, &request, expected, false, format) => started?,
        _ = tokio::signal::ctrl_c() => {
            return Err(Failure::unknown(
                "interrupted before the service answered: the shift may have begun, and goes on by itself then; \
                 `seckill shift list` shows whether it did",
            ));
        }
    };
    follower.last = Some(started.clone());
    ended(&mut follower, started, request.how.timeout, format).await
}

fn checks_of(planned: &Shift) -> String {
    planned.steps.iter().map(|step| shift_text::checks(&step.checks, "  ")).collect()
}

/// Asks on the terminal.
fn confirmed() -> Result<bool, Failure> {
    eprint!("Go ahead? [y/N] ");
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(Failure::error)?;
    Ok(matches!(line.trim().to_lowercase().as_str(), "y" | "yes"))
}

/// Has the service begin, or only check.
async fn start(
    follower: &mut Follower,
    request: &Request,
    expect_epoch: Option<u64>,
    dry_run: bool,
    format: Format,
) -> Result<Shift, Failure> {
    let Request { kind, shards, to, how } = request;
    let body = json!({
        "kind": kind, "to": to, "mode": ShiftMode::from(how.mode), "shards": shards,
        "expect_epoch": expect_epoch, "accept_loss": how.accept_loss, "dry_run": dry_run, "reason": how.reason,
    });
    let key = format!("cli-{:032x}", rand::random::<u128>());
    let call = Call::post("/admin/v1/shifts", Effect::Idempotent)
        .body("application/json", body.to_string())
        .header("idempotency-key", &key)?
        .timeout(START_TIMEOUT);
    match follower.send(&call).await {
        Ok(answer) => read(&answer.json()?),
        Err(mut failure) => {
            if format == Format::Text {
                eprint!("{}", why_refused(failure.body.as_ref()));
            }
            if failure.exit == Exit::Unknown {
                failure.message.push_str("; `seckill shift list` shows whether it began");
            }
            Err(failure)
        }
    }
}

/// What a refusal compared, and what would be lost.
fn why_refused(problem: Option<&Value>) -> String {
    let member = |name: &str| problem.and_then(|problem| problem.get(name)).cloned().unwrap_or_default();
    let checks: Vec<Check> = serde_json::from_value(member("checks")).unwrap_or_default();
    let mut text = if checks.is_empty() { String::new() } else { shift_text::checks(&checks, "  ") };
    if let Ok(exposure) = serde_json::from_value::<Exposure>(member("exposure")) {
        text.push_str(&format!("  {}\n", shift_text::exposed(&exposure)));
    }
    text
}

async fn follow_to_the_end(
    shift: Shift,
    topology: Option<Topology>,
    service: &ServiceArgs,
    timeout_s: u64,
    format: Format,
) -> Outcome {
    let mut follower = Follower::new(service, topology.as_ref(), Some(shift.clone()))?;
    ended(&mut follower, shift, timeout_s, format).await
}

/// Follows a shift, shows its course and ends as it does.
async fn ended(follower: &mut Follower, shift: Shift, timeout_s: u64, format: Format) -> Outcome {
    let id = shift.id.clone();
    let mut progress = Progress::new(std::io::stdout().is_terminal());
    if format == Format::Text {
        print(&format!("{id}  {}", shift_text::heading(&shift)));
    }
    let within = Duration::from_secs(timeout_s.max(1));
    let followed = follower
        .until_over(&id, within, |shift| {
            if format == Format::Text {
                progress.show(shift);
            }
        })
        .await;
    let shift = match followed {
        Ok(shift) => shift,
        Err(lost) => {
            progress.leave();
            let message = still_running(lost, &id, follower.last.as_ref());
            eprintln!("seckill: {message}");
            if format == Format::Json {
                let last = &follower.last;
                print_json(&json!({ "outcome": "unknown", "message": message, "shift": last }));
            }
            return Ok(Exit::Unknown);
        }
    };
    let (exit, outcome) = outcome(&shift);
    match format {
        Format::Json => print_json(&json!({ "outcome": outcome, "shift": shift })),
        Format::Text => print(&shift_text::ending(&shift)),
    }
    Ok(exit)
}

fn still_running(lost: Lost, id: &str, last: Option<&Shift>) -> String {
    let why = match lost {
        Lost::Late => "the time to follow it is over".to_owned(),
        Lost::Silent(why) => format!("no admin listener answers any more ({why})"),
        Lost::Interrupted => "interrupted".to_owned(),
    };
    let step =
        last.and_then(|shift| shift.steps.last()).map(|step| format!(", last seen in step {}", step.name));
    format!(
        "{why}. {id} runs in the service and goes on by itself{}. `seckill shift status {id}` shows it, \
         `seckill shift status {id} --follow` waits for its end, `seckill shift abort {id}` gives it up",
        step.unwrap_or_default()
    )
}

/// How a shift ended, as exit code and word.
fn outcome(shift: &Shift) -> (Exit, &'static str) {
    match shift.state {
        ShiftState::Done => (Exit::Done, "done"),
        ShiftState::Aborted => (Exit::Aborted, "aborted"),
        // It happened when there is nothing left but the verification.
        ShiftState::Failed
            if shift.steps.iter().any(|step| step.name == "verify" && step.state == StepState::Failed) =>
        {
            (Exit::Unverified, "verification_failed")
        }
        ShiftState::Failed => (Exit::Error, "failed"),
        ShiftState::Running | ShiftState::Unknown => (Exit::Unknown, "unknown"),
    }
}

async fn abort(id: &str, timeout_s: u64, service: &ServiceArgs, format: Format) -> Outcome {
    let before = topology(service).await.ok();
    let mut follower = Follower::new(service, before.as_ref(), None)?;
    let call = Call::post(format!("/admin/v1/shifts/{id}/abort"), Effect::Idempotent).timeout(START_TIMEOUT);
    let shift = read(&follower.send(&call).await?.json()?)?;
    match ended(&mut follower, shift, timeout_s, format).await? {
        // That is what was asked for.
        Exit::Aborted => Ok(Exit::Done),
        // It was decided before the abort reached it.
        Exit::Done => Ok(Exit::Refused),
        other => Ok(other),
    }
}

fn parse_shards(text: &str) -> Result<ShardList, String> {
    let invalid = || format!("{text:?} is no list of shards: 0-15, or 3,7,20-31, each from 0 to 63");
    let mut shards = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number =
            |text: &str| text.trim().parse::<u8>().ok().filter(|number| Shard::new(*number).is_some());
        let (Some(first), Some(last)) = (number(first), number(last)) else { return Err(invalid()) };
        if first > last {
            return Err(invalid());
        }
        shards.extend((first..=last).filter_map(Shard::new));
    }
    shards.sort_unstable();
    shards.dedup();
    Ok(ShardList(shards))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_read_as_numbers_and_ranges() {
        let numbers = |text: &str| {
            parse_shards(text).map(|list| list.0.into_iter().map(Shard::number).collect::<Vec<_>>())
        };
        assert_eq!(numbers("0-3").unwrap(), [0, 1, 2, 3]);
        assert_eq!(numbers("7,3,62-63,7").unwrap(), [3, 7, 62, 63]);
        for bad in ["", "64", "5-2", "-1", "a", "1-", "0-64", "1,,2"] {
            assert!(numbers(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn each_end_has_its_exit_code() {
        let mut shift = Shift::of_a_test();
        let mut code = |state, failed: Option<&str>| {
            shift.state = state;
            shift.steps = failed
                .map(|name| serde_json::json!({ "name": name, "state": "failed", "started_at": "" }))
                .into_iter()
                .map(|step| serde_json::from_value(step).unwrap())
                .collect();
            outcome(&shift).0.code()
        };
        assert_eq!(code(ShiftState::Done, None), 0);
        assert_eq!(code(ShiftState::Failed, Some("attach")), 1);
        assert_eq!(code(ShiftState::Aborted, Some("catch_up")), 3);
        assert_eq!(code(ShiftState::Unknown, None), 4);
        assert_eq!(code(ShiftState::Failed, Some("verify")), 5);
    }
}
