//! Shifts: moving the master, or the home of shards, to another center.
//!
//! Any center's admin listener takes these calls. The start is passed on to the center that takes, whose service runs
//! the shift; so is a question about a running one, because its course is known there. What is over stands in the
//! topology, and is answered from there by whoever is asked.

use std::sync::Arc;

use axum::response::Response;
use http::header::LOCATION;
use http::{HeaderValue, StatusCode};
use seckill_domain::{CenterId, Epoch, Shard};
use serde::{Deserialize, Serialize};

use super::AdminState;
use super::call::{Call, private_json};
use super::problem::{Code, Problem};
use super::relay::Vouched;
use crate::shift::ShiftRequest;
use crate::topology::{Shift, ShiftKind, ShiftMode};

/// The longest reason that the history keeps, bytes.
const MAX_REASON_BYTES: usize = 500;

/// Body of `POST /admin/v1/shifts`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ShiftBody {
    to: CenterId,
    #[serde(default = "ShiftBody::default_kind")]
    kind: ShiftKind,
    #[serde(default)]
    mode: ShiftMode,
    #[serde(default)]
    shards: Vec<u8>,
    #[serde(default)]
    expect_epoch: Option<u64>,
    #[serde(default)]
    accept_loss: bool,
    #[serde(default)]
    dry_run: bool,
    #[serde(default)]
    reason: String,
}

impl ShiftBody {
    fn default_kind() -> ShiftKind {
        ShiftKind::Master
    }

    fn request(self, key: Option<String>) -> Result<ShiftRequest, Problem> {
        let mut shards = Vec::with_capacity(self.shards.len());
        for number in self.shards {
            let shard = Shard::new(number);
            shards.push(shard.ok_or_else(|| Problem::bad_request("Shards have the numbers 0 to 63"))?);
        }
        shards.sort_unstable();
        shards.dedup();
        match (self.kind, shards.is_empty()) {
            (ShiftKind::Master, true) | (ShiftKind::Shards, false) => {}
            (ShiftKind::Master, false) => {
                return Err(Problem::bad_request("shards belong to a shift of kind \"shards\""));
            }
            (ShiftKind::Shards, true) => return Err(Problem::bad_request("shards are missing")),
        }
        if self.reason.len() > MAX_REASON_BYTES {
            return Err(Problem::bad_request(format!("A reason has at most {MAX_REASON_BYTES} bytes")));
        }
        Ok(ShiftRequest {
            kind: self.kind,
            to: self.to,
            mode: self.mode,
            shards,
            expect_epoch: self.expect_epoch.map(Epoch),
            accept_loss: self.accept_loss,
            dry_run: self.dry_run,
            reason: self.reason,
            key,
        })
    }
}

/// `POST /admin/v1/shifts`
pub(super) async fn start(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    let key = call.idempotency_key_if_any()?;
    let request = call.peek::<ShiftBody>().await?.request(key)?;
    if let Some(target) = state.relay.other_center(&request.to) {
        let answered = state.relay.forward(&target, &mut call, Vouched::Admin(actor.to_string())).await;
        // Its service may have died after it recorded the shift: who asks again under the same key is told of it here.
        let recorded = request.key.as_deref().and_then(|key| state.shifts.find_by_key(key));
        return match (answered, recorded) {
            (Err(problem), Some(shift)) if problem.code() == Code::CenterUnreachable => begun(&shift),
            (answered, _) => answered,
        };
    }
    let dry_run = request.dry_run;
    let shift = state.shifts.start(request, &actor.to_string()).await?;
    if dry_run {
        return private_json(&shift);
    }
    tracing::info!(shift = shift.id, from = %shift.from, to = %shift.to, mode = ?shift.mode, %actor, "a shift was asked for");
    begun(&shift)
}

/// `GET /admin/v1/shifts`
pub(super) async fn list(state: Arc<AdminState>, call: Call) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Shifts {
        running: Option<Shift>,
        /// The newest first.
        history: Vec<Shift>,
    }
    state.operator(&call)?;
    // One that is being verified stands in the history already, and is not over.
    let mut history = state.shifts.list();
    let running = history.iter().position(|shift| !shift.state.is_over()).map(|at| history.remove(at));
    private_json(&Shifts { running, history })
}

/// `GET /admin/v1/shifts/{id}`
pub(super) async fn get(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    let id = call.shift_id(3)?.into_owned();
    let known = state.shifts.find(&id).ok_or_else(|| Problem::new(Code::ShiftNotFound))?;
    if !known.state.is_over()
        && call.vouched().is_none()
        && let Some(coordinator) = state.relay.other_center(&known.coordinator.center)
        && let Ok(answer) =
            state.relay.forward(&coordinator, &mut call, Vouched::Admin(actor.to_string())).await
        && answer.status() == StatusCode::OK
    {
        return Ok(answer);
    }
    private_json(&known)
}

/// `POST /admin/v1/shifts/{id}/abort`
pub(super) async fn abort(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    let id = call.shift_id(3)?.into_owned();
    call.no_fields().await?;
    let known = state.shifts.find(&id).ok_or_else(|| Problem::new(Code::ShiftNotFound))?;
    if !known.state.is_over()
        && call.vouched().is_none()
        && let Some(coordinator) = state.relay.other_center(&known.coordinator.center)
    {
        match state.relay.forward(&coordinator, &mut call, Vouched::Admin(actor.to_string())).await {
            // Its coordinator is gone: any service may give it up.
            Err(problem) if problem.code() == Code::CenterUnreachable => {}
            answered => return answered,
        }
    }
    let shift = state.shifts.abort(&id, &actor.to_string()).await?;
    tracing::info!(shift = shift.id, %actor, "a shift is given up");
    begun(&shift)
}

/// A shift that goes on after the answer.
fn begun(shift: &Shift) -> Result<Response, Problem> {
    let mut response = private_json(shift)?;
    *response.status_mut() = StatusCode::ACCEPTED;
    if let Ok(location) = HeaderValue::try_from(format!("/admin/v1/shifts/{}", shift.id)) {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}
