//! Bringing absent copies up to date (PROTOCOL 6): a session with each, from the first connection to the swap that makes it
//! a member. What goes on inside a session while chunks are copied is in `copying`.
//!
//! A session marks what the copy holds of its own on every in-sync copy, asks the master for marks and holes, and is from
//! then on *mirrored*: every write goes to it, those under way included, and is as mandatory as on an in-sync copy. If
//! it breaks off, the in-sync copies mark what their logs hold, so that their bitmaps say everything the copy may lack.

use std::collections::BTreeMap;

use super::copying::ChunkState;
use super::{Action, Attachment, CopySet, Kind, Link, Origin, Payload, Phase, SyncView, Work};
use crate::replication::dirty_map::DirtyMap;
use crate::replication::ids::{BootId, CHUNK, COPIES_MAX, Chunk, Nanos, Region, Seq, Span};
use crate::replication::membership;
use crate::replication::message::{DiskState, MAP_CHUNKS, Message, Status};
use crate::replication::mutants::{self, Mutant};
use crate::replication::record::{CopyStatus, State};
use crate::replication::resync;
use crate::replication::throttle::Throttle;

/// Copies of one volume that are brought up to date at once: each takes a share of the master's disk.
const SESSIONS_MAX: usize = 2;
/// The wait after a sync broke off for the first time; it doubles each time.
const BACK_OFF: Nanos = Nanos::from_ms(250);
/// The longest wait is 2^7 times the first: half a minute.
const BACK_OFF_DOUBLINGS: u32 = 7;
/// The wait of a sync that may not begin yet because others are under way: nothing broke off.
const PUT_OFF: Nanos = Nanos::from_ms(250);
/// A copy that was in sync for so long begins with the first wait again.
const FORGIVEN: Nanos = Nanos::from_ms(60_000);
/// How often the rate is measured.
const RATE: Nanos = Nanos::from_ms(1_000);

/// What a request of a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Marking what the target holds.
    Mark,
    /// Reading marks and holes.
    Map,
    /// Comparing a chunk.
    Hash(Chunk),
    /// Reading it where it is right.
    Read(Chunk),
    /// Writing it to the target.
    Data(Chunk),
    /// The target makes copied chunks durable.
    Flush,
    /// It makes everything durable, to become a member.
    LastFlush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    /// Asked to begin.
    Opening,
    /// Its own regions are marked on the in-sync copies.
    Marking,
    /// The bulk link is made.
    Dialing,
    /// Marks and holes are read.
    Mapping,
    /// Mirrored; chunks are compared and copied.
    Copying,
    /// Nothing is marked any more: the last flush.
    Flushing,
    /// It marks itself in sync.
    Ending,
    /// To be taken in by the next change of the record.
    Synced,
}

/// Marks and holes of one range, as far as they are known.
#[derive(Debug, Default)]
struct Ranges {
    span: Option<Span>,
    master: Option<(Vec<u64>, Vec<u64>)>,
    target: Option<Vec<u64>>,
}

/// One session.
#[derive(Debug)]
pub(super) struct Sync {
    pub(super) session: u64,
    pub(super) stage: Stage,
    since: Nanos,
    pub(super) boot: BootId,
    ticket: u64,
    /// The regions of its own log; `None` when it has nothing to build on.
    own: Option<Vec<Region>>,
    /// Chunks written since marks were asked for: no answer says whether they are in it.
    pub(super) begun: DirtyMap,
    ranges: Ranges,
    /// Marked, and not copied so far.
    pub(super) todo: DirtyMap,
    pub(super) cursor: Chunk,
    /// Locked, or waiting for their lock.
    pub(super) chunks: BTreeMap<Chunk, ChunkState>,
    /// The same as the master's, not flushed.
    pub(super) copied: Vec<Chunk>,
    /// Those that the flush under way covers.
    pub(super) flushing: Option<Vec<Chunk>>,
    pub(super) flushed_at: Nanos,
    pub(super) throttle: Throttle,
    total: u64,
    pub(super) counted: u64,
    measured: Nanos,
    rate: u64,
    /// Lost while the swap that makes it a member is under way: until its outcome is known it may be one (S4).
    pub(super) lost: Option<String>,
}

