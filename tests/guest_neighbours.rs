//! One node, two machines: one works and checks every byte, the other one tries everything against the process that serves
//! both. The first must not notice, the process must be the same in the end, and the other one's volume must serve the next
//! machine that behaves.

mod cluster_support;
mod guest_driver;

use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::{Cluster, eventually};
use guest_driver::vm::{LINUX, Vm, regions, shared_memory};
use guest_driver::*;
use vhost::VhostBackend;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The machine's memory: the ring and what must stay, and what it does its mischief with.
const HERE: (u64, u64) = (0, 4 * MIB);
const THERE: (u64, u64) = (8 * MIB, MIB);
/// Header, status and data of a request.
const AT: u64 = MIB;
const STATUS: u64 = MIB + 0x1000;
const DATA_AT: u64 = MIB + 0x2000;
/// Nobody is ever told of this page.
const CANARY: u64 = 2 * MIB;

struct Street {
    cluster: Cluster,
    pid: u32,
    honest: Load,
    socket: PathBuf,
}

impl Street {
    /// Two volumes on one node, on a disk; a load on the first.
    fn new() -> Street {
        Street::in_directory("/tmp")
    }

    fn in_directory(parent: &str) -> Street {
        let mut cluster = Cluster::start_in(Path::new(parent), 1);
        let good = cluster.serve("good", "--size 16MiB --replicas 0 --master n1", "--node n1");
        let socket = cluster.serve(
            "evil",
            "--size 16MiB --replicas 0 --master n1",
            "--node n1 --num-queues 2",
        );
        let honest = Load::start(&good, Plan::small(), Oracle::new(16 << 20));
        let pid = cluster.pid(1);
        Street {
            cluster,
            pid,
            honest,
            socket,
        }
    }

    /// A machine with a running ring on the second volume. Waits until the one before has been dealt with.
    fn machine(&self) -> Vm {
        self.machine_with(LINUX, 128)
    }

