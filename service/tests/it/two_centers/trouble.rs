//! What a shift of the master meets in mid-course, while people buy in both centers, and what the command says and ends
//! with: each exit code from what really happens.

use seckill_parts::Etcd;
use serde_json::{Value, json};

use super::course::{Asked, Witness, shift_until};
use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::{Crowd, ask_again, compare_books};
use crate::support::eventually;

/// More than anybody buys in these tests.
const PLENTY: u64 = 1_000_000;
/// Shoppers at a time.
const WIDTH: usize = 8;
/// Who asks while nobody can know.
const IN_THE_DARK: (&str, &str) = ("in-the-dark", "k");

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_dies_hangs_or_goes_away_in_mid_shift_costs_nobody_an_order_and_is_told_as_it_is() {
    let mut centers = Centers::start(CentersOptions { etcd: true, ..CentersOptions::default() }).await;
    centers.client(Which::A).create_sale("phone", PLENTY, json!({})).await;
    let crowd = Crowd::start(&centers, "phone", "u", WIDTH, PLENTY);
    let witness = Witness::start(&centers);
    crowd.until_more(50).await;

    refused_are_those_that_make_no_sense(&centers);
    lose_etcd_in_the_freeze(&centers, &crowd).await;
    lose_etcd_after_the_decision(&centers, &crowd).await;
    // b is the master from here on.
    lose_the_target_in_the_freeze(&mut centers, &crowd).await;
    let failed = lose_the_target_after_the_decision(&centers, &crowd).await;
    // And a again.
    a_replica_that_lags(&centers, &crowd).await;
    lost_terminals(&mut centers, &crowd).await;
    // And b.

    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    let late = centers.client(Which::A).buy_until_known("phone", IN_THE_DARK.0, IN_THE_DARK.1).await;
    assert_eq!(late.status, 202, "{late:?}");
    let all = heard.bought.len() as u64 + 1;
    assert_eq!(compare_books(&centers, Which::B, "phone", &heard.bought).await, all);
    for which in BOTH {
        ask_again(&centers.client(which), "phone", &heard.bought[..50]).await;
    }
    let told = witness.assert_truthful(&[&failed]).await;
    let count = |ends: &str| told.values().filter(|told| *told == ends).count();
    assert_eq!((count("done"), count("aborted"), count("failed")), (2, 3, 1), "{told:?}");
}

/// Exit codes 1 and 2, where nothing was asked of anybody, or nothing was changed.
fn refused_are_those_that_make_no_sense(centers: &Centers) {
    let shards = ["shards", "shift", "--from", "a", "--to", "b", "--yes"];
    let (code, out, err) = centers.command(Which::A, &shards);
    assert_eq!(code, 2, "{out}\n{err}");
    assert!(
        err.contains("shift_refused: center b keeps its orders in SQLite") && err.contains("Next: "),
        "{err}"
    );
    let token = centers.folder().join("payments-token");
    for what in [&shards[..], &["master", "shift", "--to", "b", "--yes"]] {
        let args = [what, &["--token-file", token.to_str().unwrap()]].concat();
        let (code, out, err) = centers.command(Which::A, &args);
        assert_eq!(code, 1, "{out}\n{err}");
        assert!(err.contains("--token-file"), "{err}");
    }
}

/// What a program hears at the end.
#[track_caller]
fn assert_ended(centers: &Centers, (code, answer): (i32, Value), expected: (i32, &str), says: &str) {
    let told = (code, answer["outcome"].as_str().unwrap_or_default());
    assert_eq!(told, expected, "{answer:#}\n{}", centers.logs());
    let message = answer["shift"]["message"].as_str().unwrap_or_default();
    println!("{}: {message}", answer["shift"]["reason"]);
    assert!(message.contains(says), "no {says:?}: {message}");
}

/// Waits until purchases are refused in both centers, and nobody calls the shift over.
async fn until_nobody_knows(centers: &Centers, etcd: &Etcd) {
    for which in BOTH {
        let client = centers.client(which);
        let mut tries = 0;
        eventually("purchases are not held any more", async || {
            tries += 1;
            let answer = client.buy("phone", IN_THE_DARK.0, IN_THE_DARK.1, 1).await?;
            assert_eq!((answer.status, &answer.body["retryable"]), (503, &json!(true)), "{answer:?}");
            ["no_authority", "shifting"].contains(&answer.code()).then_some(())
        })
        .await;
        println!("{} refused after {tries} tries", which.id());
        let shifts = client.look("/admin/v1/shifts").await.unwrap().body;
        let state = shifts["running"]["state"].as_str().unwrap_or_default();
        assert!(["running", "unknown"].contains(&state), "without {} it is {shifts:#}", etcd.endpoint());
    }
}

