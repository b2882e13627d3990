//! The dirty bitmaps that a copy keeps of the absent ones (PROTOCOL 1, 6): what marks and clears them, and when that is
//! durable. A bit may be set too much: that costs a comparison. A bit wrongly clear costs data.

use super::*;
use crate::replication::ids::{CHUNK, REGION};
use crate::replication::message::MAP_CHUNKS;
use crate::replication::resync::{self, Marks};

impl<D> Replica<D> {
    /// Takes over which copies are absent.
    pub(super) fn keep_bitmaps(&mut self, config: &Configuration) -> Result<(), Refusal> {
        let me = self.state.copy_id;
        let absent = |copy: CopyId| config.absent.iter().find(|a| a.copy_id == copy);
        let target = matches!(self.role, Role::Target { .. });
        let regions = self.log.named();
        // As large as there is room: a map never shrinks.
        let size = self.room();
        let mark = |map: &mut DirtyMap, due: Marks| match due {
            Marks::Nothing => {}
            Marks::Log => map.set_regions(regions.as_deref(), size),
            Marks::All => map.set_all(size),
        };
        for slot in 0..BITMAPS_MAX {
            let Some(bitmap) = self.state.bitmaps[slot] else {
                continue;
            };
            let mirrored = std::mem::take(&mut self.mirrored[slot]);
            let Some(a) = absent(bitmap.copy_id).filter(|a| a.copy_id != me) else {
                self.state.bitmaps[slot] = None;
                self.maps[slot] = None;
                continue;
            };
            let Some(map) = &mut self.maps[slot] else {
                continue;
            };
            map.grow(size);
            self.mirrored[slot] = a.mirrored && !target;
            mark(map, resync::marks(Some(mirrored), a, target));
        }
        for a in config.absent.iter().filter(|a| a.copy_id != me) {
            let known = |b: &Bitmap| b.copy_id == a.copy_id;
            if self.state.bitmaps.iter().flatten().any(known) {
                continue;
            }
            let Some(free) = self.state.bitmaps.iter().position(Option::is_none) else {
                let text = "more absent copies than bitmaps".into();
                return Err(Refusal::Protocol(text));
            };
            let mut map = DirtyMap::new(size);
            mark(&mut map, resync::marks(None, a, target));
            self.state.bitmaps[free] = Some(Bitmap {
                copy_id: a.copy_id,
                last: a.last,
            });
            self.maps[free] = Some(map);
            self.mirrored[free] = a.mirrored && !target;
        }
        Ok(())
    }

    fn slot_of(&self, copy: CopyId) -> Option<usize> {
        let of = |b: &Option<Bitmap>| b.as_ref().is_some_and(|b| b.copy_id == copy);
        self.state.bitmaps.iter().position(of)
    }

    pub(super) fn all_regions(&self) -> Vec<Region> {
        let count = self.state.size.div_ceil(REGION) as u32;
        (0..count).map(Region).collect()
    }

    /// Which of these chunks are marked for a copy, and which hold data here.
    pub(super) fn read_map(
        &mut self,
        session: SessionId,
        current: bool,
        (seq, copy, first, count): (Seq, CopyId, Chunk, u32),
    ) {
        let chunks = self.state.size.div_ceil(CHUNK);
        let inside = u64::from(first.0) + u64::from(count) <= chunks;
        let status = match (current, inside && (1..=MAP_CHUNKS).contains(&count)) {
            (false, _) => Status::Stale,
            (true, false) => Status::Io,
            (true, true) => {
                let slot = self.slot_of(copy);
                let map = slot.and_then(|s| self.maps[s].as_ref());
                let dirty = map.map(|m| m.range(first, count)).unwrap_or_default();
                let op = Op::Map {
                    session,
                    seq,
                    dirty,
                };
                return self.start(op, DiskOp::Allocated { first, count });
            }
        };
        self.reply(session, no_map(seq, status));
    }

    pub(super) fn mapped(
        &mut self,
        session: SessionId,
        seq: Seq,
        dirty: Vec<u64>,
        result: DiskResult<D>,
    ) {
        let message = match result {
            DiskResult::Allocated(allocated) => Message::MapReply {
                seq,
                status: Status::Ok,
                dirty,
                allocated,
            },
            _ => no_map(seq, Status::Io),
        };
        self.reply(session, message);
    }

    /// What an absent copy holds that this one may not have: from now on it is in this copy's bitmap, too (S11).
    pub(super) fn mark(
        &mut self,
        session: SessionId,
        epoch: Epoch,
        seq: Seq,
        copy: CopyId,
        regions: Option<Vec<Region>>,
    ) {
        if !self.current(epoch) {
            return self.ack(session, seq, Status::Stale);
        }
        let (size, all) = (self.state.size, self.all_regions());
        let regions = regions.unwrap_or_else(|| all.clone());
        let slot = self.slot_of(copy);
        let (Some(map), true) = (
            slot.and_then(|s| self.maps[s].as_mut()),
            regions.iter().all(|r| (r.0 as usize) < all.len()),
        ) else {
            return self.ack(session, seq, Status::Io);
        };
        regions.iter().for_each(|r| map.set_region(*r, size));
        self.marks.push((session, seq, regions));
    }

    /// S12: the target has these chunks on stable storage. Whether this is durable here does not matter.
    pub(super) fn clear(&mut self, epoch: Epoch, copy: CopyId, runs: &[(Chunk, u32)]) {
        if !self.current(epoch) {
            return;
        }
        let chunks = self.state.size.div_ceil(CHUNK);
        let slot = self.slot_of(copy);
        let Some(map) = slot.and_then(|s| self.maps[s].as_mut()) else {
            return;
        };
        for (first, count) in runs {
            let end = (u64::from(first.0) + u64::from(*count)).min(chunks) as u32;
            for chunk in first.0..end {
                if map.clear(Chunk(chunk)) {
                    self.cleared
                        .insert(Region((u64::from(chunk) * CHUNK / REGION) as u32));
                }
            }
        }
    }

    /// Makes marks durable, at once, and what was cleared, at each look for idle regions. Not beside a log transaction, which
    /// may be writing the same pages.
    pub(super) fn write_bitmaps(&mut self) {
        if self.bitmaps_running || self.log.running() {
            return;
        }
        let mut regions = BTreeSet::new();
        let mut asked = Vec::new();
        for (session, seq, of) in std::mem::take(&mut self.marks) {
            asked.push((session, seq));
            regions.extend(of);
        }
        if self.look_for_idle {
            regions.append(&mut self.cleared);
        }
        if !regions.is_empty() || !asked.is_empty() {
            self.start_bitmaps(regions.into_iter().collect(), asked);
        }
    }

    pub(super) fn start_bitmaps(&mut self, regions: Vec<Region>, asked: Vec<(SessionId, Seq)>) {
        self.bitmaps_running = true;
        self.start(Op::Bitmaps(asked), DiskOp::Bitmaps(regions));
    }

    pub(super) fn bitmaps_written(&mut self, asked: &[(SessionId, Seq)]) {
        self.bitmaps_running = false;
        for (session, seq) in asked {
            self.ack(*session, *seq, Status::Ok);
        }
    }
}

fn no_map(seq: Seq, status: Status) -> Message {
    Message::MapReply {
        seq,
        status,
        dirty: Vec::new(),
        allocated: Vec::new(),
    }
}
