//! One copy, as the protocol sees it: what it accepts, what it makes durable before what, and what it answers.
//!
//! Sans-IO. Events in: [`Replica::on_message`], [`Replica::on_disk`], [`Replica::on_close`], [`Replica::on_tick`];
//! after each batch call [`Replica::end_turn`] (it starts the batch's one log transaction), then carry out every
//! [`Action`] of [`Replica::poll`], in order. `D` is whatever the engine calls the bytes of a request.

mod bitmaps;
mod growing;
mod messages;
mod results;
mod serial;
mod target;

use std::collections::{BTreeSet, VecDeque};

use super::activity_log::{ActivityLog, Touch, Transaction};
use super::copy_state::{BITMAPS_MAX, Bitmap, CopyState, Standing};
use super::dirty_map::DirtyMap;
use super::ids::{
    BootId, Chunk, CopyId, Epoch, Instance, Nanos, NodeName, Region, SECTOR, Seq, Span, Tag,
};
use super::in_flight::InFlight;
use super::message::{Configuration, DiskState, Message, Promise, Refusal, Request, Status};
use super::timing::Timing;

/// One connection, numbered by the engine; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId(pub u64);

/// Requests one copy has under way at most (S19): more than all queues of a volume hold, with internal ones besides.
pub const REQUESTS_MAX: usize = 32 << 10;

/// One disk operation, to be named in [`Replica::on_disk`].
pub type Ticket = Seq;

/// What the engine is to do for a copy.
#[derive(Debug)]
pub enum Action<D> {
    /// Send to the other end of the session; `data` is the payload.
    Reply {
        /// Whose connection.
        session: SessionId,
        /// What to say.
        message: Message,
        /// The bytes read.
        data: Option<D>,
    },
    /// One answer for the session's next [`Message::AckVec`].
    Ack {
        /// Whose connection.
        session: SessionId,
        /// Which request.
        seq: Seq,
        /// How it went.
        status: Status,
    },
    /// Do this and report it under the ticket.
    Disk(Ticket, DiskOp<D>),
    /// Send what is queued, then close.
    Close(SessionId),
    /// A change of state, for log and events.
    Event {
        /// The rule that caused it.
        rule: &'static str,
        /// One sentence.
        text: String,
    },
}

/// What a copy asks of its disk.
#[derive(Debug)]
pub enum DiskOp<D> {
    /// Write `data` at `span`; with `dsync`, durably.
    Write {
        /// Where.
        span: Span,
        /// What.
        data: D,
        /// Durable before it is reported.
        dsync: bool,
    },
    /// Make `span` read as zeros.
    Zero {
        /// Where.
        span: Span,
        /// Give the space back.
        unmap: bool,
        /// Durable before it is reported.
        dsync: bool,
    },
    /// Read `span`, into `into` if given.
    Read {
        /// Where.
        span: Span,
        /// The reader's own memory.
        into: Option<D>,
    },
    /// The XXH3 hash (128 bits) of `span`; reported as [`DiskResult::Hash`].
    Hash {
        /// Where.
        span: Span,
    },
    /// Which of the chunks may hold data (are no holes of the file); reported as [`DiskResult::Allocated`].
    Allocated {
        /// The first.
        first: Chunk,
        /// How many.
        count: u32,
    },
    /// Make all data reported as written durable.
    Sync,
    /// Make room for a volume of this size in all files, durably. `NoSpace` says that nothing is lost, for whatever reason the
    /// files cannot be longer.
    Grow {
        /// Bytes.
        size: u64,
    },
    /// Write the superblock, durably.
    Superblock(Box<CopyState>),
    /// Write this log transaction, durably.
    Log(Transaction),
    /// Write the bits of these regions of every bitmap in use, durably.
    Bitmaps(Vec<Region>),
}

/// How a disk operation ended.
#[derive(Debug)]
pub enum DiskResult<D> {
    /// Done; a read brings its bytes.
    Done(Option<D>),
    /// Of [`DiskOp::Hash`].
    Hash(u128),
    /// Of [`DiskOp::Allocated`]: 64 chunks a word, the first lowest.
    Allocated(Vec<u64>),
    /// The disk is full.
    NoSpace,
    /// Any other error.
    Error,
}

