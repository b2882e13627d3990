//! Requests: from the guest to the copies, and back when the rules allow (PROTOCOL 2, 3, 4, 7). A read is the master's, which holds every
//! completed write (S10).

use super::scrub::Step as ScrubStep;
use super::sync::Step;
use super::{
    Action, Attachment, CopySet, Done, Kind, Op, Origin, Outcome, Payload, Pending, Phase,
    RequestId, Submitted, Work,
};
use crate::replication::ids::{CHUNK, Chunk, Nanos, Seq, Span};
use crate::replication::message::{Message, Request, Status};
use crate::replication::mutants::{self, Mutant};
use crate::replication::replica::REQUESTS_MAX;

/// A takeover is no suspension: whatever the volume's deadline, requests wait this long for it. Below the 60 s after
/// which Linux guests begin to report hung tasks.
const TAKEOVER: Nanos = Nanos::from_ms(30_000);
/// A change of the record that takes longer than this counts as not serving.
const REGISTRY_PATIENCE: Nanos = Nanos::from_ms(1_000);

impl<D: Payload> Attachment<D> {
    /// A request of the guest. A write's `data` was snapshotted once; a read's may be the guest memory to fill.
    pub fn submit(&mut self, now: Nanos, id: RequestId, op: Op, data: Option<D>) {
        self.now = now;
        let request = Submitted { id, op, data };
        if self.failing_requests() {
            self.complete(id, Outcome::IoError, None);
        } else if self.not_serving_since.is_some()
            // S11: it may have sent its last flush, and the logs are emptied next.
            || self.phase == Phase::Leaving
            || self.pending.len() >= REQUESTS_MAX / 2
            // 2.2, ring order: a swap of the record ends a suspension between two ticks; what came before goes first.
            || !self.held.is_empty()
        {
            self.held.push_back(request);
        } else {
            self.begin(request);
        }
    }

    /// What the request `seq` is and when it was taken in, while it is under way.
    pub fn under_way(&mut self, seq: Seq) -> Option<(Op, Nanos)> {
        let p = self.pending.get_mut(seq)?;
        let (span, fua) = (p.span, p.fua);
        let op = match p.kind {
            Kind::Read => Op::Read(span),
            Kind::Write => Op::Write { span, fua },
            Kind::Zero { unmap } => Op::Zero { span, unmap, fua },
            Kind::Flush { .. } => Op::Flush,
            // Of a sync: not the guest's.
            Kind::Data | Kind::Hash | Kind::Map | Kind::Mark | Kind::Grow { .. } => return None,
        };
        Some((op, p.submitted))
    }

    /// Whether the failure mode allows serving with the copies in sync now (PROTOCOL 7).
    pub fn mode_serves(&self) -> bool {
        self.record
            .failure_mode
            .serves(self.record.replicas_wanted, self.in_sync.len())
    }

    /// Suspended for longer than the volume's deadline: requests are failed until it can serve again (PROTOCOL 7).
    fn failing_requests(&self) -> bool {
        let mut deadline = Nanos::from_ms(self.record.suspend_deadline_ms);
        if self.phase != Phase::Serving {
            deadline = deadline.max(TAKEOVER);
        }
        self.not_serving_since
            .is_some_and(|since| self.now.since(since) >= deadline)
    }

    pub(super) fn begin(&mut self, request: Submitted<D>) {
        match request.op {
            Op::Write { span, .. } | Op::Zero { span, .. } => {
                // S16: an overlapping write under way goes first.
                if let Some(work) = self.overlaps.claim(span, Work::Guest(request)) {
                    self.start_work(work);
                }
            }
            Op::Read(span) if self.reconcile.is_undecided(span) => {
                self.await_decision(request, span)
            }
            Op::Read(span) => {
                self.start_read(Origin::Guest(request.id), span, self.master, request.data)
            }
            Op::Flush => self.start_flush(Origin::Guest(request.id)),
        }
    }

    /// The write's span is claimed.
    pub(super) fn start_write(&mut self, request: Submitted<D>) {
        let (kind, span, fua) = match request.op {
            Op::Write { span, fua } => (Kind::Write, span, fua),
            Op::Zero { span, unmap, fua } => (Kind::Zero { unmap }, span, fua),
            Op::Read(_) | Op::Flush => return,
        };
        if self.reconcile.is_undecided(span) {
            return self.await_decision(request, span);
        }
        self.unflushed = true;
        let to = self.in_sync.or(self.mirror_to(span));
        self.request(Origin::Guest(request.id), kind, span, fua, request.data, to);
    }

