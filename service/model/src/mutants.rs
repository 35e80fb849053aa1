//! Which searches are made: with all rules, and without each of them.

use crate::properties::Property;
use crate::rules::{Rule, Rules};
use crate::setup::{Durability, Setup};
use crate::state::Faults;

/// A search with all rules, in which everything holds.
#[derive(Debug, Clone, Copy)]
pub struct Sound {
    /// What it is about.
    pub name: &'static str,
    /// Its bounds.
    pub setup: Setup,
}

/// A search without one rule.
#[derive(Debug, Clone, Copy)]
pub struct Mutant {
    /// The rule.
    pub rule: Rule,
    /// What breaks; `None` for a second line of defence, without which the other rules still hold everything within
    /// these bounds.
    pub breaks: Option<Property>,
    /// The bounds.
    pub setup: Setup,
}

const REPLICATED: Setup = Setup::new(Durability::Replicated);
const LOCAL: Setup = Setup::new(Durability::Local);
const DEGRADED: Setup = Setup { degraded: true, ..REPLICATED };
const NONE: Faults = REPLICATED.faults;

const PLANNED: Faults = Faults { planned: 1, ..NONE };
const FORCED: Faults = Faults { forced: 1, ..NONE };

/// With all rules.
pub const SOUND: &[Sound] = &[
    Sound {
        name: "replicated: a planned shift, two purchases of one unit",
        setup: Setup { purchases: 2, faults: PLANNED, ..REPLICATED },
    },
    Sound {
        name: "replicated: a planned shift, a Redis restarts, readers",
        setup: Setup { readers: true, faults: Faults { servers: 1, ..PLANNED }, ..REPLICATED },
    },
    Sound {
        name: "replicated: a planned shift, a service restarts, an answer to the coordinator is lost",
        setup: Setup { faults: Faults { services: 1, lost_answers: 1, ..PLANNED }, ..REPLICATED },
    },
    Sound {
        name: "replicated: two planned shifts",
        setup: Setup { faults: Faults { planned: 2, ..NONE }, ..REPLICATED },
    },
    Sound {
        name: "replicated: a forced shift, a Redis restarts",
        setup: Setup { faults: Faults { servers: 1, ..FORCED }, ..REPLICATED },
    },
    Sound {
        name: "replicated: a forced shift, the replica is given up, readers",
        setup: Setup { readers: true, faults: Faults { degrades: 1, ..FORCED }, ..REPLICATED },
    },
    Sound {
        name: "replicated: a forced shift, a request is lost, an answer of the config center is late",
        setup: Setup { faults: Faults { lost_requests: 1, late_reads: 1, ..FORCED }, ..REPLICATED },
    },
    Sound {
        name: "degraded: a planned shift, the replica is given up again",
        setup: Setup { faults: Faults { degrades: 1, ..PLANNED }, ..DEGRADED },
    },
    Sound {
        name: "degraded: a forced shift, a service restarts, readers",
        setup: Setup { readers: true, faults: Faults { services: 1, ..FORCED }, ..DEGRADED },
    },
    Sound {
        name: "local: a planned and a forced shift",
        setup: Setup { faults: Faults { planned: 1, ..FORCED }, ..LOCAL },
    },
    Sound {
        name: "local: a forced shift, two purchases of one unit, an answer of the config center is late, readers",
        setup: Setup { purchases: 2, readers: true, faults: Faults { late_reads: 1, ..FORCED }, ..LOCAL },
    },
    Sound {
        name: "local: a forced shift, a Redis restarts, an answer to the coordinator is lost",
        setup: Setup { faults: Faults { servers: 1, lost_answers: 1, ..FORCED }, ..LOCAL },
    },
];

