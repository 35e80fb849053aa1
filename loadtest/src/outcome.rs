//! What an answer to a purchase means: accepted, refused or unknown, by its code.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError};

use seckill_domain::OrderId;
use serde::Deserialize;

use crate::wire::Answer;

/// Codes that are known beforehand: the service's, then the generator's own.
const KNOWN: [&str; 39] = [
    "accepted",
    "replayed",
    "timeout",
    "connection_lost",
    "invalid_answer",
    "unsent",
    "sold_out",
    "insufficient_stock",
    "limit_exceeded",
    "not_started",
    "ended",
    "paused",
    "rate_limited",
    "overloaded",
    "shifting",
    "no_authority",
    "not_replicated",
    "master_unreachable",
    "ledger_full",
    "sale_not_found",
    "bad_request",
    "idempotency_key_missing",
    "idempotency_key_reused",
    "unauthenticated",
    "forbidden",
    "payload_too_large",
    "order_closed",
    "internal",
    "ok",
    "paid",
    "cancelled",
    "order_not_found",
    "coupon_unusable",
    "amount_mismatch",
    "orders_unavailable",
    "not_found",
    "http_502",
    "http_504",
    "other",
];

/// Codes a run may learn beyond the known ones; what comes after is counted as `other`.
const LEARNED_MAX: usize = 32;

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// `POST /v1/sales/{id}/purchases`.
    Purchase,
    /// The same with a forged token.
    ForgedPurchase,
    /// `GET /v1/sales/{id}`.
    ReadSale,
    /// `GET /v1/orders/{id}`.
    ReadOrder,
    /// `POST /v1/orders/{id}/pay`.
    Pay,
    /// `POST /v1/orders/{id}/cancel`.
    Cancel,
}

impl Op {
    /// All of them, in the order of their numbers.
    pub const ALL: [Op; 6] =
        [Op::Purchase, Op::ForgedPurchase, Op::ReadSale, Op::ReadOrder, Op::Pay, Op::Cancel];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Op::Purchase => "purchase",
            Op::ForgedPurchase => "forged_purchase",
            Op::ReadSale => "read_sale",
            Op::ReadOrder => "read_order",
            Op::Pay => "pay",
            Op::Cancel => "cancel",
        }
    }
}

/// A code as a small number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Code(pub u8);

impl Code {
    /// Accepted for the first time.
    pub const ACCEPTED: Code = Code(0);
    /// Accepted before, answered again.
    pub const REPLAYED: Code = Code(1);
    /// No answer in time.
    pub const TIMEOUT: Code = Code(2);
    /// The connection broke before the answer.
    pub const CONNECTION_LOST: Code = Code(3);
    /// An answer that cannot be read.
    pub const INVALID_ANSWER: Code = Code(4);
    /// Still waiting for a connection when the run ended.
    pub const UNSENT: Code = Code(5);
    /// A read was answered.
    pub const OK: Code = Code(28);
    /// A payment was taken.
    pub const PAID: Code = Code(29);
    /// An order was cancelled.
    pub const CANCELLED: Code = Code(30);
    const OTHER: Code = Code(KNOWN.len() as u8 - 1);

    /// How many numbers there can be.
    pub const SPACE: usize = KNOWN.len() + LEARNED_MAX;
}

/// The names of codes. Clones learn together; each looks into its own copy first.
#[derive(Clone, Default)]
pub struct Codes {
    learned: Arc<Mutex<Vec<String>>>,
    seen: Vec<String>,
}

impl Codes {
    /// The number of a code.
    pub fn number(&mut self, name: &str) -> Code {
        if let Some(at) = KNOWN.iter().position(|known| *known == name) {
            return Code(at as u8);
        }
        if let Some(at) = self.seen.iter().position(|seen| seen == name) {
            return Code((KNOWN.len() + at) as u8);
        }
        if self.seen.len() == LEARNED_MAX || name.len() > 64 {
            return Code::OTHER;
        }
        let mut learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
        if !learned.iter().any(|known| known == name) && learned.len() < LEARNED_MAX {
            learned.push(name.to_owned());
        }
        self.seen.clone_from(&learned);
        drop(learned);
        self.seen
            .iter()
            .position(|seen| seen == name)
            .map_or(Code::OTHER, |at| Code((KNOWN.len() + at) as u8))
    }

    /// The name of a code.
    pub fn name(&self, code: Code) -> String {
        let at = usize::from(code.0);
        match KNOWN.get(at) {
            Some(name) => (*name).to_owned(),
            None => {
                let learned = self.learned.lock().unwrap_or_else(PoisonError::into_inner);
                learned.get(at - KNOWN.len()).map_or_else(|| "other".to_owned(), String::clone)
            }
        }
    }
}

