//! A stand-in for the service that can be told to lie: the liars are what the harness has to catch.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use seckill_domain::{CenterNumber, Epoch, OrderId, Uid};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

pub(crate) const SECRET: &[u8] = b"the secret of the double, as long as secrets are";
pub(crate) const ADMIN_TOKEN: &str = "the.admin.token";
pub(crate) const SALE: &str = "herd";

/// What the double does wrong, or what goes wrong on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The tenth order's id is given to the next buyer as well.
    GivesOneIdTwice,
    /// The tenth order is acknowledged and never stored; the books pretend.
    LosesAnOrder,
    /// Accepts without looking at what is left.
    Oversells,
    /// Replays answer with a new id.
    ReplaysWithAnotherId,
    /// Replays do not say that they are.
    ReplaysUnmarked,
    /// Does not look at the limit.
    IgnoresTheLimit,
    /// Stores another quantity than it acknowledged.
    StoresAnotherQuantity,
    /// Stops answering for two seconds, one second after the first purchase.
    Stalls,
    /// Does not look at signatures.
    TakesForgedTokens,
    /// Forgets every payment that it acknowledged.
    ForgetsPayments,
    /// Stores an order that nobody asked for.
    StoresAPhantom,
    /// Every fifth new purchase is carried out and its connection cut.
    CutsConnections,
    /// Every fifth new purchase is carried out and never answered.
    FallsSilent,
    /// Every fifth new purchase is answered `not_replicated` though it stands.
    NotReplicated,
    /// The first request of every purchase is answered `overloaded`, nothing done.
    Overloaded,
    /// Goes away after the fiftieth purchase.
    Dies,
    /// Goes away after the fiftieth purchase, in the middle of what it does, and is back 300 ms later.
    Restarts,
}

#[derive(Default)]
struct State {
    total: i64,
    limit: i64,
    claims: HashMap<(String, String), OrderId>,
    held: HashMap<String, i64>,
    orders: HashMap<OrderId, (String, i64, u32)>,
    lost: i64,
    status: HashMap<OrderId, &'static str>,
    released: i64,
    seq: u64,
    fresh: u64,
    seen: HashMap<String, u32>,
    first_purchase: Option<Instant>,
    counts: BTreeMap<String, u64>,
    calls: BTreeMap<String, u64>,
}

pub(crate) struct Double {
    pub(crate) url: String,
    state: Arc<Mutex<State>>,
    accepting: Arc<Mutex<AbortHandle>>,
}

struct Reply {
    status: u16,
    extra: &'static str,
    body: String,
}

enum Then {
    Answer(Reply),
    Cut,
    Silence,
}

fn answer(status: u16, body: &serde_json::Value) -> Then {
    Then::Answer(Reply { status, extra: "", body: body.to_string() })
}

fn problem(status: u16, code: &str, retryable: bool, executed: Option<&str>) -> Then {
    let mut body = serde_json::json!({"type": "about:blank", "title": code, "status": status,
        "detail": code, "code": code, "retryable": retryable, "request_id": "r"});
    if let Some(executed) = executed {
        body["executed"] = executed.into();
    }
    answer(status, &body)
}

impl Double {
    pub(crate) async fn start(total: i64, limit: i64, fault: Fault) -> Double {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(Mutex::new(State { total, limit, ..State::default() }));
        let accepting = Arc::new(Mutex::new(accept(listener, Arc::clone(&state), fault)));
        if matches!(fault, Fault::Dies | Fault::Restarts) {
            let (state, accepting, addr) = (Arc::clone(&state), Arc::clone(&accepting), url[7..].to_owned());
            tokio::spawn(async move {
                while state.lock().unwrap().fresh < 50 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                accepting.lock().unwrap().abort();
                if fault == Fault::Restarts {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                    let listener = TcpListener::bind(addr).await.unwrap();
                    *accepting.lock().unwrap() = accept(listener, state, fault);
                }
            });
        }
        Double { url, state, accepting }
    }

    /// Answers to purchases by code.
    pub(crate) fn counts(&self) -> BTreeMap<String, u64> {
        self.state.lock().unwrap().counts.clone()
    }

    /// Answers to everything else, by what was asked.
    pub(crate) fn calls(&self) -> BTreeMap<String, u64> {
        self.state.lock().unwrap().calls.clone()
    }

    pub(crate) fn orders(&self) -> usize {
        self.state.lock().unwrap().orders.len()
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        self.accepting.lock().unwrap().abort();
    }
}

fn accept(listener: TcpListener, state: Arc<Mutex<State>>, fault: Fault) -> AbortHandle {
    let accepting = tokio::spawn(async move {
        // Connections end with the listener.
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let state = Arc::clone(&state);
            connections.spawn(async move {
                let _ = serve(stream, state, fault).await;
            });
        }
    });
    accepting.abort_handle()
}

