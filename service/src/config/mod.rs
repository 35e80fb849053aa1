//! The configuration: one struct for each concern, every field with its default beside it.
//!
//! It comes from a TOML file, then `SECKILL__SECTION__KEY` of the environment on top. Unknown keys are errors
//! that name the key's path. `service/config.default.toml` is the commented form of [`Config::default`], kept
//! equal to it by a test and printed by `seckill config default`.
//!
//! Secrets come from files of their own or from the environment, never from the TOML file, and `Debug` does
//! not show them.

mod auth;
mod centers;
mod cross_center;
mod etcd;
mod kafka;
mod load;
mod network;
mod validate;

use std::net::SocketAddr;
use std::path::PathBuf;

use seckill_domain::{CenterId, CenterNumber, Currency};
use serde::Deserialize;

use crate::topology::{self, Durability, Limits, Rate};

pub use auth::{
    AuthConfig, KeyAlgorithm, KeyConfig, KeyError, KeyMaterial, KeyRing, Secret, without_newline,
};
pub use cross_center::{CrossCenterConfig, CrossCenterError, CrossKeyConfig, CrossTlsConfig, InternalTls};
pub use etcd::{EtcdConfig, Stores};
pub use kafka::{KafkaCluster, KafkaConfig, KafkaSecretError};
pub use load::{ConfigError, DEFAULT_TOML, ENV_PREFIX, process_env};
pub use network::{IpPrefix, SecretUrl};
pub use validate::Warning;

/// Everything that an instance can be told.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// How accepted orders reach the order tables. Default: `outbox`.
    pub queue: QueueKind,
    /// Which center this instance belongs to.
    pub center: CenterConfig,
    /// Where it listens, and what others are told.
    pub listen: ListenConfig,
    /// The Redis that decides.
    pub ledger: LedgerConfig,
    /// The purchase path in front of it.
    pub inventory: InventoryConfig,
    /// Order tables and what works on them.
    pub orders: OrdersConfig,
    /// The brokers, for `queue = "kafka"`.
    pub kafka: KafkaConfig,
    /// Whose tokens are believed.
    pub auth: AuthConfig,
    /// Calls between centers.
    pub cross_center: CrossCenterConfig,
    /// Rate limits that a new topology starts with, and the proxies that may name a client's address.
    pub limits: LimitsConfig,
    /// The config center.
    pub topology: TopologyConfig,
    /// The centers that a new topology starts with.
    pub cluster: ClusterConfig,
    /// Rules for all sales.
    pub sales: SalesConfig,
    /// Logs.
    pub telemetry: TelemetryConfig,
    /// The end of the process.
    pub shutdown: ShutdownConfig,
}

/// How accepted orders reach the order tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QueueKind {
    /// Each center reads its own copy of the ledger's outbox: exactly once, with no broker.
    #[default]
    Outbox,
    /// The master center publishes each order to the home center's Kafka, where the home center reads it.
    Kafka,
}

/// `[center]`: which center this instance belongs to.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CenterConfig {
    /// Id of the center, `[a-z0-9-]{1,16}`. Default: `a`.
    pub id: CenterId,
    /// Number of the center, 1–8, the first digit of its users' order ids. Default: 1.
    pub number: CenterNumber,
}

/// `[listen]`: addresses of the three listeners, and the URLs under which others reach them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ListenConfig {
    /// Shoppers and the shop's backend. Default: `127.0.0.1:8080`.
    pub public: SocketAddr,
    /// Operators; keep it off the internet. Default: `127.0.0.1:8081`.
    pub admin: SocketAddr,
    /// Other centers; not opened while there is one center. Default: `127.0.0.1:8082`.
    pub internal: SocketAddr,
    /// Advertised URL of `public`. Default: `http://` and the address.
    pub public_url: Option<String>,
    /// Advertised URL of `admin`. Default: `http://` and the address.
    pub admin_url: Option<String>,
    /// Advertised URL of `internal`. Default: `http://` and the address.
    pub internal_url: Option<String>,
}

