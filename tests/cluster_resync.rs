//! A copy that was lost comes back by itself, under load, over real connections and on real disks.

mod cluster_support;

use std::path::Path;

use cluster_support::client::{Disk, Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually};
use serde_json::Value;

const SIZE: u64 = 32 << 20;

fn a_lost_copy_comes_back_under_load(parent: &Path) {
    // Given a volume with two replicas under load, one of which is lost,
    let mut cluster = Cluster::start_in(parent, 3);
    let create = "--size 32MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    // when its node comes back,
    cluster.start_node(3);
    // then it is in sync again while the load goes on, and no request failed,
    cluster.wait_for(1, "vm1", "has all copies in sync", |v| {
        copies(v, "in_sync") == ["n1", "n2", "n3"]
    });
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    let rules = cluster.rules(1, "vm1");
    for rule in ["6 sync begins", "6 mirrored", "6 in sync"] {
        assert!(rules.iter().any(|r| r == rule), "{rule} in {rules:?}");
    }
    // and all copies are the same.
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), ["n1", "n2", "n3"]);
}

#[test]
fn a_lost_copy_comes_back_under_load_on_disks() {
    a_lost_copy_comes_back_under_load(Path::new("/tmp"));
}

#[test]
fn a_lost_copy_comes_back_under_load_in_memory() {
    a_lost_copy_comes_back_under_load(Path::new("/dev/shm"));
}

#[test]
fn a_copy_beside_the_attachment_is_brought_up_to_date_from_another_node() {
    // Given a volume whose copy on n1 has missed writes,
    let mut cluster = Cluster::start_in(Path::new("/tmp"), 2);
    let create = "--size 32MiB --replicas 1 --master n1";
    let socket = cluster.serve("vm1", create, "--node n2");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    cluster.kill(1);
    cluster.wait_for(2, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    cluster.detach(2, "vm1");
    // when n1 comes back and serves it, with the master on n2 as long as its own copy is not up to date,
    cluster.start_node(1);
    cluster.ok(1, "volume attach vm1 --node n1");
    let serving = cluster.wait_for(1, "vm1", "serves", |v| {
        v["attachment"]["phase"] == "serving"
    });
    let socket = serving["attachment"]["socket"].as_str().unwrap();
    let load = Load::start(Path::new(socket), Plan::small(), outcome.oracle);
    load.goes_on();
    // then its own copy, which has no link but the one in memory, is in sync again.
    cluster.wait_for(1, "vm1", "has both copies in sync", |v| {
        copies(v, "in_sync") == ["n1", "n2"]
    });
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    let rules = cluster.rules(1, "vm1");
    let last = |rule: &str| rules.iter().rposition(|r| r == rule);
    let (begun, promoted) = (last("6 sync begins"), last("5 promote"));
    assert!(begun.is_some() && begun < promoted, "{rules:?}");
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), ["n1", "n2"]);
}

#[test]
fn a_volume_of_one_copy_gets_a_second_one_under_load() {
    // Given a volume without replicas, whose writes go from guest memory to the disk,
    let cluster = Cluster::start_in(Path::new("/tmp"), 2);
    let create = "--size 32MiB --replicas 0 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::mixed(), Oracle::new(SIZE));
    load.goes_on();
    // when it is given one,
    cluster.ok(1, "volume update vm1 --replicas 1");
    // then that is in sync after a while in which no request failed, and both are the same.
    cluster.wait_for(1, "vm1", "has both copies in sync", |v| {
        copies(v, "in_sync") == ["n1", "n2"]
    });
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), ["n1", "n2"]);
}

// ---- syncs that take their time

/// More than is copied between two looks, and before a test that has seen half of it done can act.
const LARGE: u64 = 256 << 20;

/// Writes all of a large volume, so that each chunk of it is to be copied.
fn filled(socket: &Path) -> Oracle {
    let mut oracle = Oracle::new(LARGE);
    Disk::open(socket, 1, 1).fill(&mut oracle);
    oracle
}

/// Few requests, on the first part of the volume.
fn beside_a_sync() -> Plan {
    Plan {
        depth: 2,
        part: 16,
        zeroes: 0,
        ..Plan::small()
    }
}

/// What a volume says of the sync of the copy on node n, when it knows how much there is to do.
fn sync_of(volume: &Value, n: usize) -> Option<Value> {
    let node = format!("n{n}");
    let copies = volume["copies"].as_array()?;
    let copy = copies.iter().find(|c| c["node"] == node.as_str())?;
    let known = copy["sync"]["total_bytes"].as_u64()? > 0;
    known.then(|| copy["sync"].clone())
}

