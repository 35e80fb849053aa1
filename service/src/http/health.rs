//! Probes and metrics: no token, admin listener only.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::response::Response;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, StatusCode};
use seckill_domain::Millis;
use serde_json::json;

use super::AdminState;
use super::call::{Call, private_json};
use super::problem::Problem;
use crate::telemetry::Metrics;
use crate::topology::Shift;

/// How long `/readyz` waits for the order database.
const STORE_WITHIN: Duration = Duration::from_secs(1);
const OPENMETRICS: HeaderValue =
    HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// Where the process stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// Not ready yet.
    Starting = 0,
    /// Takes requests.
    Serving = 1,
    /// Finishes what it has; new requests should go elsewhere.
    Draining = 2,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Starting => "starting",
            Stage::Serving => "ready",
            Stage::Draining => "draining",
        }
    }
}

/// Tells the probes where the process stands. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<Standing>);

#[derive(Debug, Default)]
struct Standing {
    stage: AtomicU8,
    /// What the start waits for.
    waits_for: Mutex<Option<Arc<str>>>,
}

impl Readiness {
    /// The process has come to a stage.
    pub fn set(&self, stage: Stage) {
        self.0.stage.store(stage as u8, Ordering::Release);
    }

    /// Where it stands.
    pub fn stage(&self) -> Stage {
        match self.0.stage.load(Ordering::Acquire) {
            0 => Stage::Starting,
            1 => Stage::Serving,
            _ => Stage::Draining,
        }
    }

    /// Says what the start waits for; none: it goes on.
    pub fn waits_for(&self, reason: Option<Arc<str>>) {
        *self.0.waits_for.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    /// What the start waits for.
    pub fn reason(&self) -> Option<Arc<str>> {
        self.0.waits_for.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// `GET /livez`: the process answers.
pub(super) async fn live(_state: Arc<AdminState>, _call: Call) -> Result<Response, Problem> {
    alive()
}

pub(super) fn alive() -> Result<Response, Problem> {
    private_json(&json!({ "status": "alive" }))
}

/// `GET /readyz`: 503 only while starting or draining. Reads go on when degraded or without authority, so those
/// are told in the body alone.
pub(super) async fn ready(state: Arc<AdminState>, _call: Call) -> Result<Response, Problem> {
    let stage = state.readiness.stage();
    let topology = state.topology.current();
    let authority = match state.authority.grant() {
        Ok(grant) => json!({
            "granted": true,
            "epoch": grant.fence.epoch,
            "master": grant.fence.master,
            "durability": grant.acknowledge.durability(),
        }),
        Err(refusal) => {
            json!({ "granted": false, "cause": refusal.cause.as_str(), "reason": &*refusal.reason })
        }
    };
    let sales = state.inventory.sales();
    let store = match tokio::time::timeout(STORE_WITHIN, state.orders.position(0)).await {
        Ok(Ok(position)) => json!({ "ok": true, "position": position }),
        Ok(Err(error)) => {
            tracing::warn!(%error, "the order database does not answer the probe");
            json!({ "ok": false })
        }
        Err(_) => json!({ "ok": false }),
    };
    // A ledger without any write yet, or an empty server, has no time.
    let seen = (sales.as_of() != Millis::default()).then(|| (sales.as_of(), sales.age_ms()));
    let mut response = private_json(&json!({
        "status": stage.name(),
        "center": state.center,
        "authority": authority,
        "ledger": {
            "loaded": sales.is_loaded(),
            "as_of": seen.map(|(as_of, _)| as_of),
            "age_ms": seen.map(|(_, age_ms)| age_ms),
        },
        "replication": crate::shift::Replication::from(&*state.guardian.server().borrow()),
        "store": store,
        "queue": { "kind": state.workers.queue(), "waiting": state.workers.waiting() },
        "topology": {
            "state": topology.state,
            "epoch": topology.epoch,
            "master": topology.master,
            "durability": topology.durability,
            "in_sync": topology.in_sync,
            "shift": topology.shift.as_deref().map(in_short),
            "last_shift": topology.history.last().map(in_short),
        },
        "degraded": topology.state == crate::topology::TopologyState::Degraded,
    }))?;
    if stage != Stage::Serving {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    Ok(response)
}

/// What of a shift belongs into a probe's answer.
fn in_short(shift: &Shift) -> serde_json::Value {
    json!({
        "id": shift.id,
        "kind": shift.kind,
        "mode": shift.mode,
        "from": shift.from,
        "to": shift.to,
        "state": shift.state,
        "phase": shift.phase,
        "started_at": shift.started_at,
        "ended_at": shift.ended_at,
        "held_ms": shift.held_ms,
    })
}

/// `GET /metrics`
pub(super) async fn metrics(state: Arc<AdminState>, _call: Call) -> Result<Response, Problem> {
    encoded(&state.metrics)
}

pub(super) fn encoded(metrics: &Metrics) -> Result<Response, Problem> {
    let text = metrics.encode().map_err(Problem::internal)?;
    let mut response = Response::new(text.into());
    response.headers_mut().insert(CONTENT_TYPE, OPENMETRICS);
    Ok(response)
}
