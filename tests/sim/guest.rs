//! The guest: what it asks, and what it is told.

use std::rc::Rc;

use lockstep::replication::attachment::{Op, Outcome, RequestId};
use lockstep::replication::ids::{CHUNK, Nanos, REGION, SECTOR, Span};
use lockstep::replication::record::State;

use super::disk::{Stamps, sectors};
use super::oracle::Moment;
use super::world::{Ev, MS, World};

/// How long a guest that wanders stays.
const WANDERS: u64 = 1_500 * MS;

pub struct Asked {
    pub op: Op,
    pub start: Moment,
    /// A copy could not read it.
    pub unreadable: bool,
    /// A copy had no space for it.
    pub full: bool,
}
impl World {
    pub fn guest(&mut self, a: usize) {
        if self.atts[a].over || self.guest_stopped {
            return;
        }
        let wait = self.rng.pick(&[0, 1, 5, 40, 150]) * MS + self.rng.below(2_000) * 1_000;
        self.after(wait, Ev::Guest(a));
        if self.budget == 0 || self.atts[a].leaving || self.atts[a].asked.len() > 24 {
            return;
        }
        for _ in 0..self.rng.between(1, 3) {
            self.budget = self.budget.saturating_sub(1);
            // What the guest of this attachment was told; the record may say more already.
            let all = self.atts[a].machine.record().size / SECTOR;
            // One that wanders leaves regions alone for long enough that they leave the logs, and comes back to them.
            let from = (self.now / WANDERS) as usize * 2 % self.hot.len();
            let near = self.hot.iter().cycle().skip(from).take(2);
            let mut hot: Vec<usize> = if self.weather.wanders {
                near.copied().collect()
            } else {
                self.hot.clone()
            };
            hot.retain(|s| *s as u64 + 16 <= all);
            if hot.is_empty() {
                continue;
            }
            let start = self.rng.pick(&hot) as u64 + self.rng.below(10);
            let len = if self.rng.one_in(12) {
                64
            } else {
                self.rng.between(1, 6)
            };
            let len = len.min(all - start);
            let span = Span {
                offset: start * SECTOR,
                len: (len * SECTOR) as u32,
            };
            let fua = self.fua;
            match self.rng.below(20) {
                0..=9 => self.submit(a, Op::Write { span, fua }, Some(len)),
                10 => {
                    let (span, unmap) = (self.zeroes(span, all * SECTOR), self.rng.one_in(2));
                    self.submit(a, Op::Zero { span, unmap, fua }, None);
                }
                11..=16 => self.submit(a, Op::Read(span), None),
                _ => self.submit(a, Op::Flush, None),
            }
        }
    }

    /// Zeros of a few sectors, of whole chunks, or long ones that begin and end anywhere: within a region, as the engine cuts
    /// them.
    fn zeroes(&mut self, few: Span, size: u64) -> Span {
        let (mut start, mut len) = (few.offset, u64::from(few.len));
        match self.rng.below(16) {
            0..=8 => return few,
            9..=12 => {
                start = start / CHUNK * CHUNK;
                len = CHUNK;
            }
            13 | 14 => len += self.rng.below(2 * CHUNK / SECTOR) * SECTOR,
            // Seldom: every sector of it is looked at from then on.
            _ if self.rng.one_in(4) => (start, len) = (start / REGION * REGION, REGION),
            _ => return few,
        }
        let end = (start / REGION + 1) * REGION;
        let end = end.min(size).min(start + len);
        Span {
            offset: start,
            len: (end - start) as u32,
        }
    }

