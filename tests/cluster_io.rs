//! What a virtual machine writes is what it reads, on every way in, and what every copy holds.

mod cluster_support;
mod guest_driver;

use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use cluster_support::client::{Disk, KIB, Load, MIB, Plan};
use cluster_support::oracle::{Oracle, SECTOR};
use cluster_support::{Cluster, PATIENCE, eventually};
use guest_driver::vm::{CONFIG, F_FLUSH, LINUX, Vm, regions};
use guest_driver::{T_FLUSH, T_IN, T_OUT};
use memmap2::MmapMut;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};

const SIZE: u64 = 32 * MIB as u64;

/// A load of everything on a volume with R replicas; afterwards all copies are the same.
fn all_copies_hold_what_was_written(parent: &Path, replicas: usize) {
    // Given a volume with R replicas,
    let cluster = Cluster::start_in(parent, replicas + 1);
    let create = format!("--size 32MiB --replicas {replicas} --master n1");
    let socket = cluster.serve("vm1", &create, "--node n1");
    // when stamped writes of all sizes, at any offset and often overlapping, run at depth 32 between reads and flushes,
    let load = Load::start(&socket, Plan::mixed(), Oracle::new(SIZE));
    load.goes_on();
    load.goes_on();
    let outcome = load.finish();
    // then none failed, everything reads back,
    assert_eq!(outcome.failed, 0);
    // and after a detach the copies are the same byte by byte (S14).
    cluster.detach(1, "vm1");
    assert_eq!(cluster.volume(1, "vm1")["state"], "clean");
    let compared = cluster.copies_are_identical(1, "vm1");
    assert_eq!(compared.len(), replicas + 1);
}

#[test]
fn a_volume_without_replicas_reads_back_on_a_disk() {
    all_copies_hold_what_was_written(Path::new("/tmp"), 0);
}

#[test]
fn a_volume_without_replicas_reads_back_in_memory() {
    all_copies_hold_what_was_written(Path::new("/dev/shm"), 0);
}

#[test]
fn a_volume_with_one_replica_reads_back_and_both_copies_are_the_same() {
    all_copies_hold_what_was_written(Path::new("/dev/shm"), 1);
}

#[test]
fn a_volume_with_two_replicas_reads_back_and_all_copies_are_the_same_on_a_disk() {
    all_copies_hold_what_was_written(Path::new("/tmp"), 2);
}

#[test]
fn a_volume_with_two_replicas_reads_back_and_all_copies_are_the_same_in_memory() {
    all_copies_hold_what_was_written(Path::new("/dev/shm"), 2);
}

#[test]
fn four_queues_at_once_read_back() {
    // Given a volume with four queues and a replica,
    let cluster = Cluster::start_in(Path::new("/dev/shm"), 2);
    let attach = "--node n1 --num-queues 4";
    let socket = cluster.serve("vm1", "--size 32MiB --replicas 1 --master n1", attach);
    assert_eq!(cluster.volume(1, "vm1")["attachment"]["num_queues"], 4);
    // when requests come in on all four,
    let plan = Plan {
        queues: 4,
        ..Plan::mixed()
    };
    let load = Load::start(&socket, plan, Oracle::new(SIZE));
    load.goes_on();
    // then nothing fails, all reads back, and both copies are the same.
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
}

