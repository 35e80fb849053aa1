//! The result: a table for people, `target/bench.json` for programs.

use std::path::Path;

use serde::Serialize;

/// Which side of a bar is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Better {
    /// At most the bar.
    Lower,
    /// At least the bar.
    Higher,
}

/// One budget and what was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// What is measured.
    pub(crate) what: &'static str,
    /// Its unit.
    pub(crate) unit: &'static str,
    /// What was measured: the median of the rounds.
    pub(crate) measured: f64,
    /// Smallest and largest round.
    pub(crate) range: (f64, f64),
    /// The bar that fails the run.
    pub(crate) bar: f64,
    /// What we want to reach.
    pub(crate) aim: f64,
    /// Which side is good.
    pub(crate) better: Better,
    /// The figures behind it.
    pub(crate) detail: String,
}

impl Row {
    /// Whether the bar is kept.
    pub(crate) fn passes(&self) -> bool {
        self.reaches(self.bar)
    }

    fn reaches(&self, limit: f64) -> bool {
        match self.better {
            Better::Lower => self.measured <= limit,
            Better::Higher => self.measured >= limit,
        }
    }

    fn verdict(&self) -> &'static str {
        match (self.reaches(self.aim), self.passes()) {
            (true, _) => "aim",
            (false, true) => "ok",
            (false, false) => "FAIL",
        }
    }
}

/// The median: of an even number of values, half way between the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        even if even % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
        _ => sorted[middle],
    }
}

/// A row from several rounds.
pub(crate) fn row(
    what: &'static str,
    unit: &'static str,
    rounds: &[f64],
    (better, bar, aim): (Better, f64, f64),
    detail: String,
) -> Row {
    let mut sorted = rounds.to_vec();
    sorted.sort_by(f64::total_cmp);
    Row {
        what,
        unit,
        measured: median(rounds),
        range: (sorted[0], sorted[sorted.len() - 1]),
        bar,
        aim,
        better,
        detail,
    }
}

/// Prints one row as soon as it is measured.
pub(crate) fn print(row: &Row) {
    let sign = match row.better {
        Better::Lower => '≤',
        Better::Higher => '≥',
    };
    println!(
        "{:<58} {:>9} {:<6} {sign} {:<7} {sign} {:<7} {:<5} {}",
        row.what,
        number(row.measured),
        row.unit,
        number(row.bar),
        number(row.aim),
        row.verdict(),
        row.detail
    );
}

/// Prints the head of the table.
pub(crate) fn print_head() {
    println!("{:<58} {:>9} {:<6} {:<9} {:<9} {:<5} figures", "budget", "measured", "", "bar", "aim", "");
}

fn number(value: f64) -> String {
    if value >= 1000.0 {
        format!("{value:.0}")
    } else if value >= 100.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

#[derive(Serialize)]
struct File<'a> {
    schema: &'static str,
    taken_at: String,
    cores: usize,
    kernel: String,
    redis: &'a str,
    rows: &'a [Row],
}

/// Writes the rows for programs.
pub(crate) fn write(path: &Path, redis: &str, rows: &[Row]) -> anyhow::Result<()> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let file = File {
        schema: "seckill-bench/1",
        taken_at: jiff::Timestamp::now().to_string(),
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        kernel,
        redis,
        rows,
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    std::fs::write(path, serde_json::to_vec_pretty(&file)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn the_median_favours_neither_half() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), 2.5);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
    }
}
