//! How long a volume stands still when something happens to it: the longest gap between two completions that a load at
//! depth 8 sees, for each kind of loss. `scripts/failover` runs this.
//!
//! ```text
//! cargo bench --bench failover -- --runs 5 --only silent
//! ```
//!
//! Real node processes on this machine, each case with a cluster of its own; after each run what was lost comes back and is
//! in sync before the next. The load is closed (eight requests of 4 KiB, seven of ten are writes), so a gap is what each of
//! its requests waits at most. `nothing` is the same without a fault: what this machine does to a load by itself.
//! Where others go on meanwhile, no gap shows what one request waited: so the longest of these is printed, too.
//!
//! Cases that cut a way give each node a network namespace: they need root, iproute2 and iptables.

#[path = "../tests/cluster_support/mod.rs"]
mod cluster_support;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser;
use cluster_support::client::Disk;
use cluster_support::net::{Cut, How};
use cluster_support::oracle::Random;
use cluster_support::{Cluster, copies, eventually};
use rusqlite::Connection;
use serde_json::Value;

const DEPTH: usize = 8;
const BLOCK: usize = 4096;
const SIZE: u64 = 64 << 20;
/// How long a run goes on after the volume has got over it.
const AFTERWARDS: Duration = Duration::from_millis(1500);
/// How long the registry takes no change in the case that it is away, too.
const REGISTRY_AWAY: Duration = Duration::from_secs(5);
/// A front-end tries to connect again this often.
const RECONNECT: Duration = Duration::from_millis(10);

#[derive(Parser)]
#[command(name = "failover", about = "Measures how long a volume stands still")]
struct Args {
    /// Runs of each case
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Only the cases whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Where the nodes keep their data
    #[arg(long, default_value = "/tmp")]
    dir: PathBuf,
    /// Print the volume's events after each run
    #[arg(long)]
    events: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

/// What happens to a volume.
#[derive(Clone, Copy, PartialEq)]
enum Case {
    Nothing,
    ReplicaKilled,
    ReplicaSilent,
    MasterKilled,
    MasterSilent,
    Promoted,
    AttachmentKilled,
    AttachmentStopped,
    Upgraded,
    /// What goes to and from a replica vanishes; its connections stand.
    WayCut,
    MasterWayCut,
    /// The same while the registry takes no change.
    WayAndRegistryCut,
    /// The copy on one node is moved to another one.
    Drained,
    /// A copy that was away is brought up to date and counts again.
    TakenIn,
    /// The serving process is killed and started again, and a replica is killed with it.
    BothKilled,
}

impl Case {
    const ALL: [(Case, &str); 15] = [
        (Case::Nothing, "nothing"),
        (Case::ReplicaKilled, "replica killed"),
        (Case::MasterKilled, "remote master killed"),
        (Case::ReplicaSilent, "replica silent"),
        (Case::MasterSilent, "remote master silent"),
        (Case::Promoted, "promote"),
        (Case::AttachmentKilled, "attachment killed, restarted"),
        (Case::AttachmentStopped, "SIGTERM and started again"),
        (Case::Upgraded, "upgraded under the guest"),
        (Case::WayCut, "way to a replica cut"),
        (Case::MasterWayCut, "way to a remote master cut"),
        (Case::WayAndRegistryCut, "way cut, registry away for 5 s"),
        (Case::Drained, "drain under load"),
        (Case::TakenIn, "copy taken in"),
        (Case::BothKilled, "with a replica killed, restarted"),
    ];

    /// The node that serves the volume; n1 to n3 have copies, n1 the master.
    fn server(self) -> usize {
        match self {
            Case::MasterKilled | Case::MasterSilent | Case::Promoted | Case::MasterWayCut => 4,
            _ => 1,
        }
    }

