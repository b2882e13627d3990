use proptest::prelude::*;

use super::{Disk, SIZE, bitmap, state};
use crate::copy::layout::{self, WORDS_PER_PAGE, page_offset};
use crate::copy::{BITS_PER_PAGE, Metadata};
use crate::replication::copy_state::CopyState;

const CHUNKS: u32 = (SIZE / (64 << 10)) as u32;
/// Words of one sector.
const SECTOR_WORDS: usize = WORDS_PER_PAGE / 8;

fn with_slot(slot: usize, copy: u8, last: u64) -> CopyState {
    let mut s = state();
    s.bitmaps[slot] = bitmap(copy, last);
    s
}

/// A disk whose slot 2 is assigned to copy 9 by a durable superblock.
fn assigned() -> (Disk, Metadata) {
    let (mut disk, mut m) = Disk::formatted(&state());
    disk.apply(&[m.superblock(&with_slot(2, 9, 3))]);
    (disk, m)
}

fn load(disk: &Disk, slot: usize) -> Vec<u64> {
    Metadata::load(disk)
        .unwrap()
        .metadata
        .load_bitmap(disk, slot, CHUNKS)
}

fn ones(bits: &[u64]) -> u32 {
    bits.iter().map(|w| w.count_ones()).sum()
}

#[test]
fn pages_read_back_and_do_not_touch_other_slots() {
    let (mut disk, mut m) = assigned();
    let mut two = with_slot(2, 9, 3);
    two.bitmaps[3] = bitmap(8, 1);
    disk.apply(&[m.superblock(&two)]);
    disk.apply(&[
        m.bitmap_page(2, 0, &[5, 0, 1 << 63]),
        m.bitmap_page(2, 2, &[0, 6]),
    ]);
    let bits = load(&disk, 2);
    assert_eq!(bits.len(), CHUNKS.div_ceil(64) as usize);
    assert_eq!(
        (bits[0], bits[2], bits[2 * WORDS_PER_PAGE + 1], ones(&bits)),
        (5, 1 << 63, 6, 5)
    );
    assert_eq!(ones(&load(&disk, 3)), 0);
}

#[test]
fn a_new_assignment_starts_clear_whoever_had_the_slot_before() {
    let (mut disk, mut m) = assigned();
    disk.apply(&[m.bitmap_page(2, 0, &[u64::MAX; WORDS_PER_PAGE])]);
    for next in [with_slot(2, 8, 7), with_slot(2, 8, 9), with_slot(2, 9, 3)] {
        disk.apply(&[m.superblock(&next)]);
        assert_eq!(ones(&load(&disk, 2)), 0);
        disk.apply(&[m.bitmap_page(2, 1, &[3])]);
        assert_eq!(ones(&load(&disk, 2)), 2);
    }
}

#[test]
fn an_assignment_that_stays_keeps_its_bits() {
    let (mut disk, mut m) = assigned();
    disk.apply(&[m.bitmap_page(2, 0, &[7])]);
    let mut other = with_slot(2, 9, 3);
    other.bitmaps[0] = bitmap(4, 4);
    disk.apply(&[m.superblock(&other)]);
    assert_eq!(ones(&load(&disk, 2)), 3);
    let mut again = Metadata::load(&disk).unwrap().metadata;
    disk.apply(&[again.superblock(&with_slot(2, 9, 3))]);
    assert_eq!(ones(&load(&disk, 2)), 3);
}

#[test]
fn pages_of_an_assignment_whose_superblock_was_lost_read_as_set() {
    let (mut disk, mut m) = assigned();
    disk.apply(&[m.bitmap_page(2, 0, &[7])]);
    let newest = m.superblock(&with_slot(2, 8, 5));
    let damaged = newest.offset as usize;
    disk.apply(&[newest]);
    disk.apply(&[m.bitmap_page(2, 0, &[0])]);
    disk.flip((damaged + 30) * 8);
    // Copy 9 has the slot again, and its bits were overwritten: nothing is known of them.
    let bits = load(&disk, 2);
    assert_eq!(bits[..WORDS_PER_PAGE], [u64::MAX; WORDS_PER_PAGE]);
    assert_eq!(ones(&bits), BITS_PER_PAGE);
}

#[test]
fn an_assignment_made_again_after_its_superblock_was_lost_keeps_what_was_marked() {
    for (again, expected) in [(with_slot(2, 8, 5), 4), (with_slot(2, 7, 5), BITS_PER_PAGE)] {
        let (mut disk, mut m) = assigned();
        let newest = m.superblock(&with_slot(2, 8, 5));
        let damaged = newest.offset as usize;
        disk.apply(&[newest]);
        disk.apply(&[m.bitmap_page(2, 0, &[0xf])]);
        disk.flip((damaged + 30) * 8);
        let mut survivor = Metadata::load(&disk).unwrap().metadata;
        disk.apply(&[survivor.superblock(&again)]);
        assert_eq!(ones(&load(&disk, 2)), expected);
    }
}