impl Sync {
    fn new(session: u64, boot: BootId, now: Nanos) -> Self {
        Self {
            session,
            stage: Stage::Opening,
            since: now,
            boot,
            ticket: 0,
            own: None,
            begun: DirtyMap::new(0),
            ranges: Ranges::default(),
            todo: DirtyMap::new(0),
            cursor: Chunk(0),
            chunks: BTreeMap::new(),
            copied: Vec::new(),
            flushing: None,
            flushed_at: now,
            throttle: Throttle::default(),
            total: 0,
            counted: 0,
            measured: now,
            rate: 0,
            lost: None,
        }
    }

    /// Whether the target was asked and has not answered.
    pub(super) fn is_opening(&self) -> bool {
        self.stage == Stage::Opening && self.lost.is_none()
    }

    /// Whether it was not lost while a change might have taken it in.
    pub(super) fn is_there(&self) -> bool {
        self.lost.is_none()
    }

    /// Whether it only waits to be taken in.
    pub(super) fn is_synced(&self) -> bool {
        self.stage == Stage::Synced && self.lost.is_none()
    }

    /// For people.
    pub(super) fn view(&self) -> SyncView {
        SyncView {
            remaining_bytes: self.todo.count() * CHUNK,
            total_bytes: self.total * CHUNK,
            bytes_per_second: self.rate,
        }
    }

    fn measure(&mut self, now: Nanos) {
        let span = now.since(self.measured);
        if span >= RATE {
            let rate = u128::from(self.counted * CHUNK) * 1_000_000_000 / u128::from(span.0);
            let rate = rate as u64;
            self.rate = if self.rate == 0 {
                rate
            } else {
                (self.rate + rate) / 2
            };
            (self.counted, self.measured) = (0, now);
        }
    }
}

impl<D: Payload> Attachment<D> {
    /// The targets of sessions that take messages.
    pub(super) fn targets(&self) -> CopySet {
        let open = |(copy, s): (&usize, &Sync)| s.lost.is_none().then_some(*copy);
        self.syncs.iter().filter_map(open).collect()
    }

    pub(super) fn sync_of(&mut self, copy: usize, session: u64) -> Option<&mut Sync> {
        self.syncs
            .get_mut(&copy)
            .filter(|s| s.session == session && s.lost.is_none())
    }

    /// Whether `copy` is to be brought up to date, and may be now.
    fn may_sync(&self, copy: usize) -> bool {
        let entry = &self.record.copies[copy];
        let absent = matches!(entry.status, CopyStatus::Missing | CopyStatus::Syncing);
        self.phase == Phase::Serving
            && self.record.state == State::Active
            && !self.leaving
            && absent
            && !entry.leaving
            && self.syncs.len() < SESSIONS_MAX
            && !self.syncs.contains_key(&copy)
            && self.now >= self.peers[copy].sync_after
    }

    /// Connects to absent copies whose time has come.
    fn dial_targets(&mut self) {
        for copy in 0..self.record.copies.len() {
            if self.in_sync.has(copy) || !self.may_sync(copy) {
                continue;
            }
            if let Link::Down { since, .. } = self.peers[copy].link {
                self.peers[copy].link = Link::Dialing { since };
                self.dial(copy);
            }
        }
    }

    pub(super) fn dial(&mut self, link: usize) {
        let entry = &self.record.copies[link % COPIES_MAX];
        let (copy_id, node) = (entry.copy_id, entry.node.clone());
        self.actions.push_back(Action::Dial {
            copy: link,
            copy_id,
            node,
        });
    }

    /// An absent copy is connected. `false` when it is not to be synced.
    pub(super) fn begin_session(&mut self, copy: usize, boot: BootId) -> bool {
        if !self.owns() || !self.may_sync(copy) {
            return false;
        }
        self.sessions += 1;
        let sync = Sync::new(self.sessions, boot, self.now);
        self.syncs.insert(copy, sync);
        let peer = &mut self.peers[copy];
        peer.link = Link::Up;
        (peer.heard, peer.taken_up) = (self.now, self.now);
        // What its log holds is marked elsewhere before it hears of anything.
        peer.begun_at = Seq(0);
        peer.lease = None;
        let message = Message::SyncBegin(self.configuration());
        self.send(CopySet::one(copy), message, None);
        true
    }

