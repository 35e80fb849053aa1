//! The registry that every module registers its metrics with, and the metrics of the HTTP listeners.
//!
//! What a purchase touches is an array of plain counters, indexed by route and status class: no lock, no hash,
//! no allocation. Labels appear only when somebody reads `/metrics`.

use std::fmt;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

/// Upper bounds of the duration histogram in seconds: from a refusal in memory to the purchase deadline.
const BOUNDS_S: [f64; 14] =
    [0.000_25, 0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.25, 0.5, 1.0, 5.0];
/// Routes that can be told apart; the routers have fewer.
const MAX_ROUTES: usize = 80;
/// Outcomes of purchases that can be told apart.
const MAX_OUTCOMES: usize = 64;

/// A registry of metrics; every name gets the prefix `seckill_`.
pub struct Metrics {
    registry: Mutex<Registry>,
    http: Arc<HttpMetrics>,
}

/// What other modules hand to [`Metrics::register`].
pub type Registration<'a> = &'a mut Registry;

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

impl Metrics {
    /// A registry with the metrics of the HTTP listeners.
    pub fn new() -> Metrics {
        let http = Arc::new(HttpMetrics::default());
        let mut registry = Registry::with_prefix("seckill");
        registry.register_collector(Box::new(HttpCollector(Arc::clone(&http))));
        Metrics { registry: Mutex::new(registry), http }
    }

    /// Lets a module register its metrics: names without the prefix, base units, no user or order labels.
    pub fn register(&self, register: impl FnOnce(Registration<'_>)) {
        register(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// All metrics in the OpenMetrics text format.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::with_capacity(16 * 1024);
        text::encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(text)
    }

    /// Starts the clock of a request to `route` (an index below 64 with a fixed name, see
    /// [`Metrics::name_route`]). The timer counts the request as in flight until it is dropped.
    pub fn request(self: &Arc<Metrics>, route: usize) -> RequestTimer {
        self.http.in_flight.fetch_add(1, Ordering::Relaxed);
        RequestTimer { metrics: Arc::clone(&self.http), route, started: Instant::now() }
    }

    /// Gives a route its name in `/metrics`. Done once per route when the router is built.
    pub fn name_route(&self, route: usize, name: &str) {
        let mut names = self.http.route_names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = names.get_mut(route) {
            *slot = Some(name.into());
        }
    }

    /// Counts the outcome of a purchase.
    pub fn purchase(&self, outcome: PurchaseOutcome) {
        if let Some(counter) = self.http.purchases.get(outcome.index) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Names the outcomes that [`Metrics::purchase`] counts, by index.
    pub fn name_purchase_outcomes(&self, names: impl IntoIterator<Item = (usize, &'static str)>) {
        let mut slots = self.http.outcome_names.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, name) in names {
            if let Some(slot) = slots.get_mut(index) {
                *slot = Some(name);
            }
        }
    }

    /// Counts one open event stream until the guard is dropped.
    pub fn stream(self: &Arc<Metrics>) -> InFlight {
        self.http.streams.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(&self.http))
    }
}

/// Index of a purchase's outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PurchaseOutcome {
    /// Below 48; its name was given by [`Metrics::name_purchase_outcomes`].
    pub index: usize,
}

/// The hundreds of a status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusClass {
    /// 2xx and 3xx: served.
    Served,
    /// 4xx: refused.
    Refused,
    /// 5xx: could not be served.
    Failed,
    /// The client went away before the answer.
    Abandoned,
}

impl StatusClass {
    const ALL: [StatusClass; 4] =
        [StatusClass::Served, StatusClass::Refused, StatusClass::Failed, StatusClass::Abandoned];

    /// The class of a status code.
    pub fn of(status: u16) -> StatusClass {
        match status {
            0..400 => StatusClass::Served,
            400..500 => StatusClass::Refused,
            _ => StatusClass::Failed,
        }
    }

    fn label(self) -> &'static str {
        match self {
            StatusClass::Served => "2xx",
            StatusClass::Refused => "4xx",
            StatusClass::Failed => "5xx",
            StatusClass::Abandoned => "abandoned",
        }
    }
}

/// Measures one request.
#[must_use = "a timer that is dropped counts the request as abandoned"]
pub struct RequestTimer {
    metrics: Arc<HttpMetrics>,
    route: usize,
    started: Instant,
}

impl RequestTimer {
    /// The answer is ready.
    pub fn done(mut self, class: StatusClass) {
        self.record(class);
    }

    fn record(&mut self, class: StatusClass) {
        // Taken once: `drop` runs after `done`.
        let route = std::mem::replace(&mut self.route, usize::MAX);
        if let Some(classes) = self.metrics.durations.get(route) {
            classes[class as usize].observe(self.started.elapsed());
        }
    }
}

