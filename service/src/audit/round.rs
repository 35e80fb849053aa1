//! One comparison, from the horizon to the sums. The order of the steps is explained in [`super`].

use std::collections::hash_map::{Entry, RandomState};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::BuildHasher;

use redis::aio::ConnectionLike;
use seckill_domain::{Epoch, LedgerState, OrderId, OrderStatus, OutboxId, SaleId, TABLES, Table, Uid};
use seckill_ledger::outbox::Event;
use seckill_ledger::read::{self, Claim, Sale};
use seckill_ledger::{Error as LedgerError, Fence, outbox, roles};

use super::{MAX_LISTED, Obstacle, OrderCounts, Report, SaleReport, Verdict, Violation};
use crate::orders::{AuditOrder, OrderStore};

/// Orders held in memory at once, some 40 bytes each; more are compared in several parts.
const PART: u64 = 2_000_000;
/// Rows of an order table read at once.
const ROWS: u32 = 4096;
/// Users' claims read at once; Redis takes about a millisecond for it.
const CLAIMS: usize = 1000;
/// Sales and outbox entries read at once.
const PAGE: usize = 500;
/// Orders looked at again at once.
const LOOKUP: usize = 500;

/// What is compared of an order.
struct Stored {
    sale: u32,
    uid: u64,
    quantity: u32,
    status: OrderStatus,
    lost: bool,
    claimed: bool,
}

/// A claim whose order was not in its table when the tables were read.
struct Unstored {
    sale: u32,
    claim: Claim,
}

/// A sale as far as the comparison has come.
struct Book {
    id: SaleId,
    row: Option<Sale>,
    orders: OrderCounts,
    /// Units of the orders that should hold them.
    held_by_orders: u64,
    claims: u64,
    held: u64,
    released: u64,
    claims_unreadable: bool,
    in_flight: u64,
    releases_in_flight: u64,
    accepted_loss: u64,
    violations: Vec<Violation>,
    violation_count: u64,
    /// Users seen above the limit, to be held against the row's final limit.
    above: Vec<(Uid, u64)>,
}

impl Book {
    fn new(id: SaleId, row: Option<Sale>) -> Book {
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
            violations: Vec::new(),
            violation_count: 0,
            above: Vec::new(),
        }
    }

    fn violation(&mut self, code: &'static str, order_id: Option<OrderId>, detail: impl Into<String>) {
        self.violation_count += 1;
        if self.violations.len() < MAX_LISTED {
            self.violations.push(Violation { code, detail: detail.into(), order_id });
        }
    }

    fn archived(&self) -> bool {
        self.row.as_ref().is_some_and(|row| row.state == LedgerState::Archived)
    }
}

struct Round<'a, C> {
    store: &'a OrderStore,
    conn: &'a mut C,
    only: Option<&'a SaleId>,
    hasher: RandomState,
    /// Epoch of the ledger's fence.
    epoch: Epoch,
    /// Later purchases are not looked at.
    horizon: OutboxId,
    books: Vec<Book>,
    places: HashMap<SaleId, u32>,
    /// Orders whose claims were seen as released.
    released: HashSet<OrderId>,
    unstored: HashMap<OrderId, Unstored>,
    unreadable: u64,
    violations: Vec<Violation>,
    problems: Vec<String>,
}

