//! Volumes that grow: under load, with copies that are lost or have no room meanwhile, and while they are detached.

mod cluster_support;

use std::fs;
use std::path::Path;

use cluster_support::client::{Disk, KIB, Load, MIB, Plan};
use cluster_support::disks::{SmallDisk, own_mounts};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually};
use lockstep::copy::layout::data_len;
use serde_json::{Value, json};

const OLD: u64 = 32 << 20;
const NEW: u64 = 96 << 20;
const CREATE: &str = "--size 32MiB --replicas 2 --master n1 --failure-mode alwayson";

fn length(cluster: &Cluster, n: usize) -> u64 {
    let file = cluster.copy(n, &cluster.volume(1, "vm1"));
    fs::metadata(file).unwrap().len()
}

fn is_whole(volume: &Value) -> bool {
    volume["health"] == "healthy" && volume["size"] == NEW && volume["growing_to"].is_null()
}

/// One request of the same connection, at `offset`: what it came to.
fn write(disk: &mut Disk, offset: u64, byte: u8) -> i32 {
    disk.buffer(0, 4 * KIB).fill(byte);
    disk.write(0, offset, 4 * KIB);
    disk.finish()
}

fn read(disk: &mut Disk, offset: u64) -> (i32, Vec<u8>) {
    disk.read(0, offset, 4 * KIB);
    let ret = disk.finish();
    (ret, disk.buffer(0, 4 * KIB).to_vec())
}

/// Reads all that was written, through another attachment, and that what is new is zeros but for `but`.
fn holds(cluster: &Cluster, node: usize, mut oracle: Oracle) {
    let attached = cluster.ok(1, &format!("volume attach vm1 --node n{node}"));
    let socket = Path::new(attached.trim());
    let mut disk = Disk::open(socket, 1, 1);
    assert_eq!(disk.capacity, NEW);
    for offset in (OLD..NEW).step_by(8 * MIB) {
        assert_eq!(read(&mut disk, offset), (0, vec![0; 4 * KIB]), "{offset}");
    }
    drop(disk);
    oracle.grow(NEW);
    let load = Load::start(socket, Plan::mixed(), oracle);
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(node, "vm1");
}

#[test]
fn a_connected_machine_can_use_what_is_new_as_soon_as_the_command_returns_and_not_before() {
    let cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let mut disk = Disk::open(&socket, 1, 1);
    assert_eq!(write(&mut disk, OLD - 4 * KIB as u64, 1), 0);
    for beyond in [OLD - 2 * KIB as u64, OLD, NEW - 4 * KIB as u64] {
        assert!(write(&mut disk, beyond, 2) < 0, "{beyond}");
        assert!(read(&mut disk, beyond).0 < 0, "{beyond}");
    }
    cluster.ok(2, "volume update vm1 --size 96MiB");
    let volume = cluster.volume(1, "vm1");
    assert!(is_whole(&volume), "{volume:#}");
    for n in 1..=3 {
        assert_eq!(length(&cluster, n), data_len(NEW));
    }
    // What was refused was written nowhere.
    for offset in [OLD, OLD + 5 * MIB as u64, NEW - 4 * KIB as u64] {
        assert_eq!(read(&mut disk, offset), (0, vec![0; 4 * KIB]), "{offset}");
        assert_eq!(write(&mut disk, offset, 3), 0);
        assert_eq!(read(&mut disk, offset), (0, vec![3; 4 * KIB]));
    }
    assert!(write(&mut disk, NEW, 4) < 0);
    drop(disk);
    let rules = cluster.rules(1, "vm1");
    assert!(rules.iter().any(|r| r == "11.4 grow"), "{rules:?}");
    // It only grows.
    let refused = cluster.run(1, "volume update vm1 --size 64MiB");
    refused.refused(10, &["only grows", "96 MiB"]);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn a_copy_that_is_lost_while_the_volume_grows_follows_when_it_is_back() {
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(OLD));
    load.goes_on();
    // Silent, so that the request to make room stays unanswered until its copy is given up,
    cluster.freeze(2);
    cluster.ok(1, "volume update vm1 --size 96MiB");
    let volume = cluster.volume(1, "vm1");
    assert_eq!(
        (&volume["size"], copies(&volume, "in_sync")),
        (&json!(NEW), vec!["n1".into(), "n3".into()])
    );
    assert_eq!(length(&cluster, 2), data_len(OLD));
    load.goes_on();
    // it makes room when it is brought up to date.
    cluster.thaw(2);
    cluster.wait_for(1, "vm1", "is whole", is_whole);
    assert_eq!(length(&cluster, 2), data_len(NEW));
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
    holds(&cluster, 2, outcome.oracle);
}

