//! A plain model of the ledger's rules: what each call should answer, and what it leaves behind.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use seckill_domain::{LedgerState, Millis, OrderId, OutboxId, SaleId, Uid};
use seckill_ledger::admin::{ReclaimEntry, ReclaimOutcome};
use seckill_ledger::{
    ArchiveOutcome, CreateOutcome, Fence, ReleaseEntry, ReleaseOutcome, ReserveEntry, ReserveOutcome,
    StateChange, StateOutcome, StockOutcome, UpdateOutcome,
};

#[derive(Debug, Clone)]
pub(crate) struct MClaim {
    pub(crate) key: [u8; 16],
    pub(crate) order: OrderId,
    pub(crate) quantity: u64,
    pub(crate) released: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct MSale {
    pub(crate) state: LedgerState,
    pub(crate) starts: i64,
    pub(crate) ends: Option<i64>,
    pub(crate) limit: u64,
    pub(crate) highest_limit: u64,
    pub(crate) body: [u8; 16],
    pub(crate) total: u64,
    pub(crate) remaining: u64,
    pub(crate) released: u64,
    pub(crate) accepted: u64,
    pub(crate) reclaimed: u64,
    pub(crate) version: u64,
    pub(crate) revision: u64,
    pub(crate) touched: u64,
    pub(crate) claims: BTreeMap<Uid, Vec<MClaim>>,
    pub(crate) stock: HashMap<[u8; 16], (i64, StockOutcome)>,
}

impl MSale {
    pub(crate) fn held(&self, user: &Uid) -> u64 {
        self.claims
            .get(user)
            .into_iter()
            .flatten()
            .filter(|claim| !claim.released)
            .map(|claim| claim.quantity)
            .sum()
    }

    pub(crate) fn claimed(&self) -> u64 {
        self.claims.keys().map(|user| self.held(user)).sum()
    }

    pub(crate) fn find(&self, user: &Uid, order: OrderId) -> Option<&MClaim> {
        self.claims.get(user)?.iter().find(|claim| claim.order == order)
    }

    /// The claims and tombstones of a user under a key that is known.
    pub(crate) fn under(&self, user: &Uid, key: &[u8; 16]) -> impl Iterator<Item = &MClaim> {
        let claims = self.claims.get(user).into_iter().flatten();
        claims.filter(move |claim| claim.key != [0; 16] && claim.key == *key)
    }

    pub(crate) fn is_over(&self, now: i64) -> bool {
        self.ends.is_some_and(|ends| now >= ends)
    }
}

/// What an outbox entry must say.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum MEvent {
    Orders(SaleId, Vec<(OrderId, Uid, u64)>),
    Released(SaleId, Vec<OrderId>),
    Sale(SaleId),
    Changed(SaleId),
    Epoch(Fence),
}

pub(crate) struct Model {
    pub(crate) fence: Fence,
    pub(crate) now: i64,
    pub(crate) seq: u64,
    pub(crate) sales: BTreeMap<SaleId, MSale>,
    pub(crate) outbox: Vec<(OutboxId, MEvent)>,
    pub(crate) ids: BTreeSet<OrderId>,
}

impl Model {
    pub(crate) fn log(&mut self, event: MEvent) -> u64 {
        self.seq += 1;
        self.outbox.push((OutboxId { epoch: self.fence.epoch.0, seq: self.seq }, event));
        self.seq
    }

    /// DESIGN §4, in its order of checks.
    pub(crate) fn reserve(&mut self, sale_id: &SaleId, entries: &[ReserveEntry]) -> Vec<ReserveOutcome> {
        let mut outcomes = Vec::new();
        let mut orders = Vec::new();
        let mut seq = self.seq;
        for entry in entries {
            let quantity = u64::from(entry.quantity.get());
            let outcome = 'decided: {
                let Some(sale) = self.sales.get_mut(sale_id) else { break 'decided ReserveOutcome::NotFound };
                let known =
                    sale.claims.get(&entry.uid).into_iter().flatten().find(|claim| claim.key == entry.key);
                match known {
                    Some(claim) if claim.quantity == quantity => {
                        break 'decided ReserveOutcome::Replay(claim.order);
                    }
                    Some(_) => break 'decided ReserveOutcome::KeyReused,
                    None => {}
                }
                match sale.state {
                    LedgerState::Archived => break 'decided ReserveOutcome::NotFound,
                    LedgerState::Paused => break 'decided ReserveOutcome::Paused,
                    LedgerState::Active | LedgerState::Ended if self.now < sale.starts => {
                        break 'decided ReserveOutcome::NotStarted { starts_at: Millis(sale.starts) };
                    }
                    LedgerState::Ended => break 'decided ReserveOutcome::Ended,
                    LedgerState::Active if sale.is_over(self.now) => break 'decided ReserveOutcome::Ended,
                    LedgerState::Active => {}
                }
                if sale.held(&entry.uid) + quantity > sale.limit {
                    break 'decided ReserveOutcome::Limit;
                }
                if sale.remaining == 0 {
                    break 'decided ReserveOutcome::SoldOut;
                }
                if sale.remaining < quantity {
                    break 'decided ReserveOutcome::Insufficient { remaining: sale.remaining };
                }
                seq += 1;
                let head = OrderId::head_of(entry.center, entry.uid.table(), 0, self.fence.epoch);
                let order = OrderId::from_parts(head, seq).unwrap();
                sale.remaining -= quantity;
                sale.accepted += 1;
                let claim = MClaim { key: entry.key, order, quantity, released: false };
                sale.claims.entry(entry.uid.clone()).or_default().push(claim);
                orders.push((order, entry.uid.clone(), quantity));
                ReserveOutcome::Accepted(order)
            };
            outcomes.push(outcome);
        }
        if !orders.is_empty() {
            for (order, _, _) in &orders {
                assert!(self.ids.insert(*order), "order id {order} was handed out twice");
            }
            self.seq = seq - 1;
            let touched = self.log(MEvent::Orders(sale_id.clone(), orders));
            self.sales.get_mut(sale_id).unwrap().touched = touched;
        }
        outcomes
    }

