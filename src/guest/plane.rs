//! The contract between the control thread, which speaks vhost-user, and the engine, which moves data.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestAddress;

use super::GuestMem;
use super::config::{RING_F_EVENT_IDX, RING_F_INDIRECT_DESC};
use super::dirty::RingLog;
use super::inflight::InflightQueue;

/// What the engine implements. The control thread hands ring state over and waits for each call to return, so that a
/// reply to the front-end is never ahead of the data path.
///
/// Order of calls within one connection: `set_features` and `set_memory` come before the first `start_ring`; each may
/// come again at any time, also while rings run. Between `start_ring` and `stop_ring` of an index the ring belongs to
/// the engine. `disconnected` ends the connection whatever came before; the next connection starts from nothing.
///
/// A front-end may hold its whole virtual machine still while it waits for an answer (QEMU does for
/// GET_VRING_BASE), so no call may wait without a bound.
pub trait DataPlane: Send {
    /// The ring got its kick descriptor and starts. The engine registers `start.kick`, and looks at the ring once
    /// without waiting for a kick: one may have been consumed by an earlier process.
    ///
    /// # Errors
    ///
    /// A sentence for the log. The connection is closed with it.
    fn start_ring(&mut self, start: RingStart) -> Result<(), String>;

    /// The front-end replaced the kick descriptor of a running ring. Take the old one out of epoll *before* closing
    /// it (the front-end holds the same open file description, so closing alone does not), and look at the ring once.
    fn set_kick(&mut self, index: u16, kick: OwnedFd);

    /// The front-end replaced the call descriptor, or took it away (`None`: the guest polls). Signal a new one at
    /// once: a completion may have been published before it arrived.
    fn set_call(&mut self, index: u16, call: Option<OwnedFd>);

    /// Stop popping from a running ring, wait a bounded time for what is in flight, give up both descriptors.
    /// Returns the index of the next available entry that the engine did not take (GET_VRING_BASE).
    ///
    /// # Errors
    ///
    /// A sentence for the log: the index is not known. The connection is closed with it, because a front-end would
    /// believe any number, and goes by the used index without one.
    fn stop_ring(&mut self, index: u16) -> Result<u16, String>;

    /// `false` pauses a running ring: no new requests are taken, those in flight complete. `true` resumes it, with
    /// one look at the ring because kicks may have been missed.
    fn set_enabled(&mut self, index: u16, enabled: bool);

    /// A new memory table, while rings may run. Requests in flight keep the table that they were resolved with.
    fn set_memory(&mut self, mem: Arc<GuestMem>);

    /// Starts, changes or ends (`None`) the log of what a running ring writes into guest memory. From the return of this
    /// call on every write is marked there, and none in the log before.
    fn set_log(&mut self, index: u16, log: Option<RingLog>);

    /// The features in force and the write cache. `writeback` false means that a write may complete only when it is
    /// durable: either the guest cannot flush, or it switched the write cache off.
    fn set_features(&mut self, acked: u64, writeback: bool);

    /// All rings stand still: nothing more is taken, and what is in flight is waited for at most `patience`. Describes the
    /// rings that run. A ring without an in-flight region has nothing in flight on return, and answers nothing until
    /// [`unpark`](DataPlane::unpark); one with a region may go on answering what it took.
    ///
    /// # Errors
    ///
    /// A sentence for people: requests of a ring without a region do not end. Then all rings go on.
    fn park(&mut self, patience: Duration) -> Result<Vec<ParkedRing>, String>;

    /// The rings go on, with one look at each.
    fn unpark(&mut self);

    /// The connection is gone. Drop all its rings and complete nothing more into guest memory; requests whose I/O
    /// the kernel still holds are kept until that I/O ends, then abandoned.
    fn disconnected(&mut self);
}

/// A ring that stands still and is to run on elsewhere.
#[derive(Debug)]
pub struct ParkedRing {
    /// Which queue of the device.
    pub index: u16,
    /// Index of the next available entry that was not taken.
    pub next_avail: u16,
    /// What the guest's kicks arrive on: one more descriptor for it.
    pub kick: OwnedFd,
    /// What completions are signalled on; `None` when the guest polls.
    pub call: Option<OwnedFd>,
}

/// Everything that the engine needs to serve one ring. All addresses are guest-physical and not yet checked:
/// [`Ring::new`](super::Ring::new) does that.
#[derive(Debug)]
pub struct RingStart {
    /// Which queue of the device, from 0.
    pub index: u16,
    /// Entries in each of the three parts of the ring: a power of two up to [`MAX_RING_SIZE`](super::MAX_RING_SIZE).
    pub size: u16,
    /// Descriptor table.
    pub desc: GuestAddress,
    /// Available ring (the guest's).
    pub avail: GuestAddress,
    /// Used ring (ours).
    pub used: GuestAddress,
    /// Index of the first available entry to take (SET_VRING_BASE). Not looked at when requests in flight are tracked:
    /// the region knows better.
    pub next_avail: u16,
    /// Features that the front-end acknowledged before this start; a later change does not reach a running ring.
    pub features: u64,
    /// Whether requests may be taken at once, or only after `set_enabled`.
    pub enabled: bool,
    /// Eventfd that the guest's kicks arrive on. O_NONBLOCK is set.
    pub kick: OwnedFd,
    /// Eventfd to signal completions on; `None` when the guest polls. O_NONBLOCK is set.
    pub call: Option<OwnedFd>,
    /// The memory in which all of this lies.
    pub mem: Arc<GuestMem>,
    /// Where requests in flight are written down for the next process; `None` when the front-end keeps no such memory.
    pub inflight: Option<InflightQueue>,
    /// Where writes into guest memory are marked; `None` when the virtual machine is not migrated.
    pub log: Option<RingLog>,
}

impl RingStart {
    /// Whether notifications are limited by event indices in both directions (VIRTIO_F_EVENT_IDX).
    pub fn event_idx(&self) -> bool {
        self.features & RING_F_EVENT_IDX != 0
    }

    /// Whether descriptors may refer to indirect tables (VIRTIO_F_INDIRECT_DESC).
    pub fn indirect(&self) -> bool {
        self.features & RING_F_INDIRECT_DESC != 0
    }
}
