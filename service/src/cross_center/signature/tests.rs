use http::Request;
use sfv::{Key, KeyRef};

use super::*;

/// The request of RFC 9421, appendix B.2.
fn rfc_request() -> Parts {
    Request::post("http://example.com/foo?param=Value&Pet=dog")
        .header("host", "example.com")
        .header("date", "Tue, 20 Apr 2021 02:07:55 GMT")
        .header("content-type", "application/json")
        .header(
            "content-digest",
            "sha-512=:WZDPaVn/7XgHaAy8pmojAkGWoRx2UFChF41A2svX+TaPm+AbwAgBWnrIiYllu7BNNyealdVLvRwEmTHWXvJwew==:",
        )
        .header("content-length", "18")
        .body(())
        .unwrap()
        .into_parts()
        .0
}

fn covered(input: &str) -> InnerList {
    let members: Dictionary = Parser::new(input).parse().unwrap();
    match members.into_values().next() {
        Some(ListEntry::InnerList(list)) => list,
        other => panic!("{other:?}"),
    }
}

fn base_of(parts: &Parts, input: &str) -> String {
    signature_base(&parts.method, &parts.uri, &parts.headers, &covered(input)).unwrap()
}

#[test]
fn the_example_of_section_2_5_gives_its_base() {
    let mut request = rfc_request();
    request.uri = "http://example.com/foo?param=value&pet=dog".parse().unwrap();
    let input = r#"sig1=("@method" "@authority" "@path" "content-digest" "content-length" "content-type");created=1618884473;keyid="test-key-rsa-pss""#;
    let expected = "\"@method\": POST\n\
         \"@authority\": example.com\n\
         \"@path\": /foo\n\
         \"content-digest\": sha-512=:WZDPaVn/7XgHaAy8pmojAkGWoRx2UFChF41A2svX+TaPm+AbwAgBWnrIiYllu7BNNyealdVLvRwEmTHWXvJwew==:\n\
         \"content-length\": 18\n\
         \"content-type\": application/json\n\
         \"@signature-params\": (\"@method\" \"@authority\" \"@path\" \"content-digest\" \"content-length\" \"content-type\");created=1618884473;keyid=\"test-key-rsa-pss\"";
    assert_eq!(base_of(&request, input), expected);
}

#[test]
fn the_hmac_signature_of_appendix_b_2_5_is_reproduced() {
    let secret = STANDARD
        .decode("uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ==")
        .unwrap();
    let input =
        r#"sig-b25=("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret""#;
    let base = base_of(&rfc_request(), input);
    assert_eq!(
        base,
        "\"date\": Tue, 20 Apr 2021 02:07:55 GMT\n\
         \"@authority\": example.com\n\
         \"content-type\": application/json\n\
         \"@signature-params\": (\"date\" \"@authority\" \"content-type\");created=1618884473;keyid=\"test-shared-secret\""
    );
    let key = MacKey::new(&secret);
    assert_eq!(STANDARD.encode(key.sign(base.as_bytes())), "pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=");
    let code = STANDARD.decode("pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8=").unwrap();
    assert!(key.verifies(base.as_bytes(), &code));
    assert!(!key.verifies(base.as_bytes(), &code[..31]));
}

