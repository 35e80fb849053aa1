//! Connections to the ledger: one of its own for each lane and reader, and a pool for everything else.

use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::{Manager, Pool, Runtime, Timeouts};
use redis::aio::MultiplexedConnection;
use redis::io::tcp::{TcpSettings, socket2};
use redis::{AsyncConnectionConfig, Client, IntoConnectionInfo};

use super::error::Unavailable;
use crate::config::LedgerConfig;

/// Connections for work off the purchase path: admin calls, audit, maintenance.
pub type LedgerPool = Pool;

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a pool's user waits for a free connection, and a connection for its check.
const POOL_WAIT: Duration = Duration::from_secs(2);
/// A peer that is silent for this long is asked whether it still lives.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// A Redis server that connections are opened to.
#[derive(Clone)]
pub(super) struct Target {
    client: Client,
    response_timeout: Duration,
}

impl Target {
    /// Takes the address; connects to nothing yet.
    pub(super) fn new(url: &str, response_timeout_ms: u64) -> Result<Target, Unavailable> {
        Ok(Target { client: client(url)?, response_timeout: Duration::from_millis(response_timeout_ms) })
    }

    /// A server whose client exists already.
    pub(super) fn of(client: Client, response_timeout: Duration) -> Target {
        Target { client, response_timeout }
    }

    /// Opens a connection. It does not reconnect: its owner opens another one when it fails, because a timeout
    /// leaves answers behind that nobody waits for.
    pub(super) async fn connect(&self) -> Result<MultiplexedConnection, seckill_ledger::Error> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_TIMEOUT))
            .set_response_timeout(Some(self.response_timeout));
        Ok(self.client.get_multiplexed_async_connection_with_config(&config).await?)
    }

    /// Opens a connection and says which run of the server it leads to. Where the guardian admitted another run
    /// (`admitted`), nothing may be written through it.
    pub(super) async fn connect_to(
        &self,
        admitted: Option<&str>,
    ) -> Result<(MultiplexedConnection, Arc<str>), seckill_ledger::Error> {
        let mut conn = self.connect().await?;
        let run_id = seckill_ledger::roles::standing(&mut conn).await?.run_id;
        match admitted {
            Some(admitted) if admitted != run_id => {
                Err(seckill_ledger::Error::Rejected("this run of the server was not admitted".to_owned()))
            }
            _ => Ok((conn, Arc::from(run_id))),
        }
    }

    /// The same server, with another response timeout.
    pub(super) fn with_response_timeout(&self, response_timeout: Duration) -> Target {
        Target { response_timeout, ..self.clone() }
    }

    /// Subscribes to the ledger's news.
    pub(super) async fn subscribe(&self) -> Result<redis::aio::PubSub, seckill_ledger::Error> {
        let mut news = self.client.get_async_pubsub().await?;
        news.subscribe(seckill_ledger::keys::NEWS).await?;
        Ok(news)
    }
}

fn client(url: &str) -> Result<Client, seckill_ledger::Error> {
    let keepalive = socket2::TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
    let info = url.into_connection_info()?;
    let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true).set_keepalive(keepalive));
    Ok(Client::open(info)?)
}

/// Opens a pool. It checks a connection on every checkout, which a purchase could not afford.
pub fn ledger_pool(url: &str, config: &LedgerConfig) -> Result<LedgerPool, Unavailable> {
    let info = url.into_connection_info().map_err(seckill_ledger::Error::from)?;
    let manager = Manager::new(info).map_err(seckill_ledger::Error::from)?;
    Pool::builder(manager)
        .max_size(config.pool_size)
        .runtime(Runtime::Tokio1)
        .timeouts(Timeouts { wait: Some(POOL_WAIT), create: Some(CONNECT_TIMEOUT), recycle: Some(POOL_WAIT) })
        .build()
        .map_err(|error| Unavailable::Pool(error.to_string()))
}
