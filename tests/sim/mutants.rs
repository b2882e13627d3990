//! The checkers are checked: each deliberate mistake in the product must break a rule (PROTOCOL 9). In a binary of its own
//! test only, since panics are silenced for the whole process.

use lockstep::replication::mutants::{Mutant, choose};

use super::{number, rule, run_all};

/// Seeds after which a mutant counts as alive: several times what the most hidden one needs.
const SEEDS: u64 = 12_000;

#[test]
fn each_mutant_is_killed() {
    if number("LOCKSTEP_MUTANTS").is_none() {
        return; // Beside the other test, in one process, it would slow that one down.
    }
    let seeds = number("LOCKSTEP_SEEDS").unwrap_or(SEEDS);
    let only = std::env::var("LOCKSTEP_MUTANT").unwrap_or_default();
    std::panic::set_hook(Box::new(|_| {}));
    let mut alive = Vec::new();
    eprintln!("| mutant | killed by | seeds run | what the checker said |");
    eprintln!("| --- | --- | --- | --- |");
    for mutant in Mutant::ALL {
        let name = format!("{mutant:?}");
        if !only.is_empty() && name != only {
            continue;
        }
        let (_, broken) = run_all(0..seeds, true, || choose(Some(mutant)));
        let Some((seed, why)) = broken.first() else {
            eprintln!("| {name} | nobody | {seeds} | |");
            alive.push(name);
            continue;
        };
        let said = rule(why);
        let by = said.split(':').next().unwrap_or_default();
        eprintln!("| {name} | {by} | {} | {said} |", seed + 1);
    }
    drop(std::panic::take_hook());
    assert!(alive.is_empty(), "no checker noticed {alive:?}");
}
