//! Searches the protocol's states from the command line: `cargo run --release -p seckill-model -- --help`.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use seckill_model::{Durability, Faults, MUTANTS, Property, Report, Rule, Rules, SOUND, Setup, explore};

/// Searches every state of the two-center protocol within small bounds. Without arguments: all searches of the tests.
/// With bounds: one search of your own.
#[derive(Debug, Parser)]
struct Arguments {
    /// Leave a rule out, by its name in the protocol; of a rule with clauses, all or one: `H1`, `H1-abort`.
    #[arg(long, value_name = "RULE")]
    without: Vec<String>,
    /// A search of these bounds; a rule that is left out is otherwise searched with the bounds of its test.
    #[arg(long)]
    bounds: bool,
    /// Look at one property alone: one-master, acknowledged, read, oversold, kept, sales or alone.
    #[arg(long, requires = "bounds", value_name = "PROPERTY", value_parser = property)]
    only: Option<Property>,
    /// With durability `local`.
    #[arg(long, requires = "bounds")]
    local: bool,
    /// Begin degraded.
    #[arg(long, requires = "bounds")]
    degraded: bool,
    /// With readers of the outbox.
    #[arg(long, requires = "bounds")]
    readers: bool,
    /// Purchases: 1 or 2.
    #[arg(long, requires = "bounds", default_value_t = 1)]
    purchases: usize,
    /// Units.
    #[arg(long, requires = "bounds", default_value_t = 1)]
    stock: usize,
    /// Planned shifts.
    #[arg(long, requires = "bounds", default_value_t = 0)]
    planned: u8,
    /// Forced shifts.
    #[arg(long, requires = "bounds", default_value_t = 0)]
    forced: u8,
    /// Restarts of a Redis.
    #[arg(long, requires = "bounds", default_value_t = 0)]
    servers: u8,
    /// Restarts of a service.
    #[arg(long, requires = "bounds", default_value_t = 0)]
    services: u8,
    /// Replicas taken off.
    #[arg(long, requires = "bounds", default_value_t = 0)]
    degrades: u8,
    /// Lost requests.
    #[arg(long, requires = "bounds", default_value_t = 0)]
    lost_requests: u8,
    /// Late answers of the config center.
    #[arg(long, requires = "bounds", default_value_t = 0)]
    late_reads: u8,
    /// Lost answers to a coordinator.
    #[arg(long, requires = "bounds", default_value_t = 0)]
    lost_answers: u8,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut left_out = Vec::new();
    for name in &arguments.without {
        let of_that_name = |rule: &Rule| {
            rule.name() == name || rule.name().split_once('-').is_some_and(|(rule, _)| rule == name)
        };
        let rules: Vec<Rule> = Rule::ALL.into_iter().filter(of_that_name).collect();
        if rules.is_empty() {
            let names: Vec<&str> = Rule::ALL.iter().map(|rule| rule.name()).collect();
            eprintln!("there is no rule {name} in the model; it has {}", names.join(", "));
            return ExitCode::FAILURE;
        }
        left_out.extend(rules);
    }
    if arguments.bounds {
        let rules = left_out.iter().fold(Rules::ALL, |rules, rule| rules.without(*rule));
        run("your bounds", &Setup { rules, ..bounds(&arguments) });
    } else if left_out.is_empty() {
        for sound in SOUND {
            run(sound.name, &sound.setup);
        }
    }
    if !arguments.bounds {
        for mutant in MUTANTS.iter().filter(|mutant| left_out.is_empty() || left_out.contains(&mutant.rule)) {
            let rules = mutant.setup.rules.without(mutant.rule);
            run(&format!("without {}", mutant.rule), &Setup { rules, ..mutant.setup });
        }
    }
    ExitCode::SUCCESS
}

fn property(name: &str) -> Result<Property, String> {
    let names: Vec<&str> = Property::ALL.iter().map(|property| property.name()).collect();
    let found = Property::ALL.into_iter().find(|property| property.name() == name);
    found.ok_or_else(|| format!("the model has {}", names.join(", ")))
}

fn bounds(arguments: &Arguments) -> Setup {
    Setup {
        durability: if arguments.local { Durability::Local } else { Durability::Replicated },
        degraded: arguments.degraded,
        purchases: arguments.purchases.clamp(1, 2),
        stock: arguments.stock,
        readers: arguments.readers,
        faults: Faults {
            planned: arguments.planned,
            forced: arguments.forced,
            servers: arguments.servers,
            services: arguments.services,
            degrades: arguments.degrades,
            lost_requests: arguments.lost_requests,
            late_reads: arguments.late_reads,
            lost_answers: arguments.lost_answers,
        },
        rules: Rules::ALL,
        only: arguments.only,
    }
}

fn run(name: &str, setup: &Setup) {
    let begun = Instant::now();
    let Report { states, steps, depth, at_bound, counterexample } = explore(setup);
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "{name}: {states} states, {steps} steps, {depth} deep, {at_bound} at the bound of epochs, {seconds:.1} s"
    );
    match counterexample {
        None => println!("  everything holds"),
        Some(counterexample) => print!("{counterexample}"),
    }
}
