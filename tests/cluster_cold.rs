//! Everything is gone at once and comes back in whatever order, with or without what no flush covered; a copy comes back that had
//! been given up; the registry's file takes no change. Nobody does anything but start processes.
//!
//! A power cut is one: each copy is on a disk of its own that from one moment on is given nothing more, its node is killed, what
//! the disk has is mounted anew, and the kernel has another boot id (`cluster_support/disks.rs`). Needs root.

mod cluster_support;

use std::path::Path;
use std::time::Duration;

use cluster_support::client::{Disk, Load, Plan};
use cluster_support::disks::{BadDisk, boot_anew, own_mounts};
use cluster_support::oracle::{Oracle, Random, SECTOR};
use cluster_support::{Cluster, copies, eventually};
use rusqlite::Connection;
use serde_json::Value;

const SIZE: u64 = 32 << 20;
const CREATE: &str = "--size 32MiB --replicas 2 --master n1 --suspend-deadline 10m";
/// How long requests are watched not to end. Any is good; a longer one sees more.
const WATCHED: Duration = Duration::from_secs(2);

fn serves(volume: &Value) -> bool {
    volume["attachment"]["phase"] == "serving"
}

/// The load ends well, and all copies are the same.
fn all_is_well(cluster: &Cluster, load: Load, expected: &[&str]) {
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.wait_for(1, "vm1", "has the copies it should", |v| {
        copies(v, "in_sync") == expected
    });
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1"), expected);
}

#[test]
fn a_volume_comes_back_by_itself_in_whatever_order_its_nodes_do() {
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let mut oracle = Oracle::new(SIZE);
    for order in [
        [1, 2, 3],
        [1, 3, 2],
        [2, 1, 3],
        [2, 3, 1],
        [3, 1, 2],
        [3, 2, 1],
    ] {
        let load = Load::start(&socket, Plan::small(), oracle);
        load.goes_on();
        // When all processes end at once in the middle of everything,
        cluster.kill_all();
        oracle = load.abandon().oracle;
        // and are started in this order, each when the one before it answers; the first one says what is waited for,
        let [first, rest @ ..] = order;
        cluster.start_node(first);
        let waits_for = match first {
            1 => ["it waits for the copy on n2 (", "the copy on n3 ("],
            _ => ["attached on n1", "cannot be reached"],
        };
        let volume = cluster.wait_for(first, "vm1", &format!("says {waits_for:?}"), |v| {
            let why = v["why"].as_str().unwrap_or_default();
            waits_for.iter().all(|w| why.contains(w))
        });
        assert_eq!(volume["health"], "offline", "{volume:#}");
        for n in rest {
            cluster.start_node(n);
        }
        // then the volume is served again, whole, with everything that was acknowledged.
        cluster.wait_for(1, "vm1", &format!("is whole after {order:?}"), |v| {
            serves(v) && copies(v, "in_sync").len() == 3
        });
    }
    let load = Load::start(&socket, Plan::mixed(), oracle);
    let master = cluster.volume(1, "vm1")["master"]["node"].clone();
    let mut expected = ["n1", "n2", "n3"];
    expected.sort_by_key(|n| (master != **n, *n));
    all_is_well(&cluster, load, &expected);
}