    pub(crate) fn release(&mut self, sale_id: &SaleId, entries: &[ReleaseEntry]) -> Vec<ReleaseOutcome> {
        let mut returned = Vec::new();
        let outcomes = entries
            .iter()
            .map(|entry| {
                let claim = self.sales.get_mut(sale_id).and_then(|sale| {
                    let claims = sale.claims.get_mut(&entry.uid)?;
                    claims.iter_mut().find(|claim| claim.order == entry.order_id)
                });
                match claim {
                    None => ReleaseOutcome::Unknown,
                    Some(claim) if claim.released => ReleaseOutcome::AlreadyReleased,
                    Some(claim) => {
                        claim.released = true;
                        let quantity = claim.quantity;
                        let sale = self.sales.get_mut(sale_id).unwrap();
                        sale.remaining += quantity;
                        sale.released += quantity;
                        returned.push(entry.order_id);
                        ReleaseOutcome::Released
                    }
                }
            })
            .collect();
        if !returned.is_empty() {
            let touched = self.log(MEvent::Released(sale_id.clone(), returned));
            let sale = self.sales.get_mut(sale_id).unwrap();
            sale.touched = touched;
            sale.revision += 1;
        }
        outcomes
    }

    pub(crate) fn reclaim(&mut self, sale_id: &SaleId, entries: &[ReclaimEntry]) -> Vec<ReclaimOutcome> {
        let mut orders = 0;
        let outcomes = entries
            .iter()
            .map(|entry| {
                let quantity = u64::from(entry.quantity.get());
                let Some(sale) = self.sales.get_mut(sale_id) else { return ReclaimOutcome::NoSale };
                if sale.state == LedgerState::Archived {
                    return ReclaimOutcome::Archived;
                }
                if sale.find(&entry.uid, entry.order_id).is_some() {
                    return ReclaimOutcome::Held;
                }
                if sale.under(&entry.uid, &entry.key).any(|claim| !claim.released) {
                    return ReclaimOutcome::OtherOrder;
                }
                // What the key is answered with stays what it is.
                let key = if sale.under(&entry.uid, &entry.key).count() > 0 { [0; 16] } else { entry.key };
                if sale.held(&entry.uid) + quantity > sale.limit {
                    return ReclaimOutcome::Limit;
                }
                if sale.remaining < quantity {
                    return ReclaimOutcome::NotEnough;
                }
                sale.remaining -= quantity;
                sale.accepted += 1;
                sale.reclaimed += 1;
                orders += 1;
                let claim = MClaim { key, order: entry.order_id, quantity, released: false };
                sale.claims.entry(entry.uid.clone()).or_default().push(claim);
                ReclaimOutcome::Claimed
            })
            .collect();
        if orders > 0 {
            let touched = self.log(MEvent::Changed(sale_id.clone()));
            self.sales.get_mut(sale_id).unwrap().touched = touched;
        }
        outcomes
    }

    pub(crate) fn changed(&mut self, sale_id: &SaleId, event: MEvent) -> u64 {
        let touched = self.log(event);
        let sale = self.sales.get_mut(sale_id).unwrap();
        sale.touched = touched;
        sale.version += 1;
        sale.version
    }

