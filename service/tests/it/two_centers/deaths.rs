//! The service that runs a planned shift dies at each of its steps, and whoever takes it over dies, too, while people
//! buy in both centers.

use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use seckill_parts::LinkState;
use serde_json::{Value, json};

use super::course::{Asked, Witness, arm, shift_until};
use crate::centers::{BOTH, Centers, CentersOptions, Which};
use crate::crowd::{Crowd, ask_again, compare_books};
use crate::support::eventually;

/// More than anybody buys in these tests.
const PLENTY: u64 = 1_000_000;
/// Shoppers at a time.
const WIDTH: usize = 8;
/// How long after the last death a freeze may last on a busy machine. Somebody takes it over after 2 s.
const FREEZE_ENDS: Duration = Duration::from_secs(20);

/// How a shift ends whose coordinator died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    /// As if nothing had been asked for.
    Aborted,
    /// The master has moved.
    Done,
    /// It has moved when the coordinator dies; 20 s later another service verifies that, or says that the next shift
    /// came before it could.
    VerifiedLater,
}

/// Deaths in one shift, one after the other. Each shift goes from where the master is to the other center.
///
/// Those that leave a shift unverified come first: nobody has to wait for what becomes of them. So does what moves the
/// master, because a shift that was given up does not count as one that followed.
const MOVES: [(&[&str], Ends); 8] = [
    (&["concluded"], Ends::Done),
    (&["attached"], Ends::VerifiedLater),
    (&["thawed"], Ends::VerifiedLater),
    (&["verified"], Ends::VerifiedLater),
    (&["decided"], Ends::Done),
    (&["promoted"], Ends::Done),
    (&["redirecting"], Ends::Done),
    (&["decided", HELD_AGAIN], Ends::Done),
];
/// The first of them is verified while the others are given up.
const STAYS: [(&[&str], Ends); 5] = [
    (&["redirected"], Ends::VerifiedLater),
    (&[STAYS_AWAY], Ends::Aborted),
    (&["fenced"], Ends::Aborted),
    (&["caught_up", "taken_over", "giving_up"], Ends::Aborted),
    (&["caught_up", "given_up"], Ends::Aborted),
];
/// Whoever takes over comes here only where the old master answers within 300 ms: not always, on a busy machine.
const HELD_AGAIN: &str = "held_again";
/// Who dies here is not restarted before the command has told the end: the answer to its request may be lost.
const STAYS_AWAY: &str = "recorded";

/// What goes on all the while.
struct Place {
    centers: Centers,
    crowd: Crowd,
    master: Which,
    /// Commands that wait for the verification.
    later: Vec<(String, Asked)>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_whichever_step_the_coordinator_dies_the_freeze_ends_and_all_say_the_same() {
    let centers = Centers::start(CentersOptions { etcd: true, ..CentersOptions::default() }).await;
    centers.client(Which::A).create_sale("phone", PLENTY, json!({})).await;
    let crowd = Crowd::start(&centers, "phone", "u", WIDTH, PLENTY);
    let witness = Witness::start(&centers);
    crowd.until_more(50).await;

    let mut place = Place { centers, crowd, master: Which::A, later: Vec::new() };
    for (number, (places, ends)) in MOVES.into_iter().enumerate() {
        // Half of them are asked of the service that dies.
        let asked = if number % 2 == 0 { place.master } else { place.master.other() };
        place.dies(asked, places, ends).await;
    }
    place.dies_attached_and_not_redirected().await;
    for (places, ends) in STAYS {
        place.dies(place.master.other(), places, ends).await;
    }

    let Place { centers, crowd, master, later } = place;
    for (reason, command) in later {
        let (code, answer) = command.answered().await;
        println!("{reason}: {}", answer["shift"]["message"]);
        assert_eq!((code, &answer["outcome"]), (0, &json!("done")), "{reason}: {answer:#}");
        assert_eq!(answer["shift"]["coordinator"]["term"], 1, "{reason}: {answer:#}");
    }
    let heard = crowd.stop().await;
    println!("{} bought; asked again: {:?}", heard.bought.len(), heard.again);
    assert_eq!(compare_books(&centers, master, "phone", &heard.bought).await, heard.bought.len() as u64);
    for which in BOTH {
        ask_again(&centers.client(which), "phone", &heard.bought[..50]).await;
    }
    // Neither of the two is left as a coordinator held it up.
    for which in BOTH {
        let mut ledger = centers.ledger(which).await;
        let period = seckill_ledger::handover::ping_period(&mut ledger).await;
        assert_eq!(period, Some(10), "the Redis of center {} pings nobody", which.id());
    }
    let told = witness.assert_truthful(&[]).await;
    let count = |ends: &str| told.values().filter(|told| *told == ends).count();
    assert_eq!((count("done"), count("aborted")), (MOVES.len() + 2, STAYS.len() - 1), "{told:?}");
}

impl Place {
    /// Asks for a shift to the other center; its coordinator dies in the first of these places, who takes it over in
    /// the second, and so on.
    async fn dies(&mut self, asked: Which, places: &[&str], ends: Ends) {
        let Place { centers, crowd, master, later } = self;
        let to = master.other();
        let reason = places.join(", ");
        arm(centers, places[0], "kill");
        let command = Asked::for_master(centers, asked, to, &["--reason", &reason]);
        let (mut died, mut away) = (Instant::now(), None);
        for (place, next) in places.iter().zip(places[1..].iter().map(Some).chain([None])) {
            let Some(dead) = until_dead(centers, place).await else { break };
            died = Instant::now();
            if let Some(next) = next {
                arm(centers, next, "kill");
            }
            match *place == STAYS_AWAY {
                true => away = Some(dead),
                false => centers.spawn(dead),
            }
        }
        if ends != Ends::Aborted {
            *master = to;
        }
        let expected = match ends {
            Ends::Done => Some((0, "done")),
            Ends::Aborted => Some((3, "aborted")),
            Ends::VerifiedLater => None,
        };
        match expected {
            Some(expected) => {
                let (code, answer) = command.answered().await;
                let took = died.elapsed();
                println!("{reason}: told {took:?} after the last death");
                let told = (code, answer["outcome"].as_str().unwrap());
                assert_eq!(told, expected, "{reason}: {answer:#}\n{}", centers.logs());
                assert!(took < FREEZE_ENDS, "{reason}: {took:?}");
                let terms = answer["shift"]["coordinator"]["term"].as_u64();
                assert!(reason == "concluded" || terms >= Some(1), "nobody took {reason} over: {answer:#}");
            }
            None => later.push((reason, command)),
        }
        if let Some(away) = away {
            centers.spawn(away);
        }
        until_all_agree(centers, *master).await;
        crowd.until_more(20).await;
    }

