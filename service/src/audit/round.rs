//! One comparison, from the horizon to the sums. The order of the steps is explained in [`super`].

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap, HashSet};

use redis::aio::ConnectionLike;
use seckill_domain::{Epoch, OrderId, OutboxId, SaleId, TABLES};
use seckill_ledger::read::{self, Claim, Sale};
use seckill_ledger::{Fence, roles};

use super::book::Book;
use super::look::Look;
use super::{MAX_LISTED, Obstacle, OrderCounts, Report, SaleReport, Verdict, Violation};
use crate::orders::OrderCenters;

/// Orders held in memory at once, some 40 bytes each; more are compared in several parts.
const PART: u64 = 2_000_000;
/// Sales and outbox entries read at once.
pub(super) const PAGE: usize = 500;
/// Orders looked at again at once.
pub(super) const LOOKUP: usize = 500;

/// A claim whose order was not in its table when the tables were read.
pub(super) struct Unstored {
    pub(super) sale: u32,
    pub(super) claim: Claim,
}

pub(super) struct Round<'a, C> {
    pub(super) look: Look<'a>,
    pub(super) conn: &'a mut C,
    pub(super) only: Option<&'a SaleId>,
    pub(super) hasher: RandomState,
    /// Epoch of the ledger's fence.
    pub(super) epoch: Epoch,
    /// Later purchases are not looked at.
    pub(super) horizon: OutboxId,
    pub(super) books: Vec<Book>,
    pub(super) places: HashMap<SaleId, u32>,
    /// Orders whose claims were seen as released.
    pub(super) released: HashSet<OrderId>,
    pub(super) unstored: HashMap<OrderId, Unstored>,
    pub(super) unreadable: u64,
    pub(super) violations: Vec<Violation>,
    pub(super) problems: Vec<String>,
}

pub(super) async fn run<C: ConnectionLike>(
    orders: &OrderCenters,
    conn: &mut C,
    only: Option<&SaleId>,
) -> Result<Report, Obstacle> {
    // Read before the ledger: in a ledger that was never rolled back, all of it is at or before the last entry.
    let mut look = Look::new(orders);
    let mut stored = OutboxId::ZERO;
    for place in look.places() {
        stored = stored.max(look.position(place, 0).await?.unwrap_or(OutboxId::ZERO));
    }
    let standing = roles::standing(conn).await?;
    // A ledger without a fence, or with one of another release, can still be read; its epoch is what it shows.
    let shown = standing.fence.as_deref().and_then(|fence| fence.split(':').nth(2)?.parse().ok());
    let epoch = Epoch(shown.unwrap_or(stored.epoch));
    let mut problems = Vec::new();
    match standing.fence.as_deref().map(str::parse::<Fence>) {
        Some(Ok(_)) => {}
        Some(Err(error)) => problems.push(format!("the ledger's fence cannot be read: {error}")),
        None => problems.push("the ledger has no fence: it is empty or was never begun".to_owned()),
    }
    let mut round = Round {
        look,
        conn,
        only,
        hasher: RandomState::new(),
        epoch,
        horizon: stored.max(OutboxId { epoch: epoch.0, seq: standing.seq }),
        books: Vec::new(),
        places: HashMap::new(),
        released: HashSet::new(),
        unstored: HashMap::new(),
        unreadable: 0,
        violations: Vec::new(),
        problems,
    };
    round.open_books().await?;
    for tables in round.parts() {
        round.compare_part(tables).await?;
    }
    round.settle_in_flight().await?;
    round.sums().await?;
    round.set_aside().await?;
    if !round.look.stands() {
        return Ok(Report::incomplete("shards moved between centers meanwhile; audit again".to_owned()));
    }
    let silent: Vec<String> = round.look.silent().collect();
    round.problems.extend(silent);
    Ok(round.report())
}

