//! Nodes: processes that start and end, the copies in them, and their disks.

use std::collections::BTreeMap;

use lockstep::replication::attachment::Op;
use lockstep::replication::ids::{BootId, Instance, Nanos, NodeName, Seq};
use lockstep::replication::message::{Message, Status};
use lockstep::replication::record::{CopyEntry, CopyStatus};
use lockstep::replication::replica::{Action as CopyAction, DiskOp, Replica, Ticket};

use super::disk::{Disk, Stamps};
use super::oracle::Moment;
use super::rng::Rng;
use super::world::{Ev, MS, World};

pub struct Node {
    pub name: NodeName,
    pub up: bool,
    pub paused_until: u64,
    pub boot: BootId,
    pub instance: Instance,
    /// Counts processes: events for an earlier one are void.
    pub process: u64,
    /// Counts copies: disk answers of an earlier one are void.
    pub copy: u64,
    pub replica: Option<Replica<Stamps>>,
    pub disk: Option<Disk>,
    /// It does not start again.
    pub gone: bool,
    /// The copy promised and no attachment has bound it since: nothing may be written (S7).
    pub fenced: bool,
    /// When it last lost power.
    pub cut: Moment,
    /// Its copy lost power while in sync, and may lack what no flush covered.
    pub gapped: bool,
    pub clock: Clock,
    pub looked: u64,
}

/// A node's CLOCK_BOOTTIME: it starts anew with each boot, and does not tick quite as others do.
#[derive(Clone, Copy)]
pub struct Clock {
    offset: u64,
    /// Parts in a million too fast.
    drift: i64,
}

/// Half of one percent each way: two clocks differ by one in a hundred at most, ten times what quartz does.
const DRIFT_MAX: u64 = 5_000;

impl Clock {
    pub fn new(rng: &mut Rng) -> Self {
        Self {
            offset: rng.below(100_000) * MS,
            drift: rng.between(0, 2 * DRIFT_MAX) as i64 - DRIFT_MAX as i64,
        }
    }

    pub fn at(self, now: u64) -> Nanos {
        let ahead = i128::from(now) * i128::from(self.drift) / 1_000_000;
        Nanos(self.offset + (i128::from(now) + ahead) as u64)
    }
}

impl World {
    pub fn clock(&self, n: usize) -> Nanos {
        self.nodes[n].clock.at(self.now)
    }

    pub fn node_named(&self, name: &NodeName) -> Option<usize> {
        self.nodes.iter().position(|n| n.name == *name)
    }

    /// The node that holds the copy of this place of the record; `None` if its disk is gone.
    pub fn holder(&self, entry: &CopyEntry) -> Option<usize> {
        let n = self.node_named(&entry.node)?;
        let disk = self.nodes[n].disk.as_ref()?;
        (disk.copy_id() == entry.copy_id).then_some(n)
    }

    /// The place in the record of the copy that node `n` holds.
    pub fn place(&self, n: usize) -> Option<usize> {
        let id = self.nodes[n].disk.as_ref()?.copy_id();
        let copies = &self.registry.record.copies;
        copies.iter().position(|c| c.copy_id == id)
    }

    pub fn is_in_sync(&self, n: usize) -> bool {
        let status = |place: usize| self.registry.record.copies[place].status;
        self.place(n)
            .is_some_and(|p| status(p) == CopyStatus::InSync)
    }

    /// Nodes whose copies are in sync by the record in force.
    pub fn in_sync(&self) -> Vec<usize> {
        (0..self.nodes.len())
            .filter(|n| self.is_in_sync(*n))
            .collect()
    }

    pub fn disk(&self, n: usize) -> &Disk {
        self.nodes[n].disk.as_ref().expect("a node with a copy")
    }
    pub fn start_node(&mut self, n: usize) {
        if self.nodes[n].up || self.nodes[n].gone {
            return;
        }
        let instance = Instance(self.rng.id());
        let node = &mut self.nodes[n];
        node.up = true;
        node.instance = instance;
        node.process += 1;
        node.fenced = false;
        let process = node.process;
        self.open_copy(n);
        self.say(|_| format!("node {n} runs"));
        self.after(0, Ev::Tick(n, process));
    }

    /// The running process opens the copy that the node holds, if any.
    pub fn open_copy(&mut self, n: usize) {
        let rot = self.rot(n);
        let now = self.clock(n);
        let node = &mut self.nodes[n];
        if let Some(disk) = &mut node.disk {
            let found = disk.open(rot);
            node.replica = Some(Replica::new(
                found.state,
                found.regions.as_deref(),
                found.maps,
                node.boot,
                self.timing,
                now,
            ));
        }
    }

