//! Syncs that wait for their turn, because a node brings only so many copies up to date at once.

use super::*;

impl Bench {
    /// Time passes, and the copies that are in sync are heard.
    fn beat(&mut self, ms: u64) -> Vec<Action<Bytes>> {
        let (epoch, sent) = (self.a.record().epoch, self.now);
        self.says(0, Message::HeartbeatAck { epoch, sent });
        self.says(1, Message::HeartbeatAck { epoch, sent });
        self.tick(ms);
        self.take()
    }
}

fn dials(actions: &[Action<Bytes>]) -> bool {
    let target = |a: &Action<Bytes>| matches!(a, Action::Dial { copy: TARGET, .. });
    actions.iter().any(target)
}

/// Two in-sync copies, and the third ejected and dialed again.
fn dialing() -> Bench {
    let mut b = Bench::without_target();
    assert!(dials(&b.take()));
    b
}

#[test]
fn a_sync_that_may_not_begin_is_tried_again_soon_and_says_what_it_waits_for() {
    let mut b = dialing();
    for _ in 0..20 {
        b.a.on_put_off(b.now, TARGET, "it waits for its turn: others go first");
        let why = b.a.status().copies[TARGET].why.clone();
        // Why it was lost is still said, once; and it is not taken for one that breaks off again and again.
        assert!(why.contains("reset; it waits for its turn"), "{why}");
        assert_eq!(why.matches("it waits").count(), 1);
        assert!(!dials(&b.beat(200)));
        assert!(dials(&b.beat(50)));
    }
    b.a.on_connected(b.now, TARGET, boot(TARGET));
    assert!(b.a.is_syncing(TARGET));
}

#[test]
fn a_target_that_has_no_place_is_asked_again_soon_and_nothing_broke_off() {
    let mut b = dialing();
    for _ in 0..20 {
        b.a.on_connected(b.now, TARGET, boot(TARGET));
        assert!(b.a.is_syncing(TARGET));
        b.take();
        b.says(TARGET, Message::Nack(Refusal::Busy));
        assert!(!b.a.is_syncing(TARGET));
        let actions = b.take();
        assert!(
            matches!(actions[..], [Action::Hangup(TARGET)]),
            "{actions:?}"
        );
        assert!(!dials(&b.beat(200)));
        assert!(dials(&b.beat(50)));
    }
}

#[test]
fn a_member_is_not_put_off() {
    let mut b = Bench::serving(3);
    b.a.on_put_off(b.now, 1, "it waits for its turn");
    assert!(b.a.status().copies[1].connected);
    assert!(b.take().is_empty());
}
