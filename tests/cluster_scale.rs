//! Many volumes: an idle cluster leaves the registry alone, and a node's death brings about what it must, a few copies at a
//! time, spread over the nodes that are left.

mod cluster_support;
mod etcd_support;
mod scale_support;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use cluster_support::{Cluster, eventually};
use etcd_support::Etcd;
use lockstep::cluster::plane::whole_volumes;
use lockstep::replication::record::{Record, State};
use lockstep::replication::throttle::SYNCS_MAX;
use scale_support::{View, attach, create, etcd_requests, get, is_tidy, is_whole, samples, sum};

const SIZE: u64 = 4 << 20;
const NODES: [usize; 5] = [1, 2, 3, 4, 5];
const MANY: usize = 60;
/// Requests to the registry a second. Five nodes that look at it every five seconds would ask once a second.
const QUIET: f64 = 0.5;

fn cluster(registry: &str) -> (Cluster, View) {
    let mut cluster = Cluster::empty(Path::new("/dev/shm"));
    let location = match registry {
        "" => format!("sqlite:{}", cluster.registry().display()),
        at => at.to_string(),
    };
    cluster.registry_at = Some(location.clone());
    for n in NODES {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    let view = View::of(&location);
    (cluster, view)
}

/// Waits until so many volumes are there and each of them is so.
fn all(view: &View, count: usize, what: &str, is: impl Fn(&Record) -> bool) {
    eventually(&format!("all volumes are {what}"), || {
        (view.count(&is) == (count, count)).then_some(())
    });
}

/// Requests to etcd a second while nothing happens. A machine that has other things to do loses a copy now and then: a load
/// that ends is looked past, one that does not end is not.
fn idle_requests(etcd: &Etcd) -> f64 {
    // What keeps etcd's own client library alive is not ours.
    let ours = || -> f64 {
        let all = etcd_requests(&etcd.url(1));
        let methods = ["Range", "Txn", "Watch"].iter();
        methods.filter_map(|m| all.get(*m)).sum()
    };
    let spans = (0..4).map(|_| {
        let (before, begin) = (ours(), Instant::now());
        std::thread::sleep(Duration::from_secs(7));
        (ours() - before) / begin.elapsed().as_secs_f64()
    });
    let mut seen: Vec<f64> = Vec::new();
    for rate in spans {
        seen.push(rate);
        if rate < QUIET {
            break;
        }
    }
    seen.into_iter().fold(f64::INFINITY, f64::min)
}

#[test]
fn an_idle_cluster_leaves_the_registry_alone_however_many_volumes_there_are() {
    let etcd = Etcd::start(1);
    let (cluster, view) = cluster(&etcd.location(&[1]));
    create(&cluster, &NODES, (0, 10), SIZE, 2, "soft");
    attach(&cluster, 0, 1);
    attach(&cluster, 1, 2);
    all(&view, 10, "well", is_tidy);
    let few = idle_requests(&etcd);
    create(&cluster, &NODES, (10, MANY), SIZE, 2, "soft");
    all(&view, MANY, "well", is_tidy);
    let many = idle_requests(&etcd);
    // Five nodes that look at it every five seconds would ask once a second.
    assert!(
        few < 0.5 && many < 0.5,
        "{few} and {many} requests a second"
    );
    // Nor does somebody who scrapes metrics ask it anything.
    let before = etcd_requests(&etcd.url(1));
    let texts = NODES.map(|n| get(&cluster, n, "/metrics").unwrap());
    let volumes: f64 = texts
        .iter()
        .map(|text| sum(text, "lockstep_volume_health"))
        .sum();
    assert_eq!(volumes, MANY as f64, "each is spoken of by one node");
    let ranges = |all: &BTreeMap<String, f64>| all.get("Range").copied().unwrap_or(0.0);
    let asked = ranges(&etcd_requests(&etcd.url(1))) - ranges(&before);
    assert!(asked < NODES.len() as f64, "{asked} requests for metrics");
}

/// The most syncs at once from each of these nodes, and to it.
fn most_syncs(cluster: &Cluster, nodes: &[usize]) -> BTreeMap<usize, (f64, f64)> {
    nodes
        .iter()
        .map(|n| {
            let text = get(cluster, *n, "/metrics").unwrap();
            let most = samples(&text, "lockstep_syncs_running_max");
            (*n, (most["{end=\"from\"}"], most["{end=\"to\"}"]))
        })
        .collect()
}

/// No node had more syncs at once than it should, and this one had some.
fn syncs_were_bounded(cluster: &Cluster, nodes: &[usize], to: usize) {
    let most = most_syncs(cluster, nodes);
    let bound = SYNCS_MAX as f64;
    for (from, to) in most.values() {
        assert!(*from <= bound && *to <= bound, "{most:?}");
    }
    assert!(
        most[&to].1 > 0.0,
        "{most:?}: n{to} was not brought anything"
    );
}

#[test]
fn copies_of_a_lost_node_are_made_elsewhere_a_few_at_a_time_and_spread_over_all_others() {
    // Given volumes with copies everywhere, a good part of them attached,
    let (mut cluster, view) = cluster("");
    create(&cluster, &NODES, (0, MANY), SIZE, 2, "soft");
    for i in 0..MANY / 2 {
        attach(&cluster, i, 1 + i % 4);
    }
    all(&view, MANY, "well", is_tidy);
    let before = view.copies_by_node();
    assert!(before.values().all(|n| (30..=42).contains(n)), "{before:?}");
    // when a node is gone for a moment, then all attached volumes miss a copy at once, and it gets a few at a time.
    cluster.kill(5);
    let lost = |r: &Record| r.attachment.is_none() || r.in_sync().all(|c| c.node.0 != "n5");
    all(&view, MANY, "without n5 if they are attached", lost);
    cluster.start_node(5);
    all(&view, MANY, "tidy", is_tidy);
    syncs_were_bounded(&cluster, &NODES, 5);
    // When it is lost for longer than lost copies are waited for,
    cluster.ok(1, "cluster update --replace-after 1s");
    cluster.kill(5);
    // then every volume, attached or not, has all its copies again,
    all(&view, MANY, "whole without n5", |r| is_whole(r, Some("n5")));
    syncs_were_bounded(&cluster, &[1, 2, 3, 4], 1);
    // on all nodes that are left.
    let after = view.copies_by_node();
    let held: Vec<usize> = (1..=4).map(|n| after[&format!("n{n}")]).collect();
    let even = 3 * MANY / 4;
    assert!(
        held.iter().all(|n| n.abs_diff(even) <= even / 4),
        "{held:?}, before {before:?}"
    );
    // When it comes back, what it has is not wanted any more.
    cluster.start_node(5);
    all(&view, MANY, "tidy", is_tidy);
}

#[test]
fn what_a_node_leaves_that_dies_while_it_replaces_copies_is_finished_by_others() {
    // Given volumes that serve with any copy, none of them attached,
    let (mut cluster, view) = cluster("");
    create(&cluster, &NODES, (0, MANY), SIZE, 2, "alwayson");
    all(&view, MANY, "well", is_tidy);
    cluster.ok(1, "cluster update --replace-after 1s");
    // when a node is lost, and another one while it looks after volumes because of that,
    cluster.kill(5);
    eventually("n4 looks after volumes", || {
        let busy = view.see(|s| {
            whole_volumes(s).any(|(_, _, (r, _))| {
                let by_n4 = r.attachment.as_ref().is_some_and(|a| a.node.0 == "n4");
                by_n4 && r.state != State::Clean
            })
        });
        busy.then_some(())
    });
    cluster.kill(4);
    // then the three that are left have a copy of everything, and nothing is left open.
    let without_both = |r: &Record| {
        let gone = |n: &str| n == "n4" || n == "n5";
        let left = r.in_sync().filter(|c| !gone(&c.node.0)).count();
        left == 3 && r.attachment.is_none() && r.state == State::Clean
    };
    all(&view, MANY, "whole on three nodes", without_both);
    // When both are back, all is tidy, and every copy that counts is there.
    cluster.start_node(4);
    cluster.start_node(5);
    all(&view, MANY, "tidy", is_tidy);
    for i in [0, MANY / 2, MANY - 1] {
        let name = scale_support::name(i);
        cluster.wait_for(1, &name, "is healthy", |v| v["health"] == "healthy");
        assert_eq!(cluster.copies_are_identical(1, &name).len(), 3);
    }
}
