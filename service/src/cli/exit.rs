//! Exit codes, and what makes a command end with each.

use std::fmt;

use serde_json::{Value, json};

/// How a command ended. `audit` has codes of its own, see [`Exit::Audit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    /// Done.
    Done,
    /// Something is wrong with the command, its input or its surroundings. Usage errors are these too.
    Error,
    /// The service refused; nothing changed.
    Refused,
    /// A shift was given up, and everything is as it was.
    Aborted,
    /// The outcome is not known: it may have happened, or may still.
    Unknown,
    /// A shift happened, and what was verified afterwards is not as it should be.
    Unverified,
    /// What the audit found: 0 clean, 2 violation, 3 incomplete.
    Audit(u8),
}

impl Exit {
    /// The process' exit code.
    pub(super) fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Error => 1,
            Exit::Refused => 2,
            Exit::Aborted => 3,
            Exit::Unknown => 4,
            Exit::Unverified => 5,
            Exit::Audit(code) => code,
        }
    }
}

/// Why a command did not do what it was asked to.
#[derive(Debug)]
pub(super) struct Failure {
    /// How the process ends.
    pub exit: Exit,
    /// What a person reads.
    pub message: String,
    /// What a program reads: the service's problem document, where there is one.
    pub body: Option<Value>,
}

impl Failure {
    /// An error of the command, its input or its surroundings.
    pub(super) fn error(message: impl fmt::Display) -> Failure {
        Failure { exit: Exit::Error, message: message.to_string(), body: None }
    }

    /// Nothing was changed.
    pub(super) fn refused(message: impl fmt::Display) -> Failure {
        Failure { exit: Exit::Refused, message: message.to_string(), body: None }
    }

    /// Nobody knows whether it happened.
    pub(super) fn unknown(message: impl fmt::Display) -> Failure {
        Failure { exit: Exit::Unknown, message: message.to_string(), body: None }
    }

    /// The failure as JSON.
    pub(super) fn json(&self) -> Value {
        let code = match self.exit {
            Exit::Refused => "refused",
            Exit::Unknown => "unknown",
            Exit::Done | Exit::Error | Exit::Aborted | Exit::Unverified | Exit::Audit(_) => "error",
        };
        json!({ "outcome": code, "message": self.message, "problem": self.body })
    }
}

/// What a command gives back.
pub(super) type Outcome = Result<Exit, Failure>;
