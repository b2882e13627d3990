//! The dirty log of a live migration: exactly the pages that were written are marked, whoever wrote them, from the answer
//! to the message that switches it on until the answer to the one that switches it off.

mod cluster_support;
mod guest_driver;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cluster_support::{Cluster, eventually};
use guest_driver::vm::*;
use guest_driver::*;
use rustix::fs::{MemfdFlags, SealFlags};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

const PAGE: u64 = 4096;
const F_LOG_ALL: u64 = 1 << 26;
const VRING_F_LOG: u32 = 1;

/// Where things are: each on pages of its own, so that a mark tells what it is about.
const RING_SIZE: u16 = 128;
const DESC: u64 = 0x10_000;
const AVAIL: u64 = 0x11_000;
/// Entries begin on page 0x12 and go over into 0x13, where `avail_event` is.
const USED: u64 = 0x12_e00;
const USED_FIRST: u64 = 0x12;
const USED_LAST: u64 = 0x13;
const HEADER: u64 = 0x20_000;
const STATUS: u64 = 0x21_000;
const STATUS_PAGE: u64 = 0x21;

fn pages(of: &[u64]) -> BTreeSet<u64> {
    of.iter().copied().collect()
}

/// A log as QEMU makes it: a sealed memory file. `before` bytes of the file are not part of it.
struct Log {
    file: File,
    before: u64,
    size: u64,
}

impl Log {
    fn new(before: u64, size: u64) -> Log {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file: File = rustix::fs::memfd_create("vhost-log", flags).unwrap().into();
        file.set_len(before + size).unwrap();
        let seals = SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        Log { file, before, size }
    }

    /// One that covers guest memory up to `end`.
    fn up_to(end: u64) -> Log {
        Log::new(0, (end / PAGE).div_ceil(8))
    }

    fn give(&self, vm: &Vm) {
        let region = VhostUserDirtyLogRegion {
            mmap_size: self.size,
            mmap_offset: self.before,
            mmap_handle: self.file.as_raw_fd(),
        };
        // Waits for the answer.
        vm.frontend.set_log_base(0, Some(region)).unwrap();
    }

    /// The pages marked since the last call. Only for when nothing is under way.
    fn take(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; (self.before + self.size) as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        self.file.write_all_at(&vec![0; bytes.len()], 0).unwrap();
        let (before, log) = bytes.split_at(self.before as usize);
        assert!(before.iter().all(|byte| *byte == 0), "outside the log");
        (0..self.size * 8)
            .filter(|page| log[*page as usize / 8] >> (page % 8) & 1 != 0)
            .collect()
    }
}

fn connect(socket: &Path) -> Vm {
    connect_with(socket, 4 * MIB)
}

fn connect_with(socket: &Path, memory: u64) -> Vm {
    let mem = shared_memory(&[(0, memory)]);
    let mut vm = Vm::with_memory(socket, mem, 0);
    vm.driver.desc = DESC;
    vm.driver.avail = AVAIL;
    vm.driver.used = USED;
    vm.negotiate_with(VhostUserProtocolFeatures::LOG_SHMFD);
    vm
}

/// Switches as QEMU does: the features, then the flag of each ring.
fn switch(vm: &mut Vm, on: bool) {
    let features = vm.acked & !F_LOG_ALL;
    vm.acked = if on { features | F_LOG_ALL } else { features };
    vm.frontend.set_features(vm.acked).unwrap();
    flag(vm, on.then_some(vm.driver.used));
}

/// SET_VRING_ADDR with the ring's flag, and where the used ring is to be logged.
fn flag(vm: &mut Vm, used: Option<u64>) {
    let mut vring = vm.vring();
    vring.flags = if used.is_some() { VRING_F_LOG } else { 0 };
    vring.log_addr = used;
    vm.frontend.set_vring_addr(0, &vring).unwrap();
    vm.settle();
}

/// A chain of a header, data at `data`, and a status, each on pages of its own.
fn offer(vm: &mut Vm, kind: u32, sector: u64, data: &[(u64, u32)]) {
    vm.driver.write(HEADER, &header(kind, sector));
    vm.driver.write(STATUS, &[0xff]);
    let direction = if kind == T_OUT { 0 } else { WRITE };
    let mut chain = vec![desc(HEADER, 16, 0, 0)];
    chain.extend(data.iter().map(|(at, len)| desc(*at, *len, direction, 0)));
    chain.push(desc(STATUS, 1, WRITE, 0));
    vm.driver.offer_chain(0, &chain);
    vm.driver.kick.write(1).unwrap();
}