    fn start_read(&mut self, origin: Origin, span: Span, copy: usize, data: Option<D>) {
        self.request(origin, Kind::Read, span, false, data, CopySet::one(copy));
    }

    pub(super) fn start_flush(&mut self, origin: Origin) {
        // Writes before this point have all completed, so every in-sync copy has applied them.
        let covers = self.pending.low_water(|p| p.kind.is_write());
        self.unflushed = false;
        self.flushed_at = self.now;
        // S11: a region leaves the logs when its writes are durable on the targets of syncs, too.
        let to = if mutants::on(Mutant::FlushOneCopy) {
            CopySet::one(
                self.local
                    .filter(|c| self.in_sync.has(*c))
                    .unwrap_or(self.master),
            )
        } else {
            self.in_sync.or(self.mirrors)
        };
        self.request(
            origin,
            Kind::Flush { covers },
            Span { offset: 0, len: 0 },
            false,
            None,
            to,
        );
    }

    pub(super) fn request(
        &mut self,
        origin: Origin,
        kind: Kind,
        span: Span,
        fua: bool,
        data: Option<D>,
        waiting: CopySet,
    ) {
        let pending = Pending {
            origin,
            kind,
            span,
            fua,
            data,
            waiting,
            tried: if kind == Kind::Read {
                waiting
            } else {
                CopySet::EMPTY
            },
            unreadable: CopySet::EMPTY,
            submitted: self.now,
            asked: self.now,
            failed: None,
            full: false,
            no_space: CopySet::EMPTY,
        };
        let seq = self
            .pending
            .insert(pending)
            .expect("submit keeps requests below IN_FLIGHT_MAX");
        // Copies that are down for a moment get it when they are back (resend), or are ejected.
        self.transmit(seq, waiting.and(self.ready.or(self.targets())));
    }

    /// Sends the request `seq` to copies that take requests.
    pub(super) fn transmit(&mut self, seq: Seq, to: CopySet) {
        let epoch = self.record.epoch;
        let Some(p) = self.pending.get_mut(seq) else {
            return;
        };
        // S16: one attempt at a time. Sent again while marked as failed, it would be retried beside this attempt; the
        // second would reach the disk after the first completed, and undo an overlapping write that followed.
        if !to.is_empty() {
            p.failed = None;
            p.no_space = p.no_space.without(to);
        }
        let (span, fua) = (p.span, p.fua);
        let request = Request {
            epoch,
            seq,
            span,
            fua,
        };
        // What a sync asks of its target goes over the bulk link; but a write, which is logged, where writes go.
        let bulk = match p.origin {
            Origin::Sync { copy, step, .. }
                if step != Step::LastFlush && !p.kind.is_write() && Some(copy) != self.local =>
            {
                CopySet::one(copy).and(to)
            }
            _ => CopySet::EMPTY,
        };
        let (message, data) = match p.kind {
            Kind::Read => (Message::Read(request), p.data.clone()),
            Kind::Write => (Message::Write(request), p.data.clone()),
            Kind::Zero { unmap } => (Message::WriteZeroes { request, unmap }, None),
            Kind::Flush { .. } => (Message::Flush { epoch, seq }, None),
            Kind::Data if p.data.is_none() => {
                let unmap = true;
                (Message::WriteZeroes { request, unmap }, None)
            }
            Kind::Data => (Message::SyncData(request), p.data.clone()),
            Kind::Hash => (Message::SyncHash(request), None),
            Kind::Map => {
                let copy = match p.origin {
                    Origin::Sync { copy, .. } => copy,
                    // Only its holes are of interest: of itself a copy has no bitmap.
                    _ => p.waiting.iter().next().unwrap_or_default(),
                };
                let message = Message::MapRead {
                    epoch,
                    seq,
                    copy: self.record.copies[copy].copy_id,
                    first: Chunk((span.offset / CHUNK) as u32),
                    count: (u64::from(span.len) / CHUNK) as u32,
                };
                (message, None)
            }
            Kind::Mark => {
                let Origin::Sync { copy, .. } = p.origin else {
                    return;
                };
                (self.mark_message(copy, seq), None)
            }
            Kind::Grow { to: size } => (Message::Grow { epoch, seq, size }, None),
        };
        self.send(to.without(bulk).or(bulk.bulk()), message, data);
    }

