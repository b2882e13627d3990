//! The volume grows (PROTOCOL 11.4): every copy that takes part makes room, and only then does the record say so; the guest is
//! told after that, by whoever carries out our decisions and reads the record's size.

use super::{Attachment, CopySet, Kind, Origin, Payload};
use crate::replication::growth;
use crate::replication::ids::{Seq, Span};
use crate::replication::message::Status;
use crate::replication::record::Record;

impl<D: Payload> Attachment<D> {
    /// Asks whoever takes part and is not known to have the room. An answer that is late has its copy put out, as any.
    pub(super) fn ask_for_room(&mut self) {
        let Some(to) = growth::wanted(&self.record).filter(|to| *to > self.record.size) else {
            return;
        };
        if !self.settled() || self.no_room.is_some() {
            return;
        }
        let lacking = self.lacking(to);
        for copy in self.in_sync.or(self.begun_targets()).and(lacking).iter() {
            let asked = |p: &super::Pending<D>| {
                p.kind == Kind::Grow { to } && p.waiting.has(copy) && p.failed.is_none()
            };
            if !self.pending.iter().any(|(_, p)| asked(p)) {
                let (kind, nowhere) = (Kind::Grow { to }, Span { offset: 0, len: 0 });
                let only = CopySet::one(copy);
                self.request(Origin::Grow, kind, nowhere, false, None, only);
            }
        }
    }

    /// `copy` has persisted a configuration of the record in force (S20).
    pub(super) fn has_room(&mut self, copy: usize) {
        self.peers[copy].room = self.peers[copy].room.max(self.record.size);
    }

    fn lacking(&self, to: u64) -> CopySet {
        let lacks = |c: &usize| self.peers[*c].room < to;
        (0..self.peers.len()).filter(lacks).collect()
    }

    /// An answer of `copy`.
    pub(super) fn room_answered(&mut self, copy: usize, seq: Seq, to: u64, status: Status) {
        let last = self.is_last(copy);
        let node = &self.record.copies[copy].node;
        match status {
            Status::Stale => return self.outbid_by(copy),
            Status::Ok => self.peers[copy].room = self.peers[copy].room.max(to),
            // Nobody is put out for that: the volume keeps its size, and all its copies.
            Status::NoSpace => {
                let why = format!(
                    "the copy on node {node} has no room for it (that node's log says why): make space there, then ask again"
                );
                self.no_room = Some((to, why));
            }
            Status::Io if last => {
                self.no_room = Some((to, format!("the disk of node {node} failed")));
            }
            Status::Io => return self.lose(copy, "its disk failed a write or flush"),
        }
        if let Some(p) = self.pending.get_mut(seq) {
            p.waiting.remove(copy);
        }
        self.settle(seq);
    }

    /// `next`, or the record in force, with the size that may follow now.
    pub(super) fn with_size(&mut self, next: Option<Record>) -> Option<Record> {
        let Some(to) = growth::wanted(&self.record).filter(|_| self.settled()) else {
            self.no_room = None;
            return next;
        };
        // Of an earlier wish.
        self.no_room.take_if(|(asked, _)| *asked != to);
        let refused = self.no_room.as_ref().map(|(_, why)| why.as_str());
        let from = next.as_ref().unwrap_or(&self.record);
        let grown = growth::next(from, self.lacking(to), self.targets(), refused);
        grown.or(next)
    }

    /// The record in force has another size than the one before.
    pub(super) fn grown(&mut self, old: &Record) {
        let (was, is) = (old.size, self.record.size);
        if let Some(why) = self.record.grow.as_ref().and_then(|g| g.refused.clone())
            && old.grow != self.record.grow
        {
            self.event("11.4 growth refused", why);
        }
        if was == is {
            return;
        }
        for sync in self.syncs.values_mut() {
            // Nothing was written there: nothing is marked.
            sync.todo.grow(is);
            sync.begun.grow(is);
        }
        let epoch = self.record.epoch;
        self.event("11.4 grow", format!("{was} -> {is} bytes; epoch {epoch}"));
    }
}
