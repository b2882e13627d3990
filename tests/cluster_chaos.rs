//! Real processes, and all that can happen to them at random: killed, stopped, asked to end, cut off from each other, with a
//! registry that does not answer, while a stamped load runs and the volume moves from node to node. Nothing acknowledged is
//! lost, nothing fails that need not, and in the end all copies are the same.
//!
//! Each node has a network namespace of its own, so this needs root and the packages iproute2 and iptables.
//! `LOCKSTEP_CHAOS_SEED=s` runs one seed; `scripts/soak` many. `LOCKSTEP_CHAOS_KEEP=1` leaves the logs there when all is well.

mod cluster_support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use cluster_support::client::{Disk, Load, Plan};
use cluster_support::net::{Cut, How};
use cluster_support::oracle::Oracle;
use cluster_support::schedule::{Fault, Order, Schedule, Step};
use cluster_support::vm::Guest;
use cluster_support::{Cluster, clock, copies};
use rusqlite::Connection;
use serde_json::Value;

/// Whether a copy that was lost comes back by itself. As long as it does not, schedules are short and the volume may end
/// with fewer copies than it was made with.
const RESYNC: bool = true;
/// Steps of a schedule.
const STEPS: usize = if RESYNC { 10 } else { 6 };
/// The seeds of every run. Together they see everything there is to see; the last two with a volume that stands still without all of
/// its copies.
const SEEDS: [u64; 6] = [1, 2, 3, 4, 5, 11];
const GUEST_SEED: u64 = 1;
/// What a volume may take to be served again, or healthy again, once nothing is in the way. A schedule ends each fault
/// within seconds; this is for a machine that has other things to do as well.
const PATIENCE: Duration = Duration::from_secs(150);
const SIZE: u64 = 32 << 20;
/// A guest's file system has to hold what is written in its time.
const GUEST_SIZE: u64 = 512 << 20;
/// Longer than a schedule leaves the volume without the copies that its failure mode asks for, so no request may fail.
const DEADLINE: &str = "180s";

fn seed() -> Option<u64> {
    std::env::var("LOCKSTEP_CHAOS_SEED").ok()?.parse().ok()
}

#[test]
fn stamped_load_survives_whatever_happens_to_nodes() {
    let mut all = Seen::default();
    match seed() {
        Some(seed) => all.add(&under_load(seed)),
        // Two at a time: most of it is waiting.
        None => {
            for pair in SEEDS.chunks(2) {
                let run = |seed: &u64| {
                    let seed = *seed;
                    std::thread::spawn(move || under_load(seed))
                };
                for thread in pair.iter().map(run).collect::<Vec<_>>() {
                    match thread.join() {
                        Ok(seen) => all.add(&seen),
                        Err(panic) => std::panic::resume_unwind(panic),
                    }
                }
            }
        }
    }
    println!("{all}");
    if seed().is_none() {
        all.has_seen(&Seen::MUST);
    }
}

#[test]
fn a_guest_survives_whatever_happens_to_copies() {
    let seen = under_a_guest(seed().unwrap_or(GUEST_SEED));
    println!("{seen}");
    if seed().is_none() {
        seen.has_seen(&["kill", "stop", "cut", "ejection", "promotion"]);
    }
}

/// What happened, and how often.
#[derive(Default)]
struct Seen(BTreeMap<String, u64>);

impl Seen {
    const MUST: [&str; 24] = [
        "kill",
        "kill of the attachment",
        "stop",
        "stop of the attachment",
        "end",
        "end of the attachment",
        "cut",
        "cut one way",
        "cut by reset",
        "cut by loss",
        "packet lost",
        "registry stall",
        "move",
        "ejection",
        "promotion",
        "takeover",
        "request of a ghost",
        "a volume that is strict",
        "promote granted",
        "reconciliation",
        "suspension",
        "sync broken off",
        "sync of everything",
        "sync of what was missed",
    ];

    fn note(&mut self, what: &str, count: u64) {
        *self.0.entry(what.into()).or_default() += count;
    }