    fn machine_with(&self, features: u64, size: u16) -> Vm {
        let mem = shared_memory(&[HERE, THERE]);
        let mut vm = Vm::with_memory(&self.socket, mem, 0);
        vm.driver = Driver::new(Arc::clone(&vm.driver.mem), 0, size);
        vm.negotiate_with(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        vm.start_like_qemu(features, 0);
        vm.driver.write(CANARY, &[0x5a; 4096]);
        vm
    }

    /// After some mischief: all is well, for everybody.
    fn is_quiet(&mut self, what: &str) {
        assert!(self.cluster.is_alive(1), "{what}");
        assert_eq!(self.cluster.pid(1), self.pid, "{what}");
        self.honest.goes_on();
        assert_eq!(self.honest.failed(), 0, "{what}");
        let mut next = self.machine();
        next.works(what.len() as u8);
    }

    fn end(mut self) {
        self.is_quiet("in the end");
        let outcome = self.honest.finish();
        assert_eq!(outcome.failed, 0);
    }
}

/// A whole read, to be spoilt: header, data, status.
fn read(sector: u64) -> ([u8; 16], Vec<Desc>) {
    let chain = vec![
        desc(AT, 16, 0, 0),
        desc(DATA_AT, 4096, WRITE, 0),
        desc(STATUS, 1, WRITE, 0),
    ];
    (header(T_IN, sector), chain)
}

fn put(vm: &mut Vm, header: &[u8], chain: &[Desc]) {
    vm.driver.write(AT, header);
    vm.driver.write(STATUS, &[0xff]);
    vm.driver.offer_chain(0, chain);
    vm.driver.kick.write(1).unwrap();
}

/// Waits for the answer to the only request; its status.
fn answer(vm: &mut Vm) -> u8 {
    eventually("an answer", || {
        let got = vm.driver.completions();
        assert!(got.len() < 2, "{got:?}");
        (got.len() == 1).then_some(())
    });
    vm.driver.set_used_event(vm.driver.used_idx());
    vm.driver.read(STATUS, 1)[0]
}

/// The ring is given up: a good request behind the bad thing is not answered. The session goes on.
fn is_given_up(vm: &mut Vm) {
    let (header, chain) = read(0);
    put(vm, &header, &chain);
    vm.frontend.set_vring_enable(0, true).unwrap();
    vm.settle();
    assert_eq!(vm.driver.completions(), []);
    assert_eq!(vm.driver.read(STATUS, 1), [0xff]);
}

fn untouched(vm: &Vm) {
    assert!(vm.driver.read(CANARY, 4096).iter().all(|b| *b == 0x5a));
}

#[test]
fn requests_that_break_the_rules() {
    const IOERR: u8 = 1;
    let mut street = Street::new();
    type Spoil = fn(&mut Vec<Desc>);
    // What each does to a good read of 4 KiB, all of them with a status that can be reached.
    let cases: &[(&str, Spoil)] = &[
        ("zero length", |c| c[1].len = 0),
        ("an empty header", |c| c[0].len = 0),
        ("more than 4 GiB", |c| {
            c[1].len = u32::MAX;
            let again = c[1];
            c.insert(1, again);
        }),
        ("an address outside memory", |c| c[1].addr = 6 * MIB),
        ("an address that wraps around", |c| {
            c[1].addr = u64::MAX - 100
        }),
        ("data into a hole", |c| c[1].addr = 4 * MIB - 512),
        ("a header outside memory", |c| c[0].addr = 1 << 60),
        ("a writable header", |c| c[0].flags = WRITE),
        ("data to be read", |c| c[1].flags = 0),
        ("the header last but one", |c| c.swap(0, 1)),
        ("a header of 15 bytes", |c| c[0].len = 15),
        ("a part of a sector", |c| c[1].len = 4095),
    ];
    let mut vm = street.machine();
    for (what, spoil) in cases {
        let (header, mut chain) = read(8);
        spoil(&mut chain);
        put(&mut vm, &header, &chain);
        assert_eq!(answer(&mut vm), IOERR, "{what}");
        untouched(&vm);
    }
    for sector in [1 << 15, (1 << 15) - 7, u64::MAX, u64::MAX / 512] {
        let (header, chain) = read(sector);
        put(&mut vm, &header, &chain);
        assert_eq!(answer(&mut vm), IOERR, "sector {sector}");
    }
    untouched(&vm);
    // All on one ring, which serves on.
    vm.works(3);
    drop(vm);
    street.is_quiet("bad requests");
    street.end();
}

#[test]
fn rings_that_break_the_rules() {
    let mut street = Street::new();
    type Spoil = fn(&mut Vm);
    let cases: &[(&str, Spoil)] = &[
        ("a readable status", |vm| {
            let (header, mut chain) = read(8);
            chain.truncate(2);
            chain[1].flags = 0;
            put(vm, &header, &chain);
        }),
        ("a status outside memory", |vm| {
            let (header, mut chain) = read(8);
            chain[2].addr = 6 * MIB;
            put(vm, &header, &chain);
        }),
        ("a loop", |vm| {
            vm.driver.put(0, desc(AT, 16, NEXT, 1));
            vm.driver.put(1, desc(DATA_AT, 512, NEXT | WRITE, 0));
            vm.driver.offer(0);
        }),
        ("a loop of one", |vm| {
            vm.driver.put(0, desc(AT, 16, NEXT, 0));
            vm.driver.offer(0);
        }),
        ("a head outside the ring", |vm| vm.driver.offer(128)),
        ("a successor outside the ring", |vm| {
            vm.driver.put(0, desc(AT, 16, NEXT, 0xffff));
            vm.driver.offer(0);
        }),
        ("the same head twice", |vm| {
            let (header, chain) = read(8);
            vm.driver.write(AT, &header);
            vm.driver.offer_chain(0, &chain);
            vm.driver.offer(0);
            vm.driver.kick.write(1).unwrap();
            eventually("the first is answered", || {
                (!vm.driver.completions().is_empty()).then_some(())
            });
        }),
        ("an index far ahead", |vm| vm.driver.set_avail_idx(1000)),
        ("an index that goes back", |vm| {
            vm.driver.set_avail_idx(0xffff)
        }),
        ("an indirect table in an indirect table", |vm| {
            let inner = [desc(THERE.0 + 0x100, 16, INDIRECT, 0)];
            vm.driver.put_table(THERE.0, &inner);
            vm.driver.put(0, desc(THERE.0, 16, INDIRECT, 0));
            vm.driver.offer(0);
        }),
        ("an empty indirect table", |vm| {
            vm.driver.put(0, desc(THERE.0, 0, INDIRECT, 0));
            vm.driver.offer(0);
        }),
        ("half an indirect descriptor", |vm| {
            vm.driver.put(0, desc(THERE.0, 24, INDIRECT, 0));
            vm.driver.offer(0);
        }),
        ("an indirect table outside memory", |vm| {
            vm.driver.put(0, desc(6 * MIB, 32, INDIRECT, 0));
            vm.driver.offer(0);
        }),
        ("an indirect table of 4 GiB", |vm| {
            vm.driver.put(0, desc(THERE.0, !15, INDIRECT, 0));
            vm.driver.offer(0);
        }),
        ("a loop in an indirect table", |vm| {
            let table = [desc(AT, 16, NEXT, 1), desc(DATA_AT, 512, NEXT | WRITE, 1)];
            vm.driver.put_table(THERE.0, &table);
            vm.driver.put(0, desc(THERE.0, 32, INDIRECT, 0));
            vm.driver.offer(0);
        }),
    ];
    for (what, spoil) in cases {
        println!("{what}");
        let mut vm = street.machine();
        spoil(&mut vm);
        vm.driver.kick.write(1).unwrap();
        eventually("the ring is given up", || {
            let said = "volume default/evil: queue 0 is broken";
            let before = cases.iter().position(|case| case.0 == *what).unwrap();
            (street.cluster.log(1).matches(said).count() > before).then_some(())
        });
        is_given_up(&mut vm);
        untouched(&vm);
    }
    street.is_quiet("bad rings");
    street.end();
}

#[test]
fn memory_and_rings_that_go_away_under_requests() {
    let mut street = Street::new();
    let busy = |vm: &mut Vm| {
        // As many reads as the ring holds, into memory that is about to go.
        for head in (0..126).step_by(3) {
            let at = THERE.0 + 0x2000 * u64::from(head / 3);
            vm.driver.write(AT, &header(T_IN, 8 * u64::from(head)));
            let chain = [
                desc(AT, 16, 0, 0),
                desc(at, 4096, WRITE, 0),
                desc(STATUS, 1, WRITE, 0),
            ];
            vm.driver.offer_chain(head, &chain);
        }
        vm.driver.kick.write(1).unwrap();
    };
    // One region removed; all removed; another table.
    let mut vm = street.machine();
    let both = regions(&vm.driver.mem);
    busy(&mut vm);
    vm.frontend.remove_mem_region(&both[1]).unwrap();
    vm.settle();
    let mut got = 0;
    eventually("all are answered", || {
        got += vm.driver.completions().len();
        (got == 42).then_some(())
    });
    // It is not there any more; and then it is again.
    let (header, mut chain) = read(8);
    chain[1].addr = THERE.0;
    vm.driver.set_used_event(vm.driver.used_idx());
    put(&mut vm, &header, &chain);
    assert_eq!(answer(&mut vm), 1);
    vm.frontend.add_mem_region(&both[1]).unwrap();
    vm.settle();
    put(&mut vm, &header, &chain);
    assert_eq!(answer(&mut vm), 0);
    busy(&mut vm);
    vm.frontend.set_mem_table(&both[1..]).unwrap();
    // The ring is outside memory: the worker gives it up, the session goes on.
    vm.settle();
    drop(vm);
    street.is_quiet("memory removed");

    // A ring that moves while it runs, and one whose machine goes while it is busy.
    let mut vm = street.machine();
    busy(&mut vm);
    let mut vring = vm.vring();
    vring.used_ring_addr += 0x1000;
    let _ = vm.frontend.set_vring_addr(0, &vring);
    assert!(vm.frontend.get_features().is_err(), "closed");
    drop(vm);
    let mut vm = street.machine();
    busy(&mut vm);
    drop(vm);
    street.is_quiet("a ring moved");

    // Queue sizes and enables of queues that are not there, or not yet.
    let mut vm = street.machine();
    let _ = vm.frontend.set_vring_num(0, 64);
    let _ = vm.frontend.set_vring_base(0, 77);
    let _ = vm.frontend.set_vring_enable(1, true);
    let _ = vm.frontend.get_vring_base(1);
    drop(vm);
    street.is_quiet("odd orders");
    street.end();
}

#[test]
fn memory_that_goes_away_under_requests_that_wait() {
    // Given requests for the only copy, on another node, which does not answer: into memory that is taken away, and from there,
    let mut cluster = Cluster::start(2);
    let create = "--size 16MiB --replicas 0 --master n2";
    let socket = cluster.serve("far", create, "--node n1 --num-queues 2");
    let mut vm = Vm::with_memory(&socket, shared_memory(&[HERE, THERE]), 0);
    vm.negotiate_with(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    vm.start_like_qemu(LINUX, 0);
    vm.works(5);
    let written = vm.driver.read(vm.scratch + 0x10, 4096);
    cluster.freeze(2);
    let data_out = THERE.0 + 0x2000;
    vm.driver.write(THERE.0, &[0xee; 4096]);
    vm.driver.write(data_out, &[0xa7; 4096]);
    for (head, kind, sector, data, flags) in
        [(0u16, T_IN, 8, THERE.0, WRITE), (3, T_OUT, 64, data_out, 0)]
    {
        let at = AT + 0x100 * u64::from(head);
        vm.driver.write(at, &header(kind, sector));
        vm.driver.write(at + 0x80, &[0xff]);
        let chain = [
            desc(at, 16, 0, 0),
            desc(data, 4096, flags, 0),
            desc(at + 0x80, 1, WRITE, 0),
        ];
        vm.driver.offer_chain(head, &chain);
    }
    vm.driver.kick.write(1).unwrap();
    eventually("both are in flight", || {
        (cluster.volume(1, "far")["attachment"]["inflight"] == 2).then_some(())
    });
    // when it is taken away, and then the copy answers,
    let both = regions(&vm.driver.mem);
    vm.frontend.remove_mem_region(&both[1]).unwrap();
    vm.settle();
    assert_eq!(vm.driver.completions(), []);
    cluster.thaw(2);
    // then they end well, in the memory that they came with.
    let mut got = 0;
    eventually("both are answered", || {
        got += vm.driver.completions().len();
        (got == 2).then_some(())
    });
    let status = [0u64, 3].map(|head| vm.driver.read(AT + 0x100 * head + 0x80, 1)[0]);
    assert_eq!(status, [0, 0]);
    assert_eq!(vm.driver.read(THERE.0, 4096), written);
    vm.driver.set_used_event(vm.driver.used_idx());
    assert_eq!(vm.io(T_IN, 64, &[0; 4096]), (0, vec![0xa7; 4096]));
}

#[test]
fn a_machine_that_rewrites_what_it_is_writing_leaves_copies_that_are_the_same() {
    /// Writes, each of two blocks and, with the others, all over the volume.
    const WRITES: u64 = 400;
    let cluster = Cluster::start(3);
    let create = "--size 16MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1 --num-queues 2");
    let mut vm = Vm::with_memory(&socket, shared_memory(&[HERE, THERE]), 0);
    vm.negotiate();
    vm.start_like_qemu(LINUX, 0);
    // Given a machine whose other processor never stops changing the buffer,
    let over = AtomicBool::new(false);
    let mem = Arc::clone(&vm.driver.mem);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0u64;
            while !over.load(Ordering::Relaxed) {
                n += 1;
                for at in (0..8192).step_by(256) {
                    mem.write_obj(n, GuestAddress(THERE.0 + at)).unwrap();
                }
            }
        });
        // when that is written, to each copy by a way of its own,
        for n in 0..WRITES {
            vm.driver.write(AT, &header(T_OUT, n % 200 * 64));
            vm.driver.write(STATUS, &[0xff]);
            let chain = [
                desc(AT, 16, 0, 0),
                desc(THERE.0, 8192, 0, 0),
                desc(STATUS, 1, WRITE, 0),
            ];
            vm.driver.offer_chain(0, &chain);
            vm.driver.kick.write(1).unwrap();
            assert_eq!(answer(&mut vm), 0);
        }
        over.store(true, Ordering::Relaxed);
    });
    drop(vm);
    // then each write was one and the same everywhere.
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

