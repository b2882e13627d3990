//! A served volume and a virtual machine that uses it, for the tests of sessions.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once};
use std::time::Duration;

use lockstep::guest::{BlockSize, DeviceConfig, GuestMem, Server};
use tempfile::TempDir;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend};

use super::engine::{Engine, World};
use super::*;

pub const DISK: usize = 1 << 20;
pub const F_PROTOCOL: u64 = 1 << 30;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_VERSION_1: u64 = 1 << 32;
/// What Linux takes, and what SeaBIOS takes.
pub const LINUX: u64 = F_VERSION_1
    | F_PROTOCOL
    | F_FLUSH
    | F_CONFIG_WCE
    | F_INDIRECT
    | F_EVENT_IDX
    | 1 << 2
    | 1 << 6
    | 1 << 10
    | 1 << 12;
pub const SEABIOS: u64 = F_VERSION_1 | F_PROTOCOL | 1 << 6;

/// How long something that must happen may take before the test gives up. Not a claim about speed.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
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

pub fn logged(volume: &str, parts: &[&str]) -> bool {
    let log = LOG.0.lock().unwrap();
    log.iter()
        .any(|line| line.contains(volume) && parts.iter().all(|part| line.contains(part)))
}

/// A served volume.
pub struct Served {
    pub name: String,
    pub dir: TempDir,
    pub world: Arc<World>,
    pub server: Server,
}

pub fn config(name: &str) -> DeviceConfig {
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
    pub fn new(name: &str) -> Served {
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

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("vhost/v.sock")
    }

    pub fn vm(&self) -> Vm {
        Vm::connect(&self.path())
    }

    pub fn was_logged(&self, parts: &[&str]) {
        until(&format!("{parts:?} is logged for {}", self.name), || {
            logged(&self.name, parts)
        });
    }

    /// Waits until the server has dealt with the end of `n` connections.
    pub fn disconnects(&self, n: usize) {
        until("the front-end is gone", || {
            self.world.count("disconnected") == n
        });
    }
}

/// Shared memory of a virtual machine: a memory file per region.
pub fn shared_memory(regions: &[(u64, u64)]) -> Arc<GuestMem> {
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

pub fn regions(mem: &GuestMem) -> Vec<VhostUserMemoryRegionInfo> {
    mem.iter()
        .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
        .collect()
}

pub const CONFIG: VhostUserConfigFlags = VhostUserConfigFlags::empty();

/// A virtual machine with one queue in use: front-end and driver.
pub struct Vm {
    pub frontend: Frontend,
    pub driver: Driver,
    pub acked: u64,
    /// Where the next request's buffers go.
    pub scratch: u64,
}

impl Vm {
    pub fn connect(path: &Path) -> Vm {
        let mem = shared_memory(&[(0, 4 * MIB)]);
        Vm::with_memory(path, mem, 0)
    }

    pub fn with_memory(path: &Path, mem: Arc<GuestMem>, ring: u64) -> Vm {
        let frontend = Frontend::connect(path, 8).unwrap();
        Vm {
            frontend,
            driver: Driver::new(mem, ring, 128),
            acked: 0,
            scratch: MIB,
        }
    }

    /// Feature negotiation, as QEMU does when it connects, by a front-end that does not track what is in flight.
    pub fn negotiate(&mut self) -> u64 {
        self.negotiate_with(VhostUserProtocolFeatures::empty())
    }

    /// The same with one more protocol feature.
    pub fn negotiate_with(&mut self, more: VhostUserProtocolFeatures) -> u64 {
        let features = self.frontend.get_features().unwrap();
        let protocol = self.frontend.get_protocol_features().unwrap();
        self.frontend
            .set_protocol_features(
                protocol
                    & (VhostUserProtocolFeatures::MQ
                        | VhostUserProtocolFeatures::CONFIG
                        | VhostUserProtocolFeatures::REPLY_ACK
                        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                        | VhostUserProtocolFeatures::RESET_DEVICE
                        | more),
            )
            .unwrap();
        assert_eq!(self.frontend.get_queue_num().unwrap(), 2);
        assert!(self.frontend.get_max_mem_slots().unwrap() >= 32);
        self.frontend.set_owner().unwrap();
        features
    }

    pub fn host_addr(&self, guest: u64) -> u64 {
        self.driver
            .mem
            .get_host_address(GuestAddress(guest))
            .unwrap() as u64
    }

    pub fn vring(&self) -> VringConfigData {
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
    pub fn start_like_qemu(&mut self, features: u64, base: u16) {
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
    pub fn settle(&mut self) {
        self.frontend.get_features().unwrap();
    }

    /// Puts one request into the ring and kicks. Returns where its data and status are.
    pub fn submit(&mut self, kind: u32, sector: u64, data: &[u8]) -> (u64, u64) {
        let (at, status) = (self.scratch + 0x10, self.scratch + 0x10 + data.len() as u64);
        self.driver.write(self.scratch, &header(kind, sector));
        self.driver.write(at, data);
        self.driver.write(status, &[0xff]);
        let is_read = !matches!(kind, T_OUT | T_DISCARD | T_WRITE_ZEROES);
        let direction = if is_read { WRITE } else { 0 };
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
    pub fn io(&mut self, kind: u32, sector: u64, data: &[u8]) -> (u8, Vec<u8>) {
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

    pub fn works(&mut self, seed: u8) {
        let data: Vec<u8> = (0..4096u32).map(|i| (i as u8) ^ seed).collect();
        assert_eq!(self.io(T_OUT, 8, &data).0, 0);
        assert_eq!(self.io(T_FLUSH, 0, &[]).0, 0);
        assert_eq!(self.io(T_IN, 8, &[0; 4096]), (0, data));
    }
}

/// A vhost-user header: request, version 1, size of the body.
pub fn message(request: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(request.to_ne_bytes());
    out.extend(1u32.to_ne_bytes());
    out.extend((body.len() as u32).to_ne_bytes());
    out.extend(body);
    out
}
