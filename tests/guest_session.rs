//! Front-ends against the server: the sequences of QEMU and cloud-hypervisor, and a client that knows nothing of us.

mod guest_driver;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use guest_driver::vm::*;
use guest_driver::*;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

#[test]
fn qemu_starts_works_stops_and_starts_again() {
    let served = Served::new("qemu");
    let mut vm = served.vm();
    let features = vm.negotiate();
    assert_eq!(features & LINUX, LINUX, "{features:#x}");
    // Discard and write-zeroes.
    assert_eq!(features >> 13 & 3, 3, "{features:#x}");
    // A limit on segment size would only cost.
    assert_eq!(features & (1 << 1 | 1 << 5), 0, "{features:#x}");
    // Masked notifiers come long before the device starts.
    let masked = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.frontend.set_vring_call(0, &masked).unwrap();
    vm.frontend.set_vring_call(1, &masked).unwrap();
    vm.frontend.get_config(0, 60, CONFIG, &[0; 60]).unwrap();

    vm.start_like_qemu(SEABIOS, 0);
    vm.works(1);
    assert!(vm.driver.was_called());
    assert_eq!(vm.frontend.get_vring_base(0).unwrap(), 3);

    // The guest's own driver lays a new ring out.
    vm.driver = Driver::new(Arc::clone(&vm.driver.mem), 0, 128);
    vm.driver.start_at(0);
    vm.start_like_qemu(LINUX, 0);
    vm.works(2);
    assert_eq!(
        vm.io(T_GET_ID, 0, &[0xee; 20]),
        (0, b"0123456789abcdef\0\0\0\0".to_vec())
    );
    assert_eq!(
        vm.io(T_IN, DISK as u64 / 512, &[0; 512]).0,
        1,
        "beyond the end"
    );
    assert_eq!(vm.io(12, 0, &[0; 16]).0, 2, "no such request");
    assert_eq!(vm.io(T_OUT, 0, &[0; 100]).0, 1, "part of a sector");
    assert_eq!(vm.frontend.get_vring_base(0).unwrap(), 7);
    // Stopped: nothing is taken any more, and asking again gives the same answer.
    vm.submit(T_FLUSH, 0, &[]);
    assert_eq!(vm.frontend.get_vring_base(0).unwrap(), 7);
    assert!(vm.driver.completions().is_empty());
    // Continued, as after a stopped virtual machine.
    vm.start_like_qemu(LINUX, 7);
    until("the waiting request completes", || {
        !vm.driver.completions().is_empty()
    });

    let events = served.world.events();
    for event in [
        "start 0 at 0, paused",
        "stop 0 at 3",
        "stop 0 at 7",
        "start 0 at 7",
    ] {
        assert!(
            events.iter().any(|e| e.starts_with(event)),
            "{event}: {events:?}"
        );
    }
    assert!(served.server.connected());
    drop(vm);
    served.disconnects(1);
    served.was_logged(&["the front-end disconnected"]);
    until("the server says so", || !served.server.connected());
}

/// A segment of a discard or write-zeroes.
fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        sector.to_le_bytes().as_slice(),
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

#[test]
fn zeros_are_asked_for_by_segments_and_what_breaks_a_rule_changes_nothing() {
    let served = Served::new("zeroes");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX | 1 << 13 | 1 << 14, 0);
    let all = DISK as u64 / 512;
    assert_eq!(vm.io(T_OUT, 0, &vec![7; 64 * 1024]).0, 0);
    let both = [T_DISCARD, T_WRITE_ZEROES];
    for kind in both {
        for (segments, status) in [
            (vec![], 1),
            (vec![0; 8], 1),
            (segment(all, 1, 0), 1),
            (segment(u64::MAX - 7, 8, 0), 1),
            (segment(0, u32::MAX, 0), 1),
            (segment(0, 1, 0).repeat(33), 1),
            (segment(0, 1, 2), 2),
            (segment(0, 1, u32::MAX), 2),
        ] {
            assert_eq!(vm.io(kind, 0, &segments).0, status, "{kind} {segments:?}");
        }
    }
    assert_eq!(vm.io(T_DISCARD, 0, &segment(0, 1, 1)).0, 2, "unmap");
    assert!(served.world.disk.lock().unwrap()[..64 * 1024] == [7; 64 * 1024]);

    for (kind, flags) in [(T_DISCARD, 0), (T_WRITE_ZEROES, 0), (T_WRITE_ZEROES, 1)] {
        assert_eq!(vm.io(T_OUT, 0, &vec![7; 64 * 1024]).0, 0);
        let segments = [segment(1, 7, flags), segment(16, 100, flags)].concat();
        assert_eq!(vm.io(kind, 0, &segments).0, 0);
        let disk = served.world.disk.lock().unwrap();
        for (sector, bytes) in disk[..64 * 1024].chunks(512).enumerate() {
            let zero = (1..8).contains(&sector) || (16..116).contains(&sector);
            assert!(
                bytes.iter().all(|b| *b == if zero { 0 } else { 7 }),
                "{sector}"
            );
        }
    }
    vm.works(30);
}

