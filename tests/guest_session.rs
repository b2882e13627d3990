//! Front-ends against the server: the sequences of QEMU and cloud-hypervisor, a client that knows nothing of us, and
//! front-ends that go away, lie, or forget to share their memory.

#[path = "guest_driver/engine.rs"]
mod engine;
mod guest_driver;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use engine::{Engine, World};
use guest_driver::*;
use lockstep::guest::{BlockSize, DeviceConfig, GuestMem, ServeError, Server};
use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MIB: u64 = 1 << 20;
const DISK: usize = 1 << 20;
const F_PROTOCOL: u64 = 1 << 30;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_VERSION_1: u64 = 1 << 32;
/// What Linux takes, and what SeaBIOS takes.
const LINUX: u64 = F_VERSION_1
    | F_PROTOCOL
    | F_FLUSH
    | F_CONFIG_WCE
    | F_INDIRECT
    | F_EVENT_IDX
    | 1 << 2
    | 1 << 6
    | 1 << 10
    | 1 << 12;
const SEABIOS: u64 = F_VERSION_1 | F_PROTOCOL | 1 << 6;

/// How long something that must happen may take before the test gives up. Not a claim about speed.
const PATIENCE: Duration = Duration::from_secs(30);

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = std::time::Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "gave up waiting until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A logger that keeps what was said, for all tests of this binary; each looks for its own volume.
struct Capture(Mutex<Vec<String>>);

static LOG: Capture = Capture(Mutex::new(Vec::new()));
static INSTALL: Once = Once::new();

impl log::Log for Capture {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, record: &log::Record) {
        self.0.lock().unwrap().push(record.args().to_string());
    }
    fn flush(&self) {}
}

fn logged(volume: &str, parts: &[&str]) -> bool {
    let log = LOG.0.lock().unwrap();
    log.iter()
        .any(|line| line.contains(volume) && parts.iter().all(|part| line.contains(part)))
}

/// A served volume.
struct Served {
    name: String,
    dir: TempDir,
    world: Arc<World>,
    server: Server,
}

fn config(name: &str) -> DeviceConfig {
    DeviceConfig {
        volume: name.into(),
        size: DISK as u64,
        block_size: BlockSize::B512,
        num_queues: 2,
        seg_max: 126,
        read_only: false,
        writeback: true,
    }
}

impl Served {
    fn new(name: &str) -> Served {
        INSTALL.call_once(|| {
            log::set_logger(&LOG).unwrap();
            log::set_max_level(log::LevelFilter::Trace);
        });
        let name = format!("test/{name}");
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(DISK);
        let engine = Box::new(Engine::new(&world));
        let server =
            Server::spawn(config(&name), &dir.path().join("vhost/v.sock"), engine).unwrap();
        Served {
            name,
            dir,
            world,
            server,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("vhost/v.sock")
    }

    fn vm(&self) -> Vm {
        Vm::connect(&self.path())
    }

    fn was_logged(&self, parts: &[&str]) {
        until(&format!("{parts:?} is logged for {}", self.name), || {
            logged(&self.name, parts)
        });
    }

    /// Waits until the server has dealt with the end of `n` connections.
    fn disconnects(&self, n: usize) {
        until("the front-end is gone", || {
            self.world.count("disconnected") == n
        });
    }
}

/// Shared memory of a virtual machine: a memory file per region.
fn shared_memory(regions: &[(u64, u64)]) -> Arc<GuestMem> {
    let with_files = regions.iter().map(|&(start, size)| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        (
            GuestAddress(start),
            size as usize,
            Some(FileOffset::new(file, 0)),
        )
    });
    Arc::new(GuestMem::from_ranges_with_files(with_files).unwrap())
}

fn regions(mem: &GuestMem) -> Vec<VhostUserMemoryRegionInfo> {
    mem.iter()
        .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
        .collect()
}

const CONFIG: VhostUserConfigFlags = VhostUserConfigFlags::empty();

/// A virtual machine with one queue in use: front-end and driver.
struct Vm {
    frontend: Frontend,
    driver: Driver,
    acked: u64,
    /// Where the next request's buffers go.
    scratch: u64,
}

impl Vm {
    fn connect(path: &Path) -> Vm {
        let mem = shared_memory(&[(0, 4 * MIB)]);
        Vm::with_memory(path, mem, 0)
    }

    fn with_memory(path: &Path, mem: Arc<GuestMem>, ring: u64) -> Vm {
        let frontend = Frontend::connect(path, 8).unwrap();
        Vm {
            frontend,
            driver: Driver::new(mem, ring, 128),
            acked: 0,
            scratch: MIB,
        }
    }