/// Waits for the one answer, and until the turn that gave it is over. Gives the status.
fn answer(vm: &mut Vm) -> u8 {
    eventually("the answer", || {
        (!vm.driver.completions().is_empty()).then_some(())
    });
    vm.driver.set_used_event(vm.driver.used_idx());
    turn_over(vm);
    vm.driver.read(STATUS, 1)[0]
}

/// A message that the ring's thread has to do with between two of its turns.
fn turn_over(vm: &mut Vm) {
    vm.frontend.set_vring_enable(0, true).unwrap();
    vm.settle();
}

fn io(vm: &mut Vm, kind: u32, sector: u64, data: &[(u64, u32)]) -> u8 {
    offer(vm, kind, sector, data);
    answer(vm)
}

/// The pages of the used ring that the next answer writes: its entry, the index, and what asks for the next kick.
fn used_pages(vm: &Vm, event_idx: bool) -> BTreeSet<u64> {
    let slot = u64::from(vm.driver.used_idx() % RING_SIZE);
    // One of them lies on both pages.
    let entry = USED + 4 + 8 * slot;
    let asked = if event_idx { USED_LAST } else { USED_FIRST };
    pages(&[USED_FIRST, entry / PAGE, (entry + 7) / PAGE, asked])
}

/// Every kind of request, on whatever serves `vm`: what it marks, before logging, while it is on, and after it.
fn marks_what_is_written(vm: &mut Vm, features: u64) {
    let event_idx = features & F_EVENT_IDX != 0;
    vm.start_like_qemu(features, 0);
    let log = Log::up_to(4 * MIB);
    assert_eq!(io(vm, T_OUT, 8, &[(0x40_000, 16384)]), 0);
    log.give(vm);
    // There, but not asked for.
    assert_eq!(io(vm, T_IN, 8, &[(0x40_000, 4096)]), 0);
    assert_eq!(log.take(), pages(&[]));

    switch(vm, true);
    turn_over(vm);
    log.take();
    let aligned = [(0x40_000, 8192)];
    // Straight from the disk, and by way of a buffer.
    let scattered = [(0x50_ffe, 4), (0x60_800, 4092), (0x70_fff, 4096)];
    // (request, sector, data in guest memory, status, pages marked)
    type Case<'a> = (u32, u64, &'a [(u64, u32)], u8, &'a [u64]);
    let cases: &[Case<'_>] = &[
        (T_IN, 8, &aligned, 0, &[0x40, 0x41]),
        (
            T_IN,
            8,
            &scattered,
            0,
            &[0x50, 0x51, 0x60, 0x61, 0x70, 0x71],
        ),
        (T_OUT, 16, &aligned, 0, &[]),
        (T_OUT, 16, &scattered, 0, &[]),
        (T_FLUSH, 0, &[], 0, &[]),
        (T_GET_ID, 0, &[(0x80_ff0, 20)], 0, &[0x80, 0x81]),
        // Twenty bytes are written, whatever there is room for.
        (T_GET_ID, 0, &[(0x80_fec, 4096)], 0, &[0x80]),
        (T_IN, 1 << 40, &aligned, 1, &[]),
        (4711, 0, &aligned, 2, &[]),
    ];
    // More than one lap of the ring, so that every entry is in use.
    for (n, (kind, sector, data, status, written)) in cases.iter().cycle().take(150).enumerate() {
        let mut expected = used_pages(vm, event_idx);
        expected.extend(written.iter().chain(&[STATUS_PAGE]));
        assert_eq!(io(vm, *kind, *sector, data), *status, "{n}: {kind}");
        let marked = log.take();
        assert_eq!(marked, expected, "{n}: {kind} at {sector} of {data:x?}");
    }

    // A new log: from the answer on, nothing in the old one.
    let new = Log::new(PAGE, 128);
    new.give(vm);
    // The ring asked for its next kick after the last answer had been seen here.
    log.take();
    let mut expected = used_pages(vm, event_idx);
    expected.extend([0x40, 0x41, STATUS_PAGE]);
    assert_eq!(io(vm, T_IN, 8, &aligned), 0);
    assert_eq!(log.take(), pages(&[]));
    assert_eq!(new.take(), expected);

    switch(vm, false);
    turn_over(vm);
    new.take();
    assert_eq!(io(vm, T_IN, 8, &aligned), 0);
    assert_eq!(io(vm, T_IN, 8, &scattered), 0);
    assert_eq!(new.take(), pages(&[]));
    // And on again.
    switch(vm, true);
    let expected = used_pages(vm, event_idx);
    assert_eq!(io(vm, T_FLUSH, 0, &[]), 0);
    let mut marked = new.take();
    assert!(marked.remove(&STATUS_PAGE));
    assert_eq!(marked, expected);
}

