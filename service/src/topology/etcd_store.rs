//! The topology in etcd: for centers on different hosts.
//!
//! The document lies under one key. A change is a transaction that compares the key's revision; every reader
//! follows by a watch and confirms by linearizable reads. Nothing here trusts a call to end by itself: each has
//! a timeout, and a change that ran into one is looked up, never taken as failed.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, Identity, KeyValue,
    TlsOptions, Txn, TxnOp, TxnOpResponse, WatchOptions, WatchStream,
};
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use serde::Serialize;
use tokio::sync::OnceCell;

use super::document::Topology;
use super::store::{Changes, MAX_BYTES, Revision, StoreError, TopologyStore, Versioned, parse};

/// A connection that is silent for this long is asked for a sign of life, and given up after as long again: a
/// server that hangs, or a link that swallows packets, is noticed although nothing refuses.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// A change without an answer is sent again (it happens once at most, because it names the revision it replaces)
/// for so many timeouts; then its outcome stays unknown.
const SETTLE_TIMEOUTS: u32 = 3;
/// Between two attempts to learn how a change ended.
const SETTLE_PAUSE: Duration = Duration::from_millis(50);
/// How many later changes are looked behind to find out whether an unanswered one happened.
const HISTORY_MAX: usize = 64;
/// The field of the stored document that names the change: two writers that want the same are told apart by it.
const MARK: &str = "change";

/// How to reach etcd.
#[derive(Clone)]
pub struct EtcdOptions {
    /// `http://HOST:PORT` or `https://HOST:PORT` of its members, at least one.
    pub endpoints: Vec<String>,
    /// What all keys begin with, such as `/seckill`.
    pub prefix: String,
    /// User and password.
    pub user: Option<(String, String)>,
    /// The PEM of the authority that signed the members' certificates; the system's roots without it.
    pub ca_pem: Option<Vec<u8>>,
    /// The PEMs of this client's certificate and its key.
    pub identity_pem: Option<(Vec<u8>, Vec<u8>)>,
    /// A call without an answer after this long has failed, or has an unknown outcome if it changes something.
    pub request_timeout: Duration,
    /// A connection that is not there after this long has failed.
    pub connect_timeout: Duration,
    /// How often the topology is read to confirm the authority.
    pub confirm_interval: Duration,
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .finish_non_exhaustive()
    }
}

impl EtcdOptions {
    fn connect_options(&self) -> ConnectOptions {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.connect_timeout)
            .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE)
            .with_keep_alive_while_idle(true)
            .with_tcp_keepalive(KEEP_ALIVE)
            // A member that has lost its leader refuses instead of showing what it last heard.
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if let Some((name, password)) = &self.user {
            options = options.with_user(name, password);
        }
        if self.endpoints.iter().any(|endpoint| endpoint.starts_with("https://")) {
            let mut tls = TlsOptions::new();
            tls = match &self.ca_pem {
                Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
                None => tls.with_native_roots(),
            };
            if let Some((certificate, key)) = &self.identity_pem {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            options = options.with_tls(tls);
        }
        options
    }
}

/// The store. Cheap to clone; all clones share their connections.
#[derive(Clone)]
pub struct EtcdStore {
    shared: Arc<Shared>,
}

struct Shared {
    options: EtcdOptions,
    key: String,
    /// Made at the first use, because with a password that takes an answer of the server.
    client: OnceCell<Client>,
}

impl fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("EtcdStore").field(&self.shared.options).finish()
    }
}

/// How a call to etcd ended that brought nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server said no, and will say it again: nothing happened.
    Refused(String),
    /// The server said no for now: nothing happened.
    Declined(String),
    /// No answer, or none that says what happened.
    Unanswered(String),
    /// The revision that was asked for is not kept any more.
    Compacted,
}

