//! What the rest of the node asks of a worker, and how it reaches it.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

use super::conn::Moved;
use crate::cluster::metrics::{Histogram, VolumeMetrics};
use crate::copy::{GrowthError, Metadata, Store};
use crate::guest::{BlockSize, GuestMem, ParkedRing, RingLog, RingStart};
use crate::replication::attachment::{CasOutcome, CopyView, Phase, Revision};
use crate::replication::copy_state::{BITMAPS_MAX, CopyState};
use crate::replication::dirty_map::DirtyMap;
use crate::replication::ids::{CopyId, Epoch, Nanos, NodeName, Region, VolumeId};
use crate::replication::message::Proof;
use crate::replication::record::{self, Record};
use crate::replication::replica::Ticket;
use crate::replication::scrub::View as ScrubView;
use crate::wire::hello::Hello;

/// A copy as read from disk, ready to be served.
pub struct OpenCopy {
    /// Its files.
    pub store: Store,
    /// Its metadata in memory.
    pub metadata: Metadata,
    /// Its superblock.
    pub state: CopyState,
    /// Its activity log; `None`: it cannot be read.
    pub regions: Option<Vec<Region>>,
    /// Its bitmaps.
    pub maps: [Option<DirtyMap>; BITMAPS_MAX],
}

/// Told the size of a volume that has become larger than what its guest was shown. Blocks nobody.
pub type Grown = Box<dyn Fn(u64) + Send>;

/// A volume whose machine may be waiting for this process, while nobody knows yet whether it is to be served from here.
pub struct HoldVolume {
    /// Which.
    pub volume: VolumeId,
    /// `namespace/name`.
    pub name: String,
    /// What its guest was shown.
    pub size: u64,
    /// See `size`.
    pub block_size: BlockSize,
    /// See `size`.
    pub read_only: bool,
}

/// A volume to be served from here.
pub struct AttachVolume {
    /// Which.
    pub volume: VolumeId,
    /// `namespace/name`.
    pub name: String,
    /// The record and its revision.
    pub record: Record,
    /// See `record`.
    pub revision: Revision,
    /// Who we are in the record.
    pub me: record::Attachment,
    /// Why copies need not wait for the former attachment.
    pub proof: Proof,
    /// Writes are refused.
    pub read_only: bool,
    /// The machine may move between nodes: attached only while it runs its rings here.
    pub by_turns: bool,
    /// Who is told when the volume has grown, if there is to be a guest.
    pub grown: Option<Grown>,
}

/// What a vhost-user control thread asks for; each is answered before the front-end is.
pub enum GuestCommand {
    /// See [`crate::guest::DataPlane`].
    Start(RingStart),
    /// See [`crate::guest::DataPlane`].
    Kick(u16, OwnedFd),
    /// See [`crate::guest::DataPlane`].
    Call(u16, Option<OwnedFd>),
    /// See [`crate::guest::DataPlane`].
    Stop(u16),
    /// See [`crate::guest::DataPlane`].
    Enabled(u16, bool),
    /// See [`crate::guest::DataPlane`].
    Memory(Arc<GuestMem>),
    /// See [`crate::guest::DataPlane`].
    Log(u16, Option<RingLog>),
    /// Writes complete when they are durable, unless `writeback`.
    Features {
        /// The guest can flush and left the write cache on.
        writeback: bool,
    },
    /// The connection is gone.
    Disconnected,
}

/// Answer to a [`GuestCommand`].
pub type GuestAnswer = Result<u16, String>;

/// Answer to [`Command::Park`].
pub type ParkAnswer = Result<Vec<ParkedRing>, String>;

/// One attached volume, for people.
#[derive(Clone, Debug)]
pub struct VolumeStatus {
    /// Which.
    pub volume: VolumeId,
    /// How far it is; `None`: not attached, it waits for the machine to run its rings here.
    pub phase: Option<Phase>,
    /// Why no request completes now.
    pub why: Option<String>,
    /// The record's epoch.
    pub epoch: Epoch,
    /// The record, as the attachment holds it.
    pub record: Record,
    /// The copies.
    pub copies: Vec<CopyView>,
    /// Guest requests under way.
    pub in_flight: usize,
    /// Chunks in which copies may differ since the last takeover.
    pub undecided: u64,
    /// Whether a completed write may be in caches: what the guest negotiated.
    pub writeback: bool,
    /// The scrub under way, or the last one.
    pub scrub: Option<ScrubView>,
}

/// One local copy, for people.
#[derive(Clone, Debug)]
pub struct CopyStatus {
    /// Of which volume.
    pub volume: VolumeId,
    /// What its superblock says.
    pub state: CopyState,
    /// Bytes it takes on disk.
    pub allocated: u64,
    /// Regions in its activity log.
    pub active_regions: usize,
    /// Its data file was cut short while it was open here.
    pub cut: bool,
}

/// A worker's counters.
#[derive(Clone, Debug, Default)]
pub struct WorkerMetrics {
    /// Attached volumes.
    pub volumes: Vec<VolumeMetrics>,
    /// Payload bytes before and after compression.
    pub wire_raw: u64,
    /// See `wire_raw`.
    pub wire_sent: u64,
    /// Masters switched under a running attachment.
    pub promotions: u64,
    /// Copies ejected, by reason.
    pub ejections: Vec<(String, u64)>,
    /// From the loss of a copy or an attachment until the volume served again.
    pub failover: Histogram,
    /// Copies that were begun to be brought up to date, and those that are now.
    pub syncs_started: u64,
    /// See `syncs_started`.
    pub syncs_completed: u64,
}

