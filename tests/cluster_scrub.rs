//! `volume scrub` with real node processes: equal copies under load are found equal, a byte that changed behind a node's back
//! is found, named and repaired, and whatever dies in the middle does no harm.

mod cluster_support;

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use cluster_support::client::{Disk, Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, Done, copies, lockstep};
use rusqlite::Connection;
use serde_json::Value;

const SIZE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;
/// A quiet load stays below this: what is above is written once, so that what rots there is not healed by a write.
const QUIET: u64 = SIZE / 2;
const VOLUME: &str = "--size 64MiB --replicas 2 --master n1 --failure-mode alwayson";

/// A volume with copies on n1, n2, n3, full of data, served by n1.
fn filled(cluster: &Cluster) -> (PathBuf, Oracle) {
    let socket = cluster.serve("vm1", VOLUME, "--node n1");
    cluster.wait_for(1, "vm1", "has all copies", |v| {
        copies(v, "in_sync").len() == 3
    });
    let mut oracle = Oracle::new(SIZE);
    let mut disk = Disk::open(&socket, 1, 1);
    disk.fill(&mut oracle);
    disk.flush(0);
    assert_eq!(disk.finish(), 0);
    (socket, oracle)
}

fn quiet() -> Plan {
    Plan {
        part: SIZE / QUIET,
        ..Plan::small()
    }
}

/// Changes `len` bytes of the copy on node n, as a disk would: no process of ours writes them.
fn rot(cluster: &Cluster, n: usize, offset: u64, len: usize) {
    let path = cluster.copy(n, &cluster.volume(1, "vm1"));
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes.iter_mut().for_each(|b| *b ^= 0x55);
    file.write_all_at(&bytes, offset).unwrap();
    // The nodes read past the page cache.
    file.sync_all().unwrap();
}

fn scrub(cluster: &Cluster, n: usize, flags: &str) -> (Done, Value) {
    let done = cluster.run(n, &format!("volume scrub vm1 {flags} -o json"));
    let report = serde_json::from_str(&done.out).unwrap_or(Value::Null);
    (done, report)
}