    fn add(&mut self, other: &Seen) {
        for (what, count) in &other.0 {
            self.note(what, *count);
        }
    }

    #[track_caller]
    fn has_seen(&self, what: &[&str]) {
        for kind in what {
            assert!(self.0.contains_key(*kind), "no {kind} was seen; {self}");
        }
        if RESYNC {
            assert!(self.0.contains_key("rejoin"), "no rejoin was seen; {self}");
        }
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let list: Vec<String> = self.0.iter().map(|(k, n)| format!("{k}: {n}")).collect();
        write!(out, "seen: {}", list.join(", "))
    }
}

/// The end of a fault.
enum Undo {
    Start(usize),
    /// The same on a new disk, if the record does not count on the copy that is on the old one.
    StartBlank(usize),
    /// SIGTERM was sent; a new process so long after the old one ended.
    StartAfterEnd(usize, Duration, Instant),
    Thaw(usize),
    Heal(Vec<Cut>),
    Registry(Connection),
}

/// A cluster with one volume under a schedule.
struct Chaos {
    /// What repeats it.
    repeat: String,
    kept: PathBuf,
    cluster: Cluster,
    /// The node that plays the schedule's node i + 1.
    cast: Vec<usize>,
    later: Vec<(Instant, Undo)>,
    /// Nodes whose process is being hit.
    down: BTreeSet<usize>,
    attached: usize,
    load: Option<Load>,
    /// Requests of `load` may fail: the volume is being taken from it.
    may_fail: bool,
    ghosts: Vec<cluster_support::client::Ghost>,
    seen: Seen,
}

/// Runs a schedule under load.
fn under_load(seed: u64) -> Seen {
    let schedule = Schedule::new(seed, STEPS);
    let repeat = format!("LOCKSTEP_CHAOS_SEED={seed} cargo test --test cluster_chaos stamped");
    let mut chaos = Chaos::start(&schedule, SIZE, seed, repeat);
    let socket = chaos.attach_first();
    chaos.load = Some(Load::begin(&socket, plan(seed, 0), Oracle::new(SIZE)));
    chaos.wait("the load runs", |c| c.progress(100));
    for (number, step) in schedule.steps.iter().enumerate() {
        chaos.step(step, seed, number);
    }
    chaos.end_of_faults();
    let before = chaos.load.as_ref().map_or(0, Load::done);
    chaos.wait("the load goes on", |c| c.progress(before + 200));
    let outcome = chaos.load.take().expect("there is a load").finish();
    assert_eq!(outcome.failed, 0);
    chaos.seen.note("request", outcome.done);
    chaos.vanish_ghosts();
    let mut oracle = outcome.oracle;
    chaos.detach_and_compare();
    // What the copies hold, also the others see.
    let next = chaos.cast[(seed as usize + 1) % chaos.cast.len()];
    let socket = chaos.attach(next);
    Disk::open(&socket, 1, 1).sweep(&mut oracle);
    chaos.detach_and_compare();
    chaos.finish()
}

/// Runs a schedule around a guest.
fn under_a_guest(seed: u64) -> Seen {
    let schedule = Schedule::around_a_guest(seed, 3 * STEPS);
    let repeat = format!("LOCKSTEP_CHAOS_SEED={seed} cargo test --test cluster_chaos guest");
    let mut chaos = Chaos::start(&schedule, GUEST_SIZE, seed, repeat);
    let socket = chaos.attach_first();
    let console = chaos.cluster.dir.path().join("console");
    let mut guest = Guest::boot(&socket, "demo", &["seconds=40"], &console);
    chaos.wait("the guest writes", |_| (guest.steps() >= 5).then_some(()));
    for (number, step) in schedule.steps.iter().enumerate() {
        if guest.is_content() {
            break;
        }
        chaos.step(step, seed, number);
    }
    chaos.end_of_faults();
    chaos.wait("the guest's verdict", |_| guest.is_content().then_some(()));
    chaos.wait("the guest is off", |_| guest.is_off().then_some(()));
    let steps = guest.steps() as u64;
    chaos.seen.note("step of the guest", steps);
    chaos.detach_and_compare();
    chaos.finish()
}

