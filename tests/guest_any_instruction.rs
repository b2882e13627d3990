//! A process that serves a ring is stopped after each of its instructions. Whatever it has left in memory then is what
//! SIGKILL would have left: a successor must find in it exactly the requests that the guest waits for, in their order.
//!
//! This tests the order of the stores as they were compiled; `src/guest/inflight/tests.rs` tests many more schedules of
//! the order as it was written. `CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo test --test guest_any_instruction` steps through
//! what a release has.

mod guest_driver;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use guest_driver::vm::shared_memory;
use guest_driver::*;
use lockstep::guest::{Chain, GuestMem, InflightQueue, InflightRegion, Ring, RingStart};
use memmap2::Mmap;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const SIZE: u16 = 8;
/// Where the ring is, and how far.
const RING: u64 = 0;
const RING_BYTES: usize = 256;
/// More instructions than the script can have.
const INSTRUCTIONS: u64 = 50_000_000;

/// What a virtual machine keeps while its back-end dies.
struct Kept {
    mem: Arc<GuestMem>,
    info: VhostUserInflight,
    file: File,
    view: Mmap,
}

impl Kept {
    fn new() -> Kept {
        let asked = VhostUserInflight::new(0, 0, 1, 16);
        let (info, file) = InflightRegion::create(&asked, 1).unwrap();
        // SAFETY: the file keeps its size. Looked at only while the process that writes is stopped.
        let view = unsafe { Mmap::map(&file) }.unwrap();
        Kept {
            mem: shared_memory(&[(0, MIB)]),
            info,
            file,
            view,
        }
    }

    /// All of it, in place: a look must cost little.
    fn look(&self) -> (&[u8], &[u8]) {
        let mem = self.mem.get_host_address(GuestAddress(RING)).unwrap();
        // SAFETY: mapped that far while `self.mem` lives; the process that writes is stopped.
        (
            unsafe { std::slice::from_raw_parts(mem, RING_BYTES) },
            &self.view,
        )
    }

    fn write(&self, (mem, region): (&[u8], &[u8])) {
        self.mem.write_slice(mem, GuestAddress(RING)).unwrap();
        self.file.write_all_at(region, 0).unwrap();
    }

    fn serve(&self, driver: &Driver) -> Ring {
        let file = self.file.try_clone().unwrap();
        let region = InflightRegion::open(&self.info, file, 1).unwrap();
        let start = RingStart {
            inflight: InflightQueue::of(&Arc::new(region), 0),
            call: None,
            ..driver.start(0)
        };
        Ring::new(start).unwrap()
    }

    fn driver(&self) -> Driver {
        Driver::new(Arc::clone(&self.mem), RING, SIZE)
    }
}

/// The life of the process: batches, out of order.
fn life(kept: &Kept, driver: &Driver) {
    let mut ring = kept.serve(driver);
    let mut taken: Vec<Chain> = Vec::new();
    for batch in [&[2, 0][..], &[1], &[0, 1, 0], &[2, 1, 0]] {
        while let Some(chain) = ring.pop().unwrap() {
            taken.push(chain);
        }
        for index in batch {
            ring.push_used(taken.remove(*index).complete(1));
        }
        ring.publish();
    }
}

/// The guest: what it made available and has not seen in the used ring, in order.
struct Guest {
    driver: Driver,
    waiting: Vec<u16>,
    answers: usize,
}

impl Guest {
    fn offer(&mut self, head: u16) {
        self.driver.offer_chain(head, &[desc(DATA, 1, WRITE, 0)]);
        self.waiting.push(head);
    }

    /// Reads the used ring, and uses what is free again for as long as it has wishes.
    fn go_on(&mut self) {
        for (head, _) in self.driver.completions() {
            let head = head as u16;
            let at = self.waiting.iter().position(|waits| *waits == head);
            self.waiting
                .remove(at.unwrap_or_else(|| panic!("id {head} is not a head")));
            self.answers += 1;
            if self.driver.avail_idx() < 12 {
                self.offer(head);
            }
        }
    }
}

/// Waits for a child that is traced; whether it has stopped, and by which signal.
fn wait(child: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the answer.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    if libc::WIFSTOPPED(status) {
        return Some(libc::WSTOPSIG(status));
    }
    assert!(
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0,
        "the process ended with {status:#x}"
    );
    None
}

#[test]
fn a_process_may_end_after_any_instruction() {
    let kept = Kept::new();
    let mut guest = Guest {
        driver: kept.driver(),
        waiting: Vec::new(),
        answers: 0,
    };
    for head in [3, 0, 5, 1, 7, 2] {
        guest.offer(head);
    }
    let start = kept.driver();
    // SAFETY: the child runs `life` and ends; nothing that it calls needs a lock another thread may hold, but for the
    // allocator's, which survives a fork.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: these take no pointers.
        unsafe {
            if libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) != 0 {
                libc::_exit(2);
            }
            libc::raise(libc::SIGSTOP);
        }
        life(&kept, &start);
        // SAFETY: as above.
        unsafe { libc::_exit(0) };
    }
    assert!(child > 0, "no process");
    assert_eq!(
        wait(child),
        Some(libc::SIGSTOP),
        "this machine must allow ptrace"
    );
    // Should this test fail, the child goes with it.
    let options = libc::PTRACE_O_EXITKILL;
    // SAFETY: the child is stopped and traced by this thread.
    let set = unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, child, 0, options) };
    assert_eq!(set, 0);

    let (before, copy) = (Kept::new(), Kept::new());
    let mut states = 0;
    for instructions in 0..INSTRUCTIONS {
        // SAFETY: the child is stopped and traced by this thread.
        let stepped = unsafe { libc::ptrace(libc::PTRACE_SINGLESTEP, child, 0, 0) };
        assert_eq!(stepped, 0);
        if wait(child).is_none() {
            println!("{instructions} instructions, {states} states of memory");
            assert_eq!(guest.answers, 9);
            assert!(states > 60, "only {states} states");
            return;
        }
        if kept.look() == before.look() {
            continue;
        }
        states += 1;
        guest.go_on();
        // A successor, in a copy of what there is now.
        before.write(kept.look());
        copy.write(kept.look());
        let mut ring = copy.serve(&copy.driver());
        let heads: Vec<u16> = std::iter::from_fn(|| ring.pop().unwrap())
            .map(|chain| chain.head())
            .collect();
        assert_eq!(heads, guest.waiting, "after {states} changes");
    }
    panic!("the process did not end");
}
