//! What the guest may see: per sector, every write with its interval, and which of them a read may return (S10).

use std::collections::HashMap;

/// Moments are counted in events, so that no two things happen at once.
pub type Moment = u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Not answered, or answered with an error: may take effect, now or later.
    Open,
    /// Completed at this moment.
    Ok(Moment),
    /// Took effect before this moment or never will.
    Maybe(Moment),
}

#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub value: u64,
    pub by: usize,
    /// In the order of submission.
    pub id: u64,
    pub start: Moment,
    pub end: End,
    /// When the guest was told Ok, whatever a power cut did to it later.
    told: Option<Moment>,
    /// Covered by a completed flush, or written through.
    durable: bool,
}

impl Write {
    /// Over before `moment`, whether or not it took effect.
    fn before(&self, moment: Moment) -> bool {
        match self.end {
            End::Open => false,
            End::Ok(at) | End::Maybe(at) => at < moment,
        }
    }
}

#[derive(Default)]
pub struct Oracle {
    sectors: HashMap<usize, Vec<Write>>,
    /// Every request not answered yet began at or after this moment.
    pub floor: Moment,
    /// How often a sector's value stayed open until a read told.
    pub collapses: u64,
}

const BORN: Write = Write {
    value: 0,
    by: usize::MAX,
    id: 0,
    start: 0,
    end: End::Ok(0),
    told: Some(0),
    durable: true,
};

impl Oracle {
    fn of(&mut self, s: usize) -> &mut Vec<Write> {
        self.sectors.entry(s).or_insert_with(|| vec![BORN])
    }

    pub fn begin(&mut self, s: usize, value: u64, by: usize, id: u64, start: Moment) {
        self.of(s).push(Write {
            value,
            by,
            id,
            start,
            end: End::Open,
            told: None,
            durable: false,
        });
    }

    /// The guest was told Ok.
    pub fn complete(&mut self, s: usize, by: usize, id: u64, now: Moment, durable: bool) {
        for w in self.of(s) {
            if w.by == by && w.id == id {
                w.end = End::Ok(now);
                w.told = Some(now);
                w.durable = durable;
            }
        }
        self.prune(s);
    }

    /// Drops what no read can return any more, so that a long run stays fast.
    fn prune(&mut self, s: usize) {
        let floor = self.floor;
        let list = self.sectors.get_mut(&s).expect("a sector written to");
        let gone: Vec<bool> = list
            .iter()
            .map(|w| {
                list.iter().any(|o| {
                    o.durable && matches!(o.end, End::Ok(at) if at < floor) && w.before(o.start)
                })
            })
            .collect();
        let mut gone = gone.iter();
        list.retain(|_| !gone.next().unwrap());
    }

    /// A flush of `by` that began at `start` completed: what was told Ok before it began must be there, also if a
    /// power cut came in between and `by` itself had told it (S5).
    pub fn flushed(&mut self, by: usize, start: Moment) {
        let all: Vec<usize> = self.sectors.keys().copied().collect();
        for s in all {
            let mut covered = None;
            for w in self.of(s) {
                let stands = w.by == by || matches!(w.end, End::Ok(_));
                if let Some(told) = w.told
                    && stands
                    && told <= start
                    && !w.durable
                {
                    w.end = End::Ok(told);
                    w.durable = true;
                    covered = covered.max(Some(w.start));
                }
            }
            if let Some(since) = covered {
                // What was over before that write began is over again, in its favour; whether it overwrote anything itself
                // is not known better than before.
                for w in self.of(s) {
                    if let Some(told) = w.told
                        && told < since
                        && !w.before(since)
                    {
                        w.end = End::Maybe(told);
                    }
                }
                self.prune(s);
            }
        }
    }

    /// A flush of `by` failed: the guest knows that what a power cut took may be gone.
    pub fn flush_failed(&mut self, by: usize) {
        for w in self.sectors.values_mut().flatten() {
            if w.by == by && matches!(w.end, End::Maybe(_)) && !w.durable {
                w.told = None;
            }
        }
    }

