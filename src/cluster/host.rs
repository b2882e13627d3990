//! What a node's engine offers the control loop and the API. `node` implements it; everything blocks for a bounded
//! time and may be called from any thread.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::fault::Fault;
use super::metrics::Metrics;
use crate::registry::Revision;
use crate::replication::ids::{CopyId, Epoch, Instance, NodeName, Tag, VolumeId};
use crate::replication::record::Record;

/// Why the host did not do it. Each text is one sentence that names the thing and says what to do.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HostError {
    /// A virtual machine is connected to the volume, and force was not given.
    #[error("a virtual machine is connected to the volume")]
    Connected,
    /// It cannot work as asked until something else changes (another copy under that id, no copy here, …).
    #[error("{0}")]
    Refused(String),
    /// The disk has no room.
    #[error("{0}")]
    NoSpace(String),
    /// It may work a moment later (a peer does not answer, the old attachment still lives, …).
    #[error("{0}")]
    Busy(String),
    /// The operating system said no.
    #[error("{0}")]
    Io(String),
}

/// A copy on this node's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalCopy {
    /// Of which volume.
    pub volume: VolumeId,
    /// Its identity.
    pub copy: CopyId,
    /// The epoch in its superblock.
    pub epoch: Epoch,
    /// Its standing, in words a person reads (`in sync`, `inconsistent`, `unreadable: …`).
    pub standing: String,
    /// Bytes it takes on the disk.
    pub allocated: u64,
    /// Why it cannot be used, and what to do; `None` when it can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// What a new copy counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Birth {
    /// One of the copies that a volume begins with: all of them empty, and so in sync in the volume's first epoch.
    First {
        /// That epoch.
        epoch: Epoch,
        /// Its companion.
        tag: Tag,
    },
    /// Added to a volume that has data: of no epoch, and inconsistent until its first sync ended (S18).
    Blank,
}

/// A volume to serve.
#[derive(Clone, Debug)]
pub struct AttachRequest {
    /// Which.
    pub volume: VolumeId,
    /// `namespace/name`, for messages.
    pub name: String,
    /// Its record as last seen. May be out of date: the attachment changes it by compare-and-swap.
    pub record: Record,
    /// The revision of `record`.
    pub revision: Revision,
    /// What the virtual machine is offered; `None`: no machine is served, only the copies are looked after.
    pub front: Option<Front>,
    /// The machine may move between nodes: attached only while it runs its rings here (see [`Host::by_turns`]).
    pub by_turns: bool,
    /// Where each node of the cluster takes replication connections.
    pub peers: Vec<(NodeName, SocketAddr)>,
}

/// The side of an attachment that a virtual machine sees.
#[derive(Clone, Debug)]
pub struct Front {
    /// Where to listen. The directory exists.
    pub socket: PathBuf,
    /// Virtqueues to offer, at least 1.
    pub num_queues: u16,
    /// Offer the disk read-only.
    pub read_only: bool,
}

/// How far an attachment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// A machine may come here from another node, or may go: not attached while it does not run here.
    Waiting,
    /// Taking the volume over: promises, lock, record.
    Acquiring,
    /// Serving, while it decides the regions in which copies may differ (PROTOCOL 5.4).
    Recovering,
    /// Serving.
    Serving,
    /// The failure mode forbids serving: requests wait, or fail after the deadline (PROTOCOL 7).
    Suspended,
    /// Someone else took the volume over; this attachment completes nothing any more.
    Fenced,
}

/// One attached volume as it is now.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttachmentStatus {
    /// Which volume.
    pub volume: VolumeId,
    /// How far it is.
    pub phase: Phase,
    /// Why it is not (fully) serving, one sentence; empty when all is well.
    pub why: String,
    /// Where it listens; `None`: it serves no machine and only looks after the copies.
    pub socket: Option<PathBuf>,
    /// Whether a virtual machine is connected.
    pub connected: bool,
    /// The epoch it works under.
    pub epoch: Epoch,
    /// Its view of every copy, in the record's order.
    pub copies: Vec<CopyState>,
    /// Guest requests taken and not completed.
    pub inflight: u32,
    /// Whether a completed write may be in caches: what the guest negotiated.
    #[serde(default)]
    pub writeback: bool,
    /// The comparison of all copies under way, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubStatus>,
}

/// A volume that was served here when the process before ended, and of which the registry has not said yet whether it still is to be:
/// its machine finds a socket and is answered, and none of its requests is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Which volume.
    pub volume: VolumeId,
    /// `namespace/name`, as it was called.
    pub name: String,
    /// Where it is listened for its machine.
    pub socket: PathBuf,
    /// Whether a virtual machine is connected.
    pub connected: bool,
}

impl AttachmentStatus {
    /// Whether no machine is served, and only the copies are looked after.
    pub fn tends(&self) -> bool {
        self.socket.is_none()
    }
}

