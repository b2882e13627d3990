//! A scrub, for whoever waits for it and whoever asks how it was.

use std::thread;
use std::time::{Duration, Instant};

use super::output::{Table, print};
use super::progress::{LOOK, SILENCE, STALL, Screen};
use super::volume_text::bar;
use super::{Failure, Global};
use crate::cluster::fault::{Code, Fault};
use crate::cluster::host::{Difference, ScrubState, ScrubStatus, SyncProgress};
use crate::cluster::model::VolumeName;
use crate::cluster::scrub::ScrubView;
use crate::cluster::units::show_size;
use crate::replication::ids::NodeName;

/// The node that compares does not answer, or no node knows of the scrub any more, for so long: whoever waits is told.
const GONE: Duration = Duration::from_secs(10);

/// Waits until the scrub `id` has ended, prints what it found, and fails unless all copies are the same.
pub(super) fn follow(
    global: &Global,
    name: &VolumeName,
    path: &str,
    id: u64,
) -> Result<(), Failure> {
    let mut screen = Screen::new();
    let outcome = wait(global, name, path, id, &mut screen);
    screen.clear();
    let view = outcome?;
    let broke_off = view.status.state == ScrubState::BrokenOff;
    if !broke_off || view.status.compared_bytes > 0 {
        print(global.output, &view, |v| report(name, v))?;
    }
    match (broke_off, view.status.left_bytes()) {
        (true, _) => Err(lost(name, &view.status.why).into()),
        (false, 0) => Ok(()),
        (false, bytes) => Err(not_the_same(name, &view.status, bytes).into()),
    }
}

fn wait(
    global: &Global,
    name: &VolumeName,
    path: &str,
    id: u64,
    screen: &mut Screen,
) -> Result<ScrubView, Fault> {
    let begun = Instant::now();
    // The state and since when it has been so; when the node that is asked answered last, when one spoke of this scrub.
    let mut moved = (String::new(), begun);
    let (mut answered, mut known) = (begun, begun);
    loop {
        let mut why = "no node knows of it any more".to_string();
        match global.remote().get::<ScrubView>(path) {
            Ok(view) if view.status.id == id => {
                if !view.status.is_open() {
                    return Ok(view);
                }
                answered = Instant::now();
                match view.status.why.as_str() {
                    "" => known = answered,
                    reason => why = reason.into(),
                }
                let state = line(&view);
                screen.say(&state);
                if moved.0 != state {
                    moved = (state, answered);
                }
            }
            Ok(view) if view.status.id > id => {
                return Err(lost(name, "another one took its place"));
            }
            Ok(_) => answered = Instant::now(),
            Err(fault) if fault.code == Code::NotFound => answered = Instant::now(),
            Err(fault) if fault.code == Code::TryAgain && answered.elapsed() < SILENCE => {
                known = Instant::now();
                screen.say(&fault.message);
            }
            Err(fault) => return Err(fault),
        }
        if known.elapsed() >= GONE {
            return Err(lost(name, &why));
        }
        if moved.1.elapsed() >= STALL {
            let text = format!(
                "volume {name}: nothing moved for {}s: {}",
                STALL.as_secs(),
                moved.0
            );
            return Err(Fault::try_again(text).hint(format!(
                "the scrub goes on; see: lockstep volume inspect {name}"
            )));
        }
        thread::sleep(LOOK);
    }
}

fn lost(name: &VolumeName, why: &str) -> Fault {
    Fault::try_again(format!("the scrub of volume {name} broke off: {why}"))
        .hint(format!("begin it anew: lockstep volume scrub {name}"))
}

fn not_the_same(name: &VolumeName, status: &ScrubStatus, bytes: u64) -> Fault {
    let size = show_size(bytes);
    if status.differing_bytes == 0 {
        return Fault::state(format!(
            "{size} of volume {name} cannot be read on every copy"
        ))
        .hint("look at the disks that are named; what no disk can read is lost until it is written anew");
    }
    if status.repair {
        return Fault::state(format!(
            "{size} of volume {name} are still not the same on every copy"
        ))
        .hint("a disk does not keep what is written to it: move its copy away (lockstep volume move) and replace it");
    }
    Fault::state(format!("{size} of volume {name} differ between its copies")).hint(format!(
        "the first node of each line holds what the virtual machine reads; to make all copies so: lockstep volume scrub {name} \
         --repair; if the others are right, first: lockstep volume promote {name} --node ONE-OF-THEM"
    ))
}

/// `running  [####......] 20 %  …`, or how it ended.
pub(super) fn line(view: &ScrubView) -> String {
    let s = &view.status;
    let found = match s.left_bytes() {
        0 if s.repaired_bytes > 0 => format!("{} repaired", show_size(s.repaired_bytes)),
        0 => "no difference".into(),
        bytes => format!("{} not the same on every copy", show_size(bytes)),
    };
    match s.state {
        ScrubState::Waiting if s.why.is_empty() => format!("waiting for {} to begin", view.node),
        ScrubState::Waiting => format!("waiting for {} to begin: {}", view.node, s.why),
        ScrubState::Running => {
            let left = s.total_bytes.saturating_sub(s.done_bytes);
            let progress = SyncProgress::new(left, s.total_bytes, s.bytes_per_second);
            let found = match s.left_bytes() + s.repaired_bytes {
                0 => String::new(),
                _ => format!("  {found}"),
            };
            format!("{}{found}", bar(&progress))
        }
        ScrubState::Done => format!("{found}, asked for at {}", view.asked),
        ScrubState::BrokenOff => format!("broke off: {}", s.why),
    }
}

