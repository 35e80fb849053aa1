//! Archiving a sale: its claims and tombstones leave the ledger once nobody can need them (M1).

use std::time::Duration;

use seckill_domain::{CenterId, OutboxId, SaleId};
use tokio::time::Instant;

use crate::inventory::{Archived, Inventory, SaleError};
use crate::orders::{OrderCenters, Untold};

/// Why a sale was not archived.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sale is not ready for it, or the ledger did not answer.
    #[error(transparent)]
    Sale(#[from] SaleError),
    /// An order database did not answer.
    #[error(transparent)]
    Orders(#[from] Untold),
}

/// How long the order tables may take to catch up with the outbox.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(3);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Archives a sale that is over: in every center each outbox entry of it is stored, each order final, each release
/// done, and the retry window is past. Otherwise nothing happens and the error says what is still open.
pub async fn archive(inventory: &Inventory, centers: &OrderCenters, id: &SaleId) -> Result<Archived, Error> {
    // The sale is looked at first: should anything happen to it during the checks, its change number grows and
    // the script refuses.
    let sale = inventory.sale(id).await.map_err(SaleError::from)?.ok_or(SaleError::NotFound)?;
    let deadline = Instant::now() + CAUGHT_UP_WITHIN;
    let homes = centers.homes();
    for (place, center) in homes.centers.iter().enumerate() {
        let held = loop {
            let held = centers.sale(center.as_ref(), id).await?;
            let epoch = inventory.epoch().0;
            // Every epoch begins with an entry, so a position of an earlier one is behind. Where nobody is at home,
            // nothing has to be stored.
            let caught_up = |(_, at): &(u8, OutboxId)| at.epoch == epoch && at.seq >= sale.touched;
            if held.stored.iter().any(caught_up) || !homes.is_used(place) {
                break held;
            }
            if Instant::now() >= deadline {
                return Err(not_final("accepted orders are not stored yet".to_owned(), center));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        };
        if held.open > 0 {
            return Err(not_final(format!("{} orders are neither paid nor closed", held.open), center));
        }
        if held.releasing > 0 {
            let what = format!("the stock of {} orders is on its way back", held.releasing);
            return Err(not_final(what, center));
        }
    }
    Ok(inventory.archive(id, sale.touched).await?)
}

fn not_final(what: String, center: &Option<CenterId>) -> Error {
    let what = match center {
        Some(center) => format!("in center {center} {what}"),
        None => what,
    };
    SaleError::NotFinal(what).into()
}
