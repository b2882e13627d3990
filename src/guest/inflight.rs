//! The in-flight region (vhost-user specification, "Inflight I/O tracking", split virtqueues): which requests this
//! process took and has not answered, in memory that the front-end keeps when the process dies.
//!
//! A replicated volume answers out of order. Without the region the next process would have to begin again at the used
//! index: it would answer some requests twice and others never, and the guest's driver would give the queue up.
//!
//! Each queue has a part, at multiples of 64 bytes, laid out as libvhost-user does; native byte order:
//!
//! | offset | | |
//! | --- | --- | --- |
//! | 0 | `features` u64 | 0 |
//! | 8 | `version` u16 | 0: fresh, or the device was reset; 1: this layout |
//! | 10 | `desc_num` u16 | entries that follow |
//! | 12 | `last_batch_head` u16 | head of the list of answers that were given last |
//! | 14 | `used_idx` u16 | the used index up to which the entries below are right |
//! | 16 + 16 h | `inflight` u8, 5 unused, `next` u16, `counter` u64 | the chain with head h: taken and not answered; the next older one of its batch; the order in which chains were taken |
//!
//! The layout is read by the next process, which may be another version of this program: a change of it needs a new
//! `version`, and the old one must still be read.
//!
//! # Why a process may end between any two stores
//!
//! *Taking* a chain: `counter`, then `inflight` = 1. Before the second store the chain was not taken, after it it was.
//!
//! *Answering* a batch: for each chain `next` and `last_batch_head`, which nobody reads yet; then the used index in
//! guest memory, at which moment all of them are answered; then `inflight` = 0 for each, and at last `used_idx`. If that
//! differs from the guest's used index, the difference is the length of a batch whose entries may still say `inflight`,
//! and the list names them.
//!
//! So at each moment: chains taken = used index + entries in flight (less an unfinished batch), and the available ring
//! is read on from there, whatever SET_VRING_BASE says: QEMU knows only the used index, cloud-hypervisor only the
//! available one.
//!
//! A machine that is migrated, or saved, leaves without its region. Then the available ring itself says what is not answered:
//! see [`Ring::stop`](super::Ring::stop).
//!
//! The order of the stores is the program's: each is a release store, so that neither the compiler nor the processor
//! lets one overtake another.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{FileOffset, MmapRegion};

use super::ring::{MAX_RING_SIZE, RingError};

const FEATURES: usize = 0;
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const HEADER: usize = 16;

const ENTRY: usize = 16;
const ENTRY_INFLIGHT: usize = 0;
const ENTRY_NEXT: usize = 6;
const ENTRY_COUNTER: usize = 8;

/// Parts start at multiples of this (libvhost-user's INFLIGHT_ALIGNMENT).
const ALIGN: usize = 64;

/// `version` of a part that nobody wrote to, or whose device was reset.
const FRESH: u16 = 0;
/// `version` of the layout above.
const V1: u16 = 1;

/// Seals of a region: its size stays what it is, so that no access to the mapping faults.
const SEALS: SealFlags = SealFlags::GROW
    .union(SealFlags::SHRINK)
    .union(SealFlags::SEAL);

