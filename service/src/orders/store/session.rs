//! A connection to either database, and the few things in which their SQL differs.
//!
//! What is written here once for both uses plain SQL with `?` for values; names that one of them reserves stand in
//! backticks, which both understand.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;

use sqlx::mysql::{MySql, MySqlConnection, MySqlRow};
use sqlx::pool::PoolConnection;
use sqlx::sqlite::{Sqlite, SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, Connection as _, Row as _};

use super::super::error::Error;

/// A connection: one of the writers' own, or one of the readers' pool.
pub(super) enum Session {
    /// SQLite, one that writes.
    Sqlite(Box<SqliteConnection>),
    /// SQLite, one that reads.
    SqliteReader(PoolConnection<Sqlite>),
    /// MySQL or MariaDB, one that writes.
    MySql(Box<MySqlConnection>),
    /// MySQL or MariaDB, one that reads.
    MySqlReader(PoolConnection<MySql>),
}

/// A value of a statement.
#[derive(Debug, Clone)]
pub(super) enum Value<'a> {
    /// NULL.
    Null,
    /// A whole number.
    Int(i64),
    /// A text.
    Text(Cow<'a, str>),
}

impl From<i64> for Value<'_> {
    fn from(number: i64) -> Self {
        Value::Int(number)
    }
}

impl From<u8> for Value<'_> {
    fn from(number: u8) -> Self {
        Value::Int(number.into())
    }
}

impl From<u32> for Value<'_> {
    fn from(number: u32) -> Self {
        Value::Int(number.into())
    }
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Value::Text(Cow::Borrowed(text))
    }
}

impl From<String> for Value<'_> {
    fn from(text: String) -> Self {
        Value::Text(Cow::Owned(text))
    }
}

impl<'a> From<&'a String> for Value<'a> {
    fn from(text: &'a String) -> Self {
        Value::Text(Cow::Borrowed(text))
    }
}

impl<'a, T: Into<Value<'a>>> From<Option<T>> for Value<'a> {
    fn from(value: Option<T>) -> Self {
        value.map_or(Value::Null, Into::into)
    }
}

/// The values of a statement, in the order of its marks.
macro_rules! values {
    ($($value:expr),* $(,)?) => { &[$($crate::orders::store::session::Value::from($value)),*] };
}
pub(super) use values;

/// A statement.
pub(super) enum Sql {
    /// One of few. A MySQL connection keeps it prepared.
    Fixed(&'static str),
    /// Made for one table of 512, or for a number of values. It is sent to MySQL as text with its values in it: the
    /// server counts prepared statements of all connections together (`max_prepared_stmt_count`), and one that is
    /// closed after each use holds up what comes next. Nobody answers to the closing, and the client library leaves
    /// Nagle's algorithm on, so the next packet waits 40 ms for a delayed acknowledgement.
    Made(Arc<str>),
}

impl From<&'static str> for Sql {
    fn from(sql: &'static str) -> Self {
        Sql::Fixed(sql)
    }
}

impl From<String> for Sql {
    fn from(sql: String) -> Self {
        Sql::Made(Arc::from(sql))
    }
}

impl Sql {
    fn text(self) -> Arc<str> {
        match self {
            Sql::Fixed(sql) => Arc::from(sql),
            Sql::Made(sql) => sql,
        }
    }
}

