//! What many volumes cost: while nothing happens, when a node dies, when its copies are replaced, when it comes back.
//! `scripts/scale` runs this.
//!
//! ```text
//! cargo bench --bench scale -- --volumes 1000 --seconds 30
//! ```
//!
//! Real node processes on this machine and a real etcd (or SQLite). A part of the volumes is attached, on all nodes but the
//! last, which is the one that dies: so every volume can be whole again. A few attached ones are under load all the time.
//! What the registry is asked is read from etcd itself, or, for SQLite, from what the nodes say they asked; what the records
//! say is followed by a watch, so that looking costs nothing.

#[path = "../tests/cluster_support/mod.rs"]
mod cluster_support;
#[path = "../tests/etcd_support/mod.rs"]
mod etcd_support;
#[path = "../tests/scale_support/mod.rs"]
mod scale_support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser;
use cluster_support::Cluster;
use cluster_support::client::Disk;
use cluster_support::oracle::Random;
use etcd_support::Etcd;
use scale_support::{
    Process, View, attach, create, etcd_metrics, etcd_requests, get, is_tidy, is_whole, name,
    status, sum,
};

const BLOCK: usize = 4096;
const DEPTH: usize = 4;
/// Small enough for a thousand of them in memory; large enough for a load not to meet itself.
const SIZE: u64 = 16 << 20;
const REPLICAS: u8 = 2;
/// Nothing takes longer than this, or is given up.
const PATIENCE: Duration = Duration::from_secs(1800);
/// How often states are looked at.
const LOOK: Duration = Duration::from_millis(50);

#[derive(Parser)]
#[command(name = "scale", about = "Measures what many volumes cost")]
struct Args {
    /// Volumes
    #[arg(long, default_value_t = 100)]
    volumes: usize,
    /// Nodes
    #[arg(long, default_value_t = 5)]
    nodes: usize,
    /// How long the idle cluster is measured
    #[arg(long, default_value_t = 30)]
    seconds: u64,
    /// `etcd` or `sqlite`
    #[arg(long, default_value = "etcd")]
    registry: String,
    /// One in this many is attached
    #[arg(long, default_value_t = 5)]
    attached: usize,
    /// Attached volumes under load
    #[arg(long, default_value_t = 4)]
    loaded: usize,
    /// `--replace-after` of the cluster
    #[arg(long, default_value = "5s")]
    replace_after: String,
    /// Only measure the idle cluster
    #[arg(long)]
    idle: bool,
    /// Where the nodes keep their data
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

struct World {
    args: Args,
    cluster: Cluster,
    etcd: Option<Etcd>,
    _registry_dir: tempfile::TempDir,
    view: View,
}

fn main() {
    let args = Args::parse();
    let mut world = World::start(args);
    world.fill();
    world.commands();
    world.idle();
    if !world.args.idle {
        world.lose_a_node();
    }
}

impl World {
    fn start(args: Args) -> World {
        let registry_dir = tempfile::Builder::new()
            .prefix("lockstep-scale-")
            .tempdir()
            .expect("a directory for the registry");
        let mut cluster = Cluster::empty(&args.dir);
        let etcd = match args.registry.as_str() {
            "etcd" => Some(Etcd::start(1)),
            "sqlite" => None,
            other => panic!("--registry {other}: etcd or sqlite"),
        };
        let location = match &etcd {
            Some(etcd) => etcd.location(&[1]),
            None => format!("sqlite:{}", registry_dir.path().join("r.db").display()),
        };
        cluster.registry_at = Some(location.clone());
        for n in 1..=args.nodes {
            cluster.start_node(n);
        }
        cluster.know_each_other();
        let view = View::of(&location);
        World {
            args,
            cluster,
            etcd,
            _registry_dir: registry_dir,
            view,
        }
    }

    fn nodes(&self) -> Vec<usize> {
        (1..=self.args.nodes).collect()
    }

    /// Nodes that serve volumes.
    fn servers(&self) -> usize {
        self.args.nodes - 1
    }