/// Why a region is refused.
#[derive(Debug, Error)]
pub enum InflightError {
    /// None, or more than the device has.
    #[error(
        "an in-flight region for {asked} queues was asked for; the volume is attached with {have}"
    )]
    Queues {
        /// Queues of the region.
        asked: u16,
        /// Queues of the device.
        have: u16,
    },
    /// None, or more than a ring can have.
    #[error("an in-flight region of {0} entries a queue; 1 to {MAX_RING_SIZE} are possible")]
    Entries(u16),
    /// It is smaller than its counts say, or its file is.
    #[error(
        "the in-flight region has {size} bytes at {offset} of a file of {file}; {needed} are needed"
    )]
    Size {
        /// Bytes by the message.
        size: u64,
        /// Where they begin in the file.
        offset: u64,
        /// Bytes of the file.
        file: u64,
        /// Bytes that its counts take.
        needed: u64,
    },
    /// An access to its mapping could fail.
    #[error(
        "the in-flight region is not a memory file (of ordinary pages) that is sealed against shrinking, as the one that GET_INFLIGHT_FD gives out is"
    )]
    NotSealed,
    /// Of a newer program, or of none.
    #[error(
        "the in-flight region of queue {queue} has version {version} and features {features:#x}; this program reads version {V1} without features: restart the newer one"
    )]
    Version {
        /// Of which queue.
        queue: u16,
        /// Its `version`.
        version: u16,
        /// Its `features`.
        features: u64,
    },
    /// It does not agree with the message that brought it.
    #[error("the in-flight region of queue {queue} says {said} entries where it has {entries}")]
    Count { queue: u16, said: u16, entries: u16 },
    #[error("the in-flight region cannot be {what}: {source}")]
    Io {
        what: &'static str,
        source: io::Error,
    },
}

fn cannot(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> InflightError {
    move |errno| InflightError::Io {
        what,
        source: errno.into(),
    }
}

/// Whether no access to a mapping of `file` can fault: it could if the file were shrunk, which a seal prevents, and if a
/// huge page were needed that the machine has not got.
pub(super) fn keeps_its_size(file: &File) -> io::Result<bool> {
    // What cannot have seals says EINVAL.
    let sealed = rustix::fs::fcntl_get_seals(file).is_ok_and(|s| s.contains(SealFlags::SHRINK));
    Ok(sealed && rustix::fs::fstatfs(file)?.f_type == libc::TMPFS_MAGIC)
}

/// The file behind a mapping, and where in it the mapping begins.
pub(super) fn mapped_from(map: &MmapRegion<()>) -> io::Result<(u64, OwnedFd)> {
    let from = map.file_offset().ok_or(io::ErrorKind::InvalidData)?;
    Ok((from.start(), from.file().as_fd().try_clone_to_owned()?))
}

/// Bytes of one queue's part.
fn stride(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGN)
}

/// Checks the counts of a message against the device. Gives the bytes that a region needs.
fn needed(info: &VhostUserInflight, queues: u16) -> Result<usize, InflightError> {
    if info.num_queues == 0 || info.num_queues > queues {
        return Err(InflightError::Queues {
            asked: info.num_queues,
            have: queues,
        });
    }
    if info.queue_size == 0 || info.queue_size > MAX_RING_SIZE {
        return Err(InflightError::Entries(info.queue_size));
    }
    Ok(stride(info.queue_size) * usize::from(info.num_queues))
}

/// A region that the front-end gave back (SET_INFLIGHT_FD), mapped. Its counts are ours: what the memory says of them
/// was checked once and is not read again.
#[derive(Debug)]
pub struct Region {
    map: MmapRegion<()>,
    queues: u16,
    entries: u16,
}

impl Region {
    /// Makes a region for a device of `queues` queues, to be given to the front-end (GET_INFLIGHT_FD). All zeros, which is
    /// what a fresh one is.
    ///
    /// # Errors
    ///
    /// Its counts do not fit the device, or the system has no memory file.
    pub fn create(
        asked: &VhostUserInflight,
        queues: u16,
    ) -> Result<(VhostUserInflight, File), InflightError> {
        let size = needed(asked, queues)? as u64;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("lockstep-inflight", flags).map_err(cannot("made"))?;
        rustix::fs::ftruncate(&file, size).map_err(cannot("sized"))?;
        rustix::fs::fcntl_add_seals(&file, SEALS).map_err(cannot("sealed"))?;
        let info = VhostUserInflight {
            mmap_size: size,
            mmap_offset: 0,
            ..*asked
        };
        Ok((info, file.into()))
    }

