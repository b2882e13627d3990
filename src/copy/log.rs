//! The activity log: a table of slots that each name an active region, kept as a ring of transactions.
//! How it is read back, and why a torn batch cannot harm it, is in docs/DISK-FORMAT.md.

use std::collections::HashMap;

use super::layout::{BLOCK, LOG, LOG_BLOCKS, LOG_SLICES, PAYLOAD, SECTOR_PAYLOAD, SECTORS};
use super::metadata::MetaWrite;
use super::sector::{self, Kind, Label, Salt, Sector, u16_at, u32_at, u64_at};
use crate::replication::ids::{REGIONS_MAX, Region, SECTOR};

/// Updates that one transaction carries.
const UPDATES: usize = 256;
/// Slots of the table that one transaction states.
const SLICE: usize = REGIONS_MAX / LOG_SLICES as usize;
/// The longest batch: each slot freed and taken again by one call.
const BATCH_MAX: usize = 2 * REGIONS_MAX / UPDATES;
/// A slot that names no region.
const FREE: u32 = u32::MAX;

const SLOTS_AT: usize = 8;
const REGIONS_AT: usize = SLOTS_AT + 2 * UPDATES;
const SLICE_AT: usize = REGIONS_AT + 4 * UPDATES;

const _: () = {
    assert!(SLICE_AT + 4 * SLICE <= PAYLOAD);
    // A torn batch must leave the transactions before it that state the table.
    assert!(BATCH_MAX as u64 + LOG_SLICES <= LOG_BLOCKS);
    // The place in a batch is a byte.
    assert!(LOG_BLOCKS <= u8::MAX as u64);
};

/// The table, and where in the ring it goes on.
#[derive(Debug)]
pub(super) struct Log {
    /// Region in each slot, or [`FREE`].
    table: Vec<u32>,
    slots: HashMap<u32, u16>,
    free: Vec<u16>,
    /// Sequence number of the next transaction.
    next: u64,
    opening: u64,
    /// The ring on disk does not state the table: nothing but [`Log::reset`] may write.
    unreadable: bool,
}

impl Log {
    /// The log of a new copy; it is on disk once [`Log::reset`] is.
    pub fn new() -> Self {
        Self::with(vec![FREE; REGIONS_MAX], 0, 1, true)
    }

    fn with(table: Vec<u32>, next: u64, opening: u64, unreadable: bool) -> Self {
        let used =
            |(slot, region): (usize, &u32)| (*region != FREE).then_some((*region, slot as u16));
        let slots: HashMap<u32, u16> = table.iter().enumerate().filter_map(used).collect();
        // Lowest slot on top: a small table stays in few slices.
        let free = (0..REGIONS_MAX as u16)
            .rev()
            .filter(|s| table[usize::from(*s)] == FREE)
            .collect();
        Self {
            table,
            slots,
            free,
            next,
            opening,
            unreadable,
        }
    }

    /// The active regions, ascending.
    pub fn regions(&self) -> Vec<Region> {
        let mut out: Vec<Region> = self.slots.keys().map(|r| Region(*r)).collect();
        out.sort_unstable();
        out
    }

    /// One batch that retires, then adds. See [`super::Metadata::log`].
    pub fn batch(&mut self, salt: Salt, add: &[Region], retire: &[Region]) -> Vec<MetaWrite> {
        if self.unreadable {
            return Vec::new();
        }
        let mut updates: Vec<(u16, u32)> = Vec::with_capacity(add.len() + retire.len());
        for region in retire {
            if let Some(slot) = self.slots.remove(&region.0) {
                self.table[usize::from(slot)] = FREE;
                self.free.push(slot);
                updates.push((slot, FREE));
            }
        }
        for region in add {
            if let Some(slot) = self.take_slot(*region) {
                updates.push((slot, region.0));
            }
        }
        self.write(salt, &updates, updates.len().div_ceil(UPDATES))
    }

    /// The whole ring anew, with `active` as the table. See [`super::Metadata::reset_log`].
    pub fn reset(&mut self, salt: Salt, active: &[Region]) -> Vec<MetaWrite> {
        // A distance from all that is in the ring, so that no old block ever continues a new batch or precedes it.
        let next = self.next + LOG_BLOCKS;
        *self = Self::with(vec![FREE; REGIONS_MAX], next, self.opening, false);
        for region in active {
            self.take_slot(*region);
        }
        self.write(salt, &[], LOG_BLOCKS as usize)
    }

