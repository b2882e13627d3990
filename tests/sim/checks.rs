//! The rules of PROTOCOL 9, by name, as far as they can be read off the world: from what the copies' disks hold, what is
//! said on the network, and what the guest was told. The rest lies with the thing it is about: S1, S6 and S13 in `registry.rs`,
//! S2 and S16 in `disk.rs`, S9 and S10 in `oracle.rs`, S8, S17 and S19 where the guest is answered (`guest.rs`).

use lockstep::replication::copy_state::{CopyState, Standing};
use lockstep::replication::ids::{Chunk, CopyId, IO_MAX, REGION, Region, SECTOR, Span, ZERO_MAX};
use lockstep::replication::message::{MAP_CHUNKS, Message, RUNS_MAX};
use lockstep::replication::record::{CopyEntry, CopyStatus, Record};
use lockstep::replication::replica::{DiskOp, REQUESTS_MAX};

use super::disk::{Disk, PER_CHUNK, Stamps, sectors};
use super::oracle::Moment;
use super::world::World;

/// What one copy is to another, for S11.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Relation {
    /// Both are in sync: they differ only where one of their logs says so.
    Equals,
    /// The first is in sync, the second would come back by a delta: the first one's bitmap counts too.
    Delta,
}

impl World {
    /// S3, S4: every member of the in-sync set in the registry has it.
    pub fn check_applied(&mut self, by: usize, id: u64, span: Span, fua: bool, start: Moment) {
        for c in self.in_sync() {
            // What every copy lost again is nowhere; the guest's next flush says so.
            if self.nodes[c].cut > start || self.all_cut > start {
                continue;
            }
            let disk = self.disk(c);
            for s in sectors(span) {
                assert!(
                    self.oracle.holds(s, disk.cache[s], by, id),
                    "S3: write {id} completed, but in-sync copy {c} has {} in sector {s}",
                    disk.cache[s]
                );
                assert!(
                    !fua || self.oracle.holds(s, disk.durable[s], by, id),
                    "S5: write-through {id} completed, but copy {c} has it not durable in sector {s}"
                );
            }
        }
    }

    /// S5: what was completed before the flush began is on stable storage of every in-sync copy.
    pub fn check_flushed(&mut self, by: usize, start: Moment) {
        let covered = self.oracle.covered(by, start);
        for c in self.in_sync() {
            let disk = self.disk(c);
            for &(s, newest) in &covered {
                if disk.decayed.contains_key(&s) {
                    continue;
                }
                assert!(
                    self.oracle.holds(s, disk.durable[s], by, newest),
                    "S5: flush completed, but copy {c} has {} durable in sector {s}, not {newest}",
                    disk.durable[s]
                );
            }
        }
    }

    /// What a copy says is durable is (S2, S7), before it says so.
    pub fn check_reply(&self, n: usize, message: &Message) {
        let disk = self.disk(n);
        let state = &disk.superblock;
        match message {
            Message::PromiseAck(answer) if !answer.probe => {
                assert!(
                    state.promised >= answer.promised,
                    "S2: copy {n} promises epoch {}, its disk says {}",
                    answer.promised,
                    state.promised
                );
                assert_eq!(
                    disk.writes_running(),
                    0,
                    "S7: promised with writes under way"
                );
            }
            Message::AttachAck { epoch } | Message::EpochAck { epoch } => {
                // A target's epoch says from when its data are, until the sync ends.
                let taken = state.epoch >= *epoch || state.standing == Standing::Inconsistent;
                assert!(
                    taken && state.promised >= *epoch,
                    "S2: copy {n} takes epoch {epoch}, its disk says {}",
                    state.epoch
                );
                assert!(
                    self.registry.epochs.get(&state.epoch) == Some(&state.tag)
                        || state.standing == Standing::Inconsistent,
                    "S1: copy {n} is in epoch {} under another tag than the record had",
                    state.epoch
                );
            }
            Message::SyncReady { .. } => assert!(
                state.standing == Standing::Inconsistent,
                "6: copy {n} is ready to be synced, but its disk calls itself {:?}",
                state.standing
            ),
            Message::SyncDoneAck { epoch } => assert!(
                state.standing == Standing::InSync && state.epoch == *epoch,
                "S13: copy {n} says that it is in sync, but its disk says {:?} in epoch {}",
                state.standing,
                state.epoch
            ),
            Message::DetachAck { .. } => assert!(
                state.clean && disk.log.is_empty() && !disk.log_lost,
                "5: copy {n} detached, but its log has {:?} (clean: {})",
                disk.log,
                state.clean
            ),
            _ => {}
        }
    }

