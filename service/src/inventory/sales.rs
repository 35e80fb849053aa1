//! What the shop does to its sales. Each change is one script in the master's Redis. Its reply comes after the disk
//! has it (`appendfsync always`); it counts as done behind the barrier, where there is one (K4).

use std::sync::Arc;

use seckill_domain::{Clock, Currency, InvalidSale, KeyDigest, SaleId, SalePatch, SaleSpec, SystemClock};
use seckill_ledger::read::Sale;
use seckill_ledger::{ArchiveOutcome, CreateOutcome, StateChange, StateOutcome, StockOutcome, UpdateOutcome};
use sha2::{Digest, Sha256};

use super::Inventory;
use super::barrier::{Barrier, Unconfirmed};
use super::error::{SaleError, Unavailable};
use crate::topology::{Acknowledge, Cause, Grant};

/// A sale that is on offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// Its version.
    pub version: u64,
    /// Whether this call created it; otherwise the same body had been sent before.
    pub new: bool,
}

/// A sale after a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaleChanged {
    /// Its version.
    pub version: u64,
    /// Whether this call changed anything.
    pub changed: bool,
}

/// A sale's stock after a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StockChanged {
    /// Units on offer in all.
    pub total: u64,
    /// Units left right after the change.
    pub remaining: u64,
    /// The sale's version after the change.
    pub version: u64,
    /// Whether this answers an earlier call under the same key again.
    pub replayed: bool,
}

/// An archived sale.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archived {
    /// Its version.
    pub version: u64,
}

impl Inventory {
    /// Puts a sale on offer. The same body again is answered as before; another body under the id is refused.
    pub async fn create_sale(
        &self,
        spec: SaleSpec,
        default_currency: Option<Currency>,
    ) -> Result<Created, SaleError> {
        let digest = body_digest(&spec);
        let spec = spec.validate(default_currency)?;
        let mut write = self.begin().await?;
        match seckill_ledger::create_sale(&mut write.conn, &write.grant.fence, &spec, &digest).await? {
            CreateOutcome::Created { version } => Ok(write.counts(Created { version, new: true }).await?),
            CreateOutcome::Same { version } => Ok(write.counts(Created { version, new: false }).await?),
            CreateOutcome::Exists => Err(SaleError::Exists),
        }
    }

    /// Changes a sale's description, if it still has the version `based_on`. See [`SaleSpec::patched`] for what
    /// may change after the start.
    pub async fn update_sale(
        &self,
        id: &SaleId,
        based_on: u64,
        patch: SalePatch,
    ) -> Result<SaleChanged, SaleError> {
        let mut write = self.begin().await?;
        let sale = seckill_ledger::read::sale(&mut write.conn, id).await?.ok_or(SaleError::NotFound)?;
        if sale.version != based_on {
            return Err(SaleError::VersionMismatch { version: sale.version });
        }
        let frozen = patch.frozen_after_start();
        let started = SystemClock.now() >= sale.starts_at;
        let spec = sale.spec.patched(patch, started)?;
        // Between the look above and the script the sale may start; the script looks again, by the ledger's time.
        match seckill_ledger::update_sale(
            &mut write.conn,
            &write.grant.fence,
            &spec,
            based_on,
            frozen.is_some(),
        )
        .await?
        {
            UpdateOutcome::Updated { version } => {
                Ok(write.counts(SaleChanged { version, changed: true }).await?)
            }
            UpdateOutcome::OtherVersion { version } => Err(SaleError::VersionMismatch { version }),
            UpdateOutcome::NotFound => Err(SaleError::NotFound),
            UpdateOutcome::Ended => Err(SaleError::Ended),
            UpdateOutcome::Started => Err(InvalidSale::Started(frozen.unwrap_or("this")).into()),
        }
    }

    /// Pauses, resumes or ends a sale. In the state already: nothing changes, and that is no error.
    pub async fn set_state(&self, id: &SaleId, change: StateChange) -> Result<SaleChanged, SaleError> {
        let mut write = self.begin().await?;
        match seckill_ledger::set_state(&mut write.conn, &write.grant.fence, id, change).await? {
            StateOutcome::Changed { version } => {
                Ok(write.counts(SaleChanged { version, changed: true }).await?)
            }
            StateOutcome::Same { version } => {
                Ok(write.counts(SaleChanged { version, changed: false }).await?)
            }
            StateOutcome::NotFound => Err(SaleError::NotFound),
            StateOutcome::Ended => Err(SaleError::Ended),
        }
    }

    /// Adds units to a sale, or takes some of those away that nobody has claimed; once for each key.
    pub async fn add_stock(
        &self,
        id: &SaleId,
        delta: i64,
        key: &KeyDigest,
    ) -> Result<StockChanged, SaleError> {
        let mut write = self.begin().await?;
        match seckill_ledger::add_stock(&mut write.conn, &write.grant.fence, id, delta, key).await? {
            StockOutcome::Changed { total, remaining, version, replayed } => {
                Ok(write.counts(StockChanged { total, remaining, version, replayed }).await?)
            }
            StockOutcome::KeyReused => Err(SaleError::KeyReused),
            StockOutcome::BelowClaimed { remaining } => Err(SaleError::BelowClaimed { remaining }),
            StockOutcome::TooLarge => Err(SaleError::Bound("a sale has at most 10^12 units")),
            StockOutcome::TooMany => Err(SaleError::Bound("a sale's stock changes at most 100,000 times")),
            StockOutcome::NotFound => Err(SaleError::NotFound),
            StockOutcome::Ended => Err(SaleError::Ended),
        }
    }

