//! Requests under way, found by their [`Seq`] in one step, and the rule that no two overlapping writes are (S16).

use std::collections::{BTreeMap, VecDeque};

use super::ids::{Seq, Span};

/// Bits of a [`Seq`] that name the table's slot; the rest counts up, so that a later request has a higher `Seq`.
const SLOT_BITS: u32 = 16;
/// Requests under way at once: queues × their size stays far below (S19).
pub const IN_FLIGHT_MAX: usize = 1 << SLOT_BITS;

/// A slab whose keys are never given twice.
#[derive(Debug)]
pub struct InFlight<T> {
    slots: Vec<Option<(Seq, T)>>,
    free: Vec<u16>,
    count: u64,
    len: usize,
}

impl<T> Default for InFlight<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            count: 0,
            len: 0,
        }
    }
}

impl<T> InFlight<T> {
    /// Takes `value` in; `None` when [`IN_FLIGHT_MAX`] requests are under way.
    pub fn insert(&mut self, value: T) -> Option<Seq> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < IN_FLIGHT_MAX => {
                self.slots.push(None);
                (self.slots.len() - 1) as u16
            }
            None => return None,
        };
        self.count += 1;
        let seq = Seq(self.count << SLOT_BITS | u64::from(slot));
        self.slots[usize::from(slot)] = Some((seq, value));
        self.len += 1;
        Some(seq)
    }

    fn slot(seq: Seq) -> usize {
        (seq.0 & ((1 << SLOT_BITS) - 1)) as usize
    }

    /// The request `seq`, unless it has ended.
    pub fn get_mut(&mut self, seq: Seq) -> Option<&mut T> {
        match self.slots.get_mut(Self::slot(seq)) {
            Some(Some((at, value))) if *at == seq => Some(value),
            _ => None,
        }
    }

    /// Ends the request `seq`.
    pub fn remove(&mut self, seq: Seq) -> Option<T> {
        let slot = self.slots.get_mut(Self::slot(seq))?;
        if slot.as_ref().is_none_or(|(at, _)| *at != seq) {
            return None;
        }
        self.free.push(Self::slot(seq) as u16);
        self.len -= 1;
        slot.take().map(|(_, value)| value)
    }

    /// All requests, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Seq, &T)> {
        self.slots
            .iter()
            .flatten()
            .map(|(seq, value)| (*seq, value))
    }

    /// All requests, in the order in which they were taken in.
    pub fn in_order(&self) -> Vec<Seq> {
        let mut all: Vec<Seq> = self.iter().map(|(seq, _)| seq).collect();
        all.sort_unstable();
        all
    }

    /// The `Seq` below which every request has ended.
    pub fn low_water(&self, matters: impl Fn(&T) -> bool) -> Seq {
        let oldest = self
            .iter()
            .filter(|(_, v)| matters(v))
            .map(|(seq, _)| seq)
            .min();
        oldest.unwrap_or(Seq(self.newest().0 + 1))
    }

    /// No request taken in so far has a higher `Seq`.
    pub fn newest(&self) -> Seq {
        Seq(((self.count + 1) << SLOT_BITS) - 1)
    }

    /// Gives up what is under way without dropping it: somebody else may still be using it.
    pub fn leak(self) {
        std::mem::forget(self);
    }

    /// Requests under way.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// The byte ranges of the writes under way, and the writes that wait for one of them, in ring order (S16).
#[derive(Debug)]
pub struct Overlaps<W> {
    /// Start → end; disjoint by construction.
    busy: BTreeMap<u64, u64>,
    waiting: VecDeque<(Span, W)>,
    /// Some that waited were taken out: what waited for them is found at the next release.
    taken_out: bool,
}

impl<W> Default for Overlaps<W> {
    fn default() -> Self {
        Self {
            busy: BTreeMap::new(),
            waiting: VecDeque::new(),
            taken_out: false,
        }
    }
}

impl<W> Overlaps<W> {
    fn is_busy(&self, span: Span) -> bool {
        self.busy
            .range(..span.end())
            .next_back()
            .is_some_and(|(_, end)| *end > span.offset)
    }

