//! Front-ends that go away, talk nonsense or forget to share their memory, and sockets that belong to others.

mod guest_driver;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use guest_driver::engine::{Engine, World};
use guest_driver::vm::*;
use guest_driver::*;
use lockstep::guest::{ServeError, Server};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vmm_sys_util::eventfd::EventFd;

#[test]
fn a_socket_in_use_is_refused_and_a_stale_one_taken_over() {
    let served = Served::new("claim");
    let engine = || Box::new(Engine::new(&World::new(DISK)));
    let refused = Server::spawn(config("test/other"), &served.path(), engine()).unwrap_err();
    assert!(matches!(refused, ServeError::SocketInUse(_)), "{refused}");
    assert!(refused.to_string().contains("in use by a running process"));
    // Looking did no harm.
    let mut vm = served.vm();
    vm.negotiate();
    drop(vm);

    let stale = served.dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let mut server = Server::spawn(config("test/other"), &stale, engine()).unwrap();
    Vm::connect(&stale).negotiate();
    server.stop();
    assert!(!stale.exists());

    let mut bad = config("test/bad");
    bad.num_queues = 0;
    assert!(matches!(
        Server::spawn(bad, &stale, engine()),
        Err(ServeError::Config(_))
    ));
    assert!(!stale.exists());
}

#[test]
fn stopping_ends_a_connection_wherever_it_is() {
    // No front-end; one that is idle; one in the middle of a message; one that waits in the backlog.
    for stage in 0..4 {
        let mut served = Served::new(&format!("stop{stage}"));
        let mut stream = (stage > 0).then(|| UnixStream::connect(served.path()).unwrap());
        if let Some(stream) = &mut stream {
            until("connected", || served.server.connected());
            if stage == 2 {
                stream.write_all(&[1, 0, 0, 0, 1]).unwrap();
            }
        }
        let waiting = (stage == 3).then(|| UnixStream::connect(served.path()).unwrap());
        served.server.stop();
        assert!(!served.path().exists() && !served.server.connected());
        assert_eq!(served.world.count("disconnected"), usize::from(stage > 0));
        for mut stream in stream.into_iter().chain(waiting) {
            let ended = stream.read(&mut [0; 1]);
            assert!(matches!(ended, Ok(0) | Err(_)));
        }
        served.server.stop();
    }
}

#[test]
fn a_front_end_that_breaks_off_or_talks_nonsense_harms_only_itself() {
    let served = Served::new("nonsense");
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (vec![], &["the front-end disconnected"]),
        (
            message(1, &[])[..3].to_vec(),
            &["in the middle of a message"],
        ),
        (
            message(2, &[0; 8])[..15].to_vec(),
            &["in the middle of a message"],
        ),
        (
            message(999, &[]),
            &["connection closed because of a message"],
        ),
        (vec![0xff; 64], &["connection closed because of a message"]),
        (
            message(2, &[0; 4]),
            &["connection closed because of SET_FEATURES"],
        ),
        (message(2, &[0xff; 8]), &["SET_FEATURES", "never offered"]),
        (
            message(16, &[0xff; 8]),
            &["SET_PROTOCOL_FEATURES", "never offered"],
        ),
        (
            message(8, &[9, 0, 0, 0, 128, 0, 0, 0]),
            &["SET_VRING_NUM", "queue 9 does not exist", "2 queues"],
        ),
        (
            message(8, &[0, 0, 0, 0, 100, 0, 0, 0]),
            &["SET_VRING_NUM", "100 entries", "power of two"],
        ),
        (
            message(8, &[0, 0, 0, 0, 0, 0, 1, 0]),
            &["SET_VRING_NUM", "65536 entries"],
        ),
        (
            message(12, &[0, 1, 0, 0, 0, 0, 0, 0]),
            &["SET_VRING_KICK", "polling is not offered"],
        ),
        (
            message(11, &[200, 0, 0, 0, 0, 0, 0, 0]),
            &["GET_VRING_BASE", "queue 200 does not exist"],
        ),
        // A memory table of one region without a descriptor, and an empty one.
        (
            message(5, &[[1, 0, 0, 0, 0, 0, 0, 0].as_slice(), &[0; 32]].concat()),
            &["SET_MEM_TABLE", "share=on"],
        ),
        (message(5, &[0; 8]), &["SET_MEM_TABLE", "share=on"]),
    ];
    let n = cases.len();
    for (i, (bytes, expected)) in cases.into_iter().enumerate() {
        let mut stream = UnixStream::connect(served.path()).unwrap();
        stream.write_all(&bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        served.disconnects(i + 1);
        served.was_logged(expected);
    }
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(25);
    drop(vm);
    served.disconnects(n + 1);
}

