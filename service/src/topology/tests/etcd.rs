//! What etcd alone can do to a store: restarts, compaction, lost connections and answers, strangers.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Client, CompactionOptions, Permission, PermissionType};
use futures_util::StreamExt;
use seckill_domain::{CenterId, Epoch};
use seckill_parts::{Etcd, Link, LinkState};
use tempfile::TempDir;

use super::super::*;
use super::stores::{PATIENCE, Running};
use super::{document, eventually};

/// A store's options with timeouts that let a test be short.
pub(super) fn options(endpoint: String, prefix: &str) -> EtcdOptions {
    EtcdOptions {
        endpoints: vec![endpoint],
        prefix: prefix.to_owned(),
        user: None,
        ca_pem: None,
        identity_pem: None,
        request_timeout: Duration::from_millis(2000),
        connect_timeout: Duration::from_millis(1000),
        confirm_interval: Duration::from_millis(100),
    }
}

struct World {
    _dir: TempDir,
    etcd: Etcd,
    link: Link,
}

impl World {
    async fn start() -> World {
        let dir = tempfile::tempdir().unwrap();
        let etcd = Etcd::start(dir.path()).await.unwrap();
        let link = Link::start(etcd.address()).unwrap();
        World { _dir: dir, etcd, link }
    }

    /// A store that nothing stands between.
    fn near(&self) -> EtcdStore {
        EtcdStore::new(options(self.etcd.endpoint(), "/seckill"))
    }

    /// A store beyond the link.
    fn far(&self, request_timeout: Duration) -> EtcdStore {
        let endpoint = format!("http://{}", self.link.address());
        EtcdStore::new(EtcdOptions { request_timeout, ..options(endpoint, "/seckill") })
    }
}

async fn next_epoch(store: &dyn TopologyStore) -> Revision {
    let found = store.load().await.unwrap();
    let mut next = Topology::clone(&found.topology);
    next.epoch = next.epoch.next();
    store.compare_and_set(Some(found.revision), &next).await.unwrap()
}

struct Service {
    authority: Authority,
    handle: TopologyHandle,
    _running: Running,
}

impl Service {
    async fn start(store: EtcdStore, lease: Duration) -> Service {
        let authority = Authority::new(CenterId::new("a").unwrap(), lease, 1);
        let handle = TopologyHandle::open_or_create(store, authority.clone(), document()).await.unwrap();
        let running = Running::default();
        handle.spawn(&running.tracker, running.token.clone());
        authority.admit(0, handle.current().fence(), "run", 0);
        Service { authority, handle, _running: running }
    }

    async fn until_it_stops_selling(&self) {
        eventually("authority lapses", || {
            self.authority.grant().is_err_and(|refusal| refusal.cause == Cause::LeaseExpired)
        })
        .await;
    }

