//! The world: one queue of events and one clock that move the nodes, the network and the registry.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};

use lockstep::replication::attachment::{CasOutcome, Revision};
use lockstep::replication::failure_mode::FailureMode;
use lockstep::replication::ids::{CopyId, Nanos, NodeName, Seq};
use lockstep::replication::message::{Message, Status};
use lockstep::replication::record::Record;
use lockstep::replication::replica::{DiskResult, Replica, SessionId, Ticket};
use lockstep::replication::timing::Timing;

use super::attachments::{Att, brief};
use super::control::Made;
use super::disk::{Forgot, Stamps};
use super::faults::Weather;
use super::network::{Partitions, Session};
use super::nodes::Node;
use super::oracle::{Moment, Oracle};
use super::registry::Registry;
use super::rng::Rng;
use super::scrub::Scrubs;
use super::seen::Seen;

pub const MS: u64 = 1_000_000;
pub const TICK: u64 = 50 * MS;
/// Trace lines kept for a failure.
const TRACE: usize = 400;

/// What is to happen.
pub enum Ev {
    Tick(usize, u64),
    /// By session and number.
    ToCopy(usize, u64, Message, Option<Stamps>),
    ToAtt(usize, u64, Message, Option<Stamps>),
    CopyClosed(usize),
    AttClosed(usize, &'static str),
    /// The attachment, the link, the attempt, and whom it was to.
    Dialed(usize, usize, u64, CopyId, usize),
    /// With the process and the copy it is of.
    DiskEffect(usize, (u64, u64), Ticket),
    DiskDone(usize, (u64, u64), Ticket),
    Cas(usize, Revision, Box<Record>),
    LateCas(Revision, Box<Record>),
    CasAnswer(usize, Box<CasOutcome>),
    Read(usize),
    ReadAnswer(usize, Option<Box<(Record, Revision)>>),
    Watch(usize, Box<(Record, Revision)>),
    Guest(usize),
    Fault,
    Operator,
    Scrub,
    Policy,
    Control,
    Start(usize),
    Elsewhere(usize),
    Attach(usize, u64, Box<(Record, Revision)>),
}

pub struct Queued {
    at: u64,
    order: u64,
    ev: Ev,
}

impl PartialEq for Queued {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Queued {}
impl PartialOrd for Queued {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Queued {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

pub struct World {
    pub rng: Rng,
    pub now: u64,
    pub moment: Moment,
    pub order: u64,
    pub queue: BinaryHeap<Reverse<Queued>>,
    pub nodes: Vec<Node>,
    pub atts: Vec<Att>,
    pub sessions: Vec<Session>,
    pub partitions: Partitions,
    /// Identities for which files were made.
    pub made: Made,
    /// How each copy is being brought up to date, and how often that broke off.
    pub syncs: HashMap<NodeName, (bool, u64)>,
    pub scrubs: Scrubs,
    pub slow_net_until: u64,
    /// Only this node's links are slow.
    pub slow_node: Option<usize>,
    pub registry: Registry,
    pub registry_down_until: u64,
    pub isolated: (usize, u64),
    /// When every in-sync copy had lost power last.
    pub all_cut: Moment,
    pub oracle: Oracle,
    pub timing: Timing,
    pub weather: Weather,
    pub faults: bool,
    pub calm_since: u64,
    pub guest_stopped: bool,
    pub verifying: bool,
    pub budget: u64,
    pub next_id: u64,
    pub fua: bool,
    pub hot: Vec<usize>,
    pub trace: VecDeque<String>,
    pub verbose: bool,
    /// A read whose answer came in this step.
    pub answered: Option<(usize, u64)>,
    pub seen: Seen,
}

impl World {
    pub fn say(&mut self, text: impl FnOnce(&Self) -> String) {
        let line = format!(
            "{:>10} us #{} {}",
            self.now / 1_000,
            self.moment,
            text(self)
        );
        if self.verbose {
            eprintln!("{line}");
        }
        if self.trace.len() == TRACE {
            self.trace.pop_front();
        }
        self.trace.push_back(line);
    }

    pub fn at(&mut self, at: u64, ev: Ev) {
        self.order += 1;
        let order = self.order;
        self.queue.push(Reverse(Queued { at, order, ev }));
    }

    pub fn after(&mut self, span: u64, ev: Ev) {
        self.at(self.now + span, ev);
    }

    // ---- running

