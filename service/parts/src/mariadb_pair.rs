//! Two MariaDB servers whose databases are one.

use tempfile::TempDir;

use crate::error::PartError;
use crate::mariadb::{Mariadb, MariadbOptions};

/// Two servers of somebody's own that replicate each other, with an empty database in both.
#[derive(Debug)]
pub struct MariadbPair {
    /// Those of center a and of center b. Gone before the folder that they live in.
    pub servers: [Mariadb; 2],
    /// Their databases, for the service's account.
    pub urls: [String; 2],
    /// What they live in.
    pub dir: TempDir,
}

impl MariadbPair {
    /// Starts both at once, and returns when the second has what the first one has.
    pub async fn start(database: &str) -> Result<MariadbPair, PartError> {
        let dir = folder_in_memory()?;
        let options = [1, 2].map(|server_id| MariadbOptions { server_id, ..MariadbOptions::default() });
        let folders = ["a", "b"].map(|name| dir.path().join(name));
        let (a, b) = tokio::join!(
            Mariadb::start_with(&folders[0], &options[0]),
            Mariadb::start_with(&folders[1], &options[1])
        );
        let servers = [a?, b?];
        let (a, b) = servers[0].pair_with(&servers[1], database).await?;
        Ok(MariadbPair { servers, urls: [a, b], dir })
    }
}

/// A folder in memory where there is some, otherwise on the disk: making 1,200 tables twice waits for thousands of syncs
/// there. Removed on drop.
pub fn folder_in_memory() -> Result<TempDir, PartError> {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).map_err(|source| PartError::File {
        what: "make a folder in",
        path: std::env::temp_dir(),
        source,
    })
}
