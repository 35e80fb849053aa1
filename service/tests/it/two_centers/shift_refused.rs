//! Wrong use of shifts: refused with exit code 2, nothing changed, and the message says why and what to do next.

use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::{Crowd, compare_books};
use crate::support::eventually;

/// More than anybody buys in these tests.
const PLENTY: u64 = 1_000_000;

/// What a shift must not change when it is refused.
async fn standing(centers: &Centers) -> Value {
    let topology = centers.topology(Which::B).await;
    json!([
        topology["master"],
        topology["epoch"],
        topology["shift"],
        topology["history"],
        topology["in_sync"]
    ])
}

/// Asks for what is refused: of a center, with these arguments; the message names all of `says`.
async fn refused(centers: &Centers, asked: Which, args: &[&str], says: &[&str]) {
    let before = standing(centers).await;
    let all = [&["master", "shift"], args].concat();
    let (code, out, err) = centers.command(asked, &all);
    assert_eq!(code, 2, "{all:?}: {out}\n{err}\n{}", centers.logs());
    println!("{all:?}\n{out}{err}");
    for part in says {
        assert!(err.contains(part), "{all:?}: no {part:?} in {err}");
    }
    assert_eq!(standing(centers).await, before, "{all:?} changed something");
    // For programs: the same, as one document.
    let (code, out, _) = centers.command(asked, &[&all[..], &["-o", "json"]].concat());
    assert_eq!(code, 2);
    let answer: Value = serde_json::from_str(&out).unwrap_or_else(|_| panic!("{out}"));
    assert_eq!(answer["outcome"], "refused", "{answer:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_with_the_reason_and_the_next_step() {
    let centers = Centers::start(CentersOptions { etcd: true, ..CentersOptions::default() }).await;
    centers.client(Which::A).create_sale("phone", PLENTY, json!({})).await;
    let crowd = Crowd::start(&centers, "phone", "u", 8, PLENTY);
    crowd.until_more(50).await;

    let epoch = centers.epoch(Which::A).await;
    let stale = (epoch - 1).to_string();
    for asked in BOTH {
        refused(&centers, asked, &["--to", "a", "--yes"], &["a is the master already"]).await;
        refused(&centers, asked, &["--to", "z", "--yes"], &["no center z", "a, b"]).await;
        let stale = ["--to", "b", "--yes", "--expect-epoch", &stale];
        refused(&centers, asked, &stale, &[&format!("epoch {epoch}"), "topology show"]).await;
        // Nobody there to ask.
        refused(&centers, asked, &["--to", "b"], &["--yes", "--dry-run"]).await;
    }
    // A dry run of what would go says so, and changes nothing.
    let before = standing(&centers).await;
    for asked in BOTH {
        let (code, out, err) = centers.command(asked, &["master", "shift", "--to", "b", "--dry-run"]);
        assert_eq!(code, 0, "{out}\n{err}");
        println!("{out}");
        assert!(out.contains("from center a to center b") && out.contains("nothing was changed"), "{out}");
        assert!(out.contains(" ok\n"), "no check is shown: {out}");
    }
    assert_eq!(standing(&centers).await, before);

    // A replica that is dead.
    centers.redis(Which::B).kill();
    refused(
        &centers,
        Which::B,
        &["--to", "b", "--yes"],
        &["shift_refused", "FAILED", "bring the Redis of center b back"],
    )
    .await;
    centers.redis(Which::B).restart().await.unwrap();
    let epoch = centers.until_in_sync(epoch).await;

    // Without the topology nothing may be decided.
    let etcd = centers.etcd.as_ref().unwrap();
    etcd.kill();
    eventually("a knows that it may not write", async || {
        (centers.ready(Which::A).await["authority"]["granted"] == false).then_some(())
    })
    .await;
    for asked in BOTH {
        refused(&centers, asked, &["--to", "b", "--yes"], &["topology"]).await;
    }
    etcd.restart().await.unwrap();
    crowd.until_more(50).await;
    assert_eq!(centers.epoch(Which::A).await, epoch);

    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    assert_eq!(compare_books(&centers, Which::A, "phone", &heard.bought).await, heard.bought.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_one_shift_runs_another_is_refused_and_a_lost_terminal_changes_nothing() {
    let mut centers = Centers::start(CentersOptions { etcd: true, ..CentersOptions::default() }).await;
    centers.kill_service(Which::A);
    centers.redis(Which::A).kill();
    // It waits out the lease: time enough for a second one.
    let first = Running(start(&centers, &["master", "shift", "--to", "b", "--mode", "forced", "--yes"]));
    let running = eventually("it runs", async || {
        let shift = centers.topology(Which::B).await["shift"].clone();
        shift["id"].as_str().map(str::to_owned)
    })
    .await;
    let forced = ["master", "shift", "--to", "b", "--mode", "forced", "--yes"];
    let (code, out, err) = centers.command(Which::B, &forced);
    assert_eq!(code, 2, "{out}\n{err}");
    assert!(err.contains(&running) && err.contains("shift status"), "{err}");
    // Whoever started it goes away.
    drop(first);
    let (code, out, err) = centers.command(Which::B, &["shift", "status", "--follow"]);
    assert_eq!(code, 0, "{out}\n{err}\n{}", centers.logs());
    assert!(out.contains("done"), "{out}");
    let topology = centers.topology(Which::B).await;
    assert_eq!((&topology["master"], &topology["shift"]), (&json!("b"), &Value::Null));
    assert_eq!(topology["history"].as_array().unwrap().len(), 1, "{topology:#}");
    let (code, out, err) = centers.command(Which::B, &["shift", "abort", &running]);
    assert_eq!(code, 2, "{out}\n{err}");
    assert!(err.contains("is over"), "{err}");
}

/// A command that is killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(centers: &Centers, args: &[&str]) -> Child {
    let mut command: Command = centers.prepared(Which::B, args);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}
