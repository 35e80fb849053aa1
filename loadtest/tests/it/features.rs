//! Scenarios, personas, events, thresholds, several processes, and the memory of a long run.

use std::io::Write as _;

use crate::double::{Double, Fault, SALE};
use crate::{blaster, loadtest};

fn scenario(text: &str) -> tempfile::NamedTempFile {
    let mut file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    writeln!(file, "name = \"t\"\nabout = \"a test\"\nsale = \"{SALE}\"\n{text}").unwrap();
    file
}

fn token_file() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "a.payments.token").unwrap();
    file
}

#[tokio::test]
async fn a_missed_threshold_is_exit_code_1_and_broken_books_are_worse() {
    let double = Double::start(1000, 1, Fault::None).await;
    let file = scenario("rate = 200.0\nduration = \"500ms\"\nthresholds = [\"p50 < 1us\", \"failed == 0\"]");
    let name = file.path().to_str().unwrap();
    let ran = loadtest(&double.url, name).await;
    assert_eq!(ran.code, 1, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.report["result"], "threshold_missed");
    let judged = ran.report["thresholds"].as_array().unwrap();
    assert_eq!((&judged[0]["ok"], &judged[1]["ok"]), (&false.into(), &true.into()));

    let liar = Double::start(1000, 1, Fault::LosesAnOrder).await;
    let ran = loadtest(&liar.url, &format!("{name} --drain-timeout 1s")).await;
    assert_eq!(ran.code, 2, "{}", ran.report);
}

#[tokio::test]
async fn several_processes_are_one_result() {
    let double = Double::start(150, 1, Fault::None).await;
    let args = "--rate 400 --duration 1s --duplicates 0.3 --processes 3 --threshold accepted.p99<10s";
    let ran = loadtest(&double.url, args).await;
    assert_eq!(ran.code, 0, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.number("/offered/arrivals_sent"), 400);
    assert_eq!(ran.number("/books/orders"), 150);
    assert_eq!(double.orders(), 150);
    assert_eq!(ran.report["generator"]["workers"].as_array().unwrap().len(), 3);
    let intervals = ran.report["intervals"].as_array().unwrap();
    let requests: u64 = intervals.iter().map(|interval| interval["requests"].as_u64().unwrap()).sum();
    assert_eq!(requests, ran.number("/offered/requests"));
    for code in ["accepted", "sold_out"] {
        assert_eq!(ran.outcome(code), double.counts()[code], "{code}");
    }
}

#[tokio::test]
async fn a_herd_comes_at_once_over_open_connections() {
    let double = Double::start(100, 1, Fault::None).await;
    let ran = loadtest(&double.url, "--herd 300 --duration 1s --connections 64").await;
    assert_eq!(ran.code, 0, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.number("/generator/connections_peak"), 64);
    assert_eq!(ran.number("/offered/skew_us/count"), 300);
    assert_eq!(ran.number("/books/orders"), 100);
}

#[tokio::test]
async fn the_warm_up_is_in_the_books_and_in_no_figure() {
    let double = Double::start(1000, 1, Fault::None).await;
    let ran = loadtest(&double.url, "--rate 200 --duration 1s --warmup 500ms").await;
    assert_eq!(ran.code, 0, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.number("/books/orders"), 300);
    assert_eq!(ran.outcome("accepted"), 200);
    assert_eq!(ran.report["warmup"][0]["requests"], 100);
    assert_eq!(ran.number("/latency_us/count"), 200);
}

