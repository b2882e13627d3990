//! A machine moves between nodes while it runs, and its volume with it; here the machine is a front-end that ends on
//! one node and begins on the other.

mod cluster_support;

use std::path::{Path, PathBuf};

use cluster_support::client::{Load, Outcome, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies};

const SIZE: u64 = 32 << 20;
const CREATE: &str = "--size 32MiB --replicas 1 --master n1";

/// A machine that runs on n1 and whose volume is prepared to follow it to n2; its new socket.
fn prepared(cluster: &Cluster) -> (Load, PathBuf) {
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::mixed(), Oracle::new(SIZE));
    load.goes_on();
    let coming = cluster.ok(1, "volume attach vm1 --node n2 --incoming");
    // It goes on undisturbed, and both nodes are named.
    load.goes_on();
    let volume = cluster.volume(1, "vm1");
    assert_eq!(volume["attachment"]["node"], "n1", "{volume}");
    assert_eq!(volume["attachment"]["phase"], "serving", "{volume}");
    assert_eq!(
        volume["attachment"]["successor"]["phase"], "waiting",
        "{volume}"
    );
    (load, PathBuf::from(coming.trim()))
}

fn stop(load: Load) -> Outcome {
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    outcome
}

fn is_served_on(cluster: &Cluster, node: &str) {
    cluster.wait_for(1, "vm1", "is served there alone", |v| {
        let a = &v["attachment"];
        a["node"] == node && a["phase"] == "serving" && a["successor"].is_null()
    });
}

#[test]
fn a_volume_follows_its_machine() {
    let cluster = Cluster::start(2);
    let (load, there) = prepared(&cluster);
    let epoch = || cluster.volume(1, "vm1")["epoch"].as_u64().unwrap();
    let first = epoch();
    // When the machine stops here and runs there,
    let outcome = stop(load);
    let load = Load::start(&there, Plan::mixed(), outcome.oracle);
    // then it is served there, with all that it wrote,
    load.goes_on();
    is_served_on(&cluster, "n2");
    load.goes_on();
    // in an epoch of its own, so that copies refuse what the first one may still have on its way,
    let second = epoch();
    assert!(second > first, "{second} after {first}");
    // the first node listens no more, and back again by the same way.
    let back = cluster.ok(2, "volume attach vm1 --node n1 --incoming");
    load.goes_on();
    let outcome = stop(load);
    let load = Load::start(Path::new(back.trim()), Plan::mixed(), outcome.oracle);
    load.goes_on();
    is_served_on(&cluster, "n1");
    load.goes_on();
    let third = epoch();
    assert!(third > second, "{third} after {second}");
    stop(load);
    let volume = cluster.volume(1, "vm1");
    assert_eq!(copies(&volume, "in_sync"), ["n1", "n2"]);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), ["n1", "n2"]);
}

#[test]
fn a_machine_whose_move_failed_goes_on_where_it_was() {
    let cluster = Cluster::start(2);
    let (load, _) = prepared(&cluster);
    let here = cluster.volume(1, "vm1")["attachment"]["socket"].clone();
    let here = Path::new(here.as_str().unwrap()).to_path_buf();
    // Stopped, and released: nobody is attached by the record.
    let outcome = stop(load);
    cluster.wait_for(1, "vm1", "is released", |v| {
        v["state"] == "clean" && v["attachment"]["phase"] == "waiting" && v["health"] == "healthy"
    });
    // It runs here again,
    let load = Load::start(&here, Plan::mixed(), outcome.oracle);
    load.goes_on();
    assert_eq!(cluster.volume(1, "vm1")["attachment"]["phase"], "serving");
    // also when the move is given up,
    cluster.ok(1, "volume detach vm1 --incoming");
    load.goes_on();
    let outcome = stop(load);
    is_served_on(&cluster, "n1");
    let load = Load::start(&here, Plan::mixed(), outcome.oracle);
    load.goes_on();
    stop(load);
    // and the other node has let go of its socket.
    cluster.detach(1, "vm1");
    cluster.ok(1, "volume attach vm1 --node n2");
}

#[test]
fn a_machine_that_comes_from_a_node_that_died_is_served_when_that_is_certain() {
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve(
        "vm1",
        "--size 32MiB --replicas 2 --master n1 --failure-mode alwayson",
        "--node n1",
    );
    let load = Load::start(&socket, Plan::mixed(), Oracle::new(SIZE));
    load.goes_on();
    let there = cluster.ok(1, "volume attach vm1 --node n2 --incoming");
    // Its node dies before it could release the volume.
    cluster.kill(1);
    let outcome = load.abandon();
    let load = Load::start(Path::new(there.trim()), Plan::mixed(), outcome.oracle);
    load.goes_on();
    cluster.wait_for(2, "vm1", "is served there", |v| {
        v["attachment"]["node"] == "n2" && v["attachment"]["phase"] == "serving"
    });
    stop(load);
}

#[test]
fn what_cannot_move_is_refused() {
    let cluster = Cluster::start(3);
    cluster.ok(1, &format!("volume create vm1 {CREATE}"));
    let refused = |line: &str, code, parts: &[&str]| cluster.run(1, line).refused(code, parts);
    refused(
        "volume attach vm1 --node n2 --incoming",
        11,
        &[
            "is not attached",
            "lockstep volume attach default/vm1 --node n2",
        ],
    );
    cluster.ok(1, "volume attach vm1 --node n1");
    refused(
        "volume attach vm1 --node n1 --incoming",
        11,
        &["attached on n1 already"],
    );
    refused("volume attach vm1 --node n9 --incoming", 8, &["no node n9"]);
    refused(
        "volume detach vm1 --incoming",
        11,
        &["not prepared to move"],
    );
    cluster.ok(1, "volume attach vm1 --node n2 --incoming");
    // Asked again: the same.
    cluster.ok(1, "volume attach vm1 --node n2 --incoming");
    refused(
        "volume attach vm1 --node n3 --incoming",
        11,
        &[
            "prepared to move to n2",
            "volume detach default/vm1 --incoming",
        ],
    );
    cluster.ok(1, "volume detach vm1");
    cluster.ok(1, "volume rm vm1");
}
