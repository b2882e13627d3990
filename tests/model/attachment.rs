//! What an attachment does, step by step: taking over, requests, changes of the record, syncs. Whom it ejects, takes in and
//! promotes, and what an answer of the registry says, the product's functions decide.

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::copy_state::Standing;
use lockstep::replication::ids::{Epoch, Tag};
use lockstep::replication::membership::{self, Facts};
use lockstep::replication::message::DiskState;
use lockstep::replication::mutants::Mutant;
use lockstep::replication::record::{Record, State as RecordState};
use lockstep::replication::registry_answer::{Answer, answer};
use lockstep::replication::takeover;

use super::bounds::Bound;
use super::copies::regions;
use super::record::{Rec, attachment, boot};
use super::state::{
    ALL, ATTACHMENTS, Attachment, CHUNKS, COPIES, Change, Flush, Phase, Purpose, Rule, State, Vote,
    Write, has,
};

impl Attachment {
    pub fn new(on: usize, record: Rec, revision: u64) -> Self {
        let before = record.record.attachment.as_ref();
        let node = super::record::node(on);
        Self {
            node: on,
            proven: before.is_some_and(|b| b.node == node),
            phase: Phase::Joining,
            asks: record.record.epoch.next(),
            held: record,
            revision,
            outbid: Epoch(0),
            change: None,
            attempts: 0,
            votes: [const { None }; COPIES],
            failing: CopySet::EMPTY,
            lease: CopySet::EMPTY,
            gaps: CopySet::EMPTY,
            accepted: [None; COPIES],
            writes: [const { None }; CHUNKS],
            flush: None,
            stable: 0,
            unflushed: 0,
            lost_unflushed: false,
            undecided: 0,
            flushed: false,
            syncs: [const { None }; COPIES],
        }
    }
}

/// The votes as the product's functions take them.
fn promised(votes: &[Option<Vote>; COPIES]) -> Vec<(usize, DiskState)> {
    let disk = |(c, v): (usize, &Option<Vote>)| match v {
        Some(Vote::Promised {
            boot: b,
            epoch,
            tag,
            log,
        }) => {
            let disk = DiskState {
                promised: *epoch,
                probe: false,
                epoch: *epoch,
                tag: *tag,
                boot_id: boot(c, *b),
                clean: false,
                regions: Some(regions(*log)),
            };
            Some((c, disk))
        }
        _ => None,
    };
    votes.iter().enumerate().filter_map(disk).collect()
}

impl State {
    /// The attachment ends; its connections close.
    pub fn ends(&mut self, a: usize) {
        for c in self.linked(a).iter() {
            self.copies[c].bound = None;
        }
        self.attachments[a] = None;
    }

    fn fences(&mut self, a: usize) {
        if self.registry.record.attachment == Some(a) {
            self.breaks(Rule::Liveness);
        }
        self.ends(a);
    }

    // ---- taking over

    /// Asks `c` for its promise.
    pub fn ask(&mut self, a: usize, c: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let asked = at.phase == Phase::Joining && at.held.in_sync.has(c) && at.votes[c].is_none();
        if !asked || !self.up.has(c) || !self.reaches(at.node, c) {
            return false;
        }
        if self.copies[c].standing != Standing::InSync {
            self.at_mut(a).votes[c] = Some(Vote::Out);
            return true;
        }
        match self.promises(a, c, bound) {
            None => return false,
            Some(false) => {
                let promised = self.copies[c].promised;
                let at = self.at_mut(a);
                at.outbid = at.outbid.max(promised);
                at.asks = at.held.record.epoch.max(at.outbid).next();
                at.votes = [const { None }; COPIES];
                self.compare(a, bound);
                return true;
            }
            Some(true) => {}
        }
        let copy = &self.copies[c];
        let fits = takeover::misfit(&self.at(a).held.record, copy.epoch, copy.tag).is_none();
        let vote = Vote::Promised {
            boot: copy.boot,
            epoch: copy.epoch,
            tag: copy.tag,
            log: copy.log,
        };
        self.at_mut(a).votes[c] = Some(if fits { vote } else { Vote::Out });
        true
    }

