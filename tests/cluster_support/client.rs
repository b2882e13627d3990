//! The virtual machine's side, by libblkio's virtio-blk-vhost-user client: a load of stamped writes and checked reads, and a
//! sweep that reads everything back.

use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use blkio::{Blkio, Blkioq, Completion, Errno, MemoryRegion, ReqFlags};

use super::oracle::{Look, Oracle, Random, SECTOR, Ticket, stranger};
use super::{PATIENCE, eventually};

pub const KIB: usize = 1 << 10;
pub const MIB: usize = 1 << 20;
/// The longest request: more than the engine carries in one part.
pub const LONGEST: usize = 2 * MIB;
/// How long one wait for completions lasts before the load looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// A connection with its queues and a buffer for each request that may be in flight.
pub struct Disk {
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    depth: usize,
    pub capacity: u64,
    _device: Blkio,
}

/// A request that ended.
pub struct Ended {
    pub lane: usize,
    /// 0, or a negative errno.
    pub ret: i32,
}

impl Disk {
    /// Connects and starts `queues` queues for `depth` requests in all.
    pub fn open(socket: &Path, queues: usize, depth: usize) -> Disk {
        Disk::try_open(socket, queues, depth)
            .unwrap_or_else(|e| panic!("{}: {}", socket.display(), e.message()))
    }

    pub fn try_open(socket: &Path, queues: usize, depth: usize) -> Result<Disk, blkio::Error> {
        let mut device = Blkio::new("virtio-blk-vhost-user")?;
        device.set_str("path", socket.to_str().expect("a readable path"))?;
        device.connect()?;
        device.set_i32("num-queues", queues as i32)?;
        device.set_i32("queue-size", 256)?;
        let capacity = device.get_u64("capacity")?;
        let outcome = device.start()?;
        let region = device.alloc_mem_region(depth * LONGEST)?;
        device.map_mem_region(&region)?;
        Ok(Disk {
            queues: outcome.queues,
            region,
            depth,
            capacity,
            _device: device,
        })
    }

    fn address(&self, lane: usize) -> *mut u8 {
        assert!(lane < self.depth);
        (self.region.addr + lane * LONGEST) as *mut u8
    }

    /// The buffer of a lane with no request in flight.
    pub fn buffer(&mut self, lane: usize, len: usize) -> &mut [u8] {
        assert!(len <= LONGEST);
        // SAFETY: the lane lies in the region, which lives as long as `self`; nothing is in flight on it, so the back-end does
        // not touch it, and `&mut self` keeps other borrows away.
        unsafe { std::slice::from_raw_parts_mut(self.address(lane), len) }
    }

    fn queue(&mut self, lane: usize) -> &mut Blkioq {
        let count = self.queues.len();
        &mut self.queues[lane % count]
    }

    pub fn write(&mut self, lane: usize, offset: u64, len: usize) {
        let buffer = self.address(lane);
        self.queue(lane)
            .write(offset, buffer, len, lane, ReqFlags::empty());
    }

    pub fn read(&mut self, lane: usize, offset: u64, len: usize) {
        let buffer = self.address(lane);
        self.queue(lane)
            .read(offset, buffer, len, lane, ReqFlags::empty());
    }

    pub fn flush(&mut self, lane: usize) {
        self.queue(lane).flush(lane, ReqFlags::empty());
    }

    pub fn discard(&mut self, lane: usize, offset: u64, len: u64) {
        self.queue(lane)
            .discard(offset, len, lane, ReqFlags::empty());
    }

    /// `unmap`: the space may be given back.
    pub fn write_zeroes(&mut self, lane: usize, offset: u64, len: u64, unmap: bool) {
        let flags = if unmap {
            ReqFlags::empty()
        } else {
            ReqFlags::NO_UNMAP
        };
        self.queue(lane).write_zeroes(offset, len, lane, flags);
    }

