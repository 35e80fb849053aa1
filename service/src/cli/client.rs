//! The commands' HTTP client: one connection for each call to the admin listener, typed outcomes, and retries
//! where a call may be sent again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, RETRY_AFTER};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::exit::{Exit, Failure};

/// The largest answer that is read; an audit of very many sales is the longest.
const MAX_ANSWER_BYTES: usize = 256 << 20;
/// How often a call is sent at most, when it may be sent again.
const MAX_ATTEMPTS: u32 = 4;
/// Between two attempts, when the service does not say.
const RETRY_PAUSE: Duration = Duration::from_millis(300);
/// The longest that a command waits because the service asked for it.
const MAX_RETRY_PAUSE: Duration = Duration::from_secs(5);
/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest token file that is read.
const MAX_TOKEN_BYTES: u64 = 64 << 10;

/// How a command reaches a running service.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct ServiceArgs {
    /// Admin listener of a running service; any center's will do
    #[arg(long, value_name = "URL", env = "SECKILL_ADMIN_URL", default_value = "http://127.0.0.1:8081")]
    pub admin: String,
    /// File with an admin token
    #[arg(long, value_name = "FILE", env = "SECKILL_ADMIN_TOKEN_FILE", default_value = "data/admin-token")]
    pub token_file: PathBuf,
}

/// Whether a call changes something, and whether it may be sent twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// It only reads.
    Read,
    /// It changes something; sent again it changes nothing more (a key, a state, the same body).
    Idempotent,
    /// It changes something each time.
    Once,
}

/// One call.
#[derive(Debug, Clone)]
pub(super) struct Call {
    method: Method,
    path: String,
    body: Bytes,
    headers: Vec<(HeaderName, HeaderValue)>,
    effect: Effect,
    timeout: Duration,
}

impl Call {
    /// A `GET`.
    pub(super) fn get(path: impl Into<String>) -> Call {
        Call::new(Method::GET, path.into(), Effect::Read)
    }

    /// A `POST`.
    pub(super) fn post(path: impl Into<String>, effect: Effect) -> Call {
        Call::new(Method::POST, path.into(), effect)
    }

    fn new(method: Method, path: String, effect: Effect) -> Call {
        let timeout = Duration::from_secs(30);
        Call { method, path, body: Bytes::new(), headers: Vec::new(), effect, timeout }
    }

    /// With a body.
    pub(super) fn body(mut self, content_type: &'static str, body: impl Into<Bytes>) -> Call {
        self.body = body.into();
        self.headers.push((CONTENT_TYPE, HeaderValue::from_static(content_type)));
        self
    }

    /// With a header.
    pub(super) fn header(mut self, name: &'static str, value: &str) -> Result<Call, Failure> {
        let value = HeaderValue::from_str(value)
            .map_err(|_| Failure::error(format!("{value:?} cannot be the value of {name}")))?;
        self.headers.push((HeaderName::from_static(name), value));
        Ok(self)
    }

    /// How long the whole of it may take, attempts and pauses included.
    pub(super) fn timeout(mut self, timeout: Duration) -> Call {
        self.timeout = timeout;
        self
    }
}

/// An answer with a status of 2xx.
#[derive(Debug)]
pub(super) struct Answer {
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// The body as JSON.
    pub(super) fn json(&self) -> Result<Value, Failure> {
        serde_json::from_slice(&self.body)
            .map_err(|error| Failure::error(format!("the service's answer is not JSON: {error}")))
    }
}

/// Talks to one admin listener.
#[derive(Debug)]
pub(super) struct AdminClient {
    url: String,
    host: String,
    port: u16,
    authority: HeaderValue,
    token: HeaderValue,
}

enum Attempt {
    /// It never left this process.
    NotSent(String),
    /// It was on its way, and no answer came back.
    Lost(String),
    /// An answer.
    Answered(http::Response<Bytes>),
}