#[derive(Debug)]
enum Op {
    Data {
        session: SessionId,
        request: Request,
        logged: bool,
    },
    Read {
        session: SessionId,
        seq: Seq,
    },
    Hash {
        session: SessionId,
        seq: Seq,
    },
    /// With the bits asked for.
    Map {
        session: SessionId,
        seq: Seq,
        dirty: Vec<u64>,
    },
    Sync,
    /// With the marks to be answered when they are durable.
    Bitmaps(Vec<(SessionId, Seq)>),
    BitmapsThenLog(Transaction),
    Log(Transaction),
    /// To this size.
    Grow(u64),
    /// With the standing it carries.
    Superblock(Standing),
}

#[derive(Debug)]
enum Change<D> {
    Write(D),
    Zero { unmap: bool },
}

/// A write that waits for its region to become active.
#[derive(Debug)]
struct Queued<D> {
    session: SessionId,
    request: Request,
    change: Change<D>,
    touched: bool,
}

/// What is done one at a time, everything else of the session waiting behind it.
#[derive(Debug)]
enum Serial {
    Promise {
        session: SessionId,
        promise: Promise,
    },
    Configure {
        session: SessionId,
        config: Configuration,
        attach: bool,
    },
    Detach {
        session: SessionId,
        epoch: Epoch,
    },
    /// The copy is to be brought up to date; with what its disk said before, once that is known.
    BeginSync {
        session: SessionId,
        config: Configuration,
        before: Option<DiskState>,
    },
    /// It has been: first the bitmaps, then the superblock.
    EndSync {
        session: SessionId,
        marked: bool,
    },
    /// There is more room; the superblock says so.
    Grown,
    Failing,
}

/// As what the copy takes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// As a member of the in-sync set, in the epoch of its superblock.
    Member,
    /// As the target of a sync, in this epoch. The superblock's epoch stays: it says from when the data are, until the
    /// sync ends (PROTOCOL 6).
    Target { epoch: Epoch, tag: Tag },
}

/// Who served the volume when this process last knew.
#[derive(Clone, Debug)]
struct Holder {
    node: NodeName,
    instance: Instance,
}

/// The state machine of one copy.
#[derive(Debug)]
pub struct Replica<D> {
    state: CopyState,
    boot_id: BootId,
    timing: Timing,
    now: Nanos,
    log: ActivityLog,
    logged: bool,
    maps: [Option<DirtyMap>; BITMAPS_MAX],
    /// The slots' copies that get every write: writes mark nothing for them.
    mirrored: [bool; BITMAPS_MAX],
    role: Role,
    /// The session whose requests are taken.
    bound: Option<SessionId>,
    /// Its second connection, for bulk.
    bulk: Option<SessionId>,
    /// Who was promised last, or is attached.
    holder: Option<Holder>,
    /// The session that holds the newest promise and has not attached yet.
    promised_to: Option<(SessionId, Holder)>,
    /// The epoch of the newest promise, until somebody attaches.
    unclaimed: Option<Epoch>,
    heard: Nanos,
    released: bool,
    queue: VecDeque<Queued<D>>,
    inbox: VecDeque<(SessionId, Message, Option<D>)>,
    serial: Option<Serial>,
    ops: InFlight<Op>,
    data_in_flight: usize,
    flushing: Option<Vec<(SessionId, Seq)>>,
    flush_next: Vec<(SessionId, Seq)>,
    /// Regions whose bits were marked, and who waits for that to be durable.
    marks: Vec<(SessionId, Seq, Vec<Region>)>,
    /// Regions with bits that were cleared in memory only.
    cleared: BTreeSet<Region>,
    /// Bitmap pages are being written outside of a log transaction.
    bitmaps_running: bool,
    look_for_idle: bool,
    /// Bytes of the volume, by the configuration in force: requests end there, whatever there is room for.
    size: u64,
    /// The size that the disk's superblock states.
    recorded: u64,
    /// Who waits for room.
    growing: Vec<growing::Asked>,
    /// Sessions to be refused for the failed disk once it works on nothing any more.
    ending: Vec<SessionId>,
    actions: VecDeque<Action<D>>,
}

