//! What a disk says of itself, to a Linux guest and to a client: serial, alignment, read-only, queues.

mod cluster_support;
mod guest_driver;

use std::collections::BTreeMap;
use std::path::Path;

use cluster_support::client::{Load, Plan};
use cluster_support::oracle::Oracle;
use cluster_support::vm::Guest;
use cluster_support::{Cluster, eventually};
use guest_driver::vm::{LINUX, Vm};
use guest_driver::{T_FLUSH, T_IN, T_OUT};

const SIZE: u64 = 64 << 20;
const CREATE: &str = "--size 64MiB --replicas 1 --master n1";

/// What the kernel of a guest says of the disk.
fn seen_by_linux(cluster: &Cluster, socket: &Path, read_only: bool) -> BTreeMap<String, String> {
    let console = cluster.dir.path().join("console");
    let settings: &[&str] = if read_only { &["read-only=1"] } else { &[] };
    let mut guest = Guest::boot(socket, "device", settings, &console);
    eventually("the guest's verdict", || guest.is_content().then_some(()));
    eventually("the guest is off", || guest.is_off().then_some(()));
    let lines = guest.console();
    let fields = lines
        .lines()
        .filter_map(|l| l.strip_prefix("GUEST-DEVICE "));
    let pairs = fields.filter_map(|f| f.trim().split_once(' '));
    pairs.map(|(k, v)| (k.into(), v.into())).collect()
}

#[test]
fn a_linux_guest_finds_the_volume_by_its_id_and_aligns_to_it() {
    let cluster = Cluster::start(2);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let id = cluster.volume(1, "vm1")["id"].as_str().unwrap().to_string();
    let seen = seen_by_linux(&cluster, &socket, false);
    // A serial has 20 bytes: the beginning of the volume's id, as `volume inspect` shows it.
    let expected = [
        ("ro", "0"),
        ("serial", &id[..20]),
        ("logical_block_size", "512"),
        ("physical_block_size", "4096"),
        ("minimum_io_size", "4096"),
        ("optimal_io_size", "65536"),
        ("alignment_offset", "0"),
        ("queues", "1"),
    ];
    for (name, value) in expected {
        assert_eq!(
            seen.get(name).map(String::as_str),
            Some(value),
            "{name}: {seen:?}"
        );
    }
    let shown = cluster.ok(1, "volume inspect vm1");
    let serial = shown.lines().find(|l| l.starts_with("Serial")).unwrap();
    assert!(serial.ends_with(&format!(" {}", &id[..20])), "{shown}");
}

#[test]
fn a_volume_attached_read_only_is_read_and_never_written() {
    let cluster = Cluster::start(2);
    // Given a volume with data,
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let load = Load::start(&socket, Plan::small(), Oracle::new(SIZE));
    load.goes_on();
    let outcome = load.finish();
    cluster.detach(1, "vm1");
    let before = cluster.copy(1, &cluster.volume(1, "vm1"));
    let before = std::fs::read(before).unwrap();
    // when it is attached read-only, on another node than before,
    let socket = cluster.ok(1, "volume attach vm1 --node n2 --read-only --num-queues 2");
    let socket = Path::new(socket.trim());
    let shown = cluster.ok(1, "volume inspect vm1");
    assert!(shown.contains("read-only"), "{shown}");
    cluster
        .run(1, "volume attach vm1 --node n2")
        .refused(11, &["read-only", "detach it first"]);
    // then a client reads it;
    let mut vm = Vm::connect(socket);
    let features = vm.negotiate();
    assert_eq!(features & 1 << 5, 1 << 5, "VIRTIO_BLK_F_RO");
    vm.start_like_qemu(LINUX, 0);
    let (status, data) = vm.io(T_IN, 0, &[0; 512]);
    assert_eq!((status, &data[..]), (0, &before[..512]));
    // a driver that writes all the same is told that it failed (virtio 1.2, 5.2.6.2: VIRTIO_BLK_S_IOERR);
    assert_eq!(vm.io(T_OUT, 0, &[0xa5; 512]).0, 1);
    assert_eq!(vm.io(T_FLUSH, 0, &[]).0, 0);
    assert_eq!(vm.io(T_IN, 0, &[0; 512]), (0, before[..512].to_vec()));
    drop(vm);
    // a Linux guest sees that it cannot;
    let seen = seen_by_linux(&cluster, socket, true);
    assert_eq!(seen.get("ro").map(String::as_str), Some("1"), "{seen:?}");
    cluster.detach(2, "vm1");
    // and not a byte has changed on any copy.
    for n in [1, 2] {
        let after = std::fs::read(cluster.copy(n, &cluster.volume(1, "vm1"))).unwrap();
        assert!(after == before, "the copy on n{n} was written");
    }
    let socket = cluster.ok(1, "volume attach vm1 --node n1");
    let load = Load::start(Path::new(socket.trim()), Plan::mixed(), outcome.oracle);
    load.goes_on();
    assert_eq!(load.finish().failed, 0);
}

#[test]
fn sixteen_queues_are_served_at_once() {
    let cluster = Cluster::start(2);
    let socket = cluster.serve("vm1", CREATE, "--node n1 --num-queues 16");
    let plan = Plan {
        queues: 16,
        depth: 64,
        ..Plan::small()
    };
    let load = Load::start(&socket, plan, Oracle::new(SIZE));
    load.goes_on();
    load.goes_on();
    let outcome = load.finish();
    assert_eq!(outcome.failed, 0);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 2);
    cluster
        .run(1, "volume attach vm1 --num-queues 1000")
        .refused(10, &["1000 queues"]);
}
