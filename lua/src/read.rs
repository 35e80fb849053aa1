//! Reading the ledger: snapshots of its sales, claims, news.

use redis::aio::ConnectionLike;
use redis::{FromRedisValue, Value};
use seckill_domain::{KeyDigest, LedgerState, Millis, OrderId, Quantity, SaleId, SaleSpec, Uid};

use crate::error::Error;
use crate::keys;
use crate::reply::{malformed, number, parse, text};
use crate::scripts::{SALE, SNAPSHOT};

/// A sale as the ledger has it.
#[derive(Debug, Clone, PartialEq)]
pub struct Sale {
    /// Its description. `quantity` is what it started with; [`Sale::total`] is what is on offer in all now.
    pub spec: SaleSpec,
    /// Its state.
    pub state: LedgerState,
    /// Start of its window, also where the description leaves it open.
    pub starts_at: Millis,
    /// End of its window.
    pub ends_at: Option<Millis>,
    /// Units on offer in all.
    pub total: u64,
    /// Units left.
    pub remaining: u64,
    /// Units held by users.
    pub claimed: u64,
    /// Units that were given back, ever.
    pub released: u64,
    /// Purchases accepted, ever; orders that were claimed again among them.
    pub accepted: u64,
    /// Orders that were claimed again, ever.
    pub reclaimed: u64,
    /// Grows with every change that the shop makes.
    pub version: u64,
    /// Grows with every return of stock.
    pub revision: u64,
    /// Sequence of its last change of any kind.
    pub touched: u64,
}

/// The sales that changed since a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// The fence, if there is one.
    pub fence: Option<String>,
    /// The last time that the ledger stored: a write or the master's heartbeat.
    pub clock: Millis,
    /// Sequence of the ledger's last change.
    pub seq: u64,
    /// The server's time at the snapshot.
    pub taken_at: Millis,
    /// The sales that changed, oldest change first; fewer than asked for means there are no more.
    pub sales: Vec<Sale>,
    /// Sales that this release cannot read, with the reason.
    pub unreadable: Vec<(String, String)>,
}

/// Reads at most `limit` sales that changed after sequence `since`; go on with the last one's `touched`.
///
/// A sequence belongs to the fence under which it was seen: an adopted ledger may have started again lower down,
/// so begin at 0 when [`Snapshot::fence`] is another than before.
pub async fn snapshot(conn: &mut impl ConnectionLike, since: u64, limit: usize) -> Result<Snapshot, Error> {
    let call = SNAPSHOT
        .call(4)
        .arg(keys::FENCE)
        .arg(keys::CLOCK)
        .arg(keys::SEQ)
        .arg(keys::TOUCHED)
        .arg(since)
        .arg(limit)
        .arg(keys::SALE_PREFIX);
    let Value::Array(values) = call.run(conn).await? else {
        return Err(Error::Malformed("a snapshot that is not an array".to_owned()));
    };
    let mut values = values.into_iter();
    let fence = match values.next() {
        Some(Value::Nil) | None => None,
        other => Some(text(other)?),
    };
    let clock = millis(values.next())?;
    let seq = number(values.next())?;
    let taken_at = millis(values.next())?;
    let mut sales = Vec::new();
    let mut unreadable = Vec::new();
    if let Some(Value::Array(rows)) = values.next() {
        for row in rows {
            let Value::Array(row) = row else { return Err(malformed(&row)) };
            let mut row = row.into_iter();
            let id = text(row.next())?;
            let touched = number(row.next())?;
            match parse_sale(Value::Array(row.collect()), touched) {
                Ok(sale) => sales.push(sale),
                Err(error) => unreadable.push((id, error.to_string())),
            }
        }
    }
    Ok(Snapshot { fence, clock, seq, taken_at, sales, unreadable })
}

/// One sale, archived ones included.
pub async fn sale(conn: &mut impl ConnectionLike, id: &SaleId) -> Result<Option<Sale>, Error> {
    let call = SALE.call(2).arg(keys::TOUCHED).arg(keys::sale(id)).arg(id.as_str());
    let Value::Array(values) = call.run(conn).await? else {
        return Err(Error::Malformed("a sale that is not an array".to_owned()));
    };
    match <[Value; 2]>::try_from(values) {
        Ok([_, Value::Array(fields)]) if fields.is_empty() => Ok(None),
        Ok([Value::Nil, _]) => Err(Error::Damaged(format!("sale {id} has no change number"))),
        Ok([touched, fields]) => parse_sale(fields, number(Some(touched))?).map(Some),
        Err(values) => Err(malformed(&Value::Array(values))),
    }
}

/// What the ledger holds of these users in one sale, as it lies there: 29 bytes for each claim or tombstone, see
/// [`crate::keys`]. Also on a server that is no master: for whoever keeps what a server held.
pub async fn raw_claims(
    conn: &mut impl ConnectionLike,
    sale: &SaleId,
    users: &[Uid],
) -> Result<Vec<Option<Vec<u8>>>, Error> {
    if users.is_empty() {
        return Ok(Vec::new());
    }
    let mut get = redis::cmd("HMGET");
    get.arg(keys::claims(sale));
    for user in users {
        get.arg(user.as_str());
    }
    Ok(get.query_async(conn).await?)
}

fn millis(value: Option<Value>) -> Result<Millis, Error> {
    Ok(Millis(i64::try_from(number(value)?).unwrap_or(i64::MAX)))
}

