//! All in-sync copies are compared, chunk by chunk, under load (PROTOCOL 11.6): hold a chunk, compare, compare again where
//! it differs, mend, look again, let go. What the answers mean is decided in [`replication::scrub`](crate::replication::scrub).

use std::collections::{BTreeMap, BTreeSet};

use super::{Attachment, CopySet, Kind, Origin, Outcome, Payload, Work};
use crate::replication::ids::{CHUNK, Chunk, CopyId, Nanos, NodeName, Seq, Span};
use crate::replication::message::{MAP_CHUNKS, Status};
use crate::replication::mutants::{self, Mutant};
use crate::replication::scrub::{
    self, BLOCK, Counters, Finding, Outcome as Found, Place, Progress, Report, Verdict, View,
};
use crate::replication::throttle::Throttle;

/// How often the rate is measured.
const RATE: Nanos = Nanos::from_ms(1_000);
/// Places of one scrub that become events; the report has more of them.
const EVENTS_MAX: u32 = 16;

/// What a request of a scrub is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Where the copy has holes.
    Holes,
    /// The hash of a block of the chunk, or of all of it.
    Hash(Chunk, usize),
    /// What is right, to mend a place.
    Read(Chunk),
    /// Writing it.
    Write(Chunk),
}

/// Where the comparison of one chunk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Writes to it are under way; it is held after them.
    Waiting,
    /// One hash of all of it.
    Whole,
    /// One hash of each block.
    Blocks,
    /// A place is read and written.
    Mending,
    /// The blocks once more.
    Again,
}

#[derive(Debug)]
struct Look {
    stage: Stage,
    span: Span,
    /// Answers still to come.
    open: usize,
    /// What was answered does not count: it is to be asked anew when all has been.
    stale: bool,
    /// Block, copy, hash.
    answers: Vec<(usize, usize, Option<u128>)>,
    findings: Vec<Finding>,
    /// Of the findings, the next to be mended.
    next: usize,
    mending: bool,
}

impl Look {
    fn new(span: Span) -> Self {
        Self {
            stage: Stage::Waiting,
            span,
            open: 0,
            stale: false,
            answers: Vec::new(),
            findings: Vec::new(),
            next: 0,
            mending: false,
        }
    }

    fn verdicts(&self, count: usize, master: usize) -> Vec<Verdict> {
        let of = |block: usize| {
            let mine = self.answers.iter().filter(move |(b, ..)| *b == block);
            scrub::judge(mine.map(|(_, copy, hash)| (*copy, *hash)), master)
        };
        (0..count).map(of).collect()
    }
}

/// The chunks of one range that are no holes everywhere.
#[derive(Debug, Default)]
struct Range {
    first: u64,
    end: u64,
    /// Answers still to come.
    open: usize,
    stale: bool,
    words: Vec<u64>,
}

impl Range {
    fn next(&self, from: u64) -> Option<u64> {
        let holds = |c: &u64| {
            let at = c - self.first;
            self.words[at as usize / 64] & (1 << (at % 64)) != 0
        };
        (from.max(self.first)..self.end).find(holds)
    }
}

/// What follows in a scrub.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Ask for the holes of these chunks.
    Holes { first: u64, count: u64 },
    /// Hold this chunk.
    Hold(Chunk),
    /// Something is to be answered first.
    Wait,
    /// The volume's end.
    Over,
}

/// One scrub, under way or over.
#[derive(Debug)]
pub(super) struct Scrub {
    id: u64,
    repair: bool,
    progress: Progress,
    range: Range,
    /// All chunks before it were taken up.
    cursor: u64,
    looks: BTreeMap<Chunk, Look>,
    pub(super) throttle: Throttle,
    report: Report,
    left_out: BTreeMap<CopyId, NodeName>,
    told: u32,
    /// When, and how far it was.
    measured: (Nanos, u64),
    rate: u64,
    size: u64,
}

