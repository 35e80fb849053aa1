//! How fast orders come out of Kafka into MariaDB, and in how much memory.

use std::time::Duration;

use anyhow::{Context, ensure};
use seckill_ledger::testkit::RedisServer;
use seckill_parts::{Kafka, Mariadb, MariadbOptions};
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::drain::{Phase, Report};
use crate::process::cpu_time;
use crate::table::{Better, Row, print, row};
use crate::{Scope, purchases};

const RATE: &str = "orders stored per second, MariaDB from Kafka";
const MEMORY: &str = "memory while orders drain: later / first fifth";

/// Purchases in one entry of the outbox: what lanes make of a herd.
const BATCH: u64 = 512;
/// A server of its own with little memory, as durable as production has it. Its redo log is larger than that of the
/// parts, or it would move pages all the time.
const MARIADB: [&str; 2] = ["--innodb-buffer-pool-size=256M", "--innodb-log-file-size=512M"];

pub(crate) async fn measure(scope: &Scope) -> anyhow::Result<Vec<Row>> {
    if ![RATE, MEMORY].iter().any(|name| scope.wants(name)) {
        return Ok(Vec::new());
    }
    let dir = tempfile::tempdir()?;
    // What is measured begins behind the outbox.
    let redis = RedisServer::start_with(&[("appendfsync", "no")]).await;
    let fence = redis.init_ledger().await;
    let mut conn = redis.connect().await;
    let sale = purchases::sale(&mut conn, &fence, "bench").await?;
    purchases::accept(&mut conn, &fence, &sale, 0..scope.orders, BATCH).await?;
    let kafka = Kafka::start(&dir.path().join("kafka")).await?;
    let options = MariadbOptions { extra: MARIADB.map(str::to_owned).into(), ..MariadbOptions::default() };
    let mariadb = Mariadb::start_with(&dir.path().join("mariadb"), &options).await?;
    let database = mariadb.create_database("orders").await?;

    let mut child = tokio::process::Command::new(std::env::current_exe()?)
        .args(["serve", "drain", "--redis", &redis.url(), "--fence", &fence.to_string()])
        .args(["--bootstrap", &kafka.bootstrap(), "--database", &database])
        .args(["--orders", &scope.orders.to_string()])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("the draining process does not start")?;
    let pids =
        [child.id().context("the draining process ended")?, pid(mariadb.identity())?, pid(kafka.identity())?];
    let mut lines = BufReader::new(child.stdout.take().context("no standard output")?).lines();
    let (mut stored, mut most, mut began, mut ended) = (Vec::new(), 0.0f64, None, None);
    while let Some(line) = lines.next_line().await? {
        let report: Report = serde_json::from_str(&line).with_context(|| line.clone())?;
        eprintln!(
            "{:>9} {:<9} {:>6.1} s {:>5.0} MiB",
            report.orders,
            report.phase.as_str(),
            report.seconds,
            report.resident_mib
        );
        most = most.max(report.resident_mib);
        match report.phase {
            Phase::Published => {}
            Phase::Stored => {
                let cpu = cpu_times(pids)?;
                began.get_or_insert(cpu);
                ended = Some(cpu);
                stored.push(report);
            }
        }
    }
    ensure!(child.wait().await?.success(), "the draining process failed");
    let (Some(began), Some(ended)) = (began, ended) else { anyhow::bail!("nothing was stored") };
    let (Some(first), Some(last)) = (stored.first(), stored.last()) else {
        anyhow::bail!("nothing was stored")
    };

    let orders = (last.orders - first.orders) as f64;
    let cpu = |process: usize| (ended[process] - began[process]).as_secs_f64() * 1e6 / orders;
    let rates: Vec<f64> = stored
        .windows(2)
        .map(|pair| (pair[1].orders - pair[0].orders) as f64 / (pair[1].seconds - pair[0].seconds))
        .collect();
    ensure!(!rates.is_empty(), "too few orders for a rate");
    let mut rows = vec![row(
        RATE,
        "/s",
        &rates,
        (Better::Higher, 10_000.0, 30_000.0),
        format!(
            "{:.0}/s over all {orders}; CPU: service {:.1} + MariaDB {:.1} + Kafka {:.1} us",
            orders / (last.seconds - first.seconds),
            cpu(0),
            cpu(1),
            cpu(2)
        ),
    )];
    let (warm, later): (Vec<&Report>, Vec<&Report>) =
        stored.iter().partition(|report| report.orders <= last.orders / 5);
    let peak = |reports: &[&Report]| reports.iter().map(|report| report.resident_mib).fold(0.0, f64::max);
    if !warm.is_empty() && !later.is_empty() {
        rows.push(row(
            MEMORY,
            "x",
            &[peak(&later) / peak(&warm)],
            (Better::Lower, 1.1, 1.03),
            format!(
                "{:.0} / {:.0} MiB, {} of {} orders drained; {most:.0} MiB at most, publishing them too",
                peak(&later),
                peak(&warm),
                last.orders,
                scope.orders
            ),
        ));
    }
    rows.retain(|row| scope.wants(row.what));
    rows.iter().for_each(print);
    Ok(rows)
}

fn pid(identity: Option<seckill_parts::Identity>) -> anyhow::Result<u32> {
    Ok(u32::try_from(identity.context("a server ended")?.pid)?)
}

fn cpu_times(pids: [u32; 3]) -> anyhow::Result<[Duration; 3]> {
    let mut times = [Duration::ZERO; 3];
    for (time, pid) in times.iter_mut().zip(pids) {
        *time = cpu_time(pid)?;
    }
    Ok(times)
}
