//! The alerts and the dashboard in `deploy/` ask for metrics that exist.

use std::collections::BTreeSet;
use std::sync::Arc;

use seckill_domain::{CenterId, Epoch};
use seckill_ledger::Fence;

use super::{Metrics, PurchaseOutcome, StatusClass};
use crate::inventory::InventoryMetrics;
use crate::orders::{CenterLabel, KafkaMetrics, OrderMetrics};
use crate::shift::{GuardianMetrics, SettleMetrics};
use crate::topology::{Authority, new_ledger_id};

const ALERTS: &str = include_str!("../../../deploy/alerts.yml");
const DASHBOARD: &str = include_str!("../../../deploy/dashboard.json");

/// The names of all series that an instance can show.
fn shown() -> BTreeSet<String> {
    let metrics = Arc::new(Metrics::new());
    let fence = Fence { ledger_id: new_ledger_id(), epoch: Epoch(1), master: CenterId::new("a").unwrap() };
    let kafka = KafkaMetrics::default();
    kafka.lag.get_or_create_owned(&CenterLabel { center: "b".to_owned() });
    kafka.published.get_or_create_owned(&CenterLabel { center: "b".to_owned() });
    metrics.register(|registry| {
        InventoryMetrics::default().register(registry);
        OrderMetrics::default().register(registry);
        GuardianMetrics::default().register(registry);
        SettleMetrics::default().register(registry);
        Authority::fixed(fence).register(registry);
        kafka.register(registry);
    });
    metrics.name_route(0, "GET /v1/sales");
    metrics.request(0).done(StatusClass::of(200));
    metrics.name_purchase_outcomes([(0, "accepted")]);
    metrics.purchase(PurchaseOutcome { index: 0 });
    let text = metrics.encode().unwrap();
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .map(str::to_owned)
        .collect()
}

/// The names of this service's metrics in a text.
fn asked_for(text: &str) -> BTreeSet<String> {
    text.match_indices("seckill_")
        .map(|(at, _)| {
            let rest = &text[at..];
            let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
            rest[..end].to_owned()
        })
        .collect()
}

#[test]
fn alerts_and_dashboard_ask_for_metrics_that_exist() {
    let shown = shown();
    for (file, text, at_least) in [("alerts.yml", ALERTS, 15), ("dashboard.json", DASHBOARD, 20)] {
        let asked_for = asked_for(text);
        assert!(asked_for.len() >= at_least, "{file} asks for {} metrics only", asked_for.len());
        let unknown: Vec<&String> = asked_for.difference(&shown).collect();
        assert!(unknown.is_empty(), "{file} asks for {unknown:?}, which nobody shows");
    }
}
