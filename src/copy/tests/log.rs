use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{Disk, state};
use crate::copy::layout::{BITMAPS, LOG};
use crate::copy::{Loaded, LogImage, Metadata, Warning};
use crate::replication::ids::{REGIONS_MAX, Region};

fn load(disk: &Disk) -> Loaded {
    Metadata::load(disk).unwrap()
}

fn regions(disk: &Disk) -> Vec<u32> {
    match load(disk).log {
        LogImage::Regions(r) => r.into_iter().map(|r| r.0).collect(),
        LogImage::Unreadable => panic!("{:?}", load(disk).warnings),
    }
}

fn to_regions(numbers: &[u32]) -> Vec<Region> {
    numbers.iter().map(|n| Region(*n)).collect()
}

fn span(from: u32, to: u32) -> Vec<Region> {
    (from..to).map(Region).collect()
}

#[test]
fn a_new_log_is_empty_and_a_batch_says_what_is_active() {
    let (mut disk, mut m) = Disk::formatted(&state());
    assert!(regions(&disk).is_empty());
    disk.apply(&m.log(&to_regions(&[9, 4, 4]), &[]));
    assert_eq!(regions(&disk), [4, 9]);
    disk.apply(&m.log(&to_regions(&[1, 4]), &to_regions(&[4, 9, 77])));
    assert_eq!(regions(&disk), [1, 4]);
}

#[test]
fn a_batch_that_changes_nothing_writes_nothing_and_a_common_one_writes_one_block() {
    let (_, mut m) = Disk::formatted(&state());
    let one = m.log(&to_regions(&[5]), &[]);
    assert_eq!((one.len(), one[0].bytes.len()), (1, 4096));
    assert!(m.log(&to_regions(&[5]), &to_regions(&[6])).is_empty());
}

#[test]
fn the_table_is_full_at_its_limit_and_turns_over_in_one_batch() {
    let (mut disk, mut m) = Disk::formatted(&state());
    let max = REGIONS_MAX as u32;
    disk.apply(&m.log(&span(0, max), &[]));
    assert_eq!(regions(&disk).len(), REGIONS_MAX);
    let before = disk.clone();
    // The longest batch there is, torn in its last sector, still leaves the table before it.
    let longest = m.log(&span(max, 2 * max), &span(0, max));
    let sectors: usize = longest.iter().map(|w| w.bytes.len() / 512).sum();
    assert_eq!(sectors, 32 * 8);
    disk.tear(&longest, |n| n + 1 < sectors);
    assert_eq!(regions(&disk), regions(&before));
    disk.apply(&longest);
    assert_eq!(regions(&disk), (max..2 * max).collect::<Vec<_>>());
}

#[test]
#[should_panic(expected = "the caller bounds them")]
fn more_regions_than_slots_is_the_callers_mistake() {
    let (_, mut m) = Disk::formatted(&state());
    m.log(&span(0, REGIONS_MAX as u32 + 1), &[]);
}

#[test]
fn a_table_survives_many_laps_of_the_ring() {
    let (mut disk, mut m) = Disk::formatted(&state());
    disk.apply(&m.log(&span(1000, 1600), &[]));
    for n in 0..500 {
        disk.apply(&m.log(&to_regions(&[n]), &to_regions(&[n.wrapping_sub(1)])));
    }
    assert_eq!(
        regions(&disk),
        [499].into_iter().chain(1000..1600).collect::<Vec<_>>()
    );
}

#[test]
fn two_torn_attempts_at_one_sequence_number_do_not_add_up_to_a_transaction() {
    let (mut disk, mut m) = Disk::formatted(&state());
    disk.apply(&m.log(&to_regions(&[1]), &[]));
    disk.tear(&m.log(&to_regions(&[2]), &[]), |n| n < 4);
    let mut again = load(&disk).metadata;
    disk.tear(&again.log(&to_regions(&[3]), &[]), |n| n >= 4);
    assert_eq!(regions(&disk), [1]);
}

#[test]
fn a_short_batch_after_a_long_torn_one_is_the_newest() {
    let (mut disk, mut m) = Disk::formatted(&state());
    disk.apply(&m.log(&to_regions(&[1]), &[]));
    // 600 regions: three transactions, of which only the last two reach the disk.
    disk.tear(&m.log(&span(2, 602), &[]), |n| n >= 8);
    assert_eq!(regions(&disk), [1]);
    let mut again = load(&disk).metadata;
    disk.apply(&again.log(&to_regions(&[700]), &[]));
    assert_eq!(regions(&disk), [1, 700]);
    disk.apply(&again.log(&to_regions(&[701]), &[]));
    assert_eq!(regions(&disk), [1, 700, 701]);
}

#[test]
fn an_unreadable_log_stays_so_until_it_is_reset() {
    let (mut disk, mut m) = Disk::formatted(&state());
    disk.apply(&m.log(&to_regions(&[1]), &[]));
    disk.flip((LOG as usize + 20 * 4096) * 8);
    let mut found = load(&disk);
    assert_eq!(found.log, LogImage::Unreadable);
    assert!(matches!(found.warnings[..], [Warning::Log { .. }]));
    assert!(found.metadata.log(&to_regions(&[2]), &[]).is_empty());
    assert_eq!(load(&disk).log, LogImage::Unreadable);
    disk.apply(&found.metadata.reset_log(&to_regions(&[7, 8])));
    assert_eq!(regions(&disk), [7, 8]);
    disk.apply(&found.metadata.log(&to_regions(&[9]), &to_regions(&[8])));
    assert_eq!(regions(&disk), [7, 9]);
}

#[test]
fn a_sector_that_cannot_be_read_makes_the_log_unreadable() {
    let (mut disk, _) = Disk::formatted(&state());
    disk.lost.push((LOG as usize + 5 * 4096) / 512);
    assert_eq!(load(&disk).log, LogImage::Unreadable);
}

