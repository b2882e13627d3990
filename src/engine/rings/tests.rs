//! Rings that stop, or lose their front-end, with requests under way.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::engine::disk::{DataFile, Disk, Token, Work};
use crate::guest::{DirtyLog, InflightQueue, InflightRegion};
use crate::replication::failure_mode::FailureMode;
use crate::replication::ids::{BootId, CopyId, Epoch, Instance, NodeName, Tag, VolumeId};
use crate::replication::message::Proof;
use crate::replication::record::{self, Base, CopyEntry, CopyStatus, Record, State};
use crate::replication::timing::Timing;

const SIZE: u16 = 8;
const DESC: u64 = 0;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const DATA: u64 = 0x2000;
const START: Nanos = Nanos(1_000_000_000);

/// Never gets beyond asking for promises: what is submitted waits, and the tests answer it.
fn attachment() -> Attachment<Bytes> {
    let me = record::Attachment {
        node: NodeName("n1".into()),
        boot_id: BootId([1; 16]),
        instance: Instance([1; 16]),
    };
    let copy = CopyEntry {
        copy_id: CopyId([1; 16]),
        node: NodeName("n1".into()),
        status: CopyStatus::InSync,
        base: Base {
            since: Epoch(1),
            last: None,
        },
        boot_id: None,
        leaving: false,
    };
    let record = Record {
        volume_id: VolumeId([1; 16]),
        size: 1 << 20,
        block_size: 512,
        replicas_wanted: 0,
        failure_mode: FailureMode::Soft(None),
        suspend_deadline_ms: 30_000,
        compress: false,
        epoch: Epoch(1),
        epoch_tag: Tag(1),
        state: State::Clean,
        attachment: None,
        master: copy.copy_id,
        preferred: None,
        grow: None,
        copies: vec![copy],
        lineage: vec![(Epoch(1), Tag(1))],
    };
    Attachment::new(me, record, 1, Proof::None, Timing::DEFAULT, 1, START)
}

/// Of a volume of 64 MiB and a MiB.
fn rings() -> Rings {
    let serial = Serial::new("v");
    Rings::new("test/v".into(), serial, 65 << 20, BlockSize::B512, false)
}

fn event() -> OwnedFd {
    let fd = EventFd::new(EFD_NONBLOCK).unwrap().into_raw_fd();
    // SAFETY: it was just given up by its only owner.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn memory_file() -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file: File = rustix::fs::memfd_create("log", flags).unwrap().into();
    file.set_len(4096).unwrap();
    file
}

fn log_in(file: File) -> DirtyLog {
    DirtyLog::open(&VhostUserLog::new(4096, 0), file).unwrap()
}

/// A guest and the rings of its volume.
struct World {
    mem: Arc<GuestMem>,
    rings: Rings,
    attachment: Attachment<Bytes>,
    avail: u16,
    inflight: Option<InflightQueue>,
}

impl World {
    fn new(inflight: Option<InflightQueue>) -> World {
        World::with_memory(0x10000, inflight)
    }

    fn with_memory(bytes: usize, inflight: Option<InflightQueue>) -> World {
        let mem = GuestMem::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        World {
            mem: Arc::new(mem),
            rings: rings(),
            attachment: attachment(),
            avail: 0,
            inflight,
        }
    }

    fn tracked() -> World {
        let asked = VhostUserInflight::new(0, 0, 1, SIZE);
        let (info, file) = InflightRegion::create(&asked, 1).unwrap();
        let region = InflightRegion::open(&info, file, 1).unwrap();
        World::new(InflightQueue::of(&Arc::new(region), 0))
    }

    /// Starts the ring; `base` is the front-end's.
    fn start(&mut self, base: u16, enabled: bool) {
        let start = RingStart {
            index: 0,
            size: SIZE,
            desc: GuestAddress(DESC),
            avail: GuestAddress(AVAIL),
            used: GuestAddress(USED),
            next_avail: base,
            features: 1 << 28,
            enabled,
            kick: event(),
            call: None,
            mem: Arc::clone(&self.mem),
            inflight: self.inflight.clone(),
            log: None,
        };
        assert_eq!(self.rings.start(start), Ok(0));
    }

