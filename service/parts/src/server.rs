//! A server in a folder: what all parts have in common.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::error::{PartError, file_error};
use crate::ports;
use crate::process::{FOLDER_MARK, Identity, Invocation, Lifetime, Process};

/// How long a server may take until it answers: a JVM beside a compiler on two cores needs a while.
pub(crate) const START_WAIT: Duration = Duration::from_secs(90);
/// How often it is asked.
const POLL_INTERVAL: Duration = Duration::from_millis(25);
/// How often other ports are tried when somebody else was faster.
pub(crate) const PORT_ATTEMPTS: usize = 5;
/// How much of the log's end an error shows.
const LOG_TAIL_BYTES: u64 = 4096;

/// A part's process and how to start it again.
#[derive(Debug)]
pub(crate) struct Server {
    name: &'static str,
    invocation: Invocation,
    lifetime: Lifetime,
    process: Mutex<Option<Process>>,
}

impl Server {
    /// Starts the process; it need not answer yet.
    pub(crate) fn spawn(
        name: &'static str,
        invocation: Invocation,
        lifetime: Lifetime,
    ) -> Result<Server, PartError> {
        let server = Server { name, invocation, lifetime, process: Mutex::new(None) };
        server.start()?;
        Ok(server)
    }

    /// Starts the process again, after [`Server::kill`] or [`Server::stop`].
    pub(crate) fn start(&self) -> Result<(), PartError> {
        let process = Process::spawn(self.name, &self.invocation, self.lifetime)
            .map_err(|source| PartError::Spawn { part: self.name.to_owned(), source })?;
        *self.process() = Some(process);
        Ok(())
    }

    /// Waits until `answers` does: the server is ready then.
    pub(crate) async fn ready<F>(&self, answers: impl Fn() -> F) -> Result<(), PartError>
    where
        F: Future<Output = Result<(), String>>,
    {
        let deadline = Instant::now() + START_WAIT;
        loop {
            let reason = match answers().await {
                Ok(()) => return Ok(()),
                Err(reason) => reason,
            };
            let ended =
                self.process().as_ref().map_or_else(|| Some("it was stopped".to_owned()), Process::ended);
            if let Some(status) = ended {
                return Err(PartError::Ended { part: self.name.to_owned(), status, log: self.log_tail() });
            }
            if Instant::now() > deadline {
                return Err(PartError::Silent {
                    part: self.name.to_owned(),
                    waited: START_WAIT,
                    reason,
                    log: self.log_tail(),
                });
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    pub(crate) fn kill(&self) {
        let process = self.process().take();
        if let Some(mut process) = process {
            process.kill();
        }
    }

    pub(crate) async fn stop(&self) {
        let process = self.process().take();
        if let Some(process) = process {
            process.end().await;
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(process) = self.process().as_ref() {
            process.signal(signal);
        }
    }

    pub(crate) fn identity(&self) -> Option<Identity> {
        self.process().as_ref().map(Process::identity)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.invocation.dir
    }

    pub(crate) fn log_tail(&self) -> String {
        log_tail(&self.invocation.log)
    }

    fn process(&self) -> MutexGuard<'_, Option<Process>> {
        // The guarded value is whole at every point where a panic could happen.
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What every part can do with its process. Expects a field `server` and a method `answers`.
macro_rules! lifecycle {
    ($part:ident) => {
        impl $part {
            /// Asks the server to end and waits until it has; after 20 s it is killed.
            pub async fn stop(&self) {
                self.server.stop().await;
            }

            /// Ends the process as a power cut would: SIGKILL.
            pub fn kill(&self) {
                self.server.kill();
            }

            /// Starts the server again with its data and on its port; kills it first if it runs. It answers when this
            /// returns.
            pub async fn restart(&self) -> Result<(), PartError> {
                self.server.kill();
                self.server.start()?;
                self.server.ready(|| self.answers()).await
            }

            /// Stops the process in its tracks (SIGSTOP): connections stay, nothing answers.
            pub fn pause(&self) {
                self.server.signal(rustix::process::Signal::STOP);
            }

            /// Lets a paused process go on.
            pub fn resume(&self) {
                self.server.signal(rustix::process::Signal::CONT);
            }

            /// The process, while it runs.
            pub fn identity(&self) -> Option<crate::process::Identity> {
                self.server.identity()
            }

            /// The part's folder.
            pub fn dir(&self) -> &std::path::Path {
                self.server.dir()
            }

            /// The end of the server's log, for messages.
            pub fn log_tail(&self) -> String {
                self.server.log_tail()
            }

            /// Where it listens.
            pub fn address(&self) -> std::net::SocketAddr {
                std::net::SocketAddr::from((std::net::Ipv4Addr::LOCALHOST, self.port()))
            }
        }
    };
}
pub(crate) use lifecycle;

/// Makes the folder; returns its absolute path.
pub(crate) fn folder(dir: &Path) -> Result<PathBuf, PartError> {
    fs::create_dir_all(dir).map_err(file_error("create", dir))?;
    fs::canonicalize(dir).map_err(file_error("find", dir))
}

/// Whether the folder's data has to be made before a start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    /// There is none, or what a start that failed has left.
    Fresh,
    /// A server ran with it.
    Kept,
}

/// Chooses ports and starts with them: those that the folder's data was made for, or free ones, and others again when
/// somebody else was faster.
pub(crate) async fn on_ports<const N: usize, T, F>(
    dir: &Path,
    start: impl Fn([u16; N], Data) -> F,
) -> Result<T, PartError>
where
    F: Future<Output = Result<T, PartError>>,
{
    if let Some(ports) = ports::remembered::<N>(dir) {
        if let Some(port) = ports.into_iter().find(|port| !ports::is_free(*port)) {
            return Err(PartError::PortInUse { port, dir: dir.to_owned() });
        }
        return start(ports, Data::Kept).await;
    }
    let mut attempt = 1;
    loop {
        let ports = ports::free::<N>()?;
        match start(ports, Data::Fresh).await {
            Ok(started) => {
                ports::remember(dir, ports)?;
                return Ok(started);
            }
            Err(PartError::Ended { .. }) if attempt < PORT_ATTEMPTS => attempt += 1,
            Err(error) => return Err(error),
        }
    }
}

/// Makes the folder for the server's data; a fresh one is empty.
pub(crate) fn data_folder(dir: &Path, data: Data) -> Result<PathBuf, PartError> {
    let path = dir.join("data");
    if data == Data::Fresh && path.exists() {
        fs::remove_dir_all(&path).map_err(file_error("remove", &path))?;
    }
    fs::create_dir_all(&path).map_err(file_error("create", &path))?;
    Ok(path)
}

/// The last lines of a log.
pub(crate) fn log_tail(path: &Path) -> String {
    let tail = || -> io::Result<String> {
        let mut log = File::open(path)?;
        let length = log.metadata()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        log.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    tail().unwrap_or_else(|error| format!("{}: {error}", path.display()))
}

/// Runs a program that prepares a part in `dir`, to its end. Like the part itself it carries the folder's mark.
pub(crate) async fn prepare(
    dir: &Path,
    program: &'static str,
    mut command: tokio::process::Command,
) -> Result<(), PartError> {
    command.env(FOLDER_MARK, dir).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output =
        command.output().await.map_err(|source| PartError::Spawn { part: program.to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    let tail = said.len().saturating_sub(usize::try_from(LOG_TAIL_BYTES).unwrap_or(usize::MAX));
    Err(PartError::Preparation {
        program,
        status: output.status.to_string(),
        output: String::from_utf8_lossy(&said[tail..]).into_owned(),
    })
}
