//! Sales: what is on offer, and the rules for describing and changing it.

use serde::{Deserialize, Serialize};

use crate::ids::SaleId;
use crate::money::{Currency, Money, Quantity};
use crate::time::Millis;

/// How long a buyer has to pay when the sale does not say, in seconds.
pub const DEFAULT_PAYMENT_TTL_S: u32 = 900;
/// The longest payment window, 30 days, in seconds.
const MAX_PAYMENT_TTL_S: u32 = 30 * 24 * 3600;
/// The largest quantity of one sale; far below 2^53, so Lua's numbers hold it exactly.
const MAX_SALE_QUANTITY: u64 = 1_000_000_000;
/// The longest title and reference, in bytes.
const MAX_TEXT_BYTES: usize = 256;

/// What is sold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SaleKind {
    /// Goods.
    Product,
    /// A coupon that lowers the price of a later payment.
    Coupon,
}

impl SaleKind {
    /// The kind's name in JSON and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            SaleKind::Product => "product",
            SaleKind::Coupon => "coupon",
        }
    }
}

/// What a coupon is worth.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CouponTerms {
    /// Taken off the amount of the order it pays for.
    pub discount: Money,
    /// The order must cost at least this much.
    #[serde(default)]
    pub min_amount: Money,
    /// Last moment of use.
    pub valid_until: Millis,
}

/// What of a sale goes into every outbox record: the ledger copies this JSON without looking inside.
/// Unknown fields are ignored, so that releases N and N+1 run side by side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaleTerms {
    /// Goods or coupon.
    pub kind: SaleKind,
    /// Price of one unit.
    pub unit_price: Money,
    /// Currency of the price.
    pub currency: Currency,
    /// Seconds a buyer has to pay.
    pub payment_ttl_s: u32,
    /// For coupons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coupon: Option<CouponTerms>,
}

/// A sale as the shop describes it: the body of `POST /admin/v1/sales`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaleSpec {
    /// The sale's id.
    pub sale_id: SaleId,
    /// Goods or coupon.
    pub kind: SaleKind,
    /// What people see.
    #[serde(default)]
    pub title: String,
    /// Units on offer at the start.
    pub quantity: u64,
    /// Price of one unit in minor units; a coupon may cost nothing.
    #[serde(default)]
    pub price: Money,
    /// Currency; the configuration's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<Currency>,
    /// The shop's own number for it, opaque to us.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Units one user may hold.
    #[serde(default = "one")]
    pub per_user_limit: u32,
    /// When purchases begin; at once if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub starts_at: Option<Millis>,
    /// When purchases end; open until ended by hand if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_at: Option<Millis>,
    /// Seconds a buyer has to pay.
    #[serde(default = "default_payment_ttl_s")]
    pub payment_ttl_s: u32,
    /// Coupons: taken off the amount of the order it pays for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discount: Option<Money>,
    /// Coupons: the order must cost at least this much.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_amount: Option<Money>,
    /// Coupons: last moment of use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_until: Option<Millis>,
}

fn one() -> u32 {
    1
}

fn default_payment_ttl_s() -> u32 {
    DEFAULT_PAYMENT_TTL_S
}

