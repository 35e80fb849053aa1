//! Orders: what the ledger hands over, and what becomes of it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{OrderId, SaleId, Uid};
use crate::money::{Money, Quantity};
use crate::sale::SaleTerms;
use crate::time::Millis;

/// One accepted purchase as the outbox carries it. Complete: whoever stores the order needs nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderRecord {
    /// The order.
    pub order_id: OrderId,
    /// Whose it is.
    pub uid: Uid,
    /// What was bought.
    pub sale_id: SaleId,
    /// How many units.
    pub quantity: Quantity,
    /// Kind, price, payment window and coupon terms as they stood when it was accepted.
    pub terms: std::sync::Arc<SaleTerms>,
    /// When the ledger accepted it (the ledger's time).
    pub accepted_at: Millis,
    /// W3C trace context of the purchase, if the client sent one.
    pub traceparent: Option<Box<str>>,
}

impl OrderRecord {
    /// What the order costs: unit price × quantity.
    pub fn amount(&self) -> Money {
        self.terms.unit_price.times(self.quantity)
    }

    /// The state in which the order is stored: a claim that costs nothing (a free coupon) is settled at once.
    pub fn initial_status(&self) -> OrderStatus {
        if self.amount() == Money::ZERO { OrderStatus::Paid } else { OrderStatus::Created }
    }
}

/// Where an order stands: `created → paid`, `created → cancelled | expired`. What is not `created` is final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderStatus {
    /// Stored, waiting for payment.
    Created,
    /// Paid in time.
    Paid,
    /// Given back by the buyer.
    Cancelled,
    /// Not paid in time.
    Expired,
}

impl OrderStatus {
    /// All states.
    pub const ALL: [OrderStatus; 4] =
        [OrderStatus::Created, OrderStatus::Paid, OrderStatus::Cancelled, OrderStatus::Expired];

    /// The state's name in JSON and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            OrderStatus::Created => "created",
            OrderStatus::Paid => "paid",
            OrderStatus::Cancelled => "cancelled",
            OrderStatus::Expired => "expired",
        }
    }
}

impl fmt::Display for OrderStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A name that no state has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown state {0:?}")]
pub struct UnknownState(pub String);

impl FromStr for OrderStatus {
    type Err = UnknownState;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        OrderStatus::ALL
            .into_iter()
            .find(|status| status.as_str() == text)
            .ok_or_else(|| UnknownState(text.to_owned()))
    }
}

/// Where a coupon stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CouponState {
    /// Bought, but not paid yet.
    Pending,
    /// Can be used.
    Granted,
    /// Used in the payment of an order.
    Redeemed,
    /// Its purchase was cancelled or expired.
    Void,
}

impl CouponState {
    /// All states.
    pub const ALL: [CouponState; 4] =
        [CouponState::Pending, CouponState::Granted, CouponState::Redeemed, CouponState::Void];

    /// The state's name in JSON and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            CouponState::Pending => "pending",
            CouponState::Granted => "granted",
            CouponState::Redeemed => "redeemed",
            CouponState::Void => "void",
        }
    }
}

impl FromStr for CouponState {
    type Err = UnknownState;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        CouponState::ALL
            .into_iter()
            .find(|state| state.as_str() == text)
            .ok_or_else(|| UnknownState(text.to_owned()))
    }
}