/// One copy as the attachment sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CopyState {
    /// Which.
    pub copy: CopyId,
    /// Where.
    pub node: NodeName,
    /// `master` or `replica`.
    pub role: String,
    /// `in_sync`, `syncing`, `missing`.
    pub state: String,
    /// What it lags behind or waits for, one sentence; empty when nothing.
    pub lag: String,
    /// Progress while it is being brought up to date.
    pub sync: Option<SyncProgress>,
}

/// How far a resync is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SyncProgress {
    /// Bytes still to compare or copy.
    pub remaining_bytes: u64,
    /// Bytes there were at its start.
    pub total_bytes: u64,
    /// Bytes a second, recently.
    pub bytes_per_second: u64,
    /// Seconds until it ends at that rate; `None`: nothing was measured yet.
    #[serde(default)]
    pub eta_seconds: Option<u64>,
}

impl SyncProgress {
    /// With the time that is left.
    pub fn new(remaining_bytes: u64, total_bytes: u64, bytes_per_second: u64) -> Self {
        let eta = (bytes_per_second > 0).then(|| remaining_bytes.div_ceil(bytes_per_second));
        Self {
            remaining_bytes,
            // While marks are read, more are found.
            total_bytes: total_bytes.max(remaining_bytes),
            bytes_per_second,
            eta_seconds: eta,
        }
    }
}

/// How far a scrub is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScrubState {
    /// Asked for, and not begun.
    Waiting,
    /// It goes on.
    Running,
    /// It has seen the whole volume.
    Done,
    /// It ended before that.
    BrokenOff,
}

/// A comparison of all in-sync copies of a volume (PROTOCOL 11.6).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStatus {
    /// Which: the later, the greater.
    pub id: u64,
    /// What differs is made equal to what the master holds.
    pub repair: bool,
    /// How far it is.
    pub state: ScrubState,
    /// Why it broke off, or has not begun; otherwise empty.
    pub why: String,
    /// Bytes of the volume that it is done with, from the beginning, holes counted.
    pub done_bytes: u64,
    /// Bytes of the volume.
    pub total_bytes: u64,
    /// Bytes of the volume in a second, recently.
    pub bytes_per_second: u64,
    /// Bytes that were read on every copy and compared: what is a hole on all of them is not.
    pub compared_bytes: u64,
    /// Bytes, in blocks of 4 KiB, in which copies differed.
    pub differing_bytes: u64,
    /// Bytes that a disk could not read, and the other copies agreed on.
    pub unreadable_bytes: u64,
    /// Bytes that no disk could read.
    pub lost_bytes: u64,
    /// Bytes of all these that are the same on every copy now.
    pub repaired_bytes: u64,
    /// Chunks that seemed to differ and, looked at again, did not.
    pub misread_chunks: u64,
    /// Where, in order; the first ones if there are very many.
    pub differences: Vec<Difference>,
    /// The nodes of copies that were not in sync all the time, and so were not, or not wholly, compared.
    pub left_out: Vec<NodeName>,
}

impl ScrubStatus {
    /// Of which nothing is known yet.
    pub fn waiting(id: u64, repair: bool, total_bytes: u64) -> Self {
        Self {
            id,
            repair,
            state: ScrubState::Waiting,
            why: String::new(),
            done_bytes: 0,
            total_bytes,
            bytes_per_second: 0,
            compared_bytes: 0,
            differing_bytes: 0,
            unreadable_bytes: 0,
            lost_bytes: 0,
            repaired_bytes: 0,
            misread_chunks: 0,
            differences: Vec::new(),
            left_out: Vec::new(),
        }
    }

    /// The same, over before its end.
    pub fn broken_off(mut self, why: impl Into<String>) -> Self {
        self.state = ScrubState::BrokenOff;
        self.why = why.into();
        self
    }

    /// Whether it goes on, or will begin.
    pub fn is_open(&self) -> bool {
        matches!(self.state, ScrubState::Waiting | ScrubState::Running)
    }

    /// Bytes that are not the same on every copy, or cannot be read everywhere, as far as it knows.
    pub fn left_bytes(&self) -> u64 {
        (self.differing_bytes + self.unreadable_bytes + self.lost_bytes)
            .saturating_sub(self.repaired_bytes)
    }
}

/// A place in which not all copies are well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// `differs`, `unreadable` (on some disks, and the others agree), `lost` (on all).
    pub kind: String,
    /// The nodes whose copies hold the same, the master's first.
    pub agree: Vec<Vec<NodeName>>,
    /// The nodes whose disks could not read it.
    pub unreadable: Vec<NodeName>,
    /// It is the same on every copy now.
    pub repaired: bool,
}

/// The data directory's file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Bytes in all.
    pub total: u64,
    /// Bytes free for us.
    pub free: u64,
}

