//! Requests that reached the wrong center: whoever is asked verifies the caller and passes the request on to the
//! center that has the answer, over the cross-center API. There the same handlers answer it, so an answer is the
//! same wherever it was asked for.
//!
//! A request is passed on once. Where two centers disagree on who should answer it, it is refused instead.

use std::time::Duration;

use axum::response::Response;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderName, IF_MATCH, LOCATION, RETRY_AFTER};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use seckill_domain::{CenterId, Table, Uid};
use seckill_ledger::Executed;
use serde::{Deserialize, Serialize};

use super::call::{Call, MAX_BODY_BYTES};
use super::problem::{Code, Problem};
use crate::admission::Actor;
use crate::cross_center::{CallError, CrossCenter};

/// The path of the call that passes requests on.
pub(super) const RELAY: &str = "/internal/v1/relay";
/// The audit of all sales; that of one ends with `/audit`, too.
const AUDIT: &str = "/admin/v1/audit";
/// Shifts are started by the center that takes.
const SHIFTS: &str = "/admin/v1/shifts";
/// Which center answered.
pub(super) const SECKILL_HOME: HeaderName = HeaderName::from_static("seckill-home");
/// How long an answer may take: a change of an order waits up to 3 s for it to be stored.
const TIMEOUT: Duration = Duration::from_secs(6);
/// How long the checks before a shift may take: each server that is gone is waited for.
const SHIFT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the course of a shift may take to be told. Whoever does not hear it says what the topology says.
const SHIFT_READ_TIMEOUT: Duration = Duration::from_secs(1);
/// How long an audit may take: a million orders take some ten seconds.
const AUDIT_TIMEOUT: Duration = Duration::from_secs(600);
/// Fields of a request that handlers look at.
const REQUEST_FIELDS: [HeaderName; 4] = [
    CONTENT_TYPE,
    IF_MATCH,
    HeaderName::from_static("idempotency-key"),
    HeaderName::from_static("x-request-id"),
];
/// Fields of an answer that clients look at.
const ANSWER_FIELDS: [HeaderName; 7] = [
    CONTENT_TYPE,
    CACHE_CONTROL,
    ETAG,
    LOCATION,
    RETRY_AFTER,
    HeaderName::from_static("idempotent-replayed"),
    HeaderName::from_static("x-request-id"),
];

/// Who sent a request, as the center that it reached has verified. Only the internal listener puts it into a
/// request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Vouched {
    /// A shopper.
    User(Uid),
    /// The shop's backend.
    Payments,
    /// An operator, by name.
    Admin(String),
}

impl Vouched {
    pub(super) fn actor(&self) -> Option<Actor> {
        match self {
            Vouched::Admin(name) => Some(Actor(name.as_str().into())),
            Vouched::User(_) | Vouched::Payments => None,
        }
    }

    /// Whether requests of this kind are passed on at all.
    pub(super) fn may_ask(&self, method: &Method, path: &str) -> bool {
        let below = |prefix: &str| path.strip_prefix(prefix);
        match self {
            Vouched::User(_) => match (method, path) {
                (&Method::GET, "/v1/orders" | "/v1/coupons") => true,
                (&Method::GET, _) => below("/v1/orders/").is_some_and(|rest| !rest.contains('/')),
                (&Method::POST, _) => below("/v1/orders/")
                    .is_some_and(|rest| rest.ends_with("/cancel") || rest.ends_with("/ticket")),
                _ => false,
            },
            Vouched::Payments => {
                *method == Method::POST && below("/v1/orders/").is_some_and(|rest| rest.ends_with("/pay"))
            }
            Vouched::Admin(_) => {
                path == "/admin/v1/sales"
                    || below("/admin/v1/sales/").is_some()
                    || (*method == Method::GET && (path == AUDIT || below("/admin/v1/orders/").is_some()))
                    || (*method == Method::POST && path == SHIFTS)
                    || below("/admin/v1/shifts/").is_some()
            }
        }
    }
}

/// A request on its way to another center.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RelayCall {
    pub(super) vouched: Vouched,
    pub(super) method: String,
    /// Path and query.
    pub(super) path: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: String,
}

/// Its answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RelayAnswer {
    pub(super) status: u16,
    headers: Vec<(String, String)>,
    pub(super) body: String,
}

impl RelayAnswer {
    pub(super) fn new(status: StatusCode, headers: &HeaderMap, body: String) -> RelayAnswer {
        RelayAnswer { status: status.as_u16(), headers: fields(headers, &ANSWER_FIELDS), body }
    }
}

fn fields(headers: &HeaderMap, names: &[HeaderName]) -> Vec<(String, String)> {
    names
        .iter()
        .filter_map(|name| Some((name.as_str().to_owned(), headers.get(name)?.to_str().ok()?.to_owned())))
        .collect()
}

/// The way to the center that has the answer. Empty where there is one center.
#[derive(Debug, Clone, Default)]
pub struct Relay(Option<CrossCenter>);

impl Relay {
    /// Passes on what other centers have to answer.
    pub fn new(cross: Option<CrossCenter>) -> Relay {
        Relay(cross)
    }

    /// The other center that has this table's orders, if it is another one.
    pub(super) fn other_home(&self, table: Table) -> Option<CenterId> {
        self.0.as_ref()?.other_home(table)
    }

    /// The other center that is the master, if it is another one.
    pub(super) fn other_master(&self) -> Option<CenterId> {
        self.0.as_ref()?.other_master()
    }

