//! What a server's own configuration has to say before purchases may rest on it.

use std::collections::HashMap;

use redis::aio::MultiplexedConnection;

/// Settings of a server that break what an acknowledgement means.
pub(super) async fn risks(conn: &mut MultiplexedConnection) -> Vec<String> {
    let settings: redis::RedisResult<HashMap<String, String>> = redis::cmd("CONFIG")
        .arg("GET")
        .arg("appendonly")
        .arg("appendfsync")
        .arg("maxmemory-policy")
        .query_async(conn)
        .await;
    let Ok(settings) = settings else {
        return vec![
            "the ledger's Redis does not show its configuration; appendonly yes, appendfsync always and \
             maxmemory-policy noeviction are needed"
                .to_owned(),
        ];
    };
    let wanted = [("appendonly", "yes"), ("appendfsync", "always"), ("maxmemory-policy", "noeviction")];
    wanted
        .into_iter()
        .filter_map(|(name, value)| match settings.get(name) {
            Some(found) if found == value => None,
            found => Some(format!(
                "the ledger's Redis has {name} {}, {value} is needed: acknowledged purchases can be lost",
                found.map_or("unknown", String::as_str)
            )),
        })
        .collect()
}
