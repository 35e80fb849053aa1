use jsonwebtoken::{EncodingKey, encode};
use serde_json::{Value, json};

use super::*;

const USERS: &[u8] = b"users-secret-of-thirty-two-bytes";
const ADMIN: &[u8] = b"admin-secret-of-thirty-two-bytes";
/// RFC 8410: what stands before the 32 bytes of an Ed25519 key in PKCS #8 and in SubjectPublicKeyInfo.
const PRIVATE_PREFIX: &[u8] = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
const PUBLIC_PREFIX: &[u8] = b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00";

fn ed_private() -> Vec<u8> {
    [PRIVATE_PREFIX, &[7; 32]].concat()
}

fn ed_public_pem() -> String {
    let utils = &jsonwebtoken::crypto::rust_crypto::DEFAULT_PROVIDER.key_utils;
    let curve = jsonwebtoken::jwk::EllipticCurve::Ed25519;
    let public = (utils.ed_pub_components_from_private_key)(&ed_private(), &curve).unwrap();
    let base64 = base64::engine::general_purpose::STANDARD.encode([PUBLIC_PREFIX, &public].concat());
    format!("-----BEGIN PUBLIC KEY-----\n{base64}\n-----END PUBLIC KEY-----\n")
}

fn tokens() -> Tokens {
    Tokens::new(
        Ring::new(vec![Key::hs256(None, USERS).unwrap()], None, "sub"),
        Ring::new(
            vec![Key::ed25519(Some("pay-1"), ed_public_pem().as_bytes()).unwrap()],
            Some("seckill"),
            "sub",
        ),
        Ring::new(vec![Key::hs256(Some("adm"), ADMIN).unwrap()], None, "sub"),
    )
}

fn now() -> i64 {
    unix_now_s() as i64
}

#[expect(clippy::needless_pass_by_value, reason = "the calls read better with literals")]
fn signed(header: Value, claims: Value, secret: &[u8]) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(&header), part(&claims));
    let mut mac = HmacSha256::new_from_slice(secret).unwrap();
    mac.update(message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()))
}

fn user_token(claims: Value) -> String {
    signed(json!({"alg": "HS256", "typ": "JWT"}), claims, USERS)
}

#[test]
fn a_good_token_names_its_user() {
    let tokens = tokens();
    let token = user_token(json!({"sub": "bob", "exp": now() + 60}));
    // Twice: the second time the header is known.
    assert_eq!(tokens.user(&token).unwrap().as_str(), "bob");
    assert_eq!(tokens.user(&token).unwrap().as_str(), "bob");
    let by_the_library = encode(
        &jsonwebtoken::Header::default(),
        &json!({"sub": "eve", "exp": now() + 60, "iat": now(), "roles": ["x", {"y": null}]}),
        &EncodingKey::from_secret(USERS),
    );
    assert_eq!(tokens.user(&by_the_library.unwrap()).unwrap().as_str(), "eve");
}