    /// S19: what is sent fits a frame.
    pub fn check_message(&self, message: &Message, data: Option<&Stamps>) {
        let bytes = data.map_or(0, |d| d.0.len() as u64 * SECTOR);
        assert!(
            bytes <= u64::from(IO_MAX),
            "S19: {bytes} bytes in one message"
        );
        let (is, most) = match message {
            Message::AckVec { acks, .. } => (acks.len(), REQUESTS_MAX),
            Message::MapRead { count, .. } => (*count as usize, MAP_CHUNKS as usize),
            Message::Clear { runs, .. } => (runs.len(), RUNS_MAX),
            Message::WriteZeroes { request, .. } | Message::Discard(request) => {
                (request.span.len as usize, ZERO_MAX as usize)
            }
            _ => return,
        };
        assert!(is <= most, "S19: {is} in {message:?}");
    }

    /// S7: nothing is written after a promise until an attachment has bound the copy. S15: log before data, unless no other
    /// copy ever held the volume, or the chunk is marked for this copy wherever a delta would be taken from.
    pub fn check_disk_op(&self, n: usize, op: &DiskOp<Stamps>) {
        let (DiskOp::Write { span, .. } | DiskOp::Zero { span, .. }) = op else {
            return;
        };
        assert!(
            !self.nodes[n].fenced,
            "S7: a write after the promise, before an attach"
        );
        let disk = self.disk(n);
        if span.regions().all(|r| disk.is_logged(r)) {
            return;
        }
        let id = disk.copy_id();
        let record = &self.registry.record;
        let ever_others = record
            .present()
            .any(|c| c.copy_id != id && c.base.since.0 > 0);
        if !ever_others {
            return;
        }
        let marked = || {
            self.in_sync().into_iter().all(|y| {
                let marks = |c| self.marks(y, id, c);
                span.chunks().all(|c| marks(c.0 as usize))
            })
        };
        assert!(
            disk.superblock.standing == Standing::Inconsistent
                && (!self.comes_back_by_delta(n) || marked()),
            "S15: {span:?} is written at copy {n} before its region is in the log"
        );
    }

    /// Whether the copy `y` marks the chunk for `copy`: in memory while its process runs.
    fn marks(&self, y: usize, copy: CopyId, chunk: usize) -> bool {
        let chunk = Chunk(chunk as u32);
        let slot = |state: &CopyState| {
            let mut slots = state.bitmaps.iter();
            slots.position(|b| b.is_some_and(|b| b.copy_id == copy))
        };
        let disk = self.disk(y);
        match &self.nodes[y].replica {
            Some(replica) => slot(replica.state())
                .and_then(|slot| replica.map(slot))
                .is_some_and(|map| map.is_set(chunk)),
            None => slot(&disk.superblock)
                .and_then(|slot| disk.maps()[slot].take())
                .is_some_and(|map| map.is_set(chunk)),
        }
    }

    /// Whether an attachment would bring this absent copy up to date by what its disk says it is (PROTOCOL 6).
    fn comes_back_by_delta(&self, n: usize) -> bool {
        let Some(place) = self.place(n) else {
            return false;
        };
        let record = &self.registry.record;
        let (entry, state) = (&record.copies[place], &self.disk(n).superblock);
        let last = entry.base.last.unwrap_or(record.epoch);
        state.standing != Standing::Failed
            && (entry.base.since..=last).contains(&state.epoch)
            && record.lineage.contains(&(state.epoch, state.tag))
    }

