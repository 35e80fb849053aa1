//! The service that runs a shift of shards dies at each of its steps, and whoever takes it over dies, too, while people buy
//! and pay in both centers.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::course::{Asked, Witness, arm};
use super::deaths::{until_all_agree, until_dead};
use super::shards::{Databases, PRICE, Payers, compare, owners};
use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::Crowd;
use crate::support::eventually;

/// More than anybody buys in this test.
const PLENTY: u64 = 1_000_000;
/// How long a shift may take here until it is decided, ms. Somebody takes it over after half as much again.
const SHARD_SHIFT_MS: u64 = 2500;
/// How long after the last death payments may wait on a busy machine.
const FREEZE_ENDS: Duration = Duration::from_secs(20);

/// What becomes of one that died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It is started again at once.
    Back,
    /// It is away until the command has told the end: the other center's service ends the shift alone.
    Away,
    /// The same, and an operator does not wait for that, but gives the shift up.
    Aborted,
}

/// Deaths in one shift, one after the other, and whether it happens all the same.
const SHIFTS: [(&[&str], Then, bool); 7] = [
    (&["blocked"], Then::Aborted, false),
    (&["fenced", "giving_up"], Then::Back, false),
    (&["replicated", "given_up"], Then::Back, false),
    // From a to b; those before have changed nothing.
    (&["decided"], Then::Away, true),
    (&["handed_over"], Then::Back, true),
    (&["unblocked"], Then::Back, true),
    (&["concluded"], Then::Back, true),
];

