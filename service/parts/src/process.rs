//! One process: started, signalled, awaited.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// How long a process may take to end by itself before it is killed. MariaDB and Kafka write their state first.
pub(crate) const END_WAIT: Duration = Duration::from_secs(20);
/// How often a process that is not ours to wait for is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Who a process lives for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lifetime {
    /// For the value that started it: killed on drop, and by the kernel when this process dies.
    #[default]
    Owned,
    /// On its own, until somebody ends it by its [`Identity`].
    Detached,
}

/// Which process: a pid alone may be anybody's by tomorrow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The pid.
    pub pid: i32,
    /// When it started, in clock ticks since boot (`starttime` of proc(5)).
    pub started: u64,
}

impl Identity {
    /// The process that has this pid now; none if there is none, or only its remains that nobody has waited for.
    pub fn of(pid: i32) -> Option<Identity> {
        Identity::read(pid).and_then(|(identity, runs)| runs.then_some(identity))
    }

    /// The process, and whether it runs: one that ended keeps its pid until somebody waits for it.
    fn read(pid: i32) -> Option<(Identity, bool)> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the program's name in parentheses and may contain anything.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        // State, then 18 more, then starttime, which is field 22.
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        Some((Identity { pid, started }, !matches!(state, "Z" | "X")))
    }

    /// Whether exactly this process still runs.
    pub fn is_alive(self) -> bool {
        Identity::of(self.pid) == Some(self)
    }

    /// Ends exactly this process: asks, and kills when it does not end in 20 s. Returns whether it ran until now. Blocks.
    pub fn end(self) -> io::Result<bool> {
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(false) };
        // Opened before the comparison: from here on the pid cannot change its meaning for us.
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        if !self.is_alive() {
            return Ok(false);
        }
        for signal in [Signal::TERM, Signal::KILL] {
            pidfd_send_signal(&pidfd, signal)?;
            // A stopped process does not see the first one.
            let _ = pidfd_send_signal(&pidfd, Signal::CONT);
            let deadline = Instant::now() + END_WAIT;
            while self.is_alive() {
                if Instant::now() > deadline {
                    break;
                }
                thread::sleep(POLL_INTERVAL);
            }
            if !self.is_alive() {
                return Ok(true);
            }
        }
        Err(io::Error::other(format!("process {} does not end", self.pid)))
    }
}

/// A child process.
#[derive(Debug)]
pub(crate) struct Process {
    identity: Identity,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<String>>,
    waiter: Option<JoinHandle<()>>,
    lifetime: Lifetime,
}

impl Process {
    /// Starts `program`. Output goes to the end of `log`.
    pub(crate) fn spawn(name: &str, command: &Invocation, lifetime: Lifetime) -> io::Result<Process> {
        let mut command = command.build(lifetime)?;
        let (started, starting) = std::sync::mpsc::sync_channel(1);
        let (ended, exit) = watch::channel(None);
        // The kernel sends the death signal when the *thread* that started the process ends: this one lives as long as
        // the process does, because it waits for it.
        let waiter = thread::Builder::new().name(name.chars().take(15).collect()).spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    let _ = started.send(Err(error));
                    return;
                }
            };
            let _ = started.send(opened(child.id()));
            ended.send_replace(Some(describe(&child.wait())));
        })?;
        let (identity, pidfd) =
            starting.recv().unwrap_or_else(|_| Err(io::Error::other("the starting thread died")))?;
        Ok(Process { identity, pidfd: Arc::new(pidfd), exit, waiter: Some(waiter), lifetime })
    }

    pub(crate) fn identity(&self) -> Identity {
        self.identity
    }

    /// How it ended, once it has.
    pub(crate) fn ended(&self) -> Option<String> {
        self.exit.borrow().clone()
    }

    /// Sends a signal; to a process that ended already it does nothing.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    /// Asks it to end, waits, kills it if it does not.
    pub(crate) async fn end(mut self) {
        self.signal(Signal::TERM);
        self.signal(Signal::CONT);
        // An error means that the waiting thread is gone, and the process with it.
        let _ = tokio::time::timeout(END_WAIT, self.exit.wait_for(Option::is_some)).await;
        self.kill();
    }

    /// Kills it and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        if let Some(waiter) = self.waiter.take() {
            self.signal(Signal::KILL);
            let _ = waiter.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        match self.lifetime {
            Lifetime::Owned => self.kill(),
            Lifetime::Detached => {}
        }
    }
}

/// What to run, again and again.
#[derive(Debug, Clone)]
pub(crate) struct Invocation {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) dir: PathBuf,
    pub(crate) log: PathBuf,
}

impl Invocation {
    fn build(&self, lifetime: Lifetime) -> io::Result<Command> {
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log)?;
        let mut command = match lifetime {
            Lifetime::Owned => {
                let setpriv = find_program("setpriv").ok_or_else(|| {
                    io::Error::new(io::ErrorKind::NotFound, "setpriv is not installed (package util-linux)")
                })?;
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL", "--"]).arg(&self.program);
                command
            }
            Lifetime::Detached => Command::new(&self.program),
        };
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            // How `services` finds what a starter that was killed had no time to write down.
            .env(FOLDER_MARK, &self.dir)
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // A group of its own: Ctrl-C in a terminal ends the owner first, which then ends its parts.
            .process_group(0);
        Ok(command)
    }
}

/// Environment variable of every part's process: its folder.
pub(crate) const FOLDER_MARK: &str = "SECKILL_PARTS_FOLDER";

/// Processes of this user whose part lives in a folder below `dir`.
pub(crate) fn of_folder(dir: &Path) -> Vec<Identity> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let marked = |pid: &i32| {
        // Unreadable where it is another user's.
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|pair| {
            std::str::from_utf8(pair)
                .ok()
                .and_then(|pair| pair.strip_prefix(FOLDER_MARK)?.strip_prefix('='))
                .is_some_and(|folder| Path::new(folder).starts_with(dir))
        })
    };
    pids.filter(marked).filter_map(Identity::of).collect()
}

/// Where a program lies.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian keeps mariadbd where a user's PATH does not look.
    let system = ["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|folder| folder.join(name)).find(|file| file.is_file())
}

fn opened(pid: u32) -> io::Result<(Identity, OwnedFd)> {
    let raw = i32::try_from(pid).map_err(io::Error::other)?;
    let pid = Pid::from_raw(raw).ok_or_else(|| io::Error::other("impossible process id"))?;
    // Not waited for yet, so the id cannot be another process' already.
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    let (identity, _) =
        Identity::read(raw).ok_or_else(|| io::Error::other("/proc does not show the process"))?;
    Ok((identity, pidfd))
}

fn describe(status: &io::Result<ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    }
}