    /// Maps a region for a device of `queues` queues. The front-end may send anything, so all of it is checked.
    ///
    /// # Errors
    ///
    /// [`InflightError`]: it does not fit the device, its file or its own message, or cannot be mapped.
    pub fn open(
        info: &VhostUserInflight,
        file: File,
        queues: u16,
    ) -> Result<Region, InflightError> {
        let needed = needed(info, queues)?;
        let sealed = keeps_its_size(&file).map_err(|source| InflightError::Io {
            what: "inspected",
            source,
        })?;
        if !sealed {
            return Err(InflightError::NotSealed);
        }
        let stat = rustix::fs::fstat(&file).map_err(cannot("inspected"))?;
        let len = u64::try_from(stat.st_size).unwrap_or(0);
        let end = info.mmap_offset.checked_add(info.mmap_size);
        if info.mmap_size < needed as u64 || end.is_none_or(|end| end > len) {
            return Err(InflightError::Size {
                size: info.mmap_size,
                offset: info.mmap_offset,
                file: len,
                needed: needed as u64,
            });
        }
        let map = MmapRegion::from_file(FileOffset::new(file, info.mmap_offset), needed).map_err(
            |e| InflightError::Io {
                what: "mapped",
                source: io::Error::other(e.to_string()),
            },
        )?;
        let region = Region {
            map,
            queues: info.num_queues,
            entries: info.queue_size,
        };
        (0..region.queues).try_for_each(|queue| region.check(queue))?;
        Ok(region)
    }

    fn check(&self, queue: u16) -> Result<(), InflightError> {
        let part = self.part(queue);
        let (version, features) = (part.u16(VERSION), part.u64(FEATURES));
        if version > V1 || features != 0 {
            return Err(InflightError::Version {
                queue,
                version,
                features,
            });
        }
        let said = part.u16(DESC_NUM);
        if version == V1 && said != self.entries {
            return Err(InflightError::Count {
                queue,
                said,
                entries: self.entries,
            });
        }
        Ok(())
    }

    /// The region as a front-end sends it, with its file once more.
    ///
    /// # Errors
    ///
    /// The process has no descriptors left.
    pub(super) fn describe(&self) -> io::Result<(VhostUserInflight, OwnedFd)> {
        let (offset, file) = mapped_from(&self.map)?;
        let size = self.map.size() as u64;
        let info = VhostUserInflight::new(size, offset, self.queues, self.entries);
        Ok((info, file))
    }

    /// Queues that it has a part for, from 0 on.
    pub fn queues(&self) -> u16 {
        self.queues
    }

    /// The device was reset: no request of before matters any more.
    pub(super) fn reset(&self) {
        for queue in 0..self.queues {
            self.part(queue).put_u16(VERSION, FRESH);
        }
    }

    fn part(&self, queue: u16) -> Part {
        assert!(
            queue < self.queues,
            "queue {queue} has no part in its region"
        );
        let offset = usize::from(queue) * stride(self.entries);
        Part {
            // SAFETY: the mapping has a part for each of its queues.
            at: unsafe { self.map.as_ptr().add(offset) },
            entries: self.entries,
        }
    }
}

/// One queue's part of a region, on its way to the ring that it tracks.
#[derive(Debug, Clone)]
pub struct InflightQueue {
    region: Arc<Region>,
    queue: u16,
}

impl InflightQueue {
    /// The part of a queue; none when the region has fewer.
    pub fn of(region: &Arc<Region>, queue: u16) -> Option<InflightQueue> {
        let region = Arc::clone(region);
        (queue < region.queues).then_some(InflightQueue { region, queue })
    }
}

/// Access to one part. Valid while its region is.
#[derive(Debug, Clone, Copy)]
struct Part {
    at: *mut u8,
    entries: u16,
}

impl Part {
    /// The place of a field of the entry of `head`.
    #[inline]
    fn entry(&self, head: u16, field: usize) -> usize {
        assert!(
            head < self.entries,
            "entry {head} is not in the in-flight region"
        );
        HEADER + ENTRY * usize::from(head) + field
    }

    // SAFETY of the six below: offsets are those of the layout, within `stride(entries)` bytes that are mapped and stay
    // so while the region lives, and aligned, since a part starts at a multiple of 64 in its page. The front-end may
    // write at the same time, so all accesses are atomic.

