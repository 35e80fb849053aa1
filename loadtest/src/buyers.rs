//! The buyers: their ids, tokens and idempotency keys. All of it follows from the seed, and signing happens
//! before the run, so that a request costs the generator no cryptography.
//!
//! Only the 32 bytes of each signature are kept; the readable part of a token is written when it is sent.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

/// The most buyers of one run: 32 bytes each make 512 MiB.
pub const BUYERS_MAX: u32 = 16 * 1024 * 1024;

/// Tokens signed between two reports of progress.
const SIGNING_CHUNK: u32 = 65_536;

/// HMAC-SHA256 (RFC 2104) with the key's two blocks already hashed: half of the work of a short message.
#[derive(Clone)]
struct Hmac {
    inner: Sha256,
    outer: Sha256,
}

impl Hmac {
    fn new(key: &[u8]) -> Hmac {
        let mut block = [0u8; 64];
        if key.len() > block.len() {
            block[..32].copy_from_slice(&Sha256::digest(key));
        } else {
            block[..key.len()].copy_from_slice(key);
        }
        let keyed = |pad: u8| Sha256::new().chain_update(block.map(|byte| byte ^ pad));
        Hmac { inner: keyed(0x36), outer: keyed(0x5c) }
    }

    fn sign(&self, message: &[u8]) -> [u8; 32] {
        let inner = self.inner.clone().chain_update(message).finalize();
        self.outer.clone().chain_update(inner).finalize().into()
    }
}

/// What tokens are made of.
#[derive(Clone)]
pub struct TokenTerms<'a> {
    /// The HS256 key.
    pub secret: &'a [u8],
    /// The header's `kid`, left out if `None`.
    pub kid: Option<&'a str>,
    /// `exp`, seconds since the Unix epoch.
    pub expires_at_s: i64,
}

/// All buyers of a run.
pub struct Buyers {
    seed: u64,
    prefix: String,
    digits: usize,
    /// `base64(header).`
    token_head: String,
    expires_at_s: i64,
    signatures: Vec<[u8; 32]>,
}

impl Buyers {
    /// Signs the tokens of `count` buyers; `progress` is told how many are done after every 65,536.
    pub fn sign(
        seed: u64,
        prefix: Option<&str>,
        count: u32,
        terms: &TokenTerms<'_>,
        mut progress: impl FnMut(u32),
    ) -> Buyers {
        let mut header = serde_json::json!({"alg": "HS256", "typ": "JWT"});
        if let Some(kid) = terms.kid {
            header["kid"] = kid.into();
        }
        let mut buyers = Buyers {
            seed,
            prefix: prefix.map_or_else(|| prefix_of(seed), str::to_owned),
            digits: count.saturating_sub(1).to_string().len().max(6),
            token_head: format!("{}.", URL_SAFE_NO_PAD.encode(header.to_string())),
            expires_at_s: terms.expires_at_s,
            signatures: Vec::with_capacity(count as usize),
        };
        let hmac = Hmac::new(terms.secret);
        let mut message = Vec::with_capacity(256);
        for user in 0..count {
            message.clear();
            buyers.write_signed_part(user, &mut message);
            buyers.signatures.push(hmac.sign(&message));
            if (user + 1) % SIGNING_CHUNK == 0 {
                progress(user + 1);
            }
        }
        buyers
    }

    /// How many buyers there are.
    pub fn count(&self) -> u32 {
        self.signatures.len() as u32
    }

    /// What every uid of the run begins with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The id of a buyer: a prefix of the run and a number, ten characters below a million buyers.
    pub fn uid(&self, user: u32) -> String {
        format!("{}{user:0digits$}", self.prefix, digits = self.digits)
    }