#[test]
fn a_client_that_goes_may_come_back_and_another_one_waits_its_turn() {
    // Given a volume in use by a front-end,
    let cluster = Cluster::start(1);
    let socket = cluster.serve("vm1", "--size 32MiB", "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    // when a second one connects meanwhile,
    let second = {
        let socket = socket.clone();
        std::thread::spawn(move || Disk::open(&socket, 1, 1).capacity)
    };
    // then the first one goes on undisturbed, the second is served once the first has gone,
    load.goes_on();
    assert!(!second.is_finished(), "two front-ends at once");
    let mut outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    assert_eq!(second.join().unwrap(), SIZE);
    // and whoever comes back finds what was written, also after one that left in the middle of things.
    for seed in 1..4 {
        let plan = Plan {
            seed,
            ..Plan::small()
        };
        outcome = Load::start(&socket, plan, outcome.oracle).abandon();
    }
    Disk::open(&socket, 1, 1).sweep(&mut outcome.oracle);
    assert_eq!(cluster.volume(1, "vm1")["health"], "healthy");
}

/// Writes, flushes and reads through the virtio-driver crate, with these features acknowledged.
fn virtio_driver_reads_what_it_wrote(socket: &Path, features: u64) {
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(socket.to_str().unwrap(), features).unwrap());
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(transport.as_mut(), 2, 128).unwrap();
    let memory = tempfile::tempfile_in("/dev/shm").unwrap();
    memory.set_len(2 * MIB as u64).unwrap();
    // SAFETY: the file is ours alone; the back-end writes to it only while a read that we asked for is under way.
    let mut buffer = unsafe { MmapMut::map_mut(&memory) }.unwrap();
    transport
        .map_mem_region(
            buffer.as_ptr() as usize,
            buffer.len(),
            memory.as_raw_fd(),
            0,
        )
        .unwrap();
    for (number, queue) in queues.iter_mut().enumerate().take(2) {
        let notifier = transport.get_submission_notifier(number);
        let wait = |queue: &mut VirtioBlkQueue<'_, usize>, count: usize| {
            notifier.notify().unwrap();
            let (begin, mut done) = (Instant::now(), Vec::new());
            while done.len() < count {
                assert!(begin.elapsed() < PATIENCE, "{} of {count}", done.len());
                for completion in queue.completions() {
                    assert_eq!(completion.ret, 0, "request {}", completion.context);
                    done.push(completion.context);
                }
                std::thread::yield_now();
            }
            done.sort_unstable();
            assert_eq!(done, (0..count).collect::<Vec<_>>());
        };
        let (ours, theirs) = buffer.split_at_mut(MIB);
        let base = (number * 4 * MIB + SECTOR) as u64;
        let part = 64 * KIB;
        for (i, bytes) in ours.chunks_mut(part).enumerate() {
            bytes.fill(0x10 + (number * 16 + i) as u8);
            queue.write(base + (i * part) as u64, bytes, i).unwrap();
        }
        wait(queue, MIB / part);
        if features & F_FLUSH != 0 {
            queue.flush(0).unwrap();
            wait(queue, 1);
        }
        for (i, bytes) in theirs.chunks_mut(part).enumerate() {
            queue.read(base + (i * part) as u64, bytes, i).unwrap();
        }
        wait(queue, MIB / part);
        assert!(ours == theirs, "queue {number} reads other bytes");
    }
}

#[test]
fn virtio_driver_reads_what_it_wrote_with_and_without_a_write_cache() {
    // Given a volume with a replica and two queues,
    let cluster = Cluster::start(2);
    let attach = "--node n1 --num-queues 2";
    let socket = cluster.serve("vm1", "--size 16MiB --replicas 1 --master n1", attach);
    // when a driver that takes all that is offered, or one that knows of no flush (so every write is to be durable),
    let without_flush = (VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX).bits()
        | VirtioBlkFeatureFlags::MQ.bits();
    for features in [u64::MAX, without_flush] {
        // writes, then it reads that;
        virtio_driver_reads_what_it_wrote(&socket, features);
    }
    // and both copies are the same.
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
}

