//! One copy's disk: a page cache over stable storage, the superblock, the activity log and the bitmaps.
//!
//! A write takes effect sector by sector at some moment between its start and its end. A crash of the process leaves
//! what took effect; a power cut takes back, sector by sector, whatever no completed sync covers. Rot shows when the copy
//! is opened next (metadata) or read (data).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::rc::Rc;

use lockstep::replication::attachment::Payload;
use lockstep::replication::copy_state::{BITMAPS_MAX, CopyState};
use lockstep::replication::dirty_map::DirtyMap;
use lockstep::replication::ids::{CHUNK, Chunk, CopyId, Epoch, REGION, Region, SECTOR, Seq, Span};
use lockstep::replication::replica::{DiskOp, DiskResult, Ticket};

use super::rng::Rng;

/// A request's bytes, one stamp a sector; 0 is a sector of zeros.
#[derive(Clone, Debug)]
pub struct Stamps(pub Rc<Vec<u64>>);

impl Payload for Stamps {
    fn same(&self, other: &Self) -> bool {
        self.0 == other.0
    }

    fn count(&self) -> usize {
        self.0.len() * SECTOR as usize
    }

    fn is_zero(&self) -> bool {
        self.0.iter().all(|stamp| *stamp == 0)
    }
}

/// Sectors of a chunk.
pub const PER_CHUNK: usize = (CHUNK / SECTOR) as usize;

pub fn sectors(span: Span) -> std::ops::Range<usize> {
    (span.offset / SECTOR) as usize..(span.end() / SECTOR) as usize
}

/// A value that no sync has made durable yet.
struct Unsynced {
    ticket: Ticket,
    /// When its write was reported done, in the disk's own count; `None` before.
    done: Option<u64>,
    value: u64,
}

/// How an operation will end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Done,
    Error,
    Full,
}

pub enum Running {
    Write {
        span: Span,
        values: Rc<Vec<u64>>,
        /// Gives the space back.
        unmap: bool,
        dsync: bool,
        applied: bool,
    },
    Read {
        span: Span,
        early: Option<Vec<u64>>,
    },
    Hash {
        span: Span,
    },
    Allocated {
        first: Chunk,
        count: u32,
    },
    Sync {
        mark: u64,
    },
    Grow {
        size: u64,
    },
    Superblock(Box<CopyState>),
    Log {
        add: Vec<Region>,
        retire: Vec<Region>,
        anew: bool,
    },
    Bitmaps(Vec<(usize, Region, Vec<bool>)>),
}

/// What reads wrong at an opening (docs/DISK-FORMAT.md says what that means).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rot {
    /// One half of the superblock: the other one counts.
    Superblock(usize),
    /// A sector of the log.
    Log,
    /// A sector of the bitmap in this slot: all its chunks count as marked.
    Bitmap(usize),
}

type Half = (u64, CopyState, [u64; BITMAPS_MAX]);

/// What a copy no longer has to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgot {
    /// Regions left the log.
    Regions,
    /// Chunks were cleared in a bitmap.
    Bits,
}

/// A copy as its disk has it.
pub struct Opened {
    pub state: CopyState,
    /// `None`: the log cannot be read.
    pub regions: Option<Vec<Region>>,
    pub maps: [Option<DirtyMap>; BITMAPS_MAX],
}

pub struct Disk {
    /// What a read returns.
    pub cache: Vec<u64>,
    /// What survives a power cut for certain.
    pub durable: Vec<u64>,
    unsynced: BTreeMap<usize, Vec<Unsynced>>,
    count: u64,
    /// The state in force: of the newer half.
    pub superblock: CopyState,
    /// Each with its generation, and those that assigned the bitmap slots.
    halves: [Half; 2],
    /// Of the state in force.
    slots: [u64; BITMAPS_MAX],
    /// The assignment for which each slot's bits were written.
    written: [u64; BITMAPS_MAX],
    /// This half cannot be read until it is written again.
    rotten: Option<usize>,
    /// The highest epoch and promise whose write was reported done.
    reported: (Epoch, Epoch),
    pub log: BTreeSet<Region>,
    /// It cannot be read: every region counts as active, and nothing is written into it before it is written anew.
    pub log_lost: bool,
    /// Chunks that are no holes.
    data: Vec<bool>,
    /// Sectors that cannot be read until they are written.
    pub bad: BTreeSet<usize>,
    /// Sectors that read as what nobody wrote, until they are written, and what they held.
    pub decayed: BTreeMap<usize, u64>,
    /// Set when an operation took something out of the log or a bitmap.
    pub forgot: Option<Forgot>,
    /// Bad sectors that were written with what they had held.
    pub repaired: u64,
    /// Chunks that became holes.
    pub given_back: u64,
    pub written_anew: u64,
    /// Regions that left the log by themselves or at a detach.
    pub left_log: u64,
    maps: Vec<Vec<bool>>,
    pub running: HashMap<Ticket, (Running, Fate)>,
    /// Full until this moment.
    pub full_until: u64,
    /// A write or sync failed: nothing that this disk holds is relied on.
    pub failed: bool,
}