    /// The whole run: rough weather, then calm; then everything that was asked must end, and the copies must agree.
    pub fn run(&mut self) {
        let rough = self.now + self.rng.between(6_000, 30_000) * MS;
        self.run_until(rough);
        if self.rng.one_in(6) && self.last_stand() {
            return self.finish();
        }
        self.calm();
        self.catch_up();
        let patience = self.now + 150_000 * MS;
        while self.now < patience && !self.settled() {
            let next = self.now + 500 * MS;
            self.run_until(next);
        }
        if self.is_dead() {
            self.seen.count("dead volume");
            for a in self.atts.iter().filter(|a| !a.over) {
                let open: Vec<_> = a.asked.values().map(|q| q.op).collect();
                assert!(
                    open.is_empty(),
                    "S19: no answer to {open:?} from a dead volume"
                );
            }
            return self.finish();
        }
        assert!(
            self.settled(),
            "liveness: faults stopped 150 s ago; record {:?}; attachment {:?}; asked {:?}",
            self.registry.record,
            self.atts
                .last()
                .map(|a| (a.machine.status(), a.machine.why_not_serving())),
            self.atts.last().map(|a| a
                .asked
                .iter()
                .map(|(id, q)| (*id, q.op))
                .collect::<Vec<_>>())
        );
        self.verify();
        self.scrub_at_the_end();
        self.leave();
        self.finish();
    }

    pub fn finish(&mut self) {
        self.seen
            .times("sector decided by a read", self.oracle.collapses);
        for disk in self.nodes.iter().filter_map(|n| n.disk.as_ref()) {
            self.seen.times("sector repaired", disk.repaired);
            self.seen.times("chunk given back", disk.given_back);
            self.seen
                .times("unreadable log written anew", disk.written_anew);
        }
    }

    pub fn run_until(&mut self, end: u64) {
        while let Some(Reverse(next)) = self.queue.peek() {
            if next.at > end {
                break;
            }
            let Reverse(next) = self.queue.pop().unwrap();
            self.now = next.at;
            self.moment += 1;
            self.step(next.ev);
        }
        self.now = end;
    }

    // ---- events

    /// The node whose process must run for this, if any.
    pub fn home(&self, ev: &Ev) -> Option<usize> {
        match ev {
            Ev::Tick(n, _) | Ev::DiskDone(n, ..) => Some(*n),
            Ev::ToCopy(s, ..) | Ev::CopyClosed(s) => Some(self.sessions[*s].node),
            Ev::ToAtt(s, ..) | Ev::AttClosed(s, _) => Some(self.atts[self.sessions[*s].att].node),
            Ev::Dialed(a, ..)
            | Ev::CasAnswer(a, _)
            | Ev::ReadAnswer(a, _)
            | Ev::Watch(a, _)
            | Ev::Guest(a) => Some(self.atts[*a].node),
            _ => None,
        }
    }

