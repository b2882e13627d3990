//! A node is emptied under load, over real connections and on real disks: no request fails, and nothing is left on it.

mod cluster_support;

use std::path::Path;

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually, lockstep};
use serde_json::Value;

const SIZE: u64 = 32 << 20;

/// The volumes that have files on node n.
fn files(cluster: &Cluster, n: usize) -> usize {
    std::fs::read_dir(cluster.data_dir(n).join("volumes")).map_or(0, Iterator::count)
}

/// Reads all that was written, through another attachment.
fn holds_what_was_written(cluster: &Cluster, name: &str, node: usize, oracle: Oracle) {
    cluster.ok(1, &format!("volume attach {name} --node n{node}"));
    let serving = cluster.wait_for(1, name, "serves", |v| v["attachment"]["phase"] == "serving");
    let socket = serving["attachment"]["socket"].as_str().unwrap();
    let load = Load::start(Path::new(socket), Plan::mixed(), oracle);
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(node, name);
}

#[test]
fn every_copy_leaves_a_node_under_load_masters_and_detached_volumes_too() {
    // Given a node that has a master, a replica, the only copy of a volume, and a copy of a detached one,
    let mut cluster = Cluster::start(4);
    cluster.ok(1, "node cordon n4");
    let plans = [
        ("master", "--replicas 1 --master n3", "--node n1"),
        ("replica", "--replicas 2 --master n1", "--node n2"),
        ("only", "--replicas 0 --master n3", "--node n1"),
        // Its machine runs on the node that goes; its copies go all the same.
        ("here", "--replicas 1 --master n3", "--node n3"),
    ];
    let loads: Vec<Load> = plans
        .iter()
        .map(|(name, create, attach)| {
            let create = format!("--size 32MiB {create}");
            let socket = cluster.serve(name, &create, attach);
            Load::start(&socket, Plan::small(), Oracle::new(SIZE))
        })
        .collect();
    cluster.ok(
        1,
        "volume create resting --size 32MiB --replicas 1 --master n3",
    );
    for load in &loads {
        load.goes_on();
    }
    cluster.ok(1, "node uncordon n4");
    // when it is drained,
    let done = cluster.run(1, "node drain n3");
    // then that succeeds, it shows what it does, and says which machine has to go by other means;
    assert_eq!((done.code, done.out.as_str()), (0, "n3\n"), "{done:?}");
    assert!(done.err.contains("copies left: default/"), "{done:?}");
    assert!(
        done.err.contains(
            "note: node n3 still serves default/here: stop or migrate its virtual machine"
        ),
        "{done:?}"
    );
    for load in &loads {
        load.goes_on();
    }
    // no request failed, all volumes have their copies elsewhere, with the same bytes;
    let oracles: Vec<Oracle> = loads
        .into_iter()
        .map(|load| {
            let outcome = load.finish();
            assert_eq!(outcome.failed, 0);
            outcome.oracle
        })
        .collect();
    for (name, create, attach) in plans {
        cluster.wait_for(1, name, "is healthy", |v| v["health"] == "healthy");
        let node = attach.rsplit('n').next().unwrap().parse().unwrap();
        cluster.detach(node, name);
        let same = cluster.copies_are_identical(1, name);
        assert!(!same.contains(&"n3".to_string()), "{name}: {same:?}");
        let wanted: usize = create.split(' ').nth(1).unwrap().parse().unwrap();
        assert_eq!(same.len(), wanted + 1, "{name}: {same:?}");
    }
    cluster.wait_for(1, "resting", "is whole and released", |v| {
        v["health"] == "healthy"
            && v["state"] == "clean"
            && !copies(v, "in_sync").contains(&"n3".into())
    });
    // and its disk is empty, so that it can be taken away, and forgotten.
    eventually("n3 has no files", || {
        (files(&cluster, 3) == 0).then_some(())
    });
    cluster.stop(3);
    cluster.ok(1, "node rm n3");
    assert_eq!(cluster.json(1, "node ls").as_array().unwrap().len(), 3);
    for ((name, ..), oracle) in plans.iter().zip(oracles) {
        holds_what_was_written(&cluster, name, 2, oracle);
    }
}

#[test]
fn a_drain_that_is_interrupted_everywhere_ends_all_the_same() {
    // Given a drain under load,
    let mut cluster = Cluster::start(4);
    cluster.ok(1, "node cordon n4");
    let create = "--size 32MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    cluster.ok(1, "node uncordon n4");
    let mut waiting = lockstep()
        .env(
            "LOCKSTEP_HOST",
            format!("unix:{}", cluster.run_dir(2).join("api.sock").display()),
        )
        .args(["node", "drain", "n3"])
        .spawn()
        .unwrap();
    cluster.wait_for(1, "vm1", "has a copy on its way", |v| {
        let leaves = |c: &Value| c["node"] == "n3" && c["leaving"] == true;
        v["copies"].as_array().unwrap().iter().any(leaves)
    });
    // when whoever waits for it is ended, and the nodes of the old copy and of the new one are lost in the middle,
    waiting.kill().unwrap();
    waiting.wait().unwrap();
    for n in [4, 3] {
        cluster.kill(n);
        load.goes_on();
        cluster.start_node(n);
    }
    // then the same command waits again, and it ends.
    let done = cluster.run(2, "node drain n3");
    assert_eq!((done.code, done.out.as_str()), (0, "n3\n"), "{done:?}");
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    cluster.detach(1, "vm1");
    let same = cluster.copies_are_identical(1, "vm1");
    assert_eq!(same.len(), 3, "{same:?}");
    assert!(!same.contains(&"n3".to_string()), "{same:?}");
}