    pub fn submit(&mut self, a: usize, op: Op, stamps: Option<u64>) {
        self.moment += 1;
        let id = self.next_id;
        self.next_id += 1;
        let start = self.moment;
        let mut data = None;
        match op {
            Op::Write { span, .. } | Op::Zero { span, .. } => {
                let value = if stamps.is_some() { id } else { 0 };
                for s in sectors(span) {
                    self.oracle.begin(s, value, a, id, start);
                }
                data = stamps.map(|n| Stamps(Rc::new(vec![id; n as usize])));
            }
            _ => {}
        }
        if self.verbose {
            self.say(|_| format!("att {a}: {id} asks {op:?}"));
        }
        let machine = &self.atts[a].machine;
        if machine.record().state == State::Recovering && machine.status().undecided > 0 {
            self.seen.count("request while chunks are undecided");
        }
        self.atts[a].asked.insert(
            id,
            Asked {
                op,
                start,
                unreadable: false,
                full: false,
            },
        );
        let now = self.clock(self.atts[a].node);
        self.atts[a].machine.submit(now, RequestId(id), op, data);
    }

    pub fn complete(&mut self, a: usize, id: RequestId, outcome: Outcome, data: Option<Stamps>) {
        let Some(asked) = self.atts[a].asked.remove(&id.0) else {
            panic!("S19: request {id:?} completed twice, or never asked");
        };
        let (now, by) = (self.moment, a);
        let open = self.atts.iter().flat_map(|a| a.asked.values());
        self.oracle.floor = open.map(|q| q.start).min().unwrap_or(now).min(asked.start);
        if outcome == Outcome::IoError {
            self.seen.count("failed");
            let machine = &self.atts[a].machine;
            let deadline = Nanos::from_ms(machine.record().suspend_deadline_ms);
            let suspended = machine.status().suspended_for;
            // The disks of all that are left have died; or they lost power: a flush that cannot keep its promise says so. One
            // whose disk works would have been waited for, also while the attachment cannot reach it.
            let excused = self.is_dead()
                || asked.op == Op::Flush && self.atts[a].lost_power
                || self.atts[a].leaving
                || suspended.is_some_and(|s| s >= deadline)
                // The failure itself ends the suspension that a full disk is.
                || self.atts[a].full.is_some_and(|at| self.clock(self.atts[a].node).since(at) >= deadline);
            if asked.op == Op::Flush {
                self.oracle.flush_failed(a);
            }
            assert!(excused, "S17: {:?} failed before the deadline", asked.op);
            self.say(|_| format!("att {a}: {} fails {:?}", id.0, asked.op));
            return;
        }
        self.seen.count("completed");
        if asked.unreadable {
            self.seen.count("failed read answered by another copy");
        }
        if self.verbose {
            self.say(|_| format!("att {a}: {} completes {:?}", id.0, asked.op));
        }
        assert!(
            self.atts[a].machine.mode_serves(),
            "S17: completed while the mode says suspend"
        );
        let newer_served = self.newer_served(a);
        match asked.op {
            Op::Read(span) => {
                assert!(
                    !newer_served,
                    "S8: a read at an attachment after a newer one served"
                );
                let data = data.expect("a read brings its bytes");
                for (i, s) in sectors(span).enumerate() {
                    let read = self.oracle.may_read(s, data.0[i], asked.start, now);
                    read.unwrap_or_else(|e| panic!("S10: {e}"));
                }
            }
            Op::Write { span, fua } | Op::Zero { span, fua, .. } => {
                match asked.op {
                    Op::Zero { unmap: true, .. } => self.seen.count("discard completed"),
                    Op::Zero { .. } => self.seen.count("write-zeroes completed"),
                    _ => {}
                }
                self.check_applied(by, id.0, span, fua, asked.start);
                for s in sectors(span) {
                    self.oracle.complete(s, by, id.0, now, fua);
                }
                // Acknowledged, then the last copies lost power, and nobody could know when this was completed.
                let cut = |c: &usize| self.nodes[*c].cut > asked.start;
                if self.all_cut > asked.start || self.in_sync().iter().all(cut) {
                    self.oracle.power_lost(now);
                }
            }
            Op::Flush => {
                self.check_flushed(by, asked.start);
                self.oracle.flushed(by, asked.start);
            }
        }
        self.atts[a].served = true;
    }
}
