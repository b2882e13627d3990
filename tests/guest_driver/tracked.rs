//! A front-end that keeps the in-flight region, with requests that are known to be in flight; in QEMU's and in
//! cloud-hypervisor's order.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VringConfigData};

use super::vm::{LINUX, Vm, regions, until};
use super::*;

/// The region and its descriptor, as a front-end keeps them.
pub struct Region {
    pub info: VhostUserInflight,
    pub file: File,
}

impl Region {
    /// Requests of queue 0 that were taken and not answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight_of(0)
    }

    /// The same of any queue; each has its part, at a multiple of 64 bytes.
    pub fn in_flight_of(&self, queue: u64) -> usize {
        let part = queue * (16u64 + 16 * 128).next_multiple_of(64);
        let flag = |head: &u16| {
            let mut byte = [0];
            let at = part + 16 + 16 * u64::from(*head);
            self.file.read_exact_at(&mut byte, at).unwrap();
            byte[0] != 0
        };
        (0..128).filter(flag).count()
    }
}

/// One request on a chain of its own: (head, type, sector, 4 KiB filled with this byte).
pub type Wish = (u16, u32, u64, u8);

/// Where a head's buffers are.
pub fn buffers(head: u16) -> u64 {
    MIB + 0x2000 * u64::from(head)
}

/// Puts a request into the ring and kicks.
pub fn submit(vm: &mut Vm, (head, kind, sector, fill): Wish) {
    let at = buffers(head);
    vm.driver.write(at, &header(kind, sector));
    vm.driver.write(at + 0x1000, &[fill; 4096]);
    vm.driver.write(at + 0x800, &[0xff]);
    let direction = if kind == T_IN { WRITE } else { 0 };
    let mut chain = vec![desc(at, 16, 0, 0)];
    if kind != T_FLUSH {
        chain.push(desc(at + 0x1000, 4096, direction, 0));
    }
    chain.push(desc(at + 0x800, 1, WRITE, 0));
    vm.driver.offer_chain(head, &chain);
    vm.driver.kick.write(1).unwrap();
}

/// Waits for the answers to these requests, which must be good and one each.
pub fn answered(vm: &mut Vm, wishes: &[Wish]) {
    let mut got = Vec::new();
    until("all are answered", || {
        got.extend(vm.driver.completions().iter().map(|(head, _)| *head as u16));
        got.len() >= wishes.len()
    });
    got.sort_unstable();
    let mut heads: Vec<u16> = wishes.iter().map(|wish| wish.0).collect();
    heads.sort_unstable();
    assert_eq!(got, heads);
    for head in heads {
        assert_eq!(vm.driver.read(buffers(head) + 0x800, 1), [0]);
    }
}

/// What 4 KiB of the disk are full of.
pub fn reads(vm: &mut Vm, sector: u64) -> u8 {
    let wish = (60, T_IN, sector, 0xee);
    submit(vm, wish);
    answered(vm, &[wish]);
    let data = vm.driver.read(buffers(60) + 0x1000, 4096);
    assert!(data.iter().all(|byte| *byte == data[0]));
    data[0]
}

/// Starts another queue, whose driver is not the machine's own.
pub fn start_queue(vm: &mut Vm, index: usize, driver: &Driver, base: u16) {
    let host = |guest| vm.host_addr(guest);
    let vring = VringConfigData {
        desc_table_addr: host(driver.desc),
        used_ring_addr: host(driver.used),
        avail_ring_addr: host(driver.avail),
        ..vm.vring()
    };
    vm.frontend.set_vring_num(index, driver.size).unwrap();
    vm.frontend.set_vring_base(index, base).unwrap();
    vm.frontend.set_vring_addr(index, &vring).unwrap();
    vm.frontend.set_vring_call(index, &driver.call).unwrap();
    vm.frontend.set_vring_kick(index, &driver.kick).unwrap();
    vm.frontend.set_vring_enable(index, true).unwrap();
    vm.settle();
}

/// A front-end sends everything again to a process that has just begun.
pub fn start(vm: &mut Vm, region: &mut Option<Region>, base: u16, cloud_hypervisor: bool) {
    vm.negotiate_with(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    vm.frontend.set_features(LINUX).unwrap();
    let give_region = |vm: &mut Vm, region: &mut Option<Region>| {
        let region = region.get_or_insert_with(|| {
            let asked = VhostUserInflight::new(0, 0, 2, 128);
            let (info, file) = vm.frontend.get_inflight_fd(&asked).unwrap();
            Region { info, file }
        });
        let fd = region.file.as_raw_fd();
        vm.frontend.set_inflight_fd(&region.info, fd).unwrap();
    };
    if cloud_hypervisor {
        vm.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        vm.frontend.set_mem_table(&regions(&vm.driver.mem)).unwrap();
        vm.frontend.set_vring_num(0, 128).unwrap();
        give_region(vm, region);
        vm.frontend.set_vring_addr(0, &vm.vring()).unwrap();
        vm.frontend.set_vring_base(0, base).unwrap();
        vm.frontend.set_vring_call(0, &vm.driver.call).unwrap();
        vm.frontend.set_vring_kick(0, &vm.driver.kick).unwrap();
        vm.frontend.set_vring_enable(0, true).unwrap();
    } else {
        give_region(vm, region);
        vm.start_like_qemu(LINUX, base);
    }
    vm.settle();
}
