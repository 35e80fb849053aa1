//! When buyers arrive: stages of constant or changing rate and bursts, computed and never stored.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One stage of the load: a burst at its beginning, then arrivals at a rate that goes evenly from one value
/// to another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// Arrivals at the very beginning of the stage, all due at the same instant.
    pub burst: u64,
    /// Arrivals per second at the beginning.
    pub from: f64,
    /// Arrivals per second at the end.
    pub to: f64,
    /// How long the stage takes, in milliseconds.
    #[serde(rename = "duration_ms", with = "crate::duration_ms")]
    pub duration: Duration,
}

impl Stage {
    /// A constant rate.
    pub fn constant(rate: f64, duration: Duration) -> Stage {
        Stage { burst: 0, from: rate, to: rate, duration }
    }

    /// Arrivals after the burst.
    fn flowing(&self) -> u64 {
        // A rate of 0.1 for 10 s is one arrival, not 0.999…
        ((self.from + self.to) / 2.0 * self.duration.as_secs_f64() + 1e-6) as u64
    }
}

#[derive(Debug, Clone, Copy)]
struct Stretch {
    start_ns: u64,
    first: u64,
    stage: Stage,
    flowing: u64,
}

impl Stretch {
    fn at_ns(&self, n: u64) -> u64 {
        let Some(k) = (n - self.first).checked_sub(self.stage.burst) else { return self.start_ns };
        let (k, from, to) = (k as f64, self.stage.from, self.stage.to);
        // Arrivals after t seconds: from·t + (to − from)·t² / 2d; solved for t, in the form that stays exact
        // when the rate hardly changes.
        let slope = (to - from) / self.stage.duration.as_secs_f64().max(1e-9);
        let seconds = if k == 0.0 {
            0.0
        } else if slope.abs() < 1e-12 {
            k / from
        } else {
            2.0 * k / (from + (from * from + 2.0 * slope * k).max(0.0).sqrt())
        };
        self.start_ns + (seconds * 1e9) as u64
    }

    /// About how many of the stretch are due after `ns` of it.
    fn about(&self, ns: u64) -> u64 {
        let t = (ns as f64 / 1e9).min(self.stage.duration.as_secs_f64());
        let slope = (self.stage.to - self.stage.from) / self.stage.duration.as_secs_f64().max(1e-9);
        self.stage.burst + (self.stage.from * t + slope * t * t / 2.0).max(0.0) as u64
    }

    fn count(&self) -> u64 {
        self.stage.burst + self.flowing
    }
}

/// The arrivals of a run, by number.
#[derive(Debug, Clone)]
pub struct Arrivals {
    stretches: Vec<Stretch>,
    total: u64,
    end_ns: u64,
}

impl Arrivals {
    /// The stages, one after the other.
    pub fn new(stages: &[Stage]) -> Arrivals {
        let (mut start_ns, mut first) = (0, 0);
        let mut stretches = Vec::with_capacity(stages.len());
        for stage in stages {
            let stretch = Stretch { start_ns, first, stage: *stage, flowing: stage.flowing() };
            first += stretch.count();
            start_ns += u64::try_from(stage.duration.as_nanos()).unwrap_or(u64::MAX);
            stretches.push(stretch);
        }
        Arrivals { stretches, total: first, end_ns: start_ns }
    }

    /// How many there are.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The end of the last stage, nanoseconds after the start.
    pub fn end_ns(&self) -> u64 {
        self.end_ns
    }

    /// When the `n`-th is due, nanoseconds after the start. `n` is below [`Arrivals::total`].
    pub fn at_ns(&self, n: u64) -> u64 {
        let after = self.stretches.partition_point(|stretch| stretch.first <= n);
        self.stretches[..after]
            .iter()
            .rev()
            .find(|stretch| n < stretch.first + stretch.count())
            .map_or(self.end_ns, |stretch| stretch.at_ns(n))
    }

    /// How many are due at `now_ns`.
    pub fn due(&self, now_ns: u64) -> u64 {
        let begun = self.stretches.partition_point(|stretch| stretch.start_ns <= now_ns);
        let Some(stretch) = self.stretches[..begun].last() else { return 0 };
        let about = stretch.about(now_ns - stretch.start_ns).min(stretch.count());
        let mut due = stretch.first + about;
        // The inverse is exact up to rounding: at most a few steps either way.
        while due < self.total && self.at_ns(due) <= now_ns {
            due += 1;
        }
        while due > 0 && self.at_ns(due - 1) > now_ns {
            due -= 1;
        }
        due
    }

    /// Arrivals per second that are asked for at `ns`; a burst counts as nothing.
    pub fn rate_at(&self, ns: u64) -> f64 {
        let begun = self.stretches.partition_point(|stretch| stretch.start_ns <= ns);
        let Some(stretch) = self.stretches[..begun].last() else { return 0.0 };
        let seconds = (ns - stretch.start_ns) as f64 / 1e9;
        let length = stretch.stage.duration.as_secs_f64();
        if seconds >= length {
            return 0.0;
        }
        stretch.stage.from + (stretch.stage.to - stretch.stage.from) * seconds / length
    }

    /// The rate of the whole: arrivals ÷ time.
    pub fn mean_rate(&self) -> f64 {
        if self.end_ns == 0 { self.total as f64 } else { self.total as f64 / (self.end_ns as f64 / 1e9) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_burst_is_due_at_once_and_a_rate_one_by_one() {
        let arrivals = Arrivals::new(&[
            Stage { burst: 3, from: 0.0, to: 0.0, duration: seconds(1) },
            Stage::constant(10.0, seconds(2)),
        ]);
        assert_eq!(arrivals.total(), 23);
        assert_eq!(
            (arrivals.at_ns(2), arrivals.at_ns(3), arrivals.at_ns(4)),
            (0, 1_000_000_000, 1_100_000_000)
        );
        assert_eq!((arrivals.due(0), arrivals.due(999_999_999), arrivals.due(1_000_000_000)), (3, 3, 4));
        assert_eq!(arrivals.due(u64::MAX / 2), 23);
    }

    #[test]
    fn a_ramp_offers_the_area_under_its_line() {
        for (from, to) in [(0.0, 1000.0), (1000.0, 0.0), (100.0, 900.0), (500.0, 500.000_001)] {
            let arrivals = Arrivals::new(&[Stage { burst: 0, from, to, duration: seconds(10) }]);
            assert!(arrivals.total().abs_diff(5000) <= 1, "{from}..{to}: {}", arrivals.total());
            let times: Vec<_> = (0..arrivals.total()).map(|n| arrivals.at_ns(n)).collect();
            assert!(times.is_sorted(), "{from}..{to}");
            assert!(*times.last().unwrap() <= 10_000_000_000, "{from}..{to}");
            for step in 0..100u64 {
                let now = step * 103_000_000;
                let expected = times.iter().filter(|at| **at <= now).count() as u64;
                assert_eq!(arrivals.due(now), expected, "{from}..{to} at {now}");
            }
        }
    }
}
