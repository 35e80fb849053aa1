use http::Request;

use super::*;
use crate::cross_center::signature::{Signing, sign};

const UNIX_S: i64 = 1_800_000_000;

fn center(id: &str) -> CenterId {
    CenterId::new(id).unwrap()
}

fn key(id: &str, of: &str, byte: u8) -> CrossKey {
    CrossKey { id: id.to_owned(), center: center(of), secret: vec![byte; 32] }
}

fn ring(of: &str) -> Keyring {
    Keyring::new(center(of), [key("a1", "a", 1), key("b1", "b", 2), key("c1", "c", 3)]).unwrap()
}

fn now() -> Now {
    Now { unix_s: UNIX_S, instant: Instant::now() }
}

fn request(path: &str) -> Parts {
    Request::post(format!("http://a.example:8082{path}")).body(()).unwrap().into_parts().0
}

/// The signed request for a session.
fn asked(key: &CrossKey, hello: &Hello) -> (Parts, Vec<u8>) {
    let body = serde_json::to_vec(hello).unwrap();
    let mut parts = request("/internal/v1/sessions");
    let mac = MacKey::new(&key.secret);
    sign(&mut parts, &body, &Signing { key_id: &key.id, key: &mac, epoch: 1, seq: 0, now_s: UNIX_S })
        .unwrap();
    (parts, body)
}

fn open(server: &Sessions, now: Now) -> ClientSession {
    let opening = Opening::new(&key("b1", "b", 2), &center("a"), None);
    let (parts, body) = asked(&key("b1", "b", 2), opening.hello());
    opening.finish(&server.open(&parts, &body, now).unwrap(), now.instant).unwrap()
}

fn call(session: &ClientSession, seq: u64, body: &[u8]) -> Parts {
    let mut parts = request("/internal/v1/reserve");
    let signing = Signing { key_id: session.key_id(), key: session.key(), epoch: 4, seq, now_s: UNIX_S };
    sign(&mut parts, body, &signing).unwrap();
    parts
}

fn send(server: &Sessions, parts: &Parts, body: &[u8], now: Now) -> Result<Caller, Refusal> {
    server.authenticate(parts, now)?.with_body(body)
}

#[test]
fn a_session_carries_requests_each_once() {
    let (server, now) = (Sessions::new(ring("a"), "i1".into()), now());
    let session = open(&server, now);
    let expected = Caller { center: center("b"), epoch: 4, version: 1 };
    let first = call(&session, session.next_seq(), b"x");
    assert_eq!(send(&server, &first, b"x", now), Ok(expected.clone()));
    assert_eq!(send(&server, &first, b"x", now), Err(Refusal::Replayed));
    let second = call(&session, session.next_seq(), b"x");
    // Another body is refused and does not use up the number.
    assert_eq!(send(&server, &second, b"y", now), Err(Refusal::DigestWrong));
    assert_eq!(send(&server, &second, b"x", now), Ok(expected));
}

#[test]
fn a_session_is_known_to_one_process_and_ends() {
    let (server, now) = (Sessions::new(ring("a"), "i1".into()), now());
    let session = open(&server, now);
    let parts = call(&session, 1, b"");
    let restarted = Sessions::new(ring("a"), "i2".into());
    assert_eq!(send(&restarted, &parts, b"", now), Err(Refusal::InstanceOther));
    // Even a process that took over the name knows nothing of its sessions.
    let impostor = Sessions::new(ring("a"), "i1".into());
    assert_eq!(send(&impostor, &parts, b"", now), Err(Refusal::SessionUnknown));
    let later = Now { instant: now.instant + LIFETIME, ..now };
    assert_eq!(send(&server, &parts, b"", later), Err(Refusal::SessionExpired));
    assert!(session.wants_renewal(now.instant + LIFETIME - RENEW_BEFORE));
    assert!(!session.wants_renewal(now.instant));
}

#[test]
fn a_long_term_key_signs_nothing_but_the_request_for_a_session() {
    let (server, now) = (Sessions::new(ring("a"), "i1".into()), now());
    let mut parts = request("/internal/v1/reserve");
    let mac = MacKey::new(&[2; 32]);
    sign(&mut parts, b"", &Signing { key_id: "b1", key: &mac, epoch: 1, seq: 1, now_s: UNIX_S }).unwrap();
    assert_eq!(send(&server, &parts, b"", now), Err(Refusal::SessionUnknown));
}

#[test]
fn a_recorded_request_for_a_session_gains_nothing() {
    let (server, now) = (Sessions::new(ring("a"), "i1".into()), now());
    let opening = Opening::new(&key("b1", "b", 2), &center("a"), None);
    let (parts, body) = asked(&key("b1", "b", 2), opening.hello());
    let first = server.open(&parts, &body, now).unwrap();
    assert_eq!(server.open(&parts, &body, now), Err(Refusal::Replayed));
    // A process that restarted forgot the nonce. Its session has another key: what was signed under the first one
    // does not fit.
    let restarted = Sessions::new(ring("a"), "i1".into());
    let second = restarted.open(&parts, &body, now).unwrap();
    assert_ne!(first.nonce, second.nonce);
    let mut session = opening.finish(&first, now.instant).unwrap();
    session.key_id = format!("i1.{}", second.session);
    assert_eq!(send(&restarted, &call(&session, 1, b""), b"", now), Err(Refusal::SignatureWrong));
}