    fn fill(&mut self) {
        let n = self.args.volumes;
        println!(
            "{n} volumes of {} MiB with {REPLICAS} replicas on {} nodes, registry {}",
            SIZE >> 20,
            self.args.nodes,
            self.args.registry
        );
        let requests = self.registry();
        let begin = Instant::now();
        let nodes = self.nodes();
        let times = create(&self.cluster, &nodes, (0, n), SIZE, REPLICAS, "soft");
        let took = begin.elapsed();
        let part = (n / 10).max(1);
        println!(
            "create: {:.1} s, {:.1}/s; the first tenth {:.0} ms each, the last {:.0} ms; {:.1} registry requests each",
            took.as_secs_f64(),
            n as f64 / took.as_secs_f64(),
            ms(mean(&times[..part])),
            ms(mean(&times[n - part..])),
            self.registry_since(&requests) / n as f64,
        );
        println!("  copies by node: {:?}", self.view.copies_by_node());
        let begin = Instant::now();
        let count = self.attached().len();
        scale_support::all(count, |k| {
            let i = self.attached()[k];
            attach(&self.cluster, i, 1 + k % self.servers());
        });
        println!(
            "attach: {count} volumes, {:.1} s",
            begin.elapsed().as_secs_f64()
        );
        self.wait("all is well", is_tidy);
    }

    fn attached(&self) -> Vec<usize> {
        (0..self.args.volumes)
            .filter(|i| i % self.args.attached == 0)
            .collect()
    }

    /// Waits until every record is so; how long it took.
    fn wait(
        &self,
        what: &str,
        is: impl Fn(&lockstep::replication::record::Record) -> bool,
    ) -> Duration {
        let begin = Instant::now();
        loop {
            let (all, so) = self.view.count(&is);
            if all == self.args.volumes && so == all {
                return begin.elapsed();
            }
            assert!(
                begin.elapsed() < PATIENCE,
                "gave up waiting until {what}: {so} of {all}"
            );
            std::thread::sleep(LOOK);
        }
    }

    fn commands(&self) {
        let time = |line: &str| {
            let begin = Instant::now();
            let out = self.cluster.ok(1, line);
            format!(
                "{line} {:.0} ms ({} KiB)",
                ms(begin.elapsed()),
                out.len() >> 10
            )
        };
        let all: Vec<String> = [
            "volume ls",
            "volume ls -o json",
            "node ls",
            "volume inspect v0",
            "cluster status",
        ]
        .map(time)
        .into();
        println!("commands: {}", all.join(", "));
    }

    // ---- the registry

    /// Requests so far, by kind.
    fn registry(&self) -> BTreeMap<String, f64> {
        match &self.etcd {
            Some(etcd) => etcd_requests(&etcd.url(1)),
            None => {
                let mut all = BTreeMap::new();
                for n in self.nodes() {
                    let Some(text) = get(&self.cluster, n, "/metrics") else {
                        continue;
                    };
                    for (op, count) in
                        scale_support::samples(&text, "lockstep_registry_seconds_count")
                    {
                        *all.entry(op).or_insert(0.0) += count;
                    }
                }
                all
            }
        }
    }

    fn registry_since(&self, before: &BTreeMap<String, f64>) -> f64 {
        difference(before, &self.registry()).values().sum()
    }

    // ---- nothing happens

    fn idle(&mut self) {
        // What the attaching left to be done.
        std::thread::sleep(Duration::from_secs(10));
        let span = Duration::from_secs(self.args.seconds);
        let pids: Vec<u32> = self
            .nodes()
            .into_iter()
            .map(|n| self.cluster.pid(n))
            .collect();
        let etcd_url = self.etcd.as_ref().map(|e| e.url(1));
        let sent = || {
            etcd_url.as_ref().map(|u| {
                sum(
                    &etcd_metrics(u),
                    "etcd_network_client_grpc_sent_bytes_total",
                )
            })
        };
        let (requests, bytes, segments) = (self.registry(), sent(), self.segments());
        let before: Vec<Process> = pids.iter().map(|p| Process::of(*p)).collect();
        let begin = Instant::now();
        std::thread::sleep(span);
        let after: Vec<Process> = pids.iter().map(|p| Process::of(*p)).collect();
        let seconds = begin.elapsed().as_secs_f64();
        let segments = self.segments().saturating_sub(segments) as f64 / seconds;
        let bytes = sent()
            .zip(bytes)
            .map(|(after, before)| (after - before) / seconds / 1024.0);
        let requests = difference(&requests, &self.registry());
        println!("idle for {seconds:.0} s:");
        let total: f64 = requests.values().sum();
        println!(
            "  registry: {:.2} requests/s {requests:.0?}{}",
            total / seconds,
            bytes.map_or(String::new(), |b| format!(", {b:.1} KiB/s sent by etcd")),
        );
        println!("  replication: {segments:.0} TCP segments/s");
        for (n, (before, after)) in self.nodes().into_iter().zip(before.iter().zip(&after)) {
            println!(
                "  n{n}: cpu {:.2} %, {:.0} MiB, {} threads, {} descriptors",
                (after.cpu_seconds - before.cpu_seconds) / seconds * 100.0,
                after.rss_mib,
                after.threads,
                after.fds
            );
        }
    }

