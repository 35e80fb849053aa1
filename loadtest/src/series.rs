//! The run over time, in bounded memory: seconds at first, then pairs of them, then pairs of pairs.

use crate::impact::{PULSES_PER_SECOND, Pulse};
use crate::report::IntervalReport;
use crate::stats::Interval;

/// Stretches of time that are kept one by one; when there are more, neighbours become one.
pub const STRETCHES_MAX: usize = 3600;
/// Seconds whose hundredths are kept, for the impact of events: two hours, 6 MB.
const PULSE_SECONDS_MAX: usize = 7200;

/// What is kept of the seconds of a run.
pub struct Series {
    kept: Vec<IntervalReport>,
    width: u64,
    pulses: Option<Vec<Pulse>>,
}

impl Series {
    /// `pulses`: hundredths of seconds are needed too.
    pub fn new(pulses: bool) -> Series {
        Series { kept: Vec::new(), width: 1, pulses: pulses.then(Vec::new) }
    }

    /// Adds a second. Seconds come in order.
    pub fn add(&mut self, interval: &Interval, stock: Option<i64>) {
        if let Some(pulses) = &mut self.pulses {
            let at = usize::try_from(interval.second).unwrap_or(usize::MAX);
            if at < PULSE_SECONDS_MAX {
                pulses.resize((at + 1) * PULSES_PER_SECOND, Pulse::default());
                pulses[at * PULSES_PER_SECOND..].copy_from_slice(&interval.pulses);
            }
        }
        let mut report = IntervalReport::of(interval, self.width, stock);
        report.second = interval.second / self.width * self.width;
        match self.kept.last_mut() {
            Some(last) if last.second == report.second => last.merge(&report),
            _ => self.kept.push(report),
        }
        if self.kept.len() > STRETCHES_MAX {
            self.fold();
        }
    }

    fn fold(&mut self) {
        self.width *= 2;
        let mut folded: Vec<IntervalReport> = Vec::with_capacity(STRETCHES_MAX);
        for mut report in self.kept.drain(..) {
            report.second = report.second / self.width * self.width;
            report.seconds = self.width;
            match folded.last_mut() {
                Some(last) if last.second == report.second => last.merge(&report),
                _ => folded.push(report),
            }
        }
        self.kept = folded;
    }

    /// The hundredths; empty if they were not asked for.
    pub fn pulses(&self) -> &[Pulse] {
        self.pulses.as_deref().unwrap_or_default()
    }

    /// What was kept.
    pub fn into_reports(self) -> Vec<IntervalReport> {
        self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_run_keeps_its_sums_in_few_stretches() {
        let mut series = Series::new(false);
        let seconds = STRETCHES_MAX as u64 * 3;
        for second in 0..seconds {
            let mut interval = Interval::new(second);
            interval.requests = 10;
            interval.latency_us.record(second + 1).unwrap();
            series.add(&interval, Some(7));
        }
        let kept = series.into_reports();
        assert!(kept.len() <= STRETCHES_MAX, "{}", kept.len());
        assert_eq!(kept.iter().map(|report| report.requests).sum::<u64>(), 10 * seconds);
        assert!(kept.windows(2).all(|pair| pair[0].second + pair[0].seconds == pair[1].second));
        assert_eq!(kept.last().unwrap().stock, Some(7));
    }
}
