//! Step 3, the end: purchases on their way from the outbox into the order tables.

use std::collections::HashSet;

use redis::aio::ConnectionLike;
use seckill_domain::{OrderId, OrderRecord, OutboxId, Uid};
use seckill_ledger::outbox::{self, Event};
use seckill_ledger::read;

use super::book::is_closed;
use super::round::{LOOKUP, PAGE, Round};
use super::{Obstacle, Violation};

impl<C: ConnectionLike> Round<'_, C> {
    /// Step 3, the end: what is behind the position must be in the outbox, and what is in the outbox must have
    /// its claim.
    pub(super) async fn settle_in_flight(&mut self) -> Result<(), Obstacle> {
        let mut positions = Vec::new();
        for place in self.look.places() {
            positions.push(self.look.position(place, 0).await?);
        }
        let at = |round: &Self, order_id: OrderId| {
            positions.get(round.look.home(order_id.table())).copied().flatten().unwrap_or(OutboxId::ZERO)
        };
        let due: Vec<OrderId> = self
            .unstored
            .keys()
            .copied()
            .filter(|order_id| self.outbox_id(*order_id) <= at(self, *order_id))
            .collect();
        self.take_stored(&due).await?;
        for order_id in due {
            if let Some(unstored) = self.unstored.remove(&order_id)
                && self.look.answers(order_id.table())
            {
                self.claim_without_order(&unstored, at(self, order_id));
            }
        }
        // What everybody has stored is of no interest any more.
        let mut after = positions.into_iter().flatten().min().unwrap_or(OutboxId::ZERO);
        while after < self.horizon {
            let page = outbox::read(self.conn, after, PAGE).await?;
            let Some(last) = page.entries.last() else { break };
            after = last.id;
            for entry in page.entries {
                if entry.id > self.horizon {
                    break;
                }
                match entry.event {
                    Ok(Event::Orders(orders)) => self.check_entry(orders).await?,
                    Ok(_) => {}
                    Err(error) => {
                        self.unreadable += 1;
                        let detail = format!("outbox entry {} cannot be read: {}", entry.id, error.reason);
                        self.violations.push(Violation { code: "outbox_unreadable", detail, order_id: None });
                    }
                }
            }
        }
        // Not in the outbox any more: stored and trimmed meanwhile, or never there.
        let rest: Vec<OrderId> = self.unstored.keys().copied().collect();
        self.take_stored(&rest).await?;
        for (order_id, unstored) in std::mem::take(&mut self.unstored) {
            if !self.look.answers(order_id.table()) {
                continue;
            }
            let detail = format!(
                "{} holds order {order_id}, which is neither stored nor in the outbox",
                unstored.claim.uid
            );
            self.book(unstored.sale).violation("claim_without_order", Some(order_id), detail);
        }
        Ok(())
    }

    async fn take_stored(&mut self, orders: &[OrderId]) -> Result<(), Obstacle> {
        for chunk in orders.chunks(LOOKUP) {
            for order in self.look.orders(chunk).await?.0 {
                if let Some(unstored) = self.unstored.remove(&order.order_id) {
                    let book = self.book(unstored.sale);
                    book.orders.add(order.status);
                    if !is_closed(order.status) {
                        book.held_by_orders += u64::from(order.quantity);
                    }
                }
            }
        }
        Ok(())
    }

    async fn check_entry(&mut self, orders: Vec<OrderRecord>) -> Result<(), Obstacle> {
        let Some(sale_id) = orders.first().map(|order| order.sale_id.clone()) else { return Ok(()) };
        let Some(place) = self.places.get(&sale_id).copied() else { return Ok(()) };
        if self.books[place as usize].row.is_none() || self.books[place as usize].archived() {
            return Ok(());
        }
        let mut without = Vec::new();
        for order in orders {
            match self.unstored.remove(&order.order_id) {
                Some(_) => self.book(place).in_flight += 1,
                None => without.push(order),
            }
        }
        for chunk in without.chunks(LOOKUP) {
            let uids: Vec<Uid> = chunk.iter().map(|order| order.uid.clone()).collect();
            let claims: HashSet<OrderId> = read::claims_of(self.conn, &sale_id, &uids)
                .await?
                .into_iter()
                .map(|claim| claim.order_id)
                .collect();
            for order in chunk.iter().filter(|order| !claims.contains(&order.order_id)) {
                let detail = format!(
                    "order {} of {} is in the outbox, but there is no claim",
                    order.order_id, order.uid
                );
                self.book(place).violation("outbox_without_claim", Some(order.order_id), detail);
            }
        }
        Ok(())
    }
}
