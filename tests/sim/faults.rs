//! What goes wrong, and what never goes wrong at once: the fault atlas.
//!
//! * **Network.** Messages of one connection keep their order, and none comes twice. They are late, or held up in one
//!   direction or both until a partition heals; a connection breaks in the middle of what is under way, with both ends,
//!   one or none of them told. Only a node by itself (its own copy) always reaches itself.
//! * **Processes.** Any may stop, sleep or lose power, all at once too. A sleeping process' messages, timers and disk answers wait.
//!   A power cut takes any subset of the sectors that no flush covered, sector by sector; when every in-sync copy has lost power,
//!   the guest may miss what no flush covered (S10), and otherwise nothing.
//! * **Writes and flushes.** They fail for good (EIO) at a copy only while another in-sync copy is whole, connected or not; some
//!   runs drop this rule (`last_disk`): then requests may fail, but each must end. So they may where that other copy had been put
//!   out already and the attachment did not know. The note that a disk has failed may fail, too. A full disk may be any, all of them.
//! * **Growing** needs room: on a full disk it fails without harm, any copy's, and the files may be longer all the same.
//! * **Reads.** Sectors that cannot be read are at one copy at a time: while another in-sync copy is connected and
//!   whole. Once there is none, the disk finds them readable after all.
//! * **Wiped disks.** Any absent copy's; an in-sync one's only while another one is connected and whole. The node comes back without
//!   files, the control plane gives it a new identity.
//! * **Rot.** At an opening one of these reads wrong: one half of the superblock (never both), the log, one bitmap. Data
//!   does not rot silently: reads and writes would not notice. It does at the very end, one copy's, for a scrub to find (`scrub.rs`).
//! * **Clocks.** Each node's starts anywhere at each boot; two of them drift apart by at most one part in a hundred.
//! * **Registry.** It may be slow, down, or not say whether it swapped; a late swap may still happen. It never loses
//!   or takes back a value.

use lockstep::replication::attachment::{CopyView, Op};
use lockstep::replication::copy_state::{BITMAPS_MAX, Standing};
use lockstep::replication::ids::{SECTOR, Span};
use lockstep::replication::record::CopyStatus;
use lockstep::replication::replica::DiskOp;

use super::disk::{Fate, Rot, Stamps, sectors};
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
    pub rot: bool,
    /// The longest, in ms, that news of a changed record are on their way.
    pub watch_lag: u64,
    /// The guest writes here for a while, then there.
    pub wanders: bool,
    /// The guest writes on while copies are brought up to date at the end.
    pub constant: bool,
    /// The operator scrubs now and then.
    pub scrub: bool,
    /// The scrub of the calm, before anything rots, repairs.
    pub scrub_repairs: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Reset,
    /// A connection is dead, and one end or both are never told.
    HalfOpen,
    Partition,
    /// One node sends to others and hears nothing of them, or the other way round.
    OneWay,
    Pause,
    Crash,
    PowerCut,
    BlackOut,
    DiskFull,
    BadSectors,
    /// A node's disk is gone, all of it.
    Wipe,
    /// The operator adds, removes and moves copies, or wants another master.
    Members,
    /// The operator wants the volume to be larger.
    Grow,
    RegistryDown,
    Policy,
    SecondAttach,
    Detach,
    SlowNet,
    /// The attachment's node sees nobody, its guest runs on, and the volume is attached elsewhere.
    Isolate,
}