impl Disk {
    pub fn new(superblock: CopyState) -> Self {
        let sectors = (superblock.size / SECTOR) as usize;
        let chunks = superblock.size.div_ceil(CHUNK) as usize;
        Self {
            cache: vec![0; sectors],
            durable: vec![0; sectors],
            unsynced: BTreeMap::new(),
            count: 0,
            halves: [1, 2].map(|g| (g, superblock.clone(), [0; BITMAPS_MAX])),
            slots: [0; BITMAPS_MAX],
            written: [0; BITMAPS_MAX],
            rotten: None,
            reported: (superblock.epoch, superblock.promised),
            data: vec![false; chunks],
            bad: BTreeSet::new(),
            decayed: BTreeMap::new(),
            repaired: 0,
            given_back: 0,
            written_anew: 0,
            left_log: 0,
            forgot: None,
            superblock,
            log: BTreeSet::new(),
            log_lost: false,
            maps: vec![vec![false; chunks]; BITMAPS_MAX],
            running: HashMap::new(),
            full_until: 0,
            failed: false,
        }
    }

    pub fn copy_id(&self) -> CopyId {
        self.superblock.copy_id
    }

    /// What the next process finds.
    pub fn open(&mut self, rot: Option<Rot>) -> Opened {
        match rot {
            Some(Rot::Superblock(half)) => self.rotten = Some(half),
            Some(Rot::Log) => self.log_lost = true,
            Some(Rot::Bitmap(_)) | None => {}
        }
        let readable = (0..2).filter(|half| self.rotten != Some(*half));
        let newest = readable.max_by_key(|half| self.halves[*half].0).unwrap();
        (_, self.superblock, self.slots) = self.halves[newest].clone();
        for slot in 0..BITMAPS_MAX {
            // Of an assignment that a rotten half made: nobody knows what the bits are worth.
            if self.written[slot] > self.slots[slot] {
                self.maps[slot].fill(true);
                self.written[slot] = self.slots[slot];
            }
        }
        if let Some(Rot::Bitmap(slot)) = rot {
            self.maps[slot].fill(true);
            self.written[slot] = self.slots[slot];
        }
        assert!(
            self.superblock.size <= self.cache.len() as u64 * SECTOR,
            "the superblock states {} bytes, the files are shorter",
            self.superblock.size
        );
        let (epoch, promised) = (self.superblock.epoch, self.superblock.promised);
        assert!(
            epoch >= self.reported.0 && promised >= self.reported.1,
            "S2: opened in epoch {epoch} with promise {promised}, after {:?} had been reported durable",
            self.reported
        );
        Opened {
            state: self.superblock.clone(),
            regions: (!self.log_lost).then(|| self.log.iter().copied().collect()),
            maps: self.maps(),
        }
    }

