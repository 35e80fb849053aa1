//! What tests of shifts share: asking for one, waiting for its end, and buyers who never give up.

use std::collections::BTreeMap;
use std::sync::Mutex;

use redis::AsyncConnectionConfig;
use seckill_ledger::replication::{Replication, WaitCommand, barrier};
use tokio::task::JoinSet;

use super::*;
use crate::shift::operation::Hook;
use crate::topology::{Shift, ShiftKind, ShiftMode, ShiftState};

/// How long a buyer waits for an answer before the purchase is tried again under the same key.
const ANSWER: Duration = Duration::from_secs(1);
/// As the service has it by default.
const WAIT_TIMEOUT_MS: u64 = 600;

impl Pair {
    pub(super) fn shifts(&self, id: &str) -> &Shifts {
        self.centers[id].shifts.as_ref().expect("it runs")
    }

    /// Lets something happen when the coordinator in this center comes to a place; it dies there if that says so.
    pub(super) fn at(&self, id: &str, place: &'static str, hook: impl FnOnce() -> bool + Send + 'static) {
        let hook: Hook = Box::new(hook);
        *self.shifts(id).shared.at.lock().unwrap() = Some((place, hook));
    }

    /// Starts a shift and waits until it is over.
    pub(super) async fn shift(&self, request: ShiftRequest) -> Shift {
        let to = request.to.clone();
        let begun = self.shifts(to.as_str()).start(request, "ops").await;
        let begun = begun.unwrap_or_else(|error| panic!("not started: {error:?}"));
        self.until_over(&begun.id).await
    }

    /// Waits until a shift is over, as any service shows it.
    pub(super) async fn until_over(&self, id: &str) -> Shift {
        let shift = eventually("the shift is over", async || {
            let topology = self.topology();
            topology.find_shift(id).filter(|shift| shift.state.is_over()).cloned()
        })
        .await;
        assert!(self.topology().shift.is_none());
        shift
    }

    pub(super) fn tells(&self, shift: &Shift) {
        let steps: Vec<String> = shift
            .steps
            .iter()
            .map(|step| format!("{} {} ms", step.name, step.took_ms.unwrap_or_default()))
            .collect();
        println!(
            "{} to {}: {:?}, held {} ms: {}",
            shift.id,
            shift.to,
            shift.state,
            shift.held_ms.unwrap_or_default(),
            steps.join(", ")
        );
    }

    /// Waits until the master's services take purchases at an epoch from this one on, with this durability.
    pub(super) async fn until_master(&self, id: &str, from: Epoch) -> Fence {
        let authority = &self.service(id).authority;
        let granted = eventually("the master sells", async || {
            authority.grant().ok().filter(|grant| grant.fence.epoch >= from).map(|grant| grant.fence.clone())
        })
        .await;
        assert_eq!(self.topology().master.as_str(), id);
        granted
    }

    /// Starts buyers who buy one unit each, one after the other, at whatever center is the master.
    pub(super) fn buyers(&self, sale: &SaleId, count: usize) -> Buyers {
        let centers: Vec<Shop> = self
            .centers
            .values()
            .filter_map(|center| {
                Some(Shop {
                    authority: center.service.as_ref()?.authority.clone(),
                    client: center.server.client(),
                    epoch_server: center.server.port(),
                })
            })
            .collect();
        let (books, stop) = (Arc::new(Mutex::new(Books::default())), CancellationToken::new());
        let mut tasks = JoinSet::new();
        for number in 0..count {
            let (centers, sale) = (centers.clone(), sale.clone());
            let (books, stop) = (Arc::clone(&books), stop.clone());
            tasks.spawn(async move {
                for round in 0.. {
                    let uid = format!("u{number}-{round}");
                    let bought = buy(&centers, &sale, &uid, &stop).await;
                    let Some(order_id) = bought else { return };
                    books.lock().unwrap().sold(uid, order_id);
                }
            });
        }
        Buyers { books, stop, tasks }
    }

