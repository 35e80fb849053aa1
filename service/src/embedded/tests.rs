//! The data folder and the supervised Redis, on real files and real processes.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

fn options(dir: &Path) -> RedisOptions {
    let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = probe.local_addr().unwrap().port();
    RedisOptions { dir: dir.join("redis"), port, max_memory_bytes: 64 << 20 }
}

fn pid(options: &RedisOptions) -> i32 {
    std::fs::read_to_string(options.dir.join("redis.pid")).unwrap().trim().parse().unwrap()
}

fn runs(pid: i32) -> bool {
    // One that ended but is not reaped has no working folder.
    std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok()
}

async fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn a_data_folder_belongs_to_one_process_and_keeps_its_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let held = DataDir::open(dir.path()).unwrap();
    let secret = held.secret("dev-token-secret").unwrap();
    let mode = std::fs::metadata(held.join("dev-token-secret")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let other = DataDir::open(dir.path()).unwrap_err();
    assert!(other.to_string().contains(&std::process::id().to_string()), "{other}");
    drop(held);
    let again = DataDir::open(dir.path()).unwrap();
    assert_eq!(again.secret("dev-token-secret").unwrap(), secret);
    std::fs::write(again.join("own"), "bytes as they stand\n").unwrap();
    assert_eq!(again.secret("own").unwrap(), b"bytes as they stand");
}

#[test]
fn a_data_folder_that_cannot_be_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = DataDir::open(&file.join("data")).unwrap_err();
    assert!(error.to_string().contains("file/data"), "{error}");
}

#[tokio::test]
async fn a_redis_that_is_killed_comes_back_isolated_and_one_that_is_stopped_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let server = RedisServer::start(options.clone()).await.unwrap();
    let first = pid(&options);
    kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
    let mut process = server.process();
    let down = tokio::time::timeout(PATIENCE, process.wait_for(|state| *state != ServerProcess::Up)).await;
    assert!(matches!(*down.unwrap().unwrap(), ServerProcess::Down(_)));
    let up = tokio::time::timeout(PATIENCE, process.wait_for(|state| *state == ServerProcess::Up)).await;
    assert_eq!(*up.unwrap().unwrap(), ServerProcess::Up);
    let second = pid(&options);
    assert_ne!(first, second);
    let client = redis::Client::open(format!("redis://127.0.0.1:{}", options.port)).unwrap();
    let mut conn = client.get_multiplexed_async_connection().await.unwrap();
    let write: redis::RedisResult<()> = redis::cmd("SET").arg("k").arg(1).query_async(&mut conn).await;
    let refused = write.expect_err("it came back and took a write");
    assert_eq!(refused.code(), Some("READONLY"));
    server.stop().await;
    assert!(!runs(second));
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, options.port)).unwrap();
    let error = RedisServer::start(options.clone()).await.unwrap_err();
    assert!(matches!(error, RedisError::PortInUse { port } if port == options.port), "{error}");
}

#[tokio::test]
async fn a_redis_that_was_left_behind_is_ended_by_the_next_start_and_nobody_elses_is() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().canonicalize().unwrap();
    let options = options(&dir);
    std::fs::create_dir(&options.dir).unwrap();
    let mut orphan = Command::new("redis-server")
        .args(["--save", "", "--bind", "127.0.0.1", "--port", &options.port.to_string()])
        .current_dir(&options.dir)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut bystander = Command::new("sleep").arg("60").current_dir(&options.dir).spawn().unwrap();
    eventually("the orphan listens", || {
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, options.port)).is_ok()
    })
    .await;
    // A pid file with somebody else's number harms nobody.
    std::fs::write(options.dir.join("redis.pid"), bystander.id().to_string()).unwrap();
    assert!(matches!(RedisServer::start(options.clone()).await, Err(RedisError::PortInUse { .. })));
    assert!(bystander.try_wait().unwrap().is_none());
    bystander.kill().unwrap();
    bystander.wait().unwrap();

    std::fs::write(options.dir.join("redis.pid"), orphan.id().to_string()).unwrap();
    let server = RedisServer::start(options.clone()).await.unwrap();
    assert!(!orphan.wait().unwrap().success() || !runs(i32::try_from(orphan.id()).unwrap()));
    server.stop().await;
}

#[tokio::test]
async fn a_data_folder_deleted_under_the_running_redis_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    let server = RedisServer::start(options.clone()).await.unwrap();
    eventually("its files are there", || options.dir.join("appendonlydir").is_dir()).await;
    // Long enough for the supervisor to have seen them: its next look finds the folder or its absence.
    tokio::time::sleep(Duration::from_millis(600)).await;
    std::fs::remove_dir_all(&options.dir).unwrap();
    let mut process = server.process();
    let lost = process.wait_for(|state| matches!(state, ServerProcess::Lost(_)));
    let lost = tokio::time::timeout(PATIENCE, lost).await.unwrap().unwrap().clone();
    let ServerProcess::Lost(reason) = lost else { unreachable!() };
    assert!(reason.contains("seckill ledger adopt"), "{reason}");
    let up = process.wait_for(|state| *state == ServerProcess::Up);
    tokio::time::timeout(PATIENCE, up).await.unwrap().unwrap();
    server.stop().await;
}
