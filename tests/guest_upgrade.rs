//! The program of a node is replaced under its running machines: by another file at its path, again and again, by one that
//! cannot take over, by one that dies at once; with everything in flight that can be.

mod cluster_support;
mod guest_driver;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::qemu::{Qemu, cpus, programs};
use cluster_support::{Cluster, binary, eventually};
use guest_driver::tracked::*;
use guest_driver::vm::{LINUX, Vm, message};
use guest_driver::*;
use serde_json::Value;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};

/// Times that the program is replaced under a load.
const UPGRADES: usize = 10;
/// The same under a guest.
const GUEST_UPGRADES: usize = 5;
/// What a copy's connection may be broken for before it is given up (replication/timing.rs), less what finding it takes: a node
/// that needs longer to begin again, on a machine that is busy with other things, may lose copies.
const SLOW_MS: u64 = 200;
/// From the log line that says so to the moment at which the first front-ends are asked to stand still (node/upgrade.rs), and more.
const BEGUN: Duration = Duration::from_millis(500);
/// More descriptors than this a program does not have for what the one before left it.
const SPARE_DESCRIPTORS: usize = 8;

/// A cluster whose n1 runs a program of its own, which can be replaced.
fn cluster(nodes: usize) -> Cluster {
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let dir = cluster.dir.path().join("program");
    fs::create_dir(&dir).unwrap();
    for file in ["old", "new"] {
        fs::copy(binary(), dir.join(file)).unwrap();
    }
    cluster.programs.insert(1, dir.join("lockstep"));
    put(&cluster, "old");
    for n in 1..=nodes {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    cluster
}

fn program(cluster: &Cluster) -> PathBuf {
    cluster.programs[&1].clone()
}

/// Puts a file in the place of n1's program, as an installation does.
fn put(cluster: &Cluster, file: &str) {
    let program = program(cluster);
    let fresh = program.with_file_name("fresh");
    fs::hard_link(program.with_file_name(file), &fresh).unwrap();
    fs::rename(fresh, program).unwrap();
}

/// Puts a script there.
fn put_script(cluster: &Cluster, text: &str, mode: u32) {
    let script = program(cluster).with_file_name("script");
    let _ = fs::remove_file(&script);
    fs::write(&script, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(mode)).unwrap();
    put(cluster, "script");
}

/// Which file a process runs.
fn runs(pid: u32) -> u64 {
    fs::metadata(format!("/proc/{pid}/exe")).unwrap().ino()
}

fn inode(cluster: &Cluster, file: &str) -> u64 {
    fs::metadata(program(cluster).with_file_name(file))
        .unwrap()
        .ino()
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// The program of n1 is replaced. Gives what the command says.
#[track_caller]
fn upgrade(cluster: &Cluster) -> Value {
    let view = cluster.json(1, "node upgrade");
    assert_eq!(view["state"], "done", "{view}");
    view
}

/// Front-ends that were taken over, and those that were lost.
fn fate(view: &Value) -> [u64; 2] {
    ["taken_over", "lost"].map(|field| view[field].as_u64().expect("a number"))
}

fn served_on(cluster: &Cluster) -> usize {
    let line = "the front-end of the process before is served on";
    cluster.log(1).matches(line).count()
}

fn ejections(cluster: &Cluster, volume: &str) -> usize {
    let rules = cluster.rules(1, volume);
    rules.iter().filter(|rule| *rule == "2.6 eject").count()
}

#[test]
fn ten_new_programs_in_a_row_serve_on_what_the_ones_before_served() {
    // Given two volumes with copies on all of three nodes, one served by n1, one by n2, and a load on each,
    let mut cluster = cluster(3);
    let create = "--size 32MiB --replicas 2";
    let mine = cluster.serve(
        "mine",
        &format!("{create} --master n1"),
        "--node n1 --num-queues 2",
    );
    let theirs = cluster.serve("theirs", &format!("{create} --master n2"), "--node n2");
    let bytes = 32 << 20;
    let load = Load::start(&mine, Plan::careless(3), Oracle::new(bytes));
    let other = Load::start(&theirs, Plan::small(), Oracle::new(bytes));
    let pid = cluster.pid(1);

    // when n1's program is replaced by another file, ten times,
    let mut standstills = Vec::new();
    let mut open = 0;
    for round in 1..=UPGRADES {
        let file = if round % 2 == 1 { "new" } else { "old" };
        put(&cluster, file);
        let view = upgrade(&cluster);
        // then that one runs, in the same process, and has the front-end, which is libblkio's and never connects again;
        assert_eq!(runs(pid), inode(&cluster, file));
        assert_eq!((&view["pid"], fate(&view)), (&pid.into(), [1, 0]), "{view}");
        standstills.push(view["standstill_ms"].as_u64().expect("a time"));
        load.goes_on();
        other.goes_on();
        // and no descriptor of the one before is left open, whatever that received from front-ends.
        match round {
            1 => {}
            2 => open = descriptors(pid),
            _ => eventually("descriptors are closed", || {
                (descriptors(pid) <= open + SPARE_DESCRIPTORS).then_some(())
            }),
        }
    }
    assert!(cluster.is_alive(1));
    let slow = standstills.iter().filter(|ms| **ms > SLOW_MS).count();
    let ejected = [ejections(&cluster, "mine"), ejections(&cluster, "theirs")];
    println!("rings stood still for {standstills:?} ms; ejections: {ejected:?}");

    // Every byte is as it was written, no request failed, no copy was lost, and all are the same.
    for load in [load, other] {
        let outcome = load.finish();
        assert_eq!(outcome.failed, 0);
    }
    assert!(
        ejected.iter().all(|count| *count <= slow),
        "{ejected:?}, {standstills:?}"
    );
    for (node, name) in [(1, "mine"), (2, "theirs")] {
        cluster.wait_for(node, name, "is healthy", |v| v["health"] == "healthy");
        cluster.detach(node, name);
        let compared = cluster.copies_are_identical(node, name);
        assert_eq!(compared.len(), 3, "{name}");
    }
}

#[test]
fn a_program_that_cannot_take_over_leaves_the_old_one_serving() {
    // Given a volume under load,
    let mut cluster = cluster(2);
    let create = "--size 16MiB --replicas 1 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(16 << 20));
    let pid = cluster.pid(1);
    let goes_on = |cluster: &mut Cluster| {
        assert!(cluster.is_alive(1));
        assert_eq!(runs(pid), inode(cluster, "old"));
        load.goes_on();
    };

    // when its program is replaced by one that says no, or says nothing a program can be run by, then that is told;
    put_script(&cluster, "echo the moon is wrong >&2; exit 3", 0o755);
    let said = &["cannot take over", "the moon is wrong", "serves on"];
    cluster.run(1, "node upgrade").refused(11, said);
    goes_on(&mut cluster);

    put_script(&cluster, "exit 0", 0o644);
    let said = &["cannot be run", "Permission denied", "serves on"];
    cluster.run(1, "node upgrade").refused(11, said);
    goes_on(&mut cluster);

    fs::remove_file(program(&cluster)).unwrap();
    let said = &["cannot be run", "No such file", "serves on"];
    cluster.run(1, "node upgrade").refused(11, said);
    goes_on(&mut cluster);

    // of one whose copies are of a newer format, the copies are named;
    put(&cluster, "new");
    let identity = cluster.data_dir(1).join("node.json");
    let ours = fs::read_to_string(&identity).unwrap();
    let newer = ours.replace("\"format\": 1", "\"format\": 2");
    assert_ne!(ours, newer);
    fs::write(&identity, newer).unwrap();
    let said = &["cannot take over", "node.json has format 2"];
    cluster.run(1, "node upgrade").refused(11, said);
    fs::write(&identity, ours).unwrap();
    goes_on(&mut cluster);

    // one that fits, and cannot be run when it comes to that, is noticed when the machines stand still: they go on;
    put_script(&cluster, "chmod -x \"$0\"; exit 0", 0o755);
    let said = &[
        "not replaced, and serves on",
        "cannot be run",
        "Permission denied",
    ];
    cluster.run(1, "node upgrade").refused(12, said);
    assert!(cluster.log(1).contains("1 volumes stand still"));
    goes_on(&mut cluster);
    assert_eq!(served_on(&cluster), 0);

    // and one that is whole takes over, asked by a signal this time.
    put(&cluster, "new");
    cluster.ask_to_upgrade(1);
    eventually("the new program runs", || {
        (runs(pid) == inode(&cluster, "new")).then_some(())
    });
    load.goes_on();
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    assert_eq!(served_on(&cluster), 1);
    cluster.detach(1, "vm1");
    cluster.copies_are_identical(1, "vm1");
}

#[test]
fn a_program_says_which_hand_over_it_reads() {
    let cluster = Cluster::empty(Path::new("/tmp"));
    let asked = |format: &str| {
        let mut arguments = cluster.node_arguments(1, &cluster.data_dir(1));
        arguments.extend(["--can-take-over".into(), format.into()]);
        cluster.node_that_must_not_start(&arguments)
    };
    assert_eq!(asked("1").code, 0);
    for other in ["0", "2"] {
        asked(other).refused(11, &[&format!("format {other}"), "restart the node"]);
    }
    // It has made nothing.
    assert!(!cluster.data_dir(1).exists());
}

/// A front-end with requests that wait for a replica that is silent.
struct Waiting {
    cluster: Cluster,
    socket: PathBuf,
    vm: Vm,
    region: Option<Region>,
    wishes: Vec<Wish>,
}

impl Waiting {
    fn new() -> Waiting {
        let mut cluster = cluster(2);
        let create = "--size 16MiB --replicas 1 --master n1";
        let socket = cluster.serve("vm1", create, "--node n1 --num-queues 2");
        let mut vm = Vm::connect(&socket);
        let mut region = None;
        start(&mut vm, &mut region, 0, false);
        for (sector, fill) in [(0, 1), (64, 2)] {
            let wish = (60, T_OUT, sector, fill);
            submit(&mut vm, wish);
            answered(&mut vm, &[wish]);
        }
        cluster.freeze(2);
        let wishes = vec![
            (9, T_OUT, 0, 0xa1),
            (3, T_OUT, 128, 0xa2),
            (21, T_FLUSH, 0, 0),
            // These overlap, and the last one counts.
            (12, T_OUT, 4, 0xa3),
            (6, T_OUT, 0, 0xa4),
            (18, T_OUT, 64, 0xa5),
        ];
        for wish in &wishes {
            submit(&mut vm, *wish);
        }
        eventually("all are in flight", || {
            let in_flight = region.as_ref().map_or(0, Region::in_flight);
            (in_flight == wishes.len()).then_some(())
        });
        Waiting {
            cluster,
            socket,
            vm,
            region,
            wishes,
        }
    }

    /// The replica is there again: all is answered, once and in order.
    fn ends(mut self) {
        let more = (30, T_OUT, 192, 0xa6);
        submit(&mut self.vm, more);
        self.wishes.push(more);
        self.cluster.thaw(2);
        answered(&mut self.vm, &self.wishes);
        for (sector, fill) in [(0, 0xa4), (64, 0xa5), (128, 0xa2), (192, 0xa6)] {
            assert_eq!(reads(&mut self.vm, sector), fill, "sector {sector}");
        }
        assert_eq!(self.vm.driver.completions(), []);
        assert_eq!(self.region.as_ref().map(Region::in_flight), Some(0));
        let stopped = self.vm.frontend.get_vring_base(0).unwrap();
        assert_eq!(stopped, u32::from(self.vm.driver.used_idx()));
        drop(self.vm);
        self.cluster.detach(1, "vm1");
        self.cluster.copies_are_identical(1, "vm1");
    }

    fn resubmitted(&self) -> usize {
        let line = format!(", {} requests that were in flight", self.wishes.len());
        self.cluster.log(1).matches(&line).count()
    }
}

#[test]
fn requests_that_wait_for_a_silent_replica_outlive_the_program_and_hold_it_up_for_a_moment_only() {
    let mut waiting = Waiting::new();
    put(&waiting.cluster, "new");
    let view = upgrade(&waiting.cluster);
    assert_eq!(fate(&view), [1, 0], "{view}");
    assert_eq!(waiting.resubmitted(), 1);
    // The same connection, whose messages are answered.
    waiting.vm.settle();
    waiting.ends();
}

#[test]
fn a_program_that_dies_at_once_costs_a_connection_and_nothing_else() {
    let mut waiting = Waiting::new();
    put(&waiting.cluster, "new");
    let pid = waiting.cluster.pid(1);
    // Given that the new program has only just begun,
    let new = inode(&waiting.cluster, "new");
    waiting.cluster.ask_to_upgrade(1);
    while runs(pid) != new {
        assert!(waiting.cluster.is_alive(1));
        std::thread::yield_now();
    }
    // when it is killed, and started again,
    waiting.cluster.kill(1);
    waiting.cluster.spawn_node(1);
    // then the front-end, whose connection is gone, connects again and brings along what was in flight.
    let again = eventually("the socket is there", || {
        UnixStream::connect(&waiting.socket).is_ok().then(|| {
            let mem = Arc::clone(&waiting.vm.driver.mem);
            Vm::with_memory(&waiting.socket, mem, 0)
        })
    });
    waiting.vm = Vm {
        driver: waiting.vm.driver,
        ..again
    };
    let base = waiting.vm.driver.used_idx();
    start(&mut waiting.vm, &mut waiting.region, base, false);
    assert!(waiting.resubmitted() >= 1);
    eventually("n1 answers", || waiting.cluster.answers(1).then_some(()));
    waiting.ends();
}

#[test]
fn a_front_end_that_tracks_nothing_is_taken_over_when_nothing_is_in_flight() {
    // Given a front-end without an in-flight region,
    let mut cluster = cluster(2);
    let create = "--size 16MiB --replicas 1 --master n1 --failure-mode hard --suspend-deadline 10m";
    let socket = cluster.serve("vm1", create, "--node n1 --num-queues 2");
    let mut vm = Vm::connect(&socket);
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(1);
    let pid = cluster.pid(1);

    // when the program is replaced while nothing is in flight, then it is taken over;
    put(&cluster, "new");
    let view = upgrade(&cluster);
    assert_eq!(fate(&view), [1, 0], "{view}");
    vm.works(2);

    // also when it has a chain in its ring that cannot be answered: nobody waits for that;
    vm.driver.write(vm.scratch, &header(T_OUT, 8));
    let no_status = desc(vm.scratch, 16 + 512, 0, 0);
    vm.driver.offer_chain(0, &[no_status]);
    vm.driver.kick.write(1).unwrap();
    eventually("the ring is given up", || {
        let said = "queue 0 is broken and not read any more";
        cluster.log(1).contains(said).then_some(())
    });
    put(&cluster, "old");
    let view = upgrade(&cluster);
    assert_eq!(fate(&view), [1, 0], "{view}");
    // It is broken for the next program, too, until the guest resets its device.
    eventually("the ring is given up again", || {
        let said = "queue 0 is broken and not read any more";
        (cluster.log(1).matches(said).count() == 2).then_some(())
    });
    vm.frontend.get_vring_base(0).unwrap();
    vm.driver = Driver::new(Arc::clone(&vm.driver.mem), 0, 128);
    vm.driver.start_at(0);
    vm.start_like_qemu(LINUX, 0);
    vm.works(3);
    put(&cluster, "new");
    upgrade(&cluster);

    // with a request that waits for a replica that is gone, the program stays;
    cluster.kill(2);
    let data = [7; 4096];
    let (_, status) = vm.submit(T_OUT, 8, &data);
    put(&cluster, "old");
    let said = &[
        "not replaced",
        "default/vm1",
        "1 requests of queue 0 do not end",
        "in-flight region",
    ];
    cluster.run(1, "node upgrade").refused(12, said);
    assert_eq!(runs(pid), inode(&cluster, "new"));
    assert_eq!(vm.driver.read(status, 1), [0xff]);

    // and the request is answered when the replica is back.
    cluster.start_node(2);
    eventually("it is answered", || {
        (vm.driver.completions().len() == 1).then_some(())
    });
    assert_eq!(vm.driver.read(status, 1), [0]);
    vm.driver.set_used_event(vm.driver.used_idx());
    let view = upgrade(&cluster);
    assert_eq!(view["taken_over"], 1, "{view}");
    assert_eq!(vm.io(T_IN, 8, &[0; 4096]), (0, data.to_vec()));
}

#[test]
fn front_ends_that_stall_hold_up_no_upgrade() {
    // Given three volumes: one under load, one whose front-end has said half a message, one whose front-end sends a device
    // state and does not end it,
    let mut cluster = cluster(1);
    let serve = |name: &str| {
        let create = "--size 16MiB --replicas 0 --master n1";
        cluster.serve(name, create, "--node n1 --num-queues 2")
    };
    let [loaded, half, state] = ["loaded", "half", "state"].map(serve);
    let load = Load::start(&loaded, Plan::small(), Oracle::new(16 << 20));
    let mut stalls = UnixStream::connect(&half).unwrap();
    let asks = message(1, &[]);
    stalls.write_all(&asks[..7]).unwrap();
    let mut vm = Vm::connect(&state);
    vm.negotiate_with(VhostUserProtocolFeatures::DEVICE_STATE);
    let (reader, writer) = std::io::pipe().unwrap();
    let (direction, phase) = (
        VhostTransferStateDirection::LOAD,
        VhostTransferStatePhase::STOPPED,
    );
    vm.frontend
        .set_device_state_fd(direction, phase, reader.into())
        .unwrap();
    cluster.wait_for(1, "half", "is connected", |v| {
        v["attachment"]["connected"] == true
    });

    // when the program is replaced, then all keep their connections, and are understood to the end.
    put(&cluster, "new");
    let view = upgrade(&cluster);
    assert_eq!(fate(&view), [3, 0], "{view}");
    load.goes_on();
    stalls.write_all(&asks[7..]).unwrap();
    stalls.read_exact(&mut [0; 20]).unwrap();
    drop(writer);
    vm.frontend.check_device_state().unwrap();
    vm.start_like_qemu(LINUX, 0);
    vm.works(1);
    assert_eq!(load.finish().failed, 0);
    // A stalled one that nobody waits for is let go.
    stalls.write_all(&asks[..7]).unwrap();
    eventually("it is let go", || {
        let said = "default/half: connection closed: its front-end has begun a message";
        cluster.log(1).contains(said).then_some(())
    });
    assert!(cluster.is_alive(1));
}

#[test]
fn a_front_end_that_stops_a_ring_in_vain_is_let_go_and_the_others_are_not() {
    // Given two volumes whose replicas are on different nodes; one with requests that wait for a node that is gone, the other
    // one without an in-flight region,
    let mut cluster = cluster(3);
    let create = "--size 16MiB --replicas 1 --master n1 --failure-mode hard --suspend-deadline 10m";
    let serve = |cluster: &Cluster, name: &str, not: &str| {
        cluster.ok(1, &format!("node cordon {not}"));
        let socket = cluster.serve(name, create, "--node n1 --num-queues 2");
        cluster.ok(1, &format!("node uncordon {not}"));
        socket
    };
    let stops = serve(&cluster, "stops", "n3");
    let waits = serve(&cluster, "waits", "n2");
    let mut vm = Vm::connect(&stops);
    let mut region = None;
    start(&mut vm, &mut region, 0, false);
    let mut other = Vm::connect(&waits);
    other.negotiate();
    other.start_like_qemu(LINUX, 0);
    other.works(1);
    cluster.kill(2);
    let wish = (9, T_OUT, 0, 0xa1);
    submit(&mut vm, wish);
    eventually("it is in flight", || {
        (region.as_ref().unwrap().in_flight() == 1).then_some(())
    });

    // when the program is to be replaced, and waits for a request of the latter,
    let replica = rustix::process::Pid::from_raw(cluster.pid(3) as i32).unwrap();
    cluster.freeze(3);
    let (_, status) = other.submit(T_OUT, 8, &[7; 4096]);
    put(&cluster, "new");
    let driver = std::thread::scope(|scope| {
        let upgraded = scope.spawn(|| upgrade(&cluster));
        eventually("it has begun", || {
            let said = "is to replace this program";
            cluster.log(1).contains(said).then_some(())
        });
        std::thread::sleep(BEGUN);
        // while the former begins to stop its ring, for which its front-end waits for seconds,
        let stopped = scope.spawn(move || (vm.frontend.get_vring_base(0).is_ok(), vm.driver));
        std::thread::sleep(BEGUN);
        rustix::process::kill_process(replica, rustix::process::Signal::CONT).unwrap();
        // then its connection is closed,
        let view = upgraded.join().unwrap();
        assert_eq!(fate(&view), [1, 1], "{view}");
        let (answered, driver) = stopped.join().unwrap();
        assert!(!answered);
        driver
    });
    assert!(
        cluster
            .log(1)
            .contains("its connection is closed, so that the program can be replaced")
    );
    // the other one is kept, with its request answered once,
    eventually("it is answered", || {
        (other.driver.completions().len() == 1).then_some(())
    });
    assert_eq!(other.driver.read(status, 1), [0]);
    other.driver.set_used_event(other.driver.used_idx());
    other.works(2);
    // and what was in flight comes along when the first connects again.
    let mut again = Vm::with_memory(&stops, Arc::clone(&driver.mem), 0);
    again.driver = driver;
    let base = again.driver.used_idx();
    start(&mut again, &mut region, base, false);
    cluster.start_node(2);
    answered(&mut again, &[wish]);
}

#[test]
fn a_guest_with_four_writers_does_not_notice_five_new_programs() {
    programs().iter().for_each(|qemu| does_not_notice(qemu));
}

fn does_not_notice(program: &Path) {
    // Given a guest under QEMU that writes,
    let mut cluster = cluster(2);
    let socket = cluster.serve(
        "vm1",
        "--size 64MiB --replicas 1 --master n1",
        "--node n1 --num-queues 2",
    );
    // Linux uses a queue for each of its processors, of those that there are.
    let queues = cpus(program);
    let arguments = [
        "--run",
        "writers",
        "--cpus",
        queues,
        "--queues",
        queues,
        "--set",
        "waits=100",
    ];
    let mut guest = Qemu::start(program, cluster.dir.path(), 0, &socket, &arguments);
    guest.works(4);
    let before = waits(&guest);

    // when its node's program is replaced five times,
    for round in 0..GUEST_UPGRADES {
        put(&cluster, if round % 2 == 0 { "new" } else { "old" });
        let view = upgrade(&cluster);
        assert_eq!(fate(&view), [1, 0], "{view}");
        guest.works(4);
    }
    let upgraded = waits(&guest);
    // then QEMU has never connected again;
    assert_eq!(served_on(&cluster), GUEST_UPGRADES);
    let log = cluster.log(1);
    assert!(!log.contains("the front-end disconnected"), "{log}");

    // (for comparison: stopped, and started again)
    cluster.stop(1);
    cluster.start_node(1);
    guest.works(4);
    let restarted = waits(&guest);
    println!(
        "the guest waited longer than 100 ms, undisturbed: {before:?}, around {GUEST_UPGRADES} upgrades: {:?}, \
         around SIGTERM and a start: {:?} ms",
        &upgraded[before.len()..],
        &restarted[upgraded.len()..]
    );
    // and finds every byte as it wrote it.
    guest.finish();
    cluster.detach(1, "vm1");
    cluster.copies_are_identical(1, "vm1");
}

/// How long the guest waited, each time that it was 100 ms or more.
fn waits(guest: &Qemu) -> Vec<u64> {
    let console = guest.console();
    let waited = console.lines().filter_map(|l| l.strip_prefix("WAITED "));
    waited
        .filter_map(|l| l.split(' ').next()?.parse().ok())
        .collect()
}