impl Scrub {
    fn new(id: u64, repair: bool, size: u64, now: Nanos) -> Self {
        Self {
            id,
            repair,
            progress: Progress::Running,
            range: Range::default(),
            cursor: 0,
            looks: BTreeMap::new(),
            throttle: Throttle::default(),
            report: Report::default(),
            left_out: BTreeMap::new(),
            told: 0,
            measured: (now, 0),
            rate: 0,
            size,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.progress == Progress::Running
    }

    /// What comes next in a volume of `size` bytes.
    fn next(&mut self, size: u64) -> Next {
        self.size = size;
        let chunks = size.div_ceil(CHUNK);
        if self.range.open > 0 {
            return Next::Wait;
        }
        match self.range.next(self.cursor) {
            Some(_) if self.looks.len() >= self.throttle.window() as usize => Next::Wait,
            Some(chunk) => {
                self.cursor = chunk + 1;
                Next::Hold(Chunk(chunk as u32))
            }
            None => {
                self.cursor = self.cursor.max(self.range.end);
                match (self.cursor < chunks, self.looks.is_empty()) {
                    (true, _) => Next::Holes {
                        first: self.cursor,
                        count: (chunks - self.cursor).min(u64::from(MAP_CHUNKS)),
                    },
                    (false, true) => Next::Over,
                    (false, false) => Next::Wait,
                }
            }
        }
    }

    /// Bytes from the volume's beginning that it is done with.
    fn done_bytes(&self) -> u64 {
        let first = self.looks.keys().next().map(|c| u64::from(c.0));
        let chunks = first.unwrap_or(self.cursor).min(self.cursor);
        (chunks * CHUNK).min(self.size)
    }

    pub(super) fn measure(&mut self, now: Nanos) {
        let (at, was) = self.measured;
        let span = now.since(at);
        if span >= RATE {
            let is = self.done_bytes();
            let rate = u128::from(is.saturating_sub(was)) * 1_000_000_000 / u128::from(span.0);
            let rate = rate as u64;
            self.rate = match self.rate {
                0 => rate,
                before => before / 2 + rate / 2,
            };
            self.measured = (now, is);
        }
    }

    pub(super) fn view(&self) -> View {
        View {
            id: self.id,
            repair: self.repair,
            progress: self.progress.clone(),
            done_bytes: self.done_bytes(),
            total_bytes: self.size,
            bytes_per_second: self.rate,
            report: self.report.clone(),
            left_out: self.left_out.values().cloned().collect(),
        }
    }

    /// What is being compared is asked anew, when all that was asked is answered.
    ///
    /// S21: A has answered, B has not, and both lose power; B is the first one back, serves on without what no flush covered, and
    /// answers: the two differ, and A is on its way out of the in-sync set.
    fn outdate(&mut self) {
        self.range.stale = self.range.open > 0;
        for look in self.looks.values_mut() {
            look.stale = look.open > 0;
        }
    }
}

impl<D: Payload> Attachment<D> {
    /// Compares all in-sync copies, as soon as they are known to be the same; with `repair` what differs becomes what the master
    /// holds. To be asked for again under the same `id` is no error.
    ///
    /// # Errors
    ///
    /// Another one is under way, or this attachment is about to end.
    pub fn scrub(&mut self, now: Nanos, id: u64, repair: bool) -> Result<(), String> {
        self.now = now;
        if self.scrub.as_ref().is_some_and(|s| s.id == id) {
            return Ok(());
        }
        if self.scrub.as_ref().is_some_and(Scrub::is_running) {
            return Err("another scrub of the volume is under way".into());
        }
        if self.ended() || self.leaving {
            return Err("the volume is being detached".into());
        }
        self.scrub = Some(Scrub::new(id, repair, self.record.size, now));
        self.note_left_out();
        let how = if repair {
            "what differs becomes what the master holds"
        } else {
            "what differs is reported"
        };
        let text = format!("comparing {} copies; {how}", self.in_sync.len());
        self.event("11.6 scrub begins", text);
        self.advance();
        Ok(())
    }

    /// The operator has enough of it.
    pub fn stop_scrub(&mut self, now: Nanos, id: u64) {
        self.now = now;
        if self.scrub.as_ref().is_some_and(|s| s.id == id) {
            self.end_scrub("it was stopped");
            self.advance();
        }
    }

    /// Counters of all scrubs.
    pub fn scrub_counters(&self) -> Counters {
        self.scrub_counters
    }

    fn running_scrub(&mut self, id: u64) -> Option<&mut Scrub> {
        self.scrub.as_mut().filter(|s| s.id == id && s.is_running())
    }

    fn look(&mut self, id: u64, chunk: Chunk) -> Option<&mut Look> {
        self.running_scrub(id)?.looks.get_mut(&chunk)
    }

