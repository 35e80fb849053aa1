//! `GET /v1/route`: where a user's data lives, for clients, CDN and load balancers.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::response::Response;
use http::HeaderValue;
use http::header::SET_COOKIE;
use seckill_domain::{CenterId, Epoch, Shard, Table, Uid};
use serde::Serialize;

use super::Public;
use super::call::{Call, private_json};
use super::problem::Problem;

/// How long an answer may be relied on, in seconds. A shard that moves is served from everywhere meanwhile.
const TTL_S: u32 = 30;

#[derive(Serialize)]
struct Route<'a> {
    uid: &'a Uid,
    table: Table,
    shard: Shard,
    home_center: &'a CenterId,
    master_center: &'a CenterId,
    epoch: Epoch,
    /// Public base URL of each center.
    centers: BTreeMap<&'a CenterId, &'a str>,
    ttl_s: u32,
}

pub(super) async fn route(public: Arc<Public>, call: Call) -> Result<Response, Problem> {
    let state = &public.state;
    let uid = state.tokens.user(call.bearer()?)?;
    let address = call.peer().map(|peer| state.addresses.of(peer, call.headers()));
    state.limiter.read(&uid, address)?;
    let topology = state.topology.current();
    let table = uid.table();
    let shard = table.shard();
    let mut response = private_json(&Route {
        uid: &uid,
        table,
        shard,
        home_center: topology.home_center(shard),
        master_center: &topology.master,
        epoch: topology.epoch,
        centers: topology.centers.iter().map(|(id, center)| (id, center.public_url.as_str())).collect(),
        ttl_s: TTL_S,
    })?;
    let cookie = format!("seckill_shard={shard}; Path=/; Max-Age={TTL_S}; SameSite=Lax");
    if let Ok(cookie) = HeaderValue::try_from(cookie) {
        response.headers_mut().insert(SET_COOKIE, cookie);
    }
    Ok(response)
}