    pub fn step(&mut self, ev: Ev) {
        let home = self.home(&ev);
        let now = home.map_or(Nanos(0), |n| self.clock(n));
        if let Some(n) = home
            && self.nodes[n].paused_until > self.now
        {
            let until = self.nodes[n].paused_until;
            return self.at(until, ev);
        }
        match ev {
            Ev::Tick(n, process) => {
                if self.nodes[n].process != process || !self.nodes[n].up {
                    return;
                }
                for a in 0..self.atts.len() {
                    if self.atts[a].node == n && !self.atts[a].over {
                        self.atts[a].machine.on_tick(now);
                    }
                }
                let node = &mut self.nodes[n];
                if let Some(replica) = &mut node.replica
                    && self.now >= node.looked + 1_000 * MS
                {
                    node.looked = self.now;
                    replica.on_tick(now);
                }
                self.after(TICK, Ev::Tick(n, process));
            }
            Ev::ToCopy(s, number, message, data) => {
                if !self.sessions[s].to_copy.arrive(number) {
                    return;
                }
                if let Some(replica) = &mut self.nodes[self.sessions[s].node].replica {
                    replica.on_message(now, SessionId(s as u64), message, data);
                }
            }
            Ev::ToAtt(s, number, message, data) => {
                let (a, link) = (self.sessions[s].att, self.sessions[s].link);
                if !self.sessions[s].to_att.arrive(number) || self.atts[a].over {
                    return;
                }
                self.note_message(a, &message);
                self.atts[a].machine.on_message(now, link, message, data);
            }
            Ev::CopyClosed(s) => {
                self.sessions[s].to_copy.open = false;
                if let Some(replica) = &mut self.nodes[self.sessions[s].node].replica {
                    replica.on_close(now, SessionId(s as u64));
                }
            }
            Ev::AttClosed(s, why) => {
                let (a, link) = (self.sessions[s].att, self.sessions[s].link);
                self.sessions[s].to_att.open = false;
                if self.atts[a].links[link] == Some(s) {
                    self.atts[a].links[link] = None;
                    if !self.atts[a].over {
                        self.atts[a].machine.on_disconnected(now, link, why);
                    }
                }
            }
            Ev::Dialed(a, link, dial, copy_id, node) => {
                self.dialed(a, link, dial, copy_id, node);
            }
            Ev::DiskEffect(n, process, ticket) => {
                if (self.nodes[n].process, self.nodes[n].copy) == process
                    && let Some(disk) = &mut self.nodes[n].disk
                {
                    disk.take_effect(ticket);
                }
                return;
            }
            Ev::DiskDone(n, process, ticket) => {
                let node = &mut self.nodes[n];
                if (node.process, node.copy) != process || !node.up {
                    return;
                }
                let disk = node.disk.as_mut().unwrap();
                let before = disk.left_log;
                let Some(result) = disk.end(ticket) else {
                    return;
                };
                let left = disk.left_log - before;
                let forgot = disk.forgot.take();
                self.note_left_log(left);
                match forgot {
                    Some(Forgot::Regions) => self.check_differences(n, "S11"),
                    Some(Forgot::Bits) => self.check_differences(n, "S12"),
                    None => {}
                }
                if matches!(result, DiskResult::NoSpace | DiskResult::Error) {
                    self.weigh_power();
                    self.say(|_| format!("copy {n}: disk answers {result:?} to {ticket}"));
                }
                let replica = self.nodes[n].replica.as_mut().unwrap();
                replica.on_disk(now, ticket, result);
            }
            Ev::Cas(a, expected, record) => return self.cas(a, expected, &record),
            Ev::LateCas(expected, record) => {
                if self.swap(expected, &record) {
                    self.seen.count("late swap that happened");
                }
                return;
            }
            Ev::CasAnswer(a, outcome) => {
                if self.atts[a].over {
                    return;
                }
                self.say(|_| format!("att {a}: CAS answered {}", brief(&outcome)));
                self.atts[a].machine.on_cas(now, *outcome);
            }
            Ev::Read(a) => {
                let answer = if self.registry_gone(a) {
                    None
                } else {
                    let r = &self.registry;
                    Some(Box::new((r.record.clone(), r.revision)))
                };
                let delay = self.registry_delay();
                return self.after(delay, Ev::ReadAnswer(a, answer));
            }
            Ev::ReadAnswer(a, answer) => {
                if self.atts[a].over {
                    return;
                }
                match answer {
                    Some(found) => self.atts[a].machine.on_record(now, Some(*found)),
                    None => self.atts[a].machine.on_record_unavailable(now),
                }
            }
            Ev::Watch(a, found) => {
                if self.atts[a].over {
                    return;
                }
                self.atts[a].machine.on_record(now, Some(*found));
            }
            Ev::Guest(a) => self.guest(a),
            Ev::Fault => return self.fault(),
            Ev::Operator => return self.operator(),
            Ev::Scrub => return self.scrub_now_and_then(),
            Ev::Control => return self.control(),
            Ev::Policy => {
                let mut next = self.registry.record.clone();
                next.suspend_deadline_ms = self.rng.pick(&[0, 1_000, 30_000]);
                next.failure_mode = self.rng.pick(&[
                    FailureMode::Hard,
                    FailureMode::Soft(None),
                    FailureMode::AlwaysOn,
                ]);
                let revision = self.registry.revision;
                self.swap(revision, &next);
                return;
            }
            Ev::Start(n) => return self.start_node(n),
            Ev::Elsewhere(n) => {
                if self.faults {
                    self.ask_attach(n);
                }
                return;
            }
            Ev::Attach(n, process, found) => {
                if self.nodes[n].process != process || !self.nodes[n].up {
                    return;
                }
                return self.attach(n, *found);
            }
        }
        if let Some(n) = home {
            self.pump(n);
        }
        self.note_held_back();
        for att in self.atts.iter_mut().filter(|a| a.full.is_some()) {
            if !att.asked.values().any(|q| q.full) {
                att.full = None;
            }
        }
    }

    /// Carries out what the machines of a node decide, as a worker's turn does.
    pub fn pump(&mut self, n: usize) {
        let mut acks: BTreeMap<u64, Vec<(Seq, Status)>> = BTreeMap::new();
        loop {
            let mut any = false;
            for a in 0..self.atts.len() {
                while self.atts[a].node == n
                    && !self.atts[a].over
                    && let Some(action) = self.atts[a].machine.poll()
                {
                    any = true;
                    self.act(a, action);
                }
            }
            while let Some(action) = self.nodes[n].replica.as_mut().and_then(Replica::poll) {
                any = true;
                self.copy_acts(n, action, &mut acks);
            }
            if any {
                continue;
            }
            let Some(replica) = &mut self.nodes[n].replica else {
                break;
            };
            replica.end_turn();
            match replica.poll() {
                Some(action) => self.copy_acts(n, action, &mut acks),
                None => break,
            }
        }
        for (session, acks) in acks {
            self.flush_acks(n, session, acks);
        }
    }
}
