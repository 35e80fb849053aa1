//! The operators' calls.

mod sales;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use axum::response::Response;
use axum::routing::MethodFilter;
use http::Method;
use seckill_domain::{OrderId, OrderStatus, SaleId, Uid};
use seckill_ledger::StateChange;
use seckill_ledger::read::Sale;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::AdminState;
use super::call::{Call, Routes, private_json};
use super::orders::Paging;
use super::problem::{Code, Problem};
use super::relay::Vouched;
use crate::admission::Actor;
use crate::audit::Report;
use crate::orders::{Cursor, OrderFilter, Page};
use crate::topology::{Instance, Limits, Topology, UpdateError};

/// Compares ledger, queue and order tables, for one sale or all; the report as JSON, or why there is none.
pub type Auditor =
    Arc<dyn Fn(Option<SaleId>) -> Pin<Box<dyn Future<Output = Result<Value, String>> + Send>> + Send + Sync>;

pub(super) fn add(routes: Routes<AdminState>) -> Routes<AdminState> {
    routes
        .get("/admin/v1/sales", sales::list_sales)
        .post("/admin/v1/sales", sales::create_sales)
        .get("/admin/v1/sales/{id}", sales::get_sale)
        .add("PATCH", MethodFilter::PATCH, "/admin/v1/sales/{id}", sales::update_sale)
        .post("/admin/v1/sales/{id}/stock", sales::add_stock)
        .post("/admin/v1/sales/{id}/pause", |state, call| sales::set_state(state, call, StateChange::Pause))
        .post("/admin/v1/sales/{id}/resume", |state, call| sales::set_state(state, call, StateChange::Resume))
        .post("/admin/v1/sales/{id}/end", |state, call| sales::set_state(state, call, StateChange::End))
        .post("/admin/v1/sales/{id}/archive", sales::archive_sale)
        .get("/admin/v1/sales/{id}/audit", audit_sale)
        .get("/admin/v1/audit", audit_all)
        .get("/admin/v1/orders", list_orders)
        .get("/admin/v1/orders/{id}", get_order)
        .get("/admin/v1/refunds", list_refunds)
        .get("/admin/v1/dead-letters", list_dead_letters)
        .post("/admin/v1/dead-letters/replay", replay_dead_letters)
        .post("/admin/v1/ledger/init", super::ledger::init)
        .post("/admin/v1/ledger/adopt", super::ledger::adopt)
        .get("/admin/v1/topology", topology)
        .get("/admin/v1/shifts", super::shifts::list)
        .post("/admin/v1/shifts", super::shifts::start)
        .get("/admin/v1/shifts/{id}", super::shifts::get)
        .post("/admin/v1/shifts/{id}/abort", super::shifts::abort)
        .add("PUT", MethodFilter::PUT, "/admin/v1/limits", set_limits)
}

impl AdminState {
    pub(super) fn operator(&self, call: &Call) -> Result<Actor, Problem> {
        match call.vouched().and_then(Vouched::actor) {
            Some(actor) => Ok(actor),
            None => Ok(self.tokens.admin(call.bearer()?)?),
        }
    }

    /// The master center's answer, where that is another one than this. A change waits until the master is settled.
    async fn elsewhere(&self, call: &mut Call, actor: &Actor) -> Result<Option<Response>, Problem> {
        if call.parts.method != Method::GET {
            self.inventory.settled().await?;
        }
        match self.relay.other_master() {
            Some(master) => {
                self.relay.forward(&master, call, Vouched::Admin(actor.to_string())).await.map(Some)
            }
            None => Ok(None),
        }
    }

    async fn sale(&self, id: &SaleId) -> Result<Sale, Problem> {
        self.inventory.sale(id).await?.ok_or_else(|| Problem::new(Code::SaleNotFound))
    }
}

async fn audit_all(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    if let Some(answer) = audited_elsewhere(&state, &mut call, &actor).await? {
        return Ok(answer);
    }
    private_json(&(state.auditor)(None).await.map_err(Problem::internal)?)
}

/// The audit by the master center, whose ledger is never behind anybody's orders.
async fn audited_elsewhere(
    state: &AdminState,
    call: &mut Call,
    actor: &Actor,
) -> Result<Option<Response>, Problem> {
    let Some(master) = state.relay.other_master() else { return Ok(None) };
    match state.relay.forward(&master, call, Vouched::Admin(actor.to_string())).await {
        Ok(answer) => Ok(Some(answer)),
        Err(problem) => {
            let problem = format!("the ledger is in center {master}: {}", problem.detail());
            private_json(&Report::incomplete(problem)).map(Some)
        }
    }
}

