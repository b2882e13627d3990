//! `/metrics` says what happened: compared with what a client did, with what was lost, with docs/METRICS.md and with the dashboard.

mod cluster_support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use cluster_support::client::{Disk, KIB, Load, MIB, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually};
use serde_json::Value;

const SIZE: u64 = 32 * MIB as u64;

/// A metric, as `# TYPE` and its samples tell: its type and the names of its labels, `le` left out.
#[derive(Debug, Default, PartialEq)]
struct Family {
    kind: String,
    labels: BTreeSet<String>,
}

/// What a node says: each sample by its name with labels, and each metric.
struct Figures {
    samples: BTreeMap<String, f64>,
    families: BTreeMap<String, Family>,
}

fn figures(cluster: &Cluster, n: usize) -> Figures {
    let mut stream = TcpStream::connect(format!("{}:5705", cluster.ip(n))).unwrap();
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    let (mut samples, mut families) = (BTreeMap::new(), BTreeMap::<String, Family>::new());
    let mut metric = String::new();
    for line in body.lines() {
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            metric = name.into();
            families.entry(name.into()).or_default().kind = kind.into();
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let bare = name.split('{').next().unwrap();
            assert!(bare.starts_with(&metric), "{bare} below {metric}");
            let labels = name.split_once('{').map_or("", |(_, labels)| labels);
            let names = labels.split("\",").filter_map(|pair| pair.split_once('='));
            let names = names.map(|(name, _)| name.to_string());
            let known = &mut families.get_mut(&metric).unwrap().labels;
            known.extend(names.filter(|name| name != "le"));
            samples.insert(name.into(), value.parse().unwrap());
        }
    }
    Figures { samples, families }
}

impl Figures {
    #[track_caller]
    fn get(&self, name: &str) -> f64 {
        let found = self.samples.get(name);
        *found.unwrap_or_else(|| panic!("no {name} in {:#?}", self.samples))
    }

    /// A figure of volume default/NAME.
    #[track_caller]
    fn of(&self, volume: &str, name: &str) -> f64 {
        self.get(&format!(
            "lockstep_volume_{name}{{namespace=\"default\",volume=\"{volume}\"}}"
        ))
    }
}

