//! A cluster of real nodes moves its registry from a file to etcd, the first step from one machine to many; and registries
//! that are lost and come back from a backup.

mod cluster_support;
mod etcd_support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::vm::Guest;
use cluster_support::{Cluster, Done, copies, eventually, lockstep};
use etcd_support::Etcd;
use rusqlite::Connection;

const SIZE: u64 = 32 << 20;
/// How long nothing is watched not to happen. Any is good; a longer one sees more.
const WATCHED: std::time::Duration = std::time::Duration::from_secs(5);
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

/// Saves the registry's file while nodes use it.
fn back_up(cluster: &Cluster, to: &Path) {
    Connection::open(cluster.registry())
        .unwrap()
        .execute("VACUUM INTO ?1", [to.to_str().unwrap()])
        .unwrap();
}

/// Puts a saved file in the registry's place, which nobody uses.
fn restore(cluster: &Cluster, from: &Path) {
    let registry = cluster.registry();
    for end in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(format!("{}{end}", registry.display()));
    }
    assert!(!registry.exists());
    fs::copy(from, &registry).unwrap();
}

/// A load that ran and ended well; what is known of the disk then.
fn work(socket: &Path, oracle: Oracle) -> Oracle {
    let load = Load::start(socket, Plan::mixed(), oracle);
    load.goes_on();
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    outcome.oracle
}

/// The socket of a volume that is served again after a restart.
fn served_again(cluster: &Cluster, name: &str) -> PathBuf {
    let volume = cluster.wait_for(1, name, "serves", |v| {
        v["health"] == "healthy" && v["attachment"]["phase"] == "serving"
    });
    volume["attachment"]["socket"].as_str().unwrap().into()
}