    /// Feature negotiation, as QEMU does when it connects.
    fn negotiate(&mut self) -> u64 {
        let features = self.frontend.get_features().unwrap();
        let protocol = self.frontend.get_protocol_features().unwrap();
        self.frontend
            .set_protocol_features(
                protocol
                    & (VhostUserProtocolFeatures::MQ
                        | VhostUserProtocolFeatures::CONFIG
                        | VhostUserProtocolFeatures::REPLY_ACK
                        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                        | VhostUserProtocolFeatures::RESET_DEVICE),
            )
            .unwrap();
        assert_eq!(self.frontend.get_queue_num().unwrap(), 2);
        assert!(self.frontend.get_max_mem_slots().unwrap() >= 32);
        self.frontend.set_owner().unwrap();
        features
    }

    fn host_addr(&self, guest: u64) -> u64 {
        self.driver
            .mem
            .get_host_address(GuestAddress(guest))
            .unwrap() as u64
    }

    fn vring(&self) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.driver.size,
            queue_size: self.driver.size,
            flags: 0,
            desc_table_addr: self.host_addr(self.driver.desc),
            used_ring_addr: self.host_addr(self.driver.used),
            avail_ring_addr: self.host_addr(self.driver.avail),
            log_addr: None,
        }
    }

    /// What QEMU sends when the guest's driver says DRIVER_OK: features twice, memory, the ring, kick, call, enable.
    fn start_like_qemu(&mut self, features: u64, base: u16) {
        self.acked = features;
        self.frontend.set_features(features).unwrap();
        self.frontend.set_features(features).unwrap();
        self.frontend
            .set_mem_table(&regions(&self.driver.mem))
            .unwrap();
        self.frontend.set_vring_num(0, self.driver.size).unwrap();
        self.frontend.set_vring_base(0, base).unwrap();
        self.frontend.set_vring_addr(0, &self.vring()).unwrap();
        self.frontend.set_vring_kick(0, &self.driver.kick).unwrap();
        self.frontend.set_vring_call(0, &self.driver.call).unwrap();
        if features & F_PROTOCOL != 0 {
            self.frontend.set_vring_enable(0, true).unwrap();
        }
    }

    /// Waits until all messages sent so far are answered.
    fn settle(&mut self) {
        self.frontend.get_features().unwrap();
    }

    /// Puts one request into the ring and kicks. Returns where its data and status are.
    fn submit(&mut self, kind: u32, sector: u64, data: &[u8]) -> (u64, u64) {
        let (at, status) = (self.scratch + 0x10, self.scratch + 0x10 + data.len() as u64);
        self.driver.write(self.scratch, &header(kind, sector));
        self.driver.write(at, data);
        self.driver.write(status, &[0xff]);
        let direction = if kind == T_OUT { 0 } else { WRITE };
        let mut chain = vec![desc(self.scratch, 16, 0, 0)];
        if !data.is_empty() {
            chain.push(desc(at, data.len() as u32, direction, 0));
        }
        chain.push(desc(status, 1, WRITE, 0));
        self.driver.offer_chain(0, &chain);
        self.driver.kick.write(1).unwrap();
        (at, status)
    }

    /// One request from start to end: status and data.
    fn io(&mut self, kind: u32, sector: u64, data: &[u8]) -> (u8, Vec<u8>) {
        let (at, status) = self.submit(kind, sector, data);
        let mut completions = Vec::new();
        until("the request completes", || {
            completions.extend(self.driver.completions());
            !completions.is_empty()
        });
        assert_eq!(completions.len(), 1);
        assert_eq!(completions[0].0, 0);
        // With event indices: ask for the next one.
        self.driver.set_used_event(self.driver.used_idx());
        (
            self.driver.read(status, 1)[0],
            self.driver.read(at, data.len()),
        )
    }

    fn works(&mut self, seed: u8) {
        let data: Vec<u8> = (0..4096u32).map(|i| (i as u8) ^ seed).collect();
        assert_eq!(self.io(T_OUT, 8, &data).0, 0);
        assert_eq!(self.io(T_FLUSH, 0, &[]).0, 0);
        assert_eq!(self.io(T_IN, 8, &[0; 4096]), (0, data));
    }
}

#[test]
fn qemu_starts_works_stops_and_starts_again() {
    let served = Served::new("qemu");
    let mut vm = served.vm();
    let features = vm.negotiate();
    assert_eq!(features & LINUX, LINUX, "{features:#x}");
    // Discard and write-zeroes are not served yet, and a limit on segment size would only cost.
    assert_eq!(
        features & (1 << 13 | 1 << 14 | 1 << 1 | 1 << 5 | 1 << 26),
        0,
        "{features:#x}"
    );
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
    assert_eq!(vm.io(11, 0, &[0; 16]).0, 2, "discard");
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
    std::mem::swap(&mut vm.driver.kick, &mut { other.kick });
    vm.works(9);
    assert!(other.call.read().is_ok() && !vm.driver.was_called());
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
        assert!(bytes[36..].iter().all(|b| *b == 0));
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

/// A vhost-user header: request, version 1, size of the body.
fn message(request: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(request.to_ne_bytes());
    out.extend(1u32.to_ne_bytes());
    out.extend((body.len() as u32).to_ne_bytes());
    out.extend(body);
    out
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
    }
    drop((queues, client));
    served.disconnects(1);
}
