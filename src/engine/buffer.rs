//! The bytes of requests: pooled, aligned buffers, and guest memory itself where nobody else needs a stable copy.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::{Cell, RefCell};
use std::fmt;
use std::ptr::NonNull;
use std::rc::Rc;

use crate::guest::{IoVec, Request, Status, Used, copy_from_guest};
use crate::replication::attachment::Payload;
use crate::replication::ids::IO_MAX;

/// What O_DIRECT may ask of memory on any disk.
pub const ALIGN: usize = 4096;
/// Size classes are powers of two from 4 KiB to [`IO_MAX`].
const CLASSES: usize = (IO_MAX.trailing_zeros() - ALIGN.trailing_zeros()) as usize + 1;
/// Bytes of free buffers one thread keeps: the working set of some deep queues, not the peak of a burst for ever.
const KEEP: usize = 64 << 20;

thread_local! {
    static POOL: RefCell<Pool> =
        const { RefCell::new(Pool { free: [const { Vec::new() }; CLASSES], kept: 0 }) };
}

struct Pool {
    free: [Vec<NonNull<u8>>; CLASSES],
    kept: usize,
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, list) in self.free.iter_mut().enumerate() {
            for ptr in list.drain(..) {
                // SAFETY: every pointer of this list was allocated with this class's layout and
                // is used by nobody.
                unsafe { dealloc(ptr.as_ptr(), layout(class)) };
            }
        }
    }
}

fn layout(class: usize) -> Layout {
    Layout::from_size_align(ALIGN << class, ALIGN).expect("a power of two from 4 KiB to 1 MiB")
}

/// A 4 KiB-aligned buffer of up to [`IO_MAX`] bytes that goes back to its thread's pool when
/// dropped.
pub struct Buffer {
    ptr: NonNull<u8>,
    class: usize,
    len: usize,
}

impl Buffer {
    /// A buffer of `len` bytes whose content is whatever the pool had.
    ///
    /// # Panics
    ///
    /// When `len` exceeds [`IO_MAX`]: callers split or refuse before.
    pub fn new(len: usize) -> Self {
        assert!(len <= IO_MAX as usize, "a request is split at IO_MAX");
        let size = len.max(ALIGN).next_power_of_two();
        let class = (size.trailing_zeros() - ALIGN.trailing_zeros()) as usize;
        let pooled = POOL.with_borrow_mut(|pool| {
            let ptr = pool.free[class].pop()?;
            pool.kept -= size;
            Some(ptr)
        });
        let ptr = pooled.unwrap_or_else(|| {
            // SAFETY: the layout has a size above zero. Zeroed once, so that whatever the pool
            // hands out later is initialised.
            let raw = unsafe { alloc_zeroed(layout(class)) };
            NonNull::new(raw).unwrap_or_else(|| handle_alloc_error(layout(class)))
        });
        Self { ptr, class, len }
    }

