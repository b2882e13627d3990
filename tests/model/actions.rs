//! Every step that is possible in a state.

use lockstep::replication::copy_set::CopySet;
use lockstep::replication::mutants::Mutant;

use super::bounds::Bound;
use super::state::{ATTACHMENTS, Bits, CHUNKS, COPIES, Phase, State, chunks};

/// One step. `a` is an attachment, `c` a copy, `k` a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Write {
        a: usize,
        k: usize,
    },
    Flush {
        a: usize,
    },
    Apply {
        a: usize,
        k: usize,
        c: usize,
    },
    FlushAt {
        a: usize,
        c: usize,
    },
    Retire {
        c: usize,
    },
    Configure {
        a: usize,
        c: usize,
    },
    Attach {
        a: usize,
        c: usize,
    },
    GiveUp {
        a: usize,
        c: usize,
    },
    Ask {
        a: usize,
        c: usize,
    },
    Claim {
        a: usize,
        random: u64,
    },
    Swap {
        a: usize,
    },
    DecideAnew {
        a: usize,
    },
    ReadRecord {
        a: usize,
    },
    CompareChunk {
        a: usize,
        k: usize,
    },
    BeginSync {
        a: usize,
        c: usize,
    },
    Mark {
        a: usize,
        c: usize,
    },
    CopyChunk {
        a: usize,
        c: usize,
        k: usize,
    },
    FlushCopied {
        a: usize,
        c: usize,
    },
    EndSync {
        a: usize,
        c: usize,
    },
    // What comes back, and time.
    Restart(usize),
    Heal,
    TimePasses,
    Start(usize),
    // Faults.
    SwapUnanswered {
        a: usize,
        at_once: bool,
    },
    SwapLate,
    Crash(usize),
    PowerCut {
        nodes: CopySet,
        lost: [Bits; COPIES],
    },
    CutOff(usize),
    Break {
        a: usize,
        c: usize,
    },
    /// A member that is up and reachable is to be ejected.
    IsLate {
        a: usize,
        c: usize,
    },
    DiskFails(usize),
    Wipe(usize),
}

impl Bound {
    pub fn steps(&self, s: &State, out: &mut Vec<Action>) {
        use Action::*;
        if s.broken.is_some() {
            return;
        }
        let spent = &s.spent;
        for a in s.alive() {
            let (at, links) = (s.at(a), s.linked(a));
            for k in 0..CHUNKS {
                if spent.writes < self.writes && at.phase == Phase::Serving {
                    out.push(Write { a, k });
                }
                if let Some(write) = &at.writes[k] {
                    let there = links.and(write.waiting);
                    out.extend(there.iter().map(|c| Apply { a, k, c }));
                }
            }
            let open = |k: &usize| at.writes[*k].is_none();
            out.extend(
                chunks(at.undecided)
                    .find(open)
                    .map(|k| CompareChunk { a, k }),
            );
            if spent.flushes < self.flushes && at.phase == Phase::Serving {
                out.push(Flush { a });
            }
            if let Some(flush) = &at.flush {
                let there = links.and(flush.waiting);
                out.extend(there.iter().map(|c| FlushAt { a, c }));
            }
            let sessions = at.syncs.iter().flatten().count();
            for c in 0..COPIES {
                if at.syncs[c].is_some() {
                    out.extend([Mark { a, c }, FlushCopied { a, c }, EndSync { a, c }]);
                    // In their order.
                    let todo = at.syncs[c].map_or(0, |s| s.todo);
                    out.extend(chunks(todo).next().map(|k| CopyChunk { a, c, k }));
                } else if at.held.absent.has(c) && sessions < self.sessions {
                    out.push(BeginSync { a, c });
                }
                if links.has(c) {
                    if !s.is_current(a, c) {
                        out.push(Configure { a, c });
                    }
                } else if at.owns() && at.held.in_sync.has(c) {
                    out.push(Attach { a, c });
                    if !(s.up.has(c) && s.reaches(at.node, c)) {
                        out.push(GiveUp { a, c });
                    }
                }
            }
            if at.phase == Phase::Joining {
                // They do not disturb each other: one order of asking is enough.
                let asked =
                    |c: &usize| at.votes[*c].is_none() && s.up.has(*c) && s.reaches(at.node, *c);
                out.extend(at.held.in_sync.iter().find(asked).map(|c| Ask { a, c }));
                out.extend([Claim { a, random: 0 }, Claim { a, random: 1 }]);
            }
            if at.change.is_some() {
                out.extend([Swap { a }, DecideAnew { a }, ReadRecord { a }]);
            } else if at.outbid > at.held.record.epoch {
                out.push(ReadRecord { a });
            }
        }
        let logs = |c: &usize| s.copies[*c].log != 0 && s.copies[*c].bound.is_some();
        out.extend((0..COPIES).filter(logs).map(|c| Retire { c }));
        out.extend((0..COPIES).filter(|n| !s.up.has(*n)).map(Restart));
        if (0..COPIES).any(|c| s.copies[c].bound.is_none()) {
            out.push(TimePasses);
        }
        if s.registry.late.is_some() {
            out.push(SwapLate);
        }
        if s.cut_off.is_some() {
            out.push(Heal);
        }
        let idle = |n: &usize| s.up.has(*n) && s.alive().all(|a| s.at(a).node != *n);
        if s.started < self.attachments.min(ATTACHMENTS) {
            let idle = |n: &usize| idle(n) && s.answers_probes(*n);
            out.extend(self.starts.iter().filter(idle).map(Start));
        }
        if spent.faults() < self.faults {
            self.faults(s, out);
        }
    }

