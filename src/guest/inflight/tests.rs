//! A ring is driven by steps that a seed chooses, in a process that ends before a store that is counted down to; the
//! next one goes on in the same memory. What must hold is asked of a naive model: the list of chains that the guest made
//! available, and what it has read in the used ring.

use std::cell::Cell;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::guest::{Chain, GuestMem, Ring, RingStart};

thread_local! {
    /// Stores that this process may still make.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// What a process ends with.
struct Killed;

pub(super) fn before_store() {
    LEFT.set(match LEFT.get() {
        // Without the message of a panic.
        0 => resume_unwind(Box::new(Killed)),
        left => left - 1,
    });
}

/// Runs a process that is killed before its store number `stores`; `None` when it was.
fn process<T>(stores: u64, life: impl FnOnce() -> T) -> Option<T> {
    LEFT.set(stores);
    let end = catch_unwind(AssertUnwindSafe(life));
    LEFT.set(u64::MAX);
    match end {
        Ok(value) => Some(value),
        Err(why) if why.is::<Killed>() => None,
        Err(why) => resume_unwind(why),
    }
}

const SIZE: u16 = 8;
/// The property that QEMU passes; a driver may make its ring smaller.
const ENTRIES: u16 = 16;
const QUEUES: u16 = 2;
const QUEUE: u16 = 1;
const DESC: u64 = 0;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const DATA: u64 = 0x1000;

fn asked() -> VhostUserInflight {
    VhostUserInflight {
        mmap_size: 0,
        mmap_offset: 0,
        num_queues: QUEUES,
        queue_size: ENTRIES,
    }
}

fn event() -> OwnedFd {
    let fd = EventFd::new(EFD_NONBLOCK).unwrap().into_raw_fd();
    // SAFETY: it was just given up by its only owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// The virtual machine: its memory, the region it keeps, and what its driver knows.
struct Guest {
    mem: Arc<GuestMem>,
    info: VhostUserInflight,
    file: File,
    avail: u16,
    used: u16,
    /// Made available and not seen in the used ring, in order.
    outstanding: Vec<u16>,
}

impl Guest {
    /// A ring that has been used before, up to `index`.
    fn new(index: u16) -> Guest {
        let mem = GuestMem::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let (info, file) = Region::create(&asked(), QUEUES).unwrap();
        for head in 0..SIZE {
            let mut desc = [0u8; 16];
            desc[..8].copy_from_slice(&(DATA + u64::from(head)).to_le_bytes());
            desc[8] = 1;
            desc[12] = 2;
            let at = GuestAddress(DESC + 16 * u64::from(head));
            mem.write_slice(&desc, at).unwrap();
        }
        let guest = Guest {
            mem: Arc::new(mem),
            info,
            file,
            avail: index,
            used: index,
            outstanding: Vec::new(),
        };
        guest.put(AVAIL + 2, index);
        guest.put(USED + 2, index);
        guest
    }

    fn put(&self, at: u64, value: u16) {
        self.mem
            .store(value, GuestAddress(at), Ordering::Release)
            .unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        self.mem.load(GuestAddress(at), Ordering::Acquire).unwrap()
    }

    /// Makes one of the free descriptors available.
    fn offer(&mut self, choice: usize) {
        let free: Vec<u16> = (0..SIZE)
            .filter(|head| !self.outstanding.contains(head))
            .collect();
        let Some(head) = free.get(choice % free.len().max(1)) else {
            return;
        };
        self.put(AVAIL + 4 + 2 * u64::from(self.avail % SIZE), *head);
        self.avail = self.avail.wrapping_add(1);
        self.put(AVAIL + 2, self.avail);
        self.outstanding.push(*head);
    }

    /// Reads the used ring. An answer to what is not outstanding is what a Linux driver calls "not a head".
    fn reap(&mut self) {
        while self.used != self.get(USED + 2) {
            let slot = u64::from(self.used % SIZE);
            let head = self.get(USED + 4 + 8 * slot);
            let at = self.outstanding.iter().position(|h| *h == head);
            self.outstanding
                .remove(at.unwrap_or_else(|| panic!("id {head} is not a head")));
            self.used = self.used.wrapping_add(1);
        }
    }

    fn region(&self) -> Region {
        Region::open(&self.info, self.file.try_clone().unwrap(), QUEUES).unwrap()
    }

    /// A process takes the ring over. `base` is what the front-end says.
    fn serve(&self, base: u16) -> Result<Ring, RingError> {
        Ring::new(RingStart {
            index: QUEUE,
            size: SIZE,
            desc: GuestAddress(DESC),
            avail: GuestAddress(AVAIL),
            used: GuestAddress(USED),
            next_avail: base,
            features: 0,
            enabled: true,
            kick: event(),
            call: None,
            mem: Arc::clone(&self.mem),
            inflight: InflightQueue::of(&Arc::new(self.region()), QUEUE),
            log: None,
        })
    }

    /// A process that nobody kills takes everything there is: exactly what the guest waits for, in its order. Answers
    /// it, the newest first.
    fn expect_the_rest(&mut self, base: u16) {
        self.reap();
        let mut ring = self.serve(base).unwrap();
        let mut chains: Vec<Chain> = std::iter::from_fn(|| ring.pop().unwrap()).collect();
        let heads: Vec<u16> = chains.iter().map(Chain::head).collect();
        assert_eq!(heads, self.outstanding);
        assert_eq!(ring.next_avail(), self.avail);
        while let Some(chain) = chains.pop() {
            ring.push_used(chain.complete(1));
        }
        ring.publish();
        self.reap();
        assert_eq!(self.outstanding, [0u16; 0]);
        let part = self.region().part(QUEUE).entry(0, ENTRY_INFLIGHT);
        let in_flight = |head| self.region().part(QUEUE).u8(part + ENTRY * head);
        assert!((0..usize::from(ENTRIES)).all(|head| in_flight(head) == 0));
    }
}

/// One step of a process.
#[derive(Clone, Copy, Debug)]
enum Step {
    Offer(usize),
    Take,
    Answer(usize),
    Publish,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0..64usize).prop_map(Step::Offer),
        3 => Just(Step::Take),
        3 => (0..64usize).prop_map(Step::Answer),
        2 => Just(Step::Publish),
    ]
}

