//! Copies that come back, that take over, and an attachment that leaves.

use super::*;

impl Bench {
    /// Time passes while these copies answer heartbeats.
    pub(super) fn pass(&mut self, ms: u64, alive: &[usize]) {
        for _ in 0..ms / 50 {
            let (epoch, sent) = (self.a.record().epoch, self.now);
            for copy in alive {
                self.says(*copy, Message::HeartbeatAck { epoch, sent });
            }
            self.tick(50);
        }
    }
}

fn lost(actions: &[Action<Bytes>]) -> Vec<String> {
    let of = |a: &Action<Bytes>| match a {
        Action::Event { rule, text } if *rule == "2.6 copy lost" => Some(text.clone()),
        _ => None,
    };
    actions.iter().filter_map(of).collect()
}

fn flush_seq(actions: &[Action<Bytes>], copy: usize) -> Seq {
    let flush = |m: &Message| match m {
        Message::Flush { seq, .. } => Some(*seq),
        _ => None,
    };
    sent(actions, copy).iter().find_map(flush).unwrap()
}

#[test]
fn a_write_that_another_copy_may_have_is_not_given_up_on_a_full_disk() {
    let mut b = Bench::serving(2);
    b.submit(1, write(SPAN));
    let seq = writes(&b.take(), 0)[0].seq;
    // The other one has it, and is lost; the registry is away.
    b.acks(1, seq, Status::Ok);
    b.a.on_disconnected(b.now, 1, "reset");
    b.pass(500, &[0]);
    b.acks(0, seq, Status::NoSpace);
    b.a.on_cas(b.now, CasOutcome::Unavailable);
    let mut done = None;
    for _ in 0..700 {
        b.acks(0, seq, Status::NoSpace);
        b.pass(50, &[0]);
        let actions = b.take();
        if actions.iter().any(|a| matches!(a, Action::Cas { .. })) {
            b.a.on_cas(b.now, CasOutcome::Unavailable);
        }
        for m in sent(&actions, 0) {
            if let Message::Flush { seq, .. } = m {
                b.acks(0, seq, Status::Ok);
            }
        }
        done = done.or(completed(&actions).first().copied());
    }
    assert_eq!(done, Some((1, Outcome::IoError)));
    // It is back before it could be put out.
    b.a.on_connected(b.now, 1, boot(1));
    b.says(1, Message::AttachAck { epoch: Epoch(2) });
    b.pass(500, &[0, 1]);
    b.acks(0, seq, Status::NoSpace);
    b.pass(500, &[0, 1]);
    let proposed = b.proposed();
    let out = proposed.is_some_and(|p| p.copies[0].status == CopyStatus::Missing);
    assert!(out, "two copies in sync, of which one has the write");
}

#[test]
fn a_write_that_the_copies_left_have_is_no_error_because_one_that_is_gone_was_full() {
    let mut b = Bench::serving(2);
    b.submit(1, write(SPAN));
    let seq = writes(&b.take(), 0)[0].seq;
    // Copy 1 has it, and is lost; the registry is away, and copy 0, the last one, is full.
    b.acks(1, seq, Status::Ok);
    b.a.on_disconnected(b.now, 1, "reset");
    b.pass(500, &[0]);
    b.acks(0, seq, Status::NoSpace);
    // Its machine goes, and copy 1 is back before it could be put out.
    b.a.on_disconnected(b.now, 0, "its machine was switched off");
    b.a.on_cas(b.now, CasOutcome::Unavailable);
    b.a.on_connected(b.now, 1, boot(1));
    b.says(1, Message::AttachAck { epoch: Epoch(2) });
    b.take();
    b.pass(1_000, &[1]);
    let proposed = b.proposed().unwrap();
    assert_eq!(proposed.copies[0].status, CopyStatus::Missing);
    b.swapped();
    b.pass(50, &[1]);
    assert_eq!(completed(&b.take()), [(1, Outcome::Ok)]);
}

/// Of the write or flush that copy 0 was asked for.
fn first_seq(actions: &[Action<Bytes>]) -> Seq {
    let asked = |m: Message| match m {
        Message::Write(r) => Some(r.seq),
        Message::Flush { seq, .. } => Some(seq),
        _ => None,
    };
    sent(actions, 0).into_iter().find_map(asked).unwrap()
}

/// Copy 1 is lost, and the swap that puts it out is answered so. Whether copy 1 had the request or not, the disk of copy 0 fails it.
fn failed_after_the_other_was_lost(op: Op, had_it: bool, answer: CasOutcome) -> (Bench, Seq) {
    let mut b = Bench::serving(2);
    b.submit(1, op);
    let seq = first_seq(&b.take());
    if had_it {
        b.acks(1, seq, Status::Ok);
    }
    b.a.on_disconnected(b.now, 1, "reset");
    b.pass(500, &[0]);
    assert!(b.proposed().is_some());
    b.a.on_cas(b.now, answer);
    b.acks(0, seq, Status::Io);
    (b, seq)
}