#[test]
fn a_sync_says_how_far_it_is_how_fast_and_how_long_it_will_take() {
    // Given a large volume that gets a second copy under load,
    let cluster = Cluster::start_in(Path::new("/dev/shm"), 2);
    let create = "--size 256MiB --replicas 0 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, beside_a_sync(), filled(&socket));
    cluster.ok(1, "volume update vm1 --replicas 1 --async");
    // when somebody looks, again and again, until it is in sync,
    let metric = |what: &str| cluster.figure(1, &format!("lockstep_volume_sync_{what}"), "vm1");
    let (mut looks, mut figures) = (Vec::new(), Vec::new());
    cluster.wait_for(1, "vm1", "is healthy", |v| {
        looks.extend(sync_of(v, 2));
        figures.push((
            metric("remaining_bytes"),
            metric("total_bytes"),
            metric("bytes_per_second"),
        ));
        v["health"] == "healthy"
    });
    // then what is left falls and never rises, of all that was there,
    let left: Vec<u64> = looks
        .iter()
        .map(|s| s["remaining_bytes"].as_u64().unwrap())
        .collect();
    assert!(left.is_sorted_by(|a, b| a >= b), "{left:?}");
    assert!(
        left.first() > left.last(),
        "it was not seen to fall: {left:?}"
    );
    for look in &looks {
        // The load has written nothing that was a hole.
        assert_eq!(look["total_bytes"], LARGE, "{look}");
        let (rate, eta) = (
            look["bytes_per_second"].as_u64().unwrap(),
            &look["eta_seconds"],
        );
        assert_eq!(eta.is_null(), rate == 0, "{look}");
    }
    let fast = |s: &&Value| s["bytes_per_second"].as_u64() > Some(0);
    let last = looks.iter().rev().find(fast);
    assert!(last.is_some(), "no rate was seen: {looks:?}");
    // the metrics say the same, and nothing when it is over;
    let while_it_ran = figures
        .iter()
        .any(|(left, total, rate)| *left > 0.0 && left < total && *rate > 0.0);
    assert!(while_it_ran, "{figures:?}");
    for what in ["remaining_bytes", "total_bytes", "bytes_per_second"] {
        assert_eq!(metric(what), 0.0, "{what}");
    }
    // and events told of it while it went on.
    let rules = cluster.rules(1, "vm1");
    let place = |rule: &str| rules.iter().position(|r| r == rule);
    let (begun, told, done) = (place("6 mirrored"), place("6 progress"), place("6 in sync"));
    assert!(begun < told && told < done && begun.is_some(), "{rules:?}");
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
}

/// Waits until the sync of the copy on node n is known to be half done.
fn half_way(cluster: &Cluster, n: usize) {
    cluster.wait_for(4, "vm1", &format!("has half a copy on n{n}"), |v| {
        let Some(sync) = sync_of(v, n) else {
            return false;
        };
        let (left, total) = (
            sync["remaining_bytes"].as_u64().unwrap(),
            sync["total_bytes"].as_u64().unwrap(),
        );
        assert!(left * 5 > total, "too fast for this test: {sync}");
        left * 5 < total * 4
    });
}

/// How many syncs of the copy on node n broke off, by the events of the node that serves.
fn broken_off(cluster: &Cluster, n: usize) -> usize {
    let events = cluster.json(4, "events --volume vm1");
    let text = format!("copy on n{n}: ");
    let broke = |e: &&Value| {
        e["rule"] == "6 sync broke off" && e["text"].as_str().is_some_and(|t| t.starts_with(&text))
    };
    events.as_array().unwrap().iter().filter(broke).count()
}

#[test]
fn a_sync_that_is_interrupted_half_way_at_each_end_ends_with_equal_copies() {
    // Given a large volume, served by a node without a copy, that gets a third copy under load,
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 4);
    for n in [3, 4] {
        cluster.ok(1, &format!("node cordon n{n}"));
    }
    let create = "--size 256MiB --replicas 1 --master n1 --failure-mode alwayson";
    let socket = cluster.serve("vm1", create, "--node n4");
    cluster.ok(1, "node uncordon n3");
    let load = Load::start(&socket, beside_a_sync(), filled(&socket));
    cluster.ok(4, "volume update vm1 --replicas 2 --async");
    // when the node of the new copy is lost half-way,
    half_way(&cluster, 3);
    cluster.kill(3);
    // then the sync is broken off, and begins again when the node is back;
    eventually("the sync is broken off", || {
        (broken_off(&cluster, 3) > 0).then_some(())
    });
    load.goes_on();
    cluster.start_node(3);
    // when the copy that it reads from is lost half-way,
    half_way(&cluster, 3);
    cluster.kill(1);
    // then another one is read from,
    cluster.wait_for(4, "vm1", "has another master", |v| {
        v["master"]["node"] == "n2"
    });
    load.goes_on();
    cluster.start_node(1);
    // and when the node that serves is lost, half-way once more, the next process goes on with it.
    cluster.kill(3);
    cluster.start_node(3);
    half_way(&cluster, 3);
    cluster.kill(4);
    let outcome = load.abandon();
    assert_eq!(outcome.failed, 0);
    cluster.start_node(4);
    let load = Load::begin(&socket, beside_a_sync(), outcome.oracle);
    cluster.wait_for(4, "vm1", "is healthy", |v| {
        v["health"] == "healthy" && copies(v, "in_sync").len() == 3
    });
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(4, "vm1");
    assert_eq!(cluster.copies_are_identical(4, "vm1").len(), 3);
}
