//! Processes that die in the middle of a sale.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::client::{Answer, Client};
use crate::support::eventually;
use crate::up::{Up, free_base_port};

/// Buyers that each try until they know; `done` counts those that do.
fn crowd(
    client: &Client,
    sale: &'static str,
    buyers: usize,
    done: &Arc<AtomicUsize>,
) -> JoinSet<(String, Answer)> {
    let in_flight = Arc::new(Semaphore::new(64));
    let mut attempts = JoinSet::new();
    for buyer in 0..buyers {
        let (client, in_flight, done) = (client.clone(), Arc::clone(&in_flight), Arc::clone(done));
        attempts.spawn(async move {
            let _permit = in_flight.acquire_owned().await.unwrap();
            let uid = format!("buyer-{buyer}");
            let answer = client.buy_until_known(sale, &uid, "k").await;
            done.fetch_add(1, Ordering::Relaxed);
            (uid, answer)
        });
    }
    attempts
}

/// Every 202 has its order, nothing is sold twice, the books balance.
async fn check_books(up: &Up, client: &Client, mut attempts: JoinSet<(String, Answer)>, units: usize) {
    let mut winners = HashMap::new();
    while let Some(attempt) = attempts.join_next().await {
        let (uid, answer) = attempt.unwrap();
        match (answer.status, answer.code()) {
            (202, _) => {
                let id = answer.body["order_id"].as_str().unwrap().to_owned();
                assert_eq!(winners.insert(id, uid), None, "an order id was given twice");
            }
            (409, "sold_out") => {}
            other => panic!("{other:?} for {uid}: {}", answer.body),
        }
    }
    assert_eq!(winners.len(), units, "{}", up.log());
    for (id, uid) in &winners {
        client.stored_order(uid, id).await;
    }
    let audit = up.assert_books_balance();
    assert_eq!(audit["sales"][0]["orders"]["created"], json!(units), "{audit}");
}

async fn wait_for(done: &AtomicUsize, count: usize) {
    eventually("the crowd gets on", async || (done.load(Ordering::Relaxed) >= count).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_is_killed_in_mid_load_and_nothing_promised_is_lost() {
    let mut up = Up::start();
    let client = up.client();
    client.create_sale("s", 2_000, json!({})).await;
    let done = Arc::new(AtomicUsize::new(0));
    let attempts = crowd(&client, "s", 4_000, &done);
    for kill_at in [500, 1_500] {
        wait_for(&done, kill_at).await;
        up.kill();
        up.restart();
    }
    check_books(&up, &client, attempts, 2_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_is_killed_in_mid_load_and_nothing_promised_is_lost() {
    let up = Up::start();
    let client = up.client();
    client.create_sale("s", 2_000, json!({})).await;
    let done = Arc::new(AtomicUsize::new(0));
    let attempts = crowd(&client, "s", 4_000, &done);
    for kill_at in [500, 1_500] {
        wait_for(&done, kill_at).await;
        let killed = up.kill_redis();
        eventually("redis-server is started again", async || up.redis_pid().filter(|pid| *pid != killed))
            .await;
    }
    check_books(&up, &client, attempts, 2_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gentle_end_drains_and_leaves_no_process_behind() {
    let mut up = Up::start();
    let client = up.client();
    client.create_sale("s", 100, json!({})).await;
    let done = Arc::new(AtomicUsize::new(0));
    let attempts = crowd(&client, "s", 400, &done);
    wait_for(&done, 50).await;
    assert_eq!(up.terminate(), Some(0), "{}", up.log());
    assert_eq!(up.redis_pid(), None, "a redis-server is left");
    up.restart();
    check_books(&up, &client, attempts, 100).await;
}

#[test]
fn an_occupied_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let base = free_base_port();
    for offset in [0, 1, 3] {
        let _taken = std::net::TcpListener::bind(("127.0.0.1", base + offset)).unwrap();
        let mut up = Up::at(dir.path(), base);
        up.spawn(&[]);
        assert_eq!(up.wait_exit(), Some(1), "{}", up.log());
        assert!(up.log().contains(&(base + offset).to_string()), "{}", up.log());
    }
}

#[test]
fn a_folder_that_is_in_use_is_refused() {
    let first = Up::start();
    let mut second = Up::at(first.dir(), free_base_port());
    second.spawn(&[]);
    assert_eq!(second.wait_exit(), Some(1), "{}", second.log());
    assert!(second.log().contains("in use"), "{}", second.log());
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    // Root may write anywhere, but not below a file.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let mut up = Up::at(&file.join("data"), free_base_port());
    up.spawn(&[]);
    assert_eq!(up.wait_exit(), Some(1), "{}", up.log());
    assert!(up.log().contains("file/data"), "{}", up.log());
}

#[test]
fn a_read_only_data_folder_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Mounted::tmpfs(dir.path(), "ro");
    for below in ["", "data"] {
        let data_dir = mounted.path().join(below);
        let mut up = Up::at(&data_dir, free_base_port());
        up.spawn(&[]);
        assert_eq!(up.wait_exit(), Some(1), "{}", up.log());
        let (log, named) = (up.log(), mounted.path().display().to_string());
        assert!(log.contains(&named) && log.contains("Read-only file system"), "{log}");
    }
}

/// The data folder is on a file system of 24 MiB that fills up under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_stops_sales_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Mounted::tmpfs(dir.path(), "size=24m");
    let mut up = Up::at(mounted.path(), free_base_port());
    up.spawn(&[]);
    up.wait_ready();
    let client = up.client();
    client.create_sale("s", 1_000_000, json!({})).await;
    let first = client.buy_until_known("s", "early", "k").await;
    assert_eq!(first.status, 202);
    client.stored_order("early", first.body["order_id"].as_str().unwrap()).await;

    // Fill it to the last byte, as a log gone wild would.
    let ballast = mounted.path().join("ballast");
    fill(&ballast);
    let mut promised = Vec::new();
    for buyer in 0..200 {
        let uid = format!("late-{buyer}");
        if let Some(answer) = client.buy("s", &uid, "k", 1).await
            && answer.status == 202
        {
            promised.push((uid, answer.body["order_id"].as_str().unwrap().to_owned()));
        }
    }
    std::fs::remove_file(&ballast).unwrap();

    // Room again: it goes on by itself, and every promise is kept.
    let after = client.buy_until_known("s", "after", "k").await;
    assert_eq!(after.status, 202, "{}\n{}", after.body, up.log());
    promised.push(("early".into(), first.body["order_id"].as_str().unwrap().to_owned()));
    promised.push(("after".into(), after.body["order_id"].as_str().unwrap().to_owned()));
    for (uid, id) in &promised {
        client.stored_order(uid, id).await;
    }
    up.assert_books_balance();
    assert_eq!(up.terminate(), Some(0), "{}", up.log());
    drop(up);
    drop(mounted);
}

/// A small file system of its own.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn tmpfs(at: &std::path::Path, options: &str) -> Mounted {
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(at)
            .status()
            .expect("mount starts");
        assert!(status.success(), "the test mounts a tmpfs and so needs root");
        Mounted(at.to_owned())
    }

    fn path(&self) -> &std::path::Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for _ in 0..100 {
            let done = std::process::Command::new("umount")
                .arg(&self.0)
                .status()
                .is_ok_and(|status| status.success());
            if done {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn fill(path: &std::path::Path) {
    use std::io::Write;
    let mut file = std::fs::File::create(path).unwrap();
    for size in [65_536, 4096, 512, 1] {
        while file.write_all(&vec![0; size]).is_ok() {}
    }
}
