//! `lockstep node upgrade`: the program of a node is replaced under its machines.

use std::thread;
use std::time::{Duration, Instant};

use hyper::Method;

use super::output::{fields, or_dash, print};
use super::{Failure, Global, note};
use crate::cluster::fault::{Code, Fault};
use crate::cluster::host::{UpgradeState, UpgradeView};

const PATH: &str = "/api/v1/local/upgrade";
/// Between two looks.
const LOOK: Duration = Duration::from_millis(50);
/// Longer than a node waits for front-ends without an in-flight region, its start with copies that are in use, and what no volume
/// claims, together.
const PATIENCE: Duration = Duration::from_secs(90);

pub(super) fn run(global: &Global) -> Result<(), Failure> {
    let remote = global.remote();
    let before: UpgradeView = remote.get(PATH)?;
    remote.send_off::<UpgradeView>(Method::POST, PATH)?;
    let begun = Instant::now();
    let mut last = before.clone();
    let late = |view: &UpgradeView| {
        let what = match view.instance == before.instance {
            true => "has not been replaced",
            false => "has not taken over all machines",
        };
        Fault::try_again(format!(
            "the program of node {} {what} within {}s",
            view.node,
            PATIENCE.as_secs()
        ))
        .hint("look at the node's log")
    };
    while begun.elapsed() < PATIENCE {
        match remote.get::<UpgradeView>(PATH) {
            Ok(view) => {
                last = view;
                let same = last.instance == before.instance;
                match last.state {
                    UpgradeState::Failed if same => {
                        let why =
                            format!("the program was not replaced, and serves on: {}", last.why);
                        return Err(Fault::try_again(why).into());
                    }
                    UpgradeState::TakingOver => {}
                    _ if same => {}
                    UpgradeState::Done => return done(global, &last),
                    // Its predecessor was replaced and it was not told: it ended, and was started anew.
                    _ => {
                        return Err(Fault::state(format!(
                            "the program of node {} ended and was started anew: machines had to connect again",
                            last.node
                        ))
                        .hint("look at the node's log for why")
                        .into());
                    }
                }
            }
            // It is about to answer.
            Err(fault) if fault.code == Code::TryAgain => {}
            Err(fault) => return Err(fault.into()),
        }
        thread::sleep(LOOK);
    }
    Err(late(&last).into())
}

fn done(global: &Global, view: &UpgradeView) -> Result<(), Failure> {
    if view.lost > 0 {
        note(&format!(
            "{} front-ends could not be taken over and connect again; the node's log says why",
            view.lost
        ));
    }
    print(global.output, view, |view| {
        fields(&[
            ("Node", view.node.to_string()),
            ("Process", view.pid.to_string()),
            ("Program", view.program.display().to_string()),
            ("Version", view.version.clone()),
            ("Before", or_dash(view.from.as_deref().unwrap_or_default())),
            ("Taken over", view.taken_over.to_string()),
            ("Lost", view.lost.to_string()),
            (
                "Standstill",
                view.standstill_ms
                    .map_or("-".into(), |ms| format!("{ms} ms")),
            ),
        ])
    })
}