    /// It dies when the old master follows already, and the topology does not say so yet.
    async fn dies_attached_and_not_redirected(&mut self) {
        let Place { centers, crowd, master, .. } = self;
        let (from, to) = (*master, master.other());
        let command = shift_until(centers, from, to, "promoted").await;
        centers.to_etcd(to).set(LinkState::Cut);
        arm(centers, "attached", "kill");
        centers.pause_service(to, false);
        assert_eq!(until_dead(centers, "attached").await, Some(to));
        let mut ledger = centers.ledger(from).await;
        let role: redis::Value = redis::cmd("ROLE").query_async(&mut ledger).await.unwrap();
        assert!(format!("{role:?}").contains("slave"), "{role:?}");
        centers.to_etcd(to).set(LinkState::Healthy);
        centers.spawn(to);
        let (code, answer) = command.answered().await;
        assert_eq!((code, &answer["outcome"]), (0, &json!("done")), "{answer:#}\n{}", centers.logs());
        // Somebody else has redirected it.
        assert!(answer["shift"]["coordinator"]["term"].as_u64() >= Some(1), "{answer:#}");
        *master = to;
        until_all_agree(centers, to).await;
        crowd.until_more(20).await;
    }
}

/// Waits until a center's service has died at a place. `None` if nobody came there and all is over; that is right for
/// [`HELD_AGAIN`] alone.
pub(super) async fn until_dead(centers: &mut Centers, place: &str) -> Option<Which> {
    let dead = eventually(&format!("somebody dies at {place}"), async || {
        for which in BOTH {
            if let Some(status) = centers.ended(which) {
                assert_eq!(status.signal(), Some(9), "{place}: {status}");
                return Some(Some(which));
            }
        }
        let over = place == HELD_AGAIN && is_over(centers).await;
        over.then_some(None)
    })
    .await;
    if dead.is_none() {
        println!("nobody came to {place}");
        // Nor may anybody from here on.
        let _ = std::fs::remove_file(centers.fail_point());
    }
    dead
}

/// Whether no shift is recorded, as a center says that answers.
async fn is_over(centers: &Centers) -> bool {
    for which in BOTH {
        let answer = centers.client(which).look("/admin/v1/topology").await;
        if let Some(answer) = answer.filter(|answer| answer.status == 200) {
            return answer.body["shift"].is_null();
        }
    }
    false
}

/// Waits until both centers serve, and both say that this one is the master.
pub(super) async fn until_all_agree(centers: &mut Centers, master: Which) {
    for which in BOTH {
        centers.until_serving(which).await;
    }
    let seen = centers.until_master(master).await;
    let said = |topology: &Value| (topology["master"].clone(), topology["epoch"].as_u64());
    eventually("both say the same", async || {
        let [a, b] = [centers.topology(Which::A).await, centers.topology(Which::B).await];
        (said(&a) == said(&b) && said(&a).0 == seen["master"]).then_some(())
    })
    .await;
}
