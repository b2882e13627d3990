//! One pass over the chunks that a target lacks (PROTOCOL 6): lock, compare hashes, copy where they differ, flush, clear the
//! marks. Bits only fall, so the pass ends under constant writes.

use super::sync::{Stage, Step};
use super::{Attachment, CopySet, Kind, Origin, Payload, Work};
use crate::replication::ids::{Chunk, Nanos, Seq, Span};
use crate::replication::message::{Message, RUNS_MAX, Status};
use crate::replication::mutants::{self, Mutant};

/// Chunks that one flush of the target covers: 16 MiB, so that a flush's cost is spread and little is copied again after
/// a crash.
const FLUSH_CHUNKS: usize = 256;
/// And the longest that a copied chunk stays marked.
const FLUSH_AFTER: Nanos = Nanos::from_ms(1_000);

/// Where the copying of one chunk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChunkState {
    /// Writes to it are under way; its lock comes after them.
    Waiting,
    /// Hashes are asked for; `Some(None)` where the disk could not read.
    Comparing {
        master: Option<Option<u128>>,
        target: Option<Option<u128>>,
    },
    /// Read, then written to the target; `logged`: like any other write, its log first.
    Copying { logged: bool },
}

impl<D: Payload> Attachment<D> {
    pub(super) fn advance_syncs(&mut self) {
        for copy in self.targets().iter() {
            while let Some((session, chunk)) = self.next_chunk(copy) {
                // All of it, though the volume may end in it: it may grow meanwhile, and a write to the new rest of a chunk that
                // is being copied would be neither in the copy nor mirrored.
                let span = chunk.span();
                let work = Work::Chunk {
                    copy,
                    session,
                    chunk,
                };
                if let Some(work) = self.overlaps.claim(span, work) {
                    self.start_work(work);
                }
            }
            self.flush_copied(copy);
        }
    }

    /// The next chunk to lock, if the window allows one.
    fn next_chunk(&mut self, copy: usize) -> Option<(u64, Chunk)> {
        let sync = self.syncs.get_mut(&copy)?;
        let may = sync.stage == Stage::Copying && sync.lost.is_none();
        if !may || sync.chunks.len() >= sync.throttle.window() as usize {
            return None;
        }
        let chunk = sync.todo.next(sync.cursor)?;
        sync.cursor = Chunk(chunk.0 + 1);
        sync.chunks.insert(chunk, ChunkState::Waiting);
        Some((sync.session, chunk))
    }

    /// No write to the chunk is under way, and none begins before it is released.
    pub(super) fn chunk_locked(&mut self, copy: usize, session: u64, chunk: Chunk) {
        let span = self.chunk_span(chunk);
        let Some(sync) = self.sync_of(copy, session) else {
            return self.release(span);
        };
        let state = ChunkState::Comparing {
            master: None,
            target: None,
        };
        sync.chunks.insert(chunk, state);
        for from in [self.master, copy] {
            let origin = Origin::Sync {
                copy,
                session,
                step: Step::Hash(chunk),
            };
            self.request(origin, Kind::Hash, span, false, None, CopySet::one(from));
        }
    }

    /// Takes the answer to a query of a session: its target, session, step and span. `None` when nobody waits for it.
    pub(super) fn query_ended(
        &mut self,
        from: usize,
        seq: Seq,
        kind: Kind,
        status: Status,
    ) -> Option<(usize, u64, Step, Span)> {
        let p = self.pending.get_mut(seq)?;
        let (
            span,
            Origin::Sync {
                copy,
                session,
                step,
            },
        ) = (p.span, &p.origin)
        else {
            return None;
        };
        let (copy, session, step) = (*copy, *session, *step);
        if p.kind != kind || !p.waiting.has(from) {
            return None;
        }
        if status == Status::Stale {
            self.outbid_by(from);
            return None;
        }
        self.pending.remove(seq);
        Some((copy, session, step, span))
    }

    pub(super) fn hash_answered(&mut self, from: usize, seq: Seq, status: Status, hash: u128) {
        let Some((copy, session, Step::Hash(chunk), span)) =
            self.query_ended(from, seq, Kind::Hash, status)
        else {
            return;
        };
        let answer = Some((status == Status::Ok).then_some(hash));
        let Some(sync) = self.sync_of(copy, session) else {
            return;
        };
        let Some(ChunkState::Comparing { master, target }) = sync.chunks.get_mut(&chunk) else {
            return;
        };
        *(if from == copy { target } else { master }) = answer;
        match sync.chunks[&chunk] {
            ChunkState::Comparing {
                master: Some(Some(a)),
                target: Some(Some(b)),
            } if a == b => self.chunk_copied(copy, session, chunk),
            ChunkState::Comparing {
                master: Some(master),
                target: Some(target),
            } => {
                // S15: hashes that differ are of a chunk in which the target differs from every in-sync copy; so each of them has
                // it in its bitmap or its log (S11). Where a disk could not read, nothing says that. C cannot read a sector, A
                // had one repaired there: the region is in A's log alone, B's retired it long ago. C is ejected, A marks the chunk,
                // B has no reason to. Were C written to without its log, A ejected and the sync begun anew from B, nobody would
                // know of that write.
                let logged = master.is_none() || target.is_none();
                sync.chunks.insert(chunk, ChunkState::Copying { logged });
                let origin = Origin::Sync {
                    copy,
                    session,
                    step: Step::Read(chunk),
                };
                let from = CopySet::one(self.master);
                self.request(origin, Kind::Read, span, false, None, from);
            }
            _ => {}
        }
    }

