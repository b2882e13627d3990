//! A command that waits for copies to be brought up to date: a bar in place on a terminal, plain lines elsewhere.

use std::io::{self, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};

use super::remote::{CLEAR_LINE, STEP_OF_LINES, show};
use super::volume::path;
use super::volume_text::bar;
use super::{Failure, Global};
use crate::cluster::fault::{Code, Fault};
use crate::cluster::host::SyncProgress;
use crate::cluster::model::VolumeName;
use crate::cluster::units::show_size;
use crate::cluster::view::{CopyView, VolumeView};
use crate::replication::ids::NodeName;

/// How often the node is asked.
pub(super) const LOOK: Duration = Duration::from_millis(500);
/// A node that is restarted answers again within this.
pub(super) const SILENCE: Duration = Duration::from_secs(30);
/// Nothing moved for so long: whoever waits is told, and what was asked for goes on. Longer than the wait for a lost
/// copy, after which a new one is made elsewhere.
pub(super) const STALL: Duration = Duration::from_secs(300);

/// What fits a line of the narrowest terminal in use.
const LINE: usize = 79;

/// How far what was asked for is.
pub(super) enum Step {
    Done,
    Wait,
    Failed(Fault),
}

/// The volume has `replicas` replicas: none leaves any more and, if `all_in_sync`, all are in sync.
pub(super) fn resized(v: &VolumeView, replicas: u8, all_in_sync: bool) -> Step {
    if v.replicas != replicas {
        return Step::Failed(Fault::state(format!(
            "volume {}/{} was changed to {} replicas meanwhile",
            v.namespace, v.name, v.replicas
        )));
    }
    let leaving = v.copies.iter().any(|c| c.leaving);
    let in_sync = v.copies.iter().filter(|c| c.state == "in_sync").count();
    match leaving || (all_in_sync && in_sync <= usize::from(replicas)) {
        true => Step::Wait,
        false => Step::Done,
    }
}

/// The volume has `size` bytes, on every copy and for the guest.
pub(super) fn grown(v: &VolumeView, size: u64) -> Step {
    let name = format!("{}/{}", v.namespace, v.name);
    let (is, to) = (show_size(v.size), show_size(size));
    if v.size >= size {
        return Step::Done;
    }
    match (v.growing_to, &v.growth_refused) {
        (Some(now), None) if now == size => Step::Wait,
        (Some(now), Some(why)) if now == size => Step::Failed(Fault::state(format!(
            "volume {name} stays at {is}, it cannot grow to {to}: {why}"
        ))),
        _ => Step::Failed(Fault::state(format!(
            "volume {name} was to grow to {to}, and somebody changed that meanwhile"
        ))),
    }
}

/// The copy is in sync at `to`, and there is none at `from`.
pub(super) fn moved(v: &VolumeView, from: &NodeName, to: &NodeName) -> Step {
    let on = |node: &NodeName| v.copies.iter().find(|c| c.node == *node);
    match (on(from), on(to)) {
        (None, Some(copy)) if copy.state == "in_sync" => Step::Done,
        (Some(old), None) if !old.leaving => Step::Failed(Fault::state(format!(
            "the copy of volume {}/{} on {from} is to stay there after all",
            v.namespace, v.name
        ))),
        (None, None) => Step::Failed(Fault::state(format!(
            "the copy of volume {}/{} on {to} was removed meanwhile",
            v.namespace, v.name
        ))),
        _ => Step::Wait,
    }
}

/// Looks at the volume until `step` has an end, and shows how far it is meanwhile.
pub(super) fn follow(
    global: &Global,
    name: &VolumeName,
    step: impl Fn(&VolumeView) -> Step,
) -> Result<(), Failure> {
    let mut screen = Screen::new();
    let mut moved = (String::new(), Instant::now());
    let mut answered = Instant::now();
    loop {
        match global.remote().get::<VolumeView>(&path(name)) {
            Ok(volume) => {
                answered = Instant::now();
                match step(&volume) {
                    Step::Done => {
                        screen.clear();
                        return Ok(());
                    }
                    Step::Failed(fault) => {
                        screen.clear();
                        return Err(fault.into());
                    }
                    Step::Wait => {}
                }
                let state = describe(&volume);
                screen.say(&state);
                if moved.0 != state {
                    moved = (state, Instant::now());
                }
            }
            Err(fault) if fault.code == Code::TryAgain && answered.elapsed() < SILENCE => {
                screen.say(&fault.message);
            }
            Err(fault) => {
                screen.clear();
                return Err(fault.into());
            }
        }
        if moved.1.elapsed() >= STALL {
            screen.clear();
            return Err(Fault::try_again(format!(
                "volume {name}: nothing moved for {}s: {}",
                STALL.as_secs(),
                moved.0
            ))
            .hint(format!(
                "what was asked for goes on; see: lockstep volume inspect {name}"
            ))
            .into());
        }
        thread::sleep(LOOK);
    }
}

