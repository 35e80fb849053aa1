//! What a run is: everything that decides its course, checked before anything is sent.

use std::time::Duration;

use seckill_domain::SaleId;
use serde::Serialize;

use crate::buyers::BUYERS_MAX;
use crate::record::PURCHASES_MAX;

/// Access to the admin listener, for the books.
#[derive(Clone)]
pub struct Admin {
    /// `http://host[:port]`.
    pub url: String,
    /// An admin JWT.
    pub token: String,
}

/// One run of load against one sale.
#[derive(Clone, Serialize)]
pub struct Scenario {
    /// Public listeners, `http://host[:port]`; connections are spread over them in turn.
    pub targets: Vec<String>,
    /// Where the books are checked; `None` leaves the check out.
    #[serde(skip)]
    pub admin: Option<Admin>,
    /// The HS256 key for the buyers' tokens.
    #[serde(skip)]
    pub secret: Vec<u8>,
    /// `kid` of the tokens, left out if `None`.
    pub kid: Option<String>,
    /// The sale.
    pub sale: SaleId,
    /// Arrivals of buyers per second.
    pub rate: f64,
    /// For how long they arrive.
    #[serde(rename = "duration_ms", serialize_with = "as_ms")]
    pub duration: Duration,
    /// How many different buyers. More arrivals than buyers: they come round again with new keys.
    pub buyers: u32,
    /// Units of each purchase.
    pub quantity: u32,
    /// Connections, all workers together.
    pub connections: u32,
    /// Threads.
    pub workers: u32,
    /// How long an answer may take after its request was sent.
    #[serde(rename = "timeout_ms", serialize_with = "as_ms")]
    pub timeout: Duration,
    /// The share of arrivals that click twice (same key).
    pub duplicates: f64,
    /// The share of arrivals that buy again (new key).
    pub second_purchases: f64,
    /// Requests per purchase while the load runs, the first included.
    pub max_attempts: u16,
    /// Wait as long as `Retry-After` asks.
    pub honour_retry_after: bool,
    /// Decides buyers, keys and choices.
    pub seed: u64,
    /// What the uids begin with; from the seed if `None`.
    pub uid_prefix: Option<String>,
    /// How long resolving, draining and the final audit may take together.
    #[serde(rename = "drain_timeout_ms", serialize_with = "as_ms")]
    pub drain_timeout: Duration,
    /// The run is invalid if the generator notices arrivals later than this (p99).
    pub max_lag_ms: u64,
    /// Others buy from the same sale: the ledger may hold more than this run accepted, not less.
    pub shared_sale: bool,
}

fn as_ms<S: serde::Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

/// A scenario that cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(String);

impl Scenario {
    /// A scenario with the defaults of the command line: 1,000 arrivals per second for 10 s, a buyer each.
    pub fn new(target: &str, secret: &[u8], sale: SaleId) -> Scenario {
        Scenario {
            targets: vec![target.to_owned()],
            admin: None,
            secret: secret.to_owned(),
            kid: None,
            sale,
            rate: 1000.0,
            duration: Duration::from_secs(10),
            buyers: 10_000,
            quantity: 1,
            connections: 256,
            workers: default_workers(),
            timeout: Duration::from_secs(10),
            duplicates: 0.0,
            second_purchases: 0.0,
            max_attempts: 5,
            honour_retry_after: true,
            seed: random_seed(),
            uid_prefix: None,
            drain_timeout: Duration::from_secs(30),
            max_lag_ms: 50,
            shared_sale: false,
        }
    }

    /// Arrivals of the whole run.
    pub fn arrivals(&self) -> u64 {
        // A rate of 0.1 for 10 s is one arrival, not 0.999…
        (self.rate * self.duration.as_secs_f64() + 1e-6) as u64
    }

