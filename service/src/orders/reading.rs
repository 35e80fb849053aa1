//! Reading a partition's local outbox so that nothing unreplicated leaves the ledger (R1).
//!
//! | this center's Redis is | a page counts if |
//! | --- | --- |
//! | the master | this service has authority under exactly the fence that the server showed, and, with durability `replicated`, a barrier sent after the read was confirmed |
//! | a replica | its link was `connected` and its fence the confirmed topology's at the moment of the read |
//!
//! A page is read in one `MULTI` with the server's role and fence. A master that has just become a replica serves its
//! own, perhaps diverged, entries for a while: its link is not `connected` then, or its fence is the old one.
//!
//! With `appendfsync always` Redis answers a reader only after the log with what it read is synced, so with
//! durability `local` nothing more is needed.

use std::sync::Arc;

use redis::aio::MultiplexedConnection;
use seckill_domain::{CenterId, OutboxId};
use seckill_ledger::outbox::{self, Page};
use seckill_ledger::roles::{self, Role};
use seckill_ledger::{Cursor, CursorOutcome, set_cursor};

use super::workers::Link;
use crate::inventory::Unconfirmed;
use crate::topology::NoAuthority;

/// Why what was read may not be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoPage {
    /// Not now; it passes by itself.
    #[error("{0}")]
    Wait(String),
    /// The topology is not confirmed, or this service has no authority over its own master.
    #[error(transparent)]
    NoAuthority(#[from] NoAuthority),
    /// The server's data is not at the topology's fence.
    #[error("the ledger's fence is {found}, the topology's {expected}")]
    OtherFence {
        /// The server's, or `missing`.
        found: String,
        /// The confirmed topology's.
        expected: String,
    },
    /// The replica is not linked to its master.
    #[error("this center's Redis is a replica whose link is {link}")]
    NotLinked {
        /// The link's state.
        link: String,
    },
    /// The other center has not confirmed it.
    #[error("what was read is not confirmed by the other center yet")]
    NotReplicated,
    /// The ledger ends before what the reader has stored (F2).
    #[error("the ledger ends at {ledger}, but entries up to {position} are stored: it was rolled back")]
    RolledBack {
        /// How far the reader is.
        position: OutboxId,
        /// The ledger's last entry.
        ledger: OutboxId,
    },
    /// The server did not answer.
    #[error(transparent)]
    Ledger(#[from] seckill_ledger::Error),
}

/// A connection to the local server, for one reader.
pub(super) struct Source {
    pub(super) conn: MultiplexedConnection,
    pub(super) run_id: Arc<str>,
    /// Up to here a barrier was confirmed through this very connection's server run.
    replicated: OutboxId,
}

impl Source {
    pub(super) async fn open(link: &Link) -> Result<Source, seckill_ledger::Error> {
        let mut conn = link.connect().await?;
        let run_id = Arc::from(roles::standing(&mut conn).await?.run_id);
        Ok(Source { conn, run_id, replicated: OutboxId { epoch: 0, seq: 0 } })
    }

    /// As [`Source::read`], but of the master only: for whoever also writes to it.
    pub(super) async fn read_master(
        &mut self,
        link: &Link,
        after: OutboxId,
        count: usize,
    ) -> Result<Page, NoPage> {
        let page = self.read(link, after, count).await?;
        match &page.role {
            Role::Master { .. } => Ok(page),
            Role::Replica { .. } => Err(NoPage::Wait("this center's Redis is not the master".to_owned())),
        }
    }

    /// Reads at most `count` entries after an id that may be used. See the module.
    pub(super) async fn read(&mut self, link: &Link, after: OutboxId, count: usize) -> Result<Page, NoPage> {
        let expected = link.authority.confirmed()?;
        // Before the read: an acceptance under a later grant than this is not in doubt, it is read again.
        let grant = link.authority.grant();
        let page = outbox::read(&mut self.conn, after, count).await?;
        let text = expected.to_string();
        if page.fence.as_deref() != Some(text.as_str()) {
            let found = page.fence.unwrap_or_else(|| "missing".to_owned());
            return Err(NoPage::OtherFence { found, expected: text });
        }
        let ledger = OutboxId { epoch: expected.epoch.0, seq: page.last_seq };
        match &page.role {
            Role::Master { .. } => {
                let grant = grant?;
                if grant.fence != expected {
                    let found = grant.fence.to_string();
                    return Err(NoPage::OtherFence { found, expected: text });
                }
                // Everything up to the last id noted here is older than a barrier that is sent now.
                let news = page.entries.last().is_some_and(|last| last.id > self.replicated);
                if news {
                    link.barrier
                        .confirm(&grant, &self.run_id)
                        .await
                        .map_err(|Unconfirmed| NoPage::NotReplicated)?;
                    self.replicated = ledger;
                }
            }
            Role::Replica { link, .. } if link == "connected" => {}
            Role::Replica { link, .. } => return Err(NoPage::NotLinked { link: link.clone() }),
        }
        if after > ledger {
            return Err(NoPage::RolledBack { position: after, ledger });
        }
        Ok(page)
    }

    /// Writes down in the master's ledger how far a destination has everything. It counts behind the barrier (K4): a
    /// promoted replica would begin before it otherwise.
    pub(super) async fn note_cursor(
        &mut self,
        link: &Link,
        destination: &CenterId,
        cursor: Cursor,
    ) -> Result<CursorOutcome, NoPage> {
        let grant = link.authority.grant().map_err(|refusal| NoPage::Wait(refusal.to_string()))?;
        let outcome = set_cursor(&mut self.conn, &grant.fence, destination, cursor).await?;
        match outcome {
            CursorOutcome::Noted => {
                let confirmed = link.barrier.confirm(&grant, &self.run_id).await;
                confirmed.map_err(|unconfirmed| NoPage::Wait(unconfirmed.to_string()))?;
            }
            CursorOutcome::Behind | CursorOutcome::Ahead => {}
        }
        Ok(outcome)
    }
}