#[test]
fn what_cannot_be_read_or_lies_beyond_the_file_is_set_up_to_the_last_chunk() {
    let (mut disk, m) = assigned();
    disk.lost.push(page_offset(2, 0) as usize / 512);
    let bits = m.load_bitmap(&disk, 2, CHUNKS - 7);
    assert_eq!(ones(&bits), BITS_PER_PAGE);
    disk.lost.clear();
    disk.bytes.truncate(page_offset(2, 2) as usize);
    let bits = m.load_bitmap(&disk, 2, CHUNKS - 7);
    assert_eq!(ones(&bits), CHUNKS - 7 - 2 * BITS_PER_PAGE);
    assert_eq!(bits.last().unwrap().leading_zeros(), 7);
}

#[test]
fn a_sector_lost_to_zeros_in_a_written_page_is_set() {
    let (mut disk, m) = assigned();
    disk.apply(&[m.bitmap_page(2, 0, &[])]);
    let at = page_offset(2, 0) as usize + 3 * 512;
    disk.bytes[at..at + 512].fill(0);
    let bits = load(&disk, 2);
    assert_eq!(ones(&bits) as usize, SECTOR_WORDS * 64);
    assert_eq!(
        bits[3 * SECTOR_WORDS..4 * SECTOR_WORDS],
        [u64::MAX; SECTOR_WORDS]
    );
}

#[test]
fn a_page_from_another_place_is_set() {
    let (mut disk, m) = assigned();
    let mut stray = m.bitmap_page(2, 0, &[1]);
    stray.offset = page_offset(2, 1);
    disk.apply(&[stray]);
    assert_eq!(ones(&load(&disk, 2)), BITS_PER_PAGE);
}

#[test]
fn growing_a_volume_appends_pages() {
    assert_eq!(layout::pages(1), 1);
    assert_eq!(layout::pages(1920 << 20), 1);
    assert_eq!(layout::pages((1920 << 20) + 1), 2);
    assert_eq!(layout::meta_len(1), layout::BITMAPS + 7 * 4096);
    assert_eq!(layout::page_offset(6, 0) + 4096, layout::page_offset(0, 1));
    assert_eq!(layout::data_len(4097), 3 * 4096);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// After a crash each sector of a page in flight has the old bits or the new ones; in a page's first write, or all set.
    #[test]
    fn a_torn_page_reads_old_or_new_or_all_set(
        first in any::<bool>(),
        old in prop::collection::vec(any::<u64>(), WORDS_PER_PAGE),
        new in prop::collection::vec(any::<u64>(), WORDS_PER_PAGE),
        mask in prop::collection::vec(any::<bool>(), 8),
    ) {
        let (mut disk, m) = assigned();
        if !first {
            disk.apply(&[m.bitmap_page(2, 1, &old)]);
        }
        disk.tear(&[m.bitmap_page(2, 1, &new)], |n| mask[n]);
        let bits = load(&disk, 2);
        let untouched = first && !mask.contains(&true);
        for (i, part) in bits[WORDS_PER_PAGE..2 * WORDS_PER_PAGE].chunks(SECTOR_WORDS).enumerate() {
            let words = i * SECTOR_WORDS..(i + 1) * SECTOR_WORDS;
            let expected = match (mask[i], first) {
                (true, _) => new[words].to_vec(),
                (false, false) => old[words].to_vec(),
                (false, true) => vec![if untouched { 0 } else { u64::MAX }; SECTOR_WORDS],
            };
            prop_assert_eq!(part, &expected[..]);
        }
        prop_assert_eq!(ones(&bits[..WORDS_PER_PAGE]) + ones(&bits[2 * WORDS_PER_PAGE..]), 0);
    }

    /// One flipped bit in a page sets its sector's bits and leaves the others.
    #[test]
    fn rot_in_a_page_sets_its_sector(bits in prop::collection::vec(any::<u64>(), WORDS_PER_PAGE), bit in 0usize..4096 * 8) {
        let (mut disk, m) = assigned();
        disk.apply(&[m.bitmap_page(2, 0, &bits)]);
        disk.flip(page_offset(2, 0) as usize * 8 + bit);
        let read = load(&disk, 2);
        for (i, part) in read[..WORDS_PER_PAGE].chunks(SECTOR_WORDS).enumerate() {
            if i == bit / (512 * 8) {
                prop_assert_eq!(part, &[u64::MAX; SECTOR_WORDS][..]);
            } else {
                prop_assert_eq!(part, &bits[i * SECTOR_WORDS..(i + 1) * SECTOR_WORDS]);
            }
        }
    }
}
