//! Refusals and failures on the wire: RFC 9457 problem details. The only place that knows status codes of errors;
//! [`errors`] says which code each module's error is.

mod errors;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::body::Body;
use axum::response::Response;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use seckill_ledger::Executed;

use crate::admission::Limited;
use crate::cross_center;

const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");
const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// The longest request id of a client that is taken over.
const MAX_REQUEST_ID_BYTES: usize = 64;

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $status:literal, $title:literal;)*) => {
        /// The stable code of a problem, `code` in its body.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Code { $($(#[$doc])* $variant,)* }

        impl Code {
            /// All codes.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The code as clients see it.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $name,)* }
            }

            /// The status that goes with it.
            pub fn status(self) -> StatusCode {
                const fn checked(status: u16) -> StatusCode {
                    match StatusCode::from_u16(status) { Ok(status) => status, Err(_) => panic!("a status code") }
                }
                match self { $(Code::$variant => const { checked($status) },)* }
            }

            /// What it means, in a few words.
            pub fn title(self) -> &'static str {
                match self { $(Code::$variant => $title,)* }
            }
        }
    };
}

codes! {
    /// The request cannot be understood.
    BadRequest = "bad_request", 400, "The request is not valid";
    /// A call that changes something came without its key.
    IdempotencyKeyMissing = "idempotency_key_missing", 400, "The Idempotency-Key header is missing";
    /// No valid token.
    Unauthenticated = "unauthenticated", 401, "A valid bearer token is required";
    /// A valid token, but not for this.
    Forbidden = "forbidden", 403, "Not allowed";
    /// No such path.
    NotFound = "not_found", 404, "There is nothing here";
    /// No such sale.
    SaleNotFound = "sale_not_found", 404, "There is no such sale";
    /// No such order, or somebody else's.
    OrderNotFound = "order_not_found", 404, "There is no such order";
    /// No such shift, or one that is no longer remembered.
    ShiftNotFound = "shift_not_found", 404, "There is no such shift";
    /// The path has other methods.
    MethodNotAllowed = "method_not_allowed", 405, "The method is not allowed here";
    /// Nothing is left.
    SoldOut = "sold_out", 409, "The sale is sold out";
    /// Less is left than asked.
    InsufficientStock = "insufficient_stock", 409, "Less is left than asked for";
    /// The user would hold too much.
    LimitExceeded = "limit_exceeded", 409, "The limit per user is reached";
    /// Too early.
    NotStarted = "not_started", 409, "The sale has not started";
    /// Too late.
    Ended = "ended", 409, "The sale has ended";
    /// Halted.
    Paused = "paused", 409, "The sale is paused";
    /// The order is final.
    OrderClosed = "order_closed", 409, "The order is closed";
    /// The coupon does not fit.
    CouponUnusable = "coupon_unusable", 409, "The coupon cannot be used";
    /// Another sale has the id.
    SaleExists = "sale_exists", 409, "Another sale has this id";
    /// What may change only before the start.
    SaleStarted = "sale_started", 409, "The sale has started";
    /// The sale still sells.
    NotEnded = "not_ended", 409, "The sale has not ended";
    /// Something of the sale is under way.
    NotFinal = "not_final", 409, "Something of the sale is still under way";
    /// More units than are left.
    BelowClaimed = "below_claimed", 409, "Units that are claimed cannot be taken away";
    /// There is a ledger, or something else, already.
    LedgerExists = "ledger_exists", 409, "There is a ledger already";
    /// A bound of the ledger.
    BoundReached = "bound_reached", 409, "A bound is reached";
    /// Something that was checked before a shift is not as it should be.
    ShiftRefused = "shift_refused", 409, "The shift cannot begin";
    /// One at a time.
    ShiftRunning = "shift_running", 409, "Another shift is under way";
    /// Too late to give it up.
    ShiftDecided = "shift_decided", 409, "The shift is decided";
    /// A forced shift may lose what was acknowledged.
    LossNotAccepted = "loss_not_accepted", 409, "What may be lost was not accepted";
    /// `expect_epoch` named another epoch.
    EpochMismatch = "epoch_mismatch", 412, "The topology is at another epoch";
    /// `If-Match` named another version.
    VersionMismatch = "version_mismatch", 412, "The sale has another version";
    /// Body too long.
    PayloadTooLarge = "payload_too_large", 413, "The body is too large";
    /// Same key, other request.
    IdempotencyKeyReused = "idempotency_key_reused", 422, "The idempotency key was used for another request";
    /// Another sum is due.
    AmountMismatch = "amount_mismatch", 422, "Another amount is due";
    /// `If-Match` is missing.
    PreconditionRequired = "precondition_required", 428, "The If-Match header is missing";
    /// Over a rate limit.
    RateLimited = "rate_limited", 429, "Too many requests";
    /// Ours.
    Internal = "internal", 500, "Something went wrong here";
    /// Too much at the moment.
    Overloaded = "overloaded", 503, "Too busy at the moment";
    /// The master moves.
    Shifting = "shifting", 503, "The master center is moving";
    /// This service may not write.
    NoAuthority = "no_authority", 503, "Nothing can be sold here at the moment";
    /// The other center did not confirm.
    NotReplicated = "not_replicated", 503, "Not confirmed by the other center";
    /// No answer from the ledger.
    MasterUnreachable = "master_unreachable", 503, "The master center does not answer";
    /// No answer from the center that has to act.
    CenterUnreachable = "center_unreachable", 503, "The center does not answer";
    /// The ledger has no room.
    LedgerFull = "ledger_full", 503, "The ledger is full";
    /// The order database does not answer.
    OrdersUnavailable = "orders_unavailable", 503, "Orders cannot be reached at the moment";
}