#[test]
fn figures_are_what_a_client_did_and_what_went_over_the_wire() {
    // Given a volume with two replicas, and one whose data is not to be compressed,
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    let create = "--size 32MiB --replicas 2 --master n1";
    let plain = format!("{create} --label lockstep.io/nocompress=true");
    let sockets = [
        ("vm1", cluster.serve("vm1", create, "--node n1")),
        ("plain", cluster.serve("plain", &plain, "--node n1")),
    ];
    let (block, bytes) = (64 * KIB, 16.0 * 64.0 * KIB as f64);
    let mut before = figures(&cluster, 1);
    for (name, socket) in &sockets {
        // when a client writes 16 times 64 KiB of what compresses well, reads 7 times 4 KiB and flushes 5 times,
        let mut disk = Disk::open(socket, 1, 1);
        for i in 0..16 {
            disk.buffer(0, block).fill(i as u8 + 1);
            disk.write(0, (i * block) as u64, block);
            assert_eq!(disk.finish(), 0);
        }
        for i in 0..7 {
            disk.read(0, i * 4096, 4096);
            assert_eq!(disk.finish(), 0);
        }
        for _ in 0..5 {
            disk.flush(0);
            assert_eq!(disk.finish(), 0);
        }
        // then the guest's layer counts that,
        let now = figures(&cluster, 1);
        for (what, expected) in [
            ("write_total", 16.0),
            ("write_bytes_total", bytes),
            ("write_errors_total", 0.0),
            ("write_seconds_count", 16.0),
            ("read_total", 7.0),
            ("read_bytes_total", 7.0 * 4096.0),
            ("read_errors_total", 0.0),
            ("read_seconds_count", 7.0),
            ("flush_total", 5.0),
            ("flush_seconds_count", 5.0),
            ("flush_errors_total", 0.0),
            ("discard_total", 0.0),
        ] {
            let found = now.of(name, &format!("frontend_{what}"));
            assert_eq!(found, expected, "{what} of {name}");
        }
        assert!(now.of(name, "frontend_write_seconds_sum") > 0.0);
        // the network's each answer of the two replicas, the disk's what the copy here did (reads come from here),
        for (what, expected) in [
            ("network_write_total", 32.0),
            ("network_write_bytes_total", 2.0 * bytes),
            ("network_read_total", 0.0),
            ("backend_write_total", 16.0),
            ("backend_write_bytes_total", bytes),
            ("backend_read_total", 7.0),
            ("backend_read_bytes_total", 7.0 * 4096.0),
            ("backend_write_errors_total", 0.0),
            ("inflight_requests", 0.0),
        ] {
            assert_eq!(now.of(name, what), expected, "{what} of {name}");
        }
        // (we flush on our own account, too)
        assert!(now.of(name, "network_flush_total") >= 10.0);
        assert!(now.of(name, "backend_flush_total") >= 5.0);
        // and the wire what went to both: all of it, or less where it is compressed.
        let sent = |what: &str| {
            let name = format!("lockstep_wire_{what}_bytes_total");
            now.get(&name) - before.get(&name)
        };
        assert_eq!(sent("raw"), 2.0 * bytes, "{name}");
        match *name {
            "plain" => assert_eq!(sent("compressed"), 2.0 * bytes),
            _ => assert!(sent("compressed") < 2.0 * bytes / 20.0),
        }
        before = now;
    }
    // What is known of a volume otherwise is so,
    let volume = cluster.volume(1, "vm1");
    let epoch = volume["epoch"].as_f64().unwrap();
    eventually("the control loop knows the epoch", || {
        (figures(&cluster, 1).of("vm1", "epoch") == epoch).then_some(())
    });
    let now = figures(&cluster, 1);
    assert_eq!(now.of("vm1", "size_bytes"), SIZE as f64);
    assert_eq!(now.of("vm1", "replicas_wanted"), 2.0);
    assert_eq!(now.of("vm1", "replicas_in_sync"), 2.0);
    assert_eq!(now.of("vm1", "sync_remaining_bytes"), 0.0);
    let taken = cluster.allocated(1, &volume);
    let said = now.of("vm1", "allocated_bytes") as u64;
    assert!(said.abs_diff(taken) <= MIB as u64, "{said}, not {taken}");
    for (state, is) in [("healthy", 1.0), ("syncing", 0.0), ("suspended", 0.0)] {
        let name = format!(
            "lockstep_volume_health{{namespace=\"default\",volume=\"vm1\",state=\"{state}\"}}"
        );
        assert_eq!(now.get(&name), is, "{state}");
    }
    // and of a node: its disk's size, and the registry's calls, which no I/O adds to.
    let disk = rustix::fs::statvfs(cluster.data_dir(1)).unwrap();
    let total = (disk.f_blocks * disk.f_frsize) as f64;
    assert_eq!(now.get("lockstep_node_capacity_bytes{node=\"n1\"}"), total);
    let free = now.get("lockstep_node_free_bytes{node=\"n1\"}");
    assert!(free > 0.0 && free < total, "{free} of {total}");
    let swaps = |f: &Figures| f.get("lockstep_registry_seconds_count{op=\"write\"}");
    let had = swaps(&now);
    cluster.ok(1, "volume create vm2 --size 32MiB --master n1");
    assert!(swaps(&figures(&cluster, 1)) > had);
    // And what a suspended volume fails is counted as failed.
    let strict = "--failure-mode hard --suspend-deadline 1s";
    cluster.ok(1, &format!("volume update vm1 {strict}"));
    let mut disk = Disk::open(&sockets[0].1, 1, 1);
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is suspended", |v| v["health"] == "suspended");
    disk.write(0, 0, block);
    assert!(disk.finish() < 0);
    let now = figures(&cluster, 1);
    assert_eq!(now.of("vm1", "frontend_write_errors_total"), 1.0);
    assert_eq!(now.of("vm1", "frontend_write_total"), 17.0);
}

