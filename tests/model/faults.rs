//! What goes wrong, what comes back, and time.

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::copy_state::Standing;
use lockstep::replication::ids::{Epoch, Tag};

use super::bounds::Bound;
use super::state::{Attachment, Bits, CHUNKS, COPIES, State};

impl State {
    /// The node's process dies: its copy and its attachment.
    pub fn crash(&mut self, node: usize) {
        for a in 0..self.attachments.len() {
            if self.attachments[a]
                .as_ref()
                .is_some_and(|at| at.node == node)
            {
                self.ends(a);
            }
        }
        if node >= COPIES {
            // Started again at once: what it knew is gone, and it has no copy to be missed.
            return;
        }
        self.up.remove(node);
        if let Some(a) = self.copies[node].bound {
            self.unlink(a, node, true);
        }
        self.copies[node].forget();
    }

    /// These machines lose power. `lost`: the chunks of each copy whose unflushed data are gone.
    pub fn power_cut(&mut self, nodes: CopySet, lost: [Bits; COPIES]) {
        for node in nodes.iter() {
            self.crash(node);
        }
        for node in nodes.iter().filter(|n| *n < COPIES) {
            self.copies[node].loses(lost[node]);
        }
    }

    /// The chunks of a copy that a power cut may change.
    pub fn unflushed(&self, c: usize) -> Bits {
        let copy = &self.copies[c];
        let differ = |k: &usize| copy.data[*k] != copy.on_disk[*k];
        (0..CHUNKS).filter(differ).map(|k| 1 << k).sum()
    }

    /// Whoever talked across the cut does not any more; a lease goes on until its time has passed.
    pub fn cut_off(&mut self, node: usize) {
        self.cut_off = Some(node);
        for a in 0..self.attachments.len() {
            let Some(at) = &self.attachments[a] else {
                continue;
            };
            let on = at.node;
            for c in self
                .linked(a)
                .iter()
                .filter(|c| !self.reaches(on, *c))
                .collect::<Vec<_>>()
            {
                self.unlink(a, c, false);
            }
        }
    }

    /// The disk of `c` fails a write or a flush.
    pub fn disk_fails(&mut self, c: usize, bound: &Bound) -> bool {
        let copy = &mut self.copies[c];
        // What the guest is told of the last copy's errors is not modelled.
        if copy.standing == Standing::Failed
            || self
                .registry
                .record
                .in_sync
                .without(CopySet::one(c))
                .is_empty()
        {
            return false;
        }
        copy.standing = Standing::Failed;
        copy.target = None;
        if let Some(a) = copy.bound {
            self.unlink(a, c, true);
            if self.at(a).held.in_sync.has(c) {
                self.at_mut(a).gaps.insert(c);
                self.loses(a, c, bound);
            } else {
                self.advance(a, bound);
            }
        }
        true
    }

    /// Leases run out where nobody answers, and so, later, does the grace.
    pub fn time_passes(&mut self) -> bool {
        let mut news = false;
        for a in 0..self.attachments.len() {
            if self.attachments[a].is_none() {
                continue;
            }
            let links = self.linked(a);
            let at = self.at_mut(a);
            news |= !at.lease.without(links).is_empty();
            at.lease = at.lease.and(links);
        }
        for c in (0..COPIES).filter(|c| self.up.has(*c)) {
            let copy = &mut self.copies[c];
            news |= copy.bound.is_none() && copy.heard;
            copy.heard &= copy.bound.is_some();
        }
        news
    }

    /// Whether somebody who attaches on this node would be let try (PROTOCOL 5.1): no member that it reaches hears another, or the
    /// former attachment was on the node and is dead.
    pub fn answers_probes(&self, node: usize) -> bool {
        let held = &self.registry.record;
        let before = held.record.attachment.as_ref();
        let dead = before.is_some_and(|b| b.node == super::record::node(node));
        let hears = |c: usize| self.up.has(c) && self.reaches(node, c) && self.copies[c].heard;
        dead || !held.in_sync.iter().any(hears)
    }

    /// Somebody attaches the volume on this node.
    pub fn start(&mut self, node: usize) {
        let at = Attachment::new(node, self.registry.record, self.registry.revision);
        self.attachments[self.started] = Some(at);
        self.started += 1;
    }

    /// A blank disk under the old identity. Only mistaken nodes accept it.
    pub fn wipe(&mut self, c: usize) {
        let copy = &mut self.copies[c];
        (copy.epoch, copy.tag) = (Epoch(0), Tag(0));
        (copy.promised, copy.promise_on_disk) = (Epoch(0), Epoch(0));
        copy.maps = CopySet::EMPTY;
        (copy.marked, copy.marked_on_disk) = ([0; COPIES], [0; COPIES]);
        (copy.data, copy.on_disk) = ([0; CHUNKS], [0; CHUNKS]);
        copy.log = 0;
        copy.whole = false;
    }
}
