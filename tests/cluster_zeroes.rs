//! Discards and write-zeroes on real nodes: the same zeros on every copy, and their space given back on each.

mod cluster_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use cluster_support::client::{Disk, KIB, Load, MIB, Plan};
use cluster_support::oracle::{Oracle, SECTOR};
use cluster_support::{Cluster, copies};
use serde_json::Value;

const SIZE: u64 = 80 << 20;
/// What a file system may need for itself beside what the volume holds.
const SLACK: u64 = 1 << 20;

/// Writes all of the disk.
fn fill(disk: &mut Disk, oracle: &mut Oracle) {
    for at in (0..SIZE).step_by(MIB) {
        let ticket = oracle.begin(at as usize / SECTOR, disk.buffer(0, MIB));
        disk.write(0, at, MIB);
        assert_eq!(disk.finish(), 0);
        oracle.end(ticket, true);
    }
    disk.flush(0);
    assert_eq!(disk.finish(), 0);
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Discard,
    Unmap,
    Keep,
}

fn zero(disk: &mut Disk, oracle: &mut Oracle, kind: Kind, offset: u64, len: u64) {
    let ticket = oracle.begin_zeros(offset as usize / SECTOR, len as usize / SECTOR);
    match kind {
        Kind::Discard => disk.discard(0, offset, len),
        Kind::Unmap => disk.write_zeroes(0, offset, len, true),
        Kind::Keep => disk.write_zeroes(0, offset, len, false),
    }
    assert_eq!(disk.finish(), 0, "{kind:?} of {len} bytes at {offset}");
    oracle.end(ticket, true);
}

/// Every copy takes as much space as the volume holds, give or take what a file system needs for itself.
fn all_take(cluster: &Cluster, volume: &Value, bytes: u64) {
    for n in 1..=3 {
        let takes = cluster.allocated(n, volume);
        assert!(
            takes.abs_diff(bytes) <= SLACK,
            "the copy on n{n} takes {takes} bytes, not {bytes}"
        );
    }
}

