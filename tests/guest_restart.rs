//! The node's process dies under a virtual machine, by SIGKILL, and comes back: nobody inside may notice more than a
//! pause. With a real guest at random moments, and with front-ends whose requests are known to be in flight.

mod cluster_support;
mod guest_driver;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use cluster_support::oracle::Random;
use cluster_support::qemu::{Qemu, cpus, programs};
use cluster_support::{Cluster, eventually, lockstep};
use guest_driver::tracked::*;
use guest_driver::vm::Vm;
use guest_driver::*;
use vhost::VhostBackend;

/// Times that the guest's node is killed, with each QEMU.
const KILLS: [usize; 2] = [50, 20];
/// In one round of so many the replica falls silent before the kill, so that writes are in flight for sure.
const SILENT: usize = 5;
/// In one round of so many the kill does not wait for the guest to be served again.
const EARLY: usize = 4;
/// Longest time under load before a kill, and from the start of a process to an early one, in milliseconds.
const LOAD_MS: u64 = 300;
const EARLY_MS: u64 = 1200;
/// Where the second queue's ring is.
const OTHER_RING: u64 = 0x1_0000;
/// How long the guest writes to a silent replica: less than what makes the attachment give that one up.
const SILENCE: Duration = Duration::from_millis(400);

/// A child process that does not outlive the test.
struct Process(Child);

