//! One vhost-user-blk client for every back-end: what `scripts/bench` measures lockstep and its peers with.
//!
//! ```text
//! cargo bench --bench blk -- --socket PATH --workload randwrite --bs 4096 --depth 32 --seconds 5 --pid 4711,4712 --json
//! cargo bench --bench blk -- --socket PATH --verify --depth 32 --size 67108864
//! ```
//!
//! What keeps the comparison fair:
//!
//! * The client is libblkio's virtio-blk-vhost-user driver, written by others than any back-end measured here.
//! * All buffers lie in one memory region, as a guest's RAM does: a region for each buffer would measure the back-end's
//!   region search instead.
//! * Written data is half compressible, and every 4 KiB of every write differs from every other, so that neither
//!   compression nor zero detection meets data that no guest writes.
//! * The client never spins unless asked to (`--spin-us`). It takes all completions there are, with notifications off;
//!   only when there is none it turns notifications on, looks once more, and blocks on the eventfd. On a machine whose
//!   processors it shares with the back-end, a spinning client would take the time it measures. With `--spin-us N` it
//!   looks for up to N µs before it blocks, and skips that for the next [`SPIN_BACKOFF`] waits whenever it was in vain.
//! * Processor time of the back-end comes from `/proc/PID/stat`, all threads, in the kernel's ticks of 10 ms: a run must
//!   last seconds for the figure to mean something.

use std::fmt;
use std::mem::MaybeUninit;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, Errno, MemoryRegion, ReqFlags};
use clap::{Parser, ValueEnum};

/// Requests in flight at most: with three descriptors each they fill a ring of 1024, which every back-end accepts.
const MAX_DEPTH: usize = 256;
/// A back-end that completes nothing for this long is taken for dead: vhost-user tells a client nothing when it hangs up.
const STALL: Duration = Duration::from_secs(60);
/// How many waits go without spinning after one spin in vain.
const SPIN_BACKOFF: u32 = 16;
/// The unit in which written data is made unique.
const STAMP_UNIT: usize = 4096;

#[derive(Parser)]
#[command(
    name = "blk",
    about = "Drives a vhost-user-blk socket and reports rate, latency and the back-end's processor time"
)]
struct Args {
    /// The back-end's vhost-user socket
    #[arg(long)]
    socket: Option<String>,
    #[arg(long, value_enum, default_value = "randread")]
    workload: Workload,
    /// Bytes per request, a multiple of 512
    #[arg(long, default_value_t = 4096)]
    bs: usize,
    /// Requests kept in flight
    #[arg(long, default_value_t = 1)]
    depth: usize,
    /// How long to measure
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// How long to run before measuring
    #[arg(long, default_value_t = 0.5)]
    warmup: f64,
    /// Bytes of the disk to use, from its start [default: all of it]
    #[arg(long)]
    size: Option<u64>,
    /// The back-end's processes, whose processor time is reported
    #[arg(long, value_delimiter = ',')]
    pid: Vec<u32>,
    /// Look for completions for up to this long before blocking
    #[arg(long, default_value_t = 0)]
    spin_us: u64,
    /// Write every block once before measuring, so that reads find data (not counted)
    #[arg(long)]
    fill: bool,
    /// Seed of the sequence of offsets and of the data
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Do not measure: write stamped blocks, overwrite a part in random order, flush, read all back and compare
    #[arg(long)]
    verify: bool,
    /// With --verify: only read back what an earlier --verify with the same --seed, --bs and --size left
    #[arg(long, requires = "verify")]
    read_only: bool,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    /// Given by `cargo bench`; means nothing here
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// Reads at random offsets
    Randread,
    /// Writes at random offsets
    Randwrite,
    /// A write at a random offset, then a flush, counted as one request
    WriteFlush,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Workload::Randread => "randread",
            Workload::Randwrite => "randwrite",
            Workload::WriteFlush => "write-flush",
        })
    }
}

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let args = Args::parse();
    if args.socket.is_none() {
        // `cargo bench` and `cargo test --all-targets` run every bench without arguments.
        println!(
            "blk: nothing to measure without --socket PATH; `scripts/bench` sets up back-ends and compares them"
        );
        return ExitCode::SUCCESS;
    }
    let outcome = if args.verify {
        verify(&args)
    } else {
        measure(&args)
    };
    match outcome {
        Ok(clean) if clean => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("blk: {error}");
            ExitCode::FAILURE
        }
    }
}

