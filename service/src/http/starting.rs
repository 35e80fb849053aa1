//! The listeners of a service that has not found yet what it needs: the probes are told why, everybody else to come
//! again. Nothing that is asked meanwhile is executed.

use std::sync::Arc;

use axum::Router;
use axum::response::Response;
use axum::routing::get;
use http::{HeaderMap, StatusCode};
use seckill_domain::CenterId;
use seckill_ledger::Executed;
use serde_json::json;

use super::call::private_json;
use super::health::Readiness;
use super::problem::{Code, Problem};
use crate::telemetry::Metrics;

/// What is known of a service that starts.
#[derive(Clone)]
pub struct Starting {
    /// Its center.
    pub center: CenterId,
    /// What it waits for.
    pub readiness: Readiness,
    /// All metrics.
    pub metrics: Arc<Metrics>,
}

/// The routes of the admin listener until the service is put together.
pub fn starting_admin_router(starting: Starting) -> Router {
    let metrics = Arc::clone(&starting.metrics);
    starting_router()
        .route("/livez", get(|headers: HeaderMap| async move { answer(super::health::alive(), &headers) }))
        .route(
            "/readyz",
            get(move |headers: HeaderMap| {
                let answered = starting.ready();
                async move { answer(answered, &headers) }
            }),
        )
        .route(
            "/metrics",
            get(move |headers: HeaderMap| {
                let text = super::health::encoded(&metrics);
                async move { answer(text, &headers) }
            }),
        )
}

/// The routes of the public and the internal listener until then.
pub fn starting_router() -> Router {
    Router::new().fallback(|headers: HeaderMap| async move {
        let problem = Problem::with_detail(Code::NoAuthority, "The service is starting");
        answer(Err(problem.executed(Executed::No)), &headers)
    })
}

impl Starting {
    fn ready(&self) -> Result<Response, Problem> {
        let body = json!({ "status": "starting", "center": self.center, "reason": self.readiness.reason() });
        let mut response = private_json(&body)?;
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        Ok(response)
    }
}

fn answer(answered: Result<Response, Problem>, headers: &HeaderMap) -> Response {
    answered.unwrap_or_else(|problem| problem.respond(headers.get("x-request-id"), "starting"))
}
