//! A front-end that says anything, with any descriptors, and whose guest's memory holds anything.
//!
//! Input: a byte below 32 says that the rest is sent as it is. Otherwise actions: a byte from 240 on writes to guest memory
//! (offset u16, length u8, bytes); any other is a message: its request, flags, descriptors (count and kind), length, body. Of
//! a body with a length byte of 255 the length is the one that the request has by the specification.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lockstep::guest::{
    BlockSize, DataPlane, DeviceConfig, GuestMem, Kind, Limits, ParkedRing, Parsed, Ring, RingLog,
    RingStart, Serial, Server, Status,
};
use rustix::fs::{MemfdFlags, SealFlags};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::{Input, event};

const ACTIONS: usize = 64;
const MEMORY: u64 = 0x10000;
/// A session that does not end by then hangs.
const PATIENCE: Duration = Duration::from_secs(30);
const DISK: usize = 64 << 10;

/// Serves rings on the control thread itself, at each of its calls, so that nothing happens by chance.
#[derive(Default)]
struct Inline {
    rings: BTreeMap<u16, (Ring, bool)>,
    writeback: bool,
}

// SAFETY: the rings are made and used on the control thread only, which owns this.
unsafe impl Send for Inline {}

impl Inline {
    fn serve(&mut self) {
        let limits = Limits {
            capacity_sectors: DISK as u64 / 512,
            read_only: false,
            block_size: BlockSize::B512,
        };
        for (ring, _) in self.rings.values_mut().filter(|(_, enabled)| *enabled) {
            ring.drain_kick();
            ring.disable_kicks();
            for _ in 0..64 {
                match ring.next_request(&limits) {
                    Ok(Some(Parsed::Request(request))) => {
                        match request.kind() {
                            Kind::In => drop(request.write_data(&[0x77; DISK])),
                            Kind::Out => drop(request.read_data(&mut [0; DISK])),
                            Kind::GetId => request.write_id(&Serial::new("fuzz")),
                            _ => {}
                        }
                        ring.push_used(request.finish(Status::Ok));
                    }
                    Ok(Some(Parsed::Refused(refused))) => ring.push_used(refused.used),
                    Ok(None) | Err(_) => break,
                }
            }
            ring.publish_and_notify();
            let _ = ring.enable_kicks();
        }
    }

    fn ring(&mut self, index: u16) -> &mut Ring {
        // The session names only rings that it started.
        &mut self.rings.get_mut(&index).expect("a ring that runs").0
    }
}

impl DataPlane for Inline {
    fn start_ring(&mut self, start: RingStart) -> Result<(), String> {
        let (index, enabled) = (start.index, start.enabled);
        assert!(!self.rings.contains_key(&index), "started twice");
        let ring = Ring::new(start).map_err(|e| e.to_string())?;
        self.rings.insert(index, (ring, enabled));
        self.serve();
        Ok(())
    }

    fn set_kick(&mut self, index: u16, kick: OwnedFd) {
        drop(self.ring(index).set_kick(kick));
        self.serve();
    }

    fn set_call(&mut self, index: u16, call: Option<OwnedFd>) {
        self.ring(index).set_call(call);
        self.serve();
    }

    fn stop_ring(&mut self, index: u16) -> Result<u16, String> {
        let (ring, _) = self.rings.remove(&index).expect("a ring that runs");
        Ok(ring.next_avail())
    }

    fn set_enabled(&mut self, index: u16, enabled: bool) {
        self.rings.get_mut(&index).expect("a ring that runs").1 = enabled;
        self.serve();
    }

    fn set_memory(&mut self, mem: Arc<GuestMem>) {
        for (ring, _) in self.rings.values_mut() {
            let _ = ring.set_memory(Arc::clone(&mem));
        }
        self.serve();
    }

    fn set_log(&mut self, index: u16, log: Option<RingLog>) {
        self.ring(index).set_log(log);
        self.serve();
    }

    fn set_features(&mut self, _acked: u64, writeback: bool) {
        self.writeback = writeback;
    }

    fn park(&mut self, _: Duration) -> Result<Vec<ParkedRing>, String> {
        let park = |(ring, _): &(Ring, bool)| ring.park().map_err(|e| e.to_string());
        self.rings.values().map(park).collect()
    }

    fn unpark(&mut self) {
        self.serve();
    }

    fn disconnected(&mut self) {
        self.rings.clear();
    }
}

/// One for the process.
fn socket() -> &'static PathBuf {
    static SERVED: OnceLock<(PathBuf, tempfile::TempDir, Server)> = OnceLock::new();
    let (path, ..) = SERVED.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fuzz.sock");
        let config = DeviceConfig {
            volume: "fuzz/v".into(),
            size: DISK as u64,
            block_size: BlockSize::B512,
            num_queues: 2,
            seg_max: 126,
            read_only: false,
            writeback: true,
        };
        let server = Server::spawn(config, &path, Box::new(Inline::default())).unwrap();
        (path, dir, server)
    });
    path
}

