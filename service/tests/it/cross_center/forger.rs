//! Somebody who has seen, or forged, a request of center b.

use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderValue, Request};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use seckill::cross_center::calls::{RESERVE, SESSIONS};
use seckill::cross_center::session::{ClientSession, Hello, Now, Opening, Welcome};
use seckill::cross_center::signature::{Signing, sign};
use seckill::cross_center::{CrossKey, MacKey};
use seckill_domain::{IdempotencyKey, SaleId};
use serde_json::{Value, json};

use crate::pair::{center, key};

type Http = hyper_util::client::legacy::Client<HttpConnector, Full<Bytes>>;

/// Holds a session of center b's with a.
pub(super) struct Forger {
    pub(super) at: SocketAddr,
    pub(super) session: ClientSession,
}

impl Forger {
    pub(super) async fn with_session(at: SocketAddr) -> Forger {
        Forger::with_key(at, &key("b")).await.unwrap()
    }

    /// Opens a session with a long-term key, or says with which code it was refused.
    pub(super) async fn with_key(at: SocketAddr, key: &CrossKey) -> Result<Forger, String> {
        let opening = Opening::new(key, &center("a"), None);
        let asked = Instant::now();
        let (parts, body) = hello(at, key, opening.hello(), 0, Now::read().unix_s);
        let (status, answer) = send(parts, body, at).await;
        if status != 200 {
            return Err(code(&answer));
        }
        let welcome: Welcome = serde_json::from_slice(&answer).unwrap();
        Ok(Forger { at, session: opening.finish(&welcome, asked).unwrap() })
    }

    /// A call, signed as it should be.
    pub(super) fn call(&self, path: &str, body: &Value, epoch: u64, now_s: i64) -> (Parts, Vec<u8>) {
        let body = body.to_string().into_bytes();
        let uri = format!("http://{}{path}", self.at);
        let (mut parts, ()) = Request::post(uri).body(()).unwrap().into_parts();
        let seq = self.session.next_seq();
        let signing = Signing { key_id: self.session.key_id(), key: self.session.key(), epoch, seq, now_s };
        sign(&mut parts, &body, &signing).unwrap();
        (parts, body)
    }

    /// A purchase of this user, signed as it should be.
    pub(super) fn purchase(&self, sale: &SaleId, uid: &str, epoch: u64, now_s: i64) -> (Parts, Vec<u8>) {
        self.call(RESERVE, &purchase(sale, uid), epoch, now_s)
    }
}

/// The body of a call that buys one unit.
pub(super) fn purchase(sale: &SaleId, uid: &str) -> Value {
    let digest = IdempotencyKey::new("k").unwrap();
    let hex: String = digest.digest().iter().map(|byte| format!("{byte:02x}")).collect();
    json!({"sale_id": sale, "deadline_ms": 1000, "entries": [[uid, hex, 1, 2, null]]})
}

/// A request for a session.
pub(super) fn hello(at: SocketAddr, key: &CrossKey, hello: &Hello, seq: u64, now_s: i64) -> (Parts, Vec<u8>) {
    signed_hello(at, key, serde_json::to_vec(hello).unwrap(), seq, now_s)
}

/// The same with any body.
pub(super) fn signed_hello(
    at: SocketAddr,
    key: &CrossKey,
    body: Vec<u8>,
    seq: u64,
    now_s: i64,
) -> (Parts, Vec<u8>) {
    let (mut parts, ()) = Request::post(format!("http://{at}{SESSIONS}")).body(()).unwrap().into_parts();
    let mac = MacKey::new(&key.secret);
    sign(&mut parts, &body, &Signing { key_id: &key.id, key: &mac, epoch: 1, seq, now_s }).unwrap();
    (parts, body)
}

/// Sends a request as it stands to wherever: the signature covers the name that was dialled first, and a replay
/// elsewhere keeps it.
pub(super) async fn send(mut parts: Parts, body: Vec<u8>, at: SocketAddr) -> (u16, Bytes) {
    // A connection of its own for each request: one that the server closes meanwhile would fail the next.
    let http: Http = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(0)
        .build_http();
    let named = parts.uri.authority().unwrap().to_string();
    let path = parts.uri.path_and_query().unwrap().to_string();
    parts.uri = format!("http://{at}{path}").parse().unwrap();
    parts.headers.insert("host", HeaderValue::try_from(named).unwrap());
    let response = http.request(Request::from_parts(parts, Full::new(body.into()))).await.unwrap();
    let status = response.status().as_u16();
    (status, response.into_body().collect().await.unwrap().to_bytes())
}

/// A problem's code.
pub(super) fn code(answer: &[u8]) -> String {
    let problem: Value = serde_json::from_slice(answer).unwrap();
    problem["code"].as_str().unwrap_or_default().to_owned()
}

pub(super) fn put(parts: &mut Parts, name: &'static str, value: &'static str) {
    parts.headers.insert(name, HeaderValue::from_static(value));
}

/// Replaces the first `from` in a field's value, which has it.
pub(super) fn edit(parts: &mut Parts, name: &'static str, from: &str, to: &str) {
    let text = parts.headers[name].to_str().unwrap();
    assert!(text.contains(from), "{from:?} in {text:?}");
    let text = text.replacen(from, to, 1);
    parts.headers.insert(name, HeaderValue::try_from(text).unwrap());
}

/// Takes a parameter out of `Signature-Input`.
pub(super) fn without(parts: &mut Parts, parameter: &str) {
    let text = parts.headers["signature-input"].to_str().unwrap().to_owned();
    let from = text.find(&format!(";{parameter}=")).unwrap();
    let until = text[from + 1..].find(';').map_or(text.len(), |at| from + 1 + at);
    edit(parts, "signature-input", &text[from..until], "");
}

/// Replaces the first `from` in a request's target, which has it.
pub(super) fn swap(parts: &mut Parts, from: &str, to: &str) {
    let text = parts.uri.to_string();
    assert!(text.contains(from), "{from:?} in {text:?}");
    parts.uri = text.replacen(from, to, 1).parse().unwrap();
}
