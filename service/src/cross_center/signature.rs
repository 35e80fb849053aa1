//! HTTP message signatures (RFC 9421) with HMAC-SHA256, and the digest of the body (RFC 9530).
//!
//! [`signature_base`] follows the RFC for requests. What is accepted is much narrower: exactly one signature, in
//! canonical form, over exactly [`COVERED`] in that order, with the parameters `created`, `expires`, `keyid` and
//! `alg` and no others. What a request covers is then no question that the receiver has to think about.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::HeaderName;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Uri};
use sfv::{BareItem, Dictionary, FieldType, InnerList, ListEntry, Parser};
use sha2::{Digest, Sha256};

use super::keyring::MacKey;
use super::refusal::Refusal;

/// What every signature covers, in this order.
pub const COVERED: [&str; 7] =
    ["@method", "@authority", "@path", "@query", "content-digest", "seckill-epoch", "seckill-seq"];
/// How far `created` may lie from the receiver's clock, seconds.
pub const TOLERANCE_S: i64 = 30;
/// How long a signature of ours is good for, seconds. The receiver's tolerance ends it earlier or at the same time.
pub const LIFETIME_S: i64 = 30;

/// The digest of the body.
pub const CONTENT_DIGEST: HeaderName = HeaderName::from_static("content-digest");
/// What is signed, and how.
pub const SIGNATURE_INPUT: HeaderName = HeaderName::from_static("signature-input");
/// The signature.
pub const SIGNATURE: HeaderName = HeaderName::from_static("signature");
/// The epoch that the caller believes in.
pub const SECKILL_EPOCH: HeaderName = HeaderName::from_static("seckill-epoch");
/// The request's number in its session.
pub const SECKILL_SEQ: HeaderName = HeaderName::from_static("seckill-seq");

const ALGORITHM: &str = "hmac-sha256";
/// The longest signature field that is looked at, bytes: an honest one has some 250.
const MAX_FIELD_BYTES: usize = 1024;

/// The component of a signature base that is not there or not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the component {0} cannot be had from this request")]
pub struct MissingComponent(pub String);

/// The signature base of a request (RFC 9421, section 2.5): a line for each covered component, then the line of
/// the parameters. `covered` and its parameters are what `Signature-Input` says.
pub fn signature_base(
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    covered: &InnerList,
) -> Result<String, MissingComponent> {
    let mut base = String::with_capacity(512);
    for item in &covered.items {
        let name = match &item.bare_item {
            BareItem::String(name) if item.params.is_empty() => name.as_str(),
            // Parameters of components (`;sf`, `;bs`, `;req`, …) have no use here.
            _ => return Err(MissingComponent(format!("{item:?}"))),
        };
        base.push('"');
        base.push_str(name);
        base.push_str("\": ");
        push_component(&mut base, method, uri, headers, name)
            .ok_or_else(|| MissingComponent(name.to_owned()))?;
        base.push('\n');
    }
    base.push_str("\"@signature-params\": ");
    base.push_str(&serialized(covered));
    Ok(base)
}

/// The value of one component (RFC 9421, sections 2.1 and 2.2).
fn push_component(
    base: &mut String,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    name: &str,
) -> Option<()> {
    match name {
        "@method" => base.push_str(method.as_str()),
        "@authority" => base.push_str(&authority(uri, headers)?),
        "@scheme" => base.push_str(uri.scheme_str()?),
        "@path" => base.push_str(if uri.path().is_empty() { "/" } else { uri.path() }),
        "@query" => {
            base.push('?');
            base.push_str(uri.query().unwrap_or_default());
        }
        _ if name.starts_with('@') => return None,
        field => {
            let mut values = headers.get_all(field).iter();
            base.push_str(values.next()?.to_str().ok()?.trim_matches([' ', '\t']));
            for value in values {
                base.push_str(", ");
                base.push_str(value.to_str().ok()?.trim_matches([' ', '\t']));
            }
        }
    }
    Some(())
}

/// Host and port in lower case, a default port left out.
fn authority(uri: &Uri, headers: &HeaderMap) -> Option<String> {
    let given = match uri.authority() {
        Some(authority) => authority.as_str(),
        None => {
            let mut hosts = headers.get_all(http::header::HOST).iter();
            match (hosts.next(), hosts.next()) {
                (Some(host), None) => host.to_str().ok()?,
                _ => return None,
            }
        }
    };
    let mut authority = given.rsplit('@').next().unwrap_or(given).to_ascii_lowercase();
    for default in [":80", ":443"] {
        if authority.ends_with(default) {
            authority.truncate(authority.len() - default.len());
            break;
        }
    }
    Some(authority)
}

