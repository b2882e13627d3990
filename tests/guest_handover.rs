//! A connection goes from one server to another as it does from one program to the next: packed as messages, with the
//! front-end's own socket. Here both are in one process, so that what the second one is told can be seen.

mod guest_driver;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_driver::engine::{Engine, World};
use guest_driver::vm::*;
use guest_driver::*;
use lockstep::guest::{Bound, Handed, Server, Stand, Tally, Who};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserInflight,
};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};

const NOW: Duration = Duration::from_millis(10);

fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// The server stands still.
fn parked(served: &Served) -> Handed {
    match served.server.park(Who::All, NOW).wait(deadline()).unwrap() {
        Stand::Still(handed) => handed,
        Stand::GoesOn => panic!("it was meant"),
    }
}

/// A second server takes over.
fn taken_over(served: &Served, handed: Handed) -> (Server, Arc<World>, Tally) {
    taken_over_at(served, &served.path(), handed)
}

fn taken_over_at(served: &Served, path: &Path, mut handed: Handed) -> (Server, Arc<World>, Tally) {
    let tally = Tally::default();
    if let Some(packed) = &mut handed.session {
        packed.receipt = tally.receipt();
    }
    let world = World::new(DISK);
    world
        .disk
        .lock()
        .unwrap()
        .copy_from_slice(&served.world.disk.lock().unwrap());
    let bound = Bound::adopt(config(&served.name), path, handed).unwrap();
    let server = bound.serve(Box::new(Engine::new(&world))).unwrap();
    until("it is known how it went", || tally.open() == 0);
    (server, world, tally)
}

fn moved(served: &Served) -> (Server, Arc<World>) {
    let handed = parked(served);
    let (server, world, tally) = taken_over(served, handed);
    assert_eq!((tally.taken(), tally.lost()), (1, 0));
    (server, world)
}

#[test]
fn a_connection_is_served_on_by_another_server_with_all_that_was_negotiated() {
    let served = Served::new("moved");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(1);
    // The guest turned the write cache off, which front-ends say once.
    vm.frontend.set_config(32, CONFIG, &[0]).unwrap();

    let (_server, world) = moved(&served);
    vm.works(2);
    let events = world.events();
    assert_eq!(events.iter().filter(|e| e.starts_with("start ")).count(), 1);
    assert!(
        events.contains(&format!("features {LINUX:#x} writeback false")),
        "{events:?}"
    );
    assert_eq!(vm.frontend.get_config(32, 1, CONFIG, &[0]).unwrap().1, [0]);
    // The first one was told of nothing more.
    assert_eq!(served.world.count("disconnected"), 0);
    // A ring can be stopped where it is, and begin again.
    let base = vm.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, u32::from(vm.driver.used_idx()));
    let acked = vm.acked;
    vm.start_like_qemu(acked, base as u16);
    vm.works(3);
}

#[test]
fn what_a_front_end_says_meanwhile_is_answered_by_the_next() {
    let served = Served::new("meanwhile");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(1);
    let handed = parked(&served);
    // Given a question, and one more front-end that connects, while nobody answers,
    let mut second = UnixStream::connect(served.path()).unwrap();
    second.write_all(&message(1, &[])).unwrap();
    let mut vm = std::thread::scope(|scope| {
        let asked = scope.spawn(move || {
            vm.frontend.get_features().unwrap();
            vm
        });
        // when another server takes over, then the question is answered there;
        let (server, _world, _) = taken_over(&served, handed);
        let vm = asked.join().unwrap();
        (vm, server)
    });
    vm.0.works(2);
    // and the one that waits is when the first one goes.
    drop(vm.0);
    let mut answer = [0; 20];
    second.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..4], 1u32.to_ne_bytes());
}

