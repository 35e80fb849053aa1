//! What the internal listener refuses, on the wire: with the stable code, and with nothing executed. The ledger's own
//! count of accepted purchases is the witness.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use http::HeaderValue;
use http::request::Parts;
use seckill::cross_center::calls::{
    AUDIT_ORDERS, AUDIT_QUEUE, AUDIT_ROWS, AUDIT_UNREADABLE, OUTBOX, RECLAIM, RELEASE, RESERVE, RESTORE,
    ReserveAnswer, ReserveOutcome, SALE,
};
use seckill::cross_center::session::{Hello, Now, Opening, Sessions};
use seckill::cross_center::signature::{COVERED, Signing, content_digest, sign};
use seckill::cross_center::{CrossKey, MacKey, Refusal};
use seckill_domain::SaleId;
use serde_json::{Value, json};

use super::forger::{Forger, code, edit, hello, purchase, put, send, signed_hello, swap, without};
use crate::pair::{Pair, center, key, ring};

/// What becomes of a request that was signed as it should be.
type Change = fn(&mut Parts, &mut Vec<u8>);

/// Changes of a call, with the code that each is refused with.
const CHANGES: [(&str, &str, Change); 27] = [
    ("another body", "digest_wrong", |_, body| more_units(body)),
    ("another body with its digest", "signature_wrong", |parts, body| {
        more_units(body);
        parts.headers.insert("content-digest", HeaderValue::try_from(content_digest(body)).unwrap());
    }),
    ("another path", "signature_wrong", |parts, _| swap(parts, RESERVE, RELEASE)),
    ("a query", "signature_wrong", |parts, _| swap(parts, RESERVE, "/internal/v1/reserve?x=1")),
    ("another host", "signature_wrong", |parts, _| swap(parts, "127.0.0.1", "127.0.0.2")),
    ("another epoch", "signature_wrong", |parts, _| put(parts, "seckill-epoch", "999")),
    ("another number", "signature_wrong", |parts, _| put(parts, "seckill-seq", "999")),
    ("another time", "signature_wrong", |parts, _| {
        let input = parts.headers["signature-input"].to_str().unwrap();
        let created = input.split(";created=").nth(1).unwrap().split(';').next().unwrap();
        let (from, to) =
            (format!("created={created}"), format!("created={}", created.parse::<i64>().unwrap() - 1));
        edit(parts, "signature-input", &from, &to);
    }),
    ("another signature", "signature_wrong", |parts, _| {
        put(parts, "signature", "sig=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:");
    }),
    ("no digest", "field_invalid", |parts, _| _ = parts.headers.remove("content-digest")),
    ("no epoch", "field_invalid", |parts, _| _ = parts.headers.remove("seckill-epoch")),
    ("no number", "field_invalid", |parts, _| _ = parts.headers.remove("seckill-seq")),
    ("two numbers", "field_invalid", |parts, _| {
        parts.headers.append("seckill-seq", HeaderValue::from_static("7"));
    }),
    ("no signature", "signature_missing", |parts, _| _ = parts.headers.remove("signature")),
    ("no description of it", "signature_missing", |parts, _| _ = parts.headers.remove("signature-input")),
    ("two fields with signatures", "signature_extra", |parts, _| {
        let second = parts.headers["signature"].clone();
        parts.headers.append("signature", second);
    }),
    ("two signatures in one field", "signature_extra", |parts, _| {
        for name in ["signature-input", "signature"] {
            let text = parts.headers[name].to_str().unwrap();
            let both = format!("{text}, {}", text.replacen("sig=", "two=", 1));
            parts.headers.insert(name, HeaderValue::try_from(both).unwrap());
        }
    }),
    ("a label that comes twice", "signature_malformed", |parts, _| {
        let text = parts.headers["signature"].to_str().unwrap();
        let both = HeaderValue::try_from(format!("{text}, {text}")).unwrap();
        parts.headers.insert("signature", both);
    }),
    ("no dictionary", "signature_malformed", |parts, _| put(parts, "signature-input", "sig=(")),
    ("another label", "signature_malformed", |parts, _| edit(parts, "signature", "sig=", "gis=")),
    ("one component more", "component_unexpected", |parts, _| {
        edit(parts, "signature-input", "\"seckill-seq\"", "\"seckill-seq\" \"host\"");
    }),
    ("another order", "component_unexpected", |parts, _| {
        edit(parts, "signature-input", "\"@path\" \"@query\"", "\"@query\" \"@path\"");
    }),
    ("another algorithm", "algorithm_wrong", |parts, _| {
        edit(parts, "signature-input", "hmac-sha256", "hmac-sha512");
    }),
    ("one parameter more", "parameter_invalid", |parts, _| {
        edit(parts, "signature-input", ";alg=", ";nonce=\"x\";alg=");
    }),
    ("another process' session", "instance_other", |parts, _| {
        edit(parts, "signature-input", "keyid=\"a-first.", "keyid=\"a-other.");
    }),
    ("no such session", "session_unknown", |parts, _| {
        edit(parts, "signature-input", "keyid=\"a-first.", "keyid=\"a-first.0");
    }),
    ("a long-term key", "session_unknown", |parts, body| {
        let (own, mac) = (key("b"), MacKey::new(&key("b").secret));
        let epoch = parts.headers["seckill-epoch"].to_str().unwrap().parse().unwrap();
        for name in ["signature", "signature-input"] {
            parts.headers.remove(name);
        }
        let signing = Signing { key_id: &own.id, key: &mac, epoch, seq: 1, now_s: Now::read().unix_s };
        sign(parts, body, &signing).unwrap();
    }),
];

