//! Growing: when the record may say so, and what ends it.

use super::*;
use crate::replication::record::Growth;

const TO: u64 = 3 * REGION;

impl Bench {
    /// The operator asks for `to` bytes.
    fn wish(&mut self, to: u64) {
        let mut record = self.a.record().clone();
        record.grow = Some(Growth { to, refused: None });
        let revision = self.a.revision + 1;
        self.a.on_record(self.now, Some((record, revision)));
    }
}

/// The request for room that `copy` was sent.
fn asked(actions: &[Action<Bytes>], copy: usize) -> Vec<(Seq, u64)> {
    let all = sent(actions, copy).into_iter();
    all.filter_map(|m| match m {
        Message::Grow { seq, size, .. } => Some((seq, size)),
        _ => None,
    })
    .collect()
}

#[test]
fn the_record_says_the_new_size_when_every_copy_has_answered_and_not_before() {
    let mut b = Bench::serving(2);
    b.wish(TO);
    let actions = b.take();
    let (first, second) = (asked(&actions, 0), asked(&actions, 1));
    assert_eq!((first.len(), second.len()), (1, 1));
    assert_eq!((first[0].1, second[0].1), (TO, TO));
    b.acks(0, first[0].0, Status::Ok);
    assert!(b.proposed().is_none());
    assert!(asked(&b.take(), 0).is_empty(), "asked once");
    b.acks(1, second[0].0, Status::Ok);
    let next = b.proposed().unwrap();
    assert_eq!((next.size, next.grow), (TO, None));
    assert_eq!(next.epoch, Epoch(3));
    // Whoever shows the size to a guest reads it here: not while nobody knows whether it was swapped.
    assert_eq!(b.a.record().size, REGION);
    b.take();
    b.swapped();
    assert_eq!(b.a.record().size, TO);
    let sizes = |m: &Message| matches!(m, Message::EpochChange(c) if c.size == TO);
    assert!(sent(&b.take(), 1).iter().any(sizes));
}

#[test]
fn a_copy_that_does_not_answer_is_put_out_and_the_others_go_on() {
    let mut b = Bench::serving(2);
    b.wish(TO);
    let first = asked(&b.take(), 0)[0].0;
    b.acks(0, first, Status::Ok);
    b.a.on_disconnected(b.now, 1, "reset");
    for _ in 0..10 {
        b.tick(50);
    }
    // One change of the record does both, or the one after it.
    let mut next = b.proposed().unwrap();
    assert_eq!(next.copies[1].status, CopyStatus::Missing);
    while next.size != TO {
        b.take();
        b.swapped();
        next = b.proposed().unwrap();
    }
    assert_eq!(next.copies[1].status, CopyStatus::Missing);
}

#[test]
fn a_copy_without_room_ends_the_wish_and_stays() {
    let mut b = Bench::serving(2);
    b.wish(TO);
    let actions = b.take();
    let (first, second) = (asked(&actions, 0)[0].0, asked(&actions, 1)[0].0);
    b.acks(1, second, Status::NoSpace);
    let next = b.proposed().unwrap();
    assert_eq!(next.size, REGION);
    assert_eq!(next.in_sync().count(), 2);
    let why = next.grow.unwrap().refused.unwrap();
    assert!(why.contains("n1") && why.contains("no room"), "{why}");
    b.take();
    b.swapped();
    b.acks(0, first, Status::Ok);
    assert!(b.proposed().is_none(), "not tried again by itself");
    // Asked again, with space: only the one that had none is asked.
    b.take();
    b.wish(TO);
    let actions = b.take();
    assert!(asked(&actions, 0).is_empty());
    b.acks(1, asked(&actions, 1)[0].0, Status::Ok);
    assert_eq!(b.proposed().unwrap().size, TO);
}

#[test]
fn a_wish_that_an_attachment_finds_is_fulfilled_by_it_once_copies_are_the_same() {
    let mut record = Bench::record(1, State::Clean);
    record.grow = Some(Growth {
        to: TO,
        refused: None,
    });
    let mut b = Bench::new(record);
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
    b.swapped();
    assert!(asked(&b.take(), 0).is_empty());
    b.says(0, Message::AttachAck { epoch: Epoch(2) });
    b.tick(0);
    let room = asked(&b.take(), 0)[0].0;
    b.acks(0, room, Status::Ok);
    assert_eq!(b.proposed().unwrap().size, TO);
}
