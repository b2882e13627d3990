//! The split virtqueue (virtio 1.2, section 2.7), from the device's side.
//!
//! A [`Ring`] is owned by one thread. It resolves the three parts of the ring to host pointers once, when it starts,
//! and holds the memory they lie in. Nothing in it trusts the guest: indices are checked against the ring's size, a
//! head that is already in flight is refused, and a chain is walked within bounds (`chain`).
//!
//! The order of calls in a worker's turn:
//!
//! 1. [`drain_kick`](Ring::drain_kick) when the kick descriptor is readable, [`disable_kicks`](Ring::disable_kicks);
//! 2. [`next_request`](Ring::next_request) until there is none;
//! 3. [`push_used`](Ring::push_used) for whatever completed, one [`publish_and_notify`](Ring::publish_and_notify);
//! 4. [`enable_kicks`](Ring::enable_kicks), and back to 2 if it says that more has come.
//!
//! With an in-flight region (`inflight`) a ring first gives out again what an earlier process took and did not answer,
//! in its order.
//!
//! A broken ring reports its error once. From then on it gives out nothing, but still takes completions.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use thiserror::Error;
use vm_memory::GuestAddress;

use super::blocking;
use super::chain::{Chain, DESC_SIZE, Used, Walk};
use super::dirty::RingLog;
use super::inflight::{Resumed, Tracker, before_store};
use super::memory::MemMap;
use super::request::{Limits, Parsed, Request};
use super::{GuestMem, IoVec, ParkedRing, RingStart};

/// Largest split ring (2.7). QEMU stops at 1024.
pub const MAX_RING_SIZE: u16 = 32768;

/// Vectors kept for reuse have at most this capacity, so that a few very long chains do not hold memory for ever.
const MAX_KEPT_CAPACITY: usize = 256;

/// Available ring: `flags`, `idx`, then the entries, then `used_event` (2.7.6).
const AVAIL_IDX: usize = 2;
const AVAIL_RING: usize = 4;
const AVAIL_ENTRY: usize = 2;
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Used ring: `flags`, `idx`, then the entries, then `avail_event` (2.7.8).
const USED_IDX: usize = 2;
const USED_RING: usize = 4;
const USED_ENTRY: usize = 8;
const USED_F_NO_NOTIFY: u16 = 1;

