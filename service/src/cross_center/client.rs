//! Calls to other centers: a session with each of their instances, requests side by side on one HTTP/2 connection.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use seckill_domain::{CenterId, Epoch, Table};
use seckill_ledger::Executed;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{OnceCell, Semaphore};

use super::calls::SESSIONS;
use super::keyring::{Keyring, MacKey};
use super::refusal::Refusal;
use super::session::{ClientSession, Now, Opening, Welcome};
use super::signature::{Signing, sign};
use super::tls::{CallerTls, Connector};
use crate::topology::{Instances, TopologyHandle};

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection that is silent for this long is asked whether it lives, and given up after as long again: a cut
/// link shows before the purchases on it are late.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// Requests under way to one instance; the other side takes 256 on a connection, and the replay window is 1024.
const MAX_IN_FLIGHT: usize = 192;
/// Instances that are remembered; beyond it those that nobody names any more are forgotten.
const MAX_PEERS: usize = 256;
/// The largest answer that is read, bytes: an audit of ten thousand sales, as a text within JSON.
const MAX_ANSWER_BYTES: usize = 16 << 20;
/// A session is opened again, and the request sent again, this often for one call.
const SESSION_ATTEMPTS: usize = 2;

/// A call that gave no answer to its question.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Nothing happened: the call may be sent again or given up.
    #[error("the other center did not take the call: {0}")]
    NotExecuted(String),
    /// It may have happened. Only the same call under the same keys tells.
    #[error("the other center did not answer: {0}")]
    Unknown(String),
}

impl CallError {
    /// Whether the call may have changed something.
    pub fn executed(&self) -> Executed {
        match self {
            CallError::NotExecuted(_) => Executed::No,
            CallError::Unknown(_) => Executed::Unknown,
        }
    }
}

/// The way to other centers. Clones share connections and sessions.
#[derive(Clone)]
pub struct CrossCenter(Arc<Inner>);

struct Inner {
    keys: Keyring,
    topology: TopologyHandle,
    instances: Instances,
    http: legacy::Client<Connector, Full<Bytes>>,
    peers: Mutex<HashMap<String, Arc<Peer>>>,
    next: AtomicUsize,
}

/// One instance of another center.
struct Peer {
    url: String,
    center: CenterId,
    /// The session, or one that is being opened; replaced as a whole.
    session: ArcSwapOption<OnceCell<ClientSession>>,
    in_flight: Semaphore,
}

impl std::fmt::Debug for CrossCenter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CrossCenter").field("keys", &self.0.keys).finish_non_exhaustive()
    }
}

impl CrossCenter {
    /// For centers whose URLs are all `http://`. Connects to nothing yet.
    pub fn new(keys: Keyring, topology: TopologyHandle, instances: Instances) -> CrossCenter {
        CrossCenter::over(None, keys, topology, instances)
    }

    /// For `http://` and `https://` URLs. Connects to nothing yet.
    pub fn with_tls(
        tls: CallerTls,
        keys: Keyring,
        topology: TopologyHandle,
        instances: Instances,
    ) -> CrossCenter {
        CrossCenter::over(Some(tls), keys, topology, instances)
    }

    fn over(
        tls: Option<CallerTls>,
        keys: Keyring,
        topology: TopologyHandle,
        instances: Instances,
    ) -> CrossCenter {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        let http = legacy::Client::builder(TokioExecutor::new())
            .http2_only(true)
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .http2_keep_alive_interval(PING_INTERVAL)
            .http2_keep_alive_timeout(PING_INTERVAL)
            .http2_keep_alive_while_idle(true)
            .build(Connector::new(connector, tls));
        CrossCenter(Arc::new(Inner {
            keys,
            topology,
            instances,
            http,
            peers: Mutex::default(),
            next: AtomicUsize::new(0),
        }))
    }

    /// The center that this service is part of.
    pub fn center(&self) -> &CenterId {
        self.0.keys.center()
    }

    /// The epoch that this service believes in.
    pub fn epoch(&self) -> Epoch {
        self.0.topology.current().epoch
    }

    /// The master center, where that is another one than this.
    pub fn other_master(&self) -> Option<CenterId> {
        let topology = self.0.topology.current();
        (topology.master != *self.center()).then(|| topology.master.clone())
    }

    /// A center, if it is another one than this and the topology knows it.
    pub fn other_center(&self, id: &CenterId) -> Option<CenterId> {
        let known = self.0.topology.current().center(id).is_some();
        (known && id != self.center()).then(|| id.clone())
    }