    /// Puts `region` into the table; `None` when it is there.
    fn take_slot(&mut self, region: Region) -> Option<u16> {
        assert_ne!(region.0, FREE, "no volume has that many regions");
        if self.slots.contains_key(&region.0) {
            return None;
        }
        let slot = self
            .free
            .pop()
            .expect("more than REGIONS_MAX active regions: the caller bounds them");
        self.table[usize::from(slot)] = region.0;
        self.slots.insert(region.0, slot);
        Some(slot)
    }

    /// `count` transactions with `updates`, as one write, or two where the ring's end lies between them.
    fn write(&mut self, salt: Salt, updates: &[(u16, u32)], count: usize) -> Vec<MetaWrite> {
        let mut writes = Vec::with_capacity(2);
        let mut chunks = updates.chunks(UPDATES);
        let mut left = count;
        while left > 0 {
            let position = self.next % LOG_BLOCKS;
            let run = left.min((LOG_BLOCKS - position) as usize);
            let mut bytes = vec![0; run * BLOCK as usize].into_boxed_slice();
            let offset = LOG + position * BLOCK;
            for (i, block) in bytes.chunks_exact_mut(BLOCK as usize).enumerate() {
                let payload = self.payload(chunks.next().unwrap_or(&[]));
                let place = Place {
                    seq: self.next,
                    opening: self.opening,
                    index: (count - left) as u8,
                    len: count as u8,
                };
                sector::seal(
                    salt,
                    offset + i as u64 * BLOCK,
                    Kind::Log,
                    place.label(),
                    &payload,
                    block,
                );
                self.next += 1;
                left -= 1;
            }
            writes.push(MetaWrite { offset, bytes });
        }
        writes
    }

    fn payload(&self, updates: &[(u16, u32)]) -> [u8; PAYLOAD] {
        let mut out = [0; PAYLOAD];
        let slice = (self.next % LOG_SLICES) as usize;
        out[..2].copy_from_slice(&(updates.len() as u16).to_le_bytes());
        out[2..4].copy_from_slice(&(slice as u16).to_le_bytes());
        for (i, (slot, region)) in updates.iter().enumerate() {
            out[SLOTS_AT + 2 * i..][..2].copy_from_slice(&slot.to_le_bytes());
            out[REGIONS_AT + 4 * i..][..4].copy_from_slice(&region.to_le_bytes());
        }
        for (bytes, region) in out[SLICE_AT..]
            .chunks_exact_mut(4)
            .zip(&self.table[slice * SLICE..][..SLICE])
        {
            bytes.copy_from_slice(&region.to_le_bytes());
        }
        out
    }

    /// Reads the ring. The error says why it is unreadable; the log beside it then writes nothing but a reset.
    pub fn load(salt: Salt, ring: &[u8]) -> (Self, Result<(), String>) {
        let (blocks, mut damage) = open_ring(salt, ring);
        let all = || blocks.iter().flatten().flatten();
        let newest = all()
            .map(|(place, _)| *place)
            .max_by_key(|p| (p.opening, p.seq));
        let opening = newest.map_or(0, |p| p.opening) + 1;
        let beyond = all().map(|(place, _)| place.seq).max().unwrap_or(0) + 1;
        if damage.is_none()
            && let Some(newest) = newest
        {
            let end = last_complete(&blocks, newest);
            match table(&blocks, end) {
                Ok(table) => return (Self::with(table, end + 1, opening, false), Ok(())),
                Err(why) => damage = Some(why),
            }
        }
        let log = Self::with(vec![FREE; REGIONS_MAX], beyond, opening, true);
        (log, Err(damage.unwrap_or_else(|| "empty".into())))
    }
}

/// A transaction's place among all: what its sectors' headers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    seq: u64,
    opening: u64,
    /// In its batch.
    index: u8,
    /// Of its batch.
    len: u8,
}

impl Place {
    fn label(self) -> Label {
        let mut wide = [0; 24];
        wide[..8].copy_from_slice(&self.seq.to_le_bytes());
        wide[8..16].copy_from_slice(&self.opening.to_le_bytes());
        Label {
            small: [self.index, self.len],
            wide,
        }
    }

