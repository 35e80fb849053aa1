//! Orders, coupons, payments and refunds as the rest of the service sees them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use seckill_domain::{
    CouponState, Currency, Millis, Money, OrderId, OrderStatus, Quantity, SaleId, SaleKind, Uid,
};
use serde::{Deserialize, Serialize};

/// A stored order; serialized, the body of `GET /v1/orders/{id}`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Order {
    /// The order.
    pub order_id: OrderId,
    /// Whose it is; not shown, because only its owner and the shop see an order.
    #[serde(skip)]
    pub uid: Uid,
    /// What was bought.
    pub sale_id: SaleId,
    /// Goods or coupon.
    pub kind: SaleKind,
    /// How many units.
    pub quantity: Quantity,
    /// Price of one unit.
    pub unit_price: Money,
    /// Currency of the amounts.
    pub currency: Currency,
    /// `unit_price × quantity`, before any coupon.
    pub amount: Money,
    /// Where it stands.
    pub status: OrderStatus,
    /// When it was stored.
    pub created_at: Millis,
    /// Until when it wants to be paid; counts only while it is `created`.
    pub expires_at: Millis,
    /// When it was paid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paid_at: Option<Millis>,
    /// When it was cancelled or expired.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub closed_at: Option<Millis>,
    /// What was paid, the coupon's discount taken off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paid_amount: Option<Money>,
    /// The coupon that was redeemed with the payment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coupon_id: Option<OrderId>,
}

impl Order {
    /// Grows with every change that a reader can see: the `id` of the order's events. 0 means not stored yet.
    pub fn version(&self) -> u64 {
        match self.status {
            OrderStatus::Created => 1,
            OrderStatus::Paid | OrderStatus::Cancelled | OrderStatus::Expired => 2,
        }
    }

    /// Whether nothing can change any more.
    pub fn is_settled(&self) -> bool {
        self.status != OrderStatus::Created
    }
}

/// An order as the shop sees it: with its owner.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdminOrder {
    /// Whose it is.
    pub uid: Uid,
    /// When the ledger accepted the purchase.
    pub accepted_at: Millis,
    /// Why it was closed, if that is neither the buyer's cancel nor expiry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The order.
    #[serde(flatten)]
    pub order: Order,
}

/// A coupon; serialized, an element of `GET /v1/coupons`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Coupon {
    /// The id of the order that claimed it.
    pub coupon_id: OrderId,
    /// Whose it is.
    #[serde(skip)]
    pub uid: Uid,
    /// The sale it came from.
    pub sale_id: SaleId,
    /// Taken off the amount of the order it pays for.
    pub discount: Money,
    /// The order must cost at least this much.
    pub min_amount: Money,
    /// Currency of the two; an order in another one cannot be paid with it.
    pub currency: Currency,
    /// Last moment of use.
    pub valid_until: Millis,
    /// Where it stands.
    pub state: CouponState,
    /// When it was stored.
    pub created_at: Millis,
    /// The order that it paid for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redeemed_by: Option<OrderId>,
}

/// The shop's name for a payment: 1–64 visible ASCII characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct PaymentId(Box<str>);

/// What is no payment id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a payment id is 1 to 64 visible ASCII characters")]
pub struct InvalidPaymentId;

impl PaymentId {
    /// Parses the text.
    pub fn new(text: &str) -> Result<PaymentId, InvalidPaymentId> {
        let visible = text.bytes().all(|byte| (0x21..=0x7e).contains(&byte));
        if (1..=64).contains(&text.len()) && visible {
            Ok(PaymentId(Box::from(text)))
        } else {
            Err(InvalidPaymentId)
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PaymentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for PaymentId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        PaymentId::new(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A payment that the shop reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payment {
    /// What was paid for.
    pub order_id: OrderId,
    /// The shop's name for it.
    pub payment_id: PaymentId,
    /// What was paid.
    pub amount: Money,
    /// A coupon of the same user that lowers the sum.
    pub coupon_id: Option<OrderId>,
}

/// What became of a payment.
#[derive(Debug, Clone, PartialEq)]
pub enum PayOutcome {
    /// The order is paid.
    Paid(Order),
    /// This very payment paid the order before.
    Replay(Order),
    /// The order is paid by another payment, cancelled or expired. The money is on the refunds list, once.
    Closed {
        /// The order as it stands.
        order: Order,
        /// What has to go back.
        refund: Refund,
    },
    /// Another sum is due. Nothing was recorded.
    AmountMismatch {
        /// `max(0, amount − discount)`.
        due: Money,
    },
    /// The coupon cannot be used for this order. Nothing was recorded.
    CouponUnusable {
        /// Why.
        reason: &'static str,
    },
    /// The payment id was used before with another sum, coupon or order. Nothing was recorded.
    PaymentIdReused,
    /// There is no such order.
    NotFound,
}

/// What became of a buyer's cancel.
#[derive(Debug, Clone, PartialEq)]
pub enum CancelOutcome {
    /// The order is cancelled; its units go back on sale.
    Cancelled(Order),
    /// It was cancelled before.
    Already(Order),
    /// It is paid or expired.
    Closed(Order),
    /// The user has no such order.
    NotFound,
}

/// Money that has to go back to a buyer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Refund {
    /// The payment that came too late.
    pub payment_id: PaymentId,
    /// The order it was meant for.
    pub order_id: OrderId,
    /// Whose it is.
    pub uid: Uid,
    /// Of which sale.
    pub sale_id: SaleId,
    /// The sum.
    pub amount: Money,
    /// Its currency.
    pub currency: Currency,
    /// How the order stood when the payment came.
    pub order_status: OrderStatus,
    /// When the payment came.
    pub created_at: Millis,
}

/// What a round of expiry did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExpireOutcome {
    /// Orders that expired.
    pub expired: u64,
    /// Whether there may be more due right now.
    pub more: bool,
}

/// Why units go back to the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReleaseReason {
    /// The order was cancelled.
    Cancelled,
    /// The order expired.
    Expired,
}

impl ReleaseReason {
    /// The reason's name in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            ReleaseReason::Cancelled => "cancelled",
            ReleaseReason::Expired => "expired",
        }
    }
}

