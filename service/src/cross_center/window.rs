//! The replay window of a session: which sequence numbers were seen.

/// Numbers below the highest one that may still arrive late: requests overtake each other on their way.
pub const WINDOW: u64 = 1024;

const WORDS: usize = (WINDOW / 64) as usize;

/// Remembers which of the last [`WINDOW`] numbers were seen; anything older counts as seen (RFC 4303, appendix A2
/// describes the same idea for IPsec).
#[derive(Debug, Default)]
pub struct ReplayWindow {
    highest: u64,
    /// Bit `seq % WINDOW`: whether `seq` was seen.
    seen: [u64; WORDS],
}

impl ReplayWindow {
    /// Takes note of a number. False if it was seen before, or is too old to tell. Numbers start at 1.
    pub fn admit(&mut self, seq: u64) -> bool {
        if seq == 0 || seq.saturating_add(WINDOW) <= self.highest {
            return false;
        }
        if seq > self.highest {
            if seq - self.highest >= WINDOW {
                self.seen = [0; WORDS];
            } else {
                for skipped in self.highest + 1..seq {
                    self.put(skipped, false);
                }
            }
            self.highest = seq;
        } else if self.get(seq) {
            return false;
        }
        self.put(seq, true);
        true
    }

    fn get(&self, seq: u64) -> bool {
        let bit = seq % WINDOW;
        self.seen[(bit / 64) as usize] & (1 << (bit % 64)) != 0
    }

    fn put(&mut self, seq: u64, seen: bool) {
        let bit = seq % WINDOW;
        let (word, mask) = (&mut self.seen[(bit / 64) as usize], 1 << (bit % 64));
        if seen {
            *word |= mask;
        } else {
            *word &= !mask;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_number_passes_once_and_late_ones_within_the_window() {
        let mut window = ReplayWindow::default();
        assert!(!window.admit(0));
        assert!(window.admit(1));
        assert!(!window.admit(1));
        assert!(window.admit(5));
        assert!(window.admit(3));
        assert!(!window.admit(3));
        assert!(window.admit(WINDOW + 5));
        assert!(!window.admit(5), "just fell out of the window");
        assert!(window.admit(6), "the oldest number in the window");
        assert!(!window.admit(6));
        assert!(window.admit(u64::MAX));
        assert!(!window.admit(u64::MAX));
        assert!(!window.admit(WINDOW + 6));
    }

    #[test]
    fn it_agrees_with_a_set_that_forgets_nothing() {
        let seed: u64 =
            std::env::var("SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
        println!("SEED={seed}");
        let mut state = seed | 1;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let (mut window, mut seen, mut highest) = (ReplayWindow::default(), HashSet::new(), 0u64);
        for _ in 0..50_000 {
            let seq = (highest + 2 + random() % 40).saturating_sub(random() % (2 * WINDOW));
            let expected = seq != 0 && seq + WINDOW > highest && seen.insert(seq);
            assert_eq!(window.admit(seq), expected, "{seq} after {highest}");
            highest = highest.max(seq);
        }
    }
}
