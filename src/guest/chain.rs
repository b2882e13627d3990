//! One descriptor chain, walked with every bound checked (virtio 1.2, sections 2.7.5 and 2.7.13).
//!
//! Two kinds of wrong are told apart. A chain whose *shape* cannot be trusted (an index out of range, a loop, a broken
//! indirect table) is a [`RingError`]: nobody knows where its end is, and the ring stops. A chain whose shape is fine
//! but whose *contents* break a rule (an address outside memory, an empty descriptor) is given out with a
//! [`ChainFault`], so that the request can be answered with an error if its status byte is reachable.
//!
//! Every descriptor is read once, so a guest that rewrites it meanwhile gains nothing.

use std::rc::Rc;

use thiserror::Error;
use vm_memory::GuestAddress;

use super::IoVec;
use super::dirty::DirtyLog;
use super::memory::MemMap;
use super::ring::{MAX_RING_SIZE, RingError};

/// Most data pieces of one request: the kernel's limit for one vectored call (IOV_MAX), so that a request never has
/// to be cut for that reason. Windows makes chains of 515 descriptors whatever the size of the ring.
pub const MAX_DATA_SEGMENTS: usize = 1024;

/// Most pieces of a chain: the data, and a header and a status each in pieces of their own. A header may be split
/// further, at the cost of data pieces.
const MAX_PIECES: usize = MAX_DATA_SEGMENTS + 2;

/// Most descriptors in one indirect table. The specification's limit is the size of the ring, which Windows does not
/// keep to; this is the largest ring there can be, and bounds the work that one descriptor can ask for.
const MAX_INDIRECT_DESCRIPTORS: u32 = MAX_RING_SIZE as u32;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
const DESC_F_INDIRECT: u16 = 4;
/// Bytes of one descriptor.
pub(super) const DESC_SIZE: u32 = 16;

/// Why a chain cannot be served although its end was found. Answered with an I/O error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ChainFault {
    /// A buffer lies outside the memory that the front-end shared.
    #[error("buffer {addr:#x}+{len:#x} is outside guest memory")]
    Unmapped {
        /// Guest-physical address of the buffer.
        addr: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A descriptor of zero bytes (against 2.7.5, and refused by other devices too).
    #[error("a descriptor of zero bytes")]
    Empty,
    /// A device-readable descriptor after a device-writable one (against 2.7.4.2).
    #[error("a readable descriptor after a writable one")]
    Order,
    /// More than 4 GiB in all (against 2.7.5).
    #[error("more than 4 GiB in one chain")]
    TooLong,
    /// More than [`MAX_DATA_SEGMENTS`] pieces.
    #[error("more than {MAX_DATA_SEGMENTS} segments")]
    TooManySegments,
    /// An indirect descriptor that claims to have a successor (against 2.7.5.3.1).
    #[error("an indirect descriptor with a successor")]
    IndirectNext,
}

/// One request's memory, as the guest described it. Its pieces stay mapped while it lives, whatever happens to the
/// memory table meanwhile.
#[derive(Debug)]
#[must_use = "a chain that is not completed is lost to the guest"]
pub struct Chain {
    pub(super) head: u16,
    /// The readable pieces, then the writable ones.
    pub(super) iovecs: Vec<IoVec>,
    pub(super) readable: usize,
    pub(super) fault: Option<ChainFault>,
    /// The last piece is the end of the chain's last writable descriptor, also if there is a fault.
    pub(super) tail_known: bool,
    /// Descriptors that it has.
    pub(super) walked: u32,
    pub(super) mem: Rc<MemMap>,
}

/// A chain that the device has finished with, on its way to [`Ring::push_used`](super::Ring::push_used).
#[derive(Debug)]
#[must_use = "push it to the used ring"]
pub struct Used {
    pub(super) head: u16,
    pub(super) len: u32,
    pub(super) iovecs: Vec<IoVec>,
    pub(super) written: Written,
}

/// Which bytes of a chain's memory were written, for the log of a migration.
#[derive(Debug)]
pub(super) struct Written {
    /// Which of the chain's pieces, and how many bytes of them.
    pub(super) data: (usize, usize),
    pub(super) len: usize,
    /// The status byte, if it is none of those.
    pub(super) status: Option<*mut u8>,
    /// The memory in which all of that lies.
    pub(super) mem: Rc<MemMap>,
}

