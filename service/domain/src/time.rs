//! Points in time, in milliseconds, and where they come from.

use std::fmt;
use std::sync::atomic::{AtomicI64, Ordering};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A point in time: milliseconds since the Unix epoch. JSON shows it as RFC 3339 in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Millis(pub i64);

impl Millis {
    /// 9999-12-30T22:00:00Z, the last point that can be named in every time zone: what RFC 3339 can name
    /// and `jiff` reads back.
    pub const MAX: Millis = Millis(253_402_207_200_000);

    /// This point plus some milliseconds, never past [`Millis::MAX`].
    pub fn plus_ms(self, ms: i64) -> Millis {
        Millis(self.0.saturating_add(ms).min(Millis::MAX.0))
    }

    /// This point plus some seconds, never past [`Millis::MAX`].
    pub fn plus_s(self, seconds: u32) -> Millis {
        self.plus_ms(i64::from(seconds) * 1000)
    }

    /// Milliseconds from `earlier` to this point, 0 if `earlier` is later.
    pub fn since_ms(self, earlier: Millis) -> u64 {
        u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0)
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_millisecond(self.0) {
            Ok(timestamp) => write!(f, "{timestamp:.3}"),
            Err(_) => write!(f, "{}ms", self.0),
        }
    }
}

impl Serialize for Millis {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Millis {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let timestamp = jiff::Timestamp::deserialize(deserializer)?;
        Ok(Millis(timestamp.as_millisecond()))
    }
}

/// Where a task takes the time from; tests of expiry bring a [`ManualClock`].
pub trait Clock: Send + Sync + 'static {
    /// The time now.
    fn now(&self) -> Millis;
}

/// The system's wall clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Millis {
        Millis(jiff::Timestamp::now().as_millisecond())
    }
}

/// A clock that stands still until it is moved.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicI64);

impl ManualClock {
    /// A clock that shows `now`.
    pub fn new(now: Millis) -> ManualClock {
        ManualClock(AtomicI64::new(now.0))
    }

    /// Moves the clock on.
    pub fn advance_ms(&self, ms: i64) {
        self.0.fetch_add(ms, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Millis {
        Millis(self.0.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_moment_survives_json() {
        let json = serde_json::to_string(&Millis(5).plus_ms(i64::MAX)).unwrap();
        assert_eq!(serde_json::from_str::<Millis>(&json).unwrap(), Millis::MAX);
        assert!(jiff::Timestamp::from_millisecond(Millis::MAX.0 + 1).is_err());
    }

    #[test]
    fn json_shows_rfc_3339_with_milliseconds() {
        let json = serde_json::to_string(&Millis(1_732_150_000_120)).unwrap();
        assert_eq!(json, r#""2024-11-21T00:46:40.120Z""#);
        assert_eq!(serde_json::from_str::<Millis>(&json).unwrap(), Millis(1_732_150_000_120));
        let offset: Millis = serde_json::from_str(r#""2024-11-21T08:46:40.12+08:00""#).unwrap();
        assert_eq!(offset, Millis(1_732_150_000_120));
    }
}