impl Bench {
    /// Copy 1 is back, and copy 0 says what became of it; whether the request went to copy 1 again.
    fn other_is_back(&mut self, seq: Seq) -> bool {
        self.a.on_connected(self.now, 0, boot(0));
        self.says(0, Message::Nack(Refusal::Failed));
        self.take();
        self.a.on_connected(self.now, 1, boot(1));
        self.says(1, Message::AttachAck { epoch: Epoch(2) });
        let again = sent(&self.take(), 1).into_iter().any(|m| match m {
            Message::Write(r) => r.seq == seq,
            Message::Flush { seq: s, .. } => s == seq,
            _ => false,
        });
        self.acks(1, seq, Status::Ok);
        again
    }

    /// What the guest is told in the next 40 s, in which the disk of copy 0 stays dead.
    fn told_in_the_end(&mut self) -> Vec<(u64, Outcome)> {
        let mut told = completed(&self.take());
        for _ in 0..800 {
            self.pass(50, &[1]);
            let actions = self.take();
            told.extend(completed(&actions));
            for action in actions {
                match action {
                    Action::Dial { copy: 0, .. } => {
                        self.a.on_connected(self.now, 0, boot(0));
                        self.says(0, Message::Nack(Refusal::Failed));
                    }
                    Action::Cas { .. } => self.a.on_cas(self.now, CasOutcome::Unavailable),
                    _ => {}
                }
            }
        }
        told
    }
}

#[test]
fn what_the_disk_of_the_copy_left_failed_is_done_by_the_one_that_is_back_in_time() {
    for op in [write(SPAN), Op::Flush] {
        for had_it in [false, true] {
            let (mut b, seq) = failed_after_the_other_was_lost(op, had_it, CasOutcome::Unavailable);
            assert_eq!(completed(&b.take()), [], "{op:?}: copy 1 may be back");
            assert_eq!(b.other_is_back(seq), !had_it);
            assert_eq!(
                completed(&b.take()),
                [],
                "{op:?}: copy 0 is in sync, and has it not"
            );
            b.pass(300, &[1]);
            let out = b.proposed().unwrap();
            assert_eq!(out.copies[0].status, CopyStatus::Missing);
            assert_eq!(out.copies[1].status, CopyStatus::InSync);
            b.swapped();
            b.pass(50, &[1]);
            assert_eq!(completed(&b.take()), [(1, Outcome::Ok)], "{op:?}");
        }
    }
}

#[test]
fn what_a_dead_disk_failed_does_not_complete_because_a_copy_that_is_out_has_it() {
    for op in [write(SPAN), Op::Flush] {
        let (mut b, seq) = failed_after_the_other_was_lost(op, false, CasOutcome::Ambiguous);
        let revision = b.a.revision + 1;
        let swapped = b.proposed().unwrap();
        assert!(b.other_is_back(seq));
        assert_eq!(completed(&b.take()), [], "{op:?}");
        // It had been swapped: copy 0 alone is in sync.
        b.a.on_record(b.now, Some((swapped, revision)));
        assert_eq!(b.a.in_sync, CopySet::one(0));
        assert_eq!(b.told_in_the_end(), [(1, Outcome::IoError)], "{op:?}");
    }
}

#[test]
fn what_a_dead_disk_failed_ends_at_the_deadline_when_nobody_else_comes_back() {
    for op in [write(SPAN), Op::Flush] {
        for had_it in [false, true] {
            let (mut b, _) = failed_after_the_other_was_lost(op, had_it, CasOutcome::Unavailable);
            assert_eq!(b.told_in_the_end(), [(1, Outcome::IoError)], "{op:?}");
        }
    }
}

#[test]
fn what_the_only_copy_failed_is_told_at_once() {
    for op in [write(SPAN), Op::Flush] {
        let mut b = Bench::serving(1);
        b.submit(1, op);
        let seq = first_seq(&b.take());
        b.acks(0, seq, Status::Io);
        assert_eq!(completed(&b.take()), [(1, Outcome::IoError)], "{op:?}");
    }
}

