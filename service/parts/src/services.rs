//! The whole set, running on its own: `make services`.
//!
//! ```text
//! FOLDER/state.json   addresses and processes, for programs
//! FOLDER/env          the same as `export NAME=value`, for shells
//! FOLDER/kafka-a/ …   one folder for each part
//! ```
//!
//! The parts outlive the program that starts them. They are ended by pid and start time, never by name: other sets, and
//! the machine's own servers, may run beside them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::error::{PartError, file_error};
use crate::etcd::{Etcd, EtcdOptions};
use crate::kafka::{Kafka, KafkaOptions};
use crate::kafka_jars::target_folder;
use crate::mariadb::{Mariadb, MariadbOptions};
use crate::process::{Identity, Lifetime, of_folder};
use crate::redis_server::{Redis, RedisOptions};

/// Where the services are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Services {
    /// Center a's Kafka, for `bootstrap.servers`.
    pub kafka_a: String,
    /// Center b's Kafka.
    pub kafka_b: String,
    /// Center a's MariaDB, as its administrator. It replicates from b's.
    pub mariadb_a: String,
    /// Center b's MariaDB, as its administrator. It replicates from a's.
    pub mariadb_b: String,
    /// etcd's endpoint.
    pub etcd: String,
    /// Center a's Redis, isolated until a guardian gives it its role.
    pub redis_a: String,
    /// Center b's Redis, likewise.
    pub redis_b: String,
}

impl Services {
    /// Names of environment variables and their values: what `env` exports.
    pub fn variables(&self) -> [(&'static str, &str); 7] {
        [
            ("KAFKA_BOOTSTRAP", &self.kafka_a),
            ("KAFKA_BOOTSTRAP_B", &self.kafka_b),
            ("SECKILL_TEST_MARIADB", &self.mariadb_a),
            ("SECKILL_TEST_MARIADB_B", &self.mariadb_b),
            ("SECKILL_TEST_ETCD", &self.etcd),
            ("SECKILL_TEST_REDIS_A", &self.redis_a),
            ("SECKILL_TEST_REDIS_B", &self.redis_b),
        ]
    }
}

/// The content of `state.json`. It is written when all services are ready.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    services: Services,
    processes: BTreeMap<String, Identity>,
}

/// How often leftovers are looked for: each round ends what the one before started too late to be seen.
const SWEEPS: usize = 10;

/// What [`up`] found or did.
#[derive(Debug)]
pub enum Up {
    /// It started them.
    Started(Services),
    /// They ran already, all of them.
    Running(Services),
}

/// Where `make services` keeps them: `target/services` of this workspace.
pub fn default_folder() -> PathBuf {
    target_folder().join("services")
}

/// The services of a folder, if every one of them runs.
pub fn running(dir: &Path) -> Option<Services> {
    let state = read(dir).ok().flatten()?;
    state.processes.values().all(|process| process.is_alive()).then_some(state.services)
}

/// Which processes belong to the services of a folder, and whether each still runs.
pub fn processes(dir: &Path) -> Result<Vec<(String, Identity, bool)>, PartError> {
    let processes = read(dir)?.map(|state| state.processes).unwrap_or_default();
    Ok(processes.into_iter().map(|(name, process)| (name, process, process.is_alive())).collect())
}

/// Starts the services in a folder, with the data that it has, unless all of them run. They are ready when this returns;
/// after an error none of them runs.
pub async fn up(dir: &Path) -> Result<Up, PartError> {
    let dir = folder(dir)?;
    let _lock = lock(&dir).await?;
    if let Some(services) = running(&dir) {
        return Ok(Up::Running(services));
    }
    end_all(&dir).await?;
    match Box::pin(start(&dir)).await {
        Ok(state) => {
            write(&dir, &state)?;
            Ok(Up::Started(state.services))
        }
        Err(error) => {
            end_all(&dir).await?;
            Err(error)
        }
    }
}

/// Ends exactly the services of a folder, also those that a starter which died left behind. Returns how many processes
/// were ended. The data stays, unless it is to be `removed`.
pub async fn down(dir: &Path, removed: bool) -> Result<usize, PartError> {
    if !dir.exists() {
        return Ok(0);
    }
    let dir = folder(dir)?;
    let _lock = lock(&dir).await?;
    let ended = end_all(&dir).await?;
    if removed {
        fs::remove_dir_all(&dir).map_err(file_error("remove", &dir))?;
    }
    Ok(ended)
}

