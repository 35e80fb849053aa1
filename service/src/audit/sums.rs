//! Step 6: the rows of the sales, and the sums of what was seen carried forward to their moments.

use std::collections::{HashMap, HashSet};

use redis::aio::ConnectionLike;
use seckill_domain::{OrderId, SaleId};
use seckill_ledger::outbox::{self, Event};

use super::Obstacle;
use super::book::Book;
use super::round::{PAGE, Round};

impl<C: ConnectionLike> Round<'_, C> {
    /// Step 6: rows, read last, and the sums carried forward to their moments.
    pub(super) async fn sums(&mut self) -> Result<(), Obstacle> {
        for row in self.rows_since(self.horizon.seq).await? {
            if let Some(place) = self.places.get(&row.spec.sale_id).copied() {
                self.book(place).row = Some(row);
            }
        }
        let busy: HashSet<u32> = (0..self.books.len() as u32)
            .filter(|place| {
                self.books[*place as usize].row.as_ref().is_some_and(|row| row.touched > self.horizon.seq)
            })
            .collect();
        let mut exact = true;
        if !busy.is_empty() {
            exact = self.carry_forward(&busy).await?;
        }
        for place in 0..self.books.len() as u32 {
            self.check_sums(place, exact || !busy.contains(&place));
        }
        Ok(())
    }

    /// Adds what happened behind the horizon. Returns whether all of it is still there to be read.
    async fn carry_forward(&mut self, busy: &HashSet<u32>) -> Result<bool, Obstacle> {
        let last =
            self.books.iter().filter_map(|book| book.row.as_ref()).map(|row| row.touched).max().unwrap_or(0);
        let mut quantities: HashMap<OrderId, u64> = HashMap::new();
        let mut after = self.horizon;
        let mut told = true;
        'pages: loop {
            let page = outbox::read(self.conn, after, PAGE).await?;
            let Some(end) = page.entries.last() else { break };
            after = end.id;
            for entry in page.entries {
                if entry.id.seq > last {
                    break 'pages;
                }
                let seq = entry.id.seq;
                match entry.event {
                    Ok(Event::Orders(orders)) => {
                        let sale = orders.first().map(|order| order.sale_id.clone());
                        let Some(book) = self.changed_book(sale.as_ref(), busy, seq) else { continue };
                        for order in orders {
                            let units = u64::from(order.quantity.get());
                            book.claims += 1;
                            book.held += units;
                            quantities.insert(order.order_id, units);
                        }
                    }
                    Ok(Event::Released { sale_id, orders }) => {
                        // Seen as released by the scan already: counted there.
                        let new: Vec<OrderId> =
                            orders.into_iter().filter(|order_id| !self.released.contains(order_id)).collect();
                        let unknown: Vec<OrderId> = new
                            .iter()
                            .copied()
                            .filter(|order_id| !quantities.contains_key(order_id))
                            .collect();
                        for order in self.look.orders(&unknown).await?.0 {
                            quantities.insert(order.order_id, u64::from(order.quantity));
                        }
                        let known = unknown.iter().all(|order_id| self.look.answers(order_id.table()));
                        let Some(book) = self.changed_book(Some(&sale_id), busy, seq) else { continue };
                        told &= known;
                        for order_id in new {
                            let units = quantities.get(&order_id).copied().unwrap_or(0);
                            book.held = book.held.saturating_sub(units);
                            book.released += units;
                        }
                    }
                    Ok(Event::Sale(_) | Event::SaleChanged(_) | Event::Epoch(_)) | Err(_) => {}
                }
            }
        }
        Ok(told && outbox::first_id(self.conn).await?.is_some_and(|first| first <= self.horizon))
    }

    /// The book of a sale whose row already contains the entry `seq`.
    fn changed_book(&mut self, sale: Option<&SaleId>, busy: &HashSet<u32>, seq: u64) -> Option<&mut Book> {
        let place = *self.places.get(sale?)?;
        let book = &mut self.books[place as usize];
        (busy.contains(&place) && book.row.as_ref().is_some_and(|row| seq <= row.touched)).then_some(book)
    }

    fn check_sums(&mut self, place: u32, exact: bool) {
        let everybody = self.look.all_answer();
        let book = &mut self.books[place as usize];
        let Some(row) = book.row.clone() else { return };
        if row.total != row.remaining + row.claimed {
            let detail =
                format!("total {} is not remaining {} + claimed {}", row.total, row.remaining, row.claimed);
            book.violation("total", None, detail);
        }
        for (uid, held) in std::mem::take(&mut book.above) {
            if held > u64::from(row.spec.per_user_limit) {
                let detail = format!("{uid} holds {held} units, the limit is {}", row.spec.per_user_limit);
                book.violation("limit", None, detail);
            }
        }
        if book.archived() {
            if everybody && book.held_by_orders != row.claimed {
                let detail = format!(
                    "paid orders hold {} units, the archived sale {}; where orders of a lost master could not be claimed \
                     again before it was archived, seckill shift status names them",
                    book.held_by_orders, row.claimed
                );
                book.violation("claimed_sum", None, detail);
            }
            return;
        }
        if book.claims_unreadable {
            return;
        }
        if !exact {
            self.problems.push(format!(
                "sale {}: it changes, and its changes left the outbox before they could be read; audit again",
                book.id
            ));
            return;
        }
        for (code, what, sum, count) in [
            ("claimed_sum", "units held by claims", book.held, row.claimed),
            ("released_sum", "units given back by claims", book.released, row.released),
            ("accepted_count", "claims", book.claims, row.accepted),
        ] {
            if sum != count {
                book.violation(code, None, format!("{sum} {what}, the sale's row says {count}"));
            }
        }
    }
}
