//! What an event did to the buyers, from pulses: what was served and what failed in every hundredth of a
//! second.

use serde::{Deserialize, Serialize};

/// Pulses in a second.
pub const PULSES_PER_SECOND: usize = 100;
const PULSE_MS: u64 = 1000 / PULSES_PER_SECOND as u64;
/// What was served in this time before an event is what should be served again after it.
const BEFORE: usize = 2 * PULSES_PER_SECOND;
/// Recovered means: as good as before for this long.
const STEADY: usize = PULSES_PER_SECOND / 2;
/// This share of the rate before counts as recovered.
const GOOD: f64 = 0.9;

/// One hundredth of a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulse {
    /// Purchases that were decided: accepted, or refused for good.
    pub served: u32,
    /// Requests that failed or whose fate is unknown.
    pub failed: u32,
}

impl Pulse {
    /// Adds another worker's.
    pub fn add(&mut self, other: Pulse) {
        self.served += other.served;
        self.failed += other.failed;
    }
}

/// What an event did to the buyers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Impact {
    /// The longest time without a decided purchase, in milliseconds.
    pub held_ms: u64,
    /// From the event until purchases are decided at the rate of before again, whatever else happened meanwhile;
    /// `null`: not before the end.
    pub recovery_ms: Option<u64>,
    /// From the first failed request to the last, in milliseconds.
    pub error_window_ms: u64,
    /// Failed requests.
    pub errors: u64,
}

/// The impact of what happened at `at_ms`, until `until_ms`: the next event or the end of the load at `end_ms`.
pub fn impact(pulses: &[Pulse], at_ms: u64, until_ms: u64, end_ms: u64) -> Impact {
    let index = |ms: u64| usize::try_from(ms / PULSE_MS).unwrap_or(usize::MAX).min(pulses.len());
    let (at, until) = (index(at_ms), index(until_ms));
    let during = &pulses[at..until.max(at)];
    let before = &pulses[at.saturating_sub(BEFORE)..at];
    let ms = |pulses: usize| pulses as u64 * PULSE_MS;

    let (mut longest, mut gap) = (0, 0);
    for pulse in during {
        gap = if pulse.served == 0 { gap + 1 } else { 0 };
        longest = longest.max(gap);
    }
    // At low rates pulses without a purchase are ordinary: what was ordinary before is not held.
    let ordinary = before.split(|pulse| pulse.served > 0).map(<[Pulse]>::len).max().unwrap_or(0);
    let held = if longest > ordinary { longest } else { 0 };

    let errors = during.iter().map(|pulse| u64::from(pulse.failed)).sum();
    let first = during.iter().position(|pulse| pulse.failed > 0);
    let last = during.iter().rposition(|pulse| pulse.failed > 0);
    let error_window_ms = first.zip(last).map_or(0, |(first, last)| ms(last + 1 - first));

    let usual = before.iter().map(|pulse| f64::from(pulse.served)).sum::<f64>() / before.len().max(1) as f64;
    let good = |window: &[Pulse]| {
        let served: f64 = window.iter().map(|pulse| f64::from(pulse.served)).sum();
        window.iter().all(|pulse| pulse.failed == 0)
            && served >= GOOD * usual * window.len() as f64
            && window.iter().take(ordinary + 1).any(|pulse| pulse.served > 0)
    };
    let disturbed = held > 0 || errors > 0;
    // What was held comes in one rush: before the rush nothing is recovered, whatever the average says.
    let from = if disturbed { last_disturbance(during, ordinary) } else { 0 };
    let recovery_ms = if disturbed {
        let rest = &pulses[at + from..index(end_ms).max(at + from)];
        rest.windows(STEADY).position(good).map(|steady| ms(from + steady))
    } else {
        Some(0)
    };
    Impact { held_ms: ms(held), recovery_ms, error_window_ms, errors }
}

/// The end of the last failure or extraordinary gap.
fn last_disturbance(during: &[Pulse], ordinary: usize) -> usize {
    let mut end = during.iter().rposition(|pulse| pulse.failed > 0).map_or(0, |at| at + 1);
    let mut gap = 0;
    for (at, pulse) in during.iter().enumerate() {
        gap = if pulse.served == 0 { gap + 1 } else { 0 };
        // Gaps at the very end are the load running out, unless they are long.
        if gap > ordinary.max(STEADY / 5) {
            end = end.max(at + 1);
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steady(seconds: usize) -> Vec<Pulse> {
        vec![Pulse { served: 10, failed: 0 }; seconds * PULSES_PER_SECOND]
    }

    #[test]
    fn nothing_happened_when_nothing_changed() {
        let impact = impact(&steady(10), 3000, 10_000, 10_000);
        assert_eq!(impact, Impact { held_ms: 0, recovery_ms: Some(0), error_window_ms: 0, errors: 0 });
    }

    #[test]
    fn held_purchases_errors_and_recovery_are_told_apart() {
        let mut pulses = steady(10);
        for pulse in &mut pulses[310..350] {
            *pulse = Pulse::default();
        }
        pulses[350].served = 400;
        let held = impact(&pulses, 3000, 10_000, 10_000);
        assert_eq!((held.held_ms, held.recovery_ms, held.errors), (400, Some(500), 0));

        for pulse in &mut pulses[310..350] {
            pulse.failed = 3;
        }
        let failed = impact(&pulses, 3000, 10_000, 10_000);
        assert_eq!((failed.error_window_ms, failed.errors, failed.held_ms), (400, 120, 400));
    }

    #[test]
    fn recovery_may_come_after_the_next_event() {
        let mut pulses = steady(10);
        pulses[301..360].fill(Pulse::default());
        let cut = impact(&pulses, 3000, 3600, 10_000);
        assert_eq!((cut.held_ms, cut.recovery_ms), (590, Some(600)));
    }

    #[test]
    fn what_does_not_come_back_has_no_recovery() {
        let mut pulses = steady(10);
        for pulse in &mut pulses[500..] {
            *pulse = Pulse::default();
        }
        let gone = impact(&pulses, 4900, 10_000, 10_000);
        assert_eq!((gone.recovery_ms, gone.held_ms), (None, 5000));
    }

    #[test]
    fn a_low_rate_is_not_a_stall() {
        let mut pulses = vec![Pulse::default(); 1000];
        for at in (0..1000).step_by(10) {
            pulses[at].served = 1;
        }
        assert_eq!(impact(&pulses, 5000, 10_000, 10_000).held_ms, 0);
    }
}