/// Why a ring cannot start, or can no longer be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RingError {
    /// The size is not a power of two from 1 to [`MAX_RING_SIZE`].
    #[error("ring size {size} is not a power of two up to {MAX_RING_SIZE}")]
    Size {
        /// Entries asked for.
        size: u16,
    },
    /// A part of the ring is not aligned as 2.7 demands.
    #[error("the {part} at {addr:#x} is not aligned to {align} bytes")]
    Alignment {
        /// Which part.
        part: &'static str,
        /// Guest-physical address.
        addr: u64,
        /// Bytes that it must be a multiple of.
        align: u64,
    },
    /// A part of the ring is not within one region of the memory table.
    #[error("the {part} at {addr:#x} is not within one region of guest memory (needs {len} bytes)")]
    Unmapped {
        /// Which part.
        part: &'static str,
        /// Guest-physical address.
        addr: u64,
        /// Bytes needed.
        len: u64,
    },
    /// The guest claims to have made more requests available than the ring holds.
    #[error("available index {idx} is {ahead} ahead of {next}, more than the ring holds")]
    AvailableIndex {
        /// Index in the available ring.
        idx: u16,
        /// The next one to take.
        next: u16,
        /// Their distance.
        ahead: u16,
    },
    /// An available entry names a descriptor that does not exist.
    #[error("descriptor {head} is outside the ring")]
    HeadOutOfRange {
        /// The entry.
        head: u16,
    },
    /// An available entry names a chain that is not completed yet.
    #[error("descriptor chain {head} is made available while it is in flight")]
    DuplicateHead {
        /// The entry.
        head: u16,
    },
    /// A chain that does not end.
    #[error("descriptor chain {head} is a loop")]
    Loop {
        /// First descriptor of the chain.
        head: u16,
    },
    /// A descriptor's successor does not exist.
    #[error("descriptor chain {head} goes on at {next}, outside its table")]
    NextOutOfRange {
        /// First descriptor of the chain.
        head: u16,
        /// The successor.
        next: u16,
    },
    /// An indirect descriptor although the feature was not acknowledged.
    #[error("descriptor chain {head} is indirect, which was not negotiated")]
    IndirectNotNegotiated {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect descriptor inside an indirect table.
    #[error("descriptor chain {head} has an indirect table within an indirect table")]
    NestedIndirect {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect table that is empty, not whole descriptors, or too long.
    #[error("descriptor chain {head} has an indirect table of {len} bytes")]
    IndirectLength {
        /// First descriptor of the chain.
        head: u16,
        /// Length of the table in bytes.
        len: u32,
    },
    /// An indirect table outside guest memory.
    #[error(
        "descriptor chain {head} has its indirect table at {addr:#x}+{len:#x}, outside guest memory"
    )]
    IndirectUnmapped {
        /// First descriptor of the chain.
        head: u16,
        /// Guest-physical address of the table.
        addr: u64,
        /// Length of the table in bytes.
        len: u32,
    },
    /// The in-flight region cannot name every chain of the ring.
    #[error("a ring of {size} entries with an in-flight region of {entries}")]
    InflightSize {
        /// Entries in the ring.
        size: u16,
        /// Entries in the region.
        entries: u16,
    },
    /// The in-flight region says something that no process wrote.
    #[error("the in-flight region is damaged: it names entry {head}, which it does not have")]
    InflightDamaged {
        /// The entry.
        head: u16,
    },
    /// The front-end has a kick or call descriptor block.
    #[error("a notification descriptor blocks: its front-end took O_NONBLOCK away")]
    Blocking,
    /// The front-end cut short the file behind memory that it had shared.
    #[error("guest memory is gone: its file was made shorter under the running machine")]
    MemoryLost,
    /// A request without a place for its status: it cannot be answered at all.
    #[error("descriptor chain {head} has no reachable status byte")]
    NoStatus {
        /// First descriptor of the chain.
        head: u16,
    },
}

/// Host addresses of the three parts of a ring, valid while `mem` lives.
#[derive(Debug)]
struct Parts {
    desc: *const u8,
    avail: *const u8,
    used: *mut u8,
    mem: Rc<MemMap>,
}

/// Where the three parts of a ring are, in guest-physical addresses.
#[derive(Debug, Clone, Copy)]
struct Layout {
    size: u16,
    desc: GuestAddress,
    avail: GuestAddress,
    used: GuestAddress,
}

impl Layout {
    fn resolve(&self, mem: Arc<GuestMem>) -> Result<Parts, RingError> {
        if !self.size.is_power_of_two() || self.size > MAX_RING_SIZE {
            return Err(RingError::Size { size: self.size });
        }
        let mem = Rc::new(MemMap::new(mem));
        let size = u64::from(self.size);
        let part = |part, addr: GuestAddress, align: u64, len: u64| {
            if !addr.0.is_multiple_of(align) {
                return Err(RingError::Alignment {
                    part,
                    addr: addr.0,
                    align,
                });
            }
            let host = mem.contiguous(addr, len).map_err(|_| RingError::Unmapped {
                part,
                addr: addr.0,
                len,
            })?;
            // A region of guest memory starts on a page of the host, but it need not start on one of the guest.
            if !(host.addr() as u64).is_multiple_of(align) {
                return Err(RingError::Alignment {
                    part,
                    addr: addr.0,
                    align,
                });
            }
            Ok(host)
        };
        // The last two bytes of both rings are the event index; drivers reserve them whether or not it is in use.
        let avail_len = (AVAIL_RING + 2) as u64 + AVAIL_ENTRY as u64 * size;
        let used_len = Ring::used_len(self.size);
        Ok(Parts {
            desc: part(
                "descriptor table",
                self.desc,
                16,
                u64::from(DESC_SIZE) * size,
            )?,
            avail: part("available ring", self.avail, 2, avail_len)?,
            used: part("used ring", self.used, 4, used_len)?,
            mem: Rc::clone(&mem),
        })
    }
}

