//! Steps 2 to 5: order tables and claims, held against each other.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;

use redis::aio::ConnectionLike;
use seckill_domain::{OrderId, OrderStatus, OutboxId, SaleId, Table, Uid};
use seckill_ledger::Error as LedgerError;
use seckill_ledger::read::{self, Claim};

use super::book::is_closed;
use super::round::{LOOKUP, Round, Unstored};
use super::{MAX_LISTED, Obstacle, Violation};
use crate::cross_center::calls::AuditRowsCall;
use crate::orders::AuditOrder;

/// Users' claims read at once; Redis takes about a millisecond for it.
const CLAIMS: usize = 1000;

/// What is compared of an order.
struct Stored {
    sale: u32,
    uid: u64,
    quantity: u32,
    status: OrderStatus,
    lost: bool,
    claimed: bool,
}

impl<C: ConnectionLike> Round<'_, C> {
    pub(super) async fn compare_part(&mut self, tables: std::ops::Range<u16>) -> Result<(), Obstacle> {
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

    /// Step 2, first half: the order tables of all centers.
    async fn read_orders(
        &mut self,
        tables: std::ops::Range<u16>,
    ) -> Result<HashMap<OrderId, Stored>, Obstacle> {
        let mut stored = HashMap::new();
        let mut copies: HashMap<OrderId, (usize, SaleId)> = HashMap::new();
        for center in self.look.places() {
            let mut next = Some((tables.start, String::new()));
            while let Some((from, after)) = next {
                let call = AuditRowsCall { from, until: tables.end, after, sale_id: self.only.cloned() };
                let Some(rows) = self.look.rows(center, &call).await? else { break };
                next = rows.next;
                for row in rows.unreadable {
                    self.violations.push(Violation {
                        code: "order_unreadable",
                        detail: format!(
                            "orders_{:03} has a row {:?} that is no order: {}",
                            row.table, row.order_id, row.reason
                        ),
                        order_id: None,
                    });
                }
                let found =
                    rows.tables.into_iter().filter_map(|(table, orders)| Some((Table::new(table)?, orders)));
                for (table, orders) in found {
                    let at_home = self.look.home(table) == center;
                    for order in orders {
                        if at_home {
                            self.keep(table, &order, &mut stored);
                        } else if rows.copies {
                            copies.insert(order.order_id, (center, order.sale_id));
                        } else {
                            self.wrong_center(center, order.order_id, &order.sale_id);
                        }
                    }
                }
            }
        }
        self.check_copies(copies, &stored).await?;
        Ok(stored)
    }

    fn wrong_center(&mut self, center: usize, order_id: OrderId, sale_id: &SaleId) {
        let (found, home) = (self.look.name(center), self.look.name(self.look.home(order_id.table())));
        let sale = self.place(sale_id, None);
        let detail = format!("order {order_id} is stored in {found}, belongs to {home}");
        self.book(sale).violation("wrong_center", Some(order_id), detail);
    }

    /// Where databases replicate each other, each order's home has it, too: it is written there first.
    async fn check_copies(
        &mut self,
        mut copies: HashMap<OrderId, (usize, SaleId)>,
        stored: &HashMap<OrderId, Stored>,
    ) -> Result<(), Obstacle> {
        copies.retain(|order_id, _| !stored.contains_key(order_id));
        let ids: Vec<OrderId> = copies.keys().copied().collect();
        for chunk in ids.chunks(LOOKUP) {
            for order in self.look.orders(chunk).await?.0 {
                copies.remove(&order.order_id);
            }
        }
        for (order_id, (center, sale_id)) in copies {
            if self.look.answers(order_id.table()) {
                self.wrong_center(center, order_id, &sale_id);
            }
        }
        Ok(())
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
            // Where its order would be nobody says: it counts, and is not compared.
            Entry::Vacant(_) if !self.look.answers(claim.order_id.table()) => {}
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
            let place = (self.look.home(order_id.table()), order_id.partition());
            if let Entry::Vacant(entry) = positions.entry(place) {
                entry.insert(self.look.position(place.0, place.1).await?);
            }
        }
        let ids: Vec<OrderId> = missing.keys().copied().collect();
        let mut missing = missing;
        for chunk in ids.chunks(LOOKUP) {
            for order in self.look.orders(chunk).await?.0 {
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
            let place = (self.look.home(order_id.table()), order_id.partition());
            let Some(position) = positions.get(&place).copied().flatten() else { continue };
            if !self.look.answers(order_id.table()) {
                continue;
            }
            if self.outbox_id(order_id) <= position {
                self.claim_without_order(&unstored, position);
            } else {
                self.unstored.insert(order_id, unstored);
            }
        }
        Ok(())
    }

    pub(super) fn claim_without_order(&mut self, unstored: &Unstored, position: OutboxId) {
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
            let (orders, awaiting) = self.look.orders(&ids).await?;
            let orders: HashMap<OrderId, AuditOrder> =
                orders.into_iter().map(|order| (order.order_id, order)).collect();
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
            // Every adoption and every forced shift begins an epoch: what an older one lost is known and takes nothing
            // from anybody.
            if is_closed(order.status) && (order.lost || outbox_id.epoch < epoch) {
                book.accept_loss(order_id);
                continue;
            }
            let what =
                if book.row.is_none() { "the ledger does not know its sale" } else { "there is no claim" };
            let detail = format!("order {order_id} is {}, but {what}", order.status);
            book.violation("order_without_claim", Some(order_id), detail);
        }
        Ok(())
    }
}