    /// A copy is back on the same configuration: everything it has not acknowledged goes out again, in order.
    pub(super) fn resend(&mut self, copy: usize) {
        for seq in self.pending.in_order() {
            if self
                .pending
                .get_mut(seq)
                .is_some_and(|p| p.waiting.has(copy))
            {
                self.transmit(seq, CopySet::one(copy));
            }
        }
    }

    // ---- answers

    pub(super) fn acked(&mut self, copy: usize, seq: Seq, status: Status) {
        let others = self.in_sync.without(CopySet::one(copy));
        let (only, last) = (others.without(self.failing).is_empty(), self.is_last(copy));
        let Some(p) = self.pending.get_mut(seq) else {
            return;
        };
        if !p.waiting.has(copy) || p.kind.is_query() {
            return;
        }
        if let Kind::Grow { to } = p.kind {
            return self.room_answered(copy, seq, to, status);
        }
        if status != Status::Ok && self.syncs.contains_key(&copy) {
            return self.target_failed(copy, status);
        }
        // Whatever it says of its disk from now on (PROTOCOL 3).
        self.peers[copy].died |= status == Status::Io;
        match status {
            Status::Ok => p.waiting.remove(copy),
            Status::Stale => return self.outbid_by(copy),
            // Nobody can take over: the guest waits for space (PROTOCOL 7), or is told (EIO).
            Status::NoSpace if only => {
                p.failed = Some(status);
                p.no_space.insert(copy);
                return self.disk_full(copy, seq);
            }
            Status::Io if last => {
                p.failed = Some(status);
                p.waiting.remove(copy);
            }
            // S3, S17: A is lost and not put out yet, and this disk fails. A may have the write, or be back and get it, and this copy
            // is put out: so its bit stays, for A's answer alone completes nothing, and the guest is told nothing before the
            // deadline.
            Status::Io => return self.lose(copy, "its disk failed a write or flush"),
            Status::NoSpace => return self.lose(copy, "its disk is full"),
        }
        self.settle(seq);
    }

    /// Whether `copy` is the only member, and none is about to be: what its disk cannot do nobody else can do, or has done.
    pub(super) fn is_last(&self, copy: usize) -> bool {
        self.in_sync.without(CopySet::one(copy)).is_empty() && !self.taking_in()
    }

    fn target_failed(&mut self, copy: usize, status: Status) {
        match status {
            Status::Stale => self.outbid_by(copy),
            Status::NoSpace => self.break_off(copy, "its disk is full"),
            _ => self.break_off(copy, "its disk failed a write or flush"),
        }
    }

    /// The only copy is full. The write stays pending; it is tried again at each tick until the deadline.
    fn disk_full(&mut self, copy: usize, seq: Seq) {
        if let Some(p) = self.pending.get_mut(seq) {
            // What a scrub wants to write there suspends nobody: it is given up (`retry_full`).
            p.full = !matches!(p.origin, Origin::Scrub { .. });
        }
        self.peers[copy].why =
            format!("the disk of node {} is full", self.record.copies[copy].node);
        self.weigh_serving();
    }

