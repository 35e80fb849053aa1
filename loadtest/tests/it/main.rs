//! The harness against targets that keep their promises and targets that do not.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

mod blaster;
mod double;
mod features;
mod schema;

use std::io::Write as _;
use std::time::Duration;

use double::{ADMIN_TOKEN, Double, Fault, SALE, SECRET};
use seckill_loadtest::scenario::{Admin, Scenario};
use serde_json::Value;

pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) report: Value,
    pub(crate) stderr: String,
}

impl Ran {
    pub(crate) fn outcome(&self, code: &str) -> u64 {
        let outcomes = self.report["outcomes"].as_array().unwrap();
        outcomes.iter().find(|o| o["code"] == code).map_or(0, |o| o["requests"].as_u64().unwrap())
    }

    pub(crate) fn number(&self, pointer: &str) -> u64 {
        self.report
            .pointer(pointer)
            .and_then(Value::as_u64)
            .unwrap_or_else(|| panic!("{pointer} in {}", self.report))
    }

    pub(crate) fn failed_checks(&self) -> Vec<String> {
        let checks = self.report["books"]["checks"].as_array().unwrap();
        checks.iter().filter(|c| c["ok"] == false).map(|c| c["name"].as_str().unwrap().to_owned()).collect()
    }

    /// The first violation of a kind: its order and its words.
    pub(crate) fn violation(&self, code: &str) -> (String, String) {
        let all = self.report["books"]["violations"].as_array().unwrap();
        let found = all.iter().find(|v| v["code"] == code).unwrap_or_else(|| panic!("{code} in {all:?}"));
        (
            found["order_id"].as_str().unwrap_or_default().to_owned(),
            found["detail"].as_str().unwrap().to_owned(),
        )
    }
}

/// Runs the binary with `args` beside what every run needs.
pub(crate) async fn loadtest(url: &str, args: &str) -> Ran {
    let mut secret = tempfile::NamedTempFile::new().unwrap();
    secret.write_all(SECRET).unwrap();
    secret.write_all(b"\n").unwrap();
    let mut token = tempfile::NamedTempFile::new().unwrap();
    writeln!(token, "{ADMIN_TOKEN}").unwrap();
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_seckill-loadtest"))
        .args(["run", "-o", "json", "--target", url, "--admin", url, "--workers", "1"])
        .args(if args.contains("--sale") { &[][..] } else { &["--sale", SALE] })
        // A crowded test machine may hold the generator up; what it then measures is not looked at here.
        .args(["--max-lag-ms", "2000"])
        .arg("--token-secret-file")
        .arg(secret.path())
        .arg("--token-file")
        .arg(token.path())
        .args(args.split_whitespace())
        .env("NO_COLOR", "1")
        .output()
        .await
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    if !report.is_null() {
        assert_eq!(schema::errors(&report), Vec::<String>::new(), "every report is as schema.json says");
    }
    Ran { code: output.status.code().unwrap(), report, stderr }
}

#[tokio::test]
async fn an_honest_target_passes_and_both_sides_count_the_same() {
    let double = Double::start(300, 1, Fault::None).await;
    let ran = loadtest(
        &double.url,
        "--rate 500 --duration 2s --buyers 1000 --duplicates 0.3 --second-purchases 0.1",
    )
    .await;
    assert_eq!(ran.code, 0, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.number("/books/orders"), 300);
    assert_eq!(double.orders(), 300);
    let asked: u64 = double.counts().values().sum();
    assert_eq!(ran.number("/offered/requests") + ran.number("/books/purchase_requests"), asked);
    assert_eq!(ran.number("/offered/arrivals_sent"), 1000);
    assert_eq!(ran.number("/latency_us/count"), ran.number("/offered/requests"));
    for (code, count) in double.counts() {
        // The books ask for the winners once more; everything else is the load's.
        let by_the_books = if code == "replayed" { ran.number("/books/purchase_requests") } else { 0 };
        assert_eq!(ran.outcome(&code) + by_the_books, count, "{code}");
    }
    let duplicates = ran.number("/offered/duplicates");
    assert!((200..400).contains(&duplicates), "{duplicates}");
    let second = ran.number("/offered/second_purchases");
    assert!((50..160).contains(&second), "{second}");
    assert_eq!(ran.report["schema"], "seckill-loadtest/run");
    assert_eq!(ran.report["schema_version"], 2);
}