/// What became of the purchase, as far as this answer tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// There is an order.
    Accepted {
        /// Its id.
        order: OrderId,
        /// The answer carried `Idempotent-Replayed: true`.
        replayed: bool,
        /// Sale and quantity are the ones that were asked for.
        as_asked: bool,
        /// The center that the answer calls the order's home, as [`center_mark`].
        home: u8,
    },
    /// A read was answered, a payment or a cancellation carried out.
    Done(Seen),
    /// Nothing happened.
    Refused,
    /// It may have happened, or may happen yet.
    Unknown,
}

/// What an answer to something else than a purchase shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// A sale.
    Sale,
    /// An order.
    Order {
        /// How far it is.
        stage: Stage,
        /// What it comes to, minor units.
        amount: u64,
    },
    /// The order is paid.
    Paid,
    /// The order is cancelled.
    Cancelled,
}

/// How far an order is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Not stored yet.
    Queued,
    /// Stored.
    Created,
    /// Paid, cancelled, expired, or a state that this version does not know.
    Settled,
}

/// A center's id in a byte that is not 0: enough to tell the few centers of a topology apart.
pub fn center_mark(id: &str) -> u8 {
    id.bytes().fold(17u8, |mark, byte| mark.wrapping_mul(31).wrapping_add(byte)).max(1)
}

/// An answer, or its absence, understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// What it is counted as.
    pub code: Code,
    /// What it did.
    pub effect: Effect,
    /// The server failed, as far as the buyer can tell: a 5xx, whether or not anything happened, or no answer.
    pub failed: bool,
    /// The same request with the same key may be sent again.
    pub retryable: bool,
    /// How long the server asks to wait.
    pub retry_after_s: Option<u32>,
}

impl Verdict {
    /// A request whose fate is not known.
    pub fn unknown(code: Code) -> Verdict {
        Verdict { code, effect: Effect::Unknown, failed: true, retryable: true, retry_after_s: None }
    }
}

#[derive(Deserialize)]
struct Accepted<'a> {
    #[serde(borrow)]
    order_id: Cow<'a, str>,
    #[serde(borrow)]
    sale_id: Option<Cow<'a, str>>,
    quantity: Option<u64>,
    #[serde(borrow)]
    home_center: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct OrderSeen<'a> {
    #[serde(borrow)]
    status: Cow<'a, str>,
    #[serde(default)]
    amount: u64,
}

#[derive(Deserialize)]
struct Problem<'a> {
    #[serde(borrow)]
    code: Cow<'a, str>,
    retryable: Option<bool>,
    #[serde(borrow)]
    executed: Option<Cow<'a, str>>,
}

/// What was asked for, to be compared with what an acceptance says.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The sale.
    pub sale: String,
    /// The quantity of each purchase.
    pub quantity: u32,
}

/// Understands an answer to a request of this kind; purchases asked for `asked`.
pub fn judge(op: Op, answer: &Answer<'_>, asked: &Asked, codes: &mut Codes) -> Verdict {
    if (200..300).contains(&answer.status) {
        return match op {
            Op::Purchase | Op::ForgedPurchase => accepted(answer, asked),
            Op::ReadSale => done(Code::OK, Seen::Sale),
            Op::ReadOrder => order(answer),
            Op::Pay => done(Code::PAID, Seen::Paid),
            Op::Cancel => done(Code::CANCELLED, Seen::Cancelled),
        };
    }
    let problem = serde_json::from_slice::<Problem<'_>>(&answer.body).ok();
    let code = match &problem {
        Some(problem) => codes.number(&problem.code),
        None => codes.number(&format!("http_{}", answer.status)),
    };
    let executed = problem.as_ref().and_then(|problem| problem.executed.as_deref());
    let failed = answer.status >= 500 || answer.status == 408;
    // A 5xx that does not say "nothing happened" may have happened; so may a request a proxy gave up on.
    let unknown = failed && executed != Some("no");
    let retryable = unknown || problem.and_then(|problem| problem.retryable).unwrap_or(answer.status == 429);
    let effect = if unknown { Effect::Unknown } else { Effect::Refused };
    Verdict { code, effect, failed, retryable, retry_after_s: answer.retry_after_s }
}

fn done(code: Code, seen: Seen) -> Verdict {
    Verdict { code, effect: Effect::Done(seen), failed: false, retryable: false, retry_after_s: None }
}

