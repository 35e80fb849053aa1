//! `seckill sale`: what is on offer.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::client::{AdminClient, Call, Effect, ServiceArgs};
use super::exit::{Exit, Failure, Outcome};
use super::output::{Format, aligned, cell, print, print_json, print_object};

/// The largest file of sales.
const MAX_FILE_BYTES: u64 = 64 << 20;

/// `seckill sale …`
#[derive(Debug, Subcommand)]
pub(super) enum SaleCommand {
    /// Put a sale on offer, or many from a file
    ///
    /// The same sale again is no change and succeeds; another sale under the same id is refused.
    #[command(after_help = "\
Examples:
  seckill sale create phone-1 --quantity 10000 --price 199900 --currency CNY
  seckill sale create tee-1 --quantity 500 --price 1500 --currency EUR \\
      --per-user-limit 2 --starts-at 2026-12-01T20:00:00Z --ends-at 2026-12-01T21:00:00Z
  seckill sale create off-20 --kind coupon --quantity 1000 --currency CNY \\
      --discount 2000 --min-amount 10000 --valid-until 2026-12-31T23:59:59Z
  seckill sale create --file sale.json       one sale
  seckill sale create --file sales.ndjson    a sale on each line; - reads standard input")]
    Create(Box<CreateArgs>),
    /// List the sales
    List {
        #[command(flatten)]
        service: ServiceArgs,
    },
    /// Show one sale
    Show {
        /// The sale
        sale: String,
        #[command(flatten)]
        service: ServiceArgs,
    },
    /// Add units to a sale, or take units away that nobody holds
    #[command(after_help = "\
Examples:
  seckill sale stock phone-1 +500
  seckill sale stock phone-1 -200
  seckill sale stock phone-1 +500 --key restock-7    safe to repeat: counts once for each key")]
    Stock {
        /// The sale
        sale: String,
        /// Units to add (+500) or to take away (-200)
        #[arg(allow_negative_numbers = true)]
        delta: i64,
        /// Idempotency key, 1 to 64 visible ASCII characters [default: a new one]
        #[arg(long)]
        key: Option<String>,
        #[command(flatten)]
        service: ServiceArgs,
    },
    /// Halt purchases
    Pause(StateArgs),
    /// Go on after a pause
    Resume(StateArgs),
    /// End a sale for good
    End(StateArgs),
    /// Drop the claims of a sale that is over, once every order is final and the retry window has passed
    Archive(StateArgs),
}

/// `seckill sale create`
#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// The sale's id, [a-z0-9-]{1,48}
    #[arg(required_unless_present = "file", conflicts_with = "file", requires = "quantity")]
    sale: Option<String>,
    /// JSON file with one sale, or NDJSON with a sale on each line; - is standard input
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    fields: Fields,
    #[command(flatten)]
    service: ServiceArgs,
}

/// What a sale consists of. The service checks it.
#[derive(Debug, Args)]
struct Fields {
    /// product or coupon
    #[arg(long, default_value = "product", conflicts_with = "file")]
    kind: String,
    /// Units on offer
    #[arg(long, value_name = "N", conflicts_with = "file")]
    quantity: Option<u64>,
    /// Price of one unit in minor units (cents, fen) [default: 0]
    #[arg(long, value_name = "MINOR", conflicts_with = "file")]
    price: Option<i64>,
    /// ISO 4217 code [default: the service's]
    #[arg(long, value_name = "CODE", conflicts_with = "file")]
    currency: Option<String>,
    /// What people see
    #[arg(long, conflicts_with = "file")]
    title: Option<String>,
    /// The shop's own number for it
    #[arg(long, conflicts_with = "file")]
    reference: Option<String>,
    /// Units one user may hold [default: 1]
    #[arg(long, value_name = "N", conflicts_with = "file")]
    per_user_limit: Option<u32>,
    /// When purchases begin, RFC 3339 [default: at once]
    #[arg(long, value_name = "TIME", conflicts_with = "file")]
    starts_at: Option<String>,
    /// When purchases end, RFC 3339 [default: when it is ended by hand]
    #[arg(long, value_name = "TIME", conflicts_with = "file")]
    ends_at: Option<String>,
    /// Seconds a buyer has to pay [default: 900]
    #[arg(long, value_name = "N", conflicts_with = "file")]
    payment_ttl_s: Option<u32>,
    /// Coupons: taken off the amount of the order it pays for, in minor units
    #[arg(long, value_name = "MINOR", conflicts_with = "file")]
    discount: Option<i64>,
    /// Coupons: the order must cost at least this much, in minor units
    #[arg(long, value_name = "MINOR", conflicts_with = "file")]
    min_amount: Option<i64>,
    /// Coupons: last moment of use, RFC 3339
    #[arg(long, value_name = "TIME", conflicts_with = "file")]
    valid_until: Option<String>,
}