    /// Ends the request if nobody's answer is missing any more.
    pub(super) fn settle(&mut self, seq: Seq) {
        let Some(p) = self.pending.get_mut(seq) else {
            return;
        };
        // S4: the bit of a copy that is being ejected stays until the record says that it is out.
        if !p.waiting.is_empty() {
            return;
        }
        let Some(p) = self.pending.remove(seq) else {
            return;
        };
        let mut outcome = if p.failed.is_some() {
            Outcome::IoError
        } else {
            Outcome::Ok
        };
        // What a target holds of a sync is no guest's to lose.
        if p.kind.is_write() && !p.fua && !matches!(p.origin, Origin::Sync { .. }) {
            self.newest = self.newest.max(seq);
        }
        if matches!(p.origin, Origin::Guest(_)) && p.kind.is_write() {
            self.latency.add(self.now.since(p.submitted));
        }
        if let Kind::Flush { covers } = p.kind
            && outcome == Outcome::Ok
            && !matches!(p.origin, Origin::Sync { .. })
        {
            // S5, S13: every in-sync copy has it on stable storage; regions may retire up to here. S11: not before all chunks
            // are decided. A has a write that B never got; were the region to leave A's log, nobody would compare it again.
            if self.reconcile.is_decided() {
                self.stable = self.stable.max(Seq(covers.0 - 1));
            }
            self.pressure = false;
            // S5: write completed, the only copy's machine loses power and the write, flush: this flush is not what
            // makes that write durable, and the guest has to know.
            // Nor is any other that was asked before the guest knew: each may be another program's.
            if matches!(p.origin, Origin::Guest(_)) {
                if std::mem::take(&mut self.lost_unflushed) {
                    self.flushes_fail_through = self.pending.newest();
                }
                if seq <= self.flushes_fail_through {
                    outcome = Outcome::IoError;
                }
            }
        }
        if p.kind.is_write() && matches!(p.origin, Origin::Guest(_) | Origin::Abandoned) {
            self.release(p.span);
        }
        match p.origin {
            Origin::Guest(id) => self.finish(Done {
                id,
                read: false,
                outcome,
                data: None,
            }),
            Origin::Background | Origin::Abandoned | Origin::Grow => {}
            Origin::Reconcile { chunk } => self.chunk_written(chunk, outcome),
            Origin::Reconciled => self.reconciled(outcome),
            Origin::Leave => self.left_flushed(outcome),
            Origin::Sync {
                copy,
                session,
                step,
            } => self.step_ended(copy, session, step),
            Origin::Repair { copy } => self.repaired(copy, p.span),
            Origin::Scrub {
                id,
                step: ScrubStep::Write(chunk),
            } => self.mended(id, chunk, outcome),
            Origin::Scrub { .. } => {}
        }
    }

    pub(super) fn read_answered(&mut self, copy: usize, seq: Seq, status: Status, data: Option<D>) {
        let Some(p) = self.pending.get_mut(seq) else {
            return;
        };
        if !p.waiting.has(copy) || p.kind != Kind::Read {
            return;
        }
        let whole = match &data {
            Some(data) => data.count() == p.span.len as usize,
            // Straight into the reader's memory: only the copy of this process can do that.
            None => Some(copy) == self.local && p.data.is_some(),
        };
        if status == Status::Ok && !whole {
            return self.lose(
                copy,
                "it answered a read with other bytes than were asked for",
            );
        }
        match status {
            Status::Ok => {
                let Some(p) = self.pending.remove(seq) else {
                    return;
                };
                match p.origin {
                    Origin::Guest(id) => {
                        self.latency.add(self.now.since(p.submitted));
                        self.finish(Done {
                            id,
                            read: true,
                            outcome: Outcome::Ok,
                            data,
                        });
                        self.repair_all(p.unreadable, p.span);
                    }
                    Origin::Sync {
                        copy,
                        session,
                        step: Step::Read(chunk),
                    } => self.chunk_for(copy, session, chunk, p.span, data),
                    Origin::Repair { copy } => self.repair_with(copy, p.span, data),
                    Origin::Reconcile { chunk } => self.chunk_read(chunk, copy, data),
                    Origin::Scrub {
                        id,
                        step: ScrubStep::Read(chunk),
                    } => self.mend_with(id, chunk, p.span, data),
                    Origin::Scrub { .. }
                    | Origin::Background
                    | Origin::Abandoned
                    | Origin::Grow
                    | Origin::Reconciled
                    | Origin::Sync { .. }
                    | Origin::Leave => {}
                }
            }
            Status::Stale => self.outbid_by(copy),
            Status::Io | Status::NoSpace => self.read_elsewhere(seq),
        }
    }