    pub(crate) fn create(&mut self, sale: &seckill_domain::SaleSpec, body: [u8; 16]) -> CreateOutcome {
        let id = &sale.sale_id;
        if let Some(known) = self.sales.get(id) {
            return if known.body == body {
                CreateOutcome::Same { version: known.version }
            } else {
                CreateOutcome::Exists
            };
        }
        let touched = self.log(MEvent::Sale(id.clone()));
        let limit = u64::from(sale.per_user_limit);
        self.sales.insert(
            id.clone(),
            MSale {
                state: LedgerState::Active,
                starts: sale.starts_at.map_or(self.now, |at| at.0),
                ends: sale.ends_at.map(|at| at.0),
                limit,
                highest_limit: limit,
                body,
                total: sale.quantity,
                remaining: sale.quantity,
                released: 0,
                accepted: 0,
                reclaimed: 0,
                version: 1,
                revision: 0,
                touched,
                claims: BTreeMap::new(),
                stock: HashMap::new(),
            },
        );
        CreateOutcome::Created { version: 1 }
    }

    pub(crate) fn update(
        &mut self,
        sale: &seckill_domain::SaleSpec,
        based_on: u64,
        before_start: bool,
    ) -> UpdateOutcome {
        let Some(known) = self.sales.get_mut(&sale.sale_id) else { return UpdateOutcome::NotFound };
        if known.state == LedgerState::Archived {
            return UpdateOutcome::NotFound;
        }
        if known.version != based_on {
            return UpdateOutcome::OtherVersion { version: known.version };
        }
        if known.state == LedgerState::Ended {
            return UpdateOutcome::Ended;
        }
        if before_start && self.now >= known.starts {
            return UpdateOutcome::Started;
        }
        known.limit = u64::from(sale.per_user_limit);
        known.highest_limit = known.highest_limit.max(known.limit);
        known.starts = sale.starts_at.map_or(known.starts, |at| at.0);
        known.ends = sale.ends_at.map(|at| at.0);
        UpdateOutcome::Updated { version: self.changed(&sale.sale_id, MEvent::Sale(sale.sale_id.clone())) }
    }

    pub(crate) fn set_state(&mut self, id: &SaleId, change: StateChange) -> StateOutcome {
        let to = match change {
            StateChange::Pause => LedgerState::Paused,
            StateChange::Resume => LedgerState::Active,
            StateChange::End => LedgerState::Ended,
        };
        let Some(sale) = self.sales.get_mut(id) else { return StateOutcome::NotFound };
        match sale.state {
            LedgerState::Archived => return StateOutcome::NotFound,
            state if state == to => return StateOutcome::Same { version: sale.version },
            LedgerState::Ended => return StateOutcome::Ended,
            LedgerState::Active | LedgerState::Paused => {}
        }
        sale.state = to;
        if to == LedgerState::Ended {
            sale.starts = sale.starts.min(self.now);
            sale.ends = Some(sale.ends.unwrap_or(self.now).min(self.now));
        }
        StateOutcome::Changed { version: self.changed(id, MEvent::Changed(id.clone())) }
    }

    pub(crate) fn add_stock(&mut self, id: &SaleId, delta: i64, key: [u8; 16]) -> StockOutcome {
        let Some(sale) = self.sales.get_mut(id) else { return StockOutcome::NotFound };
        if sale.state == LedgerState::Archived {
            return StockOutcome::NotFound;
        }
        if let Some((known, outcome)) = sale.stock.get(&key) {
            return match outcome {
                StockOutcome::Changed { total, remaining, version, .. } if *known == delta => {
                    StockOutcome::Changed {
                        total: *total,
                        remaining: *remaining,
                        version: *version,
                        replayed: true,
                    }
                }
                _ => StockOutcome::KeyReused,
            };
        }
        if sale.state == LedgerState::Ended {
            return StockOutcome::Ended;
        }
        let Some(remaining) = sale.remaining.checked_add_signed(delta) else {
            return StockOutcome::BelowClaimed { remaining: sale.remaining };
        };
        let total = sale.total.checked_add_signed(delta).unwrap();
        sale.remaining = remaining;
        sale.total = total;
        sale.revision += 1;
        let version = self.changed(id, MEvent::Changed(id.clone()));
        let outcome = StockOutcome::Changed { total, remaining, version, replayed: false };
        self.sales.get_mut(id).unwrap().stock.insert(key, (delta, outcome.clone()));
        outcome
    }

    pub(crate) fn archive(&mut self, id: &SaleId, window_ms: u64, touched: u64) -> ArchiveOutcome {
        let Some(sale) = self.sales.get_mut(id) else { return ArchiveOutcome::NotFound };
        if sale.state == LedgerState::Archived {
            return ArchiveOutcome::Same { version: sale.version };
        }
        let Some(ends) = sale.ends.filter(|ends| self.now >= *ends) else { return ArchiveOutcome::NotEnded };
        let open_until = ends + window_ms as i64;
        if self.now < open_until {
            return ArchiveOutcome::RetryWindow { left_ms: (open_until - self.now) as u64 };
        }
        if sale.touched != touched {
            return ArchiveOutcome::Changed { touched: sale.touched };
        }
        sale.state = LedgerState::Archived;
        ArchiveOutcome::Archived { version: self.changed(id, MEvent::Changed(id.clone())) }
    }
}
