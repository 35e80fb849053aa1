//! `seckill audit`: asks the service to compare its books, and shows what it found.

use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::client::{AdminClient, Call, ServiceArgs};
use super::exit::{Exit, Failure, Outcome};
use super::output::{Format, aligned, cell, print, print_json};

/// A million orders take some ten seconds.
const DEFAULT_TIMEOUT_S: u64 = 600;
/// Lost orders of a sale that are named in text: one line on a screen.
const NAMED: usize = 5;

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
    // After a loss: columns that are empty everywhere else.
    const LOSS: [(&str, &str); 2] = [("reclaimed", "claimed again"), ("accepted_loss", "accepted loss")];
    let sales = report.get("sales").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let number = |sale: &Value, name: &str| sale.get(name).and_then(Value::as_u64).unwrap_or(0);
    let loss: Vec<_> =
        LOSS.into_iter().filter(|(name, _)| sales.iter().any(|sale| number(sale, name) > 0)).collect();
    let rows = sales
        .iter()
        .map(|sale| {
            let field = |name: &str| cell(sale.get(name).unwrap_or(&Value::Null));
            let orders = |name: &str| cell(sale.pointer(&format!("/orders/{name}")).unwrap_or(&Value::Null));
            let mut row = vec![
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
            ];
            row.extend(loss.iter().map(|(name, _)| field(name)));
            row
        })
        .collect();
    let header: Vec<&str> = COLUMNS.into_iter().chain(loss.iter().map(|(_, title)| *title)).collect();
    let mut text = aligned(&header, rows);
    for sale in sales {
        lost_orders(sale, number(sale, "accepted_loss"), &mut text);
    }
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

/// Orders of a sale that are gone, some of them by name: the JSON has up to a hundred.
fn lost_orders(sale: &Value, lost: u64, text: &mut String) {
    let names = sale.get("lost_orders").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let named: Vec<String> = names.iter().take(NAMED).map(cell).collect();
    if named.is_empty() {
        return;
    }
    let rest = lost.saturating_sub(named.len() as u64);
    let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
    let sale_id = cell(sale.get("sale_id").unwrap_or(&Value::Null));
    text.push_str(&format!("accepted loss {sale_id}: {}{more}\n", named.join(", ")));
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sale(id: &str) -> Value {
        json!({
            "sale_id": id, "total": 10, "remaining": 4, "claimed": 6, "released": 1, "in_flight": 0,
            "orders": { "created": 5, "paid": 1, "cancelled": 3, "expired": 0 },
            "reclaimed": 0, "accepted_loss": 0, "violations": [],
        })
    }

    #[test]
    fn nothing_is_said_of_losses_where_nothing_was_lost() {
        let report = json!({ "verdict": "clean", "sales": [sale("s")], "violations": [], "problems": [] });
        let text = describe(&report);
        assert!(!text.contains("claimed again") && !text.contains("accepted loss"), "{text}");
    }

    #[test]
    fn what_was_claimed_again_and_what_is_gone_stand_in_the_table_and_the_gone_are_named() {
        let mut lossy = sale("phone-1");
        let orders: Vec<String> = (1..=7).map(|n| format!("100300000100000000{n}")).collect();
        lossy["reclaimed"] = 12.into();
        lossy["accepted_loss"] = 7.into();
        lossy["lost_orders"] = json!(orders);
        let report =
            json!({ "verdict": "clean", "sales": [lossy, sale("s")], "violations": [], "problems": [] });
        let text = describe(&report);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].ends_with("in flight  claimed again  accepted loss"), "{text}");
        assert!(lines[1].starts_with("phone-1") && lines[1].ends_with(" 12              7"), "{text}");
        assert!(lines[2].starts_with("s ") && lines[2].ends_with(" 0              0"), "{text}");
        let named = format!("accepted loss phone-1: {} and 2 more", orders[..5].join(", "));
        assert_eq!(lines[3], named, "{text}");
        assert_eq!(lines[4], "clean: 2 sales agree in ledger, outbox and order tables");
    }
}
