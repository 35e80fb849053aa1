//! Tickets for event streams: a browser's `EventSource` sends no `Authorization` header.
//!
//! A ticket is its expiry in Unix seconds (8 hex digits) and the first half of
//! HMAC-SHA-256(key, order id ‖ expiry) (32 hex digits). It opens the events of that one order for a minute;
//! whoever asked for it had shown to be the order's owner.
//!
//! Every instance has to accept what another one issued, so the key is derived from what they share: the HS256
//! secrets of the users, payments and admin rings, in this order; the first signs, all verify (keys can be rotated).
//! Where there is none (EdDSA only), a random key of this process stands in, and a ticket is good for the instance
//! that issued it.

use hmac::{KeyInit, Mac};
use seckill_domain::OrderId;

use super::tokens::HmacSha256;

/// How long a ticket is good for, in seconds.
pub const TICKET_TTL_S: u32 = 60;
const KEY_PURPOSE: &[u8] = b"seckill event-stream ticket v1";
const MAC_BYTES: usize = 16;

/// Issues and checks tickets.
pub struct Tickets {
    keys: Vec<HmacSha256>,
}

impl std::fmt::Debug for Tickets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tickets").field("keys", &self.keys.len()).finish()
    }
}

impl Tickets {
    /// Derives the keys from secrets that all instances share.
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a [u8]>) -> Tickets {
        let mut keys: Vec<HmacSha256> = secrets
            .into_iter()
            .filter_map(|secret| HmacSha256::new_from_slice(secret).ok())
            .filter_map(|mut derive| {
                derive.update(KEY_PURPOSE);
                HmacSha256::new_from_slice(&derive.finalize().into_bytes()).ok()
            })
            .collect();
        if keys.is_empty() {
            let random: [u8; 32] = rand::random();
            keys.extend(HmacSha256::new_from_slice(&random).ok());
        }
        Tickets { keys }
    }

    /// A ticket for an order's events, good for [`TICKET_TTL_S`] from `now_s` (Unix seconds).
    pub fn issue(&self, order_id: OrderId, now_s: u32) -> String {
        let expires_s = now_s.saturating_add(TICKET_TTL_S);
        let mut ticket = format!("{expires_s:08x}");
        if let Some(key) = self.keys.first() {
            for byte in &mac(key, order_id, expires_s).finalize().into_bytes()[..MAC_BYTES] {
                ticket.push_str(&format!("{byte:02x}"));
            }
        }
        ticket
    }

    /// Whether a ticket opens an order's events at `now_s`.
    pub fn admits(&self, ticket: &str, order_id: OrderId, now_s: u32) -> bool {
        let digits =
            |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if ticket.len() != 8 + 2 * MAC_BYTES || !digits(ticket) {
            return false;
        }
        let Ok(expires_s) = u32::from_str_radix(&ticket[..8], 16) else { return false };
        let mut tag = [0; MAC_BYTES];
        for (index, byte) in tag.iter_mut().enumerate() {
            let at = 8 + 2 * index;
            let Ok(value) = u8::from_str_radix(&ticket[at..at + 2], 16) else { return false };
            *byte = value;
        }
        expires_s > now_s
            && expires_s <= now_s.saturating_add(TICKET_TTL_S + CLOCK_SKEW_S)
            && self.keys.iter().any(|key| mac(key, order_id, expires_s).verify_truncated_left(&tag).is_ok())
    }
}

/// How far the clocks of two instances may differ.
const CLOCK_SKEW_S: u32 = 60;

fn mac(key: &HmacSha256, order_id: OrderId, expires_s: u32) -> HmacSha256 {
    let mut mac = key.clone();
    mac.update(&order_id.number().to_be_bytes());
    mac.update(&expires_s.to_be_bytes());
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seq: u64) -> OrderId {
        OrderId::from_parts(100_000_001, seq).unwrap()
    }

    #[test]
    fn a_ticket_opens_one_order_for_one_minute() {
        let tickets = Tickets::new([&b"a secret of thirty-two bytes...."[..]]);
        let ticket = tickets.issue(order(1), 1000);
        assert!(tickets.admits(&ticket, order(1), 1000));
        assert!(tickets.admits(&ticket, order(1), 1059));
        assert!(!tickets.admits(&ticket, order(1), 1060));
        assert!(!tickets.admits(&ticket, order(2), 1000));
    }

    #[test]
    fn instances_with_the_same_secret_accept_each_others_tickets_even_in_a_rotation() {
        let (old, new) =
            (&b"old secret of thirty-two bytes..."[..], &b"new secret of thirty-two bytes..."[..]);
        let ticket = Tickets::new([old]).issue(order(1), 1000);
        assert!(Tickets::new([new, old]).admits(&ticket, order(1), 1000));
        assert!(!Tickets::new([new]).admits(&ticket, order(1), 1000));
        assert!(!Tickets::new([]).admits(&Tickets::new([]).issue(order(1), 1000), order(1), 1000));
    }

    #[test]
    fn what_is_no_ticket_opens_nothing() {
        let tickets = Tickets::new([&b"a secret of thirty-two bytes...."[..]]);
        let ticket = tickets.issue(order(1), 1000);
        let longer_life = format!("{:08x}{}", 1059, &ticket[8..]);
        for text in
            ["", "x", &ticket[1..], &ticket.to_uppercase(), &longer_life, &"é".repeat(20), &"0".repeat(40)]
        {
            assert!(!tickets.admits(text, order(1), 1000), "{text}");
        }
    }
}
