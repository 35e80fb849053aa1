//! A plain model of the ledger's rules, and thousands of random histories that both must agree on.
//!
//! `SECKILL_SEED=N` runs the one history of that seed; `SECKILL_HISTORIES=N` runs so many, however long it takes.
//!
//! The ledger's clock is set years ahead, so time stands still but for the steps that a history takes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use redis::aio::MultiplexedConnection;
use seckill_domain::{
    CenterId, CenterNumber, Epoch, LedgerState, Millis, OrderId, OutboxId, Quantity, SaleId, Uid,
};
use seckill_ledger::admin::{
    FenceChange, FenceOutcome, ReclaimEntry, ReclaimOutcome, barrier, reclaim, set_fence,
};
use seckill_ledger::outbox::{self, Event};
use seckill_ledger::read::{Claim, scan_claims, snapshot};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{
    ArchiveOutcome, CreateOutcome, Error, Fence, LedgerId, Refusal, ReleaseEntry, ReleaseOutcome,
    ReserveEntry, ReserveOutcome, StateChange, StateOutcome, StockOutcome, UpdateOutcome, add_stock, archive,
    create_sale, release, reserve, set_state, update_sale,
};

use crate::support::{entry, key, spec, uid};

/// Histories of a run, and the time after which it takes no new one.
const HISTORIES: u64 = 3_000;
const TIME: Duration = Duration::from_secs(25);
const STEPS: u32 = 40;
const START_MS: i64 = 4_000_000_000_000;

#[derive(Debug, Clone)]
struct MClaim {
    key: [u8; 16],
    order: OrderId,
    quantity: u64,
    released: bool,
}

#[derive(Debug, Clone)]
struct MSale {
    state: LedgerState,
    starts: i64,
    ends: Option<i64>,
    limit: u64,
    highest_limit: u64,
    body: [u8; 16],
    total: u64,
    remaining: u64,
    released: u64,
    accepted: u64,
    reclaimed: u64,
    version: u64,
    revision: u64,
    touched: u64,
    claims: BTreeMap<Uid, Vec<MClaim>>,
    stock: HashMap<[u8; 16], (i64, StockOutcome)>,
}

impl MSale {
    fn held(&self, user: &Uid) -> u64 {
        self.claims
            .get(user)
            .into_iter()
            .flatten()
            .filter(|claim| !claim.released)
            .map(|claim| claim.quantity)
            .sum()
    }

    fn claimed(&self) -> u64 {
        self.claims.keys().map(|user| self.held(user)).sum()
    }

    fn find(&self, user: &Uid, order: OrderId) -> Option<&MClaim> {
        self.claims.get(user)?.iter().find(|claim| claim.order == order)
    }

    /// The claims and tombstones of a user under a key that is known.
    fn under(&self, user: &Uid, key: &[u8; 16]) -> impl Iterator<Item = &MClaim> {
        let claims = self.claims.get(user).into_iter().flatten();
        claims.filter(move |claim| claim.key != [0; 16] && claim.key == *key)
    }

    fn is_over(&self, now: i64) -> bool {
        self.ends.is_some_and(|ends| now >= ends)
    }
}

/// What an outbox entry must say.
#[derive(Debug, Clone, PartialEq)]
enum MEvent {
    Orders(SaleId, Vec<(OrderId, Uid, u64)>),
    Released(SaleId, Vec<OrderId>),
    Sale(SaleId),
    Changed(SaleId),
    Epoch(Fence),
}

struct Model {
    fence: Fence,
    now: i64,
    seq: u64,
    sales: BTreeMap<SaleId, MSale>,
    outbox: Vec<(OutboxId, MEvent)>,
    ids: BTreeSet<OrderId>,
}

impl Model {
    fn log(&mut self, event: MEvent) -> u64 {
        self.seq += 1;
        self.outbox.push((OutboxId { epoch: self.fence.epoch.0, seq: self.seq }, event));
        self.seq
    }

