//! Shifts as text: what is about to happen, what was compared, each step with its time, how it ended.

use std::collections::HashSet;
use std::io::Write;
use std::time::Instant;

use seckill_domain::Shard;

use super::output::{aligned, print};
use crate::topology::{
    Check, CheckVerdict, Exposure, Shift, ShiftKind, ShiftMode, ShiftState, Step, StepState, Tail, Topology,
    Unclaimed, UnclaimedCause,
};

/// The longest duration in milliseconds that is shown as such.
const MAX_MS: u64 = 9_999;
/// Width of a step's name: the longest is `wait_lease`, `hand_over` and their like.
const STEP_WIDTH: usize = 12;

/// What a shift would do, for somebody who is about to confirm it.
pub(super) fn intention(planned: &Shift, topology: &Topology) -> String {
    let Shift { from, to, .. } = planned;
    let mut text = heading(planned);
    text.push('\n');
    let lines: &[String] = &match (planned.kind, planned.mode) {
        (ShiftKind::Master, ShiftMode::Planned) => vec![
            format!("Purchases are held in every center while {to} takes over, then go on; none fails."),
            format!("Until it is decided any trouble ends with {from} as the master, as before."),
        ],
        (ShiftKind::Master, ShiftMode::Forced) => vec![
            format!(
                "{from} is not asked: this is for when it is gone. {to} waits out {from}'s lease, then sells."
            ),
            format!("Until {from} is back and in sync, what {to} sells does not survive the loss of {to}."),
        ],
        (ShiftKind::Shards, ShiftMode::Planned) => vec![
            format!("The orders of the users of {}", shards(&planned.shards)),
            format!(
                "are not written while they move from {from} to {to}. Purchases go on; their orders wait in the queue."
            ),
        ],
        (ShiftKind::Shards, ShiftMode::Forced) => vec![
            format!("The orders of the users of {}", shards(&planned.shards)),
            format!("are taken over from {to}'s copy. {from} is not asked: this is for when it is gone."),
        ],
    };
    for line in lines {
        text.push_str(&format!("  {line}\n"));
    }
    if let Some(exposure) = &planned.exposure {
        text.push_str(&format!("  {}\n", exposed(exposure)));
    }
    text.push_str(&format!("  The topology is at epoch {}, {}.\n", topology.epoch, topology.state.as_str()));
    text
}

/// What moves from where to where.
pub(super) fn heading(shift: &Shift) -> String {
    let mode = match shift.mode {
        ShiftMode::Planned => "planned",
        ShiftMode::Forced => "forced",
    };
    let what = match shift.kind {
        ShiftKind::Master => "the master moves".to_owned(),
        ShiftKind::Shards => format!("{} move", shards(&shift.shards)),
    };
    format!("{mode} shift: {what} from center {} to center {}", shift.from, shift.to)
}

/// Shards as ranges: `shards 0-15, 20`.
pub(super) fn shards(shards: &[Shard]) -> String {
    let mut ranges: Vec<(u8, u8)> = Vec::new();
    for shard in shards {
        let number = shard.number();
        match ranges.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(number) => *end = number,
            _ => ranges.push((number, number)),
        }
    }
    let ranges: Vec<String> = ranges
        .into_iter()
        .map(|(start, end)| if start == end { start.to_string() } else { format!("{start}-{end}") })
        .collect();
    match shards.len() {
        1 => format!("shard {}", ranges.join(", ")),
        _ => format!("shards {}", ranges.join(", ")),
    }
}

/// What a forced shift may lose, in a sentence.
pub(super) fn exposed(exposure: &Exposure) -> String {
    if exposure.lossless {
        return format!("Nothing acknowledged is lost: {}.", exposure.reason.trim_end_matches('.'));
    }
    let mut text = format!("ACKNOWLEDGED PURCHASES MAY BE LOST: {}", exposure.reason.trim_end_matches('.'));
    if let Some(entries) = exposure.entries {
        text.push_str(&format!("; {entries} entries of the outbox are exposed"));
    }
    if let Some(since) = &exposure.since {
        text.push_str(&format!("; since {since}"));
    }
    text.push('.');
    text
}

