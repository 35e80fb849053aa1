//! Whether this service may write to the ledger, for `/metrics`: read when it is asked, because a lease also ends
//! while nobody looks.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::authority::{Authority, Cause};

/// `authority_granted`, and `authority_refused` with a series for each cause.
struct AuthorityCollector(Authority);

impl fmt::Debug for AuthorityCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthorityCollector").finish_non_exhaustive()
    }
}

impl Collector for AuthorityCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let refused = self.0.grant().err().map(|refusal| refusal.cause);
        let granted = ConstGauge::<i64>::new(i64::from(refused.is_none()));
        granted.encode(encoder.encode_descriptor(
            "authority_granted",
            "1 while this service may write to the ledger",
            None,
            MetricType::Gauge,
        )?)?;
        let mut metric = encoder.encode_descriptor(
            "authority_refused",
            "1 for the reason why this service may not write to the ledger; not_master is no fault",
            None,
            MetricType::Gauge,
        )?;
        for cause in Cause::ALL {
            let gauge = ConstGauge::<i64>::new(i64::from(refused == Some(cause)));
            gauge.encode(metric.encode_family(&[("cause", cause.as_str())])?)?;
        }
        Ok(())
    }
}

impl Authority {
    /// Adds the authority to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(AuthorityCollector(self.clone())));
    }
}
