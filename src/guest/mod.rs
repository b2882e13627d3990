//! What the virtual machine sees: the vhost-user session, the vrings and the virtio-blk requests in them.
//!
//! Two sides meet here, on two threads, and they share nothing but messages through [`DataPlane`]:
//!
//! * The **control side** is one thread per attached volume ([`Server`]). It owns the socket, accepts one front-end
//!   after another (QEMU reconnects, a second VM takes over), and turns vhost-user messages into calls on a
//!   [`DataPlane`]. It never touches a ring.
//! * The **data side** is the engine's worker thread. It receives a [`RingStart`], makes a [`Ring`] of it and is from
//!   then on the only one who reads or writes that ring, until the control side asks for it back.
//!
//! The way of one request, in the order of the files:
//!
//! | file | what it is about |
//! | --- | --- |
//! | `server` | listener and control thread of one volume; who is connected, why a connection ended |
//! | `socket` | claiming the path of the socket: stale files, live owners, permissions |
//! | `session` | one connection: the vhost-user messages, and the state of its rings as the front-end described it |
//! | `config` | the device itself: features offered, configuration space, write-cache switch |
//! | `capacity` | the size the guest is shown, and telling it of a larger one |
//! | `handover` | a connection given to the program that takes this one's place |
//! | `state` | what is saved of the device with a virtual machine: nothing |
//! | `table` | the front-end's memory table: regions mapped, its addresses translated |
//! | `plane` | the contract between the two sides |
//! | `fault` | guest memory that goes away under us |
//! | `blocking` | descriptors that block although they should not |
//! | `memory` | guest memory as host pointers, looked up fast and never beyond a region |
//! | `ring` | the checked split-ring reader and writer |
//! | `inflight` | which requests are in flight, in memory that survives this process |
//! | `dirty` | which pages were written, for a live migration |
//! | `chain` | one descriptor chain, walked with every bound checked |
//! | `request` | one virtio-blk request: parsed, refused, or completed exactly once |
//! | `iovec` | pieces of guest memory, and copying to and from them |
//!
//! Everything that a guest or a front-end says is input: it is checked here once, and what leaves this room points
//! only into guest memory and only at sectors of the volume.

mod blocking;
mod capacity;
mod chain;
mod config;
mod dirty;
mod fault;
mod handover;
mod inflight;
mod iovec;
mod memory;
mod plane;
mod request;
mod ring;
mod server;
mod session;
mod socket;
mod state;
mod table;

pub use capacity::Capacity;
pub use chain::{Chain, ChainFault, MAX_DATA_SEGMENTS, Used};
pub use config::{BlockSize, ConfigError, DeviceConfig, Serial};
pub use dirty::{DirtyLog, LogError, RingLog};
pub use handover::{Handed, Message, Packed, Receipt, Tally};
pub use inflight::{InflightError, InflightQueue, Region as InflightRegion};
pub use iovec::{IoVec, copy_from_guest, copy_to_guest, total_len};
pub use plane::{DataPlane, ParkedRing, RingStart};
pub use request::{
    Kind, Limits, MAX_ZERO_SECTORS, MAX_ZERO_SEGMENTS, Parsed, Refusal, Refused, Request,
    SECTOR_SIZE, Segment, Status,
};
pub use ring::{MAX_RING_SIZE, Ring, RingError};
pub use server::{Bound, Moves, Parking, Server, Stand, Who};
pub use socket::ServeError;

/// Guest memory as the front-end shared it. Its own dirty bitmap is not in use: see `dirty`.
pub type GuestMem = vm_memory::GuestMemoryMmap<()>;