    /// Writes the descriptors from `head` on, each one's next behind it: (address, length, flags).
    fn chain(&self, head: u16, buffers: &[(u64, u32, u16)]) {
        for (index, (addr, len, flags)) in (head..).zip(buffers) {
            let desc = DESC + 16 * u64::from(index);
            self.put(desc, &addr.to_le_bytes());
            self.put(desc + 8, &len.to_le_bytes());
            self.put(desc + 12, &flags.to_le_bytes());
            self.put(desc + 14, &(index + 1).to_le_bytes());
        }
    }

    /// Makes a write of one sector available on the two descriptors from `head` on.
    fn offer(&mut self, head: u16) {
        let put = |at: u64, bytes: &[u8]| self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
        let at = DATA + 0x400 * u64::from(head);
        put(at, &1u32.to_le_bytes());
        put(at + 8, &u64::from(head).to_le_bytes());
        put(at + 0x300, &[0xff]);
        self.chain(head, &[(at, 16 + 512, 1), (at + 0x300, 1, 2)]);
        put(
            AVAIL + 4 + 2 * u64::from(self.avail % SIZE),
            &head.to_le_bytes(),
        );
        self.avail += 1;
        self.mem
            .store(self.avail, GuestAddress(AVAIL + 2), Ordering::Release)
            .unwrap();
        if self.rings.slot(0).is_some() {
            self.rings.kicked(0);
        }
    }

    /// Makes a discard (11) or write-zeroes (13) of segments (sector, sectors) available in the same way.
    fn offer_zeroes(&mut self, head: u16, kind: u32, segments: &[(u64, u32)]) {
        self.offer(head);
        let put = |at: u64, bytes: &[u8]| self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
        let at = DATA + 0x400 * u64::from(head);
        put(at, &kind.to_le_bytes());
        for (i, (sector, sectors)) in (0u64..).zip(segments) {
            put(at + 16 + 16 * i, &sector.to_le_bytes());
            put(at + 24 + 16 * i, &sectors.to_le_bytes());
            put(at + 28 + 16 * i, &0u32.to_le_bytes());
        }
        let len = 16 + 16 * segments.len() as u32;
        put(DESC + 16 * u64::from(head) + 8, &len.to_le_bytes());
    }

    /// A worker's turn. Whether there is more to take at once.
    fn turn(&mut self) -> bool {
        self.rings.take(START, &mut self.attachment, false);
        self.rings.end_turn(false)
    }

    /// What is under way, oldest first.
    fn under_way(&self) -> Vec<RequestId> {
        let all = self.rings.parts.in_order();
        all.into_iter().map(|seq| RequestId(seq.0)).collect()
    }

    fn fail(&mut self, id: RequestId) {
        let attachment = &mut self.attachment;
        self.rings
            .complete(START, attachment, id, Outcome::IoError, None);
    }

    fn complete(&mut self, id: RequestId) {
        self.end(id, Outcome::Ok);
    }

    fn end(&mut self, id: RequestId, outcome: Outcome) {
        let attachment = &mut self.attachment;
        self.rings.complete(START, attachment, id, outcome, None);
    }

