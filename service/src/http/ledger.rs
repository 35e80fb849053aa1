//! Beginning a ledger, and going on with one whose past is in doubt.

use std::sync::Arc;

use axum::response::Response;
use seckill_ledger::Executed;
use serde_json::json;

use super::AdminState;
use super::call::{Call, private_json};
use super::problem::{Code, Problem};
use crate::shift::{InitError, RequestError};

/// `POST /admin/v1/ledger/init`: an empty Redis becomes the ledger.
pub(super) async fn init(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    call.no_fields().await?;
    let fence = state.guardian.init().await.map_err(|error| {
        refused(error, |error| match error {
            InitError::Refused(_) | InitError::Exists { .. } => {
                Problem::with_detail(Code::LedgerExists, error.to_string())
            }
            InitError::Failed(error) => unfinished(&error),
        })
    })?;
    tracing::info!(epoch = fence.epoch.0, %actor, "the ledger was created");
    private_json(&json!({ "ledger_id": fence.ledger_id, "epoch": fence.epoch, "master": fence.master }))
}

/// `POST /admin/v1/ledger/adopt`: what the Redis holds is the truth from here on. The answer says what became of
/// the stored orders.
pub(super) async fn adopt(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    call.no_fields().await?;
    let report = state.guardian.adopt().await.map_err(|error| refused(error, |error| unfinished(&error)))?;
    tracing::info!(epoch = report.epoch, reclaimed = report.reclaimed, %actor, "the ledger was adopted");
    private_json(&report)
}

fn refused<E>(error: RequestError<E>, failed: impl FnOnce(E) -> Problem) -> Problem {
    match error {
        RequestError::Closed | RequestError::Busy => {
            Problem::with_detail(Code::Overloaded, "The ledger is being worked on; look at /readyz")
                .executed(Executed::No)
        }
        RequestError::Failed(error) => failed(error),
    }
}

/// It stopped half-way; beginning again finds what is done already. An operator is told why.
fn unfinished(error: &dyn std::fmt::Display) -> Problem {
    Problem::with_detail(Code::MasterUnreachable, error.to_string()).executed(Executed::Unknown)
}
