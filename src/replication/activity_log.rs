//! Which regions of a copy may differ from the other copies (PROTOCOL 2.3, 5).
//!
//! The rule (S15): no data write reaches the disk before its region is durable in this log. This type decides what
//! belongs into the next transaction; `copy` gives a transaction its bytes.

use super::ids::{Nanos, REGION, REGIONS_MAX, Region, Seq, Span};
use super::mutants::{self, Mutant};

/// Regions that one transaction adds or retires at most: what one 4 KiB log block carries comfortably.
pub const TRANSACTION_MAX: usize = 128;
/// The log asks for a flush of all copies when fewer slots than this are free, so that retiring keeps ahead of need.
const PRESSURE: usize = REGIONS_MAX / 8;
const NONE: u16 = u16::MAX;
/// Below every request's number and above "nothing is stable yet".
const BEFORE_ANY: Seq = Seq(1);

/// Where a region stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SlotState {
    /// Asked for; in no transaction yet.
    Wanted,
    /// In the transaction being written.
    Adding,
    /// Durable: data may be written.
    Active,
    /// Leaves with the transaction being written.
    Retiring,
}

#[derive(Clone, Debug)]
struct Slot {
    region: Region,
    state: SlotState,
    /// Highest request that wrote into it.
    last: Seq,
    /// Writes accepted and not yet acknowledged by the disk.
    in_flight: u32,
    touched: Nanos,
    /// Wanted again while it was retiring.
    again: bool,
}

/// One batch of changes to be made durable together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transaction {
    /// Regions that become active.
    pub add: Vec<Region>,
    /// Regions that are forgotten.
    pub retire: Vec<Region>,
    /// The log on disk could not be read, so that every region counted: it is written anew, with `add` as all there is.
    pub anew: bool,
}

/// The log's state in memory.
#[derive(Clone, Debug)]
pub struct ActivityLog {
    /// Region → slot.
    index: Vec<u16>,
    slots: Vec<Option<Slot>>,
    free: Vec<u16>,
    wanted: Vec<u16>,
    running: bool,
    /// A region nobody wrote for this long leaves once it is stable.
    idle: Nanos,
    /// Requests up to here are durable on all in-sync copies.
    stable: Seq,
    /// The log on disk cannot be read: there every region is active, whatever the slots say.
    unreadable: bool,
}

/// Answer to [`ActivityLog::touch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// Durable: go on.
    Active,
    /// Will be in a later transaction: wait for [`ActivityLog::is_active`].
    Waits,
    /// No slot is free; ask again when a transaction has retired some.
    Full,
}

impl ActivityLog {
    /// A log for a volume of `size` bytes in which `regions` are active already; `None`: on disk it cannot be read. What nobody
    /// wrote for `idle` leaves it.
    pub fn new(size: u64, regions: Option<&[Region]>, idle: Nanos, now: Nanos) -> Self {
        let mut log = Self {
            index: Vec::new(),
            slots: vec![None; REGIONS_MAX],
            free: (0..REGIONS_MAX as u16).rev().collect(),
            wanted: Vec::new(),
            running: false,
            idle,
            stable: Seq(0),
            unreadable: regions.is_none(),
        };
        log.grow(size);
        for &region in regions.unwrap_or_default() {
            if let Some(slot) = log.claim(region, BEFORE_ANY, now) {
                log.slot_mut(slot).state = SlotState::Active;
            }
        }
        log.wanted.clear();
        log
    }

    /// Makes room for the regions of a volume of `size` bytes.
    pub fn grow(&mut self, size: u64) {
        let regions = size.div_ceil(REGION) as usize;
        if regions > self.index.len() {
            self.index.resize(regions, NONE);
        }
    }

    fn slot_mut(&mut self, slot: u16) -> &mut Slot {
        self.slots[usize::from(slot)]
            .as_mut()
            .expect("the index names only slots in use")
    }

    fn slot(&self, slot: u16) -> &Slot {
        self.slots[usize::from(slot)]
            .as_ref()
            .expect("the index names only slots in use")
    }

    fn claim(&mut self, region: Region, seq: Seq, now: Nanos) -> Option<u16> {
        let entry = *self.index.get(region.0 as usize)?;
        if entry != NONE {
            return Some(entry);
        }
        let slot = self.free.pop()?;
        self.index[region.0 as usize] = slot;
        self.slots[usize::from(slot)] = Some(Slot {
            region,
            state: SlotState::Wanted,
            last: seq,
            in_flight: 0,
            touched: now,
            again: false,
        });
        self.wanted.push(slot);
        Some(slot)
    }

