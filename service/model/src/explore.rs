//! The search: every state that can be reached, breadth first, so that a counterexample is a shortest one.
//!
//! Of each state only a fingerprint of 64 bits is kept (with ten million states two of them share one with a
//! probability of 3 in a million), and the state that it was first reached from. That some states lead nowhere is
//! found by going backwards from all states in which sales go on.

use std::hash::{Hash, Hasher};

use crate::actions::Action;
use crate::ledger::Center;
use crate::properties::{Property, broken, is_at_bound, is_to_go_on_alone, sells, sells_alone};
use crate::setup::Setup;
use crate::state::State;
use crate::steps::successors;

/// What a search found.
#[derive(Debug)]
pub struct Report {
    /// How many states were reached.
    pub states: usize,
    /// How many steps lead from one to another.
    pub steps: usize,
    /// How many steps the farthest state is away.
    pub depth: usize,
    /// How many states are at the bound of epochs, where nobody asks whether sales go on.
    pub at_bound: usize,
    /// What does not hold, and how it comes to that.
    pub counterexample: Option<Counterexample>,
}

/// A shortest way to a state in which something does not hold.
#[derive(Debug)]
pub struct Counterexample {
    /// What does not hold.
    pub broken: Property,
    /// The steps.
    pub trace: Vec<Action>,
    /// For [`Property::SalesGoOn`]: in how many states.
    pub states: usize,
    /// The last state.
    pub end: State,
}

/// Searches everything within the bounds, or up to the first state in which a property does not hold.
///
/// # Panics
/// If there are more than `u32::MAX` states or steps.
pub fn explore(setup: &Setup) -> Report {
    let mut graph = Graph::default();
    let (mut level, mut next_level, mut found) = (Vec::new(), Vec::new(), Vec::new());
    let initial = State::initial(setup).canonical(setup.purchases);
    level.push((graph.enter(&initial, NOBODY).0, initial));
    let (mut steps, mut depth) = (0, 0);
    let mut counterexample = None;
    'search: while !level.is_empty() {
        for (number, state) in level.drain(..) {
            if let Some(property) = broken(setup, &state) {
                counterexample = Some(graph.counterexample(setup, property, &[number]));
                break 'search;
            }
            graph.begin_successors(number, marks(setup, &state));
            found.clear();
            successors(setup, &state, &mut found);
            steps += found.len();
            for (action, state) in found.drain(..) {
                let state = state.canonical(setup.purchases);
                let (target, is_new) = graph.enter(&state, number);
                graph.add_step(target, ways(action));
                if is_new {
                    next_level.push((target, state));
                }
            }
        }
        std::mem::swap(&mut level, &mut next_level);
        depth += 1;
    }
    if counterexample.is_none() {
        counterexample = Way::ALL.into_iter().find_map(|way| {
            let stuck = if setup.looks_at(way.property()) { graph.stuck(way) } else { Vec::new() };
            (!stuck.is_empty()).then(|| graph.counterexample(setup, way.property(), &stuck))
        });
    }
    let at_bound = graph.marks.iter().filter(|marks| **marks & AT_BOUND != 0).count();
    Report { states: graph.fingerprints.len(), steps, depth, at_bound, counterexample }
}

/// The state that the first one was reached from.
const NOBODY: u32 = u32::MAX;

/// With which steps sales have to go on.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// With all that happen by themselves.
    Together,
    /// With those of this center alone.
    Alone(Center),
}

impl Way {
    const ALL: [Way; 3] = [Way::Together, Way::Alone(Center::A), Way::Alone(Center::B)];

    fn property(self) -> Property {
        match self {
            Way::Together => Property::SalesGoOn,
            Way::Alone(_) => Property::SalesGoOnAlone,
        }
    }

    /// Its bit in a step.
    fn step(self) -> u8 {
        match self {
            Way::Together => 1,
            Way::Alone(center) => 2 << center as u8,
        }
    }
}

/// The ways that a step is part of.
fn ways(action: Action) -> u8 {
    let (center, needs_other) = action.needs();
    let gives_up = matches!(action, Action::Degrade { .. } | Action::TimeOutReturn { .. });
    let together = if action.is_progress() { Way::Together.step() } else { 0 };
    let alone = (action.is_progress() || gives_up) && !needs_other;
    together | if alone { Way::Alone(center).step() } else { 0 }
}

/// Sales go on; without the other center; the bounds end here; a center has to get on alone.
const SELLS: u8 = 1;
const SELLS_ALONE: u8 = 2;
const AT_BOUND: u8 = 4;
const ALONE: [u8; 2] = [8, 16];

fn marks(setup: &Setup, state: &State) -> u8 {
    let mark = |is, mark| if is { mark } else { 0 };
    mark(sells(setup, state), SELLS)
        | mark(sells_alone(setup, state), SELLS_ALONE)
        | mark(is_at_bound(state), AT_BOUND)
        | mark(is_to_go_on_alone(setup, state), ALONE[state.topology.master as usize])
}

/// The states by number, in the order in which they were reached, which is the order in which their successors are
/// entered.
#[derive(Default)]
struct Graph {
    fingerprints: Vec<u64>,
    parents: Vec<u32>,
    marks: Vec<u8>,
    /// Where each state's targets begin.
    begins: Vec<u32>,
    /// The states that steps which are part of some way lead to.
    targets: Vec<u32>,
    /// The ways.
    ways: Vec<u8>,
    /// Numbers by fingerprint: open addressing, a power of two, at most half full. 0 is free, else the number + 1.
    table: Vec<u32>,
}

