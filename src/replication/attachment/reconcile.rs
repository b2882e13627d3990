//! Deciding the regions in which in-sync copies may differ after an attachment was lost (PROTOCOL 5.4, 5.5): the
//! master's bytes win, chunk by chunk, before the first guest request is served.

use std::collections::{HashMap, VecDeque};

use super::{Attachment, CopySet, Kind, Origin, Outcome, Payload, Phase, Purpose};
use crate::replication::ids::{CHUNK, Chunk, REGION, Region, Span};
use crate::replication::record::State;

/// Chunks compared at once: enough to keep a disk and a link busy, few enough that a restart repeats little.
const WINDOW: usize = 8;

/// One round over the regions. A change of membership starts a new one: what the last decided stays decided, it is
/// found equal.
#[derive(Debug)]
pub(super) struct Reconcile<D> {
    regions: Vec<Region>,
    todo: VecDeque<Chunk>,
    comparing: HashMap<Chunk, Comparison<D>>,
    round: u64,
    flushing: bool,
    differing: u64,
}

impl<D> Default for Reconcile<D> {
    fn default() -> Self {
        Self {
            regions: Vec::new(),
            todo: VecDeque::new(),
            comparing: HashMap::new(),
            round: 0,
            flushing: false,
            differing: 0,
        }
    }
}

#[derive(Debug)]
struct Comparison<D> {
    missing: CopySet,
    read: Vec<(usize, D)>,
}

impl<D: Payload> Attachment<D> {
    pub(super) fn begin_reconcile(&mut self, regions: Vec<Region>) {
        let text = format!(
            "{} regions in which {} copies may differ",
            regions.len(),
            self.in_sync.len()
        );
        self.event("5.4 reconcile", text);
        self.reconcile.regions = regions;
        self.start_round();
    }

    fn start_round(&mut self) {
        let per_region = (REGION / CHUNK) as u32;
        let chunks = self.record.size.div_ceil(CHUNK) as u32;
        let r = &mut self.reconcile;
        r.round += 1;
        r.flushing = false;
        r.comparing.clear();
        if self.in_sync.len() == 1 {
            // Nothing to differ from; and a chunk that its disk cannot read is the guest's to learn of.
            r.todo.clear();
            return;
        }
        r.todo = r
            .regions
            .iter()
            .flat_map(|region| region.0 * per_region..(region.0 + 1) * per_region)
            .map(Chunk)
            .collect();
        r.todo.retain(|c| c.0 < chunks);
    }

    pub(super) fn restart_reconcile(&mut self) {
        if self.phase == Phase::Reconciling && self.change.is_none() {
            self.start_round();
        }
    }

    pub(super) fn advance_reconcile(&mut self) {
        if self.change.is_some()
            || !self.in_sync.without(self.ready).is_empty()
            || self.former_round_writes()
        {
            return;
        }
        while self.reconcile.comparing.len() < WINDOW {
            let Some(chunk) = self.reconcile.todo.pop_front() else {
                break;
            };
            let (span, round) = (self.chunk_span(chunk), self.reconcile.round);
            let comparison = Comparison {
                missing: self.in_sync,
                read: Vec::new(),
            };
            self.reconcile.comparing.insert(chunk, comparison);
            for copy in self.in_sync.iter() {
                self.request(
                    Origin::Reconcile { round, chunk },
                    Kind::Read,
                    span,
                    false,
                    None,
                    CopySet::one(copy),
                );
            }
        }
        let r = &mut self.reconcile;
        if r.todo.is_empty() && r.comparing.is_empty() && !r.flushing {
            r.flushing = true;
            let round = r.round;
            self.start_flush(Origin::Reconciled { round });
        }
    }

    /// S9: round 1 sends the master's chunk to B and C; C has it, B's disk still holds it in its queue when the master
    /// is ejected. Were B, the new master, read now, its old bytes would go to C, and then the late write would land on
    /// B: two in-sync copies that differ for good. So what the last round wrote ends first.
    fn former_round_writes(&self) -> bool {
        let now = self.reconcile.round;
        self.pending.iter().any(|(_, p)| {
            p.kind == Kind::Write
                && matches!(p.origin, Origin::Reconcile { round, .. } if round != now)
        })
    }

    fn chunk_span(&self, chunk: Chunk) -> Span {
        let offset = u64::from(chunk.0) * CHUNK;
        Span {
            offset,
            len: CHUNK.min(self.record.size - offset) as u32,
        }
    }

    pub(super) fn chunk_read(&mut self, round: u64, chunk: Chunk, copy: usize, data: Option<D>) {
        if round != self.reconcile.round {
            return;
        }
        let (Some(c), Some(data)) = (self.reconcile.comparing.get_mut(&chunk), data) else {
            return;
        };
        c.missing.remove(copy);
        c.read.push((copy, data));
        if !c.missing.is_empty() {
            return;
        }
        let read = std::mem::take(&mut c.read);
        let Some((_, wins)) = read.iter().find(|(copy, _)| *copy == self.master).cloned() else {
            return;
        };
        let mut differ = CopySet::EMPTY;
        read.iter()
            .filter(|(_, d)| !d.same(&wins))
            .for_each(|(copy, _)| differ.insert(*copy));
        if differ.is_empty() {
            self.reconcile.comparing.remove(&chunk);
        } else {
            self.reconcile.differing += 1;
            let span = self.chunk_span(chunk);
            // Log before data there too: it is a write like any other.
            self.request(
                Origin::Reconcile { round, chunk },
                Kind::Write,
                span,
                false,
                Some(wins),
                differ,
            );
        }
    }

    pub(super) fn chunk_written(&mut self, round: u64, chunk: Chunk, outcome: Outcome) {
        if round != self.reconcile.round {
            return;
        }
        if outcome == Outcome::IoError {
            return self.fence("the last copy's disk failed during reconciliation".into());
        }
        self.reconcile.comparing.remove(&chunk);
    }

    /// Every copy flushed: what was decided stays decided.
    pub(super) fn reconciled(&mut self, round: u64, outcome: Outcome) {
        if round != self.reconcile.round {
            return;
        }
        if outcome == Outcome::IoError {
            return self.fence("the last copy's disk failed a flush during reconciliation".into());
        }
        let text = format!("done: {} chunks differed", self.reconcile.differing);
        self.event("5.5 reconciled", text);
        self.propose_activation();
    }

    pub(super) fn propose_activation(&mut self) {
        let mut next = self.record.clone();
        next.state = State::Active;
        self.propose(Purpose::Activate, next);
    }

    pub(super) fn activated(&mut self) {
        self.set_phase(Phase::Serving, "5.5 active");
        self.tick_io();
    }
}
