//! `seckill audit`: asks the service to compare its books, and shows what it found.

use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::client::{AdminClient, Call, ServiceArgs};
use super::exit::{Exit, Failure, Outcome};
use super::output::{Format, aligned, cell, print, print_json};

/// A million orders take some ten seconds.
const DEFAULT_TIMEOUT_S: u64 = 600;

/// `seckill audit`
#[derive(Debug, Args)]
pub(super) struct AuditArgs {
    /// Only this sale
    #[arg(long, value_name = "ID")]
    sale: Option<String>,
    /// Seconds to wait for the result
    #[arg(long, value_name = "N", default_value_t = DEFAULT_TIMEOUT_S)]
    timeout: u64,
    #[command(flatten)]
    service: ServiceArgs,
}

/// Runs `seckill audit`. It ends with 0 clean, 2 violation, 3 incomplete; with 1 only where the command itself is
/// wrong (its arguments, its token).
pub(super) async fn run(args: AuditArgs, format: Format) -> Outcome {
    let path = match &args.sale {
        Some(sale) => {
            let sale = seckill_domain::SaleId::new(sale).map_err(Failure::error)?;
            format!("/admin/v1/sales/{sale}/audit")
        }
        None => "/admin/v1/audit".to_owned(),
    };
    let client = AdminClient::new(&args.service)?;
    let call = Call::get(path).timeout(Duration::from_secs(args.timeout.max(1)));
    let report = match client.call(&call).await {
        Ok(answer) => answer.json()?,
        Err(failure) if is_ours(&failure) => return Err(failure),
        Err(failure) => return Err(Failure { exit: Exit::Audit(3), ..failure }),
    };
    match format {
        Format::Json => print_json(&report),
        Format::Text => print(&describe(&report)),
    }
    match report.get("verdict").and_then(Value::as_str) {
        Some("clean") => Ok(Exit::Audit(0)),
        Some("violation") => Ok(Exit::Audit(2)),
        Some("incomplete") => Ok(Exit::Audit(3)),
        other => Err(Failure::error(format!("the service answered with the verdict {other:?}"))),
    }
}

/// Whether the command itself is wrong, rather than something unreachable.
fn is_ours(failure: &Failure) -> bool {
    let status = failure.body.as_ref().and_then(|body| body.get("status")).and_then(Value::as_u64);
    status.is_some_and(|status| (400..500).contains(&status) && status != 429)
}

fn describe(report: &Value) -> String {
    const COLUMNS: [&str; 10] = [
        "sale",
        "total",
        "remaining",
        "claimed",
        "released",
        "created",
        "paid",
        "cancelled",
        "expired",
        "in flight",
    ];
    let sales = report.get("sales").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let rows = sales
        .iter()
        .map(|sale| {
            let field = |name: &str| cell(sale.get(name).unwrap_or(&Value::Null));
            let orders = |name: &str| cell(sale.pointer(&format!("/orders/{name}")).unwrap_or(&Value::Null));
            vec![
                field("sale_id"),
                field("total"),
                field("remaining"),
                field("claimed"),
                field("released"),
                orders("created"),
                orders("paid"),
                orders("cancelled"),
                orders("expired"),
                field("in_flight"),
            ]
        })
        .collect();
    let mut text = aligned(&COLUMNS, rows);
    let mut found = 0u64;
    let mut list = |place: &str, violations: Option<&Value>| {
        for violation in violations.and_then(Value::as_array).into_iter().flatten() {
            let field = |name: &str| cell(violation.get(name).unwrap_or(&Value::Null));
            text.push_str(&format!("violation {place}: {}: {}\n", field("code"), field("detail")));
            found += 1;
        }
    };
    for sale in sales {
        list(&cell(sale.get("sale_id").unwrap_or(&Value::Null)), sale.get("violations"));
    }
    list("everywhere", report.get("violations"));
    for problem in report.get("problems").and_then(Value::as_array).into_iter().flatten() {
        text.push_str(&format!("incomplete: {}\n", cell(problem)));
    }
    describe_queue(report, &mut text);
    let verdict = report.get("verdict").and_then(Value::as_str).unwrap_or("?");
    text.push_str(&match verdict {
        "clean" => format!("clean: {} sales agree in ledger, outbox and order tables\n", sales.len()),
        "violation" => format!("VIOLATION: {found} found\n"),
        "incomplete" => "INCOMPLETE: not everything could be compared\n".to_owned(),
        other => format!("{other}\n"),
    });
    text
}

/// How far orders are on their way through Kafka.
fn describe_queue(report: &Value, text: &mut String) {
    let Some(queue) = report.get("queue") else { return };
    let lag = cell(queue.get("consumer_lag").unwrap_or(&Value::Null));
    text.push_str(&format!("kafka: {lag} records wait to be stored\n"));
    for consumer in queue.get("consumers").and_then(Value::as_array).into_iter().flatten() {
        let field = |name: &str| cell(consumer.get(name).unwrap_or(&Value::Null));
        text.push_str(&format!("kafka: in center {}: {}\n", field("center"), field("lag")));
    }
    for relay in queue.get("relays").and_then(Value::as_array).into_iter().flatten() {
        let field = |name: &str| cell(relay.get(name).unwrap_or(&Value::Null));
        text.push_str(&format!(
            "kafka: center {} has acknowledged the outbox up to {}, {} entries before its end\n",
            field("center"),
            field("acknowledged"),
            field("behind"),
        ));
    }
}
