//! Which chunks of a copy's data file hold data: a full sync copies no others (PROTOCOL 6).
//!
//! Asked of the file system chunk by chunk, with SEEK_DATA (lseek(2)). SEEK_HOLE, which would jump over a whole extent, may
//! look at all pages of a file in one call: milliseconds for each GiB, while guests wait for the worker that made it. For
//! their sake a [`Walk`] also goes a bounded number of steps a turn.

use std::fs::File;
use std::io;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::replication::ids::{CHUNK, Chunk};

/// Questions in one step, half a microsecond each.
const QUESTIONS: usize = 256;

/// The way along some chunks of a file.
#[derive(Debug)]
pub struct Walk {
    /// Found so far: 64 chunks a word, the first lowest.
    words: Vec<u64>,
    /// The first chunk, the next to look at, and the one behind the last.
    first: u64,
    next: u64,
    end: u64,
}

impl Walk {
    /// Before the first of `count` chunks.
    pub fn new(first: Chunk, count: u32) -> Self {
        let first = u64::from(first.0);
        Self {
            words: vec![0; count.div_ceil(64) as usize],
            first,
            next: first,
            end: first + u64::from(count),
        }
    }

    /// Goes on; the words when the end is reached. A chunk of which any byte is data is set.
    ///
    /// # Errors
    ///
    /// The file system cannot tell, because of its disk.
    pub fn step(&mut self, file: &File) -> io::Result<Option<Vec<u64>>> {
        // Moves the file's position, which nobody uses: every transfer names its offset.
        self.go(|at| rustix::fs::seek(file, SeekFrom::Data(at)))
    }

