//! How a run ends: faults stop, everything that was asked ends, and the copies agree.

use lockstep::replication::attachment::{Op, Phase};
use lockstep::replication::growth;
use lockstep::replication::ids::{SECTOR, Span};
use lockstep::replication::record::{CopyStatus, State};

use super::world::{Ev, MS, World};

impl World {
    /// Faults stop: everything that can be mended is.
    pub fn calm(&mut self) {
        self.say(|_| "---- calm".into());
        self.faults = false;
        self.calm_since = self.now;
        self.partitions.heal();
        self.registry_down_until = 0;
        self.isolated.1 = 0;
        self.slow_net_until = 0;
        if self.rng.one_in(4) {
            self.grow();
        }
        for n in 0..self.nodes.len() {
            self.nodes[n].paused_until = 0;
            if let Some(disk) = &mut self.nodes[n].disk {
                disk.full_until = 0;
            }
            if !self.nodes[n].up {
                self.after(10 * MS, Ev::Start(n));
            }
        }
    }

    /// Instead of that: the registry and one in-sync copy are all that is left, for good. Where the failure mode serves with it, an attach
    /// succeeds, every request ends, and what was completed is there. `false`: it did not come to that, and the others may be back.
    pub fn last_stand(&mut self) -> bool {
        let whole = |n: &usize| {
            let disk = self.disk(*n);
            !self.nodes[*n].gapped && !disk.failed && disk.bad.is_empty()
        };
        let left: Vec<usize> = self.in_sync().into_iter().filter(whole).collect();
        let r = &self.registry.record;
        if left.is_empty() || !r.failure_mode.serves(r.replicas_wanted, 1) {
            return false;
        }
        let n = self.rng.pick(&left);
        self.calm();
        self.say(|_| format!("all but node {n} are lost"));
        let others: Vec<usize> = (0..self.nodes.len()).filter(|m| *m != n).collect();
        for &m in &others {
            self.nodes[m].gone = true;
            let power = self.rng.one_in(2);
            self.crash(m, power);
        }
        // What was on its way to the registry arrives.
        self.run_until(self.now + 3_000 * MS);
        let whole = self.is_in_sync(n) && !self.disk(n).failed;
        if !whole {
            others.iter().for_each(|m| self.nodes[*m].gone = false);
            return false;
        }
        self.budget = 60;
        let patience = self.now + 60_000 * MS;
        while self.now < patience && !(self.serves_from(n) && self.budget == 0) {
            self.run_until(self.now + 500 * MS);
        }
        assert!(
            self.serves_from(n),
            "liveness: the registry and node {n} are left, and nobody could attach: {:?}; attachment {:?}",
            self.registry.record,
            self.atts
                .last()
                .map(|a| (a.machine.status(), a.machine.why_not_serving()))
        );
        self.guest_stopped = true;
        self.read_back("with one copy left");
        self.seen.count("attach with one copy left");
        true
    }

    fn serves_from(&self, n: usize) -> bool {
        self.live().is_some_and(|a| {
            let machine = &self.atts[a].machine;
            self.atts[a].node == n
                && *machine.phase() == Phase::Serving
                && machine.why_not_serving().is_none()
                && machine.record().in_sync().count() == 1
        })
    }

    /// Resync ends under constant writes: the guest stops only when all copies are in sync.
    pub fn catch_up(&mut self) {
        if self.weather.constant {
            self.budget = u64::MAX;
            let patience = self.now + 120_000 * MS;
            let steady = |w: &Self| w.is_whole() && w.now >= w.calm_since + 2_000 * MS;
            while self.now < patience && !steady(self) && !self.is_dead() {
                let next = self.now + 500 * MS;
                self.run_until(next);
            }
            let (serves, whole) = (self.record_serves(), self.is_whole());
            assert!(
                whole || self.is_dead() || !serves,
                "liveness: 120 s of constant writes, and not in sync: {:?}",
                self.registry.record
            );
            self.seen.count("in sync under constant writes");
        }
        self.guest_stopped = true;
    }

    fn record_serves(&self) -> bool {
        let r = &self.registry.record;
        r.failure_mode
            .serves(r.replicas_wanted, r.in_sync().count())
    }

