//! The log of a live migration (vhost-user specification, "Migration"): a bit for each 4 KiB page of guest memory, in
//! memory that the front-end shares with SET_LOG_BASE. A page's bit is set by whoever wrote to the page; the front-end
//! takes the bits away and copies the pages, until few are left, and then stops the guest.
//!
//! Every byte that this process puts into guest memory passes through [`Ring`](super::Ring), so that the ring marks it:
//!
//! | what | marked |
//! | --- | --- |
//! | the data of reads and of GET_ID, also of reads that failed | when the chain is pushed to the used ring |
//! | status bytes | with them |
//! | used entries and the used index | when the index was stored |
//! | the used ring's flags and `avail_event` | when they were stored |
//!
//! A mark comes *after* the bytes that it is about: the other way round, the front-end could take the bit, copy the old
//! page, and never learn of the new bytes. Whatever was in flight when logging began is marked like the rest, because
//! the ring asks for its log only when it marks.
//!
//! vhost-user-backend has a bitmap for guest memory (`BitmapMmapRegion`). It is not used here: it takes a lock for every
//! mark, knows only writes through `vm-memory` (most bytes come from the kernel), starts empty with each new memory table,
//! and its log can be mapped by that crate's own daemon only. Addresses in this log are the guest's, so a table that
//! comes while logging is on needs nothing done.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SealFlags;
use thiserror::Error;
use vhost::vhost_user::message::VhostUserLog;
use vm_memory::{FileOffset, GuestAddress, MmapRegion};

use super::inflight::{keeps_its_size, mapped_from};

/// Bytes of guest memory for one bit (VHOST_LOG_PAGE).
const PAGE: u64 = 4096;
/// Bits that are set in one step.
const WORD: u64 = u64::BITS as u64;

/// Why a log is refused.
#[derive(Debug, Error)]
pub enum LogError {
    /// Nothing, or more than the file has.
    #[error(
        "the dirty log has {size} bytes at {offset} of a file of {file}: it must lie within its file"
    )]
    Size {
        /// Bytes by the message.
        size: u64,
        /// Where they begin in the file.
        offset: u64,
        /// Bytes of the file.
        file: u64,
    },
    /// An access to its mapping could fail.
    #[error(
        "the dirty log is not a memory file (of ordinary pages) that is or can be sealed against shrinking"
    )]
    NotSealed,
    /// The system refuses.
    #[error("the dirty log cannot be {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// A front-end's log, mapped.
#[derive(Debug)]
pub struct DirtyLog {
    map: MmapRegion<()>,
    pages: u64,
}

impl DirtyLog {
    /// Maps the log of a SET_LOG_BASE.
    ///
    /// # Errors
    ///
    /// [`LogError`]: it does not fit its file, could shrink under the mapping, or cannot be mapped.
    pub fn open(info: &VhostUserLog, file: File) -> Result<DirtyLog, LogError> {
        let cannot = |what| move |source| LogError::Io { what, source };
        // Were it shrunk, the next mark would end this process. A front-end that did not think of it may have left room
        // for the seal.
        let _ = rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK);
        if !keeps_its_size(&file).map_err(cannot("inspected"))? {
            return Err(LogError::NotSealed);
        }
        let len = file.metadata().map_err(cannot("inspected"))?.len();
        let (size, offset) = (info.mmap_size, info.mmap_offset);
        let end = offset.checked_add(size);
        let mapped = usize::try_from(size)
            .ok()
            .filter(|_| size > 0 && end.is_some_and(|end| end <= len));
        let Some(mapped) = mapped else {
            return Err(LogError::Size {
                size,
                offset,
                file: len,
            });
        };
        let map = MmapRegion::from_file(FileOffset::new(file, offset), mapped)
            .map_err(|e| cannot("mapped")(io::Error::other(e.to_string())))?;
        Ok(DirtyLog {
            map,
            pages: size.saturating_mul(8),
        })
    }

    /// The log as a front-end sends it, with its file once more.
    ///
    /// # Errors
    ///
    /// The process has no descriptors left.
    pub(super) fn describe(&self) -> io::Result<(VhostUserLog, OwnedFd)> {
        let (offset, file) = mapped_from(&self.map)?;
        Ok((VhostUserLog::new(self.map.size() as u64, offset), file))
    }

    /// Whether there is a bit for every page below `end`, a guest-physical address.
    pub(super) fn covers(&self, end: u64) -> bool {
        end.div_ceil(PAGE) <= self.pages
    }

    /// Sets the bits of the pages in which the `len` bytes from `addr` on lie. What is beyond the log has no bit; the
    /// session sees to it that no memory in use is.
    #[inline]
    pub(super) fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|n| addr.saturating_add(n) / PAGE) else {
            return;
        };
        let end = (last + 1).min(self.pages);
        let mut page = addr / PAGE;
        while page < end {
            let (word, bit) = (page / WORD, page % WORD);
            let count = (WORD - bit).min(end - page);
            let bits = (u64::MAX >> (WORD - count)) << bit;
            // SAFETY: the word begins below `pages / 8` bytes, and a mapping reaches to the end of its last page of
            // memory, of which a word is never more than a part; aligned, because a mapping begins on such a page. The
            // front-end accesses it at the same time, so all accesses are atomic.
            let word = unsafe {
                AtomicU64::from_ptr(self.map.as_ptr().add(word as usize * 8).cast::<u64>())
            };
            // Always, also if the bits seem to be set: the front-end may be taking them at this moment, having copied
            // the page before. And in one order with it: what was written to the page comes before the bit.
            word.fetch_or(bits.to_le(), Ordering::SeqCst);
            page += count;
        }
    }
}

