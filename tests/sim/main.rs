//! The deterministic simulator: the production state machines in a world of nodes, disks, networks and a registry
//! that fail by chance, and the rules of docs/PROTOCOL.md checked after every step. One seed is one run.
//!
//! `LOCKSTEP_SEEDS=n` runs n seeds, `LOCKSTEP_SEED=s` one, with a trace of all it does.

mod attachments;
mod checks;
mod control;
mod disk;
mod ending;
mod faults;
mod guest;
mod network;
mod nodes;

mod oracle;
mod registry;
mod rng;
mod scenario;
mod seen;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use seen::{DEMANDED, Seen};
use world::World;

/// Runs by default: what one core does in a few seconds.
const SEEDS: u64 = 400;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs one seed; the last lines of its trace if a rule was broken.
fn run(seed: u64, verbose: bool) -> Result<Seen, String> {
    let mut world = World::new(seed, verbose);
    match catch_unwind(AssertUnwindSafe(|| world.run())) {
        Ok(()) => Ok(world.seen.clone()),
        Err(why) => {
            let why = why
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| why.downcast_ref::<&str>().map(|s| s.to_string()))
                .unwrap_or_default();
            let skip = world.trace.len().saturating_sub(60);
            let trace: Vec<String> = world.trace.iter().skip(skip).cloned().collect();
            Err(format!(
                "{}\n{why}\nLOCKSTEP_SEED={seed} cargo test --test sim -- --nocapture",
                trace.join("\n")
            ))
        }
    }
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
    let next = AtomicU64::new(first);
    let total = Mutex::new(Seen::default());
    let broken: Mutex<Vec<(u64, String)>> = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        break;
                    }
                    match run(seed, false) {
                        Ok(seen) => total.lock().unwrap().add(&seen),
                        Err(why) => broken.lock().unwrap().push((seed, why)),
                    }
                }
            });
        }
    });
    drop(std::panic::take_hook());
    let mut broken = broken.into_inner().unwrap();
    broken.sort();
    for (seed, why) in &broken {
        let rule = why.lines().rev().nth(1).unwrap_or_default();
        let rule: String = rule.chars().take(160).collect();
        eprintln!("seed {seed}: {rule}");
    }
    let seen = total.into_inner().unwrap();
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
    }
}