    fn stop(&mut self) -> Receiver<GuestAnswer> {
        let (reply, answer) = sync_channel(1);
        self.rings.stop(START, 0, reply);
        answer
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// The status byte of a request.
    fn status(&self, head: u16) -> u8 {
        let at = DATA + 0x400 * u64::from(head) + 0x300;
        self.mem.read_obj(GuestAddress(at)).unwrap()
    }

    /// Heads in the used ring.
    fn answered(&self) -> Vec<u32> {
        let at = |index: u16| GuestAddress(USED + 4 + 8 * u64::from(index % SIZE));
        let idx: u16 = self.mem.read_obj(GuestAddress(USED + 2)).unwrap();
        (0..idx)
            .map(|i| self.mem.read_obj(at(i)).unwrap())
            .collect()
    }
}

#[test]
fn a_ring_that_stopped_with_requests_under_way_submits_them_again_when_those_have_ended() {
    // Given a ring that was stopped when the time for its two requests was over,
    let mut world = World::tracked();
    world.start(0, true);
    world.offer(0);
    world.offer(2);
    world.turn();
    let old = world.under_way();
    assert_eq!(old.len(), 2);
    let answer = world.stop();
    assert!(world.rings.stopped(START).is_empty());
    assert_eq!(
        answer.try_recv(),
        Err(TryRecvError::Empty),
        "it waits for them"
    );
    assert_eq!(world.rings.stopped(START.after(DRAIN)).len(), 1);
    assert_eq!(answer.try_recv(), Ok(Ok(2)));
    // when it goes on,
    world.start(2, true);
    // then nothing is taken while the disk may still use the guest's memory for them, nor does the worker spin,
    world.offer(4);
    assert!(!world.turn());
    world.complete(old[1]);
    assert!(!world.turn());
    assert_eq!(world.under_way(), old[..1]);
    assert_eq!(
        world.answered(),
        [0u32; 0],
        "their answers are of another life"
    );
    // and once they ended all are taken in the guest's order, and answered once each.
    world.complete(old[0]);
    assert!(world.rings.end_turn(false), "there is more to take");
    world.turn();
    let new = world.under_way();
    assert_eq!(new.len(), 3);
    for id in new {
        world.complete(id);
    }
    world.turn();
    assert_eq!(world.answered(), [0, 2, 4]);
}

/// Heads 0 and 2 are taken and stay under way.
fn two_under_way(world: &mut World) -> Vec<RequestId> {
    world.start(0, true);
    world.offer(0);
    world.offer(2);
    world.turn();
    world.under_way()
}

#[test]
fn without_tracking_what_does_not_end_fails_when_the_ring_stops() {
    // Given two requests that nobody would remember, and one of which the kernel still uses the memory,
    let mut world = World::new(None);
    let old = two_under_way(&mut world);
    let part = world.rings.parts.get_mut(Seq(old[0].0)).unwrap();
    let in_use = GuestPart {
        request: Rc::clone(&part.guest),
        start: 0,
        len: 512,
    };
    let in_use = in_use.pin();
    // when the ring stops,
    let answer = world.stop();
    world.rings.stopped(START.after(DRAIN));
    // then the other one has failed, and its end comes to nothing.
    assert_eq!(answer.try_recv(), Ok(Ok(2)));
    assert_eq!(world.answered(), [2]);
    assert_eq!((world.status(0), world.status(2)), (0xff, 1));
    drop(in_use);
    world.complete(old[1]);
    world.complete(old[0]);
    assert_eq!(world.answered(), [2]);
    assert_eq!((world.status(0), world.status(2)), (0xff, 1));
}

#[test]
fn what_does_not_end_waits_where_the_machine_is_and_where_it_goes() {
    for (moves, region) in [(false, true), (false, false), (true, false)] {
        // Given three requests of which the second is answered,
        let mut world = World::tracked();
        two_under_way(&mut world);
        world.offer(4);
        world.turn();
        let old = world.under_way();
        world.complete(old[1]);
        world.turn();
        let log = memory_file();
        let all = RingLog {
            log: Arc::new(log_in(log.try_clone().unwrap())),
            all: true,
            used: None,
        };
        world.rings.set_log(0, moves.then_some(all));
        // when the ring stops,
        let answer = world.stop();
        world.rings.stopped(START.after(DRAIN));
        assert_eq!(answer.try_recv(), Ok(Ok(3)));
        // then exactly the two others are submitted again, in their order, here and where nobody has the region.
        world.rings = World::new(None).rings;
        if !region {
            world.inflight = World::tracked().inflight;
        }
        world.start(3, true);
        world.offer(2);
        world.turn();
        for id in world.under_way() {
            world.complete(id);
        }
        world.turn();
        assert_eq!(world.answered(), [2, 0, 4, 2]);
        // What the ring tells the new place is in the log of what goes there.
        let mut bits = [0];
        log.read_exact_at(&mut bits, 0).unwrap();
        assert_eq!(bits, [u8::from(moves)]);
    }
}

#[test]
fn rings_that_stop_one_after_another_wait_once() {
    let mut world = World::tracked();
    two_under_way(&mut world);
    let over = START.after(DRAIN);
    world.stop();
    assert_eq!(world.rings.stopped(over).len(), 1);
    let stop_again = |world: &mut World, now: Nanos| {
        world.start(2, true);
        let (reply, answer) = sync_channel(1);
        world.rings.stop(now, 0, reply);
        (world.rings.stopped(now).len(), answer)
    };
    // Its requests are under way still, and there is no more time for them.
    assert_eq!(stop_again(&mut world, over).0, 1);
    // Much later it is another matter.
    let later = over.after(SERIES);
    let (stopped, answer) = stop_again(&mut world, later);
    assert_eq!(stopped, 0);
    assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
    assert_eq!(world.rings.stopped(later.after(DRAIN)).len(), 1);
}

#[test]
fn without_tracking_late_answers_of_a_stopped_ring_are_dropped() {
    let mut world = World::new(None);
    world.start(0, true);
    world.offer(0);
    world.turn();
    let old = world.under_way();
    let answer = world.stop();
    world.rings.stopped(START.after(DRAIN));
    assert_eq!(answer.try_recv(), Ok(Ok(1)));
    assert_eq!(world.answered(), [0]);
    // The guest's driver began anew meanwhile, and uses the same head.
    world.start(1, true);
    world.offer(0);
    world.complete(old[0]);
    world.turn();
    world.turn();
    assert_eq!(world.answered(), [0]);
    let new = world.under_way();
    assert_eq!(new.len(), 1);
    world.complete(new[0]);
    world.turn();
    assert_eq!(world.answered(), [0, 0]);
}

#[test]
fn a_read_that_ends_when_its_ring_has_stopped_is_marked_in_the_log() {
    // Given a ring that stopped while a disk reads into the guest's memory,
    let mut world = World::tracked();
    world.start(0, true);
    world.offer(0);
    world.put(DATA, &0u32.to_le_bytes());
    world.put(DESC, &DATA.to_le_bytes());
    world.put(DESC + 8, &16u32.to_le_bytes());
    world.put(DESC + 12, &1u16.to_le_bytes());
    world.put(DESC + 16, &(DATA + 0x1000).to_le_bytes());
    world.put(DESC + 24, &513u32.to_le_bytes());
    world.turn();
    let read = world.under_way();
    assert_eq!(read.len(), 1);
    world.stop();
    world.rings.stopped(START.after(DRAIN));
    // when the machine is migrated and then the read ends,
    let file = memory_file();
    let log = RingLog {
        log: Arc::new(log_in(file.try_clone().unwrap())),
        all: true,
        used: None,
    };
    world.rings.set_log(0, Some(log));
    world.complete(read[0]);
    // then its page is marked.
    let mut bits = [0; 2];
    file.read_exact_at(&mut bits, 0).unwrap();
    assert_eq!(bits, [1 << 3, 0]);
}

#[test]
fn what_a_lost_connection_left_is_answered_on_the_next_one() {
    let mut world = World::tracked();
    world.start(0, true);
    world.offer(0);
    world.offer(2);
    world.turn();
    let old = world.under_way();
    world.complete(old[1]);
    world.turn();
    assert_eq!(world.answered(), [2]);
    world.rings.disconnect();
    // An answer that nobody waits for any more, and none to come.
    world.complete(old[0]);
    assert_eq!(world.answered(), [2]);
    world.offer(4);
    // cloud-hypervisor's base.
    world.start(3, true);
    world.turn();
    let new = world.under_way();
    assert_eq!(new.len(), 2);
    world.complete(new[0]);
    world.complete(new[1]);
    world.turn();
    assert_eq!(world.answered(), [2, 0, 4]);
}

#[test]
fn a_ring_that_stops_answers_first_what_the_process_before_had_taken() {
    // Given two requests that an earlier process had taken, and one that nobody took,
    let mut world = World::tracked();
    world.start(0, true);
    world.offer(0);
    world.offer(2);
    world.turn();
    world.rings = World::new(None).rings;
    world.offer(4);
    // on a ring that is started, never enabled, and stopped,
    world.start(0, false);
    assert!(!world.turn());
    assert_eq!(world.under_way(), []);
    let answer = world.stop();
    assert!(world.rings.end_turn(false), "there is something to take");
    assert!(world.rings.stopped(START).is_empty());
    world.turn();
    let taken = world.under_way();
    assert_eq!(taken.len(), 2);
    for id in taken {
        assert!(world.rings.stopped(START).is_empty());
        world.complete(id);
    }
    world.rings.end_turn(false);
    // then the two are answered, the third is not, and the region is empty.
    assert_eq!(world.rings.stopped(START).len(), 1);
    assert_eq!(answer.try_recv(), Ok(Ok(2)));
    assert_eq!(world.answered(), [0, 2]);
    world.start(2, true);
    assert_eq!(world.rings.slot(0).map(|s| s.ring.to_resubmit()), Some(0));
    world.turn();
    let taken = world.under_way();
    assert_eq!(taken.len(), 1);
    world.complete(taken[0]);
    world.turn();
    assert_eq!(world.answered(), [0, 2, 4]);
}

#[test]
fn zeros_that_have_not_begun_fail_too_when_nobody_would_remember_them() {
    // Given a discard of which a part is under way, and one behind it that has not begun,
    let mut world = World::new(None);
    world.start(0, true);
    world.offer_zeroes(0, 11, &[LONG]);
    world.offer_zeroes(2, 13, &[(0, 8)]);
    world.turn();
    // when the ring stops and they do not end,
    let answer = world.stop();
    world.rings.stopped(START.after(DRAIN));
    // then both are answered.
    assert_eq!(answer.try_recv(), Ok(Ok(2)));
    assert_eq!(world.answered(), [0, 2]);
    assert_eq!((world.status(0), world.status(2)), (1, 1));
    while let Some(next) = world.under_way().first() {
        world.complete(*next);
    }
    assert_eq!((world.rings.in_flight(), world.answered()), (0, vec![0, 2]));
}

#[test]
fn what_an_earlier_process_took_goes_along_when_the_machine_moves_before_it_is_taken_again() {
    // Given two requests that an earlier process had taken, a third that it had answered before them, on a volume that is only
    // being taken over,
    let mut world = World::tracked();
    two_under_way(&mut world);
    world.offer(4);
    world.turn();
    let third = world.under_way()[2];
    world.complete(third);
    world.turn();
    world.rings = World::new(None).rings;
    world.start(0, true);
    world.rings.paused = true;
    world.turn();
    // when the ring stops for the machine to move,
    let answer = world.stop();
    assert!(world.rings.stopped(START).is_empty());
    world.turn();
    world.rings.stopped(START.after(DRAIN));
    assert_eq!(answer.try_recv(), Ok(Ok(3)));
    assert_eq!(world.answered(), [4]);
    // then they are answered at the new place, which has a region of its own.
    world.rings = World::new(None).rings;
    world.inflight = World::tracked().inflight;
    world.start(3, true);
    world.turn();
    for id in world.under_way() {
        world.complete(id);
    }
    world.turn();
    assert_eq!(world.answered(), [4, 0, 2]);
}

#[test]
fn a_chain_without_a_status_is_waited_for_by_nobody() {
    for tracked in [true, false] {
        let mut world = if tracked {
            World::tracked()
        } else {
            World::new(None)
        };
        world.start(0, true);
        world.offer(0);
        let status = DATA + 0x300;
        world.chain(0, &[(DATA, 16 + 512, 1), (status, 1, 0)]);
        world.put(DESC + 16 + 12, &0u16.to_le_bytes());
        world.turn();
        assert_eq!(world.rings.slot(0).map(|s| s.ring.in_flight()), Some(0));
        // It is where it was, and the region does not name it.
        let answer = world.stop();
        assert_eq!(world.rings.stopped(START).len(), 1);
        assert_eq!(answer.try_recv(), Ok(Ok(0)));
        world.start(0, false);
        assert_eq!(world.rings.slot(0).map(|s| s.ring.to_resubmit()), Some(0));
    }
}

/// Has the request on `head` read its sector, to where the test puts nothing else.
fn make_read(world: &World, head: u16) {
    let at = DATA + 0x400 * u64::from(head);
    world.put(at, &0u32.to_le_bytes());
    world.chain(head, &[(at, 16, 1), (at + 0x100, 513, 2)]);
}

#[test]
fn what_another_copy_answered_ends_when_the_disk_here_has_let_go() {
    // Given a read of which the kernel uses the memory, on a ring that runs or has stopped,
    for stopped in [false, true] {
        let mut world = World::tracked();
        world.start(0, true);
        world.offer(0);
        make_read(&world, 0);
        world.turn();
        let read = world.under_way()[0];
        let memory = world.rings.parts.get_mut(Seq(read.0)).unwrap().memory();
        let in_use = memory.clone().pin();
        if stopped {
            world.stop();
            world.rings.stopped(START.after(DRAIN));
            world.start(1, true);
        }
        // when another copy has answered it,
        world.complete(read);
        world.turn();
        // then the guest does not get its memory back,
        assert_eq!((world.answered(), world.under_way()), (vec![], vec![read]));
        // before the kernel has let go of it.
        drop(in_use);
        world.rings.answer_unpinned(START);
        world.turn();
        match stopped {
            false => assert_eq!((world.answered(), world.rings.in_flight()), (vec![0], 0)),
            true => assert_ne!(world.under_way(), [read], "submitted again"),
        }
        assert_eq!(memory.pieces(), [], "nothing is copied to it any more");
    }
}

#[test]
fn a_disk_reads_straight_into_guest_memory_only_where_no_other_copy_may_answer() {
    for direct in [true, false] {
        let mut world = World::tracked();
        world.start(0, true);
        world.offer(0);
        make_read(&world, 0);
        world.rings.take(START, &mut world.attachment, direct);
        let read = world.under_way()[0];
        let memory = world.rings.parts.get_mut(Seq(read.0)).unwrap().memory();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 512], 0).unwrap();
        let event = EventFd::new(0).unwrap();
        let mut disk = Disk::new(event.as_raw_fd()).unwrap();
        let token = Token {
            volume: 0,
            ticket: Seq(1),
            work: Work::Read(512),
        };
        let span = Span {
            offset: 0,
            len: 512,
        };
        let into = Some(Bytes::Guest(memory.clone()));
        disk.read(token, &DataFile::new(file, 1, false), span, into);
        assert_eq!(memory.request.is_pinned(), direct);
        disk.submit().unwrap();
        event.read().unwrap();
        assert!(disk.completed().unwrap().result.is_ok());
        assert!(!memory.request.is_pinned());
        let mut found = [0; 512];
        world
            .mem
            .read_slice(&mut found, GuestAddress(DATA + 0x100))
            .unwrap();
        assert_eq!(found, [7; 512]);
        // Had another copy been faster, it would have come too late.
        world.complete(read);
        assert_eq!(memory.pieces(), []);
    }
}

