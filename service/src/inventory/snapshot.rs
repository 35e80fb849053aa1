//! Snapshots: the sales in this process, so that no read touches Redis.
//!
//! One task copies what changed in the center's own Redis every ≤ 100 ms, and puts the master's heartbeat into
//! the ledger while this service has authority. `as_of` is the last heartbeat (or write) that the server
//! contained, `age_ms` its age when the snapshot was taken: a cut-off center shows how old its picture is.

use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash as _, Hasher as _};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use redis::aio::MultiplexedConnection;
use seckill_domain::{Currency, LedgerState, Millis, Money, OutboxId, SaleId, SaleKind, SalePhase};
use seckill_ledger::read::{Sale, Snapshot};
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::Target;
use super::metrics::InventoryMetrics;
use crate::config::InventoryConfig;
use crate::tasks::essential;
use crate::topology::Authority;

/// Sales read in one call; a call of this size takes Redis about 2 ms.
const PAGE: usize = 256;

/// All sales at one moment. Archived ones are not shown.
#[derive(Debug, Default)]
pub struct SalesView {
    sales: HashMap<SaleId, SaleView>,
    order: Vec<SaleId>,
    at: OutboxId,
    as_of: Millis,
    age_ms: u64,
    loaded: bool,
    list: OnceLock<Bytes>,
    list_etag: OnceLock<http::HeaderValue>,
}

/// One sale at that moment.
#[derive(Debug)]
pub struct SaleView {
    sale: Arc<Sale>,
    phase: SalePhase,
    as_of: Millis,
    age_ms: u64,
    body: OnceLock<Bytes>,
    etag: OnceLock<http::HeaderValue>,
}

/// A sale as shoppers see it.
#[derive(Serialize)]
struct PublicSale<'a> {
    sale_id: &'a SaleId,
    kind: SaleKind,
    title: &'a str,
    price: Money,
    currency: Option<Currency>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reference: Option<&'a str>,
    quantity: u64,
    remaining: u64,
    per_user_limit: u32,
    starts_at: Millis,
    ends_at: Option<Millis>,
    payment_ttl_s: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    discount: Option<Money>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_amount: Option<Money>,
    #[serde(skip_serializing_if = "Option::is_none")]
    valid_until: Option<Millis>,
    state: SalePhase,
    version: u64,
    as_of: Millis,
    age_ms: u64,
}

#[derive(Serialize)]
struct PublicSales<'a> {
    sales: Vec<PublicSale<'a>>,
    as_of: Millis,
    age_ms: u64,
}

impl SalesView {
    /// The body of `GET /v1/sales`: sales in the order of their ids.
    pub fn list(&self) -> Bytes {
        self.list
            .get_or_init(|| {
                let sales =
                    self.order.iter().filter_map(|id| self.sales.get(id)).map(SaleView::public).collect();
                json(&PublicSales { sales, as_of: self.as_of, age_ms: self.age_ms })
            })
            .clone()
    }

    /// A weak entity tag of the list: changes with any of its sales' tags.
    pub fn list_etag(&self) -> &http::HeaderValue {
        self.list_etag.get_or_init(|| {
            let mut hasher = std::hash::DefaultHasher::new();
            for (id, sale) in self.order.iter().filter_map(|id| Some((id, self.sales.get(id)?))) {
                id.hash(&mut hasher);
                sale.etag().hash(&mut hasher);
            }
            http::HeaderValue::try_from(format!("W/\"{:016x}\"", hasher.finish()))
                .unwrap_or_else(|_| http::HeaderValue::from_static("W/\"0\""))
        })
    }

    /// One sale.
    pub fn get(&self, id: &SaleId) -> Option<&SaleView> {
        self.sales.get(id)
    }

    /// All sales in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = &SaleView> {
        self.order.iter().filter_map(|id| self.sales.get(id))
    }

    /// Epoch and sequence of the last change that this picture contains.
    pub fn at(&self) -> OutboxId {
        self.at
    }

    /// The master's last heartbeat, or write, that this picture contains.
    pub fn as_of(&self) -> Millis {
        self.as_of
    }

    /// How old that was when the snapshot was taken, ms.
    pub fn age_ms(&self) -> u64 {
        self.age_ms
    }

    /// Whether any snapshot has been taken since the start.
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }
}

