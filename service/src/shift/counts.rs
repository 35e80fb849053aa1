//! Shifts in the metrics. Each service counts those that it saw end, whoever ran them: whoever asks takes the largest.

use std::collections::HashSet;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio_util::sync::CancellationToken;

use crate::topology::{Shift, ShiftKind, ShiftMode, ShiftState, Topology, TopologyHandle};

/// What tells shifts apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    kind: &'static str,
    mode: &'static str,
    outcome: &'static str,
}

/// How many shifts there were, and how long the last one held purchases.
#[derive(Debug, Clone, Default)]
pub struct ShiftCounts {
    ended: Family<Labels, Counter>,
    running: Gauge,
    held: Gauge<f64, AtomicU64>,
}

impl ShiftCounts {
    /// Registers all of them; the registry's owner sets the prefix.
    pub fn register(&self, registry: &mut Registry) {
        let shifts = registry.sub_registry_with_prefix("shift");
        shifts.register("ended", "Shifts that this service saw end", self.ended.clone());
        shifts.register("running", "1 while a shift is under way", self.running.clone());
        let help = "How long the latest shift held purchases";
        shifts.register_with_unit("last_held", help, Unit::Seconds, self.held.clone());
    }

    /// Counts until the token is cancelled. What was over before is not counted.
    pub async fn run(self, topology: TopologyHandle, token: CancellationToken) {
        let mut changes = topology.subscribe();
        let mut known: HashSet<String> = ended(&changes.borrow()).map(|shift| shift.id.clone()).collect();
        loop {
            self.count(&changes.borrow_and_update().clone(), &mut known);
            match token.run_until_cancelled(changes.changed()).await {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return,
            }
        }
    }

    fn count(&self, topology: &Topology, known: &mut HashSet<String>) {
        let under_way = topology.shift.iter().map(AsRef::as_ref).chain(&topology.history);
        let running = under_way.into_iter().any(|shift| !shift.state.is_over());
        self.running.set(i64::from(running));
        for shift in ended(topology) {
            if !known.contains(&shift.id) {
                self.ended.get_or_create(&labels(shift)).inc();
            }
        }
        if let Some(held_ms) = topology.history.last().and_then(|shift| shift.held_ms) {
            self.held.set(std::time::Duration::from_millis(held_ms).as_secs_f64());
        }
        // The history is bounded, and with it what has to be known.
        *known = ended(topology).map(|shift| shift.id.clone()).collect();
    }
}

fn ended(topology: &Topology) -> impl Iterator<Item = &Shift> {
    topology.history.iter().filter(|shift| shift.state.is_over())
}

fn labels(shift: &Shift) -> Labels {
    Labels {
        kind: match shift.kind {
            ShiftKind::Master => "master",
            ShiftKind::Shards => "shards",
        },
        mode: match shift.mode {
            ShiftMode::Planned => "planned",
            ShiftMode::Forced => "forced",
        },
        outcome: match shift.state {
            ShiftState::Running => "running",
            ShiftState::Done => "done",
            ShiftState::Aborted => "aborted",
            ShiftState::Failed => "failed",
            ShiftState::Unknown => "unknown",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_shift_is_counted_once_when_it_is_over() {
        let counts = ShiftCounts::default();
        let center =
            serde_json::json!({ "number": 1, "public_url": "", "admin_url": "", "internal_url": "" });
        let mut topology: Topology = serde_json::from_value(serde_json::json!({
            "schema": 1, "ledger_id": "l", "epoch": 1, "master": "a", "state": "steady",
            "centers": { "a": center }, "shard_owners": vec!["a"; 64],
        }))
        .unwrap();
        let (mut known, mut shift) = (HashSet::new(), Shift::of_a_test());
        topology.shift = Some(Box::new(shift.clone()));
        counts.count(&topology, &mut known);
        assert_eq!(counts.running.get(), 1);
        topology.shift = None;
        topology.remember_shift(shift.clone());
        counts.count(&topology, &mut known);
        let done = || {
            counts
                .ended
                .get_or_create(&labels(&Shift { state: ShiftState::Done, ..Shift::of_a_test() }))
                .get()
        };
        assert_eq!((counts.running.get(), done()), (1, 0));
        (shift.state, shift.held_ms) = (ShiftState::Done, Some(1500));
        topology.remember_shift(shift);
        for _ in 0..2 {
            counts.count(&topology, &mut known);
            assert_eq!((counts.running.get(), done()), (0, 1));
        }
        assert!((counts.held.get() - 1.5).abs() < 1e-9);
    }
}