async fn serve(mut stream: TcpStream, state: Arc<Mutex<State>>, fault: Fault) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buf = Vec::new();
    loop {
        let (head, method, path, headers) = loop {
            if let Some(parsed) = parse(&buf) {
                break parsed;
            }
            if stream.read_buf(&mut buf).await? == 0 {
                return Ok(());
            }
        };
        let length: usize = headers.get("content-length").map_or(0, |value| value.parse().unwrap());
        while buf.len() < head + length {
            if stream.read_buf(&mut buf).await? == 0 {
                return Ok(());
            }
        }
        let body = buf[head..head + length].to_vec();
        buf.drain(..head + length);
        if fault == Fault::Stalls {
            stall(&state).await;
        }
        // Between carrying out and answering: what an abort cuts off here is unknown to the client.
        let slow = fault == Fault::Restarts && state.lock().unwrap().fresh >= 40;
        let then = handle(&state, fault, &method, &path, &headers, &body);
        if slow {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        match then {
            Then::Answer(Reply { status, extra, body }) => {
                let length = body.len();
                let text = format!("HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n{extra}\r\n{body}");
                stream.write_all(text.as_bytes()).await?;
            }
            Then::Cut => return Ok(()),
            Then::Silence => std::future::pending().await,
        }
    }
}

async fn stall(state: &Mutex<State>) {
    let first = state.lock().unwrap().first_purchase;
    if let Some(first) = first {
        let (from, until) = (first + Duration::from_secs(1), first + Duration::from_secs(3));
        if (from..until).contains(&Instant::now()) {
            tokio::time::sleep_until(until.into()).await;
        }
    }
}

type Head = (usize, String, String, HashMap<String, String>);

fn parse(buf: &[u8]) -> Option<Head> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(head) = request.parse(buf).unwrap() else { return None };
    let headers = request
        .headers
        .iter()
        .map(|header| (header.name.to_ascii_lowercase(), String::from_utf8(header.value.to_vec()).unwrap()));
    let headers = headers.collect();
    Some((head, request.method.unwrap().to_owned(), request.path.unwrap().to_owned(), headers))
}

fn user(headers: &HashMap<String, String>, trusting: bool) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Claims {
        sub: String,
    }
    let token = headers.get("authorization")?.strip_prefix("Bearer ")?;
    let key = jsonwebtoken::DecodingKey::from_secret(SECRET);
    if trusting {
        use base64::Engine as _;
        let claims = token.split('.').nth(1)?;
        let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).ok()?;
        return Some(serde_json::from_slice::<Claims>(&claims).ok()?.sub);
    }
    let rules = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::HS256);
    Some(jsonwebtoken::decode::<Claims>(token, &key, &rules).ok()?.claims.sub)
}

fn handle(
    state: &Mutex<State>,
    fault: Fault,
    method: &str,
    path: &str,
    headers: &HashMap<String, String>,
    body: &[u8],
) -> Then {
    let mut state = state.lock().unwrap();
    let state = &mut *state;
    let sale = format!("/v1/sales/{SALE}");
    if method == "POST" && path == format!("{sale}/purchases") {
        state.first_purchase.get_or_insert_with(Instant::now);
        let (code, then) = purchase(state, fault, headers, body);
        *state.counts.entry(code.to_owned()).or_default() += 1;
        return then;
    }
    if path == "/v1/route" {
        return match user(headers, fault == Fault::TakesForgedTokens) {
            Some(uid) => answer(200, &serde_json::json!({"uid": uid})),
            None => problem(401, "unauthenticated", false, None),
        };
    }
    if path == sale {
        *state.calls.entry("read_sale".to_owned()).or_default() += 1;
        let remaining = state.total - state.held.values().sum::<i64>();
        return answer(
            200,
            &serde_json::json!({"sale_id": SALE, "per_user_limit": state.limit, "remaining": remaining, "new": {}}),
        );
    }
    if path == format!("/admin{sale}/audit") {
        if headers.get("authorization").map(String::as_str) != Some(&format!("Bearer {ADMIN_TOKEN}")) {
            return problem(401, "unauthenticated", false, None);
        }
        return answer(200, &audit(state, fault));
    }
    if path.starts_with("/admin/v1/orders?") {
        let orders: Vec<_> = state
            .orders
            .iter()
            .map(|(id, (uid, ..))| serde_json::json!({"order_id": id.to_string(), "uid": uid}))
            .collect();
        return answer(200, &serde_json::json!({"orders": orders, "next_cursor": null}));
    }
    if method == "POST"
        && let Some(id) = path.strip_prefix("/v1/orders/")
        && let Some((id, what)) = id.split_once('/')
    {
        let order: OrderId = id.parse().unwrap();
        *state.calls.entry(what.to_owned()).or_default() += 1;
        if what == "cancel" {
            let (uid, quantity, _) = state.orders[&order].clone();
            state.status.insert(order, "cancelled");
            state.released += quantity;
            *state.held.get_mut(&uid).unwrap() -= quantity;
        } else if fault != Fault::ForgetsPayments {
            state.status.insert(order, "paid");
        }
        return answer(200, &serde_json::json!({"order_id": id}));
    }
    if let Some(id) = path.strip_prefix("/v1/orders/") {
        let uid = user(headers, fault == Fault::TakesForgedTokens).unwrap_or_default();
        let order: OrderId = id.parse().unwrap();
        let stored = state.status.get(&order).copied().unwrap_or("created");
        return match state.orders.get_mut(&order) {
            Some((owner, quantity, looks)) if *owner == uid => {
                *looks += 1;
                let status = if *looks == 1 { "queued" } else { stored };
                let wrong = i64::from(fault == Fault::StoresAnotherQuantity);
                answer(
                    200,
                    &serde_json::json!({"order_id": id, "sale_id": SALE, "quantity": *quantity + wrong,
                        "status": status, "amount": 500}),
                )
            }
            _ => problem(404, "order_not_found", false, None),
        };
    }
    problem(404, "sale_not_found", false, None)
}