    /// Proposes itself, when who could answer has.
    pub fn claim(&mut self, a: usize, random: u64, bound: &Bound) -> bool {
        let at = self.at(a);
        if at.phase != Phase::Joining {
            return false;
        }
        let votes = promised(&at.votes);
        let silent: CopySet = at
            .held
            .in_sync
            .iter()
            .filter(|c| at.votes[*c].is_none())
            .collect();
        if silent
            .iter()
            .any(|c| self.up.has(c) && self.reaches(at.node, c))
        {
            return false;
        }
        let known = |c: usize| at.held.record.copies[c].boot_id;
        let boots = votes.iter().map(|(c, disk)| {
            let whole = bound.shims(Mutant::HighestCounter);
            let boot = known(*c).filter(|_| whole).unwrap_or(disk.boot_id);
            (*c, boot, disk.regions.is_some())
        });
        let record = &at.held.record;
        let Some(members) = takeover::members(record, boots, !silent.is_empty()) else {
            return false;
        };
        let (master, local) = (at.held.master, at.local());
        let master = if takeover::keeps_master(members, master, local) {
            master
        } else {
            membership::choose_master(record, members, local, random).unwrap_or(master)
        };
        let me = attachment(a, at.node);
        let claimed = (at.asks, tag(a, at.asks, at.attempts));
        let voters = votes.iter().map(|(c, disk)| (*c, disk));
        let next = takeover::claim(record, &me, members, voters, master, claimed);
        self.at_mut(a).phase = Phase::Claiming;
        self.propose(a, Purpose::Claim, next);
        true
    }

    /// The claim is the record.
    fn claimed(&mut self, a: usize, old: &Rec) {
        let at = self.at_mut(a);
        at.phase = Phase::Configuring;
        let votes = std::mem::take(&mut at.votes);
        let held = at.held;
        let mut differ = 0;
        let mut whole = false;
        for (c, vote) in votes.iter().enumerate() {
            let Some(Vote::Promised { boot: b, log, .. }) = vote else {
                continue;
            };
            whole |= old.record.copies[c].boot_id == Some(boot(c, *b));
            if held.in_sync.has(c) {
                differ |= log;
            }
        }
        if held.record.state == RecordState::Recovering {
            at.undecided = differ;
        }
        // S10: only when nobody is left who kept all may the guest miss what no flush covered.
        if !whole {
            self.power_lost();
        }
        let undecided = self.at(a).undecided;
        for k in (0..CHUNKS).filter(|k| !has(undecided, *k)) {
            self.decides(a, k, held.master);
        }
    }

    // ---- links

    /// The connection to `c` is gone; nobody is told what it had not delivered.
    pub fn unlink(&mut self, a: usize, c: usize, noticed: bool) {
        self.copies[c].bound = None;
        let writes = self.at_mut(a).writes.iter_mut().flatten();
        writes.for_each(|w| w.before.remove(c));
        if noticed {
            self.at_mut(a).lease.remove(c);
        }
        self.break_off(a, c);
    }

