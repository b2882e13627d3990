//! Front-ends that stop, pause, reset and save a device while requests wait for a replica that is gone and a registry that
//! does not answer. A front-end holds its whole virtual machine still until it has its answer, so that must come whatever
//! else does not.

mod cluster_support;
mod guest_driver;

use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::mpsc::channel;

use cluster_support::{Cluster, eventually};
use guest_driver::tracked::{buffers, submit};
use guest_driver::vm::{LINUX, PATIENCE, Vm};
use guest_driver::*;
use rusqlite::Connection;
use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserInflight,
};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

/// A request that no device knows. It is answered at once.
const UNKNOWN: u32 = 99;
const F_LOG_ALL: u64 = 1 << 26;
const MORE: VhostUserProtocolFeatures = VhostUserProtocolFeatures::INFLIGHT_SHMFD
    .union(VhostUserProtocolFeatures::LOG_SHMFD)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// A volume with a replica, in its front-end's hands.
struct World {
    cluster: Cluster,
    socket: PathBuf,
    vm: Vm,
    region: Option<(VhostUserInflight, File)>,
    registry: Option<Connection>,
}

/// Waits for so many answers: heads and status.
fn answers(vm: &mut Vm, count: usize) -> Vec<(u16, u8)> {
    let mut got = Vec::new();
    eventually("the answers", || {
        got.extend(vm.driver.completions().iter().map(|(head, _)| *head as u16));
        vm.driver.set_used_event(vm.driver.used_idx());
        (got.len() >= count).then_some(())
    });
    got.sort_unstable();
    let status = |head: u16| vm.driver.read(buffers(head) + 0x800, 1)[0];
    got.into_iter().map(|head| (head, status(head))).collect()
}

/// Asks for an in-flight region, and gives it back as the device's.
fn fresh_region(vm: &mut Vm) -> (VhostUserInflight, File) {
    let asked = VhostUserInflight::new(0, 0, 2, 128);
    let (info, file) = vm.frontend.get_inflight_fd(&asked).unwrap();
    vm.frontend
        .set_inflight_fd(&info, file.as_raw_fd())
        .unwrap();
    (info, file)
}

impl World {
    fn new(tracked: bool) -> World {
        let cluster = Cluster::start(2);
        let socket = cluster.serve(
            "vm1",
            "--size 16MiB --replicas 1 --master n1",
            "--node n1 --num-queues 2",
        );
        let mut vm = Vm::connect(&socket);
        vm.negotiate_with(MORE);
        let region = tracked.then(|| fresh_region(&mut vm));
        vm.start_like_qemu(LINUX, 0);
        submit(&mut vm, (30, T_OUT, 0, 1));
        assert_eq!(answers(&mut vm, 1), [(30, 0)]);
        World {
            cluster,
            socket,
            vm,
            region,
            registry: None,
        }
    }

    /// The replica's node stands still, and nobody can put it out: two writes and a flush wait.
    fn nothing_moves(&mut self) {
        let registry = Connection::open(self.cluster.registry()).unwrap();
        registry.execute_batch("BEGIN IMMEDIATE").unwrap();
        self.registry = Some(registry);
        self.cluster.freeze(2);
        submit(&mut self.vm, (0, T_OUT, 8, 2));
        submit(&mut self.vm, (3, T_OUT, 16, 3));
        submit(&mut self.vm, (6, T_FLUSH, 0, 0));
        let cluster = &self.cluster;
        eventually("all three have been taken", || {
            let volume = cluster.volume(1, "vm1");
            (volume["attachment"]["inflight"] == 3).then_some(())
        });
    }

    fn all_goes_on(&mut self) {
        self.registry = None;
        self.cluster.thaw(2);
    }

    /// Asks something of the front-end, which must be answered though nothing moves.
    fn ask<T: Send>(&mut self, ask: impl FnOnce(&mut Vm) -> T + Send) -> T {
        let (answer, answered) = channel();
        let vm = &mut self.vm;
        std::thread::scope(|scope| {
            scope.spawn(move || drop(answer.send(ask(vm))));
            // A test that hangs says nothing.
            answered.recv_timeout(PATIENCE).unwrap_or_else(|_| {
                println!("no answer, as long as nothing else moves");
                std::process::abort()
            })
        })
    }

    fn stop(&mut self) -> u32 {
        self.ask(|vm| vm.frontend.get_vring_base(0).unwrap())
    }

