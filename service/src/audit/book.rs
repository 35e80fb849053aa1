//! One sale's books, as far as the comparison has come.

use seckill_domain::{LedgerState, OrderId, OrderStatus, SaleId, Uid};
use seckill_ledger::read::Sale;

use super::{MAX_LISTED, OrderCounts, SaleReport, Violation};

/// A sale as far as the comparison has come.
pub(super) struct Book {
    pub(super) id: SaleId,
    pub(super) row: Option<Sale>,
    pub(super) orders: OrderCounts,
    /// Units of the orders that should hold them.
    pub(super) held_by_orders: u64,
    pub(super) claims: u64,
    pub(super) held: u64,
    pub(super) released: u64,
    pub(super) claims_unreadable: bool,
    pub(super) in_flight: u64,
    pub(super) releases_in_flight: u64,
    pub(super) accepted_loss: u64,
    /// Some of these.
    pub(super) lost_orders: Vec<OrderId>,
    pub(super) violations: Vec<Violation>,
    pub(super) violation_count: u64,
    /// Users seen above the limit, to be held against the row's final limit.
    pub(super) above: Vec<(Uid, u64)>,
}

impl Book {
    pub(super) fn new(id: SaleId, row: Option<Sale>) -> Book {
        Book {
            id,
            row,
            orders: OrderCounts::default(),
            held_by_orders: 0,
            claims: 0,
            held: 0,
            released: 0,
            claims_unreadable: false,
            in_flight: 0,
            releases_in_flight: 0,
            accepted_loss: 0,
            lost_orders: Vec::new(),
            violations: Vec::new(),
            violation_count: 0,
            above: Vec::new(),
        }
    }

    pub(super) fn violation(
        &mut self,
        code: &'static str,
        order_id: Option<OrderId>,
        detail: impl Into<String>,
    ) {
        self.violation_count += 1;
        if self.violations.len() < MAX_LISTED {
            self.violations.push(Violation { code, detail: detail.into(), order_id });
        }
    }

    /// An order that is known to be gone.
    pub(super) fn accept_loss(&mut self, order_id: OrderId) {
        self.accepted_loss += 1;
        if self.lost_orders.len() < MAX_LISTED {
            self.lost_orders.push(order_id);
        }
    }

    pub(super) fn archived(&self) -> bool {
        self.row.as_ref().is_some_and(|row| row.state == LedgerState::Archived)
    }

    pub(super) fn report(self) -> SaleReport {
        let row = self.row.as_ref();
        SaleReport {
            state: row.map(|row| row.state),
            total: row.map_or(0, |row| row.total),
            remaining: row.map_or(0, |row| row.remaining),
            claimed: row.map_or(0, |row| row.claimed),
            released: row.map_or(0, |row| row.released),
            sale_id: self.id,
            orders: self.orders,
            in_flight: self.in_flight,
            releases_in_flight: self.releases_in_flight,
            reclaimed: row.map_or(0, |row| row.reclaimed),
            accepted_loss: self.accepted_loss,
            lost_orders: self.lost_orders,
            violation_count: self.violation_count,
            violations: self.violations,
        }
    }
}

pub(super) fn is_closed(status: OrderStatus) -> bool {
    match status {
        OrderStatus::Created | OrderStatus::Paid => false,
        OrderStatus::Cancelled | OrderStatus::Expired => true,
    }
}
