//! A service that sleeps while its shards are handed over writes nothing when it wakes up (O1); and how the command that
//! moves shards ends when something is in its way.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::course::{Asked, Witness, arm, until_still};
use super::shards::{Databases, PRICE, compare, owners};
use crate::centers::{Centers, CentersOptions, LEASE, Which};
use crate::client::Client;
use crate::crowd::{Bought, Crowd, home, user_of};
use crate::support::{PATIENCE, eventually};
use crate::up::free_base_port;

/// More than anybody buys in these tests.
const PLENTY: u64 = 1_000_000;
/// Shoppers at a time.
const WIDTH: usize = 8;
/// Payments that reach b while it sleeps.
const PAYMENTS: usize = 40;
/// See [`fall_asleep_while_shards_move`].
const ATTEMPTS: usize = 3;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_slept_while_its_shards_were_handed_over_writes_nothing_when_it_wakes_up() {
    let databases = Databases::start().await;
    let centers = Centers::start(CentersOptions { etcd: true, ..databases.options() }).await;
    let [a, b] = [centers.client(Which::A), centers.client(Which::B)];
    a.create_sale("phone", PLENTY, json!({ "price": PRICE })).await;
    let crowd = Crowd::start(&centers, "phone", "u", WIDTH, PLENTY);
    let witness = Witness::start(&centers);
    crowd.until_more(50).await;
    let mut paid = Vec::new();
    for uid in (0..).map(|n| format!("payer{n}")).filter(|uid| home(uid) == Which::B).take(PAYMENTS) {
        let answer = b.buy_until_known("phone", &uid, "k").await;
        let order_id = answer.body["order_id"].as_str().unwrap().to_owned();
        paid.push(Bought { uid, key: "k".to_owned(), order_id });
    }
    for bought in &paid {
        b.stored_order(&bought.uid, &bought.order_id).await;
    }
    refused_are_those_that_make_no_sense(&centers);

    // One of b's two services falls asleep with a payment in its hands, and the other one lets go of the shards. What
    // reaches the sleeper meanwhile waits for it.
    let second = Second::start(&centers);
    until_instances_of_b(&centers, 2).await;
    let mut payments = JoinSet::new();
    let mut heard = crowd.stop().await;
    let Moved { asleep, topology: moved, given_up, crowd } =
        fall_asleep_while_shards_move(&centers, &mut payments, &paid).await;
    assert!(owners(&moved).iter().all(|owner| owner == "a"), "{moved:#}\n{}", centers.logs());
    for bought in &paid {
        payments.spawn(pay(b.clone(), bought.order_id.clone()));
    }
    // a goes on by itself, for those who were b's, too.
    let (uid, key) = (user_of(Which::B, "new"), "k".to_owned());
    let answer = a.buy_until_known("phone", &uid, &key).await;
    let order_id = answer.body["order_id"].as_str().unwrap().to_owned();
    a.stored_order(&uid, &order_id).await;
    let new = Bought { uid, key, order_id };
    assert!(asleep.elapsed() > LEASE, "{:?}", asleep.elapsed());
    println!("b slept for {:?}", asleep.elapsed());
    centers.pause_service(Which::B, false);

    let mut refused = 0;
    while let Some(payment) = payments.join_next().await {
        refused += payment.unwrap();
    }
    println!("{PAYMENTS} paid at b after it woke up, refused {refused} times before");
    for (which, name) in ["a", "b"].into_iter().enumerate() {
        eventually("every payment is in both databases", async || {
            (databases.number(which, "SELECT COUNT(*) FROM payments").await == PAYMENTS as i64).then_some(())
        })
        .await;
        let of_b = databases.number(which, "SELECT COUNT(*) FROM payments WHERE center = 'b'").await;
        assert_eq!(of_b, given_up as i64, "b booked payments of a's users, as {name}'s database says");
    }

    drop(second);
    until_instances_of_b(&centers, 1).await;

    // The database that takes is away when it is asked whether it has them.
    arm(&centers, "unblocked", "stop");
    let command = shards(&centers, Which::B, &["--shards", "32-63", "--to", "b"]);
    until_still(&centers, Which::B).await;
    databases.server(Which::B).kill();
    centers.pause_service(Which::B, false);
    let (code, answer) = command.answered().await;
    assert_eq!((code, &answer["outcome"]), (5, &json!("verification_failed")), "{answer:#}");
    let failed = answer["shift"]["id"].as_str().unwrap().to_owned();
    databases.server(Which::B).restart().await.unwrap();
    crowd.until_more(20).await;

    // One whose service stands still is given up through another one, and told so to whoever waits for it.
    until_databases_fit(&centers).await;
    arm(&centers, "blocked", "stop");
    let command = shards(&centers, Which::A, &["--shards", "0-7", "--to", "b", "--timeout", "2"]);
    until_still(&centers, Which::B).await;
    let (code, answer) = command.answered().await;
    assert_eq!((code, &answer["outcome"]), (4, &json!("unknown")), "{answer:#}");
    let id = centers.topology(Which::A).await["shift"]["id"].as_str().unwrap().to_owned();
    let follower = Asked::start(&centers, Which::A, &["shift", "status", &id, "--follow"]);
    let (code, out, err) = Asked::start(&centers, Which::A, &["shift", "abort", &id]).ended().await;
    assert_eq!(code, 0, "{out}\n{err}\n{}", centers.logs());
    println!("{out}");
    centers.pause_service(Which::B, false);
    let (code, out, err) = follower.ended().await;
    assert_eq!(code, 3, "{out}\n{err}");
    assert!(out.contains("aborted by admin") && out.contains("stay at home in center a"), "{out}");
    let topology = centers.topology(Which::A).await;
    assert_eq!((&topology["blocked_shards"], &topology["shift"]), (&json!([]), &Value::Null));
    crowd.until_more(20).await;

    heard.add(crowd.stop().await);
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    let bought: Vec<Bought> = heard.bought.into_iter().chain([new]).collect();
    compare(&centers, &bought, &paid).await;
    let told = witness.assert_truthful(&[&failed]).await;
    let count = |ends: &str| told.values().filter(|told| *told == ends).count();
    assert_eq!((count("done"), count("failed"), count("aborted")), (1, 1, 1 + given_up), "{told:?}");
}