const PROMOTIONS: &str = "lockstep_promotions_total";
const FAILOVERS: &str = "lockstep_failover_seconds_count";
const FAILOVER_SUM: &str = "lockstep_failover_seconds_sum";

fn ejections(figures: &Figures, reason: &str) -> f64 {
    let name = format!("lockstep_ejections_total{{reason=\"{reason}\"}}");
    figures.samples.get(&name).copied().unwrap_or_default()
}

/// The metrics that docs/METRICS.md has a row for.
fn documented() -> BTreeMap<String, Family> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("docs/METRICS.md")).unwrap();
    let mut found = BTreeMap::new();
    for line in text.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, ..] = cells[..] else {
            panic!("{line}");
        };
        let labels = labels.split(", ").filter(|label| !label.is_empty());
        let labels: BTreeSet<String> = labels.map(String::from).collect();
        for name in spelled_out(name.trim_matches('`')) {
            let family = Family {
                kind: kind.into(),
                labels: labels.clone(),
            };
            found.insert(name, family);
        }
    }
    found
}

/// `a_{b,c}` is `a_b` and `a_c`.
fn spelled_out(name: &str) -> Vec<String> {
    let Some((begin, rest)) = name.split_once('{') else {
        return vec![name.into()];
    };
    let (words, end) = rest.split_once('}').unwrap();
    let all = words.split(',').map(|word| format!("{begin}{word}{end}"));
    all.flat_map(|name| spelled_out(&name)).collect()
}

/// The words of a PromQL expression that are metrics, and the labels that it and its legend name.
fn asked_for(panel: &Value, metrics: &mut BTreeSet<String>, labels: &mut BTreeSet<String>) {
    for target in panel["targets"].as_array().into_iter().flatten() {
        let expression = target["expr"].as_str().unwrap();
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words = expression.split(|c| !is_word(c));
        metrics.extend(
            words
                .filter(|w| w.starts_with("lockstep_") || w.starts_with("process_"))
                .map(String::from),
        );
        for (at, _) in expression.match_indices(['=', '!']) {
            let before = expression[..at].rsplit(|c| !is_word(c)).next().unwrap();
            let is_matcher = expression[at..].contains('"') && !before.is_empty();
            labels.extend(is_matcher.then(|| before.to_string()));
        }
        for part in expression.split("by (").skip(1) {
            let list = part.split(')').next().unwrap();
            labels.extend(list.split(", ").map(String::from));
        }
        let legend = target["legendFormat"].as_str().unwrap();
        for part in legend.split("{{").skip(1) {
            labels.insert(part.split("}}").next().unwrap().into());
        }
    }
}

