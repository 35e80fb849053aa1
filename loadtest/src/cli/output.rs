//! Where results go and come from.

use std::fs;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::report::{Report, SCHEMA, SCHEMA_VERSION};
use crate::{html, junit};

#[derive(Args)]
pub(super) struct OutputArgs {
    /// Form of the result on stdout
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Also write the result as JSON (loadtest/schema.json)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also write the result as one HTML page with plots
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Also write checks and thresholds as JUnit XML, for CI
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// An aligned table
    Text,
    /// One JSON object (loadtest/schema.json)
    Json,
}

impl OutputArgs {
    pub(super) fn write(&self, report: &Report) -> io::Result<()> {
        if let Some(file) = &self.json {
            fs::write(file, serde_json::to_string(report)? + "\n")?;
        }
        if let Some(file) = &self.html {
            fs::write(file, html::page(report))?;
        }
        if let Some(file) = &self.junit {
            fs::write(file, junit::xml(report))?;
        }
        let mut out = io::stdout().lock();
        match self.output {
            Output::Text => {
                write!(out, "{report}")?;
                if let Some(file) = &self.html {
                    writeln!(out, "report: {}", address(file))?;
                }
                Ok(())
            }
            Output::Json if out.is_terminal() => writeln!(out, "{}", serde_json::to_string_pretty(report)?),
            Output::Json => writeln!(out, "{}", serde_json::to_string(report)?),
        }
    }
}

/// A file's address, as a browser takes it.
fn address(file: &Path) -> String {
    let path = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    format!("file://{}", path.display())
}

/// Reads a result; the text says what is wrong with it.
pub(super) fn read_report(path: impl AsRef<Path>) -> Result<Report, String> {
    let path = path.as_ref();
    let text = fs::read(path).map_err(|err| format!("cannot read {}: {err}", path.display()))?;
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|err| format!("{}: {err}", path.display()))?;
    if value["schema"] != SCHEMA || value["schema_version"] != SCHEMA_VERSION {
        return Err(format!("{}: not a result of this version ({SCHEMA} {SCHEMA_VERSION})", path.display()));
    }
    serde_json::from_value(value).map_err(|err| format!("{}: {err}", path.display()))
}
