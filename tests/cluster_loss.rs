//! A node is lost under load: nothing acknowledged is lost with it, and nothing fails that need not.

mod cluster_support;

use std::path::Path;
use std::time::{Duration, Instant};

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually};

const SIZE: u64 = 32 << 20;
/// How long requests are watched not to end. Any is good; a longer one sees more.
const WATCHED: Duration = Duration::from_secs(2);

fn in_memory(nodes: usize) -> Cluster {
    Cluster::start_in(Path::new("/dev/shm"), nodes)
}

#[test]
fn a_killed_replica_costs_no_request_and_is_out_of_the_in_sync_set() {
    // Given a volume with two replicas under load,
    let mut cluster = in_memory(3);
    let create = "--size 32MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let epoch = cluster.volume(1, "vm1")["epoch"].as_u64().unwrap();
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    // when a replica's node is killed,
    cluster.kill(3);
    // then the load goes on and the volume says what it lost,
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    let volume = cluster.volume(1, "vm1");
    assert_eq!(copies(&volume, "in_sync"), ["n1", "n2"]);
    assert_eq!(copies(&volume, "missing"), ["n3"]);
    assert_eq!(volume["epoch"].as_u64().unwrap(), epoch + 1);
    assert!(cluster.rules(1, "vm1").iter().any(|r| r == "2.6 eject"));
    // and what is left of it is the same everywhere.
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), ["n1", "n2"]);
}

#[test]
fn a_silent_replica_is_ejected_and_comes_back_by_a_sync_when_it_wakes() {
    let mut cluster = in_memory(3);
    let create = "--size 32MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    // When a replica's node stops without a word,
    cluster.freeze(2);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    // and wakes later,
    cluster.thaw(2);
    cluster.wait_for(1, "vm1", "has all copies in sync", |v| {
        copies(v, "in_sync") == ["n1", "n2", "n3"]
    });
    load.goes_on();
    // then nothing failed, and it counts again only because it was brought up to date.
    assert_eq!(load.finish().failed, 0);
    let rules = cluster.rules(1, "vm1");
    for rule in ["2.6 eject", "6 mirrored", "6 in sync"] {
        assert!(rules.iter().any(|r| r == rule), "{rule} in {rules:?}");
    }
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), ["n1", "n2", "n3"]);
}

#[test]
fn the_failure_mode_decides_whether_the_last_copy_serves() {
    let mut cluster = in_memory(3);
    let create = "--size 32MiB --replicas 2 --master n1";
    let socket = cluster.serve(
        "on",
        &format!("{create} --failure-mode alwayson"),
        "--node n1",
    );
    let strict = format!("{create} --suspend-deadline 1s");
    let strict = cluster.serve("strict", &strict, "--node n1");
    let always = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    let soft = Load::start(&strict, Plan::small(), Oracle::new(SIZE));
    always.goes_on();
    soft.goes_on();
    // When both replicas are lost,
    cluster.kill(2);
    cluster.kill(3);
    // then one volume goes on, and the other fails its requests after the deadline.
    cluster.wait_for(1, "on", "has one copy", |v| copies(v, "in_sync") == ["n1"]);
    cluster.wait_for(1, "strict", "is suspended", |v| v["health"] == "suspended");
    always.goes_on();
    eventually("requests of the suspended volume fail", || {
        (soft.failed() > 0).then_some(())
    });
    assert_eq!(always.finish().failed, 0);
    // When nobody brings them back and the operator says so, then it serves what is left, at once;
    cluster.ok(1, "volume update strict --failure-mode alwayson");
    cluster.wait_for(1, "strict", "serves again", |v| v["health"] == "degraded");
    // what had failed may be retried and is taken,
    none_fails_any_more(&soft);
    // and a mode that would stop it again is refused.
    let refused = cluster.run(1, "volume update strict --failure-mode hard");
    refused.refused(11, &["0 of 2 replicas in sync", "hard would suspend it"]);
    none_fails_any_more(&soft);
    soft.finish();
}

/// Requests succeed from now on; those that had failed have been answered.
fn none_fails_any_more(load: &Load) {
    load.goes_on();
    let failed = load.failed();
    load.goes_on();
    assert_eq!(load.failed(), failed);
}

#[test]
fn a_volume_that_is_strict_waits_for_every_copy_and_fails_nothing() {
    let mut cluster = in_memory(3);
    let create = "--size 32MiB --replicas 2 --master n1 --failure-mode hard --suspend-deadline 10m";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    // When one of three copies is lost,
    cluster.kill(3);
    // then the volume stands still and says why,
    let volume = cluster.wait_for(1, "vm1", "is suspended", |v| v["health"] == "suspended");
    let why = volume["why"].as_str().unwrap();
    assert!(why.contains("hard") || why.contains("Hard"), "{why}");
    assert_eq!(copies(&volume, "in_sync"), ["n1", "n2"]);
    let before = load.done();
    std::thread::sleep(WATCHED);
    assert_eq!(load.done(), before, "a request was completed");
    // and when the copy is back and up to date it serves on, and nothing failed.
    cluster.start_node(3);
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    let rules = cluster.rules(1, "vm1");
    for rule in ["2.6 eject", "7 suspend", "6 in sync", "7 serve"] {
        assert!(rules.iter().any(|r| r == rule), "{rule} in {rules:?}");
    }
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), ["n1", "n2", "n3"]);
}