#[tokio::test]
async fn without_books_every_code_is_counted_exactly() {
    let double = Double::start(200, 1, Fault::NotReplicated).await;
    let args = "--rate 1000 --duration 1s --buyers 600 --duplicates 0.5 --second-purchases 0.2 --no-books";
    let ran = loadtest(&double.url, args).await;
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for (code, count) in double.counts() {
        assert_eq!(ran.outcome(&code), count, "{code}");
    }
    assert_eq!(ran.number("/offered/requests"), double.counts().values().sum::<u64>());
    assert_eq!(ran.report["books"], Value::Null);
}

#[tokio::test]
async fn the_same_seed_repeats_the_run_and_the_ledger_recognises_it() {
    let double = Double::start(1000, 1, Fault::None).await;
    let args = "--rate 500 --duration 1s --buyers 200 --duplicates 0.2 --second-purchases 0.2 --seed 42";
    let first = loadtest(&double.url, args).await;
    assert_eq!(first.code, 0, "{}", first.report);
    let again = loadtest(&double.url, args).await;
    assert_eq!(again.code, 0, "{}", again.report);
    assert_eq!(again.number("/books/orders_from_before"), 200);
    assert_eq!(again.outcome("accepted"), 0);
    assert_eq!(first.number("/offered/requests"), again.number("/offered/requests"));
}

#[tokio::test]
async fn an_id_given_to_two_buyers_is_named() {
    let double = Double::start(100, 1, Fault::GivesOneIdTwice).await;
    let ran = loadtest(&double.url, "--rate 500 --duration 400ms --drain-timeout 1s").await;
    assert_eq!(ran.code, 2, "{}", ran.report);
    let (order, detail) = ran.violation("order_id_given_twice");
    assert!(detail.contains(&order) && order.len() == 19, "{detail}");
    assert!(ran.failed_checks().contains(&"no_order_id_twice".to_owned()));
}

#[tokio::test]
async fn a_lost_order_is_named() {
    let double = Double::start(100, 1, Fault::LosesAnOrder).await;
    let ran = loadtest(&double.url, "--rate 500 --duration 400ms --drain-timeout 1s").await;
    assert_eq!(ran.code, 2, "{}", ran.report);
    let (order, _) = ran.violation("order_lost");
    assert!(order.ends_with("0000000010"), "{order}");
    assert_eq!(ran.failed_checks(), ["every_order_is_stored"]);
}

#[tokio::test]
async fn overselling_is_found_behind_clean_looking_books() {
    let double = Double::start(50, 1, Fault::Oversells).await;
    let ran = loadtest(&double.url, "--rate 500 --duration 400ms").await;
    assert_eq!(ran.code, 2, "{}", ran.report);
    assert!(ran.failed_checks().contains(&"nothing_oversold".to_owned()), "{:?}", ran.failed_checks());
    assert_eq!(ran.violation("oversold").0.len(), 19);
}

#[tokio::test]
async fn a_replay_with_another_id_is_named() {
    let double = Double::start(100, 1, Fault::ReplaysWithAnotherId).await;
    let ran = loadtest(&double.url, "--rate 500 --duration 400ms --duplicates 0.5").await;
    assert_eq!(ran.code, 2, "{}", ran.report);
    let (order, detail) = ran.violation("replay_with_another_order");
    assert!(detail.contains(&order), "{detail}");
}

