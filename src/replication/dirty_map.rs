//! Which chunks a missing or syncing copy lacks (PROTOCOL 1, 6). One map for each such copy, on every in-sync copy.

use super::ids::{CHUNK, Chunk, REGION, Region, Span};

const CHUNKS_PER_REGION: u64 = REGION / CHUNK;

/// One bit a chunk; a set bit costs a copy of the chunk, a bit wrongly clear costs the data in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyMap {
    words: Vec<u64>,
    set: u64,
}

impl DirtyMap {
    /// No bit set, for a volume of `size` bytes.
    pub fn new(size: u64) -> Self {
        let mut map = Self {
            words: Vec::new(),
            set: 0,
        };
        map.grow(size);
        map
    }

    /// The bits as a disk had them.
    pub fn from_words(size: u64, words: Vec<u64>) -> Self {
        let mut map = Self { words, set: 0 };
        let chunks = size.div_ceil(CHUNK);
        map.words.resize(chunks.div_ceil(64) as usize, 0);
        if !chunks.is_multiple_of(64)
            && let Some(last) = map.words.last_mut()
        {
            *last &= (1 << (chunks % 64)) - 1;
        }
        map.set = map.words.iter().map(|w| u64::from(w.count_ones())).sum();
        map
    }

    /// Makes room for a volume of `size` bytes; new chunks are clear.
    pub fn grow(&mut self, size: u64) {
        let words = size.div_ceil(CHUNK).div_ceil(64) as usize;
        if words > self.words.len() {
            self.words.resize(words, 0);
        }
    }

    /// Marks `chunk`.
    pub fn set(&mut self, chunk: Chunk) {
        let word = &mut self.words[chunk.0 as usize / 64];
        let bit = 1 << (chunk.0 % 64);
        self.set += u64::from(*word & bit == 0);
        *word |= bit;
    }

    /// Marks every chunk of `span`.
    pub fn set_span(&mut self, span: Span) {
        span.chunks().for_each(|c| self.set(c));
    }

    /// Marks every chunk of `region` that a volume of `size` bytes has.
    pub fn set_region(&mut self, region: Region, size: u64) {
        let first = u64::from(region.0) * CHUNKS_PER_REGION;
        let end = (first + CHUNKS_PER_REGION).min(size.div_ceil(CHUNK));
        (first..end).for_each(|c| self.set(Chunk(c as u32)));
    }

    /// Whether `chunk` is marked.
    pub fn is_set(&self, chunk: Chunk) -> bool {
        self.words[chunk.0 as usize / 64] & (1 << (chunk.0 % 64)) != 0
    }

    /// Chunks marked.
    pub fn count(&self) -> u64 {
        self.set
    }

    /// The bits, chunk 0 lowest in the first word.
    pub fn words(&self) -> &[u64] {
        &self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_marks_its_chunks_and_no_chunk_past_the_end() {
        let size = REGION + 3 * CHUNK + 512;
        let mut map = DirtyMap::new(size);
        map.set_region(Region(1), size);
        assert_eq!(map.count(), 4);
        map.set_span(Span {
            offset: CHUNK - 512,
            len: 1024,
        });
        assert_eq!(map.count(), 6);
        assert!(map.is_set(Chunk(0)) && map.is_set(Chunk(1)) && !map.is_set(Chunk(2)));
        assert_eq!(DirtyMap::from_words(size, map.words().to_vec()), map);
    }

    #[test]
    fn bits_past_the_end_that_a_disk_invented_are_dropped() {
        let map = DirtyMap::from_words(3 * CHUNK, vec![u64::MAX, u64::MAX]);
        assert_eq!(map.count(), 3);
    }
}