    /// Another center that the users of a table are at home in; none if it is this one.
    pub fn other_home(&self, table: Table) -> Option<CenterId> {
        let topology = self.0.topology.current();
        let home = topology.home_center(table.shard());
        (home != self.center()).then(|| home.clone())
    }

    /// Makes a call to one of a center's instances and reads its answer. The future may be dropped at any time; then
    /// nobody knows whether the call was executed.
    pub async fn call<Q: Serialize + Sync, A: DeserializeOwned>(
        &self,
        center: &CenterId,
        path: &'static str,
        question: &Q,
        timeout: Duration,
    ) -> Result<A, CallError> {
        let body = serde_json::to_vec(question).map_err(|error| CallError::NotExecuted(error.to_string()))?;
        let answer = self.send(center, path, body.into(), timeout).await?;
        serde_json::from_slice(&answer)
            .map_err(|error| CallError::Unknown(format!("an answer that cannot be read: {error}")))
    }

    async fn send(
        &self,
        center: &CenterId,
        path: &'static str,
        body: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let peer = self.peer(center)?;
        let deadline = tokio::time::Instant::now() + timeout;
        let Ok(Ok(_place)) = tokio::time::timeout_at(deadline, peer.in_flight.acquire()).await else {
            return Err(CallError::NotExecuted("too many calls are under way".to_owned()));
        };
        let mut attempt = 1;
        loop {
            let opened = tokio::time::timeout_at(deadline, self.session(&peer)).await;
            let session = opened.map_err(|_| CallError::NotExecuted("no session in time".to_owned()))??;
            let Some(current) = session.get() else {
                return Err(CallError::NotExecuted("no session".to_owned()));
            };
            let seq = current.next_seq();
            let request = self.request(&peer, path, body.clone(), current.key_id(), current.key(), seq)?;
            let sent = tokio::time::timeout_at(deadline, self.exchange(request)).await;
            match sent.map_err(|_| CallError::Unknown("no answer in time".to_owned()))?? {
                (StatusCode::OK, answer) => return Ok(answer),
                (status, answer) => match judged(status, &answer) {
                    Judged::Session(_) if attempt < SESSION_ATTEMPTS => {
                        attempt += 1;
                        peer.forget(&session);
                    }
                    Judged::Session(refusal) => {
                        peer.forget(&session);
                        return Err(CallError::NotExecuted(refusal.to_string()));
                    }
                    Judged::Failed(error) => return Err(error),
                },
            }
        }
    }

    /// One of the center's instances, in turns.
    fn peer(&self, center: &CenterId) -> Result<Arc<Peer>, CallError> {
        let mut urls: Vec<String> =
            self.0.instances.of(center).into_iter().map(|instance| instance.internal_url).collect();
        if urls.is_empty() {
            // Registrations may be lost for a while; the center's own URL is in the topology.
            let topology = self.0.topology.current();
            urls.extend(topology.center(center).map(|center| center.internal_url.clone()));
        }
        if urls.is_empty() {
            return Err(CallError::NotExecuted(format!("no instance of center {center} is known")));
        }
        let turn = self.0.next.fetch_add(1, Ordering::Relaxed) % urls.len();
        let url = urls.swap_remove(turn);
        let mut peers = self.0.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = peers.get(&url) {
            return Ok(Arc::clone(peer));
        }
        if peers.len() >= MAX_PEERS {
            // Those in use are named again by the next call.
            peers.clear();
        }
        let peer = Arc::new(Peer {
            url: url.clone(),
            center: center.clone(),
            session: ArcSwapOption::empty(),
            in_flight: Semaphore::new(MAX_IN_FLIGHT),
        });
        peers.insert(url, Arc::clone(&peer));
        Ok(peer)
    }

    /// The session with an instance; opened once, however many wait for it.
    async fn session(&self, peer: &Arc<Peer>) -> Result<Arc<OnceCell<ClientSession>>, CallError> {
        let now = Instant::now();
        let current = peer.session.load_full();
        let cell = match current {
            Some(cell) if !cell.get().is_some_and(|session| session.wants_renewal(now)) => cell,
            ended => {
                let fresh = Arc::new(OnceCell::new());
                let seen = peer.session.compare_and_swap(&ended, Some(Arc::clone(&fresh)));
                match (&*seen, &ended) {
                    // Somebody else was faster.
                    (Some(other), None) => Arc::clone(other),
                    (Some(other), Some(ended)) if !Arc::ptr_eq(other, ended) => Arc::clone(other),
                    _ => fresh,
                }
            }
        };
        cell.get_or_try_init(|| self.open(peer)).await?;
        Ok(cell)
    }