#[test]
fn reads_straight_from_a_disk_are_marked() {
    let cluster = Cluster::start(1);
    let socket = cluster.serve(
        "vm1",
        "--size 16MiB --replicas 0 --master n1",
        "--node n1 --num-queues 2",
    );
    marks_what_is_written(&mut connect(&socket), LINUX);
    // Without event indices it is the flags that are written.
    marks_what_is_written(&mut connect(&socket), LINUX & !F_EVENT_IDX);
}

#[test]
fn reads_of_files_in_memory_are_marked() {
    let cluster = Cluster::start_in(Path::new("/dev/shm"), 1);
    let socket = cluster.serve(
        "vm1",
        "--size 16MiB --replicas 0 --master n1",
        "--node n1 --num-queues 2",
    );
    marks_what_is_written(&mut connect(&socket), LINUX);
}

#[test]
fn reads_from_another_node_are_marked_also_if_they_began_before() {
    // Given a volume that is served from where it has no copy,
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve(
        "vm1",
        "--size 16MiB --replicas 1 --master n1",
        "--node n3 --num-queues 2",
    );
    let mut vm = connect(&socket);
    marks_what_is_written(&mut vm, LINUX);
    // and a read that waits for a node that stands still,
    switch(&mut vm, false);
    let log = Log::up_to(4 * MIB);
    cluster.freeze(1);
    cluster.freeze(2);
    let mut expected = used_pages(&vm, true);
    offer(&mut vm, T_IN, 8, &[(0x90_000, 4096)]);
    turn_over(&mut vm);
    // when logging begins, and then the read completes,
    log.give(&vm);
    switch(&mut vm, true);
    cluster.thaw(1);
    cluster.thaw(2);
    assert_eq!(answer(&mut vm), 0);
    // then it is marked.
    expected.extend([0x90, STATUS_PAGE]);
    let marked = log.take();
    assert!(marked.is_superset(&expected), "{marked:x?} {expected:x?}");
    assert!(marked.is_subset(&expected), "{marked:x?} {expected:x?}");
}

#[test]
fn the_used_ring_is_logged_by_its_own_flag_and_where_the_front_end_wants_it() {
    let served = Served::new("used");
    let mut vm = connect(&served.path());
    vm.start_like_qemu(LINUX, 0);
    let log = Log::up_to(4 * MIB);
    log.give(&vm);
    // Only the flag: used ring, and neither data nor status.
    flag(&mut vm, Some(0x300_000));
    assert_eq!(io(&mut vm, T_IN, 8, &[(0x40_000, 4096)]), 0);
    assert_eq!(log.take(), pages(&[0x300]));
    // Only LOG_ALL: all of it, as cloud-hypervisor expects.
    flag(&mut vm, None);
    vm.frontend.set_features(LINUX | F_LOG_ALL).unwrap();
    turn_over(&mut vm);
    log.take();
    assert_eq!(io(&mut vm, T_IN, 8, &[(0x40_000, 4096)]), 0);
    assert_eq!(
        log.take(),
        pages(&[0x40, STATUS_PAGE, USED_FIRST, USED_LAST])
    );
    // An address beyond the log would lose marks.
    let mut vring = vm.vring();
    vring.flags = VRING_F_LOG;
    vring.log_addr = Some(4 * MIB - 8);
    vm.frontend.set_vring_addr(0, &vring).unwrap();
    assert!(vm.frontend.get_features().is_err(), "closed");
    served.was_logged(&[
        "SET_VRING_ADDR",
        "the used ring of queue 0",
        "beyond the dirty log",
    ]);
}

#[test]
fn memory_that_comes_while_logging_is_on_is_logged() {
    let served = Served::new("hotplug");
    let mut vm = connect(&served.path());
    // The second region is the driver's only, at first.
    vm.driver.mem = shared_memory(&[(0, 4 * MIB), (8 * MIB, MIB)]);
    vm.start_like_qemu(LINUX, 0);
    let both = regions(&vm.driver.mem);
    vm.frontend.set_mem_table(&both[..1]).unwrap();
    let log = Log::up_to(9 * MIB);
    log.give(&vm);
    switch(&mut vm, true);
    assert_eq!(io(&mut vm, T_IN, 8, &[(8 * MIB, 4096)]), 1);
    vm.frontend.add_mem_region(&both[1]).unwrap();
    turn_over(&mut vm);
    log.take();
    assert_eq!(io(&mut vm, T_IN, 8, &[(8 * MIB + 0x3000, 4096)]), 0);
    assert_eq!(
        log.take(),
        pages(&[0x803, STATUS_PAGE, USED_FIRST, USED_LAST])
    );
    // A whole new table.
    vm.frontend.set_mem_table(&both).unwrap();
    turn_over(&mut vm);
    log.take();
    assert_eq!(io(&mut vm, T_IN, 8, &[(8 * MIB + 0x4000, 4096)]), 0);
    assert_eq!(
        log.take(),
        pages(&[0x804, STATUS_PAGE, USED_FIRST, USED_LAST])
    );
    // Memory for which the log has no bits.
    let beyond = shared_memory(&[(9 * MIB, MIB)]);
    vm.frontend.add_mem_region(&regions(&beyond)[0]).unwrap();
    assert!(vm.frontend.get_features().is_err(), "closed");
    served.was_logged(&["ADD_MEM_REG", "too small for guest memory", "0xa00000"]);
}