impl<C: ConnectionLike> Round<'_, C> {
    async fn open_books(&mut self) -> Result<(), Obstacle> {
        for row in self.rows_since(0).await? {
            self.place(&row.spec.sale_id.clone(), Some(row));
        }
        if let Some(only) = self.only {
            self.place(only, None);
        }
        Ok(())
    }

    /// All sales that changed after a sequence, each as it was last seen.
    pub(super) async fn rows_since(&mut self, mut since: u64) -> Result<Vec<Sale>, Obstacle> {
        let mut rows: BTreeMap<SaleId, Sale> = BTreeMap::new();
        loop {
            let snapshot = read::snapshot(self.conn, since, PAGE).await?;
            let count = snapshot.sales.len() + snapshot.unreadable.len();
            for (sale, reason) in snapshot.unreadable {
                let detail = format!("the ledger's record of sale {sale} cannot be read: {reason}");
                if !self.violations.iter().any(|known| known.detail == detail) {
                    self.violations.push(Violation { code: "sale_unreadable", detail, order_id: None });
                }
            }
            let Some(last) = snapshot.sales.last() else { break };
            since = last.touched;
            for row in snapshot.sales {
                if self.only.is_none_or(|only| *only == row.spec.sale_id) {
                    rows.insert(row.spec.sale_id.clone(), row);
                }
            }
            if count < PAGE {
                break;
            }
        }
        Ok(rows.into_values().collect())
    }

    pub(super) fn place(&mut self, id: &SaleId, row: Option<Sale>) -> u32 {
        if let Some(place) = self.places.get(id) {
            return *place;
        }
        let place = self.books.len() as u32;
        self.books.push(Book::new(id.clone(), row));
        self.places.insert(id.clone(), place);
        place
    }

    pub(super) fn book(&mut self, place: u32) -> &mut Book {
        &mut self.books[place as usize]
    }

    /// Ranges of tables, each with no more orders than fit. Users spread evenly over the tables.
    fn parts(&self) -> Vec<std::ops::Range<u16>> {
        let accepted: u64 =
            self.books.iter().filter_map(|book| book.row.as_ref()).map(|row| row.accepted).sum();
        let parts = accepted.div_ceil(PART).clamp(1, u64::from(TABLES)) as u16;
        let width = TABLES.div_ceil(parts);
        (0..parts)
            .map(|part| part * width..(part * width + width).min(TABLES))
            .filter(|part| !part.is_empty())
            .collect()
    }

    /// Where an order's entry is in the outbox. The id shows the epoch mod 10000; the newest epoch that fits and
    /// is not in the future is meant.
    pub(super) fn outbox_id(&self, order_id: OrderId) -> OutboxId {
        let shown = u64::from(order_id.head() % 10_000);
        let behind = (self.epoch.0 + 10_000 - shown) % 10_000;
        OutboxId { epoch: self.epoch.0.saturating_sub(behind), seq: order_id.seq() }
    }

    pub(super) fn in_scope(&self, order_id: OrderId) -> bool {
        self.outbox_id(order_id) <= self.horizon
    }

    /// Outbox entries that an order database set aside because it could not read them.
    async fn set_aside(&mut self) -> Result<(), Obstacle> {
        for place in self.look.places() {
            let Some(found) = self.look.unreadable(place).await? else { continue };
            self.unreadable += found.count;
            for (origin, reason) in found.entries {
                let detail = format!("{origin} was set aside in {}: {reason}", self.look.name(place));
                self.violations.push(Violation { code: "outbox_unreadable", detail, order_id: None });
            }
        }
        Ok(())
    }

    fn report(self) -> Report {
        // A sale that was asked for and that nobody knows has no books.
        let known = |book: &Book| book.row.is_some() || book.orders != OrderCounts::default();
        let mut sales: Vec<SaleReport> = self.books.into_iter().filter(known).map(Book::report).collect();
        sales.sort_by(|a, b| a.sale_id.cmp(&b.sale_id));
        let mut violations = self.violations;
        violations.truncate(MAX_LISTED);
        let mut report = Report {
            verdict: Verdict::Clean,
            sales,
            unreadable: self.unreadable,
            violations,
            problems: self.problems,
            queue: None,
        };
        report.verdict = super::verdict(&report);
        report
    }
}
