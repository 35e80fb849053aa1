//! The audit: do ledger, outbox and order tables tell the same story?
//!
//! It runs beside the load and raises no false alarm, because of the order in which it reads:
//!
//! 1. **The horizon**: the id of the ledger's last entry (or of the last one stored, if the ledger fell behind). Purchases behind it are not looked at, so what is
//!    compared stands still except for cancels, expiries and releases.
//! 2. **Order tables, then claims.** An order is stored only after it was claimed, so each order that was read
//!    has a claim by the time claims are read.
//! 3. **A claim without an order**: its database's outbox position is read first, then the order is looked up
//!    again in its home center. Position and orders move in one transaction, so an order at or before the position that was read
//!    must be found; one behind it is in flight, and then the outbox must hold it.
//! 4. **A released claim of an open order**: the order is read again. It was closed before its release was even
//!    asked for, so now it must be closed.
//! 5. **A closed order with a held claim**: the release record is looked for, then the claim is read again. The
//!    record goes only after the ledger has answered, so without a record the claim must show the release.
//! 6. **Sums**: a sale's row is read last, in one step. What changed between the horizon and that row is in the
//!    outbox; with it, the sum of the claims seen is carried forward to the row's moment, to the unit.
//!
//! Each user's orders are in the database of the home center and nowhere else; databases that replicate each other
//! hold copies, which count as long as the home center has the order, too. Other centers are asked over the
//! cross-center API. One that does not answer makes the audit incomplete, and what is at home there is left out.
//! The ledger is the master's: on a replica, claims may be behind the orders.
//!
//! Adoptions and archiving are the exception: they change claims without naming them. So whatever looks like a
//! violation is looked at once more from the beginning, and counts if it is still there.

mod book;
mod compare;
mod flight;
mod look;
mod queue;
mod round;
mod sums;

pub use queue::{ConsumerReport, QueueReport, RelayReport, add as add_queue};
use redis::aio::ConnectionLike;
use seckill_domain::{OrderId, OrderStatus, SaleId};
use serde::Serialize;
use tokio::sync::Semaphore;

use crate::orders::{self, OrderCenters};

/// Violations, and lost orders, of one sale that are listed; the rest is counted.
pub const MAX_LISTED: usize = 100;

/// One audit at a time: a second one would only slow both down.
static TURN: Semaphore = Semaphore::const_new(1);

/// What an audit found; serialized, the body of `GET /admin/v1/audit`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The result.
    pub verdict: Verdict,
    /// By sale.
    pub sales: Vec<SaleReport>,
    /// Outbox entries that could not be read, each a violation.
    pub unreadable: u64,
    /// Violations that belong to no sale.
    pub violations: Vec<Violation>,
    /// Why not everything could be compared.
    pub problems: Vec<String>,
    /// What the broker holds, where the queue is Kafka.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueueReport>,
}

/// The result of an audit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Everything agrees.
    Clean,
    /// Something does not.
    Violation,
    /// Something could not be read, and what could be read agrees.
    Incomplete,
}

/// One sale's books.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SaleReport {
    /// The sale.
    pub sale_id: SaleId,
    /// Its state in the ledger; absent if the ledger does not know it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<seckill_domain::LedgerState>,
    /// Units on offer in all.
    pub total: u64,
    /// Units left.
    pub remaining: u64,
    /// Units held by users.
    pub claimed: u64,
    /// Units given back, ever.
    pub released: u64,
    /// Stored orders by state.
    pub orders: OrderCounts,
    /// Accepted purchases on their way from the outbox into the order tables.
    pub in_flight: u64,
    /// Closed orders whose units are on their way back to the ledger.
    pub releases_in_flight: u64,
    /// Orders that were claimed again after their claims were lost: by an adoption, or from a lost master's tail.
    pub reclaimed: u64,
    /// Closed orders that the ledger knows nothing of: what a forced shift or an adoption accepted as lost.
    pub accepted_loss: u64,
    /// The first [`MAX_LISTED`] of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lost_orders: Vec<OrderId>,
    /// How many violations there are.
    pub violation_count: u64,
    /// The first [`MAX_LISTED`] of them.
    pub violations: Vec<Violation>,
}

/// Stored orders by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct OrderCounts {
    /// Waiting for payment.
    pub created: u64,
    /// Paid.
    pub paid: u64,
    /// Given back by the buyer.
    pub cancelled: u64,
    /// Not paid in time.
    pub expired: u64,
}

impl OrderCounts {
    fn add(&mut self, status: OrderStatus) {
        match status {
            OrderStatus::Created => self.created += 1,
            OrderStatus::Paid => self.paid += 1,
            OrderStatus::Cancelled => self.cancelled += 1,
            OrderStatus::Expired => self.expired += 1,
        }
    }
}

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Stable name of the rule that is broken.
    pub code: &'static str,
    /// What was found.
    pub detail: String,
    /// The order it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order_id: Option<OrderId>,
}

/// Why something could not be compared.
#[derive(Debug, thiserror::Error)]
enum Obstacle {
    #[error("the ledger: {0}")]
    Ledger(#[from] seckill_ledger::Error),
    #[error("the order database: {0}")]
    Orders(#[from] orders::Error),
}

/// Compares the books of all sales, or of one. Reads every claim and every order once, in batches; beyond two
/// million orders it goes through the tables in several parts, so that its memory stays bounded.
pub async fn run(orders: &OrderCenters, conn: &mut impl ConnectionLike, sale: Option<&SaleId>) -> Report {
    let _turn = TURN.acquire().await;
    let first = round::run(orders, conn, sale).await;
    match first {
        Ok(report) if report.verdict != Verdict::Violation => report,
        Ok(suspicious) => match round::run(orders, conn, sale).await {
            Ok(again) => confirmed(again, &suspicious),
            // What was seen once is not confirmed.
            Err(obstacle) => {
                Report { verdict: Verdict::Incomplete, problems: vec![obstacle.to_string()], ..suspicious }
            }
        },
        Err(obstacle) => Report::incomplete(obstacle.to_string()),
    }
}

impl Report {
    /// A report of an audit that could not read what it compares.
    pub fn incomplete(problem: String) -> Report {
        Report {
            verdict: Verdict::Incomplete,
            sales: Vec::new(),
            unreadable: 0,
            violations: Vec::new(),
            problems: vec![problem],
            queue: None,
        }
    }
}

/// Keeps the violations that the first look saw too.
fn confirmed(mut report: Report, first: &Report) -> Report {
    for sale in &mut report.sales {
        let before = first.sales.iter().find(|before| before.sale_id == sale.sale_id);
        // Where a list was cut off, what is new may have been there before.
        let cut = before.is_some_and(|before| before.violation_count > before.violations.len() as u64);
        if cut || sale.violation_count > sale.violations.len() as u64 {
            continue;
        }
        sale.violations.retain(|violation| {
            before.is_some_and(|before| {
                before
                    .violations
                    .iter()
                    .any(|seen| seen.code == violation.code && seen.order_id == violation.order_id)
            })
        });
        sale.violation_count = sale.violations.len() as u64;
    }
    report.verdict = verdict(&report);
    report
}

fn verdict(report: &Report) -> Verdict {
    let violations = report.unreadable > 0
        || !report.violations.is_empty()
        || report.sales.iter().any(|sale| sale.violation_count > 0);
    match (violations, report.problems.is_empty()) {
        (true, _) => Verdict::Violation,
        (false, true) => Verdict::Clean,
        (false, false) => Verdict::Incomplete,
    }
}