#[test]
fn cloud_hypervisor_starts_pauses_and_resumes() {
    let served = Served::new("ch");
    let mem = shared_memory(&[(0, MIB), (MIB, 3 * MIB)]);
    let mut vm = Vm::with_memory(&served.path(), mem, 0);
    vm.negotiate();
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
    vm.works(3);
    // A buffer over both regions.
    vm.scratch = MIB - 0x800;
    vm.works(4);
    vm.scratch = MIB;

    vm.frontend.set_vring_enable(0, false).unwrap();
    vm.submit(T_FLUSH, 0, &[]);
    vm.settle();
    assert!(vm.driver.completions().is_empty(), "paused");
    vm.frontend.set_vring_enable(0, true).unwrap();
    until("the request that came meanwhile completes", || {
        !vm.driver.completions().is_empty()
    });
}

#[test]
fn a_front_end_without_protocol_features_has_its_rings_enabled() {
    let served = Served::new("old");
    let mut vm = served.vm();
    vm.frontend.get_features().unwrap();
    vm.frontend.set_owner().unwrap();
    vm.start_like_qemu(LINUX & !F_PROTOCOL, 0);
    vm.works(5);
    assert!(served.world.events().contains(&"start 0 at 0".to_string()));
}

#[test]
fn a_ring_may_be_enabled_before_its_kick_and_placed_after_it() {
    let served = Served::new("order");
    let mut vm = served.vm();
    vm.negotiate();
    vm.frontend.set_features(LINUX).unwrap();
    vm.frontend.set_vring_enable(0, true).unwrap();
    vm.frontend.set_vring_num(0, 128).unwrap();
    vm.frontend.set_vring_base(0, 0).unwrap();
    vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
    // The memory comes after the addresses that lie in it.
    vm.frontend.set_mem_table(&regions(&vm.driver.mem)).unwrap();
    vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
    vm.works(6);
    vm.frontend.get_vring_base(0).unwrap();

    vm.frontend.set_vring_enable(1, false).unwrap();
    vm.frontend.set_vring_num(1, 128).unwrap();
    vm.frontend.set_vring_kick(1, &vm.driver.kick).unwrap();
    vm.frontend.set_vring_base(1, 3).unwrap();
    vm.frontend.set_vring_addr(1, &vm.vring()).unwrap();
    vm.frontend.set_vring_enable(1, true).unwrap();
    vm.works(7);
    assert!(served.world.events().contains(&"start 1 at 3".to_string()));
}

#[test]
fn descriptors_are_replaced_under_a_running_ring() {
    let served = Served::new("fds");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(8);
    let other = Driver::new(Arc::clone(&vm.driver.mem), 2 * MIB, 128);
    vm.frontend.set_vring_call(0, &other.call).unwrap();
    vm.frontend.set_vring_kick(0, &other.kick).unwrap();
    vm.settle();
    assert!(
        other.was_called(),
        "a new call descriptor is signalled at once"
    );
    while vm.driver.was_called() {}
    let Driver { kick, call, .. } = other;
    vm.driver.kick = kick;
    vm.works(9);
    assert!(call.read().is_ok() && !vm.driver.was_called());
    assert_eq!(served.world.count("kick 0"), 1);
    // Addresses are repeated to switch dirty logging; nothing happens.
    vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
    vm.works(10);
}

