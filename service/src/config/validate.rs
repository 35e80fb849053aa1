//! What a value may be, and what is allowed but asks for trouble.

use std::collections::HashSet;
use std::fmt;

use super::auth::{KeyMaterial, KeyRing};
use super::load::ConfigError;
use super::{Config, KeyConfig, QueueKind, TopologyStoreKind};

/// The ledger's `reserve` takes this many purchases in a call.
const MAX_BATCH: usize = seckill_ledger::MAX_BATCH;
/// `as_of` and `age_ms` promise a snapshot at least this often.
const MAX_SNAPSHOT_INTERVAL_MS: u64 = 100;
/// An HS256 secret should be as long as the hash (RFC 7518, section 3.2), in bytes.
const HS256_SECRET_BYTES: usize = 32;

/// What is said of an internal listener without TLS.
pub(super) const PLAIN_CALLS: &str = "plain text between centers: calls are signed, but whoever is on the way reads them, \
     and can answer in the other center's place; use https:// and [cross_center.tls]";

/// Something that is allowed and asks for trouble.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// Path of the key.
    pub key: String,
    /// What may happen.
    pub text: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.text)
    }
}

pub(super) type Problem = (String, String);

pub(super) fn problem<T>(key: &str, reason: impl Into<String>) -> Result<T, Problem> {
    Err((key.to_owned(), reason.into()))
}

pub(super) fn within<T: PartialOrd + Copy + fmt::Display>(
    key: &str,
    value: T,
    min: T,
    max: T,
) -> Result<(), Problem> {
    if value < min || value > max {
        return problem(key, format!("must be from {min} to {max}, not {value}"));
    }
    Ok(())
}