impl Failure {
    pub(super) fn reason(self) -> String {
        match self {
            Failure::Refused(reason) | Failure::Declined(reason) | Failure::Unanswered(reason) => reason,
            Failure::Compacted => "the revision was compacted".to_owned(),
        }
    }
}

impl From<etcd_client::Error> for Failure {
    fn from(error: etcd_client::Error) -> Failure {
        let etcd_client::Error::GRpcStatus(status) = &error else {
            return Failure::Unanswered(error.to_string());
        };
        let message = format!("{} ({})", status.message(), status.code().description());
        // By number (the gRPC specification's), so that the client's own version of the type does not matter here.
        match i32::from(status.code()) {
            // OUT_OF_RANGE is what etcd answers for a compacted revision.
            11 => Failure::Compacted,
            // RESOURCE_EXHAUSTED: no space left, or too many requests.
            8 => Failure::Declined(message),
            // INVALID_ARGUMENT, NOT_FOUND, PERMISSION_DENIED, FAILED_PRECONDITION, UNIMPLEMENTED, UNAUTHENTICATED
            3 | 5 | 7 | 9 | 12 | 16 => Failure::Refused(message),
            _ => Failure::Unanswered(message),
        }
    }
}

impl EtcdStore {
    /// A store under the prefix of `options`. Connects at the first use.
    pub fn new(options: EtcdOptions) -> EtcdStore {
        let key = format!("{}/topology", options.prefix);
        EtcdStore { shared: Arc::new(Shared { options, key, client: OnceCell::new() }) }
    }

    pub(super) fn options(&self) -> &EtcdOptions {
        &self.shared.options
    }

    pub(super) async fn client(&self) -> Result<Client, Failure> {
        let options = self.options();
        let connect = self.shared.client.get_or_try_init(|| async {
            self.bounded(Client::connect(&options.endpoints, Some(options.connect_options()))).await
        });
        connect.await.cloned()
    }

    /// Waits for an answer as long as one may take.
    pub(super) async fn bounded<T>(
        &self,
        call: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, Failure> {
        let timeout = self.options().request_timeout;
        match tokio::time::timeout(timeout, call).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(Failure::Unanswered(format!("no answer within {} ms", timeout.as_millis()))),
        }
    }

    pub(super) fn unavailable(&self, action: &'static str, failure: Failure) -> StoreError {
        let place = self.place();
        match failure {
            Failure::Refused(reason) => StoreError::Refused { action, place, reason },
            failure @ (Failure::Declined(_) | Failure::Unanswered(_) | Failure::Compacted) => {
                StoreError::Unavailable { action, place, reason: failure.reason() }
            }
        }
    }

    fn malformed(&self, reason: String) -> StoreError {
        StoreError::Malformed { place: self.place(), reason }
    }

    fn unknown(&self, reason: String) -> StoreError {
        StoreError::Unknown { place: self.place(), reason }
    }

    /// Reads the key, now (linearizable) or as it was at a revision; with the store's own revision at the read.
    async fn get(&self, at: Option<i64>) -> Result<(Option<KeyValue>, i64), Failure> {
        let mut kv = self.client().await?.kv_client();
        let options = at.map(|revision| GetOptions::new().with_revision(revision));
        let mut answer = self.bounded(kv.get(self.shared.key.as_str(), options)).await?;
        let now = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok((answer.take_kvs().pop(), now))
    }

    fn read(&self, found: &KeyValue) -> Result<Versioned, StoreError> {
        if found.value().len() > MAX_BYTES {
            return Err(self.malformed(format!("{} bytes are too many", found.value().len())));
        }
        let (_, topology) = parse(found.value(), MARK).map_err(|reason| self.malformed(reason))?;
        Ok(Versioned { revision: revision(found), topology: Arc::new(topology) })
    }

    async fn load_now(&self) -> Result<Versioned, StoreError> {
        match self.get(None).await {
            Ok((Some(found), _)) => self.read(&found),
            Ok((None, _)) => Err(StoreError::Missing { place: self.place() }),
            Err(failure) => Err(self.unavailable("read", failure)),
        }
    }

