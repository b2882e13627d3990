//! How long the registry's calls take: SQLite, and etcd with one member and with three, in one run on one disk.
//!
//! ```text
//! cargo bench --bench registry [-- CALLS]
//! ```
//!
//! Files lie in the directory for temporary files (`TMPDIR`): with that in memory, nothing is measured. Absolute figures
//! are those of this machine's disk; every swap waits for it, on etcd also for a majority of the members.

#[path = "../tests/etcd_support/mod.rs"]
mod etcd_support;

use std::time::{Duration, Instant};

use etcd_support::Etcd;
use lockstep::registry::{Registry, Sqlite};

/// A volume's record with three copies is about this long.
const RECORD: usize = 1000;
const CALLS: usize = 500;

fn main() {
    // cargo itself adds --bench.
    let calls = std::env::args().find_map(|a| a.parse().ok());
    let calls = calls.unwrap_or(CALLS);
    println!("{calls} calls each; median / 99th of 100, in ms");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let sqlite = Sqlite::open(&dir.path().join("registry.db")).expect("SQLite opens");
    measure("sqlite", &sqlite, calls);
    measure("etcd, 1 member", &*Etcd::start(1).open(), calls);
    measure("etcd, 3 members", &*Etcd::start(3).open(), calls);
}

fn measure(name: &str, registry: &dyn Registry, calls: usize) {
    let value = vec![b'x'; RECORD];
    let mut at = registry.cas("k", None, Some(&value)).expect("a first swap");
    let swaps = times(calls, || {
        at = registry.cas("k", Some(at), Some(&value)).expect("a swap");
    });
    let reads = times(calls, || drop(registry.get("k").expect("a read")));
    println!("{name:16} cas {}   get {}", show(&swaps), show(&reads));
}

fn times(calls: usize, mut call: impl FnMut()) -> Vec<Duration> {
    let mut all: Vec<Duration> = (0..calls.max(1))
        .map(|_| {
            let begin = Instant::now();
            call();
            begin.elapsed()
        })
        .collect();
    all.sort();
    all
}

fn show(sorted: &[Duration]) -> String {
    let at = |of_100: usize| sorted[(sorted.len() * of_100 / 100).min(sorted.len() - 1)];
    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    format!("{:7.3} / {:7.3}", ms(at(50)), ms(at(99)))
}
