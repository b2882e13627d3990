//! Disks that lose, damage or refuse what is on them, under load and with real node processes: nothing acknowledged is lost,
//! nothing fails that need not, `volume inspect` says what is wrong and what to do, and in the end all copies are the same.
//!
//! What damages files while the node is down works on what docs/DISK-FORMAT.md says of them. The disks that get full or fail
//! are mounted (`cluster_support/disks.rs`, `sick.rs`), which needs root.

mod cluster_support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use cluster_support::client::{Disk, Load, Plan};
use cluster_support::disks::{self, BadDisk, SmallDisk, own_mounts, scribble, truncate};
use cluster_support::oracle::Oracle;
use cluster_support::sick::SickDisk;
use cluster_support::{Cluster, copies, eventually};
use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

const SIZE: u64 = 32 << 20;
const MIB: u64 = 1 << 20;
const VOLUME: &str = "--size 32MiB --replicas 2 --master n1";

/// Nodes with a volume that has copies on n1, n2 and n3, is full of data and served by n1, under load.
fn under_load() -> (Cluster, Load) {
    let cluster = Cluster::start(3);
    let load = loaded(&cluster);
    (cluster, load)
}

fn loaded(cluster: &Cluster) -> Load {
    let socket = served(cluster);
    let oracle = filled(&socket);
    Load::start(&socket, Plan::small(), oracle)
}

fn served(cluster: &Cluster) -> PathBuf {
    let socket = cluster.serve("vm1", VOLUME, "--node n1");
    cluster.wait_for(1, "vm1", "has all copies", |v| {
        in_sync(v) == ["n1", "n2", "n3"]
    });
    socket
}

/// The nodes of the copies in sync, in the order of their names.
fn in_sync(volume: &Value) -> Vec<String> {
    let mut nodes = copies(volume, "in_sync");
    nodes.sort_unstable();
    nodes
}

/// Writes all of the disk once.
fn filled(socket: &Path) -> Oracle {
    let mut oracle = Oracle::new(SIZE);
    let mut disk = Disk::open(socket, 1, 1);
    disk.fill(&mut oracle);
    oracle
}

/// Where the files of the copy on a node are.
fn copy_dir(cluster: &Cluster, n: usize) -> PathBuf {
    let data = cluster.copy(n, &cluster.volume(1, "vm1"));
    data.parent().unwrap().into()
}

/// A node is killed under load, and the load goes on without it.
fn lose(cluster: &mut Cluster, n: usize, load: &Load) {
    cluster.kill(n);
    cluster.wait_for(1, "vm1", "is degraded", |v| v["health"] == "degraded");
    load.goes_on();
}

/// The volume is well again on these nodes, under load.
fn heals(cluster: &Cluster, nodes: &[&str], load: &Load) {
    let what = format!("is healthy on {nodes:?}");
    cluster.wait_for(1, "vm1", &what, |v| {
        v["health"] == "healthy" && in_sync(v) == nodes
    });
    load.goes_on();
}

/// The volume serves without the copy on a node and says so, with these words.
fn says(cluster: &Cluster, n: usize, words: &[&str]) -> Value {
    let node = format!("the copy on n{n} is missing");
    cluster.wait_for(1, "vm1", &format!("says {words:?} of n{n}"), |v| {
        let why = v["why"].as_str().unwrap_or_default();
        v["health"] == "degraded"
            && v["attachment"]["phase"] == "serving"
            && why.contains(&node)
            && words.iter().all(|w| why.contains(w))
    })
}

/// No request failed, everything reads back, and all copies are the same.
fn all_is_well(cluster: &Cluster, load: Load, nodes: &[&str]) {
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    let mut compared = cluster.copies_are_identical(1, "vm1");
    compared.sort_unstable();
    assert_eq!(compared, nodes);
}

/// What the last sync of the copy on a node was made of.
fn last_sync(cluster: &Cluster, n: usize) -> String {
    let events = cluster.json(1, "events --volume vm1");
    let begin = format!("copy on n{n}: ");
    let mut texts = events.as_array().unwrap().iter().rev().filter_map(|e| {
        let text = e["text"].as_str()?.strip_prefix(&begin)?;
        (e["rule"] == "6 sync begins").then(|| text.to_string())
    });
    texts
        .next()
        .unwrap_or_else(|| panic!("no sync of n{n}: {events:#}"))
}