/// One started virtqueue. Not `Send`: it is made where it is used, from a [`RingStart`].
#[derive(Debug)]
pub struct Ring {
    index: u16,
    layout: Layout,
    parts: Parts,
    event_idx: bool,
    indirect: bool,
    kick: File,
    call: Option<File>,
    /// Next available entry to take.
    next_avail: u16,
    /// The guest's available index when it was last read.
    seen_avail: u16,
    /// Next used entry to fill.
    next_used: u16,
    /// The used index that the guest can see.
    published: u16,
    /// The used index at the last decision whether to notify; none before the first.
    decided: Option<u16>,
    /// One bit per head that was taken and not given back.
    in_flight: Box<[u64]>,
    in_flight_count: u16,
    /// Writes down what is in flight, for the next process.
    tracker: Option<Tracker>,
    /// Where writes are marked, while the virtual machine is migrated.
    log: Option<RingLog>,
    /// What an earlier process left, the oldest last.
    resubmit: Vec<u16>,
    discarded: u16,
    broken: bool,
    /// A notification descriptor blocked, and neither is touched any more.
    blocks: Cell<bool>,
    /// Descriptors looked at so far.
    walked: u64,
    /// Empty vectors for the next chains.
    spare: Vec<Vec<IoVec>>,
}

impl Ring {
    /// Takes over the ring. The used index goes on from what the guest's memory says, because the process that
    /// served the ring before may have been another one. For the same reason the guest is notified once: that one may
    /// have ended between an answer and its notification.
    ///
    /// # Errors
    ///
    /// [`RingError`] when the ring's size, alignment or place is not acceptable, or its in-flight region.
    pub fn new(start: RingStart) -> Result<Ring, RingError> {
        let (event_idx, indirect) = (start.event_idx(), start.indirect());
        let layout = Layout {
            size: start.size,
            desc: start.desc,
            avail: start.avail,
            used: start.used,
        };
        let parts = layout.resolve(start.mem)?;
        let mut ring = Ring {
            index: start.index,
            layout,
            parts,
            event_idx,
            indirect,
            kick: File::from(start.kick),
            call: start.call.map(File::from),
            next_avail: start.next_avail,
            seen_avail: start.next_avail,
            next_used: 0,
            published: 0,
            decided: None,
            in_flight: vec![0; usize::from(start.size).div_ceil(64)].into(),
            in_flight_count: 0,
            tracker: None,
            log: start.log,
            resubmit: Vec::new(),
            discarded: 0,
            broken: false,
            blocks: Cell::new(false),
            walked: 0,
            spare: Vec::new(),
        };
        ring.next_used = u16::from_le(ring.used_u16(USED_IDX).load(Ordering::Relaxed));
        ring.published = ring.next_used;
        if let Some(inflight) = start.inflight {
            let avail = u16::from_le(ring.avail_u16(AVAIL_IDX).load(Ordering::Acquire));
            let offered = avail.wrapping_sub(ring.next_used);
            let resumed = Tracker::resume(inflight, ring.size(), ring.next_used, offered)?;
            ring.resume(resumed);
        }
        ring.notify();
        Ok(ring)
    }

