//! Whether the generator itself kept up: what a run measured is only worth something if it did.

use std::time::Instant;

use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A worker this busy has no time left to be punctual.
pub const BUSY_MAX: f64 = 0.95;

/// Less than this share of the arrivals sent within the duration counts as "rate not kept".
pub const SENT_IN_TIME_MIN: f64 = 0.99;

/// A point in the life of the current thread.
#[derive(Clone, Copy)]
pub struct Mark {
    at: Instant,
    cpu_s: f64,
    runqueue_s: f64,
}

impl Mark {
    /// Now, in the current thread.
    pub fn now() -> Mark {
        let cpu = clock_gettime(ClockId::ThreadCPUTime);
        // Second number of schedstat: nanoseconds spent waiting for a core. Absent on kernels without
        // CONFIG_SCHED_INFO; then only CPU time counts.
        let runqueue_ns = std::fs::read_to_string("/proc/thread-self/schedstat")
            .ok()
            .and_then(|text| text.split_whitespace().nth(1)?.parse::<f64>().ok())
            .unwrap_or(0.0);
        Mark {
            at: Instant::now(),
            cpu_s: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
            runqueue_s: runqueue_ns / 1e9,
        }
    }

    /// What the thread used since then.
    pub fn elapsed(&self) -> Usage {
        let now = Mark::now();
        Usage {
            wall_s: now.at.duration_since(self.at).as_secs_f64(),
            cpu_s: now.cpu_s - self.cpu_s,
            runqueue_s: now.runqueue_s - self.runqueue_s,
        }
    }
}

/// What a worker's thread used while it was sending.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Seconds that passed.
    pub wall_s: f64,
    /// Seconds of CPU time.
    pub cpu_s: f64,
    /// Seconds it could have run and had to wait for a core.
    pub runqueue_s: f64,
}

impl Usage {
    /// The share of the time in which the thread ran or wanted to.
    pub fn busy(&self) -> f64 {
        if self.wall_s > 0.0 { (self.cpu_s + self.runqueue_s) / self.wall_s } else { 0.0 }
    }
}

/// Why the run says nothing about the target, if so. `sent_in_time`: the share of the arrivals that were sent
/// within the duration; `lag_us`: how late the generator looked at arrivals, whoever's fault their waiting
/// for a connection then was.
pub fn verdict(usage: &[Usage], sent_in_time: f64, lag_us: &Histogram<u64>, max_lag_ms: u64) -> Vec<String> {
    let mut reasons = Vec::new();
    let lag_p99_us = lag_us.value_at_quantile(0.99);
    if lag_p99_us > max_lag_ms * 1000 {
        reasons.push(format!(
            "the generator noticed arrivals late: p99 {:.1} ms, allowed {max_lag_ms} ms",
            lag_p99_us as f64 / 1000.0
        ));
    }
    let busiest = usage.iter().map(Usage::busy).fold(0.0, f64::max);
    if sent_in_time < SENT_IN_TIME_MIN && busiest >= BUSY_MAX {
        reasons.push(format!(
            "the generator sent {:.1} % of the arrivals in time and its busiest worker was {:.0} % busy",
            sent_in_time * 100.0,
            busiest * 100.0
        ));
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lag(us: u64) -> Histogram<u64> {
        let mut lag = Histogram::new_with_bounds(1, 3_600_000_000, 3).unwrap();
        lag.record_n(us, 1000).unwrap();
        lag
    }

    #[test]
    fn a_slow_target_is_not_the_generators_fault() {
        let idle = Usage { wall_s: 10.0, cpu_s: 2.0, runqueue_s: 1.0 };
        assert!(verdict(&[idle], 0.5, &lag(100), 50).is_empty());
    }

    #[test]
    fn a_saturated_or_late_generator_makes_the_run_invalid() {
        let busy = Usage { wall_s: 10.0, cpu_s: 7.0, runqueue_s: 2.9 };
        assert_eq!(verdict(&[busy], 0.5, &lag(100), 50).len(), 1);
        assert!(verdict(&[busy], 1.0, &lag(100), 50).is_empty(), "busy, but it kept the rate");
        assert_eq!(verdict(&[Usage::default()], 1.0, &lag(80_000), 50).len(), 1);
    }
}
