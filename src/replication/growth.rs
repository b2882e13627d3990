//! Whether a volume is as large as was wished for: one pure function from the record and what the attachment knows of the
//! copies' room to the next record (PROTOCOL 11.4, S20).

use super::copy_set::CopySet;
use super::membership::with_status;
use super::mutants::{self, Mutant};
use super::record::{CopyStatus, Growth, Record};

/// The size that the attachment is to bring about, if there is one.
pub fn wanted(record: &Record) -> Option<u64> {
    let open = record.grow.as_ref().filter(|g| g.refused.is_none())?;
    Some(open.to)
}

/// The record that follows, in the same epoch still; `None` when nothing is to change, or not yet. `lacking`: copies that are
/// not known to have room for what is wanted. `targets`: those that are being brought up to date; other absent ones
/// make room when their turn comes. `refused`: why a copy that takes part never will.
pub fn next(
    record: &Record,
    lacking: CopySet,
    targets: CopySet,
    refused: Option<&str>,
) -> Option<Record> {
    let to = wanted(record)?;
    let members = with_status(record, CopyStatus::InSync);
    let removed = with_status(record, CopyStatus::Removed);
    let take_part = members.or(targets.without(removed));
    let mut next = record.clone();
    if to <= record.size {
        next.grow = None;
    } else if let Some(why) = refused {
        next.grow = Some(Growth {
            to,
            refused: Some(why.into()),
        });
    } else if take_part.and(lacking).is_empty() || mutants::on(Mutant::GrowUnasked) {
        (next.size, next.grow) = (to, None);
    } else {
        return None;
    }
    Some(next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::attachment::bench_record;
    use crate::replication::record::State;

    #[test]
    fn a_volume_grows_when_all_that_take_part_have_room_and_keeps_its_size_otherwise() {
        let set = |copies: &[usize]| copies.iter().copied().collect::<CopySet>();
        let (old, new) = (bench_record(3, State::Active).size, 1 << 40);
        // (out of sync, lacking, targets, refused, the size and the wish that follow)
        type Case = (
            &'static [usize],
            &'static [usize],
            &'static [usize],
            Option<&'static str>,
            Option<(bool, bool)>,
        );
        let table: &[Case] = &[
            (&[], &[], &[], None, Some((true, false))),
            (&[], &[0, 1, 2], &[], None, None),
            (&[], &[2], &[], None, None),
            // Ejected meanwhile: makes room when it is back.
            (&[2], &[2], &[], None, Some((true, false))),
            (&[2], &[2], &[2], None, None),
            (&[2], &[], &[2], None, Some((true, false))),
            (&[], &[2], &[], Some("full"), Some((false, true))),
        ];
        for (out, lacking, targets, refused, follows) in table {
            let mut record = bench_record(3, State::Active);
            record.grow = Some(Growth {
                to: new,
                refused: None,
            });
            out.iter()
                .for_each(|c| record.copies[*c].status = CopyStatus::Missing);
            let then = next(&record, set(lacking), set(targets), *refused);
            let seen = then.as_ref().map(|r| (r.size == new, r.grow.is_some()));
            assert_eq!(seen, *follows, "{out:?} {lacking:?} {targets:?}");
            if let Some(r) = then {
                assert!(r.size == new || r.size == old);
                // What was refused is not tried again by itself.
                assert_eq!(next(&r, CopySet::EMPTY, CopySet::EMPTY, None), None);
            }
        }
        // A wish that came true otherwise, or is of long ago, is dropped.
        let mut record = bench_record(1, State::Active);
        record.grow = Some(Growth {
            to: old,
            refused: None,
        });
        let then = next(&record, set(&[0]), CopySet::EMPTY, None).unwrap();
        assert_eq!((then.size, then.grow), (old, None));
    }
}