/// What a process waits for in all its epolls, also if its own descriptor of it is closed.
fn waits_for(pid: u32) -> usize {
    let all = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let texts = all.filter_map(|file| std::fs::read_to_string(file.ok()?.path()).ok());
    texts.map(|text| text.matches("tfd:").count()).sum()
}

#[test]
fn kicks_that_were_replaced_are_not_waited_for() {
    const REPLACED: usize = 40;
    let mut street = Street::new();
    let mut vm = street.machine();
    vm.works(1);
    let before = waits_for(street.pid);
    assert!(before > 0);
    // The machine keeps the old ones open, so that closing ours does not take them out.
    let mut kept = Vec::new();
    for _ in 0..REPLACED {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        vm.frontend.set_vring_kick(0, &kick).unwrap();
        kept.push(std::mem::replace(&mut vm.driver.kick, kick));
    }
    vm.works(2);
    // (others come and go: connections of people, and of nodes)
    assert!(waits_for(street.pid) < before + REPLACED / 2);
    // Nor those of rings that were stopped.
    for _ in 0..REPLACED {
        let base = vm.frontend.get_vring_base(0).unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        kept.push(std::mem::replace(&mut vm.driver.kick, kick));
        vm.start_like_qemu(LINUX, base as u16);
    }
    vm.works(3);
    assert!(waits_for(street.pid) < before + REPLACED / 2);
    drop((vm, kept));
    street.is_quiet("many kicks");
    street.end();
}