/// A change of state, as it is reported to the node.
#[derive(Clone, Debug)]
pub struct Event {
    /// Of which volume.
    pub volume: VolumeId,
    /// The rule of the protocol that caused it.
    pub rule: &'static str,
    /// The epoch in which.
    pub epoch: Epoch,
    /// One sentence.
    pub text: String,
}

/// One request to a worker.
pub enum Command {
    /// The mailboxes of all workers.
    Siblings(Vec<Mailbox>),
    /// Take connections of peers here.
    Listen(TcpListener),
    /// Serve this copy.
    Open(Box<OpenCopy>, SyncSender<()>),
    /// Give the copy up; its files are closed when this is answered. An error says why not.
    Close(VolumeId, SyncSender<Result<(), String>>),
    /// Take the rings of this volume's machine, and none of their requests, until it is attached or detached.
    Hold(Box<HoldVolume>, SyncSender<Result<(), String>>),
    /// Attach; a volume that is held goes on with the rings it has.
    Attach(Box<AttachVolume>, SyncSender<Result<(), String>>),
    /// Finish what is under way, then detach cleanly; answered when that ended, with the reason if not cleanly.
    Detach(VolumeId, SyncSender<Result<(), String>>),
    /// The machine may move to another node, or not any more (see [`AttachVolume::by_turns`]).
    ByTurns(VolumeId, bool),
    /// Compare all in-sync copies of an attached volume, under this id, and repair if so; an error says why not.
    Scrub(VolumeId, u64, bool, SyncSender<Result<(), String>>),
    /// End the scrub of this id.
    StopScrub(VolumeId, u64),
    /// From a vhost-user control thread.
    Guest(VolumeId, GuestCommand, SyncSender<GuestAnswer>),
    /// The guest's rings stand still; answered when nothing of them is in flight, or this time is over. See
    /// [`crate::guest::DataPlane::park`].
    Park(VolumeId, Nanos, SyncSender<ParkAnswer>),
    /// They go on.
    Unpark(VolumeId),
    /// How long the disk has been at its oldest request.
    DiskAge(SyncSender<Nanos>),
    /// The record of an attached volume, as read or watched (`None`: removed).
    Record(VolumeId, Option<(Record, Revision)>),
    /// It could not be read.
    RecordUnavailable(VolumeId),
    /// The read that was asked for has ended.
    RecordWasRead(VolumeId),
    /// The answer to a compare-and-swap.
    Cas(VolumeId, CasOutcome),
    /// The copy's files were made longer, or could not be.
    Grown(VolumeId, Ticket, Result<(), GrowthError>),
    /// Where nodes are reached.
    Peers(Vec<(NodeName, SocketAddr)>),
    /// A connection that greeted and belongs to this worker; with what came behind the greeting.
    Adopt(Box<Moved>, Box<Hello>),
    /// Report the attached volumes.
    Attached(SyncSender<Vec<VolumeStatus>>),
    /// Report the copies, with a look at the files of each.
    Copies(SyncSender<Vec<CopyStatus>>),
    /// Report the identities of the copies: of this volume, or of all.
    CopyIds(Option<VolumeId>, SyncSender<Vec<(VolumeId, CopyId)>>),
    /// Report the counters.
    Metrics(SyncSender<WorkerMetrics>),
    /// End.
    Stop,
}

/// What a worker asks of the registry, and does not wait for.
pub enum RegistryRequest {
    /// Compare and swap.
    Cas(VolumeId, Revision, Box<Record>),
    /// Read.
    Read(VolumeId),
}

/// The records, as the engine needs them: blocking, on a thread of their own.
pub trait Records: Send {
    /// Swaps the record if it is at `expected`.
    fn cas(&self, volume: VolumeId, expected: Revision, record: &Record) -> CasOutcome;

    /// Reads it. `Err` when the registry does not answer.
    fn read(&self, volume: VolumeId) -> Result<Option<(Record, Revision)>, String>;
}

/// Reaches one worker: a queue, and something that wakes it.
#[derive(Clone)]
pub struct Mailbox {
    sender: Sender<Command>,
    waker: Arc<mio::Waker>,
}

impl Mailbox {
    /// A queue that `waker` announces.
    pub fn new(waker: mio::Waker) -> (Self, Receiver<Command>) {
        let (sender, receiver) = channel();
        (
            Self {
                sender,
                waker: Arc::new(waker),
            },
            receiver,
        )
    }

    /// Sends; `false` when the worker has ended.
    pub fn send(&self, command: Command) -> bool {
        self.sender.send(command).is_ok() && self.waker.wake().is_ok()
    }

    /// Sends a command with a place for its answer, and waits at most `patience` for that.
    pub fn ask<T>(
        &self,
        patience: Nanos,
        command: impl FnOnce(SyncSender<T>) -> Command,
    ) -> Option<T> {
        let (reply, answer) = std::sync::mpsc::sync_channel(1);
        if !self.send(command(reply)) {
            return None;
        }
        answer
            .recv_timeout(std::time::Duration::from_nanos(patience.0))
            .ok()
    }
}
