use proptest::prelude::*;

use crate::wire::WireError;
use crate::wire::frame::PayloadRef;
use crate::wire::lz4::{Compressor, Worth, expand};

/// Bytes that no compressor shrinks, from a fixed seed.
pub fn noise(len: usize) -> Vec<u8> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Half noise, half a repeated byte, in runs of 64: it shrinks to about a half.
pub fn half(len: usize) -> Vec<u8> {
    let mut out = noise(len);
    for run in out.chunks_mut(128) {
        let middle = run.len() / 2;
        run[middle..].fill(7);
    }
    out
}

pub fn lz4(raw_len: u32, bytes: &[u8]) -> PayloadRef<'_> {
    PayloadRef {
        raw_len,
        bytes,
        lz4: true,
    }
}

#[test]
fn what_shrinks_comes_back_and_what_does_not_is_left_alone() {
    let (mut c, mut out) = (Compressor::new(), Vec::new());
    // Short after long after short: each length has its own table.
    for len in [4096, 1 << 20, 512, 65_534, 65_535, 65_536, 4096] {
        let raw = half(len);
        let block = c.compress(&raw, &mut out).expect("half of it repeats");
        assert!(block.len() < len * 3 / 4);
        let mut back = vec![0; len];
        expand(lz4(len as u32, block), &mut back).unwrap();
        assert_eq!(back, raw);
        assert!(c.compress(&noise(len), &mut out).is_none());
    }
    assert!(c.compress(&[0], &mut out).is_none());
}

#[test]
fn a_raw_payload_is_copied() {
    let mut back = [0; 3];
    expand(
        PayloadRef {
            raw_len: 3,
            bytes: b"abc",
            lz4: false,
        },
        &mut back,
    )
    .unwrap();
    assert_eq!(&back, b"abc");
    let short = PayloadRef {
        raw_len: 3,
        bytes: b"ab",
        lz4: false,
    };
    assert!(matches!(
        expand(short, &mut back),
        Err(WireError::Malformed(_))
    ));
}

#[test]
fn a_block_of_another_length_than_claimed_is_refused() {
    let (mut c, mut out) = (Compressor::new(), Vec::new());
    let block = c.compress(&[7; 4096], &mut out).unwrap();
    for claimed in [1, 512, 4095, 4097, 8192] {
        let mut back = vec![0; claimed];
        assert!(
            expand(lz4(claimed as u32, block), &mut back).is_err(),
            "{claimed}"
        );
    }
}

#[test]
fn a_stream_that_does_not_shrink_is_tried_now_and_then_until_it_does() {
    let mut worth = Worth::default();
    let mut tries = |n: usize, shrinks: bool| {
        let tried = |_: &usize| {
            let try_it = worth.worth_trying();
            if try_it {
                worth.tried(shrinks);
            }
            try_it
        };
        (0..n).filter(tried).count()
    };
    assert_eq!(tries(100, true), 100);
    assert_eq!(tries(8, false), 8);
    assert_eq!(tries(160, false), 10);
    // It shrinks again: seen with the next try, and from then on each is.
    assert_eq!(tries(16, true), 1);
    assert_eq!(tries(100, true), 100);
    // Seven in a row are no reason yet.
    assert_eq!(tries(7, false) + tries(1, true) + tries(7, false), 15);
}

proptest! {
    /// Anything comes back as it was.
    #[test]
    fn any_payload_comes_back(parts in prop::collection::vec((any::<u8>(), 1usize..300), 1..60)) {
        let raw: Vec<u8> = parts.iter().flat_map(|(b, n)| vec![*b; *n]).collect();
        let (mut c, mut out) = (Compressor::new(), Vec::new());
        if let Some(block) = c.compress(&raw, &mut out) {
            let mut back = vec![0; raw.len()];
            expand(lz4(raw.len() as u32, block), &mut back).unwrap();
            prop_assert_eq!(back, raw);
        }
    }

    /// No block makes the expansion panic or leave its buffer.
    #[test]
    fn a_hostile_block_is_an_error_or_bytes(block in prop::collection::vec(any::<u8>(), 1..600), len in 1usize..5000) {
        let mut back = vec![0; len];
        let _ = expand(lz4(len as u32, &block), &mut back);
    }

    /// Nor does a valid one with a few bytes changed.
    #[test]
    fn a_damaged_block_is_an_error_or_bytes(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5)) {
        let (mut c, mut out) = (Compressor::new(), Vec::new());
        let raw = half(4096);
        let mut block = c.compress(&raw, &mut out).unwrap().to_vec();
        for (at, byte) in changes {
            let at = at.index(block.len());
            block[at] = byte;
        }
        let mut back = vec![0; 4096];
        let _ = expand(lz4(4096, &block), &mut back);
    }
}
