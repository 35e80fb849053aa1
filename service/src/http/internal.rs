//! The internal listener: calls of other centers. No tokens here; every request is signed, see
//! [`crate::cross_center`]. What is refused was not executed.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Limited};
use seckill_domain::Epoch;
use seckill_ledger::admin::ReclaimEntry;
use seckill_ledger::{Executed, ReleaseEntry};
use serde::de::DeserializeOwned;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::call::{Call, Measured, Routes, private_json};
use super::problem::{self, Code, Problem};
use super::relay::{RELAY, RelayAnswer, RelayCall, Vouched};
use crate::cross_center::calls::{
    AUDIT_ORDERS, AUDIT_QUEUE, AUDIT_ROWS, AUDIT_UNREADABLE, AuditOrdersCall, AuditRowsCall,
    MAX_AUDIT_ORDERS, MAX_BODY_BYTES, MAX_ENTRIES, OUTBOX, OutboxAnswer, RECLAIM, RELEASE, RESERVE, RESTORE,
    ReclaimCall, ReclaimLine, ReleaseCall, ReserveCall, SALE, SESSIONS, SHARDS, SaleCall, ShardsAnswer,
    ShardsCall, WireKey,
};
use crate::cross_center::session::{Now, Sessions};
use crate::cross_center::{Refusal, session::Caller};
use crate::inventory::Inventory;
use crate::orders::{KafkaQueue, MAX_PUT_BACK, OrderStore, PutBack, centers};
use crate::shift::answer_for_shards;
use crate::telemetry::Metrics;
use crate::topology::TopologyHandle;

/// Numbers of this listener's routes in the metrics begin here.
const FIRST_INTERNAL_ROUTE: usize = 56;
/// A request for a session has some 250 bytes.
const MAX_HELLO_BYTES: usize = 4 * 1024;
/// The largest answer that is passed on: a page of a hundred orders has some 60 KB, an audit of ten thousand sales 5 MB.
const MAX_RELAYED_BYTES: usize = 12 << 20;

/// What the internal listener works with.
pub struct InternalState {
    /// The sessions that other centers have with this process.
    pub sessions: Sessions,
    /// Purchases and releases.
    pub inventory: Inventory,
    /// The order database.
    pub orders: OrderStore,
    /// The Kafka queue, where that is the queue.
    pub queue: Option<KafkaQueue>,
    /// Which epoch it is.
    pub topology: TopologyHandle,
    /// The public listener's routes, for requests that reached another center.
    pub public: Router,
    /// The admin listener's routes, likewise.
    pub admin: Router,
    /// Owns what goes on after a caller has gone.
    pub tasks: TaskTracker,
    /// All metrics.
    pub metrics: Arc<Metrics>,
}

#[cfg(test)]
impl InternalState {
    /// Of center a or b, with an inventory and orders and nothing to relay to.
    pub(crate) fn of_a_test(
        center: &str,
        inventory: Inventory,
        orders: OrderStore,
        topology: TopologyHandle,
        tasks: TaskTracker,
    ) -> InternalState {
        InternalState {
            sessions: Sessions::new(crate::cross_center::Keyring::of_a_test(center), center.to_owned()),
            inventory,
            orders,
            queue: None,
            topology,
            public: Router::new(),
            admin: Router::new(),
            tasks,
            metrics: Arc::new(Metrics::new()),
        }
    }
}

impl Measured for InternalState {
    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}

/// The routes of the internal listener.
pub fn internal_router(state: InternalState) -> Router {
    let metrics = Arc::clone(&state.metrics);
    Routes::new(&metrics, FIRST_INTERNAL_ROUTE)
        .post(SESSIONS, open)
        .post(RESERVE, reserve)
        .post(RELEASE, release)
        .post(OUTBOX, outbox)
        .post(SALE, sale)
        .post(AUDIT_ROWS, audit_rows)
        .post(AUDIT_ORDERS, audit_orders)
        .post(AUDIT_UNREADABLE, audit_unreadable)
        .post(AUDIT_QUEUE, audit_queue)
        .post(RELAY, relay)
        .post(SHARDS, shards)
        .post(RESTORE, restore)
        .post(RECLAIM, reclaim)
        .build(Arc::new(state))
        .0
}

/// Why a call was not executed.
enum Rejected {
    Refused(Refusal),
    Problem(Problem),
}

