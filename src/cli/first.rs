//! `lockstep` alone: what to type first.

use std::time::Duration;

use hyper::Method;

use super::Global;
use crate::api::client::{ask, runtime};
use crate::cluster::live::Identity;

/// A node on this machine answers at once or is busy.
const PATIENCE: Duration = Duration::from_secs(1);

/// The text, which depends on whether a node answers.
pub(super) fn steps(global: &Global) -> String {
    let mut text =
        String::from("lockstep: disks for virtual machines that survive the loss of a node\n\n");
    text += &match answering(global) {
        Some(who) => format!(
            "Node {} answers at {}. Now:\n\n  \
             lockstep volume create vm1 --size 10GiB        a disk, here without replicas\n  \
             lockstep volume attach vm1 --print qemu        serve it, and print QEMU's flags\n  \
             lockstep volume inspect vm1                    how it is, and why\n  \
             lockstep cluster status                        what needs attention\n",
            who.node, global.host
        ),
        None => format!(
            "No node answers at {}. First:\n\n  \
             lockstep doctor                                can this machine run one?\n  \
             lockstep node --name n1                        run one\n  \
             lockstep --host unix:RUN-DIR/api.sock ...      talk to one that has another --run-dir\n",
            global.host
        ),
    };
    text + "\nAll commands: lockstep --help\n"
}

fn answering(global: &Global) -> Option<Identity> {
    let runtime = runtime().ok()?;
    let asked = ask(&global.host, Method::GET, "/healthz", None, Some(PATIENCE));
    let answer = runtime.block_on(asked).ok()?;
    serde_json::from_slice(&answer.body).ok()
}
