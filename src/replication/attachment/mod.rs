//! The attachment: the only writer of a volume. It takes the guest's requests, has every in-sync copy do them, and
//! completes them when the rules allow (PROTOCOL 2–5, 7).
//!
//! Sans-IO. Events in: the `on_*` methods and [`Attachment::submit`]; then carry out every [`Action`] of
//! [`Attachment::poll`], in order. Nothing here waits: what cannot go on is looked at again at the next event or
//! [`Attachment::on_tick`] (call it at least every 50 ms).
//!
//! - `join`: taking the volume over: pre-vote, promises, the claim in the record, configuring the copies;
//! - `reconcile`: deciding the regions in which copies may differ;
//! - `membership`: links to the copies, ejection, promotion of another master, changes of the record;
//! - `io`: requests, completion, leases, suspension;
//! - `growing`: making the volume larger;
//! - `sync` and `copying`: bringing absent copies up to date; `repair`: what one copy's disk could not read;
//! - `scrub`: comparing all in-sync copies.

mod copying;
mod growing;
mod io;
mod join;
mod membership;
mod reconcile;
mod repair;
mod scrub;
mod sync;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(super) use tests::bench_record;

use std::collections::{BTreeMap, VecDeque};

pub use super::copy_set::CopySet;
use super::ids::{BootId, COPIES_MAX, Chunk, CopyId, Epoch, Nanos, NodeName, Seq, Span, Tag};
use super::in_flight::{InFlight, Overlaps};
use super::message::{Absent, Configuration, DiskState, Message, Proof, Refusal, Status};
use super::record::{self, CopyStatus, Record, State};
use super::scrub::{Counters, View as ScrubView};
use super::timing::Timing;

/// A revision of the record in the registry.
pub type Revision = u64;

/// A guest request, numbered by the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId(pub u64);

/// What a guest asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read.
    Read(Span),
    /// Write; with `fua` durable when completed.
    Write {
        /// Where.
        span: Span,
        /// Write-through.
        fua: bool,
    },
    /// Make zero.
    Zero {
        /// Where.
        span: Span,
        /// Give the space back.
        unmap: bool,
        /// Write-through.
        fua: bool,
    },
    /// Make completed writes durable.
    Flush,
}

/// How a guest request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Ok,
    /// VIRTIO_BLK_S_IOERR.
    IoError,
}

/// The bytes of a request, as the engine (or the simulator) holds them.
pub trait Payload: Clone {
    /// Whether both hold the same bytes.
    fn same(&self, other: &Self) -> bool;

    /// How many.
    fn count(&self) -> usize;

    /// Whether all of them are zero, as far as that is known.
    fn is_zero(&self) -> bool;
}

/// What the engine is to do for an attachment.
#[derive(Debug)]
pub enum Action<D> {
    /// Send on these links (see [`LINKS_MAX`](super::ids::LINKS_MAX)).
    Send {
        /// Which.
        to: CopySet,
        /// What.
        message: Message,
        /// The payload.
        data: Option<D>,
    },
    /// Complete a guest request. A read from a copy elsewhere brings its bytes.
    Complete {
        /// Which.
        id: RequestId,
        /// How.
        outcome: Outcome,
        /// The bytes read, when they are not in the guest's memory already.
        data: Option<D>,
    },
    /// Make this link to a copy; report by `on_connected` or `on_disconnected`.
    Dial {
        /// Which link: the copy's own, or its bulk link.
        copy: usize,
        /// Identity.
        copy_id: CopyId,
        /// Where.
        node: NodeName,
    },
    /// Drop this link.
    Hangup(usize),
    /// Compare-and-swap the record; report by `on_cas`.
    Cas {
        /// The revision it must have.
        expected: Revision,
        /// The new value.
        record: Box<Record>,
    },
    /// Read the record; report by `on_record`.
    ReadRecord,
    /// A change of state, for log and events.
    Event {
        /// The rule that caused it.
        rule: &'static str,
        /// One sentence.
        text: String,
    },
    /// The attachment has ended (see [`Attachment::phase`]).
    Ended,
}

/// Answer to [`Action::Cas`].
#[derive(Debug)]
pub enum CasOutcome {
    /// Swapped; the new revision.
    Done(Revision),
    /// Another value was there (`None`: the record is gone).
    Conflict(Option<Box<(Record, Revision)>>),
    /// Nobody knows whether it was swapped.
    Ambiguous,
    /// Not swapped: the registry did not answer.
    Unavailable,
}

