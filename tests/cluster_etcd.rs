//! Node processes whose registry is etcd, and what guests notice when it is gone: nothing while all copies are healthy, a
//! pause while one is lost, and no error.

mod cluster_support;
mod etcd_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cluster_support::client::{Load, Plan};
use cluster_support::net::{Cut, How};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually};
use etcd_support::Etcd;
use serde_json::Value;

const SIZE: u64 = 32 << 20;
/// Longer than any test leaves etcd alone: no request may fail.
const CREATE: &str = "--size 32MiB --replicas 2 --master n1 --suspend-deadline 10m";
/// How long requests are watched not to end. Any is good; a longer one sees more.
const WATCHED: Duration = Duration::from_secs(3);

/// Nodes n1 … with this etcd.
fn cluster(etcd: &Etcd, members: &[usize], nodes: usize) -> Cluster {
    let mut cluster = Cluster::empty(Path::new("/dev/shm"));
    cluster.registry_at = Some(etcd.location(members));
    for n in 1..=nodes {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    cluster
}

fn serve(cluster: &Cluster) -> (PathBuf, Load) {
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    (socket, load)
}

/// What node n says of its only attachment, asked of the node itself: the registry has no part in it.
fn attachment(cluster: &Cluster, n: usize) -> Option<Value> {
    let address = format!("{}:5705", cluster.ip(n));
    let mut stream = TcpStream::connect(address).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .ok()?;
    let question = "GET /api/v1/local/status HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n";
    stream.write_all(question.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let status: Value = serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()?;
    Some(status["attachments"][0].clone())
}

/// Waits until n1 says that requests wait, and sees that they do.
fn stands_still(cluster: &Cluster, load: &Load) {
    eventually("n1 says that its volume is suspended", || {
        let attachment = attachment(cluster, 1)?;
        let why = attachment["why"].as_str()?.to_string();
        (attachment["phase"] == "suspended" && why.contains("registry")).then_some(())
    });
    let before = load.done();
    std::thread::sleep(WATCHED);
    assert_eq!(load.done(), before, "a request was answered");
    load.still_runs();
}

/// The load ends well, the lost copies come back, and all are the same.
fn all_is_well(cluster: &Cluster, load: Load, expected: &[&str]) {
    load.goes_on();
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    cluster.wait_for(1, "vm1", "has the copies it should", |v| {
        copies(v, "in_sync") == expected
    });
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), expected);
}

#[test]
fn io_goes_on_without_etcd_as_long_as_every_copy_is_healthy() {
    // Given a volume under load,
    let mut etcd = Etcd::start(1);
    let cluster = cluster(&etcd, &[1], 3);
    let (_, load) = serve(&cluster);
    // when etcd is gone,
    etcd.kill(1);
    // then whoever wants to change something is told why not,
    let done = cluster.run(1, "volume create vm2 --size 32MiB");
    done.refused(12, &[&etcd.url(1), "go on serving"]);
    // and the load goes on, through some more attempts of the nodes to reach it.
    for _ in 0..3 {
        std::thread::sleep(WATCHED);
        load.goes_on();
    }
    // When it is back, everything works again by itself.
    etcd.start_member(1);
    eventually("volumes can be made again", || {
        (cluster.run(1, "volume create vm2 --size 32MiB").code == 0).then_some(())
    });
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn a_copy_lost_without_etcd_makes_requests_wait_and_none_fail() {
    // Given a volume under load whose etcd is gone,
    let mut etcd = Etcd::start(1);
    let mut cluster = cluster(&etcd, &[1], 3);
    let (_, load) = serve(&cluster);
    etcd.kill(1);
    load.goes_on();
    // when a replica is killed, then no write completes without it: it cannot be put out of the in-sync set.
    cluster.kill(3);
    stands_still(&cluster, &load);
    // When etcd is back, the replica is put out and everything goes on by itself.
    etcd.start_member(1);
    load.goes_on();
    let volume = cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    assert_eq!(copies(&volume, "in_sync"), ["n1", "n2"]);
    assert!(cluster.rules(1, "vm1").iter().any(|r| r == "2.6 eject"));
    cluster.start_node(3);
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn a_copy_and_the_member_that_everybody_talks_to_are_lost_together() {
    // Given a cluster with an etcd of three members,
    let mut etcd = Etcd::start(3);
    let mut cluster = cluster(&etcd, &[1, 2, 3], 3);
    let (_, load) = serve(&cluster);
    // when the member that every node uses stops in its tracks and a replica dies,
    etcd.freeze(1);
    cluster.kill(2);
    // then the ejection goes through another member, and the guest sees a pause.
    load.goes_on();
    let volume = cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    assert_eq!(copies(&volume, "in_sync"), ["n1", "n3"]);
    etcd.thaw(1);
    cluster.start_node(2);
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn a_node_that_is_cut_off_from_etcd_serves_on_until_a_copy_is_lost_and_again_when_it_is_healed() {
    // Given nodes n1 to n3 and members of etcd at n4 to n6, each with a network namespace of its own,
    let mut cluster = Cluster::empty_on_a_network(Path::new("/dev/shm"), 6);
    let network = cluster.network.as_ref().unwrap();
    let places: Vec<String> = (4..=6).map(|n| network.namespace(n)).collect();
    let etcd = Etcd::start_at(
        (4..=6).map(|n| cluster.ip(n)).collect(),
        Box::new(move |m, program| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &places[m - 1]]).arg(program);
            command
        }),
    );
    cluster.registry_at = Some(etcd.location(&[1, 2, 3]));
    for n in 1..=3 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    let (_, load) = serve(&cluster);
    // when all ways between n1 and etcd are cut,
    let ways: Vec<Cut> = (4..=6)
        .flat_map(|m| [(1, m), (m, 1)])
        .map(|(from, to)| Cut {
            from,
            to,
            how: How::Drop,
        })
        .collect();
    let cut = |cluster: &Cluster| {
        let network = cluster.network.as_ref().unwrap();
        ways.iter().for_each(|way| network.cut(*way));
    };
    let heal = |cluster: &Cluster| {
        let network = cluster.network.as_ref().unwrap();
        ways.iter().for_each(|way| network.heal(*way));
    };
    cut(&cluster);
    // then its load goes on, also when its connection is known to be dead,
    let done = cluster.run(1, "volume ls");
    assert_eq!(done.code, 12, "{done:?}");
    load.goes_on();
    // and when a replica is lost it waits, while the other nodes can reach the registry;
    cluster.kill(2);
    eventually("requests wait", || {
        let before = load.done();
        std::thread::sleep(WATCHED);
        (load.done() == before).then_some(())
    });
    cluster.ok(3, "volume inspect vm1");
    load.still_runs();
    // and when the ways are healed, everything goes on by itself.
    heal(&cluster);
    load.goes_on();
    cluster.start_node(2);
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn a_node_waits_for_etcd_when_it_starts() {
    let mut etcd = Etcd::start(1);
    let mut cluster = cluster(&etcd, &[1], 1);
    assert!(cluster.stop(1).success());
    etcd.kill(1);
    // When a node starts before its registry, it says so and waits,
    cluster.spawn_node(1);
    eventually("n1 says what it waits for", || {
        let log = cluster.log(1);
        (log.contains("waiting for it") && log.contains(&etcd.url(1))).then_some(())
    });
    assert!(cluster.is_alive(1));
    // ends when it is told to,
    assert!(cluster.stop(1).success());
    // and works as soon as the registry does.
    cluster.spawn_node(1);
    etcd.start_member(1);
    eventually("n1 answers", || cluster.answers(1).then_some(()));
}
