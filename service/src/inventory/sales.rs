//! What the shop does to its sales. Each change is one script in the master's Redis and counts as done when its
//! reply is there, which with `appendfsync always` is after the disk has it (K4).

use seckill_domain::{Clock, Currency, InvalidSale, KeyDigest, SaleId, SalePatch, SaleSpec, SystemClock};
use seckill_ledger::read::Sale;
use seckill_ledger::{ArchiveOutcome, CreateOutcome, StateChange, StateOutcome, StockOutcome, UpdateOutcome};
use sha2::{Digest, Sha256};

use super::Inventory;
use super::error::{SaleError, Unavailable};

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
        let fence = self.fence()?;
        let mut conn = self.conn().await?;
        match seckill_ledger::create_sale(&mut conn, &fence, &spec, &digest).await? {
            CreateOutcome::Created { version } => Ok(Created { version, new: true }),
            CreateOutcome::Same { version } => Ok(Created { version, new: false }),
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
        let fence = self.fence()?;
        let mut conn = self.conn().await?;
        let sale = seckill_ledger::read::sale(&mut conn, id).await?.ok_or(SaleError::NotFound)?;
        if sale.version != based_on {
            return Err(SaleError::VersionMismatch { version: sale.version });
        }
        let frozen = patch.frozen_after_start();
        let started = SystemClock.now() >= sale.starts_at;
        let spec = sale.spec.patched(patch, started)?;
        // Between the look above and the script the sale may start; the script looks again, by the ledger's time.
        match seckill_ledger::update_sale(&mut conn, &fence, &spec, based_on, frozen.is_some()).await? {
            UpdateOutcome::Updated { version } => Ok(SaleChanged { version, changed: true }),
            UpdateOutcome::OtherVersion { version } => Err(SaleError::VersionMismatch { version }),
            UpdateOutcome::NotFound => Err(SaleError::NotFound),
            UpdateOutcome::Ended => Err(SaleError::Ended),
            UpdateOutcome::Started => Err(InvalidSale::Started(frozen.unwrap_or("this")).into()),
        }
    }

    /// Pauses, resumes or ends a sale. In the state already: nothing changes, and that is no error.
    pub async fn set_state(&self, id: &SaleId, change: StateChange) -> Result<SaleChanged, SaleError> {
        let fence = self.fence()?;
        let mut conn = self.conn().await?;
        match seckill_ledger::set_state(&mut conn, &fence, id, change).await? {
            StateOutcome::Changed { version } => Ok(SaleChanged { version, changed: true }),
            StateOutcome::Same { version } => Ok(SaleChanged { version, changed: false }),
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
        let fence = self.fence()?;
        let mut conn = self.conn().await?;
        match seckill_ledger::add_stock(&mut conn, &fence, id, delta, key).await? {
            StockOutcome::Changed { total, remaining, version, replayed } => {
                Ok(StockChanged { total, remaining, version, replayed })
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
        let fence = self.fence()?;
        let mut conn = self.conn().await?;
        match seckill_ledger::archive(&mut conn, &fence, id, self.0.retry_window_ms, touched).await? {
            ArchiveOutcome::Archived { version } | ArchiveOutcome::Same { version } => {
                Ok(Archived { version })
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

    fn fence(&self) -> Result<seckill_ledger::Fence, Unavailable> {
        self.0
            .authority
            .grant()
            .map(|grant| grant.fence.clone())
            .map_err(|refusal| Unavailable::NoAuthority(refusal.reason))
    }

    async fn conn(&self) -> Result<deadpool_redis::Connection, Unavailable> {
        Ok(self.0.pool.get().await?)
    }
}

/// Names the body as the shop sent it, before defaults were filled in.
fn body_digest(spec: &SaleSpec) -> KeyDigest {
    let json = serde_json::to_vec(spec).unwrap_or_default();
    let mut digest = KeyDigest::default();
    digest.copy_from_slice(&Sha256::digest(&json)[..16]);
    digest
}
