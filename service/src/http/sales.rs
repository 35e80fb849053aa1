//! `GET /v1/sales[/{id}]`: ready-made bytes from the snapshot in this process.

use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, ETAG, IF_NONE_MATCH};
use http::{HeaderMap, HeaderValue, StatusCode};

use super::Public;
use super::call::{Call, json_response};
use super::problem::{Code, Problem};

const PUBLIC_ONE_SECOND: HeaderValue = HeaderValue::from_static("public, max-age=1");

pub(super) async fn list(public: Arc<Public>, call: Call) -> Result<Response, Problem> {
    let view = public.state.inventory.sales();
    // The list changes with every picture of the ledger, and its age with every snapshot.
    Ok(cacheable(call.headers(), view.list_etag(), || view.list()))
}

pub(super) async fn get(public: Arc<Public>, call: Call) -> Result<Response, Problem> {
    let id = call.sale_id(2)?;
    let view = public.state.inventory.sales();
    let sale = view.get(&id).ok_or_else(|| Problem::new(Code::SaleNotFound))?;
    Ok(cacheable(call.headers(), sale.etag(), || sale.body()))
}

fn cacheable(headers: &HeaderMap, etag: &HeaderValue, body: impl FnOnce() -> Bytes) -> Response {
    let mut response = if matches(headers, etag) {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response
    } else {
        json_response(body())
    };
    let answer = response.headers_mut();
    answer.insert(CACHE_CONTROL, PUBLIC_ONE_SECOND);
    answer.insert(ETAG, etag.clone());
    response
}

/// Whether `If-None-Match` names the tag, by weak comparison (RFC 9110 §13.1.2).
fn matches(headers: &HeaderMap, etag: &HeaderValue) -> bool {
    fn opaque(tag: &str) -> &str {
        tag.strip_prefix("W/").unwrap_or(tag)
    }
    let Ok(etag) = etag.to_str() else { return false };
    headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.split(',').map(str::trim).any(|tag| tag == "*" || opaque(tag) == opaque(etag)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_compared_weakly() {
        let etag = HeaderValue::from_static("W/\"3-4-1\"");
        let asked = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(IF_NONE_MATCH, HeaderValue::from_static(text));
            matches(&headers, &etag)
        };
        assert!(asked("W/\"3-4-1\"") && asked("\"3-4-1\"") && asked("\"x\", W/\"3-4-1\"") && asked("*"));
        assert!(!asked("\"3-4-2\"") && !asked("") && !asked("3-4-1"));
        assert!(!matches(&HeaderMap::new(), &etag));
    }
}