/// How far an attachment is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Asking the copies for their promise.
    Joining,
    /// Swapping the record.
    Claiming,
    /// The record is ours; copies persist the configuration.
    Configuring,
    /// Serving. While the record says `recovering`, chunks in which copies may differ are decided first.
    Serving,
    /// Detaching: flushing, emptying logs.
    Leaving,
    /// Detached cleanly.
    Left,
    /// Another attachment took the volume, or this one was refused it: nothing more is completed.
    Fenced(String),
}

#[derive(Debug, PartialEq, Eq)]
enum Link {
    /// Not connected since; tried last.
    Down {
        since: Nanos,
        tried: Nanos,
    },
    /// Connecting; not connected since.
    Dialing {
        since: Nanos,
    },
    Up,
}

/// A copy, as the attachment sees it.
#[derive(Debug)]
struct Peer {
    copy_id: CopyId,
    link: Link,
    /// When it was last heard.
    heard: Nanos,
    /// When it was last sent a heartbeat.
    beat: Nanos,
    /// When it took what is pending last: since then its answers are waited for, however old the requests are.
    taken_up: Nanos,
    /// The newest request when it took our configuration last. What its log held then has numbers that say nothing (it may have
    /// been restarted, or have promised to another one), so it hears of nothing stable before all up to here is.
    begun_at: Seq,
    /// When the newest acknowledged heartbeat was sent.
    lease: Option<Nanos>,
    /// It came back under another boot than the one it was taken in under.
    gap: bool,
    /// The boot under which it is used in spite of that.
    accepted: Option<BootId>,
    /// Its disk failed a write or a flush since it was taken in. The node notes that on the disk, which may fail, too: restarted,
    /// such a copy calls itself whole.
    died: bool,
    /// It answered that its disk has failed, and has taken no configuration since.
    refused: bool,
    /// Its node answered that it has no such copy, and it has taken no configuration since.
    unknown: bool,
    vote: Option<Vote>,
    detached: bool,
    /// Syncs that broke off, one after the other, and when the next may begin (PROTOCOL 6: rejoin damping).
    broke_off: u32,
    sync_after: Nanos,
    /// When it was taken in last.
    in_sync_since: Nanos,
    /// Bytes of a volume that it is known to have room for.
    room: u64,
    /// Why it was lost last.
    why: String,
}

#[derive(Debug)]
enum Vote {
    Probed,
    Promised(DiskState),
    Out,
    /// Its disk is in a later epoch than the record. As long as the record stands, nobody claims the volume: the copies that
    /// fit an old record lack what was completed since, and would be copied over those that have it.
    Ahead,
}

#[derive(Debug)]
enum Origin {
    Guest(RequestId),
    /// Of a guest that was told IOERR meanwhile; it keeps its place until the copies have answered (S16).
    Abandoned,
    /// A flush of all copies on our own account; its meaning when done.
    Background,
    /// Part of a reconciliation.
    Reconcile {
        chunk: Chunk,
    },
    /// The flush that ends reconciliation.
    Reconciled,
    /// The flush before a clean detach.
    Leave,
    /// A copy makes room.
    Grow,
    /// Part of bringing this copy up to date; void once that session is over.
    Sync {
        copy: usize,
        session: u64,
        step: sync::Step,
    },
    /// Part of writing back what this copy could not read.
    Repair {
        copy: usize,
    },
    /// Part of this scrub; void once that is over.
    Scrub {
        id: u64,
        step: scrub::Step,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zero {
        unmap: bool,
    },
    Flush {
        covers: Seq,
    },
    /// A chunk of a sync; without bytes, one of zeros.
    Data,
    Hash,
    /// Marks and holes of the chunks of the span, for a sync.
    Map,
    /// Marks what a sync's target holds.
    Mark,
    /// Makes room for a volume of this size.
    Grow {
        to: u64,
    },
}

impl Kind {
    /// Changes what a flush is to make durable.
    fn is_write(self) -> bool {
        matches!(self, Self::Write | Self::Zero { .. })
    }

