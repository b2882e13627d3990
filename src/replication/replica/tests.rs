//! A copy by itself.

use super::*;
use crate::replication::ids::{CopyId, Tag, VolumeId};
use crate::replication::message::Proof;

const T0: Nanos = Nanos(10_000_000_000);

fn replica() -> Replica<()> {
    let state = CopyState {
        volume_id: VolumeId([1; 16]),
        copy_id: CopyId([2; 16]),
        size: 1 << 20,
        epoch: Epoch(1),
        tag: Tag(1),
        promised: Epoch(1),
        standing: Standing::InSync,
        clean: true,
        bitmaps: [None; BITMAPS_MAX],
    };
    let maps = std::array::from_fn(|_| None);
    Replica::new(state, Some(&[]), maps, BootId([3; 16]), Timing::DEFAULT, T0)
}

/// Lets the disk do everything; gives what was said.
fn settle(r: &mut Replica<()>) -> Vec<Message> {
    let mut said = Vec::new();
    loop {
        r.end_turn();
        let Some(action) = r.poll() else { break };
        match action {
            Action::Disk(ticket, _) => r.on_disk(r.now, ticket, DiskResult::Done(None)),
            Action::Reply { message, .. } => said.push(message),
            _ => {}
        }
    }
    said
}

fn ask(r: &mut Replica<()>, session: u64, epoch: u64, node: &str, proof: Proof) -> Message {
    let promise = Promise {
        epoch: Epoch(epoch),
        candidate: NodeName(node.into()),
        instance: Instance([node.as_bytes()[0]; 16]),
        proof,
        probe: false,
    };
    r.on_message(r.now, SessionId(session), Message::Promise(promise), None);
    settle(r).pop().unwrap()
}

fn attach(r: &mut Replica<()>, session: u64, epoch: u64) -> Message {
    let config = Configuration {
        epoch: Epoch(epoch),
        tag: Tag(epoch),
        size: 1 << 20,
        logged: true,
        absent: Vec::new(),
    };
    r.on_message(r.now, SessionId(session), Message::Attach(config), None);
    settle(r).pop().unwrap()
}

#[test]
fn a_candidate_that_never_took_the_volume_is_not_taken_for_its_attachment() {
    let mut r = replica();
    let released = Proof::Released(Epoch(1));
    assert!(matches!(
        ask(&mut r, 1, 2, "x", released),
        Message::PromiseAck(_)
    ));
    assert!(matches!(attach(&mut r, 1, 2), Message::AttachAck { .. }));
    // Partitioned from x for longer than the grace: y is promised 3, loses the CAS, goes away. x goes above it.
    r.on_tick(T0.after(Nanos::from_ms(4_000)));
    assert!(matches!(
        ask(&mut r, 2, 3, "y", Proof::None),
        Message::PromiseAck(_)
    ));
    r.on_close(r.now, SessionId(2));
    assert!(matches!(attach(&mut r, 3, 4), Message::AttachAck { .. }));
    let again = ask(&mut r, 4, 5, "y", Proof::None);
    assert!(
        matches!(again, Message::Nack(Refusal::Attached { .. })),
        "{again:?}"
    );
}

#[test]
fn a_failed_copy_answers_what_its_disk_works_on_before_it_ends_the_session() {
    let mut r = replica();
    let released = Proof::Released(Epoch(1));
    ask(&mut r, 1, 2, "x", released);
    attach(&mut r, 1, 2);
    let mut tickets = Vec::new();
    for seq in [1, 2] {
        let span = Span {
            offset: seq * 4096,
            len: 512,
        };
        let request = Request {
            epoch: Epoch(2),
            seq: Seq(seq),
            span,
            fua: false,
        };
        r.on_message(T0, SessionId(1), Message::Write(request), Some(()));
    }
    r.end_turn();
    let mut log = None;
    while let Some(action) = r.poll() {
        if let Action::Disk(ticket, DiskOp::Log(_)) = action {
            log = Some(ticket);
        }
    }
    r.on_disk(T0, log.unwrap(), DiskResult::Done(None));
    while let Some(action) = r.poll() {
        if let Action::Disk(ticket, DiskOp::Write { .. }) = action {
            tickets.push(ticket);
        }
    }
    r.on_disk(T0, tickets[0], DiskResult::Error);
    let closed = |a: &Action<()>| matches!(a, Action::Close(_));
    let until = |r: &mut Replica<()>| -> Vec<Action<()>> {
        r.end_turn();
        std::iter::from_fn(|| r.poll()).collect()
    };
    assert!(!until(&mut r).iter().any(closed));
    r.on_disk(T0, tickets[1], DiskResult::Done(None));
    let end = until(&mut r);
    let acked = |a: &Action<()>| {
        matches!(
            a,
            Action::Ack {
                seq: Seq(2),
                status: Status::Ok,
                ..
            }
        )
    };
    assert!(end.iter().position(acked).unwrap() < end.iter().position(closed).unwrap());
}

