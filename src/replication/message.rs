//! What an attachment and a copy say to each other (PROTOCOL 8), as meaning; `wire` gives it bytes.
//!
//! A session is one connection between one attachment and one copy, in order and reliable until it breaks. The bytes
//! of a write or of a read's answer travel beside the message, as the frame's payload.

use super::ids::{BootId, Chunk, CopyId, Epoch, Instance, Nanos, NodeName, Region, Seq, Span, Tag};

/// One message. `→` goes from the attachment to the copy, `←` back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// → Accept nothing of an epoch below `epoch` from now on (PROTOCOL 5.1, 5.2).
    Promise(Promise),
    /// ← The promise is durable; what my disk says.
    PromiseAck(DiskState),
    /// → I am the attachment of this configuration: persist it, then take my requests. First on a session.
    Attach(Configuration),
    /// ← Persisted.
    AttachAck {
        /// Which.
        epoch: Epoch,
    },
    /// → The configuration changed under this session; before any request of the new epoch.
    EpochChange(Configuration),
    /// ← Persisted.
    EpochAck {
        /// Which.
        epoch: Epoch,
    },
    /// → Apply the payload at `span`.
    Write(Request),
    /// → Make `span` read as zeros; `unmap` allows giving the space back. Over a bulk connection: a chunk of a sync, as
    /// [`Message::SyncData`].
    WriteZeroes {
        /// What and where.
        request: Request,
        /// The space may be given back.
        unmap: bool,
    },
    /// → Make `span` read as zeros and give the space back.
    Discard(Request),
    /// → Everything acknowledged so far must be on stable storage. Answered in [`Message::AckVec`].
    Flush {
        /// The sender's epoch.
        epoch: Epoch,
        /// Names the flush.
        seq: Seq,
    },
    /// ← Answers to writes, zeroes, discards and flushes of one loop turn.
    AckVec {
        /// The copy's epoch.
        epoch: Epoch,
        /// One answer each.
        acks: Vec<(Seq, Status)>,
        /// The activity log is nearly full: flush all copies, so that regions can retire.
        log_pressure: bool,
    },
    /// → Read `request.span`. Answered by [`Message::ReadReply`].
    Read(Request),
    /// ← The payload is the data when `status` is `Ok`.
    ReadReply {
        /// Which read.
        seq: Seq,
        /// How it went.
        status: Status,
    },
    /// → I am here. The answer renews the read lease counted from `sent` (PROTOCOL 4).
    Heartbeat {
        /// The sender's epoch.
        epoch: Epoch,
        /// The sender's clock when it was sent; opaque to the copy.
        sent: Nanos,
        /// Every write up to here is durable on all in-sync copies: their regions may retire.
        stable: Seq,
    },
    /// ← As heard.
    HeartbeatAck {
        /// The copy's epoch.
        epoch: Epoch,
        /// Echoed.
        sent: Nanos,
    },
    /// → Flushed everywhere, I leave: empty the log, mark the copy clean, durably (PROTOCOL 5, clean detach).
    Detach {
        /// The sender's epoch.
        epoch: Epoch,
    },
    /// ← Done.
    DetachAck {
        /// Which.
        epoch: Epoch,
    },
    /// → You are not in the in-sync set, and I bring you up to date: refuse everything of an older epoch, mark yourself
    /// inconsistent, durably, and tell me what you hold (PROTOCOL 6). First on a session, in place of `Attach`.
    SyncBegin(Configuration),
    /// ← Durable. What the disk said before; `ticket` admits the bulk connection of this session.
    SyncReady {
        /// As in a promise.
        disk: DiskState,
        /// To be named by [`Message::SyncBulk`].
        ticket: u64,
    },
    /// → First on a bulk connection.
    SyncBulk {
        /// The sender's epoch.
        epoch: Epoch,
        /// Of the session it belongs to: a connection of an earlier one must not bring old chunks.
        ticket: u64,
    },
    /// → Which of the `count` chunks from `first` on are marked for `copy`, and which hold data?
    MapRead {
        /// The sender's epoch.
        epoch: Epoch,
        /// Names the request in the answer.
        seq: Seq,
        /// Whose bitmap; a copy has none of itself.
        copy: CopyId,
        /// Where.
        first: Chunk,
        /// How many, at most [`MAP_CHUNKS`].
        count: u32,
    },
    /// ← 64 chunks a word, the first one lowest.
    MapReply {
        /// Which request.
        seq: Seq,
        /// How it went; the words are empty unless it is `Ok`.
        status: Status,
        /// Marked; none for a copy that has no bitmap for the one asked about.
        dirty: Vec<u64>,
        /// Not certainly zero: everything but the holes of the file.
        allocated: Vec<u64>,
    },
    /// → Mark these regions (`None`: all) in the bitmap of `copy`, durably. Answered in [`Message::AckVec`].
    Mark {
        /// The sender's epoch.
        epoch: Epoch,
        /// Names the request in the answer.
        seq: Seq,
        /// Whose bitmap.
        copy: CopyId,
        /// What.
        regions: Option<Vec<Region>>,
    },
    /// → These runs of chunks (first, how many) of `copy` are as the master's, flushed (S12): clear their bits. Not answered.
    Clear {
        /// The sender's epoch.
        epoch: Epoch,
        /// Whose bitmap.
        copy: CopyId,
        /// What, at most [`RUNS_MAX`] runs.
        runs: Vec<(Chunk, u32)>,
    },
    /// → The hash of `request.span`, please.
    SyncHash(Request),
    /// ← See [`Message::SyncHash`].
    SyncHashReply {
        /// Which request.
        seq: Seq,
        /// How it went.
        status: Status,
        /// XXH3, 128 bits; zero unless `Ok`.
        hash: u128,
    },
    /// → Apply the payload at `span`, of a chunk that is marked for this copy everywhere: needs no place in the log.
    SyncData(Request),
    /// → You have everything, flushed: mark yourself in sync in the session's configuration, durably.
    SyncDone {
        /// The sender's epoch.
        epoch: Epoch,
    },
    /// ← Durable.
    SyncDoneAck {
        /// Which.
        epoch: Epoch,
    },
    /// → Make room for a volume of `size` bytes, durably. Requests go on meanwhile, and none goes beyond the size of the
    /// configuration. Answered in [`Message::AckVec`]: `NoSpace` says that nothing changed.
    Grow {
        /// The sender's epoch.
        epoch: Epoch,
        /// Names the request in the answer.
        seq: Seq,
        /// In bytes; room that is there already is answered at once.
        size: u64,
    },
    /// ← I cannot take this session's messages; the connection ends after it.
    Nack(Refusal),
}