impl Written {
    /// Marks it. `iovecs` are the chain's.
    #[inline(never)]
    pub(super) fn mark(&self, iovecs: &[IoVec], log: &DirtyLog) {
        let mut left = self.len;
        for piece in &iovecs[self.data.0..self.data.1] {
            let n = piece.len.min(left);
            if n == 0 {
                break;
            }
            self.mem.mark(log, piece.ptr, n);
            left -= n;
        }
        if let Some(status) = self.status {
            self.mem.mark(log, status, 1);
        }
    }
}

impl Used {
    /// Index of the chain's first descriptor.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the device says to have written.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Chain {
    /// Index of the first descriptor: the chain's name among those in flight.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// What the device may read. Incomplete if there is a fault.
    pub fn readable(&self) -> &[IoVec] {
        &self.iovecs[..self.readable]
    }

    /// What the device may write. Incomplete if there is a fault.
    pub fn writable(&self) -> &[IoVec] {
        &self.iovecs[self.readable..]
    }

    /// The rule that this chain breaks, if any.
    pub fn fault(&self) -> Option<ChainFault> {
        self.fault
    }

    /// Gives the chain back, with the number of bytes written to its writable part.
    pub fn complete(self, len: u32) -> Used {
        Used {
            head: self.head,
            len,
            written: Written {
                data: (self.readable, self.iovecs.len()),
                len: len as usize,
                status: None,
                mem: self.mem,
            },
            iovecs: self.iovecs,
        }
    }

    /// Gives the chain back with nothing written but its status byte.
    pub(super) fn refuse(self, status: *mut u8) -> Used {
        let mut used = self.complete(1);
        used.written.len = 0;
        used.written.status = Some(status);
        used
    }
}

/// A descriptor, as private copy.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A descriptor in memory (2.7.5), little-endian.
#[derive(Clone, Copy)]
#[repr(C)]
struct RawDescriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

const _: () = assert!(size_of::<RawDescriptor>() == DESC_SIZE as usize);

/// A descriptor table in one piece of memory: the ring's own, or an indirect one.
#[derive(Clone, Copy)]
struct Table {
    host: *const u8,
    entries: u32,
}

impl Table {
    /// # Safety
    ///
    /// `host` is readable for `entries * 16` bytes and `index < entries`.
    #[inline]
    unsafe fn read(&self, index: u32) -> Descriptor {
        debug_assert!(index < self.entries);
        // SAFETY: by the caller's promise the entry lies within the table. Volatile, because the guest may write it
        // at the same time: each field is fetched once and only the copy is used.
        let raw = unsafe {
            let at = self.host.add(index as usize * DESC_SIZE as usize);
            if at.cast::<RawDescriptor>().is_aligned() {
                let at = at.cast::<RawDescriptor>();
                RawDescriptor {
                    addr: (&raw const (*at).addr).read_volatile(),
                    len: (&raw const (*at).len).read_volatile(),
                    flags: (&raw const (*at).flags).read_volatile(),
                    next: (&raw const (*at).next).read_volatile(),
                }
            } else {
                // Nothing obliges a driver to align an indirect table.
                let mut bytes = [0u8; DESC_SIZE as usize];
                for (i, byte) in bytes.iter_mut().enumerate() {
                    *byte = at.add(i).read_volatile();
                }
                std::mem::transmute::<[u8; DESC_SIZE as usize], RawDescriptor>(bytes)
            }
        };
        Descriptor {
            addr: u64::from_le(raw.addr),
            len: u32::from_le(raw.len),
            flags: u16::from_le(raw.flags),
            next: u16::from_le(raw.next),
        }
    }
}

/// What a walk needs to know of the ring.
pub(super) struct Walk<'a> {
    pub(super) mem: &'a Rc<MemMap>,
    /// The ring's descriptor table: readable for `size` entries.
    pub(super) table: *const u8,
    pub(super) size: u16,
    /// Whether indirect descriptors were negotiated.
    pub(super) indirect: bool,
}

