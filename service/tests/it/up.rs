//! Starts `seckill up` in a folder of its own and ends it, gently or not.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::support::PATIENCE;

/// A running `seckill up`.
pub(crate) struct Up {
    dir: PathBuf,
    base_port: u16,
    centers: String,
    child: Option<Child>,
    output: Arc<Mutex<Vec<String>>>,
    readers: Vec<std::thread::JoinHandle<()>>,
    _owned: Option<tempfile::TempDir>,
}

impl Up {
    /// Starts it on an empty folder and waits for `ready`.
    pub(crate) fn start() -> Up {
        Up::start_centers("a")
    }

    /// Starts these centers on an empty folder and waits for `ready`.
    pub(crate) fn start_centers(centers: &str) -> Up {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut up = Up::at(dir.path(), free_base_port());
        up.centers(centers);
        up._owned = Some(dir);
        up.spawn(&[]);
        up.wait_ready();
        up
    }

    /// Describes one on a folder without starting it.
    pub(crate) fn at(dir: &Path, base_port: u16) -> Up {
        Up {
            dir: dir.to_owned(),
            base_port,
            centers: "a".to_owned(),
            child: None,
            output: Arc::default(),
            readers: Vec::new(),
            _owned: None,
        }
    }

    /// The centers that the next start runs.
    pub(crate) fn centers(&mut self, centers: &str) {
        centers.clone_into(&mut self.centers);
    }

    /// Starts the process; `wait_ready` or `wait_exit` comes next.
    pub(crate) fn spawn(&mut self, env: &[(&str, &str)]) {
        let mut child = Command::new(env!("CARGO_BIN_EXE_seckill"))
            .args(["up", "--centers", &self.centers, "--data-dir"])
            .arg(&self.dir)
            .args(["--base-port", &self.base_port.to_string()])
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        self.output.lock().unwrap().clear();
        for stream in [
            Box::new(child.stdout.take().unwrap()) as Box<dyn std::io::Read + Send>,
            Box::new(child.stderr.take().unwrap()),
        ] {
            let output = Arc::clone(&self.output);
            self.readers.push(std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    output.lock().unwrap().push(line);
                }
            }));
        }
        self.child = Some(child);
    }

    /// Waits for the line `ready`.
    pub(crate) fn wait_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.output.lock().unwrap().iter().any(|line| line == "ready") {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("it ended with {status} before it was ready:\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "it never got ready:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until the process has ended; its exit code, if it was not a signal.
    pub(crate) fn wait_exit(&mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        let mut child = self.child.take().expect("it was started");
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                self.wait_output();
                return status.code();
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                panic!("it did not end:\n{}", self.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until everything that the ended process printed has been read. What it started may hold its output
    /// open for a moment longer.
    fn wait_output(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.readers.iter().any(|reader| !reader.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.readers.clear();
    }

    /// kill -9 of the process, and nothing else.
    pub(crate) fn kill(&mut self) {
        let mut child = self.child.take().expect("it was started");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts again on the same folder and ports.
    pub(crate) fn restart(&mut self) {
        self.spawn(&[]);
        self.wait_ready();
    }

    /// SIGTERM, and waits for the end.
    pub(crate) fn terminate(&mut self) -> Option<i32> {
        let pid = self.child.as_ref().expect("it was started").id();
        signal(pid, rustix::process::Signal::TERM);
        self.wait_exit()
    }

    /// kill -9 of the redis-server of center a. Tells its pid.
    pub(crate) fn kill_redis(&self) -> u32 {
        self.kill_redis_of(1)
    }

    /// kill -9 of the redis-server of the center with this number. Tells its pid.
    pub(crate) fn kill_redis_of(&self, number: u16) -> u32 {
        let pid = self.redis_pid_of(number).expect("a redis-server runs");
        signal(pid, rustix::process::Signal::KILL);
        pid
    }

    /// The redis-server of center a.
    pub(crate) fn redis_pid(&self) -> Option<u32> {
        self.redis_pid_of(1)
    }

    /// The redis-server that listens on the port of the center with this number.
    pub(crate) fn redis_pid_of(&self, number: u16) -> Option<u32> {
        let port = format!(":{}", self.redis_port() + (number - 1) * 10);
        std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let cmdline = std::fs::read(entry.path().join("cmdline")).ok()?;
            let cmdline = String::from_utf8_lossy(&cmdline).replace('\0', " ");
            (cmdline.contains("redis-server") && cmdline.contains(&port)).then_some(pid)
        })
    }

    /// The port of center a's Redis.
    pub(crate) fn redis_port(&self) -> u16 {
        self.base_port + 3
    }

    /// The data folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Everything that it printed.
    pub(crate) fn log(&self) -> String {
        self.output.lock().unwrap().join("\n")
    }

    /// A client of center a.
    pub(crate) fn client(&self) -> Client {
        self.client_of(1)
    }

    /// A client of the center with this number.
    pub(crate) fn client_of(&self, number: u16) -> Client {
        Client::new(self.base_port + (number - 1) * 10, &self.dir)
    }

    /// Runs a command of the binary against this instance: exit code, standard output, standard error.
    pub(crate) fn cli(&self, args: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_seckill"))
            .args(args)
            .env("SECKILL_ADMIN_URL", format!("http://127.0.0.1:{}", self.base_port + 1))
            .env("SECKILL_ADMIN_TOKEN_FILE", self.dir.join("admin-token"))
            .stdin(Stdio::null())
            .output()
            .expect("the binary starts");
        (
            output.status.code().unwrap_or(-1),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    /// Waits until the audit is clean (nothing in flight disagrees); fails with what it said last.
    pub(crate) fn assert_books_balance(&self) -> serde_json::Value {
        let (code, out, err) = self.cli(&["audit", "-o", "json"]);
        assert_eq!(code, 0, "audit:\n{out}\n{err}\n{}", self.log());
        serde_json::from_str(&out).expect("the audit prints JSON")
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            signal(child.id(), rustix::process::Signal::TERM);
            let deadline = Instant::now() + Duration::from_secs(10);
            while child.try_wait().ok().flatten().is_none() {
                if Instant::now() > deadline {
                    let _ = child.kill();
                    let _ = child.wait();
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        for pid in [self.redis_pid_of(1), self.redis_pid_of(2)].into_iter().flatten() {
            signal(pid, rustix::process::Signal::KILL);
        }
    }
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// A base port with the ports of two centers, all free now; no other test of this process gets it. Below what
/// seckill-parts takes, which is below what the kernel takes for outgoing connections.
pub(crate) fn free_base_port() -> u16 {
    const FIRST: u32 = 10_000;
    const PLACES: u32 = 500;
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..PLACES {
        let place =
            std::process::id().wrapping_mul(37).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PLACES;
        let base = (FIRST + place * 20) as u16;
        if (base..base + 20).all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return base;
        }
    }
    panic!("no twenty free ports in a row");
}