    async fn change(&self, expected: Option<Revision>, topology: &Topology) -> Result<Revision, StoreError> {
        #[derive(Serialize)]
        struct Stored<'a> {
            change: &'a str,
            #[serde(flatten)]
            topology: &'a Topology,
        }
        topology.check().map_err(|reason| self.malformed(reason))?;
        let change = format!("{:032x}", rand::random::<u128>());
        let value = serde_json::to_vec(&Stored { change: &change, topology })
            .map_err(|error| self.malformed(error.to_string()))?;
        let deadline = Instant::now() + self.options().request_timeout * SETTLE_TIMEOUTS;
        let mut unanswered = false;
        loop {
            let failure = match self.put(expected, &value).await {
                Ok(Put::Done(revision)) => return Ok(revision),
                Ok(Put::Found(found)) if unanswered => return self.settle(expected, &change, found).await,
                Ok(Put::Found(found)) => {
                    return Err(StoreError::Conflict { found: found.as_ref().map(revision) });
                }
                Err(failure) => failure,
            };
            match failure {
                Failure::Refused(_) | Failure::Declined(_) | Failure::Compacted if !unanswered => {
                    return Err(self.unavailable("changed", failure));
                }
                Failure::Refused(reason) | Failure::Declined(reason) | Failure::Unanswered(reason) => {
                    unanswered = true;
                    if Instant::now() >= deadline {
                        return Err(self.unknown(reason));
                    }
                }
                Failure::Compacted => return Err(self.unknown(failure.reason())),
            }
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
    }

    async fn put(&self, expected: Option<Revision>, value: &[u8]) -> Result<Put, Failure> {
        let key = self.shared.key.as_str();
        let mut kv = self.client().await?.kv_client();
        // A key that is not there has revision 0.
        let at = expected.map_or(0, |expected| i64::try_from(expected.0).unwrap_or(i64::MAX));
        let transaction = Txn::new()
            .when([Compare::mod_revision(key, CompareOp::Equal, at)])
            .and_then([TxnOp::put(key, value, None)])
            .or_else([TxnOp::get(key, None)]);
        let answer = self.bounded(kv.txn(transaction)).await?;
        if answer.succeeded() {
            let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
            return Ok(Put::Done(Revision(u64::try_from(revision).unwrap_or(0))));
        }
        let found = answer.op_responses().into_iter().find_map(|response| match response {
            TxnOpResponse::Get(mut found) => found.take_kvs().pop(),
            _ => None,
        });
        Ok(Put::Found(found))
    }

    /// The key has moved on from `expected`, so a change that had no answer can not happen any more. Whether it
    /// did is in the key's history.
    async fn settle(
        &self,
        expected: Option<Revision>,
        change: &str,
        found: Option<KeyValue>,
    ) -> Result<Revision, StoreError> {
        let conflict = StoreError::Conflict { found: found.as_ref().map(revision) };
        let mut at = found;
        for _ in 0..HISTORY_MAX {
            let Some(record) = &at else {
                // Nothing was there, as expected, or it was deleted.
                return Err(if expected.is_none() {
                    conflict
                } else {
                    self.unknown("the key is gone".to_owned())
                });
            };
            if Some(revision(record)) == expected {
                return Err(conflict);
            }
            let written = parse(record.value(), MARK).map(|(mark, _)| mark);
            if written.is_ok_and(|mark| mark == change) {
                return Ok(revision(record));
            }
            at = match self.get(Some(record.mod_revision() - 1)).await {
                Ok((before, _)) => before,
                Err(failure) => return Err(self.unknown(failure.reason())),
            };
        }
        Err(self.unknown(format!("it was followed by more than {HISTORY_MAX} others")))
    }
}

enum Put {
    Done(Revision),
    Found(Option<KeyValue>),
}