    /// Hands over what was asked and takes the completions there are, of all queues; waits a moment for the first.
    pub fn poll(&mut self) -> Vec<Ended> {
        let mut ended = Vec::new();
        let count = self.queues.len();
        for queue in &mut self.queues {
            take(queue, 0, LOOK, &mut ended);
        }
        for queue in &mut self.queues {
            if ended.is_empty() {
                take(queue, 1, LOOK / count as u32, &mut ended);
            }
        }
        ended
    }

    /// The result of the only request in flight.
    pub fn finish(&mut self) -> i32 {
        let ended = eventually("the request is answered", || {
            let ended = self.poll();
            (!ended.is_empty()).then_some(ended)
        });
        assert_eq!(ended.len(), 1);
        ended[0].ret
    }

    /// Writes all of a disk once.
    pub fn fill(&mut self, oracle: &mut Oracle) {
        for at in (0..oracle.bytes()).step_by(MIB) {
            let ticket = oracle.begin(at as usize / SECTOR, self.buffer(0, MIB));
            self.write(0, at, MIB);
            assert_eq!(self.finish(), 0);
            oracle.end(ticket, true);
        }
    }

    /// Reads all of a disk and has the oracle judge it.
    #[track_caller]
    pub fn sweep(&mut self, oracle: &mut Oracle) {
        let mut at = 0;
        while at < oracle.bytes() {
            let len = (oracle.bytes() - at).min(MIB as u64) as usize;
            self.read(0, at, len);
            assert_eq!(self.finish(), 0, "a read at {at} failed");
            let verdict = oracle.judge(at as usize / SECTOR, self.buffer(0, len));
            if let Err(why) = verdict {
                panic!("read back: {why}");
            }
            at += len as u64;
        }
    }
}

fn take(queue: &mut Blkioq, least: usize, timeout: Duration, ended: &mut Vec<Ended>) {
    let mut room = [const { MaybeUninit::<Completion>::uninit() }; 64];
    let mut left = (least > 0).then_some(timeout);
    match queue.do_io(&mut room, least, left.as_mut(), None) {
        Ok(count) => {
            for completion in &room[..count] {
                // SAFETY: do_io filled the first `count`.
                let completion = unsafe { completion.assume_init_ref() };
                ended.push(Ended {
                    lane: completion.user_data,
                    ret: completion.ret,
                });
            }
        }
        Err(e) if e.errno() == Errno::TIME => {}
        // Nothing is outstanding on this one of several queues, so there is nothing to wait for.
        Err(e) if least > 0 && e.errno() == Errno::INVAL => {}
        Err(e) => panic!("a queue failed: {}", e.message()),
    }
}

/// What a load does.
#[derive(Clone)]
pub struct Plan {
    pub queues: usize,
    pub depth: usize,
    /// Lengths of requests, drawn with equal chance.
    pub sizes: Vec<usize>,
    /// Of 100 requests, how many are reads, flushes, and discards or write-zeroes; the rest writes.
    pub reads: u64,
    pub flushes: u64,
    pub zeroes: u64,
    /// Of 100 reads, how many begin where a write is under way, or let one begin where they are.
    pub careless: u64,
    /// Only this part of the disk is written and read, from its beginning: 1 is all, 2 the first half.
    pub part: u64,
    pub seed: u64,
}

impl Plan {
    /// Writes of all sizes at depth 32, overlapping often, with some reads and flushes.
    pub fn mixed() -> Plan {
        Plan {
            queues: 1,
            depth: 32,
            sizes: vec![
                SECTOR,
                3 * SECTOR,
                4 * KIB,
                4 * KIB,
                13 * SECTOR,
                16 * KIB,
                64 * KIB,
                65 * KIB + SECTOR,
                MIB,
                MIB + SECTOR,
                LONGEST,
            ],
            reads: 20,
            flushes: 5,
            zeroes: 6,
            careless: 0,
            part: 1,
            seed: 7,
        }
    }

    /// Small requests, as a database makes them: many of them under way when something happens.
    pub fn small() -> Plan {
        Plan {
            depth: 16,
            sizes: vec![SECTOR, 4 * KIB, 4 * KIB, 16 * KIB],
            ..Plan::mixed()
        }
    }