#[test]
fn a_front_end_that_stalls_is_let_go_and_one_that_is_slow_is_not() {
    let served = Served::new("stalls");
    let features = message(1, &[]);
    // Slow: a message in three pieces, and one whose body comes later.
    let mut slow = UnixStream::connect(served.path()).unwrap();
    let body = message(2, &LINUX.to_ne_bytes());
    let mut pieces = [&features[..5], &features[5..8], &features[8..]].to_vec();
    pieces.extend([&body[..12], &body[12..15], &body[15..], &features[..]]);
    for piece in pieces {
        slow.write_all(piece).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(30));
    }
    let mut answers = [0; 40];
    slow.read_exact(&mut answers).unwrap();
    assert_eq!(answers[..20], answers[20..]);
    drop(slow);
    served.disconnects(1);

    // Stalled, within the header and within the body; and one that asks and never reads.
    let ends_no_message = "has begun a message and does not end it";
    let cases = [
        (features[..7].to_vec(), ends_no_message),
        (message(2, &[0; 8])[..15].to_vec(), ends_no_message),
        (features.repeat(2000), "does not read what it is answered"),
    ];
    for (n, (bytes, reason)) in cases.into_iter().enumerate() {
        let mut stream = UnixStream::connect(served.path()).unwrap();
        stream.set_nonblocking(true).unwrap();
        // As much of it as there is room for.
        assert!(stream.write(&bytes).unwrap() > 0);
        served.disconnects(2 * n + 2);
        served.was_logged(&["connection closed", reason, "let it go on"]);
        // Ours, not its own end: it has not closed anything.
        let mut vm = served.vm();
        vm.negotiate();
        drop((vm, stream));
        served.disconnects(2 * n + 3);
    }
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(28);
}

#[test]
fn memory_that_is_not_shared_is_explained() {
    let served = Served::new("private");
    // Nothing shared at all.
    let mut vm = served.vm();
    vm.negotiate();
    vm.frontend.set_features(LINUX).unwrap();
    vm.frontend.set_vring_num(0, 128).unwrap();
    vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
    vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
    assert!(vm.frontend.get_features().is_err(), "closed");
    served.was_logged(&[
        "SET_VRING_KICK",
        "no memory was shared",
        "share=on",
        "shared=on",
    ]);

    // A descriptor that cannot be mapped.
    let mut vm = served.vm();
    vm.negotiate();
    let mut region = regions(&vm.driver.mem).remove(0);
    region.mmap_handle = vm.driver.kick.as_raw_fd();
    vm.frontend.add_mem_region(&region).unwrap();
    assert!(vm.frontend.get_features().is_err());
    served.was_logged(&["ADD_MEM_REG", "cannot be mapped", "share=on"]);

    // A ring that lies elsewhere.
    let mut vm = served.vm();
    vm.negotiate();
    vm.frontend.set_features(LINUX).unwrap();
    vm.frontend.set_mem_table(&regions(&vm.driver.mem)).unwrap();
    vm.frontend.set_vring_num(0, 128).unwrap();
    let mut vring = vm.vring();
    vring.used_ring_addr = 0x1000;
    vm.frontend.set_vring_addr(0, &vring).unwrap();
    vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
    assert!(vm.frontend.get_features().is_err());
    served.was_logged(&["the used ring of queue 0", "none of the shared regions"]);

    // A kick descriptor that is a file, and a ring that the engine does not accept.
    let mut vm = served.vm();
    vm.negotiate();
    let file = tempfile::tempfile().unwrap();
    // SAFETY: the eventfd type is only a carrier here and owns its own duplicate.
    let fake =
        unsafe { <EventFd as std::os::fd::FromRawFd>::from_raw_fd(libc::dup(file.as_raw_fd())) };
    vm.frontend.set_vring_kick(0, &fake).unwrap();
    assert!(vm.frontend.get_features().is_err());
    served.was_logged(&["SET_VRING_KICK", "not an eventfd"]);

    let mut vm = served.vm();
    // The used ring begins in memory and ends outside.
    vm.driver = Driver::new(Arc::clone(&vm.driver.mem), 4 * MIB - 0xb00, 128);
    vm.negotiate();
    vm.frontend.set_features(LINUX).unwrap();
    vm.frontend.set_mem_table(&regions(&vm.driver.mem)).unwrap();
    vm.frontend.set_vring_num(0, 128).unwrap();
    vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
    vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
    assert!(vm.frontend.get_features().is_err());
    served.was_logged(&["queue 0 cannot start", "used ring", "not within one region"]);
}

#[test]
fn a_guest_that_breaks_its_ring_keeps_its_connection() {
    let served = Served::new("broken");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(26);
    vm.driver.set_avail_idx(1000);
    vm.driver.kick.write(1).unwrap();
    until("the ring is given up", || {
        served
            .world
            .events()
            .iter()
            .any(|e| e.starts_with("broken"))
    });
    // The guest resets its device, and all is well again.
    assert_eq!(vm.frontend.get_vring_base(0).unwrap(), 3);
    vm.driver = Driver::new(Arc::clone(&vm.driver.mem), 0, 128);
    vm.driver.start_at(0);
    vm.start_like_qemu(LINUX, 0);
    vm.works(27);
    assert_eq!(
        served
            .world
            .events()
            .iter()
            .filter(|e| e.starts_with("broken"))
            .count(),
        1
    );
}