#[test]
fn descriptors_that_are_none() {
    let mut street = Street::new();
    let as_event = |fd: std::os::fd::OwnedFd| {
        // SAFETY: the type is only a carrier here, and owns the descriptor from now on.
        unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
    };
    // A call descriptor that nobody reads, and that is full; one whose other end is closed.
    let mut vm = street.machine();
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&[0; 65536]).unwrap();
    let full = as_event(writer.into());
    vm.frontend.set_vring_call(0, &full).unwrap();
    vm.works(1);
    drop(reader);
    vm.works(2);
    // A kick descriptor that says too much: every byte is a kick.
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut ours, theirs) = (ours, as_event(theirs.into()));
    vm.frontend.set_vring_kick(0, &theirs).unwrap();
    vm.settle();
    ours.write_all(&[7; 4096]).unwrap();
    drop(theirs);
    vm.settle();
    let (header, chain) = read(8);
    put(&mut vm, &header, &chain);
    ours.write_all(&[1; 8]).unwrap();
    assert_eq!(answer(&mut vm), 0);
    // Closed at the other end.
    drop(ours);
    vm.settle();
    drop(vm);
    street.is_quiet("pipes and sockets");

    for path in ["/dev/null", "/dev/zero", "/proc/self/status"] {
        let vm = street.machine();
        let file = as_event(std::fs::File::open(path).unwrap().into());
        let _ = vm.frontend.set_vring_call(0, &file);
        let _ = vm.frontend.set_vring_kick(0, &file);
        let _ = vm.frontend.get_features();
        drop(vm);
        let mut vm = Vm::with_memory(&street.socket, shared_memory(&[HERE]), 0);
        vm.negotiate();
        vm.frontend.set_features(LINUX).unwrap();
        vm.frontend.set_mem_table(&regions(&vm.driver.mem)).unwrap();
        vm.frontend.set_vring_num(0, 128).unwrap();
        vm.frontend.set_vring_base(0, 0).unwrap();
        vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
        let _ = vm.frontend.set_vring_kick(0, &file);
        let _ = vm.frontend.get_features();
    }
    street.is_quiet("files");
    street.end();
}