    /// The node's process ends, or the whole machine.
    pub fn crash(&mut self, n: usize, power: bool) {
        if !self.nodes[n].up {
            return;
        }
        self.say(|_| format!("node {n}: {}", if power { "power cut" } else { "crash" }));
        let mut asked = self.atts.iter().flat_map(|a| a.asked.values());
        if asked.any(|q| matches!(q.op, Op::Zero { .. })) {
            self.seen.count("zeros under way at a crash");
        }
        for a in 0..self.atts.len() {
            if self.atts[a].node == n && !self.atts[a].over {
                self.atts[a].over = true;
                self.atts[a].asked.clear();
            }
        }
        // The dead process reads nothing more. What it had sent may arrive, and the other end may learn of its end or not.
        for s in 0..self.sessions.len() {
            let (from, to) = (self.atts[self.sessions[s].att].node, self.sessions[s].node);
            if from != n && to != n {
                continue;
            }
            let learns = !power || self.rng.one_in(2);
            self.reset(s, from != n && learns, to != n && learns);
            let session = &mut self.sessions[s];
            session.to_att.open &= from != n;
            session.to_copy.open &= to != n;
        }
        for att in self.atts.iter_mut().filter(|a| a.node == n) {
            att.links.fill(None);
        }
        let moment = self.moment;
        let node = &mut self.nodes[n];
        node.up = false;
        node.paused_until = 0;
        node.process += 1;
        node.replica = None;
        if let Some(disk) = &mut node.disk {
            disk.crash(&mut self.rng);
            if power {
                disk.power_cut(&mut self.rng);
                node.boot = BootId(self.rng.id());
                node.cut = moment;
            }
        }
        if power {
            self.nodes[n].clock = Clock::new(&mut self.rng);
            self.nodes[n].gapped = self.is_in_sync(n);
            self.weigh_power();
            if self.nodes[n].gapped {
                self.seen.count("power cut of one in-sync copy");
            }
        }
        self.check_differences(n, "its process ended");
        let down = if power {
            self.rng.between(200, 8_000)
        } else {
            self.rng.between(20, 4_000)
        };
        self.after(down * MS, Ev::Start(n));
    }

    pub fn copy_acts(
        &mut self,
        n: usize,
        action: CopyAction<Stamps>,
        acks: &mut BTreeMap<u64, Vec<(Seq, Status)>>,
    ) {
        match action {
            CopyAction::Ack {
                session,
                seq,
                status,
            } => acks.entry(session.0).or_default().push((seq, status)),
            CopyAction::Reply {
                session,
                message,
                data,
            } => {
                // What was acknowledged before goes out before.
                if let Some(before) = acks.remove(&session.0) {
                    self.flush_acks(n, session.0, before);
                }
                self.check_reply(n, &message);
                match &message {
                    Message::PromiseAck(disk) if !disk.probe => self.nodes[n].fenced = true,
                    Message::AttachAck { .. } => self.nodes[n].fenced = false,
                    Message::SyncReady { .. } => {
                        self.nodes[n].fenced = false;
                        self.note_returning(n);
                    }
                    Message::Nack(refusal) => {
                        self.say(|_| format!("copy {n}: session {}: {refusal}", session.0));
                    }
                    _ => {}
                }
                self.tell_att(session.0 as usize, message, data);
            }
            CopyAction::Disk(ticket, op) => self.disk_op(n, ticket, op),
            CopyAction::Close(session) => {
                let s = session.0 as usize;
                self.sessions[s].to_copy.open = false;
                let wait = self.rng.below(2) * MS;
                self.after(wait, Ev::CopyClosed(s));
                let at = self.sessions[s].to_att.last.max(self.now);
                self.at(at, Ev::AttClosed(s, "the copy ended the session"));
            }
            CopyAction::Event { rule, text } => self.say(|_| format!("copy {n}: [{rule}] {text}")),
        }
    }

    pub fn disk_op(&mut self, n: usize, ticket: Ticket, op: DiskOp<Stamps>) {
        let fate = self.fate(n, &op);
        let mut took = self.rng.between(30, 3_000) * 1_000;
        if self.faults && self.rng.one_in(self.weather.slow_disk) {
            took += self.rng.below(700) * MS;
        }
        if self.faults && self.weather.slow_disk > 0 && self.rng.one_in(4_000) {
            took += 6_000 * MS;
        }
        if let DiskOp::Grow { .. } = op {
            // Files are made longer and flushed: much longer than a write.
            took += self.rng.below(600) * MS;
        }
        self.check_disk_op(n, &op);
        let node = &mut self.nodes[n];
        let replica = node.replica.as_ref().unwrap();
        let disk = node.disk.as_mut().unwrap();
        disk.start(ticket, op, fate, |slot| replica.map(slot));
        let process = (node.process, node.copy);
        if self.rng.one_in(3) {
            let early = self.rng.below(took);
            self.after(early, Ev::DiskEffect(n, process, ticket));
        }
        self.after(took, Ev::DiskDone(n, process, ticket));
    }

    pub fn flush_acks(&mut self, n: usize, session: u64, acks: Vec<(Seq, Status)>) {
        let Some(replica) = &self.nodes[n].replica else {
            return;
        };
        let message = Message::AckVec {
            epoch: replica.state().epoch,
            acks,
            log_pressure: replica.log_pressure(),
        };
        self.tell_att(session as usize, message, None);
    }
}
