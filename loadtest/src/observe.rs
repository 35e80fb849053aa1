//! What a run tells while it runs.

use crate::stats::Interval;

/// A second of the run, for whoever watches.
pub struct Moment<'a> {
    /// What all generators did in it.
    pub interval: &'a Interval,
    /// Arrivals per second that are asked for just now.
    pub rate_asked: f64,
    /// Units left, if the target told.
    pub stock: Option<i64>,
    /// How many seconds the load takes.
    pub seconds: f64,
}

/// Somebody who watches a run.
pub trait Observer {
    /// Something happened that a person may want to read.
    fn line(&mut self, text: &str);

    /// A second is over.
    fn second(&mut self, moment: &Moment<'_>) {
        self.line(&line(moment));
    }
}

impl<F: FnMut(&str)> Observer for F {
    fn line(&mut self, text: &str) {
        self(text);
    }
}

/// A second in a line.
pub fn line(moment: &Moment<'_>) -> String {
    use std::fmt::Write as _;
    let interval = moment.interval;
    let mut text = format!(
        "{:>4}s  rate {}/{:.0}  requests {}  accepted {}  replayed {}  refused {}  unknown {}  p99 {:.1} ms",
        interval.second + 1,
        interval.arrivals,
        moment.rate_asked,
        interval.requests,
        interval.accepted,
        interval.replayed,
        interval.refused,
        interval.unknown,
        interval.latency_us.value_at_quantile(0.99) as f64 / 1000.0,
    );
    // Writing to a string cannot fail.
    if interval.failed > 0 {
        let _ = write!(text, "  failed {}", interval.failed);
    }
    if interval.done > 0 {
        let _ = write!(text, "  read or paid {}", interval.done);
    }
    if interval.backlog > 0 {
        let _ = write!(text, "  waiting {}", interval.backlog);
    }
    if let Some(stock) = moment.stock {
        let _ = write!(text, "  stock {stock}");
    }
    text
}