    /// `data` answers with the first byte of data at or behind an offset; ENXIO when there is none.
    fn go(
        &mut self,
        mut data: impl FnMut(u64) -> Result<u64, Errno>,
    ) -> io::Result<Option<Vec<u64>>> {
        for _ in 0..QUESTIONS {
            if self.next >= self.end {
                return Ok(Some(std::mem::take(&mut self.words)));
            }
            let found = match data(self.next * CHUNK) {
                // Never before where we asked: whatever a file system answers, we get on.
                Ok(at) => (at / CHUNK).max(self.next),
                // A hole up to the end of the file, or the end was behind us.
                Err(Errno::NXIO) => self.end,
                // Not every file system can tell: then nothing is certainly zero.
                Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => self.next,
                Err(e) => return Err(e.into()),
            };
            self.next = found + 1;
            if found < self.end {
                let n = found - self.first;
                self.words[n as usize / 64] |= 1 << (n % 64);
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;

    const NONE: [u32; 0] = [];

    fn whole(
        walk: &mut Walk,
        mut data: impl FnMut(u64) -> Result<u64, Errno>,
    ) -> io::Result<Vec<u64>> {
        loop {
            if let Some(words) = walk.go(&mut data)? {
                return Ok(words);
            }
        }
    }

    fn chunks_of(file: &File, first: u32, count: u32) -> Vec<u32> {
        let mut walk = Walk::new(Chunk(first), count);
        let words = loop {
            if let Some(words) = walk.step(file).unwrap() {
                break words;
            }
        };
        assert_eq!(words.len(), count.div_ceil(64) as usize);
        let set = |n: &u32| words[*n as usize / 64] & (1 << (n % 64)) != 0;
        (0..words.len() as u32 * 64).filter(set).collect()
    }

    /// A sparse file of 1,000 chunks and a half, with some bytes written here and there.
    fn a_sparse_file_is_told_by_chunks(dir: &Path) {
        let file = tempfile::tempfile_in(dir).unwrap();
        file.set_len(1000 * CHUNK + CHUNK / 2).unwrap();
        assert_eq!(chunks_of(&file, 0, 1001), NONE, "nothing was written");
        let write = |at: u64, len: usize| file.write_all_at(&vec![7; len], at).unwrap();
        // One byte at the end of a chunk; two chunks and a little of the third; the last half.
        write(4 * CHUNK - 1, 1);
        write(64 * CHUNK, 2 * CHUNK as usize + 1);
        write(1000 * CHUNK + 4096, 1);
        assert_eq!(chunks_of(&file, 0, 1001), [3, 64, 65, 66, 1000]);
        // From the middle of an extent to the middle of another; nothing is set behind the last one asked about.
        assert_eq!(chunks_of(&file, 65, 1), [0]);
        assert_eq!(chunks_of(&file, 4, 61), [60]);
        assert_eq!(chunks_of(&file, 4, 60), NONE);
        // Across the end of the file, and behind it.
        assert_eq!(chunks_of(&file, 999, 100), [1]);
        assert_eq!(chunks_of(&file, 1001, 64), NONE);
        assert_eq!(chunks_of(&file, u32::MAX - 64, 64), NONE);
        // More chunks with data than one step has questions.
        let every_other: Vec<u32> = (0..900).step_by(2).collect();
        assert!(every_other.len() > QUESTIONS);
        let fresh = tempfile::tempfile_in(dir).unwrap();
        fresh.set_len(1000 * CHUNK).unwrap();
        for chunk in &every_other {
            let at = u64::from(*chunk) * CHUNK + 8192;
            fresh.write_all_at(&[1], at).unwrap();
        }
        assert_eq!(chunks_of(&fresh, 0, 1000), every_other);
    }

    #[test]
    fn a_sparse_file_is_told_by_chunks_on_a_disk() {
        a_sparse_file_is_told_by_chunks(&std::env::temp_dir());
    }

    #[test]
    fn a_sparse_file_is_told_by_chunks_in_memory() {
        a_sparse_file_is_told_by_chunks(Path::new("/dev/shm"));
    }

    #[test]
    fn a_file_system_that_cannot_tell_says_all() {
        for errno in [Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS] {
            let words = whole(&mut Walk::new(Chunk(5), 70), |_| Err(errno)).unwrap();
            assert_eq!(words, [u64::MAX, 0x3f]);
        }
        // One that knows no holes says so by its answers.
        let simple = |at| {
            if at < 10 * CHUNK {
                Ok(at)
            } else {
                Err(Errno::NXIO)
            }
        };
        let words = whole(&mut Walk::new(Chunk(5), 70), simple).unwrap();
        assert_eq!(words, [0x1f, 0]);
    }

    #[test]
    fn a_disk_error_is_an_error_and_an_answer_from_behind_gets_on() {
        let error = whole(&mut Walk::new(Chunk(0), 1), |_| Err(Errno::IO)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        let words = whole(&mut Walk::new(Chunk(5), 3), |_| Ok(0)).unwrap();
        assert_eq!(words, [7]);
    }

    proptest! {
        /// Against an oracle that looks at each chunk by itself.
        #[test]
        fn a_chunk_is_set_exactly_if_it_touches_data(
            pieces in prop::collection::vec((1u64..200_000, 1u64..200_000), 0..60),
            first in 0u32..40,
            count in 1u32..150,
        ) {
            let mut data = Vec::new();
            let mut end = 0;
            for (gap, len) in pieces {
                data.push((end + gap, end + gap + len));
                end += gap + len;
            }
            let seek = |at| {
                let next = data.iter().find(|(_, end)| *end > at);
                next.map(|(start, _)| at.max(*start)).ok_or(Errno::NXIO)
            };
            let words = whole(&mut Walk::new(Chunk(first), count), seek).unwrap();
            for n in 0..words.len() as u32 * 64 {
                let start = u64::from(first + n) * CHUNK;
                let touched = n < count && data.iter().any(|(from, to)| *from < start + CHUNK && start < *to);
                prop_assert_eq!(words[n as usize / 64] & (1 << (n % 64)) != 0, touched, "chunk {}", n);
            }
        }
    }
}
