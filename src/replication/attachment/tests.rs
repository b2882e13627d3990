//! Schedules that broke a rule, each exact. What chance finds is in `tests/sim`.

mod growing;
mod mirroring;
mod returning;
mod turns;

use super::*;
use crate::replication::failure_mode::FailureMode;
use crate::replication::ids::{CHUNK, Instance, REGION, Region, VolumeId};
use crate::replication::message::Request;
use crate::replication::record::{Base, CopyEntry, State};

#[derive(Clone, Debug, PartialEq)]
struct Bytes(Vec<u8>);

impl Payload for Bytes {
    fn same(&self, other: &Self) -> bool {
        self == other
    }

    fn count(&self) -> usize {
        self.0.len()
    }

    fn is_zero(&self) -> bool {
        self.0.iter().all(|b| *b == 0)
    }
}

const MS: u64 = 1_000_000;
/// Of three copies, the one that a sync is for.
const TARGET: usize = 2;
const SPAN: Span = Span {
    offset: 0,
    len: 512,
};

fn write(span: Span) -> Op {
    Op::Write { span, fua: false }
}

fn boot(copy: usize) -> BootId {
    BootId([copy as u8; 16])
}

/// `copies` copies in sync, the first one the master.
pub(in crate::replication) fn bench_record(copies: usize, state: State) -> Record {
    Bench::record(copies, state)
}

/// An attachment on node 0 and the answers of its copies, given one by one.
struct Bench {
    a: Attachment<Bytes>,
    now: Nanos,
    seen: Vec<Action<Bytes>>,
}

impl Bench {
    fn record(copies: usize, state: State) -> Record {
        let entry = |n: usize| CopyEntry {
            copy_id: CopyId([n as u8; 16]),
            node: NodeName(format!("n{n}")),
            status: CopyStatus::InSync,
            base: Base {
                since: Epoch(1),
                last: None,
            },
            boot_id: Some(boot(n)),
            leaving: false,
        };
        Record {
            volume_id: VolumeId([9; 16]),
            size: REGION,
            block_size: 512,
            replicas_wanted: copies as u8 - 1,
            failure_mode: FailureMode::AlwaysOn,
            suspend_deadline_ms: 30_000,
            compress: false,
            epoch: Epoch(1),
            epoch_tag: Tag(1),
            state,
            attachment: None,
            master: CopyId([0; 16]),
            preferred: None,
            grow: None,
            copies: (0..copies).map(entry).collect(),
            lineage: vec![(Epoch(1), Tag(1))],
        }
    }

    fn new(record: Record) -> Self {
        let me = record::Attachment {
            node: NodeName("n0".into()),
            boot_id: boot(0),
            instance: Instance([7; 16]),
        };
        let now = Nanos(1_000 * MS);
        let timing = Timing::DEFAULT;
        let a = Attachment::new(me, record, 1, Proof::None, timing, 1, now);
        Self {
            a,
            now,
            seen: Vec::new(),
        }
    }

    /// Joined and configured; `regions` are what each copy has in its log.
    fn attached(copies: usize, state: State, regions: &[Region]) -> Self {
        let mut b = Self::new(Self::record(copies, state));
        for copy in 0..copies {
            b.a.on_connected(b.now, copy, boot(copy));
            let disk = DiskState {
                promised: Epoch(2),
                probe: false,
                epoch: Epoch(1),
                tag: Tag(1),
                boot_id: boot(copy),
                clean: state == State::Clean,
                regions: Some(regions.to_vec()),
            };
            b.says(copy, Message::PromiseAck(disk));
        }
        b.swapped();
        for copy in 0..copies {
            b.says(copy, Message::AttachAck { epoch: Epoch(2) });
        }
        b
    }

    fn serving(copies: usize) -> Self {
        let mut b = Self::attached(copies, State::Clean, &[]);
        assert_eq!(*b.a.phase(), Phase::Serving);
        b.tick(0);
        b.take();
        b
    }