    pub(super) fn advance_scrub(&mut self) {
        // Not while a copy is away, or somebody is about to be put out or taken in: what is held waits with the guest's writes.
        let whole = self.in_sync.without(self.ready).is_empty() && self.failing.is_empty();
        if !self.settled() || self.change.is_some() || !whole {
            return;
        }
        let size = self.record.size;
        while let Some(s) = self.scrub.as_mut().filter(|s| s.is_running()) {
            let id = s.id;
            match s.next(size) {
                Next::Holes { first, count } => self.ask_holes(id, first, count),
                Next::Hold(chunk) => self.hold(id, chunk),
                Next::Wait => return,
                Next::Over => return self.scrub_over(),
            }
        }
    }

    // ---- holes

    fn ask_holes(&mut self, id: u64, first: u64, count: u64) {
        let copies = self.in_sync;
        let Some(s) = self.running_scrub(id) else {
            return;
        };
        s.range = Range {
            first,
            end: first + count,
            open: copies.len(),
            stale: false,
            words: vec![0; count.div_ceil(64) as usize],
        };
        let span = Span {
            offset: first * CHUNK,
            len: (count * CHUNK) as u32,
        };
        for copy in copies.iter() {
            let origin = Origin::Scrub {
                id,
                step: Step::Holes,
            };
            self.request(origin, Kind::Map, span, false, None, CopySet::one(copy));
        }
    }

    /// A copy said where it has data; `None`: it did not, or is out.
    pub(super) fn holes_known(&mut self, id: u64, allocated: Option<&[u64]>) {
        let Some(s) = self.running_scrub(id) else {
            return;
        };
        let range = &mut s.range;
        range.open -= 1;
        match allocated {
            Some(words) if words.len() == range.words.len() => {
                let all = range.words.iter_mut().zip(words);
                all.for_each(|(all, one)| *all |= one);
            }
            // Nobody knows: all of it is compared.
            _ => range.words.fill(u64::MAX),
        }
        if range.open == 0 && range.stale {
            // Of other copies than those that are to be compared now.
            (range.end, range.words) = (range.first, Vec::new());
        }
    }

    // ---- one chunk

    fn hold(&mut self, id: u64, chunk: Chunk) {
        let look = Look::new(self.chunk_span(chunk));
        if let Some(s) = self.running_scrub(id) {
            s.looks.insert(chunk, look);
        }
        if mutants::on(Mutant::ScrubUnheld) {
            return self.held(id, chunk);
        }
        let work = Work::Scrub { id, chunk };
        if let Some(work) = self.overlaps.claim(chunk.span(), work) {
            self.start_work(work);
        }
    }

    /// No write to the chunk is under way, and none begins before it is let go.
    pub(super) fn held(&mut self, id: u64, chunk: Chunk) {
        // The volume may have grown while it waited.
        let span = self.chunk_span(chunk);
        match self.look(id, chunk) {
            Some(look) => look.span = span,
            None => return self.release(span),
        }
        self.ask_hashes(id, chunk, Stage::Whole);
    }

    /// Asks every in-sync copy for the hash of the chunk, or of each of its blocks.
    fn ask_hashes(&mut self, id: u64, chunk: Chunk, stage: Stage) {
        let copies = self.in_sync;
        let Some(look) = self.look(id, chunk) else {
            return;
        };
        let span = look.span;
        let spans: Vec<Span> = match stage {
            Stage::Whole => vec![span],
            _ => (0..scrub::blocks(span))
                .map(|i| scrub::block(span, i))
                .collect(),
        };
        look.stage = stage;
        look.open = spans.len() * copies.len();
        look.stale = false;
        look.answers.clear();
        for (block, span) in spans.into_iter().enumerate() {
            for copy in copies.iter() {
                let origin = Origin::Scrub {
                    id,
                    step: Step::Hash(chunk, block),
                };
                self.request(origin, Kind::Hash, span, false, None, CopySet::one(copy));
            }
        }
    }

    /// Whether the request `seq` is a scrub's; with its id and step.
    pub(super) fn asked_by_scrub(&mut self, seq: Seq) -> Option<(u64, Step)> {
        match self.pending.get_mut(seq)?.origin {
            Origin::Scrub { id, step } => Some((id, step)),
            _ => None,
        }
    }

