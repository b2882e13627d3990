//! The checkers are checked: each deliberate mistake in the product must break a rule (PROTOCOL 9). `LOCKSTEP_MUTANTS=1` runs all of
//! them; `soon` those that are noticed soon, which scripts/test does.

use lockstep::replication::mutants::{Mutant, choose};

use super::{number, rule, run_all};

/// Those that are noticed within a minute, all of them together. A checker that goes blind leaves one of them alive.
const SOON: [Mutant; 9] = [
    Mutant::CompleteBeforeCas,
    Mutant::SkipPromiseFsync,
    Mutant::RetireBeforeFlush,
    Mutant::HighestCounter,
    Mutant::ReuseIdentity,
    Mutant::FlushOneCopy,
    Mutant::GrowUnasked,
    Mutant::ScrubUnheld,
    Mutant::RepairFromReplica,
];
/// Seeds for these: several times what the most hidden one of them needs.
const SEEDS_SOON: u64 = 300;

/// Seeds after which a mutant counts as alive: several times what the most hidden one needs.
const SEEDS: u64 = 12_000;

#[test]
fn each_mutant_is_killed() {
    // Beside the other test, in one process, it would slow that one down, and silence its panics.
    let Ok(which) = std::env::var("LOCKSTEP_MUTANTS") else {
        return;
    };
    let (mutants, seeds) = match which.as_str() {
        "soon" => (&SOON[..], SEEDS_SOON),
        _ => (&Mutant::ALL[..], SEEDS),
    };
    let seeds = number("LOCKSTEP_SEEDS").unwrap_or(seeds);
    let only = std::env::var("LOCKSTEP_MUTANT").unwrap_or_default();
    std::panic::set_hook(Box::new(|_| {}));
    let mut alive = Vec::new();
    eprintln!("| mutant | killed by | seeds run | what the checker said |");
    eprintln!("| --- | --- | --- | --- |");
    for &mutant in mutants {
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