    async fn until_it_sells(&self) {
        eventually("authority comes back", || self.authority.grant().is_ok()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_down_for_longer_than_the_lease_stops_sales_and_its_return_starts_them_again() {
    let world = World::start().await;
    let service = Service::start(world.near(), Duration::from_secs(2)).await;
    service.until_it_sells().await;
    world.etcd.kill();
    service.until_it_stops_selling().await;
    // What was known is still there to be read.
    assert_eq!(service.handle.current().master.as_str(), "a");
    let refused = service
        .handle
        .update(|topology| {
            topology.limits.per_user = None;
            Ok::<_, ()>(())
        })
        .await;
    assert!(matches!(refused, Err(UpdateError::Store(StoreError::Unavailable { .. }))), "{refused:?}");
    world.etcd.restart().await.unwrap();
    service.until_it_sells().await;
    // The watch is there again, too.
    let mut changes = service.handle.subscribe();
    next_epoch(&world.near()).await;
    tokio::time::timeout(PATIENCE, changes.changed()).await.unwrap().unwrap();
    assert_eq!(changes.borrow().epoch, Epoch(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_hangs_confirms_nothing() {
    let world = World::start().await;
    let service = Service::start(world.near(), Duration::from_secs(2)).await;
    service.until_it_sells().await;
    world.etcd.pause();
    service.until_it_stops_selling().await;
    world.etcd.resume();
    service.until_it_sells().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happened_while_the_connection_was_lost_is_seen_when_it_is_back() {
    let world = World::start().await;
    let service = Service::start(world.far(Duration::from_secs(1)), Duration::from_secs(30)).await;
    for state in [LinkState::Cut, LinkState::Stalled] {
        let before = service.handle.current().epoch;
        world.link.set(state);
        next_epoch(&world.near()).await;
        next_epoch(&world.near()).await;
        assert_eq!(service.handle.current().epoch, before, "{state:?}");
        world.link.heal();
        eventually("the changes arrive", || service.handle.current().epoch == Epoch(before.0 + 2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_was_left_behind_by_a_compaction_lists_again_and_goes_on() {
    let world = World::start().await;
    let store = world.near();
    let first = store.compare_and_set(None, &document()).await.unwrap();
    next_epoch(&store).await;
    let latest = next_epoch(&store).await;
    let mut client = Client::connect([world.etcd.endpoint()], None).await.unwrap();
    // Past the document's own last change, too: other keys move the store on.
    for n in 0..3 {
        client.put("/elsewhere", format!("{n}"), None).await.unwrap();
    }
    let now = client.get("/elsewhere", None).await.unwrap().header().unwrap().revision();
    client.compact(now, Some(CompactionOptions::new().with_physical())).await.unwrap();
    for (after, behind) in [(first, true), (latest, false)] {
        let mut changes = store.watch(after);
        if behind {
            let told = tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap().unwrap();
            assert_eq!(told.revision, latest);
            continue;
        }
        let (told, written) = tokio::join!(
            async { tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap().unwrap() },
            next_epoch(&store)
        );
        assert_eq!(told.revision, written);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_whose_answer_was_lost_is_looked_up_and_happens_once() {
    let world = World::start().await;
    let near = world.near();
    let first = TopologyStore::compare_and_set(&near, None, &document()).await.unwrap();
    const PATIENT: Duration = Duration::from_millis(1500);
    let far = world.far(PATIENT);
    far.load().await.unwrap();
    let mut next = document();
    next.ledger_id = near.load().await.unwrap().topology.ledger_id.clone();
    next.epoch = Epoch(7);
    world.link.set(LinkState::StalledToClient);
    let asked = Instant::now();
    let change = tokio::spawn(async move { far.compare_and_set(Some(first), &next).await });
    // It has happened, only the answer is missing; others go on from there.
    let mut changes = near.watch(first);
    let told = tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(told.topology.epoch, Epoch(7));
    next_epoch(&near).await;
    // The answer comes when nobody waits for it any more: only the key's history tells.
    tokio::time::sleep_until((asked + PATIENT + PATIENT / 3).into()).await;
    world.link.heal();
    assert_eq!(change.await.unwrap(), Ok(told.revision));
    assert_eq!(near.load().await.unwrap().topology.epoch, Epoch(8));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_without_any_answer_is_unknown_and_one_that_lost_is_a_conflict() {
    let world = World::start().await;
    let near = world.near();
    let first = TopologyStore::compare_and_set(&near, None, &document()).await.unwrap();
    let far = world.far(Duration::from_millis(300));
    far.load().await.unwrap();
    let mut next = Topology::clone(&near.load().await.unwrap().topology);
    next.epoch = Epoch(5);
    world.link.stall();
    let outcome = far.compare_and_set(Some(first), &next).await;
    assert!(matches!(outcome, Err(StoreError::Unknown { .. })), "{outcome:?}");
    world.link.heal();
    // Whatever became of it: a change to an old revision now fails for good.
    let mut other = next.clone();
    other.epoch = Epoch(6);
    let found = near.load().await.unwrap().revision;
    let latest = near.compare_and_set(Some(found), &other).await;
    let latest = match latest {
        Ok(latest) => latest,
        // The delayed change came first.
        Err(StoreError::Conflict { found: Some(found) }) => {
            near.compare_and_set(Some(found), &other).await.unwrap()
        }
        Err(error) => panic!("{error}"),
    };
    let far = world.far(Duration::from_secs(2));
    assert_eq!(
        far.compare_and_set(Some(first), &next).await,
        Err(StoreError::Conflict { found: Some(latest) })
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_dies_is_off_the_list_when_its_lease_runs_out() {
    let world = World::start().await;
    let (watching, dying) = (Running::default(), Running::default());
    let watcher = Instances::start(Arc::new(world.near()), None, &watching.tracker, watching.token.clone());
    let url = || "http://127.0.0.1:1".to_owned();
    let me = Instance::new(CenterId::new("a").unwrap(), url(), url(), url());
    let store = Arc::new(world.far(Duration::from_secs(1)));
    let _dying = Instances::start(store, Some(me), &dying.tracker, dying.token.clone());
    let mut list = watcher.subscribe();
    tokio::time::timeout(PATIENCE, list.wait_for(|list| list.len() == 1)).await.unwrap().unwrap();
    world.link.cut();
    tokio::time::timeout(PATIENCE * 2, list.wait_for(|list| list.is_empty())).await.unwrap().unwrap();
    world.link.heal();
    tokio::time::timeout(PATIENCE * 2, list.wait_for(|list| list.len() == 1)).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_restored_from_a_backup_confirms_nothing() {
    let (old, new) = (World::start().await, World::start().await);
    let store = old.far(Duration::from_secs(1));
    let service = Service::start(store, Duration::from_secs(2)).await;
    service.until_it_sells().await;
    next_epoch(&old.near()).await;
    eventually("the change is seen", || service.handle.current().epoch == Epoch(1)).await;
    service.authority.admit(0, service.handle.current().fence(), "run", 0);
    service.until_it_sells().await;
    let restored = document();
    TopologyStore::compare_and_set(&new.near(), None, &restored).await.unwrap();
    old.link.set_target(new.etcd.address());
    old.etcd.kill();
    eventually("the reason is said", || {
        service.authority.status().is_err_and(|refusal| refusal.reason.contains("restored from a backup"))
    })
    .await;
    assert_eq!(service.handle.current().epoch, Epoch(1));
}

/// An etcd that speaks TLS, asks for client certificates, and wants a password.
struct Guarded {
    child: Child,
    endpoint: String,
    dir: TempDir,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn openssl(dir: &Path, args: &str) {
    let output = Command::new("openssl").args(args.split_whitespace()).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "openssl {args}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Guarded {
    async fn start() -> Guarded {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        std::fs::write(
            at.join("ext"),
            "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n",
        )
        .unwrap();
        let key = "ecparam -name prime256v1 -genkey -noout";
        openssl(at, &format!("{key} -out ca.key"));
        openssl(at, "req -x509 -new -key ca.key -days 2 -subj /CN=ca -out ca.pem");
        for name in ["server", "client"] {
            openssl(at, &format!("{key} -out {name}.raw"));
            openssl(at, &format!("pkcs8 -topk8 -nocrypt -in {name}.raw -out {name}.key"));
            // Without a common name in the client's: etcd would take it for a user's name.
            let subject = if name == "server" { "/CN=server" } else { "/O=client" };
            openssl(at, &format!("req -new -key {name}.key -subj {subject} -out {name}.csr"));
            openssl(
                at,
                &format!(
                    "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out {name}.pem"
                ),
            );
        }
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (port, peer) = (free(), free());
        let endpoint = format!("https://127.0.0.1:{port}");
        let child = Command::new("etcd")
            .args(["--data-dir", "data", "--logger", "zap", "--log-level", "error", "--client-cert-auth"])
            .args(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint])
            .arg(format!("--listen-peer-urls=http://127.0.0.1:{peer}"))
            .args(["--trusted-ca-file", "ca.pem", "--cert-file", "server.pem", "--key-file", "server.key"])
            .current_dir(at)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Guarded { child, endpoint, dir }
    }

    fn options(&self, user: Option<(&str, &str)>) -> EtcdOptions {
        let read = |name: &str| std::fs::read(self.dir.path().join(name)).unwrap();
        EtcdOptions {
            user: user.map(|(name, password)| (name.to_owned(), password.to_owned())),
            ca_pem: Some(read("ca.pem")),
            identity_pem: Some((read("client.pem"), read("client.key"))),
            ..options(self.endpoint.clone(), "/seckill")
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_certificates_and_passwords_are_used_and_strangers_are_refused() {
    let guarded = Guarded::start().await;
    let store = EtcdStore::new(guarded.options(None));
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match store.load().await {
            Err(StoreError::Missing { .. }) => break,
            other => assert!(tokio::time::Instant::now() < deadline, "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut client = store.client().await.map_err(|failure| failure.reason()).unwrap();
    client.user_add("root", "super", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.user_add("seckill", "hush", None).await.unwrap();
    client.role_add("sale").await.unwrap();
    let permission = Permission::new(PermissionType::Readwrite, "/seckill/").with_prefix();
    client.role_grant_permission("sale", permission).await.unwrap();
    client.user_grant_role("seckill", "sale").await.unwrap();
    client.auth_enable().await.unwrap();

    let known = EtcdStore::new(guarded.options(Some(("seckill", "hush"))));
    let revision = TopologyStore::compare_and_set(&known, None, &document()).await.unwrap();
    assert_eq!(known.load().await.unwrap().revision, revision);
    let mut changes = known.watch(Revision(0));
    assert_eq!(changes.next().await.unwrap().unwrap().revision, revision);

    let nobody = EtcdStore::new(guarded.options(None));
    let wrong = EtcdStore::new(guarded.options(Some(("seckill", "loud"))));
    let elsewhere = EtcdStore::new(EtcdOptions {
        prefix: "/other".to_owned(),
        ..guarded.options(Some(("seckill", "hush")))
    });
    let uncertified =
        EtcdStore::new(EtcdOptions { identity_pem: None, ..guarded.options(Some(("seckill", "hush"))) });
    for (who, stranger) in
        [("nobody", nobody), ("wrong", wrong), ("elsewhere", elsewhere), ("uncertified", uncertified)]
    {
        let refused = stranger.load().await;
        // Without a certificate there is no connection: that may be the network as well.
        let said_no = !matches!(refused, Err(StoreError::Unavailable { .. }));
        assert_eq!(said_no, who != "uncertified", "{who}: {refused:?}");
        let error = refused.unwrap_err();
        assert_eq!(error.is_transient(), !said_no, "{who}: {error:?}");
        let refused = TopologyStore::compare_and_set(&stranger, Some(revision), &document()).await;
        assert!(
            matches!(
                refused,
                Err(StoreError::Refused { .. } | StoreError::Unavailable { .. } | StoreError::Unknown { .. })
            ),
            "{who}: {refused:?}"
        );
    }
    assert_eq!(known.load().await.unwrap().revision, revision);
    assert!(!format!("{known:?}").contains("hush"));
}