/// What `volume inspect` tells people to do about a copy that cannot be used.
fn made_anew_by_hand(cluster: &mut Cluster, n: usize, load: &Load) {
    let dir = copy_dir(cluster, n);
    assert!(cluster.stop(n).success());
    fs::rename(&dir, cluster.node_dir(n).join("moved away")).unwrap();
    cluster.start_node(n);
    heals(cluster, &["n1", "n2", "n3"], load);
    assert_eq!(last_sync(cluster, n), "all of it: the copy is new");
    fs::remove_dir_all(cluster.node_dir(n).join("moved away")).unwrap();
}

// ---- metadata

#[test]
fn half_a_superblock_costs_a_copy_nothing() {
    let (mut cluster, load) = under_load();
    for (n, half, name) in [(2, 0, "A"), (3, 1, "B")] {
        // Given a copy whose node is down, with one of its two superblocks damaged,
        lose(&mut cluster, n, &load);
        let meta = copy_dir(&cluster, n).join("meta");
        let (offset, len) = disks::superblock(half);
        scribble(&meta, offset, len);
        // when its node comes back,
        cluster.start_node(n);
        // then it says so, and needs only what it missed.
        heals(&cluster, &["n1", "n2", "n3"], &load);
        let warning = format!("superblock {name} is damaged");
        assert!(cluster.log(n).contains(&warning), "no {warning}");
        let sync = last_sync(&cluster, n);
        assert!(sync.starts_with("what it missed since epoch"), "{sync}");
        // And whole again after that: the next start finds both.
        lose(&mut cluster, n, &load);
        fs::remove_file(cluster.log_path(n)).unwrap();
        cluster.start_node(n);
        heals(&cluster, &["n1", "n2", "n3"], &load);
        assert!(!cluster.log(n).contains("damaged"));
    }
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn a_copy_without_superblocks_is_refused_and_another_node_gets_its_successor() {
    let (mut cluster, load) = under_load();
    cluster.start_node(4);
    // Given a copy whose node is down, with both superblocks damaged,
    lose(&mut cluster, 3, &load);
    let meta = copy_dir(&cluster, 3).join("meta");
    scribble(&meta, 0, 2 * 4096);
    // when its node comes back, then it is not used, and the volume says why.
    cluster.start_node(3);
    says(&cluster, 3, &["no superblock is readable", "move", "away"]);
    load.goes_on();
    // When it has been missing for long enough, then another node has a copy in its place,
    cluster.ok(1, "cluster update --replace-after 1s");
    heals(&cluster, &["n1", "n2", "n4"], &load);
    assert_eq!(last_sync(&cluster, 4), "all of it: the copy is new");
    // and what is left of the old one is still there for whoever wants to look at it.
    assert!(meta.exists());
    all_is_well(&cluster, load, &["n1", "n2", "n4"]);
}

#[test]
fn a_torn_transaction_of_the_activity_log_never_was() {
    let (mut cluster, load) = under_load();
    // Given a copy whose newest log transaction is half of it as it was before,
    lose(&mut cluster, 3, &load);
    disks::tear_last_transaction(&copy_dir(&cluster, 3).join("meta"));
    // when its node comes back, then the log is read up to the one before, and the copy needs what it missed.
    cluster.start_node(3);
    heals(&cluster, &["n1", "n2", "n3"], &load);
    assert!(!cluster.log(3).contains("activity log unreadable"));
    let sync = last_sync(&cluster, 3);
    assert!(sync.starts_with("what it missed since epoch"), "{sync}");
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn a_damaged_activity_log_costs_a_comparison_of_everything() {
    let (mut cluster, load) = under_load();
    for whole_ring in [false, true] {
        // Given a copy whose log does not verify, in part of its last block or in all of it,
        lose(&mut cluster, 3, &load);
        let meta = copy_dir(&cluster, 3).join("meta");
        let (offset, len) = match whole_ring {
            true => disks::log(),
            false => (disks::last_log_block(&meta).offset + 512, 1000),
        };
        scribble(&meta, offset, len);
        // when its node comes back, then all that it has is compared,
        cluster.start_node(3);
        heals(&cluster, &["n1", "n2", "n3"], &load);
        assert!(cluster.log(3).contains("activity log unreadable"));
        assert_eq!(compared(&cluster), SIZE / (64 << 10));
        assert_eq!(
            last_sync(&cluster, 3),
            "all of it: its activity log cannot be read"
        );
        // and its log is a log again.
        eventually("the log is written anew", || {
            (!disks::is_scribbled(&meta, offset)).then_some(())
        });
        lose(&mut cluster, 3, &load);
        fs::remove_file(cluster.log_path(3)).unwrap();
        cluster.start_node(3);
        heals(&cluster, &["n1", "n2", "n3"], &load);
        assert!(!cluster.log(3).contains("unreadable"));
    }
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

/// With more regions than a log can name, and with nobody else who has what the copy has.
#[test]
fn a_damaged_activity_log_of_the_only_copy_of_a_large_volume_costs_nothing() {
    let mut cluster = Cluster::start(1);
    let create = "--size 20GiB --replicas 0 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let places = [0, 17 << 30, (20 << 30) - MIB];
    let mut disk = Disk::open(&socket, 1, 1);
    for (place, byte) in places.iter().zip(1..) {
        disk.buffer(0, MIB as usize).fill(byte);
        disk.write(0, *place, MIB as usize);
        assert_eq!(disk.finish(), 0);
    }
    cluster.kill(1);
    drop(disk);
    let volumes = cluster.data_dir(1).join("volumes");
    let mut copies = fs::read_dir(volumes).unwrap();
    let meta = copies.next().unwrap().unwrap().path().join("meta");
    let (offset, len) = disks::log();
    scribble(&meta, offset, len);
    // When its node comes back, and once more, so that what the first start noted is read by the second one,
    let serves = |cluster: &mut Cluster| {
        cluster.start_node(1);
        cluster.wait_for(1, "vm1", "serves", |v| {
            v["attachment"]["phase"] == "serving"
        });
        assert!(cluster.log(1).contains("activity log unreadable"));
    };
    serves(&mut cluster);
    cluster.kill(1);
    serves(&mut cluster);
    // then everything is there,
    let mut disk = Disk::open(&socket, 1, 1);
    for (place, byte) in places.iter().zip(1..) {
        disk.read(0, *place, MIB as usize);
        assert_eq!(disk.finish(), 0);
        assert!(disk.buffer(0, MIB as usize).iter().all(|b| *b == byte));
    }
    drop(disk);
    // and its log is a log again when the volume is left.
    cluster.detach(1, "vm1");
    assert!(!disks::is_scribbled(&meta, offset));
}

/// How many chunks the last sync had to compare.
fn compared(cluster: &Cluster) -> u64 {
    let events = cluster.json(1, "events --volume vm1");
    let mut mirrored = events.as_array().unwrap().iter().rev();
    let text = mirrored.find(|e| e["rule"] == "6 mirrored").unwrap()["text"].clone();
    let text = text.as_str().unwrap().to_string();
    let count = text.split(": ").nth(1).and_then(|t| t.split(' ').next());
    count
        .unwrap()
        .parse()
        .unwrap_or_else(|e| panic!("{text}: {e}"))
}

// ---- data

#[test]
fn a_copy_without_its_bytes_is_refused_and_made_anew() {
    let (mut cluster, load) = under_load();
    let no_superblock = |dir: &Path| scribble(&dir.join("meta"), 0, 2 * 4096);
    let no_data = |dir: &Path| fs::remove_file(dir.join("data")).unwrap();
    let short_data = |dir: &Path| truncate(&dir.join("data"), SIZE - 4096);
    let short_meta = |dir: &Path| truncate(&dir.join("meta"), 100_000);
    type Damage = fn(&Path);
    for (damage, words) in [
        (no_superblock as Damage, "no superblock is readable"),
        (no_data, "data"),
        (short_data, "truncated"),
        (short_meta, "truncated"),
    ] {
        // Given a copy that was damaged while its node is down,
        lose(&mut cluster, 3, &load);
        damage(&copy_dir(&cluster, 3));
        // when its node comes back, then it is not used, and the volume says why and what to do.
        cluster.start_node(3);
        says(&cluster, 3, &[words, "move", "away"]);
        load.goes_on();
        // When that is done, the copy is made anew.
        made_anew_by_hand(&mut cluster, 3, &load);
    }
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn a_wiped_node_gets_its_copy_anew_by_itself() {
    let (mut cluster, load) = under_load();
    // Given a node that is down and loses all that its disk had,
    lose(&mut cluster, 3, &load);
    fs::remove_dir_all(cluster.data_dir(3)).unwrap();
    // when it comes back, then it gets everything, under a new identity.
    cluster.start_node(3);
    heals(&cluster, &["n1", "n2", "n3"], &load);
    assert_eq!(last_sync(&cluster, 3), "all of it: the copy is new");
    let rules = cluster.rules(1, "vm1");
    assert!(rules.iter().any(|r| r == "S18 new identity"), "{rules:?}");
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn the_serving_node_comes_back_without_its_copy_and_serves_from_the_others() {
    let no_superblock = |dir: &Path| scribble(&dir.join("meta"), 0, 2 * 4096);
    let no_data = |dir: &Path| fs::remove_file(dir.join("data")).unwrap();
    type Damage = fn(&Path);
    for damage in [no_superblock as Damage, no_data] {
        let (mut cluster, load) = under_load();
        // Given a volume whose serving node dies and finds its own copy damaged,
        let dir = copy_dir(&cluster, 1);
        cluster.kill(1);
        let oracle = load.abandon().oracle;
        damage(&dir);
        // when it comes back, then it serves what the others have, and says what is wrong.
        cluster.start_node(1);
        let volume = says(&cluster, 1, &["move", "away"]);
        assert_eq!(in_sync(&volume).len(), 2);
        let socket = volume["attachment"]["socket"].as_str().unwrap().to_string();
        let load = Load::start(Path::new(&socket), Plan::small(), oracle);
        load.goes_on();
        assert_eq!(load.finish().failed, 0);
        cluster.detach(1, "vm1");
        assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
    }
}

#[test]
fn the_serving_nodes_log_is_garbage_and_every_copy_is_compared_with_it() {
    let (mut cluster, load) = under_load();
    // Given a volume whose serving node dies with writes under way and finds the log of its copy damaged,
    let meta = copy_dir(&cluster, 1).join("meta");
    cluster.kill(1);
    let oracle = load.abandon().oracle;
    let (offset, len) = disks::log();
    scribble(&meta, offset, len);
    // when it comes back, then it serves, and every sector has one value again, the same on all copies.
    cluster.start_node(1);
    let volume = cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    let socket = volume["attachment"]["socket"].as_str().unwrap().to_string();
    let load = Load::start(Path::new(&socket), Plan::small(), oracle);
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn a_copy_with_requests_of_a_dead_process_is_opened_when_they_have_ended() {
    let (mut cluster, load) = under_load();
    // Given a node that comes back while its copy's lock is still held, as by requests at a disk that hangs,
    lose(&mut cluster, 3, &load);
    let data = File::open(copy_dir(&cluster, 3).join("data")).unwrap();
    flock(&data, FlockOperation::NonBlockingLockExclusive).unwrap();
    cluster.start_node(3);
    // then the volume says so and serves,
    says(&cluster, 3, &["its last request has not ended"]);
    load.goes_on();
    // and when the lock goes, the copy comes back, without a restart.
    drop(data);
    heals(&cluster, &["n1", "n2", "n3"], &load);
    let sync = last_sync(&cluster, 3);
    assert!(sync.starts_with("what it missed since epoch"), "{sync}");
    all_is_well(&cluster, load, &["n1", "n2", "n3"]);
}

// ---- files that change under a running node

#[test]
fn a_copy_cut_short_under_a_running_node_is_ejected_before_it_does_harm() {
    // A replica's file, then the one that reads come from.
    for n in [3, 1] {
        let (mut cluster, load) = under_load();
        // When the data file is cut short under the node's hands,
        truncate(&copy_dir(&cluster, n).join("data"), SIZE / 2);
        // then the copy is out, also after writes have made its file long again, no request fails, and nobody reads zeros.
        let volume = says(&cluster, n, &["cut short", "move", "away"]);
        assert_eq!(in_sync(&volume).len(), 2);
        load.goes_on();
        if n == 3 {
            made_anew_by_hand(&mut cluster, 3, &load);
            all_is_well(&cluster, load, &["n1", "n2", "n3"]);
        } else {
            assert_eq!(load.finish().failed, 0);
            cluster.detach(1, "vm1");
            assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
        }
    }
}

// ---- disks that are full

/// Starts nodes n1 … of an empty cluster.
fn start(cluster: &mut Cluster, nodes: usize) {
    for n in 1..=nodes {
        cluster.start_node(n);
    }
    cluster.know_each_other();
}

fn a_full_disk_costs_a_copy_and_no_request(
    cluster: &mut Cluster,
    take_space: impl FnOnce(),
    make_space: impl FnOnce(),
) {
    // Given a volume with a copy on a disk that has become too small for it,
    start(cluster, 3);
    let socket = served(cluster);
    take_space();
    // when that is full under load, then the copy is out, and the volume says why.
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    says(cluster, 3, &["its disk is full"]);
    load.goes_on();
    let rules = cluster.rules(1, "vm1");
    assert!(rules.iter().any(|r| r == "2.6 eject"), "{rules:?}");
    // When there is space again, it comes back.
    make_space();
    heals(cluster, &["n1", "n2", "n3"], &load);
    all_is_well(cluster, load, &["n1", "n2", "n3"]);
}

#[test]
fn what_a_disk_holds_is_shown_and_a_full_one_gets_no_copies() {
    // Given nodes on disks of 300, 400 and 500 MiB, and the last one nearly full,
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let disks = [300 * MIB, 400 * MIB, 500 * MIB];
    let _disks: Vec<SmallDisk> = (1..=3)
        .zip(disks)
        .map(|(n, bytes)| SmallDisk::mount(&cluster.node_dir(n).join("data"), bytes))
        .collect();
    (1..=3).for_each(|n| cluster.start_node(n));
    cluster.know_each_other();
    let full = cluster.data_dir(3);
    disks::fill(&full, 32 * MIB);
    // then each node says what its own disk holds, and has left;
    let nodes = eventually("n1 knows that n3 is full", || {
        let nodes = cluster.json(1, "node ls");
        (nodes[2]["capacity"]["free"].as_u64()? <= 32 * MIB).then_some(nodes)
    });
    for (n, bytes) in disks.into_iter().enumerate() {
        let capacity = &nodes[n]["capacity"];
        assert_eq!(capacity["total"], bytes, "{nodes:#}");
        let free = capacity["free"].as_u64().unwrap();
        assert!((free > bytes * 9 / 10) == (n < 2), "{nodes:#}");
    }
    let table = cluster.ok(1, "node ls");
    let row = table.lines().find(|l| l.starts_with("n3")).unwrap();
    assert!(row.contains("500 MiB") && row.contains("93."), "{table}");
    // new copies go where the most is free, and none to the full one, by name;
    cluster.ok(1, "volume create most --size 32MiB");
    let holders = |name| in_sync(&cluster.volume(1, name));
    assert_eq!(holders("most"), ["n2"]);
    let refused = "volume create vm1 --size 32MiB --replicas 2";
    let full_node = ["n3", "its disk is full (32 MiB free)"];
    cluster.run(1, refused).refused(11, &full_node);
    // nor by a hint for the master, which is followed where it can be: by label or by rule,
    let hint = "--size 32MiB --label lockstep.io/hint.master";
    let done = cluster.run(1, &format!("volume create vm0 {hint}=n3"));
    let said = "the master is not on n3: its disk is full";
    assert!(done.code == 0 && done.err.contains(said), "{done:?}");
    assert_eq!(holders("vm0"), ["n2"]);
    cluster.ok(1, &format!("volume create vm1 {hint}=n1"));
    assert_eq!(holders("vm1"), ["n1"]);
    cluster.ok(
        1,
        "rule create here -s at==one --label lockstep.io/hint.master=n1",
    );
    cluster.ok(
        1,
        "volume create vm2 --size 32MiB --replicas 1 --label at=one",
    );
    let vm2 = cluster.volume(1, "vm2");
    assert_eq!(vm2["master"]["node"], "n1");
    assert_eq!(holders("vm2"), ["n1", "n2"]);
    // and when there is space again, it gets copies again.
    disks::make_space(&full);
    eventually("n3 gets a copy", || {
        (cluster.run(1, refused.replace("vm1", "vm3").as_str()).code == 0).then_some(())
    });
    assert_eq!(holders("vm3"), ["n1", "n2", "n3"]);
}

#[test]
fn a_full_memory_disk_costs_a_copy_and_no_request() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let disk = SmallDisk::mount(&cluster.node_dir(3).join("data"), 128 * MIB);
    a_full_disk_costs_a_copy_and_no_request(
        &mut cluster,
        || disk.resize(16 * MIB),
        || disk.resize(128 * MIB),
    );
}

#[test]
fn a_full_ext4_costs_a_copy_and_no_request() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let data = cluster.node_dir(3).join("data");
    let _disk = BadDisk::mount(&data, 96 * MIB);
    a_full_disk_costs_a_copy_and_no_request(
        &mut cluster,
        || disks::fill(&data, 16 * MIB),
        || disks::make_space(&data),
    );
}

/// A volume without replicas on a disk that has become too small for it.
fn alone(cluster: &mut Cluster, settings: &str) -> (SmallDisk, PathBuf) {
    let disk = SmallDisk::mount(&cluster.node_dir(1).join("data"), 128 * MIB);
    start(cluster, 1);
    let create = format!("--size 32MiB --replicas 0 {settings}");
    let socket = cluster.serve("vm1", &create, "");
    disk.resize(16 * MIB);
    (disk, socket)
}

#[test]
fn a_volume_whose_only_copy_is_full_waits_for_space() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let (disk, socket) = alone(&mut cluster, "--suspend-deadline 300s");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    // When its disk is full, then the volume is suspended, says why, and fails nothing.
    cluster.wait_for(1, "vm1", "is suspended", |v| {
        let why = v["why"].as_str().unwrap_or_default();
        v["health"] == "suspended" && why.contains("full disk: make space")
    });
    // When there is space, it serves on.
    disk.resize(128 * MIB);
    load.goes_on();
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    assert_eq!(load.finish().failed, 0);
    let rules = cluster.rules(1, "vm1");
    assert!(rules.iter().any(|r| r == "7 suspend"), "{rules:?}");
}

#[test]
fn a_volume_whose_only_copy_is_full_fails_after_its_deadline_and_serves_when_there_is_space() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let (disk, socket) = alone(&mut cluster, "--suspend-deadline 1s");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    // When its disk was full for longer than its deadline, then requests fail,
    eventually("requests fail", || (load.failed() > 0).then_some(()));
    // and when there is space, none does any more, and nothing acknowledged is lost.
    disk.resize(128 * MIB);
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    load.goes_on();
    let failed = load.failed();
    load.goes_on();
    assert_eq!(load.finish().failed, failed);
}

// ---- disks that fail

#[test]
fn a_replica_whose_disk_fails_is_replaced() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let disk = BadDisk::mount(&cluster.node_dir(3).join("data"), 96 * MIB);
    start(&mut cluster, 3);
    let load = loaded(&cluster);
    cluster.start_node(4);
    // When a disk refuses every write and flush, then its copy is out, and the volume says why.
    disk.fail_writes();
    says(&cluster, 3, &["its disk failed", "move", "away"]);
    load.goes_on();
    // When it has been missing for long enough, then another node has a copy in its place.
    cluster.ok(1, "cluster update --replace-after 1s");
    heals(&cluster, &["n1", "n2", "n4"], &load);
    all_is_well(&cluster, load, &["n1", "n2", "n4"]);
}

#[test]
fn the_disk_of_the_serving_node_fails_and_another_copy_takes_over() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let disk = BadDisk::mount(&cluster.node_dir(1).join("data"), 96 * MIB);
    start(&mut cluster, 3);
    let load = loaded(&cluster);
    // When the disk that reads come from refuses every write and flush, then the guest reads from another node.
    disk.fail_writes();
    let volume = says(&cluster, 1, &["its disk failed", "move", "away"]);
    assert_ne!(volume["master"]["node"], "n1");
    load.goes_on();
    let rules = cluster.rules(1, "vm1");
    assert!(rules.iter().any(|r| r == "3 failed disk"), "{rules:?}");
    assert_eq!(load.finish().failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
}

/// A disk for node n that does what the test says.
fn sick_disk(cluster: &Cluster, n: usize) -> SickDisk {
    let image = cluster.dir.path().join(format!("disk of n{n}"));
    SickDisk::mount(&cluster.data_dir(n), &image, 192 << 20)
}

/// What a disk has in a range, by itself.
fn read(disk: &mut Disk, at: u64, len: usize) -> Vec<u8> {
    disk.read(0, at, len);
    assert_eq!(disk.finish(), 0);
    disk.buffer(0, len).to_vec()
}

#[test]
fn what_one_disk_cannot_read_comes_from_another_copy_and_is_written_back() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let sick = sick_disk(&cluster, 1);
    start(&mut cluster, 3);
    let socket = served(&cluster);
    let mut oracle = Oracle::new(SIZE);
    let mut disk = Disk::open(&socket, 1, 1);
    disk.fill(&mut oracle);
    // Given the disk that reads come from, which has lost sectors here and there: one, a block, many, some of them under a load,
    let mut lost = 0;
    for (at, len) in [
        (SIZE / 2 + 3 * 512, 512),
        (20 * MIB, 4096),
        (24 * MIB + 65536, 65536),
        (MIB, 1 << 20),
        (30 * MIB, 1 << 20),
    ] {
        let data = read(&mut disk, at, len);
        let found = sick.lose(&data);
        assert_eq!(found, len / 512, "sectors of the copy at {at}");
        lost += found;
    }
    drop(disk);
    assert_eq!(sick.lost(), lost);
    // when all of it is read, and part of it written, under load,
    let half = Plan {
        part: 2,
        ..Plan::small()
    };
    let load = Load::start(&socket, half, oracle);
    load.goes_on();
    // then no request fails, and everything is as it was written: it came from other copies;
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    assert!(sick.refused() > 0, "no read failed");
    // and every sector can be read again, for it has been written back. That was counted, and is told.
    eventually("the disk reads everything again", || {
        (sick.lost() == 0).then_some(())
    });
    let repairs = cluster.figure(1, "lockstep_volume_read_repairs_total", "vm1");
    assert!(repairs >= 3.0, "{repairs} repairs were counted");
    let events = cluster.json(1, "events --volume vm1");
    let events = events.as_array().unwrap().iter();
    let told = events.filter(|e| e["rule"] == "3 repair");
    let texts: Vec<String> = told.map(|e| e["text"].to_string()).collect();
    assert_eq!(texts.len() as f64, repairs, "{texts:?}");
    assert!(
        texts
            .iter()
            .all(|t| t.contains("the copy on n1 could not read")),
        "{texts:?}"
    );
    // The copy has stayed what it was, and is the same as the others.
    let volume = cluster.volume(1, "vm1");
    assert_eq!(volume["health"], "healthy", "{volume:#}");
    assert_eq!(volume["master"]["node"], "n1");
    let refused = sick.refused();
    Disk::open(&socket, 1, 1).sweep(&mut { outcome.oracle });
    assert_eq!(sick.refused(), refused, "a repaired sector failed again");
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn what_the_only_copy_cannot_read_is_an_error_of_that_request_until_it_is_written() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let sick = sick_disk(&cluster, 1);
    start(&mut cluster, 1);
    let socket = cluster.serve("vm1", "--size 32MiB --replicas 0", "--node n1");
    let mut oracle = Oracle::new(SIZE);
    let mut disk = Disk::open(&socket, 1, 1);
    disk.fill(&mut oracle);
    let data = read(&mut disk, 5 * MIB, 4096);
    assert_eq!(sick.lose(&data), 8);
    // A read of what is lost fails, one beside it does not, and the volume stays well.
    disk.read(0, 5 * MIB, 4096);
    assert_ne!(disk.finish(), 0);
    read(&mut disk, 5 * MIB + 4096, 4096);
    assert_eq!(cluster.volume(1, "vm1")["health"], "healthy");
    // Written, it can be read.
    let ticket = oracle.begin((5 * MIB) as usize / 512, disk.buffer(0, 4096));
    disk.write(0, 5 * MIB, 4096);
    assert_eq!(disk.finish(), 0);
    oracle.end(ticket, true);
    disk.sweep(&mut oracle);
}