#[test]
fn descriptors_that_are_made_to_block() {
    let mut street = Street::new();
    // A call descriptor that is full, and of which the flag was taken away after it was handed over.
    let mut vm = street.machine();
    let call = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.frontend.set_vring_call(0, &call).unwrap();
    vm.works(1);
    let _ = call.read();
    call.write(u64::MAX - 1).unwrap();
    // SAFETY: takes no pointers, and the descriptor is open.
    assert_eq!(
        unsafe { libc::fcntl(call.as_raw_fd(), libc::F_SETFL, 0) },
        0
    );
    vm.driver.set_used_event(vm.driver.used_idx());
    let (header, chain) = read(8);
    put(&mut vm, &header, &chain);
    assert_eq!(answer(&mut vm), 0);
    is_given_up(&mut vm);
    drop(vm);
    street.is_quiet("a call descriptor that blocks");
    street.end();
}

#[test]
fn sockets_that_stall_half_way_through_a_message() {
    let mut street = Street::new();
    let whole = guest_driver::vm::message(
        5,
        &[[2u8, 0, 0, 0, 0, 0, 0, 0].as_slice(), &[0x11; 64]].concat(),
    );
    for cut in [1, 4, 11, 12, 13, 19, 20, whole.len() - 1] {
        let mut stream = UnixStream::connect(&street.socket).unwrap();
        stream.write_all(&whole[..cut]).unwrap();
        // The node does everything else meanwhile.
        street.honest.goes_on();
        let inspected = street.cluster.volume(1, "evil");
        assert_eq!(inspected["health"], "healthy");
    }
    street.is_quiet("half messages");
    // One that stalls for good loses its connection, also while it holds it open: another machine works.
    for cut in [7, whole.len() - 1] {
        let mut stream = UnixStream::connect(&street.socket).unwrap();
        stream.write_all(&whole[..cut]).unwrap();
        street.machine().works(4);
        drop(stream);
    }
    let said =
        "default/evil: connection closed: its front-end has begun a message and does not end it";
    assert_eq!(street.cluster.log(1).matches(said).count(), 2);
    // Nor does it keep the volume from being detached meanwhile.
    let mut stream = UnixStream::connect(&street.socket).unwrap();
    stream.write_all(&whole[..7]).unwrap();
    street.cluster.wait_for(1, "evil", "is connected", |v| {
        v["attachment"]["connected"] == true
    });
    street.cluster.ok(1, "volume detach evil --force");
    street
        .cluster
        .ok(1, "volume attach evil --node n1 --num-queues 2");
    street
        .cluster
        .wait_for(1, "evil", "is healthy", |v| v["health"] == "healthy");
    street.end();
}