fn plan(seed: u64, number: usize) -> Plan {
    Plan::careless(seed << 16 | number as u64)
}

impl Chaos {
    fn start(schedule: &Schedule, size: u64, seed: u64, repeat: String) -> Chaos {
        // Most on files in memory, where more happens in a second; some on a disk, where flushes take their time.
        let parent = if seed.is_multiple_of(4) {
            "/tmp"
        } else {
            "/dev/shm"
        };
        let cluster = Cluster::start_on_a_network(Path::new(parent), schedule.nodes);
        let (replicas, size) = (schedule.replicas, size >> 20);
        // Served by whatever is left, or suspended until enough is back.
        let mode = ["alwayson", "soft", "alwayson", "soft", "alwayson", "hard"][seed as usize % 6];
        cluster.ok(
            1,
            &format!(
                "volume create vm1 --size {size}MiB --replicas {replicas} --failure-mode {mode} \
                 --suspend-deadline {DEADLINE}"
            ),
        );
        if let Some(wait) = schedule.replace_after {
            let wait = wait.as_millis();
            cluster.ok(1, &format!("cluster update --replace-after {wait}ms"));
        }
        let volume = cluster.volume(1, "vm1");
        let mut cast: Vec<usize> = copies(&volume, "in_sync")
            .iter()
            .map(|n| number(n))
            .collect();
        cast.sort_unstable();
        let spares: Vec<usize> = (1..=schedule.nodes).filter(|n| !cast.contains(n)).collect();
        cast.extend(spares);
        let attached = cast[schedule.first - 1];
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("chaos-{seed}-{}", std::process::id()));
        let mut chaos = Chaos {
            repeat,
            kept,
            cluster,
            cast,
            later: Vec::new(),
            down: BTreeSet::new(),
            attached,
            load: None,
            may_fail: false,
            ghosts: Vec::new(),
            seen: Seen::default(),
        };
        if mode == "hard" {
            chaos.seen.note("a volume that is strict", 1);
        }
        let cast = &chaos.cast;
        chaos.tell(&format!(
            "{replicas} replicas on {} nodes, copies on {:?}, {mode}",
            schedule.nodes,
            &cast[..=replicas]
        ));
        chaos
    }

    /// One line in the story, beside the nodes' logs.
    fn tell(&mut self, text: &str) {
        let line = format!("{} {text}", clock(SystemTime::now()));
        println!("{line}");
        let path = self.cluster.dir.path().join("story.log");
        let story = File::options().create(true).append(true).open(path);
        let _ = story.and_then(|mut file| writeln!(file, "{line}"));
    }

    // ---- time

    /// Does what is due, and sees that nothing is wrong.
    #[track_caller]
    fn pump(&mut self) {
        let now = Instant::now();
        while let Some(i) = self.later.iter().position(|(at, _)| *at <= now) {
            let (_, undo) = self.later.swap_remove(i);
            self.undo(undo);
        }
        for n in self.cast.clone() {
            let alive = self.down.contains(&n) || self.cluster.is_alive(n);
            assert!(alive, "n{n} ended by itself");
        }
        if let Some(load) = &self.load {
            load.still_runs();
            let failed = load.failed();
            assert!(self.may_fail || failed == 0, "{failed} requests failed");
        }
        for ghost in &self.ghosts {
            ghost.is_haunting();
        }
    }

    #[track_caller]
    fn wait<T>(&mut self, what: &str, mut check: impl FnMut(&mut Chaos) -> Option<T>) -> T {
        let begin = Instant::now();
        loop {
            self.pump();
            if let Some(value) = check(self) {
                return value;
            }
            if begin.elapsed() > PATIENCE {
                let seen = self.inspect(self.attached);
                panic!("gave up waiting until {what}; the volume: {seen:#?}");
            }
            std::thread::sleep(Duration::from_millis(40));
        }
    }

    fn pause(&mut self, span: Duration) {
        let until = Instant::now() + span;
        self.wait("a pause is over", |_| {
            (Instant::now() >= until).then_some(())
        });
    }

    fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Start(n) => {
                self.tell(&format!("n{n} starts again"));
                self.cluster.spawn_node(n);
                self.down.remove(&n);
            }
            Undo::StartBlank(n) => {
                if self.is_missing(n) {
                    self.tell(&format!("n{n} gets a new disk"));
                    self.seen.note("new disk", 1);
                    let data = self.cluster.data_dir(n);
                    fs::remove_dir_all(&data).unwrap_or_else(|e| panic!("{}: {e}", data.display()));
                }
                self.undo(Undo::Start(n));
            }
            Undo::StartAfterEnd(n, down, since) => match self.cluster.ended(n) {
                Some(status) => {
                    assert!(status.success(), "n{n}, asked to end, ended with {status}");
                    self.tell(&format!("n{n} has ended"));
                    self.after(down, Undo::Start(n));
                }
                None => {
                    let span = since.elapsed();
                    assert!(span < PATIENCE, "n{n} does not end when it is asked to");
                    let look = Duration::from_millis(30);
                    self.after(look, Undo::StartAfterEnd(n, down, since));
                }
            },
            Undo::Thaw(n) => {
                self.tell(&format!("n{n} goes on"));
                self.cluster.thaw(n);
                self.down.remove(&n);
            }
            Undo::Heal(cuts) => {
                let network = self.cluster.network.as_ref().expect("a network");
                self.seen.note("packet lost", network.stopped_packets());
                cuts.iter().for_each(|cut| network.heal(*cut));
                self.tell(&format!("healed: {}", show(&cuts)));
            }
            Undo::Registry(held) => {
                drop(held);
                self.tell("the registry takes changes again");
            }
        }
    }

    fn after(&mut self, span: Duration, undo: Undo) {
        self.later.push((Instant::now() + span, undo));
    }

    // ---- what the schedule says

    fn step(&mut self, step: &Step, seed: u64, number: usize) {
        let faults: Vec<Fault> = step.faults.iter().map(|f| self.played(f)).collect();
        for fault in &faults {
            if let Some(n) = fault.hits() {
                self.wait(&format!("n{n} is well"), |c| c.is_well(n));
            }
        }
        let here = self.attached;
        let was_well = self.load.is_some();
        for fault in &faults {
            self.strike(fault);
        }
        let mut oracle = None;
        if was_well && faults.iter().any(|f| f.ends(here)) {
            oracle = Some(self.lose_the_load(&faults));
        }
        let to = step.to.map(|n| self.cast[n - 1]);
        if oracle.is_some() || to.is_some() {
            let to = to.unwrap_or(here);
            let socket = self.attach(to);
            if let Some(load) = self.load.take() {
                // The old attachment may still be there, frozen or cut off.
                let (known, ghost) = load.hand_over();
                self.ghosts.push(ghost);
                oracle = Some(known);
            }
            if let Some(oracle) = oracle {
                self.load = Some(Load::begin(&socket, plan(seed, number + 1), oracle));
                self.wait("the load runs", |c| c.progress(30));
            }
            self.may_fail = false;
        }
        self.pause(step.pause);
        if step.settle && RESYNC {
            self.end_of_faults();
        }
    }

    /// The process that serves is gone or going, and the guest with it.
    fn lose_the_load(&mut self, faults: &[Fault]) -> Oracle {
        let here = self.attached;
        let asked = |f: &Fault| matches!(f, Fault::Term { node, .. } if *node == here);
        if faults.iter().any(asked) {
            // What it took it finishes; until it has ended nothing may fail.
            self.wait("the node ends", |c| {
                let waits = |u: &Undo| matches!(u, Undo::StartAfterEnd(n, ..) if *n == here);
                (!c.later.iter().any(|(_, u)| waits(u))).then_some(())
            });
        }
        let outcome = self.load.take().expect("a load").abandon();
        assert_eq!(outcome.failed, 0);
        self.seen.note("request", outcome.done);
        outcome.oracle
    }

    /// The fault with the nodes of this cluster.
    fn played(&self, fault: &Fault) -> Fault {
        let mut fault = fault.clone();
        match &mut fault {
            Fault::Kill { node, .. }
            | Fault::Term { node, .. }
            | Fault::Freeze { node, .. }
            | Fault::Ask(Order::Promote { node }) => *node = self.cast[*node - 1],
            Fault::Ask(Order::Move { from, to }) => {
                (*from, *to) = (self.cast[*from - 1], self.cast[*to - 1]);
            }
            Fault::Cut { cuts, .. } => {
                for cut in cuts {
                    (cut.from, cut.to) = (self.cast[cut.from - 1], self.cast[cut.to - 1]);
                }
            }
            Fault::Registry { .. } | Fault::Ask(Order::Replicas(_)) => {}
        }
        fault
    }

    fn strike(&mut self, fault: &Fault) {
        match fault {
            Fault::Kill { node, down, wipe } => {
                self.tell(&format!("kill n{node}, for {down:?}"));
                self.note_hit("kill", *node);
                self.cluster.kill(*node);
                let start = [Undo::Start, Undo::StartBlank][usize::from(*wipe)];
                self.after(*down, start(*node));
            }
            Fault::Term { node, down } => {
                self.tell(&format!("ask n{node} to end, for {down:?}"));
                self.note_hit("end", *node);
                self.cluster.ask_to_stop(*node);
                let end = Undo::StartAfterEnd(*node, *down, Instant::now());
                self.after(Duration::ZERO, end);
            }
            Fault::Freeze { node, span } => {
                self.tell(&format!("stop n{node} for {span:?}"));
                self.note_hit("stop", *node);
                self.cluster.freeze(*node);
                self.after(*span, Undo::Thaw(*node));
            }
            Fault::Cut { cuts, span } => {
                self.tell(&format!("cut {} for {span:?}", show(cuts)));
                self.seen.note("cut", 1);
                let (from, to) = (cuts[0].from, cuts[0].to);
                if !cuts.iter().any(|c| (c.from, c.to) == (to, from)) {
                    self.seen.note("cut one way", 1);
                }
                match cuts[0].how {
                    How::Drop | How::Connect | How::Port(_) => {}
                    How::Reset => self.seen.note("cut by reset", 1),
                    How::Lossy => self.seen.note("cut by loss", 1),
                }
                let network = self.cluster.network.as_ref().expect("a network");
                cuts.iter().for_each(|cut| network.cut(*cut));
                self.after(*span, Undo::Heal(cuts.clone()));
            }
            Fault::Ask(order) => self.ask(*order),
            Fault::Registry { span } => {
                let held = Connection::open(self.cluster.registry()).expect("the registry");
                held.busy_timeout(Duration::from_millis(50))
                    .expect("a timeout");
                // A node that is stopped may be in the middle of a change: then that is the stall.
                match held.execute_batch("BEGIN IMMEDIATE") {
                    Ok(()) => {
                        self.tell(&format!("the registry takes no change for {span:?}"));
                        self.seen.note("registry stall", 1);
                        self.after(*span, Undo::Registry(held));
                    }
                    Err(e) => self.tell(&format!("the registry takes no change already: {e}")),
                }
            }
        }
    }

    /// As the operator who asked; what is refused is refused.
    fn ask(&mut self, order: Order) {
        let (what, line) = match order {
            Order::Promote { node } => ("promote", format!("volume promote vm1 --node n{node}")),
            Order::Move { from, to } => ("move", format!("volume move vm1 n{from} n{to}")),
            Order::Replicas(count) => {
                let line = format!("volume update vm1 --replicas {count}");
                ("update", line)
            }
        };
        let Some(n) = self.somebody() else {
            return self.tell(&format!("{line}: nobody is there to be asked"));
        };
        let done = self.cluster.run(n, &format!("{line} --async"));
        let answer = match done.code {
            0 => "granted",
            _ => "refused",
        };
        self.tell(&format!("{line}: {answer} {}", done.err.trim()));
        self.seen.note(&format!("{what} {answer}"), 1);
    }

    /// A node that answers.
    fn somebody(&mut self) -> Option<usize> {
        let all = self.cast.clone();
        all.into_iter().find(|n| self.is_well(*n).is_some())
    }

    /// The record counts on no copy on node n, and will not as long as n is away.
    fn is_missing(&mut self, n: usize) -> bool {
        let Some(volume) = self.somebody().and_then(|asked| self.inspect(asked)) else {
            return false;
        };
        let there = |state: &str| copies(&volume, state).contains(&format!("n{n}"));
        !there("in_sync") && !there("syncing")
    }

    fn note_hit(&mut self, what: &str, node: usize) {
        self.down.insert(node);
        self.seen.note(what, 1);
        if node == self.attached {
            self.seen.note(&format!("{what} of the attachment"), 1);
        }
    }

    // ---- the volume

    /// It runs and answers.
    fn is_well(&mut self, n: usize) -> Option<()> {
        (!self.down.contains(&n) && self.cluster.answers(n)).then_some(())
    }

    fn progress(&self, goal: u64) -> Option<()> {
        (self.load.as_ref()?.done() >= goal).then_some(())
    }

    /// What node n says of the volume.
    fn inspect(&self, n: usize) -> Option<Value> {
        if self.down.contains(&n) {
            return None;
        }
        let done = self.cluster.run(n, "volume inspect vm1 -o json");
        serde_json::from_str(&done.out).ok()
    }

    fn attach_first(&mut self) -> PathBuf {
        let socket = self.attach(self.attached);
        self.may_fail = false;
        socket
    }

    /// Has the volume served from a node, whoever served it before, as an operator would: by asking that node. Gives the
    /// socket.
    fn attach(&mut self, to: usize) -> PathBuf {
        self.vanish_ghosts();
        self.tell(&format!("n{to} is to serve"));
        if to != self.attached {
            self.may_fail = true;
            self.seen.note("move", 1);
        }
        let me = format!("n{to}");
        let socket = self.wait(&format!("n{to} serves"), |c| {
            c.is_well(to)?;
            let volume = c.inspect(to)?;
            let attachment = &volume["attachment"];
            let order = if attachment.is_null() {
                format!("volume attach vm1 --node {me} --num-queues 2 --async")
            } else if attachment["node"] != me.as_str() {
                "volume detach vm1 --force --async".into()
            } else if took_over(attachment) {
                let socket = attachment["socket"].as_str().expect("a socket");
                return Some(PathBuf::from(socket));
            } else {
                return None;
            };
            // Refused for now is refused for now: the next look decides anew.
            let done = c.cluster.run(to, &order);
            if done.code != 0 {
                c.tell(&format!("{order}: {}", done.err.trim()));
            }
            None
        });
        self.tell(&format!("n{to} serves"));
        self.attached = to;
        socket
    }

    fn vanish_ghosts(&mut self) {
        for ghost in std::mem::take(&mut self.ghosts) {
            let asked = ghost.vanish();
            self.seen.note("request of a ghost", asked);
        }
    }

    /// Waits until every fault is over and the volume is as well as it can be.
    fn end_of_faults(&mut self) {
        self.wait("all faults are over", |c| c.later.is_empty().then_some(()));
        for n in self.cast.clone() {
            self.wait(&format!("n{n} is well"), |c| c.is_well(n));
        }
        self.tell("all faults are over");
        let here = self.attached;
        self.wait("the volume is served", |c| {
            let volume = c.inspect(here)?;
            (volume["attachment"]["phase"] == "serving").then_some(())
        });
        if RESYNC {
            // Liveness (PROTOCOL 9): every reachable copy becomes in sync.
            self.wait("the volume is healthy", |c| {
                let volume = c.inspect(here)?;
                let in_sync = copies(&volume, "in_sync").len() as u64;
                let all = in_sync == volume["copies"].as_array()?.len() as u64;
                let enough = in_sync == volume["replicas"].as_u64()? + 1;
                (volume["health"] == "healthy" && all && enough).then_some(())
            });
            self.tell("the volume is healthy");
        }
    }

    /// Leaves the volume cleanly, and compares the copies byte by byte (S14).
    fn detach_and_compare(&mut self) {
        let here = self.attached;
        self.cluster.detach(here, "vm1");
        let volume = self.cluster.volume(here, "vm1");
        assert_eq!(volume["state"], "clean", "{volume:#}");
        let compared = self.cluster.copies_are_identical(here, "vm1");
        self.tell(&format!("the copies on {compared:?} are the same"));
        self.seen.note("copy compared", compared.len() as u64);
        if RESYNC {
            let all = volume["copies"].as_array().expect("copies").len();
            assert_eq!(compared.len(), all, "{volume:#}");
        }
        // A copy that was given up leaves nothing behind.
        for n in self.cast.clone() {
            let files = self.cluster.copy(n, &volume);
            if !compared.contains(&format!("n{n}")) {
                let what = format!("{} is gone", files.display());
                self.wait(&what, |_| (!RESYNC || !files.exists()).then_some(()));
            }
        }
    }

    fn finish(mut self) -> Seen {
        for n in self.cast.clone() {
            let log = self.cluster.log(n);
            assert!(!log.contains("panicked at"), "n{n} panicked");
            for (what, rule) in [
                ("ejection", "[2.6 eject]"),
                ("promotion", "[5 promote]"),
                ("takeover", "[5.3 claim] claiming -> configuring"),
                ("reconciliation", "[5.4 reconcile] "),
                ("suspension", "[7 suspend]"),
                ("rejoin", "[6 in sync]"),
                ("sync of what was missed", "what it missed since"),
                ("sync of everything", ": all of it: "),
                ("sync broken off", "[6 sync broke off]"),
            ] {
                let told = log.lines().filter(|l| l.contains("engine::volume"));
                let count = told.filter(|l| l.contains(rule)).count();
                if count > 0 {
                    self.seen.note(what, count as u64);
                }
            }
        }
        let seen = std::mem::take(&mut self.seen);
        self.tell(&seen.to_string());
        seen
    }
}