/// An inner list with its parameters, in the canonical form of RFC 9651.
fn serialized(covered: &InnerList) -> String {
    let mut serializer = sfv::ListSerializer::new();
    let mut list = serializer.inner_list();
    list.items(&covered.items);
    _ = list.finish().parameters(&covered.params);
    serializer.finish().unwrap_or_default()
}

/// `sha-256=:…:`
pub fn content_digest(body: &[u8]) -> String {
    format!("sha-256=:{}:", STANDARD.encode(Sha256::digest(body)))
}

/// What a signature of ours says besides the request itself.
#[derive(Debug, Clone, Copy)]
pub struct Signing<'a> {
    /// Name of the key: a long-term key's id, or a session's.
    pub key_id: &'a str,
    /// The key.
    pub key: &'a MacKey,
    /// The epoch that the caller believes in.
    pub epoch: u64,
    /// The request's number in its session; 0 in the request for one.
    pub seq: u64,
    /// Now, seconds since 1970.
    pub now_s: i64,
}

/// Adds digest, epoch, number and signature to a request. The URI must have an authority.
pub fn sign(parts: &mut Parts, body: &[u8], signing: &Signing<'_>) -> Result<(), MissingComponent> {
    let Signing { key_id, key, epoch, seq, now_s } = *signing;
    let visible =
        |text: String, name: &str| HeaderValue::try_from(text).map_err(|_| MissingComponent(name.to_owned()));
    parts.headers.insert(CONTENT_DIGEST, visible(content_digest(body), "content-digest")?);
    parts.headers.insert(SECKILL_EPOCH, HeaderValue::from(epoch));
    parts.headers.insert(SECKILL_SEQ, HeaderValue::from(seq));
    let mut params = String::with_capacity(256);
    params.push('(');
    for (index, name) in COVERED.iter().enumerate() {
        params.push_str(if index == 0 { "\"" } else { " \"" });
        params.push_str(name);
        params.push('"');
    }
    let expires = now_s + LIFETIME_S;
    params.push_str(&format!(");created={now_s};expires={expires};keyid=\"{key_id}\";alg=\"{ALGORITHM}\""));
    let mut base = String::with_capacity(640);
    for name in COVERED {
        base.push('"');
        base.push_str(name);
        base.push_str("\": ");
        push_component(&mut base, &parts.method, &parts.uri, &parts.headers, name)
            .ok_or_else(|| MissingComponent(name.to_owned()))?;
        base.push('\n');
    }
    base.push_str("\"@signature-params\": ");
    base.push_str(&params);
    let code = STANDARD.encode(key.sign(base.as_bytes()));
    parts.headers.insert(SIGNATURE_INPUT, visible(format!("sig={params}"), "signature-input")?);
    parts.headers.insert(SIGNATURE, visible(format!("sig=:{code}:"), "signature")?);
    Ok(())
}

/// What a request presents: everything that can be judged without the key and the body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Presented {
    /// Name of the key.
    pub key_id: String,
    /// The epoch that the caller believes in.
    pub epoch: u64,
    /// The request's number in its session.
    pub seq: u64,
    base: String,
    code: Vec<u8>,
    digest: [u8; 32],
}

impl Presented {
    /// Takes a request's signature apart and refuses everything but the one form that is accepted. `now_s` is in
    /// seconds since 1970.
    pub fn of(parts: &Parts, now_s: i64) -> Result<Presented, Refusal> {
        let headers = &parts.headers;
        let (label, covered) = match one_member(headers, &SIGNATURE_INPUT)? {
            (label, ListEntry::InnerList(covered)) => (label, covered),
            (_, ListEntry::Item(_)) => return Err(Refusal::SignatureMalformed),
        };
        let code = match one_member(headers, &SIGNATURE)? {
            (named, ListEntry::Item(item)) if named == label && item.params.is_empty() => {
                match item.bare_item {
                    BareItem::ByteSequence(code) => code,
                    _ => return Err(Refusal::SignatureMalformed),
                }
            }
            _ => return Err(Refusal::SignatureMalformed),
        };
        check_covered(&covered)?;
        let key_id = check_parameters(&covered, now_s)?;
        let number = |name: &HeaderName| -> Result<u64, Refusal> {
            let text = single(headers, name)?;
            let canonical = !text.is_empty()
                && text.bytes().all(|byte| byte.is_ascii_digit())
                && (text == "0" || !text.starts_with('0'));
            if canonical {
                text.parse().map_err(|_| Refusal::FieldInvalid)
            } else {
                Err(Refusal::FieldInvalid)
            }
        };
        let (epoch, seq) = (number(&SECKILL_EPOCH)?, number(&SECKILL_SEQ)?);
        let digest = digest_of(single(headers, &CONTENT_DIGEST)?)?;
        let base = signature_base(&parts.method, &parts.uri, headers, &covered)
            .map_err(|_| Refusal::FieldInvalid)?;
        Ok(Presented { key_id, epoch, seq, base, code, digest })
    }