/// What became of [`fall_asleep_while_shards_move`].
struct Moved {
    /// Since when it sleeps.
    asleep: Instant,
    /// After the shards moved.
    topology: Value,
    /// How often the shift was given up before.
    given_up: usize,
    crowd: Crowd,
}

/// One of b's two services stands still with a payment in its hands, and all of b's shards move to a, while people buy.
///
/// Nobody buys in the moment in which it falls asleep: with a transaction under way it keeps its shards, as it has to, and
/// the shift is given up after 20 s. If that happens all the same, it is tried again.
async fn fall_asleep_while_shards_move(
    centers: &Centers,
    payments: &mut JoinSet<u32>,
    paid: &[Bought],
) -> Moved {
    let mut crowd = None;
    for (given_up, bought) in paid.iter().take(ATTEMPTS).enumerate() {
        until_instances_of_b(centers, 2).await;
        arm(centers, "paying", "stop");
        payments.spawn(pay(centers.client(Which::B), bought.order_id.clone()));
        until_still(centers, Which::B).await;
        let asleep = Instant::now();
        let shopping = crowd.take().unwrap_or_else(|| Crowd::start(centers, "phone", "v", WIDTH, PLENTY));
        until_instances_of_b(centers, 1).await;
        let (code, answer) = shards(centers, Which::A, &["--from", "b", "--to", "a"]).answered().await;
        if code == 0 {
            let topology = centers.topology(Which::A).await;
            return Moved { asleep, topology, given_up, crowd: shopping };
        }
        crowd = Some(shopping);
        println!("given up: {}", answer["shift"]["message"]);
        assert_eq!(code, 3, "{answer:#}\n{}", centers.logs());
        centers.pause_service(Which::B, false);
        while payments.join_next().await.is_some() {}
    }
    panic!("b's service never let go of its shards:\n{}", centers.logs());
}

/// A second service in center b, which is ended when it is dropped.
struct Second(Child);

impl Second {
    fn start(centers: &Centers) -> Second {
        let first = free_base_port();
        let at = |port: u16| format!("127.0.0.1:{port}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_seckill"));
        command
            .args(["serve", "--config"])
            .arg(centers.folder().join("b/seckill.toml"))
            .env("SECKILL__ORDERS__DATABASE_URL", centers.database(Which::B))
            .env("SECKILL__LISTEN__PUBLIC", at(first))
            .env("SECKILL__LISTEN__ADMIN", at(first + 1))
            .env("SECKILL__LISTEN__INTERNAL", at(first + 2))
            .env("SECKILL__LISTEN__INTERNAL_URL", format!("http://{}", at(first + 2)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Second(command.spawn().unwrap())
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

/// Waits until so many services of b are registered, as a sees it.
async fn until_instances_of_b(centers: &Centers, count: usize) {
    eventually("the services of b that are there are registered", async || {
        let topology = centers.topology(Which::A).await;
        let of_b = topology["instances"].as_array()?.iter().filter(|instance| instance["center"] == "b");
        (of_b.count() == count).then_some(())
    })
    .await;
}

/// `seckill shards shift`, for programs.
fn shards(centers: &Centers, asked: Which, more: &[&str]) -> Asked {
    let args = [&["shards", "shift", "--yes", "-o", "json"], more].concat();
    Asked::start(centers, asked, &args)
}

fn refused_are_those_that_make_no_sense(centers: &Centers) {
    for (args, says) in [
        (&["--shards", "31,32", "--to", "b"][..], "is at home in center b already"),
        (&["--shards", "31,32", "--to", "z"], "there is no center z"),
        (&["--from", "z", "--to", "a"], "no shard is at home there"),
        (&["--shards", "1", "--to", "b", "--expect-epoch", "0"], "is at epoch"),
    ] {
        let (code, out, err) = centers.command(Which::A, &[&["shards", "shift", "--yes"], args].concat());
        assert_eq!(code, 2, "{args:?}: {out}\n{err}");
        assert!(err.contains(says), "{args:?}: no {says:?} in {err}");
    }
}

/// Pays an order at a service that may be asleep, until it is paid. Returns how often it was refused.
async fn pay(client: Client, order_id: String) -> u32 {
    let begun = Instant::now();
    let body = json!({ "payment_id": format!("pay-{order_id}"), "amount": PRICE });
    let mut refused = 0;
    loop {
        match client.pay_once(&order_id, body.clone()).await {
            Some(answer) if answer.status == 200 => return refused,
            Some(answer) => {
                assert_eq!((answer.status, &answer.body["retryable"]), (503, &json!(true)), "{answer:?}");
                refused += 1;
            }
            None => {}
        }
        assert!(begun.elapsed() < PATIENCE, "{order_id} is never paid");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until shards could move to b again.
async fn until_databases_fit(centers: &Centers) {
    let dry_run = ["shards", "shift", "--shards", "0-7", "--to", "b", "--dry-run"];
    eventually("the databases copy each other", async || {
        (centers.command(Which::A, &dry_run).0 == 0).then_some(())
    })
    .await;
}
