//! Two centers as production runs them: in each a `seckill serve` and a redis-server, and between them lines that can
//! be slow, silent or cut. Whatever one center asks of the other goes over such a line: the internal API, Redis
//! replication, the guardian's looks, and what is published to the other's Kafka, where there is one.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::Method;
use seckill_parts::{Etcd, Link, LinkState, Redis, RedisOptions};
use serde_json::Value;

use crate::client::Client;
use crate::support::{PATIENCE, eventually};
use crate::up::free_base_port;

mod files;

use files::{write_certificates, write_keys};

/// Half of the round trip between centers, and how much it may be longer: 30 ms ± 10 ms both ways.
const ONE_WAY: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(10));
/// How long a center without etcd may go on selling.
pub(crate) const LEASE: Duration = Duration::from_secs(3);
/// See [`Centers::fail_point`].
const FAIL_POINT: &str = "fail-point";
/// Lines of a center's log that a failed test shows.
const LOG_LINES: usize = 80;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Which {
    /// The master at first.
    A,
    /// The other one.
    B,
}

pub(crate) const BOTH: [Which; 2] = [Which::A, Which::B];

impl Which {
    pub(crate) fn id(self) -> &'static str {
        match self {
            Which::A => "a",
            Which::B => "b",
        }
    }

    pub(crate) fn number(self) -> u16 {
        match self {
            Which::A => 1,
            Which::B => 2,
        }
    }

    pub(crate) fn other(self) -> Which {
        match self {
            Which::A => Which::B,
            Which::B => Which::A,
        }
    }

    /// What is this center's of what both have.
    pub(crate) fn of<T>(self, both: &[T; 2]) -> &T {
        match self {
            Which::A => &both[0],
            Which::B => &both[1],
        }
    }
}

/// What may differ from test to test.
#[derive(Debug, Default)]
pub(crate) struct CentersOptions {
    /// The topology lies in an etcd of the test's own, not in a file.
    pub(crate) etcd: bool,
    /// More of each center's configuration: whole tables.
    pub(crate) more: Vec<(Which, String)>,
    /// `queue = …`, where it is not the outbox.
    pub(crate) queue: Option<&'static str>,
    /// `orders.database_url` of a center, where it is not SQLite.
    pub(crate) databases: Vec<(Which, String)>,
    /// The internal API speaks TLS, and both sides show a certificate.
    pub(crate) tls: bool,
    /// More lines between the centers.
    pub(crate) lines: Vec<Arc<Link>>,
}

/// Two centers.
pub(crate) struct Centers {
    sides: [Side; 2],
    /// Lines between them to what stands behind them.
    lines: Vec<Arc<Link>>,
    /// Where the topology lies, if not in a file.
    pub(crate) etcd: Option<Etcd>,
    base_port: u16,
    /// Dropped last.
    dir: tempfile::TempDir,
}

/// One center.
struct Side {
    which: Which,
    config: PathBuf,
    fail_point: PathBuf,
    redis: Redis,
    /// How the other center reaches this one's Redis and internal listener.
    to_redis: Link,
    to_internal: Link,
    /// How this center reaches etcd, if there is one.
    to_etcd: Option<Link>,
    /// The URL of its order database, which may hold a password.
    database: String,
    child: Option<Child>,
    output: Arc<Mutex<Vec<String>>>,
}

impl Centers {
    /// Starts both, creates the ledger and waits until b confirms purchases.
    pub(crate) async fn start(options: CentersOptions) -> Centers {
        let dir = tempfile::tempdir().unwrap();
        let etcd = match options.etcd {
            true => Some(Etcd::start(&dir.path().join("etcd")).await.unwrap()),
            false => None,
        };
        let base_port = free_base_port();
        write_keys(dir.path());
        if options.tls {
            write_certificates(dir.path());
        }
        let mut sides = Vec::new();
        for which in BOTH {
            let folder = dir.path().join(which.id());
            let redis = RedisOptions { isolated: true, ..RedisOptions::default() };
            let redis = Redis::start_with(&folder.join("redis"), &redis).await.unwrap();
            let internal = SocketAddr::from(([127, 0, 0, 1], port(base_port, which) + 2));
            let own = || format!("sqlite:{}/orders.db", folder.display());
            let database = options.databases.iter().find(|(of, _)| *of == which);
            let (to_redis, to_internal) = (Link::start(redis.address()), Link::start(internal));
            let to_etcd = etcd.as_ref().map(|etcd| Link::start(etcd.address()).unwrap());
            sides.push(Side {
                which,
                config: folder.join("seckill.toml"),
                fail_point: dir.path().join(FAIL_POINT),
                redis,
                to_redis: to_redis.unwrap(),
                to_internal: to_internal.unwrap(),
                to_etcd,
                database: database.map_or_else(own, |(_, url)| url.clone()),
                child: None,
                output: Arc::default(),
            });
        }
        let Ok(sides) = <[Side; 2]>::try_from(sides) else { unreachable!("there are two") };
        let mut centers = Centers { sides, lines: options.lines.clone(), etcd, base_port, dir };
        centers.far_apart();
        for which in BOTH {
            let config = centers.configuration(which, &options);
            std::fs::write(&centers.side(which).config, config).unwrap();
            centers.spawn(which);
        }
        for which in BOTH {
            centers.until_serving(which).await;
        }
        let (code, out, err) = centers.cli(Which::A, &["ledger", "init"]);
        assert_eq!(code, 0, "{out}\n{err}\n{}", centers.logs());
        centers.until_in_sync(0).await;
        centers
    }

