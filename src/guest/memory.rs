//! Guest memory as host pointers: a flat, sorted copy of the region list, so that a look-up is a short search over
//! plain numbers and takes neither a lock nor a reference count.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::dirty::DirtyLog;
use super::fault::Guard;
use super::{GuestMem, IoVec};

/// A guest-physical range that is not, or not wholly, backed by a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unmapped;

#[derive(Debug)]
struct Span {
    start: u64,
    len: u64,
    host: *mut u8,
}

/// The resolved memory table. Pointers that it gives out stay valid while it lives.
#[derive(Debug)]
pub(super) struct MemMap {
    spans: Box<[Span]>,
    // Before the mappings, which it must not outlive.
    guard: Guard,
    // Holds the mappings that `spans` points into.
    _mem: Arc<GuestMem>,
}

impl MemMap {
    pub(super) fn new(mem: Arc<GuestMem>) -> MemMap {
        // The collection keeps its regions sorted and free of overlaps.
        let spans: Box<[Span]> = mem
            .iter()
            .map(|region| Span {
                start: region.start_addr().0,
                len: region.len(),
                host: region.as_ptr(),
            })
            .collect();
        let ranges = spans.iter().map(|span| {
            let start = span.host.addr();
            (start, start + span.len as usize)
        });
        MemMap {
            guard: Guard::new(ranges),
            spans,
            _mem: mem,
        }
    }

    /// Whether the front-end took memory away that it had shared. What is read and written there since means nothing.
    #[inline]
    pub(super) fn is_lost(&self) -> bool {
        self.guard.is_lost()
    }

    /// Host address of `addr`, and how many bytes from there on lie in the same region (at least 1).
    fn locate(&self, addr: u64) -> Result<(*mut u8, u64), Unmapped> {
        let after = self.spans.partition_point(|span| span.start <= addr);
        let span = &self.spans[after.checked_sub(1).ok_or(Unmapped)?];
        let offset = addr - span.start;
        if offset >= span.len {
            return Err(Unmapped);
        }
        let offset_in_host = usize::try_from(offset).map_err(|_| Unmapped)?;
        // SAFETY: the region is mapped for `span.len` bytes from `span.host`, and the offset is below that.
        let host = unsafe { span.host.add(offset_in_host) };
        Ok((host, span.len - offset))
    }

    /// Host address of a range that must lie within one region.
    pub(super) fn contiguous(&self, addr: GuestAddress, len: u64) -> Result<*mut u8, Unmapped> {
        match self.locate(addr.0)? {
            (host, room) if len <= room => Ok(host),
            _ => Err(Unmapped),
        }
    }

    /// Marks bytes of guest memory as written, by their host address. The other way round than all else here, and only
    /// while a log is kept.
    pub(super) fn mark(&self, log: &DirtyLog, host: *mut u8, len: usize) {
        let at = |span: &Span| host.addr().wrapping_sub(span.host.addr()) as u64;
        let span = self.spans.iter().find(|span| at(span) < span.len);
        debug_assert!(span.is_some(), "a piece lies within one region");
        if let Some(span) = span {
            log.mark(span.start + at(span), len as u64);
        }
    }

    /// Appends the pieces of a range to `out`: one piece, or several where the range crosses from a region into the
    /// next one. On error nothing is appended.
    #[inline]
    pub(super) fn push_pieces(
        &self,
        addr: u64,
        len: u32,
        out: &mut Vec<IoVec>,
    ) -> Result<(), Unmapped> {
        let before = out.len();
        let (mut addr, mut left) = (addr, u64::from(len));
        while left > 0 {
            let step = self.locate(addr).and_then(|(host, room)| {
                let n = left.min(room);
                let end = addr.checked_add(n).ok_or(Unmapped)?;
                Ok((host, n, end))
            });
            let Ok((host, n, end)) = step else {
                out.truncate(before);
                return Err(Unmapped);
            };
            // n <= u32::MAX, so it fits.
            out.push(IoVec {
                ptr: host,
                len: n as usize,
            });
            (addr, left) = (end, left - n);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn map() -> MemMap {
        // Two adjacent regions, a hole, one more.
        let mem = GuestMem::from_ranges(&[
            (GuestAddress(0), MIB),
            (GuestAddress(MIB as u64), MIB),
            (GuestAddress(4 * MIB as u64), MIB),
        ])
        .unwrap();
        MemMap::new(Arc::new(mem))
    }

    #[test]
    fn a_range_resolves_only_where_memory_is() {
        let map = map();
        let mib = MIB as u64;
        assert!(map.contiguous(GuestAddress(0), mib).is_ok());
        assert!(
            map.contiguous(GuestAddress(0), mib + 1).is_err(),
            "crosses into the next region"
        );
        assert!(map.contiguous(GuestAddress(2 * mib - 1), 1).is_ok());
        assert!(
            map.contiguous(GuestAddress(2 * mib), 1).is_err(),
            "in the hole"
        );
        assert!(
            map.contiguous(GuestAddress(5 * mib), 1).is_err(),
            "after the end"
        );
        assert!(map.contiguous(GuestAddress(u64::MAX), 1).is_err());
        let empty = MemMap::new(Arc::new(GuestMem::new()));
        assert!(empty.contiguous(GuestAddress(0), 1).is_err());
    }

    #[test]
    fn a_range_over_adjacent_regions_is_split_there() {
        let map = map();
        let mib = MIB as u64;
        let mut out = Vec::new();
        map.push_pieces(mib - 4, 10, &mut out).unwrap();
        assert_eq!(out.iter().map(|v| v.len).collect::<Vec<_>>(), [4, 6]);
        assert_eq!(out[1].ptr, map.contiguous(GuestAddress(mib), 1).unwrap());
    }

    #[test]
    fn a_range_into_a_hole_appends_nothing() {
        let map = map();
        let mib = MIB as u64;
        let mut out = Vec::new();
        map.push_pieces(0, 1, &mut out).unwrap();
        for (addr, len) in [
            (2 * mib - 4, 5),
            (mib - 1, u32::MAX),
            (3 * mib, 1),
            (u64::MAX, 1),
            (u64::MAX - 3, 8),
        ] {
            assert_eq!(
                map.push_pieces(addr, len, &mut out),
                Err(Unmapped),
                "{addr:#x}+{len}"
            );
            assert_eq!(out.len(), 1);
        }
    }
}
