//! Which copies a volume gets and gives up: pure functions on its record.
//!
//! A record's copies are changed from two sides. The attachment alone says which are in sync, removes them and picks
//! the master. From here come wishes, which touch neither: a blank entry more, an entry that is to leave, the copy that
//! should be the master. So the two never undo each other, whoever is first.

use std::collections::BTreeSet;

use crate::replication::ids::{COPIES_MAX, CopyId, NodeName};
use crate::replication::record::{Base, CopyEntry, CopyStatus, Record};

/// The copies that are to stay.
pub fn staying(record: &Record) -> impl Iterator<Item = &CopyEntry> {
    record.present().filter(|c| !c.leaving)
}

/// Whether the copy was never in sync: nothing on its disk is worth waiting for.
pub fn is_blank(entry: &CopyEntry) -> bool {
    let CopyEntry { base, .. } = CopyEntry::blank(entry.copy_id, entry.node.clone());
    let never: Base = base;
    entry.status == CopyStatus::Missing && entry.base == never
}

/// How many copies are to be added, when those of `lost` are not counted on any more.
pub fn lacking(record: &Record, lost: &BTreeSet<CopyId>) -> usize {
    let counted = staying(record).filter(|c| !lost.contains(&c.copy_id));
    (usize::from(record.replicas_wanted) + 1).saturating_sub(counted.count())
}

/// Adds a blank copy on `node`. Behind the others as long as there is room: a removed copy's entry tells its node to
/// delete the files, which it may not have done yet. `None` when all places are taken.
pub fn add(record: &mut Record, copy: CopyId, node: NodeName) -> Option<usize> {
    let entry = CopyEntry::blank(copy, node);
    if record.copies.len() < COPIES_MAX {
        record.copies.push(entry);
        return Some(record.copies.len() - 1);
    }
    record.add_copy(entry)
}

/// What is known about the copies besides their record.
#[derive(Debug, Default)]
pub struct Known {
    /// Being brought up to date now.
    pub syncing: BTreeSet<CopyId>,
    /// Nodes that do not answer.
    pub offline: BTreeSet<NodeName>,
    /// The node that serves the volume.
    pub served_on: Option<NodeName>,
}

/// Which copies leave when `replicas` of them are enough: those that help least. Missing before syncing before in
/// sync, of equal ones the newest place; the copy next to the virtual machine late, the master last, so that at least
/// one copy in sync stays if there is one.
pub fn choose_leaving(record: &Record, replicas: u8, known: &Known) -> Vec<CopyId> {
    let rank = |c: &CopyEntry| {
        let offline = known.offline.contains(&c.node);
        if c.copy_id == record.master {
            return 7;
        }
        match c.status {
            CopyStatus::InSync if record.preferred == Some(c.copy_id) => 6,
            CopyStatus::InSync if known.served_on.as_ref() == Some(&c.node) => 5,
            CopyStatus::InSync if !offline => 4,
            CopyStatus::InSync => 3,
            _ if known.syncing.contains(&c.copy_id) => 2,
            _ if !offline => 1,
            _ => 0,
        }
    };
    let mut copies: Vec<(usize, &CopyEntry)> = staying(record).map(|c| (rank(c), c)).collect();
    // The last place first, and the sort keeps the order of equals.
    copies.reverse();
    copies.sort_by_key(|(rank, _)| *rank);
    let surplus = copies.len().saturating_sub(usize::from(replicas) + 1);
    copies[..surplus].iter().map(|(_, c)| c.copy_id).collect()
}