#[test]
fn what_looks_odd_and_is_right() {
    let mut street = Street::new();
    // 515 descriptors, as Windows makes them: in the ring itself, and in an indirect table of a ring that is shorter.
    for (size, indirect) in [(1024, false), (128, true)] {
        let mut vm = street.machine_with(LINUX, size);
        for kind in [T_OUT, T_IN] {
            vm.driver.write(AT, &header(kind, 64));
            let direction = if kind == T_IN { WRITE } else { 0 };
            let mut chain = vec![desc(AT, 16, 0, 0)];
            for n in 0..513u64 {
                let at = THERE.0 + 1024 * n;
                let fill = if kind == T_OUT { n as u8 } else { 0xee };
                vm.driver.write(at, &[fill; 512]);
                chain.push(desc(at, 512, direction, 0));
            }
            chain.push(desc(STATUS, 1, WRITE, 0));
            if indirect {
                for (n, desc) in (1u16..).zip(chain.iter_mut()).take(514) {
                    (desc.flags, desc.next) = (desc.flags | NEXT, n);
                }
                vm.driver.put_table(3 * MIB, &chain);
                vm.driver.put(0, desc(3 * MIB, 16 * 515, INDIRECT, 0));
                vm.driver.offer(0);
            } else {
                vm.driver.offer_chain(0, &chain);
            }
            vm.driver.kick.write(1).unwrap();
            assert_eq!(answer(&mut vm), 0);
        }
        for n in 0..513u64 {
            assert_eq!(vm.driver.read(THERE.0 + 1024 * n, 512), [n as u8; 512]);
        }
    }
    // A driver that polls, without event indices: it is not signalled, and is served.
    let mut vm = street.machine_with(LINUX & !F_EVENT_IDX, 128);
    vm.works(9);
    vm.driver.set_no_interrupt(true);
    vm.settle();
    while vm.driver.was_called() {}
    for _ in 0..20 {
        let (header, chain) = read(8);
        put(&mut vm, &header, &chain);
        assert_eq!(answer(&mut vm), 0);
    }
    vm.frontend.set_vring_enable(0, true).unwrap();
    vm.settle();
    assert!(!vm.driver.was_called());
    drop(vm);
    street.is_quiet("odd and right");
    street.end();
}