/// An order whose units wait to be given back to the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Release {
    /// The order.
    pub order_id: OrderId,
    /// Whose it was.
    pub uid: Uid,
    /// Of which sale.
    pub sale_id: SaleId,
    /// Its place in the queue: a release that is asked for again moves to the end.
    pub place: i64,
}

/// Orders and units in one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct StatusCounts {
    /// Orders.
    pub orders: u64,
    /// Units.
    pub units: u64,
}

/// The stored orders of one sale, for the audit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SaleCounts {
    /// By state.
    pub by_status: BTreeMap<&'static str, StatusCounts>,
    /// Cancelled or expired, but not known to be back in the ledger yet.
    pub releasing: StatusCounts,
    /// Cancelled or expired, but the ledger answered that it holds no such claim.
    pub release_unknown: StatusCounts,
}

impl SaleCounts {
    /// Orders and units in a state.
    pub fn of(&self, status: OrderStatus) -> StatusCounts {
        self.by_status.get(status.as_str()).copied().unwrap_or_default()
    }
}

/// Which orders an admin asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OrderFilter {
    /// Of this user.
    pub uid: Option<Uid>,
    /// Of this sale.
    pub sale_id: Option<SaleId>,
    /// In this state.
    pub status: Option<OrderStatus>,
}

/// Some rows of a list.
#[derive(Debug, Clone, PartialEq)]
pub struct Page<T> {
    /// The rows.
    pub items: Vec<T>,
    /// Where the next page begins; absent on the last one.
    pub next: Option<Cursor>,
}

/// Where a page of a list begins. Opaque to clients: base64 of the last row's place in the order of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub(crate) at: i64,
    pub(crate) id: u64,
}

/// What is no cursor of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a cursor of this list")]
pub struct InvalidCursor;

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.at.to_be_bytes());
        bytes[8..].copy_from_slice(&self.id.to_be_bytes());
        f.write_str(&URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for Cursor {
    type Err = InvalidCursor;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // 16 bytes are 22 characters; anything longer is not worth decoding.
        if text.len() != 22 {
            return Err(InvalidCursor);
        }
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| InvalidCursor)?;
        let number = |range: std::ops::Range<usize>| -> Result<[u8; 8], InvalidCursor> {
            bytes.get(range).and_then(|part| part.try_into().ok()).ok_or(InvalidCursor)
        };
        Ok(Cursor { at: i64::from_be_bytes(number(0..8)?), id: u64::from_be_bytes(number(8..16)?) })
    }
}

impl Serialize for Cursor {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cursor {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_survives_text_and_nothing_else_is_one() {
        let cursor = Cursor { at: 1_732_150_000_120, id: 1_003_000_001_000_000_042 };
        assert_eq!(cursor.to_string().parse::<Cursor>(), Ok(cursor));
        for text in ["", "x", &"!".repeat(22), &"A".repeat(23), "é", &"é".repeat(11)] {
            assert_eq!(text.parse::<Cursor>(), Err(InvalidCursor), "{text:?}");
        }
    }

    #[test]
    fn a_payment_id_keeps_to_its_alphabet() {
        assert!(PaymentId::new(&"p".repeat(64)).is_ok());
        for text in ["", "a b", "é", "a\0", &"p".repeat(65)] {
            assert_eq!(PaymentId::new(text), Err(InvalidPaymentId), "{text:?}");
        }
    }
}
