//! Deciding the regions in which in-sync copies may differ after an attachment was lost (PROTOCOL 5.4, 5.5): the
//! master's bytes win, chunk by chunk, while the volume is served. A request to an undecided chunk waits for it, and that
//! chunk is decided next, so the time until service does not grow with the regions. At the end in-sync copies are the same to the
//! byte again (S14).

use std::collections::{HashMap, VecDeque};

use super::{Attachment, CopySet, Kind, Op, Origin, Outcome, Payload, Phase, Purpose, Submitted};
use crate::replication::dirty_map::DirtyMap;
use crate::replication::ids::{CHUNK, Chunk, REGION, Region, Span};
use crate::replication::record::State;

/// Chunks compared at once: enough to keep a disk and a link busy, few enough that a guest's request is soon served.
const WINDOW: usize = 8;

#[derive(Debug)]
pub(super) struct Reconcile<D> {
    /// The chunks in which copies may differ. A chunk leaves it when all in-sync copies hold the same.
    undecided: Option<DirtyMap>,
    /// All before it are decided or under way.
    cursor: Chunk,
    /// Guests wait for these.
    urgent: VecDeque<Chunk>,
    comparing: HashMap<Chunk, Comparison<D>>,
    waiting: VecDeque<Submitted<D>>,
    flush: Flush,
    differing: u64,
}

/// The flush of every copy that ends it.
#[derive(Debug, PartialEq, Eq)]
enum Flush {
    NotYet,
    Running,
    Done,
}

impl<D> Default for Reconcile<D> {
    fn default() -> Self {
        Self {
            undecided: None,
            cursor: Chunk(0),
            urgent: VecDeque::new(),
            comparing: HashMap::new(),
            waiting: VecDeque::new(),
            flush: Flush::NotYet,
            differing: 0,
        }
    }
}

#[derive(Debug)]
struct Comparison<D> {
    /// Requests under way for it.
    open: usize,
    /// The in-sync set changed meanwhile: to be compared again when they have ended.
    stale: bool,
    /// What each copy holds; `None` where it cannot be read.
    read: Vec<(usize, Option<D>)>,
}

impl<D> Reconcile<D> {
    /// Whether copies may differ in `span`.
    pub(super) fn is_undecided(&self, span: Span) -> bool {
        self.undecided.as_ref().is_some_and(|u| u.touches(span))
    }

    /// Whether copies differ nowhere any more.
    pub(super) fn is_decided(&self) -> bool {
        self.undecided.as_ref().is_none_or(|u| u.count() == 0)
    }

    /// Chunks left.
    pub(super) fn left(&self) -> u64 {
        self.undecided.as_ref().map_or(0, DirtyMap::count)
    }

    /// Requests that wait for a decision.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn drain_waiting(&mut self) -> VecDeque<Submitted<D>> {
        std::mem::take(&mut self.waiting)
    }
}

impl<D: Payload> Attachment<D> {
    /// `regions`: where copies may differ; `None`: anywhere.
    pub(super) fn begin_reconcile(&mut self, regions: Option<Vec<Region>>) {
        let size = self.record.size;
        let mut undecided = DirtyMap::new(size);
        undecided.set_regions(regions.as_deref(), size);
        let count = regions.map_or(size.div_ceil(REGION), |named| named.len() as u64);
        let copies = self.in_sync.len();
        let text = format!("{count} regions in which {copies} copies may differ");
        self.event("5.4 reconcile", text);
        self.reconcile = Reconcile {
            undecided: Some(undecided),
            ..Reconcile::default()
        };
    }

    /// A guest's request to a chunk that is not decided. A write keeps its claim among overlapping ones (S16).
    pub(super) fn await_decision(&mut self, request: Submitted<D>, span: Span) {
        let r = &mut self.reconcile;
        let undecided = r.undecided.as_ref();
        r.urgent.extend(
            span.chunks()
                .filter(|c| undecided.is_some_and(|u| u.is_set(*c))),
        );
        r.waiting.push_back(request);
    }

    /// The in-sync set changed. What was decided stays decided: the copies that are left hold the same there. What is
    /// being compared is compared again, but not before its requests have ended.
    ///
    /// S9: the master's chunk goes to B and C; C has it, B's disk still holds it in its queue when the master is ejected.
    /// Were B, the new master, read now, its old bytes would go to C, and then the late write would land on B: two in-sync
    /// copies that differ for good.
    pub(super) fn compare_again(&mut self) {
        self.reconcile
            .comparing
            .values_mut()
            .for_each(|c| c.stale = true);
    }

    pub(super) fn advance_reconcile(&mut self) {
        if self.record.state != State::Recovering
            || self.phase != Phase::Serving
            || self.change.is_some()
        {
            return;
        }
        if self.in_sync.len() == 1 {
            self.nothing_to_differ_from();
        }
        // One that is away is waited for: it comes back, or is ejected.
        if self.in_sync.without(self.ready).is_empty() {
            while self.reconcile.comparing.len() < WINDOW
                && let Some(chunk) = self.next_undecided()
            {
                self.compare_chunk(chunk);
            }
        }
        if !self.reconcile.is_decided() {
            return;
        }
        match self.reconcile.flush {
            Flush::NotYet => {
                self.reconcile.flush = Flush::Running;
                self.start_flush(Origin::Reconciled);
            }
            Flush::Running => {}
            Flush::Done => self.propose_activation(),
        }
    }

