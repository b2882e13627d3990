//! Node processes whose registry is etcd, and what guests notice when it is gone: nothing while all copies are healthy, a
//! pause while one is lost, and no error.

mod cluster_support;
mod etcd_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cluster_support::client::{Load, Plan};
use cluster_support::net::{Cut, How};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, copies, eventually, lockstep};
use etcd_support::{Etcd, Pki, credentials};
use serde_json::Value;

const SIZE: u64 = 32 << 20;
/// Longer than any test leaves etcd alone: no request may fail.
const CREATE: &str = "--size 32MiB --replicas 2 --master n1 --suspend-deadline 10m";
/// How long a node's lease lasts.
const LEASE: Duration = Duration::from_secs(30);
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
    // and the load goes on, for longer than any lease of a node lasts.
    let begin = Instant::now();
    while begin.elapsed() < 2 * LEASE {
        std::thread::sleep(WATCHED);
        load.goes_on();
    }
    // When it is back, everything works again by itself.
    etcd.start_member(1);
    eventually("volumes can be made again", || {
        (cluster.run(1, "volume create vm2 --size 32MiB").code == 0).then_some(())
    });
    eventually("every node is announced", || {
        let leases = etcd.ok(1, &["lease", "list"]);
        leases.contains("found 3 leases").then_some(())
    });
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn requests_that_wait_for_etcd_fail_after_the_deadline_and_are_served_again_when_it_is_back() {
    // Given a volume whose requests wait for a second at most,
    let mut etcd = Etcd::start(1);
    let mut cluster = cluster(&etcd, &[1], 3);
    let create = "--size 32MiB --replicas 2 --master n1 --suspend-deadline 1s";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    // when a copy is lost and etcd is gone, so that it cannot be put out,
    etcd.kill(1);
    load.goes_on();
    assert_eq!(load.failed(), 0);
    cluster.kill(3);
    // then they fail, more than those that were under way,
    eventually("requests fail", || {
        load.still_runs();
        (load.failed() > 100).then_some(())
    });
    let phase = attachment(&cluster, 1).map(|a| a["phase"].clone());
    assert_eq!(phase, Some("suspended".into()));
    // and when etcd is back, all of them succeed again, with nothing done by anybody.
    etcd.start_member(1);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    let failed = load.failed();
    load.goes_on();
    assert_eq!(load.failed(), failed);
    cluster.start_node(3);
    cluster.wait_for(1, "vm1", "is whole", |v| v["health"] == "healthy");
    // What was acknowledged is there, what failed is there or not.
    assert_eq!(load.finish().failed, failed);
    cluster.detach(1, "vm1");
    let all = ["n1", "n2", "n3"];
    assert_eq!(cluster.copies_are_identical(1, "vm1"), all);
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

/// Nodes n1 to n3, and members of etcd where n4 … would be, each with a network namespace of its own.
fn apart(members: usize) -> (Etcd, Cluster) {
    let mut cluster = Cluster::empty_on_a_network(Path::new("/dev/shm"), 3 + members);
    let network = cluster.network.as_ref().unwrap();
    let all = 4..=3 + members;
    let places: Vec<String> = all.clone().map(|n| network.namespace(n)).collect();
    let etcd = Etcd::start_at(
        all.map(|n| cluster.ip(n)).collect(),
        Box::new(move |m, program| {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &places[m - 1]]).arg(program);
            command
        }),
    );
    let all: Vec<usize> = (1..=members).collect();
    cluster.registry_at = Some(etcd.location(&all));
    for n in 1..=3 {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    (etcd, cluster)
}

/// All ways between node n and etcd.
fn to_etcd(n: usize, members: usize) -> Vec<Cut> {
    let how = How::Drop;
    let ways = (4..=3 + members).flat_map(|m| [(n, m), (m, n)]);
    ways.map(|(from, to)| Cut { from, to, how }).collect()
}

fn cut(cluster: &Cluster, ways: &[Cut]) {
    let network = cluster.network.as_ref().unwrap();
    ways.iter().for_each(|way| network.cut(*way));
}

fn heal(cluster: &Cluster, ways: &[Cut]) {
    let network = cluster.network.as_ref().unwrap();
    ways.iter().for_each(|way| network.heal(*way));
}

