//! A real guest that moves between QEMU processes in the middle of its reads and writes. The volume stays where it is; what
//! moves is the guest's memory, and the front-end copies of that only what its processors or the disk have marked.

mod cluster_support;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use cluster_support::qemu::{Qemu, cpus, programs};
use cluster_support::{Cluster, eventually};
use serde_json::json;

/// Guest memory in KiB: not a multiple of 256. QEMU 7.2 takes the dirty bits of a block of memory that is by a shorter way
/// than it should, and then misses writes of an emulated processor: a guest on QEMU's own disk does not survive that either.
const MEMORY: &str = "524416K";
/// Times that the guest moves.
const MOVES: usize = 4;
/// Bytes a second at which memory is copied while the guest goes on, and the longest pause in milliseconds that the copy of
/// the rest may take: too little for a guest that is busy, so that the copy goes round and round; far too little; and enough
/// for any.
const SLOW: (u64, u64) = (24 << 20, 1);
const HELD: (u64, u64) = (1 << 20, 1);
const FAST: (u64, u64) = (4 << 30, 2000);

fn start(program: &Path, dir: &Path, number: usize, socket: &Path) -> Qemu {
    // Linux uses a queue for each of its processors, of those that there are.
    let queues = cpus(program);
    let mut arguments = vec!["--run", "cached", "--mem", MEMORY];
    arguments.extend(["--cpus", queues, "--queues", queues]);
    arguments.extend((number > 0).then_some("--incoming"));
    Qemu::start(program, dir, number, socket, &arguments)
}

/// What the node says of each switch of the log.
fn switches(cluster: &Cluster) -> Vec<bool> {
    let log = cluster.log(1);
    let said = log
        .lines()
        .filter_map(|line| line.split_once("logging of writes to guest memory is "));
    said.map(|(_, what)| what == "on").collect()
}

#[test]
fn a_guest_that_moves_finds_in_its_memory_what_the_disk_wrote_there() {
    programs().iter().for_each(|qemu| moves_on_one_socket(qemu));
}

fn moves_on_one_socket(program: &Path) {
    // Given a guest that fills its page cache from a volume again and again,
    let cluster = Cluster::start(1);
    let socket = cluster.serve(
        "vm1",
        "--size 64MiB --replicas 0 --master n1",
        "--node n1 --num-queues 2",
    );
    let dir = cluster.dir.path();
    let mut guest = start(program, dir, 0, &socket);
    guest.works(4);
    // When a migration begins and is given up, then nothing is logged any more, and the guest notices nothing;
    guest.speed(SLOW);
    guest.ask("migrate", json!({"uri": "exec:cat > /dev/null"}));
    guest.migration("active");
    guest.works(4);
    assert_eq!(switches(&cluster), [true]);
    guest.ask("migrate_cancel", json!({}));
    guest.migration("cancelled");
    eventually("the log is off", || {
        (switches(&cluster) == [true, false]).then_some(())
    });
    guest.works(4);
    // when it moves, copied while it works, to a process that connects to the same socket,
    for number in 1..=MOVES {
        let state = dir.join("state");
        guest.speed(SLOW);
        let uri = format!("exec:cat > {}", state.display());
        guest.ask("migrate", json!({"uri": uri}));
        guest.works(4 + number);
        guest.speed(FAST);
        guest.migration("completed");
        println!(
            "QEMU was at rest for {}",
            guest.ask("query-migrate", json!({}))["downtime"]
        );
        drop(guest);
        let next = start(program, dir, number, &socket);
        guest = next;
        let uri = format!("exec:cat {}", state.display());
        guest.ask("migrate-incoming", json!({"uri": uri}));
        // then it goes on, and finds every byte as it is on the disk.
        guest.works(4);
    }
    let mut control = UnixStream::connect(&guest.control).unwrap();
    control.write_all(b"stop\n").unwrap();
    eventually("the guest's verdict", || {
        guest.goes_on();
        guest.console().contains("GUEST-OK").then_some(())
    });
    eventually("the guest switches off", || guest.child.try_wait().unwrap());
    assert_eq!(
        switches(&cluster).iter().filter(|on| **on).count(),
        MOVES + 1
    );
}

/// The node whose attachment is in the spec, once it serves.
fn is_served_on(cluster: &Cluster, node: &str) {
    cluster.wait_for(1, "vm1", "is served where its guest runs", |v| {
        let a = &v["attachment"];
        a["node"] == node && a["phase"] == "serving" && a["successor"].is_null()
    });
}