    /// Every in-sync copy's disk has failed for good: what the fault atlas could not exclude.
    pub fn is_dead(&self) -> bool {
        self.registry
            .record
            .in_sync()
            .all(|c| self.holder(c).is_none_or(|n| self.disk(n).failed))
    }

    pub fn live(&self) -> Option<usize> {
        let alive = |i: &usize| !self.atts[*i].over;
        (0..self.atts.len()).rev().find(alive)
    }

    pub fn settled(&self) -> bool {
        let Some(i) = self.live() else { return false };
        let a = &self.atts[i];
        let others = self.atts.iter().filter(|a| !a.over).count();
        let r = &self.registry.record;
        let serves = r
            .failure_mode
            .serves(r.replicas_wanted, r.in_sync().count());
        // S14 speaks of healthy copies: one that nobody has missed yet is none.
        let healthy = a
            .machine
            .status()
            .copies
            .iter()
            .all(|c| c.connected || c.status != CopyStatus::InSync);
        others == 1
            && healthy
            && self.now >= self.calm_since + 4_000 * MS
            && *a.machine.phase() == Phase::Serving
            && r.state == State::Active
            && self.is_whole()
            && growth::wanted(r).is_none()
            && a.asked.is_empty()
            && a.machine.is_idle()
            && (!serves || a.machine.why_not_serving().is_none())
            && a.machine.record().epoch == r.epoch
    }

    /// The guest reads back everything it ever touched; then the copies are compared (S14).
    pub fn verify(&mut self) {
        let i = self.live().unwrap();
        if self.atts[i].machine.mode_serves() {
            self.read_back("when all is calm");
            let patience = self.now + 60_000 * MS;
            while self.now < patience && !self.settled() {
                self.run_until(self.now + 500 * MS);
            }
            assert!(self.settled(), "liveness: the last reads left it unsettled");
        }
        self.check_identical();
        self.check_room();
    }

    /// The guest reads all it ever touched.
    fn read_back(&mut self, when: &str) {
        let i = self.live().unwrap();
        self.verifying = true;
        let mut at = 0;
        // What it was told; without a machine that hears of it, the record may say more.
        let all = (self.atts[i].machine.record().size / SECTOR) as usize;
        let touched = self.oracle.touched();
        while let Some(&s) = touched.iter().find(|s| **s >= at) {
            let len = 64.min(all - s);
            at = s + len;
            let span = Span {
                offset: s as u64 * SECTOR,
                len: (len as u64 * SECTOR) as u32,
            };
            self.submit(i, Op::Read(span), None);
        }
        // Nobody wrote the end of it but perhaps the last sectors: zeros, also where the volume has grown.
        let span = Span {
            offset: (all as u64 - 16) * SECTOR,
            len: 16 * SECTOR as u32,
        };
        self.submit(i, Op::Read(span), None);
        let node = self.atts[i].node;
        self.pump(node);
        let patience = self.now + 60_000 * MS;
        while self.now < patience && !self.atts[i].asked.is_empty() {
            let next = self.now + 500 * MS;
            self.run_until(next);
        }
        assert!(
            self.atts[i].asked.is_empty(),
            "liveness: the last reads {when} did not end"
        );
    }

    /// A clean detach at the end: logs empty, copies clean and durable.
    pub fn leave(&mut self) {
        let i = self.live().unwrap();
        if self.is_dead()
            || self
                .nodes
                .iter()
                .filter_map(|n| n.disk.as_ref())
                .any(|d| d.failed)
        {
            return;
        }
        self.atts[i].leaving = true;
        let now = self.clock(self.atts[i].node);
        self.atts[i].machine.detach(now);
        let node = self.atts[i].node;
        self.pump(node);
        let patience = self.now + 60_000 * MS;
        while self.now < patience && !self.atts[i].over {
            let next = self.now + 200 * MS;
            self.run_until(next);
        }
        assert!(
            *self.atts[i].machine.phase() == Phase::Left,
            "liveness: a clean detach ended as {:?}",
            self.atts[i].machine.phase()
        );
    }
}
