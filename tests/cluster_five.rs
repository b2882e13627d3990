//! Five machines, three of them with a member of etcd, each with a network namespace and an address of its own on one
//! bridge: the life of a small cluster, told once from its first rule to the replacement of a machine that is gone, with
//! stamped loads all the while. No request fails, and every copy is the same at the end.

mod cluster_support;
mod etcd_support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use cluster_support::client::{Load, Plan};
use cluster_support::net::{Cut, How};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually};
use etcd_support::Etcd;
use serde_json::Value;

const SIZE: u64 = 32 << 20;
const NODES: usize = 5;
const MEMBERS: usize = 3;
/// Longer than anything here takes: whatever waits must not fail.
const DEADLINE: &str = "--suspend-deadline 1h";
/// How long requests are watched not to end. Any is good; a longer one sees more.
const WATCHED: Duration = Duration::from_secs(3);

/// n1 to n5, with etcd at n1 to n3.
fn machines() -> (Etcd, Cluster) {
    machines_with(Cluster::empty_on_machines(Path::new("/dev/shm"), NODES))
}

fn machines_with(mut cluster: Cluster) -> (Etcd, Cluster) {
    let network = cluster.network.as_ref().unwrap();
    let places: Vec<String> = (1..=MEMBERS).map(|m| network.namespace(m)).collect();
    let etcd = Etcd::start_at(
        (1..=MEMBERS).map(|m| cluster.ip(m)).collect(),
        Box::new(move |m, program| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &places[m - 1]]).arg(program);
            command
        }),
    );
    cluster.registry_at = Some(etcd.location(&[1, 2, 3]));
    for n in 1..=NODES {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    (etcd, cluster)
}

/// All ways between node n and the others.
fn around(n: usize) -> Vec<Cut> {
    (1..=NODES)
        .filter(|other| *other != n)
        .flat_map(|other| [(n, other), (other, n)])
        .map(|(from, to)| Cut {
            from,
            to,
            how: How::Drop,
        })
        .collect()
}

fn cut(cluster: &Cluster, ways: &[Cut]) {
    let network = cluster.network.as_ref().unwrap();
    ways.iter().for_each(|way| network.cut(*way));
}

fn heal(cluster: &Cluster, ways: &[Cut]) {
    let network = cluster.network.as_ref().unwrap();
    ways.iter().for_each(|way| network.heal(*way));
}

/// Where the copies of a volume are, in the order of the nodes' names.
fn places(volume: &Value) -> Vec<String> {
    let mut nodes = copies(volume, "in_sync");
    nodes.sort();
    nodes
}

fn is_whole(cluster: &Cluster, name: &str) -> Value {
    cluster.wait_for(1, name, "has three copies in sync", |v| {
        v["health"] == "healthy" && copies(v, "in_sync").len() == 3
    })
}

/// The volumes that have files on node n.
fn files(cluster: &Cluster, n: usize) -> usize {
    fs::read_dir(cluster.data_dir(n).join("volumes")).map_or(0, Iterator::count)
}