    /// Compares what buyers were told with the ledger of the master.
    pub(super) async fn compare(&self, sale: &SaleId, books: &Books) {
        let master = self.topology().master;
        let mut conn = self.centers[master.as_str()].server.connect().await;
        let found = read::sale(&mut conn, sale).await.unwrap().unwrap();
        assert_eq!(found.total, found.remaining + found.claimed);
        let mut held = BTreeMap::new();
        let mut after = seckill_domain::OutboxId::ZERO;
        loop {
            let page = outbox::read_raw(&mut conn, after, 256).await.unwrap();
            for (_, entry) in &page {
                after = entry.id;
                let Ok(outbox::Event::Orders(orders)) = &entry.event else { continue };
                for order in orders {
                    let before = held.insert(order.uid.to_string(), order.order_id);
                    assert_eq!(before, None, "{} has two orders", order.uid);
                }
            }
            if page.len() < 256 {
                break;
            }
        }
        for (uid, order_id) in &books.orders {
            assert_eq!(held.get(uid), Some(order_id), "{uid} was told {order_id}");
        }
        assert_eq!(found.claimed, held.len() as u64);
    }
}

pub(super) fn to(id: &str) -> ShiftRequest {
    ShiftRequest {
        kind: ShiftKind::Master,
        to: CenterId::new(id).unwrap(),
        mode: ShiftMode::Planned,
        shards: Vec::new(),
        expect_epoch: None,
        accept_loss: false,
        dry_run: false,
        reason: "a test".to_owned(),
        key: None,
    }
}

pub(super) fn forced(id: &str) -> ShiftRequest {
    ShiftRequest { mode: ShiftMode::Forced, ..to(id) }
}

#[track_caller]
pub(super) fn done(shift: &Shift) {
    assert_eq!(shift.state, ShiftState::Done, "{shift:#?}");
}

/// What buyers were told.
#[derive(Debug, Default)]
pub(super) struct Books {
    pub(super) orders: BTreeMap<String, OrderId>,
    last: Option<Instant>,
    /// The longest time without a purchase.
    pub(super) gap: Duration,
}

impl Books {
    fn sold(&mut self, uid: String, order_id: OrderId) {
        let now = Instant::now();
        let before = self.last.replace(now);
        self.gap = self.gap.max(before.map_or(Duration::ZERO, |before| now - before));
        self.orders.insert(uid, order_id);
    }
}

pub(super) struct Buyers {
    pub(super) books: Arc<Mutex<Books>>,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Buyers {
    /// Waits until somebody bought something from now on.
    pub(super) async fn sell(&self, more: usize) {
        let before = self.books.lock().unwrap().orders.len();
        eventually("purchases", async || {
            (self.books.lock().unwrap().orders.len() >= before + more).then_some(())
        })
        .await;
    }

    pub(super) async fn stop(self) -> Books {
        self.stop.cancel();
        self.tasks.join_all().await;
        Arc::into_inner(self.books).expect("all buyers ended").into_inner().unwrap()
    }
}

#[derive(Clone)]
struct Shop {
    authority: Authority,
    client: redis::Client,
    epoch_server: u16,
}

/// One purchase as a lane makes it: under the fence of a grant, acknowledged behind a barrier, if the grant is still
/// the same (A2, K2); otherwise tried again under the same key.
async fn buy(centers: &[Shop], sale: &SaleId, uid: &str, stop: &CancellationToken) -> Option<OrderId> {
    let mut conns: BTreeMap<u16, MultiplexedConnection> = BTreeMap::new();
    while !stop.is_cancelled() {
        for center in centers {
            let Ok(grant) = center.authority.grant() else { continue };
            let conn = match conns.remove(&center.epoch_server) {
                Some(conn) => Ok(conn),
                None => {
                    let config = AsyncConnectionConfig::new()
                        .set_connection_timeout(Some(ANSWER))
                        .set_response_timeout(Some(ANSWER));
                    center.client.get_multiplexed_async_connection_with_config(&config).await
                }
            };
            let Ok(mut conn) = conn else { continue };
            let entry = one_unit(uid, KeyDigest::default());
            let Ok(reply) = reserve(&mut conn, &grant.fence, 0, sale, &[entry]).await else { continue };
            let order_id = match reply.outcomes.into_iter().next() {
                Some(ReserveOutcome::Accepted(order_id) | ReserveOutcome::Replay(order_id)) => order_id,
                other => panic!("{uid}: {other:?}"),
            };
            let durable = match grant.acknowledge {
                Acknowledge::Local => true,
                Acknowledge::Replicated { replicas } => matches!(
                    barrier(&mut conn, &grant.fence, replicas, WAIT_TIMEOUT_MS, WaitCommand::Wait).await,
                    Ok(Replication::Confirmed)
                ),
            };
            let same = center.authority.grant().is_ok_and(|now| now.fence == grant.fence);
            if durable && same {
                return Some(order_id);
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    None
}