#[test]
fn memory_comes_and_goes_while_the_ring_runs() {
    let served = Served::new("hotplug");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(11);
    let all = shared_memory(&[(16 * MIB, MIB)]);
    let plugged = &regions(&all)[0];
    vm.frontend.add_mem_region(plugged).unwrap();
    vm.settle();

    // Data in the new region, header and status in the old one.
    let data = vec![0x5a; 512];
    vm_memory::Bytes::write_slice(&*all, &data, GuestAddress(16 * MIB)).unwrap();
    vm.driver.write(MIB, &header(T_OUT, 0));
    vm.driver.write(2 * MIB, &[0xff]);
    let chain = [
        desc(MIB, 16, 0, 0),
        desc(16 * MIB, 512, 0, 0),
        desc(2 * MIB, 1, WRITE, 0),
    ];
    for (plugged_in, status) in [(true, 0u8), (false, 1)] {
        if !plugged_in {
            vm.frontend.remove_mem_region(plugged).unwrap();
            vm.settle();
        }
        vm.driver.offer_chain(0, &chain);
        vm.driver.kick.write(1).unwrap();
        until("it completes", || !vm.driver.completions().is_empty());
        assert_eq!(vm.driver.read(2 * MIB, 1)[0], status);
    }
    assert_eq!(served.world.disk.lock().unwrap()[..512], data);
    vm.works(12);
}

#[test]
fn one_front_end_after_another_is_served() {
    let served = Served::new("next");
    let mut first = served.vm();
    first.negotiate();
    first.start_like_qemu(LINUX, 0);
    first.works(13);
    // The second one connects at once, and is answered when the first one goes.
    let mut second = served.vm();
    assert!(served.server.connected());
    drop(first);
    second.negotiate();
    second.start_like_qemu(LINUX, 0);
    assert_eq!(served.world.count("disconnected"), 1);
    let kept = served.world.disk.lock().unwrap()[4096..8192].to_vec();
    assert_eq!(second.io(T_IN, 8, &[0; 4096]), (0, kept));
    second.works(14);
    drop(second);
    for i in 0..5 {
        let mut again = served.vm();
        again.negotiate();
        again.start_like_qemu(LINUX, 0);
        again.works(15 + i);
    }
    served.disconnects(7);
}

#[test]
fn configuration_space_has_exactly_the_size_asked_for() {
    let served = Served::new("config");
    let mut vm = served.vm();
    vm.negotiate();
    for size in 36..=60u32 {
        let (header, bytes) = vm
            .frontend
            .get_config(0, size, CONFIG, &vec![0; size as usize])
            .unwrap();
        assert_eq!((header.size, bytes.len()), (size, size as usize));
        assert_eq!(bytes[..8], (DISK as u64 / 512).to_le_bytes());
        assert_eq!(bytes[12..16], 126u32.to_le_bytes(), "seg_max");
        assert_eq!(bytes[20..24], 512u32.to_le_bytes(), "blk_size");
        assert_eq!(bytes[24], 3, "physical blocks of 4 KiB");
        assert_eq!(bytes[32], 1, "writeback");
        assert_eq!(bytes[34..36], 2u16.to_le_bytes(), "num_queues");
        // Discards and write-zeroes: 64 MiB in each of 32 segments, in blocks of 4 KiB; space may be given back.
        let limits = [131_072u32, 32, 8, 131_072, 32, 1].map(u32::to_le_bytes);
        assert_eq!(bytes[36..], limits.as_flattened()[..size as usize - 36]);
    }
    let (_, part) = vm.frontend.get_config(34, 2, CONFIG, &[0; 2]).unwrap();
    assert_eq!(part, 2u16.to_le_bytes());
    drop(vm);

    // Out of range: an empty answer, and the connection lives. By hand, because the client above waits for more.
    let mut raw = UnixStream::connect(served.path()).unwrap();
    raw.write_all(&message(
        16,
        &VhostUserProtocolFeatures::CONFIG.bits().to_ne_bytes(),
    ))
    .unwrap();
    for (offset, size, expected) in [
        (250u32, 7u32, 0u32),
        (0, 4000, 0),
        (249, 7, 7),
        (0, 256, 256),
    ] {
        let fields = [offset, size, 0].map(u32::to_ne_bytes).concat();
        raw.write_all(&message(24, &[fields, vec![0; size as usize]].concat()))
            .unwrap();
        let mut reply = vec![0; 24 + expected as usize];
        raw.read_exact(&mut reply).unwrap();
        assert_eq!(
            reply[8..12],
            (12 + expected).to_ne_bytes(),
            "size of the body"
        );
        assert_eq!(reply[16..20], expected.to_ne_bytes());
    }
    served.was_logged(&["reads 4000 bytes", "out of range"]);
}