    /// Checks every bound.
    pub fn validate(&self) -> Result<(), Invalid> {
        let require = |holds: bool, text: &str| if holds { Ok(()) } else { Err(Invalid(text.to_owned())) };
        require(!self.targets.is_empty(), "at least one --target is needed")?;
        require(
            self.rate > 0.0 && self.rate <= 10e6,
            "--rate is more than 0 and at most 10,000,000 per second",
        )?;
        require(
            self.duration > Duration::ZERO && self.duration <= Duration::from_secs(86_400),
            "--duration is more than 0 and at most a day",
        )?;
        require((1..=BUYERS_MAX).contains(&self.buyers), "--buyers is 1 to 16,777,216")?;
        require(self.quantity >= 1, "--quantity is at least 1")?;
        require((1..=64).contains(&self.workers), "--workers is 1 to 64")?;
        require(
            (self.workers..=65_536).contains(&self.connections),
            "--connections is at least one for each worker and at most 65,536",
        )?;
        require(self.timeout >= Duration::from_millis(1), "--timeout-ms is at least 1")?;
        let share = |share: f64| (0.0..=1.0).contains(&share);
        require(share(self.duplicates), "--duplicates is a share from 0 to 1")?;
        require(share(self.second_purchases), "--second-purchases is a share from 0 to 1")?;
        require((1..=100).contains(&self.max_attempts), "--max-attempts is 1 to 100")?;
        require(!self.secret.is_empty(), "the token secret is empty")?;
        let prefix = self.uid_prefix.as_deref().unwrap_or("x");
        require(
            !prefix.is_empty()
                && prefix.len() <= 64
                && prefix.bytes().all(|byte| byte.is_ascii_alphanumeric()),
            "--uid-prefix is 1 to 64 letters and digits",
        )?;
        let arrivals = self.arrivals();
        require(arrivals >= 1, "rate × duration is less than one arrival")?;
        let purchases = arrivals as f64 * (1.0 + self.second_purchases);
        require(
            purchases <= PURCHASES_MAX as f64,
            "rate × duration is more than the 67,108,864 purchases that are kept for the books",
        )?;
        require(
            arrivals / u64::from(self.buyers) < u64::from(u16::MAX / 2),
            "--buyers is too few for rate × duration: nobody may come more than 32,767 times",
        )
    }
}

/// Half of the cores: the other half is for the target.
pub fn default_workers() -> u32 {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() as u32 / 2).clamp(1, 64))
}

/// A seed that every JSON reader can hold (below 2^53).
pub fn random_seed() -> u64 {
    rand::random::<u64>() >> 11
}

/// `10s`, `1500ms`, `2m`, `1h`, or a number of seconds.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match &text[digits.len()..] {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("a duration is a number with ms, s, m or h".to_owned()),
    };
    let number: f64 = digits.parse().map_err(|_| "a duration is a number with ms, s, m or h".to_owned())?;
    Duration::try_from_secs_f64(number * scale).map_err(|err| err.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_and_without_a_unit() {
        for (text, ms) in [("10", 10_000), ("10s", 10_000), ("1500ms", 1500), ("0.5s", 500), ("2m", 120_000)]
        {
            assert_eq!(parse_duration(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for text in ["", "s", "-1s", "10 s", "10d", "nan"] {
            assert!(parse_duration(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        let good = Scenario::new("http://127.0.0.1:1", b"secret", SaleId::new("s").unwrap());
        assert_eq!(good.validate(), Ok(()));
        let bad: [fn(&mut Scenario); 8] = [
            |s| s.rate = 0.0,
            |s| s.rate = f64::NAN,
            |s| s.buyers = 0,
            |s| s.duplicates = 1.1,
            |s| s.duration = Duration::ZERO,
            |s| s.connections = 0,
            |s| s.uid_prefix = Some("a\"".to_owned()),
            |s| (s.rate, s.duration) = (1e6, Duration::from_secs(3600)),
        ];
        for (i, spoil) in bad.iter().enumerate() {
            let mut scenario = good.clone();
            spoil(&mut scenario);
            assert!(scenario.validate().is_err(), "{i}");
        }
    }
}
