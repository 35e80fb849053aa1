//! Amounts: units of a sale, and money in minor units of a currency.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why an amount was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMoney {
    /// Not three capital letters.
    #[error("a currency is three capital letters of ISO 4217, such as \"CNY\"")]
    Currency,
    /// Negative or beyond [`Money::MAX`].
    #[error("an amount is a whole number of minor units from 0 to {}", Money::MAX.0)]
    Amount,
    /// Zero or beyond [`Quantity::MAX`].
    #[error("a quantity is a whole number from 1 to {}", Quantity::MAX.0)]
    Quantity,
}

/// An amount of money in minor units (cents, fen), never negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize)]
#[serde(transparent)]
pub struct Money(i64);

impl Money {
    /// Nothing.
    pub const ZERO: Money = Money(0);
    /// The largest price of one unit: [`Quantity::MAX`] of them still fit an `i64`.
    pub const MAX: Money = Money(1_000_000_000_000);

    /// An amount from 0 to [`Money::MAX`].
    pub fn new(minor_units: i64) -> Result<Money, InvalidMoney> {
        if (0..=Money::MAX.0).contains(&minor_units) {
            Ok(Money(minor_units))
        } else {
            Err(InvalidMoney::Amount)
        }
    }

    /// An amount that the database or the ledger holds already.
    pub fn stored(minor_units: i64) -> Money {
        Money(minor_units.max(0))
    }

    /// The amount in minor units.
    pub fn minor_units(self) -> i64 {
        self.0
    }

    /// This price times a quantity. Cannot overflow: both factors are bounded.
    pub fn times(self, quantity: Quantity) -> Money {
        Money(self.0.saturating_mul(i64::from(quantity.get())))
    }

    /// `max(0, self − discount)`.
    pub fn less(self, discount: Money) -> Money {
        Money((self.0 - discount.0).max(0))
    }
}

impl fmt::Display for Money {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Money::new(i64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A currency code of ISO 4217, such as `CNY`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Currency([u8; 3]);

impl Currency {
    /// The code as text.
    pub fn as_str(&self) -> &str {
        // Three ASCII capitals by construction.
        std::str::from_utf8(&self.0).unwrap_or("XXX")
    }
}

impl FromStr for Currency {
    type Err = InvalidMoney;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.as_bytes() {
            [a, b, c] if [a, b, c].iter().all(|letter| letter.is_ascii_uppercase()) => {
                Ok(Currency([*a, *b, *c]))
            }
            _ => Err(InvalidMoney::Currency),
        }
    }
}

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Currency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Currency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A number of units asked for in one purchase, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Quantity(u32);

impl Quantity {
    /// One unit.
    pub const ONE: Quantity = Quantity(1);
    /// The largest quantity of one purchase; fits the three bytes that a claim has for it.
    pub const MAX: Quantity = Quantity(1_000_000);

    /// A quantity from 1 to [`Quantity::MAX`].
    pub fn new(units: u32) -> Result<Quantity, InvalidMoney> {
        if (1..=Quantity::MAX.0).contains(&units) { Ok(Quantity(units)) } else { Err(InvalidMoney::Quantity) }
    }

    /// The number of units.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let units = i64::deserialize(deserializer)?;
        u32::try_from(units)
            .map_err(|_| InvalidMoney::Quantity)
            .and_then(Quantity::new)
            .map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_order_fits() {
        assert_eq!(Money::MAX.times(Quantity::MAX).minor_units(), 1_000_000_000_000_000_000);
    }

    #[test]
    fn amounts_outside_their_range_are_refused() {
        assert!(serde_json::from_str::<Quantity>("0").is_err());
        assert!(serde_json::from_str::<Quantity>("-1").is_err());
        assert!(serde_json::from_str::<Quantity>("1e3").is_err());
        assert!(serde_json::from_str::<Quantity>("99999999999").is_err());
        assert!(serde_json::from_str::<Money>("-1").is_err());
        assert!("cny".parse::<Currency>().is_err());
        assert_eq!(Money::new(100).unwrap().less(Money::new(250).unwrap()), Money::ZERO);
    }
}