// --- the disk ---------------------------------------------------------------------------------------------------------

/// One queue of one back-end, with a buffer of `bs` bytes for each request in flight.
struct Disk {
    queue: Blkioq,
    region: MemoryRegion,
    bs: usize,
    depth: usize,
    /// Blocks of `bs` bytes in use.
    blocks: u64,
    completions: Vec<MaybeUninit<Completion>>,
    spin: Duration,
    /// Waits still to go without spinning.
    spin_rest: u32,
    /// Keeps the connection; dropped after the queue.
    _device: Blkio,
}

/// A request that ended: which buffer's, and the error if it failed (a negative errno).
struct Done {
    lane: usize,
    ret: i32,
}

impl Disk {
    fn open(args: &Args) -> Result<Disk> {
        let path = args.socket.as_deref().unwrap_or_default();
        if args.depth == 0 || args.depth > MAX_DEPTH {
            return Err(format!("--depth {}: must be 1 to {MAX_DEPTH}", args.depth));
        }
        if args.bs == 0 || !args.bs.is_multiple_of(512) {
            return Err(format!("--bs {}: must be a multiple of 512", args.bs));
        }
        let fault = |what: &str, error: blkio::Error| format!("{what} {path}: {}", error.message());
        let mut device = Blkio::new("virtio-blk-vhost-user")
            .map_err(|e| fault("cannot make a client for", e))?;
        device
            .set_str("path", path)
            .map_err(|e| fault("cannot use", e))?;
        device
            .connect()
            .map_err(|e| fault("cannot connect to", e))?;
        let ring = (args.depth * 4).next_power_of_two().max(256) as i32;
        device
            .set_i32("queue-size", ring)
            .map_err(|e| fault("cannot set the queue size of", e))?;
        device
            .set_i32("num-queues", 1)
            .map_err(|e| fault("cannot set the number of queues of", e))?;
        let capacity = device
            .get_u64("capacity")
            .map_err(|e| fault("cannot read the capacity of", e))?;
        let size = args.size.unwrap_or(capacity);
        if size > capacity {
            return Err(format!("--size {size}: the disk has {capacity} bytes"));
        }
        let blocks = size / args.bs as u64;
        if blocks == 0 {
            return Err(format!(
                "the {size} bytes in use hold no block of {} bytes",
                args.bs
            ));
        }
        let outcome = device.start().map_err(|e| fault("cannot start", e))?;
        let queue = outcome
            .queues
            .into_iter()
            .next()
            .ok_or("the client made no queue")?;
        let align = device
            .get_u64("mem-region-alignment")
            .map_err(|e| fault("cannot read from", e))? as usize;
        let length = (args.depth * args.bs).next_multiple_of(align.max(STAMP_UNIT));
        let region = device
            .alloc_mem_region(length)
            .map_err(|e| fault("cannot allocate buffers for", e))?;
        device
            .map_mem_region(&region)
            .map_err(|e| fault("cannot share buffers with", e))?;
        Ok(Disk {
            queue,
            region,
            bs: args.bs,
            depth: args.depth,
            blocks,
            completions: (0..args.depth).map(|_| MaybeUninit::uninit()).collect(),
            spin: Duration::from_micros(args.spin_us),
            spin_rest: 0,
            _device: device,
        })
    }

    fn address(&self, lane: usize) -> *mut u8 {
        assert!(lane < self.depth);
        (self.region.addr + lane * self.bs) as *mut u8
    }

