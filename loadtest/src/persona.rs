//! Who arrives: kinds of buyers with shares of the arrivals, and what each kind does.

use serde::{Deserialize, Serialize};

/// A kind of buyer. It decides the defaults of everything else a persona does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Clicks once and retries politely. The default.
    Buyer,
    /// Looks at the sale, thinks, buys, follows the order and pays more often than not.
    Human,
    /// Clicks twice, under the same key.
    DoubleClicker,
    /// Asks again and again, whatever the answer was.
    RetryStorm,
    /// One address, many users, no pause.
    Bot,
    /// Sends tokens that nobody signed.
    Forger,
    /// Buys and never pays.
    Abandoner,
    /// Only looks.
    Browser,
}

impl Kind {
    /// Its name in scenario files.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Buyer => "buyer",
            Kind::Human => "human",
            Kind::DoubleClicker => "double_clicker",
            Kind::RetryStorm => "retry_storm",
            Kind::Bot => "bot",
            Kind::Forger => "forger",
            Kind::Abandoner => "abandoner",
            Kind::Browser => "browser",
        }
    }
}

/// A pause of random length, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Pause {
    /// At least this long.
    pub min_ms: u32,
    /// At most this long.
    pub max_ms: u32,
}

impl Pause {
    /// The pause at `chance` (0 to 1) of the way, in nanoseconds.
    pub fn ns(self, chance: f64) -> u64 {
        let spread = f64::from(self.max_ms.saturating_sub(self.min_ms)) * 1e6;
        u64::from(self.min_ms) * 1_000_000 + (spread * chance) as u64
    }
}

/// What one share of the arrivals does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Persona {
    /// The kind it was made from.
    pub kind: Kind,
    /// How many of the arrivals, relative to the other personas.
    pub share: f64,
    /// Which of the scenario's sales it wants.
    pub sale: String,
    /// Units of each purchase. 0: it never buys.
    pub quantity: u32,
    /// Looks at the sale before the click, this many times.
    pub looks: u16,
    /// Before the click, and between looks.
    pub think: Pause,
    /// The share that clicks twice (same key), half of them at once, the rest within 100 ms.
    pub duplicates: f64,
    /// The share that buys again (new key) within 500 ms.
    pub second_purchases: f64,
    /// Requests per purchase while the load runs, the first included; only retryable and unknown answers are
    /// asked again.
    pub max_attempts: u16,
    /// Wait as long as `Retry-After` asks.
    pub honour_retry_after: bool,
    /// Asks again this many times, under the same key, though the answer was final.
    pub stubborn: u16,
    /// The first wait before a retry, doubled each time, in milliseconds.
    pub backoff_ms: u32,
    /// Sends forged tokens.
    pub forged: bool,
    /// All of this kind come from one address (`X-Forwarded-For`, where the scenario sends it).
    pub one_address: bool,
    /// Follows its order until it is stored.
    pub follows: bool,
    /// The share of the winners that pay.
    pub pays: f64,
    /// The share of the winners that cancel.
    pub cancels: f64,
    /// Between seeing the stored order and paying or cancelling.
    pub decides: Pause,
    /// Claims a coupon of this sale first and pays with it.
    pub coupon: Option<String>,
}

impl Persona {
    /// A persona with the defaults of its kind.
    pub fn of(kind: Kind, sale: &str) -> Persona {
        let plain = Persona {
            kind,
            share: 1.0,
            sale: sale.to_owned(),
            quantity: 1,
            looks: 0,
            think: Pause::default(),
            duplicates: 0.0,
            second_purchases: 0.0,
            max_attempts: 5,
            honour_retry_after: true,
            stubborn: 0,
            backoff_ms: 50,
            forged: false,
            one_address: false,
            follows: false,
            pays: 0.0,
            cancels: 0.0,
            decides: Pause::default(),
            coupon: None,
        };
        match kind {
            Kind::Buyer => plain,
            Kind::Human => Persona {
                looks: 1,
                think: Pause { min_ms: 500, max_ms: 2000 },
                follows: true,
                pays: 0.8,
                cancels: 0.05,
                decides: Pause { min_ms: 200, max_ms: 1500 },
                ..plain
            },
            Kind::DoubleClicker => Persona { duplicates: 1.0, ..plain },
            Kind::RetryStorm => {
                Persona { max_attempts: 20, honour_retry_after: false, stubborn: 5, backoff_ms: 20, ..plain }
            }
            Kind::Bot => Persona {
                max_attempts: 10,
                honour_retry_after: false,
                second_purchases: 0.5,
                backoff_ms: 10,
                one_address: true,
                ..plain
            },
            Kind::Forger => Persona { forged: true, max_attempts: 1, ..plain },
            Kind::Abandoner => Persona { follows: true, ..plain },
            Kind::Browser => {
                Persona { quantity: 0, looks: 3, think: Pause { min_ms: 200, max_ms: 1000 }, ..plain }
            }
        }
    }

    /// Checks every bound; the text of what is wrong.
    pub fn validate(&self) -> Result<(), String> {
        let name = self.kind.name();
        let require = |holds: bool, text: &str| if holds { Ok(()) } else { Err(format!("{name}: {text}")) };
        let share = |share: f64| (0.0..=1.0).contains(&share);
        require(self.share >= 0.0 && self.share.is_finite(), "share is 0 or more")?;
        require(share(self.duplicates), "duplicates is a share from 0 to 1")?;
        require(share(self.second_purchases), "second purchases is a share from 0 to 1")?;
        require(
            share(self.pays) && share(self.cancels) && self.pays + self.cancels <= 1.0 + 1e-9,
            "pays and cancels are shares, together at most 1",
        )?;
        require((1..=100).contains(&self.max_attempts), "max attempts is 1 to 100")?;
        require(self.stubborn <= 1000, "stubborn is at most 1000")?;
        require(self.looks <= 1000, "looks is at most 1000")?;
        require(self.quantity > 0 || self.looks > 0, "it neither looks nor buys")?;
        require(self.quantity > 0 || self.coupon.is_none(), "a coupon without a purchase")?;
        require(!(self.forged && self.coupon.is_some()), "a forger claims no coupon")?;
        require((1..=60_000).contains(&self.backoff_ms), "backoff is 1 to 60,000 ms")?;
        require(
            self.think.min_ms <= self.think.max_ms && self.decides.min_ms <= self.decides.max_ms,
            "a pause is at most as long as its maximum",
        )
    }
}
