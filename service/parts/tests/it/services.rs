//! `seckill-parts up`, `status` and `down`, as `make services` uses them.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use seckill_parts::services;

const DEADLINE: Duration = Duration::from_secs(60);

fn parts(dir: &Path, arguments: &[&str]) -> Output {
    command(dir, arguments).output().unwrap()
}

fn command(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_seckill-parts"));
    command.arg("--dir").arg(dir).args(arguments);
    command
}

/// Processes that work in the folder.
fn left(dir: &Path) -> usize {
    let works_here = |entry: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_link(entry.ok()?.path().join("cwd")).ok().filter(|cwd| cwd.starts_with(dir))
    };
    std::fs::read_dir("/proc").unwrap().filter_map(works_here).count()
}

#[test]
fn services_run_until_they_are_ended_and_are_known_by_their_state() {
    let root = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(root.path()).unwrap().join("services");
    assert_eq!(parts(&dir, &["status"]).status.code(), Some(1));
    let up = parts(&dir, &["up"]);
    assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
    let running = services::running(&dir).unwrap();
    assert_eq!(services::processes(&dir).unwrap().len(), 7);
    for (name, value) in running.variables() {
        assert!(String::from_utf8_lossy(&up.stdout).contains(&format!("{name}={value}")));
    }
    // A shell can read them.
    let shell = Command::new("sh")
        .args(["-c", ". \"$1\"; echo $KAFKA_BOOTSTRAP", "sh"])
        .arg(dir.join("env"))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&shell.stdout).trim(), running.kafka_a);
    // Again starts nothing.
    assert!(parts(&dir, &["up"]).status.success());
    assert_eq!(left(&dir), 7);
    assert!(parts(&dir, &["status"]).status.success());

    assert!(parts(&dir, &["down"]).status.success());
    assert_eq!(left(&dir), 0);
    assert_eq!(parts(&dir, &["status"]).status.code(), Some(1));
    // The data stays, and so do the addresses.
    assert!(parts(&dir, &["up"]).status.success());
    assert_eq!(services::running(&dir), Some(running));
    assert!(parts(&dir, &["down", "--purge"]).status.success());
    assert_eq!(left(&dir), 0);
    assert!(!dir.exists());
}

#[test]
fn what_a_killed_starter_left_behind_is_ended() {
    let root = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(root.path()).unwrap().join("services");
    let mut starter = command(&dir, &["up"]).stdout(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + DEADLINE;
    // Some parts run, nothing is written down.
    while !dir.join("redis-a/ports").exists() {
        assert!(Instant::now() < deadline, "nothing starts");
        std::thread::yield_now();
    }
    starter.kill().unwrap();
    starter.wait().unwrap();
    assert!(left(&dir) > 0);
    assert!(parts(&dir, &["down", "--purge"]).status.success());
    assert_eq!(left(&dir), 0);
}

#[test]
fn another_process_with_the_same_pid_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("services");
    std::fs::create_dir_all(&dir).unwrap();
    // The state names this very process with another start time: as if the pid had been given out again.
    let pid = std::process::id();
    let names = ["kafka_a", "kafka_b", "mariadb_a", "mariadb_b", "etcd", "redis_a", "redis_b"];
    let services: Vec<String> = names.iter().map(|name| format!("\"{name}\":\"x\"")).collect();
    let state = format!(
        r#"{{"services":{{{}}},"processes":{{"etcd":{{"pid":{pid},"started":1}}}}}}"#,
        services.join(",")
    );
    std::fs::write(dir.join("state.json"), state).unwrap();
    assert!(services::running(&dir).is_none());
    let down = parts(&dir, &["down"]);
    assert!(down.status.success());
    assert_eq!(String::from_utf8_lossy(&down.stdout).trim(), "ended 0 processes");
}