    /// Claims `span`. Gives the write back when it may start now; otherwise it waits here until it may.
    pub fn claim(&mut self, span: Span, write: W) -> Option<W> {
        if self.is_busy(span) || self.waiting.iter().any(|(w, _)| w.overlaps(span)) {
            self.waiting.push_back((span, write));
            return None;
        }
        self.busy.insert(span.offset, span.end());
        Some(write)
    }

    /// The write of `span` ended. Gives out the writes that may start now, their spans claimed.
    pub fn release(&mut self, span: Span) -> Vec<W> {
        self.busy.remove(&span.offset);
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let mut start = Vec::new();
        let mut still: VecDeque<(Span, W)> = VecDeque::with_capacity(self.waiting.len());
        let all = std::mem::take(&mut self.taken_out);
        while let Some((w, write)) = self.waiting.pop_front() {
            // What waits does so for a write that is busy, or for one before it; of those this one alone ended, and those
            // that start now are busy. So only what overlaps this one can start: a guest may have thousands wait.
            if !all && !w.overlaps(span) {
                still.push_back((w, write));
                continue;
            }
            // One that waits also holds back all later ones that overlap it: ring order.
            if self.is_busy(w) || still.iter().any(|(s, _)| s.overlaps(w)) {
                still.push_back((w, write));
            } else {
                self.busy.insert(w.offset, w.end());
                start.push(write);
            }
        }
        self.waiting = still;
        start
    }

    /// Takes out those that wait and are `which`.
    pub fn take_waiting(&mut self, which: impl Fn(&W) -> bool) -> Vec<W> {
        let all = std::mem::take(&mut self.waiting);
        self.taken_out = true;
        let (out, stay) = all.into_iter().partition(|(_, w)| which(w));
        self.waiting = stay;
        let out: VecDeque<(Span, W)> = out;
        out.into_iter().map(|(_, w)| w).collect()
    }

    /// Writes that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_seq_is_never_given_twice_and_counts_up() {
        let mut t = InFlight::default();
        let a = t.insert('a').unwrap();
        assert_eq!(t.remove(a), Some('a'));
        let b = t.insert('b').unwrap();
        assert!(b > a);
        assert_eq!(t.remove(a), None);
        assert_eq!(t.get_mut(b), Some(&mut 'b'));
        assert_eq!(t.low_water(|_| true), b);
        t.remove(b);
        assert!(t.low_water(|_| true) > b);
    }

    #[test]
    fn what_waited_for_one_that_was_taken_out_starts_at_the_next_end() {
        let span = |offset, len| Span { offset, len };
        let mut table = Overlaps::default();
        assert_eq!(table.claim(span(0, 10), 'a'), Some('a'));
        assert_eq!(table.claim(span(5, 10), 'b'), None);
        assert_eq!(table.claim(span(12, 8), 'c'), None);
        assert_eq!(table.take_waiting(|w| *w == 'b'), ['b']);
        assert_eq!(table.release(span(0, 10)), ['c']);
    }

    proptest! {
        /// Against the naive rule: a write starts when nothing earlier that overlaps it is unfinished.
        #[test]
        fn overlapping_writes_run_one_at_a_time_in_ring_order(
            spans in prop::collection::vec((0u64..40, 1u32..12), 1..60),
            ends in prop::collection::vec(any::<prop::sample::Index>(), 200),
        ) {
            let spans: Vec<Span> = spans.into_iter().map(|(o, l)| Span { offset: o, len: l }).collect();
            let mut table = Overlaps::default();
            let mut running = Vec::new();
            let mut finished = vec![false; spans.len()];
            let allowed = |i: usize, finished: &[bool]| (0..i).all(|j| finished[j] || !spans[j].overlaps(spans[i]));
            for (i, s) in spans.iter().enumerate() {
                let started = table.claim(*s, i).is_some();
                prop_assert_eq!(started, allowed(i, &finished));
                if started { running.push(i); }
            }
            for end in ends {
                if running.is_empty() { break; }
                let i = running.remove(end.index(running.len()));
                finished[i] = true;
                let next = table.release(spans[i]);
                prop_assert!(next.windows(2).all(|w| w[0] < w[1]));
                for n in &next { prop_assert!(allowed(*n, &finished)); }
                running.extend(next);
                for j in 0..spans.len() {
                    prop_assert_eq!(!finished[j] && allowed(j, &finished), running.contains(&j));
                }
            }
        }
    }
}
