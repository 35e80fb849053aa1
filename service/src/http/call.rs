//! One request on its way through a handler, and how handlers become routes.
//!
//! Every handler has the form `async fn(Arc<State>, Call) -> Result<Response, Problem>`: there is one place where
//! an answer leaves, and it turns problems into responses, measures and logs. No extractor of the framework can
//! refuse a request in words of its own.

use std::borrow::Cow;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::{MethodFilter, MethodRouter, on};
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH, HeaderName};
use http::request::Parts;
use http::{HeaderMap, HeaderValue};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use seckill_domain::{IdempotencyKey, OrderId, SaleId};
use serde::de::DeserializeOwned;

use super::problem::{Code, Problem};
use super::relay::Vouched;
use crate::telemetry::{Metrics, StatusClass};

/// The largest body of a call.
pub(super) const MAX_BODY_BYTES: usize = 16 * 1024;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Where a connection comes from; the server puts it into each request's extensions.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub SocketAddr);

/// A request.
pub(super) struct Call {
    pub(super) parts: Parts,
    body: Body,
}

impl Call {
    pub(super) fn headers(&self) -> &HeaderMap {
        &self.parts.headers
    }

    /// The peer's address; none in tests without a connection.
    pub(super) fn peer(&self) -> Option<IpAddr> {
        self.parts.extensions.get::<Peer>().map(|peer| peer.0.ip())
    }

    /// Who sent it, where another center has verified that.
    pub(super) fn vouched(&self) -> Option<&Vouched> {
        self.parts.extensions.get()
    }

    /// The token of `Authorization: Bearer …`.
    pub(super) fn bearer(&self) -> Result<&str, Problem> {
        let unauthenticated = || Problem::new(Code::Unauthenticated);
        let value = self.parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let (scheme, token) = value.and_then(|value| value.split_once(' ')).ok_or_else(unauthenticated)?;
        if scheme.eq_ignore_ascii_case("bearer") { Ok(token.trim()) } else { Err(unauthenticated()) }
    }

    /// The path's segment at an index: of `/v1/sales/x`, 0 is `v1` and 2 is `x`.
    fn segment(&self, index: usize) -> Option<Cow<'_, str>> {
        let raw = self.parts.uri.path().split('/').nth(index + 1)?;
        percent_decoded(raw)
    }

    /// The sale that the path names. What is no sale id is held by nobody.
    pub(super) fn sale_id(&self, index: usize) -> Result<SaleId, Problem> {
        let segment = self.segment(index);
        segment.and_then(|text| SaleId::new(&text).ok()).ok_or_else(|| Problem::new(Code::SaleNotFound))
    }

    /// The order that the path names. What is no order id is held by nobody.
    pub(super) fn order_id(&self, index: usize) -> Result<OrderId, Problem> {
        let segment = self.segment(index);
        segment.and_then(|text| text.parse().ok()).ok_or_else(|| Problem::new(Code::OrderNotFound))
    }

    /// The shift that the path names. What is no text is the name of none.
    pub(super) fn shift_id(&self, index: usize) -> Result<Cow<'_, str>, Problem> {
        self.segment(index).ok_or_else(|| Problem::new(Code::ShiftNotFound))
    }

    /// The `Idempotency-Key` header, where it may be absent: its digest in hexadecimal digits.
    pub(super) fn idempotency_key_if_any(&self) -> Result<Option<String>, Problem> {
        if !self.parts.headers.contains_key(&IDEMPOTENCY_KEY) {
            return Ok(None);
        }
        let digest = u128::from_be_bytes(*self.idempotency_key()?.digest());
        Ok(Some(format!("{digest:032x}")))
    }

    /// The `Idempotency-Key` header.
    pub(super) fn idempotency_key(&self) -> Result<IdempotencyKey, Problem> {
        let mut values = self.parts.headers.get_all(IDEMPOTENCY_KEY).iter();
        let value = values.next().ok_or_else(|| Problem::new(Code::IdempotencyKeyMissing))?;
        let key = value.to_str().ok().and_then(|text| IdempotencyKey::new(text).ok());
        match (key, values.next()) {
            (Some(key), None) => Ok(key),
            _ => Err(Problem::bad_request("Idempotency-Key must be 1 to 64 visible ASCII characters")),
        }
    }

    /// The query's parameters as a struct; unknown ones are ignored.
    pub(super) fn query<T: DeserializeOwned>(&self) -> Result<T, Problem> {
        axum::extract::Query::try_from_uri(&self.parts.uri)
            .map(|axum::extract::Query(query)| query)
            .map_err(|_| Problem::bad_request("The query's parameters are not valid"))
    }

    /// The body as JSON.
    pub(super) async fn json<T: DeserializeOwned>(&mut self) -> Result<T, Problem> {
        let bytes = self.bytes(MAX_BODY_BYTES).await?;
        serde_json::from_slice(&bytes).map_err(|error| Problem::bad_request(error.to_string()))
    }

    /// The body as JSON, which stays in its place: the call may still be passed on.
    pub(super) async fn peek<T: DeserializeOwned>(&mut self) -> Result<T, Problem> {
        let bytes = self.bytes(MAX_BODY_BYTES).await?;
        self.body = Body::from(bytes.clone());
        serde_json::from_slice(&bytes).map_err(|error| Problem::bad_request(error.to_string()))
    }

    /// Refuses a body that is neither empty nor `{}`.
    pub(super) async fn no_fields(&mut self) -> Result<(), Problem> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Nothing {}
        let bytes = self.bytes(MAX_BODY_BYTES).await?;
        if bytes.is_empty() {
            return Ok(());
        }
        serde_json::from_slice::<Nothing>(&bytes)
            .map(|_| ())
            .map_err(|error| Problem::bad_request(error.to_string()))
    }

    /// The whole body, at most `limit` bytes of it.
    pub(super) async fn bytes(&mut self, limit: usize) -> Result<Bytes, Problem> {
        let announced = self.parts.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        if announced.and_then(|value| value.parse::<u64>().ok()).is_some_and(|bytes| bytes > limit as u64) {
            return Err(too_large(limit));
        }
        let body = std::mem::replace(&mut self.body, Body::empty());
        match Limited::new(body, limit).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) if error.is::<LengthLimitError>() => Err(too_large(limit)),
            Err(_) => Err(Problem::bad_request("The body ended before it was complete")),
        }
    }
}