/// What it found, for people.
fn report(name: &VolumeName, view: &ScrubView) -> String {
    let s = &view.status;
    let mut out = format!("{name}: {} compared", show_size(s.compared_bytes));
    for (bytes, what) in [
        (s.differing_bytes, "differed"),
        (s.unreadable_bytes, "could not be read on some copy"),
        (s.lost_bytes, "cannot be read on any"),
        (s.repaired_bytes, "repaired"),
    ] {
        if bytes > 0 {
            out += &format!(", {} {what}", show_size(bytes));
        }
    }
    if s.left_bytes() + s.repaired_bytes == 0 {
        out += ", no difference";
    }
    out.push('\n');
    if s.misread_chunks > 0 {
        out += &format!(
            "{} chunks of 64 KiB seemed to differ and, looked at again, did not: a disk reads wrong now and then\n",
            s.misread_chunks
        );
    }
    if !s.left_out.is_empty() {
        out += &format!(
            "not, or not all, compared, since not in sync all the time: the copy on {}\n",
            list(&s.left_out, ", ")
        );
    }
    if !s.differences.is_empty() {
        let mut table = Table::new(&["OFFSET", "LENGTH", "WHAT", "COPIES", "REPAIRED"]);
        for d in &s.differences {
            table.row(vec![
                d.offset.to_string(),
                d.length.to_string(),
                d.kind.clone(),
                copies(d),
                if d.repaired { "yes" } else { "no" }.into(),
            ]);
        }
        out += &format!("\n{}", table.text());
    }
    out
}

fn list(nodes: &[NodeName], between: &str) -> String {
    let names: Vec<&str> = nodes.iter().map(|n| n.0.as_str()).collect();
    names.join(between)
}

/// `n1 = n3, n2, n4 unreadable`: who holds the same as whom.
fn copies(d: &Difference) -> String {
    let mut all: Vec<String> = d.agree.iter().map(|nodes| list(nodes, " = ")).collect();
    all.extend(d.unreadable.iter().map(|n| format!("{n} unreadable")));
    all.join(" | ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fixture::node;

    fn view(status: ScrubStatus) -> ScrubView {
        ScrubView {
            node: node("n1"),
            asked: "1970-01-01T00:00:01.000Z".into(),
            status,
        }
    }

    #[test]
    fn a_scrub_is_said_in_a_line_and_reported_in_full() {
        let name: VolumeName = "default/vm1".parse().unwrap();
        let mut s = ScrubStatus::waiting(1, false, 4 << 20);
        assert_eq!(line(&view(s.clone())), "waiting for n1 to begin");
        s.state = ScrubState::Running;
        (s.done_bytes, s.bytes_per_second) = (1 << 20, 1 << 20);
        assert_eq!(
            line(&view(s.clone())),
            "[#####...............] 25 %  3 MiB left  1 MiB/s  ETA 0:03"
        );
        s.state = ScrubState::Done;
        s.compared_bytes = 1 << 20;
        assert_eq!(
            line(&view(s.clone())),
            "no difference, asked for at 1970-01-01T00:00:01.000Z"
        );
        assert_eq!(
            report(&name, &view(s.clone())),
            "default/vm1: 1 MiB compared, no difference\n"
        );
        s.differing_bytes = 8192;
        s.unreadable_bytes = 4096;
        s.repaired_bytes = 4096;
        s.left_out = vec![node("n5")];
        s.differences = vec![
            Difference {
                offset: 65536,
                length: 8192,
                kind: "differs".into(),
                agree: vec![vec![node("n1")], vec![node("n2"), node("n3")]],
                unreadable: Vec::new(),
                repaired: false,
            },
            Difference {
                offset: 131_072,
                length: 4096,
                kind: "unreadable".into(),
                agree: vec![vec![node("n1"), node("n2")]],
                unreadable: vec![node("n3")],
                repaired: true,
            },
        ];
        assert_eq!(
            report(&name, &view(s.clone())),
            "default/vm1: 1 MiB compared, 8 KiB differed, 4 KiB could not be read on some copy, 4 KiB repaired\n\
             not, or not all, compared, since not in sync all the time: the copy on n5\n\n\
             OFFSET  LENGTH  WHAT        COPIES                   REPAIRED\n\
             65536   8192    differs     n1 | n2 = n3             no\n\
             131072  4096    unreadable  n1 = n2 | n3 unreadable  yes\n"
        );
        assert!(line(&view(s)).starts_with("8 KiB not the same on every copy"));
    }
}
