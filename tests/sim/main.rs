//! The deterministic simulator: the production state machines in a world of nodes, disks, networks and a registry
//! that fail by chance, and the rules of docs/PROTOCOL.md checked after every step. One seed is one run.
//!
//! `scripts/sim` runs it: many seeds, one with a trace of all it does (`LOCKSTEP_SEED=s` here), or the mutants.

mod attachments;
mod checks;
mod control;
mod disk;
mod ending;
mod faults;
mod guest;
#[cfg(feature = "mutants")]
mod mutants;
mod network;
mod nodes;
mod oracle;
mod registry;
mod rng;
mod scenario;
mod scrub;
mod seen;
mod world;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use seen::{DEMANDED, OFTEN, Seen};
use world::World;

/// Runs by default: a minute of one core.
const SEEDS: u64 = 600;

pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs one seed; the last lines of its trace, the rule that was broken and the command that repeats it, if one was.
fn run(seed: u64, verbose: bool) -> Result<Seen, String> {
    let mut world = World::new(seed, verbose);
    match catch_unwind(AssertUnwindSafe(|| world.run())) {
        Ok(()) => Ok(world.seen.clone()),
        Err(why) => {
            let why = why
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| why.downcast_ref::<&str>().map(|s| s.to_string()))
                .unwrap_or_default()
                .replace('\n', " ");
            let skip = world.trace.len().saturating_sub(60);
            let trace: Vec<String> = world.trace.iter().skip(skip).cloned().collect();
            Err(format!(
                "{}\n{why}\nrepeat it with: scripts/sim --seed {seed}",
                trace.join("\n")
            ))
        }
    }
}

/// What [`run`] says was broken, without the trace.
fn rule(why: &str) -> String {
    let rule = why.lines().rev().nth(1).unwrap_or_default();
    rule.chars().take(160).collect()
}

/// Runs seeds on all processors, each thread prepared by `prepare`; with `one`, until one breaks a rule.
fn run_all(seeds: Range<u64>, one: bool, prepare: impl Fn() + Sync) -> (Seen, Vec<(u64, String)>) {
    let next = AtomicU64::new(seeds.start);
    let enough = AtomicBool::new(false);
    let total = Mutex::new(Seen::default());
    let broken: Mutex<Vec<(u64, String)>> = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                prepare();
                while !enough.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    match run(seed, false) {
                        Ok(seen) => total.lock().unwrap().add(&seen),
                        Err(why) => {
                            broken.lock().unwrap().push((seed, why));
                            enough.fetch_or(one, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let mut broken = broken.into_inner().unwrap();
    broken.sort();
    (total.into_inner().unwrap(), broken)
}

#[test]
fn whatever_fails_no_rule_of_the_protocol_is_broken() {
    if let Some(seed) = number("LOCKSTEP_SEED") {
        let seen = run(seed, true).unwrap_or_else(|why| panic!("{why}"));
        eprintln!("{seen}");
        return;
    }
    let (first, count) = (
        number("LOCKSTEP_SEED_FIRST").unwrap_or(0),
        number("LOCKSTEP_SEEDS").unwrap_or(SEEDS),
    );
    std::panic::set_hook(Box::new(|_| {}));
    let (seen, broken) = run_all(first..first + count, false, || {});
    drop(std::panic::take_hook());
    for (seed, why) in &broken {
        eprintln!("seed {seed}: {}", rule(why));
    }
    eprintln!(
        "{} of {count} seeds broke a rule; seen: {seen}",
        broken.len()
    );
    if let Some((_, why)) = broken.first() {
        panic!("{why}");
    }
    if count >= SEEDS {
        let unseen: Vec<_> = DEMANDED.iter().filter(|what| seen.of(what) == 0).collect();
        assert!(unseen.is_empty(), "the runs were too mild: no {unseen:?}");
        let seldom: Vec<_> = OFTEN
            .iter()
            .filter(|(what, n)| seen.of(what) < *n)
            .collect();
        assert!(
            seldom.is_empty(),
            "the runs were too mild: less than {seldom:?}"
        );
    }
}
