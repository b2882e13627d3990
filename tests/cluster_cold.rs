//! Everything is gone at once and comes back in whatever order; a copy comes back that had been given up; the registry's file
//! takes no change. Nobody does anything but start processes.

mod cluster_support;

use std::path::Path;
use std::time::Duration;

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies};
use rusqlite::Connection;
use serde_json::Value;

const SIZE: u64 = 32 << 20;
const CREATE: &str = "--size 32MiB --replicas 2 --master n1 --suspend-deadline 10m";
/// How long requests are watched not to end. Any is good; a longer one sees more.
const WATCHED: Duration = Duration::from_secs(2);

fn serves(volume: &Value) -> bool {
    volume["attachment"]["phase"] == "serving"
}

/// The load ends well, and all copies are the same.
fn all_is_well(cluster: &Cluster, load: Load, expected: &[&str]) {
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.wait_for(1, "vm1", "has the copies it should", |v| {
        copies(v, "in_sync") == expected
    });
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), expected);
}

#[test]
fn a_volume_comes_back_by_itself_in_whatever_order_its_nodes_do() {
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let mut oracle = Oracle::new(SIZE);
    for order in [
        [1, 2, 3],
        [1, 3, 2],
        [2, 1, 3],
        [2, 3, 1],
        [3, 1, 2],
        [3, 2, 1],
    ] {
        let load = Load::start(&socket, Plan::small(), oracle);
        load.goes_on();
        // When all processes end at once in the middle of everything,
        cluster.kill_all();
        oracle = load.abandon().oracle;
        // and are started in this order, each when the one before it answers,
        for n in order {
            cluster.start_node(n);
        }
        // then the volume is served again, whole, with everything that was acknowledged.
        cluster.wait_for(1, "vm1", &format!("is whole after {order:?}"), |v| {
            serves(v) && copies(v, "in_sync").len() == 3
        });
    }
    let load = Load::start(&socket, Plan::mixed(), oracle);
    let master = cluster.volume(1, "vm1")["master"]["node"].clone();
    let mut expected = ["n1", "n2", "n3"];
    expected.sort_by_key(|n| (master != **n, *n));
    all_is_well(&cluster, load, &expected);
}

#[test]
fn a_volume_waits_for_a_copy_that_holds_everything_and_says_for_which() {
    // Given a volume whose copies on n2 and n3 were lost one after the other, so that n1's alone holds everything,
    let mut cluster = Cluster::start(3);
    let create = format!("{CREATE} --failure-mode alwayson");
    let socket = cluster.serve("vm1", &create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    for (n, left) in [(3, 2), (2, 1)] {
        load.goes_on();
        cluster.kill(n);
        cluster.wait_for(1, "vm1", "is degraded", |v| {
            copies(v, "in_sync").len() == left
        });
    }
    load.goes_on();
    cluster.kill(1);
    let oracle = load.abandon().oracle;
    // when only those come back, and the volume is to be served by one of them,
    cluster.start_node(2);
    cluster.start_node(3);
    cluster.ok(2, "volume detach vm1 --force");
    let mut attaching = cluster.begin(2, "volume attach vm1 --node n2");
    // then it is not served from what lacks acknowledged writes, and says which copy it waits for, wherever one looks;
    let volume = cluster.wait_for(3, "vm1", "says what it waits for", |v| {
        v["why"].as_str().unwrap_or_default().contains("copy on n1")
    });
    assert_eq!(volume["health"], "offline", "{volume:#}");
    assert_eq!(copies(&volume, "in_sync"), ["n1"]);
    assert!(attaching.try_wait().unwrap().is_none());
    // and when that is back it is served, whole, with everything.
    cluster.start_node(1);
    assert!(attaching.wait().unwrap().success());
    let volume = cluster.wait_for(2, "vm1", "is whole", |v| {
        serves(v) && copies(v, "in_sync").len() == 3
    });
    let socket = volume["attachment"]["socket"].as_str().unwrap();
    let load = Load::start(Path::new(socket), Plan::mixed(), oracle);
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(2, "vm1");
    assert_eq!(cluster.copies_are_identical(2, "vm1").len(), 3);
}

#[test]
fn a_lost_copy_that_returns_before_its_successor_is_there_stays() {
    // Given a volume under load that lost a copy, and a node where its successor cannot be made,
    let mut cluster = Cluster::start(4);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let volume = cluster.volume(1, "vm1");
    let held = copies(&volume, "in_sync");
    let spare = (2..=4).find(|n| !held.contains(&format!("n{n}"))).unwrap();
    let place = cluster.copy(spare, &volume);
    let obstacle = place.parent().unwrap();
    std::fs::write(obstacle, "not a directory").unwrap();
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    let lost = held[2][1..].parse().unwrap();
    cluster.kill(lost);
    cluster.ok(1, "cluster update --replace-after 1ms");
    let named = format!("n{spare}");
    cluster.wait_for(1, "vm1", "has a successor that gets nowhere", |v| {
        copies(v, "missing").contains(&named)
    });
    load.goes_on();
    // when the lost copy returns,
    cluster.start_node(lost);
    // then it is in sync first and stays, and the successor goes,
    let now = cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    assert_eq!(copies(&now, "in_sync"), held);
    assert_eq!(now["copies"].as_array().unwrap().len(), 3, "{now:#}");
    // for good, also when it could be made.
    std::fs::remove_file(obstacle).unwrap();
    let expected: Vec<&str> = held.iter().map(String::as_str).collect();
    all_is_well(&cluster, load, &expected);
    assert!(!place.exists());
}

#[test]
fn a_registry_that_takes_no_change_stops_nothing_but_changes() {
    // Given a volume under load and a registry file that somebody holds,
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    let held = Connection::open(cluster.registry()).unwrap();
    held.execute_batch("BEGIN IMMEDIATE").unwrap();
    // then the load goes on, and who wants a change is told to try again;
    std::thread::sleep(WATCHED);
    load.goes_on();
    let done = cluster.run(1, "volume create vm2 --size 32MiB");
    done.refused(12, &["registry"]);
    // when a replica is lost as well, requests wait, since it cannot be put out,
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is suspended for want of the registry", |v| {
        v["health"] == "suspended" && v["why"].as_str().unwrap_or_default().contains("registry")
    });
    let before = load.done();
    std::thread::sleep(WATCHED);
    assert_eq!(load.done(), before, "a request was answered");
    load.still_runs();
    // and when the registry takes changes again everything goes on by itself.
    drop(held);
    load.goes_on();
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    cluster.ok(1, "volume create vm2 --size 32MiB");
    cluster.start_node(3);
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}