    /// Segments that the nodes' replication sockets have sent.
    fn segments(&self) -> u64 {
        let ip = self.cluster.ip(1);
        let net = ip.rsplit_once('.').map_or("", |(net, _)| net);
        let out = Command::new("ss")
            .args(["-tinOH"])
            .output()
            .expect("ss runs");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        text.lines()
            .filter(|l| {
                let ours = l.split_whitespace().skip(3).take(2);
                let mut ours = ours.filter(|a| a.starts_with(net));
                ours.any(|a| a.ends_with(":5703"))
            })
            .filter_map(|l| {
                let rest = l.split(" segs_out:").nth(1)?;
                rest.split_whitespace().next()?.parse::<u64>().ok()
            })
            .sum()
    }

    // ---- a node dies

    fn lose_a_node(&mut self) {
        let victim = self.args.nodes;
        let lost = format!("n{victim}");
        let line = format!("cluster update --replace-after {}", self.args.replace_after);
        let loads = self.loads(&lost);
        std::thread::sleep(Duration::from_secs(3));
        let before = Rates::of(&loads);
        std::thread::sleep(Duration::from_secs(5));
        println!("loaded volumes: {}", Rates::of(&loads).since(&before));

        println!("{lost} is killed, and back before its copies are replaced:");
        loads.iter().for_each(Load::reset);
        let (rates, requests) = (Rates::of(&loads), self.registry_alive(victim));
        self.cluster.kill(victim);
        self.until_ejected(victim, Instant::now());
        std::thread::sleep(Duration::from_secs(5));
        let begin = Instant::now();
        self.cluster.start_node(victim);
        let peak = self.watch_syncs(&[], is_tidy);
        println!(
            "  all is tidy {:.1} s after its start; registry {:?}",
            begin.elapsed().as_secs_f64(),
            difference(&requests, &self.registry_alive(victim)),
        );
        println!("  syncs at once, at most: {peak}");
        println!("  loaded volumes: {}", Rates::of(&loads).since(&rates));
        self.cluster.ok(1, &line);
        println!("{lost} is killed:");
        loads.iter().for_each(Load::reset);
        let (rates, requests) = (Rates::of(&loads), self.registry_alive(victim));
        let affected = self.view.see(|s| {
            let hit = lockstep::cluster::plane::whole_volumes(s)
                .filter(|(_, _, (r, _))| r.in_sync().any(|c| c.node.0 == lost));
            hit.count()
        });
        let killed = Instant::now();
        self.cluster.kill(victim);
        let ejected = self.until_ejected(victim, killed);
        let gaps: Vec<f64> = loads.iter().map(|l| ms(l.longest())).collect();
        println!(
            "  {affected} volumes lost a copy; the attached ones serve without it after {:.2} s (median {:.2} s); stalls of \
             loaded volumes {gaps:.0?} ms",
            ejected.last().copied().unwrap_or_default(),
            ejected.get(ejected.len() / 2).copied().unwrap_or_default(),
        );
        println!(
            "  registry: {:?}",
            difference(&requests, &self.registry_alive(victim))
        );
        let peak = self.watch_syncs(&[victim], |v| is_whole(v, Some(&lost)));
        println!(
            "  all volumes whole {:.1} s after the kill; {:.2} registry requests a volume {:?}",
            killed.elapsed().as_secs_f64(),
            difference(&requests, &self.registry_alive(victim))
                .values()
                .sum::<f64>()
                / affected as f64,
            difference(&requests, &self.registry_alive(victim)),
        );
        println!("  syncs at once, at most: {peak}");
        println!("  loaded volumes: {}", Rates::of(&loads).since(&rates));
        println!("  copies by node: {:?}", self.view.copies_by_node());

        println!("{lost} comes back:");
        loads.iter().for_each(Load::reset);
        let (rates, requests) = (Rates::of(&loads), self.registry_alive(victim));
        let begin = Instant::now();
        self.cluster.start_node(victim);
        println!("  it answers after {:.2} s", begin.elapsed().as_secs_f64());
        let peak = self.watch_syncs(&[], is_tidy);
        println!(
            "  all is tidy after {:.1} s; registry {:?}",
            begin.elapsed().as_secs_f64(),
            difference(&requests, &self.registry_alive(victim)),
        );
        println!("  syncs at once, at most: {peak}");
        println!("  loaded volumes: {}", Rates::of(&loads).since(&rates));
    }