    /// Takes the request that `from` answered out; `false` when nobody waits for this answer.
    pub(super) fn take_scrub_answer(&mut self, from: usize, seq: Seq, status: Status) -> bool {
        let waits = |p: &mut super::Pending<D>| p.waiting.has(from);
        if !self.pending.get_mut(seq).is_some_and(waits) {
            return false;
        }
        if status == Status::Stale {
            self.outbid_by(from);
            return false;
        }
        self.pending.remove(seq);
        true
    }

    /// A copy answered with a hash; without one, its disk could not read, or it is out.
    pub(super) fn block_known(
        &mut self,
        id: u64,
        (chunk, block): (Chunk, usize),
        copy: usize,
        hash: Option<u128>,
    ) {
        let master = self.master;
        let Some(look) = self.look(id, chunk) else {
            return;
        };
        look.answers.push((block, copy, hash));
        look.open -= 1;
        if look.open > 0 {
            return;
        }
        match (look.stage, look.stale) {
            (Stage::Again, true) => self.ask_hashes(id, chunk, Stage::Again),
            (_, true) => self.ask_hashes(id, chunk, Stage::Whole),
            (Stage::Whole, false) => match look.verdicts(1, master)[0].outcome() {
                Found::Same => self.let_go(id, chunk),
                // A disk may have read wrong once: before this is a difference it is looked at again.
                _ => self.ask_hashes(id, chunk, Stage::Blocks),
            },
            (Stage::Blocks, false) => {
                let verdicts = look.verdicts(scrub::blocks(look.span), master);
                look.findings = scrub::places(look.span, &verdicts);
                let misread = look.findings.is_empty();
                if let Some(s) = self.running_scrub(id).filter(|_| misread) {
                    s.report.misread_chunks += 1;
                }
                self.mend_next(id, chunk);
            }
            (Stage::Again, false) => {
                let verdicts = look.verdicts(scrub::blocks(look.span), master);
                let span = look.span;
                let well = |at: &Span| {
                    let inside = |i: &usize| scrub::block(span, *i).overlaps(*at);
                    (0..verdicts.len())
                        .filter(inside)
                        .all(|i| verdicts[i].outcome() == Found::Same)
                };
                for finding in &mut look.findings {
                    finding.mended = well(&finding.span);
                }
                self.let_go(id, chunk);
            }
            (Stage::Waiting | Stage::Mending, false) => {}
        }
    }

    // ---- mending

    fn mend_next(&mut self, id: u64, chunk: Chunk) {
        let Some(repair) = self.running_scrub(id).map(|s| s.repair) else {
            return;
        };
        let Some(look) = self.look(id, chunk) else {
            return;
        };
        let due = |f: &Finding| f.verdict.is_mended(repair);
        let next = look.findings.iter().skip(look.next).position(due);
        match next {
            Some(after) => {
                look.next += after + 1;
                look.stage = Stage::Mending;
                look.mending = true;
                let span = look.findings[look.next - 1].span;
                let origin = Origin::Scrub {
                    id,
                    step: Step::Read(chunk),
                };
                // As the guest reads it.
                let from = CopySet::one(self.mended_from());
                self.request(origin, Kind::Read, span, false, None, from);
            }
            None if look.mending => self.ask_hashes(id, chunk, Stage::Again),
            None => self.let_go(id, chunk),
        }
    }

    fn mended_from(&self) -> usize {
        let others = self.in_sync.without(CopySet::one(self.master));
        match others.iter().next() {
            Some(other) if mutants::on(Mutant::RepairFromReplica) => other,
            _ => self.master,
        }
    }

    /// What is right in the place; `None` when no disk can read it any more.
    pub(super) fn mend_with(&mut self, id: u64, chunk: Chunk, span: Span, data: Option<D>) {
        if self.look(id, chunk).is_none() {
            return;
        }
        let Some(data) = data else {
            return self.mend_next(id, chunk);
        };
        let (kind, data) = if data.is_zero() {
            (Kind::Zero { unmap: true }, None)
        } else {
            (Kind::Write, Some(data))
        };
        // As the guest writes it: on every member and target, so that a copy which is away has it marked, too (S11). Durable:
        // what is called mended stays so.
        self.unflushed = true;
        let to = self.in_sync.or(self.mirror_to(span));
        let origin = Origin::Scrub {
            id,
            step: Step::Write(chunk),
        };
        self.request(origin, kind, span, true, data, to);
    }