#[test]
fn who_asks_for_a_session_must_be_who_they_say_and_mean_this_center() {
    let (server, now) = (Sessions::new(ring("a"), "i1".into()), now());
    let hello = |from: &str, to: &str| Hello {
        from: center(from),
        ..Opening::new(&key("b1", "b", 2), &center(to), None).hello().clone()
    };
    let refusal = |key: CrossKey, hello: Hello| {
        let (parts, body) = asked(&key, &hello);
        server.open(&parts, &body, now).unwrap_err()
    };
    assert_eq!(refusal(key("b1", "b", 2), hello("b", "c")), Refusal::CenterWrong);
    assert_eq!(refusal(key("b1", "b", 2), hello("c", "a")), Refusal::KeyUnknown);
    assert_eq!(refusal(key("b1", "b", 9), hello("b", "a")), Refusal::SignatureWrong);
    assert_eq!(refusal(key("b9", "b", 2), hello("b", "a")), Refusal::KeyUnknown);
    // What this center signed itself is not accepted from anybody.
    assert_eq!(refusal(key("a1", "a", 1), hello("a", "a")), Refusal::KeyUnknown);
    let other = Hello { instance: Some("i2".into()), ..hello("b", "a") };
    assert_eq!(refusal(key("b1", "b", 2), other), Refusal::InstanceOther);
    for (lowest, highest) in [(2, 9), (0, 0), (9, 1)] {
        let versions = Hello { lowest, highest, ..hello("b", "a") };
        assert_eq!(refusal(key("b1", "b", 2), versions), Refusal::VersionMismatch, "{lowest}..{highest}");
    }
    let nonce = Hello { nonce: "AAAA".into(), ..hello("b", "a") };
    assert_eq!(refusal(key("b1", "b", 2), nonce), Refusal::SessionMalformed);
    // A later release speaks the old version as well.
    let later = Hello { highest: 3, ..hello("b", "a") };
    let (parts, body) = asked(&key("b1", "b", 2), &later);
    assert_eq!(server.open(&parts, &body, now).unwrap().version, 1);
}

#[test]
fn keys_rotate_with_overlap_and_a_retired_one_opens_nothing() {
    let now = now();
    let accepts = |server_keys: Vec<CrossKey>, client: CrossKey| {
        let server = Sessions::new(Keyring::new(center("a"), server_keys).unwrap(), "i1".into());
        let opening = Opening::new(&client, &center("a"), None);
        let (parts, body) = asked(&client, opening.hello());
        server.open(&parts, &body, now).map(|welcome| opening.finish(&welcome, now.instant).unwrap())
    };
    let (old, new) = (key("b1", "b", 2), key("b2", "b", 3));
    assert!(accepts(vec![old.clone(), new.clone()], old.clone()).is_ok());
    assert!(accepts(vec![old.clone(), new.clone()], new.clone()).is_ok());
    assert!(accepts(vec![new.clone()], new).is_ok());
    assert_eq!(accepts(vec![key("b2", "b", 3)], old).unwrap_err(), Refusal::KeyUnknown);
}

#[test]
fn an_answer_from_somebody_without_the_key_is_not_believed() {
    let (server, now) = (Sessions::new(ring("a"), "i1".into()), now());
    let finished = |change: fn(&mut Welcome)| {
        let opening = Opening::new(&key("b1", "b", 2), &center("a"), None);
        let (parts, body) = asked(&key("b1", "b", 2), opening.hello());
        let mut welcome = server.open(&parts, &body, now).unwrap();
        change(&mut welcome);
        opening.finish(&welcome, now.instant).map(|_| ())
    };
    assert_eq!(finished(|_| ()), Ok(()));
    assert_eq!(finished(|welcome| welcome.instance = "i2".into()), Err(HandshakeError::Proof));
    assert_eq!(finished(|welcome| welcome.session = "s".into()), Err(HandshakeError::Proof));
    assert_eq!(finished(|welcome| welcome.nonce = STANDARD.encode([0; 32])), Err(HandshakeError::Proof));
    assert_eq!(finished(|welcome| welcome.proof = STANDARD.encode([0; 32])), Err(HandshakeError::Proof));
    assert_eq!(finished(|welcome| welcome.version = 2), Err(HandshakeError::Version(2)));
    assert_eq!(finished(|welcome| welcome.session = "a\"b".into()), Err(HandshakeError::Malformed));
}

#[test]
fn sessions_of_a_peer_are_bounded_and_the_idle_one_goes_first() {
    let (server, start) = (Sessions::new(ring("a"), "i1".into()), now());
    let at = |n: u64| Now { instant: start.instant + Duration::from_millis(n), ..start };
    let first = open(&server, at(0));
    let second = open(&server, at(1));
    for n in 2..MAX_PER_PEER as u64 {
        open(&server, at(n));
    }
    send(&server, &call(&first, 1, b""), b"", at(1000)).unwrap();
    open(&server, at(1001));
    assert!(send(&server, &call(&first, 2, b""), b"", at(1002)).is_ok());
    assert_eq!(send(&server, &call(&second, 1, b""), b"", at(1003)), Err(Refusal::SessionUnknown));
}
