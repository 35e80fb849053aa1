//! What a run is: everything that decides its course, checked before anything is sent.

mod bundled;
mod file;
mod sale;

use std::path::PathBuf;
use std::time::Duration;

use seckill_domain::SaleId;
use serde::{Deserialize, Serialize};

pub use bundled::{BUNDLED, Bundled};
pub use file::{ScenarioFile, parse_duration};
pub use sale::SaleOffer;

use crate::arrivals::{Arrivals, Stage};
use crate::buyers::BUYERS_MAX;
use crate::persona::{Kind, Persona};
use crate::threshold::Threshold;
use crate::timeline::{LinkSpec, Step};

/// Buyers by default, at most: more arrivals than this and they come round again.
const BUYERS_DEFAULT_MAX: u64 = 1_000_000;

/// Access to the admin listener, for the books.
#[derive(Clone)]
pub struct Admin {
    /// `http://host[:port]`.
    pub url: String,
    /// An admin JWT.
    pub token: String,
}

/// One run of load.
#[derive(Clone, Serialize, Deserialize)]
#[serde(default)]
pub struct Scenario {
    /// What it is called.
    pub name: String,
    /// Public listeners, `http://host[:port]`; connections are spread over them in turn.
    pub targets: Vec<String>,
    /// Where the books are checked; `None` leaves the check out.
    #[serde(skip)]
    pub admin: Option<Admin>,
    /// The HS256 key for the buyers' tokens.
    #[serde(skip)]
    pub secret: Vec<u8>,
    /// A payments JWT, for scenarios in which somebody pays.
    #[serde(skip)]
    pub payments: Option<String>,
    /// Where `seckill up` or `cluster` keeps its data: for faults and commands of the timeline.
    #[serde(skip)]
    pub data_dir: Option<PathBuf>,
    /// `kid` of the tokens, left out if `None`.
    pub kid: Option<String>,
    /// The sale; personas may want others.
    pub sale: SaleId,
    /// Sales that are put on offer before the load, where they do not exist yet.
    pub offers: Vec<SaleOffer>,
    /// Arrivals of buyers per second, where there are no `stages`.
    pub rate: f64,
    /// For how long they arrive, where there are no `stages`.
    #[serde(rename = "duration_ms", with = "crate::duration_ms")]
    pub duration: Duration,
    /// The load as stages; overrides `rate` and `duration`.
    pub stages: Vec<Stage>,
    /// The first arrivals, for this long at the first stage's rate, are kept out of the figures (not of the books).
    #[serde(rename = "warmup_ms", with = "crate::duration_ms")]
    pub warmup: Duration,
    /// How many different buyers. More arrivals than buyers: they come round again with new keys.
    pub buyers: u32,
    /// Units of each purchase, where there are no `personas`.
    pub quantity: u32,
    /// Who arrives; empty: buyers made of the fields here.
    pub personas: Vec<Persona>,
    /// Connections, all workers together.
    pub connections: u32,
    /// All connections are open before the first arrival.
    pub warm_connections: bool,
    /// Threads of each process.
    pub workers: u32,
    /// Processes that send; 1: this one.
    pub processes: u32,
    /// How long an answer may take after its request was sent.
    #[serde(rename = "timeout_ms", with = "crate::duration_ms")]
    pub timeout: Duration,
    /// The share of arrivals that click twice (same key), where there are no `personas`.
    pub duplicates: f64,
    /// The share of arrivals that buy again (new key), where there are no `personas`.
    pub second_purchases: f64,
    /// Requests per purchase while the load runs, the first included, where there are no `personas`.
    pub max_attempts: u16,
    /// Wait as long as `Retry-After` asks, where there are no `personas`.
    pub honour_retry_after: bool,
    /// Each buyer sends an `X-Forwarded-For` of their own; personas with one address share one.
    pub forwarded_for: bool,
    /// Decides buyers, keys and choices.
    pub seed: u64,
    /// What the uids begin with; from the seed if `None`.
    pub uid_prefix: Option<String>,
    /// How long resolving, draining and the final audit may take together.
    #[serde(rename = "drain_timeout_ms", with = "crate::duration_ms")]
    pub drain_timeout: Duration,
    /// The run is invalid if the generator notices arrivals later than this (p99).
    pub max_lag_ms: u64,
    /// Others buy from the same sale: the ledger may hold more than this run accepted, not less.
    pub shared_sale: bool,
    /// What is done to the target while the load runs.
    pub timeline: Vec<Step>,
    /// Links of the harness' own, to be cut and delayed by the timeline.
    pub links: Vec<LinkSpec>,
    /// What has to hold for the run to pass.
    pub thresholds: Vec<Threshold>,
    /// Where the record of every purchase is kept; `None`: in a temporary folder that goes with the run.
    pub ledger_dir: Option<PathBuf>,
}

