//! A node's program is replaced under its running machines: the process runs the program that is at its path now (execve(2)),
//! and that one goes on where this one stops.
//!
//! 1. *Asked* (`lockstep node upgrade`, SIGUSR2): nothing is stopped before it is known that the new program runs, understands
//!    our arguments, reads what we leave ([`handover`]) and every copy's format; that the registry answers, which a node that
//!    starts needs; and that the disk does, which the system waits for.
//! 2. *Standing still*: first the front-ends that keep no in-flight region, until nothing of theirs is in flight; if that does
//!    not come about everything goes on and the upgrade is refused. Then the others, for a moment only: what is in flight then
//!    is submitted again, as after the death of a process (PROTOCOL 5). One front-end that does not let its server stand still
//!    holds nobody up: its connection is closed, and it connects again to the new program.
//! 3. *Replaced*: the new program takes the volumes over as one that was started after a crash, with a claim and a
//!    reconciliation, and their front-ends by their own sockets. If the program cannot be run, everything goes on here.
//!
//! Why a claim, and not the attachment itself: the state machines of two versions need not have anything in common but the
//! record, the copies and the wire, and all three have been designed to be taken over from the dead.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::handover::{self, Inherited, Names, Standing};
use super::{NodeHost, ServedFront, lock};
use crate::cluster::config::NodeConfig;
use crate::cluster::events::{EventLog, What};
use crate::cluster::fault::Fault;
use crate::cluster::host::{UpgradeState, UpgradeView};
use crate::cluster::join::{Doors, Membership};
use crate::cluster::store::Store;
use crate::copy::NodeDir;
use crate::engine::{exec, now};
use crate::guest::{Handed, Moves, Stand, Tally, Who};
use crate::replication::ids::{Instance, Nanos, NodeName, VolumeId};

/// How long requests in flight are waited for while all front-ends stand still. A healthy volume answers within this;
/// what does not is submitted again.
const DRAIN: Duration = Duration::from_millis(100);
/// The same for front-ends without an in-flight region, while the others go on: as long as a front-end waits that stops a ring.
const DRAIN_UNTRACKED: Duration = Duration::from_secs(5);
/// Beyond the drain: a worker's tick, and what a front-end asked just before.
const GRACE: Duration = Duration::from_secs(1);
/// A disk that is at one request for so long hangs, and the system would wait for it with every volume of the node.
const DISK_HANGS: Nanos = Nanos::from_ms(1_000);
/// How long the new program may take to say whether it can take over.
const ANSWER: Duration = Duration::from_secs(10);
/// Between two looks whether it has.
const ANSWER_LOOK: Duration = Duration::from_millis(10);
/// Bytes of what it says that are passed on.
const SAID_MAX: usize = 500;
/// From the acceptance to the beginning: in this time whoever asked has got the answer.
const SETTLE: Duration = Duration::from_millis(250);
/// A connection that no volume has claimed by then is closed, so that its front-end connects again.
const CLAIMED: Duration = Duration::from_secs(30);

/// Says whether this program could take over from one that hands over in `format` and runs with this configuration.
///
/// # Errors
///
/// Why not, and what to do.
pub fn can_take_over(config: &NodeConfig, format: u32) -> Result<(), Fault> {
    handover::reads(format).map_err(Fault::state)?;
    config.security()?;
    NodeDir::is_readable(&config.data_dir, &config.name).map_err(super::dir_fault)
}

/// The program of this process, to be run again.
struct Program {
    path: PathBuf,
    /// The name it was called by among them, as it was.
    args: Vec<OsString>,
}

impl Program {
    /// What this process was started by: the path that was given or found then, not the file that it led to, so that a link
    /// which is changed leads to the new one.
    fn ours() -> io::Result<Program> {
        let args: Vec<OsString> = std::env::args_os().collect();
        let running = std::fs::metadata("/proc/self/exe")?;
        let is_ours = |path: &Path| {
            std::fs::metadata(path)
                .is_ok_and(|m| (m.dev(), m.ino()) == (running.dev(), running.ino()))
        };
        let called = PathBuf::from(args.first().cloned().unwrap_or_default());
        let found = if called.components().count() > 1 {
            std::path::absolute(&called).ok()
        } else {
            let dirs = std::env::var_os("PATH").unwrap_or_default();
            let mut all = std::env::split_paths(&dirs).map(|dir| dir.join(&called));
            all.find(|path| is_ours(path))
        };
        let path = match found.filter(|path| is_ours(path)) {
            Some(path) => path,
            None => std::fs::read_link("/proc/self/exe")?,
        };
        Ok(Program { path, args })
    }