    fn cuts(self) -> bool {
        matches!(
            self,
            Case::WayCut | Case::MasterWayCut | Case::WayAndRegistryCut
        )
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    println!(
        "{:30} {:>8} {:>8} {:>8} {:>12} {:>8} {:>8}   ms",
        "", "least", "median", "most", "least", "median", "most"
    );
    println!(
        "{:30} {:26} {:>30}",
        "", "longest gap between completions", "longest wait of a request"
    );
    for (case, name) in Case::ALL {
        if name.contains(&args.only) {
            let (gaps, waits) = measure(case, &args).into_iter().unzip();
            let ([a, b, c], [x, y, z]) = (spread(gaps), spread(waits));
            println!("{name:30} {a:>8} {b:>8} {c:>8} {x:>12} {y:>8} {z:>8}");
        }
    }
    ExitCode::SUCCESS
}

/// The least, the median and the most, in milliseconds.
fn spread(mut spans: Vec<Duration>) -> [String; 3] {
    spans.sort_unstable();
    [0, spans.len() / 2, spans.len() - 1].map(|i| format!("{:.0}", spans[i].as_secs_f64() * 1e3))
}

fn measure(case: Case, args: &Args) -> Vec<(Duration, Duration)> {
    let server = case.server();
    let mut cluster = match case.cuts() {
        true => Cluster::empty_on_a_network(&args.dir, 4),
        false => Cluster::empty(&args.dir),
    };
    for n in 1..=3 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    cluster.ok(1, "volume create vm1 --size 64MiB --replicas 2 --master n1");
    if server == 4 || case == Case::Drained {
        cluster.start_node(4);
        cluster.know_each_other();
    }
    cluster.ok(server, &format!("volume attach vm1 --node n{server}"));
    let whole = whole(&cluster, server);
    let socket = whole["attachment"]["socket"].as_str().expect("it serves");
    let load = Load::start(Path::new(socket));
    (0..args.runs)
        .map(|_| {
            let seen = one(case, &mut cluster, &load);
            if args.events {
                println!("    {} ms:", seen.0.as_millis());
                print_events(&cluster, server);
            }
            seen
        })
        .collect()
}

/// Waits until the volume is served and all copies are in sync.
fn whole(cluster: &Cluster, server: usize) -> Value {
    cluster.wait_for(server, "vm1", "is whole", |v| {
        v["health"] == "healthy" && copies(v, "in_sync").len() == 3
    })
}

/// The longest gap, and the longest wait of a request.
fn one(case: Case, cluster: &mut Cluster, load: &Load) -> (Duration, Duration) {
    let server = case.server();
    let volume = whole(cluster, server);
    let master = node_of(&volume["master"]["node"]);
    let degraded = |cluster: &Cluster| {
        cluster.wait_for(server, "vm1", "is degraded", |v| {
            v["health"] == "degraded" && v["attachment"]["phase"] == "serving"
        })
    };
    let both_ways = |a, b| {
        let how = How::Drop;
        let (there, back) = (
            Cut {
                from: a,
                to: b,
                how,
            },
            Cut {
                from: b,
                to: a,
                how,
            },
        );
        [there, back]
    };
    // All that is cut: the node and each other one.
    let away = if server == 4 { master } else { 3 };
    let others = (1..=4).filter(|n| *n != away);
    let cuts: Vec<Cut> = others.flat_map(|n| both_ways(away, n)).collect();
    let drained = copies(&volume, "in_sync").iter().map(|n| number(n)).max();
    if case == Case::TakenIn {
        cluster.kill(3);
        degraded(cluster);
    }
    load.goes_on();
    load.reset();
    match case {
        Case::Nothing => std::thread::sleep(Duration::from_secs(2)),
        Case::ReplicaKilled => {
            cluster.kill(3);
            degraded(cluster);
        }
        Case::MasterKilled => {
            cluster.kill(master);
            degraded(cluster);
        }
        Case::ReplicaSilent => {
            cluster.freeze(3);
            degraded(cluster);
        }
        Case::MasterSilent => {
            cluster.freeze(master);
            degraded(cluster);
        }
        Case::Promoted => {
            let to = if master == 1 { 2 } else { 1 };
            cluster.ok(server, &format!("volume promote vm1 --node n{to}"));
            let to = format!("n{to}");
            cluster.wait_for(server, "vm1", "has another master", |v| {
                v["master"]["node"] == to
            });
        }
        Case::AttachmentKilled => {
            cluster.kill(1);
            load.connect_again();
            cluster.spawn_node(1);
        }
        Case::BothKilled => {
            cluster.kill(3);
            cluster.kill(1);
            load.connect_again();
            cluster.spawn_node(1);
            degraded(cluster);
        }
        Case::AttachmentStopped => {
            cluster.ask_to_stop(1);
            while cluster.ended(1).is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            load.connect_again();
            cluster.spawn_node(1);
        }
        // By a program that happens to be the same; the load keeps its connection.
        Case::Upgraded => drop(cluster.ok(1, "node upgrade")),
        Case::WayCut | Case::MasterWayCut => {
            cut(cluster, &cuts);
            degraded(cluster);
        }
        Case::WayAndRegistryCut => {
            let held = Connection::open(cluster.registry()).expect("the registry");
            held.execute_batch("BEGIN IMMEDIATE").expect("a lock");
            cut(cluster, &cuts);
            std::thread::sleep(REGISTRY_AWAY);
            drop(held);
            degraded(cluster);
        }
        Case::Drained => {
            let n = drained.expect("copies");
            cluster.ok(1, &format!("node drain n{n}"));
            whole(cluster, server);
            cluster.ok(1, &format!("node undrain n{n}"));
        }
        Case::TakenIn => {
            cluster.start_node(3);
            whole(cluster, server);
        }
    }
    load.goes_on();
    std::thread::sleep(AFTERWARDS);
    let seen = (load.longest_gap(), load.longest_wait());
    match case {
        Case::ReplicaKilled | Case::BothKilled => cluster.start_node(3),
        Case::MasterKilled => cluster.start_node(master),
        Case::ReplicaSilent => cluster.thaw(3),
        Case::MasterSilent => cluster.thaw(master),
        Case::Nothing
        | Case::Promoted
        | Case::AttachmentKilled
        | Case::AttachmentStopped
        | Case::Upgraded
        | Case::Drained
        | Case::TakenIn => {}
        Case::WayCut | Case::MasterWayCut | Case::WayAndRegistryCut => {
            let network = cluster.network.as_ref().expect("a network");
            cuts.iter().for_each(|c| network.heal(*c));
        }
    }
    seen
}

fn cut(cluster: &Cluster, cuts: &[Cut]) {
    let network = cluster.network.as_ref().expect("a network");
    cuts.iter().for_each(|c| network.cut(*c));
}

fn node_of(name: &Value) -> usize {
    number(name.as_str().unwrap_or_default())
}

fn number(name: &str) -> usize {
    name[1..].parse().expect("nodes are called n1, n2, …")
}

fn print_events(cluster: &Cluster, server: usize) {
    let events = cluster.json(server, "events --volume vm1");
    let events = events.as_array().expect("events are a list");
    for e in &events[events.len().saturating_sub(16)..] {
        println!(
            "    {} {} {} {}",
            e["time"], e["node"], e["rule"], e["text"]
        );
    }
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Whoever served the socket is gone.
    lost: AtomicBool,
    done: AtomicU64,
    /// Nanoseconds since the load began.
    last: AtomicU64,
    longest: AtomicU64,
    /// Of one request, from its submission on.
    longest_wait: AtomicU64,
}

/// A load that keeps eight requests under way and notes when nothing was completed for how long.
struct Load {
    shared: Arc<Shared>,
    begun: Instant,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    fn start(socket: &Path) -> Load {
        let shared = Arc::new(Shared::default());
        let begun = Instant::now();
        let (theirs, socket) = (Arc::clone(&shared), socket.to_path_buf());
        let thread = std::thread::spawn(move || work(&socket, &theirs, begun));
        let load = Load {
            shared,
            begun,
            thread: Some(thread),
        };
        load.goes_on();
        load
    }

