//! MariaDB, as durable as production has it and as small as tests need it.

use std::path::Path;
use std::time::Duration;

use sqlx::mysql::{MySqlConnectOptions, MySqlConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row};

use crate::error::PartError;
use crate::process::{Invocation, Lifetime, find_program};
use crate::server::{self, Data, Server, data_folder, folder, lifecycle, on_ports, prepare};

/// The service's account: its name and its password, for tests and development.
const ACCOUNT: &str = "seckill";
/// How long one attempt to log in may take while a server starts.
const LOGIN_WAIT: Duration = Duration::from_secs(5);

/// How long a new pair may take until the second has what the first one has.
const PAIRED_WITHIN: Duration = Duration::from_secs(30);

/// How to run a server.
#[derive(Debug, Clone)]
pub struct MariadbOptions {
    /// `server_id`, `gtid_domain_id` and `auto_increment_offset`: different for servers that replicate from each other.
    /// 1 or more.
    pub server_id: u32,
    /// Who it lives for.
    pub lifetime: Lifetime,
    /// More options, which win over ours: `--innodb-lock-wait-timeout=1`.
    pub extra: Vec<String>,
}

impl Default for MariadbOptions {
    fn default() -> MariadbOptions {
        MariadbOptions { server_id: 1, lifetime: Lifetime::Owned, extra: Vec::new() }
    }
}

/// A MariaDB server.
///
/// Every commit is on the disk (`innodb_flush_log_at_trx_commit=1`, `sync_binlog=1`), the binary log is on and carries
/// GTIDs. Buffers are small. `root` logs in over TCP without a password.
#[derive(Debug)]
pub struct Mariadb {
    port: u16,
    server: Server,
}

impl Mariadb {
    /// Starts a server in `dir`; it answers queries when this returns.
    pub async fn start(dir: &Path) -> Result<Mariadb, PartError> {
        Mariadb::start_with(dir, &MariadbOptions::default()).await
    }

    /// Starts a server with options.
    pub async fn start_with(dir: &Path, options: &MariadbOptions) -> Result<Mariadb, PartError> {
        let dir = folder(dir)?;
        on_ports(&dir, |[port], data| Mariadb::on_port(&dir, port, data, options)).await
    }