/// Puts a read of 60 MiB on the three descriptors from `head` on.
fn offer_long(world: &mut World, head: u16) {
    world.offer(head);
    let at = DATA + 0x400 * u64::from(head);
    world.put(at, &0u32.to_le_bytes());
    let data = (1 << 20, 60 << 20, 1 | 2);
    world.chain(head, &[(at, 16, 1), data, (at + 0x300, 1, 2)]);
}

#[test]
fn what_is_under_way_is_bounded_whatever_the_guest_offers() {
    // Given two reads of 60 MiB, and one of a sector behind them,
    let mut world = World::with_memory(62 << 20, None);
    world.start(0, true);
    offer_long(&mut world, 0);
    offer_long(&mut world, 3);
    world.offer(6);
    // when they are taken, then each turn begins a part of them, also when it is asked twice,
    let mut turns = 0;
    while world.turn() {
        turns += 1;
        let begun = world.under_way().len();
        assert_eq!(begun, turns * TURN_BYTES / (1 << 20));
        world.rings.take(START, &mut world.attachment, false);
        world.rings.take(START, &mut world.attachment, false);
        assert!(world.under_way().len() <= begun + TURN_BYTES / (1 << 20));
        world.rings.end_turn(false);
        turns += 1;
    }
    // and no more than a volume may have under way. There is nothing to do then, and the worker does not spin.
    let most = BYTES_MAX / (1 << 20);
    assert_eq!(world.under_way().len(), most);
    assert_eq!(world.rings.in_flight(), most + 1);
    assert!(!world.turn());
    // Each that ends makes room for the next one,
    let mut ended = 0;
    while let Some(next) = world.under_way().first() {
        world.complete(*next);
        ended += 1;
        while world.turn() {}
        assert!(world.under_way().len() <= most);
    }
    // and all are answered, once.
    assert_eq!(ended, 60 + 60 + 1);
    assert_eq!(world.answered(), [0, 3, 6]);
    let statuses = [0, 3, 6].map(|head| world.status(head));
    assert_eq!(statuses, [0, 0, 0]);
    assert_eq!((world.rings.in_flight(), world.rings.budget.bytes), (0, 0));
}