/// What of a ring's writes is logged, and where.
#[derive(Clone, Debug)]
pub struct RingLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// All writes are (VHOST_F_LOG_ALL); otherwise only those to the used ring.
    pub all: bool,
    /// Where the front-end wants to find the used ring in the log (VHOST_VRING_F_LOG). When it did not say, and all is
    /// logged, it is at its own address: cloud-hypervisor does not use that flag.
    pub used: Option<GuestAddress>,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::MemfdFlags;

    use super::*;

    fn memfd(len: u64) -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("log", flags).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        file.into()
    }

    fn bits(file: &File, offset: u64, len: usize) -> Vec<u64> {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset).unwrap();
        (0..len as u64 * 8)
            .filter(|page| bytes[*page as usize / 8] >> (page % 8) & 1 != 0)
            .collect()
    }

    #[test]
    fn exactly_the_pages_of_a_range_are_marked() {
        // At each edge of a page, a byte, a word and the log itself.
        let edges = [0u64, 1, 7, 8, 62, 63, 64, 65, 127, 128, 190, 191, 192, 200];
        for from in edges {
            for to in edges.into_iter().filter(|to| from <= *to) {
                for (before, after) in [(0, 1), (PAGE - 1, 1), (0, PAGE), (PAGE - 1, PAGE)] {
                    let (start, end) = (from * PAGE + before, to * PAGE + after);
                    let Some(len) = end.checked_sub(start).filter(|len| *len > 0) else {
                        continue;
                    };
                    let file = memfd(4096 + 24);
                    let info = VhostUserLog::new(24, 4096);
                    let log = DirtyLog::open(&info, file.try_clone().unwrap()).unwrap();
                    log.mark(start, len);
                    let expected: Vec<u64> = (0..192)
                        .filter(|page| page * PAGE < end && start < (page + 1) * PAGE)
                        .collect();
                    assert_eq!(bits(&file, 4096, 24), expected, "{start:#x}+{len:#x}");
                }
            }
        }
    }

    #[test]
    fn marks_without_bytes_and_beyond_everything_change_nothing() {
        let file = memfd(16);
        let log = DirtyLog::open(&VhostUserLog::new(16, 0), file.try_clone().unwrap()).unwrap();
        log.mark(5 * PAGE, 0);
        log.mark(128 * PAGE, PAGE);
        log.mark(u64::MAX, u64::MAX);
        assert_eq!(bits(&file, 0, 16), [0u64; 0]);
        assert!(log.covers(0) && log.covers(128 * PAGE));
        assert!(!log.covers(128 * PAGE + 1) && !log.covers(u64::MAX));
    }

    #[test]
    fn a_log_that_could_fault_is_refused() {
        let open = |size, offset, file| DirtyLog::open(&VhostUserLog::new(size, offset), file);
        // Sealed by us if the front-end did not.
        let file = memfd(8192);
        open(4096, 4096, file.try_clone().unwrap()).unwrap();
        assert!(rustix::fs::ftruncate(&file, 4096).is_err());

        for (size, offset) in [
            (0, 0),
            (8193, 0),
            (4096, 8192),
            (u64::MAX, 4096),
            (1, u64::MAX),
        ] {
            let refused = open(size, offset, memfd(8192)).unwrap_err();
            assert!(matches!(refused, LogError::Size { .. }), "{size}+{offset}");
        }
        let unaligned = open(16, 8, memfd(8192)).unwrap_err();
        assert!(matches!(unaligned, LogError::Io { .. }), "{unaligned}");
        let closed = memfd(8192);
        rustix::fs::fcntl_add_seals(&closed, SealFlags::SEAL).unwrap();
        assert!(matches!(open(16, 0, closed), Err(LogError::NotSealed)));
        let on_disk = tempfile::tempfile_in(".").unwrap();
        on_disk.set_len(4096).unwrap();
        assert!(matches!(open(16, 0, on_disk), Err(LogError::NotSealed)));
    }
}
