//! The client's own record of every purchase: 32 bytes each, enough to check the books afterwards.

use std::collections::BTreeMap;

use seckill_domain::OrderId;
use serde::{Deserialize, Serialize};

use crate::outcome::{Code, Effect, Seen, Verdict};

/// Violations kept with their details; the rest is only counted.
pub const VIOLATIONS_KEPT: usize = 100;

/// One purchase: everything sent under one key of one buyer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Purchase {
    order: u64,
    /// The coupon it is paid with: the number of the order that claimed it, or 0.
    pub coupon: u64,
    /// Whose purchase.
    pub user: u32,
    /// Which of the buyer's keys.
    pub key: u32,
    /// Which of the run's items was asked for.
    pub item: u8,
    /// Who asked.
    pub persona: u8,
    /// What the acceptance called the order's home, as [`crate::outcome::center_mark`]; 0: nothing.
    pub home: u8,
    code: u8,
    flags: u16,
}

const FRESH: u16 = 1;
const HAD_UNKNOWN: u16 = 2;
const RESOLVED: u16 = 4;
const PAY_SENT: u16 = 8;
const PAID: u16 = 16;
const CANCEL_SENT: u16 = 32;
const CANCELLED: u16 = 64;
const FORGED: u16 = 128;

impl Purchase {
    /// The bytes of a record in the ledger file.
    pub const BYTES: usize = 32;

    /// A purchase before its first answer.
    pub fn new(user: u32, key: u32, item: u8, persona: u8) -> Purchase {
        Purchase { order: 0, coupon: 0, user, key, item, persona, home: 0, code: Code::UNSENT.0, flags: 0 }
    }

    /// The same with a forged token: nothing may come of it.
    pub fn forged(mut self) -> Purchase {
        self.flags |= FORGED;
        self
    }

    /// As it stands in the ledger file.
    pub fn to_bytes(self) -> [u8; Purchase::BYTES] {
        let mut out = [0; Purchase::BYTES];
        out[..8].copy_from_slice(&self.order.to_le_bytes());
        out[8..16].copy_from_slice(&self.coupon.to_le_bytes());
        out[16..20].copy_from_slice(&self.user.to_le_bytes());
        out[20..24].copy_from_slice(&self.key.to_le_bytes());
        out[24..28].copy_from_slice(&[self.item, self.persona, self.home, self.code]);
        out[28..30].copy_from_slice(&self.flags.to_le_bytes());
        out
    }