    /// A write `seq` into `region` is about to be made; it counts as in flight from now on unless the log is full.
    pub fn touch(&mut self, region: Region, seq: Seq, now: Nanos) -> Touch {
        let Some(at) = self.claim(region, seq, now) else {
            return Touch::Full;
        };
        let slot = self.slot_mut(at);
        slot.last = slot.last.max(seq);
        slot.touched = now;
        slot.in_flight += 1;
        match slot.state {
            SlotState::Active => Touch::Active,
            SlotState::Retiring => {
                slot.again = true;
                Touch::Waits
            }
            SlotState::Wanted | SlotState::Adding => Touch::Waits,
        }
    }

    /// Takes back what [`Self::touch`] counted: the write ended, or was never made.
    pub fn done(&mut self, region: Region) {
        let at = self.index[region.0 as usize];
        if at != NONE {
            let slot = self.slot_mut(at);
            slot.in_flight -= 1;
        }
    }

    /// Another attachment took over, whose requests are numbered anew: what is in the log stays until that one's first
    /// flush of all copies.
    pub fn renumber(&mut self) {
        self.stable = Seq(0);
        self.slots
            .iter_mut()
            .flatten()
            .for_each(|s| s.last = BEFORE_ANY);
    }

    /// Whether data may be written into `region`.
    pub fn is_active(&self, region: Region) -> bool {
        let at = self.index.get(region.0 as usize).copied().unwrap_or(NONE);
        at != NONE && self.slot(at).state == SlotState::Active
    }

    /// Requests up to `seq` are durable on every in-sync copy (the heartbeat's `stable`).
    pub fn stable(&mut self, seq: Seq) {
        self.stable = self.stable.max(seq);
    }

    /// Nearly full: the attachment is to flush all copies.
    pub fn pressure(&self) -> bool {
        self.free.len() < PRESSURE
    }

    /// The regions in which this copy may differ from others, the ones being added included; `None`: all, the log on disk cannot
    /// be read.
    pub fn named(&self) -> Option<Vec<Region>> {
        (!self.unreadable).then(|| self.regions())
    }

    /// All regions in slots.
    pub fn regions(&self) -> Vec<Region> {
        let mut all: Vec<Region> = self.slots.iter().flatten().map(|s| s.region).collect();
        all.sort_unstable();
        all
    }

    /// The next transaction, if one is due and none is running. Call [`Self::committed`] when it is durable.
    ///
    /// Retires only what no write is in flight for and what is durable on all in-sync copies (`stable`): nearly full,
    /// the longest untouched; otherwise, and only when `look_for_idle` (it reads every slot: once a tick, not once a
    /// write), what has been idle. Nothing unless `may_retire`.
    pub fn transaction(
        &mut self,
        now: Nanos,
        look_for_idle: bool,
        may_retire: bool,
    ) -> Option<Transaction> {
        if self.running {
            return None;
        }
        // What the unreadable log may have named is durable on all in-sync copies now, and what has been written since is in
        // slots.
        if self.unreadable && may_retire && self.stable >= BEFORE_ANY {
            return Some(self.anew());
        }
        let due = may_retire && (look_for_idle || self.pressure() && !self.wanted.is_empty());
        let retire = if due { self.retirable(now) } else { Vec::new() };
        if self.wanted.is_empty() && retire.is_empty() {
            return None;
        }
        let mut txn = Transaction::default();
        let take = self.wanted.len().min(TRANSACTION_MAX);
        let adding: Vec<u16> = self.wanted.drain(..take).collect();
        for at in adding {
            let slot = self.slot_mut(at);
            slot.state = SlotState::Adding;
            txn.add.push(slot.region);
        }
        for at in retire {
            let slot = self.slot_mut(at);
            slot.state = SlotState::Retiring;
            txn.retire.push(slot.region);
        }
        self.running = true;
        Some(txn)
    }

    fn anew(&mut self) -> Transaction {
        self.running = true;
        self.wanted.clear();
        for slot in self.slots.iter_mut().flatten() {
            if slot.state == SlotState::Wanted {
                slot.state = SlotState::Adding;
            }
        }
        Transaction {
            add: self.regions(),
            retire: Vec::new(),
            anew: true,
        }
    }

