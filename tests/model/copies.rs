//! What a copy does: what it accepts, marks, logs and forgets. The decisions are the product's.

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::copy_state::Standing;
use lockstep::replication::fence;
use lockstep::replication::ids::Region;
use lockstep::replication::message::{Absent, DiskState, Promise, Proof};
use lockstep::replication::mutants::Mutant;
use lockstep::replication::resync::{self, Marks};

use super::bounds::Bound;
use super::record::{boot, copy_id, instance, node};
use super::state::{ALL, Bits, CHUNKS, COPIES, Disk, Holder, Rule, State, Value, chunks, has};

pub fn regions(set: Bits) -> Vec<Region> {
    chunks(set).map(|k| Region(k as u32)).collect()
}

pub fn bits(regions: &[Region]) -> Bits {
    regions.iter().map(|r| 1 << r.0).sum()
}

impl State {
    pub fn disk_state(&self, c: usize) -> DiskState {
        let copy = &self.copies[c];
        DiskState {
            promised: copy.promised,
            probe: false,
            epoch: copy.epoch,
            tag: copy.tag,
            boot_id: boot(c, copy.boot),
            clean: false,
            regions: Some(regions(copy.log)),
        }
    }

    /// Attachment `a` asks for a promise. `None`: not yet, the old attachment was heard; `Some(false)`: refused.
    pub fn promises(&mut self, a: usize, c: usize, bound: &Bound) -> Option<bool> {
        let at = self.at(a);
        let promise = Promise {
            epoch: at.asks,
            candidate: node(at.node),
            instance: instance(a),
            proof: if at.proven {
                Proof::PredecessorDead
            } else {
                Proof::None
            },
            probe: false,
        };
        let me = Holder {
            instance: a,
            node: at.node,
        };
        let copy = &mut self.copies[c];
        let same = copy.holder.is_some_and(|h| h.instance == a);
        let again = same && copy.unclaimed.is_some();
        if !fence::promises(copy.promised, promise.epoch, again) {
            return Some(false);
        }
        let holder = copy.holder.map(|h| node(h.node));
        let proven = fence::is_proven(&promise, copy.epoch, holder.as_ref());
        if copy.heard && !same && !proven {
            return None;
        }
        if let Some(old) = copy.bound {
            self.unlink(old, c, true);
            let old = self.at_mut(old);
            old.outbid = old.outbid.max(promise.epoch);
        }
        let copy = &mut self.copies[c];
        copy.promised = promise.epoch;
        if !bound.makes(Mutant::SkipPromiseFsync) {
            copy.promise_on_disk = promise.epoch;
        }
        copy.holder = Some(me);
        copy.unclaimed = Some(promise.epoch);
        copy.heard = true;
        Some(true)
    }

    /// Attachment `a`'s configuration, on a session that stands or, with `attach`, on a new one. `false`: refused.
    pub fn configures(&mut self, a: usize, c: usize, attach: bool) -> bool {
        let at = self.at(a);
        let (held, mirrors) = (at.held, at.mirrors());
        let (epoch, tag) = (held.record.epoch, held.record.epoch_tag);
        let copy = &mut self.copies[c];
        if copy.target.is_none()
            && !fence::configures((copy.epoch, copy.tag), copy.promised, epoch, tag)
        {
            return false;
        }
        match &mut copy.target {
            Some(target) => *target = (epoch, tag),
            None => (copy.epoch, copy.tag) = (epoch, tag),
        }
        copy.promised = epoch;
        copy.promise_on_disk = epoch;
        copy.keeps_bitmaps(c, held.absent, mirrors);
        if attach {
            copy.bound = Some(a);
        }
        let claimant = copy.holder.is_some_and(|h| h.instance == a);
        if copy.unclaimed.take().is_some_and(|e| epoch > e) && !claimant {
            copy.holder = None;
        }
        copy.heard = true;
        true
    }

    /// Whether `c` has `a`'s newest configuration.
    pub fn is_current(&self, a: usize, c: usize) -> bool {
        let (at, copy) = (self.at(a), &self.copies[c]);
        let me = CopySet::one(c);
        let mirrors = at.mirrors().without(me);
        copy.configured() == (at.held.record.epoch, at.held.record.epoch_tag)
            && copy.maps == at.held.absent.without(me)
            && (copy.target.is_some() || copy.mirrored == mirrors)
    }

    /// A write of attachment `a` reaches the disk: log, marks, data.
    pub fn writes(&mut self, c: usize, k: usize, value: Value) {
        let copy = &mut self.copies[c];
        let (mine, _) = copy.configured();
        if copy.standing == Standing::InSync && !fence::accepts(mine, copy.promised, mine) {
            return self.breaks(Rule::S7);
        }
        copy.notes(k);
        copy.data[k] = value;
    }
}

impl Disk {
    /// A write to `k` has come: log and marks.
    pub fn notes(&mut self, k: usize) {
        self.log |= 1 << k;
        for peer in 0..COPIES {
            if self.maps.has(peer) && !self.mirrored.has(peer) {
                self.marked[peer] |= 1 << k;
            }
        }
    }

    /// Takes over which copies are absent.
    pub fn keeps_bitmaps(&mut self, me: usize, absent: CopySet, mirrors: CopySet) {
        let target = self.target.is_some();
        for peer in (0..COPIES).filter(|p| *p != me) {
            let kept = self.maps.has(peer);
            let mirrored = self.mirrored.has(peer);
            self.mirrored.remove(peer);
            if !absent.has(peer) {
                self.maps.remove(peer);
                (self.marked[peer], self.marked_on_disk[peer]) = (0, 0);
                continue;
            }
            let entry = Absent {
                copy_id: copy_id(peer),
                last: self.epoch,
                mirrored: mirrors.has(peer),
            };
            self.marked[peer] |= match resync::marks(kept.then_some(mirrored), &entry, target) {
                Marks::Nothing => 0,
                Marks::Log => self.log,
                Marks::All => ALL,
            };
            self.maps.insert(peer);
            if mirrors.has(peer) && !target {
                self.mirrored.insert(peer);
            }
        }
    }

    pub fn flush(&mut self) {
        self.on_disk = self.data;
    }

    /// A power cut takes what was not flushed of these chunks.
    pub fn loses(&mut self, lost: Bits) {
        for k in 0..CHUNKS {
            if has(lost, k) {
                self.data[k] = self.on_disk[k];
            } else {
                self.on_disk[k] = self.data[k];
            }
        }
        self.boot += 1;
    }

    /// A region leaves the log only when its bits are on the disk.
    pub fn retires(&mut self, set: Bits) {
        for peer in 0..COPIES {
            self.marked_on_disk[peer] = self.marked_on_disk[peer] & !set | self.marked[peer] & set;
        }
        self.log &= !set;
    }
}
