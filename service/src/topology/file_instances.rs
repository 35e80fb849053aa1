//! Instances beside the topology's file: one small file for each, in a folder.
//!
//! An instance holds a lock on its file for as long as it lives, and the kernel lets go of it when the process
//! dies, however it dies. A file that nobody holds is rubbish, and whoever finds it removes it.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use tokio_util::sync::CancellationToken;

use super::file_store::{FileStore, blocking};
use super::folder_watch::FolderWatch;
use super::instances::{Instance, InstanceStore};
use super::store::StoreError;

/// Files that instances have; others, such as half-written ones, are none.
const SUFFIX: &str = "json";
/// What is still being written.
const UNFINISHED: &str = "new";

impl FileStore {
    fn instances(&self) -> PathBuf {
        self.beside(".instances")
    }

    /// Writes the file and holds its lock. It shows up under its name once it is both written and locked.
    fn register(&self, instance: &Instance) -> io::Result<(PathBuf, File)> {
        let folder = self.instances();
        fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{}.{SUFFIX}", instance.id));
        let unfinished = path.with_extension(UNFINISHED);
        let mut file = File::create(&unfinished)?;
        file.lock()?;
        file.write_all(&serde_json::to_vec_pretty(instance)?)?;
        fs::rename(&unfinished, &path)?;
        Ok((path, file))
    }

    fn registered(&self) -> io::Result<Vec<Instance>> {
        let entries = match fs::read_dir(self.instances()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == SUFFIX) {
                found.extend(live(&path)?);
            }
        }
        Ok(found)
    }
}

/// The instance of a file, if it lives.
fn live(path: &Path) -> io::Result<Option<Instance>> {
    let gone = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(None),
        _ => Err(error),
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) => return gone(error),
    };
    // Shared, so that two who look at the same time do not take each other for its owner.
    match file.try_lock_shared() {
        Ok(()) => {
            // Its name never comes again, so nobody else's file is removed here.
            return fs::remove_file(path).map(|()| None).or_else(gone);
        }
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    match fs::read(path) {
        // Of a release that writes something else entirely: not for this one to dial.
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(error) => gone(error),
    }
}

impl InstanceStore for FileStore {
    fn keep<'a>(
        &'a self,
        instance: &'a Instance,
        until: CancellationToken,
    ) -> BoxFuture<'a, Result<(), StoreError>> {
        async move {
            let (store, registering) = (self.clone(), instance.clone());
            let registered = blocking(move || store.register(&registering)).await;
            let (path, file) =
                registered.map_err(|error| self.unavailable("registered at", error.to_string()))?;
            until.cancelled().await;
            blocking(move || {
                // Whoever looks removes what is left once the lock is gone.
                let _ = fs::remove_file(path);
                drop(file);
            })
            .await;
            Ok(())
        }
        .boxed()
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Instance>, StoreError>> {
        let store = self.clone();
        async move {
            let reader = store.clone();
            blocking(move || reader.registered())
                .await
                .map_err(|error| store.unavailable("asked for its instances", error.to_string()))
        }
        .boxed()
    }

    fn changes(&self) -> BoxStream<'static, Result<(), StoreError>> {
        let state = (self.clone(), None::<FolderWatch>);
        futures_util::stream::try_unfold(state, async |(store, watch)| {
            let failed = |error: io::Error| store.unavailable("watched for instances", error.to_string());
            let Some(watch) = watch else {
                let folder = store.instances();
                let created = folder.clone();
                blocking(move || fs::create_dir_all(created)).await.map_err(failed)?;
                let watch = FolderWatch::new(&folder).map_err(failed)?;
                // What changed before it watched is in a list read from now on.
                return Ok(Some(((), (store, Some(watch)))));
            };
            let suffix = format!(".{SUFFIX}");
            watch.changed(|name| name.to_string_lossy().ends_with(&suffix)).await.map_err(failed)?;
            Ok(Some(((), (store, Some(watch)))))
        })
        .boxed()
    }
}
