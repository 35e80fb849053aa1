//! Two centers as production runs them, 30 ms apart: in each a service of its own process and a redis-server, an etcd
//! beside them, and lines in between. The services are this program again, as the `seckill` binary.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use seckill_loadtest::client::{Client, Target};
use seckill_parts::{Etcd, Link, Redis, RedisOptions};
use serde_json::{Value, json};

use crate::process::cpu_time;

/// Each way.
const DELAY: Duration = Duration::from_millis(15);
/// How long anything may take that is not measured.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);
/// The key that users' tokens are signed with.
pub(crate) const SECRET: &str = "a secret of the bench, thirty-two bytes or more";

/// The centers' ids, the first master's first.
pub(crate) const IDS: [&str; 2] = ["a", "b"];

/// Both centers.
pub(crate) struct TwoServices {
    centers: Vec<Center>,
    /// `replicated` or `local`.
    durability: &'static str,
    admin_token: String,
    _etcd: Etcd,
    /// Dropped last.
    dir: tempfile::TempDir,
}

struct Center {
    id: &'static str,
    /// Public, admin, internal.
    ports: [u16; 3],
    redis: Redis,
    /// How the other center reaches the Redis and the internal listener.
    links: [Link; 2],
    child: Option<Child>,
}

impl TwoServices {
    /// Starts everything, with durability `replicated` or `local`, and puts an endless sale on offer.
    pub(crate) async fn open(sale: &str, durability: &'static str) -> anyhow::Result<TwoServices> {
        let dir = tempfile::tempdir()?;
        let etcd = Etcd::start(&dir.path().join("etcd")).await?;
        for (name, text) in [("users", SECRET), ("admin", SECRET), ("cross-a", SECRET), ("cross-b", SECRET)] {
            std::fs::write(dir.path().join(name), text)?;
        }
        let claims = json!({ "sub": "bench", "exp": jiff::Timestamp::now().as_second() + 24 * 3600 });
        let key = jsonwebtoken::EncodingKey::from_secret(SECRET.as_bytes());
        let admin_token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key)?;
        std::fs::write(dir.path().join("admin-token"), &admin_token)?;
        let mut centers = Vec::new();
        for id in IDS {
            let folder = dir.path().join(id);
            std::fs::create_dir(&folder)?;
            let options = RedisOptions { isolated: true, ..RedisOptions::default() };
            let redis = Redis::start_with(&folder.join("redis"), &options).await?;
            let ports = free_ports()?;
            let internal = SocketAddr::from(([127, 0, 0, 1], ports[2]));
            let links = [Link::start(redis.address())?, Link::start(internal)?];
            for link in &links {
                link.set_delay(DELAY, Duration::ZERO);
            }
            centers.push(Center { id, ports, redis, links, child: None });
        }
        let mut both = TwoServices { centers, durability, admin_token, _etcd: etcd, dir };
        for place in 0..IDS.len() {
            std::fs::write(both.config(place), both.configuration(place)?)?;
            both.spawn(place)?;
        }
        for place in 0..IDS.len() {
            both.until("the service is ready", async |both| {
                Ok(both.get(place, "/readyz").await.is_ok_and(|ready| ready["status"] == "ready"))
            })
            .await?;
        }
        both.command(0, &["ledger", "init"])?;
        both.until_master(0).await?;
        let quantity = 1_000_000_000.to_string();
        both.command(
            0,
            &["sale", "create", sale, "--quantity", &quantity, "--price", "1999", "--currency", "CNY"],
        )?;
        for place in 0..IDS.len() {
            both.until("the sale is shown", async |both| {
                let shown = both.target(place).await?;
                let mut client = Client::new(shown, CALL_TIMEOUT);
                Ok(client.get(&format!("/v1/sales/{sale}"), None).await.is_ok_and(|sale| sale.status == 200))
            })
            .await?;
        }
        Ok(both)
    }

    /// The public listener of a center.
    pub(crate) async fn target(&self, place: usize) -> anyhow::Result<Target> {
        Ok(Target::resolve(&format!("http://127.0.0.1:{}", self.centers[place].ports[0])).await?)
    }

    /// Runs a `seckill` command against a center; its JSON if it ends with 0.
    pub(crate) fn command(&self, place: usize, args: &[&str]) -> anyhow::Result<Value> {
        let output = Command::new(std::env::current_exe()?)
            .arg("seckill")
            .args(args)
            .args(["-o", "json"])
            .env("SECKILL_ADMIN_URL", format!("http://127.0.0.1:{}", self.centers[place].ports[1]))
            .env("SECKILL_ADMIN_TOKEN_FILE", self.dir.path().join("admin-token"))
            .stdin(Stdio::null())
            .output()?;
        ensure!(
            output.status.success(),
            "{args:?} ended with {}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).context("no JSON")
    }

    /// Waits until a center is the master and the other one has everything that is acknowledged; with durability `local`
    /// that is never said of it.
    pub(crate) async fn until_master(&self, place: usize) -> anyhow::Result<()> {
        self.until("the master sells and the other center follows", async |both| {
            let topology = both.get(place, "/admin/v1/topology").await?;
            let ready = both.get(place, "/readyz").await?;
            Ok(topology["master"] == IDS[place]
                && topology["state"] == "steady"
                && (both.durability == "local"
                    || topology["in_sync"].as_array().is_some_and(|replicas| !replicas.is_empty()))
                && ready["authority"]["granted"] == true)
        })
        .await
    }

    /// kill -9 of everything in a center.
    pub(crate) fn kill(&mut self, place: usize) -> anyhow::Result<()> {
        let center = &mut self.centers[place];
        for link in &center.links {
            link.cut();
        }
        center.redis.kill();
        let mut child = center.child.take().context("it does not run")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    fn spawn(&mut self, place: usize) -> anyhow::Result<()> {
        let log = std::fs::File::create(self.dir.path().join(IDS[place]).join("service.log"))?;
        let database = format!("sqlite:{}", self.dir.path().join(IDS[place]).join("orders.db").display());
        let child = Command::new(std::env::current_exe()?)
            .args(["seckill", "serve", "--config"])
            .arg(self.config(place))
            .env("SECKILL__ORDERS__DATABASE_URL", database)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.centers[place].child = Some(child);
        Ok(())
    }

    fn config(&self, place: usize) -> PathBuf {
        self.dir.path().join(IDS[place]).join("seckill.toml")
    }

    fn configuration(&self, place: usize) -> anyhow::Result<String> {
        let dir: &Path = self.dir.path();
        let dir = dir.display();
        let Center { id, ports: [public, admin, internal], redis, links, .. } = &self.centers[place];
        let mut text = String::new();
        write!(
            text,
            r#"
[center]
id = "{id}"
number = {}
[listen]
public = "127.0.0.1:{public}"
admin = "127.0.0.1:{admin}"
internal = "127.0.0.1:{internal}"
internal_url = "http://{}"
[ledger]
partitions = ["{}"]
diverged_dir = "{dir}/{id}"
[limits]
per_user = "off"
[telemetry]
log = "seckill=info,warn"
[cluster]
durability = "{}"
[topology]
store = "etcd"
[topology.etcd]
endpoints = ["{}"]
"#,
            place + 1,
            links[1].address(),
            redis.url(),
            self.durability,
            self._etcd.endpoint(),
        )?;
        for (ring, file) in [("users", "users"), ("admin", "admin"), ("payments", "cross-a")] {
            writeln!(text, "[[auth.{ring}.keys]]\nalg = \"HS256\"\nsecret_file = \"{dir}/{file}\"")?;
        }
        for (number, other) in self.centers.iter().enumerate() {
            let (id, [public, admin, _]) = (other.id, other.ports);
            writeln!(
                text,
                "[[cluster.centers]]\nid = \"{id}\"\nnumber = {}\npublic_url = \"http://127.0.0.1:{public}\"\n\
                 admin_url = \"http://127.0.0.1:{admin}\"\ninternal_url = \"http://{}\"\nledger = [\"{}\"]\n\
                 [[cross_center.keys]]\nid = \"{id}-1\"\ncenter = \"{id}\"\nsecret_file = \"{dir}/cross-{id}\"",
                number + 1,
                other.links[1].address(),
                other.links[0].address(),
            )?;
        }
        Ok(text)
    }

    /// What an admin listener shows, if it answers at all.
    async fn get(&self, place: usize, path: &str) -> anyhow::Result<Value> {
        Ok(serde_json::from_slice(&self.get_bytes(place, path).await?)?)
    }

    async fn get_bytes(&self, place: usize, path: &str) -> anyhow::Result<Vec<u8>> {
        let url = format!("http://127.0.0.1:{}", self.centers[place].ports[1]);
        let mut client = Client::new(Target::resolve(&url).await?, CALL_TIMEOUT);
        Ok(client.get(path, Some(&self.admin_token)).await?.body)
    }

    /// Orders that both centers stored.
    pub(crate) async fn stored(&self) -> anyhow::Result<u64> {
        let mut stored = 0;
        for place in 0..IDS.len() {
            let metrics = String::from_utf8(self.get_bytes(place, "/metrics").await?)?;
            let count = metrics.lines().find_map(|line| line.strip_prefix("seckill_orders_stored_total "));
            stored += count.context("no count of stored orders")?.parse::<u64>()?;
        }
        Ok(stored)
    }

    /// Waits until both centers together stored so many orders.
    pub(crate) async fn until_stored(&self, orders: u64) -> anyhow::Result<()> {
        self.until("the orders are stored", async |both| Ok(both.stored().await? >= orders)).await
    }

    /// CPU time that both services used so far.
    pub(crate) fn cpu_time(&self) -> anyhow::Result<Duration> {
        self.centers.iter().filter_map(|center| center.child.as_ref()).map(|child| cpu_time(child.id())).sum()
    }

    async fn until(
        &self,
        what: &str,
        mut check: impl AsyncFnMut(&TwoServices) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !check(self).await.unwrap_or(false) {
            if Instant::now() > deadline {
                bail!("waited in vain: {what}\n{}", self.logs());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// What both services said.
    pub(crate) fn logs(&self) -> String {
        let log = |id: &str| std::fs::read_to_string(self.dir.path().join(id).join("service.log"));
        IDS.iter().map(|id| format!("--- center {id}\n{}", log(id).unwrap_or_default())).collect()
    }
}

impl Drop for TwoServices {
    fn drop(&mut self) {
        for child in self.centers.iter_mut().filter_map(|center| center.child.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Three ports that nobody listens on now.
fn free_ports() -> anyhow::Result<[u16; 3]> {
    let listeners = [0; 3].map(|_| TcpListener::bind(("127.0.0.1", 0)));
    let mut ports = [0; 3];
    for (port, listener) in ports.iter_mut().zip(listeners) {
        *port = listener?.local_addr()?.port();
    }
    Ok(ports)
}
