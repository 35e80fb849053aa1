//! Results of runs that went on at the same time, from several machines, as one: histograms are added, books
//! are put side by side, thresholds are held against the sum.

use std::collections::BTreeMap;

use crate::books::{Books, Check};
use crate::report::{CodeReport, IntervalReport, Latency, Report};
use crate::selfcheck;
use crate::stats::add;
use crate::threshold::Threshold;

/// Adds up results. Without `thresholds` those of the first result count.
pub fn merge(reports: Vec<Report>, thresholds: Vec<Threshold>) -> Result<Report, String> {
    let mut reports = reports.into_iter();
    let mut sum = reports.next().ok_or("there is nothing to add up")?;
    for other in reports {
        if other.scenario.sale != sum.scenario.sale {
            return Err(format!(
                "a run of sale {} and one of sale {} do not add up",
                sum.scenario.sale, other.scenario.sale
            ));
        }
        if other.scenario.seed == sum.scenario.seed && other.scenario.uid_prefix == sum.scenario.uid_prefix {
            return Err(
                "two runs with the same seed and uids are the same buyers: they do not add up".to_owned()
            );
        }
        add_report(&mut sum, other);
    }
    if !thresholds.is_empty() {
        sum.scenario.thresholds = thresholds;
    }
    let (lag, sent) = (sum.generator.lag_us.histogram(), sum.generator.sent_in_time);
    let usage: Vec<_> = sum.generator.workers.iter().map(|worker| worker.usage).collect();
    let mut reasons = selfcheck::verdict(&usage, sent, &lag, sum.scenario.max_lag_ms);
    if reasons.is_empty() && !sum.generator.valid {
        reasons.push("one of the runs was invalid".to_owned());
    }
    sum.generator.valid = reasons.is_empty();
    sum.generator.reasons = reasons;
    sum.notes.clear();
    sum.conclude();
    Ok(sum)
}

fn add_latency(into: &mut Latency, from: &Latency) {
    let mut both = into.histogram();
    add(&mut both, &from.histogram());
    *into = Latency::of(&both);
}

fn add_outcomes(into: &mut Vec<CodeReport>, from: Vec<CodeReport>) {
    for outcome in from {
        let same = |mine: &&mut CodeReport| mine.operation == outcome.operation && mine.code == outcome.code;
        match into.iter_mut().find(same) {
            Some(mine) => {
                mine.requests += outcome.requests;
                add_latency(&mut mine.latency_us, &outcome.latency_us);
            }
            None => into.push(outcome),
        }
    }
}