#[test]
fn what_a_front_end_has_said_half_is_heard_by_the_next() {
    let served = Served::new("half");
    // Half a header, and a header with half a body.
    let mut stream = UnixStream::connect(served.path()).unwrap();
    let (asks, sets) = (message(1, &[]), message(2, &LINUX.to_ne_bytes()));
    stream.write_all(&asks[..5]).unwrap();
    until("it is connected", || served.server.connected());
    let (second, world) = moved(&served);
    stream.write_all(&asks[5..]).unwrap();
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).unwrap();
    stream.write_all(&sets[..15]).unwrap();
    let second = Served {
        name: served.name.clone(),
        dir: tempfile::tempdir().unwrap(),
        world,
        server: second,
    };
    let handed = parked(&second);
    let (_third, world, tally) = taken_over_at(&second, &served.path(), handed);
    assert_eq!((tally.taken(), tally.lost()), (1, 0));
    stream.write_all(&sets[15..]).unwrap();
    until("the features are set", || {
        let features = format!("features {LINUX:#x} ");
        world.events().iter().any(|e| e.starts_with(&features))
    });
}

#[test]
fn a_device_state_that_is_being_loaded_is_taken_in_by_the_next() {
    for bytes in [0, 1] {
        let served = Served::new(&format!("loading{bytes}"));
        let vm = {
            let mut vm = served.vm();
            vm.negotiate_with(VhostUserProtocolFeatures::DEVICE_STATE);
            vm
        };
        let (reader, mut writer) = std::io::pipe().unwrap();
        let (direction, phase) = (
            VhostTransferStateDirection::LOAD,
            VhostTransferStatePhase::STOPPED,
        );
        vm.frontend
            .set_device_state_fd(direction, phase, reader.into())
            .unwrap();
        let (_server, _) = moved(&served);
        writer.write_all(&[0; 1][..bytes]).unwrap();
        drop(writer);
        // An empty one is ours, and whatever else is another device's.
        let checked = vm.frontend.check_device_state();
        assert_eq!(checked.is_ok(), bytes == 0, "{checked:?}");
    }
}

#[test]
fn a_server_that_nobody_takes_over_from_goes_on() {
    let served = Served::new("resumed");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(1);
    let handed = parked(&served);
    let (_, status) = vm.submit(T_FLUSH, 0, &[]);
    std::thread::sleep(NOW);
    assert_eq!(vm.driver.read(status, 1), [0xff], "it stands still");
    drop(handed);
    served.server.resume();
    until("it is answered", || vm.driver.read(status, 1) == [0]);
    assert_eq!(vm.driver.completions().len(), 1);
    vm.driver.set_used_event(vm.driver.used_idx());
    vm.works(2);
    // Also without a front-end.
    drop(vm);
    served.disconnects(1);
    assert!(parked(&served).session.is_none());
    served.server.resume();
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(3);
    // Stopped while it stands still, it ends.
    drop(parked(&served));
    drop(served);
}