    fn faults(&self, s: &State, out: &mut Vec<Action>) {
        use Action::*;
        let spent = &s.spent;
        if spent.ambiguous < self.ambiguous {
            for a in s.alive().filter(|a| s.at(*a).change.is_some()) {
                out.extend([true, false].map(|at_once| SwapUnanswered { a, at_once }));
            }
        }
        let up = || (0..=COPIES).filter(|n| s.up.has(*n));
        // A process without a copy matters only while it attaches.
        let matters = |n: &usize| *n < COPIES || s.alive().any(|a| s.at(a).node == *n);
        if spent.crashes < self.crashes {
            out.extend(up().filter(matters).map(Crash));
        }
        if spent.power_cuts < self.power_cuts {
            for &nodes in &self.circuits {
                let losses = |c: usize| subsets(if nodes.has(c) { s.unflushed(c) } else { 0 });
                for x in losses(0) {
                    for y in losses(1) {
                        let of = |z| PowerCut {
                            nodes,
                            lost: [x, y, z],
                        };
                        out.extend(losses(2).map(of));
                    }
                }
            }
        }
        if spent.partitions < self.partitions && s.cut_off.is_none() {
            out.extend(self.cuts.iter().map(CutOff));
        }
        if spent.breaks < self.breaks {
            for a in s.alive() {
                let remote = s.linked(a).iter().filter(|c| *c != s.at(a).node);
                out.extend(remote.flat_map(|c| [Break { a, c }, IsLate { a, c }]));
            }
        }
        if spent.disks < self.disks {
            out.extend((0..COPIES).map(DiskFails));
        }
        if self.makes(Mutant::ReuseIdentity) {
            out.extend((0..COPIES).filter(|c| !s.up.has(*c)).map(Wipe));
        }
    }

    /// The state after a step; `None` when it was not possible, or changed nothing.
    pub fn step(&self, before: &State, action: Action) -> Option<State> {
        use Action::*;
        let mut s = *before;
        let done = match action {
            Write { a, k } => {
                s.spent.writes += 1;
                s.write(a, k)
            }
            Flush { a } => {
                s.spent.flushes += 1;
                s.flush(a, self)
            }
            Apply { a, k, c } => s.apply(a, k, c, self),
            FlushAt { a, c } => s.flush_at(a, c, self),
            Retire { c } => s.retire(c, self),
            Configure { a, c } => s.configure(a, c, self),
            Attach { a, c } => s.attach(a, c, self),
            GiveUp { a, c } => s.give_up(a, c, self),
            Ask { a, c } => s.ask(a, c, self),
            Claim { a, random } => s.claim(a, random, self),
            Swap { a } => s.swap(a, self),
            DecideAnew { a } => s.decide_anew(a, self),
            ReadRecord { a } => s.reads_record(a, self),
            CompareChunk { a, k } => s.compare_chunk(a, k, self),
            BeginSync { a, c } => s.begin_sync(a, c, self),
            Mark { a, c } => s.mark(a, c, self),
            CopyChunk { a, c, k } => s.copy_chunk(a, c, k, self),
            FlushCopied { a, c } => s.flush_copied(a, c),
            EndSync { a, c } => s.end_sync(a, c, self),
            Restart(node) => {
                s.up.insert(node);
                true
            }
            Heal => s.cut_off.take().is_some(),
            TimePasses => s.time_passes(),
            Start(node) => {
                s.start(node);
                true
            }
            SwapUnanswered { a, at_once } => {
                s.spent.ambiguous += 1;
                s.swap_unanswered(a, at_once, self)
            }
            SwapLate => s.swap_late(),
            Crash(node) => {
                s.spent.crashes += 1;
                s.crash(node);
                true
            }
            PowerCut { nodes, lost } => {
                s.spent.power_cuts += 1;
                s.power_cut(nodes, lost);
                true
            }
            CutOff(node) => {
                s.spent.partitions += 1;
                s.cut_off(node);
                true
            }
            Break { a, c } => {
                s.spent.breaks += 1;
                s.unlink(a, c, true);
                true
            }
            IsLate { a, c } => {
                s.spent.breaks += 1;
                s.unlink(a, c, true);
                s.give_up(a, c, self)
            }
            DiskFails(c) => {
                s.spent.disks += 1;
                s.disk_fails(c, self)
            }
            Wipe(c) => {
                s.spent.disks += 1;
                s.wipe(c);
                true
            }
        };
        for a in 0..ATTACHMENTS {
            if done && !matches!(action, Wipe(_)) {
                s.advance(a, self);
            }
        }
        let falls = |c: usize| {
            let (was, is) = (&before.copies[c], &s.copies[c]);
            is.epoch < was.epoch || is.promised < was.promised
        };
        if !matches!(action, Wipe(_)) && (0..COPIES).any(falls) {
            s.breaks(super::state::Rule::S2);
        }
        done.then_some(s)
    }
}

/// All subsets of a set of chunks.
fn subsets(of: Bits) -> impl Iterator<Item = Bits> {
    (0..=of).filter(move |s| s & !of == 0)
}