    /// Connects to a member again and sends it everything.
    pub fn attach(&mut self, a: usize, c: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        if !at.owns() || !at.held.in_sync.has(c) || !self.up.has(c) || !self.reaches(at.node, c) {
            return false;
        }
        let copy = &self.copies[c];
        if copy.bound == Some(a) {
            return false;
        }
        if copy.standing != Standing::InSync {
            // Its disk has failed: it never comes back.
            let at = self.at_mut(a);
            let news = !at.failing.has(c) || !at.gaps.has(c);
            at.gaps.insert(c);
            at.failing.insert(c);
            self.advance(a, bound);
            return news;
        }
        let record = &at.held.record;
        let boot_id = boot(c, copy.boot);
        let is = at.accepted[c]
            .map(|b| boot(c, b))
            .or(record.copies[c].boot_id);
        let gap = is.is_some_and(|b| b != boot_id);
        let others = at.held.in_sync.without(CopySet::one(c)).without(at.gaps);
        if gap && !others.is_empty() {
            // What no flush covered may be gone: it comes back by a delta.
            let at = self.at_mut(a);
            let news = !at.failing.has(c) || !at.gaps.has(c);
            at.gaps.insert(c);
            at.failing.insert(c);
            self.advance(a, bound);
            return news;
        }
        if let Some(other) = copy.bound {
            self.unlink(other, c, true);
        }
        if !self.configures(a, c, true) {
            let promised = self.copies[c].promised;
            let at = self.at_mut(a);
            let news = at.outbid < promised;
            at.outbid = at.outbid.max(promised);
            return news;
        }
        let boot = self.copies[c].boot;
        let at = self.at_mut(a);
        at.gaps.remove(c);
        if gap {
            // S3: what it acknowledged before the power cut says nothing now.
            at.accepted[c] = Some(boot);
            at.writes
                .iter_mut()
                .flatten()
                .for_each(|w| w.waiting.insert(c));
            at.flush.iter_mut().for_each(|f| f.waiting.insert(c));
            at.lost_unflushed |= at.unflushed != 0;
            let undecided = at.undecided;
            self.power_lost();
            for k in (0..CHUNKS).filter(|k| !has(undecided, *k)) {
                self.decides(a, k, c);
            }
        }
        let at = self.at_mut(a);
        let ejects = |change: &Change| !change.proposed.in_sync.has(c);
        if !at.change.as_ref().is_some_and(ejects) {
            at.failing.remove(c);
        }
        self.advance(a, bound);
        true
    }

    /// A member away for too long is to be ejected.
    pub fn give_up(&mut self, a: usize, c: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let away = at.owns() && at.held.in_sync.has(c) && self.copies[c].bound != Some(a);
        if !away || at.failing.has(c) {
            return false;
        }
        self.loses(a, c, bound);
        true
    }

    /// `c` is to be ejected.
    pub fn loses(&mut self, a: usize, c: usize, bound: &Bound) {
        self.at_mut(a).failing.insert(c);
        if bound.makes(Mutant::CompleteBeforeCas) {
            self.forget_copies(a, CopySet::one(c));
        }
        self.advance(a, bound);
    }

    /// Sends the newest configuration.
    pub fn configure(&mut self, a: usize, c: usize, bound: &Bound) -> bool {
        if self.copies[c].bound != Some(a) || self.is_current(a, c) {
            return false;
        }
        for k in 0..CHUNKS {
            // What was sent before it is there: logged and marked, if not written yet.
            if self.at(a).writes[k].is_some_and(|w| w.before.has(c)) {
                self.copies[c].notes(k);
            }
        }
        let writes = self.at_mut(a).writes.iter_mut().flatten();
        writes.for_each(|w| w.before.remove(c));
        if !self.configures(a, c, false) {
            let promised = self.copies[c].promised;
            let at = self.at_mut(a);
            at.outbid = at.outbid.max(promised);
            self.unlink(a, c, true);
        }
        self.advance(a, bound);
        true
    }

    // ---- the record

    fn propose_members(&mut self, a: usize, bound: &Bound) {
        let at = self.at(a);
        if !at.owns() || at.change.is_some() {
            return;
        }
        let Some(next) = self.next_members(a) else {
            return;
        };
        let at = self.at(a);
        let record = &at.held.record;
        let epoch = record.epoch.max(at.outbid).next();
        let boot = |c: usize| match &at.syncs[c] {
            Some(sync) => Some(boot(c, sync.boot)),
            None => at.accepted[c].map(|b| boot(c, b)),
        };
        let stamp = (epoch, tag(a, epoch, at.attempts));
        let next = membership::enter(record, next, stamp, boot);
        if bound.makes(Mutant::AmbiguousIsFailed) {
            self.at_mut(a).attempts += 1;
        }
        self.propose(a, Purpose::Members, next);
    }

    fn next_members(&self, a: usize) -> Option<Record> {
        let at = self.at(a);
        let synced = |c: &usize| at.syncs[*c].as_ref().is_some_and(|s| s.is_synced());
        let synced: CopySet = (0..COPIES).filter(synced).collect();
        let record = &at.held.record;
        let facts = Facts {
            failing: at.failing,
            synced,
            // Never more than are wanted.
            surplus: CopySet::EMPTY,
            ready: self.ready(a).or(synced),
            local: at.local(),
            settled: at.phase == Phase::Serving && record.state == RecordState::Active,
            random: 0,
        };
        membership::next(record, &facts)
    }

