//! `[kafka]`: the brokers, used with `queue = "kafka"`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use seckill_domain::CenterId;
use serde::Deserialize;

use super::validate::{Problem, is_local, problem, within};

/// What a property of the client library may be about: the way to the brokers. Everything else is the service's
/// own business.
const PROPERTIES: [&str; 5] = ["security.", "ssl.", "sasl.", "enable.ssl.", "enable.sasl."];
/// Properties that hold a secret: they come from files of their own.
const SECRETS: [&str; 5] = [
    "sasl.password",
    "ssl.key.password",
    "ssl.keystore.password",
    "ssl.key.pem",
    "sasl.oauthbearer.client.secret",
];
/// Kafka's own bound of a topic's name, less the longest of ours.
const MAX_PREFIX: usize = 249 - "seckill.dead-letter".len();

/// `[kafka]`: the brokers, used with `queue = "kafka"`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KafkaConfig {
    /// Brokers of this center: `HOST:PORT`, several with commas. Needed with `queue = "kafka"`. Default: none.
    pub bootstrap: String,
    /// TLS and SASL on the way there, as properties of librdkafka (`security.*`, `ssl.*`, `sasl.*`). Default: none.
    pub properties: BTreeMap<String, String>,
    /// Properties that are secrets, and the files that hold them. Default: none.
    pub secret_files: BTreeMap<String, PathBuf>,
    /// The brokers of the other centers: the master's relay writes to them. Default: none.
    pub centers: BTreeMap<CenterId, KafkaCluster>,
    /// Put in front of the topics' names `seckill.orders`, `seckill.sales`, `seckill.dead-letter`. Default: none.
    pub topic_prefix: String,
    /// Copies of each partition, where the service creates a topic; with three or more, a write is safe on all but
    /// one of them. Default: 3.
    pub replication_factor: u16,
}

impl Default for KafkaConfig {
    fn default() -> Self {
        KafkaConfig {
            bootstrap: String::new(),
            properties: BTreeMap::new(),
            secret_files: BTreeMap::new(),
            centers: BTreeMap::new(),
            topic_prefix: String::new(),
            replication_factor: 3,
        }
    }
}

/// `[kafka.centers.ID]`: another center's brokers.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KafkaCluster {
    /// Its brokers: `HOST:PORT`, several with commas.
    pub bootstrap: String,
    /// TLS and SASL on the way there.
    pub properties: BTreeMap<String, String>,
    /// Properties that are secrets, and the files that hold them.
    pub secret_files: BTreeMap<String, PathBuf>,
}

/// A secret of a property that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{property}: cannot read {path}: {reason}")]
pub struct KafkaSecretError {
    property: String,
    path: PathBuf,
    reason: String,
}

impl KafkaConfig {
    /// The brokers of this center.
    pub fn own(&self) -> KafkaCluster {
        KafkaCluster {
            bootstrap: self.bootstrap.clone(),
            properties: self.properties.clone(),
            secret_files: self.secret_files.clone(),
        }
    }

    pub(super) fn validate(&self, needed: bool, own: &CenterId) -> Result<(), Problem> {
        if needed || !self.bootstrap.is_empty() {
            self.own().validate("kafka")?;
        }
        for (id, cluster) in &self.centers {
            let key = format!("kafka.centers.{id}");
            if id == own {
                return problem(&key, "this center's own brokers belong to kafka.bootstrap");
            }
            cluster.validate(&key)?;
            let shared = |bootstrap: &str| {
                bootstrap.split(',').any(|broker| self.bootstrap.split(',').any(|own| own == broker))
            };
            if shared(&cluster.bootstrap) {
                return problem(
                    &format!("{key}.bootstrap"),
                    "is a broker of this center too: each center has a Kafka of its own",
                );
            }
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if self.topic_prefix.len() > MAX_PREFIX || !self.topic_prefix.bytes().all(allowed) {
            return problem(
                "kafka.topic_prefix",
                format!("must be at most {MAX_PREFIX} characters out of a-z, A-Z, 0-9, '.', '_' and '-'"),
            );
        }
        within("kafka.replication_factor", self.replication_factor, 1, 15)
    }

    pub(super) fn warnings(&self, warn: &mut dyn FnMut(&str, String)) {
        let clusters =
            self.centers.iter().map(|(id, cluster)| (format!("kafka.centers.{id}"), cluster.clone()));
        for (key, cluster) in std::iter::once(("kafka".to_owned(), self.own())).chain(clusters) {
            if !cluster.bootstrap.is_empty()
                && cluster.is_plain()
                && !cluster.bootstrap.split(',').all(|broker| is_local(&format!("kafka://{broker}")))
            {
                warn(
                    &format!("{key}.bootstrap"),
                    "plain text to other machines: orders can be read and forged on the way; set \
                     properties.\"security.protocol\" to SSL or SASL_SSL"
                        .to_owned(),
                );
            }
        }
        if !self.bootstrap.is_empty() && self.replication_factor < 3 {
            warn(
                "kafka.replication_factor",
                "below 3 the loss of a broker's disk may lose orders that wait in Kafka".to_owned(),
            );
        }
    }
}

impl KafkaCluster {
    fn validate(&self, key: &str) -> Result<(), Problem> {
        let broker = |text: &str| {
            text.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty()
                    && !host.contains(['/', ' '])
                    && port.parse::<u16>().is_ok_and(|port| port > 0)
            })
        };
        if !self.bootstrap.split(',').all(broker) {
            return problem(&format!("{key}.bootstrap"), "must be HOST:PORT, several with commas");
        }
        let properties = self.properties.keys().map(|name| (name, "properties"));
        let secrets = self.secret_files.keys().map(|name| (name, "secret_files"));
        for (name, section) in properties.chain(secrets) {
            if !PROPERTIES.iter().any(|allowed| name.starts_with(allowed)) {
                return problem(
                    &format!("{key}.{section}"),
                    format!(
                        "{name:?} is none of {}",
                        PROPERTIES.map(|allowed| format!("{allowed}*")).join(", ")
                    ),
                );
            }
        }
        if let Some(name) = self.properties.keys().find(|name| SECRETS.contains(&name.as_str())) {
            return problem(
                &format!("{key}.properties"),
                format!("{name:?} is a secret: name a file that holds it in secret_files"),
            );
        }
        Ok(())
    }

    fn is_plain(&self) -> bool {
        let protocol = self.properties.get("security.protocol").map_or("", String::as_str);
        !protocol.to_ascii_lowercase().ends_with("ssl")
    }

    /// Every property of the way to the brokers, secrets read from their files.
    pub fn connection(&self) -> Result<Vec<(String, String)>, KafkaSecretError> {
        let mut all = vec![("bootstrap.servers".to_owned(), self.bootstrap.clone())];
        all.extend(self.properties.iter().map(|(name, value)| (name.clone(), value.clone())));
        for (name, path) in &self.secret_files {
            all.push((name.clone(), read_secret(name, path)?));
        }
        Ok(all)
    }
}