impl Graph {
    /// The number of a state, and whether it is new.
    fn enter(&mut self, state: &State, parent: u32) -> (u32, bool) {
        if self.table.len() < 2 * (self.fingerprints.len() + 1) {
            self.grow();
        }
        let fingerprint = fingerprint(state);
        let mut slot = self.slot(fingerprint);
        while self.table[slot] != 0 {
            let number = self.table[slot] - 1;
            if self.fingerprints[number as usize] == fingerprint {
                return (number, false);
            }
            slot = (slot + 1) & (self.table.len() - 1);
        }
        let number = u32::try_from(self.fingerprints.len()).expect("fewer states than fit into memory");
        self.table[slot] = number + 1;
        self.fingerprints.push(fingerprint);
        self.parents.push(parent);
        (number, true)
    }

    fn slot(&self, fingerprint: u64) -> usize {
        (fingerprint >> 20) as usize & (self.table.len() - 1)
    }

    fn grow(&mut self) {
        self.table = vec![0; (self.table.len() * 2).max(1 << 16)];
        for (number, fingerprint) in (1..).zip(&self.fingerprints) {
            let mut slot = self.slot(*fingerprint);
            while self.table[slot] != 0 {
                slot = (slot + 1) & (self.table.len() - 1);
            }
            self.table[slot] = number;
        }
    }

    fn begin_successors(&mut self, number: u32, marks: u8) {
        assert_eq!(number as usize, self.begins.len(), "states are looked at in the order they were reached");
        self.begins.push(u32::try_from(self.targets.len()).expect("fewer steps than fit into memory"));
        self.marks.push(marks);
    }

    fn add_step(&mut self, target: u32, ways: u8) {
        if ways != 0 {
            self.targets.push(target);
            self.ways.push(ways);
        }
    }

    /// The states from which no steps of this way lead to sales, the nearest to the beginning first.
    fn stuck(&self, way: Way) -> Vec<u32> {
        let states = self.fingerprints.len();
        let targets_of = |state: usize| {
            let end = self.begins.get(state + 1).map_or(self.targets.len(), |begin| *begin as usize);
            let steps = self.begins[state] as usize..end;
            let ways = &self.ways[steps.clone()];
            self.targets[steps]
                .iter()
                .zip(ways)
                .filter(|(_, ways)| **ways & way.step() != 0)
                .map(|(to, _)| *to)
        };
        // The same steps backwards: `sources[begins[t]..begins[t + 1]]` lead to `t`.
        let mut begins = vec![0u32; states + 2];
        for target in (0..states).flat_map(targets_of) {
            begins[target as usize + 2] += 1;
        }
        for at in 2..begins.len() {
            begins[at] += begins[at - 1];
        }
        let mut sources = vec![0u32; self.targets.len()];
        for state in 0..states {
            for target in targets_of(state) {
                let place = &mut begins[target as usize + 1];
                sources[*place as usize] = state as u32;
                *place += 1;
            }
        }
        let (goal, judged) = match way {
            Way::Together => (SELLS | AT_BOUND, u8::MAX),
            Way::Alone(center) => (SELLS_ALONE | AT_BOUND, ALONE[center as usize]),
        };
        let mut leads: Vec<bool> = self.marks.iter().map(|marks| marks & goal != 0).collect();
        let mut open: Vec<usize> = (0..states).filter(|state| leads[*state]).collect();
        while let Some(state) = open.pop() {
            for source in &sources[begins[state] as usize..begins[state + 1] as usize] {
                if !std::mem::replace(&mut leads[*source as usize], true) {
                    open.push(*source as usize);
                }
            }
        }
        let is_stuck =
            |state: &usize| !leads[*state] && (judged == u8::MAX || self.marks[*state] & judged != 0);
        (0..states).filter(is_stuck).map(|state| state as u32).collect()
    }

    /// Walks from the beginning to a state along the states that each was first reached from.
    fn counterexample(&self, setup: &Setup, broken: Property, states: &[u32]) -> Counterexample {
        let mut path: Vec<u32> = std::iter::successors(states.first().copied(), |at| {
            Some(self.parents[*at as usize]).filter(|at| *at != NOBODY)
        })
        .collect();
        path.reverse();
        let (mut trace, mut found) = (Vec::new(), Vec::new());
        // Not the canonical states: a purchase keeps its name along the way.
        let mut end = State::initial(setup);
        for number in &path[1..] {
            found.clear();
            successors(setup, &end, &mut found);
            let wanted = self.fingerprints[*number as usize];
            let step =
                found.iter().find(|(_, state)| fingerprint(&state.canonical(setup.purchases)) == wanted);
            let (action, state) = step.expect("the state was reached by one of these steps");
            trace.push(*action);
            end = *state;
        }
        Counterexample { broken, trace, states: states.len(), end }
    }
}

fn fingerprint(state: &State) -> u64 {
    let mut hasher = Fingerprint(0x9e37_79b9_7f4a_7c15);
    state.hash(&mut hasher);
    hasher.finish()
}

/// Multiplies into 128 bits and folds, eight bytes at a time. The same in every run, so that traces are, too.
struct Fingerprint(u64);

impl Fingerprint {
    fn mix(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * 0xa076_1d64_78bd_642f;
        self.0 = (product as u64) ^ ((product >> 64) as u64);
    }
}

impl Hasher for Fingerprint {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
    }

    fn write_u8(&mut self, byte: u8) {
        self.mix(u64::from(byte) + 1);
    }

    fn write_isize(&mut self, number: isize) {
        self.mix((number as u64).wrapping_add(1));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl std::fmt::Display for Counterexample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "  {}, after {} steps:", self.broken, self.trace.len())?;
        for (at, action) in (1..).zip(&self.trace) {
            writeln!(f, "  {at:3}. {action}")?;
        }
        if self.states > 1 {
            writeln!(f, "  ({} such states)", self.states)?;
        }
        Ok(())
    }
}