#[test]
fn cloud_hypervisor_attaches_pauses_resets_and_turns_the_write_cache_off() {
    // Given a volume with a replica and two queues,
    let cluster = Cluster::start(2);
    let attach = "--node n1 --num-queues 2";
    let socket = cluster.serve("vm1", "--size 16MiB --replicas 1 --master n1", attach);
    // when a front-end sets up the device message by message, in cloud-hypervisor's order,
    let mut vm = Vm::connect(&socket);
    let offered = vm.negotiate();
    assert_eq!(offered & LINUX, LINUX, "all that Linux takes is offered");
    vm.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    vm.frontend.set_features(LINUX).unwrap();
    for region in regions(&vm.driver.mem) {
        vm.frontend.add_mem_region(&region).unwrap();
    }
    vm.frontend.set_vring_num(0, 128).unwrap();
    vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
    vm.frontend.set_vring_base(0, 0).unwrap();
    vm.frontend.set_vring_call(0, &vm.driver.call).unwrap();
    vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
    vm.frontend.set_vring_enable(0, true).unwrap();
    // then it reads what it wrote;
    vm.works(1);
    // paused, it is left alone, and goes on where it stopped;
    vm.frontend.set_vring_enable(0, false).unwrap();
    vm.submit(T_FLUSH, 0, &[]);
    vm.settle();
    assert!(vm.driver.completions().is_empty(), "served while paused");
    vm.frontend.set_vring_enable(0, true).unwrap();
    let mut completions = Vec::new();
    eventually("the waiting request completes", || {
        completions.extend(vm.driver.completions());
        (completions.len() == 1).then_some(())
    });
    vm.driver.set_used_event(vm.driver.used_idx());
    // with the write cache off (CONFIG_WCE) it goes on as well, and a flush is still answered;
    vm.frontend.set_config(32, CONFIG, &[0]).unwrap();
    vm.settle();
    vm.works(2);
    // what is past the end fails, and harms nothing;
    let past = 16 * MIB as u64 / 512;
    assert_eq!(vm.io(T_IN, past, &[0; 512]).0, 1);
    assert_eq!(vm.io(T_OUT, past - 1, &[1; 1024]).0, 1);
    vm.works(3);
    // and both copies are the same.
    drop(vm);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
}

#[test]
fn what_scripts_read_of_a_volume_is_there() {
    // Given a volume with a replica that is served,
    let cluster = Cluster::start_in(Path::new("/dev/shm"), 2);
    let socket = cluster.serve("vm1", "--size 16MiB --replicas 1 --master n1", "--node n1");
    // when it is inspected as JSON,
    let volume = cluster.volume(2, "vm1");
    // then the words that scripts and these tests rely on are there, with these meanings;
    for (path, expected) in [
        ("/namespace", "default"),
        ("/name", "vm1"),
        ("/health", "healthy"),
        ("/why", ""),
        ("/state", "active"),
        ("/failure_mode", "soft"),
        ("/master/node", "n1"),
        ("/attachment/node", "n1"),
        ("/attachment/socket", socket.to_str().unwrap()),
        ("/attachment/phase", "serving"),
        ("/copies/0/node", "n1"),
        ("/copies/0/role", "master"),
        ("/copies/0/state", "in_sync"),
        ("/copies/1/role", "replica"),
    ] {
        let found = volume.pointer(path).and_then(|v| v.as_str());
        assert_eq!(found, Some(expected), "{path} of {volume:#}");
    }
    for (path, expected) in [
        ("/size", 16 * MIB as u64),
        ("/block_size", 512),
        ("/replicas", 1),
        ("/replicas_in_sync", 1),
        ("/failure_tolerance", 1),
        ("/suspend_deadline_ms", 30_000),
        ("/attachment/num_queues", 1),
        ("/attachment/inflight", 0),
    ] {
        let found = volume.pointer(path).and_then(|v| v.as_u64());
        assert_eq!(found, Some(expected), "{path} of {volume:#}");
    }
    assert!(
        volume["epoch"].is_u64() && volume["id"].is_string(),
        "{volume:#}"
    );
    let event = &volume["events"][0];
    for key in ["time", "node", "from", "to", "rule", "text"] {
        assert!(event[key].is_string(), "{key} of {event:#}");
    }
    // and a list has the same words.
    let list = cluster.json(2, "volume ls");
    for key in [
        "name",
        "size",
        "health",
        "replicas",
        "replicas_in_sync",
        "master",
        "copies",
    ] {
        assert_eq!(list[0][key], volume[key], "{key}");
    }
}