    /// The buffer of a lane with no request in flight.
    fn buffer(&mut self, lane: usize) -> &mut [u8] {
        // SAFETY: the lane lies inside the region, which lives as long as `self`; the caller has no request in flight on
        // this lane, so the back-end does not touch it, and `&mut self` keeps any other borrow away.
        unsafe { std::slice::from_raw_parts_mut(self.address(lane), self.bs) }
    }

    fn read(&mut self, lane: usize, block: u64) {
        let (buffer, length) = (self.address(lane), self.bs);
        self.queue.read(
            block * length as u64,
            buffer,
            length,
            lane,
            ReqFlags::empty(),
        );
    }

    fn write(&mut self, lane: usize, block: u64) {
        let (buffer, length) = (self.address(lane), self.bs);
        self.queue.write(
            block * length as u64,
            buffer,
            length,
            lane,
            ReqFlags::empty(),
        );
    }

    fn flush(&mut self, lane: usize) {
        self.queue.flush(lane, ReqFlags::empty());
    }

    /// Hands new requests to the back-end and takes at least one completion; there must be a request in flight.
    fn wait(&mut self, done: &mut Vec<Done>) -> Result<()> {
        let mut count = self.reap(0, None)?;
        if count == 0 && self.spin > Duration::ZERO {
            if self.spin_rest > 0 {
                self.spin_rest -= 1;
            } else {
                let begin = Instant::now();
                while count == 0 && begin.elapsed() < self.spin {
                    std::hint::spin_loop();
                    count = self.reap(0, None)?;
                }
                if count == 0 {
                    self.spin_rest = SPIN_BACKOFF;
                }
            }
        }
        if count == 0 {
            count = self.reap(1, Some(STALL))?;
        }
        done.clear();
        for completion in &self.completions[..count] {
            // SAFETY: do_io filled the first `count` elements.
            let completion = unsafe { completion.assume_init_ref() };
            done.push(Done {
                lane: completion.user_data,
                ret: completion.ret,
            });
        }
        Ok(())
    }

    fn reap(&mut self, least: usize, timeout: Option<Duration>) -> Result<usize> {
        let mut timeout = timeout;
        match self
            .queue
            .do_io(&mut self.completions, least, timeout.as_mut(), None)
        {
            Ok(count) => Ok(count),
            Err(error) if error.errno() == Errno::TIME => Err(format!(
                "the back-end completed nothing for {} s; is it still there?",
                STALL.as_secs()
            )),
            Err(error) => Err(format!("the queue failed: {}", error.message())),
        }
    }
}

/// xorshift64*: the sequence of offsets and the incompressible half of the data. A seed gives the same run anywhere.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}

/// Half random, half text, in every 4 KiB: lz4 makes about half of it.
fn half_compressible(buffer: &mut [u8], random: &mut Random) {
    for unit in buffer.chunks_mut(STAMP_UNIT) {
        let half = unit.len() / 2;
        for word in unit[..half].chunks_mut(8) {
            word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]);
        }
        for (byte, text) in unit[half..]
            .iter_mut()
            .zip(b"half of what guests write compresses; ".iter().cycle())
        {
            *byte = *text;
        }
    }
}

/// Puts a number no other write has at the start of every 4 KiB.
fn stamp(buffer: &mut [u8], number: u64) {
    for (index, unit) in buffer.chunks_mut(STAMP_UNIT).enumerate() {
        unit[..8].copy_from_slice(&number.to_le_bytes());
        unit[8..16].copy_from_slice(&(index as u64).to_le_bytes());
    }
}

// --- measuring --------------------------------------------------------------------------------------------------------

/// Latencies in nanoseconds, in buckets no wider than 1/64 of their value: memory does not grow with the run.
struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: u64,
}

impl Histogram {
    const SUB: u32 = 6;