    /// `None` when a field has a value that is never written.
    fn read(label: &Label, position: u64) -> Option<Self> {
        let place = Self {
            seq: u64_at(&label.wide, 0),
            opening: u64_at(&label.wide, 8),
            index: label.small[0],
            len: label.small[1],
        };
        let sane = place.index < place.len
            && u64::from(place.len) <= LOG_BLOCKS
            && place.seq % LOG_BLOCKS == position
            // The first reset of a new ring starts there; it also keeps all arithmetic below from wrapping.
            && place.seq >= LOG_BLOCKS
            && place.seq < u64::MAX / 2
            && place.opening < u64::MAX / 2;
        sane.then_some(place)
    }
}

type Block<'a> = [Option<(Place, Sector<'a>)>; SECTORS];

/// Every sector of the ring that verifies, and what is wrong with the first that does not.
fn open_ring(salt: Salt, ring: &[u8]) -> (Vec<Block<'_>>, Option<String>) {
    let mut damage = None;
    let mut blocks = Vec::with_capacity(LOG_BLOCKS as usize);
    for position in 0..LOG_BLOCKS {
        let mut block: Block<'_> = [None; SECTORS];
        for (i, out) in block.iter_mut().enumerate() {
            let at = position * BLOCK + i as u64 * SECTOR;
            let bytes = ring.get(at as usize..(at + SECTOR) as usize).unwrap_or(&[]);
            *out = sector::open(salt, LOG + at, Kind::Log, bytes)
                .and_then(|s| Place::read(&s.label, position).map(|p| (p, s)));
            if out.is_none() && damage.is_none() {
                damage = Some(format!("sector at {} does not verify", LOG + at));
            }
        }
        blocks.push(block);
    }
    (blocks, damage)
}

/// The place of transaction `seq` if all of its sectors are there and of one writing.
fn whole(blocks: &[Block<'_>], seq: u64) -> Option<Place> {
    let block = &blocks[(seq % LOG_BLOCKS) as usize];
    let (place, _) = block[0]?;
    let alike = block.iter().all(|s| s.is_some_and(|(p, _)| p == place));
    (alike && place.seq == seq).then_some(place)
}

/// Sequence number of the last transaction that counts, given the newest place of all.
fn last_complete(blocks: &[Block<'_>], newest: Place) -> u64 {
    let first = newest.seq - u64::from(newest.index);
    let complete = (0..newest.len).all(|index| {
        let expected = Place {
            seq: first + u64::from(index),
            index,
            ..newest
        };
        whole(blocks, expected.seq) == Some(expected)
    });
    // Not complete: it was not durable, so no write into a region it adds was issued (S15): it never was.
    if complete {
        first + u64::from(newest.len) - 1
    } else {
        first - 1
    }
}

/// The table as of transaction `end`.
fn table(blocks: &[Block<'_>], end: u64) -> Result<Vec<u32>, String> {
    let mut table = vec![FREE; REGIONS_MAX];
    for seq in (end + 1).saturating_sub(LOG_SLICES)..=end {
        if whole(blocks, seq).is_none() {
            return Err(format!("transaction {seq} of {end} is not whole"));
        }
        let mut payload = [0; PAYLOAD];
        let sectors = blocks[(seq % LOG_BLOCKS) as usize].iter().flatten();
        for (part, (_, sector)) in payload.chunks_exact_mut(SECTOR_PAYLOAD).zip(sectors) {
            part.copy_from_slice(sector.payload);
        }
        apply(&payload, seq, &mut table)
            .ok_or_else(|| format!("transaction {seq} has a field out of range"))?;
    }
    let mut used: Vec<u32> = table.iter().copied().filter(|r| *r != FREE).collect();
    used.sort_unstable();
    if used.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err("a region is in two slots".into());
    }
    Ok(table)
}

fn apply(payload: &[u8; PAYLOAD], seq: u64, table: &mut [u32]) -> Option<()> {
    let (count, slice) = (usize::from(u16_at(payload, 0)), u16_at(payload, 2));
    if count > UPDATES || u64::from(slice) != seq % LOG_SLICES {
        return None;
    }
    for (slot, bytes) in table[usize::from(slice) * SLICE..][..SLICE]
        .iter_mut()
        .zip(payload[SLICE_AT..].chunks_exact(4))
    {
        *slot = u32_at(bytes, 0);
    }
    for i in 0..count {
        let slot = usize::from(u16_at(payload, SLOTS_AT + 2 * i));
        *table.get_mut(slot)? = u32_at(payload, REGIONS_AT + 4 * i);
    }
    Some(())
}