pub(super) async fn run<C: ConnectionLike>(
    store: &OrderStore,
    conn: &mut C,
    only: Option<&SaleId>,
) -> Result<Report, Obstacle> {
    // Read before the ledger: in a ledger that was never rolled back, all of it is at or before the last entry.
    let stored = store.position(0).await?;
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
        store,
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
    async fn rows_since(&mut self, mut since: u64) -> Result<Vec<Sale>, Obstacle> {
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

    fn place(&mut self, id: &SaleId, row: Option<Sale>) -> u32 {
        if let Some(place) = self.places.get(id) {
            return *place;
        }
        let place = self.books.len() as u32;
        self.books.push(Book::new(id.clone(), row));
        self.places.insert(id.clone(), place);
        place
    }

    fn book(&mut self, place: u32) -> &mut Book {
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
    fn outbox_id(&self, order_id: OrderId) -> OutboxId {
        let shown = u64::from(order_id.head() % 10_000);
        let behind = (self.epoch.0 + 10_000 - shown) % 10_000;
        OutboxId { epoch: self.epoch.0.saturating_sub(behind), seq: order_id.seq() }
    }

    fn in_scope(&self, order_id: OrderId) -> bool {
        self.outbox_id(order_id) <= self.horizon
    }

    async fn compare_part(&mut self, tables: std::ops::Range<u16>) -> Result<(), Obstacle> {
        let mut stored = self.read_orders(tables.clone()).await?;
        let mut suspects = Vec::new();
        let mut missing = HashMap::new();
        for place in 0..self.books.len() as u32 {
            if self.books[place as usize].row.is_some() && !self.books[place as usize].archived() {
                self.read_claims(place, &tables, &mut stored, &mut missing, &mut suspects).await?;
            }
        }
        self.look_for_orders(missing, &mut suspects).await?;
        self.look_again_at(suspects).await?;
        self.orders_without_claim(stored).await
    }

    /// Step 2, first half: the order tables.
    async fn read_orders(
        &mut self,
        tables: std::ops::Range<u16>,
    ) -> Result<HashMap<OrderId, Stored>, Obstacle> {
        let mut stored = HashMap::new();
        for table in tables.filter_map(Table::new) {
            let mut after = Some(String::new());
            while let Some(from) = after {
                let rows = self.store.audit_rows(table, &from, self.only, ROWS).await?;
                after = rows.next;
                for row in rows.unreadable {
                    self.violations.push(Violation {
                        code: "order_unreadable",
                        detail: format!(
                            "orders_{table} has a row {:?} that is no order: {}",
                            row.order_id, row.reason
                        ),
                        order_id: None,
                    });
                }
                for order in rows.orders {
                    self.keep(table, &order, &mut stored);
                }
            }
        }
        Ok(stored)
    }

    fn keep(&mut self, table: Table, order: &AuditOrder, stored: &mut HashMap<OrderId, Stored>) {
        if !self.in_scope(order.order_id) {
            return;
        }
        let uid = self.hasher.hash_one(order.uid.as_str());
        let sale = self.place(&order.sale_id, None);
        let book = self.book(sale);
        book.orders.add(order.status);
        if matches!(order.status, OrderStatus::Created | OrderStatus::Paid) {
            book.held_by_orders += u64::from(order.quantity);
        }
        if order.uid.table() != table || order.order_id.table() != table {
            let right = order.uid.table();
            book.violation(
                "wrong_table",
                Some(order.order_id),
                format!(
                    "order {} of {} is in orders_{table}, belongs to orders_{right}",
                    order.order_id, order.uid
                ),
            );
        }
        let kept = Stored {
            sale,
            uid,
            quantity: order.quantity,
            status: order.status,
            lost: order.lost,
            claimed: false,
        };
        if stored.insert(order.order_id, kept).is_some() {
            let detail = format!("order {} is stored twice", order.order_id);
            self.book(sale).violation("duplicate_order", Some(order.order_id), detail);
        }
    }

    /// Step 2, second half: a sale's claims, held against the orders.
    async fn read_claims(
        &mut self,
        sale: u32,
        tables: &std::ops::Range<u16>,
        stored: &mut HashMap<OrderId, Stored>,
        missing: &mut HashMap<OrderId, Unstored>,
        suspects: &mut Vec<Unstored>,
    ) -> Result<(), Obstacle> {
        let id = self.books[sale as usize].id.clone();
        let mut cursor = 0;
        loop {
            let (next, claims) = match read::scan_claims(self.conn, &id, cursor, CLAIMS).await {
                Ok(page) => page,
                Err(LedgerError::Malformed(what)) => {
                    let book = self.book(sale);
                    if !book.claims_unreadable {
                        book.claims_unreadable = true;
                        book.violation("claim_unreadable", None, what);
                    }
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            };
            for of_user in claims.chunk_by(|a, b| a.uid == b.uid) {
                if tables.contains(&of_user[0].uid.table().number()) {
                    self.check_user(sale, of_user);
                }
                for claim in of_user {
                    if tables.contains(&claim.order_id.table().number()) && self.in_scope(claim.order_id) {
                        self.check_claim(sale, claim, stored, missing, suspects);
                    }
                }
            }
            cursor = next;
            if cursor == 0 {
                return Ok(());
            }
        }
    }

    fn check_user(&mut self, sale: u32, claims: &[Claim]) {
        let book = self.book(sale);
        let held: u64 =
            claims.iter().filter(|claim| !claim.released).map(|claim| u64::from(claim.quantity.get())).sum();
        let limit = book.row.as_ref().map_or(0, |row| u64::from(row.spec.per_user_limit));
        if held > limit && book.above.len() < MAX_LISTED {
            book.above.push((claims[0].uid.clone(), held));
        }
        for (index, claim) in claims.iter().enumerate() {
            // Claims that an adoption made have no key.
            let known = |other: &Claim| other.key == claim.key && claim.key != [0; 16];
            if claims[..index].iter().any(known) {
                book.violation(
                    "key_twice",
                    Some(claim.order_id),
                    format!("{} has two orders under one key, one is {}", claim.uid, claim.order_id),
                );
            }
        }
    }

    fn check_claim(
        &mut self,
        sale: u32,
        claim: &Claim,
        stored: &mut HashMap<OrderId, Stored>,
        missing: &mut HashMap<OrderId, Unstored>,
        suspects: &mut Vec<Unstored>,
    ) {
        let uid = self.hasher.hash_one(claim.uid.as_str());
        match stored.entry(claim.order_id) {
            Entry::Occupied(mut found) => {
                let order = found.get_mut();
                let same_owner = order.sale == sale && order.uid == uid;
                if order.claimed && same_owner {
                    return; // a scan may show a claim twice
                }
                let quantity = order.quantity;
                let (closed, lost) = (is_closed(order.status), order.lost);
                order.claimed = true;
                if !same_owner || quantity != claim.quantity.get() {
                    self.differs(sale, claim, quantity);
                } else if closed != claim.released || lost {
                    suspects.push(Unstored { sale, claim: claim.clone() });
                }
            }
            Entry::Vacant(_) => match missing.entry(claim.order_id) {
                Entry::Occupied(seen) => {
                    if seen.get().claim.uid != claim.uid || seen.get().sale != sale {
                        let detail = format!("order {} is claimed twice", claim.order_id);
                        self.book(sale).violation("duplicate_order", Some(claim.order_id), detail);
                    }
                    return;
                }
                Entry::Vacant(place) => {
                    place.insert(Unstored { sale, claim: claim.clone() });
                }
            },
        }
        let units = u64::from(claim.quantity.get());
        let book = self.book(sale);
        book.claims += 1;
        if claim.released {
            book.released += units;
            self.released.insert(claim.order_id);
        } else {
            book.held += units;
        }
    }

    fn differs(&mut self, sale: u32, claim: &Claim, quantity: u32) {
        let detail = format!(
            "order {} is stored with {quantity} units, claimed by {} in sale {} with {}",
            claim.order_id, claim.uid, self.books[sale as usize].id, claim.quantity
        );
        self.book(sale).violation("order_differs", Some(claim.order_id), detail);
    }

    /// Step 3: claims whose orders were not in the tables when these were read.
    async fn look_for_orders(
        &mut self,
        missing: HashMap<OrderId, Unstored>,
        suspects: &mut Vec<Unstored>,
    ) -> Result<(), Obstacle> {
        let mut positions = HashMap::new();
        for order_id in missing.keys() {
            if let Entry::Vacant(place) = positions.entry(order_id.partition()) {
                place.insert(self.store.position(order_id.partition()).await?);
            }
        }
        let ids: Vec<OrderId> = missing.keys().copied().collect();
        let mut missing = missing;
        for chunk in ids.chunks(LOOKUP) {
            for order in self.store.audit_orders(chunk).await? {
                let Some(unstored) = missing.remove(&order.order_id) else { continue };
                let book = &mut self.books[unstored.sale as usize];
                book.orders.add(order.status);
                if !is_closed(order.status) {
                    book.held_by_orders += u64::from(order.quantity);
                }
                if order.uid != unstored.claim.uid
                    || order.sale_id != book.id
                    || order.quantity != unstored.claim.quantity.get()
                {
                    self.differs(unstored.sale, &unstored.claim, order.quantity);
                } else if is_closed(order.status) != unstored.claim.released {
                    suspects.push(unstored);
                }
            }
        }
        for (order_id, unstored) in missing {
            let position = positions.get(&order_id.partition()).copied().unwrap_or(OutboxId::ZERO);
            if self.outbox_id(order_id) <= position {
                self.claim_without_order(&unstored, position);
            } else {
                self.unstored.insert(order_id, unstored);
            }
        }
        Ok(())
    }

    fn claim_without_order(&mut self, unstored: &Unstored, position: OutboxId) {
        let Claim { order_id, uid, .. } = &unstored.claim;
        let detail = format!(
            "{uid} holds order {order_id}, the outbox is stored up to {position}, but the order is not"
        );
        self.book(unstored.sale).violation("claim_without_order", Some(*order_id), detail);
    }

    /// Steps 4 and 5: order closed and claim held, or the other way round.
    async fn look_again_at(&mut self, suspects: Vec<Unstored>) -> Result<(), Obstacle> {
        for chunk in suspects.chunks(LOOKUP) {
            let ids: Vec<OrderId> = chunk.iter().map(|suspect| suspect.claim.order_id).collect();
            let orders: HashMap<OrderId, AuditOrder> = self
                .store
                .audit_orders(&ids)
                .await?
                .into_iter()
                .map(|order| (order.order_id, order))
                .collect();
            let awaiting = self.store.awaiting_release(&ids).await?;
            let mut uids: BTreeMap<u32, Vec<Uid>> = BTreeMap::new();
            for suspect in chunk {
                uids.entry(suspect.sale).or_default().push(suspect.claim.uid.clone());
            }
            let mut claims = HashMap::new();
            for (sale, uids) in uids {
                let id = self.books[sale as usize].id.clone();
                for claim in read::claims_of(self.conn, &id, &uids).await? {
                    claims.insert(claim.order_id, claim.released);
                }
            }
            for suspect in chunk {
                let Claim { order_id, uid, released, .. } = &suspect.claim;
                let Some(order) = orders.get(order_id) else { continue };
                let book = &mut self.books[suspect.sale as usize];
                match (is_closed(order.status), released) {
                    (true, true) => {}
                    (false, true) => book.violation(
                        "released_but_open",
                        Some(*order_id),
                        format!(
                            "order {order_id} of {uid} is {}, but its units were given back",
                            order.status
                        ),
                    ),
                    (_, false) if awaiting.contains(order_id) => book.releases_in_flight += 1,
                    (true, false) if claims.get(order_id) == Some(&false) => book.violation(
                        "closed_but_held",
                        Some(*order_id),
                        format!(
                            "order {order_id} of {uid} is {}, but its units were not given back",
                            order.status
                        ),
                    ),
                    (true | false, false) => {}
                }
            }
        }
        Ok(())
    }

    /// What is left of the orders when every claim has been held against them.
    async fn orders_without_claim(&mut self, stored: HashMap<OrderId, Stored>) -> Result<(), Obstacle> {
        for (order_id, order) in stored {
            let outbox_id = self.outbox_id(order_id);
            let epoch = self.epoch.0;
            let book = &mut self.books[order.sale as usize];
            if order.claimed || book.claims_unreadable {
                continue;
            }
            if book.archived() {
                if order.status == OrderStatus::Created {
                    let detail = format!("order {order_id} is open, but its sale is archived");
                    book.violation("open_in_archive", Some(order_id), detail);
                }
                continue;
            }
            // Every adoption begins an epoch: what an older one lost is known and takes nothing from anybody.
            if is_closed(order.status) && (order.lost || outbox_id.epoch < epoch) {
                book.accepted_loss += 1;
                continue;
            }
            let what =
                if book.row.is_none() { "the ledger does not know its sale" } else { "there is no claim" };
            let detail = format!("order {order_id} is {}, but {what}", order.status);
            book.violation("order_without_claim", Some(order_id), detail);
        }
        Ok(())
    }

    /// Step 3, the end: what is behind the position must be in the outbox, and what is in the outbox must have
    /// its claim.
    async fn settle_in_flight(&mut self) -> Result<(), Obstacle> {
        let position = self.store.position(0).await?;
        let due: Vec<OrderId> =
            self.unstored.keys().copied().filter(|order_id| self.outbox_id(*order_id) <= position).collect();
        self.take_stored(&due).await?;
        for order_id in due {
            if let Some(unstored) = self.unstored.remove(&order_id) {
                self.claim_without_order(&unstored, position);
            }
        }
        let mut after = position;
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
            for order in self.store.audit_orders(chunk).await? {
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

    async fn check_entry(&mut self, orders: Vec<seckill_domain::OrderRecord>) -> Result<(), Obstacle> {
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

    /// Step 6: rows, read last, and the sums carried forward to their moments.
    async fn sums(&mut self) -> Result<(), Obstacle> {
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
                        for order in self.store.audit_orders(&unknown).await? {
                            quantities.insert(order.order_id, u64::from(order.quantity));
                        }
                        let Some(book) = self.changed_book(Some(&sale_id), busy, seq) else { continue };
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
        Ok(outbox::first_id(self.conn).await?.is_some_and(|first| first <= self.horizon))
    }

    /// The book of a sale whose row already contains the entry `seq`.
    fn changed_book(&mut self, sale: Option<&SaleId>, busy: &HashSet<u32>, seq: u64) -> Option<&mut Book> {
        let place = *self.places.get(sale?)?;
        let book = &mut self.books[place as usize];
        (busy.contains(&place) && book.row.as_ref().is_some_and(|row| seq <= row.touched)).then_some(book)
    }

    fn check_sums(&mut self, place: u32, exact: bool) {
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
            if book.held_by_orders != row.claimed {
                let detail = format!(
                    "paid orders hold {} units, the archived sale {}",
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

    /// Outbox entries that the order database set aside because it could not read them.
    async fn set_aside(&mut self) -> Result<(), Obstacle> {
        let page = self.store.unreadable(MAX_LISTED as u32, None).await?;
        let mut count = page.items.len() as u64;
        let mut next = page.next;
        for entry in page.items {
            let detail = format!("outbox entry {} was set aside: {}", entry.outbox_id, entry.reason);
            self.violations.push(Violation { code: "outbox_unreadable", detail, order_id: None });
        }
        while let Some(cursor) = next {
            let page = self.store.unreadable(1000, Some(cursor)).await?;
            count += page.items.len() as u64;
            next = page.next;
        }
        self.unreadable += count;
        Ok(())
    }

    fn report(self) -> Report {
        // A sale that was asked for and that nobody knows has no books.
        let known = |book: &Book| book.row.is_some() || book.orders != OrderCounts::default();
        let mut sales: Vec<SaleReport> = self.books.into_iter().filter(known).map(sale_report).collect();
        sales.sort_by(|a, b| a.sale_id.cmp(&b.sale_id));
        let mut violations = self.violations;
        violations.truncate(MAX_LISTED);
        let mut report = Report {
            verdict: Verdict::Clean,
            sales,
            unreadable: self.unreadable,
            violations,
            problems: self.problems,
        };
        report.verdict = super::verdict(&report);
        report
    }
}

fn is_closed(status: OrderStatus) -> bool {
    match status {
        OrderStatus::Created | OrderStatus::Paid => false,
        OrderStatus::Cancelled | OrderStatus::Expired => true,
    }
}

fn sale_report(book: Book) -> SaleReport {
    let row = book.row.as_ref();
    SaleReport {
        state: row.map(|row| row.state),
        total: row.map_or(0, |row| row.total),
        remaining: row.map_or(0, |row| row.remaining),
        claimed: row.map_or(0, |row| row.claimed),
        released: row.map_or(0, |row| row.released),
        sale_id: book.id,
        orders: book.orders,
        in_flight: book.in_flight,
        releases_in_flight: book.releases_in_flight,
        accepted_loss: book.accepted_loss,
        violation_count: book.violation_count,
        violations: book.violations,
    }
}
