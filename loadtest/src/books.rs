//! The books: after the load, what the target says it did is compared with what it told the buyers.

mod checks;
mod close;
mod phantoms;

use std::borrow::Cow;
use std::time::Duration;

use seckill_domain::OrderId;
use serde::{Deserialize, Serialize};

use crate::client::{self, Client, Target};
use crate::record::Violation;
use crate::scenario::SaleOffer;

pub use close::close;

/// How long one call of the books may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an audit may take: it compares every claim with its order, some seconds for a million of them on an idle
/// machine, and several times that right after the load.
const AUDIT_TIMEOUT: Duration = Duration::from_secs(300);

/// The audit of one sale: `GET /admin/v1/sales/{id}/audit`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaleAudit {
    /// Units on offer.
    pub total: i64,
    /// Units left.
    pub remaining: i64,
    /// Units held.
    pub claimed: i64,
    /// Units given back so far.
    #[serde(default)]
    pub released: i64,
    /// Stored orders.
    #[serde(default)]
    pub orders: OrdersByState,
    /// Accepted, not stored yet.
    #[serde(default)]
    pub in_flight: i64,
    /// What the service itself found.
    #[serde(default)]
    pub violations: Vec<AuditViolation>,
}

/// Stored orders by state. A state this version does not know counts too.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OrdersByState(std::collections::BTreeMap<String, i64>);

impl OrdersByState {
    /// Orders of all states.
    pub fn sum(&self) -> i64 {
        self.0.values().sum()
    }

    /// Orders of one state.
    pub fn of(&self, state: &str) -> i64 {
        self.0.get(state).copied().unwrap_or(0)
    }
}

/// A violation in the service's audit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditViolation {
    /// What kind.
    #[serde(default)]
    pub code: String,
    /// In words.
    #[serde(default)]
    pub detail: String,
}

/// Why the books cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No answer.
    #[error("{0}: {1}")]
    Unreachable(String, client::Error),
    /// An answer that does not help.
    #[error("{path} answered {status}: {detail}")]
    Refused {
        /// What was asked.
        path: String,
        /// The status.
        status: u16,
        /// The beginning of the body.
        detail: String,
    },
    /// A body that is not what it should be.
    #[error("{0} answered something else than its contract says: {1}")]
    Unreadable(String, serde_json::Error),
}

/// The admin listener, as far as the books need it.
pub struct Access {
    admin: Client,
    auditor: Client,
    token: String,
}

impl Access {
    /// Access through the admin listener.
    pub fn new(admin: Target, token: &str) -> Access {
        let auditor = Client::new(admin.clone(), AUDIT_TIMEOUT);
        Access { admin: Client::new(admin, CALL_TIMEOUT), auditor, token: token.to_owned() }
    }

    /// The audit of a sale as it stands.
    pub async fn audit(&mut self, sale: &str) -> Result<SaleAudit, Error> {
        let path = format!("/admin/v1/sales/{sale}/audit");
        get_json(&mut self.auditor, &path, Some(&self.token)).await
    }

    /// A GET of the admin listener.
    pub async fn get<T: serde::de::DeserializeOwned>(&mut self, path: &str) -> Result<T, Error> {
        get_json(&mut self.admin, path, Some(&self.token)).await
    }

    /// Puts a sale on offer where there is none of its id. Another sale under the id is left as it is.
    pub async fn offer(&mut self, sale: &SaleOffer) -> Result<(), Error> {
        let body = sale.body(jiff::Timestamp::now()).to_string();
        let bearer = format!("Bearer {}", self.token);
        let headers = [("authorization", bearer.as_str()), ("content-type", "application/json")];
        let path = "/admin/v1/sales";
        let request = self.admin.target().request("POST", path, &headers, Some(body.as_bytes()));
        let url = format!("http://{}{path}", self.admin.target().authority());
        let answer = self.admin.call(&request).await.map_err(|err| Error::Unreachable(url, err))?;
        if matches!(answer.status, 200 | 201 | 409) {
            return Ok(());
        }
        let detail = String::from_utf8_lossy(&answer.body).chars().take(300).collect();
        Err(Error::Refused { path: format!("{path} ({})", sale.sale_id), status: answer.status, detail })
    }
}