    fn propose(&mut self, a: usize, purpose: Purpose, proposed: Record) {
        self.at_mut(a).change = Some(Change {
            purpose,
            proposed: Rec::new(proposed),
            unknown: false,
            in_doubt: false,
        });
    }

    /// The registry swaps, or refuses, and says so.
    pub fn swap(&mut self, a: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let Some(change) = at.change.as_ref().filter(|c| !c.unknown) else {
            return false;
        };
        if at.revision == self.registry.revision {
            let proposed = change.proposed;
            self.swapped(&proposed);
            self.commit(a, bound);
        } else {
            self.compare(a, bound);
        }
        true
    }

    /// The registry does not answer. `arrives`: the swap is done nevertheless, at once or later.
    pub fn swap_unanswered(&mut self, a: usize, at_once: bool, bound: &Bound) -> bool {
        let at = self.at(a);
        let (Some(change), None) = (
            at.change.as_ref().filter(|c| !c.unknown),
            &self.registry.late,
        ) else {
            return false;
        };
        let (revision, proposed) = (at.revision, change.proposed);
        if at_once && revision != self.registry.revision {
            return false;
        }
        if at_once {
            self.swapped(&proposed);
        } else {
            self.registry.late = Some((revision, proposed));
        }
        let at = self.at_mut(a);
        if bound.makes(Mutant::AmbiguousIsFailed) {
            at.change = None;
            if at.phase == Phase::Claiming {
                at.phase = Phase::Joining;
                at.votes = [const { None }; COPIES];
            }
            self.settle_failing(a);
        } else if let Some(change) = &mut at.change {
            (change.unknown, change.in_doubt) = (true, true);
        }
        self.advance(a, bound);
        true
    }

    /// A swap that nobody had heard of any more arrives.
    pub fn swap_late(&mut self) -> bool {
        match self.registry.late.take() {
            Some((revision, record)) => {
                if revision == self.registry.revision {
                    self.swapped(&record);
                }
                true
            }
            None => false,
        }
    }

    /// The registry could not swap, and what was proposed is not what holds now: decided anew.
    pub fn decide_anew(&mut self, a: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let Some(change) = &at.change else {
            return false;
        };
        if change.purpose != Purpose::Members || change.in_doubt {
            return false;
        }
        let before = change.proposed;
        let mut other = *self;
        other.at_mut(a).change = None;
        other.settle_failing(a);
        other.end_lost(a);
        other.advance(a, bound);
        let same = |c: &Change| c.purpose == Purpose::Members && c.proposed == before;
        let live = other.attachments[a].as_ref();
        if live.is_some_and(|at| at.change.as_ref().is_some_and(same)) {
            return false;
        }
        *self = other;
        true
    }

    /// One that takes requests again is back in time.
    fn settle_failing(&mut self, a: usize) {
        let ready = self.ready(a);
        let at = self.at_mut(a);
        at.failing = at.failing.without(ready);
    }

    /// Reads the record: to know how a swap ended, or because a copy promised more to somebody.
    pub fn reads_record(&mut self, a: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let unknown = at.change.as_ref().is_some_and(|c| c.unknown);
        let outbid = at.owns() && at.outbid > at.held.record.epoch && at.change.is_none();
        if !unknown && !outbid {
            return false;
        }
        self.compare(a, bound);
        true
    }

    fn swapped(&mut self, to: &Rec) {
        let before = &self.registry.record;
        let (was, is) = (before.in_sync, to.in_sync);
        // S6: only a member is promoted, or who becomes one in the same step (S13).
        if !was.has(to.master) && !is.without(was).has(to.master) {
            self.breaks(Rule::S6);
        }
        for c in is.without(was).iter() {
            self.is_taken_in(c, to);
        }
        self.registry.record = *to;
        self.registry.revision += 1;
    }