fn add_report(sum: &mut Report, other: Report) {
    sum.interrupted |= other.interrupted;
    sum.started_at = std::cmp::min(std::mem::take(&mut sum.started_at), other.started_at);
    let (mine, theirs) = (&mut sum.offered, other.offered);
    let arrivals = (mine.arrivals + theirs.arrivals).max(1) as f64;
    sum.generator.sent_in_time = (sum.generator.sent_in_time * mine.arrivals as f64
        + other.generator.sent_in_time * theirs.arrivals as f64)
        / arrivals;
    let requests = (mine.requests + theirs.requests).max(1) as f64;
    sum.generator.cpu_us_per_request = (sum.generator.cpu_us_per_request * mine.requests as f64
        + other.generator.cpu_us_per_request * theirs.requests as f64)
        / requests;
    mine.rate_asked += theirs.rate_asked;
    mine.rate_achieved += theirs.rate_achieved;
    mine.arrivals += theirs.arrivals;
    mine.arrivals_sent += theirs.arrivals_sent;
    mine.unsent += theirs.unsent;
    mine.requests += theirs.requests;
    mine.duplicates += theirs.duplicates;
    mine.second_purchases += theirs.second_purchases;
    mine.retries += theirs.retries;
    mine.journey += theirs.journey;
    mine.retries_skipped += theirs.retries_skipped;
    add_latency(&mut mine.skew_us, &theirs.skew_us);
    add_outcomes(&mut sum.outcomes, other.outcomes);
    add_outcomes(&mut sum.warmup, other.warmup);
    add_latency(&mut sum.latency_us, &other.latency_us);
    add_latency(&mut sum.accepted_after_us, &other.accepted_after_us);
    sum.purchases.total += other.purchases.total;
    sum.purchases.accepted += other.purchases.accepted;
    sum.purchases.refused += other.purchases.refused;
    sum.purchases.unknown += other.purchases.unknown;
    let (mine, theirs) = (&mut sum.generator, other.generator);
    mine.valid &= theirs.valid;
    add_latency(&mut mine.lag_us, &theirs.lag_us);
    mine.workers.extend(theirs.workers);
    mine.processes += theirs.processes;
    mine.connections_opened += theirs.connections_opened;
    mine.connections_peak += theirs.connections_peak;
    mine.connect_errors += theirs.connect_errors;
    mine.stock_reads += theirs.stock_reads;
    mine.peak_rss_bytes = mine.peak_rss_bytes.max(theirs.peak_rss_bytes);
    sum.scenario.rate += other.scenario.rate;
    sum.scenario.buyers = sum.scenario.buyers.saturating_add(other.scenario.buyers);
    sum.scenario.connections += other.scenario.connections;
    sum.scenario.targets.extend(other.scenario.targets);
    sum.scenario.targets.dedup();
    sum.events.extend(other.events);
    sum.events.sort_by_key(|event| event.at_ms);
    sum.books = match (sum.books.take(), other.books) {
        (Some(mine), Some(theirs)) => Some(add_books(mine, theirs)),
        (mine, theirs) => mine.or(theirs),
    };
    let mut by_second: BTreeMap<u64, IntervalReport> = BTreeMap::new();
    for interval in sum.intervals.drain(..).chain(other.intervals) {
        by_second.entry(interval.second).and_modify(|mine| mine.merge(&interval)).or_insert(interval);
    }
    sum.intervals = by_second.into_values().collect();
}

/// Each run checked what it can see alone; together they can check that nothing is left that none of them saw.
fn add_books(mut mine: Books, theirs: Books) -> Books {
    mine.checks.extend(theirs.checks);
    mine.violation_count += theirs.violation_count;
    mine.violations.extend(theirs.violations);
    mine.orders += theirs.orders;
    mine.orders_from_before += theirs.orders_from_before;
    mine.payments += theirs.payments;
    mine.cancellations += theirs.cancellations;
    mine.unknown += theirs.unknown;
    mine.unknown_accepted += theirs.unknown_accepted;
    mine.unknown_refused += theirs.unknown_refused;
    mine.unknown_unresolved += theirs.unknown_unresolved;
    mine.purchase_requests += theirs.purchase_requests;
    mine.drain_ms = mine.drain_ms.max(theirs.drain_ms);
    mine.unreachable = mine.unreachable.or(theirs.unreachable);
    for theirs in theirs.sales {
        let Some(sale) = mine.sales.iter_mut().find(|sale| sale.sale_id == theirs.sale_id) else {
            mine.sales.push(theirs);
            continue;
        };
        sale.orders += theirs.orders;
        sale.units_accepted += theirs.units_accepted;
        // The first audit of all, and the last.
        if theirs.before.claimed + theirs.before.released < sale.before.claimed + sale.before.released {
            sale.before = theirs.before;
        }
        let held = |audit: &crate::books::SaleAudit| audit.claimed + audit.released;
        if theirs.after.as_ref().map(held) > sale.after.as_ref().map(held) {
            sale.after = theirs.after;
        }
        if let Some(after) = &sale.after {
            let more = held(after) - held(&sale.before);
            mine.checks.retain(|check| check.name != "all_accepted_equal_claimed");
            mine.checks.push(Check {
                name: "all_accepted_equal_claimed".into(),
                ok: more == sale.units_accepted,
                detail: format!(
                    "{} units accepted in all runs, {more} more claimed or released than before the first",
                    sale.units_accepted
                ),
            });
        }
    }
    mine.balanced = mine.violation_count == 0 && mine.checks.iter().all(|check| check.ok);
    mine
}