    /// The target is marked inconsistent, and says what its disk holds.
    pub(super) fn target_ready(&mut self, copy: usize, disk: DiskState, ticket: u64) {
        let own = resync::delta(&self.record, copy, &disk);
        let node = self.record.copies[copy].node.clone();
        let Some(sync) = self.syncs.get_mut(&copy) else {
            return;
        };
        if sync.stage != Stage::Opening || sync.lost.is_some() {
            return;
        }
        let how = if own.is_some() {
            format!("what it missed since epoch {}", disk.epoch)
        } else if disk.epoch.0 == 0 {
            "all of it: the copy is new".into()
        } else if disk.regions.is_none() {
            "all of it: its activity log cannot be read".into()
        } else {
            format!(
                "all of it: its epoch {} is not one it is remembered by",
                disk.epoch
            )
        };
        sync.own = own;
        sync.boot = disk.boot_id;
        sync.ticket = ticket;
        sync.stage = Stage::Marking;
        self.peers[copy].room = self.record.size;
        let session = sync.session;
        self.event("6 sync begins", format!("copy on {node}: {how}"));
        let origin = Origin::Sync {
            copy,
            session,
            step: Step::Mark,
        };
        // S13: A is in sync, B is synced and a slow swap takes it in; C, new, begins: marked on A alone. B is a member, A is put
        // out, B is asked what C lacks, and knows of nothing. So those that may be members by then mark it, too.
        let others = self.begun_targets().without(CopySet::one(copy));
        let (nowhere, to) = (Span { offset: 0, len: 0 }, self.in_sync.or(others));
        self.request(origin, Kind::Mark, nowhere, false, None, to);
    }

    /// What a [`Kind::Mark`] says.
    pub(super) fn mark_message(&self, copy: usize, seq: Seq) -> Message {
        Message::Mark {
            epoch: self.record.epoch,
            seq,
            copy: self.record.copies[copy].copy_id,
            regions: self.syncs.get(&copy).and_then(|s| s.own.clone()),
        }
    }

    /// Marked everywhere: from now on nothing depends on the target's own log.
    pub(super) fn marked(&mut self, copy: usize, session: u64) {
        let local = self.local == Some(copy);
        let Some(sync) = self.sync_of(copy, session) else {
            return;
        };
        if local {
            return self.ask_maps(copy);
        }
        sync.stage = Stage::Dialing;
        self.dial(copy + COPIES_MAX);
    }

    pub(super) fn bulk_connected(&mut self, copy: usize) {
        let epoch = self.record.epoch;
        let waits = |s: &&mut Sync| s.stage == Stage::Dialing && s.lost.is_none();
        match self.syncs.get_mut(&copy).filter(waits) {
            Some(sync) => {
                let ticket = sync.ticket;
                let message = Message::SyncBulk { epoch, ticket };
                self.send(CopySet::one(copy).bulk(), message, None);
                self.ask_maps(copy);
            }
            None => self.actions.push_back(Action::Hangup(copy + COPIES_MAX)),
        }
    }

    fn ask_maps(&mut self, copy: usize) {
        let size = self.record.size;
        // Writes under way may be before or after the master's answer; they count as written since.
        let mut begun = DirtyMap::new(size);
        for (_, p) in self.pending.iter().filter(|(_, p)| p.kind.is_write()) {
            begun.set_span(p.span);
        }
        let Some(sync) = self.syncs.get_mut(&copy) else {
            return;
        };
        sync.stage = Stage::Mapping;
        sync.begun = begun;
        sync.todo = DirtyMap::new(size);
        self.ask_range(copy, 0);
    }

    fn ask_range(&mut self, copy: usize, first: u64) {
        let chunks = self.record.size.div_ceil(CHUNK);
        let count = (chunks - first).min(u64::from(MAP_CHUNKS));
        let span = Span {
            offset: first * CHUNK,
            len: (count * CHUNK) as u32,
        };
        let Some(sync) = self.syncs.get_mut(&copy) else {
            return;
        };
        sync.ranges = Ranges {
            span: Some(span),
            ..Ranges::default()
        };
        let session = sync.session;
        for from in [self.master, copy] {
            let origin = Origin::Sync {
                copy,
                session,
                step: Step::Map,
            };
            self.request(origin, Kind::Map, span, false, None, CopySet::one(from));
        }
    }