#[test]
fn a_copy_whose_disk_failed_is_not_whole_because_it_forgot_that() {
    let mut b = Bench::serving(2);
    b.submit(1, Op::Flush);
    let seq = flush_seq(&b.take(), 1);
    b.acks(0, seq, Status::Ok);
    b.acks(1, seq, Status::Io);
    assert!(b.proposed().is_some());
    b.a.on_cas(b.now, CasOutcome::Unavailable);
    // Its process is restarted before it could be put out; the note that its disk has failed was not to be written either.
    b.a.on_connected(b.now, 1, boot(1));
    b.says(1, Message::AttachAck { epoch: Epoch(2) });
    let actions = b.take();
    assert!(actions.iter().any(|a| matches!(a, Action::Hangup(1))));
    assert!(writes(&actions, 1).is_empty() && completed(&actions).is_empty());
    b.pass(300, &[0]);
    assert_eq!(b.proposed().unwrap().copies[1].status, CopyStatus::Missing);
    b.swapped();
    assert_eq!(completed(&b.take()), [(1, Outcome::Ok)]);
}

#[test]
fn an_only_copy_whose_disk_failed_a_flush_and_forgot_that_fails_the_next_one_too() {
    let mut b = Bench::serving(1);
    b.submit(1, write(SPAN));
    let seq = first_seq(&b.take());
    b.acks(0, seq, Status::Ok);
    b.take();
    b.submit(2, Op::Flush);
    let seq = flush_seq(&b.take(), 0);
    b.acks(0, seq, Status::Io);
    b.a.on_disconnected(b.now, 0, "its process ended");
    assert_eq!(completed(&b.take()), [(2, Outcome::IoError)]);
    b.a.on_connected(b.now, 0, boot(0));
    b.says(0, Message::AttachAck { epoch: Epoch(2) });
    b.submit(3, Op::Flush);
    b.pass(50, &[0]);
    let seq = flush_seq(&b.take(), 0);
    b.acks(0, seq, Status::Ok);
    assert_eq!(completed(&b.take()), [(3, Outcome::IoError)]);
}

#[test]
fn a_copy_that_is_asked_instead_of_a_lost_one_is_not_late_at_once() {
    let mut b = Bench::serving(2);
    b.submit(1, Op::Read(SPAN));
    b.pass(5_100, &[0, 1]);
    let actions = b.take();
    assert_eq!(lost(&actions).len(), 1, "the master left it unanswered");
    b.swapped();
    b.pass(200, &[1]);
    let actions = b.take();
    assert!(
        sent(&actions, 1)
            .iter()
            .any(|m| matches!(m, Message::Read(_)))
    );
    assert_eq!(lost(&actions), [] as [String; 0]);
}

#[test]
fn a_copy_that_comes_back_is_not_late_with_what_waited_for_it() {
    let mut b = Bench::serving(1);
    b.submit(1, write(SPAN));
    b.a.on_disconnected(b.now, 0, "its process ended");
    b.pass(6_000, &[]);
    b.take();
    b.a.on_connected(b.now, 0, boot(0));
    b.says(0, Message::AttachAck { epoch: Epoch(2) });
    b.pass(200, &[0]);
    let actions = b.take();
    assert_eq!(writes(&actions, 0).len(), 1);
    assert_eq!(lost(&actions), [] as [String; 0]);
}

#[test]
fn nothing_begins_behind_the_flush_that_ends_an_attachment() {
    let mut b = Bench::serving(2);
    b.a.detach(b.now);
    let actions = b.take();
    let seq = flush_seq(&actions, 0);
    b.submit(1, write(SPAN));
    b.acks(0, seq, Status::Ok);
    b.acks(1, seq, Status::Ok);
    let actions = b.take();
    let told = |m: &Message| matches!(m, Message::Detach { .. });
    assert!(sent(&actions, 0).iter().any(told));
    assert!(
        writes(&actions, 0).is_empty(),
        "its log would be emptied without a flush of it"
    );
}

#[test]
fn what_a_former_attachment_completed_and_its_last_copy_lost_fails_the_next_flush() {
    let mut b = Bench::attached(1, State::Active, &[]);
    b.tick(0);
    b.take();
    b.a.on_disconnected(b.now, 0, "power");
    b.a.on_connected(b.now, 0, BootId([99; 16]));
    b.says(0, Message::AttachAck { epoch: Epoch(2) });
    b.submit(1, Op::Flush);
    b.pass(50, &[0]);
    let actions = b.take();
    let seq = flush_seq(&actions, 0);
    b.acks(0, seq, Status::Ok);
    assert_eq!(completed(&b.take()), [(1, Outcome::IoError)]);
}