impl From<Refusal> for Rejected {
    fn from(refusal: Refusal) -> Self {
        Rejected::Refused(refusal)
    }
}

impl From<Problem> for Rejected {
    fn from(problem: Problem) -> Self {
        Rejected::Problem(problem)
    }
}

impl Rejected {
    fn answer(self, path: &str) -> Result<Response, Problem> {
        match self {
            Rejected::Refused(refusal) => {
                tracing::warn!(path, code = refusal.code(), "a call of another center was refused");
                Ok(problem::refused(refusal))
            }
            Rejected::Problem(problem) => Err(problem),
        }
    }
}

async fn open(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    let body = call.bytes(MAX_HELLO_BYTES).await?;
    match state.sessions.open(&call.parts, &body, Now::read()) {
        Ok(welcome) => private_json(&welcome),
        Err(refusal) => Rejected::Refused(refusal).answer(SESSIONS),
    }
}

/// The body of a genuine request that was not seen before, and who sent it.
async fn accept(state: &InternalState, call: &mut Call) -> Result<(Caller, Bytes), Rejected> {
    let genuine = state.sessions.authenticate(&call.parts, Now::read())?;
    let body = call.bytes(MAX_BODY_BYTES).await?;
    Ok((genuine.with_body(&body)?, body))
}

/// The same for a call that depends on who is the master or at home where: both sides must see the same topology.
async fn question<Q: DeserializeOwned>(state: &InternalState, call: &mut Call) -> Result<Q, Rejected> {
    question_at(state, call).await.map(|(question, _)| question)
}

/// The same, with the epoch that both sides saw.
async fn question_at<Q: DeserializeOwned>(
    state: &InternalState,
    call: &mut Call,
) -> Result<(Q, Epoch), Rejected> {
    let (caller, body) = accept(state, call).await?;
    let epoch = state.topology.current().epoch;
    if caller.epoch != epoch.0 {
        let detail = format!("The caller is at epoch {}, this center at epoch {epoch}", caller.epoch);
        return Err(Problem::with_detail(Code::NoAuthority, detail).executed(Executed::No).into());
    }
    match serde_json::from_slice(&body) {
        Ok(question) => Ok((question, epoch)),
        Err(error) => Err(Problem::bad_request(error.to_string()).into()),
    }
}

/// The same for a call that only reads what this center holds: it has the same answer at every epoch.
async fn look_up<Q: DeserializeOwned>(state: &InternalState, call: &mut Call) -> Result<Q, Rejected> {
    let (_, body) = accept(state, call).await?;
    serde_json::from_slice(&body).map_err(|error| Problem::bad_request(error.to_string()).into())
}

fn bounded(entries: usize) -> Result<(), Problem> {
    match entries {
        1..=MAX_ENTRIES => Ok(()),
        _ => Err(Problem::bad_request(format!("A call has 1 to {MAX_ENTRIES} entries"))),
    }
}

async fn reserve(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    match question_at::<ReserveCall>(&state, &mut call).await {
        Ok((call, epoch)) => {
            bounded(call.entries.len())?;
            // The lanes own what they took: nothing is lost if the caller hangs up.
            private_json(&state.inventory.decide_for_others(epoch, call).await)
        }
        Err(rejected) => rejected.answer(RESERVE),
    }
}

async fn release(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    let ReleaseCall { sale_id, orders } = match question(&state, &mut call).await {
        Ok(call) => call,
        Err(rejected) => return rejected.answer(RELEASE),
    };
    bounded(orders.len())?;
    let orders: Vec<ReleaseEntry> =
        orders.into_iter().map(|(order_id, uid)| ReleaseEntry { order_id, uid }).collect();
    let inventory = state.inventory.clone();
    let released = state.tasks.spawn(async move { inventory.release_for_others(&sale_id, &orders).await });
    private_json(&released.await.map_err(Problem::internal)??)
}

async fn reclaim(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    let ReclaimCall { sale_id, orders } = match question(&state, &mut call).await {
        Ok(call) => call,
        Err(rejected) => return rejected.answer(RECLAIM),
    };
    bounded(orders.len())?;
    let orders: Vec<ReclaimEntry> = orders
        .into_iter()
        .map(|ReclaimLine(order_id, uid, quantity, WireKey(key))| ReclaimEntry {
            order_id,
            uid,
            quantity,
            key,
        })
        .collect();
    let inventory = state.inventory.clone();
    let claimed = state.tasks.spawn(async move { inventory.reclaim(&sale_id, &orders).await });
    private_json(&claimed.await.map_err(Problem::internal)??)
}