    async fn on_port(
        dir: &Path,
        port: u16,
        data: Data,
        options: &MariadbOptions,
    ) -> Result<Mariadb, PartError> {
        let missing = |program| PartError::Missing { program, package: "mariadb-server" };
        let program = find_program("mariadbd").ok_or_else(|| missing("mariadbd"))?;
        let folder = data_folder(dir, data)?;
        // A server that starts deletes what others left in its folder for temporary tables, or still have there.
        let temporary = server::folder(&dir.join("tmp"))?;
        if data == Data::Fresh {
            let install = find_program("mariadb-install-db").ok_or_else(|| missing("mariadb-install-db"))?;
            let mut install = tokio::process::Command::new(install);
            install.args(["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]);
            install.arg(format!("--datadir={}", folder.display()));
            install.env("TMPDIR", &temporary);
            install.args(as_root());
            prepare(dir, "mariadb-install-db", install).await?;
        }
        let id = options.server_id;
        let mut args = vec![
            "--no-defaults".to_owned(),
            format!("--datadir={}", folder.display()),
            format!("--tmpdir={}", temporary.display()),
            format!("--port={port}"),
            "--bind-address=127.0.0.1".to_owned(),
            // Relative to the data folder: a path to a socket may have no more than 107 bytes.
            "--socket=mysql.sock".to_owned(),
            "--pid-file=mysql.pid".to_owned(),
            "--skip-name-resolve".to_owned(),
            format!("--server-id={id}"),
            format!("--gtid-domain-id={id}"),
            "--gtid-strict-mode=ON".to_owned(),
            // Servers that replicate each other never give out the same row number.
            "--auto-increment-increment=8".to_owned(),
            format!("--auto-increment-offset={}", (id - 1) % 8 + 1),
            "--log-bin=binlog".to_owned(),
            "--binlog-format=ROW".to_owned(),
            "--max-binlog-size=64M".to_owned(),
            // A commit is on the disk, in both logs, before it is acknowledged.
            "--innodb-flush-log-at-trx-commit=1".to_owned(),
            "--sync-binlog=1".to_owned(),
            "--innodb-buffer-pool-size=64M".to_owned(),
            "--innodb-log-file-size=64M".to_owned(),
            "--aria-pagecache-buffer-size=1M".to_owned(),
            "--key-buffer-size=1M".to_owned(),
            "--performance-schema=OFF".to_owned(),
            // A schema has more than 1,000 tables, and several tests run at once.
            "--table-open-cache=4000".to_owned(),
            "--table-definition-cache=4000".to_owned(),
            "--max-connections=300".to_owned(),
        ];
        args.extend(as_root());
        args.extend(options.extra.iter().cloned());
        let invocation =
            Invocation { program, args, env: Vec::new(), dir: dir.to_owned(), log: dir.join("mariadb.log") };
        let server = Server::spawn("mariadbd", invocation, options.lifetime)?;
        let mariadb = Mariadb { port, server };
        mariadb.server.ready(|| mariadb.answers()).await?;
        Ok(mariadb)
    }

    async fn answers(&self) -> Result<(), String> {
        let ask = async {
            let mut connection = self.admin().connect().await.map_err(|error| error.to_string())?;
            connection.ping().await.map_err(|error| error.to_string())
        };
        tokio::time::timeout(LOGIN_WAIT, ask).await.unwrap_or_else(|_| Err("no answer to a login".to_owned()))
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The administrator's URL, without a database: `mysql://root@127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("mysql://root@127.0.0.1:{}", self.port)
    }

    /// The administrator.
    pub fn admin(&self) -> MariadbAdmin {
        MariadbAdmin { url: self.url() }
    }

    /// See [`MariadbAdmin::create_database`].
    pub async fn create_database(&self, name: &str) -> Result<String, PartError> {
        self.admin().create_database(name).await
    }

    /// Replicates from a server at `port` of 127.0.0.1 (another one, or a [`Link`](crate::Link) to it), by GTID from
    /// the beginning. Call it for both and they replicate both ways. Again is harmless.
    pub async fn replicate_from(&self, port: u16) -> Result<(), PartError> {
        let mut connection = self.admin().connect().await?;
        for statement in [
            "STOP SLAVE".to_owned(),
            format!(
                "CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT={port}, MASTER_USER='root', \
                 MASTER_USE_GTID=slave_pos, MASTER_CONNECT_RETRY=1, MASTER_HEARTBEAT_PERIOD=1"
            ),
            "START SLAVE".to_owned(),
        ] {
            connection.execute(AssertSqlSafe(statement)).await?;
        }
        Ok(connection.close().await?)
    }

    /// Makes two servers replicate each other, with an empty database of this name in both. Returns the URLs for the
    /// service's account, of this one and of the other. Whatever either held before goes to the other one, too.
    pub async fn pair_with(&self, other: &Mariadb, name: &str) -> Result<(String, String), PartError> {
        let url = self.create_database(name).await?;
        other.replicate_from(self.port).await?;
        self.replicate_from(other.port).await?;
        if !other.catches_up_with(self, PAIRED_WITHIN).await? {
            return Err(PartError::Unpaired);
        }
        let other_url = url.replace(&format!(":{}/", self.port), &format!(":{}/", other.port));
        Ok((url, other_url))
    }

    /// Waits until this server has applied everything that `other` has committed by now; whether that happened before
    /// `deadline` passed.
    pub async fn catches_up_with(&self, other: &Mariadb, deadline: Duration) -> Result<bool, PartError> {
        let mut theirs = other.admin().connect().await?;
        let position: String = theirs.fetch_one("SELECT @@gtid_binlog_pos").await?.try_get::<String, _>(0)?;
        let mut ours = self.admin().connect().await?;
        let row = sqlx::query("SELECT MASTER_GTID_WAIT(?, ?)")
            .bind(position)
            .bind(deadline.as_secs_f64())
            .fetch_one(&mut ours)
            .await?;
        Ok(row.try_get::<i64, _>(0)? == 0)
    }
}

lifecycle!(Mariadb);

/// The administrator of a server that may be anybody's.
#[derive(Debug, Clone)]
pub struct MariadbAdmin {
    url: String,
}

impl MariadbAdmin {
    /// For the server at this URL, which names an account that may create databases and accounts.
    pub fn new(url: impl Into<String>) -> MariadbAdmin {
        MariadbAdmin { url: url.into() }
    }

    /// The administrator's URL, without a database.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A connection as the administrator.
    pub async fn connect(&self) -> Result<MySqlConnection, PartError> {
        Ok(self.options()?.connect().await?)
    }

    /// Makes an empty database (one of this name is removed first) and returns its URL for the service's account.
    ///
    /// That account may do everything in databases that were made here, and nothing to the server: one with ALL
    /// privileges would ignore `read_only`. The database's collation is the server's own, which takes `Bob` for `bob`.
    pub async fn create_database(&self, name: &str) -> Result<String, PartError> {
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if name.is_empty() || name.len() > 64 || !name.chars().all(allowed) {
            return Err(PartError::Name(name.to_owned()));
        }
        // In a grant, an underscore stands for any character.
        let pattern = name.replace('_', "\\_");
        let mut connection = self.connect().await?;
        for statement in [
            format!("DROP DATABASE IF EXISTS `{name}`"),
            format!("CREATE DATABASE `{name}`"),
            format!("CREATE USER IF NOT EXISTS '{ACCOUNT}'@'%' IDENTIFIED BY '{ACCOUNT}'"),
            // To read GTID positions and the state of replication.
            format!("GRANT BINLOG MONITOR, REPLICA MONITOR ON *.* TO '{ACCOUNT}'@'%'"),
            format!(
                "GRANT SELECT, INSERT, UPDATE, DELETE, CREATE, ALTER, DROP, INDEX, REFERENCES, LOCK TABLES \
                 ON `{pattern}`.* TO '{ACCOUNT}'@'%'"
            ),
        ] {
            connection.execute(AssertSqlSafe(statement)).await?;
        }
        connection.close().await?;
        let options = self.options()?.username(ACCOUNT).password(ACCOUNT).database(name);
        Ok(format!("mysql://{ACCOUNT}:{ACCOUNT}@{}:{}/{name}", options.get_host(), options.get_port()))
    }

    /// Removes a database.
    pub async fn drop_database(&self, name: &str) -> Result<(), PartError> {
        let mut connection = self.connect().await?;
        connection
            .execute(AssertSqlSafe(format!("DROP DATABASE IF EXISTS `{}`", name.replace('`', "``"))))
            .await?;
        Ok(connection.close().await?)
    }

    fn options(&self) -> Result<MySqlConnectOptions, PartError> {
        Ok(self.url.parse::<MySqlConnectOptions>()?.disable_statement_logging())
    }
}

/// mariadbd refuses to run as root unless told so; containers and CI often have nobody else.
fn as_root() -> Option<String> {
    rustix::process::geteuid().is_root().then(|| "--user=root".to_owned())
}
