//! `docs/openapi.yaml` against what is served.

use std::collections::BTreeSet;

use seckill_domain::{SalePatch, SaleSpec};
use serde_json::Value;

use super::shop::Shop;
use crate::http::OPENAPI;
use crate::http::problem::Code;
use crate::topology::Limits;

/// Methods and paths of the description, by its indentation: `paths:` has paths two deep and methods four deep.
fn described() -> BTreeSet<(String, String)> {
    let paths = OPENAPI.split_once("\npaths:\n").unwrap().1.split("\ncomponents:\n").next().unwrap();
    let mut found = BTreeSet::new();
    let mut path = "";
    for line in paths.lines() {
        let depth = line.len() - line.trim_start().len();
        let Some(name) = line.trim().strip_suffix(':') else { continue };
        match depth {
            2 => path = name,
            4 => assert!(found.insert((name.to_uppercase(), path.to_owned())), "{path} {name} twice"),
            _ => {}
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_route_is_described_and_every_description_is_served() {
    let shop = Shop::open().await;
    let routes = shop.public_routes.iter().chain(&shop.admin_routes);
    let served: BTreeSet<_> =
        routes.map(|(method, path)| ((*method).to_owned(), (*path).to_owned())).collect();
    assert_eq!(served, described());
    assert_eq!(shop.get("/openapi.yaml", None).await.text, OPENAPI);
    for (path, code) in [("/v1/shifts", "not_found"), ("/", "not_found"), ("/v1/sales/x/y", "not_found")] {
        shop.get(path, None).await.is_problem(404, code);
    }
    let refused = shop.call("DELETE", "/v1/sales", &[], "").await;
    refused.is_problem(405, "method_not_allowed");
    assert!(refused.header("allow").contains("GET"));
    shop.close().await;
}

#[test]
fn examples_are_what_the_service_reads() {
    let mut examples = Vec::new();
    for line in OPENAPI.lines() {
        if let Some(json) = line.trim().strip_prefix("example: {") {
            let value: Value =
                serde_json::from_str(&format!("{{{json}")).unwrap_or_else(|error| panic!("{error}: {json}"));
            examples.push(value);
        }
    }
    assert!(examples.len() > 10);
    let find = |field: &str| examples.iter().find(|value| value.get(field).is_some()).unwrap().clone();
    let spec = examples.iter().find(|value| {
        value.get("sale_id").is_some()
            && value.get("state").is_none()
            && value.get("kind").is_some()
            && value.get("quantity").is_some()
            && value.get("order_id").is_none()
    });
    serde_json::from_value::<SaleSpec>(spec.unwrap().clone()).unwrap().validate(None).unwrap();
    serde_json::from_value::<SalePatch>(
        examples
            .iter()
            .find(|value| {
                value.get("title").is_some() && value.get("sale_id").is_none() && value.get("code").is_none()
            })
            .unwrap()
            .clone(),
    )
    .unwrap();
    assert!(serde_json::from_value::<Limits>(find("per_sale")).unwrap().extra.is_empty());
}

#[test]
fn every_code_is_described() {
    let list = OPENAPI.lines().find(|line| line.contains("code: { type: string, description:")).unwrap();
    for code in Code::ALL {
        assert!(list.contains(code.as_str()), "{code:?} is missing");
    }
}