impl Config {
    /// Checks every value that its type leaves open.
    pub(super) fn validate(&self) -> Result<(), Problem> {
        let listen = [self.listen.public, self.listen.admin, self.listen.internal];
        for (index, address) in listen.iter().enumerate() {
            if address.port() != 0 && listen[..index].contains(address) {
                return problem("listen", format!("two listeners have the address {address}"));
            }
        }
        for (key, url) in [
            ("listen.public_url", &self.listen.public_url),
            ("listen.admin_url", &self.listen.admin_url),
            ("listen.internal_url", &self.listen.internal_url),
        ] {
            if url.as_ref().is_some_and(|url| !is_http_url(url)) {
                return problem(key, "must be an http:// or https:// URL");
            }
        }

        let ledger = &self.ledger;
        if ledger.partitions.len() != 1 {
            return problem(
                "ledger.partitions",
                format!("exactly one partition for now, not {}", ledger.partitions.len()),
            );
        }
        if let Some(index) = ledger.partitions.iter().position(|url| !is_redis_url(url)) {
            return problem(
                &format!("ledger.partitions[{index}]"),
                "must be a redis://, rediss:// or unix:// URL",
            );
        }
        within("ledger.pool_size", ledger.pool_size, 1, 1024)?;
        within("ledger.response_timeout_ms", ledger.response_timeout_ms, 10, 60_000)?;
        if ledger.max_memory_bytes.is_some_and(|bytes| bytes < 16 << 20) {
            return problem("ledger.max_memory_bytes", "must be at least 16777216 (16 MiB)");
        }

        within("ledger.degrade_after_ms", ledger.degrade_after_ms, 1000, 600_000)?;
        self.validate_centers()?;
        self.validate_internal_tls()?;

        let inventory = &self.inventory;
        within("inventory.lanes", inventory.lanes, 1, 256)?;
        within("inventory.max_batch", inventory.max_batch, 1, MAX_BATCH)?;
        within("inventory.queue_len", inventory.queue_len, inventory.max_batch, 1 << 20)?;
        within("inventory.deadline_ms", inventory.deadline_ms, 100, 60_000)?;
        within("inventory.hold_ms", inventory.hold_ms, 0, 60_000)?;
        within("inventory.hold_max", inventory.hold_max, 0, 10_000_000)?;
        within(
            "inventory.snapshot_interval_ms",
            inventory.snapshot_interval_ms,
            1,
            MAX_SNAPSHOT_INTERVAL_MS,
        )?;
        within("inventory.heartbeat_ms", inventory.heartbeat_ms, 10, 10_000)?;
        within("inventory.winners_max", inventory.winners_max, 0, 100_000_000)?;

        let orders = &self.orders;
        let url: &str = &orders.database_url;
        let named = match (url.strip_prefix("sqlite:"), url.strip_prefix("mysql://")) {
            (Some(path), _) => !path.trim_start_matches('/').is_empty(),
            (_, Some(server)) => server.split_once('/').is_some_and(|(host, database)| {
                !host.is_empty() && !database.split('?').next().unwrap_or_default().is_empty()
            }),
            (None, None) => false,
        };
        if !named {
            // The value is not repeated: it may hold a password.
            return problem(
                "orders.database_url",
                "must be sqlite:PATH or mysql://USER:PASSWORD@HOST:PORT/DATABASE",
            );
        }
        within("orders.max_connections", orders.max_connections, 1, 1024)?;
        within("orders.store_batch", orders.store_batch, 1, 65_536)?;
        within("orders.expiry_interval_ms", orders.expiry_interval_ms, 10, 60_000)?;
        within("orders.expiry_grace_s", orders.expiry_grace_s, 0, 86_400)?;
        within("orders.outbox_retention_s", orders.outbox_retention_s, 0, 30 * 86_400)?;
        within("orders.release_interval_ms", orders.release_interval_ms, 10, 60_000)?;
        within("orders.shard_shift_ms", orders.shard_shift_ms, 2_000, 120_000)?;

        self.kafka.validate(self.queue == QueueKind::Kafka, &self.center.id)?;
        for (key, ring) in self.rings() {
            validate_ring(key, ring)?;
        }
        if self.topology.path.as_os_str().is_empty() {
            return problem("topology.path", "must not be empty");
        }
        within("topology.lease_ttl_ms", self.topology.lease_ttl_ms, 200, 60_000)?;
        if self.topology.store == TopologyStoreKind::Etcd {
            self.topology.etcd.validate(self.topology.lease_ttl_ms)?;
        }
        within("sales.retry_window_s", self.sales.retry_window_s, 0, 365 * 86_400)?;
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&self.telemetry.log) {
            return problem("telemetry.log", error.to_string());
        }
        within("shutdown.drain_deadline_s", self.shutdown.drain_deadline_s, 1, 600)
    }

    fn rings(&self) -> [(&'static str, &KeyRing); 3] {
        [
            ("auth.users", &self.auth.users),
            ("auth.payments", &self.auth.payments),
            ("auth.admin", &self.auth.admin),
        ]
    }

    /// Reads every key and certificate that the service starts with, so that a missing file is found before the first
    /// request.
    pub fn read_keys(&self) -> Result<(), ConfigError> {
        for (ring, index, key) in self.keys() {
            let path = || format!("{ring}.keys[{index}]");
            let material = key.material().map_err(|error| ConfigError::TokenKey { key: path(), error })?;
            if let KeyMaterial::EdDsaPem(pem) = material {
                jsonwebtoken::DecodingKey::from_ed_pem(&pem).map_err(|_| ConfigError::Key {
                    key: path(),
                    reason: "public_key_file is not the PEM of an Ed25519 public key".to_owned(),
                    variable: None,
                })?;
            }
        }
        self.cross_center.keyring(self.center.id.clone())?;
        self.internal_tls()?;
        Ok(())
    }

    fn keys(&self) -> impl Iterator<Item = (&'static str, usize, &KeyConfig)> {
        self.rings()
            .into_iter()
            .flat_map(|(name, ring)| ring.keys.iter().enumerate().map(move |(index, key)| (name, index, key)))
    }

    /// What is allowed but asks for trouble: plain text between machines, risky timeouts, weak or shared keys.
    pub fn warnings(&self) -> Vec<Warning> {
        let mut found = Vec::new();
        let mut warn = |key: &str, text: String| found.push(Warning { key: key.to_owned(), text });

        for (index, url) in self.ledger.partitions.iter().enumerate() {
            if url.starts_with("redis://") && !is_local(url) {
                warn(
                    &format!("ledger.partitions[{index}]"),
                    "plain text to another machine: whoever is on the way reads and changes the ledger; use rediss://".to_owned(),
                );
            }
        }
        for (key, url) in
            [("listen.public_url", self.listen.public_url()), ("listen.admin_url", self.listen.admin_url())]
        {
            if url.starts_with("http://") && !is_local(&url) {
                warn(key, "plain text to other machines: tokens can be read on the way; put TLS in front and advertise https://".to_owned());
            }
        }
        let listed = self.cluster.centers.iter().enumerate();
        let listed = listed.map(|(index, center)| {
            (format!("cluster.centers[{index}].internal_url"), center.internal_url.clone())
        });
        for (key, url) in
            [("listen.internal_url".to_owned(), self.listen.internal_url())].into_iter().chain(listed)
        {
            if url.starts_with("http://") && !is_local(&url) {
                warn(&key, PLAIN_CALLS.to_owned());
            }
        }
        let plain = self.ledger.partitions.iter().any(|url| url.starts_with("redis://"));
        for (index, center) in self.cluster.centers.iter().enumerate() {
            if plain && center.ledger.iter().any(|address| !is_local(&format!("redis://{address}"))) {
                warn(
                    &format!("cluster.centers[{index}].ledger"),
                    "replication and the guardians' looks go to other machines in plain text; use rediss:// in \
                     ledger.partitions and tls-replication in Redis, or a private link"
                        .to_owned(),
                );
            }
        }
        if !self.listen.admin.ip().is_loopback() {
            warn(
                "listen.admin",
                "the admin listener is reachable from other machines; keep it off the internet".to_owned(),
            );
        }

        if self.topology.store == TopologyStoreKind::Etcd {
            for (index, endpoint) in self.topology.etcd.endpoints.iter().enumerate() {
                if endpoint.starts_with("http://") && !is_local(endpoint) {
                    warn(
                        &format!("topology.etcd.endpoints[{index}]"),
                        "plain text to another machine: whoever is on the way decides who is the master; use https://".to_owned(),
                    );
                }
            }
        }

        self.kafka.warnings(&mut warn);
        let response = self.ledger.response_timeout_ms;
        if response >= self.inventory.deadline_ms {
            warn(
                "ledger.response_timeout_ms",
                format!(
                    "not below inventory.deadline_ms ({}): one slow call outlasts the purchases that wait behind it",
                    self.inventory.deadline_ms
                ),
            );
        }
        if response < 500 {
            warn(
                "ledger.response_timeout_ms",
                "below 500 ms a pause of the disk turns purchases into unknown outcomes".to_owned(),
            );
        }
        if self.inventory.hold_ms >= self.inventory.deadline_ms {
            warn(
                "inventory.hold_ms",
                format!(
                    "not below inventory.deadline_ms ({}): what is held while the master moves has no time left after it",
                    self.inventory.deadline_ms
                ),
            );
        }
        if self.topology.lease_ttl_ms < 1000 {
            warn(
                "topology.lease_ttl_ms",
                "below 1000 ms a short pause of the process stops sales".to_owned(),
            );
        }
        if self.shutdown.drain_deadline_s * 1000 <= self.inventory.deadline_ms {
            warn(
                "shutdown.drain_deadline_s",
                format!(
                    "not above inventory.deadline_ms ({}): a drain may cut purchases that are on their way",
                    self.inventory.deadline_ms
                ),
            );
        }
        if self.orders.outbox_retention_s < 60 {
            warn(
                "orders.outbox_retention_s",
                "below a minute little is left to look into after an incident".to_owned(),
            );
        }
        if self.limits.per_user.is_none() {
            warn("limits.per_user", "off: one user can send without bound".to_owned());
        }

        let mut secrets = Vec::new();
        for (ring, keys) in self.rings() {
            if keys.keys.is_empty() {
                warn(&format!("{ring}.keys"), "no key: every token of this kind is refused".to_owned());
            }
        }
        for (ring, index, key) in self.keys() {
            if let Ok(KeyMaterial::Hs256(secret)) = key.material() {
                let path = format!("{ring}.keys[{index}]");
                if secret.len() < HS256_SECRET_BYTES {
                    warn(
                        &path,
                        format!(
                            "a secret of {} bytes can be guessed; use {HS256_SECRET_BYTES} or more",
                            secret.len()
                        ),
                    );
                }
                if secrets.iter().any(|(other, known)| *other != ring && *known == secret) {
                    warn(
                        &path,
                        "the same secret serves another ring: its holders can sign for both".to_owned(),
                    );
                }
                secrets.push((ring, secret));
            }
        }
        found
    }
}