/// One line: the copies that are brought up to date, together, or else why nothing is.
fn describe(v: &VolumeView) -> String {
    let syncing: Vec<(&CopyView, &SyncProgress)> = v
        .copies
        .iter()
        .filter_map(|c| Some((c, c.sync.as_ref()?)))
        .collect();
    if syncing.is_empty() {
        let leaving: Vec<&str> = v
            .copies
            .iter()
            .filter(|c| c.leaving)
            .map(|c| c.node.0.as_str())
            .collect();
        return match (v.why.as_str(), leaving.is_empty()) {
            ("", true) if v.growing_to.is_some() => "waiting for the copies to make room".into(),
            ("", true) => "waiting".into(),
            ("", false) => format!("waiting for the copy on {} to leave", leaving.join(", ")),
            (why, _) => format!("waiting: {why}"),
        };
    }
    let nodes: Vec<&str> = syncing.iter().map(|(c, _)| c.node.0.as_str()).collect();
    let sum = |figure: fn(&SyncProgress) -> u64| -> u64 {
        syncing
            .iter()
            .map(|(_, s)| figure(s))
            .fold(0, u64::saturating_add)
    };
    let all = SyncProgress::new(
        sum(|s| s.remaining_bytes),
        sum(|s| s.total_bytes.max(s.remaining_bytes)),
        sum(|s| s.bytes_per_second),
    );
    format!("{} {}", nodes.join(", "), bar(&all))
}

/// Standard error: one line drawn over and over on a terminal; elsewhere a line now and then, when it is another one.
pub(super) struct Screen {
    terminal: bool,
    last: Option<(String, Instant)>,
}

impl Screen {
    pub(super) fn new() -> Self {
        Self {
            terminal: io::stderr().is_terminal(),
            last: None,
        }
    }

    pub(super) fn say(&mut self, text: &str) {
        if self.terminal {
            // A line that wraps is not drawn over.
            let line: String = text.chars().take(LINE).collect();
            show(&format!("{CLEAR_LINE}{line}"));
            self.last = Some((text.into(), Instant::now()));
            return;
        }
        let due = match &self.last {
            None => true,
            Some((said, at)) => said != text && at.elapsed() >= STEP_OF_LINES,
        };
        if due {
            show(&format!("{text}\n"));
            self.last = Some((text.into(), Instant::now()));
        }
    }

    pub(super) fn clear(&mut self) {
        if self.terminal && self.last.take().is_some() {
            show(CLEAR_LINE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::{node, record, spec};
    use crate::cluster::live::Live;
    use crate::cluster::view;
    use crate::replication::record::{Growth, Record};

    fn seen(copies: &str, replicas_wanted: u8) -> VolumeView {
        let record = Record {
            replicas_wanted,
            ..record(copies)
        };
        view::volume(&spec(), &record, &Live::default())
    }

    fn word(step: &Step) -> &'static str {
        match step {
            Step::Done => "done",
            Step::Wait => "wait",
            Step::Failed(_) => "failed",
        }
    }

    #[test]
    fn a_change_of_replicas_ends_when_they_are_in_sync_or_gone() {
        for (copies, wanted, asked, all_in_sync, expected) in [
            ("n1:i n2:i", 1, 1, true, "done"),
            ("n1:i n2:b", 1, 1, true, "wait"),
            ("n1:i n2:i", 2, 1, true, "failed"),
            ("n1:i n2:i n3:il", 1, 1, false, "wait"),
            ("n1:i n2:i n3:r", 1, 1, false, "done"),
            ("n1:i n2:m n3:r", 1, 1, false, "done"),
            // A lost copy whose place another one took does not count.
            ("n1:i n2:m n3:i", 1, 1, true, "done"),
        ] {
            let step = resized(&seen(copies, wanted), asked, all_in_sync);
            assert_eq!(word(&step), expected, "{copies}, {asked} asked");
        }
    }

    #[test]
    fn a_growth_ends_when_it_is_there_or_refused_or_somebody_else_wants_another() {
        for (size, wish, expected) in [
            (1 << 30, Some((2 << 30, None)), "wait"),
            (1 << 30, Some((2 << 30, Some("full"))), "failed"),
            (1 << 30, Some((3 << 30, None)), "failed"),
            (1 << 30, None, "failed"),
            (2 << 30, None, "done"),
            (2 << 30, Some((3 << 30, Some("full"))), "done"),
        ] {
            let mut record = record("n1:i n2:i");
            record.size = size;
            record.grow = wish.map(|(to, refused): (u64, Option<&str>)| Growth {
                to,
                refused: refused.map(Into::into),
            });
            let seen = view::volume(&spec(), &record, &Live::default());
            assert_eq!(word(&grown(&seen, 2 << 30)), expected, "{size} {wish:?}");
        }
    }

    #[test]
    fn a_move_ends_when_the_new_copy_is_in_sync_and_the_old_one_gone() {
        for (copies, expected) in [
            ("n1:i n2:il n3:b", "wait"),
            ("n1:i n2:il n3:i", "wait"),
            ("n1:i n2:r n3:i", "done"),
            ("n1:i n2:r n3:m", "wait"),
            ("n1:i n2:r n3:r", "failed"),
            ("n1:i n2:i n3:r", "failed"),
        ] {
            let step = moved(&seen(copies, 1), &node("n2"), &node("n3"));
            assert_eq!(word(&step), expected, "{copies}");
        }
    }

    #[test]
    fn what_is_waited_for_is_said_in_a_line() {
        let mut volume = seen("n1:i n2:il n3:b n4:b", 2);
        volume.why = "the copy on n3 is missing".into();
        assert_eq!(describe(&volume), "waiting: the copy on n3 is missing");
        for (copy, remaining_bytes) in [(2, 1 << 20), (3, 1 << 20)] {
            volume.copies[copy].sync = Some(SyncProgress::new(remaining_bytes, 4 << 20, 1 << 19));
        }
        assert_eq!(
            describe(&volume),
            "n3, n4 [###############.....] 75 %  2 MiB left  1 MiB/s  ETA 0:02"
        );
        volume.why.clear();
        volume.copies.truncate(2);
        assert_eq!(describe(&volume), "waiting for the copy on n2 to leave");
    }
}