    /// Up to 64 KiB, on two queues, with reads in the middle of writes.
    pub fn careless(seed: u64) -> Plan {
        Plan {
            queues: 2,
            depth: 16,
            sizes: vec![
                SECTOR,
                3 * SECTOR,
                4 * KIB,
                4 * KIB,
                13 * SECTOR,
                16 * KIB,
                64 * KIB,
            ],
            reads: 30,
            careless: 40,
            seed,
            ..Plan::mixed()
        }
    }
}

/// What came of a load.
pub struct Outcome {
    pub oracle: Oracle,
    /// Requests that succeeded.
    pub done: u64,
    /// Requests that failed.
    pub failed: u64,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    abandon: AtomicBool,
    haunt: AtomicBool,
    done: AtomicU64,
    failed: AtomicU64,
}

/// A load that runs beside the test.
pub struct Load {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Oracle>>,
    handed_over: Receiver<Oracle>,
}

impl Load {
    /// Starts it on a socket, with what is known of the disk, and waits until it runs.
    pub fn start(socket: &Path, plan: Plan, oracle: Oracle) -> Load {
        let load = Load::spawn(socket, plan, oracle, Duration::ZERO);
        load.goes_on();
        load
    }

    /// The same without waiting; nobody may serve the socket yet.
    pub fn begin(socket: &Path, plan: Plan, oracle: Oracle) -> Load {
        Load::spawn(socket, plan, oracle, PATIENCE)
    }

    fn spawn(socket: &Path, plan: Plan, oracle: Oracle, patience: Duration) -> Load {
        let shared = Arc::new(Shared::default());
        let (theirs, socket) = (Arc::clone(&shared), PathBuf::from(socket));
        let (hand_over, handed_over) = channel();
        let thread = std::thread::spawn(move || {
            // The upper half is for the ghost, which must be able to ask while nothing asked before is answered.
            match connect(&socket, &plan, 2 * plan.depth, patience, &theirs) {
                Some(disk) => work(disk, &plan, oracle, &theirs, &hand_over),
                None => oracle,
            }
        });
        Load {
            shared,
            thread: Some(thread),
            handed_over,
        }
    }

    pub fn done(&self) -> u64 {
        self.shared.done.load(SeqCst)
    }

    pub fn failed(&self) -> u64 {
        self.shared.failed.load(SeqCst)
    }

    /// Waits until many more requests succeeded than could have been under way.
    pub fn goes_on(&self) {
        let goal = self.done() + 150;
        eventually("the load goes on", || {
            self.still_runs();
            (self.done() >= goal).then_some(())
        });
    }

    /// It has not found anything wrong.
    #[track_caller]
    pub fn still_runs(&self) {
        let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        assert!(!ended, "the load ended by itself; it says above why");
    }

    /// The volume is served elsewhere now. Gives what is known of the disk; of what is under way here nobody knows how it
    /// ends. The load goes on as a ghost, on a disk that must not answer it.
    pub fn hand_over(self) -> (Oracle, Ghost) {
        self.shared.haunt.store(true, SeqCst);
        let oracle = eventually("the load hands over", || {
            self.still_runs();
            self.handed_over.try_recv().ok()
        });
        (oracle, Ghost(self))
    }

    /// Lets all requests end, reads everything back, and gives what came of it.
    pub fn finish(self) -> Outcome {
        self.end()
    }

    /// Gives up at once, as a virtual machine that is switched off: of what is under way nobody knows how it ends.
    pub fn abandon(self) -> Outcome {
        self.shared.abandon.store(true, SeqCst);
        self.end()
    }

    fn end(mut self) -> Outcome {
        let oracle = self.join();
        Outcome {
            oracle,
            done: self.done(),
            failed: self.failed(),
        }
    }
}