/// A scenario that cannot be run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

impl Default for Scenario {
    fn default() -> Scenario {
        let sale = match SaleId::new("sale") {
            Ok(sale) => sale,
            Err(_) => unreachable!("a sale's id may be lower case letters"),
        };
        Scenario {
            name: String::new(),
            targets: Vec::new(),
            admin: None,
            secret: Vec::new(),
            payments: None,
            data_dir: None,
            kid: None,
            sale,
            offers: Vec::new(),
            rate: 1000.0,
            duration: Duration::from_secs(10),
            stages: Vec::new(),
            warmup: Duration::ZERO,
            buyers: 10_000,
            quantity: 1,
            personas: Vec::new(),
            connections: 256,
            warm_connections: false,
            workers: default_workers(),
            processes: 1,
            timeout: Duration::from_secs(10),
            duplicates: 0.0,
            second_purchases: 0.0,
            max_attempts: 5,
            honour_retry_after: true,
            forwarded_for: false,
            seed: 0,
            uid_prefix: None,
            drain_timeout: Duration::from_secs(30),
            max_lag_ms: 50,
            shared_sale: false,
            timeline: Vec::new(),
            links: Vec::new(),
            thresholds: Vec::new(),
            ledger_dir: None,
        }
    }
}

impl Scenario {
    /// A scenario with the defaults of the command line: 1,000 arrivals per second for 10 s, a buyer each.
    pub fn new(target: &str, secret: &[u8], sale: SaleId) -> Scenario {
        Scenario {
            targets: vec![target.to_owned()],
            secret: secret.to_owned(),
            sale,
            seed: random_seed(),
            ..Scenario::default()
        }
    }

    /// The load's stages, the warm-up in front.
    pub fn all_stages(&self) -> Vec<Stage> {
        let mut stages = if self.stages.is_empty() {
            vec![Stage::constant(self.rate, self.duration)]
        } else {
            self.stages.clone()
        };
        if self.warmup > Duration::ZERO {
            let rate = stages.iter().map(|stage| stage.from.max(stage.to)).find(|rate| *rate > 0.0);
            stages.insert(0, Stage::constant(rate.unwrap_or(self.rate), self.warmup));
        }
        stages
    }

    /// The arrivals of the whole run.
    pub fn arrivals(&self) -> Arrivals {
        Arrivals::new(&self.all_stages())
    }

    /// As many buyers as arrivals, up to a bound: what is taken where nobody says how many.
    pub fn buyers_by_default(&self) -> u32 {
        self.arrivals().total().clamp(1, BUYERS_DEFAULT_MAX) as u32
    }

    /// Who arrives: the personas, or the one that the plain fields describe.
    pub fn all_personas(&self) -> Vec<Persona> {
        if !self.personas.is_empty() {
            return self.personas.clone();
        }
        vec![Persona {
            quantity: self.quantity,
            duplicates: self.duplicates,
            second_purchases: self.second_purchases,
            max_attempts: self.max_attempts,
            honour_retry_after: self.honour_retry_after,
            ..Persona::of(Kind::Buyer, self.sale.as_str())
        }]
    }

    /// Every sale that somebody wants, the scenario's own first.
    pub fn all_sales(&self) -> Vec<String> {
        let mut sales = vec![self.sale.to_string()];
        for persona in self.all_personas() {
            for sale in std::iter::once(persona.sale).chain(persona.coupon) {
                if !sales.contains(&sale) {
                    sales.push(sale);
                }
            }
        }
        sales
    }