#[cfg(test)]
impl SalesView {
    /// A picture of one sale.
    pub(super) fn of_a_test(sale: Sale, at: OutboxId) -> SalesView {
        let id = sale.spec.sale_id.clone();
        let phase = SalePhase::at(sale.starts_at, sale.state, sale.starts_at, sale.ends_at, sale.remaining);
        let (body, etag) = (OnceLock::new(), OnceLock::new());
        let view = SaleView { sale: Arc::new(sale), phase, as_of: Millis(0), age_ms: 0, body, etag };
        let (order, loaded) = (vec![id.clone()], true);
        SalesView { sales: HashMap::from([(id, view)]), order, at, loaded, ..SalesView::default() }
    }
}

impl SaleView {
    /// The body of `GET /v1/sales/{id}`, made once for each snapshot.
    pub fn body(&self) -> Bytes {
        self.body.get_or_init(|| json(&self.public())).clone()
    }

    /// A weak entity tag: changes with anything but the picture's age.
    pub fn etag(&self) -> &http::HeaderValue {
        self.etag.get_or_init(|| {
            let phase = self.phase as u8;
            http::HeaderValue::try_from(format!("W/\"{}-{}-{phase}\"", self.sale.version, self.sale.touched))
                .unwrap_or_else(|_| http::HeaderValue::from_static("W/\"0\""))
        })
    }

    /// The sale as the ledger had it.
    pub fn sale(&self) -> &Sale {
        &self.sale
    }

    /// Where the sale stood.
    pub fn phase(&self) -> SalePhase {
        self.phase
    }

    fn public(&self) -> PublicSale<'_> {
        let Sale { spec, .. } = &*self.sale;
        PublicSale {
            sale_id: &spec.sale_id,
            kind: spec.kind,
            title: &spec.title,
            price: spec.price,
            currency: spec.currency,
            reference: spec.reference.as_deref(),
            quantity: self.sale.total,
            remaining: self.sale.remaining,
            per_user_limit: spec.per_user_limit,
            starts_at: self.sale.starts_at,
            ends_at: self.sale.ends_at,
            payment_ttl_s: spec.payment_ttl_s,
            discount: spec.discount,
            min_amount: spec.min_amount,
            valid_until: spec.valid_until,
            state: self.phase,
            version: self.sale.version,
            as_of: self.as_of,
            age_ms: self.age_ms,
        }
    }
}

fn json(value: &impl Serialize) -> Bytes {
    // Plain structs of numbers and text: there is nothing in them that cannot be written.
    serde_json::to_vec(value).map(Bytes::from).unwrap_or_default()
}

/// Starts the task; the view is empty and not `loaded` until the first snapshot.
pub(super) fn start(
    target: &Target,
    config: &InventoryConfig,
    authority: Authority,
    metrics: Arc<InventoryMetrics>,
    tracker: &TaskTracker,
    (stop, fatal): (&CancellationToken, &CancellationToken),
) -> (Arc<ArcSwap<SalesView>>, watch::Receiver<u64>) {
    let view = Arc::new(ArcSwap::from_pointee(SalesView::default()));
    let (changed, subscribe) = watch::channel(0);
    let refresher = Refresher {
        target: target.clone(),
        conn: None,
        authority,
        heartbeat: Duration::from_millis(config.heartbeat_ms),
        last_heartbeat: None,
        known: BTreeMap::new(),
        seen: Seen::default(),
        view: Arc::clone(&view),
        changed,
        metrics,
    };
    let interval = Duration::from_millis(config.snapshot_interval_ms);
    essential("snapshots", tracker, fatal, refresher.run(interval, stop.clone()));
    (view, subscribe)
}

/// How much of which ledger has been copied.
#[derive(Default)]
struct Seen {
    fence: Option<String>,
    seq: u64,
}

