//! Searches with all rules find nothing, and without each rule they find what it is there for.

use std::collections::HashSet;

use seckill_model::{MUTANTS, Mutant, Property, Rule, SOUND, Setup, explore};

/// Every state of every search whose name begins like this: nothing is broken, nobody is stuck, and the bound of
/// epochs, which would hide a state that is stuck, is never reached.
fn everything_holds(kind: &str) {
    let searches: Vec<_> = SOUND.iter().filter(|sound| sound.name.starts_with(kind)).collect();
    assert!(!searches.is_empty());
    for sound in searches {
        let report = explore(&sound.setup);
        println!("{}: {} states, {} steps, {} deep", sound.name, report.states, report.steps, report.depth);
        if let Some(counterexample) = report.counterexample {
            panic!("{}:\n{counterexample}{:#?}", sound.name, counterexample.end);
        }
        assert_eq!(report.at_bound, 0, "{}", sound.name);
    }
}

#[test]
fn with_all_rules_everything_holds_in_two_centers_that_replicate() {
    everything_holds("replicated");
}

#[test]
fn with_all_rules_everything_holds_when_it_begins_degraded() {
    everything_holds("degraded");
}

#[test]
fn with_all_rules_everything_holds_with_local_durability() {
    everything_holds("local");
}

fn search_without(mutant: &Mutant) -> seckill_model::Report {
    let report = explore(&Setup { rules: mutant.setup.rules.without(mutant.rule), ..mutant.setup });
    println!("without {}: {} states", mutant.rule, report.states);
    report
}

#[test]
fn without_a_rule_there_is_a_counterexample() {
    let mut missing = Vec::new();
    for mutant in MUTANTS {
        let Some(breaks) = mutant.breaks else { continue };
        match search_without(mutant).counterexample {
            Some(counterexample) => {
                print!("{counterexample}");
                if counterexample.broken != breaks {
                    missing.push(format!("{}: expected that {breaks}", mutant.rule));
                }
            }
            None => missing.push(format!("{}: nothing is broken without it", mutant.rule)),
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// What the documentation says of these rules: within their bounds the others hold everything without them. Should
/// one become necessary, it belongs into the other list.
#[test]
fn without_a_second_line_of_defence_the_first_one_holds() {
    for mutant in MUTANTS.iter().filter(|mutant| mutant.breaks.is_none()) {
        if let Some(counterexample) = search_without(mutant).counterexample {
            panic!("{}:\n{counterexample}", mutant.rule);
        }
    }
}

#[test]
fn every_rule_is_left_out_once_and_every_property_is_broken_once() {
    let rules: HashSet<Rule> = MUTANTS.iter().map(|mutant| mutant.rule).collect();
    assert_eq!(Rule::ALL.into_iter().filter(|rule| !rules.contains(rule)).collect::<Vec<_>>(), []);
    let broken: HashSet<Property> = MUTANTS.iter().filter_map(|mutant| mutant.breaks).collect();
    assert_eq!(
        Property::ALL.into_iter().filter(|property| !broken.contains(property)).collect::<Vec<_>>(),
        []
    );
}