#[test]
fn losses_are_counted_with_their_reason_and_every_metric_is_documented_and_drawn_from() {
    // Given a volume with two replicas under load, of which nothing was lost yet,
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    let create = "--size 32MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    let begin = figures(&cluster, 1);
    assert_eq!((begin.get(PROMOTIONS), begin.get(FAILOVERS)), (0.0, 0.0));
    // when another master is wished for, that is a promotion and no failover;
    cluster.ok(1, "volume promote vm1 --node n2");
    cluster.wait_for(1, "vm1", "has its master on n2", |v| {
        v["master"]["node"] == "n2"
    });
    load.goes_on();
    let now = figures(&cluster, 1);
    assert_eq!((now.get(PROMOTIONS), now.get(FAILOVERS)), (1.0, 0.0));
    // when a replica's process dies, one copy was disconnected, and the volume took a while to go on;
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    let now = figures(&cluster, 1);
    assert_eq!(ejections(&now, "disconnected"), 1.0);
    assert_eq!((now.get(PROMOTIONS), now.get(FAILOVERS)), (1.0, 1.0));
    let took = now.get(FAILOVER_SUM);
    // (as long as a connection may be away at least)
    assert!((0.4..60.0).contains(&took), "{took} s");
    // when it returns, it is brought up to date once;
    cluster.start_node(3);
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    let now = figures(&cluster, 1);
    assert_eq!(now.get("lockstep_syncs_total{result=\"completed\"}"), 1.0);
    assert!(now.get("lockstep_syncs_total{result=\"started\"}") >= 1.0);
    // when the master falls silent, it is put out, another one takes over, and that took as long as the silence at least.
    cluster.freeze(2);
    cluster.wait_for(1, "vm1", "has another master", |v| {
        v["master"]["node"] != "n2" && v["health"] == "degraded"
    });
    load.goes_on();
    let now = figures(&cluster, 1);
    assert_eq!(ejections(&now, "silent") + ejections(&now, "late"), 1.0);
    assert_eq!((now.get(PROMOTIONS), now.get(FAILOVERS)), (2.0, 2.0));
    let silence = now.get(FAILOVER_SUM) - took;
    assert!((2.0..60.0).contains(&silence), "{silence} s");
    let buckets = "lockstep_failover_seconds_bucket{le=\"1\"}";
    assert!(now.get(buckets) < 2.0, "a long one is in no short bucket");
    cluster.thaw(2);
    cluster.wait_for(1, "vm1", "has all copies", |v| {
        copies(v, "in_sync").len() == 3
    });

    // Everything that is said is documented, with its type and its labels, and the other way round;
    let mut said = figures(&cluster, 1).families;
    for (name, family) in figures(&cluster, 2).families {
        said.entry(name).or_default().labels.extend(family.labels);
    }
    let documented = documented();
    for (name, family) in &said {
        assert_eq!(
            documented.get(name),
            Some(family),
            "{name} in docs/METRICS.md"
        );
    }
    for name in documented.keys() {
        assert!(said.contains_key(name), "no node says {name}");
    }
    // and the dashboard asks for nothing else.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(root.join("packaging/grafana-dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let (mut metrics, mut labels) = (BTreeSet::new(), BTreeSet::new());
    for panel in dashboard["panels"].as_array().unwrap() {
        asked_for(panel, &mut metrics, &mut labels);
    }
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let query = variable["query"]["query"].as_str().unwrap_or_default();
        if let Some(arguments) = query.strip_prefix("label_values(") {
            metrics.insert(arguments.split(['{', ',']).next().unwrap().into());
        }
    }
    assert!(metrics.len() > 20, "{metrics:?}");
    for name in metrics {
        let base = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end).filter(|b| said.contains_key(*b)));
        let kind = said.get(base.unwrap_or(&name)).map(|f| f.kind.as_str());
        assert_eq!(
            kind == Some("histogram"),
            base.is_some(),
            "the dashboard asks for {name}, which is {kind:?}"
        );
        assert!(kind.is_some(), "the dashboard asks for {name}");
    }
    // What Prometheus adds: the target, and a bucket's bound.
    let mut known: BTreeSet<String> = ["instance", "le"].map(String::from).into();
    known.extend(said.values().flat_map(|f| f.labels.clone()));
    for label in labels {
        assert!(
            known.contains(&label),
            "the dashboard asks for the label {label}"
        );
    }

    // Killed and started again under its guest, a node takes over from itself, and says how long that took.
    cluster.kill(1);
    let oracle = load.abandon().oracle;
    cluster.start_node(1);
    cluster.wait_for(1, "vm1", "serves again", |v| {
        v["attachment"]["phase"] == "serving"
    });
    let load = Load::start(&socket, Plan::small(), oracle);
    assert_eq!(figures(&cluster, 1).get(FAILOVERS), 1.0);
    assert_eq!(load.finish().failed, 0);
}