    fn u8(&self, offset: usize) -> u8 {
        // SAFETY: see above.
        unsafe { AtomicU8::from_ptr(self.at.add(offset)) }.load(Ordering::Acquire)
    }

    fn u16(&self, offset: usize) -> u16 {
        // SAFETY: see above.
        unsafe { AtomicU16::from_ptr(self.at.add(offset).cast()) }.load(Ordering::Acquire)
    }

    fn u64(&self, offset: usize) -> u64 {
        // SAFETY: see above.
        unsafe { AtomicU64::from_ptr(self.at.add(offset).cast()) }.load(Ordering::Acquire)
    }

    #[inline]
    fn put_u8(&self, offset: usize, value: u8) {
        before_store();
        // SAFETY: see above.
        unsafe { AtomicU8::from_ptr(self.at.add(offset)) }.store(value, Ordering::Release);
    }

    #[inline]
    fn put_u16(&self, offset: usize, value: u16) {
        before_store();
        // SAFETY: see above.
        unsafe { AtomicU16::from_ptr(self.at.add(offset).cast()) }.store(value, Ordering::Release);
    }

    #[inline]
    fn put_u64(&self, offset: usize, value: u64) {
        before_store();
        // SAFETY: see above.
        unsafe { AtomicU64::from_ptr(self.at.add(offset).cast()) }.store(value, Ordering::Release);
    }
}

/// The writer's side of one part: told of each step of a ring, it keeps the region so that the next process can go on.
#[derive(Debug)]
pub(super) struct Tracker {
    part: Part,
    /// Number of the next chain that is taken.
    counter: u64,
    /// The answer before the next one. What came before the first one of a process is nobody's business: a batch is
    /// never longer than that.
    last_batch_head: u16,
    /// Answers that the guest does not see yet.
    batch: Vec<u16>,
    // Keeps `part` mapped.
    _region: Arc<Region>,
}

/// What a region says about a ring.
#[derive(Debug)]
pub(super) struct Resumed {
    pub(super) tracker: Tracker,
    /// Heads of the chains that were taken and not answered, the oldest last.
    pub(super) heads: Vec<u16>,
    /// Chains in flight by a region that cannot be about this ring, and so are not.
    pub(super) discarded: u16,
}

impl Tracker {
    /// Takes over a ring of `ring` entries from whoever served it before: finishes what that one was doing, and says
    /// what it left. `used` is the used index in guest memory, `offered` the chains that the guest made available and
    /// that are not answered.
    pub(super) fn resume(
        queue: InflightQueue,
        ring: u16,
        used: u16,
        offered: u16,
    ) -> Result<Resumed, RingError> {
        let InflightQueue { region, queue } = queue;
        let part = region.part(queue);
        if ring > part.entries {
            return Err(RingError::InflightSize {
                size: ring,
                entries: part.entries,
            });
        }
        let mut tracker = Tracker {
            part,
            counter: 0,
            last_batch_head: 0,
            batch: Vec::with_capacity(ring.into()),
            _region: region,
        };
        if part.u16(VERSION) == FRESH {
            tracker.begin(used);
            return Ok(tracker.resumed(Vec::new(), 0));
        }
        let batch = used.wrapping_sub(part.u16(USED_IDX));
        let answered = if batch <= ring {
            tracker.last_batch(batch)?
        } else {
            Vec::new()
        };
        let mut in_flight: Vec<bool> = (0..part.entries)
            .map(|head| part.u8(part.entry(head, ENTRY_INFLIGHT)) != 0)
            .collect();
        for head in &answered {
            in_flight[usize::from(*head)] = false;
        }
        let mut left: Vec<(u64, u16)> = (0..part.entries)
            .zip(in_flight)
            .filter(|(_, in_flight)| *in_flight)
            .map(|(head, _)| (part.u64(part.entry(head, ENTRY_COUNTER)), head))
            .collect();
        let fits = batch <= ring
            && left.len() <= usize::from(offered)
            && left.iter().all(|(_, head)| *head < ring);
        if !fits {
            // The guest's driver began anew and nobody told the region. To answer what the new ring never had would
            // break it.
            tracker.begin(used);
            return Ok(tracker.resumed(Vec::new(), left.len() as u16));
        }
        for head in answered {
            part.put_u8(part.entry(head, ENTRY_INFLIGHT), 0);
        }
        part.put_u16(USED_IDX, used);
        left.sort_unstable_by(|a, b| b.cmp(a));
        tracker.counter = left.first().map_or(0, |(newest, _)| newest.wrapping_add(1));
        let heads = left.into_iter().map(|(_, head)| head).collect();
        Ok(tracker.resumed(heads, 0))
    }