#[test]
fn a_copy_whose_disk_fails_one_flush_is_out_for_good() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let sick = sick_disk(&cluster, 3);
    start(&mut cluster, 3);
    let load = loaded(&cluster);
    // When a disk fails one flush, and after it does everything it is asked,
    sick.fail_one_flush();
    // then its copy is out: what it was to make durable may be gone, and a second flush would not say so.
    says(&cluster, 3, &["its disk failed", "move", "away"]);
    assert!(sick.has_failed_it());
    load.goes_on();
    let failed = load.finish().failed;
    assert_eq!(failed, 0);
    assert_eq!(in_sync(&cluster.volume(1, "vm1")), ["n1", "n2"]);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
}

#[test]
fn a_disk_that_hangs_costs_its_copy_and_no_request() {
    own_mounts();
    // A replica's disk, then the one that reads come from.
    for n in [3, 1] {
        let mut cluster = Cluster::empty(Path::new("/tmp"));
        let sick = sick_disk(&cluster, n);
        start(&mut cluster, 3);
        let load = loaded(&cluster);
        // When a disk answers nothing any more, then the volume goes on without its copy,
        sick.hang();
        says(&cluster, n, &[]);
        let events = cluster.json(1, "events --volume vm1");
        let mut events = events.as_array().unwrap().iter();
        let out = events.find(|e| e["rule"] == "2.6 eject").unwrap()["text"].to_string();
        let why = format!("copy on n{n}: a request unanswered for ");
        assert!(out.contains(&why), "{out}");
        load.goes_on();
        // and when it has done all that it was asked, the copy comes back, and none of that is seen.
        sick.let_go();
        heals(&cluster, &["n1", "n2", "n3"], &load);
        all_is_well(&cluster, load, &["n1", "n2", "n3"]);
    }
}