/// A command on one sale.
#[derive(Debug, Args)]
pub(super) struct StateArgs {
    /// The sale
    sale: String,
    #[command(flatten)]
    service: ServiceArgs,
}

/// Runs `seckill sale …`.
pub(super) async fn run(command: SaleCommand, format: Format) -> Outcome {
    match command {
        SaleCommand::Create(args) => create(*args, format).await,
        SaleCommand::List { service } => list(&service, format).await,
        SaleCommand::Show { sale, service } => {
            let answer = AdminClient::new(&service)?.call(&Call::get(path(&sale, "")?)).await?;
            print_object(format, &answer.json()?);
            Ok(Exit::Done)
        }
        SaleCommand::Stock { sale, delta, key, service } => stock(&sale, delta, key, &service, format).await,
        SaleCommand::Pause(args) => change_state(&args, "pause", format).await,
        SaleCommand::Resume(args) => change_state(&args, "resume", format).await,
        SaleCommand::End(args) => change_state(&args, "end", format).await,
        SaleCommand::Archive(args) => change_state(&args, "archive", format).await,
    }
}

/// The path of a sale. What is no sale id is refused here, because it could name another path.
fn path(sale: &str, below: &str) -> Result<String, Failure> {
    let sale = seckill_domain::SaleId::new(sale).map_err(Failure::error)?;
    Ok(format!("/admin/v1/sales/{sale}{below}"))
}

async fn create(args: CreateArgs, format: Format) -> Outcome {
    let client = AdminClient::new(&args.service)?;
    let Some(file) = &args.file else {
        let body = args.fields.body(args.sale.as_deref().unwrap_or_default());
        return create_one(&client, &body, format).await;
    };
    let text = read_file(file)?;
    // A file is one JSON document or a document on each line; one line is both, and means the same.
    match serde_json::from_str::<Value>(&text) {
        Ok(body) => create_one(&client, &body, format).await,
        Err(_) => create_many(&client, &text, format).await,
    }
}

async fn create_one(client: &AdminClient, body: &Value, format: Format) -> Outcome {
    let call = Call::post("/admin/v1/sales", Effect::Idempotent).body("application/json", body.to_string());
    let answer = client.call(&call).await?;
    print_object(format, &answer.json()?);
    Ok(Exit::Done)
}

/// Sends the lines as they are; the service answers each with a line. One that was refused makes the command
/// end as refused although the others were created: their lines say so.
async fn create_many(client: &AdminClient, text: &str, format: Format) -> Outcome {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() {
        return Err(Failure::error("the file holds no sale"));
    }
    for (number, line) in lines.iter().enumerate() {
        if let Err(error) = serde_json::from_str::<Value>(line) {
            return Err(Failure::error(format!("line {} is not JSON: {error}", number + 1)));
        }
    }
    let body = lines.join("\n") + "\n";
    let call = Call::post("/admin/v1/sales", Effect::Idempotent)
        .body("application/x-ndjson", body)
        .timeout(std::time::Duration::from_secs(300));
    let answer = client.call(&call).await?;
    let text = std::str::from_utf8(&answer.body).map_err(Failure::error)?;
    let results: Vec<Value> = text
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .map_err(|error| Failure::error(format!("the service's answer is not NDJSON: {error}")))?;
    let failed = results.iter().filter(|result| line_failed(result)).count();
    match format {
        Format::Json => print_json(&json!({ "results": results, "failed": failed })),
        Format::Text => {
            let rows = results
                .iter()
                .enumerate()
                .map(|(number, result)| {
                    let field = |name: &str| cell(result.get(name).unwrap_or(&Value::Null));
                    let what = if line_failed(result) {
                        format!("{}: {}", field("code"), field("detail"))
                    } else {
                        field("status")
                    };
                    vec![(number + 1).to_string(), field("sale_id"), what]
                })
                .collect();
            print(&aligned(&["line", "sale", "result"], rows));
        }
    }
    if results.len() != lines.len() {
        return Err(Failure::unknown(format!("{} results for {} sales", results.len(), lines.len())));
    }
    if failed > 0 {
        return Err(Failure {
            exit: Exit::Refused,
            message: format!("{failed} of {} sales were refused", lines.len()),
            body: None,
        });
    }
    Ok(Exit::Done)
}

