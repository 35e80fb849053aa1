//! The client's own record of every purchase: 16 bytes each, enough to check the books afterwards.

use std::collections::BTreeMap;

use seckill_domain::OrderId;
use serde::Serialize;

use crate::outcome::{Code, Effect, Verdict};

/// The most purchases of one run: 16 bytes each make 1 GiB.
pub const PURCHASES_MAX: u64 = 64 * 1024 * 1024;

/// Violations kept with their details; the rest is only counted.
pub const VIOLATIONS_KEPT: usize = 100;

/// One purchase: everything sent under one key of one buyer.
#[derive(Debug, Clone, Copy)]
pub struct Purchase {
    order: u64,
    /// Whose purchase.
    pub user: u32,
    /// Which of the buyer's keys.
    pub key: u16,
    code: u8,
    flags: u8,
}

const FRESH: u8 = 1;
const HAD_UNKNOWN: u8 = 2;
const RESOLVED: u8 = 4;

impl Purchase {
    /// A purchase before its first answer.
    pub fn new(user: u32, key: u16) -> Purchase {
        Purchase { order: 0, user, key, code: Code::UNSENT.0, flags: 0 }
    }

    /// The order, once there is one.
    pub fn order(&self) -> Option<OrderId> {
        OrderId::from_number(self.order)
    }

    /// What it came to: the first acceptance, else the last answer.
    pub fn code(&self) -> Code {
        Code(self.code)
    }

    /// Nobody knows yet whether there is an order.
    pub fn is_unknown(&self) -> bool {
        self.order == 0 && self.flags & HAD_UNKNOWN != 0 && self.flags & RESOLVED == 0
    }

    /// At some time nobody knew.
    pub fn was_unknown(&self) -> bool {
        self.flags & HAD_UNKNOWN != 0
    }

    /// Every answer was a replay, and no request was lost that could have been the original: the order is from
    /// an earlier run with the same seed.
    pub fn is_from_before(&self) -> bool {
        self.order != 0 && self.flags & (FRESH | HAD_UNKNOWN) == 0
    }

    /// The answer to a request sent after all others had ended decides.
    pub fn resolve(&mut self) {
        self.flags |= RESOLVED;
    }

    /// Enters one answer. `knew_order`: the request was sent when an acceptance of this purchase had already
    /// been received. Returns what contradicts the earlier answers.
    pub fn enter(&mut self, verdict: &Verdict, knew_order: bool) -> Option<Contradiction> {
        match verdict.effect {
            Effect::Accepted { order, replayed, as_asked } => {
                let first = self.order();
                if first.is_none() {
                    self.order = order.number();
                    self.code = verdict.code.0;
                }
                let second_fresh = !replayed && self.flags & FRESH != 0;
                if !replayed {
                    self.flags |= FRESH;
                    self.code = verdict.code.0;
                }
                match first {
                    Some(first) if first != order => {
                        Some(Contradiction::AnotherOrder { first, second: order })
                    }
                    _ if !as_asked => Some(Contradiction::NotAsAsked(order)),
                    _ if second_fresh => Some(Contradiction::ReplayNotMarked(order)),
                    _ => None,
                }
            }
            Effect::Refused => {
                if self.order == 0 {
                    self.code = verdict.code.0;
                }
                match self.order() {
                    Some(order) if knew_order && !verdict.retryable => {
                        Some(Contradiction::WinnerRefused(order, verdict.code))
                    }
                    _ => None,
                }
            }
            Effect::Unknown => {
                self.flags |= HAD_UNKNOWN;
                if self.order == 0 {
                    self.code = verdict.code.0;
                }
                None
            }
        }
    }
}

/// An answer that does not fit the ones before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contradiction {
    /// The same key got another order.
    AnotherOrder {
        /// The order it got first.
        first: OrderId,
        /// The order it got then.
        second: OrderId,
    },
    /// Accepted twice, and the second time not marked as a replay.
    ReplayNotMarked(OrderId),
    /// The acceptance names another sale or quantity than was asked for.
    NotAsAsked(OrderId),
    /// A buyer with an order who asked again under its key was refused for good.
    WinnerRefused(OrderId, Code),
}