#[test]
fn what_no_disk_can_read_holds_a_new_copy_up_until_it_is_written() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let sick = sick_disk(&cluster, 1);
    start(&mut cluster, 2);
    let create = "--size 32MiB --replicas 0 --master n1";
    let socket = cluster.serve("vm1", create, "--node n1");
    let mut oracle = Oracle::new(SIZE);
    let mut disk = Disk::open(&socket, 1, 1);
    disk.fill(&mut oracle);
    let data = read(&mut disk, 5 * MIB, 4096);
    assert_eq!(sick.lose(&data), 8);
    // When a volume whose only copy cannot read everything gets a second one, then that is not in sync, and the volume says why;
    cluster.ok(1, "volume update vm1 --replicas 1 --async");
    let volume = cluster.wait_for(1, "vm1", "says what cannot be read", |v| {
        let why = v["why"].as_str().unwrap_or_default();
        why.contains("can be read on no in-sync copy")
    });
    assert_eq!(in_sync(&volume), ["n1"]);
    // and when the guest has written there, it is.
    let ticket = oracle.begin((5 * MIB) as usize / 512, disk.buffer(0, 4096));
    disk.write(0, 5 * MIB, 4096);
    assert_eq!(disk.finish(), 0);
    oracle.end(ticket, true);
    cluster.wait_for(1, "vm1", "is healthy", |v| v["health"] == "healthy");
    disk.sweep(&mut oracle);
    drop(disk);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
}

#[test]
fn a_scrub_finds_what_a_replicas_disk_cannot_read_and_mends_it() {
    own_mounts();
    let mut cluster = Cluster::empty(Path::new("/tmp"));
    let sick = sick_disk(&cluster, 2);
    start(&mut cluster, 3);
    let socket = served(&cluster);
    let mut oracle = Oracle::new(SIZE);
    let mut disk = Disk::open(&socket, 1, 1);
    disk.fill(&mut oracle);
    // Given a copy that nobody reads from, with sectors that its disk has lost,
    let data = read(&mut disk, 7 * MIB + 512, 1024);
    assert_eq!(sick.lose(&data), 2);
    // when the copies are compared, then that is found and mended, since the others agree,
    let report = cluster.json(1, "volume scrub vm1");
    assert_eq!(report["unreadable_bytes"], 4096, "{report:#}");
    assert_eq!(report["repaired_bytes"], 4096, "{report:#}");
    assert_eq!(report["differing_bytes"], 0, "{report:#}");
    assert_eq!(
        report["differences"][0]["unreadable"][0], "n2",
        "{report:#}"
    );
    // and it can be read again.
    assert_eq!(sick.lost(), 0);
    disk.sweep(&mut oracle);
    drop(disk);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}