impl Process {
    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts the process of node n1 again, and waits for nothing.
fn spawn_n1(cluster: &Cluster) -> Process {
    let log = File::options()
        .create(true)
        .append(true)
        .open(cluster.dir.path().join("n1.log"))
        .unwrap();
    let child = lockstep()
        .args(cluster.node_arguments(1, &cluster.data_dir(1)))
        .env("RUST_LOG", "info")
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn();
    Process(child.unwrap())
}

/// For each start of a queue's ring, how many requests of the process before were submitted again.
fn resubmitted(cluster: &Cluster, queue: usize) -> Vec<usize> {
    let starts = format!(": queue {queue} starts at ");
    let number = |line: &str| {
        let (_, rest) = line.split_once(&starts)?;
        let (_, count) = rest.split_once(", ")?;
        count.split(' ').next()?.parse().ok()
    };
    cluster.log(1).lines().filter_map(number).collect()
}

#[test]
fn a_guest_with_four_writers_does_not_notice_fifty_deaths_of_its_node() {
    for (qemu, kills) in programs().iter().zip(KILLS) {
        survives(qemu, kills);
    }
}

fn survives(program: &Path, all_kills: usize) {
    // Given a volume with a copy on each of two nodes, and a guest with four writers on it,
    let mut cluster = Cluster::start(2);
    let socket = cluster.serve(
        "vm1",
        "--size 64MiB --replicas 1 --master n1",
        "--node n1 --num-queues 2",
    );
    // Linux uses a queue for each of its processors, of those that there are.
    let queues = cpus(program);
    let arguments = ["--run", "writers", "--cpus", queues, "--queues", queues];
    let mut guest = Qemu::start(program, cluster.dir.path(), 0, &socket, &arguments);
    guest.works(4);
    cluster.kill(1);
    let mut kills = 1;
    let mut random = Random::new(u64::from(std::process::id()));

    // when its node's process is killed at random moments, and comes back each time,
    let mut n1 = spawn_n1(&cluster);
    while kills < all_kills {
        let starts = resubmitted(&cluster, 0).len();
        let silent = kills % SILENT == 0;
        // A guest that is not served yet has nothing in flight that a silent replica could hold up.
        if !silent && random.below(EARLY as u64) == 0 {
            std::thread::sleep(Duration::from_millis(random.below(EARLY_MS)));
        } else {
            eventually("the guest is served", || {
                guest.goes_on();
                (resubmitted(&cluster, 0).len() > starts).then_some(())
            });
            std::thread::sleep(Duration::from_millis(random.below(LOAD_MS)));
        }
        if silent {
            cluster.freeze(2);
            std::thread::sleep(SILENCE);
        }
        n1.kill();
        kills += 1;
        n1 = spawn_n1(&cluster);
        if silent {
            cluster.thaw(2);
        }
        guest.goes_on();
    }

    // then the guest goes on, finds every byte as it wrote it, and its kernel has not complained;
    guest.works(4);
    let queues: usize = queues.parse().unwrap();
    let resubmitted: Vec<_> = (0..queues)
        .map(|queue| resubmitted(&cluster, queue))
        .collect();
    println!("{kills} kills; submitted again at each start of each ring: {resubmitted:?}");
    guest.finish();
    assert_eq!(kills, all_kills);
    // requests were in flight at some of the kills, of each queue, or this has shown nothing;
    let with_requests =
        |starts: &Vec<usize>| starts.iter().filter(|requests| **requests > 0).count();
    let counts: Vec<usize> = resubmitted.iter().map(with_requests).collect();
    let most = counts.iter().max().unwrap();
    assert!(*most >= all_kills / SILENT / 2, "{resubmitted:?}");
    assert!(counts.iter().all(|count| *count > 0), "{resubmitted:?}");
    // and the copies are the same.
    n1.kill();
    cluster.start_node(1);
    cluster.wait_for(1, "vm1", "is served", |v| {
        v["attachment"]["phase"] == "serving"
    });
    cluster.detach(1, "vm1");
    cluster.copies_are_identical(1, "vm1");
}

/// Requests that wait for a silent replica are in flight when the process dies. `base` is what the front-end then sends.
fn requests_outlive_the_process(cloud_hypervisor: bool, base: fn(&Driver) -> u16) {
    let mut cluster = Cluster::start(2);
    let socket = cluster.serve(
        "vm1",
        "--size 16MiB --replicas 1 --master n1",
        "--node n1 --num-queues 2",
    );
    let mut vm = Vm::connect(&socket);
    let mut region = None;
    start(&mut vm, &mut region, 0, cloud_hypervisor);
    // The second queue, whose chains have other heads and so other buffers.
    let mut other = Driver::new(Arc::clone(&vm.driver.mem), OTHER_RING, 128);
    start_queue(&mut vm, 1, &other, 0);
    for (sector, fill) in [(0, 1), (64, 2)] {
        let wish = (60, T_OUT, sector, fill);
        submit(&mut vm, wish);
        answered(&mut vm, &[wish]);
    }

    cluster.freeze(2);
    let wishes = [
        (9, T_OUT, 0, 0xa1),
        (3, T_OUT, 128, 0xa2),
        (21, T_FLUSH, 0, 0),
        // These two overlap each other and the first one; the last one counts.
        (12, T_OUT, 4, 0xa3),
        (6, T_OUT, 0, 0xa4),
        (18, T_OUT, 64, 0xa5),
    ];
    for wish in wishes {
        submit(&mut vm, wish);
    }
    let others = [(70, T_OUT, 256, 0xb1), (64, T_OUT, 260, 0xb2)];
    std::mem::swap(&mut vm.driver, &mut other);
    for wish in others {
        submit(&mut vm, wish);
    }
    std::mem::swap(&mut vm.driver, &mut other);
    let in_flight = |region: &Option<Region>| {
        let region = region.as_ref().unwrap();
        [0, 1].map(|queue| region.in_flight_of(queue))
    };
    eventually("all are in flight", || {
        (in_flight(&region) == [wishes.len(), others.len()]).then_some(())
    });
    cluster.kill(1);
    // The guest goes on meanwhile.
    let more = (30, T_OUT, 192, 0xa6);
    submit(&mut vm, more);

    let mut n1 = spawn_n1(&cluster);
    let again = eventually("the socket is there", || {
        UnixStream::connect(&socket).is_ok().then(|| {
            let mem = Arc::clone(&vm.driver.mem);
            Vm::with_memory(&socket, mem, 0)
        })
    });
    let mut vm = Vm {
        driver: vm.driver,
        ..again
    };
    // The whole handshake is answered, though the volume cannot be taken over yet.
    let bases = [base(&vm.driver), base(&other)];
    start(&mut vm, &mut region, bases[0], cloud_hypervisor);
    start_queue(&mut vm, 1, &other, bases[1]);
    assert_eq!(resubmitted(&cluster, 0).last(), Some(&wishes.len()));
    assert_eq!(resubmitted(&cluster, 1).last(), Some(&others.len()));
    cluster.thaw(2);
    let all: Vec<Wish> = wishes.into_iter().chain([more]).collect();
    answered(&mut vm, &all);
    std::mem::swap(&mut vm.driver, &mut other);
    answered(&mut vm, &others);
    assert_eq!(vm.driver.completions(), []);
    std::mem::swap(&mut vm.driver, &mut other);
    assert_eq!(in_flight(&region), [0, 0]);
    let written = [(0, 0xa4), (64, 0xa5), (128, 0xa2), (192, 0xa6), (260, 0xb2)];
    for (sector, fill) in written {
        assert_eq!(reads(&mut vm, sector), fill, "sector {sector}");
    }
    assert_eq!(vm.driver.completions(), []);
    for (queue, driver) in [(0, &vm.driver), (1, &other)] {
        let stopped = vm.frontend.get_vring_base(queue).unwrap();
        assert_eq!(stopped, u32::from(driver.used_idx()));
    }
    drop(vm);
    n1.kill();
    cluster.start_node(1);
    cluster.detach(1, "vm1");
    cluster.copies_are_identical(1, "vm1");
}

#[test]
fn requests_in_flight_outlive_the_process_when_qemu_says_the_used_index() {
    requests_outlive_the_process(false, Driver::used_idx);
}

#[test]
fn requests_in_flight_outlive_the_process_when_cloud_hypervisor_says_the_available_index() {
    requests_outlive_the_process(true, Driver::avail_idx);
}