    /// Two copies in sync and the third ejected, for so long that it is time to dial it again.
    fn without_target() -> Self {
        let mut b = Self::serving(3);
        b.a.on_disconnected(b.now, TARGET, "reset");
        for _ in 0..10 {
            b.tick(50);
        }
        assert!(b.proposed().is_some());
        b.swapped();
        for copy in 0..2 {
            b.says(copy, Message::EpochAck { epoch: Epoch(3) });
        }
        b.tick(1_000);
        b
    }

    fn says(&mut self, copy: usize, message: Message) {
        self.a.on_message(self.now, copy, message, None);
    }

    fn acks(&mut self, copy: usize, seq: Seq, status: Status) {
        self.a.on_ack(self.now, copy, seq, status);
    }

    fn tick(&mut self, ms: u64) {
        self.now = self.now.after(Nanos(ms * MS));
        self.a.on_tick(self.now);
    }

    /// What was decided since the last look.
    fn take(&mut self) -> Vec<Action<Bytes>> {
        while let Some(action) = self.a.poll() {
            self.seen.push(action);
        }
        std::mem::take(&mut self.seen)
    }

    /// The record proposed last.
    fn proposed(&mut self) -> Option<Record> {
        let found = self.take();
        let last = found.iter().rev().find_map(|a| match a {
            Action::Cas { record, .. } => Some((**record).clone()),
            _ => None,
        });
        self.seen = found;
        last
    }

    fn swapped(&mut self) {
        let revision = self.a.revision + 1;
        self.a.on_cas(self.now, CasOutcome::Done(revision));
    }

    fn submit(&mut self, id: u64, op: Op) {
        let data = match op {
            Op::Write { span, .. } => Some(Bytes(vec![id as u8; span.len as usize])),
            _ => None,
        };
        self.a.submit(self.now, RequestId(id), op, data);
    }
}

fn sent(actions: &[Action<Bytes>], copy: usize) -> Vec<Message> {
    let to = |a: &Action<Bytes>| match a {
        Action::Send { to, message, .. } if to.has(copy) => Some(message.clone()),
        _ => None,
    };
    actions.iter().filter_map(to).collect()
}

fn writes(actions: &[Action<Bytes>], copy: usize) -> Vec<Request> {
    let all = sent(actions, copy).into_iter();
    all.filter_map(|m| match m {
        Message::Write(r) => Some(r),
        _ => None,
    })
    .collect()
}

