//! What goes to the target of a sync (S11).

use super::*;
use crate::replication::ids::COPIES_MAX;

const BULK: usize = TARGET + COPIES_MAX;

fn chunk(n: u64) -> Span {
    Span {
        offset: n * CHUNK,
        len: 512,
    }
}

fn seq_of(actions: &[Action<Bytes>], link: usize, which: impl Fn(&Message) -> Option<Seq>) -> Seq {
    sent(actions, link).iter().find_map(which).unwrap()
}

/// Two in-sync copies, and the third ejected and about to be synced; marks and holes are asked for.
fn mapping() -> Bench {
    let mut b = Bench::without_target();
    b.a.on_connected(b.now, TARGET, boot(TARGET));
    let disk = DiskState {
        promised: Epoch(3),
        probe: false,
        epoch: Epoch(2),
        tag: b.a.record().lineage[1].1,
        boot_id: boot(TARGET),
        clean: false,
        regions: Some(Vec::new()),
    };
    b.take();
    b.says(TARGET, Message::SyncReady { disk, ticket: 7 });
    let mark = |m: &Message| match m {
        Message::Mark { seq, .. } => Some(*seq),
        _ => None,
    };
    let actions = b.take();
    let seq = seq_of(&actions, 0, mark);
    b.acks(0, seq, Status::Ok);
    b.acks(1, seq, Status::Ok);
    b.a.on_connected(b.now, BULK, boot(TARGET));
    b
}

/// The master says which chunks are marked.
fn mirrored(b: &mut Bench, marked: u64) {
    let map = |m: &Message| match m {
        Message::MapRead { seq, .. } => Some(*seq),
        _ => None,
    };
    let actions = b.take();
    let (of_master, of_target) = (seq_of(&actions, 0, map), seq_of(&actions, BULK, map));
    let reply = |seq, dirty| Message::MapReply {
        seq,
        status: Status::Ok,
        dirty,
        allocated: vec![u64::MAX],
    };
    b.says(0, reply(of_master, vec![marked]));
    b.says(BULK, reply(of_target, Vec::new()));
}

#[test]
fn a_write_under_way_when_marks_have_been_read_goes_to_the_target_too() {
    let mut b = mapping();
    b.submit(1, write(chunk(9)));
    let actions = std::mem::take(&mut b.seen);
    let now = b.take();
    let seq = writes(&now, 0)[0].seq;
    assert!(writes(&now, TARGET).is_empty(), "not before");
    b.seen = actions.into_iter().chain(now).collect();
    mirrored(&mut b, 1);
    let to_target: Vec<Seq> = writes(&b.take(), TARGET).iter().map(|r| r.seq).collect();
    assert_eq!(to_target, [seq]);
    b.acks(0, seq, Status::Ok);
    b.acks(1, seq, Status::Ok);
    assert!(completed(&b.take()).is_empty(), "its answer is mandatory");
    b.acks(TARGET, seq, Status::Ok);
    assert_eq!(completed(&b.take()), [(1, Outcome::Ok)]);
}

#[test]
fn a_write_to_a_chunk_that_is_still_to_be_copied_goes_to_the_target() {
    let mut b = mapping();
    mirrored(&mut b, u64::MAX);
    let compared: Vec<u64> = sent(&b.take(), 0)
        .iter()
        .filter_map(|m| match m {
            Message::SyncHash(r) => Some(r.span.offset / CHUNK),
            _ => None,
        })
        .collect();
    assert!(
        !compared.is_empty() && !compared.contains(&63),
        "63 has no turn yet"
    );
    b.submit(1, write(chunk(63)));
    assert_eq!(writes(&b.take(), TARGET).len(), 1);
}

