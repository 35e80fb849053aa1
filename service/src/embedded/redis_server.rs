//! A redis-server as a child process: started, watched, started again when it dies, ended with the service.
//!
//! It starts isolated (S1): the guardian gives it its role. It dies with this process, however that ends: the
//! kernel kills it (`setpriv --pdeathsig`), and where `setpriv` is missing the next start finds it by its pid
//! file and its working folder and ends it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::data_dir::{DataDirError, folder, io_error};
use crate::shift::ServerProcess;

/// How long a new server may take until it answers at all (it answers while it loads its data).
const START_WAIT: Duration = Duration::from_secs(10);
/// How often a server that is not there yet, or not gone yet, is looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// A server that ends is started again after this long, then after twice as long, up to the second.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// One that ran this long is healthy: the next restart is quick again.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// How long a server may take to end by itself.
const STOP_WAIT: Duration = Duration::from_secs(10);
/// How often the data folder is looked for.
const FOLDER_INTERVAL: Duration = Duration::from_millis(250);
/// When the data folder is gone, sales stop; what was accepted gets this long to reach the order database.
const LAST_ORDERS: Duration = Duration::from_secs(2);
/// A log larger than this is begun anew at a start.
const LOG_MAX_BYTES: u64 = 10 << 20;
/// How much of the log's end is searched for a reason.
const LOG_TAIL_BYTES: u64 = 4096;

/// Which server to run.
#[derive(Debug, Clone)]
pub struct RedisOptions {
    /// Its folder, absolute: configuration, data, log and pid file.
    pub dir: PathBuf,
    /// Its port on the loopback interface.
    pub port: u16,
    /// Purchases stop at this size (M2).
    pub max_memory_bytes: u64,
}

