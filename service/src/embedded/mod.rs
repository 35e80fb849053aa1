//! `seckill up`: everything on this machine.
//!
//! [`up`] prepares the data folder, starts the Redis of each center and hands each service everything it needs
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
//! | `a/diverged-EPOCH-TIME.ndjson` | what its Redis had and the master had not, saved before it became a replica |

mod data_dir;
mod redis_server;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use seckill_domain::{CenterId, CenterNumber, Currency};
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

pub use data_dir::{DataDir, DataDirError};
pub use redis_server::{RedisError, RedisOptions, RedisServer};

use crate::config::{CenterSpec, ClusterConfig, Config, CrossKeyConfig, KeyConfig, SecretUrl};
use crate::shift::ServerProcess;
use crate::topology::{Durability, FileStore, StoreError};

/// Purchases stop when the ledger has grown to this size, if the configuration names none: about five million
/// claims.
pub const DEFAULT_MAX_MEMORY_BYTES: u64 = 1 << 30;
/// Where listeners start if nothing else is asked for.
pub const DEFAULT_BASE_PORT: u16 = 8080;
/// Ports of one center lie this close together.
const PORTS_PER_CENTER: u16 = 10;
/// The port of its Redis, from its first.
const REDIS_PORT: u16 = 3;
/// A center's number is one digit, 1 to 8.
const MAX_CENTERS: usize = 8;
/// The topology, in the data folder.
const TOPOLOGY_FILE: &str = "topology.json";
/// Currency of sales that name none.
const DEFAULT_CURRENCY: &str = "EUR";

/// What `seckill up` was asked for.
#[derive(Debug, Clone)]
pub struct UpOptions {
    /// The centers, the master of a new folder first.
    pub centers: Vec<CenterId>,
    /// What an acknowledged purchase survives, where a folder gets its second center.
    pub durability: Durability,
    /// Where everything lies.
    pub data_dir: PathBuf,
    /// Port of the first center's public listener; admin is the next, then internal, then Redis. The center with
    /// the next number has the ports from ten above on.
    pub base_port: u16,
    /// Where the public and admin listeners listen. Redis and the internal listener are on the loopback interface
    /// always.
    pub bind: IpAddr,
    /// Settings that are not about places: those come from the others above.
    pub base: Config,
}

