//! Places where a test lets the process die: what lies between two steps is then tried for certain, not by luck.

/// With `SECKILL_FAIL_POINT=NAME:N` the process ends here, as by `kill -9`, when it comes to the place of that name
/// for the Nth time. Release builds have no such places.
#[cfg(debug_assertions)]
pub(super) fn fail_point(name: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    static ARMED: LazyLock<Option<(String, AtomicU32)>> = LazyLock::new(|| {
        let armed = std::env::var("SECKILL_FAIL_POINT").ok()?;
        let (name, times) = armed.split_once(':')?;
        Some((name.to_owned(), AtomicU32::new(times.parse().ok()?)))
    });
    if let Some((armed, left)) = &*ARMED
        && armed == name
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}

/// See above.
#[cfg(not(debug_assertions))]
pub(super) fn fail_point(_name: &str) {}