#[test]
fn derived_components_are_those_of_section_2_2() {
    let value = |uri: &str, host: Option<&str>, name: &str| {
        let mut request = Request::get(uri);
        if let Some(host) = host {
            request = request.header("host", host);
        }
        let parts = request.body(()).unwrap().into_parts().0;
        let list = InnerList::new(vec![sfv::Item::new(sfv::String::from_string(name.to_owned()).unwrap())]);
        let base = signature_base(&parts.method, &parts.uri, &parts.headers, &list).ok()?;
        Some(base.lines().next()?.split_once(": ")?.1.to_owned())
    };
    let got = |uri: &str, name: &str| value(uri, Some("WWW.Example.com:80"), name);
    assert_eq!(got("/path?param=value", "@method").unwrap(), "GET");
    assert_eq!(got("/path?param=value", "@authority").unwrap(), "www.example.com");
    assert_eq!(got("/path?param=value", "@path").unwrap(), "/path");
    assert_eq!(
        got("/path?param=value&foo=bar&baz=bat%2Dman", "@query").unwrap(),
        "?param=value&foo=bar&baz=bat%2Dman"
    );
    assert_eq!(got("/path?queryString", "@query").unwrap(), "?queryString");
    assert_eq!(got("/path", "@query").unwrap(), "?");
    assert_eq!(value("/", Some("www.example.com:8082"), "@authority").unwrap(), "www.example.com:8082");
    assert_eq!(value("/", None, "@authority"), None);
    assert_eq!(got("/", "@status"), None);
    assert_eq!(got("/", "x-missing"), None);
}

#[test]
fn fields_are_joined_and_trimmed_as_section_2_1_says() {
    let parts = Request::get("/")
        .header("host", "www.example.com")
        .header("x-ows-header", "  Leading and trailing whitespace.  ")
        .header("cache-control", "max-age=60")
        .header("cache-control", "   must-revalidate")
        .header("x-empty-header", "")
        .body(())
        .unwrap()
        .into_parts()
        .0;
    let input = r#"s=("x-ows-header" "cache-control" "x-empty-header")"#;
    assert!(base_of(&parts, input).starts_with(
        "\"x-ows-header\": Leading and trailing whitespace.\n\
         \"cache-control\": max-age=60, must-revalidate\n\
         \"x-empty-header\": \n"
    ));
}

const NOW: i64 = 1_800_000_000;

fn signed(body: &[u8]) -> (Parts, MacKey) {
    let key = MacKey::new(&[5; 32]);
    let mut parts =
        Request::post("http://b.example:8082/internal/v1/reserve").body(()).unwrap().into_parts().0;
    sign(&mut parts, body, &Signing { key_id: "k1", key: &key, epoch: 7, seq: 3, now_s: NOW }).unwrap();
    (parts, key)
}

fn with(change: impl FnOnce(&mut Parts)) -> Result<(), Refusal> {
    let (mut parts, key) = signed(b"{}");
    change(&mut parts);
    let presented = Presented::of(&parts, NOW)?;
    presented.signed_with(&key)?;
    presented.covers_body(b"{}")
}

fn input(parts: &mut Parts, change: impl FnOnce(String) -> String) {
    let text = parts.headers[SIGNATURE_INPUT].to_str().unwrap().to_owned();
    parts.headers.insert(SIGNATURE_INPUT, HeaderValue::try_from(change(text)).unwrap());
}

#[test]
fn what_was_signed_is_accepted() {
    let (parts, key) = signed(b"{}");
    let presented = Presented::of(&parts, NOW + 29).unwrap();
    assert_eq!((presented.key_id.as_str(), presented.epoch, presented.seq), ("k1", 7, 3));
    presented.signed_with(&key).unwrap();
    presented.covers_body(b"{}").unwrap();
    assert_eq!(presented.covers_body(b"{ }"), Err(Refusal::DigestWrong));
    assert_eq!(presented.signed_with(&MacKey::new(&[6; 32])), Err(Refusal::SignatureWrong));
    assert_eq!(with(|_| ()), Ok(()));
}

