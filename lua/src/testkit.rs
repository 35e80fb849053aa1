//! A real redis-server for tests and benches (feature `testkit`).
//!
//! ```no_run
//! # async fn example() {
//! use seckill_ledger::testkit::RedisServer;
//!
//! let mut server = RedisServer::start().await;
//! let mut connection = server.connect().await;
//! server.kill();            // as power loss: SIGKILL
//! server.restart().await;   // same folder, same port
//! # drop(connection);
//! # }
//! ```
//!
//! Everything here panics when it cannot do its work: a test without its server has nothing to say.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client};
use seckill_domain::{CenterId, CenterNumber, Epoch, KeyDigest, Quantity, SaleId, Uid};
use tempfile::TempDir;

use crate::HUGE_PAGES;
use crate::admin::{FenceChange, FenceOutcome, set_fence};
use crate::fence::{Fence, LedgerId};
use crate::reserve::{ReserveEntry, ReserveOutcome, reserve};

/// How long a server may take to answer after its start.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// How long a replica may take to confirm what it was given with the link. Less than [`RESPONSE_TIMEOUT`].
const FIRST_CONFIRMATION_MS: u64 = 15_000;
/// How often another free port is tried when somebody else was faster.
const PORT_ATTEMPTS: usize = 5;
/// Response timeout of test connections: long enough for a busy machine.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(20);

/// A purchase of one unit, by a user who is at home in center 1.
pub fn one_unit(uid: &str, key: KeyDigest) -> ReserveEntry {
    ReserveEntry {
        uid: Uid::new(uid).expect("a user's id"),
        key,
        quantity: Quantity::ONE,
        center: CenterNumber::new(1).expect("a center's number"),
        traceparent: None,
    }
}

/// One redis-server process in a folder of its own, ended and removed on drop.
pub struct RedisServer {
    folder: TempDir,
    port: u16,
    options: Vec<(String, String)>,
    child: Option<Child>,
}

impl RedisServer {
    /// Starts a server as production has it: AOF with `appendfsync always`, no snapshots, no eviction.
    pub async fn start() -> RedisServer {
        RedisServer::start_with(&[]).await
    }

    /// Starts a server with more options, which win over the usual ones: `("appendonly", "no")`,
    /// `("replicaof", "127.0.0.1 1")`.
    pub async fn start_with(options: &[(&str, &str)]) -> RedisServer {
        let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut server = RedisServer { folder, port: 0, options, child: None };
        for _ in 0..PORT_ATTEMPTS {
            server.port = free_port();
            if server.spawn().await {
                return server;
            }
        }
        panic!("redis-server does not start: {}", server.log());
    }

    /// Starts the server again, in the same folder and on the same port, after [`RedisServer::kill`].
    pub async fn restart(&mut self) {
        self.kill();
        assert!(self.spawn().await, "redis-server does not come back: {}", self.log());
    }

    /// Ends the process as a power cut would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Fails only if it is gone already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts a server that follows `master`, and waits until it has confirmed everything so far.
    pub async fn start_replica_of(master: &RedisServer) -> RedisServer {
        let replica = RedisServer::start().await;
        replica.follow(master).await;
        replica
    }

    /// Makes the server a replica of another one, and waits until it is linked and has confirmed everything so far.
    pub async fn follow(&self, master: &RedisServer) {
        let mut conn = self.connect().await;
        redis::cmd("REPLICAOF")
            .arg("127.0.0.1")
            .arg(master.port())
            .query_async::<()>(&mut conn)
            .await
            .expect("REPLICAOF");
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            let info: String =
                redis::cmd("INFO").arg("replication").query_async(&mut conn).await.expect("INFO");
            if info.contains("master_link_status:up") {
                break;
            }
            assert!(Instant::now() < deadline, "the replica does not link: {info}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // Linked, it may still be busy with its log: the first change takes it seconds on a busy disk.
        let confirmed: u64 = redis::cmd("WAIT")
            .arg(1)
            .arg(FIRST_CONFIRMATION_MS)
            .query_async(&mut master.connect().await)
            .await
            .expect("WAIT");
        assert!(confirmed > 0, "the replica confirms nothing");
    }

    /// Stops the process without ending it, as a machine that hangs. [`RedisServer::resume`] lets it go on.
    pub fn pause(&self) {
        self.signal("-STOP");
    }

    /// Lets a paused process go on.
    pub fn resume(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").arg(signal).arg(self.pid().to_string()).status();
        assert!(status.is_ok_and(|status| status.success()), "kill {signal}");
    }

    /// The process, while it runs.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a running server").id()
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where its data lies.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// A connection of its own.
    pub async fn connect(&self) -> MultiplexedConnection {
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(RESPONSE_TIMEOUT));
        self.client()
            .get_multiplexed_async_connection_with_config(&config)
            .await
            .expect("a connection to the server")
    }

