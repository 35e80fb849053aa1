//! A user's own orders and coupons; payment by the shop's backend.

use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use http::HeaderValue;
use seckill_domain::{Currency, Millis, Money, OrderId, OrderRecord, Quantity, SaleId, SaleKind, Table, Uid};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Public;
use super::call::{Call, private_json};
use super::problem::{Code, Problem};
use super::purchases::IDEMPOTENT_REPLAYED;
use super::relay::Vouched;
use crate::orders::{CancelOutcome, Cursor, Order, Page, PayOutcome, Payment, PaymentId};

/// Rows of a list, if the client does not say, and at most.
const DEFAULT_LIMIT: u32 = 20;
const MAX_LIMIT: u32 = 100;
/// How long a change of an order waits for it to be stored.
const STORED_WITHIN: Duration = Duration::from_secs(3);

/// An order as its reader sees it now.
#[derive(Debug)]
pub(super) enum Found {
    /// In its table.
    Stored(Box<Order>),
    /// Accepted, on its way there.
    Queued(Box<OrderRecord>),
}

impl Found {
    pub(super) fn owner(&self) -> &Uid {
        match self {
            Found::Stored(order) => &order.uid,
            Found::Queued(record) => &record.uid,
        }
    }

    /// Grows with every change; 0 while queued.
    pub(super) fn version(&self) -> u64 {
        match self {
            Found::Stored(order) => order.version(),
            Found::Queued(_) => 0,
        }
    }

    pub(super) fn is_settled(&self) -> bool {
        match self {
            Found::Stored(order) => order.is_settled(),
            Found::Queued(_) => false,
        }
    }
}

/// The body of `GET /v1/orders/{id}` before the order is stored.
#[derive(Serialize)]
struct QueuedOrder<'a> {
    order_id: OrderId,
    sale_id: &'a SaleId,
    kind: SaleKind,
    quantity: Quantity,
    unit_price: Money,
    currency: Currency,
    amount: Money,
    status: &'static str,
    accepted_at: Millis,
}

impl Serialize for Found {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Found::Stored(order) => order.serialize(serializer),
            Found::Queued(record) => QueuedOrder {
                order_id: record.order_id,
                sale_id: &record.sale_id,
                kind: record.terms.kind,
                quantity: record.quantity,
                unit_price: record.terms.unit_price,
                currency: record.terms.currency,
                amount: record.amount(),
                status: "queued",
                accepted_at: record.accepted_at,
            }
            .serialize(serializer),
        }
    }
}

impl Public {
    /// The user of a call that reads or changes their own data.
    pub(super) fn owner(&self, call: &Call) -> Result<Uid, Problem> {
        if let Some(Vouched::User(uid)) = call.vouched() {
            // The center that it reached has looked at the limits, too.
            return Ok(uid.clone());
        }
        let uid = self.state.tokens.user(call.bearer()?)?;
        let address = call.peer().map(|peer| self.state.addresses.of(peer, call.headers()));
        self.state.limiter.read(&uid, address)?;
        Ok(uid)
    }

    /// The user of a call that changes an order.
    fn buyer(&self, call: &Call) -> Result<Uid, Problem> {
        if let Some(Vouched::User(uid)) = call.vouched() {
            return Ok(uid.clone());
        }
        let uid = self.state.tokens.user(call.bearer()?)?;
        let address = call.peer().map(|peer| self.state.addresses.of(peer, call.headers()));
        self.state.limiter.write(&uid, address)?;
        Ok(uid)
    }

    /// Another center's answer, where the orders of the table are at home there.
    pub(super) async fn elsewhere(
        &self,
        call: &mut Call,
        table: Table,
        vouched: Vouched,
    ) -> Result<Option<Response>, Problem> {
        match self.state.relay.other_home(table) {
            Some(home) => self.state.relay.forward(&home, call, vouched).await.map(Some),
            None => Ok(None),
        }
    }

    /// Whether orders of a table are changed at the moment: not while they move to another center.
    fn may_change(&self, table: Table) -> Result<(), Problem> {
        match self.state.topology.current().blocked_shards.contains(&table.shard()) {
            true => Err(Problem::home_is_moving()),
            false => Ok(()),
        }
    }

    /// An order, wherever it is on its way: its table, else the outbox, else (it may have arrived in between)
    /// its table once more.
    pub(super) async fn find(&self, order_id: OrderId) -> Result<Found, Problem> {
        let stored = |order| Found::Stored(Box::new(order));
        if let Some(order) = self.state.orders.order(order_id).await? {
            return Ok(stored(order));
        }
        if let Some(record) = self.state.inventory.find_queued(order_id).await? {
            return Ok(Found::Queued(Box::new(record)));
        }
        let order = self.state.orders.order(order_id).await?;
        order.map(stored).ok_or_else(|| Problem::new(Code::OrderNotFound))
    }

    /// An order of this user; somebody else's does not exist for them.
    pub(super) async fn find_own(&self, uid: &Uid, order_id: OrderId) -> Result<Found, Problem> {
        let found = self.find(order_id).await?;
        if found.owner() == uid { Ok(found) } else { Err(Problem::new(Code::OrderNotFound)) }
    }

    /// Waits until an order that the caller did not find in its table has arrived there.
    async fn stored(&self, order_id: OrderId) -> Result<Box<Order>, Problem> {
        let mut subscription =
            self.state.updates.subscribe(order_id).map_err(|_| Problem::new(Code::Overloaded))?;
        let deadline = Instant::now() + STORED_WITHIN;
        loop {
            if let Found::Stored(order) = self.find(order_id).await? {
                return Ok(order);
            }
            if tokio::time::timeout_at(deadline, subscription.changed()).await.is_err() {
                return Err(Problem::with_detail(Code::OrdersUnavailable, "The order is not stored yet"));
            }
        }
    }
}