#[tokio::test]
async fn people_look_think_pay_and_cancel_and_both_sides_count_the_same() {
    let double = Double::start(1000, 1, Fault::None).await;
    let token = token_file();
    let file = scenario(
        "rate = 100.0\nduration = \"1s\"\n\
         [[persona]]\nkind = \"human\"\nthink = \"10ms..50ms\"\ndecides = \"10ms..50ms\"\npays = 0.5\ncancels = 0.3\n\
         [[persona]]\nkind = \"browser\"\nthink = \"10ms\"\n",
    );
    let args = format!("{} --payments-token-file {}", file.path().display(), token.path().display());
    let ran = loadtest(&double.url, &args).await;
    assert_eq!(ran.code, 0, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.number("/books/payments"), double.calls()["pay"]);
    assert_eq!(ran.number("/books/cancellations"), double.calls()["cancel"]);
    assert!(
        ran.number("/books/payments") > 5 && ran.number("/books/cancellations") > 2,
        "{}",
        ran.report["books"]
    );
    let reads =
        ran.report["outcomes"].as_array().unwrap().iter().find(|o| o["operation"] == "read_sale").unwrap();
    // One read opened the books; the others beside the load's were for the stock.
    let expected = reads["requests"].as_u64().unwrap() + ran.number("/generator/stock_reads") + 1;
    assert_eq!(double.calls()["read_sale"], expected);
}

#[tokio::test]
async fn a_payment_that_is_forgotten_is_named() {
    let double = Double::start(1000, 1, Fault::ForgetsPayments).await;
    let token = token_file();
    let file = scenario(
        "rate = 50.0\nduration = \"1s\"\n[[persona]]\nkind = \"human\"\nthink = \"10ms\"\ndecides = \"10ms\"\npays = 1.0\ncancels = 0.0\n",
    );
    let args = format!("{} --payments-token-file {}", file.path().display(), token.path().display());
    let ran = loadtest(&double.url, &args).await;
    assert_eq!(ran.code, 2, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.violation("payment_lost").0.len(), 19);
}

#[tokio::test]
async fn forged_tokens_buy_nothing_or_are_named() {
    let file = scenario("rate = 200.0\nduration = \"500ms\"\n[[persona]]\nkind = \"forger\"\n");
    let name = file.path().to_str().unwrap();
    let honest = Double::start(1000, 1, Fault::None).await;
    let ran = loadtest(&honest.url, name).await;
    assert_eq!(ran.code, 0, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.outcome("unauthenticated"), 100);
    let trusting = Double::start(1000, 1, Fault::TakesForgedTokens).await;
    let ran = loadtest(&trusting.url, name).await;
    assert_eq!(ran.code, 2, "{}", ran.report);
    assert_eq!(ran.violation("forged_token_accepted").0.len(), 19);
}

#[tokio::test]
async fn an_order_that_nobody_asked_for_is_named() {
    let double = Double::start(1000, 1, Fault::StoresAPhantom).await;
    let ran = loadtest(&double.url, "--rate 200 --duration 500ms --drain-timeout 1s").await;
    assert_eq!(ran.code, 2, "{}", ran.report);
    assert!(ran.violation("order_without_purchase").1.contains("nobody"));
}

#[tokio::test]
async fn stubborn_buyers_ask_again_after_a_final_answer() {
    let double = Double::start(1, 1, Fault::None).await;
    let file =
        scenario("rate = 50.0\nduration = \"500ms\"\n[[persona]]\nkind = \"retry_storm\"\nstubborn = 3\n");
    let ran = loadtest(&double.url, file.path().to_str().unwrap()).await;
    assert_eq!(ran.code, 0, "{}\n{}", ran.report, ran.stderr);
    assert_eq!(ran.outcome("sold_out"), 24 * 4);
}