impl Walk<'_> {
    /// Follows the chain that starts at `head` (below the ring's size). `iovecs` is an empty vector to fill.
    ///
    /// # Errors
    ///
    /// [`RingError`] when the end of the chain cannot be found.
    // Inlined: moving a chain through results costs as much as walking it.
    #[inline(always)]
    pub(super) fn chain(&self, head: u16, iovecs: Vec<IoVec>) -> Result<Chain, RingError> {
        debug_assert!(head < self.size && iovecs.is_empty());
        let mut chain = Builder {
            mem: self.mem,
            iovecs,
            readable: 0,
            total: 0,
            fault: None,
            tail_known: false,
            walked: 0,
            writing: false,
        };
        let mut table = Table {
            host: self.table,
            entries: u32::from(self.size),
        };
        let mut index = u32::from(head);
        // A chain visits each entry of its table at most once; more is a loop.
        let mut left = table.entries;
        let mut inside_indirect = false;
        loop {
            // SAFETY: `index < entries` holds at the start, after the check of `next`, and for entry 0 of an indirect
            // table, which is never empty; both tables were resolved for their whole length.
            let desc = unsafe { table.read(index) };
            chain.walked += 1;
            if desc.flags & DESC_F_INDIRECT != 0 {
                if inside_indirect {
                    return Err(RingError::NestedIndirect { head });
                }
                table = self.indirect_table(head, &desc)?;
                if desc.flags & DESC_F_NEXT != 0 {
                    chain.fault(ChainFault::IndirectNext);
                }
                // The write flag of this descriptor is to be ignored (2.7.5.3.2).
                inside_indirect = true;
                index = 0;
                left = table.entries;
                continue;
            }
            chain.add(&desc);
            if desc.flags & DESC_F_NEXT == 0 {
                break;
            }
            left -= 1;
            if left == 0 {
                return Err(RingError::Loop { head });
            }
            index = u32::from(desc.next);
            if index >= table.entries {
                return Err(RingError::NextOutOfRange {
                    head,
                    next: desc.next,
                });
            }
        }
        Ok(chain.finish(head))
    }

    fn indirect_table(&self, head: u16, desc: &Descriptor) -> Result<Table, RingError> {
        if !self.indirect {
            return Err(RingError::IndirectNotNegotiated { head });
        }
        let entries = desc.len / DESC_SIZE;
        if entries == 0 || !desc.len.is_multiple_of(DESC_SIZE) || entries > MAX_INDIRECT_DESCRIPTORS
        {
            return Err(RingError::IndirectLength {
                head,
                len: desc.len,
            });
        }
        let host = self
            .mem
            .contiguous(GuestAddress(desc.addr), u64::from(desc.len))
            .map_err(|_| RingError::IndirectUnmapped {
                head,
                addr: desc.addr,
                len: desc.len,
            })?;
        Ok(Table { host, entries })
    }
}

/// A chain while it is walked.
struct Builder<'a> {
    mem: &'a Rc<MemMap>,
    iovecs: Vec<IoVec>,
    readable: usize,
    /// Bytes so far. A table has at most 32768 entries of 4 GiB, so this cannot overflow.
    total: u64,
    fault: Option<ChainFault>,
    tail_known: bool,
    walked: u32,
    writing: bool,
}

impl Builder<'_> {
    fn fault(&mut self, fault: ChainFault) {
        self.fault.get_or_insert(fault);
    }

    #[inline]
    fn add(&mut self, desc: &Descriptor) {
        let writable = desc.flags & DESC_F_WRITE != 0;
        self.total += u64::from(desc.len);
        if self.total > u64::from(u32::MAX) {
            self.fault(ChainFault::TooLong);
        }
        if desc.len == 0 {
            self.fault(ChainFault::Empty);
            return;
        }
        if writable {
            self.writing = true;
            self.tail_known = false;
        } else if self.writing {
            self.fault(ChainFault::Order);
        }
        if self.fault.is_some() {
            // From here on only the status byte matters: keep the end of the last writable descriptor and no more.
            if writable {
                self.iovecs.truncate(self.readable);
            } else {
                return;
            }
        }
        if self
            .mem
            .push_pieces(desc.addr, desc.len, &mut self.iovecs)
            .is_err()
        {
            self.fault(ChainFault::Unmapped {
                addr: desc.addr,
                len: desc.len,
            });
            return;
        }
        if self.iovecs.len() > MAX_PIECES {
            self.fault(ChainFault::TooManySegments);
        }
        if writable {
            self.tail_known = true;
        } else {
            self.readable = self.iovecs.len();
        }
    }

    #[inline(always)]
    fn finish(self, head: u16) -> Chain {
        Chain {
            head,
            iovecs: self.iovecs,
            readable: self.readable,
            fault: self.fault,
            tail_known: self.tail_known,
            walked: self.walked,
            mem: Rc::clone(self.mem),
        }
    }
}