fn more_units(body: &mut Vec<u8>) {
    let text = String::from_utf8(body.clone()).unwrap();
    assert!(text.contains("1,2,null"), "{text}");
    *body = text.replace("1,2,null", "5,2,null").into();
}

/// a's listener, what it has refused so far, and how much it has executed.
struct Trial {
    pair: Pair,
    sale: SaleId,
    epoch: u64,
    bought: u64,
    seen: BTreeSet<&'static str>,
    /// Whoever tries, is somebody new: nobody is refused for what they bought before.
    users: usize,
}

impl Trial {
    async fn start() -> Trial {
        let pair = Pair::open().await;
        let sale = pair.sale("s", 1000).await;
        let epoch = pair.a.topology.current().epoch.0;
        Trial { pair, sale, epoch, bought: 0, seen: BTreeSet::new(), users: 0 }
    }

    fn purchase(&mut self, forger: &Forger) -> (Parts, Vec<u8>) {
        self.purchase_at(forger, Now::read().unix_s)
    }

    fn purchase_at(&mut self, forger: &Forger, now_s: i64) -> (Parts, Vec<u8>) {
        self.users += 1;
        forger.purchase(&self.sale, &format!("u{}", self.users), self.epoch, now_s)
    }

    /// Sends what is executed.
    async fn executed(&mut self, parts: Parts, body: Vec<u8>) {
        let (status, answer) = send(parts, body, self.pair.at).await;
        assert_eq!(status, 200, "{answer:?}");
        let answer: ReserveAnswer = serde_json::from_slice(&answer).unwrap();
        assert!(matches!(answer.outcomes[..], [ReserveOutcome::Accepted(_)]), "{answer:?}");
        self.bought += 1;
        assert_eq!(self.pair.accepted(&self.sale).await, self.bought);
    }

    /// Sends what is refused.
    async fn refused(&mut self, what: &str, expected: &str, parts: Parts, body: Vec<u8>, at: SocketAddr) {
        let (status, answer) = send(parts, body, at).await;
        let problem: Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(
            (status, &problem["code"], &problem["executed"]),
            (401, &json!(expected), &json!("no")),
            "{what}: {problem}"
        );
        assert_eq!(self.pair.accepted(&self.sale).await, self.bought, "{what} ({expected}) was executed");
        self.seen.insert(Refusal::from_code(expected).unwrap().code());
    }