#[test]
fn memory_that_is_cut_short_after_it_was_shared() {
    memory_is_cut_short(Street::new());
}

#[test]
fn memory_that_is_cut_short_when_the_copies_are_in_memory_too() {
    memory_is_cut_short(Street::in_directory("/dev/shm"));
}

fn memory_is_cut_short(mut street: Street) {
    let cut = |vm: &Vm, region: usize, bytes: u64| {
        let region = vm.driver.mem.iter().nth(region).unwrap();
        let file = region.file_offset().unwrap().file();
        file.set_len(bytes).unwrap();
    };
    type Plan = fn(&mut Vm);
    // Each with something in the second region, of which nothing is left; this test never looks there itself.
    let cases: &[(&str, Plan)] = &[
        ("a header", |vm| {
            let (_, mut chain) = read(8);
            chain[0].addr = THERE.0;
            put(vm, &[], &chain);
        }),
        ("data to be read into", |vm| {
            let (header, mut chain) = read(8);
            chain[1].addr = THERE.0 + 512;
            put(vm, &header, &chain);
        }),
        ("data to be read from", |vm| {
            let (_, mut chain) = read(8);
            chain[1] = desc(THERE.0, 8192, 0, 0);
            put(vm, &header(T_OUT, 8), &chain);
        }),
        ("a status", |vm| {
            let (header, mut chain) = read(8);
            chain[2].addr = THERE.0 + 4095;
            put(vm, &header, &chain);
        }),
        ("the serial", |vm| {
            let (_, mut chain) = read(8);
            chain[1] = desc(THERE.0, 20, WRITE, 0);
            put(vm, &header(T_GET_ID, 0), &chain);
        }),
        ("an indirect table", |vm| {
            vm.driver.put(0, desc(THERE.0, 48, INDIRECT, 0));
            vm.driver.offer(0);
            vm.driver.kick.write(1).unwrap();
        }),
    ];
    for (what, mischief) in cases {
        println!("{what}");
        let mut vm = street.machine();
        vm.works(1);
        cut(&vm, 1, 0);
        mischief(&mut vm);
        // Whatever it made of that, it is still there.
        vm.frontend.set_vring_enable(0, true).unwrap();
        vm.settle();
        let base = vm.frontend.get_vring_base(0);
        assert!(base.is_ok(), "{what}: {base:?}");
        untouched(&vm);
        drop(vm);
        street.is_quiet(what);
    }
    // The ring itself, which lies on the first page: the machine is gone by any measure.
    let mut vm = street.machine();
    // Mapped by now, and not refused for being short.
    vm.settle();
    let kick = vm.driver.kick.try_clone().unwrap();
    cut(&vm, 0, 0);
    kick.write(1).unwrap();
    eventually("the ring is given up", || {
        let said = "guest memory is gone: its file was made shorter";
        street.cluster.log(1).contains(said).then_some(())
    });
    drop(vm);
    street.is_quiet("a ring in memory that is gone");
    // One that is cut before its ring starts.
    let mut vm = Vm::with_memory(&street.socket, shared_memory(&[HERE]), 0);
    vm.negotiate();
    vm.frontend.set_features(LINUX).unwrap();
    vm.frontend.set_mem_table(&regions(&vm.driver.mem)).unwrap();
    // Mapped by now.
    vm.settle();
    cut(&vm, 0, 0);
    vm.frontend.set_vring_num(0, 128).unwrap();
    vm.frontend.set_vring_base(0, 0).unwrap();
    vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
    vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
    vm.frontend.set_vring_enable(0, true).unwrap();
    vm.settle();
    drop(vm);
    street.is_quiet("memory that was gone before");
    // And one whose file is shorter than it says never gets that far.
    let mut vm = Vm::with_memory(&street.socket, shared_memory(&[HERE]), 0);
    vm.negotiate();
    vm.frontend.set_features(LINUX).unwrap();
    cut(&vm, 0, HERE.1 - 1);
    let shared = vm.frontend.set_mem_table(&regions(&vm.driver.mem));
    assert!(shared.is_err() || vm.frontend.get_features().is_err());
    drop(vm);
    street.end();
}
