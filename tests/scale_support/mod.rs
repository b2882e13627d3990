//! Many volumes on several nodes: made at once, counted, and watched without asking anybody anything.
#![allow(dead_code, reason = "each binary uses its own part")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hyper::Method;
use lockstep::api::client::{Target, ask, runtime};
use lockstep::cluster::plane::whole_volumes;
use lockstep::cluster::snapshot::Snapshot;
use lockstep::cluster::store::Store;
use lockstep::registry::{Access, Location};
use lockstep::replication::record::{CopyEntry, CopyStatus, Record, State};
use serde_json::Value;

use crate::cluster_support::Cluster;

/// Commands under way at once.
const HANDS: usize = 8;

/// What `target` answers.
pub fn http(target: &Target, method: Method, path: &str, body: Option<&Value>) -> (u16, String) {
    let body = body.map(|b| b.to_string().into_bytes());
    let asked = runtime()
        .unwrap()
        .block_on(ask(target, method, path, body, None));
    match asked {
        Ok(answer) => (
            answer.status.as_u16(),
            String::from_utf8_lossy(&answer.body).into_owned(),
        ),
        Err(e) => (0, e.to_string()),
    }
}

/// What node n says on its HTTP port; `None`: it does not answer.
pub fn get(cluster: &Cluster, n: usize, path: &str) -> Option<String> {
    let target = Target::Tcp(format!("{}:5705", cluster.ip(n)));
    let (status, text) = http(&target, Method::GET, path, None);
    (status == 200).then_some(text)
}

/// What node n says of its copies and attachments.
pub fn status(cluster: &Cluster, n: usize) -> Option<Value> {
    serde_json::from_str(&get(cluster, n, "/api/v1/local/status")?).ok()
}

/// The values of a metric, by its labels as they are written (`{op="read"}`).
pub fn samples(text: &str, name: &str) -> BTreeMap<String, f64> {
    text.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            if !rest.starts_with(['{', ' ']) {
                return None;
            }
            let (labels, value) = rest.rsplit_once(' ')?;
            Some((labels.trim().to_string(), value.parse().ok()?))
        })
        .collect()
}

/// A metric's values in all.
pub fn sum(text: &str, name: &str) -> f64 {
    samples(text, name).values().sum()
}

/// A command to node n.
#[track_caller]
pub fn post(cluster: &Cluster, n: usize, path: &str, body: &Value) -> Value {
    let target = Target::Unix(cluster.run_dir(n).join("api.sock"));
    let begin = Instant::now();
    loop {
        let (status, text) = http(&target, Method::POST, path, Some(body));
        if status == 200 {
            return serde_json::from_str(&text).unwrap();
        }
        // "Try again" under load is an answer, too.
        let again = status == 503 && begin.elapsed() < crate::cluster_support::PATIENCE;
        assert!(again, "{path} on n{n}: {status} {text}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Does `work` for 0 … `count` − 1, several at once. Gives how long each took, in the order of their ends.
pub fn all(count: usize, work: impl Fn(usize) + Sync) -> Vec<Duration> {
    let next = AtomicUsize::new(0);
    let times = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..HANDS {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, SeqCst);
                    if i >= count {
                        return;
                    }
                    let begin = Instant::now();
                    work(i);
                    times.lock().unwrap().push(begin.elapsed());
                }
            });
        }
    });
    times.into_inner().unwrap()
}

/// The name of volume i.
pub fn name(i: usize) -> String {
    format!("v{i}")
}

/// Makes volumes `from` … `to` − 1 with this many replicas, each command at another of these nodes.
pub fn create(
    cluster: &Cluster,
    nodes: &[usize],
    (from, to): (usize, usize),
    size: u64,
    replicas: u8,
    failure_mode: &str,
) -> Vec<Duration> {
    all(to - from, |i| {
        let i = from + i;
        let body = serde_json::json!({
            "namespace": "default", "name": name(i), "size": size,
            "wishes": {"replicas": replicas, "failure_mode": failure_mode},
        });
        post(cluster, nodes[i % nodes.len()], "/api/v1/volumes", &body);
    })
}

/// Serves volume i from node n; the socket.
#[track_caller]
pub fn attach(cluster: &Cluster, i: usize, n: usize) -> String {
    let path = format!("/api/v1/volumes/default/{}/attach", name(i));
    let body = serde_json::json!({"node": format!("n{n}")});
    let done = post(cluster, n, &path, &body);
    done["socket"].as_str().unwrap().to_string()
}