impl Config {
    fn validate_centers(&self) -> Result<(), Problem> {
        let centers = &self.cluster.centers;
        for (index, center) in centers.iter().enumerate() {
            let key = format!("cluster.centers[{index}]");
            let others = &centers[..index];
            if others.iter().any(|other| other.id == center.id || other.number == center.number) {
                return problem(&key, "two centers have the same id or number");
            }
            for url in [&center.public_url, &center.admin_url, &center.internal_url] {
                if !is_http_url(url) {
                    return problem(&key, format!("{url:?} must be an http:// or https:// URL"));
                }
            }
            if center.ledger.len() != self.ledger.partitions.len() {
                return problem(&format!("{key}.ledger"), "must have one HOST:PORT for each partition");
            }
            let is_address = |address: &String| {
                address.rsplit_once(':').is_some_and(|(host, port)| {
                    !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0)
                })
            };
            if !center.ledger.iter().all(is_address) {
                return problem(&format!("{key}.ledger"), "must be HOST:PORT");
            }
        }
        let own = (&self.center.id, self.center.number);
        if !centers.is_empty() && !centers.iter().any(|center| (&center.id, center.number) == own) {
            return problem(
                "cluster.centers",
                format!("this center, {} with number {}, is not among them", own.0, own.1.get()),
            );
        }
        Ok(())
    }
}

