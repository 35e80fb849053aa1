//! Runs `seckill serve` as production has it: over a Redis, a Kafka and a MariaDB.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use seckill_parts::{MariadbAdmin, Redis, RedisOptions, shared};
use sqlx::{AssertSqlSafe, MySqlPool};

use crate::client::Client;
use crate::support::PATIENCE;
use crate::up::free_base_port;

/// How many tables hold orders.
const TABLES: usize = 512;
/// Tables that one statement reads.
const TABLES_A_CALL: usize = 64;

/// Center a with its parts, and nobody who serves yet.
pub(crate) struct Center {
    dir: tempfile::TempDir,
    base_port: u16,
    bootstrap: String,
    topic_prefix: String,
    mariadb: MariadbAdmin,
    database: String,
    database_url: String,
    _redis: Redis,
}

impl Center {
    /// On the Kafka and the MariaDB that tests share, with names of its own.
    pub(crate) async fn open() -> Center {
        Center::on(shared::kafka().await.unwrap(), shared::mariadb().await.unwrap()).await
    }

    /// On these.
    pub(crate) async fn on(bootstrap: String, mariadb: MariadbAdmin) -> Center {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let dir = tempfile::tempdir().unwrap();
        let options = RedisOptions { isolated: true, ..RedisOptions::default() };
        let redis = Redis::start_with(&dir.path().join("redis"), &options).await.unwrap();
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let database = format!("seckill_serve_{}_{number}", std::process::id());
        let database_url = mariadb.create_database(&database).await.unwrap();
        let center = Center {
            base_port: free_base_port(),
            topic_prefix: format!("t{:016x}.", rand::random::<u64>()),
            bootstrap,
            mariadb,
            database,
            database_url,
            dir,
            _redis: redis,
        };
        center.configure(&center._redis.url());
        center
    }

    /// Writes the configuration, the secrets and the tokens, as an operator would.
    fn configure(&self, redis_url: &str) {
        let dir = self.dir();
        for ring in ["dev-token", "payments", "admin"] {
            fs::write(dir.join(format!("{ring}-secret")), format!("{:064x}", rand::random::<u128>()))
                .unwrap();
        }
        for role in ["payments", "admin"] {
            let data_dir = dir.display().to_string();
            let (code, token, err) = run(&["token", "issue", "--role", role, "--data-dir", &data_dir], &[]);
            assert_eq!(code, 0, "{err}");
            fs::write(dir.join(format!("{role}-token")), token).unwrap();
        }
        let (bootstrap, topic_prefix) = (&self.bootstrap, &self.topic_prefix);
        let file = |name: &str| format!("{:?}", dir.join(name));
        let key = |ring: &str, secret: &str| {
            format!("[[auth.{ring}.keys]]\nalg = \"HS256\"\nsecret_file = {}\n", file(secret))
        };
        let config = format!(
            "queue = \"kafka\"\n\
             [center]\nid = \"a\"\nnumber = 1\n\
             [ledger]\npartitions = [\"{redis_url}\"]\nmax_memory_bytes = 1073741824\ndiverged_dir = {diverged}\n\
             [kafka]\nbootstrap = \"{bootstrap}\"\ntopic_prefix = \"{topic_prefix}\"\nreplication_factor = 1\n\
             [topology]\npath = {topology}\n{users}{payments}{admin}",
            diverged = file("."),
            topology = file("topology.json"),
            users = key("users", "dev-token-secret"),
            payments = key("payments", "payments-secret"),
            admin = key("admin", "admin-secret"),
        );
        fs::write(dir.join("seckill.toml"), config).unwrap();
    }

    /// Starts a service and begins the ledger; its first client.
    pub(crate) async fn start(&self) -> (Service, Client) {
        let mut service = self.service(1);
        service.start(&[]).await;
        let (code, out, err) = service.cli(&["ledger", "init"]);
        assert_eq!(code, 0, "{out}\n{err}\n{}", service.log());
        let client = service.client();
        (service, client)
    }

    /// Describes the center's first or second service without starting it.
    pub(crate) fn service(&self, number: u16) -> Service {
        Service {
            dir: self.dir().to_owned(),
            base_port: self.base_port + 10 * (number - 1),
            database_url: self.database_url.clone(),
            log: self.dir().join(format!("serve-{number}.log")),
            child: None,
        }
    }

    fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// For `bootstrap.servers`.
    pub(crate) fn bootstrap(&self) -> &str {
        &self.bootstrap
    }

