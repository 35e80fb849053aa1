//! The rules of the protocol as switches: the search takes one out and has to find what breaks.

use std::fmt;

/// One rule, or one clause of a rule that has several, under its name in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Rule {
    /// F1: every write checks the fence in the ledger.
    F1,
    /// A1: a confirming read counts from before it was sent.
    A1,
    /// A2: lease and epoch are checked again when a batch is acknowledged.
    A2,
    /// A3: a read that shows a forced shift away from this center confirms nothing.
    A3,
    /// K2: a barrier covers only batches whose replies came before it was sent.
    K2After,
    /// K2: a barrier is fenced, carries the batch's epoch, and goes to the run of the server that replied.
    K2Fence,
    /// K3: a replay is acknowledged under the same rule as an acceptance.
    K3,
    /// R1, on a master: entries are used behind a barrier.
    R1Master,
    /// R1, on a replica: entries are used while the link is up and the fence is the confirmed topology's.
    R1Replica,
    /// S2: a change of role expects the fence that its orderer saw.
    S2,
    /// S3: the tail of a diverged master is saved before it is attached.
    S3Tail,
    /// S3: the guardian does nothing while a shift is recorded.
    S3Idle,
    /// S4: a forced shift is without loss only to the very run of the replica that is in sync.
    S4,
    /// S4: that is seen again by whoever promotes the replica, and the promotion comes before anything is decided.
    S4Promote,
    /// D1: a replica is taken off only while no shift is recorded.
    D1Guard,
    /// D1: what a forced shift may lose is decided in the compare-and-set that records it.
    D1Decide,
    /// D2: a replica is in sync again from an epoch on whose fence it has shown itself.
    D2,
    /// D3: with durability `local` a forced shift always needs accepted loss.
    D3,
    /// H1: the epoch of an attempt is never used again: an abort moves to a new one.
    H1Abort,
    /// H1: with no shift recorded the guardian lifts the lower of fence and topology to the higher.
    H1Lift,
    /// H1: a number is used once: the topology is lifted to the epoch after that of the fence that is ahead of it.
    H1Once,
    /// H3: the topology's compare-and-set decides, not the promotion.
    H3Decide,
    /// H3: a compare-and-set without an answer is read again and never taken as failed.
    H3Unknown,
    /// H4: a shift whose coordinator is silent is taken over.
    H4,
    /// H4: by any service of any center.
    H4Any,
    /// H4: whoever was replaced changes the record no more.
    H4Term,
}

impl Rule {
    /// All of them.
    pub const ALL: [Rule; 26] = [
        Rule::F1,
        Rule::A1,
        Rule::A2,
        Rule::A3,
        Rule::K2After,
        Rule::K2Fence,
        Rule::K3,
        Rule::R1Master,
        Rule::R1Replica,
        Rule::S2,
        Rule::S3Tail,
        Rule::S3Idle,
        Rule::S4,
        Rule::S4Promote,
        Rule::D1Guard,
        Rule::D1Decide,
        Rule::D2,
        Rule::D3,
        Rule::H1Abort,
        Rule::H1Lift,
        Rule::H1Once,
        Rule::H3Decide,
        Rule::H3Unknown,
        Rule::H4,
        Rule::H4Any,
        Rule::H4Term,
    ];

    /// The rule's name in the protocol; a clause of a rule adds a word.
    pub fn name(self) -> &'static str {
        match self {
            Rule::F1 => "F1",
            Rule::A1 => "A1",
            Rule::A2 => "A2",
            Rule::A3 => "A3",
            Rule::K2After => "K2-after",
            Rule::K2Fence => "K2-fence",
            Rule::K3 => "K3",
            Rule::R1Master => "R1-master",
            Rule::R1Replica => "R1-replica",
            Rule::S2 => "S2",
            Rule::S3Tail => "S3-tail",
            Rule::S3Idle => "S3-idle",
            Rule::S4 => "S4",
            Rule::S4Promote => "S4-promote",
            Rule::D1Guard => "D1-guard",
            Rule::D1Decide => "D1-decide",
            Rule::D2 => "D2",
            Rule::D3 => "D3",
            Rule::H1Abort => "H1-abort",
            Rule::H1Lift => "H1-lift",
            Rule::H1Once => "H1-once",
            Rule::H3Decide => "H3-decide",
            Rule::H3Unknown => "H3-unknown",
            Rule::H4 => "H4",
            Rule::H4Any => "H4-any",
            Rule::H4Term => "H4-term",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which rules are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules(u32);

impl Rules {
    /// Every rule.
    pub const ALL: Rules = Rules(u32::MAX);

    /// Every rule that is kept now, but not this one.
    #[must_use]
    pub const fn without(self, rule: Rule) -> Rules {
        Rules(self.0 & !(1 << rule as u32))
    }

    /// Whether this rule is kept.
    pub fn keep(self, rule: Rule) -> bool {
        self.0 & (1 << rule as u32) != 0
    }
}