    /// It is written, or the last copy's disk failed or is full.
    pub(super) fn mended(&mut self, id: u64, chunk: Chunk, outcome: Outcome) {
        if self.look(id, chunk).is_none() {
            // The scrub ended meanwhile; this write kept its claim until now.
            return self.release(self.chunk_span(chunk));
        }
        if outcome == Outcome::IoError {
            // Lets this chunk go as well.
            return self.end_scrub("the last copy's disk failed a repair, or is full");
        }
        self.mend_next(id, chunk);
    }

    // ---- the end of a chunk, and of it all

    fn let_go(&mut self, id: u64, chunk: Chunk) {
        let Some(look) = self.running_scrub(id).and_then(|s| s.looks.remove(&chunk)) else {
            return;
        };
        self.scrub_counters.chunks += 1;
        for finding in &look.findings {
            let place = self.place(finding);
            let blocks = u64::from(finding.span.len.div_ceil(BLOCK));
            let c = &mut self.scrub_counters;
            match place.outcome {
                Found::Differs => c.differences += blocks,
                Found::Unreadable | Found::Lost => c.unreadable += blocks,
                Found::Same => {}
            }
            c.repaired += if place.mended { blocks } else { 0 };
            let text = tell(&place);
            let Some(s) = self.running_scrub(id) else {
                return;
            };
            s.report.note(place);
            s.told += 1;
            if s.told <= EVENTS_MAX {
                self.event("11.6 difference", text);
            }
        }
        if let Some(s) = self.running_scrub(id) {
            s.report.compared_bytes += u64::from(look.span.len);
        }
        if !mutants::on(Mutant::ScrubUnheld) {
            self.release(look.span);
        }
    }

    fn place(&self, finding: &Finding) -> Place {
        let names = |set: &CopySet| {
            let node = |copy: usize| self.record.copies[copy].node.clone();
            set.iter().map(node).collect::<Vec<NodeName>>()
        };
        Place {
            offset: finding.span.offset,
            len: u64::from(finding.span.len),
            outcome: finding.verdict.outcome(),
            agree: finding.verdict.agree.iter().map(names).collect(),
            unreadable: names(&finding.verdict.unreadable),
            mended: finding.mended,
        }
    }

    fn scrub_over(&mut self) {
        self.note_left_out();
        let Some(s) = self.scrub.as_mut().filter(|s| s.is_running()) else {
            return;
        };
        s.progress = Progress::Done;
        let text = summary(&s.report);
        self.event("11.6 scrub ends", text);
    }

    /// A copy went, came, or is not whom we spoke to any more.
    pub(super) fn outdate_scrub(&mut self) {
        if let Some(s) = self.scrub.as_mut().filter(|s| s.is_running()) {
            if !mutants::on(Mutant::ScrubThroughLoss) {
                s.outdate();
            }
            self.note_left_out();
        }
    }

    fn note_left_out(&mut self) {
        let in_sync = self.in_sync;
        let absent = (self.record.copies.iter().enumerate()).filter(|(copy, c)| {
            !in_sync.has(*copy) && c.status != crate::replication::record::CopyStatus::Removed
        });
        let absent: Vec<(CopyId, NodeName)> =
            absent.map(|(_, c)| (c.copy_id, c.node.clone())).collect();
        if let Some(s) = self.scrub.as_mut().filter(|s| s.is_running()) {
            s.left_out.extend(absent);
        }
    }

    /// It is over before its end; nothing else is done about it.
    pub(super) fn scrub_broke_off(&mut self, why: &str) {
        if let Some(s) = self.scrub.as_mut().filter(|s| s.is_running()) {
            s.progress = Progress::BrokeOff(why.into());
            let text = format!("{why}; until then: {}", summary(&s.report));
            self.event("11.6 scrub broke off", text);
        }
    }