    /// Asks the file at the path whether it could take over.
    fn is_fit(&self) -> Result<(), Fault> {
        let path = self.path.display();
        let remedy = "this program serves on; put a whole one of a version that fits there, or restart the node (SIGTERM, then start)";
        let mut command = Command::new(&self.path);
        if let [name, args @ ..] = &self.args[..] {
            command.arg0(name).args(args);
        }
        command
            .arg("--can-take-over")
            .arg(handover::FORMAT.to_string())
            .env_remove(handover::VARIABLE)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|e| Fault::state(format!("{path} cannot be run: {e}")).hint(remedy))?;
        let failed = |why: String| Fault::state(format!("{path} cannot take over: {why}"));
        let begun = Instant::now();
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if begun.elapsed() < ANSWER => thread::sleep(ANSWER_LOOK),
                waited => {
                    let _ = child.kill();
                    let _ = child.wait();
                    let why = match waited {
                        Err(e) => e.to_string(),
                        Ok(_) => format!("it does not say within {}s", ANSWER.as_secs()),
                    };
                    return Err(failed(why).hint(remedy));
                }
            }
        };
        if status.success() {
            return Ok(());
        }
        let mut said = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            // What it wrote before it ended; whoever it may have left behind is not waited for.
            let _ = rustix::io::ioctl_fionbio(&stderr, true);
            let _ = stderr.take(SAID_MAX as u64).read_to_end(&mut said);
        }
        let said = String::from_utf8_lossy(&said);
        Err(failed(format!("{status}: {}", said.trim())).hint(remedy))
    }
}

/// Takes part in replacements: what is needed to be replaced, and what came of having replaced another.
pub(super) struct Upgrade {
    program: Program,
    names: Names,
    doors: Doors,
    store: Arc<Store>,
    events: Arc<EventLog>,
    node: NodeName,
    instance: Instance,
    state: Mutex<State>,
    /// What the program before left and no volume has claimed yet.
    left: Mutex<HashMap<VolumeId, (PathBuf, Handed)>>,
    /// Whom this program replaced.
    past: Option<Past>,
}

struct Past {
    version: String,
    stood_still: Instant,
    tally: Tally,
}

#[derive(Default)]
struct State {
    /// Since when a replacement is to come about.
    accepted: Option<Instant>,
    /// Why the last one failed.
    failed: Option<String>,
    /// Since when the records have been acted on.
    acted: Option<Instant>,
    /// What this program took over has been told.
    told: bool,
}

impl Upgrade {
    pub(super) fn new(
        membership: &Membership,
        inherited: Option<Inherited>,
    ) -> Result<Self, Fault> {
        let internal =
            |e: io::Error| Fault::internal(format!("an upgrade cannot be prepared: {e}"));
        let (left, past) = match inherited {
            None => (HashMap::new(), None),
            Some(inherited) => (
                inherited.volumes,
                Some(Past {
                    version: inherited.version,
                    stood_still: inherited.stood_still,
                    tally: inherited.tally,
                }),
            ),
        };
        Ok(Self {
            program: Program::ours().map_err(internal)?,
            names: Names::of(&membership.config),
            doors: membership.doors().map_err(internal)?,
            store: Arc::clone(&membership.store),
            events: Arc::clone(&membership.events),
            node: membership.node.clone(),
            instance: membership.instance,
            state: Mutex::default(),
            left: Mutex::new(left),
            past,
        })
    }

    /// What the program before served on this socket.
    pub(super) fn claim(&self, volume: VolumeId, socket: &Path) -> Option<Handed> {
        let mut left = lock(&self.left);
        let (_, handed) = left.remove(&volume).filter(|(path, _)| path == socket)?;
        Some(handed)
    }

    /// Closes what no volume has claimed, and tells how the takeover went once that is known. `acted`: the records have been acted
    /// on; until then it is not known what is to be claimed.
    pub(super) fn look_after(&self, acted: bool) {
        let Some(past) = &self.past else { return };
        let mut state = lock(&self.state);
        if state.told {
            return;
        }
        if acted && state.acted.get_or_insert_with(Instant::now).elapsed() > CLAIMED {
            for (_, (socket, _)) in lock(&self.left).drain() {
                log::warn!(
                    "{}: the program before served a volume there that is not attached any more; its front-end is let go",
                    socket.display()
                );
            }
        }
        if past.tally.open() > 0 {
            return;
        }
        state.told = true;
        drop(state);
        let mut text = format!("took over from version {}", past.version);
        if let Some(ms) = past.standstill() {
            let (taken, lost) = (past.tally.taken(), past.tally.lost());
            text += &format!(
                ": {taken} front-ends are served on, {lost} connect again, {ms} ms after they stood still"
            );
        }
        log::info!("{text}");
        self.events.push(What::node("", "up", "upgrade").text(text));
    }