fn too_large(limit: usize) -> Problem {
    Problem::with_detail(Code::PayloadTooLarge, format!("A body has at most {limit} bytes"))
}

/// Resolves `%41`; none if what is there is not UTF-8 or not hexadecimal.
fn percent_decoded(raw: &str) -> Option<Cow<'_, str>> {
    if !raw.contains('%') {
        return Some(Cow::Borrowed(raw));
    }
    let mut bytes = Vec::with_capacity(raw.len());
    let mut rest = raw.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || char::from(rest.next()?).to_digit(16);
        bytes.push((digit()? * 16 + digit()?) as u8);
    }
    String::from_utf8(bytes).ok().map(Cow::Owned)
}

/// What all states of the listeners have.
pub(super) trait Measured: Send + Sync + 'static {
    fn metrics(&self) -> &Arc<Metrics>;
}

/// Collects a listener's routes, so that each is measured under its own name and the description can be compared
/// with what is really served.
pub(super) struct Routes<S> {
    router: Router<Arc<S>>,
    metrics: Arc<Metrics>,
    next: usize,
    described: Vec<(&'static str, &'static str)>,
}

impl<S: Measured> Routes<S> {
    /// Routes whose numbers in the metrics begin at `first`.
    pub(super) fn new(metrics: &Arc<Metrics>, first: usize) -> Routes<S> {
        Routes { router: Router::new(), metrics: Arc::clone(metrics), next: first, described: Vec::new() }
    }

    pub(super) fn get<H, F>(self, path: &'static str, handler: H) -> Self
    where
        H: Fn(Arc<S>, Call) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Response, Problem>> + Send + 'static,
    {
        self.add("GET", MethodFilter::GET, path, handler)
    }

    pub(super) fn post<H, F>(self, path: &'static str, handler: H) -> Self
    where
        H: Fn(Arc<S>, Call) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Response, Problem>> + Send + 'static,
    {
        self.add("POST", MethodFilter::POST, path, handler)
    }

    pub(super) fn add<H, F>(
        mut self,
        name: &'static str,
        method: MethodFilter,
        path: &'static str,
        handler: H,
    ) -> Self
    where
        H: Fn(Arc<S>, Call) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Response, Problem>> + Send + 'static,
    {
        self.metrics.name_route(self.next, &format!("{name} {path}"));
        self.described.push((name, path));
        self.router = self.router.route(path, endpoint(self.next, path, method, handler));
        self.next += 1;
        self
    }

    /// The router, with typed answers for what matches no route; and the routes it has.
    pub(super) fn build(self, state: Arc<S>) -> (Router, Vec<(&'static str, &'static str)>) {
        let refuse = |code: Code| {
            move |headers: HeaderMap| async move { Problem::new(code).respond(headers.get(X_REQUEST_ID), "none") }
        };
        let router = self
            .router
            .method_not_allowed_fallback(refuse(Code::MethodNotAllowed))
            .fallback(refuse(Code::NotFound))
            .with_state(state);
        (router, self.described)
    }
}

fn endpoint<S, H, F>(
    number: usize,
    path: &'static str,
    method: MethodFilter,
    handler: H,
) -> MethodRouter<Arc<S>>
where
    S: Measured,
    H: Fn(Arc<S>, Call) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Response, Problem>> + Send + 'static,
{
    on(method, move |State(state): State<Arc<S>>, request: Request| {
        let timer = state.metrics().request(number);
        let (parts, body) = request.into_parts();
        // Wanted only if something goes wrong; a clone of a header's value copies nothing.
        let request_id: Option<HeaderValue> = parts.headers.get(X_REQUEST_ID).cloned();
        let answer = handler(state, Call { parts, body });
        async move {
            let response = match answer.await {
                Ok(response) => response,
                Err(problem) => problem.respond(request_id.as_ref(), path),
            };
            timer.done(StatusClass::of(response.status().as_u16()));
            response
        }
    })
}

/// An answer with a JSON body.
pub(super) fn json_response(body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// An answer with a value as JSON, for one reader only.
pub(super) fn private_json(value: &impl serde::Serialize) -> Result<Response, Problem> {
    let bytes = serde_json::to_vec(value).map_err(Problem::internal)?;
    let mut response = json_response(bytes);
    let no_store = HeaderValue::from_static("private, no-store");
    response.headers_mut().insert(http::header::CACHE_CONTROL, no_store);
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encoding_is_resolved_once_and_strictly() {
        assert_eq!(percent_decoded("abc").unwrap(), "abc");
        assert_eq!(percent_decoded("%61%2e%2E").unwrap(), "a..");
        assert_eq!(percent_decoded("%2561").unwrap(), "%61");
        for bad in ["%", "%6", "%zz", "%ff", "a%"] {
            assert_eq!(percent_decoded(bad), None, "{bad}");
        }
    }
}