fn line_failed(result: &Value) -> bool {
    result.get("code").is_some_and(|code| !code.is_null())
        || result.get("status").and_then(Value::as_u64).is_some_and(|status| status >= 400)
}

impl Fields {
    fn body(&self, sale: &str) -> Value {
        let mut body = Map::new();
        body.insert("sale_id".into(), sale.into());
        body.insert("kind".into(), self.kind.as_str().into());
        let mut put = |name: &str, value: Option<Value>| {
            if let Some(value) = value {
                body.insert(name.to_owned(), value);
            }
        };
        put("quantity", self.quantity.map(Value::from));
        put("price", self.price.map(Value::from));
        put("currency", self.currency.clone().map(Value::from));
        put("title", self.title.clone().map(Value::from));
        put("reference", self.reference.clone().map(Value::from));
        put("per_user_limit", self.per_user_limit.map(Value::from));
        put("starts_at", self.starts_at.clone().map(Value::from));
        put("ends_at", self.ends_at.clone().map(Value::from));
        put("payment_ttl_s", self.payment_ttl_s.map(Value::from));
        put("discount", self.discount.map(Value::from));
        put("min_amount", self.min_amount.map(Value::from));
        put("valid_until", self.valid_until.clone().map(Value::from));
        Value::Object(body)
    }
}

fn read_file(path: &Path) -> Result<String, Failure> {
    let cannot = |error: std::io::Error| Failure::error(format!("cannot read {}: {error}", path.display()));
    let mut text = String::new();
    let source: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(path).map_err(cannot)?)
    };
    source.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(cannot)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(Failure::error(format!("{} is larger than {MAX_FILE_BYTES} bytes", path.display())));
    }
    Ok(text)
}

async fn list(service: &ServiceArgs, format: Format) -> Outcome {
    let answer = AdminClient::new(service)?.call(&Call::get("/admin/v1/sales")).await?.json()?;
    if format == Format::Json {
        print_json(&answer);
        return Ok(Exit::Done);
    }
    const COLUMNS: [&str; 8] =
        ["sale_id", "kind", "state", "total", "remaining", "price", "currency", "title"];
    let sales = answer.get("sales").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let rows = sales
        .iter()
        .map(|sale| COLUMNS.iter().map(|name| cell(sale.get(name).unwrap_or(&Value::Null))).collect())
        .collect();
    print(&aligned(&COLUMNS, rows));
    Ok(Exit::Done)
}

async fn stock(
    sale: &str,
    delta: i64,
    key: Option<String>,
    service: &ServiceArgs,
    format: Format,
) -> Outcome {
    if delta == 0 {
        return Err(Failure::error("a stock change of 0 units changes nothing"));
    }
    let key = key.unwrap_or_else(|| format!("cli-{:032x}", rand::random::<u128>()));
    let call = Call::post(path(sale, "/stock")?, Effect::Idempotent)
        .body("application/json", json!({ "delta": delta }).to_string())
        .header("idempotency-key", &key)?;
    let answer = AdminClient::new(service)?.call(&call).await.map_err(|mut failure| {
        if failure.exit == Exit::Unknown {
            failure.message.push_str(&format!(" (with --key {key})"));
        }
        failure
    })?;
    print_object(format, &answer.json()?);
    Ok(Exit::Done)
}

async fn change_state(args: &StateArgs, change: &str, format: Format) -> Outcome {
    let call = Call::post(path(&args.sale, &format!("/{change}"))?, Effect::Idempotent);
    let answer = AdminClient::new(&args.service)?.call(&call).await?;
    if answer.body.is_empty() {
        print_object(format, &json!({ "sale_id": args.sale, "done": change }));
    } else {
        print_object(format, &answer.json()?);
    }
    Ok(Exit::Done)
}