impl Drop for RequestTimer {
    fn drop(&mut self) {
        if self.route != usize::MAX {
            self.record(StatusClass::Abandoned);
        }
        self.metrics.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts an open event stream while it lives.
pub struct InFlight(Arc<HttpMetrics>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Durations {
    buckets: [AtomicU64; BOUNDS_S.len() + 1],
    sum_ns: AtomicU64,
}

impl Durations {
    fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS_S.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS_S.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }
}

struct HttpMetrics {
    in_flight: AtomicI64,
    streams: AtomicI64,
    durations: Box<[[Durations; 4]]>,
    purchases: [AtomicU64; MAX_OUTCOMES],
    route_names: Mutex<[Option<Box<str>>; MAX_ROUTES]>,
    outcome_names: Mutex<[Option<&'static str>; MAX_OUTCOMES]>,
}

impl Default for HttpMetrics {
    fn default() -> Self {
        HttpMetrics {
            in_flight: AtomicI64::new(0),
            streams: AtomicI64::new(0),
            durations: (0..MAX_ROUTES).map(|_| Default::default()).collect(),
            purchases: std::array::from_fn(|_| AtomicU64::new(0)),
            route_names: Mutex::new([const { None }; MAX_ROUTES]),
            outcome_names: Mutex::new([None; MAX_OUTCOMES]),
        }
    }
}

struct HttpCollector(Arc<HttpMetrics>);

impl fmt::Debug for HttpCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HttpCollector")
    }
}

impl Collector for HttpCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let http = &self.0;
        let gauge = ConstGauge::new(http.in_flight.load(Ordering::Relaxed));
        gauge.encode(encoder.encode_descriptor(
            "http_requests_in_flight",
            "Requests that have no answer yet",
            None,
            MetricType::Gauge,
        )?)?;
        let gauge = ConstGauge::new(http.streams.load(Ordering::Relaxed));
        gauge.encode(encoder.encode_descriptor(
            "event_streams",
            "Open event streams (SSE)",
            None,
            MetricType::Gauge,
        )?)?;

        let names = *http.outcome_names.lock().unwrap_or_else(PoisonError::into_inner);
        let mut purchases = encoder.encode_descriptor(
            "purchases",
            "Purchases by outcome: accepted, replayed, or the problem's code",
            None,
            MetricType::Counter,
        )?;
        for (name, count) in names.iter().zip(&http.purchases) {
            let Some(name) = name else { continue };
            let counter = ConstCounter::new(count.load(Ordering::Relaxed));
            counter.encode(purchases.encode_family(&[("code", *name)])?)?;
        }

        let names = http.route_names.lock().unwrap_or_else(PoisonError::into_inner);
        let mut durations = encoder.encode_descriptor(
            "http_request_duration",
            "Time from a request's head to its answer's head",
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (name, classes) in names.iter().zip(&http.durations) {
            let Some(name) = name else { continue };
            for class in StatusClass::ALL {
                let series = &classes[class as usize];
                let mut count = 0;
                let mut buckets = [(f64::MAX, 0); BOUNDS_S.len() + 1];
                for (index, bucket) in series.buckets.iter().enumerate() {
                    let here = bucket.load(Ordering::Relaxed);
                    count += here;
                    buckets[index] = (BOUNDS_S.get(index).copied().unwrap_or(f64::MAX), here);
                }
                if count == 0 {
                    continue;
                }
                let sum_s = series.sum_ns.load(Ordering::Relaxed) as f64 / 1e9;
                durations
                    .encode_family(&[("route", &**name), ("status", class.label())])?
                    .encode_histogram::<[(&str, &str); 0]>(sum_s, count, &buckets, None)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_route_and_class() {
        let metrics = Arc::new(Metrics::new());
        metrics.name_route(3, "/v1/sales");
        metrics.name_purchase_outcomes([(0, "accepted"), (1, "sold_out")]);
        metrics.request(3).done(StatusClass::of(200));
        metrics.request(3).done(StatusClass::of(429));
        drop(metrics.request(3));
        let open = metrics.request(3);
        metrics.purchase(PurchaseOutcome { index: 1 });
        let stream = metrics.stream();
        let text = metrics.encode().unwrap();
        for line in [
            "seckill_http_requests_in_flight 1",
            "seckill_event_streams 1",
            r#"seckill_purchases_total{code="sold_out"} 1"#,
            r#"seckill_http_request_duration_seconds_count{route="/v1/sales",status="2xx"} 1"#,
            r#"seckill_http_request_duration_seconds_count{route="/v1/sales",status="4xx"} 1"#,
            r#"seckill_http_request_duration_seconds_count{route="/v1/sales",status="abandoned"} 1"#,
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        drop((open, stream));
        assert!(metrics.encode().unwrap().contains("seckill_http_requests_in_flight 0"));
    }

    #[test]
    fn modules_register_under_the_prefix() {
        let metrics = Metrics::new();
        let counter = prometheus_client::metrics::counter::Counter::<u64>::default();
        metrics.register(|registry| registry.register("releases", "Released orders", counter.clone()));
        counter.inc();
        assert!(metrics.encode().unwrap().contains("seckill_releases_total 1"));
    }
}