impl Code {
    /// Whether the same request with the same key may be sent again.
    pub fn retryable(self) -> bool {
        matches!(self.status().as_u16(), 429 | 503)
    }
}

/// A refusal or failure on its way to the client.
#[derive(Debug)]
pub struct Problem {
    code: Code,
    detail: Cow<'static, str>,
    more: Option<Box<More>>,
}

/// What few problems have.
#[derive(Debug, Default)]
struct More {
    retry_after_s: Option<u64>,
    executed: Option<Executed>,
    limited: Option<Limited>,
    /// Further members of the body, as JSON.
    members: Vec<(&'static str, String)>,
    /// For the log only.
    cause: Option<String>,
}

impl Problem {
    /// A problem that its code says everything about.
    pub fn new(code: Code) -> Problem {
        Problem { code, detail: Cow::Borrowed(code.title()), more: None }
    }

    /// A problem with a sentence for whoever debugs the client.
    pub fn with_detail(code: Code, detail: impl Into<Cow<'static, str>>) -> Problem {
        Problem { code, detail: detail.into(), more: None }
    }

    /// The request cannot be understood.
    pub fn bad_request(detail: impl Into<Cow<'static, str>>) -> Problem {
        Problem::with_detail(Code::BadRequest, detail)
    }

    /// Something of ours failed. The cause goes to the log, not to the client.
    pub fn internal(cause: impl std::fmt::Display) -> Problem {
        Problem::new(Code::Internal).caused_by(cause)
    }

    /// Another sum is due.
    pub fn amount_mismatch(due: seckill_domain::Money) -> Problem {
        Problem::with_detail(Code::AmountMismatch, format!("{due} is due")).member("due", due)
    }

    /// A problem that another center answered with.
    pub(super) fn relayed(body: &str) -> Problem {
        #[derive(serde::Deserialize)]
        struct Told {
            code: String,
            #[serde(default)]
            detail: String,
        }
        match serde_json::from_str::<Told>(body) {
            Ok(told) => match Code::ALL.iter().find(|code| code.as_str() == told.code) {
                Some(code) => Problem::with_detail(*code, told.detail),
                None => Problem::internal(format!("another center answered {}", told.code)),
            },
            Err(error) => Problem::internal(error),
        }
    }