/// Something that must not be, with the order and the buyer it is about where there is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// What kind.
    pub code: String,
    /// In words.
    pub detail: String,
    /// The order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order_id: Option<String>,
    /// The buyer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// Violations: all counted by code, the first [`VIOLATIONS_KEPT`] kept.
#[derive(Debug, Clone, Default)]
pub struct Violations {
    by_code: BTreeMap<String, u64>,
    /// The first of them.
    pub kept: Vec<Violation>,
}

impl Violations {
    /// Adds one.
    pub fn add(&mut self, violation: Violation) {
        if let Some(count) = self.by_code.get_mut(&violation.code) {
            *count += 1;
        } else {
            self.by_code.insert(violation.code.clone(), 1);
        }
        if self.kept.len() < VIOLATIONS_KEPT {
            self.kept.push(violation);
        }
    }

    /// Adds another worker's.
    pub fn merge(&mut self, other: Violations) {
        for (code, count) in other.by_code {
            *self.by_code.entry(code).or_default() += count;
        }
        let room = VIOLATIONS_KEPT.saturating_sub(self.kept.len());
        self.kept.extend(other.kept.into_iter().take(room));
    }

    /// How many of all kinds.
    pub fn count(&self) -> u64 {
        self.by_code.values().sum()
    }

    /// How many of one kind.
    pub fn count_of(&self, code: &str) -> u64 {
        self.by_code.get(code).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted(order: u64, replayed: bool) -> Verdict {
        Verdict {
            code: if replayed { Code::REPLAYED } else { Code::ACCEPTED },
            effect: Effect::Accepted {
                order: OrderId::from_number(1_000_000_010_000_000_000 + order).unwrap(),
                replayed,
                as_asked: true,
            },
            retryable: false,
            retry_after_s: None,
        }
    }

    fn refused() -> Verdict {
        Verdict { code: Code(6), effect: Effect::Refused, retryable: false, retry_after_s: None }
    }

    #[test]
    fn a_record_takes_sixteen_bytes() {
        assert_eq!(size_of::<Purchase>(), 16);
    }

    #[test]
    fn a_replay_may_overtake_the_original() {
        let mut purchase = Purchase::new(1, 0);
        assert_eq!(purchase.enter(&accepted(1, true), false), None);
        assert!(purchase.is_from_before());
        assert_eq!(purchase.enter(&accepted(1, false), false), None);
        assert!(!purchase.is_from_before());
        assert_eq!(purchase.code(), Code::ACCEPTED);
    }

    #[test]
    fn another_order_and_an_unmarked_replay_are_contradictions() {
        let mut purchase = Purchase::new(1, 0);
        purchase.enter(&accepted(1, false), false);
        assert!(matches!(purchase.enter(&accepted(2, true), true), Some(Contradiction::AnotherOrder { .. })));
        assert!(matches!(purchase.enter(&accepted(1, false), true), Some(Contradiction::ReplayNotMarked(_))));
    }

    #[test]
    fn a_winner_may_be_refused_only_by_an_answer_that_was_on_its_way() {
        let mut purchase = Purchase::new(1, 0);
        purchase.enter(&accepted(1, false), false);
        assert_eq!(purchase.enter(&refused(), false), None);
        assert!(matches!(purchase.enter(&refused(), true), Some(Contradiction::WinnerRefused(..))));
    }

    #[test]
    fn a_lost_answer_stays_unknown_until_it_is_resolved() {
        let mut purchase = Purchase::new(1, 0);
        purchase.enter(&Verdict::unknown(Code::TIMEOUT), false);
        purchase.enter(&refused(), false);
        assert!(purchase.is_unknown(), "the refusal may have come before the lost request ran");
        purchase.resolve();
        assert!(!purchase.is_unknown());
        purchase.enter(&accepted(1, true), false);
        assert!(!purchase.is_from_before(), "the lost request was the original");
    }
}
