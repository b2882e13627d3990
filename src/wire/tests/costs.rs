//! What the path of a write costs: `CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo test --lib costs -- --ignored --nocapture`.

use std::hint::black_box;
use std::time::Instant;

use super::lz4::{half, lz4, noise};
use crate::replication::ids::{Epoch, Seq, Span};
use crate::replication::message::{Message, Request, Status};
use crate::wire::frame::{Payload, decode, encode};
use crate::wire::lz4::{Compressor, expand};

/// Nanoseconds of one call: the best of many runs, for the machine may have other things to do.
fn time(f: &mut dyn FnMut()) -> u128 {
    let run = |_| {
        let start = Instant::now();
        for _ in 0..2_000 {
            f();
        }
        start.elapsed().as_nanos() / 2_000
    };
    (0..50).map(run).min().unwrap_or(0)
}

#[test]
#[ignore = "a measurement"]
fn frame_costs() {
    let data = vec![0x5a; 4096];
    let payload = Payload {
        raw_len: 4096,
        bytes: &data,
        lz4: false,
    };
    let span = Span {
        offset: 512,
        len: 4096,
    };
    let write = Message::Write(Request {
        epoch: Epoch(1),
        seq: Seq(2),
        span,
        fua: false,
    });
    let acks = Message::AckVec {
        epoch: Epoch(1),
        acks: vec![(Seq(9), Status::Ok); 16],
        log_pressure: false,
    };
    let mut out = Vec::new();
    for (name, message, payload) in [
        ("a write of 4 KiB", write, Some(payload)),
        ("16 answers", acks, None),
    ] {
        let encoding = time(&mut || {
            out.clear();
            encode(black_box(&message), 1, payload, &mut out);
        });
        out.extend_from_slice(payload.map_or(&[], |p| p.bytes));
        let decoding = time(&mut || {
            black_box(decode(black_box(&out)).unwrap());
        });
        println!("{name}: encode {encoding} ns, decode {decoding} ns");
    }
    let crc = time(&mut || {
        black_box(crc32c::crc32c(black_box(&data)));
    });
    println!("crc32c of 4 KiB alone: {crc} ns");
}

#[test]
#[ignore = "a measurement"]
fn lz4_costs() {
    let (mut c, mut out, mut fresh) = (Compressor::new(), Vec::new(), Vec::new());
    for (name, raw) in [
        ("half", half(4096)),
        ("noise", noise(4096)),
        ("zeros", vec![0; 4096]),
    ] {
        let reused = time(&mut || {
            black_box(c.compress(black_box(&raw), &mut out));
        });
        let anew = time(&mut || {
            black_box(Compressor::new().compress(black_box(&raw), &mut fresh));
        });
        let Some(block) = c.compress(&raw, &mut out) else {
            println!(
                "4 KiB of {name}: compress {reused} ns (new tables each time {anew} ns), sent raw"
            );
            continue;
        };
        let mut back = vec![0; 4096];
        let expanded = time(&mut || expand(lz4(4096, black_box(block)), &mut back).unwrap());
        let len = block.len();
        println!(
            "4 KiB of {name}: compress {reused} ns (new tables each time {anew} ns) to {len}, expand {expanded} ns"
        );
    }
}
