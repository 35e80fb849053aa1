//! What all workers of a run have in common, made from the scenario.

use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::arrivals::Arrivals;
use crate::buyers::{Buyers, TokenTerms, chance};
use crate::client::Target;
use crate::outcome::Asked;
use crate::persona::Persona;
use crate::request::{Requests, Sender};
use crate::scenario::Scenario;

/// Bots behind one address send this one (TEST-NET-1).
const BOTS_ADDRESS: u32 = 0xc000_0242;
/// Buyers' addresses begin here (10.0.0.0/8).
const FIRST_ADDRESS: u32 = 0x0a00_0000;
/// Tokens outlive the run by this much.
const TOKEN_SPARE_S: i64 = 3600;

/// A persona with its place among the others.
pub struct Cast {
    /// What it does.
    pub persona: Persona,
    /// The item it looks at and buys.
    pub item: u8,
    /// The coupon it claims first.
    pub coupon_item: Option<u8>,
    /// Cumulated shares, up to 1.
    up_to: f64,
}

/// The terms of a coupon's sale.
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
pub struct CouponTerms {
    /// What it takes off, minor units.
    pub discount: u64,
    /// What the order must come to, minor units.
    pub min_amount: u64,
}

/// What all workers of a run have in common.
pub struct Plan {
    /// Addresses of the targets, each with its requests.
    pub targets: Vec<(SocketAddr, Requests)>,
    /// Who buys.
    pub buyers: Buyers,
    /// What can be bought: sale and quantity.
    pub items: Vec<Asked>,
    /// By item: the coupon's terms, where it is one.
    pub coupons: Vec<CouponTerms>,
    /// Who arrives.
    pub cast: Vec<Cast>,
    /// When.
    pub arrivals: Arrivals,
    /// Workers, of all processes together.
    pub workers: u32,
    /// Connections of each worker.
    pub connections: usize,
    /// They are opened before the start.
    pub warm_connections: bool,
    /// How long an answer may take after its request was sent.
    pub timeout: Duration,
    /// Requests that were intended before this are kept out of the figures.
    pub warmup_ns: u64,
    /// Buyers send an address of their own.
    pub forwarded_for: bool,
    /// The seed of every choice.
    pub seed: u64,
    /// Set from outside to end the arrivals early.
    pub interrupted: AtomicBool,
}

impl Plan {
    /// Signs the tokens; `progress` is told how many are done from time to time. `coupons`: the terms of the
    /// sales that are coupons, by name.
    pub fn new(
        scenario: &Scenario,
        targets: &[Target],
        coupons: &[(String, CouponTerms)],
        progress: impl FnMut(u32),
    ) -> Plan {
        let mut items: Vec<Asked> = Vec::new();
        let mut item = |sale: &str, quantity: u32| {
            let at = items.iter().position(|item| item.sale == sale && item.quantity == quantity);
            at.unwrap_or_else(|| {
                items.push(Asked { sale: sale.to_owned(), quantity });
                items.len() - 1
            }) as u8
        };
        let personas = scenario.all_personas();
        let sum: f64 = personas.iter().map(|persona| persona.share).sum();
        let mut up_to = 0.0;
        let cast: Vec<Cast> = personas
            .into_iter()
            .map(|persona| {
                up_to += persona.share / sum;
                Cast {
                    item: item(&persona.sale, persona.quantity.max(1)),
                    coupon_item: persona.coupon.as_deref().map(|sale| item(sale, 1)),
                    up_to,
                    persona,
                }
            })
            .collect();
        let arrivals = scenario.arrivals();
        let count = u64::from(scenario.buyers).min(arrivals.total()) as u32;
        let lifetime =
            Duration::from_nanos(arrivals.end_ns()) + 2 * scenario.timeout + scenario.drain_timeout;
        let expires_at_s = jiff::Timestamp::now().as_second() + lifetime.as_secs() as i64 + TOKEN_SPARE_S;
        let terms = TokenTerms { secret: &scenario.secret, kid: scenario.kid.as_deref(), expires_at_s };
        let buyers = Buyers::sign(scenario.seed, scenario.uid_prefix.as_deref(), count, &terms, progress);
        let workers = scenario.workers * scenario.processes;
        let terms_of = |asked: &Asked| {
            coupons.iter().find(|(sale, _)| *sale == asked.sale).map(|(_, terms)| *terms).unwrap_or_default()
        };
        Plan {
            targets: targets
                .iter()
                .map(|target| (target.addr(), Requests::new(target, &items, scenario.payments.as_deref())))
                .collect(),
            buyers,
            coupons: items.iter().map(terms_of).collect(),
            items,
            cast,
            workers,
            connections: (scenario.connections / workers) as usize,
            warm_connections: scenario.warm_connections,
            timeout: scenario.timeout,
            warmup_ns: u64::try_from(scenario.warmup.as_nanos()).unwrap_or(u64::MAX),
            forwarded_for: scenario.forwarded_for,
            seed: scenario.seed,
            arrivals,
            interrupted: AtomicBool::new(false),
        }
    }

    /// Who the `n`-th arrival is.
    pub fn persona_of(&self, n: u64) -> u8 {
        if self.cast.len() == 1 {
            return 0;
        }
        let chance = chance(self.seed, n, 0);
        let at = self.cast.iter().position(|cast| chance < cast.up_to && cast.persona.share > 0.0);
        // Rounding may leave the last sum a little below 1.
        at.or_else(|| self.cast.iter().rposition(|cast| cast.persona.share > 0.0)).unwrap_or(0) as u8
    }

    /// Whose request it is, seen from outside.
    pub fn sender(&self, user: u32, persona: u8) -> Sender {
        let address = || match self.cast[usize::from(persona)].persona.one_address {
            true => BOTS_ADDRESS,
            false => FIRST_ADDRESS | (user & 0x00ff_ffff),
        };
        Sender { user, forwarded_for: self.forwarded_for.then(address) }
    }

    /// The persona.
    pub fn persona(&self, at: u8) -> &Persona {
        &self.cast[usize::from(at)].persona
    }

    /// What was asked for.
    pub fn asked(&self, item: u8) -> &Asked {
        &self.items[usize::from(item)]
    }
}

/// Where the workers wait, warm, until all of them may start at the same instant.
#[derive(Default)]
pub struct Gate {
    state: Mutex<(u32, Option<Instant>)>,
    changed: Condvar,
}

impl Gate {
    /// A worker is warm; returns the start.
    pub fn wait(&self) -> Instant {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 += 1;
        self.changed.notify_all();
        loop {
            if let Some(start) = state.1 {
                return start;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How many workers are warm.
    pub fn ready(&self) -> u32 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Lets them start.
    pub fn open(&self, start: Instant) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = Some(start);
        self.changed.notify_all();
    }
}