#[test]
fn only_the_write_cache_can_be_configured() {
    let served = Served::new("wce");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.settle();
    let last = |served: &Served| {
        let events = served.world.events();
        events
            .iter()
            .rev()
            .find(|e| e.starts_with("features"))
            .unwrap()
            .clone()
    };
    assert!(last(&served).ends_with("writeback true"));
    vm.frontend.set_config(32, CONFIG, &[0]).unwrap();
    vm.settle();
    assert!(last(&served).ends_with("writeback false"));
    assert_eq!(vm.frontend.get_config(32, 1, CONFIG, &[0]).unwrap().1, [0]);

    for (offset, bytes) in [
        (0, &[0xff; 8][..]),
        (32, &[2]),
        (32, &[1, 1]),
        (31, &[1]),
        (200, &[1; 56]),
    ] {
        vm.frontend.set_config(offset, CONFIG, bytes).unwrap();
        vm.settle();
    }
    assert!(last(&served).ends_with("writeback false"));
    let (_, bytes) = vm.frontend.get_config(0, 60, CONFIG, &[0; 60]).unwrap();
    assert_eq!(bytes[..8], (DISK as u64 / 512).to_le_bytes());
    served.was_logged(&["a change of configuration space is refused", "offset 0"]);
    vm.works(21);

    // What the guest set outlives its connection: it believes in it still.
    drop(vm);
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.settle();
    assert!(last(&served).ends_with("writeback false"));
    vm.frontend.set_config(32, CONFIG, &[1]).unwrap();
    vm.settle();
    assert!(last(&served).ends_with("writeback true"));
    vm.frontend.set_features(LINUX & !F_FLUSH).unwrap();
    vm.settle();
    assert!(
        last(&served).ends_with("writeback false"),
        "a guest that cannot flush"
    );
}

#[test]
fn a_reset_device_starts_from_nothing_on_the_same_connection() {
    let served = Served::new("reset");
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(22);
    vm.frontend.reset_owner().unwrap();
    vm.works(23);
    vm.frontend.reset_device().unwrap();
    vm.settle();
    assert_eq!(served.world.count("stop 0 at 6"), 1);
    vm.driver = Driver::new(Arc::clone(&vm.driver.mem), 0, 128);
    vm.driver.start_at(0);
    vm.start_like_qemu(LINUX, 0);
    vm.works(24);
}

#[test]
fn a_client_that_knows_nothing_of_us_reads_and_writes() {
    let served = Served::new("blkio");
    let mut client = blkio::Blkio::new("virtio-blk-vhost-user").unwrap();
    client
        .set_str("path", served.path().to_str().unwrap())
        .unwrap();
    client.connect().unwrap();
    assert_eq!(client.get_u64("capacity").unwrap(), DISK as u64);
    assert_eq!(client.get_i32("max-segments").unwrap(), 126);
    assert_eq!(client.get_u64("max-discard-len").unwrap(), 64 << 20);
    assert_eq!(client.get_u64("max-write-zeroes-len").unwrap(), 64 << 20);
    assert_eq!(client.get_i32("discard-alignment").unwrap(), 4096);
    client.set_i32("num-queues", 2).unwrap();
    let mut queues = client.start().unwrap().queues;
    let region = client.alloc_mem_region(2 * 4096).unwrap();
    client.map_mem_region(&region).unwrap();
    let (ours, theirs) = (region.addr as *mut u8, (region.addr + 4096) as *mut u8);

    for (i, queue) in queues.iter_mut().enumerate() {
        let offset = 64 * 1024 * i as u64;
        // SAFETY: the region has two pages, and no request is in flight on them.
        unsafe { ours.write_bytes(0xa0 + i as u8, 4096) };
        let mut results = Vec::new();
        for request in 0..4 {
            let none = blkio::ReqFlags::empty();
            match request {
                0 => queue.write(offset, ours, 4096, request, none),
                1 => queue.flush(request, none),
                2 => queue.read(offset, theirs, 4096, request, none),
                _ => queue.read(DISK as u64, theirs, 4096, request, none),
            }
            let mut completions = [const { std::mem::MaybeUninit::uninit() }; 1];
            assert_eq!(queue.do_io(&mut completions, 1, None, None).unwrap(), 1);
            // SAFETY: one completion was filled in.
            let done = unsafe { completions[0].assume_init_ref() };
            results.push((done.user_data, done.ret));
        }
        assert_eq!(results[..3], [(0, 0), (1, 0), (2, 0)]);
        assert!(results[3].1 < 0, "beyond the end");
        // SAFETY: as above.
        let read = unsafe { std::slice::from_raw_parts(theirs, 4096) };
        assert!(read.iter().all(|b| *b == 0xa0 + i as u8));
        let at = offset as usize;
        assert_eq!(served.world.disk.lock().unwrap()[at..at + 4096], *read);
        for request in 4..7 {
            let none = blkio::ReqFlags::empty();
            match request {
                4 => queue.discard(offset, 512, request, none),
                5 => queue.write_zeroes(offset + 1024, 512, request, none),
                _ => queue.write_zeroes(offset + 2048, 512, request, blkio::ReqFlags::NO_UNMAP),
            }
            let mut completions = [const { std::mem::MaybeUninit::uninit() }; 1];
            assert_eq!(queue.do_io(&mut completions, 1, None, None).unwrap(), 1);
            // SAFETY: one completion was filled in.
            let done = unsafe { completions[0].assume_init_ref() };
            assert_eq!((done.user_data, done.ret), (request, 0));
        }
        let disk = served.world.disk.lock().unwrap();
        for (n, sector) in disk[at..at + 4096].chunks(512).enumerate() {
            let zero = [0, 2, 4].contains(&n);
            assert!(sector.iter().all(|b| (*b == 0) == zero), "sector {n}");
        }
    }
    drop((queues, client));
    served.disconnects(1);
}