    fn goes_on(&self) {
        let goal = self.shared.done.load(SeqCst) + 100;
        eventually("the load goes on", || {
            let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            assert!(!ended, "the load ended by itself; it says above why");
            (self.shared.done.load(SeqCst) >= goal).then_some(())
        });
    }

    fn connect_again(&self) {
        self.shared.lost.store(true, SeqCst);
    }

    fn reset(&self) {
        self.shared.longest.store(0, SeqCst);
        self.shared.longest_wait.store(0, SeqCst);
    }

    fn longest_wait(&self) -> Duration {
        Duration::from_nanos(self.shared.longest_wait.load(SeqCst))
    }

    fn longest_gap(&self) -> Duration {
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
    let mut random = Random::new(1);
    let mut disk = Disk::open(socket, 1, DEPTH);
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let mut submitted = [0; DEPTH];
    while !shared.stop.load(SeqCst) {
        for lane in free.drain(..) {
            submitted[lane] = begun.elapsed().as_nanos() as u64;
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
            let wait = now - submitted[ended.lane];
            shared.longest_wait.fetch_max(wait, SeqCst);
            shared.done.fetch_add(1, SeqCst);
            free.push(ended.lane);
        }
        // libblkio does not connect again. A front-end that does brings its requests in flight with it; for the time to the
        // next completion it is the same.
        if shared.lost.swap(false, SeqCst) {
            disk = loop {
                match Disk::try_open(socket, 1, DEPTH) {
                    Ok(disk) => break disk,
                    Err(_) => std::thread::sleep(RECONNECT),
                }
            };
            free = (0..DEPTH).collect();
        }
    }
}
