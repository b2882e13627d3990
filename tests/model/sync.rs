//! Bringing absent copies up to date (PROTOCOL 6).

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::copy_state::Standing;
use lockstep::replication::mutants::Mutant;
use lockstep::replication::record::State as RecordState;
use lockstep::replication::resync;

use super::bounds::Bound;
use super::copies::bits;
use super::state::{ALL, CHUNKS, COPIES, Phase, Stage, State, Sync, has};

impl State {
    /// The target is marked inconsistent and says what its disk holds.
    pub fn begin_sync(&mut self, a: usize, c: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let record = &at.held.record;
        let (epoch, tag) = (record.epoch, record.epoch_tag);
        let settled = at.phase == Phase::Serving && record.state == RecordState::Active;
        let may = settled && at.held.absent.has(c) && at.syncs[c].is_none();
        if !may || !self.up.has(c) || !self.reaches(at.node, c) {
            return false;
        }
        let disk = self.disk_state(c);
        let copy = &self.copies[c];
        if copy.standing == Standing::Failed {
            return false;
        }
        let least = copy.promised.max(copy.epoch);
        if epoch < least {
            let at = self.at_mut(a);
            let news = at.outbid < least;
            at.outbid = at.outbid.max(least);
            return news;
        }
        let mut own = resync::delta(record, c, &disk).map(|r| bits(&r));
        if bound.shims(Mutant::DropReturningLog) {
            own = own.map(|_| 0);
        }
        if bound.shims(Mutant::ReuseIdentity) && record.copies[c].base.since.0 > 0 {
            own = disk.regions.as_deref().map(bits);
        }
        let absent = at.held.absent;
        let before = copy.bound;
        if let Some(other) = before.filter(|b| *b != a) {
            self.unlink(other, c, true);
        }
        let copy = &mut self.copies[c];
        copy.target = Some((epoch, tag));
        (copy.promised, copy.promise_on_disk) = (epoch, epoch);
        copy.standing = Standing::Inconsistent;
        copy.keeps_bitmaps(c, absent, CopySet::EMPTY);
        (copy.bound, copy.heard) = (Some(a), true);
        (copy.holder, copy.unclaimed) = (None, None);
        let boot = copy.boot;
        self.at_mut(a).syncs[c] = Some(Sync {
            stage: Stage::Marking,
            own,
            todo: 0,
            copied: 0,
            boot,
            lost: false,
        });
        true
    }

    /// What the target holds of its own is marked on every member, durably; then the marks are read.
    pub fn mark(&mut self, a: usize, c: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let Some(sync) = at.syncs[c]
            .as_ref()
            .filter(|s| s.stage == Stage::Marking && !s.lost)
        else {
            return false;
        };
        let held = at.held;
        let current = |m: usize| self.ready(a).has(m) && self.is_current(a, m);
        if !held.in_sync.iter().all(current) {
            return false;
        }
        let own = sync.own.unwrap_or(ALL);
        for m in held.in_sync.iter() {
            let member = &mut self.copies[m];
            member.marked[c] |= own;
            member.marked_on_disk[c] |= own;
        }
        let mut todo = self.copies[held.master].marked[c];
        // The members are to mark nothing for it any more.
        self.config_changes(a);
        let at = self.at_mut(a);
        for k in 0..CHUNKS {
            if let Some(write) = &mut at.writes[k] {
                // No answer says whether it is in it; and from now on all writes go to the target.
                todo |= 1 << k;
                write.waiting.insert(c);
            }
        }
        if let Some(sync) = &mut at.syncs[c] {
            (sync.stage, sync.todo) = (Stage::Copying, todo);
        }
        self.advance(a, bound);
        true
    }