    fn resumed(self, heads: Vec<u16>, discarded: u16) -> Resumed {
        Resumed {
            tracker: self,
            heads,
            discarded,
        }
    }

    /// A region without a past. `version` comes last: until then the next process does all of this again.
    fn begin(&mut self, used: u16) {
        let part = self.part;
        part.put_u16(VERSION, FRESH);
        for head in 0..part.entries {
            part.put_u8(part.entry(head, ENTRY_INFLIGHT), 0);
        }
        part.put_u16(DESC_NUM, part.entries);
        part.put_u16(LAST_BATCH_HEAD, 0);
        // libvhost-user leaves a zero here, and takes it for an unfinished batch when the ring did not begin there.
        part.put_u16(USED_IDX, used);
        part.put_u16(VERSION, V1);
    }

    /// The newest `count` answers.
    fn last_batch(&self, count: u16) -> Result<Vec<u16>, RingError> {
        let part = self.part;
        let mut heads = Vec::with_capacity(count.into());
        let mut field = LAST_BATCH_HEAD;
        for _ in 0..count {
            let head = part.u16(field);
            if head >= part.entries {
                return Err(RingError::InflightDamaged { head });
            }
            heads.push(head);
            field = part.entry(head, ENTRY_NEXT);
        }
        Ok(heads)
    }

    /// A chain was taken.
    #[inline]
    pub(super) fn taken(&mut self, head: u16) {
        let part = self.part;
        part.put_u64(part.entry(head, ENTRY_COUNTER), self.counter);
        self.counter = self.counter.wrapping_add(1);
        part.put_u8(part.entry(head, ENTRY_INFLIGHT), 1);
    }

    /// The chain that was taken last was not, after all.
    pub(super) fn not_taken(&mut self, head: u16) {
        let part = self.part;
        part.put_u8(part.entry(head, ENTRY_INFLIGHT), 0);
    }

    /// Heads of the chains that were taken and not answered, the oldest first.
    pub(super) fn in_flight(&self) -> Vec<u16> {
        let part = self.part;
        let counter = |head: &u16| part.u64(part.entry(*head, ENTRY_COUNTER));
        let in_flight = |head: &u16| part.u8(part.entry(*head, ENTRY_INFLIGHT)) != 0;
        let mut heads: Vec<u16> = (0..part.entries).filter(in_flight).collect();
        heads.sort_by_key(counter);
        heads
    }

    /// A chain's answer is in the used ring, beyond the used index.
    #[inline]
    pub(super) fn answered(&mut self, head: u16) {
        let part = self.part;
        part.put_u16(part.entry(head, ENTRY_NEXT), self.last_batch_head);
        part.put_u16(LAST_BATCH_HEAD, head);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    /// The used index was stored: the guest sees all answers.
    #[inline]
    pub(super) fn published(&mut self, used: u16) {
        let part = self.part;
        for head in self.batch.drain(..) {
            part.put_u8(part.entry(head, ENTRY_INFLIGHT), 0);
        }
        part.put_u16(USED_IDX, used);
    }
}

/// Called before each store that the next process builds on, so that tests can let this one end there.
#[inline(always)]
pub(super) fn before_store() {
    #[cfg(test)]
    tests::before_store();
}

#[cfg(test)]
mod tests;
