//! Reading what scripts answer: an array whose first element names the outcome.

use redis::Value;

use crate::error::{Error, Refusal};

/// The elements of a script's answer, behind its name.
pub(crate) struct Reply {
    pub(crate) code: String,
    values: std::vec::IntoIter<Value>,
}

impl Reply {
    /// Takes the answer apart; the fence's refusals become errors here, once for all scripts.
    pub(crate) fn parse(value: Value) -> Result<Reply, Error> {
        let Value::Array(values) = value else { return Err(malformed(&value)) };
        let mut values = values.into_iter();
        let code = text(values.next())?;
        let mut reply = Reply { code, values };
        match reply.code.as_str() {
            "NO_FENCE" => Err(Refusal::NoFence.into()),
            "FOREIGN" => Err(Refusal::Foreign { found: reply.text()? }.into()),
            "STALE_EPOCH" => Err(Refusal::StaleEpoch { ledger_epoch: parse(&reply.text()?)? }.into()),
            "FUTURE_EPOCH" => Err(Refusal::FutureEpoch { ledger_epoch: parse(&reply.text()?)? }.into()),
            _ => Ok(reply),
        }
    }

    pub(crate) fn text(&mut self) -> Result<String, Error> {
        text(self.values.next())
    }

    pub(crate) fn bytes(&mut self) -> Result<Vec<u8>, Error> {
        bytes(self.values.next())
    }

    pub(crate) fn number(&mut self) -> Result<u64, Error> {
        number(self.values.next())
    }

    /// An outcome that this release does not know.
    pub(crate) fn unknown(&self) -> Error {
        Error::Malformed(format!("outcome {:?}", self.code))
    }
}

pub(crate) fn malformed(value: &Value) -> Error {
    Error::Malformed(format!("{value:?}").chars().take(200).collect())
}

pub(crate) fn bytes(value: Option<Value>) -> Result<Vec<u8>, Error> {
    match value {
        Some(Value::BulkString(bytes)) => Ok(bytes),
        Some(Value::SimpleString(text)) => Ok(text.into_bytes()),
        other => Err(malformed(&other.unwrap_or(Value::Nil))),
    }
}

pub(crate) fn text(value: Option<Value>) -> Result<String, Error> {
    String::from_utf8(bytes(value)?).map_err(|_| Error::Malformed("text that is not UTF-8".to_owned()))
}

pub(crate) fn number(value: Option<Value>) -> Result<u64, Error> {
    match value {
        Some(Value::Int(number)) => {
            u64::try_from(number).map_err(|_| Error::Malformed(format!("negative number {number}")))
        }
        other => parse(&text(other)?),
    }
}

pub(crate) fn parse<T: std::str::FromStr>(text: &str) -> Result<T, Error> {
    text.parse().map_err(|_| {
        Error::Malformed(format!("not a number: {:?}", text.chars().take(40).collect::<String>()))
    })
}