impl<D> Replica<D> {
    /// A copy as its disk had it. `regions` are those of its log, `None` when that cannot be read; `maps` the bitmaps of the slots
    /// in use.
    pub fn new(
        state: CopyState,
        regions: Option<&[Region]>,
        maps: [Option<DirtyMap>; BITMAPS_MAX],
        boot_id: BootId,
        timing: Timing,
        now: Nanos,
    ) -> Self {
        let log = ActivityLog::new(state.size, regions, timing.idle, now);
        let mut maps = maps;
        // Bits of active regions may have been in memory only when the process ended.
        for map in maps.iter_mut().flatten() {
            map.set_regions(regions, state.size);
        }
        Self {
            log,
            // Until an attachment says otherwise.
            logged: true,
            maps,
            mirrored: [false; BITMAPS_MAX],
            role: Role::Member,
            size: state.size,
            recorded: state.size,
            growing: Vec::new(),
            state,
            boot_id,
            timing,
            now,
            bound: None,
            bulk: None,
            holder: None,
            promised_to: None,
            unclaimed: None,
            // Whom this process never heard may have been heard by the one before it: the grace counts from here.
            heard: now,
            released: false,
            queue: VecDeque::new(),
            inbox: VecDeque::new(),
            serial: None,
            ops: InFlight::default(),
            data_in_flight: 0,
            flushing: None,
            flush_next: Vec::new(),
            marks: Vec::new(),
            cleared: BTreeSet::new(),
            bitmaps_running: false,
            look_for_idle: false,
            ending: Vec::new(),
            actions: VecDeque::new(),
        }
    }

    // ---- getters

    /// What the superblock says, or is about to say.
    pub fn state(&self) -> &CopyState {
        &self.state
    }

    /// The bitmap in `slot`.
    pub fn map(&self, slot: usize) -> Option<&DirtyMap> {
        self.maps[slot].as_ref()
    }

    /// Regions in the log.
    pub fn active_regions(&self) -> usize {
        self.log.regions().len()
    }

    /// The log is nearly full; goes out with the next AckVec.
    pub fn log_pressure(&self) -> bool {
        self.logged && self.log.pressure()
    }

    /// The session whose requests are taken.
    pub fn bound(&self) -> Option<SessionId> {
        self.bound
    }

    /// It is being brought up to date by somebody who is connected.
    pub fn is_target(&self) -> bool {
        let changes = matches!(
            self.serial,
            Some(Serial::BeginSync { .. } | Serial::EndSync { .. })
        );
        changes || matches!(self.role, Role::Target { .. }) && self.bound.is_some()
    }

    /// Nothing is under way: no request, disk operation or change of state.
    pub fn is_idle(&self) -> bool {
        self.serial.is_none()
            && self.ops.is_empty()
            && self.queue.is_empty()
            && self.inbox.is_empty()
            && self.growing.is_empty()
    }

    // ---- events

    /// A message of a session, in the session's order.
    pub fn on_message(
        &mut self,
        now: Nanos,
        session: SessionId,
        message: Message,
        data: Option<D>,
    ) {
        self.now = now;
        if self.bound == Some(session) {
            self.heard = now;
        }
        if self.ops.len() + self.queue.len() + self.inbox.len() >= REQUESTS_MAX {
            self.refuse(
                session,
                Refusal::Protocol(format!("more than {REQUESTS_MAX} requests at once")),
            );
        } else if self.serial.is_some() {
            self.inbox.push_back((session, message, data));
        } else {
            self.dispatch(session, message, data);
        }
    }

    /// The session's connection is gone. Its requests go on to the disk; nobody is told.
    pub fn on_close(&mut self, now: Nanos, session: SessionId) {
        self.now = now;
        if self.bound == Some(session) {
            self.bound = None;
        }
        if self.bulk == Some(session) {
            self.bulk = None;
        }
        self.marks.retain(|(s, ..)| *s != session);
        if self
            .promised_to
            .as_ref()
            .is_some_and(|(s, _)| *s == session)
        {
            self.promised_to = None;
        }
        self.inbox.retain(|(s, ..)| *s != session);
        self.forget_growing(session);
        self.ending.retain(|s| *s != session);
    }

    /// Time passed.
    pub fn on_tick(&mut self, now: Nanos) {
        self.now = now;
        self.look_for_idle = true;
    }

