//! Reading the outbox so that what was read may leave the ledger (R1): the one way for the tailer and the relay.

use redis::aio::MultiplexedConnection;
use seckill_domain::OutboxId;
use seckill_ledger::outbox::{self, Page};
use seckill_ledger::roles::Role;

use super::workers::Link;

/// Why a page may not be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoPage {
    /// Not now; it passes by itself.
    #[error("{0}")]
    Wait(String),
    /// The reader has come further than the ledger (F2).
    #[error("the ledger ends at {ledger}, but entries up to {position} are stored: it was rolled back")]
    RolledBack {
        /// Where the reader is.
        position: OutboxId,
        /// The ledger's last entry.
        ledger: OutboxId,
    },
    /// The server gave no page.
    #[error(transparent)]
    Ledger(#[from] seckill_ledger::Error),
}

/// Reads at most `count` entries after an id, if they may be used and the ledger is not behind the reader.
pub(super) async fn read_page(
    link: &Link,
    conn: &mut MultiplexedConnection,
    after: OutboxId,
    count: usize,
) -> Result<Page, NoPage> {
    let grant = link.authority.grant().map_err(|refusal| NoPage::Wait(refusal.to_string()))?;
    let fence = &grant.fence;
    let page = outbox::read(conn, after, count).await?;
    match &page.role {
        Role::Master { .. } if page.fence.as_deref() == Some(fence.to_string().as_str()) => {}
        Role::Master { .. } => {
            return Err(NoPage::Wait(format!(
                "the ledger's fence is {}, the topology's {fence}",
                page.fence.as_deref().unwrap_or("missing")
            )));
        }
        Role::Replica { .. } => {
            return Err(NoPage::Wait("this center's Redis is not the master".to_owned()));
        }
    }
    let ledger = OutboxId { epoch: fence.epoch.0, seq: page.last_seq };
    if after > ledger {
        return Err(NoPage::RolledBack { position: after, ledger });
    }
    Ok(page)
}