    fn retirable(&self, now: Nanos) -> Vec<u16> {
        let pressure = self.pressure();
        let mut found: Vec<(Nanos, u16)> = (0u16..)
            .zip(&self.slots)
            .filter_map(|(at, slot)| {
                let s = slot.as_ref()?;
                let early = mutants::on(Mutant::RetireBeforeFlush);
                let due = pressure || early || now.since(s.touched) >= self.idle;
                let stable = early || s.last <= self.stable;
                let may = s.state == SlotState::Active && s.in_flight == 0 && stable;
                (due && may).then_some((s.touched, at))
            })
            .collect();
        found.sort_unstable();
        found.truncate(TRANSACTION_MAX);
        found.into_iter().map(|(_, at)| at).collect()
    }

    /// The running transaction is durable.
    pub fn committed(&mut self, txn: &Transaction) {
        assert!(self.running, "a transaction was running");
        self.running = false;
        self.unreadable &= !txn.anew;
        for &region in &txn.add {
            let at = self.index[region.0 as usize];
            self.slot_mut(at).state = SlotState::Active;
        }
        for &region in &txn.retire {
            let at = self.index[region.0 as usize];
            let slot = self.slot_mut(at);
            if slot.again {
                slot.again = false;
                slot.state = SlotState::Wanted;
                self.wanted.push(at);
            } else {
                self.slots[usize::from(at)] = None;
                self.index[region.0 as usize] = NONE;
                self.free.push(at);
            }
        }
    }

    /// Everything is flushed on all copies and nothing is in flight: the transaction that empties the log, in parts.
    pub fn empty(&mut self) -> Option<Transaction> {
        assert!(
            !self.running && self.wanted.is_empty(),
            "emptied only when idle"
        );
        // One that cannot be read is written anew, with nothing in it.
        let most = match self.unreadable {
            true => REGIONS_MAX,
            false => TRANSACTION_MAX,
        };
        let mut retire = Vec::new();
        for slot in self.slots.iter_mut().flatten().take(most) {
            assert_eq!(slot.in_flight, 0, "emptied only when idle");
            slot.state = SlotState::Retiring;
            retire.push(slot.region);
        }
        if retire.is_empty() && !self.unreadable {
            return None;
        }
        self.running = true;
        Some(Transaction {
            add: Vec::new(),
            retire,
            anew: self.unreadable,
        })
    }

    /// Whether a transaction is being written.
    pub fn running(&self) -> bool {
        self.running
    }

