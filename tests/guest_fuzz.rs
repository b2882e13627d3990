//! The fuzz targets of `fuzz/` on stable Rust: seeded mutations of the corpora there, so many of them and no more. For nights
//! there is `scripts/fuzz`, which looks where it has not been yet.
//!
//! A failure leaves its input in a file and names it; `LOCKSTEP_FUZZ_INPUT=FILE cargo test --test guest_fuzz NAME` repeats
//! it. `LOCKSTEP_FUZZ_SEED` and `LOCKSTEP_FUZZ_RUNS` change what is tried.

#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::path::{Path, PathBuf};

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 33) as usize % limit.max(1)
    }
}

/// Longest input. More actions do not find more.
const LONGEST: usize = 2048;
const EDGES: [u64; 12] = [
    0,
    1,
    2,
    7,
    16,
    0x7f,
    0xff,
    0x100,
    0x7fff,
    0xffff,
    0xffff_ffff,
    u64::MAX,
];

fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    for _ in 0..=random.below(6) {
        let at = random.below(input.len() + 1);
        let n = (1 + random.below(16)).min(input.len() - at);
        match random.below(8) {
            0 if n > 0 => input[at] ^= 1 << random.below(8),
            1 if n > 0 => input[at] = random.next() as u8,
            2 => {
                let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
                let width = (1 << random.below(4)).min(input.len() - at);
                input[at..at + width].copy_from_slice(&edge[..width]);
            }
            3 => drop(input.drain(at..at + n)),
            4 => {
                let piece = input[at..at + n].to_vec();
                let to = random.below(input.len() + 1);
                input.splice(to..to, piece);
            }
            5 => {
                let piece: Vec<u8> = (0..n).map(|_| random.next() as u8).collect();
                input.splice(at..at, piece);
            }
            // The rest of another one.
            6 => {
                input.truncate(at);
                input.extend(&other[random.below(other.len() + 1)..]);
            }
            _ if n > 0 => {
                input[at] = input[at]
                    .wrapping_add(random.next() as u8 & 3)
                    .wrapping_sub(1)
            }
            _ => {}
        }
    }
    input.truncate(LONGEST);
}

/// The input that is being tried; written to a file when that panics.
struct Trying<'a> {
    name: &'a str,
    input: &'a [u8],
}

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{}", self.name));
            let _ = std::fs::write(&file, self.input);
            println!("LOCKSTEP_FUZZ_INPUT={} fails", file.display());
        }
    }
}

fn setting(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|e| panic!("{name}={value}: {e}")),
    )
}

fn fuzz(name: &str, runs: u64, target: fn(&[u8])) {
    let attempt = |input: &[u8]| {
        let trying = Trying { name, input };
        target(trying.input);
    };
    if let Some(file) = std::env::var_os("LOCKSTEP_FUZZ_INPUT") {
        return attempt(&std::fs::read(file).unwrap());
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(name);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let corpus: Vec<Vec<u8>> = files.iter().map(|f| std::fs::read(f).unwrap()).collect();
    assert!(!corpus.is_empty(), "{} is empty", directory.display());
    corpus.iter().for_each(|input| attempt(input));
    let mut random = Random(setting("LOCKSTEP_FUZZ_SEED").unwrap_or(1).wrapping_mul(2) | 1);
    for _ in 0..setting("LOCKSTEP_FUZZ_RUNS").unwrap_or(runs) {
        let mut input = corpus[random.below(corpus.len())].clone();
        let other = &corpus[random.below(corpus.len())];
        mutate(&mut input, other, &mut random);
        attempt(&input);
    }
}

#[test]
fn rings() {
    fuzz("ring", 5_000, targets::ring::run);
}

#[test]
fn requests() {
    fuzz("request", 3_000, targets::request::run);
}

#[test]
fn sessions() {
    fuzz("session", 1_000, targets::session::run);
}
