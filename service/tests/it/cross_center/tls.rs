//! TLS between centers, with certificates of the test's own. Whoever cannot shake hands executes nothing.

use seckill::cross_center::tls::{Authorities, CallerTls, Identity, ListenerTls};
use seckill::inventory::PurchaseError;
use seckill_ledger::Executed;

use crate::certificates::Authority;
use crate::pair::{Pair, Wire};

/// The certificate that both centers show: they listen on one machine.
fn identity(authority: &Authority, name: &str) -> Identity {
    let (certificate, key) = authority.issue(name);
    Identity::new(Identity::chain(certificate.as_bytes()).unwrap(), key.as_bytes()).unwrap()
}

fn believed(authority: &Authority) -> Authorities {
    Authorities::of_pem(authority.pem().as_bytes()).unwrap()
}

fn listener(authority: &Authority, callers: Option<&Authority>) -> Option<ListenerTls> {
    Some(ListenerTls::new(&identity(authority, "127.0.0.1"), callers.map(believed)).unwrap())
}

/// Buys in b: one unit if it is let in, otherwise nothing.
async fn assert_sells(wire: Wire, let_in: bool, what: &str) -> Pair {
    let pair = Pair::open_over(wire).await;
    let sale = pair.sale("s", 100).await;
    let bought = pair.b.buy(&sale, "u", "k").await;
    match bought {
        Ok(_) => assert!(let_in, "{what}: it was let in"),
        Err(PurchaseError::MasterUnreachable { executed }) => {
            assert!(!let_in, "{what}: it was not let in");
            assert_eq!(executed, Executed::No, "{what}");
        }
        Err(error) => panic!("{what}: {error:?}"),
    }
    assert_eq!(pair.accepted(&sale).await, u64::from(let_in), "{what}");
    pair
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls_a_purchase_reaches_the_master_and_nobody_on_the_way_can_read_it() {
    let ours = Authority::new();
    let caller = CallerTls::new(believed(&ours), None).unwrap();
    let wire =
        Wire { scheme: "https", listener: listener(&ours, None), caller: Some(caller), ..Wire::default() };
    let pair = assert_sells(wire, true, "TLS").await;
    let overheard = pair.line.overheard.lock().unwrap().clone();
    assert_eq!(overheard[..2], [0x16, 0x03], "a handshake comes first");
    let readable = |what: &[u8]| overheard.windows(what.len()).any(|window| window == what);
    assert!(!readable(b"seckill-seq") && !readable(b"sale_id"), "it can be read");
    // Without it, it can.
    let pair = assert_sells(Wire::default(), true, "plain text").await;
    let overheard = pair.line.overheard.lock().unwrap().clone();
    assert!(overheard.windows(7).any(|window| window == b"sale_id"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_does_not_shake_hands_as_they_should_executes_nothing() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let caller = |believes: &Authority, shows: Option<&Authority>| {
        let shown = shows.map(|authority| identity(authority, "127.0.0.1"));
        Some(CallerTls::new(believed(believes), shown).unwrap())
    };
    let https = |listener, caller| Wire { scheme: "https", listener, caller, ..Wire::default() };

    let plain = Wire { listener: listener(&ours, None), caller: caller(&ours, None), ..Wire::default() };
    assert_sells(plain, false, "a call in plain text").await;
    let stranger = https(listener(&theirs, None), caller(&ours, None));
    assert_sells(stranger, false, "a certificate of another authority").await;
    let other = ListenerTls::new(&identity(&ours, "b.example"), None).unwrap();
    assert_sells(https(Some(other), caller(&ours, None)), false, "another name").await;
    assert_sells(https(None, caller(&ours, None)), false, "a listener without TLS").await;
    assert_sells(https(listener(&ours, None), None), false, "a caller without TLS").await;

    // Mutual: callers show a certificate, too.
    let asks = || listener(&ours, Some(&ours));
    assert_sells(https(asks(), caller(&ours, Some(&ours))), true, "a certificate of ours").await;
    assert_sells(https(asks(), caller(&ours, None)), false, "no certificate").await;
    assert_sells(https(asks(), caller(&ours, Some(&theirs))), false, "a stranger's certificate").await;
    // Where nobody asks for it, it does no harm.
    let shown = https(listener(&ours, None), caller(&ours, Some(&ours)));
    assert_sells(shown, true, "a certificate that nobody asked for").await;
}