    /// S13, S18: a copy becomes a member.
    fn is_taken_in(&mut self, c: usize, by: &Rec) {
        let Some(at) = by.attachment.and_then(|a| self.attachments[a].as_ref()) else {
            return;
        };
        let copy = &self.copies[c];
        // What a power cut took, or a failed disk, the boot or the disk tells.
        let kept = |c: usize| {
            let boot_id = boot(c, self.copies[c].boot);
            by.record.copies[c].boot_id == Some(boot_id)
                && self.copies[c].standing != Standing::Failed
        };
        let members = by.in_sync.without(CopySet::one(c));
        let same =
            |m: usize, k: usize| copy.data[k] == self.copies[m].data[k] || at.writes[k].is_some();
        let all_same = |m: usize| (0..CHUNKS).all(|k| same(m, k));
        let whole = copy.whole;
        let like_members = members.iter().filter(|m| kept(*m)).all(all_same);
        if kept(c) && !(copy.standing == Standing::InSync && like_members) {
            self.breaks(Rule::S13);
        }
        if !whole {
            self.breaks(Rule::S18);
        }
    }

    /// What the registry has, against what is held and proposed.
    fn compare(&mut self, a: usize, bound: &Bound) {
        let at = self.at(a);
        let proposed = at.change.as_ref().map(|c| &c.proposed.record);
        let found = (&self.registry.record.record, self.registry.revision);
        match answer((&at.held.record, at.revision), proposed, found) {
            Answer::Old => return,
            Answer::Proposed => return self.commit(a, bound),
            Answer::Superseded => {
                let other = self.registry.record.attachment;
                if at.owns() || other.is_some_and(|o| o != a) {
                    return self.fences(a);
                }
                // Joining, or a claim: from what the record says now.
                let (held, revision) = (self.registry.record, self.registry.revision);
                let at = self.at_mut(a);
                at.asks = held.record.epoch.max(at.outbid).next();
                at.change = None;
                at.votes = [const { None }; COPIES];
                at.phase = Phase::Joining;
                (at.held, at.revision) = (held, revision);
            }
            Answer::Held => {
                let at = self.at_mut(a);
                if let Some(change) = &mut at.change {
                    change.unknown = false;
                }
                if at.change.is_none() && at.owns() && at.outbid > at.held.record.epoch {
                    let mut next = at.held.record.clone();
                    let epoch = at.outbid.next();
                    next.advance(epoch, tag(a, epoch, at.attempts));
                    self.propose(a, Purpose::Raise, next);
                }
            }
        }
        self.advance(a, bound);
    }

    /// The proposal is the record now.
    fn commit(&mut self, a: usize, bound: &Bound) {
        let revision = self.registry.revision;
        let at = self.at_mut(a);
        let Some(change) = at.change.take() else {
            return;
        };
        at.revision = revision;
        let old = std::mem::replace(&mut at.held, change.proposed);
        let held = at.held;
        at.failing = at.failing.and(held.in_sync);
        let out = old.in_sync.without(held.in_sync);
        match change.purpose {
            Purpose::Claim => self.claimed(a, &old),
            Purpose::Members | Purpose::Raise => {
                for c in out.and(self.linked(a)).iter() {
                    self.unlink(a, c, true);
                }
                for c in held.in_sync.without(old.in_sync).iter() {
                    let at = self.at_mut(a);
                    at.gaps.remove(c);
                    at.accepted[c] = None;
                    at.lease.remove(c);
                    at.syncs[c] = None;
                }
                let at = self.at_mut(a);
                at.writes
                    .iter_mut()
                    .flatten()
                    .for_each(|w| w.stale = w.reconciles);
                self.config_changes(a);
                // S4: the ejection is in the record; only now may its writes complete without it.
                self.forget_copies(a, out);
                self.end_lost(a);
            }
            Purpose::Activate => self.at_mut(a).flushed = false,
        }
        self.advance(a, bound);
    }

    /// What is under way to a copy reaches it before its next configuration does.
    pub fn config_changes(&mut self, a: usize) {
        let links = self.linked(a);
        for write in self.at_mut(a).writes.iter_mut().flatten() {
            write.before = write.before.or(links.and(write.waiting));
        }
    }

