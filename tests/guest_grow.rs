//! A real guest whose disk grows: no reboot, no error, and what is new is zeros until it writes.

mod cluster_support;

use std::path::Path;

use cluster_support::qemu::programs;
use cluster_support::vm::Guest;
use cluster_support::{Cluster, copies, eventually};
use rustix::process::Signal;

const CREATE: &str = "--size 64MiB --replicas 2 --master n1 --failure-mode alwayson";
const OLD: u64 = 64 << 20;
const NEW: u64 = 192 << 20;

/// A guest that writes to its disk of the old size and waits for the new one.
fn waiting(cluster: &Cluster, qemu: &Path, socket: &Path) -> Guest {
    let console = cluster.dir.path().join("console");
    let sectors = format!("sectors={}", NEW / 512);
    let guest = Guest::boot_in(qemu, socket, "grow", &[&sectors], &console);
    eventually("the guest writes", || (guest.steps() >= 2).then_some(()));
    let seen = format!("GUEST-SECTORS {}", OLD / 512);
    assert!(guest.console().contains(&seen), "{}", guest.console());
    guest
}

fn is_content_and_off(guest: &mut Guest) {
    eventually("the guest's verdict", || guest.is_content().then_some(()));
    eventually("the guest is off", || guest.is_off().then_some(()));
}

#[test]
fn a_linux_guest_sees_its_disk_grow_without_a_reboot() {
    programs().iter().for_each(|qemu| sees_its_disk_grow(qemu));
}

fn sees_its_disk_grow(qemu: &Path) {
    let cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let mut guest = waiting(&cluster, qemu, &socket);
    // When the volume is made larger under it, it says so on /sys/block, and the guest uses all of it.
    cluster.ok(2, "volume update vm1 --size 192MiB");
    assert_eq!(cluster.volume(3, "vm1")["size"], NEW);
    is_content_and_off(&mut guest);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn a_guest_that_was_told_in_vain_is_told_again_by_the_next_process() {
    programs().iter().for_each(|qemu| is_told_again(qemu));
}

/// QEMU asks for the new size when it is told that there is one, and at no other time.
fn is_told_again(qemu: &Path) {
    // Given a QEMU that stands still while the volume grows: what it is told lies in its socket,
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let mut guest = waiting(&cluster, qemu, &socket);
    let process = rustix::process::Pid::from_raw(guest.pid() as i32).unwrap();
    let signal = |what| rustix::process::kill_process(process, what).unwrap();
    signal(Signal::STOP);
    cluster.ok(2, "volume update vm1 --size 192MiB");
    eventually("QEMU is told", || {
        let told = format!("{} sectors now", NEW / 512);
        cluster.log(1).contains(&told).then_some(())
    });
    // when its node is dead by the time that it could ask, and comes back,
    cluster.kill(1);
    signal(Signal::CONT);
    cluster.start_node(1);
    // then the guest sees the new size, and uses all of it.
    is_content_and_off(&mut guest);
    cluster.wait_for(1, "vm1", "is whole", |v| copies(v, "in_sync").len() == 3);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}

#[test]
fn a_replica_that_is_killed_while_the_disk_grows_costs_the_guest_nothing() {
    let mut cluster = Cluster::start(3);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let mut guest = waiting(&cluster, Path::new("qemu-system-x86_64"), &socket);
    // Given a replica that does not answer the request to make room, and then dies,
    cluster.freeze(3);
    cluster.ok(1, "volume update vm1 --size 192MiB --async");
    cluster.kill(3);
    // then the volume grows without it, and the guest sees that and no error;
    is_content_and_off(&mut guest);
    let volume = cluster.volume(1, "vm1");
    assert_eq!(
        (&volume["size"], copies(&volume, "in_sync").len()),
        (&NEW.into(), 2)
    );
    // it has the new size, and what the guest wrote there, when it is back.
    cluster.start_node(3);
    cluster.wait_for(1, "vm1", "is whole", |v| copies(v, "in_sync").len() == 3);
    cluster.detach(1, "vm1");
    assert_eq!(cluster.copies_are_identical(1, "vm1").len(), 3);
}