impl UpOptions {
    /// One center `a` in this folder, with defaults.
    pub fn new(data_dir: impl Into<PathBuf>) -> UpOptions {
        UpOptions {
            centers: CenterId::new("a").into_iter().collect(),
            durability: Durability::Replicated,
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
    /// No center, one twice, or too many.
    #[error("--centers takes one to {MAX_CENTERS} different names, such as `a,b` (asked for: {0})")]
    Centers(String),
    /// The ports run over the end.
    #[error("base port {0} is too high: each center needs {PORTS_PER_CENTER} ports")]
    BasePort(u16),
    /// The folder's topology cannot be read.
    #[error("the data folder's topology cannot be read: {0}")]
    Topology(#[from] StoreError),
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
    /// Its listener for the other centers, bound, if there are any.
    pub internal: Option<tokio::net::TcpListener>,
    /// What its Redis process does: for the guardian.
    pub process: watch::Receiver<ServerProcess>,
    /// To be sent once it serves and the guardian has come to a verdict on the ledger.
    pub ready: oneshot::Sender<()>,
    /// Ends it.
    pub shutdown: CancellationToken,
}

/// Runs everything until `shutdown` is cancelled or the service of a center ends; then ends it in order: first the
/// services, which drain, then their Redis. `output` gets the URLs and, when all centers are ready, the line `ready`.
pub async fn up<S, F>(
    options: UpOptions,
    mut output: impl Write,
    shutdown: CancellationToken,
    mut serve: S,
) -> Result<(), UpError>
where
    S: FnMut(Center) -> F,
    F: Future<Output = anyhow::Result<()>>,
{
    let names = || options.centers.iter().map(CenterId::as_str).collect::<Vec<_>>().join(",");
    let distinct = options.centers.iter().collect::<BTreeSet<_>>().len() == options.centers.len();
    if !(1..=MAX_CENTERS).contains(&options.centers.len()) || !distinct {
        return Err(UpError::Centers(names()));
    }
    let data_dir = DataDir::open(&options.data_dir)?;
    let plans = plan(&options, &data_dir)?;
    let ending = shutdown.child_token();
    let mut servers = Vec::new();
    let outcome = run(&options, &plans, &data_dir, &mut servers, &mut output, &ending, &mut serve).await;
    for server in servers {
        server.stop().await;
    }
    outcome
}

/// Starts every center and waits until all have ended. The first that ends, well or not, ends the others.
async fn run<S, F>(
    options: &UpOptions,
    plans: &[CenterSpec],
    data_dir: &DataDir,
    servers: &mut Vec<RedisServer>,
    output: &mut impl Write,
    ending: &CancellationToken,
    serve: &mut S,
) -> Result<(), UpError>
where
    S: FnMut(Center) -> F,
    F: Future<Output = anyhow::Result<()>>,
{
    let mut base = options.base.clone();
    let admin_token = authentication(data_dir, &mut base)?;
    let (mut centers, mut become_ready, mut greeting) = (Vec::new(), Vec::new(), String::new());
    for plan in plans {
        let config = configure(base.clone(), options, plans, plan, data_dir)?;
        let public = listen("public", config.listen.public)?;
        let admin = listen("admin", config.listen.admin)?;
        let internal = match plans.len() {
            1 => None,
            _ => Some(listen("internal", config.listen.internal)?),
        };
        let redis = RedisServer::start(RedisOptions {
            dir: data_dir.join(plan.id.as_str()).join("redis"),
            port: ports(options.base_port, plan.number)? + REDIS_PORT,
            max_memory_bytes: config.ledger.max_memory_bytes.unwrap_or(DEFAULT_MAX_MEMORY_BYTES),
        })
        .await?;
        let (ready, becomes_ready) = oneshot::channel();
        let (process, shutdown) = (redis.process(), ending.child_token());
        servers.push(redis);
        become_ready.push(becomes_ready);
        greeting.push_str(&addresses(&config));
        centers.push(Center { config, public, admin, internal, process, ready, shutdown });
    }
    greeting.push_str(&secrets(data_dir, &admin_token));

    let mut running: FuturesUnordered<_> = centers.into_iter().map(serve).collect();
    let mut all_ready = std::pin::pin!(futures_util::future::try_join_all(become_ready));
    let (mut outcome, mut greeted) = (Ok(()), false);
    loop {
        tokio::select! {
            ended = running.next() => {
                let Some(ended) = ended else { return outcome };
                ending.cancel();
                outcome = outcome.and(ended.map_err(UpError::Service));
            }
            // One that ends without having been ready says why by its own outcome.
            answers = &mut all_ready, if !greeted => {
                greeted = true;
                if answers.is_ok()
                    && let Err(error) = output.write_all(greeting.as_bytes()).and_then(|()| output.flush())
                {
                    ending.cancel();
                    outcome = Err(UpError::Output(error));
                }
            }
        }
    }
}

/// Numbers, ports and addresses: those that the folder's topology has, and the next ones for new centers.
fn plan(options: &UpOptions, data_dir: &DataDir) -> Result<Vec<CenterSpec>, UpError> {
    let known: BTreeMap<CenterId, CenterNumber> = match FileStore::new(data_dir.join(TOPOLOGY_FILE)).load() {
        Ok(found) => found.topology.centers.iter().map(|(id, center)| (id.clone(), center.number)).collect(),
        Err(StoreError::Missing { .. }) => BTreeMap::new(),
        Err(error) => return Err(error.into()),
    };
    let mut taken: BTreeSet<CenterNumber> = known.values().copied().collect();
    let mut plans = Vec::new();
    for id in &options.centers {
        let free = || (1..=MAX_CENTERS).filter_map(|n| CenterNumber::new(u8::try_from(n).ok()?).ok());
        let number = match known.get(id) {
            Some(number) => *number,
            None => free()
                .find(|number| !taken.contains(number))
                .ok_or_else(|| UpError::Centers(id.to_string()))?,
        };
        taken.insert(number);
        let first = ports(options.base_port, number)?;
        let url = |ip: IpAddr, offset: u16| format!("http://{}", SocketAddr::new(ip, first + offset));
        let reached = match options.bind.is_unspecified() {
            true => IpAddr::V4(Ipv4Addr::LOCALHOST),
            false => options.bind,
        };
        plans.push(CenterSpec {
            id: id.clone(),
            number,
            public_url: url(reached, 0),
            admin_url: url(reached, 1),
            internal_url: url(IpAddr::V4(Ipv4Addr::LOCALHOST), 2),
            ledger: vec![format!("127.0.0.1:{}", first + REDIS_PORT)],
        });
    }
    Ok(plans)
}

/// The first port of a center.
fn ports(base: u16, number: CenterNumber) -> Result<u16, UpError> {
    let first = u16::from(number.get() - 1) * PORTS_PER_CENTER;
    let too_high = || UpError::BasePort(base);
    let first = base.checked_add(first).ok_or_else(too_high)?;
    first.checked_add(PORTS_PER_CENTER).ok_or_else(too_high)?;
    Ok(first)
}

/// The configuration of one center.
fn configure(
    mut config: Config,
    options: &UpOptions,
    plans: &[CenterSpec],
    plan: &CenterSpec,
    data_dir: &DataDir,
) -> Result<Config, UpError> {
    let folder = data_dir.join(plan.id.as_str());
    data_dir::folder(&folder)?;
    let first = ports(options.base_port, plan.number)?;
    config.center.id = plan.id.clone();
    config.center.number = plan.number;
    config.listen.public = SocketAddr::new(options.bind, first);
    config.listen.admin = SocketAddr::new(options.bind, first + 1);
    config.listen.internal = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), first + 2);
    config.ledger.partitions = vec![SecretUrl::new(format!("redis://127.0.0.1:{}", first + REDIS_PORT))];
    config.ledger.diverged_dir.clone_from(&folder);
    config.orders.database_url = SecretUrl::new(format!("sqlite:{}", folder.join("orders.db").display()));
    config.topology.path = data_dir.join(TOPOLOGY_FILE);
    if plans.len() > 1 {
        config.cross_center.keys = cross_keys(data_dir, plans)?;
    }
    config.cluster = ClusterConfig { durability: options.durability, centers: plans.to_vec() };
    if config.sales.default_currency.is_none() {
        config.sales.default_currency = DEFAULT_CURRENCY.parse::<Currency>().ok();
    }
    Ok(config)
}

/// What the centers sign their calls to each other with: a key for each.
fn cross_keys(data_dir: &DataDir, plans: &[CenterSpec]) -> Result<Vec<CrossKeyConfig>, DataDirError> {
    let key = |plan: &CenterSpec| {
        let file = format!("cross-{}-secret", plan.id);
        data_dir.secret(&file)?;
        Ok(CrossKeyConfig {
            id: format!("{}-dev", plan.id),
            center: plan.id.clone(),
            secret_file: Some(data_dir.join(&file)),
            secret: None,
        })
    };
    plans.iter().map(key).collect()
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

fn addresses(config: &Config) -> String {
    format!(
        "center {}\n  public   {}\n  admin    {}\n  redis    {}\n",
        config.center.id,
        config.listen.public_url(),
        config.listen.admin_url(),
        config.ledger.partitions.first().map_or("", SecretUrl::as_str),
    )
}

fn secrets(data_dir: &DataDir, admin_token: &std::path::Path) -> String {
    format!(
        "secret for user tokens  {}\nadmin token             {}\npayments token          {}\nready\n",
        data_dir.join("dev-token-secret").display(),
        admin_token.display(),
        data_dir.join("payments-token").display(),
    )
}
