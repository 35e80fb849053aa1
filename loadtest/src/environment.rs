//! The machine and the versions: what a figure is worth without them is little.

use serde::{Deserialize, Serialize};

/// The machine and the versions.
#[derive(Serialize, Deserialize)]
pub struct Environment {
    /// Cores this process may use.
    pub cores: usize,
    /// The processor's name.
    pub cpu: String,
    /// The kernel.
    pub kernel: String,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// Load average of the last minute when the run began: what else ran here.
    pub load_average: f64,
    /// Version of this program.
    pub loadtest_version: String,
    /// Commit of the working directory's repository, `-dirty` behind it if it was changed; `null` outside of one.
    pub commit: Option<String>,
}

impl Environment {
    /// Looks around.
    pub fn here() -> Environment {
        let uname = rustix::system::uname();
        let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
        let cpu = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|info| {
            let line = info.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        });
        let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|info| {
            let line = info.lines().find(|line| line.starts_with("MemTotal:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        let load = std::fs::read_to_string("/proc/loadavg")
            .ok()
            .and_then(|text| text.split_whitespace().next()?.parse().ok());
        Environment {
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            cpu: cpu.unwrap_or_else(|| text(uname.machine())),
            kernel: format!("{} {}", text(uname.sysname()), text(uname.release())),
            memory_bytes: memory.unwrap_or(0) * 1024,
            load_average: load.unwrap_or(0.0),
            loadtest_version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: commit(),
        }
    }
}

fn commit() -> Option<String> {
    let output = std::process::Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
        .stderr(std::process::Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

/// The most memory that this process had resident so far.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).unwrap_or(0) * 1024
}