/// Begins a scrub that somebody waits for.
fn begin(cluster: &Cluster, n: usize) -> Child {
    let host = format!("unix:{}", cluster.run_dir(n).join("api.sock").display());
    lockstep()
        .env("LOCKSTEP_HOST", host)
        .args(["volume", "scrub", "vm1", "-o", "json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A scrub by n1 that somebody waits for at node n, and that stands: n3 does, and while the registry takes no change nobody
/// can put it out. With what holds the registry.
fn standing(cluster: &mut Cluster, n: usize) -> (Child, Connection) {
    let scrub = |cluster: &Cluster| {
        let status: Value =
            serde_json::from_str(&http(cluster, 1, "/api/v1/local/status")).unwrap();
        status["attachments"][0]["scrub"].clone()
    };
    for _ in 0..20 {
        let mut child = begin(cluster, n);
        while child.try_wait().unwrap().is_none() && scrub(cluster)["state"] != "running" {
            std::thread::sleep(Duration::from_millis(2));
        }
        cluster.freeze(3);
        let registry = Connection::open(cluster.registry()).unwrap();
        registry.busy_timeout(Duration::from_secs(5)).unwrap();
        registry.execute_batch("BEGIN IMMEDIATE").unwrap();
        // What n3 had answered is taken in.
        std::thread::sleep(Duration::from_millis(500));
        if scrub(cluster)["state"] == "running" {
            return (child, registry);
        }
        // It was over sooner.
        drop(registry);
        cluster.thaw(3);
        assert_eq!(ended(child).code, 0);
        cluster.wait_for(1, "vm1", "has all copies", |v| {
            copies(v, "in_sync").len() == 3
        });
    }
    panic!("every scrub was over before a node could be stopped");
}

fn ended(child: Child) -> Done {
    let output = child.wait_with_output().unwrap();
    Done {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn all_is_well(cluster: &Cluster, load: Load, nodes: usize) {
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), nodes);
}

/// What a node's HTTP port answers.
fn http(cluster: &Cluster, n: usize, path: &str) -> String {
    let mut stream = TcpStream::connect(format!("{}:5705", cluster.ip(n))).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: x\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (_, body) = text.split_once("\r\n\r\n").unwrap();
    body.into()
}

fn metric(cluster: &Cluster, n: usize, name: &str) -> u64 {
    let text = http(cluster, n, "/metrics");
    let labels = format!("{name}{{namespace=\"default\",volume=\"vm1\"}} ");
    let line = text.lines().find_map(|l| l.strip_prefix(&labels));
    let line = line.unwrap_or_else(|| panic!("no {labels} in {text}"));
    line.parse::<f64>().unwrap() as u64
}

#[test]
fn equal_copies_are_found_equal_under_load() {
    let cluster = Cluster::start(3);
    let (socket, oracle) = filled(&cluster);
    let load = Load::start(&socket, Plan::mixed(), oracle);
    load.goes_on();
    // Whichever node is asked, and with repairs allowed, too.
    for (n, flags) in [(1, ""), (2, ""), (3, "--repair")] {
        let (done, report) = scrub(&cluster, n, flags);
        assert_eq!(done.code, 0, "{done:?}");
        assert_eq!(report["state"], "done");
        assert_eq!(report["node"], "n1");
        assert_eq!(report["differing_bytes"], 0, "{report:#}");
        assert_eq!(report["done_bytes"], SIZE);
        assert!(report["compared_bytes"].as_u64().unwrap() > SIZE / 2);
        load.goes_on();
    }
    assert!(metric(&cluster, 1, "lockstep_scrub_chunks_total") > 1000);
    assert_eq!(metric(&cluster, 1, "lockstep_scrub_differences_total"), 0);
    all_is_well(&cluster, load, 3);
}

#[test]
fn a_byte_that_changed_behind_a_nodes_back_is_found_named_and_repaired_under_load() {
    let cluster = Cluster::start(3);
    let (socket, oracle) = filled(&cluster);
    let load = Load::start(&socket, quiet(), oracle);
    load.goes_on();
    // Given one byte of n2's copy, and 10,000 of n3's, that are not what was written,
    let (one, many) = (QUIET + 5 * MIB + 12_345, QUIET + 9 * MIB + 4096);
    rot(&cluster, 2, one, 1);
    rot(&cluster, 3, many, 10_000);
    // when the copies are compared,
    let (done, report) = scrub(&cluster, 1, "");
    // then it fails, and says where, and who is alone with it.
    assert_eq!(done.code, 11, "{done:?}");
    assert!(
        done.err.contains("16 KiB of volume default/vm1 differ"),
        "{done:?}"
    );
    let found = report["differences"].as_array().unwrap();
    let place = |d: &Value| (d["offset"].as_u64().unwrap(), d["length"].as_u64().unwrap());
    assert_eq!(
        found.iter().map(place).collect::<Vec<_>>(),
        [(one / 4096 * 4096, 4096), (many, 3 * 4096)],
        "{report:#}"
    );
    let agree = |d: &Value| d["agree"].to_string();
    assert_eq!(agree(&found[0]), r#"[["n1","n3"],["n2"]]"#);
    assert_eq!(agree(&found[1]), r#"[["n1","n2"],["n3"]]"#);
    assert!(found.iter().all(|d| d["repaired"] == false));
    let shown = cluster.ok(1, "volume inspect vm1");
    assert!(
        shown.contains("16 KiB not the same on every copy"),
        "{shown}"
    );
    assert!(
        cluster
            .rules(1, "vm1")
            .iter()
            .any(|r| r == "11.6 difference"),
        "no event"
    );
    // Nothing was changed by that,
    let (done, _) = scrub(&cluster, 2, "");
    assert_eq!(done.code, 11, "{done:?}");
    // until it is asked for: then all copies are the same, to the last byte, and as the load wrote them.
    let (done, report) = scrub(&cluster, 1, "--repair");
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(report["repaired_bytes"], 4 * 4096, "{report:#}");
    let (done, report) = scrub(&cluster, 1, "");
    assert_eq!(
        (done.code, &report["differing_bytes"]),
        (0, &Value::from(0)),
        "{done:?}"
    );
    assert_eq!(metric(&cluster, 1, "lockstep_scrub_repaired_total"), 4);
    all_is_well(&cluster, load, 3);
}

#[test]
fn what_the_others_hold_is_kept_by_making_one_of_them_the_master_first() {
    let cluster = Cluster::start(3);
    let (socket, oracle) = filled(&cluster);
    // Given a master whose disk holds something else than was written,
    let at = QUIET + 3 * MIB;
    rot(&cluster, 1, at, 4096);
    let (done, report) = scrub(&cluster, 1, "");
    assert_eq!(done.code, 11, "{done:?}");
    assert_eq!(
        report["differences"][0]["agree"].to_string(),
        r#"[["n1"],["n2","n3"]]"#
    );
    assert!(done.err.contains("volume promote default/vm1"), "{done:?}");
    // when one of those that agree becomes the master, and the copies are repaired,
    cluster.ok(1, "volume promote vm1 --node n2");
    let (done, _) = scrub(&cluster, 1, "--repair");
    assert_eq!(done.code, 0, "{done:?}");
    // then what was written is what is read.
    let load = Load::start(&socket, Plan::mixed(), oracle);
    all_is_well(&cluster, load, 3);
}

#[test]
fn a_detached_volume_is_compared_and_released() {
    let mut cluster = Cluster::start(3);
    let (_, oracle) = filled(&cluster);
    cluster.detach(1, "vm1");
    let (done, report) = scrub(&cluster, 3, "");
    assert_eq!(
        (done.code, &report["state"]),
        (0, &Value::from("done")),
        "{done:?}"
    );
    // One copy rots while its node is down, and that is not noticed when it is back.
    assert!(cluster.stop(2).success());
    rot(&cluster, 2, 7 * MIB, 512);
    cluster.start_node(2);
    let (done, report) = scrub(&cluster, 3, "");
    assert_eq!(done.code, 11, "{done:?}");
    assert_eq!(report["differences"][0]["offset"], 7 * MIB);
    let (done, _) = scrub(&cluster, 3, "--repair");
    assert_eq!(done.code, 0, "{done:?}");
    cluster.wait_for(1, "vm1", "is released", |v| {
        v["state"] == "clean" && v["attachment"].is_null()
    });
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
    cluster.ok(1, "volume attach vm1");
    let serving = cluster.wait_for(1, "vm1", "serves", |v| {
        v["attachment"]["phase"] == "serving"
    });
    let socket = serving["attachment"]["socket"].as_str().unwrap();
    let load = Load::start(Path::new(socket), Plan::mixed(), oracle);
    all_is_well(&cluster, load, 3);
}

#[test]
fn a_replica_that_dies_in_the_middle_is_left_out_and_said_so() {
    let mut cluster = Cluster::start(3);
    let (socket, oracle) = filled(&cluster);
    let load = Load::start(&socket, Plan::small(), oracle);
    load.goes_on();
    // Given a scrub that stands, since a replica does,
    let (waiting, registry) = standing(&mut cluster, 1);
    // when that replica dies, and can be put out,
    cluster.kill(3);
    drop(registry);
    // then the others are compared to the end, and the report says which one was not.
    let done = ended(waiting);
    assert_eq!(done.code, 0, "{done:?}");
    let report: Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(report["left_out"].to_string(), r#"["n3"]"#, "{report:#}");
    assert_eq!(report["done_bytes"], SIZE);
    load.goes_on();
    cluster.start_node(3);
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    all_is_well(&cluster, load, 3);
}

#[test]
fn a_scrub_whose_node_dies_is_to_be_begun_anew() {
    let mut cluster = Cluster::start(3);
    let (socket, oracle) = filled(&cluster);
    let load = Load::start(&socket, Plan::small(), oracle);
    // Given a scrub on n1 that somebody waits for at n2, and that stands, since a replica does,
    let (waiting, registry) = standing(&mut cluster, 2);
    // when n1 dies in the middle, and comes back,
    cluster.kill(1);
    let oracle = load.abandon().oracle;
    drop(registry);
    cluster.thaw(3);
    cluster.start_node(1);
    // then whoever waits is told to try again,
    let done = ended(waiting);
    assert_eq!(done.code, 12, "{done:?}");
    assert!(
        done.err.contains("broke off") && done.err.contains("volume scrub default/vm1"),
        "{done:?}"
    );
    // and it has left nothing that stands in the way of that.
    let serving = cluster.wait_for(1, "vm1", "serves with all copies", |v| {
        v["attachment"]["phase"] == "serving" && copies(v, "in_sync").len() == 3
    });
    let (done, report) = scrub(&cluster, 2, "");
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(report["differing_bytes"], 0);
    let socket = serving["attachment"]["socket"].as_str().unwrap();
    let load = Load::start(Path::new(socket), Plan::mixed(), oracle);
    all_is_well(&cluster, load, 3);
}

#[test]
fn a_scrub_goes_on_when_nobody_waits_for_it_any_more() {
    let mut cluster = Cluster::start(3);
    let (socket, oracle) = filled(&cluster);
    let load = Load::start(&socket, Plan::small(), oracle);
    let (mut waiting, registry) = standing(&mut cluster, 2);
    let id = cluster.volume(2, "vm1")["scrub"]["id"].clone();
    // When whoever waits has enough of that,
    waiting.kill().unwrap();
    waiting.wait().unwrap();
    drop(registry);
    cluster.thaw(3);
    // then the scrub comes to its end,
    let ended = cluster.wait_for(1, "vm1", "has been scrubbed", |v| {
        v["scrub"]["state"] == "done"
    });
    assert_eq!(
        (&ended["scrub"]["id"], &ended["scrub"]["differing_bytes"]),
        (&id, &Value::from(0))
    );
    cluster.wait_for(1, "vm1", "is whole", |v| v["health"] == "healthy");
    all_is_well(&cluster, load, 3);
}
