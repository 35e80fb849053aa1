//! What can happen, one step of one actor at a time, in words.

use std::fmt;

use crate::ledger::Center;

/// One step. Purchases count from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the words are in `Display`")]
pub enum Action {
    // Requests.
    Send { purchase: u8, center: Center },
    Execute { purchase: u8, center: Center },
    Barrier { purchase: u8, center: Center },
    Confirm { purchase: u8, center: Center },
    Acknowledge { purchase: u8, center: Center },
    LoseRequest { purchase: u8, center: Center },
    ReadOutbox { purchase: u8, center: Center },
    // Servers.
    Copy { center: Center },
    Link { center: Center },
    RestartServer { center: Center, loses_tail: bool },
    // Services and the topology.
    ReadTopology { center: Center },
    AskTopology { center: Center },
    HearTopology { center: Center },
    RestartService { center: Center },
    // Guardians.
    BeginEpoch { center: Center },
    BeginAttach { center: Center },
    Act { center: Center },
    LiftTopology { center: Center },
    Degrade { center: Center },
    BeginReturn { center: Center },
    SeeReturn { center: Center },
    GiveUpReturn { center: Center },
    TimeOutReturn { center: Center },
    EndReturn { center: Center },
    // Coordinators.
    StartPlanned { to: Center },
    StartForced { to: Center },
    FenceOld { center: Center },
    SeeCaughtUp { center: Center },
    Decide { center: Center, answered: bool },
    CatchUpAgain { center: Center },
    OpenSource { center: Center },
    Promote { center: Center },
    Redirect { center: Center, answered: bool },
    AttachOld { center: Center },
    WaitLease { center: Center },
    LookAgain { center: Center },
    Abort { center: Center },
    ReadAgain { center: Center },
    TakeForFailed { center: Center },
    TakeOver { center: Center },
    Stop { center: Center },
}

impl Action {
    /// The center whose service or server does it, and whether it needs the other center's, too.
    pub fn needs(self) -> (Center, bool) {
        use Action as A;
        match self {
            A::Send { center, .. }
            | A::Execute { center, .. }
            | A::Barrier { center, .. }
            | A::Acknowledge { center, .. }
            | A::LoseRequest { center, .. }
            | A::ReadOutbox { center, .. }
            | A::RestartServer { center, .. }
            | A::ReadTopology { center }
            | A::AskTopology { center }
            | A::HearTopology { center }
            | A::RestartService { center }
            | A::BeginEpoch { center }
            | A::Act { center }
            | A::LiftTopology { center }
            | A::Degrade { center }
            | A::GiveUpReturn { center }
            | A::TimeOutReturn { center }
            | A::EndReturn { center }
            | A::StartPlanned { to: center }
            | A::StartForced { to: center }
            | A::Decide { center, .. }
            | A::Redirect { center, .. }
            | A::WaitLease { center }
            | A::Abort { center }
            | A::ReadAgain { center }
            | A::TakeForFailed { center }
            | A::TakeOver { center }
            | A::Stop { center } => (center, false),
            A::Confirm { center, .. }
            | A::Copy { center }
            | A::Link { center }
            | A::BeginAttach { center }
            | A::BeginReturn { center }
            | A::SeeReturn { center }
            | A::FenceOld { center }
            | A::SeeCaughtUp { center }
            | A::LookAgain { center }
            | A::CatchUpAgain { center }
            | A::OpenSource { center }
            | A::Promote { center }
            | A::AttachOld { center } => (center, true),
        }
    }