#[test]
fn of_a_long_request_whose_ring_is_gone_nothing_more_begins() {
    let mut world = World::with_memory(62 << 20, None);
    world.start(0, true);
    offer_long(&mut world, 0);
    world.turn();
    let old = world.under_way();
    assert_eq!(old.len(), TURN_BYTES / (1 << 20));
    world.rings.disconnect();
    assert!(!world.turn());
    assert_eq!(world.under_way(), old);
    for id in old {
        world.complete(id);
    }
    assert!(!world.turn());
    assert_eq!((world.rings.in_flight(), world.rings.budget.bytes), (0, 0));
}

#[test]
fn a_turn_ends_when_chains_cost_too_much() {
    // Given requests of tens of thousands of descriptors, none of which is acceptable, all in one table of the guest's,
    const TABLE: u64 = 0x20000;
    let mut world = World::with_memory(1 << 20, None);
    world.start(0, true);
    let entries = 32_768u32;
    for n in 0..u64::from(entries) {
        let last = n + 1 == u64::from(entries);
        world.put(TABLE + 16 * n, &0x3000u64.to_le_bytes());
        world.put(TABLE + 16 * n + 8, &1u32.to_le_bytes());
        world.put(TABLE + 16 * n + 12, &(2 | u16::from(!last)).to_le_bytes());
        world.put(
            TABLE + 16 * n + 14,
            &(n as u16).wrapping_add(1).to_le_bytes(),
        );
    }
    for head in [0, 2, 4] {
        world.offer(head);
        let desc = DESC + 16 * u64::from(head);
        world.put(desc, &TABLE.to_le_bytes());
        world.put(desc + 8, &(16 * entries).to_le_bytes());
        world.put(desc + 12, &4u16.to_le_bytes());
    }
    // when they are taken, then one of them is as much as a turn looks at, and the next turn comes at once.
    for (more, answered) in [(true, 1), (true, 2), (true, 3), (false, 3)] {
        world.rings.take(START, &mut world.attachment, false);
        world.rings.take(START, &mut world.attachment, false);
        assert_eq!(
            (world.rings.end_turn(false), world.answered().len()),
            (more, answered)
        );
    }
}