    fn open(&self, peer: &Arc<Peer>) -> impl Future<Output = Result<ClientSession, CallError>> + Send {
        let (cross, peer) = (self.clone(), Arc::clone(peer));
        async move {
            let not_opened = |what: String| CallError::NotExecuted(format!("no session: {what}"));
            let key = cross.0.keys.own().ok_or_else(|| {
                not_opened("cross_center.keys has no key of this center to sign with".to_owned())
            })?;
            let opening = Opening::new(key, &peer.center, None);
            let body = serde_json::to_vec(opening.hello()).map_err(|error| not_opened(error.to_string()))?;
            let asked = Instant::now();
            let mac = MacKey::new(&key.secret);
            let request = cross.request(&peer, SESSIONS, body.into(), &key.id, &mac, 0)?;
            let answered = tokio::time::timeout(HANDSHAKE_TIMEOUT, cross.exchange(request))
                .await
                .map_err(|_| not_opened("no answer in time".to_owned()))?;
            let (status, answer) = answered.map_err(|error| not_opened(error.to_string()))?;
            if status != StatusCode::OK {
                let code = serde_json::from_slice::<Problem>(&answer).map(|problem| problem.code);
                let code = code.unwrap_or_else(|_| status.to_string());
                tracing::warn!(center = %peer.center, url = peer.url, code, "another center refuses a session");
                return Err(not_opened(format!("refused with {code}")));
            }
            let welcome: Welcome =
                serde_json::from_slice(&answer).map_err(|error| not_opened(error.to_string()))?;
            opening.finish(&welcome, asked).map_err(|error| {
                tracing::warn!(center = %peer.center, url = peer.url, %error, "another center's session is not believed");
                not_opened(error.to_string())
            })
        }
    }

    fn request(
        &self,
        peer: &Peer,
        path: &str,
        body: Bytes,
        key_id: &str,
        key: &MacKey,
        seq: u64,
    ) -> Result<Request<Full<Bytes>>, CallError> {
        let failed = |error: &dyn std::fmt::Display| CallError::NotExecuted(error.to_string());
        let uri: Uri =
            format!("{}{path}", peer.url.trim_end_matches('/')).parse().map_err(|error| failed(&error))?;
        let json = HeaderValue::from_static("application/json");
        let request =
            Request::post(uri).header(CONTENT_TYPE, json).body(()).map_err(|error| failed(&error))?;
        let (mut parts, ()) = request.into_parts();
        let signing = Signing { key_id, key, epoch: self.epoch().0, seq, now_s: Now::read().unix_s };
        sign(&mut parts, &body, &signing).map_err(|error| failed(&error))?;
        Ok(Request::from_parts(parts, Full::new(body)))
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), CallError> {
        let response = self.0.http.request(request).await.map_err(|error| {
            // What never had a connection was never sent.
            if error.is_connect() {
                CallError::NotExecuted(chain(&error))
            } else {
                CallError::Unknown(chain(&error))
            }
        })?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, MAX_ANSWER_BYTES).collect().await;
        let body = body.map_err(|error| CallError::Unknown(error.to_string()))?;
        Ok((parts.status, body.to_bytes()))
    }
}

impl Peer {
    /// The other side does not know the session any more: the next call opens another one.
    fn forget(&self, session: &Arc<OnceCell<ClientSession>>) {
        self.session.compare_and_swap(&Some(Arc::clone(session)), None);
    }
}

/// What of a problem matters here.
#[derive(Deserialize)]
struct Problem {
    code: String,
    #[serde(default)]
    executed: Option<String>,
}

enum Judged {
    Session(Refusal),
    Failed(CallError),
}

/// What an answer other than 200 means for the call.
fn judged(status: StatusCode, answer: &[u8]) -> Judged {
    let problem = serde_json::from_slice::<Problem>(answer).ok();
    let code = problem.as_ref().map_or("", |problem| problem.code.as_str());
    let refusal = Refusal::from_code(code).filter(|_| status == StatusCode::UNAUTHORIZED);
    let text = format!("{} {code}", status.as_u16());
    Judged::Failed(match refusal {
        Some(refusal) if refusal.wants_session() => return Judged::Session(refusal),
        // Something on the way sent it twice: the first copy may have been executed.
        Some(Refusal::Replayed) => CallError::Unknown(text),
        Some(_) => CallError::NotExecuted(text),
        None if status.is_client_error() => CallError::NotExecuted(text),
        None => match problem.and_then(|problem| problem.executed).as_deref() {
            Some("no") => CallError::NotExecuted(text),
            _ => CallError::Unknown(text),
        },
    })
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