    /// Nobody waits for them any more.
    fn forget_copies(&mut self, a: usize, out: CopySet) {
        let ready = self.ready(a);
        let at = self.at_mut(a);
        let in_sync = at.held.in_sync;
        let writes = at.writes.iter_mut().flatten().map(|w| &mut w.waiting);
        for waiting in writes.chain(at.flush.iter_mut().map(|f| &mut f.waiting)) {
            if waiting.and(out).is_empty() {
                continue;
            }
            *waiting = waiting.without(out);
            if waiting.and(in_sync).is_empty() {
                // S3: whether those that are away still have it is known when they are back.
                *waiting = waiting.or(in_sync.without(ready).without(out));
            }
        }
    }

    // ---- requests

    /// The guest writes chunk `k`.
    pub fn write(&mut self, a: usize, k: usize) -> bool {
        let at = self.at(a);
        let free = at.writes[k].is_none() && !has(at.undecided, k);
        if at.phase != Phase::Serving || !at.mode_serves() || !free || self.ready(a).is_empty() {
            return false;
        }
        let value = self.oracle.next;
        self.oracle.next += 1;
        self.oracle.may[k] |= 1 << value;
        let at = self.at(a);
        let waiting = at.held.in_sync.or(at.mirrors());
        self.begin_write(a, k, waiting, value, false);
        true
    }

    fn begin_write(&mut self, a: usize, k: usize, waiting: CopySet, value: u8, reconciles: bool) {
        let at = self.at_mut(a);
        at.writes[k] = Some(Write {
            value,
            waiting,
            before: CopySet::EMPTY,
            reconciles,
            stale: false,
        });
        at.stable &= !(1 << k);
        at.unflushed |= 1 << k;
        at.flush.iter_mut().for_each(|f| f.covers &= !(1 << k));
    }

    /// A write reaches the disk of `c`, and its answer is back.
    pub fn apply(&mut self, a: usize, k: usize, c: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let Some(write) = &at.writes[k] else {
            return false;
        };
        let sent = write.waiting.has(c) && self.copies[c].bound == Some(a);
        // Sent after a configuration that has not arrived yet: it waits behind it.
        if !sent || !write.before.has(c) && !self.is_current(a, c) {
            return false;
        }
        let value = write.value;
        self.writes(c, k, value);
        if let Some(write) = &mut self.at_mut(a).writes[k] {
            write.waiting.remove(c);
            write.before.remove(c);
        }
        self.advance(a, bound);
        true
    }

    /// The guest flushes.
    pub fn flush(&mut self, a: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        if at.phase != Phase::Serving || !at.mode_serves() || at.flush.is_some() {
            return false;
        }
        self.begin_flush(a, false, bound);
        true
    }

    fn begin_flush(&mut self, a: usize, reconciles: bool, bound: &Bound) {
        let (completed, replaced) = (self.oracle.completed, self.oracle.lost);
        let at = self.at_mut(a);
        let waiting = if bound.makes(Mutant::FlushOneCopy) {
            CopySet::one(
                at.local()
                    .filter(|c| at.held.in_sync.has(*c))
                    .unwrap_or(at.held.master),
            )
        } else {
            at.held.in_sync.or(at.mirrors())
        };
        let under_way = at.writes.iter().any(Option::is_some);
        at.flush = Some(Flush {
            waiting,
            reconciles,
            covers: if under_way { 0 } else { ALL },
            completed,
            replaced,
        });
    }

    /// A flush is done at `c`, and its answer is back.
    pub fn flush_at(&mut self, a: usize, c: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let waits = at.flush.as_ref().is_some_and(|f| f.waiting.has(c));
        if !waits || self.copies[c].bound != Some(a) {
            return false;
        }
        self.copies[c].flush();
        if let Some(flush) = &mut self.at_mut(a).flush {
            flush.waiting.remove(c);
        }
        self.advance(a, bound);
        true
    }

