//! Archiving a sale: its claims and tombstones leave the ledger once nobody can need them (M1).

use std::time::Duration;

use seckill_domain::{OrderStatus, SaleId};
use tokio::time::Instant;

use crate::inventory::{Archived, Inventory, SaleError};
use crate::orders::OrderStore;

/// Why a sale was not archived.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sale is not ready for it, or the ledger did not answer.
    #[error(transparent)]
    Sale(#[from] SaleError),
    /// The order database did not answer.
    #[error(transparent)]
    Orders(#[from] crate::orders::Error),
}

/// How long the order tables may take to catch up with the outbox.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(3);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Archives a sale that is over: every outbox entry of it is stored, every order final, every release done and
/// the retry window past. Otherwise nothing happens and the error says what is still open.
pub async fn archive(inventory: &Inventory, orders: &OrderStore, id: &SaleId) -> Result<Archived, Error> {
    // The sale is looked at first: should anything happen to it during the checks, its change number grows and
    // the script refuses.
    let sale = inventory.sale(id).await.map_err(SaleError::from)?.ok_or(SaleError::NotFound)?;
    let deadline = Instant::now() + CAUGHT_UP_WITHIN;
    let counts = loop {
        let counts = orders.counts(Some(id)).await?;
        let epoch = inventory.epoch().0;
        // Every epoch begins with an entry, so a position of an earlier one is behind.
        if counts.positions.iter().any(|(_, at)| at.epoch == epoch && at.seq >= sale.touched) {
            break counts;
        }
        if Instant::now() >= deadline {
            return Err(SaleError::NotFinal("accepted orders are not stored yet".to_owned()).into());
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    };
    if let Some(sale) = counts.sales.get(id) {
        let open = sale.of(OrderStatus::Created).orders;
        if open > 0 {
            return Err(SaleError::NotFinal(format!("{open} orders are neither paid nor closed")).into());
        }
        let releasing = sale.releasing.orders;
        if releasing > 0 {
            return Err(
                SaleError::NotFinal(format!("the stock of {releasing} orders is on its way back")).into()
            );
        }
    }
    Ok(inventory.archive(id, sale.touched).await?)
}
