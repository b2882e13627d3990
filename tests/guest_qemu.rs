//! What QEMU and its firmware do with a disk beyond reading and writing: booting from it, rebooting, pulling it out and
//! putting it in again.

mod cluster_support;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use cluster_support::client::Disk;
use cluster_support::qemu::{Qemu, programs};
use cluster_support::{Cluster, eventually};
use serde_json::json;

const CREATE: &str = "--size 64MiB --replicas 1 --master n1";
const SECTOR: usize = 512;

/// What the boot sector prints: the second sector.
const GREETING: &[u8] = b"LOCKSTEP-BOOTED\n\0";
/// QEMU's exit status when 0x10 is written to its isa-debug-exit device.
const BOOTED: i32 = 0x10 << 1 | 1;

/// A boot sector in the firmware's 16-bit mode: reads sector 1 by INT 13h, prints it on the serial port, writes it to sector 2
/// and has QEMU exit with [`BOOTED`].
fn boot_sector() -> [u8; SECTOR] {
    const CODE: &[u8] = &[
        0xfa, // cli
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x8e, 0xc0, // mov es, ax
        0x8e, 0xd0, // mov ss, ax
        0xbc, 0x00, 0x7c, // mov sp, 0x7c00
        0xfb, // sti
        0x88, 0x16, 0x00, 0x05, // mov [0x500], dl: the drive
        0xb4, 0x42, // mov ah, 0x42: extended read
        0xbe, 0x60, 0x7c, // mov si, 0x7c60: what to read
        0xcd, 0x13, // int 0x13
        0x72, 0x23, // jc failed
        0xbe, 0x00, 0x7e, // mov si, 0x7e00
        0xac, // print: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x06, // jz printed
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0xeb, 0xf5, // jmp print
        0x8a, 0x16, 0x00, 0x05, // printed: mov dl, [0x500]
        0xb8, 0x00, 0x43, // mov ax, 0x4300: extended write
        0xbe, 0x70, 0x7c, // mov si, 0x7c70
        0xcd, 0x13, // int 0x13
        0x72, 0x07, // jc failed
        0xb0, 0x10, // mov al, 0x10
        0xba, 0xf4, 0x00, // mov dx, 0xf4
        0xee, // out dx, al
        0xf4, // hlt
        0xb0, 0x11, // failed: mov al, 0x11
        0xba, 0xf4, 0x00, // mov dx, 0xf4
        0xee, // out dx, al
        0xf4, // hlt
    ];
    // Disk address packets: one sector, from or to 0:7e00.
    let packet = |sector: u8| [16, 0, 1, 0, 0x00, 0x7e, 0, 0, sector, 0, 0, 0, 0, 0, 0, 0];
    let mut sector = [0; SECTOR];
    sector[..CODE.len()].copy_from_slice(CODE);
    sector[0x60..0x70].copy_from_slice(&packet(1));
    sector[0x70..0x80].copy_from_slice(&packet(2));
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[test]
fn firmware_boots_from_a_volume() {
    programs().iter().for_each(|qemu| boots(qemu));
}

fn boots(program: &Path) {
    // Given a volume with a boot sector,
    let cluster = Cluster::start(2);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let mut disk = Disk::open(&socket, 1, 1);
    let buffer = disk.buffer(0, 2 * SECTOR);
    buffer.fill(0);
    buffer[..SECTOR].copy_from_slice(&boot_sector());
    buffer[SECTOR..SECTOR + GREETING.len()].copy_from_slice(GREETING);
    disk.write(0, 0, 2 * SECTOR);
    assert_eq!(disk.finish(), 0);
    drop(disk);
    // when a machine without anything else is switched on,
    let serial = cluster.dir.path().join("serial");
    let status = Command::new(program)
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-m",
            "64M",
        ])
        .args(["-machine", "q35,accel=tcg,memory-backend=mem"])
        .args(["-object", "memory-backend-memfd,id=mem,size=64M,share=on"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .arg("-chardev")
        .arg(format!("socket,id=c0,path={}", socket.display()))
        .args(["-device", "vhost-user-blk-pci,chardev=c0,bootindex=0"])
        .arg("-serial")
        .arg(format!("file:{}", serial.display()))
        .stdin(Stdio::null())
        .status()
        .expect("scripts/test installs QEMU");
    // then its firmware reads and writes the volume.
    let said = std::fs::read(&serial).unwrap();
    let text = String::from_utf8_lossy(&said);
    assert_eq!(status.code(), Some(BOOTED), "it said {text:?}");
    let text = &GREETING[..GREETING.len() - 1];
    assert!(said.windows(text.len()).any(|w| w == text), "{said:?}");
    let mut disk = Disk::open(&socket, 1, 1);
    disk.read(0, 2 * SECTOR as u64, SECTOR);
    assert_eq!(disk.finish(), 0);
    assert!(disk.buffer(0, SECTOR).starts_with(GREETING));
}

#[test]
fn a_guest_reboots() {
    programs().iter().for_each(|qemu| reboots(qemu));
}

fn reboots(program: &Path) {
    let cluster = Cluster::start(2);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let mut guest = Qemu::start(
        program,
        cluster.dir.path(),
        0,
        &socket,
        &["--run", "reboot", "--reboot"],
    );
    let end = eventually("the guest's verdict", || {
        guest.goes_on();
        let console = guest.console();
        console.contains("GUEST-OK").then_some(console)
    });
    for boot in 1..=3 {
        assert!(end.contains(&format!("HEARTBEAT boot={boot}")), "{end}");
    }
}

fn says(guest: &mut Qemu, line: &str) {
    eventually(line, || {
        guest.goes_on();
        guest.console().contains(line).then_some(())
    });
}

#[test]
fn a_disk_is_pulled_out_of_a_running_guest_and_put_in_again() {
    programs().iter().for_each(|qemu| pulls_a_disk(qemu));
}

fn pulls_a_disk(program: &Path) {
    let cluster = Cluster::start(2);
    let socket = cluster.serve("vm1", CREATE, "--node n1");
    let dir: &Path = cluster.dir.path();
    let mut guest = Qemu::start(program, dir, 0, &socket, &["--run", "slots", "--slots"]);
    for number in 1..=3 {
        says(&mut guest, &format!("PRESENT {number} "));
        guest.ask("device_del", json!({"id": "disk0"}));
        says(&mut guest, &format!("GONE {number}"));
        // QEMU lets go of the socket with the device; its end is not reused.
        eventually("the device is gone", || {
            let path = "/machine/peripheral";
            let left = guest.ask("qom-list", json!({"path": path})).to_string();
            (!left.contains("disk0")).then_some(())
        });
        eventually("the connection is free", || {
            guest.try_ask("chardev-remove", json!({"id": "blk0"})).ok()
        });
        let address = json!({"type": "unix", "data": {"path": socket}});
        let backend = json!({
            "type": "socket",
            "data": {"addr": address, "server": false}
        });
        guest.ask("chardev-add", json!({"id": "blk0", "backend": backend}));
        guest.ask(
            "device_add",
            json!({"driver": "vhost-user-blk-pci", "id": "disk0", "chardev": "blk0", "bus": "slot0"}),
        );
    }
    says(&mut guest, "PRESENT 4 ");
    let mut control = UnixStream::connect(&guest.control).unwrap();
    control.write_all(b"stop\n").unwrap();
    says(&mut guest, "GUEST-OK");
}
