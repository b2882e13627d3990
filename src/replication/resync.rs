//! What a returning copy can be brought up to date from (PROTOCOL 6), and what the others mark for it meanwhile: pure functions.

use super::copy_set::CopySet;
use super::ids::{Epoch, Region, Tag};
use super::message::{Absent, DiskState};
use super::mutants::{self, Mutant};
use super::record::Record;

/// The regions of its own log that are to be marked for a copy whose disk says `disk`, so that it gets a delta: what was marked
/// since it was in sync, and these. `None`: nothing is known of what it holds, or of where: all is to be marked.
///
/// Only a copy that is where the record remembers it is brought up to date from there: the bitmaps count from then.
pub fn delta(record: &Record, copy: usize, disk: &DiskState) -> Option<Vec<Region>> {
    let base = record.copies[copy].base;
    let based = base.since <= disk.epoch && base.last.is_none_or(|last| disk.epoch <= last);
    let known = is_known(record, disk.epoch, disk.tag) && based
        || mutants::on(Mutant::ReuseIdentity) && base.since.0 > 0;
    if known && mutants::on(Mutant::DropReturningLog) {
        return Some(Vec::new());
    }
    disk.regions.clone().filter(|_| known)
}

/// Whether the volume was in this epoch under this tag, as far as the record remembers.
fn is_known(record: &Record, epoch: Epoch, tag: Tag) -> bool {
    record.lineage.contains(&(epoch, tag))
}

/// What a copy marks in the bitmap it keeps for another, when a configuration says that one is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// Nothing that is not marked already.
    Nothing,
    /// The regions of its log: there the two may differ.
    Log,
    /// Everything: it was away itself, and knows nothing of what others missed.
    All,
}

/// The marks due in a bitmap for `absent`. `kept`: the bitmap was there before, and whether writes were mirrored then; `target`:
/// the copy that keeps it is itself being brought up to date.
pub fn marks(kept: Option<bool>, absent: &Absent, target: bool) -> Marks {
    match kept {
        _ if target => Marks::All,
        // What the absent copy may lack of epochs up to its last is in this log: every write it did not acknowledge made its
        // region active here first (PROTOCOL 2.6, S11).
        None => Marks::Log,
        // S11: what it did not flush of the writes mirrored to it is in this log: a region leaves only when the write is durable
        // on the in-sync copies and on those that were mirrored to.
        Some(true) if !absent.mirrored => Marks::Log,
        Some(_) => Marks::Nothing,
    }
}

/// Of the copies that are brought up to date, each with its chunks to go, those that need not be: `need` others lack less.
/// A lost copy that returns while its successor is filled usually lacks less (PROTOCOL 6).
pub fn surplus(need: usize, mut racing: Vec<(u64, usize)>) -> CopySet {
    racing.sort_unstable();
    racing.iter().skip(need).map(|(_, copy)| *copy).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::failure_mode::FailureMode;
    use crate::replication::ids::{BootId, CopyId, NodeName, VolumeId};
    use crate::replication::record::{Base, CopyEntry, CopyStatus, State};

    /// A copy that was in sync from epoch 3 to 5 of a volume that is in epoch 7 and remembers its epochs from 4 on; epoch e has
    /// tag 10 e.
    fn record() -> Record {
        let mut entry = CopyEntry::blank(CopyId([1; 16]), NodeName("n1".into()));
        entry.base = Base {
            since: Epoch(3),
            last: Some(Epoch(5)),
        };
        Record {
            volume_id: VolumeId([1; 16]),
            size: 1 << 30,
            block_size: 512,
            replicas_wanted: 1,
            failure_mode: FailureMode::AlwaysOn,
            suspend_deadline_ms: 0,
            compress: false,
            epoch: Epoch(7),
            epoch_tag: Tag(70),
            state: State::Active,
            attachment: None,
            master: CopyId([0; 16]),
            preferred: None,
            grow: None,
            copies: vec![entry],
            lineage: (4..=7).map(|e| (Epoch(e), Tag(10 * e))).collect(),
        }
    }

    #[test]
    fn a_copy_gets_a_delta_only_from_where_the_record_remembers_it() {
        // (epoch, tag on the disk, delta)
        for (epoch, tag, gets_delta) in [
            (4, 40, true),
            (5, 50, true),
            // Not in sync then: the bitmaps do not say what it missed.
            (6, 60, false),
            (7, 70, false),
            // Another history.
            (5, 51, false),
            // In sync then, but too long ago to be known by its tag.
            (3, 30, false),
            (2, 20, false),
            // Blank (S18).
            (0, 0, false),
        ] {
            let disk = DiskState {
                promised: Epoch(7),
                probe: false,
                epoch: Epoch(epoch),
                tag: Tag(tag),
                boot_id: BootId([1; 16]),
                clean: false,
                regions: Some(vec![Region(3)]),
            };
            let own = delta(&record(), 0, &disk);
            let follows = gets_delta.then(|| vec![Region(3)]);
            assert_eq!(own, follows, "epoch {epoch}, tag {tag}");
        }
        // One that is in sync has no last epoch.
        let mut r = record();
        r.copies[0].base.last = None;
        r.copies[0].status = CopyStatus::InSync;
        let disk = DiskState {
            promised: Epoch(7),
            probe: false,
            epoch: Epoch(7),
            tag: Tag(70),
            boot_id: BootId([1; 16]),
            clean: false,
            regions: Some(Vec::new()),
        };
        assert_eq!(delta(&r, 0, &disk), Some(Vec::new()));
    }

    #[test]
    fn a_bitmap_is_marked_with_the_log_when_it_begins_and_when_mirroring_ends() {
        use Marks::*;
        // (kept before: mirrored then; mirrored now; the keeper is a target; marks)
        for (kept, mirrored, target, follows) in [
            (None, false, false, Log),
            (None, true, false, Log),
            (Some(false), false, false, Nothing),
            (Some(false), true, false, Nothing),
            (Some(true), true, false, Nothing),
            (Some(true), false, false, Log),
            (None, false, true, All),
            (Some(false), false, true, All),
            (Some(true), true, true, All),
        ] {
            let absent = Absent {
                copy_id: CopyId([1; 16]),
                last: Epoch(5),
                mirrored,
            };
            let due = marks(kept, &absent, target);
            assert_eq!(due, follows, "{kept:?} {mirrored} {target}");
        }
    }

    #[test]
    fn of_racing_copies_those_with_fewer_bits_stay() {
        // (needed, [(chunks to go, place)], surplus)
        for (need, racing, expected) in [
            (1, &[][..], &[][..]),
            (1, &[(9, 2)], &[]),
            (1, &[(9, 2), (3, 4)], &[2]),
            (1, &[(0, 1), (3, 4), (9, 2)], &[2, 4]),
            (2, &[(9, 2), (3, 4), (5, 0)], &[2]),
            (2, &[(9, 2), (3, 4)], &[]),
            (1, &[(3, 4), (3, 2)], &[4]),
            (0, &[(3, 4)], &[4]),
        ] {
            let expected: CopySet = expected.iter().copied().collect();
            let of = format!("{need} of {racing:?}");
            assert_eq!(surplus(need, racing.to_vec()), expected, "{of}");
        }
    }
}