/// What was compared, a line for each: name, value, limit, verdict.
pub(super) fn checks(checks: &[Check], indent: &str) -> String {
    let rows = checks
        .iter()
        .map(|check| {
            let verdict = match check.verdict {
                CheckVerdict::Ok => "ok",
                CheckVerdict::Warning => "WARNING",
                CheckVerdict::Failed => "FAILED",
            };
            vec![
                format!("{indent}{}", check.name),
                check.value.clone(),
                check.limit.clone(),
                verdict.to_owned(),
            ]
        })
        .collect();
    let header = format!("{indent}check");
    aligned(&[&header, "found", "limit", "verdict"], rows)
}

/// One step that is over, with what was compared.
fn step(step: &Step) -> String {
    let took = step.took_ms.map_or_else(|| "-".to_owned(), duration);
    let failed = match step.state {
        StepState::Running | StepState::Done => "",
        StepState::Failed => "FAILED  ",
    };
    let detail = step.detail.as_deref().unwrap_or_default();
    let line = format!("  {:<STEP_WIDTH$} {took:>8}  {failed}{detail}", step.name);
    let mut text = format!("{}\n", line.trim_end());
    if !step.checks.is_empty() {
        text.push_str(&checks(&step.checks, "    "));
    }
    text
}

/// How it ended, in one line.
pub(super) fn ending(shift: &Shift) -> String {
    let state = match shift.state {
        ShiftState::Done => "done",
        ShiftState::Aborted => "aborted",
        ShiftState::Failed => "FAILED",
        ShiftState::Running => "running",
        ShiftState::Unknown => "unknown",
    };
    let mut text = state.to_owned();
    if let Some(held_ms) = shift.held_ms {
        text.push_str(&format!(", held for {}", duration(held_ms)));
    }
    if let Some(message) = &shift.message {
        text.push_str(&format!(": {message}"));
    }
    text.push('\n');
    text
}

/// All that is known of a shift.
pub(super) fn whole(shift: &Shift) -> String {
    let mut text = format!("{}  {}\n", shift.id, heading(shift));
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut add = |name: &str, value: Option<String>| {
        rows.extend(value.map(|value| vec![name.to_owned(), value]));
    };
    add("state", Some(state(shift.state).to_owned()));
    add("epoch", Some(format!("{} -> {}", shift.from_epoch, shift.epoch)));
    add("asked for by", Some(shift.actor.clone()));
    add("reason", Some(shift.reason.clone()).filter(|reason| !reason.is_empty()));
    add("started", Some(shift.started_at.clone()));
    add("ended", shift.ended_at.clone());
    let coordinator = &shift.coordinator;
    let taken_over = match coordinator.term {
        0 => String::new(),
        1 => ", taken over once".to_owned(),
        times => format!(", taken over {times} times"),
    };
    add(
        "run by",
        Some(format!("center {}, instance {}{taken_over}", coordinator.center, coordinator.instance)),
    );
    add("exposure", shift.exposure.as_ref().map(exposed));
    add("loss accepted", shift.accept_loss.then(|| "yes".to_owned()));
    add("held", shift.held_ms.map(duration));
    for each in &shift.tails {
        add("saved tail", Some(tail(each)));
        for order in &each.paid_orders {
            add("paid order", Some(unclaimed(order)));
        }
    }
    text.push_str(&indented(&aligned(&[], rows)));
    for each in &shift.steps {
        match each.state {
            StepState::Running => text.push_str(&format!("  {:<STEP_WIDTH$}  running\n", each.name)),
            StepState::Done | StepState::Failed => text.push_str(&step(each)),
        }
    }
    text.push_str(&ending(shift));
    text
}