    /// The copy asked cannot answer: ask another in-sync one; the last one's error is the guest's.
    fn read_elsewhere(&mut self, seq: Seq) {
        // S4, S17: A is to be ejected and the registry does not answer: until the record says that it is out, no write completes
        // without it, so it can answer when it is back. The master's unreadable sector is then no error of the guest's.
        let (candidates, ready, failing) = (self.in_sync, self.ready, self.failing);
        let Some(p) = self.pending.get_mut(seq) else {
            return;
        };
        if let Origin::Reconcile { chunk } = p.origin {
            let copy = p.waiting.iter().next().unwrap_or_default();
            self.pending.remove(seq);
            return self.chunk_read(chunk, copy, None);
        }
        p.unreadable = p.unreadable.or(p.waiting);
        // One whose connection is down answers when it is back, or is ejected: a pause, no error.
        let left = match p.origin {
            // Not of the one that is to be repaired; nor is a guest's write to wait behind the repair for one that is lost.
            Origin::Repair { copy } => candidates
                .without(p.tried)
                .without(failing)
                .without(CopySet::one(copy)),
            _ => candidates.without(p.tried),
        };
        match left.and(ready).iter().chain(left.iter()).next() {
            Some(next) => {
                p.tried.insert(next);
                p.waiting = CopySet::one(next);
                p.asked = self.now;
                self.transmit(seq, CopySet::one(next).and(ready));
            }
            None => {
                let Some(p) = self.pending.remove(seq) else {
                    return;
                };
                match p.origin {
                    Origin::Guest(id) => self.finish(Done {
                        id,
                        read: true,
                        outcome: Outcome::IoError,
                        data: None,
                    }),
                    Origin::Sync {
                        copy,
                        session,
                        step: Step::Read(chunk),
                    } => self.chunk_for(copy, session, chunk, p.span, None),
                    Origin::Repair { copy } => self.repair_with(copy, p.span, None),
                    Origin::Scrub {
                        id,
                        step: ScrubStep::Read(chunk),
                    } => self.mend_with(id, chunk, p.span, None),
                    _ => {}
                }
            }
        }
    }

    /// Copies left: reads that were theirs are asked again, nobody waits for their answers any more (PROTOCOL 5).
    pub(super) fn forget_copies(&mut self, out: CopySet) {
        let absent = self.in_sync.without(self.ready);
        for seq in self.pending.in_order() {
            let Some(p) = self.pending.get_mut(seq) else {
                continue;
            };
            if p.waiting.and(out).is_empty() {
                continue;
            }
            let from = p.waiting.iter().next().unwrap_or_default();
            p.waiting = p.waiting.without(out);
            // Of a scrub: what the others answer is asked anew (`outdate_scrub`).
            match p.origin {
                Origin::Scrub {
                    id,
                    step: ScrubStep::Holes,
                } => {
                    self.pending.remove(seq);
                    self.holes_known(id, None);
                    continue;
                }
                Origin::Scrub {
                    id,
                    step: ScrubStep::Hash(chunk, block),
                } => {
                    self.pending.remove(seq);
                    self.block_known(id, (chunk, block), from, None);
                    continue;
                }
                _ => {}
            }
            let session = matches!(
                p.origin,
                Origin::Sync { .. } | Origin::Repair { .. } | Origin::Grow
            );
            if !session && p.kind != Kind::Read && p.waiting.and(self.in_sync).is_empty() {
                // S3: A acknowledges, B does not; A goes too, then B is ejected. Whether A still has the write, its machine
                // may have lost power, is known when it is back: it gets the write again then.
                p.waiting = p.waiting.or(absent);
            }
            if let (Kind::Read, Origin::Reconcile { chunk }) = (p.kind, &p.origin) {
                let (chunk, copy) = (*chunk, p.waiting.iter().next().unwrap_or_default());
                self.pending.remove(seq);
                self.chunk_read(chunk, copy, None);
            } else if p.kind.is_query() {
                p.waiting = CopySet::one(self.master);
                p.tried = p.waiting;
                p.asked = self.now;
                self.transmit(seq, CopySet::one(self.master).and(self.ready));
            } else {
                if p.waiting.is_empty() && p.failed == Some(Status::NoSpace) {
                    // S17: the last copy is full, and is put out in favour of one that has the write: that one's answer counts.
                    p.failed = None;
                }
                self.settle(seq);
            }
        }
    }

    // ---- completion

    fn finish(&mut self, done: Done<D>) {
        if self.done.is_empty() && self.may_complete(&done) {
            self.complete(done.id, done.outcome, done.data);
        } else {
            self.done.push_back(done);
            self.release_done();
        }
    }

