//! Node processes whose registry is etcd, and what guests notice when it is gone: nothing while all copies are healthy, a
//! pause while one is lost, and no error.

mod cluster_support;
mod etcd_support;
mod guest_driver;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use cluster_support::client::{Load, Plan};
use cluster_support::net::{Cut, How};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, binary, copies, eventually, lockstep};
use etcd_support::{Etcd, Pki, credentials};
use guest_driver::tracked::*;
use guest_driver::vm::{CONFIG, Vm};
use guest_driver::*;
use serde_json::Value;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

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

/// What node n answers to this question: the registry has no part in it.
fn ask(cluster: &Cluster, n: usize, path: &str) -> Option<Value> {
    let address = format!("{}:5705", cluster.ip(n));
    let mut stream = TcpStream::connect(address).ok()?;
    stream
        .set_read_timeout(Some(Duration::from_secs(10)))
        .ok()?;
    let question = format!("GET {path} HTTP/1.1\r\nhost: n\r\nconnection: close\r\n\r\n");
    stream.write_all(question.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
}

/// What node n does, by itself.
fn status(cluster: &Cluster, n: usize) -> Option<Value> {
    ask(cluster, n, "/api/v1/local/status")
}

/// What node n says of its only attachment.
fn attachment(cluster: &Cluster, n: usize) -> Option<Value> {
    Some(status(cluster, n)?["attachments"][0].clone())
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
fn a_node_that_has_never_joined_waits_for_etcd_when_it_starts() {
    let mut etcd = Etcd::start(1);
    let mut cluster = Cluster::empty(Path::new("/dev/shm"));
    cluster.registry_at = Some(etcd.location(&[1]));
    etcd.kill(1);
    // When a node that knows no cluster starts before its registry, it says so and waits,
    cluster.spawn_node(1);
    waits(&cluster, &etcd);
    assert!(cluster.is_alive(1));
    // ends when it is told to,
    assert!(cluster.stop(1).success());
    // and works as soon as the registry does.
    cluster.spawn_node(1);
    etcd.start_member(1);
    eventually("n1 answers", || cluster.answers(1).then_some(()));
}

/// n1's log says what it waits for.
fn waits(cluster: &Cluster, etcd: &Etcd) {
    eventually("n1 says what it waits for", || {
        let log = cluster.log(1);
        (log.contains("waiting for it") && log.contains(&etcd.url(1))).then_some(())
    });
}

#[test]
fn a_node_that_starts_without_etcd_says_so_to_whoever_asks() {
    let mut etcd = Etcd::start(1);
    let mut cluster = cluster(&etcd, &[1], 1);
    assert!(cluster.stop(1).success());
    etcd.kill(1);
    // When a node of a cluster starts before its registry, then it says so in its log,
    cluster.spawn_node(1);
    waits(&cluster, &etcd);
    // to whoever watches it,
    eventually("n1 says so for itself", || {
        let health = ask(&cluster, 1, "/healthz")?;
        assert_eq!(health["status"], "waiting", "{health}");
        let why = health["why"].as_str().unwrap();
        why.contains(&etcd.url(1)).then_some(())
    });
    // to whoever asks for something,
    cluster
        .run(1, "volume ls")
        .refused(12, &[&etcd.url(1), "go on serving"]);
    // and to whoever looks for the reason.
    let mut doctor = cluster_support::lockstep();
    let flags = cluster.node_arguments(1, &cluster.data_dir(1));
    let at = flags.iter().position(|flag| flag == "--listen").unwrap();
    doctor.arg("doctor").args(&flags[at..]).args(["-o", "json"]);
    let checks: Value = serde_json::from_slice(&doctor.output().unwrap().stdout).unwrap();
    let check = |name: &str| {
        let all = checks.as_array().unwrap().iter();
        all.clone().find(|c| c["check"] == name).unwrap().clone()
    };
    assert_eq!(check("registry")["outcome"], "fail", "{checks}");
    let node = check("node");
    assert_eq!(node["outcome"], "warn", "{node}");
    assert!(node["detail"].as_str().unwrap().contains(&etcd.url(1)));
    // It ends when it is told to,
    assert!(cluster.stop(1).success());
    // and one that is not told to works when the registry is back, and says no more that it waits.
    cluster.spawn_node(1);
    eventually("n1 answers for itself", || ask(&cluster, 1, "/healthz"));
    etcd.start_member(1);
    eventually("n1 answers", || cluster.answers(1).then_some(()));
    eventually("n1 waits no more", || {
        (ask(&cluster, 1, "/healthz")?["status"] == "ok").then_some(())
    });
}

#[test]
fn a_registry_that_comes_back_empty_is_left_alone_and_the_node_waits_on() {
    // Given a node of a cluster that begins while its registry is away,
    let mut etcd = Etcd::start(1);
    let mut cluster = cluster(&etcd, &[1], 1);
    assert!(cluster.stop(1).success());
    let saved = cluster.dir.path().join("saved");
    etcd.ok(1, &["snapshot", "save", saved.to_str().unwrap()]);
    etcd.ok(1, &["del", "--prefix", "/lockstep/"]);
    etcd.kill(1);
    cluster.spawn_node(1);
    waits(&cluster, &etcd);
    // when that comes back without a record, then the node says so, makes none, and waits on;
    etcd.start_member(1);
    eventually("n1 says what is wrong", || {
        let health = ask(&cluster, 1, "/healthz")?;
        assert_eq!(health["status"], "waiting", "{health}");
        let why = health["why"].as_str().unwrap();
        (why.contains("the registry is empty") && why.contains("restore")).then_some(())
    });
    let records = ["get", "--prefix", "--keys-only", "/lockstep/"];
    assert_eq!(etcd.ok(1, &records).trim(), "");
    assert!(cluster.is_alive(1));
    // and when it is restored, the node is of its cluster again.
    etcd.kill(1);
    etcd.restore(&saved);
    eventually("n1 answers", || cluster.answers(1).then_some(()));
    // One that begins with an empty registry there does not begin.
    assert!(cluster.stop(1).success());
    etcd.ok(1, &["del", "--prefix", "/lockstep/"]);
    let arguments = cluster.node_arguments(1, &cluster.data_dir(1));
    let done = cluster.node_that_must_not_start(&arguments);
    done.refused(11, &["the registry is empty", "--data-dir"]);
    assert_eq!(etcd.ok(1, &records).trim(), "");
}

/// The size that the front-end is shown, in bytes.
fn capacity(vm: &mut Vm) -> u64 {
    let (_, config) = vm.frontend.get_config(0, 8, CONFIG, &[0; 8]).unwrap();
    512 * u64::from_le_bytes(config.try_into().unwrap())
}

/// A machine's front-end connects, as soon as there is something to connect to.
fn new_machine(socket: &Path) -> Vm {
    eventually("the socket is there", || {
        UnixStream::connect(socket).is_ok().then_some(())
    });
    Vm::connect(socket)
}

/// The same again, with the memory and the ring that there are.
fn reconnect(socket: &Path, vm: Vm) -> Vm {
    let again = new_machine(socket);
    Vm {
        driver: vm.driver,
        ..again
    }
}

/// Whether somebody listens there; a node that was killed leaves its socket.
fn listens(socket: &Path) -> bool {
    UnixStream::connect(socket).is_ok()
}

/// What n1 listens for without serving it.
fn held(cluster: &Cluster) -> Vec<Value> {
    let held = status(cluster, 1).map(|status| status["held"].clone());
    held.and_then(|held| held.as_array().cloned())
        .unwrap_or_default()
}

/// Nothing is answered.
fn stands_by(vm: &mut Vm) {
    std::thread::sleep(WATCHED);
    assert_eq!(vm.driver.completions(), []);
}

const TWO_COPIES: &str = "--size 16MiB --replicas 1 --master n1 --suspend-deadline 10m";

/// The node of a machine dies with a request in flight, while etcd is away, and begins again.
fn a_machine_is_answered_at_once_and_served_when_etcd_is_back(
    cloud_hypervisor: bool,
    base: fn(&Driver) -> u16,
) {
    let mut etcd = Etcd::start(1);
    let mut cluster = cluster(&etcd, &[1], 2);
    let socket = cluster.serve("vm1", TWO_COPIES, "--node n1 --num-queues 2");
    let mut vm = Vm::connect(&socket);
    let mut region = None;
    start(&mut vm, &mut region, 0, cloud_hypervisor);
    let first = (60, T_OUT, 64, 1);
    submit(&mut vm, first);
    answered(&mut vm, &[first]);
    cluster.ok(1, "volume update vm1 --size 32MiB");
    eventually("the machine is shown the new size", || {
        (capacity(&mut vm) == 32 << 20).then_some(())
    });

    // Given a request that waits for a silent replica, which cannot be put out because etcd is gone,
    etcd.kill(1);
    cluster.freeze(2);
    let waiting = (9, T_OUT, 0, 0xa1);
    submit(&mut vm, waiting);
    let in_flight = |region: &Option<Region>| region.as_ref().map_or(0, Region::in_flight);
    eventually("it is in flight", || {
        (in_flight(&region) == 1).then_some(())
    });
    // when its node dies and begins again,
    cluster.kill(1);
    cluster.thaw(2);
    let more = (30, T_OUT, 192, 0xa6);
    submit(&mut vm, more);
    cluster.spawn_node(1);
    // then the whole handshake is answered, with the size that the machine knows,
    let mut vm = reconnect(&socket, vm);
    let base = base(&vm.driver);
    start(&mut vm, &mut region, base, cloud_hypervisor);
    assert_eq!(capacity(&mut vm), 32 << 20);
    // and nothing else: the volume may be another node's by now.
    stands_by(&mut vm);
    assert_eq!(in_flight(&region), 1);
    let held = held(&cluster);
    assert_eq!(held.len(), 1, "{held:?}");
    assert_eq!(held[0]["name"], "default/vm1");
    assert_eq!(held[0]["connected"], true);
    assert_eq!(
        status(&cluster, 1).unwrap()["attachments"],
        Value::Array(vec![])
    );
    // When etcd is back, both requests are answered, each once, on the connection that there is.
    etcd.start_member(1);
    answered(&mut vm, &[waiting, more]);
    for (sector, fill) in [(0, 0xa1), (64, 1), (192, 0xa6)] {
        assert_eq!(reads(&mut vm, sector), fill, "sector {sector}");
    }
    // What is beyond the size at its birth is there, too.
    let last = (12, T_OUT, (32 << 11) - 8, 0xa7);
    submit(&mut vm, last);
    answered(&mut vm, &[last]);
    assert_eq!(vm.driver.completions(), []);
    drop(vm);
    cluster.wait_for(1, "vm1", "is well", |v| v["health"] == "healthy");
    cluster.detach(1, "vm1");
    cluster.copies_are_identical(1, "vm1");
}

#[test]
fn cloud_hypervisor_is_answered_by_a_node_that_begins_without_etcd() {
    a_machine_is_answered_at_once_and_served_when_etcd_is_back(true, Driver::avail_idx);
}

#[test]
fn qemu_is_answered_by_a_node_that_begins_without_etcd() {
    a_machine_is_answered_at_once_and_served_when_etcd_is_back(false, Driver::used_idx);
}

#[test]
fn what_was_taken_from_a_node_that_begins_without_etcd_is_not_served_there() {
    // Given a node that died, and of whose volumes one was attached elsewhere then, and one removed,
    let mut etcd = Etcd::start(1);
    let mut cluster = cluster(&etcd, &[1], 2);
    let moved = cluster.serve("moved", TWO_COPIES, "--node n1 --num-queues 2");
    let gone = cluster.serve(
        "gone",
        "--size 16MiB --master n2",
        "--node n1 --num-queues 2",
    );
    let write = |vm: &mut Vm, wish: Wish| {
        submit(vm, wish);
        answered(vm, &[wish]);
    };
    let mut here = Vm::connect(&moved);
    start(&mut here, &mut None, 0, true);
    write(&mut here, (60, T_OUT, 0, 1));
    cluster.kill(1);
    drop(here);
    for volume in ["moved", "gone"] {
        cluster.ok(2, &format!("volume detach {volume} --force"));
    }
    cluster.ok(2, "volume rm gone");
    let there = cluster.ok(2, "volume attach moved --node n2 --num-queues 2");
    let mut there = Vm::connect(Path::new(there.trim()));
    start(&mut there, &mut None, 0, true);
    write(&mut there, (60, T_OUT, 0, 2));
    // when it begins again without etcd,
    etcd.kill(1);
    cluster.spawn_node(1);
    // then it listens for machines that may have waited for it,
    let mut vm = new_machine(&moved);
    start(&mut vm, &mut None, 0, true);
    let stale = (60, T_IN, 0, 0xee);
    submit(&mut vm, stale);
    // and answers no request; a ring can be stopped, and started again;
    stands_by(&mut vm);
    let mut other = new_machine(&gone);
    start(&mut other, &mut None, 0, true);
    assert_eq!(other.frontend.get_vring_base(0).unwrap(), 0);
    other.start_like_qemu(guest_driver::vm::LINUX, 0);
    other.settle();
    // and who serves the volume notices nothing of it, though nobody could be asked.
    write(&mut there, (60, T_OUT, 64, 3));
    assert_eq!(attachment(&cluster, 2).unwrap()["phase"], "serving");
    // When etcd is back, the machines are let go, with the reason,
    etcd.start_member(1);
    for (vm, socket, name) in [(&mut vm, &moved, "moved"), (&mut other, &gone, "gone")] {
        eventually("its connection is closed", || {
            vm.frontend.get_features().is_err().then_some(())
        });
        eventually("nobody listens there", || (!socket.exists()).then_some(()));
        let reason = format!("default/{name}: ");
        let log = cluster.log(1);
        let said = |line: &str| line.contains(&reason) && line.contains("is not to be served here");
        assert!(log.lines().any(said), "{name}");
    }
    // without having seen a byte,
    assert_eq!(vm.driver.completions(), []);
    assert_eq!(vm.driver.read(buffers(60) + 0x1000, 1), [0xee]);
    // and the volume is where it was.
    assert_eq!([0, 64].map(|at| reads(&mut there, at)), [2, 3]);
    drop(there);
    cluster.wait_for(2, "moved", "is well", |v| v["health"] == "healthy");
    cluster.detach(2, "moved");
    cluster.copies_are_identical(2, "moved");
    assert_eq!(held(&cluster), Vec::<Value>::new());
    // Nor does it remember them the next time, nor what was taken from it before a start at which it was told so at once.
    let third = cluster.serve("third", "--size 16MiB --master n2", "--node n1");
    cluster.kill(1);
    cluster.ok(2, "volume detach third --force");
    cluster.start_node(1);
    eventually("n1 has read the records", || {
        cluster
            .log(1)
            .contains("no longer remembered")
            .then_some(())
    });
    etcd.kill(1);
    cluster.kill(1);
    cluster.spawn_node(1);
    eventually("n1 answers for itself", || status(&cluster, 1));
    waits(&cluster, &etcd);
    std::thread::sleep(WATCHED);
    assert!(![&moved, &gone, &third].iter().any(|socket| listens(socket)));
    assert_eq!(held(&cluster), Vec::<Value>::new());
}

#[test]
fn a_replica_whose_process_dies_serves_its_copy_again_without_etcd() {
    // Given a volume under load whose etcd is gone,
    let mut etcd = Etcd::start(1);
    let mut cluster = cluster(&etcd, &[1], 3);
    let (_, load) = serve(&cluster);
    etcd.kill(1);
    load.goes_on();
    // when the process of a replica dies, which cannot be put out,
    cluster.kill(3);
    stands_still(&cluster, &load);
    // and begins again, then it needs nobody but the attachment to take part.
    cluster.spawn_node(3);
    load.goes_on();
    // So does the other one.
    cluster.kill(2);
    stands_still(&cluster, &load);
    cluster.spawn_node(2);
    load.goes_on();
    assert_eq!(attachment(&cluster, 1).unwrap()["phase"], "serving");
    // Nobody was put out for it, then or when etcd is back.
    etcd.start_member(1);
    for n in 1..=3 {
        eventually("it answers", || cluster.answers(n).then_some(()));
    }
    assert!(!cluster.rules(1, "vm1").iter().any(|r| r == "2.6 eject"));
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn a_new_program_whose_etcd_vanishes_takes_the_machines_over_and_serves_them_later() {
    // Given a machine whose node runs a program that can be replaced,
    let mut etcd = Etcd::start(1);
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    cluster.registry_at = Some(etcd.location(&[1]));
    let program = cluster.dir.path().join("lockstep");
    let whole = program.with_file_name("whole");
    fs::copy(binary(), &whole).unwrap();
    fs::hard_link(&whole, &program).unwrap();
    cluster.programs.insert(1, program.clone());
    for n in [1, 2] {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    let socket = cluster.serve("vm1", TWO_COPIES, "--node n1 --num-queues 2");
    let mut vm = Vm::connect(&socket);
    start(&mut vm, &mut None, 0, true);
    let first = (60, T_OUT, 64, 1);
    submit(&mut vm, first);
    answered(&mut vm, &[first]);
    // when etcd vanishes after everything was found well, before the new program has begun,
    let (begun, go) = (
        program.with_file_name("begun"),
        program.with_file_name("go"),
    );
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *--can-take-over*) ;; *) : > {}; while [ ! -e {} ]; do sleep 0.02; done;; esac\n\
         exec {} \"$@\"\n",
        begun.display(),
        go.display(),
        whole.display()
    );
    let fresh = program.with_file_name("fresh");
    fs::write(&fresh, script).unwrap();
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&fresh, &program).unwrap();
    cluster.ask_to_upgrade(1);
    eventually("the program is replaced", || begun.exists().then_some(()));
    let waiting = (9, T_OUT, 0, 0xa1);
    submit(&mut vm, waiting);
    etcd.kill(1);
    fs::write(&go, "").unwrap();
    // then the machine's connection is taken over,
    eventually("the front-end is served on", || {
        let line = "the front-end of the process before is served on";
        cluster.log(1).contains(line).then_some(())
    });
    vm.settle();
    stands_by(&mut vm);
    // and its requests are answered when etcd is back.
    etcd.start_member(1);
    answered(&mut vm, &[waiting]);
    assert_eq!([0, 64].map(|at| reads(&mut vm, at)), [0xa1, 1]);
    drop(vm);
    cluster.wait_for(1, "vm1", "is well", |v| v["health"] == "healthy");
    cluster.detach(1, "vm1");
    cluster.copies_are_identical(1, "vm1");
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