    /// The span's regions are all active.
    pub fn covers(&self, span: Span) -> bool {
        span.regions().all(|r| self.is_active(r))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::timing::Timing;

    const T0: Nanos = Nanos(0);
    const IDLE: Nanos = Timing::DEFAULT.idle;

    fn log() -> ActivityLog {
        ActivityLog::new(64 * REGION, Some(&[]), IDLE, T0)
    }

    #[test]
    fn a_region_is_active_only_after_its_transaction_is_durable() {
        let mut l = log();
        assert_eq!(l.touch(Region(3), Seq(1), T0), Touch::Waits);
        let txn = l.transaction(T0, true, true).unwrap();
        assert_eq!(txn.add, [Region(3)]);
        assert!(!l.is_active(Region(3)));
        assert_eq!(l.touch(Region(3), Seq(2), T0), Touch::Waits);
        assert!(
            l.transaction(T0, true, true).is_none(),
            "one transaction at a time"
        );
        l.committed(&txn);
        assert!(l.is_active(Region(3)));
        assert_eq!(l.touch(Region(3), Seq(3), T0), Touch::Active);
    }

    #[test]
    fn a_region_retires_only_when_idle_stable_and_without_writes_in_flight() {
        let mut l = log();
        l.touch(Region(3), Seq(7), T0);
        let txn = l.transaction(T0, true, true).unwrap();
        l.committed(&txn);
        let later = T0.after(IDLE);
        assert!(
            l.transaction(later, true, true).is_none(),
            "a write is in flight"
        );
        l.done(Region(3));
        assert!(l.transaction(later, true, true).is_none(), "not stable");
        l.stable(Seq(6));
        assert!(
            l.transaction(later, true, true).is_none(),
            "still not stable"
        );
        l.stable(Seq(7));
        assert!(l.transaction(T0, true, true).is_none(), "not idle");
        let txn = l.transaction(later, true, true).unwrap();
        assert_eq!(txn.retire, [Region(3)]);
        l.committed(&txn);
        assert!(l.regions().is_empty());
    }

    #[test]
    fn a_region_touched_while_it_retires_comes_back_before_data_is_written() {
        let mut l = ActivityLog::new(64 * REGION, Some(&[Region(5)]), IDLE, T0);
        l.stable(Seq(1 << 16));
        let later = T0.after(IDLE);
        let out = l.transaction(later, true, true).unwrap();
        assert_eq!(l.touch(Region(5), Seq(9), later), Touch::Waits);
        l.committed(&out);
        assert!(!l.is_active(Region(5)));
        let back = l.transaction(later, true, true).unwrap();
        assert_eq!(back.add, [Region(5)]);
        l.committed(&back);
        assert!(l.is_active(Region(5)));
    }

    #[test]
    fn a_full_log_says_so_and_recovers_by_retiring_the_longest_untouched() {
        let regions: Vec<Region> = (0..REGIONS_MAX as u32).map(Region).collect();
        let mut l = ActivityLog::new((REGIONS_MAX as u64 + 10) * REGION, Some(&regions), IDLE, T0);
        assert!(l.pressure());
        assert_eq!(l.touch(Region(REGIONS_MAX as u32), Seq(1), T0), Touch::Full);
        assert!(
            l.transaction(T0, true, true).is_none(),
            "what was found on disk stays until all copies are flushed"
        );
        l.stable(Seq(1 << 16));
        let txn = l.transaction(T0, true, true).unwrap();
        assert_eq!(txn.retire.len(), TRANSACTION_MAX);
        l.committed(&txn);
        assert_eq!(
            l.touch(Region(REGIONS_MAX as u32), Seq(1), T0),
            Touch::Waits
        );
    }

    #[test]
    fn emptying_takes_several_transactions_and_leaves_nothing() {
        let regions: Vec<Region> = (0..300).map(Region).collect();
        let mut l = ActivityLog::new(400 * REGION, Some(&regions), IDLE, T0);
        let mut parts = 0;
        while let Some(txn) = l.empty() {
            l.committed(&txn);
            parts += 1;
        }
        assert_eq!(parts, 3);
        assert!(l.regions().is_empty());
    }

    #[test]
    fn a_log_that_cannot_be_read_names_everything_until_all_copies_are_flushed_and_is_written_anew()
    {
        // More regions than it has slots.
        let size = (REGIONS_MAX as u64 + 10) * REGION;
        let mut l = ActivityLog::new(size, None, IDLE, T0);
        assert_eq!(l.named(), None);
        // Writes go their ordinary way meanwhile.
        assert_eq!(l.touch(Region(3), Seq(2), T0), Touch::Waits);
        let txn = l.transaction(T0, true, true).unwrap();
        assert_eq!((txn.add.as_slice(), txn.anew), (&[Region(3)][..], false));
        l.committed(&txn);
        assert_eq!(l.touch(Region(4), Seq(3), T0), Touch::Waits);
        // A flush of all that began later; the bits are not durable yet.
        l.stable(Seq(1));
        let txn = l.transaction(T0, false, false).unwrap();
        assert_eq!((txn.add.as_slice(), txn.anew), (&[Region(4)][..], false));
        l.committed(&txn);
        assert_eq!(l.named(), None);
        assert_eq!(l.touch(Region(5), Seq(4), T0), Touch::Waits);
        let txn = l.transaction(T0, false, true).unwrap();
        let all = [Region(3), Region(4), Region(5)];
        assert_eq!((txn.add.as_slice(), txn.anew), (&all[..], true));
        assert_eq!(l.named(), None, "not before it is durable");
        l.committed(&txn);
        assert!(l.is_active(Region(5)));
        assert_eq!(l.named().unwrap(), all);
    }

    #[test]
    fn a_log_that_cannot_be_read_is_empty_after_a_clean_end() {
        let mut l = ActivityLog::new(64 * REGION, None, IDLE, T0);
        let txn = l.empty().unwrap();
        assert_eq!((txn.add.len(), txn.retire.len(), txn.anew), (0, 0, true));
        l.committed(&txn);
        assert_eq!((l.named(), l.empty()), (Some(Vec::new()), None));
    }
}
