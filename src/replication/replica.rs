//! One copy, as the protocol sees it: what it accepts, what it makes durable before what, and what it answers.
//!
//! Sans-IO. Events in: [`Replica::on_message`], [`Replica::on_disk`], [`Replica::on_close`], [`Replica::on_tick`];
//! after each batch call [`Replica::end_turn`] (it starts the batch's one log transaction), then carry out every
//! [`Action`] of [`Replica::poll`], in order. `D` is whatever the engine calls the bytes of a request.

use std::collections::VecDeque;

use super::activity_log::{ActivityLog, Touch, Transaction};
use super::copy_state::{BITMAPS_MAX, Bitmap, CopyState, Standing};
use super::dirty_map::DirtyMap;
use super::ids::{BootId, Epoch, Instance, Nanos, NodeName, Region, SECTOR, Seq, Span};
use super::in_flight::InFlight;
use super::message::{Configuration, DiskState, Message, Promise, Proof, Refusal, Request, Status};
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
    /// Make all data reported as written durable.
    Sync,
    /// Make the data file this long.
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
    Sync,
    BitmapsThenLog(Transaction),
    Log(Transaction),
    Grow,
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
    Failing,
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
    /// The session whose requests are taken.
    bound: Option<SessionId>,
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
    look_for_idle: bool,
    /// Sessions to be refused for the failed disk once it works on nothing any more.
    ending: Vec<SessionId>,
    actions: VecDeque<Action<D>>,
}

