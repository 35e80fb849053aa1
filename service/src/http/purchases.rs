//! `POST /v1/sales/{id}/purchases`: the call that everybody makes in the same second.

use std::sync::Arc;

use axum::response::Response;
use http::header::{HeaderName, LOCATION};
use http::{HeaderMap, HeaderValue, StatusCode};
use seckill_domain::{Quantity, SaleId, Uid};
use serde::Deserialize;

use super::Public;
use super::call::{Call, json_response};
use super::problem::{Code, Problem};
use crate::inventory::{Accepted, Purchase};
use crate::telemetry::{Metrics, PurchaseOutcome};

/// When a client should look for its order the first time: what the way to the order table takes as a rule.
const POLL_AFTER_MS: u32 = 100;
pub(super) const IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const ACCEPTED: usize = 0;
const REPLAYED: usize = 1;
const FIRST_CODE: usize = 2;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PurchaseBody {
    quantity: Quantity,
}

pub(super) fn name_outcomes(metrics: &Metrics) {
    let codes = Code::ALL.iter().map(|code| (FIRST_CODE + *code as usize, code.as_str()));
    metrics.name_purchase_outcomes([(ACCEPTED, "accepted"), (REPLAYED, "replayed")].into_iter().chain(codes));
}

/// Checks in this order: who asks, how often, what for; then the inventory decides.
pub(super) async fn purchase(public: Arc<Public>, mut call: Call) -> Result<Response, Problem> {
    let outcome = decide(&public, &mut call).await;
    let index = match &outcome {
        Ok((accepted, _, _)) if accepted.replayed => REPLAYED,
        Ok(_) => ACCEPTED,
        Err(problem) => FIRST_CODE + problem.code() as usize,
    };
    public.state.metrics.purchase(PurchaseOutcome { index });
    let (accepted, sale_id, quantity) = outcome?;
    Ok(answer(&accepted, &sale_id, quantity))
}

async fn decide(public: &Public, call: &mut Call) -> Result<(Accepted, SaleId, Quantity), Problem> {
    let state = &public.state;
    let uid: Uid = state.tokens.user(call.bearer()?)?;
    let sale_id = call.sale_id(2)?;
    let address = call.peer().map(|peer| state.addresses.of(peer, call.headers()));
    state.limiter.purchase(&uid, address, &sale_id)?;
    let key = *call.idempotency_key()?.digest();
    let traceparent = traceparent(call.headers());
    let PurchaseBody { quantity } = call.json().await?;
    let purchase = Purchase { uid, sale_id: sale_id.clone(), key, quantity, traceparent };
    let accepted = state.inventory.purchase(purchase).await?;
    Ok((accepted, sale_id, quantity))
}

fn answer(accepted: &Accepted, sale_id: &SaleId, quantity: Quantity) -> Response {
    // No member needs escaping: digits, and slugs of [a-z0-9-].
    let Accepted { order_id, replayed, home_center } = accepted;
    let body = format!(
        r#"{{"order_id":"{order_id}","sale_id":"{sale_id}","quantity":{quantity},"status":"queued","home_center":"{home_center}","poll_after_ms":{POLL_AFTER_MS}}}"#
    );
    let mut response = json_response(body);
    *response.status_mut() = StatusCode::ACCEPTED;
    let headers = response.headers_mut();
    if let Ok(location) = HeaderValue::try_from(format!("/v1/orders/{order_id}")) {
        headers.insert(LOCATION, location);
    }
    if *replayed {
        headers.insert(IDEMPOTENT_REPLAYED, HeaderValue::from_static("true"));
    }
    response
}

/// The W3C trace context, if it is one: `00-` 32 hex digits `-` 16 hex digits `-` 2 hex digits, neither id all
/// zeros. What is none is ignored, as the recommendation asks.
fn traceparent(headers: &HeaderMap) -> Option<Box<str>> {
    let text = headers.get(TRACEPARENT)?.to_str().ok()?;
    let bytes = text.as_bytes();
    let hex = |range: std::ops::Range<usize>| {
        bytes[range].iter().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte))
    };
    let zero = |range: std::ops::Range<usize>| bytes[range].iter().all(|byte| *byte == b'0');
    let valid = bytes.len() == 55
        && bytes.starts_with(b"00-")
        && (bytes[35], bytes[52]) == (b'-', b'-')
        && hex(3..35)
        && hex(36..52)
        && hex(53..55)
        && !zero(3..35)
        && !zero(36..52);
    valid.then(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_valid_trace_context_goes_on() {
        let parsed = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(TRACEPARENT, HeaderValue::try_from(text).unwrap());
            traceparent(&headers)
        };
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(parsed(good).as_deref(), Some(good));
        for bad in [
            "",
            &good[1..],
            &good.to_uppercase(),
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-zz",
            "00-0af7651916cd43dd8448eb211c80319c_b7ad6b7169203331-01",
        ] {
            assert_eq!(parsed(bad), None, "{bad}");
        }
    }

    #[test]
    fn each_problem_has_its_place_among_the_outcomes() {
        let last = Code::ALL.iter().map(|code| FIRST_CODE + *code as usize).max().unwrap();
        assert!(last < 48, "an outcome would not be counted");
    }
}
