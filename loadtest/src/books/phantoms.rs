//! Orders that nobody asked for: looked for by name only where the counts say that there are some.

use std::io;

use serde::Deserialize;

use super::{Access, SaleOpening, violation};
use crate::ledger_file::Ledger;
use crate::record::Violations;

/// Known orders that are kept for it (8 bytes each); with more the counts have to do.
const KNOWN_MAX: usize = 5_000_000;
/// Pages of stored orders that are looked at for each sale.
const PAGES_MAX: usize = 2000;
/// Orders that are named.
const NAMED: usize = 20;

#[derive(Deserialize)]
struct Page {
    orders: Vec<Stored>,
    next_cursor: Option<String>,
}

#[derive(Deserialize)]
struct Stored {
    order_id: String,
    uid: Option<String>,
    created_at: Option<jiff::Timestamp>,
}

/// Names stored orders of the run's time that no purchase of the run led to.
pub(super) async fn name(
    access: &mut Access,
    ledger: &Ledger,
    sales: &[SaleOpening],
    started_ms: i64,
    violations: &mut Violations,
) -> io::Result<()> {
    let mut known: Vec<u64> = Vec::new();
    ledger.for_each(|_, purchase| {
        if let Some(order) = purchase.order()
            && known.len() <= KNOWN_MAX
        {
            known.push(order.number());
        }
    })?;
    if known.len() > KNOWN_MAX {
        return Ok(());
    }
    known.sort_unstable();
    let mut named = 0;
    for sale in sales {
        let mut cursor = String::new();
        for _ in 0..PAGES_MAX {
            let path = format!("/admin/v1/orders?sale_id={}&limit=100{cursor}", sale.sale_id);
            // The counts have told already; names are more than can be had from a target that lists nothing.
            let Ok(page) = access.get::<Page>(&path).await else { break };
            for order in page.orders {
                let Ok(id) = order.order_id.parse::<seckill_domain::OrderId>() else { continue };
                let older = order.created_at.is_some_and(|at| at.as_millisecond() < started_ms);
                if !older && known.binary_search(&id.number()).is_err() {
                    let uid = order.uid.unwrap_or_default();
                    let detail = format!(
                        "order {id} of user {uid} is stored and no purchase was acknowledged with it"
                    );
                    violations.add(violation("order_without_purchase", id, &uid, detail));
                    named += 1;
                    if named == NAMED {
                        return Ok(());
                    }
                }
            }
            match page.next_cursor {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
    }
    Ok(())
}