/// What the registry holds, followed by a watch: looking at it asks nothing of anybody.
pub struct View {
    now: Arc<Mutex<Snapshot>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl View {
    pub fn of(location: &str) -> View {
        let location: Location = location.parse().unwrap();
        let store = Store::new(location.open(&Access::default()).unwrap());
        let now = Arc::new(Mutex::new(store.snapshot().unwrap()));
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, ended) = (Arc::clone(&now), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            'list: loop {
                let from = theirs.lock().unwrap().revision;
                let watch = store.watch(from).unwrap();
                loop {
                    if ended.load(SeqCst) {
                        return;
                    }
                    match watch.next(Duration::from_millis(50)) {
                        Ok(Some(batch)) => theirs.lock().unwrap().apply(batch),
                        Ok(None) => {}
                        Err(_) => {
                            *theirs.lock().unwrap() = store.snapshot().unwrap();
                            continue 'list;
                        }
                    }
                }
            }
        });
        View {
            now,
            stop,
            thread: Some(thread),
        }
    }

    /// Looks at everything.
    pub fn see<T>(&self, look: impl FnOnce(&Snapshot) -> T) -> T {
        look(&self.now.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many volumes there are, and how many of them are so.
    pub fn count(&self, is: impl Fn(&Record) -> bool) -> (usize, usize) {
        self.see(|s| {
            let all = whole_volumes(s).count();
            let so = whole_volumes(s).filter(|(_, _, (record, _))| is(record));
            (all, so.count())
        })
    }

    /// Copies that are there and counted on, by node.
    pub fn copies_by_node(&self) -> BTreeMap<String, usize> {
        self.see(|s| {
            let mut by_node = BTreeMap::new();
            for (_, _, (record, _)) in whole_volumes(s) {
                for copy in record.in_sync() {
                    *by_node.entry(copy.node.0.clone()).or_default() += 1;
                }
            }
            by_node
        })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// All copies that are wanted are in sync, on other nodes than `but`, and a detached volume was released.
pub fn is_whole(record: &Record, but: Option<&str>) -> bool {
    let counts = |c: &&CopyEntry| !c.leaving && but != Some(c.node.0.as_str());
    let in_sync = record.in_sync().filter(counts).count();
    let released = match &record.attachment {
        Some(_) => record.state == State::Active,
        None => record.state == State::Clean,
    };
    in_sync > usize::from(record.replicas_wanted) && released
}

/// The same, and nothing is left over: no copy is missing or leaves.
pub fn is_tidy(record: &Record) -> bool {
    let odd = |c: &CopyEntry| c.leaving || c.status != CopyStatus::InSync;
    is_whole(record, None) && !record.present().any(odd)
}

/// Requests that etcd has taken so far, by method.
pub fn etcd_requests(url: &str) -> BTreeMap<String, f64> {
    let text = etcd_metrics(url);
    let all = samples(&text, "grpc_server_started_total");
    let mut by_method = BTreeMap::new();
    for (labels, value) in all {
        let method = labels.split("grpc_method=\"").nth(1).unwrap_or_default();
        let method = method.split('"').next().unwrap_or_default();
        if labels.contains("etcdserverpb") && value > 0.0 {
            *by_method.entry(method.to_string()).or_insert(0.0) += value;
        }
    }
    by_method
}

/// etcd's own metrics.
pub fn etcd_metrics(url: &str) -> String {
    let address = url.trim_start_matches("http://").to_string();
    http(&Target::Tcp(address), Method::GET, "/metrics", None).1
}

/// Figures of a process from /proc.
#[derive(Clone, Copy, Default)]
pub struct Process {
    pub rss_mib: f64,
    pub threads: usize,
    pub fds: usize,
    pub cpu_seconds: f64,
}

impl Process {
    pub fn of(pid: u32) -> Process {
        let dir = format!("/proc/{pid}");
        let dir = Path::new(&dir);
        let status = std::fs::read_to_string(dir.join("status")).unwrap_or_default();
        let figure = |key: &str| -> f64 {
            let line = status.lines().find_map(|l| l.strip_prefix(key));
            let first = line.and_then(|l| l.split_whitespace().next());
            first.and_then(|f| f.parse().ok()).unwrap_or(0.0)
        };
        let stat = std::fs::read_to_string(dir.join("stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        // utime and stime, in hundredths of a second.
        let ticks: f64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|t| t.parse::<f64>().ok())
            .sum();
        Process {
            rss_mib: figure("VmRSS:") / 1024.0,
            threads: figure("Threads:") as usize,
            fds: std::fs::read_dir(dir.join("fd")).map_or(0, Iterator::count),
            cpu_seconds: ticks / 100.0,
        }
    }
}
