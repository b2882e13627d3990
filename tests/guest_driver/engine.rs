//! A small engine for the tests: one thread, one disk in memory, the real [`Ring`]. What the control side asked of it
//! is written down.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use lockstep::guest::{
    BlockSize, DataPlane, GuestMem, Kind, Limits, ParkedRing, Parsed, Request, Ring, RingLog,
    RingStart, Serial, Status,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The disk, and the list of what happened to the engine.
#[derive(Default)]
pub struct World {
    pub disk: Mutex<Vec<u8>>,
    /// Requests that begin at these sectors are taken and not answered.
    pub slow: Mutex<BTreeSet<u64>>,
    /// The sectors of all requests taken, also again.
    pub taken: Mutex<Vec<u64>>,
    pub events: Mutex<Vec<String>>,
}

impl World {
    pub fn new(size: usize) -> Arc<World> {
        Arc::new(World {
            disk: Mutex::new(vec![0; size]),
            ..World::default()
        })
    }

    pub fn events(&self) -> Vec<String> {
        self.events.lock().unwrap().clone()
    }

    pub fn count(&self, event: &str) -> usize {
        self.events().iter().filter(|e| *e == event).count()
    }

    fn note(&self, event: String) {
        self.events.lock().unwrap().push(event);
    }
}

enum Command {
    Start(RingStart),
    Kick(u16, OwnedFd),
    Call(u16, Option<OwnedFd>),
    Stop(u16),
    Enable(u16, bool),
    Memory(Arc<GuestMem>),
    Log(u16, Option<RingLog>),
    Park(Sender<Result<Vec<ParkedRing>, String>>),
    Unpark,
    Disconnected,
}

type Answer = Result<u16, String>;

pub struct Engine {
    world: Arc<World>,
    commands: Option<Sender<(Command, Sender<Answer>)>>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    pub fn new(world: &Arc<World>) -> Engine {
        let (commands, inbox) = channel();
        let wake = EventFd::new(EFD_NONBLOCK).unwrap();
        let worker_wake = wake.try_clone().unwrap();
        let worker_world = Arc::clone(world);
        let thread = std::thread::spawn(move || work(&worker_world, &inbox, &worker_wake));
        Engine {
            world: Arc::clone(world),
            commands: Some(commands),
            wake,
            thread: Some(thread),
        }
    }