    /// Whether it happens by itself, sooner or later: neither a fault nor somebody's wish.
    pub fn is_progress(self) -> bool {
        use Action as A;
        match self {
            A::LoseRequest { .. }
            | A::RestartServer { .. }
            | A::AskTopology { .. }
            | A::RestartService { .. }
            | A::Degrade { .. }
            | A::TimeOutReturn { .. }
            | A::StartPlanned { .. }
            | A::StartForced { .. }
            | A::Decide { answered: false, .. }
            | A::Redirect { answered: false, .. } => false,
            A::Send { .. }
            | A::Execute { .. }
            | A::Barrier { .. }
            | A::Confirm { .. }
            | A::Acknowledge { .. }
            | A::ReadOutbox { .. }
            | A::Copy { .. }
            | A::Link { .. }
            | A::ReadTopology { .. }
            | A::HearTopology { .. }
            | A::BeginEpoch { .. }
            | A::BeginAttach { .. }
            | A::Act { .. }
            | A::LiftTopology { .. }
            | A::BeginReturn { .. }
            | A::SeeReturn { .. }
            | A::GiveUpReturn { .. }
            | A::EndReturn { .. }
            | A::FenceOld { .. }
            | A::SeeCaughtUp { .. }
            | A::Decide { answered: true, .. }
            | A::CatchUpAgain { .. }
            | A::OpenSource { .. }
            | A::Promote { .. }
            | A::Redirect { answered: true, .. }
            | A::AttachOld { .. }
            | A::WaitLease { .. }
            | A::LookAgain { .. }
            | A::Abort { .. }
            | A::ReadAgain { .. }
            | A::TakeForFailed { .. }
            | A::TakeOver { .. }
            | A::Stop { .. } => true,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use Action as A;
        let unanswered = |answered: bool| if answered { "" } else { " and gets no answer" };
        match *self {
            A::Send { purchase, center } => write!(f, "service {center} sends purchase {purchase}"),
            A::Execute { purchase, center } => {
                write!(f, "Redis {center} runs the batch of purchase {purchase}")
            }
            A::Barrier { purchase, center } => {
                write!(f, "service {center} writes a barrier for purchase {purchase}")
            }
            A::Confirm { purchase, center } => {
                write!(f, "the replica confirms the barrier of purchase {purchase} to service {center}")
            }
            A::Acknowledge { purchase, center } => {
                write!(f, "service {center} decides what to answer to purchase {purchase}")
            }
            A::LoseRequest { purchase, center } => {
                write!(f, "the request of purchase {purchase} at service {center} is lost")
            }
            A::ReadOutbox { purchase, center } => {
                write!(f, "the reader of {center} passes purchase {purchase} on from Redis {center}'s outbox")
            }
            A::Copy { center } => write!(f, "Redis {center} gets the next write"),
            A::Link { center } => {
                write!(f, "Redis {center} is linked to its master and has what that one held")
            }
            A::RestartServer { center, loses_tail: false } => write!(f, "Redis {center} restarts"),
            A::RestartServer { center, loses_tail: true } => {
                write!(f, "Redis {center} restarts without its last write")
            }
            A::ReadTopology { center } => write!(f, "service {center} reads the topology"),
            A::AskTopology { center } => {
                write!(f, "service {center} asks for the topology, the answer is late")
            }
            A::HearTopology { center } => write!(f, "the late answer arrives at service {center}"),
            A::RestartService { center } => write!(f, "service {center} restarts"),
            A::BeginEpoch { center } => {
                write!(f, "guardian {center} takes an epoch for Redis {center} from the topology")
            }
            A::BeginAttach { center } => write!(f, "guardian {center} is about to attach Redis {center}"),
            A::Act { center } => write!(f, "guardian {center} gives Redis {center} the role"),
            A::LiftTopology { center } => {
                write!(f, "guardian {center} lifts the topology past the epoch of Redis {center}'s fence")
            }
            A::Degrade { center } => write!(f, "guardian {center} takes the other center's replica off"),
            A::BeginReturn { center } => {
                write!(f, "guardian {center} begins the return of the other center's replica")
            }
            A::SeeReturn { center } => write!(f, "guardian {center} sees the new fence on the replica"),
            A::GiveUpReturn { center } => write!(f, "guardian {center} cannot see the replica return"),
            A::TimeOutReturn { center } => {
                write!(f, "guardian {center} has waited long enough for the replica")
            }
            A::EndReturn { center } => write!(f, "guardian {center} writes down what came of the return"),
            A::StartPlanned { to } => write!(f, "a planned shift to {to} is recorded"),
            A::StartForced { to } => write!(f, "a forced shift to {to} is recorded"),
            A::FenceOld { center } => write!(f, "coordinator {center} fences the old master"),
            A::SeeCaughtUp { center } => write!(f, "coordinator {center} sees the fence on the target"),
            A::Decide { center, answered } => {
                write!(f, "coordinator {center} writes `decided`{}", unanswered(answered))
            }
            A::CatchUpAgain { center } => write!(f, "coordinator {center} lets the target catch up again"),
            A::OpenSource { center } => write!(f, "coordinator {center} opens the old master as a source"),
            A::Promote { center } => write!(f, "coordinator {center} promotes the target"),
            A::Redirect { center, answered } => {
                write!(f, "coordinator {center} writes the new master{}", unanswered(answered))
            }
            A::AttachOld { center } => write!(f, "coordinator {center} attaches the old master"),
            A::WaitLease { center } => write!(f, "coordinator {center} has waited for the lease"),
            A::LookAgain { center } => write!(f, "coordinator {center} looks at the target once more"),
            A::Abort { center } => write!(f, "coordinator {center} aborts"),
            A::ReadAgain { center } => write!(f, "coordinator {center} reads what became of its change"),
            A::TakeForFailed { center } => {
                write!(f, "coordinator {center} takes its change for failed and gives up")
            }
            A::TakeOver { center } => write!(f, "service {center} takes the shift over"),
            A::Stop { center } => write!(f, "coordinator {center} sees that it was replaced"),
        }
    }
}