#[test]
fn a_copy_that_comes_back_hears_of_nothing_stable_before_a_flush_that_began_later() {
    let mut b = Bench::serving(2);
    let stable = |actions: &[Action<Bytes>], copy| -> Vec<u64> {
        let of = |m: Message| match m {
            Message::Heartbeat { stable, .. } => Some(stable.0),
            _ => None,
        };
        sent(actions, copy).into_iter().filter_map(of).collect()
    };
    b.submit(1, Op::Flush);
    let seq = flush_seq(&b.take(), 0);
    b.acks(0, seq, Status::Ok);
    b.acks(1, seq, Status::Ok);
    b.pass(300, &[0, 1]);
    let actions = b.take();
    assert!(
        stable(&actions, 0)
            .iter()
            .chain(&stable(&actions, 1))
            .all(|s| *s > 0)
    );
    // On copy 0 and not on copy 1, and newer than that flush.
    b.submit(2, write(SPAN));
    let written = writes(&b.take(), 0)[0].seq;
    b.acks(0, written, Status::Ok);
    b.a.on_disconnected(b.now, 0, "its process was restarted");
    b.a.on_connected(b.now, 0, boot(0));
    b.says(0, Message::AttachAck { epoch: Epoch(2) });
    b.pass(600, &[0, 1]);
    let actions = b.take();
    assert!(stable(&actions, 0).iter().all(|s| *s == 0));
    assert!(stable(&actions, 1).iter().all(|s| *s > 0));
    // A flush of all began by itself.
    let seq = flush_seq(&actions, 0);
    b.acks(1, written, Status::Ok);
    b.acks(0, seq, Status::Ok);
    b.acks(1, seq, Status::Ok);
    b.submit(3, Op::Flush);
    let seq = flush_seq(&b.take(), 0);
    b.acks(0, seq, Status::Ok);
    b.acks(1, seq, Status::Ok);
    b.pass(300, &[0, 1]);
    assert!(stable(&b.take(), 0).iter().all(|s| *s >= written.0));
}

#[test]
fn what_the_master_cannot_read_is_waited_for_while_another_member_is_lost_and_not_put_out() {
    for back in [true, false] {
        let mut b = Bench::serving(2);
        b.a.on_disconnected(b.now, 1, "reset");
        b.pass(500, &[0]);
        b.submit(1, Op::Read(SPAN));
        let read = |m: &Message| match m {
            Message::Read(r) => Some(r.seq),
            _ => None,
        };
        let seq = sent(&b.take(), 0).iter().find_map(read).unwrap();
        let reply = |seq| Message::ReadReply {
            seq,
            status: Status::Io,
        };
        b.says(0, reply(seq));
        assert!(completed(&b.take()).is_empty());
        if back {
            b.a.on_connected(b.now, 1, boot(1));
            b.says(1, Message::AttachAck { epoch: Epoch(2) });
            let again = sent(&b.take(), 1).iter().find_map(read);
            assert_eq!(again, Some(seq));
        } else {
            b.swapped();
            b.says(0, reply(seq));
            assert_eq!(completed(&b.take()), [(1, Outcome::IoError)]);
        }
    }
}

#[test]
fn a_read_that_completed_under_a_lease_is_not_shown_after_it() {
    let mut b = Bench::serving(2);
    b.pass(300, &[0, 1]);
    let later = |b: &Bench, ms: u64| b.now.after(Nanos(ms * MS));
    assert!(b.a.may_show_reads(later(&b, 1_000)));
    assert!(!b.a.may_show_reads(later(&b, 2_000)));
}

#[test]
fn a_member_that_is_back_while_its_ejection_is_in_doubt_suspends_nothing_when_it_stays() {
    // Given a member that was lost, and a registry that does not say whether it was put out,
    let mut b = Bench::serving(2);
    b.a.on_disconnected(b.now, 1, "reset");
    b.pass(500, &[0]);
    assert!(b.proposed().is_some());
    b.a.on_cas(b.now, CasOutcome::Ambiguous);
    b.pass(1_500, &[0]);
    assert!(b.a.why_not_serving().is_some());
    b.submit(1, write(SPAN));
    // when it comes back and is lost again, and again, then nothing is served;
    for _ in 0..3 {
        b.a.on_connected(b.now, 1, boot(1));
        b.says(1, Message::AttachAck { epoch: Epoch(2) });
        b.pass(500, &[0, 1]);
        assert!(b.a.why_not_serving().is_some());
        b.a.on_disconnected(b.now, 1, "reset");
        b.pass(500, &[0]);
    }
    // and when it stays, what waited completes with its answer, and not without it.
    b.a.on_connected(b.now, 1, boot(1));
    b.says(1, Message::AttachAck { epoch: Epoch(2) });
    b.take();
    b.pass(1_500, &[0, 1]);
    assert_eq!(b.a.why_not_serving(), None);
    let seq = writes(&b.take(), 1)[0].seq;
    b.acks(0, seq, Status::Ok);
    assert_eq!(completed(&b.take()), []);
    b.acks(1, seq, Status::Ok);
    assert_eq!(completed(&b.take()), [(1, Outcome::Ok)]);
}
