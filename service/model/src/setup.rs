//! The bounds of one search.

use crate::properties::Property;
use crate::rules::Rules;
use crate::state::Faults;

/// Epochs go up to one less than this.
pub const EPOCHS: usize = 10;

/// What an acknowledgement waits for in a topology that is not degraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// The master's disk.
    Local,
    /// The other center's replica as well.
    Replicated,
}

/// The bounds of one search.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// The durability.
    pub durability: Durability,
    /// Whether the replica is given up at the beginning.
    pub degraded: bool,
    /// How many purchases are made: 1 or 2.
    pub purchases: usize,
    /// How many units there are.
    pub stock: usize,
    /// Whether the outbox is read.
    pub readers: bool,
    /// What may go wrong, and how often.
    pub faults: Faults,
    /// Which rules are kept.
    pub rules: Rules,
    /// Look at this property alone.
    pub only: Option<Property>,
}

impl Setup {
    pub(crate) fn looks_at(&self, property: Property) -> bool {
        self.only.is_none_or(|only| only == property)
    }

    /// One purchase, one unit, no fault, all rules.
    pub const fn new(durability: Durability) -> Setup {
        Setup {
            durability,
            degraded: false,
            purchases: 1,
            stock: 1,
            readers: false,
            faults: Faults {
                planned: 0,
                forced: 0,
                servers: 0,
                services: 0,
                degrades: 0,
                lost_requests: 0,
                late_reads: 0,
                lost_answers: 0,
            },
            rules: Rules::ALL,
            only: None,
        }
    }
}
