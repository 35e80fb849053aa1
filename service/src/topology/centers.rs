//! How centers get into the topology.

use std::collections::BTreeMap;

use seckill_domain::{CenterId, SHARDS};
use seckill_ledger::LedgerId;

use super::document::{Center, Durability, Extra, Limits, Topology, TopologyState};
use crate::config::{CenterSpec, ClusterConfig};

/// The home center of each shard of a new topology: as many for each, in stretches. With two centers the first has
/// 0–31, the second 32–63.
pub fn split_shards(centers: &[CenterId]) -> Vec<CenterId> {
    let shards = usize::from(SHARDS);
    (0..shards).filter_map(|shard| centers.get(shard * centers.len() / shards).cloned()).collect()
}

impl From<&CenterSpec> for Center {
    fn from(spec: &CenterSpec) -> Center {
        Center {
            number: spec.number,
            public_url: spec.public_url.clone(),
            admin_url: spec.admin_url.clone(),
            internal_url: spec.internal_url.clone(),
            ledger: spec.ledger.clone(),
            extra: Extra::new(),
        }
    }
}

impl Topology {
    /// What several centers start with. With durability `replicated` the state is `degraded` until the replicas
    /// have shown that they have everything.
    pub fn of_centers(ledger_id: LedgerId, cluster: &ClusterConfig, limits: Limits) -> Option<Topology> {
        let first = cluster.centers.first()?;
        let ids: Vec<CenterId> = cluster.centers.iter().map(|center| center.id.clone()).collect();
        let mut topology = Topology::single(ledger_id, first.id.clone(), first.into(), limits);
        topology.shard_owners = split_shards(&ids);
        topology.join(cluster).ok()?;
        Some(topology)
    }

    /// Adds the centers that are configured and not in the topology yet, without shards, and brings the addresses
    /// of the others up to date. Returns whether something changed.
    pub fn join(&mut self, cluster: &ClusterConfig) -> Result<bool, String> {
        let before: BTreeMap<CenterId, Center> = self.centers.clone();
        for spec in &cluster.centers {
            match self.centers.get_mut(&spec.id) {
                Some(known) if known.number != spec.number => {
                    return Err(format!(
                        "center {} has number {} in the topology and {} in the configuration; it is part of order \
                         ids and cannot change",
                        spec.id,
                        known.number.get(),
                        spec.number.get()
                    ));
                }
                Some(known) => *known = Center { extra: known.extra.clone(), ..spec.into() },
                None => {
                    if let Some((other, _)) = self.centers.iter().find(|(_, c)| c.number == spec.number) {
                        return Err(format!(
                            "center {} cannot join with number {}: center {other} has it",
                            spec.id,
                            spec.number.get()
                        ));
                    }
                    self.centers.insert(spec.id.clone(), spec.into());
                }
            }
        }
        if before.len() < 2 && self.centers.len() >= 2 {
            self.durability = cluster.durability;
            // Nobody has confirmed anything yet.
            if self.durability == Durability::Replicated {
                self.state = TopologyState::Degraded;
            }
        }
        Ok(before != self.centers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::new_ledger_id;

    fn spec(id: &str, number: u8) -> CenterSpec {
        serde_json::from_value(serde_json::json!({
            "id": id, "number": number, "public_url": "http://h:1", "admin_url": "http://h:2",
            "internal_url": "http://h:3", "ledger": [format!("h:{number}")],
        }))
        .unwrap()
    }

    fn cluster(ids: &[(&str, u8)]) -> ClusterConfig {
        let centers = ids.iter().map(|(id, number)| spec(id, *number)).collect();
        ClusterConfig { centers, ..ClusterConfig::default() }
    }

    #[test]
    fn two_centers_have_half_of_the_shards_each_and_begin_without_a_replica() {
        let both = cluster(&[("a", 1), ("b", 2)]);
        let topology = Topology::of_centers(new_ledger_id(), &both, Limits::default()).unwrap();
        topology.check().unwrap();
        let owners: Vec<&str> = topology.shard_owners.iter().map(CenterId::as_str).collect();
        assert_eq!((&owners[..32], &owners[32..]), (&["a"; 32][..], &["b"; 32][..]));
        assert_eq!(topology.state, TopologyState::Degraded);
        assert_eq!(topology.effective_durability(), Durability::Local);
        assert!(topology.in_sync.is_empty());
    }

    #[test]
    fn a_center_that_joins_gets_no_shards_and_keeps_its_number() {
        let limits = Limits::default();
        let mut topology = Topology::of_centers(new_ledger_id(), &cluster(&[("a", 1)]), limits).unwrap();
        assert_eq!(topology.state, TopologyState::Steady);
        assert_eq!(topology.join(&cluster(&[("a", 1), ("b", 2)])), Ok(true));
        assert_eq!(topology.join(&cluster(&[("a", 1), ("b", 2)])), Ok(false));
        topology.check().unwrap();
        assert!(topology.shard_owners.iter().all(|owner| owner.as_str() == "a"));
        assert_eq!((topology.durability, topology.state), (Durability::Replicated, TopologyState::Degraded));
        assert!(topology.join(&cluster(&[("b", 3)])).is_err());
        assert!(topology.join(&cluster(&[("c", 2)])).is_err());
    }
}