fn revision(record: &KeyValue) -> Revision {
    Revision(u64::try_from(record.mod_revision()).unwrap_or(0))
}

impl TopologyStore for EtcdStore {
    fn load(&self) -> BoxFuture<'_, Result<Versioned, StoreError>> {
        self.load_now().boxed()
    }

    fn compare_and_set<'a>(
        &'a self,
        expected: Option<Revision>,
        topology: &'a Topology,
    ) -> BoxFuture<'a, Result<Revision, StoreError>> {
        self.change(expected, topology).boxed()
    }

    fn watch(&self, after: Revision) -> Changes {
        let watch = Watch { store: self.clone(), stream: None, next: after.0.saturating_add(1), after };
        futures_util::stream::try_unfold(watch, async |mut watch| {
            let change = watch.change().await?;
            Ok(Some((change, watch)))
        })
        .boxed()
    }

    fn confirm_interval(&self) -> Duration {
        self.options().confirm_interval
    }

    fn place(&self) -> String {
        format!("{} of etcd at {}", self.shared.key, self.options().endpoints.join(", "))
    }
}

/// A watch on the key, resumed from the revision after the last one that is known.
struct Watch {
    store: EtcdStore,
    stream: Option<WatchStream>,
    /// The first revision that is not known yet.
    next: u64,
    /// The last document that was told.
    after: Revision,
}

impl Watch {
    async fn change(&mut self) -> Result<Versioned, StoreError> {
        loop {
            let mut stream = match self.stream.take() {
                Some(stream) => stream,
                None => self.begin().await.map_err(|failure| self.store.unavailable("watched", failure))?,
            };
            let broke = |reason: String| self.store.unavailable("watched", Failure::Unanswered(reason));
            let message = match stream.message().await {
                Ok(Some(message)) => message,
                Ok(None) => return Err(broke("the watch was ended by the server".to_owned())),
                Err(error) => return Err(self.store.unavailable("watched", error.into())),
            };
            if message.canceled() && message.compact_revision() > 0 {
                if let Some(found) = self.list_again().await? {
                    return Ok(found);
                }
                continue;
            }
            if message.canceled() {
                return Err(broke(message.cancel_reason().to_owned()));
            }
            self.stream = Some(stream);
            if let Some(header) = message.header() {
                self.next = self.next.max(u64::try_from(header.revision()).unwrap_or(0).saturating_add(1));
            }
            let Some(event) = message.events().last() else { continue };
            match (event.event_type(), event.kv()) {
                (EventType::Put, Some(record)) => {
                    if let Some(found) = self.newer(record)? {
                        return Ok(found);
                    }
                }
                (EventType::Put, None) => {}
                (EventType::Delete, _) => return Err(StoreError::Missing { place: self.store.place() }),
            }
        }
    }

    async fn begin(&self) -> Result<WatchStream, Failure> {
        let mut client = self.store.client().await?.watch_client();
        let options = WatchOptions::new()
            .with_start_revision(i64::try_from(self.next).unwrap_or(i64::MAX))
            .with_progress_notify();
        self.store.bounded(client.watch(self.store.shared.key.as_str(), Some(options))).await
    }

    /// What lies between was compacted away: reads the key and goes on from there.
    async fn list_again(&mut self) -> Result<Option<Versioned>, StoreError> {
        let (found, now) =
            self.store.get(None).await.map_err(|failure| self.store.unavailable("read", failure))?;
        self.next = u64::try_from(now).unwrap_or(0).saturating_add(1);
        match found {
            Some(record) => self.newer(&record),
            None => Err(StoreError::Missing { place: self.store.place() }),
        }
    }

    fn newer(&mut self, record: &KeyValue) -> Result<Option<Versioned>, StoreError> {
        if revision(record) <= self.after {
            return Ok(None);
        }
        let found = self.store.read(record)?;
        self.after = found.revision;
        Ok(Some(found))
    }
}