    /// Reads a record of the ledger file.
    pub fn from_bytes(bytes: &[u8; Purchase::BYTES]) -> Purchase {
        fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
            std::array::from_fn(|i| bytes[at + i])
        }
        Purchase {
            order: u64::from_le_bytes(part(bytes, 0)),
            coupon: u64::from_le_bytes(part(bytes, 8)),
            user: u32::from_le_bytes(part(bytes, 16)),
            key: u32::from_le_bytes(part(bytes, 20)),
            item: bytes[24],
            persona: bytes[25],
            home: bytes[26],
            code: bytes[27],
            flags: u16::from_le_bytes(part(bytes, 28)),
        }
    }

    /// Sent with a forged token.
    pub fn is_forged(&self) -> bool {
        self.flags & FORGED != 0
    }

    /// A payment was sent, and it was acknowledged.
    pub fn paid(&self) -> (bool, bool) {
        (self.flags & PAY_SENT != 0, self.flags & PAID != 0)
    }

    /// A cancellation was sent, and it was acknowledged.
    pub fn cancelled(&self) -> (bool, bool) {
        (self.flags & CANCEL_SENT != 0, self.flags & CANCELLED != 0)
    }

    /// A payment goes out.
    pub fn pays(&mut self) {
        self.flags |= PAY_SENT;
    }

    /// A cancellation goes out.
    pub fn cancels(&mut self) {
        self.flags |= CANCEL_SENT;
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

    /// Enters the answer to a purchase, a payment or a cancellation that was carried out. `knew_order`: the request was sent when an acceptance of this purchase had already
    /// been received. Returns what contradicts the earlier answers.
    pub fn enter(&mut self, verdict: &Verdict, knew_order: bool) -> Option<Contradiction> {
        match verdict.effect {
            Effect::Accepted { order, replayed, as_asked, home } => {
                let first = self.order();
                if first.is_none() {
                    self.order = order.number();
                    self.code = verdict.code.0;
                    self.home = home;
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
                    // Of two requests under way at once a server whose own call was lost cannot tell which one was
                    // carried out; one that is sent after the answer is a replay for certain.
                    _ if second_fresh && knew_order => Some(Contradiction::ReplayNotMarked(order)),
                    _ => None,
                }
            }
            Effect::Done(Seen::Paid) => {
                self.flags |= PAID;
                None
            }
            Effect::Done(Seen::Cancelled) => {
                self.flags |= CANCELLED;
                None
            }
            Effect::Done(Seen::Sale | Seen::Order { .. }) => None,
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Violation {
    /// What kind.
    pub code: String,
    /// In words.
    pub detail: String,
    /// The order.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order_id: Option<String>,
    /// The buyer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

/// Violations: all counted by code, the first [`VIOLATIONS_KEPT`] kept.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
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
                home: 0,
            },
            failed: false,
            retryable: false,
            retry_after_s: None,
        }
    }

    fn refused() -> Verdict {
        Verdict {
            code: Code(6),
            effect: Effect::Refused,
            failed: false,
            retryable: false,
            retry_after_s: None,
        }
    }

    #[test]
    fn a_record_is_read_back_as_it_was_written() {
        let mut purchase = Purchase::new(7, 70_000, 3, 2).forged();
        purchase.enter(&accepted(5, false), false);
        purchase.coupon = u64::MAX - 1;
        purchase.pays();
        assert_eq!(Purchase::from_bytes(&purchase.to_bytes()), purchase);
    }

    #[test]
    fn a_replay_may_overtake_the_original() {
        let mut purchase = Purchase::new(1, 0, 0, 0);
        assert_eq!(purchase.enter(&accepted(1, true), false), None);
        assert!(purchase.is_from_before());
        assert_eq!(purchase.enter(&accepted(1, false), false), None);
        assert!(!purchase.is_from_before());
        assert_eq!(purchase.code(), Code::ACCEPTED);
    }

    #[test]
    fn another_order_and_an_unmarked_replay_are_contradictions() {
        let mut purchase = Purchase::new(1, 0, 0, 0);
        purchase.enter(&accepted(1, false), false);
        assert!(matches!(purchase.enter(&accepted(2, true), true), Some(Contradiction::AnotherOrder { .. })));
        assert!(matches!(purchase.enter(&accepted(1, false), true), Some(Contradiction::ReplayNotMarked(_))));
        assert_eq!(purchase.enter(&accepted(1, false), false), None, "the two were under way at once");
    }

    #[test]
    fn a_winner_may_be_refused_only_by_an_answer_that_was_on_its_way() {
        let mut purchase = Purchase::new(1, 0, 0, 0);
        purchase.enter(&accepted(1, false), false);
        assert_eq!(purchase.enter(&refused(), false), None);
        assert!(matches!(purchase.enter(&refused(), true), Some(Contradiction::WinnerRefused(..))));
    }

    #[test]
    fn a_lost_answer_stays_unknown_until_it_is_resolved() {
        let mut purchase = Purchase::new(1, 0, 0, 0);
        purchase.enter(&Verdict::unknown(Code::TIMEOUT), false);
        purchase.enter(&refused(), false);
        assert!(purchase.is_unknown(), "the refusal may have come before the lost request ran");
        purchase.resolve();
        assert!(!purchase.is_unknown());
        purchase.enter(&accepted(1, true), false);
        assert!(!purchase.is_from_before(), "the lost request was the original");
    }
}