#[test]
fn a_small_cluster_lives_through_all_that_happens_to_it() {
    // Given five machines, two of them without copies for now, and a rule that gives what is labelled two replicas,
    let (mut etcd, mut cluster) = machines();
    cluster.ok(1, "node cordon n4");
    cluster.ok(2, "node cordon n5");
    cluster.ok(
        5,
        "rule create ha --selector env==prod --label lockstep.io/replicas=2",
    );
    // when volumes are created with nothing but the label, and attached beside their master and far from every copy,
    let create =
        |master: &str| format!("--size 32MiB --label env=prod --master {master} {DEADLINE}");
    let near = cluster.serve("near", &create("n1"), "--node n1");
    let far = cluster.serve("far", &create("n3"), "--node n4");
    // then they have the copies that the rule says.
    for name in ["near", "far"] {
        assert_eq!(places(&is_whole(&cluster, name)), ["n1", "n2", "n3"]);
    }
    cluster.ok(1, "node uncordon n4");
    cluster.ok(1, "node uncordon n5");
    let near = Load::start(&near, Plan::mixed(), Oracle::new(SIZE));
    let far = Load::start(&far, Plan::small(), Oracle::new(SIZE));
    let both_go_on = || {
        near.goes_on();
        far.goes_on();
    };
    both_go_on();

    // A machine is cut off, with a replica of the one, the master of the other and a member of etcd on it:
    cut(&cluster, &around(3));
    for name in ["near", "far"] {
        cluster.wait_for(1, name, "goes on without n3", |v| {
            v["health"] == "degraded" && places(v) == ["n1", "n2"]
        });
    }
    both_go_on();
    // it comes back by itself when it can.
    heal(&cluster, &around(3));
    for name in ["near", "far"] {
        is_whole(&cluster, name);
    }
    assert!(cluster.rules(1, "near").iter().any(|r| r == "2.6 eject"));
    let rules = cluster.rules(1, "far");
    assert!(rules.iter().any(|r| r == "5 promote"), "{rules:?}");

    // What n2 says to n4 is lost, and nothing else: the volume that n4 serves goes on without n2, the other with it.
    let deaf = [Cut {
        from: 2,
        to: 4,
        how: How::Drop,
    }];
    cut(&cluster, &deaf);
    cluster.wait_for(1, "far", "goes on without n2", |v| {
        places(v) == ["n1", "n3"]
    });
    assert_eq!(places(&cluster.volume(1, "near")), ["n1", "n2", "n3"]);
    both_go_on();
    heal(&cluster, &deaf);
    is_whole(&cluster, "far");

    // The machine that serves is cut off from every copy and the registry: its requests wait, all others go on,
    cut(&cluster, &around(4));
    eventually("requests on n4 wait", || {
        let before = far.done();
        std::thread::sleep(WATCHED);
        (far.done() == before).then_some(())
    });
    near.goes_on();
    far.still_runs();
    // and they end well when it is back.
    heal(&cluster, &around(4));
    both_go_on();
    is_whole(&cluster, "far");

    // A machine is emptied for maintenance,
    let done = cluster.run(1, "node drain n2");
    assert_eq!((done.code, done.out.as_str()), (0, "n2\n"), "{done:?}");
    both_go_on();
    for name in ["near", "far"] {
        let places = places(&is_whole(&cluster, name));
        assert!(!places.contains(&"n2".into()), "{name}: {places:?}");
    }
    eventually("n2 has no files", || {
        (files(&cluster, 2) == 0).then_some(())
    });
    // stopped, changed and started again; nobody notices.
    assert!(cluster.stop(2).success());
    both_go_on();
    cluster.start_node(2);

    // A machine is lost for good, with its disk and its member of etcd:
    cluster.ok(1, "cluster update --replace-after 2s");
    cluster.kill(3);
    etcd.kill(3);
    fs::remove_dir_all(cluster.data_dir(3)).unwrap();
    both_go_on();
    // its copies are made anew on what is left,
    for name in ["near", "far"] {
        cluster.wait_for(1, name, "has its copies elsewhere", |v| {
            v["health"] == "healthy" && places(v) == ["n1", "n4", "n5"]
        });
    }
    // and a new machine takes its place, in etcd and in the cluster.
    eventually("n3's lease has ended, and it may be forgotten", || {
        let done = cluster.run(1, "node rm n3");
        assert!([0, 12].contains(&done.code), "{done:?}");
        (done.code == 0).then_some(())
    });
    etcd.replace_member(3);
    cluster.start_node(3);
    cluster.ok(1, "node undrain n2");
    cluster.know_each_other();
    assert_eq!(files(&cluster, 3), 0);
    both_go_on();
    // It bears its part: with another member down, etcd needs the new one; and it gets copies.
    etcd.kill(1);
    cluster.ok(4, "volume move near n5 n3");
    cluster.ok(4, "volume move far n1 n2");
    both_go_on();
    etcd.start_member(1);
    etcd.await_member(1);

    // No request failed, all bytes are right, in each copy.
    for (name, load, node, expected) in [
        ("near", near, 1, ["n1", "n3", "n4"]),
        ("far", far, 4, ["n2", "n4", "n5"]),
    ] {
        load.goes_on();
        let outcome = load.finish();
        assert_eq!(outcome.failed, 0, "{name}");
        assert_eq!(places(&is_whole(&cluster, name)), expected, "{name}");
        cluster.detach(node, name);
        assert_eq!(cluster.copies_are_identical(1, name).len(), 3, "{name}");
    }
}

/// Rules by which a copy is made elsewhere, in all that every node remembers of a volume.
fn replaced(cluster: &Cluster, name: &str) -> usize {
    let rules = cluster.rules(1, name);
    rules.iter().filter(|rule| *rule == "6 replace").count()
}