fn audit(state: &State, fault: Fault) -> serde_json::Value {
    let claimed: i64 = state.held.values().sum();
    let cancelled = state.status.values().filter(|status| **status == "cancelled").count() as i64;
    // The liars' books look fine: only what the buyers were told gives them away.
    let claimed = if fault == Fault::Oversells { claimed.min(state.total) } else { claimed };
    serde_json::json!({"sale_id": SALE, "total": state.total, "remaining": state.total - claimed,
        "claimed": claimed, "released": state.released, "in_flight": 0, "violations": [], "later": [1],
        "orders": {"created": state.orders.len() as i64 + state.lost - cancelled, "cancelled": cancelled}})
}

fn purchase(
    state: &mut State,
    fault: Fault,
    headers: &HashMap<String, String>,
    body: &[u8],
) -> (&'static str, Then) {
    let Some(uid) = user(headers, fault == Fault::TakesForgedTokens) else {
        return ("unauthenticated", problem(401, "unauthenticated", false, None));
    };
    let key = headers["idempotency-key"].clone();
    let body: serde_json::Value = serde_json::from_slice(body).unwrap();
    let quantity = body["quantity"].as_i64().unwrap();
    let seen = state.seen.entry(key.clone()).or_default();
    *seen += 1;
    if fault == Fault::Overloaded && *seen == 1 {
        return ("overloaded", problem(503, "overloaded", true, Some("no")));
    }
    if let Some(order) = state.claims.get(&(uid.clone(), key.clone())).copied() {
        return match fault {
            Fault::ReplaysWithAnotherId => {
                let order = new_id(state, &uid);
                ("replayed", accepted(order, quantity, true))
            }
            Fault::ReplaysUnmarked => ("replayed", accepted(order, quantity, false)),
            _ => ("replayed", accepted(order, quantity, true)),
        };
    }
    let held = state.held.get(&uid).copied().unwrap_or(0);
    if held + quantity > state.limit && fault != Fault::IgnoresTheLimit {
        return ("limit_exceeded", problem(409, "limit_exceeded", false, None));
    }
    let claimed: i64 = state.held.values().sum();
    if claimed + quantity > state.total && fault != Fault::Oversells {
        return ("sold_out", problem(409, "sold_out", false, None));
    }
    state.fresh += 1;
    let fresh = state.fresh;
    let last = state.orders.keys().max_by_key(|order| order.seq()).copied();
    let order = match last {
        Some(last) if fault == Fault::GivesOneIdTwice && fresh == 11 => last,
        _ => new_id(state, &uid),
    };
    state.claims.insert((uid.clone(), key), order);
    *state.held.entry(uid.clone()).or_default() += quantity;
    if fault == Fault::LosesAnOrder && fresh == 10 {
        state.lost += 1;
    } else {
        state.orders.insert(order, (uid, quantity, 0));
    }
    if fault == Fault::StoresAPhantom && fresh == 10 {
        let phantom = new_id(state, "nobody");
        state.orders.insert(phantom, ("nobody".to_owned(), 1, 0));
    }
    match fault {
        Fault::CutsConnections if fresh.is_multiple_of(5) => ("connection_lost", Then::Cut),
        Fault::FallsSilent if fresh.is_multiple_of(5) => ("timeout", Then::Silence),
        Fault::NotReplicated if fresh.is_multiple_of(5) => {
            ("not_replicated", problem(503, "not_replicated", true, Some("unknown")))
        }
        _ => ("accepted", accepted(order, quantity, false)),
    }
}

fn new_id(state: &mut State, uid: &str) -> OrderId {
    state.seq += 1;
    let table = Uid::new(uid).unwrap().table();
    OrderId::from_parts(OrderId::head_of(CenterNumber::new(1).unwrap(), table, 0, Epoch(1)), state.seq)
        .unwrap()
}

fn accepted(order: OrderId, quantity: i64, replayed: bool) -> Then {
    let body = serde_json::json!({"order_id": order.to_string(), "sale_id": SALE, "quantity": quantity,
        "status": "queued", "home_center": "a", "poll_after_ms": 100});
    let extra = if replayed { "idempotent-replayed: true\r\n" } else { "" };
    Then::Answer(Reply { status: 202, extra, body: body.to_string() })
}
