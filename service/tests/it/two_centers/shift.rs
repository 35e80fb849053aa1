//! The master moves while people buy in both centers: by command, because its center died, and while somebody sleeps.

use std::time::{Duration, Instant};

use seckill_parts::LinkState;
use serde_json::{Value, json};

use crate::centers::{BOTH, Centers, CentersOptions, LEASE, Which};
use crate::crowd::{Crowd, ask_again, compare_books};
use crate::support::eventually;

/// More than anybody buys in these tests.
const PLENTY: u64 = 1_000_000;
/// Shoppers at a time.
const WIDTH: usize = 24;
/// Shifts in a row.
const SHIFTS: usize = 10;
/// How long purchases are held at most before they fail (`hold_ms`). What a shift takes on a quiet machine is
/// measured by `make bench`.
const HOLD_MS: u64 = 3000;
/// How long a service sleeps: longer than every lease, freeze and timeout.
const SLEEP: Duration = Duration::from_secs(30);
/// What a cut-off center may take beyond its lease on a busy machine, until somebody has noticed.
const NOTICED_WITHIN: Duration = Duration::from_secs(3);

/// `seckill master shift`, asked of a center: exit code and the document that it prints.
fn shift(centers: &Centers, asked: Which, to: Which, more: &[&str]) -> (i32, Value) {
    let args = [&["master", "shift", "--to", to.id(), "--yes", "-o", "json"], more].concat();
    let (code, out, err) = centers.command(asked, &args);
    let answer = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{code}: {out}\n{err}"));
    (code, answer)
}

