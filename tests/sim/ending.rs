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
            self.verifying = true;
            let mut at = 0;
            let all = (self.registry.record.size / SECTOR) as usize;
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
            while self.now < patience && !self.settled() {
                let next = self.now + 500 * MS;
                self.run_until(next);
            }
            assert!(self.settled(), "liveness: the last reads did not end");
        }
        self.check_identical();
        self.check_room();
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
