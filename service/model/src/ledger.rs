//! The ledger of one Redis server, as far as the protocol looks at it: who has written what in which order.

use std::fmt;

/// A center, by its place: 0 is `a`, 1 is `b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Center {
    /// The master center at the beginning.
    A,
    /// The other one.
    B,
}

impl Center {
    /// Both.
    pub const BOTH: [Center; 2] = [Center::A, Center::B];

    /// The other center.
    pub fn other(self) -> Center {
        match self {
            Center::A => Center::B,
            Center::B => Center::A,
        }
    }
}

impl fmt::Display for Center {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Center::A => "a",
            Center::B => "b",
        })
    }
}

/// The fence in the ledger (F1). Ordered by its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fence {
    /// The epoch.
    pub epoch: u8,
    /// The master center.
    pub master: Center,
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({}, {})", self.epoch, self.master)
    }
}

/// One write that a server's data consists of, and that its replicas get in the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Entry {
    /// Nothing; pads the log.
    None,
    /// The fence was set.
    Fence(Fence),
    /// A purchase was accepted, at the epoch of the fence before it.
    Accepted(u8),
}

/// The longest log: the first fence, one for each further epoch of the bounds, and each purchase.
const LOG: usize = 12;

/// Everything that a server holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Log {
    len: u8,
    entries: [Entry; LOG],
}

impl Log {
    /// A ledger that was just created at a fence.
    pub fn new(fence: Fence) -> Log {
        let mut log = Log { len: 0, entries: [Entry::None; LOG] };
        log.push(Entry::Fence(fence));
        log
    }

    /// Where it ends: how many entries it has.
    pub fn end(&self) -> u8 {
        self.len
    }

    /// The entries, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries[..usize::from(self.len)]
    }

    /// Appends an entry.
    ///
    /// # Panics
    /// If the log is full: the bounds of the search do not fit [`LOG`].
    pub fn push(&mut self, entry: Entry) {
        self.entries[usize::from(self.len)] = entry;
        self.len += 1;
    }

    /// Takes the last entry away, as a crash may that comes before it is on the disk. The first one stays.
    pub fn lose_last(&mut self) {
        if self.len > 1 {
            self.len -= 1;
            self.entries[usize::from(self.len)] = Entry::None;
        }
    }

    /// Takes the next entry of the log that this one is the beginning of.
    pub fn copy_next(&mut self, from: &Log) {
        self.push(from.entries[usize::from(self.len)]);
    }

    /// The fence in the data.
    pub fn fence(&self) -> Fence {
        let fence = self.entries().iter().rev().find_map(|entry| match entry {
            Entry::Fence(fence) => Some(*fence),
            Entry::Accepted(_) | Entry::None => None,
        });
        fence.expect("a log begins with a fence")
    }

    /// The epoch in which a purchase was accepted: with the purchase, this is the order's id.
    pub fn accepted(&self, purchase: u8) -> Option<u8> {
        let mut epoch = 0;
        for entry in self.entries() {
            match entry {
                Entry::Fence(fence) => epoch = fence.epoch,
                Entry::Accepted(found) if *found == purchase => return Some(epoch),
                Entry::Accepted(_) | Entry::None => {}
            }
        }
        None
    }

    /// How many purchases were accepted.
    pub fn sold(&self) -> usize {
        self.entries().iter().filter(|entry| matches!(entry, Entry::Accepted(_))).count()
    }

    /// Whether everything in this log is in the other, too, and in the same place.
    pub fn begins(&self, other: &Log) -> bool {
        other.entries().starts_with(self.entries())
    }

    /// The same with the two purchases in each other's place.
    pub(crate) fn swapped(&self) -> Log {
        let mut log = *self;
        for entry in &mut log.entries {
            if let Entry::Accepted(purchase) = entry {
                *purchase = 1 - *purchase;
            }
        }
        log
    }
}

/// The role of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// It takes writes.
    Master,
    /// It follows the other server; `linked` while it gets that one's writes.
    Replica {
        /// Everything before the next write has arrived or is under way.
        linked: bool,
    },
    /// It takes no writes and follows nobody: every server starts like this (S1).
    Isolated,
}

/// One center's Redis server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Server {
    /// Its role.
    pub role: Role,
    /// What it holds.
    pub log: Log,
    /// It is in the same run as when it was named in the topology's `in_sync` or noted to be (S4).
    pub noted_run: bool,
}

impl Server {
    /// Whether it is a master at this fence.
    pub fn is_open_at(&self, fence: Fence) -> bool {
        self.role == Role::Master && self.log.fence() == fence
    }
}