impl Drop for Chaos {
    fn drop(&mut self) {
        // First the nodes: a load that is in the middle of greeting a stopped one ends only then.
        self.cluster.kill_all();
        if !std::thread::panicking() && std::env::var_os("LOCKSTEP_CHAOS_KEEP").is_none() {
            return;
        }
        let _ = fs::create_dir_all(&self.kept);
        for entry in fs::read_dir(self.cluster.dir.path()).into_iter().flatten() {
            let path = entry.map(|e| e.path()).unwrap_or_default();
            if let Some(name) = path.file_name().filter(|_| path.is_file()) {
                let _ = fs::copy(&path, self.kept.join(name));
            }
        }
        // These have the milliseconds.
        for n in &self.cast {
            let events = self.cluster.data_dir(*n).join("events.jsonl");
            let _ = fs::copy(events, self.kept.join(format!("n{n}.events.jsonl")));
        }
        eprintln!(
            "the story and all logs are in {}\n{} repeats the schedule",
            self.kept.display(),
            self.repeat
        );
    }
}

/// Whoever served before serves no more.
fn took_over(attachment: &Value) -> bool {
    let phase = attachment["phase"].as_str();
    attachment["releasing"] != true && matches!(phase, Some("serving" | "recovering" | "suspended"))
}

fn number(node: &str) -> usize {
    node[1..].parse().expect("nodes are called n1, n2, …")
}

fn show(cuts: &[Cut]) -> String {
    let way = |c: &Cut| format!("n{}->n{}", c.from, c.to);
    let ways: Vec<String> = cuts.iter().map(way).collect();
    format!("{} by {:?}", ways.join(" "), cuts[0].how)
}