    /// It is over before its end: what it holds is let go, but for what is being written.
    pub(super) fn end_scrub(&mut self, why: &str) {
        self.scrub_broke_off(why);
        let Some(s) = &mut self.scrub else { return };
        let looks = std::mem::take(&mut s.looks);
        let mut writing = BTreeSet::new();
        for seq in self.pending.in_order() {
            let Some((_, step)) = self.asked_by_scrub(seq) else {
                continue;
            };
            match step {
                Step::Write(chunk) => drop(writing.insert(chunk)),
                _ => drop(self.pending.remove(seq)),
            }
        }
        for (chunk, look) in looks {
            // One that waits for its turn is let go when that comes.
            if look.stage != Stage::Waiting && !writing.contains(&chunk) {
                self.release(look.span);
            }
        }
    }
}

/// One sentence about a place.
fn tell(place: &Place) -> String {
    let list = |nodes: &[NodeName]| {
        let names: Vec<&str> = nodes.iter().map(|n| n.0.as_str()).collect();
        names.join(" = ")
    };
    let groups: Vec<String> = place.agree.iter().map(|nodes| list(nodes)).collect();
    let mut text = format!("{} bytes at {}: ", place.len, place.offset);
    text += &match place.outcome {
        Found::Lost => "no disk can read them".to_string(),
        _ => groups.join(", unlike "),
    };
    if !place.unreadable.is_empty() && place.outcome != Found::Lost {
        let nodes: Vec<&str> = place.unreadable.iter().map(|n| n.0.as_str()).collect();
        text += &format!("; not readable on {}", nodes.join(", "));
    }
    if place.mended {
        text += "; mended: the same on every copy now";
    }
    text
}

fn summary(report: &Report) -> String {
    format!(
        "{} bytes compared, {} differed, {} were not readable on a copy, {} on none; {} of these are mended",
        report.compared_bytes,
        report.differing_bytes,
        report.unreadable_bytes,
        report.lost_bytes,
        report.mended_bytes
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A scrub of so many chunks, in which those of `data` are no holes.
    fn with_data(chunks: u64, data: &[u64]) -> Scrub {
        let mut s = Scrub::new(1, false, chunks * CHUNK, Nanos(0));
        let mut words = vec![0u64; chunks.div_ceil(64) as usize];
        data.iter()
            .for_each(|c| words[*c as usize / 64] |= 1 << (c % 64));
        s.range = Range {
            first: 0,
            end: chunks,
            open: 0,
            stale: false,
            words,
        };
        s
    }

    #[test]
    fn chunks_are_taken_in_order_but_holes_and_no_more_than_the_window() {
        let size = 200 * CHUNK;
        let mut s = Scrub::new(1, false, size, Nanos(0));
        let (first, count) = (0, 200);
        assert_eq!(s.next(size), Next::Holes { first, count });
        let data: Vec<u64> = (0..7).chain([70, 130, 199]).collect();
        let mut s = with_data(200, &data);
        let mut taken = Vec::new();
        while let Next::Hold(chunk) = s.next(size) {
            s.looks.insert(chunk, Look::new(chunk.span()));
            taken.push(u64::from(chunk.0));
        }
        // The window that every throttle begins with.
        assert_eq!(taken, data[..8]);
        assert_eq!(s.next(size), Next::Wait);
        // Done with the second: the first is still what all before it are done with.
        s.looks.remove(&Chunk(1));
        assert_eq!(s.done_bytes(), 0);
        assert_eq!(s.next(size), Next::Hold(Chunk(130)));
        s.looks.clear();
        assert_eq!(s.next(size), Next::Hold(Chunk(199)));
        s.looks.insert(Chunk(199), Look::new(Chunk(199).span()));
        assert_eq!(s.next(size), Next::Wait);
        assert_eq!(s.done_bytes(), 199 * CHUNK);
        s.looks.clear();
        // The volume has grown meanwhile, into a chunk of which there is half.
        let grown = size + CHUNK / 2;
        let (first, count) = (200, 1);
        assert_eq!(s.next(grown), Next::Holes { first, count });
        assert_eq!(s.next(size), Next::Over);
    }

    #[test]
    fn a_volume_larger_than_one_question_about_holes_is_asked_about_in_parts() {
        let chunks = u64::from(MAP_CHUNKS) + 3;
        let mut s = Scrub::new(1, false, chunks * CHUNK, Nanos(0));
        let (first, count) = (0, u64::from(MAP_CHUNKS));
        assert_eq!(s.next(chunks * CHUNK), Next::Holes { first, count });
        s.range = Range {
            first,
            end: count,
            open: 1,
            stale: false,
            words: vec![0; count as usize / 64],
        };
        assert_eq!(s.next(chunks * CHUNK), Next::Wait);
        s.range.open = 0;
        let (first, count) = (count, 3);
        assert_eq!(s.next(chunks * CHUNK), Next::Holes { first, count });
    }
}