/// `[ledger]`: the Redis that decides who gets what.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LedgerConfig {
    /// URLs of the Redis masters-to-be of this center, one for each inventory partition; exactly one for now.
    /// A password in it may come from the environment only. Default: `redis://127.0.0.1:8083`.
    pub partitions: Vec<SecretUrl>,
    /// Purchases stop with `ledger_full` at this size. Default: what the server is configured with.
    pub max_memory_bytes: Option<u64>,
    /// Pooled connections for everything off the purchase path. Default: 8.
    pub pool_size: usize,
    /// A call without an answer after this long is *unknown*. Default: 2000.
    pub response_timeout_ms: u64,
    /// A replica that is in sync and lost for this long is taken off; the master sells on without it. Default: 5000.
    pub degrade_after_ms: u64,
    /// Where the outbox tail of a Redis that went another way than the master's is saved before it becomes a
    /// replica. Default: `data`.
    pub diverged_dir: PathBuf,
}

/// `[inventory]`: lanes, snapshots and the sold-out marker.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct InventoryConfig {
    /// Lanes, each with a connection of its own. Default: 1, because purchases that share a call cost Redis less.
    pub lanes: usize,
    /// Purchases in one call at most, up to 1024. Default: 512.
    pub max_batch: usize,
    /// Purchases that wait in one lane at most; the next is `overloaded`. Default: 8192.
    pub queue_len: usize,
    /// A purchase that was not sent by then is dropped as `overloaded`. Default: 5000.
    pub deadline_ms: u64,
    /// How long a purchase is held while the master center moves; then it is `shifting`. Default: 3000.
    pub hold_ms: u64,
    /// Purchases that are held at the same time at most; the next is `shifting` at once. Peak rate × `hold_ms`, some
    /// 700 bytes each. Default: 200000 (67,000 a second for 3 s).
    pub hold_max: usize,
    /// How often sales are copied from the local replica, at most 100 ms apart by contract. Default: 100.
    pub snapshot_interval_ms: u64,
    /// How often the master writes its time into the ledger. Default: 200.
    pub heartbeat_ms: u64,
    /// Winners remembered in process, so that their retries never hear `sold_out` without asking the ledger;
    /// beyond it the ledger is asked. Default: 1000000.
    pub winners_max: usize,
}

/// `[orders]`: the order database and its workers.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct OrdersConfig {
    /// `sqlite:PATH`, or `mysql://USER:PASSWORD@HOST:PORT/DATABASE` for MySQL 8 and MariaDB 10.11 or later, with
    /// `?ssl-mode=VERIFY_IDENTITY&ssl-ca=FILE` for TLS. Default: `sqlite:data/orders.db`.
    pub database_url: SecretUrl,
    /// File with the password of the user that `database_url` names, as it stands, a newline at the end aside.
    /// Default: none.
    pub database_password_file: Option<PathBuf>,
    /// Connections that read. Those that write come on top: one with SQLite, eight with MySQL. Default: 4.
    pub max_connections: u32,
    /// Orders stored in one transaction at most. Default: 4096.
    pub store_batch: usize,
    /// How often due orders are looked for. Default: 1000.
    pub expiry_interval_ms: u64,
    /// Grace for what came due while the center was away. Default: 120.
    pub expiry_grace_s: u32,
    /// Outbox entries are kept at least this long. Default: 3600.
    pub outbox_retention_s: u32,
    /// How often releases are delivered to the ledger. Default: 100.
    pub release_interval_ms: u64,
    /// A shift of shards to this center is given up unless it is decided within this time. If its coordinator dies,
    /// another service takes it over after one and a half times as long; payments of these shards wait until then.
    /// Default: 20000.
    pub shard_shift_ms: u64,
}