    fn relation(&self, y: usize, x: usize) -> Option<Relation> {
        let record = &self.registry.record;
        let status = |n: usize| Some(record.copies[self.place(n)?].status);
        let works = |n: usize| !self.disk(n).failed;
        if !works(x) || !works(y) || status(y)? != CopyStatus::InSync {
            return None;
        }
        match status(x)? {
            CopyStatus::InSync => Some(Relation::Equals),
            CopyStatus::Missing | CopyStatus::Syncing if self.comes_back_by_delta(x) => {
                Some(Relation::Delta)
            }
            _ => None,
        }
    }

    /// S11 for the copy on node `n` and every other one: where they differ, now or after power cuts, somebody's log or
    /// bitmap says so. Asked for whenever something is forgotten or lost; S12 is the same of a bit just cleared.
    pub fn check_differences(&self, n: usize, rule: &str) {
        if self.nodes[n].disk.is_none() {
            return;
        }
        for m in (0..self.nodes.len()).filter(|m| *m != n && self.nodes[*m].disk.is_some()) {
            match self.relation(n, m) {
                Some(relation) => self.check_pair(n, m, relation, rule),
                None => {
                    if let Some(relation) = self.relation(m, n) {
                        self.check_pair(m, n, relation, rule);
                    }
                }
            }
        }
    }

    /// The copy on `n` comes back: whether it has something of its own that nothing but its own log names.
    pub fn note_returning(&mut self, n: usize) {
        let (disk, id) = (self.disk(n), self.disk(n).copy_id());
        if disk.log_lost || !self.comes_back_by_delta(n) {
            return;
        }
        let per_region = (REGION / SECTOR) as usize;
        let alone = self.in_sync().into_iter().any(|y| {
            let other = self.disk(y);
            let all = disk.cache.len().min(other.cache.len());
            let unknown = |r: &&Region| !other.is_logged(**r);
            disk.log.iter().filter(unknown).any(|r| {
                let first = r.0 as usize * per_region;
                let span = first.min(all)..(first + per_region).min(all);
                (span.start / PER_CHUNK..span.end.div_ceil(PER_CHUNK)).any(|chunk| {
                    let span = chunk * PER_CHUNK..((chunk + 1) * PER_CHUNK).min(all);
                    !same(disk, other, span) && !self.marks(y, id, chunk)
                })
            })
        });
        if alone {
            self.seen
                .count("returning copy with what only its log names");
        }
    }

    /// As [`Self::check_differences`], of all copies.
    pub fn check_all_differences(&self, rule: &str) {
        (0..self.nodes.len()).for_each(|n| self.check_differences(n, rule));
    }

    fn check_pair(&self, y: usize, x: usize, relation: Relation, rule: &str) {
        let (at_y, at_x) = (self.disk(y), self.disk(x));
        let per_region = (REGION / SECTOR) as usize;
        let all = at_y.cache.len().min(at_x.cache.len());
        for region in 0..all.div_ceil(per_region) {
            let logged = |d: &Disk| d.is_logged(Region(region as u32));
            if logged(at_y) || logged(at_x) {
                continue;
            }
            let span = region * per_region..((region + 1) * per_region).min(all);
            if same(at_y, at_x, span.clone()) {
                continue;
            }
            for chunk in span.start / PER_CHUNK..span.end.div_ceil(PER_CHUNK) {
                let span = chunk * PER_CHUNK..((chunk + 1) * PER_CHUNK).min(all);
                let known = relation == Relation::Delta && self.marks(y, at_x.copy_id(), chunk);
                if known || same(at_y, at_x, span.clone()) {
                    continue;
                }
                let s = span
                    .clone()
                    .find(|s| !same(at_y, at_x, *s..*s + 1))
                    .unwrap();
                panic!(
                    "{rule}: copies {y} and {x} differ in sector {s} (chunk {chunk}), and nobody knows: cached {} and {}, durable {} and {}",
                    at_y.cache[s], at_x.cache[s], at_y.durable[s], at_x.durable[s]
                );
            }
        }
    }

