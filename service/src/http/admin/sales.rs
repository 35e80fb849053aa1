//! What operators do to sales.

use std::sync::Arc;

use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{CONTENT_TYPE, ETAG, IF_MATCH, LOCATION};
use http::{HeaderMap, HeaderValue, StatusCode};
use seckill_domain::{CenterId, Clock, SaleId, SalePatch, SalePhase, SaleSpec, SystemClock};
use seckill_ledger::StateChange;
use seckill_ledger::read::Sale;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::admission::Actor;
use crate::archive::archive;
use crate::http::AdminState;
use crate::http::call::{Call, MAX_BODY_BYTES, private_json};
use crate::http::problem::{Code, Problem};
use crate::http::purchases::IDEMPOTENT_REPLAYED;
use crate::http::relay::{RelayCall, Vouched};

/// Sales in one NDJSON body, and their bytes.
const MAX_BULK_LINES: usize = 10_000;
const MAX_BULK_BYTES: usize = 16 * 1024 * 1024;
/// Sales of a bulk that are created at the same time: each waits for the ledger's disk.
const BULK_CONCURRENCY: usize = 16;

/// A sale as operators see it: the ledger's own figures, not the snapshot's.
#[derive(Serialize)]
struct AdminSale<'a> {
    #[serde(flatten)]
    spec: &'a SaleSpec,
    state: SalePhase,
    archived: bool,
    total: u64,
    remaining: u64,
    claimed: u64,
    released: u64,
    accepted: u64,
    version: u64,
}

impl AdminSale<'_> {
    fn of(sale: &Sale) -> AdminSale<'_> {
        let now = SystemClock.now();
        AdminSale {
            spec: &sale.spec,
            state: SalePhase::at(now, sale.state, sale.starts_at, sale.ends_at, sale.remaining),
            archived: sale.state == seckill_domain::LedgerState::Archived,
            total: sale.total,
            remaining: sale.remaining,
            claimed: sale.claimed,
            released: sale.released,
            accepted: sale.accepted,
            version: sale.version,
        }
    }
}

fn sale_response(sale: &Sale) -> Result<Response, Problem> {
    let mut response = private_json(&AdminSale::of(sale))?;
    if let Ok(etag) = HeaderValue::try_from(format!("\"{}\"", sale.version)) {
        response.headers_mut().insert(ETAG, etag);
    }
    Ok(response)
}

/// The snapshot's sales: archived ones are not among them, and figures may be 100 ms old.
pub(super) async fn list_sales(state: Arc<AdminState>, call: Call) -> Result<Response, Problem> {
    state.operator(&call)?;
    let view = state.inventory.sales();
    let sales: Vec<_> = view.iter().map(|sale| AdminSale::of(sale.sale())).collect();
    private_json(&json!({ "sales": sales, "as_of": view.as_of(), "age_ms": view.age_ms() }))
}

pub(super) async fn get_sale(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    if let Some(answer) = state.elsewhere(&mut call, &actor).await? {
        return Ok(answer);
    }
    sale_response(&state.sale(&call.sale_id(3)?).await?)
}