/// What only the old master had, and what became of it.
fn tail(tail: &Tail) -> String {
    let Tail { file, entries, orders, paid_without_claim, settled, .. } = tail;
    let mut text = format!("{file} ({entries} entries, {orders} orders)");
    match settled {
        None if *paid_without_claim == 0 => text.push_str(", not settled yet"),
        None => text.push_str(&format!(", not settled: {paid_without_claim} paid orders have no claim")),
        Some(settled) => text.push_str(&format!(
            ", settled {}: {} of {} orders claimed again, {} cancelled, {} paid without a claim",
            settled.settled_at,
            settled.claimed_again,
            settled.orders,
            settled.cancelled,
            settled.paid_without_claim,
        )),
    }
    text
}

/// Why a paid order holds no claim, and what is to be done.
fn unclaimed(order: &Unclaimed) -> String {
    let Unclaimed { order_id, sale_id, quantity, cause } = order;
    let or = "or pay the money back and move the file away";
    let why = match cause {
        UnclaimedCause::NotEnough => format!(
            "too little is left. `seckill sale stock {sale_id} +{quantity}`, and it is claimed within half a minute; {or}"
        ),
        UnclaimedCause::Limit => {
            format!(
                "its buyer holds the limit in other orders. It is claimed when one of them is given back; {or}"
            )
        }
        UnclaimedCause::OtherOrder => format!(
            "its buyer holds another order that was bought under the same key. It is claimed when that is given back; {or}"
        ),
        UnclaimedCause::NoSale => {
            format!(
                "the ledger has no such sale. Create it again, and it is claimed within half a minute; {or}"
            )
        }
        UnclaimedCause::Archived => {
            "the sale is archived. Deliver it, or pay the money back; nothing waits for it".to_owned()
        }
    };
    format!("{order_id} of {sale_id} has no claim: {why}")
}

/// The same of all tails, in a word or two.
fn tails(tails: &[Tail]) -> String {
    let orders: u64 = tails.iter().map(|tail| tail.orders).sum();
    match tails.iter().filter(|tail| tail.settled.is_none()).count() {
        _ if tails.is_empty() => "-".to_owned(),
        0 => format!("{orders} orders, settled"),
        open => format!("{orders} orders, {open} of {} not settled", tails.len()),
    }
}

/// Shifts, a line for each.
pub(super) fn table<'a>(list: impl Iterator<Item = &'a Shift>) -> String {
    let list: Vec<&Shift> = list.collect();
    // A rare column: only a forced shift whose old master came back with something of its own has it.
    let saved = list.iter().any(|shift| !shift.tails.is_empty());
    let rows: Vec<Vec<String>> = list
        .iter()
        .map(|shift| {
            let what = match shift.kind {
                ShiftKind::Master => "master".to_owned(),
                ShiftKind::Shards => shards(&shift.shards),
            };
            let mut row = vec![
                shift.id.clone(),
                what,
                mode(shift.mode).to_owned(),
                format!("{} -> {}", shift.from, shift.to),
                state(shift.state).to_owned(),
                shift.held_ms.map_or_else(|| "-".to_owned(), duration),
                shift.started_at.clone(),
            ];
            if saved {
                row.push(tails(&shift.tails));
            }
            row.extend([shift.actor.clone(), shift.reason.clone()]);
            row
        })
        .collect();
    let mut header = vec!["id", "what", "mode", "way", "state", "held", "started"];
    if saved {
        header.push("saved tail");
    }
    header.extend(["by", "reason"]);
    match rows.is_empty() {
        true => "no shifts\n".to_owned(),
        false => aligned(&header, rows),
    }
}

/// A shift in one line, for those who look at the topology.
pub(super) fn line(shift: &Shift) -> String {
    let mut text = format!("{} {}, {}", shift.id, heading(shift), state(shift.state));
    if let Some(step) = shift.steps.iter().find(|step| step.state == StepState::Running) {
        text.push_str(&format!(" ({})", step.name));
    }
    if let Some(ended_at) = &shift.ended_at {
        text.push_str(&format!(" at {ended_at}"));
    }
    if let Some(held_ms) = shift.held_ms {
        text.push_str(&format!(", held for {}", duration(held_ms)));
    }
    text
}