    /// A single copy is left. A chunk that its disk cannot read is the guest's to learn of.
    fn nothing_to_differ_from(&mut self) {
        let r = &mut self.reconcile;
        if let Some(undecided) = &mut r.undecided {
            let all: Vec<Chunk> = undecided.iter().collect();
            for chunk in all.iter().filter(|c| !r.comparing.contains_key(c)) {
                undecided.clear(*chunk);
            }
        }
        self.start_decided();
    }

    fn next_undecided(&mut self) -> Option<Chunk> {
        let r = &mut self.reconcile;
        let undecided = r.undecided.as_ref()?;
        let open = |c: &Chunk| undecided.is_set(*c) && !r.comparing.contains_key(c);
        while let Some(chunk) = r.urgent.pop_front() {
            if open(&chunk) {
                return Some(chunk);
            }
        }
        while let Some(chunk) = undecided.next(r.cursor) {
            r.cursor = Chunk(chunk.0 + 1);
            if open(&chunk) {
                return Some(chunk);
            }
        }
        None
    }

    fn compare_chunk(&mut self, chunk: Chunk) {
        let comparison = Comparison {
            open: self.in_sync.len(),
            stale: false,
            read: Vec::new(),
        };
        self.reconcile.comparing.insert(chunk, comparison);
        let span = self.chunk_span(chunk);
        for copy in self.in_sync.iter() {
            let origin = Origin::Reconcile { chunk };
            self.request(origin, Kind::Read, span, false, None, CopySet::one(copy));
        }
    }

    pub(super) fn chunk_span(&self, chunk: Chunk) -> Span {
        let offset = u64::from(chunk.0) * CHUNK;
        Span {
            offset,
            len: CHUNK.min(self.record.size - offset) as u32,
        }
    }

    /// A read for a comparison ended: with bytes, without (the disk could not), or because its copy was ejected.
    pub(super) fn chunk_read(&mut self, chunk: Chunk, copy: usize, data: Option<D>) {
        let Some(c) = self.reconcile.comparing.get_mut(&chunk) else {
            return;
        };
        c.open -= 1;
        c.read.push((copy, data));
        if c.open > 0 {
            return;
        }
        if c.stale {
            return self.comparison_ended(chunk, false);
        }
        let read = std::mem::take(&mut c.read);
        let bytes = |copy: usize| read.iter().find(|(c, _)| *c == copy)?.1.as_ref();
        // Every in-sync copy holds every completed write: where the master's disk cannot read, another's bytes are as good.
        let wins = bytes(self.master).or_else(|| read.iter().find_map(|(_, d)| d.as_ref()));
        let Some(wins) = wins.cloned() else {
            self.event(
                "5.4 reconcile",
                format!("chunk {chunk} can be read on no copy: left to the guest"),
            );
            return self.comparison_ended(chunk, true);
        };
        let mut differ = CopySet::EMPTY;
        for (copy, data) in &read {
            if data.as_ref().is_none_or(|d| !d.same(&wins)) {
                differ.insert(*copy);
            }
        }
        if differ.is_empty() {
            return self.comparison_ended(chunk, true);
        }
        self.reconcile.differing += 1;
        if let Some(c) = self.reconcile.comparing.get_mut(&chunk) {
            c.open = 1;
        }
        // Log before data there too: it is a write like any other.
        let (origin, span) = (Origin::Reconcile { chunk }, self.chunk_span(chunk));
        let (kind, data) = if wins.is_zero() {
            (Kind::Zero { unmap: true }, None)
        } else {
            (Kind::Write, Some(wins))
        };
        self.request(origin, kind, span, false, data, differ);
    }

    pub(super) fn chunk_written(&mut self, chunk: Chunk, outcome: Outcome) {
        if outcome == Outcome::IoError {
            return self.fence("the last copy's disk failed during reconciliation".into());
        }
        let stale = self
            .reconcile
            .comparing
            .get(&chunk)
            .is_some_and(|c| c.stale);
        self.comparison_ended(chunk, !stale);
    }

    fn comparison_ended(&mut self, chunk: Chunk, decided: bool) {
        self.reconcile.comparing.remove(&chunk);
        if decided {
            self.decide(chunk);
            self.start_decided();
        } else {
            self.reconcile.urgent.push_back(chunk);
        }
    }

    fn decide(&mut self, chunk: Chunk) {
        if let Some(undecided) = &mut self.reconcile.undecided {
            undecided.clear(chunk);
        }
    }

    /// Starts what waited and may go on.
    fn start_decided(&mut self) {
        for _ in 0..self.reconcile.waiting.len() {
            let Some(request) = self.reconcile.waiting.pop_front() else {
                break;
            };
            match request.op {
                Op::Read(_) => self.begin(request),
                Op::Write { .. } | Op::Zero { .. } | Op::Flush => self.start_write(request),
            }
        }
    }

    /// Every copy flushed: what was decided stays decided.
    pub(super) fn reconciled(&mut self, outcome: Outcome) {
        if outcome == Outcome::IoError {
            return self.fence("the last copy's disk failed a flush during reconciliation".into());
        }
        let text = format!("done: {} chunks differed", self.reconcile.differing);
        self.event("5.5 reconciled", text);
        self.reconcile.flush = Flush::Done;
    }

    pub(super) fn propose_activation(&mut self) {
        let mut next = self.record.clone();
        next.state = State::Active;
        self.propose(Purpose::Activate, next);
    }

    pub(super) fn activated(&mut self) {
        self.event("5.5 active", format!("epoch {}", self.record.epoch));
        self.reconcile = Reconcile::default();
    }
}