/// A process from its start on, until it is killed or has no steps left.
fn live(guest: &mut Guest, base: u16, steps: &mut impl Iterator<Item = Step>) {
    let mut ring = guest.serve(base).unwrap();
    let mut taken: Vec<Chain> = Vec::new();
    for step in steps {
        match step {
            Step::Offer(choice) => guest.offer(choice),
            Step::Take => taken.extend(ring.pop().unwrap()),
            Step::Answer(choice) if !taken.is_empty() => {
                let chain = taken.remove(choice % taken.len());
                ring.push_used(chain.complete(1));
            }
            Step::Answer(_) => {}
            Step::Publish => {
                ring.publish();
                guest.reap();
            }
        }
    }
}

/// QEMU's base and cloud-hypervisor's.
fn bases(guest: &Guest) -> [u16; 2] {
    [guest.get(USED + 2), guest.avail]
}

#[test]
fn a_process_may_end_before_any_store_of_a_life_with_batches_out_of_order() {
    use Step::{Answer, Offer, Publish, Take};
    let script = [
        [Offer(0), Offer(3), Offer(1), Offer(1), Offer(0)].as_slice(),
        &[Take, Take, Take, Take],
        &[Answer(2), Answer(0), Publish],
        &[Offer(5), Take, Answer(1), Publish],
        &[Take, Offer(0), Answer(2), Answer(0), Answer(0), Publish],
        &[Take, Take, Answer(0), Publish, Offer(0)],
    ]
    .concat();
    // Wraps around while it runs.
    let begin = u16::MAX - 3;
    let mut stores = 0;
    loop {
        let mut ended = false;
        for which in 0..2 {
            let mut guest = Guest::new(begin);
            let life = process(stores, || {
                live(&mut guest, begin, &mut script.iter().copied());
            });
            ended = life.is_some();
            // The next one is killed too, at each of its stores.
            for again in 0.. {
                let base = bases(&guest)[which];
                if process(again, || guest.serve(base).unwrap()).is_some() {
                    break;
                }
            }
            let base = bases(&guest)[which];
            guest.expect_the_rest(base);
        }
        if ended {
            break;
        }
        stores += 1;
    }
    assert!(stores > 60, "the script made only {stores} stores");
}

proptest! {
    #[test]
    fn any_number_of_lives_answers_each_request_once(
        begin in any::<u16>(),
        steps in prop::collection::vec(step(), 0..200),
        lives in prop::collection::vec((0..60u64, any::<bool>()), 0..12),
    ) {
        let mut guest = Guest::new(begin);
        let mut steps = steps.into_iter();
        for (stores, qemu) in lives {
            let base = bases(&guest)[usize::from(!qemu)];
            process(stores, || live(&mut guest, base, &mut steps));
            guest.reap();
        }
        guest.expect_the_rest(begin);
    }
}