fn completed(actions: &[Action<Bytes>]) -> Vec<(u64, Outcome)> {
    let of = |a: &Action<Bytes>| match a {
        Action::Complete { id, outcome, .. } => Some((id.0, *outcome)),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

#[test]
fn an_ejected_copy_whose_connection_comes_late_is_not_configured_again() {
    let mut b = Bench::serving(2);
    b.a.on_disconnected(b.now, 1, "reset");
    // Dialled for ever by a peer that does not answer; meanwhile it is ejected.
    b.tick(500);
    assert!(b.proposed().is_some());
    b.swapped();
    b.take();
    b.a.on_connected(b.now, 1, boot(1));
    let actions = b.take();
    assert_eq!(sent(&actions, 1), []);
    assert!(actions.iter().any(|a| matches!(a, Action::Hangup(1))));
}

#[test]
fn a_record_read_before_our_own_swap_and_answered_after_it_fences_nobody() {
    let mut b = Bench::serving(2);
    let before = (b.a.record().clone(), b.a.revision);
    b.a.on_refused(b.now, 1, Refusal::Stale { promised: Epoch(2) });
    assert!(b.take().iter().any(|a| matches!(a, Action::ReadRecord)));
    b.tick(500);
    b.swapped();
    b.a.on_record(b.now, Some(before));
    assert_eq!(*b.a.phase(), Phase::Serving);
}

#[test]
fn an_attachment_that_ended_while_its_claim_was_under_way_stays_ended() {
    let mut b = Bench::new(Bench::record(1, State::Clean));
    b.a.on_connected(b.now, 0, boot(0));
    let disk = DiskState {
        promised: Epoch(2),
        probe: false,
        epoch: Epoch(1),
        tag: Tag(1),
        boot_id: boot(0),
        clean: true,
        regions: Some(Vec::new()),
    };
    b.says(0, Message::PromiseAck(disk));
    assert_eq!(*b.a.phase(), Phase::Claiming);
    b.a.detach(b.now);
    b.take();
    b.swapped();
    assert!(matches!(b.a.phase(), Phase::Fenced(_)));
    assert!(b.take().is_empty());
}

#[test]
fn a_registry_that_does_not_answer_is_asked_again_later_and_once() {
    let mut b = Bench::serving(2);
    for _ in 0..3 {
        b.a.on_record_unavailable(b.now);
    }
    assert!(b.take().is_empty());
    b.tick(200);
    let reads = |all: Vec<Action<Bytes>>| {
        all.iter()
            .filter(|a| matches!(a, Action::ReadRecord))
            .count()
    };
    assert_eq!(reads(b.take()), 1);
    b.tick(200);
    assert_eq!(reads(b.take()), 0);
}

#[test]
fn a_failed_read_of_the_record_does_not_repeat_a_cas_that_is_under_way() {
    let mut b = Bench::serving(2);
    b.a.on_disconnected(b.now, 1, "reset");
    b.tick(500);
    assert!(b.proposed().is_some());
    b.take();
    b.a.on_record_unavailable(b.now);
    b.tick(1_000);
    assert!(b.proposed().is_none());
}

#[test]
fn a_write_held_during_a_suspension_is_not_overtaken_by_a_later_one() {
    let mut b = Bench::serving(2);
    b.a.on_disconnected(b.now, 1, "reset");
    b.tick(500);
    b.tick(1_100);
    assert!(b.a.why_not_serving().is_some(), "the registry is slow");
    b.submit(1, write(SPAN));
    b.take();
    b.swapped();
    b.submit(2, write(SPAN));
    b.tick(50);
    let actions = b.take();
    let first = actions.iter().find_map(|a| match a {
        Action::Send { data, .. } => data.clone(),
        _ => None,
    });
    assert_eq!(first.unwrap().0[0], 1);
}

#[test]
fn a_full_disk_suspends_until_the_deadline_and_is_tried_one_attempt_at_a_time() {
    let mut b = Bench::serving(1);
    b.submit(1, write(SPAN));
    let seq = writes(&b.take(), 0)[0].seq;
    b.acks(0, seq, Status::NoSpace);
    b.tick(50);
    assert_eq!(writes(&b.take(), 0).len(), 1);
    assert!(b.a.why_not_serving().is_some());
    // Not answered yet: reconnected, it is sent once more, and no tick repeats it.
    b.acks(0, seq, Status::NoSpace);
    b.says(0, Message::AttachAck { epoch: Epoch(2) });
    b.tick(50);
    assert_eq!(writes(&b.take(), 0).len(), 1);
    let mut outcome = None;
    for _ in 0..700 {
        b.acks(0, seq, Status::NoSpace);
        b.says(
            0,
            Message::HeartbeatAck {
                epoch: Epoch(2),
                sent: b.now,
            },
        );
        b.tick(50);
        outcome = outcome.or(completed(&b.take()).first().copied());
        if outcome.is_some() {
            break;
        }
        b.says(0, Message::AttachAck { epoch: Epoch(2) });
        b.a.peers[0].link = Link::Up;
    }
    assert_eq!(outcome, Some((1, Outcome::IoError)));
}

#[test]
fn a_chunk_is_compared_again_only_after_what_the_last_comparison_wrote() {
    let mut b = Bench::attached(3, State::Active, &[Region(0)]);
    assert_eq!(*b.a.phase(), Phase::Serving);
    b.a.on_tick(b.now);
    let actions = b.take();
    for copy in 0..3 {
        let first = sent(&actions, copy).into_iter().find_map(|m| match m {
            Message::Read(r) if r.span.offset == 0 => Some(r.seq),
            _ => None,
        });
        let message = Message::ReadReply {
            seq: first.unwrap(),
            status: Status::Ok,
        };
        let bytes = Bytes(vec![u8::from(copy == 0); CHUNK as usize]);
        b.a.on_message(b.now, copy, message, Some(bytes));
    }
    let late = writes(&b.take(), 1)[0].seq;
    b.acks(2, late, Status::Ok);
    // The master is lost while its bytes wait in the disk queue of copy 1.
    b.a.on_refused(b.now, 0, Refusal::Failed);
    assert!(b.proposed().is_some());
    b.swapped();
    let reads = |b: &mut Bench| {
        let all = sent(&b.take(), 1);
        let first = |m: &&Message| matches!(m, Message::Read(r) if r.span.offset == 0);
        all.iter().filter(first).count()
    };
    b.tick(50);
    assert_eq!(reads(&mut b), 0);
    b.acks(1, late, Status::Ok);
    assert_eq!(reads(&mut b), 1);
}

#[test]
fn a_request_to_an_undecided_chunk_waits_for_it_and_others_do_not() {
    let mut b = Bench::attached(2, State::Active, &[Region(0)]);
    let far = Span {
        offset: 40 * CHUNK,
        len: 512,
    };
    let asked = |actions: &[Action<Bytes>], offset: u64| -> Vec<(usize, Seq)> {
        (0..2)
            .flat_map(|copy| {
                let all = sent(actions, copy);
                all.into_iter().filter_map(move |m| match m {
                    Message::Read(r) if r.span.offset == offset => Some((copy, r.seq)),
                    _ => None,
                })
            })
            .collect()
    };
    let answer = |b: &mut Bench, all: Vec<(usize, Seq)>| {
        for (copy, seq) in all {
            let reply = Message::ReadReply {
                seq,
                status: Status::Ok,
            };
            let same = Bytes(vec![7; CHUNK as usize]);
            b.a.on_message(b.now, copy, reply, Some(same));
        }
    };
    let first = b.take();
    b.submit(1, write(far));
    assert!(writes(&b.take(), 0).is_empty(), "chunk 40 is not decided");
    // One of the first window ends: the chunk that is waited for is next, before the ninth.
    answer(&mut b, asked(&first, 0));
    let next = b.take();
    assert!(asked(&next, 8 * CHUNK).is_empty());
    answer(&mut b, asked(&next, far.offset));
    assert_eq!(writes(&b.take(), 0).len(), 1);
    // The regions stay in the logs until everything is decided.
    b.tick(250);
    let beats = sent(&b.take(), 1);
    assert!(
        beats
            .iter()
            .any(|m| matches!(m, Message::Heartbeat { stable: Seq(0), .. }))
    );
}

/// Detaching, flushed, and the copies told.
fn leaving(copies: usize) -> Bench {
    let mut b = Bench::serving(copies);
    b.a.detach(b.now);
    let flush = sent(&b.take(), 0).into_iter().find_map(|m| match m {
        Message::Flush { seq, .. } => Some(seq),
        _ => None,
    });
    for copy in 0..copies {
        b.acks(copy, flush.unwrap(), Status::Ok);
    }
    b
}

#[test]
fn a_copy_whose_connection_lost_the_detach_is_told_again() {
    let mut b = leaving(2);
    b.says(0, Message::DetachAck { epoch: Epoch(2) });
    b.a.on_disconnected(b.now, 1, "reset");
    b.take();
    b.a.on_connected(b.now, 1, boot(1));
    b.says(1, Message::AttachAck { epoch: Epoch(2) });
    let again = sent(&b.take(), 1);
    assert!(again.contains(&Message::Detach { epoch: Epoch(2) }));
    b.says(1, Message::DetachAck { epoch: Epoch(2) });
    assert_eq!(b.proposed().unwrap().state, State::Clean);
}

#[test]
fn a_copy_that_has_detached_hears_nothing_more_while_the_registry_is_slow() {
    let mut b = leaving(2);
    b.says(0, Message::DetachAck { epoch: Epoch(2) });
    b.says(1, Message::DetachAck { epoch: Epoch(2) });
    b.take();
    b.a.on_disconnected(b.now, 1, "reset");
    b.a.on_connected(b.now, 1, boot(1));
    (0..10).for_each(|_| b.tick(300));
    let after = b.take();
    assert_eq!((sent(&after, 0), sent(&after, 1)), (vec![], vec![]));
    b.swapped();
    assert_eq!(*b.a.phase(), Phase::Left);
}

#[test]
fn when_every_copy_lost_power_one_serves_on_and_the_next_flush_fails() {
    let mut b = Bench::serving(2);
    b.submit(1, write(SPAN));
    let first = writes(&b.take(), 0)[0].seq;
    b.acks(0, first, Status::Ok);
    b.acks(1, first, Status::Ok);
    b.submit(2, write(SPAN));
    let second = writes(&b.take(), 0)[0].seq;
    b.acks(0, second, Status::Ok);
    b.a.on_disconnected(b.now, 0, "power");
    b.a.on_disconnected(b.now, 1, "power");
    b.take();
    b.a.on_connected(b.now, 1, boot(11));
    assert_eq!(sent(&b.take(), 1), [], "copy 0 may have no gap");
    b.a.on_connected(b.now, 0, boot(10));
    b.a.on_connected(b.now, 1, boot(11));
    let actions = b.take();
    assert_eq!((sent(&actions, 0).len(), sent(&actions, 1).len()), (1, 0));
    b.says(0, Message::AttachAck { epoch: Epoch(2) });
    let next = b.proposed().unwrap();
    assert_eq!(next.in_sync().count(), 1);
    assert_eq!(next.copies[0].boot_id, Some(boot(10)));
    // The acknowledgement from before the power cut does not count: the write went out again.
    assert_eq!(writes(&b.take(), 0)[0].seq, second);
    b.swapped();
    assert_eq!(completed(&b.take()), []);
    b.acks(0, second, Status::Ok);
    assert_eq!(completed(&b.take()), [(2, Outcome::Ok)]);
    for (id, outcome) in [(3, Outcome::IoError), (4, Outcome::Ok)] {
        b.submit(id, Op::Flush);
        b.tick(50);
        let seq = sent(&b.take(), 0).into_iter().find_map(|m| match m {
            Message::Flush { seq, .. } => Some(seq),
            _ => None,
        });
        b.acks(0, seq.unwrap(), Status::Ok);
        assert_eq!(completed(&b.take()), [(id, outcome)]);
    }
}

#[test]
fn an_ejection_the_registry_did_not_take_is_decided_anew() {
    let mut b = Bench::serving(2);
    b.a.on_disconnected(b.now, 1, "reset");
    b.tick(500);
    assert_eq!(b.proposed().unwrap().copies[1].status, CopyStatus::Missing);
    b.a.on_cas(b.now, CasOutcome::Unavailable);
    b.take();
    // Copy 1 is back with all that was completed; the disk of copy 0 fails.
    b.a.on_connected(b.now, 1, boot(1));
    b.says(1, Message::AttachAck { epoch: Epoch(2) });
    b.a.on_refused(b.now, 0, Refusal::Failed);
    b.tick(300);
    let next = b.proposed().unwrap();
    assert_eq!(next.copies[0].status, CopyStatus::Missing);
    assert_eq!(next.copies[1].status, CopyStatus::InSync);
}

#[test]
fn a_request_at_the_failed_copy_of_this_node_ends_at_the_deadline() {
    let mut b = Bench::serving(1);
    b.submit(1, write(SPAN));
    b.a.on_refused(b.now, 0, Refusal::Failed);
    b.take();
    let mut ended = Vec::new();
    for _ in 0..700 {
        b.tick(50);
        let actions = b.take();
        ended.extend(completed(&actions));
        if actions.iter().any(|a| matches!(a, Action::Dial { .. })) {
            b.a.on_connected(b.now, 0, boot(0));
            b.says(0, Message::Nack(Refusal::Failed));
        }
    }
    assert_eq!(ended, [(1, Outcome::IoError)]);
}

#[test]
fn a_silent_connection_is_made_anew_while_joining() {
    let mut b = Bench::new(Bench::record(2, State::Active));
    b.a.on_connected(b.now, 0, boot(0));
    b.take();
    b.tick(3_000);
    assert!(b.take().iter().any(|a| matches!(a, Action::Hangup(0))));
    b.tick(50);
    let dials = b.take();
    let again = |a: &Action<Bytes>| matches!(a, Action::Dial { copy: 0, .. });
    assert!(dials.iter().any(again));
}

#[test]
fn a_read_that_the_master_cannot_answer_waits_for_a_copy_that_is_away_for_a_moment() {
    let mut b = Bench::serving(2);
    b.a.on_disconnected(b.now, 1, "reset");
    b.submit(1, Op::Read(SPAN));
    let seq = match sent(&b.take(), 0)[0] {
        Message::Read(r) => r.seq,
        _ => unreachable!(),
    };
    let status = Status::Io;
    b.says(0, Message::ReadReply { seq, status });
    assert_eq!(completed(&b.take()), []);
    b.a.on_connected(b.now, 1, boot(1));
    b.says(1, Message::AttachAck { epoch: Epoch(2) });
    let asked = sent(&b.take(), 1);
    assert!(asked.iter().any(|m| matches!(m, Message::Read(_))));
}

#[test]
fn a_read_that_the_master_cannot_answer_is_asked_of_a_copy_that_is_back_while_its_ejection_is_in_doubt()
 {
    let mut b = Bench::serving(2);
    b.a.on_disconnected(b.now, 1, "reset");
    b.tick(500);
    assert!(b.proposed().is_some());
    b.a.on_cas(b.now, CasOutcome::Ambiguous);
    b.take();
    b.a.on_connected(b.now, 1, boot(1));
    b.says(1, Message::AttachAck { epoch: Epoch(2) });
    b.submit(1, Op::Read(SPAN));
    let actions = b.take();
    let Some(Message::Read(request)) = sent(&actions, 0).pop() else {
        panic!("the master was not asked");
    };
    let answer = Message::ReadReply {
        seq: request.seq,
        status: Status::Io,
    };
    b.says(0, answer);
    let actions = b.take();
    assert_eq!(completed(&actions), []);
    assert!(sent(&actions, 1).contains(&Message::Read(request)));
}

#[test]
fn a_policy_that_arrives_between_a_swap_and_its_answer_is_taken() {
    let mut b = Bench::serving(2);
    b.a.on_disconnected(b.now, 1, "reset");
    b.tick(500);
    let mut record = b.proposed().unwrap();
    record.failure_mode = FailureMode::Hard;
    let revision = b.a.revision + 2;
    b.a.on_record(b.now, Some((record.clone(), revision)));
    b.swapped();
    b.take();
    b.tick(50);
    assert!(b.take().iter().any(|a| matches!(a, Action::ReadRecord)));
    b.a.on_record(b.now, Some((record, revision)));
    assert!(!b.a.mode_serves());
}

#[test]
fn an_acknowledgement_of_a_copy_that_is_gone_does_not_complete_a_write_when_the_other_is_ejected() {
    let mut b = Bench::serving(2);
    b.submit(1, write(SPAN));
    let seq = writes(&b.take(), 0)[0].seq;
    b.acks(0, seq, Status::Ok);
    b.a.on_refused(b.now, 1, Refusal::Failed);
    assert!(b.proposed().is_some());
    b.a.on_disconnected(b.now, 0, "power");
    b.swapped();
    assert_eq!(completed(&b.take()), []);
    b.a.on_connected(b.now, 0, boot(10));
    b.says(0, Message::AttachAck { epoch: Epoch(3) });
    assert_eq!(writes(&b.take(), 0)[0].seq, seq);
    b.acks(0, seq, Status::Ok);
    assert_eq!(completed(&b.take()), [(1, Outcome::Ok)]);
}

#[test]
fn a_copy_that_lost_power_is_taken_when_the_only_other_one_has_failed() {
    let mut b = Bench::serving(2);
    b.a.on_disconnected(b.now, 1, "power");
    b.a.on_refused(b.now, 0, Refusal::Failed);
    b.take();
    b.a.on_connected(b.now, 0, boot(0));
    b.a.on_connected(b.now, 1, boot(11));
    assert_eq!(sent(&b.take(), 1).len(), 1);
    b.says(1, Message::AttachAck { epoch: Epoch(2) });
    b.says(0, Message::Nack(Refusal::Failed));
    let next = b.proposed().unwrap();
    assert_eq!(next.master, CopyId([1; 16]));
}

#[test]
fn an_outbid_candidate_steps_back_before_it_asks_for_more() {
    let mut b = Bench::new(Bench::record(2, State::Clean));
    for copy in 0..2 {
        b.a.on_connected(b.now, copy, boot(copy));
    }
    b.take();
    let mut waited = 0;
    for round in 0..8 {
        let promised = Epoch(2 + round);
        b.says(0, Message::Nack(Refusal::Stale { promised }));
        assert_eq!(sent(&b.take(), 1), [], "asked again at once");
        loop {
            b.tick(10);
            waited += 10;
            let asked = sent(&b.take(), 1).into_iter().any(|m| match m {
                Message::Promise(p) => p.epoch > promised,
                _ => false,
            });
            if asked {
                break;
            }
        }
    }
    assert!(waited > 500, "waited {waited} ms in all");
}

#[test]
fn a_record_older_than_a_disk_is_claimed_by_nobody_until_a_later_one_is_found() {
    // Given three copies, one of which fits the record, and two that are ahead of it: the registry is an old backup.
    let mut b = Bench::new(Bench::record(3, State::Active));
    let disk = |copy: usize, promised: u64, epoch: u64| {
        Message::PromiseAck(DiskState {
            promised: Epoch(promised),
            probe: false,
            epoch: Epoch(epoch),
            tag: Tag(epoch),
            boot_id: boot(copy),
            clean: false,
            regions: Some(Vec::new()),
        })
    };
    for copy in 0..3 {
        b.a.on_connected(b.now, copy, boot(copy));
    }
    b.says(0, disk(0, 2, 1));
    b.says(1, disk(1, 2, 3));
    b.says(2, disk(2, 2, 3));
    // Then nothing is claimed, however long nothing changes, whatever the failure mode, also when they go away;
    let mut reads = 0;
    for round in 0..100 {
        b.tick(100);
        if round == 50 {
            b.a.on_disconnected(b.now, 1, "gone");
            b.a.on_disconnected(b.now, 2, "gone");
        }
        let actions = b.take();
        assert!(!actions.iter().any(|a| matches!(a, Action::Cas { .. })));
        if actions.iter().any(|a| matches!(a, Action::ReadRecord)) {
            reads += 1;
            b.a.on_record(b.now, Some((Bench::record(3, State::Active), 1)));
        }
    }
    assert!(reads > 3, "the record was read {reads} times");
    // and when the record is the one that they know, they are asked anew, and it is claimed with them.
    let mut later = Bench::record(3, State::Active);
    later.copies[0].status = CopyStatus::Missing;
    later.copies[0].base.last = Some(Epoch(1));
    later.master = CopyId([1; 16]);
    (later.epoch, later.epoch_tag) = (Epoch(3), Tag(3));
    later.lineage.push((Epoch(3), Tag(3)));
    b.a.on_record(b.now, Some((later, 2)));
    for copy in [1, 2] {
        b.a.on_connected(b.now, copy, boot(copy));
        b.says(copy, disk(copy, 4, 3));
    }
    let claimed = b.proposed().unwrap();
    assert_eq!(claimed.master, CopyId([1; 16]));
    assert_eq!(claimed.copies[0].status, CopyStatus::Missing);
    assert_eq!(claimed.in_sync().count(), 2);
}