fn grow(r: &mut Replica<()>, seq: u64, size: u64) {
    let (epoch, seq) = (Epoch(2), Seq(seq));
    let message = Message::Grow { epoch, seq, size };
    r.on_message(T0, SessionId(1), message, None);
    r.end_turn();
}

/// What the copy wants next.
fn next(r: &mut Replica<()>) -> Option<Action<()>> {
    r.end_turn();
    std::iter::from_fn(|| r.poll()).find(|a| !matches!(a, Action::Event { .. }))
}

fn attached() -> Replica<()> {
    let mut r = replica();
    ask(&mut r, 1, 2, "x", Proof::Released(Epoch(1)));
    attach(&mut r, 1, 2);
    r
}

#[test]
fn room_is_answered_when_files_and_superblock_are_durable_and_is_no_permission_to_use_it() {
    let mut r = attached();
    grow(&mut r, 7, 4 << 20);
    let Some(Action::Disk(files, DiskOp::Grow { size })) = next(&mut r) else {
        panic!("the files come first")
    };
    assert_eq!(size, 4 << 20);
    // Requests go on meanwhile, up to the size that the volume has.
    let read = |seq, offset| {
        let span = Span { offset, len: 512 };
        let (epoch, seq, fua) = (Epoch(2), Seq(seq), false);
        Message::Read(Request {
            epoch,
            seq,
            span,
            fua,
        })
    };
    r.on_message(T0, SessionId(1), read(8, 0), None);
    let Some(Action::Disk(ticket, DiskOp::Read { .. })) = next(&mut r) else {
        panic!("a read")
    };
    r.on_disk(T0, ticket, DiskResult::Done(None));
    assert!(matches!(next(&mut r), Some(Action::Reply { .. })));
    r.on_disk(T0, files, DiskResult::Done(None));
    let Some(Action::Disk(superblock, DiskOp::Superblock(state))) = next(&mut r) else {
        panic!("then the superblock")
    };
    assert_eq!(state.size, 4 << 20);
    r.on_disk(T0, superblock, DiskResult::Done(None));
    assert!(matches!(
        next(&mut r),
        Some(Action::Ack {
            seq: Seq(7),
            status: Status::Ok,
            ..
        })
    ));
    r.on_message(T0, SessionId(1), read(9, 1 << 20), None);
    let status = Status::Io;
    let refused = Message::ReadReply {
        seq: Seq(9),
        status,
    };
    assert!(
        matches!(next(&mut r), Some(Action::Reply { message, .. }) if message == refused),
        "the configuration says 1 MiB"
    );
    // The room is there: a configuration that is smaller is taken, and asking again costs nothing.
    assert!(matches!(attach(&mut r, 1, 3), Message::AttachAck { .. }));
    assert_eq!(r.room(), 4 << 20);
}

#[test]
fn a_copy_without_room_says_so_and_goes_on_at_its_size() {
    let mut r = attached();
    grow(&mut r, 7, 4 << 20);
    let Some(Action::Disk(files, DiskOp::Grow { .. })) = next(&mut r) else {
        panic!("the files")
    };
    // A candidate's promise waits behind it, and is not lost.
    let promise = Promise {
        epoch: Epoch(3),
        candidate: NodeName("x".into()),
        instance: Instance([b'x'; 16]),
        proof: Proof::None,
        probe: false,
    };
    r.on_message(T0, SessionId(2), Message::Promise(promise), None);
    r.on_disk(T0, files, DiskResult::NoSpace);
    let mut acks = Vec::new();
    let mut said = Vec::new();
    loop {
        r.end_turn();
        match r.poll() {
            Some(Action::Disk(ticket, op)) => {
                assert!(matches!(&op, DiskOp::Superblock(s) if s.size == 1 << 20));
                r.on_disk(T0, ticket, DiskResult::Done(None));
            }
            Some(Action::Ack { seq, status, .. }) => acks.push((seq, status)),
            Some(Action::Reply { message, .. }) => said.push(message),
            Some(_) => {}
            None => break,
        }
    }
    assert_eq!(acks, [(Seq(7), Status::NoSpace)]);
    assert!(matches!(said.last(), Some(Message::PromiseAck(_))));
    assert_eq!(r.state().standing, Standing::InSync);
}

