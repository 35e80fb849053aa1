//! Thousands of random histories that the ledger and its plain model must agree on.
//!
//! `SECKILL_SEED=N` runs the one history of that seed; `SECKILL_HISTORIES=N` runs so many, however long it takes.
//!
//! The ledger's clock is set years ahead, so time stands still but for the steps that a history takes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use redis::aio::MultiplexedConnection;
use seckill_domain::{
    CenterId, CenterNumber, Epoch, LedgerState, Millis, OrderId, OutboxId, Quantity, SaleId, Uid,
};
use seckill_ledger::admin::{FenceChange, FenceOutcome, ReclaimEntry, barrier, reclaim, set_fence};
use seckill_ledger::outbox::{self, Event};
use seckill_ledger::read::{Claim, scan_claims, snapshot};
use seckill_ledger::testkit::RedisServer;
use seckill_ledger::{
    ArchiveOutcome, Error, Fence, LedgerId, Refusal, ReleaseEntry, ReserveEntry, StateChange, add_stock,
    archive, create_sale, release, reserve, set_state, update_sale,
};

use crate::model::{MEvent, Model};
use crate::support::{entry, key, spec, uid};

/// Histories of a run, and the time after which it takes no new one.
const HISTORIES: u64 = 3_000;
const TIME: Duration = Duration::from_secs(25);
const STEPS: u32 = 40;
const START_MS: i64 = 4_000_000_000_000;

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