#[test]
fn a_node_that_is_cut_off_from_etcd_serves_on_until_a_copy_is_lost_and_again_when_it_is_healed() {
    // Given nodes n1 to n3 and members of etcd at n4 to n6,
    let (_etcd, mut cluster) = apart(3);
    let (_, load) = serve(&cluster);
    // when all ways between n1 and etcd are cut,
    let ways = to_etcd(1, 3);
    cut(&cluster, &ways);
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
    heal(&cluster, &ways);
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

#[test]
fn a_creation_whose_creator_is_gone_for_good_is_given_up_by_the_others() {
    // Given a creation that waits for n3, which does not hear of it,
    let (_etcd, mut cluster) = apart(1);
    let ways = to_etcd(3, 1);
    cut(&cluster, &ways);
    let mut command = cluster.begin(1, "volume create vm1 --size 32MiB --replicas 2");
    let copies_on = |cluster: &Cluster, n| {
        let volumes = cluster.data_dir(n).join("volumes");
        std::fs::read_dir(volumes).map_or(0, Iterator::count)
    };
    eventually("n1 and n2 have made their copies", || {
        [1, 2]
            .iter()
            .all(|n| copies_on(&cluster, *n) == 1)
            .then_some(())
    });
    // when its creator dies and does not return,
    cluster.kill(1);
    assert!(!command.wait().unwrap().success());
    heal(&cluster, &ways);
    eventually("n3 makes its copy", || {
        (copies_on(&cluster, 3) == 1).then_some(())
    });
    let again = "volume create vm1 --size 32MiB --replicas 1";
    cluster.run(2, again).refused(9, &["vm1 exists already"]);
    // then the others give it up after a while, and nothing is left of it,
    eventually("the name is free", || {
        (cluster.run(2, "volume inspect vm1").code == 8).then_some(())
    });
    let log = format!("{}{}", cluster.log(2), cluster.log(3));
    assert!(
        log.contains("n1, which created it, cannot be reached"),
        "{log}"
    );
    eventually("n2 and n3 have no copies", || {
        [2, 3]
            .iter()
            .all(|n| copies_on(&cluster, *n) == 0)
            .then_some(())
    });
    cluster.ok(2, again);
    cluster.ok(2, "volume rm vm1");
    // not on the creator either, should it return.
    cluster.start_node(1);
    cluster.nothing_was_made(2);
}

#[test]
fn nodes_prove_themselves_to_etcd_by_certificate_and_password_and_the_password_changes_meanwhile() {
    // Given a cluster on a file, and an etcd that wants a certificate of our authority, a user and a password,
    let pki = Pki::new();
    let mut etcd = Etcd::start_tls(3, &pki);
    etcd.guard("lockstep:first");
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    let (socket, load) = serve(&cluster);
    let oracle = load.finish().oracle;
    for n in 1..=3 {
        assert!(cluster.stop(n).success());
    }
    let from = format!("sqlite:{}", cluster.registry().display());
    let to = etcd.location(&[1, 2, 3]);
    let dir = cluster.dir.path().to_path_buf();
    let file = credentials(&dir, "lockstep:first\n");
    let client = pki.directory("client", "etcd", vec!["a node".into()]);
    let tls = ["--tls-dir".to_string(), client.display().to_string()];
    let user = ["--etcd-credentials".to_string(), file.display().to_string()];
    let shown = [tls.clone(), user].concat();
    let run = |words: &[&str], shown: &[String]| {
        let done = lockstep().args(words).args(shown).output().unwrap();
        let text = [done.stdout, done.stderr].concat();
        (done.status.code(), String::from_utf8(text).unwrap())
    };
    // when its registry is moved there, and a machine looked at, with half of what is wanted, then it is said what lacks,
    let migrate = ["registry", "migrate", &from, &to];
    let here = format!("{}:5703", cluster.ip(9));
    let http = format!("{}:5705", cluster.ip(9));
    let new = dir.join("new").display().to_string();
    let mut doctor = vec![
        "doctor",
        "--registry",
        &to,
        "--listen",
        &here,
        "--http",
        &http,
    ];
    doctor.extend(["--data-dir", &new, "--run-dir", &new]);
    for words in [&migrate[..], &doctor] {
        for (shown, part) in [(&[][..], "--tls-dir"), (&tls, "give --etcd-credentials")] {
            let (code, text) = run(words, shown);
            assert!(code != Some(0) && text.contains(part), "{words:?}: {text}");
        }
    }
    // and with all of it, it works.
    let (code, text) = run(&migrate, &shown);
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = run(&doctor, &shown);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("3 nodes, 1 volumes"), "{text}");
    cluster.registry_at = Some(to);
    for n in 1..=3 {
        let data = cluster.data_dir(n);
        cluster.start_node_with(n, &data, &shown);
    }
    cluster.know_each_other();
    let serves = |v: &Value| v["health"] == "healthy" && v["attachment"]["phase"] == "serving";
    cluster.wait_for(1, "vm1", "serves", serves);
    let load = Load::start(&socket, Plan::small(), oracle);
    load.goes_on();
    // When the password changes while nodes run,
    etcd.change_password("lockstep", "second");
    credentials(&dir, "lockstep:second\n");
    // then they log in with the new one by themselves: people's commands work, also through a member that has forgotten them,
    let make = |name: &str| {
        eventually(&format!("{name} is made"), || {
            let done = cluster.run(2, &format!("volume create {name} --size 32MiB"));
            (done.code == 0).then_some(())
        });
    };
    make("vm2");
    for m in 1..=3 {
        etcd.kill(m);
        etcd.start_member(m);
        etcd.await_member(m);
    }
    make("vm3");
    // nodes are announced, and a lost copy is put out and comes back under load.
    eventually("every node is announced", || {
        let leases = etcd.ok(1, &["lease", "list"]);
        leases.contains("found 3 leases").then_some(())
    });
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    cluster.start_node(3);
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}
