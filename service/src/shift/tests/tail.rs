//! What only one server has, on its way into a file.

use super::super::tail::{Owner, save};
use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tail_that_was_saved_is_not_saved_again_by_the_next_attempt() {
    let world = World::selling().await;
    let sale = world.create_sale("s", 5).await;
    let master = RedisServer::start().await;
    let folder = tempfile::tempdir().unwrap();
    let center = center();
    let owner = Owner { center: &center, partition: 0, folder: folder.path() };
    let save = async || {
        let (mut own, mut of_master) = (world.conn().await, master.connect().await);
        let standing = roles::standing(&mut own).await.unwrap();
        save(&owner, &standing, &mut own, &mut of_master).await.unwrap().expect("the master has nothing")
    };
    world.buy(&sale, "u1").await;
    let first = save().await;
    assert_eq!((first.orders, first.again), (1, false));
    let again = save().await;
    assert_eq!((again.again, &again.file), (true, &first.file));
    assert_eq!((again.common, again.entries, again.orders), (first.common, first.entries, first.orders));
    // More than before is another tail.
    world.buy(&sale, "u2").await;
    let more = save().await;
    assert_eq!((more.entries, more.orders, more.again), (first.entries + 1, 2, false));
    assert_ne!(more.file, first.file);
    // So is what stands in a file that has lost its end.
    let mut lines: Vec<String> =
        std::fs::read_to_string(&more.file).unwrap().lines().map(str::to_owned).collect();
    lines.pop();
    std::fs::write(&more.file, lines.join("\n") + "\n").unwrap();
    let anew = save().await;
    assert_eq!((anew.entries, anew.orders, anew.again), (more.entries, more.orders, false));
    assert_ne!(anew.file, more.file);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
}