fn read_secret(property: &str, path: &Path) -> Result<String, KafkaSecretError> {
    let failed =
        |reason: String| KafkaSecretError { property: property.to_owned(), path: path.to_owned(), reason };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    let text = text.strip_suffix('\n').unwrap_or(&text);
    if text.is_empty() { Err(failed("it is empty".to_owned())) } else { Ok(text.to_owned()) }
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    fn load(text: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        Config::load(Some(&path), []).map_err(|error| error.to_string())
    }

    #[test]
    fn nonsense_is_refused_with_its_place() {
        for (text, start) in [
            ("queue = \"kafka\"", "kafka.bootstrap: must be HOST:PORT"),
            ("[kafka]\nbootstrap = \"http://k:9092\"", "kafka.bootstrap: "),
            ("[kafka]\nbootstrap = \"k:9092,k\"", "kafka.bootstrap: "),
            (
                "[kafka]\nproperties = { \"acks\" = \"0\" }\nbootstrap = \"k:1\"",
                "kafka.properties: \"acks\" is none of",
            ),
            (
                "[kafka]\nproperties = { \"sasl.password\" = \"x\" }\nbootstrap = \"k:1\"",
                "kafka.properties: \"sasl.password\" is a secret",
            ),
            ("[kafka.centers.a]\nbootstrap = \"k:1\"", "kafka.centers.a: this center's own"),
            (
                "[kafka]\nbootstrap = \"k:1\"\n[kafka.centers.b]\nbootstrap = \"k:1\"",
                "kafka.centers.b.bootstrap: is a broker of this center",
            ),
            ("[kafka]\ntopic_prefix = \"a b\"", "kafka.topic_prefix: "),
            ("[kafka]\nreplication_factor = 0", "kafka.replication_factor: "),
            ("[kafka]\nretention = 1", "kafka.retention: unknown field"),
        ] {
            let error = load(text).unwrap_err();
            assert!(error.starts_with(start), "{text}: {error}");
        }
    }

    #[test]
    fn secrets_come_from_files_and_plain_text_is_warned_of() {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("password");
        std::fs::write(&secret, "hush\n").unwrap();
        let config = load(&format!(
            "queue = \"kafka\"\n[kafka]\nbootstrap = \"k1.example:9092,k2.example:9092\"\n\
             properties = {{ \"security.protocol\" = \"SASL_SSL\" }}\n\
             secret_files = {{ \"sasl.password\" = {secret:?} }}\n\
             [kafka.centers.b]\nbootstrap = \"k.b.example:9092\"\n"
        ))
        .unwrap();
        let own = config.kafka.own();
        assert!(!format!("{own:?}").contains("hush"));
        assert!(own.connection().unwrap().contains(&("sasl.password".to_owned(), "hush".to_owned())));
        let warned: Vec<String> = config.warnings().into_iter().map(|warning| warning.key).collect();
        assert!(warned.contains(&"kafka.centers.b.bootstrap".to_owned()), "{warned:?}");
        assert!(!warned.contains(&"kafka.bootstrap".to_owned()), "{warned:?}");
        std::fs::remove_file(&secret).unwrap();
        assert!(own.connection().is_err());
    }
}