/// Why a server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum RedisError {
    /// No such program.
    #[error("redis-server is not installed: run `apt-get install redis-server` (7.0 or later)")]
    Missing,
    /// The port is taken.
    #[error("port {port}, for Redis, is in use by another program: stop it, or choose another --base-port")]
    PortInUse {
        /// The port.
        port: u16,
    },
    /// The folder cannot be used.
    #[error(transparent)]
    Folder(#[from] DataDirError),
    /// The path cannot be written into Redis' configuration.
    #[error("{} cannot be a data folder: Redis takes paths in UTF-8 only", path.display())]
    Path {
        /// The folder.
        path: PathBuf,
    },
    /// The process could not be started.
    #[error("redis-server cannot be started: {0}")]
    Spawn(#[source] io::Error),
    /// It ended at once.
    #[error("redis-server ended at once ({status}): {reason} (log: {})", log.display())]
    Ended {
        /// How.
        status: String,
        /// The last thing it said.
        reason: String,
        /// Where it says more.
        log: PathBuf,
    },
    /// It runs but does not answer.
    #[error("redis-server does not answer on port {port} (log: {})", log.display())]
    Silent {
        /// The port.
        port: u16,
        /// Where it says more.
        log: PathBuf,
    },
}

/// A supervised server.
#[derive(Debug)]
pub struct RedisServer {
    process: watch::Receiver<ServerProcess>,
    stop: CancellationToken,
    supervisor: JoinHandle<()>,
}

impl RedisServer {
    /// Starts the server; it answers when this returns.
    pub async fn start(options: RedisOptions) -> Result<RedisServer, RedisError> {
        let binary = find_program("redis-server").ok_or(RedisError::Missing)?;
        let run = Run::start(&options, &binary).await?;
        let (status, process) = watch::channel(ServerProcess::Up);
        let stop = CancellationToken::new();
        let supervisor = tokio::spawn(supervise(options, binary, run, status, stop.clone()));
        Ok(RedisServer { process, stop, supervisor })
    }

    /// Follows the process.
    pub fn process(&self) -> watch::Receiver<ServerProcess> {
        self.process.clone()
    }

    /// Ends the server and waits until it is gone.
    pub async fn stop(self) {
        self.stop.cancel();
        let _ = self.supervisor.await;
    }
}

async fn supervise(
    options: RedisOptions,
    binary: PathBuf,
    first: Run,
    status: watch::Sender<ServerProcess>,
    stop: CancellationToken,
) {
    let mut run = Some(first);
    let mut backoff = BACKOFF_MIN;
    loop {
        let reason = match run.take() {
            Some(mut current) => {
                let started = Instant::now();
                let ended = current.watch(&options, &status, &stop).await;
                if stop.is_cancelled() {
                    current.end(ended.is_some()).await;
                    return;
                }
                if started.elapsed() > HEALTHY_AFTER {
                    backoff = BACKOFF_MIN;
                }
                let ended =
                    ended.map_or_else(|| "its folder is gone".to_owned(), |status| status.to_string());
                format!("redis-server ended ({ended}): {}", last_words(&options.dir))
            }
            None => {
                if stop.run_until_cancelled(tokio::time::sleep(backoff)).await.is_none() {
                    return;
                }
                backoff = (backoff * 2).min(BACKOFF_MAX);
                match Run::start(&options, &binary).await {
                    Ok(started) => {
                        tracing::info!(port = options.port, "redis-server runs again");
                        status.send_replace(ServerProcess::Up);
                        run = Some(started);
                        continue;
                    }
                    Err(error) => error.to_string(),
                }
            }
        };
        tracing::error!(port = options.port, retry_ms = backoff.as_millis(), "{reason}");
        status.send_replace(ServerProcess::Down(reason.into()));
    }
}

/// One run of the process.
#[derive(Debug)]
struct Run {
    pidfd: Arc<OwnedFd>,
    exit: oneshot::Receiver<io::Result<ExitStatus>>,
    /// Device and inode of the folder with the data, once it is there.
    data: Option<(u64, u64)>,
}

impl Run {
    async fn start(options: &RedisOptions, binary: &Path) -> Result<Run, RedisError> {
        let prepared = options.clone();
        let log = match tokio::task::spawn_blocking(move || prepare(&prepared)).await {
            Ok(log) => log?,
            Err(failed) => return Err(RedisError::Spawn(io::Error::other(failed))),
        };
        let mut command = command(options, binary);
        command.stdout(log.try_clone().map_err(RedisError::Spawn)?).stderr(log);
        let (started, starting) = oneshot::channel();
        let (ended, exit) = oneshot::channel();
        // The kernel sends the death signal when the *thread* that started the process ends: this one lives as
        // long as the process does, because it waits for it.
        std::thread::Builder::new()
            .name(format!("redis-{}", options.port))
            .spawn(move || match command.spawn() {
                Ok(mut child) => {
                    let pid = child.id();
                    let pidfd = i32::try_from(pid)
                        .ok()
                        .and_then(Pid::from_raw)
                        .ok_or_else(|| io::Error::other("impossible process id"))
                        // Not waited for yet, so the id cannot be another process' already.
                        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from));
                    let _ = started.send(pidfd.map(|pidfd| (pid, pidfd)));
                    let _ = ended.send(child.wait());
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            })
            .map_err(RedisError::Spawn)?;
        let (pid, pidfd) = starting
            .await
            .unwrap_or_else(|_| Err(io::Error::other("the starting thread died")))
            .map_err(RedisError::Spawn)?;
        let pid_path = pid_file(&options.dir);
        fs::write(&pid_path, format!("{pid}\n")).map_err(io_error("write", &pid_path))?;
        let mut run = Run { pidfd: Arc::new(pidfd), exit, data: None };
        if let Err(error) = run.answer(options).await {
            run.end(matches!(error, RedisError::Ended { .. })).await;
            return Err(error);
        }
        Ok(run)
    }

    /// Waits until the server answers, if only to say that it still loads its data.
    async fn answer(&mut self, options: &RedisOptions) -> Result<(), RedisError> {
        let deadline = Instant::now() + START_WAIT;
        loop {
            tokio::select! {
                status = &mut self.exit => {
                    return Err(RedisError::Ended {
                        status: status.map_or_else(|_| "unknown".to_owned(), |status| describe(&status)),
                        reason: last_words(&options.dir),
                        log: log_file(&options.dir),
                    });
                }
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
            if tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, options.port)).await.is_ok() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(RedisError::Silent { port: options.port, log: log_file(&options.dir) });
            }
        }
    }

    /// Returns when the process ended (with its status), its folder was deleted, or `stop` asks.
    async fn watch(
        &mut self,
        options: &RedisOptions,
        status: &watch::Sender<ServerProcess>,
        stop: &CancellationToken,
    ) -> Option<String> {
        let mut ticks = tokio::time::interval(FOLDER_INTERVAL);
        loop {
            tokio::select! {
                status = &mut self.exit => {
                    return Some(status.map_or_else(|_| "unknown".to_owned(), |status| describe(&status)));
                }
                () = stop.cancelled() => return None,
                _ = ticks.tick() => {}
            }
            if self.data.is_none() {
                self.data = identity(&data_folder(&options.dir));
                continue;
            }
            // A server whose files were deleted goes on writing into them: nothing it acknowledges would be there
            // after the next restart.
            if identity(&data_folder(&options.dir)) != self.data {
                let reason = format!(
                    "the data folder {} was deleted under the running Redis. Sales have stopped. Restore it and \
                     restart; or run `seckill ledger adopt` to go on with an empty ledger: no order id repeats",
                    options.dir.display()
                );
                tracing::error!("{reason}");
                status.send_replace(ServerProcess::Lost(reason.into()));
                stop.run_until_cancelled(tokio::time::sleep(LAST_ORDERS)).await;
                self.end(false).await;
                return None;
            }
        }
    }

    /// Ends the process, by force if need be.
    async fn end(&mut self, ended: bool) {
        if ended {
            return;
        }
        for signal in [Signal::TERM, Signal::KILL] {
            let _ = pidfd_send_signal(&self.pidfd, signal);
            if tokio::time::timeout(STOP_WAIT, &mut self.exit).await.is_ok() {
                return;
            }
            tracing::warn!("redis-server does not end by itself");
        }
    }
}

