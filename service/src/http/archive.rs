//! Archiving a sale: what has to be true before its claims may go (M1).

use std::time::Duration;

use seckill_domain::{OrderStatus, SaleId};
use tokio::time::Instant;

use super::AdminState;
use super::problem::Problem;
use crate::inventory::{Archived, SaleError, Unavailable};

/// How long the order tables may take to catch up with the outbox.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(3);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// The one inventory partition that exists for now.
const PARTITION: u8 = 0;

/// Archives a sale once every entry of it is stored, every order final and every release done. Looks first, then
/// archives exactly what it looked at: the ledger refuses if the sale has changed meanwhile.
pub(super) async fn archive(state: &AdminState, id: &SaleId) -> Result<Archived, Problem> {
    let sale = state.inventory.sale(id).await?.ok_or(SaleError::NotFound)?;
    let last = {
        let mut conn = state.inventory.pool().get().await.map_err(Unavailable::from)?;
        seckill_ledger::outbox::last_id(&mut conn).await.map_err(Unavailable::from)?
    };
    let deadline = Instant::now() + CAUGHT_UP_WITHIN;
    while last.is_some() && Some(state.orders.position(PARTITION).await?) < last {
        if Instant::now() >= deadline {
            return Err(SaleError::NotFinal("accepted orders are not stored yet".to_owned()).into());
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let counts = state.orders.counts(Some(id)).await?;
    if let Some(counts) = counts.sales.get(id) {
        let open = counts.of(OrderStatus::Created).orders;
        if open > 0 {
            return Err(SaleError::NotFinal(format!("{open} orders are not final")).into());
        }
        if counts.releasing.orders > 0 {
            let what = format!("{} orders are not given back yet", counts.releasing.orders);
            return Err(SaleError::NotFinal(what).into());
        }
    }
    Ok(state.inventory.archive(id, sale.touched).await?)
}