    /// The same of a request for a session.
    async fn no_session(&mut self, what: &str, expected: &str, request: (Parts, Vec<u8>)) {
        self.refused(what, expected, request.0, request.1, self.pair.at).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_refused_was_not_executed() {
    let mut trial = Trial::start().await;
    let at = trial.pair.at;
    let forger = Forger::with_session(at).await;
    // The genuine request is executed, once.
    let (genuine, body) = trial.purchase(&forger);
    trial.executed(genuine.clone(), body.clone()).await;
    trial.refused("sent again", "replayed", genuine.clone(), body.clone(), at).await;

    for (what, expected, change) in CHANGES {
        let (mut parts, mut body) = trial.purchase(&forger);
        change(&mut parts, &mut body);
        trial.refused(what, expected, parts, body, at).await;
    }
    for name in COVERED {
        let (mut parts, body) = trial.purchase(&forger);
        let listed = parts.headers["signature-input"].to_str().unwrap().to_owned();
        let listed = listed.replacen(&format!("\"{name}\""), "", 1).replace("  ", " ");
        let listed = listed.replace("( ", "(").replace(" )", ")");
        parts.headers.insert("signature-input", HeaderValue::try_from(listed).unwrap());
        trial.refused(&format!("{name} not covered"), "component_uncovered", parts, body, at).await;
    }
    for parameter in ["created", "expires", "keyid", "alg"] {
        let (mut parts, body) = trial.purchase(&forger);
        without(&mut parts, parameter);
        trial.refused(&format!("no {parameter}"), "parameter_invalid", parts, body, at).await;
    }
    for late in [-40, 60] {
        let (parts, body) = trial.purchase_at(&forger, Now::read().unix_s + late);
        trial.refused(&format!("signed {late} s from now"), "stale", parts, body, at).await;
    }
    // A process that does not see the same topology does not execute it either.
    let (early, body_early) = forger.purchase(&trial.sale, "early", trial.epoch + 1, Now::read().unix_s);
    let (status, answer) = send(early, body_early, at).await;
    let problem: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!((status, &problem["code"], &problem["executed"]), (503, &json!("no_authority"), &json!("no")));

    no_sessions(&mut trial).await;

    // What was executed and what never arrived: to the other center, and to the process that follows.
    let (unsent, body_unsent) = trial.purchase(&forger);
    let recorded = [(genuine, body), (unsent, body_unsent)];
    for (parts, body) in recorded.clone() {
        trial.refused("sent to b", "instance_other", parts, body, trial.pair.b_at).await;
    }
    trial.pair.restart_a("a-second", ring("a")).await;
    for (parts, body) in recorded.clone() {
        trial.refused("sent after a restart", "instance_other", parts, body, at).await;
    }
    // Not even a process of the same name knows the session.
    trial.pair.restart_a("a-first", ring("a")).await;
    for (parts, body) in recorded {
        trial.refused("sent to a process of the name", "session_unknown", parts, body, at).await;
    }

    // A session that has ended.
    let lifetime = Duration::from_millis(200);
    let sessions = Sessions::with_lifetime(ring("a"), "a-third".to_owned(), lifetime);
    trial.pair.replace_a(sessions).await;
    let forger = Forger::with_session(at).await;
    let ended = Instant::now() + lifetime;
    let (parts, body) = trial.purchase(&forger);
    tokio::time::sleep_until(ended.into()).await;
    trial.refused("after the session's end", "session_expired", parts, body, at).await;

    let all: BTreeSet<&str> = Refusal::ALL.iter().map(|refusal| refusal.code()).collect();
    assert_eq!(trial.seen, all, "codes that nothing was refused with here");
}

/// Requests for a session that open none.
async fn no_sessions(trial: &mut Trial) {
    let (at, now_s) = (trial.pair.at, Now::read().unix_s);
    let b = key("b");
    let fresh = |from: &str, to: &str| Hello {
        from: center(from),
        ..Opening::new(&key("b"), &center(to), None).hello().clone()
    };
    let to_a = || fresh("b", "a");
    let named = |id: &str, secret: u8| CrossKey { id: id.to_owned(), secret: vec![secret; 32], ..key("b") };

    let once = hello(at, &b, &to_a(), 0, now_s);
    assert_eq!(send(once.0.clone(), once.1.clone(), at).await.0, 200);
    trial.no_session("a request for a session, again", "replayed", once).await;
    for (what, expected, request) in [
        ("a key that nobody has", "key_unknown", hello(at, &named("b-9", b'b'), &to_a(), 0, now_s)),
        ("the center's own key", "key_unknown", hello(at, &key("a"), &fresh("a", "a"), 0, now_s)),
        ("another center's name", "key_unknown", hello(at, &b, &fresh("c", "a"), 0, now_s)),
        ("another secret", "signature_wrong", hello(at, &named("b-1", 9), &to_a(), 0, now_s)),
        ("for another center", "center_wrong", hello(at, &b, &fresh("b", "c"), 0, now_s)),
        (
            "for another process",
            "instance_other",
            hello(at, &b, &Hello { instance: Some("a-other".to_owned()), ..to_a() }, 0, now_s),
        ),
        (
            "a version of the future",
            "version_mismatch",
            hello(at, &b, &Hello { lowest: 2, highest: 9, ..to_a() }, 0, now_s),
        ),
        (
            "a nonce too short",
            "session_malformed",
            hello(at, &b, &Hello { nonce: "AAAA".to_owned(), ..to_a() }, 0, now_s),
        ),
        ("no JSON", "session_malformed", signed_hello(at, &b, b"hello".to_vec(), 0, now_s)),
        ("a number", "field_invalid", hello(at, &b, &to_a(), 1, now_s)),
        ("too old", "stale", hello(at, &b, &to_a(), 0, now_s - 40)),
    ] {
        trial.no_session(what, expected, request).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_of_the_internal_listener_refuses_what_is_unsigned_changed_or_repeated() {
    let mut trial = Trial::start().await;
    let at = trial.pair.at;
    let forger = Forger::with_session(at).await;
    let sale = trial.sale.clone();
    let relayed = json!({
        "vouched": {"user": "u"}, "method": "GET", "path": "/v1/orders", "headers": [], "body": "",
    });
    for (path, body) in [
        (RESERVE, purchase(&sale, "once")),
        (RELEASE, json!({"sale_id": sale, "orders": [["1000000010000000001", "u"]]})),
        (RECLAIM, json!({"sale_id": sale, "orders": [["1000000010000000001", "u", 2000, "00".repeat(16)]]})),
        (OUTBOX, Value::Null),
        (SALE, json!({"sale_id": sale})),
        (AUDIT_ROWS, json!({"from": 0, "until": 1, "after": ""})),
        (AUDIT_ORDERS, json!({"orders": []})),
        (AUDIT_UNREADABLE, Value::Null),
        (AUDIT_QUEUE, Value::Null),
        (RESTORE, json!({"held": [], "lost": [], "released": [], "records": []})),
        ("/internal/v1/relay", relayed),
    ] {
        let call = || forger.call(path, &body, trial.epoch, Now::read().unix_s);
        let (mut unsigned, text) = call();
        unsigned.headers.remove("signature");
        let (status, answer) = send(unsigned, text, at).await;
        assert_eq!((status, &*code(&answer)), (401, "signature_missing"), "{path}");
        let (changed, mut text) = call();
        text.push(b' ');
        let (status, answer) = send(changed, text, at).await;
        assert_eq!((status, &*code(&answer)), (401, "digest_wrong"), "{path}");
        let (genuine, text) = call();
        let (status, answer) = send(genuine.clone(), text.clone(), at).await;
        assert_eq!(status, 200, "{path}: {answer:?}");
        let (status, answer) = send(genuine, text, at).await;
        assert_eq!((status, &*code(&answer)), (401, "replayed"), "{path}");
    }
    trial.bought = 1;
    assert_eq!(trial.pair.accepted(&trial.sale).await, trial.bought, "one purchase was sent as it should be");
}
