//! Two centers: in one process tree, `seckill up --centers a,b`, and each by itself with 30 ms in between.

mod asleep;
mod behind;
mod course;
mod deaths;
mod faults;
mod load;
mod lost;
mod shard_deaths;
mod shards;
mod shift;
mod shift_refused;
mod trouble;

use http::Method;
use serde_json::Value;

use crate::client::Client;
use crate::support::eventually;
use crate::up::Up;

/// Center a's admin listener shows the topology.
async fn topology(client: &Client) -> Value {
    client.admin(Method::GET, "/admin/v1/topology", &[], None).await.body
}

/// Waits until b's Redis has everything that is acknowledged.
async fn until_in_sync(client: &Client, after_epoch: u64) -> Value {
    eventually("b is in sync", async || {
        let topology = topology(client).await;
        let steady = topology["state"] == "steady" && topology["in_sync"][0]["center"] == "b";
        (steady && topology["epoch"].as_u64()? > after_epoch).then_some(topology)
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_centers_come_up_with_half_of_the_shards_each_and_show_the_same_sale() {
    let up = Up::start_centers("a,b");
    let (a, b) = (up.client(), up.client_of(2));
    let seen = until_in_sync(&a, 0).await;
    let owners: Vec<&str> =
        seen["shard_owners"].as_array().unwrap().iter().map(|owner| owner.as_str().unwrap()).collect();
    assert_eq!((&owners[..32], &owners[32..]), (&["a"; 32][..], &["b"; 32][..]));
    assert_eq!((&seen["master"], &seen["durability"]), (&"a".into(), &"replicated".into()));
    assert_eq!(topology(&b).await["centers"], seen["centers"]);
    for place in ["center a", "center b"] {
        assert!(up.log().contains(place), "{}", up.log());
    }

    a.create_sale("phone", 5, serde_json::json!({})).await;
    let answer = a.buy_until_known("phone", "alice", "k").await;
    assert_eq!(answer.status, 202, "{answer:?}");
    eventually("b shows what is left", async || (b.remaining("phone").await == 4).then_some(())).await;

    let ready = b.admin(Method::GET, "/readyz", &[], None).await;
    assert_eq!(ready.status, 200);
    assert_eq!(ready.body["replication"]["role"], "attached", "{}", ready.body);
    assert_eq!(
        (&ready.body["degraded"], &ready.body["authority"]["cause"]),
        (&false.into(), &"not_master".into())
    );
    let (code, out, err) = up.cli(&["master", "show", "-o", "json"]);
    assert_eq!(code, 0, "{err}");
    let shown: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&shown["state"], &shown["in_sync"][0]["center"]), (&"steady".into(), &"b".into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_kill_of_the_whole_tree_or_of_either_redis_the_two_find_together_again() {
    let mut up = Up::start_centers("a,b");
    let a = up.client();
    let first = until_in_sync(&a, 0).await["epoch"].as_u64().unwrap();
    a.create_sale("phone", 5, serde_json::json!({})).await;
    assert_eq!(a.buy_until_known("phone", "alice", "k1").await.status, 202);

    up.kill_redis_of(2);
    let second = until_in_sync(&a, first).await["epoch"].as_u64().unwrap();
    up.kill_redis();
    let third = until_in_sync(&a, second).await["epoch"].as_u64().unwrap();
    assert_eq!(a.buy_until_known("phone", "bob", "k2").await.status, 202);

    up.kill();
    up.restart();
    let a = up.client();
    until_in_sync(&a, third).await;
    let again = a.buy_until_known("phone", "alice", "k1").await;
    assert_eq!(again.headers.get("idempotent-replayed").unwrap(), "true", "{again:?}");
    eventually("both sold", async || (a.remaining("phone").await == 3).then_some(())).await;
    assert_eq!(up.terminate(), Some(0), "{}", up.log());
    assert!(up.redis_pid_of(1).is_none() && up.redis_pid_of(2).is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_of_one_center_grows_into_two_and_all_stay_at_home_where_they_are() {
    let mut up = Up::start();
    up.client().create_sale("phone", 5, serde_json::json!({})).await;
    let order = up.client().buy_until_known("phone", "alice", "k").await.body["order_id"].clone();
    assert_eq!(up.terminate(), Some(0), "{}", up.log());

    up.centers("a,b");
    up.restart();
    let a = up.client();
    let seen = until_in_sync(&a, 0).await;
    assert!(seen["shard_owners"].as_array().unwrap().iter().all(|owner| owner == "a"));
    let replay = a.buy_until_known("phone", "alice", "k").await;
    assert_eq!(replay.body["order_id"], order);
    assert_eq!(up.terminate(), Some(0), "{}", up.log());

    // And the master of two goes on alone.
    up.centers("a");
    up.restart();
    let a = up.client();
    assert_eq!(a.buy_until_known("phone", "bob", "k").await.status, 202);
    assert_eq!(topology(&a).await["state"], "degraded");
}

#[test]
fn centers_that_are_no_list_of_names_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut up = Up::at(dir.path(), crate::up::free_base_port());
    up.centers("a,a");
    up.spawn(&[]);
    assert_eq!(up.wait_exit(), Some(1));
    assert!(up.log().contains("--centers"), "{}", up.log());
}