    fn side(&self, which: Which) -> &Side {
        which.of(&self.sides)
    }

    fn side_mut(&mut self, which: Which) -> &mut Side {
        match which {
            Which::A => &mut self.sides[0],
            Which::B => &mut self.sides[1],
        }
    }

    /// Starts a center's service.
    pub(crate) fn spawn(&mut self, which: Which) {
        self.spawn_with(which, &[]);
    }

    /// The same with more in its environment.
    pub(crate) fn spawn_with(&mut self, which: Which, variables: &[(&str, &str)]) {
        self.side_mut(which).spawn(variables);
    }

    /// How a center's service ended, if it has.
    pub(crate) fn ended(&mut self, which: Which) -> Option<ExitStatus> {
        self.side_mut(which).child.as_mut().expect("it was started").try_wait().unwrap()
    }

    /// SIGTERM to a center's service; its exit code.
    pub(crate) async fn terminate(&mut self, which: Which) -> Option<i32> {
        let child = self.side_mut(which).child.as_ref().expect("it runs");
        let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = eventually("it ends", async || self.ended(which)).await;
        self.side_mut(which).child = None;
        status.code()
    }

    /// The file that tells a service where to die or to stand still (`seckill::fail_point`). Both look at the same one:
    /// who comes there first takes it.
    pub(crate) fn fail_point(&self) -> PathBuf {
        self.dir.path().join(FAIL_POINT)
    }

    /// A center's service.
    pub(crate) fn pid(&self, which: Which) -> rustix::process::Pid {
        rustix::process::Pid::from_child(self.side(which).child.as_ref().expect("it runs"))
    }

    /// How a center reaches etcd.
    pub(crate) fn to_etcd(&self, which: Which) -> &Link {
        self.side(which).to_etcd.as_ref().expect("the topology is in etcd")
    }

    /// Where everything lies.
    pub(crate) fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// kill -9 of a center's service.
    pub(crate) fn kill_service(&mut self, which: Which) {
        let mut child = self.side_mut(which).child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// A center's service stands still, or goes on.
    pub(crate) fn pause_service(&self, which: Which, still: bool) {
        let pid = self.pid(which);
        let signal = if still { rustix::process::Signal::STOP } else { rustix::process::Signal::CONT };
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Cuts a center off from everybody but its own shoppers, or lets it back.
    pub(crate) fn cut_off(&self, which: Which, state: LinkState) {
        self.between(state);
        self.to_etcd(which).set(state);
    }

    /// A center's redis-server.
    pub(crate) fn redis(&self, which: Which) -> &Redis {
        &self.side(which).redis
    }

    /// Connected to a center's redis-server, with nothing in between.
    pub(crate) async fn ledger(&self, which: Which) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.redis(which).url()).unwrap();
        client.get_multiplexed_async_connection().await.unwrap()
    }

    /// Takes everything from a center's redis-server, which does not run.
    pub(crate) fn empty_redis(&self, which: Which) {
        let data = self.redis(which).dir().join("data");
        std::fs::remove_dir_all(&data).unwrap();
        std::fs::create_dir(&data).unwrap();
    }

    /// The last part of a center's append-only log.
    pub(crate) fn redis_log(&self, which: Which) -> PathBuf {
        let folder = self.redis(which).dir().join("data/appendonlydir");
        let parts = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        parts
            .filter(|path| path.to_string_lossy().ends_with(".incr.aof"))
            .max_by_key(|path| {
                let name = path.file_name().unwrap().to_string_lossy().into_owned();
                name.split('.').rev().nth(2).and_then(|number| number.parse::<u64>().ok())
            })
            .expect("it keeps a log")
    }

    fn links(&self) -> impl Iterator<Item = &Link> {
        let sides = self.sides.iter().flat_map(|side| [&side.to_redis, &side.to_internal]);
        sides.chain(self.lines.iter().map(Arc::as_ref))
    }

    /// 30 ms ± 10 ms between the centers.
    pub(crate) fn far_apart(&self) {
        self.links().for_each(|link| link.set_delay(ONE_WAY.0, ONE_WAY.1));
    }

    /// What all lines between the centers do.
    pub(crate) fn between(&self, state: LinkState) {
        self.links().for_each(|link| link.set(state));
    }

    /// A client of a center.
    pub(crate) fn client(&self, which: Which) -> Client {
        Client::new(port(self.base_port, which), self.dir.path())
    }

