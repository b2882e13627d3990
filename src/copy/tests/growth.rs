//! A copy grows, and the machine stops at any moment of it. What is there afterwards is the old size or the new one, and either
//! way every bit and region that was there before, and a tail in which nothing is marked.

use proptest::prelude::*;

use super::{Disk, SIZE, bitmap, state};
use crate::copy::layout::{WORDS_PER_PAGE, meta_len, page_offset, pages};
use crate::copy::{LogImage, MetaWrite, Metadata};
use crate::replication::copy_state::CopyState;
use crate::replication::ids::{CHUNK, Region};

/// 20 GiB and a sector: from 3 pages a slot to 11, the old end in the middle of a page, of a word and of a sector.
const NEW: u64 = (20 << 30) + 512;
const SLOTS: [usize; 2] = [2, 6];

fn sized(size: u64) -> CopyState {
    let mut s = state();
    s.size = size;
    s.bitmaps[SLOTS[0]] = bitmap(9, 3);
    s.bitmaps[SLOTS[1]] = bitmap(8, 2);
    s
}

fn chunks(size: u64) -> u32 {
    size.div_ceil(CHUNK) as u32
}

/// The bits of a slot's page before the growth; no two pages have the same.
fn marks(slot: usize, page: u64) -> Vec<u64> {
    let words = (u64::from(chunks(SIZE)).div_ceil(64) - page * WORDS_PER_PAGE as u64)
        .min(WORDS_PER_PAGE as u64);
    (0..words)
        .map(|w| (w + page * 1000 + slot as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        .collect()
}

/// A copy of the old size with marks in all its pages and regions in its log, both halves of the superblock alike.
fn grown_from() -> (Disk, Metadata) {
    let (mut disk, mut m) = Disk::formatted(&sized(SIZE));
    for _ in 0..2 {
        disk.apply(&[m.superblock(&sized(SIZE))]);
    }
    for slot in SLOTS {
        for page in 0..pages(SIZE) {
            disk.apply(&[m.bitmap_page(slot, page as u32, &marks(slot, page))]);
        }
    }
    disk.apply(&m.log(&[Region(0), Region(1279)], &[]));
    (disk, m)
}

/// What the next process finds; its size.
fn check(disk: &Disk) -> u64 {
    let loaded = Metadata::load(disk).unwrap();
    let size = loaded.state.size;
    assert_eq!(loaded.state, sized(size));
    assert!(size == SIZE || size == NEW);
    assert_eq!(loaded.log, LogImage::Regions(vec![Region(0), Region(1279)]));
    // "Truncated" otherwise.
    assert!(disk.bytes.len() as u64 >= meta_len(size));
    for slot in SLOTS {
        let bits = loaded.metadata.load_bitmap(disk, slot, chunks(size));
        let before: Vec<u64> = (0..pages(SIZE)).flat_map(|p| marks(slot, p)).collect();
        assert_eq!(bits[..before.len()], before, "slot {slot}");
        assert!(bits[before.len()..].iter().all(|w| *w == 0), "the tail");
        assert_eq!(bits.len() as u32, chunks(size).div_ceil(64));
    }
    size
}

fn superblocks(m: &mut Metadata) -> [MetaWrite; 2] {
    [m.superblock(&sized(NEW)), m.superblock(&sized(NEW))]
}

#[test]
fn whatever_is_lost_on_the_way_the_copy_has_its_old_size_or_its_new_one() {
    let (mut disk, mut m) = grown_from();
    assert_eq!(check(&disk), SIZE);
    // The file is longer: by any part of it, with or without the machine stopping here.
    for len in [
        meta_len(SIZE) + 512,
        meta_len(SIZE) + 4096 * 5,
        meta_len(NEW),
    ] {
        disk.bytes.resize(len as usize, 0);
        assert_eq!(check(&disk), SIZE);
    }
    // The superblock follows when that is durable. Each half whole or not at all, one after the other.
    for (half, size) in superblocks(&mut m).iter().zip([NEW, NEW]) {
        let mut torn = disk.clone();
        torn.tear(std::slice::from_ref(half), |sector| sector > 0);
        check(&torn);
        disk.apply(std::slice::from_ref(half));
        assert_eq!(check(&disk), size);
    }
    // Answered now. Any one half may rot, and the size stays.
    for half in [0, 4096] {
        let mut rotten = disk.clone();
        rotten.flip((half + 60) * 8);
        assert_eq!(check(&rotten), NEW);
    }
}

#[test]
fn a_half_that_rots_before_the_answer_takes_the_growth_back_and_nothing_else() {
    let (mut disk, mut m) = grown_from();
    disk.bytes.resize(meta_len(NEW) as usize, 0);
    let [first, _] = superblocks(&mut m);
    disk.apply(std::slice::from_ref(&first));
    disk.flip((first.offset as usize + 60) * 8);
    assert_eq!(check(&disk), SIZE);
    // It is tried again.
    let mut m = Metadata::load(&disk).unwrap().metadata;
    disk.apply(&superblocks(&mut m)[..1]);
    assert_eq!(check(&disk), NEW);
}

#[test]
fn marks_in_the_tail_are_kept_and_leave_those_before_it() {
    let (mut disk, mut m) = grown_from();
    disk.bytes.resize(meta_len(NEW) as usize, 0);
    for half in superblocks(&mut m) {
        disk.apply(&[half]);
    }
    // The page with the old end is written again, longer; a page further on for the first time; neighbours are not touched.
    let slot = SLOTS[0];
    let last = pages(SIZE) - 1;
    let mut longer = marks(slot, last);
    longer.resize(WORDS_PER_PAGE, 0);
    longer[WORDS_PER_PAGE - 1] = 1 << 63;
    let writes = [
        m.bitmap_page(slot, last as u32, &longer),
        m.bitmap_page(slot, 9, &[4]),
    ];
    assert_eq!(writes[1].offset, page_offset(slot, 9));
    disk.apply(&writes);
    let m = Metadata::load(&disk).unwrap().metadata;
    let bits = m.load_bitmap(&disk, slot, chunks(NEW));
    let mut expected: Vec<u64> = (0..last).flat_map(|p| marks(slot, p)).collect();
    expected.extend(longer);
    expected.resize(chunks(NEW).div_ceil(64) as usize, 0);
    expected[9 * WORDS_PER_PAGE] = 4;
    assert_eq!(bits, expected);
    let other = m.load_bitmap(&disk, SLOTS[1], chunks(NEW));
    let before = chunks(SIZE).div_ceil(64) as usize;
    assert!(other[before..].iter().all(|w| *w == 0));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// A disk that shows rubbish in a tail it did not flush: it costs copying, and is never a mark less.
    #[test]
    fn rubbish_in_the_tail_is_taken_for_marks(seed in any::<u64>(), at in 0u64..8 * 7 * 8) {
        let (mut disk, mut m) = grown_from();
        disk.bytes.resize(meta_len(NEW) as usize, 0);
        for half in superblocks(&mut m) {
            disk.apply(&[half]);
        }
        let sector = meta_len(SIZE) + at * 512;
        let mut word = seed | 1;
        for byte in &mut disk.bytes[sector as usize..][..512] {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (word >> 56) as u8;
        }
        let loaded = Metadata::load(&disk).unwrap();
        for slot in SLOTS {
            let bits = loaded.metadata.load_bitmap(&disk, slot, chunks(NEW));
            let before: Vec<u64> = (0..pages(SIZE)).flat_map(|p| marks(slot, p)).collect();
            prop_assert_eq!(&bits[..before.len()], &before[..]);
            // A page with rubbish reads as marked altogether, one without as clear.
            let tail = &bits[before.len()..];
            let page_of = |w: usize| (w + before.len()) / WORDS_PER_PAGE;
            for (w, bits) in tail.iter().enumerate() {
                let start = page_offset(slot, page_of(w) as u64);
                let hit = (start..start + 4096).contains(&sector);
                let last = w == tail.len() - 1;
                prop_assert_eq!(*bits == 0, !hit, "word {} {}", w, last);
            }
        }
    }
}
