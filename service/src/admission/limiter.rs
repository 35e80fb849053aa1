//! Rate limits: token buckets (GCRA) per user, client address, sale and instance.
//!
//! Each instance counts for itself. The limits come from the topology and are replaced at run time; a bucket
//! survives a change of other limits.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use governor::clock::{Clock, QuantaClock, QuantaInstant};
use governor::middleware::NoOpMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{NotUntil, Quota, RateLimiter};
use seckill_domain::{SaleId, Uid};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::buckets::Buckets;
use crate::topology::{Limits, Rate, Topology};

/// How often idle buckets are dropped.
const PRUNE_INTERVAL: Duration = Duration::from_secs(5);
/// Reads of one's own orders have a bucket of their own, this many times as wide as the one of purchases: a
/// buyer who polls an order must not use up the purchases.
const READS_PER_WRITE: NonZeroU32 = NonZeroU32::new(5).unwrap();

type Keyed = RateLimiter<u64, Buckets, QuantaClock, NoOpMiddleware<QuantaInstant>>;
type Direct = RateLimiter<NotKeyed, InMemoryState, QuantaClock, NoOpMiddleware<QuantaInstant>>;

/// What a limit counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Changes of one user: purchases, cancels.
    User,
    /// Reads of one user.
    UserReads,
    /// Calls from one client address.
    Address,
    /// Purchases of one sale.
    Sale,
    /// All calls to this instance.
    Instance,
}

impl Scope {
    /// The name in the `RateLimit` headers.
    pub fn name(self) -> &'static str {
        match self {
            Scope::User => "user",
            Scope::UserReads => "user-reads",
            Scope::Address => "address",
            Scope::Sale => "sale",
            Scope::Instance => "instance",
        }
    }
}

/// A call was over a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limited {
    /// Which limit.
    pub scope: Scope,
    /// Calls that the bucket holds.
    pub burst: u32,
    /// Seconds in which an empty bucket refills, at least 1.
    pub window_s: u32,
    /// Seconds until the next call has a chance, at least 1.
    pub retry_after_s: u32,
}

/// The limits of one instance. Clones share the buckets.
#[derive(Clone)]
pub struct Limiter(Arc<Shared>);

struct Shared {
    active: ArcSwap<Active>,
    hasher: RandomState,
    clock: QuantaClock,
}

#[derive(Default)]
struct Active {
    user: Option<Bounded<Keyed>>,
    user_reads: Option<Bounded<Keyed>>,
    address: Option<Bounded<Keyed>>,
    sale: Option<Bounded<Keyed>>,
    instance: Option<Bounded<Direct>>,
}

struct Bounded<L> {
    rate: Rate,
    limiter: Arc<L>,
}

impl<L> Clone for Bounded<L> {
    fn clone(&self) -> Self {
        Bounded { rate: self.rate, limiter: Arc::clone(&self.limiter) }
    }
}

impl std::fmt::Debug for Limiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Limiter").field("keys", &self.keys()).finish()
    }
}

impl Limiter {
    /// A limiter with these limits.
    pub fn new(limits: &Limits) -> Limiter {
        let limiter = Limiter(Arc::new(Shared {
            active: ArcSwap::default(),
            hasher: RandomState::new(),
            clock: QuantaClock::default(),
        }));
        limiter.set(limits);
        limiter
    }

    /// Replaces the limits. Buckets whose rate stays as it was are kept.
    pub fn set(&self, limits: &Limits) {
        let active = self.0.active.load();
        let reads = limits.per_user.map(|rate| Rate {
            per_second: rate.per_second.saturating_mul(READS_PER_WRITE),
            burst: rate.burst.saturating_mul(READS_PER_WRITE),
        });
        self.0.active.store(Arc::new(Active {
            user: self.keyed(&active.user, limits.per_user),
            user_reads: self.keyed(&active.user_reads, reads),
            address: self.keyed(&active.address, limits.per_address),
            sale: self.keyed(&active.sale, limits.per_sale),
            instance: replaced(&active.instance, limits.per_instance, |quota| {
                RateLimiter::new(quota, InMemoryState::default(), self.0.clock.clone())
            }),
        }));
    }