    /// A node that is started again counts from zero, and SQLite keeps no count of its own.
    fn registry_alive(&self, but: usize) -> BTreeMap<String, f64> {
        match &self.etcd {
            Some(_) => self.registry(),
            None => {
                let mut all = BTreeMap::new();
                for n in self.nodes().into_iter().filter(|n| *n != but) {
                    let text = get(&self.cluster, n, "/metrics").unwrap_or_default();
                    for (op, count) in
                        scale_support::samples(&text, "lockstep_registry_seconds_count")
                    {
                        *all.entry(op).or_insert(0.0) += count;
                    }
                }
                all
            }
        }
    }

    /// Loads on attached volumes, those that have a copy on the node that will die first.
    fn loads(&self, victim: &str) -> Vec<Load> {
        let mut found: Vec<(bool, String)> = Vec::new();
        self.view.see(|s| {
            for i in self.attached() {
                let Some((_, entry)) = s
                    .names
                    .get(&format!("default/{}", name(i)))
                    .and_then(|id| s.volumes.get(id).map(|e| (*id, e)))
                else {
                    continue;
                };
                let (Some((spec, _)), Some((record, _))) = (&entry.spec, &entry.record) else {
                    continue;
                };
                let there = record.present().any(|c| c.node.0 == victim);
                if let Some(attachment) = &spec.attachment {
                    found.push((!there, attachment.socket.display().to_string()));
                }
            }
        });
        found.sort();
        let sockets = found.into_iter().take(self.args.loaded);
        sockets.map(|(_, s)| Load::start(Path::new(&s))).collect()
    }

    /// When each attached volume with a copy on `victim` served without it, in seconds, in order.
    fn until_ejected(&self, victim: usize, killed: Instant) -> Vec<f64> {
        let lost = format!("n{victim}");
        let mut waiting: Vec<_> = self.view.see(|s| {
            lockstep::cluster::plane::whole_volumes(s)
                .filter(|(_, (spec, _), (r, _))| {
                    spec.attachment.is_some() && r.present().any(|c| c.node.0 == lost)
                })
                .map(|(id, _, _)| id)
                .collect()
        });
        let mut times = Vec::new();
        while !waiting.is_empty() {
            assert!(
                killed.elapsed() < PATIENCE,
                "{waiting:?} keep the lost copy"
            );
            self.view.see(|s| {
                waiting.retain(|id| {
                    let record = s.volumes.get(id).and_then(|v| v.record.as_ref());
                    let out = record.is_some_and(|(r, _)| {
                        r.state == lockstep::replication::record::State::Active
                            && !r.in_sync().any(|c| c.node.0 == lost)
                    });
                    if out {
                        times.push(killed.elapsed().as_secs_f64());
                    }
                    !out
                });
            });
            std::thread::sleep(Duration::from_millis(10));
        }
        times
    }

