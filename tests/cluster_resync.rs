//! A copy that was lost comes back by itself, under load, over real connections and on real disks.

mod cluster_support;

use std::path::Path;

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies};

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
    // when n1 comes back and serves it, with the master on n2,
    cluster.start_node(1);
    cluster.ok(1, "volume attach vm1 --node n1");
    let serving = cluster.wait_for(1, "vm1", "serves", |v| {
        v["attachment"]["phase"] == "serving"
    });
    assert_eq!(serving["master"]["node"], "n2");
    let socket = serving["attachment"]["socket"].as_str().unwrap();
    let load = Load::start(Path::new(socket), Plan::small(), outcome.oracle);
    load.goes_on();
    // then its own copy, which has no link but the one in memory, is in sync again.
    cluster.wait_for(1, "vm1", "has both copies in sync", |v| {
        copies(v, "in_sync") == ["n1", "n2"]
    });
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
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