/// The report about one sale: the sale's figures at the top, beside the verdict.
async fn audit_sale(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    if let Some(answer) = audited_elsewhere(&state, &mut call, &actor).await? {
        return Ok(answer);
    }
    let id = call.sale_id(3)?;
    let mut report = (state.auditor)(Some(id)).await.map_err(Problem::internal)?;
    let sale = report.pointer("/sales/0").and_then(Value::as_object).cloned();
    match (sale, report.as_object_mut()) {
        (Some(sale), Some(report)) => {
            for (name, value) in sale {
                report.entry(name).or_insert(value);
            }
        }
        (None, Some(report)) if report.get("verdict") != Some(&Value::from("incomplete")) => {
            return Err(Problem::new(Code::SaleNotFound));
        }
        _ => {}
    }
    private_json(&report)
}

async fn list_orders(state: Arc<AdminState>, call: Call) -> Result<Response, Problem> {
    #[derive(Deserialize)]
    struct Query {
        uid: Option<String>,
        sale_id: Option<String>,
        status: Option<String>,
    }
    #[derive(Serialize)]
    struct Orders {
        orders: Vec<crate::orders::AdminOrder>,
        next_cursor: Option<Cursor>,
    }
    state.operator(&call)?;
    let (limit, cursor) = call.query::<Paging>()?.checked()?;
    let Query { uid, sale_id, status } = call.query()?;
    let invalid = |error: &dyn std::fmt::Display| Problem::bad_request(error.to_string());
    let filter = OrderFilter {
        uid: uid.map(|text| Uid::new(&text)).transpose().map_err(|error| invalid(&error))?,
        sale_id: sale_id.map(|text| SaleId::new(&text)).transpose().map_err(|error| invalid(&error))?,
        status: status
            .map(|text| text.parse::<OrderStatus>())
            .transpose()
            .map_err(|error| invalid(&error))?,
    };
    let Page { items, next } = state.orders.admin_orders(&filter, limit, cursor).await?;
    private_json(&Orders { orders: items, next_cursor: next })
}

async fn get_order(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    let order_id: OrderId = call.order_id(3)?;
    if let Some(home) = state.relay.other_home(order_id.table()) {
        return state.relay.forward(&home, &mut call, Vouched::Admin(actor.to_string())).await;
    }
    if let Some(order) = state.orders.admin_order(order_id).await? {
        return private_json(&order);
    }
    if let Some(record) = state.inventory.find_queued(order_id).await? {
        let uid = record.uid.clone();
        let mut shown = serde_json::to_value(super::orders::Found::Queued(Box::new(record)))
            .map_err(Problem::internal)?;
        shown["uid"] = json!(uid);
        return private_json(&shown);
    }
    let order = state.orders.admin_order(order_id).await?;
    private_json(&order.ok_or_else(|| Problem::new(Code::OrderNotFound))?)
}

async fn list_refunds(state: Arc<AdminState>, call: Call) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Refunds {
        refunds: Vec<crate::orders::Refund>,
        next_cursor: Option<Cursor>,
    }
    state.operator(&call)?;
    let (limit, cursor) = call.query::<Paging>()?.checked()?;
    let Page { items, next } = state.orders.refunds(limit, cursor).await?;
    private_json(&Refunds { refunds: items, next_cursor: next })
}

async fn list_dead_letters(state: Arc<AdminState>, call: Call) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct DeadLetters {
        dead_letters: Vec<crate::orders::Unreadable>,
        next_cursor: Option<Cursor>,
    }
    state.operator(&call)?;
    let (limit, cursor) = call.query::<Paging>()?.checked()?;
    let Page { items, next } = state.orders.unreadable(limit, cursor).await?;
    private_json(&DeadLetters { dead_letters: items, next_cursor: next })
}

async fn replay_dead_letters(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    call.no_fields().await?;
    let topology = state.topology.current();
    let mine = |shard| *topology.home_center(shard) == state.center;
    let replay = crate::orders::replay(&state.orders, mine).await?;
    tracing::info!(
        read = replay.read, stored = replay.stored, unreadable = replay.unreadable.len(), %actor,
        "dead letters were read again"
    );
    private_json(&replay)
}

async fn topology(state: Arc<AdminState>, call: Call) -> Result<Response, Problem> {
    state.operator(&call)?;
    #[derive(Serialize)]
    struct Shown<'a> {
        #[serde(flatten)]
        topology: &'a Topology,
        instances: &'a [Instance],
    }
    let (topology, instances) = (state.topology.current(), state.instances.list());
    private_json(&Shown { topology: &topology, instances: &instances })
}

async fn set_limits(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    let limits: Limits = call.json().await?;
    if let Some(unknown) = limits.extra.keys().next() {
        return Err(Problem::bad_request(format!("unknown field `{unknown}`")));
    }
    let wanted = limits.clone();
    let updated = state.topology.update(move |topology| -> Result<(), std::convert::Infallible> {
        // What a later release put there stays.
        let extra = std::mem::take(&mut topology.limits.extra);
        topology.limits = Limits { extra, ..wanted.clone() };
        Ok(())
    });
    match updated.await {
        Ok(()) => {}
        Err(UpdateError::Refused(never)) => match never {},
        Err(UpdateError::Store(error)) => return Err(error.into()),
    }
    tracing::info!(?limits, %actor, "the rate limits were changed");
    private_json(&limits)
}
