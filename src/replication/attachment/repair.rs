//! What one in-sync copy's disk cannot read is read from another one, and written back where it could not be read: a disk
//! gives a sector that it lost a new place when it is written.

use super::{Attachment, CopySet, Kind, Origin, Payload, Work};
use crate::replication::ids::Span;

impl<D: Payload> Attachment<D> {
    /// These copies could not read `span`; another one could.
    pub(super) fn repair_all(&mut self, copies: CopySet, span: Span) {
        for copy in copies.and(self.in_sync).iter() {
            // Locked like a write, or a write under way would be undone (S16).
            let work = Work::Repair { copy, span };
            if let Some(work) = self.overlaps.claim(span, work) {
                self.start_work(work);
            }
        }
    }

    /// The span is locked: read once more, what was read before may have been overwritten.
    pub(super) fn repair(&mut self, copy: usize, span: Span) {
        let sources = self
            .in_sync
            .and(self.ready)
            .without(self.failing)
            .without(CopySet::one(copy));
        match sources.iter().next() {
            Some(source) if self.in_sync.has(copy) => {
                let origin = Origin::Repair { copy };
                let from = CopySet::one(source);
                self.request(origin, Kind::Read, span, false, None, from);
            }
            _ => self.release(span),
        }
    }

    /// The right bytes, or none.
    pub(super) fn repair_with(&mut self, copy: usize, span: Span, data: Option<D>) {
        match data {
            Some(data) if self.in_sync.has(copy) => {
                let origin = Origin::Repair { copy };
                let to = CopySet::one(copy);
                self.request(origin, Kind::Write, span, false, Some(data), to);
            }
            _ => self.release(span),
        }
    }

    pub(super) fn repaired(&mut self, copy: usize, span: Span) {
        if self.in_sync.has(copy) && !self.failing.has(copy) {
            let node = self.record.copies[copy].node.clone();
            let text = format!(
                "the copy on {node} could not read {} bytes at {}; written back from another copy",
                span.len, span.offset
            );
            self.event("3 repair", text);
        }
        self.release(span);
    }
}
