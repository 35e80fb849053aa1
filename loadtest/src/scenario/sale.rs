//! A sale that a scenario brings along.

use serde::{Deserialize, Serialize};

/// What is put on offer before the load (`POST /admin/v1/sales`), where no sale of that id exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SaleOffer {
    /// Its id.
    #[serde(rename = "id")]
    pub sale_id: String,
    /// `product` or `coupon`.
    #[serde(default = "product")]
    pub kind: String,
    /// Units.
    pub quantity: u64,
    /// Minor units.
    #[serde(default)]
    pub price: u64,
    /// The limit per user.
    #[serde(default = "one")]
    pub per_user_limit: u64,
    /// How long an order waits for its payment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payment_ttl_s: Option<u64>,
    /// What a coupon takes off, minor units.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub discount: Option<u64>,
    /// What an order must come to for the coupon, minor units.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_amount: Option<u64>,
}

fn product() -> String {
    "product".to_owned()
}

fn one() -> u64 {
    1
}

impl SaleOffer {
    /// The body of `POST /admin/v1/sales`.
    pub fn body(&self, now: jiff::Timestamp) -> serde_json::Value {
        let mut body = serde_json::json!({
            "sale_id": self.sale_id,
            "kind": self.kind,
            "title": self.sale_id,
            "quantity": self.quantity,
            "price": self.price,
            "per_user_limit": self.per_user_limit,
        });
        if let Some(ttl) = self.payment_ttl_s {
            body["payment_ttl_s"] = ttl.into();
        }
        if self.kind == "coupon" {
            body["discount"] = self.discount.unwrap_or_default().into();
            body["min_amount"] = self.min_amount.unwrap_or_default().into();
            let day = jiff::SignedDuration::from_hours(24);
            body["valid_until"] = now.checked_add(day).unwrap_or(now).to_string().into();
        }
        body
    }
}
