//! How nodes are, from where one stands: who answers, whose lease is held, and who reaches whom on the way that data takes.
//! Every node has a network namespace of its own, so that each direction of each way can be cut by itself.

mod cluster_support;
mod etcd_support;

use std::path::Path;
use std::process::Command;

use cluster_support::net::{Cut, How};
use cluster_support::{Cluster, eventually};
use etcd_support::Etcd;
use serde_json::Value;

fn cut(cluster: &Cluster, cuts: &[Cut]) {
    let network = cluster.network.as_ref().unwrap();
    cuts.iter().for_each(|cut| network.cut(*cut));
}

fn heal(cluster: &Cluster, cuts: &[Cut]) {
    let network = cluster.network.as_ref().unwrap();
    cuts.iter().for_each(|cut| network.heal(*cut));
}

/// All ways between two nodes, both directions.
fn between(a: usize, b: usize) -> [Cut; 2] {
    let how = How::Drop;
    [
        Cut {
            from: a,
            to: b,
            how,
        },
        Cut {
            from: b,
            to: a,
            how,
        },
    ]
}

/// Health and reason of a node, as node `from` says.
fn health(cluster: &Cluster, from: usize, of: &str) -> Option<(String, String)> {
    let done = cluster.run(from, "node ls -o json");
    let list: Value = serde_json::from_str(&done.out).ok()?;
    let node = list.as_array()?.iter().find(|n| n["name"] == of)?;
    let text = |field: &str| node[field].as_str().map(String::from);
    Some((text("health")?, text("why")?))
}

/// Waits until node `from` says that node `of` is `word`, for a reason with these parts.
#[track_caller]
fn becomes(cluster: &Cluster, from: usize, of: &str, word: &str, parts: &[&str]) {
    let mut last = None;
    eventually(
        &format!("n{from} says that {of} is {word} {parts:?}"),
        || {
            let now = health(cluster, from, of);
            if now != last {
                eprintln!("n{from} of {of}: {now:?}");
                last.clone_from(&now);
            }
            let (health, why) = now?;
            (health == word && parts.iter().all(|part| why.contains(part))).then_some(())
        },
    );
}

/// Waits until `cluster status` and `node ls` of node `from` have a line with all these parts.
#[track_caller]
fn is_named(cluster: &Cluster, from: usize, parts: &[&str]) {
    for command in ["cluster status", "node ls"] {
        eventually(&format!("{command} of n{from} has {parts:?}"), || {
            let out = cluster.run(from, command).out;
            let has = |line: &str| parts.iter().all(|part| line.contains(part));
            out.lines().any(has).then_some(())
        });
    }
}

#[track_caller]
fn all_is_well(cluster: &Cluster, from: usize) {
    eventually(&format!("n{from} finds nothing"), || {
        let out = cluster.run(from, "cluster status").out;
        out.contains("Nothing needs attention").then_some(())
    });
    let list = cluster.ok(from, "node ls");
    // The head, and a row for each node.
    assert_eq!(list.lines().count(), 4, "{list}");
}

/// Waits until every node has something to say about every other one.
fn ways_are_known(cluster: &Cluster) {
    for n in 1..=3 {
        eventually(&format!("n{n} reaches both others"), || {
            let node = cluster.json(n, &format!("node inspect n{n}"));
            let ways = node["ways"].as_array()?.clone();
            let reached = ways.iter().filter(|way| way["reached"] == true);
            (reached.count() == 2).then_some(())
        });
    }
}