    pub(super) fn map_answered(
        &mut self,
        from: usize,
        seq: Seq,
        status: Status,
        dirty: &[u64],
        allocated: &[u64],
    ) {
        let Some((copy, session, _, span)) = self.query_ended(from, seq, Kind::Map, status) else {
            return;
        };
        let words = (u64::from(span.len) / CHUNK).div_ceil(64) as usize;
        let fits = allocated.len() == words && (dirty.is_empty() || dirty.len() == words);
        if status != Status::Ok || !fits {
            return self.break_off(copy, "marks and holes could not be read");
        }
        let Some(sync) = self.sync_of(copy, session) else {
            return;
        };
        if from == copy {
            sync.ranges.target = Some(allocated.to_vec());
        } else {
            // A master without marks for the target knows nothing of it.
            let dirty = if dirty.is_empty() {
                vec![u64::MAX; words]
            } else {
                dirty.to_vec()
            };
            sync.ranges.master = Some((dirty, allocated.to_vec()));
        }
        self.range_known(copy);
    }

    fn range_known(&mut self, copy: usize) {
        let chunks = self.record.size.div_ceil(CHUNK);
        let Some(sync) = self.syncs.get_mut(&copy) else {
            return;
        };
        let (Some(span), Some((dirty, here)), Some(there)) =
            (sync.ranges.span, &sync.ranges.master, &sync.ranges.target)
        else {
            return;
        };
        let first = span.offset / CHUNK;
        let end = first + u64::from(span.len) / CHUNK;
        for chunk in first..end {
            let (word, bit) = ((chunk - first) as usize / 64, (chunk - first) % 64);
            // A chunk that is a hole on both is zeros on both.
            if dirty[word] & (here[word] | there[word]) & (1 << bit) != 0 {
                sync.todo.set(Chunk(chunk as u32));
            }
        }
        if end < chunks {
            return self.ask_range(copy, end);
        }
        let begun = std::mem::replace(&mut sync.begun, DirtyMap::new(0));
        begun.iter().for_each(|c| sync.todo.set(c));
        sync.ranges = Ranges::default();
        sync.total = sync.todo.count();
        sync.stage = Stage::Copying;
        let total = sync.total;
        self.mirrors.insert(copy);
        self.mirror_under_way(copy);
        let node = &self.record.copies[copy].node;
        let text = format!("copy on {node}: {total} chunks to compare");
        self.event("6 mirrored", text);
        // The in-sync copies mark nothing for it any more.
        let message = Message::EpochChange(self.configuration());
        self.send(self.ready, message, None);
        self.advance_syncs();
    }

    /// A guest's write begins: to which targets does it go?
    pub(super) fn mirror_to(&mut self, span: Span) -> CopySet {
        let mut to = CopySet::EMPTY;
        for (copy, sync) in &mut self.syncs {
            if sync.stage == Stage::Mapping {
                sync.begun.set_span(span);
            } else if self.mirrors.has(*copy) {
                if mutants::on(Mutant::MirrorIntoDirty) {
                    span.chunks().for_each(|c| {
                        sync.todo.clear(c);
                    });
                }
                // S11: also into chunks that are still to be copied. Those are marked on the master, but another in-sync copy may
                // have had no reason to mark them, and marks nothing while writes are mirrored: it would not know that the
                // target lacks this one. What falls into marked chunks does no harm: they are locked against writes while they
                // are copied, and stay marked until then.
                to.insert(*copy);
            }
        }
        to
    }

    /// Writes under way when `copy` became mirrored go to it, too. S11: B has not got such a write when its connection breaks; it
    /// comes back, is told that writes are mirrored, gets the write again and does not mark it.
    fn mirror_under_way(&mut self, copy: usize) {
        self.peers[copy].taken_up = self.now;
        for seq in self.pending.in_order() {
            let ordinary = |p: &&mut super::Pending<D>| {
                let ordinary = matches!(
                    p.origin,
                    Origin::Guest(_) | Origin::Abandoned | Origin::Scrub { .. }
                );
                p.kind.is_write() && ordinary
            };
            let Some(p) = self.pending.get_mut(seq).filter(ordinary) else {
                continue;
            };
            p.waiting.insert(copy);
            // The other copies' attempts go on as they are.
            let failed = p.failed;
            self.transmit(seq, CopySet::one(copy));
            if let Some(p) = self.pending.get_mut(seq) {
                p.failed = failed;
            }
        }
    }

    pub(super) fn target_done(&mut self, copy: usize) {
        if let Some(sync) = self.syncs.get_mut(&copy)
            && sync.stage == Stage::Ending
        {
            sync.stage = Stage::Synced;
        }
    }

    // ---- the end of a session

