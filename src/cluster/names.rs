//! Where nodes are that go by a name (`--advertise n2.example:5703`): asked of the system's resolver on a thread of its own.
//!
//! A name server that is away lets whoever asks wait for many seconds. Nobody waits for it here, and what was known is not
//! forgotten: a connection that breaks has to be there again within 400 ms, or a copy is put out whose node is well.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::plane::Plane;
use super::snapshot::Snapshot;

/// How often each name is asked for again: addresses change with the machines, not with the minute.
const ASK: Duration = Duration::from_secs(5);
/// How late a new name, or a stop, is seen.
const NAP: Duration = Duration::from_millis(200);

/// Addresses by `HOST:PORT`.
#[derive(Default)]
pub(super) struct Names(Mutex<State>);

#[derive(Default)]
struct State {
    known: BTreeMap<String, Known>,
    /// Grows with every change that matters.
    version: u64,
}

/// What is known of one name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// The address that it had last.
    pub(super) address: Option<SocketAddr>,
    /// Why it was not found when it was asked for last; empty when it was.
    pub(super) trouble: String,
}

impl Names {
    /// What is known of `HOST:PORT`; `None`: it was not asked for yet. An address is its own.
    pub(super) fn known(&self, text: &str) -> Option<Known> {
        match text.parse() {
            Ok(address) => Some(Known {
                address: Some(address),
                trouble: String::new(),
            }),
            Err(_) => self.lock().known.get(text).cloned(),
        }
    }

    /// The address behind `HOST:PORT`, or that as it is while nothing is known of it.
    pub(super) fn digits(&self, text: &str) -> String {
        let address = self.known(text).and_then(|known| known.address);
        address.map_or_else(|| text.into(), |address| address.to_string())
    }

    /// Another number after each change.
    pub(super) fn version(&self) -> u64 {
        self.lock().version
    }

    /// Whether each name in use was asked for.
    pub(super) fn all_asked(&self, snapshot: &Snapshot) -> bool {
        let state = self.lock();
        in_use(snapshot)
            .iter()
            .all(|name| state.known.contains_key(name))
    }

    /// Takes in an answer. What fails leaves the address that was.
    fn note(&self, name: &str, answer: Result<SocketAddr, String>) {
        let mut state = self.lock();
        let before = state.known.get(name).cloned();
        let mut now = before.clone().unwrap_or_default();
        match answer {
            Ok(address) => {
                now = Known {
                    address: Some(address),
                    trouble: String::new(),
                }
            }
            Err(why) => now.trouble = why,
        }
        if before.as_ref() != Some(&now) {
            state.version += 1;
            state.known.insert(name.into(), now);
        }
    }

    /// Forgets names of nobody.
    fn retain(&self, names: &BTreeSet<String>) {
        self.lock().known.retain(|name, _| names.contains(name));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is whole before anything in it can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The names by which nodes are to be reached.
fn in_use(snapshot: &Snapshot) -> BTreeSet<String> {
    let nodes = snapshot.nodes.values();
    let all = nodes.flat_map(|(node, _)| [&node.address, &node.http]);
    let names = all.filter(|text| text.parse::<SocketAddr>().is_err());
    names.cloned().collect()
}

/// Asks for all names again and again until the node stops.
pub(super) fn watch(plane: &Plane) {
    let mut next = Instant::now();
    let goes_on = || plane.still_running().is_ok();
    while goes_on() {
        let names = plane.known().map_or(BTreeSet::new(), |s| in_use(&s));
        let all = Instant::now() >= next;
        for name in &names {
            if !all && plane.names.known(name).is_some() {
                continue;
            }
            match ask(name, goes_on) {
                Some(answer) => plane.names.note(name, answer),
                None => return,
            }
        }
        if all {
            plane.names.retain(&names);
            next = Instant::now() + ASK;
        }
        thread::sleep(NAP);
    }
}

/// Asks on a thread that may be left behind, since nothing ends a question to the resolver. `None`: the node stops.
fn ask(name: &str, goes_on: impl Fn() -> bool) -> Option<Result<SocketAddr, String>> {
    let (sender, receiver) = sync_channel(1);
    let text = name.to_string();
    let asked = thread::Builder::new().name("name".into()).spawn(move || {
        let found = match text.to_socket_addrs() {
            Ok(mut all) => all.next().ok_or_else(|| "it has no address".to_string()),
            Err(e) => Err(e.to_string()),
        };
        // Nobody waits any more when the node stops.
        let _ = sender.send(found);
    });
    if let Err(e) = asked {
        return Some(Err(format!("no thread to ask: {e}")));
    }
    while goes_on() {
        match receiver.recv_timeout(NAP) {
            Ok(answer) => return Some(answer),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Some(Err("nobody answered".into())),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_last_address_until_it_has_another() {
        let names = Names::default();
        let at = |n: u8| SocketAddr::from(([10, 0, 0, n], 5703));
        let name = "n2.example:5703";
        let mut version = names.version();
        // (the answer, then: the address, the trouble, whether that is a change)
        for (answer, address, trouble, changed) in [
            (Err("away"), None, "away", true),
            (Ok(at(2)), Some(at(2)), "", true),
            (Ok(at(2)), Some(at(2)), "", false),
            (Err("away"), Some(at(2)), "away", true),
            (Err("away"), Some(at(2)), "away", false),
            (Ok(at(3)), Some(at(3)), "", true),
        ] {
            names.note(name, answer.map_err(String::from));
            let known = names.known(name).unwrap();
            assert_eq!((known.address, known.trouble.as_str()), (address, trouble));
            assert_eq!(names.version() != version, changed);
            version = names.version();
        }
        assert_eq!(names.digits(name), "10.0.0.3:5703");
        names.retain(&BTreeSet::new());
        assert_eq!(names.known(name), None);
        assert_eq!(names.digits(name), name);
        // An address is never asked for.
        assert_eq!(names.known("10.0.0.4:5703").unwrap().address, Some(at(4)));
    }
}