/// Prints a shift's steps and returns how long purchases were held.
fn told(shift: &Value) -> u64 {
    let steps: Vec<String> = shift["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| format!("{} {}", step["name"].as_str().unwrap(), step["took_ms"]))
        .collect();
    let held = shift["held_ms"].as_u64().unwrap_or_else(|| panic!("{shift:#}"));
    println!("{} to {}: held {held} ms; {}", shift["id"], shift["to"], steps.join(", "));
    held
}

async fn over_etcd() -> Centers {
    Centers::start(CentersOptions { etcd: true, ..CentersOptions::default() }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_planned_shifts_under_load_fail_nobody_and_lose_nothing() {
    let centers = over_etcd().await;
    centers.client(Which::B).create_sale("phone", PLENTY, json!({})).await;
    let crowd = Crowd::start(&centers, "phone", "u", WIDTH, PLENTY);
    crowd.until_more(100).await;
    let mut held = Vec::new();
    let mut epoch = centers.epoch(Which::A).await;
    for n in 0..SHIFTS {
        let to = [Which::B, Which::A][n % 2];
        // Half of them are asked of the center that gives.
        let asked = if n % 4 < 2 { to } else { to.other() };
        let expected = epoch.to_string();
        let (code, answer) = shift(&centers, asked, to, &["--expect-epoch", &expected, "--reason", "drill"]);
        assert_eq!((code, &answer["outcome"]), (0, &json!("done")), "{answer:#}\n{}", centers.logs());
        let done = &answer["shift"];
        assert_eq!((&done["actor"], &done["reason"]), (&json!("admin"), &json!("drill")));
        held.push(told(done));
        let topology = centers.until_master(to).await;
        epoch = topology["epoch"].as_u64().unwrap();
        assert!(epoch >= done["epoch"].as_u64().unwrap(), "{topology:#}");
        crowd.until_more(50).await;
    }
    let heard = crowd.stop().await;
    println!("{} bought; held {held:?} ms", heard.bought.len());
    assert!(heard.again.is_empty(), "requests failed: {:?}", heard.again);
    assert!(held.iter().all(|held| *held <= HOLD_MS), "{held:?}");
    assert_eq!(compare_books(&centers, Which::A, "phone", &heard.bought).await, heard.bought.len() as u64);
    for which in BOTH {
        ask_again(&centers.client(which), "phone", &heard.bought[..50]).await;
    }
    // All of them stand in the history, asked of either center.
    for which in BOTH {
        let (code, out, err) = centers.command(which, &["shift", "list", "-o", "json"]);
        assert_eq!(code, 0, "{err}");
        let list: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((&list["running"], list["history"].as_array().unwrap().len()), (&Value::Null, SHIFTS));
        assert!(list["history"].as_array().unwrap().iter().all(|shift| shift["state"] == "done"), "{out}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_center_that_died_is_replaced_by_force_and_follows_when_it_is_back() {
    let mut centers = over_etcd().await;
    centers.client(Which::A).create_sale("phone", PLENTY, json!({})).await;
    let crowd = Crowd::start(&centers, "phone", "u", WIDTH, PLENTY);
    crowd.until_more(200).await;

    centers.between(LinkState::Cut);
    centers.kill_service(Which::A);
    centers.redis(Which::A).kill();
    let before = crowd.acknowledged();
    let asked = Instant::now();
    let (code, answer) = shift(&centers, Which::B, Which::B, &["--mode", "forced", "--reason", "a is gone"]);
    assert_eq!((code, &answer["outcome"]), (0, &json!("done")), "{answer:#}\n{}", centers.logs());
    let done = &answer["shift"];
    assert_eq!(done["exposure"]["lossless"], true, "{answer:#}");
    eventually("b sells", async || (crowd.acknowledged() > before).then_some(())).await;
    println!("{:?} from the command to the first purchase, lease {LEASE:?}", asked.elapsed());
    told(done);
    let topology = centers.topology(Which::B).await;
    assert_eq!((&topology["master"], &topology["state"]), (&json!("b"), &json!("degraded")));
    crowd.until_more(200).await;

    // Everything of a comes back, finds out and follows.
    centers.between(LinkState::Healthy);
    centers.redis(Which::A).restart().await.unwrap();
    centers.spawn(Which::A);
    centers.until_serving(Which::A).await;
    centers.until_master(Which::B).await;
    crowd.until_more(100).await;
    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    assert_eq!(compare_books(&centers, Which::B, "phone", &heard.bought).await, heard.bought.len() as u64);
    for which in BOTH {
        ask_again(&centers.client(which), "phone", &heard.bought[..50]).await;
    }

    // And back, planned.
    let (code, answer) = shift(&centers, Which::A, Which::A, &[]);
    assert_eq!(code, 0, "{answer:#}\n{}", centers.logs());
    centers.until_master(Which::A).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_master_that_lives_and_is_cut_off_stops_within_its_lease_and_is_replaced_by_force() {
    let centers = over_etcd().await;
    let [a, b] = BOTH.map(|which| centers.client(which));
    a.create_sale("phone", PLENTY, json!({})).await;
    let crowd = Crowd::start(&centers, "phone", "u", WIDTH, PLENTY);
    crowd.until_more(200).await;

    centers.cut_off(Which::A, LinkState::Cut);
    let cut = Instant::now();
    eventually("a stops by itself", async || {
        (centers.ready(Which::A).await["authority"]["granted"] == false).then_some(())
    })
    .await;
    let stopped = cut.elapsed();
    println!("a stopped {stopped:?} after the cut, lease {LEASE:?}");
    assert!(stopped < LEASE + NOTICED_WITHIN, "{stopped:?}");

    let (code, answer) = shift(&centers, Which::B, Which::B, &["--mode", "forced"]);
    assert_eq!((code, &answer["outcome"]), (0, &json!("done")), "{answer:#}\n{}", centers.logs());
    assert_eq!(answer["shift"]["exposure"]["lossless"], true, "{answer:#}");
    told(&answer["shift"]);
    crowd.until_more(200).await;
    // a's Redis lives, and takes nothing.
    for uid in ["loyal", "lonely"] {
        let answer = a.buy("phone", uid, "k", 1).await.unwrap();
        assert_eq!((answer.status, answer.code()), (503, "no_authority"), "{answer:?}");
        assert_eq!(answer.body["executed"], "no", "{answer:?}");
    }

    centers.cut_off(Which::A, LinkState::Healthy);
    centers.until_master(Which::B).await;
    for uid in ["loyal", "lonely"] {
        assert_eq!(a.buy_until_known("phone", uid, "k").await.status, 202);
    }
    crowd.until_more(100).await;
    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    let all = compare_books(&centers, Which::B, "phone", &heard.bought).await;
    assert_eq!(all, heard.bought.len() as u64 + 2);
    for client in [&a, &b] {
        ask_again(client, "phone", &heard.bought[..50]).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_slept_through_a_shift_changes_nothing_when_it_wakes_up() {
    let centers = over_etcd().await;
    let [a, b] = BOTH.map(|which| centers.client(which));
    a.create_sale("phone", PLENTY, json!({})).await;
    let crowd = Crowd::start(&centers, "phone", "u", WIDTH, PLENTY);
    crowd.until_more(200).await;

    // The old master's service sleeps with purchases on their way, and its guardian with it.
    centers.pause_service(Which::A, true);
    let asleep = Instant::now();
    let (code, answer) = shift(&centers, Which::B, Which::B, &[]);
    assert_eq!((code, &answer["outcome"]), (0, &json!("done")), "{answer:#}\n{}", centers.logs());
    told(&answer["shift"]);
    crowd.until_more(100).await;
    tokio::time::sleep(SLEEP.saturating_sub(asleep.elapsed())).await;
    centers.pause_service(Which::A, false);
    let woken = crowd.acknowledged();
    eventually("a sees who is the master", async || {
        (centers.topology(Which::A).await["master"] == "b").then_some(())
    })
    .await;
    centers.until_master(Which::B).await;
    crowd.until_more(100).await;
    println!("{woken} bought while a slept");
    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    assert_eq!(compare_books(&centers, Which::B, "phone", &heard.bought).await, heard.bought.len() as u64);
    for client in [&a, &b] {
        ask_again(client, "phone", &heard.bought[..50]).await;
    }
}