/// Flags copies that are to leave.
pub fn leave(record: &mut Record, leaving: &[CopyId]) {
    for copy in &mut record.copies {
        copy.leaving |= leaving.contains(&copy.copy_id);
    }
    // A copy that leaves is not promoted on purpose.
    record.preferred = record.preferred.filter(|p| !leaving.contains(p));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::{copy, node, record};

    #[test]
    fn the_copies_that_help_least_leave_first() {
        // (copies, syncing, offline, served on, preferred, replicas, leave)
        type Case<'a> = (
            &'a str,
            &'a [u8],
            &'a [&'a str],
            Option<&'a str>,
            Option<u8>,
            u8,
            &'a [u8],
        );
        let table: &[Case<'_>] = &[
            ("n1:i n2:i n3:i", &[], &[], None, None, 2, &[]),
            ("n1:i n2:i n3:i", &[], &[], None, None, 1, &[3]),
            ("n1:i n2:i n3:i", &[], &[], None, None, 0, &[3, 2]),
            ("n1:i n2:m n3:i", &[], &[], None, None, 1, &[2]),
            ("n1:i n2:m n3:i", &[], &[], None, None, 0, &[2, 3]),
            // A missing one that cannot be reached before one that can; one that syncs after both.
            ("n1:i n2:m n3:m n4:b", &[], &["n2"], None, None, 2, &[2]),
            ("n1:i n2:m n3:m n4:b", &[4], &["n2"], None, None, 1, &[2, 3]),
            ("n1:i n2:i n3:m", &[3], &["n2"], None, None, 1, &[3]),
            // Of those in sync: unreachable first, the one beside the machine late, the wished-for master later.
            ("n1:i n2:i n3:i", &[], &["n2"], None, None, 1, &[2]),
            ("n1:i n2:i n3:i", &[], &[], Some("n3"), None, 1, &[2]),
            ("n1:i n2:i n3:i", &[], &[], Some("n3"), Some(2), 1, &[3]),
            // The master last, even when it cannot be reached, and alone it stays.
            ("n1:i n2:i n3:i", &[], &["n1"], None, None, 0, &[3, 2]),
            ("n1:i n2:m", &[], &[], None, None, 0, &[2]),
            // What leaves already does not count.
            ("n1:i n2:il n3:i", &[], &[], None, None, 1, &[]),
            ("n1:il n2:b n3:i", &[], &[], None, None, 0, &[2]),
            ("n1:i n2:r n3:i", &[], &[], None, None, 1, &[]),
        ];
        for (copies, syncing, offline, served_on, preferred, replicas, expected) in table {
            let mut record = record(copies);
            record.preferred = preferred.map(copy);
            let known = Known {
                syncing: syncing.iter().map(|n| copy(*n)).collect(),
                offline: offline.iter().map(|n| node(n)).collect(),
                served_on: served_on.map(node),
            };
            let expected: Vec<CopyId> = expected.iter().map(|n| copy(*n)).collect();
            let leaving = choose_leaving(&record, *replicas, &known);
            assert_eq!(leaving, expected, "{copies} to {replicas} with {known:?}");
            let in_sync = staying(&record).any(|c| c.status == CopyStatus::InSync);
            leave(&mut record, &leaving);
            let stays = staying(&record).any(|c| c.status == CopyStatus::InSync);
            assert_eq!(stays, in_sync, "{copies}: none in sync stays");
        }
    }

    #[test]
    fn what_is_lacking_is_what_cannot_be_counted_on() {
        for (copies, wanted, lost, expected) in [
            ("n1:i n2:i", 1, &[][..], 0),
            ("n1:i n2:m", 1, &[], 0),
            ("n1:i n2:m", 1, &[2], 1),
            ("n1:i n2:m n3:b", 1, &[2], 0),
            ("n1:i n2:m n3:b", 1, &[2, 3], 1),
            ("n1:i n2:m n3:m", 2, &[2, 3], 2),
            // A copy that moves: the new one counts, the old one does not.
            ("n1:i n2:il n3:b", 1, &[], 0),
            ("n1:i n2:il n3:b", 1, &[3], 1),
            ("n1:i n2:r", 1, &[], 1),
            ("n1:i n2:i n3:m", 1, &[3], 0),
        ] {
            let record = Record {
                replicas_wanted: wanted,
                ..record(copies)
            };
            let lost = lost.iter().map(|n| copy(*n)).collect();
            assert_eq!(
                lacking(&record, &lost),
                expected,
                "{copies} without {lost:?}"
            );
        }
    }

    #[test]
    fn a_new_copy_takes_a_removed_ones_place_only_when_there_is_no_other() {
        let mut few = record("n1:i n2:r");
        assert_eq!(add(&mut few, copy(9), node("n3")), Some(2));
        assert_eq!(few.copies[1].status, CopyStatus::Removed);
        assert!(is_blank(&few.copies[2]) && !is_blank(&few.copies[0]));
        let mut many = record("n1:i n2:m n3:r n4:m n5:m n6:m n7:m n8:m");
        assert_eq!(add(&mut many, copy(9), node("n9")), Some(2));
        assert_eq!(add(&mut many, copy(10), node("n10")), None);
    }
}
