//! What a guest and a front-end may say, from the bytes of a fuzzer: each `run` takes any bytes, turns them into actions,
//! and panics when something is not as it must be. Under cargo-fuzz by `fuzz_targets/`, on stable Rust by
//! `tests/guest_fuzz.rs`.
#![allow(dead_code, reason = "each fuzz target uses its own part")]

pub mod request;
pub mod ring;
pub mod session;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use lockstep::guest::{GuestMem, IoVec, RingStart};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes, taken from the front. Zeros when there are no more.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Input(data)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn word<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let taken = self.bytes(N);
        out[..taken.len()].copy_from_slice(taken);
        out
    }

    pub fn u8(&mut self) -> u8 {
        self.word::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.word())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.word())
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.word())
    }
}

/// Guest memory: two regions side by side, a hole, one more.
pub const REGIONS: [(u64, usize); 3] = [(0, 0x8000), (0x8000, 0x2000), (0x10000, 0x2000)];
/// Where descriptors' buffers and tables usually are: from here on, 16 bits further.
pub const BUFFERS: u64 = 0x4000;

pub fn memory() -> Arc<GuestMem> {
    let regions = REGIONS.map(|(start, len)| (GuestAddress(start), len));
    Arc::new(GuestMem::from_ranges(&regions).unwrap())
}

/// An address of four bytes: mostly where memory is, sometimes anywhere.
pub fn address(input: &mut Input) -> u64 {
    let (how, low) = (input.u8(), u64::from(input.u16()));
    match how {
        0..=199 => (low + 0x4000 * u64::from(how & 1)) % 0x12400,
        200..=239 => BUFFERS + low % 0x3000,
        240..=251 => low << 48 | 0xfff0,
        _ => u64::MAX - low,
    }
}

/// A descriptor of twelve bytes.
pub fn descriptor(input: &mut Input) -> [u8; 16] {
    let addr = address(input);
    let len = match input.u8() {
        0..=239 => u32::from(input.u16()),
        _ => u32::MAX - u32::from(input.u16()),
    };
    let (flags, next) = (u16::from(input.u8() & 7), u16::from(input.u8()));
    let mut out = [0; 16];
    out[..8].copy_from_slice(&addr.to_le_bytes());
    out[8..12].copy_from_slice(&len.to_le_bytes());
    out[12..14].copy_from_slice(&flags.to_le_bytes());
    out[14..].copy_from_slice(&next.to_le_bytes());
    out
}

/// Writes as far as there is memory.
pub fn put(mem: &GuestMem, at: u64, bytes: &[u8]) {
    let _ = mem.write(bytes, GuestAddress(at));
}

pub fn event() -> OwnedFd {
    let fd = std::os::fd::IntoRawFd::into_raw_fd(EventFd::new(EFD_NONBLOCK).unwrap());
    // SAFETY: it was just given up by its only owner.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}

/// A ring of `size` entries whose parts lie one behind the other from 0 on.
pub fn start(mem: &Arc<GuestMem>, size: u16, features: u64) -> RingStart {
    let entries = u64::from(size);
    RingStart {
        index: 0,
        size,
        desc: GuestAddress(0),
        avail: GuestAddress(16 * entries),
        used: GuestAddress(used(size)),
        next_avail: 0,
        features,
        enabled: true,
        kick: event(),
        call: None,
        mem: Arc::clone(mem),
        inflight: None,
        log: None,
    }
}

pub fn used(size: u16) -> u64 {
    (18 * u64::from(size) + 6).next_multiple_of(4)
}

/// Every piece lies in one region of guest memory.
pub fn inside(mem: &GuestMem, pieces: &[IoVec]) {
    for piece in pieces {
        let from = piece.ptr as usize;
        let within = mem.iter().any(|region| {
            let start = region.as_ptr() as usize;
            start <= from && from + piece.len <= start + region.len() as usize
        });
        assert!(within && piece.len > 0, "{piece:?} is outside guest memory");
    }
}