    fn resume(&mut self, resumed: Resumed) {
        let Resumed {
            tracker,
            heads,
            discarded,
        } = resumed;
        // At most as many as the ring has entries.
        self.next_avail = self.next_used.wrapping_add(heads.len() as u16);
        self.seen_avail = self.next_avail;
        for head in &heads {
            // Also those that are not given out yet: the guest must not offer them again.
            self.in_flight[usize::from(head / 64)] |= 1 << (head % 64);
        }
        self.tracker = Some(tracker);
        self.resubmit = heads;
        self.discarded = discarded;
    }

    /// Bytes of a used ring of `size` entries.
    pub(super) fn used_len(size: u16) -> u64 {
        (USED_RING + 2) as u64 + USED_ENTRY as u64 * u64::from(size)
    }

    /// Ends it, and says where it stopped (GET_VRING_BASE): the index of the next available entry that was not taken.
    ///
    /// What was taken and is not answered is in the in-flight region, which stays with the front-end. When the machine leaves
    /// without it, as it does in a migration and in a snapshot, the next place begins at the used index (a fresh region), and
    /// finds there in the available ring as many entries as are unanswered, but not the same ones if answers were given out of
    /// order: some requests would be lost, others answered twice. So their heads are put there, in the order in which they
    /// were taken. That ring is the driver's; but no driver reads it, and it may write none of these entries before the used
    /// index has passed them.
    pub fn stop(&mut self) -> u16 {
        let left = self.next_avail.wrapping_sub(self.published);
        let heads = match &self.tracker {
            Some(tracker) if left > 0 => tracker.in_flight(),
            _ => return self.next_avail,
        };
        // A front-end that writes into the region can have more or others in it.
        let size = self.size();
        if heads.len() == usize::from(left) && heads.iter().all(|head| *head < size) {
            for (index, head) in (0..left).zip(heads) {
                let slot = usize::from(self.published.wrapping_add(index) & (size - 1));
                let offset = AVAIL_RING + slot * AVAIL_ENTRY;
                self.avail_u16(offset)
                    .store(head.to_le(), Ordering::Release);
                if let Some(log) = &self.log {
                    log.log.mark(self.layout.avail.0 + offset as u64, 2);
                }
            }
        }
        self.next_avail
    }

    /// Which queue of the device this is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries in the ring.
    pub fn size(&self) -> u16 {
        self.layout.size
    }

    /// Index of the next available entry that will be taken.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Index of the next used entry: those before it are completed, though the last ones perhaps not yet published.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Chains taken and not given back.
    pub fn in_flight(&self) -> u16 {
        self.in_flight_count
    }

    /// Chains that an earlier process took and did not answer, and that were not given out again yet. They come before
    /// any others.
    pub fn to_resubmit(&self) -> u16 {
        if self.broken {
            return 0;
        }
        self.resubmit.len() as u16
    }

    /// Descriptors of the chains taken so far: the work that they were.
    pub fn walked(&self) -> u64 {
        self.walked
    }

    /// Whether requests in flight are written down for the next process.
    pub fn is_tracked(&self) -> bool {
        self.tracker.is_some()
    }

    /// Chains in flight by an in-flight region that was about an earlier life of the ring. They are forgotten.
    pub fn discarded(&self) -> u16 {
        self.discarded
    }

