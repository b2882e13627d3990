//! Dirty bitmaps: pages of sealed sectors, and what an unexpected sector means.

use super::layout::{BITS_PER_PAGE, BLOCK, PAYLOAD, SECTOR_PAYLOAD, WORDS_PER_PAGE, page_offset};
use super::metadata::{MetaWrite, ReadAt};
use super::sector::{self, Kind, Label, Salt, array_at, u64_at};
use super::superblock::newer;
use crate::replication::ids::{CopyId, SECTOR};

/// Words of one sector.
const WORDS_PER_SECTOR: usize = SECTOR_PAYLOAD / 8;

/// For whom, and since which superblock, a slot is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    pub copy: CopyId,
    pub generation: u64,
}

impl Assignment {
    fn label(self) -> Label {
        let mut wide = [0; 24];
        wide[..16].copy_from_slice(&self.copy.0);
        wide[16..].copy_from_slice(&self.generation.to_le_bytes());
        Label {
            small: [0; 2],
            wide,
        }
    }
}

pub(super) fn page(
    salt: Salt,
    slot: usize,
    index: u32,
    assignment: Assignment,
    bits: &[u64],
) -> MetaWrite {
    assert!(
        bits.len() <= WORDS_PER_PAGE,
        "{} words do not fit a bitmap page",
        bits.len()
    );
    let mut payload = [0; PAYLOAD];
    for (bytes, word) in payload.chunks_exact_mut(8).zip(bits) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let offset = page_offset(slot, u64::from(index));
    let mut bytes = vec![0; BLOCK as usize].into_boxed_slice();
    sector::seal(
        salt,
        offset,
        Kind::Bitmap,
        assignment.label(),
        &payload,
        &mut bytes,
    );
    MetaWrite { offset, bytes }
}

/// The first `chunks` bits of `slot`; bits beyond are clear.
pub(super) fn load(
    salt: Salt,
    meta: &dyn ReadAt,
    slot: usize,
    assignment: Assignment,
    chunks: u32,
) -> Vec<u64> {
    let words = (chunks as usize).div_ceil(64);
    let mut bits = Vec::with_capacity(words);
    for index in 0..u64::from(chunks.div_ceil(BITS_PER_PAGE)) {
        let offset = page_offset(slot, index);
        match meta.read(offset, BLOCK as usize) {
            Ok(page) if page.len() as u64 == BLOCK => {
                read_page(salt, offset, assignment, &page, &mut bits)
            }
            // Unreadable, or beyond the end: a stale set bit costs a copy, a stale clear bit costs data.
            _ => bits.extend([u64::MAX; WORDS_PER_PAGE]),
        }
    }
    bits.truncate(words);
    if let (Some(last), tail @ 1..) = (bits.last_mut(), chunks % 64) {
        *last &= (1 << tail) - 1;
    }
    bits
}

/// Appends the words of one page. What each sector means is a table in docs/DISK-FORMAT.md.
fn read_page(salt: Salt, offset: u64, assignment: Assignment, page: &[u8], bits: &mut Vec<u64>) {
    if page.iter().all(|b| *b == 0) {
        bits.extend([0; WORDS_PER_PAGE]);
        return;
    }
    for (i, bytes) in page.chunks_exact(SECTOR as usize).enumerate() {
        let Some(read) = sector::open(salt, offset + i as u64 * SECTOR, Kind::Bitmap, bytes) else {
            bits.extend([u64::MAX; WORDS_PER_SECTOR]);
            continue;
        };
        let generation = u64_at(&read.label.wide, 16);
        if generation == assignment.generation
            && CopyId(array_at(&read.label.wide, 0)) == assignment.copy
        {
            bits.extend(read.payload.chunks_exact(8).map(|w| u64_at(w, 0)));
        } else if newer(assignment.generation, generation) {
            bits.extend([0; WORDS_PER_SECTOR]);
        } else {
            bits.extend([u64::MAX; WORDS_PER_SECTOR]);
        }
    }
}
