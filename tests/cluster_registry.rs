//! A cluster of real nodes on one machine moves its registry from a file to etcd, the first step from one machine to many.

mod cluster_support;
mod etcd_support;

use std::path::Path;
use std::process::Command;

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, Done, copies, eventually, lockstep};
use etcd_support::Etcd;
use rusqlite::Connection;

const SIZE: u64 = 32 << 20;
const CREATE: &str = "--size 32MiB --replicas 2 --master n1 --suspend-deadline 10m";

fn migrate(from: &str, to: &str) -> Done {
    let mut command: Command = lockstep();
    let output = command
        .args(["registry", "migrate", from, to])
        .output()
        .unwrap();
    Done {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// All that a registry's file holds.
fn content(path: &Path) -> Vec<(String, Vec<u8>, i64)> {
    let connection = Connection::open(path).unwrap();
    let mut rows = connection
        .prepare("SELECT key, value, revision FROM entries ORDER BY key")
        .unwrap();
    let row = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
    rows.query_map([], row)
        .unwrap()
        .map(Result::unwrap)
        .collect()
}

#[test]
fn a_cluster_moves_its_registry_to_etcd_and_goes_on_with_all_it_has() {
    // Given a cluster with a rule, a node's label, a volume that rests and one that is attached, all written to,
    let etcd = Etcd::start(1);
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    let registry = cluster.registry();
    let from = format!("sqlite:{}", registry.display());
    let to = etcd.location(&[1]);
    cluster.ok(
        1,
        "rule create ha --selector env==prod --label lockstep.io/replicas=2",
    );
    cluster.ok(1, "node label n2 rack=7");
    let mut oracles = Vec::new();
    for name in ["resting", "vm1"] {
        let socket = cluster.serve(name, CREATE, "--node n1");
        let load = Load::start(&socket, Plan::mixed(), Oracle::new(SIZE));
        load.goes_on();
        let outcome = load.finish();
        assert_eq!(outcome.failed, 0);
        oracles.push(outcome.oracle);
    }
    cluster.detach(1, "resting");
    let id = cluster.json(1, "cluster status")["id"].clone();

    // when somebody moves its registry while nodes run, then that is refused,
    let in_use = ["is in use", "stop every node"];
    migrate(&from, &to).refused(11, &in_use);
    // on a copy of the file as well: the nodes are asked.
    let aside = cluster.dir.path().join("aside.db");
    Connection::open(&registry)
        .unwrap()
        .execute("VACUUM INTO ?1", [aside.to_str().unwrap()])
        .unwrap();
    let of_copy = format!("sqlite:{}", aside.display());
    migrate(&of_copy, &to).refused(11, &["node n1 of the cluster runs", "no copy of it"]);
    // A node that hangs is not stopped.
    for n in [1, 2] {
        assert!(cluster.stop(n).success());
    }
    cluster.freeze(3);
    migrate(&from, &to).refused(11, &in_use);
    cluster.thaw(3);
    assert!(cluster.stop(3).success());
    // Nor is it moved from nowhere, to nowhere, or over something else.
    let missing = cluster.dir.path().join("no.db");
    migrate(&format!("sqlite:{}", missing.display()), &to).refused(8, &["there is no registry"]);
    assert!(!missing.exists());
    migrate(&to, &from).refused(10, &["from sqlite: to etcd:"]);
    etcd.ok(1, &["put", "/lockstep/default/names/default/other", "x"]);
    migrate(&from, &to).refused(11, &["is not empty", "'names/default/other'"]);
    etcd.ok(1, &["del", "/lockstep/default/names/default/other"]);
    assert_eq!(
        etcd.ok(1, &["get", "--prefix", "/lockstep", "--keys-only"]),
        ""
    );
    // None of that did any harm: the nodes can start on the file.
    cluster.start_node(1);
    assert!(cluster.stop(1).success());

    // When all nodes are stopped, it is moved, and the file keeps what it held.
    let before = content(&registry);
    let done = migrate(&from, &to);
    assert_eq!((done.code, done.out.trim()), (0, to.as_str()), "{done:?}");
    let count = format!("{} keys", before.len());
    assert!(done.err.contains(&count), "{done:?}");
    assert_eq!(content(&registry), before);
    let keys = etcd.ok(1, &["get", "--prefix", "/lockstep/default/", "--keys-only"]);
    let keys = keys.lines().filter(|line| !line.is_empty()).count();
    assert_eq!(keys, before.len());
    // A node that is started on it by mistake says where the registry went, and so does another move.
    let moved = [&format!("was moved to {to}"), "--registry"];
    let arguments = cluster.node_arguments(1, &cluster.data_dir(1));
    cluster
        .node_that_must_not_start(&arguments)
        .refused(11, &moved);
    migrate(&from, &to).refused(11, &moved);

    // Started on etcd, the cluster is the same one and has all it had,
    cluster.registry_at = Some(to.clone());
    for n in 1..=3 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    let status = cluster.json(2, "cluster status");
    assert_eq!((&status["id"], &status["registry"]), (&id, &to.into()));
    assert_eq!(cluster.json(3, "node inspect n2")["labels"]["rack"], "7");
    assert_eq!(cluster.json(2, "rule ls").as_array().unwrap().len(), 1);
    // the volume that was attached is served again, all bytes are there,
    let serving = cluster.wait_for(1, "vm1", "serves", |v| {
        v["health"] == "healthy" && v["attachment"]["phase"] == "serving"
    });
    let socket = serving["attachment"]["socket"].as_str().unwrap();
    let load = Load::start(Path::new(socket), Plan::mixed(), oracles.pop().unwrap());
    load.goes_on();
    // and a copy that is lost is put out and comes back, by records in etcd alone.
    cluster.kill(2);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    cluster.start_node(2);
    cluster.ok(3, "volume attach resting --node n3");
    let resting = cluster.wait_for(3, "resting", "serves", |v| {
        v["attachment"]["phase"] == "serving"
    });
    let socket = resting["attachment"]["socket"].as_str().unwrap();
    let other = Load::start(Path::new(socket), Plan::mixed(), oracles.pop().unwrap());
    other.goes_on();
    for (name, node, load) in [("vm1", 1, load), ("resting", 3, other)] {
        assert_eq!(load.finish().failed, 0, "{name}");
        cluster.wait_for(1, name, "has three copies in sync", |v| {
            v["health"] == "healthy" && copies(v, "in_sync").len() == 3
        });
        cluster.detach(node, name);
        assert_eq!(cluster.copies_are_identical(1, name).len(), 3, "{name}");
    }
    eventually("the old file is not touched", || {
        (content(&registry) == before).then_some(())
    });
}