/// The target has everything, and says so next.
fn synced() -> Bench {
    let mut b = mapping();
    mirrored(&mut b, 0);
    // The flush of all, then the target's last one.
    for to in [&[0, 1, TARGET][..], &[TARGET]] {
        let flush = |m: &Message| match m {
            Message::Flush { seq, .. } => Some(*seq),
            _ => None,
        };
        let seq = seq_of(&b.take(), TARGET, flush);
        to.iter().for_each(|copy| b.acks(*copy, seq, Status::Ok));
    }
    b
}

#[test]
fn a_copy_that_is_taken_in_is_asked_for_its_lease_at_once() {
    let mut b = synced();
    let epoch = Epoch(3);
    b.says(TARGET, Message::SyncDoneAck { epoch });
    assert!(b.proposed().is_some());
    b.take();
    b.swapped();
    let told = sent(&b.take(), TARGET);
    let at = |which: fn(&Message) -> bool| told.iter().position(which);
    let configured = at(|m| matches!(m, Message::EpochChange(_))).unwrap();
    let asked = at(|m| {
        matches!(
            m,
            Message::Heartbeat {
                epoch: Epoch(4),
                ..
            }
        )
    });
    assert!(asked.is_some_and(|at| at > configured), "{told:?}");
    // Reads are shown again as soon as it has answered.
    assert!(!b.a.may_show_reads(b.now));
    for copy in [1, TARGET] {
        let (epoch, sent) = (Epoch(4), b.now);
        b.says(copy, Message::HeartbeatAck { epoch, sent });
    }
    assert!(b.a.may_show_reads(b.now));
}

#[test]
fn a_target_that_waits_for_the_registry_to_be_taken_in_suspends_nothing_unless_it_is_lost() {
    // Given a target that has everything, while the registry is away,
    let mut b = synced();
    let epoch = Epoch(3);
    b.says(TARGET, Message::SyncDoneAck { epoch });
    let all = [0, 1, TARGET];
    let proposed = b.proposed().expect("it is to be taken in");
    assert_eq!(proposed.in_sync().count(), 3);
    let away = |b: &mut Bench, alive: &[usize]| {
        for _ in 0..30 {
            b.a.on_cas(b.now, CasOutcome::Unavailable);
            b.pass(50, alive);
        }
    };
    // when a write comes, then it completes with the target's answer, and not without it;
    away(&mut b, &all);
    assert_eq!(b.a.why_not_serving(), None);
    b.take();
    b.submit(1, write(chunk(9)));
    let seq = writes(&b.take(), TARGET)[0].seq;
    b.acks(0, seq, Status::Ok);
    b.acks(1, seq, Status::Ok);
    assert_eq!(completed(&b.take()), []);
    b.acks(TARGET, seq, Status::Ok);
    assert_eq!(completed(&b.take()), [(1, Outcome::Ok)]);
    // and when it is lost while nobody knows whether it was taken in, nothing can complete.
    b.tick(500);
    b.a.on_cas(b.now, CasOutcome::Ambiguous);
    b.a.on_disconnected(b.now, TARGET, "reset");
    b.tick(50);
    assert!(b.a.why_not_serving().is_some());
}

#[test]
fn a_write_without_space_is_not_tried_again_where_its_first_attempt_is_under_way() {
    let mut b = synced();
    // Copy 1 is put out and copy 0 is full; the target has been sent the write, and says nothing until it is taken in.
    b.a.on_disconnected(b.now, 1, "reset");
    b.tick(500);
    assert!(b.proposed().is_some());
    b.take();
    b.swapped();
    b.submit(1, write(SPAN));
    let seq = writes(&b.take(), TARGET)[0].seq;
    b.acks(0, seq, Status::NoSpace);
    b.says(TARGET, Message::SyncDoneAck { epoch: Epoch(4) });
    assert!(b.proposed().is_some());
    b.take();
    b.swapped();
    assert!(b.a.in_sync.has(TARGET));
    b.take();
    b.tick(50);
    let actions = b.take();
    let again = |copy| writes(&actions, copy).iter().any(|r| r.seq == seq);
    assert!(again(0) && !again(TARGET));
}