    /// The operation `ticket` ended.
    pub fn on_disk(&mut self, now: Nanos, ticket: Ticket, result: DiskResult<D>) {
        self.now = now;
        let Some(op) = self.ops.remove(ticket) else {
            return;
        };
        match (op, result) {
            (
                Op::Data {
                    session,
                    request,
                    logged,
                },
                result,
            ) => self.data_done(session, request, logged, &result),
            (Op::Read { session, seq }, DiskResult::Done(data)) => {
                self.reply_with(
                    session,
                    Message::ReadReply {
                        seq,
                        status: Status::Ok,
                    },
                    data,
                );
            }
            // A failed read does not kill the copy: another one answers it (PROTOCOL 3 speaks of writes and flushes).
            (Op::Read { session, seq }, _) => self.reply(
                session,
                Message::ReadReply {
                    seq,
                    status: Status::Io,
                },
            ),
            (Op::Hash { session, seq }, result) => self.hashed(session, seq, &result),
            (
                Op::Map {
                    session,
                    seq,
                    dirty,
                },
                result,
            ) => self.mapped(session, seq, dirty, result),
            (Op::Sync, DiskResult::Done(_)) => self.synced(),
            (Op::Bitmaps(asked), DiskResult::Done(_)) => self.bitmaps_written(&asked),
            (Op::BitmapsThenLog(txn), DiskResult::Done(_)) => {
                let next = DiskOp::Log(txn.clone());
                self.start(Op::Log(txn), next);
            }
            (Op::Log(txn), DiskResult::Done(_)) => self.log_committed(&txn),
            (Op::Grow(size), DiskResult::Done(_)) => self.has_grown(size),
            (Op::Grow(size), DiskResult::NoSpace) => self.cannot_grow(size),
            // Begun before the failure, so it does not say Failed yet: end_turn writes the one that does.
            (Op::Superblock(standing), DiskResult::Done(_)) if standing != self.state.standing => {}
            (Op::Superblock(_), DiskResult::Done(_)) => self.superblock_written(),
            (Op::Superblock(_), _) if matches!(self.serial, Some(Serial::Failing)) => {
                self.superblock_written()
            }
            (op, _) => self.fail(match op {
                Op::Sync => "a flush failed",
                Op::Grow(_) => "its files could not be made longer",
                _ => "its metadata could not be written",
            }),
        }
    }

    /// What the disk had reported as written is found to be gone from it.
    pub fn on_bytes_lost(&mut self, now: Nanos, why: &'static str) {
        self.now = now;
        self.fail(why);
    }

    /// The batch of events is over: start the log transaction that its writes need.
    pub fn end_turn(&mut self) {
        if !self.ending.is_empty() && !self.disk_works() {
            for session in std::mem::take(&mut self.ending) {
                self.refuse(session, Refusal::Failed);
            }
        }
        if self.serial.is_some() {
            return self.advance_serial();
        }
        self.start_growing();
        if self.serial.is_some() {
            return;
        }
        self.write_bitmaps();
        self.start_transaction();
    }

    /// What to do next, in order.
    pub fn poll(&mut self) -> Option<Action<D>> {
        self.actions.pop_front()
    }

    // ---- output

    fn start(&mut self, op: Op, disk: DiskOp<D>) {
        let ticket = self
            .ops
            .insert(op)
            .expect("REQUESTS_MAX is below IN_FLIGHT_MAX");
        self.actions.push_back(Action::Disk(ticket, disk));
    }

    fn reply(&mut self, session: SessionId, message: Message) {
        self.reply_with(session, message, None);
    }

    fn reply_with(&mut self, session: SessionId, message: Message, data: Option<D>) {
        self.actions.push_back(Action::Reply {
            session,
            message,
            data,
        });
    }

    fn ack(&mut self, session: SessionId, seq: Seq, status: Status) {
        self.actions.push_back(Action::Ack {
            session,
            seq,
            status,
        });
    }

    fn refuse(&mut self, session: SessionId, refusal: Refusal) {
        self.reply(session, Message::Nack(refusal));
        self.actions.push_back(Action::Close(session));
    }

    fn event(&mut self, rule: &'static str, text: String) {
        self.actions.push_back(Action::Event { rule, text });
    }
}

#[cfg(test)]
mod tests;