    /// Ends what nobody's answer is missing for.
    fn settle(&mut self, a: usize) {
        for k in 0..CHUNKS {
            let at = self.at(a);
            let ended = |w: &Write| w.waiting.is_empty() && (w.reconciles || at.mode_serves());
            let Some(write) = at.writes[k].filter(ended) else {
                continue;
            };
            self.at_mut(a).writes[k] = None;
            if !write.reconciles {
                self.completes(a, k, write.value);
            } else if !write.stale {
                self.decided(a, k);
            }
        }
        let at = self.at(a);
        let ended = |f: &Flush| f.waiting.is_empty() && (f.reconciles || at.mode_serves());
        let Some(flush) = at.flush.filter(ended) else {
            return;
        };
        let at = self.at_mut(a);
        at.flush = None;
        if at.undecided == 0 {
            at.stable |= flush.covers;
        }
        at.unflushed &= !flush.covers;
        if flush.reconciles {
            at.flushed = true;
        } else if std::mem::take(&mut at.lost_unflushed) {
            // The guest is told an error: this flush is not what makes those writes durable.
        } else {
            self.flushed(a, &flush);
        }
    }

    /// Regions that are stable leave `c`'s log.
    pub fn retire(&mut self, c: usize, bound: &Bound) -> bool {
        let Some(a) = self.copies[c].bound else {
            return false;
        };
        let at = self.at(a);
        let early = bound.makes(Mutant::RetireBeforeFlush);
        let idle = (0..CHUNKS).filter(|k| at.writes[*k].is_none());
        let idle = idle.map(|k| 1 << k).sum();
        let set = self.copies[c].log & if early { idle } else { at.stable };
        let marked = at.syncs[c].as_ref().is_none_or(|s| s.is_mirrored());
        if set == 0 || !marked || !self.is_current(a, c) {
            return false;
        }
        self.copies[c].retires(set);
        true
    }

    // ---- reconciliation

    /// Compares an undecided chunk on all members.
    pub fn compare_chunk(&mut self, a: usize, k: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let held = at.held;
        let may = at.phase == Phase::Serving && has(at.undecided, k) && at.writes[k].is_none();
        if !may || at.change.is_some() || self.ready(a) != held.in_sync {
            return false;
        }
        let wins = self.copies[held.master].data[k];
        let differ: CopySet = held
            .in_sync
            .iter()
            .filter(|c| self.copies[*c].data[k] != wins)
            .collect();
        if differ.is_empty() {
            self.decided(a, k);
        } else {
            self.begin_write(a, k, differ, wins, true);
        }
        self.advance(a, bound);
        true
    }

    fn decided(&mut self, a: usize, k: usize) {
        let at = self.at_mut(a);
        at.undecided &= !(1 << k);
        let master = at.held.master;
        self.decides(a, k, master);
    }

    fn advance_reconcile(&mut self, a: usize, bound: &Bound) {
        let at = self.at(a);
        let recovering = at.held.record.state == RecordState::Recovering;
        if at.phase != Phase::Serving || !recovering || at.change.is_some() {
            return;
        }
        if at.held.in_sync.len() == 1 {
            for k in 0..CHUNKS {
                if has(self.at(a).undecided, k) && self.at(a).writes[k].is_none() {
                    self.decided(a, k);
                }
            }
        }
        let at = self.at(a);
        if at.undecided != 0 {
        } else if at.flushed {
            let mut next = at.held.record.clone();
            next.state = RecordState::Active;
            self.propose(a, Purpose::Activate, next);
        } else if at.flush.is_none() {
            self.begin_flush(a, true, bound);
        }
    }

    // ---- after each step

    /// Goes on with whatever the last step made possible.
    pub fn advance(&mut self, a: usize, bound: &Bound) {
        if self.attachments[a].is_none() {
            return;
        }
        for c in self.ready(a).iter() {
            if self.copies[c].configured().0 == self.at(a).held.record.epoch {
                self.at_mut(a).lease.insert(c);
            }
        }
        self.propose_members(a, bound);
        let at = self.at(a);
        let configured = at.held.in_sync.without(self.ready(a)).is_empty();
        if at.phase == Phase::Configuring && at.change.is_none() && configured {
            self.at_mut(a).phase = Phase::Serving;
        }
        self.settle(a);
        self.advance_reconcile(a, bound);
        self.settle(a);
    }
}

/// Of each proposal of one attachment.
fn tag(a: usize, epoch: Epoch, attempt: u64) -> Tag {
    const { assert!(ATTACHMENTS < 10) };
    Tag(epoch.0 * 100 + (a as u64 + 1) * 10 + attempt)
}
