//! Event streams (SSE): a sale's course, an order's way.
//!
//! A stream shows what the GET shows: `data` is its body, `id` its version. It ends with an event `settled` when
//! nothing can change any more; a client that comes back after that gets 204, which stops an `EventSource` for
//! good. All streams end when the service drains.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures_util::Stream;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, LOCATION};
use http::{HeaderValue, StatusCode};
use seckill_domain::{CenterId, Clock, OrderId, SaleId, SalePhase, SystemClock};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Public;
use super::call::{Call, private_json};
use super::orders::Found;
use super::problem::{Code, Problem};
use super::relay::{SECKILL_HOME, Vouched};
use crate::admission::TICKET_TTL_S;
use crate::orders::Subscription;
use crate::telemetry::{InFlight, Metrics};

/// Streams of one instance at the same time: each costs a connection and some kilobytes.
const MAX_STREAMS: usize = 20_000;
/// A comment this often keeps proxies from closing a quiet stream.
const COMMENT_INTERVAL: Duration = Duration::from_secs(15);
/// A sale in full swing changes with every snapshot; nobody reads faster than this.
const SALE_EVENT_INTERVAL: Duration = Duration::from_millis(250);
/// A sale's phase also changes by the clock alone, which no snapshot announces.
const SALE_LOOK_INTERVAL: Duration = Duration::from_secs(1);
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// What all streams of a listener share.
pub(super) struct Streams {
    slots: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
}

impl Streams {
    pub(super) fn new(metrics: &Arc<Metrics>, shutdown: CancellationToken) -> Streams {
        Streams { slots: Arc::new(Semaphore::new(MAX_STREAMS)), metrics: Arc::clone(metrics), shutdown }
    }

    fn open(&self) -> Result<Slot, Problem> {
        match Arc::clone(&self.slots).try_acquire_owned() {
            Ok(permit) if !self.shutdown.is_cancelled() => {
                Ok(Slot { _permit: permit, _counted: self.metrics.stream() })
            }
            _ => Err(Problem::with_detail(Code::Overloaded, "Too many event streams are open")),
        }
    }
}

/// A place among the open streams.
struct Slot {
    _permit: OwnedSemaphorePermit,
    _counted: InFlight,
}

/// `GET /v1/sales/{id}/events`
pub(super) async fn sale(public: Arc<Public>, call: Call) -> Result<Response, Problem> {
    let id = call.sale_id(2)?;
    let address = call.peer().map(|peer| public.state.addresses.of(peer, call.headers()));
    public.state.limiter.anonymous(address)?;
    // Subscribed before the first look: no change is missed in between.
    let changes = public.state.inventory.subscribe();
    {
        let view = public.state.inventory.sales();
        let sale = view.get(&id).ok_or_else(|| Problem::new(Code::SaleNotFound))?;
        if sale.phase() == SalePhase::Ended
            && last_event_id(&call).is_some_and(|seen| seen >= sale.sale().version)
        {
            return Ok(no_more());
        }
    }
    let slot = public.streams.open()?;
    let stream = SaleEvents { public, id, changes, shown: None, next_comment: next_comment(), _slot: slot };
    Ok(event_stream(futures_util::stream::unfold(stream, SaleEvents::next)))
}

/// `GET /v1/orders/{id}/events`
pub(super) async fn order(public: Arc<Public>, call: Call) -> Result<Response, Problem> {
    #[derive(Deserialize)]
    struct Query {
        ticket: Option<String>,
    }
    let table = call.order_id(2)?.table();
    if let Some(home) = public.state.relay.other_home(table) {
        return at_home(&public, &call, &home);
    }
    let found = match call.query::<Query>()?.ticket {
        Some(ticket) => {
            let address = call.peer().map(|peer| public.state.addresses.of(peer, call.headers()));
            public.state.limiter.anonymous(address)?;
            let order_id = call.order_id(2)?;
            if !public.state.tickets.admits(&ticket, order_id, unix_s()) {
                return Err(Problem::with_detail(
                    Code::Unauthenticated,
                    "The ticket is not valid for this order",
                ));
            }
            public.find(order_id).await?
        }
        None => {
            let uid = public.owner(&call)?;
            public.find_own(&uid, call.order_id(2)?).await?
        }
    };
    let order_id = match &found {
        Found::Stored(order) => order.order_id,
        Found::Queued(record) => record.order_id,
    };
    let seen = last_event_id(&call);
    if found.is_settled() && seen.is_some_and(|seen| seen >= found.version()) {
        return Ok(no_more());
    }
    let slot = public.streams.open()?;
    let changes = public.state.updates.subscribe(order_id);
    let changes =
        changes.map_err(|_| Problem::with_detail(Code::Overloaded, "Too many event streams are open"))?;
    let stream = OrderEvents {
        public,
        order_id,
        changes,
        seen,
        finished: false,
        next_comment: next_comment(),
        _slot: slot,
    };
    Ok(event_stream(futures_util::stream::unfold(stream, OrderEvents::next)))
}

