//! Before the load: is there a target, does it have the sales, and do the tokens open what they should?

use std::time::{Duration, Instant};

use crate::books::{self, Access, Opening, SaleOpening};
use crate::client::{self, Client, Target};
use crate::plan::{CouponTerms, Plan};
use crate::run::Error;
use crate::scenario::Scenario;

/// The first calls at target and admin listener.
pub(crate) const PREFLIGHT_TIMEOUT: Duration = Duration::from_secs(5);
/// A sale that was just created reaches the public listener with its next snapshot.
const SALE_SHOWS_WITHIN: Duration = Duration::from_secs(2);

/// What was found.
pub(crate) struct Found {
    /// The books, opened; `None` where they are not kept.
    pub(crate) opening: Option<Opening>,
    /// Terms of the sales that are coupons.
    pub(crate) coupons: Vec<(String, CouponTerms)>,
}

/// Looks at target and admin listener, and puts the scenario's sales on offer.
pub(crate) async fn look(scenario: &Scenario, targets: &[Target]) -> Result<Found, Error> {
    let mut found = Found { opening: None, coupons: Vec::new() };
    let Some(admin) = &scenario.admin else {
        for target in targets {
            let connect = client::Connection::connect(target);
            tokio::time::timeout(PREFLIGHT_TIMEOUT, connect)
                .await
                .map_err(|_| Error::Unreachable(format!("cannot connect to {}", target.authority())))??;
        }
        return Ok(found);
    };
    let mut access = Access::new(Target::resolve(&admin.url).await?, &admin.token);
    for offer in &scenario.offers {
        access.offer(offer).await?;
    }
    let length =
        Duration::from_nanos(scenario.arrivals().end_ns()) + scenario.timeout + scenario.drain_timeout;
    let mut sales = Vec::new();
    for sale in scenario.all_sales() {
        let path = format!("/v1/sales/{sale}");
        let mut told = serde_json::Value::Null;
        for target in targets {
            told = wait_for(target, &path).await?;
        }
        if let Some(discount) = told["discount"].as_u64() {
            let min_amount = told["min_amount"].as_u64().unwrap_or(0);
            found.coupons.push((sale.clone(), CouponTerms { discount, min_amount }));
        }
        let ttl_s = told["payment_ttl_s"].as_u64();
        let before = access.audit(&sale).await?;
        sales.push(SaleOpening {
            per_user_limit: told["per_user_limit"].as_u64(),
            may_expire: ttl_s.is_some_and(|ttl_s| Duration::from_secs(ttl_s) <= length),
            before,
            sale_id: sale,
        });
    }
    found.opening = Some(Opening {
        access,
        sales,
        started_ms: jiff::Timestamp::now().as_millisecond(),
        shared_sale: scenario.shared_sale,
        shards_move: scenario
            .timeline
            .iter()
            .any(|step| step.run.as_ref().is_some_and(|run| run.starts_with("shards"))),
        drain_timeout: scenario.drain_timeout,
    });
    Ok(found)
}

async fn wait_for(target: &Target, path: &str) -> Result<serde_json::Value, Error> {
    let mut client = Client::new(target.clone(), PREFLIGHT_TIMEOUT);
    let patience = Instant::now() + SALE_SHOWS_WITHIN;
    loop {
        match books::get_json(&mut client, path, None).await {
            Err(books::Error::Refused { status: 404, .. }) if Instant::now() < patience => {
                tokio::time::sleep(SALE_SHOWS_WITHIN / 20).await;
            }
            result => return Ok(result?),
        }
    }
}

/// A secret that is not the target's would make a run of nothing but 401s, with books that balance.
pub(crate) async fn check_token(plan: &Plan, targets: &[Target]) -> Result<(), Error> {
    for target in targets {
        let mut client = Client::new(target.clone(), PREFLIGHT_TIMEOUT);
        let answer = client.get("/v1/route", Some(&plan.buyers.token(0))).await?;
        if matches!(answer.status, 401 | 403) {
            let text =
                "does not take the buyers' tokens: --token-secret-file or --kid is not what it expects";
            return Err(Error::Mismatch(format!("{} {text} ({})", target.authority(), answer.status)));
        }
    }
    Ok(())
}