#[test]
fn what_is_not_signed_by_the_ring_is_refused() {
    let tokens = tokens();
    let claims = json!({"sub": "bob", "exp": now() + 60});
    let good = user_token(claims.clone());
    assert!(tokens.user(&good).is_ok());
    let (message, signature) = good.rsplit_once('.').unwrap();
    let (header, payload) = message.split_once('.').unwrap();
    let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none","typ":"JWT"}"#);
    let forged = URL_SAFE_NO_PAD.encode(json!({"sub": "eve", "exp": now() + 60}).to_string());
    let ed_header = URL_SAFE_NO_PAD.encode(r#"{"alg":"EdDSA"}"#);
    for bad in [
        String::new(),
        ".".to_owned(),
        "..".to_owned(),
        "a.b.c.d".to_owned(),
        "é.é.é".to_owned(),
        format!("{none}.{payload}."),
        format!("{none}.{payload}.{signature}"),
        format!("{header}.{payload}."),
        format!("{header}.{forged}.{signature}"),
        format!("{header}.{payload}.{signature}A"),
        format!("{header}.{payload}.{}", &signature[1..]),
        format!("{ed_header}.{payload}.{signature}"),
        format!("{good}.x"),
        format!("{good}="),
        "x".repeat(MAX_TOKEN_BYTES + 1),
        signed(json!({"alg": "HS256"}), claims.clone(), b"another-secret-of-thirty-2-bytes"),
        signed(json!({"alg": "HS512"}), claims.clone(), USERS),
        signed(json!({"alg": "hs256"}), claims.clone(), USERS),
        signed(json!({"typ": "JWT"}), claims.clone(), USERS),
        signed(json!({"alg": "HS256", "crit": ["b64"], "b64": false}), claims.clone(), USERS),
        signed(json!([]), claims.clone(), USERS),
    ] {
        assert_eq!(tokens.user(&bad), Err(Unauthenticated), "{bad}");
    }
    // The public key of a ring is no HMAC secret of it.
    let confused = signed(
        json!({"alg": "HS256", "kid": "pay-1"}),
        json!({"aud": "seckill", "exp": now() + 60}),
        ed_public_pem().as_bytes(),
    );
    assert!(tokens.payments(&confused).is_err());
}

#[test]
fn a_token_of_one_ring_is_nothing_to_the_others() {
    let tokens = tokens();
    let claims = json!({"sub": "root", "exp": now() + 60, "aud": "seckill"});
    let user = user_token(claims.clone());
    let admin = signed(json!({"alg": "HS256"}), claims.clone(), ADMIN);
    assert!(tokens.user(&user).is_ok() && tokens.admin(&admin).is_ok());
    assert!(tokens.admin(&user).is_err() && tokens.payments(&user).is_err());
    assert!(tokens.user(&admin).is_err() && tokens.payments(&admin).is_err());
}

#[test]
fn the_claims_are_checked() {
    let tokens = tokens();
    for bad in [
        json!({"sub": "bob"}),
        json!({"sub": "bob", "exp": now()}),
        json!({"sub": "bob", "exp": now() - 3600}),
        json!({"sub": "bob", "exp": -1}),
        json!({"sub": "bob", "exp": "soon"}),
        json!({"sub": "bob", "exp": null}),
        json!({"sub": "bob", "exp": now() + 60, "nbf": now() + 60}),
        json!({"exp": now() + 60}),
        json!({"sub": 7, "exp": now() + 60}),
        json!({"sub": "", "exp": now() + 60}),
        json!({"sub": "a b", "exp": now() + 60}),
        json!({"sub": "böb", "exp": now() + 60}),
        json!({"sub": "a\nb", "exp": now() + 60}),
        json!({"sub": "x".repeat(129), "exp": now() + 60}),
        json!("text"),
    ] {
        assert_eq!(tokens.user(&user_token(bad.clone())), Err(Unauthenticated), "{bad}");
    }
    for good in [
        json!({"sub": "bob", "exp": 1e11}),
        json!({"sub": "x".repeat(128), "exp": now() as f64 + 60.5, "nbf": now()}),
        json!({"sub": "a\\\"b", "exp": now() + 60, "aud": ["anyone"], "padding": "x".repeat(1000)}),
    ] {
        assert!(tokens.user(&user_token(good.clone())).is_ok(), "{good}");
    }
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256"}"#);
    let twice = URL_SAFE_NO_PAD.encode(format!(r#"{{"sub":"bob","sub":"eve","exp":{}}}"#, now() + 60));
    let message = format!("{header}.{twice}");
    let mut mac = HmacSha256::new_from_slice(USERS).unwrap();
    mac.update(message.as_bytes());
    let twice = format!("{message}.{}", URL_SAFE_NO_PAD.encode(mac.finalize().into_bytes()));
    assert!(tokens.user(&twice).is_err());
}

#[test]
fn eddsa_and_the_audience_are_checked_where_configured() {
    let tokens = tokens();
    let token = |kid: Option<&str>, claims: Value| {
        let header =
            jsonwebtoken::Header { kid: kid.map(Into::into), ..jsonwebtoken::Header::new(Algorithm::EdDSA) };
        encode(&header, &claims, &EncodingKey::from_ed_der(&ed_private())).unwrap()
    };
    let exp = now() + 60;
    assert_eq!(
        tokens.payments(&token(Some("pay-1"), json!({"aud": "seckill", "exp": exp}))).unwrap(),
        Actor("payments".into())
    );
    assert_eq!(
        tokens.payments(&token(None, json!({"aud": ["x", "seckill"], "exp": exp, "sub": "shop"}))).unwrap(),
        Actor("shop".into())
    );
    for bad in [
        json!({"exp": exp}),
        json!({"aud": "other", "exp": exp}),
        json!({"aud": [], "exp": exp}),
        json!({"aud": 3, "exp": exp}),
    ] {
        assert!(tokens.payments(&token(None, bad.clone())).is_err(), "{bad}");
    }
    assert!(tokens.payments(&token(Some("pay-2"), json!({"aud": "seckill", "exp": exp}))).is_err());
}

#[test]
fn keys_are_rotated_by_kid_and_without() {
    let ring = Ring::new(
        vec![Key::hs256(Some("old"), USERS).unwrap(), Key::hs256(Some("new"), ADMIN).unwrap()],
        None,
        "user_id",
    );
    let tokens = Tokens::new(ring, Ring::new(vec![], None, "sub"), Ring::new(vec![], None, "sub"));
    let claims = json!({"user_id": "bob", "sub": "not this", "exp": now() + 60});
    for (kid, secret, passes) in [
        (json!("old"), USERS, true),
        (json!("new"), ADMIN, true),
        (json!("new"), USERS, false),
        (json!("newer"), ADMIN, false),
        (Value::Null, ADMIN, true),
        (Value::Null, USERS, true),
    ] {
        let header =
            if kid.is_null() { json!({"alg": "HS256"}) } else { json!({"alg": "HS256", "kid": kid}) };
        let user = tokens.user(&signed(header, claims.clone(), secret));
        assert_eq!(user.is_ok(), passes, "{kid}");
        assert!(user.is_err() || user.unwrap().as_str() == "bob");
    }
    assert!(tokens.admin(&signed(json!({"alg": "HS256"}), claims, b"")).is_err());
}

#[test]
fn strangers_do_not_fill_the_list_of_known_headers() {
    let tokens = tokens();
    for n in 0..100 {
        let claims = json!({"sub": "bob", "exp": now() + 60});
        assert!(tokens.user(&signed(json!({"alg": "HS256", "x": n}), claims.clone(), ADMIN)).is_err());
        assert!(tokens.user(&signed(json!({"alg": "HS256", "y": n}), claims, USERS)).is_ok());
    }
    assert_eq!(tokens.users.known_headers.load().len(), MAX_KNOWN_HEADERS);
}