async fn outbox(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    if let Err(rejected) = accept(&state, &mut call).await {
        return rejected.answer(OUTBOX);
    }
    let stored = vec![(0, state.orders.position(0).await?)];
    private_json(&OutboxAnswer { stored })
}

async fn sale(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    match look_up::<SaleCall>(&state, &mut call).await {
        Ok(call) => private_json(&centers::sale(&state.orders, &call.sale_id).await?),
        Err(rejected) => rejected.answer(SALE),
    }
}

async fn audit_rows(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    match look_up::<AuditRowsCall>(&state, &mut call).await {
        Ok(call) => private_json(&centers::rows(&state.orders, &call).await?),
        Err(rejected) => rejected.answer(AUDIT_ROWS),
    }
}

async fn audit_orders(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    match look_up::<AuditOrdersCall>(&state, &mut call).await {
        Ok(call) if call.orders.len() > MAX_AUDIT_ORDERS => {
            Err(Problem::bad_request(format!("A call has at most {MAX_AUDIT_ORDERS} orders")))
        }
        Ok(call) => private_json(&centers::some_orders(&state.orders, &call.orders).await?),
        Err(rejected) => rejected.answer(AUDIT_ORDERS),
    }
}

async fn audit_unreadable(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    match accept(&state, &mut call).await {
        Ok(_) => private_json(&centers::set_aside(&state.orders).await?),
        Err(rejected) => rejected.answer(AUDIT_UNREADABLE),
    }
}

async fn audit_queue(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    match accept(&state, &mut call).await {
        Ok(_) => private_json(&state.queue.as_ref().map(KafkaQueue::standing).unwrap_or_default()),
        Err(rejected) => rejected.answer(AUDIT_QUEUE),
    }
}

async fn shards(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    let call: ShardsCall = match look_up(&state, &mut call).await {
        Ok(call) => call,
        Err(rejected) => return rejected.answer(SHARDS),
    };
    // Letting go is finished though the caller hangs up: it asks again.
    let (orders, topology) = (state.orders.clone(), state.topology.clone());
    let answer = state.tasks.spawn(async move { answer_for_shards(&orders, &topology, call).await });
    let answer: ShardsAnswer = answer.await.map_err(Problem::internal)??;
    private_json(&answer)
}

async fn restore(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    // Which claims the ledger holds is true of one epoch.
    match question::<PutBack>(&state, &mut call).await {
        Ok(call) if !call.is_bounded() => {
            Err(Problem::bad_request(format!("A call has at most {MAX_PUT_BACK} orders")))
        }
        Ok(call) => private_json(&state.orders.put_back(call).await?),
        Err(rejected) => rejected.answer(RESTORE),
    }
}

async fn relay(state: Arc<InternalState>, mut call: Call) -> Result<Response, Problem> {
    let call: RelayCall = match question(&state, &mut call).await {
        Ok(call) => call,
        Err(rejected) => return rejected.answer(RELAY),
    };
    let RelayCall { vouched, method, path, headers, body } = call;
    let invalid = || Problem::bad_request("Requests of this kind are not passed on");
    let method: Method = method.parse().map_err(|_| invalid())?;
    let bare = path.split('?').next().unwrap_or(&path);
    if !vouched.may_ask(&method, bare) {
        return Err(invalid());
    }
    let router = match vouched {
        Vouched::User(_) | Vouched::Payments => state.public.clone(),
        Vouched::Admin(_) => state.admin.clone(),
    };
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    let mut request = request.body(Body::from(body)).map_err(|_| invalid())?;
    request.extensions_mut().insert(vouched);
    let reads = request.method() == Method::GET;
    let answer = async move {
        // A router is always ready and never fails.
        let response = router.oneshot(request).await.unwrap_or_else(|never| match never {});
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, MAX_RELAYED_BYTES).collect().await.map_err(Problem::internal)?;
        let body = String::from_utf8(body.to_bytes().into()).map_err(Problem::internal)?;
        Ok::<_, Problem>(RelayAnswer::new(parts.status, &parts.headers, body))
    };
    // A change goes on after its caller has gone; nobody needs an answer that nobody waits for.
    if reads {
        return private_json(&answer.await?);
    }
    private_json(&state.tasks.spawn(answer).await.map_err(Problem::internal)??)
}