/// How far the replacement of this node's program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UpgradeState {
    /// None was asked for since this program began, and none brought it about.
    None,
    /// It begins in a moment.
    Accepted,
    /// This program could not be replaced and serves on.
    Failed,
    /// This program has begun, and takes the machines over.
    TakingOver,
    /// This program has taken over.
    Done,
}

/// The program of a node, and its replacement by another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpgradeView {
    /// The node.
    pub node: NodeName,
    /// The run of its program.
    pub instance: Instance,
    /// The process, which stays.
    pub pid: u32,
    /// The version of the program that runs.
    pub version: String,
    /// The version that ran before, if it was replaced.
    pub from: Option<String>,
    /// The file that an upgrade runs.
    pub program: PathBuf,
    /// How far it is.
    pub state: UpgradeState,
    /// Why it failed; empty otherwise.
    pub why: String,
    /// Front-ends whose connections were taken over.
    pub taken_over: usize,
    /// Front-ends that had to connect again.
    pub lost: usize,
    /// From when their rings stood still until the last of them ran again, in milliseconds.
    pub standstill_ms: Option<u64>,
}

/// One node's engine.
pub trait Host: Send + Sync {
    /// Makes an empty copy. Repeating it with the same ids is `Ok`; another copy id for the volume is
    /// [`HostError::Refused`].
    fn create_copy(
        &self,
        volume: VolumeId,
        copy: CopyId,
        size: u64,
        birth: Birth,
    ) -> Result<(), HostError>;

    /// Whether there are files of a copy of the volume, usable or not. When in doubt there are.
    fn has_files(&self, volume: VolumeId) -> bool;

    /// Takes the volume's copy out of use and keeps its files under another name, which is returned. For a copy that
    /// nobody knows any more and that stands in the way of a new one.
    fn set_aside(&self, volume: VolumeId) -> Result<String, HostError>;

    /// Destroys the volume's copy and its data. `Ok` when there is none.
    fn remove_copy(&self, volume: VolumeId) -> Result<(), HostError>;

    /// Every copy on the disk, readable or not.
    fn local_copies(&self) -> Vec<LocalCopy>;

    /// The identities of these copies, zero for one that cannot be read. Takes no look at their files, and so may be asked
    /// often.
    fn copies_here(&self) -> BTreeMap<VolumeId, CopyId> {
        let all = self.local_copies().into_iter();
        all.map(|c| (c.volume, c.copy)).collect()
    }

    /// Starts to serve, or goes on with a machine that is [held](Host::held). On return the listening socket, if there is to be one, exists; the rest shows in
    /// [`Host::attachments`].
    fn attach(&self, request: AttachRequest) -> Result<(), HostError>;

    /// Stops serving: flushed, released and the record clean on return. [`HostError::Connected`] while a virtual
    /// machine is connected and `force` is false. `Ok` when it is not attached.
    fn detach(&self, volume: VolumeId, force: bool) -> Result<(), HostError>;

    /// The volume's machine may move to or from another node while it runs (`on`), or does not any more: with `on` the
    /// volume is attached only while the machine runs its rings here.
    fn by_turns(&self, volume: VolumeId, on: bool);

    /// What the machine negotiated about its write cache on the node that it came from.
    fn set_write_cache(&self, volume: VolumeId, writeback: bool);

    /// Compares all in-sync copies of a volume that is attached here, and with `repair` makes what differs what the master
    /// holds; how far it is shows in [`Host::attachments`]. Asking again under the same id is `Ok`.
    fn scrub(&self, volume: VolumeId, id: u64, repair: bool) -> Result<(), HostError>;

    /// Ends the scrub of this id, if it goes on.
    fn stop_scrub(&self, volume: VolumeId, id: u64);

    /// The record of an attached volume is now this.
    fn record_changed(&self, volume: VolumeId, record: &Record, revision: Revision);

    /// The nodes of the cluster (this one included) and where they take replication connections.
    fn peers_changed(&self, peers: &[(NodeName, SocketAddr)]);

    /// Every attached volume.
    fn attachments(&self) -> Vec<AttachmentStatus>;

    /// Every volume that is held for its machine without being attached. [`Host::attach`] goes on with its connection,
    /// [`Host::detach`] ends it.
    fn held(&self) -> Vec<Held> {
        Vec::new()
    }

    /// The data directory's file system.
    fn capacity(&self) -> Capacity;

    /// What `/metrics` shows of the engine.
    fn metrics(&self) -> Metrics;

    /// Has the process run the program that is at its path now, in a moment: everything is checked that can be, and nothing
    /// has been stopped on return.
    fn upgrade(&self) -> Result<UpgradeView, Fault> {
        self.upgrade_state()
    }

    /// How far that is.
    fn upgrade_state(&self) -> Result<UpgradeView, Fault> {
        Err(Fault::state(
            "this node is not a process of its own, whose program could be replaced",
        ))
    }
}