    /// Drops the claims of a sale that is over. The caller has made sure, looking at the sale as it was at
    /// change number `touched`, that every order is stored and final and every release done (M1).
    pub async fn archive(&self, id: &SaleId, touched: u64) -> Result<Archived, SaleError> {
        let mut write = self.begin().await?;
        match seckill_ledger::archive(
            &mut write.conn,
            &write.grant.fence,
            id,
            self.0.retry_window_ms,
            touched,
        )
        .await?
        {
            ArchiveOutcome::Archived { version } | ArchiveOutcome::Same { version } => {
                Ok(write.counts(Archived { version }).await?)
            }
            ArchiveOutcome::NotFound => Err(SaleError::NotFound),
            ArchiveOutcome::NotEnded => Err(SaleError::NotEnded),
            ArchiveOutcome::RetryWindow { left_ms } => {
                Err(SaleError::RetryWindow { left_s: left_ms.div_ceil(1000) })
            }
            ArchiveOutcome::Changed { .. } => {
                Err(SaleError::NotFinal("the sale changed meanwhile".to_owned()))
            }
        }
    }

    /// One sale as the ledger has it now, archived ones included.
    pub async fn sale(&self, id: &SaleId) -> Result<Option<Sale>, Unavailable> {
        let mut conn = self.conn().await?;
        Ok(seckill_ledger::read::sale(&mut conn, id).await?)
    }

    /// Waits while the master moves, as long as a purchase would be held, and until this center, where it is the new
    /// master, may write. Whoever changes something asks this first, and then which center is the master.
    pub async fn settled(&self) -> Result<(), Unavailable> {
        let (mut topology, mut authority) = (self.0.topology.subscribe(), self.0.authority.subscribe());
        let until = tokio::time::Instant::now() + self.0.hold;
        loop {
            let recorded = topology.borrow_and_update().master_shift().is_some();
            authority.borrow_and_update();
            let moving = match self.0.authority.grant() {
                Ok(_) => recorded,
                Err(refusal) => recorded || matches!(refusal.cause, Cause::Shifting | Cause::Promoting),
            };
            if !moving {
                return Ok(());
            }
            let changed = async {
                tokio::select! {
                    changed = topology.changed() => changed,
                    changed = authority.changed() => changed,
                }
            };
            match tokio::time::timeout_at(until, changed).await {
                Ok(Ok(())) => {}
                // The service is ending.
                Ok(Err(_)) => return Err(Unavailable::Shifting),
                Err(_) if recorded => return Err(Unavailable::Shifting),
                // The authority says why, where it is asked.
                Err(_) => return Ok(()),
            }
        }
    }

    /// Takes the permission, and a connection that it holds for.
    pub(super) async fn begin(&self) -> Result<Write, Unavailable> {
        let grant = self.0.authority.grant()?;
        self.write_of(grant, self.conn().await?).await
    }

    /// A write, or a read that has to count like one, under a grant.
    pub(super) async fn write_of(
        &self,
        grant: Arc<Grant>,
        mut conn: deadpool_redis::Connection,
    ) -> Result<Write, Unavailable> {
        let run_id = match grant.acknowledge {
            // Nothing to wait for, so nothing to compare.
            Acknowledge::Local => Arc::from(""),
            Acknowledge::Replicated { .. } => {
                let run_id = seckill_ledger::roles::standing(&mut conn).await?.run_id;
                if grant.run_id(super::PARTITION).is_some_and(|admitted| admitted != run_id) {
                    return Err(Unavailable::NoAuthority("this run of the server was not admitted".into()));
                }
                Arc::from(run_id)
            }
        };
        Ok(Write { grant, conn, run_id, barrier: self.0.barrier.upgrade() })
    }

    pub(super) async fn conn(&self) -> Result<deadpool_redis::Connection, Unavailable> {
        Ok(self.0.pool.get().await?)
    }
}

/// A change on its way: it counts as done only behind the barrier (K4), and so does the answer to one that was
/// made before. Repeating an unknown one is safe: a sale is created once for each body, stock changes once for
/// each key, and the other changes set what they set.
pub(super) struct Write {
    pub(super) grant: Arc<Grant>,
    pub(super) conn: deadpool_redis::Connection,
    run_id: Arc<str>,
    barrier: Option<Barrier>,
}

impl Write {
    async fn counts<T>(&self, done: T) -> Result<T, SaleError> {
        self.counted().await?;
        Ok(done)
    }

    pub(super) async fn counted(&self) -> Result<(), Unavailable> {
        // Without a barrier the service is ending.
        let barrier = self.barrier.as_ref().ok_or(Unavailable::NotReplicated)?;
        barrier.confirm(&self.grant, &self.run_id).await.map_err(|Unconfirmed| Unavailable::NotReplicated)
    }
}

/// Names the body as the shop sent it, before defaults were filled in.
fn body_digest(spec: &SaleSpec) -> KeyDigest {
    let json = serde_json::to_vec(spec).unwrap_or_default();
    let mut digest = KeyDigest::default();
    digest.copy_from_slice(&Sha256::digest(&json)[..16]);
    digest
}