    /// Follows the topology's limits and drops idle buckets, until `stop`.
    pub async fn run(self, mut topology: watch::Receiver<Arc<Topology>>, stop: CancellationToken) {
        let mut prune = tokio::time::interval(PRUNE_INTERVAL);
        prune.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = prune.tick() => self.prune(),
                changed = topology.changed() => {
                    if changed.is_err() {
                        // The topology's owner is gone: the process is ending.
                        return;
                    }
                    let limits = topology.borrow_and_update().limits.clone();
                    self.set(&limits);
                }
            }
        }
    }

    /// A purchase: counts for the user, the address, the sale and the instance, in this order, so that whoever is
    /// over a narrow limit does not use up a wide one.
    pub fn purchase(&self, uid: &Uid, address: Option<IpAddr>, sale: &SaleId) -> Result<(), Limited> {
        let active = self.0.active.load();
        self.check(&active.user, Scope::User, uid.as_str())?;
        self.check_address(&active, address)?;
        self.check(&active.sale, Scope::Sale, sale.as_str())?;
        self.check_instance(&active)
    }

    /// Another change by a user.
    pub fn write(&self, uid: &Uid, address: Option<IpAddr>) -> Result<(), Limited> {
        let active = self.0.active.load();
        self.check(&active.user, Scope::User, uid.as_str())?;
        self.check_address(&active, address)?;
        self.check_instance(&active)
    }

    /// A read of a user's own data.
    pub fn read(&self, uid: &Uid, address: Option<IpAddr>) -> Result<(), Limited> {
        let active = self.0.active.load();
        self.check(&active.user_reads, Scope::UserReads, uid.as_str())?;
        self.check_address(&active, address)?;
        self.check_instance(&active)
    }

    /// A call without a user, other than a read of what is the same for everyone: that costs less than a
    /// refusal.
    pub fn anonymous(&self, address: Option<IpAddr>) -> Result<(), Limited> {
        let active = self.0.active.load();
        self.check_address(&active, address)?;
        self.check_instance(&active)
    }

    /// Number of keys that have a bucket.
    pub fn keys(&self) -> usize {
        let active = self.0.active.load();
        active.keyed().map(|bounded| bounded.limiter.len()).sum()
    }

    /// Drops buckets that have refilled: they are as good as none.
    pub fn prune(&self) {
        for bounded in self.0.active.load().keyed() {
            bounded.limiter.retain_recent();
            bounded.limiter.shrink_to_fit();
        }
    }

    fn check(&self, limit: &Option<Bounded<Keyed>>, scope: Scope, key: &str) -> Result<(), Limited> {
        let Some(limit) = limit else { return Ok(()) };
        self.check_hash(limit, scope, self.0.hasher.hash_one(key))
    }

    fn check_address(&self, active: &Active, address: Option<IpAddr>) -> Result<(), Limited> {
        let (Some(limit), Some(address)) = (&active.address, address) else { return Ok(()) };
        self.check_hash(limit, Scope::Address, self.0.hasher.hash_one(subscriber(address)))
    }

    fn check_hash(&self, limit: &Bounded<Keyed>, scope: Scope, hash: u64) -> Result<(), Limited> {
        limit.limiter.check_key(&hash).map_err(|refusal| self.limited(scope, limit.rate, &refusal))
    }

    fn check_instance(&self, active: &Active) -> Result<(), Limited> {
        let Some(limit) = &active.instance else { return Ok(()) };
        limit.limiter.check().map_err(|refusal| self.limited(Scope::Instance, limit.rate, &refusal))
    }

    fn limited(&self, scope: Scope, rate: Rate, refusal: &NotUntil<QuantaInstant>) -> Limited {
        let wait = refusal.wait_time_from(self.0.clock.now());
        let wait_s = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        Limited {
            scope,
            burst: rate.burst.get(),
            window_s: rate.burst.get().div_ceil(rate.per_second.get()),
            retry_after_s: u32::try_from(wait_s).unwrap_or(u32::MAX).max(1),
        }
    }

    fn keyed(&self, old: &Option<Bounded<Keyed>>, rate: Option<Rate>) -> Option<Bounded<Keyed>> {
        replaced(old, rate, |quota| {
            let replenish_ns = quota.replenish_interval().as_nanos() as u64;
            RateLimiter::new(quota, Buckets::new(replenish_ns), self.0.clock.clone())
        })
    }
}

impl Active {
    fn keyed(&self) -> impl Iterator<Item = &Bounded<Keyed>> {
        [&self.user, &self.user_reads, &self.address, &self.sale].into_iter().flatten()
    }
}

fn replaced<L>(
    old: &Option<Bounded<L>>,
    rate: Option<Rate>,
    make: impl FnOnce(Quota) -> L,
) -> Option<Bounded<L>> {
    let rate = rate?;
    if let Some(old) = old.as_ref().filter(|old| old.rate == rate) {
        return Some(old.clone());
    }
    let quota = Quota::per_second(rate.per_second).allow_burst(rate.burst);
    Some(Bounded { rate, limiter: Arc::new(make(quota)) })
}

