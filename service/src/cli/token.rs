//! `seckill token issue`: tokens for development and for operators who hold the signing secret.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand, ValueEnum};
use seckill_domain::Uid;
use serde_json::json;

use super::exit::{Exit, Failure, Outcome};
use super::output::{Format, print, print_json};
use crate::config::{KeyConfig, KeyMaterial};

/// The longest life of a token, ten years: what is longer is a slip of the hand.
const MAX_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// `seckill token …`
#[derive(Debug, Subcommand)]
pub(super) enum TokenCommand {
    /// Sign a token (HS256)
    ///
    /// Signs with the secrets that `seckill up` leaves in its data folder, or with --secret-file.
    #[command(after_help = "\
Examples:
  seckill token issue --uid alice
  seckill token issue --uid alice --ttl 10m --data-dir /tmp/demo
  seckill token issue --role payments
  seckill token issue --role admin --secret-file admin.key --kid 2026-01 --ttl 30d")]
    Issue(IssueArgs),
}

/// `seckill token issue`
#[derive(Debug, Args)]
pub(super) struct IssueArgs {
    /// A shopper's token, for this user id
    #[arg(long, required_unless_present = "role", conflicts_with = "role")]
    uid: Option<String>,
    /// A token of the shop's backend or of an operator
    #[arg(long)]
    role: Option<Role>,
    /// Data folder of `seckill up` with the secrets
    #[arg(long, value_name = "DIR", default_value = "data")]
    data_dir: PathBuf,
    /// File with the signing secret instead: its bytes as they stand, a newline at the end aside
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// How long it is valid: 90s, 10m, 12h, 30d
    #[arg(long, default_value = "12h", value_parser = parse_ttl)]
    ttl: Duration,
    /// `kid` in the token's header
    #[arg(long)]
    kid: Option<String>,
    /// `aud` in the token
    #[arg(long, value_name = "TEXT")]
    audience: Option<String>,
    /// Claim that holds the user id
    #[arg(long, value_name = "NAME", default_value = "sub")]
    subject_claim: String,
}

/// Whose token, other than a shopper's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Role {
    /// The shop's backend: marks orders paid.
    Payments,
    /// An operator.
    Admin,
}

/// Runs `seckill token …`.
pub(super) fn run(command: TokenCommand, format: Format) -> Outcome {
    let TokenCommand::Issue(args) = command;
    let (file, subject) = match (&args.uid, args.role) {
        (Some(uid), _) => ("dev-token-secret", Uid::new(uid).map_err(Failure::error)?.to_string()),
        (None, Some(Role::Payments)) => ("payments-secret", "payments".to_owned()),
        (None, Some(Role::Admin)) => ("admin-secret", "admin".to_owned()),
        (None, None) => return Err(Failure::error("name --uid or --role")),
    };
    let path = args.secret_file.clone().unwrap_or_else(|| args.data_dir.join(file));
    let secret = match KeyConfig::hs256_file(&path).material() {
        Ok(KeyMaterial::Hs256(secret)) => secret,
        Ok(KeyMaterial::EdDsaPem(_)) => return Err(Failure::error("an HS256 secret is needed")),
        Err(error) => {
            return Err(Failure::error(format!(
                "{error}. `seckill up --data-dir D` leaves the secrets in D; --data-dir or --secret-file names others"
            )));
        }
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(Failure::error)?;
    let expires = now + args.ttl;
    let mut claims = json!({ "sub": subject, "iat": now.as_secs(), "exp": expires.as_secs() });
    if args.uid.is_some() {
        claims[&args.subject_claim] = subject.into();
    }
    if let Some(audience) = &args.audience {
        claims["aud"] = audience.as_str().into();
    }
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
    header.kid = args.kid;
    let token = jsonwebtoken::encode(&header, &claims, &jsonwebtoken::EncodingKey::from_secret(&secret))
        .map_err(Failure::error)?;
    match format {
        Format::Text => print(&token),
        Format::Json => print_json(&json!({ "token": token, "expires_at": seckill_domain::Millis(
            i64::try_from(expires.as_millis()).unwrap_or(i64::MAX)) })),
    }
    Ok(Exit::Done)
}

/// Reads `90s`, `10m`, `12h`, `30d`, or seconds.
fn parse_ttl(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        Some((at, 'd')) => (&text[..at], 24 * 3600),
        _ => (text, 1),
    };
    let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    match seconds.map(Duration::from_secs) {
        Some(ttl) if !ttl.is_zero() && ttl <= MAX_TTL => Ok(ttl),
        _ => Err("a duration such as 90s, 10m, 12h or 30d, at most ten years".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_life_time_is_a_number_with_a_unit() {
        assert_eq!(parse_ttl("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(parse_ttl("30d"), Ok(Duration::from_secs(30 * 86_400)));
        assert_eq!(parse_ttl("5"), Ok(Duration::from_secs(5)));
        for bad in ["", "0s", "m", "-1s", "1w", "99999999d", "1µ"] {
            assert!(parse_ttl(bad).is_err(), "{bad}");
        }
    }
}