#[test]
fn a_volume_that_failed_requests_serves_again_by_itself_when_its_copies_return() {
    let mut cluster = in_memory(3);
    let create = "--size 32MiB --replicas 2 --master n1 --suspend-deadline";
    let serve = |name: &str, deadline: &str| {
        let socket = cluster.serve(name, &format!("{create} {deadline}"), "--node n1");
        Load::start(&socket, Plan::small(), Oracle::new(SIZE))
    };
    let (impatient, patient) = (serve("impatient", "0s"), serve("patient", "10s"));
    impatient.goes_on();
    patient.goes_on();
    // When the copies that its failure mode asks for are lost,
    let lost = Instant::now();
    cluster.kill(2);
    cluster.kill(3);
    // then requests fail at once where nobody wants to wait,
    eventually("requests of the impatient fail", || {
        (impatient.failed() > 0).then_some(())
    });
    // and elsewhere not before the deadline has passed.
    assert_eq!(patient.failed(), 0);
    eventually("requests of the patient fail", || {
        (patient.failed() > 0).then_some(())
    });
    let after = lost.elapsed();
    assert!(
        after >= Duration::from_secs(10),
        "one failed after {after:?}"
    );
    // When the copies return, then both serve by themselves, and nothing fails any more.
    cluster.start_node(2);
    cluster.start_node(3);
    for (name, load) in [("impatient", impatient), ("patient", patient)] {
        cluster.wait_for(1, name, "is healthy", |v| v["health"] == "healthy");
        none_fails_any_more(&load);
        let failed = load.failed();
        assert_eq!(load.finish().failed, failed);
        let rules = cluster.rules(1, name);
        for rule in ["7 suspend", "7 serve"] {
            assert!(rules.iter().any(|r| r == rule), "{rule} in {rules:?}");
        }
        cluster.detach(1, name);
        assert_eq!(cluster.copies_are_identical(1, name).len(), 3);
    }
}

#[test]
fn the_master_is_lost_under_an_attachment_elsewhere() {
    // Given a volume served from a node that holds no copy,
    let mut cluster = in_memory(4);
    let create = "--size 32MiB --replicas 1 --master n1";
    cluster.ok(4, &format!("volume create vm1 {create}"));
    let before = cluster.volume(4, "vm1");
    let holders = copies(&before, "in_sync");
    let spare = (1..=4)
        .find(|n| !holders.contains(&format!("n{n}")))
        .unwrap();
    cluster.ok(spare, &format!("volume attach vm1 --node n{spare}"));
    let serving = cluster.wait_for(spare, "vm1", "serves", |v| {
        v["attachment"]["phase"] == "serving"
    });
    let socket = serving["attachment"]["socket"]
        .as_str()
        .unwrap()
        .to_string();
    let load = Load::start(Path::new(&socket), Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    // when the node of the copy that is read from is killed,
    let master = serving["master"]["node"].as_str().unwrap()[1..]
        .parse()
        .unwrap();
    cluster.kill(master);
    // then the other copy takes over, and the guest sees no error.
    cluster.wait_for(spare, "vm1", "has another master", |v| {
        v["master"]["node"] != format!("n{master}") && v["health"] == "degraded"
    });
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    assert!(cluster.rules(spare, "vm1").iter().any(|r| r == "5 promote"));
}

#[test]
fn another_copy_becomes_the_master_when_somebody_asks_and_no_request_notices() {
    // Given a volume under load, read from the copy on the node that serves it,
    let cluster = in_memory(3);
    let create = "--size 32MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    let reads = |layer: &str| {
        let metric = format!("lockstep_volume_{layer}_read_total");
        cluster.figure(1, &metric, "vm1")
    };
    // when another copy is made the master, and then the first one again,
    for (master, from, not_from) in [("n2", "network", "backend"), ("n1", "backend", "network")] {
        load.goes_on();
        cluster.ok(3, &format!("volume promote vm1 --node {master}"));
        let volume = cluster.volume(1, "vm1");
        assert_eq!(volume["master"]["node"], master);
        // then reads come from it, those that were under way apart,
        load.goes_on();
        let before = (reads(from), reads(not_from));
        load.goes_on();
        assert!(reads(from) > before.0, "no read from {master}");
        assert_eq!(
            reads(not_from),
            before.1,
            "a read from elsewhere than {master}"
        );
        // and all copies count all the time.
        assert_eq!(cluster.volume(1, "vm1")["health"], "healthy");
    }
    assert_eq!(load.finish().failed, 0);
    let rules = cluster.rules(1, "vm1");
    let count = |rule: &str| rules.iter().filter(|r| *r == rule).count();
    assert_eq!(
        (count("5 promote"), count("2.6 eject")),
        (2, 0),
        "{rules:?}"
    );
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn a_node_that_is_stopped_or_killed_serves_again_what_it_served() {
    let mut cluster = in_memory(3);
    let create = "--size 32MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    let oracle = load.finish().oracle;
    // When its node is asked to stop, it leaves the volume clean,
    assert!(cluster.stop(1).success());
    assert_eq!(cluster.volume(2, "vm1")["state"], "clean");
    // and a new process serves it again on the same socket.
    cluster.start_node(1);
    let serving = |v: &serde_json::Value| v["attachment"]["phase"] == "serving";
    cluster.wait_for(1, "vm1", "serves again", serving);
    let load = Load::start(&socket, Plan::small(), oracle);
    load.goes_on();
    // When it is killed in the middle of everything,
    cluster.kill(1);
    let oracle = load.abandon().oracle;
    cluster.start_node(1);
    cluster.wait_for(1, "vm1", "serves again", serving);
    // then everything acknowledged is there, and the copies are the same.
    let load = Load::start(&socket, Plan::small(), oracle);
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn a_volume_is_attached_once() {
    let cluster = in_memory(3);
    cluster.serve("vm1", "--size 32MiB --replicas 2 --master n1", "--node n1");
    let second = cluster.run(2, "volume attach vm1 --node n2");
    second.refused(11, &["attached", "n1"]);
}