    /// A client, for subscriptions and other kinds of connections.
    pub fn client(&self) -> Client {
        Client::open(self.url()).expect("a URL that was built here")
    }

    /// `CONFIG SET`.
    pub async fn config_set(&self, name: &str, value: &str) {
        redis::cmd("CONFIG")
            .arg("SET")
            .arg(name)
            .arg(value)
            .query_async::<()>(&mut self.connect().await)
            .await
            .expect("CONFIG SET");
    }

    /// A number out of `INFO`.
    pub async fn info(&self, field: &str) -> f64 {
        let info: String =
            redis::cmd("INFO").arg("all").query_async(&mut self.connect().await).await.expect("INFO");
        info.lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.trim().parse().ok())
            .unwrap_or_else(|| panic!("no number {field} in INFO"))
    }

    /// CPU that the process has used, user and system, in microseconds.
    pub async fn cpu_us(&self) -> f64 {
        (self.info("used_cpu_user").await + self.info("used_cpu_sys").await) * 1e6
    }

    /// Makes the empty server a ledger at epoch 1 of center `a`.
    pub async fn init_ledger(&self) -> Fence {
        let fence = Fence {
            ledger_id: LedgerId::new("test-ledger").expect("a valid id"),
            epoch: Epoch(1),
            master: CenterId::new("a").expect("a valid id"),
        };
        let outcome = set_fence(&mut self.connect().await, &FenceChange::Init, &fence).await;
        assert_eq!(outcome.expect("an answer"), FenceOutcome::Set);
        fence
    }

    /// Buys one unit of a sale, on a connection of its own.
    pub async fn buy(&self, fence: &Fence, sale: &SaleId, uid: &str, key: KeyDigest) -> ReserveOutcome {
        let entry = one_unit(uid, key);
        let reply = reserve(&mut self.connect().await, fence, 0, sale, &[entry]).await;
        reply.expect("an answer").outcomes.swap_remove(0)
    }

    /// Starts the process; whether it answers.
    async fn spawn(&mut self) -> bool {
        // An attempt before this one may have left a process that never answered.
        self.kill();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("redis.log"))
            .expect("a log in the server's folder");
        let mut command = Command::new("redis-server");
        command.envs(HUGE_PAGES).args(["--disable-thp", "no"]);
        command.args(["--bind", "127.0.0.1", "--port", &self.port.to_string()]);
        command.arg("--dir").arg(self.folder.path());
        command.args(["--save", "", "--appendonly", "yes", "--appendfsync", "always"]);
        command.args(["--repl-diskless-sync-delay", "0"]);
        command.args(["--maxmemory-policy", "noeviction", "--repl-diskless-load", "swapdb"]);
        for (name, value) in &self.options {
            command.arg(format!("--{name}")).args(value.split(' '));
        }
        command.stdin(Stdio::null()).stderr(Stdio::null()).stdout(log);
        self.child = Some(command.spawn().expect("redis-server is installed"));
        let deadline = Instant::now() + START_DEADLINE;
        while Instant::now() < deadline {
            let ended = self.child.as_mut().is_none_or(|child| !matches!(child.try_wait(), Ok(None)));
            if ended {
                return false;
            }
            if let Ok(mut connection) = self.client().get_multiplexed_async_connection().await
                && redis::cmd("PING").query_async::<String>(&mut connection).await.is_ok()
            {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("redis.log")).unwrap_or_default()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
    listener.local_addr().expect("its address").port()
}