    /// Takes an operation in. `bits` tells the replica's bitmaps in memory.
    pub fn start<'a>(
        &mut self,
        ticket: Ticket,
        op: DiskOp<Stamps>,
        fate: Fate,
        bits: impl Fn(usize) -> Option<&'a DirtyMap>,
    ) {
        let running = match op {
            DiskOp::Write { span, data, dsync } => {
                self.s16(span);
                Running::Write {
                    span,
                    values: data.0,
                    unmap: false,
                    dsync,
                    applied: false,
                }
            }
            DiskOp::Zero { span, unmap, dsync } => {
                self.s16(span);
                Running::Write {
                    span,
                    values: Rc::new(vec![0; sectors(span).len()]),
                    unmap,
                    dsync,
                    applied: false,
                }
            }
            DiskOp::Read { span, .. } => Running::Read { span, early: None },
            DiskOp::Hash { span } => Running::Hash { span },
            DiskOp::Allocated { first, count } => Running::Allocated { first, count },
            DiskOp::Sync => Running::Sync { mark: self.count },
            DiskOp::Grow { size } => Running::Grow { size },
            DiskOp::Superblock(state) => Running::Superblock(state),
            DiskOp::Log(txn) => Running::Log {
                add: txn.add,
                retire: txn.retire,
                anew: txn.anew,
            },
            DiskOp::Bitmaps(regions) => {
                let mut parts = Vec::new();
                for slot in 0..BITMAPS_MAX {
                    let Some(map) = bits(slot) else { continue };
                    // Files that a dead process made longer may have room for more.
                    let chunks = self.maps[slot].len().min(map.words().len() * 64);
                    for &region in &regions {
                        let part = chunks_of(region, chunks).map(|c| map.is_set(Chunk(c as u32)));
                        parts.push((slot, region, part.collect()));
                    }
                }
                Running::Bitmaps(parts)
            }
        };
        let before = self.running.insert(ticket, (running, fate));
        assert!(before.is_none(), "a ticket names one operation");
    }

    /// Whether its log says that the copy may differ here.
    pub fn is_logged(&self, region: Region) -> bool {
        self.log_lost || self.log.contains(&region)
    }

    fn s16(&self, span: Span) {
        for (other, _) in self.running.values() {
            if let Running::Write { span: busy, .. } = other {
                assert!(
                    !busy.overlaps(span),
                    "S16: {span:?} and {busy:?} are written at once"
                );
            }
        }
    }

    pub fn writes_running(&self) -> usize {
        let writes = |(op, _): &&(Running, Fate)| matches!(op, Running::Write { .. });
        self.running.values().filter(writes).count()
    }

    /// The moment in which an operation takes effect, before it is reported.
    pub fn take_effect(&mut self, ticket: Ticket) {
        let Some((op, fate)) = self.running.get_mut(&ticket) else {
            return;
        };
        match op {
            Running::Write {
                span,
                values,
                unmap,
                applied,
                ..
            } if !*applied && *fate == Fate::Done => {
                *applied = true;
                let (span, values, unmap) = (*span, values.clone(), *unmap);
                self.put(ticket, span, |i| Some(values[i]));
                if unmap {
                    self.give_back(span);
                }
            }
            Running::Read { span, early } => *early = Some(self.cache[sectors(*span)].to_vec()),
            _ => {}
        }
    }

    fn put(&mut self, ticket: Ticket, span: Span, value: impl Fn(usize) -> Option<u64>) {
        for (i, s) in sectors(span).enumerate() {
            if let Some(value) = value(i) {
                if self.bad.remove(&s) {
                    self.repaired += u64::from(self.cache[s] == value);
                }
                self.data[s / PER_CHUNK] = true;
                if let Some(held) = self.decayed.remove(&s) {
                    // A power cut may bring back what was there before, and not the rot.
                    self.durable[s] = held;
                }
                self.cache[s] = value;
                self.unsynced.entry(s).or_default().push(Unsynced {
                    ticket,
                    done: None,
                    value,
                });
            }
        }
    }

    /// The sector reads as something else from now on, if there is one that is no hole.
    pub fn rots(&mut self, s: usize, by: u64) -> bool {
        let there = s < self.cache.len() && self.data[s / PER_CHUNK];
        if there && !self.decayed.contains_key(&s) {
            self.decayed.insert(s, self.cache[s]);
            self.unsynced.remove(&s);
            self.cache[s] ^= by;
            self.durable[s] = self.cache[s];
        }
        there
    }

    /// Whole chunks of zeros become holes, whether or not a power cut may bring back what they held.
    fn give_back(&mut self, span: Span) {
        let end = if span.end() == self.superblock.size {
            span.end().next_multiple_of(CHUNK)
        } else {
            span.end()
        };
        let whole = span.offset.div_ceil(CHUNK)..end / CHUNK;
        for c in whole {
            self.given_back += u64::from(std::mem::take(&mut self.data[c as usize]));
        }
    }

    fn harden(&mut self, s: usize, upto: impl Fn(&Unsynced) -> bool) {
        let Some(list) = self.unsynced.get_mut(&s) else {
            return;
        };
        if let Some(last) = list.iter().rposition(upto) {
            self.durable[s] = list[last].value;
            list.drain(..=last);
        }
        if list.is_empty() {
            self.unsynced.remove(&s);
        }
    }

    /// The operation ends: its result, for the replica.
    pub fn end(&mut self, ticket: Ticket) -> Option<DiskResult<Stamps>> {
        self.take_effect(ticket);
        let (op, fate) = self.running.remove(&ticket)?;
        match fate {
            Fate::Full => return Some(DiskResult::NoSpace),
            Fate::Error => {
                self.failed |= !matches!(op, Running::Read { .. });
                return Some(DiskResult::Error);
            }
            Fate::Done => {}
        }
        let mut data = None;
        match op {
            Running::Write { span, dsync, .. } => {
                self.count += 1;
                let count = self.count;
                for s in sectors(span) {
                    for u in self.unsynced.get_mut(&s).into_iter().flatten() {
                        if u.ticket == ticket && u.done.is_none() {
                            u.done = Some(count);
                        }
                    }
                    if dsync {
                        self.harden(s, |u| u.ticket == ticket);
                    }
                }
            }
            Running::Read { early, .. } => {
                data = early.map(|values| Stamps(Rc::new(values)));
            }
            Running::Sync { mark } => {
                let dirty: Vec<usize> = self.unsynced.keys().copied().collect();
                for s in dirty {
                    self.harden(s, |u| u.done.is_some_and(|d| d <= mark));
                }
            }
            Running::Hash { span } => {
                return Some(DiskResult::Hash(hash(&self.cache[sectors(span)])));
            }
            Running::Allocated { first, count } => {
                let mut words = vec![0u64; count.div_ceil(64) as usize];
                let data = |i: &u32| self.data.get((first.0 + i) as usize) == Some(&true);
                for i in (0..count).filter(data) {
                    words[i as usize / 64] |= 1 << (i % 64);
                }
                return Some(DiskResult::Allocated(words));
            }
            other => self.persist(other),
        }
        Some(DiskResult::Done(data))
    }

    fn lengthen(&mut self, size: u64) {
        let sectors = ((size / SECTOR) as usize).max(self.cache.len());
        self.cache.resize(sectors, 0);
        self.durable.resize(sectors, 0);
        let chunks = sectors.div_ceil(PER_CHUNK);
        self.data.resize(chunks, false);
        self.maps.iter_mut().for_each(|m| m.resize(chunks, false));
    }

    /// The bytes that it has room for, whichever half of the superblock rots.
    pub fn room(&self) -> u64 {
        let readable = (0..2).filter(|half| self.rotten != Some(*half));
        let stated = readable.map(|half| self.halves[half].1.size).min();
        stated.unwrap_or(0).min(self.cache.len() as u64 * SECTOR)
    }

    /// The generation that assigned each slot, after this state is written.
    fn assign(&self, state: &CopyState, generation: u64) -> [u64; BITMAPS_MAX] {
        std::array::from_fn(|slot| {
            let (old, new) = (self.superblock.bitmaps[slot], state.bitmaps[slot]);
            if old.map(|b| b.copy_id) == new.map(|b| b.copy_id) {
                self.slots[slot]
            } else {
                generation
            }
        })
    }

    fn persist(&mut self, op: Running) {
        match op {
            // All of it durable: what is not reported may still be there after a crash.
            Running::Grow { size } => self.lengthen(size),
            Running::Superblock(state) => {
                let old = &self.superblock;
                assert!(
                    state.epoch >= old.epoch && state.promised >= old.promised,
                    "S2: epoch {} promised {} after epoch {} promised {}",
                    state.epoch,
                    state.promised,
                    old.epoch,
                    old.promised
                );
                let newest = self.halves[0].0.max(self.halves[1].0);
                self.slots = self.assign(&state, newest + 1);
                self.halves = [1, 2].map(|g| (newest + g, (*state).clone(), self.slots));
                self.rotten = None;
                self.reported = (state.epoch, state.promised);
                self.superblock = *state;
            }
            // Nothing is written into a log that cannot be read.
            Running::Log { anew: false, .. } if self.log_lost => {}
            Running::Log { add, retire, anew } => {
                if anew || !retire.is_empty() {
                    self.forgot = Some(Forgot::Regions);
                }
                if anew {
                    self.log.clear();
                    self.written_anew += 1;
                    self.log_lost = false;
                }
                self.left_log += retire.len() as u64;
                self.log.extend(add);
                self.log.retain(|r| !retire.contains(r));
            }
            Running::Bitmaps(parts) => {
                for (slot, region, bits) in parts {
                    let chunks = self.maps[slot].len();
                    if self.written[slot] != self.slots[slot] {
                        self.written[slot] = self.slots[slot];
                        self.maps[slot].fill(false);
                    }
                    for (c, bit) in chunks_of(region, chunks).zip(bits) {
                        if self.maps[slot][c] && !bit {
                            self.forgot = Some(Forgot::Bits);
                        }
                        self.maps[slot][c] = bit;
                    }
                }
            }
            _ => {}
        }
    }

    /// The process ends: what was under way happened or not, sector by sector.
    pub fn crash(&mut self, rng: &mut Rng) {
        let mut running: Vec<(Ticket, (Running, Fate))> = self.running.drain().collect();
        running.sort_unstable_by_key(|(ticket, _)| *ticket);
        for (ticket, (op, fate)) in running {
            if fate != Fate::Done {
                continue;
            }
            match op {
                Running::Write {
                    span,
                    values,
                    applied: false,
                    ..
                } => {
                    // A hole that was half punched is none.
                    let took: Vec<bool> = values.iter().map(|_| rng.one_in(2)).collect();
                    self.put(ticket, span, |i| took[i].then_some(values[i]));
                }
                Running::Bitmaps(parts) => {
                    let kept = parts.into_iter().filter(|_| rng.one_in(2)).collect();
                    self.persist(Running::Bitmaps(kept));
                }
                // One half was written, and what the caller wanted was not reported.
                Running::Superblock(state) if rng.one_in(3) => {
                    let older = usize::from(self.halves[1].0 < self.halves[0].0);
                    let newest = self.halves[1 - older].0;
                    let half = self.rotten.take().unwrap_or(older);
                    let slots = self.assign(&state, newest + 1);
                    self.halves[half] = (newest + 1, (*state).clone(), slots);
                    self.slots = slots;
                    self.superblock = *state;
                }
                other if rng.one_in(2) => {
                    let reported = self.reported;
                    self.persist(other);
                    self.reported = reported;
                }
                _ => {}
            }
        }
        // Tickets are given anew by the next process.
        for u in self.unsynced.values_mut().flatten() {
            u.ticket = Seq(0);
            u.done.get_or_insert(self.count);
        }
    }

    /// The machine loses power: after [`Self::crash`], any subset of what is not durable is gone.
    pub fn power_cut(&mut self, rng: &mut Rng) {
        let all = rng.one_in(3);
        for (s, list) in std::mem::take(&mut self.unsynced) {
            let survivor = if all {
                0
            } else {
                rng.below(list.len() as u64 + 1) as usize
            };
            if survivor > 0 {
                self.durable[s] = list[survivor - 1].value;
            }
            self.cache[s] = self.durable[s];
            self.data[s / PER_CHUNK] |= self.cache[s] != 0;
        }
    }

    /// The bitmaps of the slots that the superblock names.
    pub fn maps(&self) -> [Option<DirtyMap>; BITMAPS_MAX] {
        std::array::from_fn(|slot| {
            self.superblock.bitmaps[slot]?;
            let mut words = vec![0u64; self.maps[slot].len().div_ceil(64)];
            let mine = self.written[slot] == self.slots[slot];
            for (c, _) in self.maps[slot]
                .iter()
                .enumerate()
                .filter(|(_, set)| **set && mine)
            {
                words[c / 64] |= 1 << (c % 64);
            }
            Some(DirtyMap::from_words(self.superblock.size, words))
        })
    }
}

/// Stands for XXH3: equal for equal stamps, and for others not by any chance that a run meets.
fn hash(stamps: &[u64]) -> u128 {
    stamps.iter().fold(0x6c62_272e_07bb_0142, |h: u128, s| {
        (h ^ u128::from(*s))
            .wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b)
            .rotate_left(29)
    })
}

fn chunks_of(region: Region, chunks: usize) -> std::ops::Range<usize> {
    let per = (REGION / CHUNK) as usize;
    let first = region.0 as usize * per;
    first.min(chunks)..(first + per).min(chunks)
}