#[test]
fn a_way_that_is_cut_in_one_direction_is_named_by_a_third_node_and_forgotten_when_it_is_healed() {
    let cluster = Cluster::start_on_a_network(Path::new("/dev/shm"), 3);
    ways_are_known(&cluster);
    all_is_well(&cluster, 3);
    // Given n1 that may not connect to n2, while n2 connects to n1 as ever,
    let one_way = [Cut {
        from: 1,
        to: 2,
        how: How::Connect,
    }];
    cut(&cluster, &one_way);
    // then n3, which both answer, names the way and its direction,
    let line = [
        "n2 reaches n1, n1 does not reach n2",
        "the way is cut in one direction",
    ];
    is_named(&cluster, 3, &line);
    let inspected = cluster.ok(3, "node inspect n1");
    assert!(inspected.contains("not n2 (no answer"), "{inspected}");
    // so do n2, and n1's figures and events,
    is_named(&cluster, 2, &line);
    let events = cluster.ok(1, "events");
    assert!(events.contains("node n2 is not reached"), "{events}");
    // and n1, to which n2 does not answer, knows all the same that it runs.
    becomes(
        &cluster,
        1,
        "n2",
        "unreachable",
        &["it runs: n3 reaches it", "its lease"],
    );
    let done = cluster.run(1, "node rm n2");
    done.refused(12, &["n2 may be running", "n3 reaches it", "try again"]);
    heal(&cluster, &one_way);
    all_is_well(&cluster, 3);
    all_is_well(&cluster, 1);
    eventually("n1 notes that it reaches n2 again", || {
        let events = cluster.ok(1, "events");
        events
            .contains("node n2 is reached again after")
            .then_some(())
    });
    // Packets of one direction that vanish let nobody connect at all, and the direction is known all the same.
    let packets = [Cut {
        from: 1,
        to: 2,
        how: How::Drop,
    }];
    cut(&cluster, &packets);
    is_named(
        &cluster,
        3,
        &[
            "n1 and n2 do not reach each other",
            "what n2 sends arrives at n1, what n1 sends does not arrive at n2",
            "n3 reaches both",
        ],
    );
    heal(&cluster, &packets);
    all_is_well(&cluster, 3);
}

#[test]
fn a_node_that_stands_still_is_unreachable_and_one_that_was_killed_is_offline() {
    let mut cluster = Cluster::start_on_a_network(Path::new("/dev/shm"), 3);
    ways_are_known(&cluster);
    // On one machine the kernel tells a process that stands still from one that is no more.
    cluster.freeze(2);
    becomes(&cluster, 1, "n2", "unreachable", &["it runs: its lease"]);
    becomes(&cluster, 1, "n2", "unreachable", &["n3 does not reach it"]);
    cluster.thaw(2);
    all_is_well(&cluster, 1);
    cluster.kill(2);
    let (word, why) = health(&cluster, 1, "n2").unwrap();
    assert_eq!(word, "offline", "{why}");
    cluster.ok(1, "node rm n2");
}

#[test]
fn with_etcd_a_lease_tells_a_node_that_is_cut_off_from_one_that_has_died() {
    // Given nodes n1 to n3 and etcd at n4,
    let mut cluster = Cluster::empty_on_a_network(Path::new("/dev/shm"), 4);
    let place = cluster.network.as_ref().unwrap().namespace(4);
    let etcd = Etcd::start_at(
        vec![cluster.ip(4)],
        Box::new(move |_, program| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &place]).arg(program);
            command
        }),
    );
    cluster.registry_at = Some(etcd.location(&[1]));
    for n in 1..=3 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    ways_are_known(&cluster);
    // when n1 is cut off from both others and not from etcd,
    let cuts = [between(1, 2), between(1, 3)].concat();
    cut(&cluster, &cuts);
    // then nobody reaches it, and all know that it may run.
    for (from, of) in [(1, "n2"), (1, "n3"), (2, "n1")] {
        becomes(
            &cluster,
            from,
            of,
            "unreachable",
            &["it may run: its lease"],
        );
    }
    becomes(&cluster, 2, "n3", "online", &[]);
    let done = cluster.run(2, "node rm n1");
    done.refused(12, &["n1 may be running", "lease"]);
    heal(&cluster, &cuts);
    all_is_well(&cluster, 2);
    // When it dies instead, its lease ends after a while, and it may be forgotten.
    cluster.kill(1);
    becomes(&cluster, 2, "n1", "offline", &[]);
    cluster.ok(2, "node rm n1");
    // Who ends in order is gone as soon as nobody remembers to have reached it.
    assert!(cluster.stop(3).success());
    let leases = etcd.ok(1, &["lease", "list"]);
    assert!(leases.contains("found 1 leases"), "{leases}");
    becomes(&cluster, 2, "n3", "offline", &[]);
}