/// Why a sale's description was refused. The text names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSale {
    /// `quantity` out of range.
    #[error("quantity must be from 1 to {MAX_SALE_QUANTITY}")]
    Quantity,
    /// `per_user_limit` out of range.
    #[error("per_user_limit must be from 1 to {}", Quantity::MAX)]
    PerUserLimit,
    /// `payment_ttl_s` out of range.
    #[error("payment_ttl_s must be from 1 to {MAX_PAYMENT_TTL_S}")]
    PaymentTtl,
    /// The window is empty.
    #[error("ends_at must be after starts_at")]
    Window,
    /// A text is too long or has control characters.
    #[error("{0} must be at most {MAX_TEXT_BYTES} bytes without control characters")]
    Text(&'static str),
    /// No currency in the sale or the configuration.
    #[error("currency is missing")]
    Currency,
    /// A coupon without its terms.
    #[error("a coupon needs discount and valid_until")]
    CouponTermsMissing,
    /// A product with coupon terms.
    #[error("discount, min_amount and valid_until belong to coupons")]
    CouponTermsOnProduct,
    /// A change of what may no longer change.
    #[error("{0} cannot change once the sale has started")]
    Started(&'static str),
}

impl SaleSpec {
    /// Checks every field and fills in the default currency. Nothing is stored before this passes.
    pub fn validate(mut self, default_currency: Option<Currency>) -> Result<SaleSpec, InvalidSale> {
        self.currency = self.currency.or(default_currency);
        if self.currency.is_none() {
            return Err(InvalidSale::Currency);
        }
        if !(1..=MAX_SALE_QUANTITY).contains(&self.quantity) {
            return Err(InvalidSale::Quantity);
        }
        if !(1..=Quantity::MAX.get()).contains(&self.per_user_limit) {
            return Err(InvalidSale::PerUserLimit);
        }
        if !(1..=MAX_PAYMENT_TTL_S).contains(&self.payment_ttl_s) {
            return Err(InvalidSale::PaymentTtl);
        }
        if matches!((self.starts_at, self.ends_at), (Some(start), Some(end)) if end <= start) {
            return Err(InvalidSale::Window);
        }
        check_text("title", &self.title)?;
        check_text("reference", self.reference.as_deref().unwrap_or(""))?;
        let has_terms = self.discount.is_some() || self.min_amount.is_some() || self.valid_until.is_some();
        match self.kind {
            SaleKind::Coupon if self.discount.is_none() || self.valid_until.is_none() => {
                Err(InvalidSale::CouponTermsMissing)
            }
            SaleKind::Product if has_terms => Err(InvalidSale::CouponTermsOnProduct),
            SaleKind::Coupon | SaleKind::Product => Ok(self),
        }
    }

    /// What goes into every outbox record of this sale. The description must have been validated.
    pub fn terms(&self) -> Result<SaleTerms, InvalidSale> {
        let coupon = match (self.kind, self.discount, self.valid_until) {
            (SaleKind::Product, _, _) => None,
            (SaleKind::Coupon, Some(discount), Some(valid_until)) => {
                Some(CouponTerms { discount, min_amount: self.min_amount.unwrap_or_default(), valid_until })
            }
            (SaleKind::Coupon, _, _) => return Err(InvalidSale::CouponTermsMissing),
        };
        Ok(SaleTerms {
            kind: self.kind,
            unit_price: self.price,
            currency: self.currency.ok_or(InvalidSale::Currency)?,
            payment_ttl_s: self.payment_ttl_s,
            coupon,
        })
    }

    /// Applies a change. Before the start everything in a [`SalePatch`] may change; afterwards only `title`,
    /// `reference`, `ends_at`, `per_user_limit` (upwards) and `payment_ttl_s` (which counts for later purchases), because
    /// what people were shown when they bought has to stay true. Quantity changes go through the stock call.
    pub fn patched(mut self, patch: SalePatch, started: bool) -> Result<SaleSpec, InvalidSale> {
        if started && let Some(field) = patch.frozen_after_start() {
            return Err(InvalidSale::Started(field));
        }
        if started && patch.per_user_limit.is_some_and(|limit| limit < self.per_user_limit) {
            // Who holds more already bought it by the rules.
            return Err(InvalidSale::Started("per_user_limit to a lower number"));
        }
        self.title = patch.title.unwrap_or(self.title);
        self.reference = patch.reference.or(self.reference);
        self.price = patch.price.unwrap_or(self.price);
        self.per_user_limit = patch.per_user_limit.unwrap_or(self.per_user_limit);
        self.starts_at = patch.starts_at.or(self.starts_at);
        self.ends_at = patch.ends_at.or(self.ends_at);
        self.payment_ttl_s = patch.payment_ttl_s.unwrap_or(self.payment_ttl_s);
        self.discount = patch.discount.or(self.discount);
        self.min_amount = patch.min_amount.or(self.min_amount);
        self.valid_until = patch.valid_until.or(self.valid_until);
        self.validate(None)
    }
}

fn check_text(field: &'static str, text: &str) -> Result<(), InvalidSale> {
    if text.len() > MAX_TEXT_BYTES || text.chars().any(char::is_control) {
        return Err(InvalidSale::Text(field));
    }
    Ok(())
}

/// A change of a sale's description: the body of `PATCH /admin/v1/sales/{id}`. Absent fields stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SalePatch {
    /// What people see.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The shop's own number for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Price of one unit; before the start only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub price: Option<Money>,
    /// Units one user may hold.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_user_limit: Option<u32>,
    /// Begin of purchases; before the start only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub starts_at: Option<Millis>,
    /// End of purchases.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ends_at: Option<Millis>,
    /// Seconds a buyer has to pay, for later purchases.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payment_ttl_s: Option<u32>,
    /// Coupons, before the start only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discount: Option<Money>,
    /// Coupons, before the start only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_amount: Option<Money>,
    /// Coupons, before the start only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub valid_until: Option<Millis>,
}

impl SalePatch {
    /// A field of this change that may change before the sale's start only, if there is one.
    pub fn frozen_after_start(&self) -> Option<&'static str> {
        [
            ("price", self.price.is_some()),
            ("starts_at", self.starts_at.is_some()),
            ("discount", self.discount.is_some()),
            ("min_amount", self.min_amount.is_some()),
            ("valid_until", self.valid_until.is_some()),
        ]
        .into_iter()
        .find_map(|(field, given)| given.then_some(field))
    }
}

/// What the ledger holds of a sale's course; the window is checked beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LedgerState {
    /// Sells within its window.
    Active,
    /// Halted by hand.
    Paused,
    /// Over, by hand.
    Ended,
    /// Over, and its claims are gone.
    Archived,
}