/// What a front-end sends along.
struct Things {
    memory: File,
    log: File,
    ordinary: File,
    pipe: OwnedFd,
    events: [OwnedFd; 2],
}

impl Things {
    fn new() -> Things {
        let memfd = |len: u64| -> File {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file: File = rustix::fs::memfd_create("fuzz", flags).unwrap().into();
            file.set_len(len).unwrap();
            file
        };
        let log = memfd(0x4000);
        rustix::fs::fcntl_add_seals(&log, SealFlags::SHRINK).unwrap();
        let ordinary = tempfile::tempfile().unwrap();
        ordinary.set_len(0x3000).unwrap();
        let (pipe, _) = std::io::pipe().unwrap();
        Things {
            memory: memfd(MEMORY),
            log,
            ordinary,
            pipe: pipe.into(),
            events: [event(), event()],
        }
    }

    fn fd(&self, kind: u8) -> RawFd {
        match kind % 6 {
            0 => self.memory.as_raw_fd(),
            1 => self.log.as_raw_fd(),
            2 => self.events[0].as_raw_fd(),
            3 => self.events[1].as_raw_fd(),
            4 => self.pipe.as_raw_fd(),
            _ => self.ordinary.as_raw_fd(),
        }
    }
}

/// Bytes of a request's body, by the specification.
fn body_len(request: u8) -> usize {
    match request {
        2 | 12..=14 | 16 | 22 => 8,
        5 => 8 + 32,
        6 | 31 | 32 | 42 => 16,
        8 | 10 | 11 | 18 => 8,
        9 | 37 | 38 => 40,
        24 | 25 => 12 + 8,
        _ => 0,
    }
}

pub fn run(data: &[u8]) {
    let mut stream = UnixStream::connect(socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let things = Things::new();
    let mut input = Input::new(data);
    if input.u8() < 32 {
        let _ = stream.send_with_fds(&[input.bytes(usize::MAX)], &[]);
    } else {
        for _ in 0..ACTIONS {
            if input.is_empty() || !act(&mut stream, &things, &mut input) {
                break;
            }
        }
    }
    // Every session ends when its front-end goes, and the next front-end is served.
    let _ = stream.shutdown(Shutdown::Write);
    ends(&mut stream);
    let mut next = UnixStream::connect(socket()).unwrap();
    next.set_read_timeout(Some(PATIENCE)).unwrap();
    let asks = [1u32, 1, 0].map(u32::to_ne_bytes).concat();
    std::io::Write::write_all(&mut next, &asks).unwrap();
    next.read_exact(&mut [0; 20])
        .expect("the next front-end is answered");
}

/// One action; whether the session still listens.
fn act(stream: &mut UnixStream, things: &Things, input: &mut Input) -> bool {
    let request = input.u8();
    if request >= 240 {
        let (at, len) = (u64::from(input.u16()), usize::from(input.u8()));
        things
            .memory
            .write_all_at(input.bytes(len), at % (MEMORY - 256))
            .unwrap();
        return true;
    }
    let (flags, attached) = (input.u8(), input.u8());
    let said = input.u8();
    let len = if said == 255 {
        body_len(request % 48)
    } else {
        usize::from(said)
    };
    let mut body = input.bytes(len).to_vec();
    if said == 255 {
        body.resize(len, 0);
    }
    // Mostly version 1, sometimes with an answer asked for.
    let flags = if flags < 200 {
        1 | u32::from(flags & 1) << 3
    } else {
        u32::from(flags)
    };
    let header = [u32::from(request % 48), flags, body.len() as u32]
        .map(u32::to_ne_bytes)
        .concat();
    let fds: Vec<RawFd> = (0..attached & 3)
        .map(|n| things.fd((attached >> 2).wrapping_add(n)))
        .collect();
    let sent = stream.send_with_fds(&[header.as_slice(), body.as_slice()], &fds);
    // Answers are not looked at, but taken, so that nobody waits for room.
    stream.set_nonblocking(true).unwrap();
    let mut buffer = [0; 4096];
    let open = loop {
        match stream.read(&mut buffer) {
            Ok(0) => break false,
            Ok(_) => {}
            Err(e) => break e.kind() == ErrorKind::WouldBlock,
        }
    };
    stream.set_nonblocking(false).unwrap();
    sent.is_ok() && open
}

fn ends(stream: &mut UnixStream) {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return,
            Err(e) => panic!("the session does not end: {e}"),
        }
    }
}