    /// The session with `copy` is over; it is tried again later.
    pub(super) fn break_off(&mut self, copy: usize, why: &str) {
        let taking_in = self
            .change
            .as_ref()
            .is_some_and(|c| c.proposed.copies[copy].status == CopyStatus::InSync);
        let Some(sync) = self.syncs.get_mut(&copy) else {
            return;
        };
        let first = sync.lost.is_none();
        if first {
            for link in [copy, copy + COPIES_MAX] {
                self.actions.push_back(Action::Hangup(link));
            }
            self.unlink(copy, why);
        }
        if taking_in {
            // S4: were its answers waived now and the swap done already, writes would complete without a member.
            if let Some(sync) = self.syncs.get_mut(&copy) {
                sync.lost = Some(why.into());
            }
            return;
        }
        let Some(sync) = self.syncs.remove(&copy) else {
            return;
        };
        let node = self.record.copies[copy].node.clone();
        self.event("6 sync broke off", format!("copy on {node}: {why}"));
        self.damp(copy);
        if self.mirrors.has(copy) {
            self.mirrors.remove(copy);
            // Before anything that its answers held back counts as stable.
            let message = Message::EpochChange(self.configuration());
            self.send(self.ready, message, None);
        }
        self.forget_target(copy);
        for chunk in sync.chunks.keys() {
            if sync.chunks[chunk] != ChunkState::Waiting {
                self.release(self.chunk_span(*chunk));
            }
        }
    }

    /// Nobody waits for this target any more.
    fn forget_target(&mut self, copy: usize) {
        for seq in self.pending.in_order() {
            let Some(p) = self.pending.get_mut(seq) else {
                continue;
            };
            if matches!(p.origin, Origin::Sync { copy: of, .. } if of == copy) {
                self.pending.remove(seq);
            } else if p.waiting.has(copy) {
                p.waiting.remove(copy);
                self.settle(seq);
            }
        }
    }

    /// The sync of a copy that is not in sync is not begun now, because of others: it is tried again soon.
    pub fn on_put_off(&mut self, now: Nanos, copy: usize, why: &str) {
        self.now = now;
        if !self.ended() && !self.in_sync.has(copy) && !self.syncs.contains_key(&copy) {
            self.put_off(copy, why);
        }
    }

    /// Nothing has begun yet on the target, so there is nothing to end but the connection.
    pub(super) fn put_off(&mut self, copy: usize, why: &str) {
        if self.syncs.remove(&copy).is_some() {
            self.actions.push_back(Action::Hangup(copy));
        }
        // Why it was lost stays worth knowing: it may be waited for in vain.
        let before = self.peers[copy].why.split("; it waits").next();
        let why = match before.filter(|b| !b.is_empty() && !b.starts_with("it waits")) {
            Some(before) => format!("{before}; {why}"),
            None => why.to_string(),
        };
        self.unlink(copy, &why);
        self.peers[copy].sync_after = self.now.after(PUT_OFF);
    }

    /// Whether the copy is, or may be, the target of a sync, so that a link to it is for one.
    pub fn is_absent(&self, copy: usize) -> bool {
        !self.in_sync.has(copy)
    }

    /// Whether a session with the copy goes on.
    pub fn is_syncing(&self, copy: usize) -> bool {
        self.syncs.contains_key(&copy)
    }

    /// Puts the next sync of `copy` off, longer each time.
    pub(super) fn damp(&mut self, copy: usize) {
        let now = self.now;
        let peer = &mut self.peers[copy];
        let wait = BACK_OFF.0 << peer.broke_off.min(BACK_OFF_DOUBLINGS);
        peer.broke_off += 1;
        peer.sync_after = now.after(Nanos(wait));
    }

    /// `copy` was in sync and is lost.
    pub(super) fn forgive(&mut self, copy: usize) {
        let peer = &mut self.peers[copy];
        if self.now.since(peer.in_sync_since) >= FORGIVEN {
            peer.broke_off = 0;
        }
    }

    /// Ends all sessions; whether none is left.
    pub(super) fn break_off_all(&mut self, why: &str) -> bool {
        for copy in self.targets().iter() {
            self.break_off(copy, why);
        }
        self.syncs.is_empty()
    }

    /// Whether the change under way makes a member of a target.
    pub(super) fn taking_in(&self) -> bool {
        let joins = |c: &super::Change| {
            let members = membership::with_status(&c.proposed, CopyStatus::InSync);
            !members.without(self.in_sync).is_empty()
        };
        self.change.as_ref().is_some_and(joins)
    }