    fn reads(&mut self, sector: u64) -> u8 {
        submit(&mut self.vm, (40, T_IN, sector, 0xee));
        assert_eq!(answers(&mut self.vm, 1), [(40, 0)]);
        self.vm.driver.read(buffers(40) + 0x1000, 1)[0]
    }
}

#[test]
fn a_ring_stops_though_nothing_moves_and_its_requests_wait_until_it_goes_on() {
    let mut world = World::new(true);
    world.nothing_moves();
    assert_eq!(world.stop(), 4);
    assert_eq!(world.vm.driver.completions(), [], "they are in the region");
    // As after `cont`: the same front-end, the same region.
    world.vm.start_like_qemu(LINUX, 4);
    world.all_goes_on();
    assert_eq!(answers(&mut world.vm, 3), [(0, 0), (3, 0), (6, 0)]);
    assert_eq!((world.reads(8), world.reads(16)), (2, 3));
    assert!(world.region.is_some());
}

#[test]
fn requests_that_nobody_would_remember_fail_when_their_ring_stops() {
    let mut world = World::new(false);
    world.nothing_moves();
    assert_eq!(world.stop(), 4);
    assert_eq!(answers(&mut world.vm, 3), [(0, 1), (3, 1), (6, 1)]);
    world.vm.start_like_qemu(LINUX, 4);
    world.all_goes_on();
    // A sector whose write failed has what is written to it next.
    submit(&mut world.vm, (0, T_OUT, 8, 4));
    assert_eq!(answers(&mut world.vm, 1), [(0, 0)]);
    assert_eq!(world.reads(8), 4);
}

/// How a machine leaves whose region stays behind.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Leaves {
    /// Stopped, then migrated or saved (QEMU).
    Stopped,
    /// Migrated while it runs: what is written to its memory is logged.
    Migrated,
    /// Saved with the state of its device (cloud-hypervisor).
    Saved,
}

#[test]
fn requests_go_along_with_a_machine_whose_region_stays() {
    for leaves in [Leaves::Stopped, Leaves::Migrated, Leaves::Saved] {
        println!("{leaves:?}");
        // Given three requests that wait, and a later one that was answered before them,
        let mut world = World::new(true);
        world.nothing_moves();
        submit(&mut world.vm, (9, UNKNOWN, 0, 0));
        assert_eq!(answers(&mut world.vm, 1), [(9, 2)]);
        // when the machine leaves,
        if leaves == Leaves::Migrated {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let log: File = rustix::fs::memfd_create("log", flags).unwrap().into();
            log.set_len(4096).unwrap();
            rustix::fs::fcntl_add_seals(&log, SealFlags::SHRINK).unwrap();
            let region = VhostUserDirtyLogRegion {
                mmap_size: 4096,
                mmap_offset: 0,
                mmap_handle: log.as_raw_fd(),
            };
            world.vm.frontend.set_log_base(0, Some(region)).unwrap();
            world.vm.frontend.set_features(LINUX | F_LOG_ALL).unwrap();
        }
        assert_eq!(world.stop(), 5);
        assert_eq!(world.vm.driver.completions(), [], "no error");
        if leaves == Leaves::Saved {
            let (mut reader, writer) = state(&world.vm, VhostTransferStateDirection::SAVE).unwrap();
            drop(writer);
            assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0);
            world.vm.frontend.check_device_state().unwrap();
        }
        // and another front-end goes on with its memory, and with a region of its own,
        let mem = std::sync::Arc::clone(&world.vm.driver.mem);
        let old = world.vm;
        drop(old.frontend);
        let mut vm = Vm::with_memory(&world.socket, mem, 0);
        vm.driver = old.driver;
        vm.negotiate_with(MORE);
        let region = fresh_region(&mut vm);
        vm.start_like_qemu(LINUX, 5);
        vm.settle();
        world = World {
            vm,
            region: Some(region),
            ..world
        };
        world.all_goes_on();
        // then each of the three is answered there, once.
        assert_eq!(answers(&mut world.vm, 3), [(0, 0), (3, 0), (6, 0)]);
        assert_eq!((world.reads(8), world.reads(16)), (2, 3));
        assert_eq!(world.vm.driver.completions(), []);
    }
}