/// Milliseconds from the moment that one node began to let go of the volume to the one that another served it.
fn handed_over(cluster: &Cluster) -> i64 {
    let events = cluster.json(1, "events --volume vm1");
    let last = |to: &str| {
        let mut all = events.as_array().unwrap().iter().rev();
        let event = all.find(|e| e["to"] == to).unwrap();
        let time = event["time"].as_str().unwrap();
        // …T12:34:56.789Z
        let clock = time.split('T').nth(1).unwrap().trim_end_matches('Z');
        let parts: Vec<f64> = clock.split(':').map(|p| p.parse().unwrap()).collect();
        ((parts[0] * 60.0 + parts[1]) * 60_000.0 + parts[2] * 1000.0) as i64
    };
    (last("serving") - last("leaving")).rem_euclid(86_400_000)
}

#[test]
fn a_guest_that_moves_to_another_node_takes_its_volume_along() {
    programs()
        .iter()
        .for_each(|qemu| moves_to_another_node(qemu));
}

fn moves_to_another_node(program: &Path) {
    // Given a guest at work on n1, whose volume has a copy on each node,
    let cluster = Cluster::start(2);
    let mut socket = cluster.serve(
        "vm1",
        "--size 64MiB --replicas 1 --master n1",
        "--node n1 --num-queues 2",
    );
    let dir = cluster.dir.path();
    let mut guest = start(program, dir, 0, &socket);
    guest.works(4);
    // when it moves to n2, and back,
    for (number, node) in [(1, 2), (2, 1)] {
        let line = format!("volume attach vm1 --node n{node} --incoming");
        socket = PathBuf::from(cluster.ok(1, &line).trim());
        let mut there = start(program, dir, number, &socket);
        let uri = format!("unix:{}", dir.join(format!("way{number}")).display());
        there.ask("migrate-incoming", json!({"uri": uri}));
        guest.speed(HELD);
        guest.ask("migrate", json!({"uri": uri}));
        guest.works(2);
        // and the programs of both nodes are replaced meanwhile,
        for n in [1, 2] {
            let view = cluster.json(n, "node upgrade");
            let fate = [&view["state"], &view["lost"]];
            assert_eq!(fate, [&json!("done"), &json!(0)], "{view}");
        }
        guest.works(2);
        guest.migration("active");
        guest.speed(FAST);
        guest.migration("completed");
        println!(
            "QEMU was at rest for {}",
            guest.ask("query-migrate", json!({}))["downtime"]
        );
        // then it goes on there and finds every byte,
        there.works(4);
        is_served_on(&cluster, &format!("n{node}"));
        println!("the volume was at rest for {} ms", handed_over(&cluster));
        guest = there;
    }
    let mut control = UnixStream::connect(&guest.control).unwrap();
    control.write_all(b"stop\n").unwrap();
    eventually("the guest's verdict", || {
        guest.goes_on();
        guest.console().contains("GUEST-OK").then_some(())
    });
    eventually("the guest switches off", || guest.child.try_wait().unwrap());
    // and both copies are the same.
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), ["n1", "n2"]);
}

#[test]
fn a_guest_that_moves_while_its_volume_waits_sees_a_pause_and_no_error() {
    programs()
        .iter()
        .for_each(|qemu| moves_while_its_volume_waits(qemu));
}

fn moves_while_its_volume_waits(program: &Path) {
    // Given a guest whose volume serves only while all copies are there, and whose replica's node has died,
    let mut cluster = Cluster::start(3);
    cluster.ok(1, "node cordon n2");
    let socket = cluster.serve(
        "vm1",
        "--size 64MiB --replicas 1 --master n1 --failure-mode hard --suspend-deadline 40s",
        "--node n1 --num-queues 2",
    );
    let dir = cluster.dir.path().to_path_buf();
    let mut guest = start(program, &dir, 0, &socket);
    guest.works(4);
    let there = cluster.ok(1, "volume attach vm1 --node n2 --incoming");
    let mut there = start(program, &dir, 1, Path::new(there.trim()));
    let uri = format!("unix:{}", dir.join("way").display());
    there.ask("migrate-incoming", json!({"uri": uri}));
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "waits", |v| {
        v["health"] == "suspended" && v["attachment"]["inflight"].as_u64() > Some(0)
    });
    // when it moves to a third node, then its requests do not end, and QEMU takes no region along:
    guest.speed(FAST);
    guest.ask("migrate", json!({"uri": uri}));
    guest.migration("completed");
    assert!(
        cluster
            .log(1)
            .contains("requests unanswered, of which 0 were failed now")
    );
    // they go along in its ring, wait until the first node has let go of them, and are answered where it is now.
    cluster.start_node(3);
    there.works(8);
    is_served_on(&cluster, "n2");
    drop(guest);
    there.finish();
    cluster.wait_for(1, "vm1", "is whole", |v| v["health"] == "healthy");
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), ["n1", "n3"]);
}