    pub(super) fn view(&self) -> UpgradeView {
        let state = lock(&self.state);
        let tally = self.past.as_ref().map(|past| &past.tally);
        UpgradeView {
            node: self.node.clone(),
            instance: self.instance,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            from: self.past.as_ref().map(|past| past.version.clone()),
            program: self.program.path.clone(),
            state: match (&state.accepted, &state.failed, tally) {
                (Some(_), ..) => UpgradeState::Accepted,
                (None, Some(_), _) => UpgradeState::Failed,
                (None, None, Some(tally)) if tally.open() > 0 => UpgradeState::TakingOver,
                (None, None, Some(_)) => UpgradeState::Done,
                (None, None, None) => UpgradeState::None,
            },
            why: state.failed.clone().unwrap_or_default(),
            taken_over: tally.map_or(0, Tally::taken),
            lost: tally.map_or(0, Tally::lost),
            standstill_ms: self.past.as_ref().and_then(Past::standstill),
        }
    }

    /// Whether a replacement is to begin.
    pub(super) fn is_due(&self) -> bool {
        lock(&self.state)
            .accepted
            .is_some_and(|at| at.elapsed() >= SETTLE)
    }

    fn fail(&self, why: String) {
        log::error!("the program was not replaced, and serves on: {why}");
        let mut state = lock(&self.state);
        state.accepted = None;
        state.failed = Some(why.clone());
        self.events
            .push(What::node("up", "up", "upgrade-failed").text(why));
    }
}

impl Past {
    /// Until the last connection was taken over, in milliseconds; nothing before, or when there was none.
    fn standstill(&self) -> Option<u64> {
        if self.tally.open() > 0 {
            return None;
        }
        let last = self.tally.last()?;
        Some(last.saturating_duration_since(self.stood_still).as_millis() as u64)
    }
}

impl NodeHost {
    /// Checks all that can be, and has the main thread begin in a moment.
    pub(super) fn accept_upgrade(&self) -> Result<UpgradeView, Fault> {
        let upgrade = &self.upgrade;
        if lock(&upgrade.state).accepted.is_some() {
            return Err(Fault::try_again("the program is being replaced already"));
        }
        if upgrade.view().state == UpgradeState::TakingOver {
            return Err(Fault::try_again(
                "this program has not taken over all front-ends of the one before yet",
            ));
        }
        upgrade.store.cluster()?;
        let age = self.engine.disk_age();
        if age > DISK_HANGS {
            return Err(Fault::try_again(format!(
                "the disk of node {} has been at one request for {} ms, and a program can only be replaced when its requests have ended",
                self.me.node,
                age.0 / 1_000_000
            ))
            .hint("wait until it answers, or move the volumes to other nodes"));
        }
        exec::keep_nothing()
            .map_err(|e| Fault::internal(format!("descriptors cannot be held back: {e}")))?;
        upgrade.program.is_fit()?;
        let mut state = lock(&upgrade.state);
        state.failed = None;
        state.accepted = Some(Instant::now());
        drop(state);
        log::info!(
            "{} is to replace this program",
            upgrade.program.path.display()
        );
        Ok(upgrade.view())
    }

    /// Replaces the program. Returns only if it could not: then everything goes on.
    pub(super) fn replace(&self, told_to_end: impl FnOnce() -> bool) {
        let served = lock(&self.served);
        let fronts: Fronts = served
            .iter()
            .filter_map(|(volume, served)| Some((*volume, served.front.as_ref()?)))
            .collect();
        let replaced = || -> Result<(), String> {
            let (standing, stood_still) = stand_still(&fronts)?;
            exec::hold_signals(true);
            if told_to_end() {
                return Err("the node is told to end".into());
            }
            let upgrade = &self.upgrade;
            let left = handover::leave(&upgrade.names, &upgrade.doors, stood_still.0, &standing)
                .map_err(|e| format!("what the next program needs cannot be left: {e}"))?;
            let variable = (handover::VARIABLE.into(), handover::variable(&left).into());
            let env: Vec<(OsString, OsString)> = std::env::vars_os()
                .filter(|(key, _)| key != handover::VARIABLE)
                .chain([variable])
                .collect();
            let Program { path, args } = &upgrade.program;
            log::info!(
                "{} volumes stand still; {} takes over",
                standing.len(),
                path.display()
            );
            let e = exec::exec(path, args, &env);
            Err(format!("{} cannot be run: {e}", path.display()))
        };
        let failed = replaced();
        exec::hold_signals(false);
        fronts.iter().for_each(|(_, front)| front.server.resume());
        drop(fronts);
        drop(served);
        if let Err(why) = failed {
            self.upgrade.fail(why);
        }
    }
}