/// 64 MiB from the second sector on: the longest segment, in 17 regions.
const LONG: (u64, u32) = (1, 131_072);

#[test]
fn zeros_are_done_a_few_regions_at_a_time_and_answered_once() {
    // Given a long discard, one after it, and a write,
    let mut world = World::tracked();
    world.start(0, true);
    world.offer_zeroes(0, 11, &[LONG, (0, 1)]);
    world.offer_zeroes(2, 13, &[(0, 8), (3, 0), (16, 8)]);
    world.offer(4);
    world.turn();
    // then a few cuts of it are under way, and the write;
    let mut cuts = 0;
    assert_eq!(world.under_way().len(), 8 + 1);
    assert_eq!(world.rings.in_flight(), 8 + 1 + 2);
    let write = world.under_way()[0];
    world.complete(write);
    world.turn();
    assert_eq!(world.answered(), [4]);
    // each that ends lets the next one start, and the last one answers.
    while world.answered().len() == 1 {
        let next = world.under_way()[0];
        world.complete(next);
        world.turn();
        cuts += 1;
        assert!(world.under_way().len() <= 8);
    }
    assert_eq!((cuts, world.answered()), (17 + 1, vec![4, 0]));
    while let Some(next) = world.under_way().first() {
        world.complete(*next);
        cuts += 1;
    }
    world.turn();
    assert_eq!((cuts, world.answered()), (18 + 2, vec![4, 0, 2]));
    assert_eq!((world.status(0), world.status(2)), (0, 0));
    assert_eq!(world.rings.in_flight(), 0);
    // Each counts as one request, under what it does to the space.
    let stats = &world.rings.stats;
    assert_eq!(
        (stats.discard.total, stats.discard.bytes),
        (1, (64 << 20) + 512)
    );
    assert_eq!((stats.write.total, stats.write.bytes), (2, 16 * 512 + 512));
}