/// Makes everything ready for a start: folder, no orphan, free port, configuration. Returns the log.
fn prepare(options: &RedisOptions) -> Result<File, RedisError> {
    let dir = &options.dir;
    folder(dir)?;
    end_orphan(dir);
    match TcpListener::bind((Ipv4Addr::LOCALHOST, options.port)) {
        Ok(probe) => drop(probe),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            return Err(RedisError::PortInUse { port: options.port });
        }
        Err(error) => return Err(RedisError::Spawn(error)),
    }
    let config = config_file(dir);
    let text = configuration(options)?;
    fs::write(&config, text).map_err(io_error("write", &config))?;
    let log = log_file(dir);
    let begin_anew = fs::metadata(&log).is_ok_and(|metadata| metadata.len() > LOG_MAX_BYTES);
    let mut open = OpenOptions::new();
    let open = if begin_anew { open.write(true).truncate(true) } else { open.append(true) };
    Ok(open.create(true).open(&log).map_err(io_error("write", &log))?)
}

fn configuration(options: &RedisOptions) -> Result<String, RedisError> {
    let RedisOptions { dir, port, max_memory_bytes } = options;
    let path = dir.to_str().ok_or_else(|| RedisError::Path { path: dir.clone() })?;
    let quoted: String =
        path.chars().flat_map(|c| if matches!(c, '"' | '\\') { vec!['\\', c] } else { vec![c] }).collect();
    Ok(format!(
        r#"# Written at each start of this server; changes here are lost.
bind 127.0.0.1
port {port}
protected-mode yes
enable-debug-command no
enable-protected-configs no
enable-module-command no
daemonize no
supervised no
dir "{quoted}"
logfile ""
loglevel notice
tcp-keepalive 60
timeout 0

# Isolated until the guardian gives it its role: no writes, no replicas.
replicaof 127.0.0.1 1
replica-read-only yes
replica-serve-stale-data yes
# A replica never empties itself before a sync has arrived whole.
repl-diskless-load swapdb
# There is one replica to copy everything to, no others to wait for.
repl-diskless-sync-delay 0

# An acknowledged purchase is on the disk.
appendonly yes
appendfsync always
no-appendfsync-on-rewrite no
# A tail that was cut off by a power loss was never acknowledged; anything older that is missing is found by
# comparing with the stored orders.
aof-load-truncated yes
save ""

# At the bound purchases stop and releases go on; nothing is ever evicted.
maxmemory {max_memory_bytes}
maxmemory-policy noeviction

# Huge pages, see docs/ledger.md: the claims of a large sale are touched at random.
disable-thp no
"#
    ))
}

fn command(options: &RedisOptions, binary: &Path) -> Command {
    let mut command = match find_program("setpriv") {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.args(["--pdeathsig", "KILL", "--"]).arg(binary);
            command
        }
        None => Command::new(binary),
    };
    command.envs(seckill_ledger::HUGE_PAGES);
    // A group of its own: Ctrl-C in a terminal ends the service first, which then ends Redis.
    command.arg(config_file(&options.dir)).current_dir(&options.dir).stdin(Stdio::null()).process_group(0);
    command
}

/// Ends a server that outlived the service that started it. It is one only if it is a redis-server whose working
/// folder is this one: the pid alone may be anybody's by now.
fn end_orphan(dir: &Path) {
    let Ok(text) = fs::read_to_string(pid_file(dir)) else { return };
    let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    let proc = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    let is_redis = fs::read_to_string(proc.join("comm")).is_ok_and(|name| name.trim() == "redis-server");
    let is_here = fs::read_link(proc.join("cwd")).is_ok_and(|cwd| cwd == dir);
    if !is_redis || !is_here {
        return;
    }
    tracing::warn!(pid = pid.as_raw_nonzero(), "ending a redis-server that was left behind");
    for signal in [Signal::TERM, Signal::KILL] {
        let deadline = Instant::now() + STOP_WAIT;
        // A process that ended but is not reaped takes signals still; it has no working folder any more.
        while pidfd_send_signal(&pidfd, signal).is_ok() && fs::read_link(proc.join("cwd")).is_ok() {
            if Instant::now() > deadline {
                break;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

fn describe(status: &io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}

/// The last line in the log that says why: Redis marks warnings and errors with `#` or `***`.
fn last_words(dir: &Path) -> String {
    let tail = || -> io::Result<String> {
        let mut log = File::open(log_file(dir))?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        log.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let Ok(tail) = tail() else { return "it left no log".to_owned() };
    let lines = || tail.lines().rev().filter(|line| !line.trim().is_empty());
    let telling = lines().find(|line| line.contains(" # ") && !line.contains("Connection refused"));
    telling
        .map(|line| line.split_once(" # ").map_or(line, |(_, words)| words))
        .or_else(|| lines().next())
        .unwrap_or("it said nothing")
        .to_owned()
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

fn config_file(dir: &Path) -> PathBuf {
    dir.join("redis.conf")
}

fn log_file(dir: &Path) -> PathBuf {
    dir.join("redis.log")
}

fn pid_file(dir: &Path) -> PathBuf {
    dir.join("redis.pid")
}

fn data_folder(dir: &Path) -> PathBuf {
    dir.join("appendonlydir")
}