impl Load {
    fn join(&mut self) -> Oracle {
        self.shared.stop.store(true, SeqCst);
        match self.thread.take().expect("it ends once").join() {
            Ok(oracle) => oracle,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.abandon.store(true, SeqCst);
        self.shared.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A virtual machine whose volume was taken over: it asks on, and must never be told that anything succeeded.
pub struct Ghost(Load);

impl Ghost {
    /// It has not been told anything yet.
    #[track_caller]
    pub fn is_haunting(&self) {
        self.0.still_runs();
    }

    /// Gives up. Gives how many requests it made in vain.
    pub fn vanish(self) -> u64 {
        let mut load = self.0;
        load.shared.abandon.store(true, SeqCst);
        load.join();
        load.done()
    }
}

/// What a lane has under way.
enum Under {
    Nothing,
    Write(Ticket, usize, usize),
    Read(usize, usize),
    /// A read that writes may overlap.
    Glance(Look, usize),
    Flush,
}

impl Under {
    fn overlaps(&self, sector: usize, sectors: usize, with_writes: bool) -> bool {
        let (at, len) = match self {
            Under::Write(_, at, len) if with_writes => (*at, *len),
            Under::Read(at, len) => (*at, *len),
            _ => return false,
        };
        at < sector + sectors && sector < at + len
    }
}

/// `None`: told to give up.
fn connect(
    socket: &Path,
    plan: &Plan,
    lanes: usize,
    patience: Duration,
    shared: &Shared,
) -> Option<Disk> {
    let begin = Instant::now();
    loop {
        if shared.abandon.load(SeqCst) {
            return None;
        }
        match Disk::try_open(socket, plan.queues, lanes) {
            Ok(disk) => return Some(disk),
            Err(e) if begin.elapsed() > patience => {
                panic!("{}: {}", socket.display(), e.message())
            }
            Err(_) => std::thread::sleep(LOOK),
        }
    }
}

fn work(
    mut disk: Disk,
    plan: &Plan,
    mut oracle: Oracle,
    shared: &Shared,
    hand_over: &Sender<Oracle>,
) -> Oracle {
    assert_eq!(disk.capacity, oracle.bytes());
    let mut random = Random::new(plan.seed);
    let mut lanes: Vec<Under> = (0..plan.depth).map(|_| Under::Nothing).collect();
    let mut last = Instant::now();
    loop {
        let stopping = shared.stop.load(SeqCst);
        let in_flight = lanes
            .iter()
            .filter(|u| !matches!(u, Under::Nothing))
            .count();
        if stopping && (in_flight == 0 || shared.abandon.load(SeqCst)) {
            break;
        }
        let haunt = shared.haunt.load(SeqCst);
        if !stopping && !haunt {
            for lane in 0..plan.depth {
                if matches!(lanes[lane], Under::Nothing) {
                    lanes[lane] = submit(&mut disk, lane, plan, &lanes, &mut oracle, &mut random);
                }
            }
        }
        for ended in disk.poll() {
            last = Instant::now();
            let ok = ended.ret == 0;
            let under = std::mem::replace(&mut lanes[ended.lane], Under::Nothing);
            if let Err(why) = judge(&mut disk, &mut oracle, &ended, under) {
                panic!(
                    "read under load at {}: {why}",
                    super::clock(SystemTime::now())
                );
            }
            let counter = if ok { &shared.done } else { &shared.failed };
            counter.fetch_add(1, SeqCst);
        }
        if haunt {
            // What was answered before the takeover has been taken in by now.
            give_up(&mut oracle, &mut lanes);
            let bytes = oracle.bytes();
            hand_over.send(oracle).expect("somebody takes over");
            haunt_disk(&mut disk, plan, bytes, shared);
            return Oracle::new(0);
        }
        assert!(
            last.elapsed() < PATIENCE,
            "nothing was answered for too long"
        );
    }
    if shared.abandon.load(SeqCst) {
        give_up(&mut oracle, &mut lanes);
    } else {
        disk.sweep(&mut oracle);
    }
    oracle
}

fn judge(disk: &mut Disk, oracle: &mut Oracle, ended: &Ended, under: Under) -> Result<(), String> {
    let ok = ended.ret == 0;
    match under {
        Under::Write(ticket, ..) => oracle.end(ticket, ok),
        Under::Read(sector, sectors) if ok => {
            return oracle.judge(sector, disk.buffer(ended.lane, sectors * SECTOR));
        }
        Under::Glance(look, sectors) if ok => {
            return oracle.judge_look(&look, disk.buffer(ended.lane, sectors * SECTOR));
        }
        Under::Read(..) | Under::Glance(..) | Under::Flush => {}
        Under::Nothing => panic!("a request was answered twice"),
    }
    Ok(())
}

/// Whoever served the disk is gone, and with it what it had under way: done or not done, but not to be done later.
fn give_up(oracle: &mut Oracle, lanes: &mut [Under]) {
    for under in lanes {
        if let Under::Write(ticket, ..) = std::mem::replace(under, Under::Nothing) {
            oracle.end(ticket, false);
        }
    }
}

/// Asks a disk that is served elsewhere, with data that no oracle knows. An answer to what was asked before the takeover
/// may come late; one to what is asked here may not be a success (S7, S8).
fn haunt_disk(disk: &mut Disk, plan: &Plan, bytes: u64, shared: &Shared) {
    let mut random = Random::new(!plan.seed);
    let mut asked = vec![false; plan.depth];
    let len = 4 * KIB;
    while !shared.stop.load(SeqCst) {
        for (i, asked) in asked.iter_mut().enumerate().filter(|(_, asked)| !**asked) {
            *asked = true;
            let lane = plan.depth + i;
            let offset = random.below(bytes / len as u64) * len as u64;
            if random.below(2) == 0 {
                disk.read(lane, offset, len);
            } else {
                let sector = offset as usize / SECTOR;
                stranger(random.below(1 << 30), sector, disk.buffer(lane, len));
                disk.write(lane, offset, len);
            }
            shared.done.fetch_add(1, SeqCst);
        }
        for ended in disk.poll() {
            if let Some(i) = ended.lane.checked_sub(plan.depth) {
                assert!(
                    ended.ret != 0,
                    "a request that was made after the takeover succeeded where the volume was served before"
                );
                asked[i] = false;
            }
        }
        // One that fails what it is asked does so at once.
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One request, or none if its place is taken by another that must not be disturbed. Writes may overlap writes, since what
/// is then allowed is known; a read that is judged overlaps no write.
fn submit(
    disk: &mut Disk,
    lane: usize,
    plan: &Plan,
    lanes: &[Under],
    oracle: &mut Oracle,
    random: &mut Random,
) -> Under {
    let dice = random.below(100);
    if dice < plan.flushes {
        disk.flush(lane);
        return Under::Flush;
    }
    let is_read = dice < plan.flushes + plan.reads;
    let careless = is_read && random.below(100) < plan.careless;
    let len = plan.sizes[random.below(plan.sizes.len() as u64) as usize];
    let sectors = len / SECTOR;
    let all = (oracle.bytes() / plan.part) as usize / SECTOR;
    // Half of all requests share a small part of the disk, so that they meet.
    let span = if random.below(2) == 0 { all / 8 } else { all };
    let sector = random.below((span.max(sectors + 1) - sectors) as u64) as usize;
    let taken = |u: &Under| u.overlaps(sector, sectors, is_read);
    if !careless && lanes.iter().any(taken) {
        return Under::Nothing;
    }
    let offset = (sector * SECTOR) as u64;
    if careless {
        disk.read(lane, offset, len);
        Under::Glance(oracle.look(sector, sectors), sectors)
    } else if is_read {
        disk.read(lane, offset, len);
        Under::Read(sector, sectors)
    } else if dice < plan.flushes + plan.reads + plan.zeroes {
        match random.below(3) {
            0 => disk.discard(lane, offset, len as u64),
            kind => disk.write_zeroes(lane, offset, len as u64, kind == 1),
        }
        Under::Write(oracle.begin_zeros(sector, sectors), sector, sectors)
    } else {
        let ticket = oracle.begin(sector, disk.buffer(lane, len));
        disk.write(lane, offset, len);
        Under::Write(ticket, sector, sectors)
    }
}