#[test]
fn a_block_of_an_older_lap_in_the_place_of_a_needed_one_is_noticed() {
    let (mut disk, mut m) = Disk::formatted(&state());
    let old = disk.clone();
    let mut writes = Vec::new();
    for n in 0..8 {
        writes.push(m.log(&to_regions(&[n]), &[]).remove(0));
        disk.apply(&writes[writes.len() - 1..]);
    }
    // A write that was acknowledged and never done, not the newest one.
    let lost = writes[5].offset as usize;
    disk.bytes[lost..lost + 4096].copy_from_slice(&old.bytes[lost..lost + 4096]);
    assert_eq!(load(&disk).log, LogImage::Unreadable);
}

/// What a test does to a log.
#[derive(Clone, Debug)]
enum Step {
    /// A batch that becomes durable.
    Batch(Vec<u32>, Vec<u32>),
    /// A batch of which only the sectors of the mask reach the disk; then the process starts again.
    Crash(Vec<u32>, Vec<u32>, Vec<bool>),
    /// The ring written anew with what is active.
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let few = || prop::collection::vec(0u32..1200, 0..8);
    let many = || prop::collection::vec(0u32..1200, 0..900);
    let mask = || prop::collection::vec(any::<bool>(), 96);
    prop_oneof![
        8 => (few(), few()).prop_map(|(a, r)| Step::Batch(a, r)),
        1 => (many(), many()).prop_map(|(a, r)| Step::Batch(a, r)),
        3 => (few(), few(), mask()).prop_map(|(a, r, m)| Step::Crash(a, r, m)),
        2 => (many(), many(), mask()).prop_map(|(a, r, m)| Step::Crash(a, r, m)),
        1 => Just(Step::Reset),
    ]
}

fn change(set: &BTreeSet<u32>, add: &[u32], retire: &[u32]) -> BTreeSet<u32> {
    let kept = set.iter().filter(|r| !retire.contains(r));
    kept.chain(add).copied().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever subset of the last batch's sectors a crash leaves, the set read back is the one before it or the one after it,
    /// and after it only if the crash left nothing out; crash upon crash.
    #[test]
    fn a_crash_leaves_the_set_before_or_after_the_batch_in_flight(steps in prop::collection::vec(step(), 1..60)) {
        let (mut disk, mut m) = Disk::formatted(&state());
        let mut oracle = BTreeSet::new();
        for step in steps {
            match step {
                Step::Batch(add, retire) => {
                    disk.apply(&m.log(&to_regions(&add), &to_regions(&retire)));
                    oracle = change(&oracle, &add, &retire);
                }
                Step::Reset => {
                    let active: Vec<u32> = oracle.iter().copied().collect();
                    disk.apply(&m.reset_log(&to_regions(&active)));
                }
                Step::Crash(add, retire, mask) => {
                    let writes = m.log(&to_regions(&add), &to_regions(&retire));
                    let sectors: usize = writes.iter().map(|w| w.bytes.len() / 512).sum();
                    disk.tear(&writes, |n| mask[n % mask.len()]);
                    let whole = (0..sectors).all(|n| mask[n % mask.len()]);
                    if whole {
                        oracle = change(&oracle, &add, &retire);
                    }
                    m = load(&disk).metadata;
                }
            }
            prop_assert_eq!(regions(&disk), oracle.iter().copied().collect::<Vec<_>>());
        }
    }

    /// One flipped bit anywhere in the ring is noticed.
    #[test]
    fn rot_anywhere_in_the_ring_is_noticed(
        adds in prop::collection::vec(0u32..5000, 0..100),
        bit in LOG as usize * 8..BITMAPS as usize * 8,
    ) {
        let (mut disk, mut m) = Disk::formatted(&state());
        for n in adds {
            disk.apply(&m.log(&[Region(n)], &[]));
        }
        disk.flip(bit);
        prop_assert_eq!(load(&disk).log, LogImage::Unreadable);
    }

    /// A ring of anything is read without a panic.
    #[test]
    fn a_ring_of_noise_is_unreadable(noise in prop::collection::vec(any::<u8>(), 4096), at in LOG as usize..BITMAPS as usize - 4096) {
        let (mut disk, _) = Disk::formatted(&state());
        disk.bytes[at..at + 4096].copy_from_slice(&noise);
        prop_assert_eq!(load(&disk).log, LogImage::Unreadable);
    }

    /// A reset cut short leaves the log new or unreadable.
    #[test]
    fn a_torn_reset_is_new_or_unreadable(mask in prop::collection::vec(prop::bool::weighted(0.99), 512)) {
        let (mut disk, mut m) = Disk::formatted(&state());
        disk.apply(&m.log(&to_regions(&[1]), &[]));
        disk.tear(&m.reset_log(&to_regions(&[2])), |n| mask[n]);
        let kept = mask.iter().filter(|k| **k).count();
        let expected = match kept {
            512 => LogImage::Regions(vec![Region(2)]),
            _ => LogImage::Unreadable,
        };
        prop_assert_eq!(load(&disk).log, expected);
    }
}

/// `CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo test --lib costs -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn log_costs() {
    let (_, mut m) = Disk::formatted(&state());
    let mut n = 0;
    let run = |_| {
        let start = std::time::Instant::now();
        for _ in 0..2_000 {
            assert_eq!(
                std::hint::black_box(m.log(&[Region(n + 1)], &[Region(n)])).len(),
                1
            );
            n += 1;
        }
        start.elapsed().as_nanos() / 2_000
    };
    // The best of many runs, for the machine may have other things to do.
    println!("a transaction: {} ns", (0..50).map(run).min().unwrap_or(0));
}