async fn lose_etcd_in_the_freeze(centers: &Centers, crowd: &Crowd) {
    let command = shift_until(centers, Which::A, Which::B, "fenced").await;
    let etcd = centers.etcd.as_ref().unwrap();
    etcd.kill();
    centers.pause_service(Which::B, false);
    until_nobody_knows(centers, etcd).await;
    etcd.restart().await.unwrap();
    assert_ended(centers, command.answered().await, (3, "aborted"), "center a stays the master");
    centers.until_master(Which::A).await;
    crowd.until_more(20).await;
}

async fn lose_etcd_after_the_decision(centers: &Centers, crowd: &Crowd) {
    let command = shift_until(centers, Which::A, Which::B, "decided").await;
    let etcd = centers.etcd.as_ref().unwrap();
    etcd.kill();
    centers.pause_service(Which::B, false);
    until_nobody_knows(centers, etcd).await;
    etcd.restart().await.unwrap();
    assert_ended(centers, command.answered().await, (0, "done"), "center b is the master");
    centers.until_master(Which::B).await;
    crowd.until_more(20).await;
}

/// The service that runs it and the Redis that takes die together when the old master was fenced.
async fn lose_the_target_in_the_freeze(centers: &mut Centers, crowd: &Crowd) {
    // Asked of the center that dies: whoever else answers is asked then.
    let command = shift_until(centers, Which::A, Which::A, "fenced").await;
    centers.redis(Which::A).kill();
    centers.kill_service(Which::A);
    assert_ended(centers, command.answered().await, (3, "aborted"), "center b stays the master");
    // It sells alone.
    crowd.until_more(20).await;
    assert_eq!(centers.topology(Which::B).await["state"], "degraded");
    centers.redis(Which::A).restart().await.unwrap();
    centers.spawn(Which::A);
    centers.until_serving(Which::A).await;
    centers.until_master(Which::B).await;
    crowd.until_more(20).await;
}

/// It is decided, and its Redis is gone: only forward. Returns the shift's id.
async fn lose_the_target_after_the_decision(centers: &Centers, crowd: &Crowd) -> String {
    let command = shift_until(centers, Which::B, Which::A, "decided").await;
    centers.redis(Which::A).kill();
    centers.pause_service(Which::A, false);
    let (code, answer) = command.answered().await;
    let id = answer["shift"]["id"].as_str().unwrap().to_owned();
    assert_ended(centers, (code, answer), (5, "verification_failed"), "--mode forced");
    assert_eq!(centers.topology(Which::B).await["master"], "a");
    centers.redis(Which::A).restart().await.unwrap();
    centers.until_master(Which::A).await;
    crowd.until_more(20).await;
    id
}

/// b's Redis takes nothing any more while people buy.
async fn a_replica_that_lags(centers: &Centers, crowd: &Crowd) {
    let command = shift_until(centers, Which::A, Which::B, "recorded").await;
    centers.redis(Which::B).pause();
    centers.pause_service(Which::B, false);
    assert_ended(centers, command.answered().await, (3, "aborted"), "center a stays the master");
    centers.redis(Which::B).resume();
    centers.until_master(Which::A).await;
    crowd.until_more(20).await;
}

/// A forced shift waits out the lease: time enough for Ctrl-C, and for the death of the service that is asked. It goes on.
async fn lost_terminals(centers: &mut Centers, crowd: &Crowd) {
    let args = ["master", "shift", "--to", "b", "--mode", "forced", "--yes"];
    let first = Asked::start(centers, Which::A, &args);
    first.until_said("record ").await;
    first.interrupt();
    let (code, out, err) = first.ended().await;
    println!("{out}{err}");
    assert_eq!(code, 4, "{out}\n{err}");
    let id = out.split_whitespace().next().unwrap();
    let next = format!("`seckill shift status {id} --follow`");
    for part in ["interrupted", "goes on by itself", &next] {
        assert!(err.contains(part), "no {part:?} in {err}");
    }

    let patient = Asked::start(centers, Which::A, &["shift", "status", id, "--follow"]);
    patient.until_said(id).await;
    centers.kill_service(Which::A);
    let (code, out, err) = patient.ended().await;
    println!("{out}{err}");
    assert_eq!(code, 0, "{out}\n{err}\n{}", centers.logs());
    assert!(out.contains("done") && out.contains("center b is the master"), "{out}");
    centers.spawn(Which::A);
    centers.until_serving(Which::A).await;
    centers.until_master(Which::B).await;
    crowd.until_more(20).await;
}