fn metric(cluster: &Cluster, n: usize, name: &str) -> u64 {
    let mut http = TcpStream::connect((cluster.ip(n), 5705)).unwrap();
    http.write_all(b"GET /metrics HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut text = String::new();
    http.read_to_string(&mut text).unwrap();
    let line = text.lines().find(|l| l.starts_with(&format!("{name}{{")));
    let value = line.and_then(|l| l.rsplit(' ').next()).unwrap_or_default();
    value.parse().unwrap_or_else(|e| panic!("{name}: {e}"))
}

fn zeros_are_the_same_on_every_copy_and_take_no_space(parent: &Path) {
    // Given a volume with two replicas, all of it written,
    let cluster = Cluster::start_in(parent, 3);
    let create = "--size 80MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let volume = cluster.volume(1, "vm1");
    let mut oracle = Oracle::new(SIZE);
    let mut disk = Disk::open(&socket, 1, 2);
    fill(&mut disk, &mut oracle);
    all_take(&cluster, &volume, SIZE);
    // when the longest range that one discard may have is discarded, then each copy gives its space back;
    zero(&mut disk, &mut oracle, Kind::Discard, 0, 64 << 20);
    all_take(&cluster, &volume, SIZE - (64 << 20));
    // when zeros are written that keep their space, then it is kept (or taken again);
    zero(&mut disk, &mut oracle, Kind::Keep, 0, 20 << 20);
    all_take(&cluster, &volume, SIZE - (44 << 20));
    // when zeros are written that need not, then it is given back;
    zero(&mut disk, &mut oracle, Kind::Unmap, 4 << 20, 16 << 20);
    all_take(&cluster, &volume, SIZE - (60 << 20));
    // ranges that end anywhere are zero to the byte;
    let kib = KIB as u64;
    for (kind, offset, len) in [
        (Kind::Discard, 66 << 20, 512),
        (Kind::Unmap, (66 << 20) + 3 * kib + 512, 9 * kib),
        (Kind::Keep, (68 << 20) - 512, kib),
        (Kind::Discard, (70 << 20) + 512, (6 << 20) + 512),
    ] {
        zero(&mut disk, &mut oracle, kind, offset, len);
    }
    // longer ranges than that, and those that reach past the end, are refused and harm nothing;
    disk.discard(0, 0, (64 << 20) + 512);
    assert!(disk.finish() < 0);
    disk.write_zeroes(0, SIZE - 512, 1024, true);
    assert!(disk.finish() < 0);
    disk.sweep(&mut oracle);
    disk.flush(0);
    assert_eq!(disk.finish(), 0);
    // each is counted once, on each layer under what it does to the space;
    let discarded = (64 << 20) + (16 << 20) + 512 + 9 * kib + (6 << 20) + 512;
    let count = |layer: &str, what| metric(&cluster, 1, &format!("lockstep_volume_{layer}_{what}"));
    assert_eq!(count("frontend", "discard_total"), 5);
    assert_eq!(count("frontend", "discard_bytes_total"), discarded);
    assert_eq!(count("network", "discard_bytes_total"), 2 * discarded);
    assert_eq!(count("backend", "discard_bytes_total"), discarded);
    // and all copies are the same.
    drop(disk);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn zeros_are_the_same_on_every_copy_and_take_no_space_on_disks() {
    zeros_are_the_same_on_every_copy_and_take_no_space(Path::new("/tmp"));
}

#[test]
fn zeros_are_the_same_on_every_copy_and_take_no_space_in_memory() {
    zeros_are_the_same_on_every_copy_and_take_no_space(Path::new("/dev/shm"));
}

/// What was discarded while a copy was away is given back by it, too, and nothing is allocated for zeros.
fn a_copy_that_was_away_gives_back_what_was_discarded_meanwhile(parent: &Path) {
    // Given a volume with two replicas, all of it written, one of which is lost,
    let mut cluster = Cluster::start_in(parent, 3);
    let create = "--size 80MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let volume = cluster.volume(1, "vm1");
    let mut oracle = Oracle::new(SIZE);
    let mut disk = Disk::open(&socket, 1, 2);
    fill(&mut disk, &mut oracle);
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    // when most of it is discarded, zeros are written into a part of that, some data into another, and the copy comes back,
    zero(&mut disk, &mut oracle, Kind::Discard, 8 << 20, 64 << 20);
    zero(&mut disk, &mut oracle, Kind::Keep, 16 << 20, 4 << 20);
    let ticket = oracle.begin((24 << 20) / SECTOR, disk.buffer(0, MIB));
    disk.write(0, 24 << 20, MIB);
    assert_eq!(disk.finish(), 0);
    oracle.end(ticket, true);
    cluster.start_node(3);
    cluster.wait_for(1, "vm1", "has all copies in sync", |v| {
        copies(v, "in_sync").len() == 3
    });
    // then it takes the space of what is data; the others have the zeros besides that they were to keep;
    let data = SIZE - (63 << 20);
    let takes = [1, 2, 3].map(|n| cluster.allocated(n, &volume));
    for (takes, expected) in takes
        .into_iter()
        .zip([data + (4 << 20), data + (4 << 20), data])
    {
        assert!(takes.abs_diff(expected) <= SLACK, "{takes}, not {expected}");
    }
    // a new copy, made of a volume with zeros that keep their space, takes none for them either;
    cluster.ok(1, "volume update vm1 --replicas 1");
    let less = cluster.wait_for(1, "vm1", "has one replica less", |v| {
        v["copies"].as_array().is_some_and(|c| c.len() == 2)
    });
    let stay = copies(&less, "in_sync");
    cluster.ok(1, "volume update vm1 --replicas 2");
    cluster.wait_for(1, "vm1", "has all copies in sync", |v| {
        copies(v, "in_sync").len() == 3
    });
    let new = (1..=3).find(|n| !stay.contains(&format!("n{n}"))).unwrap();
    let takes = cluster.allocated(new, &volume);
    assert!(
        takes.abs_diff(data) <= SLACK,
        "the new copy takes {takes}, not {data}"
    );
    // and everything reads back and is the same.
    disk.sweep(&mut oracle);
    drop(disk);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn a_copy_that_was_away_gives_back_what_was_discarded_meanwhile_on_disks() {
    a_copy_that_was_away_gives_back_what_was_discarded_meanwhile(Path::new("/tmp"));
}

#[test]
fn a_copy_that_was_away_gives_back_what_was_discarded_meanwhile_in_memory() {
    a_copy_that_was_away_gives_back_what_was_discarded_meanwhile(Path::new("/dev/shm"));
}

#[test]
fn zeros_among_writes_read_back_while_a_copy_is_lost_and_comes_back() {
    // Given a volume with two replicas, under a load of which a third is zeros that overlap all else,
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    let create = "--size 32MiB --replicas 2 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let plan = Plan {
        zeroes: 33,
        ..Plan::mixed()
    };
    let load = Load::start(&socket, plan, Oracle::new(32 << 20));
    load.goes_on();
    // when a replica is lost and comes back,
    cluster.kill(2);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    cluster.start_node(2);
    cluster.wait_for(1, "vm1", "has all copies in sync", |v| {
        copies(v, "in_sync").len() == 3
    });
    load.goes_on();
    // then nothing failed, all reads back, and the copies are the same.
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}