/// `[limits]`: what a new topology starts with (afterwards `PUT /admin/v1/limits` rules), and trusted proxies.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Requests of one user, or `"off"`. Default: 10 a second, burst 20.
    #[serde(deserialize_with = "network::rate_or_off")]
    pub per_user: Option<Rate>,
    /// Requests of one client address, or `"off"`. Default: off, because behind a proxy one address is many people.
    #[serde(deserialize_with = "network::rate_or_off")]
    pub per_address: Option<Rate>,
    /// Purchases of one sale, or `"off"`. Default: off.
    #[serde(deserialize_with = "network::rate_or_off")]
    pub per_sale: Option<Rate>,
    /// Requests of one instance, or `"off"`. Default: off.
    #[serde(deserialize_with = "network::rate_or_off")]
    pub per_instance: Option<Rate>,
    /// Proxies whose `X-Forwarded-For` counts: addresses or prefixes such as `10.0.0.0/8`. Default: none.
    pub trusted_proxies: Vec<IpPrefix>,
}

/// `[topology]`: where the topology document lies.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TopologyConfig {
    /// Kind of store. Default: `file`.
    pub store: TopologyStoreKind,
    /// The file. Default: `data/topology.json`.
    pub path: PathBuf,
    /// Authority to write ends this long after the topology was last confirmed. Default: 5000.
    pub lease_ttl_ms: u64,
    /// How to reach etcd, where the store is `etcd`.
    pub etcd: EtcdConfig,
}

/// `[cluster]`: the centers, where there are several. A new topology starts with them: the first one is the
/// master, the shards are split evenly. Centers that a topology does not know yet join it without shards.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// What an acknowledged purchase survives: `local`, or `replicated`, where another center has confirmed it.
    /// Counts when a topology gets its second center. Default: `replicated`.
    pub durability: Durability,
    /// All centers, this one among them. Default: none, this center is alone.
    pub centers: Vec<CenterSpec>,
}

/// A center as the others reach it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CenterSpec {
    /// Its id.
    pub id: CenterId,
    /// Its number.
    pub number: CenterNumber,
    /// URL of its public listener.
    pub public_url: String,
    /// URL of its admin listener.
    pub admin_url: String,
    /// URL of its internal listener.
    pub internal_url: String,
    /// `HOST:PORT` of the Redis of each inventory partition. The account is the one of `ledger.partitions`.
    pub ledger: Vec<String>,
}

/// Kind of topology store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TopologyStoreKind {
    /// One file; all centers on this machine.
    #[default]
    File,
    /// etcd; centers anywhere.
    Etcd,
}

/// `[sales]`: rules for all sales.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SalesConfig {
    /// Currency of sales that name none. Default: none, so each sale must.
    pub default_currency: Option<Currency>,
    /// A sale is archived this long after its end at the earliest: buyers may still retry. Default: 3600.
    pub retry_window_s: u32,
}

/// `[telemetry]`: logs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Filter in the form of `tracing`: `info`, `seckill=debug,warn`. Default: `info`.
    pub log: String,
    /// Form of a line. Default: `text`.
    pub format: LogFormat,
}

/// Form of a log line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// `[shutdown]`: the end of the process.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ShutdownConfig {
    /// Requests and workers get this long to finish after SIGTERM. Default: 20.
    pub drain_deadline_s: u64,
}

impl ListenConfig {
    /// The URL under which others reach the public listener.
    pub fn public_url(&self) -> String {
        self.public_url.clone().unwrap_or_else(|| format!("http://{}", self.public))
    }

    /// The URL under which others reach the admin listener.
    pub fn admin_url(&self) -> String {
        self.admin_url.clone().unwrap_or_else(|| format!("http://{}", self.admin))
    }

    /// The URL under which other centers reach the internal listener.
    pub fn internal_url(&self) -> String {
        self.internal_url.clone().unwrap_or_else(|| format!("http://{}", self.internal))
    }
}