    /// Checks every bound.
    pub fn validate(&self) -> Result<(), Invalid> {
        let require = |holds: bool, text: &str| if holds { Ok(()) } else { Err(Invalid(text.to_owned())) };
        require(!self.targets.is_empty(), "at least one --target is needed")?;
        let rate = |rate: f64| (0.0..=10e6).contains(&rate);
        require(
            rate(self.rate) && self.rate > 0.0,
            "--rate is more than 0 and at most 10,000,000 per second",
        )?;
        require(
            self.stages.iter().all(|stage| rate(stage.from) && rate(stage.to) && stage.burst <= 10_000_000),
            "a stage's rate is at most 10,000,000 per second, and so is its burst",
        )?;
        let whole: Duration = self.all_stages().iter().map(|stage| stage.duration).sum();
        require(
            self.duration > Duration::ZERO && whole <= Duration::from_secs(86_400),
            "--duration is more than 0 and at most a day",
        )?;
        require((1..=BUYERS_MAX).contains(&self.buyers), "--buyers is 1 to 16,777,216")?;
        require(self.quantity >= 1, "--quantity is at least 1")?;
        require((1..=64).contains(&self.workers), "--workers is 1 to 64")?;
        require((1..=64).contains(&self.processes), "--processes is 1 to 64")?;
        require(
            (self.workers * self.processes..=65_536).contains(&self.connections),
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
        let arrivals = self.arrivals().total();
        require(arrivals >= 1, "rate × duration is less than one arrival")?;
        require(
            arrivals / u64::from(self.buyers) < 1 << 24,
            "--buyers is too few for rate × duration: nobody may come more than 16,777,216 times",
        )?;
        require(self.personas.len() <= 32, "at most 32 personas")?;
        let personas = self.all_personas();
        for persona in &personas {
            persona.validate().map_err(Invalid)?;
            require(
                self.payments.is_some() || (persona.pays == 0.0 && persona.coupon.is_none()),
                "somebody pays: --payments-token-file (or --data-dir) is needed",
            )?;
        }
        require(personas.iter().any(|persona| persona.share > 0.0), "every persona's share is 0")?;
        require(self.all_sales().len() <= 64, "at most 64 sales")?;
        for sale in self.all_sales() {
            SaleId::new(&sale).map_err(|err| Invalid(format!("sale {sale}: {err}")))?;
        }
        let names: Vec<&str> = self.links.iter().map(|link| link.name.as_str()).collect();
        for step in &self.timeline {
            step.validate(&names, self.data_dir.is_some()).map_err(Invalid)?;
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_run_is_refused() {
        let good = Scenario::new("http://127.0.0.1:1", b"secret", SaleId::new("s").unwrap());
        assert_eq!(good.validate(), Ok(()));
        let bad: [fn(&mut Scenario); 9] = [
            |s| s.rate = 0.0,
            |s| s.rate = f64::NAN,
            |s| s.buyers = 0,
            |s| s.duplicates = 1.1,
            |s| s.duration = Duration::ZERO,
            |s| s.connections = 0,
            |s| s.uid_prefix = Some("a\"".to_owned()),
            |s| s.personas = vec![Persona::of(Kind::Human, "s")],
            |s| s.personas = vec![Persona { share: 0.0, ..Persona::of(Kind::Buyer, "s") }],
        ];
        for (i, spoil) in bad.iter().enumerate() {
            let mut scenario = good.clone();
            spoil(&mut scenario);
            assert!(scenario.validate().is_err(), "{i}");
        }
    }

    #[test]
    fn the_warm_up_comes_first_and_at_the_loads_own_rate() {
        let mut scenario = Scenario::new("http://127.0.0.1:1", b"secret", SaleId::new("s").unwrap());
        scenario.warmup = Duration::from_secs(2);
        scenario.stages = vec![
            Stage { burst: 10, from: 0.0, to: 0.0, duration: Duration::from_secs(1) },
            Stage::constant(50.0, Duration::from_secs(1)),
        ];
        let arrivals = scenario.arrivals();
        assert_eq!(arrivals.total(), 100 + 10 + 50);
        assert_eq!(arrivals.at_ns(100), 2_000_000_000);
    }
}
