//! Sessions that end with their process, and keys that are rotated.

use seckill::cross_center::session::Now;
use seckill::cross_center::{CrossKey, Keyring};
use seckill::inventory::PurchaseError;

use super::forger::{Forger, code, send};
use crate::pair::{Pair, center, key, ring};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_session_follows_when_the_other_process_was_replaced() {
    let mut pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    pair.b.buy(&sale, "u0", "k").await.unwrap();
    pair.restart_a("a-second", ring("a")).await;
    pair.b.buy(&sale, "u1", "k").await.unwrap();
    assert_eq!(pair.accepted(&sale).await, 2);
}

/// The three steps of `docs/cross-center.md`, as a lives through them; b signs with its first key all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_key_works_beside_the_old_one_and_a_retired_one_executes_nothing() {
    let mut pair = Pair::open().await;
    let sale = pair.sale("s", 100).await;
    let epoch = pair.a.topology.current().epoch.0;
    let (old, new) = (key("b"), CrossKey { id: "b-2".to_owned(), secret: vec![7; 32], ..key("b") });
    let buys = async |forger: &Forger, uid: &str| {
        let (parts, body) = forger.purchase(&sale, uid, epoch, Now::read().unix_s);
        send(parts, body, forger.at).await
    };
    // Before: the new key opens nothing.
    let early = Forger::with_key(pair.at, &new).await.err();
    assert_eq!(early.as_deref(), Some("key_unknown"));

    // Overlap: both do.
    let both = Keyring::new(center("a"), [key("a"), old.clone(), new.clone()]).unwrap();
    pair.restart_a("a-second", both).await;
    let with_old = Forger::with_key(pair.at, &old).await.unwrap();
    let with_new = Forger::with_key(pair.at, &new).await.unwrap();
    assert_eq!(buys(&with_old, "u0").await.0, 200);
    assert_eq!(buys(&with_new, "u1").await.0, 200);
    pair.b.buy(&sale, "u2", "k").await.unwrap();
    assert_eq!(pair.accepted(&sale).await, 3);

    // Retired: neither a new session nor one that was opened while the key was good.
    pair.restart_a("a-third", Keyring::new(center("a"), [key("a"), new.clone()]).unwrap()).await;
    let late = Forger::with_key(pair.at, &old).await.err();
    assert_eq!(late.as_deref(), Some("key_unknown"));
    let (status, answer) = buys(&with_old, "u3").await;
    assert_eq!((status, &*code(&answer)), (401, "instance_other"));
    let refused = pair.b.buy(&sale, "u4", "k").await;
    assert!(matches!(refused, Err(PurchaseError::MasterUnreachable { .. })), "{refused:?}");
    assert_eq!(pair.accepted(&sale).await, 3, "something was executed under a retired key");
    let with_new = Forger::with_key(pair.at, &new).await.unwrap();
    assert_eq!(buys(&with_new, "u5").await.0, 200);
    assert_eq!(pair.accepted(&sale).await, 4);
}
