use proptest::prelude::*;

use super::{Disk, SIZE, bitmap, state};
use crate::copy::{FORMAT_VERSION, FormatError, Half, Metadata, Warning};
use crate::replication::copy_state::{CopyState, Standing};
use crate::replication::ids::{Epoch, Tag};

fn at_epoch(n: u64) -> CopyState {
    CopyState {
        epoch: Epoch(n),
        promised: Epoch(n + 1),
        tag: Tag(n * 7),
        ..state()
    }
}

/// Rewrites half `offset` after `change`, with a CRC that verifies.
fn forge(disk: &mut Disk, offset: usize, change: impl Fn(&mut [u8])) {
    let sector = &mut disk.bytes[offset..offset + 512];
    change(sector);
    sector[12..16].fill(0);
    let crc = crc32c::crc32c(sector);
    sector[12..16].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn every_field_reads_back() {
    let mut full = CopyState {
        standing: Standing::Inconsistent,
        clean: true,
        size: SIZE + 512,
        ..at_epoch(9)
    };
    full.bitmaps[0] = bitmap(8, 2);
    full.bitmaps[6] = bitmap(9, u64::MAX);
    let (mut disk, mut m) = Disk::formatted(&state());
    assert_eq!(Metadata::load(&disk).unwrap().state, state());
    for standing in [Standing::InSync, Standing::Inconsistent, Standing::Failed] {
        full.standing = standing;
        disk.apply(&[m.superblock(&full)]);
        let loaded = Metadata::load(&disk).unwrap();
        assert_eq!((loaded.state, loaded.warnings), (full.clone(), vec![]));
    }
}

#[test]
fn the_halves_take_turns_and_the_newer_one_wins() {
    let (mut disk, mut m) = Disk::formatted(&state());
    let mut offsets = Vec::new();
    for n in 10..14 {
        let write = m.superblock(&at_epoch(n));
        offsets.push(write.offset);
        disk.apply(&[write]);
        assert_eq!(Metadata::load(&disk).unwrap().state, at_epoch(n));
    }
    assert_eq!(offsets, [0, 4096, 0, 4096]);
}

#[test]
fn a_damaged_half_is_survived_reported_and_the_next_one_to_be_written() {
    for (damaged, offset, older) in [(Half::A, 0, 11), (Half::B, 4096, 10)] {
        let (mut disk, mut m) = Disk::formatted(&state());
        disk.apply(&[m.superblock(&at_epoch(10))]);
        disk.apply(&[m.superblock(&at_epoch(11))]);
        disk.flip((offset + 200) * 8);
        let mut loaded = Metadata::load(&disk).unwrap();
        assert_eq!(loaded.state, at_epoch(older));
        assert!(
            matches!(&loaded.warnings[..], [Warning::Superblock { damaged: d, .. }] if *d == damaged)
        );
        let write = loaded.metadata.superblock(&at_epoch(12));
        assert_eq!(write.offset, offset as u64);
        disk.apply(&[write]);
        let healed = Metadata::load(&disk).unwrap();
        assert_eq!((healed.state, healed.warnings), (at_epoch(12), vec![]));
    }
}

#[test]
fn a_half_that_cannot_be_read_is_survived_and_two_are_not() {
    let (mut disk, _) = Disk::formatted(&state());
    disk.lost.push(0);
    assert_eq!(Metadata::load(&disk).unwrap().warnings.len(), 1);
    disk.lost.push(8);
    assert!(matches!(
        Metadata::load(&disk),
        Err(FormatError::NoSuperblock { .. })
    ));
    let blank = Disk {
        bytes: vec![0; 300_000],
        lost: vec![],
    };
    assert!(
        matches!(Metadata::load(&blank), Err(FormatError::NoSuperblock { a, .. }) if a == "blank")
    );
    let nothing = Disk {
        bytes: vec![],
        lost: vec![],
    };
    assert!(matches!(
        Metadata::load(&nothing),
        Err(FormatError::NoSuperblock { .. })
    ));
}

#[test]
fn a_newer_format_is_refused_even_beside_an_older_half_and_says_what_is_read() {
    let (mut disk, _) = Disk::formatted(&state());
    forge(&mut disk, 0, |s| {
        s[8..12].copy_from_slice(&2u32.to_le_bytes())
    });
    let e = Metadata::load(&disk).unwrap_err();
    assert_eq!(
        e,
        FormatError::Newer {
            found: 2,
            reads: FORMAT_VERSION
        }
    );
    assert!(
        e.to_string().contains("format version 2") && e.to_string().contains("reads version 1")
    );
    // Without a CRC that verifies it is rot.
    let (mut disk, _) = Disk::formatted(&state());
    disk.flip(8 * 8 + 1);
    assert_eq!(Metadata::load(&disk).unwrap().warnings.len(), 1);
}

#[test]
fn generations_compare_across_their_wrap_and_never_become_zero() {
    let (mut disk, _) = Disk::formatted(&state());
    forge(&mut disk, 0, |s| {
        s[16..24].copy_from_slice(&u64::MAX.to_le_bytes())
    });
    forge(&mut disk, 4096, |s| {
        s[16..24].copy_from_slice(&(u64::MAX - 1).to_le_bytes())
    });
    let mut loaded = Metadata::load(&disk).unwrap();
    for n in 20..23 {
        let mut next = at_epoch(n);
        next.bitmaps[1] = bitmap(5, n);
        disk.apply(&[loaded.metadata.superblock(&next)]);
        loaded = Metadata::load(&disk).unwrap();
        assert_eq!(loaded.state, next);
    }
}

#[test]
fn a_field_out_of_range_is_damage() {
    for (at, value) in [(88, 0), (88, 4), (89, 2), (64, 99)] {
        let (mut disk, _) = Disk::formatted(&state());
        forge(&mut disk, 4096, |s| s[at] = value);
        assert_eq!(
            Metadata::load(&disk).unwrap().warnings.len(),
            1,
            "byte {at} = {value}"
        );
    }
}

#[test]
#[should_panic(expected = "S2")]
fn an_epoch_that_was_not_promised_is_the_callers_mistake() {
    let (_, mut m) = Disk::formatted(&state());
    m.superblock(&CopyState {
        epoch: Epoch(9),
        ..state()
    });
}

proptest! {
    /// Whatever sectors of a superblock in flight a crash leaves, the state is the old or the new one, with no warning.
    #[test]
    fn a_crash_leaves_the_old_or_the_new_state(mask in prop::collection::vec(any::<bool>(), 8), before in 0u64..5) {
        let (mut disk, mut m) = Disk::formatted(&state());
        for n in 0..before {
            disk.apply(&[m.superblock(&at_epoch(10 + n))]);
        }
        let old = Metadata::load(&disk).unwrap().state;
        disk.tear(&[m.superblock(&at_epoch(50))], |n| mask[n]);
        let loaded = Metadata::load(&disk).unwrap();
        prop_assert_eq!(loaded.state, if mask[0] { at_epoch(50) } else { old });
        prop_assert!(loaded.warnings.is_empty());
    }

    /// One flipped bit in either half's sector is noticed.
    #[test]
    fn rot_anywhere_in_a_superblock_is_noticed(half in 0usize..2, bit in 0usize..512 * 8) {
        let (mut disk, _) = Disk::formatted(&state());
        disk.flip(half * 4096 * 8 + bit);
        prop_assert_eq!(Metadata::load(&disk).unwrap().warnings.len(), 1);
    }
}