pub(super) async fn get(public: Arc<Public>, mut call: Call) -> Result<Response, Problem> {
    let uid = public.owner(&call)?;
    if let Some(answer) = public.elsewhere(&mut call, uid.table(), Vouched::User(uid.clone())).await? {
        return Ok(answer);
    }
    private_json(&public.find_own(&uid, call.order_id(2)?).await?)
}

#[derive(Deserialize)]
pub(super) struct Paging {
    limit: Option<u32>,
    cursor: Option<Cursor>,
}

impl Paging {
    pub(super) fn checked(self) -> Result<(u32, Option<Cursor>), Problem> {
        match self.limit {
            Some(0) => Err(Problem::bad_request("limit must be at least 1")),
            limit => Ok((limit.unwrap_or(DEFAULT_LIMIT).min(MAX_LIMIT), self.cursor)),
        }
    }
}

pub(super) async fn list(public: Arc<Public>, mut call: Call) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Orders {
        orders: Vec<Order>,
        next_cursor: Option<Cursor>,
    }
    let uid = public.owner(&call)?;
    if let Some(answer) = public.elsewhere(&mut call, uid.table(), Vouched::User(uid.clone())).await? {
        return Ok(answer);
    }
    let (limit, cursor) = call.query::<Paging>()?.checked()?;
    let Page { items, next } = public.state.orders.orders_of(&uid, limit, cursor).await?;
    private_json(&Orders { orders: items, next_cursor: next })
}

pub(super) async fn coupons(public: Arc<Public>, mut call: Call) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Coupons {
        coupons: Vec<crate::orders::Coupon>,
        next_cursor: Option<Cursor>,
    }
    let uid = public.owner(&call)?;
    if let Some(answer) = public.elsewhere(&mut call, uid.table(), Vouched::User(uid.clone())).await? {
        return Ok(answer);
    }
    let (limit, cursor) = call.query::<Paging>()?.checked()?;
    let Page { items, next } = public.state.orders.coupons_of(&uid, limit, cursor).await?;
    private_json(&Coupons { coupons: items, next_cursor: next })
}

pub(super) async fn cancel(public: Arc<Public>, mut call: Call) -> Result<Response, Problem> {
    let state = &public.state;
    let uid = public.buyer(&call)?;
    if let Some(answer) = public.elsewhere(&mut call, uid.table(), Vouched::User(uid.clone())).await? {
        return Ok(answer);
    }
    let order_id = call.order_id(2)?;
    call.no_fields().await?;
    public.may_change(order_id.table())?;
    let mut outcome = state.orders.cancel(&uid, order_id).await?;
    if matches!(outcome, CancelOutcome::NotFound) {
        // Perhaps it is on its way. Somebody else's is not waited for.
        public.find_own(&uid, order_id).await?;
        public.stored(order_id).await?;
        outcome = state.orders.cancel(&uid, order_id).await?;
    }
    match outcome {
        CancelOutcome::Cancelled(order) | CancelOutcome::Already(order) => private_json(&order),
        CancelOutcome::Closed(order) => Err(closed(&order)),
        CancelOutcome::NotFound => Err(Problem::new(Code::OrderNotFound)),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PayBody {
    payment_id: PaymentId,
    /// An order's sum may be larger than the largest price of one unit.
    amount: u64,
    #[serde(default)]
    coupon_id: Option<OrderId>,
}

pub(super) async fn pay(public: Arc<Public>, mut call: Call) -> Result<Response, Problem> {
    let state = &public.state;
    if call.vouched() != Some(&Vouched::Payments) {
        state.tokens.payments(call.bearer()?)?;
    }
    let order_id = call.order_id(2)?;
    if let Some(answer) = public.elsewhere(&mut call, order_id.table(), Vouched::Payments).await? {
        return Ok(answer);
    }
    let PayBody { payment_id, amount, coupon_id } = call.json().await?;
    let amount = i64::try_from(amount).map_err(|_| Problem::bad_request("amount is too large"))?;
    public.may_change(order_id.table())?;
    let payment = Payment { order_id, payment_id, amount: Money::stored(amount), coupon_id };
    let mut outcome = state.orders.pay(payment.clone()).await?;
    if matches!(outcome, PayOutcome::NotFound) {
        public.stored(order_id).await?;
        outcome = state.orders.pay(payment).await?;
    }
    match outcome {
        PayOutcome::Paid(order) => private_json(&order),
        PayOutcome::Replay(order) => {
            let mut response = private_json(&order)?;
            response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
            Ok(response)
        }
        PayOutcome::Closed { order, refund: _ } => Err(closed(&order)),
        PayOutcome::AmountMismatch { due } => Err(Problem::amount_mismatch(due)),
        PayOutcome::CouponUnusable { reason } => Err(Problem::with_detail(Code::CouponUnusable, reason)),
        PayOutcome::PaymentIdReused => Err(Problem::with_detail(
            Code::IdempotencyKeyReused,
            "The payment id was used with another order, amount or coupon",
        )),
        PayOutcome::NotFound => Err(Problem::new(Code::OrderNotFound)),
    }
}

fn closed(order: &Order) -> Problem {
    Problem::with_detail(Code::OrderClosed, format!("The order is {}", order.status))
}