/// How each sync of a volume began that is remembered, oldest first.
fn syncs(cluster: &Cluster, name: &str) -> Vec<String> {
    let events = cluster.json(1, &format!("events --volume {name}"));
    let events = events.as_array().unwrap().iter();
    let begins = events.filter(|e| e["rule"] == "6 sync begins");
    begins
        .map(|e| e["text"].as_str().unwrap().to_string())
        .collect()
}

#[test]
fn machines_are_restarted_and_programs_replaced_one_after_the_other_under_load() {
    // Given nodes each with a program of its own; a volume that n5 serves, one that rests, their copies on n1 to n3, and n4 with
    // room for more,
    let installed = tempfile::tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| installed.path().join(name));
    let mut cluster = Cluster::empty_on_machines(Path::new("/dev/shm"), NODES);
    for file in [&old, &new] {
        fs::copy(cluster_support::binary(), file).unwrap();
    }
    for n in 1..=NODES {
        let program = installed.path().join(format!("lockstep-n{n}"));
        fs::hard_link(&old, &program).unwrap();
        cluster.programs.insert(n, program);
    }
    let (mut etcd, mut cluster) = machines_with(cluster);
    for n in [4, 5] {
        cluster.ok(1, &format!("node cordon n{n}"));
    }
    let create = format!("--size 32MiB --replicas 2 --master n1 {DEADLINE}");
    let socket = cluster.serve("vm1", &create, "--node n5");
    let resting = cluster.serve("resting", &create, "--node n1");
    let at_rest = Load::start(&resting, Plan::small(), Oracle::new(SIZE)).finish();
    assert_eq!(at_rest.failed, 0);
    cluster.detach(1, "resting");
    cluster.ok(1, "node uncordon n4");
    let load = Load::start(&socket, Plan::mixed(), Oracle::new(SIZE));

    // etcd comes first: nobody notices that a member is replaced.
    for m in 1..=MEMBERS {
        etcd.kill(m);
        load.goes_on();
        etcd.start_member(m);
        etcd.await_member(m);
    }

    // In maintenance each machine is away for a while, much longer than a lost copy is waited for,
    cluster.ok(1, "cluster maintenance on");
    cluster.ok(1, "cluster update --replace-after 1ms");
    for n in [2, 3, 1] {
        let (name, asked) = (format!("n{n}"), if n == 1 { 2 } else { 1 });
        assert!(cluster.stop(n).success());
        cluster.wait_for(asked, "vm1", "goes on without it", |v| {
            v["health"] == "degraded" && !places(v).contains(&name)
        });
        std::thread::sleep(WATCHED);
        load.goes_on();
        cluster.start_node(n);
        for volume in ["vm1", "resting"] {
            let whole = is_whole(&cluster, volume);
            assert_eq!(places(&whole), ["n1", "n2", "n3"], "{volume}");
        }
    }
    // and nothing was made anew: each copy got what it had missed.
    for volume in ["vm1", "resting"] {
        assert_eq!(replaced(&cluster, volume), 0, "{volume}");
    }
    let how = syncs(&cluster, "vm1");
    // Those of before the maintenance, if any, were of new copies.
    assert!(how.len() >= 3, "{how:?}");
    assert!(
        how.iter().all(|text| text.contains("what it missed")),
        "{how:?}"
    );
    assert_eq!(files(&cluster, 4), 0);
    cluster.ok(1, "cluster update --replace-after 1h");
    cluster.ok(1, "cluster maintenance off");

    // Then the program, node after node, the one that serves last: a new file in its place, and all is whole in between.
    for n in 1..=NODES {
        let program = cluster.programs[&n].clone();
        let fresh = program.with_extension("fresh");
        fs::hard_link(&new, &fresh).unwrap();
        fs::rename(&fresh, &program).unwrap();
        let pid = cluster.pid(n);
        cluster.ok(n, "node upgrade");
        assert_eq!(cluster.pid(n), pid);
        let file = |path: &Path| fs::metadata(path).unwrap().ino();
        assert_eq!(file(Path::new(&format!("/proc/{pid}/exe"))), file(&new));
        for volume in ["vm1", "resting"] {
            is_whole(&cluster, volume);
        }
        load.goes_on();
    }
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    cluster.detach(5, "vm1");
    for volume in ["vm1", "resting"] {
        assert_eq!(cluster.copies_are_identical(1, volume).len(), 3);
    }
}