impl LedgerState {
    /// All states.
    pub const ALL: [LedgerState; 4] =
        [LedgerState::Active, LedgerState::Paused, LedgerState::Ended, LedgerState::Archived];

    /// The state's name in the ledger.
    pub fn as_str(self) -> &'static str {
        match self {
            LedgerState::Active => "active",
            LedgerState::Paused => "paused",
            LedgerState::Ended => "ended",
            LedgerState::Archived => "archived",
        }
    }

    /// A state by the name the ledger gives it.
    pub fn from_name(name: &str) -> Option<LedgerState> {
        LedgerState::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

/// What a shopper is told of a sale's course: the `state` of `GET /v1/sales/{id}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SalePhase {
    /// Its window has not opened.
    Scheduled,
    /// Units can be bought.
    OnSale,
    /// Its window is open, nothing is left at the moment.
    SoldOut,
    /// Halted by hand.
    Paused,
    /// Over.
    Ended,
}

impl SalePhase {
    /// The phase at a moment. `starts_at` and `ends_at` bound the window as `[starts_at, ends_at)`.
    pub fn at(
        now: Millis,
        state: LedgerState,
        starts_at: Millis,
        ends_at: Option<Millis>,
        remaining: u64,
    ) -> SalePhase {
        match state {
            LedgerState::Ended | LedgerState::Archived => SalePhase::Ended,
            LedgerState::Active | LedgerState::Paused if ends_at.is_some_and(|end| now >= end) => {
                SalePhase::Ended
            }
            LedgerState::Paused => SalePhase::Paused,
            LedgerState::Active if now < starts_at => SalePhase::Scheduled,
            LedgerState::Active if remaining == 0 => SalePhase::SoldOut,
            LedgerState::Active => SalePhase::OnSale,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product() -> SaleSpec {
        serde_json::from_str(
            r#"{"sale_id":"s","kind":"product","quantity":10,"price":1999,"currency":"CNY"}"#,
        )
        .unwrap()
    }

    #[test]
    fn the_shortest_sale_is_enough() {
        let sale = product().validate(None).unwrap();
        assert_eq!((sale.per_user_limit, sale.payment_ttl_s), (1, DEFAULT_PAYMENT_TTL_S));
        let terms = serde_json::to_string(&sale.terms().unwrap()).unwrap();
        assert_eq!(terms, r#"{"kind":"product","unit_price":1999,"currency":"CNY","payment_ttl_s":900}"#);
    }

    #[test]
    fn each_field_is_checked() {
        let check = |change: fn(&mut SaleSpec), error: InvalidSale| {
            let mut sale = product();
            change(&mut sale);
            assert_eq!(sale.validate(None), Err(error));
        };
        check(|sale| sale.quantity = 0, InvalidSale::Quantity);
        check(|sale| sale.quantity = MAX_SALE_QUANTITY + 1, InvalidSale::Quantity);
        check(|sale| sale.per_user_limit = 0, InvalidSale::PerUserLimit);
        check(|sale| sale.payment_ttl_s = 0, InvalidSale::PaymentTtl);
        check(|sale| sale.title = "a\nb".into(), InvalidSale::Text("title"));
        check(|sale| sale.currency = None, InvalidSale::Currency);
        check(|sale| sale.kind = SaleKind::Coupon, InvalidSale::CouponTermsMissing);
        check(|sale| sale.discount = Some(Money::ZERO), InvalidSale::CouponTermsOnProduct);
        check(
            |sale| {
                sale.starts_at = Some(Millis(5));
                sale.ends_at = Some(Millis(5));
            },
            InvalidSale::Window,
        );
    }

    #[test]
    fn what_buyers_saw_cannot_change_after_the_start() {
        let patch = SalePatch { price: Some(Money::ZERO), ..SalePatch::default() };
        assert_eq!(product().patched(patch.clone(), true), Err(InvalidSale::Started("price")));
        assert_eq!(product().patched(patch, false).unwrap().price, Money::ZERO);
        let patch = SalePatch { title: Some("new".into()), ..SalePatch::default() };
        assert_eq!(product().patched(patch, true).unwrap().title, "new");
    }

    #[test]
    fn a_phase_follows_state_window_and_stock() {
        let at = |now, state, remaining| {
            SalePhase::at(Millis(now), state, Millis(10), Some(Millis(20)), remaining)
        };
        assert_eq!(at(9, LedgerState::Active, 5), SalePhase::Scheduled);
        assert_eq!(at(10, LedgerState::Active, 5), SalePhase::OnSale);
        assert_eq!(at(10, LedgerState::Active, 0), SalePhase::SoldOut);
        assert_eq!(at(10, LedgerState::Paused, 5), SalePhase::Paused);
        assert_eq!(at(20, LedgerState::Paused, 5), SalePhase::Ended);
        assert_eq!(at(10, LedgerState::Ended, 5), SalePhase::Ended);
    }
}
