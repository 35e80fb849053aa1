//! `seckill up`: everything on this machine.
//!
//! [`up`] prepares the data folder, starts the Redis of the center and hands the service everything it needs
//! as a [`Center`]. What lies in the folder `D`:
//!
//! | file | what |
//! | --- | --- |
//! | `lock` | held while `up` runs |
//! | `dev-token-secret`, `admin-secret`, `payments-secret` | HS256 keys of the three key rings |
//! | `admin-token`, `payments-token` | long-lived tokens for this machine |
//! | `topology.json` | the topology |
//! | `a/orders.db` | the order database of center `a` |
//! | `a/redis/` | its Redis: configuration, data, log |

mod data_dir;
mod redis_server;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;

use seckill_domain::{CenterId, CenterNumber, Currency};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

pub use data_dir::{DataDir, DataDirError};
pub use redis_server::{RedisError, RedisOptions, RedisServer};

use crate::config::{Config, KeyConfig, SecretUrl};
use crate::shift::ServerProcess;

/// Purchases stop when the ledger has grown to this size, if the configuration names none: about five million
/// claims.
pub const DEFAULT_MAX_MEMORY_BYTES: u64 = 1 << 30;
/// Where listeners start if nothing else is asked for.
pub const DEFAULT_BASE_PORT: u16 = 8080;
/// Ports of one center lie this close together.
const PORTS_PER_CENTER: u16 = 10;
/// Currency of sales that name none.
const DEFAULT_CURRENCY: &str = "EUR";

/// What `seckill up` was asked for.
#[derive(Debug, Clone)]
pub struct UpOptions {
    /// The centers. Only `a` so far.
    pub centers: Vec<CenterId>,
    /// Where everything lies.
    pub data_dir: PathBuf,
    /// Port of the first center's public listener; admin is the next, then internal, then Redis.
    pub base_port: u16,
    /// Where the public and admin listeners listen. Redis is on the loopback interface always.
    pub bind: IpAddr,
    /// Settings that are not about places: those come from the three above.
    pub base: Config,
}

impl UpOptions {
    /// One center `a` in this folder, with defaults.
    pub fn new(data_dir: impl Into<PathBuf>) -> UpOptions {
        UpOptions {
            centers: CenterId::new("a").into_iter().collect(),
            data_dir: data_dir.into(),
            base_port: DEFAULT_BASE_PORT,
            bind: IpAddr::V4(Ipv4Addr::LOCALHOST),
            base: Config::default(),
        }
    }
}

