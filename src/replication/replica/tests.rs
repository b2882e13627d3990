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
    Replica::new(state, &[], maps, BootId([3; 16]), Timing::DEFAULT, T0)
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
