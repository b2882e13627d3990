//! Volumes named on the node's command line: created when absent, served from here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::attach::{AttachOptions, attach};
use super::config::Serve;
use super::create::{CreateRequest, create};
use super::fault::{Code, Fault};
use super::model::{Desired, Labels};
use super::plane::{Found, Plane};
use super::settings::{Wishes, parse_failure_mode};
use super::units::show_size;

/// Pause before a volume that could not be served is tried again: other nodes may still be starting. It doubles up to
/// [`PAUSE_MAX`] as long as the reason is the same, since each attempt asks the registry: the volume may be served elsewhere for
/// good.
const PAUSE: Duration = Duration::from_secs(2);
const PAUSE_MAX: Duration = Duration::from_secs(120);
/// How late a stop is seen.
const NAP: Duration = Duration::from_millis(100);

/// What became of a volume that is not served yet.
struct Waiting {
    wanted: Serve,
    /// Why it is not.
    said: String,
    /// Attempts that failed for that reason.
    vain: u32,
    /// Not before.
    next: Instant,
}

impl Waiting {
    /// It failed once more: whether for another reason than before.
    fn failed(&mut self, text: String, now: Instant) -> bool {
        let new = self.said != text;
        if new {
            (self.said, self.vain) = (text, 0);
        }
        self.next = now + PAUSE_MAX.min(PAUSE * (1 << self.vain.min(6)));
        self.vain += 1;
        new
    }
}

/// Sees to every declared volume until all are served or `stop` is set. A reason for waiting is logged when it
/// changes.
pub(super) fn run(plane: &Arc<Plane>, serve: Vec<Serve>, stop: &AtomicBool) {
    let now = Instant::now();
    let waiting = |wanted| Waiting {
        wanted,
        said: String::new(),
        vain: 0,
        next: now,
    };
    let mut serve: Vec<Waiting> = serve.into_iter().map(waiting).collect();
    while !serve.is_empty() && !stop.load(Ordering::Acquire) {
        if plane.waits().is_some() {
            thread::sleep(NAP);
            continue;
        }
        serve.retain_mut(|waiting| {
            if waiting.next > Instant::now() {
                return true;
            }
            let Err(fault) = ensure(plane, &waiting.wanted) else {
                return false;
            };
            let name = &waiting.wanted.name;
            let hint = fault.hint.map_or(String::new(), |h| format!(" ({h})"));
            let text = format!("--vhost-user-blk {name}: {}{hint}", fault.message);
            if waiting.failed(text, Instant::now()) {
                log::warn!("{}", waiting.said);
            }
            // What was given will not make more sense later.
            fault.code != Code::InvalidInput
        });
        thread::sleep(NAP);
    }
}

fn ensure(plane: &Arc<Plane>, wanted: &Serve) -> Result<(), Fault> {
    let mut options = AttachOptions {
        node: Some(plane.node.clone()),
        socket: wanted.socket.clone(),
        num_queues: wanted.num_queues,
        ..AttachOptions::default()
    };
    match plane.find(&wanted.name) {
        Ok(found) => {
            let here = |a: &&Desired| a.node == plane.node && a.release.is_none();
            if let Some(present) = found.spec.0.attachment.as_ref().filter(here) {
                // Its spec had it served here before this start; a running machine knows that socket.
                options.socket = None;
                options.num_queues = None;
                options.read_only = present.read_only;
            }
            for difference in differences(wanted, &found) {
                log::warn!("volume {} is served as it is: {difference}", wanted.name);
            }
        }
        Err(fault) if fault.code == Code::NotFound => {
            let size = wanted.size.ok_or_else(|| {
                Fault::input(format!("volume {} does not exist", wanted.name)).hint(format!(
                    "add a size to have it created: --vhost-user-blk {},size=10GiB",
                    wanted.name
                ))
            })?;
            let request = CreateRequest {
                namespace: wanted.name.namespace.clone(),
                name: wanted.name.name.clone(),
                size,
                labels: Labels::new(),
                wishes: Wishes {
                    replicas: wanted.replicas,
                    failure_mode: wanted.failure_mode.clone(),
                    ..Wishes::default()
                },
                no_wait: false,
            };
            match create(plane, request) {
                Ok(_) => {}
                // Another node declares it as well and was faster: it is there now.
                Err(fault) if fault.code == Code::Exists => {}
                Err(fault) => return Err(fault),
            }
        }
        Err(fault) => return Err(fault),
    }
    let attached = attach(plane, &wanted.name, options)?;
    log::info!(
        "volume {} is served at {}",
        attached.volume,
        attached.socket.display()
    );
    Ok(())
}

/// How the volume is not as the command line says, one clause each.
fn differences(wanted: &Serve, found: &Found) -> Vec<String> {
    let record = &found.record.0;
    let mut differences = Vec::new();
    if let Some(present) = &found.spec.0.attachment {
        if let Some(socket) = wanted.socket.as_ref().filter(|s| **s != present.socket) {
            differences.push(format!(
                "its socket is {}, not {}",
                present.socket.display(),
                socket.display()
            ));
        }
        if let Some(n) = wanted.num_queues.filter(|n| *n != present.num_queues) {
            differences.push(format!("it has {} queues, not {n}", present.num_queues));
        }
    }
    if let Some(size) = wanted.size.filter(|s| *s != record.size) {
        differences.push(format!(
            "its size is {}, not {}",
            show_size(record.size),
            show_size(size)
        ));
    }
    if let Some(replicas) = wanted.replicas.filter(|r| *r != record.replicas_wanted) {
        differences.push(format!(
            "it has {} replicas, not {replicas}",
            record.replicas_wanted
        ));
    }
    if let Some(text) = &wanted.failure_mode
        && let Ok(mode) = parse_failure_mode(text)
        && mode != record.failure_mode
    {
        differences.push(format!(
            "its failure mode is {}, not {}",
            record.failure_mode, mode
        ));
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_for_the_same_reason_is_tried_more_and_more_rarely() {
        let now = Instant::now();
        let mut waiting = Waiting {
            wanted: "vm1".parse().unwrap(),
            said: String::new(),
            vain: 0,
            next: now,
        };
        let mut fails = |why: &str| {
            let new = waiting.failed(why.into(), now);
            (new, (waiting.next - now).as_secs())
        };
        for pause in [2, 4, 8, 16, 32, 64, 120, 120] {
            assert_eq!(fails("elsewhere"), (pause == 2, pause));
        }
        assert_eq!(fails("full"), (true, 2));
    }
}
