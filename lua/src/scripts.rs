//! The scripts, embedded, and how one is called.

use std::sync::LazyLock;

use redis::aio::ConnectionLike;
use redis::{Cmd, ErrorKind, RedisError, ServerErrorKind, Value};

use crate::error::Error;

const INCLUDE: &str = "--@include fence";

/// One script: its text as Redis gets it, and the hash it is called by.
pub(crate) struct Script {
    text: String,
    sha: String,
}

impl Script {
    fn new(source: &str) -> Script {
        let text = source.replace(INCLUDE, include_str!("../scripts/include/fence.lua"));
        let sha = redis::Script::new(&text).get_hash().to_owned();
        Script { text, sha }
    }

    /// Starts a call; keys and arguments follow with `arg`.
    pub(crate) fn call(&'static self, keys: usize) -> Call {
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(&self.sha).arg(keys);
        Call { script: self, cmd }
    }

    /// The text, for `EVAL` in a pipeline whose server may not have the script.
    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// The text as a script that promises to write nothing, and so runs on a replica too.
    pub(crate) fn text_without_writes(&self) -> String {
        format!("#!lua flags=no-writes,allow-stale\n{}", self.text_without_shebang())
    }

    /// The text without its `#!lua` line: a script that makes no promises and so may be queued in `MULTI` on
    /// a replica, behind the command that ends its being one.
    pub(crate) fn text_without_shebang(&self) -> &str {
        self.text.split_once('\n').map_or("", |(_, rest)| rest)
    }
}

/// A call of a script under construction.
pub(crate) struct Call {
    script: &'static Script,
    cmd: Cmd,
}

impl Call {
    pub(crate) fn arg(mut self, arg: impl redis::ToRedisArgs) -> Call {
        self.cmd.arg(arg);
        self
    }

    /// The bare command, for a pipeline whose connection has the script already.
    pub(crate) fn into_cmd(self) -> Cmd {
        self.cmd
    }

    pub(crate) fn push(&mut self, arg: impl redis::ToRedisArgs) {
        self.cmd.arg(arg);
    }

    /// Sends the call; a server that does not know the script (restarted, flushed) is given its text.
    /// `NOSCRIPT` means that nothing ran, so the second attempt is safe.
    pub(crate) async fn run(&self, conn: &mut impl ConnectionLike) -> Result<Value, Error> {
        // Not `req_packed_command`: that hands an error reply over as a value.
        match self.cmd.query_async(conn).await {
            Err(error) if is_noscript(&error) => {
                load(conn, self.script).await?;
                Ok(self.cmd.query_async(conn).await?)
            }
            answer => Ok(answer?),
        }
    }
}

pub(crate) fn is_noscript(error: &RedisError) -> bool {
    matches!(error.kind(), ErrorKind::Server(ServerErrorKind::NoScript))
}

async fn load(conn: &mut impl ConnectionLike, script: &Script) -> Result<(), Error> {
    Ok(redis::cmd("SCRIPT").arg("LOAD").arg(&script.text).query_async(conn).await?)
}

macro_rules! scripts {
    ($($name:ident = $file:literal;)*) => {
        $(pub(crate) static $name: LazyLock<Script> =
            LazyLock::new(|| Script::new(include_str!(concat!("../scripts/", $file))));)*

        /// Gives the server every script, so that the first purchase after a start or a shift finds them there.
        pub async fn load_all(conn: &mut impl ConnectionLike) -> Result<(), Error> {
            $(load(conn, &$name).await?;)*
            Ok(())
        }

        /// How many of the scripts the server does not have.
        pub async fn missing(conn: &mut impl ConnectionLike) -> Result<usize, Error> {
            let mut exists = redis::cmd("SCRIPT");
            exists.arg("EXISTS");
            $(exists.arg(&$name.sha);)*
            let there: Vec<bool> = exists.query_async(conn).await?;
            Ok(there.into_iter().filter(|there| !there).count())
        }

        #[cfg(test)]
        fn all() -> Vec<(&'static str, &'static Script)> {
            vec![$(($file, &*$name)),*]
        }
    };
}

scripts! {
    ARCHIVE = "archive.lua";
    BARRIER = "barrier.lua";
    CREATE = "create.lua";
    CURSOR = "cursor.lua";
    FENCE = "fence.lua";
    RECLAIM = "reclaim.lua";
    RELEASE = "release.lua";
    RESERVE = "reserve.lua";
    SALE = "sale.lua";
    SNAPSHOT = "snapshot.lua";
    STATE = "state.lua";
    STOCK = "stock.lua";
    TRIM = "trim.lua";
    UPDATE = "update.lua";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_script_declares_itself_and_describes_its_call() {
        for (file, script) in all() {
            assert!(script.text.starts_with("#!lua"), "{file}");
            for part in ["-- KEYS ", "-- ARGV ", "-- Reply "] {
                assert!(script.text.contains(part), "{file} has no {part:?}");
            }
            assert!(!script.text.contains("@include"), "{file}: an include was not resolved");
        }
    }
}