    fn new() -> Histogram {
        Histogram {
            counts: vec![0; (64 - Self::SUB as usize + 1) << Self::SUB],
            total: 0,
            max: 0,
        }
    }

    fn bucket(value: u64) -> usize {
        // The first two powers of SUB are exact; above, the SUB bits after the leading one choose.
        let shift = (63 - (value | 1).leading_zeros()).saturating_sub(Self::SUB);
        ((shift as usize) << Self::SUB) + (value >> shift) as usize
    }

    fn record(&mut self, value: u64) {
        self.counts[Self::bucket(value)] += 1;
        self.total += 1;
        self.max = self.max.max(value);
    }

    /// The upper end of the bucket that holds the given share of all values.
    fn quantile(&self, share: f64) -> u64 {
        let rank = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                let shift = (bucket >> Self::SUB).saturating_sub(1);
                let low = ((bucket - (shift << Self::SUB)) as u64) << shift;
                return (low + (1 << shift) - 1).min(self.max);
            }
        }
        self.max
    }
}

/// What a lane waits for.
#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Idle,
    Transfer,
    Flush,
}

/// The engine of a run: keeps `depth` requests of a workload in flight until told to stop.
struct Load {
    workload: Workload,
    random: Random,
    phase: Vec<Phase>,
    begun: Vec<Instant>,
    in_flight: usize,
    sequence: u64,
}

impl Load {
    fn new(disk: &mut Disk, workload: Workload, seed: u64) -> Load {
        let mut random = Random::new(seed);
        for lane in 0..disk.depth {
            half_compressible(disk.buffer(lane), &mut random);
        }
        let now = Instant::now();
        Load {
            workload,
            random,
            phase: vec![Phase::Idle; disk.depth],
            begun: vec![now; disk.depth],
            in_flight: 0,
            sequence: 0,
        }
    }

    fn submit(&mut self, disk: &mut Disk, lane: usize, now: Instant) {
        let block = self.random.below(disk.blocks);
        self.begun[lane] = now;
        self.phase[lane] = Phase::Transfer;
        self.in_flight += 1;
        if self.workload == Workload::Randread {
            disk.read(lane, block);
        } else {
            self.sequence += 1;
            stamp(disk.buffer(lane), self.sequence);
            disk.write(lane, block);
        }
    }

    /// Runs until `until`, then lets what is in flight end. `ended` gets each request's latency, whether it failed, and
    /// whether it ended before `until`: only then it counts for the rate, but a stall at the end is a stall all the same.
    fn run(
        &mut self,
        disk: &mut Disk,
        until: Instant,
        mut ended: impl FnMut(u64, bool, bool),
    ) -> Result<()> {
        let mut done = Vec::with_capacity(disk.depth);
        let begin = Instant::now();
        for lane in 0..disk.depth {
            self.submit(disk, lane, begin);
        }
        while self.in_flight > 0 {
            disk.wait(&mut done)?;
            let now = Instant::now();
            for Done { lane, ret } in done.drain(..) {
                if self.workload == Workload::WriteFlush
                    && self.phase[lane] == Phase::Transfer
                    && ret == 0
                {
                    self.phase[lane] = Phase::Flush;
                    disk.flush(lane);
                    continue;
                }
                self.phase[lane] = Phase::Idle;
                self.in_flight -= 1;
                let nanoseconds = (now - self.begun[lane]).as_nanos() as u64;
                ended(nanoseconds, ret != 0, now < until);
                if now < until {
                    self.submit(disk, lane, now);
                }
            }
        }
        Ok(())
    }
}

/// Processor time of the processes so far, in seconds.
fn processor_seconds(pids: &[u32]) -> Result<f64> {
    // SAFETY: sysconf has no preconditions.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64;
    let mut sum = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let stat = std::fs::read_to_string(&path)
            .map_err(|e| format!("cannot read {path} (--pid {pid}): {e}"))?;
        // The name, in parentheses, may hold anything; fields count from the last one that closes. utime and stime are
        // fields 14 and 15 of proc(5), the 12th and 13th after it.
        let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<u64> = after
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|f| f.parse().ok())
            .collect();
        if fields.len() != 2 {
            return Err(format!("{path} is not as proc(5) describes it"));
        }
        sum += fields[0] + fields[1];
    }
    Ok(sum as f64 / ticks)
}