/// What came over the channel for what a front-end has not asked for, after all that was said so far was dealt with.
fn told(channel: &mut UnixStream, vm: &mut Vm) -> Vec<[u32; 3]> {
    vm.settle();
    let mut found = Vec::new();
    let mut bytes = [0; 12];
    channel.set_nonblocking(true).unwrap();
    while let Ok(n) = channel.read(&mut bytes) {
        assert_eq!(n, 12, "one whole message");
        let word = |i: usize| u32::from_ne_bytes(bytes[4 * i..][..4].try_into().unwrap());
        found.push([word(0), word(1), word(2)]);
    }
    found
}

fn sectors(vm: &mut Vm) -> u64 {
    let (_, space) = vm.frontend.get_config(0, 60, CONFIG, &[0; 60]).unwrap();
    u64::from_le_bytes(space[..8].try_into().unwrap())
}

#[test]
fn a_front_end_is_told_of_a_new_size_while_its_device_runs_and_at_each_start() {
    /// CONFIG_CHANGE_MSG, version 1, without a wish for an answer (QEMU would wait for itself), empty.
    const CHANGED: [u32; 3] = [2, 1, 0];
    let served = Served::new("grow");
    let capacity = served.server.capacity();
    let old = DISK as u64 / 512;
    let mut vm = served.vm();
    vm.negotiate_with(VhostUserProtocolFeatures::BACKEND_REQ);
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    vm.frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    assert_eq!(sectors(&mut vm), old);

    // Stopped, a front-end would not listen: it is told when the device starts. Then, and at each later start.
    capacity.grow(2 * DISK as u64);
    assert!(told(&mut channel, &mut vm).is_empty());
    assert_eq!(sectors(&mut vm), 2 * old);
    vm.start_like_qemu(LINUX, 0);
    assert_eq!(told(&mut channel, &mut vm), [CHANGED]);

    // It runs: told at once, and only then is the size another one.
    capacity.grow(3 * DISK as u64);
    let mut seen = Vec::new();
    until("the front-end is told", || {
        seen.extend(told(&mut channel, &mut vm));
        !seen.is_empty()
    });
    assert_eq!((seen, sectors(&mut vm)), (vec![CHANGED], 3 * old));
    vm.works(1);

    vm.frontend.get_vring_base(0).unwrap();
    vm.start_like_qemu(LINUX, 3);
    assert_eq!(told(&mut channel, &mut vm), [CHANGED]);

    // The next connection has a channel of its own; one without gets on without being told.
    drop(vm);
    served.disconnects(1);
    assert_eq!(
        channel.read(&mut [0; 12]).unwrap(),
        0,
        "no end of it is left open"
    );
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    capacity.grow(4 * DISK as u64);
    vm.works(2);
    assert_eq!(sectors(&mut vm), 4 * old);
}

#[test]
fn a_channel_that_was_not_negotiated_or_is_no_socket_ends_the_connection_and_nothing_else() {
    let served = Served::new("channel");
    for (number, features) in [
        VhostUserProtocolFeatures::CONFIG,
        VhostUserProtocolFeatures::BACKEND_REQ,
    ]
    .into_iter()
    .enumerate()
    {
        let mut raw = UnixStream::connect(served.path()).unwrap();
        let said = message(16, &features.bits().to_ne_bytes());
        raw.write_all(&said).unwrap();
        let file = tempfile::tempfile().unwrap();
        raw.send_with_fd(&message(21, &[])[..], file.as_raw_fd())
            .unwrap();
        served.disconnects(number + 1);
    }
    let mut vm = served.vm();
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    vm.works(1);
}