struct Refresher {
    target: Target,
    conn: Option<MultiplexedConnection>,
    authority: Authority,
    heartbeat: Duration,
    last_heartbeat: Option<Instant>,
    known: BTreeMap<SaleId, Arc<Sale>>,
    seen: Seen,
    view: Arc<ArcSwap<SalesView>>,
    changed: watch::Sender<u64>,
    metrics: Arc<InventoryMetrics>,
}

impl Refresher {
    async fn run(mut self, interval: Duration, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            match self.refresh().await {
                Ok(()) if failing => {
                    failing = false;
                    tracing::info!("snapshots of the sales go on");
                }
                Ok(()) => {}
                Err(error) => {
                    self.conn = None;
                    self.metrics.snapshot_failures.inc();
                    if !failing {
                        failing = true;
                        tracing::warn!(%error, "snapshots of the sales fail; reads show the last one");
                    }
                }
            }
        }
    }

    async fn refresh(&mut self) -> Result<(), seckill_ledger::Error> {
        let mut conn = match self.conn.take() {
            Some(conn) => conn,
            None => self.target.connect().await?,
        };
        self.beat(&mut conn).await;
        let mut any = false;
        let last = loop {
            let page = seckill_ledger::read::snapshot(&mut conn, self.seen.seq, PAGE).await?;
            if page.seq < self.seen.seq || page.fence != self.seen.fence {
                // Another epoch or another ledger: what was copied may not be there any more.
                self.known.clear();
                any = true;
                self.seen = Seen { fence: page.fence, seq: 0 };
                continue;
            }
            let full = page.sales.len() + page.unreadable.len() >= PAGE;
            any |= self.take(&page);
            if !full {
                self.seen.seq = page.seq;
                break page;
            }
        };
        self.conn = Some(conn);
        self.show(&last);
        if any {
            self.changed.send_modify(|version| *version += 1);
        }
        Ok(())
    }

    /// Copies a page; tells whether it had anything in it.
    fn take(&mut self, page: &Snapshot) -> bool {
        for (id, error) in &page.unreadable {
            tracing::error!(sale_id = %id, %error, "a sale in the ledger cannot be read");
        }
        for sale in &page.sales {
            self.seen.seq = self.seen.seq.max(sale.touched);
            let id = sale.spec.sale_id.clone();
            if sale.state == LedgerState::Archived {
                self.known.remove(&id);
            } else {
                self.known.insert(id, Arc::new(sale.clone()));
            }
        }
        !page.sales.is_empty()
    }

    /// Puts the master's heartbeat into the ledger, if this service may write. A failure shows in `age_ms`.
    async fn beat(&mut self, conn: &mut MultiplexedConnection) {
        let now = Instant::now();
        if self.last_heartbeat.is_some_and(|last| now.duration_since(last) < self.heartbeat) {
            return;
        }
        if let Ok(grant) = self.authority.grant() {
            self.last_heartbeat = Some(now);
            if let Err(error) = seckill_ledger::admin::barrier(conn, &grant.fence).await {
                tracing::debug!(%error, "no heartbeat");
            }
        }
    }

    /// Publishes what is known.
    fn show(&self, last: &Snapshot) {
        let (clock, taken_at) = (last.clock, last.taken_at);
        let age_ms = taken_at.since_ms(clock);
        self.metrics.snapshot_age.set(age_ms as f64 / 1000.0);
        let now = taken_at.max(clock);
        let mut sales = HashMap::with_capacity(self.known.len());
        let mut order = Vec::with_capacity(self.known.len());
        for (id, sale) in &self.known {
            let phase = SalePhase::at(now, sale.state, sale.starts_at, sale.ends_at, sale.remaining);
            let view = SaleView {
                sale: Arc::clone(sale),
                phase,
                as_of: clock,
                age_ms,
                body: OnceLock::new(),
                etag: OnceLock::new(),
            };
            order.push(id.clone());
            sales.insert(id.clone(), view);
        }
        let at = super::sold_out::at(last.fence.as_deref(), last.seq);
        let view = SalesView {
            sales,
            order,
            at,
            as_of: clock,
            age_ms,
            loaded: true,
            list: OnceLock::new(),
            list_etag: OnceLock::new(),
        };
        self.view.store(Arc::new(view));
    }
}
