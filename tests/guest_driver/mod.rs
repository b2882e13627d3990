//! A driver's half of a split ring, for the tests: it writes descriptors and available entries exactly as told,
//! right or wrong, and reads what the device answers.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod engine;
pub mod tracked;
pub mod vm;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use lockstep::guest::{GuestMem, RingStart};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const MIB: u64 = 1 << 20;
/// Where the tests of rings put their data, clear of the ring.
pub const DATA: u64 = 0x8_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

/// Two adjacent regions of 1 MiB, a hole, and one more.
pub fn memory() -> Arc<GuestMem> {
    let mib = MIB as usize;
    Arc::new(
        GuestMem::from_ranges(&[
            (GuestAddress(0), mib),
            (GuestAddress(MIB), mib),
            (GuestAddress(4 * MIB), mib),
        ])
        .unwrap(),
    )
}

/// One descriptor, as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

pub fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

impl Desc {
    pub fn bytes(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.addr.to_le_bytes());
        out[8..12].copy_from_slice(&self.len.to_le_bytes());
        out[12..14].copy_from_slice(&self.flags.to_le_bytes());
        out[14..].copy_from_slice(&self.next.to_le_bytes());
        out
    }
}

pub struct Driver {
    pub mem: Arc<GuestMem>,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub kick: EventFd,
    pub call: EventFd,
    avail_idx: u16,
    used_idx: u16,
}

impl Driver {
    /// Lays a ring out from `base` (a multiple of 16) on.
    pub fn new(mem: Arc<GuestMem>, base: u64, size: u16) -> Driver {
        let entries = u64::from(size);
        let avail = base + 16 * entries;
        let used = (avail + 6 + 2 * entries).next_multiple_of(4);
        Driver {
            mem,
            size,
            desc: base,
            avail,
            used,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            avail_idx: 0,
            used_idx: 0,
        }
    }

    /// Bytes that the ring takes from its base on.
    pub fn footprint(size: u16) -> u64 {
        (16 + 2 + 8) * u64::from(size) + 16
    }

    pub fn start(&self, features: u64) -> RingStart {
        RingStart {
            index: 0,
            size: self.size,
            desc: GuestAddress(self.desc),
            avail: GuestAddress(self.avail),
            used: GuestAddress(self.used),
            next_avail: self.avail_idx,
            features,
            enabled: true,
            kick: owned(&self.kick),
            call: Some(owned(&self.call)),
            mem: Arc::clone(&self.mem),
            inflight: None,
            log: None,
        }
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.mem.read_slice(&mut out, GuestAddress(addr)).unwrap();
        out
    }

    pub fn put(&self, index: u16, d: Desc) {
        self.write(self.desc + 16 * u64::from(index), &d.bytes());
    }

    /// Writes a table of descriptors somewhere else.
    pub fn put_table(&self, addr: u64, descs: &[Desc]) {
        for (i, d) in descs.iter().enumerate() {
            self.write(addr + 16 * i as u64, &d.bytes());
        }
    }

    /// Writes descriptors from `head` on, each linked to the following one, and makes the chain available.
    pub fn offer_chain(&mut self, head: u16, descs: &[Desc]) {
        for (i, d) in (0u16..).zip(descs) {
            let last = usize::from(i) + 1 == descs.len();
            let (flags, next) = if last {
                (d.flags, 0)
            } else {
                (d.flags | NEXT, head + i + 1)
            };
            self.put(head + i, desc(d.addr, d.len, flags, next));
        }
        self.offer(head);
    }

    /// Makes `head` available without looking at it.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail_idx % self.size);
        self.write(self.avail + 4 + 2 * slot, &head.to_le_bytes());
        self.set_avail_idx(self.avail_idx.wrapping_add(1));
    }

    pub fn set_avail_idx(&mut self, idx: u16) {
        self.avail_idx = idx;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.mem
            .store(
                idx.to_le(),
                GuestAddress(self.avail + 2),
                std::sync::atomic::Ordering::Release,
            )
            .unwrap();
    }

    /// Lets both sides continue from `idx`, as after a start in the middle.
    pub fn start_at(&mut self, idx: u16) {
        self.set_avail_idx(idx);
        self.used_idx = idx;
        self.write(self.used + 2, &idx.to_le_bytes());
    }

    pub fn set_no_interrupt(&self, on: bool) {
        self.write(self.avail, &u16::from(on).to_le_bytes());
    }

    pub fn set_used_event(&self, idx: u16) {
        self.write(
            self.avail + 4 + 2 * u64::from(self.size),
            &idx.to_le_bytes(),
        );
    }

    pub fn avail_event(&self) -> u16 {
        self.u16_at(self.used + 4 + 8 * u64::from(self.size))
    }

    pub fn used_flags(&self) -> u16 {
        self.u16_at(self.used)
    }

    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    pub fn used_idx(&self) -> u16 {
        self.mem
            .load::<u16>(
                GuestAddress(self.used + 2),
                std::sync::atomic::Ordering::Acquire,
            )
            .map(u16::from_le)
            .unwrap()
    }

    /// The completions since the last call: head and length.
    pub fn completions(&mut self) -> Vec<(u32, u32)> {
        let mut out = Vec::new();
        let now = self.used_idx();
        while self.used_idx != now {
            let at = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
            let entry = self.read(at, 8);
            let (id, len) = entry.split_at(4);
            out.push((
                u32::from_le_bytes(id.try_into().unwrap()),
                u32::from_le_bytes(len.try_into().unwrap()),
            ));
            self.used_idx = self.used_idx.wrapping_add(1);
        }
        out
    }

    /// Whether the call descriptor was signalled since the last time.
    pub fn was_called(&self) -> bool {
        self.call.read().is_ok()
    }

    fn u16_at(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.read(addr, 2).try_into().unwrap())
    }
}

/// The header of a virtio-blk request.
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&kind.to_le_bytes());
    out[8..].copy_from_slice(&sector.to_le_bytes());
    out
}

pub fn owned(fd: &EventFd) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: the file is a fresh duplicate that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(fd.try_clone().unwrap())) }
}