fn parse_sale(value: Value, touched: u64) -> Result<Sale, Error> {
    let fields = std::collections::HashMap::<String, Vec<u8>>::from_redis_value(value)
        .map_err(|_| Error::Malformed("a sale that is not a hash".to_owned()))?;
    let field = |name: &str| -> Result<&str, Error> {
        let bytes = fields.get(name).ok_or_else(|| Error::Malformed(format!("a sale without {name}")))?;
        std::str::from_utf8(bytes).map_err(|_| Error::Malformed(format!("{name} of a sale is not UTF-8")))
    };
    let count = |name: &str| -> Result<u64, Error> { parse(field(name)?) };
    Ok(Sale {
        spec: serde_json::from_str(field("def")?).map_err(|error| Error::Malformed(error.to_string()))?,
        state: LedgerState::from_name(field("state")?)
            .ok_or_else(|| Error::Malformed("a sale in an unknown state".to_owned()))?,
        starts_at: Millis(parse(field("starts")?)?),
        ends_at: match field("ends")? {
            "" => None,
            ends => Some(Millis(parse(ends)?)),
        },
        total: count("total")?,
        remaining: count("remaining")?,
        claimed: count("claimed")?,
        released: count("released")?,
        accepted: count("accepted")?,
        // Absent until the first time, and in sales of earlier releases.
        reclaimed: if fields.contains_key("reclaimed") { count("reclaimed")? } else { 0 },
        version: count("version")?,
        revision: count("revision")?,
        touched,
    })
}

/// One claim of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Whose it is.
    pub uid: Uid,
    /// The order it became.
    pub order_id: OrderId,
    /// How many units.
    pub quantity: Quantity,
    /// Digest of the key it was bought under.
    pub key: KeyDigest,
    /// Whether its units were given back: a tombstone.
    pub released: bool,
}

/// Reads some of a sale's claims. Start with cursor 0 and go on with the returned one until that is 0. What
/// was there during the whole walk is returned at least once; what changes meanwhile may be seen twice.
pub async fn scan_claims(
    conn: &mut impl ConnectionLike,
    sale: &SaleId,
    cursor: u64,
    count: usize,
) -> Result<(u64, Vec<Claim>), Error> {
    let (next, fields): (u64, Vec<(String, Vec<u8>)>) = redis::cmd("HSCAN")
        .arg(keys::claims(sale))
        .arg(cursor)
        .arg("COUNT")
        .arg(count)
        .query_async(conn)
        .await?;
    let mut claims = Vec::with_capacity(fields.len());
    for (uid, bytes) in fields {
        let uid = Uid::new(&uid).map_err(|error| Error::Malformed(error.to_string()))?;
        parse_claims(sale, &uid, &bytes, &mut claims)?;
    }
    Ok((next, claims))
}

/// The claims of some users in a sale.
pub async fn claims_of(
    conn: &mut impl ConnectionLike,
    sale: &SaleId,
    uids: &[Uid],
) -> Result<Vec<Claim>, Error> {
    let mut claims = Vec::with_capacity(uids.len());
    if uids.is_empty() {
        return Ok(claims);
    }
    let mut command = redis::cmd("HMGET");
    command.arg(keys::claims(sale));
    for uid in uids {
        command.arg(uid.as_str());
    }
    let values: Vec<Option<Vec<u8>>> = command.query_async(conn).await?;
    for (uid, bytes) in uids.iter().zip(values) {
        parse_claims(sale, uid, &bytes.unwrap_or_default(), &mut claims)?;
    }
    Ok(claims)
}

fn parse_claims(sale: &SaleId, uid: &Uid, bytes: &[u8], claims: &mut Vec<Claim>) -> Result<(), Error> {
    let records = bytes.chunks_exact(29);
    if !records.remainder().is_empty() {
        return Err(Error::Malformed(format!("claims of {uid} in sale {sale}")));
    }
    for record in records {
        claims.push(parse_claim(uid, record)?);
    }
    Ok(())
}

fn parse_claim(uid: &Uid, record: &[u8]) -> Result<Claim, Error> {
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
    let mut key = KeyDigest::default();
    key.copy_from_slice(&record[..16]);
    let order_id = OrderId::from_parts(number(&record[16..20]) as u32, number(&record[24..29]));
    let quantity = Quantity::new(number(&record[20..23]) as u32).ok();
    match (order_id, quantity) {
        (Some(order_id), Some(quantity)) => {
            Ok(Claim { uid: uid.clone(), order_id, quantity, key, released: record[23] != 0 })
        }
        _ => Err(Error::Malformed(format!("a claim of {uid}"))),
    }
}

/// A message on [`keys::NEWS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Stock of a sale came back.
    Returned {
        /// The epoch of the write.
        epoch: u64,
        /// The sale.
        sale_id: SaleId,
        /// How often stock has come back now.
        revision: u64,
    },
    /// An epoch began.
    Epoch(u64),
}

impl News {
    /// Reads a message; `None` if it is none of ours.
    pub fn parse(message: &str) -> Option<News> {
        let mut parts = message.split(':');
        let epoch = parts.next()?.parse().ok()?;
        let (sale, revision) = (parts.next()?, parts.next()?);
        if sale.is_empty() {
            return Some(News::Epoch(epoch));
        }
        Some(News::Returned { epoch, sale_id: SaleId::new(sale).ok()?, revision: revision.parse().ok()? })
    }
}