    /// The token of a buyer.
    pub fn token(&self, user: u32) -> String {
        let mut out = Vec::new();
        self.write_token(user, &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Appends a buyer's token.
    pub fn write_token(&self, user: u32, out: &mut Vec<u8>) {
        self.write_signed_part(user, out);
        out.push(b'.');
        append_base64(&self.signatures[user as usize], out);
    }

    /// Appends a token that nobody signed for this buyer: by `kind`, a signature with one bit changed, another
    /// buyer's signature, or `"alg": "none"` without one.
    pub fn write_forged_token(&self, user: u32, kind: u32, out: &mut Vec<u8>) {
        let count = self.count();
        match kind % if count > 1 { 3 } else { 2 } {
            0 => {
                let mut signature = self.signatures[user as usize];
                signature[usize::from(signature[0]) % 32] ^= 1;
                self.write_signed_part(user, out);
                out.push(b'.');
                append_base64(&signature, out);
            }
            1 => {
                let claims = out.len() + self.token_head.len();
                self.write_signed_part(user, out);
                let claims = out.split_off(claims);
                out.truncate(out.len() - self.token_head.len());
                append_base64(br#"{"alg":"none","typ":"JWT"}"#, out);
                out.push(b'.');
                out.extend_from_slice(&claims);
                out.push(b'.');
            }
            _ => {
                self.write_signed_part(user, out);
                out.push(b'.');
                append_base64(&self.signatures[((user + 1) % count) as usize], out);
            }
        }
    }

    fn write_signed_part(&self, user: u32, out: &mut Vec<u8>) {
        out.extend_from_slice(self.token_head.as_bytes());
        // A uid has no character that JSON would escape: the prefix is checked, the rest are digits.
        let mut claims = [0u8; 192];
        let mut free = &mut claims[..];
        let room = free.len();
        let written = {
            use std::io::Write as _;
            let (exp, prefix, digits) = (self.expires_at_s, &self.prefix, self.digits);
            match write!(free, "{{\"exp\":{exp},\"sub\":\"{prefix}{user:0digits$}\"}}") {
                Ok(()) => room - free.len(),
                Err(_) => unreachable!("a uid is at most 128 bytes"),
            }
        };
        append_base64(&claims[..written], out);
    }

    /// The idempotency key of a buyer's `key`-th purchase, 36 characters in the form of a UUID.
    pub fn key(&self, user: u32, key: u32) -> String {
        let mut out = Vec::new();
        self.write_key(user, key, &mut out);
        String::from_utf8_lossy(&out).into_owned()
    }

    /// Appends the idempotency key of a buyer's `key`-th purchase.
    pub fn write_key(&self, user: u32, key: u32, out: &mut Vec<u8>) {
        const HEX: &[u8; 16] = b"0123456789abcdef";
        let n = u64::from(user) << 32 | u64::from(key);
        let high = mix(self.seed ^ mix(n));
        let bits = u128::from(high) << 64 | u128::from(mix(high ^ n.rotate_left(32)));
        // Version and variant of a random UUID (RFC 9562).
        let bits = bits & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
        for digit in 0..32 {
            if matches!(digit, 8 | 12 | 16 | 20) {
                out.push(b'-');
            }
            out.push(HEX[(bits >> (124 - 4 * digit)) as usize & 0xf]);
        }
    }
}

fn append_base64(bytes: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + bytes.len().div_ceil(3) * 4, 0);
    match URL_SAFE_NO_PAD.encode_slice(bytes, &mut out[start..]) {
        Ok(written) => out.truncate(start + written),
        Err(_) => unreachable!("base64 takes four bytes for three"),
    }
}

/// Four characters that tell the buyers of two runs apart.
pub fn prefix_of(seed: u64) -> String {
    const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let bits = mix(seed);
    (0..4).map(|i| char::from(ALPHABET[(bits >> (5 * i)) as usize & 31])).collect()
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): every choice of a run is a hash of the seed and a
/// number, so that it does not depend on the order of events.
pub fn mix(n: u64) -> u64 {
    let z = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The same seed, buyer and purpose always give the same number in `0.0..1.0`.
pub fn chance(seed: u64, n: u64, purpose: u64) -> f64 {
    (mix(seed ^ mix(n ^ mix(purpose))) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const SECRET: &[u8] = b"a secret of the test, long enough to be one";

    fn buyers(kid: Option<&str>) -> Buyers {
        let terms = TokenTerms { secret: SECRET, kid, expires_at_s: 4_102_444_800 };
        Buyers::sign(7, None, 1000, &terms, |_| ())
    }

    #[test]
    fn tokens_pass_an_independent_verifier() {
        #[derive(serde::Deserialize)]
        struct Claims {
            sub: String,
        }
        for (kid, secret) in [(None, SECRET), (Some("k1"), SECRET), (None, &[7u8; 100][..])] {
            let terms = TokenTerms { secret, kid, expires_at_s: 4_102_444_800 };
            let buyers = Buyers::sign(7, None, 20, &terms, |_| ());
            for user in [0, 7, 19] {
                let token = jsonwebtoken::decode::<Claims>(
                    buyers.token(user),
                    &jsonwebtoken::DecodingKey::from_secret(secret),
                    &jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::HS256),
                )
                .unwrap();
                assert_eq!(token.claims.sub, buyers.uid(user));
                assert_eq!(token.header.kid.as_deref(), kid);
            }
        }
    }

    #[test]
    fn no_verifier_takes_a_forged_token() {
        let buyers = buyers(None);
        for kind in 0..3 {
            for user in [0, 5, 999] {
                let mut token = Vec::new();
                buyers.write_forged_token(user, kind, &mut token);
                let result = jsonwebtoken::decode::<serde_json::Value>(
                    &token,
                    &jsonwebtoken::DecodingKey::from_secret(SECRET),
                    &jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::HS256),
                );
                assert!(result.is_err(), "{kind}");
                assert_eq!(token.iter().filter(|byte| **byte == b'.').count(), 2, "{kind}");
            }
        }
    }

    #[test]
    fn every_purchase_has_a_key_of_its_own() {
        let buyers = buyers(None);
        let keys: HashSet<_> = (0..1000)
            .flat_map(|user| (0..3).map(move |key| (user, key)))
            .map(|(user, key)| buyers.key(user, key))
            .collect();
        assert_eq!(keys.len(), 3000);
        assert!(keys.iter().all(|key| key.len() == 36 && key.as_bytes()[14] == b'4'));
    }

    #[test]
    fn the_seed_decides_everything() {
        let (one, two) = (buyers(None), buyers(None));
        assert_eq!((one.uid(5), one.key(5, 1), one.token(5)), (two.uid(5), two.key(5, 1), two.token(5)));
        assert_eq!(one.uid(5).len(), 10);
        assert_ne!(prefix_of(1), prefix_of(2));
    }
}