    /// Asked of one copy, which answers with what it has.
    fn is_query(self) -> bool {
        matches!(self, Self::Read | Self::Hash | Self::Map)
    }
}

/// What waits for a span of the volume to be free of writes (S16).
#[derive(Debug)]
enum Work<D> {
    /// A write of the guest.
    Guest(Submitted<D>),
    /// A chunk of a sync.
    Chunk {
        copy: usize,
        session: u64,
        chunk: Chunk,
    },
    /// What this copy could not read.
    Repair { copy: usize, span: Span },
    /// A chunk of a scrub.
    Scrub { id: u64, chunk: Chunk },
}

#[derive(Debug)]
struct Pending<D> {
    origin: Origin,
    kind: Kind,
    span: Span,
    fua: bool,
    data: Option<D>,
    /// Copies whose answer is still needed.
    waiting: CopySet,
    /// Reads: copies asked already, and those whose disk could not.
    tried: CopySet,
    unreadable: CopySet,
    submitted: Nanos,
    /// When the copy was chosen that is to answer it.
    asked: Nanos,
    /// A last copy answered this; nobody can replace it.
    failed: Option<Status>,
    /// The last copy's disk had no space for it.
    full: bool,
    /// Copies that answered so and are to be asked again.
    no_space: CopySet,
}

#[derive(Debug)]
struct Submitted<D> {
    id: RequestId,
    op: Op,
    data: Option<D>,
}

#[derive(Debug)]
struct Done<D> {
    id: RequestId,
    read: bool,
    outcome: Outcome,
    data: Option<D>,
}

/// What a change of the record is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// Taking the volume over.
    Claim,
    /// Ejecting, taking in, letting go, promoting.
    Members,
    /// Going above a promise that led to nothing.
    Raise,
    /// Reconciliation has ended.
    Activate,
    /// Clean detach.
    Release,
}

/// A change of the record under way. While its outcome is unknown the proposal stays the same, tag included: of two
/// attempts at one revision at most one can win, and both mean the same.
#[derive(Debug)]
struct Change {
    purpose: Purpose,
    proposed: Record,
    since: Nanos,
    /// Waiting for the registry's answer.
    asked: bool,
    /// The answer was ambiguous: read before anything else.
    unknown: bool,
    /// An answer was ambiguous once: that attempt may still arrive, so the proposal stays.
    in_doubt: bool,
    /// When to ask again.
    retry: Nanos,
}

/// The state machine of one attachment.
#[derive(Debug)]
pub struct Attachment<D> {
    me: record::Attachment,
    record: Record,
    revision: Revision,
    timing: Timing,
    now: Nanos,
    rng: u64,
    phase: Phase,
    proof: Proof,
    peers: Vec<Peer>,
    in_sync: CopySet,
    ready: CopySet,
    failing: CopySet,
    master: usize,
    /// The copy on the attachment's own node.
    local: Option<usize>,
    change: Option<Change>,
    /// When to read the record again, after it could not be read.
    reread: Option<Nanos>,
    /// The highest promise a copy reported above our epoch.
    outbid: Epoch,
    join: join::Join,
    reconcile: reconcile::Reconcile<D>,
    pending: InFlight<Pending<D>>,
    overlaps: Overlaps<Work<D>>,
    syncs: BTreeMap<usize, sync::Sync>,
    /// Targets of a sync that get every write; their answers are as mandatory as an in-sync copy's.
    mirrors: CopySet,
    sessions: u64,
    /// The scrub under way, or the last one.
    scrub: Option<scrub::Scrub>,
    scrub_counters: Counters,
    /// Average time of the guest's requests, for the throttle of syncs.
    latency: super::throttle::Latency,
    /// Guest requests not started: not serving yet, or suspended.
    held: VecDeque<Submitted<D>>,
    /// Requests done on the copies that may not complete now (lease, failure mode).
    done: VecDeque<Done<D>>,
    not_serving_since: Option<Nanos>,
    /// Since when a copy that counted, or the attachment before, has been lost and the volume has not served without it.
    lost_since: Option<Nanos>,
    /// How long that took, each time; see [`take_failover`](Self::take_failover).
    failovers: Vec<Nanos>,
    stable: Seq,
    /// Writes up to this one may be in no activity log: the volume had a single copy.
    unlogged: Seq,
    /// The newest write completed that was not written through.
    newest: Seq,
    /// A power cut may have taken completed writes back; the guest's next flush says so.
    lost_unflushed: bool,
    /// Flushes up to here say so, too.
    flushes_fail_through: Seq,
    unflushed: bool,
    flushed_at: Nanos,
    pressure: bool,
    /// The size that a copy has no room for, and why.
    no_room: Option<(u64, String)>,
    leaving: bool,
    actions: VecDeque<Action<D>>,
}

