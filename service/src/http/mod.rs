//! The HTTP listeners: public (shoppers, the shop's backend), admin (operators, probes), internal (other centers).
//!
//! Handlers translate between HTTP and the use cases; they decide nothing. [`problem`] is the only place that knows
//! status codes of errors. `docs/openapi.yaml` describes every route and is served as `/openapi.yaml`.

mod admin;
mod call;
mod events;
mod health;
mod internal;
mod ledger;
mod orders;
pub mod problem;
mod purchases;
mod relay;
mod route;
mod sales;
mod server;
mod shifts;
mod starting;

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use seckill_domain::{CenterId, Currency};
use tokio_util::sync::CancellationToken;

pub use admin::Auditor;
pub use call::Peer;
pub use health::{Readiness, Stage};
pub use internal::{InternalState, internal_router};
pub use relay::Relay;
pub use server::{ServeOptions, Served, serve};
pub use starting::{Starting, starting_admin_router, starting_router};

use crate::admission::{ClientAddress, Limiter, Tickets, Tokens};
use crate::inventory::Inventory;
use crate::orders::{OrderCenters, OrderStore, Updates, Workers};
use crate::shift::{GuardianHandle, Shifts};
use crate::telemetry::Metrics;
use crate::topology::{Authority, Instances, TopologyHandle};
use call::{Call, Measured, Routes};
use events::Streams;
use problem::Problem;

/// The description of both listeners.
pub const OPENAPI: &str = include_str!("../../../docs/openapi.yaml");

/// Numbers of routes in the metrics: the public listener's from here on …
const FIRST_PUBLIC_ROUTE: usize = 0;
/// … and the admin listener's.
const FIRST_ADMIN_ROUTE: usize = 24;

/// What the public listener works with.
pub struct PublicState {
    /// Purchases and the sales' snapshot.
    pub inventory: Inventory,
    /// The order database.
    pub orders: OrderStore,
    /// The feed of order changes.
    pub updates: Updates,
    /// The key rings.
    pub tokens: Arc<Tokens>,
    /// Tickets for event streams.
    pub tickets: Tickets,
    /// Rate limits.
    pub limiter: Limiter,
    /// Where requests come from.
    pub addresses: ClientAddress,
    /// Who is at home where.
    pub topology: TopologyHandle,
    /// All metrics.
    pub metrics: Arc<Metrics>,
    /// Passes on what other centers have to answer.
    pub relay: Relay,
    /// Ends the event streams, and with them their connections.
    pub shutdown: CancellationToken,
}

/// What the admin listener works with.
pub struct AdminState {
    /// The sales.
    pub inventory: Inventory,
    /// The order database.
    pub orders: OrderStore,
    /// The order databases of all centers.
    pub centers: OrderCenters,
    /// What brings the orders there.
    pub workers: Workers,
    /// The key rings.
    pub tokens: Arc<Tokens>,
    /// The topology.
    pub topology: TopologyHandle,
    /// Whether this service may write.
    pub authority: Authority,
    /// This center.
    pub center: CenterId,
    /// Currency of sales that name none.
    pub default_currency: Option<Currency>,
    /// Compares ledger, queue and order tables.
    pub auditor: Auditor,
    /// Creates and adopts the ledger.
    pub guardian: GuardianHandle,
    /// Moves the master and shards.
    pub shifts: Shifts,
    /// The instances that are alive.
    pub instances: Instances,
    /// Passes on what the master center has to do.
    pub relay: Relay,
    /// Whether this instance takes requests.
    pub readiness: Readiness,
    /// All metrics.
    pub metrics: Arc<Metrics>,
}

/// A public listener at work.
struct Public {
    state: PublicState,
    streams: Streams,
}

impl Measured for Public {
    fn metrics(&self) -> &Arc<Metrics> {
        &self.state.metrics
    }
}

impl Measured for AdminState {
    fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}

/// The routes of the public listener.
pub fn public_router(state: PublicState) -> Router {
    public_routes(state).0
}

fn public_routes(state: PublicState) -> (Router, Vec<(&'static str, &'static str)>) {
    purchases::name_outcomes(&state.metrics);
    let metrics = Arc::clone(&state.metrics);
    let streams = Streams::new(&metrics, state.shutdown.clone());
    Routes::new(&metrics, FIRST_PUBLIC_ROUTE)
        .get("/v1/route", route::route)
        .get("/v1/sales", sales::list)
        .get("/v1/sales/{id}", sales::get)
        .get("/v1/sales/{id}/events", events::sale)
        .post("/v1/sales/{id}/purchases", purchases::purchase)
        .get("/v1/orders", orders::list)
        .get("/v1/orders/{id}", orders::get)
        .get("/v1/orders/{id}/events", events::order)
        .post("/v1/orders/{id}/ticket", events::ticket)
        .post("/v1/orders/{id}/cancel", orders::cancel)
        .post("/v1/orders/{id}/pay", orders::pay)
        .get("/v1/coupons", orders::coupons)
        .get("/openapi.yaml", openapi)
        .build(Arc::new(Public { state, streams }))
}

/// The routes of the admin listener.
pub fn admin_router(state: AdminState) -> Router {
    admin_routes(state).0
}

fn admin_routes(state: AdminState) -> (Router, Vec<(&'static str, &'static str)>) {
    let metrics = Arc::clone(&state.metrics);
    let routes = Routes::new(&metrics, FIRST_ADMIN_ROUTE)
        .get("/livez", health::live)
        .get("/readyz", health::ready)
        .get("/metrics", health::metrics)
        .get("/openapi.yaml", openapi);
    admin::add(routes).build(Arc::new(state))
}

async fn openapi<S>(_state: Arc<S>, _call: Call) -> Result<Response, Problem> {
    let mut response = Response::new(OPENAPI.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/yaml"));
    Ok(response)
}

#[cfg(test)]
mod tests;
