//! Where the token buckets of one kind of key live: a map whose memory is bounded.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Mutex, PoisonError};

use governor::nanos::Nanos;
use governor::state::StateStore;
use governor::state::keyed::ShrinkableKeyedStateStore;

/// Keys of one kind at most. 2^19 keys of 16 bytes each, in tables that are at least 7/16 full: 18 MB.
pub(super) const MAX_KEYS: usize = 1 << 19;
/// Locks; requests of different keys rarely meet on one.
const SHARDS: usize = 64;
/// Keys behind one lock at most.
const KEYS_PER_SHARD: usize = MAX_KEYS / SHARDS;
/// Buckets per shard that are shared by the keys beyond the bound.
const SHARED_PER_SHARD: usize = 256;
/// A full shard looks for idle buckets at most this often; a look costs some ten microseconds.
const PRUNE_INTERVAL_NS: u64 = 100_000_000;

/// Buckets by the hash of their key. A bucket that has refilled is as good as none and is dropped: now and then
/// by `retain_recent`, and at once when its shard is full. Keys that find no room even so share one of
/// 16,384 buckets, picked by their hash: whoever floods the limiter with keys is still limited, and what
/// others feel of it is a bucket with company.
#[derive(Debug)]
pub(super) struct Buckets {
    shards: Box<[Mutex<Shard>]>,
    /// Time in which one request's worth flows back, in ns.
    replenish_ns: u64,
}

#[derive(Debug)]
struct Shard {
    /// Key hash → theoretical arrival time (GCRA) in ns since the limiter's start.
    own: HashMap<u64, u64, BuildHasherDefault<HashedAlready>>,
    shared: Option<Box<[u64; SHARED_PER_SHARD]>>,
    next_prune_ns: u64,
}

impl Buckets {
    pub(super) fn new(replenish_ns: u64) -> Buckets {
        let shard = || Shard { own: HashMap::default(), shared: None, next_prune_ns: 0 };
        Buckets { shards: (0..SHARDS).map(|_| Mutex::new(shard())).collect(), replenish_ns }
    }

    fn each_shard(&self, mut visit: impl FnMut(&mut Shard)) {
        for shard in &self.shards {
            visit(&mut shard.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl ShrinkableKeyedStateStore<u64> for Buckets {
    fn retain_recent(&self, drop_below: Nanos) {
        let idle_ns = drop_below.as_u64();
        self.each_shard(|shard| {
            shard.own.retain(|_, arrival_ns| *arrival_ns > idle_ns);
            if shard.shared.as_ref().is_some_and(|shared| shared.iter().all(|at| *at <= idle_ns)) {
                shard.shared = None;
            }
        });
    }

    fn shrink_to_fit(&self) {
        self.each_shard(|shard| {
            // Not tighter than needed: the next wave would only grow it again.
            if shard.own.len() < shard.own.capacity() / 4 {
                shard.own.shrink_to(shard.own.len() * 2);
            }
        });
    }

    fn len(&self) -> usize {
        let mut keys = 0;
        self.each_shard(|shard| keys += shard.own.len());
        keys
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl StateStore for Buckets {
    type Key = u64;

    fn measure_and_replace<T, F, E>(&self, key: &u64, f: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        // Bits that the map inside does not pick its slots by.
        let shard = &self.shards[(key >> 40) as usize % SHARDS];
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(arrival_ns) = shard.own.get_mut(key) {
            let (outcome, next) = f(Some(Nanos::new(*arrival_ns)))?;
            *arrival_ns = next.as_u64();
            return Ok(outcome);
        }
        let (outcome, next) = f(None)?;
        if shard.own.len() >= KEYS_PER_SHARD {
            // A fresh bucket's next arrival is one request's worth after now.
            let now_ns = next.as_u64().saturating_sub(self.replenish_ns);
            if now_ns >= shard.next_prune_ns {
                shard.next_prune_ns = now_ns + PRUNE_INTERVAL_NS;
                shard.own.retain(|_, arrival_ns| *arrival_ns > now_ns);
            }
            if shard.own.len() >= KEYS_PER_SHARD {
                let shared = shard.shared.get_or_insert_with(|| Box::new([0; SHARED_PER_SHARD]));
                let bucket = &mut shared[*key as usize % SHARED_PER_SHARD];
                let (outcome, next) = f((*bucket > 0).then(|| Nanos::new(*bucket)))?;
                *bucket = next.as_u64();
                return Ok(outcome);
            }
        }
        shard.own.insert(*key, next.as_u64());
        Ok(outcome)
    }
}

/// Takes the key itself for its hash: it is one, under a seed of this process.
#[derive(Default)]
struct HashedAlready(u64);

impl Hasher for HashedAlready {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
