//! A detached volume is brought to what its record asks by itself, and gives way to a machine at any moment.

mod cluster_support;

use std::path::Path;
use std::time::Duration;

use cluster_support::client::{Load, Plan};
use cluster_support::net::{Cut, How};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually};

const SIZE: u64 = 32 << 20;
const CREATE: &str = "--size 32MiB --replicas 2 --master n1 --failure-mode alwayson";
/// How long nothing is watched not to happen. Any is good; a longer one sees more.
const WATCHED: Duration = Duration::from_secs(25);

/// A detached volume in which n3 missed writes, and what was written.
fn left_degraded(cluster: &mut Cluster) -> Oracle {
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    cluster.detach(1, "vm1");
    outcome.oracle
}

fn is_whole_and_released(volume: &serde_json::Value) -> bool {
    volume["health"] == "healthy" && volume["state"] == "clean"
}

/// Reads all that was written, through another attachment.
fn holds_what_was_written(cluster: &Cluster, node: usize, oracle: Oracle) {
    cluster.ok(1, &format!("volume attach vm1 --node n{node}"));
    let serving = cluster.wait_for(1, "vm1", "serves", |v| {
        v["attachment"]["phase"] == "serving"
    });
    let socket = serving["attachment"]["socket"].as_str().unwrap();
    let load = Load::start(Path::new(socket), Plan::mixed(), oracle);
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(node, "vm1");
}

#[test]
fn copies_of_a_detached_volume_come_back_when_their_node_does() {
    let mut cluster = Cluster::start(3);
    let oracle = left_degraded(&mut cluster);
    // When the lost node returns, nobody attaches the volume, and the master's node is gone besides,
    cluster.kill(1);
    cluster.start_node(3);
    // then the copy is brought up to date all the same, and the volume is left clean,
    cluster.wait_for(2, "vm1", "has n3 in sync", |v| {
        v["state"] == "clean" && copies(v, "in_sync").contains(&"n3".to_string())
    });
    cluster.start_node(1);
    cluster.wait_for(1, "vm1", "is whole", is_whole_and_released);
    let rules = cluster.rules(2, "vm1");
    assert!(rules.iter().any(|r| r == "6 tend"), "{rules:?}");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
    // with all that was written.
    holds_what_was_written(&cluster, 3, oracle);
}

#[test]
fn a_node_of_which_http_alone_is_not_reached_keeps_its_copies_and_nobody_takes_them_over() {
    // Given a detached volume, a node with room beside its copies, and a short wait for lost copies,
    let mut cluster = Cluster::start_on_a_network(Path::new("/dev/shm"), 4);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    let oracle = load.finish().oracle;
    cluster.detach(1, "vm1");
    let before = cluster.wait_for(1, "vm1", "is whole", is_whole_and_released);
    let others = copies(&before, "in_sync")[1..].to_vec();
    let n: usize = others[0][1..].parse().unwrap();
    cluster.ok(1, "cluster update --replace-after 2s");
    // when nobody can ask one of its nodes over HTTP, and its copies are reached as ever,
    let http = |from| Cut {
        from,
        to: n,
        how: How::Port(5705),
    };
    let from: Vec<usize> = (1..=4).filter(|from| *from != n).collect();
    let network = cluster.network.as_ref().unwrap();
    from.iter().for_each(|from| network.cut(http(*from)));
    eventually("n1 gets no answer", || {
        let list = cluster.json(1, "node ls");
        let nodes = list.as_array().unwrap();
        let it = nodes.iter().find(|v| v["name"] == others[0].as_str());
        (it.unwrap()["health"] == "unreachable").then_some(())
    });
    // then the volume is left alone, by every node and for ever: each attempt would cost three swaps.
    std::thread::sleep(WATCHED);
    let after = cluster.volume(1, "vm1");
    assert_eq!(after["epoch"], before["epoch"], "{after:#}");
    assert_eq!(copies(&after, "in_sync"), copies(&before, "in_sync"));
    // When the node really dies, its copy is made anew elsewhere.
    cluster.kill(n);
    let whole = cluster.wait_for(1, "vm1", "has its copies elsewhere", |v| {
        is_whole_and_released(v) && !copies(v, "in_sync").contains(&others[0])
    });
    assert_eq!(copies(&whole, "in_sync").len(), 3);
    holds_what_was_written(&cluster, 1, oracle);
}

#[test]
fn a_copy_that_was_wiped_while_its_volume_was_detached_is_made_anew() {
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    let outcome = load.finish();
    cluster.detach(1, "vm1");
    cluster.kill(2);
    let file = cluster.copy(2, &cluster.volume(1, "vm1"));
    std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
    cluster.start_node(2);
    cluster.wait_for(1, "vm1", "is whole", is_whole_and_released);
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
    holds_what_was_written(&cluster, 2, outcome.oracle);
}

#[test]
fn a_volume_whose_node_was_given_up_is_reconciled_and_released() {
    // Given an attachment that died with requests under way, on a node that does not come back,
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    cluster.kill(1);
    load.abandon();
    // when it is given up by force,
    cluster.ok(2, "volume detach vm1 --force");
    // then the copies left are compared and the volume is clean.
    cluster.wait_for(2, "vm1", "is released", |v| v["state"] == "clean");
    assert_eq!(cluster.copies_are_identical(2, "vm1"), ["n2", "n3"]);
}

#[test]
fn a_volume_that_is_tended_is_attached_and_removed_like_any_other() {
    let mut cluster = Cluster::start(3);
    let oracle = left_degraded(&mut cluster);
    // Again and again, while the returned copy is brought up to date, on another node than the one that tends it.
    cluster.start_node(3);
    for node in [2, 1, 3] {
        cluster.ok(1, &format!("volume attach vm1 --node n{node}"));
        cluster.ok(1, "volume detach vm1");
    }
    cluster.wait_for(1, "vm1", "is whole", is_whole_and_released);
    holds_what_was_written(&cluster, 1, oracle);
    cluster.kill(3);
    cluster.ok(1, "volume update vm1 --replicas 1");
    cluster.ok(1, "volume rm vm1 --force");
    cluster.start_node(3);
    cluster.nothing_was_made(1);
}