#[test]
fn requests_that_nobody_writes_down_are_waited_for_or_keep_the_connection_here() {
    let served = Served::new("untracked");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    served.world.slow.lock().unwrap().insert(16);
    vm.submit(T_OUT, 16, &[1; 512]);
    until("it was taken", || {
        served.world.taken.lock().unwrap().contains(&16)
    });
    let refused = served.server.park(Who::Untracked, NOW).wait(deadline());
    let why = refused.unwrap_err().to_string();
    assert!(
        why.contains(&served.name) && why.contains("do not end"),
        "{why}"
    );
    served.server.resume();
    vm.settle();

    // With a region they are left in it, and the other one submits them again.
    let tracked = Served::new("tracked");
    let mut vm = tracked.vm();
    vm.negotiate_with(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    let asked = VhostUserInflight::new(0, 0, 2, 256);
    let (info, file) = vm.frontend.get_inflight_fd(&asked).unwrap();
    vm.frontend
        .set_inflight_fd(&info, file.as_raw_fd())
        .unwrap();
    vm.start_like_qemu(LINUX, 0);
    vm.works(1);
    tracked.world.slow.lock().unwrap().insert(16);
    let (_, status) = vm.submit(T_OUT, 16, &[1; 512]);
    until("it was taken", || {
        tracked.world.taken.lock().unwrap().contains(&16)
    });
    // Those who track are not meant by the first question.
    let stand = tracked.server.park(Who::Untracked, NOW).wait(deadline());
    assert!(matches!(stand, Ok(Stand::GoesOn)));
    let (_server, world) = moved(&tracked);
    until("it is answered", || vm.driver.read(status, 1) == [0]);
    assert_eq!(*world.taken.lock().unwrap(), [16]);
    assert_eq!(vm.driver.completions().len(), 1);
    vm.driver.set_used_event(vm.driver.used_idx());
    vm.works(2);
}

#[test]
fn a_connection_that_has_only_begun_goes_on_where_it_was() {
    let served = Served::new("early");
    // Given one that has said nothing, and another time one that has negotiated and has not started a ring,
    let mut vm = served.vm();
    until("it is connected", || served.server.connected());
    let (second, _) = moved(&served);
    vm.negotiate();
    let next = Served {
        name: served.name.clone(),
        dir: tempfile::tempdir().unwrap(),
        world: World::new(DISK),
        server: second,
    };
    let mut handed = parked(&next);
    let tally = Tally::default();
    handed.session.as_mut().unwrap().receipt = tally.receipt();
    let world = World::new(DISK);
    let bound = Bound::adopt(config(&next.name), &served.path(), handed).unwrap();
    let _third = bound.serve(Box::new(Engine::new(&world))).unwrap();
    until("it is taken over", || tally.taken() == 1);
    // then it goes on there.
    vm.start_like_qemu(LINUX, 0);
    vm.works(1);
    vm.frontend.set_vring_enable(0, false).unwrap();
    until("it is paused", || {
        world.events().last() == Some(&"enable 0 false".into())
    });
}

#[test]
fn a_ring_that_is_paused_stays_so_and_memory_in_many_regions_comes_along() {
    let served = Served::new("many");
    let size = MIB / 4;
    let all: Vec<(u64, u64)> = (0..16).map(|i| (i * size, size)).collect();
    let mem = shared_memory(&all);
    let mut vm = Vm::with_memory(&served.path(), Arc::clone(&mem), 0);
    vm.negotiate();
    vm.frontend.set_features(LINUX).unwrap();
    for region in regions(&mem) {
        vm.frontend.add_mem_region(&region).unwrap();
    }
    vm.frontend.set_vring_num(0, 128).unwrap();
    vm.frontend.set_vring_base(0, 0).unwrap();
    vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
    vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
    vm.frontend.set_vring_call(0, &vm.driver.call).unwrap();
    vm.settle();
    let (_server, world) = moved(&served);
    let events = world.events();
    assert!(
        events.contains(&"start 0 at 0, paused".into()),
        "{events:?}"
    );
    assert_eq!(events.iter().filter(|e| *e == "memory").count(), 16);
    vm.frontend.set_vring_enable(0, true).unwrap();
    vm.works(1);
    // One of them can be taken away, as before.
    let last: VhostUserMemoryRegionInfo = regions(&mem)[15];
    vm.frontend.remove_mem_region(&last).unwrap();
    vm.works(2);
}

#[test]
fn a_machine_that_is_migrated_goes_on_being_logged() {
    const F_LOG_ALL: u64 = 1 << 26;
    let served = Served::new("logged");
    let mut vm = served.vm();
    vm.negotiate_with(VhostUserProtocolFeatures::LOG_SHMFD);
    vm.start_like_qemu(LINUX, 0);
    let log = memfd(4096);
    let region = VhostUserDirtyLogRegion {
        mmap_size: 4096,
        mmap_offset: 0,
        mmap_handle: log.as_raw_fd(),
    };
    vm.frontend.set_log_base(0, Some(region)).unwrap();
    vm.frontend.set_features(LINUX | F_LOG_ALL).unwrap();
    vm.works(1);
    let (_server, _world) = moved(&served);
    log.write_all_at(&[0; 4096], 0).unwrap();
    let (status, _) = vm.io(T_IN, 8, &[0; 4096]);
    assert_eq!(status, 0);
    let page = (vm.scratch + 0x10) / 4096;
    let mut byte = [0];
    log.read_exact_at(&mut byte, page / 8).unwrap();
    assert_ne!(byte[0] & (1 << (page % 8)), 0, "the read's data are logged");
}

fn memfd(len: u64) -> File {
    let name = c"log";
    // SAFETY: the name is a valid string, and the descriptor is new.
    let file = unsafe {
        File::from_raw_fd(libc::memfd_create(
            name.as_ptr(),
            libc::MFD_ALLOW_SEALING | libc::MFD_CLOEXEC,
        ))
    };
    file.set_len(len).unwrap();
    file
}
