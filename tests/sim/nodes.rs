//! Nodes: processes that start and end, the copies in them, and their disks.

use std::collections::BTreeMap;

use lockstep::replication::ids::{BootId, Instance, Nanos, NodeName, Seq};
use lockstep::replication::message::{Message, Status};
use lockstep::replication::replica::{Action as CopyAction, DiskOp, Replica, Ticket};
use lockstep::replication::timing::Timing;

use super::disk::{Disk, Stamps};
use super::oracle::Moment;
use super::world::{Ev, MS, World};

pub struct Node {
    pub name: NodeName,
    pub up: bool,
    pub paused_until: u64,
    pub boot: BootId,
    pub instance: Instance,
    /// Counts processes: events for an earlier one are void.
    pub process: u64,
    pub replica: Option<Replica<Stamps>>,
    pub disk: Option<Disk>,
    /// The copy promised and no attachment has bound it since: nothing may be written (S7).
    pub fenced: bool,
    /// When it last lost power.
    pub cut: Moment,
    pub looked: u64,
}
impl World {
    pub fn start_node(&mut self, n: usize) {
        if self.nodes[n].up {
            return;
        }
        let instance = Instance(self.rng.id());
        let node = &mut self.nodes[n];
        node.up = true;
        node.instance = instance;
        node.process += 1;
        node.fenced = false;
        let process = node.process;
        if let Some(disk) = &node.disk {
            let regions: Vec<_> = disk.log.iter().copied().collect();
            node.replica = Some(Replica::new(
                disk.superblock.clone(),
                &regions,
                disk.maps(),
                node.boot,
                Timing::DEFAULT,
                Nanos(self.now),
            ));
        }
        self.say(|_| format!("node {n} runs"));
        self.after(0, Ev::Tick(n, process));
    }

    /// The node's process ends, or the whole machine.
    pub fn crash(&mut self, n: usize, power: bool) {
        if !self.nodes[n].up {
            return;
        }
        self.say(|_| format!("node {n}: {}", if power { "power cut" } else { "crash" }));
        for a in 0..self.atts.len() {
            if self.atts[a].node == n && !self.atts[a].over {
                self.atts[a].over = true;
                self.atts[a].asked.clear();
                for copy in 0..self.copies {
                    if let Some(s) = self.atts[a].links[copy].take() {
                        let learns = !power || self.rng_half();
                        self.reset(s, false, learns);
                    }
                }
            }
        }
        for s in 0..self.sessions.len() {
            if self.sessions[s].copy == n && (self.sessions[s].to_copy || self.sessions[s].to_att) {
                let learns = !power || self.rng_half();
                self.reset(s, learns, false);
            }
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
        if power && n < self.copies {
            self.gapped[n] = self.is_in_sync(n);
            self.weigh_power();
        }
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
                match &message {
                    Message::PromiseAck(disk) if !disk.probe => {
                        self.nodes[n].fenced = true;
                        let disk = self.nodes[n].disk.as_ref().unwrap();
                        assert_eq!(
                            disk.writes_running(),
                            0,
                            "S7: promised with writes under way"
                        );
                    }
                    Message::AttachAck { .. } => self.nodes[n].fenced = false,
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
                self.sessions[s].to_copy = false;
                let wait = self.rng.below(2) * MS;
                self.after(wait, Ev::CopyClosed(s));
                let at = self.sessions[s].last_to_att.max(self.now);
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
        let node = &mut self.nodes[n];
        if let DiskOp::Write { span, .. } | DiskOp::Zero { span, .. } = &op {
            assert!(
                !node.fenced,
                "S7: a write after the promise, before an attach"
            );
            let disk = node.disk.as_ref().unwrap();
            assert!(
                self.copies == 1 || span.regions().all(|r| disk.log.contains(&r)),
                "S15: {span:?} is written before its region is in the log"
            );
        }
        let replica = node.replica.as_ref().unwrap();
        let disk = node.disk.as_mut().unwrap();
        disk.start(ticket, op, fate, |slot| replica.map(slot));
        let process = node.process;
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
