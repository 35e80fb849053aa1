//! What the service of each center reads when it starts: its configuration, keys and certificates.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::{BOTH, Centers, CentersOptions, LEASE, Which, port};
use crate::certificates::Authority;

impl Centers {
    /// The configuration of a center's service.
    pub(super) fn configuration(&self, which: Which, options: &CentersOptions) -> String {
        let dir = self.dir.path().display();
        let (id, number, first) = (which.id(), which.number(), port(self.base_port, which));
        let side = self.side(which);
        let scheme = if options.tls { "https" } else { "http" };
        let mut text = String::new();
        if let Some(queue) = options.queue {
            writeln!(text, "queue = \"{queue}\"").unwrap();
        }
        write!(
            text,
            r#"
[center]
id = "{id}"
number = {number}
[listen]
public = "127.0.0.1:{first}"
admin = "127.0.0.1:{}"
internal = "127.0.0.1:{}"
internal_url = "{scheme}://{}"
[ledger]
partitions = ["{}"]
degrade_after_ms = 2000
diverged_dir = "{dir}/{id}"
[limits]
per_user = "off"
[telemetry]
log = "seckill=info,warn"
"#,
            first + 1,
            first + 2,
            side.to_internal.address(),
            side.redis.url(),
        )
        .unwrap();
        for (ring, file) in
            [("users", "dev-token-secret"), ("admin", "admin-secret"), ("payments", "payments-secret")]
        {
            writeln!(text, "[[auth.{ring}.keys]]\nalg = \"HS256\"\nsecret_file = \"{dir}/{file}\"").unwrap();
        }
        match &side.to_etcd {
            None => writeln!(text, "[topology]\npath = \"{dir}/topology.json\"").unwrap(),
            Some(link) => writeln!(
                text,
                "[topology]\nstore = \"etcd\"\nlease_ttl_ms = {}\n[topology.etcd]\nendpoints = [\"http://{}\"]\n\
                 confirm_interval_ms = 300",
                LEASE.as_millis(),
                link.address()
            )
            .unwrap(),
        }
        if options.tls {
            writeln!(
                text,
                "[cross_center.tls]\ncert_file = \"{dir}/{id}.pem\"\nkey_file = \"{dir}/{id}-key.pem\"\n\
                 ca_file = \"{dir}/ca.pem\"\nclient_ca_file = \"{dir}/ca.pem\""
            )
            .unwrap();
        }
        for of in BOTH {
            let (other, first) = (self.side(of), port(self.base_port, of));
            writeln!(
                text,
                "[[cluster.centers]]\nid = \"{0}\"\nnumber = {1}\npublic_url = \"http://127.0.0.1:{first}\"\n\
                 admin_url = \"http://127.0.0.1:{2}\"\ninternal_url = \"{scheme}://{3}\"\nledger = [\"{4}\"]\n\
                 [[cross_center.keys]]\nid = \"{0}-1\"\ncenter = \"{0}\"\nsecret_file = \"{dir}/cross-{0}.key\"",
                of.id(),
                of.number(),
                first + 1,
                other.to_internal.address(),
                other.to_redis.address(),
            )
            .unwrap();
        }
        for (of, more) in &options.more {
            if *of == which {
                text.push_str(more);
            }
        }
        text
    }
}

/// An authority, and a certificate of it for each center.
pub(super) fn write_certificates(dir: &Path) {
    let authority = Authority::new();
    std::fs::write(dir.join("ca.pem"), authority.pem()).unwrap();
    for which in BOTH {
        let (certificate, key) = authority.issue("127.0.0.1");
        std::fs::write(dir.join(format!("{}.pem", which.id())), certificate).unwrap();
        std::fs::write(dir.join(format!("{}-key.pem", which.id())), key).unwrap();
    }
}

/// The key rings of both centers, and the tokens of an operator and of the shop's backend.
pub(super) fn write_keys(dir: &Path) {
    for center in ["a", "b"] {
        std::fs::create_dir(dir.join(center)).unwrap();
        std::fs::write(dir.join(format!("cross-{center}.key")), center.repeat(32)).unwrap();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    for (secret, token, subject) in [
        ("dev-token-secret", "", ""),
        ("admin-secret", "admin-token", "admin"),
        ("payments-secret", "payments-token", "payments"),
    ] {
        let key = format!("{secret:-<32}");
        std::fs::write(dir.join(secret), &key).unwrap();
        if !token.is_empty() {
            let key = jsonwebtoken::EncodingKey::from_secret(key.as_bytes());
            let claims = json!({"sub": subject, "exp": now + 3600});
            let signed = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap();
            std::fs::write(dir.join(token), signed).unwrap();
        }
    }
}