#[test]
fn every_change_of_what_is_covered_is_noticed() {
    assert_eq!(with(|parts| parts.method = Method::PUT), Err(Refusal::SignatureWrong));
    for uri in [
        "http://c.example:8082/internal/v1/reserve",
        "http://b.example:8083/internal/v1/reserve",
        "http://b.example:8082/internal/v1/release",
        "http://b.example:8082/internal/v1/reserve?a=1",
        "http://b.example:8082/internal/v1/reserve/",
    ] {
        assert_eq!(with(|parts| parts.uri = uri.parse().unwrap()), Err(Refusal::SignatureWrong), "{uri}");
    }
    for (name, value) in [("seckill-epoch", "8"), ("seckill-seq", "4")] {
        let changed = with(|parts| _ = parts.headers.insert(name, HeaderValue::from_static(value)));
        assert_eq!(changed, Err(Refusal::SignatureWrong), "{name}");
        let gone = with(|parts| _ = parts.headers.remove(name));
        assert_eq!(gone, Err(Refusal::FieldInvalid), "{name}");
        let twice = with(|parts| _ = parts.headers.append(name, HeaderValue::from_static(value)));
        assert_eq!(twice, Err(Refusal::FieldInvalid), "{name}");
        for odd in ["", "07", "+7", "7 ", "18446744073709551616"] {
            let odd = with(|parts| _ = parts.headers.insert(name, HeaderValue::from_static(odd)));
            assert_eq!(odd, Err(Refusal::FieldInvalid), "{name}");
        }
    }
    let digest = content_digest(b"other");
    let other =
        with(|parts| _ = parts.headers.insert(CONTENT_DIGEST, HeaderValue::try_from(&digest).unwrap()));
    assert_eq!(other, Err(Refusal::SignatureWrong));
    for odd in ["sha-512=:AAAA:", "sha-256=:AAAA:", "", &format!("{digest}, sha-512=:AAAA:")] {
        let odd = with(|parts| _ = parts.headers.insert(CONTENT_DIGEST, HeaderValue::try_from(odd).unwrap()));
        assert_eq!(odd, Err(Refusal::FieldInvalid));
    }
}

#[test]
fn a_signature_must_have_exactly_the_one_form() {
    use Refusal::{
        AlgorithmWrong, ComponentUncovered, ComponentUnexpected, ParameterInvalid, SignatureExtra,
        SignatureMalformed, SignatureMissing,
    };
    let gone = |name: HeaderName| with(move |parts| _ = parts.headers.remove(name));
    assert_eq!(gone(SIGNATURE), Err(SignatureMissing));
    assert_eq!(gone(SIGNATURE_INPUT), Err(SignatureMissing));
    for name in [SIGNATURE, SIGNATURE_INPUT] {
        let two_lines = with(|parts| {
            let value = parts.headers[&name].clone();
            parts.headers.append(&name, value);
        });
        assert_eq!(two_lines, Err(SignatureExtra));
        let two_members = with(|parts| {
            let value = parts.headers[&name].to_str().unwrap().to_owned();
            let other = value.replacen("sig=", "sig2=", 1);
            parts.headers.insert(&name, HeaderValue::try_from(format!("{value}, {other}")).unwrap());
        });
        assert_eq!(two_members, Err(SignatureExtra));
        let same_label_twice = with(|parts| {
            let value = parts.headers[&name].to_str().unwrap().to_owned();
            parts.headers.insert(&name, HeaderValue::try_from(format!("{value}, {value}")).unwrap());
        });
        assert_eq!(same_label_twice, Err(SignatureMalformed));
        for odd in ["sig", "sig=1", "sig=\"x\"", "sig=()x", "(", &"x".repeat(2000)] {
            let odd = with(|parts| _ = parts.headers.insert(&name, HeaderValue::try_from(odd).unwrap()));
            assert_eq!(odd, Err(SignatureMalformed));
        }
    }
    let changed =
        |from: &'static str, to: &'static str| with(|parts| input(parts, |text| text.replacen(from, to, 1)));
    for name in COVERED {
        let without = with(|parts| {
            input(parts, |text| {
                let text = text.replacen(&format!("\"{name}\""), "", 1);
                text.replace("( ", "(").replace(" )", ")").replace("  ", " ")
            });
        });
        assert_eq!(without, Err(ComponentUncovered), "{name}");
    }
    assert_eq!(changed("\"@query\"", "\"@query\";req"), Err(ComponentUncovered));
    assert_eq!(changed("\"seckill-seq\"", "\"seckill-seq\" \"host\""), Err(ComponentUnexpected));
    assert_eq!(changed("\"@method\" \"@authority\"", "\"@authority\" \"@method\""), Err(ComponentUnexpected));
    assert_eq!(changed("sig=", "other="), Err(SignatureMalformed));
    assert_eq!(changed("\" \"", "\"  \""), Err(SignatureMalformed));
    assert_eq!(changed(";alg=\"hmac-sha256\"", ""), Err(ParameterInvalid));
    assert_eq!(changed(";keyid=\"k1\"", ""), Err(ParameterInvalid));
    assert_eq!(changed(";keyid=\"k1\"", ";keyid=k1"), Err(ParameterInvalid));
    assert_eq!(changed(";created=1800000000", ""), Err(ParameterInvalid));
    assert_eq!(changed(";expires=1800000030", ""), Err(ParameterInvalid));
    assert_eq!(changed(";alg", ";nonce=\"n\";alg"), Err(ParameterInvalid));
    assert_eq!(changed("hmac-sha256", "ed25519"), Err(AlgorithmWrong));
    assert_eq!(changed("keyid=\"k1\"", "keyid=\"k2\""), Err(Refusal::SignatureWrong));
    assert_eq!(changed("created=1800000000", "created=1800000001"), Err(Refusal::SignatureWrong));
}

