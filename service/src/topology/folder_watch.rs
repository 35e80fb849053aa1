//! Waits for files of a folder to change, by the kernel's inotify.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;

/// Room for some dozens of events at a time; what does not fit is read next.
const BUFFER_BYTES: usize = 4096;

/// A watched folder. Notices files that are renamed into it and files that go.
#[derive(Debug)]
pub(super) struct FolderWatch {
    events: AsyncFd<OwnedFd>,
}

impl FolderWatch {
    /// Begins to watch. Must be called within a runtime.
    pub(super) fn new(folder: &Path) -> io::Result<FolderWatch> {
        let fd = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        inotify::add_watch(&fd, folder, WatchFlags::MOVED_TO | WatchFlags::DELETE)?;
        #[expect(
            deprecated,
            reason = "its successor is an unsafe call; the descriptor is owned and lives as long as the AsyncFd"
        )]
        let events = AsyncFd::new(fd)?;
        Ok(FolderWatch { events })
    }

    /// Waits until a file whose name fits has come or gone since the last call, or events were lost.
    pub(super) async fn changed(&self, mut fits: impl FnMut(&OsStr) -> bool) -> io::Result<()> {
        loop {
            let mut ready = self.events.readable().await?;
            match drain(ready.get_inner(), &mut fits) {
                Ok(true) => return Ok(()),
                Ok(false) => ready.clear_ready(),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Reads all events that are there; whether one of them counts.
fn drain(events: &OwnedFd, fits: &mut impl FnMut(&OsStr) -> bool) -> io::Result<bool> {
    let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
    let mut reader = Reader::new(events, &mut buffer);
    let mut found = false;
    loop {
        match reader.next() {
            Ok(event) => {
                found |= event.events().contains(ReadFlags::QUEUE_OVERFLOW)
                    || event.file_name().is_some_and(|name| fits(OsStr::from_bytes(name.to_bytes())));
            }
            Err(Errno::AGAIN) => return Ok(found),
            Err(error) => return Err(error.into()),
        }
    }
}
