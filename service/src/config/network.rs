//! URLs with passwords in them, address prefixes, rates.

use std::fmt;
use std::net::IpAddr;
use std::ops::Deref;
use std::str::FromStr;

use serde::{Deserialize, Deserializer};

use crate::topology::Rate;

/// A URL whose password `Debug` and `Display` do not show. Dereferences to the whole URL.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// Wraps a URL.
    pub fn new(url: impl Into<String>) -> SecretUrl {
        SecretUrl(url.into())
    }

    /// The whole URL, password included.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The password in it, if there is one.
    pub fn password(&self) -> Option<&str> {
        self.password_range().map(|range| &self.0[range])
    }

    /// The same URL with a password in it, which must have a user and no password yet. `None` if it is not so.
    pub fn with_password(&self, password: &str) -> Option<SecretUrl> {
        let start = self.0.find("://")? + 3;
        let end = self.0[start..].find(['/', '?', '#']).map_or(self.0.len(), |at| start + at);
        let at = start + self.0[start..end].rfind('@')?;
        if at == start || self.0[start..at].contains(':') {
            return None;
        }
        let mut url = self.0[..at].to_owned();
        url.push(':');
        for byte in password.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    url.push(char::from(byte));
                }
                other => url.push_str(&format!("%{other:02X}")),
            }
        }
        url.push_str(&self.0[at..]);
        Some(SecretUrl(url))
    }

    fn password_range(&self) -> Option<std::ops::Range<usize>> {
        let start = self.0.find("://")? + 3;
        let end = self.0[start..].find(['/', '?', '#']).map_or(self.0.len(), |at| start + at);
        let at = start + self.0[start..end].rfind('@')?;
        let colon = start + self.0[start..at].find(':')?;
        (colon + 1 < at).then_some(colon + 1..at)
    }
}

impl Deref for SecretUrl {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.password_range() {
            Some(range) => write!(f, "{}***{}", &self.0[..range.start], &self.0[range.end..]),
            None => f.write_str(&self.0),
        }
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Reads a [`Rate`] or the word `off`, because TOML has no null.
pub(super) fn rate_or_off<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Rate>, D::Error> {
    struct Visitor;

    impl<'de> serde::de::Visitor<'de> for Visitor {
        type Value = Option<Rate>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("{ per_second = N, burst = N } or \"off\"")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Option<Rate>, E> {
            if text == "off" {
                Ok(None)
            } else {
                Err(E::invalid_value(serde::de::Unexpected::Str(text), &self))
            }
        }

        fn visit_map<A: serde::de::MapAccess<'de>>(self, map: A) -> Result<Option<Rate>, A::Error> {
            Rate::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(Some)
        }
    }

    deserializer.deserialize_any(Visitor)
}

/// An address or a prefix such as `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpPrefix {
    address: IpAddr,
    bits: u8,
}

impl IpPrefix {
    /// Whether an address lies within. An IPv4 address written as IPv6 counts as the IPv4 one.
    pub fn contains(&self, address: IpAddr) -> bool {
        let differ = match (self.address, address.to_canonical()) {
            (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(a.to_bits() ^ b.to_bits()) << 96,
            (IpAddr::V6(a), IpAddr::V6(b)) => a.to_bits() ^ b.to_bits(),
            _ => return false,
        };
        differ.leading_zeros() >= u32::from(self.bits)
    }
}

/// Not an address or prefix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither an address nor a prefix such as 10.0.0.0/8")]
pub struct InvalidPrefix(String);

impl FromStr for IpPrefix {
    type Err = InvalidPrefix;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidPrefix(text.to_owned());
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| invalid())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(width);
        if bits > width {
            return Err(invalid());
        }
        Ok(IpPrefix { address, bits })
    }
}

impl<'de> Deserialize<'de> for IpPrefix {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_never_shown() {
        let url = SecretUrl::new("redis://user:p@ss:w@127.0.0.1:6379/0");
        assert_eq!(url.password(), Some("p@ss:w"));
        assert_eq!(
            format!("{url:?} {url}"),
            "\"redis://user:***@127.0.0.1:6379/0\" redis://user:***@127.0.0.1:6379/0"
        );
        assert_eq!(SecretUrl::new("redis://:pw@h").to_string(), "redis://:***@h");
        for plain in ["sqlite:data/orders.db", "redis://127.0.0.1:6379", "redis://user@h/x:y@z"] {
            assert_eq!(SecretUrl::new(plain).password(), None, "{plain}");
        }
    }

    #[test]
    fn a_password_from_elsewhere_is_put_where_it_belongs() {
        let url = SecretUrl::new("mysql://shop@db:3306/orders").with_password("p@ss:/w").unwrap();
        assert_eq!(url.as_str(), "mysql://shop:p%40ss%3A%2Fw@db:3306/orders");
        assert_eq!(url.to_string(), "mysql://shop:***@db:3306/orders");
        for not in
            ["mysql://db/orders", "mysql://shop:known@db/orders", "mysql://@db/orders", "sqlite:orders.db"]
        {
            assert!(SecretUrl::new(not).with_password("secret").is_none(), "{not}");
        }
    }

    #[test]
    fn a_prefix_holds_its_addresses_and_no_others() {
        let prefix: IpPrefix = "10.1.0.0/16".parse().unwrap();
        assert!(prefix.contains("10.1.255.255".parse().unwrap()));
        assert!(prefix.contains("::ffff:10.1.2.3".parse().unwrap()));
        assert!(!prefix.contains("10.2.0.0".parse().unwrap()));
        assert!(!prefix.contains("::1".parse().unwrap()));
        let all: IpPrefix = "0.0.0.0/0".parse().unwrap();
        assert!(all.contains("255.0.0.1".parse().unwrap()));
        let one: IpPrefix = "2001:db8::1".parse().unwrap();
        assert!(
            one.contains("2001:db8::1".parse().unwrap()) && !one.contains("2001:db8::2".parse().unwrap())
        );
        for bad in ["", "10.0.0.0/33", "10.0.0.0/", "host", "::/129"] {
            assert!(bad.parse::<IpPrefix>().is_err(), "{bad}");
        }
    }
}