#[test]
fn the_layout_is_libvhost_users() {
    let mut guest = Guest::new(40);
    let mut ring = guest.serve(0).unwrap();
    for choice in [3, 0, 0] {
        guest.offer(choice);
    }
    let mut chains: Vec<Chain> = std::iter::from_fn(|| ring.pop().unwrap()).collect();
    ring.push_used(chains.remove(1).complete(1));
    ring.push_used(chains.remove(0).complete(1));
    ring.publish();
    let mut bytes = vec![0; guest.info.mmap_size as usize];
    std::os::unix::fs::FileExt::read_exact_at(&guest.file, &mut bytes, 0).unwrap();

    // 16 + 16 × 16 bytes, up to the next 64.
    assert_eq!(bytes.len(), 2 * 320);
    assert!(
        bytes[..320].iter().all(|b| *b == 0),
        "queue 0 was not started"
    );
    let part = &bytes[320..];
    assert_eq!(part[..8], 0u64.to_ne_bytes(), "features");
    assert_eq!(part[8..10], 1u16.to_ne_bytes(), "version");
    assert_eq!(part[10..12], 16u16.to_ne_bytes(), "desc_num");
    assert_eq!(part[12..14], 3u16.to_ne_bytes(), "last_batch_head");
    assert_eq!(part[14..16], 42u16.to_ne_bytes(), "used_idx");
    // Taken in the order 3, 0, 1; answered 0, 3.
    let entry = |in_flight: u8, next: u16, counter: u64| {
        let mut entry = vec![in_flight, 0, 0, 0, 0, 0];
        entry.extend(next.to_ne_bytes());
        entry.extend(counter.to_ne_bytes());
        entry
    };
    assert_eq!(part[16..32], entry(0, 0, 1));
    assert_eq!(part[32..48], entry(1, 0, 2));
    assert_eq!(part[48..64], entry(0, 0, 0));
    assert_eq!(part[64..80], entry(0, 0, 0));
    assert!(part[80..].iter().all(|b| *b == 0));
    ring.push_used(chains.remove(0).complete(1));
}

#[test]
fn a_region_that_libvhost_user_left_is_understood() {
    // Three taken, one of them answered and its entry not yet cleared; `used_idx` says so.
    let mut guest = Guest::new(7);
    for choice in [4, 1, 1] {
        guest.offer(choice);
    }
    let region = guest.region();
    let part = region.part(QUEUE);
    part.put_u16(VERSION, 1);
    part.put_u16(DESC_NUM, ENTRIES);
    part.put_u16(USED_IDX, 7);
    for (head, counter) in [(4u16, 90), (1, 91), (2, 92)] {
        part.put_u64(part.entry(head, ENTRY_COUNTER), counter);
        part.put_u8(part.entry(head, ENTRY_INFLIGHT), 1);
    }
    part.put_u16(LAST_BATCH_HEAD, 1);
    guest.put(USED + 4 + 8 * 7, 1);
    guest.put(USED + 2, 8);
    guest.reap();
    assert_eq!(guest.outstanding, [4, 2]);
    let ring = guest.serve(0).unwrap();
    assert_eq!((ring.to_resubmit(), ring.next_avail()), (2, 10));
    drop(ring);
    guest.expect_the_rest(0);
}

#[test]
fn a_ring_that_began_anew_is_not_answered_what_it_never_asked() {
    // A process dies with three chains in flight,
    let mut guest = Guest::new(0);
    for choice in 0..3 {
        guest.offer(choice);
    }
    let mut ring = guest.serve(0).unwrap();
    let taken: Vec<Chain> = std::iter::from_fn(|| ring.pop().unwrap()).collect();
    assert_eq!(taken.len(), 3);
    drop(ring);
    // and the driver lays its ring out again, with one chain of its own.
    for index in [0, 500, u16::MAX] {
        let region = guest.region();
        (guest.avail, guest.used) = (index, index);
        guest.outstanding.clear();
        guest.put(USED + 2, index);
        guest.put(AVAIL + 2, index);
        guest.offer(5);
        let ring = guest.serve(0).unwrap();
        assert_eq!((ring.to_resubmit(), ring.discarded()), (0, 3), "at {index}");
        drop(ring);
        guest.expect_the_rest(0);
        // Again for the next index.
        let part = region.part(QUEUE);
        for head in 0..3 {
            part.put_u8(part.entry(head, ENTRY_INFLIGHT), 1);
        }
        part.put_u16(USED_IDX, 0);
    }
    // A reset that the region was told of forgets without a word.
    guest.region().reset();
    assert_eq!(guest.serve(0).unwrap().discarded(), 0);
    guest.expect_the_rest(0);
}