    /// Whether the ring was given up after an error.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Takes the next chain that the guest made available, or none.
    ///
    /// # Errors
    ///
    /// [`RingError`], once; the ring is broken and gives out nothing more.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        if self.broken {
            return Ok(None);
        }
        match self.try_pop() {
            Err(error) => {
                self.broken = true;
                Err(error)
            }
            taken => taken,
        }
    }

    /// Takes the next chain as a virtio-blk request, or none.
    ///
    /// # Errors
    ///
    /// As [`pop`](Ring::pop), and when a chain has no place for an answer.
    pub fn next_request(&mut self, limits: &Limits) -> Result<Option<Parsed>, RingError> {
        let before = self.next_avail;
        let Some(chain) = self.pop()? else {
            return Ok(None);
        };
        let head = chain.head;
        match Request::parse(chain, limits) {
            Ok(parsed) => Ok(Some(parsed)),
            Err(error) => {
                self.broken = true;
                self.take_back(head, before);
                Err(error)
            }
        }
    }

    /// A chain that cannot be answered is not taken, so that nobody waits for it: not whoever stops the ring, nor whoever hands
    /// it over. The ring stands `before` it, or, if an earlier process had taken it, leaves it in the region.
    #[cold]
    fn take_back(&mut self, head: u16, before: u16) {
        self.in_flight_count -= 1;
        if self.next_avail != before {
            self.next_avail = before;
            self.in_flight[usize::from(head / 64)] &= !(1 << (head % 64));
            if let Some(tracker) = &mut self.tracker {
                tracker.not_taken(head);
            }
        }
    }

    #[cold]
    fn pop_again(&mut self, head: u16) -> Result<Option<Chain>, RingError> {
        let walk = Walk {
            mem: &self.parts.mem,
            table: self.parts.desc,
            size: self.layout.size,
            indirect: self.indirect,
        };
        let chain = walk.chain(head, self.spare.pop().unwrap_or_default())?;
        self.in_flight_count += 1;
        self.walked += u64::from(chain.walked);
        Ok(Some(chain))
    }

    // Inlined, as the walk in it.
    #[inline(always)]
    fn try_pop(&mut self) -> Result<Option<Chain>, RingError> {
        if let Some(head) = self.resubmit.pop() {
            return self.pop_again(head);
        }
        if self.next_avail == self.seen_avail && !self.look_for_more()? {
            return Ok(None);
        }
        let slot = usize::from(self.next_avail & (self.size() - 1));
        let head = self
            .avail_u16(AVAIL_RING + slot * AVAIL_ENTRY)
            .load(Ordering::Relaxed);
        let head = u16::from_le(head);
        if head >= self.size() {
            return Err(RingError::HeadOutOfRange { head });
        }
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        if self.in_flight[word] & bit != 0 {
            return Err(RingError::DuplicateHead { head });
        }
        let walk = Walk {
            mem: &self.parts.mem,
            table: self.parts.desc,
            size: self.layout.size,
            indirect: self.indirect,
        };
        let chain = walk.chain(head, self.spare.pop().unwrap_or_default())?;
        if let Some(tracker) = &mut self.tracker {
            tracker.taken(head);
        }
        self.in_flight[word] |= bit;
        self.in_flight_count += 1;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.walked += u64::from(chain.walked);
        Ok(Some(chain))
    }

    /// Reads the guest's available index. Acquire: the entries and descriptors that it covers are read after it.
    fn look_for_more(&mut self) -> Result<bool, RingError> {
        let idx = u16::from_le(self.avail_u16(AVAIL_IDX).load(Ordering::Acquire));
        if self.parts.mem.is_lost() {
            return Err(RingError::MemoryLost);
        }
        if self.blocks.get() {
            return Err(RingError::Blocking);
        }
        let ahead = idx.wrapping_sub(self.next_avail);
        if ahead > self.size() {
            return Err(RingError::AvailableIndex {
                idx,
                next: self.next_avail,
                ahead,
            });
        }
        self.seen_avail = idx;
        Ok(ahead != 0)
    }

    /// Gives a chain back. The guest sees it after [`publish`](Ring::publish).
    ///
    /// # Panics
    ///
    /// When the chain was not taken from this ring, which is an error of ours.
    pub fn push_used(&mut self, used: Used) {
        let head = used.head;
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        assert!(
            self.in_flight.get(word).is_some_and(|w| w & bit != 0),
            "chain {head} is not in flight in this ring"
        );
        if let Some(log) = &self.log
            && log.all
        {
            used.written.mark(&used.iovecs, &log.log);
        }
        let slot = usize::from(self.next_used & (self.size() - 1));
        // SAFETY: the used ring was resolved for all `size` entries, 4-aligned, and `slot < size`.
        unsafe {
            let entry = self
                .parts
                .used
                .add(USED_RING + slot * USED_ENTRY)
                .cast::<u32>();
            entry.write_volatile(u32::from(head).to_le());
            entry.add(1).write_volatile(used.len.to_le());
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.answered(head);
        }
        self.next_used = self.next_used.wrapping_add(1);
        self.in_flight[word] &= !bit;
        self.in_flight_count -= 1;
        let mut iovecs = used.iovecs;
        if iovecs.capacity() <= MAX_KEPT_CAPACITY && self.spare.len() < usize::from(self.size()) {
            iovecs.clear();
            self.spare.push(iovecs);
        }
    }

    /// Lets the guest see everything pushed so far, with one store. Release: entries, status bytes and data first.
    pub fn publish(&mut self) {
        if self.published != self.next_used {
            let from = std::mem::replace(&mut self.published, self.next_used);
            before_store();
            self.used_u16(USED_IDX)
                .store(self.next_used.to_le(), Ordering::Release);
            self.mark_published(from);
            if let Some(tracker) = &mut self.tracker {
                tracker.published(self.next_used);
            }
        }
    }

    /// Marks the used entries from `from` on, and the index.
    #[inline]
    fn mark_published(&self, from: u16) {
        if self.log.is_none() {
            return;
        }
        let (size, count) = (self.size(), self.next_used.wrapping_sub(from));
        let first = from & (size - 1);
        // At most one lap, in two pieces where it goes over the end.
        let to_end = count.min(size - first);
        for (slot, n) in [(first, to_end), (0, count - to_end)] {
            let at = USED_RING + usize::from(slot) * USED_ENTRY;
            self.mark_used(at, usize::from(n) * USED_ENTRY);
        }
        self.mark_used(USED_IDX, 2);
    }

    /// Marks a part of the used ring as written.
    #[inline]
    fn mark_used(&self, offset: usize, len: usize) {
        if let Some(log) = &self.log {
            let base = log.used.unwrap_or(self.layout.used);
            log.log.mark(base.0 + offset as u64, len as u64);
        }
    }

    /// Starts, changes or ends the log of what is written to guest memory. What is in flight is marked in the one that is
    /// in force when it is answered.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.log = log;
    }

    /// Whether the guest wants to hear of what was published since the last time this was asked (2.7.7, 2.7.10).
    pub fn needs_notify(&mut self) -> bool {
        let old = match self.decided.replace(self.published) {
            Some(old) if old == self.published => return false,
            old => old,
        };
        // The guest stores its event index and then looks at the used index; we did the reverse. One of the two must
        // see the other's store, or a wake-up is lost.
        fence(Ordering::SeqCst);
        if !self.event_idx {
            return u16::from_le(self.avail_u16(0).load(Ordering::Relaxed)) & AVAIL_F_NO_INTERRUPT
                == 0;
        }
        let Some(old) = old else {
            // The first time after a start nobody knows what the guest was told before.
            return true;
        };
        let at = AVAIL_RING + usize::from(self.size()) * AVAIL_ENTRY;
        let event = u16::from_le(self.avail_u16(at).load(Ordering::Relaxed));
        crossed(event, old, self.published)
    }

    /// Signals the call descriptor. Without one the guest polls.
    pub fn notify(&self) {
        if let Some(mut call) = self.call.as_ref() {
            // A full counter means that a signal is already pending, and any other error is of a descriptor that the
            // front-end chose: there is nobody to tell who does not know.
            self.touch(|| call.write(&1u64.to_ne_bytes()));
        }
    }

    /// [`publish`](Ring::publish), then [`notify`](Ring::notify) if the guest asked for it. Once per batch.
    pub fn publish_and_notify(&mut self) {
        self.publish();
        if self.needs_notify() {
            self.notify();
        }
    }

    /// Asks the guest not to kick while the ring is being drained. Only a hint.
    pub fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.used_u16(0)
                .store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
            self.mark_used(0, 2);
        }
        // With event indices the old one stays behind and does not match again for a whole lap.
    }

    /// Asks the guest to kick for the next request, and says whether one has come already: if so, take it, because
    /// there may be no kick for it.
    #[must_use = "true means requests that no kick will announce"]
    pub fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            let at = USED_RING + usize::from(self.size()) * USED_ENTRY;
            self.used_u16(at)
                .store(self.next_avail.to_le(), Ordering::Relaxed);
            self.mark_used(at, 2);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
            self.mark_used(0, 2);
        }
        // As in `needs_notify`, for the other direction.
        fence(Ordering::SeqCst);
        !self.broken
            && (!self.resubmit.is_empty()
                || u16::from_le(self.avail_u16(AVAIL_IDX).load(Ordering::Acquire))
                    != self.next_avail)
    }

    /// The descriptor to wait on for kicks.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// What it would take to serve this ring elsewhere. It goes on here.
    ///
    /// # Errors
    ///
    /// The process has no descriptors left.
    pub fn park(&self) -> io::Result<ParkedRing> {
        let call = self
            .call
            .as_ref()
            .map(|call| call.as_fd().try_clone_to_owned());
        Ok(ParkedRing {
            index: self.index,
            next_avail: self.next_avail,
            kick: self.kick.as_fd().try_clone_to_owned()?,
            call: call.transpose()?,
        })
    }

    /// Empties the kick descriptor, which an edge-triggered poll needs. One read takes all kicks of an eventfd.
    pub fn drain_kick(&self) {
        self.touch(|| (&self.kick).read(&mut [0u8; 8]));
    }

    /// Reads or writes a descriptor of the front-end's.
    fn touch(&self, call: impl FnOnce() -> std::io::Result<usize>) {
        if !self.blocks.get() && blocking::blocks(call) {
            self.blocks.set(true);
        }
    }

    /// Replaces the kick descriptor and returns the old one, to be taken out of epoll before it is closed.
    pub fn set_kick(&mut self, kick: OwnedFd) -> OwnedFd {
        std::mem::replace(&mut self.kick, File::from(kick)).into()
    }

    /// Replaces the call descriptor, and signals the new one: what was published to the old one may not have been
    /// heard.
    pub fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call.map(File::from);
        self.notify();
    }

    /// Follows a change of the memory table. Chains in flight keep the table they were resolved with.
    ///
    /// # Errors
    ///
    /// [`RingError`] when the ring is no longer within memory; it is broken then.
    pub fn set_memory(&mut self, mem: Arc<GuestMem>) -> Result<(), RingError> {
        match self.layout.resolve(mem) {
            Ok(parts) => {
                self.parts = parts;
                Ok(())
            }
            Err(error) => {
                self.broken = true;
                Err(error)
            }
        }
    }

    /// A 16-bit field of the available ring.
    #[inline]
    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset <= AVAIL_RING + usize::from(self.size()) * AVAIL_ENTRY);
        // SAFETY: the ring was resolved up to and including the event index, 2-aligned, and stays mapped while
        // `self.parts` does; all accesses to these fields are atomic. Only `stop` stores through this one.
        unsafe { AtomicU16::from_ptr(self.parts.avail.add(offset).cast_mut().cast()) }
    }

    /// A 16-bit field of the used ring.
    #[inline]
    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset <= USED_RING + usize::from(self.size()) * USED_ENTRY);
        // SAFETY: as above, for the used ring; its 32-bit entries are never accessed through this.
        unsafe { AtomicU16::from_ptr(self.parts.used.add(offset).cast()) }
    }
}

/// Whether an index moving from `old` to `new` stepped over `event` (2.7.10.1), all modulo 2^16.
fn crossed(event: u16, old: u16, new: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}