#[test]
fn a_size_that_no_volume_has_is_refused_before_anything_is_made_for_it() {
    let mut r = attached();
    grow(&mut r, 7, u64::MAX);
    assert!(matches!(
        next(&mut r),
        Some(Action::Ack {
            status: Status::NoSpace,
            ..
        })
    ));
    let config = Configuration {
        epoch: Epoch(3),
        tag: Tag(3),
        size: u64::MAX,
        logged: true,
        absent: Vec::new(),
    };
    for message in [Message::Attach(config.clone()), Message::SyncBegin(config)] {
        r.on_message(T0, SessionId(2), message, None);
        assert_eq!(settle(&mut r), [Message::Nack(Refusal::NoRoom)]);
    }
    assert_eq!(r.room(), 1 << 20);
}

#[test]
fn a_target_makes_room_before_its_sync_begins_and_ends_the_session_without_it() {
    for room in [true, false] {
        let mut r = replica();
        let config = Configuration {
            epoch: Epoch(2),
            tag: Tag(2),
            size: 4 << 20,
            logged: true,
            absent: Vec::new(),
        };
        r.on_message(T0, SessionId(1), Message::SyncBegin(config), None);
        let Some(Action::Disk(files, DiskOp::Grow { .. })) = next(&mut r) else {
            panic!("room first")
        };
        let result = match room {
            true => DiskResult::Done(None),
            false => DiskResult::NoSpace,
        };
        r.on_disk(T0, files, result);
        let said = settle(&mut r);
        match room {
            true => {
                assert!(matches!(said[..], [Message::SyncReady { .. }]));
                assert_eq!(
                    (r.room(), r.state().standing),
                    (4 << 20, Standing::Inconsistent)
                );
            }
            false => {
                assert_eq!(said, [Message::Nack(Refusal::NoRoom)]);
                // Untouched: it may be tried again.
                assert_eq!((r.room(), r.state().standing), (1 << 20, Standing::InSync));
            }
        }
    }
}

#[test]
fn what_a_former_attachment_of_the_same_process_called_stable_says_nothing_of_the_next_ones_writes()
{
    let mut r = replica();
    let write = |r: &mut Replica<()>, epoch, seq| {
        let request = Request {
            epoch: Epoch(epoch),
            seq: Seq(seq),
            span: Span {
                offset: 0,
                len: 512,
            },
            fua: false,
        };
        r.on_message(r.now, SessionId(epoch), Message::Write(request), Some(()));
        settle(r);
    };
    let beat = |r: &mut Replica<()>, epoch, stable| {
        let message = Message::Heartbeat {
            epoch: Epoch(epoch),
            sent: r.now,
            stable: Seq(stable),
        };
        r.on_message(r.now, SessionId(epoch), message, None);
    };
    let released = |e| Proof::Released(Epoch(e));
    ask(&mut r, 2, 2, "x", released(1));
    attach(&mut r, 2, 2);
    write(&mut r, 2, 1_000);
    beat(&mut r, 2, 1_000);
    r.on_message(
        r.now,
        SessionId(2),
        Message::Detach { epoch: Epoch(2) },
        None,
    );
    settle(&mut r);
    assert_eq!(r.active_regions(), 0);
    ask(&mut r, 4, 4, "x", released(3));
    attach(&mut r, 4, 4);
    write(&mut r, 4, 5);
    beat(&mut r, 4, 0);
    r.on_tick(r.now.after(Nanos::from_ms(60_000)));
    settle(&mut r);
    assert_eq!(r.active_regions(), 1, "no flush of it");
    beat(&mut r, 4, 5);
    r.on_tick(r.now.after(Nanos::from_ms(1)));
    settle(&mut r);
    assert_eq!(r.active_regions(), 0);
}