    /// A center, if it is another one than this and the topology knows it.
    pub(super) fn other_center(&self, id: &CenterId) -> Option<CenterId> {
        self.0.as_ref()?.other_center(id)
    }

    /// Has another center answer the request.
    pub(super) async fn forward(
        &self,
        to: &CenterId,
        call: &mut Call,
        vouched: Vouched,
    ) -> Result<Response, Problem> {
        let body = call.bytes(MAX_BODY_BYTES).await?;
        let body =
            String::from_utf8(body.into()).map_err(|_| Problem::bad_request("The body is not UTF-8"))?;
        let path = call.parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let passed_on = RelayCall {
            vouched,
            method: call.parts.method.to_string(),
            path,
            headers: fields(call.headers(), &REQUEST_FIELDS),
            body,
        };
        let RelayAnswer { status, headers, body } = self.ask(to, call.vouched().is_some(), passed_on).await?;
        let mut response = Response::new(body.into());
        *response.status_mut() = StatusCode::from_u16(status).map_err(Problem::internal)?;
        for (name, value) in headers {
            if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
                response.headers_mut().insert(name, value);
            }
        }
        if let Ok(home) = HeaderValue::try_from(to.as_str()) {
            response.headers_mut().insert(SECKILL_HOME, home);
        }
        Ok(response)
    }

    /// Makes the call. `again` says that the request was passed on before.
    pub(super) async fn ask(
        &self,
        to: &CenterId,
        again: bool,
        call: RelayCall,
    ) -> Result<RelayAnswer, Problem> {
        let shift = call.path.starts_with(SHIFTS);
        let code = match call.vouched {
            Vouched::User(_) | Vouched::Payments => Code::OrdersUnavailable,
            Vouched::Admin(_) if shift => Code::CenterUnreachable,
            Vouched::Admin(_) => Code::MasterUnreachable,
        };
        let Some(cross) = self.0.as_ref().filter(|_| !again) else {
            return Err(Problem::with_detail(code, "The centers do not agree on who answers this")
                .executed(Executed::No));
        };
        let timeout = match call.path.ends_with("/audit") {
            true => AUDIT_TIMEOUT,
            false if shift && call.method == "GET" => SHIFT_READ_TIMEOUT,
            false if shift && !call.path.ends_with("/abort") => SHIFT_TIMEOUT,
            false => TIMEOUT,
        };
        cross.call(to, RELAY, &call, timeout).await.map_err(|error: CallError| {
            tracing::warn!(center = %to, %error, "a request could not be passed on");
            match (shift, &error) {
                (false, _) => Problem::new(code),
                (true, CallError::NotExecuted(why)) => Problem::with_detail(
                    code,
                    format!("Nothing was changed: center {to} has to act and does not take the call ({why}). Start its service, or ask its own admin listener"),
                ),
                (true, CallError::Unknown(why)) => Problem::with_detail(
                    code,
                    format!("Center {to} has to act and did not answer ({why}). The same call with the same key is safe"),
                ),
            }
            .executed(error.executed())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_caller_has_its_own_requests_passed_on() {
        let user = Vouched::User(Uid::new("u").unwrap());
        let admin = Vouched::Admin("x".into());
        let id = "1000000010000000001";
        for (vouched, method, path, expected) in [
            (&user, Method::GET, "/v1/orders".to_owned(), true),
            (&user, Method::GET, "/v1/coupons".to_owned(), true),
            (&user, Method::GET, format!("/v1/orders/{id}"), true),
            (&user, Method::GET, format!("/v1/orders/{id}/events"), false),
            (&user, Method::POST, format!("/v1/orders/{id}/cancel"), true),
            (&user, Method::POST, format!("/v1/orders/{id}/ticket"), true),
            (&user, Method::POST, format!("/v1/orders/{id}/pay"), false),
            (&user, Method::POST, "/v1/sales/s/purchases".to_owned(), false),
            (&user, Method::GET, "/admin/v1/sales".to_owned(), false),
            (&Vouched::Payments, Method::POST, format!("/v1/orders/{id}/pay"), true),
            (&Vouched::Payments, Method::POST, format!("/v1/orders/{id}/cancel"), false),
            (&admin, Method::POST, "/admin/v1/sales".to_owned(), true),
            (&admin, Method::PATCH, "/admin/v1/sales/s".to_owned(), true),
            (&admin, Method::POST, "/admin/v1/sales/s/stock".to_owned(), true),
            (&admin, Method::GET, "/admin/v1/sales/s/audit".to_owned(), true),
            (&admin, Method::GET, "/admin/v1/audit".to_owned(), true),
            (&user, Method::GET, "/admin/v1/audit".to_owned(), false),
            (&admin, Method::POST, "/admin/v1/shifts".to_owned(), true),
            (&admin, Method::GET, "/admin/v1/shifts".to_owned(), false),
            (&admin, Method::GET, "/admin/v1/shifts/shift-2".to_owned(), true),
            (&admin, Method::POST, "/admin/v1/shifts/shift-2/abort".to_owned(), true),
            (&user, Method::POST, "/admin/v1/shifts".to_owned(), false),
            (&Vouched::Payments, Method::POST, "/admin/v1/shifts".to_owned(), false),
            (&admin, Method::POST, "/admin/v1/ledger/adopt".to_owned(), false),
            (&admin, Method::PUT, "/admin/v1/limits".to_owned(), false),
        ] {
            assert_eq!(vouched.may_ask(&method, &path), expected, "{vouched:?} {method} {path}");
        }
    }
}