fn validate_ring(path: &str, ring: &KeyRing) -> Result<(), Problem> {
    if ring.subject_claim.is_empty() {
        return problem(&format!("{path}.subject_claim"), "must not be empty");
    }
    let mut kids = HashSet::new();
    for (index, key) in ring.keys.iter().enumerate() {
        let path = format!("{path}.keys[{index}]");
        if !kids.insert(key.kid.as_deref()) {
            return problem(
                &path,
                match &key.kid {
                    Some(kid) => format!("two keys have the kid {kid:?}"),
                    None => "in a ring of several keys each but one needs a kid".to_owned(),
                },
            );
        }
        let sources = (key.secret.is_some(), key.secret_file.is_some(), key.public_key_file.is_some());
        match (key.alg, sources) {
            (super::KeyAlgorithm::Hs256, (true, false, false) | (false, true, false))
            | (super::KeyAlgorithm::EdDsa, (false, false, true)) => {}
            (super::KeyAlgorithm::Hs256, _) => {
                return problem(&path, super::auth::KeyError::Hs256Source.to_string());
            }
            (super::KeyAlgorithm::EdDsa, _) => {
                return problem(&path, super::auth::KeyError::EdDsaSource.to_string());
            }
        }
    }
    Ok(())
}

pub(super) fn is_http_url(url: &str) -> bool {
    url.parse::<http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
    })
}

fn is_redis_url(url: &str) -> bool {
    ["redis://", "rediss://", "unix://", "redis+unix://"]
        .iter()
        .any(|scheme| url.strip_prefix(scheme).is_some_and(|rest| !rest.is_empty()))
}

/// Whether a URL leads to this machine.
pub(super) fn is_local(url: &str) -> bool {
    let authority = url.split("://").nth(1).and_then(|rest| rest.split(['/', '?']).next()).unwrap_or("");
    let host_port = authority.rsplit('@').next().unwrap_or(authority);
    let host = match host_port.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host_port.rsplit_once(':').map_or(host_port, |(host, _)| host),
    };
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}
