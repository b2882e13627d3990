//! Requests in flight across a connection that ends: front-ends that keep the in-flight region, in QEMU's and in
//! cloud-hypervisor's order. Here the back-end forgets everything with the connection, as a process that is killed does;
//! `guest_restart.rs` kills real ones.

mod guest_driver;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use guest_driver::vm::*;
use guest_driver::*;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};

const TRACKED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
/// What a front-end passes: the device's property, not the driver's ring size (128 here).
const ENTRIES: u16 = 256;

/// The region, as a front-end keeps it.
struct Region {
    info: VhostUserInflight,
    file: File,
}

impl Region {
    fn get(vm: &mut Vm) -> Region {
        let asked = VhostUserInflight::new(0, 0, 2, ENTRIES);
        let (info, file) = vm.frontend.get_inflight_fd(&asked).unwrap();
        Region { info, file }
    }

    fn set(&self, vm: &mut Vm) {
        let fd = self.file.as_raw_fd();
        vm.frontend.set_inflight_fd(&self.info, fd).unwrap();
    }

    /// Of queue 0.
    fn u16(&self, offset: u64) -> u16 {
        let mut bytes = [0; 2];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        u16::from_ne_bytes(bytes)
    }

    /// Entries in flight of queue 0.
    fn in_flight(&self) -> Vec<u16> {
        let flag = |head: &u16| {
            let mut byte = [0];
            let at = 16 + 16 * u64::from(*head);
            self.file.read_exact_at(&mut byte, at).unwrap();
            byte[0] != 0
        };
        (0..ENTRIES).filter(flag).collect()
    }
}

/// A write whose chain begins at `head`. Every head has its own buffers.
fn submit(vm: &mut Vm, head: u16, sector: u64) {
    vm.scratch = MIB + 0x1000 * u64::from(head);
    let at = vm.scratch;
    let data = [head as u8; 512];
    vm.driver.write(at, &header(T_OUT, sector));
    vm.driver.write(at + 0x100, &data);
    vm.driver.write(at + 0x800, &[0xff]);
    let chain = [
        desc(at, 16, 0, 0),
        desc(at + 0x100, 512, 0, 0),
        desc(at + 0x800, 1, WRITE, 0),
    ];
    vm.driver.offer_chain(head, &chain);
    vm.driver.kick.write(1).unwrap();
}

/// Waits for so many answers, which must be good and each for one of these heads.
fn answers(vm: &mut Vm, heads: &[u16]) -> Vec<u16> {
    let mut got: Vec<u16> = Vec::new();
    until("all are answered", || {
        let more = vm.driver.completions();
        got.extend(more.iter().map(|(head, _)| *head as u16));
        got.len() >= heads.len()
    });
    let mut sorted = got.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, heads);
    for head in heads {
        let status = MIB + 0x1000 * u64::from(*head) + 0x800;
        assert_eq!(vm.driver.read(status, 1), [0], "status of {head}");
    }
    got
}

/// The same virtual machine on a new connection.
fn reconnect(served: &Served, vm: Vm) -> Vm {
    let mem = Arc::clone(&vm.driver.mem);
    let mut again = Vm::with_memory(&served.path(), mem, 0);
    again.driver = vm.driver;
    again.scratch = vm.scratch;
    drop(vm.frontend);
    again
}

/// QEMU's order: the region before anything about rings, and the used index as base.
fn start_like_qemu(vm: &mut Vm, region: &Region) {
    vm.frontend.set_features(LINUX).unwrap();
    region.set(vm);
    let base = vm.driver.used_idx();
    vm.start_like_qemu(LINUX, base);
}

/// cloud-hypervisor's: the region after the sizes, and the available index as base.
fn start_like_cloud_hypervisor(vm: &mut Vm, region: &Region) {
    vm.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    vm.frontend.set_features(LINUX).unwrap();
    vm.frontend.set_mem_table(&regions(&vm.driver.mem)).unwrap();
    vm.frontend.set_vring_num(0, 128).unwrap();
    region.set(vm);
    let base = vm.driver.avail_idx();
    vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
    vm.frontend.set_vring_base(0, base).unwrap();
    vm.frontend.set_vring_call(0, &vm.driver.call).unwrap();
    vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
    vm.frontend.set_vring_enable(0, true).unwrap();
}

type Start = fn(&mut Vm, &Region);