/// Why `up` did not come up, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum UpError {
    /// More than this release can do.
    #[error("`up` runs one center, `--centers a`, in this release (asked for: {0})")]
    Centers(String),
    /// The ports run over the end.
    #[error("base port {0} is too high: a center needs {PORTS_PER_CENTER} ports")]
    BasePort(u16),
    /// A port is taken.
    #[error(
        "port {port}, for the {listener} listener, is in use by another program: stop it, or choose another --base-port"
    )]
    PortInUse {
        /// Which listener.
        listener: &'static str,
        /// The port.
        port: u16,
    },
    /// A listener could not be opened.
    #[error("the {listener} listener cannot listen on {address}: {source}")]
    Listen {
        /// Which listener.
        listener: &'static str,
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The data folder.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// Redis.
    #[error(transparent)]
    Redis(#[from] RedisError),
    /// The service itself.
    #[error("{0:#}")]
    Service(anyhow::Error),
    /// Standard output is gone.
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
}

/// What the service of one center runs with.
#[derive(Debug)]
pub struct Center {
    /// Its configuration.
    pub config: Config,
    /// Its public listener, bound.
    pub public: tokio::net::TcpListener,
    /// Its admin listener, bound.
    pub admin: tokio::net::TcpListener,
    /// What its Redis process does: for the guardian.
    pub process: watch::Receiver<ServerProcess>,
    /// To be sent once it serves and the guardian has come to a verdict on the ledger.
    pub ready: oneshot::Sender<()>,
    /// Ends it.
    pub shutdown: CancellationToken,
}

/// Runs everything until `shutdown` is cancelled or the service ends; then ends it in order: first the service,
/// which drains, then Redis. `output` gets the URLs and, when the service is ready, the line `ready`.
pub async fn up<S, F>(
    options: UpOptions,
    mut output: impl Write,
    shutdown: CancellationToken,
    serve: S,
) -> Result<(), UpError>
where
    S: FnOnce(Center) -> F,
    F: Future<Output = anyhow::Result<()>>,
{
    let id = match &options.centers[..] {
        [id] if id.as_str() == "a" => id.clone(),
        others => {
            let names: Vec<&str> = others.iter().map(CenterId::as_str).collect();
            return Err(UpError::Centers(names.join(",")));
        }
    };
    options.base_port.checked_add(PORTS_PER_CENTER).ok_or(UpError::BasePort(options.base_port))?;
    let data_dir = DataDir::open(&options.data_dir)?;
    let mut config = options.base;
    let center_dir = data_dir.join(id.as_str());
    data_dir::folder(&center_dir)?;
    let admin_token = authentication(&data_dir, &mut config)?;
    let redis_port = options.base_port + 3;
    config.center.id = id;
    config.center.number = CenterNumber::new(1).unwrap_or(config.center.number);
    config.listen.public = SocketAddr::new(options.bind, options.base_port);
    config.listen.admin = SocketAddr::new(options.bind, options.base_port + 1);
    config.listen.internal = SocketAddr::new(options.bind, options.base_port + 2);
    config.ledger.partitions = vec![SecretUrl::new(format!("redis://127.0.0.1:{redis_port}"))];
    config.orders.database_url = SecretUrl::new(format!("sqlite:{}", center_dir.join("orders.db").display()));
    config.topology.path = data_dir.join("topology.json");
    if config.sales.default_currency.is_none() {
        config.sales.default_currency = DEFAULT_CURRENCY.parse::<Currency>().ok();
    }
    let public = listen("public", config.listen.public)?;
    let admin = listen("admin", config.listen.admin)?;
    let redis = RedisServer::start(RedisOptions {
        dir: center_dir.join("redis"),
        port: redis_port,
        max_memory_bytes: config.ledger.max_memory_bytes.unwrap_or(DEFAULT_MAX_MEMORY_BYTES),
    })
    .await?;

    let greeting = greeting(&config, &data_dir, &admin_token);
    let (ready, becomes_ready) = oneshot::channel();
    let center = Center { config, public, admin, process: redis.process(), ready, shutdown };
    let service = serve(center);
    tokio::pin!(service);
    let outcome = tokio::select! {
        outcome = &mut service => outcome.map_err(UpError::Service),
        answer = becomes_ready => {
            let said = match answer {
                Ok(()) => output
                    .write_all(greeting.as_bytes())
                    .and_then(|()| output.flush())
                    .map_err(UpError::Output),
                // It ends without having been ready: its own outcome says why.
                Err(_) => Ok(()),
            };
            match said {
                Ok(()) => service.await.map_err(UpError::Service),
                Err(error) => Err(error),
            }
        }
    };
    redis.stop().await;
    outcome
}

fn authentication(data_dir: &DataDir, config: &mut Config) -> Result<PathBuf, DataDirError> {
    data_dir.secret("dev-token-secret")?;
    let admin = data_dir.secret("admin-secret")?;
    let payments = data_dir.secret("payments-secret")?;
    config.auth.users.keys = vec![KeyConfig::hs256_file(data_dir.join("dev-token-secret"))];
    config.auth.admin.keys = vec![KeyConfig::hs256_file(data_dir.join("admin-secret"))];
    config.auth.payments.keys = vec![KeyConfig::hs256_file(data_dir.join("payments-secret"))];
    for ring in [&mut config.auth.users, &mut config.auth.admin, &mut config.auth.payments] {
        ring.audience = None;
    }
    data_dir.token("payments-token", "payments", &payments)?;
    data_dir.token("admin-token", "admin", &admin)
}

fn listen(listener: &'static str, address: SocketAddr) -> Result<tokio::net::TcpListener, UpError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => UpError::PortInUse { listener, port: address.port() },
        _ => UpError::Listen { listener, address, source },
    };
    let socket = TcpListener::bind(address).map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    tokio::net::TcpListener::from_std(socket).map_err(failed)
}

fn greeting(config: &Config, data_dir: &DataDir, admin_token: &std::path::Path) -> String {
    format!(
        "center {}\n  public   {}\n  admin    {}\n  redis    {}\n\
         secret for user tokens  {}\nadmin token             {}\npayments token          {}\nready\n",
        config.center.id,
        config.listen.public_url(),
        config.listen.admin_url(),
        config.ledger.partitions.first().map_or("", SecretUrl::as_str),
        data_dir.join("dev-token-secret").display(),
        admin_token.display(),
        data_dir.join("payments-token").display(),
    )
}