/// `POST /v1/orders/{id}/ticket`
pub(super) async fn ticket(public: Arc<Public>, mut call: Call) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Ticket {
        ticket: String,
        expires_in_s: u32,
        events_url: String,
    }
    let uid = public.owner(&call)?;
    if let Some(answer) = public.elsewhere(&mut call, uid.table(), Vouched::User(uid.clone())).await? {
        return Ok(answer);
    }
    let order_id = call.order_id(2)?;
    call.no_fields().await?;
    public.find_own(&uid, order_id).await?;
    let ticket = public.state.tickets.issue(order_id, unix_s());
    let events_url = format!("/v1/orders/{order_id}/events?ticket={ticket}");
    let mut response = private_json(&Ticket { ticket, expires_in_s: TICKET_TTL_S, events_url })?;
    *response.status_mut() = StatusCode::CREATED;
    Ok(response)
}

/// A stream is not passed on: the client is sent to the center that has the order.
fn at_home(public: &Public, call: &Call, home: &CenterId) -> Result<Response, Problem> {
    let topology = public.state.topology.current();
    let base = topology.center(home).map_or("", |center| center.public_url.as_str());
    let path = call.parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let location = HeaderValue::try_from(format!("{}{path}", base.trim_end_matches('/')));
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    response.headers_mut().insert(LOCATION, location.map_err(Problem::internal)?);
    response
        .headers_mut()
        .insert(SECKILL_HOME, HeaderValue::try_from(home.as_str()).map_err(Problem::internal)?);
    Ok(response)
}

fn unix_s() -> u32 {
    u32::try_from(SystemClock.now().0 / 1000).unwrap_or(u32::MAX)
}

fn last_event_id(call: &Call) -> Option<u64> {
    call.headers().get(LAST_EVENT_ID)?.to_str().ok()?.trim().parse().ok()
}

fn no_more() -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

fn event_stream(
    events: impl Stream<Item = Result<Bytes, std::convert::Infallible>> + Send + 'static,
) -> Response {
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies of the nginx family hold answers back otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

type Event = Result<Bytes, std::convert::Infallible>;

fn event(name: &str, id: u64, data: &[u8]) -> Event {
    // JSON of ours has no line breaks, so one `data` line holds it.
    let mut text = format!("event: {name}\nid: {id}\ndata: ").into_bytes();
    text.extend_from_slice(data);
    text.extend_from_slice(b"\n\n");
    Ok(text.into())
}

fn comment() -> Event {
    Ok(Bytes::from_static(b": still here\n\n"))
}

fn next_comment() -> Instant {
    Instant::now() + COMMENT_INTERVAL
}

struct SaleEvents {
    public: Arc<Public>,
    id: SaleId,
    changes: watch::Receiver<u64>,
    /// Tag of what was shown last, and when; none after the last event.
    shown: Option<(HeaderValue, Instant)>,
    next_comment: Instant,
    _slot: Slot,
}

impl SaleEvents {
    async fn next(mut self) -> Option<(Event, SaleEvents)> {
        loop {
            {
                let view = self.public.state.inventory.sales();
                // An archived sale is gone: so is its stream.
                let sale = view.get(&self.id)?;
                let version = sale.sale().version;
                match &self.shown {
                    Some((etag, _)) if etag == sale.etag() => {
                        if sale.phase() == SalePhase::Ended {
                            // It was shown as `settled`.
                            return None;
                        }
                    }
                    Some((_, at)) if at.elapsed() < SALE_EVENT_INTERVAL => {}
                    _ => {
                        let name = if sale.phase() == SalePhase::Ended { "settled" } else { "sale" };
                        let event = event(name, version, &sale.body());
                        self.shown = Some((sale.etag().clone(), Instant::now()));
                        self.next_comment = next_comment();
                        return Some((event, self));
                    }
                }
            }
            let too_soon = self.shown.as_ref().map(|(_, at)| *at + SALE_EVENT_INTERVAL);
            let look = Instant::now() + SALE_LOOK_INTERVAL;
            let shutdown = self.public.streams.shutdown.clone();
            tokio::select! {
                () = shutdown.cancelled() => return None,
                () = sleep_until(self.next_comment) => {
                    self.next_comment = next_comment();
                    return Some((comment(), self));
                }
                () = sleep_until(look) => {}
                changed = async {
                    if let Some(at) = too_soon {
                        sleep_until(at).await;
                    }
                    self.changes.changed().await
                } => changed.ok()?,
            }
        }
    }
}

struct OrderEvents {
    public: Arc<Public>,
    order_id: OrderId,
    changes: Subscription,
    /// Version of what the client has seen.
    seen: Option<u64>,
    finished: bool,
    next_comment: Instant,
    _slot: Slot,
}

impl OrderEvents {
    async fn next(mut self) -> Option<(Event, OrderEvents)> {
        if self.finished {
            return None;
        }
        loop {
            match self.public.find(self.order_id).await {
                Ok(found) if self.seen.is_none_or(|seen| found.version() > seen) => {
                    let name = if found.is_settled() { "settled" } else { "order" };
                    let event = event(name, found.version(), &serde_json::to_vec(&found).ok()?);
                    self.seen = Some(found.version());
                    self.finished = found.is_settled();
                    self.next_comment = next_comment();
                    return Some((event, self));
                }
                Ok(_) => {}
                // The client comes back and is told why.
                Err(_) => return None,
            }
            let shutdown = self.public.streams.shutdown.clone();
            tokio::select! {
                () = shutdown.cancelled() => return None,
                () = sleep_until(self.next_comment) => {
                    self.next_comment = next_comment();
                    return Some((comment(), self));
                }
                () = self.changes.changed() => {}
            }
        }
    }
}