    /// Evaluated at completion (PROTOCOL 2.5, 4, 7).
    fn may_complete(&self, done: &Done<D>) -> bool {
        if done.outcome == Outcome::IoError {
            return true;
        }
        // S17: nothing completes OK while the mode says suspend. S8: no read without a lease.
        self.owns() && self.mode_serves() && (!done.read || self.lease_holds(self.now))
    }

    pub(super) fn release_done(&mut self) {
        for _ in 0..self.done.len() {
            let Some(done) = self.done.pop_front() else {
                break;
            };
            if self.may_complete(&done) {
                self.complete(done.id, done.outcome, done.data);
            } else {
                self.done.push_back(done);
            }
        }
    }

    fn complete(&mut self, id: RequestId, outcome: Outcome, data: Option<D>) {
        self.actions
            .push_back(Action::Complete { id, outcome, data });
    }

    /// Whether a read that was completed may be shown to the guest now, by a clock that is read after everything else: the process
    /// may have been stopped in between, and another attachment serve by now (S8).
    pub fn may_show_reads(&self, now: Nanos) -> bool {
        // What it completed before it left is as right as it was then.
        self.phase == Phase::Left || self.owns() && self.lease_holds(now)
    }

    /// Every in-sync copy but the one in this process acknowledged a heartbeat sent less than `lease` ago.
    fn lease_holds(&self, now: Nanos) -> bool {
        if mutants::on(Mutant::ReadWithoutLease) {
            return true;
        }
        self.in_sync
            .iter()
            .filter(|c| Some(*c) != self.local)
            .all(|c| {
                let sent = self.peers[c].lease;
                sent.is_some_and(|sent| now.since(sent) < self.timing.lease)
            })
    }

    // ---- time

    pub(super) fn tick_io(&mut self) {
        self.retry_full();
        self.weigh_serving();
        while self.not_serving_since.is_none() && self.pending.len() < REQUESTS_MAX / 2 {
            let Some(request) = self.held.pop_front() else {
                break;
            };
            self.begin(request);
        }
        self.release_done();
        if self.failing_requests() {
            self.fail_held();
        }
        let due = self.pressure || self.now.since(self.flushed_at) >= self.timing.background_flush;
        if self.phase == Phase::Serving && self.record.logged() && self.unflushed && due {
            self.start_flush(Origin::Background);
        }
    }

    /// Notes when serving stops and starts (PROTOCOL 7).
    pub(super) fn weigh_serving(&mut self) {
        match (self.why_not_serving(), self.not_serving_since) {
            (None, Some(_)) => {
                self.not_serving_since = None;
                let text = format!(
                    "serving with {} of {} copies",
                    self.in_sync.len(),
                    self.record.copies.len()
                );
                self.event("7 serve", text);
            }
            (Some(why), None) => {
                self.not_serving_since = Some(self.now);
                self.event("7 suspend", why);
            }
            _ => {}
        }
        if self.not_serving_since.is_none()
            && let Some(since) = self.lost_since.take()
        {
            self.failovers.push(self.now.since(since));
        }
    }

    /// Why no request is completed now, for the operator.
    pub fn why_not_serving(&self) -> Option<String> {
        if self.phase != Phase::Serving {
            return Some(format!("the attachment is {}", super::name(&self.phase)));
        }
        if !self.mode_serves() {
            return Some(format!(
                "{} copies are in sync where {} replicas are asked for, which the failure mode {} does not allow",
                self.in_sync.len(),
                self.record.replicas_wanted,
                self.record.failure_mode
            ));
        }
        if self.is_full() {
            return Some("the volume's only copy is on a full disk: make space there".into());
        }
        if self.in_sync.and(self.ready).is_empty() {
            return Some(format!(
                "no copy can be reached: {}",
                self.peers[self.master].why
            ));
        }
        let slow = self
            .change
            .as_ref()
            .is_some_and(|c| self.now.since(c.since) >= REGISTRY_PATIENCE);
        (slow && !self.all_answer()).then(|| "a copy was lost and the registry does not answer, so it cannot be put out of the in-sync set".into())
    }