#[test]
fn zeros_that_fail_in_part_fail_and_a_request_for_nothing_succeeds() {
    let mut world = World::tracked();
    world.start(0, true);
    world.offer_zeroes(0, 11, &[LONG]);
    world.offer_zeroes(2, 13, &[(5, 0)]);
    world.offer_zeroes(4, 11, &[(0, 131_073)]);
    world.turn();
    assert_eq!(world.answered(), [2, 4]);
    assert_eq!((world.status(2), world.status(4)), (0, 1));
    let first = world.under_way()[0];
    world.fail(first);
    while let Some(next) = world.under_way().first() {
        world.complete(*next);
    }
    world.turn();
    assert_eq!((world.answered(), world.status(0)), (vec![2, 4, 0], 1));
    assert_eq!(world.rings.stats.discard.errors, 1);
}

#[test]
fn nothing_more_is_started_of_zeros_whose_ring_is_gone() {
    // Given a long discard of a front-end that disconnects,
    let mut world = World::tracked();
    world.start(0, true);
    world.offer_zeroes(0, 11, &[LONG]);
    world.turn();
    let old = world.under_way();
    world.rings.disconnect();
    assert_eq!(world.rings.in_flight(), old.len());
    // when it comes back before what is under way has ended,
    world.start(1, true);
    world.turn();
    assert_eq!(world.under_way(), old);
    for id in old {
        world.complete(id);
    }
    assert_eq!(world.under_way(), []);
    // then it is done from the start, and answered once.
    world.turn();
    let mut cuts = 0;
    while let Some(next) = world.under_way().first() {
        world.complete(*next);
        cuts += 1;
    }
    world.turn();
    assert_eq!((cuts, world.answered()), (17, vec![0]));
}