#[tokio::test]
async fn a_cut_link_shows_as_time_held_and_recovered() {
    let double = Double::start(100_000, 1, Fault::None).await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let file = scenario(&format!(
        "rate = 300.0\nduration = \"4s\"\nthresholds = [\"held < 300ms\"]\n\
         [[link]]\nname = \"wan\"\nlisten = \"127.0.0.1:{port}\"\nto = \"{}\"\n\
         [[at]]\nat = \"1s\"\nfault = \"cut wan\"\n[[at]]\nat = \"1600ms\"\nfault = \"heal wan\"\n",
        &double.url[7..]
    ));
    let args = format!("{} --connections 16", file.path().display());
    let ran = loadtest(&format!("http://127.0.0.1:{port}"), &args).await;
    assert_eq!(ran.code, 1, "{}\n{}", ran.report, ran.stderr);
    let held = ran.number("/events/0/impact/held_ms");
    assert!((400..=700).contains(&held), "{}", ran.report["events"]);
    assert_eq!(ran.number("/books/orders"), 1200);
}

#[tokio::test]
async fn a_longer_run_takes_no_more_memory() {
    let target = blaster::start();
    let mut peaks = Vec::new();
    for seconds in [2, 8] {
        let args = format!("--rate 20000 --duration {seconds}s --buyers 1000 --connections 16 --no-books");
        let ran = loadtest(&target, &args).await;
        assert!(matches!(ran.code, 0 | 3), "{}\n{}", ran.report, ran.stderr);
        peaks.push(ran.number("/generator/peak_rss_bytes"));
    }
    // Three million bytes of records more; the memory may differ by what an allocator rounds up.
    assert!(peaks[1] < peaks[0] + (3 << 20), "{peaks:?}");
}

#[tokio::test]
async fn two_results_add_up_to_one_and_can_be_compared_and_shown() {
    let double = Double::start(1000, 1, Fault::None).await;
    let folder = tempfile::tempdir().unwrap();
    let (one, two, sum) =
        (folder.path().join("1.json"), folder.path().join("2.json"), folder.path().join("sum.json"));
    let args = |file: &std::path::Path, seed: u64| {
        format!("--rate 200 --duration 1s --shared-sale --seed {seed} --json {}", file.display())
    };
    let (first, second) = (args(&one, 1), args(&two, 2));
    let (a, b) = tokio::join!(loadtest(&double.url, &first), loadtest(&double.url, &second));
    assert_eq!((a.code, b.code), (0, 0), "{}\n{}", a.report, b.report);
    let program = async |args: &[&str]| {
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_seckill-loadtest"))
            .args(args)
            .output()
            .await
            .unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let (one, two, sum) = (one.to_str().unwrap(), two.to_str().unwrap(), sum.to_str().unwrap());
    let (html, junit) = (folder.path().join("r.html"), folder.path().join("r.xml"));
    let (code, text) = program(&["merge", one, two, "--json", sum, "--threshold", "accepted == 400"]).await;
    assert_eq!(code, 0, "{text}");
    let merged: serde_json::Value = serde_json::from_slice(&std::fs::read(sum).unwrap()).unwrap();
    assert_eq!(crate::schema::errors(&merged), Vec::<String>::new());
    assert_eq!(merged["latency_us"]["count"], 400);
    assert_eq!(merged["books"]["orders"], 400);
    let max = [&a, &b].map(|ran| ran.number("/latency_us/max")).into_iter().max().unwrap();
    assert_eq!(merged["latency_us"]["max"], max);
    let (code, _) = program(&["merge", one, two, "--threshold", "accepted == 399"]).await;
    assert_eq!(code, 1);
    let (code, text) = program(&["merge", one, one]).await;
    assert_eq!(code, 64, "{text}");
    let (code, text) = program(&["compare", one, two]).await;
    assert!(code == 0 && text.contains("purchase accepted") && text.contains("pass → pass"), "{text}");
    let (html, junit) = (html.to_str().unwrap(), junit.to_str().unwrap());
    let (code, _) = program(&["show", sum, "--html", html, "--junit", junit]).await;
    assert_eq!(code, 0);
    let page = std::fs::read_to_string(html).unwrap();
    assert!(
        page.contains("<svg") && !page.contains("http://www") && !page.contains("<script"),
        "self-contained"
    );
    assert!(std::fs::read_to_string(junit).unwrap().contains("failures=\"0\""));
}