#[test]
fn a_volume_waits_for_a_copy_that_holds_everything_and_says_for_which() {
    // Given a volume whose copies on n2 and n3 were lost one after the other, so that n1's alone holds everything,
    let mut cluster = Cluster::start(3);
    let create = format!("{CREATE} --failure-mode alwayson");
    let socket = cluster.serve("vm1", &create, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    for (n, left) in [(3, 2), (2, 1)] {
        load.goes_on();
        cluster.kill(n);
        cluster.wait_for(1, "vm1", "is degraded", |v| {
            copies(v, "in_sync").len() == left
        });
    }
    load.goes_on();
    cluster.kill(1);
    let oracle = load.abandon().oracle;
    // when only those come back, and the volume is to be served by one of them,
    cluster.start_node(2);
    cluster.start_node(3);
    cluster.ok(2, "volume detach vm1 --force");
    let mut attaching = cluster.begin(2, "volume attach vm1 --node n2");
    // then it is not served from what lacks acknowledged writes, and says which copy it waits for, wherever one looks;
    let volume = cluster.wait_for(3, "vm1", "says what it waits for", |v| {
        v["why"].as_str().unwrap_or_default().contains("copy on n1")
    });
    assert_eq!(volume["health"], "offline", "{volume:#}");
    assert_eq!(copies(&volume, "in_sync"), ["n1"]);
    assert!(attaching.try_wait().unwrap().is_none());
    // and when that is back it is served, whole, with everything.
    cluster.start_node(1);
    assert!(attaching.wait().unwrap().success());
    let volume = cluster.wait_for(2, "vm1", "is whole", |v| {
        serves(v) && copies(v, "in_sync").len() == 3
    });
    let socket = volume["attachment"]["socket"].as_str().unwrap();
    let load = Load::start(Path::new(socket), Plan::mixed(), oracle);
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(2, "vm1");
    assert_eq!(cluster.copies_are_identical(2, "vm1").len(), 3);
}

#[test]
fn a_lost_copy_that_returns_before_its_successor_is_there_stays() {
    // Given a volume under load that lost a copy, and a node where its successor cannot be made,
    let mut cluster = Cluster::start(4);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let volume = cluster.volume(1, "vm1");
    let held = copies(&volume, "in_sync");
    let spare = (2..=4).find(|n| !held.contains(&format!("n{n}"))).unwrap();
    let place = cluster.copy(spare, &volume);
    let obstacle = place.parent().unwrap();
    std::fs::write(obstacle, "not a directory").unwrap();
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    let lost = held[2][1..].parse().unwrap();
    cluster.kill(lost);
    cluster.ok(1, "cluster update --replace-after 1ms");
    let named = format!("n{spare}");
    cluster.wait_for(1, "vm1", "has a successor that gets nowhere", |v| {
        copies(v, "missing").contains(&named)
    });
    load.goes_on();
    // when the lost copy returns,
    cluster.start_node(lost);
    // then it is in sync first and stays, and the successor goes,
    let now = cluster.wait_for(1, "vm1", "is healthy with three copies", |v| {
        v["health"] == "healthy" && v["copies"].as_array().is_some_and(|c| c.len() == 3)
    });
    assert_eq!(copies(&now, "in_sync"), held);
    // for good, also when it could be made.
    std::fs::remove_file(obstacle).unwrap();
    let expected: Vec<&str> = held.iter().map(String::as_str).collect();
    all_is_well(&cluster, load, &expected);
    assert!(!place.exists());
}

#[test]
fn a_registry_that_takes_no_change_stops_nothing_but_changes() {
    // Given a volume under load and a registry file that somebody holds,
    let mut cluster = Cluster::start_in(Path::new("/dev/shm"), 3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    let held = Connection::open(cluster.registry()).unwrap();
    held.execute_batch("BEGIN IMMEDIATE").unwrap();
    // then the load goes on, and who wants a change is told to try again;
    std::thread::sleep(WATCHED);
    load.goes_on();
    let done = cluster.run(1, "volume create vm2 --size 32MiB");
    done.refused(12, &["registry"]);
    // when a replica is lost as well, requests wait, since it cannot be put out,
    cluster.kill(3);
    cluster.wait_for(1, "vm1", "is suspended for want of the registry", |v| {
        v["health"] == "suspended" && v["why"].as_str().unwrap_or_default().contains("registry")
    });
    let before = load.done();
    std::thread::sleep(WATCHED);
    assert_eq!(load.done(), before, "a request was answered");
    load.still_runs();
    // and when the registry takes changes again everything goes on by itself.
    drop(held);
    load.goes_on();
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    cluster.ok(1, "volume create vm2 --size 32MiB");
    cluster.start_node(3);
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

// ---- power cuts

/// Requests under way at once.
const DEPTH: usize = 16;
const BLOCK: usize = 16 << 10;
/// Enough of them that no file system has them all on its disk.
const WRITES: usize = 600;
const DISK: u64 = 192 << 20;

/// Nodes n1 … whose copies are on disks that can lose power.
fn on_disks(nodes: usize) -> (Cluster, Vec<BadDisk>) {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let disks = (1..=nodes).map(|n| BadDisk::mount(&cluster.data_dir(n), DISK));
    let disks = disks.collect();
    for n in 1..=nodes {
        cluster.start_node(n);
    }
    cluster.know_each_other();
    (cluster, disks)
}

/// A disk whose second half is written and flushed. What is written next to the first half no flush covers.
fn half_flushed(socket: &Path) -> (Disk, Oracle) {
    let mut disk = Disk::open(socket, 1, DEPTH);
    let mut oracle = Oracle::new(SIZE);
    for at in (SIZE / 2..SIZE).step_by(1 << 20) {
        let ticket = oracle.begin(at as usize / SECTOR, disk.buffer(0, 1 << 20));
        disk.write(0, at, 1 << 20);
        assert_eq!(disk.finish(), 0);
        oracle.end(ticket, true);
    }
    disk.flush(0);
    assert_eq!(disk.finish(), 0);
    (disk, oracle)
}

/// Writes all over the first half, and waits for all of them.
fn write_without_flush(disk: &mut Disk, oracle: &mut Oracle, random: &mut Random) {
    for _ in 0..WRITES / DEPTH {
        let tickets = submit(disk, oracle, random);
        await_all(disk, oracle, tickets);
    }
}

type Tickets = Vec<cluster_support::oracle::Ticket>;

fn submit(disk: &mut Disk, oracle: &mut Oracle, random: &mut Random) -> Tickets {
    let write = |lane| {
        let at = random.below(SIZE / 2 / BLOCK as u64) * BLOCK as u64;
        let ticket = oracle.begin(at as usize / SECTOR, disk.buffer(lane, BLOCK));
        disk.write(lane, at, BLOCK);
        ticket
    };
    (0..DEPTH).map(write).collect()
}

fn await_all(disk: &mut Disk, oracle: &mut Oracle, tickets: Tickets) {
    let mut left = tickets.len();
    while left > 0 {
        let ended = eventually("a write is answered", || {
            let ended = disk.poll();
            (!ended.is_empty()).then_some(ended)
        });
        for ended in ended {
            assert_eq!(ended.ret, 0, "a write failed");
            oracle.end(tickets[ended.lane], true);
            left -= 1;
        }
    }
}

/// The first half holds something that was written there, the second half all that was flushed.
fn read_after_power_cut(disk: &mut Disk, oracle: &mut Oracle) {
    for at in (0..SIZE).step_by(1 << 20) {
        disk.read(0, at, 1 << 20);
        assert_eq!(disk.finish(), 0);
        let (sector, data) = (at as usize / SECTOR, disk.buffer(0, 1 << 20));
        let verdict = match at < SIZE / 2 {
            true => oracle.judge_after_power_cut(sector, data),
            false => oracle.judge(sector, data),
        };
        if let Err(why) = verdict {
            panic!("after a power cut: {why}");
        }
    }
}

/// The machines of these nodes lose power at once: nothing reaches their disks any more, and what was on the way there is lost.
fn cut_power(cluster: &mut Cluster, disks: &mut [BadDisk], nodes: &[usize]) {
    for n in nodes {
        cluster.freeze(*n);
    }
    for n in nodes {
        disks[n - 1].fail_writes();
    }
    for n in nodes {
        let kept = cluster.data_dir(*n).join("volumes");
        let copy = std::fs::read_dir(kept).unwrap().next().unwrap().unwrap();
        let data = copy.path().join("data");
        let had = std::fs::read(&data).unwrap();
        cluster.kill(*n);
        disks[n - 1].power_on();
        // Or nothing is tested.
        let has = std::fs::read(&data).unwrap();
        assert!(had != has, "the power cut of n{n} took nothing back");
    }
    boot_anew(cluster.dir.path());
}

#[test]
fn all_copies_lose_power_under_a_guest_that_lives_on_and_its_next_flush_says_so() {
    // Given a volume served by a node without a copy, with completed writes that no flush covers,
    let (mut cluster, mut disks) = on_disks(3);
    cluster.ok(1, &format!("volume create vm1 {CREATE}"));
    cluster.start_node(4);
    cluster.ok(4, "volume attach vm1 --node n4");
    let volume = cluster.wait_for(4, "vm1", "is healthy", |v| v["health"] == "healthy");
    assert_eq!(copies(&volume, "in_sync"), ["n1", "n2", "n3"]);
    let socket = volume["attachment"]["socket"].as_str().unwrap().to_string();
    let (mut disk, mut oracle) = half_flushed(Path::new(&socket));
    let mut random = Random::new(4);
    write_without_flush(&mut disk, &mut oracle, &mut random);
    // and some under way,
    cluster.freeze(3);
    let under_way = submit(&mut disk, &mut oracle, &mut random);
    assert_eq!(disk.poll().len(), 0);
    cluster.thaw(3);
    // when the machines of all its copies lose power at once, and come back,
    cut_power(&mut cluster, &mut disks, &[1, 2, 3]);
    for n in [2, 3, 1] {
        cluster.start_node(n);
    }
    // then what was under way is done, on the copy that was chosen, which an event names and which is the master;
    await_all(&mut disk, &mut oracle, under_way);
    let events = cluster.json(4, "events --volume vm1");
    let mut cuts = events.as_array().unwrap().iter();
    let cut = cuts.find(|e| e["rule"] == "5 power cut");
    let text = cut.unwrap_or_else(|| panic!("no power cut in {events:#}"))["text"].to_string();
    let chosen = (1..=3).find(|n| text.contains(&format!("the copy on n{n} serves on")));
    let chosen = format!("n{}", chosen.unwrap_or_else(|| panic!("{text}")));
    let volume = cluster.volume(4, "vm1");
    assert_eq!(volume["master"]["node"], chosen, "{volume:#}");
    // the guest's next flush fails, once, since it may have lost what it was told was written,
    disk.flush(0);
    assert_ne!(disk.finish(), 0, "a flush covered what a power cut took");
    disk.flush(0);
    assert_eq!(disk.finish(), 0);
    // what was flushed before is there, the rest is as some write left it;
    read_after_power_cut(&mut disk, &mut oracle);
    drop(disk);
    // and all goes on, with all copies, which are the same.
    let load = Load::start(Path::new(&socket), Plan::small(), oracle);
    cluster.wait_for(4, "vm1", "is healthy", |v| v["health"] == "healthy");
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(4, "vm1");
    assert_eq!(cluster.copies_are_identical(4, "vm1").len(), 3);
}

#[test]
fn power_is_lost_everywhere_and_what_was_flushed_is_there() {
    // Given a volume with completed writes that no flush covers,
    let (mut cluster, mut disks) = on_disks(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let (mut disk, mut oracle) = half_flushed(&socket);
    write_without_flush(&mut disk, &mut oracle, &mut Random::new(5));
    // when the power fails everywhere,
    cut_power(&mut cluster, &mut disks, &[1, 2, 3]);
    drop(disk);
    for n in [3, 1, 2] {
        cluster.start_node(n);
    }
    // then the volume is served again by itself, with all its copies,
    cluster.wait_for(1, "vm1", "is whole", |v| {
        serves(v) && copies(v, "in_sync").len() == 3
    });
    // everything flushed is there, each sector has one value of those written, and all copies have the same.
    let mut disk = Disk::open(&socket, 1, DEPTH);
    read_after_power_cut(&mut disk, &mut oracle);
    disk.flush(0);
    assert_eq!(disk.finish(), 0);
    drop(disk);
    let load = Load::start(&socket, Plan::mixed(), oracle);
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn one_machine_loses_power_and_nothing_is_lost() {
    // Given a volume with completed writes that no flush covers,
    let (mut cluster, mut disks) = on_disks(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let (mut disk, mut oracle) = half_flushed(&socket);
    write_without_flush(&mut disk, &mut oracle, &mut Random::new(6));
    drop(disk);
    let unflushed = Plan {
        flushes: 0,
        ..Plan::small()
    };
    let load = Load::start(&socket, unflushed, oracle);
    // when the machine of one copy loses power under load,
    cut_power(&mut cluster, &mut disks, &[3]);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
    // then it gets what it missed and what it lost, and no request failed.
    cluster.start_node(3);
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    let events = cluster.json(1, "events --volume vm1");
    let events = events.as_array().unwrap();
    let begun = events.iter().rev().find(|e| e["rule"] == "6 sync begins");
    let how = begun.expect("a sync")["text"].as_str().unwrap();
    assert!(how.contains("what it missed since epoch"), "{how}");
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}