    /// A topic's name in this center.
    pub(crate) fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.topic_prefix)
    }

    /// How many orders MariaDB holds.
    pub(crate) async fn order_count(&self) -> i64 {
        let mut count = 0;
        let pool = self.pool().await;
        for tables in table_numbers().chunks(TABLES_A_CALL) {
            let each: Vec<String> =
                tables.iter().map(|table| format!("SELECT COUNT(*) AS n FROM orders_{table:03}")).collect();
            let sql = format!("SELECT CAST(SUM(n) AS SIGNED) FROM ({}) AS counts", each.join(" UNION ALL "));
            count += sqlx::query_scalar::<_, i64>(AssertSqlSafe(sql)).fetch_one(&pool).await.unwrap();
        }
        pool.close().await;
        count
    }

    /// The user of every order that MariaDB holds. Each order is once there, in the table that its user belongs to, by
    /// MariaDB's own arithmetic.
    pub(crate) async fn orders(&self) -> HashMap<String, String> {
        let mut orders = HashMap::new();
        let pool = self.pool().await;
        for tables in table_numbers().chunks(TABLES_A_CALL) {
            let each: Vec<String> = tables
                .iter()
                .map(|table| {
                    format!(
                        "SELECT order_id, uid, CAST({table} AS SIGNED), CAST(CRC32(uid) % {TABLES} AS SIGNED) \
                         FROM orders_{table:03}"
                    )
                })
                .collect();
            let sql = each.join(" UNION ALL ");
            let rows: Vec<(String, String, i64, i64)> =
                sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&pool).await.unwrap();
            for (order_id, uid, table, belongs) in rows {
                assert_eq!(table, belongs, "order {order_id} of {uid} is in another user's table");
                let twice = orders.insert(order_id.clone(), uid);
                assert_eq!(twice, None, "order {order_id} is in two tables");
            }
        }
        pool.close().await;
        orders
    }

    /// The center's database.
    pub(crate) async fn pool(&self) -> MySqlPool {
        MySqlPool::connect(&self.database_url).await.unwrap()
    }

    /// Removes what it has in servers that others use, too.
    pub(crate) async fn close(self) {
        self.mariadb.drop_database(&self.database).await.unwrap();
    }
}

fn table_numbers() -> Vec<usize> {
    (0..TABLES).collect()
}

/// A `seckill serve`.
pub(crate) struct Service {
    dir: PathBuf,
    base_port: u16,
    database_url: String,
    log: PathBuf,
    child: Option<Child>,
}

impl Service {
    /// Starts the process and waits until it takes requests.
    pub(crate) async fn start(&mut self, env: &[(&str, &str)]) {
        self.spawn(env);
        let client = self.client();
        let deadline = Instant::now() + PATIENCE;
        while !client.is_ready().await {
            if let Some(status) = self.ended() {
                panic!("it ended with {status} before it was ready:\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "it never got ready:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts the process.
    pub(crate) fn spawn(&mut self, env: &[(&str, &str)]) {
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let listen = |offset: u16| format!("127.0.0.1:{}", self.base_port + offset);
        let child = Command::new(env!("CARGO_BIN_EXE_seckill"))
            .args(["serve", "--config"])
            .arg(self.dir.join("seckill.toml"))
            .env("SECKILL__LISTEN__PUBLIC", listen(0))
            .env("SECKILL__LISTEN__ADMIN", listen(1))
            .env("SECKILL__LISTEN__INTERNAL", listen(2))
            .env("SECKILL__ORDERS__DATABASE_URL", &self.database_url)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        self.child = Some(child);
    }

    /// How the process ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().unwrap())
    }

    /// kill -9.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it was started");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// A client of it.
    pub(crate) fn client(&self) -> Client {
        Client::new(self.base_port, &self.dir)
    }

    /// Runs a command of the binary against it: exit code, standard output, standard error.
    pub(crate) fn cli(&self, args: &[&str]) -> (i32, String, String) {
        let (url, token) = (format!("http://127.0.0.1:{}", self.base_port + 1), self.dir.join("admin-token"));
        run(args, &[("SECKILL_ADMIN_URL", &url), ("SECKILL_ADMIN_TOKEN_FILE", &token.display().to_string())])
    }

    /// The audit's exit code and what it says.
    pub(crate) fn audit(&self) -> (i32, serde_json::Value) {
        let (code, out, err) = self.cli(&["audit", "-o", "json"]);
        let report = serde_json::from_str(&out);
        (
            code,
            report.unwrap_or_else(|_| panic!("the audit ended with {code}:\n{out}\n{err}\n{}", self.log())),
        )
    }

    /// The audit is clean; what it says.
    pub(crate) fn assert_books_balance(&self) -> serde_json::Value {
        let (code, report) = self.audit();
        assert_eq!(code, 0, "{report:#}\n{}", self.log());
        report
    }

    /// The end of what it printed.
    pub(crate) fn log(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(200)..].join("\n")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn run(args: &[&str], env: &[(&str, &str)]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_seckill"))
        .args(args)
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("the binary starts");
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}