/// The part of an address that stands for one subscriber: an IPv6 network hands out a /64 at least, so its lower
/// half is the client's to choose.
fn subscriber(address: IpAddr) -> u128 {
    match address.to_canonical() {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits() >> 64 << 64,
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::super::buckets::MAX_KEYS;
    use super::*;

    fn uid(n: usize) -> Uid {
        Uid::new(&format!("u{n}")).unwrap()
    }

    fn sale() -> SaleId {
        SaleId::new("s").unwrap()
    }

    fn limits(change: impl FnOnce(&mut Limits)) -> Limits {
        let mut limits = Limits { per_user: None, ..Limits::default() };
        change(&mut limits);
        limits
    }

    const SLOW: Rate = rate(1, 3);

    const fn rate(per_second: u32, burst: u32) -> Rate {
        Rate { per_second: NonZeroU32::new(per_second).unwrap(), burst: NonZeroU32::new(burst).unwrap() }
    }

    #[test]
    fn a_user_over_the_limit_is_told_when_to_come_back() {
        let limiter = Limiter::new(&limits(|limits| limits.per_user = Some(SLOW)));
        for _ in 0..3 {
            assert_eq!(limiter.purchase(&uid(1), None, &sale()), Ok(()));
        }
        let limited = limiter.purchase(&uid(1), None, &sale()).unwrap_err();
        assert_eq!(limited, Limited { scope: Scope::User, burst: 3, window_s: 3, retry_after_s: 1 });
        assert_eq!(limiter.purchase(&uid(2), None, &sale()), Ok(()));
        // Reads have a bucket of their own.
        assert_eq!(limiter.read(&uid(1), None), Ok(()));
    }

    #[test]
    fn each_scope_counts_its_own_key() {
        let at = |n: u8| Some(IpAddr::from([10, 0, 0, n]));
        let limiter = Limiter::new(&limits(|limits| limits.per_address = Some(SLOW)));
        (0..3).for_each(|n| assert!(limiter.purchase(&uid(n), at(1), &sale()).is_ok()));
        assert_eq!(limiter.purchase(&uid(9), at(1), &sale()).unwrap_err().scope, Scope::Address);
        assert!(limiter.purchase(&uid(9), at(2), &sale()).is_ok());

        let limiter = Limiter::new(&limits(|limits| limits.per_sale = Some(SLOW)));
        (0..3).for_each(|n| assert!(limiter.purchase(&uid(n), None, &sale()).is_ok()));
        assert_eq!(limiter.purchase(&uid(9), None, &sale()).unwrap_err().scope, Scope::Sale);
        assert!(limiter.purchase(&uid(9), None, &SaleId::new("other").unwrap()).is_ok());

        let limiter = Limiter::new(&limits(|limits| limits.per_instance = Some(SLOW)));
        (0..3).for_each(|n| assert!(limiter.read(&uid(n), None).is_ok()));
        assert_eq!(limiter.write(&uid(9), None).unwrap_err().scope, Scope::Instance);
    }

    #[test]
    fn a_subscriber_of_ipv6_cannot_pick_fresh_addresses() {
        let limiter = Limiter::new(&limits(|limits| limits.per_address = Some(SLOW)));
        let at = |low: u16| Some(IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, low]));
        (0..3).for_each(|n| assert!(limiter.anonymous(at(n)).is_ok()));
        assert!(limiter.anonymous(at(77)).is_err());
        assert!(limiter.anonymous(Some(IpAddr::from([0x2001, 0xdb8, 0, 2, 0, 0, 0, 1]))).is_ok());
    }

    #[test]
    fn limits_change_while_it_runs_and_other_buckets_stay() {
        let limiter = Limiter::new(&limits(|limits| limits.per_user = Some(SLOW)));
        (0..3).for_each(|_| assert!(limiter.write(&uid(1), None).is_ok()));
        limiter.set(&limits(|limits| {
            limits.per_user = Some(SLOW);
            limits.per_instance = Some(rate(1000, 1000));
        }));
        assert_eq!(limiter.write(&uid(1), None).unwrap_err().scope, Scope::User);
        limiter.set(&limits(|_| ()));
        assert!(limiter.write(&uid(1), None).is_ok());
    }

    #[test]
    fn a_flood_of_users_and_addresses_stays_within_its_memory() {
        let limiter = Limiter::new(&limits(|limits| {
            limits.per_user = Some(SLOW);
            limits.per_address = Some(SLOW);
        }));
        for n in 0..MAX_KEYS + 200_000 {
            let address = IpAddr::from(Ipv4Addr::from_bits(n as u32));
            let _ = limiter.purchase(&uid(n), Some(address), &sale());
        }
        assert!(limiter.keys() <= 2 * MAX_KEYS, "{} keys", limiter.keys());
        // Who came before the flood is still limited by what they did then, and so are those beyond the bound,
        // together.
        let refused = (0..2000).filter(|n| limiter.write(&uid(MAX_KEYS * 2 + n % 2), None).is_err()).count();
        assert!(refused > 1900, "{refused} of 2000 calls of two more users were refused");
    }

    #[tokio::test]
    async fn idle_keys_are_dropped() {
        let limiter = Limiter::new(&limits(|limits| limits.per_user = Some(rate(1000, 1))));
        (0..100_000).for_each(|n| assert!(limiter.write(&uid(n), None).is_ok()));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while limiter.keys() > 0 && tokio::time::Instant::now() < deadline {
            tokio::task::yield_now().await;
            limiter.prune();
        }
        assert_eq!(limiter.keys(), 0);
    }
}