    /// Whether the key made the signature.
    pub fn signed_with(&self, key: &MacKey) -> Result<(), Refusal> {
        if key.verifies(self.base.as_bytes(), &self.code) { Ok(()) } else { Err(Refusal::SignatureWrong) }
    }

    /// Whether this is the body that was signed.
    pub fn covers_body(&self, body: &[u8]) -> Result<(), Refusal> {
        let digest: [u8; 32] = Sha256::digest(body).into();
        if digest == self.digest { Ok(()) } else { Err(Refusal::DigestWrong) }
    }
}

/// The only value of a field.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<&'a str, Refusal> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().map_err(|_| Refusal::FieldInvalid),
        _ => Err(Refusal::FieldInvalid),
    }
}

/// The only member of a dictionary field in canonical form.
fn one_member(headers: &HeaderMap, name: &HeaderName) -> Result<(String, ListEntry), Refusal> {
    let mut values = headers.get_all(name).iter();
    let text = match (values.next(), values.next()) {
        (None, _) => return Err(Refusal::SignatureMissing),
        (Some(_), Some(_)) => return Err(Refusal::SignatureExtra),
        (Some(value), None) => value.to_str().map_err(|_| Refusal::SignatureMalformed)?,
    };
    if text.len() > MAX_FIELD_BYTES {
        return Err(Refusal::SignatureMalformed);
    }
    let members: Dictionary = Parser::new(text).parse().map_err(|_| Refusal::SignatureMalformed)?;
    match members.len() {
        0 => return Err(Refusal::SignatureMissing),
        1 => {}
        _ => return Err(Refusal::SignatureExtra),
    }
    // Of a label that comes twice the parser keeps the last; nothing but the canonical form is accepted.
    if members.serialize().as_deref() != Some(text) {
        return Err(Refusal::SignatureMalformed);
    }
    members
        .into_iter()
        .next()
        .map(|(label, member)| (label.as_str().to_owned(), member))
        .ok_or(Refusal::SignatureMissing)
}

fn check_covered(covered: &InnerList) -> Result<(), Refusal> {
    let names: Vec<Option<&str>> = covered
        .items
        .iter()
        .map(|item| match &item.bare_item {
            BareItem::String(name) if item.params.is_empty() => Some(name.as_str()),
            _ => None,
        })
        .collect();
    if COVERED.iter().any(|required| !names.contains(&Some(*required))) {
        return Err(Refusal::ComponentUncovered);
    }
    if names.len() != COVERED.len()
        || names.iter().zip(COVERED).any(|(name, required)| *name != Some(required))
    {
        return Err(Refusal::ComponentUnexpected);
    }
    Ok(())
}

/// Checks the four parameters; the key's name is what is left to use.
fn check_parameters(covered: &InnerList, now_s: i64) -> Result<String, Refusal> {
    let params = &covered.params;
    let integer = |name: &str| match params.get(name) {
        Some(BareItem::Integer(number)) => Ok(i64::from(*number)),
        _ => Err(Refusal::ParameterInvalid),
    };
    let text = |name: &str| match params.get(name) {
        Some(BareItem::String(text)) => Ok(text.as_str()),
        _ => Err(Refusal::ParameterInvalid),
    };
    let (created, expires) = (integer("created")?, integer("expires")?);
    let (key_id, algorithm) = (text("keyid")?, text("alg")?);
    if params.len() != 4 {
        return Err(Refusal::ParameterInvalid);
    }
    if algorithm != ALGORITHM {
        return Err(Refusal::AlgorithmWrong);
    }
    if (now_s - created).abs() > TOLERANCE_S || expires <= now_s || expires <= created {
        return Err(Refusal::Stale);
    }
    Ok(key_id.to_owned())
}

/// The SHA-256 of a `Content-Digest`, which names nothing else.
fn digest_of(text: &str) -> Result<[u8; 32], Refusal> {
    text.strip_prefix("sha-256=:")
        .and_then(|rest| rest.strip_suffix(':'))
        .and_then(|encoded| STANDARD.decode(encoded).ok())
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(Refusal::FieldInvalid)
}

#[cfg(test)]
mod tests;
