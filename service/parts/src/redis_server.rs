//! Redis, as production has it: the append-only file is on the disk before an answer.

use std::path::Path;
use std::time::Duration;

use crate::error::PartError;
use crate::process::{Invocation, Lifetime, find_program};
use crate::server::{Data, Server, data_folder, folder, lifecycle, on_ports};

/// How long one PING may take while a server starts.
const PING_WAIT: Duration = Duration::from_secs(2);

/// How to run a server.
#[derive(Debug, Clone, Default)]
pub struct RedisOptions {
    /// Starts as a replica of nobody, as a center's Redis has to: it refuses writes until a guardian gives it its role.
    pub isolated: bool,
    /// Who it lives for.
    pub lifetime: Lifetime,
    /// More settings, which win over ours: `("maxmemory", "1gb")`.
    pub extra: Vec<(String, String)>,
}

/// A redis-server.
#[derive(Debug)]
pub struct Redis {
    port: u16,
    server: Server,
}

impl Redis {
    /// Starts a server in `dir` that takes writes; it has loaded its data when this returns.
    pub async fn start(dir: &Path) -> Result<Redis, PartError> {
        Redis::start_with(dir, &RedisOptions::default()).await
    }

    /// Starts a server with options.
    pub async fn start_with(dir: &Path, options: &RedisOptions) -> Result<Redis, PartError> {
        let dir = folder(dir)?;
        on_ports(&dir, |[port], data| Redis::on_port(&dir, port, data, options)).await
    }

    async fn on_port(dir: &Path, port: u16, data: Data, options: &RedisOptions) -> Result<Redis, PartError> {
        let program = find_program("redis-server")
            .ok_or(PartError::Missing { program: "redis-server", package: "redis-server" })?;
        let folder = data_folder(dir, data)?;
        let mut args = Vec::new();
        let mut set = |name: &str, values: &[&str]| {
            args.push(format!("--{name}"));
            args.extend(values.iter().map(|value| (*value).to_owned()));
        };
        set("bind", &["127.0.0.1"]);
        set("port", &[&port.to_string()]);
        set("dir", &[&folder.display().to_string()]);
        set("save", &[""]);
        set("appendonly", &["yes"]);
        set("appendfsync", &["always"]);
        set("maxmemory-policy", &["noeviction"]);
        set("repl-diskless-load", &["swapdb"]);
        set("repl-diskless-sync-delay", &["0"]);
        set("disable-thp", &["no"]);
        // Its title would be written over its environment, in which its folder is looked for.
        set("set-proc-title", &["no"]);
        if options.isolated {
            set("replicaof", &["127.0.0.1", "1"]);
        }
        for (name, value) in &options.extra {
            let values: Vec<&str> = value.split(' ').collect();
            set(name, &values);
        }
        // Huge pages, see docs/ledger.md.
        let env =
            ["MALLOC_CONF", "JE_MALLOC_CONF"].map(|name| (name.to_owned(), "thp:always".to_owned())).into();
        let invocation = Invocation { program, args, env, dir: dir.to_owned(), log: dir.join("redis.log") };
        let server = Server::spawn("redis-server", invocation, options.lifetime)?;
        let redis = Redis { port, server };
        redis.server.ready(|| redis.answers()).await?;
        Ok(redis)
    }

    async fn answers(&self) -> Result<(), String> {
        let ask = async {
            let client = redis::Client::open(self.url())?;
            let mut connection = client.get_multiplexed_async_connection().await?;
            redis::cmd("PING").query_async::<String>(&mut connection).await
        };
        match tokio::time::timeout(PING_WAIT, ask).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no answer to PING".to_owned()),
        }
    }

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its URL.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }
}

lifecycle!(Redis);