/// The cluster works on the registry that it has now: a lost copy is put out and comes back; all bytes are there.
fn works_as_before(cluster: &mut Cluster, oracle: Oracle) {
    cluster.know_each_other();
    let socket = served_again(cluster, "vm1");
    let load = Load::start(&socket, Plan::mixed(), oracle);
    load.goes_on();
    cluster.kill(2);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    cluster.start_node(2);
    cluster.wait_for(1, "vm1", "has three copies in sync", |v| {
        v["health"] == "healthy" && copies(v, "in_sync").len() == 3
    });
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn an_etcd_that_is_lost_is_restored_from_a_snapshot() {
    // Given a cluster whose etcd was saved, and then lost with its disk,
    let mut etcd = Etcd::start(1);
    let mut cluster = Cluster::empty(Path::new("/dev/shm"));
    cluster.registry_at = Some(etcd.location(&[1]));
    for n in 1..=3 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let oracle = work(&socket, Oracle::new(SIZE));
    let saved = cluster.dir.path().join("etcd.snapshot");
    etcd.ok(1, &["snapshot", "save", saved.to_str().unwrap()]);
    etcd.kill(1);
    // the machine works on: nothing of what it writes is in the registry.
    let oracle = work(&socket, oracle);
    // When the nodes have ended, with no registry to tell it to, and start on what was restored,
    for n in 1..=3 {
        cluster.kill(n);
    }
    etcd.restore(&saved);
    for n in 1..=3 {
        cluster.start_node(n);
    }
    // then nothing is lost.
    works_as_before(&mut cluster, oracle);
}

#[test]
fn a_registry_in_a_file_that_is_lost_is_restored_from_a_backup() {
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let oracle = work(&socket, Oracle::new(SIZE));
    // Given a backup, made while nodes run, and a file that is gone afterwards,
    let saved = cluster.dir.path().join("saved.db");
    back_up(&cluster, &saved);
    let oracle = work(&socket, oracle);
    for n in 1..=3 {
        cluster.kill(n);
    }
    // when it is put in its place, then nothing is lost.
    restore(&cluster, &saved);
    for n in 1..=3 {
        cluster.start_node(n);
    }
    works_as_before(&mut cluster, oracle);
}

#[test]
fn a_registry_from_before_a_copy_was_put_out_is_not_acted_on() {
    // Given a backup from before n3 was lost, one from after it, and writes that n3 does not have,
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::mixed(), Oracle::new(SIZE));
    load.goes_on();
    let [early, late] = ["early.db", "late.db"].map(|name| cluster.dir.path().join(name));
    back_up(&cluster, &early);
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    back_up(&cluster, &late);
    load.goes_on();
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    for n in [1, 2] {
        cluster.kill(n);
    }
    // when all nodes start on the early one, by which n3 has everything,
    restore(&cluster, &early);
    for n in 1..=3 {
        cluster.start_node(n);
    }
    // then that is noticed, and nothing is served from n3 or copied from it,
    let volume = cluster.wait_for(1, "vm1", "says that its registry is an old one", |v| {
        v.to_string().contains("is the registry an old one?")
    });
    assert_ne!(volume["attachment"]["phase"], "serving", "{volume:#}");
    std::thread::sleep(WATCHED);
    let volume = cluster.volume(1, "vm1");
    assert_ne!(volume["attachment"]["phase"], "serving", "{volume:#}");
    // and with the late one every byte is there.
    for n in 1..=3 {
        cluster.kill(n);
    }
    restore(&cluster, &late);
    for n in 1..=3 {
        cluster.start_node(n);
    }
    works_as_before(&mut cluster, outcome.oracle);
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
    back_up(&cluster, &aside);
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
    // Before any node was started there is a way back, and forth again.
    let undone = Connection::open(&registry).unwrap();
    undone.execute("DROP TABLE moved", []).unwrap();
    drop(undone);
    etcd.ok(1, &["del", "--prefix", "/lockstep/default/"]);
    cluster.start_node(1);
    assert_eq!(cluster.json(1, "volume ls").as_array().unwrap().len(), 2);
    assert!(cluster.stop(1).success());
    let before = content(&registry);
    let done = migrate(&from, &to);
    assert_eq!((done.code, done.out.trim()), (0, to.as_str()), "{done:?}");
    assert_eq!(content(&registry), before);
    // A node that is started on it by mistake says where the registry went, and so does another move.
    let moved = [&format!("was moved to {to}"), "--registry"];
    let arguments = cluster.node_arguments(1, &cluster.data_dir(1));
    cluster
        .node_that_must_not_start(&arguments)
        .refused(11, &moved);
    migrate(&from, &to).refused(11, &moved);

    // Started on etcd, at other addresses, the cluster is the same one and has all it had,
    cluster.registry_at = Some(to.clone());
    cluster.moved_by = 100;
    for n in 1..=3 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    let status = cluster.json(2, "cluster status");
    assert_eq!((&status["id"], &status["registry"]), (&id, &to.into()));
    assert_eq!(cluster.json(3, "node inspect n2")["labels"]["rack"], "7");
    assert_eq!(cluster.json(2, "rule ls").as_array().unwrap().len(), 1);
    // both volumes serve all their bytes, and a copy that is lost is put out and comes back, by records in etcd alone.
    let (of_vm1, of_resting) = (oracles.pop().unwrap(), oracles.pop().unwrap());
    works_as_before(&mut cluster, of_vm1);
    let socket = cluster.ok(3, "volume attach resting --node n3");
    work(Path::new(socket.trim()), of_resting);
    cluster.detach(3, "resting");
    assert_eq!(cluster.copies_are_identical(3, "resting").len(), 3);
    eventually("the old file is not touched", || {
        (content(&registry) == before).then_some(())
    });
}

