//! The start while what a service needs is away, and with what is wrong.

use std::time::{Duration, Instant};

use seckill_parts::Mariadb;
use serde_json::{Value, json};

use crate::centers::{Centers, CentersOptions, Which};
use crate::support::eventually;

/// Several attempts.
const A_WHILE: Duration = Duration::from_secs(4);

/// Waits until a starting center says what it waits for.
async fn until_waiting(centers: &Centers, which: Which, what: &str) -> Value {
    eventually("it says what it waits for", async || {
        let ready = centers.client(which).probe("/readyz").await?;
        assert_eq!(ready.status, 503, "{ready:?}");
        assert_eq!(ready.body["status"], "starting", "{ready:?}");
        ready.body["reason"].as_str().is_some_and(|reason| reason.contains(what)).then_some(ready.body)
    })
    .await
}

/// It lives, waits, refuses what is asked, says so once in its log, and does not end.
async fn assert_waits(centers: &mut Centers, which: Which, what: &str) {
    until_waiting(centers, which, what).await;
    let until = Instant::now() + A_WHILE;
    let client = centers.client(which);
    while Instant::now() < until {
        assert_eq!(client.probe("/livez").await.unwrap().status, 200);
        let answer = client.buy("phone", "early", "k", 1).await.unwrap();
        assert_eq!((answer.status, answer.code()), (503, "no_authority"), "{answer:?}");
        assert_eq!(
            (&answer.body["executed"], &answer.body["retryable"]),
            (&json!("no"), &json!(true)),
            "{answer:?}"
        );
        assert_eq!(centers.ended(which), None, "{}", centers.logs());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let metrics = client.probe("/metrics").await.unwrap();
    assert_eq!(metrics.status, 200, "{metrics:?}");
    assert_eq!(centers.times_logged(which, &format!("waiting for {what}")), 1, "{}", centers.logs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_starts_without_etcd_waits_for_it_and_goes_on() {
    let mut centers = Centers::start(CentersOptions { etcd: true, ..CentersOptions::default() }).await;
    centers.client(Which::A).create_sale("phone", 10, json!({})).await;
    centers.kill_service(Which::A);
    centers.etcd.as_ref().unwrap().kill();
    centers.spawn(Which::A);
    assert_waits(&mut centers, Which::A, "the topology").await;
    // Another center hears at once that nothing happens there.
    let answer = centers.client(Which::B).buy("phone", "u", "k", 1).await.unwrap();
    assert_eq!((answer.status, &answer.body["executed"]), (503, &json!("no")), "{answer:?}");

    centers.etcd.as_ref().unwrap().restart().await.unwrap();
    centers.until_serving(Which::A).await;
    for which in [Which::A, Which::B] {
        let uid = format!("u-{}", which.id());
        assert_eq!(centers.client(which).buy_until_known("phone", &uid, "k").await.status, 202);
    }
    assert_eq!(centers.times_logged(Which::A, "the start goes on"), 1, "{}", centers.logs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_starts_without_its_topologys_folder_waits_for_it_and_ends_when_it_is_told_to() {
    let mut centers = Centers::start(CentersOptions::default()).await;
    centers.kill_service(Which::B);
    let file = centers.folder().join("away/topology.json");
    let away = [("SECKILL__TOPOLOGY__PATH", file.to_str().unwrap())];
    centers.spawn_with(Which::B, &away);
    assert_waits(&mut centers, Which::B, "the topology").await;
    let asked = Instant::now();
    assert_eq!(centers.terminate(Which::B).await, Some(0), "{}", centers.logs());
    println!("it ended {:?} after SIGTERM", asked.elapsed());

    centers.spawn_with(Which::B, &away);
    until_waiting(&centers, Which::B, "the topology").await;
    std::fs::create_dir(file.parent().unwrap()).unwrap();
    std::fs::copy(centers.folder().join("topology.json"), &file).unwrap();
    centers.until_serving(Which::B).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_starts_without_its_order_database_waits_for_it_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mariadb = Mariadb::start(dir.path()).await.unwrap();
    let databases = vec![(Which::B, mariadb.create_database("seckill_b").await.unwrap())];
    let mut centers = Centers::start(CentersOptions { databases, ..CentersOptions::default() }).await;
    centers.kill_service(Which::B);
    mariadb.kill();
    centers.spawn(Which::B);
    assert_waits(&mut centers, Which::B, "the order database").await;
    mariadb.restart().await.unwrap();
    centers.until_serving(Which::B).await;
}

/// Something in the environment, and what the log says of it.
type Wrong<'a> = (&'a [(&'a str, String)], &'a [&'a str]);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_has_to_correct_ends_the_start_at_once_and_says_what() {
    let mut centers = Centers::start(CentersOptions::default()).await;
    centers.kill_service(Which::B);
    let folder = centers.folder().to_owned();
    let path = |name: &str| folder.join(name).display().to_string();
    std::fs::write(folder.join("torn.json"), "{\"schema\": 1").unwrap();
    std::fs::write(folder.join("cert.pem"), "no certificate").unwrap();
    let wrong: [Wrong; 5] = [
        (&[("SECKILL__TOPOLOGY__PATH", path("torn.json"))], &["torn.json", "cannot be used"]),
        (
            &[("SECKILL__CROSS_CENTER__KEYS__0__SECRET_FILE", path("none.key"))],
            &["cross_center.keys[0]", "none.key"],
        ),
        (
            &[("SECKILL__CROSS_CENTER__TLS__CA_FILE", path("cert.pem"))],
            &["cross_center.tls.ca_file", "holds no certificate"],
        ),
        (
            &[("SECKILL__LISTEN__INTERNAL_URL", "https://b.example:1".to_owned())],
            &["listen.internal_url", "cert_file"],
        ),
        // a's database.
        (
            &[("SECKILL__ORDERS__DATABASE_URL", format!("sqlite:{}", path("a/orders.db")))],
            &["belongs to center a", "give each center its own"],
        ),
    ];
    for (variables, texts) in wrong {
        let variables: Vec<(&str, &str)> =
            variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let begun = Instant::now();
        centers.spawn_with(Which::B, &variables);
        let status = eventually("it ends", async || centers.ended(Which::B)).await;
        assert_eq!(status.code(), Some(1), "{variables:?}\n{}", centers.logs());
        println!("{texts:?} ended the start after {:?}", begun.elapsed());
        for text in texts {
            eventually("it says what is wrong", async || centers.logged(Which::B, text).then_some(())).await;
        }
    }
    // As it was, it starts.
    centers.spawn(Which::B);
    centers.until_serving(Which::B).await;
}