async fn start(dir: &Path) -> Result<State, PartError> {
    let lifetime = Lifetime::Detached;
    let kafka = KafkaOptions { lifetime, ..KafkaOptions::default() };
    let mariadb = |server_id| MariadbOptions { lifetime, server_id, ..MariadbOptions::default() };
    let (mariadb_options_a, mariadb_options_b) = (mariadb(1), mariadb(2));
    let etcd = EtcdOptions { lifetime, ..EtcdOptions::default() };
    let redis = RedisOptions { lifetime, isolated: true, ..RedisOptions::default() };
    let folder = |name: &str| dir.join(name);
    let [kafka_a_dir, kafka_b_dir] = ["kafka-a", "kafka-b"].map(folder);
    let [mariadb_a_dir, mariadb_b_dir] = ["mariadb-a", "mariadb-b"].map(folder);
    let [redis_a_dir, redis_b_dir, etcd_dir] = ["redis-a", "redis-b", "etcd"].map(folder);
    let (kafka_a, kafka_b, mariadb_a, mariadb_b, etcd, redis_a, redis_b) = tokio::try_join!(
        Kafka::start_with(&kafka_a_dir, &kafka),
        Kafka::start_with(&kafka_b_dir, &kafka),
        Mariadb::start_with(&mariadb_a_dir, &mariadb_options_a),
        Mariadb::start_with(&mariadb_b_dir, &mariadb_options_b),
        Etcd::start_with(&etcd_dir, &etcd),
        Redis::start_with(&redis_a_dir, &redis),
        Redis::start_with(&redis_b_dir, &redis),
    )?;
    mariadb_a.replicate_from(mariadb_b.port()).await?;
    mariadb_b.replicate_from(mariadb_a.port()).await?;
    let processes = [
        ("kafka-a", kafka_a.identity()),
        ("kafka-b", kafka_b.identity()),
        ("mariadb-a", mariadb_a.identity()),
        ("mariadb-b", mariadb_b.identity()),
        ("etcd", etcd.identity()),
        ("redis-a", redis_a.identity()),
        ("redis-b", redis_b.identity()),
    ];
    let processes =
        processes.into_iter().filter_map(|(name, process)| Some((name.to_owned(), process?))).collect();
    let services = Services {
        kafka_a: kafka_a.bootstrap(),
        kafka_b: kafka_b.bootstrap(),
        mariadb_a: mariadb_a.url(),
        mariadb_b: mariadb_b.url(),
        etcd: etcd.endpoint(),
        redis_a: redis_a.url(),
        redis_b: redis_b.url(),
    };
    Ok(State { services, processes })
}

/// Ends what the state names, then what it does not name: a starter that was killed wrote nothing down, but each process
/// carries its folder in its environment.
async fn end_all(dir: &Path) -> Result<usize, PartError> {
    // An unreadable state must not keep the processes alive; the mark in their environment finds them.
    let mut processes: Vec<Identity> =
        read(dir).ok().flatten().map(|state| state.processes.into_values().collect()).unwrap_or_default();
    let mut ended = 0;
    // A script that prepares a part may start a program while it is looked for, so look until nothing is left.
    for _ in 0..SWEEPS {
        let marked = of_folder(dir);
        let unknown: Vec<Identity> = marked.into_iter().filter(|one| !processes.contains(one)).collect();
        processes.extend(unknown);
        if processes.is_empty() {
            break;
        }
        let mut ending = tokio::task::JoinSet::new();
        for process in processes.drain(..) {
            ending.spawn_blocking(move || process.end());
        }
        while let Some(result) = ending.join_next().await {
            let was_alive =
                result?.map_err(|source| PartError::Spawn { part: "services-down".to_owned(), source })?;
            ended += usize::from(was_alive);
        }
    }
    for name in ["state.json", "env"] {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file_error("remove", &path)(error));
            }
            _ => {}
        }
    }
    Ok(ended)
}

fn read(dir: &Path) -> Result<Option<State>, PartError> {
    let path = dir.join("state.json");
    match fs::read(&path) {
        Ok(text) => {
            serde_json::from_slice(&text).map(Some).map_err(|source| PartError::State { path, source })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error("read", &path)(error)),
    }
}

fn write(dir: &Path, state: &State) -> Result<(), PartError> {
    let exports =
        state.services.variables().map(|(name, value)| format!("export {name}='{value}'\n")).concat();
    let path = dir.join("state.json");
    let text = serde_json::to_vec_pretty(state).map_err(|source| PartError::State { path, source })?;
    // The state last: whoever finds it finds the rest.
    for (name, text) in [("env", exports.into_bytes()), ("state.json", text)] {
        let (path, half) = (dir.join(name), dir.join(format!("{name}.half")));
        fs::write(&half, text).map_err(file_error("write", &half))?;
        fs::rename(&half, &path).map_err(file_error("rename to", &path))?;
    }
    Ok(())
}

fn folder(dir: &Path) -> Result<PathBuf, PartError> {
    crate::server::folder(dir)
}

/// Two starters at once: the second waits, and finds what the first has started.
async fn lock(dir: &Path) -> Result<File, PartError> {
    // Beside the folder, which may be removed under the lock.
    let path = dir.with_extension("lock");
    let file = File::create(&path).map_err(file_error("create", &path))?;
    tokio::task::spawn_blocking(move || flock(&file, FlockOperation::LockExclusive).map(|()| file))
        .await?
        .map_err(|errno| PartError::File { what: "lock", path, source: errno.into() })
}