/// Two of four requests are answered out of order, then the connection ends; the other two are answered on the next
/// connection in their order, once each, and the ring works on.
fn requests_survive(name: &str, start: Start) {
    let served = Served::new(name);
    let mut vm = served.vm();
    vm.negotiate_with(TRACKED);
    let region = Region::get(&mut vm);
    start(&mut vm, &region);
    vm.works(1);
    let seen = vm.driver.used_idx();
    assert_eq!(region.in_flight(), [0u16; 0]);

    served.world.slow.lock().unwrap().extend([40, 42]);
    for (head, sector) in [(9, 42), (3, 41), (6, 40), (0, 43)] {
        submit(&mut vm, head, sector);
    }
    answers(&mut vm, &[0, 3]);
    until("the region says so", || region.u16(14) == seen + 2);
    assert_eq!(region.in_flight(), [6, 9]);

    // Meanwhile the guest goes on.
    let mut vm = reconnect(&served, vm);
    served.disconnects(1);
    submit(&mut vm, 12, 44);
    served.world.slow.lock().unwrap().clear();
    served.world.taken.lock().unwrap().clear();
    while vm.driver.was_called() {}

    vm.negotiate_with(TRACKED);
    start(&mut vm, &region);
    assert_eq!(answers(&mut vm, &[6, 9, 12]), [9, 6, 12], "in their order");
    assert_eq!(*served.world.taken.lock().unwrap(), [42, 40, 44]);
    for (head, sector) in [(9, 42), (6, 40), (12, 44), (3, 41)] {
        let at = sector * 512;
        assert_eq!(served.world.disk.lock().unwrap()[at..at + 512], [head; 512]);
    }
    vm.works(2);
    assert_eq!(vm.driver.completions(), []);
    assert_eq!(region.in_flight(), [0u16; 0]);

    // After a clean stop the region is empty and says where.
    let base = vm.frontend.get_vring_base(0).unwrap();
    assert_eq!(base, u32::from(vm.driver.used_idx()));
    assert_eq!(region.u16(14), vm.driver.used_idx());
}

#[test]
fn qemu_gets_each_answer_once_when_its_base_is_the_used_index() {
    requests_survive("inflight-qemu", start_like_qemu);
}

#[test]
fn cloud_hypervisor_gets_each_answer_once_when_its_base_is_the_available_index() {
    requests_survive("inflight-ch", start_like_cloud_hypervisor);
}

#[test]
fn an_answer_whose_notification_was_lost_is_announced_by_the_next_process() {
    let served = Served::new("inflight-call");
    let mut vm = served.vm();
    vm.negotiate_with(TRACKED);
    let region = Region::get(&mut vm);
    start_like_qemu(&mut vm, &region);
    vm.works(3);
    // The process publishes this one and dies before it signals.
    let deaf = Driver::new(Arc::clone(&vm.driver.mem), 0, 128);
    vm.frontend.set_vring_call(0, &deaf.call).unwrap();
    vm.settle();
    submit(&mut vm, 5, 7);
    until("it is answered", || vm.driver.used_idx() == 4);
    let mut vm = reconnect(&served, vm);
    while vm.driver.was_called() {}
    vm.negotiate_with(TRACKED);
    // cloud-hypervisor sends the descriptor before the ring starts, and never again.
    start_like_cloud_hypervisor(&mut vm, &region);
    until("the guest is called", || vm.driver.was_called());
    answers(&mut vm, &[5]);
}

#[test]
fn a_ring_that_stopped_with_requests_unanswered_answers_them_when_it_goes_on() {
    let served = Served::new("inflight-stop");
    let mut vm = served.vm();
    vm.negotiate_with(TRACKED);
    let region = Region::get(&mut vm);
    start_like_qemu(&mut vm, &region);
    served.world.slow.lock().unwrap().extend([40]);
    submit(&mut vm, 9, 40);
    submit(&mut vm, 3, 41);
    answers(&mut vm, &[3]);
    // The time for that was over: two taken, one answered.
    assert_eq!(vm.frontend.get_vring_base(0).unwrap(), 2);
    assert_eq!(region.in_flight(), [9]);
    served.world.slow.lock().unwrap().clear();
    region.set(&mut vm);
    vm.start_like_qemu(LINUX, 2);
    answers(&mut vm, &[9]);
    assert_eq!(region.in_flight(), [0u16; 0]);
    vm.works(4);
}

#[test]
fn after_a_reset_nothing_is_answered_that_was_asked_before() {
    let served = Served::new("inflight-reset");
    let mut vm = served.vm();
    vm.negotiate_with(TRACKED);
    let region = Region::get(&mut vm);
    start_like_qemu(&mut vm, &region);
    vm.works(5);
    served.world.slow.lock().unwrap().extend([40]);
    submit(&mut vm, 9, 40);
    until("it is taken", || region.in_flight() == [9]);

    // QEMU frees the region when the device is reset, and asks for a new one.
    vm.frontend.get_vring_base(0).unwrap();
    let fresh = Region::get(&mut vm);
    vm.driver = Driver::new(Arc::clone(&vm.driver.mem), 0, 128);
    vm.driver.start_at(0);
    start_like_qemu(&mut vm, &fresh);
    vm.works(6);
    submit(&mut vm, 9, 40);
    until("it is taken", || fresh.in_flight() == [9]);

    // RESET_DEVICE says it by itself.
    vm.frontend.reset_device().unwrap();
    vm.settle();
    assert_eq!(fresh.u16(8), 0, "version");
    vm.driver = Driver::new(Arc::clone(&vm.driver.mem), 0, 128);
    vm.driver.start_at(0);
    start_like_qemu(&mut vm, &fresh);
    vm.settle();
    assert_eq!((fresh.u16(8), fresh.in_flight()), (1, Vec::new()));
    vm.works(7);
}

