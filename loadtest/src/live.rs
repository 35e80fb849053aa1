//! The run as it goes, on stderr: a view that is redrawn on a terminal, plain lines elsewhere.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};

use crate::observe::{Moment, Observer, line};
use crate::scenario::Scenario;

/// Seconds in the sparklines.
const HISTORY: usize = 60;
/// Lines of what happened that stay in view.
const LINES: usize = 4;

/// Watches a run.
pub struct Watch {
    how: How,
}

enum How {
    Quiet,
    Plain,
    View(Box<View>),
}

struct View {
    title: String,
    drawn: usize,
    rates: VecDeque<u64>,
    p99s: VecDeque<u64>,
    lines: VecDeque<String>,
    sum: Sum,
}

#[derive(Default)]
struct Sum {
    requests: u64,
    accepted: u64,
    replayed: u64,
    done: u64,
    refused: u64,
    failed: u64,
    unknown: u64,
    stock_first: Option<i64>,
}

impl Watch {
    /// Draws on a terminal, unless `plain`; says nothing if `quiet`.
    pub fn new(scenario: &Scenario, quiet: bool, plain: bool) -> Watch {
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let how = if quiet {
            How::Quiet
        } else if plain || dumb || !std::io::stderr().is_terminal() {
            How::Plain
        } else {
            let name = if scenario.name.is_empty() { "loadtest" } else { &scenario.name };
            How::View(Box::new(View {
                title: format!(
                    "{name} · sale {} · seed {} · {}",
                    scenario.sale,
                    scenario.seed,
                    scenario.targets.join(", ")
                ),
                drawn: 0,
                rates: VecDeque::new(),
                p99s: VecDeque::new(),
                lines: VecDeque::new(),
                sum: Sum::default(),
            }))
        };
        if matches!(how, How::Plain) {
            eprintln!("seed {}", scenario.seed);
        }
        Watch { how }
    }
}

impl Observer for Watch {
    fn line(&mut self, text: &str) {
        match &mut self.how {
            How::Quiet => {}
            How::Plain => eprintln!("{text}"),
            How::View(view) => view.say(text),
        }
    }

    fn second(&mut self, moment: &Moment<'_>) {
        match &mut self.how {
            How::Quiet => {}
            How::Plain => eprintln!("{}", line(moment)),
            How::View(view) => view.show(moment),
        }
    }
}

impl View {
    fn say(&mut self, text: &str) {
        if self.drawn == 0 {
            // Nothing is drawn before the load: what happens then is simply said.
            eprintln!("{text}");
            return;
        }
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(text.to_owned());
        // After the load no second comes that would draw it.
        eprintln!("{text}");
        self.drawn += 1;
    }

    fn show(&mut self, moment: &Moment<'_>) {
        let interval = moment.interval;
        let sum = &mut self.sum;
        sum.requests += interval.requests;
        sum.accepted += interval.accepted;
        sum.replayed += interval.replayed;
        sum.done += interval.done;
        sum.refused += interval.refused;
        sum.failed += interval.failed;
        sum.unknown += interval.unknown;
        sum.stock_first = sum.stock_first.or(moment.stock);
        let quantile = |q: f64| interval.latency_us.value_at_quantile(q);
        push(&mut self.rates, interval.requests);
        push(&mut self.p99s, quantile(0.99));

        let ms = |us: u64| format!("{:.2}", us as f64 / 1000.0);
        let elapsed = interval.second + 1;
        let mut rows = vec![format!("\x1b[1m{}\x1b[0m", self.title)];
        let share = (elapsed as f64 / moment.seconds.max(1.0)).min(1.0);
        rows.push(format!("{}  {elapsed} s of {:.0} s", bar(share, 40), moment.seconds));
        rows.push(format!(
            "rate      {:>8} arrivals/s of {:<8.0} {:>8} requests/s   {}",
            interval.arrivals,
            moment.rate_asked,
            interval.requests,
            spark(&self.rates)
        ));
        rows.push(format!(
            "latency   p50 {:>8} ms   p99 {:>8} ms   max {:>8} ms   {}",
            ms(quantile(0.5)),
            ms(quantile(0.99)),
            ms(interval.latency_us.max()),
            spark(&self.p99s)
        ));
        rows.push(format!(
            "outcomes  {:<10} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "", "accepted", "replayed", "refused", "read/paid", "failed", "unknown"
        ));
        let row = |name: &str, n: [u64; 6]| {
            let [accepted, replayed, refused, done, failed, unknown] = n;
            let alarm = |n: u64| if n > 0 { format!("\x1b[31m{n:>10}\x1b[0m") } else { format!("{n:>10}") };
            format!(
                "          {name:<10} \x1b[32m{accepted:>10}\x1b[0m {replayed:>10} {refused:>10} {done:>10} {} {}",
                alarm(failed),
                alarm(unknown)
            )
        };
        rows.push(row(
            "per second",
            [
                interval.accepted,
                interval.replayed,
                interval.refused,
                interval.done,
                interval.failed,
                interval.unknown,
            ],
        ));
        let sum = &self.sum;
        rows.push(row(
            "in all",
            [sum.accepted, sum.replayed, sum.refused, sum.done, sum.failed, sum.unknown],
        ));
        let mut last = String::from("stock     ");
        match (moment.stock, sum.stock_first) {
            (Some(stock), Some(first)) => {
                let share = if first > 0 { stock as f64 / first as f64 } else { 0.0 };
                let _ = write!(last, "{} {stock} left", bar(share.clamp(0.0, 1.0), 40));
            }
            _ => last.push_str("not known"),
        }
        if interval.backlog > 0 {
            let _ = write!(last, "   \x1b[33m{} arrivals wait for a connection\x1b[0m", interval.backlog);
        }
        rows.push(last);
        rows.extend(self.lines.iter().map(|line| format!("· {line}")));
        self.draw(&rows);
    }

    fn draw(&mut self, rows: &[String]) {
        let mut out = String::new();
        if self.drawn > 0 {
            let _ = write!(out, "\x1b[{}A", self.drawn);
        }
        for row in rows {
            // Lines are cut at the terminal's edge instead of wrapping, which would break the counting.
            let _ = writeln!(out, "\x1b[2K\x1b[?7l{row}\x1b[?7h");
        }
        out.push_str("\x1b[J");
        self.drawn = rows.len();
        // A terminal that is gone is no reason to end the run.
        let _ = std::io::stderr().lock().write_all(out.as_bytes());
    }
}

fn push(history: &mut VecDeque<u64>, value: u64) {
    if history.len() == HISTORY {
        history.pop_front();
    }
    history.push_back(value);
}

fn bar(share: f64, width: usize) -> String {
    let full = (share * width as f64).round() as usize;
    format!("{}{}", "█".repeat(full.min(width)), "░".repeat(width - full.min(width)))
}

fn spark(values: &VecDeque<u64>) -> String {
    const STEPS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let max = values.iter().copied().max().unwrap_or(0).max(1);
    values.iter().map(|value| STEPS[((value * 7) / max) as usize]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_and_sparklines_keep_their_width() {
        assert_eq!(bar(0.5, 4), "██░░");
        assert_eq!(bar(1.0, 4), "████");
        assert_eq!(spark(&VecDeque::from([0, 7, 14])), "▁▄█");
        let mut history = VecDeque::new();
        (0..200).for_each(|value| push(&mut history, value));
        assert_eq!(history.len(), HISTORY);
    }
}