#[test]
fn a_move_that_etcds_end_interrupts_is_gone_on_with() {
    // Given the registry of a cluster, with so many keys that moving them takes a while,
    let mut etcd = Etcd::start(1);
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 1);
    cluster.ok(1, "volume create vm1 --size 32MiB");
    assert!(cluster.stop(1).success());
    let file = Connection::open(cluster.registry()).unwrap();
    let more = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)
        INSERT INTO entries (key, value, revision)
        SELECT 'spare/' || printf('%05d', i), zeroblob(100), 1 FROM n";
    file.execute(more, []).unwrap();
    drop(file);
    let before = content(&cluster.registry());
    let from = format!("sqlite:{}", cluster.registry().display());
    let to = etcd.location(&[1]);
    let moved = |etcd: &Etcd| {
        let keys = etcd.ok(1, &["get", "--prefix", "/lockstep/default/", "--keys-only"]);
        keys.lines().filter(|line| !line.is_empty()).count()
    };
    // when etcd dies in the middle,
    let watched = etcd.open();
    let mut command = lockstep();
    command.args(["registry", "migrate", &from, &to]);
    let mut child = command.spawn().unwrap();
    while watched.list("").is_ok_and(|all| all.entries.is_empty()) {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}");
    }
    etcd.kill(1);
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(12), "{status}");
    // then the file is the registry still, and the same command goes on.
    assert_eq!(content(&cluster.registry()), before);
    etcd.start_member(1);
    etcd.await_member(1);
    let half = moved(&etcd);
    assert!(
        0 < half && half < before.len(),
        "{half} of {}",
        before.len()
    );
    let done = migrate(&from, &to);
    assert_eq!((done.code, done.out.trim()), (0, to.as_str()), "{done:?}");
    assert_eq!(moved(&etcd), before.len());
    cluster.registry_at = Some(to);
    cluster.start_node(1);
    assert_eq!(cluster.json(1, "volume ls").as_array().unwrap().len(), 1);
}

#[test]
fn one_machine_becomes_many_under_its_running_virtual_machine() {
    // Given one machine with a node of its own, a registry in a file, and a guest that writes and checks what it wrote,
    let mut cluster = Cluster::empty_on_machines(Path::new("/dev/shm"), 4);
    cluster.alone = true;
    cluster.start_node(1);
    let create = "--size 512MiB --suspend-deadline 10m";
    let socket = cluster.serve("vm1", create, "--node n1");
    let console = cluster.dir.path().join("console");
    let mut guest = Guest::boot(&socket, "demo", &["seconds=45"], &console);
    let writes_on = |guest: &mut Guest| {
        let goal = guest.steps() + 3;
        eventually("the guest writes", || {
            (guest.steps() >= goal || guest.is_content()).then_some(())
        });
    };
    writes_on(&mut guest);
    // when etcd is set up on three others, the node stopped, its registry moved, and the node started where others reach it,
    let network = cluster.network.as_ref().unwrap();
    let places: Vec<String> = (2..=4).map(|n| network.namespace(n)).collect();
    let etcd = Etcd::start_at(
        (2..=4).map(|n| network.address(n)).collect(),
        Box::new(move |m, program| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &places[m - 1]]).arg(program);
            command
        }),
    );
    assert!(cluster.stop(1).success());
    let from = format!("sqlite:{}", cluster.registry().display());
    let to = etcd.location(&[1, 2, 3]);
    let network = cluster.network.as_ref().unwrap();
    let mut migrate = network.command(1, &cluster_support::binary());
    let moved = migrate.args(["registry", "migrate", &from, &to]).output();
    let moved = moved.unwrap();
    assert!(moved.status.success(), "{moved:?}");
    (cluster.alone, cluster.registry_at) = (false, Some(to));
    cluster.start_node(1);
    // then the guest goes on;
    served_again(&cluster, "vm1");
    writes_on(&mut guest);
    // other machines join, and the volume spreads over them and leaves the first,
    for n in 2..=4 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    cluster.ok(2, "volume update vm1 --replicas 1");
    cluster.wait_for(1, "vm1", "has two copies", |v| {
        v["health"] == "healthy" && copies(v, "in_sync").len() == 2
    });
    cluster.ok(3, "node drain n1");
    let volume = cluster.wait_for(1, "vm1", "has two copies elsewhere", |v| {
        let places = copies(v, "in_sync");
        v["health"] == "healthy" && places.len() == 2 && !places.contains(&"n1".into())
    });
    assert_eq!(volume["attachment"]["node"], "n1");
    // and the guest finds all that it wrote.
    eventually("the guest's verdict", || guest.is_content().then_some(()));
    eventually("the guest is off", || guest.is_off().then_some(()));
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
}