#[test]
fn a_front_end_without_the_feature_is_served_as_before() {
    let served = Served::new("inflight-none");
    let mut vm = served.vm();
    vm.negotiate();
    let asked = VhostUserInflight::new(0, 0, 2, ENTRIES);
    assert!(vm.frontend.get_inflight_fd(&asked).is_err());
    vm.start_like_qemu(LINUX, 0);
    vm.works(8);
    served.was_logged(&["no in-flight region", "does not know INFLIGHT_SHMFD"]);
    let base = vm.frontend.get_vring_base(0).unwrap();
    vm.start_like_qemu(LINUX, base as u16);
    vm.works(9);
    let events = served.world.events();
    assert!(
        events.iter().any(|e| e.starts_with("start 0 at 3")),
        "the base counts: {events:?}"
    );
}

#[test]
fn a_region_that_does_not_fit_is_refused_and_the_next_connection_served() {
    let served = Served::new("inflight-bad");
    let memory = |len: u64, seals: rustix::fs::SealFlags| {
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("test", flags).unwrap());
        file.set_len(len).unwrap();
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        file
    };
    let sealed = rustix::fs::SealFlags::SHRINK;
    let size = 2 * (16 + 16 * 256u64).next_multiple_of(64);
    let info =
        |size, offset, queues, entries| VhostUserInflight::new(size, offset, queues, entries);
    let newer = memory(size, sealed);
    newer.write_all_at(&7u16.to_ne_bytes(), 8).unwrap();
    let ordinary = tempfile::tempfile().unwrap();
    ordinary.set_len(size).unwrap();
    let cases = [
        (
            info(size, 0, 3, 256),
            memory(size, sealed),
            "attached with 2",
        ),
        (
            info(size, 0, 2, 32769),
            memory(size, sealed),
            "32769 entries",
        ),
        (info(size, 0, 2, 260), memory(size, sealed), "are needed"),
        (
            info(size, 0, 2, 256),
            memory(size - 1, sealed),
            "are needed",
        ),
        (
            info(size, u64::MAX, 2, 256),
            memory(size, sealed),
            "are needed",
        ),
        (
            info(size, 0, 2, 256),
            memory(size, rustix::fs::SealFlags::GROW),
            "sealed",
        ),
        (info(size, 0, 2, 256), ordinary, "sealed"),
        (info(size, 0, 2, 256), newer, "version 7"),
    ];
    let count = cases.len();
    for (info, file, reason) in cases {
        let mut vm = served.vm();
        vm.negotiate_with(TRACKED);
        vm.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let refused = vm.frontend.set_inflight_fd(&info, file.as_raw_fd());
        assert!(refused.is_err(), "{reason}");
        served.was_logged(&["SET_INFLIGHT_FD", reason]);
    }
    served.disconnects(count);

    // Sizes that only the ring knows of, and a region that comes while it runs.
    let mut vm = served.vm();
    vm.negotiate_with(TRACKED);
    let small = VhostUserInflight::new(0, 0, 1, 64);
    let (small, file) = vm.frontend.get_inflight_fd(&small).unwrap();
    assert_eq!(small.mmap_size, (16 + 16 * 64u64).next_multiple_of(64));
    vm.frontend
        .set_inflight_fd(&small, file.as_raw_fd())
        .unwrap();
    vm.start_like_qemu(LINUX, 0);
    served.was_logged(&["a ring of 128 entries with an in-flight region of 64"]);
    served.disconnects(count + 1);

    let mut vm = served.vm();
    vm.negotiate_with(TRACKED);
    let region = Region::get(&mut vm);
    start_like_qemu(&mut vm, &region);
    vm.works(10);
    region.set(&mut vm);
    served.was_logged(&["the in-flight region is replaced while queue 0 runs"]);
    served.disconnects(count + 2);

    let mut vm = served.vm();
    vm.negotiate_with(TRACKED);
    let one = VhostUserInflight::new(0, 0, 1, 128);
    let (one, file) = vm.frontend.get_inflight_fd(&one).unwrap();
    vm.frontend.set_inflight_fd(&one, file.as_raw_fd()).unwrap();
    vm.frontend.set_features(LINUX).unwrap();
    vm.frontend.set_mem_table(&regions(&vm.driver.mem)).unwrap();
    vm.frontend.set_vring_num(1, 128).unwrap();
    vm.frontend.set_vring_addr(1, &vm.vring()).unwrap();
    vm.frontend.set_vring_kick(1, &vm.driver.kick).unwrap();
    served.was_logged(&["queue 1 is started, but the in-flight region is for 1 queues"]);
    served.disconnects(count + 3);

    let mut vm = served.vm();
    vm.negotiate_with(TRACKED);
    let asked = VhostUserInflight::new(0, 0, 9, 128);
    assert!(vm.frontend.get_inflight_fd(&asked).is_err());
    served.was_logged(&["GET_INFLIGHT_FD", "for 9 queues"]);
    served.disconnects(count + 4);

    let mut vm = served.vm();
    vm.negotiate_with(TRACKED);
    let region = Region::get(&mut vm);
    start_like_qemu(&mut vm, &region);
    vm.works(11);
}
