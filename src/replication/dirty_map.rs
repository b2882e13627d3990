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

    /// Marks these regions; without any named (`None`), all.
    pub fn set_regions(&mut self, regions: Option<&[Region]>, size: u64) {
        match regions {
            Some(regions) => regions.iter().for_each(|r| self.set_region(*r, size)),
            None => self.set_all(size),
        }
    }

    /// Takes the mark off `chunk`; whether there was one.
    pub fn clear(&mut self, chunk: Chunk) -> bool {
        let word = &mut self.words[chunk.0 as usize / 64];
        let bit = 1 << (chunk.0 % 64);
        let was = *word & bit != 0;
        *word &= !bit;
        self.set -= u64::from(was);
        was
    }

    /// Marks every chunk that a volume of `size` bytes has.
    pub fn set_all(&mut self, size: u64) {
        *self = Self::from_words(size, vec![u64::MAX; self.words.len()]);
    }

    /// The first marked chunk from `from` on.
    pub fn next(&self, from: Chunk) -> Option<Chunk> {
        let first = from.0 as usize / 64;
        let mut mask = u64::MAX << (from.0 % 64);
        for (at, word) in self.words.iter().enumerate().skip(first) {
            let rest = word & mask;
            if rest != 0 {
                return Some(Chunk(at as u32 * 64 + rest.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    /// The marked chunks, in order.
    pub fn iter(&self) -> impl Iterator<Item = Chunk> {
        std::iter::successors(self.next(Chunk(0)), |c| self.next(Chunk(c.0 + 1)))
    }

    /// The bits of `count` chunks from `first` on, that one lowest.
    pub fn range(&self, first: Chunk, count: u32) -> Vec<u64> {
        let mut words = vec![0u64; count.div_ceil(64) as usize];
        for i in 0..count {
            if self.is_set(Chunk(first.0 + i)) {
                words[i as usize / 64] |= 1 << (i % 64);
            }
        }
        words
    }

    /// Whether a chunk of `span` is marked.
    pub fn touches(&self, span: Span) -> bool {
        span.chunks().any(|c| self.is_set(c))
    }

    /// Whether every chunk of `span` is marked.
    pub fn covers(&self, span: Span) -> bool {
        span.chunks().all(|c| self.is_set(c))
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
    fn marked_chunks_are_found_in_order_and_can_be_cleared() {
        let mut map = DirtyMap::new(200 * CHUNK);
        [3, 63, 64, 199].into_iter().for_each(|c| map.set(Chunk(c)));
        let found: Vec<u32> = map.iter().map(|c| c.0).collect();
        assert_eq!(found, [3, 63, 64, 199]);
        assert!(map.clear(Chunk(63)) && !map.clear(Chunk(63)));
        assert_eq!((map.count(), map.next(Chunk(4))), (3, Some(Chunk(64))));
        map.set_all(199 * CHUNK + 512);
        assert_eq!(map.count(), 200);
    }

    #[test]
    fn bits_past_the_end_that_a_disk_invented_are_dropped() {
        let map = DirtyMap::from_words(3 * CHUNK, vec![u64::MAX, u64::MAX]);
        assert_eq!(map.count(), 3);
    }
}