pub const FAULTS: [Fault; 19] = [
    Fault::Reset,
    Fault::HalfOpen,
    Fault::Partition,
    Fault::OneWay,
    Fault::Pause,
    Fault::Crash,
    Fault::PowerCut,
    Fault::BlackOut,
    Fault::DiskFull,
    Fault::BadSectors,
    Fault::Wipe,
    Fault::Members,
    Fault::Grow,
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
                if let Some(s) = self.some_session() {
                    self.reset(s, true, true);
                }
            }
            Fault::HalfOpen => {
                if let Some(s) = self.some_session() {
                    let told = self.rng.below(3);
                    self.seen.count("half-open connection");
                    self.reset(s, told == 1, told == 2);
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
            Fault::OneWay => {
                let deaf = self.rng.one_in(2);
                for other in (0..self.nodes.len()).filter(|o| *o != n) {
                    let (from, to) = if deaf { (other, n) } else { (n, other) };
                    self.partitions.cut_one_way(from, to, until);
                    self.seen.count("one-way partition");
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
            Fault::BadSectors => self.spoil(n),
            Fault::Wipe => {
                if self.nodes[n].disk.is_some() && (!self.is_in_sync(n) || self.has_equals(n)) {
                    self.say(|_| format!("the disk of node {n} is wiped"));
                    self.seen.count("disk wiped");
                    self.crash(n, false);
                    self.lose_files(n);
                }
            }
            Fault::Members => self.change_members(),
            Fault::Grow => self.grow(),
            Fault::RegistryDown => self.registry_down_until = until,
            Fault::Policy => self.after(0, Ev::Policy),
            Fault::SecondAttach => self.ask_attach(n),
            Fault::Detach => {
                if let Some(a) = self.live()
                    && self.atts[a].serves.is_some()
                {
                    self.atts[a].leaving = true;
                    let node = self.atts[a].node;
                    let now = self.clock(node);
                    self.atts[a].machine.detach(now);
                    if self.nodes[node].paused_until <= self.now {
                        self.pump(node);
                    }
                }
            }
            Fault::SlowNet => {
                self.slow_net_until = until;
                self.slow_node = self.rng.one_in(2).then_some(n);
            }
            Fault::Isolate => {
                let Some(a) = self.live() else { return };
                // The copies' grace, and twice the wait for the copy that is away with it: then another one serves, without that copy.
                let (alone, until) = (self.atts[a].node, self.now + 12_000 * MS);
                self.atts[a].isolated = true;
                if self.rng.one_in(2) {
                    // It sleeps through its own succession. The answers to its last reads wait for it to wake (S8).
                    if self.nodes[alone].paused_until <= self.now && !self.atts[a].leaving {
                        self.read_before_sleep(a);
                    }
                    self.nodes[alone].paused_until = until;
                } else {
                    for other in (0..self.nodes.len()).filter(|o| *o != alone) {
                        self.partitions.cut(alone, other, until);
                    }
                    self.isolated = (alone, until);
                    // What it writes now nobody else has, and no log but its own copy's names where (S11).
                    if self.nodes[alone].paused_until <= self.now && !self.atts[a].leaving {
                        self.write_alone(a);
                    }
                }
                for ms in [2_900, 3_100, 3_400, 4_000, 5_000] {
                    let n = self.rng.below(self.nodes.len() as u64) as usize;
                    self.after(ms * MS, Ev::Elsewhere(n));
                }
            }
        }
    }

    fn write_alone(&mut self, a: usize) {
        let all = self.atts[a].machine.record().size / SECTOR;
        for _ in 0..4 {
            let offset = self.rng.below(all - 16) * SECTOR;
            let (len, fua) = (4 * SECTOR as u32, self.fua);
            let span = Span { offset, len };
            self.submit(a, Op::Write { span, fua }, Some(4));
        }
        self.pump(self.atts[a].node);
    }

    fn read_before_sleep(&mut self, a: usize) {
        let all = self.atts[a].machine.record().size / SECTOR;
        for s in self.hot.clone() {
            let offset = (s as u64).min(all - 16) * SECTOR;
            let len = 16 * SECTOR as u32;
            self.submit(a, Op::Read(Span { offset, len }), None);
        }
        self.pump(self.atts[a].node);
    }

    /// An open connection between two nodes.
    fn some_session(&mut self) -> Option<usize> {
        let between = |s: &usize| {
            let session = &self.sessions[*s];
            session.to_att.is_whole()
                && session.to_copy.is_whole()
                && self.atts[session.att].node != session.node
        };
        let open: Vec<usize> = (0..self.sessions.len()).filter(between).collect();
        (!open.is_empty()).then(|| self.rng.pick(&open))
    }

    pub fn fate(&mut self, n: usize, op: &DiskOp<Stamps>) -> Fate {
        let disk = self.disk(n);
        let (full, failed) = (disk.full_until > self.now, disk.failed);
        let bad = |span: Span| disk.bad.range(sectors(span)).next().is_some();
        let unreadable = match op {
            DiskOp::Read { span, .. } | DiskOp::Hash { span } => bad(*span),
            _ => false,
        };
        let rough = self.faults && self.weather.disk_faults;
        match op {
            DiskOp::Write { .. } | DiskOp::Zero { .. } | DiskOp::Grow { .. } if full => {
                self.seen.count("full disk");
                Fate::Full
            }
            DiskOp::Superblock(s) if failed && s.standing == Standing::Failed => {
                // Restarted, the copy knows nothing of it.
                if self.rng.one_in(2) {
                    Fate::Error
                } else {
                    Fate::Done
                }
            }
            DiskOp::Write { .. } | DiskOp::Zero { .. } | DiskOp::Sync if failed => Fate::Error,
            DiskOp::Grow { .. } if rough && self.rng.one_in(10) => {
                self.kill(n, "disk died of growing")
            }
            DiskOp::Write { .. } | DiskOp::Zero { .. } if rough && self.rng.one_in(400) => {
                self.kill(n, "disk died of a write")
            }
            DiskOp::Sync if rough && self.rng.one_in(60) => self.kill(n, "disk died of a flush"),
            _ if unreadable && self.has_equals(n) => Fate::Error,
            _ if unreadable => {
                self.nodes[n].disk.as_mut().unwrap().bad.clear();
                Fate::Done
            }
            _ => Fate::Done,
        }
    }

    fn kill(&mut self, n: usize, how: &'static str) -> Fate {
        let (reachable, somewhere) = (self.has_equals(n), self.has_equals_somewhere(n));
        if !somewhere && !self.weather.last_disk {
            return Fate::Done;
        }
        self.say(|_| format!("the disk of node {n} dies"));
        self.seen.count(how);
        if somewhere && !reachable {
            self.seen.count("disk died while its equal was away");
        }
        Fate::Error
    }

    /// Whether another in-sync copy is connected to the attachment, and nothing is wrong with its disk.
    fn has_equals(&self, n: usize) -> bool {
        self.has_others(n, |c| c.connected)
    }

    /// The same of one that may have lost its connection, and is not put out.
    fn has_equals_somewhere(&self, n: usize) -> bool {
        self.has_others(n, |_| true)
    }

    fn has_others(&self, n: usize, which: impl Fn(&CopyView) -> bool) -> bool {
        let Some(a) = self.live() else {
            return false;
        };
        let status = self.atts[a].machine.status();
        // By its own view, too: it may not know yet whom the record has taken in.
        let in_sync = |c: &&CopyView| which(c) && c.status == CopyStatus::InSync;
        let mut others = status.copies.iter().filter(in_sync);
        others.any(|c| {
            let holder = self.node_named(&c.node);
            holder.is_some_and(|m| {
                m != n
                    && self.is_in_sync(m)
                    && !self.nodes[m].gapped
                    && !self.disk(m).failed
                    && self.disk(m).bad.is_empty()
            })
        })
    }

    /// A few sectors of a copy cannot be read any more.
    fn spoil(&mut self, n: usize) {
        if self.nodes[n].disk.is_none() || !self.has_equals(n) {
            return;
        }
        let start = self.rng.pick(&self.hot.clone()) + self.rng.below(10) as usize;
        let all = (self.registry.record.size / SECTOR) as usize;
        let end = (start + self.rng.between(1, 4) as usize).min(all);
        self.nodes[n].disk.as_mut().unwrap().bad.extend(start..end);
        self.scrubs.spoiled.extend(start..end);
        self.seen.count("unreadable sectors");
    }

    /// What reads wrong when the copy on `n` is opened.
    pub fn rot(&mut self, n: usize) -> Option<Rot> {
        if self.nodes[n].disk.is_none() || !self.faults || !self.weather.rot || !self.rng.one_in(3)
        {
            return None;
        }
        let slots: Vec<usize> = (0..BITMAPS_MAX)
            .filter(|s| self.disk(n).superblock.bitmaps[*s].is_some())
            .collect();
        let rot = match self.rng.below(3) {
            0 => Rot::Superblock(self.rng.below(2) as usize),
            1 => Rot::Log,
            _ if slots.is_empty() => return None,
            _ => Rot::Bitmap(self.rng.pick(&slots)),
        };
        self.seen.count(match rot {
            Rot::Superblock(_) => "rot of a superblock",
            Rot::Log => "rot of a log",
            Rot::Bitmap(_) => "rot of a bitmap",
        });
        self.say(|_| format!("node {n}: rot: {rot:?}"));
        Some(rot)
    }
}
