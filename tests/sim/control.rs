//! The control plane and the operator: who changes the record beside the attachment (by compare-and-swap, in the same
//! epoch), who makes and deletes a copy's files, and who exchanges a dead disk.

use std::collections::HashSet;

use lockstep::replication::copy_state::{BITMAPS_MAX, CopyState, Standing};
use lockstep::replication::ids::{CHUNK, CopyId, Epoch, REGION, SECTOR, Tag};
#[cfg(feature = "mutants")]
use lockstep::replication::mutants::{Mutant, on};
use lockstep::replication::record::{CopyEntry, CopyStatus, Growth, Record};

use super::disk::Disk;
use super::world::{Ev, MS, World};

/// Replicas that the operator asks for at most.
const WANTED_MAX: u8 = 3;
/// Bytes that a volume grows to at most: so that a run stays fast.
const SIZE_MAX: u64 = 6 * REGION;

impl World {
    /// One look at what the record says and what the nodes have.
    pub fn control(&mut self) {
        let wait = self.rng.between(200, 900) * MS;
        self.after(wait, Ev::Control);
        for n in 0..self.nodes.len() {
            if self.nodes[n].up && self.nodes[n].paused_until <= self.now {
                self.tend_files(n);
            }
        }
        if self.registry_down_until <= self.now {
            self.tend_record();
        }
    }

    /// A node makes the files of a copy that the record gives it, and deletes those of one that was removed.
    fn tend_files(&mut self, n: usize) {
        let record = &self.registry.record;
        if let Some(disk) = &self.nodes[n].disk {
            let removed =
                |c: &CopyEntry| c.copy_id == disk.copy_id() && c.status == CopyStatus::Removed;
            if record.copies.iter().any(removed) {
                self.say(|_| format!("node {n} deletes its copy"));
                self.seen.count("copy removed");
                return self.lose_files(n);
            }
            // A dead disk is exchanged once nobody relies on it.
            let dead = self.disk(n).failed && !self.is_in_sync(n);
            if dead && (!self.faults || self.rng.one_in(8)) {
                self.say(|_| format!("node {n} gets another disk"));
                self.lose_files(n);
            }
            return;
        }
        let name = &self.nodes[n].name;
        let entry = record.present().find(|c| c.node == *name);
        let Some(blank) = entry.filter(|c| c.base.since == Epoch(0)).cloned() else {
            return;
        };
        // S18: an identity is given once: files that are gone are not made again under it.
        if self.made.insert(blank.copy_id) {
            self.make_files(n, blank.copy_id);
        }
    }

    fn make_files(&mut self, n: usize, copy_id: CopyId) {
        self.say(|_| format!("node {n} makes a blank copy"));
        self.seen.count("blank copy made");
        let record = &self.registry.record;
        self.nodes[n].disk = Some(Disk::new(CopyState {
            volume_id: record.volume_id,
            copy_id,
            size: record.size,
            epoch: Epoch(0),
            tag: Tag(0),
            promised: Epoch(0),
            standing: Standing::Inconsistent,
            clean: false,
            bitmaps: [None; BITMAPS_MAX],
        }));
        self.nodes[n].fenced = false;
        self.nodes[n].gapped = false;
        self.open_copy(n);
    }

    /// The copy on `n` is gone for good.
    pub fn lose_files(&mut self, n: usize) {
        for s in 0..self.sessions.len() {
            if self.sessions[s].node == n {
                self.reset(s, true, false);
                self.sessions[s].to_copy.open = false;
            }
        }
        let node = &mut self.nodes[n];
        node.disk = None;
        node.replica = None;
        node.gapped = false;
        // Disk answers that are on their way are void.
        node.copy += 1;
        self.weigh_power();
    }

    /// A missing copy whose files are gone is replaced, in its place, by a new one.
    fn tend_record(&mut self) {
        let record = &self.registry.record;
        let gone = |c: &CopyEntry| {
            let there = self.holder(c).is_some();
            let to_be_made = c.base.since == Epoch(0) && !self.made.contains(&c.copy_id);
            c.status == CopyStatus::Missing && !c.leaving && !there && !to_be_made
        };
        let up = |c: &CopyEntry| self.node_named(&c.node).is_some_and(|n| self.nodes[n].up);
        let lost = (record.copies.iter()).position(|c| gone(c) && up(c));
        let Some(place) = lost else { return };
        #[cfg(feature = "mutants")]
        if on(Mutant::ReuseIdentity) {
            let (n, id) = (
                self.node_named(&record.copies[place].node),
                record.copies[place].copy_id,
            );
            return self.make_files(n.unwrap(), id);
        }
        let mut next = record.clone();
        let id = CopyId(self.rng.id());
        next.copies[place] = CopyEntry::blank(id, next.copies[place].node.clone());
        self.seen.count("copy replaced");
        self.edit(&next);
    }

    fn edit(&mut self, next: &Record) {
        let revision = self.registry.revision;
        self.swap(revision, next);
    }

    /// The operator changes where the copies are.
    pub fn change_members(&mut self) {
        if self.registry_down_until > self.now {
            return;
        }
        let mut next = self.registry.record.clone();
        let present: Vec<usize> = (0..next.copies.len())
            .filter(|c| next.copies[*c].status != CopyStatus::Removed)
            .collect();
        let staying = present.iter().filter(|c| !next.copies[**c].leaving).count();
        let free: Vec<usize> = (0..self.nodes.len())
            .filter(|n| self.nodes[*n].disk.is_none())
            .filter(|n| next.copy_on(&self.nodes[*n].name).is_none())
            .collect();
        match self.rng.below(4) {
            0 | 1 if !free.is_empty() => {
                let n = self.rng.pick(&free);
                let id = CopyId(self.rng.id());
                if next
                    .add_copy(CopyEntry::blank(id, self.nodes[n].name.clone()))
                    .is_none()
                {
                    return;
                }
                if self.rng.one_in(2) && next.replicas_wanted < WANTED_MAX {
                    next.replicas_wanted += 1;
                } else if let Some(out) = present.iter().find(|c| !next.copies[**c].leaving) {
                    // A copy is moved.
                    next.copies[*out].leaving = true;
                }
                self.seen.count("copy added");
            }
            2 if staying > 1 => {
                let out = self.rng.pick(&present);
                next.copies[out].leaving = true;
                next.replicas_wanted = next.replicas_wanted.min(staying as u8 - 2);
            }
            _ => {
                let to = self.rng.pick(&present);
                next.preferred = Some(next.copies[to].copy_id);
            }
        }
        self.edit(&next);
    }

    /// The operator wants the volume to be larger.
    pub fn grow(&mut self) {
        let mut next = self.registry.record.clone();
        let more = self.rng.pick(&[
            SECTOR,
            24 * SECTOR,
            CHUNK,
            5 * CHUNK + 8 * SECTOR,
            REGION + 3 * SECTOR,
        ]);
        if self.registry_down_until > self.now || next.size + more > SIZE_MAX {
            return;
        }
        let (to, refused) = (next.size + more, None);
        next.grow = Some(Growth { to, refused });
        self.edit(&next);
    }

    /// Whether the copies are as the record wants them: all in sync, none left that is to go.
    pub fn is_whole(&self) -> bool {
        let record = &self.registry.record;
        let staying = record.in_sync().filter(|c| !c.leaving).count();
        let enough = staying > usize::from(record.replicas_wanted);
        record
            .present()
            .all(|c| c.status == CopyStatus::InSync && !(enough && c.leaving))
    }
}

pub type Made = HashSet<CopyId>;