    /// Whether all whose answers are mandatory give them: then nothing waits for a change of the record, whatever is to be changed.
    ///
    /// A target that has everything is to be taken in, or a member that is to be put out is back and it is not known whether it
    /// was: what completes is on every copy that the one record or the other names (S3). A member that comes back time and again
    /// only to fail, as one with a full disk does, is not back: or each time the deadline would begin anew (S17).
    fn all_answer(&self) -> bool {
        let stays = |c: usize| self.now.since(self.peers[c].taken_up) >= REGISTRY_PATIENCE;
        let answers = |c: usize| self.ready.has(c) && (!self.failing.has(c) || stays(c));
        self.in_sync.iter().all(answers) && self.syncs.values().all(|s| s.is_there())
    }

    /// Until the write succeeds, also while it is tried again: otherwise each attempt would end the suspension, and its
    /// deadline never came (S17).
    fn is_full(&self) -> bool {
        self.pending.iter().any(|(_, p)| p.full)
    }

    fn retry_full(&mut self) {
        let full: Vec<Seq> = self
            .pending
            .iter()
            .filter(|(_, p)| !p.no_space.and(p.waiting).is_empty())
            .map(|(seq, _)| seq)
            .collect();
        let over = self.failing_requests();
        for seq in full {
            if (over || self.asked_by_scrub(seq).is_some()) && self.give_up(seq) {
                continue;
            }
            if let Some(p) = self.pending.get_mut(seq) {
                p.asked = self.now;
                // S16: a target has not answered its first attempt when it is taken in. It is ready now, and not to be sent a second.
                let to = p.waiting.and(p.no_space).and(self.ready);
                self.transmit(seq, to);
            }
        }
    }

    /// The deadline passed and the last copy has no space for this write: the guest gets its error. `false` when the write itself
    /// must go on.
    ///
    /// S9: a target of a sync has the write and the last copy has not; were the target taken in then, the two would
    /// differ for good. So its session ends, and what the last copy's log holds is marked for it. Unless the swap that takes
    /// it in may have been done: then the write is tried on, and the copy without space for it is ejected. The same while
    /// another member is lost and not put out yet, for instance because the registry does not answer: it may have the write,
    /// and be back in time.
    fn give_up(&mut self, seq: Seq) -> bool {
        if self.taking_in() || self.in_sync.len() > 1 {
            if let Some(p) = self.pending.get_mut(seq)
                && let Origin::Guest(id) = p.origin
            {
                p.origin = Origin::Abandoned;
                self.complete(id, Outcome::IoError, None);
            }
            return false;
        }
        for copy in self.mirrors.iter() {
            self.break_off(
                copy,
                "the last in-sync copy has no space for a write that this one may have",
            );
        }
        if let Some(p) = self.pending.get_mut(seq) {
            // The failure stays noted.
            p.waiting = CopySet::EMPTY;
            self.settle(seq);
        }
        true
    }

    /// The suspend deadline passed: everything that waits is answered with an error (PROTOCOL 7).
    fn fail_held(&mut self) {
        while let Some(request) = self.held.pop_front() {
            self.complete(request.id, Outcome::IoError, None);
        }
        let guests = |w: &Work<D>| matches!(w, Work::Guest(_));
        for work in self.overlaps.take_waiting(guests) {
            if let Work::Guest(request) = work {
                self.complete(request.id, Outcome::IoError, None);
            }
        }
        for request in self.reconcile.drain_waiting() {
            if let Op::Write { span, .. } | Op::Zero { span, .. } = request.op {
                self.release(span);
            }
            self.complete(request.id, Outcome::IoError, None);
        }
        while let Some(done) = self.done.pop_front() {
            self.complete(done.id, Outcome::IoError, None);
        }
        // What the copies still work on keeps its place (S16) and is answered; only the guest stops waiting.
        // Not those at the copy of this process: its disk may be using the guest's memory. Unless that copy has failed:
        // it says so only when its disk has let go of everything.
        let local = self
            .local
            .filter(|c| !self.peers[*c].refused)
            .map_or(CopySet::EMPTY, CopySet::one);
        for seq in self.pending.in_order() {
            let Some(p) = self.pending.get_mut(seq) else {
                continue;
            };
            if let Origin::Guest(id) = p.origin
                && p.waiting.and(local).is_empty()
            {
                p.origin = Origin::Abandoned;
                self.complete(id, Outcome::IoError, None);
            }
        }
    }
}