#[test]
fn a_log_that_is_too_small_or_no_log_is_refused_with_a_reason() {
    let served = Served::new("bad-log");
    let refused = |n: usize, give: &dyn Fn(&Vm), parts: &[&str]| {
        let mut vm = connect(&served.path());
        vm.start_like_qemu(LINUX, 0);
        give(&vm);
        let _ = vm.frontend.set_features(LINUX | F_LOG_ALL);
        assert!(vm.frontend.get_features().is_err(), "closed: {parts:?}");
        served.was_logged(parts);
        drop(vm);
        served.disconnects(n);
    };
    let too_small = |vm: &Vm| Log::up_to(2 * MIB).give(vm);
    refused(
        1,
        &too_small,
        &[
            "SET_FEATURES",
            "too small for guest memory, which ends at 0x400000",
        ],
    );
    let says_more = |vm: &Vm| {
        let log = Log::up_to(4 * MIB);
        let region = VhostUserDirtyLogRegion {
            mmap_size: log.size + 1,
            mmap_offset: 0,
            mmap_handle: log.file.as_raw_fd(),
        };
        assert!(vm.frontend.set_log_base(0, Some(region)).is_err());
    };
    refused(2, &says_more, &["SET_LOG_BASE", "must lie within its file"]);
    let on_disk = |vm: &Vm| {
        let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.set_len(4096).unwrap();
        let region = VhostUserDirtyLogRegion {
            mmap_size: 4096,
            mmap_offset: 0,
            mmap_handle: file.as_raw_fd(),
        };
        assert!(vm.frontend.set_log_base(0, Some(region)).is_err());
    };
    refused(3, &on_disk, &["SET_LOG_BASE", "sealed against shrinking"]);
    // All is well for the next one.
    let mut vm = connect(&served.path());
    vm.start_like_qemu(LINUX, 0);
    assert_eq!(io(&mut vm, T_FLUSH, 0, &[]), 0);
}

#[test]
fn a_ring_that_starts_during_a_migration_waits_for_the_log() {
    // QEMU, when its guest resets the device or the back-end comes back in the middle of a migration: LOG_ALL first, the
    // ring with its flag, and the log last.
    let served = Served::new("restart");
    let mut vm = connect(&served.path());
    vm.acked = LINUX | F_LOG_ALL;
    vm.frontend.set_features(vm.acked).unwrap();
    vm.frontend.set_mem_table(&regions(&vm.driver.mem)).unwrap();
    vm.frontend.set_vring_num(0, RING_SIZE).unwrap();
    vm.frontend.set_vring_base(0, 0).unwrap();
    flag(&mut vm, Some(USED));
    offer(&mut vm, T_IN, 8, &[(0x40_000, 4096)]);
    vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
    vm.frontend.set_vring_call(0, &vm.driver.call).unwrap();
    vm.frontend.set_vring_enable(0, true).unwrap();
    vm.settle();
    let started = || {
        served
            .world
            .events()
            .iter()
            .any(|e| e.starts_with("start 0"))
    };
    assert!(!started());
    let log = Log::up_to(4 * MIB);
    log.give(&vm);
    assert!(started());
    assert_eq!(answer(&mut vm), 0);
    assert_eq!(
        log.take(),
        pages(&[0x40, STATUS_PAGE, USED_FIRST, USED_LAST])
    );

    // A migration that is given up before the log has come.
    drop(vm);
    served.disconnects(1);
    let mut vm = connect(&served.path());
    vm.start_like_qemu(LINUX | F_LOG_ALL, 0);
    offer(&mut vm, T_FLUSH, 0, &[]);
    vm.settle();
    assert_eq!(vm.driver.completions(), []);
    switch(&mut vm, false);
    assert_eq!(answer(&mut vm), 0);
}