#[test]
fn a_chain_that_cannot_be_answered_keeps_no_ring_from_stopping() {
    for tracked in [true, false] {
        let mut world = World::new(tracked);
        let vm = &mut world.vm;
        vm.driver.write(buffers(0), &header(T_OUT, 8));
        vm.driver
            .offer_chain(0, &[desc(buffers(0), 16 + 512, 0, 0)]);
        vm.driver.kick.write(1).unwrap();
        let cluster = &world.cluster;
        eventually("the ring is given up", || {
            let said = "queue 0 is broken and not read any more";
            cluster.log(1).contains(said).then_some(())
        });
        // It was not taken, and nothing was waited for.
        assert_eq!(world.stop(), 1);
        assert!(!world.cluster.log(1).contains("requests unanswered"));
    }
}

#[test]
fn a_device_is_reset_though_nothing_moves() {
    let mut world = World::new(true);
    world.nothing_moves();
    world.ask(|vm| {
        vm.frontend.reset_device().unwrap();
        vm.frontend.get_features().unwrap()
    });
    world.all_goes_on();
    // A new driver finds a device that knows nothing of before.
    world.vm.driver = Driver::new(std::sync::Arc::clone(&world.vm.driver.mem), 0, 128);
    world.vm.driver.start_at(0);
    world.vm.start_like_qemu(LINUX, 0);
    assert_eq!(world.reads(0), 1);
    assert_eq!(world.vm.driver.completions(), []);
}

#[test]
fn a_paused_ring_takes_nothing_and_answers_what_it_had() {
    let mut world = World::new(false);
    world.nothing_moves();
    let pause = |world: &mut World, on: bool| {
        world.ask(move |vm| {
            vm.frontend.set_vring_enable(0, on).unwrap();
            vm.frontend.get_features().unwrap();
        });
    };
    pause(&mut world, false);
    submit(&mut world.vm, (9, T_OUT, 24, 5));
    world.all_goes_on();
    assert_eq!(answers(&mut world.vm, 3), [(0, 0), (3, 0), (6, 0)]);
    pause(&mut world, false);
    assert_eq!(world.vm.driver.completions(), []);
    pause(&mut world, true);
    assert_eq!(answers(&mut world.vm, 1), [(9, 0)]);
    assert_eq!(world.reads(24), 5);
}

/// Both ends of a pipe, and which of them the device gets.
fn state(
    vm: &Vm,
    direction: VhostTransferStateDirection,
) -> Option<(PipeReader, std::io::PipeWriter)> {
    let (reader, writer) = std::io::pipe().unwrap();
    let fd: OwnedFd = match direction {
        VhostTransferStateDirection::SAVE => writer.try_clone().unwrap().into(),
        VhostTransferStateDirection::LOAD => reader.try_clone().unwrap().into(),
    };
    let phase = VhostTransferStatePhase::STOPPED;
    let own = vm.frontend.set_device_state_fd(direction, phase, fd).ok()?;
    assert!(own.is_none(), "it uses the front-end's");
    Some((reader, writer))
}

#[test]
fn a_device_has_no_state_beside_its_rings() {
    let mut world = World::new(true);
    let vm = &world.vm;
    assert!(
        state(vm, VhostTransferStateDirection::SAVE).is_none(),
        "it runs"
    );
    assert_eq!(vm.frontend.get_vring_base(0).unwrap(), 1);

    let (mut reader, writer) = state(vm, VhostTransferStateDirection::SAVE).unwrap();
    drop(writer);
    let mut saved = Vec::new();
    reader.read_to_end(&mut saved).unwrap();
    vm.frontend.check_device_state().unwrap();
    assert_eq!(saved.len(), 0);

    let (reader, mut writer) = state(vm, VhostTransferStateDirection::LOAD).unwrap();
    writer.write_all(&saved).unwrap();
    drop((reader, writer));
    vm.frontend.check_device_state().unwrap();

    // Somebody else's, and one that does not end.
    let (reader, mut writer) = state(vm, VhostTransferStateDirection::LOAD).unwrap();
    writer.write_all(b"1").unwrap();
    drop((reader, writer));
    assert!(vm.frontend.check_device_state().is_err());
    let kept = state(vm, VhostTransferStateDirection::LOAD).unwrap();
    assert!(vm.frontend.check_device_state().is_err());
    drop(kept);
    // Refused, and no harm done.
    world.vm.start_like_qemu(LINUX, 1);
    assert_eq!(world.reads(0), 1);
}