#[test]
fn a_volume_that_is_detached_ends_the_zeros_it_began() {
    let mut world = World::tracked();
    world.start(0, true);
    world.offer_zeroes(0, 11, &[LONG]);
    world.turn();
    world.rings.paused = true;
    world.offer(2);
    while let Some(next) = world.under_way().first() {
        world.complete(*next);
        world.turn();
    }
    assert_eq!((world.rings.in_flight(), world.answered()), (0, vec![0]));
}

/// A read that was submitted.
fn reading() -> (World, Vec<RequestId>) {
    let mut world = World::tracked();
    world.start(0, true);
    world.offer(0);
    world.put(DATA, &0u32.to_le_bytes());
    world.put(DESC + 8, &16u32.to_le_bytes());
    world.put(DESC + 16, &(DATA + 0x100).to_le_bytes());
    world.put(DESC + 16 + 8, &513u32.to_le_bytes());
    world.turn();
    let under_way = world.under_way();
    (world, under_way)
}

#[test]
fn a_read_that_failed_shows_nothing_and_holds_nothing_back() {
    let (mut world, under_way) = reading();
    world.end(under_way[0], Outcome::IoError);
    let hold = world.rings.shows_reads();
    world.rings.end_turn(hold);
    assert_eq!((hold, world.answered()), (false, vec![0]));
}

#[test]
fn what_was_read_is_shown_only_when_it_may_be() {
    // Given a read that is answered,
    let (mut world, under_way) = reading();
    assert!(!world.rings.shows_reads());
    world.complete(under_way[0]);
    assert!(world.rings.shows_reads());
    // when it is held back,
    world.rings.end_turn(true);
    // then the guest does not see it, and the ring does not stop without it;
    let answer = world.stop();
    assert!(world.rings.stopped(START).is_empty());
    assert_eq!(world.answered(), [0u32; 0]);
    // when it may be seen, it is, once.
    assert!(world.rings.shows_reads());
    world.rings.end_turn(false);
    assert!(!world.rings.shows_reads());
    assert_eq!(world.answered(), [0]);
    assert_eq!(world.rings.stopped(START).len(), 1);
    assert_eq!(answer.try_recv(), Ok(Ok(1)));
}

#[test]
fn a_request_is_not_answered_while_the_kernel_uses_its_memory() {
    // Given a request that was done elsewhere while a system call with its memory hangs,
    let mut world = World::tracked();
    let old = two_under_way(&mut world);
    let part = world.rings.parts.get_mut(Seq(old[0].0)).unwrap();
    let in_use = GuestPart {
        request: Rc::clone(&part.guest),
        start: 0,
        len: 512,
    };
    let in_use = in_use.pin();
    world.complete(old[0]);
    world.complete(old[1]);
    world.rings.answer_unpinned(START);
    world.turn();
    assert_eq!(world.answered(), [2]);
    assert_eq!(world.rings.in_flight(), 1, "a ring that stops waits for it");
    // when that has ended, then it is answered.
    drop(in_use);
    world.rings.answer_unpinned(START);
    world.turn();
    assert_eq!(world.answered(), [2, 0]);
    assert_eq!(world.rings.in_flight(), 0);
}