/// A statement with its values in the places of its marks. Texts are hexadecimal digits, so nothing in them can end a
/// literal; a statement has no mark anywhere else.
fn with_values(sql: &str, values: &[Value<'_>]) -> String {
    debug_assert_eq!(sql.matches('?').count(), values.len(), "{sql}");
    let mut text = String::with_capacity(sql.len() + 48 * values.len());
    let mut parts = sql.split('?');
    text.push_str(parts.next().unwrap_or_default());
    for (value, part) in values.iter().zip(parts) {
        // Writing to a text does not fail.
        let _ = match value {
            Value::Null => write!(text, "NULL"),
            Value::Int(number) => write!(text, "{number}"),
            Value::Text(value) => hexadecimal(&mut text, value),
        };
        text.push_str(part);
    }
    text
}

fn hexadecimal(sql: &mut String, value: &str) -> std::fmt::Result {
    sql.push_str("_utf8mb4 x'");
    for byte in value.bytes() {
        write!(sql, "{byte:02x}")?;
    }
    sql.push('\'');
    Ok(())
}

macro_rules! bound {
    ($sql:expr, $values:expr) => {{
        let mut query = sqlx::query(AssertSqlSafe($sql));
        for value in $values {
            query = match value {
                Value::Null => query.bind(None::<i64>),
                Value::Int(number) => query.bind(*number),
                Value::Text(text) => query.bind(text.as_ref()),
            };
        }
        query
    }};
}

impl Session {
    /// Runs a statement; returns how many rows it wrote, or found to change.
    pub(super) async fn execute(&mut self, sql: impl Into<Sql>, values: &[Value<'_>]) -> Result<u64, Error> {
        Ok(match (self.connection(), sql.into()) {
            (Connection::Sqlite(conn), sql) => {
                bound!(sql.text(), values).execute(conn).await?.rows_affected()
            }
            (Connection::MySql(conn), Sql::Fixed(sql)) => {
                bound!(Arc::<str>::from(sql), values).execute(conn).await?.rows_affected()
            }
            (Connection::MySql(conn), Sql::Made(sql)) => {
                let text = with_values(&sql, values);
                sqlx::raw_sql(AssertSqlSafe(text)).execute(conn).await?.rows_affected()
            }
        })
    }

    /// Runs statements without values, separated by semicolons; returns how many rows they wrote.
    pub(super) async fn run(&mut self, sql: impl Into<Sql>) -> Result<u64, Error> {
        let query = sqlx::raw_sql(AssertSqlSafe(sql.into().text()));
        Ok(match self.connection() {
            Connection::Sqlite(conn) => query.execute(conn).await?.rows_affected(),
            Connection::MySql(conn) => query.execute(conn).await?.rows_affected(),
        })
    }

    /// All rows of a query.
    pub(super) async fn rows(
        &mut self,
        sql: impl Into<Sql>,
        values: &[Value<'_>],
    ) -> Result<Vec<Row>, Error> {
        Ok(match (self.connection(), sql.into()) {
            (Connection::Sqlite(conn), sql) => {
                let found = bound!(sql.text(), values).fetch_all(conn).await?;
                found.into_iter().map(Row::Sqlite).collect()
            }
            (Connection::MySql(conn), Sql::Fixed(sql)) => {
                let found = bound!(Arc::<str>::from(sql), values).fetch_all(conn).await?;
                found.into_iter().map(Row::MySql).collect()
            }
            (Connection::MySql(conn), Sql::Made(sql)) => {
                let text = with_values(&sql, values);
                let found = sqlx::raw_sql(AssertSqlSafe(text)).fetch_all(conn).await?;
                found.into_iter().map(Row::MySql).collect()
            }
        })
    }

    /// The first row of a query.
    pub(super) async fn row(
        &mut self,
        sql: impl Into<Sql>,
        values: &[Value<'_>],
    ) -> Result<Option<Row>, Error> {
        Ok(self.rows(sql, values).await?.into_iter().next())
    }

    /// The one row of a query.
    pub(super) async fn one(&mut self, sql: impl Into<Sql>, values: &[Value<'_>]) -> Result<Row, Error> {
        self.row(sql, values).await?.ok_or_else(|| Error::Row("a row is missing".to_owned()))
    }

    /// The one number that a query gives.
    pub(super) async fn number(&mut self, sql: impl Into<Sql>, values: &[Value<'_>]) -> Result<i64, Error> {
        self.one(sql, values).await?.int(0)
    }

    /// Begins reads that all see the same moment.
    pub(super) async fn begin_snapshot(&mut self) -> Result<(), Error> {
        match self.dialect() {
            Dialect::Sqlite => self.run("BEGIN").await?,
            // Every other transaction reads what is committed when it looks.
            Dialect::MySql => {
                self.run(
                    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ;
                     START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY",
                )
                .await?
            }
        };
        Ok(())
    }

    /// Ends a transaction and leaves nothing behind.
    pub(super) async fn roll_back(&mut self) -> Result<(), Error> {
        self.run("ROLLBACK").await?;
        Ok(())
    }

    /// Gives a connection up that may be in the middle of something: it does not go back to its pool.
    pub(super) async fn discard(self) {
        let closed = match self {
            Session::MySqlReader(conn) => conn.detach().close_hard().await,
            Session::MySql(conn) => conn.close_hard().await,
            // The file's connections have a thread each, which finishes what it was told.
            Session::Sqlite(_) | Session::SqliteReader(_) => Ok(()),
        };
        if let Err(error) = closed {
            tracing::debug!(%error, "a connection that was given up did not close");
        }
    }

    /// The SQL of this database.
    pub(super) fn dialect(&self) -> Dialect {
        match self {
            Session::Sqlite(_) | Session::SqliteReader(_) => Dialect::Sqlite,
            Session::MySql(_) | Session::MySqlReader(_) => Dialect::MySql,
        }
    }

    pub(super) fn connection(&mut self) -> Connection<'_> {
        match self {
            Session::Sqlite(conn) => Connection::Sqlite(conn),
            Session::SqliteReader(conn) => Connection::Sqlite(conn),
            Session::MySql(conn) => Connection::MySql(conn),
            Session::MySqlReader(conn) => Connection::MySql(conn),
        }
    }
}

/// What a session runs on.
pub(super) enum Connection<'a> {
    Sqlite(&'a mut SqliteConnection),
    MySql(&'a mut MySqlConnection),
}

/// Where the two differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    MySql,
}

impl Dialect {
    /// Begins an insert that leaves rows alone which are there already.
    pub(super) fn insert_new(self) -> &'static str {
        match self {
            Dialect::Sqlite => "INSERT OR IGNORE INTO",
            Dialect::MySql => "INSERT IGNORE INTO",
        }
    }

    /// Ends an insert that overwrites one column where the key is there already.
    pub(super) fn or_set(self, key: &str, column: &str) -> String {
        match self {
            Dialect::Sqlite => format!("ON CONFLICT ({key}) DO UPDATE SET {column} = excluded.{column}"),
            Dialect::MySql => format!("ON DUPLICATE KEY UPDATE {column} = VALUES({column})"),
        }
    }

    /// Ends a query whose rows are going to be changed in the same transaction. SQLite has one writer anyway.
    pub(super) fn for_update(self) -> &'static str {
        match self {
            Dialect::Sqlite => "",
            Dialect::MySql => " FOR UPDATE",
        }
    }
}

/// A row of either database.
pub(super) enum Row {
    Sqlite(SqliteRow),
    MySql(MySqlRow),
}

impl Row {
    /// A text column.
    pub(super) fn text(&self, column: usize) -> Result<&str, Error> {
        Ok(match self {
            Row::Sqlite(row) => row.try_get(column)?,
            Row::MySql(row) => row.try_get(column)?,
        })
    }

    /// A text column that may be NULL.
    pub(super) fn opt_text(&self, column: usize) -> Result<Option<&str>, Error> {
        Ok(match self {
            Row::Sqlite(row) => row.try_get(column)?,
            Row::MySql(row) => row.try_get(column)?,
        })
    }

    /// A column with a whole number.
    pub(super) fn int(&self, column: usize) -> Result<i64, Error> {
        Ok(match self {
            Row::Sqlite(row) => row.try_get(column)?,
            Row::MySql(row) => row.try_get(column)?,
        })
    }

    /// A column with a whole number, that may be NULL.
    pub(super) fn opt_int(&self, column: usize) -> Result<Option<i64>, Error> {
        Ok(match self {
            Row::Sqlite(row) => row.try_get(column)?,
            Row::MySql(row) => row.try_get(column)?,
        })
    }

    /// A column with a small number.
    pub(super) fn small<T: TryFrom<i64>>(&self, column: usize) -> Result<T, Error> {
        let number = self.int(column)?;
        T::try_from(number).map_err(|_| Error::Row(format!("{number} is out of bounds")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_cannot_end_a_literal() {
        let text = with_values(
            "UPDATE t SET a = ?, b = ? WHERE c IN (?, ?)",
            values!["';?\\\u{fc}", -7_i64, None::<i64>, ""],
        );
        assert_eq!(text, "UPDATE t SET a = _utf8mb4 x'273b3f5cc3bc', b = -7 WHERE c IN (NULL, _utf8mb4 x'')");
    }
}
