//! Pieces of guest memory as host pointers, and copying to and from them.
//!
//! The guest may change its memory at any moment, also while it is copied. That is a race between a virtual machine
//! and this process, outside what the language describes; what matters is that no Rust reference to such memory ever
//! exists, so that nothing is assumed to stay as it was read. Hence raw pointers only, one copy per byte, and all
//! decisions taken on the private copy. A guest that changes a buffer during a write finds either value on disk, the
//! same on all copies, as with any disk.

/// One contiguous piece of guest memory, laid out as the kernel's `struct iovec`.
///
/// A value made by [`Ring`](super::Ring) lies inside one mapped region for as long as the chain or request it came
/// with is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct IoVec {
    /// First byte, as a host address.
    pub ptr: *mut u8,
    /// Bytes; never 0.
    pub len: usize,
}

// The engine hands slices of these to the kernel.
const _: () = assert!(size_of::<IoVec>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<IoVec>() == align_of::<libc::iovec>());
const _: () =
    assert!(std::mem::offset_of!(IoVec, ptr) == std::mem::offset_of!(libc::iovec, iov_base));
const _: () =
    assert!(std::mem::offset_of!(IoVec, len) == std::mem::offset_of!(libc::iovec, iov_len));

impl IoVec {
    /// A slice of pieces as the kernel's vectored calls want it. The pointer is valid as long as the slice.
    pub fn as_raw(iovecs: &[IoVec]) -> *const libc::iovec {
        iovecs.as_ptr().cast()
    }
}

/// Bytes in all pieces together.
pub fn total_len(iovecs: &[IoVec]) -> usize {
    iovecs.iter().map(|v| v.len).sum()
}

/// Copies guest memory into `dst` and returns the number of bytes copied: the length of the shorter side.
///
/// # Safety
///
/// Every piece must be mapped and readable: the chain or request that it belongs to is alive.
pub unsafe fn copy_from_guest(src: &[IoVec], dst: &mut [u8]) -> usize {
    let mut done = 0;
    for piece in src {
        let n = piece.len.min(dst.len() - done);
        // SAFETY: `piece` is readable for `len >= n` bytes by the caller's promise; `dst[done..]` has at least n
        // bytes; guest mappings and our own memory never overlap.
        unsafe { std::ptr::copy_nonoverlapping(piece.ptr, dst.as_mut_ptr().add(done), n) };
        done += n;
        if done == dst.len() {
            break;
        }
    }
    done
}

/// Copies `src` into guest memory and returns the number of bytes copied: the length of the shorter side.
///
/// # Safety
///
/// Every piece must be mapped and writable: the chain or request that it belongs to is alive.
pub unsafe fn copy_to_guest(src: &[u8], dst: &[IoVec]) -> usize {
    let mut done = 0;
    for piece in dst {
        let n = piece.len.min(src.len() - done);
        // SAFETY: `piece` is writable for `len >= n` bytes by the caller's promise; `src[done..]` has at least n
        // bytes; guest mappings and our own memory never overlap.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr().add(done), piece.ptr, n) };
        done += n;
        if done == src.len() {
            break;
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(buffers: &mut [Vec<u8>]) -> Vec<IoVec> {
        buffers
            .iter_mut()
            .map(|b| IoVec {
                ptr: b.as_mut_ptr(),
                len: b.len(),
            })
            .collect()
    }

    #[test]
    fn a_copy_ends_with_the_shorter_side() {
        let mut guest = [vec![1u8, 2, 3], vec![4u8], vec![5u8, 6]];
        let iovecs = pieces(&mut guest);
        assert_eq!(total_len(&iovecs), 6);

        for want in 0..8 {
            let mut out = vec![0u8; want];
            // SAFETY: the pieces point into `guest`, which outlives them.
            let n = unsafe { copy_from_guest(&iovecs, &mut out) };
            assert_eq!(n, want.min(6));
            assert_eq!(out[..n], [1, 2, 3, 4, 5, 6][..n]);
        }

        // SAFETY: as above.
        assert_eq!(unsafe { copy_to_guest(&[9, 8, 7, 6, 5], &iovecs) }, 5);
        assert_eq!(guest, [vec![9, 8, 7], vec![6], vec![5, 6]]);
        let iovecs = pieces(&mut guest);
        // SAFETY: as above.
        assert_eq!(unsafe { copy_to_guest(&[0; 9], &iovecs) }, 6);
    }
}