#[test]
fn a_region_that_says_what_nobody_wrote_is_refused() {
    let mut guest = Guest::new(0);
    let big = Guest {
        info: VhostUserInflight {
            queue_size: 4,
            ..guest.info
        },
        ..Guest::new(0)
    };
    let small = big.serve(0);
    assert!(matches!(
        small,
        Err(RingError::InflightSize {
            size: 8,
            entries: 4
        })
    ));

    for choice in 0..3 {
        guest.offer(choice);
    }
    drop(guest.serve(0).unwrap());
    let region = guest.region();
    let part = region.part(QUEUE);
    guest.put(USED + 2, 2);
    part.put_u16(LAST_BATCH_HEAD, ENTRIES);
    assert!(matches!(
        guest.serve(0),
        Err(RingError::InflightDamaged { head: ENTRIES })
    ));
    part.put_u16(LAST_BATCH_HEAD, 0);
    part.put_u16(part.entry(0, ENTRY_NEXT), u16::MAX);
    assert!(matches!(
        guest.serve(0),
        Err(RingError::InflightDamaged { head: u16::MAX })
    ));

    let open = || Region::open(&guest.info, guest.file.try_clone().unwrap(), QUEUES).map(drop);
    part.put_u16(DESC_NUM, 15);
    assert!(matches!(
        open(),
        Err(InflightError::Count {
            queue: 1,
            said: 15,
            entries: 16
        })
    ));
    part.put_u16(DESC_NUM, 16);
    part.put_u16(VERSION, 2);
    assert!(matches!(
        open(),
        Err(InflightError::Version {
            queue: 1,
            version: 2,
            features: 0
        })
    ));
    part.put_u16(VERSION, 1);
    part.put_u64(FEATURES, 1);
    assert!(matches!(
        open(),
        Err(InflightError::Version { features: 1, .. })
    ));
    part.put_u64(FEATURES, 0);
    open().unwrap();
}

#[test]
fn a_region_is_taken_only_whole_and_sealed() {
    let (info, file) = Region::create(&asked(), QUEUES).unwrap();
    assert_eq!(rustix::fs::fcntl_get_seals(&file).unwrap(), SEALS);
    let open = |info: VhostUserInflight, file: &File| {
        Region::open(&info, file.try_clone().unwrap(), QUEUES).map(drop)
    };
    open(info, &file).unwrap();
    for bad in [
        VhostUserInflight {
            num_queues: 3,
            ..info
        },
        VhostUserInflight {
            num_queues: 0,
            ..info
        },
    ] {
        assert!(matches!(
            open(bad, &file),
            Err(InflightError::Queues { have: 2, .. })
        ));
        assert!(Region::create(&bad, QUEUES).is_err());
    }
    for bad in [
        VhostUserInflight {
            queue_size: 0,
            ..info
        },
        VhostUserInflight {
            queue_size: MAX_RING_SIZE + 1,
            ..info
        },
    ] {
        assert!(matches!(open(bad, &file), Err(InflightError::Entries(_))));
        assert!(Region::create(&bad, QUEUES).is_err());
    }
    for bad in [
        VhostUserInflight {
            mmap_size: info.mmap_size - 1,
            ..info
        },
        VhostUserInflight {
            mmap_size: info.mmap_size + 1,
            ..info
        },
        VhostUserInflight {
            mmap_offset: 4096,
            ..info
        },
        VhostUserInflight {
            mmap_offset: u64::MAX,
            ..info
        },
        VhostUserInflight {
            queue_size: 32,
            ..info
        },
    ] {
        assert!(
            matches!(open(bad, &file), Err(InflightError::Size { .. })),
            "{} bytes at {}",
            bad.mmap_size,
            bad.mmap_offset
        );
    }

    // Files that the front-end could shrink under us.
    let ordinary = tempfile::tempfile().unwrap();
    ordinary.set_len(info.mmap_size).unwrap();
    assert!(matches!(
        open(info, &ordinary),
        Err(InflightError::NotSealed)
    ));
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = File::from(rustix::fs::memfd_create("front-end", flags).unwrap());
    memory.set_len(8192).unwrap();
    assert!(matches!(open(info, &memory), Err(InflightError::NotSealed)));
    // One of huge pages, where the kernel has them: their mapping promises nothing.
    if let Ok(huge) = rustix::fs::memfd_create("front-end", flags | MemfdFlags::HUGETLB) {
        let huge = File::from(huge);
        huge.set_len(2 << 20).unwrap();
        rustix::fs::fcntl_add_seals(&huge, SEALS).unwrap();
        assert!(matches!(open(info, &huge), Err(InflightError::NotSealed)));
    }
    // Its own sealed one is as good as ours, also in the middle of a larger one; off a page it cannot be mapped.
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK).unwrap();
    open(
        VhostUserInflight {
            mmap_offset: 4096,
            ..info
        },
        &memory,
    )
    .unwrap();
    let askew = open(
        VhostUserInflight {
            mmap_offset: 64,
            ..info
        },
        &memory,
    );
    assert!(
        matches!(askew, Err(InflightError::Io { what: "mapped", .. })),
        "{askew:?}"
    );
    // Nor can one that must not be written.
    rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE).unwrap();
    assert!(matches!(
        open(info, &memory),
        Err(InflightError::Io { what: "mapped", .. })
    ));
}