/// A summary for people.
#[derive(Clone, Debug)]
pub struct Summary {
    /// How far.
    pub phase: Phase,
    /// Not serving since, as a span from now.
    pub suspended_for: Option<Nanos>,
    /// Guest requests under way.
    pub in_flight: usize,
    /// Chunks in which copies may differ since the last takeover.
    pub undecided: u64,
    /// Per copy, in the record's order.
    pub copies: Vec<CopyView>,
    /// The scrub under way, or the last one.
    pub scrub: Option<ScrubView>,
}

/// One copy for people.
#[derive(Clone, Debug)]
pub struct CopyView {
    /// Identity.
    pub copy_id: CopyId,
    /// Where.
    pub node: NodeName,
    /// As in the record.
    pub status: CopyStatus,
    /// Reads come from it.
    pub master: bool,
    /// Takes requests now.
    pub connected: bool,
    /// Why it was lost last.
    pub why: String,
    /// How far it is in being brought up to date.
    pub sync: Option<SyncView>,
}

/// A sync for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SyncView {
    /// Bytes still to be compared or copied.
    pub remaining_bytes: u64,
    /// Bytes there were when it began.
    pub total_bytes: u64,
    /// Compared or copied in a second, lately.
    pub bytes_per_second: u64,
}

impl SyncView {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            remaining_bytes: self.remaining_bytes.saturating_add(other.remaining_bytes),
            total_bytes: self.total_bytes.saturating_add(other.total_bytes),
            bytes_per_second: self.bytes_per_second.saturating_add(other.bytes_per_second),
        }
    }
}

impl<D: Payload> Attachment<D> {
    /// Begins to take over the volume of `record`. `proof` says why the copies need not wait for the old attachment.
    /// `seed` feeds epoch tags and the choice among equal replicas.
    pub fn new(
        me: record::Attachment,
        record: Record,
        revision: Revision,
        proof: Proof,
        timing: Timing,
        seed: u64,
        now: Nanos,
    ) -> Self {
        // The one before did not let go; how long before now it died nobody knows.
        let takes_over = record.state != State::Clean && record.attachment.is_some();
        let mut attachment = Self {
            local: None,
            me,
            revision,
            timing,
            now,
            rng: seed,
            phase: Phase::Joining,
            proof,
            peers: Vec::new(),
            in_sync: CopySet::EMPTY,
            ready: CopySet::EMPTY,
            failing: CopySet::EMPTY,
            master: 0,
            change: None,
            reread: None,
            outbid: Epoch(0),
            join: join::Join::default(),
            reconcile: reconcile::Reconcile::default(),
            pending: InFlight::default(),
            overlaps: Overlaps::default(),
            syncs: BTreeMap::new(),
            mirrors: CopySet::EMPTY,
            sessions: 0,
            scrub: None,
            scrub_counters: Counters::default(),
            latency: super::throttle::Latency::default(),
            held: VecDeque::new(),
            done: VecDeque::new(),
            not_serving_since: Some(now),
            lost_since: takes_over.then_some(now),
            failovers: Vec::new(),
            stable: Seq(0),
            // An attachment before this one may have left such writes unflushed.
            unlogged: Seq(1),
            newest: Seq(0),
            lost_unflushed: false,
            flushes_fail_through: Seq(0),
            unflushed: false,
            flushed_at: now,
            pressure: false,
            no_room: None,
            leaving: false,
            actions: VecDeque::new(),
            record,
        };
        attachment.adopt();
        attachment.begin_join();
        attachment
    }

    // ---- getters