impl<D> Replica<D> {
    /// A copy as its disk had it. `regions` are those of its log; `maps` the bitmaps of the slots in use.
    pub fn new(
        state: CopyState,
        regions: &[Region],
        maps: [Option<DirtyMap>; BITMAPS_MAX],
        boot_id: BootId,
        timing: Timing,
        now: Nanos,
    ) -> Self {
        let log = ActivityLog::new(state.size, regions, now);
        let mut maps = maps;
        // Bits of active regions may have been in memory only when the process ended.
        for map in maps.iter_mut().flatten() {
            regions.iter().for_each(|r| map.set_region(*r, state.size));
        }
        Self {
            log,
            // Until an attachment says otherwise.
            logged: true,
            maps,
            state,
            boot_id,
            timing,
            now,
            bound: None,
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

    /// Nothing is under way: no request, disk operation or change of state.
    pub fn is_idle(&self) -> bool {
        self.serial.is_none()
            && self.ops.is_empty()
            && self.queue.is_empty()
            && self.inbox.is_empty()
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
        if self
            .promised_to
            .as_ref()
            .is_some_and(|(s, _)| *s == session)
        {
            self.promised_to = None;
        }
        self.inbox.retain(|(s, ..)| *s != session);
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
            (Op::Sync, DiskResult::Done(_)) => self.synced(),
            (Op::BitmapsThenLog(txn), DiskResult::Done(_)) => {
                let next = DiskOp::Log(txn.clone());
                self.start(Op::Log(txn), next);
            }
            (Op::Log(txn), DiskResult::Done(_)) => self.log_committed(&txn),
            (Op::Grow, DiskResult::Done(_)) => self.write_superblock(),
            // Begun before the failure, so it does not say Failed yet: end_turn writes the one that does.
            (Op::Superblock(standing), DiskResult::Done(_)) if standing != self.state.standing => {}
            (Op::Superblock(_), DiskResult::Done(_)) => self.superblock_written(),
            (Op::Superblock(_), _) if matches!(self.serial, Some(Serial::Failing)) => {
                self.superblock_written()
            }
            (op, _) => self.fail(match op {
                Op::Sync => "a flush failed",
                Op::Grow => "the data file could not grow",
                _ => "its metadata could not be written",
            }),
        }
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
        self.start_transaction();
    }

    /// What to do next, in order.
    pub fn poll(&mut self) -> Option<Action<D>> {
        self.actions.pop_front()
    }

    // ---- messages

    fn dispatch(&mut self, session: SessionId, message: Message, data: Option<D>) {
        if self.state.standing == Standing::Failed {
            return self.refuse_failed(session);
        }
        match message {
            Message::Promise(promise) => return self.promise(session, promise),
            Message::Attach(config) => return self.configure(session, config, true),
            _ => {}
        }
        if self.bound != Some(session) {
            return self.refuse(
                session,
                Refusal::Stale {
                    promised: self.state.promised,
                },
            );
        }
        match (message, data) {
            (Message::EpochChange(config), None) => self.configure(session, config, false),
            (Message::Write(request), Some(data)) => {
                self.change(session, request, Change::Write(data))
            }
            (Message::WriteZeroes { request, unmap }, None) => {
                self.change(session, request, Change::Zero { unmap })
            }
            (Message::Discard(request), None) => {
                self.change(session, request, Change::Zero { unmap: true })
            }
            (Message::Read(request), into) => self.read(session, request, into),
            (Message::Flush { epoch, seq }, None) => self.flush(session, epoch, seq),
            (
                Message::Heartbeat {
                    epoch,
                    sent,
                    stable,
                },
                None,
            ) => {
                // A promise above this epoch ends the lease: no answer (PROTOCOL 4).
                if self.current(epoch) {
                    self.log.stable(stable);
                    self.reply(session, Message::HeartbeatAck { epoch, sent });
                }
            }
            (Message::Detach { epoch }, None) => {
                if self.current(epoch) {
                    self.serial = Some(Serial::Detach { session, epoch });
                } else {
                    self.refuse(
                        session,
                        Refusal::Stale {
                            promised: self.state.promised,
                        },
                    );
                }
            }
            (other, data) => {
                let with = if data.is_some() {
                    " with a payload"
                } else {
                    ""
                };
                self.refuse(
                    session,
                    Refusal::Protocol(format!("{}{with}", name(&other))),
                );
            }
        }
    }

    /// S7: what is of another epoch, or of one below the promise, is not accepted.
    fn current(&self, epoch: Epoch) -> bool {
        epoch == self.state.epoch && self.state.promised <= epoch
    }

    fn promise(&mut self, session: SessionId, promise: Promise) {
        if self.state.standing == Standing::Inconsistent {
            return self.refuse(session, Refusal::Inconsistent);
        }
        let again = self
            .promised_to
            .as_ref()
            .is_some_and(|(_, h)| h.instance == promise.instance);
        if promise.epoch < self.state.promised || (promise.epoch == self.state.promised && !again) {
            return self.refuse(
                session,
                Refusal::Stale {
                    promised: self.state.promised,
                },
            );
        }
        if let Some(refusal) = self.old_attachment_alive(&promise) {
            return self.refuse(session, refusal);
        }
        if promise.probe {
            let answer = self.disk_state(promise.epoch, true);
            return self.reply(session, Message::PromiseAck(answer));
        }
        // From here on nothing of an older epoch is accepted; what is in the disk queue ends first (PROTOCOL 5).
        if let Some(old) = self.bound.take()
            && old != session
        {
            self.refuse(
                old,
                Refusal::Stale {
                    promised: promise.epoch,
                },
            );
        }
        self.drop_queue();
        self.event(
            "5.2 promise",
            format!("promising epoch {} to {}", promise.epoch, promise.candidate),
        );
        self.serial = Some(Serial::Promise { session, promise });
    }

    fn old_attachment_alive(&self, promise: &Promise) -> Option<Refusal> {
        let same = self
            .holder
            .as_ref()
            .is_some_and(|h| h.instance == promise.instance);
        let proven = match promise.proof {
            Proof::None => false,
            Proof::Released(epoch) => epoch >= self.state.epoch,
            Proof::PredecessorDead => self
                .holder
                .as_ref()
                .is_none_or(|h| h.node == promise.candidate),
        };
        let silent = self.now.since(self.heard);
        if same || proven || self.released || silent >= self.timing.grace {
            return None;
        }
        let node = self
            .holder
            .as_ref()
            .map_or_else(|| NodeName("an unknown node".into()), |h| h.node.clone());
        Some(Refusal::Attached {
            node,
            heard_ms: silent.as_ms(),
        })
    }

    fn disk_state(&self, promised: Epoch, probe: bool) -> DiskState {
        DiskState {
            promised,
            probe,
            epoch: self.state.epoch,
            tag: self.state.tag,
            boot_id: self.boot_id,
            clean: self.state.clean,
            regions: self.log.regions(),
        }
    }

    fn configure(&mut self, session: SessionId, config: Configuration, attach: bool) {
        let mine = (self.state.epoch, self.state.tag);
        if config.epoch < self.state.promised.max(mine.0)
            || (config.epoch == mine.0 && config.tag != mine.1)
        {
            return self.refuse(
                session,
                Refusal::Stale {
                    promised: self.state.promised.max(mine.0),
                },
            );
        }
        if self.state.standing == Standing::Inconsistent {
            return self.refuse(session, Refusal::Inconsistent);
        }
        if config.size < self.state.size {
            let text = format!(
                "size {} is below this copy's {}",
                config.size, self.state.size
            );
            return self.refuse(session, Refusal::Protocol(text));
        }
        if attach {
            if let Some(old) = self.bound.take()
                && old != session
            {
                self.refuse(
                    old,
                    Refusal::Stale {
                        promised: config.epoch,
                    },
                );
            }
            // Writes of a former connection of the same attachment will be sent again.
            self.drop_queue();
        }
        self.serial = Some(Serial::Configure {
            session,
            config,
            attach,
        });
    }

    fn change(&mut self, session: SessionId, request: Request, change: Change<D>) {
        if let Some(status) = self.invalid(&request) {
            return self.ack(session, request.seq, status);
        }
        // The chunk is marked for every copy that misses this write. The bit in memory is enough: until the region
        // leaves the log, and it leaves only after its bits are on disk, a restart marks the whole region (PROTOCOL 5.5).
        for map in self.maps.iter_mut().flatten() {
            map.set_span(request.span);
        }
        if !self.logged {
            return self.issue(session, request, change, false);
        }
        let touched = self.touch(&request);
        if touched && self.log.covers(request.span) {
            self.issue(session, request, change, true);
        } else {
            self.queue.push_back(Queued {
                session,
                request,
                change,
                touched,
            });
        }
    }

    fn touch(&mut self, request: &Request) -> bool {
        for (n, region) in request.span.regions().enumerate() {
            if self.log.touch(region, request.seq, self.now) == Touch::Full {
                request
                    .span
                    .regions()
                    .take(n)
                    .for_each(|r| self.log.done(r));
                return false;
            }
        }
        true
    }

    fn issue(&mut self, session: SessionId, request: Request, change: Change<D>, logged: bool) {
        // S15: log before data.
        assert!(
            !logged || self.log.covers(request.span),
            "S15: the region is durable in the log before its data"
        );
        let (span, dsync) = (request.span, request.fua);
        let op = match change {
            Change::Write(data) => DiskOp::Write { span, data, dsync },
            Change::Zero { unmap } => DiskOp::Zero { span, unmap, dsync },
        };
        self.data_in_flight += 1;
        self.start(
            Op::Data {
                session,
                request,
                logged,
            },
            op,
        );
    }

    fn read(&mut self, session: SessionId, request: Request, into: Option<D>) {
        match self.invalid(&request) {
            Some(status) => self.reply(
                session,
                Message::ReadReply {
                    seq: request.seq,
                    status,
                },
            ),
            None => self.start(
                Op::Read {
                    session,
                    seq: request.seq,
                },
                DiskOp::Read {
                    span: request.span,
                    into,
                },
            ),
        }
    }

    fn invalid(&self, request: &Request) -> Option<Status> {
        let Span { offset, len } = request.span;
        if !self.current(request.epoch) {
            return Some(Status::Stale);
        }
        let inside = offset
            .checked_add(u64::from(len))
            .is_some_and(|end| end <= self.state.size);
        let aligned = offset % SECTOR == 0 && u64::from(len) % SECTOR == 0 && len > 0;
        (!inside || !aligned).then_some(Status::Io)
    }

    fn flush(&mut self, session: SessionId, epoch: Epoch, seq: Seq) {
        if !self.current(epoch) {
            return self.ack(session, seq, Status::Stale);
        }
        // Everything acknowledged so far left the disk queue before this sync starts; later flushes share the next one.
        if self.flushing.is_some() {
            self.flush_next.push((session, seq));
        } else {
            self.flushing = Some(vec![(session, seq)]);
            self.start(Op::Sync, DiskOp::Sync);
        }
    }

    // ---- disk results

    fn data_done(
        &mut self,
        session: SessionId,
        request: Request,
        logged: bool,
        result: &DiskResult<D>,
    ) {
        self.data_in_flight -= 1;
        if logged {
            request.span.regions().for_each(|r| self.log.done(r));
        }
        match result {
            DiskResult::Done(_) => self.ack(session, request.seq, Status::Ok),
            DiskResult::NoSpace => self.ack(session, request.seq, Status::NoSpace),
            DiskResult::Error => {
                self.ack(session, request.seq, Status::Io);
                self.fail("a write failed");
            }
        }
    }

    fn synced(&mut self) {
        for (session, seq) in self.flushing.take().unwrap_or_default() {
            self.ack(session, seq, Status::Ok);
        }
        if !self.flush_next.is_empty() {
            self.flushing = Some(std::mem::take(&mut self.flush_next));
            self.start(Op::Sync, DiskOp::Sync);
        }
    }

    fn start_transaction(&mut self) {
        let idle = std::mem::take(&mut self.look_for_idle);
        if !self.logged && self.queue.is_empty() && !idle {
            return;
        }
        if let Some(txn) = self.log.transaction(self.now, idle) {
            self.write_transaction(txn);
        }
    }

    /// A region leaves the log only after the bits it protected are durable (PROTOCOL 5.5).
    fn write_transaction(&mut self, txn: Transaction) {
        if txn.retire.is_empty() || self.maps.iter().all(Option::is_none) {
            let op = DiskOp::Log(txn.clone());
            self.start(Op::Log(txn), op);
        } else {
            let op = DiskOp::Bitmaps(txn.retire.clone());
            self.start(Op::BitmapsThenLog(txn), op);
        }
    }

    fn log_committed(&mut self, txn: &Transaction) {
        self.log.committed(txn);
        let mut still = VecDeque::with_capacity(self.queue.len());
        while let Some(mut w) = self.queue.pop_front() {
            w.touched = w.touched || self.touch(&w.request);
            if w.touched && self.log.covers(w.request.span) {
                self.issue(w.session, w.request, w.change, true);
            } else {
                still.push_back(w);
            }
        }
        self.queue = still;
    }

    /// Forgets writes that have not reached the disk queue. They were never acknowledged.
    fn drop_queue(&mut self) {
        for w in std::mem::take(&mut self.queue) {
            if w.touched {
                w.request.span.regions().for_each(|r| self.log.done(r));
            }
        }
    }

    // ---- one thing at a time

    /// Takes the serial step as far as it goes now.
    fn advance_serial(&mut self) {
        let superblock_running = self
            .ops
            .iter()
            .any(|(_, op)| matches!(op, Op::Superblock(_) | Op::Grow));
        if superblock_running {
            return;
        }
        match self.serial.take() {
            Some(Serial::Promise { session, promise }) => {
                let drained = self.data_in_flight == 0;
                if drained {
                    self.state.promised = promise.epoch;
                }
                self.serial = Some(Serial::Promise { session, promise });
                if drained {
                    self.write_superblock();
                }
            }
            Some(Serial::Configure {
                session,
                config,
                attach,
            }) => {
                // A write of a former connection that is still in the disk queue will be sent again: were it to land
                // after the second one and after a later overlapping write, it would undo that one. It ends first.
                if attach && self.data_in_flight > 0 {
                    self.serial = Some(Serial::Configure {
                        session,
                        config,
                        attach,
                    });
                } else {
                    self.begin_configuration(session, config, attach);
                }
            }
            Some(Serial::Detach { session, epoch }) => {
                self.serial = Some(Serial::Detach { session, epoch });
                if self.data_in_flight > 0 || !self.queue.is_empty() || self.log.running() {
                    // What the log still wants is added first, so that emptying it finds nothing half-way.
                    return self.start_transaction();
                }
                match self
                    .log
                    .transaction(self.now, false)
                    .or_else(|| self.log.empty())
                {
                    Some(txn) => self.write_transaction(txn),
                    None => {
                        self.state.clean = true;
                        self.write_superblock();
                    }
                }
            }
            Some(Serial::Failing) => {
                self.serial = Some(Serial::Failing);
                self.write_superblock();
            }
            None => {}
        }
    }

    fn begin_configuration(&mut self, session: SessionId, config: Configuration, attach: bool) {
        let grows = config.size > self.state.size;
        let s = &mut self.state;
        assert!(
            config.epoch >= s.epoch && config.epoch >= s.promised,
            "S2: no epoch ever decreases on a disk"
        );
        (s.epoch, s.tag, s.promised, s.size) =
            (config.epoch, config.tag, config.epoch, config.size);
        s.clean = false;
        self.log.grow(config.size);
        for (slot, map) in s.bitmaps.iter_mut().zip(&mut self.maps) {
            if slot.is_some_and(|b| !config.missing.iter().any(|(copy, _)| *copy == b.copy_id)) {
                *slot = None;
                *map = None;
            } else if let Some(map) = map {
                map.grow(config.size);
            }
        }
        for &(copy_id, last) in &config.missing {
            if s.bitmaps.iter().flatten().any(|b| b.copy_id == copy_id) {
                continue;
            }
            let Some(free) = s.bitmaps.iter().position(Option::is_none) else {
                return self.refuse(
                    session,
                    Refusal::Protocol("more missing copies than bitmaps".into()),
                );
            };
            // What the missing copy may lack of epochs up to its last is in this log: every write it did not
            // acknowledge made its region active here first (PROTOCOL 2.6, S11).
            let mut map = DirtyMap::new(config.size);
            self.log
                .regions()
                .into_iter()
                .for_each(|r| map.set_region(r, config.size));
            s.bitmaps[free] = Some(Bitmap { copy_id, last });
            self.maps[free] = Some(map);
        }
        self.logged = config.logged;
        let size = config.size;
        self.serial = Some(Serial::Configure {
            session,
            config,
            attach,
        });
        if grows {
            self.start(Op::Grow, DiskOp::Grow { size });
        } else {
            self.write_superblock();
        }
    }

    fn write_superblock(&mut self) {
        let state = Box::new(self.state.clone());
        self.start(Op::Superblock(state.standing), DiskOp::Superblock(state));
    }

    fn superblock_written(&mut self) {
        match self.serial.take() {
            Some(Serial::Promise { session, promise }) => {
                let holder = Holder {
                    node: promise.candidate,
                    instance: promise.instance,
                };
                if self
                    .holder
                    .as_ref()
                    .is_none_or(|h| h.instance != holder.instance)
                {
                    self.log.renumber();
                }
                self.holder = Some(holder.clone());
                self.promised_to = Some((session, holder));
                self.unclaimed = Some(promise.epoch);
                self.released = false;
                self.heard = self.now;
                let answer = self.disk_state(promise.epoch, false);
                self.reply(session, Message::PromiseAck(answer));
            }
            Some(Serial::Configure {
                session,
                config,
                attach,
            }) => {
                self.bound = Some(session);
                let claimant = self
                    .promised_to
                    .as_ref()
                    .is_some_and(|(s, _)| *s == session);
                if self.unclaimed.take().is_some_and(|e| config.epoch > e) && !claimant {
                    // S8: Y was promised e + 1 and never took the volume, X went above it and is attached. Were Y still
                    // taken for the attachment, its next attempt would be promised without the grace, X being alive.
                    self.holder = None;
                }
                self.promised_to = None;
                self.heard = self.now;
                let epoch = config.epoch;
                self.event(
                    "8 configuration",
                    format!("epoch {epoch}, {} bitmaps kept", config.missing.len()),
                );
                self.reply(
                    session,
                    if attach {
                        Message::AttachAck { epoch }
                    } else {
                        Message::EpochAck { epoch }
                    },
                );
            }
            Some(Serial::Detach { session, epoch }) => {
                self.bound = None;
                self.released = true;
                self.event("5 clean detach", format!("released in epoch {epoch}"));
                self.reply(session, Message::DetachAck { epoch });
            }
            Some(Serial::Failing) | None => {}
        }
        while self.serial.is_none() {
            let Some((session, message, data)) = self.inbox.pop_front() else {
                break;
            };
            self.dispatch(session, message, data);
        }
    }

    /// This copy is dead for good: a failed write or flush is never retried (PROTOCOL 3).
    fn fail(&mut self, why: &'static str) {
        if self.state.standing == Standing::Failed {
            return;
        }
        self.state.standing = Standing::Failed;
        self.event("3 failed disk", why.into());
        for w in &self.queue {
            let (session, seq, status) = (w.session, w.request.seq, Status::Io);
            self.actions.push_back(Action::Ack {
                session,
                seq,
                status,
            });
        }
        self.drop_queue();
        let flushes = self.flushing.take().into_iter().flatten();
        for (session, seq) in flushes
            .chain(std::mem::take(&mut self.flush_next))
            .collect::<Vec<_>>()
        {
            self.ack(session, seq, Status::Io);
        }
        if let Some(session) = self.bound.take() {
            self.refuse_failed(session);
        }
        for (session, ..) in std::mem::take(&mut self.inbox) {
            self.refuse_failed(session);
        }
        if let Some(
            Serial::Promise { session, .. }
            | Serial::Configure { session, .. }
            | Serial::Detach { session, .. },
        ) = self.serial.replace(Serial::Failing)
        {
            self.refuse_failed(session);
        }
    }

    /// Whether the disk works on data of somebody's request.
    fn disk_works(&self) -> bool {
        self.ops
            .iter()
            .any(|(_, op)| matches!(op, Op::Data { .. } | Op::Read { .. }))
    }

    /// Refuses the session, but not before the disk's last answer has gone out: write 1 fails while write 2, from the
    /// guest's memory, is in the disk queue; were the session ended at once, the answer to write 2 would be lost, and the
    /// attachment in this process could never tell the guest that its memory is free (S19).
    fn refuse_failed(&mut self, session: SessionId) {
        if !self.disk_works() {
            self.refuse(session, Refusal::Failed);
        } else if !self.ending.contains(&session) {
            self.ending.push(session);
        }
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

fn name(message: &Message) -> String {
    let text = format!("{message:?}");
    text.split(|c: char| !c.is_alphanumeric())
        .next()
        .unwrap_or_default()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::ids::{CopyId, Tag, VolumeId};

    const T0: Nanos = Nanos(10_000_000_000);

    fn replica() -> Replica<()> {
        let state = CopyState {
            volume_id: VolumeId([1; 16]),
            copy_id: CopyId([2; 16]),
            size: 1 << 20,
            epoch: Epoch(1),
            tag: Tag(1),
            promised: Epoch(1),
            standing: Standing::InSync,
            clean: true,
            bitmaps: [None; BITMAPS_MAX],
        };
        let maps = std::array::from_fn(|_| None);
        Replica::new(state, &[], maps, BootId([3; 16]), Timing::DEFAULT, T0)
    }

    /// Lets the disk do everything; gives what was said.
    fn settle(r: &mut Replica<()>) -> Vec<Message> {
        let mut said = Vec::new();
        loop {
            r.end_turn();
            let Some(action) = r.poll() else { break };
            match action {
                Action::Disk(ticket, _) => r.on_disk(r.now, ticket, DiskResult::Done(None)),
                Action::Reply { message, .. } => said.push(message),
                _ => {}
            }
        }
        said
    }

    fn ask(r: &mut Replica<()>, session: u64, epoch: u64, node: &str, proof: Proof) -> Message {
        let promise = Promise {
            epoch: Epoch(epoch),
            candidate: NodeName(node.into()),
            instance: Instance([node.as_bytes()[0]; 16]),
            proof,
            probe: false,
        };
        r.on_message(r.now, SessionId(session), Message::Promise(promise), None);
        settle(r).pop().unwrap()
    }

    fn attach(r: &mut Replica<()>, session: u64, epoch: u64) -> Message {
        let config = Configuration {
            epoch: Epoch(epoch),
            tag: Tag(epoch),
            size: 1 << 20,
            logged: true,
            missing: Vec::new(),
        };
        r.on_message(r.now, SessionId(session), Message::Attach(config), None);
        settle(r).pop().unwrap()
    }

    #[test]
    fn a_candidate_that_never_took_the_volume_is_not_taken_for_its_attachment() {
        let mut r = replica();
        let released = Proof::Released(Epoch(1));
        assert!(matches!(
            ask(&mut r, 1, 2, "x", released),
            Message::PromiseAck(_)
        ));
        assert!(matches!(attach(&mut r, 1, 2), Message::AttachAck { .. }));
        // Partitioned from x for longer than the grace: y is promised 3, loses the CAS, goes away. x goes above it.
        r.on_tick(T0.after(Nanos::from_ms(4_000)));
        assert!(matches!(
            ask(&mut r, 2, 3, "y", Proof::None),
            Message::PromiseAck(_)
        ));
        r.on_close(r.now, SessionId(2));
        assert!(matches!(attach(&mut r, 3, 4), Message::AttachAck { .. }));
        let again = ask(&mut r, 4, 5, "y", Proof::None);
        assert!(
            matches!(again, Message::Nack(Refusal::Attached { .. })),
            "{again:?}"
        );
    }

    #[test]
    fn a_failed_copy_answers_what_its_disk_works_on_before_it_ends_the_session() {
        let mut r = replica();
        let released = Proof::Released(Epoch(1));
        ask(&mut r, 1, 2, "x", released);
        attach(&mut r, 1, 2);
        let mut tickets = Vec::new();
        for seq in [1, 2] {
            let span = Span {
                offset: seq * 4096,
                len: 512,
            };
            let request = Request {
                epoch: Epoch(2),
                seq: Seq(seq),
                span,
                fua: false,
            };
            r.on_message(T0, SessionId(1), Message::Write(request), Some(()));
        }
        r.end_turn();
        let mut log = None;
        while let Some(action) = r.poll() {
            if let Action::Disk(ticket, DiskOp::Log(_)) = action {
                log = Some(ticket);
            }
        }
        r.on_disk(T0, log.unwrap(), DiskResult::Done(None));
        while let Some(action) = r.poll() {
            if let Action::Disk(ticket, DiskOp::Write { .. }) = action {
                tickets.push(ticket);
            }
        }
        r.on_disk(T0, tickets[0], DiskResult::Error);
        let closed = |a: &Action<()>| matches!(a, Action::Close(_));
        let until = |r: &mut Replica<()>| -> Vec<Action<()>> {
            r.end_turn();
            std::iter::from_fn(|| r.poll()).collect()
        };
        assert!(!until(&mut r).iter().any(closed));
        r.on_disk(T0, tickets[1], DiskResult::Done(None));
        let end = until(&mut r);
        let acked = |a: &Action<()>| {
            matches!(
                a,
                Action::Ack {
                    seq: Seq(2),
                    status: Status::Ok,
                    ..
                }
            )
        };
        assert!(end.iter().position(acked).unwrap() < end.iter().position(closed).unwrap());
    }
}
