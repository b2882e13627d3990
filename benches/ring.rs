//! What a request costs in the ring itself, in nanoseconds: taken, parsed, answered, published and notified, without its
//! driver and without its disk. Plain; with an in-flight region; while a migration's dirty log is kept; with both.
//!
//! `cargo bench --bench ring`

#[path = "../tests/guest_driver/mod.rs"]
mod guest_driver;

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use guest_driver::*;
use lockstep::guest::{
    DirtyLog, InflightQueue, InflightRegion, Limits, Parsed, Request, Ring, RingLog, RingStart,
    Status,
};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog};

const ROUNDS: usize = 2_000;
const MEANS: usize = 60;
const LIMITS: Limits = Limits {
    capacity_sectors: 1 << 20,
    read_only: false,
    block_size: lockstep::guest::BlockSize::B512,
};

fn log() -> RingLog {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file: File = rustix::fs::memfd_create("log", flags).unwrap().into();
    file.set_len(4096).unwrap();
    let log = DirtyLog::open(&VhostUserLog::new(4096, 0), file).unwrap();
    RingLog {
        log: Arc::new(log),
        all: true,
        used: None,
    }
}

fn region() -> InflightQueue {
    let (info, file) = InflightRegion::create(&VhostUserInflight::new(0, 0, 1, 256), 1).unwrap();
    let region = InflightRegion::open(&info, file, 1).unwrap();
    InflightQueue::of(&Arc::new(region), 0).unwrap()
}

/// Nanoseconds a read of 4 KiB, in batches.
fn measure(batch: u16, tracked: bool, logged: bool) -> f64 {
    let mut driver = Driver::new(memory(), 0, 128);
    let mut ring = Ring::new(RingStart {
        inflight: tracked.then(region),
        log: logged.then(log),
        ..driver.start(F_EVENT_IDX)
    })
    .unwrap();
    driver.write(DATA, &header(T_IN, 8));
    let mut taken: Vec<Request> = Vec::new();
    // The driver's half costs more than the device's, and is not counted; it polls, so that no eventfd is written to.
    let mut round = || {
        for n in 0..batch {
            let data = DATA + 0x2000 + 0x1000 * u64::from(n);
            let three = [
                desc(DATA, 16, 0, 0),
                desc(data, 4096, WRITE, 0),
                desc(DATA + 0x1000, 1, WRITE, 0),
            ];
            driver.offer_chain(3 * n, &three);
        }
        let start = Instant::now();
        for _ in 0..batch {
            match ring.next_request(&LIMITS) {
                Ok(Some(Parsed::Request(request))) => taken.push(request),
                other => panic!("{other:?}"),
            }
        }
        for request in taken.drain(..) {
            ring.push_used(request.finish(Status::Ok));
        }
        ring.publish_and_notify();
        assert!(!ring.enable_kicks());
        let took = start.elapsed().as_nanos() as f64;
        driver.completions();
        took / f64::from(batch)
    };
    // The best of many means: the machine may have other things to do.
    (0..MEANS)
        .map(|_| (0..ROUNDS).map(|_| round()).sum::<f64>() / ROUNDS as f64)
        .fold(f64::MAX, f64::min)
}

fn main() {
    println!("ns a request          plain  in-flight  logged  both");
    for batch in [1, 16] {
        let of = |tracked, logged| measure(batch, tracked, logged);
        println!(
            "batches of {batch:2}       {:8.1}  {:9.1}  {:6.1}  {:4.1}",
            of(false, false),
            of(true, false),
            of(false, true),
            of(true, true)
        );
    }
}