pub(super) async fn create_sales(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    let media = call.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media = media.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if matches!(&*media, "application/x-ndjson" | "application/ndjson" | "application/jsonl") {
        let body = call.bytes(MAX_BULK_BYTES).await?;
        return create_many(&state, &actor, &body).await;
    }
    if let Some(answer) = state.elsewhere(&mut call, &actor).await? {
        return Ok(answer);
    }
    let body = call.bytes(MAX_BODY_BYTES).await?;
    let (spec, new) = create_one(&state, &actor, &body).await.map_err(|(_, problem)| problem)?;
    let sale = state.sale(&spec.sale_id).await?;
    let mut response = sale_response(&sale)?;
    *response.status_mut() = if new { StatusCode::CREATED } else { StatusCode::OK };
    if let Ok(location) = HeaderValue::try_from(format!("/admin/v1/sales/{}", spec.sale_id)) {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}

async fn create_one(
    state: &AdminState,
    actor: &Actor,
    body: &[u8],
) -> Result<(SaleSpec, bool), (Option<SaleId>, Problem)> {
    let spec: SaleSpec =
        serde_json::from_slice(body).map_err(|error| (None, Problem::bad_request(error.to_string())))?;
    if let Some(master) = state.relay.other_master() {
        return match create_elsewhere(state, &master, actor, body).await {
            Ok(new) => Ok((spec, new)),
            Err(problem) => Err((Some(spec.sale_id), problem)),
        };
    }
    match state.inventory.create_sale(spec.clone(), state.default_currency).await {
        Ok(created) => {
            if created.new {
                tracing::info!(sale_id = %spec.sale_id, quantity = spec.quantity, %actor, "a sale was created");
            }
            Ok((spec, created.new))
        }
        Err(error) => Err((Some(spec.sale_id), error.into())),
    }
}

/// Has the master center create a sale; whether it is new there.
async fn create_elsewhere(
    state: &AdminState,
    master: &CenterId,
    actor: &Actor,
    body: &[u8],
) -> Result<bool, Problem> {
    let call = RelayCall {
        vouched: Vouched::Admin(actor.to_string()),
        method: "POST".to_owned(),
        path: "/admin/v1/sales".to_owned(),
        headers: vec![("content-type".to_owned(), "application/json".to_owned())],
        body: String::from_utf8_lossy(body).into_owned(),
    };
    let answer = state.relay.ask(master, false, call).await?;
    match answer.status {
        200 => Ok(false),
        201 => Ok(true),
        _ => Err(Problem::relayed(&answer.body)),
    }
}

/// One result for each line that is not blank, in the order of the lines. Lines that fail do not hold back others.
async fn create_many(state: &AdminState, actor: &Actor, body: &Bytes) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct LineResult<'a> {
        line: usize,
        sale_id: Option<&'a SaleId>,
        status: u16,
        #[serde(skip_serializing_if = "Option::is_none")]
        code: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        detail: Option<&'a str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        retryable: Option<bool>,
    }
    let lines: Vec<(usize, Bytes)> = body
        .split(|byte| *byte == b'\n')
        .enumerate()
        .map(|(index, line)| (index + 1, body.slice_ref(line.trim_ascii())))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    if lines.len() > MAX_BULK_LINES {
        let detail = format!("At most {MAX_BULK_LINES} sales at once");
        return Err(Problem::with_detail(Code::PayloadTooLarge, detail));
    }
    state.inventory.settled().await?;
    let results = futures_util::stream::iter(lines).map(|(number, line)| async move {
        if line.len() > MAX_BODY_BYTES {
            let detail = format!("A line has at most {MAX_BODY_BYTES} bytes");
            return (number, Err((None, Problem::with_detail(Code::PayloadTooLarge, detail))));
        }
        (number, create_one(state, actor, &line).await)
    });
    let mut results = results.buffered(BULK_CONCURRENCY);
    let mut answer = Vec::new();
    while let Some((line, result)) = results.next().await {
        let written = match &result {
            Ok((spec, new)) => {
                let status = if *new { StatusCode::CREATED } else { StatusCode::OK }.as_u16();
                let sale_id = Some(&spec.sale_id);
                let line = LineResult { line, sale_id, status, code: None, detail: None, retryable: None };
                serde_json::to_writer(&mut answer, &line)
            }
            Err((sale_id, problem)) => {
                let line = LineResult {
                    line,
                    sale_id: sale_id.as_ref(),
                    status: problem.status().as_u16(),
                    code: Some(problem.code().as_str()),
                    detail: Some(problem.detail()),
                    retryable: Some(problem.code().retryable()),
                };
                serde_json::to_writer(&mut answer, &line)
            }
        };
        written.map_err(Problem::internal)?;
        answer.push(b'\n');
    }
    let mut response = Response::new(answer.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    Ok(response)
}

pub(super) async fn update_sale(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    if let Some(answer) = state.elsewhere(&mut call, &actor).await? {
        return Ok(answer);
    }
    let id = call.sale_id(3)?;
    let based_on = if_match(call.headers())?;
    let patch: SalePatch = call.json().await?;
    let changed = state.inventory.update_sale(&id, based_on, patch).await?;
    tracing::info!(sale_id = %id, version = changed.version, %actor, "a sale was changed");
    sale_response(&state.sale(&id).await?)
}

/// The sale's version in `If-Match`: `"3"`, or 3.
fn if_match(headers: &HeaderMap) -> Result<u64, Problem> {
    let value = headers.get(IF_MATCH).ok_or_else(|| Problem::new(Code::PreconditionRequired))?;
    let text = value.to_str().unwrap_or_default().trim();
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    text.parse().map_err(|_| Problem::bad_request("If-Match must be the sale's version, such as \"3\""))
}

pub(super) async fn add_stock(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct StockBody {
        delta: i64,
    }
    let actor = state.operator(&call)?;
    if let Some(answer) = state.elsewhere(&mut call, &actor).await? {
        return Ok(answer);
    }
    let id = call.sale_id(3)?;
    let key = call.idempotency_key()?;
    let StockBody { delta } = call.json().await?;
    if delta == 0 {
        return Err(Problem::bad_request("delta must not be 0"));
    }
    let stock = state.inventory.add_stock(&id, delta, key.digest()).await?;
    if !stock.replayed {
        tracing::info!(sale_id = %id, delta, total = stock.total, %actor, "a sale's stock was changed");
    }
    let mut response = private_json(&json!({
        "sale_id": id, "total": stock.total, "remaining": stock.remaining, "version": stock.version,
    }))?;
    if stock.replayed {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

pub(super) async fn set_state(
    state: Arc<AdminState>,
    mut call: Call,
    change: StateChange,
) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    if let Some(answer) = state.elsewhere(&mut call, &actor).await? {
        return Ok(answer);
    }
    let id = call.sale_id(3)?;
    call.no_fields().await?;
    let changed = state.inventory.set_state(&id, change).await?;
    if changed.changed {
        tracing::info!(sale_id = %id, ?change, %actor, "a sale's state was changed");
    }
    sale_response(&state.sale(&id).await?)
}

pub(super) async fn archive_sale(state: Arc<AdminState>, mut call: Call) -> Result<Response, Problem> {
    let actor = state.operator(&call)?;
    if let Some(answer) = state.elsewhere(&mut call, &actor).await? {
        return Ok(answer);
    }
    let id = call.sale_id(3)?;
    call.no_fields().await?;
    let archived = archive(&state.inventory, &state.centers, &id).await?;
    tracing::info!(sale_id = %id, version = archived.version, %actor, "a sale was archived");
    sale_response(&state.sale(&id).await?)
}
