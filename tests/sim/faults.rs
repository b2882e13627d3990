//! What goes wrong, and what never goes wrong at once.

use lockstep::replication::ids::Nanos;
use lockstep::replication::replica::DiskOp;

use super::disk::{Fate, Stamps};
use super::world::{Ev, MS, World};

/// How rough this run is.
pub struct Weather {
    /// One fault each so many ms on average.
    pub every_ms: u64,
    pub kinds: Vec<Fault>,
    pub disk_faults: bool,
    /// Also the last in-sync copy's disk may die: then every request must still end.
    pub last_disk: bool,
    pub slow_disk: u64,
    pub ambiguous: u64,
    pub registry_down: u64,
    pub writeback: bool,
}
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Reset,
    Partition,
    Pause,
    Crash,
    PowerCut,
    BlackOut,
    DiskFull,
    RegistryDown,
    Policy,
    SecondAttach,
    Detach,
    SlowNet,
    /// The attachment's node sees nobody, its guest runs on, and the volume is attached elsewhere.
    Isolate,
}

pub const FAULTS: [Fault; 13] = [
    Fault::Reset,
    Fault::Partition,
    Fault::Pause,
    Fault::Crash,
    Fault::PowerCut,
    Fault::BlackOut,
    Fault::DiskFull,
    Fault::RegistryDown,
    Fault::Policy,
    Fault::SecondAttach,
    Fault::Detach,
    Fault::SlowNet,
    Fault::Isolate,
];
impl World {
    pub fn fault(&mut self) {
        if !self.faults {
            return;
        }
        let wait = self.rng.between(1, 2 * self.weather.every_ms) * MS;
        self.after(wait, Ev::Fault);
        let kinds = self.weather.kinds.clone();
        let kind = self.rng.pick(&kinds);
        let n = self.rng.below(self.nodes.len() as u64) as usize;
        let until = self.now + self.rng.pick(&[100, 600, 3_000, 6_000]) * MS;
        self.say(|_| format!("fault {kind:?} (node {n})"));
        match kind {
            Fault::Reset => {
                let open: Vec<usize> = (0..self.sessions.len())
                    .filter(|s| self.sessions[*s].to_att && self.sessions[*s].to_copy)
                    .filter(|s| self.atts[self.sessions[*s].att].node != self.sessions[*s].copy)
                    .collect();
                if !open.is_empty() {
                    let s = self.rng.pick(&open);
                    self.reset(s, true, true);
                }
            }
            Fault::Partition => {
                let m = self.rng.below(self.nodes.len() as u64) as usize;
                for other in 0..self.nodes.len() {
                    if other != n && (other == m || self.rng.one_in(2)) {
                        self.partitions.cut(n, other, until);
                    }
                }
            }
            Fault::Pause => self.nodes[n].paused_until = until,
            Fault::Crash => self.crash(n, false),
            Fault::PowerCut => self.crash(n, true),
            Fault::BlackOut => {
                if self.rng.one_in(3) {
                    (0..self.nodes.len()).for_each(|n| self.crash(n, true));
                }
            }
            Fault::DiskFull => {
                if let Some(disk) = &mut self.nodes[n].disk {
                    disk.full_until = until;
                }
            }
            Fault::RegistryDown => self.registry_down_until = until,
            Fault::Policy => self.after(0, Ev::Policy),
            Fault::SecondAttach => self.ask_attach(n),
            Fault::Detach => {
                if let Some(a) = self.live()
                    && self.atts[a].serving_seen
                {
                    self.atts[a].leaving = true;
                    self.atts[a].machine.detach(Nanos(self.now));
                    let node = self.atts[a].node;
                    if self.nodes[node].paused_until <= self.now {
                        self.pump(node);
                    }
                }
            }
            Fault::SlowNet => self.slow_net_until = until,
            Fault::Isolate => {
                let Some(a) = self.live() else { return };
                let (alone, until) = (self.atts[a].node, self.now + 8_000 * MS);
                if self.rng.one_in(2) {
                    // It sleeps through its own succession, reads on their way.
                    self.nodes[alone].paused_until = until;
                } else {
                    for other in (0..self.nodes.len()).filter(|o| *o != alone) {
                        self.partitions.cut(alone, other, until);
                    }
                    self.isolated = (alone, until);
                }
                for ms in [2_900, 3_100, 3_400, 4_000, 5_000] {
                    let n = self.rng.below(self.nodes.len() as u64) as usize;
                    self.after(ms * MS, Ev::Elsewhere(n));
                }
            }
        }
    }

    pub fn fate(&mut self, n: usize, op: &DiskOp<Stamps>) -> Fate {
        let disk = self.nodes[n].disk.as_ref().unwrap();
        let data = matches!(op, DiskOp::Write { .. } | DiskOp::Zero { .. });
        if disk.full_until > self.now && data {
            return Fate::Full;
        }
        if disk.failed && (data || matches!(op, DiskOp::Sync)) {
            return Fate::Error;
        }
        if !self.faults || !self.weather.disk_faults {
            return Fate::Done;
        }
        match op {
            DiskOp::Read { .. } if self.rng.one_in(200) => Fate::Error,
            DiskOp::Write { .. } | DiskOp::Zero { .. } if self.rng.one_in(400) => self.kill(n),
            DiskOp::Sync if self.rng.one_in(60) => self.kill(n),
            _ => Fate::Done,
        }
    }

    /// The fault atlas: a disk dies only while another in-sync copy is there, healthy and connected.
    pub fn kill(&mut self, n: usize) -> Fate {
        let Some(a) = self.live() else {
            return Fate::Done;
        };
        let status = self.atts[a].machine.status();
        let healthy = (0..self.copies)
            .filter(|c| *c != n && self.is_in_sync(*c) && status.copies[*c].connected)
            .filter(|c| !self.nodes[*c].disk.as_ref().unwrap().failed)
            .count();
        if healthy > 0 || self.weather.last_disk {
            Fate::Error
        } else {
            Fate::Done
        }
    }

    pub fn rng_half(&mut self) -> bool {
        self.rng.one_in(2)
    }
}