    /// A chunk is locked, compared, copied.
    pub fn copy_chunk(&mut self, a: usize, c: usize, k: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let Some(sync) = at.syncs[c].as_ref().filter(|s| s.stage == Stage::Copying) else {
            return false;
        };
        let master = at.held.master;
        let links = self.linked(a);
        let may = !sync.lost && has(sync.todo, k) && at.writes[k].is_none();
        if !may || !links.has(c) || !links.has(master) {
            return false;
        }
        self.copies[c].data[k] = self.copies[master].data[k];
        if let Some(sync) = &mut self.at_mut(a).syncs[c] {
            sync.todo &= !(1 << k);
            sync.copied |= 1 << k;
        }
        if bound.makes(Mutant::ClearBeforeFlush) {
            self.clear(a, c, 1 << k);
        }
        true
    }

    /// S12: the target flushes; only then marks go.
    pub fn flush_copied(&mut self, a: usize, c: usize) -> bool {
        let Some(sync) = self.at(a).syncs[c].as_ref().filter(|s| !s.lost) else {
            return false;
        };
        let copied = sync.copied;
        if copied == 0 {
            return false;
        }
        self.copies[c].flush();
        self.clear(a, c, copied);
        if let Some(sync) = &mut self.at_mut(a).syncs[c] {
            sync.copied = 0;
        }
        true
    }

    /// Durable at once: a crash that brings marks back does no harm.
    fn clear(&mut self, a: usize, c: usize, set: u8) {
        // Behind a configuration on its way it is as good as lost: marks too many do no harm.
        let there = self.ready(a).iter().filter(|m| self.is_current(a, *m));
        for m in there.collect::<Vec<_>>() {
            let member = &mut self.copies[m];
            if member.maps.has(c) {
                member.marked[c] &= !set;
                member.marked_on_disk[c] &= !set;
            }
        }
    }

    /// Nothing is marked any more: the last flush, and the target calls itself in sync.
    pub fn end_sync(&mut self, a: usize, c: usize, bound: &Bound) -> bool {
        let at = self.at(a);
        let Some(sync) = at.syncs[c].as_ref().filter(|s| s.stage == Stage::Copying) else {
            return false;
        };
        let done = sync.todo == 0 && sync.copied == 0 && !sync.lost;
        let full = sync.own.is_none();
        let configured = (at.held.record.epoch, at.held.record.epoch_tag);
        let copy = &mut self.copies[c];
        if !done || copy.target != Some(configured) {
            return false;
        }
        copy.flush();
        copy.marked_on_disk = copy.marked;
        (copy.epoch, copy.tag) = configured;
        copy.standing = Standing::InSync;
        copy.target = None;
        copy.whole |= full;
        if let Some(sync) = &mut self.at_mut(a).syncs[c] {
            sync.stage = Stage::Synced;
        }
        self.advance(a, bound);
        true
    }

    /// The session with `c` is over; it begins anew later.
    pub fn break_off(&mut self, a: usize, c: usize) {
        let at = self.at_mut(a);
        let taking_in = at
            .change
            .as_ref()
            .is_some_and(|p| p.proposed.in_sync.has(c));
        let Some(sync) = &mut at.syncs[c] else {
            return;
        };
        if taking_in {
            // S4: were its answers waived now and the swap done already, writes would complete without a member.
            sync.lost = true;
            return;
        }
        if sync.is_mirrored() {
            self.config_changes(a);
        }
        let at = self.at_mut(a);
        at.syncs[c] = None;
        at.writes
            .iter_mut()
            .flatten()
            .for_each(|w| w.waiting.remove(c));
        at.flush.iter_mut().for_each(|f| f.waiting.remove(c));
        if self.copies[c].bound == Some(a) {
            self.copies[c].bound = None;
        }
    }

    /// Those that were lost while a change might have taken them in, once that is decided.
    pub fn end_lost(&mut self, a: usize) {
        for c in 0..COPIES {
            let at = self.at(a);
            if at.change.is_none() && at.syncs[c].as_ref().is_some_and(|s| s.lost) {
                self.break_off(a, c);
            }
        }
    }
}