impl OrdersConfig {
    /// The database's URL with its password, wherever that stands.
    pub fn whole_url(&self) -> Result<SecretUrl, ConfigError> {
        let Some(path) = &self.database_password_file else { return Ok(self.database_url.clone()) };
        let problem = |reason: &str| ConfigError::Key {
            key: "orders.database_password_file".to_owned(),
            reason: reason.to_owned(),
            variable: None,
        };
        let bytes = std::fs::read(path).map_err(|error| ConfigError::File { path: path.clone(), error })?;
        let password = std::str::from_utf8(without_newline(&bytes)).map_err(|_| problem("is not text"))?;
        self.database_url
            .with_password(password)
            .ok_or_else(|| problem("database_url has to name a user, without a password"))
    }
}

impl LimitsConfig {
    /// The limits that a new topology starts with.
    pub fn initial(&self) -> Limits {
        Limits {
            per_user: self.per_user,
            per_address: self.per_address,
            per_sale: self.per_sale,
            per_instance: self.per_instance,
            extra: topology::Extra::new(),
        }
    }
}

impl Default for CenterConfig {
    fn default() -> Self {
        CenterConfig {
            id: CenterId::new("a").unwrap_or_else(|_| unreachable!("`a` is a center id")),
            number: CenterNumber::new(1).unwrap_or_else(|_| unreachable!("1 is a center number")),
        }
    }
}

impl Default for ListenConfig {
    fn default() -> Self {
        ListenConfig {
            public: SocketAddr::from(([127, 0, 0, 1], 8080)),
            admin: SocketAddr::from(([127, 0, 0, 1], 8081)),
            internal: SocketAddr::from(([127, 0, 0, 1], 8082)),
            public_url: None,
            admin_url: None,
            internal_url: None,
        }
    }
}

impl Default for LedgerConfig {
    fn default() -> Self {
        LedgerConfig {
            partitions: vec![SecretUrl::new("redis://127.0.0.1:8083")],
            max_memory_bytes: None,
            pool_size: 8,
            response_timeout_ms: 2000,
            degrade_after_ms: 5000,
            diverged_dir: PathBuf::from("data"),
        }
    }
}

impl Default for InventoryConfig {
    fn default() -> Self {
        InventoryConfig {
            lanes: 1,
            max_batch: 512,
            queue_len: 8192,
            deadline_ms: 5000,
            hold_ms: 3000,
            hold_max: 200_000,
            snapshot_interval_ms: 100,
            heartbeat_ms: 200,
            winners_max: 1_000_000,
        }
    }
}

impl Default for OrdersConfig {
    fn default() -> Self {
        OrdersConfig {
            database_url: SecretUrl::new("sqlite:data/orders.db"),
            database_password_file: None,
            max_connections: 4,
            store_batch: 4096,
            expiry_interval_ms: 1000,
            expiry_grace_s: 120,
            outbox_retention_s: 3600,
            release_interval_ms: 100,
            shard_shift_ms: 20_000,
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        LimitsConfig {
            per_user: Limits::default().per_user,
            per_address: None,
            per_sale: None,
            per_instance: None,
            trusted_proxies: Vec::new(),
        }
    }
}

impl Default for TopologyConfig {
    fn default() -> Self {
        TopologyConfig {
            store: TopologyStoreKind::File,
            path: PathBuf::from("data/topology.json"),
            lease_ttl_ms: 5000,
            etcd: EtcdConfig::default(),
        }
    }
}

impl Default for ClusterConfig {
    fn default() -> Self {
        ClusterConfig { durability: Durability::Replicated, centers: Vec::new() }
    }
}

impl Default for SalesConfig {
    fn default() -> Self {
        SalesConfig { default_currency: None, retry_window_s: 3600 }
    }
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        TelemetryConfig { log: "info".to_owned(), format: LogFormat::Text }
    }
}

impl Default for ShutdownConfig {
    fn default() -> Self {
        ShutdownConfig { drain_deadline_s: 20 }
    }
}
