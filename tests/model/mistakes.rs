//! The model can fail: each deliberate mistake of PROTOCOL 9 that it can express breaks a rule. One it cannot: a write is of a
//! whole chunk here, so one that is mirrored into a marked chunk does no harm.

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::mutants::Mutant;

use super::bounds::Bound;
use super::{broken, run};

#[test]
fn each_mistake_breaks_a_rule() {
    let quiet = Bound::quiet;
    // (the mistake, what goes wrong besides, the rules one of which is broken)
    let table: Vec<(Mutant, Bound, &[&str])> = vec![
        (
            Mutant::CompleteBeforeCas,
            Bound {
                breaks: 1,
                ..quiet("complete before the swap")
            },
            &["S3 and S4"],
        ),
        (
            Mutant::SkipPromiseFsync,
            Bound {
                writes: 0,
                crashes: 2,
                ..quiet("skip the promise fsync")
            },
            &["S2"],
        ),
        (
            Mutant::ClearBeforeFlush,
            Bound {
                flushes: 1,
                breaks: 1,
                attachments: 1,
                epochs: 2,
                ..quiet("clear a bit before the target's flush")
            },
            &["S12"],
        ),
        (
            Mutant::RetireBeforeFlush,
            quiet("retire a region before the all-copies flush"),
            &["S11", "S12"],
        ),
        (
            Mutant::DropReturningLog,
            Bound {
                crashes: 1,
                ..quiet("drop the returning copy's log")
            },
            &["S9", "S11", "S12", "S13"],
        ),
        (
            Mutant::HighestCounter,
            Bound {
                power_cuts: 1,
                circuits: vec![CopySet::one(0)],
                starts: CopySet::one(0),
                ..quiet("pick the highest counter")
            },
            &["S10"],
        ),
        (
            Mutant::ReuseIdentity,
            Bound {
                crashes: 1,
                ..quiet("reuse an identity after a wipe")
            },
            &["S3 and S4", "S9", "S10", "S11", "S12", "S13", "S18"],
        ),
        (
            Mutant::FlushOneCopy,
            Bound {
                flushes: 1,
                ..quiet("acknowledge a flush after the local one")
            },
            &["S5"],
        ),
        (
            Mutant::ReadWithoutLease,
            Bound {
                writes: 0,
                partitions: 1,
                ..quiet("read without a lease")
            },
            &["S8"],
        ),
        (
            Mutant::AmbiguousIsFailed,
            Bound {
                breaks: 1,
                ambiguous: 1,
                ..quiet("treat a timed-out swap as failed")
            },
            &["nobody gives up over a record that names it"],
        ),
    ];
    for (mistake, bound, rules) in table {
        let name = bound.name;
        let found = broken(&run(Bound {
            mistake: Some(mistake),
            ..bound
        }));
        assert!(
            found.iter().any(|(rule, _)| rules.contains(rule)),
            "{name}: no rule of {rules:?} is broken, but {found:?}"
        );
        let (rule, steps) = &found[0];
        eprintln!("  {rule} after {} steps", steps.len());
    }
}