/// Chunks that one [`Message::MapRead`] asks about at most: 2 GiB of a volume, 4 KiB of words each way.
pub const MAP_CHUNKS: u32 = 1 << 15;
/// Runs of one [`Message::Clear`].
pub const RUNS_MAX: usize = 1024;

/// A candidate's request for a promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promise {
    /// The epoch to be promised.
    pub epoch: Epoch,
    /// Who asks.
    pub candidate: NodeName,
    /// The candidate process.
    pub instance: Instance,
    /// Why the copy need not wait for the grace.
    pub proof: Proof,
    /// Pre-vote: answer, but persist and promise nothing.
    pub probe: bool,
}

/// What shows that the former attachment cannot write any more (PROTOCOL 4, 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// Nothing does: the copy waits until `grace` has passed since it last heard the former attachment.
    None,
    /// The record of this epoch names no attachment: it released the volume itself.
    Released(Epoch),
    /// Same node, and the lock that the former process held until its last disk request ended is mine.
    PredecessorDead,
}

/// What a copy's disk says, in a promise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskState {
    /// The epoch promised.
    pub promised: Epoch,
    /// Answer to a probe.
    pub probe: bool,
    /// The last configuration persisted.
    pub epoch: Epoch,
    /// Its tag.
    pub tag: Tag,
    /// The kernel boot the copy runs under now.
    pub boot_id: BootId,
    /// Whether the copy was left by a clean detach.
    pub clean: bool,
    /// The active regions of its log: only there may it differ from another in-sync copy. `None`: the log cannot be read, it may
    /// anywhere.
    pub regions: Option<Vec<Region>>,
}

/// What a copy needs to know of the record in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// The epoch in force.
    pub epoch: Epoch,
    /// Its tag.
    pub tag: Tag,
    /// The volume's size in bytes.
    pub size: u64,
    /// Keep the activity log.
    pub logged: bool,
    /// The copies that are not in sync: a dirty bitmap is kept for each.
    pub absent: Vec<Absent>,
}

/// A copy that is not in the in-sync set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Absent {
    /// Which.
    pub copy_id: CopyId,
    /// The last epoch in which it was in sync; 0 for a new one.
    pub last: Epoch,
    /// Is being synced and gets every write; so writes mark nothing for it.
    pub mirrored: bool,
}

/// One request on a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The sender's epoch; a copy refuses any but its own (S7).
    pub epoch: Epoch,
    /// Names the request in the answer.
    pub seq: Seq,
    /// Where.
    pub span: Span,
    /// Durable before it is acknowledged (write-through).
    pub fua: bool,
}

/// How a request went on one copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Applied; for a flush, durable.
    Ok,
    /// The disk answered an error.
    Io,
    /// The disk is full.
    NoSpace,
    /// The copy has promised, or is in, another epoch.
    Stale,
}

/// Why a copy takes nothing from this session.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another attachment is alive.
    #[error("attached on {node}, alive (heard {heard_ms} ms ago)")]
    Attached {
        /// Whose.
        node: NodeName,
        /// When it was last heard.
        heard_ms: u64,
    },
    /// A higher epoch was promised.
    #[error("the copy has promised epoch {promised}")]
    Stale {
        /// Which.
        promised: Epoch,
    },
    /// No such copy on this node: a blank or wiped disk.
    #[error("no copy of that identity here (was the disk replaced or wiped?)")]
    UnknownCopy,
    /// The copy is being synced, or its sync broke off.
    #[error("the copy is inconsistent until a sync completes")]
    Inconsistent,
    /// It has been away while the volume grew, and has no room to follow.
    #[error("its disk has no room for the volume's size: make space there")]
    NoRoom,
    /// As many other copies on its node are brought up to date as there may be at once: try again later.
    #[error(
        "it waits for its turn: as many other copies on its node are brought up to date as may be at once"
    )]
    Busy,
    /// Its disk failed a write or a flush.
    #[error("the copy's disk has failed; it serves no more")]
    Failed,
    /// The message does not fit the session's state.
    #[error("unexpected message: {0}")]
    Protocol(String),
}