    /// Until every record is so; the most syncs seen at once from one node and to one node.
    fn watch_syncs(
        &self,
        dead: &[usize],
        is: impl Fn(&lockstep::replication::record::Record) -> bool,
    ) -> String {
        let begin = Instant::now();
        let mut said = Instant::now();
        let (mut from, mut to): (BTreeMap<String, usize>, BTreeMap<String, usize>) =
            Default::default();
        loop {
            let (all, so) = self.view.count(&is);
            if so == all {
                break;
            }
            if said.elapsed() > Duration::from_secs(10) {
                said = Instant::now();
                println!(
                    "    {so} of {all} after {:.0} s",
                    begin.elapsed().as_secs_f64()
                );
            }
            assert!(begin.elapsed() < PATIENCE, "{so} of {all} are whole");
            let mut now_to: BTreeMap<String, usize> = BTreeMap::new();
            for n in self.nodes().into_iter().filter(|n| !dead.contains(n)) {
                let Some(status) = status(&self.cluster, n) else {
                    continue;
                };
                let mut here = 0;
                for attachment in status["attachments"].as_array().into_iter().flatten() {
                    for copy in attachment["copies"].as_array().into_iter().flatten() {
                        if !copy["sync"].is_null() {
                            here += 1;
                            *now_to
                                .entry(copy["node"].as_str().unwrap_or_default().into())
                                .or_default() += 1;
                        }
                    }
                }
                let most = from.entry(format!("n{n}")).or_default();
                *most = (*most).max(here);
            }
            for (node, count) in now_to {
                let most = to.entry(node).or_default();
                *most = (*most).max(count);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        let mut most = BTreeMap::new();
        for n in self.nodes().into_iter().filter(|n| !dead.contains(n)) {
            let text = get(&self.cluster, n, "/metrics").unwrap_or_default();
            for (end, count) in scale_support::samples(&text, "lockstep_syncs_running_max") {
                let most: &mut f64 = most.entry(end).or_default();
                *most = most.max(count);
            }
        }
        format!("from {from:?}, to {to:?}; as the nodes counted since they began {most:?}")
    }
}

fn difference(
    before: &BTreeMap<String, f64>,
    after: &BTreeMap<String, f64>,
) -> BTreeMap<String, f64> {
    after
        .iter()
        .map(|(k, v)| (k.clone(), v - before.get(k).unwrap_or(&0.0)))
        .filter(|(_, v)| *v != 0.0)
        .collect()
}

fn mean(times: &[Duration]) -> Duration {
    times.iter().sum::<Duration>() / times.len().max(1) as u32
}

fn ms(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

// ---- loads

/// What loads have done by now.
struct Rates {
    at: Instant,
    done: Vec<u64>,
    longest: Vec<f64>,
}

impl Rates {
    fn of(loads: &[Load]) -> Rates {
        Rates {
            at: Instant::now(),
            done: loads.iter().map(|l| l.shared.done.load(SeqCst)).collect(),
            longest: loads.iter().map(|l| ms(l.longest())).collect(),
        }
    }

    fn since(&self, before: &Rates) -> String {
        let seconds = (self.at - before.at).as_secs_f64();
        let rates: Vec<f64> = self
            .done
            .iter()
            .zip(&before.done)
            .map(|(now, then)| (now - then) as f64 / seconds)
            .collect();
        format!(
            "{rates:.0?} requests/s, longest gaps {:.0?} ms",
            self.longest
        )
    }
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    done: AtomicU64,
    /// Nanoseconds since the load began.
    last: AtomicU64,
    longest: AtomicU64,
}

/// A load of a few requests at a time with pauses, as an ordinary machine makes: it must not take the processors from what
/// is measured.
struct Load {
    shared: Arc<Shared>,
    begun: Instant,
    thread: Option<JoinHandle<()>>,
}

/// Between two requests of one place.
const THINK: Duration = Duration::from_millis(5);

impl Load {
    fn start(socket: &Path) -> Load {
        let shared = Arc::new(Shared::default());
        let begun = Instant::now();
        let (theirs, socket) = (Arc::clone(&shared), socket.to_path_buf());
        let thread = std::thread::spawn(move || work(&socket, &theirs, begun));
        Load {
            shared,
            begun,
            thread: Some(thread),
        }
    }

    fn reset(&self) {
        self.shared.longest.store(0, SeqCst);
    }

    fn longest(&self) -> Duration {
        let now = self.begun.elapsed().as_nanos() as u64;
        let open = now.saturating_sub(self.shared.last.load(SeqCst));
        Duration::from_nanos(self.shared.longest.load(SeqCst).max(open))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn work(socket: &Path, shared: &Shared, begun: Instant) {
    let mut random = Random::new(begun.elapsed().as_nanos() as u64 | 1);
    let mut disk = Disk::open(socket, 1, DEPTH);
    let mut free: Vec<usize> = (0..DEPTH).collect();
    while !shared.stop.load(SeqCst) {
        for lane in free.drain(..) {
            let offset = random.below(SIZE / BLOCK as u64) * BLOCK as u64;
            if random.below(10) < 3 {
                disk.read(lane, offset, BLOCK);
            } else {
                let stamp = random.next();
                disk.buffer(lane, BLOCK)[..8].copy_from_slice(&stamp.to_le_bytes());
                disk.write(lane, offset, BLOCK);
            }
        }
        for ended in disk.poll() {
            assert_eq!(ended.ret, 0, "a request failed");
            let now = begun.elapsed().as_nanos() as u64;
            let before = shared.last.swap(now, SeqCst);
            shared.longest.fetch_max(now - before, SeqCst);
            shared.done.fetch_add(1, SeqCst);
            free.push(ended.lane);
        }
        if free.len() == DEPTH {
            std::thread::sleep(THINK);
        }
    }
}