#[tokio::test]
async fn every_other_broken_promise_ends_with_exit_code_2() {
    for (fault, args, check, violation) in [
        (Fault::ReplaysUnmarked, "", "replays_are_marked", "replay_not_marked"),
        (Fault::IgnoresTheLimit, "--second-purchases 0.5", "no_user_above_the_limit", "user_above_limit"),
        (Fault::StoresAnotherQuantity, "", "every_order_is_stored", "order_differs"),
    ] {
        let double = Double::start(1000, 1, fault).await;
        let ran = loadtest(&double.url, &format!("--rate 500 --duration 400ms {args}")).await;
        assert_eq!(ran.code, 2, "{fault:?}: {}", ran.report);
        assert!(ran.failed_checks().contains(&check.to_owned()), "{fault:?}: {:?}", ran.failed_checks());
        assert_eq!(ran.violation(violation).0.len(), 19, "{fault:?}");
    }
}

#[tokio::test]
async fn a_stall_shows_in_the_percentiles_of_everyone_who_had_to_wait() {
    let double = Double::start(10_000, 1, Fault::Stalls).await;
    let ran = loadtest(&double.url, "--rate 400 --duration 6s --connections 8").await;
    assert_eq!(ran.code, 0, "{}\n{}", ran.report, ran.stderr);
    // A closed loop would have seen eight slow requests. A third of these buyers came during the stall.
    assert!(ran.number("/latency_us/p99_9") >= 1_900_000, "{}", ran.report["latency_us"]);
    assert!(ran.number("/latency_us/p90") >= 900_000, "{}", ran.report["latency_us"]);
    assert!(ran.number("/latency_us/p50") <= 900_000, "{}", ran.report["latency_us"]);
}

#[tokio::test]
async fn unknowns_are_resolved_under_the_same_key() {
    for (fault, code) in [
        (Fault::CutsConnections, "connection_lost"),
        (Fault::FallsSilent, "timeout"),
        (Fault::NotReplicated, "not_replicated"),
    ] {
        let double = Double::start(100, 1, fault).await;
        let args = "--rate 500 --duration 400ms --max-attempts 1 --timeout-ms 400";
        let ran = loadtest(&double.url, args).await;
        assert_eq!(ran.code, 0, "{fault:?}: {}", ran.report);
        assert_eq!(ran.outcome(code), 20, "{fault:?}: {}", ran.report["outcomes"]);
        assert_eq!(double.counts()[code], 20, "{fault:?}");
        assert_eq!(ran.number("/books/unknown"), 20, "{fault:?}");
        assert_eq!(ran.number("/books/unknown_accepted"), 20, "{fault:?}");
        assert_eq!(ran.number("/books/orders"), 100, "{fault:?}");
    }
}

#[tokio::test]
async fn retryable_answers_are_tried_again_while_the_load_runs() {
    let double = Double::start(1000, 1, Fault::Overloaded).await;
    let ran = loadtest(&double.url, "--rate 500 --duration 400ms").await;
    assert_eq!(ran.code, 0, "{}", ran.report);
    assert_eq!(ran.outcome("overloaded"), 200);
    assert_eq!(ran.outcome("accepted"), 200);
    assert_eq!(ran.number("/offered/retries"), 200);
    assert_eq!(ran.number("/accepted_after_us/count"), 200);
    assert!(
        ran.number("/accepted_after_us/p50") > ran.number("/latency_us/p50"),
        "a retry costs the buyer time"
    );
}

#[tokio::test]
async fn nobody_at_the_target_is_exit_code_4() {
    let gone = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let ran = loadtest(&gone, "--rate 10 --duration 1s").await;
    assert_eq!(ran.code, 4, "{}", ran.stderr);
    assert!(ran.stderr.contains("cannot connect"), "{}", ran.stderr);
}

#[tokio::test]
async fn a_target_that_dies_is_exit_code_4() {
    let double = Double::start(1000, 1, Fault::Dies).await;
    let args = "--rate 200 --duration 1s --drain-timeout 500ms --timeout-ms 300";
    let ran = loadtest(&double.url, args).await;
    assert_eq!(ran.code, 4, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.report["result"], "unreachable");
    assert!(ran.number("/offered/unsent") > 0, "arrivals that found nobody are not forgotten");
}