/// A state's name in JSON.
pub(super) fn state(state: ShiftState) -> &'static str {
    match state {
        ShiftState::Running => "running",
        ShiftState::Done => "done",
        ShiftState::Aborted => "aborted",
        ShiftState::Failed => "failed",
        ShiftState::Unknown => "unknown",
    }
}

/// A mode's name in JSON.
pub(super) fn mode(mode: ShiftMode) -> &'static str {
    match mode {
        ShiftMode::Planned => "planned",
        ShiftMode::Forced => "forced",
    }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn duration(ms: u64) -> String {
    if ms <= MAX_MS { format!("{ms} ms") } else { format!("{:.1} s", ms as f64 / 1000.0) }
}

/// Prints a shift's course while it runs: a line when a step is over; on a terminal also the step that is under way.
pub(super) struct Progress {
    /// Steps that were printed, by name and start: after a takeover the list may be another one.
    printed: HashSet<(String, String)>,
    term: u32,
    terminal: bool,
    /// The step under way, and since when it is seen here.
    current: Option<(String, Instant)>,
}

impl Progress {
    /// Nothing was printed yet. Without a terminal nothing is redrawn.
    pub(super) fn new(terminal: bool) -> Progress {
        Progress { printed: HashSet::new(), term: 0, terminal, current: None }
    }

    /// What is new is printed.
    pub(super) fn show(&mut self, shift: &Shift) {
        let text = self.advance(shift);
        if !text.is_empty() {
            let mut out = std::io::stdout().lock();
            let _ = out.write_all(text.as_bytes());
            let _ = out.flush();
        }
    }

    /// Leaves the line of the step that is under way as it stands.
    pub(super) fn leave(&mut self) {
        if self.current.take().is_some() {
            print("");
        }
    }