#[test]
fn the_node_that_serves_the_volume_may_die_at_any_moment_of_it() {
    let mut cluster = Cluster::start(3);
    for (round, wait_ms) in [0, 3, 8, 20, 60].into_iter().enumerate() {
        let name = format!("vm{round}");
        cluster.serve(&name, CREATE, "--node n1");
        cluster.ok(2, &format!("volume update {name} --size 96MiB --async"));
        std::thread::sleep(std::time::Duration::from_millis(wait_ms));
        cluster.kill(1);
        // Whatever was done, the size that the record says is one that each copy in sync has room for.
        let volume = cluster.volume(2, &name);
        let size = volume["size"].as_u64().unwrap();
        for n in copies(&volume, "in_sync") {
            let file = cluster.copy(n[1..].parse().unwrap(), &volume);
            assert!(
                fs::metadata(file).unwrap().len() >= size,
                "{n}, {wait_ms} ms"
            );
        }
        // And the next attachment does what is left to do.
        cluster.start_node(1);
        cluster.wait_for(1, &name, "has grown", is_whole);
        cluster.detach(1, &name);
        assert_eq!(cluster.copies_are_identical(1, &name).len(), 3);
        cluster.ok(1, &format!("volume rm {name}"));
    }
}

#[test]
fn a_detached_volume_grows_without_a_machine() {
    let cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(OLD));
    load.goes_on();
    let outcome = load.finish();
    cluster.detach(1, "vm1");
    cluster.ok(3, "volume update vm1 --size 96MiB");
    let volume = cluster.volume(1, "vm1");
    assert_eq!(
        (&volume["size"], &volume["attachment"]),
        (&json!(NEW), &Value::Null)
    );
    cluster.wait_for(1, "vm1", "is released", |v| v["state"] == "clean");
    holds(&cluster, 3, outcome.oracle);
}

#[test]
fn a_copy_without_room_keeps_the_volume_as_it_is_and_nobody_is_put_out() {
    own_mounts();
    let parent = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::empty(parent.path());
    // Four terabytes take 62 MB of bitmaps; n2 has less.
    let small = SmallDisk::mount(&cluster.data_dir(2), 256 << 20);
    for n in 1..=2 {
        cluster.start_node(n);
    }
    let socket = cluster.serve("vm1", "--size 8MiB --replicas 1 --master n1", "--node n1");
    small.resize(32 << 20);
    let volume = cluster.volume(1, "vm1");
    assert_eq!(copies(&volume, "in_sync"), ["n1", "n2"]);
    let load = Load::start(&socket, Plan::small(), Oracle::new(8 << 20));
    load.goes_on();
    let refused = cluster.run(1, "volume update vm1 --size 4TiB");
    refused.refused(11, &["stays at 8 MiB", "n2", "no room"]);
    let volume = cluster.volume(1, "vm1");
    assert_eq!(
        (&volume["health"], &volume["size"]),
        (&json!("healthy"), &json!(8 << 20))
    );
    let shown = cluster.ok(1, "volume inspect vm1");
    assert!(shown.contains("cannot grow to 4 TiB"), "{shown}");
    load.goes_on();
    // With space there, the same command is enough.
    small.resize(256 << 20);
    cluster.ok(1, "volume update vm1 --size 4TiB");
    eventually("the volume is as asked for", || {
        let volume = cluster.volume(1, "vm1");
        (volume["size"] == 4_u64 << 40 && volume["growth_refused"].is_null()).then_some(())
    });
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
}