/// A GET whose body is JSON.
pub async fn get_json<T: serde::de::DeserializeOwned>(
    client: &mut Client,
    path: &str,
    bearer: Option<&str>,
) -> Result<T, Error> {
    let url = format!("http://{}{path}", client.target().authority());
    let answer = client.get(path, bearer).await.map_err(|err| Error::Unreachable(url, err))?;
    if answer.status != 200 {
        let detail = String::from_utf8_lossy(&answer.body).chars().take(300).collect();
        return Err(Error::Refused { path: path.to_owned(), status: answer.status, detail });
    }
    serde_json::from_slice(&answer.body).map_err(|err| Error::Unreadable(path.to_owned(), err))
}

/// One question to the books.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    /// Its name.
    pub name: Cow<'static, str>,
    /// It holds.
    pub ok: bool,
    /// The figures.
    pub detail: String,
}

impl Check {
    fn new(name: &'static str, ok: bool, detail: String) -> Check {
        Check { name: Cow::Borrowed(name), ok, detail }
    }
}

/// One sale's books.
#[derive(Clone, Serialize, Deserialize)]
pub struct SaleBooks {
    /// The sale.
    pub sale_id: String,
    /// The limit per user, where the sale told it.
    pub per_user_limit: Option<u64>,
    /// Different orders the buyers were told of.
    pub orders: u64,
    /// Units of those that were new in this run.
    pub units_accepted: i64,
    /// The audit before the load.
    pub before: SaleAudit,
    /// The audit at the end; `null` if it could not be had.
    pub after: Option<SaleAudit>,
}

/// The books after the run.
#[derive(Serialize, Deserialize)]
pub struct Books {
    /// Every check holds and there is no violation.
    pub balanced: bool,
    /// The checks.
    pub checks: Vec<Check>,
    /// How many violations there are.
    pub violation_count: u64,
    /// The first hundred.
    pub violations: Vec<Violation>,
    /// Sale by sale.
    pub sales: Vec<SaleBooks>,
    /// Different orders the buyers were told of.
    pub orders: u64,
    /// Of those, accepted in an earlier run with the same seed.
    pub orders_from_before: u64,
    /// Payments that were acknowledged.
    pub payments: u64,
    /// Cancellations that were acknowledged.
    pub cancellations: u64,
    /// Purchases whose fate was unknown after the load.
    pub unknown: u64,
    /// Of those, with an order after asking again.
    pub unknown_accepted: u64,
    /// Of those, refused after asking again.
    pub unknown_refused: u64,
    /// Of those, still unknown.
    pub unknown_unresolved: u64,
    /// Requests for purchases that the books sent themselves.
    pub purchase_requests: u64,
    /// From the end of the load until every order was stored.
    pub drain_ms: u64,
    /// Why the books could not be finished: the target or its admin listener is gone.
    pub unreachable: Option<String>,
}

impl Books {
    /// A violation was found that does not come from the target being gone.
    pub fn contradicted(&self) -> bool {
        self.violations.iter().any(|violation| violation.code != "order_unverified")
    }
}

/// A sale before the load.
#[derive(Clone)]
pub struct SaleOpening {
    /// The sale.
    pub sale_id: String,
    /// The limit per user.
    pub per_user_limit: Option<u64>,
    /// Orders may expire while the run lasts.
    pub may_expire: bool,
    /// The audit before the load.
    pub before: SaleAudit,
}

/// What the books start from.
pub struct Opening {
    /// The admin listener.
    pub access: Access,
    /// Every sale that somebody wants.
    pub sales: Vec<SaleOpening>,
    /// When it was opened, milliseconds since the Unix epoch.
    pub started_ms: i64,
    /// Others buy too.
    pub shared_sale: bool,
    /// Shards may move during the run: an order's home is then not what it was.
    pub shards_move: bool,
    /// How long everything here may take.
    pub drain_timeout: Duration,
}

/// A violation about an order and its buyer.
pub fn violation(code: &str, order: OrderId, uid: &str, detail: String) -> Violation {
    Violation { code: code.to_owned(), detail, order_id: Some(order.to_string()), uid: Some(uid.to_owned()) }
}