    /// The chunk as an in-sync copy has it; `None` when none can read it. `span` is what was read: should the volume have grown
    /// meanwhile, the chunk has a new rest, which is zeros on both and locked like all of it.
    pub(super) fn chunk_for(
        &mut self,
        copy: usize,
        session: u64,
        chunk: Chunk,
        span: Span,
        data: Option<D>,
    ) {
        let Some(sync) = self.sync_of(copy, session) else {
            return;
        };
        let state = sync.chunks.get(&chunk);
        let logged = state == Some(&ChunkState::Copying { logged: true });
        let Some(data) = data else {
            let why = format!("chunk {chunk} can be read on no in-sync copy");
            return self.break_off(copy, &why);
        };
        let origin = Origin::Sync {
            copy,
            session,
            step: Step::Data(chunk),
        };
        let to = CopySet::one(copy);
        // Zeros go as a command: a target gives the space back that it had for what was discarded while it was away.
        let data = (!data.is_zero()).then_some(data);
        let kind = match (logged, &data) {
            (false, _) => Kind::Data,
            (true, Some(_)) => Kind::Write,
            (true, None) => Kind::Zero { unmap: true },
        };
        // Its region leaves the target's log after a flush, like any other.
        self.unflushed |= logged;
        self.request(origin, kind, span, false, data, to);
    }

    /// The target holds the chunk.
    pub(super) fn chunk_copied(&mut self, copy: usize, session: u64, chunk: Chunk) {
        let Some(sync) = self.sync_of(copy, session) else {
            return;
        };
        sync.chunks.remove(&chunk);
        sync.todo.clear(chunk);
        sync.copied.push(chunk);
        sync.counted += 1;
        self.release(self.chunk_span(chunk));
        if mutants::on(Mutant::ClearBeforeFlush) {
            let (epoch, copy) = (self.record.epoch, self.record.copies[copy].copy_id);
            let runs = vec![(chunk, 1)];
            self.send(self.ready, Message::Clear { epoch, copy, runs }, None);
        }
    }

    fn flush_copied(&mut self, copy: usize) {
        let now = self.now;
        let Some(sync) = self.syncs.get_mut(&copy) else {
            return;
        };
        if sync.stage != Stage::Copying || sync.lost.is_some() || sync.flushing.is_some() {
            return;
        }
        let all = sync.todo.count() == 0 && sync.chunks.is_empty();
        let due =
            sync.copied.len() >= FLUSH_CHUNKS || all || now.since(sync.flushed_at) >= FLUSH_AFTER;
        let session = sync.session;
        let last = all && sync.copied.is_empty();
        if last && !self.all_is_logged() {
            return;
        }
        let Some(sync) = self.syncs.get_mut(&copy) else {
            return;
        };
        let step = if !sync.copied.is_empty() && due {
            sync.flushing = Some(std::mem::take(&mut sync.copied));
            sync.flushed_at = now;
            Step::Flush
        } else if last {
            // S13: all its answers have been mandatory since it was mirrored; what it has taken is made durable now.
            sync.stage = Stage::Flushing;
            Step::LastFlush
        } else {
            return;
        };
        let origin = Origin::Sync {
            copy,
            session,
            step,
        };
        let (kind, nowhere) = (Kind::Flush { covers: Seq(1) }, Span { offset: 0, len: 0 });
        self.request(origin, kind, nowhere, false, None, CopySet::one(copy));
    }

    /// Whether everything that the in-sync copies have not flushed is in their logs.
    ///
    /// S11: the only copy writes without a log; a second one is made, copies that write, flushes it and is taken in; the first
    /// one, which never flushed it, loses power: the two differ, and no log says so. So before anybody is taken in, what
    /// was written without a log is flushed.
    fn all_is_logged(&mut self) -> bool {
        if self.stable >= self.unlogged {
            return true;
        }
        let flushing = |p: &super::Pending<D>| {
            matches!(p.kind, Kind::Flush { .. }) && !matches!(p.origin, Origin::Sync { .. })
        };
        let under_way = self.pending.iter().any(|(_, p)| flushing(p));
        if !under_way && self.pending.low_water(|p| p.kind.is_write()) > self.unlogged {
            self.start_flush(Origin::Background);
        }
        false
    }

    /// A request of a session to its target, or to mark on the in-sync copies, ended well.
    pub(super) fn step_ended(&mut self, copy: usize, session: u64, step: Step) {
        match step {
            Step::Mark => self.marked(copy, session),
            Step::Data(chunk) => self.chunk_copied(copy, session, chunk),
            Step::Flush => self.copied_flushed(copy, session),
            Step::LastFlush => {
                let epoch = self.record.epoch;
                if let Some(sync) = self.sync_of(copy, session) {
                    sync.stage = Stage::Ending;
                    self.send(CopySet::one(copy), Message::SyncDone { epoch }, None);
                }
            }
            Step::Map | Step::Hash(_) | Step::Read(_) => {}
        }
    }

    /// S12: the target has these on stable storage, and only now their marks go.
    fn copied_flushed(&mut self, copy: usize, session: u64) {
        let Some(mut chunks) = self.sync_of(copy, session).and_then(|s| s.flushing.take()) else {
            return;
        };
        chunks.sort_unstable();
        let mut runs: Vec<(Chunk, u32)> = Vec::new();
        for chunk in chunks {
            match runs.last_mut() {
                Some((first, count)) if first.0 + *count == chunk.0 => *count += 1,
                _ => runs.push((chunk, 1)),
            }
        }
        let of = self.record.copies[copy].copy_id;
        for runs in runs.chunks(RUNS_MAX) {
            let message = Message::Clear {
                epoch: self.record.epoch,
                copy: of,
                runs: runs.to_vec(),
            };
            self.send(self.ready, message, None);
        }
    }
}