    /// Every in-sync copy lost power at or before `now`: a sector has any value since the last completed flush (S10).
    pub fn power_lost(&mut self, now: Moment) {
        let all: Vec<usize> = self.sectors.keys().copied().collect();
        for s in all {
            self.prune(s);
            for w in self.of(s) {
                if matches!(w.end, End::Ok(_) | End::Maybe(_)) && !w.durable {
                    w.end = End::Maybe(now);
                }
            }
            // What is durable may be all that is left.
            let open = self
                .of(s)
                .iter()
                .any(|w| matches!(w.end, End::Maybe(at) if at == now));
            if open {
                for w in self.of(s) {
                    if w.durable {
                        w.end = End::Maybe(now);
                    }
                }
            }
        }
    }

    /// An attachment serves: what those before it left open is decided now (S9).
    pub fn served_after(&mut self, before: impl Fn(usize) -> bool, now: Moment) {
        for w in self.sectors.values_mut().flatten() {
            if w.end == End::Open && before(w.by) {
                w.end = End::Maybe(now);
            }
        }
    }

    /// Whether a read of `s` in the interval may return `value`.
    pub fn may_read(
        &mut self,
        s: usize,
        value: u64,
        start: Moment,
        end: Moment,
    ) -> Result<(), String> {
        let list = self.of(s);
        let allowed = |w: &Write| {
            w.start <= end
                && !list
                    .iter()
                    .any(|o| matches!(o.end, End::Ok(at) if at < start) && w.before(o.start))
        };
        if !list.iter().any(|w| w.value == value && allowed(w)) {
            return Err(format!(
                "sector {s} read {value} in {start}..{end}; allowed: {:?}; history: {list:?}",
                list.iter()
                    .filter(|w| allowed(w))
                    .map(|w| w.value)
                    .collect::<Vec<_>>()
            ));
        }
        // S9: seen once with nothing under way, it stays until the next write.
        let quiet = list.iter().all(|w| w.before(start));
        if quiet && list.iter().filter(|w| allowed(w)).count() > 1 {
            self.collapses += 1;
            let list = self.of(s);
            let mut seen = *list.iter().rfind(|w| w.value == value).unwrap();
            (seen.start, seen.end, seen.told) = (start, End::Ok(start), Some(start));
            seen.durable = false;
            // What it decided against stays known: a later power cut may bring it back.
            list.push(seen);
        }
        Ok(())
    }

    /// Whether a copy may hold `value` now.
    pub fn allows(&mut self, s: usize, value: u64, now: Moment) -> bool {
        let list = self.of(s);
        let over = |w: &Write| {
            list.iter()
                .any(|o| matches!(o.end, End::Ok(at) if at < now) && w.before(o.start))
        };
        list.iter().any(|w| w.value == value && !over(w))
    }

    /// Whether a copy that holds `value` in `s` has applied the write `id` of `by`: it is that one or one that came
    /// after it (S3).
    pub fn holds(&self, s: usize, value: u64, by: usize, id: u64) -> bool {
        let Some(list) = self.sectors.get(&s) else {
            return true;
        };
        let Some(this) = list.iter().find(|w| w.by == by && w.id == id).copied() else {
            return true; // Overwritten by something durable since.
        };
        list.iter().any(|w| {
            w.value == value && (w.by == by && w.id >= id || w.by != by && !w.before(this.start))
        })
    }

    /// For a flush of `by` that began at `start`: the sectors, and for each the newest write it covers.
    pub fn covered(&self, by: usize, start: Moment) -> Vec<(usize, u64)> {
        let mut found: Vec<(usize, u64)> = self
            .sectors
            .iter()
            .filter_map(|(s, list)| {
                let newest = list
                    .iter()
                    .filter(|w| w.by == by && w.told.is_some_and(|t| t <= start));
                newest.map(|w| w.id).max().map(|id| (*s, id))
            })
            .collect();
        found.sort_unstable();
        found
    }

    pub fn touched(&self) -> Vec<usize> {
        let mut all: Vec<usize> = self.sectors.keys().copied().collect();
        all.sort_unstable();
        all
    }
}