    fn ask(&self, command: Command) -> Answer {
        let (sender, answer) = channel();
        let commands = self.commands.as_ref().expect("the engine runs");
        commands.send((command, sender)).unwrap();
        self.wake.write(1).unwrap();
        answer.recv().unwrap()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.commands = None;
        self.wake.write(1).unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl DataPlane for Engine {
    fn start_ring(&mut self, start: RingStart) -> Result<(), String> {
        self.world.note(format!(
            "start {} at {}{}",
            start.index,
            start.next_avail,
            if start.enabled { "" } else { ", paused" }
        ));
        self.ask(Command::Start(start)).map(|_| ())
    }

    fn set_kick(&mut self, index: u16, kick: OwnedFd) {
        self.world.note(format!("kick {index}"));
        self.ask(Command::Kick(index, kick)).unwrap();
    }

    fn set_call(&mut self, index: u16, call: Option<OwnedFd>) {
        self.world.note(format!("call {index} {}", call.is_some()));
        self.ask(Command::Call(index, call)).unwrap();
    }

    fn stop_ring(&mut self, index: u16) -> Result<u16, String> {
        let next = self.ask(Command::Stop(index))?;
        self.world.note(format!("stop {index} at {next}"));
        Ok(next)
    }

    fn set_enabled(&mut self, index: u16, enabled: bool) {
        self.world.note(format!("enable {index} {enabled}"));
        self.ask(Command::Enable(index, enabled)).unwrap();
    }

    fn set_memory(&mut self, mem: Arc<GuestMem>) {
        self.world.note("memory".into());
        self.ask(Command::Memory(mem)).unwrap();
    }

    fn set_log(&mut self, index: u16, log: Option<RingLog>) {
        let on = if log.is_some() { "on" } else { "off" };
        self.world.note(format!("log {index} {on}"));
        self.ask(Command::Log(index, log)).unwrap();
    }

    fn set_features(&mut self, acked: u64, writeback: bool) {
        self.world
            .note(format!("features {acked:#x} writeback {writeback}"));
    }

    fn park(&mut self, _: Duration) -> Result<Vec<ParkedRing>, String> {
        let (sender, parked) = channel();
        self.ask(Command::Park(sender))?;
        self.world.note("park".into());
        parked.recv().unwrap()
    }

    fn unpark(&mut self) {
        self.ask(Command::Unpark).unwrap();
        self.world.note("unpark".into());
    }

    fn disconnected(&mut self) {
        self.ask(Command::Disconnected).unwrap();
        self.world.note("disconnected".into());
    }
}

struct Running {
    ring: Ring,
    enabled: bool,
    parked: bool,
    waiting: Vec<Request>,
}

impl Running {
    /// Where kicks are waited for; those of a parked ring are somebody else's.
    fn kick(&self) -> Option<RawFd> {
        (!self.parked).then(|| self.ring.kick_fd().as_raw_fd())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.waiting.drain(..).for_each(Request::abandon);
    }
}

fn work(world: &World, inbox: &Receiver<(Command, Sender<Answer>)>, wake: &EventFd) {
    let mut rings: BTreeMap<u16, Running> = BTreeMap::new();
    loop {
        let mut fds: Vec<_> = std::iter::once(wake.as_raw_fd())
            .chain(rings.values().filter_map(Running::kick))
            .map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        // SAFETY: the array is valid for its length.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        let _ = wake.read();
        loop {
            match inbox.try_recv() {
                Ok((command, answer)) => {
                    let outcome = obey(&mut rings, command);
                    serve_all(world, &mut rings);
                    answer.send(outcome).unwrap();
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => break,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return,
            }
        }
        for running in rings.values().filter(|r| !r.parked) {
            running.ring.drain_kick();
        }
        serve_all(world, &mut rings);
    }
}

fn obey(rings: &mut BTreeMap<u16, Running>, command: Command) -> Answer {
    match command {
        Command::Start(start) => {
            let (index, enabled) = (start.index, start.enabled);
            let ring = Ring::new(start).map_err(|e| e.to_string())?;
            let waiting = Vec::new();
            rings.insert(
                index,
                Running {
                    ring,
                    enabled,
                    parked: false,
                    waiting,
                },
            );
        }
        Command::Kick(index, kick) => drop(rings.get_mut(&index).unwrap().ring.set_kick(kick)),
        Command::Call(index, call) => rings.get_mut(&index).unwrap().ring.set_call(call),
        Command::Stop(index) => return Ok(rings.remove(&index).unwrap().ring.stop()),
        Command::Enable(index, enabled) => rings.get_mut(&index).unwrap().enabled = enabled,
        Command::Memory(mem) => {
            for running in rings.values_mut() {
                running
                    .ring
                    .set_memory(Arc::clone(&mem))
                    .map_err(|e| e.to_string())?;
            }
        }
        Command::Log(index, log) => rings.get_mut(&index).unwrap().ring.set_log(log),
        Command::Park(sender) => {
            let lost = |r: &Running| !r.waiting.is_empty() && !r.ring.is_tracked();
            let answer = match rings.values().any(lost) {
                true => Err("requests do not end".into()),
                false => {
                    let park = |r: &mut Running| {
                        r.parked = true;
                        r.ring.park().map_err(|e| e.to_string())
                    };
                    rings.values_mut().map(park).collect()
                }
            };
            sender.send(answer).unwrap();
        }
        Command::Unpark => rings.values_mut().for_each(|r| r.parked = false),
        Command::Disconnected => rings.clear(),
    }
    Ok(0)
}

fn serve_all(world: &World, rings: &mut BTreeMap<u16, Running>) {
    for running in rings.values_mut().filter(|r| r.enabled && !r.parked) {
        let limits = Limits {
            capacity_sectors: world.disk.lock().unwrap().len() as u64 / 512,
            read_only: false,
            block_size: BlockSize::B512,
        };
        let ring = &mut running.ring;
        loop {
            ring.disable_kicks();
            loop {
                match ring.next_request(&limits) {
                    Ok(Some(Parsed::Request(request))) => {
                        world.taken.lock().unwrap().push(request.sector());
                        if world.slow.lock().unwrap().contains(&request.sector()) {
                            running.waiting.push(request);
                        } else {
                            ring.push_used(serve(world, request));
                        }
                    }
                    Ok(Some(Parsed::Refused(refused))) => {
                        world.note(format!("refused: {}", refused.reason));
                        ring.push_used(refused.used);
                    }
                    Ok(None) => break,
                    Err(e) => {
                        world.note(format!("broken: {e}"));
                        break;
                    }
                }
            }
            ring.publish_and_notify();
            if !ring.enable_kicks() {
                break;
            }
        }
    }
}

fn serve(world: &World, request: Request) -> lockstep::guest::Used {
    let mut disk = world.disk.lock().unwrap();
    let from = request.offset() as usize;
    let range = from..from + request.data_len() as usize;
    match request.kind() {
        Kind::In => drop(request.write_data(&disk[range])),
        Kind::Out => drop(request.read_data(&mut disk[range])),
        Kind::Flush => {}
        Kind::GetId => request.write_id(&Serial::new("0123456789abcdef")),
        Kind::Discard | Kind::WriteZeroes => {
            for segment in request.segments() {
                let at = segment.offset as usize;
                disk[at..at + segment.len as usize].fill(0);
            }
        }
    }
    request.finish(Status::Ok)
}
