//! Where a request comes from, when there may be proxies in between.

use std::net::IpAddr;

use http::HeaderMap;

use crate::config::IpPrefix;

/// Addresses of `X-Forwarded-For` that are looked at, from the right.
const MAX_HOPS: usize = 16;

/// Finds a request's client address.
///
/// `X-Forwarded-For` counts only when the peer is one of the configured proxies. It is read from the right, where
/// the nearest proxy has written: the first address that is not a proxy's own is the client. What stands further
/// left was sent by the client and may say anything.
#[derive(Debug, Clone, Default)]
pub struct ClientAddress {
    trusted_proxies: Vec<IpPrefix>,
}

impl ClientAddress {
    /// Trusts these proxies.
    pub fn new(trusted_proxies: Vec<IpPrefix>) -> ClientAddress {
        ClientAddress { trusted_proxies }
    }

    /// The client of a request that came from `peer`.
    pub fn of(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        if self.trusted_proxies.is_empty() || !self.trusts(peer) {
            return peer;
        }
        let mut client = peer;
        let lines = headers.get_all("x-forwarded-for").into_iter().rev();
        let hops = lines.flat_map(|line| line.to_str().unwrap_or_default().rsplit(','));
        for hop in hops.take(MAX_HOPS) {
            // What cannot be read ends the chain: everything left of it is hearsay.
            let Some(address) = parse_hop(hop.trim()) else { return client };
            client = address;
            if !self.trusts(address) {
                break;
            }
        }
        client
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.trusted_proxies.iter().any(|prefix| prefix.contains(address))
    }
}

/// An address, with a port or not: `192.0.2.1`, `192.0.2.1:443`, `2001:db8::1`, `[2001:db8::1]:443`.
fn parse_hop(hop: &str) -> Option<IpAddr> {
    hop.parse()
        .ok()
        .or_else(|| hop.parse::<std::net::SocketAddr>().ok().map(|address| address.ip()))
        .or_else(|| hop.strip_prefix('[')?.strip_suffix(']')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(peer: &str, forwarded: &[&'static str]) -> String {
        let proxies = ["10.0.0.0/8", "2001:db8:1::/48"].map(|prefix| prefix.parse().unwrap());
        let mut headers = HeaderMap::new();
        for line in forwarded {
            headers.append("x-forwarded-for", http::HeaderValue::from_static(line));
        }
        ClientAddress::new(proxies.into()).of(peer.parse().unwrap(), &headers).to_string()
    }

    #[test]
    fn only_a_configured_proxy_may_name_the_client() {
        assert_eq!(client("192.0.2.9", &["203.0.113.1"]), "192.0.2.9");
        assert_eq!(client("10.0.0.1", &["203.0.113.1"]), "203.0.113.1");
        assert_eq!(client("10.0.0.1", &[]), "10.0.0.1");
    }

    #[test]
    fn the_client_is_the_rightmost_address_that_no_proxy_has() {
        assert_eq!(client("10.0.0.1", &["1.1.1.1, 203.0.113.1, 10.0.0.7"]), "203.0.113.1");
        assert_eq!(client("10.0.0.1", &["1.1.1.1", "203.0.113.1", "10.0.0.7"]), "203.0.113.1");
        assert_eq!(client("10.0.0.1", &["[2001:db8:2::5]:443, 10.0.0.7:80"]), "2001:db8:2::5");
        assert_eq!(client("10.0.0.1", &["10.0.0.3, 10.0.0.2"]), "10.0.0.3");
    }

    #[test]
    fn an_unreadable_hop_ends_the_chain() {
        assert_eq!(client("10.0.0.1", &["203.0.113.1, unknown, 10.0.0.7"]), "10.0.0.7");
        assert_eq!(client("10.0.0.1", &[""]), "10.0.0.1");
    }
}