#[test]
fn a_signature_is_good_for_thirty_seconds() {
    let (parts, _) = signed(b"{}");
    for (at, expected) in [(-31, false), (-30, true), (0, true), (29, true), (30, false), (31, false)] {
        let judged = Presented::of(&parts, NOW + at).map(|_| ());
        assert_eq!(judged, if expected { Ok(()) } else { Err(Refusal::Stale) }, "{at} s");
    }
    // A caller that makes its signature last longer is held to the tolerance all the same.
    let (mut parts, _) = signed(b"{}");
    input(&mut parts, |text| text.replace("expires=1800000030", "expires=1800009999"));
    assert_eq!(Presented::of(&parts, NOW + 31).map(|_| ()), Err(Refusal::Stale));
}

#[test]
fn our_own_form_is_the_canonical_one() {
    let (parts, _) = signed(b"{}");
    let text = parts.headers[SIGNATURE_INPUT].to_str().unwrap();
    let members: Dictionary = Parser::new(text).parse().unwrap();
    assert_eq!(members.serialize().unwrap(), text);
    let list = covered(text);
    assert_eq!(
        list.params.get(KeyRef::from_str("alg").unwrap()),
        list.params.get(&Key::from_string("alg".into()).unwrap())
    );
    let base = signature_base(&parts.method, &parts.uri, &parts.headers, &list).unwrap();
    assert_eq!(Presented::of(&parts, NOW).unwrap().base, base);
}

#[test]
fn the_example_of_the_documentation_is_what_it_says() {
    let body = br#"{"sale_id":"phone-1","deadline_ms":800,"entries":[["alice","00112233445566778899aabbccddeeff",1,2,null]]}"#;
    let key = MacKey::new(&[5; 32]);
    let (mut parts, ()) =
        Request::post("http://a.example:8082/internal/v1/reserve").body(()).unwrap().into_parts();
    let signing = Signing { key_id: "9f3c.51aa", key: &key, epoch: 7, seq: 3, now_s: NOW };
    sign(&mut parts, body, &signing).unwrap();
    let page = include_str!("../../../../docs/cross-center.md");
    let text = |name: &HeaderName| parts.headers[name].to_str().unwrap();
    let base = Presented::of(&parts, NOW).unwrap().base;
    for part in [text(&CONTENT_DIGEST), text(&SIGNATURE_INPUT), text(&SIGNATURE), &base] {
        assert!(page.contains(part), "{part}");
    }
    assert!(page.contains(std::str::from_utf8(body).unwrap()));
}