/// What goes on all the while.
struct Place {
    databases: Databases,
    centers: Centers,
    crowd: Crowd,
    payers: Payers,
    /// Where the shards are that are at home in a at first.
    home: Which,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_whichever_step_the_coordinator_dies_the_shards_have_one_owner_and_payments_go_on() {
    let databases = Databases::start().await;
    let shift_ms = BOTH.map(|which| (which, format!("[orders]\nshard_shift_ms = {SHARD_SHIFT_MS}\n")));
    let options = CentersOptions { etcd: true, more: shift_ms.into(), ..databases.options() };
    let centers = Centers::start(options).await;
    centers.client(Which::A).create_sale("phone", PLENTY, json!({ "price": PRICE })).await;
    let crowd = Crowd::start(&centers, "phone", "u", 6, PLENTY);
    let payers = Payers::start(&centers, "phone", 4);
    let witness = Witness::start(&centers);
    crowd.until_more(50).await;
    payers.until_more(10).await;

    let mut place = Place { databases, centers, crowd, payers, home: Which::A };
    for (number, (places, then, happens)) in SHIFTS.into_iter().enumerate() {
        // Half of them are asked of the service that dies.
        let asked = if number % 2 == 0 { place.home } else { place.home.other() };
        place.dies(asked, places, then, happens).await;
    }

    let Place { databases, centers, crowd, payers, .. } = place;
    let (heard, paid) = (crowd.stop().await, payers.stop().await);
    println!(
        "{} bought ({:?} asked again), {} paid ({:?} asked again, the longest took {:?})",
        heard.bought.len(),
        heard.again,
        paid.bought.len(),
        paid.again,
        paid.longest
    );
    compare(&centers, &heard.bought, &paid.bought).await;
    for which in 0..2 {
        let booked = "SELECT COUNT(*) FROM payments WHERE outcome = 'paid'";
        assert_eq!(databases.number(which, booked).await, paid.bought.len() as i64);
        assert_eq!(databases.number(which, "SELECT COUNT(*) FROM refunds").await, 0);
    }
    let told = witness.assert_truthful(&[]).await;
    let count = |ends: &str| told.values().filter(|told| *told == ends).count();
    let happened = SHIFTS.iter().filter(|(_, _, happens)| *happens).count();
    assert_eq!((count("done"), count("aborted")), (happened, SHIFTS.len() - happened), "{told:?}");
}

impl Place {
    /// Asks for the shards to go to the other center. The coordinator dies in the first of these places, who takes the
    /// shift over in the second.
    async fn dies(&mut self, asked: Which, places: &[&str], then: Then, happens: bool) {
        let Place { centers, home, .. } = self;
        let to = home.other();
        let reason = places.join(", ");
        arm(centers, places[0], "kill");
        let args = ["shards", "shift", "--shards", "0-31", "--to", to.id(), "--yes", "-o", "json"];
        let command = Asked::start(centers, asked, &[&args[..], &["--reason", &reason]].concat());
        let (mut died, mut away) = (Instant::now(), None);
        for (place, next) in places.iter().zip(places[1..].iter().map(Some).chain([None])) {
            let dead = until_dead(centers, place).await.expect("somebody dies there");
            died = Instant::now();
            if let Some(next) = next {
                arm(centers, next, "kill");
            }
            match then {
                Then::Back => centers.spawn(dead),
                Then::Away | Then::Aborted => away = Some(dead),
            }
        }
        if then == Then::Aborted {
            let topology = centers.topology(*home).await;
            let id = topology["shift"]["id"].as_str().unwrap_or_else(|| panic!("{topology:#}"));
            let (code, out, err) = centers.command(*home, &["shift", "abort", id]);
            println!("{out}");
            assert_eq!(code, 0, "{out}\n{err}");
        }
        if happens {
            *home = to;
        }
        let (code, answer) = command.answered().await;
        let took = died.elapsed();
        let steps: Vec<(&str, &str)> = answer["shift"]["steps"]
            .as_array()
            .unwrap()
            .iter()
            .map(|step| (step["name"].as_str().unwrap(), step["state"].as_str().unwrap()))
            .collect();
        let message = answer["shift"]["message"].as_str().unwrap();
        println!("{reason}: told {took:?} after the last death; {message}");
        let expected = if happens { (0, "done") } else { (3, "aborted") };
        let told = (code, answer["outcome"].as_str().unwrap());
        assert_eq!(told, expected, "{reason}: {answer:#}\n{}", centers.logs());
        assert!(took < FREEZE_ENDS, "{reason}: {took:?}");
        // Whatever was begun is over, and nothing was done twice.
        let expected = ["precheck", "block", "drain", "fence", "replicate", "hand_over", "unblock", "verify"];
        let expected = if happens { &expected[..] } else { &expected[..1] };
        assert_eq!(steps, expected.iter().map(|name| (*name, "done")).collect::<Vec<_>>(), "{answer:#}");
        let terms = answer["shift"]["coordinator"]["term"].as_u64();
        assert!(reason == "concluded" || terms >= Some(1), "nobody took {reason} over: {answer:#}");
        // Nobody claims that a database took them whose center was away.
        let unseen = message.contains("takes them as soon as a service of center b runs");
        assert!(unseen || then != Then::Away, "{answer:#}");
        if let Some(away) = away {
            centers.spawn(away);
        }
        until_all_agree(centers, Which::A).await;
        self.until_at_home().await;
        let Place { crowd, payers, .. } = self;
        crowd.until_more(20).await;
        payers.until_more(10).await;
    }

    /// Waits until both centers and both databases say whose the shards are, and nobody's payments are refused.
    async fn until_at_home(&self) {
        let Place { databases, centers, home, .. } = self;
        let given = |topology: &Value| {
            let there = owners(topology)[..32].iter().all(|owner| owner == home.id());
            there && topology["blocked_shards"] == json!([]) && topology["shift"].is_null()
        };
        let sql = format!("SELECT COUNT(*) FROM shard_owner WHERE shard < 32 AND owner = '{}'", home.id());
        for which in BOTH {
            eventually("both say the same of the shards", async || {
                given(&centers.topology(which).await).then_some(())
            })
            .await;
            eventually("both databases say the same of the shards", async || {
                (databases.number(usize::from(which.number() - 1), &sql).await == 32).then_some(())
            })
            .await;
        }
    }
}