/// Without one rule each, in the order of the protocol.
pub const MUTANTS: &[Mutant] = &[
    Mutant {
        rule: Rule::F1,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: PLANNED, ..LOCAL },
    },
    Mutant {
        rule: Rule::F1,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: PLANNED, ..DEGRADED },
    },
    // With two centers that stop heeding the record of a shift besides, and a number that is used twice, both accept in
    // one epoch: nothing less does it.
    Mutant {
        rule: Rule::F1,
        breaks: Some(Property::OneMasterPerEpoch),
        setup: Setup {
            rules: Rules::ALL.without(Rule::A3).without(Rule::S3Idle).without(Rule::H1Once),
            only: Some(Property::OneMasterPerEpoch),
            faults: FORCED,
            ..LOCAL
        },
    },
    Mutant {
        rule: Rule::A1,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: Faults { late_reads: 1, ..FORCED }, ..LOCAL },
    },
    Mutant {
        rule: Rule::A1,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: Faults { late_reads: 1, ..FORCED }, ..DEGRADED },
    },
    Mutant {
        rule: Rule::A2,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: FORCED, ..LOCAL },
    },
    Mutant {
        rule: Rule::A2,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: FORCED, ..DEGRADED },
    },
    Mutant {
        rule: Rule::A3,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: FORCED, ..LOCAL },
    },
    Mutant {
        rule: Rule::A3,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: FORCED, ..DEGRADED },
    },
    Mutant {
        rule: Rule::K2After,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: FORCED, ..REPLICATED },
    },
    Mutant { rule: Rule::K2Fence, breaks: None, setup: Setup { faults: FORCED, ..REPLICATED } },
    // Where nobody asks again for authority, the fenced barrier is what a late acknowledgement fails at.
    Mutant {
        rule: Rule::K2Fence,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup {
            rules: Rules::ALL.without(Rule::A2),
            faults: Faults { planned: 1, ..FORCED },
            ..REPLICATED
        },
    },
    Mutant {
        rule: Rule::K3,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: Faults { lost_requests: 1, ..FORCED }, ..REPLICATED },
    },
    Mutant {
        rule: Rule::R1Master,
        breaks: Some(Property::NothingReadComesToNothing),
        setup: Setup { readers: true, faults: FORCED, ..REPLICATED },
    },
    Mutant {
        rule: Rule::R1Replica,
        breaks: Some(Property::NothingReadComesToNothing),
        setup: Setup { readers: true, faults: FORCED, ..REPLICATED },
    },
    Mutant {
        rule: Rule::S2,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: Faults { servers: 1, ..FORCED }, ..LOCAL },
    },
    Mutant {
        rule: Rule::S3Tail,
        breaks: Some(Property::AcceptedLossIsKept),
        setup: Setup { faults: FORCED, ..LOCAL },
    },
    Mutant {
        rule: Rule::S3Idle,
        breaks: Some(Property::SalesGoOn),
        setup: Setup { faults: PLANNED, ..REPLICATED },
    },
    Mutant {
        rule: Rule::S3Idle,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: FORCED, ..LOCAL },
    },
    Mutant {
        rule: Rule::S4,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: Faults { servers: 1, ..FORCED }, ..REPLICATED },
    },
    Mutant {
        rule: Rule::S4Promote,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: Faults { servers: 1, ..FORCED }, ..REPLICATED },
    },
    Mutant {
        rule: Rule::D1Guard,
        breaks: None,
        setup: Setup { faults: Faults { degrades: 1, ..FORCED }, ..REPLICATED },
    },
    Mutant {
        rule: Rule::D1Decide,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: Faults { degrades: 1, ..FORCED }, ..REPLICATED },
    },
    Mutant {
        rule: Rule::D2,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: FORCED, ..DEGRADED },
    },
    Mutant {
        rule: Rule::D3,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: FORCED, ..LOCAL },
    },
    Mutant {
        rule: Rule::H1Abort,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: Faults { planned: 1, ..FORCED }, ..LOCAL },
    },
    Mutant {
        rule: Rule::H1Lift,
        breaks: Some(Property::SalesGoOn),
        setup: Setup { faults: PLANNED, ..REPLICATED },
    },
    // The other half of the story without F1: what is lifted to the number of an attempt has two masters in it.
    Mutant {
        rule: Rule::H1Once,
        breaks: Some(Property::OneMasterPerEpoch),
        setup: Setup {
            rules: Rules::ALL.without(Rule::F1).without(Rule::A3).without(Rule::S3Idle),
            only: Some(Property::OneMasterPerEpoch),
            faults: FORCED,
            ..LOCAL
        },
    },
    Mutant { rule: Rule::H1Once, breaks: None, setup: Setup { faults: FORCED, ..REPLICATED } },
    Mutant {
        rule: Rule::H3Decide,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: PLANNED, ..LOCAL },
    },
    Mutant {
        rule: Rule::H3Decide,
        breaks: Some(Property::NothingIsOversold),
        setup: Setup { purchases: 2, only: Some(Property::NothingIsOversold), faults: PLANNED, ..LOCAL },
    },
    Mutant {
        rule: Rule::H3Unknown,
        breaks: Some(Property::NothingAcknowledgedIsLost),
        setup: Setup { faults: Faults { lost_answers: 1, ..PLANNED }, ..LOCAL },
    },
    Mutant {
        rule: Rule::H4,
        breaks: Some(Property::SalesGoOn),
        setup: Setup { faults: Faults { services: 1, ..PLANNED }, ..REPLICATED },
    },
    Mutant {
        rule: Rule::H4Any,
        breaks: Some(Property::SalesGoOnAlone),
        setup: Setup { faults: PLANNED, ..LOCAL },
    },
    Mutant { rule: Rule::H4Term, breaks: None, setup: Setup { faults: PLANNED, ..LOCAL } },
];
