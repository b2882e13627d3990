//! How far a drain is, for whoever waits for it and whoever asks.

use std::thread;
use std::time::{Duration, Instant};

use super::output::{Table, fields, or_dash};
use super::progress::{LOOK, SILENCE, STALL, Screen};
use super::volume_text::bar;
use super::{Failure, Global, note};
use crate::cluster::drain::{DrainCopy, DrainState, DrainView};
use crate::cluster::fault::{Code, Fault};
use crate::cluster::view::NodeView;

/// No copy can go, for this long: whoever waits is told why. A node that is being started answers within this.
const BLOCKED: Duration = Duration::from_secs(15);

/// Looks at the node until no copy is left, and shows how far it is meanwhile.
pub(super) fn follow(global: &Global, path: &str) -> Result<(), Failure> {
    let mut screen = Screen::new();
    let mut last = (String::new(), Instant::now());
    let mut answered = Instant::now();
    let mut blocked_since = None;
    loop {
        match global.remote().get::<NodeView>(path) {
            Ok(node) => {
                answered = Instant::now();
                let Some(view) = &node.drain else {
                    screen.clear();
                    return Err(Fault::state(format!(
                        "the drain of node {} was ended by somebody else",
                        node.name
                    ))
                    .into());
                };
                if view.done {
                    screen.clear();
                    for volume in &view.attached {
                        note(&still_attached(&node, volume));
                    }
                    return Ok(());
                }
                let state = line(view);
                screen.say(&state);
                if last.0 != state {
                    last = (state, Instant::now());
                }
                blocked_since = match blocked(view) {
                    true => blocked_since.or(Some(Instant::now())),
                    false => None,
                };
                let stuck = blocked_since.is_some_and(|at| at.elapsed() >= BLOCKED);
                if stuck || last.1.elapsed() >= STALL {
                    screen.clear();
                    return Err(cannot_go(&node, view, stuck).into());
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
        thread::sleep(LOOK);
    }
}

/// Nothing moves, and nothing waits for its turn.
fn blocked(view: &DrainView) -> bool {
    let is_blocked = |c: &DrainCopy| c.state == DrainState::Blocked;
    !view.copies.is_empty() && view.copies.iter().all(is_blocked)
}

fn cannot_go(node: &NodeView, view: &DrainView, stuck: bool) -> Fault {
    let reasons: Vec<String> = view
        .copies
        .iter()
        .map(|c| format!("{}: {}", c.volume, or_dash(&c.why)))
        .collect();
    let message = format!(
        "node {} still holds {}: {}",
        node.name,
        count(view.copies.len()),
        reasons.join("; ")
    );
    let fault = match stuck {
        true => Fault::state(message),
        false => Fault::try_again(message),
    };
    fault.hint(format!(
        "the drain goes on as soon as it can: start or uncordon another node, or ask for fewer replicas; \
         see: lockstep node inspect {0}; to end it: lockstep node undrain {0}",
        node.name
    ))
}

fn still_attached(node: &NodeView, volume: &str) -> String {
    format!(
        "node {} still serves {volume}: stop or migrate its virtual machine. To migrate it: lockstep volume attach {volume} \
         --node OTHER --incoming; if it is stopped: lockstep volume detach {volume}",
        node.name
    )
}

fn count(copies: usize) -> String {
    match copies {
        1 => "1 copy".into(),
        n => format!("{n} copies"),
    }
}

/// One line: how many are left, and how far the first that moves is.
fn line(view: &DrainView) -> String {
    let mut text = format!("{} left", count(view.copies.len()));
    let moving = || view.copies.iter().filter(|c| c.state == DrainState::Moving);
    let shown = moving()
        .find(|c| c.sync.is_some())
        .or_else(|| moving().next())
        .or_else(|| view.copies.first());
    if let Some(copy) = shown {
        text += &format!(": {}", copy.volume);
        if let Some(to) = &copy.to {
            text += &format!(" to {to}");
        }
        match &copy.sync {
            Some(sync) => text += &format!(" {}", bar(sync)),
            None if !copy.why.is_empty() => text += &format!(" ({})", copy.why),
            None => {}
        }
    }
    text
}

/// What `node inspect` says of it.
pub(super) fn describe(view: &DrainView) -> String {
    let state = match view.done {
        true => "done".into(),
        false => format!("{} left", count(view.copies.len())),
    };
    let mut out = fields(&[
        ("Drain", format!("{state}, since {}", view.since)),
        ("Still serves", or_dash(&view.attached.join(", "))),
    ]);
    if !view.copies.is_empty() {
        let mut table = Table::new(&["VOLUME", "STATE", "TO", "PROGRESS"]);
        for c in &view.copies {
            let state = match c.state {
                DrainState::Moving => "moving",
                DrainState::Waiting => "waiting",
                DrainState::Blocked => "blocked",
            };
            table.row(vec![
                c.volume.clone(),
                state.into(),
                c.to.as_ref()
                    .map_or_else(|| "-".into(), ToString::to_string),
                c.sync.as_ref().map_or_else(|| or_dash(&c.why), bar),
            ]);
        }
        out += &format!("\n{}", table.text());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::node;
    use crate::cluster::host::SyncProgress;

    fn copy(volume: &str, state: DrainState, why: &str) -> DrainCopy {
        DrainCopy {
            volume: volume.into(),
            state,
            to: (state == DrainState::Moving).then(|| node("n4")),
            why: why.into(),
            sync: None,
        }
    }

    fn view(copies: Vec<DrainCopy>) -> DrainView {
        DrainView {
            since: "2024-02-29T00:00:00.000Z".into(),
            done: copies.is_empty(),
            copies,
            attached: Vec::new(),
        }
    }

    #[test]
    fn the_line_shows_what_moves_before_what_waits() {
        use DrainState::{Blocked, Moving, Waiting};
        let mut all = vec![
            copy("a", Waiting, "others go first"),
            copy("b", Moving, "not on its node's disk"),
        ];
        assert_eq!(
            line(&view(all.clone())),
            "2 copies left: b to n4 (not on its node's disk)"
        );
        all.push(copy("c", Moving, ""));
        all[2].sync = Some(SyncProgress::new(1 << 30, 2 << 30, 128 << 20));
        assert_eq!(
            line(&view(all.clone())),
            "3 copies left: c to n4 [##########..........] 50 %  1 GiB left  128 MiB/s  ETA 0:08"
        );
        assert!(!blocked(&view(all)));
        let stuck = view(vec![copy(
            "a",
            Blocked,
            "1 more copy needs a node and 0 can take one",
        )]);
        assert!(blocked(&stuck));
        assert_eq!(
            line(&stuck),
            "1 copy left: a (1 more copy needs a node and 0 can take one)"
        );
        assert!(!blocked(&view(Vec::new())));
    }
}
