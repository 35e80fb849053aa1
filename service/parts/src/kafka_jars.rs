//! The broker's jars: fetched once from Maven Central, kept in the build folder.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::error::{PartError, file_error};
use crate::process::find_program;
use crate::server::prepare;

const POM: &str = include_str!("../kafka/pom.xml");

/// The folder with the jars, for a class path of `FOLDER/*`. Fetches them if nobody has yet; of several processes that
/// need them at once, one fetches.
pub(crate) async fn folder() -> Result<PathBuf, PartError> {
    let version: String = Sha256::digest(POM).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let target = target_folder();
    let libs = target.join(format!("kafka-libs-{version}"));
    if libs.is_dir() {
        return Ok(libs);
    }
    fs::create_dir_all(&target).map_err(file_error("create", &target))?;
    let lock_path = target.join("kafka-libs.lock");
    let lock = File::create(&lock_path).map_err(file_error("create", &lock_path))?;
    let lock =
        tokio::task::spawn_blocking(move || flock(&lock, FlockOperation::LockExclusive).map(|()| lock))
            .await?
            .map_err(|errno| PartError::File { what: "lock", path: lock_path, source: errno.into() })?;
    if !libs.is_dir() {
        fetch(&target, &libs).await?;
    }
    drop(lock);
    Ok(libs)
}

async fn fetch(target: &Path, libs: &Path) -> Result<(), PartError> {
    let mvn = find_program("mvn").ok_or(PartError::Missing { program: "mvn", package: "maven" })?;
    let half = tempfile::Builder::new()
        .prefix("kafka-libs-")
        .tempdir_in(target)
        .map_err(file_error("create a folder in", target))?;
    let pom = half.path().join("pom.xml");
    fs::write(&pom, POM).map_err(file_error("write", &pom))?;
    let jars = half.path().join("jars");
    let mut command = tokio::process::Command::new(mvn);
    command.args(["--batch-mode", "--quiet", "--file"]).arg(&pom);
    command.args(["dependency:copy-dependencies", "-DincludeScope=runtime"]);
    command.arg(format!("-DoutputDirectory={}", jars.display()));
    prepare(half.path(), "mvn", command).await?;
    // Whole or not at all: the name is the sign that all jars are there.
    fs::rename(&jars, libs).map_err(file_error("rename to", libs))
}

/// Cargo's target folder, which `cargo clean` empties.
pub(crate) fn target_folder() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let workspace = fs::canonicalize(&workspace).unwrap_or(workspace);
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => workspace.join(folder),
        None => workspace.join("target"),
    }
}
