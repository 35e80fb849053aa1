//! Places where a test lets the process die or stand still: what lies between two steps is then tried for certain, not
//! by luck.

/// `SECKILL_FAIL_POINT` names a file, which a test may write at any time: `NAME N ACTION`. The process that comes to the
/// place of that name for the Nth time from then on removes the file and, with the action `kill`, ends here as by
/// `kill -9`; with `stop` it stands still here until somebody sends it SIGCONT. Release builds have no such places.
#[cfg(debug_assertions)]
pub(crate) fn fail_point(name: &str) {
    use std::path::PathBuf;
    use std::sync::{LazyLock, Mutex, PoisonError};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    /// A stop reaches the thread that asked for it a moment later.
    const STOPPED_WITHIN: Duration = Duration::from_millis(20);
    static FILE: LazyLock<Option<PathBuf>> =
        LazyLock::new(|| std::env::var_os("SECKILL_FAIL_POINT").map(PathBuf::from));
    /// How often a process came to the place that the file named when it was read last.
    static SEEN: Mutex<(String, u32)> = Mutex::new((String::new(), 0));

    let Some(file) = &*FILE else { return };
    let Ok(armed) = std::fs::read_to_string(file) else { return };
    let mut words = armed.split_whitespace();
    let (Some(place), Some(times), Some(action)) = (words.next(), words.next(), words.next()) else { return };
    let (true, Ok(times)) = (place == name, times.parse::<u32>()) else { return };
    {
        // It is replaced as a whole.
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        let before = if seen.0 == armed { seen.1 } else { 0 };
        *seen = (armed.clone(), before + 1);
        if before + 1 < times {
            return;
        }
        *seen = (String::new(), 0);
    }
    let _ = std::fs::remove_file(file);
    match action {
        "kill" => drop(kill_process(getpid(), Signal::KILL)),
        "stop" => {
            let _ = kill_process(getpid(), Signal::STOP);
            std::thread::sleep(STOPPED_WITHIN);
        }
        other => tracing::error!(action = other, "a fail point knows the actions kill and stop"),
    }
}

/// See above.
#[cfg(not(debug_assertions))]
pub(crate) fn fail_point(_name: &str) {}
