//! The world: nodes, their copies and attachments, the network and the registry, moved by one queue of events.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::rc::Rc;

use lockstep::replication::attachment::{
    Action, Attachment, CasOutcome, Op, Outcome, Phase, RequestId, Revision,
};
use lockstep::replication::copy_state::{BITMAPS_MAX, CopyState, Standing};
use lockstep::replication::failure_mode::FailureMode;
use lockstep::replication::ids::{
    BootId, CHUNK, CopyId, Epoch, Instance, Nanos, NodeName, REGION, SECTOR, Seq, Span, Tag,
    VolumeId,
};
use lockstep::replication::message::{Message, Proof, Status};
use lockstep::replication::record::{self, Base, CopyEntry, CopyStatus, Record, State};
use lockstep::replication::replica::{
    Action as CopyAction, DiskOp, DiskResult, Replica, SessionId, Ticket,
};
use lockstep::replication::timing::Timing;

use super::disk::{Disk, Fate, Stamps, sectors};
use super::net::{Partitions, Session};
use super::oracle::{Moment, Oracle};
use super::registry::Registry;
use super::rng::Rng;

pub const MS: u64 = 1_000_000;
const TICK: u64 = 50 * MS;
/// Trace lines kept for a failure.
const TRACE: usize = 400;

/// What is to happen.
enum Ev {
    Tick(usize, u64),
    ToCopy(usize, Message, Option<Stamps>),
    ToAtt(usize, Message, Option<Stamps>),
    CopyClosed(usize),
    AttClosed(usize, &'static str),
    Dialed(usize, usize, u64),
    DiskEffect(usize, u64, Ticket),
    DiskDone(usize, u64, Ticket),
    Cas(usize, Revision, Box<Record>),
    LateCas(Revision, Box<Record>),
    CasAnswer(usize, Box<CasOutcome>),
    Read(usize),
    ReadAnswer(usize, Option<Box<(Record, Revision)>>),
    Watch(usize, Box<(Record, Revision)>),
    Guest(usize),
    Fault,
    Operator,
    Policy,
    Start(usize),
    Elsewhere(usize),
    Attach(usize, u64, Box<(Record, Revision)>),
}

struct Queued {
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

pub struct Node {
    name: NodeName,
    up: bool,
    paused_until: u64,
    boot: BootId,
    instance: Instance,
    /// Counts processes: events for an earlier one are void.
    process: u64,
    pub replica: Option<Replica<Stamps>>,
    pub disk: Option<Disk>,
    /// The copy promised and no attachment has bound it since: nothing may be written (S7).
    fenced: bool,
    /// When it last lost power.
    cut: Moment,
    looked: u64,
}

struct Asked {
    op: Op,
    start: Moment,
}

pub struct Att {
    node: usize,
    machine: Attachment<Stamps>,
    links: Vec<Option<usize>>,
    dials: Vec<u64>,
    asked: BTreeMap<u64, Asked>,
    served: bool,
    serving_seen: bool,
    pub over: bool,
    leaving: bool,
}

/// How rough this run is.
struct Weather {
    /// One fault each so many ms on average.
    every_ms: u64,
    kinds: Vec<Fault>,
    disk_faults: bool,
    /// Also the last in-sync copy's disk may die: then every request must still end.
    last_disk: bool,
    slow_disk: u64,
    ambiguous: u64,
    registry_down: u64,
    writeback: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
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

const FAULTS: [Fault; 13] = [
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

/// What a suite of runs must have seen somewhere (PROTOCOL 9, non-vacuity).
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub completed: u64,
    pub failed: u64,
    pub promotions: u64,
    pub ejections: u64,
    pub attaches: u64,
    pub ambiguous: u64,
    pub reconciled_differing: u64,
    pub power_losses: u64,
    pub connections: u64,
    pub detaches: u64,
    pub dead: u64,
    pub collapses: u64,
}

impl Seen {
    pub fn add(&mut self, o: &Self) {
        self.completed += o.completed;
        self.failed += o.failed;
        self.promotions += o.promotions;
        self.ejections += o.ejections;
        self.attaches += o.attaches;
        self.ambiguous += o.ambiguous;
        self.reconciled_differing += o.reconciled_differing;
        self.power_losses += o.power_losses;
        self.connections += o.connections;
        self.detaches += o.detaches;
        self.dead += o.dead;
        self.collapses += o.collapses;
    }
}

pub struct World {
    rng: Rng,
    now: u64,
    moment: Moment,
    order: u64,
    queue: BinaryHeap<Reverse<Queued>>,
    pub nodes: Vec<Node>,
    copies: usize,
    pub atts: Vec<Att>,
    sessions: Vec<Session>,
    partitions: Partitions,
    slow_net_until: u64,
    registry: Registry,
    registry_down_until: u64,
    isolated: (usize, u64),
    oracle: Oracle,
    weather: Weather,
    faults: bool,
    calm_since: u64,
    guest_stopped: bool,
    verifying: bool,
    disk_errors: bool,
    budget: u64,
    next_id: u64,
    gapped: Vec<bool>,
    fua: bool,
    hot: Vec<usize>,
    pub trace: VecDeque<String>,
    verbose: bool,
    pub seen: Seen,
}

impl World {
    pub fn new(seed: u64, verbose: bool) -> Self {
        let mut rng = Rng(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5bd1_e995);
        let copies = rng.pick(&[1, 2, 2, 2, 3, 3, 3, 4]) as usize;
        let remote = rng.one_in(3);
        let count = copies + usize::from(remote || copies == 1 && rng.one_in(2));
        let size = rng.pick(&[
            8 * CHUNK,
            8 * CHUNK,
            REGION + 4 * CHUNK,
            2 * REGION + SECTOR * 24,
        ]);
        let wanted = (copies - 1) as u8;
        let mode = rng.pick(&[
            FailureMode::Hard,
            FailureMode::Soft(None),
            FailureMode::Soft(Some(1)),
            FailureMode::AlwaysOn,
            FailureMode::AlwaysOn,
        ]);
        let volume_id = VolumeId(rng.id());
        let (epoch, tag) = (Epoch(1), Tag(rng.next()));
        let mut nodes = Vec::new();
        let mut entries = Vec::new();
        for n in 0..count {
            let name = NodeName(format!("n{n}"));
            let copy_id = CopyId(rng.id());
            let disk = (n < copies).then(|| {
                entries.push(CopyEntry {
                    copy_id,
                    node: name.clone(),
                    status: CopyStatus::InSync,
                    base: Base {
                        since: epoch,
                        last: None,
                    },
                    boot_id: None,
                    leaving: false,
                });
                Disk::new(CopyState {
                    volume_id,
                    copy_id,
                    size,
                    epoch,
                    tag,
                    promised: epoch,
                    standing: Standing::InSync,
                    clean: true,
                    bitmaps: [None; BITMAPS_MAX],
                })
            });
            nodes.push(Node {
                name,
                up: false,
                paused_until: 0,
                boot: BootId(rng.id()),
                instance: Instance(rng.id()),
                process: 0,
                replica: None,
                disk,
                fenced: false,
                cut: 0,
                looked: 0,
            });
        }
        let record = Record {
            volume_id,
            size,
            block_size: 512,
            replicas_wanted: wanted,
            failure_mode: mode,
            suspend_deadline_ms: rng.pick(&[0, 1_000, 30_000, 30_000]),
            compress: true,
            epoch,
            epoch_tag: tag,
            state: State::Clean,
            attachment: None,
            master: entries[rng.below(copies as u64) as usize].copy_id,
            preferred: None,
            copies: entries,
            lineage: vec![(epoch, tag)],
        };
        let mut kinds: Vec<Fault> = FAULTS.into_iter().filter(|_| rng.one_in(2)).collect();
        if kinds.is_empty() {
            kinds.push(Fault::Reset);
        }
        if rng.one_in(4) {
            kinds = vec![Fault::Isolate, Fault::Isolate, Fault::Reset, Fault::Pause];
        }
        let weather = Weather {
            every_ms: rng.pick(&[300, 800, 2_000, 5_000]),
            kinds,
            disk_faults: rng.one_in(4),
            last_disk: rng.one_in(4),
            slow_disk: rng.pick(&[0, 0, 50, 400]),
            ambiguous: rng.pick(&[0, 3, 10]),
            registry_down: rng.pick(&[0, 0, 5]),
            writeback: !rng.one_in(6),
        };
        let all = (size / SECTOR) as usize;
        let hot = (0..6)
            .map(|_| match rng.below(3) {
                0 => all - 16,
                1 => (rng.below(size / CHUNK) * CHUNK / SECTOR) as usize,
                _ => rng.below(all as u64 - 16) as usize,
            })
            .map(|s| s.saturating_sub(4).min(all - 16))
            .collect();
        let mut world = Self {
            now: MS,
            moment: 1,
            order: 0,
            queue: BinaryHeap::new(),
            nodes,
            copies,
            atts: Vec::new(),
            sessions: Vec::new(),
            partitions: Partitions::default(),
            slow_net_until: 0,
            registry: Registry::new(record),
            registry_down_until: 0,
            isolated: (0, 0),
            oracle: Oracle::default(),
            budget: rng.between(100, 800),
            fua: !weather.writeback,
            weather,
            faults: true,
            calm_since: 0,
            guest_stopped: false,
            verifying: false,
            disk_errors: false,
            next_id: 1,
            gapped: vec![false; copies],
            hot,
            trace: VecDeque::new(),
            verbose,
            seen: Seen::default(),
            rng,
        };
        world.say(|w| {
            format!(
                "{} copies on {} nodes, {} bytes, {:?}, faults {:?} every {} ms",
                w.copies,
                w.nodes.len(),
                w.registry.record.size,
                w.registry.record.failure_mode,
                w.weather.kinds,
                w.weather.every_ms
            )
        });
        for n in 0..count {
            world.start_node(n);
        }
        world.after(0, Ev::Operator);
        world.after(2_000 * MS, Ev::Fault);
        world
    }