    /// Those that were lost while a change might have taken them in, once that is decided.
    pub(super) fn end_lost_sessions(&mut self) {
        if self.change.is_some() {
            return;
        }
        let lost: Vec<(usize, String)> = self
            .syncs
            .iter()
            .filter_map(|(copy, s)| Some((*copy, s.lost.clone()?)))
            .collect();
        for (copy, why) in lost {
            self.break_off(copy, &why);
        }
    }

    // ---- time

    pub(super) fn tick_syncs(&mut self) {
        self.end_lost_sessions();
        self.dial_targets();
        let scrub = self.scrub.iter().filter(|s| s.is_running());
        let copying = self.syncs.values().map(|s| &s.throttle);
        let floor = copying
            .chain(scrub.map(|s| &s.throttle))
            .all(Throttle::is_at_floor);
        if let Some(average) = self.latency.period(self.now, !floor) {
            let limit = self.latency.limit();
            for sync in self.syncs.values_mut() {
                sync.throttle.weigh(average, limit);
                sync.measure(self.now);
            }
            if let Some(scrub) = &mut self.scrub {
                scrub.throttle.weigh(average, limit);
                scrub.measure(self.now);
            }
        }
        for copy in self.targets().iter() {
            let sync = &self.syncs[&copy];
            let (stage, since) = (sync.stage, sync.since);
            let silent = self.now.since(self.peers[copy].heard);
            let waits = self.longest_wait(copy);
            if stage > Stage::Marking && silent >= self.timing.silence {
                self.break_off(copy, &format!("silent for {} ms", silent.as_ms()));
            } else if stage <= Stage::Dialing && self.now.since(since) >= self.timing.late {
                self.break_off(copy, "it did not begin in time");
            } else if waits >= self.timing.late {
                let text = format!("a request unanswered for {} ms", waits.as_ms());
                self.break_off(copy, &text);
            }
        }
    }

    /// How long `copy` has left a request unanswered. A request that another copy was asked before, or that waited while this
    /// one was away, is not its fault: counted from when the guest asked, a copy that takes over from one that was late is
    /// late at once, and all of them are put out one after the other.
    pub(super) fn longest_wait(&self, copy: usize) -> Nanos {
        let since = self.peers[copy].taken_up;
        let waits = self
            .pending
            .iter()
            .filter(|(_, p)| p.waiting.has(copy))
            .map(|(_, p)| p.asked.max(since))
            .min();
        waits.map_or(Nanos(0), |asked| self.now.since(asked))
    }

    /// Targets that have taken a configuration.
    pub(super) fn begun_targets(&self) -> CopySet {
        let begun = |c: &usize| self.syncs[c].stage > Stage::Opening;
        self.targets().iter().filter(begun).collect()
    }

    /// Targets that hear heartbeats: what they hold is marked elsewhere, so that their logs may retire regions, too.
    pub(super) fn beating_targets(&self) -> CopySet {
        let marked = |c: &usize| self.syncs[c].stage > Stage::Marking;
        self.targets().iter().filter(marked).collect()
    }

    /// Copies whose sessions are not worth going on: enough others are nearer to the end (PROTOCOL 6).
    pub(super) fn surplus(&self) -> CopySet {
        let staying = self
            .in_sync
            .iter()
            .filter(|c| !self.record.copies[*c].leaving)
            .count();
        let need = (usize::from(self.record.replicas_wanted) + 1).saturating_sub(staying);
        let racing = self
            .syncs
            .iter()
            .filter(|(c, s)| s.stage >= Stage::Copying && !self.record.copies[**c].leaving)
            .map(|(c, s)| (s.todo.count(), *c));
        resync::surplus(need, racing.collect())
    }

    /// The span of a write or of a locked chunk is free: starts what waited for it.
    pub(super) fn release(&mut self, span: Span) {
        for next in self.overlaps.release(span) {
            self.start_work(next);
        }
    }

    pub(super) fn start_work(&mut self, work: Work<D>) {
        match work {
            Work::Guest(request) => self.start_write(request),
            Work::Chunk {
                copy,
                session,
                chunk,
            } => self.chunk_locked(copy, session, chunk),
            Work::Repair { copy, span } => self.repair(copy, span),
            Work::Scrub { id, chunk } => self.held(id, chunk),
        }
    }
}
