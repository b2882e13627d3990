//! What the guest was told, and so what it may read (S3, S5, S10).

use super::record::boot;
use super::state::{Bits, CHUNKS, COPIES, Flush, Oracle, Rule, State, Value, has};

/// The values of `set` from `first` on.
fn from(set: Bits, first: Value) -> Bits {
    set & (Bits::MAX << first)
}

impl Oracle {
    pub fn new() -> Self {
        Self {
            next: 1,
            may: [1; CHUNKS],
            lost: [0; CHUNKS],
            completed: [0; CHUNKS],
            taken: false,
        }
    }
}

impl State {
    /// A write of the guest completes at attachment `a`.
    pub fn completes(&mut self, a: usize, k: usize, value: Value) {
        // S3, S4: every member of the set in force has it, or a later one.
        let force = &self.registry.record;
        // What a power cut takes from one is none of this rule's: it is found out when that one is back.
        let kept = |c: usize| force.record.copies[c].boot_id == Some(boot(c, self.copies[c].boot));
        let lacks = |c: usize| force.in_sync.has(c) && self.copies[c].data[k] < value && kept(c);
        if force.attachment == Some(a) && (0..COPIES).any(lacks) {
            self.breaks(Rule::S3);
        }
        let o = &mut self.oracle;
        let later = from(o.may[k], value);
        o.lost[k] |= o.may[k] & !later;
        o.completed[k] = o.completed[k].max(value);
        if later == 0 {
            // Another attachment served without it.
            return self.breaks(Rule::S10);
        }
        o.may[k] = later;
    }

    /// A flush of the guest completes at attachment `a`.
    pub fn flushed(&mut self, a: usize, flush: &Flush) {
        let ours = self.registry.record.attachment == Some(a);
        let members = self.registry.record.in_sync;
        for k in 0..CHUNKS {
            let least = flush.completed[k];
            let lacks = |c: usize| members.has(c) && self.copies[c].on_disk[k] < least;
            if ours && (0..COPIES).any(lacks) {
                self.breaks(Rule::S5);
            }
            self.oracle.lost[k] &= !flush.replaced[k];
        }
    }

    /// Nobody can be found who has all that was completed: since the last flush, anything may be gone. Nor does a flush say
    /// anything of it: a new attachment has a guest that starts anew; the guest of one that lives on gets an error.
    pub fn power_lost(&mut self) {
        let o = &mut self.oracle;
        o.taken |= o.lost.iter().any(|lost| *lost != 0);
        (0..CHUNKS).for_each(|k| o.may[k] |= o.lost[k]);
        o.completed = [0; CHUNKS];
    }

    /// The guest may read chunk `k` from copy `c`, through attachment `a`, from now on. S9: so that is its value, until the next write.
    pub fn decides(&mut self, a: usize, k: usize, c: usize) {
        let value = self.copies[c].data[k];
        if !has(self.oracle.may[k], usize::from(value)) {
            return self.breaks(Rule::S10);
        }
        let under_way = self.at(a).writes[k].as_ref().filter(|w| !w.reconciles);
        let still: Bits = 1 << value | under_way.map_or(0, |w| 1 << w.value);
        let o = &mut self.oracle;
        o.lost[k] |= o.may[k] & !still;
        o.may[k] &= still;
        o.completed[k] = value;
    }
}