    /// S13, S18: a copy that was just taken in calls itself in sync, durably, and holds all that the others hold but for what
    /// is under way: every completed write, blank disk or not.
    pub fn check_joined(&mut self, before: &Record) {
        let was = |c: &CopyEntry| {
            before
                .copy(c.copy_id)
                .is_some_and(|b| b.status == CopyStatus::InSync)
        };
        let joined: Vec<CopyEntry> = self
            .registry
            .record
            .in_sync()
            .filter(|c| !was(c))
            .cloned()
            .collect();
        for entry in joined {
            let Some(n) = self.holder(&entry) else {
                continue;
            };
            // Its machine may have lost power meanwhile; the record names the boot it was synced under.
            self.nodes[n].gapped = entry.boot_id != Some(self.nodes[n].boot);
            let state = &self.disk(n).superblock;
            assert!(
                // Its disk may have died since.
                matches!(state.standing, Standing::InSync | Standing::Failed) && state.epoch.0 > 0,
                "S13: copy {n} is taken in, but its disk says that its sync has not ended"
            );
            self.check_differences(n, "S13");
            if self.nodes[n].gapped || self.disk(n).failed {
                continue;
            }
            for s in self.oracle.touched() {
                let value = self.disk(n).cache[s];
                assert!(
                    self.oracle.allows(s, value, self.moment),
                    "S13: copy {n} is taken in with {value} in sector {s}, and a completed write is lost"
                );
            }
        }
    }

    /// S20: every copy that is in sync has room for the size that the record says.
    pub fn check_room(&self) {
        let size = self.registry.record.size;
        for c in self.in_sync() {
            let room = self.disk(c).room();
            assert!(
                room >= size,
                "S20: the record says {size} bytes, and in-sync copy {c} has room for {room}"
            );
        }
    }

    /// S14: with nothing under way all copies that count are the same to the last byte.
    pub fn check_identical(&self) {
        let all = self.in_sync();
        let first = &self.disk(all[0]).cache;
        for &c in &all[1..] {
            let cache = &self.disk(c).cache;
            let end = (self.registry.record.size / SECTOR) as usize;
            let differ = (0..end).find(|s| cache[*s] != first[*s]);
            assert!(
                differ.is_none(),
                "S14: copies {} and {c} differ in sector {differ:?}: {:?}",
                all[0],
                differ.map(|s| (first[s], cache[s]))
            );
        }
    }

    /// After a clean detach: nothing in the logs, everything durable.
    pub fn check_left(&mut self) {
        self.seen.count("clean detach");
        for c in self.in_sync() {
            let disk = self.disk(c);
            // It may have lost power between its answer and the record's change.
            if self.nodes[c].cut > 0 && disk.cache != disk.durable {
                continue;
            }
            assert!(
                disk.superblock.clean && disk.log.is_empty() && !disk.log_lost,
                "5: left cleanly, but copy {c} has regions {:?} (clean: {})",
                disk.log,
                disk.superblock.clean
            );
            assert!(
                disk.cache == disk.durable,
                "S5: left cleanly, but copy {c} is not flushed"
            );
        }
    }

    /// Whether every in-sync copy lost power since it was last whole, but for those whose disks are dead: then the guest may miss
    /// what no flush covered.
    pub fn weigh_power(&mut self) {
        let members = self.in_sync();
        let gapped = |n: &usize| self.nodes[*n].gapped;
        let whole = members.iter().any(|n| !gapped(n) && !self.disk(*n).failed);
        if whole || !members.iter().any(gapped) {
            return;
        }
        self.oracle.power_lost(self.moment);
        self.all_cut = self.moment;
        self.seen.count("power loss of all in-sync copies");
        self.say(|_| "every in-sync copy lost power".into());
        for c in self.in_sync() {
            self.nodes[c].gapped = false;
        }
        for att in &mut self.atts {
            att.lost_power = true;
        }
    }
}

/// Whether two disks hold the same, whichever of them loses power now. That no log says where a disk rots is no fault of the
/// protocol.
fn same(a: &Disk, b: &Disk, mut span: std::ops::Range<usize>) -> bool {
    let equal = |span: std::ops::Range<usize>| {
        let (ac, ad) = (&a.cache[span.clone()], &a.durable[span.clone()]);
        let (bc, bd) = (&b.cache[span.clone()], &b.durable[span]);
        ac == bc && ad == bc && ac == bd
    };
    let rots = |s: &usize| a.decayed.contains_key(s) || b.decayed.contains_key(s);
    equal(span.clone()) || span.all(|s| rots(&s) || equal(s..s + 1))
}
