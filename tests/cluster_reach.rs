//! How nodes are, from where one stands: who answers, whose lease is held, and who reaches whom on the way that data takes.
//! Every node has a network namespace of its own, so that each direction of each way can be cut by itself.

mod cluster_support;
mod etcd_support;

use std::path::Path;
use std::process::Command;

use cluster_support::client::{Load, Plan};
use cluster_support::net::{Cut, How};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually, machine};
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

/// Nodes n1 …, each with a network namespace of its own, and etcd in that of n4.
fn with_etcd(nodes: usize) -> (Etcd, Cluster) {
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
    for n in 1..=nodes {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    (etcd, cluster)
}

#[test]
fn with_etcd_a_lease_tells_a_node_that_is_cut_off_from_one_that_has_died() {
    // Given nodes n1 to n3 and etcd at n4,
    let (etcd, mut cluster) = with_etcd(3);
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

#[test]
fn a_second_process_of_a_name_does_not_drive_out_the_first_that_it_cannot_see() {
    // Given n1 that serves a machine,
    let (_etcd, mut cluster) = with_etcd(2);
    let size = 32 << 20;
    let create = "--size 32MiB --replicas 1 --master n1 --suspend-deadline 10m";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(size));
    load.goes_on();
    // when a process of its name is started on a machine that reaches the registry and not n1,
    let cuts = between(1, 3);
    cut(&cluster, &cuts);
    let mut arguments = cluster.node_arguments(3, &cluster.data_dir(3));
    let name = arguments.iter().position(|a| a == "n3").unwrap();
    arguments[name] = "n1".into();
    let starts = |cluster: &Cluster| cluster.node_that_must_not_start_at(3, &arguments);
    // then it is not let in while n1's lease is held,
    let may_run = ["n1 may be running", "lease", "try again in 30 seconds"];
    starts(&cluster).refused(12, &may_run);
    // nor when it sees n1, which answers or hangs,
    heal(&cluster, &cuts);
    starts(&cluster).refused(9, &["n1 runs already", "it answers on"]);
    // and n1 and its machine have not noticed.
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    cluster.freeze(1);
    starts(&cluster).refused(9, &["n1 runs already", "does not say who it is"]);
    // Where n1 was, it starts again at once, whatever its lease says,
    cluster.kill(1);
    cluster.start_node(1);
    // and elsewhere when that has ended.
    cluster.kill(1);
    starts(&cluster).refused(12, &may_run);
    eventually("n1's lease has ended", || {
        cluster.at.insert(1, 3);
        cluster.spawn_node(1);
        let up = eventually("it starts or ends", || match cluster.ended(1) {
            Some(status) => Some(status.code() != Some(12)),
            None => (cluster.run(1, "node ls").code == 0).then_some(true),
        });
        up.then_some(())
    });
    cluster.know_each_other();
}

#[test]
fn a_node_whose_address_another_one_has_is_forgotten_and_starts_elsewhere() {
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    // Given n3 that is dead, and a new machine that got its address and runs as n6,
    cluster.kill(3);
    cluster.at.insert(6, 3);
    cluster.start_node(6);
    // then n3 can be removed,
    becomes(&cluster, 1, "n3", "offline", &["now belongs to node n6"]);
    cluster.ok(1, "node rm n3");
    cluster.know_each_other();
    // and n6 cannot, also when it hangs.
    cluster
        .run(1, "node rm n6")
        .refused(11, &["n6 is not dead", "it answers on"]);
    cluster.freeze(6);
    let hangs = ["n6 is not dead", "does not say who it is"];
    cluster.run(1, "node rm n6").refused(11, &hangs);
    cluster.thaw(6);

    // Two that have got each other's address start, one after the other and both at once.
    let exchange = |cluster: &mut Cluster| {
        let [one, two] = [1, 2].map(|n| cluster.at.get(&n).copied().unwrap_or(n));
        cluster.at.extend([(1, two), (2, one)]);
    };
    for n in [1, 2] {
        assert!(cluster.stop(n).success());
    }
    exchange(&mut cluster);
    cluster.start_node(2);
    cluster.start_node(1);
    cluster.know_each_other();
    for n in [1, 2] {
        cluster.kill(n);
    }
    exchange(&mut cluster);
    for n in [1, 2] {
        cluster.spawn_node(n);
    }
    for n in [1, 2] {
        eventually(&format!("n{n} answers"), || {
            cluster.answers(n).then_some(())
        });
    }
    cluster.know_each_other();
}

/// A cut of the replication port of node n, for these nodes.
fn port_of(n: usize, from: &[usize]) -> Vec<Cut> {
    let how = How::Port(5703);
    let to = n;
    from.iter().map(|&from| Cut { from, to, how }).collect()
}

#[test]
fn a_node_whose_replication_port_nobody_reaches_gets_no_copies() {
    // Given a volume on n1 to n3 that n1 serves, and n4 that answers everybody and whose data port is cut,
    let mut cluster = Cluster::start_on_a_network(Path::new("/dev/shm"), 4);
    cluster.ok(1, "node cordon n4");
    let create = "--size 32MiB --replicas 2 --master n1 --suspend-deadline 10m";
    let socket = cluster.serve("vm1", create, "--node n1");
    cluster.ok(1, "node uncordon n4");
    let load = Load::start(&socket, Plan::small(), Oracle::new(32 << 20));
    load.goes_on();
    let from_all = port_of(4, &[1, 2, 3]);
    cut(&cluster, &from_all);
    for n in 1..=3 {
        is_named(&cluster, n, &[&format!("n{n} does not reach n4")]);
    }
    becomes(&cluster, 1, "n4", "online", &[]);
    // then nothing is placed there: no new copy, whatever is asked for,
    let cut_off = ["n4: no node reaches its replication port", "n1: no answer"];
    cluster
        .run(1, "volume create vm2 --size 32MiB --replicas 3")
        .refused(11, &cut_off);
    cluster
        .run(1, "volume create vm2 --size 32MiB --master n4")
        .refused(11, &["the master cannot be placed on n4", cut_off[0]]);
    cluster.run(1, "volume move vm1 n2 n4").refused(
        11,
        &[
            "no copy of volume default/vm1 can move to n4",
            "n1: no answer",
        ],
    );
    cluster
        .run(1, "volume update vm1 --replicas 3")
        .refused(11, &cut_off);
    // none that leaves a node that is to be emptied,
    cluster.ok(1, "node drain n2 --async");
    eventually("the drain says what it waits for", || {
        let node = cluster.json(1, "node inspect n2").to_string();
        node.contains(cut_off[0]).then_some(())
    });
    // nor one in the place of a lost one.
    cluster.ok(1, "node undrain n2");
    cluster.ok(1, "cluster update --replace-after 1s");
    cluster.kill(3);
    eventually("n1 says why n3 is not replaced", || {
        let log = cluster.log(1);
        let said = "a missing copy of default/vm1 is not replaced";
        let mut lines = log.lines().filter(|line| line.contains(said));
        lines.any(|line| line.contains(cut_off[0])).then_some(())
    });
    let places = copies(&cluster.volume(1, "vm1"), "in_sync");
    assert_eq!(places, ["n1", "n2"]);
    load.goes_on();
    // When only the node that serves the volume is cut off from it, it is no place for that volume,
    heal(&cluster, &port_of(4, &[2]));
    eventually("n2 reaches n4", || {
        let node = cluster.json(2, "node inspect n2");
        let ways = node["ways"].as_array()?.clone();
        let open = |way: &Value| way["node"] == "n4" && way["reached"] == true;
        ways.iter().any(open).then_some(())
    });
    let for_it = "n1, which serves the volume, does not reach its replication port";
    cluster
        .run(1, "volume move vm1 n2 n4")
        .refused(11, &[for_it]);
    // and for others it is one.
    cluster.ok(2, "volume create vm2 --size 32MiB --master n4");
    // With the last cut healed the copy is made anew by itself.
    heal(&cluster, &port_of(4, &[1, 3]));
    cluster.wait_for(1, "vm1", "has a third copy", |v| {
        copies(v, "in_sync") == ["n1", "n2", "n4"]
    });
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn a_name_server_that_is_away_takes_no_address_away_and_holds_nobody_up() {
    // Given nodes that know each other by name, a volume under load,
    let mut cluster = Cluster::empty_on_a_network(Path::new("/dev/shm"), 4);
    let names = |cluster: &Cluster, nodes: &[usize]| {
        let hosts: Vec<_> = nodes.iter().map(|&n| (cluster.ip(n), machine(n))).collect();
        cluster.network.as_ref().unwrap().name_machines(&hosts);
    };
    names(&cluster, &[1, 2, 3]);
    cluster.by_name = true;
    for n in 1..=3 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    ways_are_known(&cluster);
    let create = "--size 32MiB --replicas 2 --master n1 --suspend-deadline 10m";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(32 << 20));
    load.goes_on();
    // when the names resolve no more,
    names(&cluster, &[]);
    eventually("n1 says so", || {
        let log = cluster.log(1);
        let said = "does not resolve";
        let of = |n| {
            log.lines()
                .any(|line| line.contains(said) && line.contains(&machine(n)))
        };
        (of(2) && of(3)).then_some(())
    });
    // then all is as well as before: nodes answer each other, volumes are created and attached,
    all_is_well(&cluster, 1);
    cluster.serve("vm2", create, "--node n1");
    // and a copy whose connection breaks is dialed again and comes back.
    cluster.kill(2);
    let degraded = |v: &Value| v["health"] == "degraded";
    for name in ["vm1", "vm2"] {
        cluster.wait_for(1, name, "is degraded", degraded);
    }
    cluster.start_node(2);
    for name in ["vm1", "vm2"] {
        cluster.wait_for(1, name, "is whole", |v| v["health"] == "healthy");
    }
    load.goes_on();
    // When they resolve again, and one of them has moved, it is found where it is.
    assert!(cluster.stop(3).success());
    for name in ["vm1", "vm2"] {
        cluster.wait_for(1, name, "is degraded", degraded);
    }
    cluster.at.insert(3, 4);
    names(&cluster, &[1, 2, 3]);
    cluster.start_node(3);
    for name in ["vm1", "vm2"] {
        cluster.wait_for(1, name, "is whole", |v| {
            v["health"] == "healthy" && copies(v, "in_sync").len() == 3
        });
    }
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    for name in ["vm1", "vm2"] {
        cluster.detach(1, name);
        assert_eq!(cluster.copies_are_identical(1, name).len(), 3);
    }
}

#[test]
fn a_replica_that_returns_at_another_address_is_found_there_by_a_running_attachment() {
    // Given a volume under load, and a replica's node that stops,
    let mut cluster = Cluster::empty_on_a_network(Path::new("/dev/shm"), 4);
    for n in 1..=3 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    let create = "--size 32MiB --replicas 2 --master n1 --suspend-deadline 10m";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(32 << 20));
    let whole = |v: &Value| v["health"] == "healthy" && copies(v, "in_sync").len() == 3;
    load.goes_on();
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    // when it starts on another machine, with its disk,
    cluster.at.insert(3, 4);
    cluster.start_node(3);
    // then it gets what it missed,
    cluster.wait_for(1, "vm1", "is whole", whole);
    // also when another node has its old address by then, and when it goes back to where that was.
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    cluster.kill(2);
    cluster.at.extend([(2, 3), (3, 2)]);
    for n in [2, 3] {
        cluster.start_node(n);
    }
    cluster.wait_for(1, "vm1", "is whole", whole);
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}