impl AdminClient {
    /// Reads the token and understands the URL; sends nothing yet.
    pub(super) fn new(args: &ServiceArgs) -> Result<AdminClient, Failure> {
        let (host, port, authority) = parse_url(&args.admin)?;
        let token = read_token(&args.token_file)?;
        Ok(AdminClient { url: args.admin.clone(), host, port, authority, token })
    }

    /// Sends a call, again where that is safe and useful, and turns whatever comes of it into an answer or a
    /// failure with the right exit code.
    pub(super) async fn call(&self, call: &Call) -> Result<Answer, Failure> {
        let deadline = Instant::now() + call.timeout;
        let mut lost: Option<String> = None;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let left = deadline.saturating_duration_since(Instant::now());
            let again = call.effect != Effect::Once && attempt < MAX_ATTEMPTS;
            let pause = match self.attempt(call, left).await {
                Attempt::NotSent(why) => {
                    let Some(lost) = &lost else { return Err(self.unreachable(&why)) };
                    if !again {
                        return Err(self.no_answer(call, lost));
                    }
                    RETRY_PAUSE
                }
                Attempt::Lost(why) => {
                    if !again || left.is_zero() {
                        return Err(self.no_answer(call, &why));
                    }
                    lost = Some(why);
                    RETRY_PAUSE
                }
                Attempt::Answered(answer) if answer.status().is_success() => {
                    return Ok(Answer { body: answer.into_body() });
                }
                Attempt::Answered(answer) => {
                    let problem = Problem::parse(&answer);
                    if !(again && problem.retryable) {
                        return Err(problem.failure(call.effect, lost.is_some()));
                    }
                    if problem.executed_unknown {
                        lost = Some(problem.text.clone());
                    }
                    let pause = problem.retry_after.unwrap_or(RETRY_PAUSE).min(MAX_RETRY_PAUSE);
                    if Instant::now() + pause >= deadline {
                        return Err(problem.failure(call.effect, lost.is_some()));
                    }
                    pause
                }
            };
            tokio::time::sleep(pause.min(deadline.saturating_duration_since(Instant::now()))).await;
        }
    }

    async fn attempt(&self, call: &Call, left: Duration) -> Attempt {
        let connect = TcpStream::connect((self.host.as_str(), self.port));
        let stream = match tokio::time::timeout(left.min(CONNECT_TIMEOUT), connect).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Attempt::NotSent(error.to_string()),
            Err(_) => return Attempt::NotSent("no connection came about in time".to_owned()),
        };
        let _ = stream.set_nodelay(true);
        let request = match self.request(call) {
            Ok(request) => request,
            Err(error) => return Attempt::NotSent(error.to_string()),
        };
        let exchange = async {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            let exchange = async {
                let (parts, body) = sender.send_request(request).await?.into_parts();
                let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await?.to_bytes();
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(http::Response::from_parts(parts, body))
            };
            tokio::pin!(exchange, connection);
            tokio::select! {
                answer = &mut exchange => answer,
                // The connection may end, all said, just before the body is taken over.
                _ = &mut connection => exchange.await,
            }
        };
        match tokio::time::timeout(left, exchange).await {
            Ok(Ok(answer)) => Attempt::Answered(answer),
            Ok(Err(error)) => Attempt::Lost(error.to_string()),
            Err(_) => Attempt::Lost("no answer came in time".to_owned()),
        }
    }

    fn request(&self, call: &Call) -> Result<Request<Full<Bytes>>, http::Error> {
        let mut request = Request::builder()
            .method(&call.method)
            .uri(&call.path)
            .header(HOST, &self.authority)
            .header(AUTHORIZATION, &self.token);
        for (name, value) in &call.headers {
            request = request.header(name, value);
        }
        request.body(Full::new(call.body.clone()))
    }

    fn unreachable(&self, why: &str) -> Failure {
        Failure::error(format!(
            "cannot reach the service at {}: {why}. Is it running? (`seckill up` starts one; --admin URL or \
             SECKILL_ADMIN_URL names another)",
            self.url
        ))
    }

    fn no_answer(&self, call: &Call, why: &str) -> Failure {
        match call.effect {
            Effect::Read => Failure::error(format!("no answer from {}: {why}", self.url)),
            Effect::Idempotent => Failure::unknown(format!(
                "no answer from {}: {why}. It may have happened; the same command again is safe",
                self.url
            )),
            Effect::Once => Failure::unknown(format!(
                "no answer from {}: {why}. It may have happened, or may still; look before you send it again",
                self.url
            )),
        }
    }
}