#[tokio::test]
async fn a_target_that_restarts_is_waited_for_and_its_books_balance() {
    let double = Double::start(10_000, 1, Fault::Restarts).await;
    let ran = loadtest(&double.url, "--rate 200 --duration 2s --max-attempts 1 --duplicates 0.2").await;
    assert_eq!(ran.code, 0, "{}\n{}", ran.report, ran.stderr);
    assert!(ran.outcome("connection_lost") > 0, "{}", ran.report["outcomes"]);
    assert!(ran.number("/generator/connect_errors") > 0);
    assert_eq!(ran.number("/books/orders"), 400);
    assert_eq!(double.orders(), 400);
}

#[tokio::test]
async fn a_secret_that_is_not_the_targets_is_noticed_before_the_load() {
    let double = Double::start(10, 1, Fault::None).await;
    let mut scenario =
        Scenario::new(&double.url, b"another secret", seckill_domain::SaleId::new(SALE).unwrap());
    scenario.admin = Some(Admin { url: double.url.clone(), token: ADMIN_TOKEN.to_owned() });
    let Err(err) = seckill_loadtest::run(&scenario, |_: &str| (), std::future::pending()).await else {
        panic!()
    };
    assert_eq!(err.exit_code(), 64, "{err}");
    assert!(double.counts().is_empty());
}

#[tokio::test]
async fn a_sale_that_does_not_exist_is_exit_code_64() {
    let double = Double::start(10, 1, Fault::None).await;
    let ran = loadtest(&double.url, "--rate 10 --duration 1s --sale another").await;
    assert_eq!(ran.code, 64, "{}", ran.stderr);
}

#[tokio::test]
async fn a_rate_beyond_the_generator_makes_the_run_invalid() {
    let target = blaster::start();
    let args = "--rate 5000000 --duration 500ms --buyers 1000 --timeout-ms 300 --connections 16 --no-books";
    let ran = loadtest(&target, args).await;
    assert_eq!(ran.code, 3, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.report["generator"]["valid"], false);
}

#[tokio::test]
async fn wrong_arguments_are_exit_code_64() {
    let double = Double::start(10, 1, Fault::None).await;
    for (args, said) in [
        ("--rate 0 --duration 1s", "--rate"),
        ("--rate 10 --duration 1d", "duration"),
        ("--rate 10 --duration 1s --duplicates 2", "--duplicates"),
        ("--rate 10 --duration 1s --colour", "--colour"),
        ("--rate 10", "--duration"),
    ] {
        let ran = loadtest(&double.url, args).await;
        assert_eq!(ran.code, 64, "{args}: {}", ran.stderr);
        assert!(ran.stderr.contains(said), "{args}: {}", ran.stderr);
    }
}

#[tokio::test]
async fn a_run_can_be_started_in_process_and_ended_early() {
    let double = Double::start(10_000, 1, Fault::None).await;
    let mut scenario = Scenario::new(&double.url, SECRET, seckill_domain::SaleId::new(SALE).unwrap());
    scenario.admin = Some(Admin { url: double.url.clone(), token: ADMIN_TOKEN.to_owned() });
    scenario.rate = 100.0;
    scenario.duration = Duration::from_secs(600);
    scenario.timeout = Duration::from_secs(1);
    let mut lines = 0;
    let enough = tokio::time::sleep(Duration::from_millis(600));
    let report = seckill_loadtest::run(&scenario, |_: &str| lines += 1, enough).await.unwrap();
    assert_eq!(report.exit_code, 0, "{report}");
    assert!(report.interrupted && lines > 0);
    assert_eq!(report.offered.arrivals_sent, double.orders() as u64);
    assert!(report.to_string().contains("PASS"), "{report}");
}