/// What is served, by volume.
type Fronts<'a> = Vec<(VolumeId, &'a ServedFront)>;

/// Has all servers stand still, also if that costs a connection. Gives when the last ones were asked to.
///
/// # Errors
///
/// A sentence for people. Those that stand still must be told to go on.
fn stand_still(fronts: &Fronts) -> Result<(Vec<Standing>, Nanos), String> {
    let mut let_go = Vec::new();
    loop {
        let mut standing = std::mem::take(&mut let_go);
        let mut late = ask(fronts, &mut standing, Who::Untracked, DRAIN_UNTRACKED)?;
        let since = now();
        if late.is_empty() {
            late = ask(fronts, &mut standing, Who::All, DRAIN)?;
        }
        if late.is_empty() {
            return Ok((standing, since));
        }
        // What their front-ends have asked for takes seconds, in which all others go on. They themselves stand still from
        // then on, so that no front-end holds up the next attempt, too.
        let (gone, others): (Vec<_>, Vec<_>) = standing.into_iter().partition(|s| s.lost);
        for Standing { volume, .. } in &others {
            let front = fronts.iter().find(|(other, _)| other == volume);
            front.inspect(|(_, front)| front.server.resume());
        }
        let_go = gone;
        for (volume, front) in fronts.iter().filter(|(volume, _)| late.contains(volume)) {
            let_go.push(Standing {
                volume: *volume,
                socket: front.socket().to_owned(),
                handed: let_it_go(front)?,
                lost: true,
            });
        }
    }
}

/// Asks the servers that do not stand still yet. Gives those that do not answer in time.
fn ask(
    fronts: &Fronts,
    standing: &mut Vec<Standing>,
    who: Who,
    drain: Duration,
) -> Result<Vec<VolumeId>, String> {
    let had: Vec<VolumeId> = standing.iter().map(|s| s.volume).collect();
    let left = fronts.iter().filter(|(volume, _)| !had.contains(volume));
    let asked: Vec<_> = left
        .map(|(volume, front)| (*volume, front, front.server.park(who, drain)))
        .collect();
    let deadline = Instant::now() + drain + GRACE;
    let mut late = Vec::new();
    for (volume, front, parking) in asked {
        match parking.wait(deadline) {
            Ok(Stand::GoesOn) => {}
            Ok(Stand::Still(handed)) => standing.push(Standing {
                volume,
                socket: front.socket().to_owned(),
                handed,
                lost: false,
            }),
            Err(Moves::Late) => late.push(volume),
            Err(Moves::Cannot(why)) => return Err(why),
        }
    }
    Ok(late)
}

/// Closes a connection, and has its server stand still without one.
fn let_it_go(front: &ServedFront) -> Result<Handed, String> {
    let socket = front.socket().display();
    log::warn!(
        "{socket}: {}; its connection is closed, so that the program can be replaced, and may be made again",
        Moves::Late
    );
    front.server.hang_up();
    let deadline = Instant::now() + DRAIN_UNTRACKED + GRACE;
    loop {
        match front.server.park(Who::All, Duration::ZERO).wait(deadline) {
            Ok(Stand::Still(handed)) => {
                // It may have stood still before it heard of the end.
                let session = None;
                return Ok(Handed { session, ..handed });
            }
            // It has not heard of the end yet.
            Ok(Stand::GoesOn) | Err(Moves::Cannot(_)) if Instant::now() < deadline => {
                thread::sleep(ANSWER_LOOK);
            }
            _ => return Err(format!("{socket}: {}; try again", Moves::Late)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_takes_over_only_in_the_format_that_it_reads() {
        assert!(handover::reads(handover::FORMAT).is_ok());
        for other in [0, handover::FORMAT + 1, u32::MAX] {
            let why = handover::reads(other).unwrap_err();
            assert!(
                why.contains(&format!("format {other}")) && why.contains("restart"),
                "{why}"
            );
        }
    }

    #[test]
    fn our_own_program_is_found_and_understands_the_question_or_says_that_it_does_not() {
        let program = Program::ours().unwrap();
        assert_eq!(
            std::fs::canonicalize(&program.path).unwrap(),
            std::env::current_exe().unwrap()
        );
        // The test's own program knows no such argument.
        let fault = program.is_fit().unwrap_err();
        assert!(fault.message.contains("cannot take over"), "{fault}");
        let missing = Program {
            path: "/nowhere/lockstep".into(),
            args: vec!["lockstep".into(), "node".into()],
        };
        let fault = missing.is_fit().unwrap_err();
        assert!(
            fault.message.contains("/nowhere/lockstep cannot be run"),
            "{fault}"
        );
    }
}