    /// How far it is.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// The record in force, as last read or written.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// The revision of [`record`](Self::record) in the registry.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Nothing of the guest is under way.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
            && self.held.is_empty()
            && self.done.is_empty()
            && self.reconcile.waiting() == 0
            && self.overlaps.waiting() == 0
    }

    /// How long the volume took to go on without a copy that was lost, or without the attachment before this one: each is given
    /// once.
    pub fn take_failover(&mut self) -> Option<Nanos> {
        self.failovers.pop()
    }

    /// How far each sync is, by the copy's place in the record.
    pub fn sync_views(&self) -> impl Iterator<Item = (usize, SyncView)> {
        self.syncs.iter().map(|(copy, s)| (*copy, s.view()))
    }

    /// For people.
    pub fn status(&self) -> Summary {
        let copies = self
            .record
            .copies
            .iter()
            .enumerate()
            .map(|(i, c)| CopyView {
                copy_id: c.copy_id,
                node: c.node.clone(),
                status: c.status,
                master: i == self.master,
                connected: self.ready.has(i) || self.mirrors.has(i),
                why: self.peers[i].why.clone(),
                sync: self.syncs.get(&i).map(sync::Sync::view),
            });
        Summary {
            phase: self.phase.clone(),
            suspended_for: self.not_serving_since.map(|since| self.now.since(since)),
            in_flight: self.pending.len()
                + self.held.len()
                + self.done.len()
                + self.reconcile.waiting()
                + self.overlaps.waiting(),
            undecided: self.reconcile.left(),
            copies: copies.collect(),
            scrub: self.scrub.as_ref().map(scrub::Scrub::view),
        }
    }

    // ---- events that touch everything

    /// Time passed.
    pub fn on_tick(&mut self, now: Nanos) {
        self.now = now;
        if self.ended() {
            return;
        }
        self.tick_links();
        self.tick_change();
        match self.phase {
            Phase::Joining => self.tick_join(),
            Phase::Serving | Phase::Configuring | Phase::Leaving => {
                self.tick_heartbeats();
                self.tick_failing();
                self.tick_syncs();
            }
            _ => {}
        }
        self.tick_io();
        self.advance();
    }

    /// A message of a link, in its order.
    pub fn on_message(&mut self, now: Nanos, link: usize, message: Message, data: Option<D>) {
        self.now = now;
        let copy = link % COPIES_MAX;
        // After a loss the connection may bring what was on its way: it is ended already.
        if self.ended() || self.peers[copy].link != Link::Up {
            return;
        }
        self.peers[copy].heard = now;
        match message {
            Message::AckVec {
                acks, log_pressure, ..
            } => {
                self.pressure |= log_pressure;
                for (seq, status) in acks {
                    self.acked(copy, seq, status);
                }
            }
            Message::ReadReply { seq, status } => self.read_answered(copy, seq, status, data),
            Message::HeartbeatAck { epoch, sent } if epoch == self.record.epoch => {
                self.peers[copy].lease = self.peers[copy].lease.max(Some(sent));
                self.release_done();
            }
            Message::HeartbeatAck { .. } | Message::EpochAck { .. } => {}
            Message::PromiseAck(disk) => self.promised(copy, disk),
            Message::AttachAck { epoch } => self.attached(copy, epoch),
            Message::DetachAck { .. } => self.peers[copy].detached = true,
            Message::SyncReady { disk, ticket } => self.target_ready(copy, disk, ticket),
            Message::SyncHashReply { seq, status, hash } => match self.asked_by_scrub(seq) {
                Some((id, scrub::Step::Hash(chunk, block))) => {
                    if self.take_scrub_answer(copy, seq, status) {
                        let hash = (status == Status::Ok).then_some(hash);
                        self.block_known(id, (chunk, block), copy, hash);
                    }
                }
                _ => self.hash_answered(copy, seq, status, hash),
            },
            Message::MapReply {
                seq,
                status,
                dirty,
                allocated,
            } => match self.asked_by_scrub(seq) {
                Some((id, scrub::Step::Holes)) => {
                    if self.take_scrub_answer(copy, seq, status) {
                        let known = (status == Status::Ok).then_some(&*allocated);
                        self.holes_known(id, known);
                    }
                }
                _ => self.map_answered(copy, seq, status, &dirty, &allocated),
            },
            Message::SyncDoneAck { .. } => self.target_done(copy),
            Message::Nack(refusal) => self.refused(copy, refusal),
            other => self.lose(
                copy,
                &format!("it sent {other:?}, which only an attachment sends"),
            ),
        }
        self.advance();
    }

    /// One acknowledgement of the local copy: as an AckVec of one, without building it.
    pub fn on_ack(&mut self, now: Nanos, copy: usize, seq: Seq, status: Status) {
        self.now = now;
        if self.ended() || self.peers[copy].link != Link::Up {
            return;
        }
        self.peers[copy].heard = now;
        self.acked(copy, seq, status);
        self.advance();
    }

    /// The node at the other end of `link` has no such copy, or it takes nothing from us; there is no connection.
    pub fn on_refused(&mut self, now: Nanos, link: usize, refusal: Refusal) {
        self.now = now;
        if !self.ended() {
            let copy = link % COPIES_MAX;
            // A wiped copy refuses while another candidate is met, and all votes are asked for again: were its link not
            // down, it would never be dialed again, and a volume that needs all others would wait for its vote for ever.
            if link == copy {
                self.unlink(copy, "");
            }
            self.refused(copy, refusal);
            self.advance();
        }
    }

    /// What to do next, in order.
    pub fn poll(&mut self) -> Option<Action<D>> {
        self.actions.pop_front()
    }

    /// Leave cleanly: what is under way is finished, then every copy is flushed and its log emptied.
    pub fn detach(&mut self, now: Nanos) {
        self.now = now;
        self.leaving = true;
        self.advance();
    }

    // ---- shared by the parts

    fn ended(&self) -> bool {
        matches!(self.phase, Phase::Left | Phase::Fenced(_))
    }

    /// Whether the record in force is ours, so that copies may be configured and ejected.
    fn owns(&self) -> bool {
        matches!(
            self.phase,
            Phase::Configuring | Phase::Serving | Phase::Leaving
        )
    }

    /// In-sync copies are known to be the same everywhere, and it is not being detached.
    fn settled(&self) -> bool {
        self.phase == Phase::Serving && self.record.state == State::Active && !self.leaving
    }

    /// Goes on with whatever the last event made possible.
    fn advance(&mut self) {
        if self.ended() {
            return;
        }
        self.propose_members();
        if self.leaving {
            self.end_scrub("the volume is being detached");
        }
        let leaves = self.leaving
            && self.phase == Phase::Serving
            && self.record.state == State::Active
            && self.break_off_all("the volume is being detached");
        match self.phase {
            Phase::Configuring => self.advance_configuring(),
            // Not before the copies are known to be the same everywhere.
            Phase::Serving if leaves => self.set_phase(Phase::Leaving, "5 clean detach"),
            Phase::Serving => {
                self.advance_reconcile();
                self.advance_syncs();
                self.advance_scrub();
                self.ask_for_room();
            }
            Phase::Joining | Phase::Claiming if self.leaving => {
                self.fence("detached before it was attached".into())
            }
            _ => {}
        }
        if self.phase == Phase::Leaving {
            self.advance_leaving();
        }
    }

    fn set_phase(&mut self, phase: Phase, rule: &'static str) {
        let text = format!(
            "{} -> {} in epoch {}",
            name(&self.phase),
            name(&phase),
            self.record.epoch
        );
        self.event(rule, text);
        self.phase = phase;
    }

    fn fence(&mut self, why: String) {
        self.scrub_broke_off(&why);
        self.set_phase(Phase::Fenced(why.clone()), "4 fence");
        self.event("4 fence", why);
        self.hang_up_all();
        self.actions.push_back(Action::Ended);
    }

    fn event(&mut self, rule: &'static str, text: String) {
        self.actions.push_back(Action::Event { rule, text });
    }

    fn send(&mut self, to: CopySet, message: Message, data: Option<D>) {
        if !to.is_empty() {
            self.actions.push_back(Action::Send { to, message, data });
        }
    }

    fn random(&mut self) -> u64 {
        // splitmix64 (Steele, Lea, Flood 2014): enough for tags that only have to differ, and repeatable from a seed.
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.rng;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn tag(&mut self) -> Tag {
        Tag(self.random())
    }

    fn configuration(&self) -> Configuration {
        let absent = (self.record.copies.iter().enumerate())
            .filter(|(_, c)| matches!(c.status, CopyStatus::Missing | CopyStatus::Syncing));
        Configuration {
            epoch: self.record.epoch,
            tag: self.record.epoch_tag,
            size: self.record.size,
            logged: self.record.logged(),
            absent: absent
                .map(|(i, c)| Absent {
                    copy_id: c.copy_id,
                    last: c.base.last.unwrap_or_default(),
                    mirrored: self.mirrors.has(i),
                })
                .collect(),
        }
    }
}

fn name(phase: &Phase) -> String {
    format!("{phase:?}")
        .to_lowercase()
        .split('(')
        .next()
        .unwrap_or_default()
        .to_string()
}