/// What a refusal says (RFC 9457).
struct Problem {
    status: StatusCode,
    text: String,
    body: Option<Value>,
    retryable: bool,
    executed_unknown: bool,
    retry_after: Option<Duration>,
}

impl Problem {
    fn parse(answer: &http::Response<Bytes>) -> Problem {
        let status = answer.status();
        let body: Option<Value> = serde_json::from_slice(answer.body()).ok();
        let field = |name: &str| body.as_ref().and_then(|body| body.get(name));
        let code = field("code").and_then(Value::as_str);
        let detail = field("detail").or_else(|| field("title")).and_then(Value::as_str);
        let text = match (code, detail) {
            (Some(code), Some(detail)) => format!("{code}: {detail}"),
            (Some(one), None) | (None, Some(one)) => one.to_owned(),
            (None, None) => format!("the service answered {status}"),
        };
        Problem {
            status,
            text,
            retryable: field("retryable").and_then(Value::as_bool).unwrap_or(false),
            executed_unknown: field("executed").and_then(Value::as_str) == Some("unknown"),
            retry_after: answer
                .headers()
                .get(RETRY_AFTER)
                .and_then(|value| value.to_str().ok()?.parse().ok())
                .map(Duration::from_secs),
            body,
        }
    }

    fn failure(self, effect: Effect, lost_before: bool) -> Failure {
        // A 5xx that does not say `executed` may have done anything.
        let says = self.body.as_ref().is_some_and(|body| body.get("executed").is_some());
        let in_doubt = self.executed_unknown || (self.status.is_server_error() && (!says || lost_before));
        let exit = match (effect, self.status) {
            (Effect::Read, _) | (_, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => Exit::Error,
            _ if in_doubt => Exit::Unknown,
            _ => Exit::Refused,
        };
        let hint = match self.status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                " (--token-file or SECKILL_ADMIN_TOKEN_FILE names the admin token)"
            }
            _ => "",
        };
        Failure { exit, message: format!("{}{hint}", self.text), body: self.body }
    }
}

fn parse_url(url: &str) -> Result<(String, u16, HeaderValue), Failure> {
    let bad = |why: &str| Failure::error(format!("--admin {url:?}: {why}"));
    let uri: Uri = url.parse().map_err(|_| bad("not a URL"))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err(bad("https is not supported by this command; use the plain address")),
        _ => return Err(bad("must begin with http://")),
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(bad("must be a listener's address without a path"));
    }
    let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(|| bad("names no host"))?;
    let port = uri.port_u16().unwrap_or(80);
    let authority =
        HeaderValue::from_str(&format!("{host}:{port}")).map_err(|_| bad("names an impossible host"))?;
    // An IPv6 address stands in brackets in a URL, but not for the resolver.
    Ok((host.trim_start_matches('[').trim_end_matches(']').to_owned(), port, authority))
}

fn read_token(path: &Path) -> Result<HeaderValue, Failure> {
    let cannot = |why: &dyn std::fmt::Display| {
        Failure::error(format!(
            "cannot read the admin token {}: {why}. `seckill up --data-dir D` leaves one in D/admin-token; \
             --token-file or SECKILL_ADMIN_TOKEN_FILE names another",
            path.display()
        ))
    };
    let size = std::fs::metadata(path).map_err(|error| cannot(&error))?.len();
    if size > MAX_TOKEN_BYTES {
        return Err(cannot(&"the file is too large for a token"));
    }
    let token = std::fs::read_to_string(path).map_err(|error| cannot(&error))?;
    let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
        .map_err(|_| cannot(&"it holds no token"))?;
    value.set_sensitive(true);
    Ok(value)
}