    fn say(&mut self, text: impl FnOnce(&Self) -> String) {
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

    fn at(&mut self, at: u64, ev: Ev) {
        self.order += 1;
        let order = self.order;
        self.queue.push(Reverse(Queued { at, order, ev }));
    }

    fn after(&mut self, span: u64, ev: Ev) {
        self.at(self.now + span, ev);
    }

    // ---- running

    /// The whole run: rough weather, then calm; then everything that was asked must end, and the copies must agree.
    pub fn run(&mut self) {
        let rough = self.now + self.rng.between(6_000, 30_000) * MS;
        self.run_until(rough);
        self.calm();
        let patience = self.now + 150_000 * MS;
        while self.now < patience && !self.settled() {
            let next = self.now + 500 * MS;
            self.run_until(next);
        }
        if self.is_dead() {
            self.seen.dead += 1;
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
        self.leave();
        self.finish();
    }

    fn finish(&mut self) {
        self.seen.promotions = self.registry.promotions;
        self.seen.ejections = self.registry.ejections;
        self.seen.collapses = self.oracle.collapses;
    }

    fn run_until(&mut self, end: u64) {
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

    /// Faults stop: everything that can be mended is.
    fn calm(&mut self) {
        self.say(|_| "---- calm".into());
        self.faults = false;
        self.calm_since = self.now;
        self.guest_stopped = true;
        self.partitions.heal();
        self.registry_down_until = 0;
        self.isolated.1 = 0;
        self.slow_net_until = 0;
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

    /// Every in-sync copy's disk has failed for good: what the fault atlas could not exclude.
    fn is_dead(&self) -> bool {
        (0..self.copies)
            .filter(|c| self.is_in_sync(*c))
            .all(|c| self.nodes[c].disk.as_ref().is_some_and(|d| d.failed))
    }

    fn is_in_sync(&self, copy: usize) -> bool {
        self.registry.record.copies[copy].status == CopyStatus::InSync
    }

    fn live(&self) -> Option<usize> {
        let alive = |i: &usize| !self.atts[*i].over;
        (0..self.atts.len()).rev().find(alive)
    }

    fn settled(&self) -> bool {
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
            && a.asked.is_empty()
            && a.machine.is_idle()
            && (!serves || a.machine.why_not_serving().is_none())
            && a.machine.record().epoch == r.epoch
    }

    /// The guest reads back everything it ever touched; then the copies are compared (S14).
    fn verify(&mut self) {
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
            let node = self.atts[i].node;
            self.pump(node);
            let patience = self.now + 60_000 * MS;
            while self.now < patience && !self.settled() {
                let next = self.now + 500 * MS;
                self.run_until(next);
            }
            assert!(self.settled(), "liveness: the last reads did not end");
        }
        self.compare();
    }

    fn compare(&mut self) {
        let in_sync: Vec<usize> = (0..self.copies).filter(|c| self.is_in_sync(*c)).collect();
        let cache = |n: usize| &self.nodes[n].disk.as_ref().unwrap().cache;
        for &c in &in_sync[1..] {
            let differ = (0..cache(c).len()).find(|s| cache(c)[*s] != cache(in_sync[0])[*s]);
            assert!(
                differ.is_none(),
                "S14: copies {} and {c} differ in sector {differ:?}",
                in_sync[0]
            );
        }
    }

    /// A clean detach at the end: logs empty, copies clean and durable.
    fn leave(&mut self) {
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
        let now = Nanos(self.now);
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

    fn left(&mut self) {
        self.seen.detaches += 1;
        for c in (0..self.copies).filter(|c| self.is_in_sync(*c)) {
            let node = &self.nodes[c];
            let disk = node.disk.as_ref().unwrap();
            if node.cut + 1_000_000 > self.moment && node.cut > 0 && disk.cache != disk.durable {
                continue;
            }
            assert!(
                disk.superblock.clean && disk.log.is_empty(),
                "5: left cleanly, but copy {c} has regions {:?} (clean: {})",
                disk.log,
                disk.superblock.clean
            );
            assert!(
                disk.cache == disk.durable,
                "S5: left cleanly, but copy {c} is not flushed"
            );
        }
    }

    // ---- events

    /// The node whose process must run for this, if any.
    fn home(&self, ev: &Ev) -> Option<usize> {
        match ev {
            Ev::Tick(n, _) | Ev::DiskDone(n, ..) => Some(*n),
            Ev::ToCopy(s, ..) | Ev::CopyClosed(s) => Some(self.sessions[*s].copy),
            Ev::ToAtt(s, ..) | Ev::AttClosed(s, _) => Some(self.atts[self.sessions[*s].att].node),
            Ev::Dialed(a, ..)
            | Ev::CasAnswer(a, _)
            | Ev::ReadAnswer(a, _)
            | Ev::Watch(a, _)
            | Ev::Guest(a) => Some(self.atts[*a].node),
            _ => None,
        }
    }

    fn step(&mut self, ev: Ev) {
        let now = Nanos(self.now);
        let home = self.home(&ev);
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
            Ev::ToCopy(s, message, data) => {
                let copy = self.sessions[s].copy;
                if !self.sessions[s].to_copy {
                    return;
                }
                if let Some(replica) = &mut self.nodes[copy].replica {
                    replica.on_message(now, SessionId(s as u64), message, data);
                }
            }
            Ev::ToAtt(s, message, data) => {
                let (a, copy) = (self.sessions[s].att, self.sessions[s].copy);
                if !self.sessions[s].to_att || self.atts[a].over {
                    return;
                }
                self.atts[a].machine.on_message(now, copy, message, data);
            }
            Ev::CopyClosed(s) => {
                self.sessions[s].to_copy = false;
                let copy = self.sessions[s].copy;
                if let Some(replica) = &mut self.nodes[copy].replica {
                    replica.on_close(now, SessionId(s as u64));
                }
            }
            Ev::AttClosed(s, why) => {
                let (a, copy) = (self.sessions[s].att, self.sessions[s].copy);
                self.sessions[s].to_att = false;
                if self.atts[a].links[copy] == Some(s) {
                    self.atts[a].links[copy] = None;
                    if !self.atts[a].over {
                        self.atts[a].machine.on_disconnected(now, copy, why);
                    }
                }
            }
            Ev::Dialed(a, copy, dial) => self.dialed(a, copy, dial),
            Ev::DiskEffect(n, process, ticket) => {
                if self.nodes[n].process == process
                    && let Some(disk) = &mut self.nodes[n].disk
                {
                    disk.take_effect(ticket);
                }
                return;
            }
            Ev::DiskDone(n, process, ticket) => {
                let node = &mut self.nodes[n];
                if node.process != process || !node.up {
                    return;
                }
                let Some(result) = node.disk.as_mut().unwrap().end(ticket) else {
                    return;
                };
                if !matches!(result, DiskResult::Done(_)) {
                    self.disk_errors = true;
                    self.say(|_| format!("copy {n}: disk answers {result:?} to {ticket}"));
                }
                let replica = self.nodes[n].replica.as_mut().unwrap();
                replica.on_disk(now, ticket, result);
            }
            Ev::Cas(a, expected, record) => return self.cas(a, expected, &record),
            Ev::LateCas(expected, record) => {
                self.swap(expected, &record);
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
    }

    /// Carries out what the machines of a node decide, as a worker's turn does.
    fn pump(&mut self, n: usize) {
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

    fn flush_acks(&mut self, n: usize, session: u64, acks: Vec<(Seq, Status)>) {
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

    // ---- the network

    fn delay(&mut self, a: usize, b: usize) -> u64 {
        if a == b {
            return 0;
        }
        let base = self.rng.between(50, 1_500) * 1_000;
        if self.faults && self.slow_net_until > self.now {
            return base + self.rng.below(800) * MS;
        }
        if self.faults && self.rng.one_in(300) {
            return base + self.rng.below(400) * MS;
        }
        base
    }

    fn tell_copy(&mut self, s: usize, message: Message, data: Option<Stamps>) {
        let (a, c) = (self.atts[self.sessions[s].att].node, self.sessions[s].copy);
        let at = (self.now + self.delay(a, c))
            .max(self.sessions[s].last_to_copy)
            .max(self.partitions.until(a, c, self.now));
        self.sessions[s].last_to_copy = at;
        self.at(at, Ev::ToCopy(s, message, data));
    }

    fn tell_att(&mut self, s: usize, message: Message, data: Option<Stamps>) {
        let (a, c) = (self.atts[self.sessions[s].att].node, self.sessions[s].copy);
        let at = (self.now + self.delay(a, c))
            .max(self.sessions[s].last_to_att)
            .max(self.partitions.until(a, c, self.now));
        self.sessions[s].last_to_att = at;
        self.at(at, Ev::ToAtt(s, message, data));
    }

    /// Breaks a connection; each end learns of it in its own time.
    fn reset(&mut self, s: usize, att_learns: bool, copy_learns: bool) {
        let (was_copy, was_att) = (self.sessions[s].to_copy, self.sessions[s].to_att);
        self.sessions[s].to_copy = false;
        self.sessions[s].to_att = false;
        if copy_learns && was_copy {
            let wait = self.rng.below(20) * MS;
            self.after(wait, Ev::CopyClosed(s));
        }
        if att_learns && was_att {
            let wait = self.rng.below(20) * MS;
            self.after(wait, Ev::AttClosed(s, "reset"));
        }
    }

    fn dialed(&mut self, a: usize, copy: usize, dial: u64) {
        let att = &self.atts[a];
        if att.over || att.dials[copy] != dial {
            return;
        }
        let (from, now) = (att.node, Nanos(self.now));
        let reachable = self.nodes[copy].up
            && self.nodes[copy].paused_until <= self.now
            && self.partitions.until(from, copy, self.now) == 0;
        if !reachable {
            return self.atts[a].machine.on_disconnected(now, copy, "no answer");
        }
        let s = self.sessions.len();
        self.sessions.push(Session {
            att: a,
            copy,
            to_copy: true,
            to_att: true,
            last_to_copy: self.now,
            last_to_att: self.now,
        });
        self.atts[a].links[copy] = Some(s);
        self.seen.connections += 1;
        let boot = self.nodes[copy].boot;
        self.say(|_| format!("att {a}: connected to copy {copy} by session {s}"));
        self.atts[a].machine.on_connected(now, copy, boot);
    }

    fn hangup(&mut self, a: usize, copy: usize) {
        self.atts[a].dials[copy] += 1;
        if let Some(s) = self.atts[a].links[copy].take() {
            self.sessions[s].to_att = false;
            // What was sent before the end may still arrive, or not.
            let (from, at) = (self.atts[a].node, self.sessions[s].last_to_copy);
            let at = if from == copy || self.rng.one_in(2) {
                self.now
            } else {
                at.max(self.now)
            };
            self.at(at, Ev::CopyClosed(s));
        }
    }

    // ---- an attachment's actions

    fn act(&mut self, a: usize, action: Action<Stamps>) {
        match action {
            Action::Send { to, message, data } => {
                for copy in to.iter() {
                    if let Some(s) = self.atts[a].links[copy] {
                        self.tell_copy(s, message.clone(), data.clone());
                    }
                }
            }
            Action::Complete { id, outcome, data } => self.complete(a, id, outcome, data),
            Action::Dial { copy, .. } => {
                self.atts[a].dials[copy] += 1;
                let dial = self.atts[a].dials[copy];
                let wait = if self.atts[a].node == copy {
                    0
                } else {
                    self.rng.between(1, 20) * MS
                };
                self.after(wait, Ev::Dialed(a, copy, dial));
            }
            Action::Hangup(copy) => self.hangup(a, copy),
            Action::Cas { expected, record } => {
                self.say(|_| {
                    let in_sync: Vec<_> = record.in_sync().map(|c| &c.node).collect();
                    format!(
                        "att {a}: CAS at {expected} to epoch {} {:?} {in_sync:?}",
                        record.epoch, record.state
                    )
                });
                let wait = self.registry_delay();
                self.after(wait, Ev::Cas(a, expected, record));
            }
            Action::ReadRecord => {
                let wait = self.registry_delay();
                self.after(wait, Ev::Read(a));
            }
            Action::Event { rule, text } => {
                if rule == "5.5 reconciled" && !text.contains(" 0 chunks") {
                    self.seen.reconciled_differing += 1;
                }
                if rule == "2.6 ambiguous CAS" {
                    self.seen.ambiguous += 1;
                }
                self.say(|_| format!("att {a}: [{rule}] {text}"));
            }
            Action::Ended => {
                let machine = &self.atts[a].machine;
                // Unless somebody attached since, and this one hears late that it has left.
                if *machine.phase() == Phase::Left
                    && machine.record().epoch == self.registry.record.epoch
                {
                    self.left();
                }
                self.end_att(a);
            }
        }
        if *self.atts[a].machine.phase() == Phase::Serving && !self.atts[a].serving_seen {
            self.atts[a].serving_seen = true;
            self.seen.attaches += 1;
            self.oracle.served_by(a, self.moment);
            self.say(|_| format!("att {a} serves"));
        }
    }

    /// The attachment is no more; what it has not answered it never will.
    fn end_att(&mut self, a: usize) {
        self.atts[a].over = true;
        for copy in 0..self.copies {
            self.hangup(a, copy);
        }
        if !self.atts[a].asked.is_empty() && *self.atts[a].machine.phase() == Phase::Left {
            panic!("S19: left with requests under way");
        }
        self.atts[a].asked.clear();
    }

    fn complete(&mut self, a: usize, id: RequestId, outcome: Outcome, data: Option<Stamps>) {
        let Some(asked) = self.atts[a].asked.remove(&id.0) else {
            panic!("S19: request {id:?} completed twice, or never asked");
        };
        let (now, by) = (self.moment, a);
        let open = self.atts.iter().flat_map(|a| a.asked.values());
        self.oracle.floor = open.map(|q| q.start).min().unwrap_or(now).min(asked.start);
        if outcome == Outcome::IoError {
            self.seen.failed += 1;
            let machine = &self.atts[a].machine;
            let suspended = machine.status().suspended_for.unwrap_or_default();
            let deadline = Nanos::from_ms(machine.record().suspend_deadline_ms);
            let excused = self.disk_errors
                || self.gapped.iter().any(|g| *g)
                || self.atts[a].leaving
                || suspended >= deadline && machine.status().suspended_for.is_some();
            if asked.op == Op::Flush {
                self.oracle.flush_failed(a);
            }
            assert!(excused, "S17: {:?} failed before the deadline", asked.op);
            self.say(|_| format!("att {a}: {} fails {:?}", id.0, asked.op));
            return;
        }
        self.seen.completed += 1;
        if self.verbose {
            self.say(|_| format!("att {a}: {} completes {:?}", id.0, asked.op));
        }
        assert!(
            self.atts[a].machine.mode_serves(),
            "S17: completed while the mode says suspend"
        );
        let newer_served = self.atts[a + 1..].iter().any(|o| o.served);
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
                self.check_applied(by, id.0, span, fua, asked.start);
                for s in sectors(span) {
                    self.oracle.complete(s, by, id.0, now, fua);
                }
                // Acknowledged, then the last copies lost power, and nobody could know when this was completed.
                let cut = |c: usize| !self.is_in_sync(c) || self.nodes[c].cut > asked.start;
                if (0..self.copies).all(cut) {
                    self.oracle.power_lost(now);
                }
            }
            Op::Flush => {
                let covered = self.oracle.covered(by, asked.start);
                for c in (0..self.copies).filter(|c| self.is_in_sync(*c)) {
                    let disk = self.nodes[c].disk.as_ref().unwrap();
                    for &(s, newest) in &covered {
                        assert!(
                            self.oracle.holds(s, disk.durable[s], by, newest),
                            "S5: flush completed, but copy {c} has {} durable in sector {s}, not {newest}",
                            disk.durable[s]
                        );
                    }
                }
                self.oracle.flushed(by, asked.start);
            }
        }
        self.atts[a].served = true;
    }

    /// S3, S4: every member of the in-sync set in the registry has it.
    fn check_applied(&mut self, by: usize, id: u64, span: Span, fua: bool, start: Moment) {
        for c in (0..self.copies).filter(|c| self.is_in_sync(*c)) {
            let node = &self.nodes[c];
            if node.cut > start {
                continue;
            }
            let disk = node.disk.as_ref().unwrap();
            for s in sectors(span) {
                assert!(
                    self.oracle.holds(s, disk.cache[s], by, id),
                    "S3: write {id} completed, but in-sync copy {c} has {} in sector {s}",
                    disk.cache[s]
                );
                assert!(
                    !fua || self.oracle.holds(s, disk.durable[s], by, id),
                    "S5: write-through {id} completed, but copy {c} has it not durable in sector {s}"
                );
            }
        }
    }

    // ---- a copy's actions

    fn copy_acts(
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

    fn disk_op(&mut self, n: usize, ticket: Ticket, op: DiskOp<Stamps>) {
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

    fn fate(&mut self, n: usize, op: &DiskOp<Stamps>) -> Fate {
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
    fn kill(&mut self, n: usize) -> Fate {
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

    // ---- the registry

    fn registry_gone(&self, a: usize) -> bool {
        let (alone, until) = self.isolated;
        self.registry_down_until > self.now || until > self.now && self.atts[a].node == alone
    }

    fn registry_delay(&mut self) -> u64 {
        if self.faults && self.rng.one_in(15) {
            self.rng.between(20, 1_500) * MS
        } else {
            self.rng.between(1, 10) * MS
        }
    }

    fn swap(&mut self, expected: Revision, next: &Record) -> bool {
        if !self.registry.swap(expected, next) {
            return false;
        }
        let r = &self.registry;
        let (revision, found) = (r.revision, (r.record.clone(), r.revision));
        self.say(|w| {
            let in_sync: Vec<_> = w.registry.record.in_sync().map(|c| &c.node).collect();
            format!(
                "registry: revision {revision}, epoch {}, in sync {in_sync:?}, {:?} {:?}",
                w.registry.record.epoch, w.registry.record.state, w.registry.record.failure_mode
            )
        });
        self.weigh_power();
        for a in 0..self.atts.len() {
            if !self.atts[a].over {
                let wait = self.registry_delay();
                self.after(wait, Ev::Watch(a, Box::new(found.clone())));
            }
        }
        true
    }

    fn cas(&mut self, a: usize, expected: Revision, record: &Record) {
        let delay = self.registry_delay();
        let outcome = if self.registry_gone(a)
            || self.faults && self.rng.one_in(self.weather.registry_down)
        {
            CasOutcome::Unavailable
        } else if self.faults && self.rng.one_in(self.weather.ambiguous) {
            match self.rng.below(3) {
                0 => drop(self.swap(expected, record)),
                1 => {
                    let late = self.rng.below(600) * MS;
                    self.after(late, Ev::LateCas(expected, Box::new(record.clone())));
                }
                _ => {}
            }
            CasOutcome::Ambiguous
        } else if self.swap(expected, record) {
            CasOutcome::Done(self.registry.revision)
        } else {
            let r = &self.registry;
            CasOutcome::Conflict(Some((r.record.clone(), r.revision)))
        };
        self.after(delay, Ev::CasAnswer(a, Box::new(outcome)));
    }

    /// Whether every in-sync copy lost power since it was last whole: then the guest may miss what no flush covered.
    fn weigh_power(&mut self) {
        let all = (0..self.copies)
            .filter(|c| self.is_in_sync(*c))
            .all(|c| self.gapped[c]);
        if all {
            self.oracle.power_lost(self.moment);
            self.seen.power_losses += 1;
            self.say(|_| "every in-sync copy lost power".into());
            for c in 0..self.copies {
                self.gapped[c] &= !self.is_in_sync(c);
            }
            self.disk_errors = true;
        }
    }

    // ---- nodes

    fn start_node(&mut self, n: usize) {
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
    fn crash(&mut self, n: usize, power: bool) {
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

    fn rng_half(&mut self) -> bool {
        self.rng.one_in(2)
    }

    fn fault(&mut self) {
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

    // ---- attaching

    /// Wants the volume attached somewhere, for ever.
    fn operator(&mut self) {
        self.after(400 * MS, Ev::Operator);
        if self.live().is_some() {
            return;
        }
        let before = self
            .registry
            .record
            .attachment
            .as_ref()
            .and_then(|a| self.nodes.iter().position(|n| n.name == a.node));
        let up: Vec<usize> = (0..self.nodes.len())
            .filter(|n| self.nodes[*n].up)
            .collect();
        if up.is_empty() {
            return;
        }
        let n = match before {
            Some(n) if self.nodes[n].up && !self.rng.one_in(4) => n,
            _ => self.rng.pick(&up),
        };
        self.ask_attach(n);
    }

    fn ask_attach(&mut self, n: usize) {
        let busy = self.atts.iter().any(|a| a.node == n && !a.over);
        let alive = self.atts.iter().filter(|a| !a.over).count();
        if busy || alive > 1 || !self.nodes[n].up || self.registry_down_until > self.now {
            return;
        }
        let found = (self.registry.record.clone(), self.registry.revision);
        let (wait, process) = (self.registry_delay(), self.nodes[n].process);
        self.after(wait, Ev::Attach(n, process, Box::new(found)));
    }

    fn attach(&mut self, n: usize, (record, revision): (Record, Revision)) {
        if self.atts.iter().any(|a| a.node == n && !a.over) {
            return;
        }
        let node = &self.nodes[n];
        let me = record::Attachment {
            node: node.name.clone(),
            boot_id: node.boot,
            instance: node.instance,
        };
        // One attachment a node, and the one before is over: its lock is free.
        let mine = record
            .attachment
            .as_ref()
            .is_some_and(|a| a.node == me.node);
        let proof = if mine {
            Proof::PredecessorDead
        } else {
            Proof::None
        };
        let a = self.atts.len();
        self.say(|_| format!("att {a} on node {n}, epoch {}, {proof:?}", record.epoch));
        let seed = self.rng.next();
        let machine = Attachment::new(
            me,
            record,
            revision,
            proof,
            Timing::DEFAULT,
            seed,
            Nanos(self.now),
        );
        self.atts.push(Att {
            node: n,
            machine,
            links: vec![None; self.copies],
            dials: vec![0; self.copies],
            asked: BTreeMap::new(),
            served: false,
            serving_seen: false,
            over: false,
            leaving: false,
        });
        self.pump(n);
        self.after(MS, Ev::Guest(a));
    }

    // ---- the guest

    fn guest(&mut self, a: usize) {
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
            let start = self.rng.pick(&self.hot.clone()) as u64 + self.rng.below(10);
            let all = self.registry.record.size / SECTOR;
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
                    let unmap = self.rng.one_in(2);
                    self.submit(a, Op::Zero { span, unmap, fua }, None);
                }
                11..=16 => self.submit(a, Op::Read(span), None),
                _ => self.submit(a, Op::Flush, None),
            }
        }
    }

    fn submit(&mut self, a: usize, op: Op, stamps: Option<u64>) {
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
        self.atts[a].asked.insert(id, Asked { op, start });
        self.atts[a]
            .machine
            .submit(Nanos(self.now), RequestId(id), op, data);
    }
}

fn brief(outcome: &CasOutcome) -> String {
    match outcome {
        CasOutcome::Conflict(Some((r, revision))) => {
            format!("conflict with revision {revision}, epoch {}", r.epoch)
        }
        other => format!("{other:?}"),
    }
}