    /// The code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The sentence.
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.code.status()
    }

    fn more(&mut self) -> &mut More {
        self.more.get_or_insert_default()
    }

    fn retry_after(mut self, seconds: u64) -> Problem {
        self.more().retry_after_s = Some(seconds.max(1));
        self
    }

    pub(super) fn executed(mut self, executed: Executed) -> Problem {
        self.more().executed = Some(executed);
        self
    }

    pub(super) fn member(mut self, name: &'static str, value: impl serde::Serialize) -> Problem {
        if let Ok(json) = serde_json::to_string(&value) {
            self.more().members.push((name, json));
        }
        self
    }

    fn caused_by(mut self, cause: impl std::fmt::Display) -> Problem {
        self.more().cause = Some(cause.to_string());
        self
    }

    /// The answer. `given_id` is the client's `X-Request-Id`. What is ours is logged here, once.
    pub fn respond(self, given_id: Option<&HeaderValue>, route: &str) -> Response {
        let request_id = request_id(given_id);
        let Problem { code, detail, more } = self;
        let more = more.unwrap_or_default();
        if let Some(cause) = &more.cause {
            tracing::error!(code = code.as_str(), route, request_id, cause, "a request failed");
        }
        let status = code.status();
        let unavailable = status == StatusCode::SERVICE_UNAVAILABLE;
        let mut body = String::with_capacity(320);
        body.push_str(r#"{"type":"urn:seckill:problem:"#);
        body.push_str(code.as_str());
        body.push_str(r#"","title":""#);
        body.push_str(code.title());
        body.push_str(r#"","status":"#);
        body.push_str(status.as_str());
        body.push_str(r#","detail":"#);
        push_json_text(&mut body, &detail);
        body.push_str(r#","code":""#);
        body.push_str(code.as_str());
        body.push_str(if code.retryable() { r#"","retryable":true"# } else { r#"","retryable":false"# });
        if unavailable {
            body.push_str(match more.executed {
                Some(Executed::Unknown) => r#","executed":"unknown""#,
                Some(Executed::No) | None => r#","executed":"no""#,
            });
        }
        for (name, json) in &more.members {
            let _ = write!(body, r#","{name}":{json}"#);
        }
        body.push_str(r#","request_id":""#);
        body.push_str(&request_id);
        body.push_str("\"}");

        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, PROBLEM_JSON);
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Ok(value) = HeaderValue::try_from(request_id) {
            headers.insert(X_REQUEST_ID, value);
        }
        if code == Code::Unauthenticated {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = more.retry_after_s.or(unavailable.then_some(1)) {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(limited) = more.limited {
            // draft-ietf-httpapi-ratelimit-headers-10: "name";q=quota;w=window and "name";r=remaining;t=reset.
            let Limited { scope, burst, window_s, retry_after_s } = limited;
            let policy = format!("\"{}\";q={burst};w={window_s}", scope.name());
            let state = format!("\"{}\";r=0;t={retry_after_s}", scope.name());
            for (name, text) in [(RATE_LIMIT_POLICY, policy), (RATE_LIMIT, state)] {
                if let Ok(value) = HeaderValue::try_from(text) {
                    headers.insert(name, value);
                }
            }
        }
        response
    }
}

/// The answer to a request of another center that was refused. Nothing of it was executed.
pub(super) fn refused(refusal: cross_center::Refusal) -> Response {
    let body = serde_json::json!({
        "type": format!("urn:seckill:problem:{}", refusal.code()),
        "title": "The request of the other center was refused",
        "status": StatusCode::UNAUTHORIZED.as_u16(),
        "detail": refusal.to_string(),
        "code": refusal.code(),
        "retryable": false,
        "executed": "no",
    });
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = StatusCode::UNAUTHORIZED;
    response.headers_mut().insert(CONTENT_TYPE, PROBLEM_JSON);
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn push_json_text(body: &mut String, text: &str) {
    if text.bytes().all(|byte| byte >= 0x20 && byte != b'"' && byte != b'\\') {
        body.push('"');
        body.push_str(text);
        body.push('"');
    } else {
        body.push_str(&serde_json::to_string(text).unwrap_or_default());
    }
}

/// What a request is called in logs and problems: the client's own id where it is harmless, else one of this
/// process (a random prefix and a counter).
fn request_id(given: Option<&HeaderValue>) -> String {
    static PROCESS: LazyLock<u32> = LazyLock::new(rand::random);
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let harmless = |text: &&str| {
        (1..=MAX_REQUEST_ID_BYTES).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(&byte))
    };
    match given.and_then(|value| value.to_str().ok()).filter(harmless) {
        Some(text) => text.to_owned(),
        None => format!("{:08x}-{:x}", *PROCESS, NEXT.fetch_add(1, Ordering::Relaxed)),
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::inventory::PurchaseError;

    async fn body(response: Response) -> serde_json::Value {
        serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap()
    }

    #[tokio::test]
    async fn a_problem_has_all_its_members() {
        let id = HeaderValue::from_static("abc-1");
        let response = Problem::new(Code::SoldOut).respond(Some(&id), "r");
        assert_eq!(response.status(), 409);
        assert_eq!(response.headers()["content-type"], "application/problem+json");
        assert_eq!(response.headers()["x-request-id"], "abc-1");
        assert_eq!(
            body(response).await,
            serde_json::json!({
                "type": "urn:seckill:problem:sold_out", "title": "The sale is sold out", "status": 409,
                "detail": "The sale is sold out", "code": "sold_out", "retryable": false, "request_id": "abc-1",
            })
        );
    }

    #[tokio::test]
    async fn what_is_unavailable_says_whether_it_happened_and_when_to_return() {
        let unreachable = PurchaseError::MasterUnreachable { executed: Executed::Unknown };
        let response = Problem::from(unreachable).respond(None, "r");
        assert_eq!(response.headers()["retry-after"], "1");
        let unknown = body(response).await;
        assert_eq!((&unknown["executed"], &unknown["retryable"]), (&"unknown".into(), &true.into()));
        let no = body(Problem::from(PurchaseError::Overloaded).respond(None, "r")).await;
        assert_eq!((&no["executed"], &no["retryable"]), (&"no".into(), &true.into()));
    }

    #[tokio::test]
    async fn an_internal_error_says_nothing_of_the_inside() {
        let response = Problem::internal("table orders_007 is gone").respond(None, "r");
        let text = body(response).await.to_string();
        assert!(!text.contains("orders_007"), "{text}");
    }

    #[tokio::test]
    async fn a_hostile_request_id_is_replaced_and_details_are_escaped() {
        for bad in ["", "a\"b", "a b", "\\", &"x".repeat(65)] {
            let given = HeaderValue::try_from(bad).unwrap();
            let response = Problem::bad_request("a \"quoted\"\n\\ text").respond(Some(&given), "r");
            assert_ne!(response.headers()["x-request-id"], bad);
            assert_eq!(body(response).await["detail"], "a \"quoted\"\n\\ text");
        }
    }

    #[tokio::test]
    async fn a_limited_call_carries_the_headers_of_the_draft() {
        let scope = crate::admission::Scope::User;
        let limited = Limited { scope, burst: 20, window_s: 2, retry_after_s: 1 };
        let response = Problem::from(limited).respond(None, "r");
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()["retry-after"], "1");
        assert_eq!(response.headers()["ratelimit-policy"], "\"user\";q=20;w=2");
        assert_eq!(response.headers()["ratelimit"], "\"user\";r=0;t=1");
    }

    #[test]
    fn codes_are_unique_and_retryable_as_documented() {
        let names: std::collections::HashSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        for code in Code::ALL {
            assert_eq!(code.retryable(), [429, 503].contains(&code.status().as_u16()), "{code:?}");
        }
    }
}
