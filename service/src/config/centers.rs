//! The configuration beside the centers that the topology names.

use std::collections::BTreeMap;

use super::load::ConfigError;
use super::validate::{PLAIN_CALLS, Warning, is_local};
use super::{Config, TopologyStoreKind};
use crate::topology::Topology;

impl Config {
    /// Compares with the topology that the configuration leads to. A topology in a file is refused when centers are
    /// on different hosts: each would have a file of its own, and both could be the master.
    pub fn check_centers(&self, topology: &Topology) -> Result<Vec<Warning>, ConfigError> {
        let urls: BTreeMap<&str, &str> =
            topology.centers.iter().map(|(id, center)| (id.as_str(), center.internal_url.as_str())).collect();
        let mut hosts: Vec<(&str, String)> = urls.iter().map(|(id, url)| (*id, host(url))).collect();
        let own = self.listen.internal_url();
        hosts.push((self.center.id.as_str(), host(&own)));
        let (first, at) = hosts[0].clone();
        let elsewhere = hosts.iter().find(|(_, host)| *host != at);
        if let (TopologyStoreKind::File, Some((other, host))) = (self.topology.store, elsewhere) {
            return Err(ConfigError::Key {
                key: "topology.store".to_owned(),
                reason: format!(
                    "a file is for centers on one machine, but center {first} is at {at} and center {other} at {host}; \
                     use store = \"etcd\""
                ),
                variable: None,
            });
        }
        // Those that the configuration lists, it has warned of.
        let listed = |id: &str| self.cluster.centers.iter().any(|center| center.id.as_str() == id);
        let plain = urls.into_iter().filter(|(id, _)| !listed(id));
        let plain = plain.filter(|(_, url)| url.starts_with("http://") && !is_local(url));
        Ok(plain
            .map(|(id, _)| Warning {
                key: format!("topology: centers.{id}.internal_url"),
                text: PLAIN_CALLS.to_owned(),
            })
            .collect())
    }
}

/// The host of a URL; all names of this machine are one.
fn host(url: &str) -> String {
    if is_local(url) {
        return "this machine".to_owned();
    }
    let uri: Option<http::Uri> = url.parse().ok();
    uri.as_ref().and_then(http::Uri::host).unwrap_or(url).to_owned()
}

#[cfg(test)]
mod tests {
    use seckill_domain::{CenterId, CenterNumber};

    use super::*;
    use crate::topology::{Center, Extra, Limits, new_ledger_id};

    fn two_centers(a: &str, b: &str) -> Topology {
        let center = |number, url: &str| Center {
            number: CenterNumber::new(number).unwrap(),
            public_url: url.to_owned(),
            admin_url: url.to_owned(),
            internal_url: url.to_owned(),
            ledger: Vec::new(),
            extra: Extra::new(),
        };
        let id = CenterId::new("a").unwrap();
        let mut topology = Topology::single(new_ledger_id(), id, center(1, a), Limits::default());
        topology.centers.insert(CenterId::new("b").unwrap(), center(2, b));
        topology
    }

    fn config(store: TopologyStoreKind, internal_url: &str) -> Config {
        let mut config = Config::default();
        config.topology.store = store;
        config.listen.internal_url = Some(internal_url.to_owned());
        config
    }

    #[test]
    fn a_topology_in_a_file_is_refused_for_centers_on_different_hosts() {
        let here = two_centers("http://127.0.0.1:8082", "http://localhost:8092");
        let file = config(TopologyStoreKind::File, "http://127.0.0.1:8082");
        assert_eq!(file.check_centers(&here).unwrap(), []);
        let apart = two_centers("https://a.example:8082", "https://b.example:8082");
        let file = config(TopologyStoreKind::File, "https://a.example:8082");
        let refused = file.check_centers(&apart).unwrap_err().to_string();
        assert!(refused.starts_with("topology.store: ") && refused.contains("b.example"), "{refused}");
        let etcd = config(TopologyStoreKind::Etcd, "https://a.example:8082");
        assert_eq!(etcd.check_centers(&apart).unwrap(), []);
        // This center itself is not where the topology's are.
        let moved = config(TopologyStoreKind::File, "https://a.example:8082");
        assert!(moved.check_centers(&here).is_err());
    }

    #[test]
    fn plain_links_between_centers_are_warned_of() {
        let apart = two_centers("https://a.example:8082", "http://b.example:8082");
        let warnings =
            config(TopologyStoreKind::Etcd, "https://a.example:8082").check_centers(&apart).unwrap();
        assert_eq!(warnings.len(), 1);
        assert_eq!(warnings[0].key, "topology: centers.b.internal_url");
    }
}