    /// Runs a command of the binary against a center.
    pub(crate) fn cli(&self, which: Which, args: &[&str]) -> (i32, String, String) {
        let output = self.prepared(which, args).output().unwrap();
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    /// A command of the binary against a center, not started yet.
    pub(crate) fn prepared(&self, which: Which, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_seckill"));
        command
            .args(args)
            .env("SECKILL_ADMIN_URL", format!("http://127.0.0.1:{}", port(self.base_port, which) + 1))
            .env("SECKILL_ADMIN_TOKEN_FILE", self.dir.path().join("admin-token"))
            .stdin(Stdio::null());
        command
    }

    /// The same while other things go on in this runtime.
    pub(crate) fn command(&self, which: Which, args: &[&str]) -> (i32, String, String) {
        tokio::task::block_in_place(|| self.cli(which, args))
    }

    /// Waits until a center is the master, sells, and the other one has everything that is acknowledged.
    pub(crate) async fn until_master(&self, which: Which) -> Value {
        eventually("the new master sells and the other one follows", async || {
            let topology = self.topology(which).await;
            let steady = topology["state"] == "steady"
                && topology["master"] == which.id()
                && topology["in_sync"][0]["center"] == which.other().id();
            let sells = self.ready(which).await["authority"]["granted"] == true;
            (steady && sells).then_some(topology)
        })
        .await
    }

    /// The URL of a center's order database.
    pub(crate) fn database(&self, which: Which) -> String {
        self.side(which).database.clone()
    }

    /// Whether a center has logged this.
    pub(crate) fn logged(&self, which: Which, text: &str) -> bool {
        self.times_logged(which, text) > 0
    }

    /// How often a center has logged this.
    pub(crate) fn times_logged(&self, which: Which, text: &str) -> usize {
        self.side(which).output.lock().unwrap().iter().filter(|line| line.contains(text)).count()
    }

    /// Waits until a center answers requests.
    pub(crate) async fn until_serving(&mut self, which: Which) {
        let client = self.client(which);
        let deadline = Instant::now() + PATIENCE;
        let url = format!("http://127.0.0.1:{}/readyz", port(self.base_port, which) + 1);
        while client.send(Method::GET, &url, "", &[], None).await.is_none_or(|answer| answer.status != 200) {
            let ended = self.side_mut(which).child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "it ended ({ended:?}):\n{}", self.logs());
            assert!(Instant::now() < deadline, "it never got ready:\n{}", self.logs());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The topology, as a center shows it.
    pub(crate) async fn topology(&self, which: Which) -> Value {
        self.client(which).admin(Method::GET, "/admin/v1/topology", &[], None).await.body
    }

    /// What a center says of itself.
    pub(crate) async fn ready(&self, which: Which) -> Value {
        self.client(which).admin(Method::GET, "/readyz", &[], None).await.body
    }

    /// The epoch that a center shows.
    pub(crate) async fn epoch(&self, which: Which) -> u64 {
        self.topology(which).await["epoch"].as_u64().unwrap()
    }

    /// Waits for an epoch after this one in which b has everything that is acknowledged.
    pub(crate) async fn until_in_sync(&self, after_epoch: u64) -> u64 {
        eventually("b is in sync", async || {
            let topology = self.topology(Which::A).await;
            let steady = topology["state"] == "steady" && topology["in_sync"][0]["center"] == "b";
            // Between the topology's new epoch and the ledger's nobody sells.
            let sells = self.ready(Which::A).await["authority"]["cause"].is_null();
            topology["epoch"].as_u64().filter(|epoch| steady && sells && *epoch > after_epoch)
        })
        .await
    }

    /// Waits until the master sells without b.
    pub(crate) async fn until_degraded(&self) {
        eventually("b is taken off", async || {
            (self.topology(Which::A).await["state"] == "degraded").then_some(())
        })
        .await;
    }

    /// The ends of both logs.
    pub(crate) fn logs(&self) -> String {
        let mut text = String::new();
        for side in &self.sides {
            let lines = side.output.lock().unwrap();
            let from = lines.len().saturating_sub(LOG_LINES);
            writeln!(text, "--- center {}\n{}", side.which.id(), lines[from..].join("\n")).unwrap();
        }
        text
    }
}

impl Drop for Centers {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for side in &mut self.sides {
            if let Some(mut child) = side.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Side {
    fn spawn(&mut self, variables: &[(&str, &str)]) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_seckill"))
            .args(["serve", "--config"])
            .arg(&self.config)
            .env("SECKILL__ORDERS__DATABASE_URL", &self.database)
            .env("SECKILL_FAIL_POINT", &self.fail_point)
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        for stream in [
            Box::new(child.stdout.take().unwrap()) as Box<dyn std::io::Read + Send>,
            Box::new(child.stderr.take().unwrap()),
        ] {
            let output = Arc::clone(&self.output);
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    output.lock().unwrap().push(line);
                }
            });
        }
        self.child = Some(child);
    }
}

/// The first port of a center.
fn port(base: u16, which: Which) -> u16 {
    base + (which.number() - 1) * 10
}