    /// Where it is, for the kernel.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl std::ops::Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the allocation holds at least `len` initialised bytes, and it is ours alone.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`; `&mut self` makes it unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let size = ALIGN << self.class;
        let (ptr, class) = (self.ptr, self.class);
        // While the thread ends the pool may be gone; then the memory goes back directly.
        let kept = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            let keep = pool.kept + size <= KEEP;
            if keep {
                pool.free[class].push(ptr);
                pool.kept += size;
            }
            keep
        });
        if !kept.unwrap_or(false) {
            // SAFETY: allocated with this layout in `new`; nobody uses it any more.
            unsafe { dealloc(ptr.as_ptr(), layout(class)) };
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

/// A guest request while it is under way: shared by the ring that will complete it and by the disk
/// that may be using its memory. When the last of them lets go without completing it, it is
/// abandoned.
#[derive(Debug)]
pub struct GuestRequest {
    request: RefCell<Option<Request>>,
    /// The ring it came from.
    pub ring: u16,
    /// Which start of that ring it came from.
    pub life: u64,
    /// Parts not yet done.
    pub parts: Cell<u32>,
    /// One of them failed.
    pub failed: Cell<bool>,
    /// Nobody but the copy here can answer it: the disk may read straight into its memory. Otherwise another copy answers
    /// when this disk is late, and the guest would find in that memory what the disk brings long after.
    pub straight: Cell<bool>,
    /// System calls under way that use its memory.
    pinned: Cell<u32>,
    /// Bytes of parts that were sent to other nodes, by where the part starts.
    snapshots: RefCell<Vec<(usize, Rc<Buffer>)>>,
}

impl GuestRequest {
    /// A request of `ring`, in `parts` parts.
    pub fn new(request: Request, ring: u16, life: u64, parts: u32) -> Rc<Self> {
        let request = RefCell::new(Some(request));
        let (parts, failed) = (Cell::new(parts), Cell::new(false));
        Rc::new(Self {
            request,
            ring,
            life,
            parts,
            failed,
            straight: Cell::new(false),
            pinned: Cell::new(0),
            snapshots: RefCell::default(),
        })
    }

    /// Answers it; `None` when that was done before.
    pub fn finish(&self, status: Status) -> Option<Used> {
        self.request.borrow_mut().take().map(|r| r.finish(status))
    }

    /// Gives it up: nobody is to answer it, and nothing is copied to its memory any more.
    pub fn abandon(&self) {
        debug_assert!(!self.is_pinned(), "the kernel works with its memory");
        if let Some(request) = self.request.borrow_mut().take() {
            request.abandon();
        }
    }

    /// Whether the kernel may still read or write its memory: then it cannot be answered, whatever became of it, because
    /// the guest would use that memory for something else.
    pub fn is_pinned(&self) -> bool {
        self.pinned.get() > 0
    }

    /// Looks at the request, while it is not answered.
    pub fn with<T>(&self, f: impl FnOnce(&Request) -> T) -> Option<T> {
        self.request.borrow().as_ref().map(f)
    }
}

impl Drop for GuestRequest {
    fn drop(&mut self) {
        if let Some(request) = self.request.get_mut().take() {
            request.abandon();
        }
    }
}

/// A part whose memory the kernel is using.
#[derive(Debug)]
pub struct Pinned(GuestPart);

impl Pinned {
    /// The part. To be used when the kernel has finished.
    pub fn part(&self) -> &GuestPart {
        &self.0
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let pinned = &self.0.request.pinned;
        pinned.set(pinned.get() - 1);
    }
}

/// A part of a guest request's memory.
#[derive(Clone, Debug)]
pub struct GuestPart {
    /// Whose.
    pub request: Rc<GuestRequest>,
    /// First byte of the part within the request's data.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

impl GuestPart {
    /// The part's pieces, for a vectored system call or a copy. Valid while the request is.
    pub fn pieces(&self) -> Vec<IoVec> {
        self.request
            .with(|r| slice(r.data(), self.start, self.len))
            .unwrap_or_default()
    }

    /// Says that the kernel is using the memory, until the returned value is dropped.
    pub fn pin(self) -> Pinned {
        let pinned = &self.request.pinned;
        pinned.set(pinned.get() + 1);
        Pinned(self)
    }

    /// What [`GuestPart::snapshot`] took.
    fn taken(&self) -> Option<Rc<Buffer>> {
        let all = self.request.snapshots.borrow();
        let own = all.iter().find(|(start, _)| *start == self.start);
        own.map(|(_, buffer)| Rc::clone(buffer))
    }

    /// Its bytes, copied. Zeros for what cannot be had any more, since the request was answered: not what the buffer held
    /// before.
    pub fn copied(&self) -> Buffer {
        let mut buffer = Buffer::new(self.len);
        // SAFETY: pieces are given while the request is not answered, and mapped that long.
        let n = unsafe { copy_from_guest(&self.pieces(), &mut buffer) };
        buffer[n..].fill(0);
        buffer
    }

    /// The part's bytes as they were at the first call; `None` when the request was answered before that.
    pub fn snapshot(&self) -> Option<Rc<Buffer>> {
        if let Some(taken) = self.taken() {
            return Some(taken);
        }
        let buffer = self.request.with(|r| {
            let mut buffer = Buffer::new(self.len);
            // SAFETY: the request is not answered, so its pieces are mapped.
            unsafe { copy_from_guest(&slice(r.data(), self.start, self.len), &mut buffer) };
            Rc::new(buffer)
        })?;
        let mut all = self.request.snapshots.borrow_mut();
        all.push((self.start, Rc::clone(&buffer)));
        Some(buffer)
    }
}

fn slice(pieces: &[IoVec], start: usize, len: usize) -> Vec<IoVec> {
    let (mut skip, mut left) = (start, len);
    let mut out = Vec::with_capacity(pieces.len());
    for piece in pieces {
        if left == 0 {
            break;
        }
        if skip >= piece.len {
            skip -= piece.len;
            continue;
        }
        let take = (piece.len - skip).min(left);
        out.push(IoVec {
            ptr: piece.ptr.wrapping_add(skip),
            len: take,
        });
        skip = 0;
        left -= take;
    }
    out
}

/// The bytes of one request between an attachment and its copies.
#[derive(Clone, Debug)]
pub enum Bytes {
    /// Ours: stable, shared by disk and wire.
    Buffer(Rc<Buffer>),
    /// The guest's, which it may change at any time: only for reads into it, and for writes that
    /// nobody else gets (R = 0, PROTOCOL 2.1).
    Guest(GuestPart),
}

impl Bytes {
    /// Takes a filled buffer.
    pub fn from_buffer(buffer: Buffer) -> Self {
        Self::Buffer(Rc::new(buffer))
    }

    /// The bytes to write, the same ones for every copy that they were ever sent to (PROTOCOL 2.1). `elsewhere`: copies on
    /// other nodes are among those they are sent to now.
    ///
    /// A volume of one copy, here, writes from guest memory. When it is given a second copy, writes taken before may still
    /// wait, for the disk or for one another, and then go to both; one of them may also go to the first copy again when the
    /// guest has long been answered.
    pub fn stable(self, elsewhere: bool) -> Self {
        let Self::Guest(part) = &self else {
            return self;
        };
        let known = if elsewhere {
            part.snapshot()
        } else {
            part.taken()
        };
        known.map_or(self, Self::Buffer)
    }
}

impl Payload for Bytes {
    fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Buffer(a), Self::Buffer(b)) => a[..] == b[..],
            // Guest memory is never compared: reconciliation reads into buffers.
            _ => false,
        }
    }

    fn count(&self) -> usize {
        match self {
            Self::Buffer(b) => b.len(),
            Self::Guest(g) => g.len,
        }
    }

    fn is_zero(&self) -> bool {
        match self {
            // The first byte is zero, and each is as the one before.
            Self::Buffer(b) => b.first() == Some(&0) && b[1..] == b[..b.len() - 1],
            Self::Guest(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back_from_the_pool() {
        let a = Buffer::new(5000);
        let at = a.as_ptr();
        assert_eq!(at as usize % ALIGN, 0);
        assert_eq!(a.len(), 5000);
        drop(a);
        assert_eq!(Buffer::new(8192).as_ptr(), at, "the same class");
        assert_eq!(Buffer::new(IO_MAX as usize).len(), IO_MAX as usize);
    }

    #[test]
    fn bytes_are_zero_only_if_all_are() {
        for len in [1, 512, 65_536] {
            let mut buffer = Buffer::new(len);
            buffer.fill(0);
            assert!(Bytes::from_buffer(buffer).is_zero());
            for at in [0, len / 2, len - 1] {
                let mut buffer = Buffer::new(len);
                buffer.fill(0);
                buffer[at] = 1;
                assert!(!Bytes::from_buffer(buffer).is_zero(), "byte {at} of {len}");
            }
        }
    }

    #[test]
    fn a_slice_of_pieces_begins_and_ends_inside_them() {
        let mut mem = [0u8; 100];
        let base = mem.as_mut_ptr();
        let piece = |at: usize, len| IoVec {
            ptr: base.wrapping_add(at),
            len,
        };
        let got = slice(&[piece(0, 10), piece(20, 10), piece(40, 10)], 5, 12);
        let view: Vec<(usize, usize)> = got
            .iter()
            .map(|v| (v.ptr as usize - base as usize, v.len))
            .collect();
        assert_eq!(view, [(5, 5), (20, 7)]);
    }
}