    /// What is new since the last time.
    fn advance(&mut self, shift: &Shift) -> String {
        let mut text = String::new();
        if shift.coordinator.term > self.term {
            self.term = shift.coordinator.term;
            text.push_str(&format!("  center {} has taken it over\n", shift.coordinator.center));
        }
        let mut running = None;
        for each in &shift.steps {
            match each.state {
                StepState::Running => running = Some(each.name.as_str()),
                StepState::Done | StepState::Failed => {
                    if self.printed.insert((each.name.clone(), each.started_at.clone())) {
                        text.push_str(&step(each));
                    }
                }
            }
        }
        if !self.terminal {
            return text;
        }
        let erased = if self.current.is_some() { "\r\x1b[K" } else { "" };
        text.insert_str(0, erased);
        self.current = running.map(|name| match self.current.take() {
            Some((current, since)) if current == name => (current, since),
            _ => (name.to_owned(), Instant::now()),
        });
        if let Some((name, since)) = &self.current {
            let elapsed = since.elapsed().as_secs_f64();
            text.push_str(&format!("  {name:<STEP_WIDTH$} {elapsed:>6.1} s  …"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use seckill_domain::{Quantity, SaleId};

    use super::*;
    use crate::topology::Settled;

    fn step_of(name: &str, state: StepState, took_ms: Option<u64>) -> Step {
        Step {
            name: name.to_owned(),
            state,
            started_at: format!("2026-01-01T00:00:0{}Z", name.len()),
            took_ms,
            detail: None,
            checks: Vec::new(),
        }
    }

    #[test]
    fn shards_are_named_as_ranges() {
        let of = |numbers: &[u8]| {
            let list: Vec<Shard> = numbers.iter().map(|number| Shard::new(*number).unwrap()).collect();
            shards(&list)
        };
        assert_eq!(of(&[0, 1, 2, 7, 62, 63]), "shards 0-2, 7, 62-63");
        assert_eq!(of(&[5]), "shard 5");
    }

    #[test]
    fn a_saved_tail_is_named_with_its_counts_and_with_what_became_of_it() {
        let mut shift = Shift::of_a_test();
        assert!(!whole(&shift).contains("saved tail"));
        assert!(!table([&shift].into_iter()).contains("saved tail"));
        let saved = |file: &str, orders| Tail {
            file: file.to_owned(),
            entries: 3,
            orders,
            paid_without_claim: 0,
            paid_orders: Vec::new(),
            settled: None,
        };
        shift.tails = vec![saved("/d/diverged-4-1.ndjson", 40), saved("/d/diverged-4-2.ndjson", 2)];
        let settled_at = "2026-01-01T00:01:00Z".to_owned();
        shift.tails[1].settled =
            Some(Settled { orders: 2, claimed_again: 1, cancelled: 1, paid_without_claim: 0, settled_at });
        let text = whole(&shift);
        for line in [
            "  saved tail    /d/diverged-4-1.ndjson (3 entries, 40 orders), not settled yet",
            "  saved tail    /d/diverged-4-2.ndjson (3 entries, 2 orders), settled 2026-01-01T00:01:00Z: 1 of 2 orders claimed again, 1 cancelled, 0 paid without a claim",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        shift.tails[0].paid_without_claim = 3;
        let text = whole(&shift);
        assert!(text.contains("40 orders), not settled: 3 paid orders have no claim\n"), "{text}");
        let order = |cause| Unclaimed {
            order_id: "1007000030000000258".parse().unwrap(),
            sale_id: SaleId::new("phone").unwrap(),
            quantity: Quantity::ONE,
            cause,
        };
        shift.tails[0].paid_orders = vec![order(UnclaimedCause::NotEnough), order(UnclaimedCause::Archived)];
        let text = whole(&shift);
        for line in [
            "  paid order    1007000030000000258 of phone has no claim: too little is left. `seckill sale stock phone +1`, ",
            "  paid order    1007000030000000258 of phone has no claim: the sale is archived. Deliver it, or pay the money back",
        ] {
            assert!(text.lines().any(|found| found.starts_with(line)), "{line}\n{text}");
        }
        let other = Shift { id: "shift-1".to_owned(), tails: Vec::new(), ..shift.clone() };
        let list = table([&shift, &other].into_iter());
        let lines: Vec<&str> = list.lines().collect();
        assert!(lines[0].contains("  saved tail") && lines[0].ends_with("reason"), "{list}");
        assert!(lines[1].contains("  42 orders, 1 of 2 not settled  ops"), "{list}");
        assert!(lines[2].contains("Z  -  ") && lines[2].ends_with("ops"), "{list}");
        shift.tails.remove(0);
        assert!(table([&shift].into_iter()).contains("  2 orders, settled"), "{list}");
    }

    #[test]
    fn each_step_is_printed_once_when_it_is_over_and_a_takeover_is_told() {
        let mut shift = Shift::of_a_test();
        let mut progress = Progress::new(false);
        shift.steps = vec![step_of("freeze", StepState::Running, None)];
        assert_eq!(progress.advance(&shift), "");
        shift.steps = vec![
            step_of("freeze", StepState::Done, Some(4)),
            step_of("fence", StepState::Failed, Some(12_345)),
        ];
        assert_eq!(progress.advance(&shift), "  freeze           4 ms\n  fence          12.3 s  FAILED\n");
        assert_eq!(progress.advance(&shift), "");
        shift.coordinator.term = 1;
        shift.steps.remove(1);
        shift.steps.push(step_of("promote", StepState::Done, Some(1)));
        let told = progress.advance(&shift);
        assert_eq!(told, "  center b has taken it over\n  promote          1 ms\n");
    }

    #[test]
    fn a_terminal_shows_the_step_under_way_and_replaces_it() {
        let mut shift = Shift::of_a_test();
        let mut progress = Progress::new(true);
        shift.steps = vec![step_of("catch_up", StepState::Running, None)];
        assert_eq!(progress.advance(&shift), "  catch_up        0.0 s  …");
        shift.steps = vec![step_of("catch_up", StepState::Done, Some(31))];
        assert_eq!(progress.advance(&shift), "\r\x1b[K  catch_up        31 ms\n");
    }
}