fn accepted(answer: &Answer<'_>, asked: &Asked) -> Verdict {
    let Some((accepted, order)) = serde_json::from_slice::<Accepted<'_>>(&answer.body)
        .ok()
        .and_then(|accepted| accepted.order_id.parse().ok().map(|order| (accepted, order)))
    else {
        return Verdict::unknown(Code::INVALID_ANSWER);
    };
    let as_asked = accepted.sale_id.as_deref() == Some(asked.sale.as_str())
        && accepted.quantity == Some(u64::from(asked.quantity));
    let code = if answer.replayed { Code::REPLAYED } else { Code::ACCEPTED };
    let home = accepted.home_center.as_deref().map_or(0, center_mark);
    let effect = Effect::Accepted { order, replayed: answer.replayed, as_asked, home };
    Verdict { code, effect, failed: false, retryable: false, retry_after_s: None }
}

fn order(answer: &Answer<'_>) -> Verdict {
    match serde_json::from_slice::<OrderSeen<'_>>(&answer.body) {
        Err(_) => Verdict::unknown(Code::INVALID_ANSWER),
        Ok(order) => {
            let stage = match &*order.status {
                "queued" => Stage::Queued,
                "created" => Stage::Created,
                _ => Stage::Settled,
            };
            done(Code::OK, Seen::Order { stage, amount: order.amount })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(status: u16, body: &str) -> (String, Verdict) {
        let answer = Answer {
            status,
            close: false,
            replayed: false,
            retry_after_s: Some(2),
            body: body.as_bytes().into(),
            consumed: 0,
        };
        let mut codes = Codes::default();
        let asked = Asked { sale: "s1".to_owned(), quantity: 2 };
        let verdict = judge(Op::Purchase, &answer, &asked, &mut codes);
        (codes.name(verdict.code), verdict)
    }

    #[test]
    fn the_codes_that_have_names_here_stand_where_they_should() {
        let codes = Codes::default();
        for (code, name) in [(Code::OK, "ok"), (Code::PAID, "paid"), (Code::CANCELLED, "cancelled")] {
            assert_eq!(codes.name(code), name);
        }
        for (at, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op as usize, at);
        }
    }

    #[test]
    fn only_executed_no_makes_a_503_harmless() {
        let (code, no) = verdict(503, r#"{"code":"overloaded","retryable":true,"executed":"no"}"#);
        assert_eq!((code.as_str(), no.effect, no.retryable), ("overloaded", Effect::Refused, true));
        let (code, unknown) =
            verdict(503, r#"{"code":"not_replicated","retryable":true,"executed":"unknown"}"#);
        assert_eq!((code.as_str(), unknown.effect), ("not_replicated", Effect::Unknown));
        let (code, proxy) = verdict(502, "<html>");
        assert_eq!((code.as_str(), proxy.effect, proxy.retryable), ("http_502", Effect::Unknown, true));
    }

    #[test]
    fn a_conflict_is_final_and_a_rate_limit_is_not() {
        let (code, sold) = verdict(409, r#"{"code":"sold_out","retryable":false,"request_id":"x"}"#);
        assert_eq!((code.as_str(), sold.effect, sold.retryable), ("sold_out", Effect::Refused, false));
        let (_, limited) = verdict(429, r#"{"code":"rate_limited","retryable":true}"#);
        assert_eq!((limited.retryable, limited.retry_after_s), (true, Some(2)));
    }

    #[test]
    fn an_acceptance_of_something_else_is_noticed() {
        let id = "1000000010000000007";
        let body = |sale: &str, quantity| {
            format!(
                r#"{{"order_id":"{id}","sale_id":"{sale}","quantity":{quantity},"status":"queued","new":1}}"#
            )
        };
        for (text, expected) in [(body("s1", 2), true), (body("s2", 2), false), (body("s1", 1), false)] {
            let (_, verdict) = verdict(202, &text);
            assert!(
                matches!(verdict.effect, Effect::Accepted { as_asked, .. } if as_asked == expected),
                "{text}"
            );
        }
        assert_eq!(verdict(202, r#"{"order_id":"7"}"#).1.effect, Effect::Unknown);
    }

    #[test]
    fn codes_of_a_newer_service_are_counted_by_name_and_bounded() {
        let mut one = Codes::default();
        let mut two = one.clone();
        let new = one.number("brand_new");
        assert_eq!(two.number("brand_new"), new);
        assert_eq!(two.name(new), "brand_new");
        for i in 0..100 {
            assert!(usize::from(one.number(&format!("c{i}")).0) < Code::SPACE);
        }
        assert_eq!(one.number("c99"), Code::OTHER);
    }
}