    /// DESIGN §4, in its order of checks.
    fn reserve(&mut self, sale_id: &SaleId, entries: &[ReserveEntry]) -> Vec<ReserveOutcome> {
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

    fn release(&mut self, sale_id: &SaleId, entries: &[ReleaseEntry]) -> Vec<ReleaseOutcome> {
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

    fn reclaim(&mut self, sale_id: &SaleId, entries: &[ReclaimEntry]) -> Vec<ReclaimOutcome> {
        let mut orders = 0;
        let outcomes = entries
            .iter()
            .map(|entry| {
                let quantity = u64::from(entry.quantity.get());
                let Some(sale) = self.sales.get_mut(sale_id) else { return ReclaimOutcome::NoSale };
                if sale.state == LedgerState::Archived {
                    return ReclaimOutcome::NoSale;
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

    fn changed(&mut self, sale_id: &SaleId, event: MEvent) -> u64 {
        let touched = self.log(event);
        let sale = self.sales.get_mut(sale_id).unwrap();
        sale.touched = touched;
        sale.version += 1;
        sale.version
    }

    fn create(&mut self, sale: &seckill_domain::SaleSpec, body: [u8; 16]) -> CreateOutcome {
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

    fn update(
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

    fn set_state(&mut self, id: &SaleId, change: StateChange) -> StateOutcome {
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

    fn add_stock(&mut self, id: &SaleId, delta: i64, key: [u8; 16]) -> StockOutcome {
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

    fn archive(&mut self, id: &SaleId, window_ms: u64, touched: u64) -> ArchiveOutcome {
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

struct History {
    rng: StdRng,
    conn: MultiplexedConnection,
    model: Model,
    /// Where an incremental reader stands, and what it has seen.
    since: u64,
    seen: BTreeMap<SaleId, seckill_ledger::read::Sale>,
}

fn pick<T: Clone>(rng: &mut StdRng, from: &[T]) -> T {
    from[rng.random_range(0..from.len())].clone()
}

impl History {
    async fn new(seed: u64, mut conn: MultiplexedConnection) -> History {
        redis::cmd("FLUSHDB").query_async::<()>(&mut conn).await.unwrap();
        redis::cmd("SET").arg("sk:clock").arg(START_MS).query_async::<()>(&mut conn).await.unwrap();
        let fence = Fence {
            ledger_id: LedgerId::new("model").unwrap(),
            epoch: Epoch(9_990),
            master: CenterId::new("a").unwrap(),
        };
        let set = set_fence(&mut conn, &FenceChange::Adopt, &fence).await.unwrap();
        assert_eq!(set, FenceOutcome::Set);
        let mut model = Model {
            fence: fence.clone(),
            now: START_MS,
            seq: 0,
            sales: BTreeMap::new(),
            outbox: Vec::new(),
            ids: BTreeSet::new(),
        };
        model.log(MEvent::Epoch(fence));
        History { rng: StdRng::seed_from_u64(seed), conn, model, since: 0, seen: BTreeMap::new() }
    }

    async fn run(mut self) {
        for _ in 0..2 {
            self.create().await;
        }
        for _ in 0..STEPS {
            match self.rng.random_range(0..100) {
                0..45 => self.reserve().await,
                45..60 => self.release().await,
                60..66 => self.stock().await,
                66..71 => self.state().await,
                71..75 => self.update().await,
                75..78 => self.create().await,
                78..82 => self.advance().await,
                82..86 => self.lift().await,
                86..89 => self.reclaim().await,
                89..92 => self.archive().await,
                92..95 => self.stale().await,
                _ => self.snapshot().await,
            }
        }
        self.snapshot().await;
        self.check_all().await;
    }

    fn sale(&mut self) -> SaleId {
        SaleId::new(pick(&mut self.rng, &["s0", "s0", "s0", "s1", "s1", "s2", "nowhere"])).unwrap()
    }

    fn user(&mut self) -> String {
        pick(&mut self.rng, &["bob", "Bob", "amy", "eve", "dan", "a-much-longer-name-than-the-others"])
            .to_owned()
    }

    fn entries(&mut self) -> Vec<ReserveEntry> {
        let count = pick(&mut self.rng, &[1, 1, 2, 3, 5, 8, 20]);
        let uniform = self.rng.random_bool(0.5);
        (0..count)
            .map(|_| {
                let quantity = if uniform { 1 } else { pick(&mut self.rng, &[1, 1, 1, 2, 3]) };
                let name = format!("k{}", self.rng.random_range(0..8));
                let mut entry = entry(&self.user(), &name, quantity);
                entry.center = CenterNumber::new(self.rng.random_range(1..=8)).unwrap();
                entry
            })
            .collect()
    }

    async fn reserve(&mut self) {
        let (sale, entries) = (self.sale(), self.entries());
        let reply = reserve(&mut self.conn, &self.model.fence, 0, &sale, &entries).await.unwrap();
        assert_eq!(reply.outcomes, self.model.reserve(&sale, &entries), "{sale} {entries:?}");
        assert_eq!(reply.now.0, self.model.now);
        let mark = OutboxId { epoch: self.model.fence.epoch.0, seq: self.model.seq };
        assert_eq!(reply.mark.outbox, mark);
        assert_eq!(reply.mark.revision, self.model.sales.get(&sale).map_or(0, |sale| sale.revision));
    }

    /// An order of the sale, or one that it never had.
    fn some_order(&mut self, sale: &SaleId) -> (Uid, OrderId, Quantity) {
        let known: Vec<(Uid, OrderId, u64)> = self
            .model
            .sales
            .get(sale)
            .into_iter()
            .flat_map(|sale| &sale.claims)
            .flat_map(|(user, claims)| claims.iter().map(|claim| (user.clone(), claim.order, claim.quantity)))
            .collect();
        if !known.is_empty() && self.rng.random_bool(0.8) {
            let (user, order, quantity) = pick(&mut self.rng, &known);
            return (user, order, Quantity::new(quantity as u32).unwrap());
        }
        let user = uid(&self.user());
        let head = OrderId::head_of(CenterNumber::new(1).unwrap(), user.table(), 0, Epoch(9_000));
        let order = OrderId::from_parts(head, self.rng.random_range(1..30)).unwrap();
        (user, order, Quantity::new(self.rng.random_range(1..3)).unwrap())
    }

    async fn release(&mut self) {
        let sale = self.sale();
        let entries: Vec<ReleaseEntry> = (0..self.rng.random_range(1..6))
            .map(|_| {
                let (uid, order_id, _) = self.some_order(&sale);
                ReleaseEntry { order_id, uid }
            })
            .collect();
        let outcomes = release(&mut self.conn, &self.model.fence, &sale, &entries).await.unwrap();
        assert_eq!(outcomes, self.model.release(&sale, &entries), "{sale} {entries:?}");
    }

    async fn reclaim(&mut self) {
        let sale = self.sale();
        if self.rng.random_bool(0.5) {
            // As after an adoption: another ledger id, or the same, at a later epoch.
            let id = pick(&mut self.rng, &["model", "adopted"]);
            let later = self.later();
            let to = Fence { ledger_id: LedgerId::new(id).unwrap(), ..self.model.fence.at(later) };
            self.set_fence(&FenceChange::Adopt, to).await;
        }
        let entries: Vec<ReclaimEntry> = (0..self.rng.random_range(1..6))
            .map(|_| {
                let (uid, order_id, quantity) = self.some_order(&sale);
                let key = match self.rng.random_range(0..3) {
                    0 => Default::default(),
                    _ => key(&format!("k{}", self.rng.random_range(0..8))),
                };
                ReclaimEntry { order_id, uid, quantity, key }
            })
            .collect();
        let outcomes = reclaim(&mut self.conn, &self.model.fence, &sale, &entries).await.unwrap();
        assert_eq!(outcomes, self.model.reclaim(&sale, &entries), "{sale} {entries:?}");
    }

    async fn stock(&mut self) {
        let (sale, delta) = (self.sale(), self.rng.random_range(-6..10));
        let key = key(&format!("k{}", self.rng.random_range(0..4)));
        let outcome = add_stock(&mut self.conn, &self.model.fence, &sale, delta, &key).await.unwrap();
        assert_eq!(outcome, self.model.add_stock(&sale, delta, key), "{sale} {delta}");
    }

    async fn state(&mut self) {
        let sale = self.sale();
        let change = pick(
            &mut self.rng,
            &[
                StateChange::Pause,
                StateChange::Pause,
                StateChange::Resume,
                StateChange::Resume,
                StateChange::End,
            ],
        );
        let outcome = set_state(&mut self.conn, &self.model.fence, &sale, change).await.unwrap();
        assert_eq!(outcome, self.model.set_state(&sale, change), "{sale} {change:?}");
    }

    fn body(&mut self, id: &SaleId) -> seckill_domain::SaleSpec {
        let mut body = spec(id.as_str(), self.rng.random_range(1..12), self.rng.random_range(1..5));
        let soon = self.model.now + self.rng.random_range(-50..100);
        body.starts_at = self.rng.random_bool(0.3).then_some(Millis(soon));
        body.ends_at = self.rng.random_bool(0.3).then_some(Millis(soon + self.rng.random_range(1..300)));
        body
    }

    async fn create(&mut self) {
        let id = SaleId::new(pick(&mut self.rng, &["s0", "s1", "s2"])).unwrap();
        let body = self.body(&id);
        let digest = [self.rng.random_range(0..2); 16];
        let outcome = create_sale(&mut self.conn, &self.model.fence, &body, &digest).await.unwrap();
        assert_eq!(outcome, self.model.create(&body, digest), "{body:?}");
    }

    async fn update(&mut self) {
        let id = self.sale();
        let body = self.body(&id);
        let version = self.model.sales.get(&id).map_or(1, |sale| sale.version);
        let based_on = if self.rng.random_bool(0.8) { version } else { version + 1 };
        let before_start = self.rng.random_bool(0.3);
        let outcome =
            update_sale(&mut self.conn, &self.model.fence, &body, based_on, before_start).await.unwrap();
        assert_eq!(outcome, self.model.update(&body, based_on, before_start), "{body:?}");
    }

    async fn archive(&mut self) {
        let id = self.sale();
        let window = self.rng.random_range(0..200);
        let touched = self.model.sales.get(&id).map_or(0, |sale| sale.touched);
        let touched = if self.rng.random_bool(0.8) { touched } else { touched.saturating_sub(1) };
        let outcome = archive(&mut self.conn, &self.model.fence, &id, window, touched).await.unwrap();
        assert_eq!(outcome, self.model.archive(&id, window, touched), "{id}");
        if matches!(outcome, ArchiveOutcome::Archived { .. }) {
            let sale = self.model.sales.get_mut(&id).unwrap();
            // The row keeps its numbers; who held what is gone.
            let row = seckill_ledger::read::sale(&mut self.conn, &id).await.unwrap().unwrap();
            assert_eq!((row.remaining, row.claimed), (sale.remaining, sale.claimed()));
            sale.claims.clear();
            sale.stock.clear();
        }
    }

    /// Time goes on; a clock that is behind does not turn it back.
    async fn advance(&mut self) {
        self.model.now += self.rng.random_range(1..80);
        let now = self.model.now;
        redis::cmd("SET").arg("sk:clock").arg(now).query_async::<()>(&mut self.conn).await.unwrap();
        let beat = barrier(&mut self.conn, &self.model.fence).await.unwrap();
        assert_eq!(beat.0, now);
    }

    fn later(&mut self) -> Epoch {
        Epoch(self.model.fence.epoch.0 + self.rng.random_range(1..4))
    }

    async fn lift(&mut self) {
        let master = CenterId::new(pick(&mut self.rng, &["a", "b"])).unwrap();
        let later = self.later();
        let to = Fence { master, ..self.model.fence.at(later) };
        self.set_fence(&FenceChange::Lift { from: self.model.fence.clone() }, to).await;
    }

    async fn set_fence(&mut self, change: &FenceChange, to: Fence) {
        let outcome = set_fence(&mut self.conn, change, &to).await.unwrap();
        assert_eq!(outcome, FenceOutcome::Set);
        self.model.fence = to.clone();
        self.model.log(MEvent::Epoch(to));
    }

    /// Calls that must do nothing; the comparison at the end finds out if they did.
    async fn stale(&mut self) {
        let own = self.model.fence.clone();
        let epoch = own.epoch.0;
        let (fence, refusal) = match self.rng.random_range(0..3) {
            0 => (own.at(Epoch(epoch - 1)), Refusal::StaleEpoch { ledger_epoch: epoch }),
            1 => (own.at(Epoch(epoch + 1)), Refusal::FutureEpoch { ledger_epoch: epoch }),
            _ => {
                let other = LedgerId::new("another").unwrap();
                (Fence { ledger_id: other, ..own.clone() }, Refusal::Foreign { found: own.to_string() })
            }
        };
        let (sale, entries) = (self.sale(), self.entries());
        let (uid, order_id, _) = self.some_order(&sale);
        let conn = &mut self.conn;
        let answers = [
            reserve(conn, &fence, 0, &sale, &entries).await.map(drop),
            release(conn, &fence, &sale, &[ReleaseEntry { order_id, uid }]).await.map(drop),
            set_state(conn, &fence, &sale, StateChange::End).await.map(drop),
            add_stock(conn, &fence, &sale, 3, &key("k9")).await.map(drop),
        ];
        for answer in answers {
            assert!(matches!(&answer, Err(Error::Refused(found)) if *found == refusal), "{answer:?}");
        }
        let low = set_fence(conn, &FenceChange::Adopt, &fence.at(Epoch(epoch))).await.unwrap();
        assert!(matches!(low, FenceOutcome::EpochTooLow { .. } | FenceOutcome::Same), "{low:?}");
    }

    async fn snapshot(&mut self) {
        let page = snapshot(&mut self.conn, self.since, 2).await.unwrap();
        assert_eq!((page.seq, page.fence), (self.model.seq, Some(self.model.fence.to_string())));
        for sale in page.sales {
            self.since = sale.touched;
            self.seen.insert(sale.spec.sale_id.clone(), sale);
        }
    }

    async fn check_all(&mut self) {
        while self.since < self.model.sales.values().map(|sale| sale.touched).max().unwrap_or(0) {
            self.snapshot().await;
        }
        let ids: Vec<SaleId> = self.model.sales.keys().cloned().collect();
        assert!(self.seen.keys().eq(ids.iter()));
        for id in ids {
            let row = seckill_ledger::read::sale(&mut self.conn, &id).await.unwrap().unwrap();
            assert_eq!(row, self.seen[&id], "the incremental reader missed a change");
            let claims = self.claims(&id).await;
            let sale = &self.model.sales[&id];
            assert_eq!((row.state, row.starts_at.0), (sale.state, sale.starts));
            assert_eq!(row.ends_at.map(|at| at.0), sale.ends);
            assert_eq!((row.total, row.remaining), (sale.total, sale.remaining));
            assert_eq!((row.released, row.accepted), (sale.released, sale.accepted));
            assert_eq!(row.reclaimed, sale.reclaimed);
            assert_eq!((row.version, row.revision, row.touched), (sale.version, sale.revision, sale.touched));
            assert_eq!(row.total, row.remaining + row.claimed, "{id}: total = remaining + claimed");
            if sale.state != LedgerState::Archived {
                assert_eq!(row.claimed, sale.claimed());
            }
            let expected: Vec<(Uid, OrderId, u64, [u8; 16], bool)> = sale
                .claims
                .iter()
                .flat_map(|(user, claims)| claims.iter().map(move |claim| (user, claim)))
                .map(|(user, claim)| (user.clone(), claim.order, claim.quantity, claim.key, claim.released))
                .collect();
            assert_eq!(claims, expected);
            let mut keys = BTreeSet::new();
            for (user, _, _, key, _) in claims {
                assert!(sale.held(&user) <= sale.highest_limit, "{user} is above the limit of {id}");
                assert!(key == [0; 16] || keys.insert((user, key)), "two orders under one key");
            }
        }
        self.check_outbox().await;
    }

    async fn claims(&mut self, sale: &SaleId) -> Vec<(Uid, OrderId, u64, [u8; 16], bool)> {
        let (mut cursor, mut all): (u64, Vec<Claim>) = (0, Vec::new());
        loop {
            let (next, some) = scan_claims(&mut self.conn, sale, cursor, 100).await.unwrap();
            all.extend(some);
            cursor = next;
            if cursor == 0 {
                break;
            }
        }
        // The order of a user's claims stays: it is the order in which they came.
        all.sort_by(|a, b| a.uid.cmp(&b.uid));
        all.into_iter()
            .map(|claim| {
                (claim.uid, claim.order_id, u64::from(claim.quantity.get()), claim.key, claim.released)
            })
            .collect()
    }

    async fn check_outbox(&mut self) {
        let (mut after, mut entries) = (OutboxId::ZERO, Vec::new());
        loop {
            let page = outbox::read(&mut self.conn, after, 7).await.unwrap();
            let Some(last) = page.entries.last() else { break };
            after = last.id;
            entries.extend(page.entries);
        }
        let found: Vec<(OutboxId, MEvent)> = entries
            .into_iter()
            .map(|entry| {
                let event = match entry.event.unwrap() {
                    Event::Orders(orders) => MEvent::Orders(
                        orders[0].sale_id.clone(),
                        orders
                            .into_iter()
                            .map(|order| (order.order_id, order.uid, u64::from(order.quantity.get())))
                            .collect(),
                    ),
                    Event::Released { sale_id, orders } => MEvent::Released(sale_id, orders),
                    Event::Sale(spec) => MEvent::Sale(spec.sale_id),
                    Event::SaleChanged(change) => MEvent::Changed(change.sale_id),
                    Event::Epoch(fence) => MEvent::Epoch(fence),
                };
                (entry.id, event)
            })
            .collect();
        assert_eq!(found, self.model.outbox);
        let epoch = self.model.fence.epoch.0;
        let orders: Vec<OrderId> = self.model.ids.iter().copied().collect();
        if !orders.is_empty() {
            let order = pick(&mut self.rng, &orders);
            let record = outbox::find_order(&mut self.conn, epoch, order).await.unwrap();
            assert_eq!(record.map(|record| record.order_id), Some(order));
        }
    }
}

#[tokio::test]
async fn the_ledger_keeps_the_rules_of_a_plain_model() {
    let server = RedisServer::start_with(&[("appendonly", "no")]).await;
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let conn = server.connect().await;
    if let Some(seed) = number("SECKILL_SEED") {
        History::new(seed, conn).await.run().await;
        return;
    }
    let first: u64 = rand::random_range(0..1 << 40);
    let (histories, time) = match number("SECKILL_HISTORIES") {
        Some(histories) => (histories, Duration::MAX),
        None => (HISTORIES, TIME),
    };
    let begin = Instant::now();
    let mut done = 0;
    while done < histories && begin.elapsed() < time {
        let seed = first + done;
        let history = History::new(seed, conn.clone()).await;
        // A task of its own, so that a failure can be reported with the seed that repeats it.
        if let Err(failure) = tokio::spawn(history.run()).await {
            panic!("history {done}: repeat it with SECKILL_SEED={seed} ({failure})");
        }
        done += 1;
    }
    println!("{done} histories from seed {first} in {:?}", begin.elapsed());
}