fn measure(args: &Args) -> Result<bool> {
    let mut disk = Disk::open(args)?;
    if args.fill {
        write_each_block(&mut disk, args.seed)?;
    }
    let mut load = Load::new(&mut disk, args.workload, args.seed);
    if args.warmup > 0.0 {
        load.run(
            &mut disk,
            Instant::now() + Duration::from_secs_f64(args.warmup),
            |_, _, _| (),
        )?;
    }
    let mut latencies = Histogram::new();
    let (mut counted, mut errors) = (0u64, 0u64);
    let before = processor_seconds(&args.pid)?;
    let begin = Instant::now();
    let until = begin + Duration::from_secs_f64(args.seconds);
    load.run(&mut disk, until, |nanoseconds, failed, in_time| {
        counted += u64::from(in_time);
        latencies.record(nanoseconds);
        errors += u64::from(failed);
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    let processor = processor_seconds(&args.pid)? - before;

    let iops = counted as f64 / args.seconds;
    let micros = |nanoseconds: u64| nanoseconds as f64 / 1000.0;
    let per_request = if args.pid.is_empty() || latencies.total == 0 {
        None
    } else {
        Some(round(processor * 1e6 / latencies.total as f64))
    };
    if args.json {
        println!(
            "{}",
            serde_json::json!({
                "workload": args.workload.to_string(),
                "bs": args.bs,
                "depth": args.depth,
                "iops": round(iops),
                "p50_us": round(micros(latencies.quantile(0.50))),
                "p99_us": round(micros(latencies.quantile(0.99))),
                "max_us": round(micros(latencies.max)),
                "backend_cpu_us_per_request": per_request,
                "errors": errors,
                "seconds": round(seconds),
            })
        );
    } else {
        println!(
            "{} bs {} depth {}: {:.0} IOPS, p50 {:.0} µs, p99 {:.0} µs, max {:.0} µs, back-end {} µs of processor per request, {} errors",
            args.workload,
            args.bs,
            args.depth,
            iops,
            micros(latencies.quantile(0.50)),
            micros(latencies.quantile(0.99)),
            micros(latencies.max),
            per_request.map_or("?".to_string(), |us| format!("{us:.1}")),
            errors
        );
    }
    Ok(errors == 0)
}

fn round(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

// --- verifying --------------------------------------------------------------------------------------------------------

/// The content of a block in a generation, from the seed alone.
fn content(buffer: &mut [u8], seed: u64, block: u64, generation: u32) {
    let number = (block << 8) | u64::from(generation);
    half_compressible(buffer, &mut Random::new(seed ^ number.rotate_left(32)));
    stamp(buffer, number);
}

/// The generation a block ends in: a third of them is overwritten once, another third three times.
fn last_generation(seed: u64, block: u64) -> u32 {
    [0, 1, 3]
        [(Random::new(seed ^ block.wrapping_mul(0x5851_f42d_4c95_7f2d)).next() >> 33) as usize % 3]
}

/// Every block once, in an order that is not the disk's: a step that shares no factor with the number of blocks.
fn shuffled(blocks: u64) -> impl Iterator<Item = u64> {
    let gcd = |mut a: u64, mut b: u64| {
        while b != 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    let mut step = (blocks as f64 * 0.618) as u64 | 1;
    while gcd(step, blocks) != 1 {
        step += 2;
    }
    (0..blocks).map(move |index| (u128::from(index) * u128::from(step) % u128::from(blocks)) as u64)
}

/// Runs `requests` (block, generation) with all lanes busy. Two for one block must be far enough apart that they are never
/// in flight together; here each generation is one call. `begin` submits, `end` looks at what came.
fn each(
    disk: &mut Disk,
    requests: impl Iterator<Item = (u64, u32)>,
    mut begin: impl FnMut(&mut Disk, usize, u64, u32),
    mut end: impl FnMut(&mut Disk, usize, u64, u32),
) -> Result<u64> {
    let mut requests = requests;
    let mut lanes: Vec<Option<(u64, u32)>> = vec![None; disk.depth];
    let mut done = Vec::with_capacity(disk.depth);
    let mut count = 0;
    loop {
        for (lane, slot) in lanes.iter_mut().enumerate() {
            if slot.is_none()
                && let Some((block, generation)) = requests.next()
            {
                begin(disk, lane, block, generation);
                *slot = Some((block, generation));
            }
        }
        if lanes.iter().all(Option::is_none) {
            return Ok(count);
        }
        disk.wait(&mut done)?;
        for Done { lane, ret } in done.drain(..) {
            let (block, generation) = lanes[lane]
                .take()
                .ok_or("the back-end completed a request twice")?;
            if ret != 0 {
                let error = std::io::Error::from_raw_os_error(-ret);
                return Err(format!("block {block} (generation {generation}): {error}"));
            }
            end(disk, lane, block, generation);
            count += 1;
        }
    }
}

fn write_each_block(disk: &mut Disk, seed: u64) -> Result<u64> {
    let blocks = disk.blocks;
    write_generation(disk, seed, shuffled(blocks).map(|block| (block, 0)))
}

fn write_generation(
    disk: &mut Disk,
    seed: u64,
    requests: impl Iterator<Item = (u64, u32)>,
) -> Result<u64> {
    each(
        disk,
        requests,
        |disk, lane, block, generation| {
            content(disk.buffer(lane), seed, block, generation);
            disk.write(lane, block);
        },
        |_, _, _, _| (),
    )
}

fn verify(args: &Args) -> Result<bool> {
    let mut disk = Disk::open(args)?;
    let (seed, blocks) = (args.seed, disk.blocks);
    let mut written = 0;
    if !args.read_only {
        for generation in 0..=3 {
            let requests = shuffled(blocks)
                .filter(|block| last_generation(seed, *block) >= generation)
                .map(|block| (block, generation));
            written += write_generation(&mut disk, seed, requests)?;
        }
        let mut done = Vec::new();
        disk.flush(0);
        disk.wait(&mut done)?;
        if let Some(Done { ret, .. }) = done.iter().find(|done| done.ret != 0) {
            return Err(format!(
                "flush: {}",
                std::io::Error::from_raw_os_error(-ret)
            ));
        }
    }
    let mut wanted = vec![0; args.bs];
    let mut wrong = Vec::new();
    let requests = (0..blocks).map(|block| (block, last_generation(seed, block)));
    let read = each(
        &mut disk,
        requests,
        |disk, lane, block, _| {
            // What was there must not pass for what was read.
            disk.buffer(lane).fill(0xa5);
            disk.read(lane, block);
        },
        |disk, lane, block, generation| {
            content(&mut wanted, seed, block, generation);
            if disk.buffer(lane) != wanted.as_slice() {
                wrong.push(block);
            }
        },
    )?;
    if args.json {
        println!(
            "{}",
            serde_json::json!({"verify": wrong.is_empty(), "bs": args.bs, "depth": args.depth, "written": written,
                "read": read, "wrong": wrong.len(), "first_wrong": wrong.first()})
        );
    } else if wrong.is_empty() {
        println!(
            "verified {read} blocks of {} bytes after {written} writes",
            args.bs
        );
    } else {
        println!(
            "{} of {read} blocks of {} bytes are wrong; the first: {:?}",
            wrong.len(),
            args.bs,
            &wrong[..wrong.len().min(8)]
        );
    }
    Ok(wrong.is_empty())
}
