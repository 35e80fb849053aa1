//! Servers that several tests use at once: those that the environment names, those of `make services`, or else one that
//! is started once in this process and ends with it.
//!
//! Whoever uses one keeps to names of its own (databases, topic prefixes, key prefixes), and never stops it.

use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::error::PartError;
use crate::etcd::Etcd;
use crate::kafka::Kafka;
use crate::mariadb::{Mariadb, MariadbAdmin};
use crate::services::{self, Services};

/// Names a MariaDB for tests: an administrator's URL without a database.
pub const MARIADB_VARIABLE: &str = "SECKILL_TEST_MARIADB";
/// Names a Kafka for tests: `HOST:PORT`.
pub const KAFKA_VARIABLE: &str = "KAFKA_BOOTSTRAP";
/// Names an etcd for tests: `http://HOST:PORT`.
pub const ETCD_VARIABLE: &str = "SECKILL_TEST_ETCD";

/// A MariaDB: make databases in it.
pub async fn mariadb() -> Result<MariadbAdmin, PartError> {
    static STARTED: OnceCell<(Mariadb, Broom)> = OnceCell::const_new();
    if let Some(url) = named(MARIADB_VARIABLE, |services| &services.mariadb_a) {
        return Ok(MariadbAdmin::new(url));
    }
    let start = || async {
        let broom = Broom::new()?;
        Ok::<_, PartError>((Mariadb::start(broom.0.path()).await?, broom))
    };
    Ok(STARTED.get_or_try_init(start).await?.0.admin())
}

/// A Kafka, as `bootstrap.servers`.
pub async fn kafka() -> Result<String, PartError> {
    static STARTED: OnceCell<(Kafka, Broom)> = OnceCell::const_new();
    if let Some(bootstrap) = named(KAFKA_VARIABLE, |services| &services.kafka_a) {
        return Ok(bootstrap);
    }
    let start = || async {
        let broom = Broom::new()?;
        Ok::<_, PartError>((Kafka::start(broom.0.path()).await?, broom))
    };
    Ok(STARTED.get_or_try_init(start).await?.0.bootstrap())
}

/// An etcd, as an endpoint.
pub async fn etcd() -> Result<String, PartError> {
    static STARTED: OnceCell<(Etcd, Broom)> = OnceCell::const_new();
    if let Some(endpoint) = named(ETCD_VARIABLE, |services| &services.etcd) {
        return Ok(endpoint);
    }
    let start = || async {
        let broom = Broom::new()?;
        Ok::<_, PartError>((Etcd::start(broom.0.path()).await?, broom))
    };
    Ok(STARTED.get_or_try_init(start).await?.0.endpoint())
}

fn named(variable: &str, of: impl Fn(&Services) -> &String) -> Option<String> {
    static RUNNING: OnceLock<Option<Services>> = OnceLock::new();
    std::env::var(variable).ok().filter(|value| !value.is_empty()).or_else(|| {
        // Read once: what runs when the first test asks serves them all.
        let running = RUNNING.get_or_init(|| services::running(&services::default_folder()));
        running.as_ref().map(|services| of(services).clone())
    })
}

/// A temporary folder that is gone when this process is, however it ends: what lies in a `static` is never dropped.
struct Broom(
    TempDir,
    #[expect(dead_code, reason = "held for its standard input, which ends with this process")] Child,
);

/// Waits for the end of its standard input, and so of this process; the kernel kills the server in the same moment, but
/// it may write one more file.
const SWEEP: &str = r#"cat >/dev/null; for i in 1 2 3 4 5; do rm -rf "$1"; sleep 0.2; done"#;

impl Broom {
    fn new() -> Result<Broom, PartError> {
        let spawn = |source| PartError::Spawn { part: "sh".to_owned(), source };
        let folder = tempfile::Builder::new().prefix("seckill-part-").tempdir().map_err(spawn)?;
        let mut command = Command::new("sh");
        command.args(["-c", SWEEP, "sh"]).arg(folder.path());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // Not in the way of Ctrl-C.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(spawn)?;
        Ok(Broom(folder, child))
    }
}
